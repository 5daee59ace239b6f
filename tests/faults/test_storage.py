"""Faults 4 to 7, 18 and 24: disks that are full or gone, damaged files, two runs in one place, clocks."""

import os
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Ended, records, tiny_words
from harness import LEDGER, before_step, content, fault, run_words, same_content, start, straight, wrap  # noqa: F401

from dpo_cli.errors import CheckpointError, ConfigError
from dpo_cli.runs.checkpoint import MANIFEST, checkpoints, newest_valid, validate
from dpo_cli.storage.logps_file import RECORD, checks

pytestmark = pytest.mark.faults
Straight = Callable[..., dict[str, bytes]]
Command = Callable[..., Ended]


# Fault 4: no room. A limit on the size of files is what a process can set itself that the system then enforces.


def no_room(bytes_a_file: int, first: int, last: int, more_metrics: int | None = None) -> Callable[[], None]:
    """In a child: from step `first` on files cannot grow beyond a size; from step `last` on they can again.

    `more_metrics` instead lets metrics.jsonl grow by so many bytes: a line is cut in its middle.
    """

    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def limit(context: Any, _: Any, step: int) -> None:
        if step == first:
            size = bytes_a_file
            if more_metrics is not None:
                size = context.directory.metrics.path.stat().st_size + more_metrics
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        if step == last:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    return lambda: before_step(limit)


ALL = ("keep_checkpoints=9", "save_every=1")


