"""95% intervals of means and shares over pairs, of which some share a prompt.

Pairs of one prompt resemble each other: eight pairs of one prompt say less than eight of eight prompts. So the prompt
is what counts as independent, not the pair. N pairs, G prompts, N_g pairs of prompt g.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = Sequence[float] | NDArray[np.float64]

Z95 = 1.959963984540054  # the 97.5% quantile of the standard normal
STUDENT = (12.706204736, 4.302652730, 3.182446305, 2.776445105)  # of Student's t with 1 to 4 degrees of freedom


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` pairs with the ends of its 95% interval."""

    mean: float
    low: float
    high: float
    n: int

    def ends(self) -> list[float | None]:
        """The interval for JSON: an end that is not known is None."""
        return self.triple()[1:]

    def triple(self) -> list[float | None]:
        """[mean, low, high] for JSON: a number that is not finite is None."""
        return [number if math.isfinite(number) else None for number in (self.mean, self.low, self.high)]


class Clusters:
    """Which of N pairs share a prompt, and the intervals of means over them.

    `prompts` has an id for the prompt of each pair, (N,), N at least 1.
    """

    def __init__(self, prompts: Sequence[int] | NDArray[np.uint64]) -> None:
        ids, self._of = np.unique(np.asarray(prompts, dtype=np.uint64), return_inverse=True)
        self._sizes = np.bincount(self._of, minlength=len(ids)).astype(float)  # (G,)

    @property
    def pairs(self) -> int:
        """N."""
        return len(self._of)

    @property
    def prompts(self) -> int:
        """G."""
        return len(self._sizes)

    @property
    def effective(self) -> float:
        """The effective number of prompts, N^2 / sum of N_g^2: G where all have equally many pairs, else fewer.

        L. Kish, Survey Sampling (1965), section 11.7.
        """
        return self.pairs**2 / float((self._sizes**2).sum())

    @property
    def quantile(self) -> float:
        """The 97.5% quantile of Student's t; degrees of freedom: the effective number of prompts - 1."""
        return student_quantile(max(1, int(self.effective + 1e-9) - 1))

    def mean(self, values: Values) -> Estimate:
        """The mean of N values, (N,). The interval is infinitely wide for one prompt, NaN if a value is not finite."""
        mean, half = float(np.mean(values)), self.quantile * self.standard_error(values)
        return Estimate(mean, mean - half, mean + half, self.pairs)

    def share(self, values: Values) -> Estimate:
        """The share of successes among N values, (N,), each 1, 0 or 0.5 for a tie, with Wilson's interval.

        The number of trials n is that of independent pairs with the same variance of the mean, p (1 - p) / (n - 1), and
        at most N. Where all pairs agree the variance is 0: then n is the effective number of prompts.
        """
        share = float(np.mean(values))
        if self.prompts == 1:
            return wilson(share, 1, self.pairs, Z95)
        variance = self._variance(values)
        trials = 1 + share * (1 - share) / variance if variance > 0 else self.effective
        return wilson(share, min(trials, self.pairs), self.pairs, self.quantile)

    def jackknife(self, statistic: Callable[[NDArray[np.bool_]], float]) -> Estimate:
        """A statistic that is no mean, such as a ratio of two: `statistic` of the values that a mask, (N,), keeps.

        Its variance is estimated as `_variance` estimates that of a mean.
        """
        whole = statistic(np.ones(self.pairs, dtype=bool))
        if self.prompts == 1:
            return Estimate(whole, -math.inf, math.inf, self.pairs)
        left_out = np.array([statistic(self._of != prompt) for prompt in range(self.prompts)])
        half = self.quantile * math.sqrt(self._jackknifed(left_out, whole))
        return Estimate(whole, whole - half, whole + half, self.pairs)

    def standard_error(self, values: Values) -> float:
        """The standard error of the mean of N values, (N,); infinite for one prompt."""
        return math.sqrt(self._variance(values))

    def sums(self, values: Values) -> NDArray[np.float64]:
        """The sum of N values over the pairs of each prompt, (G,)."""
        sums: NDArray[np.float64] = np.bincount(self._of, np.asarray(values, dtype=float), self.prompts).astype(float)
        return sums

    def _variance(self, values: Values) -> float:
        """The variance of the mean by the jackknife: (G-1)/G times the sum of (mean without prompt g - mean)^2.

        B. Efron, C. Stein, The jackknife estimate of variance, Annals of Statistics 9 (1981).
        """
        if self.prompts == 1:
            return math.inf
        of_pairs = np.asarray(values, dtype=float)
        sums = self.sums(of_pairs)
        with np.errstate(invalid="ignore"):  # an infinite loss makes the interval NaN
            left_out = (sums.sum() - sums) / (self.pairs - self._sizes)
            return self._jackknifed(left_out, float(of_pairs.mean()))

    def _jackknifed(self, left_out: NDArray[np.float64], whole: float) -> float:
        return float(((left_out - whole) ** 2).sum()) * (self.prompts - 1) / self.prompts


def student_quantile(freedom: int) -> float:
    """The 97.5% quantile of Student's t: the error is below 1e-9 up to 4 degrees of freedom, then below 0.0003.

    The expansion in 1/freedom is 26.7.5 of Abramowitz and Stegun, Handbook of Mathematical Functions (1964).
    """
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    z = Z95
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))


def wilson(share: float, trials: float, n: int, quantile: float) -> Estimate:
    """A share of n pairs that count as `trials` independent ones, with Wilson's interval.

    E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    Unlike mean +- z s/sqrt(n) it stays within [0, 1] and has a width above 0 when all pairs agree.
    """
    squared = quantile**2 / trials
    center = (share + squared / 2) / (1 + squared)
    half = math.sqrt(share * (1 - share) * squared + squared**2 / 4) / (1 + squared)
    # The share lies within; at 0 and 1 rounding would leave it out.
    return Estimate(share, min(share, max(0.0, center - half)), max(share, min(1.0, center + half)), n)


def mean_estimate(values: Values) -> Estimate:
    """The mean of independent values with Student's interval, mean +- t s/sqrt(n)."""
    return Clusters(range(len(values))).mean(values)


def proportion_estimate(successes: float, n: int) -> Estimate:
    """A share of n independent pairs with its 95% Wilson interval; ties may enter as half successes."""
    return wilson(successes / n, n, n, Z95)
