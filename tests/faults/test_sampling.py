"""dpo-sample under faults 1, 2, 4, 5 and 18: killed anywhere, without room, unheard, beside another of its kind."""

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl
from harness import LEDGER, Left, fault, start
from test_kills import die_at

pytestmark = pytest.mark.faults
PROMPTS = ["Cats?", "Why does it rain?", "Tell me about bread.", "Is the moon far away from here?", "Tea or coffee?"]


def words(folder: Path, *more: str) -> list[str]:
    """A job of five batches."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = write_jsonl(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    output = folder / "job" / "samples.jsonl"
    drawing = ["model=tiny", "model.dtype=float32", "max_new_tokens=6", "batch_size=2"]
    return [*drawing, f"prompts={prompts}", f"output={output}", *more]


def sampled(folder: Path, prepare: Callable[[], None] = lambda: None, *more: str) -> Left:
    return start(folder, words(folder, *more), prepare, "dpo-sample").wait()


def job_log(folder: Path) -> Path:
    return folder / "job" / "samples.jsonl.part"


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, cache: Path, tiny_path: str) -> bytes:
    """The samples of the job that nothing happened to."""
    folder = tmp_path_factory.mktemp("straight")
    left = sampled(folder)
    assert left.code == 0, left.err
    return (folder / "job" / "samples.jsonl").read_bytes()


def same(folder: Path, straight: bytes) -> int:
    """Assert that the job is whole and left nothing beside; returns how many bytes were compared."""
    assert (folder / "job" / "samples.jsonl").read_bytes() == straight
    assert sorted(os.listdir(folder / "job")) == ["samples.jsonl", "samples.jsonl.manifest.json"]
    return len(straight)


def at_batch(number: int, act: Callable[[], None]) -> Callable[[], None]:
    """In a child: `act` before the batch of that number, from 1, is generated."""

    def prepare() -> None:
        from dpo_cli.generation import sampler

        original, count = sampler.distinct_completions, [0]

        def counted(*arguments: Any) -> Any:
            count[0] += 1
            if count[0] == number:
                act()
            return original(*arguments)

        sampler.distinct_completions = counted

    return prepare


# Fault 1


@pytest.fixture(scope="module")
def write_points(tmp_path_factory: pytest.TempPathFactory, straight: bytes) -> list[str]:
    """Every change that the job makes in its folder, in order."""
    folder = tmp_path_factory.mktemp("points")
    file = folder / "points"

    def note(point: str) -> None:
        with file.open("a") as lines:
            lines.write(point + "\n")

    assert sampled(folder, lambda: die_at(0, folder / "job", note)).code == 0
    assert same(folder, straight)
    return file.read_text().splitlines()


def test_every_batch_is_on_disk_before_the_next_and_the_output_comes_last(write_points: list[str]) -> None:
    """The header and five batches are flushed; then manifest and output are written beside and renamed."""
    assert write_points.count("fsync samples.jsonl.part") == 1 + len(PROMPTS)
    last = [point for point in write_points if point.startswith(("os.rename", "os.remove"))]
    assert last == [
        "os.rename .tmp-samples.jsonl.manifest.json", "os.rename .tmp-samples.jsonl", "os.remove samples.jsonl.part",
    ]  # fmt: skip


def test_a_job_killed_at_any_write_point_resumes_to_the_same_bytes(
    tmp_path: Path, straight: bytes, write_points: list[str]
) -> None:
    for point in range(1, len(write_points) + 1):
        folder = tmp_path / str(point)
        with fault(1):
            killed = sampled(folder, lambda point=point, run=folder / "job": die_at(point, run))  # type: ignore[misc]
            assert killed.code == 137, (point, killed)
            resumed = sampled(folder)
            assert resumed.code == 0, (write_points[point - 1], resumed.err)
            LEDGER.compared[1] += same(folder, straight)
        LEDGER.notes["write points of a sampling, each killed at"] += 1


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_job_killed_between_batches_generates_none_of_them_twice(tmp_path: Path, straight: bytes, batch: int) -> None:
    with fault(1):
        left = sampled(tmp_path, at_batch(batch, lambda: os.kill(os.getpid(), signal.SIGKILL)))
        assert left.code == -signal.SIGKILL
        before = job_log(tmp_path).read_bytes()
        assert before.count(b"\n") == 1 + batch - 1

        def keeps_what_is_there() -> None:
            from dpo_cli.commands import sample

            finish = sample.finish_job

            def checked(*arguments: Any) -> None:
                assert job_log(tmp_path).read_bytes().startswith(before)
                assert job_log(tmp_path).read_bytes().count(b"\n") == 1 + len(PROMPTS)
                finish(*arguments)

            sample.finish_job = checked

        assert sampled(tmp_path, keeps_what_is_there).code == 0
        LEDGER.compared[1] += same(tmp_path, straight)


def test_a_job_log_cut_anywhere_in_its_last_line_loses_that_batch_alone(tmp_path: Path, straight: bytes) -> None:
    sampled(tmp_path, at_batch(4, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    content = job_log(tmp_path).read_bytes()
    start_of_last = content[:-1].rfind(b"\n") + 1
    for end in range(start_of_last, len(content), 9):
        with fault(1):
            for file in (tmp_path / "job").iterdir():
                file.unlink()
            job_log(tmp_path).write_bytes(content[:end])
            left = sampled(tmp_path)
            assert left.code == 0 and "resuming: 2 prompts of 5 done" in left.out, left
            told = f"{job_log(tmp_path)}: its last line is incomplete; that part is done again"
            assert (told in left.out) == (end > start_of_last)
            LEDGER.compared[1] += same(tmp_path, straight)


@pytest.mark.parametrize("batch", [2, 4, 6])
def test_a_match_killed_between_batches_goes_on_to_the_same_bytes(tmp_path: Path, tiny_path: str, batch: int) -> None:
    """Two players, three batches each."""

    def played(folder: Path, prepare: Callable[[], None] = lambda: None) -> Left:
        folder.mkdir(exist_ok=True)
        prompts = write_jsonl(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
        players = f"checkpoints=[dpo-cli/tiny-random,{tiny_path}]"
        drawing = [players, f"prompts={prompts}", "judge=shorter", "prior=1", "max_new_tokens=6", "batch_size=2"]
        return start(folder, [*drawing, f"output={folder / 'job' / 'r.json'}"], prepare, "dpo-rank").wait()

    with fault(1):
        assert played(tmp_path / "straight").code == 0
        killed = tmp_path / "killed"
        left = played(killed, at_batch(batch, lambda: os.kill(os.getpid(), signal.SIGKILL)))
        assert left.code == -signal.SIGKILL
        assert (killed / "job" / "r.answers.jsonl.part").read_bytes().count(b"\n") == 1 + batch - 1
        assert (
            played(killed, at_batch(3 * 2 + 1 - (batch - 1), lambda: os._exit(9))).code == 0
        )  # none is generated twice
        for name in ("r.json", "r.answers.jsonl"):
            content = (killed / "job" / name).read_bytes()
            assert content == (tmp_path / "straight" / "job" / name).read_bytes()
            LEDGER.compared[1] += len(content)
        assert sorted(os.listdir(killed / "job")) == ["r.answers.jsonl", "r.answers.jsonl.manifest.json", "r.json"]


# Fault 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("batch", [1, 3, 5])
def test_a_signal_ends_the_job_at_a_batch_and_it_goes_on(
    tmp_path: Path, straight: bytes, number: signal.Signals, batch: int
) -> None:
    with fault(2):
        left = sampled(tmp_path, at_batch(batch, lambda: os.kill(os.getpid(), number)))
        assert left.code == (130 if number == signal.SIGINT else 75)
        assert not (tmp_path / "job" / "samples.jsonl").exists()
        assert job_log(tmp_path).read_bytes().count(b"\n") == batch  # the header, and the batches before
        assert sampled(tmp_path).code == 0
        LEDGER.compared[2] += same(tmp_path, straight)


# Fault 4


@pytest.mark.parametrize("room", [0, 20, 100])
def test_a_full_disk_ends_the_job_with_7_and_what_is_generated_stays(
    tmp_path: Path, straight: bytes, room: int
) -> None:
    """From the third batch on files grow by no more than `room` bytes: half a line, which is taken back."""

    def full() -> None:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (job_log(tmp_path).stat().st_size + room, hard))

    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        at_batch(3, full)()

    with fault(4):
        left = sampled(tmp_path, prepare)
        assert left.code == 7
        assert (
            left.err
            == f"error: {job_log(tmp_path)}: cannot be written (File too large); what was done before is in it\n"
        )
        kept = job_log(tmp_path).read_bytes()
        assert kept.count(b"\n") == 1 + 2 and kept.endswith(b"\n")
        again = sampled(tmp_path)
        assert again.code == 0 and "resuming: 2 prompts of 5 done" in again.out
        LEDGER.compared[4] += same(tmp_path, straight)


def test_an_end_without_room_keeps_the_job_log(tmp_path: Path, straight: bytes) -> None:
    """All is generated, and manifest and output are larger than the room on the disk."""

    def prepare() -> None:
        from dpo_cli.commands import sample

        finish = sample.finish_job

        def full(*arguments: Any) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (400, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            finish(*arguments)

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        sample.finish_job = full

    with fault(4):
        left = sampled(tmp_path, prepare)
        assert left.code == 7
        assert left.err == f"error: {tmp_path / 'job' / 'samples.jsonl'}: cannot be written (File too large)\n"
        assert os.listdir(tmp_path / "job") == ["samples.jsonl.part"]
        again = sampled(tmp_path, at_batch(1, lambda: os._exit(98)))  # nothing is generated again
        assert again.code == 0, again.err
        LEDGER.compared[4] += same(tmp_path, straight)


# Fault 5


def test_a_console_without_room_changes_no_byte(tmp_path: Path, straight: bytes) -> None:
    def broken() -> None:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115

    with fault(5):
        left = sampled(tmp_path, broken)
        assert (left.code, left.err) == (0, "")
        LEDGER.compared[5] += same(tmp_path, straight)


# Fault 18


def test_the_second_job_with_one_output_is_refused_while_the_first_goes_on(tmp_path: Path, straight: bytes) -> None:
    reader, writer = os.pipe()

    def waiting() -> None:
        os.close(writer)
        at_batch(3, lambda: os.read(reader, 1))()  # until the other end is closed

    with fault(18):
        first = start(tmp_path, words(tmp_path), waiting, "dpo-sample")
        os.close(reader)
        while not job_log(tmp_path).exists() or job_log(tmp_path).read_bytes().count(b"\n") < 3:
            os.sched_yield()
        second = start(tmp_path / "second", words(tmp_path), command="dpo-sample").wait()
        assert second.code == 2
        assert second.err == (
            f"error: {job_log(tmp_path)}: another process is writing it; wait for it, or name another output\n"
        )
        os.close(writer)
        assert first.wait().code == 0
        LEDGER.compared[18] += same(tmp_path, straight)
