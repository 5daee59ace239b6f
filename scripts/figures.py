"""What the figures of the scripts share: a style, axes side by side, and what is said where matplotlib is missing."""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NO_FIGURE = "matplotlib: not installed, so no figure was drawn; pip install matplotlib adds it."

STYLE = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 7,
}


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


@contextmanager
def panels(path: Path, number: int, size: tuple[float, float], salt: str) -> Iterator[Sequence[Any]]:
    """So many axes side by side, on `size` inches in all; what was drawn is in `path` (.svg or .png) afterwards.

    With `salt` and no date, the same numbers give the same file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({**STYLE, "svg.hashsalt": salt}):
        figure, axes = pyplot.subplots(1, number, figsize=size, layout="constrained", squeeze=False)
        figure.get_layout_engine().set(wspace=0.06)
        yield axes[0]
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, metadata=metadata, dpi=75, facecolor="white")
        pyplot.close(figure)
