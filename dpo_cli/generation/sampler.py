"""A model that answers prompts, batch by batch: what a journal holds already is not drawn again."""

import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch

from dpo_cli.config.schema import GenerationConfig, SampleConfig
from dpo_cli.console.reporter import Reporter
from dpo_cli.console.text import plural, safe_text, significant
from dpo_cli.data.tokens import PairEncoder
from dpo_cli.errors import ConfigError
from dpo_cli.generation.decoding import Decoding
from dpo_cli.generation.generate import Text, batches_of, distinct_answers
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
from dpo_cli.storage.job_log import Journal

PARTS = ("player", "together", "seconds", "answers")  # what a line of the journal holds


@dataclass(frozen=True)
class Sampler:
    """A model that answers, with what its answers depend on."""

    name: str
    model: Any
    encoder: PairEncoder
    digest: str  # of its weights, an adapter's included
    device: torch.device
    dtype: Decision
    source: ModelSource


@dataclass(frozen=True)
class Drawing:
    """How answers are drawn."""

    each: int  # answers to a prompt, all different
    decoding: Decoding
    seed: int
    batch_size: int | None  # answers at once; None: as many as memory allows


def drawing_in_words(config: GenerationConfig) -> str:
    """How answers are drawn, for a header."""
    how = f"temperature {significant(config.temperature)}, top_p {significant(config.top_p)}"
    return f"{how}, at most {plural(config.max_new_tokens, 'token')}, seed {config.seed}"


def load_sampler(config: SampleConfig, reporter: Reporter) -> Sampler:
    """The model that the config names, or the checkpoint's policy."""
    device = choose_device(config.device)
    if config.checkpoint is None:
        source = find_model(config.model, reporter.say)
        encoder = PairEncoder(load_tokenizer(source), config.template)
        dtype = choose_dtype(config.model.dtype, device.value, lora=True)
        model = load_model(source, dtype.value, device.value)
        return Sampler(source.name, model, encoder, model_fingerprint(model), device.value, dtype, source)
    asked = ModelName(config.checkpoint, None, config.trust_remote_code, alone=True)
    return load_checkpoint_sampler(find_model_ref(asked), config.template, device.value, reporter)


def load_checkpoint_sampler(
    subject: ModelRef, template: str | None, device: torch.device, reporter: Reporter
) -> Sampler:
    """The policy of a run, checkpoint or adapter, or a model; ConfigError for a reward model, which answers nothing."""
    if not subject.objective.generates:
        raise ConfigError(f"{safe_text(subject.weights)}: is a reward model, which gives no answers")
    dtype = ref_dtype(subject, device)
    source = find_model(subject.base, reporter.say)
    encoder = ref_encoder(subject, template)
    base = load_model(source, dtype.value, device) if subject.is_adapter else None
    model = load_policy(subject, base, dtype.value, device)
    return Sampler(subject.weights, model, encoder, model_fingerprint(model), device, dtype, source)


def answer_all(
    sampler: Sampler,
    prompts: Sequence[list[int]],
    drawing: Drawing,
    journal: Journal,
    reporter: Reporter,
    poll: Callable[[], None],
    player: int = 0,
) -> list[list[Text]]:
    """Answers to every prompt; those that the journal holds of this player are taken from there, the others join it.

    Each batch is the same, whichever are done already.
    """
    parts = [part for part in journal.done if part["player"] == player]
    # Of what was begun, the batches are those it was begun with: how many fit may have changed since.
    size = parts[0]["together"] if parts else drawing.batch_size
    batches = batches_of(sampler.model, prompts, drawing.each, drawing.decoding, sampler.device, size)
    together = size or max(len(batch) for batch in batches) * drawing.each
    answers = {place: _texts(written) for part in parts for place, written in part["answers"]}
    if answers:
        reporter.say(f"going on: {plural(len(answers), 'prompt')} of {len(prompts):,} were answered")
    reporter.start("prompt", len(prompts), len(answers))
    for batch in batches:
        if answers.keys() >= set(batch):
            continue
        poll()
        started = time.perf_counter()
        found = distinct_answers(
            sampler.model, sampler.encoder, [prompts[place] for place in batch], drawing.each, drawing.decoding,
            drawing.seed, sampler.device, poll,
        )  # fmt: skip
        written = [[place, [astuple(text) for text in texts]] for place, texts in zip(batch, found, strict=True)]
        seconds = time.perf_counter() - started
        journal.append({"player": player, "together": together, "seconds": seconds, "answers": written})
        answers |= dict(zip(batch, found, strict=True))
        reporter.advance(len(batch))
    reporter.stop()
    return [answers[place] for place in range(len(prompts))]


def _texts(written: list[list[Any]]) -> list[Text]:
    return [Text(*fields) for fields in written]
