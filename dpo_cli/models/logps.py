"""What a model thinks of pairs: `pair_logps(model, batch) -> PairLogps`.

Nothing outside this module knows how a batch is laid out. There are two layouts:

- packed: one row without a pad token, every prompt once, behind it all responses to it (`attention.py`);
- padded: prompt + response of every side in a row of its own, padded on the right. Right padding needs no position
  ids, and causal attention keeps it from being seen.

Which positions count comes from lengths, never from a pad id. B pairs, M responses, T tokens of a row, N response
tokens in all, D hidden size.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_cli.data.batches import Cut, Way
from dpo_cli.data.tokens import TokenIds, TokenizedPair
from dpo_cli.models.attention import KEYWORD, SEGMENTS, Group, PackedRow, masked_by, use_attention
from dpo_cli.models.head import token_logps
from dpo_cli.theory.losses import PairLogps


@dataclass(frozen=True)
class Tolerance:
    """How far two ways of computing one log-prob may differ, in nats a response."""

    fixed: float
    per_token: float

    def of(self, tokens: int) -> float:
        """For a response of that many tokens: roundings add up like a random walk."""
        return self.fixed + self.per_token * math.sqrt(tokens)


# bfloat16 keeps 8 bits: a logit of 20 is rounded by up to 0.06. SmolLM2's log-probs of 37 tokens were seen to move by
# 0.71 nats with the company they were computed in; another model's are off by tens.
TOLERANCES = {
    torch.float32: Tolerance(1e-3, 1e-3),
    torch.bfloat16: Tolerance(0.25, 0.25),
    torch.float16: Tolerance(0.02, 0.02),
}


@dataclass(frozen=True)
class Batch:
    """What one forward pass sees. Build with `make_batch`, read with `pair_logps`."""

    pairs: tuple[TokenizedPair, ...]
    real_tokens: int  # prompt + response of both sides: what the pairs hold, however they are laid out
    way: Way
    input_ids: Tensor  # (1, T) packed, (M, T) padded
    attention_mask: Tensor | None  # as input_ids; None by segments
    row: PackedRow | None
    positions: Tensor  # (N,) into the flattened input_ids: where a response token is predicted
    labels: Tensor  # (N,) the token predicted there
    owners: Tensor  # (N,) the response it belongs to, 0..M-1
    ends: Tensor  # (M,) into the flattened input_ids: the last token of each response
    tokens: Tensor  # (M,) tokens of each response
    chosen: Tensor  # (B,) into the responses
    rejected: Tensor  # (B,)


ROW_TENSORS = ("positions_in_group", "group_ids", "response_ids", "key_order", "query_starts", "key_starts")


@dataclass(frozen=True)
class _Shared:
    """A prompt and the distinct responses to it."""

    prompt: TokenIds
    responses: list[TokenIds]


def make_batch(pairs: Sequence[TokenizedPair], device: torch.device, way: Way) -> Batch:
    """Lay out pairs for one forward pass on `device`."""
    shared, chosen, rejected = _share_prompts(pairs, apart=way is Way.PADDED)
    layout = _padded(shared) if way is Way.PADDED else _packed(shared)
    numbers = {
        **layout,
        "labels": np.concatenate([response for one in shared for response in one.responses]),
        "tokens": np.array([len(response) for one in shared for response in one.responses]),
        "chosen": np.array(chosen),
        "rejected": np.array(rejected),
    }
    numbers["owners"] = np.repeat(np.arange(len(numbers["tokens"])), numbers["tokens"])
    tensors = _on_device(numbers, device)
    row = None
    if way is not Way.PADDED:
        groups = tuple(Group(len(one.prompt), tuple(map(len, one.responses))) for one in shared)
        row = PackedRow(groups, *(tensors.pop(name) for name in ROW_TENSORS))
    # By segments nothing is masked; elsewhere a mask of ones also says that this is no row packed by position ids.
    mask = tensors.pop("attention_mask") if way is Way.PADDED else None
    if way is Way.MASK:
        mask = torch.ones_like(tensors["input_ids"])
    real = sum(2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs)
    return Batch(pairs=tuple(pairs), real_tokens=real, way=way, attention_mask=mask, row=row, **tensors)


@dataclass(frozen=True)
class Batching:
    """How pairs become forward passes: cut into pieces, each laid out one way on one device."""

    device: torch.device
    way: Way
    cut: Cut

    def batches(self, pairs: list[TokenizedPair]) -> Iterator[Batch]:
        """The pairs as forward passes, each pair in one of them."""
        for piece in self.cut(pairs):
            yield make_batch(piece, self.device, self.way)


def _share_prompts(pairs: Sequence[TokenizedPair], apart: bool) -> tuple[list[_Shared], list[int], list[int]]:
    """The prompts, each with its responses; and of each pair the numbers of its two responses, counted throughout.

    Pairs with the same prompt share it, and the responses that they have in common (rankings of several answers);
    `apart` keeps every pair to itself.
    """
    shared: dict[Any, _Shared] = {}
    places: list[tuple[Any, int, int]] = []
    for number, pair in enumerate(pairs):
        key = number if apart else pair.prompt.tobytes()
        one = shared.setdefault(key, _Shared(pair.prompt, []))
        places.append((key, _place(one.responses, pair.chosen, apart), _place(one.responses, pair.rejected, apart)))
    before, start = {}, 0
    for key, one in shared.items():
        before[key], start = start, start + len(one.responses)
    chosen = [before[key] + first for key, first, _ in places]
    return list(shared.values()), chosen, [before[key] + second for key, _, second in places]


def _place(responses: list[TokenIds], response: TokenIds, apart: bool) -> int:
    for place, known in enumerate([] if apart else responses):
        if np.array_equal(known, response):
            return place
    responses.append(response)
    return len(responses) - 1


def _packed(shared: list[_Shared]) -> dict[str, Any]:
    """All groups end to end in one row. The first token of every response is predicted by the prompt's last."""
    ids, places, group_ids, response_ids, positions, ends, start = [], [], [], [], [], [], 0
    key_order, query_lengths, key_lengths = [], [], []
    for number, one in enumerate(shared):
        prompt = len(one.prompt)
        ids.append(one.prompt)
        places.append(np.arange(prompt))
        response_ids.append(np.zeros(prompt, dtype=np.int64))
        end = start + prompt
        for which, response in enumerate(one.responses):
            ids.append(response)
            places.append(prompt + np.arange(len(response)))
            response_ids.append(np.full(len(response), which + 1))
            # Position t scores token t+1, so the last token of a response predicts nothing.
            positions.append(np.concatenate([[start + prompt - 1], end + np.arange(len(response) - 1)]))
            key_order += [start + np.arange(prompt), end + np.arange(len(response))]
            query_lengths.append(len(response) + (prompt if which == 0 else 0))
            key_lengths.append(prompt + len(response))
            end += len(response)
            ends.append(end - 1)
        group_ids.append(np.full(end - start, number))
        start = end
    return {
        "input_ids": np.concatenate(ids)[None],
        "positions_in_group": np.concatenate(places),
        "group_ids": np.concatenate(group_ids),
        "response_ids": np.concatenate(response_ids),
        "key_order": np.concatenate(key_order),
        "query_starts": np.cumsum([0, *query_lengths]),
        "key_starts": np.cumsum([0, *key_lengths]),
        "positions": np.concatenate(positions),
        "ends": np.array(ends),
    }


