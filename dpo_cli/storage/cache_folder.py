"""Folders of files that can be made again: how large they are, when each was used, and what is dropped for room.

An entry is a file, or a folder that is used as a whole. `touch` marks it as used; what was unused longest goes first.
Who fills a folder has the file `lock` in it locked: others wait, and it is not dropped.
"""

import atexit
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dpo_cli.console.reporter import Reporter
from dpo_cli.console.text import plural, safe_text, significant
from dpo_cli.errors import DpoError, StorageError
from dpo_cli.paths import cache_dir
from dpo_cli.storage.durable import UNFINISHED, remove_folder, write_folder
from dpo_cli.storage.locks import opened_alone

LOCK = "lock"


class InUseError(DpoError):
    """Another process fills the folder."""


@dataclass(frozen=True)
class CacheEntry:
    """A file or folder of a cache."""

    path: Path
    bytes: int
    used: float  # seconds since the epoch


def cache_folder(kind: str) -> Path:
    """Where a kind of cache lies: `reference` for log-probs, `tokens` for tokenized pairs."""
    return cache_dir() / kind


def cache_files(kind: str = "reference") -> list[CacheEntry]:
    """What a cache holds, unused longest first."""
    return folder_files(cache_folder(kind))


def clear_cache(kind: str = "reference") -> int:
    """Drop everything in a cache that no process writes at this moment; returns how many bytes were freed."""
    return sum(entry.bytes for entry in shrink(cache_folder(kind), -1))


def touch(path: Path) -> None:
    """Mark an entry as used now. The time of access is not kept by every file system."""
    with suppress(OSError):
        os.utime(path)


def folder_files(folder: Path) -> list[CacheEntry]:
    """What is in the folder of a cache, unused longest first; what cannot be looked at is left out."""
    found = []
    with suppress(OSError):
        for path in folder.iterdir():
            with suppress(OSError):
                inside = [path] if path.is_symlink() or not path.is_dir() else [*path.rglob("*"), path]
                sizes = [file.lstat().st_size for file in inside]
                found.append(CacheEntry(path, sum(sizes), path.lstat().st_mtime))
    return sorted(found, key=lambda entry: (entry.used, entry.path.name))


def shrink(folder: Path, limit: float, keep: Collection[Path | None] = ()) -> list[CacheEntry]:
    """Drop what was unused longest until the folder has at most `limit` bytes; returns what was dropped.

    What another process writes at this moment stays, and `keep` does. A file that another process has mapped goes on
    being read by it.
    """
    entries = folder_files(folder)
    size, dropped = sum(entry.bytes for entry in entries), []
    for entry in entries:
        if size <= limit:
            break
        if entry.path not in keep and _remove(entry.path):
            size -= entry.bytes
            dropped.append(entry)
    return dropped


def make_room(kind: str, gib: float | None, key: str, reporter: Reporter, keep: Collection[Path | None]) -> None:
    """Drop what was unused longest in a kind of cache, as far as it is above the limit of `gib` that `key` sets.

    The reporter says what was dropped, and warns where what `keep` names takes more than the limit.
    """
    folder = cache_folder(kind)
    if gib is None:
        return
    dropped = shrink(folder, gib * 2**30, keep)
    if dropped:
        freed = sum(entry.bytes for entry in dropped) / 2**30
        reporter.say(
            f"{folder}: dropped {plural(len(dropped), 'item')} that {'was' if len(dropped) == 1 else 'were'} unused "
            f"longest, {significant(freed)} GiB ({key}={gib:g})"
        )
    left = sum(entry.bytes for entry in folder_files(folder)) / 2**30
    if left > gib:
        reporter.warn(
            f"{folder}: this run needs {significant(left)} GiB, more than {key}={gib:g}; raise it, or "
            "another run drops them"
        )


def _remove(path: Path) -> bool:
    """Remove an entry, unless another process has it locked; whether it is gone."""
    try:
        if path.is_symlink():
            path.unlink()
        elif path.is_dir():
            if (path / LOCK).exists():
                with opened_alone(path / LOCK, InUseError, lambda _: None):
                    pass
            remove_folder(path)
        else:
            with opened_alone(path, InUseError, lambda _: None):
                path.unlink()
    except (OSError, DpoError):
        pass
    return not os.path.lexists(path)


@contextmanager
def filling(folder: Path, poll: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """A folder of the cache, made where it is not there; within, no other process fills it.

    What killed processes left unfinished in it is removed. `poll` is called while another process is waited for. Where
    the folder cannot be written it is a temporary one; StorageError where that cannot be made either.
    """
    with ExitStack() as alone:
        try:
            while not _is_locked(folder, alone):
                poll()
                time.sleep(0.05)
        except (OSError, StorageError) as error:
            yield _temporary(folder, error)
            return
        for left in folder.glob(f"{UNFINISHED}*"):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
        try:
            yield folder
        finally:
            with suppress(OSError):
                (folder / LOCK).unlink()


def _is_locked(folder: Path, alone: ExitStack) -> bool:
    """Lock a folder until `alone` ends; False where another process has it, or has removed it."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as attempt:
        try:
            descriptor = attempt.enter_context(opened_alone(folder / LOCK, InUseError, lambda _: None))
            if os.path.samestat(os.fstat(descriptor), os.stat(folder / LOCK)):
                alone.push(attempt.pop_all())
                return True
        except (InUseError, FileNotFoundError):
            pass
        except StorageError:
            if folder.is_dir():
                raise
    return False


def _temporary(instead_of: Path, why: Exception) -> Path:
    try:
        folder = Path(tempfile.mkdtemp(prefix="dpo-cache-"))
    except OSError:
        raise StorageError(f"{safe_text(instead_of)}: cannot be written ({safe_text(why)}); set DPO_CACHE") from None
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def filled_once(target: Path, write: Callable[[Path], None]) -> Path:
    """The folder `target` in a folder of the cache, or in a temporary one where that cannot be written.

    Where it is not there yet `write` fills it beside; of several processes one does. StorageError where that fails.
    """
    if target.is_dir():
        return target
    with filling(target.parent) as folder:
        target = folder / target.name
        try:
            if not target.is_dir():
                write_folder(target, write)
        except OSError as error:
            reason = error.strerror or str(error)
            raise StorageError(
                f"{safe_text(folder)}: cannot be written ({reason}); set DPO_CACHE to a folder with space"
            ) from None
        return target
