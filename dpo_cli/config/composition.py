"""From the command line to a config: Hydra composes it from conf/, and every typo is answered in one line.

Overrides are read with Hydra's own grammar and checked against the schema before anything is composed, so that
`beat=0.2`, `model=qwn` and `+bta=1` each get an answer that names what was meant. A user's folder (`--config-dir`) lies
before the packaged one on Hydra's search path; a user's file (`--config`) becomes words of the command line.
"""

import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from hydra import compose, initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dpo_cli.config.files import keys_and_lines
from dpo_cli.config.objectives import OBJECTIVES, ObjectiveRules
from dpo_cli.config.schema import (
    FOR_EACH,
    MIXTURE,
    OF_WHOLE,
    SCHEMAS,
    FieldError,
    RunConfig,
    did_you_mean,
    group_of,
    schema_fields,
    schema_keys,
    suggest_key,
    unknown_keys,
)
from dpo_cli.console.text import first_line, hydra_quoted, safe_text
from dpo_cli.errors import ConfigError, UnknownKeyError
from dpo_cli.paths import user_path

HELP_LISTS = "--help lists keys and groups"
SEVERAL = ("tracker",)  # groups of which a run can have several choices at once
# Free-form: they take keys that the schema does not list.
MAPPINGS = ("data.columns.", "data.roles.", "data.template_options.", "data.sources.", "data.eval.")


def conf_dir() -> Path:
    """The folder of YAML files: the packaged copy if there is one, else the checkout's."""
    packaged = Path(__file__).resolve().parent.parent / "conf"
    return packaged if packaged.is_dir() else packaged.parent.parent / "conf"


def groups(own: Path | None = None) -> dict[str, list[str]]:
    """Each config group with its choices, the user's too; names that begin with an underscore are parts."""
    return {
        group.name: sorted(
            {
                file.stem
                for folder in (conf_dir(), own)
                if folder is not None
                for file in (folder / group.name).glob("*.yaml")
                if not file.stem.startswith("_")
            }
        )
        for group in sorted(conf_dir().iterdir())
        if group.is_dir() and not group.name.startswith("_")
    }


def user_dir(text: str) -> Path:
    """The folder that --config-dir names; ConfigError where it cannot hold groups."""
    path, shown = user_path(text, ConfigError, "--config-dir").resolve(), f"--config-dir {safe_text(text)}"
    if not path.is_dir():
        raise ConfigError(f"{shown}: no such folder")
    known, found = [*groups()], sorted(folder.name for folder in path.iterdir() if folder.is_dir())
    if not set(known) & set(found):
        hint = next((f"; '{name}' is not one{meant}" for name in found if (meant := did_you_mean(name, known))), "")
        raise ConfigError(f"{shown}: holds no folder of a group ({', '.join(known)}){hint}")
    for file in sorted(path.glob("*.yaml")):
        if file.stem in SCHEMAS:
            raise ConfigError(f"{shown}: {file.name} is not read; put overrides into a file for --config")
    return path


class UserGroups(SearchPathPlugin):
    """Hydra's own way to find configs: the user's folder before the packaged one."""

    folder: Path | None = None

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Put the folder first, if there is one."""
        if UserGroups.folder is not None:
            search_path.prepend("user", f"file://{UserGroups.folder}", "main")


@contextmanager
def _searched(own: Path | None) -> Iterator[None]:
    if UserGroups not in Plugins.instance().discover(SearchPathPlugin):
        Plugins.instance().register(UserGroups)
    UserGroups.folder = own
    try:
        with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
            yield
    finally:
        UserGroups.folder = None


def parse_overrides(words: list[str]) -> list[Override]:
    """Hydra's reading of `key=value` words; ConfigError for a word that is none."""
    parsed = []
    for word in words:
        key, equals, value = word.partition("=")
        if word.startswith("~"):
            raise ConfigError(f"'{word}': a key cannot be removed; set it to null or to another choice")
        if not equals:
            remedy = f"to read a file write --config {word}" if word.endswith((".yaml", ".yml")) else HELP_LISTS
            raise ConfigError(f"'{word}': not of the form key=value; {remedy}")
        try:
            parsed.append(OverridesParser.create().parse_override(word))
        except (HydraException, ValueError, RecursionError):  # ValueError: a number of more than 4,300 digits
            parsed.append(_parse_quoted(word, key, value))
    return parsed


def _parse_quoted(word: str, key: str, value: str) -> Override:
    """A value outside Hydra's grammar, such as a path with a space or `=`, taken as the text it is."""
    try:
        return OverridesParser.create().parse_override(f"{key}={hydra_quoted(value)}")
    except (HydraException, ValueError, RecursionError):
        raise ConfigError(f"'{word}': cannot be read as key=value") from None


