"""Random generators: what is saved of them, and that it brings them back."""

from typing import Any

import pytest
import torch

from dpo_cli.errors import CheckpointError
from dpo_cli.models.generators import rng_states, set_rng_states
from dpo_cli.models.loading import undisturbed


def test_the_generator_of_apples_gpu_is_saved_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, gpu = torch.nn.Linear(1, 1), torch.Generator().manual_seed(3)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    monkeypatch.setattr("torch.mps.get_rng_state", gpu.get_state)
    monkeypatch.setattr("torch.mps.set_rng_state", gpu.set_state)

    def drawn() -> list[float]:
        return [float(torch.rand(1)), float(torch.rand(1, generator=gpu))]

    states = rng_states()
    first = drawn()
    assert set(states) >= {"cpu", "mps"} and drawn() != first
    set_rng_states(states)
    with undisturbed(policy):
        assert drawn() == first
    assert drawn() == first


def test_states_of_a_device_that_is_not_here_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("no such device")

    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    monkeypatch.setattr("torch.mps.set_rng_state", refuse)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    set_rng_states({**rng_states(), "mps": torch.zeros(8), "cuda:0": torch.zeros(8)})
    with pytest.raises(CheckpointError, match="the checkpoint holds no state of a random generator"):
        set_rng_states({"cpu": torch.zeros(8)})
