"""Calibration: bins and their error by hand, and what a perfectly calibrated judge comes out as."""

import math

import pytest

from dpo_cli.theory.calibration import BINS, calibration_error, reliability
from dpo_cli.theory.statistics import Clusters


def logit(probability: float) -> float:
    """The margin whose sigmoid is that probability."""
    return math.log(probability / (1 - probability))


def test_bins_and_error_by_hand() -> None:
    # Confidences 0.65, 0.65 and 0.95 twice: bins [0.6, 0.7) and [0.9, 1]. Of the first one of two is right, of the
    # second both: error = (2 |0.65 - 0.5| + 2 |0.95 - 1|) / 4 = (0.3 + 0.1) / 4 = 0.1.
    bins = reliability([logit(0.65), -logit(0.65), logit(0.95), logit(0.95)])
    assert [(one.low, one.high) for one in bins] == [
        (pytest.approx(0.6), pytest.approx(0.7)),
        (pytest.approx(0.9), pytest.approx(1.0)),
    ]
    assert [one.confidence for one in bins] == pytest.approx([0.65, 0.95])
    assert [(one.right.mean, one.right.n) for one in bins] == [(0.5, 2), (1.0, 2)]
    assert calibration_error(bins) == pytest.approx(0.1)


def test_the_error_weighs_bins_by_their_pairs() -> None:
    # 9 pairs at 0.75 of which 9 are right, 1 at 0.55 that is wrong: (9 * 0.25 + 1 * 0.55) / 10 = 0.28.
    bins = reliability([logit(0.75)] * 9 + [-logit(0.55)])
    assert [one.right.n for one in bins] == [1, 9]
    assert calibration_error(bins) == pytest.approx(0.28)


def test_a_tie_is_half_right_with_confidence_one_half() -> None:
    bins = reliability([0.0, 0.0, 0.0])
    assert [(one.low, one.confidence, one.right.mean, one.right.n) for one in bins] == [(0.5, 0.5, 0.5, 3)]
    assert calibration_error(bins) == 0.0
    # Beside one that is right at 0.55: (1/2 + 1) / 2 right, mean confidence 0.525.
    (mixed,) = reliability([0.0, logit(0.55)])
    assert (mixed.right.mean, mixed.confidence) == (0.75, pytest.approx(0.525))


def test_a_perfectly_calibrated_judge_has_error_zero() -> None:
    # Of 20 pairs at each confidence exactly that share is right: 11 of 20 at 0.55, ..., 19 of 20 at 0.95.
    margins = []
    for right in (11, 13, 15, 17, 19):
        margin = logit(right / 20)
        margins += [margin] * right + [-margin] * (20 - right)
    bins = reliability(margins)
    assert [one.right.n for one in bins] == [20] * BINS
    assert [one.right.mean for one in bins] == pytest.approx([0.55, 0.65, 0.75, 0.85, 0.95])
    assert calibration_error(bins) == pytest.approx(0, abs=1e-12)


def test_a_judge_that_is_certain_and_right_half_the_time_has_error_one_half() -> None:
    assert calibration_error(reliability([1000.0, -1000.0])) == 0.5


def test_margins_of_a_thousand_have_confidence_one_in_the_last_bin() -> None:
    (only,) = reliability([1000.0, 1000.0, -1000.0, math.inf])
    assert (only.low, only.confidence, only.right.mean) == (pytest.approx(0.9), 1.0, 0.75)
    assert only.high == pytest.approx(1.0)


def test_the_edges_of_the_bins_are_tenths_and_empty_bins_are_left_out() -> None:
    inside = [0.501, 0.599, 0.601, 0.699, 0.701, 0.799, 0.801, 0.899, 0.901, 0.999]
    assert [one.right.n for one in reliability([logit(p) for p in inside])] == [2, 2, 2, 2, 2]
    assert [round(one.low, 9) for one in reliability([logit(0.72), logit(0.98)])] == [0.7, 0.9]
    assert reliability([]) == []


def test_the_interval_of_a_bin_is_over_prompts() -> None:
    margins = [logit(0.75)] * 3 + [-logit(0.75)]
    (apart,), (shared,) = reliability(margins), reliability(margins, [7, 7, 8, 8])
    assert apart.right == Clusters(range(4)).share([1, 1, 1, 0])
    assert shared.right == Clusters([7, 7, 8, 8]).share([1, 1, 1, 0])
    assert shared.right.low < apart.right.low < 0.75 < apart.right.high


def test_order_does_not_matter() -> None:
    margins = [0.3, -1.2, 2.5, 0.0, -0.1, 4.0]
    assert reliability(margins) == reliability(margins[::-1])
