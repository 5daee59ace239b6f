"""Faults 11 to 13 and 20 without end: rows, texts, overrides and files that nobody thought of, drawn by hypothesis."""

import contextlib
import json
import re
import string
from pathlib import Path
from typing import Any

import pytest
from conftest import share
from harness import fault
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dpo_cli.config.composition import composed, parse_overrides
from dpo_cli.config.schema import RunConfig, read_config, run_config, schema_keys, to_container
from dpo_cli.console.text import redacted, safe_text
from dpo_cli.data.files import read_rows
from dpo_cli.data.formats import BadRowError, pairs_of
from dpo_cli.data.pairs import load_pairs
from dpo_cli.data.tokens import PairEncoder
from dpo_cli.errors import CheckpointError, ConfigError, DataError, DpoError
from dpo_cli.runs.checkpoint import MANIFEST, read_state, validate

pytestmark = pytest.mark.faults
MANY, FEWER = (settings(share(part), suppress_health_check=list(HealthCheck)) for part in (4, 1.2))

text = st.text(max_size=40)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | text
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4))
names = st.sampled_from(["prompt", "chosen", "rejected", "responses", "scores", "role", "content"]) | text
rows = st.dictionaries(names, values, max_size=6)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "x"]), "content": scalars}),
    max_size=4,
)
likely = st.fixed_dictionaries({"prompt": text | messages, "chosen": text | messages, "rejected": text | messages})


@MANY
@given(st.one_of(rows, likely), st.sampled_from(["auto", "hh", "standard", "messages", "ranked"]))
def test_any_row_is_pairs_of_text_or_refused_in_words(row: dict[str, Any], form: str) -> None:
    with fault(12):
        try:
            found = pairs_of(row, form)
        except BadRowError as error:
            assert str(error)
            return
        for pair in found:
            assert all(isinstance(side, str) for side in (pair.prompt_text, pair.chosen, pair.rejected))
            for side in (pair.prompt_text, pair.chosen, pair.rejected):
                side.encode("utf-8")  # no half of a surrogate pair comes through


@MANY
@given(st.binary(max_size=200), st.sampled_from([".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet"]))
@example(b"\xef\xbb\xbf{}", ".jsonl")
@example(b"\x1f\x8b", ".jsonl.gz")
def test_any_bytes_are_rows_or_refused_in_words(tmp_path_factory: Any, data: bytes, ending: str) -> None:
    file = tmp_path_factory.mktemp("bytes") / f"a{ending}"
    file.write_bytes(data)
    with fault(11), contextlib.suppress(DataError):
        for row in read_rows(file):
            assert (row.value is None) != (row.problem is None)
            assert row.problem is None or safe_text(row.problem) == row.problem


@FEWER
@given(
    st.lists(st.tuples(text, text, text), min_size=1, max_size=6),
    st.integers(2, 40),
    st.sampled_from(["chat", "plain"]),
)
def test_any_texts_become_pairs_that_fit_and_differ_or_are_counted(
    tmp_path_factory: Any, tiny_tokenizer: Any, triples: list[tuple[str, str, str]], max_length: int, template: str
) -> None:
    file: Path = tmp_path_factory.mktemp("texts") / "a.jsonl"
    lines = [dict(zip(("prompt", "chosen", "rejected"), triple, strict=True)) for triple in triples]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [
        "data=jsonl",
        f"data.train={file}",
        "data.eval_fraction=0",
        "data.on_bad_row=skip",
        "data.max_bad_fraction=1",
    ]
    words += [f"data.max_length={max_length}", f"data.template={template}"]
    options = run_config(composed("train", parse_overrides(words), RunConfig).container).data
    with fault(13):
        try:
            data = load_pairs(options, PairEncoder(tiny_tokenizer, template), seed=0)
        except DataError as error:
            assert ": no pair can be used: " in str(error) or ": has no pairs; " in str(error)
            return
        report = data.train_report
        assert report.kept + report.dropped.total() == report.rows == len(triples)
        for pair in data.train:
            assert min(map(len, (pair.prompt, pair.chosen, pair.rejected))) >= 1
            assert len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) <= max_length
            assert pair.chosen.tolist() != pair.rejected.tolist()


keys = st.sampled_from(sorted(schema_keys(RunConfig))) | st.text(
    string.ascii_letters + "._+~@", min_size=1, max_size=12
)
words = st.sampled_from(
    ["0", "-1", "nan", "inf", "1e999", "null", "true", "[]", "{}", "[1,2]", "a,b", "${x}", "'", "choice(1)"]
)


@MANY
@given(st.lists(st.tuples(keys, words | text), max_size=3))
@example([("beta", "${oc.env:HOME}")])
@example([("model", "../../etc/passwd")])
@example([("loss", "_base")])
def test_any_overrides_compose_or_are_refused_in_one_line(overrides: list[tuple[str, str]]) -> None:
    with fault(0):
        try:
            config = run_config(
                composed("train", parse_overrides([f"{key}={value}" for key, value in overrides]), RunConfig).container
            )
        except ConfigError as error:
            assert "\n" not in str(error) and len(str(error)) > 10
            return
        assert run_config(to_container(config)) == config


@MANY
@given(st.text(max_size=300) | st.binary(max_size=300).map(lambda data: data.decode("latin-1")))
def test_any_text_as_a_strangers_config_is_refused_in_words(tmp_path_factory: Any, content: str) -> None:
    file: Path = tmp_path_factory.mktemp("config") / "config.yaml"
    file.write_text(content, encoding="utf-8", errors="surrogatepass")
    with fault(21), pytest.raises(CheckpointError):
        read_config(file)


@MANY
@given(values, values)
def test_any_json_as_a_strangers_manifest_and_state_is_refused_in_words(
    tmp_path_factory: Any, manifest: Any, state: Any
) -> None:
    folder: Path = tmp_path_factory.mktemp("checkpoint")
    (folder / MANIFEST).write_text(json.dumps({"files": manifest}))
    (folder / "state.json").write_text(json.dumps(state))
    with fault(21, tries=2):
        for read in (validate, read_state):
            with pytest.raises(DpoError):
                read(folder)


@MANY
@given(st.text(st.characters(codec=None), max_size=60))
def test_shown_text_holds_no_character_that_acts_and_is_shown_once(raw: str) -> None:
    with fault(20):
        shown = safe_text(raw)
        assert not re.search(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]", shown)
        assert safe_text(shown) == shown and len(safe_text(raw, limit=20)) <= 20 * 10
        assert redacted(redacted(raw)) == redacted(raw)