def test_a_save_without_room_is_tried_again_and_the_run_ends_the_same(tmp_path: Path, straight: Straight) -> None:
    with fault(4):
        left = start(tmp_path, run_words(tmp_path, *ALL), no_room(30_000, 2, 4)).wait()
        assert left.code == 0, left.err
        names = [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")]
        assert names == [f"step-0000000{step}" for step in (1, 2, 5, 6)]
        assert left.out.count("the checkpoint cannot be written") == 2
        assert "; trying again at the next checkpoint" in left.out
        LEDGER.compared[4] += same_content(tmp_path / "run", straight(*ALL))


def test_metrics_without_room_wait_and_none_is_lost(tmp_path: Path, straight: Straight) -> None:
    with fault(4):
        words = run_words(tmp_path, *ALL, "log_every=1")
        left = start(tmp_path, words, no_room(0, 2, 4, more_metrics=50)).wait()
        assert left.code == 0, left.err
        assert left.out.count("; its lines wait in memory") == 1
        LEDGER.compared[4] += same_content(tmp_path / "run", straight(*ALL, "log_every=1"))


def test_a_checkpoint_counts_no_line_of_metrics_that_is_not_on_disk(tmp_path: Path, straight: Straight) -> None:
    """Metrics that wait go with the process that is killed: a checkpoint that counted them could not be resumed."""
    more = ("save_every=1", "log_every=1", "keep_checkpoints=9")

    def metrics_full_then_killed() -> None:
        from dpo_cli.storage import line_log

        write = line_log.MetricsLog._write

        def full(self: Any) -> None:
            raise OSError(28, "No space left on device")

        def step(_: Any, __: Any, step: int) -> None:
            line_log.MetricsLog._write = full if step >= 2 else write  # type: ignore[method-assign]
            if step == 4:
                os._exit(137)

        before_step(step)

    with fault(4):
        killed = start(tmp_path, run_words(tmp_path, *more), metrics_full_then_killed).wait()
        assert killed.code == 137 and "metrics.jsonl: cannot be written" in killed.out
        assert checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step-00000002"
        assert start(tmp_path, run_words(tmp_path, *more, "resume=auto")).wait().code == 0
        LEDGER.compared[4] += same_content(tmp_path / "run", straight(*more))


def test_a_run_whose_end_finds_no_room_ends_with_7_keeps_what_it_has_and_goes_on_later(
    tmp_path: Path,
    straight: Straight,
) -> None:
    with fault(4):
        left = start(tmp_path, run_words(tmp_path), no_room(30_000, 3, 99)).wait()
        run = tmp_path / "run"
        assert left.code == 7, left
        assert left.err.startswith(f"error: {run}/checkpoints/step-00000006: the checkpoint cannot be written (")
        assert [path.name for path in checkpoints(run / "checkpoints")] == ["step-00000002"]
        validate(run / "checkpoints" / "step-00000002")
        assert start(tmp_path, run_words(tmp_path, "resume=auto")).wait().code == 0
        LEDGER.compared[4] += same_content(run, straight())


def test_nothing_is_pruned_before_the_new_checkpoint_is_valid(tmp_path: Path) -> None:
    with fault(4):
        words = run_words(tmp_path, "save_every=1", "keep_checkpoints=1", "eval_every=0")
        left = start(tmp_path, words, no_room(30_000, 3, 99)).wait()
        assert left.code == 7
        assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000003"]


def test_a_stop_without_room_says_so_and_keeps_the_last_checkpoint(tmp_path: Path, straight: Straight) -> None:
    def full_and_stopped() -> None:
        no_room(30_000, 3, 99)()
        before_step(lambda _, __, step: os.kill(os.getpid(), 15) if step == 4 else None)

    with fault(4):
        left = start(tmp_path, run_words(tmp_path), full_and_stopped).wait()
        assert left.code == 7 and "step-00000004: the checkpoint cannot be written" in left.err
        assert start(tmp_path, run_words(tmp_path, "resume=auto")).wait().code == 0
        LEDGER.compared[4] += same_content(tmp_path / "run", straight())


def test_a_resumed_run_gives_back_the_room_of_the_checkpoint_it_came_from(tmp_path: Path) -> None:
    """A file that is removed while it is mapped keeps its room on the disk until the run ends."""

    def list_maps() -> None:
        def around(original: Callable[..., Any]) -> Callable[..., Any]:
            def finish(recorder: Any) -> None:
                (tmp_path / "maps").write_text(Path("/proc/self/maps").read_text())
                original(recorder)

            return finish

        wrap("finish", around)

    with fault(4):
        words = run_words(tmp_path, "keep_checkpoints=1", "eval_every=0")
        child = start(tmp_path, words)
        while child.reach("training") and not (tmp_path / "run" / "checkpoints" / "step-00000002").exists():
            time.sleep(0.001)
        child.send(9)
        child.wait()
        left = start(tmp_path, [*words, "resume=auto"], list_maps).wait()
        assert left.code == 0 and "resuming from" in left.out
        assert "step-00000" not in (tmp_path / "maps").read_text()


# Fault 5: the console


@pytest.mark.parametrize("place", ["/dev/full", "closed pipe"])
def test_a_console_that_cannot_be_written_changes_no_byte(tmp_path: Path, straight: Straight, place: str) -> None:
    def broken() -> None:
        if place == "closed pipe":
            reader, writer = os.pipe()
            os.close(reader)
        else:
            writer = os.open(place, os.O_WRONLY)
        os.dup2(writer, 1)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115

    with fault(5):
        left = start(tmp_path, run_words(tmp_path), broken).wait()
        assert (left.code, left.err) == (0, "")
        LEDGER.compared[5] += same_content(tmp_path / "run", straight())
        assert "step 6/6" in (tmp_path / "run" / "train.log").read_text()  # what the console missed is there


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_a_stream_that_was_never_open_changes_no_byte(tmp_path: Path, straight: Straight, closed: str) -> None:
    import shlex
    import subprocess

    with fault(5):
        program = [sys.executable, "-c", "from dpo_cli.cli import train; train()", *run_words(tmp_path)]
        done = subprocess.run(["bash", "-c", f"exec {shlex.join(program)} {closed}"], capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, b"")
        LEDGER.compared[5] += same_content(tmp_path / "run", straight())
        assert (tmp_path / "run" / ".lock").read_text().startswith("process ")  # and nothing else in it


def test_a_reader_that_goes_away_changes_no_byte(tmp_path: Path, straight: Straight) -> None:
    """`dpo-train ... | head -1`."""
    reader, writer = os.pipe()

    def piped() -> None:
        os.close(reader)
        os.dup2(writer, 1)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115

    with fault(5):
        child = start(tmp_path, run_words(tmp_path), piped)
        os.close(writer)
        with os.fdopen(reader) as lines:
            assert lines.readline().startswith("loading ")
        left = child.wait()
        assert (left.code, left.err) == (0, "")
        LEDGER.compared[5] += same_content(tmp_path / "run", straight())


def test_a_log_without_room_changes_no_byte(tmp_path: Path, straight: Straight) -> None:
    def full() -> None:
        from dpo_cli.console import reporter

        reporter.Reporter.open_log = lambda self, _: original(self, Path("/dev/full"))  # type: ignore[method-assign]

    from dpo_cli.console.reporter import Reporter

    original = Reporter.open_log
    with fault(5):
        left = start(tmp_path, run_words(tmp_path), full).wait()
        assert (left.code, left.err) == (0, "")
        LEDGER.compared[5] += same_content(tmp_path / "run", straight())


# Fault 6: the output directory


@pytest.mark.parametrize("place", ["file", "under a file", "/proc", "no permission", "name too long"])
def test_an_output_directory_that_cannot_be_written_is_said_before_the_model_is_loaded(
    command: Command, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    from dpo_cli.training import build

    monkeypatch.setattr(build, "find_model", lambda *_: pytest.fail("the model was asked for"))
    (tmp_path / "file").write_text("")
    folder, reason = {
        "file": (tmp_path / "file", "Not a directory"),
        "under a file": (tmp_path / "file" / "run", "Not a directory"),
        "/proc": (Path("/proc/run"), "No such file or directory"),
        "no permission": (tmp_path / "closed", "Permission denied"),
        "name too long": (tmp_path / ("x" * 300), "File name too long"),
    }[place]
    if place == "no permission":  # root may write anywhere: the refusal is made here
        original = Path.mkdir

        def refuse(self: Path, *arguments: Any, **more: Any) -> None:
            if self.is_relative_to(folder):
                raise PermissionError(13, "Permission denied")
            original(self, *arguments, **more)

        monkeypatch.setattr(Path, "mkdir", refuse)
    with fault(6):
        ended = command("dpo-train", *tiny_words(pairs_file, folder))
        assert ended.code == 7 and ended.out.count("\n") <= 1  # what it was doing, no more
        said = f"error: output_dir={folder}: cannot be written ({reason})\n"
        if place == "name too long":
            said = f"error: output_dir={str(folder)[:77]}...: cannot be looked at ({reason})\n"
        assert ended.err == said


# Fault 7: damaged files


def truncate(file: Path, data: bytes) -> None:
    file.write_bytes(data[:-1])


def empty(file: Path, data: bytes) -> None:
    file.write_bytes(b"")


def flip(file: Path, data: bytes) -> None:
    middle = len(data) // 2
    file.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])


