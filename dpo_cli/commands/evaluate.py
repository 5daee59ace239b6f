"""dpo-eval: score a finished run, checkpoint, adapter or model on preference pairs, without training."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dpo_cli.config.schema import EvalConfig, data_config, to_container
from dpo_cli.console.reporter import Reporter
from dpo_cli.console.text import plural, safe_text, significant
from dpo_cli.data.batches import Cut, Way, by_size, cut_by_tokens
from dpo_cli.data.pairs import PairData, check_sources, load_pairs
from dpo_cli.data.tokens import PairEncoder
from dpo_cli.errors import CheckpointError, ConfigError, StorageError
from dpo_cli.evaluation.page import page
from dpo_cli.evaluation.report import calibration_facts, write_report
from dpo_cli.evaluation.scores import score_pairs, summarize, windows
from dpo_cli.generation.generate import greedy_answers
from dpo_cli.models.loading import (
    Decision,
    ModelSource,
    check_positions,
    choose_device,
    find_model,
    load_model,
    load_tokenizer,
    model_digest,
    same_weights,
)
from dpo_cli.models.logps import Batching
from dpo_cli.models.memory import ENOUGH_TOKENS, OTHERWISE
from dpo_cli.models.packing import remembered_way
from dpo_cli.models.reference import AdapterOffReference, FrozenReference, NoReference, Reference
from dpo_cli.models.reference_cache import (
    CachedReference,
    ReferenceCache,
    cache_path,
    complete_cache,
    values_key,
)
from dpo_cli.paths import user_path
from dpo_cli.runs.manifest import settled_in
from dpo_cli.runs.model_ref import Asked, Subject, find_subject, load_policy, subject_dtype
from dpo_cli.signals import StopSignals
from dpo_cli.theory.calibration import Bin, calibration_error, reliability
from dpo_cli.theory.losses import Objective, make_objective
from dpo_cli.theory.statistics import Estimate

REPORTS = (("report", "report.json"), ("pairs", "pairs.jsonl"), ("page", "report.html"))


def evaluate(config: EvalConfig, overrides: list[tuple[str, Any]], reporter: Reporter) -> Path:
    """Evaluate as the config says, with `overrides` of the run's own data dials; returns the report's folder."""
    assert config.checkpoint is not None
    subject = find_subject(Asked(config.checkpoint, config.reference_model, config.trust_remote_code))
    if subject.is_reward_model and config.samples:
        raise ConfigError(f"samples={config.samples}: a reward model gives no answers; leave it out")
    data_dials = _data_dials(config, subject, overrides)
    check_sources(data_dials)
    beta = subject.beta
    objective = _objective(subject, beta)
    with StopSignals(reporter.warn) as signals:
        device = choose_device(config.device)
        dtype = subject_dtype(subject, device.value)
        source = find_model(subject.base, reporter.say)
        encoder = PairEncoder(load_tokenizer(source), data_dials.template, always_closes=subject.is_reward_model)
        seed = subject.run.seed if subject.run else 0
        data = load_pairs(data_dials, encoder, seed, held_out_only=True, poll=signals.poll)
        base = load_model(source, dtype.value, device.value)
        check_positions(base, data.held_out, data_dials.max_length)
        digest = model_digest(base)
        _warn_of_other_weights(subject, config, dtype.value, digest, reporter)
        policy, reference = _load(subject, base, dtype.value, device.value)
        way = _way(config, subject, policy, base, data, device.value, digest)
        keeps = config.reference_cache == "auto" and not subject.is_reward_model
        key = values_key(digest, dtype.value, device.value, way) if keeps else None
        _show_header(reporter, subject, source, device, dtype, data, data_dials.max_length, beta)
        started = time.monotonic()
        batching = Batching(device.value, way, _cut(config, device.value, way))
        known = _known(key, data, batching, dtype.value, reference, reporter, signals) if key else reference
        reporter.start("pair", len(data.held_out))
        scores = score_pairs(policy, known, data.held_out, batching, signals.poll, reporter.advance)
        reporter.stop()
        seconds = time.monotonic() - started
        estimates = summarize(scores, objective, beta, of_rewards=subject.is_reward_model)
        # Of other losses sigmoid(margin) is nobody's claim.
        claims = subject.run is None or subject.run.loss.name == "sigmoid"
        bins = reliability((beta * scores.ratios.margin).tolist()) if claims else []
        held_out_by_run = config.data is None and not overrides
        folder = _folder(config, subject, "held-out" if held_out_by_run else data.held_out_report.source)
        facts = {
            "checkpoint": subject.weights,
            "reference": None if subject.is_reward_model else source.name,
            "data": data.held_out_report.as_dict(),
            "beta": beta,
            "loss_name": subject.run.loss.name if subject.run else "sigmoid",
            "device": str(device.value),
            "dtype": str(dtype.value).removeprefix("torch."),
            "way": way.value,
            "pairs_per_second": len(data.held_out) / seconds,
            "seconds": seconds,
            **({"calibration": calibration_facts(bins)} if bins else {}),
        }
        _show_estimates(reporter, estimates)
        _show_calibration(reporter, bins)
        answers: list[list[str]] = []
        if config.samples:
            answers = _answers(policy, reference, encoder, data, config, device.value, signals)
            _show_answers(reporter, answers, config.max_new_tokens)
        margins = (beta * scores.ratios.margin).tolist()
        labelled = [(label, estimates[name]) for label, name in SHOWN if name in estimates]
        title = f"{Path(subject.weights).name} on {data.held_out_report.source}"
        shown = {name: facts[name] for name in ("checkpoint", "reference", "beta", "loss_name", "device", "dtype")}
        sentences = {"data": "\n".join(data.held_out_report.sentences(data_dials.max_length))}
        html = page(title, {**shown, **sentences}, labelled, margins, answers)
        write_report(folder, facts, estimates, data.held_out, scores, beta, html, subject.is_reward_model)
    reporter.facts([(name, str(folder / file)) for name, file in REPORTS])
    return folder


def _objective(subject: Subject, beta: float) -> Objective:
    """The run's own loss; DPO's where the checkpoint does not say."""
    if subject.run is None:
        return make_objective("sigmoid", beta)
    loss = subject.run.loss
    return make_objective(loss.name, beta, loss.sft_weight, **loss.dials())


def _data_dials(config: EvalConfig, subject: Subject, overrides: list[tuple[str, Any]]) -> Any:
    """The data to evaluate on: a chosen group, or what the run held out, with `data.*` overrides on top."""
    if config.data is not None:
        dials = data_config(config.data)
    elif subject.run is not None:
        container = to_container(subject.run)["data"]
        for key, value in overrides:
            *groups, leaf = key.removeprefix("data.").split(".")
            place = container
            for group in groups:
                place = place[group]
            place[leaf] = value
        dials = data_config(container)
    else:
        raise ConfigError(
            "data: an adapter or model holds nothing out; choose pairs, for instance data=jsonl data.eval=pairs.jsonl"
        )
    if dials.eval is None and dials.train is None:
        raise ConfigError("data.eval=null: name the pairs to evaluate on, for instance data.eval=pairs.jsonl")
    if dials.train is None:
        dials = replace(dials, train=dials.eval)
    if dials.eval is None and dials.eval_split is None and dials.eval_fraction == 0:
        raise ConfigError("data.eval_fraction=0: the run held nothing out; name pairs with data.eval=PATH")
    return dials


def _warn_of_other_weights(
    subject: Subject, config: EvalConfig, dtype: torch.dtype, digest: str, reporter: Reporter
) -> None:
    """Say so where the model under a run's adapter is not the one that the run was trained on."""
    facts = subject.directory.read_manifest() if subject.directory else {}
    model = facts.get("model")
    known = model.get("digest") if isinstance(model, dict) else None
    same_dtype = facts.get("dtype") == str(dtype).removeprefix("torch.")
    if isinstance(known, str) and same_dtype and config.reference_model is None and not same_weights(known, digest):
        reporter.warn(
            f"{safe_text(subject.base.name_or_path)} holds other weights than when this run was trained on it"
        )


