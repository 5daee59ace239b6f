"""Bradley-Terry: strengths of players from who beat whom. P(i beats j) = sigmoid(theta_i - theta_j).

The model behind DPO: with theta the reward it is Eq. 1 of https://arxiv.org/abs/2305.18290. R. A. Bradley and
M. E. Terry (Rank analysis of incomplete block designs, Biometrika 39, 1952) write alpha_i / (alpha_i + alpha_j), which
is the same with alpha = exp(theta). One idea to keep in mind: games determine only differences of log strengths. So
the likelihood is maximized with one player held at 0, and the result is centred: log strengths sum to 0.

Letters: K players, G clusters. wins[i, j] is how often i beat j; a tie is half a win for both.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_cli.theory.statistics import Z95

MAX_NEWTON_STEPS = 2000  # about 5 are needed; about 40 where one side wins a billion games to one
STEP_TOLERANCE = 1e-8  # nats; Newton converges quadratically: the next step would be about 1e-16

Groups = tuple[tuple[int, ...], ...]  # players by their index, in increasing order


class NoMaximumError(ValueError):
    """The likelihood has no maximum: some groups never met, or some player's strength has no bound.

    `apart` are the groups of players that no chain of games connects, where there are several. Else `undefeated` are
    the groups that never lost to a player outside, `winless` those that never beat one; there is at least one of each.
    """

    def __init__(self, apart: Groups = (), undefeated: Groups = (), winless: Groups = ()) -> None:
        super().__init__(f"no maximum-likelihood strengths: {apart=}, {undefeated=}, {winless=}")
        self.apart, self.undefeated, self.winless = apart, undefeated, winless


@dataclass(frozen=True)
class Fit:
    """Log strengths with their covariance, and how well one strength per player fits the games."""

    log_strengths: Tensor  # (K,) float64, in nats; they sum to 0
    covariance: Tensor  # (K, K) of the log strengths; every row sums to 0
    deviance: float  # twice the log-likelihood ratio of a free P(i beats j) for each pair that met to this fit
    chi_square: float  # Pearson's: the sum of (wins - expected)^2 / expected
    degrees_of_freedom: int  # of both: pairs that met, less the differences of strength that were fitted
    prior: float  # ties of every player with an average player
    clusters: int | None  # independent units; None where every game is one

    @property
    def strengths(self) -> Tensor:
        """Alpha, (K,), scaled to sum to 1."""
        return self.log_strengths.softmax(0)

    @property
    def standard_errors(self) -> Tensor:
        """Of each log strength, (K,), in nats."""
        return self.covariance.diagonal().clamp(min=0).sqrt()

    def interval(self) -> tuple[Tensor, Tensor]:
        """The ends of the 95% intervals of the log strengths, (K,) each."""
        half = Z95 * self.standard_errors
        return self.log_strengths - half, self.log_strengths + half

    @property
    def win_probabilities(self) -> Tensor:
        """P(row beats column), (K, K); 1/2 on the diagonal."""
        return win_probability(self.log_strengths)

    def win_probability_interval(self) -> tuple[Tensor, Tensor]:
        """The ends of the 95% intervals of P(row beats column), (K, K) each.

        Normal on the scale of the log-odds theta_i - theta_j, so that no end leaves [0, 1].
        """
        log_odds = self.log_strengths[:, None] - self.log_strengths[None, :]
        variances = self.covariance.diagonal()
        half = Z95 * (variances[:, None] + variances[None, :] - 2 * self.covariance).clamp(min=0).sqrt()
        return torch.sigmoid(log_odds - half), torch.sigmoid(log_odds + half)

    @property
    def p_value(self) -> float | None:
        """How often games of this model would fit as badly as these: small where A beats B beats C beats A.

        From Pearson's chi-square, not the deviance: where pairs meet a few times only, the deviance is too great too
        often (8 equal players, 4 games a pair: 23% of deviances pass the 5% bound, 6% of chi-squares). Ties as half
        wins scatter less than wins, so that with many ties it is too great. None where there is nothing to test (no
        degree of freedom) or no chi-square distribution to test by (a prior, or clusters of games).
        """
        if self.degrees_of_freedom == 0 or self.prior > 0 or self.clusters is not None:
            return None
        half = torch.tensor([self.degrees_of_freedom / 2, self.chi_square / 2], dtype=torch.float64)
        return float(torch.special.gammaincc(half[0], half[1]))


def win_probability(log_strengths: Tensor) -> Tensor:
    """sigmoid(theta_i - theta_j), (K, K): P(row beats column), Eq. 1."""
    return torch.sigmoid(log_strengths[:, None] - log_strengths[None, :])


def fit(wins: Tensor, prior: float = 0.0, clusters: Tensor | None = None) -> Fit:
    """The maximum-likelihood log strengths of the table `wins`, (K, K), with their covariance.

    Without a prior the maximum exists where every player has beaten every other, directly or through a chain (L. R.
    Ford, Solution of a ranking problem from binary comparisons, American Mathematical Monthly 64, 1957; Assumption 1
    of D. R. Hunter, MM algorithms for generalized Bradley-Terry models, https://doi.org/10.1214/aos/1079120141);
    NoMaximumError says where that fails. With `prior` > 0 it always exists: every player also has that many
    ties with an imaginary average player, who is expected to win half of its games. Counts and prior may differ by a
    factor of 1e12.

    `clusters`, (G, K, K), are tables that sum to `wins`, one for each independent unit, such as a prompt that all
    players answered. Games of one prompt share its responses, and a good response wins all of them, so 10 games tell
    less than 10 prompts. The covariance is then the sandwich H^-1 (sum of s s^T) H^-1 G/(G-1), s the score of a
    cluster, which counts clusters and not games (K.-Y. Liang and S. L. Zeger, Longitudinal data analysis using
    generalized linear models, Biometrika 73, 1986). It needs many more clusters than players.
    """
    wins = wins.double()
    size = len(wins)
    assert size > 1, "one player has nobody to be compared with"
    assert wins.shape == (size, size) and bool(wins.isfinite().all()) and bool((wins >= 0).all()), wins
    assert not bool(wins.diagonal().any()), f"players against themselves: {wins.diagonal().tolist()}"
    assert 0 <= prior < math.inf, prior
    joined = _reachable((wins + wins.mT) > 0)
    if prior == 0:
        _check_existence(wins, joined)
    played = _with_average_player(wins, prior) if prior > 0 else wins
    located = _maximise(played)
    inverse = _inverse_information(played, located)[:size, :size]
    located = located[:size]
    bread = inverse if clusters is None else inverse @ _scatter_of_scores(clusters, wins, located, prior) @ inverse
    centring = torch.eye(size, dtype=torch.float64) - 1 / size
    games = wins + wins.mT
    pairs = int((games > 0).sum()) // 2
    return Fit(
        log_strengths=centring @ located,
        covariance=centring @ bread @ centring,
        deviance=_deviance(wins, located),
        chi_square=_chi_square(wins, located),
        # Within each group that games join, its size less one differences were fitted.
        degrees_of_freedom=pairs - (size - len(_groups(joined))),
        prior=prior,
        clusters=None if clusters is None else len(clusters),
    )


def _with_average_player(wins: Tensor, prior: float) -> Tensor:
    """The table with the imaginary player last: prior/2 wins each way against everybody."""
    table = torch.nn.functional.pad(wins, (0, 1, 0, 1), value=prior / 2)
    table[-1, -1] = 0
    return table


def _maximise(wins: Tensor) -> Tensor:
    """The log strengths (K,) that maximize sum of wins[i, j] log sigmoid(theta_i - theta_j), the last held at 0.

    Newton's method, each step scaled so that the likelihood of a logistic model can only rise: if the step moves a
    pair's log-odds by M at most, log(1 + M)/M of it is taken (Proposition 1 of F. Bach, Self-concordant analysis for
    logistic regression, https://arxiv.org/abs/0910.4627).
    """
    met = (wins + wins.mT) > 0
    located = torch.zeros(len(wins), dtype=torch.float64)
    for _ in range(MAX_NEWTON_STEPS):
        step = _inverse_information(wins, located) @ _score(wins, located)
        reach = (step[:, None] - step[None, :]).abs()[met].max().clamp(min=1e-12)
        located = located + step * torch.log1p(reach) / reach
        if reach < STEP_TOLERANCE:
            return located
    raise AssertionError(f"after {MAX_NEWTON_STEPS} Newton steps the last still moved by {float(reach):.1e}")


def _score(wins: Tensor, located: Tensor) -> Tensor:
    """The gradient of the log-likelihood by the log strengths, (..., K): wins of i less those that were expected."""
    probabilities = win_probability(located)
    # Not wins - games * probabilities, which is the same number but loses a rare upset to rounding.
    return (wins * probabilities.mT - wins.mT * probabilities).sum(-1)


def _inverse_information(wins: Tensor, located: Tensor) -> Tensor:
    """The inverse of the Fisher information with the last player held at 0, (K, K): its row and column are 0.

    A game informs P(i beats j) P(j beats i) about theta_i - theta_j.
    """
    probabilities = win_probability(located)
    weights = (wins + wins.mT) * probabilities * probabilities.mT
    information = torch.diag(weights.sum(-1)) - weights
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(information[:-1, :-1]))
    return torch.nn.functional.pad(inverse, (0, 1, 0, 1))


def _scatter_of_scores(clusters: Tensor, wins: Tensor, located: Tensor, prior: float) -> Tensor:
    """G/(G-1) times the sum of s s^T over the clusters, (K, K)."""
    clusters = clusters.double()
    number = len(clusters)
    assert number > 1, f"{number} clusters say nothing about how clusters differ"
    assert torch.allclose(clusters.sum(0), wins), "the clusters do not sum to the wins"
    scores = _score(clusters, located)
    # Their mean is 0 at the maximum; with a prior it is not, and the prior does not vary.
    scores = scores - scores.mean(0)
    scatter = scores.mT @ scores * number / (number - 1)
    if prior > 0:  # the prior's ties are as uncertain as games, else a player who always wins would have no error
        against_average = torch.sigmoid(located)
        scatter = scatter + torch.diag(prior * against_average * (1 - against_average))
    return scatter


def _deviance(wins: Tensor, located: Tensor) -> float:
    """2 sum of wins log(observed share / P(i beats j)), over the pairs that met."""
    shares = wins / (wins + wins.mT)
    log_probabilities = torch.nn.functional.logsigmoid(located[:, None] - located[None, :])
    terms = wins * (shares.log() - log_probabilities)
    return max(0.0, 2 * float(terms[wins > 0].sum()))  # rounding may leave a sum below 0


def _chi_square(wins: Tensor, located: Tensor) -> float:
    """Pearson's, over the pairs that met: sum of (wins - expected)^2 / expected."""
    games = wins + wins.mT
    # Strengths may differ so much that an expected number is 0 in float64.
    expected = (games * win_probability(located)).clamp(min=1e-280)
    return float(((wins - expected) ** 2 / expected)[games > 0].sum())


def _check_existence(wins: Tensor, joined: Tensor) -> None:
    """Ford's condition: the graph with an arrow from each winner to the loser is strongly connected."""
    groups = _groups(joined)
    if len(groups) > 1:
        raise NoMaximumError(apart=groups)
    above = _reachable(wins > 0)  # i has beaten j, directly or through a chain
    level = above & above.mT
    if not bool(level.all()):
        equals = _groups(level)
        undefeated = tuple(group for group in equals if not bool((above & ~level)[:, group[0]].any()))
        winless = tuple(group for group in equals if not bool((above & ~level)[group[0]].any()))
        raise NoMaximumError(undefeated=undefeated, winless=winless)


def _reachable(arrows: Tensor) -> Tensor:
    """Whether a path of arrows leads from row to column, (K, K); from each to itself, always."""
    reach = arrows | torch.eye(len(arrows), dtype=torch.bool)
    for _ in range(len(arrows).bit_length()):  # a path of 1, 2, 4, ... arrows
        reach = (reach.double() @ reach.double()) > 0
    return reach


def _groups(alike: Tensor) -> Groups:
    """The classes of an equivalence, (K, K), in the order of their first members."""
    members = (tuple(row.nonzero().flatten().tolist()) for row in alike)
    return tuple(dict.fromkeys(members))
