"""Runs on several ranks, in seconds: each rank is forked from a server process in which everything is imported."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["dpo_cli.cli", "dpo_cli.training.runner", "dpo_cli.engine.fsdp", "dpo_cli.models.builtin"]
)
Hook = Callable[[int], None]  # is given the rank, in its process, before the command begins


@dataclass(frozen=True)
class Left:
    """How a rank ended (negative: by that signal), and what it printed."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run under way."""

    folder: Path
    processes: list[ForkServerProcess]

    def send(self, rank: int, number: int) -> None:
        """A signal to one rank."""
        process = self.processes[rank].pid
        assert process is not None
        os.kill(process, number)

    def heard(self, words: str) -> None:
        """Wait until rank 0 has printed this."""
        file, deadline = self.folder / "out-0", time.monotonic() + 120
        while not file.exists() or words not in file.read_text(errors="replace"):
            assert time.monotonic() < deadline and self.processes[0].exitcode is None, (words, self.wait(1))
            time.sleep(0.02)

    def wait(self, seconds: float = 120) -> list[Left]:
        """Until all have ended; those that have not by then are killed, and the test fails."""
        deadline, left, late = time.monotonic() + seconds, [], []
        for rank, process in enumerate(self.processes):
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                late.append(rank)
                process.kill()
                process.join()
            out, err = ((self.folder / f"{name}-{rank}").read_text(errors="replace") for name in ("out", "err"))
            left.append(Left(process.exitcode or 0, out, err))
        assert not late, (f"ranks {late} still ran after {seconds} s", left)
        return left


def start_ranks(
    folder: Path, number: int, words: Sequence[str], hook: Hook | None = None, command: str = "train", **environ: str
) -> Ranks:
    """Begin a command on so many ranks, as its own workers; one is the command by itself."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "out-0").unlink(missing_ok=True)  # of a try before: `heard` must not read it
    meeting = folder / f"meeting-{time.monotonic_ns()}"
    known = {name: os.environ[name] for name in ("DPO_CACHE", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM")}
    processes = []
    for rank in range(number):
        place = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number),
            "DPO_MEETING_FILE": str(meeting), "GLOO_SOCKET_IFNAME": "lo",
        } if number > 1 else {}  # fmt: skip
        arguments = (rank, folder, list(words), hook, command, {**known, **place, **environ})
        process = SERVER.Process(target=_rank, args=arguments, daemon=True)
        process.start()
        processes.append(process)
    return Ranks(folder, processes)


def _rank(rank: int, folder: Path, words: list[str], hook: Hook | None, command: str, environ: dict[str, str]) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environ)
    sys.argv = [f"dpo-{command}", *words]
    from dpo_cli import cli

    if hook is not None:
        hook(rank)
    getattr(cli, command)()


@dataclass(frozen=True)
class BeforeStep:
    """A hook: `act` is called with the rank and the steps done, before each optimizer step."""

    act: Callable[[int, int], Any]

    def __call__(self, rank: int) -> None:
        from dpo_cli.training import runner

        original = runner.train_step

        def step(context: Any, learner: Any, progress: Any, *more: Any) -> None:
            self.act(rank, progress.step)
            original(context, learner, progress, *more)

        runner.train_step = step


@dataclass(frozen=True)
class Signal:
    """For `BeforeStep`: one rank sends itself a signal after so many steps."""

    rank: int
    step: int
    number: int = signal.SIGTERM

    def __call__(self, rank: int, step: int) -> None:
        if (rank, step) == (self.rank, self.step):
            os.kill(os.getpid(), self.number)
