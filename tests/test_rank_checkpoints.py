"""Matches between checkpoints: tables by hand, a strength a player, and what is refused before generation."""

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ended, run_of, sample_rows, tiny_words, write_jsonl
from safetensors.torch import load_file, save_file

from dpo_cli.console.text import cut_apart
from dpo_cli.data.formats import FinishReason
from dpo_cli.generation import sampler as module
from dpo_cli.generation.generate import CompletionText
from dpo_cli.labelling import match as match_module
from dpo_cli.labelling.match import Match, short_names
from dpo_cli.theory.bradley_terry import fit

Command = Callable[..., Ended]
BASE = "dpo-cli/tiny-random"
PROMPTS = [f"Tell me about {topic}." for topic in ("tea", "rain", "ants", "old maps", "the moon", "bread")]


def player(pairs: Path, name: str, *words: str) -> Path:
    return run_of(*tiny_words(pairs, pairs.with_name(name)), "optimizer.warmup_steps=0", *words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    return tmp_path_factory.mktemp("players")


@pytest.fixture(scope="module")
def brief(folder: Path) -> Path:
    """A run that learned to say one word: the base says many."""
    rows = [{"prompt": prompt, "chosen": "a", "rejected": "b c d e f g h i"} for prompt in PROMPTS]
    pairs = write_jsonl(folder / "brief.jsonl", rows)
    return player(pairs, "brief", "optimizer.lr=3e-2", "beta=0.01", "max_steps=12", "data.eval_fraction=0")


@pytest.fixture(scope="module")
def other(folder: Path) -> Path:
    return player(write_jsonl(folder / "pairs.jsonl", sample_rows(20)), "other", "optimizer.lr=1e-2")


@pytest.fixture(scope="module")
def reward(folder: Path) -> Path:
    pairs = write_jsonl(folder / "reward.jsonl", sample_rows(20))
    return player(pairs, "reward", "objective=reward", "optimizer.lr=1e-2")


@pytest.fixture(scope="module")
def prompts(folder: Path) -> Path:
    return write_jsonl(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])


def answers(ranking: Path) -> list[dict[str, Any]]:
    file = ranking.with_name(f"{ranking.stem}.answers.jsonl")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def of_player(ranking: Path, name: str) -> list[str]:
    return [row["responses"][row["players"].index(name)] for row in answers(ranking)]


def ranked(command: Command, output: Path, prompts: Path, *words: object) -> Ended:
    return command("dpo-rank", f"prompts={prompts}", "max_new_tokens=24", f"output={output}", *words)


# Tables


def test_tables_by_hand() -> None:
    # Rewards 2, 1, 1: the first beats both, the others share; then 0, 0, 0: all share; nobody plays themselves.
    match = Match(["a", "b", "c"], [], [], [[2.0, 1.0, 1.0], [0.0, 0.0, 0.0], [-1.0, 3.0, -2.0]])
    assert match.tables.tolist() == [
        [[0, 1, 1], [0, 0, 0.5], [0, 0.5, 0]],
        [[0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]],
        [[0, 0, 1], [1, 0, 1], [0, 0, 0]],
    ]


def test_every_pair_of_players_plays_one_game_a_prompt() -> None:
    rewards = torch.randn(7, 4, generator=torch.Generator().manual_seed(0)).round().tolist()  # rounded: with ties
    tables = Match(["a", "b", "c", "d"], [], [], rewards).tables
    games = tables + tables.mT
    assert torch.equal(games, (1 - torch.eye(4, dtype=torch.float64)).expand(7, 4, 4))


def test_names_are_short_where_that_tells_them_apart() -> None:
    assert short_names(["runs/a", "runs/b/"]) == ["a", "b"]
    assert short_names(["one/a", "two/a"]) == ["one/a", "two/a"]
    assert short_names(["outputs/one/final", "outputs/two/final/"]) == ["one/final", "two/final"]
    assert short_names(["a", "x/a", "y/a"]) == ["a", "x/a", "y/a"]
    assert short_names(["a", "a"]) == ["a", "a"]


