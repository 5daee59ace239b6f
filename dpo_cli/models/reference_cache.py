"""Reference log-probs on disk: a record a response, computed once for all runs, sweeps and evaluations.

The reference never moves, so neither do its log-probs. They are filed by content: a file for the weights, the dtype
and the layout they were computed in, in it a record for the tokens of each prompt and response. What else a run chooses
(learning rate, beta, loss, seed) is no part of the key. A template, a tokenizer or a length limit acts through the
tokens.

A file only grows. Each record carries a checksum, so that a torn or damaged one is computed again and never used;
writers take turns by a lock. Values are also compared with the loaded model when a run begins (`complete`).
"""

import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpo_cli.console.reporter import Reporter
from dpo_cli.console.text import plural
from dpo_cli.data.batches import Layout
from dpo_cli.data.tokens import TokenizedPair
from dpo_cli.engine.engine import SINGLE, Engine
from dpo_cli.errors import StorageError
from dpo_cli.models.logps import TOLERANCES, MicroBatch, MicroBatcher
from dpo_cli.models.memory import each_micro_batch
from dpo_cli.models.reference import Reference
from dpo_cli.paths import cache_dir
from dpo_cli.storage.hashing import fingerprint
from dpo_cli.storage.line_log import append_whole
from dpo_cli.storage.locks import opened_alone

RECORD = np.dtype([("key", "<u8", 2), ("logp", "<f4"), ("check", "<u4")])  # 24 bytes
VERSION = 2  # of the records and of what log-probs mean; another number is another file
SPOT_CHECKS = 3  # cached pairs that are compared with the loaded model when a run begins


def cache_path(key: str) -> Path:
    """Where the log-probs of a reference lie: `reference/<key>.logps` in the cache folder."""
    return cache_dir() / "reference" / f"{key}.logps"


def cache_key(model: str, dtype: torch.dtype, device: torch.device, layout: Layout, compiled: bool = False) -> str:
    """A name for what decides a log-prob besides the tokens: the model by its fingerprint, and how it is computed."""
    how = [VERSION, model, str(dtype), device.type, str(layout), *(["compiled"] if compiled else [])]
    return fingerprint(how)


class ReferenceCache:
    """The log-probs of one reference by response key; new ones are appended to the file.

    With `path` None, or where the file cannot be written, they live in memory only; `trouble` says why.
    """

    def __init__(self, path: Path | None, engine: Engine = SINGLE) -> None:
        self.path = path
        self._engine = engine  # every rank knows what rank 0 has read; rank 0 writes
        self.trouble: str | None = None
        self.damaged = 0  # records of the file that were passed over
        self._logps: dict[bytes, float] = {}
        if path is not None:
            data, self.trouble = engine.same(lambda: _content(path))
            self._read(data)

    def _read(self, data: bytes) -> None:
        whole = len(data) // RECORD.itemsize * RECORD.itemsize
        records = np.frombuffer(data[:whole], dtype=RECORD)
        sound = records[_checks(records) == records["check"]]
        self.damaged = len(records) - len(sound) + (whole < len(data))
        keys = sound["key"].tobytes()
        self._logps = {keys[16 * n : 16 * n + 16]: logp for n, logp in enumerate(sound["logp"].tolist())}

    def __len__(self) -> int:
        return len(self._logps)

    @property
    def size_text(self) -> str:
        """The file's size."""
        size = self.path.stat().st_size if self.path is not None and self.path.is_file() else 0
        return f"{size / 2**20:.1f} MB" if size >= 2**20 else f"{size / 2**10:.1f} kB"

    def missing(self, pairs: Iterable[TokenizedPair]) -> list[TokenizedPair]:
        """Those pairs that lack a log-prob, each once."""
        lacking = {pair.response_keys: pair for pair in pairs if not self._has(pair)}
        return list(lacking.values())

    def known(self, pairs: Iterable[TokenizedPair]) -> list[TokenizedPair]:
        """Those pairs whose log-probs are known."""
        return [pair for pair in pairs if self._has(pair)]

    def _has(self, pair: TokenizedPair) -> bool:
        return all(key in self._logps for key in pair.response_keys)

    def add(self, keys: Sequence[bytes], logps: Sequence[float]) -> None:
        """Keep the log-probs of responses that have none yet, in memory and at the end of the file."""
        new = {key: logp for key, logp in zip(keys, logps, strict=True) if key not in self._logps}
        self._logps |= new
        if self.path is not None and self.trouble is None and self._engine.rank == 0:
            self._append(self.path, _records(new))

    def _append(self, path: Path, data: bytes) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with opened_alone(path) as descriptor:  # another run may be writing: then we wait
                end = os.fstat(descriptor).st_size
                if end % RECORD.itemsize:  # a writer was killed in the middle of a record
                    os.ftruncate(descriptor, end - end % RECORD.itemsize)
                append_whole(descriptor, data)
        except StorageError as error:
            self.trouble = f"{error}; its values stay in memory"
        except OSError as error:
            self.trouble = f"{path}: cannot be written ({error.strerror}); its log-probs stay in memory"

    def adopt(self, path: Path) -> bool:
        """Take over the log-probs of another file; returns whether it was read without damage and holds any."""
        other = ReferenceCache(path, self._engine)
        self._logps |= other._logps
        return other.trouble is None and not other.damaged and len(other) > 0

    def records(self, pairs: Iterable[TokenizedPair]) -> bytes:
        """The log-probs of pairs that are known, as a file holds them."""
        return _records({key: self._logps[key] for pair in pairs for key in pair.response_keys})

    def forget(self) -> None:
        """Drop every log-prob, on disk too: they are another model's."""
        self._logps.clear()
        if self.path is not None and self._engine.rank == 0:
            try:
                self.path.unlink(missing_ok=True)
            except OSError as error:
                self.trouble = f"{self.path}: cannot be removed ({error.strerror}); its log-probs stay in memory"

    def logps(self, keys: Sequence[bytes]) -> list[float]:
        """The log-probs of responses that are known."""
        return [self._logps[key] for key in keys]


