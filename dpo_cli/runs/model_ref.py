"""What a command is pointed at with `checkpoint=`: a run, one of its checkpoints, an adapter or a model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dpo_cli.config.schema import ModelConfig, RunConfig, read_config
from dpo_cli.console.text import safe_text
from dpo_cli.data.tokens import PairEncoder
from dpo_cli.errors import CheckpointError, ConfigError
from dpo_cli.models.loading import (
    START_FILE,
    Decision,
    choose_dtype,
    find_model,
    load_adapter,
    load_model,
    load_tokenizer,
)
from dpo_cli.objectives.reward_model import has_head, load_head
from dpo_cli.paths import user_path
from dpo_cli.runs.checkpoint import newest_valid, read_json, validate
from dpo_cli.runs.manifest import settled_in
from dpo_cli.runs.run_directory import RunDirectory
from dpo_cli.storage.hashing import fingerprint, sha256_of

DEFAULT_BETA = 0.1  # where the checkpoint does not say


@dataclass(frozen=True)
class Asked:
    """A `checkpoint=` with what the command line says of it; `key` is what the command calls it."""

    name: str
    reference_model: str | None = None
    trust_remote_code: bool = False
    alone: bool = False  # whether a whole model is enough, with nothing to compare it with
    key: str = "checkpoint"


@dataclass(frozen=True)
class Subject:
    """What is evaluated: the weights, the run they came from, and the model they are held to."""

    weights: str  # an adapter directory, a model directory or a hub id
    is_adapter: bool
    base: ModelConfig  # the reference, and what an adapter sits on
    run: RunConfig | None
    directory: RunDirectory | None
    label: str  # for the report's folder: `final`, `step-00000100`, ...

    @property
    def is_reward_model(self) -> bool:
        """Whether it gives rewards, and no answers. A run's config says so, too: a head that is gone is missed."""
        return has_head(Path(self.weights)) or (self.run is not None and self.run.objective == "reward")

    @property
    def beta(self) -> float:
        """What multiplies log pi/pi_ref; a reward model's rewards stand as they are."""
        return 1.0 if self.is_reward_model else self.run.beta if self.run else DEFAULT_BETA


def find_subject(asked: Asked) -> Subject:
    """Read what `checkpoint` names; CheckpointError where there is nothing, or nothing that can be evaluated."""
    name = asked.name
    path = user_path(name, CheckpointError, asked.key)
    if not path.exists() and not name.startswith((".", "/", "~")) and name.count("/") == 1 and not path.parent.is_dir():
        return _model_subject(name, asked)
    if not path.is_dir():
        raise CheckpointError(
            f"{asked.key}={safe_text(name)}: no such directory; name a run directory, checkpoints/step-*, final/, "
            "a PEFT adapter directory or a model"
        )
    path = path.resolve()
    if (path / "checkpoints").is_dir() or (path / "final").is_dir():
        return _run_subject(RunDirectory(path), None, asked)
    if path.parent.name == "checkpoints" and (path.parent.parent / "config.yaml").is_file():
        validate(path)
        return _run_subject(RunDirectory(path.parent.parent), path, asked)
    if path.name == "final" and (path.parent / "config.yaml").is_file():
        return _run_subject(RunDirectory(path.parent), path, asked)
    if (path / "adapter_config.json").is_file():
        return _adapter_subject(path, asked)
    if (path / "config.json").is_file():
        return _model_subject(str(path), asked)
    raise CheckpointError(
        f"{asked.key}={safe_text(name)}: neither a run, nor a checkpoint, adapter or model "
        "(no checkpoints/, adapter_config.json or config.json in it)"
    )


