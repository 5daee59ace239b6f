"""One training run, top to bottom: read this file first.

`train` loads the SFT model (the policy gets LoRA adapters; the reference stays frozen, and is read from disk where its
log-probs are known), shows what it decided and why, and goes through the loop of `train_step`:

    u = beta [log pi(y+|x)/pi_ref(y+|x) - log pi(y-|x)/pi_ref(y-|x)],  loss = -log sigmoid(u)

DPO, https://arxiv.org/abs/2305.18290. With `objective=reward` the policy has a scalar head, u = r(x,y+) - r(x,y-), and
there is no reference: the same loop trains a Bradley-Terry reward model. The runner is the one place that opens the
config and hands each part what it needs; what the parts do is theirs.
"""

import itertools
import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dpo_cli.config.schema import OptimizerConfig, RunConfig, read_config
from dpo_cli.console.reporter import Reporter
from dpo_cli.console.text import duration, plural, safe_text, shell_word, significant
from dpo_cli.data.batches import Schedule, Way
from dpo_cli.data.pairs import check_sources, load_pairs
from dpo_cli.data.tokens import PairEncoder, TokenizedPair
from dpo_cli.errors import CheckpointError, ConfigError, DivergedError, StoppedError, StorageError
from dpo_cli.evaluation.scores import score_pairs
from dpo_cli.models.loading import (
    START_FILE,
    Decision,
    attach_lora,
    check_positions,
    choose_device,
    choose_dtype,
    compile_layers,
    find_model,
    load_model,
    load_tokenizer,
    model_digest,
    same_weights,
    wait_for,
)
from dpo_cli.models.logps import Batching, causal_model
from dpo_cli.models.memory import peak_memory_gib, peak_memory_in_words, plan_memory
from dpo_cli.models.packing import remembered_way
from dpo_cli.objectives.reward_model import attach_head, head_of
from dpo_cli.paths import user_path
from dpo_cli.runs.checkpoint import (
    Settled,
    TrainingState,
    best_checkpoint,
    read_state,
    restore,
    rng_states,
    save_checkpoint,
    save_policy,
    set_aside_newer,
    set_rng_states,
)
from dpo_cli.runs.manifest import settled_in, weights_digest
from dpo_cli.runs.model_card import model_card
from dpo_cli.runs.replay import (
    determinism,
    earlier_manifest,
    manifest_of,
    replay_in_words,
    say_what_differs,
)
from dpo_cli.runs.run_directory import (
    RunDirectory,
    claim_directory,
    config_changes,
    default_directory,
    find_checkpoint,
    resumed_directory,
)
from dpo_cli.signals import StopSignals
from dpo_cli.storage.durable import write_folder
from dpo_cli.theory.losses import make_objective
from dpo_cli.theory.metrics import MeanOverPairs
from dpo_cli.theory.schedules import lr_factor
from dpo_cli.training.build import choose_cut, complete_reference, make_reference, reference_of
from dpo_cli.training.guard import NonFiniteGuard, require_finite
from dpo_cli.training.header import show_header
from dpo_cli.training.memory_probe import rehearse, rehearse_longest
from dpo_cli.training.monitor import Radar
from dpo_cli.training.preflight import PreflightSubject, choose_pairs, preflight
from dpo_cli.training.run import Run, Window
from dpo_cli.training.step import cut_until_it_fits, forward_backward
from dpo_cli.training.verdict import History, Verdict, judge

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], OptimizerConfig], torch.optim.Optimizer]] = {
    "adamw": lambda weights, dials: torch.optim.AdamW(
        weights,
        lr=dials.lr,
        betas=(dials.betas[0], dials.betas[1]),
        eps=dials.eps,
        weight_decay=dials.weight_decay,
        fused=weights[0].device.type == "cuda",
    ),
    "rmsprop": lambda weights, dials: torch.optim.RMSprop(
        weights, lr=dials.lr, eps=dials.eps, weight_decay=dials.weight_decay
    ),
    "sgd": lambda weights, dials: torch.optim.SGD(weights, lr=dials.lr, weight_decay=dials.weight_decay),
}


CENTERING = 256  # pairs whose rewards have mean 0


