"""Held-out pairs that were trained on are kept apart, counted, said, and never end in green."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import Ended, sample_rows, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from dpo_cli.config.composition import composed, parse_overrides
from dpo_cli.config.schema import RunConfig, read_config, run_config
from dpo_cli.data.formats import standard
from dpo_cli.data.leaks import Leaks, TrainedOn, pair_hash
from dpo_cli.data.pairs import PairData, load_pairs
from dpo_cli.data.splits import is_held_out
from dpo_cli.data.tokens import PairEncoder
from dpo_cli.errors import DataError
from dpo_cli.runs.run_directory import RunDirectory

Command = Callable[..., Ended]
Trained = Callable[..., Path]
Load = Callable[..., PairData]
HUMAN, ASSISTANT = "\n\nHuman: ", "\n\nAssistant:"


@pytest.fixture
def load(tiny_tokenizer: Any, tmp_path: Path) -> Load:
    def run(rows: list[Any], *words: str, held: list[Any] | None = None, **more: Any) -> PairData:
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        if held is not None:
            words = (f"data.eval={write_jsonl(tmp_path / 'held.jsonl', held)}", *words)
        overrides = parse_overrides(["data=jsonl", f"data.train={path}", *words])
        config = run_config(composed("train", overrides, RunConfig).container).data
        return load_pairs(config, PairEncoder(tiny_tokenizer, "plain"), 0, **more)

    return run


def dialogues(number: int) -> list[dict[str, str]]:
    """HH rows: of each dialogue a cut after its first turn, a twin of that with a trailing space, and the whole."""
    rows = []
    for n in range(number):
        cut = f"{HUMAN}Tell me of city {n}{ASSISTANT}"
        whole = f"{cut} It is old.{HUMAN}How old?{ASSISTANT}"
        for prompt in (cut, cut.replace(ASSISTANT, f" {ASSISTANT}"), whole):
            rows.append({"chosen": f"{prompt} {n} is old.", "rejected": f"{prompt} I will not say of {n}."})
    return rows


# The split


def test_twins_and_cuts_of_a_dialogue_are_on_one_side(load: Load) -> None:
    words = ("data.eval_fraction=0.3", "data.format=hh")
    data = load(dialogues(40), *words)
    assert data.held_out_report.leaks == Leaks(0, 0)
    assert {pair.group for pair in data.train}.isdisjoint(pair.group for pair in data.held_out)
    assert len(data.held_out) % 3 == 0 and 20 < len(data.held_out) < 60
    assert "(held out by a hash of the first human turn)" in data.held_out_report.sentences(512)[0]
    before = load(dialogues(40), *words, "data.split_by=prompt")
    assert before.held_out_report.leaks is not None
    assert before.held_out_report.leaks.pairs > 0 and before.held_out_report.leaks.prompts > 0
    assert "(held out by a hash of the prompt)" in before.held_out_report.sentences(512)[0]


@given(st.text("abc é", min_size=1), st.sampled_from(["", " ", "\n"]), st.booleans(), st.integers(0, 9))
def test_the_side_of_a_prompt_is_that_of_its_twins(text: str, space: str, upper: bool, seed: int) -> None:
    from dpo_cli.data.groups import prompt_group

    def held_out(prompt: str) -> bool:
        pair = standard({"prompt": prompt, "chosen": "yes", "rejected": "no"})
        return is_held_out(f"{prompt_group(pair.prompt):016x}", 0.5, seed)

    assert held_out(space + (text.upper() if upper else text) + space) == held_out(text)
    assert held_out(f"{HUMAN}{text}{ASSISTANT} x{HUMAN}y{ASSISTANT}") == held_out(text)


def test_a_run_of_an_earlier_version_goes_on_with_the_split_it_began_with(trained: Trained, command: Command,
                                                                          pairs_file: Path) -> None:  # fmt: skip
    pairs_file.write_text("".join(json.dumps(row) + "\n" for row in dialogues(12)))
    old = trained("old", "data.split_by=prompt", "save_every=2")
    container = yaml.safe_load((old / "config.yaml").read_text())
    del container["data"]["split_by"], container["data"]["eval_leaks"]
    (old / "config.yaml").write_text(yaml.safe_dump({**container, "version": 2}))
    (old / "trained_on.safetensors").unlink()
    held_out = json.loads((old / "manifest.json").read_text())["data"]["held_out"]["kept"]
    weights = (old / "final" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(old / "final")
    shutil.rmtree(old / "checkpoints" / "step-00000003")
    words = json.loads((old / "manifest.json").read_text())["argv"]
    ended = command("dpo-train", *(word for word in words if word != "data.split_by=prompt"), "resume=auto")
    assert ended.code == 0, ended.err
    assert "\ndata.split_by=prompt, as when the run began\n" in ended.out
    assert (old / "final" / "adapter_model.safetensors").read_bytes() == weights
    ended = command("dpo-eval", f"checkpoint={old}")
    assert ended.code == 0 and f"kept {held_out} pairs of" in ended.out
    assert read_config(old / "config.yaml").data.split_by == "prompt"
    assert RunDirectory(old).read_trained_on() is not None  # written when it went on


# Two files


def test_overlaps_of_pairs_and_of_prompts_are_counted_apart(load: Load) -> None:
    rows = sample_rows(6)
    swapped = {"prompt": rows[0]["prompt"].upper() + " ", "chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"]}
    held = [swapped, rows[1], {**rows[2], "chosen": "Another."}, {**rows[3], "prompt": "Something else."}]
    data = load(rows, held=held)
    assert data.held_out_report.leaks == Leaks(pairs=2, prompts=1)
    assert len(data.held_out) == 4
    assert data.held_out_report.sentences(512)[1:] == ["also in training: 2 pairs, and the first human turn of 1 other"]
    assert data.held_out_report.as_dict()["leaks"] == {"pairs": 2, "prompts": 1}
    assert "leaks" not in data.train_report.as_dict()
    apart = load(rows, held=held[3:])
    assert apart.held_out_report.leaks == Leaks(0, 0) and len(apart.held_out_report.sentences(512)) == 1


def test_drop_takes_them_out_of_the_held_out_side_and_counts_them(load: Load) -> None:
    rows = sample_rows(6)
    held = [rows[1], {**rows[2], "chosen": "Another."}, {**rows[3], "prompt": "Something else."}]
    data = load(rows, "data.eval_leaks=drop", held=held)
    assert [pair.index for pair in data.held_out] == [2] and len(data.held_out_texts) == 1
    assert len(data.train) == 6
    assert data.held_out_report.sentences(512)[1:] == [
        "dropped 1 pair found in training",
        "dropped 1 pair with a first human turn found in training",
    ]
    assert (data.held_out_report.kept, data.held_out_report.leaks) == (1, Leaks(0, 0))


def test_drop_that_leaves_nothing_is_an_error(load: Load) -> None:
    with pytest.raises(DataError, match=r"held\.jsonl: no pair can be used: 2 pairs found in training$"):
        load(sample_rows(6), "data.eval_leaks=drop", held=sample_rows(2))
    with pytest.raises(DataError, match=r"no pair can be used: \d+ pairs? with a first human turn found in training$"):
        rows = [{"chosen": f"{HUMAN}Hi{ASSISTANT} {n}{HUMAN}Go{ASSISTANT} yes", "rejected":
                 f"{HUMAN}Hi{ASSISTANT} {n}{HUMAN}Go{ASSISTANT} no"} for n in range(20)]  # fmt: skip
        load(rows, "data.eval_leaks=drop", "data.split_by=prompt", "data.eval_fraction=0.3")


def test_error_names_counts_and_an_example(load: Load) -> None:
    rows = sample_rows(6)
    held = [{**rows[3], "prompt": "Something else."}, {**rows[2], "chosen": "Another."}, rows[1]]
    with pytest.raises(DataError) as error:
        load(rows, "data.eval_leaks=error", held=held)
    assert str(error.value).endswith(
        "held.jsonl: also in training: 1 pair, and the first human turn of 1 other; for instance row 3, 'Tell me "
        "something about rain, number 1.' (data.eval_leaks=drop takes them out)"
    )
    assert error.value.exit_code == 3
    with pytest.raises(DataError, match=r"the first human turn of 1 pair; for instance row 2, "):
        load(rows, "data.eval_leaks=error", held=held[:2])


# The record of a run


def test_a_record_of_training_pairs_reads_back(load: Load, tmp_path: Path) -> None:
    data = load(sample_rows(5) * 2, "data.eval_fraction=0")
    record = data.train.trained_on
    assert len(record.pairs) == len(record.groups) == 5  # each once
    content = record.to_bytes()
    assert len(content) < 200 + 16 * 5
    (tmp_path / "record").write_bytes(content)
    again = TrainedOn.mapped(tmp_path / "record")
    assert (again.pairs == record.pairs).all() and (again.groups == record.groups).all()


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\x04N.", save({"pairs": np.zeros(1, np.uint64)}),
     save({"pairs": np.zeros(1, np.uint64), "groups": np.zeros(1, np.float32)})],
)  # fmt: skip
def test_what_is_no_such_record_is_not_read(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "record").write_bytes(content)
    with pytest.raises(ValueError):
        TrainedOn.mapped(tmp_path / "record")
    directory = RunDirectory(tmp_path)
    assert directory.read_trained_on() is None
    directory.trained_on.write_bytes(content)
    assert directory.read_trained_on() is None


@pytest.mark.parametrize("dtype", ["F8_E4M3", "BF16", "C64", "F4"])
def test_a_record_of_another_dtype_is_not_read(dtype: str, tmp_path: Path) -> None:
    one = {"dtype": dtype, "shape": [8], "data_offsets": [0, {"F8_E4M3": 8, "BF16": 16, "C64": 64, "F4": 4}[dtype]]}
    header = json.dumps({"pairs": one, "groups": one}).encode()
    file = tmp_path / "record"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(one["data_offsets"][1]))
    with pytest.raises(ValueError):
        TrainedOn.mapped(file)


def test_a_record_that_is_no_file_of_its_own_or_has_no_end_is_not_read(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.trained_on.mkdir()
    assert directory.read_trained_on() is None
    directory.trained_on.rmdir()
    zeros = np.zeros(1, np.uint64)
    (tmp_path / "elsewhere").write_bytes(save({"pairs": zeros, "groups": zeros}))
    directory.trained_on.symlink_to(tmp_path / "elsewhere")
    assert directory.read_trained_on() is None
    directory.trained_on.unlink()
    with directory.trained_on.open("wb") as file:
        file.truncate(2**40)  # sparse
    assert directory.read_trained_on() is None


def test_a_pair_is_known_by_prompt_and_responses_in_either_order() -> None:
    pair = {"prompt": "What is tea?", "chosen": "A drink.", "rejected": "No."}
    same = [pair, {**pair, "prompt": "what is  tea? "}, {**pair, "chosen": "no.", "rejected": " A drink."}]
    other = [{**pair, "chosen": "A leaf."}, {**pair, "prompt": "What is a tea?"}]
    assert len({pair_hash(standard(row)) for row in same}) == 1
    assert len({pair_hash(standard(row)) for row in [pair, *other]}) == 3


# What a person sees


def test_a_run_held_out_on_its_training_file_says_so_and_is_not_green(
    trained: Trained, command: Command, pairs_file: Path
) -> None:
    run = trained("run", f"data.eval={pairs_file}", "max_steps=40", "optimizer.lr=2e-2")
    log = (run / "train.log").read_text()
    assert "also in training: 20 pairs\n" in log
    assert (
        "warning: held-out pairs are also in training (20 pairs): on them accuracy says nothing about new prompts; "
        "data.eval_leaks=drop takes them out\n"
    ) in log
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["data"]["held_out"]["leaks"] == {"pairs": 20, "prompts": 0}
    assert manifest["verdict"]["color"] != "green"
    assert "leak" in [finding["name"] for finding in manifest["verdict"]["findings"]]


def test_an_evaluation_on_the_training_file_says_so(trained: Trained, command: Command, pairs_file: Path) -> None:
    run = trained()
    kept = json.loads((run / "manifest.json").read_text())["data"]["train"]["kept"]
    held_out = command("dpo-eval", f"checkpoint={run}")
    assert held_out.code == 0 and "also in training" not in held_out.out
    pairs_file.rename(copy := pairs_file.with_name("copy.jsonl"))  # the record of the run is enough
    ended = command("dpo-eval", f"checkpoint={run}", "data=jsonl", f"data.eval={copy}", "name=copy")
    assert ended.code == 0, ended.err
    assert f"also in training: {kept} pairs\n" in ended.out
    assert f"warning: held-out pairs are also in training ({kept} pairs): " in ended.out
    folder = run / "eval" / "copy"
    assert json.loads((folder / "report.json").read_text())["data"]["leaks"] == {"pairs": kept, "prompts": 0}
    assert f"<th>also in training</th><td>{kept} pairs: on them accuracy says" in (folder / "report.html").read_text()
    ended = command("dpo-eval", f"checkpoint={run}", "data=jsonl", f"data.eval={copy}", "data.eval_leaks=drop")
    assert ended.code == 0 and f"kept {20 - kept} pairs of 20 rows" in ended.out
    ended = command("dpo-eval", f"checkpoint={run}", "data=jsonl", f"data.eval={copy}", "data.eval_leaks=error")
    assert ended.code == 3 and f"also in training: {kept} pairs; for instance row " in ended.err


def test_an_adapter_without_its_run_cannot_say_what_it_was_trained_on(
    trained: Trained, command: Command, pairs_file: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained() / "final", bare := tmp_path / "bare")
    words = ("data=jsonl", f"data.eval={pairs_file}", f"output_dir={tmp_path / 'out'}", "name=bare")
    ended = command("dpo-eval", f"checkpoint={bare}", *words)
    assert ended.code == 0, ended.err
    assert f"whether they were trained on is not known: {bare} keeps no record of it\n" in ended.out
    assert "leaks" not in json.loads((tmp_path / "out" / "bare" / "report.json").read_text())["data"]
