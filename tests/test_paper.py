"""From PPO to DPO: the policy gradient and DPO stay under one frontier and end at one point of it."""

import math
import runpy
import sys
from itertools import islice, pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tabular import (
    climb,
    climb_sampled,
    draw_responses,
    expected_shortfall,
    fit_dpo,
    frontier,
    highest_reward,
    kl_divergence,
    objective,
    optimum,
    policy_gradient,
    position,
    preference_probabilities,
    sample_preferences,
    sampled_policy_gradient,
)
from torch import Tensor

ROOT = Path(__file__).parent.parent
BETAS = [0.1, 0.5, 2.0]
SEEDS = [0, 1, 2]
PROMPTS, RESPONSES = 4, 6
EDGE_BETAS = tuple(np.geomspace(0.01, 100, 400).tolist())

every_beta = pytest.mark.parametrize("beta", BETAS)
every_seed = pytest.mark.parametrize("seed", SEEDS)


def problem(seed: int, prompts: int = PROMPTS, responses: int = RESPONSES) -> tuple[Tensor, Tensor]:
    """Reference log-probs and rewards, (prompts, responses) each."""
    generator = torch.Generator().manual_seed(seed)
    reference, rewards = torch.randn(2, prompts, responses, generator=generator, dtype=torch.float64)
    return reference.log_softmax(-1), rewards


def some_policy(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 100)
    return torch.randn(PROMPTS, RESPONSES, generator=generator, dtype=torch.float64).log_softmax(-1)


def below_frontier(policies: Tensor, reference: Tensor, rewards: Tensor) -> Tensor:
    """Reward of the frontier less that of the policies at the same KL, both means over prompts."""
    at = position(policies, reference, rewards).mean()
    return highest_reward(at.kl, EDGE_BETAS, frontier(reference, rewards, EDGE_BETAS).mean()) - at.reward


def test_the_frontier_of_two_responses_is_the_one_worked_by_hand() -> None:
    # pi_ref = (3/4, 1/4), r = (0, ln 3), b = 1/2: pi* = (1/4, 3/4), E[r] = 3/4 ln 3,
    # KL = 1/4 ln(1/3) + 3/4 ln 3 = 1/2 ln 3
    reference = torch.tensor([0.75, 0.25], dtype=torch.float64).log()
    rewards = torch.tensor([0.0, math.log(3)], dtype=torch.float64)
    edge = frontier(reference, rewards, [0.5])
    assert edge.reward.tolist() == pytest.approx([0.75 * math.log(3)], abs=1e-12)
    assert edge.kl.tolist() == pytest.approx([0.5 * math.log(3)], abs=1e-12)
    # its tangent, of slope 1/2, meets KL zero at b log Z = 1/2 ln 3; the reference has 1/4 ln 3 there
    start = highest_reward(torch.zeros(1, dtype=torch.float64), [0.5], edge)
    assert start.tolist() == pytest.approx([0.5 * math.log(3)], abs=1e-12)


@every_seed
def test_along_the_frontier_reward_grows_with_kl_ever_more_slowly(seed: int) -> None:
    reference, rewards = problem(seed)
    falling = np.geomspace(100, 0.05, 60).tolist()
    for edge in (frontier(reference, rewards, falling), frontier(reference, rewards, falling).mean()):
        kl_steps, reward_steps = edge.kl.diff(dim=0), edge.reward.diff(dim=0)
        assert bool((kl_steps > 0).all()) and bool((reward_steps > 0).all())
        assert bool((reward_steps / kl_steps).diff(dim=0).le(0).all())


@every_seed
@every_beta
def test_the_slope_of_the_frontier_is_beta(beta: float, seed: int) -> None:
    reference, rewards = problem(seed)
    for edge in (
        frontier(reference, rewards, [beta * 1.001, beta * 0.999]),
        frontier(reference, rewards, [beta * 1.001, beta * 0.999]).mean(),
    ):
        slope = edge.reward.diff(dim=0) / edge.kl.diff(dim=0)
        assert slope.flatten().tolist() == pytest.approx([beta] * slope.numel(), rel=1e-4)


logits = st.lists(st.floats(-20, 20), min_size=RESPONSES, max_size=RESPONSES)


@given(logits, st.integers(0, 99))
def test_no_policy_lies_above_the_frontier(other: list[float], seed: int) -> None:
    reference, rewards = problem(seed, prompts=1)
    policy = torch.tensor([other], dtype=torch.float64).log_softmax(-1)
    assert float(below_frontier(policy, reference, rewards)) >= -1e-9


