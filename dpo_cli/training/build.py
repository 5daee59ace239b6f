"""What a run is put together from: the model, the data, the objective, the reference, and how batches are split."""

import hashlib
import math
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dpo_cli.config.schema import RunConfig
from dpo_cli.console.reporter import Reporter
from dpo_cli.console.text import duration, plural, safe_text, significant
from dpo_cli.data.batches import Layout, Schedule, Split, SplitByPairs, SplitByTokens, longest_side
from dpo_cli.data.pairs import load_pairs
from dpo_cli.data.splits import data_fingerprint
from dpo_cli.data.store import StoredPairs
from dpo_cli.data.tokens import PairEncoder, TokenizedPair
from dpo_cli.errors import CheckpointError, StorageError
from dpo_cli.evaluation.scores import WINDOW, windows
from dpo_cli.models.dtype import Decision, choose_device, choose_dtype
from dpo_cli.models.loading import (
    ModelSource,
    check_positions,
    compile_layers,
    find_model,
    load_model,
    load_tokenizer,
    model_fingerprint,
    same_weights,
    undisturbed,
)
from dpo_cli.models.logps import MicroBatcher, causal_model
from dpo_cli.models.memory import Budget, give_memory_back, measure_budget, plan_memory
from dpo_cli.models.packing import remembered_layout
from dpo_cli.models.precompute import LARGE, FillOptions, complete, survey
from dpo_cli.models.reference import AdapterOffReference, FrozenReference, NoReference, Reference, UnmovedPolicy
from dpo_cli.models.reference_cache import CachedReference, ReferenceCache, cache_key, cache_path
from dpo_cli.objectives.objective import Objective
from dpo_cli.objectives.table import make_objective
from dpo_cli.paths import user_path
from dpo_cli.runs.checkpoint import ResolvedSettings, TrainingState
from dpo_cli.runs.run_directory import RunDirectory
from dpo_cli.storage.cache_folder import cache_folder, folder_files, shrink
from dpo_cli.storage.hashing import fingerprint as fingerprint_of
from dpo_cli.theory.schedules import lr_factor
from dpo_cli.training.guard import NonFiniteGuard
from dpo_cli.training.monitor import Monitor
from dpo_cli.training.optimizers import OPTIMIZERS
from dpo_cli.training.parts import Choices, Context, Learner, Material
from dpo_cli.training.preflight import check_distinct, choose_pairs

SOME = 256  # pairs that a layout and the size of micro-batches are tried on


def build(
    context: Context, state: TrainingState | None, settings: ResolvedSettings | None
) -> tuple[Learner, Material, Choices]:
    """Load and build every part of a run.

    `state` is that of the checkpoint that it resumes from. `settings` are what was measured when the run began: they
    hold to its end, and for its replay where the device is of the same kind.
    """
    config, reporter, engine = context.config, context.reporter, context.engine
    device = choose_device(config.device)
    measured = settings if settings is not None and settings.device == device.value.type else None
    dtype = engine.same(lambda: _dtype(config, device.value, settings if state is not None else measured))
    source = find_model(config.model, reporter.say)
    reporter.doing(f"loading the tokenizer of {safe_text(source.name)}")
    objective = make_objective(config)
    material = _material(context, source, objective.always_closes)
    for _, report in material.data.reports():
        objective.check_soft_labels(report.soft_label_at)
    if state is not None and state.data_fingerprint != material.data.train.fingerprint:
        raise CheckpointError(
            f"resume={safe_text(config.resume)}: was trained on other data than "
            f"data.train={safe_text(config.data.describe_train())} gives now"
        )
    memory = plan_memory(source.path, dtype.value, device.value, _loads_second_model(config, objective))
    torch.manual_seed(config.seed)
    download = "" if Path(source.path).is_dir() else ", which is downloaded if it is not in the hub's cache"
    reporter.doing(f"loading the model in {str(dtype.value).removeprefix('torch.')}{download}")
    model = load_model(source, dtype.value, device.value)
    _check_fit(config, model, material)
    fingerprint = model_fingerprint(model)
    if state is not None and not same_weights(state.model_fingerprint, fingerprint):
        raise CheckpointError(
            f"resume={safe_text(config.resume)}: was trained on other weights than "
            f"model.name_or_path={safe_text(source.name)} holds now"
        )
    reporter.doing("choosing the layout and the size of micro-batches")
    layout = engine.same(lambda: _layout(config, model, material, device.value, fingerprint, measured))
    policy = objective.prepare(model, config.lora, source.name)
    if config.engine.gradient_checkpointing:
        policy.activation_checkpointing_enable()
    if config.engine.compile:
        compile_layers(causal_model(policy))
    policy.train()
    key = cache_key(fingerprint, dtype.value, device.value, layout.value, config.engine.compile)
    reference = _reference(context, policy, source, key) if objective.needs_reference else NoReference()
    split, split_text = _split(context, policy, material, MicroBatcher(device.value, layout.value, SplitByPairs(1)),
                               measured)  # fmt: skip
    policy = engine.shard(policy)
    options = config.optimizer
    optimizer = OPTIMIZERS[options.name](
        [parameter for parameter in policy.parameters() if parameter.requires_grad], options
    )
    learner = Learner(
        policy=policy,
        fingerprint=fingerprint,
        objective=objective,
        reference=reference,
        optimizer=optimizer,
        rate=lambda step: options.lr * lr_factor(options.schedule, step, options.warmup_steps, material.total_steps),
        guard=NonFiniteGuard.of(optimizer, device.value, config.non_finite),
        monitor=Monitor(objective, config.monitor),
        batcher=MicroBatcher(device.value, layout.value, split),
    )
    return learner, material, Choices(device, dtype, layout, split_text, memory)


