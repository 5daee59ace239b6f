"""From a preference pair to token ids: one place decides where the prompt ends and what closes a response.

One idea to keep in mind: prompt ids are exactly what the model sees when it is asked to answer, and a response
is exactly what it would then have to produce, its closing EOS included. So no token straddles the border, and
log p(response | prompt) is a probability of something the model can do.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_cli.data.formats import FinishReason, Message, PreferencePair, Prompt
from dpo_cli.errors import CheckpointError, ConfigError

TokenIds = NDArray[np.int32]


@dataclass(frozen=True)
class TokenizedPair:
    """One pair as token ids, truncated to fit."""

    prompt: TokenIds  # (prompt tokens,): at least one
    chosen: TokenIds  # (chosen tokens,): at least one; closed by EOS unless truncated or generated up to a limit
    rejected: TokenIds  # (rejected tokens,)
    index: int  # the row in its file, from 0
    key: str  # hash of the pair's texts
    group: int  # of its prompt (data/groups.py), 64 bits: pairs of one group are not independent

    @property
    def responses(self) -> tuple[TokenIds, TokenIds]:
        """Chosen and rejected."""
        return self.chosen, self.rejected

    @cached_property
    def response_keys(self) -> tuple[bytes, ...]:
        """Of each response the key of its cached log-prob: 16 bytes for the tokens of prompt and response."""
        return tuple(_tokens_key(self.prompt, response) for response in self.responses)


def _tokens_key(*sequences: TokenIds) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for ids in sequences:  # the length keeps [1, 2], [3] from [1], [2, 3]
        digest.update(len(ids).to_bytes(4, "little") + ids.astype("<i4").tobytes())
    return digest.digest()


@dataclass
class Truncation:
    """What max_length cost, counted over all pairs that were kept."""

    prompts_cut: int = 0
    responses_cut: int = 0  # each lost its closing EOS with the cut


@dataclass(frozen=True)
class Encoded:
    """A pair's token ids before truncation."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass
