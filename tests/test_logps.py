"""log p(response | prompt): equal to the naive concatenated forward, whatever the batch looks like."""

import hashlib
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import share
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import CPU, LORA, VOCABULARY, pair, tiny
from torch import Tensor

from dpo_cli.config.schema import LoraConfig
from dpo_cli.data.batches import Layout, SplitByPairs
from dpo_cli.data.tokens import TokenizedPair, token_ids
from dpo_cli.evaluation.scores import Scorer, score_pairs
from dpo_cli.models.adapters import attach_lora
from dpo_cli.models.head import head_logits, head_trains, token_logps
from dpo_cli.models.logps import MicroBatcher, make_micro_batch, pair_logps
from dpo_cli.models.reference import UnmovedPolicy
from dpo_cli.objectives.preference import Preference

WAYS = [Layout.PADDED, Layout.PACKED_SEGMENTS]

PAIRS = [pair(5, 3, 7, 1), pair(1, 1, 1, 2), pair(9, 2, 1, 3), pair(3, 8, 8, 4)]


def naive(model: Any, prompt: Any, response: Any) -> Tensor:
    """The definition: one sequence, full logits, log-softmax, summed over the response."""
    ids = torch.tensor(np.concatenate([prompt, response]).astype(np.int64))[None]
    logps = model(input_ids=ids).logits[0].float().log_softmax(-1)
    total = torch.zeros(())
    for place in range(len(prompt), ids.shape[1]):
        total = total + logps[place - 1, ids[0, place]]
    return total


def both_sides(model: Any, pairs: list[TokenizedPair], way: Layout = Layout.PACKED_SEGMENTS) -> Tensor:
    """(2, B): chosen and rejected."""
    logps = pair_logps(model, make_micro_batch(pairs, CPU, way))
    return torch.stack([logps.chosen, logps.rejected])


FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3", "granite", "cohere", "olmo2", "gpt_neox"]


@pytest.mark.parametrize("family", FAMILIES)
def test_logps_equal_the_naive_forward(family: str) -> None:
    model = tiny(family)
    expected = [
        [naive(model, one.prompt, side).item() for one in PAIRS for side in [getattr(one, name)]]
        for name in ("chosen", "rejected")
    ]
    with torch.no_grad():
        got = both_sides(model, PAIRS, Layout.PADDED)
    assert got.tolist() == [pytest.approx(row, abs=1e-4) for row in expected]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "granite", "cohere"])
