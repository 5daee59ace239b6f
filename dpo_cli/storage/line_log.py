"""Files to which whole lines are added, each a JSON object, and never half of one.

`LineLog` has its file for this process alone, and a line is on disk before the next: the job log and the judgements.
`MetricsLog` keeps what cannot be written in memory: a full disk must not end a run that has hours behind it.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dpo_cli.console.text import safe_text
from dpo_cli.errors import CheckpointError, ConfigError, StorageError
from dpo_cli.storage.durable import SAFELY, sync
from dpo_cli.storage.locks import opened_alone


def append_whole(descriptor: int, data: bytes) -> None:
    """Add bytes at the end of a file, all of them, or OSError and none."""
    end = os.fstat(descriptor).st_size
    left = memoryview(data)
    try:
        while left:
            left = left[os.write(descriptor, left) :]
    except OSError:
        with suppress(OSError):  # half a line would spoil the next one
            os.ftruncate(descriptor, end)
        raise


def whole_lines(content: bytes) -> list[bytes]:
    """The lines of a file with their ends; half a line at the end, which a kill leaves, is none."""
    return [line + b"\n" for line in content.split(b"\n")[:-1]]


class LineLog:
    """An open log; `opened_lines` makes one."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    def read(self) -> bytes:
        """All that is in it, half a line at the end included."""
        try:
            with open(self._descriptor, "rb", closefd=False) as file:
                file.seek(0)
                return file.read()
        except OSError as error:
            raise StorageError(f"{safe_text(self.path)}: cannot be read ({error.strerror})") from None

    def cut(self, length: int) -> None:
        """Keep only the first `length` bytes."""
        try:
            os.ftruncate(self._descriptor, length)
            os.fsync(self._descriptor)
        except OSError as error:
            raise StorageError(f"{safe_text(self.path)}: cannot be written ({error.strerror})") from None

    def append(self, record: dict[str, Any]) -> None:
        """Add a line; it is on disk when this returns, or StorageError and the log is as it was."""
        status = os.fstat(self._descriptor)
        if status.st_nlink == 0:
            raise StorageError(f"{safe_text(self.path)}: was removed or replaced meanwhile, and is written no more")
        try:
            append_whole(self._descriptor, _line(record))
            os.fsync(self._descriptor)
        except OSError as error:
            with suppress(OSError):  # what may not be on disk is not in the log
                os.ftruncate(self._descriptor, status.st_size)
            raise StorageError(
                f"{safe_text(self.path)}: cannot be written ({error.strerror}); what was done before is in it"
            ) from None

    def sync_name(self) -> None:
        """Flush the file's name to disk, once it has its first line."""
        with suppress(OSError):  # some file systems cannot flush a folder, and need not
            sync(self.path.parent)


@contextmanager
def opened_lines(path: Path, warn: Callable[[str], None]) -> Iterator[LineLog]:
    """The log at `path`, made where there is none; within, no other process can write to it."""
    if path.is_symlink():
        raise StorageError(f"{safe_text(path)}: is a symbolic link, and is not written through")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{safe_text(path)}: cannot be written ({error.strerror})") from None

    def in_use(_: str) -> ConfigError:
        return ConfigError(f"{safe_text(path)}: another process is writing it; wait for it, or name another output")

    def without_locks(reason: str) -> None:  # some network file systems: better a log without a lock than none
        warn(f"{path}: no locks here ({reason}): see that no other process writes it")

    with opened_alone(path, in_use, without_locks) as descriptor:
        yield LineLog(path, descriptor)


class MetricsLog:
    """metrics.jsonl, the truth of a run: its lines on disk and those that wait; `records` counts both."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records = 0
        self._waiting: list[bytes] = []

    def append(self, record: dict[str, Any]) -> str | None:
        """Add a line; returns what the user should hear when lines begin to wait."""
        first = not self._waiting
        self._waiting.append(_line(record))
        self.records += 1
        try:
            self._write()
        except OSError as error:
            return f"{self.path}: cannot be written ({error.strerror}); its lines wait in memory" if first else None
        return None

    def flush(self) -> None:
        """See that every line is on disk, safe from a power cut; StorageError where that is not possible."""
        try:
            self._write()
            if self.path.exists():
                sync(self.path)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be written ({error.strerror})") from None

    def _write(self) -> None:
        if not self._waiting:
            return
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | SAFELY, 0o644)
        try:
            append_whole(descriptor, b"".join(self._waiting))
        finally:
            os.close(descriptor)
        self._waiting.clear()

    def cut(self, records: int) -> None:
        """Take back what was logged after a checkpoint: it will be logged again, the same."""
        lines = whole_lines(self._stored())
        if len(lines) < records:
            raise CheckpointError(f"{self.path}: has {len(lines)} lines; the checkpoint was saved after {records}")
        for number, line in enumerate(lines[:records], start=1):
            if not _is_record(line):
                raise CheckpointError(f"{self.path} line {number}: is not a line that this run has written")
        try:
            if self.path.is_file():
                os.truncate(self.path, sum(map(len, lines[:records])))
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be written ({error.strerror})") from None
        self.records = records

    def read(self) -> list[dict[str, Any]]:
        """Every record, those that wait included."""
        return [json.loads(line) for line in (self._stored() + b"".join(self._waiting)).splitlines()]

    def _stored(self) -> bytes:
        return self.path.read_bytes() if self.path.is_file() else b""


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode("ascii") + b"\n"


def _is_record(line: bytes) -> bool:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    if not isinstance(record, dict) or record.get("split") not in ("train", "eval"):
        return False
    return type(record.get("step")) is int and isinstance(record.get("loss"), float)
