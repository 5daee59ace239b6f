"""metrics.jsonl, the truth of a run: a line a record, never half of one.

A disk without room must not end a run that has hours behind it: a line that cannot be written waits in memory, and
goes to disk with the next one that can.
"""

import json
import os
from pathlib import Path
from typing import Any

from dpo_cli.errors import CheckpointError, StorageError


class MetricsLog:
    """The lines of a run's metrics, on disk and waiting; `records` counts both."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records = 0
        self._waiting: list[bytes] = []

    def append(self, record: dict[str, Any]) -> str | None:
        """Add a line; returns what the user should hear when lines begin to wait."""
        first = not self._waiting
        self._waiting.append((json.dumps(record) + "\n").encode())
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
                with self.path.open("rb") as file:
                    os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be written ({error.strerror})") from None

    def _write(self) -> None:
        if not self._waiting:
            return
        with self.path.open("ab", buffering=0) as file:
            end = os.fstat(file.fileno()).st_size
            data = b"".join(self._waiting)
            try:
                written = file.write(data)
                if written != len(data):
                    raise OSError(28, os.strerror(28))
            except OSError:
                os.ftruncate(file.fileno(), end)  # no half of a line stays behind
                raise
        self._waiting.clear()

    def cut(self, records: int) -> None:
        """Take back what was logged after a checkpoint: it will be logged again, the same."""
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.is_file() else []
        whole = [line for line in lines if line.endswith(b"\n")]
        if len(whole) < records:
            raise CheckpointError(f"{self.path}: has {len(whole)} lines; the checkpoint was saved after {records}")
        for number, line in enumerate(whole[:records], start=1):
            if not _is_record(line):
                raise CheckpointError(f"{self.path} line {number}: is not a line that this run has written")
        try:
            if self.path.is_file():
                os.truncate(self.path, sum(map(len, whole[:records])))
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be written ({error.strerror})") from None
        self.records = records

    def read(self) -> list[dict[str, Any]]:
        """Every record, those that wait included."""
        stored = self.path.read_bytes() if self.path.is_file() else b""
        return [json.loads(line) for line in (stored + b"".join(self._waiting)).splitlines()]


def _is_record(line: bytes) -> bool:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    if not isinstance(record, dict) or record.get("split") not in ("train", "eval"):
        return False
    return type(record.get("step")) is int and isinstance(record.get("loss"), float)
