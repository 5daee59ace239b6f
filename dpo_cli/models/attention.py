"""How a packed row attends: each response to its prompt and itself, the prompt computed once for all of them.

A packed row holds groups end to end, each `prompt | response | response ...`. The positions of every response continue
from the end of its prompt. A response must not see the other responses nor other groups, and there are two ways to
ensure that, both through transformers' registries, so that they reach every family without touching its code:

- by segments: an attention function that goes through the row segment by segment and never computes what is masked;
- by mask: the family's stock attention under a dense mask, the family's own rule evaluated at logical positions.

Neither is trusted: `packing.py` compares them with plain rows on the model itself. T tokens of the row, H query
heads, G key-value heads, D size of a head.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, sdpa_mask

SEGMENTS = "dpo_segments"
STEPS = "dpo_steps"
SPANS = "row_spans"  # the keyword that tells how many slots some rows need
KEYWORD = "packed_row"  # the keyword that passes the row through the model to each layer's attention

# Keywords of attention functions that change nothing here: positions are in the queries already, no cache is used.
_WITHOUT_EFFECT = {"position_ids", "use_cache", "cache_position", "is_causal", "output_attentions"}


@dataclass(frozen=True)
class Group:
    """One prompt and the responses that share it: lengths in tokens."""

    prompt: int
    responses: tuple[int, ...]

    @property
    def segments(self) -> list[tuple[int, int]]:
        """Queries and keys of each segment."""
        first, *later = self.responses
        return [(self.prompt + first, self.prompt + first), *((one, self.prompt + one) for one in later)]


@dataclass(frozen=True)
class PackedRow:
    """Where the groups of a packed row lie."""

    groups: tuple[Group, ...]
    positions_in_group: Tensor  # (T,) those of a response continue from the end of its prompt
    group_ids: Tensor  # (T,) the group of each token
    response_ids: Tensor  # (T,) within its group: 0 the prompt, 1 the first response, ...
    key_order: Tensor  # (K,) into the row: prompt and response of every segment, prompts repeated
    query_starts: Tensor  # (S+1,) where the queries of each segment begin in the row
    key_starts: Tensor  # (S+1,) where the keys of each segment begin in key_order
    masks: dict[tuple[int, int, int | None], Tensor] = field(init=False, default_factory=dict)  # shared by layers
    layers_seen: list[int] = field(init=False, default_factory=list)  # one entry a call, for the self-check


def use_attention(model: Any, name: str | None) -> None:
    """Let every later forward pass of the causal model attend by `name`; None is as it was loaded.

    It stays so until the next call, because gradient checkpointing calls the layers again in the backward pass.
    """
    stock = vars(model).setdefault("_stock_attention", model.config._attn_implementation)
    if name is not None:
        AttentionInterface.register(SEGMENTS, segment_attention)
        AttentionInterface.register(STEPS, step_attention)
        AttentionMaskInterface.register(STEPS, sdpa_mask)
    if model.config._attn_implementation != (name or stock):
        model.config._attn_implementation = name or stock


@torch.compiler.disable  # its loops follow the lengths of the row: every batch would be compiled anew
def segment_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    packed_row: PackedRow | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention over a packed row, in the shape of transformers' attention functions.

    query (1, H, T, D), key and value (1, G, T, D); returns (1, T, H, D). ValueError for any keyword that it would
    have to honour and does not know: ignoring it would give a wrong number that nobody notices.
    """
    unknown = sorted(name for name, setting in others.items() if setting is not None and setting is not False)
    unknown = [name for name in unknown if name not in _WITHOUT_EFFECT]
    if packed_row is None or attention_mask is not None or unknown or query.shape[0] != 1:
        reason = f"the keywords {', '.join(unknown)}" if unknown else "no packed row, or a mask beside it"
        raise ValueError(f"segment attention was called with {reason}")
    packed_row.layers_seen.append(id(module))
    # Tensors without content stand for a GPU's (models/meter.py), where attention in float32 takes as much.
    if query.device.type == "meta" or (query.device.type == "cuda" and query.dtype != torch.float32):
        if softcap is not None or s_aux is not None or dropout:
            raise ValueError("the GPU's variable-length attention has no soft cap, sink or dropout")
        return _variable_length(query, key, value, packed_row, scaling, sliding_window), None
    dtype = query.dtype
    if query.device.type == "cpu" and dtype.itemsize == 2:  # attention in half precision is slower there, and rougher
        query, key, value = query.float(), key.float(), value.float()
    outputs = []
    for q, k, v, prompt in _segments(query, key, value, packed_row):
        mask = _segment_mask(packed_row, prompt, q.shape[2], sliding_window, q.device)
        if softcap is None and s_aux is None:
            out = F.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
            )
        else:
            out = _spelled_out(q, k, v, mask, dropout, scaling, softcap, s_aux)
        outputs.append(out)
    return torch.cat(outputs, dim=2).transpose(1, 2).to(dtype).contiguous(), None


