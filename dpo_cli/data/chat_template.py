"""A model's chat template: what it puts around an answer, which conversations it refuses, and what it must not meet.

One idea to keep in mind: a prompt and its response together are the template's rendering of the whole conversation, so
white space that the template puts before an answer is part of the response: the model has to produce it, too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dpo_cli.console.text import safe_text
from dpo_cli.data.formats import BadRowError, Message
from dpo_cli.errors import ConfigError, DataError

QUESTION, ANSWER = Message("user", "question"), Message("assistant", "answer")
SPACED = "\n  answer  \n"
# What the common templates put before a turn: ChatML, Llama 2 and Mistral, Llama 3, Gemma.
USUAL_MARKERS = ("<|im_start|>", "[INST]", "<|start_header_id|>", "<start_of_turn>")


class RefusedRowError(BadRowError):
    """A conversation that the chat template refuses; the message has the template's words."""


@dataclass
class ChatTemplate:
    """The chat template of a tokenizer, and how it renders an answer; ConfigError where it cannot be used."""

    tokenizer: Any
    lead: str | None = field(init=False)  # before an answer; None: it opens an answer otherwise when asked for one
    tail: str = field(init=False)  # behind an answer
    ending: str = field(init=False)  # the part of `tail` before the closing token
    closing: int | None = field(init=False)  # the first special token of `tail`
    trims: bool = field(init=False)  # white space around an answer
    markers: tuple[str, ...] = field(init=False)  # which text has only when a chat template has rendered it

    def __post_init__(self) -> None:
        try:
            prompt = self._render((QUESTION,), True)
            whole = self._render((QUESTION, ANSWER), False)
            spaced = self._render((QUESTION, Message(ANSWER.role, SPACED)), False)
        except Exception as error:  # raised by the template, a program of the model's author
            raise ConfigError(f"the model's chat template fails ({error}); choose data.template=plain") from None
        if QUESTION.content not in prompt or ANSWER.content not in whole:
            raise ConfigError(
                "the model's chat template leaves out what user or assistant say; choose data.template=plain"
            )
        self.trims = SPACED not in spaced
        before, self.tail = whole.rsplit(ANSWER.content, 1)
        self.lead = before.removeprefix(prompt) if before.startswith(prompt) else None
        # Not all_special_ids: the token that ends a turn often has no role of its own.
        special = {number: token.content for number, token in self.tokenizer.added_tokens_decoder.items()
                   if token.special}  # fmt: skip
        behind = [token for token in self._encode(self.tail) if token in special]
        self.closing = behind[0] if behind else None
        self.ending = self.tail.partition(special[behind[0]])[0] if behind else ""
        used = [special[token] for token in self._encode(whole) if token in special]
        self.markers = tuple(dict.fromkeys((*USUAL_MARKERS, *used)))

    @property
    def notes(self) -> str:
        """How it renders an answer, where a reader may not expect it; else empty."""
        if self.lead is None:
            return ", which opens an answer otherwise when it is asked for one: so it is trained"
        said = (
            f", which begins an answer with {safe_text(repr(self.lead), limit=60)}: that is trained, too"
            if self.lead
            else ""
        )
        return said + ("" if self.closing is not None else ", which closes an answer with no special token: EOS does")

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        text: str = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return text

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def prompt(self, messages: Sequence[Message]) -> str:
        """A conversation as text, open for an answer; RefusedRowError where the template refuses it."""
        return self._accepted(messages, True)

    def _accepted(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        try:
            return self._render(messages, add_generation_prompt)
        except Exception as error:  # raised by the template
            raise RefusedRowError(f"the chat template refuses it ({safe_text(error, limit=160)})") from None

    def response(self, messages: Sequence[Message], prompt: str, content: str, closed: bool) -> str | None:
        """What the template puts behind `prompt` for an answer, up to the closing token.

        An answer that is not `closed` ends with its own text. None where the rendering of the whole conversation does
        not begin with `prompt`; RefusedRowError where the template refuses the conversation.
        """
        if self.lead is None:
            return None
        whole = self._accepted((*messages, Message(ANSWER.role, content)), False)
        if not whole.startswith(prompt) or not whole[len(prompt) :].endswith(self.tail):
            return None
        return whole[len(prompt) : len(whole) - len(self.tail)] + (self.ending if closed else "")

    def as_asked(self, content: str, closed: bool) -> str:
        """A response where `response` is None: the answer with what the template puts around a first one."""
        return (self.lead or "") + (content.strip() if self.trims else content) + (self.ending if closed else "")

    def content(self, response: str, closed: bool) -> str:
        """The inverse of `response`: the answer of which the template makes this."""
        content = response.removeprefix(self.lead or "").removesuffix(self.ending if closed else "")
        return content.strip() if self.trims else content

    def marker_in(self, messages: Sequence[Message]) -> str | None:
        """The first marker in a conversation's own text; None where it has none."""
        return next((mark for mark in self.markers for message in messages if mark in message.content), None)

    def refuse_rendered(self, first: Mapping[str, Sequence[Message]], key: str) -> None:
        """DataError where more than half of the `first` prompts of a file begin with a marker.

        A chat template has rendered such text already. Prompts stand under their file and line, `key` is what to set.
        """
        found = {
            location: marker
            for location, messages in first.items()
            for marker in self.markers
            if any(message.content.lstrip().startswith(marker) for message in messages)
        }
        if 2 * len(found) > len(first):
            location, marker = next(iter(found.items()))
            raise DataError(
                f"{location}: the prompt begins with {safe_text(marker)}, as {len(found):,} of the first "
                f"{len(first):,} do: a chat template has rendered it already, and {key}=chat would do so again; "
                f"choose {key}=plain"
            )
