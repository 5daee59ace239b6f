"""Stored configs of every version: what has changed since, and how an old one is read as one of today.

Every config.yaml begins with `version`; one without it is of version 1. Whoever changes a key of `RunConfig` raises
VERSION and adds an entry; a test compares the keys.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dpo_cli.console.text import safe_text
from dpo_cli.errors import CheckpointError, DpoError

MAX_CONFIG_BYTES = 2**20
MAX_CONFIG_DEPTH = 10
# What PyYAML raises besides its own errors: for `!!timestamp x`, `!!bool x`, an escape beyond Unicode.
OF_YAML = (ValueError, OverflowError, LookupError, AttributeError, TypeError)


@dataclass(frozen=True)
class Added:
    """A key that older configs lack; `value` means what was done before it existed."""

    key: str
    value: Any
    within: tuple[str, ...] = ()  # the keys of a group that may be null

    def apply(self, values: dict[str, Any]) -> None:
        """Set the key."""
        values.setdefault(self.key, self.value)

    def keys(self, known: set[str]) -> set[str]:
        """The keys after this change."""
        return known | {self.key, *(f"{self.key}.{key}" for key in self.within)}


@dataclass(frozen=True)
class Renamed:
    """A key that has another name now."""

    old: str
    new: str

    def apply(self, values: dict[str, Any]) -> None:
        """Move the value."""
        if self.old in values:
            values[self.new] = values.pop(self.old)

    def keys(self, known: set[str]) -> set[str]:
        """The keys after this change."""
        return known - {self.old} | {self.new}


@dataclass(frozen=True)
class Removed:
    """A key that is gone; the program does what it does with any value."""

    key: str

    def apply(self, values: dict[str, Any]) -> None:
        """Drop the key."""
        values.pop(self.key, None)

    def keys(self, known: set[str]) -> set[str]:
        """The keys after this change."""
        return known - {self.key}


@dataclass(frozen=True)
class ValueRenamed:
    """A choice of a key that has another name now."""

    key: str
    old: Any
    new: Any

    def apply(self, values: dict[str, Any]) -> None:
        """Replace the value where it is the old one."""
        if values.get(self.key) == self.old:
            values[self.key] = self.new

    def keys(self, known: set[str]) -> set[str]:
        """The keys after this change."""
        return known


Change = Added | Renamed | Removed | ValueRenamed

# What each version changed, oldest first.
MIGRATIONS: dict[int, tuple[Change, ...]] = {
    2: (
        Renamed("radar", "monitor"),
        Renamed("batching", "layout"),
        Added(
            "tracker",
            None,
            within=(
                "tensorboard", "tensorboard.directory",
                "wandb", "wandb.project", "wandb.entity", "wandb.name", "wandb.mode",
                "trackio", "trackio.project", "trackio.name", "trackio.space_id", "trackio.private",
            ),
        ),
    ),
    3: (Added("data.split_by", "prompt"), Added("data.eval_leaks", "warn")),
    4: (
        Added("data.preferred", []),
        Added("data.tied", []),
        Added("data.ties", "drop"),
        Added("data.roles", {}),
        Added("data.prompt_truncation", "tokens"),
    ),
    5: (
        Added("data.max_bad_fraction", 1.0),
        Added("data.processes", "auto"),
        Added("data.cache_gib", None),
        Added("data.soft_labels", False),
        Added("data.template_options", {}),
        Added("data.special_tokens_in_text", "keep"),
        Added("reference.cache_gib", None),
        Added("data.sources", {}),
        Added("data.stop", "first"),
    ),
    6: (
        Added("engine.processes", "auto"),
        Added("engine.timeout", 1800.0),
        Added("engine.cpu_offload", False),
        Added("model.quantization", "none"),
        Added("plan", False),
        Added("gpu", None),
        Added("gpus", None),
        Added("tflops", None),
        Added("price", None),
    ),
    7: (
        Added("samples.n", 0),
        Added("samples.max_new_tokens", 64),
        Added("early_stop.patience", None),
        Added("early_stop.metric", "loss"),
        Added("keep_best", False),
        Added("budget.kl", None),
        Added("budget.length", None),
        Added("page", False),
    ),
}  # fmt: skip
VERSION = max(MIGRATIONS)


def migrate(values: dict[str, Any], version: Any, shown: str, error: type[DpoError]) -> None:
    """Bring values under dotted keys from a version to today's, in place; `error` for a version not known here."""
    if type(version) is not int or version < 1:
        raise error(f"{shown}: version={safe_text(version, 40)}: is not a version of a config")
    if version > VERSION:
        newer = f"written by a newer dpo-cli (config version {version}; this one reads up to {VERSION})"
        raise error(f"{shown}: {newer}; update dpo-cli")
    for number in sorted(MIGRATIONS):
        for change in MIGRATIONS[number] if number > version else ():
            change.apply(values)


def read_stored(path: Path) -> dict[str, Any]:
    """The container in a run's config.yaml with the keys of today, read as data; CheckpointError where there is none.

    An untrusted file executes nothing, resolves no interpolation and unfolds no alias.
    """
    shown = safe_text(path)
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{shown}: is not a file")
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise CheckpointError(f"{shown}: too large to be the config of a run ({path.stat().st_size:,} bytes)")
        text = path.read_text(encoding="utf-8")
        refuse_bombs(text, shown)
        container = yaml.safe_load(text)
    except FileNotFoundError:
        raise CheckpointError(f"{shown}: no such file; a run directory holds a config.yaml") from None
    except (OSError, RecursionError, yaml.YAMLError, *OF_YAML) as error:
        raise CheckpointError(f"{shown}: cannot be read as YAML ({type(error).__name__})") from None
    if not isinstance(container, dict):
        raise CheckpointError(f"{shown}: is not the config of a run")
    if "${" in text:
        raise CheckpointError(f"{shown}: holds an interpolation (${{...}}); a run's config is data only")
    values = flat(container)
    migrate(values, values.pop("version", 1), shown, CheckpointError)
    try:
        return nested(values)
    except ValueError:
        raise CheckpointError(f"{shown}: is not the config of a run") from None


def refuse_bombs(text: str, shown: str, error: type[DpoError] = CheckpointError) -> None:
    """`error` for YAML that this program never writes, and that could exhaust a loader's memory or stack."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        # A few lines of aliases to aliases unfold to gigabytes.
        if isinstance(event, yaml.AliasEvent):
            raise error(f"{shown}: holds a YAML alias; a config is data only")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_CONFIG_DEPTH:
            raise error(f"{shown}: nested too deeply to be the config of a run")


def flat(container: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, under dotted keys."""
    found: dict[str, Any] = {}
    for key, value in container.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values under dotted keys as nested mappings; ValueError where a key is a value and a group at once."""
    container: dict[str, Any] = {}
    for key, value in values.items():
        *groups, leaf = key.split(".")
        group_values = container
        for group in groups:
            group_values = group_values.setdefault(group, {})
            if not isinstance(group_values, dict):
                raise ValueError(key)
        group_values[leaf] = value
    return container
