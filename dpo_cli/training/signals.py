"""Signals: the first asks the run to stop at the next safe place, a second Ctrl-C leaves at once."""

import os
import signal
from collections.abc import Callable
from types import FrameType, TracebackType

from dpo_cli.errors import InterruptedByUserError, StoppedError


class StopSignals:
    """While entered, SIGTERM, SIGUSR1 and Ctrl-C are noted; `poll` raises where it is safe to stop."""

    WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._received: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        for number in self.WATCHED:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._received == signal.SIGINT:
            os._exit(130)  # the last checkpoint is intact: it was renamed into place
        if self._received is None:
            self._received = number
            self._say(f"{signal.Signals(number).name} received: stopping at the next safe place")

    def poll(self) -> None:
        """StoppedError (75) or InterruptedByUserError (130) if a signal has come."""
        if self._received == signal.SIGINT:
            raise InterruptedByUserError("stopped by Ctrl-C")
        if self._received is not None:
            raise StoppedError(f"stopped by {signal.Signals(self._received).name}")
