"""The loss is a pure function of log-ratios: golden numbers, its gradient, its symmetries and limits."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dpo_cli.theory.losses import LogRatios, PairLogps, gradient_weight, implicit_rewards, make_loss, sigmoid

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
    assert gradient_weight(GOLDEN, BETA).tolist() == pytest.approx(expected, abs=1e-6)


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


def test_make_loss_sets_beta_and_dials() -> None:
    loss = make_loss("sigmoid", 0.1, label_smoothing=0.1)
    assert loss(GOLDEN).tolist() == pytest.approx([0.693147, 0.413262, 0.326928], abs=1e-6)
