"""What the cache folder holds that runs can make again: log-probs of references, and tokens of data sets."""

import time
from dataclasses import dataclass
from pathlib import Path

from dpo_cli.paths import cache_dir

FOLDERS = {"reference": "log-probs of references", "tokens": "tokens of data sets"}


@dataclass(frozen=True)
class Cached:
    """One folder of the cache."""

    path: Path
    what: str
    files: tuple[Path, ...]
    size: int  # bytes
    last_used: float | None  # seconds since the epoch

    @property
    def line(self) -> str:
        """As a line for the console."""
        if self.last_used is None:
            return f"{self.what}: none"
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.last_used))
        number = f"{len(self.files):,} file{'s' if len(self.files) > 1 else ''}"
        return f"{self.what}: {number}, {size_text(self.size)}, last used {when}"


def size_text(size: int) -> str:
    """Bytes as B, kB, MB or GB."""
    for unit, power in (("GB", 30), ("MB", 20), ("kB", 10)):
        if size >= 2**power:
            return f"{size / 2**power:.1f} {unit}"
    return f"{size} B"


def cached() -> list[Cached]:
    """What each folder holds."""
    found = []
    for name, what in FOLDERS.items():
        folder = cache_dir() / name
        inside = sorted(folder.rglob("*")) if folder.is_dir() and not folder.is_symlink() else []
        files = tuple(path for path in inside if path.is_file() and not path.is_symlink())
        used = [max(path.stat().st_atime, path.stat().st_mtime) for path in files]
        found.append(Cached(folder, what, files, sum(path.stat().st_size for path in files), max(used, default=None)))
    return found


def clear(folder: Cached) -> None:
    """Remove the files of a folder; a run that has one open keeps it until it ends."""
    for path in folder.files:
        path.unlink(missing_ok=True)
    for path in sorted(folder.path.rglob("*"), reverse=True) if folder.files else ():
        if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
            path.rmdir()
