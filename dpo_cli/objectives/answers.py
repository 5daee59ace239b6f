"""What generated answers show: loops, rambling, no end, too far from the reference.

The rules go by 95% intervals, and by the reference's own answers: a base model seldom ends one by itself. Answers are
their metrics by name without `samples/`: `kl`, `length_ratio`, `reference_ends` and so on.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dpo_cli.console.text import interval, significant
from dpo_cli.theory.statistics import Estimate

Answers = Mapping[str, Estimate]

PREFIX = "samples/"  # of these metrics in metrics.jsonl and report.json
LONGER = 1.5  # times the reference's length
REPEATED = 0.1  # share of repeated 4-grams beyond the reference's
FAR = (20.0, 0.3)  # nats a response and nats a token from the reference, both


@dataclass(frozen=True)
class AnswerRule:
    """When answers show a fault, and what is said of it."""

    name: str
    color: str  # yellow or red
    holds: Callable[[Answers], bool]
    reason: Callable[[Answers], str]


def answers_in(estimates: Mapping[str, Estimate]) -> Answers:
    """The metrics of generated answers among others; empty where none were generated."""
    return {name.removeprefix(PREFIX): found for name, found in estimates.items() if name.startswith(PREFIX)}


def _repeats(of: Answers) -> bool:
    return of["repetition"].low > of["reference_repetition"].high + REPEATED


def _alike(of: Answers) -> bool:
    return of["distinct_2"].high < of["reference_distinct_2"].low / 2


def _far(of: Answers) -> bool:
    return of["kl"].low > max(FAR[0], FAR[1] * of["length"].mean)


def _percent(found: Estimate) -> str:
    return f"{100 * found.mean:.0f}%"


def _with_range(found: Estimate) -> str:
    return f"{significant(found.mean, 2)} ({interval(found.low, found.high, digits=2)})"


ANSWER_RULES = (
    AnswerRule(
        "repetitive",
        "red",
        lambda of: _repeats(of) or _alike(of),
        lambda of: (
            f"generated answers repeat themselves: {_percent(of['repetition'])} of their 4-grams stand in them before "
            f"({_percent(of['reference_repetition'])} in the reference's answers), and {_percent(of['distinct_2'])} of "
            f"all pairs of tokens are distinct ({_percent(of['reference_distinct_2'])})"
        ),
    ),
    AnswerRule(
        "rambling",
        "yellow",
        lambda of: of["length_ratio"].low > LONGER,
        lambda of: (
            f"generated answers are {_with_range(of['length_ratio'])} times as long as the reference's: "
            f"{significant(of['length'].mean)} tokens, the reference's {significant(of['reference_length'].mean)}"
        ),
    ),
    AnswerRule(
        "unending",
        "yellow",
        lambda of: of["ends"].high < of["reference_ends"].low / 2,
        lambda of: (
            f"{_percent(of['ends'])} of the generated answers end by themselves "
            f"({interval(of['ends'].low, of['ends'].high, digits=2)}), of the reference's "
            f"{_percent(of['reference_ends'])}"
        ),
    ),
    AnswerRule(
        "answers_far",
        "yellow",
        _far,
        lambda of: (
            f"generated answers are {_with_range(of['kl'])} nats each from the reference, "
            f"{significant(of['kl'].mean / of['length'].mean, 2)} a token: over-optimised, whatever the accuracy"
        ),
    ),
)
