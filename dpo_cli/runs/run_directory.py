"""The run directory: where a run keeps its config, its manifest, its metrics and its checkpoints.

config.yaml  manifest.json  metrics.jsonl  train.log  trained_on.safetensors  reference_logps.bin
checkpoints/step-*/  samples/step-*.jsonl  final/  eval/<name>/

One idea to keep in mind: a directory has one owner at a time, who holds its lock, and the next owner removes what
it did not finish.
"""

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo_cli.config.schema import (
    FREE_KEYS,
    LOUD_KEYS,
    RunConfig,
    config_text,
    free_keys,
    public_container,
    read_config,
)
from dpo_cli.config.versions import flat
from dpo_cli.console.text import safe_text, without_secrets
from dpo_cli.data.leaks import TrainedOn
from dpo_cli.errors import CheckpointError, ConfigError, DpoError, StoppedError, StorageError
from dpo_cli.paths import user_path
from dpo_cli.runs.checkpoint import newest_valid, read_json, validate
from dpo_cli.runs.versions import migrated_manifest
from dpo_cli.storage.durable import link_or_copy, sweep, write_whole
from dpo_cli.storage.line_log import MetricsLog
from dpo_cli.storage.locks import opened_alone

MAX_TRAINED_ON_BYTES = 2**30  # 64 million pairs
# Keys of `data` that hold to the end of a run.
AS_BEGUN = ("split_by", "prompt_truncation", "soft_labels", "special_tokens_in_text")


def default_directory(job: str, now: float) -> Path:
    """`outputs/<job>/<date_time>`, with a suffix where two runs begin in one second."""
    name = time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(now))
    first = Path("outputs") / job / name
    suffix, folder = 2, first
    while folder.exists():
        folder = first.with_name(f"{name}_{suffix}")
        suffix += 1
    return folder


def claim_directory(job: str, now: float) -> Path:
    """A default directory that no other run has: made here, also where another run starts in the same second."""
    while True:
        folder = default_directory(job, now)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{safe_text(folder.parent)}: cannot be made ({error.strerror})") from None
        try:
            folder.mkdir()
        except (FileExistsError, FileNotFoundError):  # another run took it, or removed the folder around it
            continue
        except OSError as error:
            raise StorageError(f"{safe_text(folder)}: cannot be made ({error.strerror})") from None
        return folder


class RunDirectory:
    """One run's folder on disk; StorageError where it cannot be written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"
        self.final = path / "final"
        self.metrics = MetricsLog(path / "metrics.jsonl")
        self.config = path / "config.yaml"
        self.manifest = path / "manifest.json"
        self.log = path / "train.log"
        self.page = path / "report.html"
        self.reference = path / "reference_logps.bin"
        self.trained_on = path / "trained_on.safetensors"
        self.lock = path / ".lock"

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end: `final/` is the last thing written."""
        return self.final.is_dir()

    def create(self) -> None:
        """Make the folder, and find out now rather than after an hour whether it can be written."""
        self._refuse_links()
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.checkpoints):
                pass
        except OSError as error:
            raise StorageError(f"output_dir={safe_text(self.path)}: cannot be written ({error.strerror})") from None

    def _refuse_links(self) -> None:
        """CheckpointError for a symbolic link: in an untrusted directory it could make us write anywhere."""
        for file in (self.checkpoints, self.samples, self.final, self.metrics.path, self.config, self.manifest,
                     self.log, self.reference, self.trained_on, self.lock):  # fmt: skip
            if file.is_symlink():
                raise CheckpointError(
                    f"{safe_text(file)}: is a symbolic link; to keep a run on another disk, name it with output_dir"
                )

    @contextmanager
    def owned(self, warn: Callable[[str], None] = lambda _: None, claimed: bool = False) -> Iterator[None]:
        """Within, no other run can use the directory; ConfigError names one that does. Unfinished files are removed.

        An attempt that fails before its config is written removes the directory, unless something was in it before.
        `claimed`: `claim_directory` has just made it for this attempt.
        """
        new = [folder for folder in (self.path, *self.path.parents) if not os.path.lexists(folder)]
        if claimed:
            new = [self.path, self.path.parent, self.path.parent.parent]  # outputs/<job>/<date_time>
        empty = not os.path.lexists(self.path)
        with suppress(OSError):  # why it cannot be read, `create` says
            empty = not any(self.path.iterdir())
        self.create()
        alone = True

        def in_use(owner: str) -> ConfigError:
            return ConfigError(
                f"output_dir={safe_text(self.path)}: in use by {owner or 'another process'}; wait for it, or name "
                "another output_dir"
            )

        def without_locks(reason: str) -> None:  # some network file systems: better a run without a lock than none
            nonlocal alone
            alone = False
            warn(f"{safe_text(self.path)}: no locks here ({reason}): see that no other run uses it")

        with opened_alone(self.lock, in_use, without_locks) as descriptor:
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            with suppress(OSError):  # a full disk: the lock holds all the same, it only cannot say whose it is
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {platform.node()} since {since}\n".encode())
            for folder in (self.path, self.checkpoints, self.samples) if alone else ():
                sweep(folder)
            try:
                yield
            except StoppedError:  # can be resumed in this directory
                raise
            except DpoError:
                if empty and not self.config.exists():
                    self._remove(new)
                raise

    def _remove(self, folders: list[Path]) -> None:
        """Remove what a run writes before its config, then the folders as far as they are empty."""
        for file in (self.log, self.reference, self.lock):
            with suppress(OSError):
                file.unlink()
        with suppress(OSError):
            for folder in (self.checkpoints, *folders):
                folder.rmdir()

    def write_config(self, config: RunConfig) -> None:
        """Write config.yaml."""
        self.write(self.config, config_text(config).encode())

    def write_manifest(self, facts: dict[str, Any]) -> None:
        """Write manifest.json: versions, revision, seeds, fingerprints, counts."""
        self.write(self.manifest, (json.dumps(without_secrets(facts), indent=1) + "\n").encode())

    def read_manifest(self) -> dict[str, Any]:
        """The manifest, or an empty one where there is none that can be read."""
        try:
            facts = read_json(self.manifest)
        except CheckpointError:
            return {}
        return migrated_manifest(facts) if isinstance(facts, dict) else {}

    def read_trained_on(self) -> TrainedOn | None:
        """The record of the training pairs; None where there is none that can be read.

        In an untrusted directory it may be a pipe or a device, which has no end.
        """
        file = self.trained_on
        try:
            if file.is_symlink() or not file.is_file() or file.stat().st_size > MAX_TRAINED_ON_BYTES:
                return None
            return TrainedOn.mapped(file)
        except (OSError, ValueError):
            return None

    def take(self, source: Path, path: Path) -> None:
        """Take a file of the cache, which never changes, as one of the run's; StorageError where the disk refuses."""
        try:
            link_or_copy(source, path)
        except OSError as error:
            raise StorageError(f"{safe_text(path)}: cannot be written ({error.strerror})") from None

    def write_samples(self, name: str, data: bytes) -> None:
        """Write a file of answers, whole."""
        with suppress(OSError):  # why it cannot be made, `write` says
            self.samples.mkdir(exist_ok=True)
        self.write(self.samples / name, data)

    def remove_samples(self, after: str) -> None:
        """Remove the answers of evaluations after a step: a run that resumes from it generates them again."""
        for file in self.samples.glob("step-*.jsonl") if self.samples.is_dir() else ():
            if file.name > f"{after}.jsonl":
                with suppress(OSError):
                    file.unlink()

    def write(self, path: Path, data: bytes) -> None:
        """Write one of the run's files, whole; StorageError where that is not possible."""
        try:
            write_whole(path, data)
        except OSError as error:
            raise StorageError(f"{safe_text(path)}: cannot be written ({error.strerror})") from None


