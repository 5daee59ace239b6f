"""The engine: what several processes (ranks) of a run share, and how they act as one.

One idea to keep in mind: a run is written for all ranks at once. Every rank holds the same batch, computes its share
of it, and after a sum over ranks holds the same numbers; so every rank takes the same decisions, and only what must
happen once (a file, a measurement) goes through `same`. With one process all of this is the identity.

A method that is marked *collective* must be called by every rank, in the same order, or the others wait for ever.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from dpo_cli.errors import StoppedError

T = TypeVar("T")
R = TypeVar("R")


class Engine(Protocol):
    """The processes of a run."""

    rank: int  # of this process, from 0; rank 0 writes files and prints
    world_size: int

    @property
    def alone(self) -> bool:
        """Whether this process may stop or raise without asking the others."""
        ...

    @property
    def retries(self) -> bool:
        """Whether a rank may compute its share again by itself: nothing is sent until the step's end."""
        ...

    @property
    def keeps_all(self) -> bool:
        """Whether each rank holds every weight, so that rank 0 can save a run that has lost a rank."""
        ...

    @property
    def description(self) -> str:
        """For the header."""
        ...

    def watch(self, in_time: bool = False) -> AbstractContextManager[None]:
        """Within, a rank that is gone becomes a LostRankError that names it; an error here is told to the others.

        A rank may take as long as it likes for what it does alone, such as preparing data, unless `in_time`.
        """
        ...

    def alike(self, found: Mapping[str, str]) -> None:
        """ConfigError, on every rank, where one has another value than rank 0; empty ones say nothing. Collective."""
        ...

    def same(self, make: Callable[[], T]) -> T:
        """What `make` returns or raises on rank 0, on every rank; on the others it is not called. Collective.

        For whatever must happen once (writing a file) or be equal on all ranks (a measurement, the content of a file).
        """
        ...

    def gather(self, value: T) -> list[T]:
        """The value of each rank, in their order, on every rank; it must be picklable. Collective."""
        ...

    def agree(self, value: int) -> int:
        """The largest value of all ranks. Collective."""
        ...

    def least(self, value: int) -> int:
        """The smallest value of all ranks. Collective."""
        ...

    def share(self, sizes: Sequence[int]) -> list[int]:
        """The indices of this rank's part of a batch, in their order, by the tokens of each item.

        A pure function of the sizes; each index is on one rank.
        """
        ...

    def rounds(self, own: Sequence[T], spare: T) -> Iterator[tuple[T, bool]]:
        """This rank's micro-batches, each with whether it counts.

        Where every rank must do equally many, the `spare` one is appended, and does not count. Collective.
        """
        ...

    def sum(self, table: Tensor) -> Tensor:
        """The table summed over ranks: each has filled in its own columns, and 0 elsewhere. Collective."""
        ...

    def loads_on(self, device: torch.device) -> torch.device:
        """Where this rank loads a model that is sharded then: `meta` is its shape alone."""
        ...

    def shard(self, model: Any, device: torch.device) -> Any:
        """The model as this rank computes with it on `device`. Collective; before any pass and any optimizer."""
        ...

    def sum_gradients(self, weights: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over ranks; one that is missing counts as 0. Collective, once a step."""
        ...

    def clip(self, weights: Iterable[nn.Parameter], limit: float) -> Tensor:
        """Scale gradients down to a total norm of `limit`; returns the norm before, () on every rank. Collective."""
        ...

    def full(self, tensor: Tensor) -> Tensor:
        """The whole of a tensor that may be sharded, on rank 0; the others get nothing. Collective."""
        ...


class SingleEngine:
    """One process: it is all ranks."""

    rank = 0
    world_size = 1
    alone = True
    retries = True
    keeps_all = True
    description = "one process"

    def watch(self, in_time: bool = False) -> AbstractContextManager[None]:
        """Nothing."""
        return nullcontext()

    def alike(self, found: Mapping[str, str]) -> None:
        """Nothing: there is no other."""

    def same(self, make: Callable[[], T]) -> T:
        """What `make` returns."""
        return make()

    def gather(self, value: T) -> list[T]:
        """The value, alone."""
        return [value]

    def agree(self, value: int) -> int:
        """The value."""
        return value

    def least(self, value: int) -> int:
        """The value."""
        return value

    def share(self, sizes: Sequence[int]) -> list[int]:
        """All indices."""
        return list(range(len(sizes)))

    def rounds(self, own: Sequence[T], spare: T) -> Iterator[tuple[T, bool]]:
        """All of them, and all count."""
        return ((one, True) for one in own)

    def sum(self, table: Tensor) -> Tensor:
        """The table."""
        return table

    def loads_on(self, device: torch.device) -> torch.device:
        """The device."""
        return device

    def shard(self, model: Any, device: torch.device) -> Any:
        """The model."""
        return model

    def sum_gradients(self, weights: Iterable[nn.Parameter]) -> None:
        """Nothing: the gradients are whole."""

    def clip(self, weights: Iterable[nn.Parameter], limit: float) -> Tensor:
        """Scale gradients down to a total norm of `limit`; returns the norm before, ()."""
        return nn.utils.clip_grad_norm_(weights, limit)

    def full(self, tensor: Tensor) -> Tensor:
        """The tensor."""
        return tensor


SINGLE = SingleEngine()  # for commands that are one process


def in_turns(
    engine: Engine, items: Sequence[T], work: Callable[[T], R], poll: Callable[[], None] = lambda: None
) -> Iterator[list[tuple[T, R]]]:
    """`work` on every item, each on one rank; after each round, on every rank, its items with their results.

    An item's work is the same on any number of ranks. `poll` comes before each round; `work` may raise StoppedError on
    a rank of several where `poll` then raises it on all: what the others have done is still given out. Collective.
    """
    for start in range(0, len(items), engine.world_size):
        poll()
        some = items[start : start + engine.world_size]
        mine: list[R] = []
        try:
            mine += [work(item) for item in some[engine.rank : engine.rank + 1]]
        except StoppedError:
            if engine.alone:
                raise
        found = engine.gather(mine)
        yield [(item, result) for item, results in zip(some, found, strict=False) for result in results]
        if sum(map(len, found)) < len(some):
            poll()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be sharded."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def replace_tensors(model: nn.Module, make: Callable[[Tensor], Tensor], known: dict[int, Tensor]) -> None:
    """Put what `make` returns in the place of each parameter and buffer; tied weights stay tied.

    `known` keeps what stands for which, by id, where a model is gone through part by part.
    """
    for module in model.modules():
        slots: Any
        for slots in (module._parameters, module._buffers):
            for name, tensor in slots.items():
                if tensor is None:
                    continue
                if id(tensor) not in known:
                    made = make(tensor)
                    if isinstance(tensor, nn.Parameter) and not isinstance(made, nn.Parameter):
                        made = nn.Parameter(made, tensor.requires_grad)
                    known[id(tensor)] = known[id(made)] = made
                slots[name] = known[id(tensor)]


def part_like(parameter: Tensor, whole: Tensor) -> Tensor:
    """The part of a whole tensor that belongs beside this rank's part of `parameter`, on its device."""
    if local(parameter) is parameter or whole.ndim == 0:
        return whole.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor  # where nothing is sharded it need not be read

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    part: Tensor = distribute_tensor(whole.to(parameter.device), mesh, placements, src_data_rank=None)
    return part


@contextmanager
def gathered(model: nn.Module, part: str) -> Iterator[None]:
    """Within, the weights of a part of a sharded model, by its name, are whole on every rank. Collective."""
    words = part.split(".")
    around = (model.get_submodule(".".join(words[:number])) for number in range(len(words) + 1))
    sharded: list[Any] = [module for module in around if hasattr(module, "unshard")]
    if not sharded:
        yield
        return
    sharded[-1].unshard()
    try:
        yield
    finally:
        sharded[-1].reshard()


def on_whole(model: Any, compute: Callable[..., T], *arguments: Any) -> T:
    """`compute(model, *arguments)`, with the weights of a sharded model gathered where it uses them.

    Whatever calls a part of a model past the model's own forward pass goes through this.
    """
    gathered = getattr(model, "with_weights", None)  # of a sharded model: FsdpEngine.shard
    found: T = compute(model, *arguments) if gathered is None else gathered(compute, *arguments)
    return found
