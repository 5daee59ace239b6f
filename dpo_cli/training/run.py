"""The parts of a run, put together: what the runner, the header and the rehearsal hand to each other."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dpo_cli.config.schema import RunConfig
from dpo_cli.console.reporter import Reporter
from dpo_cli.data.batches import Schedule
from dpo_cli.data.pairs import PairData
from dpo_cli.data.tokens import PairEncoder
from dpo_cli.models.loading import Decision, ModelSource
from dpo_cli.models.logps import Batching
from dpo_cli.models.reference import Reference
from dpo_cli.runs.checkpoint import Settled
from dpo_cli.runs.run_directory import RunDirectory
from dpo_cli.theory.losses import LogRatios, Objective, PairLogps
from dpo_cli.theory.metrics import MeanOverPairs, pair_metrics, reward_metrics
from dpo_cli.training.guard import NonFiniteGuard
from dpo_cli.training.monitor import Radar


@dataclass
class Window:
    """What has been measured since the last logged step."""

    metrics: MeanOverPairs = field(default_factory=MeanOverPairs)
    tokens: int = 0
    seconds: float = 0.0
    grad_norm: Tensor | float = 0.0  # of the latest step, before clipping


@dataclass
class Run:
    """The parts of a run, put together."""

    config: RunConfig
    directory: RunDirectory
    reporter: Reporter
    poll: Callable[[], None]
    device: torch.device
    device_reason: str
    dtype: Decision
    source: ModelSource
    encoder: PairEncoder
    data: PairData
    policy: Any
    digest: str  # of the SFT model's weights
    reference: Reference
    optimizer: torch.optim.Optimizer
    objective: Objective
    guard: NonFiniteGuard
    batching: Batching
    batching_reason: str
    token_budget: int | None  # of a forward pass; None where its size is counted in pairs
    schedule: Schedule
    total_steps: int
    radar: Radar
    window: Window = field(default_factory=Window)
    step: int = 0  # optimizer steps done
    seconds: float = 0.0  # spent training, this run and those it resumes
    records_kept: int = 0  # lines of metrics.jsonl that a resumed run keeps
    resumed: bool = False  # from a checkpoint
    skipped_steps: int = 0  # whose update was left out because it was not finite
    pairs_a_pass: int | None = None  # where memory ran out and `micro_batch_size` was more
    held_out_losses: dict[int, float] = field(default_factory=dict)  # by step

    @property
    def settled(self) -> Settled:
        """What was measured for this run and holds to its end."""
        dtype = str(self.dtype.value).removeprefix("torch.")
        return Settled(self.device.type, dtype, self.batching.way.value, self.token_budget, self.pairs_a_pass)

    @property
    def is_reward_model(self) -> bool:
        """Whether the policy gives rewards by a head of its own, and is held to no reference."""
        return self.config.objective == "reward"

    def measure(self, policy: PairLogps, ratios: LogRatios, losses: Tensor) -> dict[str, Tensor]:
        """The metrics of each pair, every value (B,)."""
        if self.is_reward_model:
            return reward_metrics(ratios, losses)
        return pair_metrics(policy, ratios, losses, self.config.beta)

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The weights that the optimizer moves."""
        return [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
