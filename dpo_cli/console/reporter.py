"""The live console: a view of metrics.jsonl.

On a terminal it is a live table with a sparkline and a progress bar; elsewhere one plain line a record. A closed
terminal or pipe, or a full disk, never stops a run.
"""

import os
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from dpo_cli.console.pace import Pace
from dpo_cli.console.text import duration, redacted, safe_text, significant

ROWS_SHOWN = 10
SPARKS = "▁▂▃▄▅▆▇█"
ASCII_SPARKS = "_.-=+*#@"

# The columns of a record: heading, key, significant digits.
COLUMNS = (
    ("loss", "loss", 3),
    ("margin", "rewards/margins", 3),
    ("accuracy", "rewards/accuracies", 3),
    ("chosen", "rewards/chosen", 3),
    ("rejected", "rewards/rejected", 3),
    ("lr", "lr", 2),
    ("pairs/s", "pairs_per_second", 3),
    ("GiB", "peak_memory_gib", 3),
)


class _SafeStream:
    """A stream that stops writing instead of raising: a closed pipe or a full disk must not stop training."""

    def __init__(self, stream: TextIO, retry: bool = False) -> None:
        self._stream = stream
        self._retry = retry  # a full disk may have room later; a closed pipe stays closed
        self.encoding = getattr(stream, "encoding", None) or "utf-8"
        self.alive = True

    def write(self, text: str) -> int:
        if self.alive:
            try:
                self._stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
            except (OSError, ValueError):
                self.alive = self._retry
        return len(text)

    def flush(self) -> None:
        if self.alive:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self.alive = self._retry

    def close(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.close()

    def isatty(self) -> bool:
        try:
            return self.alive and self._stream.isatty()
        except (OSError, ValueError):
            return False

    def fileno(self) -> int:
        return self._stream.fileno()


def silence_closed_stdout() -> None:
    """Redirect a broken standard output to os.devnull, so that the flush at exit does not fail."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def sparkline(values: list[float], width: int, marks: str = SPARKS) -> str:
    """The values as a row of at most `width` bars, each the mean of its bucket."""
    finite = [value for value in values if value == value and abs(value) != float("inf")]
    if not finite:
        return ""
    buckets = min(width, len(finite))
    edges = [len(finite) * index // buckets for index in range(buckets + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    span = high - low or 1.0
    return "".join(marks[min(len(marks) - 1, int((mean - low) / span * len(marks)))] for mean in means)


def drift_lines(record: dict[str, Any]) -> list[str]:
    """The distribution of the gradient weight, and how far the policy has moved, from a record of a train step."""
    over, under = (100 * record[f"gradient_weight/{name}"] for name in ("over_0.9", "under_0.1"))
    chosen, rejected = (record[f"drift/{side}_per_token"] for side in ("chosen", "rejected"))
    weight = significant(record["gradient_weight"], 2)
    return [
        f"grad weight {weight}; over 0.9 for {over:.0f}% of pairs, under 0.1 for {under:.0f}%",
        f"log-ratio to the reference: chosen {chosen:+.3f}, rejected {rejected:+.3f} nats a token",
    ]


class _EtaColumn(ProgressColumn):
    """Rate and time left by the task's `Pace`: rich's own estimate needs several steps within 30 seconds."""

    def render(self, task: Task) -> Text:
        pace = task.fields["pace"]
        return Text("ETA -" if pace.left is None else f"{rate_text(pace)} ETA {duration(pace.left)}".strip())


def rate_text(pace: Pace) -> str:
    """Units a second: `3,204/s`, `0.21/s`; empty where it is not known."""
    if pace.rate is None:
        return ""
    return f"{pace.rate:,.0f}/s" if pace.rate >= 100 else f"{significant(pace.rate)}/s"


class Reporter:
    """Everything a command shows, also written as plain text to train.log once `open_log` was called."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = _SafeStream(stream or sys.stdout)
        self.console = Console(
            file=self._stream,  # type: ignore[arg-type]
            highlight=False,
            markup=False,
            emoji=False,
            soft_wrap=not self._stream.isatty(),
            # None lets rich decide by TERM: a dumb terminal has no cursor to move.
            force_terminal=None if self._stream.isatty() else False,
            # A width of 0 would show nothing.
            _environ={name: value for name, value in os.environ.items() if (name, value) != ("COLUMNS", "0")},
        )
        self._log: Any = None
        self._live: Live | None = None
        self._progress: Progress | None = None
        self._rows: deque[dict[str, Any]] = deque(maxlen=ROWS_SHOWN)
        self._margins: list[float] = []
        self._pace = Pace(0)
        self._unit = "step"
        self._last_plain = 0.0

    def open_log(self, path: Path) -> None:
        """Write every further line to `path` too."""
        with suppress(OSError):  # a run without its log is better than none
            self._log = _SafeStream(path.open("a", encoding="utf-8", errors="backslashreplace"), retry=True)

    def close(self) -> None:
        """End the live view, with its last state on screen."""
        self.stop()
        if self._log is not None:
            self._log.close()
            self._log = None

    # Lines

    def say(self, text: str = "", style: str | None = None) -> None:
        """Show one line; untrusted text in it is escaped by `safe_text`."""
        text = safe_text(text)
        self._write_log(text)
        self.console.print(Text(text, style=style or ""))

    def doing(self, what: str) -> None:
        """Say what is being done before the first result can be shown."""
        self.say(f"{what} ...", style="dim")

    def warn(self, text: str) -> None:
        """Show a warning: yellow, on standard output and in the log."""
        self.say(f"warning: {text}", style="yellow")

    def facts(self, rows: list[tuple[str, str]]) -> None:
        """Show aligned lines with labels; an empty label continues the one above."""
        rows = [(label, safe_text(text)) for label, text in rows]
        width = max(len(label) for label, _ in rows)
        for label, text in rows:
            self._write_log(f"{label:<{width}}  {text}")
        if not self.console.is_terminal:
            for label, text in rows:
                self.console.print(Text(f"{label:<{width}}  {text}"))
            return
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for label, text in rows:
            grid.add_row(Text(label), Text(text))
        self.console.print(grid)

    def pair(self, prompt: str, chosen: str, rejected: str, end: str) -> None:
        """Show a decoded pair with its boundaries: the end of the prompt, and the closing token of each response."""
        shown = Text()
        shown.append(safe_text(prompt), style="dim")
        for label, text in (("chosen", chosen), ("rejected", rejected)):
            shown.append(f"\n{label:>8} | ", style="bold")
            body, closed = (text.removesuffix(end), end) if end and text.endswith(end) else (text, "")
            shown.append(safe_text(body))
            shown.append(safe_text(closed), style="bold cyan")
            if not closed:
                shown.append(" (cut)", style="yellow")
        self._write_log(shown.plain)
        self.console.print(shown)

    def grid(self, headings: list[str], rows: list[list[str]], left: int = 1) -> None:
        """Show a small table; the first `left` columns are aligned left, the others right."""
        rows = [[safe_text(cell) for cell in row] for row in rows]
        table = Table(box=None, pad_edge=False, header_style="dim")
        for index, heading in enumerate(headings):
            table.add_column(Text(heading), justify="left" if index < left else "right", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        self.console.print(table)
        for row in [headings, *rows]:
            self._write_log("  ".join(row))

    def side_by_side(self, headings: list[str], rows: list[list[str]]) -> None:
        """Show long texts side by side, or one below the other off a terminal."""
        rows = [[safe_text(cell) for cell in row] for row in rows]
        for row in rows:
            self._write_log("\n".join(f"{heading}: {cell}" for heading, cell in zip(headings, row, strict=True)))
        if not self.console.is_terminal:
            for row in rows:
                for heading, cell in zip(headings, row, strict=True):
                    self.console.print(Text(f"{heading}: {cell}"))
                self.console.print()
            return
        table = Table(header_style="dim", show_lines=True, expand=True)
        for index, heading in enumerate(headings):
            table.add_column(Text(heading), ratio=2 if index else 1, overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        self.console.print(table)

    # Progress

    def start(self, what: str, total: int, done: int = 0) -> None:
        """Start a progress view of `total` units (`step`, `pair`), `done` of which are done."""
        self.stop()
        self._unit, self._pace = what, Pace(total, done)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            _EtaColumn(),
            console=self.console,
            expand=True,
        )
        self._progress.add_task(what, total=total, completed=done, pace=self._pace)
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self._live = Live(self._frame(), console=self.console, refresh_per_second=4, transient=False)
            self._live.start()

    def advance(self, units: int = 1) -> None:
        """Count `units` more as done."""
        if self._progress is not None:
            self._pace.advance(units)
            self._progress.advance(self._progress.task_ids[0], units)
            self._refresh()
            # Evaluations log no record: off a terminal a line every half minute shows their progress.
            if self._live is None and self._unit != "step" and time.monotonic() - self._last_plain > 30:
                self._last_plain = time.monotonic()
                left = f", {rate_text(self._pace)}, about {duration(self._pace.left)} left" if self._pace.left else ""
                self.say(f"{self._unit} {self._pace.done}/{self._pace.total}{left}")

    def bar(self, what: str, total: int) -> Callable[[int], None]:
        """Start a progress view; returns what advances it."""
        self.start(what, total)
        return self.advance

    def working(self, what: str, total: int) -> Callable[[int], None]:
        """A function that counts work between two steps: a second bar, or off a terminal a line every half minute."""
        pace, last, bars = Pace(total), time.monotonic(), self._progress
        bar = bars.add_task(what, total=total, pace=pace) if bars is not None else None

        def advance(units: int) -> None:
            nonlocal last
            pace.advance(units)
            if bars is not None and bar is not None:
                bars.update(bar, completed=pace.done, visible=pace.done < total)
                self._refresh()
            if self._live is None and pace.done < total and time.monotonic() - last > 30:
                last = time.monotonic()
                self.say(f"{what} {pace.done}/{total}")

        return advance

    def record(self, record: dict[str, Any]) -> None:
        """Show one line of metrics.jsonl."""
        self._rows.append(record)
        if record["split"] == "train" and record["step"] > 0:
            self._margins.append(record["rewards/margins"])
        line = self._plain_line(record)
        self._write_log(line)
        if self._live is None:
            self.console.print(Text(line))
        self._refresh()

    def stop(self) -> None:
        """End the progress view."""
        if self._live is not None:
            self._live.update(self._frame())
            self._live.stop()
            self._live = None
        self._progress = None
        self._rows.clear()
        self._margins = []

    def _plain_line(self, record: dict[str, Any]) -> str:
        split = "eval " if record["split"] == "eval" else ""
        cells = [
            f"{heading} {significant(record[key], digits)}"
            for heading, key, digits in COLUMNS
            if record.get(key) is not None
        ]
        if "gradient_weight" in record:
            cells.append(f"grad weight {significant(record['gradient_weight'])}")
        if not split and self._pace.left:
            cells.append(f"ETA {duration(self._pace.left)}")
        return f"{split}step {record['step']}/{self._pace.total}  " + "  ".join(cells)

    def _frame(self) -> RenderableType:
        parts: list[RenderableType] = []
        if self._rows:
            table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1))
            table.add_column("step", justify="right")
            for heading, _, _ in COLUMNS:
                table.add_column(heading, justify="right", no_wrap=True)
            for row in self._rows:
                cells = [
                    significant(row[key], digits) if row.get(key) is not None else "" for _, key, digits in COLUMNS
                ]
                held_out = row["split"] == "eval"
                table.add_row(
                    f"eval {row['step']}" if held_out else str(row["step"]),
                    *cells,
                    style="cyan" if held_out else "",
                )
            parts.append(table)
        if len(self._margins) > 1:
            marks = ASCII_SPARKS if self.console.options.ascii_only else SPARKS
            line = sparkline(self._margins, width=max(8, self.console.width - 24), marks=marks)
            parts.append(Text(f"margin {line} {significant(self._margins[-1])}", no_wrap=True, overflow="crop"))
        watched = [row for row in self._rows if "drift/case" in row]
        if watched:
            lines = drift_lines(watched[-1])
            parts += [Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in lines]
        if self._progress is not None:
            parts.append(self._progress)
        return Group(*parts)

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(self._frame())

    def _write_log(self, text: str) -> None:
        if self._log is not None:
            self._log.write(redacted(text) + "\n")
            self._log.flush()
