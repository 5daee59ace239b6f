"""Checkpoints play each other: each answers every prompt, a judge compares the answers, two and two."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_cli.config.schema import RankConfig
from dpo_cli.console.reporter import Reporter
from dpo_cli.console.text import safe_text, significant
from dpo_cli.data.files import read_rows
from dpo_cli.data.prompts import PromptInFile, PromptReport, read_prompts
from dpo_cli.data.samples import Sample, as_stored, sample_id
from dpo_cli.errors import ConfigError, DataError, StoppedError
from dpo_cli.generation.decoding import Decoding
from dpo_cli.generation.generate import Text
from dpo_cli.generation.sampler import PARTS, Drawing, answer_all, drawing_in_words, load_checkpoint_sampler
from dpo_cli.labelling.judges import find_judge, load_judge, truncation_in_words
from dpo_cli.models.loading import choose_device
from dpo_cli.models.memory import make_room
from dpo_cli.runs.model_ref import Asked, Subject, find_subject, subject_dtype, subject_encoder, weights_digests
from dpo_cli.signals import StopSignals
from dpo_cli.storage.hashing import fingerprint
from dpo_cli.storage.job_log import Journal, finish, is_done, opened_journal
from dpo_cli.theory.statistics import mean_estimate


@dataclass(frozen=True)
class Match:
    """What P players answered to G prompts, and what a judge thought of it."""

    players: list[str]
    samples: list[Sample]  # one response a player, in the order of the players
    tokens: list[list[int]]  # of each response
    rewards: list[list[float]]

    @property
    def tables(self) -> Tensor:
        """(G, P, P): 1 where the row's answer has the higher reward on that prompt, 1/2 for a tie."""
        rewards = torch.tensor(self.rewards, dtype=torch.float64)
        higher = (rewards[:, :, None] > rewards[:, None, :]).double()
        same = (rewards[:, :, None] == rewards[:, None, :]).double()
        return higher + 0.5 * same * (1 - torch.eye(len(self.players), dtype=torch.float64))


def play(config: RankConfig, kept: Path | None, reporter: Reporter) -> Match:
    """Have every checkpoint answer every prompt, and the judge give each answer a reward.

    The players draw with the same random numbers wherever they are asked with the same tokens. In `kept` is a row a
    prompt when all is done; a match that was cut off is gone on with, one that is there is not played again.
    """
    assert config.checkpoints is not None and config.prompts is not None and config.judge is not None
    trusted = config.trust_remote_code
    # Whatever names nothing, or nothing that plays or judges, is found before the first answer is drawn.
    subjects = [find_subject(Asked(name, None, trusted, alone=True, key="checkpoints")) for name in config.checkpoints]
    for name, subject in zip(config.checkpoints, subjects, strict=True):
        if subject.is_reward_model:
            raise ConfigError(f"checkpoints={safe_text(name)}: is a reward model, which gives no answers; let it judge")
    judging = find_judge(config.judge, None, trusted)
    prompts, report = read_prompts(config.prompts, config.limit, config.on_bad_row == "skip")
    device = choose_device(config.device).value
    _check_players(config, subjects, judging, prompts)
    job = _job(config, subjects, judging, prompts, device) if kept is not None else {}
    if kept is not None and is_done(kept, job):
        reporter.say(f"already played: {kept}")
        return read_match(kept)
    _show_header(reporter, config, report, device, kept)
    with StopSignals(reporter.warn) as signals, opened_journal(kept, job, PARTS, reporter.warn) as journal:
        try:
            answers = _answers(config, subjects, prompts, device, journal, reporter, signals)
            match = _judged(config, prompts, answers, reporter, signals)
        except StoppedError as stop:
            raise type(stop)(f"{stop}; the same command goes on" if kept is not None else f"{stop}") from None
        if kept is not None:
            rows = match_rows(match)
            finish(journal, kept, rows, {"job": job, "prompts": len(rows), "players": match.players})
    return match


