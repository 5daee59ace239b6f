"""Reference log-probs on disk: a value a response, computed once for all runs, sweeps and evaluations.

The reference never moves, so neither do its log-probs. They are filed by content: a file for the weights, the dtype
and the way they were computed, in it a record for the tokens of each pair. What else a run chooses (learning rate,
beta, loss, seed) is no part of the key. A template, a tokenizer or a length limit acts through the tokens.

A file only grows. Each record carries a checksum, so that a torn or damaged one is computed again and never used;
writers take turns by a lock. Values are also checked against the model at hand when a run begins (`complete`).
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

from dpo_cli.console.reporter import Reporter
from dpo_cli.console.text import plural
from dpo_cli.data.batches import Way
from dpo_cli.data.tokens import TokenizedPair
from dpo_cli.errors import StorageError
from dpo_cli.models.logps import TOLERANCES, Batch, Batching
from dpo_cli.models.memory import in_passes
from dpo_cli.models.reference import Reference
from dpo_cli.paths import cache_dir
from dpo_cli.storage.hashing import fingerprint
from dpo_cli.storage.line_log import append_whole
from dpo_cli.storage.locks import opened_alone
from dpo_cli.theory.losses import PairLogps

RECORD = np.dtype([("key", "<u8", 2), ("logps", "<f4", 2), ("check", "<u8")])  # 32 bytes: key, chosen and rejected
VERSION = 1  # of the records and of what log-probs mean; another number is another file
SPOT_CHECKS = 3  # cached pairs that are compared with the model at hand when a run begins


def cache_path(key: str) -> Path:
    """Where the values of a reference lie: `reference/<key>.logps` in the cache folder."""
    return cache_dir() / "reference" / f"{key}.logps"


def values_key(digest: str, dtype: torch.dtype, device: torch.device, way: Way, compiled: bool = False) -> str:
    """A name for what decides a log-prob besides the tokens: the model by its digest, and how it is computed."""
    how = [VERSION, digest, str(dtype), device.type, str(way), *(["compiled"] if compiled else [])]
    return fingerprint(how)


class ReferenceCache:
    """The values of one reference: known ones by the tokens of a pair, new ones appended to the file.

    With `path` None, or where the file cannot be written, values live in memory only; `trouble` says why.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.trouble: str | None = None
        self.damaged = 0  # records of the file that were passed over
        self._values: dict[bytes, tuple[float, float]] = {}
        if path is not None:
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            self.trouble = f"{path}: cannot be read ({error.strerror}); its values stay in memory"
            return
        whole = len(data) // RECORD.itemsize * RECORD.itemsize
        records = np.frombuffer(data[:whole], dtype=RECORD)
        sound = records[_checks(records) == records["check"]]
        self.damaged = len(records) - len(sound) + (whole < len(data))
        keys = sound["key"].tobytes()
        self._values = {keys[16 * n : 16 * n + 16]: pair for n, pair in enumerate(map(tuple, sound["logps"].tolist()))}

    def __len__(self) -> int:
        return len(self._values)

    @property
    def size_in_words(self) -> str:
        """The file's size."""
        size = self.path.stat().st_size if self.path is not None and self.path.is_file() else 0
        return f"{size / 2**20:.1f} MB" if size >= 2**20 else f"{size / 2**10:.1f} kB"

    def missing(self, pairs: Iterable[TokenizedPair]) -> list[TokenizedPair]:
        """Those pairs that have no value yet, each once."""
        lacking = {pair.token_key: pair for pair in pairs}
        return [pair for key, pair in lacking.items() if key not in self._values]

    def known(self, pairs: Iterable[TokenizedPair]) -> list[TokenizedPair]:
        """Those pairs that have a value."""
        return [pair for pair in pairs if pair.token_key in self._values]

    def add(self, pairs: Sequence[TokenizedPair], logps: Sequence[tuple[float, float]]) -> None:
        """Keep the values of some pairs, in memory and at the end of the file."""
        self._values |= {pair.token_key: values for pair, values in zip(pairs, logps, strict=True)}
        if self.path is not None and self.trouble is None:
            self._append(self.path, self._records(pairs, logps))

    @staticmethod
    def _records(pairs: Sequence[TokenizedPair], logps: Sequence[tuple[float, float]]) -> bytes:
        records = np.zeros(len(pairs), dtype=RECORD)
        for number, (pair, values) in enumerate(zip(pairs, logps, strict=True)):
            records[number]["key"] = np.frombuffer(pair.token_key, dtype="<u8")
            records[number]["logps"] = values
        records["check"] = _checks(records)
        return records.tobytes()

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
            self.trouble = f"{path}: cannot be written ({error.strerror}); its values stay in memory"

    def adopt(self, path: Path) -> bool:
        """Take values from another file, before one's own; whether there was one that could be read whole."""
        other = ReferenceCache(path)
        self._values |= other._values
        return other.trouble is None and not other.damaged and len(other) > 0

    def records(self, pairs: Iterable[TokenizedPair]) -> bytes:
        """The values of some pairs that are known, as a file of such values holds them."""
        distinct = list({pair.token_key: pair for pair in pairs}.values())
        return self._records(distinct, [self._values[pair.token_key] for pair in distinct])

    def forget(self) -> None:
        """Drop every value, on disk too: they are not this model's."""
        self._values.clear()
        if self.path is not None:
            try:
                self.path.unlink(missing_ok=True)
            except OSError as error:
                self.trouble = f"{self.path}: cannot be removed ({error.strerror}); its values stay in memory"

    def logps(self, pairs: Sequence[TokenizedPair]) -> tuple[list[float], list[float]]:
        """The values of pairs that are known: chosen, rejected."""
        values = [self._values[pair.token_key] for pair in pairs]
        return [chosen for chosen, _ in values], [rejected for _, rejected in values]


