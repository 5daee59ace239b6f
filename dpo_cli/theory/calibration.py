"""Calibration: how often a model is right where its confidence is sigmoid(|margin|).

Bradley-Terry gives every margin a probability, P(y+ > y-) = sigmoid(r+ - r-), Eq. 1 of
https://arxiv.org/abs/2305.18290. A calibrated model is right on 8 of 10 pairs with confidence 0.8.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpo_cli.theory.statistics import Clusters, Estimate

BINS = 5  # of [0.5, 1]


@dataclass(frozen=True)
class Bin:
    """Pairs of similar confidence."""

    low: float
    high: float
    confidence: float  # mean of sigmoid(|margin|)
    right: Estimate  # share of pairs whose chosen response has the higher reward; a tie is one half


def reliability(
    margins: Sequence[float], prompts: Sequence[int] | None = None, probabilities: Sequence[float] | None = None
) -> list[Bin]:
    """The pairs by confidence, in bins of equal width. Empty bins and NaN margins are left out.

    `margins` are those of N pairs. `prompts` has an id for the prompt of each, (N,); None: no two pairs share one.
    `probabilities` are soft labels, (N,): a pair is right with that probability where its chosen response is ahead.
    """
    of_pairs = np.asarray(margins, dtype=float)
    known = ~np.isnan(of_pairs)
    of_pairs = of_pairs[known]
    of_prompts = np.asarray(range(len(known)) if prompts is None else prompts, dtype=np.uint64)[known]
    confidence = 1 / (1 + np.exp(-np.minimum(np.abs(of_pairs), 700.0)))
    certain = np.ones(len(known)) if probabilities is None else np.asarray(probabilities, dtype=float)
    right = (1 + (2 * certain[known] - 1) * np.sign(of_pairs)) / 2
    bins = np.minimum(BINS - 1, ((confidence - 0.5) * 2 * BINS).astype(int))
    found = []
    for index in np.unique(bins).tolist():
        low, members = 0.5 + index * 0.5 / BINS, bins == index
        share = Clusters(of_prompts[members]).share(right[members])
        found.append(Bin(low, low + 0.5 / BINS, float(confidence[members].mean()), share))
    return found


def calibration_error(bins: Sequence[Bin]) -> float:
    """The mean distance between confidence and share of right pairs, weighted by pairs: 0 is perfect.

    ECE of C. Guo et al., On calibration of modern neural networks, Eq. 3 of https://arxiv.org/abs/1706.04599. On few
    pairs it is above 0 even for a perfect model.
    """
    pairs = sum(one.right.n for one in bins) or 1
    return math.fsum(one.right.n * abs(one.confidence - one.right.mean) for one in bins) / pairs
