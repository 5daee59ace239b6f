"""The drift radar: alarms while there is still time, each with its reason and what usually helps.

The rules are a table; each reads only the `Drift` of the last pairs, which training has computed anyway.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_cli.objectives.drift import Drift, measure_drift
from dpo_cli.theory.losses import LogRatios

WINDOW = 256  # pairs
ENOUGH = 32  # pairs before an alarm may sound: a single batch proves nothing


@dataclass(frozen=True)
class Alarm:
    """A rule that holds, in words."""

    name: str
    text: str


@dataclass(frozen=True)
class Rule:
    """When an alarm sounds, and what it says."""

    name: str
    holds: Callable[[Drift], bool]
    says: Callable[[Drift], str]
    ruins: bool = False  # whether monitor=stop ends the run for it


RULES = (
    Rule(
        "displacement",
        lambda d: d.chosen_per_token < -0.3 and d.margin > 0,
        lambda d: (
            f"chosen fell {-d.chosen_nats:.0f} nats a response ({-d.chosen_per_token:.2f} a token) while the margin "
            "grows: likelihood displacement; a smaller optimizer.lr or loss.sft_weight=0.1 usually stops it"
        ),
        ruins=True,
    ),
    Rule(
        "crossed",
        lambda d: d.chosen_per_token < -0.02 and d.rejected_per_token > 0.02,
        lambda d: (
            f"chosen falls ({d.chosen_per_token:.2f} nats a token) and rejected rises ({d.rejected_per_token:+.2f}): "
            "the policy moves the wrong way; are data.columns.chosen and data.columns.rejected swapped?"
        ),
        ruins=True,
    ),
    Rule(
        "far",
        lambda d: d.kl_per_token > 0.25,
        lambda d: (
            f"the policy is {d.kl_per_token:.2f} nats a token from the reference (KL estimate): answers tend to break "
            "here; a larger beta or a smaller optimizer.lr keeps it closer"
        ),
        ruins=True,
    ),
    Rule(
        "length",
        lambda d: _follows_length(d),
        lambda d: (
            f"the margin follows the length gap (correlation {d.margin_length_correlation:+.2f}): the policy may learn "
            f"to be {'longer' if d.margin_length_correlation > 0 else 'shorter'} and little else; compare "
            "loss=sigmoid_norm beta=2, or balance the lengths of the pairs"
        ),
    ),
    Rule(
        "saturated",
        lambda d: d.saturated > 0.9,
        lambda d: (
            f"{100 * d.saturated:.0f}% of the pairs no longer pull (gradient weight under 0.01): "
            "more steps only drift; this run could have stopped here"
        ),
    ),
)

# Of a reward model: its rewards are no log-probs, and drift from nothing.
REWARD_RULES = (
    Rule(
        "length",
        lambda d: _follows_length(d),
        lambda d: (
            f"the margin follows the length gap (correlation {d.margin_length_correlation:+.2f}): the reward may be "
            f"for {'longer' if d.margin_length_correlation > 0 else 'shorter'} answers and little else; balance the "
            "lengths of the pairs"
        ),
    ),
    RULES[-1],
)


def _follows_length(drift: Drift) -> bool:
    return abs(drift.margin_length_correlation) > 0.8 and drift.pairs >= 2 * ENOUGH


class Radar:
    """Keeps the log-ratios of the last pairs and says each alarm once."""

    def __init__(self, beta: float, mode: str, loss: str = "sigmoid", objective: str = "dpo") -> None:
        self.beta = beta
        self.mode = mode
        # Gradient weights are those of DPO: only there does a small one mean that a pair no longer pulls.
        rules = REWARD_RULES if objective == "reward" else RULES
        self._rules = [rule for rule in rules if rule.name != "saturated" or loss == "sigmoid"]
        self.sounded: list[str] = []
        self._columns = torch.zeros(4, 0)  # c, r, n+, n- of the last pairs, oldest first

    def add(self, ratios: LogRatios) -> None:
        """Take in a micro-batch; nothing waits for the device."""
        columns = (ratios.chosen, ratios.rejected, ratios.chosen_tokens, ratios.rejected_tokens)
        new = torch.stack([column.detach().float() for column in columns])
        self._columns = torch.cat([self._columns.to(new.device), new], dim=1)[:, -WINDOW:]

    def drift(self) -> Drift:
        """The drift on the pairs of the window."""
        return measure_drift(LogRatios(*self._columns.cpu()), self.beta)

    def alarms(self, drift: Drift) -> list[Alarm]:
        """The alarms that hold and have not been said yet."""
        if self.mode == "off" or drift.pairs < ENOUGH:
            return []
        new = [rule for rule in self._rules if rule.name not in self.sounded and rule.holds(drift)]
        self.sounded += [rule.name for rule in new]
        return [Alarm(rule.name, rule.says(drift)) for rule in new]

    def ruin(self, drift: Drift) -> Alarm | None:
        """Under monitor=stop the alarm that ends the run: one that means ruin and holds now, said before or not."""
        if self.mode != "stop" or drift.pairs < ENOUGH:
            return None
        holding = (rule for rule in self._rules if rule.ruins and rule.holds(drift))
        return next((Alarm(rule.name, rule.says(drift)) for rule in holding), None)

    def state(self) -> Tensor:
        """The window, for a checkpoint: (4, W)."""
        return self._columns.cpu().contiguous()

    def restore(self, columns: Tensor, sounded: list[str]) -> None:
        """Go on from a checkpoint's window."""
        self._columns, self.sounded = columns, list(sounded)
