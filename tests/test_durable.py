"""How things get onto a disk: files that are whole or not there, lines, locks, hashes, and the folder for caches."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ended

from dpo_cli.data.formats import standard
from dpo_cli.data.prepare import content_key
from dpo_cli.data.samples import sample_id
from dpo_cli.data.splits import data_fingerprint, is_held_out
from dpo_cli.data.tokens import TokenizedPair, token_ids
from dpo_cli.errors import ConfigError, DataError, StorageError
from dpo_cli.models.builtin import TINY, resolve_builtin
from dpo_cli.paths import cache_dir
from dpo_cli.runs.run_directory import RunDirectory
from dpo_cli.signals import known_signals
from dpo_cli.storage import hashing, locks
from dpo_cli.storage.durable import sweep, write_together, write_whole
from dpo_cli.storage.line_log import append_whole, opened_lines, whole_lines
from dpo_cli.storage.locks import opened_alone
from dpo_cli.storage.measurements import note, recall

Command = Callable[..., Ended]


def in_use(owner: str) -> ConfigError:
    return ConfigError(f"in use by {owner}")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Files


def test_files_written_together_are_all_there_or_the_earlier_ones_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    write_together({one: b"1", two: b"1"})
    flush, calls = os.fsync, []

    def full_at_the_second(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(descriptor)

    monkeypatch.setattr("os.fsync", full_at_the_second)
    with pytest.raises(OSError, match="No space left"):
        write_together({one: b"2", two: b"2"})
    assert (one.read_bytes(), two.read_bytes(), names(tmp_path)) == (b"1", b"1", ["one", "two"])
    write_together({one: b"3", two: b"3"}, shared=True)
    assert (one.read_bytes(), two.read_bytes(), names(tmp_path)) == (b"3", b"3", ["one", "two"])


def test_only_what_this_program_left_unfinished_is_swept_away(tmp_path: Path) -> None:
    ours, others = [".tmp-step-00000003", ".tmp-config.yaml"], [".tmp-notes", ".tmp-step", "config.yaml"]
    for name in [*ours, *others]:
        (tmp_path / name).write_text("x")
    sweep(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(others)


def test_a_link_where_a_file_is_written_beside_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / ".tmp-a").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"):
        write_whole(tmp_path / "a", b"data")
    assert (tmp_path / "precious").read_bytes() == b"precious"
    write_whole(tmp_path / "a", b"data")  # the link itself is gone
    assert names(tmp_path) == ["a", "precious"]


def test_an_evaluation_that_fails_leaves_the_earlier_report_whole(
    command: Command, trained: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained()
    assert command("dpo-eval", f"checkpoint={run}", "name=x").code == 0
    folder = run / "eval" / "x"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(before) == ["pairs.jsonl", "report.html", "report.json", "samples.jsonl"]
    opened = os.open

    def no_room(path: object, *rest: int, **more: int) -> int:
        if ".tmp-report.json" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(path, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr("os.open", no_room)
    ended = command("dpo-eval", f"checkpoint={run}", "name=x")
    monkeypatch.undo()
    assert (ended.code, ended.err) == (
        7,
        f"error: {folder}: the report cannot be written (No space left on device)\n",
    )
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_cache_that_is_no_folder_is_named_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError) as error:
        resolve_builtin(TINY, print)
    assert str(error.value) == (
        f"{tmp_path / 'file'}: no model can be kept here (Not a directory); set DPO_CACHE to a folder"
    )
    note("kind", ["how"], {"found": 1})  # nothing happens where it cannot be kept
    assert recall("kind", ["how"]) is None


# Locks


def test_a_file_has_one_owner_and_what_it_wrote_names_it_to_others(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with opened_alone(path, in_use) as descriptor:
        os.write(descriptor, b"me\x1b[31m\n")
        with pytest.raises(ConfigError) as error, opened_alone(path, in_use):
            pass
        assert str(error.value) == r"in use by me\x1b[31m"
    with pytest.raises(RuntimeError), opened_alone(path, in_use):
        raise RuntimeError
    with opened_alone(path, in_use):  # released after an error, too
        assert path.read_bytes() == b"me\x1b[31m\n"


HOLD = """
import os, sys, time
from pathlib import Path
from dpo_cli.errors import ConfigError
from dpo_cli.storage.locks import opened_alone
with opened_alone(Path(sys.argv[1]), ConfigError):
    if sys.argv[2] == "fork" and os.fork() == 0:
        time.sleep(60)  # has the file open still
        os._exit(0)
    print("held", flush=True)
    if sys.argv[2] == "kill":
        time.sleep(60)
