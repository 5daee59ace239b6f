"""Alarms: what the monitor says during training, each with its reason and what usually helps.

The rules are a table for each objective. A rule reads only the `Drift` of the last units, which training has computed
anyway. A rule on changes in nats has two limits, per token and per response, and holds where both are passed: at an
ordinary margin a response of eight tokens may change by a nat per token, and one of a thousand tokens by many nats in
all.
"""

from collections.abc import Callable
from dataclasses import dataclass

from dpo_cli.objectives.drift import SATURATED, Drift

ENOUGH = 32  # units before an alarm may sound: a single batch proves nothing
LENGTH = (0.8, 0.9)  # limits: |correlation| of margin and length gap; share of pairs in which one length is chosen


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


@dataclass(frozen=True)
class Limits:
    """How far responses may change under a loss before generated answers tend to be damaged.

    A limit is (nats per token, nats per response), and both must be passed. The first of a field is for long responses,
    the second for short ones; passing one of them is enough. The numbers lie between those of the healthy and of the
    ruined runs of scripts/verdicts.py.
    """

    fallen: tuple[tuple[float, float], ...] = ((0.3, 20.0), (0.5, 4.0))  # loss of log-prob of chosen
    far: tuple[tuple[float, float], ...] = ((0.25, 40.0), (1.0, 8.0))  # KL estimate, and mean change of both responses

    def has_fallen(self, chosen_per_token: float, chosen_nats: float) -> bool:
        """Whether chosen responses have lost as much as in a model that is being ruined."""
        return any(chosen_per_token < -token and chosen_nats < -response for token, response in self.fallen)

    def is_far(self, drift: Drift) -> bool:
        """Whether the policy has gone as far from the reference as a model that is being ruined."""
        return any(drift.kl_per_token > token and drift.moved_nats > response for token, response in self.far)


USUAL = Limits()
LIMITS = {  # of losses for which the usual ones do not hold
    "apo_down": Limits(((0.8, 60.0), (3.2, 20.0)), ((1.0, 100.0), (4.0, 32.0))),  # it is made to lower chosen, too
}


def of_length(correlation: float, chosen_longer: float, pairs: float) -> str | None:
    """Why length may be all that is learned; None without a sign of it, or below 2 * ENOUGH pairs."""
    if pairs < 2 * ENOUGH:
        return None
    if max(chosen_longer, 1 - chosen_longer) > LENGTH[1]:
        which, share = ("longer", chosen_longer) if chosen_longer > 0.5 else ("shorter", 1 - chosen_longer)
        return f"the {which} response is the chosen one in {100 * share:.0f}% of the pairs"
    if abs(correlation) > LENGTH[0]:
        return f"the margin follows the length gap (correlation {correlation:+.2f})"
    return None


def _of_length(drift: Drift) -> str | None:
    return of_length(drift.margin_length_correlation, drift.chosen_longer, drift.pairs)


_SATURATED = AlarmRule(
    "saturated",
    lambda d: d.saturated > 0.9,
    lambda d: (
        f"{100 * d.saturated:.0f}% of the pairs have a gradient weight below {SATURATED:g} (0.5 at the start): "
        "more steps teach almost nothing; this run could have stopped here"
    ),
)

# Of a reward model: its rewards are not log-probs, so no alarm speaks of nats or of the reference.
REWARD_ALARMS = (
    AlarmRule(
        "length",
        lambda d: _of_length(d) is not None,
        lambda d: (
            f"{_of_length(d)}: the reward model may learn length and little else; balance the lengths of the pairs"
        ),
    ),
    _SATURATED,
)


def preference_alarms(loss: str) -> tuple[AlarmRule, ...]:
    """The alarms of a preference loss."""
    limits = LIMITS.get(loss, USUAL)
    return (
        AlarmRule(
            "displacement",
            lambda d: limits.has_fallen(d.chosen_per_token, d.chosen_nats) and d.margin > 0,
            lambda d: (
                f"chosen fell {-d.chosen_nats:.0f} nats a response ({-d.chosen_per_token:.2f} a token) while the "
                "margin grows: likelihood displacement; a smaller optimizer.lr or loss.sft_weight=0.1 usually stops it"
            ),
            ruins=True,
        ),
        AlarmRule(
            "crossed",
            lambda d: (
                min(-d.chosen_per_token, d.rejected_per_token) > 0.02 and min(-d.chosen_nats, d.rejected_nats) > 1
            ),
            lambda d: (
                f"chosen falls ({d.chosen_nats:.1f} nats a response) and rejected rises ({d.rejected_nats:+.1f}): "
                "the policy moves the wrong way; are data.columns.chosen and data.columns.rejected swapped?"
            ),
            ruins=True,
        ),
        AlarmRule(
            "far",
            limits.is_far,
            lambda d: (
                f"the policy is {d.kl_per_token:.2f} nats a token from the reference (KL estimate), responses moved by "
                f"{d.moved_nats:.0f} nats: answers tend to break here; a larger beta or a smaller optimizer.lr keeps "
                "it closer"
            ),
            ruins=True,
        ),
        AlarmRule(
            "length",
            lambda d: _of_length(d) is not None,
            lambda d: (
                f"{_of_length(d)}: the policy may learn length and little else; compare loss=sigmoid_norm beta=2, or "
                "balance the lengths of the pairs"
            ),
        ),
        _SATURATED,
    )
