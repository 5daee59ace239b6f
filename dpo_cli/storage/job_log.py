"""What a job has done so far, so that a stopped job resumes: a header that says which job, then a line for each part.

The output file appears complete, once the job is done; until then the job log lies beside it, `<output>.part`.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from dpo_cli.config.versions import flat
from dpo_cli.console.text import safe_text
from dpo_cli.engine.engine import Engine
from dpo_cli.errors import ConfigError, DataError, StorageError
from dpo_cli.paths import user_path
from dpo_cli.storage.durable import write_whole
from dpo_cli.storage.line_log import LineLog, opened_lines

VERSION = 2


class JobLog:
    """The parts that are done, each a JSON object; made by `open_job_log`. Without a log it is in memory only."""

    def __init__(self, log: LineLog | None = None, done: Iterable[dict[str, Any]] = ()) -> None:
        self.done = list(done)
        self._log = log

    def append(self, part: dict[str, Any]) -> None:
        """Add a part; it is on disk when this returns."""
        if self._log is not None:
            self._log.append(part)
        self.done.append(part)


def job_log_path(output: Path) -> Path:
    """The job log of a job with this output."""
    return output.with_name(f"{output.name}.part")


@contextmanager
def open_job_log(
    output: Path | None, job: dict[str, Any], keys: Collection[str], warn: Callable[[str], None]
) -> Iterator[JobLog]:
    """Open the job log of the job that writes `output`, locked for this process; without an output nothing is kept.

    `job` is what the parts depend on, as JSON: ConfigError where the log is of another job, with what differs. `keys`
    are those of every part. An incomplete last line, which a kill leaves, is removed, and its part is done again.
    """
    if output is None:
        yield JobLog()
        return
    if output.is_symlink():
        raise StorageError(f"{safe_text(output)}: is a symbolic link; name a regular file")
    with opened_lines(job_log_path(output), warn) as log:
        lines = _complete_lines(log, keys, warn)
        header = {"job_log": VERSION, "job": json.loads(json.dumps(job))}
        if not lines:
            log.append(header)
            log.sync_name()
        elif lines[0] != header:
            found = lines[0].get("job")
            raise ConfigError(f"{safe_text(log.path)}: {_differences(found if isinstance(found, dict) else {}, job)}")
        yield JobLog(log, lines[1:])


@contextmanager
def shared_job_log(
    engine: Engine, output: Path | None, job: dict[str, Any], keys: Collection[str], warn: Callable[[str], None]
) -> Iterator[JobLog]:
    """As `open_job_log`, for ranks that all append the same parts: rank 0 has the file, all know its content."""
    with nullcontext(JobLog()) if engine.rank else open_job_log(output, job, keys, warn) as log:
        log.done = engine.same(lambda: log.done)
        yield log


def _complete_lines(log: LineLog, keys: Collection[str], warn: Callable[[str], None]) -> list[dict[str, Any]]:
    content = log.read()
    end = content.rfind(b"\n") + 1
    lines = []
    for number, line in enumerate(content[:end].splitlines(), start=1):
        value: Any = None
        with suppress(ValueError, RecursionError):
            value = json.loads(line)
        if not isinstance(value, dict) or (
            value.get("job_log") != VERSION if number == 1 else not value.keys() >= set(keys)
        ):
            raise DataError(
                f"{safe_text(log.path)} line {number}: is not a job log of this version; remove it to start again"
            )
        lines.append(value)
    if end < len(content):
        warn(f"{safe_text(log.path)}: its last line is incomplete; that part is done again")
        log.cut(end)
    return lines


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """A sentence that says how the settings of two jobs differ."""
    was, now_is = flat(before), flat(json.loads(json.dumps(now)))
    changed = [
        f"{key} was {safe_text(was.get(key, 'not set'), 60)}, is {safe_text(now_is.get(key, 'not set'), 60)}"
        for key in sorted(was.keys() | now_is.keys())
        if was.get(key) != now_is.get(key)
    ]
    return f"was started with other settings ({'; '.join(changed)}); undo the changes, or name another output"


def output_path(name: str, ending: str) -> Path:
    """The file that a user names for a job's output; ConfigError where it is a folder or has another ending."""
    output = user_path(name, StorageError, "output")
    if output.is_dir():
        raise ConfigError(f"output={safe_text(output)}: is a folder; name a file in it")
    if output.suffix != ending:
        raise ConfigError(f"output={safe_text(output)}: must end in {ending}")
    return output


def manifest_path(output: Path) -> Path:
    """The file that says how an output was made."""
    return output.with_name(f"{output.name}.manifest.json")


def is_done(output: Path, job: dict[str, Any]) -> bool:
    """Whether the output of this job exists already; ConfigError where it is the output of another job."""
    if output.exists() and not output.is_file():
        raise ConfigError(f"output={safe_text(output)}: is not a regular file; name another")
    if not output.exists():
        return False
    try:
        made = json.loads(manifest_path(output).read_text(encoding="utf-8"))
        before = made["job"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        before = None
    if not isinstance(before, dict):
        raise ConfigError(f"output={safe_text(output)}: already exists; name another file")
    if before != json.loads(json.dumps(job)):
        raise ConfigError(f"output={safe_text(output)}: {_differences(before, job)}")
    with suppress(OSError):  # left by a kill between writing the output and removing the log
        job_log_path(output).unlink(missing_ok=True)
    return True


def finish_job(output: Path, rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Write the output and its manifest, each atomically, and remove the job log."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        # The manifest first: with it alone the job is done again; an output without it would be refused as unknown.
        write_whole(manifest_path(output), (json.dumps(facts, indent=1) + "\n").encode("utf-8"))
        write_whole(output, text.encode("utf-8", "backslashreplace"))
        job_log_path(output).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{safe_text(output)}: cannot be written ({error.strerror})") from None
