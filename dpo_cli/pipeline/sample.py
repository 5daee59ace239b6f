"""dpo-sample: answers of a model to a file of prompts, the raw material of preference pairs.

The first step of the method: y1, y2 ~ pi_ref(y | x), Section 4 of https://arxiv.org/abs/2305.18290.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpo_cli.config import SampleConfig
from dpo_cli.console.reporter import Reporter
from dpo_cli.console.text import duration, plural, safe_text, significant
from dpo_cli.data.prompts import PromptInFile, PromptReport, read_prompts
from dpo_cli.data.samples import sample_id
from dpo_cli.data.tokens import PairEncoder
from dpo_cli.errors import ConfigError, DataError, StoppedError, StorageError
from dpo_cli.evaluation.generate import Text, batches_of, distinct_answers
from dpo_cli.models.decoding import Decoding
from dpo_cli.models.loading import (
    Decision,
    ModelSource,
    choose_device,
    choose_dtype,
    find_model,
    load_model,
    load_tokenizer,
    model_digest,
)
from dpo_cli.paths import user_path
from dpo_cli.pipeline.journal import Journal, finish, is_done, journal_of, manifest_of, opened_journal
from dpo_cli.pipeline.subject import Asked, Subject, find_subject, load_policy, subject_dtype
from dpo_cli.training.reproduce import environment
from dpo_cli.training.signals import StopSignals


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


def sample(config: SampleConfig, reporter: Reporter) -> Path:
    """Draw the answers; returns the file of samples, which appears when all are drawn."""
    assert config.prompts is not None
    prompts, report = read_prompts(config.prompts, config.limit, config.on_bad_row == "skip")
    output = _output(config)
    with StopSignals(reporter.warn) as signals:
        sampler = load_sampler(config, reporter)
        ids = sampler.encoder.encode_prompts([prompt.read for prompt in prompts])
        kept = [place for place, tokens in enumerate(ids) if len(tokens) <= config.max_prompt_length]
        report.dropped.update({"prompt_too_long": len(ids) - len(kept)} if len(kept) < len(ids) else {})
        report.kept = len(kept)
        if not kept:
            raise DataError(
                f"{report.source}: all prompts are longer than max_prompt_length={config.max_prompt_length}"
            )
        prompts, ids = [prompts[place] for place in kept], [ids[place] for place in kept]
        decoding = Decoding(config.max_new_tokens, config.temperature, config.top_p)
        job = _job(config, sampler, prompts, ids)
        _show_header(reporter, config, sampler, report, output)
        if is_done(output, job):
            reporter.say(f"already complete: {output}")
            return output
        with opened_journal(output, job, reporter.warn) as journal:
            try:
                _draw(journal, config, sampler, prompts, ids, decoding, reporter, signals.poll)
            except StoppedError as stop:
                raise type(stop)(f"{stop}; go on with the same command and output={output}") from None
            _write(journal, output, job, sampler, prompts, config, report, reporter)
    return output


def _output(config: SampleConfig) -> Path:
    if config.output is not None:
        output = user_path(config.output, StorageError, "output")
        if output.is_dir():
            raise ConfigError(f"output={safe_text(output)}: is a folder; name a file in it")
        return output
    return Path("outputs") / "samples" / time.strftime("%Y-%m-%d_%H-%M-%S.jsonl")


def load_sampler(config: SampleConfig, reporter: Reporter) -> Sampler:
    """The model that the config names, or the checkpoint's policy."""
    device = choose_device(config.device)
    if config.checkpoint is None:
        source = find_model(config.model, reporter.say)
        encoder = PairEncoder(load_tokenizer(source), config.template)
        dtype = choose_dtype(config.model.dtype, device.value, lora=True)
        model = load_model(source, dtype.value, device.value)
        return Sampler(source.name, model, encoder, model_digest(model), device.value, dtype, source)
    asked = Asked(config.checkpoint, None, config.trust_remote_code, alone=True)
    return load_checkpoint_sampler(find_subject(asked), config.template, device.value, reporter)


