"""Checkpoints: written beside and renamed, validated when read, in safetensors and JSON only.

One idea to keep in mind: a folder `step-*` is complete or it is not there. Files are written into `.tmp-*`, each
is flushed to disk, MANIFEST.json (size and sha256 of each) comes last, and only then is the folder renamed.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dpo_cli.console.text import safe_text
from dpo_cli.errors import CheckpointError, StorageError

MANIFEST = "MANIFEST.json"
MAX_MANIFEST_BYTES = 2**20


@dataclass(frozen=True)
class TrainingState:
    """What a run needs besides weights and optimizer to go on: all of it numbers."""

    step: int  # optimizer steps done; with the seed it is the position in the data
    seconds: float  # spent training so far
    sums: dict[str, float]  # running sums of metrics since the last logged step
    sums_pairs: int
    sums_tokens: int
    sums_seconds: float
    records: int  # lines of metrics.jsonl so far
    data_fingerprint: str
    dtype: str
    device: str  # its type; what follows was measured there
    way: str  # in which batches are made, and
    token_budget: int | None  # by which they are cut: measured when the run began, kept to its end
    alarms_sounded: list[str]  # by the radar: each is said once a run


def checkpoint_name(step: int) -> str:
    """`step-00000100`: names that sort like their steps."""
    return f"step-{step:08d}"


def save_policy(policy: Any, folder: Path) -> None:
    """Write the adapter in PEFT's layout, or the whole model where every weight trains."""
    if isinstance(policy, PeftModel):
        # Embeddings do not train here; asking PEFT to check them would ask the hub.
        policy.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty form; final/ gets a model card
    else:
        policy.save_pretrained(str(folder))


def save_checkpoint(
    folder: Path,
    policy: Any,
    optimizer: torch.optim.Optimizer,
    rng: dict[str, Tensor],
    window: dict[str, Tensor],
    state: TrainingState,
    keep: int,
) -> Path:
    """Write `folder/step-*` and remove the oldest beyond `keep`; StorageError leaves every earlier one intact."""
    target = folder / checkpoint_name(state.step)
    beside = folder / f".tmp-{target.name}-{os.getpid()}"
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        save_policy(policy, beside)
        save_file(optimizer_tensors(policy, optimizer), beside / "optimizer.safetensors")
        save_file(rng, beside / "rng.safetensors")
        save_file(window, beside / "window.safetensors")
        (beside / "state.json").write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
        _seal(beside)
        if target.exists():  # saved at this step already, before a stop
            shutil.rmtree(target)
        beside.rename(target)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise StorageError(f"{target}: the checkpoint cannot be written ({safe_text(error)})") from None
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def _seal(folder: Path) -> None:
    files = {}
    for file in sorted(folder.iterdir()):
        _sync(file)
        files[file.name] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
    _sync(manifest)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def checkpoints(folder: Path) -> list[Path]:
    """Folders named like checkpoints, oldest first; whether they are valid only `validate` can say."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.name.startswith("step-") and path.is_dir())


def set_aside_newer(folder: Path, step: int) -> list[Path]:
    """Rename checkpoints after `step` out of the way: a run that goes on from `step` makes them anew."""
    newer = [path for path in checkpoints(folder) if path.name > checkpoint_name(step)]
    for path in newer:
        aside = path.with_name(f"abandoned-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    return newer


def validate(checkpoint: Path) -> None:
    """CheckpointError, with file and reason, unless every file is what the manifest says."""
    manifest = checkpoint / MANIFEST
    try:
        if manifest.stat().st_size > MAX_MANIFEST_BYTES:
            raise CheckpointError(f"{manifest}: too large to be a manifest")
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        expected = [(str(name), int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()]
    except FileNotFoundError:
        raise CheckpointError(f"{checkpoint}: not a complete checkpoint, it has no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{manifest}: cannot be read") from None
    for name, size, digest in expected:
        if name != Path(name).name or name in ("", ".", ".."):
            raise CheckpointError(f"{manifest}: names a file outside the checkpoint ({safe_text(name, limit=80)})")
        file = checkpoint / name
        if file.is_symlink() or not file.is_file():
            raise CheckpointError(f"{file}: missing")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file}: has {file.stat().st_size} bytes, the manifest says {size}")
        if _sha256(file) != digest:
            raise CheckpointError(f"{file}: its content is not what was saved (sha256 differs)")


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint, and why newer ones were passed over."""
    passed = []
    for checkpoint in reversed(checkpoints(folder)):
        try:
            validate(checkpoint)
        except CheckpointError as error:
            passed.append(str(error))
        else:
            return checkpoint, passed
    return None, passed