def _show_header(
    reporter: Reporter, config: RankConfig, report: PromptReport, device: torch.device, kept: Path | None
) -> None:
    rows = [("player" if place == 0 else "", safe_text(name)) for place, name in enumerate(config.checkpoints or ())]
    rows += [("judge", safe_text(config.judge)), ("device", str(device))]
    rows.append(("drawing", drawing_in_words(config)))
    rows += [("prompts" if place == 0 else "", line) for place, line in enumerate(report.sentences())]
    if kept is not None:
        rows.append(("answers", f"{safe_text(kept)}, whole when all is played"))
    reporter.facts(rows)
    reporter.say()


def _check_players(
    config: RankConfig, subjects: Sequence[Subject], judging: Subject | None, prompts: Sequence[PromptInFile]
) -> None:
    """ConfigError where not all would read the prompts in one form, DataError where a prompt is too long for one."""
    assert config.checkpoints is not None
    kinds: dict[str | None, str] = {}
    for name, subject in zip(config.checkpoints, subjects, strict=True):
        encoder = subject_encoder(subject, config.template)
        kinds.setdefault(encoder.kind, name)
        _check_lengths(prompts, encoder.encode_prompts([prompt.read for prompt in prompts]), config)
    if len(kinds) > 1:
        shown = ", ".join(f"{safe_text(name)} as {kind}" for kind, name in kinds.items())
        raise ConfigError(
            f"checkpoints: are not asked alike ({shown}); template=chat or template=plain asks all of them so"
        )
    reads = subject_encoder(judging).kind if judging is not None and judging.is_adapter else None
    if reads is not None and reads not in kinds:
        raise ConfigError(
            f"judge={safe_text(config.judge)}: reads answers as {reads}, and the checkpoints are asked as "
            f"{', '.join(map(str, kinds))}; template={reads} asks them so, too"
        )


def _check_lengths(prompts: Sequence[PromptInFile], ids: list[list[int]], config: RankConfig) -> None:
    for prompt, tokens in zip(prompts, ids, strict=True):
        if len(tokens) > config.max_prompt_length:
            raise DataError(
                f"{safe_text(config.prompts)} row {prompt.index + 1}: its prompt has {len(tokens):,} tokens, over "
                f"max_prompt_length={config.max_prompt_length}; raise it, or leave the prompt out"
            )


def _job(
    config: RankConfig,
    subjects: Sequence[Subject],
    judging: Subject | None,
    prompts: Sequence[PromptInFile],
    device: torch.device,
) -> dict[str, Any]:
    """What answers and rewards depend on."""
    return {
        "checkpoints": config.checkpoints,
        "judge": config.judge,
        "weights": weights_digests([*subjects, *([judging] if judging is not None else [])]),
        "dtypes": [str(subject_dtype(subject, device).value) for subject in subjects],
        "prompts": fingerprint([prompt.written for prompt in prompts]),
        "device": device.type,
        **{key: getattr(config, key) for key in ("template", "temperature", "top_p", "max_new_tokens", "seed")},
        "batch_size": config.batch_size,
    }


def _answers(
    config: RankConfig,
    subjects: Sequence[Subject],
    prompts: Sequence[PromptInFile],
    device: torch.device,
    journal: Journal,
    reporter: Reporter,
    signals: StopSignals,
) -> list[list[Text]]:
    """The answers of every player, one to a prompt; one model at a time is in memory."""
    assert config.checkpoints is not None
    decoding = Decoding(config.max_new_tokens, config.temperature, config.top_p)
    drawing = Drawing(1, decoding, config.seed, None if config.batch_size == "auto" else int(config.batch_size))
    answers = []
    for player, (name, subject) in enumerate(zip(config.checkpoints, subjects, strict=True)):
        sampler = load_checkpoint_sampler(subject, config.template, device, reporter)
        ids = sampler.encoder.encode_prompts([prompt.read for prompt in prompts])
        reporter.say(f"{safe_text(name)} answers {len(prompts):,} prompts")
        drawn = answer_all(sampler, ids, drawing, journal, reporter, signals.poll, player)
        answers.append([texts[0] for texts in drawn])
        del sampler
        make_room(device)
    return answers


