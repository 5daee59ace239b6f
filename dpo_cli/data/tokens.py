"""From a preference pair to token ids: one place decides where the prompt ends and what closes a response.

One idea to keep in mind: prompt ids are exactly what the model sees when it is asked to answer, and a response
is exactly what it would then have to produce, its closing EOS included. So no token straddles the border, and
log p(response | prompt) is a probability of something the model can do.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from dpo_cli.config.schema import DataConfig
from dpo_cli.console.text import safe_text
from dpo_cli.data.chat_template import ChatTemplate, RefusedRowError
from dpo_cli.data.formats import (
    ASSISTANT,
    CONTEXT,
    BadRowError,
    FinishReason,
    Message,
    PreferencePair,
    Prompt,
    shared_length,
)
from dpo_cli.data.truncation import Encoded, shorten
from dpo_cli.errors import CheckpointError, ConfigError, DataError
from dpo_cli.storage.hashing import fingerprint

TokenIds = NDArray[np.int32]
ALL_SCORED: TokenIds = np.zeros(0, dtype=np.int32)


@dataclass(frozen=True)
class TokenizedPair:
    """One pair as token ids, truncated to fit."""

    prompt: TokenIds  # (prompt tokens,): at least one
    chosen: TokenIds  # (chosen tokens,): at least one; closed by EOS unless truncated or generated up to a limit
    rejected: TokenIds  # (rejected tokens,)
    index: int  # the row in its file, from 0
    key: str  # hash of the pair's texts
    group: int  # of its prompt (data/groups.py), 64 bits: pairs of one group are not independent
    # Positions in the response that carry no log-prob, as start, stop, start, stop, ...: what the assistant did not
    # write (tool results, later user turns). The first and the last token are always scored.
    chosen_unscored: TokenIds = field(default_factory=lambda: ALL_SCORED)
    rejected_unscored: TokenIds = field(default_factory=lambda: ALL_SCORED)
    probability: float = 1.0  # that the chosen response is better
    source: str = ""  # the source of a mixture or the held-out set that it is from, where there are several

    @property
    def responses(self) -> tuple[TokenIds, TokenIds]:
        """Chosen and rejected."""
        return self.chosen, self.rejected

    @property
    def unscored(self) -> tuple[TokenIds, TokenIds]:
        """The unscored positions of chosen and rejected."""
        return self.chosen_unscored, self.rejected_unscored

    @property
    def tokens(self) -> int:
        """Tokens of the prompt and of both responses."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)

    @property
    def scored_tokens(self) -> tuple[int, ...]:
        """How many tokens of chosen and of rejected carry a log-prob."""
        sides = zip(self.responses, self.unscored, strict=True)
        return tuple(len(ids) - int((spans[1::2] - spans[::2]).sum()) for ids, spans in sides)

    @property
    def row(self) -> str:
        """Its row for messages: `12`, of a source `hh 12`."""
        return f"{self.source} {self.index}".lstrip()

    @cached_property
    def response_keys(self) -> tuple[bytes, ...]:
        """The key of each response's cached log-prob: a hash of 16 bytes.

        It is of the tokens of prompt and response, and of the unscored positions where there are any.
        """
        sides = zip(self.responses, self.unscored, strict=True)
        return tuple(_tokens_key(self.prompt, ids, *([spans] if len(spans) else [])) for ids, spans in sides)


def _tokens_key(*sequences: TokenIds) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for ids in sequences:  # the length keeps [1, 2], [3] from [1], [2, 3]
        digest.update(len(ids).to_bytes(4, "little") + ids.astype("<i4").tobytes())
    return digest.digest()


@dataclass(frozen=True)
class ResponseSpans:
    """What of a response as text is not scored, and what closes it."""

    unscored: tuple[tuple[int, int], ...] = ()  # start and stop of each such part, in characters
    closing: int | None = None  # a token; None: the encoder's `closing`


