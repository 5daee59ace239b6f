"""A chat template: what it puts around an answer, which conversations it refuses, and which text it must not get.

One idea to keep in mind: a prompt and its response together are the template's rendering of the whole conversation, so
white space that the template puts before an answer is part of the response: the model has to produce it, too.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from typing import Any

from dpo_cli.console.text import safe_text
from dpo_cli.data.formats import BadRowError, Message, Prompt, shared_length
from dpo_cli.errors import ConfigError, DataError

QUESTION, ANSWER = Message("user", "question"), Message("assistant", "answer")
SPACED = "\n  answer  \n"
# Variables that every template may read; any other is an option. Those that end in `_token` are the tokenizer's.
GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"}
NEVER = re.compile("(?!)")  # matches no text
NOTHING_GIVEN = Prompt((), "")
PROBE_PARAMETERS = {"type": "object", "properties": {"probe": {"type": "string", "description": "probe"}}}
PROBE_TOOL = {
    "type": "function",
    "function": {"name": "probe", "description": "probe", "parameters": PROBE_PARAMETERS},
}
# What the common templates put before a turn: ChatML, Llama 2 and Mistral, Llama 3, Gemma.
USUAL_MARKERS = ("<|im_start|>", "[INST]", "<|start_header_id|>", "<start_of_turn>")


class RefusedRowError(BadRowError):
    """A conversation that the chat template refuses; the message has the template's words."""


@dataclass(frozen=True)
class RenderedTurns:
    """A response of several messages, as it follows the rendering of its prompt."""

    text: str  # up to the token that closes its last turn
    closing: str | None  # that token; None: the template closes an answer with none
    unscored: tuple[tuple[int, int], ...]  # start and stop in `text` of what the assistant did not write
    as_whole: bool  # prompt + text is the rendering of the whole conversation


def _renders_otherwise(index: int, alone: str, whole: str) -> RefusedRowError:
    common = max(0, shared_length(alone, whole) - 10)
    first, second = (safe_text(repr(text[common : common + 50])) for text in (alone, whole))
    return RefusedRowError(
        f"the chat template renders message {index} otherwise in the whole conversation: {first} becomes {second}"
    )


def _marked(value: Any, special: re.Pattern[str]) -> Any:
    """A text, or lists and objects of texts, with marks around what the pattern finds, and without those before."""
    from transformers.utils.chat_template_utils import mark_control_tokens

    return mark_control_tokens(value, special)


