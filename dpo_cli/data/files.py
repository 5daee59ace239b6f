"""Sources of rows: a file or a hub data set. Each row comes with its location, for messages.

A row that cannot be read is yielded with its problem; the caller decides whether it stops the run.
"""

import csv
import difflib
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dpo_cli.console.text import plural, safe_text
from dpo_cli.errors import DataError
from dpo_cli.paths import user_path

MAX_LINE_BYTES = 16 * 2**20  # a longer line is not a pair
SHIPPED = {"sample:train": "sample/train.jsonl", "sample:test": "sample/test.jsonl"}


@dataclass(frozen=True)
class SourceRow:
    """One row of a source; `problem` says why `value` is missing."""

    index: int  # from 0; blank lines do not count
    location: str  # for messages: `pairs.jsonl line 412`
    value: dict[str, Any] | None
    problem: str | None = None


def local_path(source: str) -> Path | None:
    """The file that a `data.train` or `data.eval` names, or None for a hub data set.

    DataError where it names neither, so that a missing file is never looked up on the hub.
    """
    if source in SHIPPED:
        return Path(__file__).resolve().parent.parent / "assets" / SHIPPED[source]
    path = user_path(source, DataError)
    if path.is_file():
        return path
    if path.is_dir():
        raise DataError(f"{safe_text(source)}: is a folder; name a file in it")
    if path.exists():
        raise DataError(f"{safe_text(source)}: is not a regular file; copy its content into one")
    name = path.name.lower()
    looks_local = _reader(name) is not None or source.startswith((".", "/", "~")) or source.count("/") != 1
    if not looks_local:
        return None
    beside = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.6)
    hint = f"; did you mean {path.parent / close[0]}?" if close else ""
    raise DataError(f"{safe_text(source)}: no such file{safe_text(hint)}")


def _reader(name: str) -> Any:
    for ending, reader in READERS.items():
        if name.endswith(ending):
            return reader
    return None


def read_rows(path: Path) -> Iterator[SourceRow]:
    """Every row of a local file, read by its ending; DataError where the file cannot be read at all."""
    reader = _reader(path.name.lower())
    if reader is None:
        raise DataError(f"{safe_text(path)}: unknown file type; use one of {', '.join(READERS)}")
    try:
        yield from reader(path)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{safe_text(path)}: cannot be read ({safe_text(error)})") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _parse(line: bytes) -> tuple[dict[str, Any] | None, str | None]:
    """A JSON object from one line, or what is wrong with it."""
    if len(line) > MAX_LINE_BYTES:
        return (
            None,
            f"the line is {len(line) / 2**20:.0f} MiB long; the limit is {MAX_LINE_BYTES // 2**20} MiB",
        )
    excerpt = safe_text(line[:60].decode("utf-8", errors="replace"), limit=60)
    try:
        value = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 at byte {error.start + 1}: {excerpt}"
    except json.JSONDecodeError as error:
        return None, f"not JSON ({error.msg.removesuffix(' at')} at column {error.colno}): {excerpt}"
    except ValueError as error:
        return None, f"not JSON ({error}): {excerpt}"
    except RecursionError:
        return None, f"nested too deeply: {excerpt}"
    if not isinstance(value, dict):
        return None, f"not a JSON object: {excerpt}"
    return value, None


def _jsonl(path: Path) -> Iterator[SourceRow]:
    index = 0
    with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb") as file:
        # Lines end at \n only: a string may contain U+2028 and other line separators.
        for number, line in enumerate(file, start=1):
            content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not content.strip():
                continue
            value, problem = _parse(content.rstrip(b"\r\n"))
            yield SourceRow(index, f"{safe_text(path)} line {number}", value, problem)
            index += 1