def _checks(records: "NDArray[Any]") -> "NDArray[np.uint64]":
    """A checksum of key and values of each record, (N,): not against malice, but against torn and flipped bytes."""
    words = np.column_stack([records["key"], np.ascontiguousarray(records["logps"]).view("<u8")])
    check = np.full(len(words), 0x9E3779B97F4A7C15, dtype=np.uint64)
    for column in range(words.shape[1]):  # a round of splitmix64 a word; uint64 wraps around by design
        check ^= words[:, column]
        check = (check ^ (check >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        check = (check ^ (check >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        check ^= check >> np.uint64(31)
    return check


class CachedReference:
    """A reference whose log-probs are all known: no model is asked."""

    def __init__(self, cache: ReferenceCache) -> None:
        self.cache = cache

    def logps(self, batch: Batch) -> PairLogps:
        """log pi_ref(response | prompt) of each pair, (B,) float32, in nats."""
        device = batch.tokens.device
        values = torch.tensor(self.cache.logps(batch.pairs))
        if device.type == "cuda":
            values = values.pin_memory()
        chosen, rejected = values.to(device, non_blocking=True)
        return PairLogps(chosen, rejected, batch.tokens[batch.chosen], batch.tokens[batch.rejected])


@dataclass(frozen=True)
class Progress:
    """Whom to tell how a reference pass is going."""

    begin: Callable[[int], None] = lambda _: None  # hears how many pairs there are
    advance: Callable[[int], None] = lambda _: None
    warn: Callable[[str], None] = lambda _: None
    poll: Callable[[], None] = lambda: None


def complete(
    cache: ReferenceCache,
    needed: Sequence[Sequence[TokenizedPair]],
    batching: Batching,
    dtype: torch.dtype,
    load: Callable[[], Reference],
    at_hand: Reference | None,
    progress: Progress,
) -> int:
    """See that the cache holds every needed pair; returns how many had to be computed.

    `needed` holds the pairs in the batches in which the policy will see them: in bfloat16 a log-prob is rounded
    differently in other company, and in the same company the policy's start is its reference to the last bit.
    `at_hand` knows the reference's log-probs without loading it: a few values are compared with it, and where they
    are another model's all are dropped. `load` brings the reference itself, only where a value is missing.
    """
    everything = [pair for together in needed for pair in together]
    lacking = cache.missing(everything)
    known = cache.known(everything)
    if at_hand is not None and known:
        some = random.sample(known, min(SPOT_CHECKS, len(known)))
        wrong = _disagreement(cache, some, at_hand, batching, dtype)
        if wrong is not None:
            progress.warn(f"{cache.path}: {wrong}; its values are dropped and computed anew")
            cache.forget()
            lacking = cache.missing(everything)
    if lacking:
        progress.begin(len(lacking))
        _fill(cache, needed, load(), batching, progress)
    return len(lacking)


def _fill(
    cache: ReferenceCache,
    needed: Sequence[Sequence[TokenizedPair]],
    reference: Reference,
    batching: Batching,
    progress: Progress,
) -> None:
    def compute(batch: Batch) -> list[TokenizedPair]:
        progress.poll()
        lacking = cache.missing(batch.pairs)
        if lacking:
            logps = reference.logps(batch)
            values = zip(logps.chosen.tolist(), logps.rejected.tolist(), strict=True)
            found = {pair.token_key: both for pair, both in zip(batch.pairs, values, strict=True)}
            cache.add(lacking, [found[pair.token_key] for pair in lacking])
        return lacking

    for together in needed:
        if not cache.missing(together):
            continue
        # The whole company is asked, also where only some of it lacks a value (a pass that was cut off, say): in other
        # company a log-prob is rounded differently, and a run that begins again must begin with the same bits.
        for done in in_passes(batching, together, compute):
            progress.advance(len(done))


def _disagreement(
    cache: ReferenceCache, pairs: list[TokenizedPair], at_hand: Reference, batching: Batching, dtype: torch.dtype
) -> str | None:
    """In words, where cached log-probs are not those of the model at hand; None where they are."""
    known = CachedReference(cache)
    for batch in batching.batches(pairs):
        cached, now = known.logps(batch), at_hand.logps(batch)
        for place, pair in enumerate(batch.pairs):
            off = max(
                abs(float(cached.chosen[place] - now.chosen[place])),
                abs(float(cached.rejected[place] - now.rejected[place])),
            )
            if not off <= TOLERANCES[dtype].of(max(len(pair.chosen), len(pair.rejected))):
                return f"row {pair.index} is off this model's log-prob by {off:.2g} nats"
    return None


def complete_cache(
    cache: ReferenceCache,
    needed: list[list[TokenizedPair]],
    batching: Batching,
    dtype: torch.dtype,
    load: Callable[[], Reference],
    at_hand: Reference | None,
    reporter: Reporter,
    poll: Callable[[], None],
) -> int:
    """`complete` with its progress on the console; what is wrong with the file is said. Returns the pairs computed."""
    if cache.damaged:
        reporter.warn(f"{cache.path}: {plural(cache.damaged, 'record')} torn or damaged, computed anew")
    progress = Progress(lambda pairs: reporter.start("reference", pairs), reporter.advance, reporter.warn, poll)
    computed = complete(cache, needed, batching, dtype, load, at_hand, progress)
    if computed:
        reporter.stop()
    if cache.trouble:
        reporter.warn(cache.trouble)
    return computed
