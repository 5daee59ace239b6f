"""What the documents say is so: tests that they name exist, commands compose, links lead somewhere."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ended
from documents import PAGES, README, commands

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
    assert len(mutants) > 150
    for mutant in mutants:
        assert (ROOT / mutant.file).read_text().count(mutant.old) == 1, mutant.name


def test_every_fault_of_the_published_table_is_tried_by_its_number() -> None:
    rows = dict(re.findall(r"^\| (\d+) \| ([^|]+) \|", (ROOT / "docs" / "faults.md").read_text(), re.M))
    tests = "".join(path.read_text() for path in (ROOT / "tests" / "faults").glob("*.py"))
    tried = set(re.findall(r"\bfault\((\d+)", tests)) | set(re.findall(r"^(?:data|row)\('[^']+', (\d+)", tests, re.M))
    assert set(rows) == {str(number) for number in range(1, 25)}
    assert set(rows) - tried == set()


def test_every_command_in_the_guides_composes(
    command: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "tests" / "runs" / "version-1" / "dpo", "outputs/a")
    Path("run.yaml").write_text("data: jsonl\ndata.train: pairs.jsonl\n")
    for group, line in (("data", "train: pairs.jsonl"), ("model", "name_or_path: path/to/my-sft")):
        Path("my_conf", group).mkdir(parents=True)
        Path("my_conf", group, "mine.yaml").write_text(f"defaults: [_base, _self_]\n{line}\n")
    shown = [words for page in PAGES for words in commands(page)]
    assert len(shown) > 30 and {words[0] for words in shown} == {f"dpo-{name}" for name in (
        "train", "eval", "sample", "label", "rank", "data", "compare", "export"
    )}  # fmt: skip
    made = {
        "loss=cubic",
        "optimizer=nadam",
        "data.format=qa",
        "model=mine",
        "objective=near",
        "tracker=csv",
    }  # by diffs
    for words in shown:
        if not made & set(words) or "--config-dir" in words:
            ended = command(*words, "--print-config")
            assert ended.code == 0, (words, ended.err)


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for link in re.findall(r"\]\((?!https://)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link


def test_every_page_is_linked_from_another() -> None:
    for page in PAGES:
        others = "".join(other.read_text(encoding="utf-8") for other in PAGES if other != page)
        assert page == README or f"{page.name})" in others or f"{page.name}#" in others, page.name


def test_make_targets_that_are_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in PAGES:
        for target in set(re.findall(r"(?:`|^    )make ([a-z-]+)", page.read_text(encoding="utf-8"), re.M)):
            assert re.search(rf"^{target}:", makefile, re.M), (page.name, target)


# Phrases that people did not understand.
UNCLEAR = (
    r"\bgo(es)? on with|(?<!has )come to its end|you can believe|rate is never reached|whole when|when all is drawn"
    r"|no usable pair|without reference, reference|\bstill: "
)


def test_phrases_that_people_did_not_understand_are_gone() -> None:
    for path in [*PAGES, *sorted((ROOT / "dpo_cli").rglob("*.py")), *sorted((ROOT / "conf").rglob("*.yaml"))]:
        assert re.findall(UNCLEAR, path.read_text(encoding="utf-8")) == [], path


# Keys of an earlier version, and phrases that the field does not use.
OLD_WORDS = (
    r"radar|batching=|\bdials?\b|chosen_finished|rejected_finished|labels=drawn|\bjournal\b|rehears|as asked|at hand\b"
    r"|gone on with|goes on\b|by heart|\blest\b|numbers you can believe|rambling to direct|in company"
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_words_are_those_of_the_field(page: Path) -> None:
    assert re.findall(OLD_WORDS, page.read_text(encoding="utf-8"), re.I) == []