def load_checkpoint_sampler(
    subject: Subject, template: str | None, device: torch.device, reporter: Reporter
) -> Sampler:
    """The policy of a run, checkpoint or adapter, or a model; ConfigError for a reward model, which answers nothing."""
    if subject.is_reward_model:
        raise ConfigError(f"{safe_text(subject.weights)}: is a reward model, which gives no answers")
    template = template or (subject.run.data.template if subject.run else None)
    dtype = subject_dtype(subject, device)
    source = find_model(subject.base, reporter.say)
    encoder = PairEncoder(load_tokenizer(source), template)
    base = load_model(source, dtype.value, device) if subject.is_adapter else None
    model = load_policy(subject, base, dtype.value, device)
    return Sampler(subject.weights, model, encoder, model_digest(model), device, dtype, source)


def _job(config: SampleConfig, sampler: Sampler, prompts: list[PromptInFile], ids: list[list[int]]) -> dict[str, Any]:
    """What the answers depend on."""
    digest = hashlib.sha256()
    for prompt, tokens in zip(prompts, ids, strict=True):  # the journal files answers by row
        digest.update(f"{prompt.index} {tokens}\n".encode("ascii"))
    return {
        "model": sampler.name,
        "weights": sampler.digest,
        "dtype": str(sampler.dtype.value).removeprefix("torch."),
        "device": sampler.device.type,
        "template": sampler.encoder.kind,
        "prompts": digest.hexdigest()[:32],
        **{key: getattr(config, key) for key in ("n", "temperature", "top_p", "max_new_tokens", "seed", "batch_size")},
    }


def _draw(
    journal: Journal,
    config: SampleConfig,
    sampler: Sampler,
    prompts: list[PromptInFile],
    ids: list[list[int]],
    decoding: Decoding,
    reporter: Reporter,
    poll: Callable[[], None],
) -> None:
    """Draw the answers that the journal lacks, batch by batch: each batch is the same, whichever are done already."""
    size = None if config.batch_size == "auto" else int(config.batch_size)
    done = {row["index"] for part in journal.done for row in part["rows"]}
    # Of a journal that was begun, the batches are those it was begun with: how many fit may have changed since.
    known = journal.done[0].get("together") if journal.done else None
    batches = batches_of(sampler.model, ids, config.n, decoding, sampler.device, known or size)
    together = known or max(len(batch) for batch in batches) * config.n
    waiting = [batch for batch in batches if not {prompts[place].index for place in batch} <= done]
    if done:
        reporter.say(f"going on: {plural(len(done), 'prompt')} of {len(prompts):,} were answered")
    reporter.start("prompt", len(prompts), len(prompts) - sum(map(len, waiting)))
    for batch in waiting:
        poll()
        started = time.perf_counter()
        found = distinct_answers(
            sampler.model, sampler.encoder, [ids[place] for place in batch], config.n, decoding, config.seed,
            sampler.device, poll,
        )  # fmt: skip
        rows = [_row(prompts[place], answers) for place, answers in zip(batch, found, strict=True)]
        journal.append({"together": together, "seconds": time.perf_counter() - started, "rows": rows})
        reporter.advance(len(batch))
    reporter.stop()


def _row(prompt: PromptInFile, answers: list[Text]) -> dict[str, Any]:
    # Messages rendered as plain text end in a colon, behind which an answer begins with a space: it is no part of it,
    # and is put there again where such a pair is read.
    messages = isinstance(prompt.written, list)
    return {
        "index": prompt.index,
        "responses": [answer.text.removeprefix(" ") if messages else answer.text for answer in answers],
        "tokens": [answer.tokens for answer in answers],
        "finished": [answer.ended for answer in answers],
    }


