"""One training run, top to bottom: read this file first.

`train` opens the run, builds its parts (the policy gets LoRA adapters; the reference stays frozen, and its log-probs
are read from disk where they are known), checks them, and goes through the loop of `train_step`:

    u = beta [log pi(y+|x)/pi_ref(y+|x) - log pi(y-|x)/pi_ref(y-|x)],  loss = -log sigmoid(u)

DPO, https://arxiv.org/abs/2305.18290. The formula belongs to the objective (objectives/preference.py); a reward model
goes through the same loop. Every function works on all ranks at once (engine/engine.py): what must happen once goes
through `engine.same`.
"""

import io
import time
from contextlib import nullcontext
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dpo_cli.config.schema import RunConfig, read_config, tracker_options
from dpo_cli.console.reporter import Reporter
from dpo_cli.console.text import shell_word
from dpo_cli.data.pairs import check_sources
from dpo_cli.data.tokens import TokenizedPair
from dpo_cli.engine.engine import Engine
from dpo_cli.engine.table import open_engine
from dpo_cli.errors import ConfigError, LostRankError, StoppedError
from dpo_cli.models.dtype import choose_device, wait_for
from dpo_cli.models.generators import rng_states
from dpo_cli.models.memory import memory_errors, one_forward_pass
from dpo_cli.runs.manifest import what_ranks_share
from dpo_cli.runs.replay import determinism
from dpo_cli.runs.run_directory import AS_BEGUN, RunDirectory, as_begun, config_changes, directory_of
from dpo_cli.signals import StopSignals
from dpo_cli.trackers.trackers import check_installed
from dpo_cli.training.build import build
from dpo_cli.training.header import show_header
from dpo_cli.training.memory_probe import dry_run, probe_memory, until_it_fits
from dpo_cli.training.parts import Context, Learner, Material, Progress
from dpo_cli.training.preflight import preflight
from dpo_cli.training.records import Recorder
from dpo_cli.training.reference_logps import complete_reference, describe_source
from dpo_cli.training.start import Start, find_start, open_records, say_what_differs, tracked


def train(config: RunConfig, reporter: Reporter, job: str = "run") -> Path:
    """Train as the config says; returns the run directory, by default `outputs/<job>/<date_time>`.

    Raises a DpoError with the exit code that the command ends with.
    """
    engine = open_engine(config.engine, choose_device(config.device).value.type)
    with engine.watch(), memory_errors():
        engine.alike(what_ranks_share(config))
        return _train(config, engine, reporter if engine.rank == 0 else Reporter(io.StringIO()), job)


def _train(config: RunConfig, engine: Engine, reporter: Reporter, job: str) -> Path:
    check_sources(config.data)
    check_installed(list(tracker_options(config)))
    path, resumed = engine.same(lambda: directory_of(config, job, time.time()))
    directory = RunDirectory(path)
    begun = engine.same(lambda: as_begun(config, directory)) if resumed else config
    for key in AS_BEGUN:
        if getattr(begun.data, key) != getattr(config.data, key):
            reporter.say(f"data.{key}={getattr(begun.data, key)}, as when the run began")
    config = begun
    if resumed and engine.same(lambda: directory.finished):
        reporter.say(f"already complete: {directory.final}")
        for change in chain(*config_changes(read_config(directory.config), config)):
            reporter.warn(f"{change} has no effect: a finished run is not trained on")
        return path
    with (
        determinism(config.deterministic),
        nullcontext()
        if config.dry_run or engine.rank
        else directory.owned(reporter.warn, claimed=config.output_dir is None and not resumed),
        StopSignals(reporter.warn, engine.agree, announces=engine.rank == 0) as signals,
    ):
        if not resumed and directory.metrics.path.exists():
            raise ConfigError(f"output_dir={path}: holds a run already; resume=auto continues it")
        context = Context(config, directory, reporter, engine, signals.poll, signals.protect_saving)
        progress = Progress()
        try:
            _run(context, find_start(context, resumed), progress)
        except StoppedError as stop:
            if config.dry_run:
                raise
            again = f"to resume, run the same command with {shell_word('output_dir', path)} resume=auto"
            stop.args = (f"{stop} at step {progress.step}; {again}",)
            raise
    return path


def _run(context: Context, start: Start, progress: Progress) -> None:
    """Build the run, resume it, fill the reference, check, fit, finish."""
    config, reporter = context.config, context.reporter
    learner, material, choices = build(context, start.state, start.settings)
    show_header(context, learner, material, choices, describe_source(learner.reference, material))
    if start.checkpoint is not None:
        start.resume(context, learner, material, progress)
    say_what_differs(context, learner, material, choices, start)
    complete_reference(context, learner, material, progress.resumed)
    reporter.doing("preflight: checking losses, scores and gradients on a few pairs")
    reporter.say(preflight(learner, material, context.engine, at_start=progress.step == 0))
    if config.dry_run:
        dry_run(context, learner, material, forward_backward)
        return
    probe_memory(context, learner, material, forward_backward)
    context.protect_saving()
    open_records(context, learner, material, choices, start, progress)
    with tracked(context, progress) as trackers:
        recorder = Recorder(context, learner, material, progress, trackers)
        fit(context, learner, material, progress, recorder)
        recorder.finish()


