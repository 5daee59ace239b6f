"""Faults 1 to 4 while several processes tokenize: the same tokens in the end, one line, and nothing is left behind."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import tiny_words, write_jsonl
from harness import LEDGER, cache_for, fault

pytestmark = pytest.mark.faults
# A process that is started anew reads this file again: small parts, each of which takes a moment.
SCRIPT = """
import os, sys, time
import dpo_cli.data.prepare as prepare

prepare.PART, prepare.FEW = 16, 1
make_part = prepare.make_part

def slowly(*arguments):
    time.sleep(float(os.environ["SECONDS_A_PART"]))
    return make_part(*arguments)

prepare.make_part = slowly
if __name__ == "__main__":
    from dpo_cli import cli

    sys.argv = ["dpo-train", *sys.argv[1:]]
    cli.train()
"""
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def begin(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Begin a run in a session of its own, which prepares 400 pairs by three processes and trains for a step."""
    place = tmp_path_factory.mktemp("preparation")
    script, pairs = place / "main.py", place / "pairs.jsonl"
    script.write_text(SCRIPT)
    write_jsonl(pairs, [{"prompt": f"about {n}", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(400)])

    def run(folder: Path, *words: str, slow: float = 0.0, cache: Path | None = None) -> "subprocess.Popen[str]":
        folder.mkdir(exist_ok=True)
        more = ("max_steps=1", "data.eval_limit=4", "data.processes=3", *words)
        environment = {
            **os.environ, "DPO_CACHE": str(cache or cache_for(folder)), "SECONDS_A_PART": str(slow),
            "PYTHONPATH": os.pathsep.join(sys.path),
        }  # fmt: skip
        return subprocess.Popen(
            [sys.executable, str(script), *tiny_words(pairs, folder / "run"), *more], env=environment, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    return run


def ended(process: "subprocess.Popen[str]") -> tuple[int, str]:
    _, errors = process.communicate(timeout=120)
    assert "Traceback" not in errors, errors
    return process.returncode, errors


def tokens(cache: Path) -> dict[str, bytes]:
    """What the one store of a cache holds; no name but those of a whole store is in it."""
    (store,) = (cache / "tokens").iterdir()
    names = [path.name for path in store.iterdir() if not path.name.startswith("training-")]
    assert sorted(names) == [*(f"part-{number:05d}.arrow" for number in range(25)), "store.json"]
    return {name: (store / name).read_bytes() for name in names}


def members(session: int) -> list[int]:
    """The processes of a session that have not ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, of = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(of) == session and state != "Z":
            found.append(int(folder.name))
    return found


@pytest.fixture(scope="module")
def straight(begin: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that one process prepared and nothing happened to."""
    folder = tmp_path_factory.mktemp("straight")
    assert ended(begin(folder, "data.processes=1"))[0] == 0
    return folder


@pytest.mark.parametrize(
    ("number", "to_all", "code", "line"),
    [
        (signal.SIGKILL, False, -9, 1), (signal.SIGTERM, True, 75, 2), (signal.SIGUSR1, True, 75, 2),
    ],
)  # fmt: skip
def test_a_preparation_that_is_ended_goes_on_to_the_same_tokens(
    number: int, to_all: bool, code: int, line: int, begin: Start, straight: Path, tmp_path: Path
) -> None:
    with fault(line):
        killed = tmp_path / "killed"
        process = begin(killed, slow=0.3)
        wanted = random.Random(int(number) + to_all).randint(1, 12)
        deadline = time.monotonic() + 60
        while len(list((killed / "cache" / "tokens").glob("*/part-*"))) < wanted:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.002)
        (os.killpg if to_all else os.kill)(process.pid, number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == code and "Traceback" not in errors, errors
        while members(process.pid):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert not list((killed / "cache" / "tokens").glob("*/store.json"))
        shutil.rmtree(killed / "run", ignore_errors=True)
        assert ended(begin(killed))[0] == 0
        found = tokens(killed / "cache")
        assert found == tokens(straight / "cache")
        LEDGER.compared[line] += sum(map(len, found.values()))


def test_two_preparations_at_once_make_the_same_tokens_once(begin: Start, straight: Path, tmp_path: Path) -> None:
    with fault(18):
        first, second = tmp_path / "first", tmp_path / "second"
        cache = cache_for(first)
        both = [begin(folder, slow=0.05, cache=cache) for folder in (first, second)]
        assert [ended(process)[0] for process in both] == [0, 0]
        assert tokens(cache) == tokens(straight / "cache")
        fingerprints = [(folder / "run" / "manifest.json").read_text().split('"data_fingerprint"')[1][:70]
                   for folder in (straight, first, second)]  # fmt: skip
        assert len(set(fingerprints)) == 1


def test_a_preparation_without_room_ends_with_7_in_one_line(begin: Start, tmp_path: Path) -> None:
    with fault(4):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        cache_for(tmp_path / "full")
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # a part has more bytes
        try:
            process = begin(tmp_path / "full")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        code, errors = ended(process)
        assert code == 7 and errors.count("\n") == 1, errors
        assert "tokens cannot be kept (File too large); set DPO_CACHE to a folder with space" in errors
        (store,) = (tmp_path / "full" / "cache" / "tokens").iterdir()
        assert not list(store.iterdir())
