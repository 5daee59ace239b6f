"""Sources: rows with their line in every message, and bad input named."""

import gzip
import json
from pathlib import Path

import pytest

from dpo_cli.data.files import FileSource, HubSource, local_files, local_path, open_source, read_rows
from dpo_cli.errors import DataError

ROW = {"prompt": "p", "chosen": "c", "rejected": "r"}
LINE = json.dumps(ROW).encode() + b"\n"


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def problem(path: Path) -> str | None:
    return next(row.problem for row in read_rows(path) if row.value is None)


def test_jsonl_counts_rows_from_0_and_physical_lines_from_1(tmp_path: Path) -> None:
    rows = list(read_rows(write(tmp_path / "a.jsonl", LINE + b"\n" + LINE)))
    assert [(row.index, row.location.rsplit("/", 1)[-1]) for row in rows] == [
        (0, "a.jsonl line 1"),
        (1, "a.jsonl line 3"),
    ]
    assert [row.value for row in rows] == [ROW, ROW]


def test_a_byte_order_mark_and_a_missing_last_newline_are_no_matter(tmp_path: Path) -> None:
    rows = list(read_rows(write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + LINE + LINE.strip())))
    assert [row.value for row in rows] == [ROW, ROW]


def test_a_line_separator_inside_a_string_is_no_line_end(tmp_path: Path) -> None:
    row = {**ROW, "chosen": "a\u2028b\u0085c"}
    data = json.dumps(row, ensure_ascii=False).encode() + b"\n" + LINE
    rows = list(read_rows(write(tmp_path / "a.jsonl", data)))
    assert [row.value for row in rows] == [row, ROW]


def test_gzip_csv_json_and_parquet_hold_the_same_rows(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    files = [
        write(tmp_path / "a.jsonl.gz", gzip.compress(LINE)),
        write(tmp_path / "a.json", json.dumps([ROW]).encode()),
        write(tmp_path / "a.csv", b"prompt,chosen,rejected\np,c,r\n"),
    ]
    pyarrow.parquet.write_table(pyarrow.table({key: [value] for key, value in ROW.items()}), tmp_path / "a.parquet")
    for file in [*files, tmp_path / "a.parquet"]:
        assert [(row.index, row.value) for row in read_rows(file)] == [(0, ROW)], file


def test_a_csv_cell_with_a_line_break_keeps_the_count_of_lines(tmp_path: Path) -> None:
    rows = list(read_rows(write(tmp_path / "a.csv", b'prompt,chosen,rejected\n"p\nq",c,r\np,c,r\n')))
    assert rows[0].value == {**ROW, "prompt": "p\nq"}
    assert [row.location.rsplit("/", 1)[-1] for row in rows] == ["a.csv line 2", "a.csv line 4"]


def test_a_csv_row_with_a_cell_too_many_is_not_cut(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", b"prompt,chosen,rejected\np,Yes, of course,r\np,c,r\n")
    rows = list(read_rows(file))
    assert [row.value for row in rows] == [None, ROW]
    assert rows[0].problem == "has 1 cell more than the header; quote a text that contains a comma"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"prompt": "p"', 'not JSON (Expecting \',\' delimiter at column 15): {"prompt": "p"'),
        (b"[1, 2]", "not a JSON object: [1, 2]"),
        (b'{"prompt": NaN}', 'not JSON (NaN is not JSON): {"prompt": NaN}'),
        (b'{"prompt": "\xff"}', 'not UTF-8 at byte 13: {"prompt": "\ufffd"}'),
        (b"\x1b[31mred", "not JSON (Expecting value at column 1): \\x1b[31mred"),
        (b"[" * 100_000, "nested too deeply: " + "[" * 60),
        (b'"' + b"a" * (17 * 2**20) + b'"', "the line is 17 MiB long; the limit is 16 MiB"),
    ],
)
def test_what_is_wrong_with_a_line_is_said_exactly(tmp_path: Path, line: bytes, says: str) -> None:
    said = problem(write(tmp_path / "a.jsonl", LINE + line + b"\n" + LINE))
    assert said == says


def test_rows_after_a_bad_line_are_still_read(tmp_path: Path) -> None:
    rows = list(read_rows(write(tmp_path / "a.jsonl", b"oops\n" + LINE)))
    assert [row.value for row in rows] == [None, ROW]


