"""Whether two models say the same of the same pairs: each log-prob of a response token, with nothing of ours between.

Every response is a row of its own, without padding, so that this depends on no layout, and works on any causal model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpo_cli.console.text import significant
from dpo_cli.data.tokens import TokenizedPair

# How far two float32 computations of the same function may be apart, in nats a token. Over n tokens roundings add up
# like a random walk.
ROUNDING = 1e-4


@dataclass(frozen=True)
class Difference:
    """The largest difference of a token's log-prob and of a response's, in nats."""

    token: float
    response: float

    def __str__(self) -> str:
        return f"{significant(self.response, 2)} nats a response, {significant(self.token, 2)} a token"


NOTHING = Difference(0.0, 0.0)


def response_logps(model: Any, pairs: Sequence[TokenizedPair], poll: Callable[[], None]) -> list[Tensor]:
    """log p of each token of a response, float32, a tensor a response: chosen and rejected of each pair in turn."""
    device = next(model.parameters()).device
    found = []
    for pair in pairs:
        for response in pair.responses:
            poll()
            ids = torch.tensor([[*pair.prompt.tolist(), *response.tolist()]], device=device)
            with torch.inference_mode():
                logits = model(input_ids=ids, use_cache=False).logits[0, len(pair.prompt) - 1 : -1].float()
                logps = logits.log_softmax(dim=1).gather(1, ids[0, len(pair.prompt) :, None])[:, 0]
            found.append(logps.cpu())
    return found


def difference(left: Sequence[Tensor], right: Sequence[Tensor]) -> Difference:
    """The largest differences; not finite where a log-prob is not."""
    tokens = torch.stack([(a - b).abs().max() for a, b in zip(left, right, strict=True)])
    responses = torch.stack([(a - b).sum().abs() for a, b in zip(left, right, strict=True)])
    return Difference(float(tokens.max()), float(responses.max()))


def agree(left: Sequence[Tensor], right: Sequence[Tensor], slack: Difference = NOTHING) -> bool:
    """Whether no log-prob differs by more than float32 rounding and `slack`; one that is not finite never agrees."""
    for a, b in zip(left, right, strict=True):
        token, response = float((a - b).abs().max()), float((a - b).sum().abs())
        fits = token <= ROUNDING + slack.token and response <= ROUNDING * len(a) ** 0.5 + slack.response
        if not fits:
            return False
    return True
