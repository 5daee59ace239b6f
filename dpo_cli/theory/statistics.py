"""Confidence intervals of means and shares."""

import math
from dataclasses import dataclass

Z95 = 1.959963984540054  # the 97.5% quantile of the standard normal


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` pairs with the ends of its 95% interval."""

    mean: float
    low: float
    high: float
    n: int


def mean_estimate(values: list[float]) -> Estimate:
    """The mean with its normal 95% interval, mean +- 1.96 s/sqrt(n); s has n-1 in the denominator."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Estimate(mean, -math.inf, math.inf, n)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    half = Z95 * math.sqrt(variance / n)
    return Estimate(mean, mean - half, mean + half, n)


def proportion_estimate(successes: float, n: int) -> Estimate:
    """A share of n pairs with its 95% Wilson interval; ties may enter as half successes.

    E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    Unlike mean +- 1.96 s/sqrt(n) it stays within [0, 1] and has a width above 0 when all pairs agree.
    """
    share = successes / n
    denominator = 1 + Z95**2 / n
    center = (share + Z95**2 / (2 * n)) / denominator
    half = Z95 / denominator * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    return Estimate(share, max(0.0, center - half), min(1.0, center + half), n)
