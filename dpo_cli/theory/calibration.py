"""Calibration: how often a model is right where its confidence is sigmoid(|margin|).

Bradley-Terry gives every margin a probability, P(y+ > y-) = sigmoid(r+ - r-), Eq. 1 of
https://arxiv.org/abs/2305.18290. A calibrated model is right on 8 of 10 pairs with confidence 0.8.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dpo_cli.theory.statistics import Estimate, proportion_estimate

BINS = 5  # of [0.5, 1]


@dataclass(frozen=True)
class Bin:
    """Pairs of similar confidence."""

    low: float
    high: float
    confidence: float  # mean of sigmoid(|margin|)
    right: Estimate  # share of pairs whose chosen response has the higher reward; a tie is one half


def reliability(margins: Sequence[float]) -> list[Bin]:
    """The pairs by confidence, in bins of equal width; without empty bins and NaN margins."""
    members: list[list[float]] = [[] for _ in range(BINS)]
    for margin in (one for one in margins if not math.isnan(one)):
        confidence = 1 / (1 + math.exp(-min(abs(margin), 700.0)))
        members[min(BINS - 1, int((confidence - 0.5) * 2 * BINS))].append(margin)
    return [_bin(index, some) for index, some in enumerate(members) if some]


def _bin(index: int, margins: list[float]) -> Bin:
    width = 0.5 / BINS
    right = math.fsum(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in margins)
    confidence = math.fsum(1 / (1 + math.exp(-min(abs(margin), 700.0))) for margin in margins) / len(margins)
    low = 0.5 + index * width
    return Bin(low, low + width, confidence, proportion_estimate(right, len(margins)))


def calibration_error(bins: Sequence[Bin]) -> float:
    """The mean distance between confidence and share of right pairs, weighted by pairs: 0 is perfect.

    ECE of C. Guo et al., On calibration of modern neural networks, Eq. 3 of https://arxiv.org/abs/1706.04599. On few
    pairs it is above 0 even for a perfect model.
    """
    pairs = sum(one.right.n for one in bins) or 1
    return math.fsum(one.right.n * abs(one.confidence - one.right.mean) for one in bins) / pairs
