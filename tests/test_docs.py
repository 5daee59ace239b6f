"""The table of proofs names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_test_named_in_the_table_of_proofs_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "correctness.md").read_text()))
    assert len(named) > 30
    written = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert {name for name in named if f"def {name}(" not in written} == set()


def test_every_identity_has_a_row() -> None:
    table = (ROOT / "docs" / "correctness.md").read_text()
    assert set(re.findall(r"^\| ([A-M])\. ", table, re.M)) == set("ABCDEFGHIJKLM")


def test_the_patterns_of_the_mutants_stand_once_in_the_program() -> None:
    import runpy

    mutants = runpy.run_path(str(ROOT / "scripts" / "mutants.py"))["MUTANTS"]
    assert len(mutants) >= 25
    for mutant in mutants:
        assert (ROOT / mutant.file).read_text().count(mutant.old) == 1, mutant.name