def test_default_run_directories_are_told_apart_in_a_table() -> None:
    runs = [f"outputs/smollm2-sample/2026-01-31_{time}" for time in ("10-05-12", "10-31-07", "11-00-00")]
    assert cut_apart(short_names(runs), 14) == ["...10-05-12", "...10-31-07", "...11-00-00"]
    assert cut_apart(["sft", *short_names(runs)], 14)[:2] == ["sft", "...10-05-12"]
    assert cut_apart(["2026-01-31_10-05-12", "2026-02-01_10-05-12"], 14) == ["2026-01-31_...", "2026-02-01_..."]
    sweep = [f"runs/beta-{beta}_optimizer.lr-0.001" for beta in (0.05, 0.1)]
    assert cut_apart(short_names(sweep), 14) == ["beta-0.05_o...", "beta-0.1_op..."]
    assert cut_apart(["one and the same name"] * 2, 14) == ["one and the..."] * 2


# Games


def test_a_run_and_its_base_are_ranked_from_their_own_answers(
    command: Command, brief: Path, other: Path, prompts: Path, tmp_path: Path
) -> None:
    output = tmp_path / "r.json"
    ended = ranked(command, output, prompts, f"checkpoints=[{BASE},{brief},{other}]", "judge=shorter", "prior=1")
    assert ended.code == 0, ended.err
    found, rows = json.loads(output.read_text()), answers(output)
    assert [row["prompt"] for row in rows] == PROMPTS
    wins = torch.zeros(3, 3, dtype=torch.float64)
    for row in rows:
        assert row["players"] == ["tiny-random", "brief", "other"]
        assert row["rewards"] == [pytest.approx(-math.log1p(len(text.split()))) for text in row["responses"]]
        words = [len(text.split()) for text in row["responses"]]
        for one in range(3):
            for two in range(3):
                wins[one, two] += (one != two) * (1.0 if words[one] < words[two] else 0.5 * (words[one] == words[two]))
    strengths = dict(zip(found["names"], found["log_strengths"], strict=True))
    expected = fit(wins, 1.0).log_strengths.tolist()  # the intervals count prompts, the strengths games
    assert [strengths[name] for name in row["players"]] == pytest.approx(expected, abs=1e-9)
    assert (found["prior"], found["clusters"]) == (1.0, 6)
    assert found["log_strengths"] == sorted(found["log_strengths"], reverse=True)
    assert f"{BASE}: 6 prompts\n" in ended.out and "6 prompts of 6 rows" in ended.out


def test_a_player_that_never_loses_ends_with_the_remedy_and_is_ranked_by_it(
    command: Command, brief: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Match, "tables", property(lambda match: torch.tensor([[[0.0, 1.0], [0.0, 0.0]]] * 6).double()))
    output = tmp_path / "r.json"
    words = (f"checkpoints=[{brief},{BASE}]", "judge=shorter")
    ended = ranked(command, output, prompts, *words)
    assert (ended.code, ended.err) == (
        3,
        f"error: {prompts}: brief never lost to the others, so their strength has no bound; set prior=1, which adds a "
        "tie of every player with an average player\n",
    )
    assert len(answers(output)) == 6 and not output.exists()  # the completions are kept
    ended = ranked(command, output, prompts, *words, "prior=1")
    assert ended.code == 0, ended.err
    found = json.loads(output.read_text())
    # 6 wins, and a draw of each with an imaginary player of strength 1: by symmetry a = -b = x with the score
    # 6 (1 - s(2x)) + 1/2 - s(x) = 0.
    x = found["log_strengths"][0]
    assert found["names"] == ["brief", "tiny-random"] and found["log_strengths"][1] == pytest.approx(-x)
    assert 6 * (1 - 1 / (1 + math.exp(-2 * x))) + 0.5 - 1 / (1 + math.exp(-x)) == pytest.approx(0, abs=1e-6)


def test_the_completions_of_a_checkpoint_do_not_depend_on_the_other_checkpoints(
    command: Command, brief: Path, other: Path, prompts: Path, tmp_path: Path
) -> None:
    words = ("judge=shorter", "prior=1")
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    for output, players in ((one, [brief, other]), (two, [BASE, other, brief])):
        listed = ",".join(map(str, players))
        ended = ranked(command, output, prompts, f"checkpoints=[{listed}]", *words)
        assert ended.code == 0, ended.err
    assert of_player(one, "other") == of_player(two, "other")
    assert of_player(one, "brief") == of_player(two, "brief")
    assert of_player(two, "other") != of_player(two, "tiny-random")


