"""Prompts to be answered: read from a file, each once, in the order of the file."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_cli.console.text import plural, safe_text
from dpo_cli.data.files import local_path, read_rows
from dpo_cli.data.formats import BadRowError, Prompt, prompt_of
from dpo_cli.errors import DataError

# Why a prompt is not answered, with its meaning.
REASONS = {
    "bad_row": "that held none",
    "empty": "that were empty",
    "duplicate": "that stood there before",
    "prompt_too_long": "over max_prompt_length",
}


@dataclass(frozen=True)
class PromptInFile:
    """A prompt, as it is written and as it is read."""

    index: int  # its row in the file, from 0
    written: Any  # text or a list of messages: what the samples say it was
    read: Prompt


@dataclass
class PromptReport:
    """What became of the rows of a prompts file."""

    source: str
    rows: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def sentences(self) -> list[str]:
        """The counts in words."""
        lines = [f"{plural(self.kept, 'prompt')} of {plural(self.rows, 'row')} from {self.source}"]
        return lines + [f"left out {number:,} {REASONS[reason]}" for reason, number in self.dropped.items()]


def read_prompts(source: str, limit: int | None, skip_bad: bool) -> tuple[list[PromptInFile], PromptReport]:
    """The prompts of a file's first `limit` rows, and what was left out.

    DataError names file and line of a row without one. `.txt` holds a prompt a line; the other kinds a row with
    `prompt`, or a preference pair, whose prompt is taken.
    """
    path = _file(source)
    report = PromptReport(safe_text(source))
    found: list[PromptInFile] = []
    seen: set[str] = set()
    for index, place, row, problem in _rows(path):
        if limit is not None and index >= limit:
            break
        report.rows += 1
        prompt: Prompt | None = None
        if row is not None:
            try:
                prompt = prompt_of(row)
            except BadRowError as error:
                problem = safe_text(error, limit=300)
        if prompt is None or row is None:
            if not skip_bad:
                raise DataError(f"{place}: {problem} (on_bad_row=skip counts and leaves out such rows)")
            report.dropped["bad_row"] += 1
            continue
        written = _written(prompt)
        key = json.dumps(written, sort_keys=True)
        if not prompt.messages[-1].content.strip():
            report.dropped["empty"] += 1
        elif key in seen:
            report.dropped["duplicate"] += 1
        else:
            seen.add(key)
            found.append(PromptInFile(index, written, prompt))
    report.kept = len(found)
    if not found:
        reasons = ", ".join(f"{number} {reason}" for reason, number in report.dropped.items()) or "the file has no rows"
        raise DataError(f"{report.source}: no prompt in it ({reasons})")
    return found, report


def _written(prompt: Prompt) -> Any:
    """The prompt as samples keep it: as text where that reads back as the same messages, else as the messages."""
    if prompt_of({"prompt": prompt.text}) == prompt:
        return prompt.text
    return [{"role": message.role, "content": message.content} for message in prompt.messages]


def _file(source: str) -> Path:
    path = local_path(source)
    if path is None:
        raise DataError(f"{safe_text(source)}: no such file; prompts are read from files")
    return path


def _rows(path: Path) -> Any:
    """Row number, place, content and problem of each row."""
    if path.suffix.lower() != ".txt":
        for row in read_rows(path):
            yield row.index, row.place, row.value, row.problem
        return
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{safe_text(path)}: cannot be read ({safe_text(error)})") from None
    index = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{safe_text(path)} line {number}"
        try:
            yield index, place, {"prompt": line.decode("utf-8-sig").strip()}, None
        except UnicodeDecodeError as error:
            yield index, place, None, f"not UTF-8 at byte {error.start + 1}"
        index += 1
