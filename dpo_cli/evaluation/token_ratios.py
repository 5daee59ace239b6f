"""The best and the worst pairs, token by token: which words the policy has made likelier than the reference does.

log pi/pi_ref of a response is the sum over its tokens, so that the tokens show where a margin comes from.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dpo_cli.data.tokens import TokenIds, TokenizedPair
from dpo_cli.models.logps import MicroBatch, MicroBatcher, token_logps_of

SHOWN = 20  # pairs of each kind
LONGEST_PIECE = 8  # tokens that may form one character together
Piece = list[Any]  # a text, and its log pi/pi_ref in nats: None where nothing is scored


class TokenReference(Protocol):
    """A reference that is a model, not a record of its log-probs."""

    def token_logps(self, micro_batch: MicroBatch) -> Tensor:
        """log p of every scored response token, (N,) float32, in nats, response after response."""
        ...


def best_and_worst(margins: Sequence[float]) -> list[tuple[str, int]]:
    """The indices of the pairs with the largest margins, largest first, and of those with the smallest."""
    order = sorted((index for index, margin in enumerate(margins) if math.isfinite(margin)), key=margins.__getitem__)
    worst = order[: min(SHOWN, len(order) // 2)]
    best = order[::-1][: min(SHOWN, len(order) - len(worst))]
    return [*(("best", index) for index in best), *(("worst", index) for index in worst)]


def token_ratios(
    policy: Any, reference: TokenReference, batcher: MicroBatcher, pairs: Sequence[TokenizedPair]
) -> list[tuple[list[float], list[float]]]:
    """log pi/pi_ref of each scored token of chosen and rejected, in nats, pair by pair."""
    found: dict[int, tuple[list[float], list[float]]] = {}
    policy.eval()
    for micro_batch in batcher.micro_batches(list(pairs)):
        with torch.no_grad():
            ratios = token_logps_of(policy, micro_batch) - reference.token_logps(micro_batch)
        each = [part.tolist() for part in ratios.cpu().split(micro_batch.tokens.tolist())]
        for pair, (chosen, rejected) in zip(micro_batch.examples, micro_batch.units.tolist(), strict=True):
            found[id(pair)] = each[chosen], each[rejected]
    return [found[id(pair)] for pair in pairs]


def pieces_of(
    decode: Callable[[list[int]], str], before: int, ids: TokenIds, unscored: TokenIds, ratios: Sequence[float]
) -> list[Piece]:
    """A response as pieces of text, each with the sum of its tokens' log-ratios.

    `before` is the token before the response; `unscored` has start and stop of each part that carries no log-prob.
    Tokens that are parts of one character form one piece.
    """
    skipped = {index for start, stop in zip(unscored[::2], unscored[1::2], strict=True) for index in range(start, stop)}
    scored = iter(ratios)
    pieces: list[Piece] = []
    waiting: list[int] = []
    total: float | None = None
    for index, token in enumerate(ids.tolist()):
        waiting.append(token)
        if index not in skipped:
            total = (total or 0.0) + next(scored)
        # With the token before it, since some tokenizers drop a space at the start of a text.
        text = decode([before, *waiting])[len(decode([before])) :]
        if text.endswith("\ufffd") and len(waiting) < LONGEST_PIECE and index + 1 < len(ids):
            continue
        pieces.append([text, total])
        before, waiting, total = token, [], None
    return pieces
