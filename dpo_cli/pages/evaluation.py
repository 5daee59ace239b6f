"""The parts of an evaluation's page: metrics with intervals, figures from the lines of its pairs, colored tokens."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpo_cli.console.labels import MAIN, METRICS, SAMPLES
from dpo_cli.pages import figures
from dpo_cli.pages.figures import Drawing
from dpo_cli.pages.reading import Triple, accuracy_by, column, ends, estimate_in, number, prompts_of, right, triple
from dpo_cli.theory.statistics import Clusters

FACTS = (  # label, name
    ("checkpoint", "checkpoint"),
    ("reference", "reference"),
    ("beta", "beta"),
    ("loss", "loss_name"),
    ("device", "device"),
    ("dtype", "dtype"),
    ("layout", "layout"),
    ("weights (sha256)", "weights_sha256"),
)
STEPS = 4  # depths of a token's color, for each sign
SHOWN = 3  # best and worst pairs that are not folded
MOST_SOURCES = 12


def facts(report: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What was evaluated, and on what."""
    found = [(label, report[name]) for label, name in FACTS if report.get(name) is not None]
    data = report.get("data") or {}
    lost = [f"{reason} {count:,}" for reason, count in (data.get("dropped") or {}).items()]
    kept = [f"{data['kept']:,} of {data['rows']:,} rows kept"] if "kept" in data and "rows" in data else []
    found += [("data", "; ".join([str(data.get("source", "")), *kept, *lost]))] if data else []
    leaks = data.get("leaks")
    if data and leaks is None:
        found.append(("also in training", "not known: the checkpoint keeps no record of its training pairs"))
    shared = [("{:,} pairs", "pairs"), ("the first human turn of {:,} pairs", "prompts")]
    if also := [words.format(leaks[key]) for words, key in shared if leaks and leaks.get(key)]:
        found.append(("also in training", f"{', '.join(also)}: on them accuracy says nothing about new prompts"))
    pairs = f"{report['pairs']:,}" if "pairs" in report else ""
    prompts, effective = report.get("prompts"), report.get("prompts_effective")
    if prompts is not None and effective is not None:
        pairs += f" of {prompts:,} prompts, which the intervals take as independent (effective number {effective:,.1f})"
    return found + ([("pairs", pairs)] if pairs else [])


