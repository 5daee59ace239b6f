"""Identities of DPO on a model, each with its arithmetic; docs/correctness.md says where the others stand."""

from functools import partial
from typing import Any

import pytest
import torch
from test_logps import PAIRS, both_sides
from tiny_models import CPU, LORA, tiny

from dpo_cli.data.batches import Layout
from dpo_cli.data.tokens import TokenizedPair
from dpo_cli.models.adapters import attach_lora
from dpo_cli.models.logps import MicroBatch, make_micro_batch, pair_logps, plain_attention
from dpo_cli.models.reference import AdapterOffReference, FrozenReference, Reference
from dpo_cli.theory.losses import LogRatios, PairLogps, gradient_weight, sigmoid

BETA = 0.1


def moved_policy(family: str = "llama") -> Any:
    """A LoRA policy that has left its start."""
    policy = attach_lora(tiny(family), LORA)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.05 * torch.randn(weight.shape, generator=generator))
    return policy


def pairs_of(reference: Reference, micro_batch: MicroBatch) -> PairLogps:
    """What the reference says of each pair."""
    return micro_batch.scores(reference.logps(micro_batch)).pairs()


def test_fresh_adapters_leave_the_log_probs_of_the_base_bit_for_bit() -> None:
    with torch.no_grad():
        assert torch.equal(both_sides(attach_lora(tiny(), LORA), PAIRS), both_sides(tiny(), PAIRS))


def test_the_gradient_is_the_formula_of_the_paper() -> None:
    # grad L = -b sigmoid(-b d) (grad log pi+ - grad log pi-), summed over pairs, on every adapter weight
    policy, reference = moved_policy(), FrozenReference(tiny())
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    batch = make_micro_batch(PAIRS, CPU, Layout.PACKED_SEGMENTS)
    ratios = LogRatios.between(pair_logps(policy, batch), pairs_of(reference, batch))
    got = torch.autograd.grad(sigmoid(ratios, BETA).sum(), weights)
    expected = [torch.zeros_like(weight) for weight in weights]
    pull = gradient_weight(partial(sigmoid, beta=BETA), ratios)
    assert float((pull - 0.5).abs().max()) > 1e-3  # the policy has moved
    for place, pair in enumerate(PAIRS):
        logps = pair_logps(policy, make_micro_batch([pair], CPU, Layout.PACKED_SEGMENTS))
        direction = torch.autograd.grad(logps.chosen[0] - logps.rejected[0], weights)
        for total, part in zip(expected, direction, strict=True):
            total.sub_(BETA * pull[place] * part)
    for one, other in zip(got, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_autograd_agrees_with_finite_differences_in_float64() -> None:
    policy = moved_policy("gpt_neox").double()  # its norms compute in float64; Llama's in float32 whatever comes in
    weight = next(weight for name, weight in policy.named_parameters() if "lora_B" in name)
    batch = make_micro_batch(PAIRS, CPU, Layout.PACKED_SEGMENTS)
    # log-probs are summed in float32 on purpose; here the definition is written out in float64.

    def margin() -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for pair in PAIRS:
            for sign, side in ((1, pair.chosen), (-1, pair.rejected)):
                ids = torch.tensor([*pair.prompt.tolist(), *side.tolist()])[None]
                with plain_attention(policy):
                    logits = policy(input_ids=ids).logits[0, :-1]
                logps = logits.log_softmax(-1).gather(1, ids[0, 1:, None])
                total = total + sign * logps[len(pair.prompt) - 1 :].sum()
        return total

    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (analytic,) = torch.autograd.grad(margin(), weight)
    with torch.no_grad():
        step = 1e-6
        weight.add_(step * direction)
        up = margin()
        weight.sub_(2 * step * direction)
        down = margin()
        weight.add_(step * direction)
    assert float((up - down) / (2 * step)) == pytest.approx(float((analytic * direction).sum()), rel=1e-6)
    with torch.no_grad():
        logps = pair_logps(policy, batch)
    assert float((logps.chosen - logps.rejected).sum()) == pytest.approx(float(margin().detach()), abs=1e-3)


def test_swapping_chosen_and_rejected_turns_every_margin_around() -> None:
    policy, reference = moved_policy(), FrozenReference(tiny())
    swapped = [
        TokenizedPair(pair.prompt, pair.rejected, pair.chosen, pair.index, pair.key, pair.group) for pair in PAIRS
    ]
    margins = []
    for pairs in (PAIRS, swapped):
        batch = make_micro_batch(pairs, CPU, Layout.PACKED_SEGMENTS)
        with torch.no_grad():
            margins.append(LogRatios.between(pair_logps(policy, batch), pairs_of(reference, batch)).margin)
    assert torch.allclose(margins[0], -margins[1], atol=1e-4)
    won = [(margin > 0).float().mean() for margin in margins]
    assert float(won[0] + won[1]) == 1.0


def test_the_second_model_equals_the_adapter_switched_off() -> None:
    policy = moved_policy()
    batch = make_micro_batch(PAIRS, CPU, Layout.PACKED_SEGMENTS)
    frozen, off = pairs_of(FrozenReference(tiny()), batch), pairs_of(AdapterOffReference(policy), batch)
    assert torch.allclose(frozen.chosen, off.chosen, atol=1e-6)
    assert torch.allclose(frozen.rejected, off.rejected, atol=1e-6)
    with torch.no_grad():
        assert not torch.allclose(pair_logps(policy, batch).chosen, off.chosen, atol=1e-3)  # and it is on again


def test_the_adapter_off_reference_runs_without_dropout_and_gives_the_mode_back() -> None:
    policy = moved_policy()
    for module in policy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.9
    policy.train()
    batch = make_micro_batch(PAIRS, CPU, Layout.PACKED_SEGMENTS)
    assert torch.equal(AdapterOffReference(policy).logps(batch), FrozenReference(tiny()).logps(batch))
    assert policy.training


@pytest.mark.parametrize("tied", [True, False])
def test_base_plus_adapter_equals_the_merged_model(tied: bool) -> None:
    policy = attach_lora(tiny(tie_word_embeddings=tied), LORA)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
        before = both_sides(policy, PAIRS)
        assert torch.allclose(both_sides(policy.merge_and_unload(), PAIRS), before, atol=1e-4)
