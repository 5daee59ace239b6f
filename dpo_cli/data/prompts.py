"""Prompts to complete: read from a file, each once, in the order of the file."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_cli.console.text import plural, safe_text
from dpo_cli.data.chat_template import RefusedRowError
from dpo_cli.data.files import SourceRow, local_path, read_rows
from dpo_cli.data.formats import BadRowError, Prompt, prompt_of
from dpo_cli.data.tokens import PairEncoder
from dpo_cli.errors import DataError

# Why a prompt is dropped, and what that means.
REASONS = {
    "bad_row": "not readable",
    "refused_by_template": "refused by the chat template",
    "empty": "empty",
    "duplicate": "repeated",
    "prompt_too_long": "longer than max_prompt_length",
}


@dataclass(frozen=True)
class PromptRow:
    """A prompt, as it is stored and in both forms."""

    index: int  # its row in the file, from 0
    location: str  # file and line
    written: Any  # text or a list of messages, for the file of samples
    read: Prompt


@dataclass
class PromptReport:
    """The rows of a prompts file: how many prompts were kept, and dropped for which reason."""

    source: str
    rows: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def sentences(self) -> list[str]:
        """The counts as sentences."""
        lines = [f"{plural(self.kept, 'prompt')} of {plural(self.rows, 'row')} from {self.source}"]
        return lines + [
            f"dropped {plural(number, 'prompt')} ({REASONS[reason]})" for reason, number in self.dropped.items()
        ]


def read_prompts(source: str, limit: int | None, skip_bad: bool) -> tuple[list[PromptRow], PromptReport]:
    """The prompts of a file's first `limit` rows, and a report of what was dropped.

    DataError names file and line of a row without a prompt. A `.txt` file has one prompt a line. Rows of other files
    have a `prompt`, or are preference pairs whose prompt is used.
    """
    path = _file(source)
    report = PromptReport(safe_text(source))
    found: list[PromptRow] = []
    seen: set[str] = set()
    for row in _rows(path):
        if limit is not None and row.index >= limit:
            break
        report.rows += 1
        prompt: Prompt | None = None
        problem = row.problem
        if row.value is not None:
            try:
                prompt = prompt_of(row.value)
            except BadRowError as error:
                problem = safe_text(error, limit=300)
        if prompt is None:
            if not skip_bad:
                raise DataError(f"{row.location}: {problem} (on_bad_row=skip counts and drops such rows)")
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
            found.append(PromptRow(row.index, row.location, written, prompt))
    report.kept = len(found)
    if not found:
        if not report.dropped:
            raise DataError(f"{report.source}: has no rows; name a file with prompts")
        reasons = ", ".join(f"{number:,} {REASONS[reason]}" for reason, number in report.dropped.items())
        raise DataError(f"{report.source}: all prompts were dropped: {reasons}")
    return found, report


def accepted_prompts(
    prompts: Sequence[PromptRow], encoder: PairEncoder, report: PromptReport, skip_bad: bool
) -> list[PromptRow]:
    """The prompts that the encoder's chat template accepts; the others are dropped and counted.

    DataError names file and line of one that it refuses (unless `skip_bad`), or says that it refuses all, or that they
    are rendered already.
    """
    if encoder.template is not None:
        encoder.template.refuse_rendered({prompt.location: prompt.read.messages for prompt in prompts}, "template")
    found = []
    for prompt in prompts:
        try:
            encoder.prompt_text(prompt.read)
        except RefusedRowError as error:
            if not skip_bad:
                raise DataError(f"{prompt.location}: {error} (on_bad_row=skip counts and drops such rows)") from None
            report.dropped["refused_by_template"] += 1
        else:
            found.append(prompt)
    report.kept = len(found)
    if not found:
        raise DataError(f"{report.source}: the chat template refuses all prompts; choose template=plain")
    return found


def _written(prompt: Prompt) -> Any:
    """The prompt as samples store it: as text where that gives the same messages again, else as messages."""
    if prompt_of({"prompt": prompt.text}) == prompt:
        return prompt.text
    return [message.as_dict() for message in prompt.messages]


def _file(source: str) -> Path:
    path = local_path(source)
    if path is None:
        raise DataError(f"{safe_text(source)}: no such file; name a local file of prompts")
    return path


def _rows(path: Path) -> Iterator[SourceRow]:
    """The rows of a file; a `.txt` file has one on each line that is not blank."""
    if path.suffix.lower() != ".txt":
        yield from read_rows(path)
        return
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{safe_text(path)}: cannot be read ({safe_text(error)})") from None
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    for index, (number, line) in enumerate(numbered):
        location = f"{safe_text(path)} line {number}"
        try:
            yield SourceRow(index, location, {"prompt": line.decode("utf-8-sig").strip()})
        except UnicodeDecodeError as error:
            yield SourceRow(index, location, None, f"not UTF-8 at byte {error.start + 1}")
