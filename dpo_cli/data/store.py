"""Tokenized pairs on disk: Arrow files that are mapped into memory, so that a data set of any size takes little of it.

A store is a folder in the cache, named by a hash of all that decides its tokens. Its parts `part-00000.arrow`, ... hold
the pairs of so many rows each, as a stream of one record batch (`datasets.Dataset.from_file` reads one, too);
`store.json` is written last. So a preparation that was interrupted goes on behind its last whole part.
"""

import io
import json
import mmap
import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dpo_cli.console.text import safe_text
from dpo_cli.data.tokens import TokenIds, TokenizedPair
from dpo_cli.errors import StorageError

COMPLETE = "store.json"
LISTS = ("prompt", "chosen", "rejected", "chosen_unscored", "rejected_unscored")
SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("key", pa.binary(32)),
        ("group", pa.uint64()),
        ("hash", pa.uint64()),
        ("probability", pa.float64()),
        *((name, pa.list_(pa.int32())) for name in LISTS),
    ]
)
NUMBERS = {"index": np.int64, "group": np.uint64, "hash": np.uint64, "probability": np.float64}
TOUCHED = 256  # parts
Indices = NDArray[np.int64]


class StoreGoneError(StorageError):
    """A part is not there: somebody removed it meanwhile."""


def part_name(number: int) -> str:
    """The file name of a part."""
    return f"part-{number:05d}.arrow"


def part_bytes(pairs: Sequence[TokenizedPair], hashes: Sequence[int], facts: dict[str, Any]) -> bytes:
    """A part as a file holds it. `hashes` are the pairs' `pair_hash`, `facts` whatever JSON can hold."""
    columns = [
        _array(pa.int64(), np.array([pair.index for pair in pairs], dtype=np.int64)),
        _array(pa.binary(32), np.frombuffer(bytes.fromhex("".join(pair.key for pair in pairs)), dtype="V32")),
        _array(pa.uint64(), np.array([pair.group for pair in pairs], dtype=np.uint64)),
        _array(pa.uint64(), np.array(hashes, dtype=np.uint64)),
        _array(pa.float64(), np.array([pair.probability for pair in pairs], dtype=np.float64)),
        *(_lists([getattr(pair, name) for pair in pairs]) for name in LISTS),
    ]
    metadata = {"facts": json.dumps(facts), "check": str(_check(columns))}
    schema = SCHEMA.with_metadata(metadata)
    file = io.BytesIO()
    with pa.ipc.new_stream(file, schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))
    return file.getvalue()


def fingerprinted(pair: TokenizedPair) -> bytes:
    """What the fingerprint of data hashes of a pair: the ids with their numbers, what is not scored, a soft label."""
    lists = [pair.prompt, pair.chosen, pair.rejected, *(pair.unscored if any(map(len, pair.unscored)) else ())]
    label = struct.pack("<d", pair.probability) if pair.probability != 1 else b""
    return b"".join([len(ids).to_bytes(4, "little") + ids.tobytes() for ids in lists]) + label


def _array(kind: pa.DataType, values: "NDArray[Any]") -> pa.Array:
    """An array without copying; `pa.array` would import pandas."""
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])


def _numpy(array: pa.Array, dtype: Any) -> NDArray[Any]:
    """The values of an array without copying; its own `to_numpy` would import pandas."""
    return np.frombuffer(array.buffers()[-1], dtype=dtype, count=len(array))


def _lists(arrays: Sequence[TokenIds]) -> pa.Array:
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    values = np.concatenate([np.zeros(0, dtype=np.int32), *arrays])
    return pa.ListArray.from_arrays(_array(pa.int32(), offsets), _array(pa.int32(), values))


def _check(columns: Sequence[pa.Array]) -> int:
    """A checksum of everything in the columns: not against malice, but against torn and flipped bytes."""
    check = 0
    for column in columns:
        for buffer in column.buffers():
            check = check if buffer is None else zlib.crc32(buffer, check)
    return check


def mapped(path: Path) -> mmap.mmap:
    """A file, mapped: it stays readable when somebody removes it."""
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise StoreGoneError(f"{safe_text(path)}: was removed meanwhile") from None
    except (OSError, ValueError) as error:
        raise StorageError(f"{safe_text(path)}: cannot be read ({safe_text(error, limit=120)})") from None


