"""What manifest.json says of a run: versions and machine, what was decided when it began, and its weights."""

import importlib.metadata
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dpo_cli import __version__
from dpo_cli.config.schema import public_container
from dpo_cli.config.versions import flat
from dpo_cli.runs.checkpoint import (
    OPTIMIZER,
    RNG,
    WINDOW,
    ResolvedSettings,
)
from dpo_cli.runs.tensor_files import is_part_of
from dpo_cli.storage.hashing import sha256_of

PACKAGES = ("torch", "transformers", "peft", "tokenizers", "safetensors", "hydra-core", "numpy")


@cache
def environment(device: torch.device) -> dict[str, Any]:
    """Versions and machine: what a number may depend on."""
    return {
        "dpo_cli": __version__,
        "git_revision": _git_revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "hardware": {
            "device": str(device),
            "name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "cuda": torch.version.cuda,
        },
    }


def what_ranks_share(config: Any) -> dict[str, str]:
    """What must be the same on every rank: versions, and every value of the config."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "dpo-cli": __version__,
        **versions,
        **{key: str(value) for key, value in flat(public_container(config)).items()},
    }


def _git_revision() -> str | None:
    """The revision of the checkout this program runs from; None for an installed package."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def base_fingerprint(manifest: dict[str, Any]) -> str | None:
    """The fingerprint of the weights that the run of a manifest trained on; None where it does not say."""
    model = manifest.get("model")
    known = model.get("fingerprint") if isinstance(model, dict) else None
    return known if isinstance(known, str) else None


def settings_in(manifest: dict[str, Any]) -> ResolvedSettings | None:
    """What was measured when the run of a manifest began; None where the manifest does not say."""
    batches, device = manifest.get("batches"), str(manifest.get("device")).split(":")[0]
    if not isinstance(batches, dict):
        return None
    sizes = [batches.get("token_budget"), batches.get("max_pairs")]
    try:
        if not all(size is None or type(size) is int for size in sizes):
            return None
        return ResolvedSettings(device, str(manifest.get("dtype")), str(batches.get("layout")), *sizes)
    except ValueError:
        return None


def weights_sha256(folder: Path) -> str | None:
    """The sha256 of the weights in a `final/` or a checkpoint: of each file, in the order of their names."""
    others = (OPTIMIZER, RNG, WINDOW)
    files = sorted(file for file in folder.glob("*.safetensors") if not any(is_part_of(file.name, o) for o in others))
    return "+".join(map(sha256_of, files)) or None
