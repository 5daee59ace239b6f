"""A sweep of dpo-train: one run after the other, and a table of how they ended."""

import hashlib
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_cli.config.schema import RunConfig
from dpo_cli.console.reporter import Reporter
from dpo_cli.console.text import hydra_quoted, plural, safe_text, shell_word, significant
from dpo_cli.errors import ConfigError, InterruptedByUserError, StoppedError, StorageError
from dpo_cli.paths import user_path
from dpo_cli.runs.run_directory import RunDirectory, claim_directory
from dpo_cli.signals import known_signals

STOPPED = (StoppedError.exit_code, InterruptedByUserError.exit_code)  # after such a run no further run starts
LONGEST_NAME = 100  # characters of a run's folder, before a hash


@dataclass(frozen=True)
class Job:
    """One run of a sweep: its words on the command line, the keys that differ from run to run, and its config."""

    words: tuple[str, ...]
    swept: dict[str, str]
    config: RunConfig


@dataclass(frozen=True)
class Result:
    """How a run ended; a run that failed early has no directory, and an empty evaluation or manifest."""

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
        """Held-out reward margin, beta times how far the policy moved the pair apart."""
        return self.evaluation.get("rewards/margins")

    @property
    def verdict(self) -> str:
        """The verdict's color, or the exit code of a run that failed."""
        verdict = self.manifest.get("verdict")
        color = verdict.get("color") if isinstance(verdict, dict) else None
        return f"exit {self.code}" if self.code else str(color or "")


def run_name(swept: Mapping[str, str]) -> str:
    """The folder of a run, named by what differs: `beta-0.1_loss-ipo`.

    Characters that are special in a path or to Hydra are replaced; a name that was changed ends in a hash.
    """
    exact = "_".join(f"{key}-{value}" for key, value in swept.items()) or "run"
    safe = re.sub(r"[^A-Za-z0-9.+_-]+", "-", exact)[:LONGEST_NAME].rstrip(".-")
    return safe if safe == exact else f"{safe}-{hashlib.sha256(exact.encode()).hexdigest()[:8]}"


def check_sweep(jobs: Sequence[Job], folder: str | None) -> None:
    """ConfigError for a mistake that would end a run of the sweep, so that it is said before the first run."""
    names = [run_name(job.swept) for job in jobs]
    for job, name in zip(jobs, names, strict=True):
        config = job.config
        if config.plan:
            raise ConfigError("plan=true: plans one run; leave -m out")
        if config.resume is not None and (config.resume != "auto" or folder is None):
            raise ConfigError(
                f"resume={safe_text(config.resume)}: a sweep resumes with resume=auto and output_dir=FOLDER, its own "
                "folder, for instance output_dir=outputs/multirun/2026-01-31_12-00-00"
            )
        if names.count(name) > 1:
            raise ConfigError(f"{_words(job.swept)}: is twice in the sweep; give every value once")
        if folder is None or config.resume is not None:
            continue
        if RunDirectory(user_path(folder, StorageError, "output_dir") / name).metrics.path.exists():
            raise ConfigError(f"output_dir={safe_text(folder)}: holds {name} already; resume=auto continues it")


def _words(swept: Mapping[str, str]) -> str:
    return safe_text(" ".join(f"{key}={value}" for key, value in swept.items()))


