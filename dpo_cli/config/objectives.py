"""What each objective asks of the rest of a config: one entry an objective. The training itself is in objectives/."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Fixed:
    """A key that takes only some values under an objective, and why."""

    key: str
    allowed: tuple[Any, ...]
    reason: str
    written: str = ""  # how the user writes what is refused, where it is not key=value


@dataclass(frozen=True)
class ObjectiveRules:
    """How a config looks under one objective."""

    suffix: str = ""  # of the run's name
    defaults: Mapping[str, Any] = field(default_factory=dict)  # used where the user sets nothing else
    fixed: tuple[Fixed, ...] = ()
    unused: Mapping[str, str] = field(default_factory=dict)  # groups that the user must leave out, and why


NO_ANSWERS = "a reward model gives no answers"
NO_REFERENCE = "a reward model (objective=reward) is held to no reference; leave it out"

OBJECTIVES = {
    "dpo": ObjectiveRules(),
    "reward": ObjectiveRules(
        suffix="-reward",
        defaults={"beta": 1.0, "samples.n": 0},
        fixed=(
            Fixed("beta", (1.0,), NO_REFERENCE),
            Fixed("loss.name", ("sigmoid",), "a reward model has the sigmoid loss", written="loss={}"),
            Fixed("monitor", ("warn", "off"), "of a reward model no alarm means ruin; choose warn or off"),
            Fixed("loss.sft_weight", (0.0,), NO_ANSWERS),
            Fixed("samples.n", (0,), NO_ANSWERS),
            Fixed("budget.kl", (None,), NO_ANSWERS),
            Fixed("budget.length", (None,), NO_ANSWERS),
            Fixed(
                "lora.enabled", (True,), "a reward model trains adapters and a head; choose a LoRA", written="lora=off"
            ),
        ),
        unused={"reference": NO_REFERENCE},
    ),
}
