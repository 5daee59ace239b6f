"""dpo-eval: score a finished run, checkpoint, adapter or model on preference pairs, without training."""

import math
import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dpo_cli.commands.harness import Harness
from dpo_cli.commands.on_ranks import on_every_rank
from dpo_cli.config.schema import FOR_EACH, DataConfig, EvalConfig, data_config, to_container
from dpo_cli.console.labels import SCALES
from dpo_cli.console.reporter import Reporter
from dpo_cli.console.text import plural, safe_text
from dpo_cli.data.batches import Layout, Split, SplitByPairs, SplitByTokens, longest_side
from dpo_cli.data.pairs import PairData, check_sources, load_pairs
from dpo_cli.data.splits import data_fingerprint
from dpo_cli.data.tokens import PairEncoder, TokenizedPair
from dpo_cli.engine.engine import Engine
from dpo_cli.errors import CheckpointError, ConfigError, StorageError
from dpo_cli.evaluation.report import calibration_facts, lines_of, report_of, write_report
from dpo_cli.evaluation.scores import (
    ScoredPairs,
    Scorer,
    by_source,
    prompts_of,
    score_pairs,
    summarize,
    windows,
    with_sources,
)
from dpo_cli.evaluation.summary import summary_of
from dpo_cli.evaluation.token_ratios import best_and_worst, pieces_of, token_ratios
from dpo_cli.evaluation.view import (
    describe_clusters,
    show_answers,
    show_calibration,
    show_estimates,
    show_header,
    show_measured,
    show_scales,
    show_sources,
)
from dpo_cli.generation.answers import Answer, MeasuredAnswers, asked_prompts, measure_answers
from dpo_cli.generation.generate import greedy_completions
from dpo_cli.models.adapters import adapter_off, adapter_scale
from dpo_cli.models.dtype import Decision, choose_device, dtype_name
from dpo_cli.models.loading import (
    ModelSource,
    check_positions,
    find_model,
    load_model,
    load_tokenizer,
    model_fingerprint,
    position_limit,
    same_weights,
)
from dpo_cli.models.logps import MicroBatcher, causal_model
from dpo_cli.models.memory import enough_tokens
from dpo_cli.models.packing import remembered_layout
from dpo_cli.models.precompute import FillOptions, complete
from dpo_cli.models.reference import AdapterOffReference, FrozenReference, NoReference, Reference
from dpo_cli.models.reference_cache import CachedReference, ReferenceCache, cache_key, cache_path
from dpo_cli.objectives.objective import Objective
from dpo_cli.pages.pages import evaluation_page
from dpo_cli.paths import user_path
from dpo_cli.runs.manifest import base_fingerprint, settings_in, weights_sha256
from dpo_cli.runs.model_ref import (
    ModelName,
    ModelRef,
    find_model_ref,
    load_policy,
    ref_dtype,
)
from dpo_cli.signals import StopSignals
from dpo_cli.theory.calibration import Bin, reliability
from dpo_cli.theory.statistics import Clusters, Estimate

REPORTS = (("report", "report.json"), ("pairs", "pairs.jsonl"), ("page", "report.html"))


@dataclass(frozen=True)
class Subject:
    """What is evaluated, loaded: a policy with its reference, and the pairs; and what the work is done with."""

    config: EvalConfig
    engine: Engine
    reporter: Reporter
    signals: StopSignals
    ref: ModelRef
    source: ModelSource
    device: Decision
    dtype: Decision
    encoder: PairEncoder
    options: DataConfig
    data: PairData
    fingerprint: str  # of the reference's weights
    policy: Any
    reference: Reference
    batcher: MicroBatcher
    harness: Harness | None  # None: no benchmark is requested

    @property
    def objective(self) -> Objective:
        """What the policy was trained for."""
        return self.ref.objective


@dataclass(frozen=True)
class Scored:
    """What the scores of the pairs say."""

    scorer: Scorer
    scores: ScoredPairs
    prompts: Clusters
    estimates: dict[str, Estimate]
    of_sources: dict[str, tuple[int, dict[str, Estimate]]]
    bins: list[Bin]  # of the calibration; none where rewards claim no probability
    unknown: int  # pairs whose margin is not finite
    seconds: float  # that scoring took, with the reference log-probs that were not on disk


