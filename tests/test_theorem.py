"""DPO's theorem on policies small enough to compute: the loss, minimised, gives the policy that the reward asks for."""

import functools
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tabular import (
    every_pair,
    expected_loss,
    fit_dpo,
    kl_divergence,
    objective,
    optimum,
    preference_probabilities,
    sample_preferences,
    sampling_error,
)
from torch import Tensor

from dpo_cli.theory.losses import implicit_rewards

ROOT = Path(__file__).parent.parent
BETAS = [0.1, 0.5, 2.0]
SEEDS = [0, 1, 2]
PROMPTS, RESPONSES = 4, 6

every_beta = pytest.mark.parametrize("beta", BETAS)
every_seed = pytest.mark.parametrize("seed", SEEDS)


def problem(seed: int, prompts: int = PROMPTS, responses: int = RESPONSES) -> tuple[Tensor, Tensor]:
    """Reference log-probs and rewards, (prompts, responses) each."""
    generator = torch.Generator().manual_seed(seed)
    reference, rewards = torch.randn(2, prompts, responses, generator=generator, dtype=torch.float64)
    return reference.log_softmax(-1), rewards


def ordered(policy: Tensor, reference: Tensor, pairs: Tensor) -> float:
    """The share of the pairs marked in (..., R, R) whose chosen response has the greater implicit reward."""
    chosen, rejected = implicit_rewards(every_pair(policy, reference), beta=1.0)
    return float((chosen > rejected)[pairs].double().mean())


def test_the_optimum_of_two_responses_is_the_one_worked_by_hand() -> None:
    # pi_ref = (3/4, 1/4), r = (0, ln 3), b = 1/2: pi_ref exp(r/b) = (3/4, 9/4), so Z = 3 and pi* = (1/4, 3/4)
    reference = torch.tensor([0.75, 0.25], dtype=torch.float64).log()
    rewards = torch.tensor([0.0, math.log(3)], dtype=torch.float64)
    best = optimum(reference, rewards, 0.5)
    assert best.logps.exp().tolist() == pytest.approx([0.25, 0.75], abs=1e-12)
    assert float(best.log_partition) == pytest.approx(math.log(3), abs=1e-12)
    # E[r] = 3/4 ln 3; KL = 1/4 ln(1/3) + 3/4 ln 3 = 1/2 ln 3; so 3/4 ln 3 - 1/2 * 1/2 ln 3 = 1/2 ln 3 = b log Z
    assert float(objective(best.logps, reference, rewards, 0.5)) == pytest.approx(math.log(3) / 2, abs=1e-12)
    # the second is preferred with odds exp(ln 3) = 3 to 1, and DPO finds the same policy from those odds alone
    odds = torch.tensor([[0.0, 1.0], [3.0, 0.0]])
    assert fit_dpo(reference, odds, 0.5).exp().tolist() == pytest.approx([0.25, 0.75], abs=1e-12)


@every_seed
@every_beta
def test_dpo_on_exact_preferences_arrives_at_the_optimal_policy(beta: float, seed: int) -> None:
    reference, rewards = problem(seed)
    policy = fit_dpo(reference, preference_probabilities(rewards), beta)
    # pi* = pi_ref exp(r/b) / Z
    weights = reference.exp() * torch.exp(rewards / beta)
    best = weights / weights.sum(-1, keepdim=True)
    assert float((policy.exp() - best).abs().max()) < 1e-6
    assert float((policy - best.log()).abs().max()) < 1e-6


@every_seed
@every_beta
def test_the_implicit_reward_is_the_reward_up_to_a_constant_of_the_prompt(beta: float, seed: int) -> None:
    reference, rewards = problem(seed)
    policy = fit_dpo(reference, preference_probabilities(rewards), beta)
    implicit = implicit_rewards(every_pair(policy, reference), beta)[0][..., 0]
    # r = b log pi/pi_ref + b log Z, Eq. 5: the difference is one number per prompt, and that number is b log Z
    constant = beta * (reference.exp() * torch.exp(rewards / beta)).sum(-1).log()
    assert float((rewards - implicit - constant.unsqueeze(-1)).abs().max()) < 1e-6


