"""Preference losses: pure functions of how far the policy has moved from the reference.

One idea to keep in mind: DPO uses of a pair only the ratio of each response's probability under the policy to that
under the reference. That is `LogRatios`, and every loss, reward and diagnostic is a function of it.

Letters: y+ the chosen response, y- the rejected one, x their prompt; c = log pi(y+|x)/pi_ref(y+|x), r the same
for y-, d = c - r their margin; b = beta; e = label smoothing; w = the probability that y+ is the better one. B pairs.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ResponseScores:
    """One model's score of M responses: log p(response | prompt), in nats; of a reward model the reward."""

    values: Tensor  # (M,) float32
    tokens: Tensor  # (M,) scored tokens of each response, the closing EOS included
    units: Tensor  # (U, R) into the responses: what an objective looks at together, R = 2 for pairs
    probabilities: Tensor | None = None  # (U,) soft labels: that the first of a pair is better; None: all are 1

    def pairs(self) -> "PairLogps":
        """The scores of U pairs."""
        chosen, rejected = self.units[:, 0], self.units[:, 1]
        sides = (self.values[chosen], self.values[rejected], self.tokens[chosen], self.tokens[rejected])
        return PairLogps(*sides, self.probabilities)


@dataclass(frozen=True)
class PairLogps:
    """log p(response | prompt) of B pairs under one model, summed over response tokens, in nats."""

    chosen: Tensor  # (B,) float32
    rejected: Tensor  # (B,) float32
    chosen_tokens: Tensor  # (B,) number of tokens in each sum, the closing EOS included
    rejected_tokens: Tensor  # (B,)
    probabilities: Tensor | None = None  # (B,) w, that the chosen response is better; None: all are 1

    def detach(self) -> "PairLogps":
        """The same values without gradient."""
        return replace(self, chosen=self.chosen.detach(), rejected=self.rejected.detach())


@dataclass(frozen=True)
class LogRatios:
    """How far the policy has moved from the reference on B pairs: log pi/pi_ref, in nats."""

    chosen: Tensor  # (B,) float32: c
    rejected: Tensor  # (B,) float32: r
    chosen_tokens: Tensor  # (B,)
    rejected_tokens: Tensor  # (B,)
    probabilities: Tensor | None = None  # (B,) w; None: all are 1

    @classmethod
    def between(cls, policy: PairLogps, reference: PairLogps) -> "LogRatios":
        """log pi - log pi_ref of each response."""
        return cls(
            chosen=policy.chosen - reference.chosen,
            rejected=policy.rejected - reference.rejected,
            chosen_tokens=policy.chosen_tokens,
            rejected_tokens=policy.rejected_tokens,
            probabilities=policy.probabilities,
        )

    def detach(self) -> "LogRatios":
        """The same values without gradient."""
        return replace(self, chosen=self.chosen.detach(), rejected=self.rejected.detach())

    @property
    def swapped(self) -> "LogRatios":
        """The same pairs with the other label: chosen is rejected."""
        return LogRatios(self.rejected, self.chosen, self.rejected_tokens, self.chosen_tokens)

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


def robust(ratios: LogRatios, beta: float, *, label_smoothing: float) -> Tensor:
    """[-(1-e) log sigmoid(b d) + e log sigmoid(-b d)] / (1-2e), (B,): robust DPO.

    Its mean over labels flipped with probability e is the clean DPO loss. https://arxiv.org/abs/2403.00409.
    It is not bounded below.
    """
    logits = beta * ratios.margin
    clean = -(1 - label_smoothing) * F.logsigmoid(logits)
    return (clean + label_smoothing * F.logsigmoid(-logits)) / (1 - 2 * label_smoothing)


def hinge(ratios: LogRatios, beta: float) -> Tensor:
    """relu(1 - b d), (B,): SLiC's hinge on the implicit reward; zero once the margin reaches 1.

    https://arxiv.org/abs/2305.10425, on the log-ratio as in https://arxiv.org/abs/2309.06657.
    """
    return F.relu(1 - beta * ratios.margin)


def _per_token(ratios: LogRatios) -> tuple[Tensor, Tensor]:
    """c/n+ and r/n-, each (B,): the log-ratios a token."""
    return ratios.chosen / ratios.chosen_tokens, ratios.rejected / ratios.rejected_tokens


