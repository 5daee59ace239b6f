"""Tokenized pairs on disk: the same whoever makes them and however often it is interrupted, and never stale."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from conftest import sample_rows, write_jsonl
from test_pairs import data_options

import dpo_cli.data.batches as batches_module
import dpo_cli.data.files as files_module
import dpo_cli.data.prepare as prepare_module
from dpo_cli.config.schema import DataConfig
from dpo_cli.data.batches import Schedule, epoch_blocks, epoch_order
from dpo_cli.data.pairs import PairData, load_pairs
from dpo_cli.data.splits import data_fingerprint
from dpo_cli.data.tokens import PairEncoder
from dpo_cli.errors import DataError, OutOfMemoryError, StorageError

Load = Callable[..., PairData]
ROWS = [{**row, "chosen": f"{row['chosen']} {n}"} for n, row in enumerate(sample_rows(40))]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "pairs.jsonl", ROWS)


@pytest.fixture
def encoder(tiny_tokenizer: Any) -> PairEncoder:
    return PairEncoder(tiny_tokenizer, "plain")


@pytest.fixture
def load(file: Path, tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Load the pairs of `file` in three parts, from a cache of this test's own."""
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(prepare_module, "PART", 16)
    monkeypatch.setattr(prepare_module, "FEW", 1)

    def run(*words: str, **more: Any) -> PairData:
        options = [f"data.train={file}", "data.eval_fraction=0", "data.processes=1", *words]
        return load_pairs(data_options(*options), PairEncoder(tiny_tokenizer, "plain"), 0, **more)

    return run


def content(data: PairData) -> list[tuple[Any, ...]]:
    """Everything of the training pairs."""
    return [
        (pair.prompt.tolist(), pair.chosen.tolist(), pair.rejected.tolist(), pair.index, pair.key, pair.group)
        for pair in data.train
    ]


def stores(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "tokens").iterdir())


def parts(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "tokens").rglob("*.arrow"))


def test_a_pair_reads_back_as_it_was_made(load: Load, encoder: PairEncoder, tmp_path: Path) -> None:
    data = load()
    assert len(data.train) == 40 and [pair.index for pair in data.train] == list(range(40))
    for pair, row in zip(data.train, ROWS, strict=True):
        assert encoder.tokenizer.decode(pair.prompt) == row["prompt"]
        assert encoder.tokenizer.decode(pair.chosen[:-1]) == row["chosen"]
        assert encoder.tokenizer.decode(pair.rejected[:-1]) == row["rejected"]
    assert data.train[-1].index == 39 and [pair.index for pair in data.train[3:6]] == [3, 4, 5]
    with pytest.raises(IndexError):
        data.train[40]
    assert [text.pair.chosen for text in data.train_texts] == [row["chosen"] for row in ROWS]
    assert len(parts(tmp_path)) == 3


def test_another_library_reads_a_part(load: Load, tmp_path: Path) -> None:
    import datasets

    data = load()
    rows = datasets.Dataset.from_file(str(parts(tmp_path)[1]))
    assert rows["index"] == list(range(16, 32)) and rows[0]["chosen"] == data.train[16].chosen.tolist()