def test_adapter_gradients_in_padded_rows_equal_those_of_the_naive_forward(family: str) -> None:
    model = attach_lora(tiny(family), LORA)
    with torch.no_grad():  # B is zero at the start, and then A has no gradient
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    margin = sum((naive(model, one.prompt, one.chosen) - naive(model, one.prompt, one.rejected)) for one in PAIRS)
    expected = torch.autograd.grad(margin, weights)  # type: ignore[arg-type]
    logps = pair_logps(model, make_micro_batch(PAIRS, CPU, Layout.PADDED))
    got = torch.autograd.grad((logps.chosen - logps.rejected).sum(), weights)
    for one, other in zip(got, expected, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm() + 1e-6


@share(0.3)
@given(st.lists(st.tuples(*[st.integers(1, 12)] * 3), min_size=1, max_size=5), st.sampled_from(WAYS))
def test_company_in_the_batch_changes_nothing(lengths: list[tuple[int, int, int]], way: Layout) -> None:
    model = tiny()
    pairs = [pair(*some, seed=seed) for seed, some in enumerate(lengths)]
    with torch.no_grad():
        together = both_sides(model, pairs, way)
        alone = torch.cat([both_sides(model, [one], way) for one in pairs], dim=1)
        backwards = both_sides(model, pairs[::-1], way).flip(1)
    assert torch.allclose(together, alone, atol=1e-4)
    assert torch.allclose(together, backwards, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_probabilities_of_all_one_token_responses_sum_to_one(way: Layout) -> None:
    model = tiny()
    prompt = pair(6, 1, 1).prompt
    pairs = [TokenizedPair(prompt, token_ids([t]), token_ids([t]), t, str(t), 0) for t in range(VOCABULARY)]
    with torch.no_grad():
        total = both_sides(model, pairs, way)[0].double().exp().sum()
    assert float(total) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_chain_rule_moving_tokens_from_response_to_prompt_splits_the_sum(way: Layout) -> None:
    # log p(abc | x) = log p(a | x) + log p(bc | xa)
    model = tiny()
    one = pair(4, 5, 5)
    first, rest = one.chosen[:2], one.chosen[2:]
    parts = [
        TokenizedPair(one.prompt, first, first, 0, "", 0),
        TokenizedPair(np.concatenate([one.prompt, first]), rest, rest, 1, "", 1),
    ]
    with torch.no_grad():
        whole = both_sides(model, [one], way)[0, 0]
        split = both_sides(model, parts, way)[0].sum()
    assert float(whole) == pytest.approx(float(split), abs=1e-4)


def test_changing_a_prompt_or_last_token_changes_the_sum_and_padding_does_not() -> None:
    model = tiny()
    one = pair(4, 3, 12)  # the chosen side is padded by 9
    with torch.no_grad():
        before = both_sides(model, [one], Layout.PADDED)[0, 0]
        batch = make_micro_batch([one], CPU, Layout.PADDED)
        batch.input_ids[0, 7:] = 5  # whatever lies in the padding
        assert pair_logps(model, batch).chosen[0] == pytest.approx(float(before), abs=1e-5)
        last = TokenizedPair(one.prompt, token_ids([*one.chosen[:-1], (one.chosen[-1] + 1) % VOCABULARY]),
                             one.rejected, 0, "", 0)  # fmt: skip
        assert abs(both_sides(model, [last], Layout.PADDED)[0, 0] - before) > 1e-3


@pytest.mark.parametrize("way", WAYS)
def test_the_closing_token_is_scored_once(way: Layout) -> None:
    one = pair(4, 3, 2)
    logps = pair_logps(tiny(), make_micro_batch([one], CPU, way))
    assert (logps.chosen_tokens.tolist(), logps.rejected_tokens.tolist()) == ([3], [2])


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_favours_one_token_gives_its_closed_form(way: Layout) -> None:
    # Zero hidden weights leave the head a constant: with logits z, log p = z_y - log sum exp z at every position.
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    one = pair(4, 3, 2)
    with torch.no_grad():
        assert both_sides(model, [one], way)[:, 0].tolist() == pytest.approx(
            [-3 * math.log(VOCABULARY), -2 * math.log(VOCABULARY)], abs=1e-5
        )


# Positions that are not scored

LAYOUTS = [Layout.PADDED, Layout.PACKED_SEGMENTS, Layout.PACKED_MASK]
CHOSEN, REJECTED = [2, 4, 7, 8], [1, 2]  # unscored: chosen 2, 3, 7; rejected 1


def with_unscored() -> TokenizedPair:
    one = pair(5, 10, 4)
    return replace(one, chosen_unscored=token_ids(CHOSEN), rejected_unscored=token_ids(REJECTED))


def by_hand(model: Any, prompt: Any, response: Any, scored: list[int]) -> Tensor:
    ids = torch.tensor(np.concatenate([prompt, response]).astype(np.int64))[None]
    logps = model(input_ids=ids).logits[0].float().log_softmax(-1)
    return torch.stack([logps[len(prompt) + at - 1, int(response[at])] for at in scored]).sum()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unscored_positions_are_read_and_carry_no_log_prob(layout: Layout) -> None:
    model, one = tiny(), with_unscored()
    micro_batch = make_micro_batch([PAIRS[0], one, PAIRS[3]], CPU, layout)
    with torch.no_grad():
        chosen = by_hand(model, one.prompt, one.chosen, [0, 1, 4, 5, 6, 8, 9])
        rejected = by_hand(model, one.prompt, one.rejected, [0, 2, 3])
        found = pair_logps(model, micro_batch)
    assert float(found.chosen[1]) == pytest.approx(float(chosen), abs=1e-4)
    assert float(found.rejected[1]) == pytest.approx(float(rejected), abs=1e-4)
    assert found.chosen_tokens.tolist() == [3, 7, 8]
    assert found.rejected_tokens.tolist() == [7, 3, 8]
    # Where a reward model reads: the last token, whatever is scored.
    last = [int(side[-1]) for example in micro_batch.examples for side in example.responses]
    assert micro_batch.input_ids.flatten()[micro_batch.ends].tolist() == last


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_gradient_flows_from_unscored_labels(layout: Layout) -> None:
    # With a head of zeros every token has the gradient (probability - 1 if it is the label) in its own row of the
    # head: the rows that differ from the others are the labels.
    model, one = tiny(tie_word_embeddings=False), with_unscored()
    one = replace(one, chosen=token_ids(range(20, 30)), rejected=token_ids(range(40, 44)))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    micro_batch = make_micro_batch([one], CPU, layout)
    model.lm_head.weight.requires_grad_(True)
    logps = pair_logps(model, micro_batch)
    (logps.chosen + logps.rejected).sum().backward()
    gradient = model.lm_head.weight.grad
    usual = gradient[1]  # a token that is no label
    labels = [token for token in range(VOCABULARY) if (gradient[token] - usual).norm() > 1e-6]
    assert labels == [20, 21, 24, 25, 26, 28, 29, 40, 42, 43]


def test_response_keys_differ_where_other_positions_are_scored_and_stay_where_all_are() -> None:
    one, all_scored = with_unscored(), pair(5, 10, 4)
    assert all(ours != theirs for ours, theirs in zip(one.response_keys, all_scored.response_keys, strict=True))
    # As in caches written before: a hash of prompt and response alone.
    digest = hashlib.blake2b(digest_size=16)
    for ids in (all_scored.prompt, all_scored.chosen):
        digest.update(len(ids).to_bytes(4, "little") + ids.astype("<i4").tobytes())
    assert all_scored.response_keys[0] == digest.digest()
    moved = replace(one, chosen_unscored=token_ids([2, 3, 7, 8]))
    assert moved.response_keys[0] != one.response_keys[0]
    assert moved.response_keys[1] == one.response_keys[1]


def test_evaluation_divides_by_the_tokens_that_are_scored_as_training_does() -> None:
    policy, pairs = tiny(), [PAIRS[0], with_unscored(), PAIRS[3]]
    scorer = Scorer(
        policy, Preference.default(), UnmovedPolicy(policy), MicroBatcher(CPU, Layout.PADDED, SplitByPairs(2))
    )
    found = score_pairs(scorer, pairs).policy.pairs()
    in_training = pair_logps(policy, make_micro_batch(pairs, CPU, Layout.PADDED))
    # Of the pair in the middle 3 of 10 and 1 of 4 tokens are not scored.
    assert found.chosen_tokens.tolist() == in_training.chosen_tokens.tolist() == [3, 7, 8]
    assert found.rejected_tokens.tolist() == in_training.rejected_tokens.tolist() == [7, 3, 8]


# The head


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2", "phi"])
def test_the_replayed_head_gives_the_models_own_logits(family: str) -> None:
    model = tiny(family)
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
        assert torch.equal(head_logits(model, hidden), model(input_ids=ids).logits[0])


def test_gradient_taken_in_the_forward_pass_equals_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_cli.models.head.CHUNK_TOKENS", 4)  # several chunks, the last one short
    model = tiny("gemma2", final_logit_softcapping=5.0).requires_grad_(False)
    hidden = torch.randn(10, 32, requires_grad=True)
    labels = torch.arange(10)
    weight = torch.randn(10)
    (token_logps(model, hidden, labels) * weight).sum().backward()
    got = hidden.grad
    hidden.grad = None
    (head_logits(model, hidden).log_softmax(-1)[torch.arange(10), labels] * weight).sum().backward()
    assert got is not None and hidden.grad is not None
    assert torch.allclose(got, hidden.grad, atol=1e-5)


def test_a_head_that_trains_gets_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_cli.models.head.CHUNK_TOKENS", 4)
    model = tiny(tie_word_embeddings=False)
    hidden = torch.randn(10, 32)
    labels = torch.arange(10)
    token_logps(model, hidden, labels).sum().backward()
    got = model.lm_head.weight.grad.clone()
    model.lm_head.weight.grad = None
    head_logits(model, hidden).log_softmax(-1)[torch.arange(10), labels].sum().backward()
    assert torch.allclose(got, model.lm_head.weight.grad, atol=1e-5)


def test_whether_the_head_trains_is_asked_of_its_output() -> None:
    hidden = torch.randn(3, 32)
    frozen = attach_lora(tiny(), LORA)
    on_head = LoraConfig(enabled=True, r=4, alpha=8.0, dropout=0.0, target_modules=["lm_head"])
    assert not head_trains(frozen.get_base_model(), hidden)
    assert head_trains(attach_lora(tiny(tie_word_embeddings=False), on_head).get_base_model(), hidden)
    assert head_trains(tiny(), hidden)
