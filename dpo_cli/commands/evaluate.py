"""dpo-eval: score a finished run, checkpoint, adapter or model on preference pairs, without training."""

import math
import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dpo_cli.commands.on_ranks import on_every_rank
from dpo_cli.config.schema import FOR_EACH, DataConfig, EvalConfig, data_config, to_container
from dpo_cli.console.reporter import Reporter
from dpo_cli.console.text import interval, plural, safe_text, significant
from dpo_cli.data.batches import Layout, Split, SplitByPairs, SplitByTokens, longest_side
from dpo_cli.data.pairs import PairData, check_sources, load_pairs
from dpo_cli.data.splits import data_fingerprint
from dpo_cli.data.tokens import PairEncoder, TokenizedPair
from dpo_cli.engine.engine import Engine
from dpo_cli.errors import CheckpointError, ConfigError, StorageError
from dpo_cli.evaluation.page import page
from dpo_cli.evaluation.report import calibration_facts, write_report
from dpo_cli.evaluation.scores import Scorer, by_source, prompts_of, score_pairs, summarize, windows, with_sources
from dpo_cli.generation.generate import greedy_completions
from dpo_cli.models.dtype import Decision, choose_device
from dpo_cli.models.loading import (
    ModelSource,
    check_positions,
    find_model,
    load_model,
    load_tokenizer,
    model_fingerprint,
    same_weights,
)
from dpo_cli.models.logps import MicroBatcher
from dpo_cli.models.memory import enough_tokens
from dpo_cli.models.packing import remembered_layout
from dpo_cli.models.precompute import FillOptions, complete
from dpo_cli.models.reference import AdapterOffReference, FrozenReference, NoReference, Reference
from dpo_cli.models.reference_cache import CachedReference, ReferenceCache, cache_key, cache_path
from dpo_cli.paths import user_path
from dpo_cli.runs.manifest import settings_in
from dpo_cli.runs.model_ref import (
    ModelName,
    ModelRef,
    find_model_ref,
    load_policy,
    ref_dtype,
)
from dpo_cli.signals import StopSignals
from dpo_cli.theory.calibration import Bin, calibration_error, reliability
from dpo_cli.theory.statistics import Clusters, Estimate

REPORTS = (("report", "report.json"), ("pairs", "pairs.jsonl"), ("page", "report.html"))


