"""The parts of a run that its functions hand to each other: each takes those that it needs."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dpo_cli.config.schema import RunConfig
from dpo_cli.console.reporter import Reporter
from dpo_cli.data.batches import Schedule, SplitByPairs, SplitByTokens
from dpo_cli.data.pairs import PairData
from dpo_cli.data.tokens import PairEncoder, TokenizedPair
from dpo_cli.engine.engine import Engine
from dpo_cli.models.dtype import Decision
from dpo_cli.models.loading import ModelSource
from dpo_cli.models.logps import MicroBatcher, causal_model
from dpo_cli.models.reference import Reference
from dpo_cli.objectives.objective import Objective
from dpo_cli.runs.checkpoint import ResolvedSettings
from dpo_cli.runs.run_directory import RunDirectory
from dpo_cli.theory.metrics import MeanOverPairs
from dpo_cli.training.guard import NonFiniteGuard
from dpo_cli.training.monitor import Monitor


@dataclass(frozen=True)
class Context:
    """What all parts of a run share: config, run directory, console, ranks and signals."""

    config: RunConfig
    directory: RunDirectory
    reporter: Reporter
    engine: Engine
    poll: Callable[[], None]  # StoppedError if a signal has come to any rank
    protect_saving: Callable[[], None] = lambda: None  # from here on a second SIGTERM does not cut a save short


@dataclass(frozen=True)
class Material:
    """What is learned from: the model's source, and the data as tokens in the order of the steps."""

    source: ModelSource
    encoder: PairEncoder
    data: PairData
    schedule: Schedule
    total_steps: int

    def batch(self, indices: Any) -> list[TokenizedPair]:
        """The training pairs with these indices."""
        return [self.data.train[index] for index in indices]


@dataclass
class Learner:
    """What learns: all that a step needs."""

    policy: Any
    fingerprint: str  # of the SFT model's weights
    objective: Objective
    reference: Reference
    optimizer: torch.optim.Optimizer
    rate: Callable[[int], float]  # the learning rate of the update numbered from 0
    guard: NonFiniteGuard
    monitor: Monitor
    batcher: MicroBatcher  # replaced by a finer one where memory runs out

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The weights that the optimizer moves."""
        return [parameter for parameter in self.policy.parameters() if parameter.requires_grad]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the base weights."""
        dtype: torch.dtype = causal_model(self.policy).get_input_embeddings().weight.dtype
        return dtype

    @property
    def settings(self) -> ResolvedSettings:
        """What was measured for this run and holds to its end."""
        dtype = str(self.dtype).removeprefix("torch.")
        split = self.batcher.split
        return ResolvedSettings(
            self.batcher.device.type,
            dtype,
            self.batcher.layout.value,
            split.budget if isinstance(split, SplitByTokens) else None,
            split.size if isinstance(split, SplitByPairs) else None,
        )


@dataclass
class Window:
    """What has been measured since the last logged step."""

    metrics: MeanOverPairs = field(default_factory=MeanOverPairs)
    tokens: int = 0
    seconds: float = 0.0
    grad_norm: Tensor | float = 0.0  # of the latest step, before clipping

    def add(self, metrics: dict[str, Tensor], grad_norm: Tensor, batch: list[TokenizedPair], seconds: float) -> None:
        """Add a step."""
        self.metrics.add(metrics, [pair.source for pair in batch])
        self.grad_norm = grad_norm
        self.tokens += sum(len(pair.prompt) + len(response) for pair in batch for response in pair.responses)
        self.seconds += seconds


@dataclass
class Progress:
    """Where a run stands."""

    window: Window = field(default_factory=Window)
    step: int = 0  # optimizer steps done
    seconds: float = 0.0  # spent training, this run and those it resumes
    records_kept: int = 0  # lines of metrics.jsonl that a resumed run keeps
    resumed: bool = False  # from a checkpoint
    skipped_steps: int = 0  # whose update was left out because it was not finite
    evaluated: dict[int, dict[str, Any]] = field(default_factory=dict)  # the held-out line of metrics.jsonl by step

    def is_due(self, every: int) -> bool:
        """Whether something that happens every so many steps, 0 for never, happens after this one."""
        return every > 0 and self.step % every == 0

    @property
    def held_out_losses(self) -> dict[int, float]:
        """The finite held-out losses, by step."""
        return {step: line["loss"] for step, line in self.evaluated.items() if math.isfinite(line["loss"])}


@dataclass(frozen=True)
class Choices:
    """What was decided for the user when the run began, for the header."""

    device: Decision
    dtype: Decision
    layout: Decision
    split: str
    memory: str