def train(config: RunConfig, reporter: Reporter, job: str = "run") -> Path:
    """Train as the config says; returns the run directory, by default `outputs/<job>/<date_time>`.

    Raises a DpoError with the exit code the command ends in.
    """
    assert config.data.train is not None
    check_sources(config.data)
    resumed = resumed_directory(config)
    asked = user_path(config.output_dir, StorageError, "output_dir") if config.output_dir is not None else None
    if resumed is not None and asked is not None and asked.resolve() != resumed.resolve():
        raise ConfigError(f"output_dir={asked}: resume={config.resume} goes on in {resumed}; leave output_dir out")
    choose = default_directory if config.dry_run else claim_directory
    directory = RunDirectory(resumed or asked or choose(job, time.time()))
    if directory.finished and resumed is not None:
        reporter.say(f"already complete: {directory.final}")
        for change in itertools.chain(*config_changes(read_config(directory.config), config)):
            reporter.warn(f"{change} has no effect: a finished run is not trained on")
        return directory.path
    with determinism(config.deterministic), nullcontext() if config.dry_run else directory.owned(reporter.warn):
        if resumed is None and directory.metrics.path.exists():
            raise ConfigError(f"output_dir={directory.path}: holds a run already; resume=auto goes on with it")
        return _train_in(directory, config, reporter, resumed is not None)


def _train_in(directory: RunDirectory, config: RunConfig, reporter: Reporter, going_on: bool) -> Path:
    checkpoint, passed_over = find_checkpoint(config, directory)
    changes = _check_same_run(directory, config, reporter) if checkpoint is not None else []
    if not config.dry_run:
        reporter.open_log(directory.log)
    for reason in passed_over:
        reporter.warn(f"passed over a checkpoint: {reason}")
    earlier = earlier_manifest(directory, config, going_on)
    run: Run | None = None
    with StopSignals(reporter.warn) as signals:
        try:
            run = put_together(config, directory, reporter, signals.poll, checkpoint, settled_in(earlier))
            if earlier:
                say_what_differs(run, earlier)
            complete_reference(run)
            reporter.say(preflight_of(run))
            if config.dry_run:
                rehearse(run)
                return directory.path
            rehearse_longest(run)
            for path in set_aside_newer(directory.checkpoints, run.step):  # before the lines they count are cut
                reporter.warn(f"{path.name} lies after step {run.step} and is set aside")
            directory.metrics.cut(run.records_kept)
            evaluations = [line for line in directory.metrics.read() if line["split"] == "eval"]
            run.held_out_losses = {line["step"]: line["loss"] for line in evaluations if math.isfinite(line["loss"])}
            if checkpoint is None:
                if going_on:
                    reporter.say(f"no checkpoint in {directory.path} yet: beginning anew")
                directory.write_config(config)
                directory.write_manifest(manifest_of(run))
            elif changes:  # what is written is what is done, and a replay says that there was a change
                begun = directory.read_manifest()
                directory.write_manifest({**begun, "resumed_with": [*begun.get("resumed_with", []), *changes]})
                directory.write_config(config)
            train_to_end(run)
            return finish(run)
        except StoppedError as stop:
            if config.dry_run:
                raise
            again = f"dpo-train ... {shell_word('output_dir', directory.path)} resume=auto"
            step = run.step if run is not None else 0
            raise type(stop)(f"{stop} at step {step}; go on with: {again}") from None


def _check_same_run(directory: RunDirectory, config: RunConfig, reporter: Reporter) -> list[str]:
    """CheckpointError for a change that would make it another run; the changes that are allowed, in words."""
    refused, told = config_changes(read_config(directory.config), config)
    if refused:
        reporter.say(f"resume: the config is not the one {directory.path} was begun with")
        reporter.grid(["key", "was", "is"], [[change.key, change.was, change.now] for change in refused], left=3)
        raise CheckpointError(
            f"resume: the config is not the one {directory.path} was begun with ({'; '.join(map(str, refused))}); "
            "start a new run, or take the changes back"
        )
    for change in told:
        reporter.warn(f"resuming with another {change}: the run is no longer the one that was begun")
    return [str(change) for change in told]


