"""Record a session of `dpo-label by=human`: what an 80x24 terminal showed, key after key, as plain text.

    python scripts/record_session.py --keys "1 2 ? x t q" -- dpo-label samples=answers.jsonl by=human \\
        annotator=ann output=labels.jsonl > session.txt

Keys are separated by spaces: a character, or one of the names below. Only the few escape sequences that the command
sends are understood.
"""

import argparse
import codecs
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator

from rich.cells import get_character_cell_size

COLUMNS, LINES = 80, 24
NAMED_KEYS = {
    "<left>": "\x1b[D", "<right>": "\x1b[C", "<up>": "\x1b[A", "<down>": "\x1b[B", "<page-up>": "\x1b[5~",
    "<page-down>": "\x1b[6~", "<home>": "\x1b[H", "<end>": "\x1b[F", "<space>": " ", "<escape>": "\x1b",
    "<ctrl-c>": "\x03", "<ctrl-d>": "\x04",
}  # fmt: skip
QUIET_SECONDS = 0.3  # a frame has ended when nothing more came for so long
PATIENCE_SECONDS = 120  # for the first frame, which waits for the imports, and for the end
# The child's first words: it makes the terminal its own, so that Ctrl-C reaches it.
OWN_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"
)


class Screen:
    """What a terminal shows of what was sent to it: text, line ends, cursor positions and the alternate screen."""

    SEQUENCE = re.compile(r"\x1b\[(\??)([\d;]*)([A-Za-z])")

    def __init__(self, columns: int = COLUMNS, lines: int = LINES) -> None:
        self.columns, self.lines = columns, lines
        self.alternate = False
        self.cursor_hidden = False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._pending = ""  # a sequence that is not whole yet
        self._row = self._column = 0
        self._cells = self._blank()
        self._kept = (self._cells, 0, 0)  # the normal screen, while the alternate one is shown

    def _blank(self) -> list[list[str]]:
        return [[" "] * self.columns for _ in range(self.lines)]

    def resize(self, columns: int, lines: int) -> None:
        """Another size: what was there is gone, as the command is to draw it anew."""
        self.columns, self.lines = columns, lines
        self._row = self._column = 0
        self._cells = self._blank()
        self._kept = (self._blank(), 0, 0)

    def feed(self, data: bytes) -> None:
        """Show what a terminal was sent, however it is cut into reads."""
        text = self._pending + self._decoder.decode(data)
        self._pending = ""
        place = 0
        while place < len(text):
            if text[place] != "\x1b":
                self._put(text[place])
                place += 1
                continue
            match = self.SEQUENCE.match(text, place)
            if match is None:
                assert len(text) - place < 16, f"not understood: {text[place : place + 16]!r}"
                self._pending = text[place:]
                return
            self._obey(*match.groups())
            place = match.end()

    def _put(self, character: str) -> None:
        if character == "\r":
            self._column = 0
        elif character == "\n":
            self._row += 1
        else:
            size = get_character_cell_size(character)
            if size == 0:
                self._cells[self._row][max(0, self._column - 1)] += character
                return
            if self._column + size > self.columns:
                self._row, self._column = self._row + 1, 0
            self._scroll()
            self._cells[self._row][self._column : self._column + size] = [character, *[""] * (size - 1)]
            self._column += size
        self._scroll()

    def _scroll(self) -> None:
        while self._row >= self.lines:
            self._cells = [*self._cells[1:], [" "] * self.columns]
            self._row -= 1

    def _obey(self, private: str, numbers: str, letter: str) -> None:
        if letter == "H":
            row, column = [int(number) for number in numbers.split(";")] if numbers else (1, 1)
            self._row, self._column = min(row, self.lines) - 1, min(column, self.columns) - 1
        elif private and numbers == "25":
            self.cursor_hidden = letter == "l"
        elif private and numbers == "1049" and (letter == "h") != self.alternate:
            self.alternate = letter == "h"
            if self.alternate:
                self._kept = (self._cells, self._row, self._column)
                self._cells = self._blank()
            else:
                self._cells, self._row, self._column = self._kept
        elif letter not in "mhl":
            raise AssertionError(f"not understood: ESC [{private}{numbers}{letter}")

    def rows(self) -> list[str]:
        """The lines as they stand there."""
        return ["".join(cells).rstrip() for cells in self._cells]

    def __str__(self) -> str:
        return "\n".join(self.rows()).rstrip()


def record(
    command: list[str], keys: list[str], columns: int = COLUMNS, lines: int = LINES
) -> Iterator[tuple[str, str]]:
    """What was on the screen before the first key, after each key, and at the end, each with a heading."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    child = subprocess.Popen(
        [sys.executable, "-c", OWN_TERMINAL, *command],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env={**environment, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"},
    )
    os.close(theirs)
    screen = Screen(columns, lines)
    try:
        _settle(ours, screen, until_drawn=True)
        yield "begin", str(screen)
        for key in keys:
            if screen.alternate:
                os.write(ours, NAMED_KEYS.get(key, key).encode())
                _settle(ours, screen)
            if screen.alternate:
                yield f"key {key}", str(screen)
        if not screen.alternate:
            _settle(ours, screen, until_closed=True)
        code = None if screen.alternate else child.wait(PATIENCE_SECONDS)
        yield ("the keys are used up" if code is None else f"end, exit code {code}"), str(screen)
    finally:
        child.kill()
        child.wait()
        os.close(ours)


def _settle(terminal: int, screen: Screen, until_drawn: bool = False, until_closed: bool = False) -> None:
    """Feed the screen until nothing more comes: once its own screen is drawn, or all is said, where so asked."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        ready = select.select([terminal], [], [], QUIET_SECONDS)[0]
        if not ready and not until_closed and (screen.alternate or not until_drawn):
            return
        try:
            data = os.read(terminal, 1 << 16) if ready else b""
        except OSError:  # closed at the other end
            return
        screen.feed(data)


def main() -> None:
    """Print the transcript of one session."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", required=True, help="for instance: 1 t <page-down> u q")
    parser.add_argument("--columns", type=int, default=COLUMNS)
    parser.add_argument("--lines", type=int, default=LINES)
    parser.add_argument("command", nargs="+", help="after --")
    options = parser.parse_args()
    for heading, shown in record(options.command, options.keys.split(), options.columns, options.lines):
        print(f"[{heading}]\n{shown}\n", flush=True)


if __name__ == "__main__":
    main()
