"""The experiments of docs/paper.md and scripts/iterate.py, gone through with the tiny model."""

import itertools
from collections.abc import Callable
from pathlib import Path

import frontier
import iterate
import pytest
import torch
from conftest import Ended, sample_rows, write_jsonl

from dpo_cli.models.loading import find_model, load_model
from dpo_cli.runs.model_ref import ModelName, find_model_ref, load_policy

Words = list[tuple[str, ...]]


@pytest.fixture
def ran(command: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch) -> Words:
    """The commands that a script has run, here in this process."""
    said: Words = []

    def run(folder: Path, name: str, command_name: str, *words: str) -> None:
        said.append((command_name, *words))
        ended = command(f"dpo-{command_name}", *words, *TINY[command_name])
        assert ended.code == 0, ended.err

    for module in (frontier, iterate):
        monkeypatch.setattr(module, "run", run)
    return said


TINY = {
    "train": ("model.dtype=float32", "max_steps=3", "batch_size=4", "data.eval_fraction=0", "optimizer.warmup_steps=0"),
    "sample": (),
    "label": (),
    "rank": (),
}


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "pairs.jsonl", sample_rows(20))


def logits(subject_name: str) -> torch.Tensor:
    """What the policy of a run, or a model, says to a few tokens."""
    subject = find_model_ref(ModelName(subject_name, alone=True))
    cpu = torch.device("cpu")
    base = load_model(find_model(subject.base), torch.float32, cpu) if subject.is_adapter else None
    with torch.no_grad():
        found: torch.Tensor = load_policy(subject, base, torch.float32, cpu)(torch.arange(5, 25)[None]).logits
    return found


def test_every_round_begins_at_the_policy_of_the_round_before(
    ran: Words, pairs: Path, tmp_path: Path, tiny_path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "rounds"
    words = ["--judge", "shorter", "--folder", str(folder), "--model", "tiny", "--name", tiny_path, "--lr", "1e-2"]
    words += ["--prompts", str(pairs), "--held-out", str(pairs), "--each", "6", "--compared", "5"]
    iterate.main([*words, "--rounds", "3", "--max-new-tokens", "8"])
    assert [command for command, *_ in ran] == [*("sample", "label", "train") * 3, "rank"]
    # Sampled from the policy that the round begins at, and learned with it as start and reference.
    assert "model=tiny" in ran[0] and f"checkpoint={folder / 'round-1'}" in ran[3]
    assert f"model.name_or_path={folder / 'start-3'}" in ran[8]
    for number in (1, 2):
        policy, start = logits(str(folder / f"round-{number}")), logits(str(folder / f"start-{number + 1}"))
        torch.testing.assert_close(policy, start, atol=1e-5, rtol=1e-5)
        before = tiny_path if number == 1 else str(folder / f"start-{number}")
        assert float((start - logits(before)).abs().max()) > 1e-2
    # Every round has other prompts.
    asked = [set((folder / f"prompts-{number}.jsonl").read_text().splitlines()) for number in (1, 2, 3)]
    assert [len(prompts) for prompts in asked] == [6, 6, 6] and len(set.union(*asked)) == 18
    table = capsys.readouterr().out.splitlines()[-4:]
    assert [line.split()[0] for line in table] == ["reference", "round-1", "round-2", "round-3"]
    rewards = [float(line.split()[1]) for line in table]
    changes = [float(line.split()[4]) for line in table[1:]]
    steps = [after - before for before, after in itertools.pairwise(rewards)]
    assert changes == pytest.approx(steps, abs=2e-3)
    # What is there already is not done again.
    done = (folder / "start-3" / "model.safetensors").stat().st_mtime_ns
    iterate.main([*words, "--rounds", "3", "--max-new-tokens", "8"])
    assert (folder / "start-3" / "model.safetensors").stat().st_mtime_ns == done


def test_the_frontier_is_measured_from_the_files_of_the_commands(
    ran: Words, pairs: Path, tmp_path: Path, tiny_path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    folder, figure = tmp_path / "paper", tmp_path / "figure.svg"
    words = ["--folder", str(folder), "--model", "tiny", "--name", tiny_path, "--pairs", str(pairs), "--lr", "1e-2"]
    words += ["--held-out", str(pairs), "--prompts", "8", "--compared", "6", "--betas", "0.1", "--figure", str(figure)]
    frontier.main([*words, "--max-new-tokens", "8"])
    assert [command for command, *_ in ran] == ["train", "sample", "label", "train", "sample", "rank"]
    lines = {
        line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith(("ref", "beta-"))
    }
    assert lines["reference"].split()[1:4] == ["0.000", "(0.000,", "0.000)"]
    assert lines["reference"].split()[-3:] == ["0.000", "(0.000,", "0.000)"]
    reference, policy = (float(lines[name].split()[4]) for name in ("reference", "beta-0.1"))
    more, kl = float(lines["beta-0.1"].split()[7]), float(lines["beta-0.1"].split()[1])
    assert more == pytest.approx(policy - reference, abs=2e-3)
    assert kl != 0
    assert figure.read_bytes().startswith(b"<?xml")
