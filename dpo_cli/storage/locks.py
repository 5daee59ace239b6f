"""Files that one process at a time has open, on every system.

The lock is on the file itself, not on its content or its being there: the system releases it when its owner ends,
however it ends, so that nothing which a killed process leaves behind keeps another waiting.
"""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import lock_descriptor, unlock_descriptor

from dpo_cli.console.text import safe_text
from dpo_cli.errors import DataError, DpoError, StorageError
from dpo_cli.storage.durable import SAFELY


@contextmanager
def opened_alone(
    path: Path,
    in_use: Callable[[str], DpoError] | None = None,
    without_locks: Callable[[str], None] | None = None,
) -> Iterator[int]:
    """A descriptor of the file at `path`, made where there is none; within, no other process has it.

    Writes go to the end. Where another process has the file, what `in_use` makes of its first 200 bytes is raised;
    without `in_use` we wait. `without_locks` hears why the file system has no locks, and the lock is skipped; without
    it that is a StorageError, like every other reason why the file cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | SAFELY, 0o644)
    except OSError as error:
        raise StorageError(f"{safe_text(path)}: cannot be written ({error.strerror})") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise DataError(f"{safe_text(path)}: is not a regular file; name another")
        try:
            owned = lock_descriptor(descriptor, blocking=in_use is None)
        except OSError as error:
            if without_locks is None:
                raise StorageError(f"{safe_text(path)}: cannot be locked ({error.strerror})") from None
            without_locks(str(error.strerror))
            owned = True
        if not owned:
            assert in_use is not None
            raise in_use(_first_words(descriptor))
        try:
            yield descriptor
        finally:
            with suppress(OSError):  # closing is not enough: a forked process may have it open still
                unlock_descriptor(descriptor)
    finally:
        os.close(descriptor)


def _first_words(descriptor: int) -> str:
    try:
        return safe_text(os.read(descriptor, 200).decode("utf-8", "replace").strip())
    except OSError:  # Windows lets nobody read what another process has locked
        return ""
