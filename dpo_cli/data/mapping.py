"""From a row of any published form to a row that the formats read, as the `columns` of a data config say.

The one idea: whatever says which of several responses is preferred (an index, a winner, a signed preference, ranks)
becomes `scores`, the higher the better. Equal scores are a tie.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dpo_cli.config.schema import LABELS, DataConfig, cell_text
from dpo_cli.data.formats import MESSAGE_FIELDS, BadRowError, Row, objects_of, prompt_of, text_of

OPTIONAL = ("system", "history", "source", "tools", "documents")  # a row may lack these
MESSAGE_KEYS = ("role", "content", *MESSAGE_FIELDS)  # of a message
SHAREGPT_KEYS = ("from", "value")  # the same in ShareGPT's form
_MISSING = object()

Columns = Mapping[str, str | list[str] | None]


@dataclass(frozen=True)
class RowMapping:
    """What the columns of a row are."""

    columns: Columns = field(default_factory=dict)  # our name: name or dotted path in the row, several, or none
    preferred: Sequence[str] = ()  # the value of `columns.preferred` for each response; empty: its position, from 0
    tied: Sequence[str] = ()  # the values of that column that prefer none
    roles: Mapping[str, str] = field(default_factory=dict)  # the speakers of messages that have other names

    @classmethod
    def of(cls, config: DataConfig) -> "RowMapping":
        """The mapping of a data config."""
        columns = {name: column for name, column in config.columns.items() if name != "probability"}
        if config.soft_labels and not columns.get("responses"):
            columns["probability"] = config.columns.get("probability", "probability")
        return cls(columns, config.preferred, config.tied, config.roles)


def canonical(row: Row, mapping: RowMapping) -> Row:
    """The row with `prompt` and either `chosen` and `rejected`, or `responses` and `scores`.

    A named column is read from there only; a row's own column of one of our names counts where none is named.
    BadRowError where a named column is missing or does not hold what it should.
    """
    columns = {name: column for name, column in mapping.columns.items() if column}
    named = _shadowed(mapping.columns) | {path for column in columns.values() for path in _listed(column)}
    result = {key: cell for key, cell in row.items() if key not in named}
    result |= {name: _cell(row, name, column) for name, column in columns.items()}
    if "probability" in columns:
        cell = result.pop("probability")
        if cell not in (None, "") and not ("responses" in result and "chosen" not in result):
            result["probability"] = _probability(cell, columns["probability"])
    for name in ("prompt", "chosen", "rejected"):
        if name in result:
            result[name] = _messages(result[name], mapping.roles)
    if isinstance(result.get("responses"), list):
        result["responses"] = [_messages(response, mapping.roles) for response in result["responses"]]
    if columns.get("prompt") and columns.get("prompt") == columns.get("chosen"):
        result["prompt"], result["chosen"] = _without_answer(result["prompt"], columns["prompt"])
    for name in columns.keys() & set(LABELS):
        result["scores"] = _scores(name, result.pop(name), result.get("responses"), mapping)
    if "history" in columns and (history := result.pop("history")):
        result["prompt"] = _with_history(history, str(columns["history"]), result)
    if "system" in columns and _at(row, str(columns["system"])) is not _MISSING:
        result["prompt"] = _with_system(text_of(result.pop("system") or "", str(columns["system"])), result)
    return result


def not_used(row: Row, columns: Columns, reads: frozenset[str]) -> list[str]:
    """The columns of a row with something in them that nothing reads; `reads` is what the row's format does.

    Within columns that are read the parts that nothing reads, as dotted paths: `question.id`, `messages.images`.
    """
    named = [column for name, column in columns.items() if column and (name != "probability" or name in reads)]
    paths = {path for column in named for path in _listed(column)} | (reads - _shadowed(columns))
    return list(dict.fromkeys(path for name, cell in row.items() for path in _unread(cell, str(name), paths)))


def _unread(cell: Any, at: str, paths: set[str]) -> Iterator[str]:
    """The paths at and below `at` with something in them that nothing reads."""
    if cell is None or (isinstance(cell, str | list | tuple | Mapping) and not cell):
        return
    inside = [one for one in (cell if isinstance(cell, list | tuple) else [cell]) if isinstance(one, Mapping)]
    if at in paths:
        for turn in inside:
            known = MESSAGE_KEYS if "role" in turn else SHAREGPT_KEYS if "from" in turn else turn
            for key in turn:
                yield from _unread(turn[key] if key not in known else None, f"{at}.{key}", set())
    elif any(path.startswith(f"{at}.") for path in paths):
        for one in inside:
            for key, value in one.items():
                yield from _unread(value, f"{at}.{key}", paths)
    else:
        yield at


def source_of(row: Row, columns: Columns) -> str:
    """Where a canonical row is from, in words; empty where no column says so."""
    source = row.get("source") if columns.get("source") else None
    return ", ".join(map(str, source)) if isinstance(source, list) else "" if source is None else str(source)


def _shadowed(columns: Columns) -> set[str]:
    """The names under which a row's own columns do not count."""
    named = {name for name, column in columns.items() if column}
    hidden = {*columns, "probability"} | ({"scores"} if named & set(LABELS) else set())
    return hidden | ({"chosen", "rejected"} if "responses" in named else set())


def _listed(column: str | list[str] | None) -> list[str]:
    return [column] if isinstance(column, str) else column or []


