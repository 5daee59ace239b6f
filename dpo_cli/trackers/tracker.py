"""What a tracker is and what it is told when it opens; imports of its package wait until then.

A tracker may raise anything at any time: `trackers.py` tells the user once and continues without it.
"""

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dpo_cli.trackers.tables import Cell


@dataclass(frozen=True)
class Start:
    """The run that a tracker records."""

    directory: Path  # the run directory
    name: str
    id: str  # 8 hexadecimal digits, the same when the run resumes
    config: dict[str, Any]  # plain data without secrets
    resumed_at: int | None  # the step of the checkpoint that the run resumes from
    warn: Callable[[str], None]


class Tracker(Protocol):
    """Takes the records of one run."""

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Add the numbers of a step; one step may come twice, as train and as eval metrics."""

    def alarm(self, step: int, name: str, text: str) -> None:
        """Add an alarm in words."""

    def table(self, step: int, name: str, columns: list[str], rows: list[list[Cell]]) -> None:
        """Add a table under its name; texts are escaped and short (`shown_cell`), and may have several lines."""

    def finish(self, step: int, summary: dict[str, Any]) -> None:
        """Add what the run ended with, as plain data; `step` is the last one recorded."""

    def close(self) -> None:
        """Release files and processes: the last call, after `finish` or after any call that raised."""


def verdict_of(summary: Mapping[str, Any]) -> dict[str, str]:
    """The verdict in a summary as flat texts: color, summary, and each finding with its reason and next step."""
    verdict = summary.get("verdict")
    if not isinstance(verdict, Mapping):
        return {}
    findings = {
        f"verdict/findings/{one['name']}": f"{one['color']}: {one['reason']}. Next: {one['next_step']}"
        for one in verdict["findings"]
    }
    return {"verdict/color": verdict["color"], "verdict/summary": verdict["summary"], **findings}


def as_markdown(summary: Mapping[str, Any]) -> str:
    """A list with a line for each key, and for each part of the verdict, for trackers that show text."""
    flat = verdict_of(summary)
    shown = flat | {key: value for key, value in summary.items() if key != "verdict" or not flat}
    return "\n".join(
        f"- **{key}**: {value if isinstance(value, str) else json.dumps(value)}" for key, value in shown.items()
    )


def reachable(url: str, seconds: float = 3.0) -> bool:
    """Whether a server answers anything at all within `seconds`, directly or through the proxy of the environment."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=seconds).close()
        except urllib.error.HTTPError as error:
            error.close()
        except (OSError, ValueError):
            return
        answers.append(True)

    # In a thread, because the lookup of a name has no time limit of its own.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    return bool(answers)