def _variable_length(
    query: Tensor, key: Tensor, value: Tensor, row: PackedRow, scaling: float | None, window: int | None
) -> Tensor:
    """All segments in one fused call, (1, T, H, D): the keys of each are its prompt's, repeated, and its own.

    The kernel aligns queries with the last keys, which is where a response lies behind its prompt.
    """
    segments = [segment for group in row.groups for segment in group.segments]
    out = varlen_attn(
        query[0].transpose(0, 1).contiguous(),
        key[0].transpose(0, 1).index_select(0, row.key_order),
        value[0].transpose(0, 1).index_select(0, row.key_order),
        row.query_starts.int(),
        row.key_starts.int(),
        max(queries for queries, _ in segments),
        max(keys for _, keys in segments),
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)  # a tuple only where return_aux asks for it
    return out[None]


def _segments(
    query: Tensor, key: Tensor, value: Tensor, row: PackedRow
) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
    """Queries, keys, values and the number of leading keys that every query sees: one call of attention each."""
    query_lengths = [queries for group in row.groups for queries, _ in group.segments]
    key_lengths = [length for group in row.groups for length in (group.prompt, *group.responses)]
    queries = iter(query.split(query_lengths, dim=2))
    keys, values = iter(key.split(key_lengths, dim=2)), iter(value.split(key_lengths, dim=2))
    for group in row.groups:
        prompt_keys, prompt_values = next(keys), next(values)
        for number in range(len(group.responses)):
            k, v = torch.cat([prompt_keys, next(keys)], dim=2), torch.cat([prompt_values, next(values)], dim=2)
            yield next(queries), k, v, 0 if number == 0 else group.prompt


def _segment_mask(row: PackedRow, ahead: int, queries: int, window: int | None, device: torch.device) -> Tensor | None:
    """Who sees whom, (queries, ahead + queries), True where a query sees a key; None where plain causal is enough."""
    if window is not None and ahead + queries <= window:
        window = None
    if ahead == 0 and window is None:
        return None
    if (ahead, queries, window) not in row.masks:
        distance = torch.arange(queries, device=device)[:, None] + ahead - torch.arange(ahead + queries, device=device)
        row.masks[ahead, queries, window] = (distance >= 0) & (distance < (window or ahead + queries))
    return row.masks[ahead, queries, window]


def _spelled_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with what no fused kernel has: scores capped by tanh (Gemma 2), a sink a head (gpt-oss)."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = query @ key.transpose(2, 3) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~mask, float("-inf")).float()
    if sinks is not None:  # a key that every query sees and that has no value
        scores = torch.cat([scores, sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[2]].to(value.dtype)
    return F.dropout(weights, dropout) @ value


def step_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **others: Any
) -> tuple[Tensor, None]:
    """The stock attention, for one query a row, made so that a row does not depend on the other rows of the batch.

    query (R, H, 1, D), key and value (R, G, T, D), mask (R, 1, 1, T). The heads that share keys become queries of one
    head, so that keys and values are not copied for each; and 16 queries, the last of them void, keep the buffers of
    the CPU's kernel on the borders that its vector instructions are chosen by. `row_spans`, (first row, last row + 1,
    slots), leaves out slots that are masked for all of these rows.
    """
    spans = others.pop(SPANS, None)
    rows, heads, queries, size = query.shape
    groups = key.shape[1]
    peculiar = any(others.get(name) is not None for name in ("softcap", "s_aux", "sliding_window"))
    if queries != 1 or attention_mask is None or peculiar:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **others)
    shared = heads // groups
    wide = -(-shared // 16) * 16
    folded = F.pad(query.reshape(rows, groups, shared, size), (0, 0, 0, wide - shared))
    mask = attention_mask.expand(rows, 1, wide, key.shape[2])
    out = torch.cat(
        [
            F.scaled_dot_product_attention(
                folded[first:last],
                key[first:last, :, :width],
                value[first:last, :, :width],
                mask[first:last, :, :, :width],
                scale=others.get("scaling"),
            )
            for first, last, width in spans or [(0, rows, key.shape[2])]
        ]
    )
    return out[:, :, :shared].reshape(rows, 1, heads, size), None


@contextmanager
def masked_by(model: Any, row: PackedRow) -> Iterator[None]:
    """Within, the masks that transformers builds for the model keep the segments of a packed row apart."""
    name = model.config._attn_implementation
    if name not in ("sdpa", "eager"):
        raise ValueError(f"a mask for {name} attention is not known")
    had = ALL_MASK_ATTENTION_FUNCTIONS._local_mapping.get(name)
    ALL_MASK_ATTENTION_FUNCTIONS[name] = _mask_function(row, additive=name == "eager")
    try:
        yield
    finally:
        if had is None:
            del ALL_MASK_ATTENTION_FUNCTIONS[name]
        else:
            ALL_MASK_ATTENTION_FUNCTIONS[name] = had


def _mask_function(row: PackedRow, additive: bool) -> Callable[..., Tensor]:
    def build(*_: Any, mask_function: Callable[..., Tensor], dtype: torch.dtype = torch.float32, **__: Any) -> Tensor:
        """The family's own rule at logical positions, and only within prompt and response: (1, 1, T, T)."""
        device = row.positions_in_group.device
        first = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
        queries, keys = row.positions_in_group[None, None, :, None], row.positions_in_group[None, None, None, :]
        same_group = row.group_ids[:, None] == row.group_ids[None, :]
        shared = (row.response_ids[None, :] == 0) | (row.response_ids[:, None] == row.response_ids[None, :])
        seen = mask_function(first, first, queries, keys) & same_group & shared
        if additive:
            return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        return seen

    return build