def evaluate(config: EvalConfig, overrides: list[tuple[str, Any]], reporter: Reporter) -> Path:
    """Evaluate as the config says, with `overrides` of the run's own data options; returns the report's folder."""
    with on_every_rank(config, reporter) as (engine, reporter, signals):
        subject = _load(config, overrides, engine, reporter, signals)
        report_of_data = subject.data.held_out_report
        show_header(reporter, subject.ref, subject.source, (subject.device, subject.dtype), _about_data(subject))
        if report_of_data.leaks:
            reporter.warn(report_of_data.leaks.warning)
        found = _score(subject)
        _show_scored(reporter, found)
        answers = _answers(subject)
        show_answers(reporter, answers, config.max_new_tokens)
        measured = _measure(subject)
        show_measured(reporter, measured.estimates, len(measured.rows), config.max_new_tokens)
        scales = [_at_scale(scale, subject, found.scorer, measured) for scale in config.scales]
        show_scales(reporter, scales)
        benchmarks = _benchmarks(subject)
        estimates = found.estimates | measured.estimates
        summary = summary_of(estimates, found.prompts, report_of_data.leaks, found.unknown)
        reporter.say(f"verdict  {summary['color']}: {summary['text']}", style=summary["color"])
        facts = {
            **_facts(subject, found),
            "summary": summary,
            **({"calibration": calibration_facts(found.bins)} if found.bins else {}),
            **({"samples/n": len(measured.rows)} if measured.rows else {}),
            **({"scales": scales} if scales else {}),
            **benchmarks,
        }
        report = report_of(facts, estimates | with_sources(found.of_sources), len(subject.data.held_out))
        lines = lines_of(subject.data.held_out, found.scores, subject.objective)
        held_out_by_run = config.data is None and not overrides
        folder = _folder(config, subject.ref, "held-out" if held_out_by_run else report_of_data.source)

        def write() -> None:
            page = evaluation_page(report, lines, _examples(subject, lines), answers)
            write_report(folder, report, lines, measured.rows, page)

        reporter.doing("writing the report")
        signals.protect_saving()
        engine.same(write)
    reporter.facts([(name, str(folder / file)) for name, file in REPORTS])
    return folder


def _score(subject: Subject) -> Scored:
    """Score the pairs, and everything that follows from their scores."""
    pairs, objective, reporter = subject.data.held_out, subject.objective, subject.reporter
    started = time.monotonic()
    scorer = _scorer(subject)
    reporter.start("pair", len(pairs))
    scores = score_pairs(scorer, pairs, subject.signals.poll, reporter.advance)
    reporter.stop()
    seconds = time.monotonic() - started
    prompts = prompts_of(pairs)
    margins = (objective.beta * scores.ratios.margin).tolist()
    labels = [pair.probability for pair in pairs]
    bins = reliability(margins, [pair.group for pair in pairs], labels) if objective.is_calibrated else []
    unknown = sum(not math.isfinite(margin) for margin in margins)
    estimates, of_sources = summarize(scores, objective, prompts), by_source(scores, objective, pairs)
    return Scored(scorer, scores, prompts, estimates, of_sources, bins, unknown, seconds)


def _show_scored(reporter: Reporter, found: Scored) -> None:
    show_estimates(reporter, found.estimates)
    show_sources(reporter, found.of_sources)
    if found.unknown:
        reporter.warn(
            f"the scores of {found.unknown:,} of {plural(found.prompts.pairs, 'pair')} are not finite, so no mean "
            "above holds: weights are damaged, or their dtype is too narrow"
        )
    reporter.say(describe_clusters(found.prompts))
    reporter.say()
    show_calibration(reporter, found.bins)


def _facts(subject: Subject, found: Scored) -> dict[str, Any]:
    """What was evaluated, on what and how, for report.json."""
    ref, data = subject.ref, subject.data
    parts = {name: report.as_dict() for name, report in data.held_out_parts.items()}
    return {
        "checkpoint": ref.weights,
        "weights_sha256": weights_sha256(Path(ref.weights)),
        "reference": subject.source.name if subject.objective.needs_reference else None,
        "data": data.held_out_report.as_dict(),
        **({"data_by_source": parts} if parts else {}),
        "beta": subject.objective.beta,
        "loss_name": ref.run.loss.name if ref.run else "sigmoid",
        "loss_options": _loss_options(ref),
        "device": str(subject.device.value),
        "dtype": dtype_name(subject.dtype.value),
        "layout": subject.batcher.layout.value,
        "prompts": found.prompts.prompts,
        "prompts_effective": found.prompts.effective,
        "pairs_per_second": len(data.held_out) / found.seconds,
        "seconds": found.seconds,
    }