print("released", flush=True)
time.sleep(60)
"""


def holder(path: Path, how: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), how], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def end(process: "subprocess.Popen[str]") -> None:
    os.killpg(process.pid, 9)
    process.communicate()


def test_a_killed_owner_leaves_a_file_that_the_next_one_has_at_once(tmp_path: Path) -> None:
    path = tmp_path / "file"
    process = holder(path, "kill")
    try:
        with pytest.raises(ConfigError), opened_alone(path, in_use):
            pass
    finally:
        end(process)
    with opened_alone(path, in_use):
        assert path.exists()


def test_a_released_file_is_free_though_a_forked_process_has_it_open(tmp_path: Path) -> None:
    path = tmp_path / "file"
    process = holder(path, "fork")
    try:
        assert process.stdout is not None and process.stdout.readline() == "released\n"
        with opened_alone(path, in_use):
            assert path.exists()
    finally:
        end(process)


def test_without_a_word_for_it_the_file_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "file"
    wait = (
        "import sys; from pathlib import Path; from dpo_cli.storage.locks import opened_alone\n"
        "path = Path(sys.argv[1]); print('waits', flush=True)\n"
        "with opened_alone(path): print(path.read_text())\n"
    )
    with opened_alone(path, in_use) as descriptor:
        process = subprocess.Popen([sys.executable, "-c", wait, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "waits\n"
        os.write(descriptor, b"written before it was released")
    assert process.communicate(timeout=60)[0] == "written before it was released\n"


def test_what_is_no_file_of_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, error, words in [
        ("link", StorageError, "cannot be written (Too many levels of symbolic links)"),
        ("folder", StorageError, "cannot be written (Is a directory)"),
        ("not/there", StorageError, "cannot be written (No such file or directory)"),
        ("pipe", DataError, "is not a regular file; name another"),
    ]:
        with pytest.raises(error) as refused, opened_alone(tmp_path / name, in_use):
            pass
        assert str(refused.value) == f"{tmp_path / name}: {words}"
    assert (tmp_path / "precious").read_text() == "precious"


def test_where_a_file_system_has_no_locks_we_warn_and_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_here(descriptor: int, blocking: bool) -> bool:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks, "lock_descriptor", none_here)
    said: list[str] = []
    run = tmp_path / "run"
    with RunDirectory(run).owned(said.append):
        (run / ".tmp-manifest.json").write_text("{")
        with RunDirectory(run).owned(said.append):
            assert (run / ".tmp-manifest.json").exists()  # it may be another run's: nothing is swept
    with opened_lines(tmp_path / "log", said.append) as log:
        log.append({"a": 1})
        assert log.read() == b'{"a": 1}\n'
    assert said == [
        *[f"{run}: no locks here (No locks available): see that no other run uses it"] * 2,
        f"{tmp_path / 'log'}: no locks here (No locks available): see that no other process writes it",
    ]
    with pytest.raises(StorageError) as error, opened_alone(tmp_path / "file", in_use):
        pass
    assert str(error.value) == f"{tmp_path / 'file'}: cannot be locked (No locks available)"


# Lines


def test_what_cannot_be_added_whole_is_not_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write = tmp_path / "file", os.write
    left = [4]

    def little_room(descriptor: int, data: bytes) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = write(descriptor, data[: left[0]])
        left[0] -= done
        return done

    with opened_alone(path) as descriptor:
        append_whole(descriptor, b"one\n")
        monkeypatch.setattr("os.write", little_room)
        with pytest.raises(OSError, match="No space left"):
            append_whole(descriptor, b"another\n")
        monkeypatch.undo()
        append_whole(descriptor, b"two\n")
    assert path.read_bytes() == b"one\ntwo\n"
    assert whole_lines(b"one\ntwo\rthree\nhal") == [b"one\n", b"two\rthree\n"]


def test_a_line_that_may_not_be_on_disk_is_not_in_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with opened_lines(tmp_path / "log", pytest.fail) as lines:
        lines.append({"n": 1})
        monkeypatch.setattr("os.fsync", broken)
        with pytest.raises(StorageError, match="cannot be written"):
            lines.append({"n": 2})
        monkeypatch.undo()
        lines.append({"n": 3})
        assert lines.read() == b'{"n": 1}\n{"n": 3}\n'


# Hashes that files and numbers of earlier runs depend on: as the first version computed them


def test_the_hashes_that_stored_files_depend_on_are_as_they_were(tmp_path: Path) -> None:
    pairs = [standard({"prompt": f"Grüße {n} \U0001f600", "chosen": f"a{n}", "rejected": "b"}) for n in range(40)]
    assert content_key(pairs[0]) == "fb806a78c2d100be5017d81bf4eb1683d605b87768cade21a9429b489f3c8fd3"
    tokenized = TokenizedPair(token_ids([1, 2]), token_ids([3]), token_ids([4, 5]), 0, "k", 2**64 - 1)
    sides = "".join(str(int(is_held_out(pair.prompt_text, 0.3, 5))) for pair in pairs)
    assert sides == "0010110000000100010110101010100000000010"
    assert sample_id("hé", ["a", "b"]) == "21dff2fd47642918828a261d76a4903b"
    assert sample_id([{"role": "user", "content": "x"}], ["y"]) == "f3f3917b2f2ae8fe5d9725502c0b4a95"
    assert data_fingerprint([tokenized]) == "5d0b22d9201f9484bda39e25ba41f09a72d9f42c0c80a3b55a596b519639afb3"
    assert [key.hex() for key in tokenized.response_keys] == [
        "1828077f4e8ace0e994745da38c1e34e",
        "b1e7a1439f95e341abb9365ebb6b55b6",
    ]
    (tmp_path / "abc").write_bytes(b"abc")  # the first example of FIPS 180-2
    assert hashing.sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_judgement_of_the_first_response_is_of_no_sample_in_another_order() -> None:
    assert sample_id("q", ["yes", "no"]) != sample_id("q", ["no", "yes"])


def test_texts_are_told_apart_where_one_ends_and_the_next_begins() -> None:
    assert hashing.fingerprint_of_texts("ab", "c") != hashing.fingerprint_of_texts("a", "bc")
    assert hashing.fingerprint({"a": 1, "b": 2}) == hashing.fingerprint({"b": 2, "a": 1})


# What differs from system to system


def test_the_cache_lies_where_the_system_keeps_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DPO_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == tmp_path / ".cache" / "dpo-cli"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "dpo-cli"
    monkeypatch.setattr("sys.platform", "darwin")
    (tmp_path / ".cache" / "dpo-cli").mkdir(parents=True)
    assert cache_dir() == tmp_path / ".cache" / "dpo-cli"  # what is there is used
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"


def test_signals_that_a_system_lacks_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("signal.SIGUSR1")
    assert [one.name for one in known_signals("SIGTERM", "SIGINT", "SIGUSR1")] == ["SIGTERM", "SIGINT"]