def run_sweep(jobs: Sequence[Job], folder: str | None, flags: Sequence[str], reporter: Reporter) -> int:
    """Run every job in a process of its own, then show the table; returns an exit code.

    It is that of a run that was stopped, else the first that is not 0. A run that is stopped ends the sweep.
    Its own process gives a run's memory back, and keeps its failure to itself. Runs lie in `folder`, or in a new one
    under outputs/multirun.
    """
    place = (
        user_path(folder, StorageError, "output_dir")
        if folder is not None
        else claim_directory("multirun", time.time())
    )
    results: list[Result] = []
    for number, job in enumerate(jobs, start=1):
        with suppress(OSError, ValueError):  # a reader that closes the pipe does not stop the runs
            print(f"run {number}/{len(jobs)}: dpo-train {safe_text(' '.join(job.words))}", flush=True)
        run = place / run_name(job.swept)
        words = [*flags, *job.words, f"output_dir={hydra_quoted(str(run))}"]
        code = run_alone(words)
        results.append(_result(job, code, run))
        if code in STOPPED:
            reporter.say(f"to continue the sweep: the same words and {shell_word('output_dir', place)} resume=auto")
            break
    for empty in (place, place.parent, place.parent.parent) if folder is None else ():
        with suppress(OSError):
            empty.rmdir()
    if any(result.directory is not None for result in results):
        show_table(results, reporter)
    if sum(not result.code and result.accuracy is not None for result in results) > 1:
        reporter.say(f"which is better, with paired intervals: dpo-compare {shlex.quote(str(place))}")
    return next((result.code for result in results if result.code in STOPPED), 0) or next(
        (result.code for result in results if result.code), 0
    )


def run_alone(words: list[str]) -> int:
    """The exit code of a dpo-train with these words, in a process of its own."""
    return wait_for([sys.executable, "-c", "from dpo_cli.cli import train; train()", *words])


def wait_for(command: list[str]) -> int:
    """The exit code of a command. Signals to stop are passed on to it, and it saves before it ends."""
    children: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _: object) -> None:
        for child in children:
            child.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in known_signals("SIGTERM", "SIGUSR1")}
    # A terminal sends Ctrl-C to both, and this process would kill the other one before it has saved.
    previous[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        children.append(subprocess.Popen(command))
        code = children[0].wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return StoppedError.exit_code if code == -signal.SIGTERM else code


def _result(job: Job, code: int, run: Path) -> Result:
    """What a run left behind."""
    if not run.is_dir():
        return Result(job, code, None, {}, {})
    evaluations: list[dict[str, Any]] = []
    with suppress(OSError, ValueError):
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        evaluations = [line for line in map(json.loads, lines) if line.get("split") == "eval"]
    manifest = _json(run / "manifest.json")
    final = manifest.get("final")  # a run may have chosen another step than its last
    chosen = [line for line in evaluations if isinstance(final, dict) and line.get("step") == final.get("step")]
    return Result(job, code, run, (chosen or evaluations or [{}])[-1], manifest)


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
        if margin is not None and not one_beta:
            margin /= result.job.config.beta
        rows.append(
            [
                *(result.job.swept[key] for key in swept),
                _number(result.evaluation.get("loss")),
                f"{_number(result.accuracy)}{' *' if result in best else '  '}",
                _number(margin),
                result.verdict,
                str(result.directory or ""),
            ]
        )
    middle = ["loss", "accuracy  ", "margin" if one_beta else "margin/beta"]  # margins of two betas do not compare
    rows.insert(0, [*swept, *middle, "verdict", "run"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numeric = range(len(swept), len(swept) + len(middle))
    reporter.say()
    for row in rows:  # lines, not a grid: a directory must stay whole where it is copied from a narrow terminal
        cells = enumerate(zip(row, widths, strict=True))
        aligned = [cell.rjust(width) if index in numeric else cell.ljust(width) for index, (cell, width) in cells]
        reporter.say("  ".join(aligned).rstrip())
    for sentence in notes(whole, best):
        reporter.say(sentence)


def _number(value: float | None) -> str:
    return "" if value is None else significant(value)


def _comparable_loss(results: Sequence[Result]) -> bool:
    return len({(one.job.config.beta, str(one.job.config.loss), one.job.config.objective) for one in results}) == 1


def _best(whole: Sequence[Result]) -> list[Result]:
    """The runs with the highest held-out accuracy; of several, the lowest loss where losses compare."""
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
        said.append("margin/beta is how far the policy moved the pair apart, in nats, whatever the beta")
    return said