def delete(file: Path, data: bytes) -> None:
    file.unlink()


def append(file: Path, data: bytes) -> None:
    file.write_bytes(data + b"\0")


FILES = ["adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors", "rng.safetensors",
         "window.safetensors", "state.json", MANIFEST]  # fmt: skip


@pytest.mark.parametrize("harm", [truncate, empty, flip, delete, append])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_its_checkpoint_passed_over(
    tmp_path: Path, finished: Path, name: str, harm: Callable[[Path, bytes], None]
) -> None:
    with fault(7):
        folder = tmp_path / "checkpoints"
        shutil.copytree(finished / "checkpoints", folder)
        file = checkpoints(folder)[-1] / name
        harm(file, file.read_bytes())
        named = "step-00000006" if (name, harm) == (MANIFEST, flip) else name  # a flipped digest speaks of another file
        with pytest.raises(CheckpointError, match=re.escape(named)):
            validate(file.parent)
        found, passed = newest_valid(folder)
        assert found == checkpoints(folder)[-2]
        assert len(passed) == 1 and named in passed[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, straight: Straight) -> Path:
    """A finished run with its last checkpoints."""
    folder = tmp_path_factory.mktemp("finished")
    assert start(folder, run_words(folder)).wait().code == 0
    return folder / "run"


