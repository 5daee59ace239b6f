"""dpo-data: planted defects are counted exactly, a planted phrase is found, noise is not, and text stays text."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from conftest import Ended, sample_rows, write_jsonl

from dpo_cli.config.composition import composed, parse_overrides
from dpo_cli.config.schema import RunConfig, run_config
from dpo_cli.data.formats import Message, PreferencePair
from dpo_cli.data.pairs import load_pairs
from dpo_cli.data.tokens import PairEncoder, TokenizedPair, token_ids
from dpo_cli.data.truncation import Encoded, Truncation, truncate
from dpo_cli.examination.lengths import Tokens, cost_of, count_tokens, quantiles
from dpo_cli.examination.minhash import near_duplicates, signatures
from dpo_cli.examination.reading import compare, read_side, sources_of
from dpo_cli.examination.words import classify

Command = Callable[..., Ended]
Examined = Callable[..., dict[str, Any]]
SCHEMA = json.loads((Path(__file__).parent.parent / "dpo_cli/examination/report_schema.json").read_text())
WORDS = [f"{start}{end}" for start in ("ba", "ke", "lo", "mi", "nu", "ri", "so", "tu") for end in ("dar", "fen", "gol",
         "hip", "jut", "lam", "mon", "pes", "ros", "tik", "vul", "zen")]  # fmt: skip


def text(source: random.Random, words: int) -> str:
    return " ".join(source.choices(WORDS, k=words))


def noise(pairs: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows whose responses say nothing about their label."""
    source = random.Random(seed)
    return [
        {"prompt": f"{number} {text(source, 12)}?", "chosen": text(source, 20), "rejected": text(source, 20)}
        for number in range(pairs)
    ]


@pytest.fixture
def examined(command: Command, tmp_path: Path) -> Examined:
    """Examines rows, checks report.json against the schema, and returns it; `code` is the exit code expected."""

    def run(rows: list[Any], *words: object, code: int = 0, held_out: list[Any] | None = None) -> dict[str, Any]:
        file = write_jsonl(tmp_path / "pairs.jsonl", rows)
        more = [f"data.eval={write_jsonl(tmp_path / 'held.jsonl', held_out)}"] if held_out is not None else []
        folder = tmp_path / "examined"
        ended = command(
            "dpo-data", "model=tiny", "data=jsonl", f"data.train={file}", *more, f"output_dir={folder}",
            "data.max_length=4096", *words,
        )  # fmt: skip
        assert ended.code == code, ended.err
        report: dict[str, Any] = json.loads((folder / "report.json").read_text())
        jsonschema.validate(report, SCHEMA)
        return {**report, "out": ended.out, "err": ended.err, "page": (folder / "report.html").read_text()}

    return run


def planted() -> tuple[list[Any], list[dict[str, Any]], dict[str, list[int]]]:
    """Clean rows, then rows with one defect each; held-out rows; the row indices of each defect."""
    rows: list[Any] = noise(60)
    held_out = noise(10, seed=5)
    first, second, third = rows[0], rows[1], rows[2]
    defects: list[tuple[str, list[Any]]] = [
        ("bad_row", [{"prompt": "p", "chosen": "c"}, {"prompt": 3, "chosen": "c", "rejected": "r"}]),
        ("tie", [{"prompt": "t", "responses": ["one", "two"], "scores": [1, 1]}]),
        ("empty_response", [{"prompt": "e", "chosen": " \n", "rejected": "r"}]),
        ("identical", [{"prompt": "i", "chosen": "same", "rejected": "same"}] * 2),
        # The same in other letters and spaces, and once more.
        ("duplicate", [{**first, "chosen": f"  {first['chosen'].upper()} "}, first, second]),
        ("contradictory", [{**third, "chosen": third["rejected"], "rejected": third["chosen"]}]),
        ("leaked", [held_out[3], {**held_out[4], "chosen": held_out[4]["rejected"], "rejected": held_out[4]["chosen"]},
                    {"prompt": held_out[5]["prompt"], "chosen": "other", "rejected": "words"}]),
        ("prompt_too_long", [{"prompt": "x" * 900, "chosen": "a", "rejected": "b"}]),
        ("identical_after_truncation", [{"prompt": "z", "chosen": "y" * 700 + "a", "rejected": "y" * 700 + "b"}]),
    ]  # fmt: skip
    places: dict[str, list[int]] = {}
    for reason, made in defects:
        places[reason] = list(range(len(rows), len(rows) + len(made)))
        rows += made
    places["contradictory"].insert(0, 2)  # both of them: neither is known to be right
    return rows, held_out, places