def test_a_second_run_tokenizes_nothing(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load("data.on_bad_row=skip")

    def never(*_: Any) -> None:
        raise AssertionError("tokenized again")

    monkeypatch.setattr(PairEncoder, "encode_rendered", never)
    second = load("data.on_bad_row=skip")
    assert content(first) == content(second)
    assert first.train_report == second.train_report and first.train.fingerprint == second.train.fingerprint
    assert load("data.on_bad_row=skip", "data.eval_fraction=0.5", "data.shuffle=false").train_report.held_out > 5


def test_what_decides_tokens_makes_another_store(load: Load, file: Path, tmp_path: Path, encoder: PairEncoder) -> None:
    load()
    for number, word in enumerate(("max_length=30", "max_prompt_length=9", "limit=7", "format=standard"), start=2):
        load(f"data.{word}")
        assert len(stores(tmp_path)) == number, word
    for word in ("eval_fraction=0.2", "eval_leaks=drop", "shuffle=false", "max_bad_fraction=0.5", "processes=2"):
        load(f"data.{word}")
        assert len(stores(tmp_path)) == 5, word
    other = PairEncoder(encoder.tokenizer, "plain", always_closes=True)
    load_pairs(data_options(f"data.train={file}", "data.eval_fraction=0"), other, 0)
    assert len(stores(tmp_path)) == 6
    assert encoder.identity() != PairEncoder(encoder.tokenizer, "chat").identity()


@pytest.mark.parametrize("where", ["", "tools", "messages[0].role == 'system'"])
def test_tokens_of_another_day_are_not_used_where_the_template_writes_the_date(
    where: str, file: Path, tmp_path: Path, tiny_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer
    from transformers.utils import chat_template_utils

    days = ["1 May", "2 May"]
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "cache"))
    date = (
        "{{ strftime_now('%d %b') }}" if not where else "{% if " + where + " %}{{ strftime_now('%d %b') }}{% endif %}"
    )
    made = []
    for day in (*days, days[0]):

        class Today:
            @staticmethod
            def now(day: str = day) -> Any:
                return type("Now", (), {"strftime": lambda _, __: day})()

        chat_template_utils._compile_jinja_template.cache_clear()
        monkeypatch.setattr(chat_template_utils, "datetime", Today)
        tokenizer = AutoTokenizer.from_pretrained(tiny_path)
        tokenizer.chat_template = (
            date + "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
        )
        data = load_pairs(data_options(f"data.train={file}", "data.eval_fraction=0"), PairEncoder(tokenizer, "chat"), 0)
        made.append((len(stores(tmp_path)), data.train.fingerprint))
    assert [number for number, _ in made] == [1, 2, 2]
    assert (made[0] == made[1]) is False and made[0][1] == made[2][1]
    assert where or made[0][1] != made[1][1]


def test_the_fingerprint_of_a_store_is_that_of_its_pairs(load: Load, file: Path) -> None:
    for rows in (ROWS, [{**row, **({"probability": 0.75} if n == 20 else {})} for n, row in enumerate(ROWS)]):
        write_jsonl(file, rows)
        for words in ((), ("data.eval_fraction=0.4",), ("data.max_length=40",)):
            train = load(*words).train
            assert train.fingerprint == data_fingerprint(list(train))
            sides = [(len(pair.prompt) + max(map(len, pair.responses)), place) for place, pair in enumerate(train)]
            in_order = [train[place].key for _, place in sorted(sides, key=lambda side: (-side[0], side[1]))]
            assert [pair.key for pair in train.longest(9)] == in_order[:9]


def test_every_option_of_data_acts_on_tokens_or_is_known_not_to() -> None:
    from dataclasses import fields

    names = {field.name for field in fields(DataConfig)}
    assert set(prepare_module.NO_MATTER) < names
    assert names - set(prepare_module.NO_MATTER) >= {"format", "columns", "template", "max_length", "on_bad_row"}


def test_a_changed_row_is_seen(load: Load, file: Path) -> None:
    first = load()
    text = file.read_text()
    file.write_text(text.replace("number 39.", "number 93."))  # of the same length
    second = load()
    assert first.train.fingerprint != second.train.fingerprint
    assert content(first)[:39] == content(second)[:39] and content(first)[39] != content(second)[39]


def test_a_changed_row_of_a_large_file_is_seen(load: Load, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "WHOLE", 10)
    monkeypatch.setattr(files_module, "BLOCK", 2)  # the changed bytes are in no block that is hashed
    monkeypatch.setattr(files_module, "BLOCKS", 3)
    first = load().train.fingerprint
    assert load().train.fingerprint == first
    time.sleep(0.02)  # a clock of the file system
    file.write_text(file.read_text().replace("number 39.", "number 93."))
    assert load().train.fingerprint != first


def test_a_file_that_changes_while_it_is_read_is_refused(load: Load, file: Path) -> None:
    def grow() -> None:
        with file.open("a") as lines:
            lines.write(json.dumps(ROWS[0]) + "\n")

    with pytest.raises(DataError, match="changed while it was read; start again when it is written"):
        load(poll=grow)