def _padded(shared: list[_Shared]) -> dict[str, Any]:
    """Prompt + response of each side in a row of its own."""
    sides = [(one.prompt, response) for one in shared for response in one.responses]
    width = max(len(prompt) + len(response) for prompt, response in sides)
    input_ids = np.zeros((len(sides), width), dtype=np.int64)
    attention_mask = np.zeros((len(sides), width), dtype=np.int64)
    positions = []
    for number, (prompt, response) in enumerate(sides):
        end = len(prompt) + len(response)
        input_ids[number, :end] = np.concatenate([prompt, response])
        attention_mask[number, :end] = 1
        positions.append(number * width + np.arange(len(prompt) - 1, end - 1))
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "positions": np.concatenate(positions),
        "ends": np.array([one[-1] + 1 for one in positions]),
    }


def _on_device(numbers: dict[str, Any], device: torch.device) -> dict[str, Tensor]:
    """Every array as an int64 tensor on the device, in one copy that the GPU does not wait for."""
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in numbers.values()]).astype(np.int64))
    if device.type == "cuda":
        flat = flat.pin_memory()
    parts = flat.to(device, non_blocking=True).split([array.size for array in numbers.values()])
    return {name: part.view(array.shape) for (name, array), part in zip(numbers.items(), parts, strict=True)}


def causal_model(model: Any) -> Any:
    """The causal language model itself, adapters inside, without PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """Within, the model attends as it was loaded: for generating, and for logits of a whole sequence."""
    causal = causal_model(model)
    before = causal.config._attn_implementation
    use_attention(causal, None)
    try:
        yield
    finally:
        use_attention(causal, SEGMENTS if before == SEGMENTS else None)


def response_logps(model: Any, batch: Batch) -> Tensor:
    """log p of every response token, (N,) float32, in nats, in the order of the batch's responses.

    Those are chosen before rejected, pair after pair, where no two pairs share a prompt.
    With gradient where the model has one and grad mode is on.
    """
    hidden = hidden_states(model, batch).flatten(0, 1)[batch.positions]  # (N, D)
    return token_logps(causal_model(model), hidden, batch.labels)


def pair_logps(model: Any, batch: Batch) -> PairLogps:
    """log p(response | prompt) of each pair, (B,) float32, summed over response tokens, in nats.

    Section 4 of https://arxiv.org/abs/2305.18290 with the log-probability of the whole response: a sum, not a
    mean. With gradient where the model has one and grad mode is on.
    """
    logps = response_logps(model, batch)
    # A float32 sum of a thousand tokens, one after the other, is off by up to 1e-3 nats; MPS has no float64.
    wide = torch.float32 if logps.device.type == "mps" else torch.float64
    sums = torch.zeros(len(batch.tokens), dtype=wide, device=logps.device)
    sums = sums.index_add(0, batch.owners, logps.to(wide)).float()
    sides = (sums[batch.chosen], sums[batch.rejected])
    return PairLogps(*sides, batch.tokens[batch.chosen], batch.tokens[batch.rejected])


def hidden_states(model: Any, batch: Batch) -> Tensor:
    """What the decoder makes of the batch, as input_ids with D behind."""
    causal = causal_model(model)
    decoder = causal.get_decoder()
    use_attention(causal, SEGMENTS if batch.way is Way.SEGMENTS else None)
    if batch.row is None:
        output = decoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    elif batch.way is Way.SEGMENTS:
        positions, travels = batch.row.positions_in_group[None], {KEYWORD: batch.row}
        output = decoder(input_ids=batch.input_ids, position_ids=positions, use_cache=False, **travels)
    else:
        with masked_by(causal, batch.row):
            output = decoder(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.row.positions_in_group[None],
                use_cache=False,
            )
    hidden: Tensor = output.last_hidden_state
    return hidden
