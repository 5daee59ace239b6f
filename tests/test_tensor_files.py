"""Tensors in several files: what is too large to be gathered at once is written and read part by part."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import run_of, tiny_words
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpo_cli.runs import checkpoint, tensor_files
from dpo_cli.runs.tensor_files import gather, names_in, parts_of, tensors_in

TENSORS = {f"weight {number}": torch.full((10,), float(number)) for number in range(5)}


def test_parts_hold_what_was_gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "PART_BYTES", 80)  # two tensors
    gather(TENSORS.items(), tmp_path / "scratch", keeps=True).write(tmp_path / "state.safetensors")
    names = [part.name for part in parts_of(tmp_path / "state.safetensors")]
    assert names == [f"state-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert names_in(tmp_path / "state.safetensors") == {*TENSORS}
    assert all(torch.equal(TENSORS[name], tensor) for name, tensor in tensors_in(tmp_path / "state.safetensors"))
    assert not any((tmp_path / "scratch").iterdir())


def test_a_rank_that_keeps_nothing_goes_through_all_and_writes_none(tmp_path: Path) -> None:
    gone_through = iter(TENSORS.items())
    assert gather(gone_through, tmp_path / "scratch", keeps=False).tensors == {}
    assert next(gone_through, None) is None and not (tmp_path / "scratch").exists()


def test_a_disk_that_is_full_is_said_when_the_parts_are_written_and_all_are_gone_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(tensor_files, "PART_BYTES", 80)
    monkeypatch.setattr(tensor_files, "save_file", full)
    gone_through = iter(TENSORS.items())
    gathered = gather(gone_through, tmp_path / "scratch", keeps=True)
    assert next(gone_through, None) is None
    with pytest.raises(OSError, match="No space left"):
        gathered.write(tmp_path / "state.safetensors")


def test_a_run_with_parts_resumes_to_the_same_bits(
    pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (tensor_files, checkpoint):
        monkeypatch.setattr(module, "PART_BYTES", 60_000)
    words = ["lora=off", "max_steps=4", "save_every=2", "keep_checkpoints=3"]
    straight = run_of(*tiny_words(pairs_file, tmp_path / "straight"), *words)
    middle = straight / "checkpoints" / "step-00000002"
    assert len(parts_of(middle / "optimizer.safetensors")) > 1 and len(parts_of(middle / "model.safetensors")) > 1
    assert not [path for path in (straight / "checkpoints").iterdir() if path.name.startswith(".tmp")]
    copy = tmp_path / "copy"
    shutil.copytree(straight, copy)
    shutil.rmtree(copy / "final")
    shutil.rmtree(copy / "checkpoints" / "step-00000004")
    run_of(*tiny_words(pairs_file, copy), *words, "resume=auto")
    for part in parts_of(straight / "final" / "model.safetensors"):
        ours, theirs = load_file(part), load_file(copy / "final" / part.name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert AutoModelForCausalLM.from_pretrained(copy / "final").num_parameters() > 0
