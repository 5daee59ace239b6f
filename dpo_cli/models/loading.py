"""How policy and reference are loaded, and the decisions taken for the user on the way, each with its reason.

One idea to keep in mind: policy and reference take the same weights, the same dtype and the same code path, so
that before the first update every log-ratio is exactly zero.
"""

import hashlib
import json
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_cli.console.text import first_line, plural, safe_text
from dpo_cli.data.batches import longest_side
from dpo_cli.data.tokens import TokenizedPair
from dpo_cli.errors import CheckpointError, ConfigError
from dpo_cli.models.builtin import resolve_builtin
from dpo_cli.models.lora_function import fuse_lora
from dpo_cli.paths import user_path
from dpo_cli.storage.measurements import note, recall

if TYPE_CHECKING:  # the schema needs Hydra's OmegaConf, which a machine that only measures has not
    from dpo_cli.config.schema import LoraConfig, ModelConfig

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_KINDS = ("LORA", "ADALORA", "IA3", "LOHA", "LOKR", "OFT", "BOFT", "VERA", "HRA")
START_FILE = "dpo_start.json"  # beside an adapter: the SFT adapter that was folded into its base first


@dataclass(frozen=True)
class Decision:
    """A choice made for the user, and why."""

    value: Any
    reason: str


def choose_device(asked: str) -> Decision:
    """The device a run is computed on; ConfigError where the one asked for is not there."""
    if asked == "auto":
        if torch.cuda.is_available():
            return Decision(torch.device("cuda"), torch.cuda.get_device_name())
        if torch.backends.mps.is_available():
            return Decision(torch.device("mps"), "no CUDA device; Apple's GPU found")
        return Decision(torch.device("cpu"), f"no GPU found; {plural(torch.get_num_threads(), 'thread')}")
    try:
        device = torch.device(asked)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        has = "cuda, cpu" if torch.cuda.is_available() else "cpu"
        raise ConfigError(f"device={asked}: not on this machine; it has {has}") from None
    return Decision(device, "as asked")


def choose_dtype(asked: str, device: torch.device, lora: bool, keep: bool = True) -> Decision:
    """The dtype of the base weights, of policy and reference alike. Adapters are float32 in any case.

    What is measured for it on a CPU is measured once a machine, and noted in the cache folder unless `keep` is false.
    """
    if asked != "auto":
        if asked == "float16" and device.type == "cpu":
            raise ConfigError("model.dtype=float16: a CPU computes it slowly and loosely; choose bfloat16 or float32")
        if asked != "float32" and not lora:
            raise ConfigError(
                f"model.dtype={asked}: with lora=off every weight trains, and updates this small vanish in {asked}; "
                "choose float32"
            )
        return Decision(getattr(torch, asked), "as asked")
    if not lora:
        return Decision(torch.float32, "every weight trains, and small updates vanish in bfloat16")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Decision(torch.bfloat16, "this GPU has it")
        return Decision(torch.float32, "this GPU has no bfloat16")
    if device.type == "cpu":
        ratio, when = _bfloat16_speed(keep)
        if ratio > 1.25:
            return Decision(torch.bfloat16, f"{ratio:.1f} times as fast as float32 on this CPU, {when}")
        return Decision(torch.float32, f"bfloat16 is {ratio:.1f} times as fast on this CPU, {when}")
    return Decision(torch.float32, f"the safe choice on {device.type}")


