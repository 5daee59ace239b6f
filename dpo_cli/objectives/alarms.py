"""Alarms: what the monitor says during training, each with its reason and what usually helps.

The rules are a table for each objective. A rule reads only the `Drift` of the last units, which training has computed
anyway.
"""

from collections.abc import Callable
from dataclasses import dataclass

from dpo_cli.objectives.drift import Drift

ENOUGH = 32  # units before an alarm may sound: a single batch proves nothing


@dataclass(frozen=True)
class Alarm:
    """A rule that holds, and what it says."""

    name: str
    text: str


@dataclass(frozen=True)
class AlarmRule:
    """When an alarm sounds, and what it says."""

    name: str
    holds: Callable[[Drift], bool]
    says: Callable[[Drift], str]
    ruins: bool = False  # whether monitor=stop ends the run for it


def _follows_length(drift: Drift) -> bool:
    return abs(drift.margin_length_correlation) > 0.8 and drift.pairs >= 2 * ENOUGH


_SATURATED = AlarmRule(
    "saturated",
    lambda d: d.saturated > 0.9,
    lambda d: (
        f"{100 * d.saturated:.0f}% of the pairs have a gradient weight under 0.01: "
        "more steps teach almost nothing; this run could have stopped here"
    ),
)

_PREFERENCE = (
    AlarmRule(
        "displacement",
        lambda d: d.chosen_per_token < -0.3 and d.margin > 0,
        lambda d: (
            f"chosen fell {-d.chosen_nats:.0f} nats a response ({-d.chosen_per_token:.2f} a token) while the margin "
            "grows: likelihood displacement; a smaller optimizer.lr or loss.sft_weight=0.1 usually stops it"
        ),
        ruins=True,
    ),
    AlarmRule(
        "crossed",
        lambda d: d.chosen_per_token < -0.02 and d.rejected_per_token > 0.02,
        lambda d: (
            f"chosen falls ({d.chosen_per_token:.2f} nats a token) and rejected rises ({d.rejected_per_token:+.2f}): "
            "the policy moves the wrong way; are data.columns.chosen and data.columns.rejected swapped?"
        ),
        ruins=True,
    ),
    AlarmRule(
        "far",
        lambda d: d.kl_per_token > 0.25,
        lambda d: (
            f"the policy is {d.kl_per_token:.2f} nats a token from the reference (KL estimate): answers tend to break "
            "here; a larger beta or a smaller optimizer.lr keeps it closer"
        ),
        ruins=True,
    ),
    AlarmRule(
        "length",
        _follows_length,
        lambda d: (
            f"the margin follows the length gap (correlation {d.margin_length_correlation:+.2f}): the policy may learn "
            f"to be {'longer' if d.margin_length_correlation > 0 else 'shorter'} and little else; compare "
            "loss=sigmoid_norm beta=2, or balance the lengths of the pairs"
        ),
    ),
)

# Of a reward model: its rewards are not log-probs, so no alarm speaks of nats or of the reference.
REWARD_ALARMS = (
    AlarmRule(
        "length",
        _follows_length,
        lambda d: (
            f"the margin follows the length gap (correlation {d.margin_length_correlation:+.2f}): the reward may be "
            f"for {'longer' if d.margin_length_correlation > 0 else 'shorter'} answers and little else; balance the "
            "lengths of the pairs"
        ),
    ),
    _SATURATED,
)


def preference_alarms(loss: str) -> tuple[AlarmRule, ...]:
    """The alarms that hold for a preference loss."""
    # Gradient weights are those of DPO: with another loss a small one means nothing.
    return (*_PREFERENCE, _SATURATED) if loss == "sigmoid" else _PREFERENCE
