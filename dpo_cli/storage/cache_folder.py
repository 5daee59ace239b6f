"""Folders of files that can be made again: how large they are, when each was used, and what is dropped for room.

An entry is a file, or a folder that is used as a whole. `touch` marks it as used; what was unused longest goes first.
"""

import os
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dpo_cli.console.reporter import Reporter
from dpo_cli.console.text import plural, significant
from dpo_cli.errors import ConfigError, DpoError
from dpo_cli.paths import cache_dir
from dpo_cli.storage.durable import remove_folder
from dpo_cli.storage.locks import opened_alone


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
            remove_folder(path)
        else:
            with opened_alone(path, lambda _: ConfigError("in use"), lambda _: None):
                path.unlink()
    except (OSError, DpoError):
        pass
    return not os.path.lexists(path)
