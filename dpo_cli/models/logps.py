"""What a model thinks of pairs: `pair_logps(model, batch) -> PairLogps`.

Nothing outside this module knows how a batch is laid out. Here it is plain padded rows: prompt + chosen of all
pairs, then prompt + rejected, padded on the right. Right padding needs no position ids, and causal attention
keeps it from being seen; which positions count comes from lengths, never from a pad id.

B pairs, T tokens of the longest row, N response tokens of all rows, D hidden size.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_cli.data.tokens import TokenizedPair
from dpo_cli.models.head import token_logps
from dpo_cli.theory.losses import PairLogps


@dataclass(frozen=True)
class Batch:
    """What one forward pass sees. Build with `make_batch`, read with `pair_logps`."""

    pairs: int
    real_tokens: int  # tokens that are not padding, prompts counted once for each response
    input_ids: Tensor  # (2B, T)
    attention_mask: Tensor  # (2B, T)
    positions: Tensor  # (N,) into the flattened (2B T): where a response token is predicted
    labels: Tensor  # (N,) the token predicted there
    rows: Tensor  # (N,) the row each belongs to: 0..B-1 chosen, B..2B-1 rejected


def make_batch(pairs: list[TokenizedPair], device: torch.device) -> Batch:
    """Lay out pairs for one forward pass on `device`."""
    sides = [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]
    width = max(len(prompt) + len(response) for prompt, response in sides)
    input_ids = np.zeros((len(sides), width), dtype=np.int64)
    attention_mask = np.zeros((len(sides), width), dtype=np.int64)
    positions, labels, rows = [], [], []
    for row, (prompt, response) in enumerate(sides):
        end = len(prompt) + len(response)
        input_ids[row, :end] = np.concatenate([prompt, response])
        attention_mask[row, :end] = 1
        # Position t scores token t+1: the first response token is predicted by the prompt's last position.
        positions.append(row * width + np.arange(len(prompt) - 1, end - 1))
        labels.append(response)
        rows.append(np.full(len(response), row))

    def tensor(values: "np.ndarray[Any, np.dtype[Any]]") -> Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(device, non_blocking=True)

    return Batch(
        pairs=len(pairs),
        real_tokens=int(attention_mask.sum()),
        input_ids=tensor(input_ids),
        attention_mask=tensor(attention_mask),
        positions=tensor(np.concatenate(positions)),
        labels=tensor(np.concatenate(labels)),
        rows=tensor(np.concatenate(rows)),
    )


def causal_model(model: Any) -> Any:
    """The causal language model itself, adapters inside, without PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def pair_logps(model: Any, batch: Batch) -> PairLogps:
    """log p(response | prompt) of each pair, (B,) float32, summed over response tokens, in nats.

    Section 4 of https://arxiv.org/abs/2305.18290 with the log-probability of the whole response: a sum, not a
    mean. With gradient where the model has one and grad mode is on.
    """
    causal = causal_model(model)
    output = causal.get_decoder()(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    hidden = output.last_hidden_state.flatten(0, 1)[batch.positions]  # (N, D)
    logps = token_logps(causal, hidden, batch.labels)
    # A float32 sum of a thousand tokens, one after the other, is off by up to 1e-3 nats; MPS has no float64.
    wide = torch.float32 if logps.device.type == "mps" else torch.float64
    sums = torch.zeros(2 * batch.pairs, dtype=wide, device=logps.device)
    sums = sums.index_add(0, batch.rows, logps.to(wide)).float()
    tokens = torch.bincount(batch.rows, minlength=2 * batch.pairs)
    chosen, rejected = sums.split(batch.pairs)
    chosen_tokens, rejected_tokens = tokens.split(batch.pairs)
    return PairLogps(chosen, rejected, chosen_tokens, rejected_tokens)
