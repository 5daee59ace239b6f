"""What a command is pointed at with `checkpoint=`: a run, one of its checkpoints, an adapter or a model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dpo_cli.config.schema import ModelConfig, RunConfig, read_config
from dpo_cli.console.text import safe_text
from dpo_cli.data.tokens import PairEncoder
from dpo_cli.errors import CheckpointError, ConfigError
from dpo_cli.models.adapters import START_FILE, load_adapter
from dpo_cli.models.dtype import Decision, choose_dtype
from dpo_cli.models.loading import find_model, load_model, load_tokenizer
from dpo_cli.objectives.objective import Objective
from dpo_cli.objectives.table import objective_of
from dpo_cli.paths import user_path
from dpo_cli.runs.checkpoint import newest_valid, read_json, validate
from dpo_cli.runs.manifest import settings_in
from dpo_cli.runs.run_directory import RunDirectory
from dpo_cli.storage.hashing import fingerprint, sha256_of


@dataclass(frozen=True)
class ModelName:
    """What a `checkpoint=` names, with the options that go with it; `key` is the name of the option."""

    name: str
    reference_model: str | None = None
    trust_remote_code: bool = False
    alone: bool = False  # whether a whole model is enough, with nothing to compare it with
    key: str = "checkpoint"


@dataclass(frozen=True)
class ModelRef:
    """A model that a user names: its weights, the run they came from, and the model they are compared with."""

    weights: str  # an adapter directory, a model directory or a hub id
    is_adapter: bool
    base: ModelConfig  # the reference, and what an adapter sits on
    run: RunConfig | None
    directory: RunDirectory | None
    label: str  # for the report's folder: `final`, `step-00000100`, ...

    @cached_property
    def objective(self) -> Objective:
        """What it was trained for: by its run's config, so that a missing head is noticed; else by its files."""
        return objective_of(self.run, Path(self.weights))


def find_model_ref(given: ModelName) -> ModelRef:
    """Read what `checkpoint` names; CheckpointError where there is nothing, or nothing that can be evaluated."""
    name = given.name
    path = user_path(name, CheckpointError, given.key)
    if not path.exists() and not name.startswith((".", "/", "~")) and name.count("/") == 1 and not path.parent.is_dir():
        return _model_ref(name, given)
    if not path.is_dir():
        raise CheckpointError(
            f"{given.key}={safe_text(name)}: no such directory; name a run directory, checkpoints/step-*, final/, "
            "a PEFT adapter directory or a model"
        )
    path = path.resolve()
    if (path / "checkpoints").is_dir() or (path / "final").is_dir():
        return _run_ref(RunDirectory(path), None, given)
    if path.parent.name == "checkpoints" and (path.parent.parent / "config.yaml").is_file():
        validate(path)
        return _run_ref(RunDirectory(path.parent.parent), path, given)
    if path.name == "final" and (path.parent / "config.yaml").is_file():
        return _run_ref(RunDirectory(path.parent), path, given)
    if (path / "adapter_config.json").is_file():
        return _adapter_ref(path, given)
    if (path / "config.json").is_file():
        return _model_ref(str(path), given)
    raise CheckpointError(
        f"{given.key}={safe_text(name)}: neither a run, nor a checkpoint, adapter or model "
        "(no checkpoints/, adapter_config.json or config.json in it)"
    )


def _run_ref(directory: RunDirectory, weights: Path | None, given: ModelName) -> ModelRef:
    run = read_config(directory.config)
    if weights is None:
        weights = directory.final if directory.finished else newest_valid(directory.checkpoints)[0]
    if weights is None:
        raise CheckpointError(f"{given.key}={safe_text(directory.path)}: this run has no complete checkpoint yet")
    is_adapter = (weights / "adapter_config.json").is_file()
    base = (
        run.model
        if given.reference_model is None
        else replace(run.model, name_or_path=given.reference_model, adapter=None)
    )
    if run.model.trust_remote_code and not given.trust_remote_code:
        raise ConfigError(
            f"{given.key}={safe_text(directory.path)}: its config trusts the Python of its model's authors; "
            "whether you do is not for a file to say: add trust_remote_code=true"
        )
    base = replace(base, trust_remote_code=given.trust_remote_code)
    if is_adapter and given.reference_model is not None:
        raise ConfigError(
            f"reference_model={safe_text(given.reference_model)}: an adapter is compared with the model it sits on "
            f"({safe_text(run.model.name_or_path)}); leave reference_model unset"
        )
    return ModelRef(str(weights), is_adapter, base, run, directory, weights.name)


