"""Packed rows: for every family the layout its own numbers allow, and in that layout the numbers of plain rows."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import share
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import CPU, LORA, pair, tiny
from torch import Tensor

from dpo_cli.data.batches import Layout, packed_tokens
from dpo_cli.data.tokens import TokenizedPair, token_ids
from dpo_cli.errors import ConfigError
from dpo_cli.models import attention, packing
from dpo_cli.models.adapters import attach_lora
from dpo_cli.models.loading import compile_layers
from dpo_cli.models.logps import (
    causal_model,
    make_micro_batch,
    pair_logps,
    plain_attention,
    token_logps_of,
)
from dpo_cli.models.packing import choose_layout

# A one-token prompt and one-token responses; prompts longer than both responses; a pair of some thirty tokens.
PAIRS = [pair(5, 3, 7, 1), pair(1, 1, 1, 2), pair(9, 2, 1, 3), pair(3, 8, 8, 4), pair(14, 9, 11, 5)]

SEGMENTS, MASK, PADDED = Layout.PACKED_SEGMENTS, Layout.PACKED_MASK, Layout.PADDED
LAYOUTS = {
    "llama": SEGMENTS, "qwen2": SEGMENTS, "qwen3": SEGMENTS, "mistral": SEGMENTS,
    "gemma2": SEGMENTS, "gemma3_text": SEGMENTS, "phi3": SEGMENTS, "olmo2": SEGMENTS,
    "granite": SEGMENTS, "cohere": SEGMENTS, "gpt_neox": SEGMENTS, "gpt2": SEGMENTS,
    "gpt_oss": SEGMENTS, "mixtral": SEGMENTS, "qwen3_moe": SEGMENTS, "phi": SEGMENTS,
    "nemotron": MASK, "stablelm": MASK,
    "bloom": PADDED, "qwen3_next": PADDED, "mamba": PADDED,
}  # fmt: skip


def naive(model: Any, prompt: Any, response: Any) -> Tensor:
    """The definition: one sequence, full logits, log-softmax, summed over the response."""
    ids = torch.tensor(np.concatenate([prompt, response]).astype(np.int64))[None]
    with plain_attention(model):
        logps = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    places = torch.arange(len(prompt), ids.shape[1])
    return logps[places - 1, ids[0, places]].sum()


def logps(model: Any, pairs: list[TokenizedPair], layout: Layout) -> Tensor:
    """(2, B): chosen and rejected."""
    both = pair_logps(model, make_micro_batch(pairs, CPU, layout))
    return torch.stack([both.chosen, both.rejected])


def expected(model: Any, pairs: list[TokenizedPair]) -> Tensor:
    sides = [[naive(model, one.prompt, side) for one in pairs for side in [getattr(one, name)]]
             for name in ("chosen", "rejected")]  # fmt: skip
    return torch.stack([torch.stack(side) for side in sides])


@pytest.mark.parametrize("family", LAYOUTS)
def test_each_family_takes_its_layout_and_scores_as_the_naive_forward(family: str) -> None:
    model = tiny(family)
    layout = choose_layout("auto", model, PAIRS, CPU).value
    assert layout is LAYOUTS[family]
    with torch.no_grad():
        off = (logps(model, PAIRS, layout) - expected(model, PAIRS)).abs()
    # 1e-5 a token; a sum of eleven tokens is rounded more often.
    assert float(off.max()) <= 5e-5, off


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", LAYOUTS)
def test_adapter_gradients_equal_those_of_the_naive_forward(family: str, checkpointing: bool) -> None:
    model = tiny(family)
    # PEFT has no adapters for two of Mamba's layers.
    policy = attach_lora(model, replace(LORA, target_modules=["in_proj"]) if family == "mamba" else LORA)
    random = torch.Generator().manual_seed(0)
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    with torch.no_grad():  # B is zero at the start, and then A has no gradient
        for weight in weights:
            weight.copy_(0.1 * torch.randn(weight.shape, generator=random))
    margin = expected(model, PAIRS)
    wanted = torch.autograd.grad((margin[0] - margin[1]).sum(), weights, allow_unused=True)
    if checkpointing:
        policy.activation_checkpointing_enable()
        policy.train()
    chosen, rejected = logps(policy, PAIRS, LAYOUTS[family])
    got = torch.autograd.grad((chosen - rejected).sum(), weights, allow_unused=True)
    whole = torch.cat([one.flatten() for one in wanted if one is not None])
    off = torch.cat([(a - b).flatten() for a, b in zip(got, wanted, strict=True) if a is not None and b is not None])
    assert [one is None for one in got] == [one is None for one in wanted]
    assert float(off.norm()) <= 1e-4 * float(whole.norm())


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss", "nemotron", "qwen3_moe", "gpt2"])
def test_packed_rows_hold_in_bfloat16_too(family: str) -> None:
    model = tiny(family).to(torch.bfloat16)
    long = [pair(40, 30, 35, 6), *PAIRS]
    layout = choose_layout("auto", model, long, CPU).value
    assert layout is LAYOUTS[family]
    with torch.no_grad():
        packed, plain = logps(model, long, layout), logps(model, long, Layout.PADDED)
    tokens = torch.tensor([[len(one.chosen) for one in long], [len(one.rejected) for one in long]])
    assert float(((packed - plain).abs() / tokens).max()) < 0.2  # nats a token of these large random weights


@pytest.mark.parametrize("family", ["bloom", "qwen3_next", "mamba"])
def test_families_that_packed_rows_do_not_suit_are_noticed_in_bfloat16_too(family: str) -> None:
    model = tiny(family).to(torch.bfloat16)
    chosen = choose_layout("auto", model, [pair(40, 30, 35, 6), *PAIRS], CPU)
    assert chosen.value is Layout.PADDED
    assert chosen.reason.startswith("packed rows do not suit this model: by packed_segments only ")


def test_packed_rows_that_were_insisted_on_are_refused_where_they_do_not_suit() -> None:
    with pytest.raises(ConfigError, match=r"layout=packed: this model cannot take packed rows .*choose auto"):
        choose_layout("packed", tiny("mamba"), PAIRS, CPU)


def test_padded_rows_can_be_insisted_on() -> None:
    assert choose_layout("padded", tiny(), PAIRS, CPU).value is Layout.PADDED


def test_what_was_measured_is_remembered_for_this_model_and_these_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    model, measured = tiny("qwen3"), []

    def counting(*words: Any) -> Any:
        measured.append(words)
        return choose_layout(*words)

    monkeypatch.setattr(packing, "choose_layout", counting)
    first = packing.remembered_layout("auto", model, PAIRS, CPU, "digest of qwen3")
    again = packing.remembered_layout("auto", model, PAIRS, CPU, "digest of qwen3")
    assert (first.value, again.value, len(measured)) == (Layout.PACKED_SEGMENTS, Layout.PACKED_SEGMENTS, 1)
    assert again.reason == f"{first.reason} earlier"
    packing.remembered_layout("auto", model, PAIRS, CPU, "another digest")
    packing.remembered_layout("auto", model, [*PAIRS, pair(30, 9, 9, 8)], CPU, "digest of qwen3")
    packing.remembered_layout("padded", model, PAIRS, CPU, "digest of qwen3")
    assert len(measured) == 4


def test_a_note_that_cannot_be_read_is_measured_anew(cache: Path) -> None:
    model = tiny()
    before = set((cache / "layouts").glob("*")) if (cache / "layouts").is_dir() else set()
    packing.remembered_layout("auto", model, PAIRS, CPU, "some digest")
    (note,) = set((cache / "layouts").glob("*")) - before
    for damaged in ("", "{}", '{"layout": "sideways", "reason": ""}', "[1]"):
        note.write_text(damaged)
        assert packing.remembered_layout("auto", model, PAIRS, CPU, "some digest").value is Layout.PACKED_SEGMENTS


def test_a_window_that_the_attention_forgets_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention._segment_mask
    monkeypatch.setattr(attention, "_segment_mask", lambda row, a, q, window, device: right(row, a, q, None, device))
    assert choose_layout("auto", tiny("mistral"), PAIRS, CPU).value is Layout.PACKED_MASK


def test_a_response_that_sees_its_sister_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = attention._segments

    def leaking(query: Tensor, key: Tensor, value: Tensor, row: Any) -> Any:
        everything = [(q, k, v, ahead) for q, k, v, ahead in whole(query, key, value, row)]
        first, second = everything[0], everything[1]
        prompt = second[3]
        # The first token of rejected is shown the first token of chosen in the place of the prompt's first.
        leaked = torch.cat([first[1][:, :, prompt : prompt + 1], second[1][:, :, 1:]], dim=2)
        everything[1] = (second[0], leaked, second[2], prompt)
        return iter(everything)

    monkeypatch.setattr(attention, "_segments", leaking)
    assert choose_layout("auto", tiny(), PAIRS[:1], CPU).value is Layout.PACKED_MASK
    # And where the model is so coarse that the numbers alone would pass: rejected may not move with chosen.
    model = tiny()
    plain, _ = packing._plain(model, PAIRS[:1], CPU)
    with torch.no_grad():
        coarse = packing._Noise.between(
            token_logps_of(model, make_micro_batch(PAIRS[:1], CPU, Layout.PACKED_SEGMENTS)), plain
        )
    said = packing._differs(model, PAIRS[:1], CPU, Layout.PACKED_SEGMENTS, plain, coarse)
    assert isinstance(said, str) and said.startswith("a response sees another one")


def test_an_unknown_keyword_of_attention_is_refused_rather_than_ignored() -> None:
    row = make_micro_batch(PAIRS[:1], CPU, Layout.PACKED_SEGMENTS).row
    tensors = [torch.zeros(1, 2, 15, 4)] * 3
    with pytest.raises(ValueError, match="with the keywords position_bias"):
        attention.segment_attention(None, *tensors, None, packed_row=row, position_bias=torch.zeros(1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no packed row"):
        attention.segment_attention(None, *tensors, None)  # type: ignore[arg-type]


def test_generating_after_packed_rows_is_as_before() -> None:
    model = tiny()
    ids = torch.arange(2, 9)[None]
    before = model.generate(ids, max_new_tokens=5, do_sample=False)
    with torch.no_grad():
        logps(model, PAIRS, Layout.PACKED_SEGMENTS)
    with plain_attention(model):
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), before)
    assert model.config._attn_implementation == attention.SEGMENTS


# Property: whatever the lengths and the company

MODEL = tiny("mistral")
LENGTHS = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=6)


@share(0.8)
@given(LENGTHS, st.sampled_from([Layout.PACKED_SEGMENTS, Layout.PACKED_MASK]))
def test_packed_equals_padded_whatever_the_lengths(lengths: list[tuple[int, int, int]], layout: Layout) -> None:
    pairs = [pair(*some, seed=seed) for seed, some in enumerate(lengths)]
    with torch.no_grad():
        assert torch.allclose(logps(MODEL, pairs, layout), logps(MODEL, pairs, Layout.PADDED), atol=1e-4)


# Shared prompts


def ranked(responses: int) -> list[TokenizedPair]:
    """All pairs of several ranked responses to one prompt, and a pair of another prompt in their middle."""
    prompt = pair(6, 1, 1, 9).prompt
    answers = [pair(1, 3 + which, 1, 20 + which).chosen for which in range(responses)]
    pairs = [
        TokenizedPair(prompt, answers[better], answers[worse], 0, f"{better}{worse}", 0)
        for better in range(responses)
        for worse in range(better + 1, responses)
    ]
    pairs.insert(2, PAIRS[3])
    return pairs


@pytest.mark.parametrize("layout", [Layout.PACKED_SEGMENTS, Layout.PACKED_MASK])
def test_several_responses_share_one_prompt_and_each_is_computed_once(layout: Layout) -> None:
    pairs, model = ranked(4), tiny("qwen2")
    batch = make_micro_batch(pairs, CPU, layout)
    # The prompt of 6 once, answers of 3, 4, 5 and 6 once, and the other pair of 3 + 8 + 8.
    assert batch.input_ids.shape == (1, 6 + 18 + 19)
    assert packed_tokens(pairs) == 43
    assert batch.real_tokens == sum(2 * len(one.prompt) + len(one.chosen) + len(one.rejected) for one in pairs)
    with torch.no_grad():
        assert torch.allclose(logps(model, pairs, layout), expected(model, pairs), atol=5e-5)


def test_gradients_of_shared_responses_add_up() -> None:
    pairs, model = ranked(3), tiny()
    weights = list(model.parameters())
    shared = torch.autograd.grad(logps(model, pairs, Layout.PACKED_SEGMENTS)[0].sum(), weights)
    alone = torch.autograd.grad(sum(logps(model, [one], Layout.PACKED_SEGMENTS)[0].sum() for one in pairs), weights)  # type: ignore[arg-type]
    for one, other in zip(shared, alone, strict=True):
        assert float((one - other).norm()) <= 1e-4 * float(other.norm()) + 1e-5


def test_the_same_response_to_another_prompt_is_not_shared() -> None:
    one = PAIRS[0]
    other = replace(one, prompt=token_ids([*one.prompt, 7]))
    assert packed_tokens([one, other]) == 2 * packed_tokens([one]) + 1


# The GPU's variable-length attention, with its kernel spelled out


def spelled_out_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """What the documentation of torch.nn.attention.varlen promises: bottom-right causal windows, segment by segment."""
    assert window_size[1] == 0
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert (cu_seq_q.dtype, cu_seq_k.dtype) == (torch.int32, torch.int32)
    out = []
    for start_q, end_q, start_k, end_k in zip(cu_seq_q[:-1], cu_seq_q[1:], cu_seq_k[:-1], cu_seq_k[1:], strict=True):
        q, k, v = query[start_q:end_q], key[start_k:end_k], value[start_k:end_k]
        assert (len(q) <= max_q, len(k) <= max_k) == (True, True)
        k, v = (one.repeat_interleave(q.shape[1] // one.shape[1], dim=1) for one in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * (scale if scale is not None else q.shape[-1] ** -0.5)
        behind = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
        seen = (behind >= 0) & (behind <= (window_size[0] if window_size[0] >= 0 else len(k)))
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v))
    return torch.cat(out)


@pytest.mark.parametrize("window", [None, 5])
def test_variable_length_attention_gets_the_segments_it_needs(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "varlen_attn", spelled_out_varlen)
    row = make_micro_batch(ranked(3), CPU, Layout.PACKED_SEGMENTS).row
    assert row is not None
    tokens = len(row.positions_in_group)
    random = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, tokens, 8, generator=random) for heads in (4, 2, 2))
    by_segments, _ = attention.segment_attention(
        None, query, key, value, None, sliding_window=window, scaling=0.3, packed_row=row
    )
    in_one_call = attention._variable_length(query, key, value, row, 0.3, window)
    assert torch.allclose(in_one_call, by_segments, atol=1e-5)


# Compiled layers


# Torch's compiler touches deprecated paths of its own while it traces.
@pytest.mark.filterwarnings("ignore")
def test_layers_are_compiled_once_for_rows_of_any_length_and_give_the_same_numbers() -> None:
    from torch._dynamo.utils import counters

    policy = attach_lora(tiny(), LORA)
    with torch.no_grad():
        plain = {number: logps(policy, PAIRS[:number], Layout.PACKED_SEGMENTS) for number in (1, 3, 5)}
    torch._dynamo.reset()
    counters.clear()
    assert compile_layers(causal_model(policy), backend="aot_eager") == 2
    graphs = set()
    for number, expected_logps in plain.items():
        compiled = logps(policy, PAIRS[:number], Layout.PACKED_SEGMENTS)
        compiled.sum().backward()
        assert torch.allclose(compiled.detach(), expected_logps, atol=1e-5)
        graphs.add(counters["stats"]["unique_graphs"])
    assert len(graphs) == 1
    assert all(weight.grad is not None for weight in policy.parameters() if weight.requires_grad)