def test_a_missing_file_is_named_with_the_likeliest_other(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", LINE)
    with pytest.raises(DataError, match=r"trian\.jsonl: no such file; did you mean .*/train\.jsonl\?"):
        local_path(str(tmp_path / "trian.jsonl"))


def test_a_name_with_an_ending_is_a_file_and_owner_slash_name_is_on_the_hub() -> None:
    with pytest.raises(DataError, match=r"owner/data\.jsonl: no such file"):
        local_path("owner/data.jsonl")
    assert local_path("Anthropic/hh-rlhf") is None
    with pytest.raises(DataError, match="nowhere: no such file"):
        local_path("nowhere")


def test_files_that_are_no_rows_at_all_are_refused(tmp_path: Path) -> None:
    cases = {
        "a.json": (b'{"prompt": 1}', "must hold a JSON list of rows"),
        "b.json": (LINE + LINE, "; name a file with one row a line .jsonl"),
        "c.parquet": (b"not parquet", "not Parquet"),
        "d.csv": (b"\xff\xfe", "not UTF-8 at byte 1"),
        "e.txt": (b"x", "unknown file type; use one of .jsonl, .jsonl.gz, .json, .csv, .parquet"),
        "f.jsonl.gz": (b"not gzip", "cannot be read"),
        "g.jsonl.gz": (gzip.compress(LINE * 1000)[:40], "cannot be read"),
    }
    for name, (data, says) in cases.items():
        with pytest.raises(DataError) as error:
            list(read_rows(write(tmp_path / name, data)))
        assert says in str(error.value), name


def test_a_source_is_a_file_or_a_hub_data_set(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", LINE + LINE)
    file = open_source(str(path), None, "train")
    assert (type(file), file.name) == (FileSource, str(path))
    assert [row.value for row in file.rows()] == [ROW, ROW]
    hub = open_source("Anthropic/hh-rlhf", "harmless-base", "test")
    assert (type(hub), hub.name) == (HubSource, "Anthropic/hh-rlhf (test)")


# Several files


def three_files(folder: Path) -> list[Path]:
    folder.mkdir()
    for name in (".hidden.jsonl", "notes.txt"):
        write(folder / name, LINE)
    files = {"a.jsonl": LINE + LINE, "b.jsonl.gz": gzip.compress(LINE), "c.json": json.dumps([ROW, ROW]).encode()}
    return [write(folder / name, data) for name, data in files.items()]


def test_a_folder_a_pattern_and_a_list_name_the_same_files(tmp_path: Path) -> None:
    files = three_files(tmp_path / "shards")
    for source in (str(tmp_path / "shards"), str(tmp_path / "shards" / "[abc].json*"), [str(file) for file in files]):
        assert local_files(source) == tuple(files), source
    assert local_files([str(files[2]), str(tmp_path / "shards" / "a*")]) == (files[2], files[0])


def test_rows_are_counted_over_all_files_and_named_by_their_file(tmp_path: Path) -> None:
    files = three_files(tmp_path / "shards")
    source = open_source(str(tmp_path / "shards"), None, "train")
    found = [(row.index, row.location) for row in source.rows()]
    assert found == [
        (0, f"{files[0]} line 1"), (1, f"{files[0]} line 2"), (2, f"{files[1]} line 1"), (3, f"{files[2]} row 1"),
        (4, f"{files[2]} row 2"),
    ]  # fmt: skip
    assert source.name == str(tmp_path / "shards")


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: Path) -> None:
    file = write(tmp_path / "a[1].jsonl", LINE)
    assert local_files(str(file)) == (file,)


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ({"prompt": ["p"], "rejected": ["r"]}, "b.parquet: has no column 'chosen' that {dir}/a.parquet has"),
        ({"prompt": ["p"], "chosen": [["c"]], "rejected": ["r"]},
         "b.parquet: column 'chosen' is list<<...>: string>; in {dir}/a.parquet it is string"),
        ({"prompt": ["p"], "chosen": [1], "rejected": ["r"]},
         "b.parquet: column 'chosen' is int64; in {dir}/a.parquet it is string"),
    ],
)  # fmt: skip
def test_a_later_parquet_file_with_other_columns_is_named(
    tmp_path: Path, second: dict[str, list[object]], says: str
) -> None:
    import pyarrow
    import pyarrow.parquet

    for name, columns in (("a", {key: [value] for key, value in ROW.items()}), ("b", second)):
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / f"{name}.parquet")
    with pytest.raises(DataError) as error:
        list(open_source(str(tmp_path), None, "train").rows())
    expected = f"{tmp_path}/{says.format(dir=tmp_path)}".split("<...>")
    assert str(error.value).startswith(expected[0]) and str(error.value).endswith(expected[-1])


def test_parquet_files_may_differ_in_what_makes_no_difference(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    kinds = {"a": pyarrow.string(), "b": pyarrow.large_string(), "c": pyarrow.dictionary(pyarrow.int8(), "string")}
    for name, kind in kinds.items():
        columns = {key: pyarrow.array([value]).cast(kind) for key, value in ROW.items()}
        pyarrow.parquet.write_table(pyarrow.table({**columns, "score": [1 if name == "a" else 1.5], "more": [None]}),
                                    tmp_path / f"{name}.parquet")  # fmt: skip
    rows = [row.value or {} for row in open_source(str(tmp_path), None, "train").rows()]
    assert [row["chosen"] for row in rows] == ["c", "c", "c"]


@pytest.mark.parametrize("with_cause", [True, False])
def test_a_gated_data_set_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch, with_cause: bool) -> None:
    import datasets
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import GatedRepoError

    def refuse(*_: object, **__: object) -> None:
        if with_cause:
            raise DatasetNotFoundError("no access") from GatedRepoError.__new__(GatedRepoError)
        raise DatasetNotFoundError("Dataset 'own/set' is a gated dataset on the Hub. You must be authenticated.")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError) as error:
        list(open_source("own/set", None, "train").rows())
    assert str(error.value) == (
        "own/set: is a gated data set; ask for access on its page on the hub, then run `huggingface-cli login`, or set "
        "HF_TOKEN"
    )
