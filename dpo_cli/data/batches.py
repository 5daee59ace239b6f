"""Which pairs each optimizer step sees, and how a batch is split into micro-batches that fit in memory.

One idea to keep in mind: the order is a pure function of (seed, epoch), so the position in the data is the step's
number and nothing else. A resumed run has no state to restore and nothing to skip through.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice, pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dpo_cli.data.tokens import TokenizedPair

Order = NDArray[np.int64]
BLOCK = 2**19  # pairs


def epoch_order(pairs: int, seed: int, epoch: int, shuffle: bool) -> Order:
    """The order of the pairs in one epoch, (pairs,): a permutation of 0..pairs-1.

    From the raw stream of a counter-based generator, which NumPy keeps the same in every version; its shuffles
    it does not.
    """
    if not shuffle:
        return np.arange(pairs)
    raw = _generator(seed, epoch).random_raw(pairs)
    return np.argsort(raw, kind="stable")


def _generator(seed: int, epoch: int) -> np.random.Philox:
    return np.random.Philox(key=[seed, epoch])


def epoch_blocks(pairs: int, seed: int, epoch: int, shuffle: bool) -> Iterator[Order]:
    """`epoch_order` in blocks of about BLOCK pairs, (block,) each: ten million pairs are never sorted at once.

    A block holds the pairs whose random numbers lie between two bounds. The numbers are made again for each block.
    """
    if not shuffle:
        yield from (np.arange(start, min(start + BLOCK, pairs)) for start in range(0, pairs, BLOCK))
        return
    if pairs <= 2 * BLOCK:
        yield epoch_order(pairs, seed, epoch, shuffle)
        return
    blocks = math.ceil(pairs / BLOCK)
    for low, high in pairwise(2**64 * number // blocks for number in range(blocks + 1)):
        generator = _generator(seed, epoch)
        numbers, places = [], []
        for start in range(0, pairs, BLOCK):
            raw = generator.random_raw(min(BLOCK, pairs - start))
            inside = np.flatnonzero((raw >= np.uint64(low)) & (raw <= np.uint64(high - 1)))
            numbers.append(raw[inside])
            places.append(start + inside)
        yield np.concatenate(places)[np.argsort(np.concatenate(numbers), kind="stable")]


@dataclass(frozen=True)
class Schedule:
    """How the optimizer steps of a run fall on its pairs."""

    pairs: int
    batch_size: int
    seed: int
    shuffle: bool
    rows: NDArray[np.int32] | None = None  # pairs of each row, in order, where rows hold several; they stay together

    def _blocks(self, epoch: int) -> Iterator[Order]:
        if self.rows is None:
            yield from epoch_blocks(self.pairs, self.seed, epoch, self.shuffle)
            return
        ends = np.cumsum(self.rows, dtype=np.int64)
        for order in epoch_blocks(len(self.rows), self.seed, epoch, self.shuffle):
            sizes = self.rows[order]
            within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            yield np.repeat(ends[order] - sizes, sizes) + within

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

    def batches(self, first: int, last: int) -> Iterator[Order]:
        """The pairs of updates first..last-1, each (batch,): the last of an epoch may be shorter."""
        for epoch in range(self.epoch(first), self.epoch(max(first, last - 1)) + 1):
            start = epoch * self.steps_per_epoch  # the number of the epoch's first update
            yield from islice(self._batches(epoch), max(0, first - start), min(last - start, self.steps_per_epoch))

    def _batches(self, epoch: int) -> Iterator[Order]:
        left = np.arange(0)
        for block in self._blocks(epoch):
            order = np.concatenate([left, block])
            whole = len(order) // self.batch_size * self.batch_size
            yield from order[:whole].reshape(-1, self.batch_size)
            left = order[whole:]
        if len(left):
            yield left


class Layout(StrEnum):
    """How a micro-batch is laid out and attended to; `packing.py` finds out which layouts are correct for a model."""

    PACKED_SEGMENTS = "packed_segments"  # packed rows, attention segment by segment
    PACKED_MASK = "packed_mask"  # packed rows, the family's own attention under a dense mask
    PADDED = "padded"


def longest_side(pair: TokenizedPair) -> int:
    """Tokens of the longer of prompt + chosen and prompt + rejected."""
    return len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))


def packed_tokens(pairs: Sequence[TokenizedPair]) -> int:
    """Tokens of the packed row that these pairs make: every prompt once, every response to it once."""
    pieces = {pair.prompt.tobytes(): {b"": len(pair.prompt)} for pair in pairs}
    for pair in pairs:
        for response in pair.responses:
            pieces[pair.prompt.tobytes()][b"response" + response.tobytes()] = len(response)
    return sum(sum(lengths.values()) for lengths in pieces.values())


def padded_tokens(pairs: Sequence[TokenizedPair]) -> int:
    """Tokens of the padded rows that these pairs make, pad tokens included."""
    return 2 * len(pairs) * max(longest_side(pair) for pair in pairs)


class Split(Protocol):
    """Splits a batch into micro-batches."""

    def __call__(self, batch: list[TokenizedPair]) -> list[list[TokenizedPair]]:
        """The batch's pairs, each in one micro-batch."""
        ...

    def finer(self, pairs: list[TokenizedPair]) -> "Split":
        """A split that makes two micro-batches of these pairs, which did not fit in memory as one."""
        ...