def evaluate(config: EvalConfig, overrides: list[tuple[str, Any]], reporter: Reporter) -> Path:
    """Evaluate as the config says, with `overrides` of the run's own data options; returns the report's folder."""
    assert config.checkpoint is not None
    with on_every_rank(config, reporter) as (engine, reporter, signals):
        ref = find_model_ref(ModelName(config.checkpoint, config.reference_model, config.trust_remote_code))
        objective = ref.objective
        if config.samples and not objective.generates:
            raise ConfigError(f"samples={config.samples}: a reward model gives no answers; leave it out")
        options = _data_options(config, ref, overrides)
        check_sources(options)
        device = choose_device(config.device)
        dtype = engine.same(lambda: ref_dtype(ref, device.value))
        source = find_model(ref.base, reporter.say)
        reporter.doing(f"loading the tokenizer of {safe_text(source.name)}")
        encoder = PairEncoder.of(load_tokenizer(source), options, objective.always_closes)
        reporter.doing("reading pairs")
        data = _load_pairs(ref, options, encoder, engine, reporter, signals)
        reporter.stop()
        for _, report in data.reports():
            objective.check_soft_labels(report.soft_label_at)
        reporter.doing("loading the model")
        base = load_model(source, dtype.value, device.value)
        check_positions(base, max(map(longest_side, data.held_out)), options.max_length)
        fingerprint = model_fingerprint(base)
        if not engine.alone:
            engine.alike({"checkpoint": ref.weights, "model": fingerprint, "data": data_fingerprint(data.held_out)})
        _warn_of_other_weights(ref, config, dtype.value, fingerprint, reporter)
        policy, reference = _load(ref, base, dtype.value, device.value)
        layout = _layout(config, ref, policy, base, data.held_out, fingerprint, engine)
        batcher = MicroBatcher(device.value, layout, _split(config, device.value, layout))
        leaks, named = data.held_out_report.leaks, data.held_out_parts
        sentences = [
            f"{safe_text(name)}: {sentence}" if name else sentence
            for name, report in (named or {"": data.held_out_report}).items()
            for sentence in report.sentences(options.max_length)
        ]
        if leaks is None:
            sentences.append(
                f"whether they were trained on is not known: {safe_text(ref.weights)} keeps no record of it"
            )
        _show_header(reporter, ref, source, (device, dtype), sentences)
        if leaks:
            reporter.warn(leaks.warning)
        started = time.monotonic()
        known = reference
        if objective.needs_reference and config.reference_cache == "auto":
            key = cache_key(fingerprint, dtype.value, device.value, layout)
            known = _known(key, data.held_out, batcher, dtype.value, reference, (reporter, signals.poll, engine))
        reporter.start("pair", len(data.held_out))
        scorer = Scorer(policy, objective, known, batcher, engine)
        scores = score_pairs(scorer, data.held_out, signals.poll, reporter.advance)
        reporter.stop()
        seconds = time.monotonic() - started
        prompts = prompts_of(data.held_out)
        estimates = summarize(scores, objective, prompts)
        of_sources = by_source(scores, objective, data.held_out)
        margins = (objective.beta * scores.ratios.margin).tolist()
        labels = [pair.probability for pair in data.held_out]
        bins = reliability(margins, [pair.group for pair in data.held_out], labels) if objective.is_calibrated else []
        held_out_by_run = config.data is None and not overrides
        folder = _folder(config, ref, "held-out" if held_out_by_run else data.held_out_report.source)
        facts = {
            "checkpoint": ref.weights,
            "reference": source.name if objective.needs_reference else None,
            "data": data.held_out_report.as_dict(),
            **({"data_by_source": {name: report.as_dict() for name, report in named.items()}} if named else {}),
            "beta": objective.beta,
            "loss_name": ref.run.loss.name if ref.run else "sigmoid",
            "device": str(device.value),
            "dtype": str(dtype.value).removeprefix("torch."),
            "layout": layout.value,
            "prompts": prompts.prompts,
            "prompts_effective": prompts.effective,
            "pairs_per_second": len(data.held_out) / seconds,
            "seconds": seconds,
            **({"calibration": calibration_facts(bins)} if bins else {}),
        }
        _show_estimates(reporter, estimates)
        _show_sources(reporter, of_sources)
        if unknown := sum(not math.isfinite(margin) for margin in margins):
            reporter.warn(
                f"the scores of {unknown:,} of {plural(len(margins), 'pair')} are not finite, so no mean above holds: "
                "weights are damaged, or their dtype is too narrow"
            )
        reporter.say(describe_clusters(prompts))
        reporter.say()
        _show_calibration(reporter, bins)
        answers: list[list[str]] = []
        if config.samples:
            answers = _answers(policy, reference, encoder, data, config, device.value, engine, signals)
            _show_answers(reporter, answers, config.max_new_tokens)
        labelled = [(label, estimates[name]) for label, name in SHOWN if name in estimates]
        labelled += [
            (f"{label}, {source}", found[name])
            for source, (_, found) in of_sources.items()
            for label, name in OF_SOURCES
        ]
        title = f"{Path(ref.weights).name} on {data.held_out_report.source}"
        shown = {name: facts[name] for name in ("checkpoint", "reference", "beta", "loss_name", "device", "dtype")}
        about = "\n".join([*sentences, describe_clusters(prompts)])
        html = page(title, {**shown, "data": about}, labelled, margins, answers)
        signals.protect_saving()
        found = estimates | with_sources(of_sources)
        engine.same(lambda: write_report(folder, facts, found, data.held_out, scores, objective, html))
    reporter.facts([(name, str(folder / file)) for name, file in REPORTS])
    return folder


def _data_options(config: EvalConfig, ref: ModelRef, overrides: list[tuple[str, Any]]) -> Any:
    """The data to evaluate on: a chosen group, or what the run held out, with `data.*` overrides on top."""
    if config.data is not None:
        options = config.data
    elif ref.run is not None:
        container = to_container(ref.run)["data"]
        for key, value in overrides:
            _set(container, key, value)
            for source in container["sources"] if key.removeprefix("data.") in FOR_EACH else ():
                _set(container, f"data.sources.{source}.{key.removeprefix('data.')}", value)
        options = data_config(container)
    else:
        raise ConfigError(
            "data: an adapter or model holds nothing out; choose pairs, for instance data=jsonl data.eval=pairs.jsonl"
        )
    held_out = [part for part in options.parts().values() if options.eval is None]
    if options.eval is None and options.train is None and not options.sources:
        raise ConfigError("data.eval=null: name the pairs to evaluate on, for instance data.eval=pairs.jsonl")
    if options.train is None and not options.sources:
        options = replace(options, train=next(iter(options.held_out_sets().values())))
    if held_out and all((part.eval, part.eval_split, part.eval_fraction) == (None, None, 0) for part in held_out):
        raise ConfigError("data.eval_fraction=0: the run held nothing out; name pairs with data.eval=PATH")
    return options