def read_state(checkpoint: Path) -> TrainingState:
    """The training state of a validated checkpoint."""
    file = checkpoint / "state.json"
    try:
        return TrainingState(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise CheckpointError(f"{file}: is not the state of a run") from None


def _trainable(policy: Any) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in policy.named_parameters() if parameter.requires_grad]


def optimizer_tensors(policy: Any, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter name: `<parameter>|<key>` -> tensor."""
    tensors = {}
    for name, parameter in _trainable(policy):
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}|{key}"] = value.detach().cpu().contiguous()
    return tensors


def restore(
    checkpoint: Path, policy: Any, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Load weights and optimizer state of a validated checkpoint into a run; returns RNG states and radar window.

    CheckpointError where a tensor is missing, left over or of another shape: nothing is guessed.
    """
    try:
        _restore_weights(checkpoint, policy)
        _restore_optimizer(load_file(checkpoint / "optimizer.safetensors"), policy, optimizer)
        return load_file(checkpoint / "rng.safetensors"), load_file(checkpoint / "window.safetensors")
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{checkpoint}: does not fit this run ({safe_text(first, limit=200)})") from None


def _restore_weights(checkpoint: Path, policy: Any) -> None:
    if isinstance(policy, PeftModel):
        file = checkpoint / "adapter_model.safetensors"
        stored = load_file(file)
        expected = get_peft_model_state_dict(policy, save_embedding_layers=False)
        _same_names(file, set(stored), set(expected))
        set_peft_model_state_dict(policy, stored)
    else:
        file = checkpoint / "model.safetensors"
        problem = policy.load_state_dict(load_file(file), strict=False)
        tied = set(getattr(policy, "_tied_weights_keys", None) or ())
        _same_names(file, set(problem.unexpected_keys), set(problem.missing_keys) - tied)


def _restore_optimizer(stored: dict[str, Tensor], policy: Any, optimizer: torch.optim.Optimizer) -> None:
    parameters = dict(_trainable(policy))
    for full_name, value in stored.items():
        name, _, key = full_name.rpartition("|")
        if name not in parameters:
            raise CheckpointError(f"optimizer.safetensors: no parameter {safe_text(name)} in this run")
        parameter = parameters[name]
        if value.ndim and value.shape != parameter.shape:
            raise CheckpointError(f"optimizer.safetensors: {safe_text(full_name)} has another shape than its weight")
        # AdamW keeps its step count on the CPU, whatever the device; a fused one keeps it beside the weights.
        beside = value.ndim or optimizer.param_groups[0].get("fused")
        optimizer.state[parameter][key] = value.to(parameter.device) if beside else value


def _same_names(file: Path, stored: set[str], expected: set[str]) -> None:
    for problem, names in (("lacks", expected - stored), ("has, beyond this run,", stored - expected)):
        if names:
            raise CheckpointError(f"{file}: {problem} {len(names)} tensors, {safe_text(min(names))} first")


def rng_states() -> dict[str, Tensor]:
    """The state of every random generator that training draws from."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{number}": state for number, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_rng_states(states: dict[str, Tensor]) -> None:
    """Put the generators back to where `rng_states` found them."""
    torch.set_rng_state(states["cpu"])
    for name, state in _cuda_states(states):
        if int(name.split(":")[1]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, name)


def _cuda_states(states: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((name, state) for name, state in states.items() if name.startswith("cuda:"))
