"""The guard: a loss or gradient that is not finite changes no weight, and the check does not slow a GPU down.

On a CPU every step is checked before its update. On a GPU this check would make the host wait for the device in every
step. There the fused optimizer (AdamW) skips its updates by itself (`found_inf`), from the first bad step on. The host
checks when it logs or saves.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_cli.engine.engine import Engine, local
from dpo_cli.errors import DivergedError

SKIPS_IN_A_ROW = 10  # beyond these nothing is learned any more
ROWS_NAMED = 8
UNSEEN = 100  # steps at most that a deferred guard has not looked at


@dataclass(frozen=True)
class _Step:
    number: int  # from 1
    rows: Sequence[int | str]
    losses: Tensor  # (U,) in the order of the rows
    grad_norm: Tensor

    @property
    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.losses).all() and torch.isfinite(self.grad_norm))

    def __str__(self) -> str:
        bad = [row for row, loss in zip(self.rows, self.losses.tolist(), strict=True) if not math.isfinite(loss)]
        where = ", ".join(map(str, (bad or self.rows)[:ROWS_NAMED]))
        what = "the loss of rows" if bad else "the gradient of rows"
        return (
            f"step {self.number}: {what} {where} of the data is not finite (mean loss {float(self.losses.mean()):g}, "
            f"gradient norm {float(self.grad_norm):g})"
        )


class NonFiniteGuard:
    """Looks at the losses and the gradient norm of every step before its update."""

    def __init__(self, optimizer: torch.optim.Optimizer, deferred: bool, skips: bool = False) -> None:
        self.optimizer = optimizer
        self.deferred = deferred
        self.skips = skips
        self._unseen: list[_Step] = []
        self._bad: Tensor | None = None  # 1 from the first bad step on
        self._in_a_row = 0

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, device: torch.device, mode: str) -> "NonFiniteGuard":
        """For `non_finite=abort|skip`. Deferred where the optimizer can skip an update by itself.

        A run that skips is checked in every step: a skipped step must not be counted.
        """
        sharded = any(hasattr(weight, "to_local") for group in optimizer.param_groups for weight in group["params"])
        fused = device.type == "cuda" and not sharded and all(group.get("fused") for group in optimizer.param_groups)
        return cls(optimizer, fused and mode == "abort", mode == "skip")

    def before_update(self, number: int, rows: Sequence[int | str], losses: Tensor, grad_norm: Tensor) -> str:
        """Check step `number`, counted from 1, by the rows of its units, their losses (U,) and the gradient norm.

        Returns why the update must be skipped, or an empty text. DivergedError now, or at the next `look`.
        """
        step = _Step(number, rows, losses.detach(), grad_norm.detach())
        if self.deferred:
            self._unseen.append(step)
            bad = (~(torch.isfinite(step.losses).all() & torch.isfinite(grad_norm))).float()
            self._bad = bad if self._bad is None else torch.maximum(self._bad, bad)
            self.optimizer.found_inf = self._bad  # type: ignore[attr-defined]  # read by torch's fused optimizers
            if len(self._unseen) >= UNSEEN:
                self.look()
            return ""
        if step.is_finite:
            self._in_a_row = 0
            return ""
        self._in_a_row += 1
        if not self.skips:
            raise self._diverged(step)
        if self._in_a_row > SKIPS_IN_A_ROW:
            raise DivergedError(f"{step}; the {SKIPS_IN_A_ROW} steps before it were skipped for the same reason")
        return f"{step}: its update is skipped"

    def look(self) -> None:
        """DivergedError if one of the steps since the last look was not finite; its weights are untouched."""
        for step in self._unseen:
            if not step.is_finite:
                raise self._diverged(step)
        self._unseen.clear()

    def _diverged(self, step: _Step) -> DivergedError:
        self.optimizer.zero_grad(set_to_none=True)
        rate = self.optimizer.param_groups[0]["lr"]
        return DivergedError(
            f"{step}; the weights were not touched. Usual remedies: a smaller optimizer.lr (now {rate:g}), "
            "model.dtype=float32, or non_finite=skip if it is these rows alone"
        )


def require_finite(weights: Sequence[tuple[str, Tensor]], step: int, engine: Engine) -> None:
    """DivergedError where a weight is not a number: such a state is never saved, and removes no earlier checkpoint."""
    bad = [name for name, weight in weights if not bool(torch.isfinite(local(weight)).all())]
    if engine.agree(len(bad)):
        raise DivergedError(
            f"step {step}: {bad[0] if bad else 'a weight of another rank'} is no longer finite, and is not saved; "
            "earlier checkpoints are intact. Usual remedies: a smaller optimizer.lr, model.dtype=float32"
        )
