"""Checkpoints: written completely before they get their name, validated when read, in safetensors and JSON only.

One idea to keep in mind: a folder `step-*` is complete or it is not there. Files are written into `.tmp-*`, each
is flushed to disk, MANIFEST.json (size and sha256 of each) comes last, and only then is the folder renamed. What is
read back may be untrusted: every size, name, type and shape is checked, and nothing in it is executed.
"""

import json
import math
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from dpo_cli.console.text import first_line, safe_text
from dpo_cli.data.batches import Layout
from dpo_cli.engine.engine import Engine, local, part_like
from dpo_cli.errors import CheckpointError, StorageError
from dpo_cli.models.adapters import ADAPTER_FILE
from dpo_cli.objectives.objective import Objective
from dpo_cli.runs.tensor_files import PART_BYTES, Gathered, is_part_of, names_in, tensors_in
from dpo_cli.runs.versions import migrated_state
from dpo_cli.storage.durable import remove_folder, sync, write_folder
from dpo_cli.storage.hashing import sha256_of

MANIFEST = "MANIFEST.json"
OPTIMIZER, RNG, WINDOW, STATE = "optimizer.safetensors", "rng.safetensors", "window.safetensors", "state.json"
MODEL = "model.safetensors"
MAX_JSON_BYTES = 2**20
DTYPES = ("float32", "bfloat16", "float16")
StateShapes = dict[tuple[int, ...], dict[str, tuple[int, ...]]]  # by the shape of a weight, and by key
VERSION = 2  # of state.json; `versions.py` reads earlier ones


@dataclass(frozen=True)
class ResolvedSettings:
    """What was measured when a run began and holds to its end, wherever it continues."""

    device: str  # its type; what follows was measured there
    dtype: str
    layout: str  # of micro-batches
    token_budget: int | None  # of a micro-batch; None where its size is counted in pairs
    max_pairs: int | None = None  # of a micro-batch, where its size is counted in pairs

    def __post_init__(self) -> None:
        if (
            self.dtype not in DTYPES
            or self.layout not in [*Layout]
            or any(size is not None and size < 1 for size in (self.token_budget, self.max_pairs))
        ):
            raise ValueError("no such dtype, layout or budget")


@dataclass(frozen=True)
class TrainingState:
    """What a run needs besides weights and optimizer to resume: numbers, and a few words from short lists.

    The learning rate and the position in the data are functions of `step`, so that neither is kept.
    """

    step: int  # optimizer steps done; with the seed it is the position in the data
    seconds: float  # spent training so far
    sums: dict[str, float]  # running sums of metrics since the last logged step
    sums_pairs: int
    sums_tokens: int
    sums_seconds: float
    records: int  # lines of metrics.jsonl so far
    skipped_steps: int  # whose update was left out because it was not finite
    data_fingerprint: str
    model_fingerprint: str  # of the SFT model
    settings: ResolvedSettings
    alarms_sounded: list[str]  # by the monitor: each is said once a run
    version: int = VERSION  # of this file


def checkpoint_name(step: int) -> str:
    """`step-00000100`: names that sort like their steps."""
    return f"step-{step:08d}"