def test_planted_defects_are_counted_exactly_with_their_rows(examined: Examined) -> None:
    rows, held_out, places = planted()
    report = examined(rows, "data.max_length=512", held_out=held_out)
    train = report["train"]
    assert train["dropped"] == {reason: len(indices) for reason, indices in places.items()}
    assert train["rows"] == len(rows) and train["pairs"] == len(rows) - 2
    assert train["kept"] == 59  # of the 60 clean rows one is contradicted
    for reason, indices in places.items():
        assert [example["index"] for example in train["examples"][reason]] == indices[:3], reason
        assert f"\n{reason}" in report["out"]
    assert train["examples"]["bad_row"][0]["problem"].startswith("no 'rejected' key")
    assert train["examples"]["identical"][0]["chosen"] == "same"
    assert report["held_out"]["dropped"] == {"leaked": 3}
    assert report["tokens"]["dropped"] == {"prompt_too_long": 1, "identical_after_truncation": 1}
    assert [one["name"] for one in report["findings"]][:3] == ["dropped", "bad_row", "leaked"]


def test_fix_writes_exactly_the_clean_rows_and_a_line_for_each_other(
    examined: Examined, command: Command, tmp_path: Path
) -> None:
    rows, held_out, places = planted()
    rows[7]["votes"] = {"é": [1, 2.5, None]}  # a column that nothing reads stays
    cleaned, changes = tmp_path / "cleaned.jsonl", tmp_path / "cleaned.changes.jsonl"
    report = examined(rows, f"fix={cleaned}", held_out=held_out)
    assert report["findings"][0]["next"] == (
        f"dpo-train model=tiny data=jsonl data.eval={tmp_path / 'held.jsonl'} data.max_length=4096 data.train={cleaned}"
    )
    # Of 75 rows: 2 bad, 1 tie, 1 empty, 2 identical, 3 duplicates, 2 contradictory, 3 leaked.
    assert report["out"].splitlines()[-2:] == [
        f"fixed    {cleaned}: 61 rows",
        f"changes  {changes}: 14 rows",
    ]
    dropped = {index for reason, indices in places.items() if "long" not in reason and "after" not in reason
               for index in indices}  # fmt: skip
    assert [json.loads(line) for line in cleaned.read_text().splitlines()] == [
        row for index, row in enumerate(rows) if index not in dropped
    ]
    listed = [json.loads(line) for line in changes.read_text().splitlines()]
    reason_of = {index: reason for reason, indices in places.items() for index in indices}
    assert [(one["index"], one["reason"]) for one in listed] == [(index, reason_of[index]) for index in sorted(dropped)]
    assert not list(tmp_path.glob(".tmp-*"))
    words = ("model=tiny", "data=jsonl", f"data.train={tmp_path / 'pairs.jsonl'}", f"output_dir={tmp_path / 'x'}")
    before = cleaned.read_bytes()
    again = command("dpo-data", *words, f"fix={cleaned}")
    assert again.code == 2 and again.err == f"error: fix={cleaned}: {cleaned} exists already; name another file\n"
    assert cleaned.read_bytes() == before and not (tmp_path / "x").exists()
    second = command("dpo-data", "model=tiny", "data=jsonl", f"data.train={cleaned}", f"output_dir={tmp_path / 'x'}",
                     "data.max_length=4096")  # fmt: skip
    assert second.code == 0
    assert json.loads((tmp_path / "x" / "report.json").read_text())["train"]["dropped"] == {}


def test_a_ranked_row_stays_while_one_of_its_pairs_does(examined: Examined, tmp_path: Path) -> None:
    pair = {"prompt": "q", "chosen": "best", "rejected": "worst"}
    rows = [
        *noise(5), pair, {"prompt": "q", "responses": ["best", "good", "worst"]},
        {"prompt": "q", "responses": ["best", "worst"]},
    ]  # fmt: skip
    report = examined(rows, f"fix={tmp_path / 'c.jsonl'}")
    assert report["train"]["pairs"] == 5 + 1 + 3 + 1 and report["train"]["dropped"] == {"duplicate": 2}
    assert len((tmp_path / "c.jsonl").read_text().splitlines()) == 7
    (change,) = (tmp_path / "c.changes.jsonl").read_text().splitlines()
    assert json.loads(change)["index"] == 7


