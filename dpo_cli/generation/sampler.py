"""A loaded model that completes prompts, batch by batch; batches in the job log are not generated again."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch

from dpo_cli.config.schema import GenerationConfig, SampleConfig
from dpo_cli.console.reporter import Reporter
from dpo_cli.console.text import plural, safe_text, significant
from dpo_cli.data.formats import FinishReason
from dpo_cli.data.tokens import PairEncoder
from dpo_cli.engine.engine import SINGLE, Engine, in_turns
from dpo_cli.errors import ConfigError
from dpo_cli.generation.batch_probe import batch_invariant
from dpo_cli.generation.decoding import SamplingParams, max_batch_size
from dpo_cli.generation.generate import CompletionText, distinct_completions, prompt_batches
from dpo_cli.models.dtype import Decision, choose_device, choose_dtype
from dpo_cli.models.loading import (
    ModelSource,
    find_model,
    load_model,
    load_tokenizer,
    model_fingerprint,
)
from dpo_cli.runs.model_ref import (
    ModelName,
    ModelRef,
    find_model_ref,
    load_policy,
    ref_dtype,
    ref_encoder,
)
from dpo_cli.storage.job_log import JobLog

LOG_KEYS = ("model_index", "batch_size", "seconds", "completions")  # of a line of the job log


@dataclass(frozen=True)
class GenerationModel:
    """A loaded model, with what its completions depend on."""

    name: str
    model: Any
    encoder: PairEncoder
    digest: str  # of its weights, an adapter's included
    device: torch.device
    dtype: Decision
    source: ModelSource


@dataclass(frozen=True)
class GenerationOptions:
    """How completions are generated."""

    n: int  # completions of each prompt, all different
    params: SamplingParams
    seed: int
    batch_size: int | None  # completions in one batch; None: as many as memory allows


def describe_generation(config: GenerationConfig) -> str:
    """The sampling parameters, for a header."""
    how = f"temperature {significant(config.temperature)}, top_p {significant(config.top_p)}"
    return f"{how}, at most {plural(config.max_new_tokens, 'token')}, seed {config.seed}"


def generation_options(config: GenerationConfig, n: int) -> GenerationOptions:
    """The options of a command that generates `n` completions of each prompt."""
    params = SamplingParams(config.max_new_tokens, config.temperature, config.top_p)
    return GenerationOptions(n, params, config.seed, None if config.batch_size == "auto" else int(config.batch_size))


def load_generation_model(config: SampleConfig, reporter: Reporter, engine: Engine = SINGLE) -> GenerationModel:
    """Load the model that the config names, or the checkpoint's policy."""
    device = choose_device(config.device)
    if config.checkpoint is None:
        reporter.doing(f"loading the model {safe_text(config.model.name_or_path)}")
        source = find_model(config.model, reporter.say)
        encoder = PairEncoder(load_tokenizer(source), config.template)
        dtype = engine.same(lambda: choose_dtype(config.model.dtype, device.value, lora=True))
        model = load_model(source, dtype.value, device.value)
        return GenerationModel(source.name, model, encoder, model_fingerprint(model), device.value, dtype, source)
    asked = ModelName(config.checkpoint, None, config.trust_remote_code, alone=True)
    return load_checkpoint_model(find_model_ref(asked), config.template, device.value, reporter, engine)


def load_checkpoint_model(
    ref: ModelRef, template: str | None, device: torch.device, reporter: Reporter, engine: Engine = SINGLE
) -> GenerationModel:
    """Load the policy of a run, checkpoint or adapter, or a model; ConfigError for a reward model."""
    if not ref.objective.generates:
        raise ConfigError(f"{safe_text(ref.weights)}: is a reward model, which generates no text; name a policy")
    reporter.doing(f"loading {safe_text(ref.weights)}")
    dtype = engine.same(lambda: ref_dtype(ref, device))
    source = find_model(ref.base, reporter.say)
    encoder = ref_encoder(ref, template)
    base = load_model(source, dtype.value, device) if ref.is_adapter else None
    model = load_policy(ref, base, dtype.value, device)
    return GenerationModel(ref.weights, model, encoder, model_fingerprint(model), device, dtype, source)