def _adapter_ref(path: Path, given: ModelName) -> ModelRef:
    try:
        base = read_json(path / "adapter_config.json")["base_model_name_or_path"]
    except (KeyError, TypeError):
        raise CheckpointError(f"{safe_text(path / 'adapter_config.json')}: names no base model") from None
    start = replace(_plain_model(given.reference_model or str(base), given), adapter=_sft_adapter(path))
    return ModelRef(str(path), True, start, None, None, path.name)


def _sft_adapter(path: Path) -> str | None:
    """The SFT adapter that was folded into the base before this adapter was trained."""
    if not (path / START_FILE).exists():
        return None
    note = read_json(path / START_FILE)
    if not isinstance(note, dict):
        raise CheckpointError(f"{safe_text(path / START_FILE)}: is not what this program writes")
    found = note.get("sft_adapter")
    return str(found) if found else None


def _model_ref(name: str, given: ModelName) -> ModelRef:
    if given.alone:
        return ModelRef(name, False, _plain_model(name, given), None, None, Path(name).name)
    if given.reference_model is None:
        raise ConfigError(
            f"{given.key}={safe_text(name)}: a whole model does not say what it was tuned from; "
            "add reference_model=<the SFT model>"
        )
    return ModelRef(name, False, _plain_model(given.reference_model, given), None, None, Path(name).name)


def _plain_model(name: str, given: ModelName) -> ModelConfig:
    trusted = given.trust_remote_code
    return ModelConfig(
        name_or_path=name, revision=None, dtype="auto", quantization="none", adapter=None, trust_remote_code=trusted
    )


def ref_dtype(ref: ModelRef, device: torch.device) -> Decision:
    """The dtype the run was trained in, so that the numbers are the run's own; else chosen anew."""
    settings = settings_in(ref.directory.read_manifest()) if ref.directory else None
    if settings is not None and settings.device == device.type:
        return Decision(getattr(torch, settings.dtype), "as in training")
    return choose_dtype(ref.base.dtype, device, lora=True)


def ref_encoder(ref: ModelRef, template: str | None = None) -> PairEncoder:
    """How its texts become tokens: by `template`, else by the one of its run, else by its model's own."""
    kind = template or (ref.run.data.template if ref.run else None)
    tokenizer, closes = load_tokenizer(find_model(ref.base)), ref.objective.always_closes
    if ref.run is None:
        return PairEncoder(tokenizer, kind, closes)
    options = {} if kind == "plain" else ref.run.data.template_options
    return PairEncoder(tokenizer, kind, closes, options, ref.run.data.special_tokens_in_text)


def weights_fingerprints(refs: Sequence[ModelRef]) -> dict[str, str]:
    """A sha256 of the weights in every folder that refs come from, by its name; what is on a hub has none."""
    found: dict[str, str] = {}
    for name in dict.fromkeys(name for ref in refs for name in (ref.weights, ref.base.name_or_path)):
        files = sorted(file for kind in ("*.safetensors", "*.bin") for file in Path(name or "").glob(kind))
        if name and files and Path(name).is_dir():
            found[name] = fingerprint([[file.name, sha256_of(file)] for file in files])
    return found


def load_policy(ref: ModelRef, base: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """The weights that `checkpoint` names, in eval mode; an adapter is put on `base`, the model it was trained on."""
    if ref.is_adapter:
        policy = load_adapter(base, ref.weights).eval()
        ref.objective.load(policy, Path(ref.weights))
        return policy
    whole = replace(ref.base, name_or_path=ref.weights, revision=None, adapter=None)
    return load_model(find_model(whole), dtype, device)
