"""Which pairs each optimizer step sees, and how a step's pairs are cut to fit in memory.

One idea to keep in mind: the order is a pure function of (seed, epoch), so the position in the data is the step's
number and nothing else. A resumed run has no state to restore and nothing to skip through.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby

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
    rows: tuple[int, ...] | None = None  # pairs of each row, in order, where rows hold several; they stay together

    @classmethod
    def of(cls, pairs: Sequence[TokenizedPair], batch_size: int, seed: int, shuffle: bool) -> "Schedule":
        """For these pairs: those of one row of the file follow each other."""
        rows = [len(list(row)) for _, row in groupby(pairs, key=lambda pair: pair.index)]
        return cls(len(pairs), batch_size, seed, shuffle, tuple(rows) if len(rows) < len(pairs) else None)

    def _order(self, epoch: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
        if self.rows is None:
            return epoch_order(self.pairs, self.seed, epoch, self.shuffle)
        ends = np.cumsum(self.rows)
        order = epoch_order(len(self.rows), self.seed, epoch, self.shuffle)
        return np.concatenate([np.arange(ends[row] - self.rows[row], ends[row]) for row in order])

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
                order = self._order(epoch)
            start = update % self.steps_per_epoch * self.batch_size
            yield order[start : start + self.batch_size]


class Way(StrEnum):
    """How a batch is laid out and attended to; `packing.py` finds out which of them a model can take."""

    SEGMENTS = "segments"  # packed, attention piece by piece
    MASK = "mask"  # packed, the family's own attention under a dense mask
    PADDED = "padded"


def longest_side(pair: TokenizedPair) -> int:
    """Tokens of the longer of prompt + chosen and prompt + rejected."""
    return len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))


Cut = Callable[[list[TokenizedPair]], list[list[TokenizedPair]]]


def by_size(size: int) -> Cut:
    """Cut a batch into pieces of `size` pairs; the last may be shorter."""

    def cut(batch: list[TokenizedPair]) -> list[list[TokenizedPair]]:
        return [batch[start : start + size] for start in range(0, len(batch), size)]

    return cut


def by_padded_tokens(budget: int) -> Cut:
    """Cut a batch into pieces of at most `budget` tokens in padded rows, long pairs with long ones.

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


def packed_tokens(pairs: Sequence[TokenizedPair]) -> int:
    """Tokens of the packed row that these pairs make: every prompt once, every response to it once."""
    pieces = {pair.prompt.tobytes(): {b"": len(pair.prompt)} for pair in pairs}
    for pair in pairs:
        for response in (pair.chosen, pair.rejected):
            pieces[pair.prompt.tobytes()][b"response" + response.tobytes()] = len(response)
    return sum(sum(lengths.values()) for lengths in pieces.values())


def padded_tokens(pairs: Sequence[TokenizedPair]) -> int:
    """Tokens of the padded rows that these pairs make, pad tokens included."""
    return 2 * len(pairs) * max(longest_side(pair) for pair in pairs)


def by_packed_tokens(budget: int) -> Cut:
    """Cut a batch into few pieces of at most `budget` tokens in packed rows, alike in size.

    Pairs of one prompt stay together where the budget allows, so that they share it. A pair longer than the budget
    is a piece of its own.
    """

    def cut(batch: list[TokenizedPair]) -> list[list[TokenizedPair]]:
        by_prompt: dict[bytes, list[TokenizedPair]] = {}
        for pair in batch:
            by_prompt.setdefault(pair.prompt.tobytes(), []).append(pair)
        items = [
            item
            for group in by_prompt.values()
            for item in ([group] if packed_tokens(group) <= budget else [[pair] for pair in group])
        ]
        sized = sorted(((packed_tokens(item), item) for item in items), key=lambda one: one[0], reverse=True)
        pieces = max(1, math.ceil(sum(size for size, _ in sized) / budget))
        while True:
            filled, sizes = _longest_first(sized, min(pieces, len(sized)))
            if all(size <= budget or len(piece) == 1 for size, piece in zip(sizes, filled, strict=True)):
                return filled
            pieces += 1

    return cut


def _longest_first(
    sized: list[tuple[int, list[TokenizedPair]]], pieces: int
) -> tuple[list[list[TokenizedPair]], list[int]]:
    """Each item, the longest first, into the piece that holds least; the pieces and their sizes."""
    filled: list[list[TokenizedPair]] = [[] for _ in range(pieces)]
    sizes = [0] * pieces
    for size, item in sized:
        least = sizes.index(min(sizes))
        filled[least] += item
        sizes[least] += size
    return filled, sizes


def cut_by_tokens(tokens: int, way: Way) -> Cut:
    """Cut a batch by a token budget, counted as the way lays tokens out."""
    return by_padded_tokens(tokens) if way is Way.PADDED else by_packed_tokens(tokens)