def test_the_longer_response_is_counted_as_preferred_as_often_as_it_is(examined: Examined) -> None:
    # 75 of 100 pairs have the longer chosen, 5 are of equal length and count half.
    rows = [
        {"prompt": f"question {number}", "source": "web" if number < 50 else "books",
         "chosen": "a" * (20 if number < 75 else 10) + str(number % 10),
         "rejected": "b" * (20 if 75 <= number < 95 else 10) + str(number % 10)}
        for number in range(100)
    ]  # fmt: skip
    report = examined(rows, "data.columns.source=source")
    found = report["bias"]["longer_preferred"]
    assert found["mean"] == pytest.approx((75 + 2.5) / 100)
    assert 0.66 < found["interval95"][0] < 0.7 and 0.84 < found["interval95"][1] < 0.88  # Wilson's of 77.5 in 100
    by_source = {one["source"]: one["longer_preferred"]["mean"] for one in report["bias"]["by_source"]}
    assert by_source == pytest.approx({"web": 1.0, "books": (25 + 2.5) / 50})
    assert report["train"]["sources"] == {"web": 50, "books": 50}
    assert any(one["name"] == "longer_preferred" for one in report["findings"])


def test_a_planted_phrase_is_found_and_predicts_its_side(examined: Examined) -> None:
    rows = noise(300)
    for number, row in enumerate(rows):
        if number % 5 < 3:  # in three of five chosen responses
            row["chosen"] = f"certainly {row['chosen']}"
    words = examined(rows)["bias"]["words"]
    # Right in the three fifths that hold it, a coin in the others: 0.6 + 0.4 / 2.
    assert words["accuracy"]["mean"] == pytest.approx(0.8, abs=0.06)
    best = max(words["phrases"], key=lambda one: one["weight"] * (one["in_chosen"] + one["in_rejected"]))
    assert "certainly" in best["phrase"] and best["in_chosen"] == pytest.approx(0.6) and best["in_rejected"] == 0
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    found = examined(swapped)["bias"]["words"]["phrases"]
    assert all(one["weight"] < 0 for one in found if "certainly" in one["phrase"])


def test_nothing_is_found_in_noise(examined: Examined) -> None:
    report = examined(noise(400, seed=3))
    accuracy = report["bias"]["words"]["accuracy"]
    assert accuracy["interval95"][0] < 0.5 < accuracy["interval95"][1]
    assert report["bias"]["words"]["phrases"] == [] and report["findings"] == []
    assert "no findings" in report["out"]


def test_pairs_of_one_prompt_are_on_one_side_of_the_folds() -> None:
    # Each prompt has its own word, and which side it stands on is a coin: a fold that has seen its prompt knows it.
    source = random.Random(0)
    pairs, groups = [], []
    for prompt in range(80):
        marked = f"word{prompt} {text(source, 3)}"
        for _ in range(6):
            sides = (marked, text(source, 3)) if prompt % 2 else (text(source, 3), marked)
            pairs.append(PreferencePair((Message("user", str(prompt)),), str(prompt), *sides))
            groups.append(prompt)
    honest = classify(pairs, groups, 0)
    leaky = classify(pairs, range(len(pairs)), 0)
    assert honest is not None and leaky is not None
    assert honest.accuracy.mean < 0.6 and leaky.accuracy.mean > 0.9


def test_too_few_pairs_make_no_classifier() -> None:
    pair = PreferencePair((Message("user", "q"),), "q", "a", "b")
    assert classify([pair] * 200, [1] * 200, 0) is None  # one prompt
    assert classify([pair] * 20, range(20), 0) is None