def _json(path: Path) -> Iterator[SourceRow]:
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"), parse_constant=_no_constant)
    except RecursionError:
        raise DataError(f"{safe_text(path)}: nested too deeply") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError among them
        raise DataError(
            f"{safe_text(path)}: not JSON ({safe_text(error)}); name a file with one row a line .jsonl"
        ) from None
    if not isinstance(rows, list):
        raise DataError(f"{safe_text(path)}: must hold a JSON list of rows")
    for index, value in enumerate(rows):
        location = f"{safe_text(path)} row {index + 1}"
        if isinstance(value, dict):
            yield SourceRow(index, location, value)
        else:
            yield SourceRow(index, location, None, "not a JSON object")


def _csv(path: Path) -> Iterator[SourceRow]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{safe_text(path)}: not UTF-8 at byte {error.start + 1}") from None
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.DictReader(io.StringIO(text, newline=""))
    index = 0
    try:
        _ = reader.fieldnames  # reads the header, so that line_num is that of the header
    except csv.Error as error:
        raise DataError(f"{safe_text(path)} line 1: not CSV ({error})") from None
    while True:
        location = f"{safe_text(path)} line {reader.line_num + 1}"
        try:
            value = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield SourceRow(index, location, None, f"not CSV ({error})")
            return
        complete = {key: cell for key, cell in value.items() if key is not None and cell is not None}
        more = len(value.get(None) or ())  # cells without a column name
        if more:
            problem = f"has {plural(more, 'cell')} more than the header; quote a text that contains a comma"
            yield SourceRow(index, location, None, problem)
        else:
            yield SourceRow(index, location, complete)
        index += 1


def _parquet(path: Path) -> Iterator[SourceRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            index = 0
            for batch in file.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    yield SourceRow(index, f"{safe_text(path)} row {index + 1}", value)
                    index += 1
    except pyarrow.ArrowException as error:
        raise DataError(f"{safe_text(path)}: not Parquet ({safe_text(error, limit=120)})") from None
    except (ValueError, OverflowError) as error:  # a text that is not UTF-8, a date beyond the year 9999
        raise DataError(f"{safe_text(path)}: has values that cannot be read ({safe_text(error, limit=120)})") from None


READERS = {".jsonl": _jsonl, ".jsonl.gz": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}


class Source(Protocol):
    """Where rows come from."""

    @property
    def name(self) -> str:
        """What messages call it."""
        ...

    def rows(self) -> Iterator[SourceRow]:
        """Every row, in order."""
        ...


@dataclass(frozen=True)
class FileSource:
    """A local file."""

    name: str
    path: Path

    def rows(self) -> Iterator[SourceRow]:
        """Every row of the file."""
        return read_rows(self.path)


@dataclass(frozen=True)
class HubSource:
    """One split of a hub data set."""

    name: str
    data_set: str
    subset: str | None
    split: str

    def rows(self) -> Iterator[SourceRow]:
        """Every row of the split; DataError where it cannot be loaded."""
        import datasets

        datasets.disable_progress_bars()
        try:
            try:
                rows = datasets.load_dataset(self.data_set, name=self.subset, split=self.split)
            except ValueError:
                if self.subset is None:
                    raise
                # A folder, such as harmless-base.
                rows = datasets.load_dataset(self.data_set, data_dir=self.subset, split=self.split)
        except Exception as error:  # whatever the hub's client raises, the remedy is the same
            raise DataError(
                f"{safe_text(self.data_set)} (split {safe_text(self.split)}): cannot be loaded from the hub "
                f"({safe_text(error, limit=160)}); to read a local file, set data.train=PATH"
            ) from None
        for index, value in enumerate(rows):
            yield SourceRow(index, f"{safe_text(self.data_set)} {safe_text(self.split)} row {index + 1}", value)


def open_source(source: str, subset: str | None, split: str) -> Source:
    """The source that `data.train` or `data.eval` names; DataError where there is none."""
    path = local_path(source)
    if path is None:
        return HubSource(safe_text(f"{source} ({split})"), source, subset, split)
    return FileSource(safe_text(source), path)
