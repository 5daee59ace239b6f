"""Paths: those that users write, and the one folder where caches lie."""

import os
import sys
from pathlib import Path

from platformdirs import user_cache_path

from dpo_cli.console.text import safe_text
from dpo_cli.errors import DpoError, StorageError


def user_path(text: str, error: type[DpoError], key: str = "") -> Path:
    """The path that a user's text names, whether or not something is there.

    `error`, with `key` before the text, where it cannot be looked at: too long a name, no such home, no permission.
    """
    try:
        path = Path(text).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or str(problem)
        label = f"{key}={safe_text(text, limit=80)}" if key else safe_text(text, limit=80)
        raise error(f"{label}: cannot be looked at ({safe_text(reason)})") from None
    return path


def cache_dir() -> Path:
    """Where converted models and measurements lie: $DPO_CACHE, else dpo-cli in the user's cache folder."""
    if os.environ.get("DPO_CACHE"):
        return user_path(os.environ["DPO_CACHE"], StorageError, "DPO_CACHE")
    earlier = Path("~/.cache/dpo-cli").expanduser()  # of the first versions, on macOS too
    if sys.platform == "darwin" and earlier.is_dir():
        return earlier
    return user_cache_path("dpo-cli", appauthor=False)
