"""YAML files as people write them: where each key stands, and a file of overrides as words of a command line."""

import re
from collections.abc import Iterator
from typing import Any

import yaml

from dpo_cli.config.versions import migrate, refuse_bombs
from dpo_cli.console.text import hydra_quoted, safe_text
from dpo_cli.errors import ConfigError
from dpo_cli.paths import user_path

MAX_BYTES = 2**20


def keys_and_lines(text: str, shown: str) -> Iterator[tuple[str, Any, int]]:
    """Each key of a YAML text that holds a value, as a dotted path, with its value and its line, from 1.

    Values are read as on a command line: 1e-4 is a number, off is text. ConfigError where the text is no YAML mapping.
    """
    try:
        refuse_bombs(text, shown, ConfigError)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{shown} line {line}: not valid YAML ({error.problem})") from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:  # "\UFFFFFFFF" is beyond Unicode
        raise ConfigError(f"{shown}: not valid YAML ({safe_text(error, 80)})") from None
    if node is None:
        return
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{shown} line {node.start_mark.line + 1}: must be keys with values, such as beta: 0.1")
    yield from _entries(node, "", shown)


def _entries(node: yaml.MappingNode, prefix: str, shown: str) -> Iterator[tuple[str, Any, int]]:
    seen: set[str] = set()
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{shown} line {line}: a key must be a name, such as beta")
        key = f"{prefix}{key_node.value}"
        if key in seen:
            raise ConfigError(f"{shown} line {line}: '{key}' stands here twice")
        seen.add(key)
        if isinstance(value_node, yaml.MappingNode) and value_node.value:
            yield from _entries(value_node, f"{key}.", shown)
        else:
            yield key, _value(value_node), line


def _value(node: yaml.Node) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_value(part) for part in node.value]
    if isinstance(node, yaml.MappingNode):
        return {str(key.value): _value(value) for key, value in node.value}
    text = str(node.value)
    if getattr(node, "style", None) is not None:  # in quotes: text, whatever it looks like
        return text
    if node.tag == "tag:yaml.org,2002:null":
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text


def override_value(value: Any) -> str:
    """A value in Hydra's grammar."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(override_value, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{override_value(part)}' for key, part in value.items())}}}"
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z_./][\w./:-]*", value, re.ASCII) and value.lower() not in (
            "null",
            "true",
            "false",
            "nan",
            "inf",
        )
        return value if plain else hydra_quoted(value)
    return repr(value)


def overrides_in(file: str, keys: set[str]) -> dict[str, tuple[Any, str]]:
    """The overrides in a user's file: a dotted key with its value, and where it stands.

    A file that says its `version`, such as a run's config.yaml, is brought to today's `keys`.
    """
    path = user_path(file, ConfigError, "--config")
    shown = safe_text(file)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"--config {shown}: too large for a file of overrides ({path.stat().st_size:,} bytes)")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"--config {shown}: cannot be read ({reason})") from None
    found = {key: (value, line) for key, value, line in keys_and_lines(text, shown)}
    values = {key: value for key, (value, _) in found.items()}
    if "version" in values:
        migrate(values, values.pop("version"), shown, ConfigError)
        values = {key: value for key, value in values.items() if key in keys or key in found}
    return {key: (value, f"{shown} line {found[key][1]}" if key in found else shown) for key, value in values.items()}
