"""Random generators: read the state of those of every device, and set it again."""

import torch
from torch import Tensor

from dpo_cli.console.text import safe_text
from dpo_cli.errors import CheckpointError


def rng_states() -> dict[str, Tensor]:
    """The state of every random generator that a run can draw from, by device: `cpu`, `cuda:0`, ..., `mps`."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{number}": state for number, state in enumerate(torch.cuda.get_rng_state_all())}
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_rng_states(states: dict[str, Tensor]) -> None:
    """Set the generators to states from `rng_states`, "cpu" among them; devices that this machine lacks are left out.

    CheckpointError where a tensor is not the state of a generator.
    """
    try:
        torch.set_rng_state(states["cpu"])
        for name, state in states.items():
            if name.startswith("cuda:") and int(name.split(":")[1]) < torch.cuda.device_count():
                torch.cuda.set_rng_state(state, name)
            if name == "mps" and torch.backends.mps.is_available():
                torch.mps.set_rng_state(state)
    except (RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint holds no state of a random generator ({safe_text(error, limit=100)})"
        ) from None
