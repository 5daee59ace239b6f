"""How policy and reference are loaded.

One idea to keep in mind: policy and reference take the same weights, the same dtype and the same code path, so
that before the first update every log-ratio is exactly zero.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dpo_cli.console.text import first_line, safe_text
from dpo_cli.errors import CheckpointError, ConfigError
from dpo_cli.models.adapters import fold_adapter
from dpo_cli.models.builtin import resolve_builtin
from dpo_cli.models.generators import rng_states, set_rng_states
from dpo_cli.models.quantization import bytes_saved, check_quantization, quantize
from dpo_cli.paths import user_path

if TYPE_CHECKING:  # the schema needs Hydra's OmegaConf, which a machine that only measures has not
    from dpo_cli.config.schema import ModelConfig


@dataclass(frozen=True)
class ModelSource:
    """Where the SFT model and its tokenizer are loaded from."""

    config: "ModelConfig"
    path: str  # a folder or a hub id
    origin: str  # for the header

    @property
    def name(self) -> str:
        """The name a user knows it by."""
        return self.config.name_or_path


def find_model(config: "ModelConfig", say: Callable[[str], None] = lambda _: None) -> ModelSource:
    """Resolve a model's name; a built-in one is prepared in the cache if it is not there yet."""
    check_quantization(config)
    # A revision asks for the hub's model: the built-in copies have none.
    path, origin = (
        resolve_builtin(config.name_or_path, say) if config.revision is None else (config.name_or_path, "hub")
    )
    local = config.name_or_path.startswith((".", "/", "~")) or config.name_or_path.count("/") > 1
    folder = user_path(path, CheckpointError, "model.name_or_path")
    if local and not folder.is_dir():
        raise CheckpointError(f"model.name_or_path={safe_text(path)}: no such folder")
    if folder.is_dir() and not (folder / "config.json").is_file():
        is_adapter = (folder / "adapter_config.json").is_file()
        adapter = "an adapter; name the model it sits on, and this one with model.adapter"
        what = adapter if is_adapter else "no model: it has no config.json"
        raise CheckpointError(f"model.name_or_path={safe_text(path)}: holds {what}")
    return ModelSource(config, str(folder) if local else path, origin)


def load_tokenizer(source: ModelSource) -> Any:
    """The model's tokenizer; CheckpointError where there is none."""
    try:
        return AutoTokenizer.from_pretrained(
            source.path, revision=source.config.revision, trust_remote_code=source.config.trust_remote_code
        )
    except Exception as error:
        raise _not_loaded("tokenizer", source, error) from None


def load_model(source: ModelSource, dtype: torch.dtype, device: torch.device) -> Any:
    """The SFT model in eval mode, without dropout, its SFT adapter folded in if it has one, and then quantised.

    On the device `meta` it has its shape and no values: nothing is read but its config. CheckpointError where it cannot
    be loaded, is stored in bitsandbytes' own format, or cannot be quantised.
    """
    if device.type == "meta":
        return _ready(_shape_of(source, dtype), source)
    try:
        stored = getattr(model_config(source), "quantization_config", None) or {}
        if str(stored.get("quant_method", "")).startswith("bitsandbytes"):
            raise ValueError("is stored quantised; name the unquantised model, with model.quantization=nf4 or int8")
        model = AutoModelForCausalLM.from_pretrained(
            source.path,
            config=model_config(source),
            revision=source.config.revision,
            trust_remote_code=source.config.trust_remote_code,
            dtype=dtype,
            use_safetensors=True,  # a pickle can run code when it is read
        )
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            raise
        raise _not_loaded("model", source, error) from None
    if source.config.adapter is not None:
        model = fold_adapter(model, source.config.adapter)
    return _ready(model, source).to(device)


def _ready(model: Any, source: ModelSource) -> Any:
    if source.config.quantization != "none":
        model = quantize(model, source.config.quantization)
    disable_dropout(model)
    return model.eval()