@pytest.mark.parametrize("name", [*FILES, "metrics.jsonl"])
def test_a_run_with_a_damaged_file_says_so_and_comes_to_the_same_bytes(
    tmp_path: Path,
    straight: Straight,
    name: str,
) -> None:
    with fault(7, tries=2):
        assert start(tmp_path, run_words(tmp_path)).wait().code == 0
        run = tmp_path / "run"
        shutil.rmtree(run / "final")
        last = checkpoints(run / "checkpoints")[-1]
        file = run / name if name == "metrics.jsonl" else last / name
        truncate(file, file.read_bytes())
        explicit = start(tmp_path, [word for word in run_words(tmp_path, f"resume={last}") if "output_dir" not in word])
        left = explicit.wait()
        if name == "metrics.jsonl":  # half of a line: the evaluation at the end, which comes after the checkpoint
            assert left.code == 0
        else:
            assert left.code == 4 and left.err.startswith(f"error: {file}: ") and left.err.count("\n") == 1
            left = start(tmp_path, run_words(tmp_path, "resume=auto")).wait()
            assert left.code == 0 and f"warning: passed over a checkpoint: {file}: " in left.out
        LEDGER.compared[7] += same_content(run, straight())


def test_metrics_shorter_than_their_checkpoint_are_refused(tmp_path: Path, finished: Path) -> None:
    from dpo_cli.storage.line_log import MetricsLog

    with fault(7):
        lines = (finished / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines[:2]))
        with pytest.raises(CheckpointError, match=r"has 2 lines; the checkpoint was saved after 4"):
            MetricsLog(tmp_path / "metrics.jsonl").cut(4)


