"""The screen on which a person compares two answers: a prompt, two answers of unknown origin, one key.

What is shown is a pure function of the question, the size of the terminal and the scroll position; the rest reads keys
and signals. One idea to keep in mind: a key counts only for what was on the screen when it was pressed, and the
terminal is restored however the screen is left.
"""

import errno
import os
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from select import select
from types import FrameType, TracebackType
from typing import Any, NamedTuple

from rich.cells import cell_len, get_character_cell_size, set_cell_size
from rich.console import Console
from rich.segment import Segment
from rich.text import Text

from dpo_cli.console.text import safe_text
from dpo_cli.errors import ConfigError, InterruptedByUserError, StoppedError
from dpo_cli.signals import known_signals

VERDICTS = ("left", "right", "tie", "skip")
MIN_COLUMN = 30  # cells; in narrower columns two answers read better one under the other
ESCAPE_SECONDS = 0.05  # the bytes of one key arrive within this time

ACTIONS = {
    "1": "left", "<left>": "left", "2": "right", "<right>": "right", "t": "tie", "s": "skip",
    "u": "undo", "q": "quit", "\x04": "quit", "?": "help",
    "j": "down", "<down>": "down", "k": "up", "<up>": "up",
    " ": "page down", "<page down>": "page down", "b": "page up", "<page up>": "page up",
    "g": "top", "<home>": "top", "G": "bottom", "<end>": "bottom",
}  # fmt: skip
# What a terminal sends after ESC; the first letter depends on the mode that an earlier program left.
SEQUENCES = {
    "[A": "<up>", "[B": "<down>", "[C": "<right>", "[D": "<left>", "OA": "<up>", "OB": "<down>", "OC": "<right>",
    "OD": "<left>", "[5~": "<page up>", "[6~": "<page down>", "[H": "<home>", "OH": "<home>", "[1~": "<home>",
    "[7~": "<home>", "[F": "<end>", "OF": "<end>", "[4~": "<end>", "[8~": "<end>",
}  # fmt: skip
HELP = (
    ("1, left arrow", "the left answer is better, or the first where they stand one under the other"),
    ("2, right arrow", "the right answer is better, or the second"),
    ("t", "a tie: neither is better"),
    ("s", "skip: no judgement; this question is not asked again"),
    ("u", "undo: remove your latest judgement, and answer that question again"),
    ("q", "quit: all judgements are on disk; to continue, run the same command"),
    ("j, k, arrows", "a line down, up"),
    ("space, b", "a page down, up; also PgDn, PgUp"),
    ("g, G", "the beginning, the end; also Home, End"),
    ("", ""),
    ("", "Which answer is on which side is random for every question."),
    ("", "Any other key returns to the question."),
)


# What is shown


@dataclass(frozen=True)
class Comparison:
    """A question as it is shown: nothing in it tells where an answer came from."""

    prompt: tuple[tuple[str, str], ...]  # speaker and text; no speaker where the prompt is one text
    left: str
    right: str
    number: int  # of `total`, from 1
    total: int
    remaining: int  # this one included
    annotator: str
    notice: str = ""  # what the last key did
    left_cut: bool = False  # finish reason `length`
    right_cut: bool = False


@dataclass(frozen=True)
class Choice:
    """The action of a key (`left`, `right`, `tie`, `skip`, `undo` or `quit`), and the seconds until it."""

    action: str
    seconds: float


class Line(NamedTuple):
    """A line of the screen and its style."""

    text: str
    style: str = ""


@dataclass(frozen=True)
class Page:
    """The content of a screen of one width: a header, rows that may need scrolling, lines below."""

    header: str
    rows: tuple[Line, ...]
    notice: str
    keys: str


@dataclass(frozen=True)
class Glyphs:
    """The characters of lines."""

    beside: str = "│"
    rule: str = "─"


ASCII_GLYPHS = Glyphs("|", "-")


