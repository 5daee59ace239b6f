"""Signals: the first stops the run at the next safe point; a second one exits at once, unless that could cut a save."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType

from dpo_cli.errors import InterruptedByUserError, StoppedError


def known_signals(*names: str) -> tuple[signal.Signals, ...]:
    """Those of the signals that this system has: Windows lacks most."""
    return tuple(getattr(signal, name) for name in names if hasattr(signal, name))


@contextmanager
def left_to_this_process() -> Iterator[None]:
    """Within, Ctrl-C, SIGUSR1 and SIGHUP wait, and a process that is started within never gets them.

    A scheduler or a terminal sends them to every process of a job. SIGTERM still ends a process that is started.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, known_signals("SIGINT", "SIGUSR1", "SIGHUP"))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class StopSignals:
    """While entered, SIGTERM, SIGUSR1 and Ctrl-C are noted; `poll` raises where it is safe to stop.

    A safe point may never come: an untrusted chat template can loop for ever. A SIGTERM or Ctrl-C after a first
    signal exits at once, with the exit code of the first one. After `protect_saving` only a second Ctrl-C does.
    """

    WATCHED = known_signals("SIGTERM", "SIGINT", "SIGUSR1")

    def __init__(
        self, say: Callable[[str], None], agree: Callable[[int], int] = lambda number: number, announces: bool = True
    ) -> None:
        self._say = say
        self._agree = agree  # the largest of what all ranks received: they stop at the same step, or wait for ever
        self._announces = announces  # says at once that a signal came; of many ranks one is enough
        self._received: int | None = None
        self._told = False
        self._interrupts = 0
        self._saves = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        for number in self.WATCHED:
            self._previous[number] = signal.signal(number, self._note)
        # A terminal that is closed is no reason to stop: it was only looking on.
        for number in known_signals("SIGHUP"):
            self._previous[number] = signal.signal(number, signal.SIG_IGN)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            # A signal may come again while the process ends: its exit code is decided.
            decided = self._received is not None and number != signal.SIGINT
            signal.signal(number, signal.SIG_IGN if decided else handler)  # type: ignore[arg-type]

    def protect_saving(self) -> None:
        """From here on there is work to save: schedulers repeat SIGTERM, and must not cut the save short."""
        self._saves = True

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        asked_again = self._received is not None and number in (signal.SIGTERM, signal.SIGINT) and not self._saves
        if self._interrupts == 2:
            _leave(InterruptedByUserError.exit_code)
        if asked_again:
            _leave((InterruptedByUserError if self._received == signal.SIGINT else StoppedError).exit_code)
        self._received = self._received or number
        # Not through the console: it may be in the middle of a line.
        if self._announces:
            _write(2, f"{signal.Signals(number).name} received: stopping at the next safe point\n")

    def poll(self) -> None:
        """StoppedError (75) or InterruptedByUserError (130) if a signal has come, to any rank."""
        self._received = self._agree(self._received or 0) or None
        if self._received is not None and not self._told:
            self._told = True
            self._say(f"stopping for {signal.Signals(self._received).name}")
        self.poll_here()

    def poll_here(self) -> None:
        """The same, if one has come to this process, for work that the ranks do not do in step; `poll` must follow."""
        if self._received == signal.SIGINT:
            raise InterruptedByUserError("stopped by Ctrl-C")
        if self._received is not None:
            raise StoppedError(f"stopped by {signal.Signals(self._received).name}")


def _leave(code: int) -> None:
    """Exit at once: the last checkpoint is intact, because it was renamed when it was whole. Show the cursor."""
    if os.isatty(1):
        _write(1, "\x1b[?25h\n")
    os._exit(code)


def _write(descriptor: int, text: str) -> None:
    with suppress(OSError):
        os.write(descriptor, text.encode())
