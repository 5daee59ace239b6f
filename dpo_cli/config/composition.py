"""From the command line to a config: Hydra composes it from conf/, and every typo is answered in one line.

Overrides are read with Hydra's own grammar and checked against the schema before anything is composed, so that
`beat=0.2`, `model=qwn` and `+bta=1` each get an answer that names what was meant.
"""

import itertools
import re
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dpo_cli.config.schema import (
    FREE_KEYS,
    RunConfig,
    did_you_mean,
    read_config,
    run_config,
    schema_keys,
    suggest_key,
    to_container,
    unknown_keys,
)
from dpo_cli.console.text import first_line, hydra_quoted, safe_text
from dpo_cli.errors import CheckpointError, ConfigError
from dpo_cli.paths import user_path


def conf_dir() -> Path:
    """The folder of YAML files: the packaged copy if there is one, else the checkout's."""
    packaged = Path(__file__).resolve().parent.parent / "conf"
    return packaged if packaged.is_dir() else packaged.parent.parent / "conf"


def groups() -> dict[str, list[str]]:
    """Each config group with its choices, sorted; names that begin with an underscore are shared parts."""
    return {
        folder.name: sorted(file.stem for file in folder.glob("*.yaml") if not file.stem.startswith("_"))
        for folder in sorted(conf_dir().iterdir())
        if folder.is_dir() and not folder.name.startswith("_")
    }


@dataclass(frozen=True)
class Composed:
    """A composed config as plain data, and which file each group came from."""

    container: dict[str, Any]
    choices: dict[str, str]  # group -> chosen option


def parse_overrides(words: list[str]) -> list[Override]:
    """Hydra's reading of `key=value` words; ConfigError for a word that is none."""
    parsed = []
    for word in words:
        key, equals, value = word.partition("=")
        if word.startswith("~"):
            raise ConfigError(f"'{word}': a key cannot be removed; set it to null or to another choice")
        if not equals:
            raise ConfigError(f"'{word}': not of the form key=value; --help lists keys and groups")
        try:
            parsed.append(OverridesParser.create().parse_override(word))
        except HydraException:
            parsed.append(_parse_quoted(word, key, value))
    return parsed


def _parse_quoted(word: str, key: str, value: str) -> Override:
    """A value outside Hydra's grammar, such as a path with a space or `=`, taken as the text it is."""
    try:
        return OverridesParser.create().parse_override(f"{key}={hydra_quoted(value)}")
    except HydraException:
        raise ConfigError(f"'{word}': cannot be read as key=value") from None


def check_overrides(overrides: list[Override], schema: type) -> None:
    """ConfigError for the first override whose key or group choice does not exist."""
    known_groups = groups()
    keys = schema_keys(schema) + (["experiment"] if schema is RunConfig else [])
    for override in overrides:
        key = override.key_or_group
        written = override.input_line
        if override.is_hydra_override() or key == "hydra" or key.startswith("hydra."):
            raise ConfigError(f"'{written}': Hydra's own settings are fixed here; output_dir= sets where a run goes")
        # A free-form mapping, such as data.columns, takes keys that the schema does not list.
        in_mapping = key.startswith("data.columns.")
        if key not in keys and not in_mapping:
            raise ConfigError(f"unknown key '{key}' in '{written}'{suggest_key(key, schema)}")
        if override.is_add() and not in_mapping:
            raise ConfigError(f"'{written}': '{key}' exists already; write it without the plus sign")
        is_group = is_dataclass(get_type_hints(schema).get(key)) or key == "experiment"
        if is_group and not override.is_sweep_override():
            _check_choice(key, override, known_groups[key])


def _check_choice(group: str, override: Override, choices: list[str]) -> None:
    value = override.value()
    if value is None or str(value) in choices:
        return
    option = str(value)
    hint = did_you_mean(option, choices)
    if group == "model" and "/" in option:
        hint = f"; for a path or hub id write model.name_or_path={option}"
    if group == "data" and ("/" in option or "." in option):
        hint = f"; for a file write data=jsonl data.train={option}"
    raise ConfigError(f"{group}={option}: no such choice{hint} (choices: {', '.join(choices)})")


