"""Which YAML of conf/data/ reads rows with these columns: for messages about rows that another one does not read."""

from collections.abc import Collection, Mapping
from functools import cache
from itertools import chain
from typing import Any

import yaml

from dpo_cli.config.composition import conf_dir
from dpo_cli.data.formats import CONTEXT, OTHER_NAMES, Row
from dpo_cli.data.mapping import OPTIONAL, Columns

# What the formats read without a mapping.
OWN_NAMES = {"prompt", "chosen", "rejected", "responses", "scores", *CONTEXT}
PLAIN = {"prompt", "chosen", "rejected"}
UNPAIRED = "; rows of one completion with a label are for KTO, which dpo-cli does not train: a row needs two responses"


def form_of(row: Row, columns: Columns, sentence: str) -> str:
    """A sentence about the packaged YAML whose mapping finds all its columns in the row; "" where there is none.

    `{form}` in the sentence becomes `data=NAME`, with the name of the prompt where that alone differs; `{columns}` what
    this YAML reads and `columns` do not. A YAML that reads nothing more than the formats do is never named.
    """
    full = {str(name) for name, cell in row.items() if cell is not None}
    if {"completion", "label"} <= full and not full & {"chosen", "rejected", "responses"}:
        return UNPAIRED
    ours = _needed(columns) | _may_have(columns)
    our_prompt = _needed({"prompt": columns.get("prompt", "prompt"), "responses": "responses"})
    found, most = "", 0
    for name, theirs in _mappings().items():
        needed, may_have = _needed(theirs), _may_have(theirs)
        special = (needed | may_have) & full - ours - OWN_NAMES
        if our_prompt - {"responses"} <= full:  # another YAML's column for the prompt adds nothing
            special -= _columns_of(theirs, ("prompt",))
        absent = needed - full
        word = f"data={name}"
        if len(special) > 1 and isinstance(prompt := theirs.get("prompt", "prompt"), str) and absent == {prompt}:
            other = next((other for other in ("prompt", *OTHER_NAMES["prompt"]) if other in full - needed), "")
            word, absent = f"data={name} data.columns.prompt={other}", absent if not other else set()
        if special and not absent and len((needed | may_have) & full) > most:
            most = len((needed | may_have) & full)
            found = sentence.format(form=word, columns=", ".join(str(key) for key in row if key in special))
    if not found and full >= PLAIN and not _needed(columns) <= full:  # a YAML was named, and its columns are not there
        return sentence.format(form="data=jsonl", columns=", ".join(sorted(PLAIN)))
    return found


def _needed(columns: Mapping[str, Any]) -> set[str]:
    """The columns of a row that a mapping needs."""
    sides = ("prompt",) if columns.get("responses") else ("prompt", "chosen", "rejected")
    named = {side: side for side in sides} | dict(columns)
    return _columns_of(named, named.keys() - set(OPTIONAL))


def _may_have(columns: Mapping[str, Any]) -> set[str]:
    """The columns of a row that a mapping reads where they are; `source` changes no pair."""
    return _columns_of(columns, set(OPTIONAL) - {"source"})


def _columns_of(columns: Mapping[str, Any], names: Collection[str]) -> set[str]:
    paths = [[one] if isinstance(one, str) else one for key, one in columns.items() if one and key in names]
    return {path.split(".")[0] for path in chain.from_iterable(paths)}


@cache
def _mappings() -> dict[str, dict[str, Any]]:
    """The `columns` of every packaged YAML that has any, by its name."""
    found = {}
    for file in sorted((conf_dir() / "data").glob("[!_]*.yaml")):
        columns = yaml.safe_load(file.read_text(encoding="utf-8")).get("columns")
        if columns:
            found[file.stem] = columns
    return found
