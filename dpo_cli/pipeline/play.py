"""Checkpoints play each other: each answers every prompt, a judge compares the answers, two and two."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dpo_cli.config import RankConfig
from dpo_cli.console.reporter import Reporter
from dpo_cli.console.text import safe_text, significant
from dpo_cli.data.prompts import PromptInFile, read_prompts
from dpo_cli.data.samples import Sample, sample_id
from dpo_cli.errors import ConfigError, DataError, StorageError
from dpo_cli.evaluation.generate import Text, batches_of, distinct_answers
from dpo_cli.models.decoding import Decoding
from dpo_cli.models.loading import choose_device
from dpo_cli.models.memory import make_room
from dpo_cli.pipeline.judges import find_judge, load_judge
from dpo_cli.pipeline.sample import load_checkpoint_sampler
from dpo_cli.pipeline.subject import Asked, find_subject
from dpo_cli.theory.statistics import mean_estimate
from dpo_cli.training.durable import write_whole
from dpo_cli.training.signals import StopSignals


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


def play(config: RankConfig, reporter: Reporter) -> Match:
    """Have every checkpoint answer every prompt, and the judge give each answer a reward.

    All players draw with the same random numbers, so that what differs is the players.
    """
    assert config.checkpoints is not None and config.prompts is not None and config.judge is not None
    trusted = config.trust_remote_code
    # Whatever names nothing, or nothing that plays or judges, is found before the first answer is drawn.
    subjects = [find_subject(Asked(name, None, trusted, alone=True, key="checkpoints")) for name in config.checkpoints]
    for name, subject in zip(config.checkpoints, subjects, strict=True):
        if subject.is_reward_model:
            raise ConfigError(f"checkpoints={safe_text(name)}: is a reward model, which gives no answers; let it judge")
    find_judge(config.judge, None, trusted)
    prompts, report = read_prompts(config.prompts, config.limit, config.on_bad_row == "skip")
    device = choose_device(config.device).value
    size = None if config.batch_size == "auto" else int(config.batch_size)
    decoding = Decoding(config.max_new_tokens, config.temperature, config.top_p)
    with StopSignals(reporter.warn) as signals:
        answers: list[list[Text]] = []
        for name, subject in zip(config.checkpoints, subjects, strict=True):
            sampler = load_checkpoint_sampler(subject, None, device, reporter)
            ids = sampler.encoder.encode_prompts([prompt.read for prompt in prompts])
            _check_lengths(prompts, ids, config)
            texts: dict[int, Text] = {}
            reporter.say(f"{safe_text(name)} answers {len(prompts):,} prompts")
            reporter.start("prompt", len(prompts))
            for batch in batches_of(sampler.model, ids, 1, decoding, device, size):
                signals.poll()
                asked = [ids[place] for place in batch]
                found = distinct_answers(
                    sampler.model, sampler.encoder, asked, 1, decoding, config.seed, device, signals.poll
                )
                texts |= {place: drawn[0] for place, drawn in zip(batch, found, strict=True)}
                reporter.advance(len(batch))
            reporter.stop()
            answers.append([texts[place] for place in range(len(prompts))])
            del sampler
            make_room(device)
        rows = list(zip(*answers, strict=True))
        samples = [_sample(prompt, row) for prompt, row in zip(prompts, rows, strict=True)]
        judge = load_judge(config.judge, None, "auto", config.device, trusted, reporter)
        rewards = judge.rewards(samples, signals.poll)
    reporter.facts([("prompts" if place == 0 else "", line) for place, line in enumerate(report.sentences())])
    return Match(short_names(config.checkpoints), samples, [[one.tokens for one in row] for row in rows], rewards)


def _sample(prompt: PromptInFile, answers: Sequence[Text]) -> Sample:
    responses = tuple(answer.text for answer in answers)
    finished = tuple(answer.ended for answer in answers)
    return Sample(sample_id(prompt.written, responses), prompt.written, responses, finished)


def short_names(names: Sequence[str]) -> list[str]:
    """The last part of each path where that tells them apart: in a table the first parts are alike."""
    last = [name.rstrip("/").rsplit("/", 1)[-1] for name in names]
    return last if len(set(last)) == len(last) else list(names)


def _check_lengths(prompts: list[PromptInFile], ids: list[list[int]], config: RankConfig) -> None:
    for prompt, tokens in zip(prompts, ids, strict=True):
        if len(tokens) > config.max_prompt_length:
            raise DataError(
                f"{safe_text(config.prompts)} row {prompt.index + 1}: its prompt has {len(tokens):,} tokens, over "
                f"max_prompt_length={config.max_prompt_length}; raise it, or leave the prompt out"
            )


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
    same = sum(len(set(sample.responses)) < len(sample.responses) for sample in match.samples)
    if same:
        reporter.say(f"on {same:,} prompts some players gave the same answer: a tie, half a win for each")
    reporter.say()


def write_match(path: Path, match: Match) -> None:
    """A row a prompt: the answers of all players, and their rewards."""
    lines = []
    for sample, rewards in zip(match.samples, match.rewards, strict=True):
        row = {"prompt": sample.prompt, "responses": sample.responses, "finished": sample.finished, "rewards": rewards}
        lines.append(json.dumps({**row, "id": sample.id, "players": match.players}, ensure_ascii=False))
    try:
        write_whole(path, ("\n".join(lines) + "\n").encode("utf-8"))
    except OSError as error:
        raise StorageError(f"{safe_text(path)}: cannot be written ({error.strerror})") from None
