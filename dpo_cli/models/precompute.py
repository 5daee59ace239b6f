"""The pass over the pairs in which the reference's log-probs are computed that a cache lacks.

Where the model is loaded, some cached log-probs are compared with it: those of another model are never used.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

import torch

from dpo_cli.console.reporter import Reporter
from dpo_cli.console.text import plural
from dpo_cli.data.tokens import TokenizedPair
from dpo_cli.engine.engine import SINGLE, Engine
from dpo_cli.models.logps import TOLERANCES, MicroBatch, MicroBatcher
from dpo_cli.models.memory import each_micro_batch
from dpo_cli.models.reference import Reference
from dpo_cli.models.reference_cache import Batches, CachedReference, ReferenceCache

SPOT_CHECKS = 3  # cached pairs that are compared with the loaded model when a run begins
LARGE = 2**16  # pairs that are gone through in a second; for more the cache keeps a list of what a run needs
BATCHES_IN_A_MOMENT = 2000  # batches that are looked up without a progress bar


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
        if how.engine.agree(int(wrong is not None)):
            why = wrong or "another rank finds other values"
            reporter.warn(f"{cache.path}: {why}; its log-probs are dropped and computed again")
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
        if how.engine.retries and not cache.missing(micro_batch.examples):
            return dict(zip(micro_batch.response_keys, cache.logps(micro_batch.response_keys), strict=True))
        return dict(zip(micro_batch.response_keys, reference.logps(micro_batch).tolist(), strict=True))

    for batch in needed:
        how.poll()
        missing = how.engine.agree(len(cache.missing(batch)))  # ranks whose disks differ must not part ways
        if not missing:
            continue
        # The whole batch is computed, also where only some of it is missing (after an interruption, say): beside other
        # pairs a log-prob is rounded differently, and a run that starts again must start with the same bits.
        mine = {*how.engine.share([pair.tokens for pair in batch])}
        owners: dict[bytes, int] = {}
        for index, pair in enumerate(batch):
            for key in pair.response_keys:
                owners.setdefault(key, index)
        column = {key: number for number, key in enumerate(owners)}
        table = torch.zeros(len(owners))
        for logps in each_micro_batch(how.batcher, batch, compute, how.engine):
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
