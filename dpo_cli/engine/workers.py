"""A run's processes on one computer, started by the command itself: a worker a rank, and this process watches them.

torchrun would do, but for what a user sees of it: it turns every exit code into 1 and prints its own report. Here the
exit code of the command is that of the rank that failed first.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

from dpo_cli.engine.ranks import MEETING_FILE
from dpo_cli.signals import known_signals

PATIENCE = 60.0  # seconds that the others have to end by themselves after a rank has died
GRACE = 15.0  # seconds after which they are asked to: one that still waits to meet a dead rank never notices
POLL = 0.1  # seconds between two looks at the workers
LOOK = 1.0  # seconds between two looks of a worker whether the process that started it is there
PARENT = "DPO_PARENT"  # the process that has started the workers


def start_workers(command: list[str], processes: int, say: Callable[[str], None], patience: float = PATIENCE) -> int:
    """Run `command` as `processes` ranks and wait for them; returns the exit code of the run.

    Signals to this process go to every rank. Where a rank dies, the others have `patience` seconds to say so and end.
    """
    with tempfile.TemporaryDirectory(prefix="dpo-ranks-") as folder:
        workers = [
            subprocess.Popen(command, env=_environment(rank, processes, Path(folder)), start_new_session=True)
            for rank in range(processes)
        ]
        try:
            with _forwarding(workers):
                return _watch(workers, say, patience)
        finally:
            for worker in workers:
                if worker.poll() is None:
                    worker.kill()
                    worker.wait()


def _environment(rank: int, processes: int, folder: Path) -> dict[str, str]:
    threads = max(1, (os.cpu_count() or 1) // processes)
    return {
        "OMP_NUM_THREADS": str(threads),
        **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
        **os.environ,
        MEETING_FILE: str(folder / "meeting"),
        PARENT: str(os.getpid()),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }


@contextmanager
def _forwarding(workers: list["subprocess.Popen[bytes]"]) -> Iterator[None]:
    """Within, the signals that stop a run go to its ranks. They are in sessions of their own: Ctrl-C comes once."""

    def forward(number: int, _: object) -> None:
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    before = {number: signal.signal(number, forward) for number in known_signals("SIGTERM", "SIGINT", "SIGUSR1")}
    before |= {number: signal.signal(number, signal.SIG_IGN) for number in known_signals("SIGHUP")}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(workers: list["subprocess.Popen[bytes]"], say: Callable[[str], None], patience: float) -> int:
    """Wait for all; the exit code of the first that failed by itself, or 128 + the signal that ended one."""
    failed: dict[int, int] = {}  # exit code by rank, in the order in which they ended
    reminder = deadline = float("inf")
    asked: list[int] = []
    while any(worker.poll() is None for worker in workers):
        for rank, worker in enumerate(workers):
            if worker.poll() and rank not in failed:
                failed[rank] = worker.returncode
                if worker.returncode < 0 and rank not in asked:
                    say(f"rank {rank} (process {worker.pid}) was ended by {signal.Signals(-worker.returncode).name}")
                reminder, deadline = min(reminder, time.monotonic() + GRACE), min(deadline, time.monotonic() + patience)
        if time.monotonic() > reminder:
            asked = [rank for rank, worker in enumerate(workers) if worker.poll() is None]
            for rank in asked:
                workers[rank].terminate()
            reminder = float("inf")
        if time.monotonic() > deadline:
            for rank, worker in enumerate(workers):
                if worker.poll() is None:
                    say(f"rank {rank} (process {worker.pid}) did not end within {patience:g} s, and is killed")
                    worker.kill()
            deadline = float("inf")
        time.sleep(POLL)
    codes = [*failed.values(), *(worker.returncode for rank, worker in enumerate(workers) if rank not in failed)]
    return next((code for code in codes if code > 0), next((128 - code for code in codes if code < 0), 0))


def end_with_parent() -> None:
    """Send this process SIGTERM when the one that started it is gone, so that no rank is left; not on Windows."""
    parent = os.environ.pop(PARENT, None)  # a process that is started from here has another
    if parent is not None and os.name == "posix":
        Thread(target=_follow, args=(int(parent),), daemon=True).start()


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK)
    os.kill(os.getpid(), signal.SIGTERM)