def shown_lines(text: str, encoding: str = "utf-8") -> list[str]:
    """The lines of an untrusted text, each through `safe_text`, in characters that the terminal has."""
    lines = [safe_text(line) for line in re.split("\r?\n", text)]
    return [line.encode(encoding, "backslashreplace").decode(encoding) for line in lines]


def wrapped(line: str, width: int) -> list[str]:
    """The line in rows of at most `width` cells, broken at spaces, or within a word that is longer than a row."""
    rows: list[str] = []
    begin, cells, gap = 0, 0, -1  # of the current row; its last space after a word
    for index, character in enumerate(line):
        size = _cells(character)
        if cells + size > width and index > begin:
            cut = index if character == " " or gap < 0 else gap
            rows.append(line[begin:cut])
            begin, gap = cut + (line[cut] == " "), -1
            cells = sum(map(_cells, line[begin:index]))
            if begin > index:  # the row ended at this very space
                continue
        if character == " " and line[begin:index].strip():
            gap = index
        cells += size
    return [*rows, line[begin:]]


def _cells(character: str) -> int:
    """The cells of a character, or one more: some terminals draw the emoji of U+FE0F two cells wide."""
    return 1 if character == "\ufe0f" else max(0, get_character_cell_size(character))


def _block(text: str, width: int, encoding: str, cut: bool = False) -> list[Line]:
    if not text.strip():
        return [Line("(empty)", "dim")]
    lines = [Line(row) for line in shown_lines(text, encoding) for row in wrapped(line, width)]
    return [*lines, Line("(cut here)", "dim")] if cut else lines


def comparison_page(question: Comparison, width: int, height: int, encoding: str = "utf-8") -> Page:
    """A question for a terminal of that size: answers side by side where both then fit the screen."""
    glyphs = glyphs_of(encoding)
    rows: list[Line] = []
    for speaker, words in question.prompt:
        rows += [Line(safe_text(speaker) or "prompt", "bold"), *_block(words, width, encoding), Line("")]
    column = (width - 3) // 2
    answers = (question.left, question.left_cut), (question.right, question.right_cut)
    sides = [_block(text, column, encoding, cut) for text, cut in answers]
    stacked = column < MIN_COLUMN or max(map(len, sides)) + 1 > room_of(height)
    if stacked:
        for number, name, (text, cut) in zip("12", ("first", "second"), answers, strict=True):
            # The number is beside every line, so that it is visible after scrolling.
            block = _block(text, width - 4, encoding, cut)
            rows += [Line(f"{number} {name}", "bold")]
            rows += [Line(f"{number} {glyphs.beside} {line.text}", line.style) for line in block]
            rows += [Line("")] if number == "1" else []
    else:
        rows.append(Line(set_cell_size("1 left", column) + f" {glyphs.beside} 2 right", "bold"))
        for index in range(max(map(len, sides))):
            left, right = (side[index].text if index < len(side) else "" for side in sides)
            rows.append(Line(f"{set_cell_size(left, column)} {glyphs.beside} {right}"))
    header = f"question {question.number:,} of {question.total:,}, {question.remaining:,} to go"
    name = shown_lines(safe_text(question.annotator, limit=24), encoding)[0]
    gap = width - cell_len(header) - cell_len(name)
    header += " " * gap + name if gap >= 2 else ""
    return Page(header, tuple(rows), question.notice, _keys(stacked, width))


def _keys(stacked: bool, width: int) -> str:
    sides = ("1 first", "2 second") if stacked else ("1 left", "2 right")
    rest = ("t tie", "s skip", "u undo", "q quit", "j/k scroll", "? help")
    for line in ("  ".join([*sides, *rest]), "  ".join([*sides, *rest[:4], rest[-1]])):
        if len(line) <= width:
            return line
    return " ".join([*sides, "t tie", "s skip", "u", "q", "? help"])


def help_page(width: int) -> Page:
    """What the keys do."""
    rows = []
    for keys, words in HELP:
        label = 16 if keys else 0
        first, *more = wrapped(words, max(10, width - label))
        rows += [Line(f"{keys:<{label}}{first}"), *(Line(" " * label + row) for row in more)]
    return Page("keys", tuple(rows), "", "any other key returns")