def test_a_reward_model_judges_with_the_rewards_it_gives_labels(
    command: Command, reward: Path, other: Path, prompts: Path, tmp_path: Path
) -> None:
    output = tmp_path / "r.json"
    ended = ranked(command, output, prompts, f"checkpoints=[{BASE},{other}]", f"judge={reward}", "prior=1", "limit=4")
    assert ended.code == 0, ended.err
    rows = answers(output)
    labels = tmp_path / "labels.jsonl"
    ended = command(
        "dpo-label", f"samples={tmp_path / 'r.answers.jsonl'}", "by=reward", f"judge={reward}", f"output={labels}"
    )
    assert ended.code == 0, ended.err
    found = {row["prompt"]: row for row in map(json.loads, labels.read_text().splitlines())}
    assert len(found) == len(rows) == 4
    for row in rows:
        label = found[row["prompt"]]
        assert [label["reward_chosen"], label["reward_rejected"]] == pytest.approx(
            sorted(row["rewards"], reverse=True), abs=1e-5
        )


# Resume


def test_a_stopped_match_resumes_and_a_finished_match_is_not_played_again(
    command: Command, brief: Path, other: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (f"checkpoints=[{BASE},{brief},{other}]", "judge=shorter", "batch_size=2")
    straight, output = tmp_path / "straight.json", tmp_path / "r.json"
    ended = ranked(command, straight, prompts, *words, "prior=1")
    assert ended.code == 0, ended.err
    real, calls = module.distinct_completions, []

    def counted(*arguments: Any) -> Any:
        calls.append(len(arguments[2]))
        if len(calls) == 5:  # the second batch of the second player
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(module, "distinct_completions", counted)
    stopped = ranked(command, output, prompts, *words)
    assert (stopped.code, stopped.err) == (75, "error: stopped by SIGTERM; to resume, run the same command\n")
    assert [path.name for path in sorted(tmp_path.glob("r.*"))] == ["r.answers.jsonl.part"]
    calls[:] = [0] * 5
    ended = ranked(command, output, prompts, *words, "prior=1")
    assert ended.code == 0, ended.err
    assert sum(calls) == 3 * 6 - 4 * 2  # the four batches on disk are not generated again
    assert f"completions  {tmp_path / 'r.answers.jsonl'}, written when all are judged" in ended.out
    for name in ("json", "answers.jsonl"):
        assert output.with_suffix(f".{name}").read_bytes() == straight.with_suffix(f".{name}").read_bytes()
    # Ranked again, otherwise: by the answers that are there.
    before, calls[:] = output.with_suffix(".answers.jsonl").read_bytes(), [0] * 5
    again = ranked(command, output, prompts, *words, "prior=2")
    assert again.code == 0 and sum(calls) == 0 and f"already complete: {tmp_path / 'r.answers.jsonl'}" in again.out
    assert json.loads(output.read_text())["prior"] == 2
    # Another match is not mixed with it, nor one of other weights under the same name.
    mixed = ranked(command, output, prompts, *words, "seed=1")
    assert mixed.code == 2 and "was started with other settings (seed was 0, is 1)" in mixed.err
    weights = brief / "final" / "adapter_model.safetensors"
    kept = weights.read_bytes()
    try:
        weights.write_bytes((other / "final" / "adapter_model.safetensors").read_bytes())
        changed = ranked(command, output, prompts, *words)
    finally:
        weights.write_bytes(kept)
    assert changed.code == 2 and f"was started with other settings (weights.{brief}/final was" in changed.err
    assert output.with_suffix(".answers.jsonl").read_bytes() == before
    output.with_suffix(".answers.jsonl").write_bytes(b'{"id": 1}\n')
    spoilt = ranked(command, output, prompts, *words)
    assert spoilt.code == 3 and "r.answers.jsonl line 1: was not written by this version of dpo-rank" in spoilt.err


# What is refused


def test_players_and_judge_read_prompts_in_one_form(
    command: Command, folder: Path, brief: Path, prompts: Path, tmp_path: Path
) -> None:
    pairs = write_jsonl(folder / "plain.jsonl", sample_rows(20))
    plain = player(pairs, "plain", "data.template=plain", "max_steps=1")
    output = tmp_path / "r.json"
    mixed = ranked(command, output, prompts, f"checkpoints=[{BASE},{plain}]", "judge=shorter")
    says = f"({BASE}: chat, {plain}: plain); set template=chat or template=plain for all of them"
    assert (mixed.code, mixed.err) == (2, f"error: checkpoints: their templates differ {says}\n")
    judged = ranked(command, output, prompts, f"checkpoints=[{BASE},{brief}]", f"judge={plain}")
    says = f"judge={plain}: has template=plain, and the checkpoints have template=chat"
    assert (judged.code, judged.err) == (2, f"error: {says}; set template=plain for the checkpoints\n")
    assert list(tmp_path.iterdir()) == []
    turns = [{"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": p}]} for p in PROMPTS]
    asked = write_jsonl(tmp_path / "turns.jsonl", turns)
    words = ("template=plain", f"judge={plain}", "prior=1")
    ended = ranked(command, output, asked, f"checkpoints=[{BASE},{plain}]", *words)
    assert ended.code == 0, ended.err
    # Stored as dpo-label reads them: the rewards of both are of the same tokens.
    labels = tmp_path / "labels.jsonl"
    samples = tmp_path / "r.answers.jsonl"
    ended = command("dpo-label", f"samples={samples}", "by=implicit", f"judge={plain}", f"output={labels}")
    assert ended.code == 0, ended.err
    assert not any(text.startswith("  ") for row in answers(output) for text in row["responses"])
    rewards = {row["id"]: sorted(row["rewards"], reverse=True) for row in answers(output)}
    for row in map(json.loads, labels.read_text().splitlines()):
        assert [row["reward_chosen"], row["reward_rejected"]] == pytest.approx(rewards[row["sample"]], abs=1e-5)


