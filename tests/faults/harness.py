"""What the fault tests share: runs in a child process that may be killed at will, their bytes, and the ledger.

A child is forked from this process, in which everything is imported: a run takes half a second. The tiny model trains
in float32 with dropout, evaluations, a half-full log window and several forward passes a step, so that there is
something to lose in every corner.
"""

import hashlib
import json
import mmap
import os
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import records, sample_rows, write_jsonl

from dpo_cli import cli

TIMINGS = ("seconds", "pairs_per_second", "tokens_per_second", "peak_memory_gib")
WORDS = [
    "model=tiny", "model.dtype=float32", "data=jsonl", "data.eval_fraction=0.3", "batch_size=4", "micro_batch_size=2",
    "max_steps=6", "eval_every=2", "save_every=2", "log_every=3", "lora.dropout=0.1", "optimizer.lr=1e-3",
    "optimizer.warmup_steps=1", "samples.max_new_tokens=3", "page=false",
]  # fmt: skip


# The ledger


@dataclass
class Ledger:
    """What was tried and what came out, by the number of the fault."""

    tried: Counter[int] = field(default_factory=Counter)
    survived: Counter[int] = field(default_factory=Counter)
    compared: Counter[int] = field(default_factory=Counter)  # bytes
    notes: Counter[str] = field(default_factory=Counter)


LEDGER = Ledger()
FAULTS = {
    0: "mistakes on the command line",
    1: "SIGKILL at random instants and at every write point",
    2: "SIGTERM, SIGUSR1 in every phase",
    3: "Ctrl-C once, twice",
    4: "disk full at a save",
    5: "stdout full or closed",
    6: "output directory cannot be written",
    7: "a checkpoint's file damaged",
    8: "loss or gradient not finite",
    9: "out of memory",
    10: "no file, no rows",
    11: "garbled bytes",
    12: "wrong columns or types",
    13: "pairs that teach nothing",
    14: "template and special tokens",
    15: "model, tokenizer, adapter do not fit",
    16: "resume with another config",
    17: "resume of other data, a finished run, a wrong path",
    18: "two runs in one directory",
    19: "odd terminals",
    20: "hostile text",
    21: "a stranger's checkpoint",
    22: "secrets",
    23: "trust_remote_code",
    24: "clocks and names",
    25: "a rank killed, silent, mistaken",
}


@contextmanager
def fault(number: int, tries: int = 1, compared: int = 0) -> Iterator[None]:
    """Within, a fault of the table is tried; it is survived where nothing raises."""
    LEDGER.tried[number] += tries
    yield
    LEDGER.survived[number] += tries
    LEDGER.compared[number] += compared


def closing_table() -> list[str]:
    """The ledger in words."""
    lines = [f"{'':>3} {'fault':<52} {'tried':>6} {'survived':>9} {'bytes compared':>15}"]
    for number, name in FAULTS.items():
        if LEDGER.tried[number]:
            numbers = f"{LEDGER.tried[number]:>6} {LEDGER.survived[number]:>9} {LEDGER.compared[number]:>15,}"
            lines.append(f"{number:>3} {name:<52} {numbers}")
    tried, survived = LEDGER.tried.total(), LEDGER.survived.total()
    verdict = "nothing lost" if tried == survived else f"{tried - survived} LOST"
    lines.append(f"{'':>3} {'all':<52} {tried:>6} {survived:>9} {LEDGER.compared.total():>15,}  {verdict}")
    lines += [f"    {name}: {number}" for name, number in sorted(LEDGER.notes.items())]
    return lines


# Runs in a child


@dataclass(frozen=True)
class Child:
    """A command under way in a process of its own."""

    pid: int
    folder: Path
    phase: mmap.mmap

    def wait(self, seconds: float = 120) -> "Left":
        """Until it has ended, by itself or by a signal."""
        deadline = time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise AssertionError(f"still running after {seconds} s in {PHASES[self.phase[0]]}")
            time.sleep(0.001)
        out, err = ((self.folder / name).read_text(errors="replace") for name in ("stdout", "stderr"))
        assert "Traceback" not in err, err
        return Left(os.waitstatus_to_exitcode(status), out, err)

    def reach(self, phase: str) -> bool:
        """Wait until the command is in that phase; whether it came to it at all."""
        deadline = time.monotonic() + 60
        while self.phase[0] != PHASES.index(phase):
            assert time.monotonic() < deadline, f"no {phase} in a minute"
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return False
            time.sleep(0.0002)
        return True

    def heard(self, words: str, seconds: float = 60) -> None:
        """Wait until the command has said so on standard error."""
        deadline = time.monotonic() + seconds
        while words not in (self.folder / "stderr").read_text(errors="replace"):
            assert time.monotonic() < deadline, f"'{words}' was not said in {seconds} s"
            time.sleep(0.002)

    def send(self, number: int) -> None:
        os.kill(self.pid, number)


@dataclass(frozen=True)
class Left:
    """What a command left: its exit code (negative: the signal that killed it) and what it printed."""

    code: int
    out: str
    err: str