class Part:
    """A part, from its mapped file."""

    def __init__(self, path: Path, content: Any) -> None:
        """StorageError where the file is damaged."""
        try:
            batch = pa.ipc.open_stream(pa.py_buffer(content)).read_next_batch()
            metadata = batch.schema.metadata
            if batch.schema.names != SCHEMA.names or int(metadata[b"check"]) != _check(batch.columns):
                raise ValueError
            self.facts: dict[str, Any] = json.loads(metadata[b"facts"])
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException, StopIteration):
            raise StorageError(f"{safe_text(path)}: damaged; remove it, and it is made again") from None
        self._length = len(batch)
        self._numbers = {name: _numpy(batch.column(name), dtype) for name, dtype in NUMBERS.items()}
        self._keys = _numpy(batch.column("key"), "V32")
        self._offsets = {name: _numpy(batch.column(name).offsets, np.int32) for name in LISTS}
        self._values = {name: _numpy(batch.column(name).values, np.int32) for name in LISTS}

    def __len__(self) -> int:
        return self._length

    def numbers(self, name: str) -> NDArray[Any]:
        """A column of numbers, (pairs,): index, group or hash."""
        return self._numbers[name]

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of prompt, chosen and rejected, (pairs, 3)."""
        return np.stack([np.diff(self._offsets[name]) for name in LISTS[:3]], axis=1).astype(np.int64)

    def largest_token(self) -> int:
        """The largest id of any token; -1 where there are none."""
        ids = [self._values[name] for name in LISTS[:3]]
        return max((int(values.max()) for values in ids if len(values)), default=-1)

    def fingerprinted(self, places: Indices) -> bytes:
        """`fingerprinted` of the pairs at these places, one after the other."""
        certain = (self._numbers["probability"][places] == 1).all()
        if not certain or any(len(self._values[name]) for name in LISTS[3:]):
            return b"".join(fingerprinted(self.pair(place)) for place in places.tolist())
        lengths = self.lengths()[places]
        ends = np.cumsum(lengths.ravel() + 1).reshape(-1, 3)  # of each list, behind its number
        found = np.zeros(int(ends[-1, -1]), dtype="<i4")
        found[(ends - lengths - 1).ravel()] = lengths.ravel()
        for column, name in enumerate(LISTS[:3]):
            begins, sizes = self._offsets[name][places], lengths[:, column]
            within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            found[np.repeat(ends[:, column] - sizes, sizes) + within] = self._values[name][
                np.repeat(begins, sizes) + within
            ]
        return found.tobytes()

    def pair(self, number: int) -> TokenizedPair:
        """The pair at a place of this part, its ids copied out of the mapped file."""
        prompt, chosen, rejected, of_chosen, of_rejected = (self._ids(name, number) for name in LISTS)
        key = self._keys[number].tobytes().hex()
        index, group = (int(self.numbers(name)[number]) for name in ("index", "group"))
        w = float(self._numbers["probability"][number])
        return TokenizedPair(prompt, chosen, rejected, index, key, group, of_chosen, of_rejected, w)

    def _ids(self, name: str, number: int) -> TokenIds:
        start, stop = self._offsets[name][number : number + 2]
        return np.array(self._values[name][start:stop])


class PairStore:
    """The tokenized pairs of a source, by number. Parts are mapped at once, and checked when they are first needed."""

    def __init__(self, folder: Path, sizes: Sequence[int]) -> None:
        """`sizes`: pairs of each part."""
        self.folder, self.sizes = folder, sizes
        self._ends: list[int] = np.cumsum(sizes, dtype=np.int64).tolist()
        self._mapped = [mapped(folder / part_name(number)) for number in range(len(sizes))]
        self._parts: dict[int, Part] = {}
        self._touched: set[int] = set()  # parts of which pages may be in memory

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, number: int) -> TokenizedPair:
        part = bisect_right(self._ends, number)
        pair = self._part(part).pair(number - (self._ends[part] - self.sizes[part]))
        if len(self._touched) > TOUCHED:
            self._release()
        return pair

    def _part(self, number: int) -> Part:
        if number not in self._parts:
            self._parts[number] = Part(self.folder / part_name(number), self._mapped[number])
            self._touched.add(number)
            self._release()  # the check has read all of it
        self._touched.add(number)
        return self._parts[number]

    def _release(self) -> None:
        """Give the memory of mapped pages back; the system's cache of files still has them."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for number in self._touched:
                self._mapped[number].madvise(mmap.MADV_DONTNEED)
        self._touched.clear()

    def parts(self, chosen: Indices | None) -> Iterator[tuple[Part, Indices]]:
        """Each part with the chosen pairs in it, by their places there; `chosen` is in order, None for all."""
        start = 0
        for number, size in enumerate(self.sizes):
            if chosen is None:
                places = np.arange(size)
            else:
                first, last = np.searchsorted(chosen, [start, start + size])
                places = np.asarray(chosen[first:last]) - start
            if len(places):
                yield self._part(number), places
                self._release()
            start += size

    def numbers(self, name: str, chosen: Indices | None = None) -> NDArray[Any]:
        """A column of numbers of the chosen pairs: index, group or hash."""
        found = [part.numbers(name)[places] for part, places in self.parts(chosen)]
        return np.concatenate(found) if found else np.zeros(0, dtype=NUMBERS[name])

    def folders(self) -> list[Path]:
        """The folders in the cache that hold its pairs."""
        return [self.folder]

    def rows(self, chosen: Indices | None) -> NDArray[np.int64]:
        """A number of the row of each chosen pair: neighbours have the same one where they are of one row."""
        return self.numbers("index", chosen)


class StoredPairs(Sequence[TokenizedPair]):
    """Pairs of a store: all of them, or those that are chosen. Each is made when it is asked for."""

    def __init__(self, store: PairStore, chosen: Indices | None = None) -> None:
        """`chosen`: (pairs,) numbers in the store, in order; may be mapped."""
        self.store, self.chosen = store, chosen

    def __len__(self) -> int:
        return len(self.store) if self.chosen is None else len(self.chosen)

    @overload
    def __getitem__(self, number: int) -> TokenizedPair: ...
    @overload
    def __getitem__(self, number: slice) -> list[TokenizedPair]: ...
    def __getitem__(self, number: int | slice) -> TokenizedPair | list[TokenizedPair]:
        if isinstance(number, slice):
            return [self[place] for place in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        place = int(number) % len(self)
        return self.store[place if self.chosen is None else int(self.chosen[place])]

    def numbers(self, name: str) -> NDArray[Any]:
        """A column of numbers, (pairs,): index, group or hash."""
        return self.store.numbers(name, self.chosen)

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of prompt, chosen and rejected, (pairs, 3)."""
        found = [part.lengths()[places] for part, places in self.store.parts(self.chosen)]
        return np.concatenate(found) if found else np.zeros((0, 3), dtype=np.int64)
