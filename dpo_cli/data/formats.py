"""Row formats: each a pure function from one row of a file to a `PreferencePair`.

A pair holds its prompt in two forms: as messages, which a chat template renders, and as plain text, which
`data.template=plain` trains on as it is.
"""

import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
OPENING_ROLES = ("system", "developer")  # of messages before the first turn
# Keys of a message besides role and content that a chat template may render.
MESSAGE_FIELDS = ("tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning", "thinking", "tool_plan")
CONTEXT = ("tools", "documents")  # columns that travel with the prompt to the chat template
_SURROGATE = re.compile("[\ud800-\udfff]")
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"

# Keys of rows whose responses a model generated: how each of the two ended.
FINISH_KEYS = ("chosen_finish_reason", "rejected_finish_reason")

# Notes: changes to a row that its author may not expect. Counted and printed.
DIVERGES_EARLY = "differ before the last turn: the later turns are part of the responses"
TIE_KEPT = "with two equally good responses (a tie): their label has probability 1/2"
SOFT_LABEL = "with a soft label, their probability that chosen is better; data.soft_labels=false takes it as certain"
PROMPT_REPEATED = "repeat the prompt in their responses: it was removed from them"


class FinishReason(StrEnum):
    """How a completion ended, as vLLM and OpenAI name it: by its own stop token, or at a limit of tokens."""

    STOP = "stop"
    LENGTH = "length"


