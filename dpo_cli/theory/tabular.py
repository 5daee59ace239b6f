"""DPO where everything can be computed: policies over a finite set of responses, as tables of log-probabilities.

One idea to keep in mind: reward and optimal policy are two ways to write one table, r = beta log pi*/pi_ref + a
constant of the prompt. So minimising the DPO loss on preferences that r explains must end at pi*, and whether the
loss of `dpo_cli.theory.losses` does so can be checked to the last digit.

Letters: R responses to a prompt; "..." any number of prompts, each solved on its own; r the reward; b = beta;
Z = sum of pi_ref exp(r/b), the partition function. Log-probabilities are in nats. Equations are those of the DPO
paper, https://arxiv.org/abs/2305.18290.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpo_cli.theory.losses import LogRatios, PairLogps, sigmoid

GRADIENT_TOLERANCE = 1e-13  # of the mean loss by b log pi; float64 leaves about 1e-16
MAX_NEWTON_STEPS = 200  # some ten are needed; some eighty where the preferences are separable


@dataclass(frozen=True)
class Optimum:
    """The policy that no other beats on the KL-regularised objective, and the value it reaches divided by b."""

    logps: Tensor  # (..., R): log pi*
    log_partition: Tensor  # (...): log Z


def optimum(reference_logps: Tensor, rewards: Tensor, beta: float) -> Optimum:
    """log pi* = log pi_ref + r/b - log Z, (..., R): Eq. 4."""
    unnormalised = reference_logps + rewards / beta
    log_partition = unnormalised.logsumexp(-1)
    return Optimum(unnormalised - log_partition.unsqueeze(-1), log_partition)


def kl_divergence(logps: Tensor, other_logps: Tensor) -> Tensor:
    """KL(pi || other), (...), in nats; zero only where the two are equal."""
    return (logps.exp() * (logps - other_logps)).sum(-1)


def objective(logps: Tensor, reference_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """E[r(y)] - b KL(pi || pi_ref) with y drawn from pi, (...), in units of reward: Eq. 3.

    Its greatest value is b log Z, at pi*; any other policy falls short of it by b KL(pi || pi*).
    """
    return (logps.exp() * rewards).sum(-1) - beta * kl_divergence(logps, reference_logps)


def preference_probabilities(rewards: Tensor) -> Tensor:
    """sigmoid(r_i - r_j), (..., R, R): how often response i is preferred to j under Bradley-Terry, Eq. 1."""
    return torch.sigmoid(rewards.unsqueeze(-1) - rewards.unsqueeze(-2))


def sample_preferences(rewards: Tensor, number: int, rng: np.random.Generator) -> Tensor:
    """How often i was preferred to j in `number` draws per prompt, (..., R, R) float64.

    Each draw takes two different responses, all pairs alike, and labels them by Bradley-Terry.
    """
    size = rewards.shape[-1]
    # Of the R(R-1) ordered pairs, (i, j) comes out with probability P(i beats j) * 2 / (R(R-1)).
    different = 1 - torch.eye(size, dtype=torch.float64)
    probabilities = preference_probabilities(rewards.double()) * different * 2 / (size * (size - 1))
    counts = rng.multinomial(number, probabilities.flatten(-2).numpy())
    return torch.from_numpy(counts.astype(np.float64)).unflatten(-1, (size, size))


def every_pair(logps: Tensor, reference_logps: Tensor) -> LogRatios:
    """The log-ratios of all ordered pairs, each (..., R, R): the row is the chosen response, the column the rejected.

    A response counts as one token. The diagonal pairs a response with itself: margin 0, loss ln 2, no gradient.
    """
    return LogRatios.between(_all_pairs(logps), _all_pairs(reference_logps))


def _all_pairs(logps: Tensor) -> PairLogps:
    shape = (*logps.shape, logps.shape[-1])
    tokens = torch.ones(shape, dtype=torch.long)
    return PairLogps(logps.unsqueeze(-1).expand(shape), logps.unsqueeze(-2).expand(shape), tokens, tokens)


def expected_loss(logps: Tensor, reference_logps: Tensor, preferences: Tensor, beta: float) -> Tensor:
    """The DPO loss averaged over pairs, (...): Eq. 7 with `preferences`, (..., R, R), as the distribution of pairs.

    `preferences` weighs "row over column": probabilities or counts, not all zero; they are divided by their sum.
    """
    losses = sigmoid(every_pair(logps, reference_logps), beta)
    return (preferences * losses).sum((-2, -1)) / preferences.sum((-2, -1))


def fit_dpo(reference_logps: Tensor, preferences: Tensor, beta: float) -> Tensor:
    """log pi, (..., R) float64, of the softmax policy that minimises `expected_loss`, trained from the reference.

    Newton's method on the logits, each step scaled so that the loss of a logistic model can only fall: if the step
    moves a pair's b d by M at most, log(1 + M)/M of it is taken (Proposition 1 of F. Bach, Self-concordant analysis
    for logistic regression, https://arxiv.org/abs/0910.4627). Where the preferences are separable there is no
    minimum; the policy then goes outward until the gradient is below the tolerance.
    """
    reference_logps, preferences = reference_logps.double(), preferences.double()
    logits = reference_logps.clone()
    for _ in range(MAX_NEWTON_STEPS):
        gradient, hessian = _derivatives(logits, reference_logps, preferences, beta)
        if float(gradient.abs().max()) <= beta * GRADIENT_TOLERANCE:
            return logits.log_softmax(-1)
        # The pseudo-inverse, because a constant added to all logits changes nothing: the Hessian is singular there.
        step = -(torch.linalg.pinv(hessian, hermitian=True) @ gradient.unsqueeze(-1)).squeeze(-1)
        reach = beta * (step.amax(-1, keepdim=True) - step.amin(-1, keepdim=True)).clamp(min=1e-12)
        logits = logits + step * torch.log1p(reach) / reach
    raise AssertionError(
        f"after {MAX_NEWTON_STEPS} Newton steps the gradient is {float(gradient.abs().max()):.1e}, "
        f"not {beta * GRADIENT_TOLERANCE:.1e}"
    )


def _derivatives(logits: Tensor, reference_logps: Tensor, preferences: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Gradient (..., R) and Hessian (..., R, R) of the expected loss by the logits, from autograd."""
    logits = logits.detach().requires_grad_()
    loss = expected_loss(logits.log_softmax(-1), reference_logps, preferences, beta)
    # Prompts share nothing, so the gradient of the sum over prompts holds that of each.
    (gradient,) = torch.autograd.grad(loss.sum(), logits, create_graph=True)
    rows = [
        torch.autograd.grad(gradient[..., response].sum(), logits, retain_graph=True)[0]
        for response in range(logits.shape[-1])
    ]
    return gradient.detach(), torch.stack(rows, -2)