def save_policy(policy: Any, folder: Path, objective: Objective, tensors: dict[str, Tensor]) -> None:
    """Write the adapter in PEFT's layout, with what the objective trains beside it; or the whole model.

    `tensors` are the trained weights by name, whole.
    """
    if isinstance(policy, PeftModel):
        # Embeddings do not train here; asking PEFT to check them would ask the hub.
        policy.save_pretrained(str(folder), save_embedding_layers=False, state_dict=tensors)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty form; final/ gets a model card
        objective.save(policy, folder, tensors)
    else:
        # What is tied to a trained weight is sharded with it, and saved with it.
        whole = {name: tensor for name, tensor in policy.state_dict().items() if local(tensor) is tensor}
        policy.save_pretrained(str(folder), max_shard_size=PART_BYTES, state_dict={**whole, **tensors})


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: all that a run needs to resume to the same bits."""

    policy: Any
    objective: Objective
    weights: dict[str, Tensor]  # the trained weights by name, whole
    optimizer: Gathered  # its state, as `optimizer_tensors` names it
    rng: dict[str, Tensor]
    window: dict[str, Tensor]
    state: TrainingState

    def write(self, beside: Path) -> None:
        """Fill a folder, the manifest last."""
        save_policy(self.policy, beside, self.objective, self.weights)
        self.optimizer.write(beside / OPTIMIZER)
        save_file(self.rng, beside / RNG)
        save_file(self.window, beside / WINDOW)
        (beside / STATE).write_text(json.dumps(asdict(self.state), indent=1), encoding="utf-8")
        _seal(beside)


def save_checkpoint(
    folder: Path, checkpoint: Checkpoint, keep: int, held_out_losses: Mapping[int, float], chosen: int | None = None
) -> Path:
    """Write `folder/step-*`, then prune; StorageError leaves every earlier one intact.

    A checkpoint of the same step that is whole already stays: the same run at the same step holds the same.
    """
    target = folder / checkpoint_name(checkpoint.state.step)
    try:
        if not _is_whole(target):
            if target.exists():
                remove_folder(target)
            write_folder(target, checkpoint.write)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{target}: the checkpoint cannot be written ({safe_text(error)})") from None
    finally:
        checkpoint.optimizer.discard()
    prune(folder, keep, held_out_losses, chosen)
    return target


def _is_whole(checkpoint: Path) -> bool:
    try:
        validate(checkpoint)
    except CheckpointError:
        return False
    return True


def prune(folder: Path, keep: int, held_out_losses: Mapping[int, float], chosen: int | None = None) -> None:
    """Remove all checkpoints but the newest `keep`, the one with the lowest held-out loss, and the `chosen` step's."""
    kept, best = checkpoints(folder)[-keep:], best_checkpoint(folder, held_out_losses)
    kept += [] if best is None else [best[0]]
    kept += [] if chosen is None else [folder / checkpoint_name(chosen)]
    for checkpoint in checkpoints(folder):
        if checkpoint not in kept:
            remove_folder(checkpoint)


def best_checkpoint(folder: Path, held_out_losses: Mapping[int, float]) -> tuple[Path, float] | None:
    """The checkpoint with the lowest held-out loss of those by step, and that loss; None where none was evaluated."""
    steps = {int(path.name.removeprefix("step-")): path for path in checkpoints(folder)}
    known = [(held_out_losses[step], path) for step, path in steps.items() if step in held_out_losses]
    return (min(known)[1], min(known)[0]) if known else None


def _seal(folder: Path) -> None:
    """Write the manifest, after all files that it names are on disk."""
    files = {}
    for file in sorted(folder.iterdir()):
        sync(file)
        files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")


def checkpoints(folder: Path) -> list[Path]:
    """Folders named like checkpoints, oldest first; whether they are valid only `validate` can say."""
    if not folder.is_dir():
        return []
    named = (path for path in folder.iterdir() if re.fullmatch(r"step-\d{8,12}", path.name))
    return sorted(path for path in named if path.is_dir() and not path.is_symlink())


