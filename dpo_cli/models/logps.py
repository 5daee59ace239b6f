"""Log-probs of responses: `response_logps(model, micro_batch)` is log p(response | prompt), (M,).

Nothing outside this module knows how a micro-batch is laid out. There are two kinds of layout:

- packed: one row without a pad token, every prompt once, behind it all responses to it (`attention.py`);
- padded: prompt + response of every response in a row of its own, padded on the right. Right padding needs no position
  ids, and causal attention keeps it from being seen.

The unit is the response: what pairs share is computed once, and a pair is two indices into the responses. Which
positions count comes from lengths, never from a pad id. What the assistant did not write in a response (tool results,
user turns) is read by the model and not scored. M responses, U pairs (or other units of an objective), T tokens of a
row, N scored response tokens in all, D hidden size.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpo_cli.data.batches import Layout, Split
from dpo_cli.data.tokens import TokenIds, TokenizedPair
from dpo_cli.engine.engine import Engine, on_whole
from dpo_cli.models.attention import KEYWORD, SEGMENTS, Group, PackedRow, masked_by, use_attention
from dpo_cli.models.head import token_logps
from dpo_cli.theory.losses import PairLogps, ResponseScores


@dataclass(frozen=True)
class Tolerance:
    """How far two layouts may differ in one log-prob, in nats a response."""

    fixed: float
    per_token: float

    def of(self, tokens: int) -> float:
        """For a response of that many tokens: roundings add up like a random walk."""
        return self.fixed + self.per_token * math.sqrt(tokens)


# bfloat16 keeps 8 bits: a logit of 20 is rounded by up to 0.06. SmolLM2's log-probs of 37 tokens were seen to move by
# 0.71 nats with the other pairs of the batch; another model's are off by tens.
TOLERANCES = {
    torch.float32: Tolerance(1e-3, 1e-3),
    torch.bfloat16: Tolerance(0.25, 0.25),
    torch.float16: Tolerance(0.02, 0.02),
}


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass sees. Build with `make_micro_batch`, read with `response_logps`."""

    examples: tuple[TokenizedPair, ...]
    response_keys: tuple[bytes, ...]  # (M,) what a cached log-prob of each response is filed under
    units: Tensor  # (U, R) of each example the indices of its responses
    real_tokens: int  # prompt + response of every response of every example, however they are laid out
    layout: Layout
    input_ids: Tensor  # (1, T) packed, (M, T) padded
    attention_mask: Tensor | None  # as input_ids; None for packed segments
    row: PackedRow | None
    positions: Tensor  # (N,) into the flattened input_ids: where a response token is predicted
    labels: Tensor  # (N,) the token predicted there
    owners: Tensor  # (N,) the response it belongs to, 0..M-1
    ends: Tensor  # (M,) into the flattened input_ids: the last token of each response
    tokens: Tensor  # (M,) scored tokens of each response
    probabilities: Tensor | None = None  # (U,) float32: soft labels of the examples; None: all are certain

    def scores(self, values: Tensor) -> ResponseScores:
        """The values (M,) of a model, with what the responses are."""
        return ResponseScores(values, self.tokens, self.units, self.probabilities)


ROW_TENSORS = ("positions_in_group", "group_ids", "response_ids", "key_order", "query_starts", "key_starts")


@dataclass(frozen=True)
class _SharedPrompt:
    """A prompt and the distinct responses to it."""

    prompt: TokenIds
    responses: dict[bytes, TokenIds] = field(default_factory=dict)  # by response key
    unscored: dict[bytes, TokenIds] = field(default_factory=dict)


def make_micro_batch(examples: Sequence[TokenizedPair], device: torch.device, layout: Layout) -> MicroBatch:
    """Lay out examples for one forward pass on `device`.

    Examples with the same prompt share it, and the responses that they have in common (rankings of several responses).
    """
    shared: dict[bytes, _SharedPrompt] = {}
    for example in examples:
        one = shared.setdefault(example.prompt.tobytes(), _SharedPrompt(example.prompt))
        one.responses.update(zip(example.response_keys, example.responses, strict=True))
        one.unscored.update(zip(example.response_keys, example.unscored, strict=True))
    groups = list(shared.values())
    responses = {key: response for one in groups for key, response in one.responses.items()}
    index_of = {key: index for index, key in enumerate(responses)}
    numbers = {
        **(_padded(groups) if layout is Layout.PADDED else _packed(groups)),
        "labels": np.concatenate(list(responses.values())),
        "units": np.array([[index_of[key] for key in example.response_keys] for example in examples]),
    }
    numbers["owners"] = np.repeat(np.arange(len(responses)), [len(response) for response in responses.values()])
    unscored = {key: spans for one in groups for key, spans in one.unscored.items()}
    scored = np.concatenate([_scored(len(response), unscored[key]) for key, response in responses.items()])
    for name in ("positions", "labels", "owners"):
        numbers[name] = numbers[name][scored]
    numbers["tokens"] = np.bincount(numbers["owners"], minlength=len(responses))
    tensors = _on_device(numbers, device)
    row = None
    if layout is not Layout.PADDED:
        lengths = tuple(Group(len(one.prompt), tuple(map(len, one.responses.values()))) for one in groups)
        row = PackedRow(lengths, *(tensors.pop(name) for name in ROW_TENSORS))
    # Segments need no mask; elsewhere a mask of ones also says that this is no row packed by position ids.
    mask = tensors.pop("attention_mask") if layout is Layout.PADDED else None
    if layout is Layout.PACKED_MASK:
        mask = torch.ones_like(tensors["input_ids"])
    real = sum(len(example.prompt) + len(response) for example in examples for response in example.responses)
    return MicroBatch(tuple(examples), tuple(responses), layout=layout, real_tokens=real, attention_mask=mask, row=row,
                      probabilities=soft_labels(examples, device), **tensors)  # fmt: skip


