"""Intervals: by hand, against the textbook, and by how often they hold the truth."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from interval_coverage import Answers, run

from dpo_cli.theory.statistics import Clusters, Estimate, mean_estimate, proportion_estimate, student_quantile

PAIRS = st.lists(st.tuples(st.integers(0, 2**64 - 1), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=30)


def test_the_interval_of_a_mean_of_independent_values_is_students() -> None:
    # 1, 2, 3: mean 2, sample standard deviation 1; t with 2 degrees of freedom is 4.3027
    estimate = mean_estimate([1.0, 2.0, 3.0])
    assert estimate.mean == 2.0
    assert estimate.high - estimate.mean == pytest.approx(4.302653 / math.sqrt(3), abs=1e-6)


def test_students_quantile_is_the_textbooks() -> None:
    textbook = {1: 12.706205, 2: 4.302653, 4: 2.776445, 5: 2.570582, 10: 2.228139, 30: 2.042272, 10**6: 1.959966}
    for freedom, quantile in textbook.items():
        assert student_quantile(freedom) == pytest.approx(quantile, abs=3e-4 if freedom > 4 else 1e-6)


def test_wilson_interval_matches_the_textbook() -> None:
    # 8 of 10: Wilson's interval is 0.490 to 0.943 (Agresti & Coull 1998 give the formula)
    estimate = proportion_estimate(8, 10)
    assert (estimate.low, estimate.high) == (pytest.approx(0.4901625, abs=1e-6), pytest.approx(0.9433178, abs=1e-6))


def test_wilson_interval_keeps_a_width_when_all_agree() -> None:
    # k = n: the lower end is 1 / (1 + z^2 / n)
    estimate = proportion_estimate(20, 20)
    assert estimate.high == 1.0
    assert estimate.low == pytest.approx(1 / (1 + 1.959964**2 / 20), abs=1e-6)


def test_the_variance_over_prompts_by_hand() -> None:
    # Prompts {1, 3}, {5}, {7}: mean 4. Without the first 6, without the second 11/3, without the third 3.
    # Variance 2/3 [(6-4)^2 + (11/3-4)^2 + (3-4)^2] = 2/3 * 46/9. Effective prompts 16/6 = 2.67: t with 1 degree.
    estimate = Clusters([4, 4, 9, 2]).mean([1.0, 3.0, 5.0, 7.0])
    assert (estimate.mean, estimate.n) == (4.0, 4)
    assert estimate.high - 4 == pytest.approx(12.706205 * math.sqrt(2 / 3 * 46 / 9), abs=1e-5)


def test_pairs_that_repeat_count_once() -> None:
    values = [0.3, -0.2, 0.9, 0.4, -0.5]
    once, fourfold = Clusters(range(5)), Clusters([prompt for prompt in range(5) for _ in range(4)])
    assert (fourfold.pairs, fourfold.prompts, fourfold.effective) == (20, 5, 5.0)
    repeated = fourfold.mean(np.repeat(values, 4))
    assert (repeated.low, repeated.high) == pytest.approx((once.mean(values).low, once.mean(values).high))
    wins = [1.0, 1.0, 0.0, 1.0, 0.5]
    share, of_pairs = fourfold.share(np.repeat(wins, 4)), once.share(wins)
    assert share.high - share.low == pytest.approx(of_pairs.high - of_pairs.low, rel=0.1)


def test_a_prompt_with_most_of_the_pairs_counts_little() -> None:
    # 90 pairs of one prompt and ten others: 100^2 / (90^2 + 10) = 1.23 prompts of equal size
    clusters = Clusters([0] * 90 + list(range(1, 11)))
    assert clusters.effective == pytest.approx(10_000 / 8_110)
    share = clusters.share([1.0] * 100)
    assert share.low < 0.5  # 100 of 100 right, and no proof


def test_one_prompt_proves_nothing() -> None:
    only = Clusters([3] * 50)
    assert only.mean([1.0] * 50) == Estimate(1.0, -math.inf, math.inf, 50)
    assert only.mean([1.0] * 50).ends() == [None, None]
    assert only.share([1.0] * 50).low < 0.25


def test_a_value_that_is_no_number_makes_no_interval() -> None:
    for bad in (math.nan, math.inf):
        estimate = mean_estimate([0.1, bad, 0.2])
        assert math.isnan(estimate.low) and estimate.ends() == [None, None]


@given(PAIRS)
def test_a_share_lies_in_its_interval_and_the_interval_in_0_to_1(pairs: list[tuple[int, float]]) -> None:
    prompts, wins = zip(*pairs, strict=True)
    share = Clusters(prompts).share(wins)
    assert 0 <= share.low <= share.mean <= share.high <= 1


@given(PAIRS, st.randoms(use_true_random=False))
def test_neither_order_nor_names_of_prompts_matter(pairs: list[tuple[int, float]], random: object) -> None:
    renamed = {prompt: number for number, prompt in enumerate(sorted({prompt for prompt, _ in pairs}))}
    shuffled = sorted(((renamed[prompt], win) for prompt, win in pairs), reverse=True)
    first = Clusters([prompt for prompt, _ in pairs]).mean([win for _, win in pairs])
    second = Clusters([prompt for prompt, _ in shuffled]).mean([win for _, win in shuffled])
    assert (first.mean, first.low, first.high) == pytest.approx((second.mean, second.low, second.high))


@pytest.mark.parametrize("responses", [1, 2, 4, 6, 8])
def test_an_interval_holds_the_truth_as_often_as_it_says(responses: int) -> None:
    found = run(Answers(prompts=60, responses=responses), runs=1000, seed=responses)
    for coverage in (found.share, found.mean):
        assert 0.93 <= coverage <= 0.97
    assert found.called <= 0.06  # a policy that knows nothing, called better or worse


def test_pairs_taken_as_independent_do_not() -> None:
    found = run(Answers(prompts=60, responses=6), runs=300, seed=1, independent=True)
    assert found.share < 0.92 and found.mean < 0.92 and found.called > 0.08


def test_the_interval_of_a_share_holds_the_share() -> None:
    for n in range(2, 200):
        for share in (0.0, 1.0):
            estimate = Clusters(range(n)).share([share] * n)
            assert 0 <= estimate.low <= share <= estimate.high <= 1, n