def test_where_training_would_be_pointless_the_code_is_3_and_the_report_is_written(examined: Examined) -> None:
    rows = noise(10)
    both_ways = rows + [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    for made, says in (
        ([{"prompt": "p", "chosen": "s", "rejected": "s"}] * 3, "no pair can be used (identical 3); name other pairs"),
        ([{"text": "x"}] * 3, "3 of 3 rows cannot be read; the first is "),
        ([*both_ways, *noise(10, seed=9)], "20 of 30 pairs are labelled both ways, so there is nothing to learn"),
    ):
        report = examined(made, code=3)
        assert says in report["err"] and report["err"].count("\n") == 1 and says in report["pointless"]
    report = examined([*both_ways[:11], *noise(20, seed=9)])  # one contradiction is no reason
    assert report["pointless"] is None and report["train"]["dropped"] == {"contradictory": 2}
    report = examined(noise(3), "data.max_length=8", code=3)
    assert "no pair can be used (prompt_too_long 3); raise data.max_length" in report["err"]


def test_rows_that_cannot_be_read_come_with_the_yaml_that_reads_them(examined: Examined) -> None:
    turn = {"from": "human", "value": "q"}
    rows = [{"conversations": [turn], **{side: {"from": "gpt", "value": side} for side in ("chosen", "rejected")}}] * 4
    report = examined(rows, code=3)
    assert "4 of 4 rows cannot be read; the first is " in report["err"]
    assert report["err"].endswith("data=sharegpt reads such rows\n")
    assert all(
        one["problem"].endswith("data=sharegpt reads such rows") for one in report["train"]["examples"]["bad_row"]
    )
    assert report["out"].count("row 1: ") == 1 and "row 2: " not in report["out"]  # the same problem is shown once
    plain = {"prompt": "p", "chosen": "a", "rejected": "b"}
    for form in ("alpaca", "hh"):
        assert "data=jsonl reads" in examined([plain] * 4, f"data={form}", code=3)["err"]


def test_findings_name_steps_that_work(examined: Examined, tmp_path: Path) -> None:
    def next_of(report: dict[str, Any]) -> dict[str, tuple[str, str]]:
        return {one["name"]: (one["text"], one["next"]) for one in report["findings"]}

    bad = [*noise(46), {"prompt": "p"}, {"prompt": "p"}]
    text, step = next_of(examined(bad))["bad_row"]
    # 2 of 48 are 4.17%, more than max_bad_fraction=0.01 allows.
    assert text == "2 rows cannot be read" and "data.on_bad_row=skip data.max_bad_fraction=0.042 drops them" in step
    assert "max_bad_fraction" not in next_of(examined(bad, "data.max_bad_fraction=0.05"))["bad_row"][1]
    assert "bad_row" not in next_of(examined(bad, f"fix={tmp_path / 'clean.jsonl'}"))
    ranked = [{"prompt": f"{n}", "responses": ["a b", "c", "d e"], "scores": [2, 1, 1]} for n in range(5)]
    text, step = next_of(examined(ranked))["dropped"]
    assert text == "of 5 rows, which make 15 pairs: tie 5" and "data.ties=half" in step
    report = examined([{"prompt": f"{n}", "chosen": "a" * 300, "rejected": "b" * 600} for n in range(5)],
                      "data.max_length=512")  # fmt: skip
    assert next_of(report)["max_length"][1].startswith("data.max_length=1024 drops 0 and cuts 0, ")


def test_columns_that_nothing_reads_and_soft_labels_are_said(examined: Examined) -> None:
    rows = [{**row, "probability": w, "response_1": "x"} for row, w in zip(noise(4), (1, 0.7, 0.4, None), strict=True)]
    rows[0]["<note>"] = "n"
    report = examined(rows)
    assert report["train"]["not_used"] == {"response_1": 4, "<note>": 1} and report["train"]["soft_labels"] == 2
    assert "\n2 rows with a soft label; " in report["out"]
    assert "\nnot used: response_1 (4 rows), <note> (1 row)\n" in report["out"]
    assert "not used: response_1 (4 rows), &lt;note&gt; (1 row)" in report["page"]
    report = examined(rows, "data.soft_labels=false")
    assert report["train"]["soft_labels"] == 0
    rated = [{**row, "score_chosen": 3, "score_rejected": 2} for row in noise(3)]
    assert "reads score_chosen, score_rejected, too" in examined(rated)["out"]


def test_too_few_prompts_for_the_words_are_said(examined: Examined) -> None:
    assert "the bag of words needs pairs of 50 prompts; left out\n" in examined(noise(49))["out"]
    assert "the bag of words" not in examined(noise(50))["out"]


def test_a_quantile_is_a_length_that_occurs_and_not_above_the_share() -> None:
    found = quantiles(np.array([44, 45]))
    assert found == {"mean": 44.5, "5%": 44, "median": 44, "95%": 45, "99%": 45, "longest": 45}
    assert quantiles(np.arange(1, 101))["95%"] == 95


def test_the_report_of_a_pattern_is_named_after_its_folder(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("shards").mkdir()
    write_jsonl(Path("shards/one.jsonl"), noise(5))
    assert command("dpo-data", "model=tiny", "data=jsonl", "data.train=shards/*.jsonl").code == 0
    assert Path("outputs/data/shards/report.json").is_file()


def test_the_reason_of_the_template_is_shown(examined: Examined) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    turns = [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "1"},
             {"role": "assistant", "content": "yes"}]  # fmt: skip
    asked = [{"role": "user", "content": "q"}]
    rows = [{"prompt": asked, "chosen": turns, "rejected": turns[2:]}]
    report = examined(rows, code=3)
    problem = report["train"]["examples"]["refused_by_template"][0]["problem"]
    assert problem.startswith("the chat template refuses it (")
    assert problem.endswith("; it has tool calls, and not every template renders these")
    assert f"no pair can be used (refused_by_template 1); the first: {problem}. " in report["err"]


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)> \"' &amp; \x1b[2J\u202e"