def check_overrides(overrides: list[Override], schema: type, own: Path | None = None) -> None:
    """ConfigError for the first override whose key or group choice does not exist."""
    known_groups = groups(own)
    keys = schema_keys(schema) + (["experiment"] if schema is RunConfig else [])
    for override in overrides:
        key = override.key_or_group
        written = override.input_line
        if override.is_hydra_override() or key == "hydra" or key.startswith("hydra."):
            raise ConfigError(f"'{written}': Hydra's own settings are fixed here; output_dir= sets where a run goes")
        in_mapping = key.startswith(MAPPINGS)
        if key not in keys and not in_mapping:
            hint = suggest_key(key, schema, (written or "").partition("=")[2])
            raise UnknownKeyError(f"unknown key '{key}' in '{written}'{hint}")
        if override.is_add() and not in_mapping:
            raise ConfigError(f"'{written}': '{key}' exists already; write it without the plus sign")
        if key in known_groups and not override.is_sweep_override():
            value = override.value()
            if value is not None or not (key == "experiment" or _optional(schema, key)):
                _check_choice(key, value, known_groups[key])


def _check_choice(group: str, value: Any, choices: list[str]) -> None:
    if isinstance(value, list) and group in SEVERAL:
        for one in value:
            _check_choice(group, one, choices)
        return
    if str(value) in choices:
        return
    option = "null" if value is None else str(value)
    hint = did_you_mean(option, choices)
    if group == "model" and "/" in option:
        hint = f"; for a path or hub id write model.name_or_path={option}"
    if group == "data" and ("/" in option or "." in option):
        hint = f"; for a file write data=jsonl data.train={option}"
    raise ConfigError(f"{group}={option}: no such choice{hint} (choices: {', '.join(choices)})")


def _shown(file: Path, own: Path | None) -> str:
    """A YAML file as the user knows it: within the folder of --config-dir, or within conf/."""
    for folder in (own, conf_dir()):
        if folder is not None and file.is_relative_to(folder):
            return f"{folder.name}/{file.relative_to(folder)}"
    return str(file)


@dataclass(frozen=True)
class Composed:
    """A composed config as plain data, and which file each group came from."""

    container: dict[str, Any]
    choices: dict[str, str]  # group -> chosen option
    own: Path | None = None  # the folder of --config-dir

    def where(self, key: str) -> str:
        """The YAML file and line that set a key."""
        chosen = [f"{group}/{choice}.yaml" for group, choice in self.choices.items() if choice != "None"]
        shared = [f"{group}/_base.yaml" for group in self.choices]
        # What is applied last sets the value.
        for name in [*reversed(chosen), *shared, *(file.name for file in conf_dir().glob("*.yaml"))]:
            folders = [folder for folder in (self.own, conf_dir()) if folder and (folder / name).is_file()]
            if not folders:
                continue
            file = folders[0] / name
            package = "" if "/" not in name or name.startswith("experiment/") else f"{name.split('/')[0]}."
            for found, _, line in keys_and_lines(file.read_text(encoding="utf-8"), name):
                if key in (found, package + found):
                    return f"{_shown(file, self.own)} line {line}"
        return "conf/"


def composed(config_name: str, overrides: list[Override], schema: type, own: Path | None = None) -> Composed:
    """The config `conf/<config_name>.yaml` with overrides applied, checked for keys that do not exist.

    Types and ranges are checked where the plain container becomes a dataclass (schema.py).
    """
    choice = _composed(config_name, overrides, schema, own)
    if isinstance(choice.container.get("data"), dict):
        _resolve_sources(choice.container["data"], choice)
    return choice


