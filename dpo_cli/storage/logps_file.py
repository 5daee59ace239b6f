"""Files of log-probs: records of 24 bytes, sorted by key, mapped into memory and found by binary search.

A file is a header, the sorted records, and a tail of records in the order in which they were appended. Without a header
all of it is tail. The sorted part never changes: whoever merges the tail into it writes a new file and renames it, so a
process that has the old one mapped goes on reading it. Each record carries a checksum and is used only if it holds.

N records; a key is 16 bytes, two words of 64 bits.
"""

import math
import mmap
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from dpo_cli.storage.durable import UNFINISHED, write_stream
from dpo_cli.storage.hashing import GOLDEN, mixed
from dpo_cli.storage.locks import opened_alone

RECORD = np.dtype([("key", "<u8", 2), ("logp", "<f4"), ("check", "<u4")])
Records = NDArray[Any]  # (N,) of RECORD
BLOCK = 2**19  # records that are sorted, copied or hashed at once: 12 MiB
# The header is two records, so that a program that knows no header passes over it: (MAGIC, number of sorted records)
# with their CRC-32 in the place of the log-prob, and what the file covers.
MAGIC = 0x5053474F4C4F5044
HEADER_BYTES = 2 * RECORD.itemsize
NOTHING = bytes(16)  # what a file covers that makes no promise


def make_records(keys: Sequence[bytes], logps: Sequence[float]) -> Records:
    """Records of keys and their values, (N,)."""
    records = np.zeros(len(keys), dtype=RECORD)
    records["key"] = words_of(keys)
    records["logp"] = logps
    records["check"] = checks(records)
    return records


def words_of(keys: Sequence[bytes]) -> NDArray[np.uint64]:
    """The two words of each key, (N, 2)."""
    return np.frombuffer(b"".join(keys), dtype="<u8").reshape(-1, 2)


def checks(records: Records) -> NDArray[np.uint32]:
    """A checksum of key and value of each record, (N,): not against malice, but against torn and flipped bytes."""
    logps = np.ascontiguousarray(records["logp"]).view("<u4").astype(np.uint64)
    check = np.full(len(records), GOLDEN)
    for words in (records["key"][:, 0], records["key"][:, 1], logps):
        check = mixed(check ^ words)
    return check.astype(np.uint32)


def undamaged(records: Records) -> NDArray[np.bool_]:
    """Whose checksum is right, (N,)."""
    return checks(records) == records["check"]


