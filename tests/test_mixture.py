"""Mixtures: exact proportions, chosen by the seed, and every metric of each source by itself."""

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TOPICS, Assembled, Ended, assemble, records, stop_in, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from test_evaluate import evaluated, lines, report
from test_training import same_bytes, without_timings

from dpo_cli.config.composition import composed, parse_overrides
from dpo_cli.config.schema import METRIC_ENDINGS, DataConfig, RunConfig, read_config, run_config
from dpo_cli.data.leaks import Leaks
from dpo_cli.data.mixture import pairs_of_weights
from dpo_cli.data.pairs import PairData, load_pairs
from dpo_cli.data.tokens import PairEncoder
from dpo_cli.errors import DataError
from dpo_cli.theory.metrics import MeanOverPairs

Command = Callable[..., Ended]
Load = Callable[..., PairData]


def rows(name: str, number: int) -> list[dict[str, str]]:
    """Rows whose texts say which set they are of, and which response is chosen."""
    return [
        {
            "prompt": f"{name} {row} {TOPICS[row % 10]}",
            "chosen": f"good {row}" + " yes" * (row % 3),
            "rejected": f"bad {row}",
        }
        for row in range(number)
    ]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two sets, a.jsonl (20 rows) and b.jsonl (50 rows), and a cache of its own."""
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "cache"))
    for name, number in (("a", 20), ("b", 50)):
        write_jsonl(tmp_path / f"{name}.jsonl", rows(name, number))
    return tmp_path


def sources(folder: Path, a: str, b: str) -> list[str]:
    """The words of a mixture of both sets, with these options each."""
    parts = (f"{name}: {{train: {folder}/{name}.jsonl, {more}}}" for name, more in (("a", a), ("b", b)))
    return ["data=mixture", f"data.sources={{{', '.join(parts)}}}"]


def options(*words: str) -> DataConfig:
    return run_config(composed("train", parse_overrides([*words]), RunConfig).container).data


@pytest.fixture
def load(folder: Path, tiny_tokenizer: Any) -> Load:
    def run(a: str, b: str, *words: str, seed: int = 0, **more: Any) -> PairData:
        words = ("data.eval_fraction=0", "data.processes=1", *words)
        return load_pairs(options(*sources(folder, a, b), *words), PairEncoder(tiny_tokenizer, "plain"), seed, **more)

    return run


def counts(data: PairData) -> dict[str, int]:
    return dict(Counter(pair.source for pair in data.train))


# How many pairs of each source


@pytest.mark.parametrize(
    ("weights", "available", "stop", "pairs"),
    [
        ({"a": 0.3, "b": 0.7}, (58, 156), "first", (58, 135)),  # 58 / 0.3 = 193.3; 193: 57.9 and 135.1
        ({"a": 0.3, "b": 0.7}, (58, 156), "all", (67, 156)),  # 156 / 0.7 = 222.9; 223: 66.9 and 156.1
        ({"a": 3, "b": 7}, (58, 156), "first", (58, 135)),  # only the proportion counts
        ({"a": 0.1, "b": 0.2}, (5, 5), "first", (2, 5)),  # 5 / (2/3) = 7.5; 7: 2.3 and 4.7
        ({"a": 0.1, "b": 0.2}, (5, 5), "all", (5, 10)),  # 5 / (1/3) = 15
        ({"a": 1, "b": 1}, (10, 1000), "first", (10, 10)),
        ({"a": 1, "b": 1}, (10, 1000), "all", (1000, 1000)),
    ],
)
def test_weights_are_exact_proportions(
    weights: dict[str, float], available: tuple[int, int], stop: str, pairs: tuple[int, int]
) -> None:
    found = pairs_of_weights(weights, dict(zip("ab", available, strict=True)), stop)
    assert found == dict(zip("ab", pairs, strict=True))


@given(
    st.lists(st.tuples(st.integers(1, 1000), st.integers(1, 300)), min_size=1, max_size=6),
    st.sampled_from(["first", "all"]),
)
def test_no_source_is_a_pair_off_its_share(given_sources: list[tuple[int, int]], stop: str) -> None:
    weights = {f"s{n}": weight / 1000 for n, (weight, _) in enumerate(given_sources)}
    available = {f"s{n}": pairs for n, (_, pairs) in enumerate(given_sources)}
    found = pairs_of_weights(weights, available, stop)
    total = sum(found.values())
    for name, pairs in found.items():
        assert abs(pairs - total * weights[name] / sum(weights.values())) < 1 + 1e-9
        assert pairs <= available[name] if stop == "first" else pairs >= available[name]


def test_with_stop_first_no_pair_comes_twice_and_with_all_each_equally_often(load: Load) -> None:
    first = load("weight: 0.5", "weight: 0.5")
    assert counts(first) == {"a": 20, "b": 20}
    assert len({(pair.source, pair.index) for pair in first.train}) == 40
    every = load("weight: 0.75", "weight: 0.25", "data.stop=all")
    assert counts(every) == {"a": 150, "b": 50}  # 150 = 7 times 20, and 10 of them once more
    often = Counter((pair.source, pair.index) for pair in every.train)
    assert sorted(Counter(often[pair] for pair in often if pair[0] == "a").items()) == [(7, 10), (8, 10)]
    assert {often[pair] for pair in often if pair[0] == "b"} == {1}
    assert every.describe_mixture() == "200 pairs an epoch: a 150 of 20 (75%, each 7.5 times), b 50 of 50 (25%)"
    assert first.describe_mixture() == "40 pairs an epoch: a 20 of 20 (50%), b 20 of 50 (50%)"


def test_counts_take_so_many_pairs(load: Load) -> None:
    assert counts(load("pairs: 7", "pairs: 31")) == {"a": 7, "b": 31}
    assert counts(load("pairs: 1", "pairs: 120", "data.stop=all")) == {"a": 1, "b": 120}
    with pytest.raises(DataError) as error:
        load("pairs: 21", "pairs: 31")
    assert str(error.value) == (
        "data.sources.a.pairs=21: it has 20 training pairs; take fewer, or repeat them with data.stop=all"
    )


def test_the_seed_chooses_the_pairs_and_nothing_else_does(load: Load) -> None:
    def chosen(data: PairData) -> list[int]:
        return [pair.index for pair in data.train if pair.source == "b"]

    one = load("weight: 1", "weight: 1")
    assert chosen(one) == chosen(load("weight: 0.2", "weight: 0.2")) != list(range(20))
    assert chosen(one) != chosen(load("weight: 1", "weight: 1", seed=1))
    assert one.train.fingerprint != load("weight: 1", "weight: 1", seed=1).train.fingerprint


def test_labels_and_sources_are_right_in_every_order(load: Load, folder: Path, tiny_tokenizer: Any) -> None:
    data = load("weight: 0.6", "weight: 0.4", "data.stop=all")
    order = np.random.default_rng(0).permutation(len(data.train))
    assert set(counts(data)) == {"a", "b"}
    for number in order:
        pair = data.train[number]
        row = rows(pair.source, 50)[pair.index]
        assert tiny_tokenizer.decode(pair.prompt) == row["prompt"]
        assert tiny_tokenizer.decode(pair.chosen[:-1]) == row["chosen"]
        assert tiny_tokenizer.decode(pair.rejected[:-1]) == row["rejected"]
        assert pair.row == f"{pair.source} {pair.index}"
    assert [(pair.source, pair.key) for pair in data.train[:]] == [(pair.source, pair.key) for pair in data.train]
    for text, pair in zip(data.train_texts, data.train, strict=False):
        assert text.pair.chosen == rows(pair.source, 50)[pair.index]["chosen"]
    assert len(data.train_texts) == 64


def test_pairs_of_a_row_stay_together_and_copies_of_it_apart(folder: Path, tiny_tokenizer: Any) -> None:
    ranked = [{"prompt": f"q {n}", "responses": ["x", "y", "z"]} for n in range(4)]  # 3 pairs each
    write_jsonl(folder / "a.jsonl", ranked)
    words = sources(folder, "pairs: 24", "pairs: 5")
    config = options(*words, "data.stop=all", "data.eval_fraction=0")
    data = load_pairs(config, PairEncoder(tiny_tokenizer, "plain"), 0)
    assert data.train.rows is not None and data.train.rows.tolist() == [3] * 8 + [1] * 5
    assert len(data.train) == 29
    write_jsonl(folder / "a.jsonl", ranked[:1])
    data = load_pairs(config, PairEncoder(tiny_tokenizer, "plain"), 0)
    assert data.train.rows is not None and data.train.rows.tolist() == [3] * 8 + [1] * 5


def test_a_second_start_goes_through_no_pair_again(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load("weight: 1", "weight: 1")
    monkeypatch.setattr("dpo_cli.data.mixture.write_facts", None)
    again = load("weight: 1", "weight: 1")
    assert again.train.fingerprint == before.train.fingerprint
    assert [pair.key for pair in again.train] == [pair.key for pair in before.train]


# Held-out pairs


def test_each_source_is_split_by_its_own_rule(load: Load, folder: Path) -> None:
    write_jsonl(folder / "a_eval.jsonl", rows("a_eval", 4))
    data = load(f"weight: 1, eval: {folder}/a_eval.jsonl", "weight: 1, eval_fraction: 0.5")
    held_out = Counter(pair.source for pair in data.held_out)
    assert held_out["a"] == 4 and 15 < held_out["b"] < 35
    trained = {pair.key for pair in data.train}
    assert trained.isdisjoint(pair.key for pair in data.held_out)
    assert [text.pair.prompt_text.split()[0] for text in data.held_out_texts[:4]] == ["a_eval", "b", "a_eval", "b"]
    assert [name for name, _ in data.reports()] == ["train a", "train b", "held out a", "held out b"]


def test_leaks_are_looked_for_over_all_sources_together(load: Load, folder: Path) -> None:
    leaked = [*rows("b", 2), *rows("new", 3)]  # two of what b trains on
    write_jsonl(folder / "a_eval.jsonl", leaked)
    words = (f"weight: 1, eval: {folder}/a_eval.jsonl", "weight: 2.5")
    data = load(*words)
    assert data.held_out_report.leaks == data.held_out_parts["a"].leaks == Leaks(2, 0)
    dropped = load(*words, "data.eval_leaks=drop")
    assert [pair.index for pair in dropped.held_out] == [2, 3, 4]
    with pytest.raises(DataError, match="also in training: 2 pairs; for instance row 1"):
        load(*words, "data.eval_leaks=error")


def test_held_out_sets_of_the_whole_take_the_place_of_those_of_the_sources(load: Load, folder: Path) -> None:
    for name in ("x", "y"):
        write_jsonl(folder / f"{name}.jsonl", rows(name, 3))
    data = load("weight: 1, eval_fraction: 0.5", "weight: 1", f"data.eval={{x: {folder}/x.jsonl, y: {folder}/y.jsonl}}")
    assert [pair.source for pair in data.held_out] == ["x"] * 3 + ["y"] * 3
    assert counts(data) == {"a": 20, "b": 20}


# Options


def test_a_source_takes_its_yaml_what_holds_for_each_and_what_it_says_itself(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    mine = "defaults: [_base, _self_]\ntrain: mine.jsonl\nmax_length: 99\ncolumns: {chosen: good}\n"
    (tmp_path / "data" / "mine.yaml").write_text(mine)
    words = ["data=mixture", "data.sources.mine=1", "data.sources.hh={weight: 2, limit: 7}", "data.limit=5",
             "data.sources.other={data: mine, train: other.jsonl, weight: 3, columns: {rejected: bad}}"]  # fmt: skip
    container = composed("train", parse_overrides(words), RunConfig, tmp_path).container
    parts = run_config(container).data.parts()
    assert {name: (part.train, part.limit) for name, part in parts.items()} == {
        "mine": ("mine.jsonl", 5), "hh": ("Anthropic/hh-rlhf", 7), "other": ("other.jsonl", 5)
    }  # fmt: skip
    assert parts["mine"].columns == {"chosen": "good"}
    assert parts["other"].columns == {"chosen": "good", "rejected": "bad"}
    assert {part.max_length for part in parts.values()} == {512}  # of the whole, whatever a YAML says
    assert "max_length" not in container["data"]["sources"]["mine"]


CHOICES = "; for files write {train: pairs.jsonl, weight: 0.5} (choices: alpaca, "
A = "train: a.jsonl"


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("data.sources={hhh: 1}", "data.sources.hhh: no data set is named hhh; did you mean 'hh'?" + CHOICES),
        ("data.sources={mixture: 1}", "data.sources.mixture: no data set is named mixture" + CHOICES),
        ("data.sources={x: {data: jsonl, weight: 1}}", "data.sources.x.train=null: name files or a hub data set"),
        ("data.sources={hh: 0}", "data.sources.hh.weight=0: must be above 0; shares are relative to each other"),
        ("data.sources={hh: -1}", "data.sources.hh.weight=-1: must be above 0; shares are relative to each other"),
        ("data.sources={hh: {pairs: 1.5}}", "data.sources.hh.pairs=1.5: must be a whole number or null"),
        ("data.sources={hh: {}}", "data.sources.hh: needs weight (its share) or pairs (how many in an epoch)"),
        ("data.sources={hh: {weight: 1, pairs: 5}}",
         "data.sources.hh: needs weight (its share) or pairs (how many in an epoch)"),
        ("data.sources={hh: 1, orca: {pairs: 5}}", "data.sources: give all of hh, orca weight, or all of them pairs"),
        ("data.sources={hh: many}",
         "data.sources.hh=many: must be a weight, or options such as {train: pairs.jsonl, weight: 0.5}"),
        ("data.sources={hh: {weight: 1, max_length: 9}}",
         "data.sources.hh.max_length=9: holds for all sources; set data.max_length"),
        ("data.sources={hh: {weight: 1, template: plain}}",
         "data.sources.hh.template=plain: holds for all sources; set data.template"),
        ("data.sources={hh: {weight: 1, limt: 9}}", "unknown key 'data.sources.hh.limt'; did you mean 'limit'?"),
        ("data.sources={hh: {weight: 1, limit: 0}}", "data.sources.hh.limit=0: must be at least 1"),
        ("data.sources={hh: {weight: 1, eval: {x: y}}}",
         "data.sources.hh.eval={'x': 'y'}: is one set; name others in data.eval"),
        (f"data.sources={{a.b: {{{A}, weight: 1}}}}",
         "data.sources.a.b=a.b: a name has letters, digits, - and _ only: metrics carry it"),
        (f"data.sources={{margins: {{{A}, weight: 1}}}}",
         "data.sources.margins=margins: metrics have this name already; choose another"),
        ("data.train=a.jsonl", "data.train=a.jsonl: leave it out: data.sources names what is trained on"),
        ("data.subset=x", "data.subset=x: each source of a mixture has its own: data.sources.NAME.subset"),
        ("data.sources=5", "data.sources=5: must be names with weights, for instance {hh: 0.3, tulu3: 0.7}"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_mixture_is_one_line(command: Command, word: str, says: str) -> None:
    words = ["data=mixture", *([] if "sources" in word else ["data.sources.hh=1"]), word]
    ended = command("dpo-train", *words, "--print-config")
    assert ended.code == 2 and ended.err.startswith(f"error: {says}") and ended.err.count("\n") == 1, ended.err
    assert ended.err == f"error: {says}\n" or says.endswith(CHOICES)


def test_a_mixture_without_sources_says_what_to_write(command: Command) -> None:
    assert command("dpo-train", "data=mixture").err == (
        "error: data=mixture: name its sources with their weights, for instance 'data.sources={hh: 0.3, tulu3: 0.7}'\n"
    )
    assert command("dpo-train", "data=jsonl", "data.train=a.jsonl", "data.stop=all").err == (
        "error: data.stop=all: is of data=mixture; leave it out\n"
    )
    named = command("dpo-train", "data=jsonl", "data.train=a.jsonl", "data.eval.loss/x=a.jsonl")
    assert named.code == 2 and named.err.count("\n") == 1


def test_a_source_without_pairs_or_with_too_small_a_weight_is_named(load: Load, folder: Path) -> None:
    with pytest.raises(DataError) as error:
        load("weight: 0.001", "weight: 1")
    assert str(error.value) == (
        "data.sources.a.weight=0.001: gives none of 50 pairs an epoch; raise it, or leave the source out"
    )
    write_jsonl(folder / "a.jsonl", [{"prompt": "p", "chosen": "same", "rejected": "same"}])
    with pytest.raises(DataError) as error:
        load("weight: 1", "weight: 1")
    assert str(error.value) == (f"{folder}/a.jsonl: no pair can be used: 1 pair whose two responses are the same text")


# A run


def words_of(folder: Path, name: str) -> list[str]:
    """The words of a short run on a mixture of both sets."""
    mixture = sources(folder, "weight: 0.3", "weight: 0.7, eval_fraction: 0.4")
    tiny = ["model=tiny", "model.dtype=float32", "batch_size=4", "max_steps=5", "optimizer.lr=1e-3", "log_every=2"]
    return [*tiny, *mixture, "data.eval_fraction=0.3", f"output_dir={folder}/{name}"]


def test_a_stopped_run_on_a_mixture_resumes_to_the_same_bytes(
    folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in a half-full log window, whose sums by source go on."""
    words = ("micro_batch_size=2", "lora.dropout=0.1", "log_every=3")
    straight = command("dpo-train", *words_of(folder, "straight"), *words)
    assert straight.code == 0, straight.err
    with monkeypatch.context() as patched:
        stop_in(patched, 9)  # the first micro-batch of step 5; step 4 is in the window
        assert command("dpo-train", *words_of(folder, "stopped"), *words).code == 75
    state = json.loads((folder / "stopped" / "checkpoints" / "step-00000004" / "state.json").read_text())
    of_sources = {name: state["sums"][name] for name in state["sums"] if name.startswith("pairs/")}
    assert sum(of_sources.values()) == state["sums_pairs"] == 4 and set(of_sources) <= {"pairs/a", "pairs/b"}
    resumed = command("dpo-train", *words_of(folder, "stopped"), *words, "resume=auto")
    assert resumed.code == 0, resumed.err
    for name in ("adapter_model.safetensors", "optimizer.safetensors", "rng.safetensors"):
        assert same_bytes(folder / "straight", folder / "stopped", f"checkpoints/step-00000005/{name}"), name
    assert without_timings(folder / "straight") == without_timings(folder / "stopped")


