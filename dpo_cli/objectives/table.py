"""The objectives by name, and how to tell which one made the weights in a folder."""

from pathlib import Path
from typing import TYPE_CHECKING

from dpo_cli.objectives.objective import Objective
from dpo_cli.objectives.preference import Preference
from dpo_cli.objectives.reward import Reward

if TYPE_CHECKING:
    from dpo_cli.config.schema import RunConfig

OBJECTIVES: dict[str, type[Objective]] = {"dpo": Preference, "reward": Reward}


def make_objective(config: "RunConfig") -> Objective:
    """The objective that a config asks for."""
    return OBJECTIVES[config.objective].of(config)


def objective_of(run: "RunConfig | None", folder: Path) -> Objective:
    """The objective of a run; without a run the one that the files in its folder of weights show, else DPO."""
    if run is not None:
        return make_objective(run)
    found = [objective for objective in OBJECTIVES.values() if objective.made(folder)] or [Preference]
    return found[0].default()
