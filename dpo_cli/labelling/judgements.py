"""The log of what people judged: a line a judgement, on disk before the next question is put.

{"judgements": 1, "samples": "<fingerprint>", "file": "answers.jsonl"}
{"sample": id, "left": 0, "right": 1, "verdict": "left", "annotator": "ann", "time": "2026-01-31T12:00:00+00:00",
 "seconds": 4.2}
{"undo": id, "annotator": "ann", "time": "2026-01-31T12:00:09+00:00"}

One idea to keep in mind: lines are only ever added. Who changes their mind adds a line that takes the last one back;
only half a line, which a kill in the middle of writing leaves at the end, is cut off.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpo_cli.console.text import safe_text
from dpo_cli.data.samples import Sample, fingerprint_of
from dpo_cli.errors import DataError
from dpo_cli.storage.line_log import LineLog, opened_lines

VERSION = 1
VERDICTS = ("left", "right", "tie", "skip")
OPENING = b'{"judgements": '  # how every log begins: no other file is taken for one, and cut


@dataclass(frozen=True)
class Judgement:
    """What one annotator said of two answers; `left` and `right` are indices into the sample's responses."""

    sample: str
    left: int
    right: int
    verdict: str
    annotator: str
    time: str  # ISO 8601, UTC
    seconds: float  # from the question's first sight to the key

    @property
    def pair(self) -> tuple[int, int]:
        """The two answers in the order of the file, wherever they stood."""
        return min(self.left, self.right), max(self.left, self.right)

    @property
    def winner(self) -> int | None:
        """The better answer's index; None for a tie or a skip."""
        return {"left": self.left, "right": self.right}.get(self.verdict)


class JudgementLog:
    """The judgements of a log that stand, in the order they were made; `opened_log` makes one."""

    def __init__(self, lines: LineLog, judgements: list[Judgement]) -> None:
        self.judgements = judgements
        self._lines = lines

    def append(self, judgement: Judgement) -> None:
        """Add a judgement; it is on disk when this returns, or StorageError and the log is as it was."""
        self._lines.append(asdict(judgement))
        self.judgements.append(judgement)

    def take_back(self, annotator: str, time: str) -> Judgement | None:
        """Undo the annotator's latest judgement, and return it; None where there is none."""
        latest = next((judgement for judgement in reversed(self.judgements) if judgement.annotator == annotator), None)
        if latest is not None:
            self._lines.append({"undo": latest.sample, "annotator": annotator, "time": time})
            self.judgements.remove(latest)
        return latest


@contextmanager
def opened_log(
    path: Path, samples: Sequence[Sample], samples_file: Path, warn: Callable[[str], None]
) -> Iterator[JudgementLog]:
    """The log at `path`, begun where there is none; within, no other process can write to it.

    DataError where it is no log or one of other samples: then nothing in it is changed.
    """
    with opened_lines(path, warn) as lines:
        content = lines.read()
        whole = content[: content.rfind(b"\n") + 1]
        log = JudgementLog(lines, read_judgements(path, content, samples, samples_file))
        if whole != content:
            warn(
                f"{path} line {whole.count(10) + 1}: is half written, as after a kill; it is cut off, as if its key "
                "had not been pressed"
            )
            lines.cut(len(whole))
        if not whole:
            lines.append({"judgements": VERSION, "samples": fingerprint_of(samples), "file": samples_file.name})
            lines.sync_name()
        yield log


def read_judgements(path: Path, content: bytes, samples: Sequence[Sample], samples_file: Path) -> list[Judgement]:
    """The judgements of a log's whole lines that stand; DataError names the line that is none."""
    if not (content.startswith(OPENING) or OPENING.startswith(content)):
        raise DataError(f"{safe_text(path)}: is no log of judgements; name another output")
    lines = content.split(b"\n")[:-1]  # behind the last end of a line is nothing, or half a line
    if lines:
        _check_header(path, _parsed(lines[0]), samples, samples_file)
    answers = {sample.id: len(sample.responses) for sample in samples}
    stand: dict[tuple[str, str, tuple[int, int]], tuple[Judgement, int]] = {}
    for number, line in enumerate(lines[1:], start=2):
        place = f"{safe_text(path)} line {number}"
        record = _parsed(line)
        if record is None:
            shown = safe_text(line[:200].decode("utf-8", "replace"), limit=60)
            raise DataError(f"{place}: is no judgement: {shown}")
        sample, annotator = record.get("sample", record.get("undo")), record.get("annotator")
        if not isinstance(sample, str) or not isinstance(annotator, str) or not isinstance(record.get("time"), str):
            raise DataError(f"{place}: is no judgement; one has sample (or undo), annotator and time, each a text")
        if sample not in answers:
            raise DataError(
                f"{place}: sample {safe_text(sample, limit=40)} is not in {safe_text(samples_file)}; take the line "
                "out, or name the samples that it is of"
            )
        if "undo" in record:
            latest = next((key for key in reversed(stand) if key[:2] == (annotator, sample)), None)
            if latest is None:
                raise DataError(f"{place}: takes back a judgement that {safe_text(annotator, 40)} has not made")
            del stand[latest]
            continue
        judgement = _judgement(place, record, answers[sample])
        key = (annotator, sample, judgement.pair)
        if key in stand:
            raise DataError(
                f"{place}: {safe_text(annotator, 40)} has judged this already, in line {stand[key][1]}; take one out"
            )
        stand[key] = judgement, number
    return [judgement for judgement, _ in stand.values()]


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _check_header(path: Path, header: dict[str, Any] | None, samples: Sequence[Sample], samples_file: Path) -> None:
    if header is None:
        raise DataError(f"{safe_text(path)} line 1: does not say which samples it is of; name another output")
    if header.get("judgements") != VERSION:
        raise DataError(
            f"{safe_text(path)}: is a log of version {safe_text(header.get('judgements'), 20)}; this program reads "
            f"version {VERSION}"
        )
    if header.get("samples") != fingerprint_of(samples):
        raise DataError(
            f"{safe_text(path)}: holds judgements of other samples than {safe_text(samples_file)}: it was begun with "
            f"{safe_text(header.get('file'), 80)}; name the samples as they were then, or another output"
        )


def _judgement(place: str, record: dict[str, Any], answers: int) -> Judgement:
    left, right, verdict, seconds = (record.get(name) for name in ("left", "right", "verdict", "seconds"))
    if type(left) is not int or type(right) is not int or left == right or not {left, right} <= set(range(answers)):
        raise DataError(f"{place}: left and right must be two different numbers from 0 to {answers - 1}")
    if verdict not in VERDICTS:
        raise DataError(f"{place}: verdict is {safe_text(verdict, 40)}, not one of {', '.join(VERDICTS)}")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
        raise DataError(f"{place}: seconds is {safe_text(seconds, 40)}, not a number from 0 up")
    return Judgement(record["sample"], left, right, verdict, record["annotator"], record["time"], float(seconds))