def _way(
    config: EvalConfig, subject: Subject, policy: Any, base: Any, data: PairData, device: torch.device, digest: str
) -> Way:
    """The way the run made its batches, so that the numbers are the run's own; else one that both models can take."""
    settled = settled_in(subject.directory.read_manifest()) if subject.directory else None
    own = config.batching == "auto" and config.reference_model is None
    if own and settled is not None and settled.device == device.type:
        return Way(settled.way)
    chosen: Way = remembered_way(config.batching, base, data.held_out, device, digest).value
    if not subject.is_adapter:
        of_policy = remembered_way(config.batching, policy, data.held_out, device, model_digest(policy)).value
        return chosen if of_policy is chosen else Way.PADDED
    return chosen


def _cut(config: EvalConfig, device: torch.device, way: Way) -> Cut:
    if config.micro_batch_size != "auto":
        return by_size(int(config.micro_batch_size))
    return cut_by_tokens(ENOUGH_TOKENS.get(device.type, OTHERWISE), way)


def _known(
    key: str,
    data: PairData,
    batching: Batching,
    dtype: torch.dtype,
    reference: Reference,
    reporter: Reporter,
    signals: StopSignals,
) -> Reference:
    """The reference's log-probs, read from disk where a training run or an earlier evaluation has left them."""
    cache = ReferenceCache(cache_path(key))
    needed = windows(data.held_out)
    computed = complete_cache(cache, needed, batching, dtype, lambda: reference, reference, reporter, signals.poll)
    there = len(data.held_out) - computed
    reporter.say(f"reference log-probs: {there:,} of {len(data.held_out):,} were in {cache.path}")
    return CachedReference(cache)


def _load(subject: Subject, base: Any, dtype: torch.dtype, device: torch.device) -> tuple[Any, Reference]:
    policy = load_policy(subject, base, dtype, device)
    if subject.is_reward_model:
        return policy, NoReference()
    # The base under an adapter is the reference: the same weights need not be loaded twice.
    return policy, AdapterOffReference(policy) if subject.is_adapter else FrozenReference(base)