def _composed(config_name: str, overrides: list[Override], schema: type, own: Path | None) -> Composed:
    check_overrides(overrides, schema, own)
    optional = [key for key in schema_fields(schema) if _optional(schema, key)]
    try:
        with _searched(own):
            words = [word for override in overrides for word in _hydra_words(override, optional)]
            config = compose(config_name, overrides=words, return_hydra_config=True)
            choices = {str(group): str(choice) for group, choice in config.hydra.runtime.choices.items()}
            with open_dict(config):
                del config["hydra"]
            container = OmegaConf.to_container(config, resolve=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(_not_composed(error, own)) from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{_shown(Path(mark.name), own)} line {mark.line + 1}" if mark else "a YAML file"
        raise ConfigError(f"{place}: not valid YAML ({getattr(error, 'problem', error)})") from None
    assert isinstance(container, dict)
    plain = {str(key): value for key, value in container.items()}
    for key in optional:  # a group of which nothing was chosen
        if group_of(schema_fields(schema)[key].annotation) is not None:
            plain[key] = plain.get(key) or None
    choice = Composed(plain, choices, own)
    for key in unknown_keys(plain, schema):
        first, _, second = key.partition(".")
        hint = suggest_key(key, schema)
        if first == second:
            raise ConfigError(
                f"{choice.where(f'{first}.defaults')}: '/{first}/...' in defaults; in a file of {first}/ write _base"
            )
        raise ConfigError(f"{choice.where(key)}: unknown key '{key}'{hint}")
    return choice


def _resolve_sources(data: dict[str, Any], choice: Composed) -> None:
    """Give each source of a mixture all its options, so that a stored config needs no YAML of a source."""
    sources, example = data.get("sources"), "data.sources={hh: 0.3, tulu3: 0.7}"
    if choice.choices.get("data") == "mixture" and not sources:
        raise ConfigError(f"data=mixture: name its sources with their weights, for instance '{example}'")
    if not isinstance(sources, dict) or not sources:
        return
    names = [name for name in groups(choice.own)["data"] if name != "mixture"]
    default = _of_yaml("jsonl", None)
    for_each = {option: data[option] for option in FOR_EACH if data[option] != default[option]}
    for name, given in sources.items():
        key, is_weight = f"data.sources.{name}", isinstance(given, int | float) and not isinstance(given, bool)
        if not is_weight and not isinstance(given, dict):
            raise FieldError(key, given, "must be a weight, or options such as {train: pairs.jsonl, weight: 0.5}")
        own = {"weight": given} if is_weight else dict(given)
        chosen = str(own.pop("data", name if name in names or "train" not in own else "jsonl"))
        sources[name] = _options_of_source(_of_data_set(key, chosen, names, choice.own), for_each, own)


def _of_data_set(key: str, name: str, names: Sequence[str], own: Path | None) -> dict[str, Any]:
    """The options of the YAML that a source is read with; ConfigError where there is none, or a mixture."""
    if name not in names:
        of_files = "; for files write {train: pairs.jsonl, weight: 0.5}"
        raise ConfigError(
            f"{key}: no data set is named {safe_text(name, 60)}{did_you_mean(name, names)}{of_files} "
            f"(choices: {', '.join(names)})"
        )
    options = _of_yaml(name, own)
    if options["sources"]:
        raise ConfigError(f"{key}: {name} is a mixture itself; name its sources here")
    return options


def _options_of_source(of_yaml: dict[str, Any], for_each: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The options of one source: those of its YAML, over them what `data` sets for each source, over them its own."""
    options = {**of_yaml, **for_each}
    for option, value in own.items():
        both = isinstance(value, dict) and isinstance(options.get(option), dict)
        options[option] = {**options[option], **value} if both else value
    foreign = (*OF_WHOLE, *MIXTURE)
    kept = {option: value for option, value in options.items() if option not in foreign or option in own}
    return {"weight": None, "pairs": None, **kept}


def _of_yaml(name: str, own: Path | None) -> dict[str, Any]:
    """The options of a data set with a YAML."""
    options: dict[str, Any] = _composed("train", parse_overrides([f"data={name}"]), RunConfig, own).container["data"]
    return options


def _optional(schema: type, key: str) -> bool:
    return type(None) in get_args(schema_fields(schema)[key].annotation)


def _hydra_words(override: Override, optional: list[str]) -> list[str]:
    """An override in the words that Hydra takes."""
    key, word = override.key_or_group, (override.input_line or "").lstrip("+")
    if key in groups() and not override.is_sweep_override() and override.value() is None:
        return []  # null of a group is nothing chosen
    # A key of a mapping that is empty in the YAML file, or of a group of which nothing is chosen, is added.
    added = f"{key}.".startswith(MAPPINGS) or ("." in key and key.split(".")[0] in optional)
    return [f"++{word}" if added else word]


def _not_composed(error: Exception, own: Path | None) -> str:
    """Why Hydra did not compose, in one line, with the user's file where it names one."""
    words = first_line(error)
    inside = re.match(r"In '([\w./-]+)': (.*)", words)
    if inside and own is not None and (file := own / f"{inside[1]}.yaml").is_file():
        lines = enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1)
        line = next((number for number, text in lines if text.startswith("defaults")), 1)
        return f"{_shown(file, own)} line {line}: {inside[2]}"
    return f"the command line does not compose: {words}"


def composed_run(overrides: list[Override], own: Path | None = None) -> Composed:
    """The config of dpo-train, with the defaults of its objective; ConfigError for a group that it does not use."""
    choice = composed("train", overrides, RunConfig, own)
    rules = OBJECTIVES.get(str(choice.container.get("objective")), ObjectiveRules())
    given = {override.key_or_group: override.input_line for override in overrides}
    for key, written in given.items():
        if key.split(".")[0] in rules.unused:
            raise ConfigError(f"{written}: {rules.unused[key.split('.')[0]]}")
    for key, value in rules.defaults.items():
        # A value that an experiment sets is the user's too: it is checked, not replaced.
        if key not in given and choice.where(key).startswith(f"{conf_dir().name}/train.yaml "):
            *groups_of_key, leaf = key.split(".")
            functools.reduce(lambda container, group: container[group], groups_of_key, choice.container)[leaf] = value
    return choice


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
