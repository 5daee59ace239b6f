"""Parsers on any input: what is read is what was written, and the rest is refused by an error of the program's own."""

import gzip
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import share
from hypothesis import example, given
from hypothesis import strategies as st

from dpo_cli.config.command_line import read_command_line
from dpo_cli.config.composition import parse_overrides
from dpo_cli.config.files import keys_and_lines, override_value
from dpo_cli.config.versions import read_stored
from dpo_cli.data.files import read_rows
from dpo_cli.data.formats import (
    ASSISTANT,
    HUMAN,
    BadRowError,
    Message,
    dialogue_messages,
    dialogue_text,
    hh,
    messages,
    pairs_of,
    prompt_of,
)
from dpo_cli.data.games import read_games
from dpo_cli.data.prompts import read_prompts
from dpo_cli.data.samples import Sample, read_samples, samples_fingerprint
from dpo_cli.errors import CheckpointError, ConfigError, DataError, DpoError
from dpo_cli.labelling.judgements import read_judgements
from dpo_cli.storage.job_log import open_job_log
from dpo_cli.storage.line_log import MetricsLog

text = st.text(max_size=20)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.just(10**400) | text
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parsers")


@contextmanager
def perhaps_refused(*errors: type[Exception]) -> Iterator[None]:
    """Within, one of these errors may be raised, in words; no other."""
    try:
        yield
    except errors as error:
        assert str(error)


# Preference data

words = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).map(str.strip).filter(bool)
turns = st.lists(words, min_size=1, max_size=7).filter(lambda found: len(found) % 2 == 1)


def conversation(contents: list[str], system: str | None = None) -> tuple[Message, ...]:
    """user, assistant, user, ... messages, the last of them the user's."""
    spoken = [Message("user" if place % 2 == 0 else "assistant", words) for place, words in enumerate(contents)]
    return tuple([Message("system", system)] * (system is not None) + spoken)


def as_row(conversation: tuple[Message, ...]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in conversation]


@given(turns, st.none() | words)
def test_a_conversation_in_hh_form_reads_back_as_the_messages_it_is(contents: list[str], system: str | None) -> None:
    written = conversation(contents, system)
    assert dialogue_messages(dialogue_text(written)) == written


@given(turns, words, words)
def test_hh_splits_where_the_dialogues_part_and_loses_no_character(
    contents: list[str], chosen: str, rejected: str
) -> None:
    prompt = dialogue_text(conversation(contents))
    pair = hh({"chosen": f"{prompt} {chosen}", "rejected": f"{prompt} {rejected}"})
    assert (pair.prompt_text, pair.chosen, pair.rejected) == (prompt, f" {chosen}", f" {rejected}")
    assert (pair.messages, pair.notes) == (conversation(contents), ())


marks = st.sampled_from([HUMAN, ASSISTANT, " a", " b", "\n\n", "Human:", ":"])
pieces = st.lists(marks | text, max_size=8).map("".join)


@share(2)
@given(pieces, pieces, pieces)
def test_any_dialogues_are_parted_without_loss_or_refused(shared: str, chosen: str, rejected: str) -> None:
    row = {"chosen": shared + chosen, "rejected": shared + rejected}
    with perhaps_refused(BadRowError):
        pair = hh(row)
        assert pair.prompt_text.endswith(ASSISTANT) and pair.messages[-1].role == "user"
        assert {"chosen": pair.prompt_text + pair.chosen, "rejected": pair.prompt_text + pair.rejected} == row


