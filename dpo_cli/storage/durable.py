"""Files and folders that are whole or not there, whatever moment the process or the machine stops at.

What is being written carries a name that begins with `.tmp-`; it is flushed to disk and renamed when it is whole. So
whatever still carries such a name was left by a process that is gone, and may be swept away by the run's next owner.
"""

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

UNFINISHED = ".tmp-"
# Only names that this program makes are swept: a run directory may lie in a folder of somebody else's.
OURS = re.compile(
    r"\.tmp-(?:removed-)?(?:step-\d+|final)(?:-\d+)?"
    r"|\.tmp-(?:config\.yaml|manifest\.json|trackers\.json|reference_logps\.bin)"
)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file beside and rename it over an earlier one."""
    beside = path.with_name(f"{UNFINISHED}{path.name}")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a folder beside, and rename it to `target`, which must not exist."""
    beside = target.with_name(f"{UNFINISHED}{target.name}-{os.getpid()}")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        write(beside)
        for file in beside.iterdir():
            sync(file)
        sync(beside)
        os.rename(beside, target)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    sync(target.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder, first from sight: a kill in the middle leaves no half of it under its name."""
    doomed = folder.with_name(f"{UNFINISHED}removed-{folder.name}")
    try:
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(folder, doomed)
    except OSError:
        return
    shutil.rmtree(doomed, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what a process that is gone has left unfinished in a folder."""
    for path in folder.glob(f"{UNFINISHED}*"):
        if not OURS.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems cannot flush a folder, and need not
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)