def resumed_directory(config: RunConfig) -> Path | None:
    """The run directory that `resume` continues in; None where a run starts. Whether it can resume is checked later."""
    if config.resume is None:
        return None
    if config.resume == "auto":
        if config.output_dir is None:
            raise ConfigError(
                "resume=auto: name the run directory with output_dir, for instance output_dir=outputs/my-run"
            )
        return user_path(config.output_dir, StorageError, "output_dir")
    path = user_path(config.resume, CheckpointError, "resume")
    shown = f"resume={safe_text(config.resume)}"
    if not path.is_dir():
        raise CheckpointError(f"{shown}: no such checkpoint or run directory")
    if (path / "checkpoints").is_dir():
        return path
    path = path.resolve()
    if path.parent.name != "checkpoints":
        raise CheckpointError(f"{shown}: neither a run directory nor one of its checkpoints/step-*")
    return path.parent.parent


def directory_of(config: RunConfig, job: str, now: float) -> tuple[Path, bool]:
    """The directory of a run, and whether it resumes what is there. A new default directory is made here."""
    resumed = resumed_directory(config)
    given = user_path(config.output_dir, StorageError, "output_dir") if config.output_dir is not None else None
    if resumed is not None and given is not None and given.resolve() != resumed.resolve():
        raise ConfigError(f"output_dir={given}: resume={config.resume} continues in {resumed}; leave output_dir out")
    choose = default_directory if config.dry_run else claim_directory
    return resumed or given or choose(job, now), resumed is not None


def find_checkpoint(config: RunConfig, directory: RunDirectory) -> tuple[Path | None, list[str]]:
    """The checkpoint that `resume` starts from, and why newer ones were passed over.

    `auto` takes the newest valid one, or none if there is none; an explicit path is taken or refused.
    """
    if config.resume is None:
        return None, []
    path = user_path(config.resume, CheckpointError, "resume")
    if config.resume != "auto" and not (path / "checkpoints").is_dir():
        validate(path.resolve())
        return path.resolve(), []
    checkpoint, passed = newest_valid(directory.checkpoints)
    if checkpoint is None and (
        passed or config.resume != "auto"
    ):  # a new start would overwrite what can perhaps be repaired
        raise CheckpointError("; ".join([f"resume={safe_text(config.resume)}: no valid checkpoint in it", *passed]))
    return checkpoint, passed


def as_begun(config: RunConfig, directory: RunDirectory) -> RunConfig:
    """The config with how the run in `directory` began to split, cut and label its data.

    So no resumed run trains on what it held out, or on other tokens.
    """
    if not directory.config.is_file():
        return config
    begun = read_config(directory.config).data
    return replace(config, data=replace(config.data, **{key: getattr(begun, key) for key in AS_BEGUN}))


@dataclass(frozen=True)
class Change:
    """A key of a config that a resumed run gives another value."""

    key: str
    was: str
    now: str

    def __str__(self) -> str:
        return f"{self.key}: {self.was} -> {self.now}"


def config_changes(earlier: RunConfig, now: RunConfig) -> tuple[list[Change], list[Change]]:
    """What a resumed run changes: the changes that are refused, and those that are allowed but told."""
    before, after = flat(public_container(earlier)), flat(public_container(now))
    refused: list[Change] = []
    told: list[Change] = []
    free = {*free_keys(earlier)} & {*free_keys(now)}
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key) and key not in free:
            change = Change(key, safe_text(before.get(key), 60), safe_text(after.get(key), 60))
            (told if key in (*LOUD_KEYS, *FREE_KEYS) else refused).append(change)
    return refused, told