def _load_pairs(
    ref: ModelRef, options: DataConfig, encoder: PairEncoder, engine: Engine, reporter: Reporter, signals: StopSignals
) -> PairData:
    """The pairs to evaluate on; rank 0 prepares what is not in the cache, and the others read it there."""
    seed = ref.run.seed if ref.run else 0
    trained_on = ref.directory.read_trained_on() if ref.directory else None

    def load(encoder: PairEncoder, poll: Callable[[], None]) -> PairData:
        return load_pairs(
            options, encoder, seed, held_out_only=True, trained_on=trained_on, poll=poll, working=reporter.bar
        )

    if engine.alone:
        return load(encoder, signals.poll)
    engine.same(lambda: load(copy(encoder), signals.poll_here) and None)
    return load(encoder, lambda: None)


def _set(data: dict[str, Any], key: str, value: Any) -> None:
    """Set a key of data in plain options; ConfigError for a source that the run does not have."""
    *groups, leaf = key.removeprefix("data.").split(".")
    options = data
    for group in groups:
        if not isinstance(options.get(group), dict) and group != "eval":
            raise ConfigError(f"{key}: the run's data has no {group} ({', '.join(data['sources']) or 'no sources'})")
        if not isinstance(options[group], dict):
            options[group] = {}  # held-out sets with names, in the place of one
        options = options[group]
    options[leaf] = value


def _warn_of_other_weights(
    ref: ModelRef, config: EvalConfig, dtype: torch.dtype, fingerprint: str, reporter: Reporter
) -> None:
    """Say so where the model under a run's adapter is not the one that the run was trained on."""
    facts = ref.directory.read_manifest() if ref.directory else {}
    model = facts.get("model")
    known = model.get("fingerprint") if isinstance(model, dict) else None
    same_dtype = facts.get("dtype") == str(dtype).removeprefix("torch.")
    if (
        isinstance(known, str)
        and same_dtype
        and config.reference_model is None
        and not same_weights(known, fingerprint)
    ):
        reporter.warn(f"{safe_text(ref.base.name_or_path)} holds other weights than when this run was trained on it")


def _layout(
    config: EvalConfig, ref: ModelRef, policy: Any, base: Any, pairs: Sequence[TokenizedPair], fingerprint: str,
    engine: Engine,
) -> Layout:  # fmt: skip
    """The layout that the run used, so that the numbers are its own; else one that both models can take."""
    device = next(base.parameters()).device
    settings = settings_in(ref.directory.read_manifest()) if ref.directory else None
    own = config.layout == "auto" and config.reference_model is None
    if own and settings is not None and settings.device == device.type:
        return Layout(settings.layout)
    chosen: Layout = remembered_layout(config.layout, base, pairs, device, fingerprint, engine=engine).value
    if not ref.is_adapter:
        own_fingerprint = model_fingerprint(policy)
        of_policy = remembered_layout(config.layout, policy, pairs, device, own_fingerprint, engine=engine).value
        return chosen if of_policy is chosen else Layout.PADDED
    return chosen


def _split(config: EvalConfig, device: torch.device, layout: Layout) -> Split:
    if config.micro_batch_size != "auto":
        return SplitByPairs(int(config.micro_batch_size))
    return SplitByTokens(enough_tokens(device), layout)


def _known(
    key: str,
    pairs: Sequence[TokenizedPair],
    batcher: MicroBatcher,
    dtype: torch.dtype,
    reference: Reference,
    command: tuple[Reporter, Callable[[], None], Engine],
) -> Reference:
    """The reference's log-probs, read from disk where a training run or an earlier evaluation has left them."""
    reporter, poll, engine = command
    cache = ReferenceCache(cache_path(key), engine)
    how = FillOptions(batcher, dtype, lambda: reference, reference, reporter, poll, engine)
    there = len(pairs) - complete(cache, list(windows(pairs)), how)
    reporter.say(f"reference log-probs: those of {there:,} of {len(pairs):,} pairs were in {cache.path}")
    return CachedReference(cache)


def _load(ref: ModelRef, base: Any, dtype: torch.dtype, device: torch.device) -> tuple[Any, Reference]:
    policy = load_policy(ref, base, dtype, device)
    if not ref.objective.needs_reference:
        return policy, NoReference()
    # The base under an adapter is the reference: the same weights need not be loaded twice.
    return policy, AdapterOffReference(policy) if ref.is_adapter else FrozenReference(base)


