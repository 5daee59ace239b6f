"""What an attempt leaves in its run directory, and what a sweep makes of several."""

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ended, run_of, sample_rows, tiny_words, write_jsonl

from dpo_cli.commands.sweep import run_name, wait_for
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


def test_the_folder_of_a_sweeps_run_says_what_differs() -> None:
    assert run_name({"beta": "0.1", "loss": "ipo"}) == "beta-0.1_loss-ipo"
    assert run_name({"optimizer.lr": "1e-05"}) == "optimizer.lr-1e-05" and run_name({}) == "run"
    paths = [run_name({"data.train": name}) for name in ("a b.jsonl", "a=b.jsonl", "../a,b.jsonl", "x" * 500)]
    assert paths[0].startswith("data.train-a-b.jsonl-") and len({*paths}) == 4
    assert all(re.fullmatch(r"[A-Za-z0-9.+_-]{1,109}", path) for path in paths)


@pytest.mark.usefixtures("runs_in_this_process")
def test_a_sweep_resumes_each_of_its_runs(command: Command, tmp_path: Path) -> None:
    """Of three runs one is finished, one was stopped, one has not begun."""
    good = write_jsonl(tmp_path / "good.jsonl", sample_rows(20))
    words, folder = tiny_words(good, tmp_path)[:-1], tmp_path / "sweep"
    run_of(*words, "seed=1", f"output_dir={folder / 'seed-1'}")
    run_of(*words, "seed=2", "max_steps=2", f"output_dir={folder / 'seed-2'}")
    shutil.rmtree(folder / "seed-2" / "final")
    sweep = ["-m", *words, "seed=1,2,3", f"output_dir={folder}"]
    assert command("dpo-train", *sweep).err == (
        f"error: output_dir={folder}: holds seed-1 already; resume=auto continues it\n"
    )
    ended = command("dpo-train", *sweep, "resume=auto")
    assert (ended.code, ended.err) == (0, "")
    assert f"already complete: {folder / 'seed-1' / 'final'}" in ended.out
    assert f"resuming from {folder / 'seed-2' / 'checkpoints' / 'step-00000002'} at step 2" in ended.out
    assert f"no checkpoint in {folder / 'seed-3'} yet: starting from the beginning" in ended.out
    assert [line.split()[0] for line in ended.out.splitlines()[-5:-2]] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("folder", "says"),
    [("[a,b]", "['a', 'b']: must be text or null"), ("", ": is empty; leave it out, or name a directory")],
)
def test_the_folder_of_a_sweep_is_checked_like_that_of_a_run(command: Command, folder: str, says: str) -> None:
    ended = command("dpo-train", "-m", "model=tiny", "seed=1,2", f"output_dir={folder}", "--print-config")
    assert (ended.code, ended.err) == (2, f"error: output_dir={says}\n")


@pytest.mark.parametrize(("kind", "code"), [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGINT", 130)])
def test_a_signal_to_a_sweep_lets_its_run_save(kind: str, code: int) -> None:
    # The run tells the sweep to stop; a terminal would have sent Ctrl-C to the run as well.
    program = f"""
import os, signal, sys, time
signal.signal(signal.{kind}, lambda *_: (time.sleep(0.5), os._exit({code})))
os.kill(os.getppid(), signal.{kind})
if signal.{kind} == signal.SIGINT:
    os.kill(os.getpid(), signal.SIGINT)
time.sleep(60)
"""
    assert wait_for([sys.executable, "-c", program]) == code


def test_a_run_that_a_signal_kills_as_it_starts_ends_the_sweep() -> None:
    assert wait_for([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"]) == 75