def _shape_of(source: ModelSource, dtype: torch.dtype) -> Any:
    """The model on the meta device, not quantised."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                model_config(source), dtype=dtype, trust_remote_code=source.config.trust_remote_code
            )
    except Exception as error:
        raise _not_loaded("model", source, error) from None


def model_config(source: ModelSource) -> Any:
    """The model's config, with PyTorch's attention; raises what transformers raises where it cannot be read."""
    config = AutoConfig.from_pretrained(
        source.path, revision=source.config.revision, trust_remote_code=source.config.trust_remote_code
    )
    use_stock_attention(config)
    return config


def saved_by_packing(source: ModelSource, dtype: torch.dtype) -> int:
    """By how many bytes `model.quantization` makes the model smaller; nothing of its weights is read."""
    if source.config.quantization == "none":
        return 0
    model = _shape_of(source, dtype)
    return bytes_saved(model, source.config.quantization, dtype)


def use_stock_attention(config: Any) -> None:
    """Forget every other attention that a config.json names: transformers would fetch its kernel from the hub."""
    if config._attn_implementation not in (None, "eager", "sdpa"):
        config._attn_implementation = None  # then transformers takes sdpa, or eager where the family has no other
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            use_stock_attention(part)


def _not_loaded(part: str, source: ModelSource, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{safe_text(source.name)}: its {part} cannot be loaded ({safe_text(first_line(error), limit=200)}); "
        "a local folder or a model on the hub is needed"
    )


def model_fingerprint(model: Any) -> str:
    """Two hashes, `weights-architecture`: of every weight of a model in memory, and of its config.

    Of what is computed with, an SFT adapter folded in, so that no path or name can stand for other weights.
    """
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter's lock
        weights = hashlib.sha256("".join(sorted(pool.map(_tensor_hash, model.state_dict().items()))).encode())
    config = model.config.to_dict()
    for passing in ("_name_or_path", "transformers_version", "dtype", "use_cache"):
        config.pop(passing, None)
    architecture = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    return f"{weights.hexdigest()[:32]}-{architecture.hexdigest()[:16]}"


def same_weights(fingerprint: str, other: str) -> bool:
    """Whether two fingerprints are of the same weights, whatever a newer library has added to the config."""
    return fingerprint.split("-")[0] == other.split("-")[0]


def _tensor_hash(item: tuple[str, Tensor]) -> str:
    name, tensor = item
    content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return f"{name} {tuple(tensor.shape)} {tensor.dtype} {hashlib.sha256(content.data).hexdigest()}\n"


def disable_dropout(model: Any) -> None:
    """No dropout anywhere: neither the modules' nor the rates that some families keep as plain numbers."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def compile_layers(model: Any, backend: str = "inductor") -> int:
    """Compile each decoder layer of a causal model by itself, for rows of any length; returns how many there are.

    Layers are alike, so that one compilation serves them all, and attention stays outside the compiled code.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)
    return len(layers)


@contextmanager
def undisturbed(policy: Any) -> Iterator[None]:
    """Eval mode within; mode, gradients and random generators as before after it."""
    training = policy.training
    states = rng_states()
    policy.eval()
    try:
        yield
    finally:
        policy.train(training)
        policy.zero_grad(set_to_none=True)
        set_rng_states(states)


def position_limit(model: Any) -> int | None:
    """How many positions a model has where they are learned, one embedding each; None where they are computed."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) and name.rpartition(".")[2] in ("wpe", "embed_positions"):
            return int(module.num_embeddings) - int(getattr(module, "offset", 0))  # OPT and its like leave two free
    return None


def check_positions(model: Any, longest: int, max_length: int) -> None:
    """ConfigError where the longest pair has more tokens than a model has learned positions."""
    limit = position_limit(model)
    if limit is not None and longest > limit:
        raise ConfigError(
            f"data.max_length={max_length}: there are pairs of {longest:,} tokens, and this model has learned "
            f"{limit:,} positions; data.max_length={limit} fits"
        )