def _write(
    journal: Journal,
    output: Path,
    job: dict[str, Any],
    sampler: Sampler,
    prompts: list[PromptInFile],
    config: SampleConfig,
    report: PromptReport,
    reporter: Reporter,
) -> None:
    drawn = {row["index"]: row for part in journal.done for row in part["rows"]}
    rows = list(_rows(drawn, prompts, sampler, config))
    lacking = len(prompts) - len(rows)
    answers = [answer for prompt in prompts for answer in drawn[prompt.index]["finished"]]
    seconds = sum(float(part["seconds"]) for part in journal.done)
    tokens = sum(sum(drawn[prompt.index]["tokens"]) for prompt in prompts)
    short = sum(config.n - len(row["responses"]) > 0 for row in rows)
    if not rows:
        raise DataError(f"{report.source}: no prompt got two different answers; a higher temperature helps")
    facts = {
        **environment(sampler.device),
        "job": job,
        "samples": len(rows),
        "answers": sum(len(row["responses"]) for row in rows),
        "dropped": {**report.dropped, **({"identical": lacking} if lacking else {})},
        "fewer_than_asked": short,
        "cut_at_the_limit": answers.count(False),
        "seconds": seconds,
    }
    finish(journal, output, rows, facts)
    rate = f"{significant(len(answers) / seconds)} answers/s, {significant(tokens / seconds)} tokens/s"
    told = [
        ("done", f"{plural(len(rows), 'sample')} of {plural(config.n, 'answer')} in {duration(seconds)}: {rate}"),
        ("", f"an answer has {significant(tokens / len(answers))} tokens on average"),
    ]
    if lacking:
        told.append(("", f"left out {plural(lacking, 'prompt')} whose answers came out the same, redrawn or not"))
    if short:
        told.append(("", f"{plural(short, 'sample')} with fewer answers: the others came out the same"))
    if answers.count(False):
        share = f"{answers.count(False):,} of {len(answers):,} answers"
        told.append(("", f"{share} were cut at max_new_tokens={config.max_new_tokens}"))
    told += [("samples", str(output)), ("", str(manifest_of(output)))]
    if config.n > 1:
        told.append(("next", f"dpo-label samples={output} by=human annotator=NAME; or by=reward, implicit, rule"))
    reporter.say()
    reporter.facts(told)


def _rows(
    drawn: dict[int, dict[str, Any]], prompts: list[PromptInFile], sampler: Sampler, config: SampleConfig
) -> Iterator[dict[str, Any]]:
    """The rows of the file, in the order of the prompts: those with enough answers to compare."""
    for prompt in prompts:
        row = drawn[prompt.index]
        if len(row["responses"]) < min(2, config.n):
            continue
        yield {
            "id": sample_id(prompt.written, row["responses"]),
            "prompt": prompt.written,
            "responses": row["responses"],
            "tokens": row["tokens"],
            "finished": row["finished"],
            "index": prompt.index,
            "model": sampler.name,
            "weights": sampler.digest,
            "template": sampler.encoder.kind,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "seed": config.seed,
        }


def _show_header(
    reporter: Reporter, config: SampleConfig, sampler: Sampler, report: PromptReport, output: Path
) -> None:
    dtype = f"{str(sampler.dtype.value).removeprefix('torch.')}: {sampler.dtype.reason}"
    how = (
        f"{plural(config.n, 'answer')} a prompt, temperature {significant(config.temperature)}, "
        f"top_p {significant(config.top_p)}"
    )
    rows = [
        ("policy", f"{safe_text(sampler.name)} ({sampler.source.origin})"),
        ("device", str(sampler.device)),
        ("dtype", dtype),
        ("template", f"{sampler.encoder.kind}: {sampler.encoder.reason}"),
        ("drawing", f"{how}, at most {plural(config.max_new_tokens, 'token')}, seed {config.seed}"),
    ]
    for place, sentence in enumerate(report.sentences()):
        rows.append(("prompts" if place == 0 else "", sentence))
    rows.append(("output", f"{output}, whole when all is drawn; until then {journal_of(output).name}"))
    reporter.facts(rows)
    reporter.say()
