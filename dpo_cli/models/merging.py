"""Adapters folded into a model's weights, or joined into one LoRA adapter over the same base.

W' = W + s1 B1 A1 + s2 B2 A2, in float32. As one LoRA of rank r1 + r2: A = [A1; A2], B = [s1 B1, s2 B2].

I inputs, O outputs, r the rank; s = alpha/r, times the scale that the adapter is taken at.

One idea to keep in mind: what an adapter adds to a weight is often smaller than the step between two bfloat16 numbers.
The base's weights are such numbers, so rounding to the nearest one takes most of them back to where they were. Rounding
up or down at random, more often to the nearer one, keeps the sum over many weights right.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dpo_cli.console.text import first_line, safe_text
from dpo_cli.errors import CheckpointError
from dpo_cli.models.adapters import ADAPTER_FILE, adapter_folder, adapter_scale, load_adapter
from dpo_cli.models.dtype import dtype_name

# Options of LoRA with which an adapter is more than B A on a layer.
BEYOND_LORA = (
    "use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters", "use_qalora",
    "alora_invocation_tokens", "layer_replication", "use_bdlora", "arrow_config", "velora_config", "monteclora_config",
    "kasa_config",
)  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """An adapter in a folder or on the hub, and the factor on what it changes."""

    name: str
    scale: float = 1.0


def beyond_lora(config: Any) -> str | None:
    """What an adapter is besides plain LoRA, in words; None where it is nothing else."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        return f"of the kind {kind}"
    found = [name for name in BEYOND_LORA if getattr(config, name, None)]
    found += ["bias"] if config.bias != "none" else []
    return f"LoRA with {found[0]}" if found else None


def put_on(model: Any, adapter: Adapter) -> Any:
    """The adapter on a model, at scale 1; CheckpointError where it does not fit, or cannot be taken at its scale."""
    policy = load_adapter(model, adapter.name)
    other = beyond_lora(policy.peft_config["default"])
    if adapter.scale != 1 and other is not None:
        raise CheckpointError(f"scale={adapter.scale:g}: {safe_text(adapter.name)} is {other}; only plain LoRA scales")
    return policy


def at_scale(policy: Any, scale: float) -> Any:
    """A context in which the adapter of a policy has that scale."""
    return nullcontext() if scale == 1 else adapter_scale(policy, scale)


def merge(model: Any, adapters: Sequence[Adapter]) -> Any:
    """The model with the adapters folded into its weights, one after the other; a weight that is tied stays tied.

    CheckpointError where a weight would not be finite, or where one that an adapter changes is tied to another that it
    does not change: an output head and its embeddings, say.
    """
    for adapter in adapters:
        policy = put_on(model, adapter)
        if (name := _tied_layer(policy)) is not None:
            raise CheckpointError(
                f"{safe_text(adapter.name)}: changes {safe_text(name)}, whose weight is tied to another layer's, so "
                "that it cannot be merged; export what=adapter"
            )
        try:
            with at_scale(policy, adapter.scale):
                model = policy.merge_and_unload(safe_merge=True)
        except ValueError as error:  # of safe_merge
            reason = safe_text(first_line(error), limit=200)
            raise CheckpointError(f"{safe_text(adapter.name)}: cannot be merged ({reason})") from None
    return model


def _tied_layer(policy: Any) -> str | None:
    """The first layer with an adapter whose weight another module also has."""
    holders: dict[int, int] = {}
    for module in policy.modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    for name, layer in policy.get_base_model().named_modules():
        weight = getattr(layer.get_base_layer(), "weight", None) if isinstance(layer, BaseTunerLayer) else None
        if weight is not None and holders.get(id(weight), 0) > 1:
            return str(name)
    return None


def round_weights(model: Any, dtype: torch.dtype, at_random: bool) -> None:
    """Give the parameters of a float32 model that dtype, each rounded once; buffers keep float32, as positions need it.

    `at_random` rounds up with a probability in proportion to the distance, from a fixed seed, so that the mean error is
    zero; what is a number of that dtype already stays. Else each goes to the nearest. CheckpointError where a weight is
    beyond the range of the dtype.
    """
    random = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        weight = parameter.detach().cpu()
        rounded = weight.to(dtype)
        if not torch.isfinite(rounded).all():
            shown = f"dtype={dtype_name(dtype)}: {safe_text(name)}"
            raise CheckpointError(f"{shown} has weights beyond its range; choose bfloat16")
        if at_random and dtype != torch.float32:
            rounded = _one_step_off(weight, rounded, random)
        parameter.data = rounded.to(parameter.device)


