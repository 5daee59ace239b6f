"""A report of dpo-eval as it is compared: report.json with the pairs.jsonl beside it, read as untrusted data.

Nothing here loads a model or imports torch.
"""

import errno
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_cli.console.text import plural, safe_text
from dpo_cli.errors import CheckpointError, DataError

TOKENS = ("prompt_tokens", "chosen_tokens", "rejected_tokens")
LARGEST = 3.4e38  # of float32, in which scores are computed: a larger number is damage
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Evaluated:
    """One report: its facts, and its pairs by key, with an array of values for each."""

    name: str
    path: Path  # of report.json
    facts: dict[str, Any]
    indices: dict[tuple[Any, ...], int]  # a pair's key, soft label and tokens -> its index
    prompts: NDArray[np.uint64]  # (pairs,)
    accuracy: Floats  # (pairs,) 1 where the pair is ranked right, 0.5 for a tie
    margin: Floats  # (pairs,)
    loss: Floats | None  # (pairs,); None where a report of an earlier version has none
    reference: Floats | None  # (pairs, 2) log-probs of the reference; None of a reward model
    run: Path | None  # the run's directory, where it is known

    @property
    def beta(self) -> float:
        """The factor between a log-ratio and a reward."""
        return float(self.facts["beta"])

    @property
    def has_reference(self) -> bool:
        """Whether it was compared with a reference; a reward model has none."""
        return self.facts["reference"] is not None

    @property
    def loss_used(self) -> tuple[Any, ...]:
        """What losses must have in common to be compared."""
        return self.facts["loss_name"], self.beta, str(self.facts.get("loss_options"))

    def values(self, metric: str, nats: bool) -> Floats | None:
        """A metric of each pair, (pairs,); `nats`: margins divided by beta."""
        found: Floats | None = getattr(self, metric)
        return found / self.beta if metric == "margin" and nats and found is not None else found


def read_report(path: Path, name: str, run: Path | None = None) -> Evaluated:
    """A report.json and the pairs.jsonl beside it.

    CheckpointError for a file that is no report of dpo-eval, DataError for the line of a damaged pairs.jsonl.
    """
    facts = _facts(path)
    lines = path.with_name("pairs.jsonl")
    shown = safe_text(lines)
    try:
        texts = _content(lines).splitlines()
    except OSError as error:
        raise CheckpointError(f"{shown}: cannot be read ({error.strerror}); a report has it beside it") from None
    rows = [_row(text, f"{shown} line {number}") for number, text in enumerate(texts, start=1)]
    if len(rows) != facts["pairs"] or not rows:
        raise DataError(f"{shown}: has {plural(len(rows), 'line')}, and report.json counts {facts['pairs']:,} pairs")
    indices, times = dict[tuple[Any, ...], int](), Counter[tuple[Any, ...]]()
    for index, row in enumerate(rows):
        indices[(*row.key, times[row.key])] = index  # the same pair may be there again
        times[row.key] += 1
    columns = np.array([row.values for row in rows], dtype=float)
    right, label = (columns[:, 0] > 0) + 0.5 * (columns[:, 0] == 0), columns[:, 4]
    known = (np.abs(columns) <= LARGEST).all(axis=0)
    return Evaluated(
        name, path, facts, indices, np.array([row.prompt for row in rows], dtype=np.uint64),
        label * right + (1 - label) * (1 - right), columns[:, 0], columns[:, 1] if known[1] else None,
        columns[:, 2:4] if known[2] and known[3] else None, run,
    )  # fmt: skip


def _content(path: Path) -> bytes:
    """The bytes of a file; OSError where it is none: a pipe has no end."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a file")
    return path.read_bytes()


def _facts(path: Path) -> dict[str, Any]:
    shown = safe_text(path)
    no_report = f"{shown}: is not a report of this version of dpo-eval; evaluate again"
    try:
        found = json.loads(_content(path))
    except OSError as error:
        raise CheckpointError(f"{shown}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise CheckpointError(no_report) from None
    if not isinstance(found, dict):
        raise CheckpointError(no_report)
    beta, reference = found.get("beta"), found.get("reference", 0)
    intervals = found.get("intervals95", {})
    holds = (
        type(found.get("pairs")) is int
        and isinstance(found.get("loss_name"), str)
        and isinstance(found.get("checkpoint"), str)
        and (reference is None or isinstance(reference, str))
        and type(beta) in (int, float)
        and 1 / LARGEST <= (beta or 0) <= LARGEST
        and isinstance(intervals, dict)
        and all(isinstance(ends, list) and len(ends) == 2 for ends in intervals.values())
        and isinstance(found.get("data", {}), dict)
    )
    if not holds:
        raise CheckpointError(no_report)
    return found


@dataclass(frozen=True)
class _Row:
    """A line of pairs.jsonl; `values` are margin, loss, both log-probs of the reference, and the soft label."""

    key: tuple[Any, ...]
    prompt: int
    values: tuple[float, ...]


def _row(line: bytes, shown: str) -> _Row:
    """A line of pairs.jsonl; NaN for a value that it lacks. DataError names the line and what is wrong."""
    try:
        found = json.loads(line)
        key = (found["key"], float(found.get("probability", 1)), *(int(found[name]) for name in TOKENS))
        row = _Row(key, int(found["prompt"], 16), (
            _number(found["margin"]),
            _number(found.get("loss", math.nan)),
            _number(found.get("reference_logps_chosen", math.nan)),
            _number(found.get("reference_logps_rejected", math.nan)),
            float(found.get("probability", 1)),
        ))  # fmt: skip
        hash(row.key)
        if not (0 <= row.values[4] <= 1 and 0 <= row.prompt < 2**64):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        raise DataError(f"{shown}: is not a line of pairs.jsonl; evaluate again") from None
    if not abs(row.values[0]) <= LARGEST:
        raise DataError(f"{shown}: the margin is not finite, so nothing can be compared: the weights are damaged, or "
                        "their dtype is too narrow")  # fmt: skip
    return row


def _number(value: Any) -> float:
    """A number; null is one that was not finite."""
    return math.inf if value is None else float(value)


def sampled_metric(facts: dict[str, Any], run: Path | None, name: str) -> list[float | None] | None:
    """A metric of generated answers with its interval: of the report, else of the run when it saved these weights."""
    records = [facts]
    if name not in facts and run is not None:
        records = [line for line in _evaluations(run) if line.get("step") == _step(facts["checkpoint"], run)][-1:]
    for record in records:
        if (mean := _finite(record.get(name))) is not None:
            ends = (record.get("intervals95") or {}).get(name) or (None, None)
            return [mean, *map(_finite, ends)]
    return None


def _finite(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and abs(value) <= LARGEST else None


def _evaluations(run: Path) -> list[dict[str, Any]]:
    """The held-out lines of a run's metrics.jsonl, as far as they can be read."""
    try:
        lines = [json.loads(line) for line in _content(run / "metrics.jsonl").splitlines()]
    except (OSError, ValueError, RecursionError):
        return []
    return [line for line in lines if isinstance(line, dict) and line.get("split") == "eval"]


def _step(checkpoint: str, run: Path) -> Any:
    """The step that saved weights: in a checkpoint's name; of `final/` in the manifest, else the last evaluated."""
    number = Path(checkpoint).name.removeprefix("step-")
    if number.isdigit():
        return int(number)
    try:
        return json.loads(_content(run / "manifest.json"))["final"]["step"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return next((line.get("step") for line in reversed(_evaluations(run))), None)
