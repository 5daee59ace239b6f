"""The log of judgements by people: one line each, on disk before the next question is shown.

{"judgements": 1, "samples": "<fingerprint>", "file": "answers.jsonl"}
{"sample": id, "left": 0, "right": 1, "verdict": "left", "annotator": "ann", "time": "2026-01-31T12:00:00+00:00",
 "seconds": 4.2}
{"undo": id, "annotator": "ann", "time": "2026-01-31T12:00:09+00:00"}

One idea to keep in mind: lines are only ever added. An undo is a line of its own. Only an incomplete last line, which
a kill during a write leaves, is removed.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpo_cli.console.text import safe_text
from dpo_cli.data.samples import Sample, samples_fingerprint
from dpo_cli.errors import DataError
from dpo_cli.storage.line_log import LineLog, opened_lines

VERSION = 1
VERDICTS = ("left", "right", "tie", "skip")
MAX_SECONDS = 1e9  # thirty years
OPENING = b'{"judgements": '  # the start of every log, so that no other file is taken for one and truncated


@dataclass(frozen=True)
class Judgement:
    """One annotator's judgement of two responses; `left` and `right` are indices into the sample's responses."""

    sample: str
    left: int
    right: int
    verdict: str
    annotator: str
    time: str  # ISO 8601, UTC
    seconds: float  # from showing the question to the key

    @property
    def pair(self) -> tuple[int, int]:
        """The two responses in the order of the file, whichever side they were on."""
        return min(self.left, self.right), max(self.left, self.right)

    @property
    def winner(self) -> int | None:
        """The index of the better response; None for a tie or a skip."""
        return {"left": self.left, "right": self.right}.get(self.verdict)


class JudgementLog:
    """The judgements of a log without the undone ones, in order; made by `open_judgement_log`."""

    def __init__(self, lines: LineLog, judgements: list[Judgement]) -> None:
        self.judgements = judgements
        self._lines = lines

    def append(self, judgement: Judgement) -> None:
        """Add a judgement; it is on disk when this returns, or StorageError and the log is as it was."""
        self._lines.append(asdict(judgement))
        self.judgements.append(judgement)

    def undo(self, annotator: str, time: str) -> Judgement | None:
        """Undo the annotator's latest judgement and return it; None where there is none."""
        latest = next((judgement for judgement in reversed(self.judgements) if judgement.annotator == annotator), None)
        if latest is not None:
            self._lines.append({"undo": latest.sample, "annotator": annotator, "time": time})
            self.judgements.remove(latest)
        return latest


@contextmanager
def open_judgement_log(
    path: Path, samples: Sequence[Sample], samples_file: Path, warn: Callable[[str], None]
) -> Iterator[JudgementLog]:
    """Open the log at `path`, or create it, locked for this process.

    DataError where it is not a log, or a log of other samples; then it is not changed.
    """
    with opened_lines(path, warn) as lines:
        content = lines.read()
        whole = content[: content.rfind(b"\n") + 1]
        log = JudgementLog(lines, read_judgements(path, content, samples, samples_file))
        if whole != content:
            warn(
                f"{path} line {whole.count(10) + 1}: is incomplete, as after a kill; it is removed, and its question "
                "is asked again"
            )
            lines.cut(len(whole))
        if not whole:
            lines.append({"judgements": VERSION, "samples": samples_fingerprint(samples), "file": samples_file.name})
            lines.sync_name()
        yield log


def read_judgements(path: Path, content: bytes, samples: Sequence[Sample], samples_file: Path) -> list[Judgement]:
    """The judgements of a log's complete lines, without the undone ones; DataError names a line that is not one."""
    if not (content.startswith(OPENING) or OPENING.startswith(content)):
        raise DataError(f"{safe_text(path)}: is not a log of judgements; name another output")
    lines = content.split(b"\n")[:-1]  # after the last line break comes nothing, or an incomplete line
    if lines:
        _check_header(path, _parsed(lines[0]), samples, samples_file)
    answers = {sample.id: len(sample.responses) for sample in samples}
    standing: dict[tuple[str, str, tuple[int, int]], tuple[Judgement, int]] = {}
    for number, line in enumerate(lines[1:], start=2):
        location = f"{safe_text(path)} line {number}"
        record = _parsed(line)
        if record is None:
            shown = safe_text(line[:200].decode("utf-8", "replace"), limit=60)
            raise DataError(f"{location}: is not a judgement: {shown}")
        sample, annotator = record.get("sample", record.get("undo")), record.get("annotator")
        if not isinstance(sample, str) or not isinstance(annotator, str) or not isinstance(record.get("time"), str):
            raise DataError(
                f"{location}: is not a judgement; it needs sample (or undo), annotator and time, each a text"
            )
        if sample not in answers:
            raise DataError(
                f"{location}: sample {safe_text(sample, limit=40)} is not in {safe_text(samples_file)}; remove the "
                "line, or name the samples it belongs to"
            )
        if "undo" in record:
            latest = next((key for key in reversed(standing) if key[:2] == (annotator, sample)), None)
            if latest is None:
                raise DataError(
                    f"{location}: undoes a judgement that {safe_text(annotator, 40)} has not made; remove the line"
                )
            del standing[latest]
            continue
        judgement = _judgement(location, record, answers[sample])
        key = (annotator, sample, judgement.pair)
        if key in standing:
            raise DataError(
                f"{location}: {safe_text(annotator, 40)} has judged this already in line {standing[key][1]}; remove "
                "one of them"
            )
        standing[key] = judgement, number
    return [judgement for judgement, _ in standing.values()]


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _check_header(path: Path, header: dict[str, Any] | None, samples: Sequence[Sample], samples_file: Path) -> None:
    if header is None:
        raise DataError(f"{safe_text(path)} line 1: does not name its samples; name another output")
    if header.get("judgements") != VERSION:
        raise DataError(
            f"{safe_text(path)}: is a log of version {safe_text(header.get('judgements'), 20)}; this program reads "
            f"version {VERSION}"
        )
    if header.get("samples") != samples_fingerprint(samples):
        raise DataError(
            f"{safe_text(path)}: has judgements of other samples than {safe_text(samples_file)}: it was started with "
            f"{safe_text(header.get('file'), 80)}; name those samples, or another output"
        )


def _judgement(location: str, record: dict[str, Any], answers: int) -> Judgement:
    left, right, verdict, seconds = (record.get(name) for name in ("left", "right", "verdict", "seconds"))
    if type(left) is not int or type(right) is not int or left == right or not {left, right} <= set(range(answers)):
        raise DataError(f"{location}: left and right must be two different numbers from 0 to {answers - 1}")
    if verdict not in VERDICTS:
        raise DataError(f"{location}: verdict is {safe_text(verdict, 40)}, not one of {', '.join(VERDICTS)}")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= MAX_SECONDS:
        raise DataError(f"{location}: seconds is {safe_text(seconds, 40)}, not a number from 0 to {MAX_SECONDS:g}")
    return Judgement(record["sample"], left, right, verdict, record["annotator"], record["time"], float(seconds))
