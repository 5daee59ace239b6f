"""The LoRA layer as one autograd function: y = x W' + s (x A') B', computed in place and in the base's dtype.

PEFT's own layer casts the input to the adapter's float32, computes both small products there, scales, adds and casts
back: four more passes over the output and a float32 copy of every input kept for the backward pass. Here the float32
weights are rounded to the dtype of the base for the products, as autocast would, while the weights themselves and
their gradients stay float32. In a float32 model nothing is rounded.

A quantised base is dequantised for each product, forward and backward; only its packed weight is kept between.

N tokens, I inputs, O outputs, r the rank. LoRA: https://arxiv.org/abs/2106.09685.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from dpo_cli.models.quantization import QuantizedLinear


class _LoraProduct(torch.autograd.Function):
    """y = x W' + bias + scaling (x A') B' for frozen W and bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float,
        packed: QuantizedLinear | None = None,
    ) -> Tensor:  # fmt: skip
        flat = x.reshape(-1, x.shape[-1])  # (N, I)
        small = flat @ a.to(x.dtype).t()  # (N, r)
        full = packed.full_weight(x.dtype) if packed is not None else weight
        assert full is not None
        y = nn.functional.linear(flat, full, bias)
        y.addmm_(small, b.to(x.dtype).t(), alpha=scaling)
        ctx.save_for_backward(x, weight, a, b, small)
        ctx.scaling, ctx.packed = scaling, packed
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None, None]:
        x, weight, a, b, small = ctx.saved_tensors
        flat = x.reshape(-1, x.shape[-1])
        g = upstream[0].reshape(-1, upstream[0].shape[-1])  # (N, O)
        g_small = (g @ b.to(g.dtype)).mul_(ctx.scaling)  # (N, r)
        grad_a = (g_small.t() @ flat).to(a.dtype)  # (r, I)
        grad_b = (g.t() @ small).mul_(ctx.scaling).to(b.dtype)  # (O, r)
        if not ctx.needs_input_grad[0]:
            return None, None, None, grad_a, grad_b, None, None
        full = ctx.packed.full_weight(g.dtype) if ctx.packed is not None else weight
        grad_x = (g @ full).addmm_(g_small, a.to(g.dtype))
        return grad_x.view(x.shape), None, None, grad_a, grad_b, None, None


def _takes_it(layer: LoraLinear) -> bool:
    """Whether a layer is a plain LoRA: one active adapter on a frozen linear layer, and nothing besides."""
    base = layer.base_layer
    if type(base) not in (nn.Linear, QuantizedLinear) or base.weight.requires_grad or len(layer.active_adapters) != 1:
        return False
    name = layer.active_adapters[0]
    return (
        name in layer.lora_A
        and isinstance(layer.lora_dropout[name], nn.Identity)  # LoRA dropout is PEFT's to apply
        and name not in layer.lora_variant  # DoRA and its kin
        and layer.lora_A[name].bias is None
        and layer.lora_B[name].bias is None
    )


class FusedLoraLinear(LoraLinear):
    """PEFT's layer with a faster forward; whatever is not a plain LoRA goes PEFT's own way."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's: (..., I) to (..., O)."""
        if args or kwargs or self.disable_adapters or self.merged or not _takes_it(self):
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        name = self.active_adapters[0]
        packed = self.base_layer if isinstance(self.base_layer, QuantizedLinear) else None
        fused: Tensor = _LoraProduct.apply(
            x,
            self.base_layer.weight if packed is None else None,
            self.base_layer.bias,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            self.scaling[name],
            packed,
        )
        return fused


def fuse_lora(policy: Any) -> int:
    """Give every plain LoRA layer of the policy the one function; returns how many took it."""
    layers = [module for module in policy.modules() if type(module) is LoraLinear and _takes_it(module)]
    for layer in layers:
        layer.__class__ = FusedLoraLinear
    return len(layers)
