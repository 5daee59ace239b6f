"""The run directory: where a run keeps its config, its manifest, its metrics and its checkpoints.

config.yaml  manifest.json  metrics.jsonl  train.log  checkpoints/step-*/  final/  eval/<name>/
"""

import importlib.metadata
import json
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

from dpo_cli import __version__
from dpo_cli.config import RunConfig, to_container, write_config
from dpo_cli.console.text import safe_text
from dpo_cli.errors import CheckpointError, ConfigError, StorageError
from dpo_cli.training.checkpoint import newest_valid, validate

# Keys that a resumed run may change: they decide what is shown and kept, not what is computed.
FREE_KEYS = {
    "log_every", "eval_every", "save_every", "keep_checkpoints", "output_dir", "resume", "device", "radar", "dry_run",
    "reference.cache",
}  # fmt: skip
# Keys that a resumed run may change, and is told so: the end of the run, and with it the schedule, or its roundings.
LOUD_KEYS = {"max_steps", "epochs", "micro_batch_size"}


def default_directory(job: str, now: float) -> Path:
    """`outputs/<job>/<date_time>`, with a suffix where two runs begin in one second."""
    name = time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(now))
    first = Path("outputs") / job / name
    suffix, folder = 2, first
    while folder.exists():
        folder = first.with_name(f"{name}_{suffix}")
        suffix += 1
    return folder


class RunDirectory:
    """One run's folder on disk; StorageError where it cannot be written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.final = path / "final"
        self.metrics = path / "metrics.jsonl"
        self.config = path / "config.yaml"
        self.manifest = path / "manifest.json"
        self.records = 0  # lines of metrics.jsonl

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end: `final/` is the last thing written."""
        return self.final.is_dir()

    def create(self) -> None:
        """Make the folder, and find out now rather than after an hour whether it can be written."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".write-probe"
            probe.write_text("", encoding="utf-8")
            probe.unlink()
        except OSError as error:
            raise StorageError(f"output_dir={self.path}: cannot be written ({error.strerror})") from None

    def write_config(self, config: RunConfig) -> None:
        """Write config.yaml."""
        self._guard(lambda: write_config(config, self.config))

    def write_manifest(self, facts: dict[str, Any]) -> None:
        """Write manifest.json: versions, revision, seeds, fingerprints, counts."""
        text = json.dumps({**environment(), **facts}, indent=1) + "\n"
        self._guard(lambda: self.manifest.write_text(text, encoding="utf-8"))

    def read_manifest(self) -> dict[str, Any]:
        """The manifest, or an empty one where there is none that can be read."""
        try:
            facts = json.loads(self.manifest.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return facts if isinstance(facts, dict) else {}

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl."""

        def append() -> None:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

        self._guard(append)
        self.records += 1

    def cut_metrics(self, records: int) -> None:
        """Take back what was logged after a checkpoint: it will be logged again, the same."""
        lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True) if self.metrics.is_file() else []
        if len(lines) < records:
            raise CheckpointError(f"{self.metrics}: has {len(lines)} lines; the checkpoint was saved after {records}")
        self._guard(lambda: self.metrics.write_text("".join(lines[:records]), encoding="utf-8"))
        self.records = records

    def _guard(self, write: Any) -> None:
        try:
            write()
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be written ({error.strerror})") from None


def environment() -> dict[str, Any]:
    """Versions and machine: what a number may depend on."""
    packages = ("torch", "transformers", "peft", "tokenizers", "safetensors", "hydra-core", "numpy")
    return {
        "dpo_cli": __version__,
        "git_revision": _git_revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
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


def find_resume(config: RunConfig) -> tuple[Path | None, Path | None, list[str]]:
    """Where `resume` leads: the run directory, the checkpoint to go on from, and what was passed over.

    `auto` takes the newest valid checkpoint in output_dir, or none if there is none; an explicit path is taken
    or refused.
    """
    if config.resume is None:
        return None, None, []
    if config.resume == "auto":
        if config.output_dir is None:
            raise ConfigError("resume=auto: give the run directory to go on in, for instance output_dir=outputs/my-run")
        folder = Path(config.output_dir).expanduser()
        checkpoint, passed = newest_valid(folder / "checkpoints")
        return folder, checkpoint, passed
    path = Path(config.resume).expanduser()
    if not path.is_dir():
        raise CheckpointError(f"resume={safe_text(config.resume)}: no such checkpoint or run directory")
    if (path / "checkpoints").is_dir():
        checkpoint, passed = newest_valid(path / "checkpoints")
        if checkpoint is None and not (path / "final").is_dir():
            raise CheckpointError(
                f"resume={safe_text(config.resume)}: no valid checkpoint in it {passed or ''}".strip()
            )
        return path, checkpoint, passed
    validate(path)
    return path.parent.parent, path, []


def config_changes(earlier: RunConfig, now: RunConfig) -> tuple[list[str], list[str]]:
    """What a resumed run changes, as `key: was -> is`: the changes refused, and those allowed but told."""
    before, after = _flat(to_container(earlier)), _flat(to_container(now))
    refused: list[str] = []
    told: list[str] = []
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key) and key not in FREE_KEYS:
            line = f"{key}: {safe_text(before.get(key), 60)} -> {safe_text(after.get(key), 60)}"
            (told if key in LOUD_KEYS else refused).append(line)
    return refused, told


def _flat(container: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in container.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
