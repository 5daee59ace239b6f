"""Which pairs each optimizer step sees, and how a step's pairs are cut to fit in memory.

One idea to keep in mind: the order is a pure function of (seed, epoch), so the position in the data is the step's
number and nothing else. A resumed run has no state to restore and nothing to skip through.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from dpo_cli.data.tokens import TokenizedPair


def epoch_order(pairs: int, seed: int, epoch: int, shuffle: bool) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """The order of the pairs in one epoch, (pairs,): a permutation of 0..pairs-1.

    From the raw stream of a counter-based generator, which NumPy keeps the same in every version; its shuffles
    it does not.
    """
    if not shuffle:
        return np.arange(pairs)
    raw = np.random.Philox(key=[seed, epoch]).random_raw(pairs)
    return np.argsort(raw, kind="stable")


@dataclass(frozen=True)
class Schedule:
    """How the optimizer steps of a run fall on its pairs."""

    pairs: int
    batch_size: int
    seed: int
    shuffle: bool

    @property
    def steps_per_epoch(self) -> int:
        """The last batch of an epoch may be smaller; it counts as a step."""
        return math.ceil(self.pairs / self.batch_size)

    def total_steps(self, epochs: int, max_steps: int | None) -> int:
        """max_steps wins over epochs when set."""
        return max_steps if max_steps is not None else epochs * self.steps_per_epoch

    def epoch(self, update: int) -> int:
        """The epoch, from 0, of the update numbered `update` from 0."""
        return update // self.steps_per_epoch

    def batches(self, first: int, last: int) -> Iterator["np.ndarray[tuple[int], np.dtype[np.int64]]"]:
        """The pairs of updates first..last-1, each (batch,): the last of an epoch may be shorter."""
        epoch, order = -1, np.arange(0)
        for update in range(first, last):
            if self.epoch(update) != epoch:
                epoch = self.epoch(update)
                order = epoch_order(self.pairs, self.seed, epoch, self.shuffle)
            start = update % self.steps_per_epoch * self.batch_size
            yield order[start : start + self.batch_size]


def longest_side(pair: TokenizedPair) -> int:
    """Tokens of the longer of prompt + chosen and prompt + rejected."""
    return len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))


Cut = Callable[[list[TokenizedPair]], list[list[TokenizedPair]]]


def by_size(size: int) -> Cut:
    """Cut a batch into pieces of `size` pairs; the last may be shorter."""

    def cut(batch: list[TokenizedPair]) -> list[list[TokenizedPair]]:
        return [batch[start : start + size] for start in range(0, len(batch), size)]

    return cut


def by_tokens(budget: int) -> Cut:
    """Cut a batch into pieces of at most `budget` padded tokens, long pairs with long ones.

    A pair longer than the budget is a piece of its own.
    """

    def cut(batch: list[TokenizedPair]) -> list[list[TokenizedPair]]:
        pieces: list[list[TokenizedPair]] = []
        longest = 0
        for pair in sorted(batch, key=longest_side, reverse=True):
            if not pieces or 2 * longest * (len(pieces[-1]) + 1) > budget:
                pieces.append([])
                longest = longest_side(pair)
            pieces[-1].append(pair)
        return pieces

    return cut
