"""Matches between models: every model completes every prompt, and a judge gives each completion a reward."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_cli.config.schema import RankConfig
from dpo_cli.console.reporter import Reporter
from dpo_cli.console.text import plural, safe_text
from dpo_cli.data.files import read_rows
from dpo_cli.data.formats import FinishReason
from dpo_cli.data.prompts import PromptReport, PromptRow, accepted_prompts, read_prompts
from dpo_cli.data.samples import Sample, as_stored, sample_id
from dpo_cli.data.tokens import PairEncoder
from dpo_cli.engine.engine import Engine
from dpo_cli.errors import ConfigError, DataError, StoppedError
from dpo_cli.generation.generate import CompletionText
from dpo_cli.generation.sampler import (
    LOG_KEYS,
    describe_generation,
    generate_all,
    generation_options,
    load_checkpoint_model,
)
from dpo_cli.labelling.judges import describe_truncation, find_judge, load_judge
from dpo_cli.models.dtype import choose_device
from dpo_cli.models.memory import make_room
from dpo_cli.runs.model_ref import (
    ModelName,
    ModelRef,
    find_model_ref,
    ref_dtype,
    ref_encoder,
    weights_fingerprints,
)
from dpo_cli.signals import StopSignals
from dpo_cli.storage.hashing import fingerprint
from dpo_cli.storage.job_log import JobLog, finish_job, is_done, shared_job_log


@dataclass(frozen=True)
class Match:
    """The completions of G prompts by P models, the players, and the rewards that a judge gave them."""

    players: list[str]
    samples: list[Sample]  # one response of each player, in their order
    tokens: list[list[int]]  # of each response
    rewards: list[list[float]]

    @property
    def tables(self) -> Tensor:
        """(G, P, P): 1 where the row's response has the higher reward on that prompt, 1/2 for a tie."""
        rewards = torch.tensor(self.rewards, dtype=torch.float64)
        higher = (rewards[:, :, None] > rewards[:, None, :]).double()
        same = (rewards[:, :, None] == rewards[:, None, :]).double()
        return higher + 0.5 * same * (1 - torch.eye(len(self.players), dtype=torch.float64))


def play(config: RankConfig, kept: Path | None, reporter: Reporter, engine: Engine, signals: StopSignals) -> Match:
    """Let every checkpoint complete every prompt, and the judge give each completion a reward.

    Models that see the same prompt tokens sample with the same random numbers. The match is written to `kept`, a row a
    prompt, when it is done: a stopped match is resumed, and a match that is there is read, not played again.
    Collective.
    """
    assert config.checkpoints is not None and config.prompts is not None and config.judge is not None
    trusted = config.trust_remote_code
    # Every name is checked before the first completion is generated.
    refs = [
        find_model_ref(ModelName(name, None, trusted, alone=True, key="checkpoints")) for name in config.checkpoints
    ]
    for name, ref in zip(config.checkpoints, refs, strict=True):
        if not ref.objective.generates:
            raise ConfigError(
                f"checkpoints={safe_text(name)}: is a reward model, which generates no text; use it as judge"
            )
    judging = find_judge(config.judge, None, trusted)
    prompts, report = read_prompts(config.prompts, config.limit, config.on_bad_row == "skip")
    device = choose_device(config.device).value
    encoders = [ref_encoder(ref, config.template) for ref in refs]
    for encoder in encoders:
        prompts = accepted_prompts(prompts, encoder, report, config.on_bad_row == "skip")
    _check_players(config, encoders, judging, prompts)
    dtypes = engine.same(lambda: [str(ref_dtype(ref, device).value) for ref in refs])
    job = _job(config, refs, judging, prompts, device, dtypes) if kept is not None or not engine.alone else {}
    engine.alike({key: str(value) for key, value in job.items()})
    if kept is not None and engine.same(lambda: is_done(kept, job)):
        reporter.say(f"already complete: {kept}")
        return engine.same(lambda: read_match(kept))
    _show_header(reporter, config, report, device, kept)
    with shared_job_log(engine, kept, job, LOG_KEYS, reporter.warn) as log:
        try:
            completions = _complete(config, refs, prompts, device, log, reporter, engine, signals)
            match = _judge(config, prompts, completions, str(encoders[0].kind), reporter, engine, signals)
        except StoppedError as stop:
            raise type(stop)(f"{stop}; to resume, run the same command" if kept is not None else f"{stop}") from None
        if kept is not None:
            rows = match_rows(match)
            facts = {"job": job, "prompts": len(rows), "players": match.players}
            engine.same(lambda: finish_job(kept, rows, facts))
    return match


def _show_header(
    reporter: Reporter, config: RankConfig, report: PromptReport, device: torch.device, kept: Path | None
) -> None:
    rows = [("models" if index == 0 else "", safe_text(name)) for index, name in enumerate(config.checkpoints or ())]
    rows += [("judge", safe_text(config.judge)), ("device", str(device))]
    rows.append(("generation", describe_generation(config)))
    rows += [("prompts" if index == 0 else "", line) for index, line in enumerate(report.sentences())]
    if kept is not None:
        rows.append(("completions", f"{safe_text(kept)}, written when all are judged"))
    reporter.facts(rows)
    reporter.say()