def _bfloat16_speed(keep: bool) -> tuple[float, str]:
    """How many times as fast as float32 this CPU multiplies matrices of a small layer, and when it was measured.

    In turns, and the best of many: other work on the machine slows both, and the decision must not hang on it.
    """
    how = [torch.__version__, _cpu_name(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
    known = recall("cpus", how)
    if known is not None and isinstance(known.get("ratio"), float):
        return known["ratio"], "measured earlier"
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    for _ in range(12):
        for dtype in best:
            left, right = torch.ones(512, 768, dtype=dtype), torch.ones(768, 1536, dtype=dtype)
            best[dtype] = min(best[dtype], best_seconds(left, right, times=4))
    ratio = best[torch.float32] / best[torch.bfloat16]
    if keep:
        note("cpus", how, {"ratio": ratio})
    return ratio, "measured"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def best_seconds(left: Tensor, right: Tensor, times: int) -> float:
    """The shortest of several products of two matrices: the best is what noise cannot lower."""
    best = float("inf")
    for _ in range(times):
        wait_for(left.device)
        start = time.perf_counter()
        left @ right
        wait_for(left.device)
        best = min(best, time.perf_counter() - start)
    return best


def wait_for(device: torch.device) -> None:
    """Until a GPU has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class ModelSource:
    """Where the SFT model and its tokenizer are loaded from."""

    config: "ModelConfig"
    path: str  # a folder or a hub id
    origin: str  # in words

    @property
    def name(self) -> str:
        """The name a user knows it by."""
        return self.config.name_or_path


def find_model(config: "ModelConfig", say: Callable[[str], None] = lambda _: None) -> ModelSource:
    """Resolve a model's name; a built-in one is prepared in the cache if it is not there yet."""
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
    """The SFT model in eval mode, without dropout, its SFT adapter folded in if it has one."""
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.path,
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
    disable_dropout(model)
    return model.to(device).eval()


def _not_loaded(part: str, source: ModelSource, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{safe_text(source.name)}: its {part} cannot be loaded ({safe_text(first_line(error), limit=200)}); "
        "a local folder or a model on the hub is needed"
    )


def model_digest(model: Any) -> str:
    """Two hashes, `weights-architecture`: of every weight of a model in memory, and of its config.

    Of what is computed with, an SFT adapter folded in, so that no path or name can stand for other weights.
    """
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter's lock
        weights = hashlib.sha256("".join(sorted(pool.map(_tensor_digest, model.state_dict().items()))).encode())
    config = model.config.to_dict()
    for passing in ("_name_or_path", "transformers_version", "dtype", "use_cache"):
        config.pop(passing, None)
    architecture = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    return f"{weights.hexdigest()[:32]}-{architecture.hexdigest()[:16]}"


def same_weights(digest: str, other: str) -> bool:
    """Whether two digests are of the same weights, whatever a newer library has added to the config."""
    return digest.split("-")[0] == other.split("-")[0]


def _tensor_digest(item: tuple[str, Tensor]) -> str:
    name, tensor = item
    content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return f"{name} {tuple(tensor.shape)} {tensor.dtype} {hashlib.sha256(content.data).hexdigest()}\n"


def load_adapter(model: Any, adapter: str) -> Any:
    """A PEFT adapter on a model; CheckpointError where it is missing or does not fit in every tensor."""
    folder = _adapter_folder(adapter)
    _check_kind(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of missing tensors PEFT only warns; they are refused below
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


def _adapter_folder(adapter: str) -> Path:
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


def disable_dropout(model: Any) -> None:
    """No dropout anywhere: neither the modules' nor the rates that some families keep as plain numbers."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def attach_lora(
    model: Any, config: "LoraConfig", source: ModelSource | None = None, task: str | None = "CAUSAL_LM"
) -> Any:
    """The policy: the model with fresh LoRA adapters, which leave its output unchanged bit for bit (B = 0).

    The adapter's config names `source` as its base by the name a user knows, not by a path in a cache folder, and the
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
            # GPT-2's layers store their weights the other way round; PEFT notices, sets itself right, and says so.
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
    if source is not None:
        local = Path(source.name).expanduser()
        policy.peft_config["default"].base_model_name_or_path = str(local.resolve()) if local.is_dir() else source.name
    return policy


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
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    state = torch.get_rng_state()
    policy.eval()
    try:
        yield
    finally:
        policy.train(training)
        policy.zero_grad(set_to_none=True)
        torch.set_rng_state(state)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def parameter_counts(model: Any) -> tuple[int, int]:
    """Parameters that train, and all of them."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return trainable, sum(parameter.numel() for parameter in model.parameters())


def position_limit(model: Any) -> int | None:
    """How many positions a model has where they are learned, one embedding each; None where they are computed."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) and name.rpartition(".")[2] in ("wpe", "embed_positions"):
            return int(module.num_embeddings) - int(getattr(module, "offset", 0))  # OPT and its like leave two free
    return None


def check_positions(model: Any, pairs: Sequence[TokenizedPair], max_length: int) -> None:
    """ConfigError where a pair is longer than the positions that a model has learned."""
    limit = position_limit(model)
    longest = max((longest_side(pair) for pair in pairs), default=0)
    if limit is not None and longest > limit:
        raise ConfigError(
            f"data.max_length={max_length}: there are pairs of {longest:,} tokens, and this model has learned "
            f"{limit:,} positions; data.max_length={limit} fits"
        )