@dataclass(frozen=True)
class SplitByPairs:
    """Micro-batches of `size` pairs; the last may be smaller."""

    size: int

    def __call__(self, batch: list[TokenizedPair]) -> list[list[TokenizedPair]]:
        """The batch's pairs in their order."""
        return [batch[start : start + self.size] for start in range(0, len(batch), self.size)]

    def finer(self, pairs: list[TokenizedPair]) -> "SplitByPairs":
        """Half of what did not fit."""
        return SplitByPairs((len(pairs) + 1) // 2)

    def __str__(self) -> str:
        return f"{self.size:,} pair{'s' if self.size > 1 else ''} in a micro-batch"


@dataclass(frozen=True)
class SplitByTokens:
    """Micro-batches of at most `budget` tokens, as the layout counts them; a longer pair is alone in one."""

    budget: int
    layout: Layout

    def __call__(self, batch: list[TokenizedPair]) -> list[list[TokenizedPair]]:
        """The batch's pairs, those of like length or of one prompt together."""
        return (_split_padded if self.layout is Layout.PADDED else _split_packed)(batch, self.budget)

    def finer(self, pairs: list[TokenizedPair]) -> "SplitByTokens":
        """Less than half of what did not fit, or the same micro-batches would come again."""
        size = padded_tokens(pairs) if self.layout is Layout.PADDED else packed_tokens(pairs)
        return SplitByTokens(max(1, min(self.budget, size) // 2), self.layout)

    def __str__(self) -> str:
        return f"{self.budget:,} tokens in a micro-batch"


def _split_padded(batch: list[TokenizedPair], budget: int) -> list[list[TokenizedPair]]:
    """Long pairs with long ones, so that little is padded."""
    micro_batches: list[list[TokenizedPair]] = []
    longest = 0
    for pair in sorted(batch, key=longest_side, reverse=True):
        if not micro_batches or 2 * longest * (len(micro_batches[-1]) + 1) > budget:
            micro_batches.append([])
            longest = longest_side(pair)
        micro_batches[-1].append(pair)
    return micro_batches


def _split_packed(batch: list[TokenizedPair], budget: int) -> list[list[TokenizedPair]]:
    """Few micro-batches, alike in size. Pairs of one prompt stay together where the budget allows: they share it."""
    by_prompt: dict[bytes, list[TokenizedPair]] = {}
    for pair in batch:
        by_prompt.setdefault(pair.prompt.tobytes(), []).append(pair)
    items = [
        item
        for group in by_prompt.values()
        for item in ([group] if packed_tokens(group) <= budget else [[pair] for pair in group])
    ]
    sized = sorted(((packed_tokens(item), item) for item in items), key=lambda one: one[0], reverse=True)
    number = max(1, math.ceil(sum(size for size, _ in sized) / budget))
    while True:
        micro_batches, sizes = _longest_first(sized, min(number, len(sized)))
        if all(size <= budget or len(pairs) == 1 for size, pairs in zip(sizes, micro_batches, strict=True)):
            return micro_batches
        number += 1


def _longest_first(
    sized: list[tuple[int, list[TokenizedPair]]], number: int
) -> tuple[list[list[TokenizedPair]], list[int]]:
    """Each item, the longest first, into the micro-batch that holds least; the micro-batches and their sizes."""
    filled: list[list[TokenizedPair]] = [[] for _ in range(number)]
    sizes = [0] * number
    for size, item in sized:
        least = sizes.index(min(sizes))
        filled[least] += item
        sizes[least] += size
    return filled, sizes
