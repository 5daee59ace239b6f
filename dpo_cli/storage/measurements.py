"""What was measured on this machine, remembered: notes of a few bytes in the cache folder.

Two measurements may differ, under load for instance; a decision that depends on one must not change between two runs
of one command.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from dpo_cli.paths import cache_dir
from dpo_cli.storage.durable import write_whole
from dpo_cli.storage.hashing import fingerprint


def recall(kind: str, how: list[Any]) -> dict[str, Any] | None:
    """What was noted under these conditions, as it stands there; None where nothing can be read."""
    try:
        found = json.loads(_path(kind, how).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def note(kind: str, how: list[Any], facts: dict[str, Any]) -> None:
    """Note what was found under these conditions; where that is not possible it is measured again next time."""
    path = _path(kind, how)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(facts).encode("ascii"), shared=True)


def _path(kind: str, how: list[Any]) -> Path:
    return cache_dir() / kind / f"{fingerprint(how)}.json"