def ipo(ratios: LogRatios, beta: float) -> Tensor:
    """(c/n+ - r/n- - 1/(2b))^2, (B,): IPO on log-ratios a token, the form its authors confirmed to TRL.

    Eq. 17 of https://arxiv.org/abs/2310.12036, with b in the place of tau.
    """
    chosen, rejected = _per_token(ratios)
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def ipo_sum(ratios: LogRatios, beta: float) -> Tensor:
    """(d - 1/(2b))^2, (B,): IPO on summed log-ratios, as in the original DPO code."""
    return (ratios.margin - 1 / (2 * beta)) ** 2


def sigmoid_norm(ratios: LogRatios, beta: float) -> Tensor:
    """-log sigmoid(b (c/n+ - r/n-)), (B,): DPO on log-ratios a token, so that length alone earns no margin.

    The length-normalised DPO of Tulu 3, https://arxiv.org/abs/2411.15124.
    """
    chosen, rejected = _per_token(ratios)
    return -F.logsigmoid(beta * (chosen - rejected))


def exo_pair(ratios: LogRatios, beta: float, *, label_smoothing: float) -> Tensor:
    """q (log q - log(1-e)) + q' (log q' - log e), q = sigmoid(b d), q' = sigmoid(-b d), (B,): EXO.

    The reverse KL to the smoothed label, so e > 0. Eq. 16 of https://arxiv.org/abs/2402.00856.
    """
    logits = beta * ratios.margin
    right, wrong = F.logsigmoid(logits), F.logsigmoid(-logits)
    target_right, target_wrong = math.log1p(-label_smoothing), math.log(label_smoothing)
    return right.exp() * (right - target_right) + wrong.exp() * (wrong - target_wrong)


def nca_pair(ratios: LogRatios, beta: float) -> Tensor:
    """-log sigmoid(b c) - 0.5 log sigmoid(-b c) - 0.5 log sigmoid(-b r), (B,): NCA on pairs.

    It holds the absolute reward of the chosen response up. https://arxiv.org/abs/2402.05369.
    """
    chosen, rejected = implicit_rewards(ratios, beta)
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair(ratios: LogRatios, beta: float) -> Tensor:
    """-log sigmoid(b c) - log sigmoid(-b r), (B,): BCO with its reward shift at zero.

    https://arxiv.org/abs/2404.04656, without the running mean of rewards that it subtracts from both.
    """
    chosen, rejected = implicit_rewards(ratios, beta)
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def sppo_hard(ratios: LogRatios, beta: float) -> Tensor:
    """(c - 1/(2b))^2 + (r + 1/(2b))^2, (B,): SPPO where the chosen response always wins.

    https://arxiv.org/abs/2405.00675, with the win probabilities 1 and 0.
    """
    target = 1 / (2 * beta)
    return (ratios.chosen - target) ** 2 + (ratios.rejected + target) ** 2


def apo_zero(ratios: LogRatios, beta: float) -> Tensor:
    """1 - sigmoid(b c) + sigmoid(b r), (B,): lifts chosen and lowers rejected responses.

    APO for chosen responses that are better than the model's own. Eq. 7 of https://arxiv.org/abs/2408.06266.
    """
    chosen, rejected = implicit_rewards(ratios, beta)
    return 1 - torch.sigmoid(chosen) + torch.sigmoid(rejected)


def apo_down(ratios: LogRatios, beta: float) -> Tensor:
    """sigmoid(b c) + 1 - sigmoid(b d), (B,): lowers both, rejected responses more.

    APO for chosen responses that are worse than the model's own. Eq. 8 of https://arxiv.org/abs/2408.06266.
    """
    chosen, _ = implicit_rewards(ratios, beta)
    return torch.sigmoid(chosen) + 1 - torch.sigmoid(beta * ratios.margin)


def discopop(ratios: LogRatios, beta: float, *, temperature: float) -> Tensor:
    """(1-m) softplus(-b d) + m exp(-b d), m = sigmoid(b d / tau), (B,): the loss an LLM search found.

    Log-ratio modulated loss, Eq. 5 of https://arxiv.org/abs/2406.08414; tau is `temperature`.
    """
    logits = beta * ratios.margin
    # As one exponential: for a very negative margin exp(-b d) overflows where m is 0.
    exponential = torch.exp(F.logsigmoid(logits / temperature) - logits)
    return -F.logsigmoid(logits) * torch.sigmoid(-logits / temperature) + exponential