def _dtype(config: RunConfig, device: torch.device, settings: ResolvedSettings | None) -> Decision:
    if settings is not None:
        return Decision(getattr(torch, settings.dtype), "as when the run began")
    return choose_dtype(config.model.dtype, device, config.lora.enabled, keep=not config.dry_run)


def _material(context: Context, source: ModelSource, always_closes: bool) -> Material:
    config = context.config
    encoder = PairEncoder.of(load_tokenizer(source), config.data, always_closes)
    context.reporter.doing(f"reading pairs from {safe_text(config.data.describe_train())}")
    data = load_pairs(config.data, encoder, config.seed, poll=context.poll, working=context.reporter.bar)
    context.reporter.stop()
    if context.engine.rank == 0:
        sides = [side for side in (data.train, data.held_out) if isinstance(side, StoredPairs)]
        stores = [folder for side in sides for folder in side.store.folders()]
        _make_room("tokens", config.data.cache_gib, "data.cache_gib", context.reporter, stores)
    schedule = Schedule(len(data.train), config.batch_size, config.seed, config.data.shuffle, data.train.rows)
    return Material(source, encoder, data, schedule, schedule.total_steps(config.epochs, config.max_steps))


def _loads_second_model(config: RunConfig, objective: Objective) -> bool:
    in_every_step = config.reference.cache == "off" or config.dry_run
    return objective.needs_reference and config.reference.name == "frozen" and in_every_step


def _check_fit(config: RunConfig, model: Any, material: Material) -> None:
    """CheckpointError or ConfigError where tokens lie outside the model's vocabulary or positions."""
    data, tokenizer = material.data, material.encoder.tokenizer
    rows = model.get_input_embeddings().num_embeddings
    largest = data.train.largest_token
    if largest >= rows:
        raise CheckpointError(
            f"token {largest} ({safe_text(tokenizer.decode([largest]))}) of the tokenizer lies outside the model's "
            f"{rows:,} embeddings: tokenizer and model do not belong together"
        )
    check_positions(model, max(map(longest_side, [*data.train.longest(1), *data.held_out])), config.data.max_length)


def _layout(
    config: RunConfig, model: Any, material: Material, device: torch.device, fingerprint: str,
    measured: ResolvedSettings | None,
) -> Decision:  # fmt: skip
    if measured is not None:
        return Decision(Layout(measured.layout), "as when the run began")
    pairs = [*material.data.train.longest(1), *material.data.train[:SOME]]
    return remembered_layout(config.layout, model, pairs, device, fingerprint, keep=not config.dry_run)


