"""Adapters on a model: fresh LoRA for training, stored ones loaded, folded in, or switched off.

What is loaded may be untrusted: only safetensors are read, and every tensor must fit.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import nn

from dpo_cli.console.text import first_line, safe_text
from dpo_cli.errors import CheckpointError, ConfigError
from dpo_cli.models.lora_function import fuse_lora
from dpo_cli.models.quantization import quantized_layers
from dpo_cli.paths import user_path

if TYPE_CHECKING:  # the schema needs packages that a machine that only measures may lack
    from dpo_cli.config.schema import LoraConfig

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_KINDS = ("LORA", "ADALORA", "IA3", "LOHA", "LOKR", "OFT", "BOFT", "VERA", "HRA")
START_FILE = "dpo_start.json"  # beside an adapter: the SFT adapter that was folded into its base first


def attach_lora(model: Any, config: "LoraConfig", base_name: str | None = None, task: str | None = "CAUSAL_LM") -> Any:
    """The policy: the model with fresh LoRA adapters, which leave its output unchanged bit for bit (B = 0).

    The adapter's config names its base as `base_name`, the name a user knows and not a path in a cache folder, and the
    `task` that PEFT loads it for: None fits a model with any head.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    lora = PeftLoraConfig(
        r=config.r,
        lora_alpha=config.alpha if config.alpha != int(config.alpha) else int(config.alpha),
        lora_dropout=config.dropout,
        target_modules=config.target_modules,
        task_type=task,
    )
    try:
        with warnings.catch_warnings():
            # GPT-2's layers store their weights the other way round; PEFT notices, corrects its setting and warns.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
            # Experts that are one parameter are no linear layers: all-linear leaves them out, and the header counts.
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys")
            policy = get_peft_model(model, lora)
    except ValueError as error:
        names = sorted({name.rsplit(".", 1)[-1] for name, part in model.named_modules() if isinstance(part, nn.Linear)})
        raise ConfigError(
            f"lora.target_modules={config.target_modules}: {safe_text(error, limit=120)} "
            f"(this model has {', '.join(names)})"
        ) from None
    fuse_lora(policy)
    if base_name is not None:
        local = Path(base_name).expanduser()
        policy.peft_config["default"].base_model_name_or_path = str(local.resolve()) if local.is_dir() else base_name
    return policy


@contextmanager
def adapter_off(policy: Any) -> Iterator[None]:
    """Within, the policy computes what its base does.

    Not PEFT's `disable_adapter`, which switches requires_grad off and on: where an engine has replaced the parameters
    meanwhile, the adapters would never train again.
    """
    layers = [module for module in policy.modules() if hasattr(module, "_disable_adapters")]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was


@contextmanager
def adapter_scale(policy: Any, scale: float) -> Iterator[None]:
    """Within, W + scale * (alpha/r) B A stands in the place of W + (alpha/r) B A: 0 is the base, 1 the policy.

    CheckpointError where the adapter is not LoRA, or is one whose change is not proportional to its scale.
    """
    layers = [module for module in policy.modules() if isinstance(module, LoraLayer)]
    if not layers or any(layer.lora_variant for layer in layers):
        raise CheckpointError("this adapter cannot be scaled: only plain LoRA can")
    before = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        layer.scaling.update({name: scale * usual for name, usual in layer.scaling.items()})
    try:
        yield
    finally:
        for layer, usual in zip(layers, before, strict=True):
            layer.scaling.update(usual)


def load_adapter(model: Any, adapter: str) -> Any:
    """A PEFT adapter on a model; CheckpointError where it is missing or does not fit in every tensor."""
    folder = adapter_folder(adapter)
    _check_kind(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT only warns of missing tensors; they are refused below
            loaded = PeftModel.from_pretrained(model, folder)
        lacking, beyond = _other_tensors(loaded, folder / ADAPTER_FILE)
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            raise
        raise CheckpointError(
            f"{safe_text(adapter)}: this adapter does not fit the model ({safe_text(first_line(error), limit=200)})"
        ) from None
    for problem, names in (("lacks", lacking), ("has, beyond this model,", beyond)):
        if names:
            raise CheckpointError(
                f"{safe_text(adapter)}: {problem} {len(names)} tensors of the adapter, {safe_text(names[0])} first"
            )
    fuse_lora(loaded)
    return loaded


def adapter_folder(adapter: str) -> Path:
    """The local folder of an adapter, fetched from the hub if it is not here; its weights must be safetensors.

    PEFT would fall back to a pickle, which can run code when it is read.
    """
    folder = user_path(adapter, CheckpointError, "model.adapter")
    if not folder.is_dir() and (adapter.startswith((".", "/", "~")) or adapter.count("/") > 1):
        raise CheckpointError(f"{safe_text(adapter)}: no such folder; a PEFT adapter's folder or hub id is needed")
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(adapter, allow_patterns=["adapter_config.json", ADAPTER_FILE]))
        except Exception as error:
            reason = safe_text(first_line(error), limit=200)
            raise CheckpointError(
                f"{safe_text(adapter)}: no such adapter, neither a folder nor on the hub ({reason})"
            ) from None
    if not (folder / ADAPTER_FILE).is_file():
        raise CheckpointError(f"{safe_text(adapter)}: has no {ADAPTER_FILE}; only safetensors are read")
    return folder


def _check_kind(folder: Path) -> None:
    """CheckpointError for adapters of a kind whose loading reads other files, pickles among them."""
    try:
        text = (folder / "adapter_config.json").read_text(encoding="utf-8")
        kind = json.loads(text)["peft_type"] if len(text) <= 2**20 else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        kind = None
    if kind not in ADAPTER_KINDS:
        found = "cannot be read" if kind is None else f"is of the kind {safe_text(kind, limit=40)}"
        raise CheckpointError(
            f"{safe_text(folder / 'adapter_config.json')}: {found}; kinds are {', '.join(ADAPTER_KINDS)}"
        )


def _other_tensors(model: Any, file: Path) -> tuple[list[str], list[str]]:
    """What an adapter's file lacks of what the model expects, and what it has beyond: PEFT itself only warns."""
    with safe_open(file, framework="pt") as tensors:
        stored = set(tensors.keys())
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    return sorted(expected - stored), sorted(name for name in stored - expected if ".lora_" in name)


def fold_adapter(model: Any, adapter: str) -> Any:
    """The model with an SFT adapter merged into its weights: the start of policy and reference alike."""
    return load_adapter(model, adapter).merge_and_unload()


def parameter_counts(model: Any) -> tuple[int, int]:
    """Parameters that train, and all of them; a packed one counts as the weights that it holds."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    packed = quantized_layers(model).values()
    inside = sum(layer.in_features * layer.out_features - layer.weight.numel() for layer in packed)
    return trainable, sum(parameter.numel() for parameter in model.parameters()) + inside