@given(turns, words, words)
def test_messages_with_a_given_a_repeated_and_an_implied_prompt_are_one_pair(
    contents: list[str], chosen: str, rejected: str
) -> None:
    if chosen == rejected:
        rejected += "!"
    prompt = as_row(conversation(contents))
    answers = [{"role": "assistant", "content": answer} for answer in (chosen, rejected)]
    sides = {name: [*prompt, answer] for name, answer in zip(("chosen", "rejected"), answers, strict=True)}
    alone = {name: [answer] for name, answer in zip(("chosen", "rejected"), answers, strict=True)}
    for row in ({"prompt": prompt, **alone}, {"prompt": prompt, **sides}, sides):
        pair = messages(row)
        assert pair.messages == conversation(contents)
        assert (pair.chosen, pair.rejected) == (f" {chosen}", f" {rejected}")


@given(words, st.lists(st.tuples(words, st.integers(0, 3) | st.floats(-1, 1)), min_size=2, max_size=5))
def test_a_ranked_row_compares_every_two_responses_of_different_scores(
    prompt: str, scored: list[tuple[str, float]]
) -> None:
    responses, scores = ([f"{place} {response}" for place, (response, _) in enumerate(scored)], [s for _, s in scored])
    score_of = dict(zip(responses, scores, strict=True))
    different = {(a, b) for a in responses for b in responses if score_of[a] > score_of[b]}
    found = pairs_of({"prompt": prompt, "responses": responses, "scores": scores}, "ranked")
    pairs = [pair for pair in found if not pair.tied]
    assert {(pair.chosen, pair.rejected) for pair in pairs} == different and len(pairs) == len(different)
    assert len(found) == len(responses) * (len(responses) - 1) // 2  # every two, ties marked
    assert {pair.prompt_text for pair in found} == {prompt}


KEYS = ["prompt", "chosen", "rejected", "responses", "scores", "finish_reason", "chosen_finish_reason", "finished"]
said = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "x"]), "content": scalars}),
    max_size=3,
)
cells = values | said | st.lists(text | st.just("stop"), max_size=3)
rows = st.dictionaries(st.sampled_from(KEYS) | text, cells, max_size=6)


# Files of rows

ENDINGS = {
    ".jsonl": bytes,
    ".jsonl.gz": lambda data: gzip.compress(data, mtime=0),
    ".txt": bytes,
    ".json": bytes,
    ".csv": bytes,
}
json_rows = st.lists(rows | values, max_size=4).map(lambda found: "\n".join(map(json.dumps, found)).encode())
contents = json_rows | st.binary(max_size=80) | pieces.map(lambda found: found.encode("utf-8", "surrogatepass"))


@share(3)
@given(contents, st.sampled_from(sorted(ENDINGS)), st.booleans())
@example(b'"' + b"x" * 17 * 2**20 + b'"\n1', ".csv", True)  # a name of a column longer than csv reads
def test_any_file_is_prompts_samples_and_games_or_refused(folder: Path, data: bytes, ending: str, skip: bool) -> None:
    file = folder / f"any{ending}"
    file.write_bytes(ENDINGS[ending](data))
    with perhaps_refused(DataError):
        prompts, report = read_prompts(str(file), None, skip)
        assert report.kept + report.dropped.total() == report.rows and len(prompts) == report.kept
        for prompt in prompts:  # what samples store gives the same prompt again
            assert prompt_of({"prompt": json.loads(json.dumps(prompt.written))}) == prompt.read
    for read in (read_samples, read_games):
        with perhaps_refused(DataError):
            read(file)


def flipped(data: bytes, place: int, value: int) -> bytes:
    """The bytes with one of them replaced."""
    place %= len(data)
    return data[:place] + bytes([value]) + data[place + 1 :]


@pytest.fixture(scope="module")
def stored(folder: Path) -> dict[str, bytes]:
    """A file of some rows in each form that is not text."""
    import pyarrow
    import pyarrow.parquet

    written = {"prompt": [f"p{row} é" * 5 for row in range(9)], "chosen": ["c"] * 9, "rejected": ["r"] * 9}
    pyarrow.parquet.write_table(pyarrow.table(written), folder / "whole.parquet")
    lines = "".join(
        json.dumps({"prompt": prompt, "chosen": "c", "rejected": "r"}) + "\n" for prompt in written["prompt"]
    )
    return {".parquet": (folder / "whole.parquet").read_bytes(), ".jsonl.gz": gzip.compress(lines.encode(), mtime=0)}


