"""Fault 1: a run that is killed, at any instant and at every write point, goes on to the bytes of the straight run."""

import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import LEDGER, content, fault, run_words, same_content, start, straight  # noqa: F401
from safetensors.torch import load_file

from dpo_cli.runs.checkpoint import checkpoints, validate

pytestmark = pytest.mark.faults
Straight = Callable[..., dict[str, bytes]]
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree", "os.chmod", "os.utime"}
BATCH, PARTS = 12, 20  # write points a test, and tests


def die_at(point: int, run: Path, seen: Callable[[str], None] = lambda _: None) -> None:
    """In a child: end at once, as by SIGKILL, before the change number `point` (from 1) in the run directory."""
    inside, counted = str(run), [0]

    def change(what: str, path: Any) -> None:
        if not isinstance(path, str | os.PathLike) or not os.fspath(path).startswith(inside):
            return
        counted[0] += 1
        seen(f"{what} {os.path.relpath(path, inside)}")
        if counted[0] == point:
            os._exit(137)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            change("open", arguments[0])
        elif event in ("os.remove", "os.rmdir") and arguments[1] >= 0:  # by name in a folder that is open
            change(event, os.path.join(os.readlink(f"/proc/self/fd/{arguments[1]}"), arguments[0]))
        elif event in CHANGES:
            change(event, arguments[0])

    fsync = os.fsync

    def synced(descriptor: int) -> None:
        change("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    os.fsync = synced
    sys.addaudithook(watch)


SHORT = ("max_steps=3", "save_every=1", "eval_every=2", "keep_checkpoints=1")  # the first is pruned, the best stays


@pytest.fixture(scope="module")
def write_points(tmp_path_factory: pytest.TempPathFactory, straight: Straight) -> list[str]:
    """Every change that a short run makes in its directory, in order."""
    folder = tmp_path_factory.mktemp("points")
    file = folder / "points"

    def note(point: str) -> None:
        with file.open("a") as lines:
            lines.write(point + "\n")

    left = start(folder, run_words(folder, *SHORT), lambda: die_at(0, folder / "run", note)).wait()
    assert left.code == 0, left.err
    assert same_content(folder / "run", straight(*SHORT))
    return file.read_text().splitlines()


def test_the_write_points_cover_the_protocol(write_points: list[str]) -> None:
    """Checkpoints are written beside, flushed, sealed, renamed, the parent is flushed, and only then is pruned."""
    beside = r"checkpoints/\.tmp-step-00000002-\d+"
    order = [
        f"os.mkdir {beside}", f"fsync {beside}/adapter_model.safetensors", f"fsync {beside}/state.json",
        f"open {beside}/MANIFEST.json", f"fsync {beside}/MANIFEST.json", f"fsync {beside}", f"os.rename {beside}",
        "fsync checkpoints",
    ]  # fmt: skip
    places = [next(n for n, point in enumerate(write_points) if re.fullmatch(order[0], point))]
    for wanted in order[1:]:
        later = (n for n, point in enumerate(write_points) if n > places[-1] and re.fullmatch(wanted, point))
        places.append(next(later))
    assert places[-1] == places[-2] + 1  # nothing is touched between the rename and the flush of its folder
    pruned = next(n for n, point in enumerate(write_points) if point == "os.rename checkpoints/step-00000001")
    sealed = next(
        n for n, point in enumerate(write_points) if point.startswith("os.rename checkpoints/.tmp-step-00000002")
    )
    assert pruned > sealed
    assert 100 < len(write_points) < BATCH * PARTS


@pytest.mark.parametrize("part", range(PARTS))
def test_a_run_killed_at_any_write_point_goes_on_to_the_same_bytes(
    tmp_path: Path,
    straight: Straight,
    write_points: list[str],
    part: int,
) -> None:
    expected = straight(*SHORT)
    for point in range(part * BATCH + 1, min((part + 1) * BATCH, len(write_points)) + 1):
        folder = tmp_path / str(point)
        words = run_words(folder, *SHORT)
        with fault(1):
            killed = start(folder, words, lambda point=point, run=folder / "run": die_at(point, run)).wait()  # type: ignore[misc]
            assert killed.code == 137, (point, killed)
            for checkpoint in checkpoints(folder / "run" / "checkpoints"):
                validate(checkpoint)  # what has a checkpoint's name is one
            resumed = start(folder, [*words, "resume=auto"]).wait()
            assert resumed.code == 0, (point, write_points[point - 1], resumed.err)
            LEDGER.compared[1] += same_content(folder / "run", expected)
        LEDGER.notes["write points of a run, each killed at"] += 1


PHASES = ["training", "save", "evaluation", "reference", "training", "save", "final", "start", "evaluation", "training"]


@pytest.mark.parametrize("seed", range(24))
def test_a_run_killed_three_times_at_random_goes_on_to_the_same_bytes(
    tmp_path: Path,
    straight: Straight,
    seed: int,
) -> None:
    expected, draw = straight(), random.Random(seed)
    words = run_words(tmp_path)
    for attempt in range(3):
        phase = PHASES[(3 * seed + attempt) % len(PHASES)]
        with fault(1):
            child = start(tmp_path, [*words, "resume=auto"])
            for _ in range(draw.randint(1, 3)):  # a later one of its kind
                child.reach(phase)
                time.sleep(draw.uniform(0, 0.02))
            place = child.phase[0]
            child.send(signal.SIGKILL)
            left = child.wait()
            assert left.code in (-signal.SIGKILL, 0), left.err
            if left.code:
                LEDGER.notes[f"random SIGKILLs in {['start', 'tokenising', *PHASE_NAMES][place]}"] += 1
    with fault(1):
        resumed = start(tmp_path, [*words, "resume=auto"]).wait()
        assert resumed.code == 0, resumed.err
        LEDGER.compared[1] += same_content(tmp_path / "run", expected)


PHASE_NAMES = ["reference", "training", "evaluation", "save", "final"]


LAYOUTS = {
    "packed by tokens": ["micro_batch_size=auto", "layout=packed"],
    "padded by tokens": ["micro_batch_size=auto", "layout=padded"],
    "one pass a step": ["micro_batch_size=4"],
    "reference in the loop": ["reference.cache=off"],
    "adapter off": ["reference=adapter_off"],
    "bfloat16": ["model.dtype=bfloat16"],
    "checkpointed": ["engine.gradient_checkpointing=true"],
    "every weight": ["lora=off", "optimizer.lr=1e-4"],
    "sgd": ["optimizer=sgd"],
    "rmsprop": ["optimizer=rmsprop"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_every_layout_and_reference_resumes_to_the_same_bytes(
    tmp_path: Path,
    straight: Straight,
    layout: str,
    warm: bool,
) -> None:
    import shutil

    more = LAYOUTS[layout]
    if layout == "every weight":
        more = [*more, "lora.dropout=0"]
    words = run_words(tmp_path, *more)
    with fault(1):
        child = start(tmp_path, words)
        while child.reach("training") and not (tmp_path / "run" / "checkpoints" / "step-00000002").exists():
            time.sleep(0.001)
        child.send(signal.SIGKILL)
        child.wait()
        if not warm:
            shutil.rmtree(tmp_path / "cache" / "reference", ignore_errors=True)
        resumed = start(tmp_path, [*words, "resume=auto"]).wait()
        assert resumed.code == 0, resumed.err
        LEDGER.compared[1] += same_content(tmp_path / "run", straight(*more))


def test_a_merge_of_the_reference_cache_killed_at_any_write_point_loses_no_record(tmp_path: Path) -> None:
    from dpo_cli.models import reference_cache
    from dpo_cli.models.reference_cache import ReferenceCache
    from dpo_cli.storage.logps_file import make_records

    data = random.Random(1).randbytes(16 * 60)
    keys, logps = [data[n : n + 16] for n in range(0, len(data), 16)], [float(n) for n in range(60)]

    def child(path: Path, point: int) -> int:
        """Opens a file of the version before and adds two records at a time; returns how many it has added."""
        added, writes = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                reference_cache.UNSORTED = 8
                die_at(point, path.parent)
                cache = ReferenceCache(path)
                for start in range(30, 60, 2):
                    cache.add(keys[start : start + 2], logps[start : start + 2])
                    os.write(writes, b"2")
            except BaseException:
                os._exit(1)
            os._exit(0)
        os.close(writes)
        with open(added, "rb") as reports:
            number = 2 * len(reports.read())
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == (137 if number < 30 else 0)
        return number

    for point in range(1, 1000):
        path = tmp_path / str(point) / "values"
        path.parent.mkdir()
        path.write_bytes(make_records(keys[:30], logps[:30]).tobytes())
        with fault(1):
            added = child(path, point)
            cache = ReferenceCache(path)
            assert cache.logps(keys[: 30 + added]) == logps[: 30 + added], point
            cache.add(keys, logps)
            cache._merge()
            assert ReferenceCache(path).logps(keys) == logps
            assert [left.name for left in path.parent.iterdir()] == ["values"]
        LEDGER.notes["write points of merges of the reference cache, each killed at"] += 1
        if added == 30:
            break
    assert 40 < point < 1000


def test_an_optimizer_whose_state_has_another_shape_than_its_weight_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    """Adafactor keeps a row and a column for each matrix, and reads its weights in a step: no shape is known before."""

    def adafactor() -> None:
        from dpo_cli.training.optimizers import OPTIMIZERS

        OPTIMIZERS["rmsprop"] = lambda weights, options: torch.optim.Adafactor(weights, lr=options.lr)

    more = ("optimizer=rmsprop", "save_every=1", "keep_checkpoints=9")
    with fault(1):
        whole, killed = tmp_path / "whole", tmp_path / "killed"
        assert start(whole, run_words(whole, *more), adafactor).wait().code == 0
        expected = content(whole / "run")
        state = load_file(checkpoints(whole / "run" / "checkpoints")[-1] / "optimizer.safetensors")
        assert {name.rpartition("|")[2] for name in state} == {"step", "row_var", "col_var"}
        assert all(1 in value.shape for name, value in state.items() if name.endswith(("row_var", "col_var")))
        child = start(killed, run_words(killed, *more), adafactor)
        while child.reach("training") and not (killed / "run" / "checkpoints" / "step-00000002").exists():
            time.sleep(0.001)
        child.send(signal.SIGKILL)
        assert child.wait().code == -signal.SIGKILL
        resumed = start(killed, run_words(killed, *more, "resume=auto"), adafactor).wait()
        assert resumed.code == 0 and "resuming from " in resumed.out, resumed
        LEDGER.compared[1] += same_content(killed / "run", expected)