def _strings(value: Any) -> Iterator[str]:
    """Every text in lists and objects, keys aside."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(one)


def _lines(message: Message) -> list[str]:
    """The lines of all that a message says."""
    texts = [message.content, *(text for text in message.more.values() if isinstance(text, str))]
    return [line.strip() for text in texts for line in text.splitlines() if line.strip()]


@dataclass
class ChatTemplate:
    """The chat template of a tokenizer, and how it renders an answer; ConfigError where it cannot be used."""

    tokenizer: Any
    options: Mapping[str, Any] = field(default_factory=dict)  # what it reads besides the conversation
    # What becomes of a special token that a message spells: with `escape` it is marked, to be encoded as text.
    special_tokens_in_text: str = "keep"
    lead: str | None = field(init=False)  # before an answer; None: it opens an answer otherwise when asked for one
    tail: str = field(init=False)  # behind an answer
    ending: str = field(init=False)  # the part of `tail` before the closing token
    closing: int | None = field(init=False)  # the first special token of `tail`
    trims: bool = field(init=False)  # white space around an answer
    openers: tuple[str, ...] = field(init=False)  # put behind a prompt, but not before the answer in a conversation
    splitting: tuple[str, ...] = field(init=False)  # special tokens around which text is encoded piece by piece
    special: re.Pattern[str] = field(init=False)  # one of the tokenizer's special tokens
    special_at_end: re.Pattern[str] = field(init=False)  # one of them at the end of a text
    marks: tuple[str, ...] = field(init=False)  # around a special token that is to be encoded as text
    markers: tuple[str, ...] = field(init=False)  # which text has only when a chat template has rendered it
    # In which form it takes messages.
    takes_parts: bool = field(init=False, default=False)  # content as a list of parts, not as text
    takes_objects: bool = field(init=False, default=True)  # the arguments of a tool call as an object
    takes_json: bool = field(init=False, default=True)  # the same as JSON text
    empty: tuple[str | None, ...] = field(init=False, default=(None, ""))  # the content of a message of tool calls

    def __post_init__(self) -> None:
        self._check_options()
        # Not all_special_ids: the token that ends a turn often has no role of its own.
        special = {number: token.content for number, token in self.tokenizer.added_tokens_decoder.items()
                   if token.special}  # fmt: skip
        self.splitting = tuple(token.content for token in self.tokenizer.added_tokens_decoder.values()
                               if token.special and not token.normalized)  # fmt: skip
        longest_first = sorted(special.values(), key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, longest_first)) or NEVER.pattern)
        self.special_at_end = re.compile(rf"({self.special.pattern})\Z")
        self.marks = tuple(filter(None, _marked("x", re.compile("x")).split("x")))
        try:
            prompt, whole, spaced = self._probes()
        except Exception as error:  # raised by the template, a program of the model's author
            raise ConfigError(f"the model's chat template fails ({error}); choose data.template=plain") from None
        if QUESTION.content not in prompt or ANSWER.content not in whole:
            raise ConfigError(
                "the model's chat template leaves out what user or assistant say; choose data.template=plain"
            )
        self._probe_tool_calls()
        self.trims = SPACED not in spaced
        before, self.tail = whole.rsplit(ANSWER.content, 1)
        self.lead = before.removeprefix(prompt) if before.startswith(prompt) else None
        self.openers = self._openers(prompt, whole)
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

    def _check_options(self) -> None:
        """ConfigError for an option that the template does not read."""
        if not self.options:
            return
        import jinja2.meta

        templates = self.tokenizer.chat_template
        sources = list(templates.values()) if isinstance(templates, dict) else [templates]
        environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])  # only parses
        read: set[str] = set()
        for source in sources:
            parsed = environment.parse(re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", source))
            read |= jinja2.meta.find_undeclared_variables(parsed)
        names = sorted(name for name in read - GIVEN if not name.endswith("_token"))
        for name, value in self.options.items():
            if name not in names:
                known = f"it reads {', '.join(names)}" if names else "it has no options"
                raise ConfigError(
                    f"data.template_options.{safe_text(name)}={safe_text(value, limit=40)}: "
                    f"the model's chat template does not read it; {safe_text(known, limit=200)}"
                )

    def _probes(self) -> tuple[str, str, str]:
        """A prompt, and a conversation with an answer without and with white space around it."""
        conversations = (QUESTION,), (QUESTION, ANSWER), (QUESTION, Message(ANSWER.role, SPACED))
        for self.takes_parts in (False, True):
            try:
                prompt, whole, spaced = (self._render(some, len(some) == 1) for some in conversations)
                if QUESTION.content in prompt and ANSWER.content in whole:
                    return prompt, whole, spaced
            except Exception:
                if self.takes_parts:
                    raise
        return prompt, whole, spaced

    def _probe_tool_calls(self) -> None:
        """Find out in which form the template renders tool calls as they are meant."""

        def rendered(arguments: Any, content: str | None) -> bool:
            call = {"id": "probe0000", "type": "function", "function": {"name": "probe", "arguments": arguments}}
            message = Message(ANSWER.role, "", {"tool_calls": (call,), "content": content})
            try:
                text = self._render((QUESTION, message), False, Prompt((), "", (PROBE_TOOL,)))
            except Exception:  # it does not take them so
                return False
            # Concatenated, an object would be written as Python writes it; dumped, JSON text would be quoted once more.
            return "called" in text and not re.search(r"{'probe|\\\"probe|None", text)

        found = [(arguments, content) for arguments in ({"probe": "called"}, '{"probe": "called"}')
                 for content in self.empty if rendered(arguments, content)]  # fmt: skip
        if found:  # else it knows no tool calls, and a row that has some is counted or refused in its words
            self.takes_objects, self.takes_json = (any(type(one) is kind for one, _ in found) for kind in (dict, str))
            self.empty = tuple(content for content in self.empty if content in [one for _, one in found])

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool, given: Prompt = NOTHING_GIVEN) -> str:
        """The messages as text, with the tools and documents of `given`."""
        return self._render_each([messages], add_generation_prompt, given)[0]

    def _render_each(
        self, conversations: Sequence[Sequence[Message]], add_generation_prompt: bool, given: Prompt
    ) -> list[str]:
        """The same for several conversations at once, which is faster."""
        texts: list[str] = self.tokenizer.apply_chat_template(
            [[self._as_text(self._as_dict(message)) for message in messages] for messages in conversations],
            tools=[self._as_text(dict(tool)) for tool in given.tools] or None,
            documents=[self._as_text(dict(document)) for document in given.documents] or None,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **self.options,
        )
        return texts

    def _as_text(self, value: Any) -> Any:
        """A message, a tool or a text in which special tokens are marked, if they are to be encoded as text."""
        if self.special_tokens_in_text != "escape" or not any(map(self.spells, _strings(value))):
            return value
        return _marked(value, self.special)

    def spells(self, text: str) -> bool:
        """Whether a text holds a special token, or a mark, which is taken away."""
        return self.special.search(text) is not None or any(mark in text for mark in self.marks)

    def is_marked(self, rendered: str) -> bool:
        """Whether rendered text holds special tokens that are to be encoded as text."""
        return self.special_tokens_in_text == "escape" and any(mark in rendered for mark in self.marks)

    def readable(self, rendered: str) -> str:
        """Rendered text without marks."""
        return str(_marked(rendered, NEVER))

    def spelled(self, given: Prompt, *texts: str) -> list[str]:
        """The special tokens that a conversation spells in its texts, tools and documents, each once."""
        messages = [text for message in given.messages for text in (message.content, *_strings(message.more))]
        found = (self.special.findall(text) for text in (*messages, *texts, *_strings((given.tools, given.documents))))
        return list(dict.fromkeys(chain.from_iterable(found)))

    def _as_dict(self, message: Message) -> dict[str, Any]:
        """A message as this template takes it."""
        turn = message.as_dict()
        if "tool_calls" in turn and not turn["content"] and turn["content"] not in self.empty:
            turn["content"] = self.empty[0]
        if self.takes_parts and isinstance(turn["content"], str):
            turn["content"] = [{"type": "text", "text": turn["content"]}]
        if "tool_calls" in turn:
            turn["tool_calls"] = [self._call(call) for call in turn["tool_calls"]]
        return turn

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """A tool call with its arguments as the row has them, else in the form that the template takes."""
        if isinstance(call.get("function"), Mapping):
            return {**call, "function": self._call(call["function"])}
        arguments = call.get("arguments")
        if isinstance(arguments, str) and not self.takes_json:
            try:
                parsed = json.loads(arguments)
            except ValueError:
                parsed = None
            arguments = parsed if isinstance(parsed, dict) else arguments
        elif isinstance(arguments, Mapping) and not self.takes_objects:
            arguments = json.dumps(arguments, ensure_ascii=False)
        return {**call, "arguments": arguments} if "arguments" in call else dict(call)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def at_this_moment(self) -> list[str | None]:
        """Some conversations as they are rendered now, None where it refuses one: a template may write the date."""
        found: list[str | None] = []
        for messages in ((QUESTION,), (Message("system", "be brief"), QUESTION)):
            for tools in ((), (PROBE_TOOL,)):
                try:
                    found.append(self._render(messages, True, Prompt((), "", tools)))
                except Exception:  # raised by the template, a program of the model's author
                    found.append(None)
        return found

    def prompt(self, prompt: Prompt) -> str:
        """A conversation as text, open for an answer; RefusedRowError where the template refuses it."""
        return self._accepted(prompt.messages, True, prompt)

    def _accepted(self, messages: Sequence[Message], add_generation_prompt: bool, given: Prompt) -> str:
        return self._accepted_each([messages], add_generation_prompt, given)[0]

    def _accepted_each(
        self, conversations: Sequence[Sequence[Message]], add_generation_prompt: bool, given: Prompt
    ) -> list[str]:
        try:
            return self._render_each(conversations, add_generation_prompt, given)
        except Exception as error:  # raised by the template
            called = any("tool_calls" in message.more for messages in conversations for message in messages)
            hint = "; it has tool calls, and not every template renders these" if called else ""
            raise RefusedRowError(f"the chat template refuses it ({safe_text(error, limit=160)}){hint}") from None

    def responses(self, given: Prompt, prompt: str, answers: Sequence[tuple[str, bool]]) -> list[str | None]:
        """What the template puts behind `prompt`, its rendering of `given`, for each answer, up to the closing token.

        An answer is its text, and whether it is closed; one that is not ends with its own text. None where the whole
        conversation does not begin with `prompt`; RefusedRowError where the template refuses it.
        """
        if self.lead is None or not answers:
            return [None] * len(answers)
        conversations = [(*given.messages, Message(ANSWER.role, text)) for text, _ in answers]
        found: list[str | None] = []
        for whole, (_, closed) in zip(self._accepted_each(conversations, False, given), answers, strict=True):
            continues = whole.startswith(prompt) and whole[len(prompt) :].endswith(self.tail)
            behind = whole[len(prompt) : len(whole) - len(self.tail)] + (self.ending if closed else "")
            found.append(behind if continues else None)
        return found

    def as_asked(self, content: str, closed: bool) -> str:
        """A response where `response` is None: the answer with what the template puts around a first one."""
        content = self._as_text(content.strip() if self.trims else content)
        return f"{self.lead or ''}{content}{self.ending if closed else ''}"

    def content(self, response: str, closed: bool) -> str:
        """The inverse of `response`: the answer of which the template makes this."""
        content = response.removeprefix(self.lead or "").removesuffix(self.ending if closed else "")
        return content.strip() if self.trims else content

    def _openers(self, prompt: str, whole: str) -> tuple[str, ...]:
        """What a prompt ends with that stands neither before the answer nor before that of an earlier turn."""
        found = {"", prompt[shared_length(prompt, whole) :]}
        try:
            longer = self._render((QUESTION, ANSWER, QUESTION, ANSWER), False)
        except Exception:  # it renders one turn only
            longer = whole
        return tuple(found | {prompt[shared_length(prompt, longer) :]})

    def turns(self, given: Prompt, prompt: str, response: Sequence[Message]) -> RenderedTurns:
        """What the template puts behind `prompt`, its rendering of `given`, for the messages of a response.

        What the assistant wrote is found by rendering the conversation up to before each of its turns, and up to
        behind it. RefusedRowError where that is no part of the whole conversation's rendering.
        """
        conversation = (*given.messages, *response)
        whole = self._accepted(conversation, False, given)
        first = len(given.messages)
        written = []  # start and stop of each of the assistant's turns
        for index in range(first, len(conversation)):
            if conversation[index].role != ANSWER.role:
                continue
            asked = prompt if index == first else self._accepted(conversation[:index], True, given)
            start = shared_length(asked, whole)
            if asked[start:] not in self.openers:
                raise _renders_otherwise(index, asked, whole)
            written.append((start, self._end_of_turn(conversation, index, whole, start, given)))
        begin, end = written[0][0], written[-1][1]
        unscored = [(stop - begin, start - begin) for (_, stop), (start, _) in pairwise(written) if stop < start]
        closing = self.special_at_end.search(whole[begin:end])
        text = whole[begin : end - (len(closing[0]) if closing else 0)]
        return RenderedTurns(text, closing[0] if closing else None, tuple(unscored), begin == len(prompt))

    def _end_of_turn(self, conversation: tuple[Message, ...], index: int, whole: str, start: int, given: Prompt) -> int:
        """Where in `whole` the assistant's turn ends, its closing token included."""
        alone = self._up_to_closing(self._accepted(conversation[: index + 1], False, given))
        if whole.startswith(alone):
            return len(alone)
        # The template renders an earlier turn otherwise than the last one. What both renderings of a turn with another
        # message behind it have in common ends with the header of that message, and the closing token is before it.
        if index + 1 < len(conversation) and self.closing is not None:
            follower = conversation[index + 1]
            others = [
                self._accepted((*conversation[: index + 1], replace(follower, content=words)), False, given)
                for words in ("0", "x")
            ]
            closing = self.tokenizer.convert_ids_to_tokens(self.closing)
            end = whole.rfind(closing, start, shared_length(whole, *others)) + len(closing)
            turn = whole[start:end]
            lost = [line for line in _lines(conversation[index]) if line in alone and line not in turn]
            if end > start + len(closing) and not lost:
                return end
        raise _renders_otherwise(index, alone, whole)

    def _up_to_closing(self, text: str) -> str:
        """A conversation that ends with an answer, without what stands behind its closing token."""
        if text.endswith(self.tail):
            closing = "" if self.closing is None else self.tokenizer.convert_ids_to_tokens(self.closing)
            return text[: len(text) - len(self.tail)] + self.ending + closing
        return text.rstrip() if self.special_at_end.search(text.rstrip()) else text

    def not_rendered(self, given: Prompt, responses: Sequence[Sequence[Message]]) -> list[str]:
        """What a prompt and the responses to it hold that this template does not render: a note for each such thing."""
        notes = []
        for name, without in (("tools", replace(given, tools=())), ("documents", replace(given, documents=()))):
            if getattr(given, name) and self.prompt(given) == self.prompt(without):
                notes.append(f"with {name} that the chat template does not render")
        notes += self._fields_not_rendered((*given.messages,), given, range(len(given.messages)), "the prompt", True)
        for response in responses:
            whole = (*given.messages, *response)
            indices = range(len(given.messages), len(whole))
            notes += self._fields_not_rendered(whole, given, indices, "a response", False)
        return list(dict.fromkeys(notes))

    def _fields_not_rendered(
        self, messages: tuple[Message, ...], given: Prompt, indices: range, where: str, asks: bool
    ) -> list[str]:
        """A note for each field of these messages without which the rendering is the same."""
        notes = []
        for index in indices:
            for name in messages[index].more.keys() - {"content"}:
                fewer = {key: value for key, value in messages[index].more.items() if key != name}
                without = (*messages[:index], replace(messages[index], more=fewer), *messages[index + 1 :])
                try:
                    same = self._render(without, asks, given) == self._render(messages, asks, given)
                except Exception:  # the template insists on it: so it reads it
                    same = False
                if same:
                    notes.append(f"with {name} in {where} that the chat template does not render")
        return sorted(notes)

    def marker_in(self, messages: Sequence[Message]) -> str | None:
        """The first marker that is no special token in a conversation's own text; None where it has none."""
        markers = [marker for marker in self.markers if not self.special.fullmatch(marker)]
        return next((mark for mark in markers for message in messages if mark in message.content), None)

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
