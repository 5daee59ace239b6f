"""Bradley-Terry: strengths of players from who beat whom. P(i beats j) = alpha_i / (alpha_i + alpha_j).

The model behind DPO: with alpha = exp(reward) it is P(y+ > y-) = sigmoid(r+ - r-), Eq. 1 of
https://arxiv.org/abs/2305.18290. K players.
"""

import torch
from torch import Tensor


def win_probability(strengths: Tensor) -> Tensor:
    """P(row beats column), (K, K), from strengths alpha, (K,)."""
    return strengths[:, None] / (strengths[:, None] + strengths[None, :])


def fit_strengths(wins: Tensor, tolerance: float = 1e-12, max_iterations: int = 100_000) -> Tensor:
    """The maximum-likelihood strengths (K,), float64, scaled to sum to 1, from wins[i, j] = times i beat j.

    Hunter's minorisation-maximisation, which climbs the likelihood at every iteration: D. R. Hunter, MM algorithms
    for generalized Bradley-Terry models, Annals of Statistics 32 (2004), Eq. 30. ValueError where the maximum does
    not exist: some player, or group of players, never lost to or never beat the rest.
    """
    wins = wins.double()
    if not _strongly_connected(wins):
        raise ValueError("no maximum-likelihood strengths: some players never lost to, or never beat, all the others")
    games = wins + wins.T
    won = wins.sum(dim=1)
    strengths = torch.full((len(wins),), 1.0 / len(wins), dtype=torch.float64)
    for _ in range(max_iterations):
        pairwise = games / (strengths[:, None] + strengths[None, :])
        new = won / pairwise.sum(dim=1)
        new = new / new.sum()
        if float((new / strengths - 1).abs().max()) < tolerance:
            return new
        strengths = new
    raise ValueError(f"the strengths have not settled after {max_iterations:,} iterations")


def _strongly_connected(wins: Tensor) -> bool:
    """Whether every player has beaten every other, directly or through a chain: Ford's condition."""
    reach = (wins > 0) | torch.eye(len(wins), dtype=torch.bool)
    for _ in range(len(wins)):
        reach = (reach.double() @ reach.double()) > 0
    return bool(reach.all())
