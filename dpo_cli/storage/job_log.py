"""What a job has done so far, so that it goes on where it was cut off: a header says which job, then a line a part.

A job's output appears whole, when all is done; until then there is the journal beside it, `<output>.part`.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dpo_cli.config.versions import flat
from dpo_cli.console.text import safe_text
from dpo_cli.errors import ConfigError, DataError, StorageError
from dpo_cli.paths import user_path
from dpo_cli.storage.durable import write_whole
from dpo_cli.storage.line_log import LineLog, opened_lines

VERSION = 1


class Journal:
    """The parts that are done, each a JSON object; `opened_journal` makes one. Without a log it is in memory alone."""

    def __init__(self, log: LineLog | None = None, done: Iterable[dict[str, Any]] = ()) -> None:
        self.done = list(done)
        self._log = log

    def append(self, part: dict[str, Any]) -> None:
        """Add a part; it is on disk when this returns."""
        if self._log is not None:
            self._log.append(part)
        self.done.append(part)


def journal_of(output: Path) -> Path:
    """Where a job with this output keeps its journal."""
    return output.with_name(f"{output.name}.part")


@contextmanager
def opened_journal(
    output: Path | None, job: dict[str, Any], keys: Collection[str], warn: Callable[[str], None]
) -> Iterator[Journal]:
    """The journal of the job that writes `output`, for this process alone; without an output nothing is kept.

    `job` is what the parts depend on, as JSON: a journal of another one is refused by ConfigError, which says what
    differs. `keys` are those of every part. Half a line at the end, which a kill leaves, is cut off and done again.
    """
    if output is None:
        yield Journal()
        return
    if output.is_symlink():
        raise StorageError(f"{safe_text(output)}: is a symbolic link, and is not written through")
    with opened_lines(journal_of(output), warn) as log:
        lines = _whole_lines(log, keys, warn)
        header = {"journal": VERSION, "job": json.loads(json.dumps(job))}
        if not lines:
            log.append(header)
            log.sync_name()
        elif lines[0] != header:
            found = lines[0].get("job")
            raise ConfigError(f"{safe_text(log.path)}: {_differences(found if isinstance(found, dict) else {}, job)}")
        yield Journal(log, lines[1:])


def _whole_lines(log: LineLog, keys: Collection[str], warn: Callable[[str], None]) -> list[dict[str, Any]]:
    content = log.read()
    end = content.rfind(b"\n") + 1
    lines = []
    for number, line in enumerate(content[:end].splitlines(), start=1):
        value: Any = None
        with suppress(ValueError, RecursionError):
            value = json.loads(line)
        if not isinstance(value, dict) or (
            value.get("journal") != VERSION if number == 1 else not value.keys() >= set(keys)
        ):
            raise DataError(
                f"{safe_text(log.path)} line {number}: is not what this program writes; remove the file to begin anew"
            )
        lines.append(value)
    if end < len(content):
        warn(f"{safe_text(log.path)}: its last line was cut off in the middle; that part is done again")
        log.cut(end)
    return lines


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """In words, why a journal is another job's."""
    was, now_is = flat(before), flat(json.loads(json.dumps(now)))
    changed = [
        f"{key} was {safe_text(was.get(key, 'not there'), 60)}, is {safe_text(now_is.get(key, 'not there'), 60)}"
        for key in sorted(was.keys() | now_is.keys())
        if was.get(key) != now_is.get(key)
    ]
    return f"was begun with other settings ({'; '.join(changed)}); take the changes back, or name another output"


def output_path(name: str, ending: str) -> Path:
    """The file that a user names for a job's output; ConfigError where it is a folder, or ends otherwise."""
    output = user_path(name, StorageError, "output")
    if output.is_dir():
        raise ConfigError(f"output={safe_text(output)}: is a folder; name a file in it")
    if output.suffix != ending:
        raise ConfigError(f"output={safe_text(output)}: must end in {ending}, which is what is written")
    return output


def manifest_of(output: Path) -> Path:
    """Where it stands how a file came to be."""
    return output.with_name(f"{output.name}.manifest.json")


def is_done(output: Path, job: dict[str, Any]) -> bool:
    """Whether this very job's output is there already; ConfigError where another's is."""
    if output.exists() and not output.is_file():
        raise ConfigError(f"output={safe_text(output)}: is no regular file; name another")
    if not output.exists():
        return False
    try:
        made = json.loads(manifest_of(output).read_text(encoding="utf-8"))
        before = made["job"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        before = None
    if not isinstance(before, dict):
        raise ConfigError(f"output={safe_text(output)}: is there already; name another file")
    if before != json.loads(json.dumps(job)):
        raise ConfigError(f"output={safe_text(output)}: {_differences(before, job)}")
    with suppress(OSError):  # a kill after the output was written, and before its journal was gone
        journal_of(output).unlink(missing_ok=True)
    return True


def finish(journal: Journal, output: Path, rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Write the output and its manifest, both whole, and remove the journal."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        # The manifest first: with it alone the job is done again, without it a finished file would be a stranger's.
        write_whole(manifest_of(output), (json.dumps(facts, indent=1) + "\n").encode("utf-8"))
        write_whole(output, text.encode("utf-8", "backslashreplace"))
        journal_of(output).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{safe_text(output)}: cannot be written ({error.strerror})") from None