def _load(
    config: EvalConfig, overrides: list[tuple[str, Any]], engine: Engine, reporter: Reporter, signals: StopSignals
) -> Subject:
    """Find, check and load what the config names."""
    assert config.checkpoint is not None
    ref = find_model_ref(ModelName(config.checkpoint, config.reference_model, config.trust_remote_code))
    objective = ref.objective
    _check_generation(config, ref)
    options = _data_options(config, ref, overrides)
    check_sources(options)
    harness = Harness(config, reporter) if config.harness else None
    if harness is not None:
        engine.same(harness.load)
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
    policy, reference = _load_models(ref, base, dtype.value, device.value)
    layout = _layout(config, ref, policy, base, data.held_out, fingerprint, engine)
    batcher = MicroBatcher(device.value, layout, _split(config, device.value, layout))
    return Subject(
        config, engine, reporter, signals, ref, source, device, dtype, encoder, options, data, fingerprint, policy,
        reference, batcher, harness,
    )  # fmt: skip


def _check_generation(config: EvalConfig, ref: ModelRef) -> None:
    """ConfigError for what a reward model or a whole model cannot do."""
    for key in ("samples", "scales", "harness"):
        if getattr(config, key) and not ref.objective.generates:
            raise ConfigError(f"{key}={getattr(config, key)}: a reward model gives no answers; leave it out")
    if config.scales and not ref.is_adapter:
        raise ConfigError(f"scales={config.scales}: a whole model has no adapter to scale; leave it out")


def _benchmarks(subject: Subject) -> dict[str, Any]:
    """What the benchmarks find, for report.json; rank 0 alone runs them, and the others wait."""
    if subject.harness is None:
        return {}
    engine, signals, measure = subject.engine, subject.signals, subject.harness.measure
    poll = signals.poll if engine.alone else signals.poll_here
    found: dict[str, Any] = engine.same(lambda: measure(subject.policy, subject.reference, subject.encoder, poll))
    signals.poll()
    return found


def _about_data(subject: Subject) -> list[str]:
    """What the pairs are, and what is known of their being trained on."""
    data = subject.data
    named = data.held_out_parts or {"": data.held_out_report}
    sentences = [
        f"{safe_text(name)}: {sentence}" if name else sentence
        for name, report in named.items()
        for sentence in report.sentences(subject.options.max_length)
    ]
    if data.held_out_report.leaks is None:
        sentences.append(
            f"whether they were trained on is not known: {safe_text(subject.ref.weights)} keeps no record of it"
        )
    return sentences


def _scorer(subject: Subject) -> Scorer:
    """What scores the pairs: with the reference's log-probs from disk, where they may be kept."""
    objective, reference = subject.objective, subject.reference
    if objective.needs_reference and subject.config.reference_cache == "auto":
        reference = _cached_reference(subject)
    return Scorer(subject.policy, objective, reference, subject.batcher, subject.engine)


