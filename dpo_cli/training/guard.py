"""A loss or gradient that is not finite must not touch a weight, and looking for one must not hold up a GPU.

On a CPU every step is looked at before its update. On a GPU that would make the host wait for the device in every
step; there a fused optimizer (AdamW) itself leaves the weights alone (`found_inf`), from the first bad step on, until
the host looks, which it does when it logs or saves.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_cli.data.tokens import TokenizedPair
from dpo_cli.errors import DivergedError


@dataclass(frozen=True)
class _Step:
    number: int  # from 1
    rows: list[int]
    loss: Tensor
    grad_norm: Tensor


class NonFiniteGuard:
    """Looks at the loss and the gradient norm of every step before its update."""

    def __init__(self, optimizer: torch.optim.Optimizer, deferred: bool) -> None:
        self.optimizer = optimizer
        self.deferred = deferred
        self._unseen: list[_Step] = []
        self._bad: Tensor | None = None  # 1 from the first bad step on

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, device: torch.device) -> "NonFiniteGuard":
        """Deferred where the optimizer can leave weights alone by itself."""
        return cls(optimizer, device.type == "cuda" and all(group.get("fused") for group in optimizer.param_groups))

    def before_update(self, number: int, batch: list[TokenizedPair], loss: Tensor, grad_norm: Tensor) -> None:
        """Hear of step `number`, counted from 1; DivergedError now, or at the next `look`."""
        self._unseen.append(_Step(number, [pair.index for pair in batch[:8]], loss.detach(), grad_norm.detach()))
        if not self.deferred:
            self.look()
            return
        bad = (~(torch.isfinite(loss) & torch.isfinite(grad_norm))).float()
        self._bad = bad if self._bad is None else torch.maximum(self._bad, bad)
        self.optimizer.found_inf = self._bad  # type: ignore[attr-defined]  # read by torch's fused optimizers

    def look(self) -> None:
        """DivergedError if one of the steps since the last look was not finite; its weights are untouched."""
        for step in self._unseen:
            if not (torch.isfinite(step.loss) and torch.isfinite(step.grad_norm)):
                self.optimizer.zero_grad(set_to_none=True)
                rows = ", ".join(map(str, step.rows))
                raise DivergedError(
                    f"step {step.number}: loss {float(step.loss):g}, gradient norm {float(step.grad_norm):g}, on rows "
                    f"{rows} of the data; the weights were not touched. Usual remedies: a smaller optimizer.lr (now "
                    f"{self.optimizer.param_groups[0]['lr']:g}), model.dtype=float32"
                )
        self._unseen.clear()