def _cell(row: Row, name: str, column: str | list[str]) -> Any:
    """The cell of a column, or of several as a list; those of a prompt are joined by line breaks."""
    if isinstance(column, str):
        found = _at(row, column)
        if found is _MISSING and name not in OPTIONAL and (name, column) != ("probability", "probability"):
            raise _missing(row, name, column)
        return None if found is _MISSING else found
    cells = [_at(row, path) for path in column]
    if name == "prompt":
        parts = [text_of(cell, path) for path, cell in zip(column, cells, strict=True) if cell not in (_MISSING, None)]
        if not parts:
            raise _missing(row, name, ", ".join(column))
        return "\n".join(part for part in parts if part)
    for path, cell in zip(column, cells, strict=True):
        if cell is _MISSING:
            raise _missing(row, name, path)
    return cells


def _at(value: Any, path: str) -> Any:
    """What a dotted path leads to; a list on the way gives a list of what its elements hold."""
    if isinstance(value, list | tuple):
        found = [_at(element, path) if isinstance(element, Mapping) else _MISSING for element in value]
        return _MISSING if any(element is _MISSING for element in found) else found
    if not isinstance(value, Mapping):
        return _MISSING
    if path in value:
        return value[path]
    head, _, rest = path.partition(".")
    return _at(value[head], rest) if rest and head in value else _MISSING


def _missing(row: Row, name: str, path: str) -> BadRowError:
    has = ", ".join(map(str, row)) or "nothing"
    return BadRowError(f"no '{path}' key (data.columns.{name}); it has {has}")


def _messages(value: Any, roles: Mapping[str, str]) -> Any:
    """Messages with our keys and roles, one message as a list of one; anything else as it is."""
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list | tuple):
        return value
    return [_message(turn, roles) if isinstance(turn, Mapping) else turn for turn in value]


def _message(turn: Mapping[str, Any], roles: Mapping[str, str]) -> Mapping[str, Any]:
    if "role" not in turn and "from" in turn:  # ShareGPT's keys
        if turn["from"] == "function_call":
            calls = objects_of(turn.get("value"), "the value of function_call")
            return {"role": "assistant", "tool_calls": [{"type": "function", "function": call} for call in calls]}
        turn = {"role": turn["from"], "content": turn.get("value")}
    role = turn.get("role")
    return {**turn, "role": roles[role]} if isinstance(role, str) and role in roles else turn


def _scores(name: str, label: Any, responses: Any, mapping: RowMapping) -> Any:
    """What a label says as a score for each response, the higher the better."""
    column = mapping.columns[name]
    if name == "scores":
        return _numbers(label, column) if isinstance(label, list) else label
    count = len(responses) if isinstance(responses, list) else 0
    if name == "ranks":
        return [-rank for rank in _numbers(label, column)]
    if name == "preference":
        if count != 2:
            raise BadRowError(f"'{column}' compares two responses (data.columns.preference); the row has {count}")
        (preference,) = _numbers([label], column)
        return [-preference, preference]
    values = list(mapping.preferred) or [str(position) for position in range(count)]
    written = cell_text(label)
    if written in mapping.tied:
        return [0] * count
    if written not in values:
        known = ", ".join([*values, *mapping.tied])
        raise BadRowError(f"'{column}' is {written!r}; data.preferred and data.tied know {known}")
    return [int(value == written) for value in values]


def _probability(cell: Any, column: str | list[str]) -> float:
    """A probability that the chosen response is better."""
    try:
        w = math.nan if isinstance(cell, bool) else float(cell)
    except (TypeError, ValueError):
        w = math.nan
    if not 0 <= w <= 1:  # nan fails, too
        raise BadRowError(f"'{column}' must be a probability from 0 to 1, it is {cell!r}; data.soft_labels=false "
                          "does not read it")  # fmt: skip
    return w


def _numbers(values: Any, column: str | list[str] | None) -> list[float]:
    """Numbers, also of CSV, where they are text."""
    try:
        if not isinstance(values, list) or any(isinstance(value, bool) for value in values):
            raise ValueError
        return [value if isinstance(value, int | float) else float(value) for value in values]
    except (TypeError, ValueError):
        shown = values[0] if isinstance(values, list) and len(values) == 1 else values
        raise BadRowError(f"'{', '.join(_listed(column))}' must hold numbers, it holds {shown!r}") from None


def _without_answer(messages: Any, column: str | list[str]) -> tuple[Any, Any]:
    """A conversation as its prompt and its last message, where one column holds both."""
    last = messages[-1] if isinstance(messages, list) and len(messages) > 1 else None
    if not isinstance(last, Mapping) or last.get("role") != "assistant":
        raise BadRowError(f"'{column}' must be messages that end with the chosen response, of an assistant")
    return messages[:-1], [last]


def _with_history(history: Any, column: str, row: Row) -> Any:
    """The prompt as messages behind earlier turns, each a list of what the user said and what the assistant said."""
    turns = []
    for turn in history if isinstance(history, list | tuple) else [None]:
        if not isinstance(turn, list | tuple) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise BadRowError(f"'{column}' must hold pairs of texts, of a user and of an assistant; it holds {turn!r}")
        turns += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return turns + _turns_of(row)


def _turns_of(row: Row) -> list[dict[str, Any]]:
    """The prompt as messages."""
    prompt = prompt_of({"prompt": row.get("prompt")})
    return [message.as_dict() for message in prompt.messages]


def _with_system(system: str, row: Row) -> Any:
    """The prompt as messages, the system message before the others."""
    turns = _turns_of(row)
    if system and turns[0]["role"] == "system":
        raise BadRowError("the prompt has a system message, too; data.columns.system=null keeps that one")
    return [{"role": "system", "content": system}, *turns] if system else turns