def test_train_metrics_of_each_source_are_means_over_its_pairs(folder: Path) -> None:
    run: Assembled = assemble(*words_of(folder, "run"), "reference.cache=off")
    from dpo_cli.evaluation.scores import Scorer, score_pairs

    batches = [run.material.batch(indices) for indices in run.material.schedule.batches(0, 2)]
    learner = run.learner
    scorer = Scorer(learner.policy, learner.objective, learner.reference, learner.batcher)
    chosen = score_pairs(scorer, batches[0]).policy.pairs().chosen.tolist()
    for batch in batches:
        run.step(batch)
    run.recorder.log()
    first, window = records(folder / "run")
    assert {pair.source for pair in batches[0]} == {"a", "b"}
    for source in ("a", "b"):
        mine = [logp for logp, pair in zip(chosen, batches[0], strict=True) if pair.source == source]
        assert first[f"logps/chosen/{source}"] == pytest.approx(sum(mine) / len(mine), abs=1e-4)
    number = Counter(pair.source for batch in batches for pair in batch)
    for name in ("loss", "rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/rejected"):
        whole = sum(window[f"{name}/{source}"] * pairs for source, pairs in number.items()) / number.total()
        assert window[name] == pytest.approx(whole, abs=1e-9), name
    assert window["rewards/margins/a"] != window["rewards/margins/b"]