class PairEncoder:
    """Renders pairs under a template and encodes them.

    `kind` is `chat` or `plain`; None takes the model's chat template where it has one. `closing` is the token
    that ends a response: what the chat template puts after an answer, else the tokenizer's EOS. A response whose
    finish_reason is length gets none, except with `always_closes`: a reward model is read at the closing token.
    """

    tokenizer: Any
    kind: str | None
    always_closes: bool = False
    closing: int = field(init=False)
    reason: str = field(init=False)  # why this template
    opening: list[int] = field(init=False)  # ids before a plain prompt: BOS, where the tokenizer adds one
    borders_merged: int = 0  # responses whose first token would have straddled the border
    length_limited: int = 0  # responses that stopped at a limit (finish_reason length)
    closing_inside: int = 0  # responses that hold the closing token in their middle

    def __post_init__(self) -> None:
        has_template = bool(getattr(self.tokenizer, "chat_template", None))
        if self.kind == "chat" and not has_template:
            raise ConfigError("data.template=chat: this model has no chat template; choose data.template=plain")
        self.reason = (
            "as requested" if self.kind else "the model has a chat template" if has_template else "no chat template"
        )
        self.kind = self.kind or ("chat" if has_template else "plain")
        self.closing = self._closing_token()
        bos = self.tokenizer.bos_token_id
        adds_bos = bos is not None and self.tokenizer("a").input_ids[:1] == [bos]
        self.opening = [bos] if adds_bos else []

    def _closing_token(self) -> int:
        if self.kind == "chat":
            question = Message("user", "question")
            try:
                prompt = self._render((question,), True)
                whole = self._render((question, Message("assistant", "answer")), False)
            except Exception as error:
                raise ConfigError(f"the model's chat template fails ({error}); choose data.template=plain") from None
            if "question" not in prompt or "answer" not in whole:
                raise ConfigError(
                    "the model's chat template leaves out what user or assistant say; choose data.template=plain"
                )
            before, after = whole.rsplit("answer", 1)
            if before != prompt:  # an empty thought before every answer, say: how the model is asked is what counts
                self.reason += ", which opens an answer otherwise when it is asked for one: so it is trained"
            # Not all_special_ids: the token that ends a turn often has no role of its own.
            added = self.tokenizer.added_tokens_decoder
            special = [token for token in self._encode(after) if token in added and added[token].special]
            if special:
                return int(special[0])
        if self.tokenizer.eos_token_id is None:
            raise CheckpointError("the tokenizer has no EOS token, so no response can be closed; set its eos_token")
        return int(self.tokenizer.eos_token_id)

    def _render(self, messages: tuple[Message, ...], add_generation_prompt: bool) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        text: str = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return text

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def prompt_text(self, prompt: Prompt) -> str:
        """The text whose continuation is a response; ConfigError where the chat template refuses the prompt."""
        if self.kind == "plain":
            return prompt.text
        try:
            return self._render(prompt.messages, True)
        except Exception as error:  # raised by the template, a program of the model's author
            raise ConfigError(f"the chat template refuses a prompt ({error}); choose data.template=plain") from None

    def response_text(self, text: str) -> str:
        """A response as it is encoded; under a chat template the white space around it goes, as in the template."""
        return text.strip() if self.kind == "chat" else text

    def encode_prompts(self, prompts: list[Prompt]) -> list[list[int]]:
        """Token ids of prompts, as the model is asked with them."""
        ids = self._encode_many([self.prompt_text(prompt) for prompt in prompts])
        return [self._opened(prompt) for prompt in ids]

    def _opened(self, prompt: list[int]) -> list[int]:
        # An empty prompt still needs one token, from which the first response token is predicted.
        return (self.opening if self.kind == "plain" else []) + prompt or [self.closing]

    def encode(self, pairs: list[PreferencePair]) -> list[Encoded]:
        """Token ids of many pairs at once: prompt, and both responses with the closing token of those that ended."""
        prompts = [self.prompt_text(pair.prompt) for pair in pairs]
        prompt_ids = self._encode_many(prompts)
        responses: list[list[list[int]]] = []
        for answers in (
            [(pair.chosen, pair.chosen_finish_reason is FinishReason.STOP) for pair in pairs],
            [(pair.rejected, pair.rejected_finish_reason is FinishReason.STOP) for pair in pairs],
        ):
            shown = [self.response_text(text) for text, _ in answers]
            whole = self._encode_many([prompt + text for prompt, text in zip(prompts, shown, strict=True)])
            responses.append(
                [
                    self._after_border(prompt, ids, text, finished)
                    for prompt, ids, text, (_, finished) in zip(prompt_ids, whole, shown, answers, strict=True)
                ]
            )
        return [
            Encoded(self._opened(prompt), chosen, rejected)
            for prompt, chosen, rejected in zip(prompt_ids, *responses, strict=True)
        ]

    def _encode_many(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False).input_ids
        return ids

    def _after_border(self, prompt: list[int], whole: list[int], response: str, finished: bool) -> list[int]:
        if whole[: len(prompt)] == prompt:
            ids = whole[len(prompt) :]
        else:
            # A token of prompt + response straddles the border. The model will be asked with the prompt's own
            # ids, so the response is encoded on its own, behind a line break: at the start of a text some
            # tokenizers would put a space before it.
            self.borders_merged += 1
            stub, behind = self._encode("\n"), self._encode("\n" + response)
            ids = behind[len(stub) :] if behind[: len(stub)] == stub else self._encode(response)
        if ids and ids[-1] == self.closing:  # the text brought its own
            ids = ids[:-1]
        self.closing_inside += self.closing in ids
        self.length_limited += not finished
        return [*ids, self.closing] if finished or self.always_closes or not ids else ids


def truncate(encoded: Encoded, max_length: int, max_prompt_length: int | None, tally: Truncation) -> Encoded | None:
    """A pair cut to `max_length` tokens (prompt + longer response), or None if the prompt leaves no room.

    1. A prompt over `max_prompt_length` keeps its last tokens; without that limit one of max_length tokens or
       more is refused.
    2. If prompt and longer response do not fit, the prompt loses its oldest part, down to half of max_length.
    3. Only then is the end of a response cut, and its closing EOS with it: to train on an EOS after a cut would
       teach the model to stop in mid-sentence.
    """
    prompt = encoded.prompt
    if max_prompt_length is not None:
        prompt = prompt[-max_prompt_length:]
    elif len(prompt) >= max_length:
        return None
    longer = max(len(encoded.chosen), len(encoded.rejected))
    if len(prompt) + longer > max_length:
        prompt = prompt[-max(max_length - longer, min(len(prompt), max_length // 2)) :]
    room = max_length - len(prompt)
    chosen, rejected = encoded.chosen[:room], encoded.rejected[:room]
    tally.prompts_cut += len(prompt) < len(encoded.prompt)
    tally.responses_cut += len(chosen) < len(encoded.chosen)
    tally.responses_cut += len(rejected) < len(encoded.rejected)
    return Encoded(prompt, chosen, rejected)


def token_ids(ids: Iterable[int]) -> TokenIds:
    """Ids as a compact array: a million pairs must fit in memory."""
    return np.fromiter(ids, dtype=np.int32)
