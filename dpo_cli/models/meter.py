"""What a forward and backward pass takes in memory and arithmetic, found without a weight: by a run without numbers.

The model's own code runs on tensors that have a shape, a dtype and no content, and every tensor is counted from its
making to its end. So checkpointing, adapters, the head in chunks and every family's own layers are counted as they are.
Storages are counted once, whatever views there are of them.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dpo_cli.engine.engine import replace_tensors
from dpo_cli.models.logps import MicroBatch


@dataclass(frozen=True)
class PassMemory:
    """Bytes of a forward and backward pass, weights aside."""

    tokens: int
    kept: int  # when the forward pass has ended
    forward: int  # at the peak of the forward pass
    backward: int  # at the peak of the backward pass, new gradients of weights among them
    new_gradients: int  # of those


class Meter(TorchDispatchMode):
    """Within, counts the bytes of all tensors that are made, until they are gone; `known` ones are not counted."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.live: dict[int, tuple[int, int]] = {}  # by storage: its bytes, and how many were made before it
        self.now = self.peak = self.made = self.made_at_peak = 0
        self._known = [tensor.untyped_storage() for tensor in known]  # held, so that no other takes their place
        self._known_keys = {storage._cdata for storage in self._known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count the storages that are new."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        key = storage._cdata
        if key in self.live or key in self._known_keys:
            return
        self.made += 1
        self.live[key] = (storage.nbytes(), self.made)
        self.now += storage.nbytes()
        if self.now > self.peak:
            self.peak, self.made_at_peak = self.now, self.made
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self.live.pop(key)[0]

    def start_peak(self) -> None:
        """Forget the peak so far."""
        self.peak, self.made_at_peak = self.now, self.made


@contextmanager
def without_content(model: Any, device: torch.device) -> Iterator[torch.device]:
    """Within, a model on the device `meta` computes as on `device`; yields the device of its inputs.

    On `cpu` its tensors pretend to be there, since the code of attention asks. For any other they stay on `meta`.
    """
    if device.type != "cpu":
        yield torch.device("meta")
        return
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def pretend(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor

    with mode:
        replace_tensors(model, pretend, {})
        yield device


def meter_pass(
    policy: Any, score: Callable[[Any, MicroBatch], Tensor], micro_batch: MicroBatch, accumulates: bool
) -> PassMemory:
    """Meter `score(policy, micro_batch)` forward and backward; `accumulates`: gradients of weights are there before."""
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    for weight in weights:
        weight.grad = torch.empty_like(weight) if accumulates else None
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    with Meter([*_tensors(policy), *gradients, *_inputs(micro_batch)]) as meter:
        scores = score(policy, micro_batch)
        kept, forward = meter.now, meter.peak
        meter.start_peak()
        scores.sum().backward()
    found = {weight.grad.untyped_storage()._cdata for weight in weights if weight.grad is not None}
    new = sum(size for key, (size, made) in meter.live.items() if key in found and made <= meter.made_at_peak)
    peak = meter.peak
    for weight in weights:
        weight.grad = None
    return PassMemory(micro_batch.input_ids.numel(), kept, forward, peak, new)


def meter_scoring(policy: Any, score: Callable[[Any, MicroBatch], Tensor], micro_batch: MicroBatch) -> int:
    """Bytes at the peak of a forward pass without gradient, weights aside."""
    with Meter([*_tensors(policy), *_inputs(micro_batch)]) as meter, torch.no_grad():
        score(policy, micro_batch)
    return meter.peak


def count_flops(
    policy: Any, score: Callable[[Any, MicroBatch], Tensor], micro_batch: MicroBatch
) -> tuple[float, float]:
    """Floating-point operations a token of the micro-batch: of scoring it, and of a forward and backward pass."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        score(policy, micro_batch)
    scoring = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        score(policy, micro_batch).sum().backward()
    policy.zero_grad(set_to_none=True)
    tokens = micro_batch.input_ids.numel()
    return scoring / tokens, counter.get_total_flops() / tokens


def _tensors(model: Any) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _inputs(micro_batch: MicroBatch) -> list[Tensor]:
    return [value for value in vars(micro_batch).values() if isinstance(value, Tensor)]