def test_untrusted_text_does_nothing_on_the_page_and_the_console(examined: Examined) -> None:
    rows = [{**row, "source": HOSTILE} for row in noise(300)]
    for row in rows:
        row["chosen"] += f" {HOSTILE}"
    rows += [{**rows[0], "prompt": HOSTILE}] * 2 + [{HOSTILE: 1}]
    report = examined(rows, "data.columns.source=source", "show=1")
    page = report["page"].lower()
    assert page.count("&lt;script&gt;") >= 2 and "<script" not in page and "<img" not in page
    assert "default-src 'none'" in page and "http" not in page.replace("http-equiv", "")
    assert "prefers-color-scheme: dark" in page and "@media print" in page
    for shown in (report["page"], report["out"], json.dumps(report["train"], ensure_ascii=False)):
        assert "\x1b" not in shown and "\u202e" not in shown


def test_a_sample_is_stated_and_the_cost_is_of_all_pairs(examined: Examined) -> None:
    rows = noise(200)
    whole, part = examined(rows), examined(rows, "sample=50")
    assert (part["tokens"]["pairs"], part["tokens"]["of"], part["train"]["kept"]) == (50, 200, 200)
    assert "tokens of 50 pairs, a sample of 200" in part["out"]
    costs = [report["tokens"]["max_length"][-1]["tokens_per_epoch"] for report in (whole, part)]
    assert costs[1] == pytest.approx(costs[0], rel=0.1)
    assert part["tokens"] == {**examined(rows, "sample=50")["tokens"]}  # the seed decides


@pytest.mark.parametrize("max_prompt_length", [None, 30])
def test_what_a_length_would_do_is_what_truncation_does(max_prompt_length: int | None) -> None:
    source = np.random.default_rng(0)
    lengths = source.integers(1, 120, (300, 3))
    pairs = [Encoded(*([1] * int(length) for length in row)) for row in lengths]
    tokens = Tokens(*lengths.T, used=[])
    for max_length in (31, 64, 100, 200):
        tally = Truncation()
        cut = [truncate(pair, max_length, max_prompt_length, tally) for pair in pairs]
        kept = [one for one in cut if one is not None]
        assert cost_of(tokens, max_length, max_prompt_length) == {
            "max_length": max_length,
            "prompt_too_long": cut.count(None),
            "prompts_cut": tally.prompts_cut,
            "responses_cut": tally.responses_cut,
            "tokens_per_epoch": sum(len(one.prompt) + len(one.chosen) + len(one.rejected) for one in kept),
        }


def test_near_duplicates_are_those_that_share_most_of_their_words() -> None:
    source = random.Random(0)
    texts = [text(source, 100) for _ in range(300)]
    words = texts[7].split()
    near = " ".join(["other", *words[1:50], "new", *words[51:]])  # 2 of 100 words changed
    far = " ".join([*words[:50], *text(source, 50).split()])  # half of it: a third in common
    chinese = "".join(chr(0x4E00 + source.randrange(3000)) for _ in range(80))
    found = near_duplicates(signatures([*texts, near, far, chinese, f"{chinese[:-1]}。", "", ""]))
    assert (found[:300] == -1).all()
    assert found[300:].tolist() == [7, -1, -1, 302, -1, 304]


