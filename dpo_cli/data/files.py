"""Sources of rows: files or a hub data set. Each row comes with its location, for messages.

A row that cannot be read is yielded with its problem; the caller decides whether it stops the run.
"""

import csv
import difflib
import glob
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from dpo_cli.console.text import plural, safe_text
from dpo_cli.errors import DataError
from dpo_cli.paths import user_path

MAX_LINE_BYTES = 16 * 2**20  # a longer line is not a pair
WHOLE, BLOCK, BLOCKS = 64 * 2**20, 2**16, 256  # files up to this many bytes are hashed whole, others at places
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


def local_files(source: str | Sequence[str]) -> tuple[Path, ...] | None:
    """The files that a `data.train` or `data.eval` names, or None for a hub data set.

    It is a file, a folder (its files of known types by name, hidden ones left out), a pattern such as
    `shards/*.jsonl`, or a list of these. DataError where one of them names no file.
    """
    if not isinstance(source, str):
        several = [(one, local_files(one)) for one in source]
        for one, files in several:
            if files is None:
                raise DataError(f"{safe_text(one)}: no such file; a list names files, data=mixture takes hub data sets")
        return tuple(file for _, files in several for file in files or ())
    shown = safe_text(source)
    if source not in SHIPPED:
        path = user_path(source, DataError)
        if path.is_dir():
            try:
                found = sorted(file for file in path.iterdir() if _reader(file.name.lower()) and file.is_file())
            except OSError as error:
                raise DataError(f"{shown}: cannot be read ({error.strerror})") from None
            files = tuple(file for file in found if not file.name.startswith("."))
            if not files:
                raise DataError(f"{shown}: is a folder without a file of these types: {', '.join(READERS)}")
            return files
        if glob.has_magic(source) and not path.exists():
            files = tuple(Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file())
            if not files:
                raise DataError(f"{shown}: no file matches this pattern")
            return files
    file = local_path(source)
    return None if file is None else (file,)


def name_of(source: str | Sequence[str]) -> str:
    """What messages call a source: its text, or that of each in a list."""
    return safe_text(source if isinstance(source, str) else ", ".join(source))


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
    try:
        value = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
        if isinstance(value, dict):
            return value, None
        problem = "not a JSON object"
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 at byte {error.start + 1}"
    except json.JSONDecodeError as error:
        problem = f"not JSON ({error.msg.removesuffix(' at')} at column {error.colno})"
    except ValueError as error:
        problem = f"not JSON ({error})"
    except RecursionError:
        problem = "nested too deeply"
    return None, f"{problem}: {safe_text(line[:60].decode('utf-8', errors='replace'), limit=60)}"


def _jsonl(path: Path) -> Iterator[SourceRow]:
    index, shown = 0, safe_text(path)
    with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb") as file:
        # Lines end at \n only: a string may contain U+2028 and other line separators.
        for number, line in enumerate(file, start=1):
            content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not content.strip():
                continue
            value, problem = _parse(content.rstrip(b"\r\n"))
            yield SourceRow(index, f"{shown} line {number}", value, problem)
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


def _same_columns(paths: Sequence[Path]) -> None:
    """DataError where a later Parquet file lacks a column of the first one, or holds another type in it."""
    import pyarrow
    import pyarrow.parquet

    try:
        schemas = [pyarrow.parquet.read_schema(path) for path in paths]
    except (OSError, pyarrow.ArrowException):
        return  # reading the rows says why
    for path, schema in zip(paths[1:], schemas[1:], strict=True):
        for field in schemas[0]:
            shown, column = safe_text(path), safe_text(repr(field.name), 60)
            if field.name not in schema.names:
                raise DataError(f"{shown}: has no column {column} that {safe_text(paths[0])} has")
            there = schema.field(field.name).type
            if "null" not in (kinds := {_kind(field.type), _kind(there)}) and len(kinds) > 1:
                other = f"in {safe_text(paths[0])} it is {safe_text(field.type, 60)}"
                raise DataError(f"{shown}: column {column} is {safe_text(there, 60)}; {other}")


