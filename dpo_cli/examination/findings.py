"""The worst findings of an examination, each with the next step."""

import math
import shlex
from dataclasses import dataclass
from typing import Any

from dpo_cli.console.text import plural, significant
from dpo_cli.examination.reading import OF_PAIRS

CUT = 0.02  # a share of cut responses, above which it is a finding
BIASED = 0.55  # a share of labels that length or words predict, above which it is a finding


@dataclass(frozen=True)
class Finding:
    """One finding."""

    name: str
    text: str
    next: str  # a command or an override, with what it does


def findings(report: dict[str, Any], fixed: str | None, max_bad_fraction: float) -> list[Finding]:
    """The findings of a report, the worst first; `fixed` is the file that `fix=` names.

    `max_bad_fraction` is the share of bad rows that a run accepts.
    """
    train = report["train"]
    dropped, tokens, bias = train["dropped"], report["tokens"], report["bias"]
    found: list[Finding] = []
    mended = {reason: dropped[reason] for reason in ("bad_row", *OF_PAIRS) if dropped.get(reason)}
    if mended:
        listed = ", ".join(f"{reason} {number:,}" for reason, number in mended.items())
        words = report["data"]["overrides"]
        step = f"dpo-data {shlex.join([*words, 'fix=cleaned.jsonl'])} writes the others"
        if fixed is not None:
            others = [word for word in words if not word.startswith("data.train=")]
            step = f"dpo-train {shlex.join([*others, f'data.train={fixed}'])}"
        elif set(mended) == {"tie"}:
            step = "dpo-train leaves them out; data.ties=half trains on them with probability 1/2"
        of = plural(train["rows"], "row")
        if train["pairs"] + dropped.get("bad_row", 0) != train["rows"]:
            of += f", which make {plural(train['pairs'], 'pair')}"
        found.append(Finding("dropped", f"of {of}: {listed}", step))
    if dropped.get("bad_row") and fixed is None:
        step = "data.on_bad_row=skip drops them; without it dpo-train stops at the first"
        if dropped["bad_row"] > max_bad_fraction * train["rows"]:
            most = math.ceil(1000 * dropped["bad_row"] / train["rows"]) / 1000
            step = f"data.on_bad_row=skip data.max_bad_fraction={most:g} drops them; without it dpo-train stops"
        found.append(Finding("bad_row", f"{plural(dropped['bad_row'], 'row')} cannot be read", step))
    if (held_out := report["held_out"]) and held_out["dropped"].get("leaked"):
        text = f"{plural(held_out['dropped']['leaked'], 'held-out pair')} or their first human turns are in training"
        found.append(Finding("leaked", text, "data.eval_leaks=drop leaves them out of the evaluation"))
    if tokens:
        found += _of_lengths(tokens, report["data"]["max_length"])
    if bias:
        found += _of_bias(bias)
    near = train["near_duplicates"]
    if near > 0.01 * train["pairs"]:
        text = f"{plural(near, 'pair')} share four fifths of their word sequences with an earlier one"
        found.append(Finding("near_duplicates", text, "look at their rows in report.html; epochs=1 repeats none"))
    return found


def _of_lengths(tokens: dict[str, Any], max_length: int) -> list[Finding]:
    pairs = tokens["pairs"]
    lost = tokens["dropped"].get("prompt_too_long", 0) + tokens["dropped"].get("identical_after_truncation", 0)
    if lost + tokens["responses_cut"] / 2 <= CUT * pairs:
        return []
    enough = next(
        (one for one in tokens["max_length"]
         if one["prompt_too_long"] + one["responses_cut"] / 2 <= CUT * pairs and one["max_length"] > max_length),
        tokens["max_length"][-1],
    )  # fmt: skip
    text = (
        f"max_length={max_length} drops {plural(lost, 'pair')} and cuts {plural(tokens['responses_cut'], 'response')}"
    )
    costs = f"{_millions(enough['tokens_per_epoch'])} tokens an epoch"
    cuts = f"drops {enough['prompt_too_long']:,} and cuts {enough['responses_cut']:,}, {costs}"
    return [Finding("max_length", text, f"data.max_length={enough['max_length']} {cuts}")]


def _of_bias(bias: dict[str, Any]) -> list[Finding]:
    found = []
    longer = bias["longer_preferred"]
    low, high = (end if end is not None else 0.5 for end in longer["interval95"])
    if low > BIASED or high < 1 - BIASED:
        text = f"the longer response is preferred in {100 * longer['mean']:.0f}% of pairs: length predicts the label"
        step = "loss=sigmoid_norm compares log-probs per token; watch the lengths of completions"
        found.append(Finding("longer_preferred", text, step))
    words = bias["words"]
    if words and (words["accuracy"]["interval95"][0] or 0) > BIASED:
        mean = significant(words["accuracy"]["mean"], 2)
        text = f"a bag of words finds the chosen response in {mean} of pairs that it did not see"
        step = f"a policy that does not beat {mean} has learned no more than these words"
        found.append(Finding("words", text, step))
    return found


def _millions(number: int) -> str:
    return f"{significant(number / 1e6)}M" if number >= 1e6 else f"{number:,}"
