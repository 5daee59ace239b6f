"""A run on two ranks over gloo, to try the seam of the engine with: python two_ranks.py RANK MEETING_FILE WORD ...

The engine is as small as the protocol allows: gradients are summed, every rank holds all weights.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpo_cli.engine.engine import SingleEngine


class TwoRanks(SingleEngine):
    """Each rank takes every second pair."""

    world_size = 2
    alone = False

    def __init__(self, rank: int, meeting: str) -> None:
        self.rank = rank
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)

    def same(self, make: Callable[[], Any]) -> Any:
        found: list[Any] = [None, None]
        if self.rank == 0:
            try:
                found[0] = make()
            except Exception as error:
                found[1] = error
        dist.broadcast_object_list(found)
        if found[1] is not None:
            raise found[1]
        return found[0]

    def agree(self, value: int) -> int:
        return int(self._reduced(torch.tensor(value), dist.ReduceOp.MAX))

    def least(self, value: int) -> int:
        return int(self._reduced(torch.tensor(value), dist.ReduceOp.MIN))

    def share(self, batch: Sequence[Any]) -> list[int]:
        return list(range(self.rank, len(batch), 2))

    def sum(self, table: Tensor) -> Tensor:
        shape = torch.tensor([table.shape[0] if table.ndim > 1 else 0, table.shape[-1]])
        rows, columns = self._reduced(shape, dist.ReduceOp.MAX).tolist()
        if table.numel() == 0:  # a rank without pairs
            table = torch.zeros(rows, columns) if rows else torch.zeros(columns)
        return self._reduced(table, dist.ReduceOp.SUM)

    def sum_gradients(self, weights: Iterable[nn.Parameter]) -> None:
        for weight in weights:
            weight.grad = self._reduced(torch.zeros_like(weight) if weight.grad is None else weight.grad,
                                        dist.ReduceOp.SUM)  # fmt: skip

    def _reduced(self, tensor: Tensor, operation: Any) -> Tensor:
        summed = tensor.detach().clone().contiguous()
        dist.all_reduce(summed, operation)
        return summed


def main() -> None:
    """Train as the words say; with STOP=RANK:STEP in the environment SIGTERM comes to one rank after a step.

    With OWN_CACHES=1 each rank has a cache of its own, as on a computer of its own.
    """
    rank, meeting, words = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    os.environ["RANK"] = str(rank)  # as torchrun does
    if os.environ.get("OWN_CACHES"):
        os.environ["DPO_CACHE"] += f"-{rank}"
    from dpo_cli import cli
    from dpo_cli.training import runner

    runner.ENGINES = {"single": lambda: TwoRanks(rank, meeting)}  # type: ignore[dict-item]
    who, _, step = os.environ.get("STOP", "").partition(":")
    original = runner.train_step

    def step_then_stop(*arguments: Any) -> None:
        original(*arguments)
        if who == str(rank) and arguments[2].step == int(step):
            os.kill(os.getpid(), signal.SIGTERM)

    runner.train_step = step_then_stop
    sys.argv = ["dpo-train", *words]
    cli.train()


if __name__ == "__main__":
    main()
