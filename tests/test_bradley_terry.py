"""Bradley-Terry strengths against hand calculations, Hunter's own algorithm and simulation; Cohen's kappa."""

import math
from collections.abc import Callable
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dpo_cli.labelling.agreement import cohen_kappa
from dpo_cli.theory.bradley_terry import Fit, NoMaximumError, fit, win_probability

Z = 1.959964  # the 97.5% quantile of the standard normal, from a table


def table(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# A beats B 8 to 4, A loses to C 3 to 5; B and C never met.
WORKED = table([[0, 8, 3], [4, 0, 0], [5, 0, 0]])
# A beats B beats C beats A, 8 to 2 each time.
CIRCLE = table([[0, 8, 2], [2, 0, 8], [8, 2, 0]])
# Everybody met everybody; 2.5 holds a tie.
FOUR = table([[0, 7, 4, 9], [3, 0, 2.5, 6], [5, 3.5, 0, 2], [1, 1, 4, 0]])


def hunter_mm(wins: Tensor, iterations: int = 3000) -> list[float]:
    """Log strengths, centred, by Hunter 2004: alpha_i <- W_i / sum_j n_ij / (alpha_i + alpha_j)."""
    players = range(len(wins))
    alpha = [1.0 for _ in players]
    won = [sum(float(wins[i, j]) for j in players) for i in players]
    games = [[float(wins[i, j] + wins[j, i]) for j in players] for i in players]
    for _ in range(iterations):
        alpha = [won[i] / sum(games[i][j] / (alpha[i] + alpha[j]) for j in players if j != i) for i in players]
        alpha = [value / sum(alpha) for value in alpha]
    logs = [math.log(value) for value in alpha]
    return [value - sum(logs) / len(logs) for value in logs]


def simulated(log_strengths: list[float], games: int, generator: torch.Generator) -> Tensor:
    """Wins where every two players meet `games` times; P(i beats j) = 1 / (1 + exp(theta_j - theta_i))."""
    wins = torch.zeros(len(log_strengths), len(log_strengths), dtype=torch.float64)
    for i, one in enumerate(log_strengths):
        for j, other in enumerate(log_strengths[:i]):
            beaten = torch.rand(games, generator=generator) < 1 / (1 + math.exp(other - one))
            wins[i, j] = int(beaten.sum())
            wins[j, i] = games - wins[i, j]
    return wins


def single_games(wins: Tensor) -> Tensor:
    """Every game as a table of its own."""
    games = []
    for i, j in wins.nonzero().tolist():
        one = torch.zeros_like(wins)
        one[i, j] = 1
        games += [one] * int(wins[i, j])
    return torch.stack(games)


def covariance_of_difference(fitted: Fit, i: int, j: int) -> float:
    return float(fitted.covariance[i, i] + fitted.covariance[j, j] - 2 * fitted.covariance[i, j])


def test_bradley_terry_gives_the_worked_example() -> None:
    # Each pair meets on its own, so the fit is exact: alpha_B = alpha_A 4/8 and alpha_C = alpha_A 5/3. So
    # P(B beats C) = (1/2) / (1/2 + 5/3) = 3/13, though the two never met.
    fitted = fit(WORKED)
    a, b, c = fitted.strengths.tolist()
    assert (b / a, c / a) == (pytest.approx(1 / 2, abs=1e-9), pytest.approx(5 / 3, abs=1e-9))
    assert a + b + c == pytest.approx(1, abs=1e-12)
    assert float(fitted.win_probabilities[1, 2]) == pytest.approx(3 / 13, abs=1e-9)
    # ln alpha, less the mean of ln 1, ln 1/2 and ln 5/3
    mean = (math.log(1 / 2) + math.log(5 / 3)) / 3
    expected = [-mean, math.log(1 / 2) - mean, math.log(5 / 3) - mean]
    assert fitted.log_strengths.tolist() == pytest.approx(expected, abs=1e-9)
    # two pairs met and two differences were fitted: nothing is left to test
    assert (fitted.degrees_of_freedom, fitted.p_value) == (0, None)
    assert fitted.deviance == pytest.approx(0, abs=1e-12) and fitted.chi_square == pytest.approx(0, abs=1e-12)


def test_the_row_beats_the_column() -> None:
    # theta = (ln 3, 0): 3 / (3 + 1)
    probabilities = win_probability(table([[math.log(3), 0.0]])[0])
    assert probabilities.tolist() == [pytest.approx([1 / 2, 3 / 4]), pytest.approx([1 / 4, 1 / 2])]


@pytest.mark.parametrize("wins", [WORKED, CIRCLE, FOUR, 1000 * FOUR], ids=["worked", "circle", "four", "many games"])
def test_newton_arrives_where_hunters_iteration_does(wins: Tensor) -> None:
    assert fit(wins).log_strengths.tolist() == pytest.approx(hunter_mm(wins), abs=1e-9)


counts = st.integers(1, 40).map(lambda halves: halves / 2)
tables = st.integers(2, 6).flatmap(
    lambda size: st.lists(counts, min_size=size * size, max_size=size * size).map(
        lambda cells: table([cells]).reshape(size, size) * (1 - torch.eye(size, dtype=torch.float64))
    )
)

priors = st.sampled_from([0.0, 0.001, 1.0, 3.0])


def expected_wins(theta: list[float], wins: Tensor) -> list[float]:
    """Of each player, sum of n_ij P(i beats j); less the wins it had, this is the gradient of the log-likelihood."""
    players = range(len(wins))
    games = (wins + wins.mT).tolist()
    return [sum(games[i][j] / (1 + math.exp(theta[j] - theta[i])) for j in players) for i in players]


@given(tables)
def test_at_the_fit_every_player_has_won_as_often_as_was_expected(wins: Tensor) -> None:
    theta = fit(wins).log_strengths.tolist()
    assert sum(theta) == pytest.approx(0, abs=1e-9)
    assert expected_wins(theta, wins) == pytest.approx(wins.sum(1).tolist(), abs=1e-8)


def test_games_at_which_whole_newton_steps_would_run_away_are_fitted() -> None:
    # Undamped, the strengths of this table are infinite after 8 steps.
    wins = table([[0, 0, 0, 1], [0, 0, 1, 5], [1000, 10000, 0, 0], [1000, 1, 0, 0]])
    theta = fit(wins).log_strengths.tolist()
    assert expected_wins(theta, wins) == pytest.approx(wins.sum(1).tolist(), rel=1e-9)


@given(tables, priors)
def test_losses_for_wins_turn_the_strengths_around(wins: Tensor, prior: float) -> None:
    fitted, turned = fit(wins, prior), fit(wins.mT, prior)
    assert turned.log_strengths.tolist() == pytest.approx((-fitted.log_strengths).tolist(), abs=1e-9)
    assert turned.standard_errors.tolist() == pytest.approx(fitted.standard_errors.tolist(), rel=1e-6)


@given(tables, priors, st.randoms(use_true_random=False))
def test_the_order_of_the_players_is_no_matter(wins: Tensor, prior: float, random: Random) -> None:
    order = list(range(len(wins)))
    random.shuffle(order)
    fitted, shuffled = fit(wins, prior), fit(wins[order][:, order], prior)
    assert shuffled.log_strengths.tolist() == pytest.approx(fitted.log_strengths[order].tolist(), abs=1e-9)
    expected = fitted.covariance[order][:, order].flatten().tolist()
    assert shuffled.covariance.flatten().tolist() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@given(tables, st.sampled_from([0.5, 3.0, 100.0]))
def test_c_times_the_games_divide_every_variance_by_c(wins: Tensor, c: float) -> None:
    fitted, scaled = fit(wins), fit(c * wins)
    assert scaled.log_strengths.tolist() == pytest.approx(fitted.log_strengths.tolist(), abs=1e-9)
    expected = (fitted.covariance / c).flatten().tolist()
    assert scaled.covariance.flatten().tolist() == pytest.approx(expected, rel=1e-6, abs=1e-12)
    # and the misfit grows with the games
    assert scaled.deviance == pytest.approx(c * fitted.deviance, rel=1e-6, abs=1e-8)
    assert scaled.chi_square == pytest.approx(c * fitted.chi_square, rel=1e-6, abs=1e-8)


def test_a_tie_is_half_a_win_for_both() -> None:
    # 2 wins, 1 loss and 2 ties are 3 to 2: P = 3/5
    ties = table([[0, 1], [1, 0]])
    fitted = fit(table([[0, 2], [1, 0]]) + ties)
    assert float(fitted.win_probabilities[0, 1]) == pytest.approx(3 / 5, abs=1e-12)
    # nobody is undefeated who has drawn: 3 wins and 1 tie are 3.5 to 0.5
    half = fit(table([[0, 3.5], [0.5, 0]]))
    assert float(half.win_probabilities[0, 1]) == pytest.approx(7 / 8, abs=1e-12)


def test_strengths_as_far_apart_as_counts_can_put_them_are_found() -> None:
    # a billion wins to one loss in a thousand games: the log-odds are ln 1e12
    fitted = fit(table([[0, 1e9], [1e-3, 0]]))
    assert fitted.log_strengths.tolist() == pytest.approx([math.log(1e12) / 2, -math.log(1e12) / 2], rel=1e-12)
    # 30 players in a row, each beating the next a million to one: neighbours are ln 1e6 apart, the ends 29 times that
    chain = torch.diag(torch.full((29,), 1e6), 1) + torch.diag(torch.ones(29), -1)
    theta = fit(chain).log_strengths
    assert (theta[:-1] - theta[1:]).tolist() == pytest.approx([math.log(1e6)] * 29, abs=1e-9)


def test_the_standard_errors_of_two_players_are_those_of_a_logit() -> None:
    # the log-odds of w1 to w2 have variance 1/w1 + 1/w2 = 1/8 + 1/4; each centred strength is half of them
    fitted = fit(table([[0, 8], [4, 0]]))
    error = math.sqrt(1 / 8 + 1 / 4)
    assert fitted.standard_errors.tolist() == pytest.approx([error / 2, error / 2], rel=1e-9)
    low, high = fitted.interval()
    assert low.tolist() == pytest.approx([(math.log(2) - Z * error) / 2, (-math.log(2) - Z * error) / 2], abs=1e-6)
    assert high.tolist() == pytest.approx([(math.log(2) + Z * error) / 2, (-math.log(2) + Z * error) / 2], abs=1e-6)
    # P(A beats B) = 2/3, with the ends of its log-odds ln 2 -+ 1.96 se taken back to probabilities
    least, most = fitted.win_probability_interval()
    ends = [1 / (1 + math.exp(-(math.log(2) + sign * Z * error))) for sign in (-1, 1)]
    assert [float(least[0, 1]), float(most[0, 1])] == pytest.approx(ends, abs=1e-6)
    assert [float(least[1, 0]), float(most[1, 0])] == pytest.approx([1 - ends[1], 1 - ends[0]], abs=1e-6)
    assert least.diagonal().tolist() == most.diagonal().tolist() == [0.5, 0.5]


def test_players_who_never_met_are_compared_through_others_at_the_cost_of_both_errors() -> None:
    # B and C met A only: var(theta_B - theta_C) = (1/8 + 1/4) + (1/3 + 1/5)
    fitted = fit(WORKED)
    assert covariance_of_difference(fitted, 0, 1) == pytest.approx(1 / 8 + 1 / 4, rel=1e-9)
    assert covariance_of_difference(fitted, 0, 2) == pytest.approx(1 / 3 + 1 / 5, rel=1e-9)
    assert covariance_of_difference(fitted, 1, 2) == pytest.approx(1 / 8 + 1 / 4 + 1 / 3 + 1 / 5, rel=1e-9)
    # theta_A = (2 a - b - c)/3 with b = theta_A - theta_B ...: var = ((1/8 + 1/4) + (1/3 + 1/5)) / 9
    assert float(fitted.covariance[0, 0]) == pytest.approx((1 / 8 + 1 / 4 + 1 / 3 + 1 / 5) / 9, rel=1e-9)
    assert fitted.covariance.sum(1).tolist() == pytest.approx([0, 0, 0], abs=1e-12)


def test_simulated_games_scatter_as_the_standard_errors_say() -> None:
    truth = [0.8, 0.1, -0.9]
    generator = torch.Generator().manual_seed(0)
    fits = [fit(simulated(truth, 100, generator)) for _ in range(200)]
    found = torch.stack([fitted.log_strengths for fitted in fits])
    errors = torch.stack([fitted.standard_errors for fitted in fits]).mean(0)
    # 200 repeats know a standard deviation to 5% and a mean to 0.07 of it
    assert found.std(0).tolist() == pytest.approx(errors.tolist(), rel=0.2)
    assert found.mean(0).tolist() == pytest.approx(truth, abs=0.05)
    # of 600 intervals 95% hold the truth, give or take 1%
    low, high = (torch.stack([fitted.interval()[end] for fitted in fits]) for end in (0, 1))
    held = ((low < table([truth])) & (table([truth]) < high)).double().mean()
    assert float(held) == pytest.approx(0.95, abs=0.035)


def test_a_prior_is_games_drawn_with_one_more_player_who_is_average() -> None:
    wins = table([[0, 3, 0], [1, 0, 2], [0, 0, 0]])
    more = torch.zeros(4, 4, dtype=torch.float64)
    more[:3, :3] = wins
    more[:3, 3] = more[3, :3] = 1  # 2 games with everybody, one of them won
    with_one_more, fitted = fit(more), fit(wins, prior=2.0)
    players = with_one_more.log_strengths[:3]
    assert fitted.log_strengths.tolist() == pytest.approx((players - players.mean()).tolist(), abs=1e-9)
    for i, j in [(0, 1), (1, 2), (0, 2)]:
        assert covariance_of_difference(fitted, i, j) == pytest.approx(covariance_of_difference(with_one_more, i, j))
    # average: it is expected to win 3 of its 6 games
    assert 2 * float(with_one_more.win_probabilities[3, :3].sum()) == pytest.approx(3, abs=1e-9)


def test_a_prior_gives_the_undefeated_a_strength_with_a_bound() -> None:
    # A beats B 3 to 0. With prior 1 the two lie at t and -t around the average player:
    # 3 (1 - sigmoid(2t)) + 1/2 - sigmoid(t) = 0
    t = float(fit(table([[0, 3], [0, 0]]), prior=1.0).log_strengths[0])
    assert 3 * (1 - 1 / (1 + math.exp(-2 * t))) + 1 / 2 - 1 / (1 + math.exp(-t)) == pytest.approx(0, abs=1e-12)
    assert t > 0
    # and players whom no game joins are compared through it; nothing at all makes all equal
    apart = fit(table([[0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 9], [0, 0, 1, 0]]), prior=1.0)
    assert [int(place) for place in apart.log_strengths.argsort(descending=True)] == [2, 0, 1, 3]
    assert fit(torch.zeros(2, 2), prior=1.0).log_strengths.tolist() == [0, 0]


@pytest.mark.parametrize("wins", [WORKED, FOUR])
def test_a_vanishing_prior_leaves_maximum_likelihood(wins: Tensor) -> None:
    plain = fit(wins)
    distances = []
    for prior in (1e-2, 1e-4, 1e-6):
        pulled = fit(wins, prior)
        distances.append(float((pulled.log_strengths - plain.log_strengths).abs().max()))
        assert distances[-1] < prior
        assert float(pulled.log_strengths.abs().max()) < float(plain.log_strengths.abs().max())
    assert distances[0] > distances[1] > distances[2] > 0
    assert fit(wins, 1e-6).standard_errors.tolist() == pytest.approx(plain.standard_errors.tolist(), abs=1e-5)


def test_groups_that_never_met_are_named() -> None:
    wins = torch.zeros(5, 5)
    wins[0, 3] = wins[3, 0] = wins[1, 2] = wins[2, 1] = 1
    with pytest.raises(NoMaximumError) as error:
        fit(wins)
    assert error.value.apart == ((0, 3), (1, 2), (4,))
    assert (error.value.undefeated, error.value.winless) == ((), ())


@pytest.mark.parametrize(
    ("games", "undefeated", "winless"),
    [
        ([(0, 1)], [(0,)], [(1,)]),
        ([(1, 0)], [(1,)], [(0,)]),
        # 1 and 2 beat each other and 0, who beat nobody
        ([(1, 2), (2, 1), (1, 0)], [(1, 2)], [(0,)]),
        # 0 and 1 never met, and neither lost
        ([(0, 2), (1, 2)], [(0,), (1,)], [(2,)]),
        # 0 above 1 and 2 above 3
        ([(0, 1), (1, 2), (2, 1), (2, 3)], [(0,)], [(3,)]),
    ],
)
def test_who_never_lost_and_who_never_won_are_named(
    games: list[tuple[int, int]], undefeated: list[tuple[int, ...]], winless: list[tuple[int, ...]]
) -> None:
    size = 1 + max(max(game) for game in games)
    wins = torch.zeros(size, size)
    for winner, loser in games:
        wins[winner, loser] = 1
    with pytest.raises(NoMaximumError) as error:
        fit(wins)
    assert error.value.apart == ()
    assert (error.value.undefeated, error.value.winless) == (tuple(undefeated), tuple(winless))
    assert isinstance(error.value, ValueError)
    assert fit(wins, prior=1.0).prior == 1.0


def test_a_long_circle_of_wins_is_enough_for_a_maximum() -> None:
    # 17 players, each beat the next and the last the first: nobody is stronger
    wins = torch.zeros(17, 17)
    for player in range(17):
        wins[player, (player + 1) % 17] = 2
    assert fit(wins).log_strengths.tolist() == pytest.approx([0] * 17, abs=1e-12)
    wins[16, 0] = 0
    with pytest.raises(NoMaximumError) as error:
        fit(wins)
    assert (error.value.undefeated, error.value.winless) == (((0,),), ((16,),))


def test_a_beats_b_beats_c_beats_a_does_not_fit_one_ranking() -> None:
    # All strengths are equal, so 5 of each 10 games were expected and 8 or 2 came: Pearson's chi-square is
    # 6 * 3^2 / 5 = 10.8, the deviance 3 * 2 (8 ln(8/5) + 2 ln(2/5)); 3 pairs less 2 differences leave 1 degree.
    fitted = fit(CIRCLE)
    assert fitted.log_strengths.tolist() == pytest.approx([0, 0, 0], abs=1e-12)
    assert fitted.chi_square == pytest.approx(10.8, rel=1e-9)
    assert fitted.deviance == pytest.approx(6 * (8 * math.log(8 / 5) + 2 * math.log(2 / 5)), rel=1e-9)
    assert fitted.degrees_of_freedom == 1
    # with one degree of freedom, P(chi-square > x) = erfc(sqrt(x/2))
    assert fitted.p_value == pytest.approx(math.erfc(math.sqrt(10.8 / 2)), rel=1e-9)


def test_where_the_model_holds_few_tables_are_said_not_to_fit_though_pairs_met_only_6_times() -> None:
    generator = torch.Generator().manual_seed(1)
    fits = [fit(simulated([0.5, 0.2, 0.0, -0.2, -0.5], 6, generator)) for _ in range(200)]
    assert {fitted.degrees_of_freedom for fitted in fits} == {10 - 4}
    # 5% of 200, give or take 1.5%
    assert 0.01 <= sum((fitted.p_value or 0) < 0.05 for fitted in fits) / 200 <= 0.1


def test_there_is_no_p_value_where_the_chi_square_distribution_is_no_guide() -> None:
    assert fit(CIRCLE, prior=1.0).p_value is None
    assert fit(CIRCLE, clusters=single_games(CIRCLE)).p_value is None
    # the table itself is measured all the same, and a prior changes no count of pairs
    assert fit(CIRCLE, prior=1.0).chi_square == pytest.approx(10.8)
    two = fit(table([[0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 9], [0, 0, 1, 0]]), prior=1.0)
    assert two.degrees_of_freedom == 0  # 2 pairs, 2 groups with one difference each


def test_clusters_of_one_game_each_agree_with_the_model() -> None:
    # Where each pair is fitted exactly, w won games scatter (1-p)^2 each and the lost ones p^2: n p (1-p) together,
    # which is the information; so only G/(G-1) is left between the two.
    plain, robust = fit(WORKED), fit(WORKED, clusters=single_games(WORKED))
    assert robust.clusters == 20
    expected = (plain.covariance * 20 / 19).flatten().tolist()
    assert robust.covariance.flatten().tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    # and with many simulated games, which fit as well as chance lets them, nearly so
    wins = simulated([0.8, 0.1, -0.9], 400, torch.Generator().manual_seed(2))
    plain, robust = fit(wins), fit(wins, clusters=single_games(wins))
    assert robust.standard_errors.tolist() == pytest.approx(plain.standard_errors.tolist(), rel=0.05)


def test_games_counted_five_times_over_do_not_narrow_the_intervals() -> None:
    once = single_games(WORKED)
    robust, five_fold = fit(WORKED, clusters=once), fit(5 * WORKED, clusters=5 * once)
    expected = robust.covariance.flatten().tolist()
    assert five_fold.covariance.flatten().tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    # the model alone would have believed in five times the games
    believed = (fit(WORKED).covariance / 5).flatten().tolist()
    assert fit(5 * WORKED).covariance.flatten().tolist() == pytest.approx(believed, rel=1e-9, abs=1e-12)


def test_the_sandwich_of_two_players_is_the_variance_of_a_mean_over_prompts() -> None:
    # On 4 prompts A won 3, 2, 1 and 2 of 3 games, 8 of 12: p = 2/3. The scores are wins less 2: 1, 0, -1, 0. So
    # var(log-odds) = 4/3 * (1 + 1) / (12 * 2/3 * 1/3)^2 = (8/3) / (8/3)^2 = 3/8, a quarter of it for each strength.
    prompts = torch.zeros(4, 2, 2, dtype=torch.float64)
    prompts[:, 0, 1] = torch.tensor([3.0, 2.0, 1.0, 2.0])
    prompts[:, 1, 0] = 3 - prompts[:, 0, 1]
    fitted = fit(prompts.sum(0), clusters=prompts)
    assert covariance_of_difference(fitted, 0, 1) == pytest.approx(3 / 8, rel=1e-9)
    assert float(fitted.covariance[0, 0]) == pytest.approx(3 / 32, rel=1e-9)


def test_a_player_who_won_on_every_prompt_keeps_the_error_of_the_games_that_nobody_played() -> None:
    """20 prompts, A beats B on each: their scores do not scatter at all, and only the drawn games can.

    Each has prior games at p = P(A beats the average one): variance prior p (1 - p) of the score, both players alike;
    by d theta_A = score / I on the line theta_A = -theta_B, where the score is that of A's wins less that of B's.
    """
    table = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    found = fit(table * 20, prior=1.0, clusters=table.expand(20, 2, 2))
    theta = float(found.log_strengths[0])
    p, q = 1 / (1 + math.exp(-theta)), 1 / (1 + math.exp(-2 * theta))
    # Along (1, -1)/sqrt(2): the information is 2 x 20 q (1 - q) of the games and p (1 - p) of each drawn one.
    information, scatter = 2 * 20 * q * (1 - q) + p * (1 - p), p * (1 - p)
    assert float(found.standard_errors[0]) == pytest.approx(math.sqrt(scatter / 2) / information, rel=1e-6)


@pytest.mark.parametrize(
    "call",
    [
        lambda: fit(table([[0, 1], [1, 1]])),
        lambda: fit(table([[0, -1], [1, 0]])),
        lambda: fit(table([[0, math.nan], [1, 0]])),
        lambda: fit(table([[0, 1, 1], [1, 0, 1]])),
        lambda: fit(table([[0]])),
        lambda: fit(WORKED, prior=-1.0),
        lambda: fit(WORKED, clusters=single_games(WORKED)[1:]),
        lambda: fit(WORKED, clusters=WORKED[None]),
        lambda: cohen_kappa(torch.zeros(2, 2)),
        lambda: cohen_kappa(torch.ones(2, 3)),
    ],
)
def test_what_is_no_table_of_games_is_a_broken_promise(call: Callable[[], object]) -> None:
    with pytest.raises(AssertionError):
        call()


# Cohen's kappa


@pytest.mark.parametrize(
    ("counts", "observed", "chance", "kappa"),
    [
        # https://en.wikipedia.org/wiki/Cohen's_kappa: 35 of 50 agree; 0.5 * 0.6 + 0.5 * 0.4 would by chance
        ([[20, 5], [10, 15]], 0.7, 0.5, 0.4),
        # the same page: as much agreement, other habits
        ([[45, 15], [25, 15]], 0.6, 0.54, 0.06 / 0.46),
        ([[25, 35], [5, 35]], 0.6, 0.46, 0.14 / 0.54),
        # an annotator who tosses a coin
        ([[10, 10], [10, 10]], 0.5, 0.5, 0.0),
        ([[0, 7], [7, 0]], 0.0, 0.5, -1.0),
    ],
)
def test_kappa_is_agreement_beyond_chance(
    counts: list[list[float]], observed: float, chance: float, kappa: float
) -> None:
    found = cohen_kappa(table(counts))
    assert (found.observed, found.chance) == (pytest.approx(observed), pytest.approx(chance))
    assert found.kappa.mean == pytest.approx(kappa, abs=1e-12)
    assert found.kappa.n == sum(map(sum, counts))


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        # what SAS prints, as kept in the tests of statsmodels (statsmodels/stats/tests/test_inter_rater.py)
        ([[0, 4, 1], [0, 8, 0], [0, 1, 5]], [0.4842, 0.1380, 0.2137, 0.7547]),
        # http://www.john-uebersax.com/stat/saskappa.htm
        ([[0, 0, 0], [5, 16, 3], [8, 12, 28]], [0.3333, 0.0814, 0.1738, 0.4929]),
    ],
)
def test_the_standard_error_of_kappa_is_that_of_fleiss_cohen_and_everitt(
    counts: list[list[float]], expected: list[float]
) -> None:
    found = cohen_kappa(table(counts))
    shown = [found.kappa.mean, found.standard_error, found.kappa.low, found.kappa.high]
    assert shown == pytest.approx(expected, abs=5.1e-5)


