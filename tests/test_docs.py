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


def test_every_fault_of_the_published_table_is_tried_by_its_number() -> None:
    rows = dict(re.findall(r"^\| (\d+) \| ([^|]+) \|", (ROOT / "docs" / "faults.md").read_text(), re.M))
    tests = "".join(path.read_text() for path in (ROOT / "tests" / "faults").glob("*.py"))
    tried = set(re.findall(r"\bfault\((\d+)", tests)) | set(re.findall(r"^(?:data|row)\('[^']+', (\d+)", tests, re.M))
    assert set(rows) == {str(number) for number in range(1, 25)}
    assert set(rows) - tried == set()