class BadRowError(ValueError):
    """A row that is not a preference pair; the message says what was expected and what was found."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str  # its text parts joined; empty for null
    # What else a chat template may render, under its key (MESSAGE_FIELDS); `content`: null, where the row has null.
    more: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def as_dict(self) -> dict[str, Any]:
        """The message as chat templates take it."""
        return {"role": self.role, "content": self.content, **self.more}


@dataclass(frozen=True)
class Prompt:
    """A prompt in both forms, with what else the chat template may render."""

    messages: tuple[Message, ...]
    text: str
    tools: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    documents: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)


@dataclass(frozen=True)
class PreferencePair:
    """A prompt with a preferred and a dispreferred response."""

    messages: tuple[Message, ...]  # the prompt as a conversation
    prompt_text: str  # the prompt as plain text
    chosen: str
    rejected: str
    notes: tuple[str, ...] = ()
    chosen_finish_reason: FinishReason = FinishReason.STOP
    rejected_finish_reason: FinishReason = FinishReason.STOP
    tied: bool = False  # neither is preferred
    # A response that is more than one message of text, as messages; empty: one assistant message of that text.
    chosen_messages: tuple[Message, ...] = ()
    rejected_messages: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    documents: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    probability: float = 1.0  # that `chosen` is better; below 1 the label is soft

    @property
    def has_more(self) -> bool:
        """Whether it holds anything besides roles and text."""
        messages = (*self.messages, *self.chosen_messages, *self.rejected_messages)
        return bool(self.tools or self.documents or any(message.more for message in messages))

    @property
    def prompt(self) -> Prompt:
        """The prompt in both forms."""
        return Prompt(self.messages, self.prompt_text, self.tools, self.documents)


Row = Mapping[str, Any]


def _kind(value: object) -> str:
    names = {type(None): "null", str: "text", list: "a list", dict: "an object", bool: "true or false"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


# Names of the three keys in other data sets, the most likely first.
OTHER_NAMES = {
    "prompt": ("question", "instruction", "input", "query"),
    "chosen": ("preferred", "accepted", "winner", "good", "positive", "better"),
    "rejected": ("dispreferred", "refused", "loser", "bad", "negative", "worse"),
}


def _field(row: Row, name: str) -> Any:
    if name in row:
        return row[name]
    close = [other for other in OTHER_NAMES.get(name, ()) if other in row]
    close = close or difflib.get_close_matches(name, [str(key) for key in row], n=1, cutoff=0.6)
    hint = f"; did you mean data.columns.{name}={close[0]}?" if close else ""
    has = ", ".join(str(key) for key in row) or "nothing"
    raise BadRowError(f"no '{name}' key. A row needs prompt, chosen and rejected; it has {has}{hint}")


def _text(row: Row, name: str) -> str:
    return text_of(_field(row, name), name)


def text_of(value: object, name: str) -> str:
    """The value of a cell that must be text; BadRowError where it is not."""
    if not isinstance(value, str):
        raise BadRowError(f"'{name}' must be text, it is {_kind(value)}")
    return _valid(value, name)


def _valid(text: str, name: str) -> str:
    # A JSON escape such as \ud800 makes text that no tokenizer can read.
    if not text.isascii() and _SURROGATE.search(text):
        raise BadRowError(f"'{name}' holds half a surrogate pair (\\ud800 to \\udfff), which is not text")
    return text


def _messages(value: object, name: str) -> tuple[Message, ...]:
    if not isinstance(value, list | tuple):
        raise BadRowError(f"'{name}' must be a list of messages, it is {_kind(value)}")
    turns = []
    for position, turn in enumerate(value):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
            raise BadRowError(f"'{name}' message {position} must be an object with role and content")
        if turn["role"] not in ROLES:
            raise BadRowError(f"'{name}' message {position} has role '{turn['role']}'; roles are {', '.join(ROLES)}")
        where = f"'{name}' message {position}"
        more = {key: turn[key] for key in MESSAGE_FIELDS if turn.get(key) not in (None, "", [])}
        if "tool_calls" in more:
            more["tool_calls"] = objects_of(more["tool_calls"], f"{where}: tool_calls")
            if turn.get("content") is None:
                more["content"] = None
        content = "" if "content" in more else _content(turn.get("content"), where)
        _valid(json.dumps(more, ensure_ascii=False, default=str), name)
        turns.append(Message(turn["role"], _valid(content, name), more))
    return tuple(turns)


def _content(value: object, where: str) -> str:
    """The text of a message; that of its text parts joined."""
    if not isinstance(value, list):
        if not isinstance(value, str):
            raise BadRowError(f"{where}: content must be text, it is {_kind(value)}")
        return value
    texts = []
    for part in value:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind != "text":
            raise BadRowError(f"{where} has a part of type '{kind}'; dpo-cli trains on text parts alone")
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            raise BadRowError(f"{where} has a part without text; write {{'type': 'text', 'text': ...}}")
        texts.append(text)
    return "".join(texts)


def objects_of(value: object, name: str) -> tuple[Mapping[str, Any], ...]:
    """A list of objects, each of them or the whole list possibly as JSON text; BadRowError where it is none."""
    found = _json(value, name)
    listed = [found] if isinstance(found, Mapping) else [] if found is None else found
    if not isinstance(listed, list | tuple):
        raise BadRowError(f"{name} must be a list of objects, it is {_kind(value)}")
    objects = tuple(_json(one, name) for one in listed)
    for one in objects:
        if not isinstance(one, Mapping):
            raise BadRowError(f"{name} must be a list of objects, it holds {_kind(one)}")
    return objects


def _json(value: object, name: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError:
        raise BadRowError(f"{name} must be a list of objects; its text is not JSON") from None


def dialogue_messages(text: str) -> tuple[Message, ...]:
    """The messages of a prompt in HH form: `Human:` and `Assistant:` turns, the last of them open.

    Text before the first turn is the system message, as `dialogue_text` writes it.
    Adjacent turns of one speaker are joined: most chat templates require that speakers alternate.
    """
    before, turns = _turns_of(text)
    if turns and turns[-1].role == "assistant":  # the open turn, which the response completes
        turns.pop()
    return tuple([Message("system", before)] * bool(before and turns) + turns)


def _turns_of(text: str) -> tuple[str, list[Message]]:
    """What stands before the first turn, and the turns."""
    parts = re.split(r"\n\n(Human|Assistant):", text)
    before = parts[0].strip()
    turns: list[Message] = []
    for speaker, content in zip(parts[1::2], parts[2::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if turns and turns[-1].role == role:
            turns[-1] = Message(role, f"{turns[-1].content}\n\n{content.strip()}")
        else:
            turns.append(Message(role, content.strip()))
    return before, turns


def dialogue_text(messages: tuple[Message, ...]) -> str:
    """Messages as a prompt in HH form; a system message is plain text before the turns."""
    shown = [_said(message) if message.role in OPENING_ROLES else _turn(message) for message in messages]
    return "".join(shown) + ASSISTANT


def _turn(message: Message) -> str:
    speaker = {"user": HUMAN, "tool": "\n\nTool:"}.get(message.role, ASSISTANT)
    return f"{speaker} {_said(message)}"


def _said(message: Message) -> str:
    """The text of a message, with all else that it holds: texts that are equal are equal messages."""
    more = {key: value for key, value in message.more.items() if key != "content"}
    return message.content + (f"\n{json.dumps(more, sort_keys=True, default=str)}" if more else "")


def shared_length(first: Sequence[Any], *others: Sequence[Any]) -> int:
    """The length of the longest common prefix of texts, or of lists of ids."""
    if len(others) != 1:
        return min(shared_length(first, other) for other in others)
    (second,) = others
    limit = min(len(first), len(second))
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if first[:middle] == second[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def hh(row: Row) -> PreferencePair:
    r"""Whole dialogues in `chosen` and `rejected`; the prompt is all up to the last `\n\nAssistant:` they share.

    Not their longest common prefix, which could end within a word. Where the dialogues differ before their last
    turn, the later turns are part of the responses and the pair has a note.
    """
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    cut = chosen.rfind(ASSISTANT, 0, shared_length(chosen, rejected))
    if cut < 0:
        other = "; the row has a prompt: data=jsonl reads it" if row.get("prompt") else ""
        raise BadRowError(
            f"chosen and rejected share no '\\n\\nAssistant:' turn, so there is no prompt (format=hh){other}"
        )
    cut += len(ASSISTANT)
    prompt = chosen[:cut]
    messages = dialogue_messages(prompt)
    if not messages:
        raise BadRowError("the dialogue has no '\\n\\nHuman:' turn before the response (format=hh)")
    pair = PreferencePair(messages, prompt, chosen[cut:], rejected[cut:])
    later = _later_turns(pair.chosen), _later_turns(pair.rejected)
    notes = (DIVERGES_EARLY,) if any(later) else ()
    return replace(pair, notes=notes, chosen_messages=later[0], rejected_messages=later[1])


def _later_turns(text: str) -> tuple[Message, ...]:
    """The turns of a response in HH form that goes beyond one turn, up to the assistant's last; else none."""
    if ASSISTANT not in text:
        return ()
    turns = _turns_of(ASSISTANT + text)[1]
    last = max(index for index, turn in enumerate(turns) if turn.role == "assistant")
    return tuple(turns[: last + 1])