@every_seed
@every_beta
def test_the_objective_reaches_beta_log_z(beta: float, seed: int) -> None:
    reference, rewards = problem(seed)
    policy = fit_dpo(reference, preference_probabilities(rewards), beta)
    reached = (policy.exp() * (rewards - beta * (policy - reference))).sum(-1)
    limit = beta * (reference.exp() * torch.exp(rewards / beta)).sum(-1).log()
    assert reached.tolist() == pytest.approx(limit.tolist(), abs=1e-9)
    assert objective(policy, reference, rewards, beta).tolist() == pytest.approx(limit.tolist(), abs=1e-9)


@every_beta
def test_the_loss_that_remains_is_the_entropy_of_the_labels(beta: float) -> None:
    reference, rewards = problem(seed=3)
    wins = preference_probabilities(rewards)
    policy = fit_dpo(reference, wins, beta)
    # p and 1 - p stand across the diagonal, so the mean over all pairs of -p log p is half the entropy of a label,
    # and the weights p sum to half of all pairs: the two halves cancel.
    entropy = -(wins * wins.log() + (1 - wins) * (1 - wins).log()).mean((-2, -1))
    assert expected_loss(policy, reference, wins, beta).tolist() == pytest.approx(entropy.tolist(), abs=1e-12)


logits = st.lists(st.floats(-20, 20), min_size=RESPONSES, max_size=RESPONSES)


@given(logits, st.integers(0, 99), st.sampled_from(BETAS))
def test_any_other_policy_falls_short_by_beta_times_its_divergence(other: list[float], seed: int, beta: float) -> None:
    reference, rewards = (table[0] for table in problem(seed))
    policy = torch.tensor(other, dtype=torch.float64).log_softmax(-1)
    # J(pi) = sum pi (r - b log pi/pi_ref) and r = b log pi*/pi_ref + b log Z give J(pi) = b log Z - b KL(pi || pi*)
    best = optimum(reference, rewards, beta)
    limit = beta * float(best.log_partition)
    reached = float(objective(policy, reference, rewards, beta))
    assert reached <= limit + 1e-9
    assert reached == pytest.approx(limit - beta * float(kl_divergence(policy, best.logps)), abs=1e-9)


@functools.cache
def fitted_once(beta: float) -> Tensor:
    reference, rewards = (table[0] for table in problem(seed=4))
    return fit_dpo(reference, preference_probabilities(rewards), beta)


@given(logits, st.sampled_from([1e-3, 1e-2, 0.1, 1.0]), st.sampled_from(BETAS))
def test_no_policy_near_the_fitted_one_has_a_higher_objective(push: list[float], size: float, beta: float) -> None:
    reference, rewards = (table[0] for table in problem(seed=4))
    policy = fitted_once(beta)
    pushed = (policy + size * torch.tensor(push, dtype=torch.float64)).log_softmax(-1)
    highest = float(objective(policy, reference, rewards, beta))
    assert float(objective(pushed, reference, rewards, beta)) <= highest + 1e-9


def test_only_pairs_of_different_responses_are_drawn_and_as_often_as_bradley_terry_says() -> None:
    rewards = torch.tensor([0.0, math.log(2), math.log(4)])
    counts = sample_preferences(rewards, 300_000, np.random.default_rng(0))
    assert float(counts.sum()) == 300_000 and counts.diagonal().tolist() == [0, 0, 0]
    # 100,000 draws per pair at odds 1:2, 1:4 and 1:2; the standard deviation of a count is 150 at most
    for chosen, rejected, expected in [(1, 0, 2 / 3), (2, 0, 4 / 5), (2, 1, 2 / 3)]:
        assert float(counts[chosen, rejected]) == pytest.approx(expected * 100_000, abs=1500)


