"""The trackers of a run behind one object: names come from metrics.jsonl, and no tracker can stop a run.

Train metrics keep their names (`loss`), eval metrics of the same step go under `eval/` (`eval/loss`). Only the main
process opens trackers.
"""

import importlib.util
import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dpo_cli.console.text import first_line, safe_text
from dpo_cli.errors import ConfigError
from dpo_cli.storage.durable import write_whole
from dpo_cli.trackers.tables import Cell, shown_cell
from dpo_cli.trackers.tensorboard import TensorBoard
from dpo_cli.trackers.tracker import Start, Tracker
from dpo_cli.trackers.trackio import Trackio
from dpo_cli.trackers.wandb import WeightsAndBiases

TRACKERS: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "trackio": Trackio}
NOT_METRICS = {"step", "split"}


def check_installed(names: list[str]) -> None:
    """ConfigError for the first tracker that does not exist or whose package is not installed; imports nothing."""
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"tracker={safe_text(name)}: no such tracker; there are {', '.join(TRACKERS)}")
        package = TRACKERS[name].package
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:  # a mere folder of that name, such as the wandb/ of earlier runs
            raise ConfigError(
                f"tracker={name}: the package {package} is not installed; pip install 'dpo-cli[{package}]'"
            )


def metrics_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl by the names that trackers show."""
    prefix = "eval/" if record["split"] == "eval" else ""
    return {
        f"{prefix}{name}": float(value)
        for name, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in NOT_METRICS
    }


class Trackers:
    """The open trackers; one that fails gets one warning and is not called again."""

    def __init__(self, warn: Callable[[str], None], last_step: int = 0) -> None:
        self._open: dict[str, Tracker] = {}
        self._warn = warn
        self._last_step = last_step

    def open(self, name: str, options: Mapping[str, Any], start: Start) -> None:
        """Open a tracker and keep it, where that succeeds."""
        with self._guarded(name):
            self._open[name] = TRACKERS[name](options, start)

    def record(self, record: Mapping[str, Any]) -> None:
        """Pass on one line of metrics.jsonl as it is, with the alarms in it."""
        step, metrics = record["step"], metrics_of(record)
        self._last_step = max(self._last_step, step)
        self._each(lambda tracker: tracker.record(step, metrics))
        for name, text in record.get("alarms", {}).items():
            self.alarm(step, name, text)

    def alarm(self, step: int, name: str, text: str) -> None:
        """Pass on one alarm."""
        self._each(lambda tracker: tracker.alarm(step, name, text))

    def table(self, step: int, name: str, columns: list[str], rows: list[list[Cell]]) -> None:
        """Pass on one table under its name: a column a name, a row a list of as many cells."""
        shown = [[shown_cell(cell) for cell in row] for row in rows]
        self._each(lambda tracker: tracker.table(step, name, columns, shown))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Pass on what the run ended with and close; `summary["status"]` is finished, stopped or failed.

        It may wait half a minute for a server: what the run itself has to save comes before.
        """
        plain = json.loads(json.dumps(dict(summary), default=str))
        self._each(lambda tracker: tracker.finish(self._last_step, plain))
        for name in list(self._open):
            self._close(name)

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            with self._guarded(name):
                call(tracker)

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:  # whatever a library raises: the run is worth more
            self._warn(f"tracker={name}: failed and is off ({safe_text(first_line(error), limit=300)})")
            self._close(name)

    def _close(self, name: str) -> None:
        tracker = self._open.pop(name, None)
        if tracker is not None:
            with suppress(Exception, SystemExit):  # wandb exits with the code of its own process
                tracker.close()


def open_trackers(
    options: Mapping[str, Mapping[str, Any]],
    directory: Path,
    run_name: str,
    config: dict[str, Any],
    resumed_at: int | None,
    warn: Callable[[str], None],
) -> Trackers:
    """Open every tracker that `options` names; {} opens none and writes nothing.

    `resumed_at` is the step of the checkpoint that the run resumes from: its trackers continue too. `config` is plain
    data whose secrets are redacted.
    """
    trackers = Trackers(warn, resumed_at or 0)
    if options:
        run_id, name = _identity(directory / "trackers.json", run_name, resumed_at is not None, warn)
        start = Start(directory.resolve(), name, run_id, config, resumed_at, warn)
        for tracker, its_options in options.items():
            trackers.open(tracker, its_options, start)
    return trackers


def _identity(path: Path, run_name: str, resumed: bool, warn: Callable[[str], None]) -> tuple[str, str]:
    """The id and name by which trackers know the run: those of trackers.json where it resumes, else new ones."""
    if resumed and path.is_file():
        try:
            stored = json.loads(path.read_bytes())
            if re.fullmatch("[0-9a-f]{8}", stored["id"]) and isinstance(stored["name"], str):
                return stored["id"], stored["name"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass
        warn(f"{safe_text(path)}: cannot be read; the trackers start a new run")
    run_id = uuid.uuid4().hex[:8]
    try:
        write_whole(path, json.dumps({"id": run_id, "name": run_name}).encode() + b"\n")
    except OSError as error:
        warn(f"{safe_text(path)}: cannot be written ({error.strerror}); a resumed run starts new ones in its trackers")
    return run_id, run_name
