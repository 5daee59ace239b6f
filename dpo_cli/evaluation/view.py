"""What dpo-eval shows on the console."""

import math
from typing import Any

from dpo_cli.console.labels import MAIN, METRICS, SAMPLES, SCALES
from dpo_cli.console.reporter import Reporter
from dpo_cli.console.text import interval, plural, safe_text, significant
from dpo_cli.models.dtype import Decision, dtype_name
from dpo_cli.models.loading import ModelSource
from dpo_cli.runs.model_ref import ModelRef
from dpo_cli.theory.calibration import Bin, calibration_error
from dpo_cli.theory.statistics import Clusters, Estimate


def show_estimates(reporter: Reporter, estimates: dict[str, Estimate]) -> None:
    """Each metric that is shown, with its interval."""
    rows = []
    for label, name in METRICS:
        if name not in estimates:
            continue
        estimate = estimates[name]
        rows.append([label, significant(estimate.mean), interval(estimate.low, estimate.high)])
    reporter.grid(["metric", "mean", "95% interval"], rows)


def show_sources(reporter: Reporter, of_sources: dict[str, tuple[int, dict[str, Estimate]]]) -> None:
    """A row for each source of the pairs, where they have one."""
    if not of_sources:
        return
    rows = []
    for source, (pairs, estimates) in of_sources.items():
        accuracy, margin, loss = (estimates[name] for _, name in MAIN)
        row = [source, f"{pairs:,}", significant(accuracy.mean), interval(accuracy.low, accuracy.high)]
        rows.append([*row, significant(margin.mean), interval(margin.low, margin.high), significant(loss.mean)])
    reporter.say()
    reporter.grid(["source", "pairs", "accuracy", "95% interval", "margin", "95% interval", "loss"], rows)


def describe_clusters(prompts: Clusters) -> str:
    """What the intervals count as independent."""
    pairs, number = plural(prompts.pairs, "pair"), plural(prompts.prompts, "prompt")
    if prompts.prompts == prompts.pairs:
        return f"{pairs}, each with its own prompt"
    if prompts.prompts == 1:
        return f"{pairs} of {number}: too little for an interval"
    effective = f"effective number {prompts.effective:.1f}"
    return f"{pairs} of {number}; the intervals take prompts as independent, not pairs ({effective})"


def show_calibration(reporter: Reporter, bins: list[Bin]) -> None:
    """How often the model is right where it says how sure it is: beside each other, they should be the same."""
    if not bins:
        return
    rows = [
        [
            f"{one.low:.1f} to {one.high:.1f}",
            f"{one.confidence:.2f}",
            f"{one.right.mean:.2f}",
            f"{one.right.low:.2f} to {one.right.high:.2f}",
            f"{one.right.n:,}",
        ]
        for one in bins
    ]
    reporter.grid(["how sure", "mean", "right", "95% interval", "pairs"], rows)
    reporter.say(f"calibration error {significant(calibration_error(bins), 2)}")
    reporter.say()


def show_header(
    reporter: Reporter, ref: ModelRef, source: ModelSource, choices: tuple[Decision, Decision], data: list[str]
) -> None:
    """What is compared, and on what."""
    device, dtype = choices
    of_model = f"{safe_text(source.name)}, {source.origin}"
    rows = [("reward model", safe_text(ref.weights)), ("on", of_model)]
    if ref.objective.needs_reference:
        reference = "the model under the adapter" if ref.is_adapter else safe_text(source.name)
        rows = [("policy", safe_text(ref.weights)), ("reference", f"{reference} ({of_model})")]
    rows += [
        ("device", f"{device.value}: {device.reason}"),
        ("dtype", f"{dtype_name(dtype.value)}: {dtype.reason}"),
    ]
    if ref.objective.needs_reference:
        known = "" if ref.run else " (the checkpoint does not say)"
        rows.append(("beta", significant(ref.objective.beta) + known))
    if ref.base.trust_remote_code:
        reporter.say("trust_remote_code=true: Python of the model's authors runs on this machine", style="red")
    rows += [("data" if number == 0 else "", sentence) for number, sentence in enumerate(data)]
    reporter.facts(rows)
    reporter.say()


def show_answers(reporter: Reporter, answers: list[dict[str, str]], limit: int) -> None:
    """Each prompt with its answers beside each other."""
    if not answers:
        return
    reporter.say(f"greedy answers to {plural(len(answers), 'held-out prompt')}, at most {limit} tokens")
    rows = [
        [safe_text(one["prompt"], 200), safe_text(one["reference"], 700), safe_text(one["policy"], 700)]
        for one in answers
    ]
    reporter.side_by_side(["prompt", "reference (before)", "policy (after)"], rows)
    reporter.say()


def show_measured(reporter: Reporter, estimates: dict[str, Estimate], answers: int, limit: int) -> None:
    """What the policy writes beside the reference."""
    if not answers:
        return
    reporter.say(f"sampled answers to {plural(answers, 'held-out prompt')}, temperature 1, at most {limit} tokens")
    rows = []
    for label, of_policy, of_reference in SAMPLES:
        for text, name in ((label, of_policy), ("the reference's", of_reference)):
            if name is not None:
                one = estimates[name]
                rows.append([text, significant(one.mean), interval(one.low, one.high)])
    reporter.grid(["metric", "mean", "95% interval"], rows)
    reporter.say()


def show_scales(reporter: Reporter, scales: list[dict[str, Any]]) -> None:
    """A row for each scale of the adapter, then the answers at each."""
    if not scales:
        return
    columns = [(label, name) for label, name in SCALES if name in scales[0]]
    headings = [cell for label, _ in columns for cell in (label, "95% interval")]
    rows = []
    for one in scales:
        row = [significant(one["scale"])]
        for mean, low, high in (one[name] for _, name in columns):
            row += [significant(math.nan if mean is None else mean), interval(low, high)]
        rows.append(row)
    reporter.say("the policy with its adapter at a scale: 0 is the reference, 1 the policy as trained")
    reporter.grid(["scale", *headings], rows)
    for number, _ in enumerate(scales[0].get("answers", [])):
        reporter.say(f"answer {number + 1} at each scale")
        reporter.facts([(significant(one["scale"]), safe_text(one["answers"][number], 700)) for one in scales])
    reporter.say()
