"""The loss is a pure function of log-ratios: golden numbers, its gradient, its symmetries and limits."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dpo_cli.config.schema import LOSS_OPTIONS
from dpo_cli.theory.losses import (
    LOSSES,
    LogRatios,
    PairLogps,
    gradient_weight,
    hinge,
    implicit_rewards,
    loss_options,
    make_loss,
    robust,
    sigmoid,
    sigmoid_norm,
)

BETA = 0.1
# The inputs of torchtune's test_dpo_loss: beta * margin = [0, 1, 2].
POLICY = PairLogps(
    torch.tensor([-0.5, -10.0, -1.0]), torch.tensor([-0.1, -30.0, -21.0]),
    torch.tensor([2, 4, 5]), torch.tensor([3, 6, 4]),
)  # fmt: skip
REFERENCE = PairLogps(
    torch.tensor([-0.5, -10.1, -0.1]), torch.tensor([-0.1, -20.1, -0.1]),
    torch.tensor([2, 4, 5]), torch.tensor([3, 6, 4]),
)  # fmt: skip
GOLDEN = LogRatios.between(POLICY, REFERENCE)


def ratios_of(margin: Tensor) -> LogRatios:
    ones = torch.ones_like(margin)
    return LogRatios(margin, torch.zeros_like(margin), ones, ones)


def test_sigmoid_gives_the_golden_numbers() -> None:
    # softplus(-x) for x = 0, 1, 2: ln 2, ln(1 + 1/e), ln(1 + 1/e^2)
    expected = [math.log(2), math.log(1 + math.exp(-1)), math.log(1 + math.exp(-2))]
    assert sigmoid(GOLDEN, BETA).tolist() == pytest.approx(expected, abs=1e-6)
    assert sigmoid(GOLDEN, BETA).tolist() == pytest.approx([0.693147, 0.313262, 0.126928], abs=1e-6)


def test_label_smoothing_gives_conservative_dpo() -> None:
    # (1-e) softplus(-x) + e softplus(x), and softplus(x) = softplus(-x) + x: the clean loss + e x
    expected = [0.693147, 0.313262 + 0.1 * 1, 0.126928 + 0.1 * 2]
    assert sigmoid(GOLDEN, BETA, label_smoothing=0.1).tolist() == pytest.approx(expected, abs=1e-6)


def test_gradient_of_the_loss_is_minus_beta_sigmoid_of_minus_u() -> None:
    chosen = POLICY.chosen.clone().requires_grad_()
    rejected = POLICY.rejected.clone().requires_grad_()
    policy = PairLogps(chosen, rejected, POLICY.chosen_tokens, POLICY.rejected_tokens)
    sigmoid(LogRatios.between(policy, REFERENCE), BETA).sum().backward()
    # -0.1 * sigmoid(-[0, 1, 2]) = -0.1 * [0.5, 0.268941, 0.119203]
    assert chosen.grad is not None and rejected.grad is not None
    assert chosen.grad.tolist() == pytest.approx([-0.05, -0.0268941, -0.0119203], abs=1e-7)
    assert rejected.grad.tolist() == pytest.approx([0.05, 0.0268941, 0.0119203], abs=1e-7)


def test_implicit_rewards_are_beta_times_the_log_ratios() -> None:
    chosen, rejected = implicit_rewards(GOLDEN, BETA)
    assert chosen.tolist() == pytest.approx([0, 0.01, -0.09], abs=1e-6)
    assert rejected.tolist() == pytest.approx([0, -0.99, -2.09], abs=1e-6)


def test_gradient_weight_is_half_before_the_policy_has_moved_and_falls_as_pairs_are_learned() -> None:
    expected = [1 / (1 + math.exp(u)) for u in (0, 1, 2)]
    assert gradient_weight(partial(sigmoid, beta=BETA), GOLDEN).tolist() == pytest.approx(expected, abs=1e-6)


# Of the pairs of GOLDEN, b d = 0, 1, 2, by hand: |dL/dc| + |dL/dr| over twice its value at 0.
WEIGHTS = {
    "hinge": [0.5, 0.0, 0.0],  # nothing once b d is 1; at 1 autograd takes the slope of the learned side
    "ipo_sum": [0.5, 0.5, 1.5],  # |d - 5| / 10 with d = 0, 10, 20
    # |b c - 1/2| + |b r + 1/2| over 2, with b c = 0, 0.01, -0.09 and b r = 0, -0.99, -2.09
    "sppo_hard": [0.5, 0.49, 1.09],
}


@pytest.mark.parametrize("name", sorted(WEIGHTS))
def test_each_loss_has_its_own_gradient_weight(name: str) -> None:
    assert gradient_weight(partial(LOSSES[name], beta=BETA), GOLDEN).tolist() == pytest.approx(WEIGHTS[name], abs=1e-6)


def test_the_gradient_weight_of_every_loss_is_half_at_the_start_and_leaves_no_gradient_behind() -> None:
    start = LogRatios(torch.zeros(3), torch.zeros(3), GOLDEN.chosen_tokens, GOLDEN.rejected_tokens)
    for name, hyperparameters, _ in FAMILY:
        loss = make_loss(name, BETA, **hyperparameters).loss
        with torch.no_grad():
            weights = gradient_weight(loss, start)
        assert weights.tolist() == [0.5, 0.5, 0.5] and not weights.requires_grad


@given(st.floats(-50, 50), st.floats(0.01, 2))
def test_swapping_the_responses_adds_beta_times_the_margin(margin: float, beta: float) -> None:
    d = torch.tensor([margin], dtype=torch.float64)
    there, back = sigmoid(ratios_of(d), beta), sigmoid(ratios_of(-d), beta)
    assert float(back) == pytest.approx(float(there) + beta * margin, abs=1e-9)


@given(st.floats(-20, 20))
def test_a_small_beta_gives_ln2_minus_half_beta_times_the_margin(margin: float) -> None:
    beta = 1e-4
    loss = float(sigmoid(ratios_of(torch.tensor([margin], dtype=torch.float64)), beta))
    # the next term of the series is (beta d)^2 / 8
    assert loss == pytest.approx(math.log(2) - beta * margin / 2, abs=(beta * margin) ** 2 / 8 + 1e-12)


@given(st.floats(0.01, 0.45))
def test_conservative_dpo_is_least_where_the_policy_says_what_the_labels_are_worth(e: float) -> None:
    # d/du [-(1-e) log sig(u) - e log sig(-u)] = sig(u) - (1-e), zero at u = log((1-e)/e)
    u = torch.tensor([math.log((1 - e) / e)], dtype=torch.float64, requires_grad=True)
    sigmoid(ratios_of(u), 1.0, label_smoothing=e).sum().backward()
    assert u.grad is not None and abs(float(u.grad)) < 1e-9


@given(st.floats(-300, 300))
def test_a_constant_of_the_prompt_changes_nothing(shift: float) -> None:
    moved = LogRatios(GOLDEN.chosen + shift, GOLDEN.rejected + shift, GOLDEN.chosen_tokens, GOLDEN.rejected_tokens)
    assert sigmoid(moved, BETA).tolist() == pytest.approx(sigmoid(GOLDEN, BETA).tolist(), abs=1e-4)


# The family. Expected numbers are the table's, computed outside this code from the formulas of the papers.

FAMILY = [
    ("sigmoid", {"label_smoothing": 0.0}, [0.693147, 0.313262, 0.126928]),
    ("sigmoid", {"label_smoothing": 0.1}, [0.693147, 0.413262, 0.326928]),
    ("robust", {"label_smoothing": 0.1}, [0.693147, 0.188262, -0.123072]),
    ("hinge", {}, [1, 0, 0]),
    ("ipo", {}, [25, 11.055625, 0.002025]),
    ("ipo_sum", {}, [25, 25, 225]),
    ("sigmoid_norm", {}, [0.693147, 0.6129, 0.47238]),
    ("exo_pair", {"label_smoothing": 1e-3}, [2.761231, 1.27631, 0.458972]),
    ("nca_pair", {}, [1.386294, 1.19522, 1.122047]),
    ("bco_pair", {}, [1.386294, 1.004121, 0.855775]),
    ("sppo_hard", {}, [50, 48.02, 287.62]),
    ("apo_zero", {}, [1, 0.768412, 0.632557]),
    ("apo_down", {}, [1, 0.771441, 0.596718]),
    ("discopop", {"temperature": 0.05}, [0.846574, 0.367879, 0.135335]),
]


@pytest.mark.parametrize(("name", "hyperparameters", "expected"), FAMILY)
def test_every_loss_gives_its_golden_numbers(
    name: str, hyperparameters: dict[str, float], expected: list[float]
) -> None:
    assert make_loss(name, BETA, **hyperparameters)(POLICY, GOLDEN).tolist() == pytest.approx(
        expected, rel=2e-5, abs=2e-6
    )


def test_the_table_of_loss_options_in_the_config_is_that_of_the_functions() -> None:
    assert {name: set(hyperparameters) for name, hyperparameters in LOSS_OPTIONS.items()} == {
        name: loss_options(name) for name in LOSSES
    }
    assert {name for name, _, _ in FAMILY} == set(LOSSES)


@pytest.mark.parametrize(("name", "hyperparameters", "expected"), FAMILY)
def test_autograd_of_every_loss_agrees_with_finite_differences(
    name: str, hyperparameters: dict[str, float], expected: list[float]
) -> None:
    preference = make_loss(name, BETA, **hyperparameters)
    tokens = (GOLDEN.chosen_tokens, GOLDEN.rejected_tokens)
    chosen = torch.tensor([0.3, -1.1, 2.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-0.2, 0.4, -1.3], dtype=torch.float64, requires_grad=True)

    def loss(c: Tensor, r: Tensor) -> Tensor:
        return preference(POLICY, LogRatios(c, r, *tokens)).sum()

    assert torch.autograd.gradcheck(loss, (chosen, rejected), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "hyperparameters", "expected"), FAMILY)
def test_at_the_start_every_loss_pulls_chosen_above_rejected(
    name: str, hyperparameters: dict[str, float], expected: list[float]
) -> None:
    chosen, rejected = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    ratios = LogRatios(chosen, rejected, torch.tensor([4]), torch.tensor([4]))
    make_loss(name, BETA, **hyperparameters)(POLICY, ratios).sum().backward()
    assert chosen.grad is not None and rejected.grad is not None
    # A step against the gradient moves d = c - r by grad_r - grad_c, which must be up.
    pull = float(rejected.grad - chosen.grad)
    if name == "discopop":
        # Its known flaw: dL/du = -3/4 + (1 - ln 2)/(4 tau) at u = 0 is positive for tau = 0.05.
        assert pull == pytest.approx(-2 * BETA * (-0.75 + (1 - math.log(2)) / 0.2), rel=1e-4)
    else:
        assert pull > 0


@given(st.floats(-30, 30), st.floats(0.01, 0.4))
def test_the_mean_of_robust_over_flipped_labels_is_clean_dpo(margin: float, e: float) -> None:
    # (1-e) L(d) + e L(-d) = -log sigmoid(b d)
    d = torch.tensor([margin], dtype=torch.float64)
    kept, flipped = (robust(ratios_of(some), BETA, label_smoothing=e) for some in (d, -d))
    assert float((1 - e) * kept + e * flipped) == pytest.approx(float(sigmoid(ratios_of(d), BETA)), abs=1e-9)


@given(st.floats(-40, 40))
def test_hinge_is_zero_exactly_where_the_margin_reaches_one(margin: float) -> None:
    loss = float(hinge(ratios_of(torch.tensor([margin], dtype=torch.float64)), BETA))
    assert (loss == 0) == (BETA * margin >= 1)


def test_discopop_stays_finite_where_the_margin_is_far_below_zero() -> None:
    # b d = -100: exp(100) m with m = sigmoid(-2000) = 0 is 0, and the logistic part 100.
    got = make_loss("discopop", BETA, temperature=0.05)(POLICY, ratios_of(torch.tensor([-1000.0])))
    assert got.tolist() == pytest.approx([100.0])


def test_losses_a_token_see_the_length_and_losses_of_sums_do_not() -> None:
    # Three shared leading tokens moved from both responses into the prompt: their log-ratios cancel in d = 2 - (-1).
    before = LogRatios(torch.tensor([2.5]), torch.tensor([-0.5]), torch.tensor([8]), torch.tensor([6]))
    after = LogRatios(torch.tensor([2.0]), torch.tensor([-1.0]), torch.tensor([5]), torch.tensor([3]))
    assert float(sigmoid(before, BETA)) == pytest.approx(float(sigmoid(after, BETA)), abs=1e-7)
    # b (2.5/8 + 0.5/6) = 0.0395833 and b (2/5 + 1/3) = 0.0733333
    assert float(sigmoid_norm(before, BETA)) == pytest.approx(math.log1p(math.exp(-0.03958333)), abs=1e-6)
    assert float(sigmoid_norm(after, BETA)) == pytest.approx(math.log1p(math.exp(-0.07333333)), abs=1e-6)


def test_sft_weight_adds_the_negative_log_likelihood_a_token() -> None:
    # -log pi(y+)/n+ = [0.5/2, 10/4, 1/5] = [0.25, 2.5, 0.2], a tenth of each on top of the DPO loss
    got = make_loss("sigmoid", BETA, sft_weight=0.1, label_smoothing=0.0)(POLICY, GOLDEN)
    assert got.tolist() == pytest.approx([0.693147 + 0.025, 0.313262 + 0.25, 0.126928 + 0.02], abs=1e-6)


def test_the_reward_model_loss_is_the_same_function_of_its_rewards() -> None:
    # Bradley-Terry, -log sigmoid(r+ - r-), with r = b log pi/pi_ref
    chosen, rejected = implicit_rewards(GOLDEN, BETA)
    bradley_terry = torch.log1p(torch.exp(-(chosen - rejected)))
    assert sigmoid(GOLDEN, BETA).tolist() == pytest.approx(bradley_terry.tolist(), abs=1e-6)
