"""dpo-sample: answers of a model to a file of prompts, the raw material of preference pairs.

The first step of the method: y1, y2 ~ pi_ref(y | x), Section 4 of https://arxiv.org/abs/2305.18290.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_cli.config.schema import SampleConfig
from dpo_cli.console.reporter import Reporter
from dpo_cli.console.text import duration, plural, safe_text, shell_word, significant
from dpo_cli.data.prompts import PromptInFile, PromptReport, read_prompts
from dpo_cli.data.samples import as_stored, sample_id
from dpo_cli.errors import DataError, StoppedError
from dpo_cli.generation.decoding import Decoding
from dpo_cli.generation.generate import Text
from dpo_cli.generation.sampler import PARTS, Drawing, Sampler, answer_all, drawing_in_words, load_sampler
from dpo_cli.runs.manifest import environment
from dpo_cli.signals import StopSignals
from dpo_cli.storage.hashing import fingerprint
from dpo_cli.storage.job_log import finish, is_done, journal_of, manifest_of, opened_journal, output_path


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
        with opened_journal(output, job, PARTS, reporter.warn) as journal:
            size = None if config.batch_size == "auto" else int(config.batch_size)
            drawing = Drawing(config.n, decoding, config.seed, size)
            try:
                drawn = answer_all(sampler, ids, drawing, journal, reporter, signals.poll)
            except StoppedError as stop:
                raise type(stop)(f"{stop}; go on with the same command and output={output}") from None
            of_all = {key: job[key] for key in ("model", "weights", "template", "temperature", "top_p", "seed")}
            rows = [
                {**_row(prompt, answers), **of_all}
                for prompt, answers in zip(prompts, drawn, strict=True)
                if len(answers) >= min(2, config.n)
            ]
            if not rows:
                raise DataError(f"{report.source}: no prompt got two different answers; a higher temperature helps")
            seconds = sum(float(part["seconds"]) for part in journal.done)
            facts = _facts(rows, config.n, {**report.dropped, "identical": len(prompts) - len(rows)})
            finish(journal, output, rows, {**environment(sampler.device), "job": job, **facts, "seconds": seconds})
        reporter.say()
        reporter.facts([*_in_words(config, drawn, rows, seconds), *_next_steps(config, output)])
    return output


def _output(config: SampleConfig) -> Path:
    if config.output is not None:
        return output_path(config.output, ".jsonl")
    return Path("outputs") / "samples" / time.strftime("%Y-%m-%d_%H-%M-%S.jsonl")


def _job(config: SampleConfig, sampler: Sampler, prompts: list[PromptInFile], ids: list[list[int]]) -> dict[str, Any]:
    """What the answers depend on."""
    return {
        "model": sampler.name,
        "weights": sampler.digest,
        "dtype": str(sampler.dtype.value).removeprefix("torch."),
        "device": sampler.device.type,
        "template": sampler.encoder.kind,
        "prompts": fingerprint([[prompt.index, tokens] for prompt, tokens in zip(prompts, ids, strict=True)]),
        **{key: getattr(config, key) for key in ("n", "temperature", "top_p", "max_new_tokens", "seed", "batch_size")},
    }


def _row(prompt: PromptInFile, answers: Sequence[Text]) -> dict[str, Any]:
    responses = [as_stored(prompt.written, answer.text) for answer in answers]
    return {
        "id": sample_id(prompt.written, responses),
        "prompt": prompt.written,
        "responses": responses,
        "tokens": [answer.tokens for answer in answers],
        "finished": [answer.ended for answer in answers],
        "index": prompt.index,
    }


def _facts(rows: Sequence[dict[str, Any]], each: int, dropped: dict[str, int]) -> dict[str, Any]:
    """Counts of what is in the file, and of the prompts that are not."""
    ends = [end for row in rows for end in row["finished"]]
    return {
        "samples": len(rows),
        "answers": len(ends),
        "dropped": {reason: number for reason, number in dropped.items() if number},
        "fewer_than_asked": sum(len(row["responses"]) < each for row in rows),
        "cut_at_the_limit": ends.count(False),
    }


def _in_words(
    config: SampleConfig, drawn: Sequence[Sequence[Text]], rows: Sequence[dict[str, Any]], seconds: float
) -> list[tuple[str, str]]:
    """What came out. Rate and length are of all that was drawn, the rest of what is in the file."""
    answers, tokens = sum(map(len, drawn)), sum(answer.tokens for texts in drawn for answer in texts)
    rate = f"{significant(answers / seconds)} answers/s, {significant(tokens / seconds)} tokens/s"
    told = [
        ("done", f"{plural(len(rows), 'sample')} of {plural(config.n, 'answer')} in {duration(seconds)}: {rate}"),
        ("", f"an answer has {significant(tokens / answers)} tokens on average"),
    ]
    facts = _facts(rows, config.n, {})
    lacking, short, cut = len(drawn) - len(rows), facts["fewer_than_asked"], facts["cut_at_the_limit"]
    if lacking:
        told.append(("", f"left out {plural(lacking, 'prompt')} whose answers came out the same, redrawn or not"))
    if short:
        told.append(("", f"{plural(short, 'sample')} with fewer answers: the others came out the same"))
    if cut:
        share = f"{cut:,} of {facts['answers']:,} answers"
        told.append(("", f"{share} were cut at max_new_tokens={config.max_new_tokens}"))
    return told


def _next_steps(config: SampleConfig, output: Path) -> list[tuple[str, str]]:
    where = [("samples", str(output)), ("", str(manifest_of(output)))]
    if config.n == 1:
        return where
    return [
        *where,
        ("next", f"dpo-label {shell_word('samples', output)} by=human annotator=NAME; or by=reward, implicit, rule"),
    ]


def _show_header(
    reporter: Reporter, config: SampleConfig, sampler: Sampler, report: PromptReport, output: Path
) -> None:
    dtype = f"{str(sampler.dtype.value).removeprefix('torch.')}: {sampler.dtype.reason}"
    rows = [
        ("policy", f"{safe_text(sampler.name)} ({sampler.source.origin})"),
        ("device", str(sampler.device)),
        ("dtype", dtype),
        ("template", f"{sampler.encoder.kind}: {sampler.encoder.reason}"),
        ("drawing", f"{plural(config.n, 'answer')} a prompt, {drawing_in_words(config)}"),
    ]
    for place, sentence in enumerate(report.sentences()):
        rows.append(("prompts" if place == 0 else "", sentence))
    rows.append(("output", f"{output}, whole when all is drawn; until then {journal_of(output).name}"))
    reporter.facts(rows)
    reporter.say()