def fit(context: Context, learner: Learner, material: Material, progress: Progress, recorder: Recorder) -> None:
    """Every optimizer step from where the run stands to its last, with its logs, evaluations and checkpoints.

    A budget or early stopping may end it at an evaluation before (choice.py).
    """
    config, last = context.config, material.total_steps
    context.reporter.start("step", last, progress.step)
    rng = rng_states()
    try:
        with context.engine.watch(in_time=True):
            if recorder.evaluation_is_missing:
                recorder.evaluate()
            for indices in material.schedule.batches(progress.step, last):
                if recorder.choice.end is not None:
                    break
                context.poll()
                train_step(context, learner, progress, material.batch(indices), recorder)
                rng = rng_states()  # a stop in the middle of the next step saves these
                context.reporter.advance()
                if recorder.is_logged:
                    recorder.log()
                if progress.is_due(config.eval_every) and progress.step < last:
                    recorder.evaluate()
                if progress.is_due(config.save_every) and progress.step < last:
                    recorder.save_or_continue()
    except LostRankError:
        if context.engine.keeps_all and context.engine.rank == 0:
            recorder.save_alone(rng)
        raise
    except StoppedError:
        recorder.save(rng)
        raise


def train_step(
    context: Context, learner: Learner, progress: Progress, batch: list[TokenizedPair], recorder: Recorder
) -> None:
    """One optimizer step on a batch of pairs, however it is split to fit in memory."""
    started = time.perf_counter()
    engine, weights = context.engine, learner.trainable
    for group in learner.optimizer.param_groups:
        group["lr"] = learner.rate(progress.step)
    if engine.world_size > 1 and context.config.lora.dropout:  # each rank drops other values, in a resumed run the same
        torch.manual_seed(
            np.random.SeedSequence([context.config.seed, progress.step, engine.rank]).generate_state(1)[0]
        )
    table, names = until_it_fits(context, learner, lambda: forward_backward(context, learner, batch))
    engine.sum_gradients(weights)
    grad_norm = engine.clip(weights, context.config.max_grad_norm)
    table = engine.sum(table)  # (metrics + watched, B): from here on every rank knows every pair
    metrics = dict(zip(names, table, strict=False))
    bad = learner.guard.before_update(progress.step + 1, [pair.row for pair in batch], metrics["loss"], grad_norm)
    if progress.step == 0 and not bad:
        recorder.log_start(metrics, batch)
    if not bad:
        learner.optimizer.step()
    learner.optimizer.zero_grad(set_to_none=True)
    progress.step += 1
    if bad:
        progress.skipped_steps += 1
        context.reporter.warn(bad)
        return
    if recorder.is_logged:
        wait_for(learner.batcher.device)  # the clock stops when the work is done, not when it is queued
    learner.monitor.add(table[len(names) :])
    elapsed = time.perf_counter() - started
    progress.window.add(metrics, grad_norm, batch, elapsed)
    progress.seconds += elapsed


def forward_backward(context: Context, learner: Learner, batch: list[TokenizedPair]) -> tuple[Tensor, list[str]]:
    """Add the gradient of the batch's mean loss to the weights.

    Returns a table (metrics + watched, B) in the order of the batch, with the names of its first rows.
    """
    table, names = torch.zeros(0), list[str]()
    column = {id(pair): number for number, pair in enumerate(batch)}
    for pairs, counts in learner.batcher.rounds(batch, context.engine):
        if context.engine.alone:
            context.poll()
        with one_forward_pass(pairs):
            micro_batch = learner.batcher.lay_out(pairs)
            reference = micro_batch.scores(learner.reference.logps(micro_batch))  # log pi_ref(y|x), (M,)
            policy = micro_batch.scores(learner.objective.score(learner.policy, micro_batch))  # log pi(y|x), (M,)
            outcome = learner.objective(policy, reference)  # losses -log sigmoid(u), (B,)
            # The sum over the batch size: the gradient does not depend on how the batch was split.
            (outcome.losses.sum() * counts / len(batch)).backward()
        found = outcome.table
        if not names:
            table, names = found.new_zeros(len(found), len(batch)), list(outcome.metrics)
        if counts:
            table[:, [column[id(pair)] for pair in pairs]] = found
    return table, names