def _judged(
    config: RankConfig,
    prompts: Sequence[PromptInFile],
    answers: list[list[Text]],
    reporter: Reporter,
    signals: StopSignals,
) -> Match:
    assert config.checkpoints is not None and config.judge is not None
    rows = list(zip(*answers, strict=True))
    samples = [_sample(prompt, row) for prompt, row in zip(prompts, rows, strict=True)]
    judge = load_judge(config.judge, None, "auto", config.device, config.trust_remote_code, reporter)
    rewards = judge.rewards(samples, signals.poll)
    for line in truncation_in_words(judge.truncation):
        reporter.say(line)
    return Match(short_names(config.checkpoints), samples, [[one.tokens for one in row] for row in rows], rewards)


def _sample(prompt: PromptInFile, answers: Sequence[Text]) -> Sample:
    responses = tuple(as_stored(prompt.written, answer.text) for answer in answers)
    finished = tuple(answer.ended for answer in answers)
    return Sample(sample_id(prompt.written, responses), prompt.written, responses, finished)


def short_names(names: Sequence[str]) -> list[str]:
    """The last part of each path where that tells them apart: in a table the first parts are alike."""
    last = [name.rstrip("/").rsplit("/", 1)[-1] for name in names]
    return last if len(set(last)) == len(last) else list(names)


def show_match(match: Match, reporter: Reporter) -> None:
    """The mean reward and length of every player's answers, and how much more each earns than the first."""
    rows = []
    for player, name in enumerate(match.players):
        earned = [rewards[player] for rewards in match.rewards]
        mean = mean_estimate(earned)
        more = mean_estimate([rewards[player] - rewards[0] for rewards in match.rewards])
        tokens = sum(row[player] for row in match.tokens) / len(match.tokens)
        rows.append(
            [
                safe_text(name),
                f"{significant(mean.mean)} ({significant(mean.low)}, {significant(mean.high)})",
                f"{significant(more.mean)} ({significant(more.low)}, {significant(more.high)})" if player else "",
                significant(tokens),
            ]
        )
    reporter.say()
    reporter.grid(["player", "mean reward (95%)", "more than the first (95%)", "tokens"], rows)
    cut = sum(not end for sample in match.samples for end in sample.finished)
    if cut:
        reporter.say(f"{cut:,} of {sum(map(len, match.tokens)):,} answers were cut at max_new_tokens")
    tied = sum(len(set(rewards)) < len(rewards) for rewards in match.rewards)
    if tied:
        reporter.say(f"on {tied:,} prompts the judge finds some answers equal: a tie, half a win for each")
    reporter.say()


def match_rows(match: Match) -> list[dict[str, Any]]:
    """A row a prompt: the answers of all players, and their rewards."""
    return [
        {
            "id": sample.id,
            "prompt": sample.prompt,
            "responses": list(sample.responses),
            "tokens": tokens,
            "finished": list(sample.finished),
            "rewards": rewards,
            "players": match.players,
        }
        for sample, tokens, rewards in zip(match.samples, match.tokens, match.rewards, strict=True)
    ]


def read_match(path: Path) -> Match:
    """A match that was played, from its rows; DataError where one is not as it was written."""
    players: list[str] = []
    samples, tokens, rewards = [], [], []
    for row in read_rows(path):
        try:
            value = row.value or {}
            responses, finished = tuple(value["responses"]), tuple(value["finished"])
            samples.append(Sample(value["id"], value["prompt"], responses, finished))
            tokens.append([int(number) for number in value["tokens"]])
            rewards.append([float(number) for number in value["rewards"]])
            players = value["players"]
            if not len(players) == len(responses) == len(finished) == len(tokens[-1]) == len(rewards[-1]):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise DataError(
                f"{row.place}: is not what dpo-rank wrote; remove the file, and the match is played again"
            ) from None
    return Match(players, samples, tokens, rewards)
