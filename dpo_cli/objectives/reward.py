"""A reward model: a scalar head on the SFT model with LoRA, read at the token that closes a response.

With no reference to subtract and beta 1, DPO's margin is r+ - r- and its loss Bradley-Terry's: Eq. 2 of
https://arxiv.org/abs/2305.18290.

r(x, y) = w . h - c, with h the decoder's last hidden state there. The head w starts at 0: every reward is 0 and the
Bradley-Terry loss -log sigmoid(r+ - r-) is ln 2 before the first update, as DPO's is. The first update moves only w:
the gradient of the adapters is a multiple of w, which is 0. From the second update on both train. The offset c cancels
in every difference of rewards, so pairs do not determine it: after training c becomes the mean reward of training
responses.
M responses, D hidden size, B pairs.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dpo_cli.console.text import plural, safe_text, shell_word
from dpo_cli.engine.engine import on_whole, part_like
from dpo_cli.errors import CheckpointError
from dpo_cli.models.adapters import attach_lora
from dpo_cli.models.logps import MicroBatch, hidden_states
from dpo_cli.objectives.alarms import REWARD_ALARMS
from dpo_cli.objectives.drift import Drift, measure_drift
from dpo_cli.objectives.findings import finding_rules
from dpo_cli.objectives.objective import Card, Objective, Outcome, loading_code
from dpo_cli.objectives.preference import columns_of
from dpo_cli.theory.losses import LogRatios, ResponseScores, expected_loss, gradient_weight, sigmoid
from dpo_cli.theory.metrics import reward_metrics

if TYPE_CHECKING:
    from dpo_cli.config.schema import LoraConfig, RunConfig

CENTERING = 256  # pairs whose rewards have mean 0
HEAD_FILE = "reward_head.safetensors"
HEAD_NAME = "reward_head"

bradley_terry = partial(sigmoid, beta=1.0)


class RewardHead(nn.Module):
    """w and c, in float32."""

    weight: nn.Parameter
    center: Tensor

    def __init__(self, size: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, device=device))
        self.register_buffer("center", torch.zeros((), device=device))

    def forward(self, hidden: Tensor) -> Tensor:
        """Rewards (M,) float32 of hidden states (M, D)."""
        return hidden.float() @ self.weight - self.center


def attach_head(policy: Any) -> RewardHead:
    """Put a fresh head on a model with adapters; it trains with them."""
    size = policy.get_base_model().get_output_embeddings().in_features
    head = RewardHead(size, next(policy.parameters()).device)
    policy.add_module(HEAD_NAME, head)
    return head


def head_of(policy: Any) -> RewardHead | None:
    """The head of a reward model; None for a language model."""
    return getattr(policy, "_modules", {}).get(HEAD_NAME)


def response_rewards(model: Any, micro_batch: MicroBatch) -> Tensor:
    """r(x, y) of each response, (M,) float32, with gradient where the model has one and grad mode is on."""
    return on_whole(model, _rewards, micro_batch)


def _rewards(model: Any, micro_batch: MicroBatch) -> Tensor:
    head = head_of(model)
    assert head is not None
    return head(hidden_states(model, micro_batch).flatten(0, 1)[micro_batch.ends])  # (M, D) -> (M,)


@contextmanager
def probing(policy: Any) -> Iterator[None]:
    """Within, the head is random: with a head of 0 every reward is 0, whatever it is computed from."""
    head = head_of(policy)
    if head is None:
        yield
        return
    weight = head.weight.detach()  # changed in place: an engine may hold the same memory
    before, generator = weight.clone(), torch.Generator().manual_seed(0)
    weight.copy_(part_like(weight, torch.randn(weight.shape, generator=generator) / weight.shape[0] ** 0.5))
    try:
        yield
    finally:
        weight.copy_(before)


def save_head(policy: Any, folder: Path, weight: Tensor) -> None:
    """Write the head, whose `weight` is given whole, beside the adapter, where the policy has one."""
    head = head_of(policy)
    if head is not None:
        tensors = {"weight": weight.detach(), "center": head.center}
        save_file({name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}, folder / HEAD_FILE)


def load_head(policy: Any, folder: Path) -> None:
    """Give the policy the head in a folder; CheckpointError where it does not fit or is no head."""
    head = head_of(policy) or attach_head(policy)
    file = folder / HEAD_FILE
    try:
        stored = load_file(file)
        if {name: tensor.shape for name, tensor in stored.items()} != {"weight": head.weight.shape, "center": ()}:
            raise CheckpointError(f"{safe_text(file)}: is not the head of a reward model of this size")
        if not all(tensor.is_floating_point() and bool(torch.isfinite(tensor).all()) for tensor in stored.values()):
            raise CheckpointError(f"{safe_text(file)}: holds values that are no numbers")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{safe_text(file)}: cannot be read ({safe_text(error, limit=100)})") from None
    head.weight.detach().copy_(part_like(head.weight, stored["weight"]))
    head.center.copy_(stored["center"])


class Reward(Objective):
    """The Bradley-Terry loss -log sigmoid(r+ - r-) of a scalar head."""

    name = "reward"
    needs_reference = False
    scores_are_logps = False
    generates = False
    always_closes = True
    trains = " and a reward head"
    files = (HEAD_FILE,)
    judges_by = "reward"
    checks = ("finite", "start", "gradients", "transposes", "batch_invariance", "closing", "round_trip")
    alarms = REWARD_ALARMS
    findings = finding_rules()
    beta = 1.0
    is_calibrated = True

    @classmethod
    def of(cls, config: "RunConfig") -> "Reward":
        """It has no hyperparameters."""
        return cls()

    @classmethod
    def default(cls) -> "Reward":
        """The same."""
        return cls()

    def prepare(self, model: Any, lora: "LoraConfig", base_name: str | None = None) -> Any:
        """The model with fresh adapters and a head."""
        policy = attach_lora(model, lora, base_name, task=None)
        attach_head(policy)
        return policy

    def score(self, policy: Any, micro_batch: MicroBatch) -> Tensor:
        """The reward of each response, (M,)."""
        return response_rewards(policy, micro_batch)

    def __call__(self, policy: ResponseScores, reference: ResponseScores) -> Outcome:
        """The loss of each pair; the reference is 0."""
        ratios = LogRatios.between(policy.pairs(), reference.pairs())
        losses, weights = expected_loss(bradley_terry, ratios), gradient_weight(bradley_terry, ratios)
        return Outcome(losses, reward_metrics(ratios, losses, weights), columns_of(ratios))

    def drift(self, watched: Tensor) -> Drift:
        """How the rewards of the last W pairs differ."""
        return measure_drift(LogRatios(*watched), self.beta, bradley_terry)

    def drift_metrics(self, drift: Drift) -> dict[str, float | str]:
        """The metrics that are not in nats."""
        return drift.of_rewards()

    def probing(self, policy: Any) -> AbstractContextManager[None]:
        """Within, the head is not 0."""
        return probing(policy)

    def finish(self, policy: Any, score: Callable[[int], ResponseScores]) -> str | None:
        """Give the responses of the first CENTERING training pairs a mean reward of 0."""
        head = head_of(policy)
        assert head is not None
        scores = score(CENTERING)
        rewards = scores.pairs()
        head.center += torch.cat([rewards.chosen, rewards.rejected]).double().mean().to(head.center)
        pairs = plural(len(scores.units), "training pair")
        return f"rewards are centred: 0 is the mean of the responses of {pairs}"

    def save(self, policy: Any, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the head."""
        save_head(policy, folder, weights[f"{HEAD_NAME}.weight"])

    def load(self, policy: Any, folder: Path) -> None:
        """Read the head."""
        load_head(policy, folder)

    @classmethod
    def made(cls, folder: Path) -> bool:
        """Whether the folder holds a head."""
        return (folder / HEAD_FILE).is_file()

    def describe(self) -> str:
        """The loss, and where the head is read."""
        return "a Bradley-Terry reward model: -log sigmoid(r+ - r-), the head read at the closing token, starting at 0"

    def describe_reference(self, config: "RunConfig") -> str:
        """There is none."""
        return "none: a reward model is held to nothing"

    def next_command(self, run: Path) -> str:
        """Use it as a judge, or evaluate it."""
        judge = f"dpo-label by=reward {shell_word('judge', run)} samples=..."
        return f"{judge}, or dpo-eval {shell_word('checkpoint', run)}"

    def card(self, config: "RunConfig", base_path: str) -> Card:
        """The adapter and the head on the base."""
        first, *rest = loading_code(config, base_path)
        code = [
            first,
            "from safetensors.torch import load_file",
            *rest,
            'model = PeftModel.from_pretrained(model, "final").eval()',
            'head = load_file("final/reward_head.safetensors")',
            "# input_ids: prompt and response by the model's template, up to the token that closes the response",
            "hidden = model.get_base_model().get_decoder()(input_ids=input_ids).last_hidden_state[:, -1]",
            'reward = hidden.float() @ head["weight"] - head["center"]',
        ]
        return Card("reward-model", "a reward model", "the Bradley-Terry loss -log sigmoid(r+ - r-)", code)