def soft_labels(examples: Sequence[TokenizedPair], device: torch.device) -> Tensor | None:
    """The probability of each example that its chosen response is better, (U,) float32; None where all are 1."""
    if all(example.probability == 1 for example in examples):
        return None
    return torch.tensor([example.probability for example in examples], dtype=torch.float32, device=device)


def _scored(tokens: int, unscored: TokenIds) -> NDArray[np.bool_]:
    """Which tokens of a response are scored, (tokens,)."""
    scored = np.ones(tokens, dtype=bool)
    for start, stop in zip(unscored[::2], unscored[1::2], strict=True):
        scored[start:stop] = False
    return scored


@dataclass(frozen=True)
class MicroBatcher:
    """How a batch becomes forward passes: split into micro-batches, each in one layout on one device."""

    device: torch.device
    layout: Layout
    split: Split

    def lay_out(self, pairs: Sequence[TokenizedPair]) -> MicroBatch:
        """These pairs as one micro-batch."""
        return make_micro_batch(pairs, self.device, self.layout)

    def micro_batches(self, batch: list[TokenizedPair]) -> Iterator[MicroBatch]:
        """The batch as micro-batches, each pair in one of them."""
        return map(self.lay_out, self.split(batch))

    def rounds(self, batch: Sequence[TokenizedPair], engine: Engine) -> Iterator[tuple[list[TokenizedPair], bool]]:
        """The pairs of this rank's micro-batches, each with whether it counts (`Engine.rounds`). Collective."""
        mine = [batch[index] for index in engine.share([pair.tokens for pair in batch])]
        return engine.rounds(self.split(mine), [min(batch, key=lambda pair: pair.tokens)])


def _packed(shared: list[_SharedPrompt]) -> dict[str, Any]:
    """All groups end to end in one row. The first token of every response is predicted by the prompt's last."""
    ids, positions_in_group, group_ids, response_ids, positions, ends, start = [], [], [], [], [], [], 0
    key_order, query_lengths, key_lengths = [], [], []
    for number, one in enumerate(shared):
        prompt = len(one.prompt)
        ids.append(one.prompt)
        positions_in_group.append(np.arange(prompt))
        response_ids.append(np.zeros(prompt, dtype=np.int64))
        end = start + prompt
        for which, response in enumerate(one.responses.values()):
            ids.append(response)
            positions_in_group.append(prompt + np.arange(len(response)))
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
        "positions_in_group": np.concatenate(positions_in_group),
        "group_ids": np.concatenate(group_ids),
        "response_ids": np.concatenate(response_ids),
        "key_order": np.concatenate(key_order),
        "query_starts": np.cumsum([0, *query_lengths]),
        "key_starts": np.cumsum([0, *key_lengths]),
        "positions": np.concatenate(positions),
        "ends": np.array(ends),
    }


def _padded(shared: list[_SharedPrompt]) -> dict[str, Any]:
    """Prompt + response of each response in a row of its own."""
    sides = [(one.prompt, response) for one in shared for response in one.responses.values()]
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


def token_logps_of(model: Any, micro_batch: MicroBatch) -> Tensor:
    """log p of every scored response token, (N,) float32, in nats, response after response.

    With gradient where the model has one and grad mode is on.
    """
    return on_whole(model, _token_logps, micro_batch)


def _token_logps(model: Any, micro_batch: MicroBatch) -> Tensor:
    hidden = hidden_states(model, micro_batch).flatten(0, 1)[micro_batch.positions]  # (N, D)
    return token_logps(causal_model(model), hidden, micro_batch.labels)


def response_logps(model: Any, micro_batch: MicroBatch) -> Tensor:
    """log p(response | prompt), (M,) float32, summed over the scored response tokens, in nats.

    Section 4 of https://arxiv.org/abs/2305.18290 with the log-probability of the whole response: a sum, not a
    mean. With gradient where the model has one and grad mode is on.
    """
    logps = token_logps_of(model, micro_batch)
    # A float32 sum of a thousand tokens, one after the other, is off by up to 1e-3 nats; MPS has no float64.
    wide = torch.float32 if logps.device.type == "mps" else torch.float64
    sums = torch.zeros(len(micro_batch.tokens), dtype=wide, device=logps.device)
    return sums.index_add(0, micro_batch.owners, logps.to(wide)).float()


def pair_logps(model: Any, micro_batch: MicroBatch) -> PairLogps:
    """log p(response | prompt) of each pair, (B,) float32, in nats."""
    return micro_batch.scores(response_logps(model, micro_batch)).pairs()


def hidden_states(model: Any, micro_batch: MicroBatch) -> Tensor:
    """The decoder's last hidden states, as input_ids with D behind."""
    causal = causal_model(model)
    decoder = causal.get_decoder()
    use_attention(causal, SEGMENTS if micro_batch.layout is Layout.PACKED_SEGMENTS else None)
    if micro_batch.row is None:
        output = decoder(input_ids=micro_batch.input_ids, attention_mask=micro_batch.attention_mask, use_cache=False)
    elif micro_batch.layout is Layout.PACKED_SEGMENTS:
        positions, travels = micro_batch.row.positions_in_group[None], {KEYWORD: micro_batch.row}
        output = decoder(input_ids=micro_batch.input_ids, position_ids=positions, use_cache=False, **travels)
    else:
        with masked_by(causal, micro_batch.row):
            output = decoder(
                input_ids=micro_batch.input_ids,
                attention_mask=micro_batch.attention_mask,
                position_ids=micro_batch.row.positions_in_group[None],
                use_cache=False,
            )
    hidden: Tensor = output.last_hidden_state
    return hidden
