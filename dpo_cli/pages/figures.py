"""Figures as SVG: matplotlib draws, colors are CSS variables of the page, and text stays text.

matplotlib never sees untrusted text: it draws a placeholder, which is replaced by the escaped text afterwards. A
number that is not known is NaN and leaves a gap. An estimate is (mean, low, high).
"""

import html
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_cli.console.text import safe_text, significant
from dpo_cli.pages.reading import Triple

Values = Sequence[float] | NDArray[np.float64]
WIDTH, HEIGHT = 380, 250  # of a figure in its own units: pixels where three stand side by side at 1,200
FONT = 10.5  # of every text; a page 400 wide shows a figure 368 wide
SERIES = tuple(f"series-{number}" for number in range(1, 7))
COLORS = ("text", "dim", "line", "good", "bad", *SERIES)  # CSS variables of the page
NAME = 20  # characters of a name in a figure
STEP = "optimizer step"  # an axis of whole numbers
MOST_POINTS = 400  # of a curve
CELLS, LEVELS = 30, 6  # of a density: at most so many cells a side, and depths of color


@dataclass(frozen=True)
class Drawing:
    """A figure: its title, its SVG, and the sentence that says how to read it."""

    title: str
    svg: str
    caption: str


@dataclass(frozen=True)
class Series:
    """A line over steps, or separate points with intervals where `joined` is false."""

    name: str
    steps: Values
    values: Values
    low: Values | None = None
    high: Values | None = None
    color: str = SERIES[0]
    joined: bool = True


def color(name: str) -> str:
    """The color that stands for a CSS variable while matplotlib draws."""
    return f"#0a0b{COLORS.index(name):02x}"


