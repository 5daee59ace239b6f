"""Runs on several ranks of which one is killed, stopped, starved or mistaken: what the others say, and what is left."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import records, sample_rows, write_jsonl
from harness import LEDGER, TIMINGS, WORDS, fault
from ranks import BeforeStep, Left, Ranks, Signal, start_ranks
from safetensors.torch import load_file

from dpo_cli.runs.checkpoint import checkpoints, validate

pytestmark = pytest.mark.faults
KILLS = 60
ROOT = Path(__file__).parent.parent.parent
STEPS = ("max_steps=9", "save_every=3", "eval_every=4", "log_every=2", "keep_checkpoints=2")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_path: str) -> Path:
    """A folder with pairs; the model is in the cache."""
    folder = tmp_path_factory.mktemp("ranks")
    write_jsonl(folder / "pairs.jsonl", sample_rows(20))
    return folder


def launch(folder: Path, number: int, *words: str, home: Path, **more: Any) -> Ranks:
    all_words = [*WORDS, f"data.train={home / 'pairs.jsonl'}", f"output_dir={folder / 'run'}", *STEPS, *words]
    return start_ranks(folder, number, all_words, **more)


def content(run: Path) -> dict[str, Any]:
    """Weights, optimizer state and generators at the end of a run, and its metrics but timings."""
    last = checkpoints(run / "checkpoints")[-1]
    files = [*last.glob("*.safetensors"), *(run / "final").glob("*.safetensors")]
    tensors = {
        f"{file.parent.name}/{file.name}:{name}": value for file in files for name, value in load_file(file).items()
    }
    return {**tensors, "metrics": [{key: line[key] for key in line.keys() - set(TIMINGS)} for line in records(run)]}


def same_content(run: Path, straight: dict[str, Any]) -> int:
    """Assert that a run holds the numbers of the straight one, up to rounding; how many bytes were compared."""
    found = content(run)
    assert found.keys() == straight.keys()
    lines, others = found.pop("metrics"), straight["metrics"]
    assert [(line["step"], line["split"]) for line in lines] == [(line["step"], line["split"]) for line in others]
    for line, other in zip(lines, others, strict=True):
        assert line.keys() == other.keys()
        for key, value in line.items():
            near = pytest.approx(other[key], abs=1e-5) if isinstance(value, float) else other[key]
            assert key == "intervals95" or value == near, (line["step"], key)
    for name, value in found.items():
        assert torch.allclose(value.double(), straight[name].double(), atol=1e-6, rtol=1e-5), name
    assert not [path for path in (run / "checkpoints").iterdir() if path.name.startswith(".tmp")]
    return sum(value.nbytes for value in found.values())


@pytest.fixture(scope="module")
def straight(home: Path) -> Callable[..., dict[str, Any]]:
    """The content of the run that nothing happens to, on as many ranks; each is run once."""
    known: dict[tuple[Any, ...], dict[str, Any]] = {}

    def run(number: int, *words: str) -> dict[str, Any]:
        key = (number, *words)
        if key not in known:
            folder = home / f"straight-{len(known)}"
            left = launch(folder, number, *words, home=home).wait()
            assert [one.code for one in left] == [0] * number, left
            known[key] = content(folder / "run")
        return known[key]

    return run


def errors(left: list[Left]) -> list[str]:
    """All lines of all ranks that say how the run ended."""
    return [line for one in left for line in one.err.splitlines() if line.startswith("error: ")]


# A rank that is gone


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
@pytest.mark.parametrize("killed", [0, 1, 2])
def test_a_killed_rank_ends_the_run_with_its_name_and_resume_continues(
    home: Path, tmp_path: Path, straight: Callable[..., dict[str, Any]], engine: str, killed: int
) -> None:
    with fault(25):
        hook = BeforeStep(Signal(killed, 5, signal.SIGKILL))
        left = launch(tmp_path, 3, f"engine={engine}", home=home, hook=hook).wait()
        assert [one.code for one in left] == [-9 if rank == killed else 75 for rank in range(3)], left
        (line,) = errors(left)
        assert line.startswith(f"error: rank {killed} is gone: ended from outside, or silent for 1800 s at step 5; ")
        # Where rank 0 holds every weight, it saves the last complete step.
        kept = 5 if engine == "ddp" and killed else 3
        newest = checkpoints(tmp_path / "run" / "checkpoints")[-1]
        assert newest.name == f"step-{kept:08d}"
        validate(newest)
        again = launch(tmp_path, 3, f"engine={engine}", "resume=auto", home=home).wait()
        assert [one.code for one in again] == [0, 0, 0] and f"at step {kept}" in again[0].out, again
        LEDGER.compared[25] += same_content(tmp_path / "run", straight(3, f"engine={engine}"))


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_rank_that_is_silent_too_long_is_named(home: Path, tmp_path: Path, engine: str) -> None:
    with fault(25):
        hook = BeforeStep(Signal(1, 2, signal.SIGSTOP))
        ranks = launch(tmp_path, 3, f"engine={engine}", "engine.timeout=5", home=home, hook=hook)
        for rank in (0, 2):
            ranks.processes[rank].join(60)
            assert ranks.processes[rank].exitcode == 75
        ranks.processes[1].kill()
        (line,) = errors(ranks.wait())
        assert line.startswith("error: rank 1 is gone: ended from outside, or silent for 5 s at step 2; ")


@dataclass(frozen=True)
class Dies:
    """A hook: a rank is killed when it writes a line of metrics, or is in an evaluation, or saves."""

    where: str
    rank: int

    def __call__(self, rank: int) -> None:
        from dpo_cli.training import records as module

        if rank != self.rank:
            return
        owner: Any = module.Recorder if hasattr(module.Recorder, self.where) else module

        def die(*_: Any, **__: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(owner, self.where, die)


@pytest.mark.parametrize("where", ["log_start", "log", "evaluate", "score_pairs", "save", "_peak_memory", "finish"])
def test_a_rank_killed_between_a_step_and_its_line_loses_neither(
    home: Path, tmp_path: Path, straight: Callable[..., dict[str, Any]], where: str
) -> None:
    with fault(25):
        left = launch(tmp_path, 2, "engine=ddp", home=home, hook=Dies(where, 1)).wait()
        assert [one.code for one in left] == [75, -9], left
        again = launch(tmp_path, 2, "engine=ddp", "resume=auto", home=home).wait()
        assert [one.code for one in again] == [0, 0], again
        LEDGER.compared[25] += same_content(tmp_path / "run", straight(2, "engine=ddp"))


# 60 kills


def impatient(rank: int) -> None:
    """A rank waits 1.5 s, not 5 s, for the last words of the dead."""
    from dpo_cli.engine import ddp

    ddp.LAST_WORDS = 1.5


@pytest.mark.parametrize(("engine", "number"), [("ddp", 2), ("ddp", 3), ("fsdp", 2), ("fsdp", 3)])
def test_runs_whose_ranks_are_killed_at_random_moments_end_as_the_straight_run(
    home: Path, tmp_path: Path, straight: Callable[..., dict[str, Any]], engine: str, number: int
) -> None:
    """A run is killed at most four times, each time resumed, and then left alone to its end."""
    chance = random.Random(f"{engine} {number}")
    expected = straight(number, f"engine={engine}")
    kills = tries = 0
    longest = 3.0  # seconds until a run ends by itself; measured by those that do so before the kill
    while kills < KILLS // 4:
        tries += 1
        folder = tmp_path / str(tries)
        for kill in range(5):
            ranks = launch(folder, number, f"engine={engine}", "resume=auto", home=home, hook=impatient)
            ranks.heard("loading the tokenizer")  # they have met: before that no rank can notice anything
            began = time.monotonic()
            if kill < 4:
                ranks.processes[number - 1].join(chance.uniform(0, longest))
                with fault(25):
                    dead = chance.randrange(number)
                    alive = ranks.processes[dead].exitcode is None
                    if alive:
                        ranks.send(dead, signal.SIGKILL)
                    left = ranks.wait()
                    assert all(one.code in (0, 75, -signal.SIGKILL) for one in left), left
                    assert all("Traceback" not in one.err for one in left), left
                    kills += alive
                if not alive:
                    longest = min(longest, time.monotonic() - began)
            else:
                left = ranks.wait()
            if all(one.code == 0 for one in left):
                break
        assert [one.code for one in left] == [0] * number, left
        LEDGER.compared[25] += same_content(folder / "run", expected)
    LEDGER.notes[f"kills of a rank at a random moment, {engine} on {number}"] += kills


# A rank that cannot go on


@dataclass(frozen=True)
class OutOfMemoryOnce:
    """A hook: memory runs out on one rank in its forward passes of more than one pair, from the third step on."""

    rank: int

    def __call__(self, rank: int) -> None:
        from dpo_cli.training import runner

        if rank != self.rank:
            return
        original, steps = runner.train_step, [0]
        forward = runner.one_forward_pass

        def step(*arguments: Any) -> None:
            steps[0] += 1
            original(*arguments)

        def starved(pairs: Any) -> Any:
            if steps[0] >= 3 and len(pairs) > 1:
                from dpo_cli.models.memory import DoesNotFitError

                raise DoesNotFitError(pairs)
            return forward(pairs)

        runner.train_step, runner.one_forward_pass = step, starved


ROOMY = ("micro_batch_size=4", "lora.dropout=0", "batch_size=6")


def test_memory_that_runs_out_on_one_rank_is_tried_again_by_that_rank_alone(
    home: Path, tmp_path: Path, straight: Callable[..., dict[str, Any]]
) -> None:
    with fault(9):
        left = launch(tmp_path, 2, "engine=ddp", *ROOMY, home=home, hook=OutOfMemoryOnce(0)).wait()
        assert [one.code for one in left] == [0, 0] and left[1].err == "", left
        assert "memory ran out on a micro-batch of" in left[0].out + left[0].err
        found, expected = content(tmp_path / "run"), straight(2, "engine=ddp", *ROOMY)
        assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in found if "adapter" in name)


@pytest.mark.parametrize("rank", [0, 1])
def test_memory_that_runs_out_where_weights_are_shared_ends_all_ranks(home: Path, tmp_path: Path, rank: int) -> None:
    with fault(9):
        left = launch(tmp_path, 2, "engine=fsdp", *ROOMY, home=home, hook=OutOfMemoryOnce(rank)).wait()
        assert [one.code for one in left] == [6, 6], left
        (line,) = errors(left)
        who = "" if rank == 0 else "rank 1: "
        assert line.startswith(f"error: {who}out of memory on a micro-batch of ")
        assert line.endswith("micro_batch_size=1 or engine.gradient_checkpointing=true need less")


@dataclass(frozen=True)
class LacksFile:
    """A hook: the checkpoint that a run resumes from is missing for one rank, or it has a bug."""

    rank: int
    bug: bool = False

    def __call__(self, rank: int) -> None:
        from dpo_cli.errors import CheckpointError
        from dpo_cli.training import build

        def lacking(*_: Any) -> None:
            if self.bug:
                raise ValueError("of the program itself")
            raise CheckpointError("/models/sft: no such folder; name another")

        if rank == self.rank:
            build.load_model = lacking


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_mistake_on_one_rank_is_said_once_with_its_rank(home: Path, tmp_path: Path, engine: str, rank: int) -> None:
    with fault(25):
        left = launch(tmp_path, 3, f"engine={engine}", home=home, hook=LacksFile(rank)).wait()
        assert [one.code for one in left] == [4, 4, 4], left
        who = f"rank {rank}: " if rank else ""
        assert errors(left) == [f"error: {who}/models/sft: no such folder; name another"]


def test_a_bug_on_one_rank_shows_where_and_ends_all(home: Path, tmp_path: Path) -> None:
    with fault(25):
        left = launch(tmp_path, 2, "engine=ddp", home=home, hook=LacksFile(1, bug=True)).wait()
        assert [one.code for one in left] == [1, 1] and errors(left) == [], left
        assert "ValueError: of the program itself" in left[1].err and left[0].err == ""


# The command that starts the workers


def real(folder: Path, home: Path, *words: str) -> "subprocess.Popen[str]":
    all_words = [*WORDS, f"data.train={home / 'pairs.jsonl'}", f"output_dir={folder / 'run'}", *words]
    command = [sys.executable, "-c", "from dpo_cli import cli; cli.train()", *all_words]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            start_new_session=True)  # fmt: skip


def workers_of(parent: "subprocess.Popen[str]") -> dict[int, int]:
    """The process of each rank."""
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    found = {}
    for child in children:
        environ = dict(
            one.split("=", 1) for one in Path(f"/proc/{child}/environ").read_text().split("\0") if "=" in one
        )
        found[int(environ["RANK"])] = int(child)
    return found


def until_it_trains(run: Path) -> None:
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists():
        assert time.monotonic() < deadline, "no step in two minutes"
        time.sleep(0.05)


def gone(process: int) -> bool:
    try:
        return "\nState:\tZ" in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return True


@pytest.mark.parametrize("what", ["parent", "worker", "ctrl-c"])
def test_signals_to_the_command_and_its_workers(home: Path, tmp_path: Path, what: str) -> None:
    """The parent killed leaves no worker; a worker killed is named; Ctrl-C ends all with 130. All can be resumed."""
    with fault(25):
        parent = real(tmp_path, home, "engine=ddp", "engine.processes=2", "max_steps=100000")
        try:
            until_it_trains(tmp_path / "run")
            workers = workers_of(parent)
            assert sorted(workers) == [0, 1]
            if what == "worker":
                os.kill(workers[1], signal.SIGKILL)
            else:
                parent.send_signal(signal.SIGKILL if what == "parent" else signal.SIGINT)
            _, err = parent.communicate(timeout=60)
            deadline = time.monotonic() + 30
            while not all(map(gone, workers.values())):
                assert time.monotonic() < deadline, "a worker is left behind"
                time.sleep(0.05)
        finally:
            parent.kill()
        assert parent.returncode == {"parent": -9, "worker": 75, "ctrl-c": 130}[what], err
        lines = [line for line in err.splitlines() if line.startswith(("error: ", "rank "))]
        if what == "worker":
            assert lines[0] == f"rank 1 (process {workers[1]}) was ended by SIGKILL"
            assert lines[1].startswith("error: rank 1 is gone: ") and len(lines) == 2
        if what == "ctrl-c":
            assert len(lines) == 1 and lines[0].startswith("error: stopped by Ctrl-C at step "), err
            assert err.count("SIGINT received") == 1
        validate(checkpoints(tmp_path / "run" / "checkpoints")[-1])
