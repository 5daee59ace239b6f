"""A step that is not finite touches no weight: seen at once, or left to the fused optimizer until the next look."""

import pytest
import torch
from torch import nn

from dpo_cli.engine.engine import SINGLE
from dpo_cli.errors import DivergedError
from dpo_cli.training.guard import UNSEEN, NonFiniteGuard

ROWS = [11, 12]


def optimizer() -> torch.optim.Optimizer:
    weight = nn.Parameter(torch.ones(3))
    return torch.optim.AdamW([weight], lr=0.1, fused=True)


def step(guard: NonFiniteGuard, number: int, value: float) -> None:
    """One update with a gradient of that value."""
    weight = guard.optimizer.param_groups[0]["params"][0]
    weight.grad = torch.full((3,), value)
    guard.before_update(number, ROWS, torch.tensor([1.0, abs(value)]), weight.grad.norm())
    guard.optimizer.step()
    guard.optimizer.zero_grad()


def weights(guard: NonFiniteGuard) -> list[float]:
    values: list[float] = guard.optimizer.param_groups[0]["params"][0].tolist()
    return values


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_looked_at_at_once_it_raises_before_the_update(bad: float) -> None:
    guard = NonFiniteGuard(optimizer(), deferred=False)
    step(guard, 1, 1.0)
    before = weights(guard)
    with pytest.raises(
        DivergedError, match=r"step 2: the loss of rows 12 of the data is not finite .*; the weights were not touched"
    ):
        step(guard, 2, bad)
    assert weights(guard) == before != [1.0] * 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_deferred_it_freezes_the_weights_from_the_bad_step_on_and_raises_at_the_look(bad: float) -> None:
    guard = NonFiniteGuard(optimizer(), deferred=True)
    step(guard, 1, 1.0)
    before = weights(guard)
    step(guard, 2, bad)
    step(guard, 3, 1.0)  # a healthy one behind it must not move what is to be kept
    assert weights(guard) == before != [1.0] * 3
    with pytest.raises(DivergedError, match="step 2: "):
        guard.look()


def test_deferred_it_looks_by_itself_after_so_many_steps() -> None:
    guard = NonFiniteGuard(optimizer(), deferred=True)
    step(guard, 1, float("nan"))
    with pytest.raises(DivergedError, match="step 1: "):
        for number in range(2, UNSEEN + 1):
            step(guard, number, 1.0)


def test_deferred_healthy_steps_are_those_of_the_bare_optimizer() -> None:
    guard, bare = NonFiniteGuard(optimizer(), deferred=True), optimizer()
    for number, value in enumerate([1.0, -0.5, 2.0], start=1):
        step(guard, number, value)
        bare.param_groups[0]["params"][0].grad = torch.full((3,), value)
        bare.step()
        guard.look()
    assert weights(guard) == bare.param_groups[0]["params"][0].tolist()


def test_an_optimizer_that_cannot_leave_weights_alone_is_looked_at_in_every_step() -> None:
    plain = torch.optim.RMSprop([nn.Parameter(torch.ones(3))])
    assert not NonFiniteGuard.of(plain, torch.device("cuda"), "abort").deferred
    assert NonFiniteGuard.of(optimizer(), torch.device("cuda"), "abort").deferred
    assert not NonFiniteGuard.of(optimizer(), torch.device("cpu"), "abort").deferred


def test_a_fused_optimizer_gets_its_step_counts_back_beside_the_weights() -> None:
    from dpo_cli.runs.checkpoint import _restore_optimizer, optimizer_tensors

    model = nn.Linear(2, 2, bias=False)
    fused = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model.weight.grad = torch.ones(2, 2)
    fused.step()
    stored = dict(optimizer_tensors(model, fused, SINGLE))
    restored = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    # The meta device stands for a GPU: a step count left on the CPU would be read there as an address of the device.
    with torch.device("meta"):
        elsewhere = nn.Linear(2, 2, bias=False)
    on_meta = torch.optim.AdamW(elsewhere.parameters(), lr=0.1)
    on_meta.param_groups[0]["fused"] = True
    _restore_optimizer(stored.items(), elsewhere, on_meta, None)
    assert {value.device.type for value in on_meta.state[elsewhere.weight].values()} == {"meta"}
    _restore_optimizer(stored.items(), model, restored, None)
    assert torch.equal(restored.state[model.weight]["exp_avg"], fused.state[model.weight]["exp_avg"])
