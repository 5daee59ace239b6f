"""The monitor: keeps what was measured of the last units, and sounds each alarm of the objective once."""

import torch
from torch import Tensor

from dpo_cli.objectives.alarms import ENOUGH, Alarm
from dpo_cli.objectives.drift import Drift
from dpo_cli.objectives.objective import Objective

WINDOW = 256  # units


class Monitor:
    """Keeps the last units that were trained on, by what the objective watches of them."""

    def __init__(self, objective: Objective, mode: str) -> None:
        self.objective = objective
        self.mode = mode  # warn, stop or off
        self.sounded: list[str] = []
        self._watched: Tensor | None = None  # (K, W), oldest first

    def add(self, watched: Tensor) -> None:
        """Add the units of a step, (K, U); nothing waits for the device."""
        before = watched[:, :0] if self._watched is None else self._watched.to(watched.device)
        self._watched = torch.cat([before, watched], dim=1)[:, -WINDOW:]

    def drift(self) -> Drift:
        """The drift on the units of the window."""
        assert self._watched is not None
        return self.objective.drift(self._watched.cpu())

    def alarms(self, drift: Drift) -> list[Alarm]:
        """The alarms that hold and have not been sounded yet."""
        if self.mode == "off" or drift.pairs < ENOUGH:
            return []
        new = [rule for rule in self.objective.alarms if rule.name not in self.sounded and rule.holds(drift)]
        self.sounded += [rule.name for rule in new]
        return [Alarm(rule.name, rule.says(drift)) for rule in new]

    def ruin(self, drift: Drift) -> Alarm | None:
        """Under monitor=stop the alarm that ends the run: one that means ruin and holds now, sounded before or not."""
        if self.mode != "stop" or drift.pairs < ENOUGH:
            return None
        holding = (rule for rule in self.objective.alarms if rule.ruins and rule.holds(drift))
        return next((Alarm(rule.name, rule.says(drift)) for rule in holding), None)

    def state(self) -> Tensor:
        """The window, for a checkpoint: (K, W)."""
        return torch.zeros(0, 0) if self._watched is None else self._watched.cpu().contiguous()

    def restore(self, watched: Tensor, sounded: list[str]) -> None:
        """Take over a checkpoint's window."""
        self._watched, self.sounded = watched if watched.numel() else None, list(sounded)