def put_together(
    config: RunConfig,
    directory: RunDirectory,
    reporter: Reporter,
    poll: Callable[[], None],
    checkpoint: Path | None,
    settled: Settled | None = None,
) -> Run:
    """Load and build every part of a run, show the header, and restore the checkpoint if there is one.

    What was measured when a run began (`settled`) holds to its end, and for its replay.
    """
    state = read_state(checkpoint) if checkpoint is not None else None
    settled = state.settled if state is not None else settled
    device = choose_device(config.device)
    if settled is not None and (state is not None or settled.device == device.value.type):
        dtype = Decision(getattr(torch, settled.dtype), "as the run began")
    else:
        dtype = choose_dtype(config.model.dtype, device.value, config.lora.enabled, keep=not config.dry_run)
    source = find_model(config.model, reporter.say)
    encoder = PairEncoder(load_tokenizer(source), config.data.template, always_closes=config.objective == "reward")
    data = load_pairs(config.data, encoder, config.seed, poll=poll)
    if state is not None and state.data_fingerprint != data.fingerprint:
        raise CheckpointError(f"{checkpoint}: was trained on other data than data.train={config.data.train} gives now")

    asked_in_every_step = config.reference.cache == "off" or config.dry_run
    second_model = config.objective == "dpo" and config.reference.name == "frozen" and asked_in_every_step
    memory = plan_memory(source.path, dtype.value, device.value, second_model)
    torch.manual_seed(config.seed)
    policy = load_model(source, dtype.value, device.value)
    _check_vocabulary(policy, encoder, data.train)
    check_positions(policy, [*data.train, *data.held_out], config.data.max_length)
    digest = model_digest(policy)
    if state is not None and not same_weights(state.model_digest, digest):
        raise CheckpointError(
            f"{checkpoint}: was trained on other weights than model.name_or_path={safe_text(source.name)} holds now"
        )
    if settled is None or settled.device != device.value.type:
        way = remembered_way(config.batching, policy, data.train, device.value, digest, keep=not config.dry_run)
    else:
        way = Decision(Way(settled.way), "as the run began")
    if config.objective == "reward":
        policy = attach_lora(policy, config.lora, source, task=None)
        attach_head(policy)
    elif config.lora.enabled:
        policy = attach_lora(policy, config.lora, source)
    else:
        policy.requires_grad_(True)
    if config.engine.gradient_checkpointing:
        policy.activation_checkpointing_enable()
    if config.engine.compile:
        compile_layers(causal_model(policy))
    policy.train()
    schedule = Schedule.of(data.train, config.batch_size, config.seed, config.data.shuffle)
    reference = make_reference(config, policy, source, dtype.value, device.value, way.value, digest)
    cut, budget, cut_words = choose_cut(config, policy, data.train, device.value, way.value, settled, reporter)
    optimizer = OPTIMIZERS[config.optimizer.name](
        [parameter for parameter in policy.parameters() if parameter.requires_grad], config.optimizer
    )
    run = Run(
        config=config,
        directory=directory,
        reporter=reporter,
        poll=poll,
        device=device.value,
        device_reason=device.reason,
        dtype=dtype,
        source=source,
        encoder=encoder,
        data=data,
        policy=policy,
        digest=digest,
        reference=reference,
        optimizer=optimizer,
        guard=NonFiniteGuard.of(optimizer, device.value, config.non_finite),
        objective=make_objective(config.loss.name, config.beta, config.loss.sft_weight, **config.loss.dials()),
        batching=Batching(device.value, way.value, cut),
        batching_reason=way.reason,
        token_budget=budget,
        pairs_a_pass=settled.pairs_a_pass if settled is not None and settled.device == device.value.type else None,
        schedule=schedule,
        total_steps=schedule.total_steps(config.epochs, config.max_steps),
        radar=Radar(config.beta, config.radar, config.loss.name, config.objective),
    )
    show_header(run, cut_words, reference_of(run), memory)
    if checkpoint is not None and state is not None:
        if state.step > run.total_steps:
            raise CheckpointError(f"{checkpoint}: is at step {state.step}, and the run now ends at {run.total_steps}")
        _resume(run, checkpoint, state)
    return run