def _split(
    context: Context, policy: Any, material: Material, batcher: MicroBatcher, measured: ResolvedSettings | None
) -> tuple[Split, str]:
    """How a batch is split into micro-batches, and why so."""
    config, pairs, layout = context.config, material.data.train, batcher.layout
    if config.micro_batch_size != "auto":
        size = int(config.micro_batch_size)
        if measured is not None and measured.max_pairs is not None:
            size = min(size, measured.max_pairs)  # more did not fit in memory then
        return SplitByPairs(size), str(SplitByPairs(size))
    if measured is not None and measured.token_budget is not None:
        split = SplitByTokens(measured.token_budget, layout)
        return split, f"{split}, as when the run began"
    with undisturbed(policy):
        policy.train()
        budget = measure_budget(policy, pairs[:SOME], batcher.device, layout)
    _warn_of_long_pairs(pairs.most_tokens, budget, context.reporter)
    return SplitByTokens(context.engine.least(budget.tokens), layout), str(budget)


def _warn_of_long_pairs(longest: int, budget: Budget, reporter: Reporter) -> None:
    if longest > budget.fits:
        reporter.warn(
            f"the longest pair has {longest:,} tokens, and the memory that is free holds some {budget.fits:,}: it may "
            "not fit; engine.gradient_checkpointing=true or a smaller data.max_length need less"
        )


# The reference


def _reference(context: Context, policy: Any, source: ModelSource, key: str) -> Reference:
    """The reference: a cache of its log-probs, completed later, or a model that computes them in every step."""
    config = context.config
    if config.reference.cache != "off" and not config.dry_run:  # a dry run keeps no log-probs
        path = cache_path(key) if config.reference.cache == "auto" else None
        return CachedReference(ReferenceCache(path, context.engine))
    return load_reference(config, policy, source)


def load_reference(config: RunConfig, policy: Any, source: ModelSource) -> Reference:
    """The model that the reference's log-probs come from: the policy's own base, or the SFT model a second time."""
    if config.reference.name == "adapter_off":
        return AdapterOffReference(policy)
    weight = causal_model(policy).get_input_embeddings().weight
    model = load_model(source, weight.dtype, weight.device)
    if config.engine.compile:  # as the policy: one code path, or margins would not start at 0
        compile_layers(model)
    return FrozenReference(model)


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
        return bytes.fromhex(fingerprint_of([data.train.fingerprint, of_others, digest.hexdigest()]))


def needed_batches(material: Material) -> NeededBatches:
    """Every pair whose reference log-probs this run needs, in the batches in which they are first used."""
    return NeededBatches(material)


def describe_source(reference: Reference, material: Material) -> str:
    """Where the reference's log-probs come from."""
    if isinstance(reference, NoReference):
        return "rewards stand for themselves"
    if not isinstance(reference, CachedReference):
        return "its log-probs are computed in every step"
    cache, needed = reference.cache, needed_batches(material)
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
    cache, needed = learner.reference.cache, needed_batches(material)
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
        reference = load_reference(config, learner.policy, material.source)
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
            lambda: _make_room(
                "reference", config.reference.cache_gib, "reference.cache_gib", reporter, {cache.path, kept}
            )
        )
    give_memory_back(learner.batcher.device)


def _replayed(config: RunConfig, fingerprint: str) -> Path | None:
    """The log-probs of the run that this one replays, where it was of the same weights."""
    if config.replay is None:
        return None
    replayed = RunDirectory(user_path(config.replay, CheckpointError, "replay"))
    model = replayed.read_manifest().get("model")
    return replayed.reference if isinstance(model, dict) and model.get("fingerprint") == fingerprint else None


def _make_room(kind: str, gib: float | None, key: str, reporter: Reporter, keep: Collection[Path | None]) -> None:
    """Drop what was unused longest in a kind of cache, as far as it is above the limit that `key` sets."""
    folder = cache_folder(kind)
    if gib is None:
        return
    dropped = shrink(folder, gib * 2**30, keep)
    if dropped:
        freed = sum(entry.bytes for entry in dropped) / 2**30
        reporter.say(
            f"{folder}: dropped {plural(len(dropped), 'item')} that {'was' if len(dropped) == 1 else 'were'} unused "
            f"longest, {significant(freed)} GiB ({key}={gib:g})"
        )
    left = sum(entry.bytes for entry in folder_files(folder)) / 2**30
    if left > gib:
        reporter.warn(
            f"{folder}: this run needs {significant(left)} GiB, more than {key}={gib:g}; raise it, or "
            "another run drops them"
        )
