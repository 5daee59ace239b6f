"""Which labels are probably wrong, and how many, from the margins of models that did not see the pairs. N pairs.

A margin m says that chosen is the better response with probability sigmoid(s m), and a label is the wrong way round
with probability e. So a label agrees with the better response with probability

    (1 - e) sigmoid(s m) + e sigmoid(-s m).

s and e are those of the highest likelihood. What the model cannot know is taken as noise only where it is sure.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_cli.theory.statistics import Estimate

SHARES = np.linspace(0, 0.49, 99)  # of wrong labels
SCALES = np.geomspace(0.05, 50, 60)  # in units of 1 / the median of |m|
BINS = 400  # margins of like size are counted together
RESAMPLES = 400  # of prompts, for the interval


@dataclass(frozen=True)
class LabelNoise:
    """The share of wrong labels with its 95% interval, and how likely each label is wrong."""

    share: Estimate
    probabilities: NDArray[np.float64]  # (N,)


def label_noise(margins: Sequence[float], groups: Sequence[int], seed: int) -> LabelNoise:
    """Fit the two numbers to N margins; the interval is a bootstrap over prompts (`groups`), 95% of RESAMPLES."""
    values = np.asarray(margins, dtype=float)
    unit = float(np.median(np.abs(values))) or 1.0
    order = np.argsort(values)
    bins = np.empty(len(values), dtype=np.int64)
    bins[order] = np.arange(len(values)) * min(BINS, len(values)) // len(values)
    centers = np.bincount(bins, weights=values) / np.bincount(bins)
    agrees = _sigmoid(SCALES[:, None] * centers / unit)  # (scales, bins)
    shares = SHARES[:, None, None]
    table = np.log((1 - shares) * agrees + shares * (1 - agrees) + 1e-300)  # (shares, scales, bins)

    def best(weights: NDArray[Any]) -> tuple[int, int]:
        place = int((table @ weights).argmax())
        return place // len(SCALES), place % len(SCALES)

    share, scale = best(np.bincount(bins).astype(float))
    _, of_pair = np.unique(np.asarray(groups, dtype=np.uint64), return_inverse=True)
    prompts, drawn = int(of_pair.max()) + 1, np.random.default_rng(seed)
    found = []
    for _ in range(RESAMPLES):
        times = np.bincount(drawn.integers(prompts, size=prompts), minlength=prompts)
        found.append(SHARES[best(np.bincount(bins, weights=times[of_pair].astype(float)))[0]])
    low, high = np.quantile(found, [0.025, 0.975])
    mean = float(SHARES[share])
    right = _sigmoid(SCALES[scale] * values / unit)
    wrong = mean * (1 - right)
    probabilities = wrong / np.maximum((1 - mean) * right + wrong, 1e-300)
    return LabelNoise(Estimate(mean, min(mean, float(low)), max(mean, float(high)), len(values)), probabilities)


def _sigmoid(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(-np.logaddexp(0, -values))
