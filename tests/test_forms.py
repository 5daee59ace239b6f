"""The table of scripts/forms.py: every form that people have is read with the labels of its rows."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from forms import FORMS, Form, main, read

from dpo_cli.config.composition import conf_dir
from dpo_cli.data.mapping import OPTIONAL

NAMES = [form.name for form in FORMS]
READ = [form for form in FORMS if not form.refused]
DOCS = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")


def columns_of(form: Form) -> dict[str, str | list[str] | None]:
    """The columns that the YAML of a form names."""
    file = conf_dir() / form.data.replace("=", "/", 1)
    columns: dict[str, str | list[str] | None] = yaml.safe_load(file.with_suffix(".yaml").read_text()).get(
        "columns", {}
    )
    return columns


def test_there_are_two_dozen_forms_with_different_names() -> None:
    assert len(READ) >= 24 and len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_a_form_is_read_with_its_labels_or_refused_with_a_reason(form: Form) -> None:
    found = read(form)
    assert (found.loads, found.is_right, found.unused) == (not form.refused, not form.refused, form.unused)
    assert form.refused in found.problem and "\n" not in found.problem


@pytest.mark.parametrize("form", READ, ids=[form.name for form in READ])
def test_a_swapped_preference_is_noticed(form: Form) -> None:
    assert not read(replace(form, row=lambda better: form.row(1 - better))).is_right


def test_the_table_is_printed_a_line_a_form(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    lines = capsys.readouterr().out.splitlines()
    assert [re.split(r"  +", line)[0] for line in lines] == ["form", *NAMES]
    assert "WRONG" not in "".join(lines)
    assert sum(re.split(r"  +", line)[2:4] == ["yes", "right"] for line in lines) == len(READ)


@pytest.mark.parametrize("form", READ, ids=[form.name for form in READ])
def test_a_row_without_a_column_that_its_yaml_names_is_refused_with_line_and_column(form: Form) -> None:
    row = form.row(0)
    for name, path in columns_of(form).items():
        if path is None or name in OPTIONAL or (name == "prompt" and isinstance(path, list)):
            continue  # of the columns of a prompt one is enough
        for one in [path] if isinstance(path, str) else path:
            without = {key: value for key, value in row.items() if key != one.split(".")[0]}
            problem = read(replace(form, row=lambda _, rest=without: rest)).problem  # type: ignore[misc]
            assert re.match(
                rf"rows\.jsonl line 1: no '{one.split('.')[0]}[.\w]*' key \(data\.columns\.\w+\); it has ", problem
            )
            assert "\n" not in problem


def test_the_documents_list_each_yaml_with_the_columns_that_it_reads() -> None:
    table = DOCS.split("## Sets with a YAML")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \| .+ \|$", table, re.M))
    files = {file.stem: file for file in (conf_dir() / "data").glob("[!_]*.yaml")}
    del files["sample"], files["mixture"]  # they read no form of their own
    assert rows.keys() == files.keys()
    assert files.keys() == {form.data.removeprefix("data=") for form in FORMS}
    for name, file in files.items():
        columns = yaml.safe_load(file.read_text(encoding="utf-8")).get("columns", {})
        for column in columns.values():
            for path in [column] if isinstance(column, str) else column or []:
                if path not in ("source", "domain", "question.dataset"):
                    assert all(f"`{part}`" in rows[name] or f"`{path}`" in rows[name] for part in path.split(".")), path
