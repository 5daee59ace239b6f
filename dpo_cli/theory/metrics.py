"""Metrics of preference training: exact means over pairs, never means of batch means."""

import torch
from torch import Tensor

from dpo_cli.theory.losses import LogRatios, PairLogps, implicit_rewards


def pair_metrics(
    policy: PairLogps, ratios: LogRatios, losses: Tensor, weights: Tensor, beta: float
) -> dict[str, Tensor]:
    """The metrics of each pair, every value (B,), under the names they are logged with.

    `weights` are the gradient weights under the loss. A tie counts one half in `rewards/accuracies`, so it is 0.5
    before the policy has moved. With soft labels it is the share that is expected of labels drawn with them.
    """
    chosen, rejected = implicit_rewards(ratios, beta)
    margins = chosen - rejected
    return {
        "loss": losses,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": margins,
        "rewards/accuracies": wins(margins, ratios.probabilities),
        "logps/chosen": policy.chosen,
        "logps/rejected": policy.rejected,
        "gradient_weight": weights,
    }


def wins(differences: Tensor, probabilities: Tensor | None = None) -> Tensor:
    """1 where a difference is above 0, 1/2 where it is 0, else 0; (B,) to (B,) float32.

    With soft labels w, (B,), its mean over labels: w and 1-w in the place of 1 and 0.
    """
    right = (differences > 0).float() + 0.5 * (differences == 0).float()
    return right if probabilities is None else probabilities * right + (1 - probabilities) * (1 - right)


def reward_metrics(ratios: LogRatios, losses: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """The metrics of each pair for a reward model, every value (B,): rewards instead of log-ratios, beta 1."""
    nothing = PairLogps(ratios.chosen, ratios.rejected, ratios.chosen_tokens, ratios.rejected_tokens)
    metrics = pair_metrics(nothing, ratios, losses, weights, 1.0)
    return {name: values for name, values in metrics.items() if not name.startswith("logps/")}


class MeanOverPairs:
    """Sums of metrics over pairs, kept on the device: adding never waits for it."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self.pairs = 0

    @classmethod
    def from_sums(cls, sums: dict[str, float], pairs: int) -> "MeanOverPairs":
        """Continue from the sums of a checkpoint."""
        mean = cls()
        mean._sums = {name: torch.tensor(value, dtype=torch.float64) for name, value in sums.items()}
        mean.pairs = pairs
        return mean

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Add the per-pair values of one micro-batch, each (B,)."""
        self._add_sums({name: _wide(values.detach()).sum() for name, values in metrics.items()})
        self.pairs += next(iter(metrics.values())).shape[0]

    def merge(self, other: "MeanOverPairs") -> None:
        """Add the sums of another."""
        self._add_sums(other._sums)
        self.pairs += other.pairs

    def _add_sums(self, sums: dict[str, Tensor]) -> None:
        for name, total in sums.items():
            self._sums[name] = total + self._sums[name].to(total.device) if name in self._sums else total

    def sums(self) -> dict[str, float]:
        """The sum of each metric so far."""
        return {name: float(total) for name, total in self._sums.items()}

    def means(self) -> dict[str, float]:
        """Mean over all pairs added so far; empty before the first."""
        return {name: total / self.pairs for name, total in self.sums().items()}


def _wide(values: Tensor) -> Tensor:
    # MPS has no float64; elsewhere float64 keeps the sum of a long run exact.
    return values.float() if values.device.type == "mps" else values.double()
