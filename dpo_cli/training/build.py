"""What a run settles before its first step: how batches are cut, and where the reference's log-probs come from."""

import time
from typing import Any

import torch

from dpo_cli.config.schema import RunConfig
from dpo_cli.console.reporter import Reporter
from dpo_cli.console.text import duration, plural
from dpo_cli.data.batches import Cut, Way, by_size, cut_by_tokens
from dpo_cli.data.tokens import TokenizedPair
from dpo_cli.errors import CheckpointError, StorageError
from dpo_cli.evaluation.scores import windows
from dpo_cli.models.loading import ModelSource, compile_layers, load_model, undisturbed
from dpo_cli.models.memory import Budget, give_memory_back, measure_budget
from dpo_cli.models.reference import AdapterOffReference, FrozenReference, NoReference, Reference, UnmovedPolicy
from dpo_cli.models.reference_cache import (
    CachedReference,
    ReferenceCache,
    cache_path,
    complete_cache,
    values_key,
)
from dpo_cli.paths import user_path
from dpo_cli.runs.checkpoint import Settled
from dpo_cli.runs.run_directory import RunDirectory
from dpo_cli.storage.durable import write_whole
from dpo_cli.training.preflight import check_distinct, choose_pairs
from dpo_cli.training.run import Run


def choose_cut(
    config: RunConfig,
    policy: Any,
    pairs: list[TokenizedPair],
    device: torch.device,
    way: Way,
    settled: Settled | None,
    reporter: Reporter,
) -> tuple[Cut, int | None, str]:
    """How a batch is cut into forward passes, the token budget if there is one, and both in words."""
    if config.micro_batch_size != "auto":
        size = int(config.micro_batch_size)
        if settled is not None and settled.pairs_a_pass is not None and settled.device == device.type:
            size = min(size, settled.pairs_a_pass)  # it was found then that no more fit
        return by_size(size), None, f"{plural(size, 'pair')} a forward pass"
    if settled is not None and settled.token_budget is not None and settled.device == device.type:
        tokens, words = settled.token_budget, f"cut at {settled.token_budget:,} tokens, as the run began"
    else:
        with undisturbed(policy):
            policy.train()
            budget = measure_budget(policy, pairs, device, way)
        tokens, words = budget.tokens, str(budget)
        _warn_of_long_pairs(pairs, budget, reporter)
    return cut_by_tokens(tokens, way), tokens, words


def _warn_of_long_pairs(pairs: list[TokenizedPair], budget: Budget, reporter: Reporter) -> None:
    longest = max(len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs)
    if longest > budget.fits:
        reporter.warn(
            f"the longest pair has {longest:,} tokens, and the memory that is free holds some {budget.fits:,}: it may "
            "not fit; engine.gradient_checkpointing=true or a smaller data.max_length need less"
        )


def make_reference(
    config: RunConfig, policy: Any, source: ModelSource, dtype: torch.dtype, device: torch.device, way: Way, digest: str
) -> Reference:
    """The reference of a run: its values on disk, to be completed later, or a model that is asked in every step.

    A reward model has none.
    """
    if config.objective == "reward":
        return NoReference()
    if config.reference.cache != "off" and not config.dry_run:  # a dry run writes nothing
        key = values_key(digest, dtype, device, way, config.engine.compile)
        return CachedReference(ReferenceCache(cache_path(key) if config.reference.cache == "auto" else None))
    return load_reference(config, policy, source, dtype, device)


def load_reference(
    config: RunConfig, policy: Any, source: ModelSource, dtype: torch.dtype, device: torch.device
) -> Reference:
    """The model that the reference's log-probs come from: the policy's own base, or the SFT model a second time."""
    if config.reference.name == "adapter_off":
        return AdapterOffReference(policy)
    model = load_model(source, dtype, device)
    if config.engine.compile:  # as the policy: one code path, or margins would not start at 0
        compile_layers(model)
    return FrozenReference(model)


def trained_batches(run: Run) -> list[list[TokenizedPair]]:
    """The pairs that this run will train on, in the batches in which it first will."""
    steps = min(run.total_steps, run.schedule.steps_per_epoch)
    return [[run.data.train[place] for place in batch] for batch in run.schedule.batches(0, steps)]


def needed_batches(run: Run) -> list[list[TokenizedPair]]:
    """Every pair whose reference log-probs this run will ask for, in the batches in which it first will."""
    checked, _ = choose_pairs(run.data.train, run.data.train_texts)
    return [*trained_batches(run), *windows(run.data.held_out), checked]


def reference_of(run: Run) -> str:
    """In words, where the reference's log-probs come from."""
    if isinstance(run.reference, NoReference):
        return "rewards stand for themselves"
    if not isinstance(run.reference, CachedReference):
        return "its log-probs are computed in every step"
    cache = run.reference.cache
    needed = {pair.token_key: pair for batch in needed_batches(run) for pair in batch}.values()
    lacking = len(cache.missing(needed))
    if cache.path is None:
        return "its log-probs are computed once, for this run alone"
    there = f"{len(needed) - lacking:,} of {len(needed):,} log-probs are in {cache.path} ({cache.size_in_words})"
    return f"not loaded: {there}" if lacking == 0 else there


def complete_reference(run: Run) -> None:
    """Compute the reference's log-probs that are not in the cache yet; what was loaded for it is freed.

    A run keeps those it began with in its own directory: another run may have left others of their pairs in the cache,
    equal but for a rounding, and a resumed run goes on with the same bits.
    """
    if not isinstance(run.reference, CachedReference):
        return
    config, reporter, own = run.config, run.reporter, run.directory.reference
    cache, needed = run.reference.cache, needed_batches(run)
    if not run.resumed and config.replay is not None:
        replayed = RunDirectory(user_path(config.replay, CheckpointError, "replay"))
        model = replayed.read_manifest().get("model")
        if isinstance(model, dict) and model.get("digest") == run.digest:  # with the same bits to the same weights
            cache.adopt(replayed.reference)
    if run.resumed and not cache.adopt(own):
        reporter.warn(
            f"{own}: missing or damaged; the run goes on with the values of the cache, equal but for rounding"
        )
    at_hand: Reference | None = None
    if config.lora.enabled:
        at_hand = AdapterOffReference(run.policy)
    elif run.step == 0:
        at_hand = UnmovedPolicy(run.policy)

    def load() -> Reference:
        reference = load_reference(config, run.policy, run.source, run.dtype.value, run.device)
        check_distinct(run.policy, reference)
        return reference

    started = time.perf_counter()
    computed = complete_cache(cache, needed, run.batching, run.dtype.value, load, at_hand, reporter, run.poll)
    if computed:
        seconds = time.perf_counter() - started
        reporter.say(f"reference log-probs of {plural(computed, 'pair')} computed in {duration(seconds)}")
    try:
        write_whole(own, cache.records(pair for batch in needed for pair in batch))
    except OSError as error:
        raise StorageError(f"{own}: cannot be written ({error.strerror})") from None
    give_memory_back(run.device)