def sources_of(pairs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The sources that pairs have, the largest first."""
    counts: dict[str, int] = {}
    for pair in pairs:
        if pair.get("source"):
            counts[pair["source"]] = counts.get(pair["source"], 0) + 1
    return sorted(counts, key=lambda source: -counts[source])


def drawings(report: Mapping[str, Any], pairs: Sequence[Mapping[str, Any]]) -> list[Drawing]:
    """The figures, as many as there is data for."""
    margins, of_prompts, is_right = column(pairs, "margin"), prompts_of(pairs), right(pairs)
    unknown = int((~np.isfinite(margins)).sum())
    found = []
    if len(pairs) > unknown:
        found.append(
            figures.histogram(
                "Margins",
                "Reward of the chosen response minus that of the rejected one, a count of pairs for each bar. "
                f"Green is right, red is wrong; what lies further out is in the last bars.{_left_out(unknown)}",
                ("margin", "pairs"),
                [("margin", margins)],
            )
        )
        gaps = column(pairs, "chosen_tokens") - column(pairs, "rejected_tokens")
        found += _accuracy(
            "Accuracy by length gap",
            "Each point is a part of the pairs, with its 95% interval. Points that rise or fall: the model goes by "
            "length. Right of 0 the chosen response is the longer one.",
            "tokens of chosen minus tokens of rejected", gaps, is_right, of_prompts,
        )  # fmt: skip
        found += _by_source(pairs, is_right, of_prompts)
        found += _accuracy(
            "Accuracy by prompt length",
            "Each point is a part of the pairs, with its 95% interval; dashed: chance.",
            "tokens of the prompt", column(pairs, "prompt_tokens"), is_right, of_prompts,
        )  # fmt: skip
    if report.get("calibration") and len(pairs) > unknown:
        confidence = 1 / (1 + np.exp(-np.minimum(np.abs(margins), 700.0)))
        tenths = accuracy_by(confidence, is_right, of_prompts)
        found.append(
            figures.points(
                "Reliability",
                "Each point is a part of the pairs by size of margin: how often the model is right, with its 95% "
                "interval, against how sure it is. On the dashed line it is as often right as it claims; below, it "
                "is too sure.",
                ("confidence, sigmoid(|margin|)", "accuracy"),
                [place for place, _ in tenths],
                [one for _, one in tenths],
                diagonal=True,
            )
        )
    found += _ratios(pairs)
    found += _answers(report)
    return found + _scales(report)


def _left_out(unknown: int) -> str:
    return f" {unknown:,} pairs without a finite margin are left out." if unknown else ""


def _accuracy(title: str, caption: str, label: str, values: Any, is_right: Any, prompts: Any) -> list[Drawing]:
    bins = accuracy_by(values, is_right, prompts)
    if not bins:
        return []
    places, estimates = [place for place, _ in bins], [one for _, one in bins]
    return [figures.points(title, caption, (label, "accuracy"), places, estimates, level=0.5)]


def _by_source(pairs: Sequence[Mapping[str, Any]], is_right: Any, prompts: Any) -> list[Drawing]:
    sources = sources_of(pairs)
    if not sources:
        return []
    of_pairs = np.asarray([pair.get("source") or "" for pair in pairs], dtype=object)
    estimates = []
    for source in sources[:MOST_SOURCES]:
        members = (of_pairs == source) & np.isfinite(is_right)
        known = members.any()
        estimates.append(ends(Clusters(prompts[members]).share(is_right[members])) if known else triple(None))
    more = f" The {MOST_SOURCES} largest of {len(sources)} are shown." if len(sources) > MOST_SOURCES else ""
    return [
        figures.rows(
            "Accuracy by source", f"The source of the pairs, with its 95% interval; dashed: chance.{more}", "accuracy",
            sources[:MOST_SOURCES], estimates, level=0.5,
        )
    ]  # fmt: skip


def _ratios(pairs: Sequence[Mapping[str, Any]]) -> list[Drawing]:
    if not pairs:
        return []
    if "policy_logps_chosen" in pairs[0]:
        chosen, rejected = (
            column(pairs, f"policy_logps_{side}") - column(pairs, f"reference_logps_{side}")
            for side in ("chosen", "rejected")
        )
        title, unit = "Change of chosen against rejected", "log-ratio of {}, nats"
        says = "by how much the policy made each response likelier than the reference has it"
    else:
        chosen, rejected = column(pairs, "reward_chosen"), column(pairs, "reward_rejected")
        title, unit, says = "Reward of chosen against rejected", "reward of {}", "its two rewards"
    if not (np.isfinite(chosen) & np.isfinite(rejected)).any():
        return []
    caption = (
        f"For every pair, {says}. Pairs below the dashed line are right. The deeper the color, the more pairs; what "
        "lies further out is in the outermost cells."
    )
    return [figures.density(title, caption, (unit.format("chosen"), unit.format("rejected")), chosen, rejected)]


def _answers(report: Mapping[str, Any]) -> list[Drawing]:
    lengths = [estimate_in(report, name) for name in ("samples/reference_length", "samples/length")]
    if not all(math.isfinite(one[0]) for one in lengths):
        return []
    caption = "Mean length of the generated answers, before and after training, with 95% intervals where known."
    names, colors = ["reference (before)", "policy (after)"], [figures.SERIES[1], figures.SERIES[0]]
    return [figures.rows("Length of answers", caption, "tokens an answer", names, lengths, colors=colors)]


def _scales(report: Mapping[str, Any]) -> list[Drawing]:
    scales = report.get("scales") or []
    places = [number(one["scale"]) for one in scales]
    found = []
    for title, name, unit, level in (
        ("Accuracy by adapter scale", "rewards/accuracies", "accuracy", 0.5),
        ("KL by adapter scale", "samples/kl", "KL, nats a response", None),
    ):
        estimates = [triple(one.get(name)) for one in scales]
        if any(math.isfinite(one[0]) for one in estimates):
            caption = (
                "The adapter's change times this scale, without training: 0 is the reference, 1 the trained model."
            )
            found.append(figures.points(title, caption, ("scale", unit), places, estimates, level=level, joined=True))
    return found


def metric_rows(report: Mapping[str, Any]) -> list[tuple[str, Triple]]:
    """Each metric of the pairs that the report has, with its interval."""
    return [(label, estimate_in(report, name)) for label, name in METRICS if name in report]


def source_rows(report: Mapping[str, Any], pairs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Triple]]]:
    """Accuracy, margin and loss of each source that the report has."""
    sources = [source for source in sources_of(pairs) if f"loss/{source}" in report]
    return [(source, [estimate_in(report, f"{name}/{source}") for _, name in MAIN]) for source in sources]


def sample_rows(report: Mapping[str, Any]) -> list[tuple[str, Triple, Triple]]:
    """Each metric of the generated answers: of the policy, and of the reference where it has one."""
    return [
        (label, estimate_in(report, name), estimate_in(report, of_reference or ""))
        for label, name, of_reference in SAMPLES
        if report.get(name) is not None
    ]


def harness_rows(report: Mapping[str, Any]) -> list[tuple[str, str, Triple, Triple, Triple]]:
    """Of every result of the benchmarks: task, metric, policy, reference and their difference."""
    found = []
    for task, scores in (report.get("harness") or {}).items():
        for metric, apart in scores["difference"].items():
            measure, _, filter_name = metric.partition(",")
            both = [(number(scores[who].get(metric)), math.nan, math.nan) for who in ("policy", "reference")]
            found.append((task, measure if filter_name == "none" else metric, *both, triple(apart)))
    return found


def colored(examples: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[float]]:
    """The best and worst pairs with the color class of each token, and the log-ratios at which colors change.

    Colors reach up to the 95th percentile of |log-ratio| over all tokens shown.
    """
    every = [
        abs(number(ratio)) for example in examples for side in ("chosen", "rejected") for _, ratio in example[side]
    ]
    known = [one for one in every if math.isfinite(one)]
    reach = float(np.quantile(known, 0.95)) if known else 0.0
    edges = [reach * (2 * step + 1) / (2 * STEPS) for step in range(STEPS)]

    def token(text: str, value: Any) -> tuple[str, str, str]:
        ratio = number(value)
        depth = sum(abs(ratio) > edge for edge in edges) if reach > 0 else 0
        shade = f"{'p' if ratio > 0 else 'n'}{depth}" if depth else ""
        return text, shade, f"{ratio:+.2f}" if math.isfinite(ratio) else ""

    sides = ("chosen", "rejected")
    found = [{**example, **{side: [token(*one) for one in example[side]] for side in sides}} for example in examples]
    return found, edges