def _figure(
    title: str,
    caption: str,
    labels: tuple[str, str],
    draw: Callable[[Any, Callable[[str], str]], None],
    height: int = HEIGHT,
    left: int = 56,
    legend: Sequence[str] = (),
) -> Drawing:
    """`draw` gets the axes, and a function that makes the placeholder of a name; `legend` has the names it shows."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    names: list[str] = []

    def placeholder(name: str) -> str:
        names.append(safe_text(name, NAME))
        return f"{{{len(names) - 1}}}".ljust(len(names[-1]), "n")

    longest = max((len(safe_text(name, NAME)) for name in legend), default=0)
    columns = max(1, min(len(legend), int((WIDTH - left) / (6.2 * longest + 34))))
    top = 8 + (16 * math.ceil(len(legend) / columns) if len(legend) > 1 else 0)
    height += max(0, top - 40)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's matplotlibrc says
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none", "svg.hashsalt": title, "text.parse_math": False, "font.size": FONT,
                "axes.edgecolor": color("line"), "axes.linewidth": 1, "axes.labelcolor": color("dim"),
                "axes.labelsize": FONT, "axes.grid": True, "grid.color": color("line"), "grid.linewidth": 0.6,
                "axes.axisbelow": True, "xtick.labelcolor": color("dim"), "ytick.labelcolor": color("dim"),
                "xtick.major.size": 0, "ytick.major.size": 0, "xtick.minor.size": 0, "ytick.minor.size": 0,
                "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
                "text.color": color("text"), "legend.labelcolor": color("text"), "legend.frameon": False,
                "legend.fontsize": FONT, "lines.linewidth": 1.5, "lines.markersize": 4.5, "axes.facecolor": "none",
                "figure.facecolor": "none", "xtick.labelsize": FONT, "ytick.labelsize": FONT,
            }
        )  # fmt: skip
        figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
        FigureCanvasSVG(figure)
        axes = figure.add_axes(
            (left / WIDTH, 38 / height, (WIDTH - left - 10) / WIDTH, (height - 38 - top) / height)
        )  # fmt: skip
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.yaxis.set_label_coords((14 - left) / (WIDTH - left - 10), 0.5)  # at the edge, however wide its ticks are
        draw(axes, placeholder)
        for axis in (axes.xaxis, axes.yaxis) if labels[1] else (axes.xaxis,):  # else it has names
            if axis.get_scale() == "linear":
                axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=labels[axis is axes.yaxis] == STEP))
            axis.set_major_formatter(FuncFormatter(_told_apart(axis)))
        if top > 8:
            axes.legend(
                loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderpad=0.1, borderaxespad=0.2,
                handlelength=1.2, handletextpad=0.5, columnspacing=1.2, labelspacing=0.2,
            )  # fmt: skip
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    label = html.escape(f"{safe_text(title)}. {safe_text(caption)}")
    body = _tidied(text.getvalue(), [html.escape(name) for name in names])
    svg = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">{body}</svg>'
    return Drawing(title, svg, caption)


def _logarithmic(axes: Any, which: str) -> None:
    """A logarithmic axis, x or y, with ticks at 1, 3, 10, 30."""
    axes.set(**{f"{which}scale": "log"})
    axes.minorticks_off()
    getattr(axes, f"{which}axis").get_major_locator().set_params(subs=(1.0, 3.0))


def _told_apart(axis: Any) -> Callable[[float, int], str]:
    """The text of a tick, in as many digits as neighbors need to differ."""

    def text(value: float, _: int) -> str:
        ticks = np.sort(axis.get_majorticklocs())
        apart = float(np.diff(ticks).min()) if len(ticks) > 1 else 0.0
        largest = float(np.abs(ticks).max(initial=0.0))
        digits = math.ceil(math.log10(largest / apart)) + 1 if apart > 0 < largest else 3
        return significant(0.0 if abs(value) < apart / 1e6 else value, max(3, digits))

    return text


def _tidied(svg: str, names: Sequence[str]) -> str:
    """What stands within <svg>: small, without ids that nothing names, in the colors and with the names of the page."""
    svg = svg[svg.index("<svg") :]
    svg = svg[svg.index(">") + 1 : svg.rindex("</svg>")]
    svg = re.sub(r"<style.*?</style>|<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*</defs>", "", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    svg = re.sub(r' transform="rotate\(-0 [^"]*"', "", svg)
    svg = re.sub(r"\bxlink:href=", "href=", svg)
    svg = re.sub(r"#0a0b([0-9a-f]{2})", lambda found: f"var(--{COLORS[int(found[1], 16)]})", svg)
    svg = re.sub(r"(?<= )(-?\d+\.\d\d)\d+(?=[ \n\"])|(?<=\")(-?\d+\.\d\d)\d+(?=\")", r"\1\2", svg)
    svg = re.sub(r"\s*\n\s*", " ", svg)
    svg = svg.replace("> <", "><")
    return re.sub(r"\{(\d+)\}n*", lambda found: names[int(found[1])], svg)


def _bars(axes: Any, places: Values, low: Values, high: Values, shade: str, across: bool = False) -> None:
    """The intervals as one path."""
    gaps = np.full(len(places), np.nan)
    along = np.column_stack([places, places, gaps]).ravel()
    ends = np.column_stack([low, high, gaps]).ravel()
    axes.plot(*((ends, along) if across else (along, ends)), color=color(shade), linewidth=1.4, solid_capstyle="butt")


def points(
    title: str,
    caption: str,
    labels: tuple[str, str],
    places: Values,
    estimates: Sequence[Triple],
    level: float | None = None,
    diagonal: bool = False,
    joined: bool = False,
) -> Drawing:
    """Estimates over places, with a line at `level`, or one along which both axes are equal."""
    means, low, high = np.asarray(estimates, dtype=float).reshape(-1, 3).T

    def draw(axes: Any, _: Any) -> None:
        if level is not None:
            axes.axhline(level, color=color("dim"), linewidth=1, linestyle=(0, (4, 3)))
        if diagonal:
            axes.plot([0.5, 1], [0.5, 1], color=color("dim"), linewidth=1, linestyle=(0, (4, 3)))
        _bars(axes, places, low, high, SERIES[0])
        axes.plot(places, means, color=color(SERIES[0]), marker="o", linestyle="-" if joined else "none")

    return _figure(title, caption, labels, draw)


def rows(
    title: str,
    caption: str,
    label: str,
    names: Sequence[str],
    estimates: Sequence[Triple],
    level: float | None = None,
    colors: Sequence[str] = (),
) -> Drawing:
    """A row for each name, the first on top: its estimate with its interval, and a line at `level`."""
    means, low, high = np.asarray(estimates, dtype=float).reshape(-1, 3).T
    places = -np.arange(len(names), dtype=float)

    def draw(axes: Any, name: Callable[[str], str]) -> None:
        if level is not None:
            axes.axvline(level, color=color("dim"), linewidth=1, linestyle=(0, (4, 3)))
        for index in range(len(names)):
            shade = colors[index] if colors else SERIES[0]
            _bars(axes, places[index : index + 1], low[index : index + 1], high[index : index + 1], shade, across=True)
            axes.plot(means[index], places[index], color=color(shade), marker="o")
        axes.set_yticks(places, [name(one) for one in names])
        axes.tick_params(axis="y", labelcolor=color("text"))
        axes.set_ylim(-len(names) + 0.4, 0.6)
        axes.grid(visible=False, axis="y")

    left = 14 + round(6.2 * max((len(safe_text(name, NAME)) for name in names), default=0))
    return _figure(title, caption, (label, ""), draw, height=max(HEIGHT, 66 + 22 * len(names)), left=left)


def histogram(
    title: str, caption: str, labels: tuple[str, str], series: Sequence[tuple[str, Values]], bins: int = 41
) -> Drawing:
    """How values are distributed around 0: one series filled, in two colors; several as outlines, as shares."""
    known = [np.asarray(values, dtype=float) for _, values in series]
    known = [values[np.isfinite(values)] for values in known]
    every = np.concatenate([*known, [0.0]])
    low, high = np.quantile(every, [0.002, 0.998])
    bins = min(bins, max(9, int(2 * max(map(len, known)) ** 0.5)))  # few pairs: wide bars
    width = (max(high, 0.0) - min(low, 0.0)) / bins or 1.0
    # 0 is an edge, so that no bar holds both signs; what lies beyond the ends is counted in the last bars.
    edges = width * np.arange(math.floor(min(low, 0.0) / width), math.ceil(max(high, 0.0) / width) + 1)
    inside = [np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] for values in known]

    def draw(axes: Any, name: Callable[[str], str]) -> None:
        if len(series) == 1:
            zero = int(np.argmin(np.abs(edges)))
            axes.stairs(inside[0][:zero], edges[: zero + 1], fill=True, color=color("bad"))
            axes.stairs(inside[0][zero:], edges[zero:], fill=True, color=color("good"))
        for index, (one, _) in enumerate(series if len(series) > 1 else ()):
            shares = inside[index] / max(1, len(known[index]))
            axes.stairs(shares, edges, color=color(SERIES[index]), linewidth=1.5, label=name(one))
        axes.axvline(0, color=color("dim"), linewidth=1)
        axes.set_ylim(bottom=0)

    return _figure(title, caption, labels, draw, legend=[one for one, _ in series] if len(series) > 1 else ())


def counted(title: str, caption: str, labels: tuple[str, str], edges: Values, counts: Values) -> Drawing:
    """A histogram over a logarithmic axis whose counts are known: one fewer than the edges of its bars."""

    def draw(axes: Any, _: Any) -> None:
        axes.stairs(counts, edges, fill=True, color=color(SERIES[0]))
        _logarithmic(axes, "x")
        axes.set_ylim(bottom=0)

    return _figure(title, caption, labels, draw)


def density(title: str, caption: str, labels: tuple[str, str], across: Values, up: Values) -> Drawing:
    """How often two values occur together: the deeper a cell, the more; with a line along which both are equal."""
    pairs = np.column_stack([across, up]).astype(float)
    pairs = pairs[np.isfinite(pairs).all(axis=1)]
    low, high = np.quantile(pairs, [0.005, 0.995]) if len(pairs) else (0.0, 1.0)
    low, high = min(low, 0.0), max(high, 0.0)
    high = high if high > low else low + 1.0
    edges = np.linspace(low, high, min(CELLS, max(12, int(len(pairs) ** 0.5))) + 1)
    inside = np.clip(pairs, low, high)
    counts = np.histogram2d(inside[:, 0], inside[:, 1], bins=[edges, edges])[0]
    depths = np.ceil(LEVELS * np.log1p(counts) / np.log1p(counts.max() or 1)).astype(int)

    def draw(axes: Any, _: Any) -> None:
        from matplotlib.patches import PathPatch
        from matplotlib.path import Path

        for depth in range(1, LEVELS + 1):
            cells = [
                Path([(edges[x], edges[y]), (edges[x + 1], edges[y]), (edges[x + 1], edges[y + 1]),
                      (edges[x], edges[y + 1]), (edges[x], edges[y])], closed=True)
                for x, y in np.argwhere(depths == depth)
            ]  # fmt: skip
            if cells:
                whole = Path.make_compound_path(*cells)
                axes.add_patch(PathPatch(whole, facecolor=color(SERIES[0]), alpha=depth / LEVELS, linewidth=0))
        axes.axhline(0, color=color("dim"), linewidth=1)
        axes.axvline(0, color=color("dim"), linewidth=1)
        axes.plot([low, high], [low, high], color=color("text"), linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xlim(low, high)
        axes.set_ylim(low, high)

    return _figure(title, caption, labels, draw)


def curves(
    title: str,
    caption: str,
    unit: str,
    series: Sequence[Series],
    level: float | None = None,
    limit: float | None = None,
    marks: Sequence[tuple[float, str]] = (),
    log: bool = False,
) -> Drawing:
    """Lines over optimizer steps, with a line at `level`, a limit in red, and a numbered mark for each alarm."""

    def draw(axes: Any, name: Callable[[str], str]) -> None:
        if log:
            _logarithmic(axes, "y")
        if level is not None:
            axes.axhline(level, color=color("dim"), linewidth=1, linestyle=(0, (4, 3)))
        if limit is not None:
            axes.axhline(limit, color=color("bad"), linewidth=1.2)
        for one in series:
            shade = color(one.color)
            if one.low is not None and one.high is not None and one.joined:
                for part in _runs(np.isfinite(one.low) & np.isfinite(one.high)):
                    steps, low, high = (np.asarray(values)[part] for values in (one.steps, one.low, one.high))
                    around = np.concatenate([steps, steps[::-1]]), np.concatenate([low, high[::-1]])
                    axes.fill(*around, color=shade, alpha=0.2, linewidth=0)
            elif one.low is not None and one.high is not None:
                _bars(axes, one.steps, one.low, one.high, one.color)
            dots = "o" if not one.joined or len(one.steps) <= 20 else None
            size = 4.5 if not one.joined else 3
            axes.plot(
                one.steps, one.values, color=shade, marker=dots, markersize=size, label=name(one.name),
                linestyle="-" if one.joined else "none",
            )  # fmt: skip
        for step, number in marks:
            axes.axvline(step, color=color("bad"), linewidth=1, linestyle=(0, (1, 2)))
            axes.annotate(
                number, (step, 1), xycoords=("data", "axes fraction"), xytext=(2, -10), textcoords="offset points",
                color=color("bad"),
            )  # fmt: skip

    return _figure(title, caption, (STEP, unit), draw, legend=[one.name for one in series])


def _runs(known: NDArray[np.bool_]) -> list[slice]:
    """Where values follow each other without a gap."""
    ends = np.flatnonzero(np.diff(np.concatenate([[False], known, [False]]).astype(int)))
    return [slice(int(start), int(stop)) for start, stop in zip(ends[::2], ends[1::2], strict=True)]


def binned(values: Values, bins: int) -> list[NDArray[np.int64]]:
    """The indices of the values that one point of a curve stands for: neighbors, in at most `bins` groups."""
    return [group for group in np.array_split(np.arange(len(values)), max(1, bins)) if len(group)]


def frontier(
    title: str, caption: str, labels: tuple[str, str], places: Sequence[tuple[str, Triple, Triple]], best: str | None
) -> Drawing:
    """Named points with intervals both ways, the best in another color: name, estimate across, estimate up.

    A line joins the points that no other beats at the same or a lower price. A name without room is left out.
    """
    across, up = (np.asarray([place[axis] for place in places], dtype=float).reshape(-1, 3) for axis in (1, 2))
    order = np.lexsort((-up[:, 0], across[:, 0]))
    reached = np.fmax.accumulate(np.concatenate([[-np.inf], up[order, 0]]))
    unbeaten = order[up[order, 0] > reached[:-1]]

    def draw(axes: Any, name: Callable[[str], str]) -> None:
        axes.plot(across[unbeaten, 0], up[unbeaten, 0], color=color("dim"), linewidth=1, linestyle=(0, (1, 2)))
        for index, (one, *_) in enumerate(places):
            shade, only = "good" if one == best else SERIES[0], slice(index, index + 1)
            _bars(axes, across[only, 0], up[only, 1], up[only, 2], shade)
            _bars(axes, up[only, 0], across[only, 1], across[only, 2], shade, across=True)
            axes.plot(across[index, 0], up[index, 0], color=color(shade), marker="o")
        axes.autoscale_view()
        dots = axes.transData.transform(np.column_stack([across[:, 0], up[:, 0]]))
        free = _Room(dots, axes.get_window_extent())
        for index in sorted(range(len(places)), key=lambda index: places[index][0] != best):
            one = places[index][0]
            spot = free.spot(dots[index], 5.8 * len(safe_text(one, NAME)))
            if spot is not None:
                axes.annotate(name(one), spot, xycoords="figure pixels", color=color("good" if one == best else "text"))

    return _figure(title, caption, labels, draw)


class _Room:
    """Where a name beside a point would cover neither a point nor another name, in pixels."""

    def __init__(self, dots: NDArray[np.float64], inside: Any) -> None:
        self.taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in dots if math.isfinite(x) and math.isfinite(y)]
        self.inside = inside

    def spot(self, dot: NDArray[np.float64], wide: float) -> tuple[float, float] | None:
        """The lower left corner of a name of this width; None where there is no room."""
        for x, y in ((6, 4), (6, -13), (-6 - wide, 4), (-6 - wide, -13), (-wide / 2, 9), (-wide / 2, -18)):
            left, low = float(dot[0]) + x, float(dot[1]) + y
            box = (left, low - 2, left + wide, low + 10)
            within = self.inside.x0 <= box[0] and box[2] <= self.inside.x1 + 8
            within = within and self.inside.y0 <= box[1] and box[3] <= self.inside.y1 + 4
            if within and not any(
                box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]
                for other in self.taken
            ):
                self.taken.append(box)
                return left, low
        return None