def _folder(config: EvalConfig, subject: Subject, data: str) -> Path:
    """Where the report goes: named after the data and the weights, so that two evaluations do not collide."""
    stem = Path(data.split(" ")[0].replace(":", "-")).name.split(".")[0]
    plain = "".join(c if c.isalnum() or c in "._-" else "_" for c in f"{stem}-{subject.label}")
    name = config.name or plain
    if config.output_dir is not None:
        return user_path(config.output_dir, StorageError, "output_dir") / name
    if subject.directory is not None:
        reports = subject.directory.path / "eval"
        if reports.is_symlink():
            raise CheckpointError(f"{safe_text(reports)}: is a symbolic link; name a place for reports with output_dir")
        return reports / name
    return Path("outputs") / "eval" / name


def _show_header(
    reporter: Reporter,
    subject: Subject,
    source: ModelSource,
    device: Decision,
    dtype: Decision,
    data: PairData,
    max_length: int,
    beta: float,
) -> None:
    reference = "the model under the adapter" if subject.is_adapter else safe_text(source.name)
    of_model = f"{safe_text(source.name)}, {source.origin}"
    rows = [
        ("reward model" if subject.is_reward_model else "policy", safe_text(subject.weights)),
        ("on", of_model) if subject.is_reward_model else ("reference", f"{reference} ({of_model})"),
        ("device", f"{device.value}: {device.reason}"),
        ("dtype", f"{str(dtype.value).removeprefix('torch.')}: {dtype.reason}"),
    ]
    if not subject.is_reward_model:
        rows.append(("beta", significant(beta) + ("" if subject.run else " (the checkpoint does not say)")))
    if subject.base.trust_remote_code:
        reporter.say("trust_remote_code=true: Python of the model's authors runs on this machine", style="red")
    for place, sentence in enumerate(data.held_out_report.sentences(max_length)):
        rows.append(("data" if place == 0 else "", sentence))
    reporter.facts(rows)
    reporter.say()


SHOWN = (
    ("accuracy", "rewards/accuracies"),
    ("margin", "rewards/margins"),
    ("loss", "loss"),
    ("reward of chosen", "rewards/chosen"),
    ("reward of rejected", "rewards/rejected"),
    ("log-prob change a token, chosen", "logps_change_per_token/chosen"),
    ("log-prob change a token, rejected", "logps_change_per_token/rejected"),
    ("accuracy without reference, policy", "accuracy_without_reference/policy"),
    ("accuracy without reference, reference", "accuracy_without_reference/reference"),
)


def _show_estimates(reporter: Reporter, estimates: dict[str, Estimate]) -> None:
    rows = []
    for label, name in SHOWN:
        if name not in estimates:
            continue
        estimate = estimates[name]
        interval = f"{significant(estimate.low)} to {significant(estimate.high)}"
        rows.append([label, significant(estimate.mean), interval])
    reporter.grid(["metric", "mean", "95% interval"], rows)
    reporter.say()


def _show_calibration(reporter: Reporter, bins: list[Bin]) -> None:
    """How often the model is right where it says how sure it is: beside each other, they should be the same."""
    if not bins:
        return
    rows = [
        [
            f"{one.low:.1f} to {one.high:.1f}",
            f"{one.confidence:.2f}",
            f"{one.right.mean:.2f}",
            f"{one.right.low:.2f} to {one.right.high:.2f}",
            f"{one.right.n:,}",
        ]
        for one in bins
    ]
    reporter.grid(["how sure", "mean", "right", "95% interval", "pairs"], rows)
    reporter.say(f"calibration error {significant(calibration_error(bins), 2)}")
    reporter.say()


def _answers(
    policy: Any,
    reference: Reference,
    encoder: PairEncoder,
    data: PairData,
    config: EvalConfig,
    device: torch.device,
    signals: StopSignals,
) -> list[list[str]]:
    """Held-out prompts with the greedy answers of reference and policy to them, as they are."""
    pairs = [text.pair for text in data.held_out_texts[: config.samples]]
    limit = config.max_new_tokens
    after = greedy_answers(policy, encoder, pairs, limit, device, signals.poll)
    if isinstance(reference, AdapterOffReference):
        with policy.disable_adapter():
            before = greedy_answers(policy, encoder, pairs, limit, device, signals.poll)
    else:
        assert isinstance(reference, FrozenReference)
        before = greedy_answers(reference.model, encoder, pairs, limit, device, signals.poll)
    prompts = [pair.messages[-1].content for pair in pairs]
    return [list(row) for row in zip(prompts, before, after, strict=True)]


def _show_answers(reporter: Reporter, answers: list[list[str]], limit: int) -> None:
    reporter.say(f"greedy answers to {plural(len(answers), 'held-out prompt')}, at most {limit} tokens")
    rows = [
        [safe_text(question, limit=200), safe_text(old, limit=700), safe_text(new, limit=700)]
        for question, old, new in answers
    ]
    reporter.side_by_side(["prompt", "reference (before)", "policy (after)"], rows)
    reporter.say()
