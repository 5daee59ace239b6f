"""Tables of report.json as text: the console and the page show the same ones."""

from collections import Counter
from typing import Any

from dpo_cli.console.text import interval, plural, significant
from dpo_cli.data.report import columns_not_used

SIDES = ("prompt", "chosen", "rejected")
Table = tuple[list[str], list[list[str]]]  # headings, and the cells of each row


def share(estimate: dict[str, Any]) -> str:
    """A mean with its interval, in words."""
    low, high = (float("nan") if end is None else end for end in estimate["interval95"])
    mean = "not known" if estimate["mean"] is None else significant(estimate["mean"])
    return f"{mean} ({interval(low, high)})"


def lengths(tokens: dict[str, Any]) -> Table:
    """Mean and quantiles of the tokens of prompt, chosen and rejected."""
    names = list(tokens["lengths"]["prompt"])
    return ["", *names], [[side, *(f"{tokens['lengths'][side][name]:,.0f}" for name in names)] for side in SIDES]


def max_lengths(tokens: dict[str, Any], now: int) -> Table:
    """What each max_length drops, cuts and costs; a star marks the one of the config."""
    keys = ("prompt_too_long", "prompts_cut", "responses_cut", "tokens_per_epoch")
    rows = [
        [f"{one['max_length']:,}{'*' if one['max_length'] == now else ''}", *(f"{one[key]:,}" for key in keys)]
        for one in tokens["max_length"]
    ]
    return ["max_length (* now)", "pairs dropped", "prompts cut", "responses cut", "tokens an epoch"], rows


def phrases(words: dict[str, Any]) -> Table:
    """The phrases that predict the label best; the first two columns are text."""
    rows = [
        [one["phrase"], "chosen" if one["weight"] > 0 else "rejected", f"{one['weight']:+.2f}",
         f"{100 * one['in_chosen']:.1f}%", f"{100 * one['in_rejected']:.1f}%"]
        for one in words["phrases"]
    ]  # fmt: skip
    return ["phrase", "predicts", "weight", "in chosen", "in rejected"], rows


def scores(score: dict[str, Any]) -> list[tuple[str, str]]:
    """What the reference model says of the pairs, a line each."""
    labels = {
        "nats a token, chosen": "nats_per_token_chosen",
        "nats a token, rejected": "nats_per_token_rejected",
        "ordered rightly already, by sums": "ordered_by_sum",
        "ordered rightly already, per token": "ordered_per_token",
        "tokens that both responses share": "token_overlap",
    }
    return [
        *((label, share(score[key])) for label, key in labels.items()),
        ("nearly the same responses", plural(score["overlapping"], "pair")),
        ("equally likely responses", plural(score["alike"], "pair")),
    ]


def columns_read(side: dict[str, Any]) -> list[str]:
    """What a side's rows have besides texts, a sentence each: soft labels, and columns that nothing reads."""
    soft = f"{plural(side['soft_labels'], 'row')} with a soft label; data.soft_labels=false takes it as certain"
    unused = f"not used: {columns_not_used(Counter(side['not_used']))}{side['not_used_form']}"
    return [*([soft] if side["soft_labels"] else []), *([unused] if side["not_used"] else [])]