def test_the_space_after_the_colon_of_a_conversation_in_plain_text_is_not_stored(
    command: Command, brief: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def completed(model: Any, prompts: list[list[int]], *_: Any) -> list[list[CompletionText]]:
        return [[CompletionText(" Hi there", 3, FinishReason.STOP)] for _ in prompts]

    monkeypatch.setattr(match_module, "generate_all", completed)
    turns = [{"role": "user", "content": "Why? "}]  # with a space that a dialogue in plain text does not keep
    asked = write_jsonl(tmp_path / "p.jsonl", [{"prompt": turns}, {"prompt": "Why is it so?"}])
    words = (f"checkpoints=[{BASE},{brief}]", "judge=shorter", "prior=1", "template=plain")
    ended = ranked(command, tmp_path / "r.json", asked, *words)
    assert ended.code == 0, ended.err
    assert [row["responses"] for row in answers(tmp_path / "r.json")] == [["Hi there"] * 2, [" Hi there"] * 2]
    assert "every prompt has the same result, so the intervals" in " ".join(ended.out.split())


def test_a_judge_whose_rewards_are_no_numbers_ranks_nobody(
    command: Command, folder: Path, brief: Path, prompts: Path, tmp_path: Path
) -> None:
    broken = player(write_jsonl(folder / "b.jsonl", sample_rows(20)), "broken", "objective=reward", "max_steps=1")
    weights = broken / "final" / "adapter_model.safetensors"
    save_file({name: tensor * float("nan") for name, tensor in load_file(weights).items()}, weights)
    ended = ranked(command, tmp_path / "r.json", prompts, f"checkpoints=[{BASE},{brief}]", f"judge={broken}", "prior=1")
    says = f"judge={broken}/final: gives rewards that are not finite; its weights are damaged"
    assert (ended.code, ended.err) == (4, f"error: {says}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["r.answers.jsonl.part"]  # the completions are kept


def test_a_ranking_is_written_over_no_other_file(command: Command, tmp_path: Path) -> None:
    games = tmp_path / "games.json"
    games.write_text(content := '[{"winner": "A", "loser": "B"}, {"winner": "B", "loser": "A"}]')
    ended = command("dpo-rank", f"games={games}", f"output={games}")
    says = f"output={games}: already exists and is not a ranking; name another file"
    assert (ended.code, ended.err) == (2, f"error: {says}\n") and games.read_text() == content
    other = command("dpo-rank", f"games={games}", f"output={tmp_path / 'r.csv'}")
    assert other.code == 2 and "must end in .json\n" in other.err
    os.mkfifo(tmp_path / "pipe.json")
    assert command("dpo-rank", f"games={games}", f"output={tmp_path / 'pipe.json'}").code == 2
    output = tmp_path / "new" / "r.json"
    for prior in (1, 2):  # a ranking may be made anew
        assert command("dpo-rank", f"games={games}", f"output={output}", f"prior={prior}").code == 0
        assert json.loads(output.read_text())["prior"] == prior


def test_dials_of_a_match_are_no_dials_of_a_file_of_games(command: Command, tmp_path: Path) -> None:
    games = tmp_path / "games.csv"
    games.write_text("winner,loser,count\nA,B,3\nB,A,1\n")
    for word in ("limit=3", "seed=1", "temperature=0.5", "template=chat", "batch_size=2", "device=cpu"):
        ended = command("dpo-rank", f"games={games}", word)
        says = f"{word}: games=FILE holds the results already; leave it out"
        assert (ended.code, ended.err) == (2, f"error: {says}\n")


def test_what_cannot_play_or_judge_is_refused_before_generation(
    command: Command, other: Path, reward: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generated: list[int] = []
    monkeypatch.setattr(module, "distinct_completions", lambda *_: generated.append(1))
    gone = tmp_path / "gone"
    nowhere = "no such directory; name a run directory, checkpoints/step-*, final/, a PEFT adapter directory or a model"
    players = f"checkpoints=[{BASE},{other}]"
    for words, code, says in (
        ((f"checkpoints=[{BASE},{gone}]", "judge=shorter"), 4, f"checkpoints={gone}: {nowhere}"),
        ((f"checkpoints=[{BASE},{BASE}]", "judge=shorter"), 2,
         f"checkpoints=['{BASE}', '{BASE}']: name each once"),
        ((f"checkpoints=[{BASE}]", "judge=shorter"), 2,
         f"checkpoints=['{BASE}']: must be two or more, for instance checkpoints=[runs/a,runs/b]"),
        ((f"checkpoints=[{BASE},{reward}]", "judge=shorter"), 2,
         f"checkpoints={reward}: is a reward model, which generates no text; use it as judge"),
        ((players,), 2, "judge=null: name a reward model's run, a DPO run, or a rule"),
        ((players, "judge=short"), 2,
         "judge=short: no such directory or rule; rules are shorter, longer, unrepetitive"),
        ((players, f"judge={gone}"), 4, f"judge={gone}: {nowhere}"),
        ((players, f"judge={BASE}"), 2, f"judge={BASE}: is a model without an adapter; name a run's adapter, or a "
         "sequence-classification model with one label"),
        ((players, "judge=shorter", "games=x.csv"), 2,
         "games=x.csv: give games=FILE, or checkpoints=[a,b,c] judge=... prompts=FILE"),
        ((players, "judge=shorter", "max_prompt_length=5"), 3, "more than max_prompt_length=5; raise it"),
    ):  # fmt: skip
        ended = ranked(command, tmp_path / "r.json", prompts, *words)
        assert ended.code == code and ended.err.count("\n") == 1, ended.err
        assert says in ended.err and (code == 3 or ended.err == f"error: {says}\n")
    assert generated == [] and list(tmp_path.iterdir()) == []


def test_prompts_are_needed_and_one_prompt_is_too_few(
    command: Command, brief: Path, prompts: Path, tmp_path: Path
) -> None:
    words = (f"checkpoints=[{BASE},{brief}]", "judge=shorter", "prior=1", "max_new_tokens=4")
    ended = command("dpo-rank", *words)
    says = "prompts=null: name a file of prompts, for instance prompts=prompts.jsonl"
    assert (ended.code, ended.err) == (2, f"error: {says}\n")
    ended = command("dpo-rank", *words, f"prompts={prompts}", "limit=1")
    says = f"{prompts}: has one prompt, and intervals need two; use more prompts"
    assert (ended.code, ended.err) == (3, f"error: {says}\n")
