"""dpo-eval: score a finished run, checkpoint, adapter or model on preference pairs, without training."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dpo_cli.config import EvalConfig, ModelConfig, RunConfig, data_config, read_config, to_container
from dpo_cli.console.reporter import Reporter
from dpo_cli.console.text import plural, safe_text, significant
from dpo_cli.data.batches import Cut, by_size
from dpo_cli.data.pairs import PairData, check_sources, load_pairs
from dpo_cli.data.tokens import PairEncoder
from dpo_cli.errors import CheckpointError, ConfigError, StorageError
from dpo_cli.evaluation.generate import greedy_answers
from dpo_cli.evaluation.page import page
from dpo_cli.evaluation.report import write_page, write_report
from dpo_cli.evaluation.scores import score_pairs, summarize, windows
from dpo_cli.models.loading import (
    START_FILE,
    Decision,
    ModelSource,
    choose_device,
    choose_dtype,
    find_model,
    load_adapter,
    load_model,
    load_tokenizer,
    model_digest,
    same_weights,
)
from dpo_cli.models.logps import Batching, Way
from dpo_cli.models.memory import ENOUGH_TOKENS, OTHERWISE
from dpo_cli.models.packing import remembered_way
from dpo_cli.models.reference import AdapterOffReference, FrozenReference, Reference
from dpo_cli.models.reference_cache import (
    CachedReference,
    ReferenceCache,
    cache_path,
    values_key,
)
from dpo_cli.paths import user_path
from dpo_cli.theory.losses import Objective, make_objective
from dpo_cli.theory.statistics import Estimate
from dpo_cli.training.checkpoint import newest_valid, read_json, validate
from dpo_cli.training.preparation import complete_cache, cut_by_tokens
from dpo_cli.training.reproduce import settled_in
from dpo_cli.training.run_directory import RunDirectory
from dpo_cli.training.signals import StopSignals

DEFAULT_BETA = 0.1
REPORTS = (("report", "report.json"), ("pairs", "pairs.jsonl"), ("page", "report.html"))


@dataclass(frozen=True)
class Subject:
    """What is evaluated: the weights, the run they came from, and the model they are held to."""

    weights: str  # an adapter directory, a model directory or a hub id
    is_adapter: bool
    base: ModelConfig  # the reference, and what an adapter sits on
    run: RunConfig | None
    directory: RunDirectory | None
    label: str  # for the report's folder: `final`, `step-00000100`, ...


def find_subject(config: EvalConfig) -> Subject:
    """Read what `checkpoint` names; CheckpointError where there is nothing, or nothing that can be evaluated."""
    assert config.checkpoint is not None
    name = config.checkpoint
    path = user_path(name, CheckpointError, "checkpoint")
    if not path.exists() and not name.startswith((".", "/", "~")) and name.count("/") == 1 and not path.parent.is_dir():
        return _model_subject(name, config)
    if not path.is_dir():
        raise CheckpointError(
            f"checkpoint={safe_text(name)}: no such directory; name a run directory, checkpoints/step-*, final/, "
            "a PEFT adapter directory or a model"
        )
    path = path.resolve()
    if (path / "checkpoints").is_dir() or (path / "final").is_dir():
        return _run_subject(RunDirectory(path), None, config)
    if path.parent.name == "checkpoints" and (path.parent.parent / "config.yaml").is_file():
        validate(path)
        return _run_subject(RunDirectory(path.parent.parent), path, config)
    if path.name == "final" and (path.parent / "config.yaml").is_file():
        return _run_subject(RunDirectory(path.parent), path, config)
    if (path / "adapter_config.json").is_file():
        return _adapter_subject(path, config)
    if (path / "config.json").is_file():
        return _model_subject(str(path), config)
    raise CheckpointError(
        f"checkpoint={safe_text(name)}: neither a run, nor a checkpoint, adapter or model "
        "(no checkpoints/, adapter_config.json or config.json in it)"
    )


def _run_subject(directory: RunDirectory, weights: Path | None, config: EvalConfig) -> Subject:
    run = read_config(directory.config)
    if weights is None:
        weights = directory.final if directory.finished else newest_valid(directory.checkpoints)[0]
    if weights is None:
        raise CheckpointError(f"checkpoint={safe_text(directory.path)}: this run has no complete checkpoint yet")
    is_adapter = (weights / "adapter_config.json").is_file()
    base = (
        run.model
        if config.reference_model is None
        else replace(run.model, name_or_path=config.reference_model, adapter=None)
    )
    if run.model.trust_remote_code and not config.trust_remote_code:
        raise ConfigError(
            f"checkpoint={safe_text(directory.path)}: its config trusts the Python of its model's authors; "
            "whether you do is not for a file to say: add trust_remote_code=true"
        )
    base = replace(base, trust_remote_code=config.trust_remote_code)
    if is_adapter and config.reference_model is not None:
        raise ConfigError(
            f"reference_model={safe_text(config.reference_model)}: an adapter is compared with the model it sits on "
            f"({safe_text(run.model.name_or_path)}); leave reference_model unset"
        )
    return Subject(str(weights), is_adapter, base, run, directory, weights.name)


def _adapter_subject(path: Path, config: EvalConfig) -> Subject:
    try:
        base = read_json(path / "adapter_config.json")["base_model_name_or_path"]
    except (KeyError, TypeError):
        raise CheckpointError(f"{safe_text(path / 'adapter_config.json')}: names no base model") from None
    start = replace(_plain_model(config.reference_model or str(base), config), adapter=_sft_adapter(path))
    return Subject(str(path), True, start, None, None, path.name)


def _sft_adapter(path: Path) -> str | None:
    """The SFT adapter that was folded into the base before this adapter was trained."""
    if not (path / START_FILE).exists():
        return None
    note = read_json(path / START_FILE)
    if not isinstance(note, dict):
        raise CheckpointError(f"{safe_text(path / START_FILE)}: is not what this program writes")
    found = note.get("sft_adapter")
    return str(found) if found else None


def _model_subject(name: str, config: EvalConfig) -> Subject:
    if config.reference_model is None:
        raise ConfigError(
            f"checkpoint={safe_text(name)}: a whole model does not say what it was tuned from; "
            "add reference_model=<the SFT model>"
        )
    return Subject(name, False, _plain_model(config.reference_model, config), None, None, Path(name).name)


def _plain_model(name: str, config: EvalConfig) -> ModelConfig:
    trusted = config.trust_remote_code
    return ModelConfig(name_or_path=name, revision=None, dtype="auto", adapter=None, trust_remote_code=trusted)


def evaluate(config: EvalConfig, overrides: list[tuple[str, Any]], reporter: Reporter) -> Path:
    """Evaluate as the config says, with `overrides` of the run's own data dials; returns the report's folder."""
    subject = find_subject(config)
    data_dials = _data_dials(config, subject, overrides)
    check_sources(data_dials)
    beta = subject.run.beta if subject.run else DEFAULT_BETA
    objective = _objective(subject, beta)
    with StopSignals(reporter.warn) as signals:
        device = choose_device(config.device)
        dtype = _dtype(subject, device.value)
        source = find_model(subject.base, reporter.say)
        encoder = PairEncoder(load_tokenizer(source), data_dials.template)
        seed = subject.run.seed if subject.run else 0
        data = load_pairs(data_dials, encoder, seed, held_out_only=True, poll=signals.poll)
        base = load_model(source, dtype.value, device.value)
        digest = model_digest(base)
        _warn_of_other_weights(subject, config, dtype.value, digest, reporter)
        policy, reference = _load(subject, base, dtype.value, device.value)
        way = _way(config, subject, policy, base, data, device.value, digest)
        key = values_key(digest, dtype.value, device.value, way) if config.reference_cache == "auto" else None
        _show_header(reporter, subject, source, device, dtype, data, data_dials.max_length, beta)
        started = time.monotonic()
        batching = Batching(device.value, way, _cut(config, device.value, way))
        known = _known(key, data, batching, dtype.value, reference, reporter, signals) if key else reference
        reporter.start("pair", len(data.held_out))
        scores = score_pairs(policy, known, data.held_out, batching, signals.poll, reporter.advance)
        reporter.stop()
        seconds = time.monotonic() - started
        estimates = summarize(scores, objective, beta)
        held_out_by_run = config.data is None and not overrides
        folder = _folder(config, subject, "held-out" if held_out_by_run else data.held_out_report.source)
        facts = {
            "checkpoint": subject.weights,
            "reference": source.name,
            "data": data.held_out_report.as_dict(),
            "beta": beta,
            "loss_name": subject.run.loss.name if subject.run else "sigmoid",
            "device": str(device.value),
            "dtype": str(dtype.value).removeprefix("torch."),
            "way": way.value,
            "pairs_per_second": len(data.held_out) / seconds,
            "seconds": seconds,
        }
        write_report(folder, facts, estimates, data.held_out, scores, beta)
        _show_estimates(reporter, estimates)
        answers: list[list[str]] = []
        if config.samples:
            answers = _answers(policy, reference, encoder, data, config, device.value, signals)
            _show_answers(reporter, answers, config.max_new_tokens)
        margins = (beta * scores.ratios.margin).tolist()
        labelled = [(label, estimates[name]) for label, name in SHOWN]
        title = f"{Path(subject.weights).name} on {data.held_out_report.source}"
        shown = {name: facts[name] for name in ("checkpoint", "reference", "beta", "loss_name", "device", "dtype")}
        sentences = {"data": "\n".join(data.held_out_report.sentences(data_dials.max_length))}
        write_page(folder, page(title, {**shown, **sentences}, labelled, margins, answers))
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


def _dtype(subject: Subject, device: torch.device) -> Decision:
    """The dtype the run was trained in, so that the numbers are the run's own; else chosen anew."""
    settled = settled_in(subject.directory.read_manifest()) if subject.directory else None
    if settled is not None and settled.device == device.type:
        return Decision(getattr(torch, settled.dtype), "as in training")
    return choose_dtype(subject.base.dtype, device, lora=True)


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
    if subject.is_adapter:
        # The base under the adapter is the reference: the same weights need not be loaded twice.
        policy = load_adapter(base, subject.weights).eval()
        return policy, AdapterOffReference(policy)
    whole = replace(subject.base, name_or_path=subject.weights, revision=None, adapter=None)
    policy = load_model(find_model(whole), dtype, device)
    return policy, FrozenReference(base)


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
    rows = [
        ("policy", safe_text(subject.weights)),
        ("reference", f"{reference} ({safe_text(source.name)}, {source.origin})"),
        ("device", f"{device.value}: {device.reason}"),
        ("dtype", f"{str(dtype.value).removeprefix('torch.')}: {dtype.reason}"),
        ("beta", significant(beta) + ("" if subject.run else " (the checkpoint does not say)")),
    ]
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
        estimate = estimates[name]
        interval = f"{significant(estimate.low)} to {significant(estimate.high)}"
        rows.append([label, significant(estimate.mean), interval])
    reporter.grid(["metric", "mean", "95% interval"], rows)
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
