"""The LoRA layer as one function: PEFT's forward and gradients, and PEFT's own layer where it does not apply."""

from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from tiny_models import LORA, tiny
from torch import Tensor, nn

from dpo_cli.models.adapters import attach_lora
from dpo_cli.models.lora_function import FusedLoraLinear, fuse_lora

IDS = torch.arange(2, 12)[None]


def layers(policy: Any, kind: type) -> list[Any]:
    return [module for module in policy.modules() if type(module) is kind]


def randomized(policy: Any) -> Any:
    """With adapters that are not zero."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.requires_grad:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=random))
    return policy


def outcome(policy: Any) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the gradient of something of them."""
    logits = policy(input_ids=IDS).logits.float()
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    target = torch.sin(torch.arange(logits.numel())).view_as(logits)
    return logits.detach(), list(torch.autograd.grad((logits * target).sum(), weights))


def by_peft(policy: Any) -> tuple[Tensor, list[Tensor]]:
    fused = layers(policy, FusedLoraLinear)
    for layer in fused:
        layer.__class__ = LoraLinear
    try:
        return outcome(policy)
    finally:
        for layer in fused:
            layer.__class__ = FusedLoraLinear


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox", "phi"])  # the last three have biases
def test_forward_and_gradients_are_those_of_peft(family: str) -> None:
    policy = randomized(attach_lora(tiny(family), LORA))
    assert len(layers(policy, FusedLoraLinear)) > 6
    assert layers(policy, LoraLinear) == []
    logits, gradients = outcome(policy)
    expected_logits, expected_gradients = by_peft(policy)
    assert torch.allclose(logits, expected_logits, atol=1e-5, rtol=1e-5)
    for one, other in zip(gradients, expected_gradients, strict=True):
        assert one.dtype == torch.float32
        assert float((one - other).norm()) <= 1e-5 * float(other.norm()) + 1e-6


def test_gradient_against_finite_differences() -> None:
    from dpo_cli.models.lora_function import _LoraProduct

    random = torch.Generator().manual_seed(0)
    x, weight, bias, a, b = (
        torch.randn(*shape, generator=random, dtype=torch.float64)
        for shape in ((2, 3, 5), (4, 5), (4,), (2, 5), (4, 2))
    )
    for tensor in (x, a, b):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda *some: _LoraProduct.apply(some[0], weight, bias, *some[1:], 1.7), (x, a, b))


def test_in_bfloat16_it_is_nearly_as_close_to_float32_as_peft_is() -> None:
    # Adapters far larger than training makes them; on SmolLM2 the gradients of both are off by 4%, the base's rounding.
    exact = outcome(randomized(attach_lora(tiny(), LORA)))
    policy = randomized(attach_lora(tiny().to(torch.bfloat16), LORA))
    fused, peft = outcome(policy), by_peft(policy)
    off, off_by_peft = (float((one[0] - exact[0]).norm()) for one in (fused, peft))
    assert off <= 1.5 * off_by_peft
    off, off_by_peft = (
        sum(float((a - b).norm()) for a, b in zip(one[1], exact[1], strict=True)) for one in (fused, peft)
    )
    assert off <= 2.5 * off_by_peft


def test_an_adapter_whose_b_is_zero_changes_no_bit() -> None:
    base = tiny().to(torch.bfloat16)
    with torch.no_grad():
        before = base(input_ids=IDS).logits
        assert torch.equal(attach_lora(base, LORA)(input_ids=IDS).logits, before)


def test_switched_off_and_merged_adapters_go_pefts_way() -> None:
    policy = randomized(attach_lora(tiny(), LORA))
    plain = tiny()
    with torch.no_grad():
        with policy.disable_adapter():
            assert torch.equal(policy(input_ids=IDS).logits, plain(input_ids=IDS).logits)
        adapted = policy(input_ids=IDS).logits
        assert not torch.allclose(adapted, plain(input_ids=IDS).logits, atol=1e-2)
        policy.merge_adapter()
        assert torch.allclose(policy(input_ids=IDS).logits, adapted, atol=1e-4)
        policy.unmerge_adapter()
        assert torch.allclose(policy(input_ids=IDS).logits, adapted, atol=1e-4)


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_what_is_more_than_a_plain_lora_is_left_to_peft(options: dict[str, Any]) -> None:
    policy = get_peft_model(tiny("gpt_neox"), PeftLoraConfig(r=4, target_modules="all-linear", **options))
    assert fuse_lora(policy) == 0


def test_a_second_adapter_is_left_to_peft() -> None:
    policy = get_peft_model(tiny(), PeftLoraConfig(r=4, target_modules=["q_proj"]))
    assert fuse_lora(policy) == 2
    policy.add_adapter("second", PeftLoraConfig(r=2, target_modules=["q_proj"]))
    policy.base_model.set_adapter(["default", "second"])
    layer = next(module for module in policy.modules() if isinstance(module, FusedLoraLinear))
    x = torch.randn(3, 32)
    assert torch.equal(layer(x), LoraLinear.forward(layer, x))


def test_a_base_that_trains_is_left_to_peft() -> None:
    policy = get_peft_model(tiny(), PeftLoraConfig(r=4, target_modules=["q_proj"]))
    for layer in layers(policy, LoraLinear):
        layer.base_layer.weight.requires_grad_(True)
    assert fuse_lora(policy) == 0
    assert isinstance(layers(policy, LoraLinear)[0].base_layer, nn.Linear)
