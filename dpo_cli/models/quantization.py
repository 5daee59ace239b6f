"""Base weights kept in 4 or 8 bits: linear layers that dequantise their weight for every product (QLoRA).

One idea to keep in mind: forward and backward pass use the same dequantised matrix, in training and in evaluation, on
every device. So the functions of bitsandbytes are used, and not its layers. On a CPU with avx512_bf16 its `Linear4bit`
repacks weights in place in an evaluation pass, and gradients are wrong from then on; its `Linear8bitLt` rounds
activations too, and otherwise in training than in evaluation.

Weights are quantised on the CPU, whatever the device: the same weights give the same bits on every machine.

O outputs, I inputs. nf4: https://arxiv.org/abs/2305.14314, without its second quantisation of the scales.
int8: a scale per row, https://arxiv.org/abs/2208.07339.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dpo_cli.console.text import safe_text
from dpo_cli.errors import CheckpointError, ConfigError

if TYPE_CHECKING:  # the schema needs packages that a machine that only measures may lack
    from dpo_cli.config.schema import ModelConfig

BLOCK = 64  # weights that share a scale in nf4


def check_installed(key: str, value: str) -> None:
    """ConfigError where bitsandbytes is not installed, which `key` with this value needs; imports nothing."""
    found = importlib.util.find_spec("bitsandbytes")
    if found is None or found.origin is None:
        raise ConfigError(f"{key}={value}: the package bitsandbytes is not installed; pip install 'dpo-cli[quant]'")


def check_quantization(config: "ModelConfig") -> None:
    """ConfigError where the model cannot be quantised as its config says, before anything is loaded."""
    if config.quantization != "none":
        check_installed("model.quantization", config.quantization)


def _functions() -> Any:
    import bitsandbytes.functional

    return bitsandbytes.functional


def _pack_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    packed, state = _functions().quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=False)
    return packed.view(-1, BLOCK // 2), state.absmax


def _unpack_nf4(packed: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    shape = torch.Size((len(packed), BLOCK))
    state = _functions().QuantState(absmax=absmax, shape=shape, dtype=dtype, blocksize=BLOCK, quant_type="nf4")
    blocks: Tensor = _functions().dequantize_4bit(packed, state)
    return blocks


def _pack_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    packed, absmax, _ = _functions().int8_vectorwise_quant(weight)
    return packed, absmax


def _unpack_int8(packed: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    rows: Tensor = _functions().int8_vectorwise_dequant(packed, absmax)
    return rows.to(dtype)


@dataclass(frozen=True)
class Method:
    """How a weight (O, I) is packed, how it comes back, and what it takes."""

    pack: Callable[[Tensor], tuple[Tensor, Tensor]]  # float32 -> packed, scales
    unpack: Callable[[Tensor, Tensor, torch.dtype], Tensor]
    bytes_of: Callable[[int, int], int]  # of O, I
    block: int  # O times I must be a multiple of it


# Chosen by `model.quantization`.
METHODS = {
    "nf4": Method(_pack_nf4, _unpack_nf4, lambda outputs, inputs: outputs * inputs * (BLOCK // 2 + 4) // BLOCK, BLOCK),
    "int8": Method(_pack_int8, _unpack_int8, lambda outputs, inputs: outputs * (inputs + 4), 1),
}


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose weight is packed; `weight` holds the packed bits, `absmax` the scales."""

    def __init__(self, linear: nn.Linear, method: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.method = linear.in_features, linear.out_features, method
        weight = linear.weight.detach()
        packed, absmax = METHODS[method].pack((weight if weight.is_meta else weight.cpu()).float())
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("absmax", absmax)
        self.bias = linear.bias
        self.requires_grad_(False)

    def full_weight(self, dtype: torch.dtype) -> Tensor:
        """The dequantised weight, (O, I)."""
        assert isinstance(self.absmax, Tensor)
        full = METHODS[self.method].unpack(self.weight.detach(), self.absmax, dtype)
        return full.view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) to (..., O)."""
        product: Tensor = _Product.apply(x, self)
        return product

    def extra_repr(self) -> str:
        """As torch's, with the method."""
        return f"{super().extra_repr()}, {self.method}"


class _Product(torch.autograd.Function):
    """y = x W' + bias for a frozen packed W, which is dequantised again in the backward pass instead of kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.full_weight(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return upstream[0] @ ctx.layer.full_weight(upstream[0].dtype), None


def quantize(model: Any, method: str) -> Any:
    """The model with every linear layer but its head packed; embeddings and norms stay as they are.

    CheckpointError for a layer whose size does not divide into blocks, ConfigError where there is no linear layer.
    """
    for name, layer in _linear_layers(model, method).items():
        model.set_submodule(name, QuantizedLinear(layer, method))
    return model


def _linear_layers(model: Any, method: str) -> dict[str, nn.Linear]:
    """The layers to pack by name, each of a size that can be packed."""
    head = model.get_output_embeddings()
    layers = {name: part for name, part in model.named_modules() if type(part) is nn.Linear and part is not head}
    if not layers:
        raise ConfigError(f"model.quantization={method}: this model has no linear layer; choose none")
    for name, layer in layers.items():
        if layer.weight.numel() % METHODS[method].block:
            raise CheckpointError(
                f"model.quantization={method}: {safe_text(name)} has {layer.out_features} x {layer.in_features} "
                f"weights, which do not divide into blocks of {METHODS[method].block}; choose int8 or none"
            )
    return layers


def bytes_saved(model: Any, method: str, dtype: torch.dtype) -> int:
    """By how many bytes packing makes a model smaller; it may be on the meta device."""
    sizes = [tuple(layer.weight.shape) for layer in _linear_layers(model, method).values()]
    return sum(outputs * inputs * dtype.itemsize - METHODS[method].bytes_of(outputs, inputs)
               for outputs, inputs in sizes)  # fmt: skip


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The packed layers by name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, QuantizedLinear)}