@dataclass(frozen=True)
class RenderedPair:
    """A pair as text: both responses follow the prompt, without the closing token."""

    prompt: str
    chosen: str
    rejected: str
    pair: PreferencePair
    otherwise: int = 0  # responses that the template renders otherwise than it asks for them
    spans: tuple[ResponseSpans, ...] = (ResponseSpans(), ResponseSpans())  # of chosen and rejected
    notes: tuple[str, ...] = ()  # what the template leaves out


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
    template_options: Mapping[str, Any] = field(default_factory=dict)
    special_tokens_in_text: str = "escape"  # what becomes of a special token that a message spells
    template: ChatTemplate | None = field(init=False, default=None)  # None: plain
    closing: int = field(init=False)
    reason: str = field(init=False)  # why this template
    opening: list[int] = field(init=False)  # ids before a plain prompt: BOS, where the tokenizer adds one
    backend: Any = field(init=False, repr=False)  # encodes faster; None where it cannot be used
    _ends: dict[str, list[int]] = field(init=False, repr=False, default_factory=dict)
    COUNTERS: ClassVar[tuple[str, ...]] = (
        "borders_merged", "length_limited", "closing_inside", "rendered_otherwise",
    )  # fmt: skip
    borders_merged: int = 0  # responses whose first token would have straddled the border
    length_limited: int = 0  # responses that stopped at a limit (finish_reason length)
    closing_inside: int = 0  # responses that hold the closing token in their middle
    rendered_otherwise: int = 0  # responses before which the template renders another prompt than it asks with

    @classmethod
    def of(cls, tokenizer: Any, config: DataConfig, always_closes: bool = False) -> "PairEncoder":
        """The encoder of a data config."""
        how = (config.template_options, config.special_tokens_in_text)
        return cls(tokenizer, config.template, always_closes, *how)

    def __post_init__(self) -> None:
        has_template = bool(getattr(self.tokenizer, "chat_template", None))
        if self.kind == "chat" and not has_template:
            raise ConfigError("data.template=chat: this model has no chat template; choose data.template=plain")
        self.reason = (
            "as requested" if self.kind else "the model has a chat template" if has_template else "no chat template"
        )
        self.kind = self.kind or ("chat" if has_template else "plain")
        self.backend = self._fast()
        if self.kind == "chat":
            self.template = ChatTemplate(self.tokenizer, self.template_options, self.special_tokens_in_text)
            self.reason += self.template.notes
        elif self.template_options:
            name, value = next(iter(self.template_options.items()))
            raise ConfigError(
                f"data.template_options.{safe_text(name)}={safe_text(value, limit=40)}: is for a chat template, and "
                "data.template is plain; leave it out"
            )
        self.closing = self._closing_token()
        bos = self.tokenizer.bos_token_id
        adds_bos = bos is not None and self.tokenizer("a").input_ids[:1] == [bos]
        self.opening = [bos] if adds_bos else []

    def _fast(self) -> Any:
        """The tokenizer's own backend, where it encodes as the tokenizer does; else None.

        Without offsets and masks, which nothing here reads, it is faster.
        """
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None or not hasattr(backend, "encode_batch_fast"):
            return None
        backend.no_truncation()
        backend.no_padding()
        texts = ["", " a  b\n\n", "Grüße \U0001f600 1,000", "\u2581x", *self.tokenizer.all_special_tokens]
        texts.append("x ".join(texts))
        ids = self.tokenizer(texts, add_special_tokens=False).input_ids
        backend.encode_special_tokens = False
        same = ids == [one.ids for one in backend.encode_batch_fast(texts, add_special_tokens=False)]
        return backend if same else None

    def identity(self) -> str:
        """A hash of all that decides which tokens a pair becomes."""
        tokenizer = self.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        rules = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
        template = getattr(tokenizer, "chat_template", None)
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        now = self.template.at_this_moment() if self.template is not None else []
        how = [self.kind, self.always_closes, dict(self.template_options), self.special_tokens_in_text, now]
        return fingerprint([type(tokenizer).__name__, rules, template, special, *how])

    def _closing_token(self) -> int:
        if self.template is not None and self.template.closing is not None:
            return self.template.closing
        if self.tokenizer.eos_token_id is None:
            raise CheckpointError("the tokenizer has no EOS token, so no response can be closed; set its eos_token")
        return int(self.tokenizer.eos_token_id)

    def prompt_text(self, prompt: Prompt) -> str:
        """The text whose continuation is a response; RefusedRowError where the chat template refuses the prompt."""
        return self._plain(prompt) if self.template is None else self.template.prompt(prompt)

    def _plain(self, prompt: Prompt, *responses: Sequence[Message]) -> str:
        """The text of a prompt; RefusedRowError where plain text cannot hold all of prompt and responses."""
        for message in (*prompt.messages, *chain.from_iterable(responses)):
            found = ["tool results"] * (message.role == "tool") + [key for key in message.more if key != "content"]
            if found:
                raise RefusedRowError(f"plain text has no form for {found[0]} in a message; choose data.template=chat")
        for name in CONTEXT:
            if getattr(prompt, name):
                raise RefusedRowError(
                    f"plain text has no form for the row's {name}; choose data.template=chat, or "
                    f"data.columns.{name}=null leaves them out"
                )
        return prompt.text

    def render(self, pair: PreferencePair) -> RenderedPair:
        """The pair as text; RefusedRowError where the chat template refuses it, BadRowError for a special token in it.

        Under a chat template prompt + response is its rendering of the whole conversation, up to the closing token.
        """
        turns = (pair.chosen_messages, pair.rejected_messages)
        if self.template is None:
            return RenderedPair(self._plain(pair.prompt, *turns), pair.chosen, pair.rejected, pair)
        notes = self._special_tokens(pair)
        prompt = self.prompt_text(pair.prompt)
        responses, spans = [], []
        otherwise = 0
        closes = [self._closes(reason) for reason in (pair.chosen_finish_reason, pair.rejected_finish_reason)]
        # In HH form a space stands between the colon and what is said.
        space = " " if pair.prompt_text.endswith(ASSISTANT) else ""
        texts = [text.removeprefix(space) for text in (pair.chosen, pair.rejected)]
        answers = [(text, is_closed) for text, is_closed, more in zip(texts, closes, turns, strict=True) if not more]
        rendered = iter(self.template.responses(pair.prompt, prompt, answers))
        for text, is_closed, messages in zip(texts, closes, turns, strict=True):
            of_response = ResponseSpans()
            if messages:
                found = self.template.turns(pair.prompt, prompt, messages)
                closing = None if found.closing is None else self.tokenizer.convert_tokens_to_ids(found.closing)
                text = found.text if is_closed else found.text.removesuffix(self.template.ending)
                of_response = ResponseSpans(found.unscored, closing)
                otherwise += not found.as_whole and self.template.lead is not None
            else:
                behind = next(rendered)
                otherwise += behind is None and self.template.lead is not None  # without a lead `reason` says it
                text = self.template.as_asked(text, is_closed) if behind is None else behind
            responses.append(text)
            spans.append(of_response)
        notes += self.template.not_rendered(pair.prompt, turns) if pair.has_more else []
        return RenderedPair(prompt, responses[0], responses[1], pair, otherwise, tuple(spans), tuple(notes))

    def _special_tokens(self, pair: PreferencePair) -> list[str]:
        """A note for each special token that the pair spells; BadRowError where that is an error."""
        assert self.template is not None
        spelled = [safe_text(token) for token in self.template.spelled(pair.prompt, pair.chosen, pair.rejected)]
        if spelled and self.special_tokens_in_text == "error":
            raise BadRowError(f"its text holds {spelled[0]}, a special token (data.special_tokens_in_text=error)")
        becomes = "text" if self.special_tokens_in_text == "escape" else "that token"
        return [f"with {token}, a special token, in their text: it is encoded as {becomes}" for token in spelled]

    def readable(self, rendered: str) -> str:
        """Rendered text without the marks that say which special tokens are encoded as text."""
        return rendered if self.template is None else self.template.readable(rendered)

    def _closes(self, finish_reason: FinishReason) -> bool:
        return self.always_closes or finish_reason is FinishReason.STOP

    def completion_text(self, text: str, finish_reason: FinishReason) -> str:
        """What a model wrote, as the response of which training makes the same text again."""
        return text if self.template is None else self.template.content(text, finish_reason is FinishReason.STOP)

    def encode_prompts(self, prompts: list[Prompt]) -> list[list[int]]:
        """Token ids of prompts, as the model is asked with them; RefusedRowError as in `prompt_text`."""
        ids = self._encode_many([self.prompt_text(prompt) for prompt in prompts])
        return [self._opened(prompt) for prompt in ids]

    def _opened(self, prompt: list[int]) -> list[int]:
        # An empty prompt still needs one token, from which the first response token is predicted.
        brings_its_own = prompt[:1] == self.opening
        opening = self.opening if self.kind == "plain" and not brings_its_own else []
        return opening + prompt or [self.closing]

    def encode(self, pairs: list[PreferencePair]) -> list[Encoded]:
        """Token ids of many pairs at once: prompt, and both responses with the closing token of those that ended."""
        return self.encode_rendered([self.render(pair) for pair in pairs])

    def encode_rendered(self, rendered: list[RenderedPair]) -> list[Encoded]:
        """The same for pairs that are rendered already."""
        prompt_ids = self._encode_many([one.prompt for one in rendered])
        ends = [self._end(one.prompt, ids) for one, ids in zip(rendered, prompt_ids, strict=True)]
        responses: list[list[tuple[list[int], tuple[int, ...]]]] = []
        for answers in (
            [(one.chosen, one.pair.chosen_finish_reason, one.spans[0]) for one in rendered],
            [(one.rejected, one.pair.rejected_finish_reason, one.spans[1]) for one in rendered],
        ):
            whole = self._encode_many([end + answer[0] for (end, _), answer in zip(ends, answers, strict=True)])
            responses.append(
                [
                    self._after_border(before, head, ids, *answer)
                    for (before, head), ids, answer in zip(ends, whole, answers, strict=True)
                ]
            )
        self.rendered_otherwise += sum(one.otherwise for one in rendered)
        return [
            Encoded(
                self._opened(prompt), chosen, rejected, chosen_unscored, rejected_unscored,
                partial(self.shorten, one.pair.prompt),
            )
            for prompt, (chosen, chosen_unscored), (rejected, rejected_unscored), one in zip(
                prompt_ids, *responses, rendered, strict=True
            )
        ]  # fmt: skip

    def _end(self, prompt: str, ids: list[int]) -> tuple[str, list[int]]:
        """The end of a prompt and its ids, from its last special token on.

        A tokenizer encodes what stands behind a special token on its own. So a response has the same ids behind this
        end as behind the whole prompt, which need not be encoded with each response again.
        """
        if self.template is None or self.backend is None or self.template.is_marked(prompt):
            return prompt, ids
        end = prompt[max(0, *map(prompt.rfind, self.template.splitting)) :] if self.template.splitting else prompt
        if end not in self._ends:
            self._ends = {end: self._encode(end)}  # a template has one
        known = self._ends[end]
        return (end, known) if ids[len(ids) - len(known) :] == known else (prompt, ids)

    def _encode(self, text: str) -> list[int]:
        return self._encode_many([text])[0]

    def _encode_many(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]]
        if self.backend is None:
            ids = self.tokenizer(texts, add_special_tokens=False).input_ids if texts else []
        else:
            self.backend.encode_special_tokens = False  # a marked text may have changed it
            ids = [one.ids for one in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
        for index, text in enumerate(texts):
            if self.template is not None and self.template.is_marked(text):
                ids[index] = self._encode_marked(text)
        return ids

    def _encode_marked(self, text: str) -> list[int]:
        try:
            ids: list[int] = self.tokenizer(text, add_special_tokens=False, sanitize_control_tokens=True).input_ids
        except ValueError as error:  # the tokenizer makes the special token of its letters, too
            raise DataError(f"{safe_text(error, limit=200)}; choose data.special_tokens_in_text=keep") from None
        return ids

    def shorten(self, prompt: Prompt, length: int) -> list[int]:
        """The prompt in at most `length` tokens, by whole turns where that is possible."""
        is_plain = self.template is None
        return shorten(
            prompt, length, lambda part: self.encode_prompts([part])[0], is_plain, self.tokenizer.bos_token_id
        )

    def _after_border(
        self, text: str, prompt: list[int], whole: list[int], response: str, reason: FinishReason, spans: ResponseSpans
    ) -> tuple[list[int], tuple[int, ...]]:
        """The ids of a response and its unscored positions: `text` and its ids `prompt` are before it."""
        before, head = text, prompt
        if whole[: len(prompt)] == prompt:
            ids = whole[len(prompt) :]
        else:
            # A token of prompt + response straddles the border. The model will be asked with the prompt's own
            # ids, so the response is encoded on its own, behind a line break: at the start of a text some
            # tokenizers would put a space before it.
            self.borders_merged += 1
            stub, behind = self._encode("\n"), self._encode("\n" + response)
            before, head = ("\n", stub) if behind[: len(stub)] == stub else ("", [])
            ids = behind[len(stub) :] if head else self._encode(response)
        # A token that straddles the border of what the assistant wrote is scored.
        unscored = [
            shared_length(self._encode(before + response[:at]), head + ids) - len(head)
            for at in chain.from_iterable(spans.unscored)
        ]
        if ids and ids[-1] == self.closing:  # the text brought its own
            ids = ids[:-1]
        self.closing_inside += self.closing in ids and not spans.unscored
        self.length_limited += reason is not FinishReason.STOP
        closing = self.closing if spans.closing is None else spans.closing
        return [*ids, closing] if self._closes(reason) or not ids else ids, tuple(unscored)


def token_ids(ids: Iterable[int]) -> TokenIds:
    """Ids as a compact array: a million pairs must fit in memory."""
    return np.fromiter(ids, dtype=np.int32)
