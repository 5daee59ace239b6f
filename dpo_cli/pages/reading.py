"""Numbers of reports and logs as the figures take them: NaN stands for what is not known."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_cli.theory.statistics import Clusters, Estimate

Triple = tuple[float, float, float]  # mean, and the ends of its 95% interval


def number(value: Any) -> float:
    """A finite number, else NaN."""
    known = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if known else math.nan


def column(lines: Sequence[Mapping[str, Any]], name: str) -> NDArray[np.float64]:
    """The values of a key in each line, (N,)."""
    return np.asarray([number(line.get(name)) for line in lines], dtype=float)


def triple(values: Any) -> Triple:
    """[mean, low, high] of a report; three times NaN for null."""
    mean, low, high = values or (None, None, None)
    return number(mean), number(low), number(high)


def estimate_in(report: Mapping[str, Any], name: str) -> Triple:
    """A metric of a report or a log with the ends of its interval under `intervals95`."""
    low, high = (report.get("intervals95") or {}).get(name) or (None, None)
    return number(report.get(name)), number(low), number(high)


def ends(one: Estimate) -> Triple:
    """An estimate for a figure; an end that is infinite is NaN."""
    return one.mean, number(one.low), number(one.high)


def right(pairs: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
    """How right each pair is, (N,): 1 where the chosen response has the higher reward, 0.5 for a tie.

    A pair with a soft label is right with that probability.
    """
    labels = np.asarray([number(pair.get("probability", 1.0)) for pair in pairs], dtype=float)
    return (1 + (2 * labels - 1) * np.sign(column(pairs, "margin"))) / 2


def prompts_of(pairs: Sequence[Mapping[str, Any]]) -> NDArray[np.uint64]:
    """An id for the prompt of each pair, (N,); pairs that name no prompt have one each."""
    ids = [int(str(pair["prompt"]), 16) if "prompt" in pair else index for index, pair in enumerate(pairs)]
    return np.asarray(ids, dtype=np.uint64)


def accuracy_by(
    values: NDArray[np.float64], is_right: NDArray[np.float64], prompts: NDArray[np.uint64], most: int = 10
) -> list[tuple[float, Triple]]:
    """Accuracy in bins of about equally many pairs: the mean of the values in each, and its interval over prompts."""
    known = np.isfinite(values) & np.isfinite(is_right)
    values, is_right, prompts = values[known], is_right[known], prompts[known]
    if not len(values):
        return []
    bins = max(1, min(most, len(values) // 10))
    edges = np.unique(np.quantile(values, np.linspace(0, 1, bins + 1)))
    of_bin = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, max(0, len(edges) - 2))
    return [
        (float(values[of_bin == one].mean()), ends(Clusters(prompts[of_bin == one]).share(is_right[of_bin == one])))
        for one in np.unique(of_bin)
    ]