def composed(config_name: str, overrides: list[Override], schema: type) -> Composed:
    """The config `conf/<config_name>.yaml` with overrides applied, checked for keys that do not exist.

    Types and ranges are checked where the plain container becomes a dataclass (config.py).
    """
    check_overrides(overrides, schema)
    # A key of a mapping that is empty in the YAML file is added, in Hydra's words.
    words = [
        f"++{(override.input_line or '').lstrip('+')}"
        if override.key_or_group.startswith("data.columns.")
        else (override.input_line or "")
        for override in overrides
    ]
    try:
        with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
            config = compose(config_name, overrides=words, return_hydra_config=True)
            choices = {str(group): str(choice) for group, choice in config.hydra.runtime.choices.items()}
            with open_dict(config):
                del config["hydra"]
            container = OmegaConf.to_container(config, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"the command line does not compose: {first_line(error)}") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{mark.name} line {mark.line + 1}" if mark else "a YAML file"
        raise ConfigError(f"{place}: not valid YAML ({getattr(error, 'problem', error)})") from None
    assert isinstance(container, dict)
    plain = {str(key): value for key, value in container.items()}
    unknown = unknown_keys(plain, schema)
    if unknown:
        raise ConfigError(f"{_where(unknown[0], choices)}: unknown key '{unknown[0]}'{suggest_key(unknown[0], schema)}")
    return Composed(plain, choices)


def composed_run(overrides: list[Override]) -> Composed:
    """The config of dpo-train. A reward model is held to nothing: its beta is 1, and a reference is refused."""
    choice = composed("train", overrides, RunConfig)
    if choice.container.get("objective") == "reward":
        given = {override.key_or_group: override.input_line for override in overrides}
        for key, written in given.items():
            if key.split(".")[0] == "reference":
                raise ConfigError(f"{written}: a reward model (objective=reward) is held to no reference; leave it out")
        if "beta" not in given:
            choice.container["beta"] = 1.0
    return choice


def _where(key: str, choices: dict[str, str]) -> str:
    """The YAML file and line in which a key stands, as far as the text tells."""
    leaf = re.escape(key.rsplit(".", 1)[-1])
    group_files = [f"{group}/{choice}.yaml" for group, choice in choices.items() if choice != "None"]
    shared = [f"{group}/_base.yaml" for group in choices]
    for name in [*group_files, *shared, *sorted(file.name for file in conf_dir().glob("*.yaml"))]:
        file = conf_dir() / name
        if not file.is_file():
            continue
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            if re.match(rf"\s*{leaf}\s*:", line):
                return f"conf/{name} line {number}"
    return "conf/"


def sweep(overrides: list[Override]) -> list[list[str]]:
    """Every combination of comma-separated values: `beta=0.1,0.3 seed=1,2` is four runs."""
    columns = []
    for override in overrides:
        key = override.get_key_element()
        if override.is_sweep_override():
            if not override.is_discrete_sweep():
                raise ConfigError(f"'{override.input_line}': a sweep needs values to try, such as beta=0.05,0.1,0.3")
            columns.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            columns.append([override.input_line or ""])
    return [list(words) for words in itertools.product(*columns)]


def replayed(overrides: list[Override]) -> tuple[RunConfig, str]:
    """The config of the run that `replay=` names, and what to call a run of it.

    ConfigError for a key that would make it another run. A config from a file does not get to run code: that a model's
    Python may run must be said on this command line again.
    """
    given = {override.key_or_group: override.value() for override in overrides}
    if not str(given["replay"]).strip():
        raise ConfigError("replay=: is empty; name a run directory")
    run = user_path(str(given["replay"]), CheckpointError, "replay")
    earlier = read_config(run / "config.yaml")
    container = to_container(earlier)
    trusted = "model.trust_remote_code"
    for key, value in given.items():
        if key not in (*FREE_KEYS, "device", trusted):
            allowed = ", ".join([*FREE_KEYS, "device"])
            raise ConfigError(f"{key}={value}: replay={safe_text(run)} runs a config as it was; with it go {allowed}")
        *groups, leaf = key.split(".")
        place = container
        for group in groups:
            place = place[group]
        place[leaf] = value
    if earlier.model.trust_remote_code and not given.get(trusted):
        raise ConfigError(
            f"replay={safe_text(run)}: that run trusted the Python of its model's authors; to do so again, "
            f"add {trusted}=true"
        )
    for key in ("output_dir", "resume", "dry_run", "verify_resume"):  # of that run's own life, not of its config
        container[key] = given.get(key, False if key in ("dry_run", "verify_resume") else None)
    return run_config(container), "replay"
