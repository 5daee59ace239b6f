"""Reference log-probs on disk: a record a response, computed once for all runs, sweeps and evaluations.

The reference never moves, so neither do its log-probs. They are filed by content: a file for the weights, the dtype
and the layout they were computed in, in it a record for the tokens of each prompt and response. What else a run chooses
(learning rate, beta, loss, seed) is no part of the key. A template, a tokenizer or a length limit acts through the
tokens.

A file is sorted and mapped (storage/logps_file.py); new records are appended, and merged into the sorted part when they
are many. So memory holds the new ones and what the system maps. Each record carries a checksum: a torn or damaged one
is computed again and never used. Writers take turns by a lock. Values are also compared with the loaded model when a
run begins (`complete`).
"""

import os
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpo_cli.console.reporter import Reporter
from dpo_cli.console.text import plural, safe_text
from dpo_cli.data.batches import Layout
from dpo_cli.data.tokens import TokenizedPair
from dpo_cli.engine.engine import SINGLE, Engine
from dpo_cli.errors import DataError, StorageError
from dpo_cli.models.logps import TOLERANCES, MicroBatch, MicroBatcher
from dpo_cli.models.memory import each_micro_batch
from dpo_cli.models.reference import Reference
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
SPOT_CHECKS = 3  # cached pairs that are compared with the loaded model when a run begins
UNSORTED = 2**16  # records behind the sorted part, at least, before they are merged into it
LARGE = 2**16  # pairs that are gone through in a second; for more the cache keeps a list of what a run needs
BATCHES_IN_A_MOMENT = 2000  # batches that are looked up without a progress bar


def cache_path(key: str) -> Path:
    """Where the log-probs of a reference lie: `reference/<key>.logps` in the cache folder."""
    return cache_folder("reference") / f"{key}.logps"


