"""What a run is put together from: the model, the data, the objective, the reference, and how batches are split."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dpo_cli.config.schema import RunConfig
from dpo_cli.console.reporter import Reporter
from dpo_cli.console.text import plural, safe_text
from dpo_cli.data.batches import Layout, Schedule, Split, SplitByPairs, SplitByTokens, longest_side
from dpo_cli.data.pairs import PairData, load_pairs
from dpo_cli.data.store import StoredPairs
from dpo_cli.data.tokens import PairEncoder
from dpo_cli.errors import CheckpointError, ConfigError
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
    saved_by_packing,
    undisturbed,
)
from dpo_cli.models.logps import MicroBatcher, causal_model
from dpo_cli.models.memory import Budget, measure_budget, plan_memory
from dpo_cli.models.packing import remembered_layout
from dpo_cli.models.reference import AdapterOffReference, FrozenReference, NoReference, Reference
from dpo_cli.models.reference_cache import CachedReference, ReferenceCache, cache_key, cache_path
from dpo_cli.objectives.objective import Objective
from dpo_cli.objectives.table import make_objective
from dpo_cli.runs.checkpoint import ResolvedSettings, TrainingState
from dpo_cli.storage.cache_folder import make_room
from dpo_cli.theory.schedules import lr_factor
from dpo_cli.training.guard import NonFiniteGuard
from dpo_cli.training.monitor import Monitor
from dpo_cli.training.optimizers import OPTIMIZERS, check_optimizer
from dpo_cli.training.parts import Choices, Context, Learner, Material

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
    check_optimizer(config.optimizer, device.value)
    measured = settings if settings is not None and settings.device == device.value.type else None
    dtype = engine.same(lambda: _dtype(config, device.value, settings if state is not None else measured))
    # Rank 0 first: what is made or downloaded once is there for the others of its computer.
    found = engine.same(lambda: find_model(config.model, reporter.say))
    source = found if engine.rank == 0 else find_model(config.model, reporter.say)
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
    engine.alike({"training data": material.data.train.fingerprint})
    where = engine.loads_on(device.value)
    saved = saved_by_packing(source, dtype.value)
    memory = plan_memory(source.path, dtype.value, where, _loads_second_model(config, objective), saved)
    torch.manual_seed(config.seed)
    download = "" if Path(source.path).is_dir() else ", which is downloaded if it is not in the hub's cache"
    reporter.doing(f"loading the model in {str(dtype.value).removeprefix('torch.')}{download}")
    model = load_model(source, dtype.value, where)
    _check_fit(config, model, material)
    mine = model_fingerprint(model) if where.type != "meta" else ""
    engine.alike({"model": mine})
    fingerprint = engine.same(lambda: mine)
    if state is not None and not same_weights(state.model_fingerprint, fingerprint):
        raise CheckpointError(
            f"resume={safe_text(config.resume)}: was trained on other weights than "
            f"model.name_or_path={safe_text(source.name)} holds now"
        )
    reporter.doing("choosing the layout and the size of micro-batches")
    layout = None
    if engine.retries:  # else a pass needs the ranks' weights together
        layout = _layout(context, model, material, device.value, fingerprint, measured)
    policy = objective.prepare(model, config.lora, source.name)
    if config.engine.gradient_checkpointing:
        policy.activation_checkpointing_enable()
    if config.engine.compile:
        compile_layers(causal_model(policy))
    policy = engine.shard(policy, device.value)
    layout = layout or _layout(context, policy, material, device.value, fingerprint, measured)
    policy.train()
    key = cache_key(fingerprint, dtype.value, device.value, layout.value, config.engine.compile)
    reference = _reference(context, policy, source, key, device.value) if objective.needs_reference else NoReference()
    split, split_text = _split(context, policy, material, MicroBatcher(device.value, layout.value, SplitByPairs(1)),
                               measured)  # fmt: skip
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

    def load(encoder: PairEncoder, poll: Callable[[], None] = lambda: None) -> PairData:
        return load_pairs(config.data, encoder, config.seed, poll=poll, working=context.reporter.bar)

    if context.engine.alone:
        data = load(encoder, context.poll)
    else:  # to poll asks every rank, and each comes to it as often as it makes pairs: rank 0 makes them for all
        context.engine.same(lambda: load(PairEncoder.of(load_tokenizer(source), config.data, always_closes)) and None)
        data = load(encoder)
    context.reporter.stop()
    if context.engine.rank == 0:
        sides = [side for side in (data.train, data.held_out) if isinstance(side, StoredPairs)]
        stores = [folder for side in sides for folder in side.store.folders()]
        make_room("tokens", config.data.cache_gib, "data.cache_gib", context.reporter, stores)
    if (idle := context.engine.world_size - config.batch_size) > 0:
        context.reporter.warn(
            f"batch_size={config.batch_size}: in each step {plural(idle, 'rank')} of {context.engine.world_size} "
            f"{'has' if idle == 1 else 'have'} no pair to compute; raise batch_size, or start fewer ranks"
        )
    for key, value in config.choosing().items() if not data.held_out else ():
        shown = str(value).lower() if isinstance(value, bool) else value
        raise ConfigError(f"{key}={shown}: no pair is held out to decide by; set data.eval or data.eval_fraction")
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
    context: Context, model: Any, material: Material, device: torch.device, fingerprint: str,
    measured: ResolvedSettings | None,
) -> Decision:  # fmt: skip
    config = context.config
    if measured is not None:
        return Decision(Layout(measured.layout), "as when the run began")
    pairs = [*material.data.train.longest(1), *material.data.train[:SOME]]
    return remembered_layout(
        config.layout, model, pairs, device, fingerprint, keep=not config.dry_run, engine=context.engine
    )


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


def _reference(context: Context, policy: Any, source: ModelSource, key: str, device: torch.device) -> Reference:
    """The reference: a cache of its log-probs, completed later, or a model that computes them in every step."""
    config = context.config
    if config.reference.cache != "off" and not config.dry_run:  # a dry run keeps no log-probs
        path = cache_path(key) if config.reference.cache == "auto" else None
        return CachedReference(ReferenceCache(path, context.engine))
    return load_reference(context, policy, source, device)


def load_reference(context: Context, policy: Any, source: ModelSource, device: torch.device) -> Reference:
    """The model that the reference's log-probs come from: the policy's own base, or the SFT model a second time."""
    config, engine = context.config, context.engine
    if config.reference.name == "adapter_off":
        return AdapterOffReference(policy)
    dtype = causal_model(policy).get_input_embeddings().weight.dtype
    model = load_model(source, dtype, engine.loads_on(device)).requires_grad_(False)
    if config.engine.compile:  # as the policy: one code path, or margins would not start at 0
        compile_layers(model)
    return FrozenReference(engine.shard(model, device))