class SortedRecords:
    """Records sorted by key, each key once: mapped from a file, or in memory."""

    def __init__(
        self, records: Records, crc: int = 0, covers: bytes = NOTHING, mapping: mmap.mmap | None = None
    ) -> None:
        self.records = records
        self.crc = crc  # with the number of records it names the content
        self.covers = covers  # a name for a set of keys that are all in it
        self.damaged: set[int] = set()  # records that were found and passed over
        self._mapping = mapping

    def __len__(self) -> int:
        return len(self.records)

    @property
    def name(self) -> tuple[int, int]:
        """Number of records and CRC: two with the same name have the same content."""
        return len(self), self.crc

    def find(self, words: NDArray[np.uint64]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """The log-probs of keys (N, 2), in nats, 0 for unknown ones; which keys are known. Both (N,)."""
        values, found = np.zeros(len(words), dtype=np.float32), np.zeros(len(words), dtype=np.bool_)
        if not len(self):
            return values, found
        at = np.array([self._place(word) for word in words[:, 0]], dtype=np.int64)
        left = np.arange(len(words))  # keys that are still looked for: several may begin with the same word
        while len(left):
            left = left[at[left] < len(self)]
            here = self.records[at[left]]
            left, here = (some[here["key"][:, 0] == words[left, 0]] for some in (left, here))
            same = here["key"][:, 1] == words[left, 1]
            sound = same & undamaged(here)
            self.damaged.update(at[left[same & ~sound]].tolist())
            values[left[sound]], found[left[sound]] = here["logp"][sound], True
            left = left[~sound]
            at[left] += 1
        self.release()
        return values, found

    def _place(self, word: np.uint64) -> int:
        """The first record whose key begins with this word or a larger one.

        Keys are hashes, so its place is known to within the square root of their number: few pages are read.
        """
        first, spread = self.records["key"][:, 0], 2 * math.isqrt(len(self)) + 1
        low = max(0, (int(word) * len(self) >> 64) - spread)
        high = min(len(self), low + 2 * spread)
        place = low + int(first[low:high].searchsorted(word))
        if low < place < high or (place == low == 0) or (place == high == len(self)):
            return place
        return int(first.searchsorted(word))

    def is_whole(self) -> bool:
        """Whether the content still has the CRC that it was written with."""
        crc = 0
        for block in blocks_of(self.records):
            crc = zlib.crc32(block.view(np.uint8).data, crc)
            self.release()
        return crc == self.crc

    def release(self) -> None:
        """Give the mapped pages back: the system keeps them, but they are no longer this process's memory."""
        if self._mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._mapping.madvise(mmap.MADV_DONTNEED)


def no_records() -> SortedRecords:
    """None at all."""
    return SortedRecords(np.zeros(0, dtype=RECORD))


def in_memory(blocks: Iterable[Records]) -> SortedRecords:
    """Sorted blocks as one, in memory."""
    records = np.concatenate([np.zeros(0, dtype=RECORD), *blocks])
    return SortedRecords(records, zlib.crc32(records.view(np.uint8).data))


def map_sorted(descriptor: int) -> SortedRecords:
    """The sorted part of an open file, mapped; none where the file begins with no sound header."""
    size = os.fstat(descriptor).st_size
    os.lseek(descriptor, 0, os.SEEK_SET)
    content = os.read(descriptor, HEADER_BYTES)
    if len(content) < HEADER_BYTES:
        return no_records()
    header = np.frombuffer(content, dtype=RECORD)
    number = int(header["key"][0, 1])
    end = HEADER_BYTES + number * RECORD.itemsize
    if not undamaged(header).all() or int(header["key"][0, 0]) != MAGIC or not HEADER_BYTES < end <= size:
        return no_records()
    mapping = mmap.mmap(descriptor, end, access=mmap.ACCESS_READ)
    records = np.frombuffer(mapping, dtype=RECORD, count=number, offset=HEADER_BYTES)
    return SortedRecords(records, int(header["logp"].view("<u4")[0]), header["key"][1].tobytes(), mapping)


def sorted_at(path: Path) -> SortedRecords:
    """The sorted part of the file at `path`; none where it cannot be read."""
    try:
        with path.open("rb") as file:
            return map_sorted(file.fileno())
    except OSError:
        return no_records()


def tail_of(descriptor: int, sorted_part: SortedRecords) -> tuple[Records, bool]:
    """The records behind the sorted part of an open file, mapped, and whether half a record follows them."""
    begin = HEADER_BYTES + len(sorted_part) * RECORD.itemsize if len(sorted_part) else 0
    number, torn = divmod(os.fstat(descriptor).st_size - begin, RECORD.itemsize)
    if not number:
        return np.zeros(0, dtype=RECORD), torn > 0
    mapping = mmap.mmap(descriptor, begin + number * RECORD.itemsize, access=mmap.ACCESS_READ)
    return np.frombuffer(mapping, dtype=RECORD, count=number, offset=begin), torn > 0


def without_header(records: Records) -> Records:
    """A tail without the header of a file whose sorted part is not whole."""
    return records[2:] if len(records) and int(records["key"][0, 0]) == MAGIC else records


def blocks_of(records: Records) -> Iterator[Records]:
    """The records, `BLOCK` at a time."""
    return (records[start : start + BLOCK] for start in range(0, len(records), BLOCK))


def sorted_runs(blocks: Iterable[Records], scratch: BinaryIO) -> list[Records]:
    """Each block sorted by key, mapped from an open file that they are written to."""
    ends = [0]
    for block in blocks:
        scratch.write(_in_order(block).tobytes())
        ends.append(ends[-1] + len(block))
    scratch.flush()
    records, _ = tail_of(scratch.fileno(), no_records())
    return [records[start:end] for start, end in pairwise(ends)]


def merged(sources: Sequence[Records], release: Callable[[], None] = lambda: None) -> Iterator[Records]:
    """The undamaged records of all sources, sorted by key, in blocks; of a key the one of the first source that has it.

    A source is sorted; one that is not is sorted in memory. `release` is called after each block.
    """
    sources = [source if _is_ordered(source) else _in_order(source) for source in sources]
    parts = max(1, -(-sum(map(len, sources)) // BLOCK))
    for part in range(parts):  # keys are hashes, so equal ranges of them hold equally many
        low, high = np.uint64((part << 64) // parts), np.uint64(((part + 1 << 64) // parts) - 1)
        some = np.concatenate([_between(source, low, high) for source in sources])
        some = _in_order(some[undamaged(some)])
        again = (some["key"][1:] == some["key"][:-1]).all(1)
        yield some[np.append(True, ~again)] if again.any() else some
        release()


def _in_order(records: Records) -> Records:
    """The records sorted by key, those of one key in the order in which they were."""
    records = records[np.argsort(records["key"][:, 0], kind="stable")]
    first = records["key"][:, 0]
    if (first[1:] == first[:-1]).any():  # the second word decides; it rarely has to
        records = records[np.lexsort((records["key"][:, 1], first))]
    return records


def _is_ordered(records: Records) -> bool:
    """Whether the first words of the keys are in order."""
    last = np.uint64(0)
    for block in blocks_of(records):
        first = block["key"][:, 0]
        if first[0] < last or (first[1:] < first[:-1]).any():
            return False
        last = first[-1]
    return True


def _between(records: Records, low: np.uint64, high: np.uint64) -> Records:
    """The sorted records whose first word is in low..high."""
    first = records["key"][:, 0]
    return records[np.searchsorted(first, low) : np.searchsorted(first, high, side="right")]


def write_sorted(path: Path, blocks: Iterable[Records], covers: bytes = NOTHING, shared: bool = False) -> SortedRecords:
    """Write a file of sorted records, whole, and map it; OSError leaves an earlier file as it was."""

    def write(file: BinaryIO) -> SortedRecords:
        file.write(bytes(HEADER_BYTES))
        number = crc = 0
        for block in blocks:
            data = block.tobytes()
            number, crc = number + len(block), zlib.crc32(data, crc)
            file.write(data)
        header = np.zeros(2, dtype=RECORD)
        header["key"] = [(MAGIC, number), tuple(np.frombuffer(covers, dtype="<u8"))]
        header["logp"][:1] = np.array([crc], dtype="<u4").view("<f4")
        header["check"] = checks(header)
        file.seek(0)
        file.write(header.tobytes())
        file.flush()
        return map_sorted(file.fileno())

    return write_stream(path, write, shared)


@contextmanager
def opened_in_place(path: Path) -> Iterator[int]:
    """As `opened_alone`; where another process has renamed or removed the file meanwhile, the one that is there now."""
    while True:
        with opened_alone(path) as descriptor:
            try:
                there = os.path.samestat(os.fstat(descriptor), os.stat(path))
            except FileNotFoundError:
                there = False
            if there:
                yield descriptor
                return


def sweep_unfinished(path: Path) -> None:
    """Remove what a killed process has left of a merge. The caller holds the lock of `path`."""
    for left in path.parent.glob(f"{UNFINISHED}{path.name}-*"):
        left.unlink(missing_ok=True)
