"""Games: who beat whom how often, read from a file into a table of wins.

A row has `winner`, `loser` and optionally `count` (default 1; halves are allowed) and `tie`. Where `tie` is true, every
game of the row counts as half a win for both players.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_cli.console.text import safe_text
from dpo_cli.data.files import SourceRow, local_path, read_rows
from dpo_cli.data.formats import BadRowError, Row, text_of
from dpo_cli.errors import DataError

KEYS = ("winner", "loser", "count", "tie")
# The fit is exact enough within a factor of 1e12.
LEAST_COUNT, GREATEST_COUNT = 1e-3, 1e9
MAX_PLAYERS = 1000  # more suggest a column of something else than names
TIES = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False, "": False}


@dataclass(frozen=True)
class Games:
    """A table of games, and the columns of its file that were not used."""

    players: tuple[str, ...]  # in the order of their first appearance
    wins: Tensor  # (K, K) float64: how often row beat column; a tie is half a win for both
    ignored: tuple[str, ...]  # keys of rows that are not used


def read_games(path: Path) -> Games:
    """All games of a file; DataError names a line that is not a game."""
    file = local_path(str(path))
    if file is None:
        raise DataError(f"{safe_text(path)}: no such file; name a file of games")
    indices: dict[str, int] = {}
    wins: defaultdict[tuple[int, int], float] = defaultdict(float)
    ignored: dict[str, None] = {}
    for row in read_rows(file):
        try:
            winner, loser, count, tie = _game(row)
        except BadRowError as error:
            raise DataError(f"{row.location}: {safe_text(error, limit=300)}") from None
        first, second = (indices.setdefault(name, len(indices)) for name in (winner, loser))
        if len(indices) > MAX_PLAYERS:
            raise DataError(f"{row.location}: more than {MAX_PLAYERS:,} players; 'winner' and 'loser' must be names")
        wins[first, second] += count / 2 if tie else count
        wins[second, first] += count / 2 if tie else 0.0
        ignored |= dict.fromkeys(str(key) for key in row.value or () if key not in KEYS)
    if not indices:
        raise DataError(f"{safe_text(path)}: has no games. A row needs winner and loser, and may have count and tie")
    table = torch.zeros(len(indices), len(indices), dtype=torch.float64)
    for pair, number in wins.items():
        table[pair] = number
    return Games(tuple(indices), table, tuple(ignored))


def _game(row: SourceRow) -> tuple[str, str, float, bool]:
    """Winner, loser, number of games and whether they were ties; BadRowError where the row does not say."""
    if row.value is None:
        raise BadRowError(row.problem)
    winner, loser = _name(row.value, "winner"), _name(row.value, "loser")
    if winner == loser:
        raise BadRowError(f"'{winner}' plays against itself; a game needs two players")
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
    if count != 0 and not LEAST_COUNT <= count <= GREATEST_COUNT:  # nan fails both
        raise BadRowError(f"'count' must be 0 or a number from {LEAST_COUNT:g} to {GREATEST_COUNT:g}, it is {value!r}")
    return count


def _tie(value: Any) -> bool:
    text = "" if value is None else f"{value:g}" if isinstance(value, float) else str(value).strip().lower()
    if text not in TIES:
        raise BadRowError(f"'tie' must be true or false, yes or no, 1 or 0, it is {value!r}")
    return TIES[text]