def _one_step_off(weight: Tensor, nearest: Tensor, random: torch.Generator) -> Tensor:
    """The nearest number, or the one beyond `weight`, with the probability that makes the mean right."""
    error = weight - nearest.float()
    # As whole numbers, neighbours differ by one: more is farther from zero. Zero itself has no sign to go by.
    away = (error.sign() == nearest.float().sign()).to(torch.int16)
    other = (nearest.view(torch.int16) + 2 * away - 1).view(nearest.dtype)
    gap = (other.float() - nearest.float()).abs()
    moves = (torch.rand(weight.shape, generator=random) * gap < error.abs()) & (nearest != 0) & torch.isfinite(gap)
    return torch.where(moves, other, nearest)


@dataclass(frozen=True)
class LoraMatrices:
    """What LoRA adds to one layer: scaling times B A."""

    a: Tensor  # (r, I) float32
    b: Tensor  # (O, r) float32, the scaling within
    embedding: bool  # PEFT names the matrices of an embedding otherwise


def join(model: Any, adapters: Sequence[Adapter]) -> tuple[LoraConfig, dict[str, Tensor]]:
    """One LoRA adapter for `model` that changes it as the adapters do together, and its tensors under PEFT's names.

    Its rank is the sum of theirs, the same everywhere: a layer that only one of them changes gets zeros. Its alpha is
    its rank, so that nothing is scaled when it is used. CheckpointError for what is not plain LoRA, by name.
    """
    parts: dict[str, list[LoraMatrices]] = {}
    fan_in_fan_out = False
    for adapter in adapters:
        policy = put_on(model, adapter)
        config = policy.peft_config["default"]
        if (other := beyond_lora(config)) is not None:
            raise CheckpointError(
                f"{safe_text(adapter.name)}: is {other}; only plain LoRA can be joined or scaled: export what=merged"
            )
        fan_in_fan_out |= bool(config.fan_in_fan_out)
        with at_scale(policy, adapter.scale):
            for name, layer in policy.get_base_model().named_modules():
                if isinstance(layer, LoraLayer):
                    parts.setdefault(name, []).append(_matrices(adapter, name, layer))
        model = policy.unload()
    joined = {
        name: (torch.cat([one.a for one in some]), torch.cat([one.b for one in some], dim=1))
        for name, some in parts.items()
    }
    rank = max(len(a) for a, _ in joined.values())
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in joined.items():
        kinds = ("lora_embedding_A", "lora_embedding_B") if parts[name][0].embedding else ("lora_A.weight", "lora_B.weight")  # noqa: E501 # fmt: skip
        spare = rank - len(a)
        padded = nn.functional.pad(a, (0, 0, 0, spare)), nn.functional.pad(b, (0, spare))
        tensors |= {f"base_model.model.{name}.{kind}": part for kind, part in zip(kinds, padded, strict=True)}
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=rank,
        target_modules=_targets(model, set(parts)),
        fan_in_fan_out=fan_in_fan_out,
        inference_mode=True,
    )
    return lora, tensors


def _matrices(adapter: Adapter, name: str, layer: Any) -> LoraMatrices:
    scaling = layer.scaling["default"]
    if "default" in layer.lora_embedding_A:
        a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
        return LoraMatrices(a.detach().float().cpu(), scaling * b.detach().float().cpu(), True)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    if a.ndim != 2:
        raise CheckpointError(
            f"{safe_text(adapter.name)}: {safe_text(name)} is no linear layer or embedding, and only those can be "
            "joined or scaled; export what=merged"
        )
    return LoraMatrices(a.detach().float().cpu(), scaling * b.detach().float().cpu(), False)


def _targets(model: Any, names: set[str]) -> list[str]:
    """What PEFT is to look for: the last words of the names, or the names where those would match other layers too."""
    words = {name.rpartition(".")[2] for name in names}
    matched = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in words}
    return sorted(words if matched == names else names)


def write_adapter(folder: Path, model: Any, adapters: Sequence[Adapter], base: str, revision: str | None) -> int:
    """Write one adapter for `model`, named `base`, in PEFT's layout; returns its rank, 0 where it is not LoRA.

    A single one at scale 1 keeps its config and tensors as they are stored; joined ones are float32.
    """
    if len(adapters) == 1 and adapters[0].scale == 1:
        stored = adapter_folder(adapters[0].name)
        config: Any = PeftConfig.from_pretrained(str(stored))
        tensors = load_file(stored / ADAPTER_FILE)
    else:
        config, tensors = join(model, adapters)
    config.base_model_name_or_path, config.revision, config.inference_mode = base, revision, True
    config.save_pretrained(str(folder))
    save_file({name: part.contiguous() for name, part in tensors.items()}, folder / ADAPTER_FILE, {"format": "pt"})
    ranks = (getattr(config, "r", 0), *(getattr(config, "rank_pattern", None) or {}).values())
    return max(rank if isinstance(rank, int) else 0 for rank in ranks)