def _check_vocabulary(model: Any, encoder: PairEncoder, pairs: list[TokenizedPair]) -> None:
    rows = model.get_input_embeddings().num_embeddings
    largest = max(int(ids.max()) for pair in pairs for ids in (pair.prompt, pair.chosen, pair.rejected))
    if largest >= rows:
        token = safe_text(encoder.tokenizer.decode([largest]))
        raise CheckpointError(
            f"token {largest} ({token}) of the tokenizer lies outside the model's {rows:,} embeddings: "
            "tokenizer and model do not belong together"
        )


def _resume(run: Run, checkpoint: Path, state: TrainingState) -> None:
    rng, window = restore(checkpoint, run.policy, run.optimizer)
    set_rng_states(rng)
    run.radar.restore(window["last_pairs"], state.alarms_sounded)
    run.step, run.seconds = state.step, state.seconds
    run.window = Window(MeanOverPairs.from_sums(state.sums, state.sums_pairs), state.sums_tokens, state.sums_seconds)
    run.records_kept, run.resumed, run.skipped_steps = state.records, True, state.skipped_steps
    run.reporter.say(f"going on from {checkpoint} at step {state.step}")


def preflight_of(run: Run) -> str:
    """The line of a passed preflight; CheckpointError where an identity of the mathematics does not hold."""
    pairs, texts = choose_pairs(run.data.train, run.data.train_texts)
    return preflight(
        PreflightSubject(
            policy=run.policy,
            reference=run.reference,
            objective=run.objective,
            beta=run.config.beta,
            encoder=run.encoder,
            pairs=pairs,
            texts=texts,
            device=run.device,
            way=run.batching.way,
            dtype=run.dtype.value,
            at_start=run.step == 0,
        )
    )


# The loop


def train_to_end(run: Run) -> None:
    """Every optimizer step from where the run stands to its last, with its logs, evaluations and checkpoints."""
    config = run.config
    run.reporter.start("step", run.total_steps, run.step)
    rng = rng_states()
    try:
        if _evaluation_was_cut_off(run):
            log_eval(run)
        for batch in run.schedule.batches(run.step, run.total_steps):
            train_step(run, [run.data.train[place] for place in batch])
            rng = rng_states()  # a stop in the middle of the next step goes back to here
            run.reporter.advance()
            last = run.step == run.total_steps
            if _is_logged(run):
                log_train(run)
            if _due(run.step, config.eval_every) and not last:
                log_eval(run)
            if _due(run.step, config.save_every) and not last:
                _save_or_go_on(run)
    except StoppedError:
        save(run, rng)
        raise


def _evaluation_was_cut_off(run: Run) -> bool:
    """Whether the run that this one resumes was stopped in the evaluation after its last step."""
    if not _due(run.step, run.config.eval_every) or run.step in (0, run.total_steps):
        return False
    return not any(r["split"] == "eval" and r["step"] == run.step for r in run.directory.metrics.read())


def train_step(run: Run, batch: list[TokenizedPair]) -> None:
    """One optimizer step on a batch of pairs, however it is cut to fit."""
    started = time.perf_counter()
    config = run.config
    factor = lr_factor(config.optimizer.schedule, run.step, config.optimizer.warmup_steps, run.total_steps)
    for group in run.optimizer.param_groups:
        group["lr"] = config.optimizer.lr * factor
    measured = cut_until_it_fits(run, lambda: forward_backward(run, batch))
    grad_norm = nn.utils.clip_grad_norm_(run.trainable, config.max_grad_norm)
    losses = torch.cat(measured.losses)
    bad = run.guard.before_update(run.step + 1, measured.pairs, losses, grad_norm)
    if run.step == 0 and not bad:
        write_record(run, "train", measured.metrics.means(), lr=0.0)
    if not bad:
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    if bad:
        run.skipped_steps += 1
        run.reporter.warn(bad)
        return
    if _is_logged(run):
        wait_for(run.device)  # the clock stops when the work is done, not when it is queued
    elapsed = time.perf_counter() - started
    for ratios in measured.ratios:
        run.radar.add(ratios)
    run.window.metrics.merge(measured.metrics)
    run.window.grad_norm = grad_norm
    run.window.tokens += measured.tokens
    run.window.seconds += elapsed
    run.seconds += elapsed


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _is_logged(run: Run) -> bool:
    """Whether the step just done ends with a line in metrics.jsonl."""
    return _due(run.step, run.config.log_every) or run.step == run.total_steps


