"""dpo-sample: completions of a model for a file of prompts, from which preference pairs are made.

The first step of the method: y1, y2 ~ pi_ref(y | x), Section 4 of https://arxiv.org/abs/2305.18290.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_cli.commands.on_ranks import on_every_rank
from dpo_cli.config.schema import SampleConfig
from dpo_cli.console.reporter import Reporter
from dpo_cli.console.text import duration, plural, safe_text, shell_word, significant
from dpo_cli.data.formats import FinishReason
from dpo_cli.data.prompts import PromptReport, PromptRow, accepted_prompts, read_prompts
from dpo_cli.data.samples import as_stored, sample_id
from dpo_cli.errors import DataError, StoppedError
from dpo_cli.generation.generate import CompletionText
from dpo_cli.generation.sampler import (
    LOG_KEYS,
    GenerationModel,
    describe_generation,
    generate_all,
    generation_options,
    load_generation_model,
    probe_batches,
)
from dpo_cli.runs.manifest import environment
from dpo_cli.storage.hashing import fingerprint
from dpo_cli.storage.job_log import finish_job, is_done, job_log_path, manifest_path, output_path, shared_job_log


def sample(config: SampleConfig, reporter: Reporter) -> Path:
    """Generate the completions; return the file of samples, which is written when all are done."""
    assert config.prompts is not None
    with on_every_rank(config, reporter) as (engine, reporter, signals):
        prompts, report = read_prompts(config.prompts, config.limit, config.on_bad_row == "skip")
        output = engine.same(lambda: _output(config))
        model = load_generation_model(config, reporter, engine)
        prompts = accepted_prompts(prompts, model.encoder, report, config.on_bad_row == "skip")
        ids = model.encoder.encode_prompts([prompt.read for prompt in prompts])
        kept = [index for index, tokens in enumerate(ids) if len(tokens) <= config.max_prompt_length]
        report.dropped.update({"prompt_too_long": len(ids) - len(kept)} if len(kept) < len(ids) else {})
        report.kept = len(kept)
        if not kept:
            raise DataError(
                f"{report.source}: every prompt is longer than max_prompt_length={config.max_prompt_length}; raise it"
            )
        prompts, ids = [prompts[index] for index in kept], [ids[index] for index in kept]
        job = _job(config, model, prompts, ids)
        engine.alike({key: str(value) for key, value in job.items()})
        _show_header(reporter, config, model, report, output)
        if engine.same(lambda: is_done(output, job)):
            reporter.say(f"already complete: {output}")
            return output
        with shared_job_log(engine, output, job, LOG_KEYS, reporter.warn) as log:
            try:
                options = generation_options(config, config.n)
                invariant = engine.same(lambda: probe_batches(model, ids, options, signals.poll_here))
                reporter.facts([("batch_size", invariant.reason)])
                reporter.say()
                completions = generate_all(
                    model, ids, options, log, reporter, signals.poll, engine=engine, poll_here=signals.poll_here
                )
            except StoppedError as stop:
                raise type(stop)(f"{stop}; to resume, run the same command with output={output}") from None
            of_all = {key: job[key] for key in ("model", "weights", "template", "temperature", "top_p", "seed")}
            rows = [
                {**_row(prompt, texts, job["template"]), **of_all}
                for prompt, texts in zip(prompts, completions, strict=True)
                if len(texts) >= min(2, config.n)
            ]
            if not rows:
                raise DataError(f"{report.source}: no prompt has two different completions; raise temperature or top_p")
            seconds = sum(float(part["seconds"]) for part in log.done)
            counts = _counts(rows, config.n, {**report.dropped, "identical": len(prompts) - len(rows)})
            facts = {"job": job, "batch_invariant": invariant.value, **counts, "seconds": seconds}
            engine.same(lambda: finish_job(output, rows, {**environment(model.device), **facts}))
        reporter.say()
        reporter.facts([*_result(config, completions, rows, seconds), *_next_steps(config, output)])
    return output


def _output(config: SampleConfig) -> Path:
    if config.output is not None:
        return output_path(config.output, ".jsonl")
    return Path("outputs") / "samples" / time.strftime("%Y-%m-%d_%H-%M-%S.jsonl")


def _job(
    config: SampleConfig, model: GenerationModel, prompts: list[PromptRow], ids: list[list[int]]
) -> dict[str, Any]:
    """What the completions depend on."""
    return {
        "model": model.name,
        "weights": model.digest,
        "dtype": str(model.dtype.value).removeprefix("torch."),
        "device": model.device.type,
        "template": model.encoder.kind,
        "prompts": fingerprint([[prompt.index, tokens] for prompt, tokens in zip(prompts, ids, strict=True)]),
        **{key: getattr(config, key) for key in ("n", "temperature", "top_p", "max_new_tokens", "seed", "batch_size")},
    }


def _row(prompt: PromptRow, completions: Sequence[CompletionText], template: str) -> dict[str, Any]:
    responses = [as_stored(prompt.written, completion.text, template) for completion in completions]
    return {
        "id": sample_id(prompt.written, responses),
        "prompt": prompt.written,
        "responses": responses,
        "tokens": [completion.tokens for completion in completions],
        "finish_reason": [completion.finish_reason for completion in completions],
        "index": prompt.index,
    }


def _counts(rows: Sequence[dict[str, Any]], n: int, dropped: dict[str, int]) -> dict[str, Any]:
    """Counts of what is in the file, and of the prompts that are not."""
    reasons = [reason for row in rows for reason in row["finish_reason"]]
    return {
        "samples": len(rows),
        "completions": len(reasons),
        "dropped": {reason: number for reason, number in dropped.items() if number},
        "fewer_than_n": sum(len(row["responses"]) < n for row in rows),
        "finish_reason_length": reasons.count(FinishReason.LENGTH),
    }


def _result(
    config: SampleConfig,
    completions: Sequence[Sequence[CompletionText]],
    rows: Sequence[dict[str, Any]],
    seconds: float,
) -> list[tuple[str, str]]:
    """The lines at the end. Rate and length are those of all completions, the counts those of the file."""
    number, tokens = sum(map(len, completions)), sum(text.tokens for texts in completions for text in texts)
    rate = f"{significant(number / seconds)} completions/s, {significant(tokens / seconds)} tokens/s"
    lines = [
        ("done", f"{plural(len(rows), 'sample')} of {plural(config.n, 'completion')} in {duration(seconds)}: {rate}"),
        ("", f"{significant(tokens / number)} tokens a completion on average"),
    ]
    counts = _counts(rows, config.n, {})
    dropped, fewer, cut = len(completions) - len(rows), counts["fewer_than_n"], counts["finish_reason_length"]
    if dropped:
        lines.append(("", f"dropped {plural(dropped, 'prompt')} without two different completions"))
    if fewer:
        lines.append(("", f"{plural(fewer, 'sample')} with fewer than {config.n} different completions"))
    if cut:
        share = f"{cut:,} of {plural(counts['completions'], 'completion')}"
        lines.append(("", f"{share} stopped at max_new_tokens={config.max_new_tokens} (finish_reason length)"))
    return lines


def _next_steps(config: SampleConfig, output: Path) -> list[tuple[str, str]]:
    files = [("samples", str(output)), ("", str(manifest_path(output)))]
    if config.n == 1:
        return files
    return [
        *files,
        ("next", f"dpo-label {shell_word('samples', output)} by=human annotator=NAME; or by=reward, implicit, rule"),
    ]


def _show_header(
    reporter: Reporter, config: SampleConfig, model: GenerationModel, report: PromptReport, output: Path
) -> None:
    dtype = f"{str(model.dtype.value).removeprefix('torch.')}: {model.dtype.reason}"
    rows = [
        ("policy", f"{safe_text(model.name)} ({model.source.origin})"),
        ("device", str(model.device)),
        ("dtype", dtype),
        ("template", f"{model.encoder.kind}: {model.encoder.reason}"),
        ("generation", f"{plural(config.n, 'completion')} a prompt, {describe_generation(config)}"),
    ]
    rows += [("prompts" if index == 0 else "", sentence) for index, sentence in enumerate(report.sentences())]
    rows.append(("output", f"{output}, written when the job is done; {job_log_path(output).name} until then"))
    reporter.facts(rows)
    reporter.say()
