"""The files of a report, written together into its folder."""

from collections.abc import Mapping
from pathlib import Path

from dpo_cli.console.text import safe_text
from dpo_cli.errors import StorageError
from dpo_cli.storage.durable import write_together


def write_files(folder: Path, files: Mapping[str, str], what: str) -> None:
    """Write files, by name, in their order, all of them or none; the folder is made.

    StorageError, which calls them `what`, where one cannot be written; then an earlier report is as it was.
    """
    for path in (folder, *(folder / name for name in files)):
        if path.is_symlink():  # in an untrusted run directory it could make us write anywhere
            raise StorageError(f"{safe_text(path)}: is a symbolic link, and is not written through")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_together({folder / name: text.encode("utf-8") for name, text in files.items()}, shared=True)
    except OSError as error:
        reason = error.strerror or "cannot be written"
        raise StorageError(f"{safe_text(folder)}: the {what} cannot be written ({reason})") from None