def standard(row: Row) -> PreferencePair:
    """`prompt`, `chosen` and `rejected` as text."""
    prompt, chosen, rejected = (_text(row, name) for name in ("prompt", "chosen", "rejected"))
    notes: tuple[str, ...] = ()
    # Three words or more: both responses may begin with a short greeting. Generated responses stay as they are.
    generated = any(row.get(name) is not None for name in FINISH_KEYS)
    if not generated and len(prompt.split()) >= 3 and chosen.startswith(prompt) and rejected.startswith(prompt):
        chosen, rejected, notes = chosen[len(prompt) :], rejected[len(prompt) :], (PROMPT_REPEATED,)
    return PreferencePair(_text_prompt(prompt).messages, prompt, chosen, rejected, notes)


def messages(row: Row) -> PreferencePair:
    """Messages in `chosen` and `rejected`; the prompt is given, repeated in them, or what both begin with.

    A given prompt may be text or messages. A response may be several messages (a call, its result and an answer, or
    later turns of the dialogue); it begins and ends with what the assistant wrote.
    """
    prompt = row.get("prompt")
    given: tuple[Message, ...] | None = None
    if isinstance(prompt, str):
        given = (Message("user", _valid(prompt, "prompt")),)
    elif prompt is not None:
        given = _messages(prompt, "prompt")
    chosen, chosen_repeats = _answer(row, "chosen", given)
    rejected, rejected_repeats = _answer(row, "rejected", given)
    if given is None:
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        while shared and not chosen[shared].role == rejected[shared].role == "assistant":
            shared -= 1  # what the assistant says next differs, or what is said to it: the response begins there
        given, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not given or given[-1].role == "assistant":
        raise BadRowError("the prompt must end with a user message before the responses begin (format=messages)")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer or answer[0].role != "assistant" or answer[-1].role != "assistant":
            found = ", ".join(message.role for message in answer) or "nothing"
            raise BadRowError(
                f"'{name}' must begin and end with an assistant message behind the prompt; it has {found}"
            )
    later = any(message.role == "user" for message in (*chosen, *rejected))
    notes = (PROMPT_REPEATED,) * (chosen_repeats or rejected_repeats) + (DIVERGES_EARLY,) * later
    # HH's plain form has a space after the colon; under a chat template the encoder takes it away.
    pair = PreferencePair(given, dialogue_text(given), _response_text(chosen), _response_text(rejected), notes)
    return replace(pair, chosen_messages=_beyond_text(chosen), rejected_messages=_beyond_text(rejected))