def end_page(words: str, width: int) -> Page:
    """The page after the last question: the last judgement can still be undone."""
    return Page("done", tuple(Line(row) for row in wrapped(words, width)), "", "u undo  q end")


def glyphs_of(encoding: str) -> Glyphs:
    """Characters of lines that the terminal's encoding has."""
    return Glyphs() if encoding.lower().startswith("utf") else ASCII_GLYPHS


def room_of(height: int) -> int:
    """The number of visible rows of a page: all lines but header, rule, notice and keys."""
    return max(1, height - (4 if height >= 6 else 2))


def last_top(page: Page, height: int) -> int:
    """The number of rows above the visible ones at the end of the page."""
    return max(0, len(page.rows) - room_of(height))


def frame(page: Page, top: int, width: int, height: int, encoding: str = "utf-8") -> list[Line]:
    """The lines of the screen, scrolled by `top` rows; fewer than `height` where the rows do not fill it.

    The last two lines belong at the bottom: the scroll position and the keys.
    """
    room = room_of(height)
    below = len(page.rows) - top - room
    where = " and ".join(word for word, number in (("above", top), ("below", below)) if number > 0)
    last = min(top + room, len(page.rows))
    status = f"more {where}: lines {top + 1:,}-{last:,} of {len(page.rows):,}" if where else ""
    noticed = f"{status}   {page.notice}" if status else page.notice
    status = noticed if len(noticed) <= width else status
    head = [Line(page.header, "bold"), Line(glyphs_of(encoding).rule * width, "dim")] if height >= 6 else []
    foot = [Line(status, "bold"), Line(page.keys, "reverse")]
    lines = [*head, *page.rows[top : top + room], *foot][-height:]
    return [Line(set_cell_size(line.text, width).rstrip(), line.style) for line in lines]


# Keys


class KeyDecoder:
    """Decodes the bytes of a terminal into names of keys, however they are split into reads.

    A lone ESC, a key with Alt and an unknown sequence are ignored, with one key after them at most.
    """

    def __init__(self) -> None:
        self._partial = ""

    def feed(self, data: bytes, late: bool = False) -> list[str]:
        """The complete keys; `late` means that the bytes came so long after the last ones that they are another key."""
        keys = []
        stale = late and len(self._partial) > 1  # the user typed ESC [, or a slow line has split a sequence
        for character in data.decode("latin-1"):
            if self._partial == "\x1b" and character not in "[O\x1b":
                self._partial = ""
                if not late:  # a key with Alt
                    continue
            late = False
            if character == "\x1b":
                self._partial = character
            elif self._partial:
                self._partial += character
                if len(self._partial) > 2 and (self._partial[1] == "O" or not "\x20" <= character <= "\x3f"):
                    key = SEQUENCES.get(self._partial[1:])
                    keys += [key] if key else []
                    self._partial = ""
            else:
                keys.append(character)
        if stale and len(self._partial) > 1:
            self._partial = ""
        return keys


# The terminal


def require_terminal() -> None:
    """ConfigError where standard input or output is not a terminal."""
    if os.name == "nt":
        raise ConfigError("by=human: needs a terminal of Linux or macOS; on Windows run it under WSL")
    for name, stream in (("input", sys.stdin), ("output", sys.stdout)):
        if stream is None or stream.closed or not stream.isatty():
            raise ConfigError(
                f"by=human: standard {name} is not a terminal, which it needs to show answers and read keys; "
                "run it in a terminal, or use by=reward, by=implicit or by=rule"
            )