@every_seed
def test_no_policy_of_several_prompts_lies_above_the_mean_of_their_frontiers(seed: int) -> None:
    reference, rewards = problem(seed)
    generator = torch.Generator().manual_seed(seed)
    # near the reference and far from it, and each prompt's optimum for a beta of its own
    noise = torch.randn(500, PROMPTS, RESPONSES, generator=generator, dtype=torch.float64)
    sizes = torch.logspace(-2, 1, 500, dtype=torch.float64)[:, None, None]
    betas = torch.logspace(-1, 1, 500, dtype=torch.float64)[torch.randint(500, (500, PROMPTS, 1), generator=generator)]
    for logits in (reference + sizes * noise, reference + rewards / betas):
        assert float(below_frontier(logits.log_softmax(-1), reference, rewards).min()) >= -1e-9


@every_seed
@every_beta
def test_dpo_on_exact_preferences_stands_on_the_frontier_at_its_beta(beta: float, seed: int) -> None:
    reference, rewards = problem(seed)
    found = position(fit_dpo(reference, preference_probabilities(rewards), beta), reference, rewards)
    weights = reference.exp() * torch.exp(rewards / beta)
    best = weights / weights.sum(-1, keepdim=True)
    assert float((found.reward - (best * rewards).sum(-1)).abs().max()) < 1e-8
    assert float((found.kl - (best * (best.log() - reference)).sum(-1)).abs().max()) < 1e-8
    edge = frontier(reference, rewards, [beta])
    assert float((found.reward - edge.reward[0]).abs().max()) < 1e-8
    assert float((found.kl - edge.kl[0]).abs().max()) < 1e-8


@every_seed
@every_beta
def test_the_policy_gradient_is_what_autograd_finds(beta: float, seed: int) -> None:
    reference, rewards = problem(seed)
    logits = some_policy(seed).requires_grad_()
    (expected,) = torch.autograd.grad(objective(logits.log_softmax(-1), reference, rewards, beta).sum(), logits)
    gradient = policy_gradient(logits.detach().log_softmax(-1), reference, rewards, beta)
    assert float((gradient - expected).abs().max()) < 1e-12


@every_beta
def test_the_policy_gradient_is_the_slope_of_the_objective(beta: float) -> None:
    reference, rewards = problem(seed=3)
    policy, size = some_policy(3), 1e-5
    gradient = policy_gradient(policy, reference, rewards, beta)
    for response in range(RESPONSES):
        push = torch.zeros(RESPONSES, dtype=torch.float64)
        push[response] = size
        up, down = (objective((policy + sign * push).log_softmax(-1), reference, rewards, beta) for sign in (1, -1))
        assert ((up - down) / (2 * size)).tolist() == pytest.approx(gradient[:, response].tolist(), abs=1e-8)


@every_seed
@every_beta
def test_the_natural_gradient_walks_along_the_frontier(beta: float, seed: int) -> None:
    reference, rewards = problem(seed)
    policy, walked = reference, 0.0
    for _ in range(5):
        probabilities = policy.exp()
        fisher = torch.diag_embed(probabilities) - probabilities.unsqueeze(-1) * probabilities.unsqueeze(-2)
        gradient = policy_gradient(policy, reference, rewards, beta)
        natural = (torch.linalg.pinv(fisher, hermitian=True) @ gradient.unsqueeze(-1)).squeeze(-1)
        # It is A less a constant, so a step s/b leads from pi_ref exp(u r/b) to pi_ref exp((u + s (1 - u)) r/b).
        policy, walked = (policy + 0.2 / beta * natural).log_softmax(-1), walked + 0.2 * (1 - walked)
        expected = (reference + walked * rewards / beta).log_softmax(-1)
        assert float((policy.exp() - expected.exp()).abs().max()) < 1e-6


@every_seed
@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_climbing_never_loses_and_ends_at_beta_log_z(beta: float, seed: int) -> None:
    reference, rewards = problem(seed)
    path = torch.stack(list(islice(climb(reference, rewards, beta), 3001)))
    reached = objective(path, reference, rewards, beta)
    assert bool((path[0] == reference).all())
    assert float(reached.diff(dim=0).min()) >= -1e-12  # rounding
    limit = beta * (reference.exp() * torch.exp(rewards / beta)).sum(-1).log()
    assert float((reached[-1] - limit).abs().max()) < 1e-6
    # and with the objective the policy, DPO's: |p - q| <= sqrt(2 KL) = sqrt(2 * 1e-6 / b), Pinsker's inequality
    found = fit_dpo(reference, preference_probabilities(rewards), beta)
    assert float((path[-1].exp() - found.exp()).abs().max()) < 1.5e-3


