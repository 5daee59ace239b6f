"""The seam of the engine: a run on two ranks is the run on one, and rank 0 alone writes."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Ended, records, tiny_words
from safetensors.torch import load_file

from dpo_cli.engine.engine import ENGINES, SINGLE

Command = Callable[..., Ended]
SCRIPT = Path(__file__).parent / "two_ranks.py"
ROOT = Path(__file__).parent.parent
TIMINGS = {"seconds", "pairs_per_second", "tokens_per_second", "peak_memory_gib"}
# A batch of 3 leaves rank 1 one pair, and the last batch of an epoch may leave it none.
WORDS = ("batch_size=3", "max_steps=6", "eval_every=3", "save_every=2", "log_every=2", "keep_checkpoints=9")


def on_two_ranks(folder: Path, words: list[str], **environment: str) -> list[subprocess.CompletedProcess[str]]:
    meeting = folder.with_name(f"{folder.name}-meeting-{len(words)}")
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    ranks = [
        subprocess.Popen([sys.executable, str(SCRIPT), str(rank), str(meeting), *words], env=env, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in (0, 1)
    ]  # fmt: skip
    ended = []
    try:
        for rank in ranks:
            out, err = rank.communicate(timeout=200)
            ended.append(subprocess.CompletedProcess(rank.args, rank.returncode, out, err))
    finally:
        for rank in ranks:
            rank.kill()
    return ended


def same_run(one: Path, other: Path) -> None:
    for file in ("final/adapter_model.safetensors", "checkpoints/step-00000006/optimizer.safetensors"):
        ours, theirs = load_file(one / file), load_file(other / file)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.allclose(ours[name], theirs[name], atol=2e-6, rtol=1e-4), name
    lines, others = records(one), records(other)
    assert [(line["step"], line["split"]) for line in lines] == [(line["step"], line["split"]) for line in others]
    for line, again in zip(lines, others, strict=True):
        assert line.keys() == again.keys()
        intervals, same_intervals = line.pop("intervals95", {}), again.pop("intervals95", {})
        assert intervals.keys() == same_intervals.keys()
        for name, ends in intervals.items():
            assert ends == pytest.approx(same_intervals[name], abs=2e-3), name
        for key in line.keys() - TIMINGS:
            assert line[key] == (pytest.approx(again[key], abs=2e-4) if isinstance(again[key], float) else again[key])


@pytest.mark.parametrize("more", [(), ("objective=reward",)], ids=["dpo", "reward"])
def test_a_run_on_two_ranks_is_the_run_on_one(
    command: Command, pairs_file: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    alone, two = tmp_path / "alone", tmp_path / "two"
    assert command("dpo-train", *tiny_words(pairs_file, alone), *WORDS, *more).code == 0
    first, second = on_two_ranks(two, [*tiny_words(pairs_file, two), *WORDS, *more])
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    same_run(two, alone)
    assert second.stdout == ""  # rank 0 speaks for all
    assert sorted(path.name for path in two.rglob("*")) == sorted(path.name for path in alone.rglob("*"))


def test_a_signal_to_one_rank_stops_all_at_the_same_step_and_one_process_resumes(
    command: Command, pairs_file: Path, tmp_path: Path
) -> None:
    alone, two = tmp_path / "alone", tmp_path / "two"
    assert command("dpo-train", *tiny_words(pairs_file, alone), *WORDS).code == 0
    words = [*tiny_words(pairs_file, two), *WORDS]
    first, second = on_two_ranks(two, words, STOP="1:3")
    assert (first.returncode, second.returncode) == (75, 75), first.stderr + second.stderr
    assert "error: stopped by SIGTERM at step 3; to resume, run the same command with output_dir=" in first.stderr
    assert command("dpo-train", *words, "resume=auto").code == 0
    same_run(two, alone)


def test_a_rank_that_finds_its_pairs_made_stays_in_step(
    command: Command, pairs_file: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two computers one has trained on this file before."""
    words = [*tiny_words(pairs_file, tmp_path / "two"), *WORDS]
    for rank in (0, 1):
        for model in cache.glob("tiny*"):
            shutil.copytree(model, tmp_path / f"cache-{rank}" / model.name)
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "cache-1"))
    assert command("dpo-train", *tiny_words(pairs_file, tmp_path / "alone"), *WORDS).code == 0
    first, second = on_two_ranks(tmp_path / "two", words, DPO_CACHE=str(tmp_path / "cache"), OWN_CACHES="1")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    same_run(tmp_path / "two", tmp_path / "alone")


def test_one_process_is_all_ranks() -> None:
    table = torch.ones(2, 3)
    assert SINGLE.alone and SINGLE.rank == 0 and SINGLE.world_size == 1
    assert SINGLE.share("abc") == [0, 1, 2] and SINGLE.sum(table) is table and SINGLE.full(table) is table
    assert SINGLE.same(lambda: 7) == SINGLE.agree(7) == SINGLE.least(7) == 7
    assert [*ENGINES] == ["single"]
