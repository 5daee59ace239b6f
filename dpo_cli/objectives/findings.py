"""The verdict: how a run went, in words, from the metrics it logged.

The rules are a table that belongs to the objective. Each looks at the history alone and, where it holds, gives a reason
with its numbers and the next experiment. One red finding makes the run red, one yellow makes it yellow; none makes it
green. Green claims that on held-out pairs the loss is lower than at the start, the margin above 0 and the accuracy
above one half, each beyond its 95% interval, and that the margin is large enough to matter.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_cli.console.text import interval, significant
from dpo_cli.data.leaks import CONSEQUENCE, REMEDY
from dpo_cli.objectives.alarms import LIMITS, USUAL, of_length
from dpo_cli.objectives.answers import ANSWER_RULES, LONGER, AnswerRule
from dpo_cli.objectives.drift import SATURATED
from dpo_cli.objectives.history import ACCURACY, IMPROVEMENT, MATTERS, WITH_INTERVALS, History
from dpo_cli.theory.statistics import Estimate


@dataclass(frozen=True)
class Finding:
    """A rule that holds: how serious, why, and what to try next."""

    name: str
    color: str  # yellow or red
    reason: str
    next_step: str


@dataclass(frozen=True)
class Verdict:
    """The color of a run with its findings, red before yellow; green has none."""

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


def _range(estimate: Estimate) -> str:
    return interval(estimate.low, estimate.high, digits=2)


def _wrong_way(h: History) -> bool:
    return h.evaluated and h.at_end(ACCURACY).high < 0.5


def _exploded(h: History) -> bool:
    worse = h.worse and float(h.held_out[-1]["loss"]) > 1.5 * h.start_loss
    spiked = len(h.train) > 8 and max(float(r["loss"]) for r in h.train[4:]) > 3 * h.start_loss
    return worse or spiked


def _nothing_learned(h: History) -> bool:
    """No held-out improvement and no margin; without held-out pairs, no training margin and low training accuracy."""
    if h.evaluated:
        return not (h.better or h.worse or h.matters or _wrong_way(h))
    return not h.matters and h.late(ACCURACY) < 0.6


def _overfit(h: History) -> bool:
    if not h.evaluated or h.still:
        return False
    accuracy = h.at_end(ACCURACY)
    return h.late(ACCURACY) - accuracy.mean > 0.15 and h.late(ACCURACY) > accuracy.high


def _separable(h: History) -> bool:
    early = [float(record[ACCURACY]) for record in h.train[: max(1, len(h.train) // 2)]]
    tail = early[len(early) // 2 :]
    return h.evaluated and h.at_end(ACCURACY).mean > 0.98 and sum(tail) / len(tail) > 0.95 and len(h.train) >= 8


def _of_length(h: History) -> str | None:
    return of_length(
        h.last("drift/margin_length_correlation"), h.train[-1].get("drift/chosen_longer", 0.5), h.last("drift/pairs")
    )


def _next_of_size(h: History) -> str:
    if h.margin >= MATTERS[0]:
        return f"beta={significant(h.beta / 10)}: a large beta holds the policy at the reference"
    return f"optimizer.lr={5 * h.lr:g}, or more steps"


# What to try next where generated answers show a fault.
OF_ANSWERS: dict[str, Callable[[History], str]] = {
    "repetitive": lambda h: f"optimizer.lr={h.lr / 10:g}; read the answers in samples/ before trusting the accuracy",
    "rambling": lambda h: (
        f"budget.length={LONGER:g} keeps the last step before; loss=sigmoid_norm beta=2 counts log-ratios a token"
    ),
    "unending": lambda h: (
        "read the answers in samples/; a larger samples.max_new_tokens shows whether they end later; "
        f"optimizer.lr={h.lr / 5:g}"
    ),
    "answers_far": lambda h: (
        f"budget.kl=10 keeps the last step before; or beta={2 * h.beta:g}; read the answers in samples/"
    ),
}


def _of_answers(rule: AnswerRule, next_step: Callable[[History], str]) -> FindingRule:
    """A rule on generated answers as one on the run that has generated them at its end."""
    return FindingRule(
        rule.name,
        rule.color,
        lambda h: bool(h.answers) and rule.holds(h.answers),
        lambda h: rule.reason(h.answers),
        next_step,
    )


_RULES = (
    FindingRule(
        "leak",
        "yellow",
        lambda h: bool(h.leaks),
        lambda h: f"held-out pairs are also in training ({h.leaks}): {CONSEQUENCE}",
        lambda h: f"{REMEDY}; or hold out pairs of other prompts",
    ),
    FindingRule(
        "skipped_updates",
        "red",
        lambda h: 10 * h.last("skipped_steps") > h.last("step"),
        lambda h: f"{h.train[-1]['skipped_steps']} of {h.train[-1]['step']} updates were left out as not finite",
        lambda h: f"optimizer.lr={significant(h.lr / 10)}, or model.dtype=float32",
    ),
    FindingRule(
        "wrong_way",
        "red",
        _wrong_way,
        lambda h: (
            f"held-out accuracy is {_percent(h.at_end(ACCURACY).mean)}, below one half by more than chance: the policy "
            "prefers the rejected responses"
        ),
        lambda h: (
            "check whether the columns chosen and rejected are swapped (data.columns.chosen, data.columns.rejected)"
        ),
    ),
    FindingRule(
        "lr_too_high",
        "red",
        _exploded,
        lambda h: (
            f"the learning rate {h.lr:g} looks too high: the loss was {significant(h.start_loss)} at the start, "
            f"{max(float(r['loss']) for r in h.train):.2f} at its worst"
            + (f", and is {significant(float(h.held_out[-1]['loss']))} on held-out pairs" if h.evaluated else "")
        ),
        lambda h: f"optimizer.lr={h.lr / 10:g}",
    ),
    FindingRule(
        "worse",
        "yellow",
        lambda h: h.worse and not _wrong_way(h) and not _exploded(h) and not _overfit(h),
        lambda h: (
            f"the held-out loss is higher than at the start by {significant(-h.at_end(IMPROVEMENT).mean)}: what was "
            "learned of the training pairs does not hold for others"
        ),
        lambda h: "read twenty pairs and judge them yourself; fewer epochs, or more pairs",
    ),
    FindingRule(
        "too_small",
        "yellow",
        lambda h: h.better and not h.matters and not _wrong_way(h),
        lambda h: (
            f"the direction is right, the step too small: margin {significant(h.margin)}"
            + (
                f", {significant(h.margin / h.beta)} nats a response; responses moved by {h.moved:.2g} nats a token"
                if h.moved is not None
                else ""
            )
        ),
        _next_of_size,
    ),
    FindingRule(
        "not_learning",
        "yellow",
        lambda h: _nothing_learned(h) and (h.still or not h.in_nats) and not _overfit(h),
        lambda h: (
            f"nothing was learned: the margin is {significant(h.margin)}"
            + (f", and the last training pairs moved by {h.moved:.2g} nats a token" if h.moved is not None else "")
        ),
        _next_of_size,
    ),
    FindingRule(
        "not_separating",
        "yellow",
        lambda h: _nothing_learned(h) and h.in_nats and not h.still and not _overfit(h),
        lambda h: (
            f"nothing was learned: responses moved by {h.moved:.2f} nats a token, yet chosen and rejected alike "
            f"(margin {significant(h.margin)}, {significant(h.margin / h.beta)} nats a response); the labels look "
            "random to this model"
        ),
        lambda h: "read twenty pairs and judge them yourself; then more pairs or a larger model",
    ),
    FindingRule(
        "overfit",
        "yellow",
        _overfit,
        lambda h: (
            f"accuracy is {_percent(h.late(ACCURACY))} on training pairs and {_percent(h.at_end(ACCURACY).mean)} on "
            "held-out ones: the model has memorised the pairs"
        ),
        lambda h: "fewer epochs, " + (f"or beta={2 * h.beta:g}, " if h.in_nats else "") + "or more pairs",
    ),
    FindingRule(
        "chance",
        "yellow",
        lambda h: h.evaluated and not (h.better or h.worse or _wrong_way(h) or _nothing_learned(h) or _overfit(h)),
        lambda h: (
            f"{h.held_out_words} cannot tell this result from no change: accuracy {_range(h.at_end(ACCURACY))}, loss "
            f"lower by {_range(h.at_end(IMPROVEMENT))}"
        ),
        lambda h: "more held-out pairs (data.eval, data.eval_fraction): until then do not rely on this result",
    ),
    FindingRule(
        "separable",
        "yellow",
        _separable,
        lambda h: (
            f"held-out accuracy is {_percent(h.at_end(ACCURACY).mean)} and training was nearly there in its first "
            "half: something simple, such as length or a fixed phrase, shows which response is chosen"
        ),
        lambda h: "look at the pairs for what always differs; a harder set says more about the model",
    ),
    FindingRule(
        "length_driven",
        "yellow",
        lambda h: _of_length(h) is not None,
        lambda h: f"{_of_length(h)}: the model may have learned length, not a preference",
        lambda h: (
            "loss=sigmoid_norm beta=2 on the same pairs, and compare the lengths of generated answers"
            if h.in_nats
            else "balance the lengths of the pairs"
        ),
    ),
    *(_of_answers(rule, OF_ANSWERS[rule.name]) for rule in ANSWER_RULES),
    FindingRule(
        "saturated",
        "yellow",
        lambda h: h.last("drift/saturated") > 0.5,
        lambda h: (
            f"{_percent(h.last('drift/saturated'))} of the last pairs had a gradient weight below {SATURATED:g} (0.5 "
            "at the start): the later steps taught almost nothing"
        ),
        lambda h: "fewer steps give the same result; harder pairs would teach more",
    ),
)


def finding_rules(loss: str = "sigmoid") -> tuple[FindingRule, ...]:
    """The rules of a loss. A reward model takes those of DPO; those on nats never hold, as it logs no nats."""
    limits = LIMITS.get(loss, USUAL)
    damaged = FindingRule(
        "damaged",
        "red",
        lambda h: limits.has_fallen(h.last("drift/chosen_per_token"), h.last("drift/chosen_per_response")),
        lambda h: (
            f"chosen responses lost {-h.last('drift/chosen_per_response'):.0f} nats each "
            f"({-h.last('drift/chosen_per_token'):.2f} a token) since the start: the model's own answers are likely "
            "damaged"
        ),
        lambda h: f"optimizer.lr={h.lr / 10:g}; read answers with dpo-eval samples=5 before trusting the accuracy",
    )
    warned = FindingRule(
        "warned",
        "yellow",
        lambda h: h.ruin is not None and not damaged.holds(h),
        lambda h: f"the monitor warned on the way: {h.ruin}",
        lambda h: f"optimizer.lr={h.lr / 5:g}; read answers with dpo-eval samples=5 before trusting the accuracy",
    )
    return (damaged, warned, *_RULES)


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
    moved = f", {history.moved:.2g} nats a token moved" if history.moved is not None else ""
    if history.evaluated:
        accuracy, margin, lower = (history.at_end(name) for name in WITH_INTERVALS)
        summary = (
            f"accuracy {accuracy.mean:.3g} ({_range(accuracy)}), margin {margin.mean:.3g} ({_range(margin)}){moved}, "
            f"loss {significant(history.start_loss)} at the start, lower by {significant(lower.mean, 2)} "
            f"({_range(lower)}); {history.held_out_words}"
        )
    else:
        summary = f"no held-out pairs, so nothing says that it generalises; train margin {history.margin:.3g}{moved}"
        color = "yellow" if color == "green" else color  # green would claim that it generalises
    return Verdict(color, findings, summary)
