"""Mixtures: a fixed number of pairs from each of several sources, as one data set.

One idea to keep in mind: which pairs an epoch has is decided once, by a seeded permutation of each source, and kept as
numbers on disk. All epochs have the same pairs in new orders, so resuming works as with one source.
"""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_cli.console.pace import StartBar
from dpo_cli.data.batches import epoch_order
from dpo_cli.data.splits import TrainingPairs, stored_numbers, write_facts
from dpo_cli.data.store import Indices, PairStore, Part, StoredPairs
from dpo_cli.data.tokens import TokenizedPair
from dpo_cli.storage.cache_folder import filled_once
from dpo_cli.storage.hashing import fingerprint

VERSION = 1  # of what is kept


@dataclass(frozen=True)
class Share:
    """What an epoch takes of a source."""

    source: str
    pairs: int  # in an epoch; more than there are where some come again
    available: int  # training pairs of the source


def pairs_of_weights(weights: Mapping[str, float], available: Mapping[str, int], stop: str) -> dict[str, int]:
    """Pairs of each source in an epoch, in exact proportions, rounded by the largest remainder.

    With `stop` "first" the epoch is the longest in which no source needs more pairs than it has, with "all" the
    shortest in which every source is used up.
    """
    exact = {name: Fraction(repr(weight)) for name, weight in weights.items()}
    parts = {name: weight / sum(exact.values()) for name, weight in exact.items()}
    ends = [available[name] / part for name, part in parts.items()]
    total = math.floor(min(ends)) if stop == "first" else math.ceil(max(ends))
    pairs = {name: math.floor(total * part) for name, part in parts.items()}
    by_remainder = sorted(parts, key=lambda name: pairs[name] - total * parts[name])
    for name in by_remainder[: total - sum(pairs.values())]:
        pairs[name] += 1
    return pairs


class MixedStore(PairStore):
    """Pairs of several stores one after the other, each with the name of its source; a store may come several times."""

    def __init__(self, folder: Path, blocks: Sequence[tuple[str, StoredPairs]]) -> None:
        self.folder, self.blocks = folder, blocks
        self._starts: list[int] = np.cumsum([0, *(len(pairs) for _, pairs in blocks)], dtype=np.int64).tolist()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, number: int) -> TokenizedPair:
        block = bisect_right(self._starts, number) - 1
        name, pairs = self.blocks[block]
        return replace(pairs[number - self._starts[block]], source=name)

    def _blocks(self, chosen: Indices | None) -> Iterator[tuple[PairStore, Indices | None]]:
        """Each block with its store, and the chosen pairs by their numbers there."""
        for start, (_, pairs) in zip(self._starts, self.blocks, strict=False):
            if chosen is None:
                yield pairs.store, pairs.chosen
                continue
            first, last = np.searchsorted(chosen, [start, start + len(pairs)])
            places = np.asarray(chosen[first:last]) - start
            if len(places):
                yield pairs.store, places if pairs.chosen is None else np.asarray(pairs.chosen[places])

    def parts(self, chosen: Indices | None) -> Iterator[tuple[Part, Indices]]:
        """Each part with the chosen pairs in it, block after block."""
        for store, numbers in self._blocks(chosen):
            yield from store.parts(numbers)

    def folders(self) -> list[Path]:
        """The folders of all its stores."""
        return sorted({folder for _, pairs in self.blocks for folder in pairs.store.folders()})

    def rows(self, chosen: Indices | None) -> NDArray[np.int64]:
        """As of a store; rows of different blocks have different numbers."""
        found, start = [], 0
        for store, numbers in self._blocks(chosen):
            rows = store.rows(numbers)
            found.append(rows + start)
            start += int(rows.max(initial=-1)) + 1
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


def mix(
    sides: Mapping[str, TrainingPairs],
    pairs: Mapping[str, int],
    seed: int,
    working: StartBar,
) -> TrainingPairs:
    """So many training pairs of each source as one data set; each pair of a source comes equally often, or once more.

    The choice takes 8 bytes a pair on disk. `working` starts a progress bar.
    """
    blocks, chosen, start = [], [], 0
    for name, side in sides.items():
        times, rest = divmod(pairs[name], len(side))
        for _ in range(times + (rest > 0)):
            blocks.append((name, StoredPairs(side.store, side.chosen)))
        chosen.append((start, times * len(side), len(side), rest))
        start += len(side) * (times + (rest > 0))
    first = next(iter(sides.values())).store.folder
    key: list[Any] = [VERSION, seed, [[name, side.fingerprint, pairs[name]] for name, side in sides.items()]]
    folder = first / f"mixture-{fingerprint(key)}"
    store = MixedStore(folder, blocks)

    def write(beside: Path) -> None:
        numbers = []
        for name, (begin, repeated, size, rest) in zip(sides, chosen, strict=True):
            some = np.sort(epoch_order(size, seed, _number_of(name), shuffle=True)[:rest]) if rest else np.arange(0)
            numbers += [begin + np.arange(repeated), begin + repeated + some]
        all_numbers = np.concatenate(numbers)
        all_numbers.tofile(beside / "chosen")
        write_facts(StoredPairs(store, all_numbers), beside, working("pair", len(all_numbers)))

    folder = filled_once(folder, write)
    return TrainingPairs(store, stored_numbers(folder / "chosen", np.int64), folder)


def _number_of(name: str) -> int:
    """A number for a source, so that sources of the same size are not permuted alike."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
