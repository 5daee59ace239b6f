"""A sweep of dpo-train: one run after the other, and a table of how they ended."""

import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_cli.config.schema import RunConfig
from dpo_cli.console.reporter import Reporter
from dpo_cli.console.text import plural, safe_text, significant

STOPPED = (75, 130)  # exit codes of a user who wants no further run


@dataclass(frozen=True)
class Job:
    """One run of a sweep: its words, which of them differ from run to run, and what they compose to."""

    words: tuple[str, ...]
    swept: dict[str, str]
    config: RunConfig
    name: str


@dataclass(frozen=True)
class Result:
    """How a run ended; what a run that failed did not come to is None."""

    job: Job
    code: int
    directory: Path | None
    evaluation: dict[str, Any]  # the last held-out line of metrics.jsonl
    manifest: dict[str, Any]

    @property
    def accuracy(self) -> float | None:
        """Held-out accuracy."""
        return self.evaluation.get("rewards/accuracies")

    @property
    def margin(self) -> float | None:
        """Held-out reward margin; it grows with beta."""
        return self.evaluation.get("rewards/margins")

    @property
    def verdict(self) -> str:
        """The verdict's color, or the exit code of a run that failed."""
        verdict = self.manifest.get("verdict")
        color = verdict.get("color") if isinstance(verdict, dict) else None
        return f"exit {self.code}" if self.code else str(color or "")


def run_sweep(jobs: Sequence[Job], flags: Sequence[str], reporter: Reporter) -> int:
    """Run every job in a process of its own, then show the table; returns the first exit code that is not 0.

    Its own process gives a run's memory back, and keeps its failure to itself.
    """
    results: list[Result] = []
    for number, job in enumerate(jobs, start=1):
        with suppress(OSError, ValueError):  # a reader that closes the pipe does not stop the runs
            print(f"run {number}/{len(jobs)}: dpo-train {safe_text(' '.join(job.words))}", flush=True)
        before = _directories(job)
        command = [sys.executable, "-c", "from dpo_cli.cli import train; train()", *flags, *job.words]
        code = subprocess.run(command, check=False).returncode
        results.append(_result(job, code, _directories(job) - before, [*flags, *job.words]))
        if code in STOPPED:
            break
    if any(result.directory is not None for result in results):
        show_table(results, reporter)
    return next((result.code for result in results if result.code in STOPPED), 0) or next(
        (result.code for result in results if result.code), 0
    )


def _directories(job: Job) -> set[Path]:
    return set((Path("outputs") / job.name).glob("*"))


def _result(job: Job, code: int, new: set[Path], words: list[str]) -> Result:
    """What a run left behind: of the new directories the one with its words, or the only one where it failed early."""
    manifests = {path: _json(path / "manifest.json") for path in sorted(new)}
    own = [path for path, manifest in manifests.items() if manifest.get("argv") == words]
    directory = own[0] if own else next(iter(new)) if len(new) == 1 else None
    evaluations: list[dict[str, Any]] = []
    if directory is not None:
        with suppress(OSError, ValueError):
            lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            evaluations = [line for line in map(json.loads, lines) if line.get("split") == "eval"]
    return Result(
        job, code, directory, evaluations[-1] if evaluations else {}, manifests.get(directory, {}) if directory else {}
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def show_table(results: Sequence[Result], reporter: Reporter) -> None:
    """A line a run: what differs, how it ended; the best by held-out accuracy is marked."""
    swept = [*results[0].job.swept]
    one_beta = len({result.job.config.beta for result in results}) == 1
    whole = [result for result in results if not result.code and result.accuracy is not None]
    best = _best(whole)
    rows = []
    for result in results:
        margin = result.margin
        per_beta = None if margin is None else margin / result.job.config.beta
        rows.append(
            [
                *(result.job.swept[key] for key in swept),
                _number(result.evaluation.get("loss")),
                f"{_number(result.accuracy)}{' *' if result in best else '  '}",
                _number(margin),
                *([] if one_beta else [_number(per_beta)]),
                result.verdict,
                str(result.directory or ""),
            ]
        )
    middle = ["loss", "accuracy  ", "margin", *([] if one_beta else ["margin/beta"])]
    rows.insert(0, [*swept, *middle, "verdict", "run"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    reporter.say()
    for row in rows:  # lines rather than a grid: a terminal may break them, a copied directory stays whole
        cells = zip(row, widths, strict=True)
        words = len(swept), len(swept) + len(middle)
        aligned = [
            cell.rjust(width) if words[0] <= index < words[1] else cell.ljust(width)
            for index, (cell, width) in enumerate(cells)
        ]
        reporter.say("  ".join(aligned).rstrip())
    for sentence in notes(whole, best):
        reporter.say(sentence)


def _number(value: float | None) -> str:
    return "" if value is None else significant(value)


def _comparable_loss(results: Sequence[Result]) -> bool:
    return len({(one.job.config.beta, str(one.job.config.loss), one.job.config.objective) for one in results}) == 1


def _best(whole: Sequence[Result]) -> list[Result]:
    """The runs with the highest held-out accuracy; of several, where losses are comparable, that with the lowest."""
    top = max((result.accuracy for result in whole if result.accuracy is not None), default=None)
    best = [result for result in whole if result.accuracy == top]
    if len(best) > 1 and _comparable_loss(whole):
        lowest = min(result.evaluation["loss"] for result in best)
        best = [result for result in best if result.evaluation["loss"] == lowest]
    return best


def notes(whole: Sequence[Result], best: Sequence[Result]) -> list[str]:
    """What the numbers of a sweep can and cannot say, in words."""
    if not best:
        return ["no run has held-out numbers to compare"]
    said = [f"* has the highest held-out accuracy{', shared' if len(best) > 1 else ''}"]
    low, high = best[0].evaluation.get("intervals95", {}).get("rewards/accuracies", (None, None))
    if low is not None and high is not None:
        said[0] += (
            f"; its 95% interval is {low:.2g} to {high:.2g}, over {plural(best[0].evaluation['prompts'], 'prompt')}"
        )
    if not _comparable_loss(whole):
        said.append("loss is comparable only between runs of the same loss and beta")
    if len({result.job.config.beta for result in whole}) > 1:
        said.append("margin is beta times how far the policy moved the pair apart; margin/beta compares runs, in nats")
    return said