PHASES = ["start", "tokenising", "reference", "training", "evaluation", "save", "final"]


def wrap(name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put `around(original)` in the place of a part of the runner, by its name; for good, so only in a child."""
    from dpo_cli.training import build, records, runner

    owner: Any = {
        "load_pairs": build, "complete_reference": runner, "train_step": runner, "forward_backward": runner,
        "score_pairs": records, "save_checkpoint": records,
    }.get(name, records.Recorder)  # fmt: skip
    setattr(owner, name, around(getattr(owner, name)))


def before_step(act: Callable[[Any, Any, int], None]) -> None:
    """In a child: `act` hears of context, learner and the steps done before every optimizer step."""

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def step(context: Any, learner: Any, progress: Any, *more: Any) -> None:
            act(context, learner, progress.step)
            original(context, learner, progress, *more)

        return step

    wrap("train_step", around)


def watch_phases(place: mmap.mmap) -> None:
    """In the child: have the shared byte say which phase the run is in."""

    def telling(phase: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def around(original: Callable[..., Any]) -> Callable[..., Any]:
            def told(*arguments: Any, **more: Any) -> Any:
                before, place[0] = place[0], PHASES.index(phase)
                try:
                    return original(*arguments, **more)
                finally:
                    place[0] = before

            return told

        return around

    for name, phase in (
        ("load_pairs", "tokenising"), ("complete_reference", "reference"), ("train_step", "training"),
        ("evaluate", "evaluation"), ("save", "save"), ("_write_final", "final"),
    ):  # fmt: skip
        wrap(name, telling(phase))


def start(
    folder: Path, words: list[str], prepare: Callable[[], None] = lambda: None, command: str = "dpo-train"
) -> Child:
    """Begin a command in a forked child that works in `folder`; `prepare` runs in it first."""
    folder.mkdir(parents=True, exist_ok=True)
    cache = cache_for(folder)  # not in the child: a kill must not leave half a model
    place = mmap.mmap(-1, 1)
    (folder / "stderr").write_bytes(b"")  # `heard` may look before the child has opened it
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Child(pid, folder, place)
    code = 99
    try:
        os.setpgid(0, 0)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - the child ends without closing it
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ["DPO_CACHE"] = str(cache)
        watch_phases(place)
        prepare()
        sys.argv = [command, *words]
        {"dpo-train": cli.train, "dpo-eval": cli.evaluate, "dpo-sample": cli.sample, "dpo-rank": cli.rank}[command]()
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def cache_for(folder: Path) -> Path:
    """A cache of a trial's own: the reference pass begins cold in it, the tiny model is there."""
    from dpo_cli.models.builtin import TINY, resolve_builtin

    cache = folder / "cache"
    if not cache.exists():
        shared = Path(resolve_builtin(TINY, print)[0])
        shutil.copytree(shared, cache / shared.name)
    return cache


def run_words(folder: Path, *more: str) -> list[str]:
    """The words of a run in `folder`, on pairs that are the same everywhere."""
    pairs = folder / "pairs.jsonl"
    if not pairs.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_jsonl(pairs, sample_rows(20))
    return [*WORDS, f"data.train={pairs}", f"output_dir={folder / 'run'}", *more]


# Their bytes


def content(run: Path) -> dict[str, bytes]:
    """Everything of a finished run that must not depend on how it came about: all tensors, metrics but timings."""
    last = sorted((run / "checkpoints").glob("step-*"))[-1]
    state = json.loads((last / "state.json").read_text())
    found = {f"{last.name}/{file.name}": file.read_bytes() for file in last.glob("*.safetensors")}
    found["final"] = next((run / "final").glob("*.safetensors")).read_bytes()
    kept = [{key: value for key, value in line.items() if key not in TIMINGS} for line in records(run)]
    found["metrics.jsonl"] = json.dumps(kept, sort_keys=True).encode()
    steady = {key: value for key, value in state.items() if not key.endswith("seconds") and key != "settings"}
    found["state.json"] = json.dumps(steady, sort_keys=True).encode()
    return found


def same_content(run: Path, straight: dict[str, bytes]) -> int:
    """Assert that a run holds the same as the straight one; returns how many bytes were compared."""
    found = content(run)
    assert found.keys() == straight.keys()
    different = [name for name in straight if found[name] != straight[name]]
    assert not different, [(name, hashlib.sha256(found[name]).hexdigest()[:12]) for name in different]
    left = [path.name for path in [*run.iterdir(), *(run / "checkpoints").iterdir()] if path.name.startswith(".tmp")]
    assert not left
    return sum(map(len, found.values()))


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory, cache: Path, tiny_path: str) -> Callable[..., dict[str, bytes]]:
    """The content of the run that nothing happened to, for the same words; each is run once."""
    known: dict[tuple[str, ...], dict[str, bytes]] = {}

    def run(*more: str) -> dict[str, bytes]:
        if more not in known:
            folder = tmp_path_factory.mktemp("straight")
            left = start(folder, run_words(folder, *more)).wait()
            assert left.code == 0, left.err
            known[more] = content(folder / "run")
        return known[more]

    return run
