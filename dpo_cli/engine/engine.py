"""The engine: what several processes (ranks) of a run share, and how they act as one.

One idea to keep in mind: a run is written for all ranks at once. Every rank holds the same batch, computes its share
of it, and after a sum over ranks holds the same numbers; so every rank takes the same decisions, and only what must
happen once (a file, a measurement) goes through `same`. With one process all of this is the identity.

A method that is marked *collective* must be called by every rank, in the same order, or the others wait for ever.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

T = TypeVar("T")


class Engine(Protocol):
    """The processes of a run."""

    rank: int  # of this process, from 0; rank 0 writes files and prints
    world_size: int

    @property
    def alone(self) -> bool:
        """Whether this process may stop, try again or raise without asking the others."""
        ...

    def same(self, make: Callable[[], T]) -> T:
        """What `make` returns or raises on rank 0, on every rank; on the others it is not called. Collective.

        For whatever must happen once (writing a file) or be equal on all ranks (a measurement, the content of a file).
        """
        ...

    def agree(self, value: int) -> int:
        """The largest value of all ranks. Collective."""
        ...

    def least(self, value: int) -> int:
        """The smallest value of all ranks. Collective."""
        ...

    def share(self, batch: Sequence[Any]) -> list[int]:
        """The indices of this rank's part of a batch: a pure function of the batch, each index on one rank."""
        ...

    def sum(self, table: Tensor) -> Tensor:
        """The table summed over ranks: each has filled in its own columns, and 0 elsewhere. Collective."""
        ...

    def shard(self, policy: Any) -> Any:
        """The policy as the optimizer sees it. Collective; called before there is an optimizer."""
        ...

    def sum_gradients(self, weights: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over ranks; one that is missing counts as 0. Collective, once a step."""
        ...

    def clip(self, weights: Iterable[nn.Parameter], limit: float) -> Tensor:
        """Scale gradients down to a total norm of `limit`; returns the norm before, () on every rank. Collective."""
        ...

    def full(self, tensor: Tensor) -> Tensor:
        """The whole of a tensor that may be sharded. Collective."""
        ...

    def like(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        """The part of a whole tensor that belongs beside this rank's part of `parameter`, on its device."""
        ...


class SingleEngine:
    """One process: it is all ranks."""

    rank = 0
    world_size = 1
    alone = True

    def same(self, make: Callable[[], T]) -> T:
        """What `make` returns."""
        return make()

    def agree(self, value: int) -> int:
        """The value."""
        return value

    def least(self, value: int) -> int:
        """The value."""
        return value

    def share(self, batch: Sequence[Any]) -> list[int]:
        """All indices."""
        return list(range(len(batch)))

    def sum(self, table: Tensor) -> Tensor:
        """The table."""
        return table

    def shard(self, policy: Any) -> Any:
        """The policy."""
        return policy

    def sum_gradients(self, weights: Iterable[nn.Parameter]) -> None:
        """Nothing: the gradients are whole."""

    def clip(self, weights: Iterable[nn.Parameter], limit: float) -> Tensor:
        """Scale gradients down to a total norm of `limit`; returns the norm before, ()."""
        return nn.utils.clip_grad_norm_(weights, limit)

    def full(self, tensor: Tensor) -> Tensor:
        """The tensor."""
        return tensor

    def like(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        """The tensor, on the parameter's device."""
        return tensor.to(parameter.device)


# Chosen by `engine.name`.
ENGINES: dict[str, Callable[[], Engine]] = {"single": SingleEngine}
SINGLE = SingleEngine()  # for commands that are one process
