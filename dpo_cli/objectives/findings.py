"""The verdict: how a run went, in words, from the metrics it logged.

The rules are a table that belongs to the objective. Each looks at the history alone and, where it holds, gives a reason
with its numbers and the next experiment. One red finding makes the run red, one yellow makes it yellow; none makes it
green.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_cli.console.text import plural, significant
from dpo_cli.theory.statistics import Estimate, proportion_estimate

MOVED = 0.02  # nats a token by which a response must change before a policy reads as moved
FAR = 0.3  # nats a token by which the chosen response may fall before the model reads as damaged


@dataclass(frozen=True)
class History:
    """The records of metrics.jsonl, and the hyperparameters a verdict speaks of."""

    train: list[dict[str, Any]]  # steps 1 and later
    held_out: list[dict[str, Any]]
    held_out_pairs: int
    lr: float
    beta: float
    start_loss: float  # before the first update: ln 2 for DPO, something else for most other losses

    @classmethod
    def of(cls, records: list[dict[str, Any]], held_out_pairs: int, lr: float, beta: float) -> "History":
        """From the lines of metrics.jsonl, the one of step 0 first."""
        of_training = [record for record in records if record["split"] == "train"]
        train = [record for record in of_training if record["step"] > 0]
        held_out = [record for record in records if record["split"] == "eval"]
        start_loss = float(of_training[0]["loss"]) if of_training else math.log(2)
        return cls(train, held_out, held_out_pairs, lr, beta, start_loss)

    def late(self, key: str) -> float:
        """The mean of a train metric over the last quarter of the logged steps."""
        values = [float(record[key]) for record in self.train if key in record]
        last = values[-max(1, len(values) // 4) :]
        return sum(last) / len(last) if last else 0.0

    def last(self, key: str) -> float:
        """A train metric at the last logged step."""
        return float(self.train[-1].get(key, 0.0)) if self.train else 0.0

    @property
    def evaluated(self) -> bool:
        """Whether held-out pairs were scored."""
        return bool(self.held_out) and self.held_out_pairs > 0

    @property
    def accuracy(self) -> Estimate:
        """Held-out accuracy at the end with its 95% interval."""
        share = float(self.held_out[-1]["rewards/accuracies"])
        return proportion_estimate(share * self.held_out_pairs, self.held_out_pairs)

    @property
    def margin(self) -> float:
        """Held-out margin at the end; the late train margin where nothing is held out."""
        return float(self.held_out[-1]["rewards/margins"]) if self.evaluated else self.late("rewards/margins")

    @property
    def moved(self) -> float:
        """The larger change of a response's log-prob since the start, in nats a token."""
        return max(abs(self.last("drift/chosen_per_token")), abs(self.last("drift/rejected_per_token")))


@dataclass(frozen=True)
class Finding:
    """A rule that holds: how grave, why, and what to try next."""

    name: str
    color: str  # yellow or red
    reason: str
    next_step: str


@dataclass(frozen=True)
class Verdict:
    """The color of a run with its findings, gravest first; green has none."""

    color: str
    findings: list[Finding]
    summary: str

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "color": self.color,
            "summary": self.summary,
            "findings": [vars(finding) for finding in self.findings],
        }


@dataclass(frozen=True)
class FindingRule:
    """When a finding holds and what it says."""

    name: str
    color: str
    holds: Callable[[History], bool]
    reason: Callable[[History], str]
    next_step: Callable[[History], str]


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"


def _wrong_way(h: History) -> bool:
    return h.evaluated and h.accuracy.high < 0.5


def _lr_too_high(h: History) -> bool:
    fell = h.last("drift/chosen_per_token") < -FAR
    worse = h.evaluated and float(h.held_out[-1]["loss"]) > 1.5 * h.start_loss
    spiked = len(h.train) > 8 and max(float(r["loss"]) for r in h.train[4:]) > 3 * h.start_loss
    return fell or worse or spiked


def _not_learning(h: History) -> bool:
    small = abs(h.margin) < 0.05
    at_chance = not h.evaluated or h.accuracy.low < 0.5 < h.accuracy.high
    return small and at_chance and not _wrong_way(h)


def _overfit(h: History) -> bool:
    if not h.evaluated:
        return False
    gap = h.late("rewards/accuracies") - h.accuracy.mean
    return gap > 0.15 and h.late("rewards/accuracies") > h.accuracy.high


