"""DPO where everything can be computed: policies over a finite set of responses, as tables of log-probabilities.

One idea to keep in mind: reward and optimal policy are two ways to write one table, r = beta log pi*/pi_ref + a
constant of the prompt. So minimising the DPO loss on preferences that r explains must end at pi*, and whether the
loss of `dpo_cli.theory.losses` does so can be checked to the last digit.

The other road to pi* is here as well, the one that DPO replaces: the policy gradient of the same objective, exact and
from samples, and the frontier that all policies stay under.

Letters: R responses to a prompt; "..." any number of prompts, each solved on its own; r the reward; b = beta;
Z = sum of pi_ref exp(r/b), the partition function; A = r - b log pi/pi_ref, the reward less its price in KL; S draws
from the policy. Log-probabilities are in nats. Equations are those of the DPO paper,
https://arxiv.org/abs/2305.18290.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpo_cli.theory.losses import LogRatios, PairLogps, sigmoid

GRADIENT_TOLERANCE = 1e-13  # of the mean loss by b log pi; float64 leaves about 1e-16
MAX_NEWTON_STEPS = 200  # some ten are needed; some eighty where the preferences are separable
KEPT_PROMISE = 0.5  # of the rise that the slope promises: a parabola gives it for every step that does not overshoot


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
    best = optimum(reference_logps.double(), rewards.double(), beta).logps
    jacobian = _covariance(best) / beta
    covariance = jacobian @ torch.linalg.pinv(_information(rewards), hermitian=True) @ jacobian.mT / number
    return covariance.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt()


def _information(rewards: Tensor) -> Tensor:
    """I, (..., R, R) float64: the Fisher information of one label of `sample_preferences` about the rewards."""
    size = rewards.shape[-1]
    wins = preference_probabilities(rewards.double())
    # One label on the pair {i, j} informs P(i beats j) P(j beats i) about r_i - r_j; a pair is drawn 2/(R(R-1)) often.
    pairs = wins * wins.mT * (1 - torch.eye(size, dtype=torch.float64)) * 2 / (size * (size - 1))
    return torch.diag_embed(pairs.sum(-1)) - pairs


def _covariance(logps: Tensor) -> Tensor:
    """diag(pi) - pi pi^T, (..., R, R): of the one-hot vector of a draw; also d pi_i / d logit_j, and Fisher of pi."""
    probabilities = logps.exp()
    return torch.diag_embed(probabilities) - probabilities.unsqueeze(-1) * probabilities.unsqueeze(-2)


def expected_shortfall(reference_logps: Tensor, rewards: Tensor, beta: float, number: int) -> Tensor:
    """b log Z - J to expect of DPO after `number` sampled preferences, (...), in units of reward.

    The leading term for many preferences, tr(F I^-1) / (2 b number), F = diag(pi*) - pi* pi*^T: the shortfall is
    b KL(pi || pi*), which is b/2 dl^T F dl for logits off by dl = dr/b, and dr has the covariance I^-1 / number.
    """
    fisher = _covariance(optimum(reference_logps.double(), rewards.double(), beta).logps)
    spread = fisher @ torch.linalg.pinv(_information(rewards), hermitian=True)
    return spread.diagonal(dim1=-2, dim2=-1).sum(-1) / (2 * beta * number)


@dataclass(frozen=True)
class Position:
    """What policies get and what they pay: the two terms of Eq. 3, apart."""

    kl: Tensor  # (...): KL(pi || pi_ref)
    reward: Tensor  # (...): E[r(y)], y drawn from pi

    def mean(self) -> "Position":
        """Of the last dimension: if that holds prompts, the position over all of them, each as frequent as another."""
        return Position(self.kl.mean(-1), self.reward.mean(-1))


def position(logps: Tensor, reference_logps: Tensor, rewards: Tensor) -> Position:
    """Where the policy stands on each prompt, (...); the reference stands at KL zero."""
    return Position(kl_divergence(logps, reference_logps), (logps.exp() * rewards).sum(-1))


def frontier(reference_logps: Tensor, rewards: Tensor, betas: Sequence[float]) -> Position:
    """Where pi* stands for each of B betas, (B, ...): the most reward that any policy has at its KL, Eq. 4.

    Reward is concave and non-decreasing in KL along it, with the slope dE[r]/dKL = b. Means over prompts keep all
    this, as pi* of one b maximises the mean of Eq. 3.
    """
    best = torch.stack([optimum(reference_logps, rewards, beta).logps for beta in betas])
    return position(best, reference_logps, rewards)


def highest_reward(kl: Tensor, betas: Sequence[float], edge: Position) -> Tensor:
    """The reward that no policy with this KL exceeds, shaped as `kl`; `edge` is the frontier at B betas, (B,).

    Each beta bounds it by its tangent: E[r] - b KL is at most what pi* has, E*[r] - b KL*. The least of the bounds is
    the frontier itself, but for the square of the spacing of the betas.
    """
    tangents = edge.reward + torch.tensor(betas, dtype=kl.dtype) * (kl.unsqueeze(-1) - edge.kl)
    return tangents.amin(-1)


def policy_gradient(logps: Tensor, reference_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """dJ/dlogits of Eq. 3, (..., R): pi(y) (A(y) - E[A]), y drawn from pi.

    The part that A itself contributes, -b E[d log pi], is zero: probabilities sum to one. E[A] is J.
    """
    advantages = rewards - beta * (logps - reference_logps)
    probabilities = logps.exp()
    return probabilities * (advantages - (probabilities * advantages).sum(-1, keepdim=True))


def climb(reference_logps: Tensor, rewards: Tensor, beta: float) -> Iterator[Tensor]:
    """log pi, (..., R) float64, after 0, 1, 2, ... evaluations of the exact policy gradient, from the reference on.

    Plain gradient ascent on the logits. Each prompt has a step of its own: it is taken if J rises by `KEPT_PROMISE` of
    what the slope promises, and then grows by a fifth; otherwise the prompt stays where it is and the step is halved.
    So J never falls.
    """
    logps, reference_logps, rewards = reference_logps.double(), reference_logps.double(), rewards.double()
    reached = objective(logps, reference_logps, rewards, beta)
    step = torch.ones_like(reached)
    while True:
        yield logps
        gradient = policy_gradient(logps, reference_logps, rewards, beta)
        tried = (logps + step.unsqueeze(-1) * gradient).log_softmax(-1)
        value = objective(tried, reference_logps, rewards, beta)
        taken = value - reached >= KEPT_PROMISE * step * gradient.square().sum(-1)
        logps, reached = torch.where(taken.unsqueeze(-1), tried, logps), torch.where(taken, value, reached)
        step = torch.where(taken, step * 1.2, step / 2)


def draw_responses(logps: Tensor, number: int, rng: np.random.Generator) -> Tensor:
    """S = `number` responses per prompt, drawn from pi independently, (..., S) int64: indices from 0 to R-1."""
    cumulative = logps.double().exp().cumsum(-1)
    drawn = torch.searchsorted(cumulative, torch.from_numpy(rng.random((*logps.shape[:-1], number))))
    return drawn.clamp(max=logps.shape[-1] - 1)  # the last sum may be a rounding error short of one


def sampled_policy_gradient(
    logps: Tensor, reference_logps: Tensor, rewards: Tensor, beta: float, draws: Tensor
) -> Tensor:
    """The policy gradient as S draws from pi estimate it, (..., R); only their rewards are read. S >= 2.

    REINFORCE, each draw against the mean of the others (https://arxiv.org/abs/2402.14740): on average it is
    `policy_gradient`. PPO's first step on a batch goes along it, as no ratio is clipped yet. At pi* it is zero
    whatever is drawn, because A is constant there.
    """
    number = draws.shape[-1]
    advantages = (rewards - beta * (logps - reference_logps)).gather(-1, draws)
    # A less the mean of the other draws is S/(S-1) (A - mean of all). These weights sum to zero, so of each draw's
    # d log pi(y) / d logits = onehot(y) - pi the second part drops out.
    weights = (advantages - advantages.mean(-1, keepdim=True)) / (number - 1)
    return torch.zeros_like(logps).scatter_add(-1, draws, weights)


def climb_sampled(
    reference_logps: Tensor, rewards: Tensor, beta: float, *, draws: int, step: float, rng: np.random.Generator
) -> Iterator[Tensor]:
    """log pi, (..., R) float64, after 0, 1, 2, ... steps along the sampled policy gradient, from the reference on.

    Every step asks for `draws` new rewards per prompt.
    """
    logps, reference_logps, rewards = reference_logps.double(), reference_logps.double(), rewards.double()
    while True:
        yield logps
        drawn = draw_responses(logps, draws, rng)
        gradient = sampled_policy_gradient(logps, reference_logps, rewards, beta, drawn)
        logps = (logps + step * gradient).log_softmax(-1)