def _examples(subject: Subject, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best and the worst pairs for the page, token by token; `lines` are those of pairs.jsonl."""
    margins = [math.nan if line["margin"] is None else line["margin"] for line in lines]
    pairs, decode = subject.data.held_out, subject.encoder.tokenizer.decode
    chosen = best_and_worst(margins)
    some = [pairs[index] for _, index in chosen]
    ratios: list[tuple[list[float], ...]] = [([], []) for _ in some]
    if isinstance(subject.reference, AdapterOffReference | FrozenReference):
        ratios = [*token_ratios(subject.policy, subject.reference, subject.batcher, some)]
    found = []
    for (kind, index), pair, of_tokens in zip(chosen, some, ratios, strict=True):
        example = {"kind": kind, "margin": margins[index], "prompt": decode(pair.prompt.tolist())}
        example |= {"source": pair.source} if pair.source else {}
        sides = zip(("chosen", "rejected"), pair.responses, pair.unscored, of_tokens, strict=True)
        for name, ids, unscored, values in sides:
            before = int(pair.prompt[-1])
            example[name] = (
                pieces_of(decode, before, ids, unscored, values) if values else [[decode(ids.tolist()), None]]
            )
        found.append(example)
    return found


def _measure(subject: Subject, of_reference: Sequence[Answer] | None = None) -> MeasuredAnswers:
    """What the policy writes beside the reference, on the first prompts; empty where it is not requested.

    `of_reference` are the reference's answers where they are known: it never moves.
    """
    config, reporter = subject.config, subject.reporter
    limit = position_limit(causal_model(subject.policy))
    longest = None if limit is None else limit + 1 - config.max_new_tokens
    asked = config.kl_samples if subject.objective.generates else 0
    prompts = asked_prompts(subject.data, subject.encoder, asked, longest)
    if not prompts:
        if asked and of_reference is None:
            reporter.warn(
                f"max_new_tokens={config.max_new_tokens}: no held-out prompt leaves room for so many within the "
                f"{limit:,} positions of this model, so kl_samples={asked} answers none"
            )
        return MeasuredAnswers({})
    scorer = Scorer(subject.policy, subject.objective, subject.reference, subject.batcher, subject.engine)
    seed = subject.ref.run.seed if subject.ref.run else 0
    advance = reporter.bar("answer", len(prompts) * (1 if of_reference else 2))
    poll = subject.signals.poll
    measured = measure_answers(
        scorer, subject.encoder, prompts, config.max_new_tokens, seed, poll, of_reference, advance
    )
    reporter.stop()
    return measured


def _at_scale(scale: float, subject: Subject, scorer: Scorer, as_trained: MeasuredAnswers) -> dict[str, Any]:
    """The metrics and answers of the policy with its adapter at a scale, for report.json."""
    with adapter_scale(subject.policy, scale):
        scores = score_pairs(scorer, subject.data.held_out, subject.signals.poll)
        found = summarize(scores, subject.objective, prompts_of(subject.data.held_out))
        measured = as_trained if scale == 1 else _measure(subject, as_trained.of_reference)
        found |= measured.estimates
        answers = _greedy(subject, subject.policy)
    return {
        "scale": scale,
        **{name: found[name].triple() for _, name in SCALES if name in found},
        **({"answers": answers} if answers else {}),
    }


def _loss_options(ref: ModelRef) -> dict[str, float]:
    """The hyperparameters of the loss that are set: with the same ones, losses can be compared."""
    options = asdict(ref.run.loss) if ref.run else {}
    return {name: value for name, value in options.items() if name != "name" and value}


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
    manifest = ref.directory.read_manifest() if ref.directory else {}
    known, same_dtype = base_fingerprint(manifest), manifest.get("dtype") == dtype_name(dtype)
    if known and same_dtype and config.reference_model is None and not same_weights(known, fingerprint):
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


def _cached_reference(subject: Subject) -> Reference:
    """The reference's log-probs, read from disk where a training run or an earlier evaluation has left them."""
    pairs, batcher, dtype, reference = subject.data.held_out, subject.batcher, subject.dtype.value, subject.reference
    key = cache_key(subject.fingerprint, dtype, batcher.device, batcher.layout)
    cache = ReferenceCache(cache_path(key), subject.engine)
    reporter, poll = subject.reporter, subject.signals.poll
    how = FillOptions(batcher, dtype, lambda: reference, reference, reporter, poll, subject.engine)
    there = len(pairs) - complete(cache, list(windows(pairs)), how)
    reporter.say(f"reference log-probs: those of {there:,} of {len(pairs):,} pairs were in {cache.path}")
    return CachedReference(cache)


def _load_models(ref: ModelRef, base: Any, dtype: torch.dtype, device: torch.device) -> tuple[Any, Reference]:
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


def _answers(subject: Subject) -> list[dict[str, str]]:
    """Held-out prompts with the greedy answers of reference and policy to them, as they are."""
    after = _greedy(subject, subject.policy)
    if isinstance(subject.reference, AdapterOffReference):
        with adapter_off(subject.policy):
            before = _greedy(subject, subject.policy)
    else:
        before = _greedy(subject, getattr(subject.reference, "model", None))
    prompts = [text.pair.messages[-1].content for text in subject.data.held_out_texts[: subject.config.samples]]
    rows = zip(prompts, before, after, strict=True)
    return [{"prompt": prompt, "reference": old, "policy": new} for prompt, old, new in rows]


def _greedy(subject: Subject, model: Any) -> list[str]:
    """The model's greedy answers to the first `samples` held-out prompts."""
    config = subject.config
    pairs = [text.pair for text in subject.data.held_out_texts[: config.samples]]
    how = config.max_new_tokens, subject.batcher.device, subject.signals.poll, subject.engine
    return greedy_completions(model, subject.encoder, pairs, *how) if pairs else []