def _run_subject(directory: RunDirectory, weights: Path | None, asked: Asked) -> Subject:
    run = read_config(directory.config)
    if weights is None:
        weights = directory.final if directory.finished else newest_valid(directory.checkpoints)[0]
    if weights is None:
        raise CheckpointError(f"{asked.key}={safe_text(directory.path)}: this run has no complete checkpoint yet")
    is_adapter = (weights / "adapter_config.json").is_file()
    base = (
        run.model
        if asked.reference_model is None
        else replace(run.model, name_or_path=asked.reference_model, adapter=None)
    )
    if run.model.trust_remote_code and not asked.trust_remote_code:
        raise ConfigError(
            f"{asked.key}={safe_text(directory.path)}: its config trusts the Python of its model's authors; "
            "whether you do is not for a file to say: add trust_remote_code=true"
        )
    base = replace(base, trust_remote_code=asked.trust_remote_code)
    if is_adapter and asked.reference_model is not None:
        raise ConfigError(
            f"reference_model={safe_text(asked.reference_model)}: an adapter is compared with the model it sits on "
            f"({safe_text(run.model.name_or_path)}); leave reference_model unset"
        )
    return Subject(str(weights), is_adapter, base, run, directory, weights.name)


def _adapter_subject(path: Path, asked: Asked) -> Subject:
    try:
        base = read_json(path / "adapter_config.json")["base_model_name_or_path"]
    except (KeyError, TypeError):
        raise CheckpointError(f"{safe_text(path / 'adapter_config.json')}: names no base model") from None
    start = replace(_plain_model(asked.reference_model or str(base), asked), adapter=_sft_adapter(path))
    return Subject(str(path), True, start, None, None, path.name)


def _sft_adapter(path: Path) -> str | None:
    """The SFT adapter that was folded into the base before this adapter was trained."""
    if not (path / START_FILE).exists():
        return None
    note = read_json(path / START_FILE)
    if not isinstance(note, dict):
        raise CheckpointError(f"{safe_text(path / START_FILE)}: is not what this program writes")
    found = note.get("sft_adapter")
    return str(found) if found else None


def _model_subject(name: str, asked: Asked) -> Subject:
    if asked.alone:
        return Subject(name, False, _plain_model(name, asked), None, None, Path(name).name)
    if asked.reference_model is None:
        raise ConfigError(
            f"{asked.key}={safe_text(name)}: a whole model does not say what it was tuned from; "
            "add reference_model=<the SFT model>"
        )
    return Subject(name, False, _plain_model(asked.reference_model, asked), None, None, Path(name).name)


def _plain_model(name: str, asked: Asked) -> ModelConfig:
    trusted = asked.trust_remote_code
    return ModelConfig(name_or_path=name, revision=None, dtype="auto", adapter=None, trust_remote_code=trusted)


def subject_dtype(subject: Subject, device: torch.device) -> Decision:
    """The dtype the run was trained in, so that the numbers are the run's own; else chosen anew."""
    settled = settled_in(subject.directory.read_manifest()) if subject.directory else None
    if settled is not None and settled.device == device.type:
        return Decision(getattr(torch, settled.dtype), "as in training")
    return choose_dtype(subject.base.dtype, device, lora=True)


def subject_encoder(subject: Subject, template: str | None = None) -> PairEncoder:
    """How its texts become tokens: by `template`, else by the one of its run, else by its model's own."""
    kind = template or (subject.run.data.template if subject.run else None)
    return PairEncoder(load_tokenizer(find_model(subject.base)), kind, always_closes=subject.is_reward_model)


def weights_digests(subjects: Sequence[Subject]) -> dict[str, str]:
    """A sha256 of the weights in every folder that subjects come from, by its name; what is on a hub has none."""
    found: dict[str, str] = {}
    for name in dict.fromkeys(name for subject in subjects for name in (subject.weights, subject.base.name_or_path)):
        files = sorted(file for kind in ("*.safetensors", "*.bin") for file in Path(name or "").glob(kind))
        if name and files and Path(name).is_dir():
            found[name] = fingerprint([[file.name, sha256_of(file)] for file in files])
    return found


def load_policy(subject: Subject, base: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """The weights that `checkpoint` names, in eval mode; an adapter is put on `base`, the model it was trained on."""
    if subject.is_adapter:
        policy = load_adapter(base, subject.weights).eval()
        if subject.is_reward_model:
            load_head(policy, Path(subject.weights))
        return policy
    whole = replace(subject.base, name_or_path=subject.weights, revision=None, adapter=None)
    return load_model(find_model(whole), dtype, device)
