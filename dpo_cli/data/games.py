"""Games: who beat whom, how often, read from a file into a table of wins.

A row is `winner`, `loser` and, where they are given, `count` (1 without it; halves are counts too) and `tie`: the games
of a row with `tie` true ended in a draw, so that each of the two has half a win of each.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_cli.console.text import safe_text
from dpo_cli.data.files import RowInFile, local_path, read_rows
from dpo_cli.data.formats import BadRowError, Row, text_of
from dpo_cli.errors import DataError

KEYS = ("winner", "loser", "count", "tie")
# Within a factor of 1e12 the arithmetic of the fit holds; outside, a count is a mistake.
LEAST_COUNT, GREATEST_COUNT = 1e-3, 1e9
MAX_PLAYERS = 1000  # more are no ranking, but a column that holds something else
TIES = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False, "": False}


@dataclass(frozen=True)
class Games:
    """A table of games, and what was not read of its file."""

    players: tuple[str, ...]  # in the order of their first appearance
    wins: Tensor  # (K, K) float64: how often row beat column; a tie is half a win for both
    ignored: tuple[str, ...]  # keys of rows that mean nothing here


def read_games(path: Path) -> Games:
    """All games of a file; DataError names the line that is none."""
    file = local_path(str(path))
    if file is None:
        raise DataError(f"{safe_text(path)}: no such file")
    places: dict[str, int] = {}
    wins: defaultdict[tuple[int, int], float] = defaultdict(float)
    ignored: dict[str, None] = {}
    for row in read_rows(file):
        try:
            winner, loser, count, tie = _game(row)
        except BadRowError as error:
            raise DataError(f"{row.place}: {safe_text(error, limit=300)}") from None
        first, second = (places.setdefault(name, len(places)) for name in (winner, loser))
        if len(places) > MAX_PLAYERS:
            raise DataError(f"{row.place}: more than {MAX_PLAYERS:,} players; 'winner' and 'loser' must be names")
        wins[first, second] += count / 2 if tie else count
        wins[second, first] += count / 2 if tie else 0.0
        ignored |= dict.fromkeys(str(key) for key in row.value or () if key not in KEYS)
    if not places:
        raise DataError(f"{safe_text(path)}: holds no games. A row is winner,loser,count")
    table = torch.zeros(len(places), len(places), dtype=torch.float64)
    for pair, number in wins.items():
        table[pair] = number
    return Games(tuple(places), table, tuple(ignored))


def _game(row: RowInFile) -> tuple[str, str, float, bool]:
    """Winner, loser, number of games and whether they were drawn; BadRowError where the row does not say."""
    if row.value is None:
        raise BadRowError(row.problem)
    winner, loser = _name(row.value, "winner"), _name(row.value, "loser")
    if winner == loser:
        raise BadRowError(f"'{winner}' against itself; a game has two players")
    return winner, loser, _count(row.value.get("count", 1)), _tie(row.value.get("tie", False))


def _name(row: Row, key: str) -> str:
    if key not in row:
        has = ", ".join(str(name) for name in row) or "nothing"
        raise BadRowError(f"no '{key}'. A row needs winner and loser, and may have count and tie; it has {has}")
    name = text_of(row[key], key).strip()
    if not name:
        raise BadRowError(f"'{key}' is empty; a player needs a name")
    return name


def _count(value: Any) -> float:
    try:
        count = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        count = math.nan
    if count != 0 and not LEAST_COUNT <= count <= GREATEST_COUNT:  # nan is neither
        raise BadRowError(f"'count' must be 0 or a number from {LEAST_COUNT:g} to {GREATEST_COUNT:g}, it is {value!r}")
    return count


def _tie(value: Any) -> bool:
    text = "" if value is None else f"{value:g}" if isinstance(value, float) else str(value).strip().lower()
    if text not in TIES:
        raise BadRowError(f"'tie' must be true or false, yes or no, 1 or 0, it is {value!r}")
    return TIES[text]
