"""Cohen's kappa: how much two annotators agree beyond chance.

counts[i, j] is how many items the first annotator put into category i and the second into j. C categories.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_cli.theory.statistics import Z95, Estimate, proportion_estimate


@dataclass(frozen=True)
class Agreement:
    """How often two annotators agree, and how often they would by chance."""

    observed: float  # share of items in the same category
    chance: float  # the same for two who label at random with their own shares of the categories
    kappa: Estimate  # (observed - chance) / (1 - chance), with its 95% interval; n counts items
    standard_error: float  # of kappa, for many items


def cohen_kappa(counts: Tensor) -> Agreement:
    """Kappa of a (C, C) table: J. Cohen, A coefficient of agreement for nominal scales, EPM 20 (1960).

    The standard error is that of J. L. Fleiss, J. Cohen and B. S. Everitt, Large sample standard errors of kappa and
    weighted kappa, Psychological Bulletin 72 (1969); the interval is kappa +- 1.96 errors, within [-1, 1]. There are
    two exceptions. Where all items agree, or none does, that error is 0 for any number of items, and the interval comes
    from the Wilson interval of the observed agreement. Where both annotators used one category only, and the same,
    chance is 1 and kappa is 0/0: the result is 0 with the interval -1 to 1 and an infinite error.
    """
    counts = counts.double()
    assert counts.dim() == 2 and counts.shape[0] == counts.shape[1] and bool((counts >= 0).all()), counts
    number = round(float(counts.sum()))
    assert number > 0, "no items"
    shares = counts / counts.sum()
    first, second = shares.sum(1), shares.sum(0)
    observed, chance = float(shares.trace()), float(first @ second)
    if bool((first == 1).any()) and bool((second == first).all()):
        return Agreement(observed=1.0, chance=1.0, kappa=Estimate(0.0, -1.0, 1.0, number), standard_error=math.inf)

    def beyond_chance(agreement: float) -> float:
        return max(-1.0, min(1.0, (agreement - chance) / (1 - chance)))

    kappa = beyond_chance(observed)
    # The delta method: the influence of one more item in cell (i, j) on kappa; its variance gives that of kappa.
    influence = (torch.eye(len(counts)) - (1 - kappa) * (first[None, :] + second[:, None])) / (1 - chance)
    variance = float((shares * influence**2).sum() - (shares * influence).sum() ** 2)
    error = math.sqrt(max(0.0, variance) / number)
    low, high = max(-1.0, kappa - Z95 * error), min(1.0, kappa + Z95 * error)
    if counts.trace() in (0, counts.sum()):
        wilson = proportion_estimate(float(counts.trace()), number)
        low, high = min(kappa, beyond_chance(wilson.low)), max(kappa, beyond_chance(wilson.high))
    return Agreement(observed, chance, Estimate(kappa, low, high, number), error)
