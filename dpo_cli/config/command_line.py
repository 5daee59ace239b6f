"""A command line with the files it names: where each override stands, and the config that all of it makes."""

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.override_parser.types import Override

from dpo_cli.config.composition import (
    SEVERAL,
    Composed,
    check_overrides,
    composed,
    composed_run,
    parse_overrides,
    user_dir,
)
from dpo_cli.config.files import override_value, overrides_in
from dpo_cli.config.objectives import OBJECTIVES
from dpo_cli.config.schema import (
    SCHEMAS,
    FieldError,
    RunConfig,
    config_of,
    free_keys,
    read_config,
    run_config,
    schema_keys,
    to_container,
    walk,
)
from dpo_cli.console.text import safe_text
from dpo_cli.errors import CheckpointError, ConfigError, UnknownKeyError
from dpo_cli.paths import user_path

Config = TypeVar("Config")


@dataclass(frozen=True)
class CommandLine:
    """What a user gave: overrides, from a file of --config and from the command line itself, and a folder of groups."""

    command: str  # train, eval, sample, label, rank, data, export
    overrides: list[Override]
    places: dict[str, str] = field(default_factory=dict)  # keys that stand in the file of --config -> file and line
    own: Path | None = None  # the folder of --config-dir

    @property
    def given(self) -> dict[str, str]:
        """Each key that was given, as it was written."""
        return {override.key_or_group: override.input_line or "" for override in self.overrides}

    def check(self) -> None:
        """ConfigError for the first key or choice that does not exist; for all such keys of the file of --config."""
        unknown = []
        for override in self.overrides:
            try:
                check_overrides([override], SCHEMAS[self.command], self.own)
            except ConfigError as error:
                place = self.places.get(override.key_or_group)
                if not place or not isinstance(error, UnknownKeyError):
                    raise (ConfigError(f"{place}: {error}") if place else error) from None
                unknown.append(f"{place}: {error}")
        if unknown:
            several = ConfigError(
                unknown[0] if len(unknown) == 1 else f"{len(unknown)} keys of the --config file do not exist"
            )
            several.details = tuple(unknown) if len(unknown) > 1 else ()
            raise several

    def config(self, schema: type[Config]) -> Config:
        """The checked config."""
        self.check()
        return self.checked(composed(self.command, self.overrides, schema, self.own), schema)

    def checked(self, choice: Composed, schema: type[Config]) -> Config:
        """The config in a container; ConfigError says in which line of the user's files the mistake is."""
        try:
            return config_of(choice.container, schema)
        except FieldError as error:
            place = self.places.get(error.key)
            if error.key not in self.given and self.own is not None:
                place = choice.where(error.key)
                place = place if place.startswith(f"{self.own.name}/") else None
            raise (ConfigError(f"{place}: {error}") if place else error) from None


def read_command_line(
    command: str, words: list[str], file: str | None = None, folder: str | None = None, many: bool = False
) -> CommandLine:
    """The words of a command line, the file of --config before them and the folder of --config-dir.

    A list in the file is one value where the key takes a list, else values to try, which need -m.
    """
    own = user_dir(folder) if folder is not None else None
    schema = SCHEMAS[command]
    overrides = parse_overrides(words)
    given = {override.key_or_group for override in overrides}
    places: dict[str, str] = {}
    before: list[Override] = []
    keys = set(schema_keys(schema))
    for key, (value, place) in (overrides_in(file, keys) if file is not None else {}).items():
        if key in given:
            continue
        if not re.fullmatch(r"\w[\w./-]*", key):  # `++` and `=` in a key would be read as a part of the word
            raise ConfigError(f"{place}: '{safe_text(key, 80)}': is not a key; write keys without marks")
        trusts = True in (value if isinstance(value, list) else [value])
        if key in keys and key.endswith("trust_remote_code") and trusts:  # the file may be somebody else's
            raise ConfigError(f"{place}: {key}: true runs Python of others; say so on the command line: {key}=true")
        word = f"{key}={override_value(value)}"
        if isinstance(value, list) and not _takes_a_list(key, value, schema):
            word = f"{key}={','.join(map(override_value, value))}"
            if not many:
                how = "several values need -m" if command == "train" else "one value is needed"
                raise ConfigError(f"{place}: '{key}: {override_value(value)}': {how}")
        places[key] = place
        before += parse_overrides([word])
    return CommandLine(command, before + overrides, places, own)


def _takes_a_list(key: str, value: list[Any], schema: type) -> bool:
    """Whether a list is one value of a key, and not several values to try."""
    if not value or any(isinstance(part, list) for part in value):
        return not value
    annotations = {known: str(field.annotation) for known, field, _ in walk(schema)}
    return key in SEVERAL or "list[" in annotations.get(key, "list[")  # an unknown key is refused later


def run_of(line: CommandLine) -> tuple[RunConfig, str]:
    """The checked config of a run of dpo-train, and the name of its job: <model>-<data>, or replay."""
    line.check()
    choice = composed_run(line.overrides, line.own)
    if choice.container.get("replay") is not None:
        return _replayed(line, choice), "replay"
    config = line.checked(choice, RunConfig)
    return config, f"{choice.choices['model']}-{choice.choices['data']}{OBJECTIVES[config.objective].suffix}"


def _replayed(line: CommandLine, choice: Composed) -> RunConfig:
    """The config of the run that `replay=` names.

    ConfigError for a key that would make it another run. A config from a file does not get to run code: that a model's
    Python may run must be said on this command line again.
    """
    given = str(choice.container["replay"])
    if not given.strip():
        raise ConfigError("replay=: is empty; name a run directory")
    run = user_path(given, CheckpointError, "replay")
    earlier = read_config(run / "config.yaml")
    container = to_container(earlier)
    trusted, free = "model.trust_remote_code", free_keys(earlier)
    for key, written in line.given.items():
        if key not in (*free, "device", trusted):
            allowed = ", ".join(key for key in (*free, "device") if not key.startswith("tracker."))
            raise ConfigError(f"{written}: replay={safe_text(run)} runs a config as it was; with it go {allowed}")
        *parents, leaf = ["tracker"] if key.startswith("tracker") else key.split(".")
        target, source = container, choice.container
        for parent in parents:
            target, source = target[parent], source[parent]
        target[leaf] = source[leaf]
    again = trusted in line.given and choice.container["model"]["trust_remote_code"]
    if earlier.model.trust_remote_code and not again:
        raise ConfigError(
            f"replay={safe_text(run)}: that run trusted the Python of its model's authors; to do so again, "
            f"add {trusted}=true"
        )
    for key in ("output_dir", "resume", "dry_run", "verify_resume"):  # of that run's own life, not of its config
        container[key] = choice.container[key]
    return run_config(container)


def refuse_unused(line: CommandLine, keys: Collection[str], why: str) -> None:
    """ConfigError for a key that would change nothing here."""
    for key, written in line.given.items():
        if key in keys:
            raise ConfigError(f"{written}: {why}; leave it out")
