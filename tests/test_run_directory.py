"""What an attempt leaves in its run directory, and what a sweep makes of several."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ended, sample_rows, tiny_words, write_jsonl

from dpo_cli.errors import DataError, DivergedError, DpoError, StoppedError
from dpo_cli.runs.run_directory import RunDirectory

Command = Callable[..., Ended]


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words of a run on a file with a bad row, in a working directory of its own, without output_dir."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    bad = write_jsonl(tmp_path / "bad.jsonl", [*sample_rows(10), {"prompt": "p"}])
    return tiny_words(bad, tmp_path)[:-1]


def found(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("more", [[], ["output_dir=new/run"], ["output_dir=new/run", "resume=auto"]])
def test_an_attempt_that_fails_before_its_first_step_leaves_nothing(
    command: Command, words: list[str], more: list[str]
) -> None:
    ended = command("dpo-train", *words, *more)
    assert ended.code == 3 and "line 11: no 'chosen' key" in ended.err
    assert found(Path()) == []


def test_what_was_there_before_a_failed_attempt_stays(command: Command, words: list[str]) -> None:
    Path("mine").mkdir()
    assert command("dpo-train", *words, "output_dir=mine").code == 3
    assert found(Path()) == ["mine"]
    Path("mine/notes").touch()
    assert command("dpo-train", *words, "output_dir=mine").code == 3
    assert "mine/notes" in found(Path())


@pytest.mark.parametrize(
    ("error", "writes", "left"),
    [
        (DataError, ["train.log", "reference_logps.bin"], []),
        (StoppedError, ["train.log"], [".lock", "checkpoints", "train.log"]),  # is resumed here
        (DivergedError, ["config.yaml", "train.log"], [".lock", "checkpoints", "config.yaml", "train.log"]),
    ],
)
def test_what_a_failed_run_leaves_depends_on_how_far_it_came(
    tmp_path: Path, error: type[DpoError], writes: list[str], left: list[str]
) -> None:
    directory = RunDirectory(tmp_path / "a" / "b")
    with pytest.raises(error), directory.owned():
        for name in writes:
            (directory.path / name).touch()
        raise error("why")
    assert (tmp_path / "a").exists() == bool(left)
    assert (found(directory.path) if left else []) == left