def _folder(config: EvalConfig, ref: ModelRef, data: str) -> Path:
    """Where the report goes: named after the data and the weights, so that two evaluations do not collide."""
    stem = Path(data.split(" ")[0].replace(":", "-")).name.split(".")[0]
    plain = "".join(c if c.isalnum() or c in "._-" else "_" for c in f"{stem}-{ref.label}")
    name = config.name or plain
    if config.output_dir is not None:
        return user_path(config.output_dir, StorageError, "output_dir") / name
    if ref.directory is not None:
        reports = ref.directory.path / "eval"
        if reports.is_symlink():
            raise CheckpointError(f"{safe_text(reports)}: is a symbolic link; name a place for reports with output_dir")
        return reports / name
    return Path("outputs") / "eval" / name


def _show_header(
    reporter: Reporter, ref: ModelRef, source: ModelSource, choices: tuple[Decision, Decision], data: list[str]
) -> None:
    device, dtype = choices
    of_model = f"{safe_text(source.name)}, {source.origin}"
    rows = [("reward model", safe_text(ref.weights)), ("on", of_model)]
    if ref.objective.needs_reference:
        reference = "the model under the adapter" if ref.is_adapter else safe_text(source.name)
        rows = [("policy", safe_text(ref.weights)), ("reference", f"{reference} ({of_model})")]
    rows += [
        ("device", f"{device.value}: {device.reason}"),
        ("dtype", f"{str(dtype.value).removeprefix('torch.')}: {dtype.reason}"),
    ]
    if ref.objective.needs_reference:
        known = "" if ref.run else " (the checkpoint does not say)"
        rows.append(("beta", significant(ref.objective.beta) + known))
    if ref.base.trust_remote_code:
        reporter.say("trust_remote_code=true: Python of the model's authors runs on this machine", style="red")
    rows += [("data" if number == 0 else "", sentence) for number, sentence in enumerate(data)]
    reporter.facts(rows)
    reporter.say()


SHOWN = (
    ("accuracy", "rewards/accuracies"),
    ("margin", "rewards/margins"),
    ("loss", "loss"),
    ("loss, lower than at the start by", "loss/improvement"),
    ("reward of chosen", "rewards/chosen"),
    ("reward of rejected", "rewards/rejected"),
    ("log-prob change a token, chosen", "logps_change_per_token/chosen"),
    ("log-prob change a token, rejected", "logps_change_per_token/rejected"),
    ("chosen more likely than rejected, by the policy", "accuracy_without_reference/policy"),
    ("chosen more likely than rejected, by the reference", "accuracy_without_reference/reference"),
)


def _show_estimates(reporter: Reporter, estimates: dict[str, Estimate]) -> None:
    rows = []
    for label, name in SHOWN:
        if name not in estimates:
            continue
        estimate = estimates[name]
        rows.append([label, significant(estimate.mean), interval(estimate.low, estimate.high)])
    reporter.grid(["metric", "mean", "95% interval"], rows)


OF_SOURCES = (("accuracy", "rewards/accuracies"), ("margin", "rewards/margins"), ("loss", "loss"))


def _show_sources(reporter: Reporter, of_sources: dict[str, tuple[int, dict[str, Estimate]]]) -> None:
    """A row for each source of the pairs, where they have one."""
    if not of_sources:
        return
    rows = []
    for source, (pairs, estimates) in of_sources.items():
        accuracy, margin, loss = (estimates[name] for _, name in OF_SOURCES)
        row = [source, f"{pairs:,}", significant(accuracy.mean), interval(accuracy.low, accuracy.high)]
        rows.append([*row, significant(margin.mean), interval(margin.low, margin.high), significant(loss.mean)])
    reporter.say()
    reporter.grid(["source", "pairs", "accuracy", "95% interval", "margin", "95% interval", "loss"], rows)


def describe_clusters(prompts: Clusters) -> str:
    """What the intervals count as independent."""
    pairs, number = plural(prompts.pairs, "pair"), plural(prompts.prompts, "prompt")
    if prompts.prompts == prompts.pairs:
        return f"{pairs}, each with its own prompt"
    if prompts.prompts == 1:
        return f"{pairs} of {number}: too little for an interval"
    effective = f"effective number {prompts.effective:.1f}"
    return f"{pairs} of {number}; the intervals take prompts as independent, not pairs ({effective})"


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
    engine: Engine,
    signals: StopSignals,
) -> list[list[str]]:
    """Held-out prompts with the greedy answers of reference and policy to them, as they are."""
    pairs = [text.pair for text in data.held_out_texts[: config.samples]]
    how = config.max_new_tokens, device, signals.poll, engine
    after = greedy_completions(policy, encoder, pairs, *how)
    if isinstance(reference, AdapterOffReference):
        with policy.disable_adapter():
            before = greedy_completions(policy, encoder, pairs, *how)
    else:
        assert isinstance(reference, FrozenReference)
        before = greedy_completions(reference.model, encoder, pairs, *how)
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