def log_train(run: Run) -> None:
    """Log the mean over the pairs since the last logged step, sound new alarms, and begin a new window."""
    run.guard.look()
    window = run.window
    if window.metrics.pairs == 0:  # every step since the last line was skipped, and each has been said
        return
    drift = run.radar.drift()
    alarms = run.radar.alarms(drift)
    write_record(
        run,
        "train",
        window.metrics.means(),
        grad_norm=float(window.grad_norm),
        lr=run.optimizer.param_groups[0]["lr"],
        pairs_per_second=window.metrics.pairs / window.seconds,
        tokens_per_second=window.tokens / window.seconds,
        **(drift.of_rewards() if run.is_reward_model else drift.as_metrics()),
        **({"skipped_steps": run.skipped_steps} if run.skipped_steps else {}),
        **({"alarms": {alarm.name: alarm.text for alarm in alarms}} if alarms else {}),
    )
    run.window = Window()
    for alarm in alarms:
        run.reporter.warn(f"step {run.step}: {alarm.text}")
    ruin = run.radar.ruin(drift)
    if ruin is not None:
        checkpoint = save(run)
        run.reporter.stop()
        _show_verdict(run, _judge(run))
        raise DivergedError(f"step {run.step}: stopped by the radar (radar=stop), saved as {checkpoint}: {ruin.text}")


def log_eval(run: Run) -> dict[str, float] | None:
    """Log the mean over all held-out pairs; None where none are held out."""
    if not run.data.held_out:
        return None
    advance = run.reporter.working("evaluating pair", len(run.data.held_out))
    scores = score_pairs(run.policy, run.reference, run.data.held_out, run.batching, run.poll, advance)
    metrics = MeanOverPairs()
    metrics.add(run.measure(scores.policy, scores.ratios, run.objective(scores.policy, scores.ratios)))
    means = metrics.means()
    write_record(run, "eval", means)
    if math.isfinite(means["loss"]):
        run.held_out_losses[run.step] = means["loss"]
    else:
        run.reporter.warn(f"step {run.step}: the held-out loss is not finite")
    return means


def write_record(run: Run, split: str, means: dict[str, float], **more: Any) -> None:
    """One line of metrics.jsonl, and the console's view of it."""
    record: dict[str, Any] = {
        "step": run.step,
        "epoch": round(run.step / run.schedule.steps_per_epoch, 6),
        "split": split,
        **means,
        **more,
        "peak_memory_gib": peak_memory_gib(run.device),
        "seconds": run.seconds,
    }
    trouble = run.directory.metrics.append(record)
    if trouble is not None:
        run.reporter.warn(trouble)
    run.reporter.record(record)


# Keeping


def save(run: Run, rng: dict[str, Tensor] | None = None) -> Path:
    """Write a checkpoint of the run as it stands after its last complete step."""
    run.guard.look()
    require_finite([(name, weight) for name, weight in run.policy.named_parameters() if weight.requires_grad], run.step)
    run.directory.metrics.flush()  # a checkpoint counts lines: they must be there after a power cut, too
    state = TrainingState(
        step=run.step,
        seconds=run.seconds,
        sums=run.window.metrics.sums(),
        sums_pairs=run.window.metrics.pairs,
        sums_tokens=run.window.tokens,
        sums_seconds=run.window.seconds,
        records=run.directory.metrics.records,
        skipped_steps=run.skipped_steps,
        data_fingerprint=run.data.fingerprint,
        model_digest=run.digest,
        settled=run.settled,
        alarms_sounded=run.radar.sounded,
    )
    folder = run.directory.checkpoints
    window = {"last_pairs": run.radar.state()}
    rng = rng or rng_states()
    keep, losses = run.config.keep_checkpoints, run.held_out_losses
    return save_checkpoint(folder, run.policy, run.optimizer, rng, window, state, keep, losses)


def _save_or_go_on(run: Run) -> None:
    try:
        save(run)
    except StorageError as error:  # the disk may have room again at the next interval
        run.reporter.warn(f"{error}; trying again at the next checkpoint")


