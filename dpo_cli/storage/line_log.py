"""A file to which whole lines are added, each on disk before the next, by one process at a time."""

import fcntl
import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from dpo_cli.console.text import safe_text
from dpo_cli.errors import ConfigError, DataError, StorageError


class LineLog:
    """An open log; `opened_lines` makes one."""

    def __init__(self, path: Path, file: FileIO) -> None:
        self.path = path
        self._file = file

    def read(self) -> bytes:
        """All that is in it, half a line at the end included."""
        try:
            self._file.seek(0)
            return self._file.read()
        except OSError as error:
            raise StorageError(f"{safe_text(self.path)}: cannot be read ({error.strerror})") from None

    def cut(self, length: int) -> None:
        """Keep only the first `length` bytes."""
        try:
            self._file.truncate(length)
            os.fsync(self._file.fileno())
        except OSError as error:
            raise StorageError(f"{safe_text(self.path)}: cannot be written ({error.strerror})") from None

    def append(self, record: dict[str, Any]) -> None:
        """Add a line; it is on disk when this returns, or StorageError and the log is as it was."""
        status = os.fstat(self._file.fileno())
        if status.st_nlink == 0:
            raise StorageError(f"{safe_text(self.path)}: was removed or replaced meanwhile, and is written no more")
        left = memoryview(json.dumps(record).encode("ascii") + b"\n")
        try:
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            with suppress(OSError):  # half a line would spoil the one that comes behind it
                self._file.truncate(status.st_size)
            raise StorageError(
                f"{safe_text(self.path)}: cannot be written ({error.strerror}); what was done before is in it"
            ) from None

    def sync_name(self) -> None:
        """Flush the file's name to disk, once it has its first line."""
        with suppress(OSError):  # some file systems cannot flush a folder, and need not
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


@contextmanager
def opened_lines(path: Path, warn: Callable[[str], None]) -> Iterator[LineLog]:
    """The log at `path`, made where there is none; within, no other process can write to it."""
    if path.is_symlink():
        raise StorageError(f"{safe_text(path)}: is a symbolic link, and is not written through")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without a buffer: what could not be written is not tried again when the file is closed.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StorageError(f"{safe_text(path)}: cannot be written ({error.strerror})") from None
    with open(descriptor, "r+b", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise DataError(f"{safe_text(path)}: is not a regular file; name another")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{safe_text(path)}: another process is writing it; wait for it, or name another output"
            ) from None
        except OSError as error:  # some network file systems: better a log without a lock than none
            warn(f"{path}: no locks here ({error.strerror}): see that no other process writes it")
        yield LineLog(path, file)