def _kind(kind: Any) -> str:
    """What a Parquet type is in Python."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return _kind(kind.value_type)
    for name in ("null", "string", "large_string", "boolean", "struct"):
        if getattr(types, f"is_{name}")(kind):
            return name.removeprefix("large_")
    if types.is_list(kind) or types.is_large_list(kind):
        return f"list of {_kind(kind.value_type)}"
    return "number" if types.is_integer(kind) or types.is_floating(kind) else str(kind)


READERS = {".jsonl": _jsonl, ".jsonl.gz": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}


class Source(Protocol):
    """Where rows come from."""

    @property
    def name(self) -> str:
        """What messages call it."""
        ...

    def rows(self) -> Iterator[SourceRow]:
        """Every row, in order; DataError where the source changes meanwhile."""
        ...

    def identity(self) -> list[Any]:
        """What JSON can hold, and what differs where the rows do; found without reading all of them."""
        ...

    def check_unchanged(self) -> None:
        """DataError where the rows are others than when `identity` or `rows` first looked at them."""
        ...

    def count(self) -> int | None:
        """How many rows there are, about; None where only reading them all would say."""
        ...


@dataclass(frozen=True)
class FileSource:
    """Local files, their rows one after the other."""

    name: str
    paths: tuple[Path, ...]

    def rows(self) -> Iterator[SourceRow]:
        """Every row of the files, counted over all of them; DataError where Parquet files have other columns."""
        index = 0
        parquet = [path for path in self.paths if path.suffix.lower() == ".parquet"]
        if len(parquet) > 1:
            _same_columns(parquet)
        for path in self.paths:
            before = self._states[path]
            for row in read_rows(path):
                yield row if len(self.paths) == 1 else replace(row, index=index)
                index += 1
            _check_unchanged(path, before)

    def identity(self) -> list[Any]:
        """Of each file its name, and a hash of what is in it."""
        self.check_unchanged()  # notes how the files are before their content is hashed
        return [[str(path), *_content(path)] for path in self.paths]

    def check_unchanged(self) -> None:
        """DataError where a file is not as it was when it was first looked at."""
        for path, before in self._states.items():
            _check_unchanged(path, before)

    @cached_property
    def _states(self) -> dict[Path, tuple[int, int, int]]:
        """How each file was when it was first looked at."""
        return {path: _state(path) for path in self.paths}

    def count(self) -> int | None:
        """The rows of JSON lines and Parquet files."""
        counts = [COUNTS.get(path.suffix.lower(), lambda _: None)(path) for path in self.paths]
        return None if None in counts else sum(filter(None, counts))


def _state(path: Path) -> tuple[int, int, int]:
    """What changes when a file does."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{safe_text(path)}: cannot be read ({error.strerror})") from None
    return status.st_size, status.st_mtime_ns, status.st_ino


def _check_unchanged(path: Path, before: tuple[int, int, int]) -> None:
    if _state(path) != before:
        raise DataError(f"{safe_text(path)}: changed while it was read; start again when it is written")


def _content(path: Path) -> list[Any]:
    """A hash of a file; of a large one the hash of blocks all over it, its size, and when it was last written."""
    size, written, _ = _state(path)
    try:
        with path.open("rb") as file:
            if size <= WHOLE:
                return [hashlib.file_digest(file, "sha256").hexdigest()]
            digest = hashlib.sha256()
            for place in range(0, size, size // BLOCKS):
                file.seek(place)
                digest.update(file.read(BLOCK))
    except OSError as error:
        raise DataError(f"{safe_text(path)}: cannot be read ({error.strerror})") from None
    return [digest.hexdigest(), size, written]


def _lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))


def _parquet_rows(path: Path) -> int | None:
    import pyarrow
    import pyarrow.parquet

    try:
        return int(pyarrow.parquet.read_metadata(path).num_rows)
    except (OSError, pyarrow.ArrowException):
        return None  # reading it will say why


COUNTS: dict[str, Callable[[Path], int | None]] = {".jsonl": _lines, ".parquet": _parquet_rows}


@dataclass(frozen=True)
class HubSource:
    """One split of a hub data set."""

    name: str
    data_set: str
    subset: str | None
    split: str

    def rows(self) -> Iterator[SourceRow]:
        """Every row of the split; DataError where it cannot be loaded."""
        for index, value in enumerate(self._loaded):
            yield SourceRow(index, f"{safe_text(self.data_set)} {safe_text(self.split)} row {index + 1}", value)

    def identity(self) -> list[Any]:
        """What `datasets` calls these rows: it changes with the hub's revision."""
        return [self.data_set, self.subset, self.split, self._loaded._fingerprint]

    def check_unchanged(self) -> None:
        """Nothing: a loaded split stays as it is."""

    def count(self) -> int:
        """The rows of the split."""
        return len(self._loaded)

    @cached_property
    def _loaded(self) -> Any:
        import datasets

        datasets.disable_progress_bars()
        try:
            try:
                return datasets.load_dataset(self.data_set, name=self.subset, split=self.split)
            except ValueError:
                if self.subset is None:
                    raise
                # A folder, such as harmless-base.
                return datasets.load_dataset(self.data_set, data_dir=self.subset, split=self.split)
        except Exception as error:  # whatever the hub's client raises, the remedy is the same
            if _is_gated(error):
                raise DataError(
                    f"{safe_text(self.data_set)}: is a gated data set; ask for access on its page on the hub, then run "
                    "`huggingface-cli login`, or set HF_TOKEN"
                ) from None
            raise DataError(
                f"{safe_text(self.data_set)} (split {safe_text(self.split)}): cannot be loaded from the hub "
                f"({safe_text(error, limit=160)}); to read a local file, set data.train=PATH"
            ) from None


def _is_gated(error: BaseException | None) -> bool:
    """Whether the hub refuses a data set for want of access, by the error or one that it comes from."""
    from huggingface_hub.errors import GatedRepoError

    while error is not None:
        if isinstance(error, GatedRepoError) or "is a gated dataset" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def open_source(source: str | Sequence[str], subset: str | None, split: str) -> Source:
    """The source that `data.train` or `data.eval` names; DataError where there is none."""
    files = local_files(source)
    if files is None:
        assert isinstance(source, str)
        return HubSource(safe_text(f"{source} ({split})"), source, subset, split)
    return FileSource(name_of(source), files)
