"""Paths as users write them: `~` for their home, and one line where the system will not even look."""

from pathlib import Path

from dpo_cli.console.text import safe_text
from dpo_cli.errors import DpoError


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