def test_held_out_metrics_of_each_source_follow_from_the_line_of_each_pair(folder: Path, command: Command) -> None:
    ended = command("dpo-train", *words_of(folder, "run"))
    assert ended.code == 0, ended.err
    last = records(folder / "run")[-1]
    out = evaluated(command, folder / "run")
    found, pairs = report(out), lines(out)
    assert {pair["source"] for pair in pairs} == {"a", "b"}
    for source in ("a", "b"):
        margins = [pair["margin"] for pair in pairs if pair["source"] == source]
        chosen = [pair["policy_logps_chosen"] for pair in pairs if pair["source"] == source]
        expected = {
            "rewards/margins": sum(margins) / len(margins),
            "rewards/accuracies": sum(1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in margins) / len(margins),
            "loss": sum(math.log1p(math.exp(-m)) for m in margins) / len(margins),
            "logps/chosen": sum(chosen) / len(chosen),
        }
        for name, value in expected.items():
            assert found[f"{name}/{source}"] == pytest.approx(value, abs=1e-5), name
            assert last[f"{name}/{source}"] == pytest.approx(value, abs=1e-5), name
        low, high = found["intervals95"][f"rewards/margins/{source}"]
        assert low < found[f"rewards/margins/{source}"] < high
    of_pairs = {name for name in last["intervals95"] if not name.startswith("samples/")}
    assert of_pairs == {"rewards/accuracies", "rewards/margins", "loss/improvement"}  # of the verdict
    endings = {name.rpartition("/")[2] for name in [*last, *found] if "/" in name}
    assert endings - {"a", "b"} <= set(METRIC_ENDINGS) and not any("pairs/" in name for name in last)
    of_sources = json.loads((folder / "run" / "manifest.json").read_text())["data"]["by_source"]
    kept = {name: of_sources[name]["train"]["kept"] for name in ("a", "b")}
    epoch = pairs_of_weights({"a": 0.3, "b": 0.7}, kept, "first")
    assert {name: of_sources[name]["epoch"] for name in epoch} == {
        name: {"pairs": epoch[name], "available": kept[name]} for name in epoch
    }
    assert "`a.jsonl`" in (folder / "run" / "final" / "README.md").read_text().replace("path/to/", "")


