"""The objective: what a run minimises, and all that depends on it.

One idea to keep in mind: nothing outside this room asks which objective runs. An objective says what it needs of the
model, turns scores into losses and metrics, brings its own tables of checks, alarms and findings, and does what is
left to do when training has ended. M responses; U units: what a loss compares, pairs for preferences.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from dpo_cli.console.text import safe_text, shell_word
from dpo_cli.models.logps import MicroBatch, response_logps
from dpo_cli.objectives.alarms import AlarmRule
from dpo_cli.objectives.drift import Drift
from dpo_cli.objectives.findings import FindingRule
from dpo_cli.theory.losses import ResponseScores

if TYPE_CHECKING:  # the schema needs packages that a machine that only measures may lack
    from dpo_cli.config.schema import LoraConfig, RunConfig


@dataclass(frozen=True)
class Outcome:
    """What the scores of some responses come to, unit by unit."""

    losses: Tensor  # (U,) with gradient
    metrics: dict[str, Tensor]  # (U,) each, under the names they are logged with; the loss is one of them
    watched: Tensor  # (K, U): what the monitor keeps of the last units

    @property
    def table(self) -> Tensor:
        """Metrics and what is watched, (metrics + K, U) float32, without gradient: what ranks sum."""
        return torch.cat([torch.stack(list(self.metrics.values())), self.watched]).detach().float()


@dataclass(frozen=True)
class Card:
    """The parts of a model card that depend on the objective."""

    tag: str
    title: str  # behind the model's name
    loss: str  # behind "Trained with"
    code: list[str]  # Python that loads the model


class Objective(ABC):
    """What a run minimises."""

    name: ClassVar[str]
    needs_reference: ClassVar[bool] = True
    scores_are_logps: ClassVar[bool] = True  # so that their changes are in nats; else they are rewards
    generates: ClassVar[bool] = True  # whether the trained model answers prompts
    always_closes: ClassVar[bool] = False  # whether a response that was cut is closed: its score is read at that token
    trains: ClassVar[str] = ""  # besides adapters, for the header
    files: ClassVar[tuple[str, ...]] = ()  # beside an adapter's own, with weights
    judges_by: ClassVar[str]  # what a trained model compares responses by: its reward, or the one it implies
    checks: ClassVar[tuple[str, ...]]  # of the preflight, by name
    alarms: tuple[AlarmRule, ...]  # of the monitor
    findings: tuple[FindingRule, ...]  # of the verdict

    beta: float  # the factor between a log-ratio and a reward
    is_calibrated: bool  # whether sigmoid(margin) claims to be the probability that "chosen" is better

    @classmethod
    @abstractmethod
    def of(cls, config: "RunConfig") -> "Objective":
        """The objective that a config asks for."""

    @classmethod
    @abstractmethod
    def default(cls) -> "Objective":
        """The objective of a checkpoint that has no run to say more."""

    @abstractmethod
    def prepare(self, model: Any, lora: "LoraConfig", base_name: str | None = None) -> Any:
        """The policy: the SFT model with what trains on it (adapters, a head, or every weight)."""

    def score(self, policy: Any, micro_batch: MicroBatch) -> Tensor:
        """What the policy thinks of each response, (M,) float32, with gradient where grad mode is on."""
        return response_logps(policy, micro_batch)

    @abstractmethod
    def __call__(self, policy: ResponseScores, reference: ResponseScores) -> Outcome:
        """Losses and metrics of each unit."""

    def check_soft_labels(self, location: str) -> None:  # noqa: B027 - most losses take them
        """DataError where the loss takes no soft labels: `location` is the first row with one, or empty."""

    @property
    def start_loss(self) -> float:
        """The loss before the first update, ln 2 for DPO: policy and reference score alike, so its scores are 0."""
        nothing = ResponseScores(torch.zeros(2), torch.ones(2), torch.tensor([[0, 1]]))
        return float(self(nothing, nothing).losses)

    @abstractmethod
    def drift(self, watched: Tensor) -> Drift:
        """Where the policy has moved, by what was watched of the last W units, (K, W)."""

    def drift_metrics(self, drift: Drift) -> dict[str, float | str]:
        """The metrics that are logged of a drift."""
        return drift.as_metrics()

    def probing(self, policy: Any) -> AbstractContextManager[None]:
        """Within, scores depend on all their inputs, so that the preflight can check each of them."""
        return nullcontext()

    def finish(self, policy: Any, score: Callable[[int], ResponseScores]) -> str | None:
        """Do what is left after the last step and return a line that says so; `score(n)` scores n training examples."""
        return None

    def save(self, policy: Any, folder: Path, weights: Mapping[str, Tensor]) -> None:  # noqa: B027 - most add nothing
        """Write what trains beside the adapter; `weights` are those that train, whole, by name."""

    def load(self, policy: Any, folder: Path) -> None:  # noqa: B027
        """Read what `save` has written; CheckpointError where it does not fit."""

    @classmethod
    def made(cls, folder: Path) -> bool:
        """Whether weights in a folder are of this objective, as far as the files tell."""
        return False

    @abstractmethod
    def describe(self) -> str:
        """The loss with its hyperparameters, for the header."""

    @abstractmethod
    def describe_reference(self, config: "RunConfig") -> str:
        """Which weights the policy is compared with, for the header."""

    def next_command(self, run: Path) -> str:
        """What to do with a finished run."""
        return f"dpo-eval {shell_word('checkpoint', run)} samples=3"

    @abstractmethod
    def card(self, config: "RunConfig", base_path: str) -> Card:
        """What the model card says of it."""


def loading_code(config: "RunConfig", base_path: str) -> list[str]:
    """Python that loads the base of an adapter, an SFT adapter folded in, as `model`."""
    code = [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{safe_text(base_path)}")',
    ]
    if config.model.adapter:
        code.append("# The SFT adapter is part of the start: fold it in first.")
        code.append(f'model = PeftModel.from_pretrained(model, "{safe_text(config.model.adapter)}").merge_and_unload()')
    return code
