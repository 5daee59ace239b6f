"""Two models on the same pairs: their difference, a test of it, and how many more prompts would tell them apart.

What is hard for both models cancels in a difference, so it is known better than either mean. The prompt counts as
independent, as in statistics.py. N pairs, G prompts; d, (N,): a metric of one model minus that of the other.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpo_cli.theory.statistics import Z95, Clusters, Estimate, Values

Z80 = 0.8416212335729143  # the 80% quantile of the standard normal
TIE = 1e-9  # a prompt's sum of differences below this is rounding


@dataclass(frozen=True)
class Difference:
    """The mean of d with its 95% interval over prompts, and the p value of "the models are alike"."""

    estimate: Estimate
    p: float
    prompts_needed: float  # in all, for a test of 80% power; infinite where the mean is 0


def paired_difference(prompts: Clusters, differences: Values, share: bool = False) -> Difference:
    """The mean of d, tested prompt by prompt: each is won by the model with the higher sum, or tied and dropped.

    `share`: of shares, such as accuracies. Where no pair differs the jackknife finds no spread; the interval then goes
    as far as Wilson's of a share of 0.
    """
    estimate = prompts.mean(differences)
    if share and not np.any(differences):
        reach = prompts.share(differences).high
        estimate = Estimate(0.0, -reach, reach, prompts.pairs)
    sums = prompts.sums(differences)
    p = mcnemar(int((sums > TIE).sum()), int((sums < -TIE).sum()))
    needed = prompts_needed(estimate.mean, prompts.standard_error(differences), prompts.prompts)
    return Difference(estimate, p, needed)


def mcnemar(won: int, lost: int) -> float:
    """The exact two-sided p value of `won` and `lost` discordant prompts: twice the tail of Binomial(won + lost, 1/2).

    Q. McNemar, Note on the sampling error of the difference between correlated proportions, Psychometrika 12 (1947).
    On sums that are not 0 or 1 it is the sign test.
    """
    ways, tail = 1, 0  # to choose k of won + lost, and their sum: whole numbers, so exact
    for k in range(min(won, lost) + 1):
        tail += ways
        ways = ways * (won + lost - k) // (k + 1)
    return min(1.0, 2 * tail / 2 ** (won + lost))


def holm(p_values: Sequence[float]) -> list[float]:
    """p values of several tests, corrected so that any false alarm among them has the probability of one test.

    S. Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6 (1979).
    """
    corrected, highest = [1.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable").tolist()):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def prompts_needed(mean: float, standard_error: float, prompts: int) -> float:
    """Prompts with which a true difference of `mean` is found with 80% power at the 5% level; infinite for 0.

    (z(0.975) + z(0.8))^2 variance / mean^2 with the variance of one prompt, prompts * standard_error^2: section 2.1 of
    S.-C. Chow, J. Shao, H. Wang, Sample size calculations in clinical research (2008).
    """
    return math.inf if mean == 0 else prompts * ((Z95 + Z80) * standard_error / mean) ** 2