def test_a_run_on_a_mixture_needs_no_yaml_of_its_sources_any_more(folder: Path, command: Command) -> None:
    own = folder / "my_conf" / "data"
    own.mkdir(parents=True)
    renamed = [{"question": f"c {n}", "good": f"good {n}", "bad": f"bad {n} no"} for n in range(20)]
    write_jsonl(folder / "c.jsonl", renamed)
    columns = "columns: {prompt: question, chosen: good, rejected: bad}"
    (own / "c.yaml").write_text(f"defaults: [_base, _self_]\ntrain: {folder}/c.jsonl\n{columns}\n")
    words = [*words_of(folder, "run"), "data.sources.c=0.5", "--config-dir", str(folder / "my_conf")]
    ended = command("dpo-train", *words)
    assert ended.code == 0, ended.err
    shutil.rmtree(folder / "my_conf")
    assert read_config(folder / "run" / "config.yaml").data.parts()["c"].columns["chosen"] == "good"
    found = report(evaluated(command, folder / "run"))
    assert found["rewards/margins/c"] == pytest.approx(records(folder / "run")[-1]["rewards/margins/c"], abs=1e-6)
    some = report(evaluated(command, folder / "run", "data.eval_limit=1", "name=some"))
    assert some["pairs"] == 3  # one of each source
    unknown = command("dpo-eval", f"checkpoint={folder}/run", "data.sources.d.limit=1")
    assert unknown.code == 2 and unknown.err == "error: data.sources.d.limit: the run's data has no d (a, b, c)\n"