class CompareScreen:
    """Owns the terminal while entered: `ask` shows a question and waits for the key that answers it.

    Ctrl-C raises InterruptedByUserError, SIGTERM and similar signals StoppedError; a closed terminal means `quit`.
    """

    STOPPING = known_signals("SIGINT", "SIGTERM", "SIGUSR1", "SIGQUIT")
    WATCHED = (*STOPPING, *known_signals("SIGHUP", "SIGTSTP", "SIGCONT", "SIGWINCH"))

    def __init__(self, console: Console) -> None:
        self._console = console
        self._plain = console.is_dumb_terminal or not console.is_terminal
        self._keyboard = sys.stdin.fileno()
        self._decoder = KeyDecoder()
        self._keys: deque[str] = deque()
        self._last_read = 0.0
        self._paused = 0.0  # seconds for which the process was stopped (Ctrl-Z) since the question was shown
        self._closed = False  # the terminal is closed
        self._stopped = False
        self._numbers: set[int] = set()  # signals that arrived and are not handled yet
        self._previous: dict[int, Any] = {}
        self._mode: list[Any] = []

    def __enter__(self) -> "CompareScreen":
        require_terminal()
        import termios

        self._mode = termios.tcgetattr(self._keyboard)
        # Signals arrive as bytes of a pipe, so that one that arrives just before the wait for a key ends the wait.
        self._signals, self._wake = os.pipe()
        for descriptor in (self._signals, self._wake):
            os.set_blocking(descriptor, False)
        self._previous_wake = signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        for number in self.WATCHED:
            if signal.getsignal(number) != signal.SIG_IGN:  # set by nohup, for instance
                self._previous[number] = signal.signal(number, _do_nothing)
        try:
            self._acquire()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._release()
        finally:
            signal.set_wakeup_fd(self._previous_wake)
            for number, handler in self._previous.items():
                # The same signal may come again while the process ends.
                ignored = (self._stopped and number != signal.SIGINT) or (self._closed and number == signal.SIGHUP)
                signal.signal(number, signal.SIG_IGN if ignored else handler or signal.SIG_DFL)
            os.close(self._signals)
            os.close(self._wake)

    def ask(self, question: Comparison) -> Choice:
        """Show the question until a key answers it; keys typed before it was shown do not count."""
        encoding = self._console.encoding
        self._paused, began = 0.0, time.monotonic()
        action = self._read(
            lambda width, height: comparison_page(question, width, height, encoding), {*VERDICTS, "undo", "quit"}
        )
        return Choice(action, max(0.0, time.monotonic() - began - self._paused))

    def end(self, words: str) -> str:
        """After the last question: `undo` or `quit`."""
        return self._read(lambda width, height: end_page(words, width), {"undo", "quit"})

    def _read(self, page_of: Callable[[int, int], Page], answers: set[str]) -> str:
        self._forget_keys()
        top, kept, helping = 0, 0, False
        shown: tuple[object, ...] = ()
        layout: tuple[object, ...] = ()
        while True:
            width, height = self._size()
            if layout != (width, height, helping):
                layout = (width, height, helping)
                page = help_page(width) if helping else page_of(width, height)
            top = max(0, min(top, last_top(page, height)))
            if shown != (layout, top):
                self._draw(frame(page, top, width, height, self._console.encoding), width, height)
                shown = (layout, top)
            action = self._next()
            if self._closed:
                return "quit"
            step = max(1, room_of(height) - 1)  # a page keeps one line of the last
            moves = {"down": 1, "up": -1, "page down": step, "page up": -step, "top": -top, "bottom": len(page.rows)}
            if action in moves:
                top += moves[action]
            elif action == "redraw":
                shown = ()
            elif helping:
                top, helping = kept, False
            elif action == "help":
                kept, top, helping = top, 0, True
            elif action in answers:
                return action

    def _next(self) -> str:
        """The action of the next key, `unknown` for other keys, or `redraw` where the screen has changed."""
        while True:
            action = self._handle_signals()
            if action is not None:
                return action
            if self._closed:
                return "quit"
            if self._keys:
                return ACTIONS.get(self._keys.popleft(), "unknown")
            select([self._keyboard, self._signals], [], [])
            if select([self._keyboard], [], [], 0)[0]:
                self._read_keys()

    def _read_keys(self) -> None:
        try:
            data = os.read(self._keyboard, 4096)
        except BlockingIOError:
            return
        except OSError:  # the terminal is closed
            data = b""
        self._closed = self._closed or not data
        now = time.monotonic()
        self._keys.extend(self._decoder.feed(data, late=now - self._last_read > ESCAPE_SECONDS))
        self._last_read = now

    def _handle_signals(self) -> str | None:
        """Handle the signals that arrived; raises where one means to stop."""
        numbers, self._numbers = self._numbers | self._arrived(), set()
        if not numbers:
            return None
        if signal.SIGINT in numbers:
            raise InterruptedByUserError("stopped by Ctrl-C")
        for number in self.STOPPING:
            if number in numbers:
                self._stopped = True
                raise StoppedError(f"stopped by {number.name}")
        if signal.SIGHUP in numbers:
            self._closed = True
        if signal.SIGTSTP in numbers:
            self._suspend()
        elif signal.SIGCONT in numbers:  # the shell has used the terminal since
            self._acquire()
        return "redraw"

    def _arrived(self) -> set[int]:
        try:
            return set(os.read(self._signals, 4096))
        except BlockingIOError:
            return set()

    def _suspend(self) -> None:
        """Ctrl-Z: release the terminal, stop, and acquire it again when continued."""
        stopped_at = time.monotonic()
        self._release()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, _do_nothing)
        self._acquire()
        self._paused += time.monotonic() - stopped_at

    def _acquire(self) -> None:
        """Read keys singly and without echo, and switch to the alternate screen."""
        import termios

        while True:
            try:
                mode = termios.tcgetattr(self._keyboard)
                mode[3] &= ~(termios.ECHO | termios.ICANON)
                mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
                termios.tcsetattr(self._keyboard, termios.TCSANOW, mode)
                break
            except termios.error as error:
                if error.args[0] != errno.EINTR:  # the terminal is closed
                    self._closed = True
                    return
            # In the background the call above stops the process until a signal: SIGCONT, or one that means to stop.
            self._numbers |= self._arrived()
            if self._numbers.intersection(self.STOPPING):
                return
        if not self._plain:
            self._console.set_alt_screen(True)
            self._console.show_cursor(False)

    def _release(self) -> None:
        """Restore screen and mode; unread keys are dropped, so that the shell does not get them."""
        import termios

        if self._console.is_alt_screen:
            self._console.show_cursor(True)
            self._console.set_alt_screen(False)
        with suppress(OSError):
            if os.tcgetpgrp(self._keyboard) != os.getpgrp():  # in the background the terminal belongs to the shell
                return
        self._forget_keys()
        with suppress(termios.error):  # the terminal may be closed
            termios.tcsetattr(self._keyboard, termios.TCSANOW, self._mode)

    def _forget_keys(self) -> None:
        import termios

        self._decoder = KeyDecoder()
        self._keys.clear()
        with suppress(termios.error):
            termios.tcflush(self._keyboard, termios.TCIFLUSH)

    def _size(self) -> tuple[int, int]:
        """Columns and lines of the terminal now; COLUMNS may be out of date."""
        try:
            width, height = os.get_terminal_size(self._console.file.fileno())
        except (OSError, ValueError):
            width, height = 0, 0
        return max(20, width or 80), max(3, height or 24)

    def _draw(self, lines: list[Line], width: int, height: int) -> None:
        if self._plain:
            for line in [*lines, Line("")]:
                self._console.print(Text(line.text), soft_wrap=True)
            return
        if not self._console.is_alt_screen:  # in the background, about to end
            return
        filled = [*lines[:-2], *[Line("")] * (height - len(lines)), *lines[-2:]]
        self._console.update_screen_lines(
            [
                [Segment(set_cell_size(line.text, width), self._console.get_style(line.style or "none"))]
                for line in filled
            ]
        )


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """Do nothing: the signal's number is already in the pipe."""