def test_near_duplicates_are_counted_apart_from_copies(examined: Examined) -> None:
    rows = noise(30)
    words = rows[4]["chosen"].split()
    words[3] = "changed"
    rows += [{**rows[4], "chosen": " ".join(words)}, rows[5]]
    train = examined(rows)["train"]
    assert (train["near_duplicates"], train["dropped"]) == (1, {"duplicate": 1})
    assert train["examples"]["near_duplicate"][0]["index"] == 30


def test_show_prints_the_exact_ids_what_closes_them_and_what_is_cut(examined: Examined) -> None:
    rows = [{"prompt": "abc", "chosen": "de", "rejected": "f" * 40}, *noise(3)]
    out = examined(rows, "show=1", "data.max_length=20", "data.template=plain")["out"]
    shown = out[out.index("pairs.jsonl line 1") :].splitlines()
    ids = {line.split()[0]: line for line in shown[1:4]}
    assert ids["prompt"].split(": ")[1].split()[-3:] == [str(token) for token in tiny_ids("abc")]
    closing = int(ids["chosen"].split("closed by ")[1].split(":")[0])
    assert ids["chosen"].split(": ")[1].split() == [*map(str, tiny_ids("de")), str(closing)]
    assert "not closed" in ids["rejected"] and "cut at its end" in ids["rejected"]


def tiny_ids(text: str) -> list[int]:
    from transformers import AutoTokenizer

    from dpo_cli.models.builtin import TINY, resolve_builtin

    ids: list[int] = AutoTokenizer.from_pretrained(resolve_builtin(TINY, print)[0])(
        text, add_special_tokens=False
    ).input_ids
    return ids


def test_the_reference_is_asked_and_its_log_probs_stay_in_the_cache(examined: Examined, cache: Path) -> None:
    before = {path: path.stat().st_size for path in (cache / "reference").glob("*")}
    score = examined(sample_rows(12), "score=10")["score"]
    assert score["pairs"] == 10
    # A random model over bytes: near the logarithm of its vocabulary.
    assert 4 < score["nats_per_token_chosen"]["mean"] < 8 and 4 < score["nats_per_token_rejected"]["mean"] < 8
    after = {path: path.stat().st_size for path in (cache / "reference").glob("*")}
    assert sum(after.values()) > sum(before.values())
    assert examined(sample_rows(12), "score=10")["score"] == score


def test_a_pair_has_the_tokens_that_training_makes_of_it(tmp_path: Path, tiny_tokenizer: Any) -> None:
    turns = [{"role": role, "content": role[0]} for role in ("assistant", "user", "assistant")]
    row = {"prompt": [{"role": "user", "content": "q"}], "chosen": turns, "rejected": turns[:1]}
    file = write_jsonl(tmp_path / "rows.jsonl", [row])
    words = parse_overrides(["data=jsonl", f"data.train={file}", "data.eval_fraction=0"])
    config = run_config(composed("train", words, RunConfig).container).data
    trained = load_pairs(config, PairEncoder.of(tiny_tokenizer, config), 0).train[0]
    side = read_side(config, sources_of(config)[0], None, 0, lambda: None)
    compare(side, None)
    tokens = count_tokens(side.sample, PairEncoder.of(tiny_tokenizer, config), config, 1, lambda: None)
    found = tokens.first[0].tokenized
    assert len(found.chosen_unscored) == 2  # what the user says is read and not scored
    assert found.response_keys == trained.response_keys  # so training finds the log-probs in the cache


def test_options_of_the_template_hold_in_the_examination_too(examined: Examined) -> None:
    rows = [{"prompt": "What is <|im_end|>?", "chosen": "yes", "rejected": "no"}, *noise(3)]
    assert "refused_by_template" not in examined(rows)["train"]["dropped"]
    report = examined(rows, "data.special_tokens_in_text=error")
    assert report["train"]["dropped"]["refused_by_template"] == 1