def finish(run: Run) -> Path:
    """Evaluate, write final/, and say where everything is."""
    weights = weights_digest(save(run))
    center_rewards(run)
    means = log_eval(run)
    run.reporter.stop()
    run.directory.metrics.flush()
    verdict = _judge(run, weights)
    write_final(run, means)
    run.reporter.say()
    memory = f"peak memory {peak_memory_in_words(run.device)}"
    skipped = f", {plural(run.skipped_steps, 'update')} skipped as not finite" if run.skipped_steps else ""
    run.reporter.facts(
        [
            ("done", f"{plural(run.step, 'step')} in {duration(run.seconds)}, {memory}{skipped}"),
            ("adapter" if run.config.lora.enabled else "model", str(run.directory.final)),
            *_best_in_words(run),
            *replay_in_words(run, weights),
            ("next", _next_command(run)),
        ]
    )
    _show_verdict(run, verdict)
    return run.directory.path


def center_rewards(run: Run) -> None:
    """Give training responses a mean reward of 0, by the first CENTERING pairs: pairs alone leave that open."""
    head = head_of(run.policy)
    if head is None:
        return
    some = run.data.train[:CENTERING]
    advance = run.reporter.working("centring rewards: pair", len(some))
    rewards = score_pairs(run.policy, run.reference, some, run.batching, run.poll, advance).policy
    head.center += torch.cat([rewards.chosen, rewards.rejected]).double().mean().to(head.center)
    run.reporter.say(f"rewards are centred: 0 is the mean of the responses of {plural(len(some), 'training pair')}")


def _best_in_words(run: Run) -> list[tuple[str, str]]:
    """The checkpoint with the lowest held-out loss, where that is not the end of the run."""
    best, end = best_checkpoint(run.directory.checkpoints, run.held_out_losses), run.held_out_losses.get(run.step)
    if best is None or end is None or best[1] >= end:
        return []
    return [("best", f"{best[0]}: held-out loss {significant(best[1])}, at the end {significant(end)}")]


def _next_command(run: Run) -> str:
    path = run.directory.path
    if run.is_reward_model:
        return (
            f"dpo-label by=reward {shell_word('judge', path)} samples=..., or dpo-eval {shell_word('checkpoint', path)}"
        )
    return f"dpo-eval {shell_word('checkpoint', path)} samples=3"


def _judge(run: Run, weights: str | None = None) -> Verdict:
    """How the run went, from its metrics; kept in the manifest."""
    config = run.config
    records = run.directory.metrics.read()
    dials = (config.optimizer.lr, config.beta, config.loss.name, config.objective)
    history = History.of(records, len(run.data.held_out), *dials)
    verdict = judge(history)
    ended = {"weights_sha256": weights, "skipped_steps": run.skipped_steps, "verdict": verdict.as_dict()}
    begun = run.directory.read_manifest() or manifest_of(run)  # under which conditions a run was begun stays
    run.directory.write_manifest({**begun, **ended})
    return verdict


def _show_verdict(run: Run, verdict: Verdict) -> None:
    run.reporter.say(f"verdict  {verdict.color}: {verdict.summary}", style=verdict.color)
    for finding in verdict.findings:
        run.reporter.say(f"  {finding.name}: {finding.reason}", style=finding.color)
        run.reporter.say(f"    next: {finding.next_step}")


def write_final(run: Run, means: dict[str, float] | None) -> None:
    """Write final/ beside and rename it: a folder that is there is whole."""

    def write(beside: Path) -> None:
        save_policy(run.policy, beside)
        if run.config.model.adapter is not None:  # without it the adapter would sit on the wrong base
            note = json.dumps({"sft_adapter": run.config.model.adapter})
            (beside / START_FILE).write_text(note, encoding="utf-8")
        try:
            run.encoder.tokenizer.save_pretrained(str(beside))
        except Exception as error:  # the tokenizers library has no kind of its own for a full disk
            raise OSError(str(error)) from None
        card = model_card(run.config, run.source, means, len(run.data.train))
        (beside / "README.md").write_text(card, encoding="utf-8")

    try:
        write_folder(run.directory.final, write)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{run.directory.final}: cannot be written ({safe_text(error)})") from None
