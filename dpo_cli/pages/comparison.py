"""The parts of the page of a comparison or a sweep: differences to the first model, and what they cost in KL."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_cli.console.text import cut_apart
from dpo_cli.pages import figures
from dpo_cli.pages.figures import NAME, Drawing
from dpo_cli.pages.reading import number, triple

MOST_ROWS = 24  # of a forest plot
MOST_OUTLINES = 4  # of margins: more lines cannot be told apart
WORDS = {"first": "dim", "better": "good", "worse": "bad", "not told apart": "dim"}  # of a verdict: its color


def short_names(comparison: Mapping[str, Any]) -> list[str]:
    """The models' names, cut where they differ."""
    return cut_apart([str(model["name"]) for model in comparison["models"]], NAME)


def headline(comparison: Mapping[str, Any]) -> tuple[str, str]:
    """The outcome in a line, and its color: green only where one model is better than every other beyond chance."""
    models, best = comparison["models"], comparison["best"]
    close = [model["name"] for model in models if model["verdict"] == "not told apart" and model["name"] != best]
    if best is None:
        return f"compared with {models[0]['name']}", ""
    if close:
        return f"{best} has the highest accuracy, but is not told apart from {', '.join(map(str, close))}", "yellow"
    return f"best: {best}", "green"


def drawings(comparison: Mapping[str, Any], margins: Sequence[Sequence[float]]) -> list[Drawing]:
    """The figures, as many as there is data for."""
    models, names = comparison["models"], short_names(comparison)
    found = []
    others = [index for index, model in enumerate(models) if model.get("difference")][:MOST_ROWS]
    more = f" The first {MOST_ROWS} are shown." if sum(bool(m.get("difference")) for m in models) > MOST_ROWS else ""
    for what in ("accuracy", "margin", "loss"):
        differences = [models[index]["difference"].get(what) for index in others]
        estimates = [triple([one["mean"], one["low"], one["high"]] if one else None) for one in differences]
        if any(math.isfinite(one[0]) for one in estimates):
            found.append(
                figures.rows(
                    f"Difference in {what}",
                    f"Each model minus {models[0]['name']} on the same pairs, with its 95% interval. An interval that "
                    f"crosses the dashed 0 does not tell the two apart.{more}",
                    f"difference in {what}",
                    [names[index] for index in others],
                    estimates,
                    level=0.0,
                    colors=[WORDS.get(models[index]["verdict"], "dim") for index in others],
                )
            )
    # The first and the best model are always among the outlines.
    order = sorted(range(len(models)), key=lambda index: (index > 0, models[index]["name"] != comparison["best"]))
    shown = [(names[index], [number(value) for value in margins[index]]) for index in sorted(order[:MOST_OUTLINES])]
    if any(math.isfinite(value) for _, values in shown for value in values):
        few = f" {MOST_OUTLINES} of {len(models)} models are shown." if len(models) > MOST_OUTLINES else ""
        caption = "Reward of chosen minus reward of rejected. Further right is better; what lies left of 0 is wrong."
        labels = ("margin", "share of pairs")
        found.append(figures.histogram("Margins", caption + few, labels, shown, bins=24))
    return found + _frontiers(comparison, names)


def _frontiers(comparison: Mapping[str, Any], names: Sequence[str]) -> list[Drawing]:
    models = comparison["models"]
    priced = [
        (name, model, triple(model["metrics"].get("kl")))
        for name, model in zip(names, models, strict=True)
        if math.isfinite(triple(model["metrics"].get("kl"))[0])
    ]
    best = next((name for name, model in zip(names, models, strict=True) if model["name"] == comparison["best"]), None)
    if len(priced) < 2:
        return []
    room = " A name without room is left out." if len(priced) > 6 else ""
    named = f" {comparison['best']} is the best." if best else ""
    caption = (
        "What each model gains against what it costs: further up is better, further right is further from the "
        f"reference. Dotted: no other model gains more at this price or a lower one.{named}{room}"
    )
    accuracy = [(name, kl, triple(model["metrics"]["accuracy"])) for name, model, kl in priced]
    nats = []
    for name, model, kl in priced:
        of_beta = comparison.get("margin") == "margin/beta"  # where betas differ it is in nats already
        beta = 1.0 if of_beta else number(model.get("beta")) or math.nan
        mean, low, high = triple(model["metrics"]["margin"])
        nats.append((name, kl, (mean / beta, low / beta, high / beta)))
    unit = "KL, nats a response"
    found = [figures.frontier("Accuracy against KL", caption, (unit, "accuracy"), accuracy, best)]
    if any(math.isfinite(one[2][0]) for one in nats):
        found.append(figures.frontier("Margin against KL", caption, (unit, "margin / beta, nats"), nats, best))
    return found
