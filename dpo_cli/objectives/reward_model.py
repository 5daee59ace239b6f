"""A reward model: a scalar head on the SFT model with LoRA, read at the token that closes a response.

r(x, y) = w . h - c, with h the decoder's last hidden state there. The head w starts at 0: every reward is 0 and the
Bradley-Terry loss -log sigmoid(r+ - r-) is ln 2 before the first update, as DPO's is; that update moves w alone, since
w is what the gradient of the adapters is multiplied by, and from the second on both train. Pairs say nothing of c, for
it falls out of every difference; it is the mean reward of training responses, taken when training has ended.
M responses, D hidden size, B pairs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dpo_cli.console.text import safe_text
from dpo_cli.errors import CheckpointError
from dpo_cli.models.logps import Batch, hidden_states, pair_logps
from dpo_cli.theory.losses import PairLogps

HEAD_FILE = "reward_head.safetensors"
HEAD_NAME = "reward_head"


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


def pair_rewards(model: Any, batch: Batch) -> PairLogps:
    """r(x, y) of each pair in the place of log-probs, (B,) float32.

    With no reference to subtract and beta 1, DPO's margin is r+ - r- and its loss Bradley-Terry's: Eq. 2 of
    https://arxiv.org/abs/2305.18290. With gradient where the model has one and grad mode is on.
    """
    head = head_of(model)
    assert head is not None
    hidden = hidden_states(model, batch).flatten(0, 1)[batch.ends]  # (M, D)
    rewards = head(hidden)
    return PairLogps(
        rewards[batch.chosen], rewards[batch.rejected], batch.tokens[batch.chosen], batch.tokens[batch.rejected]
    )


def pair_scores(model: Any, batch: Batch) -> PairLogps:
    """What a policy thinks of each pair: a language model's log-probs, a reward model's rewards in their place."""
    return pair_logps(model, batch) if head_of(model) is None else pair_rewards(model, batch)


@contextmanager
def probing(policy: Any) -> Iterator[None]:
    """Within, the head points somewhere: at 0 every reward is 0, and nothing could be seen to depend on anything."""
    head = head_of(policy)
    if head is None:
        yield
        return
    before = head.weight.data
    generator = torch.Generator().manual_seed(0)
    head.weight.data = torch.randn(before.shape, generator=generator).to(before) / before.shape[0] ** 0.5
    try:
        yield
    finally:
        head.weight.data = before


def has_head(folder: Path) -> bool:
    """Whether a folder of weights is a reward model's."""
    return (folder / HEAD_FILE).is_file()


def save_head(policy: Any, folder: Path) -> None:
    """Write the head beside the adapter, where the policy has one."""
    head = head_of(policy)
    if head is not None:
        tensors = {"weight": head.weight.detach(), "center": head.center}
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
    head.weight.data.copy_(stored["weight"])
    head.center.copy_(stored["center"])