def test_held_out_sets_with_names_have_metrics_each(folder: Path, command: Command) -> None:
    words = ["model=tiny", "model.dtype=float32", "batch_size=4", "max_steps=2", f"output_dir={folder}/run"]
    sets = f"data.eval={{x: {folder}/a.jsonl, y: [{folder}/b.jsonl]}}"
    write_jsonl(folder / "c.jsonl", rows("c", 20))
    ended = command("dpo-train", *words, "data=jsonl", f"data.train={folder}/c.jsonl", sets)
    assert ended.code == 0, ended.err
    *train, last = records(folder / "run")
    assert last["rewards/margins"] == pytest.approx(
        (20 * last["rewards/margins/x"] + 50 * last["rewards/margins/y"]) / 70, abs=1e-9
    )
    assert not any(name.endswith(("/x", "/y")) for line in train for name in line)
    shown = command("dpo-eval", f"checkpoint={folder}/run").out
    table = shown[shown.index("source") :].splitlines()
    assert [line.split()[:2] for line in table[1:3]] == [["x", "20"], ["y", "50"]]


def test_sums_of_sources_read_back() -> None:
    import torch

    mean = MeanOverPairs()
    mean.add({"loss": torch.tensor([1.0, 2.0, 6.0]), "rewards/chosen": torch.tensor([1.0, 0.0, 0.0])}, ["a", "b", "a"])
    again = MeanOverPairs.from_sums(mean.sums(), mean.pairs)
    for one in (mean, again):
        assert one.means() == {
            "loss": 3.0, "loss/a": 3.5, "loss/b": 2.0, "rewards/chosen": pytest.approx(1 / 3),
            "rewards/chosen/a": 0.5, "rewards/chosen/b": 0.0,
        }  # fmt: skip
    again.add({"loss": torch.tensor([4.0]), "rewards/chosen": torch.tensor([1.0])}, ["b"])
    assert again.means()["loss/b"] == 3.0 and again.means()["loss"] == 13 / 4