@every_beta
def test_the_climb_stays_under_the_frontier(beta: float) -> None:
    reference, rewards = problem(seed=4)
    path = torch.stack(list(islice(climb(reference, rewards, beta), 300)))
    gaps = below_frontier(path, reference, rewards)
    assert float(gaps.min()) >= -1e-9
    assert float(gaps.max()) > 0.01  # it does leave it on the way


def test_a_response_with_probability_near_zero_is_hardly_climbed_to() -> None:
    # two responses of reward 0 and 1, the better with probability p, at the reference: p (1 - p) (1 - 0), about p
    rewards = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for rare in (1e-3, 1e-6):
        policy = torch.tensor([1 - rare, rare], dtype=torch.float64).log()
        assert policy_gradient(policy, policy, rewards, 0.1).tolist() == pytest.approx([-rare, rare], rel=2e-3)


def test_drawn_responses_are_as_frequent_as_the_policy_says() -> None:
    probabilities = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.5, 0.0]], dtype=torch.float64)
    drawn = draw_responses(probabilities.log(), 100_000, np.random.default_rng(0))
    # the standard deviation of a frequency is 0.0016 at most
    for row, expected in zip(drawn, probabilities.tolist(), strict=True):
        assert (row.bincount(minlength=3) / 100_000).tolist() == pytest.approx(expected, abs=0.008)
    assert not bool((drawn[1] == 2).any())


@pytest.mark.parametrize("number", [2, 3])
def test_the_sampled_gradient_is_the_exact_one_on_average(number: int) -> None:
    reference, rewards = problem(seed=5, prompts=1, responses=3)
    policy = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64).log()
    mean = torch.zeros_like(policy)
    for draws in product(range(3), repeat=number):  # all that can be drawn, each with its probability
        drawn = torch.tensor([draws])
        chance = policy.gather(-1, drawn).sum().exp()
        mean += chance * sampled_policy_gradient(policy, reference, rewards, 0.5, drawn)
    assert mean[0].tolist() == pytest.approx(policy_gradient(policy, reference, rewards, 0.5)[0].tolist(), abs=1e-12)


def test_the_sampled_gradient_is_that_of_ppos_clipped_objective_before_the_policy_has_moved() -> None:
    reference, rewards = problem(seed=6)
    policy, beta = some_policy(6), 0.5
    drawn = draw_responses(policy, 4, np.random.default_rng(0))
    advantages = (rewards - beta * (policy - reference)).gather(-1, drawn)
    baselines = (advantages.sum(-1, keepdim=True) - advantages) / 3  # the mean of the three other draws
    logits = policy.clone().requires_grad_()
    # Eq. 7 of https://arxiv.org/abs/1707.06347: the mean of min(ratio A, clip(ratio, 0.8, 1.2) A)
    ratios = (logits.log_softmax(-1) - policy).gather(-1, drawn).exp()
    weights = advantages - baselines
    surrogate = torch.minimum(ratios * weights, ratios.clamp(0.8, 1.2) * weights).mean(-1).sum()
    (expected,) = torch.autograd.grad(surrogate, logits)
    assert float((sampled_policy_gradient(policy, reference, rewards, beta, drawn) - expected).abs().max()) < 1e-12


@every_beta
def test_at_the_optimum_no_draw_moves_the_policy(beta: float) -> None:
    reference, rewards = problem(seed=7)
    best = optimum(reference, rewards, beta).logps
    drawn = draw_responses(best, 8, np.random.default_rng(0))
    # A = r - b log pi*/pi_ref = b log Z for every response
    assert float(sampled_policy_gradient(best, reference, rewards, beta, drawn).abs().max()) < 1e-12


def test_only_the_rewards_of_drawn_responses_are_read() -> None:
    reference, rewards = problem(seed=8, prompts=1)
    hidden = rewards.clone()
    hidden[0, [0, 2, 4]] = math.nan
    drawn = torch.tensor([[1, 3, 3, 5]])
    seen, unseen = (sampled_policy_gradient(reference, reference, table, 0.5, drawn) for table in (rewards, hidden))
    assert bool((seen == unseen).all())


def test_the_sampled_climb_comes_near_beta_log_z_and_stays_under_the_frontier() -> None:
    reference, rewards = problem(seed=9)
    beta, rng = 0.5, np.random.default_rng(0)
    path = torch.stack(list(islice(climb_sampled(reference, rewards, beta, draws=4, step=1.0, rng=rng), 2001)))
    short = (beta * optimum(reference, rewards, beta).log_partition - objective(path, reference, rewards, beta)).mean(
        -1
    )
    assert float(short[0]) > 0.1 and float(short[-1]) < 1e-3
    assert float(short.diff().max()) > 0  # noise: some steps lose
    assert float(below_frontier(path, reference, rewards).min()) >= -1e-9


