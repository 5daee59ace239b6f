"""What a tracker is and what it is told when it opens; imports of its package wait until then.

A tracker may raise anything at any time: `trackers.py` tells the user once and continues without it.
"""

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


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

    def finish(self, step: int, summary: dict[str, Any]) -> None:
        """Add what the run ended with, as plain data; `step` is the last one recorded."""

    def close(self) -> None:
        """Release files and processes: the last call, after `finish` or after any call that raised."""


def as_markdown(summary: dict[str, Any]) -> str:
    """A list with a line for each key, for trackers that show text."""
    return "\n".join(
        f"- **{key}**: {value if isinstance(value, str) else json.dumps(value)}" for key, value in summary.items()
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