def test_the_error_from_sampled_preferences_shrinks_as_one_over_the_square_root_of_their_number() -> None:
    reference, rewards = (table[0] for table in problem(seed=5))
    numbers, repeats, beta = [400, 1600, 6400, 25600], 200, 0.5
    weights = reference.exp() * torch.exp(rewards / beta)
    best = weights / weights.sum()
    rng = np.random.default_rng(0)
    errors = []
    for number in numbers:
        policies = fit_dpo(
            reference.expand(repeats, -1), sample_preferences(rewards.expand(repeats, -1), number, rng), beta
        )
        errors.append(float((policies.exp() - best).square().sum(-1).mean().sqrt()))
    slope = np.polyfit(np.log(numbers), np.log(errors), 1)[0]
    assert -0.55 < slope < -0.45
    # and not only the slope: the last error is the one that the Fisher information promises, within 15% (the mean
    # square of 200 repeats with R - 1 = 5 directions scatters by 10% at most, its root by 5%)
    assert errors[-1] == pytest.approx(float(sampling_error(reference, rewards, beta, numbers[-1])), rel=0.15)


@every_seed
def test_separable_preferences_are_learned_to_the_last_pair(seed: int) -> None:
    reference, rewards = problem(seed)
    # The better of two responses always wins; only neighbours in rank are compared, 5 of the 15 pairs.
    rank = rewards.argsort(-1).argsort(-1)
    ahead = rank.unsqueeze(-1) - rank.unsqueeze(-2)
    policy = fit_dpo(reference, (ahead == 1).double(), beta=0.1)
    assert ordered(policy, reference, ahead == 1) == 1.0
    # the 10 pairs it has not seen follow, because a table of rewards is transitive
    assert ordered(policy, reference, ahead > 1) == 1.0


def test_random_labels_teach_nothing_about_held_out_pairs() -> None:
    prompts, responses = 40, 12
    reference, _ = problem(seed=6, prompts=prompts, responses=responses)
    rng = np.random.default_rng(0)
    # A coin decides each of the 66 pairs of a prompt; another whether it is trained on or held out.
    upper = np.triu(np.ones((responses, responses), dtype=bool), 1)
    coin, split = rng.random((2, prompts, responses, responses)) < 0.5
    wins = torch.from_numpy((upper & coin) | np.swapaxes(upper & ~coin, -1, -2))
    trained_on = torch.from_numpy((upper & split) | np.swapaxes(upper & split, -1, -2))
    policy = fit_dpo(reference, (wins & trained_on).double(), beta=0.1)
    held_out = wins & ~trained_on
    # 40 * 66 / 2 = 1320 pairs whose labels are fair coins whatever the policy says: 1/2 +- 0.014
    assert int(held_out.sum()) == pytest.approx(1320, abs=100)
    assert ordered(policy, reference, held_out) == pytest.approx(0.5, abs=0.05)
    # it has learned its own labels, as far as one table of rewards can hold them
    assert ordered(policy, reference, wins & trained_on) > 0.7


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "theorem.py"))


def test_the_page_shows_the_table_that_the_script_prints(script: dict[str, Any]) -> None:
    assert script["exact_table"]() in (ROOT / "docs" / "theorem.md").read_text()


def test_the_command_of_the_page_prints_its_tables_and_draws_its_figure(
    script: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    figure = tmp_path / "theorem.svg"
    script["main"](["--repeats", "4", "--figure", str(figure)])
    out = capsys.readouterr().out
    assert script["exact_table"]() in out and out.endswith(f"wrote {figure}\n")
    assert figure.read_text().startswith("<?xml")


def test_without_matplotlib_the_tables_are_printed_and_the_figure_is_asked_for(
    script: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as ended:
        script["main"](["--repeats", "4", "--figure", str(tmp_path / "theorem.svg")])
    assert ended.value.code == "matplotlib: not installed, so no figure was drawn; pip install matplotlib adds it."
    assert script["exact_table"]() in capsys.readouterr().out