@pytest.mark.parametrize("line", [b"{}\n", b"[1]\n", b'{"step": 1, "split": "tr\n', b"\xff\n", b"null\n"])
def test_metrics_with_a_line_that_is_not_the_runs_own_are_refused_by_its_number(
    tmp_path: Path, finished: Path, line: bytes
) -> None:
    from dpo_cli.storage.line_log import MetricsLog

    with fault(7):
        lines = (finished / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        (tmp_path / "metrics.jsonl").write_bytes(b"".join([lines[0], line, *lines[2:]]))
        with pytest.raises(CheckpointError, match="line 2: is not a line that this run has written"):
            MetricsLog(tmp_path / "metrics.jsonl").cut(4)


def test_a_run_of_which_no_checkpoint_is_valid_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    with fault(7):
        assert start(tmp_path, run_words(tmp_path)).wait().code == 0
        run = tmp_path / "run"
        shutil.rmtree(run / "final")
        for checkpoint in checkpoints(run / "checkpoints"):
            (checkpoint / "state.json").unlink()
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
        left = start(tmp_path, run_words(tmp_path, "resume=auto")).wait()
        assert left.code == 4 and "no valid checkpoint in it; " in left.err and left.err.count("\n") == 1
        assert before == {path: path.stat().st_mtime_ns for path in before}


def test_the_runs_own_reference_values_damaged_are_said_and_computed_again(tmp_path: Path, straight: Straight) -> None:
    with fault(7):
        assert start(tmp_path, run_words(tmp_path)).wait().code == 0
        run = tmp_path / "run"
        shutil.rmtree(run / "final")
        shutil.rmtree(checkpoints(run / "checkpoints")[-1])
        flip(run / "reference_logps.bin", (run / "reference_logps.bin").read_bytes())
        left = start(tmp_path, run_words(tmp_path, "resume=auto")).wait()
        said = "reference_logps.bin: missing or damaged; the run continues with the log-probs of the cache"
        assert left.code == 0 and said in left.out
        LEDGER.compared[7] += same_content(run, straight())


def test_values_that_another_run_left_in_the_cache_do_not_change_a_resumed_run(
    tmp_path: Path, straight: Straight
) -> None:
    """In bfloat16 values computed beside other pairs differ by a rounding; here all are moved by one, on purpose."""
    more = ("model.dtype=bfloat16",)
    with fault(7):
        assert start(tmp_path, run_words(tmp_path, *more)).wait().code == 0
        run = tmp_path / "run"
        shutil.rmtree(run / "final")
        shutil.rmtree(checkpoints(run / "checkpoints")[-1])
        (shared,) = (tmp_path / "cache" / "reference").glob("*.logps")
        values = np.frombuffer(shared.read_bytes(), dtype=RECORD).copy()
        values["logp"] += 0.01
        values["check"] = checks(values)
        shared.write_bytes(values.tobytes())
        assert start(tmp_path, run_words(tmp_path, *more, "resume=auto")).wait().code == 0
        LEDGER.compared[7] += same_content(run, straight(*more))


# Fault 18: two runs in one directory


def test_the_second_run_in_a_directory_hears_who_is_at_work_there(tmp_path: Path, straight: Straight) -> None:
    with fault(18, tries=2):
        first = start(tmp_path, run_words(tmp_path), lambda: slowly())
        assert first.reach("training")
        for more in ((), ("resume=auto",)):
            second = start(tmp_path / "second", run_words(tmp_path, *more)).wait()
            assert second.code == 2 and second.err.count("\n") == 1
            assert second.err.startswith(f"error: output_dir={tmp_path / 'run'}: in use by process {first.pid} on ")
            assert second.err.endswith("; wait for it, or name another output_dir\n")
        assert first.wait().code == 0
        LEDGER.compared[18] += same_content(tmp_path / "run", straight())


def slowly() -> None:
    before_step(lambda *_: time.sleep(0.5))


def test_a_directory_whose_owner_was_killed_is_free_again(tmp_path: Path, straight: Straight) -> None:
    with fault(18):
        first = start(tmp_path, run_words(tmp_path), slowly)
        first.reach("training")
        first.send(9)
        first.wait()
        assert start(tmp_path, run_words(tmp_path, "resume=auto")).wait().code == 0
        LEDGER.compared[18] += same_content(tmp_path / "run", straight())


# Fault 24: clocks and names


def test_a_clock_that_jumps_back_an_hour_moves_no_duration(tmp_path: Path, straight: Straight) -> None:
    def jumping() -> None:
        import random

        original = time.time
        time.time = lambda: original() - random.choice([0, 3600, 1e6])

    with fault(24):
        left = start(tmp_path, run_words(tmp_path), jumping).wait()
        assert left.code == 0, left.err
        seconds = [record["seconds"] for record in records(tmp_path / "run")]
        assert seconds == sorted(seconds) and 0 < seconds[-1] < 60
        LEDGER.compared[24] += same_content(tmp_path / "run", straight())


def test_a_place_for_runs_that_leads_nowhere_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dpo_cli.errors import StorageError
    from dpo_cli.runs.run_directory import claim_directory

    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").symlink_to("/a/disk/that/is/not/mounted")
    with fault(6), pytest.raises(StorageError, match="outputs/job: cannot be made"):
        claim_directory("job", 0.0)


def test_runs_that_begin_in_the_same_second_get_directories_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from dpo_cli.runs.run_directory import claim_directory

    monkeypatch.chdir(tmp_path)
    with fault(24, tries=32), ThreadPoolExecutor(32) as pool:
        folders = list(pool.map(lambda _: claim_directory("job", 0.0), range(32)))
        assert len(set(folders)) == 32 and all(folder.is_dir() for folder in folders)
        assert len({folder.name.split("_", 2)[0] for folder in folders}) == 1


def test_the_lock_names_its_owner_and_is_let_go(tmp_path: Path) -> None:
    from dpo_cli.runs.run_directory import RunDirectory

    owner = f"in use by process {os.getpid()} on .* since "
    with fault(18), RunDirectory(tmp_path).owned(), pytest.raises(ConfigError, match=owner):
        RunDirectory(tmp_path).owned().__enter__()
    with RunDirectory(tmp_path).owned():
        assert (tmp_path / ".lock").exists()


def test_what_a_killed_run_left_unfinished_is_swept_away(tmp_path: Path, straight: Straight) -> None:
    with fault(1):
        (tmp_path / "run" / "checkpoints" / ".tmp-step-00000002-99").mkdir(parents=True)
        (tmp_path / "run" / "checkpoints" / ".tmp-step-00000002-99" / "adapter_model.safetensors").write_bytes(b"half")
        (tmp_path / "run" / ".tmp-manifest.json").write_bytes(b"{")
        assert start(tmp_path, run_words(tmp_path, "resume=auto")).wait().code == 0
        LEDGER.compared[1] += same_content(tmp_path / "run", straight())
        assert content(tmp_path / "run")
