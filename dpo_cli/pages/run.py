"""The parts of a run's page: training curves with the evaluations on them, alarms, config."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_cli.console.labels import METRICS
from dpo_cli.console.text import significant
from dpo_cli.pages import figures
from dpo_cli.pages.figures import MOST_POINTS, Drawing, Series, binned
from dpo_cli.pages.reading import Triple, column, estimate_in, number
from dpo_cli.theory.statistics import proportion_estimate

Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Curve:
    """A figure over steps: `lines` of the training log, and the metric of the evaluations on it."""

    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]  # name, metric
    held_out: str | None
    says: str
    level: float | None = None
    log: bool = False
    most: int = MOST_POINTS


CURVES = (
    Curve("Loss", "loss, nats", (("training", "loss"),), "loss", "Lower is better."),
    Curve("Margin", "margin", (("training", "rewards/margins"),), "rewards/margins",
          "Reward of chosen minus reward of rejected; above the dashed 0 the policy prefers chosen.", 0.0),
    Curve("Accuracy", "accuracy", (("training", "rewards/accuracies"),), "rewards/accuracies",
          "Share of pairs whose chosen response has the higher reward; dashed: chance.", 0.5, most=60),
    Curve("Rewards", "reward", (("chosen", "rewards/chosen"), ("rejected", "rewards/rejected")), None,
          "Both fall: the margin comes from pushing rejected down more than chosen.", 0.0),
    Curve("Drift", "nats a token", (("chosen", "drift/chosen_per_token"), ("rejected", "drift/rejected_per_token")),
          None,
          "Change of the log-probs since the reference. Chosen far below 0: the model unlearns good answers.", 0.0),
    Curve("KL of the data's responses", "nats a token", (("training", "drift/kl_per_token"),), None,
          "Estimate of how far the policy has moved from the reference.", 0.0),
    Curve("Gradient norm", "norm", (("training", "grad_norm"),), None,
          "Before clipping. Peaks are unstable steps.", log=True),
    Curve("Learning rate", "rate", (("training", "lr"),), None, "The schedule as it was applied."),
    Curve("Speed", "pairs a second", (("training", "pairs_per_second"),), None, "Training alone, without evaluation."),
)  # fmt: skip
SAMPLE_CURVES = (
    ("KL of generated answers", "nats a response", "samples/kl", None, 0.0, "kl",
     "How far the policy's own answers are from the reference: the price of the margin."),
    ("Length of generated answers", "of the reference's", "samples/length_ratio", None, 1.0, "length",
     "Mean length, where 1 is the length of the reference's answers."),
    ("Answers that end", "share", "samples/ends", "samples/reference_ends", None, None,
     "Share of the answers that end by themselves; a fall means that the model no longer stops."),
    ("Repetition", "share of 4-grams", "samples/repetition", "samples/reference_repetition", None, None,
     "Repeated 4-grams within an answer; a rise means that the model loops."),
)  # fmt: skip


def drawings(config: Mapping[str, Any], records: Records) -> list[Drawing]:
    """The curves for which the log has numbers."""
    train = [record for record in records if record.get("split") == "train"]
    held_out = [record for record in records if record.get("split") == "eval"]
    numbers = [(number(record["step"]), str(place)) for place, record in enumerate(_alarmed(records), start=1)]
    budget = config.get("budget") or {}
    found = [_curve(curve, config, train, held_out, numbers) for curve in CURVES]
    for title, unit, name, of_reference, level, limit, says in SAMPLE_CURVES:
        lines = [_held_out(held_out, name, "policy (after)" if of_reference else "held-out prompts", joined=True)]
        if of_reference:
            lines.append(_held_out(held_out, of_reference, "reference (before)", figures.SERIES[1], joined=True))
        if len(lines[0].steps):
            limited = number(budget.get(limit)) if limit else math.nan
            known = limited if math.isfinite(limited) else None
            caption = says + (" Red: the budget." if known is not None else "") + " With 95% intervals."
            shown = [line for line in lines if len(line.steps)]
            found.append(figures.curves(title, caption, unit, shown, level, known, numbers))
    return [drawing for drawing in found if drawing is not None]


def _curve(
    curve: Curve, config: Mapping[str, Any], train: Records, held_out: Records, marks: list[tuple[float, str]]
) -> Drawing | None:
    series, notes = [], [curve.says]
    for index, (label, name) in enumerate(curve.lines):
        logged = [record for record in train if name in record]
        values = column(logged, name)
        lost = int((~np.isfinite(values)).sum())
        if lost < len(values):
            line = _line(
                label, column(logged, "step"), values, figures.SERIES[index], curve.most, _pairs(curve, config)
            )
            series.append(line)
            if lost:
                notes.append(f"{lost:,} values of {label} are not finite and leave gaps.")
            if len(values) > curve.most:
                each = len(values) / curve.most
                notes.append(f"A point of the line is the mean of about {significant(each, 2)} logged values.")
    if series and series[0].low is not None:
        notes.append("Shaded: 95% interval of a point of the line.")
    if curve.held_out:
        line = _held_out(held_out, curve.held_out, "held out")
        if len(line.steps):
            series.append(line)
            notes.append("Points: held-out pairs, with 95% intervals where known.")
    if not series:
        return None
    every = np.concatenate([np.asarray(one.values, dtype=float) for one in series])
    log = curve.log and float(np.nanmin(every)) > 0 and float(np.nanmax(every)) > 30 * float(np.nanmin(every))
    notes += ["The scale is logarithmic."] if log else []
    notes += ["Dotted: an alarm."] if marks else []
    return figures.curves(curve.title, " ".join(notes), curve.unit, series, curve.level, marks=marks, log=log)


def _pairs(curve: Curve, config: Mapping[str, Any]) -> float:
    """Pairs behind a logged accuracy; NaN for a metric that is no share."""
    share = curve.lines[0][1] == "rewards/accuracies"
    return number(config.get("batch_size")) * (number(config.get("log_every")) or 1) if share else math.nan


def _line(label: str, steps: Any, values: NDArray[np.float64], color: str, most: int, pairs: float) -> Series:
    """A logged metric, in at most `most` points; a share of so many `pairs` with its interval."""
    groups = binned(values, most)
    known = [group[np.isfinite(values[group])] for group in groups]
    means = np.asarray([values[group].mean() if len(group) else math.nan for group in known])
    places = np.asarray([steps[group].mean() for group in groups])
    if not math.isfinite(pairs):
        return Series(label, places, means, color=color)
    bands = [
        proportion_estimate(min(1.0, max(0.0, mean)) * pairs * len(group), round(pairs * len(group)))
        if len(group) else None
        for mean, group in zip(means, known, strict=True)
    ]  # fmt: skip
    low, high = (np.asarray([getattr(band, end, math.nan) for band in bands]) for end in ("low", "high"))
    return Series(label, places, means, low, high, color)


def _held_out(records: Records, name: str, label: str, color: str = "", joined: bool = False) -> Series:
    logged = [record for record in records if math.isfinite(number(record.get(name)))]
    estimates: list[Triple] = [estimate_in(record, name) for record in logged]
    means, low, high = np.asarray(estimates, dtype=float).reshape(-1, 3).T
    shade = color or figures.SERIES[0 if joined else 1]
    return Series(label, column(logged, "step"), means, low, high, shade, joined and len(logged) > 1)


def _alarmed(records: Records) -> list[Mapping[str, Any]]:
    return [record for record in records if record.get("alarms")]


def alarm_rows(records: Records) -> list[tuple[int, Any, str]]:
    """Number in the figures, step and text of each alarm."""
    return [
        (place, record["step"], str(text))
        for place, record in enumerate(_alarmed(records), start=1)
        for text in record["alarms"].values()
    ]


def facts(config: Mapping[str, Any], manifest: Mapping[str, Any], records: Records) -> list[tuple[str, Any]]:
    """What was trained, on what, and how far it came."""
    data, model = manifest.get("data") or {}, manifest.get("model") or {}
    steps = max((int(number(record.get("step"))) for record in records if "step" in record), default=0)
    final = manifest.get("final") or {}
    found = [
        ("model", model.get("name")),
        ("training pairs", _kept(data.get("train"))),
        ("held-out pairs", _kept(data.get("held_out"))),
        ("objective", config.get("objective")),
        ("loss", (config.get("loss") or {}).get("name")),
        ("beta", config.get("beta")),
        ("steps", f"{steps:,} of {manifest['total_steps']:,}" if manifest.get("total_steps") else f"{steps:,}"),
        ("final/ holds", f"step {final['step']:,}: {final['reason']}" if final else None),
        ("updates skipped as not finite", manifest.get("skipped_steps") or None),
        ("device", manifest.get("device")),
        ("dtype", manifest.get("dtype")),
        ("dpo-cli", manifest.get("dpo_cli")),
    ]
    return [(name, value) for name, value in found if value is not None]


def _kept(side: Mapping[str, Any] | None) -> str | None:
    if not side or "kept" not in side:
        return None
    return f"{side['kept']:,} of {side.get('source', '')}"


def flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted keys with their values."""
    found: list[tuple[str, Any]] = []
    for key, value in config.items():
        found += flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else [(f"{prefix}{key}", value)]
    return found


def last_rows(records: Records) -> list[tuple[str, Triple]]:
    """The metrics of the last evaluation, else of the last logged step."""
    last = [record for record in records if record.get("split") == "eval"] or list(records)
    return [(label, estimate_in(last[-1], name)) for label, name in METRICS if last and name in last[-1]]
