"""Metrics, intervals and schedules."""

import math

import pytest
import torch

from dpo_cli.theory.losses import LogRatios, PairLogps, sigmoid
from dpo_cli.theory.metrics import MeanOverPairs, pair_metrics
from dpo_cli.theory.schedules import lr_factor


def metrics_of(chosen: list[float], rejected: list[float], beta: float = 0.1) -> dict[str, torch.Tensor]:
    ones = torch.ones(len(chosen))
    policy = PairLogps(torch.tensor(chosen), torch.tensor(rejected), ones, ones)
    ratios = LogRatios(policy.chosen, policy.rejected, ones, ones)
    return pair_metrics(policy, ratios, sigmoid(ratios, beta), ones / 2, beta)


def test_a_tie_counts_one_half() -> None:
    assert metrics_of([1.0, 2.0, 3.0], [1.0, 1.0, 4.0])["rewards/accuracies"].tolist() == [0.5, 1.0, 0.0]


def test_margin_is_the_difference_of_the_rewards_and_the_mean_loss_its_softplus() -> None:
    metrics = metrics_of([1.0, -2.0, 3.0], [0.5, 1.0, 4.0])
    mean = MeanOverPairs()
    mean.add(metrics)
    means = mean.means()
    assert means["rewards/margins"] == pytest.approx(means["rewards/chosen"] - means["rewards/rejected"], abs=1e-7)
    softplus = [math.log1p(math.exp(-0.1 * d)) for d in (0.5, -3.0, -1.0)]
    assert means["loss"] == pytest.approx(sum(softplus) / 3, abs=1e-6)


def test_means_are_over_pairs_not_over_batches() -> None:
    # 3 pairs in batches of 2 and 1: the mean of batch means would be (1.5 + 6) / 2 = 3.75
    mean = MeanOverPairs()
    mean.add({"loss": torch.tensor([1.0, 2.0])})
    mean.add({"loss": torch.tensor([6.0])})
    assert mean.means() == {"loss": 3.0}


def test_sums_survive_a_checkpoint_exactly() -> None:
    mean = MeanOverPairs()
    mean.add({"loss": torch.tensor([0.1, 0.2, 0.3])})
    again = MeanOverPairs.from_sums(mean.sums(), mean.pairs)
    for one in (mean, again):
        one.add({"loss": torch.tensor([0.7])})
    assert mean.means() == again.means()


def test_merging_equals_adding() -> None:
    apart, together, part = MeanOverPairs(), MeanOverPairs(), MeanOverPairs()
    together.add({"loss": torch.tensor([1.0])})
    together.add({"loss": torch.tensor([2.0, 3.0])})
    apart.add({"loss": torch.tensor([1.0])})
    part.add({"loss": torch.tensor([2.0, 3.0])})
    apart.merge(part)
    assert apart.means() == together.means() and apart.pairs == 3


def test_warm_up_reaches_the_peak_and_cosine_and_linear_end_near_zero() -> None:
    assert [lr_factor("constant", update, 4, 10) for update in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    # halfway after warm-up: 4 of 8 steps into the decay
    assert lr_factor("cosine", 6, 2, 10) == pytest.approx(0.5)
    assert lr_factor("linear", 6, 2, 10) == pytest.approx(0.5)
    assert lr_factor("cosine", 4, 2, 10) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert lr_factor("linear", 9, 2, 10) == pytest.approx(1 / 8)


def test_the_first_update_moves_without_warm_up_and_with_it() -> None:
    assert lr_factor("cosine", 0, 0, 10) == 1.0
    assert lr_factor("cosine", 0, 5, 10) == pytest.approx(0.2)