def probe_batches(
    model: GenerationModel, prompts: Sequence[list[int]], options: GenerationOptions, poll: Callable[[], None]
) -> Decision:
    """Whether completions of these prompts depend on the batch size here, by a probe of the largest batch."""
    largest = max_batch_size(model.model, max(map(len, prompts)), options.params, model.device)
    rows = min(len(prompts) * options.n, max(largest, options.batch_size or 1))
    dtype = str(model.dtype.value).removeprefix("torch.")
    if batch_invariant(model.model, prompts, rows, model.device, poll):
        return Decision(True, f"changes no completion here: logits are the same alone and among {plural(rows, 'row')}")
    return Decision(
        False,
        f"may change single tokens here: in {dtype} on {model.device} logits depend on the other rows of a batch",
    )


def generate_all(
    model: GenerationModel,
    prompts: Sequence[list[int]],
    options: GenerationOptions,
    log: JobLog,
    reporter: Reporter,
    poll: Callable[[], None],
    model_index: int = 0,
    engine: Engine = SINGLE,
    poll_here: Callable[[], None] | None = None,
) -> list[list[CompletionText]]:
    """Complete every prompt; completions in the job log are taken from it, the others are added to it.

    A resumed job has the same batches as one that was never stopped. The ranks share the batches, and each knows all
    completions; `poll_here` is called within a batch, which other ranks do not do in step. Collective.
    """
    parts = [part for part in log.done if part["model_index"] == model_index]
    # A resumed job keeps its batch size: the free memory may have changed since.
    size = parts[0]["batch_size"] if parts else _batch_size(model, prompts, options, engine)
    batches = prompt_batches(model.model, prompts, options.n, options.params, model.device, size)
    batch_size = size or max(len(batch) for batch in batches) * options.n
    done = {index: _texts(rows) for part in parts for index, rows in part["completions"]}
    if done:
        reporter.say(f"resuming: {plural(len(done), 'prompt')} of {len(prompts):,} done")
    reporter.start("prompt", len(prompts), len(done))

    def complete(batch: list[int]) -> list[list[CompletionText]]:
        return distinct_completions(
            model.model, model.encoder, [prompts[index] for index in batch], options.n, options.params, options.seed,
            model.device, poll_here or poll,
        )  # fmt: skip

    waiting = [batch for batch in batches if not done.keys() >= set(batch)]
    started = time.perf_counter()
    for some in in_turns(engine, waiting, complete, poll):
        new = {index: texts for batch, found in some for index, texts in zip(batch, found, strict=True)}
        rows = [[index, [astuple(text) for text in texts]] for index, texts in new.items()]
        seconds = time.perf_counter() - started
        if rows:
            log.append({"model_index": model_index, "batch_size": batch_size, "seconds": seconds, "completions": rows})
        done |= new
        reporter.advance(len(new))
        started = time.perf_counter()
    reporter.stop()
    return [done[index] for index in range(len(prompts))]


def _batch_size(
    model: GenerationModel, prompts: Sequence[list[int]], options: GenerationOptions, engine: Engine
) -> int | None:
    """Completions in a batch: as many as requested or possible, or fewer where every rank then has as much to do."""
    if engine.alone:
        return options.batch_size
    longest = max(map(len, prompts))
    most = options.batch_size or engine.least(max_batch_size(model.model, longest, options.params, model.device))
    rounds = math.ceil(len(prompts) / max(1, most // options.n) / engine.world_size)
    return math.ceil(len(prompts) / rounds / engine.world_size) * options.n


def _texts(rows: list[list[Any]]) -> list[CompletionText]:
    return [CompletionText(text, tokens, FinishReason(reason)) for text, tokens, reason in rows]
