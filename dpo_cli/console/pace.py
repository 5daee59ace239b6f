"""How many seconds the rest of a job takes, from the units it has done so far."""

import time
from collections.abc import Callable

# Starts a progress bar of so many units of what is counted; what it returns counts more of them as done.
StartBar = Callable[[str, int], Callable[[int], None]]


class Pace:
    """Units done of a total, and the time that the rest takes.

    The first advance is left out of the mean: it also compiles, allocates and warms up.
    """

    def __init__(self, total: int, done: int = 0) -> None:
        self.total, self.done = total, done
        self._first: tuple[float, int] | None = None  # when the first advance ended, and what was done by then
        self._last = 0.0

    def advance(self, units: int) -> None:
        """Count `units` more as done."""
        self.done += units
        self._last = time.monotonic()
        if self._first is None:
            self._first = self._last, self.done

    @property
    def rate(self) -> float | None:
        """Units a second, the mean since the first advance; None before the second."""
        if self._first is None or self.done == self._first[1] or self._last <= self._first[0]:
            return None
        return (self.done - self._first[1]) / (self._last - self._first[0])

    @property
    def left(self) -> float | None:
        """Seconds until the total is done, at the mean pace since the first advance; None before the second."""
        if self._first is None or self.done == self._first[1]:
            return None
        seconds = (self._last - self._first[0]) / (self.done - self._first[1])
        return max(0.0, seconds * (self.total - self.done) - (time.monotonic() - self._last))