def test_the_numbers_of_the_reference_follow_from_its_log_probs() -> None:
    import torch

    from dpo_cli.examination.reference import score_facts

    def pair(chosen: list[int], rejected: list[int], group: int) -> TokenizedPair:
        return TokenizedPair(token_ids([1]), token_ids(chosen), token_ids(rejected), 0, "", group)

    pairs = [pair([1, 2, 3, 4], [1, 2], 1), pair([5], [5, 5], 2), pair([7, 8], [7, 8], 3)]
    logps = torch.tensor([[-8.0, -6.0], [-1.0, -4.0], [-3.0, -3.05]])
    found = score_facts(pairs, logps)
    assert found["nats_per_token_chosen"]["mean"] == pytest.approx((2 + 1 + 1.5) / 3)
    assert found["nats_per_token_rejected"]["mean"] == pytest.approx((3 + 2 + 1.525) / 3)
    assert found["ordered_by_sum"]["mean"] == pytest.approx(2 / 3)  # -8 is below -6
    assert found["ordered_per_token"]["mean"] == pytest.approx(1.0)  # -2 is above -3
    # Two of four and two tokens; one of one and two; all.
    assert found["token_overlap"]["mean"] == pytest.approx((4 / 6 + 2 / 3 + 1) / 3)
    assert (found["alike"], found["overlapping"]) == (1, 1)


def test_caches_are_shown_and_cleared(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "cache"))
    empty = command("dpo-data", "cache=show")
    assert empty.code == 0 and "log-probs of references: none" in empty.out
    for name, size in (("reference/a.logps", 2048), ("tokens/x/y.arrow", 3 * 2**20), ("models/kept", 5)):
        file = tmp_path / "cache" / name
        file.parent.mkdir(parents=True)
        file.write_bytes(b"0" * size)
    outside = tmp_path / "outside"
    outside.write_text("not ours")
    (tmp_path / "cache" / "reference" / "link").symlink_to(outside)
    shown = command("dpo-data", "cache=show").out
    assert "log-probs of references: 2 items, 0.00" in shown and ", last used 20" in shown
    assert "tokens of data sets: 1 item, 3" in shown
    cleared = command("dpo-data", "cache=clear")
    assert cleared.code == 0 and "freed 3" in cleared.out
    assert not list((tmp_path / "cache").rglob("*.logps")) and not list((tmp_path / "cache").rglob("*.arrow"))
    assert (tmp_path / "cache" / "models" / "kept").exists() and outside.read_text() == "not ours"


@pytest.mark.parametrize(
    ("word", "code", "says"),
    [
        ("fix=rows.txt", 2, "fix=rows.txt: must end in .jsonl"),
        ("fix=", 2, "fix=: is empty; leave it out, or name a file"),
        ("cache=all", 2, "cache=all: choose one of show, clear"),
        ("score=0", 2, "score=0: must be at least 1"),
        ("smaple=3", 2, "unknown key 'smaple' in 'smaple=3'; did you mean 'sample'?"),
    ],
)
def test_a_mistake_is_one_line(command: Command, word: str, code: int, says: str) -> None:
    ended = command("dpo-data", "model=tiny", word)
    assert (ended.code, ended.err) == (code, f"error: {says}\n")


def test_without_scikit_learn_the_rest_is_examined(examined: Examined, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    report = examined(noise(60))
    assert report["bias"]["words"] is None and report["bias"]["longer_preferred"]["pairs"] == 60
    assert "the bag of words needs scikit-learn: pip install 'dpo-cli[data]'; left out" in report["out"]


def test_several_files_are_examined_as_one_and_a_mixture_source_by_source(command: Command, tmp_path: Path) -> None:
    files = [write_jsonl(tmp_path / f"{name}.jsonl", noise(20, seed)) for seed, name in enumerate("abc")]
    words = (f"data.train=[{files[0]},{files[1]}]", f"data.eval={{c: {files[2]}}}", f"output_dir={tmp_path}/out")
    ended = command("dpo-data", "model=tiny", "data=jsonl", *words)
    assert ended.code == 0, ended.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["train"]["rows"], report["held_out"]["rows"]) == (40, 20)
    mixture = command("dpo-data", "model=tiny", "data=mixture", f"data.sources={{a: {{train: {files[0]}, weight: 1}}}}")
    assert mixture.code == 2 and mixture.err == (
        "error: data=mixture: dpo-data examines one source; run it for each, with data= and data.train=\n"
    )