def _check_players(
    config: RankConfig, encoders: Sequence[PairEncoder], judging: ModelRef | None, prompts: Sequence[PromptRow]
) -> None:
    """ConfigError where models or judge use different templates, DataError where a prompt is too long for a model."""
    assert config.checkpoints is not None
    kinds: dict[str | None, str] = {}
    for name, encoder in zip(config.checkpoints, encoders, strict=True):
        kinds.setdefault(encoder.kind, name)
        _check_lengths(prompts, encoder.encode_prompts([prompt.read for prompt in prompts]), config)
    if len(kinds) > 1:
        shown = ", ".join(f"{safe_text(name)}: {kind}" for kind, name in kinds.items())
        raise ConfigError(
            f"checkpoints: their templates differ ({shown}); set template=chat or template=plain for all of them"
        )
    reads = ref_encoder(judging).kind if judging is not None and judging.is_adapter else None
    if reads is not None and reads not in kinds:
        raise ConfigError(
            f"judge={safe_text(config.judge)}: has template={reads}, and the checkpoints have "
            f"template={', '.join(map(str, kinds))}; set template={reads} for the checkpoints"
        )


def _check_lengths(prompts: Sequence[PromptRow], ids: list[list[int]], config: RankConfig) -> None:
    for prompt, tokens in zip(prompts, ids, strict=True):
        if len(tokens) > config.max_prompt_length:
            raise DataError(
                f"{safe_text(config.prompts)} row {prompt.index + 1}: the prompt has {len(tokens):,} tokens, more than "
                f"max_prompt_length={config.max_prompt_length}; raise it, or remove the prompt"
            )


def _job(
    config: RankConfig,
    refs: Sequence[ModelRef],
    judging: ModelRef | None,
    prompts: Sequence[PromptRow],
    device: torch.device,
    dtypes: Sequence[str],
) -> dict[str, Any]:
    """What completions and rewards depend on."""
    return {
        "checkpoints": config.checkpoints,
        "judge": config.judge,
        "weights": weights_fingerprints([*refs, *([judging] if judging is not None else [])]),
        "dtypes": dtypes,
        "prompts": fingerprint([prompt.written for prompt in prompts]),
        "device": device.type,
        **{key: getattr(config, key) for key in ("template", "temperature", "top_p", "max_new_tokens", "seed")},
        "batch_size": config.batch_size,
    }


def _complete(
    config: RankConfig,
    refs: Sequence[ModelRef],
    prompts: Sequence[PromptRow],
    device: torch.device,
    log: JobLog,
    reporter: Reporter,
    engine: Engine,
    signals: StopSignals,
) -> list[list[CompletionText]]:
    """The completions of every model, one of each prompt; one model at a time is in memory."""
    assert config.checkpoints is not None
    options = generation_options(config, 1)
    completions = []
    for index, (name, ref) in enumerate(zip(config.checkpoints, refs, strict=True)):
        model = load_checkpoint_model(ref, config.template, device, reporter, engine)
        ids = model.encoder.encode_prompts([prompt.read for prompt in prompts])
        reporter.say(f"{safe_text(name)}: {plural(len(prompts), 'prompt')}")
        texts = generate_all(model, ids, options, log, reporter, signals.poll, index, engine, signals.poll_here)
        completions.append([one for (one,) in texts])
        del model
        make_room(device)
    return completions


def _judge(
    config: RankConfig,
    prompts: Sequence[PromptRow],
    completions: list[list[CompletionText]],
    template: str,
    reporter: Reporter,
    engine: Engine,
    signals: StopSignals,
) -> Match:
    assert config.checkpoints is not None and config.judge is not None
    rows = list(zip(*completions, strict=True))
    samples = [_sample(prompt, row, template) for prompt, row in zip(prompts, rows, strict=True)]
    judge = load_judge(config.judge, None, "auto", config.device, config.trust_remote_code, reporter, engine)
    rewards = judge.rewards(samples, signals.poll)
    for line in describe_truncation(judge.truncation):
        reporter.say(line)
    return Match(short_names(config.checkpoints), samples, [[one.tokens for one in row] for row in rows], rewards)


def _sample(prompt: PromptRow, completions: Sequence[CompletionText], template: str) -> Sample:
    responses = tuple(as_stored(prompt.written, completion.text, template) for completion in completions)
    reasons = tuple(completion.finish_reason for completion in completions)
    return Sample(sample_id(prompt.written, responses), prompt.written, responses, reasons)


def short_names(names: Sequence[str]) -> list[str]:
    """The shortest ends of the paths, in whole parts, that tell them all apart; else the paths as they are."""
    parts = [name.rstrip("/").split("/") for name in names]
    for number in range(1, max(map(len, parts)) + 1):
        ends = ["/".join(one[-number:]) for one in parts]
        if len(set(ends)) == len(ends):
            return ends
    return list(names)


def match_rows(match: Match) -> list[dict[str, Any]]:
    """A row a prompt: the responses of all models, and their rewards."""
    return [
        {
            "id": sample.id,
            "prompt": sample.prompt,
            "responses": list(sample.responses),
            "tokens": tokens,
            "finish_reason": list(sample.finish_reasons),
            "rewards": rewards,
            "players": match.players,
        }
        for sample, tokens, rewards in zip(match.samples, match.tokens, match.rewards, strict=True)
    ]


def read_match(path: Path) -> Match:
    """A match from its rows; DataError where a row is not as `match_rows` made it."""
    players: list[str] = []
    samples, tokens, rewards = [], [], []
    for row in read_rows(path):
        try:
            value = row.value or {}
            responses, reasons = tuple(value["responses"]), tuple(map(FinishReason, value["finish_reason"]))
            samples.append(Sample(value["id"], value["prompt"], responses, reasons))
            tokens.append([int(number) for number in value["tokens"]])
            rewards.append([float(number) for number in value["rewards"]])
            players = value["players"]
            if not len(players) == len(responses) == len(reasons) == len(tokens[-1]) == len(rewards[-1]):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise DataError(
                f"{row.location}: was not written by this version of dpo-rank; remove the file to play again"
            ) from None
    return Match(players, samples, tokens, rewards)
