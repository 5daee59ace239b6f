"""Files and folders that are complete or absent, at whatever moment the process or the machine stops.

What is being written carries a name that begins with `.tmp-`; it is flushed to disk and renamed when it is whole. So
whatever still carries such a name was left by a process that is gone, and may be swept away by the run's next owner.
"""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

UNFINISHED = ".tmp-"
# Only names that this program makes are swept: a run directory may lie in a folder of somebody else's.
OURS = re.compile(
    r"\.tmp-(?:removed-)?(?:step-\d+|final|part)(?:-\d+)?"
    r"|\.tmp-step-\d+\.jsonl|\.tmp-(?:config\.yaml|manifest\.json|trackers\.json|reference_logps\.bin)"
)


# A link in somebody else's directory is never followed, a child process inherits no file; not every system has each.
SAFELY = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_CLOEXEC", "O_BINARY"))
T = TypeVar("T")


def write_whole(path: Path, data: bytes, shared: bool = False) -> None:
    """Write a file beside and rename it over an earlier one; OSError leaves the earlier one as it was.

    `shared`: other processes may write the same file meanwhile, so what is unfinished carries this one's number.
    """
    write_together({path: data}, shared)


def write_together(files: Mapping[Path, bytes], shared: bool = False) -> None:
    """Write every file beside before the first is renamed, in order: a full disk leaves all the earlier ones."""
    ending = f"-{os.getpid()}" if shared else ""
    beside = {path: path.with_name(f"{UNFINISHED}{path.name}{ending}") for path in files}
    try:
        for path, data in files.items():
            with open(beside[path], "wb", opener=lambda name, flags: os.open(name, flags | SAFELY, 0o666)) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path in files:
            os.replace(beside[path], path)
    except OSError:
        for unfinished in beside.values():
            unfinished.unlink(missing_ok=True)
        raise
    for folder in {path.parent for path in files}:
        sync(folder)


@contextmanager
def whole_file(path: Path, shared: bool = True) -> Iterator[BinaryIO]:
    """A file to write into, piece by piece; it appears under its name once it is whole, and not after an error."""
    beside = path.with_name(f"{UNFINISHED}{path.name}" + (f"-{os.getpid()}" if shared else ""))
    try:
        with open(beside, "w+b", opener=lambda name, flags: os.open(name, flags | SAFELY, 0o666)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_stream(path: Path, write: Callable[[BinaryIO], T], shared: bool = False) -> T:
    """As `write_whole`, for content that `write` makes while it writes; returns what `write` returns."""
    with whole_file(path, shared) as file:
        return write(file)


def link_or_copy(source: Path, target: Path) -> None:
    """Link `target` to a file that never changes; copy it where the disk has no hard links. OSError where both fail."""
    beside = target.with_name(f"{UNFINISHED}{target.name}")
    beside.unlink(missing_ok=True)
    try:
        os.link(source, beside)
    except OSError:
        with source.open("rb") as content:
            write_stream(target, lambda file: shutil.copyfileobj(content, file))
        return
    os.replace(beside, target)
    beside.unlink(missing_ok=True)  # to rename one name of a file to another of its names does nothing
    sync(target.parent)


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a folder beside, and rename it to `target`, which must not exist."""
    # Process ids repeat where containers share a disk.
    beside = target.with_name(f"{UNFINISHED}{target.name}-{os.getpid()}{secrets.randbelow(10**6):06d}")
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


def make_once(target: Path, write: Callable[[Path], None]) -> None:
    """Do `write_folder` unless the folder exists; another process may make the same one meanwhile."""
    if not target.is_dir():
        try:
            write_folder(target, write)
        except OSError:
            if not target.is_dir():
                raise


def remove_folder(folder: Path) -> None:
    """Remove a folder, renamed first: a kill in the middle leaves no half of it under its name."""
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
    """Flush a file, or the names in a folder, to disk; on Windows a folder's names need no flush."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems cannot flush a folder, and need not
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)
