"""Learning-rate schedules: pure functions of the step, so there is no state to save."""

import math
from collections.abc import Callable


def constant(progress: float) -> float:
    """The full learning rate to the end."""
    return 1.0


def linear(progress: float) -> float:
    """Linear decay to zero."""
    return 1.0 - progress


def cosine(progress: float) -> float:
    """Half a cosine, from 1 to zero."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


# Chosen by `optimizer.schedule`: progress after warm-up in [0, 1] -> factor of the rate.
SCHEDULES: dict[str, Callable[[float], float]] = {"constant": constant, "linear": linear, "cosine": cosine}


def lr_factor(schedule: str, update: int, warmup_steps: int, total_steps: int) -> float:
    """The factor of the learning rate at the update numbered `update` from 0.

    Warm-up is linear, from 1/warmup_steps at the first update to 1 at the last.
    """
    if update < warmup_steps:
        return (update + 1) / warmup_steps
    return SCHEDULES[schedule]((update - warmup_steps) / max(1, total_steps - warmup_steps))
