"""Metrics of preference training: exact means over pairs, never means of batch means."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dpo_cli.theory.losses import LogRatios, PairLogps, implicit_rewards

PAIRS_OF = "pairs/"  # before the name of a source


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
    """Sums of metrics over pairs, kept on the device: adding never waits for it.

    Where pairs have a source, each metric is also kept of each source: `loss/hh`, with the number of its pairs under
    `pairs/hh` in the sums.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._source: dict[str, str] = {}  # of a metric that is of one source
        self._pairs_of: dict[str, int] = {}  # by source
        self.pairs = 0

    @classmethod
    def from_sums(cls, sums: dict[str, float], pairs: int) -> "MeanOverPairs":
        """Continue from the sums of a checkpoint."""
        mean = cls()
        mean.pairs = pairs
        mean._pairs_of = {name.removeprefix(PAIRS_OF): int(sums[name]) for name in sums if name.startswith(PAIRS_OF)}
        for name, value in sums.items():
            source = name.rpartition("/")[2]
            if not name.startswith(PAIRS_OF):
                mean._sums[name] = torch.tensor(value, dtype=torch.float64)
                mean._source |= {name: source} if source in mean._pairs_of else {}
        return mean

    def add(self, metrics: dict[str, Tensor], sources: Sequence[str] = ()) -> None:
        """Add the per-pair values of one micro-batch, each (B,); `sources` are the pairs' sources, "" for none."""
        self._add_sums({name: _wide(values.detach()).sum() for name, values in metrics.items()})
        self.pairs += next(iter(metrics.values())).shape[0]
        for source in sorted({*sources} - {""}):
            indices = [index for index, one in enumerate(sources) if one == source]
            named = {f"{name}/{source}": _wide(values.detach())[indices].sum() for name, values in metrics.items()}
            self._add_sums(named)
            self._source |= dict.fromkeys(named, source)
            self._pairs_of[source] = self._pairs_of.get(source, 0) + len(indices)

    def merge(self, other: "MeanOverPairs") -> None:
        """Add the sums of another."""
        self._add_sums(other._sums)
        self._source |= other._source
        self.pairs += other.pairs
        for source, pairs in other._pairs_of.items():
            self._pairs_of[source] = self._pairs_of.get(source, 0) + pairs

    def _add_sums(self, sums: dict[str, Tensor]) -> None:
        for name, total in sums.items():
            self._sums[name] = total + self._sums[name].to(total.device) if name in self._sums else total

    def sums(self) -> dict[str, float]:
        """The sum of each metric so far, and the pairs of each source."""
        pairs = {f"{PAIRS_OF}{source}": float(number) for source, number in self._pairs_of.items()}
        return {name: float(total) for name, total in self._sums.items()} | pairs

    def means(self) -> dict[str, float]:
        """Mean over all pairs added so far, and over those of each source; empty before the first."""
        pairs_of = {**self._pairs_of, "": self.pairs}
        return {name: float(total) / pairs_of[self._source.get(name, "")] for name, total in self._sums.items()}


def _wide(values: Tensor) -> Tensor:
    # MPS has no float64; elsewhere float64 keeps the sum of a long run exact.
    return values.float() if values.device.type == "mps" else values.double()
