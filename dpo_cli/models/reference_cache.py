"""Reference log-probs on disk: a record a response, computed once for all runs, sweeps and evaluations.

The reference never moves, so neither do its log-probs. They are filed by content: a file for the weights, the dtype
and the layout they were computed in, in it a record for the tokens of each prompt and response. What else a run chooses
(learning rate, beta, loss, seed) is no part of the key. A template, a tokenizer or a length limit acts through the
tokens.

A file is sorted and mapped (storage/logps_file.py); new records are appended, and merged into the sorted part when they
are many. So memory holds the new ones and what the system maps. Each record carries a checksum: a torn or damaged one
is computed again and never used. Writers take turns by a lock. What is missing is
computed in models/precompute.py.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpo_cli.console.text import plural, safe_text
from dpo_cli.data.batches import Layout
from dpo_cli.data.tokens import TokenizedPair
from dpo_cli.engine.engine import SINGLE, Engine
from dpo_cli.errors import DataError, StorageError
from dpo_cli.models.logps import MicroBatch
from dpo_cli.storage.cache_folder import cache_folder, touch
from dpo_cli.storage.durable import link_or_copy
from dpo_cli.storage.hashing import fingerprint
from dpo_cli.storage.line_log import append_whole
from dpo_cli.storage.logps_file import (
    BLOCK,
    NOTHING,
    RECORD,
    Records,
    SortedRecords,
    blocks_of,
    in_memory,
    make_records,
    map_sorted,
    merged,
    no_records,
    opened_in_place,
    sorted_at,
    sorted_runs,
    sweep_unfinished,
    tail_of,
    undamaged,
    without_header,
    words_of,
    write_sorted,
)

VERSION = 2  # of the records and of what log-probs mean; another number is another file
UNSORTED = 2**16  # records behind the sorted part, at least, before they are merged into it


def cache_path(key: str) -> Path:
    """Where the log-probs of a reference lie: `reference/<key>.logps` in the cache folder."""
    return cache_folder("reference") / f"{key}.logps"


def cache_key(model: str, dtype: torch.dtype, device: torch.device, layout: Layout, compiled: bool = False) -> str:
    """A name for what decides a log-prob besides the tokens: the model by its fingerprint, and how it is computed."""
    how = [VERSION, model, str(dtype), device.type, str(layout), *(["compiled"] if compiled else [])]
    return fingerprint(how)


class Batches(Protocol):
    """Batches that can be gone through more than once; they may be made anew each time."""

    def __len__(self) -> int:
        """How many batches."""
        ...

    def __iter__(self) -> Iterator[Sequence[TokenizedPair]]:
        """The pairs of each."""
        ...


class ReferenceCache:
    """The log-probs of one reference by response key; new ones are appended to the file.

    With `path` None, or where the file cannot be written, they live in memory only, 24 bytes a response; `trouble` says
    why. Every rank knows what rank 0 has read; rank 0 writes.
    """

    def __init__(self, path: Path | None, engine: Engine = SINGLE) -> None:
        self.path = path
        self._engine = engine
        self.trouble: str | None = None
        self._damaged = 0
        self._adopted: list[SortedRecords] = []  # of other files: they go before what is in this one
        self._sorted = no_records()
        self._recent: dict[bytes, float] = {}  # what is not sorted yet
        if path is not None:
            self._share(lambda: self._read(path))

    def _read(self, path: Path) -> None:
        """Map the sorted part and read the tail; one that is long is merged first."""
        try:
            found = _Content.of(path)
        except OSError as error:
            self.trouble = f"{path}: cannot be read ({error.strerror}); its log-probs stay in memory"
            return
        touch(path)
        self._sorted, self._damaged = found.sorted, found.damaged
        if len(found.tail) > self._room or found.is_cut:
            self._merge(found.tail)
        else:
            sound = found.tail[undamaged(found.tail)][::-1]  # of a key the first value counts
            keys = sound["key"].tobytes()
            self._recent = {keys[16 * n : 16 * n + 16]: logp for n, logp in enumerate(sound["logp"].tolist())}

    @property
    def _room(self) -> int:
        """How many records may be unsorted: a large file is written anew less often."""
        return max(UNSORTED, len(self._sorted) // 32)

    def _share(self, act: Callable[[], None]) -> None:
        """Have rank 0 `act` on the file, and every rank know what it knows then. Collective."""

        def act_and_tell() -> tuple[bytes, int, str | None]:
            act()
            recent = make_records(list(self._recent), list(self._recent.values())).tobytes()
            return recent, self._damaged, self.trouble

        recent, self._damaged, self.trouble = self._engine.same(act_and_tell)
        if self._engine.rank:
            records = np.frombuffer(recent, dtype=RECORD)
            keys = [record.tobytes() for record in records["key"]]
            self._recent = dict(zip(keys, records["logp"].tolist(), strict=True))
        self._sorted = self._on_every_rank(self._sorted, self.path)

    def _on_every_rank(self, of_rank_0: SortedRecords, path: Path | None) -> SortedRecords:
        """The sorted records of rank 0: each rank maps them where it finds the same, or gets their content."""
        name = self._engine.same(lambda: of_rank_0.name)
        mine = of_rank_0 if self._engine.rank == 0 or path is None else sorted_at(path)
        if self._engine.agree(int(mine.name != name)):
            content, covers = self._engine.same(lambda: (of_rank_0.records.tobytes(), of_rank_0.covers))
            if self._engine.rank:
                mine = SortedRecords(np.frombuffer(content, dtype=RECORD), name[1], covers)
        return mine

    def __len__(self) -> int:
        return sum(map(len, self._parts)) + len(self._recent)

    @property
    def _parts(self) -> list[SortedRecords]:
        """The sorted records, in the order in which they are looked through."""
        return [*self._adopted, self._sorted]

    @property
    def damaged(self) -> int:
        """Damaged records that were found so far."""
        return self._damaged + sum(len(part.damaged) for part in self._parts)

    @property
    def size_text(self) -> str:
        """The file's size."""
        size = self.path.stat().st_size if self.path is not None and self.path.is_file() else 0
        return f"{size / 2**20:.1f} MB" if size >= 2**20 else f"{size / 2**10:.1f} kB"

    def find(self, keys: Sequence[bytes]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """The log-probs of responses, in nats, 0 for unknown ones; which are known. Both (N,)."""
        recent = [self._recent.get(key) for key in keys]
        values = np.array([0.0 if logp is None else logp for logp in recent], dtype=np.float32)
        found = np.array([logp is not None for logp in recent], dtype=np.bool_)
        words = words_of(keys)
        for part in reversed(self._parts):  # the first one that knows a key has the last word
            there, known = part.find(words)
            values[known], found = there[known], found | known
        return values, found

    def has(self, pairs: Sequence[TokenizedPair]) -> list[bool]:
        """Of each pair whether all its log-probs are known."""
        _, found = self.find([key for pair in pairs for key in pair.response_keys])
        known = iter(found.tolist())
        return [all(list(islice(known, len(pair.response_keys)))) for pair in pairs]

    def missing(self, pairs: Sequence[TokenizedPair]) -> list[TokenizedPair]:
        """Those pairs that lack a log-prob, each once."""
        lacking = {pair.response_keys: pair for pair, known in zip(pairs, self.has(pairs), strict=True) if not known}
        return list(lacking.values())

    def add(self, keys: Sequence[bytes], logps: Sequence[float]) -> None:
        """Keep the log-probs of responses that have none yet, in memory and at the end of the file. Collective."""
        _, found = self.find(keys)
        new = {key: logp for key, logp, known in zip(keys, logps, found.tolist(), strict=True) if not known}
        self._recent |= new
        if self.path is not None and self.trouble is None and self._engine.rank == 0:
            self._append(self.path, make_records(list(new), list(new.values())).tobytes())
        if self._engine.agree(int(len(self._recent) > self._room)):
            self._share(self._merge)

    def _append(self, path: Path, data: bytes) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with opened_in_place(path) as descriptor:  # another run may be writing: then we wait
                end = os.fstat(descriptor).st_size
                if end % RECORD.itemsize:  # a writer was killed in the middle of a record
                    os.ftruncate(descriptor, end - end % RECORD.itemsize)
                append_whole(descriptor, data)
        except StorageError as error:
            self.trouble = f"{error}; its values stay in memory"
        except OSError as error:
            self.trouble = f"{path}: cannot be written ({error.strerror}); its log-probs stay in memory"

    def _merge(self, tail: Records | None = None) -> None:
        """Sort what is unsorted: into the file, or in memory where it cannot be written. Known values do not change.

        `tail` is that of the file where it has not been read yet.
        """
        recent = make_records(list(self._recent), list(self._recent.values()))
        ours = [self._sorted.records, recent]  # before others': a value that this process has used must not change
        self._damaged += len(self._sorted.damaged)
        try:
            if self.path is None or self.trouble is not None:
                raise OSError
            with opened_in_place(self.path) as descriptor, tempfile.TemporaryFile(dir=self.path.parent) as scratch:
                sweep_unfinished(self.path)
                there = _Content.of_open(descriptor)
                if there.sorted.name != self._sorted.name:
                    ours.append(there.sorted.records)
                blocks = merged([*ours, *sorted_runs(blocks_of(there.tail), scratch)], self._sorted.release)
                self._sorted = write_sorted(self.path, blocks, shared=True)
        except (OSError, StorageError, DataError):
            self._sorted = in_memory(merged([*ours[:2], *([] if tail is None else [tail])]))
        self._recent = {}

    def adopt(self, path: Path) -> bool:
        """Take over the log-probs of another file; returns whether it was read without damage and holds any.

        They go before those known so far. Collective.
        """
        found = no_records()

        def read() -> bool:
            nonlocal found
            try:
                content = _Content.of(path)
            except OSError:
                return False
            whole = content.sorted.is_whole() and not content.damaged
            found = content.sorted
            if len(content.tail):  # of an earlier version, or without its header
                found = in_memory(merged([found.records, content.tail]))
            if not whole:
                found.covers = NOTHING
            return whole and len(found) > 0

        sound = self._engine.same(read)
        self._adopted.insert(0, self._on_every_rank(found, path))
        touch(path)
        return sound

    def covers(self, name: bytes) -> bool:
        """Whether an undamaged file was adopted that holds every response of the set of that name."""
        return any(part.covers == name for part in self._adopted)

    def list_path(self, name: bytes) -> Path | None:
        """Where the cache keeps a copy for the set of responses of that name: a run with it looks none of them up."""
        return self.path.with_name(f"{self.path.stem}-{name.hex()}.logps") if self.path is not None else None

    def write(self, path: Path, batches: "Batches", covers: bytes, poll: Callable[[], None] = lambda: None) -> None:
        """Write the log-probs of pairs, all of which are known, to a file of their own; StorageError where it fails."""
        try:
            with tempfile.TemporaryFile(dir=path.parent) as scratch:
                write_sorted(path, merged(sorted_runs(self._records(batches, poll), scratch)), covers)
        except OSError as error:
            raise StorageError(f"{safe_text(path)}: cannot be written ({error.strerror})") from None

    def _records(self, batches: "Batches", poll: Callable[[], None]) -> Iterator[Records]:
        """The records of pairs, in blocks."""
        keys: list[bytes] = []
        for batch in batches:
            poll()
            keys += [key for pair in batch for key in pair.response_keys]
            if len(keys) > BLOCK // 4:
                yield make_records(keys, self.logps(keys))
                keys = []
        yield make_records(keys, self.logps(keys))

    def copy(self, source: Path, target: Path) -> None:
        """Put a file that `write` has made at a second place, too; StorageError where that fails."""
        try:
            link_or_copy(source, target)
        except OSError as error:
            raise StorageError(f"{safe_text(target)}: cannot be written ({error.strerror})") from None

    def forget(self) -> None:
        """Drop every log-prob, on disk too: they are another model's. Collective."""
        self._adopted, self._sorted, self._recent = [], no_records(), {}
        if self.path is not None and self._engine.rank == 0:
            try:
                for file in (self.path, *self.path.parent.glob(f"{self.path.stem}-*.logps")):
                    file.unlink(missing_ok=True)
            except OSError as error:
                self.trouble = f"{self.path}: cannot be removed ({error.strerror}); its log-probs stay in memory"

    def logps(self, keys: Sequence[bytes]) -> list[float]:
        """The log-probs of responses that are known; StorageError where one was damaged meanwhile."""
        values, found = self.find(keys)
        if not found.all():
            raise StorageError(
                f"{safe_text(self.path or 'reference log-probs')}: {plural(int((~found).sum()), 'record')} missing or "
                "damaged since the run began; start it again with resume=auto, and they are computed again"
            )
        return [float(value) for value in values]


@dataclass(frozen=True)
class _Content:
    """What is in a file of log-probs."""

    sorted: SortedRecords
    tail: Records
    damaged: int  # of the tail
    is_cut: bool  # its header speaks of sorted records that are not all there

    @classmethod
    def of(cls, path: Path) -> "_Content":
        """Of the file at `path`, empty where there is none; OSError where it cannot be read."""
        try:
            with path.open("rb") as file:
                return cls.of_open(file.fileno())
        except FileNotFoundError:
            return cls(no_records(), np.zeros(0, dtype=RECORD), 0, False)

    @classmethod
    def of_open(cls, descriptor: int) -> "_Content":
        """Of an open file."""
        found = map_sorted(descriptor)
        all_behind, torn = tail_of(descriptor, found)
        tail = without_header(all_behind)
        damaged = sum(int((~undamaged(block)).sum()) for block in blocks_of(tail))
        return cls(found, tail, damaged + torn, len(tail) < len(all_behind))


class CachedReference:
    """A reference whose log-probs are all known: no model is needed."""

    def __init__(self, cache: ReferenceCache) -> None:
        self.cache = cache

    def logps(self, micro_batch: MicroBatch) -> Tensor:
        """log pi_ref(response | prompt), (M,) float32, in nats."""
        device = micro_batch.tokens.device
        values = torch.tensor(self.cache.logps(micro_batch.response_keys))
        if device.type == "cuda":
            values = values.pin_memory()
        return values.to(device, non_blocking=True)
