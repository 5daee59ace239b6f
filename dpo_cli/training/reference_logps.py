"""The reference's log-probs of a run: which it needs, where they are from, and how its own directory keeps them."""

import hashlib
import math
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dpo_cli.config.schema import RunConfig
from dpo_cli.console.text import duration, plural
from dpo_cli.data.splits import data_fingerprint
from dpo_cli.data.tokens import TokenizedPair
from dpo_cli.errors import CheckpointError, StorageError
from dpo_cli.evaluation.scores import WINDOW, windows
from dpo_cli.models.memory import give_memory_back
from dpo_cli.models.precompute import LARGE, FillOptions, complete, survey
from dpo_cli.models.reference import AdapterOffReference, NoReference, Reference, UnmovedPolicy
from dpo_cli.models.reference_cache import CachedReference
from dpo_cli.paths import user_path
from dpo_cli.runs.run_directory import RunDirectory
from dpo_cli.storage.cache_folder import make_room
from dpo_cli.storage.hashing import fingerprint
from dpo_cli.training.build import load_reference
from dpo_cli.training.parts import Context, Learner, Material
from dpo_cli.training.preflight import check_distinct, choose_pairs


def trained_batches(material: Material) -> Iterator[list[TokenizedPair]]:
    """The pairs that this run trains on, in the batches of its first epoch."""
    return (material.batch(indices) for indices in material.schedule.batches(0, _steps(material)))


def _steps(material: Material) -> int:
    return min(material.total_steps, material.schedule.steps_per_epoch)


@dataclass(frozen=True)
class NeededBatches:
    """Every pair whose reference log-probs a run needs, in the batches in which they are first used.

    They are made anew each time, so that they are never in memory together.
    """

    material: Material

    @property
    def _whole_epoch(self) -> bool:
        return _steps(self.material) == self.material.schedule.steps_per_epoch

    @property
    def _checked(self) -> list[TokenizedPair]:
        """The pairs of the preflight, where the run may not train on them."""
        if self._whole_epoch:
            return []
        return choose_pairs(self.material.data.train, self.material.data.train_texts)[0]

    @property
    def pairs(self) -> int:
        """How many pairs at most."""
        trained = min(len(self.material.data.train), _steps(self.material) * self.material.schedule.batch_size)
        return trained + len(self.material.data.held_out)

    def __len__(self) -> int:
        return _steps(self.material) + math.ceil(len(self.material.data.held_out) / WINDOW) + bool(self._checked)

    def __iter__(self) -> Iterator[list[TokenizedPair]]:
        yield from trained_batches(self.material)
        yield from windows(self.material.data.held_out)
        yield from filter(None, [self._checked])

    @cached_property
    def name(self) -> bytes:
        """16 bytes that name the set of pairs, without going through the training pairs."""
        data, digest = self.material.data, hashlib.sha256()
        if not self._whole_epoch:
            for indices in self.material.schedule.batches(0, _steps(self.material)):
                digest.update(indices.tobytes())
        of_others = data_fingerprint([*data.held_out, *self._checked])
        return bytes.fromhex(fingerprint([data.train.fingerprint, of_others, digest.hexdigest()]))


def describe_source(reference: Reference, material: Material) -> str:
    """Where the reference's log-probs come from."""
    if isinstance(reference, NoReference):
        return "rewards stand for themselves"
    if not isinstance(reference, CachedReference):
        return "its log-probs are computed in every step"
    cache, needed = reference.cache, NeededBatches(material)
    if cache.path is None:
        return "its log-probs are computed once, for this run alone"
    if needed.pairs > LARGE:
        return f"log-probs of {needed.pairs:,} pairs are looked up in {cache.path} ({cache.size_text})"
    found = survey(cache, needed, lambda: None)
    there = f"the log-probs of {found.pairs - found.lacking:,} of {found.pairs:,} pairs are in {cache.path}"
    return f"{'not loaded: ' if found.lacking == 0 else ''}{there} ({cache.size_text})"


def complete_reference(context: Context, learner: Learner, material: Material, resumed: bool) -> None:
    """Compute the reference's log-probs that are not in the cache yet; what was loaded for it is freed.

    The run directory keeps the log-probs that the run started with, so that a resumed run continues with the same bits:
    another run may have written others for the same responses into the cache, equal except for rounding. From there
    they are read.
    """
    if not isinstance(learner.reference, CachedReference):
        return
    config, reporter, own = context.config, context.reporter, context.directory.reference
    cache, needed = learner.reference.cache, NeededBatches(material)
    kept = cache.list_path(needed.name) if needed.pairs > LARGE else None
    replayed = _replayed(config, learner.fingerprint) if not resumed else None
    if replayed is not None:  # same bits, same weights
        cache.adopt(replayed)
    elif resumed and not cache.adopt(own):
        reporter.warn(
            f"{own}: missing or damaged; the run continues with the log-probs of the cache, equal but for rounding"
        )
    elif kept is not None and not resumed:
        cache.adopt(kept)
    covered = cache.covers(needed.name)
    loaded: Reference | None = None
    if config.lora.enabled:
        loaded = AdapterOffReference(learner.policy)
    elif not resumed:
        loaded = UnmovedPolicy(learner.policy)

    def load() -> Reference:
        reference = load_reference(context, learner.policy, material.source, learner.batcher.device)
        check_distinct(learner.policy, reference)
        return reference

    started = time.perf_counter()
    how = FillOptions(learner.batcher, learner.dtype, load, loaded, reporter, context.poll, context.engine)
    computed = complete(cache, needed, how, covered)
    if computed:
        seconds = time.perf_counter() - started
        reporter.say(f"reference log-probs of {plural(computed, 'pair')} computed in {duration(seconds)}")
    unchanged = covered and not computed
    if not (unchanged and resumed):
        poll = context.poll if context.engine.alone else lambda: None  # what rank 0 does alone asks no other rank

        def keep() -> None:
            if unchanged and kept is not None and replayed is None:
                cache.copy(kept, own)
                return
            cache.write(own, needed, needed.name, poll)
            if kept is not None:
                with suppress(StorageError):  # the next run goes through its pairs again
                    cache.copy(own, kept)

        context.engine.same(keep)
        cache.adopt(own)
    if cache.path is not None:
        context.engine.same(
            lambda: make_room(
                "reference", config.reference.cache_gib, "reference.cache_gib", reporter, {cache.path, kept}
            )
        )
    give_memory_back(learner.batcher.device)


def _replayed(config: RunConfig, of_model: str) -> Path | None:
    """The log-probs of the run that this one replays, where it was of the same weights."""
    if config.replay is None:
        return None
    replayed = RunDirectory(user_path(config.replay, CheckpointError, "replay"))
    model = replayed.read_manifest().get("model")
    return replayed.reference if isinstance(model, dict) and model.get("fingerprint") == of_model else None