def test_dpo_on_sampled_preferences_nears_the_frontier_from_below_as_labels_grow() -> None:
    reference, rewards = problem(seed=10)
    beta, repeats, numbers = 0.5, 40, [200, 800, 3200, 12_800]
    rng = np.random.default_rng(0)
    below, short = [], []
    for number in numbers:
        counts = sample_preferences(rewards.expand(repeats, -1, -1), number, rng)
        policies = fit_dpo(reference.expand(repeats, -1, -1), counts, beta)
        gaps = below_frontier(policies, reference, rewards)
        assert float(gaps.min()) >= -1e-9
        below.append(float(gaps.mean()))
        reached = objective(policies, reference, rewards, beta).mean()
        short.append(float(beta * optimum(reference, rewards, beta).log_partition.mean() - reached))
    # four times the labels, a quarter of the gap; a factor of two is asked for
    assert all(after < before / 2 for before, after in pairwise(below)), below
    assert all(after < before / 2 for before, after in pairwise(short)), short
    # The last as the Fisher information promises: 160 policies, 5 directions each, scatter by sqrt(2/800) = 5%.
    assert short[-1] == pytest.approx(float(expected_shortfall(reference, rewards, beta, 12_800).mean()), rel=0.2)


def test_the_expected_shortfall_of_a_coin_is_the_one_worked_by_hand() -> None:
    # Two responses, equal in reward and reference: pi* = (1/2, 1/2). N labels inform N/4 about r_1 - r_2, so its
    # variance is 4/N; KL(pi || pi*) = (p - 1/2)^2 * 2 with p - 1/2 = 1/4 * (r_1 - r_2)/b. In all b * 2/16 * 4/N / b^2.
    reference = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    short = expected_shortfall(reference, torch.zeros(2), beta=0.25, number=100)
    assert float(short) == pytest.approx(0.25 * 2 / 16 * 4 / 100 / 0.25**2, rel=1e-12)


def test_a_reward_model_and_then_its_optimum_is_dpo_on_the_same_labels() -> None:
    reference, rewards = problem(seed=11, prompts=1)
    wins = sample_preferences(rewards, 500, np.random.default_rng(0))
    # Zermelo's iteration for Bradley-Terry: strength = wins / sum of games / (own + other's strength)
    games, strengths = (wins + wins.mT)[0], torch.ones(RESPONSES, dtype=torch.float64)
    for _ in range(300):
        strengths = wins[0].sum(-1) / (games / (strengths.unsqueeze(-1) + strengths)).sum(-1)
    for beta in BETAS:
        two_stages = optimum(reference, strengths.log(), beta).logps
        assert float((two_stages.exp() - fit_dpo(reference, wins, beta).exp()).abs().max()) < 1e-8
        assert float(kl_divergence(two_stages, optimum(reference, rewards, beta).logps)) > 1e-4  # neither is pi*


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "paper.py"))


@pytest.fixture
def small(script: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The script on fewer and smaller prompts, followed for fewer iterations."""
    numbers = {"PROMPTS": 2, "RESPONSES": 8, "ITERATIONS": (2, 20), "QUERIES": (8, 80)}
    for name, value in numbers.items():
        monkeypatch.setitem(script["main"].__globals__, name, value)
    return script


def exact_table(script: dict[str, Any]) -> str:
    world = script["World"].drawn()
    wins = preference_probabilities(world.rewards)
    return script["exact_table"](world, {beta: fit_dpo(world.reference_logps, wins, beta) for beta in script["BETAS"]})


def test_the_page_shows_the_table_that_the_script_prints(script: dict[str, Any]) -> None:
    assert exact_table(script) in (ROOT / "docs" / "paper.md").read_text()


def test_the_command_of_the_page_prints_its_tables_and_draws_its_figure(
    small: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    small["main"](["--repeats", "2", "--folder", str(tmp_path)])
    figure = tmp_path / "paper-tabular.svg"
    out = capsys.readouterr().out
    assert exact_table(small) in out and out.endswith(f"wrote {figure}\n")
    assert "then its pi*: off DPO's policy by < 1e-10\n" in out
    drawn = figure.read_bytes()
    assert drawn.startswith(b"<?xml") and len(drawn) < 150_000
    # the same numbers give the same figure, to the byte
    small["main"](["--repeats", "2", "--folder", str(tmp_path)])
    assert figure.read_bytes() == drawn


def test_without_matplotlib_the_tables_are_printed_and_the_figure_is_asked_for(
    small: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as ended:
        small["main"](["--repeats", "2", "--folder", str(tmp_path)])
    assert ended.value.code == "matplotlib: not installed, so no figure was drawn; pip install matplotlib adds it."
    assert exact_table(small) in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