def sampling_error(reference_logps: Tensor, rewards: Tensor, beta: float, number: int) -> Tensor:
    """The distance |pi - pi*| (Euclidean, root mean square) to expect after `number` sampled preferences, (...).

    The leading term for many preferences, proportional to 1/sqrt(number). DPO is maximum likelihood of Eq. 6, so its
    implicit reward has the covariance I^-1 / number, I the Fisher information of one Bradley-Terry label; the policy
    follows by d pi_i = pi_i (d r_i - sum_j pi_j d r_j) / b.
    """
    size = rewards.shape[-1]
    wins = preference_probabilities(rewards.double())
    # One label on the pair {i, j} informs P(i beats j) P(j beats i) about r_i - r_j; a pair is drawn 2/(R(R-1)) often.
    pairs = wins * wins.mT * (1 - torch.eye(size, dtype=torch.float64)) * 2 / (size * (size - 1))
    information = torch.diag_embed(pairs.sum(-1)) - pairs
    best = optimum(reference_logps.double(), rewards.double(), beta).logps.exp()
    jacobian = (torch.diag_embed(best) - best.unsqueeze(-1) * best.unsqueeze(-2)) / beta
    covariance = jacobian @ torch.linalg.pinv(information, hermitian=True) @ jacobian.mT / number
    return covariance.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt()