def _content(path: Path) -> tuple[bytes, str | None]:
    """What is in a file, and why it cannot be read."""
    try:
        return path.read_bytes(), None
    except FileNotFoundError:
        return b"", None
    except OSError as error:
        return b"", f"{path}: cannot be read ({error.strerror}); its log-probs stay in memory"


def _records(logps: dict[bytes, float]) -> bytes:
    records = np.zeros(len(logps), dtype=RECORD)
    records["key"] = np.frombuffer(b"".join(logps), dtype="<u8").reshape(-1, 2)
    records["logp"] = list(logps.values())
    records["check"] = _checks(records)
    return records.tobytes()


def _checks(records: "NDArray[Any]") -> "NDArray[np.uint32]":
    """A checksum of key and value of each record, (N,): not against malice, but against torn and flipped bytes."""
    logps = np.ascontiguousarray(records["logp"]).view("<u4").astype(np.uint64)
    check = np.full(len(records), 0x9E3779B97F4A7C15, dtype=np.uint64)
    for word in (records["key"][:, 0], records["key"][:, 1], logps):  # a round of splitmix64 each; uint64 wraps around
        check ^= word
        check = (check ^ (check >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        check = (check ^ (check >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        check ^= check >> np.uint64(31)
    return check.astype(np.uint32)


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


def complete(cache: ReferenceCache, needed: Sequence[Sequence[TokenizedPair]], how: FillOptions) -> int:
    """Compute the log-probs that the cache lacks of the needed pairs; returns of how many pairs.

    `needed` holds the pairs in the batches in which the policy will see them: in bfloat16 a log-prob is rounded
    differently beside other pairs, and beside the same pairs the policy's start is its reference to the last bit.
    Where `how.loaded` is given, a few cached log-probs are compared with it; if they are another model's, all are
    dropped.
    """
    reporter = how.reporter
    if cache.damaged:
        reporter.warn(f"{cache.path}: {plural(cache.damaged, 'record')} torn or damaged, computed again")
    everything = [pair for batch in needed for pair in batch]
    known = cache.known(everything)
    if how.loaded is not None and known:
        some = random.Random(len(known)).sample(known, min(SPOT_CHECKS, len(known)))  # the same on every rank
        wrong = _disagreement(cache, some, how.loaded, how)
        if wrong is not None:
            reporter.warn(f"{cache.path}: {wrong}; its log-probs are dropped and computed again")
            cache.forget()
    lacking = len(cache.missing(everything))
    if lacking:
        reporter.start("reference", lacking)
        _fill(cache, needed, how)
        reporter.stop()
    if cache.trouble:
        reporter.warn(cache.trouble)
    return lacking


def _fill(cache: ReferenceCache, needed: Sequence[Sequence[TokenizedPair]], how: FillOptions) -> None:
    reference = how.load()

    def compute(micro_batch: MicroBatch) -> dict[bytes, float]:
        if how.engine.alone:
            how.poll()
        if not cache.missing(micro_batch.examples):
            return {}
        return dict(zip(micro_batch.response_keys, reference.logps(micro_batch).tolist(), strict=True))

    for batch in needed:
        how.poll()
        missing = cache.missing(batch)
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
        how.reporter.advance(len(missing))


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