def cache_key(model: str, dtype: torch.dtype, device: torch.device, layout: Layout, compiled: bool = False) -> str:
    """A name for what decides a log-prob besides the tokens: the model by its fingerprint, and how it is computed."""
    how = [VERSION, model, str(dtype), device.type, str(layout), *(["compiled"] if compiled else [])]
    return fingerprint(how)


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
        """Records that were passed over so far."""
        return self._damaged + sum(len(part.damaged) for part in self._parts)

    @property
    def size_text(self) -> str:
        """The file's size."""
        size = self.path.stat().st_size if self.path is not None and self.path.is_file() else 0
        return f"{size / 2**20:.1f} MB" if size >= 2**20 else f"{size / 2**10:.1f} kB"

    def find(self, keys: Sequence[bytes]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """The values of responses and which are known, both (N,)."""
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
        """Sort what is unsorted: into the file, or in memory where it cannot be written. What is known stays as it is.

        `tail` is that of the file where it has not been read.
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
        """Where a copy of the log-probs of a set of responses lies, which spares going through them."""
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
        """Have a file that `write` has made at another place too; StorageError where that fails."""
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


@dataclass(frozen=True)
class FillOptions:
    """How the log-probs that a cache lacks are computed."""

    batcher: MicroBatcher
    dtype: torch.dtype
    load: Callable[[], Reference]  # brings the reference itself, only where a log-prob is missing
    loaded: Reference | None  # knows the reference's log-probs without loading it
    reporter: Reporter
    poll: Callable[[], None]
    engine: Engine = SINGLE


class Batches(Protocol):
    """Batches that can be gone through more than once; they may be made anew each time."""

    def __len__(self) -> int:
        """How many batches."""
        ...

    def __iter__(self) -> Iterator[Sequence[TokenizedPair]]:
        """The pairs of each."""
        ...


@dataclass(frozen=True)
class Survey:
    """What a cache knows of the pairs that are needed: exact up to `LARGE`, beyond it pairs that repeat count again."""

    pairs: int
    lacking: int  # pairs without a log-prob
    some: list[TokenizedPair] = field(default_factory=list)  # known pairs, `SPOT_CHECKS` at most, from everywhere


def survey(
    cache: ReferenceCache, needed: Batches, poll: Callable[[], None], advance: Callable[[int], None] = lambda _: None
) -> Survey:
    """Look every pair up; `advance` hears of each batch."""
    pairs, lacking, some = 0, 0, list[TokenizedPair]()
    seen: set[tuple[bytes, ...]] = set()
    random_numbers = random.Random(0)  # the same on every rank
    for batch in needed:
        poll()
        for pair, known in zip(batch, cache.has(batch), strict=True):
            if pair.response_keys in seen:
                continue
            if len(seen) < LARGE:
                seen.add(pair.response_keys)
            pairs, lacking = pairs + 1, lacking + (not known)
            if not known:
                continue
            place = random_numbers.randrange(pairs - lacking)  # so that each known pair is as likely to be among some
            if len(some) < SPOT_CHECKS:
                some.append(pair)
            elif place < SPOT_CHECKS:
                some[place] = pair
        advance(1)
    return Survey(pairs, lacking, some)


def complete(cache: ReferenceCache, needed: Batches, how: FillOptions, covered: bool = False) -> int:
    """Compute the log-probs that the cache lacks of the needed pairs; returns of how many pairs.

    `needed` holds the pairs in the batches in which the policy will see them: in bfloat16 a log-prob is rounded
    differently beside other pairs, and beside the same pairs the policy's start is its reference to the last bit.
    Where `how.loaded` is given, a few cached log-probs are compared with it; if they are another model's, all are
    dropped. `covered`: it is known that nothing is missing, so the pairs are not gone through.
    """
    reporter = how.reporter
    found = Survey(0, 0, list(islice(next(iter(needed)), SPOT_CHECKS))) if covered else _surveyed(cache, needed, how)
    if cache.damaged:
        reporter.warn(f"{cache.path}: {plural(cache.damaged, 'record')} torn or damaged, computed again")
    if how.loaded is not None and found.some:
        wrong = _disagreement(cache, found.some, how.loaded, how)
        if wrong is not None:
            reporter.warn(f"{cache.path}: {wrong}; its log-probs are dropped and computed again")
            cache.forget()
            found = _surveyed(cache, needed, how)
    computed = 0
    if lacking := how.engine.agree(found.lacking):
        reporter.start("reference", lacking)
        computed = _fill(cache, needed, how)
        reporter.stop()
    if cache.trouble:
        reporter.warn(cache.trouble)
    return computed


def _surveyed(cache: ReferenceCache, needed: Batches, how: FillOptions) -> Survey:
    if len(needed) <= BATCHES_IN_A_MOMENT:
        return survey(cache, needed, how.poll)
    how.reporter.start("batch looked up", len(needed))
    found = survey(cache, needed, how.poll, how.reporter.advance)
    how.reporter.stop()
    return found


def _fill(cache: ReferenceCache, needed: Batches, how: FillOptions) -> int:
    reference = how.load()
    computed = 0

    def compute(micro_batch: MicroBatch) -> dict[bytes, float]:
        if how.engine.alone:
            how.poll()
        if not cache.missing(micro_batch.examples):
            return dict(zip(micro_batch.response_keys, cache.logps(micro_batch.response_keys), strict=True))
        return dict(zip(micro_batch.response_keys, reference.logps(micro_batch).tolist(), strict=True))

    for batch in needed:
        how.poll()
        missing = how.engine.agree(len(cache.missing(batch)))  # ranks whose disks differ must not part ways
        if not missing:
            continue
        # The whole batch is computed, also where only some of it is missing (after an interruption, say): beside other
        # pairs a log-prob is rounded differently, and a run that starts again must start with the same bits.
        mine = how.engine.share(batch)
        owners: dict[bytes, int] = {}
        for index, pair in enumerate(batch):
            for key in pair.response_keys:
                owners.setdefault(key, index)
        column = {key: number for number, key in enumerate(owners)}
        table = torch.zeros(len(owners))
        for logps in each_micro_batch(how.batcher, [batch[index] for index in mine], compute):
            for key, logp in logps.items():
                if owners[key] in mine:
                    table[column[key]] = logp
        cache.add(list(owners), how.engine.sum(table).tolist())
        computed += missing
        how.reporter.advance(missing)
    return computed


def _disagreement(cache: ReferenceCache, pairs: list[TokenizedPair], loaded: Reference, how: FillOptions) -> str | None:
    """In words, where cached log-probs are not those of the loaded model; None where they are."""
    known = CachedReference(cache)
    for micro_batch in how.batcher.micro_batches(pairs):
        off = (known.logps(micro_batch) - loaded.logps(micro_batch)).abs()
        allowed = [TOLERANCES[how.dtype].of(tokens) for tokens in micro_batch.tokens.tolist()]
        worst = max(range(len(allowed)), key=lambda response: float(off[response]) / allowed[response])
        if not float(off[worst]) <= allowed[worst]:
            rows = [example.index for example in micro_batch.examples
                    if micro_batch.response_keys[worst] in example.response_keys]  # fmt: skip
            return f"row {rows[0]} is off this model's log-prob by {float(off[worst]):.2g} nats"
    return None
