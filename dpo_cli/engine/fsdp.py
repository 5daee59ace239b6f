"""Sharded ranks: each holds a part of every weight, and gathers a layer's weights while it computes that layer.

torch's FSDP2 (`fully_shard`) does the gathering and summing. https://arxiv.org/abs/2304.11277
A forward pass is a collective here: all ranks must do equally many, and none may try one again by itself.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from types import MethodType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from dpo_cli.engine.ddp import DdpEngine
from dpo_cli.engine.engine import replace_tensors
from dpo_cli.engine.ranks import Place

T = TypeVar("T")


class FsdpEngine(DdpEngine):
    """Ranks that each hold a part of every weight."""

    retries = False
    keeps_all = False

    def __init__(self, place: Place, device_type: str, timeout: float, cpu_offload: bool = False) -> None:
        super().__init__(place, device_type, timeout)
        self.mesh = dist.init_device_mesh(device_type, (self.world_size,))
        self.offload = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
        where = ", kept in the CPU's memory" if cpu_offload else ""
        self.description += f", every weight sharded{where}; each dtype computed and summed as it is"

    def rounds(self, own: Sequence[T], spare: T) -> Iterator[tuple[T, bool]]:
        """Its own, and the spare one until every rank has done as many as the busiest. Collective."""
        void = self.agree(len(own)) - len(own)
        yield from ((one, True) for one in own)
        yield from ((spare, False) for _ in range(void))

    def loads_on(self, device: torch.device) -> torch.device:
        """Rank 0 loads the weights into the CPU's memory; the others know the shape until `shard` brings their part."""
        return torch.device("cpu" if self.rank == 0 else "meta")

    def shard(self, model: Any, device: torch.device) -> Any:
        """Give every rank its part of each layer and of what is outside the layers, from rank 0."""
        known: dict[int, Tensor] = {}

        def of_rank_0(tensor: Tensor) -> Tensor:
            if isinstance(tensor, DTensor):  # sharded with an earlier part
                return tensor
            there = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.data.to(device)
            dist.broadcast(there, 0)
            return there

        names = set(getattr(model, "_no_split_modules", None) or ())
        layers = [module for module in model.modules() if type(module).__name__ in names]
        for part in [*layers, model]:
            replace_tensors(part, of_rank_0, known)
            fully_shard(part, mesh=self.mesh, offload_policy=self.offload)
            part.set_gradient_divide_factor(1.0)  # sums: a loss is divided by the size of the whole batch already
            part.set_force_sum_reduction_for_comms(True)
        model.with_weights = MethodType(_with_weights, model)
        register_fsdp_forward_method(model, "with_weights")
        gathered = model.with_weights

        def with_weights(compute: Callable[..., T], *arguments: Any) -> T:
            try:
                found: T = gathered(compute, *arguments)
                return found
            finally:  # FSDP keeps what is outside the layers whole until a backward pass, and it would be saved so
                model.reshard()

        model.with_weights = with_weights
        return model

    def sum_gradients(self, weights: Iterable[nn.Parameter]) -> None:
        """Nothing: FSDP has summed them in the backward pass."""

    def clip(self, weights: Iterable[nn.Parameter], limit: float) -> Tensor:
        """Scale gradients down to a total norm of `limit`; returns the norm before, (). Collective."""
        norm = nn.utils.clip_grad_norm_(weights, limit)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def full(self, tensor: Tensor) -> Tensor:
        """The whole tensor in rank 0's memory; the others get nothing. Collective."""
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return whole.cpu() if self.rank == 0 else whole.new_empty(0)


def _with_weights(model: Any, compute: Callable[..., T], *arguments: Any) -> T:
    """A forward pass of the whole model to FSDP, whatever it calls of it."""
    return compute(model, *arguments)