@share(4)
@given(st.sampled_from([".parquet", ".jsonl.gz"]), st.integers(0, 10**4), st.integers(0, 255))
def test_a_file_with_a_byte_of_damage_is_read_or_refused(
    folder: Path, stored: dict[str, bytes], ending: str, place: int, value: int
) -> None:
    file = folder / f"damaged{ending}"
    file.write_bytes(flipped(stored[ending], place, value))
    with perhaps_refused(DataError):
        for row in read_rows(file):
            assert (row.value is None) != (row.problem is None)


# Logs

tails = st.binary(max_size=40) | values.map(lambda value: json.dumps(value).encode())


@given(st.integers(0, 3), tails)
def test_bytes_behind_the_last_line_of_a_job_log_are_no_part(folder: Path, parts: int, tail: bytes) -> None:
    output = folder / "out.jsonl"
    log = folder / "out.jsonl.part"
    log.unlink(missing_ok=True)
    done = [{"n": number} for number in range(parts)]
    with open_job_log(output, {"seed": 1}, ["n"], pytest.fail) as job:
        for part in done:
            job.append(part)
    whole = log.read_bytes()
    log.write_bytes(whole + tail)
    heard: list[str] = []
    with perhaps_refused(DataError), open_job_log(output, {"seed": 1}, ["n"], heard.append) as job:
        assert b"\n" in tail or job.done == done
        assert b"\n" in tail or (log.read_bytes(), bool(heard)) == (whole, bool(tail))


@given(values, values, st.lists(values, max_size=2))
def test_any_json_in_a_job_log_is_its_parts_or_refused(folder: Path, number: Any, job: Any, more: list[Any]) -> None:
    log = folder / "other.jsonl.part"
    lines = [{"job_log": number, "job": job}, *more]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with perhaps_refused(DpoError), open_job_log(folder / "other.jsonl", {"seed": 1}, ["n"], pytest.fail):
        pass


RECORD = {"step": 1, "split": "train", "loss": 0.5}


@given(st.integers(0, 3), tails)
def test_bytes_behind_the_last_line_of_the_metrics_are_no_record(folder: Path, number: int, tail: bytes) -> None:
    path = folder / "metrics.jsonl"
    whole = b"".join(json.dumps({**RECORD, "step": step}).encode() + b"\n" for step in range(number))
    path.write_bytes(whole + tail)
    log = MetricsLog(path)
    log.cut(number)
    assert path.read_bytes() == whole and [record["step"] for record in log.read()] == list(range(number))
    path.write_bytes(whole + tail)
    with pytest.raises(CheckpointError):
        MetricsLog(path).cut(number + 1 + tail.count(b"\n"))


SAMPLES = [Sample("a" * 32, "q", ("one", "two", "three")), Sample("b" * 32, "q2", ("one", "two"))]
HEADER = {"judgements": 1, "samples": samples_fingerprint(SAMPLES), "file": "samples.jsonl"}
judged = st.fixed_dictionaries(
    {
        "sample": st.sampled_from([sample.id for sample in SAMPLES]) | scalars,
        "left": st.integers(0, 2) | scalars,
        "right": st.integers(0, 2) | scalars,
        "verdict": st.sampled_from(["left", "right", "tie", "skip"]) | values,
        "annotator": st.just("ann") | scalars,
        "time": st.just("2026-01-31T12:00:00+00:00") | scalars,
        "seconds": st.floats(0, 9) | scalars,
    }
)
undone = st.fixed_dictionaries({"undo": st.sampled_from([s.id for s in SAMPLES]), "annotator": st.just("ann")})


