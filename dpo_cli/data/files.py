"""Rows of a file or hub data set, one after the other, each with the place it stands in.

A row that cannot be read is yielded with its problem: whether it stops the run is the caller's decision.
"""

import csv
import difflib
import gzip
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_cli.console.text import plural, safe_text
from dpo_cli.errors import DataError
from dpo_cli.paths import user_path

MAX_LINE_BYTES = 16 * 2**20  # a longer line is a mistake, not a pair
SHIPPED = {"sample:train": "sample/train.jsonl", "sample:test": "sample/test.jsonl"}


@dataclass(frozen=True)
class RowInFile:
    """One row as it was found; `problem` says why `value` is missing."""

    index: int  # from 0, blank lines not counted
    place: str  # for messages: `pairs.jsonl line 412`
    value: dict[str, Any] | None
    problem: str | None = None


def local_path(source: str) -> Path | None:
    """The file that a `data.train` or `data.eval` names, or None for a hub data set.

    DataError where it names neither: a missing file is never mistaken for a hub data set.
    """
    if source in SHIPPED:
        return Path(__file__).resolve().parent.parent / "assets" / SHIPPED[source]
    path = user_path(source, DataError)
    if path.is_file():
        return path
    if path.is_dir():
        raise DataError(f"{safe_text(source)}: is a folder; name a file in it")
    if path.exists():
        raise DataError(f"{safe_text(source)}: is not a regular file; write its content to one")
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


def read_rows(path: Path) -> Iterator[RowInFile]:
    """Every row of a local file by its ending; DataError where the file as a whole cannot be read."""
    reader = _reader(path.name.lower())
    if reader is None:
        raise DataError(f"{safe_text(path)}: unknown kind of file; kinds are {', '.join(READERS)}")
    try:
        yield from reader(path)
    except (OSError, EOFError) as error:
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


def _jsonl(path: Path) -> Iterator[RowInFile]:
    index = 0
    with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb") as file:
        # Lines end at \n only: U+2028 and its like may stand inside a string.
        for number, line in enumerate(file, start=1):
            content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not content.strip():
                continue
            value, problem = _parse(content.rstrip(b"\r\n"))
            yield RowInFile(index, f"{safe_text(path)} line {number}", value, problem)
            index += 1


def _json(path: Path) -> Iterator[RowInFile]:
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"), parse_constant=_no_constant)
    except RecursionError:
        raise DataError(f"{safe_text(path)}: nested too deeply") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError among them
        raise DataError(f"{safe_text(path)}: not JSON ({safe_text(error)}); a row a line is .jsonl") from None
    if not isinstance(rows, list):
        raise DataError(f"{safe_text(path)}: must hold a JSON list of rows")
    for index, value in enumerate(rows):
        place = f"{safe_text(path)} row {index + 1}"
        if isinstance(value, dict):
            yield RowInFile(index, place, value)
        else:
            yield RowInFile(index, place, None, "not a JSON object")


def _csv(path: Path) -> Iterator[RowInFile]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{safe_text(path)}: not UTF-8 at byte {error.start + 1}") from None
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.DictReader(io.StringIO(text, newline=""))
    index = 0
    _ = reader.fieldnames  # reads the header, so that line_num stands before the first row
    while True:
        place = f"{safe_text(path)} line {reader.line_num + 1}"
        try:
            value = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield RowInFile(index, place, None, f"not CSV ({error})")
            return
        complete = {key: cell for key, cell in value.items() if key is not None and cell is not None}
        more = len(value.get(None) or ())  # cells without a heading
        if more:
            problem = f"has {plural(more, 'cell')} more than the header; a text with a comma in it needs quotes"
            yield RowInFile(index, place, None, problem)
        else:
            yield RowInFile(index, place, complete)
        index += 1


def _parquet(path: Path) -> Iterator[RowInFile]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            index = 0
            for batch in file.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    yield RowInFile(index, f"{safe_text(path)} row {index + 1}", value)
                    index += 1
    except pyarrow.ArrowException as error:
        raise DataError(f"{safe_text(path)}: not Parquet ({safe_text(error, limit=120)})") from None


READERS = {".jsonl": _jsonl, ".jsonl.gz": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}


def read_hub(name: str, subset: str | None, split: str) -> Iterator[RowInFile]:
    """Every row of one split of a hub data set; DataError where it cannot be had."""
    import datasets

    datasets.disable_progress_bars()
    try:
        try:
            rows = datasets.load_dataset(name, name=subset, split=split)
        except ValueError:
            if subset is None:
                raise
            rows = datasets.load_dataset(name, data_dir=subset, split=split)  # a folder, such as harmless-base
    except Exception as error:  # whatever the hub's client raises, the user can act on one thing
        reason = safe_text(error, limit=160)
        raise DataError(
            f"{safe_text(name)} (split {safe_text(split)}): cannot be loaded from the hub ({reason}); "
            "for a file of yours write data.train=PATH"
        ) from None
    for index, value in enumerate(rows):
        yield RowInFile(index, f"{safe_text(name)} {safe_text(split)} row {index + 1}", value)
