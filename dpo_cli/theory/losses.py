"""Preference losses: pure functions of how far the policy has moved from the reference.

One idea to keep in mind: everything DPO knows of a pair is how much more likely the policy finds each response
than the reference does. That is `LogRatios`, and every loss, reward and diagnostic is a function of it.

Letters: y+ the chosen response, y- the rejected one, x their prompt; c = log pi(y+|x)/pi_ref(y+|x), r the same
for y-, d = c - r their margin; b = beta; e = label smoothing. B pairs.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PairLogps:
    """What one model thinks of B pairs: log p(response | prompt), summed over response tokens, in nats."""

    chosen: Tensor  # (B,) float32
    rejected: Tensor  # (B,) float32
    chosen_tokens: Tensor  # (B,) how many tokens each sum runs over, the closing EOS included
    rejected_tokens: Tensor  # (B,)

    def detach(self) -> "PairLogps":
        """The same values, cut from the graph."""
        return PairLogps(self.chosen.detach(), self.rejected.detach(), self.chosen_tokens, self.rejected_tokens)


@dataclass(frozen=True)
class LogRatios:
    """How far the policy has moved from the reference on B pairs: log pi/pi_ref, in nats."""

    chosen: Tensor  # (B,) float32: c
    rejected: Tensor  # (B,) float32: r
    chosen_tokens: Tensor  # (B,)
    rejected_tokens: Tensor  # (B,)

    @classmethod
    def between(cls, policy: PairLogps, reference: PairLogps) -> "LogRatios":
        """log pi - log pi_ref of each response."""
        return cls(
            chosen=policy.chosen - reference.chosen,
            rejected=policy.rejected - reference.rejected,
            chosen_tokens=policy.chosen_tokens,
            rejected_tokens=policy.rejected_tokens,
        )

    @property
    def margin(self) -> Tensor:
        """d = c - r, (B,): positive where the policy has moved toward the chosen response."""
        return self.chosen - self.rejected


def sigmoid(ratios: LogRatios, beta: float, *, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(b d), (B,): DPO, Eq. 7 of https://arxiv.org/abs/2305.18290.

    With label smoothing e > 0 it is conservative DPO, for labels that are wrong with probability e:
    -(1-e) log sigmoid(b d) - e log sigmoid(-b d), Eq. 3 of https://ericmitchell.ai/cdpo.pdf.
    """
    logits = beta * ratios.margin
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


PreferenceLoss = Callable[[LogRatios], Tensor]

# Chosen by `loss.name`. Keyword-only parameters are the dials of a loss, named as in conf/loss/.
LOSSES: dict[str, Callable[..., Tensor]] = {
    "sigmoid": sigmoid,
}


def loss_dials(name: str) -> set[str]:
    """The dials that the loss `name` uses; any other is not its own."""
    parameters = inspect.signature(LOSSES[name]).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def make_loss(name: str, beta: float, **dials: float) -> PreferenceLoss:
    """The loss `name` with its dials set: LogRatios of B pairs -> (B,) losses."""
    return partial(LOSSES[name], beta=beta, **dials)


def implicit_rewards(ratios: LogRatios, beta: float) -> tuple[Tensor, Tensor]:
    """b log pi/pi_ref of chosen and rejected, each (B,): the reward DPO implies, up to a constant of the prompt.

    Section 5 of https://arxiv.org/abs/2305.18290.
    """
    return beta * ratios.chosen, beta * ratios.rejected


def gradient_weight(ratios: LogRatios, beta: float) -> Tensor:
    """sigmoid(-b d), (B,): the factor with which each pair pulls in the gradient of DPO.

    Near 1 where the implicit reward has the pair wrong, 1/2 before the policy has moved, near 0 where the pair
    is learned. Section 4 of https://arxiv.org/abs/2305.18290.
    """
    return torch.sigmoid(-beta * ratios.margin)