def _response_text(answer: tuple[Message, ...]) -> str:
    """A response as it follows its prompt in HH form."""
    return dialogue_text(answer).removeprefix(ASSISTANT).removesuffix(ASSISTANT)


def _beyond_text(answer: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages of a response that is more than one message of text; else none."""
    return answer if len(answer) > 1 or answer[0].more else ()


def _answer(row: Row, name: str, given: tuple[Message, ...] | None) -> tuple[tuple[Message, ...], bool]:
    """The messages of a response, and whether they repeated the prompt."""
    value = _field(row, name)
    if isinstance(value, str):
        return (Message("assistant", _valid(value, name)),), False
    conversation = _messages(value, name)
    if given and len(conversation) > len(given) and conversation[: len(given)] == given:
        return conversation[len(given) :], True
    return conversation, False


def auto(row: Row) -> PreferencePair:
    """Choose the format of each row by its keys and types, so that files with mixed formats work."""
    chosen, rejected = _field(row, "chosen"), _field(row, "rejected")
    if isinstance(chosen, list) or isinstance(rejected, list) or isinstance(row.get("prompt"), list):
        return messages(row)
    dialogue = isinstance(chosen, str) and isinstance(rejected, str) and ASSISTANT in chosen and ASSISTANT in rejected
    if row.get("prompt") is None and dialogue:
        return hh(row)
    return standard(row)


def prompt_of(row: Row) -> Prompt:
    """The prompt of a row: `prompt` as text or messages, or what the responses of a pair begin with.

    So a file of pairs can be used as a file of prompts.
    """
    if row.get("prompt") is None and "chosen" in row and "rejected" in row:
        pair = auto(row)
        return pair.prompt
    if "prompt" not in row:
        has = ", ".join(str(key) for key in row) or "nothing"
        raise BadRowError(f"no 'prompt' key. A row needs a prompt, as text or messages; it has {has}")
    prompt = row["prompt"]
    if isinstance(prompt, list | tuple):
        turns = _messages(prompt, "prompt")
        if not turns or turns[-1].role == "assistant":
            raise BadRowError("the prompt must end with a user message")
        return Prompt(turns, dialogue_text(turns))
    return _text_prompt(text_of(prompt, "prompt"))


def _text_prompt(text: str) -> Prompt:
    """A prompt given as text: a dialogue in HH form with an open last turn, or one user message."""
    turns = dialogue_messages(text) if text.rstrip().endswith(ASSISTANT) else ()
    return Prompt(turns or (Message("user", text),), text)


def ranked(row: Row) -> tuple[PreferencePair, ...]:
    """Several `responses` to one `prompt`, the best first or with `scores`: a pair of every two.

    Two with equal scores are a tie. All comparisons of a prompt stay adjacent, as in Section 3.5 of
    https://arxiv.org/abs/2203.02155, so that in a batch they share the prompt and each response is computed once.
    """
    responses = _listed(row, "responses")
    if "scores" not in row and {"finish_reason", "finished", "rewards"} & set(row):  # written by dpo-sample or dpo-rank
        raise BadRowError("has responses without labels; make pairs of them with dpo-label")
    if len(responses) < 2:
        raise BadRowError(f"'responses' must hold at least two, it has {len(responses)} (format=ranked)")
    scores = row.get("scores")
    if scores is None:
        scores = range(len(responses), 0, -1)
    elif not isinstance(scores, list) or not all(_is_number(score) for score in scores):
        raise BadRowError("'scores' must be a list of numbers, one for each response (format=ranked)")
    if len(scores) != len(responses):
        raise BadRowError(f"'scores' has {len(scores)} numbers for {len(responses)} responses (format=ranked)")
    reasons = finish_reasons(row, len(responses))
    best_first = sorted(range(len(responses)), key=lambda index: -scores[index])
    pairs = []
    for rank, better in enumerate(best_first):
        for worse in best_first[rank + 1 :]:
            sides = {"prompt": row.get("prompt"), "chosen": responses[better], "rejected": responses[worse]}
            if reasons:
                sides |= dict(zip(FINISH_KEYS, (reasons[better], reasons[worse]), strict=True))
            pair = _with_finish_reasons(auto(sides), sides)
            pairs.append(replace(pair, tied=scores[better] == scores[worse]))
    return tuple(pairs)


def _listed(row: Row, name: str) -> list[Any]:
    if not isinstance(row.get(name), list):
        raise BadRowError(f"'{name}' must be a list, it is {_kind(row.get(name))} (format=ranked)")
    listed: list[Any] = row[name]
    return listed


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def pairs_of(row: Row, name: str) -> tuple[PreferencePair, ...]:
    """The pairs of one row in the format `name`: one, but for ranked rows."""
    pairs = ranked(row) if _is_ranked(row, name) else (_with_finish_reasons(FORMATS[name](row), row),)
    if name == "hh":
        return pairs
    tools, documents = (objects_of(row.get(key), f"'{key}'") for key in CONTEXT)
    return tuple(replace(pair, tools=tools, documents=documents) for pair in pairs) if tools or documents else pairs


def _is_ranked(row: Row, name: str) -> bool:
    return name == "ranked" or (name == "auto" and "responses" in row and "chosen" not in row)


def fields_read(row: Row, name: str) -> frozenset[str]:
    """The keys of a row that the format `name` may read: all of them where it is not one of ours."""
    if _is_ranked(row, name):
        return frozenset(("prompt", "responses", "scores", "finish_reason", *CONTEXT))
    sides = ("chosen", "rejected", "probability", *FINISH_KEYS)
    named = ("prompt", *sides, *CONTEXT)
    return frozenset({"hh": sides}.get(name, named if name in ("auto", "standard", "messages") else row))


def _with_finish_reasons(pair: PreferencePair, row: Row) -> PreferencePair:
    """The pair with the finish reasons of the row, `stop` where the row has none."""
    reasons = []
    for name in FINISH_KEYS:
        _refuse_older_name(row, name)
        value = row.get(name)
        reasons.append(FinishReason.STOP if value in (None, "") else _finish_reason(value, name))  # "": a cell of CSV
    return replace(pair, chosen_finish_reason=reasons[0], rejected_finish_reason=reasons[1])


def finish_reasons(row: Row, responses: int) -> tuple[FinishReason, ...]:
    """The finish reasons of a row of several responses; empty where the row has none."""
    _refuse_older_name(row, "finish_reason")
    reasons = row.get("finish_reason")
    if reasons is None:
        return ()
    if not isinstance(reasons, list) or len(reasons) != responses:
        raise BadRowError('\'finish_reason\' must be a list of "stop" or "length", one for each response')
    return tuple(_finish_reason(reason, "finish_reason") for reason in reasons)


def _finish_reason(value: object, name: str) -> FinishReason:
    if value not in tuple(FinishReason):
        raise BadRowError(f'\'{name}\' is {value!r}; it must be "stop" or "length"')
    return FinishReason(str(value))


def _refuse_older_name(row: Row, name: str) -> None:
    older = name.replace("finish_reason", "finished")
    if row.get(older) is not None:
        value = '"stop" or "length"' if name in FINISH_KEYS else 'a list of "stop" or "length"'
        raise BadRowError(f"'{older}' is an older name; write \"{name}\": {value}")


# Chosen by `data.format`; a `ranked` row gives several pairs.
FORMATS: dict[str, Callable[[Row], PreferencePair]] = {
    "auto": auto,
    "hh": hh,
    "standard": standard,
    "messages": messages,
}
