"""Where a policy has drifted: numbers on the last pairs it has seen, all functions of their log-ratios.

They cost no forward pass: training has computed every log-ratio already. W pairs of the window.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_cli.theory.losses import LogRatios, gradient_weight

HEAVIEST = 10  # pairs whose share of the gradient is logged
STILL = 0.005  # nats a token: below this a response has not moved
SATURATED = 0.01  # gradient weight under which a pair has almost no effect: a fiftieth of that at the start
IN_NATS = ("drift/case", "drift/chosen_per", "drift/rejected_per", "drift/kl_per")


@dataclass(frozen=True)
class Drift:
    """How the policy differs from its reference on the last W pairs."""

    pairs: int
    margin: float  # mean of beta d
    chosen_nats: float  # mean of log pi/pi_ref of the chosen response: its change since the start
    rejected_nats: float
    chosen_per_token: float  # the same in nats a token
    rejected_per_token: float
    moved_nats: float  # mean of |log pi/pi_ref| over both responses
    weight_over_09: float  # share of pairs with a gradient weight above 0.9
    weight_under_01: float  # share of pairs with a gradient weight below 0.1
    heaviest_share: float  # part of the summed gradient weight that the ten heaviest pairs have
    saturated: float  # share of pairs with a gradient weight below SATURATED
    margin_length_correlation: float  # of d with n+ - n-; 0 where either does not vary
    chosen_longer: float  # share of pairs whose chosen response is the longer one; equal lengths count one half
    kl_per_token: float  # estimate of KL(policy || reference) in nats a token

    @property
    def case(self) -> str:
        """Which of the four ways the responses have moved, or `still`."""
        chosen, rejected = self.chosen_per_token, self.rejected_per_token
        if max(abs(chosen), abs(rejected)) < STILL:
            return "still"
        if chosen >= 0 and rejected >= 0:
            return "both up"
        if chosen < 0 and rejected < 0:
            return "both down"
        return "apart" if chosen >= 0 else "crossed"

    def as_metrics(self) -> dict[str, float | str]:
        """Under the names they are logged with."""
        return {
            "gradient_weight/over_0.9": self.weight_over_09,
            "gradient_weight/under_0.1": self.weight_under_01,
            f"gradient_weight/heaviest_{HEAVIEST}_share": self.heaviest_share,
            "drift/pairs": self.pairs,
            "drift/case": self.case,
            "drift/chosen_per_token": self.chosen_per_token,
            "drift/rejected_per_token": self.rejected_per_token,
            "drift/chosen_per_response": self.chosen_nats,
            "drift/rejected_per_response": self.rejected_nats,
            "drift/kl_per_token": self.kl_per_token,
            "drift/margin_length_correlation": self.margin_length_correlation,
            "drift/chosen_longer": self.chosen_longer,
            "drift/saturated": self.saturated,
        }

    def of_rewards(self) -> dict[str, float | str]:
        """The metrics that hold for a reward model: its values are rewards, not changes in nats."""
        return {name: value for name, value in self.as_metrics().items() if not name.startswith(IN_NATS)}


def correlation(first: Tensor, second: Tensor) -> float:
    """Pearson's correlation of two (W,); 0 where either does not vary."""
    first, second = first - first.mean(), second - second.mean()
    spread = math.sqrt(float((first**2).sum()) * float((second**2).sum()))
    return float((first * second).sum()) / spread if spread > 0 else 0.0


def kl_per_token(ratios: LogRatios) -> float:
    """An estimate of KL(policy || reference) in nats a token, never negative.

    Schulman's k3, exp(-m) - 1 + m with m the mean log-ratio a token of a response, averaged over both responses of
    each pair (http://joschu.net/blog/kl-approx.html). The responses are the data's, not the policy's own: it says
    how far the policy is from the reference where the data are, not what sampling would give.
    """
    means = torch.cat([ratios.chosen / ratios.chosen_tokens, ratios.rejected / ratios.rejected_tokens]).double()
    return float((torch.expm1(-means) + means).mean())


def measure_drift(ratios: LogRatios, beta: float, loss: Callable[[LogRatios], Tensor]) -> Drift:
    """The drift on W pairs, W at least 1."""
    weights = gradient_weight(loss, ratios).double()
    heaviest = weights.topk(min(HEAVIEST, len(weights))).values.sum()
    gap = (ratios.chosen_tokens - ratios.rejected_tokens).double()
    return Drift(
        pairs=len(weights),
        margin=float(beta * ratios.margin.double().mean()),
        chosen_nats=float(ratios.chosen.double().mean()),
        rejected_nats=float(ratios.rejected.double().mean()),
        chosen_per_token=float((ratios.chosen / ratios.chosen_tokens).double().mean()),
        rejected_per_token=float((ratios.rejected / ratios.rejected_tokens).double().mean()),
        moved_nats=float(torch.cat([ratios.chosen, ratios.rejected]).double().abs().mean()),
        weight_over_09=float((weights > 0.9).double().mean()),
        weight_under_01=float((weights < 0.1).double().mean()),
        heaviest_share=float(heaviest / weights.sum()) if float(weights.sum()) > 0 else 0.0,
        saturated=float((weights < SATURATED).double().mean()),
        margin_length_correlation=correlation(ratios.margin.double(), gap),
        chosen_longer=float((gap.sign() + 1).mean() / 2),
        kl_per_token=kl_per_token(ratios),
    )