@share(4)
@given(st.lists(judged | undone | values, max_size=4), tails)
@example(
    [{"sample": "a" * 32, "left": 0, "right": 1, "verdict": "tie", "annotator": "ann", "time": "", "seconds": 10**400}],
    b"",
)
def test_any_lines_of_judgements_are_read_or_refused(lines: list[Any], tail: bytes) -> None:
    whole = b"".join(json.dumps(line).encode() + b"\n" for line in [HEADER, *lines])
    with perhaps_refused(DataError):
        found = read_judgements(Path("judged.jsonl"), whole, SAMPLES, Path("samples.jsonl"))
        assert len({(one.annotator, one.sample, one.pair) for one in found}) == len(found) <= len(lines)
        if b"\n" not in tail:
            assert read_judgements(Path("judged.jsonl"), whole + tail, SAMPLES, Path("samples.jsonl")) == found


@given(st.binary(max_size=60) | values.map(lambda value: json.dumps(value).encode() + b"\n"))
def test_any_other_file_is_no_log_of_judgements(data: bytes) -> None:
    for content in (data, b'{"judgements": ' + data):
        with perhaps_refused(DataError):
            assert read_judgements(Path("judged.jsonl"), content, SAMPLES, Path("samples.jsonl")) == []


# Config

bits = st.sampled_from(
    ["beta", "a", "optimizer", "lr", ": ", ":", "\n", "\n  ", "- ", "0.1", "[", "]", "{", "}", ", ", "? ", "*a", "&a "]
    + ["|", ">", "#", '"', "'", "\\", "\\U00110000", "\\UFFFFFFFF", "%YAML 1.1\n", "---\n", "<<", "~", "null", "1e999"]
    + ["9" * 5000, "0x1", "!!timestamp ", "!!int ", "!!bool ", "!!float ", "!!set ", "!!binary ", "!!omap ", "!x "]
    + ["!!python/name:os.system ", "${", "version: 2\n", "2001-99-99", "\t", "\ufeff", "\x85"]
)  # fmt: skip
yaml_texts = (
    st.lists(bits, max_size=10).map("".join) | st.text(max_size=60) | values.map(lambda v: f"a: {json.dumps(v)}")
)


@share(6)
@given(yaml_texts)
@example('a: "\\UFFFFFFFF"')
@example('a: "\\U00110000"')
@example("%YAML 1." + "9" * 5000 + "\n---\na: 1")
@example("a: !!timestamp foo")
@example('a: !!int ""')
@example("a: !!bool foo")
@example("? [a, b]\n: c")
def test_any_text_is_a_config_or_refused(folder: Path, content: str) -> None:
    file = folder / "any.yaml"
    file.write_bytes(content.encode("utf-8", "surrogatepass"))
    with perhaps_refused(ConfigError):
        for _, _, line in keys_and_lines(content, "any.yaml"):
            assert 1 <= line <= content.count("\n") + len(re.findall("[\r\x85\u2028\u2029]", content)) + 1
    with perhaps_refused(ConfigError):
        read_command_line("train", [], str(file), many=True).check()
    with perhaps_refused(CheckpointError):
        read_stored(file)


@share(4)
@given(st.lists(bits, max_size=6).map("".join) | st.text(max_size=30), st.lists(bits, max_size=5).map("".join) | text)
@example("seed", "9" * 5000)
@example("a", "[" * 2000)
def test_any_words_of_a_command_line_are_overrides_or_refused(key: str, value: str) -> None:
    for word in (f"{key}={value}", f"beta={value}", key):
        with perhaps_refused(ConfigError):
            read_command_line("train", [word]).check()


plain = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"), max_size=20)
)


@share(4)
@given(plain | st.lists(plain, max_size=3))
@example(["naïve"])
def test_a_value_of_a_file_is_the_same_value_on_the_command_line(value: Any) -> None:
    (override,) = parse_overrides([f"a={override_value(value)}"])
    assert override.value() == value and type(override.value()) is type(value)
