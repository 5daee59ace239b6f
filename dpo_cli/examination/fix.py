"""fix=: writes the rows that are worth training on, unchanged, and a list of the others with the reason of each."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dpo_cli.config.schema import DataConfig
from dpo_cli.console.text import safe_text
from dpo_cli.data.mapping import RowMapping
from dpo_cli.errors import ConfigError, StorageError
from dpo_cli.examination.reading import KEPT, OF_PAIRS, Side, read_row, rows_of
from dpo_cli.paths import user_path
from dpo_cli.storage.durable import whole_file


def fix_path(name: str) -> Path:
    """The file that `fix=` names; ConfigError where it, or its list of changes, exists already or is no .jsonl."""
    path = user_path(name, StorageError, "fix")
    if path.suffix != ".jsonl":
        raise ConfigError(f"fix={safe_text(name)}: must end in .jsonl")
    for file in (path, changes_path(path)):
        if file.exists() or file.is_symlink():
            raise ConfigError(f"fix={safe_text(name)}: {safe_text(file)} exists already; name another file")
    return path


def changes_path(path: Path) -> Path:
    """The list of the rows that were dropped: cleaned.jsonl has cleaned.changes.jsonl."""
    return path.with_name(f"{path.stem}.changes.jsonl")


def reasons_of_rows(side: Side) -> dict[int, str]:
    """The rows that are dropped, each with a reason: bad ones, and those of which no pair is kept."""
    found = dict.fromkeys(side.bad_rows, "bad_row")
    indices = np.asarray(side.indices)
    kept = set(indices[side.reasons == KEPT].tolist())
    for index, reason in zip(indices.tolist(), side.reasons.tolist(), strict=True):
        if index not in kept:
            found.setdefault(index, OF_PAIRS[reason])
    return found


def write_fixed(side: Side, config: DataConfig, path: Path) -> tuple[int, int]:
    """Write both files, whole; how many rows are kept and dropped. StorageError where they cannot be written."""
    reasons, mapping = reasons_of_rows(side), RowMapping.of(config)

    def lines(dropped: bool) -> Iterator[bytes]:
        for row in rows_of(config, side.which):
            reason = reasons.get(row.index)
            if (reason is not None) is dropped:
                change = {"index": row.index, "location": row.location, "reason": reason}
                if reason == "bad_row":
                    change["problem"] = read_row(row, config, mapping).problem
                content = change if dropped else row.value
                yield (json.dumps(content, ensure_ascii=False, default=str) + "\n").encode("utf-8", "backslashreplace")

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(changes_path(path)) as changes, whole_file(path) as cleaned:
            changes.writelines(lines(dropped=True))
            cleaned.writelines(lines(dropped=False))
    except OSError as error:
        raise StorageError(f"{safe_text(path)}: cannot be written ({error.strerror})") from None
    return side.rows - len(reasons), len(reasons)