@pytest.mark.parametrize("after_parts", [0, 1])
def test_rows_never_lie_under_the_name_of_others(
    after_parts: int, load: Load, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file is replaced after it was hashed, or after a part was made, and later put back as it was."""
    before, first = file.read_bytes(), content(load())
    shutil.rmtree(file.parent / "cache" / "tokens")
    made = 0

    def replaced() -> None:
        time.sleep(0.02)  # a clock of the file system
        file.write_bytes(before.replace(b"Here is", b"Here's a"))

    identity, make_part = files_module.FileSource.identity, prepare_module.make_part

    def looked_at(source: Any) -> list[Any]:
        found = identity(source)
        if after_parts == 0:
            replaced()
        return found

    def part(*arguments: Any) -> dict[str, Any]:
        nonlocal made
        facts, made = make_part(*arguments), made + 1
        if made == after_parts:
            replaced()
        return facts

    with monkeypatch.context() as within, pytest.raises(DataError, match="changed while it was read"):
        within.setattr(files_module.FileSource, "identity", looked_at)
        within.setattr(prepare_module, "make_part", part)
        load()
    file.write_bytes(before)
    assert content(load()) == first


def test_several_processes_make_what_one_does(load: Load, tmp_path: Path) -> None:
    one = load()
    shutil.rmtree(tmp_path / "cache" / "tokens")
    bars: list[tuple[str, int]] = []
    done: list[int] = []

    def working(what: str, total: int) -> Callable[[int], None]:
        bars.append((what, total))
        return done.append

    two = load("data.processes=2", working=working)
    assert content(one) == content(two) and one.train_report == two.train_report
    assert bars == [("row", 40)] and sorted(done) == [8, 16, 16]


def test_an_interrupted_preparation_goes_on_behind_its_last_whole_part(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load("data.eval_fraction=0.3")
    for path in [*parts(tmp_path)[1:], stores(tmp_path)[0] / "store.json"]:
        path.unlink()
    shutil.rmtree(next(stores(tmp_path)[0].glob("training-*")))
    made: list[int] = []
    make = prepare_module.make_part

    def noted(work: Any, number: int, *more: Any) -> dict[str, Any]:
        made.append(number)
        return make(work, number, *more)

    monkeypatch.setattr(prepare_module, "make_part", noted)
    again = load("data.eval_fraction=0.3")
    assert made == [1, 2]
    assert content(again) == content(whole) and again.train_report == whole.train_report
    assert [pair.key for pair in again.held_out] == [pair.key for pair in whole.held_out]


def test_a_damaged_part_is_never_trained_on(load: Load, tmp_path: Path) -> None:
    expected = content(load())
    path = parts(tmp_path)[1]
    whole = path.read_bytes()
    for place in range(0, len(whole), len(whole) // 40):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            found = [pair.chosen.tolist() for pair in load().train]
        except StorageError as error:
            assert "part-00001.arrow: damaged; remove it, and it is made again" in str(error)
        else:  # padding, or a word of the schema's description
            path.write_bytes(whole)
            assert found == [pair.chosen.tolist() for pair in load().train]
    path.unlink()
    assert content(load()) == expected
    stores(tmp_path)[0].joinpath("store.json").write_text("[]")
    assert content(load()) == expected


def test_a_store_may_be_removed_under_a_run(load: Load, tmp_path: Path) -> None:
    data, expected = load(), content(load())
    shutil.rmtree(tmp_path / "cache" / "tokens")
    assert content(data) == expected


def test_a_store_that_is_removed_while_it_is_made_is_made_again(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, make = content(load()), prepare_module.make_part
    for number in (0, 1, 2):
        for at in ("before", "after"):
            shutil.rmtree(tmp_path / "cache" / "tokens")
            left = [number]

            def part(work: Any, place: int, *more: Any, at: str = at, left: list[int] = left) -> dict[str, Any]:
                gone = left == [place] and left.pop() == place
                if gone and at == "before":
                    shutil.rmtree(work.folder)
                facts = make(work, place, *more)
                if gone and at == "after":
                    shutil.rmtree(work.folder)
                return facts

            monkeypatch.setattr(prepare_module, "make_part", part)
            assert content(load("data.eval_fraction=0")) == expected
            assert not left


def test_a_cache_that_cannot_be_written_is_still_read(load: Load, tmp_path: Path) -> None:
    """Links to nowhere stand where files would be made: root may write a folder whatever its mode."""
    first = load("data.eval_fraction=0.3")
    (stores(tmp_path)[0] / "lock").symlink_to("/nowhere/else")
    before = sorted(path for path in (tmp_path / "cache").rglob("*"))
    again, other = load("data.eval_fraction=0.3"), load("data.eval_fraction=0.5")
    assert content(again) == content(first) and len(other.held_out) != len(first.held_out)
    assert sorted(path for path in (tmp_path / "cache").rglob("*")) == before


def test_where_the_cache_cannot_be_used_tokens_are_temporary(load: Load, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert len(content(load())) == 40


def test_an_error_in_a_process_names_its_line(load: Load, file: Path) -> None:
    lines = [json.dumps(row) for row in ROWS]
    lines[20] = '{"prompt": "q", "chosen": "a"}'
    lines[38] = "oops"
    file.write_text("\n".join(["", *lines]))
    with pytest.raises(DataError, match=r"pairs.jsonl line 22: no 'rejected' key.*data.on_bad_row=skip counts"):
        load("data.processes=2")


def test_too_many_bad_rows_stop_a_run_that_skips(load: Load, file: Path) -> None:
    file.write_text(file.read_text() + "oops\n")
    words = ("data.on_bad_row=skip", "data.max_bad_fraction=0.02")
    expected = (
        r"1 of 41 rows cannot be used \(2.4%\), more than data.max_bad_fraction=0.02 allows; the first is .* line 41"
    )
    for _ in range(2):  # also from the cache
        with pytest.raises(DataError, match=expected):
            load(*words)
    assert load(words[0], "data.max_bad_fraction=0.03").train_report.dropped == {"bad_row": 1}


def die(*_: Any) -> None:
    os._exit(9)


def test_a_process_that_is_killed_ends_the_run_in_one_line(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "_make_part", die)
    with pytest.raises(OutOfMemoryError, match=r"data.processes=1 needs less"):
        load("data.processes=2")


def test_the_counts_of_the_encoder_are_those_of_all_parts(load: Load, file: Path, tiny_tokenizer: Any) -> None:
    write_jsonl(file, [{**row, "chosen_finish_reason": "length"} for row in ROWS])
    for processes in (2, 1):  # made, then read
        encoder = PairEncoder(tiny_tokenizer, "plain")
        options = data_options(f"data.train={file}", "data.eval_fraction=0", f"data.processes={processes}")
        load_pairs(options, encoder, 0)
        assert encoder.length_limited == 40


@pytest.mark.parametrize("ending", ["jsonl.gz", "json", "csv", "parquet"])
def test_every_kind_of_file_makes_the_same_pairs(load: Load, tmp_path: Path, ending: str) -> None:
    import csv
    import gzip

    path = tmp_path / f"other.{ending}"
    if ending == "jsonl.gz":
        path.write_bytes(gzip.compress((tmp_path / "pairs.jsonl").read_bytes()))
    elif ending == "json":
        path.write_text(json.dumps(ROWS))
    elif ending == "csv":
        with path.open("w", newline="") as cells:
            writer = csv.DictWriter(cells, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=7)
    assert content(load(f"data.train={path}")) == content(load())


def test_a_process_ends_when_its_parent_does(load: Load, file: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; import dpo_cli.data.prepare as p\n"
        "if __name__ == '__main__':\n"
        "    import multiprocessing, os, time\n"
        "    from concurrent.futures import ProcessPoolExecutor\n"
        "    pool = ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), p._begin, (None,))\n"
        "    print(pool.submit(os.getpid).result(), flush=True); time.sleep(60)\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split(")")[1][:3]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


# The order of an epoch, in blocks


@pytest.mark.parametrize("pairs", [1, 40, 101, 1000])
@pytest.mark.parametrize("shuffle", [True, False])
def test_blocks_are_the_order_of_the_epoch(pairs: int, shuffle: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "BLOCK", 50)
    for epoch in range(3):
        blocks = list(epoch_blocks(pairs, 7, epoch, shuffle))
        assert np.concatenate(blocks).tolist() == epoch_order(pairs, 7, epoch, shuffle).tolist()
    assert len(blocks) >= pairs / 100


def test_a_resumed_order_is_that_of_the_straight_run_in_blocks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = Schedule(1003, batch_size=8, seed=1, shuffle=True)
    straight = [batch.tolist() for batch in schedule.batches(0, 300)]
    monkeypatch.setattr(batches_module, "BLOCK", 64)
    for first in (0, 1, 125, 126, 251, 299):
        assert [batch.tolist() for batch in schedule.batches(first, 300)] == straight[first:]
    rows = np.array([1, 2, 1, 4] * 100, dtype=np.int32)
    ranked = replace(schedule, pairs=800, rows=rows)
    of_rows = [batch.tolist() for batch in ranked.batches(0, 100)]
    monkeypatch.undo()
    assert [batch.tolist() for batch in ranked.batches(0, 100)] == of_rows
    assert sorted(chain.from_iterable(of_rows)) == list(range(800))