# Chosen by `loss.name`. Keyword-only parameters are the hyperparameters of a loss, named as in conf/loss/.
LOSSES: dict[str, Callable[..., Tensor]] = {
    "sigmoid": sigmoid,
    "robust": robust,
    "hinge": hinge,
    "ipo": ipo,
    "ipo_sum": ipo_sum,
    "sigmoid_norm": sigmoid_norm,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
}

# Losses L(u) of one difference, which have a label that can be wrong: u is positive where it is fitted. The others say
# of each response alone whether it is good, and EXO's label is within a logarithm, where a mean of labels does not go.
TWO_SIDED = ("sigmoid", "robust", "hinge", "ipo", "ipo_sum", "sigmoid_norm", "discopop")


def expected_loss(loss: Callable[[LogRatios], Tensor], ratios: LogRatios) -> Tensor:
    """w L(u) + (1-w) L(-u), (B,): the mean of a loss over labels that are right with probability w.

    For DPO it is Eq. 3 of https://ericmitchell.ai/cdpo.pdf with e = 1-w. Label smoothing composes: w (1-e) + (1-w) e.
    """
    w = ratios.probabilities
    return loss(ratios) if w is None else w * loss(ratios) + (1 - w) * loss(ratios.swapped)


def loss_options(name: str) -> set[str]:
    """The hyperparameters that the loss `name` uses; any other is not its own."""
    parameters = inspect.signature(LOSSES[name]).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def sft_loss(policy: PairLogps) -> Tensor:
    """-log pi(y+|x) / n+, (B,): the negative log-likelihood of the chosen response, in nats a token.

    Added with a weight it keeps chosen responses likely: RPO, https://arxiv.org/abs/2404.19733. Where the label is soft
    it is the mean over labels, as in `expected_loss`.
    """
    w, chosen = policy.probabilities, -policy.chosen / policy.chosen_tokens
    return chosen if w is None else w * chosen + (1 - w) * (-policy.rejected / policy.rejected_tokens)


@dataclass(frozen=True)
class PreferenceLoss:
    """A preference loss with its hyperparameters set, plus `sft_weight` times the SFT loss."""

    loss: Callable[[LogRatios], Tensor]
    sft_weight: float = 0.0

    def __call__(self, policy: PairLogps, ratios: LogRatios) -> Tensor:
        """The loss of each pair, (B,)."""
        losses = expected_loss(self.loss, ratios)
        return losses + self.sft_weight * sft_loss(policy) if self.sft_weight else losses


def make_loss(name: str, beta: float, sft_weight: float = 0.0, **options: float | None) -> PreferenceLoss:
    """The loss `name` with the hyperparameters it uses; the caller has checked that no other is set."""
    used = {option: options[option] for option in loss_options(name) if options.get(option) is not None}
    return PreferenceLoss(partial(LOSSES[name], beta=beta, **used), sft_weight)


def implicit_rewards(ratios: LogRatios, beta: float) -> tuple[Tensor, Tensor]:
    """b log pi/pi_ref of chosen and rejected, each (B,): the reward DPO implies, up to a constant of the prompt.

    Section 5 of https://arxiv.org/abs/2305.18290.
    """
    return beta * ratios.chosen, beta * ratios.rejected


def gradient_weight(loss: Callable[[LogRatios], Tensor], ratios: LogRatios) -> Tensor:
    """(|dL/dc| + |dL/dr|) / (2 times the same at c = r = 0), (B,): how hard each pair moves the policy under a loss L.

    1/2 before the policy has moved, near 0 where the pair is learned. For DPO it is sigmoid(-b d), the weight of a pair
    in its gradient, near 1 where the implicit rewards have the wrong order: section 4 of
    https://arxiv.org/abs/2305.18290. Of a pair with a soft label it is the weight it would have with a certain one.
    """
    start = LogRatios(
        torch.zeros_like(ratios.chosen), torch.zeros_like(ratios.rejected), ratios.chosen_tokens, ratios.rejected_tokens
    )
    return _slope(loss, ratios) / (2 * _slope(loss, start))


def _slope(loss: Callable[[LogRatios], Tensor], ratios: LogRatios) -> Tensor:
    """|dL/dc| + |dL/dr|, (B,)."""
    chosen, rejected = (one.detach().requires_grad_(True) for one in (ratios.chosen, ratios.rejected))
    with torch.enable_grad():
        losses = loss(LogRatios(chosen, rejected, ratios.chosen_tokens, ratios.rejected_tokens))
        slopes = torch.autograd.grad(losses.sum(), (chosen, rejected))
    return slopes[0].abs() + slopes[1].abs()