def test_the_error_of_kappa_is_what_repeated_labelling_scatters_by() -> None:
    shares = table([[0.35, 0.1, 0.0], [0.05, 0.2, 0.05], [0.05, 0.0, 0.2]])
    generator = torch.Generator().manual_seed(3)
    draws = torch.multinomial(shares.flatten().expand(400, -1), 300, replacement=True, generator=generator)
    found = [cohen_kappa(torch.bincount(draw, minlength=9).reshape(3, 3)).kappa.mean for draw in draws]
    # 400 repeats know a standard deviation to 3.5%
    assert float(torch.tensor(found).std()) == pytest.approx(cohen_kappa(300 * shares).standard_error, rel=0.15)


def test_swapping_the_annotators_changes_nothing() -> None:
    counts = table([[12, 3, 0], [1, 9, 4], [2, 2, 7]])
    one, other = cohen_kappa(counts), cohen_kappa(counts.mT)
    assert one.kappa.mean == pytest.approx(other.kappa.mean, abs=1e-12)
    assert one.standard_error == pytest.approx(other.standard_error, abs=1e-12)


def test_kappa_keeps_a_width_when_all_items_agree() -> None:
    # 5 items, chance (3/5)^2 + (2/5)^2 = 0.52; Wilson's lower end of 5 of 5 is 1 / (1 + z^2/5)
    found = cohen_kappa(table([[3, 0], [0, 2]]))
    assert (found.kappa.mean, found.standard_error, found.kappa.high) == (1.0, 0.0, 1.0)
    assert found.kappa.low == pytest.approx((1 / (1 + Z**2 / 5) - 0.52) / 0.48, abs=1e-6)
    # none of 6: the upper end is 1 - 1 / (1 + z^2/6), over chance 1/2
    never = cohen_kappa(table([[0, 3], [3, 0]]))
    assert (never.kappa.mean, never.kappa.low) == (-1.0, -1.0)
    assert never.kappa.high == pytest.approx((1 - 1 / (1 + Z**2 / 6) - 0.5) / 0.5, abs=1e-6)


def test_one_category_throughout_tells_nothing() -> None:
    found = cohen_kappa(table([[0, 0], [0, 9]]))
    assert (found.observed, found.chance, found.standard_error) == (1.0, 1.0, math.inf)
    assert (found.kappa.mean, found.kappa.low, found.kappa.high, found.kappa.n) == (0.0, -1.0, 1.0, 9)


def test_one_annotator_with_one_habit_agrees_by_chance_only() -> None:
    # the first always says 0, the second says so in 6 of 9: observed 2/3, chance 1 * 2/3
    found = cohen_kappa(table([[6, 3], [0, 0]]))
    assert (found.observed, found.chance) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert found.kappa.mean == pytest.approx(0, abs=1e-12)


@given(st.lists(st.integers(0, 9), min_size=9, max_size=9).filter(any))
def test_kappa_and_its_interval_stay_between_minus_one_and_one(cells: list[int]) -> None:
    kappa = cohen_kappa(torch.tensor(cells).reshape(3, 3)).kappa
    assert -1 <= kappa.low <= kappa.mean <= kappa.high <= 1
