"""Tables for trackers: columns and rows of plain data, made fit to be shown."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_cli.console.text import safe_text, significant
from dpo_cli.theory.statistics import Estimate

Cell = str | float | None
CELL_LIMIT = 2_000  # characters of a cell; what is longer ends in an ellipsis
SAMPLE_COLUMNS = (
    "prompt", "reference", "policy", "kl", "tokens", "reference_tokens", "finish_reason", "reference_finish_reason",
)  # fmt: skip
# Whatever Markdown, or HTML within it, could read as more than a character.
_MARKUP = re.compile(r"[&<>\"'\\`*_{}\[\]()#+!|~$]")


def samples_table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Cell]]]:
    """The lines of a file of samples/: a row an answer, None where a line lacks a key."""
    return list(SAMPLE_COLUMNS), [[row.get(column) for column in SAMPLE_COLUMNS] for row in rows]


def evaluation_table(estimates: Mapping[str, Estimate]) -> tuple[list[str], list[list[Cell]]]:
    """A row a metric: its mean and the ends of its 95% interval."""
    rows: list[list[Cell]] = [[name, found.mean, found.low, found.high] for name, found in estimates.items()]
    return ["metric", "mean", "low", "high"], rows


def shown_cell(cell: Cell) -> Cell:
    """A text escaped line by line, without secrets, and shortened; None for a number that is not finite."""
    if not isinstance(cell, str):
        return cell if cell is None or math.isfinite(cell) else None
    text = "\n".join(safe_text(line) for line in cell.splitlines())
    return text if len(text) <= CELL_LIMIT else text[: CELL_LIMIT - 3] + "..."


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A table in Markdown whose texts appear as they are, each row on one line."""
    lines = [[_markdown_cell(column) for column in columns], ["---"] * len(columns)]
    lines += [[_markdown_cell(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _markdown_cell(cell: Cell) -> str:
    if not isinstance(cell, str):
        return "" if cell is None else significant(cell, 4)
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", cell).replace("\n", "<br>")