def _separable(h: History) -> bool:
    early = [float(record["rewards/accuracies"]) for record in h.train[: max(1, len(h.train) // 2)]]
    tail = early[len(early) // 2 :]
    return h.evaluated and h.accuracy.mean > 0.98 and sum(tail) / len(tail) > 0.95 and len(h.train) >= 8


def finding_rules(in_nats: bool, loss: str = "sigmoid") -> tuple[FindingRule, ...]:
    """The rules for scores that are log-probs (`in_nats`), whose changes are drift, or rewards; and for a loss."""

    def overfit(h: History) -> bool:
        hardly_moved = in_nats and h.moved < MOVED  # a policy that has not moved has not memorised anything
        return not hardly_moved and _overfit(h)

    return (
        FindingRule(
            "skipped_updates",
            "red",
            lambda h: bool(h.train) and 10 * float(h.train[-1].get("skipped_steps", 0)) > float(h.train[-1]["step"]),
            lambda h: f"{h.train[-1]['skipped_steps']} of {h.train[-1]['step']} updates were left out as not finite",
            lambda h: f"optimizer.lr={significant(h.lr / 10)}, or model.dtype=float32",
        ),
        FindingRule(
            "wrong_way",
            "red",
            _wrong_way,
            lambda h: (
                f"held-out accuracy is {_percent(h.accuracy.mean)}, below one half beyond chance: the policy prefers "
                "the rejected responses"
            ),
            lambda h: (
                "look whether the columns chosen and rejected are swapped (data.columns.chosen, data.columns.rejected)"
            ),
        ),
        FindingRule(
            "lr_too_high",
            "red",
            _lr_too_high,
            lambda h: (
                f"the learning rate {h.lr:g} looks too high: "
                + (
                    f"chosen responses changed by {h.last('drift/chosen_per_token'):+.2f} nats a token since the "
                    "start, "
                    if in_nats
                    else ""
                )
                + f"the worst loss was {max(float(r['loss']) for r in h.train):.2f}"
                + ("; the model's own answers are likely damaged" if in_nats else "")
            ),
            lambda h: (
                f"optimizer.lr={h.lr / 10:g}"
                + ("; read answers with dpo-eval samples=5 before trusting the accuracy" if in_nats else "")
            ),
        ),
        FindingRule(
            "not_learning",
            "yellow",
            lambda h: _not_learning(h) and h.moved < MOVED and not overfit(h),
            lambda h: (
                f"nothing was learned: the margin is {h.margin:.3g}"
                + (
                    f" and no response moved by more than {h.moved:.3f} nats a token, so the weights hardly moved"
                    if in_nats
                    else ""
                )
            ),
            lambda h: f"optimizer.lr={5 * h.lr:g}, or more steps",
        ),
        FindingRule(
            "not_separating",
            "yellow",
            lambda h: _not_learning(h) and h.moved >= MOVED and not overfit(h),
            lambda h: (
                f"nothing was learned: responses moved by {h.moved:.2f} nats a token, yet chosen and rejected alike "
                f"(margin {h.margin:.3g}); the labels look random to this model"
            ),
            lambda h: "read twenty pairs and judge them yourself; then more pairs or a larger model",
        ),
        FindingRule(
            "overfit",
            "yellow",
            overfit,
            lambda h: (
                f"accuracy is {_percent(h.late('rewards/accuracies'))} on training pairs and "
                f"{_percent(h.accuracy.mean)} on held-out ones: the model has memorised the pairs"
            ),
            lambda h: "fewer epochs, " + (f"or beta={2 * h.beta:g}, " if in_nats else "") + "or more pairs",
        ),
        FindingRule(
            "chance",
            "yellow",
            lambda h: (
                h.evaluated and h.accuracy.low <= 0.5 <= h.accuracy.high and not _not_learning(h) and not overfit(h)
            ),
            lambda h: f"{plural(h.held_out_pairs, 'held-out pair')} cannot tell this accuracy from a coin's",
            lambda h: "more held-out pairs (data.eval, data.eval_fraction), before anything is believed",
        ),
        FindingRule(
            "separable",
            "yellow",
            _separable,
            lambda h: (
                f"held-out accuracy is {_percent(h.accuracy.mean)} and training was nearly there in its first half: "
                "something easy, such as length or a stock phrase, gives the label away"
            ),
            lambda h: "look at the pairs for what always differs; a harder set says more about the model",
        ),
        FindingRule(
            "length_driven",
            "yellow",
            lambda h: abs(h.last("drift/margin_length_correlation")) > 0.8 and h.last("drift/pairs") >= 64,
            lambda h: (
                f"the margin follows the length gap (correlation {h.last('drift/margin_length_correlation'):+.2f}): "
                "the model may have learned a length, not a preference"
            ),
            lambda h: (
                "loss=sigmoid_norm beta=2 on the same pairs, and compare the lengths of generated answers"
                if in_nats
                else "balance the lengths of the pairs"
            ),
        ),
        FindingRule(
            "saturated",
            "yellow",
            lambda h: loss == "sigmoid" and h.last("drift/saturated") > 0.5,
            lambda h: (
                f"{_percent(h.last('drift/saturated'))} of the last pairs had a gradient weight under 0.01: "
                "the later steps taught nothing"
            ),
            lambda h: "fewer steps reach the same; harder pairs would teach more",
        ),
    )


def assess(history: History, rules: Sequence[FindingRule]) -> Verdict:
    """The verdict on a run."""
    if not history.train:
        nothing = Finding("nothing_trained", "red", "every update was left out as not finite", "model.dtype=float32")
        return Verdict("red", [nothing], "no update was made")
    findings = [
        Finding(rule.name, rule.color, rule.reason(history), rule.next_step(history))
        for rule in rules
        if rule.holds(history)
    ]
    findings.sort(key=lambda finding: finding.color != "red")
    color = findings[0].color if findings else "green"
    if history.evaluated:
        accuracy = history.accuracy
        summary = (
            f"held-out accuracy {accuracy.mean:.3g} (95% interval {accuracy.low:.2g} to {accuracy.high:.2g}, "
            f"{plural(history.held_out_pairs, 'pair')}), margin {history.margin:.3g}"
        )
    else:
        summary = f"no held-out pairs, so nothing says that it generalises; train margin {history.margin:.3g}"
        color = "yellow" if color == "green" else color  # green would claim that it generalises
    return Verdict(color, findings, summary)