def set_aside_newer(folder: Path, step: int) -> list[Path]:
    """Rename checkpoints after `step` out of the way: a run that resumes from `step` makes them again."""
    newer = [path for path in checkpoints(folder) if path.name > checkpoint_name(step)]
    for path in newer:
        aside = path.with_name(f"abandoned-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    return newer


def read_json(file: Path) -> Any:
    """The content of a small JSON file that may be untrusted; CheckpointError where it is too large or no JSON."""
    try:
        if file.is_symlink() or (file.exists() and not file.is_file()):
            raise CheckpointError(f"{safe_text(file)}: is not a file of its own")
        if file.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{safe_text(file)}: too large ({file.stat().st_size:,} bytes)")
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{safe_text(file)}: missing") from None
    except (OSError, ValueError, RecursionError):
        raise CheckpointError(f"{safe_text(file)}: cannot be read as JSON") from None


def validate(checkpoint: Path) -> None:
    """CheckpointError, with file and reason, unless every file is what the manifest says and none is left out."""
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        raise CheckpointError(f"{safe_text(checkpoint)}: not a complete checkpoint, it has no {MANIFEST}")
    try:
        files = read_json(manifest)["files"]
        expected = [(str(name), int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise CheckpointError(f"{safe_text(manifest)}: is not the manifest of a checkpoint") from None
    for needed in (OPTIMIZER, RNG, WINDOW, STATE):
        if not any(is_part_of(name, needed) for name in files):
            raise CheckpointError(f"{safe_text(manifest)}: does not name {needed}")
    if ADAPTER_FILE not in files and not any(is_part_of(name, MODEL) for name in files):
        raise CheckpointError(f"{safe_text(manifest)}: names no weights")
    for name, size, sha256 in expected:
        if name != Path(name).name or name in ("", ".", ".."):
            raise CheckpointError(
                f"{safe_text(manifest)}: names a file outside the checkpoint ({safe_text(name, limit=80)})"
            )
        _check_file(checkpoint / name, size, sha256)


def _check_file(file: Path, size: int, sha256: str) -> None:
    try:
        if file.is_symlink() or not file.is_file():
            raise CheckpointError(f"{safe_text(file)}: missing")
        if file.stat().st_size != size:
            raise CheckpointError(f"{safe_text(file)}: has {file.stat().st_size} bytes, the manifest says {size}")
        if sha256_of(file) != sha256:
            raise CheckpointError(f"{safe_text(file)}: its content is not what was saved (sha256 differs)")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{safe_text(file)}: cannot be read ({safe_text(error, limit=100)})") from None


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
    """The training state of a validated checkpoint; CheckpointError where a value has another type than it must."""
    file = checkpoint / STATE
    try:
        found = migrated_state(read_json(file), VERSION)
        settings = ResolvedSettings(**_typed(ResolvedSettings, found["settings"]))
        state = TrainingState(**_typed(TrainingState, {**found, "settings": settings}))
        if min(state.step, state.records, state.skipped_steps, state.sums_pairs, state.sums_tokens) < 0:
            raise ValueError("a count below 0")
        if state.sums_seconds < 0 or (state.sums_pairs and not state.sums_seconds):
            raise ValueError("pairs that took no time")
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{safe_text(file)}: is not the state of a run ({safe_text(error, limit=100)})") from None
    return state


def _typed(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """The values, each of the type that the dataclass gives it; floats are finite."""
    hints = get_type_hints(kind)
    if values.keys() != {field.name for field in fields(kind)}:
        raise TypeError(f"it must hold {', '.join(hints)}")
    for name, value in values.items():
        hint = hints[name]
        if hint == dict[str, float]:
            fits = isinstance(value, dict) and all(_is_number(number) for number in value.values())
        elif hint == list[str]:
            fits = isinstance(value, list) and all(isinstance(word, str) for word in value)
        elif hint is float:
            fits = _is_number(value)
        else:
            fits = isinstance(value, hint) and not isinstance(value, bool)
        if not fits:
            raise TypeError(f"{name} is {value!r:.40}")
    return values


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def trainable(policy: Any) -> list[tuple[str, nn.Parameter]]:
    """The weights that train, by name; of a sharded policy this rank's part."""
    return [(name, parameter) for name, parameter in policy.named_parameters() if parameter.requires_grad]


def optimizer_tensors(policy: Any, optimizer: torch.optim.Optimizer, engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """The optimizer's state by parameter name, whole, on rank 0: `<parameter>|<key>`, tensor. Collective."""
    seen = set()  # a table that 8-bit states share is written for each: safetensors holds no shared memory
    for name, parameter in trainable(policy):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                whole = engine.full(value).detach().cpu().contiguous()
                yield f"{name}|{key}", whole.clone() if whole.data_ptr() in seen else whole
                seen.add(whole.data_ptr())
            elif isinstance(value, int | float):  # float64 says that it is a plain number
                yield f"{name}|{key}", torch.tensor(value, dtype=torch.float64)
            elif value is not None:
                raise TypeError(
                    f"{type(optimizer).__name__}: {key} is {type(value).__name__}, not a tensor or a number"
                )


def trained_weights(policy: Any, engine: Engine) -> dict[str, Tensor]:
    """The trained weights by name, whole, on rank 0. Collective."""
    return {name: engine.full(weight.detach()) for name, weight in trainable(policy)}


@dataclass(frozen=True)
class Restored:
    """What a checkpoint holds besides weights, optimizer and state."""

    rng: dict[str, Tensor]
    window: Tensor  # of the monitor


def restore(
    checkpoint: Path, policy: Any, objective: Objective, optimizer: torch.optim.Optimizer, shapes: StateShapes | None
) -> Restored:
    """Load weights and optimizer state of a validated checkpoint into a run.

    `shapes` are those that the optimizer's state must have, by parameter and key; None where they are not known.
    CheckpointError where a tensor is missing, left over or of another shape: nothing is guessed.
    """
    try:
        restore_weights(checkpoint, policy, objective)
        _restore_optimizer(tensors_in(checkpoint / OPTIMIZER), policy, optimizer, shapes)
        rng, window = (dict(tensors_in(checkpoint / name)) for name in (RNG, WINDOW))
        if "cpu" not in rng or rng["cpu"].shape != torch.get_rng_state().shape:
            raise CheckpointError(f"{checkpoint / RNG}: holds no state of this program's random generator")
        if (
            window.keys() != {"last_pairs"}
            or window["last_pairs"].ndim != 2
            or not window["last_pairs"].is_floating_point()
        ):
            raise CheckpointError(f"{checkpoint / WINDOW}: holds no window of pairs")
        return Restored(rng, window["last_pairs"])
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        reason = safe_text(first_line(error), limit=200)
        raise CheckpointError(f"{checkpoint}: does not fit this run ({reason})") from None


def restore_weights(checkpoint: Path, policy: Any, objective: Objective) -> None:
    """Give the policy the weights of a validated checkpoint of its own run."""
    if isinstance(policy, PeftModel):
        file = checkpoint / ADAPTER_FILE
        expected = get_peft_model_state_dict(policy, save_embedding_layers=False)
        _same_names(file, names_in(file), set(expected))
        _copy_into(expected, tensors_in(file))
        objective.load(policy, checkpoint)
    else:
        file = checkpoint / MODEL
        expected = policy.state_dict()
        tied = set(getattr(policy, "_tied_weights_keys", None) or ())
        _same_names(file, names_in(file) - tied, set(expected) - tied)
        _copy_into(expected, tensors_in(file))


def _copy_into(weights: Mapping[str, Tensor], stored: Iterable[tuple[str, Tensor]]) -> None:
    """Give weights, which may be sharded, the values of whole tensors; RuntimeError where a shape differs."""
    for name, value in stored:
        if weights[name].shape != value.shape:
            raise RuntimeError(f"{name} has the shape {list(value.shape)}, not {list(weights[name].shape)}")
        weights[name].copy_(part_like(weights[name], value))


def _restore_optimizer(
    stored: Iterable[tuple[str, Tensor]],
    policy: Any,
    optimizer: torch.optim.Optimizer,
    shapes: StateShapes | None,
) -> None:
    parameters = dict(trainable(policy))
    held = {name: state for name, parameter in parameters.items() if (state := optimizer.state.get(parameter))}
    given = set()
    for full_name, value in stored:
        given.add(full_name)
        name, _, key = full_name.rpartition("|")
        if name not in parameters:
            raise CheckpointError(f"{OPTIMIZER}: no parameter {safe_text(name)} in this run")
        parameter = parameters[name]
        if name in held:
            _fill(held[name], key, value, full_name)
            continue
        if shapes is not None and shapes[tuple(parameter.shape)].get(key) != tuple(value.shape):
            raise CheckpointError(f"{OPTIMIZER}: {safe_text(full_name)} has another shape than this optimizer's state")
        if not value.is_floating_point():
            raise CheckpointError(f"{OPTIMIZER}: {safe_text(full_name)} holds no numbers of the optimizer")
        # AdamW keeps its step count on the CPU, whatever the device; a fused one keeps it beside the weights.
        beside = value.ndim or optimizer.param_groups[0].get("fused")
        plain = value.ndim == 0 and value.dtype == torch.float64
        restored = value.item() if plain else part_like(parameter, value) if beside else value
        optimizer.state[parameter][key] = restored
    for name, parameter in parameters.items():
        found = optimizer.state.get(parameter)  # a weight that never had a gradient has none
        lacking = shapes[tuple(parameter.shape)].keys() - found if shapes is not None and found else set()
        if name in held:
            lacking = {key for key in held[name] if f"{name}|{key}" not in given}
            lacking = lacking if lacking != held[name].keys() else set()
        if lacking:
            raise CheckpointError(f"{OPTIMIZER}: lacks {safe_text(name)}|{min(lacking)}")


def _fill(state: dict[str, Any], key: str, value: Tensor, full_name: str) -> None:
    """Write a stored value over the one that a state was allocated with, in the same memory: it may be paged."""
    held = state.get(key)
    if isinstance(held, Tensor) and (held.shape, held.dtype) == (value.shape, value.dtype):
        held.copy_(value)
    elif isinstance(held, int) and value.ndim == 0 and 0 <= float(value) < 2**31:
        state[key] = int(value)
    else:
        raise CheckpointError(f"{OPTIMIZER}: {safe_text(full_name)} is not of this optimizer's state")


def _same_names(file: Path, stored: set[str], expected: set[str]) -> None:
    for problem, names in (("lacks", expected - stored), ("has, beyond this run,", stored - expected)):
        if names:
            raise CheckpointError(f"{file}: {problem} {len(names)} tensors, {safe_text(min(names))} first")
