"""dpo-compare: paired differences that hold, a verdict in words, and what does not compare refused by name."""

import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import Ended, records, sample_rows, tiny_words, write_jsonl
from numpy.typing import NDArray

from dpo_cli.commands.compare import labels
from dpo_cli.evaluation.comparison import compare, round_up, sentences
from dpo_cli.evaluation.evaluated import read_report
from dpo_cli.theory.paired import holm, mcnemar, paired_difference, prompts_needed
from dpo_cli.theory.statistics import Clusters

Command = Callable[..., Ended]
Trained = Callable[..., Path]
BETA = 0.1


def softplus(value: float) -> float:
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))


def pair(place: int, prompt: int, margin: float) -> dict[str, Any]:
    """A line of pairs.jsonl with that margin."""
    return {
        "index": place,
        "key": hashlib.sha256(f"pair {place}".encode()).hexdigest(),
        "prompt": f"{prompt:016x}",
        "reference_logps_chosen": -20.0 - place % 7,
        "reference_logps_rejected": -30.0 - place % 5,
        "margin": margin,
        "loss": softplus(-margin),
        "prompt_tokens": 9,
        "chosen_tokens": 8 + place % 3,
        "rejected_tokens": 11,
    }


def write_report(folder: Path, lines: Sequence[dict[str, Any]], **facts: Any) -> Path:
    folder.mkdir(parents=True)
    write_jsonl(folder / "pairs.jsonl", list(lines))
    report = {"checkpoint": f"/runs/{folder.name}/final", "reference": "sft", "beta": BETA, "loss_name": "sigmoid",
              "loss_options": {}, "pairs": len(lines)}  # fmt: skip
    (folder / "report.json").write_text(json.dumps({**report, **facts}))
    return folder


def report_of(folder: Path, margins: Sequence[float], prompts: Sequence[int] | None = None, **facts: Any) -> Path:
    """A report on pairs with these margins, each pair with a prompt of its own unless `prompts` says."""
    of_prompts = range(len(margins)) if prompts is None else prompts
    lines = [
        pair(place, prompt, margin) for place, (prompt, margin) in enumerate(zip(of_prompts, margins, strict=True))
    ]
    return write_report(folder, lines, **facts)


def compared(command: Command, out: Path, *words: object) -> tuple[dict[str, Any], Ended]:
    ended = command("dpo-compare", *words, f"output_dir={out}", "name=it")
    assert ended.code == 0, ended.err
    found: dict[str, Any] = json.loads((out / "it" / "report.json").read_text())
    return found, ended


def clustered(seed: int, prompts: int = 60) -> tuple[NDArray[np.int64], list[NDArray[np.float64]]]:
    """Margins of two models on pairs of which some share a prompt; the second is right more often."""
    random = np.random.default_rng(seed)
    of_pairs = np.repeat(np.arange(prompts), random.integers(1, 9, prompts))
    hard = random.normal(0.2, 1, len(of_pairs))
    moved = random.normal(0.6, 0.8, prompts)[of_pairs]
    return of_pairs, [hard, hard + moved + random.normal(0, 0.3, len(of_pairs))]


# The mathematics


def test_mcnemar_is_the_binomial_test_by_hand() -> None:
    # 1 lost of 8: 2 (1 + 8) / 256; 3 of 10: 2 (1 + 10 + 45 + 120) / 1024; 5 of 10 is more than half
    assert mcnemar(7, 1) == mcnemar(1, 7) == 18 / 256
    assert mcnemar(3, 7) == 352 / 1024
    assert mcnemar(5, 5) == mcnemar(0, 0) == 1.0
    assert 0 < mcnemar(900, 100) < 1e-100 and mcnemar(5050, 4950) == pytest.approx(0.3222, abs=1e-3)


def test_shares_that_are_all_alike_still_have_an_interval() -> None:
    # None of 20 prompts: Wilson's interval of 0 of 20 with t(19) = 2.093 ends at t^2 / (20 + t^2)
    found = paired_difference(Clusters(range(20)), [0.0] * 20, share=True)
    assert (found.estimate.mean, found.p, found.prompts_needed) == (0.0, 1.0, math.inf)
    assert -found.estimate.low == found.estimate.high == pytest.approx(2.0930**2 / (20 + 2.0930**2), abs=1e-4)


def test_holm_by_hand() -> None:
    # sorted 0.01, 0.03, 0.04: 3 * 0.01, 2 * 0.03, max(0.06, 0.04)
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == [] and holm([0.02]) == [0.02]


def test_a_prompt_is_one_vote_and_a_tied_one_is_dropped() -> None:
    # Prompts: {+1, +1, -1} won, {+1, -1} tied, {+1} won, {-1} lost.
    prompts = Clusters([1, 1, 1, 2, 2, 3, 4])
    found = paired_difference(prompts, [1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    assert found.p == mcnemar(2, 1) == 1.0
    assert found.estimate.mean == pytest.approx(1 / 7)
    assert (found.estimate.low, found.estimate.high) == pytest.approx(
        (prompts.mean([1, 1, -1, 1, -1, 1, -1]).low, prompts.mean([1, 1, -1, 1, -1, 1, -1]).high)
    )


def test_prompts_needed_give_a_test_its_power() -> None:
    # One prompt has variance 100 * 0.1^2 = 1: (1.96 + 0.8416)^2 / 0.5^2 = 31.4 prompts.
    assert prompts_needed(0.5, 0.1, 100) == pytest.approx(31.396, abs=1e-3)
    assert prompts_needed(0.0, 0.1, 100) == math.inf
    random = np.random.default_rng(0)
    found = 0
    for _ in range(400):
        values = random.normal(0.5, 1, 31)
        found += abs(values.mean()) > 1.96 / math.sqrt(31)
    assert found / 400 == pytest.approx(0.8, abs=0.05)


def test_the_paired_interval_holds_the_truth_where_one_over_pairs_does_not() -> None:
    """By simulation: of 600 evaluations with six pairs a prompt, the interval over prompts holds it in about 95%."""
    random = np.random.default_rng(1)
    truth, holds = 0.3, np.zeros(2)
    of_pairs = np.repeat(np.arange(40), 6)
    kinds = Clusters(of_pairs.tolist()), Clusters(range(len(of_pairs)))
    for _ in range(600):
        differences = random.normal(truth, 1, 40)[of_pairs] + random.normal(0, 0.5, len(of_pairs))
        estimates = [paired_difference(kind, differences).estimate for kind in kinds]
        holds += [one.low <= truth <= one.high for one in estimates]
    over_prompts, over_pairs = holds / 600
    assert 0.93 <= over_prompts <= 0.97
    assert over_pairs < 0.75


# The numbers of a comparison


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    prompts, (first, second) = clustered(3)
    return (
        report_of(tmp_path / "a", first.tolist(), prompts.tolist()),
        report_of(tmp_path / "b", second.tolist(), prompts.tolist()),
    )


def columns(folder: Path) -> tuple[list[str], NDArray[np.float64]]:
    """The prompts in pairs.jsonl, and accuracy, margin and loss of each pair, (pairs, 3)."""
    lines = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    return [line["prompt"] for line in lines], np.array(
        [[float(line["margin"] > 0), line["margin"], softplus(-line["margin"])] for line in lines]
    )


def test_the_intervals_follow_from_pairs_jsonl_alone(command: Command, tmp_path: Path, two: tuple[Path, Path]) -> None:
    """A bootstrap over prompts, written without the program's own code, gives the same differences and intervals."""
    found, _ = compared(command, tmp_path / "out", *two)
    prompts, before = columns(two[0])
    _, after = columns(two[1])
    names = sorted(set(prompts))
    sums = np.zeros((len(names), 4))  # of each prompt: differences of the three metrics, and its pairs
    for prompt, row in zip(prompts, after - before, strict=True):
        sums[names.index(prompt)] += [*row, 1]
    drawn = np.random.default_rng(0).integers(0, len(names), (10_000, len(names)))
    totals = sums[drawn].sum(axis=1)
    low, high = np.quantile(totals[:, :3] / totals[:, 3:], [0.025, 0.975], axis=0)
    for place, metric in enumerate(("accuracy", "margin", "loss")):
        told = found["models"][1]["difference"][metric]
        assert told["mean"] == pytest.approx((after - before)[:, place].mean(), abs=1e-9)
        width = high[place] - low[place]
        assert abs(told["low"] - low[place]) < 0.07 * width and abs(told["high"] - high[place]) < 0.07 * width
    won, lost = int((sums[:, 0] > 0).sum()), int((sums[:, 0] < 0).sum())
    tail = sum(math.comb(won + lost, k) for k in range(min(won, lost) + 1)) / 2 ** (won + lost)
    assert found["models"][1]["difference"]["accuracy"]["p"] == pytest.approx(2 * tail)
    # An interval over pairs would be much narrower.
    narrow = 2 * 1.96 * (after - before)[:, 1].std() / math.sqrt(len(prompts))
    margin = found["models"][1]["difference"]["margin"]
    assert margin["high"] - margin["low"] > 1.5 * narrow


def test_the_second_less_the_first_and_better_is_the_one_that_ranks_more_pairs_right(
    command: Command, tmp_path: Path, two: tuple[Path, Path]
) -> None:
    found, ended = compared(command, tmp_path / "out", *two)
    first, second = found["models"]
    assert (found["kind"], first["name"], second["name"], found["best"]) == ("comparison", "a", "b", None)
    assert first["difference"] is None and first["verdict"] == "first"
    for place, metric in enumerate(("accuracy", "margin", "loss")):
        means = [one["metrics"][metric][0] for one in (first, second)]
        assert means == pytest.approx([columns(folder)[1][:, place].mean() for folder in two])
        assert second["difference"][metric]["mean"] == pytest.approx(means[1] - means[0])
    assert second["difference"]["accuracy"]["mean"] > 0 > second["difference"]["loss"]["mean"]
    assert (second["verdict"], second["words"], second["pairs_needed"]) == ("better", "better", None)
    assert "b against a: accuracy +0." in ended.out and ended.out.count("better\n") == 2
    swapped, _ = compared(command, tmp_path / "swapped", two[1], two[0])
    assert swapped["models"][1]["verdict"] == "worse"
    for metric in ("accuracy", "margin", "loss"):
        there, back = (one["models"][1]["difference"][metric] for one in (found, swapped))
        assert [back["mean"], back["low"], back["high"]] == pytest.approx(
            [-there["mean"], -there["high"], -there["low"]]
        )
        assert back["p"] == there["p"]
    assert (found["prompts"], found["pairs"]) == (60, len(columns(two[0])[0]))


def test_a_difference_that_is_not_found_says_how_many_more_pairs_it_takes(command: Command, tmp_path: Path) -> None:
    # Of 400 pairs, one a prompt, 12 are won and 8 lost: mean 0.01, variance of a pair 0.05 - 0.0001.
    margins = [1.0] * 8 + [-1.0] * 12 + [1.0] * 380
    others = [-1.0] * 8 + [1.0] * 12 + [1.0] * 380
    found, ended = compared(
        command, tmp_path / "out", report_of(tmp_path / "a", margins), report_of(tmp_path / "b", others)
    )
    one = found["models"][1]
    assert one["difference"]["accuracy"]["p"] == pytest.approx(mcnemar(12, 8))
    needed = (1.959964 + 0.841621) ** 2 * (0.05 - 0.0001) * 400 / 399 / 0.01**2 - 400
    assert one["pairs_needed"] == math.ceil(needed)
    assert one["verdict"] == "not told apart"
    assert one["words"] == "not told apart: some 3,600 more held-out pairs would be needed"
    assert "; not told apart: some 3,600 more held-out pairs would be needed\n" in ended.out
    # The same with every pair four times, under its prompt: the prompts do not change, and pairs are four to one.
    prompts = [place for place in range(400) for _ in range(4)]
    fourfold = [
        report_of(tmp_path / name, np.repeat(values, 4).tolist(), prompts)
        for name, values in (("c", margins), ("d", others))
    ]
    found, _ = compared(command, tmp_path / "out4", *fourfold)
    assert found["models"][1]["pairs_needed"] == pytest.approx(4 * needed, rel=1e-3)
    assert found["models"][1]["difference"]["accuracy"]["p"] == pytest.approx(mcnemar(12, 8))


@pytest.mark.parametrize(("won", "says"), [
    (0, "not told apart: no number of held-out pairs would do, the difference is 0"),
    (1, "not told apart: more than a million more held-out pairs would be needed"),
])  # fmt: skip
def test_a_difference_of_nearly_nothing_is_called_so(command: Command, tmp_path: Path, won: int, says: str) -> None:
    margins = [1.0, -1.0] * 500
    others = [-1.0, 1.0] * (500 - won) + [1.0, 1.0] * won
    words = report_of(tmp_path / "a", margins), report_of(tmp_path / "b", others)
    assert compared(command, tmp_path / "out", *words)[0]["models"][1]["words"] == says


def test_two_digits_rounded_up() -> None:
    assert [round_up(number) for number in (1, 12, 121, 1812, 99_001)] == [1, 12, 130, 1900, 100_000]


def test_p_values_of_several_models_are_holms(command: Command, tmp_path: Path) -> None:
    margins = [-1.0] * 40 + [1.0] * 60
    won = [report_of(tmp_path / f"m{won}", [1.0] * won + [-1.0] * (40 - won) + [1.0] * 60) for won in (6, 5)]
    first = report_of(tmp_path / "first", margins)
    found, ended = compared(command, tmp_path / "out", first, *won)
    raw = [mcnemar(6, 0), mcnemar(5, 0)]  # 0.031, 0.0625
    p_values = [one["difference"]["accuracy"]["p"] for one in found["models"][1:]]
    assert p_values == pytest.approx([2 * raw[0], max(2 * raw[0], raw[1])])
    assert [one["verdict"] for one in found["models"][1:]] == ["not told apart"] * 2
    assert "exact McNemar test on prompts; p values are Holm's, for several models\n" in ended.out
    alone, ended = compared(command, tmp_path / "alone", first, won[0])
    assert alone["models"][1]["difference"]["accuracy"]["p"] == pytest.approx(raw[0])
    assert alone["models"][1]["verdict"] == "better" and "Holm" not in ended.out


def test_a_soft_label_and_a_tie_count_as_in_an_evaluation(command: Command, tmp_path: Path) -> None:
    lines = [{**pair(place, place, 0.5), "probability": 0.75} for place in range(4)] + [pair(9, 9, 0.0)]
    other = [{**line, "margin": -0.5} for line in lines]
    found, _ = compared(
        command, tmp_path / "out", write_report(tmp_path / "a", lines), write_report(tmp_path / "b", other)
    )
    first, second = (one["metrics"]["accuracy"][0] for one in found["models"])
    assert (first, second) == pytest.approx((3.5 / 5, (4 * 0.25 + 0) / 5))


# What is shared


def test_only_shared_pairs_count_and_the_others_are_told(command: Command, tmp_path: Path) -> None:
    lines = [pair(place, place, 0.1 * place - 1) for place in range(30)]
    mixed = lines[25:] + lines[10:20]  # in another order
    found, ended = compared(
        command, tmp_path / "out", write_report(tmp_path / "a", lines), write_report(tmp_path / "b", mixed)
    )
    assert found["pairs"] == 15
    assert found["models"][0]["metrics"] == found["models"][1]["metrics"]
    assert found["models"][1]["difference"]["margin"]["mean"] == 0
    assert "note: compared on the 15 pairs that all share; left out 15 of a\n" in ended.out
    assert found["warnings"][0] == "compared on the 15 pairs that all share; left out 15 of a"


def test_a_pair_that_is_there_twice_is_joined_twice(command: Command, tmp_path: Path) -> None:
    lines = [pair(place, place, 0.5) for place in (0, 1, 1, 2)]
    lines[2] = {**lines[2], "margin": -0.5}
    found, _ = compared(
        command, tmp_path / "out", write_report(tmp_path / "a", lines), write_report(tmp_path / "b", lines)
    )
    assert found["pairs"] == 4 and found["models"][1]["difference"]["margin"]["mean"] == 0


# What does not compare


def test_margins_of_different_beta_are_divided_by_it_and_losses_are_left_out(command: Command, tmp_path: Path) -> None:
    prompts, (first, second) = clustered(5)
    a = report_of(tmp_path / "a", (0.1 * first).tolist(), prompts.tolist())
    b = report_of(tmp_path / "b", (0.5 * second).tolist(), prompts.tolist(), beta=0.5)
    found, ended = compared(command, tmp_path / "out", a, b)
    one = found["models"][1]
    assert found["margin"] == "margin/beta" and "margin/beta" in ended.out
    assert one["difference"]["margin"]["mean"] == pytest.approx((second - first).mean())
    assert one["metrics"]["margin"][0] == pytest.approx(second.mean())
    assert one["difference"]["loss"] is None and one["difference"]["accuracy"]["mean"] > 0
    assert "note: the loss of b is not compared: a has another loss or beta\n" in ended.out
    assert "note: margins are divided by beta, in nats: those of different beta do not compare\n" in ended.out


@pytest.mark.parametrize("facts", [{"loss_name": "ipo"}, {"loss_options": {"label_smoothing": 0.2}}])
def test_losses_of_different_functions_are_not_compared(
    command: Command, tmp_path: Path, facts: dict[str, Any]
) -> None:
    a, b = report_of(tmp_path / "a", [0.5, 0.2, 0.1]), report_of(tmp_path / "b", [0.5, 0.3, 0.1], **facts)
    found, _ = compared(command, tmp_path / "out", a, b)
    assert found["models"][1]["difference"]["loss"] is None and found["margin"] == "margin"
    assert found["models"][1]["difference"]["margin"]["mean"] == pytest.approx(0.1 / 3)


def test_a_report_without_losses_says_to_evaluate_again(command: Command, tmp_path: Path) -> None:
    lines = [pair(place, place, 0.3) for place in range(3)]
    bare = [{name: value for name, value in line.items() if name != "loss"} for line in lines]
    found, _ = compared(
        command, tmp_path / "out", write_report(tmp_path / "a", lines), write_report(tmp_path / "b", bare)
    )
    says = "the loss of b is not compared: pairs.jsonl of b has not every loss; evaluate it again"
    assert says in found["warnings"] and found["models"][1]["metrics"]["loss"] is None
    # A report of an earlier version has no loss_options either: whether its loss is another one is not known.
    c = write_report(tmp_path / "c", lines, loss_options={"label_smoothing": 0.2})
    found, _ = compared(command, tmp_path / "out2", tmp_path / "b", c)
    assert says.replace("loss of b", "loss of c") in found["warnings"]


def refused(command: Command, *words: object) -> tuple[int, str]:
    ended = command("dpo-compare", *words)
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1, ended.err
    return ended.code, ended.err.removeprefix("error: ").removesuffix("\n")


REFUSED = """
a other-data | 3 | a, other-data: were evaluated on other data and share no pair; name their runs and the pairs to score them on, for instance data=jsonl data.eval=pairs.jsonl
a other-tokens | 3 | a, other-tokens: the same texts with other labels or tokens; evaluate both with one template, tokenizer and data.max_length
a other-reference | 4 | other-reference: its reference is not that of a: their log-probs differ by 3.7% (sft-2 and sft); rewards compare only with one reference
a reward | 4 | reward: is a reward model and a is not; compare one kind
one-prompt a | 3 | one-prompt, a: share pairs of one prompt only; score all of them on more with data.eval=
a null | 3 | HERE/null/pairs.jsonl line 4: the margin is not finite, so nothing can be compared: the weights are damaged, or their dtype is too narrow
a cut | 3 | HERE/cut/pairs.jsonl line 6: is not a line of pairs.jsonl; evaluate again
a short | 3 | HERE/short/pairs.jsonl: has 4 lines, and report.json counts 6 pairs
a alone | 4 | HERE/alone/pairs.jsonl: cannot be read (No such file or directory); a report has it beside it
a no-report | 4 | HERE/no-report/report.json: is not a report of this version of dpo-eval; evaluate again
a text.json | 4 | HERE/text.json: is not a report of this version of dpo-eval; evaluate again
a a/report.json | 2 | a/report.json: is given twice (as a); name each model once
a | 2 | a: is one model; name two or more, or the folder of a sweep
device=cpu | 2 | models=null: name two or more runs, checkpoints or reports, or the folder of a sweep: dpo-compare outputs/a outputs/b
a nowhere | 4 | models=nowhere: no such directory; name a run directory, checkpoints/step-*, final/, a PEFT adapter directory or a model
a reward data.eval=x.jsonl | 2 | a: is a report, which has its pairs; to score it on others, name its run or checkpoint
a b batch=3 | 2 | unknown key 'batch' in 'batch=3'
a b -m | 2 | '-m': no such flag; values are given as key=value, see dpo-compare --help
"""  # noqa: E501


def test_what_cannot_be_compared_is_refused_by_name(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [pair(place, place, 0.3) for place in range(6)]
    write_report(Path("a"), lines)
    write_report(Path("other-data"), [pair(place, place, 0.3) for place in range(100, 106)])
    write_report(Path("other-tokens"), [{**line, "prompt_tokens": 3} for line in lines])
    other = [{**line, "reference_logps_chosen": line["reference_logps_chosen"] - 2} for line in lines]
    write_report(Path("other-reference"), other, reference="sft-2")
    rewards = [{name: value for name, value in line.items() if "logps" not in name} for line in lines]
    write_report(Path("reward"), rewards, reference=None, beta=1.0)
    write_report(Path("one-prompt"), [{**line, "prompt": "1"} for line in lines])
    write_report(Path("null"), [*lines[:3], {**lines[3], "margin": None}, *lines[4:]])
    write_report(Path("cut"), lines)
    Path("cut/pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines)[:-40])
    write_report(Path("short"), lines[:4], pairs=6)
    write_report(Path("alone"), lines)
    Path("alone/pairs.jsonl").unlink()
    Path("no-report").mkdir()
    Path("no-report/report.json").write_text('{"pairs": 6}')
    Path("text.json").write_text("hello")
    for line in REFUSED.strip().splitlines():
        words, code, says = line.split(" | ")
        assert refused(command, *words.split()) == (int(code), says.replace("HERE", str(tmp_path))), words
    assert not Path("outputs").exists()


@pytest.mark.parametrize("value", ["NaN", "1e300", '"x"', "[1]", "{}", "1e999", '"-1"', f'"{"f" * 40}"', "true" * 3])
@pytest.mark.parametrize("name", ["margin", "key", "prompt", "probability", "loss", "chosen_tokens"])
def test_no_damage_of_a_line_is_more_than_one_line_of_error(
    command: Command, tmp_path: Path, name: str, value: str
) -> None:
    lines = [pair(place, place, 0.3) for place in range(3)]
    a, b = write_report(tmp_path / "a", lines), write_report(tmp_path / "b", lines)
    texts = (b / "pairs.jsonl").read_text().splitlines()
    texts[1] = json.dumps({**lines[1], name: "HERE"}).replace('"HERE"', value)
    (b / "pairs.jsonl").write_text("\n".join(texts) + "\n")
    ended = command("dpo-compare", a, b, f"output_dir={tmp_path / 'out'}")
    assert ended.code in (0, 3) and ended.err.count("\n") == (ended.code > 0)
    assert ended.code == 0 or "b/pairs.jsonl line 2: " in ended.err or "of a" in ended.err, ended.err


@pytest.mark.parametrize("facts", [
    {"beta": 0}, {"beta": "0.1"}, {"beta": True}, {"loss_name": None}, {"reference": 3}, {"intervals95": []},
    {"intervals95": {"samples/kl": 3}}, {"data": "x"}, {"pairs": "3"}, {"checkpoint": None}, {"beta": 10**400},
    {"beta": 1e-320},
])  # fmt: skip
def test_a_report_json_of_another_form_is_refused(command: Command, tmp_path: Path, facts: dict[str, Any]) -> None:
    a, b = report_of(tmp_path / "a", [0.1] * 3), report_of(tmp_path / "b", [0.1] * 3, **facts)
    code, says = refused(command, a, b)
    assert code == 4 and says == f"{b}/report.json: is not a report of this version of dpo-eval; evaluate again"


def test_a_number_that_is_not_finite_in_a_report_is_null_in_the_comparison(command: Command, tmp_path: Path) -> None:
    facts: dict[str, Any] = {
        "samples/kl": 10**400,
        "samples/length_ratio": 1.5,
        "intervals95": {"samples/length_ratio": [None, "x"]},
    }
    a = report_of(tmp_path / "a", [0.1] * 3, **{**facts, "samples/kl": math.nan})
    b = report_of(tmp_path / "b", [0.1] * 3, **facts)
    found, _ = compared(command, tmp_path / "out", a, b)
    assert [found["models"][1]["metrics"][name] for name in ("kl", "length_ratio")] == [None, [1.5, None, None]]
    assert found["models"][0]["metrics"]["kl"] is None


def test_pairs_that_a_model_was_trained_on_are_told(command: Command, tmp_path: Path) -> None:
    a = report_of(tmp_path / "a", [0.1] * 3, data={"leaks": {"pairs": 0, "prompts": 0}})
    b = report_of(tmp_path / "b", [0.1] * 3, data={"leaks": {"pairs": 0, "prompts": 2}})
    found, _ = compared(command, tmp_path / "out", a, b)
    assert found["warnings"][0] == "b was trained on some of its pairs or prompts: data.eval_leaks=drop leaves them out"


def test_a_path_with_an_equals_sign_is_a_path_and_models_may_stand_under_their_key(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    report_of(Path("beta=0.1"), [0.1] * 3)
    report_of(Path("it's [b], c"), [0.2] * 3)
    found, _ = compared(command, tmp_path / "out", "beta=0.1", "it's [b], c")
    assert [one["name"] for one in found["models"]] == ["beta=0.1", "it's [b], c"]
    Path("run.yaml").write_text('models: ["beta=0.1", "it\'s [b], c"]\n')
    assert compared(command, tmp_path / "again", "--config", "run.yaml")[0] == found


def test_under_a_launcher_it_is_refused(
    command: Command, two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    code, says = refused(command, *two)
    assert (code, says) == (2, "dpo-compare is one process; under a launcher run dpo-eval, then compare its reports")


def test_a_reference_in_another_dtype_is_the_same_one(command: Command, tmp_path: Path) -> None:
    lines = [pair(place, place, 0.3) for place in range(6)]
    near = [{**line, "reference_logps_chosen": line["reference_logps_chosen"] * 1.001} for line in lines]
    words = write_report(tmp_path / "a", lines), write_report(tmp_path / "b", near, reference="moved/sft")
    assert command("dpo-compare", *words, f"output_dir={tmp_path / 'out'}").code == 0


def test_reports_are_compared_without_torch(tmp_path: Path, two: tuple[Path, Path]) -> None:
    code = """
import sys
for name in ("torch", "transformers", "peft", "datasets"):
    sys.modules[name] = None  # its import is an error
from dpo_cli.cli import compare
compare()
"""
    words = [sys.executable, "-c", code, *map(str, two), f"output_dir={tmp_path / 'out'}"]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


# Names and places


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["/x/outputs/a/final", "/x/outputs/b/final"], ["a", "b"]),
        (["/x/a/checkpoints/step-00000010", "/x/a/final"], ["step-00000010", "final"]),
        (["/x/a/final", "/x/b/checkpoints/step-00000010"], ["a/final", "b/step-00000010"]),
        (["/x/a/final", "/x/b/eval/held-out-final"], ["a", "b"]),
        (["/x/a", "/x/a/b"], ["a", "b"]),
        (["/x/m/beta-0.1/final", "/x/m/beta-0.3/final"], ["beta-0.1", "beta-0.3"]),
        (["/x/eval/a", "/x/a"], ["/x/eval/a", "/x/a"]),
    ],
)
def test_names_are_what_differs_in_the_paths(sources: list[str], names: list[str]) -> None:
    assert labels(sources) == names


def test_the_same_comparison_replaces_the_earlier_one_and_another_does_not(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for place in ("x", "y"):
        for name in ("a", "b"):
            report_of(Path(place, name), [0.1, 0.2, -0.3])
    for words in (("x/a", "x/b"), ("x/b", "x/a"), ("x/a", "x/b"), ("y/a", "y/b"), ("y/a", "y/b")):
        assert command("dpo-compare", *words).code == 0
    assert sorted(path.name for path in Path("outputs/compare").iterdir()) == ["a_vs_b", "a_vs_b_2", "b_vs_a"]
    page = Path("outputs/compare/a_vs_b/report.html").read_text()
    assert page.startswith("<!doctype html>") and "<script" not in page


def test_a_full_disk_leaves_no_empty_folder(
    command: Command, tmp_path: Path, two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dpo_cli.storage.report_files.write_together", full)
    code, says = refused(command, *two, f"output_dir={tmp_path / 'out'}")
    assert code == 7 and says.endswith("the comparison cannot be written (No space left on device)")
    assert [*(tmp_path / "out").iterdir()] == []


def test_a_comparison_is_not_written_through_a_link(command: Command, tmp_path: Path, two: tuple[Path, Path]) -> None:
    (tmp_path / "out" / "it").mkdir(parents=True)
    (tmp_path / "out" / "it" / "report.json").symlink_to(tmp_path / "elsewhere")
    ended = command("dpo-compare", *two, f"output_dir={tmp_path / 'out'}", "name=it")
    assert ended.code == 7 and "is a symbolic link, and is not written through" in ended.err
    assert not (tmp_path / "elsewhere").exists()


# Runs, checkpoints and adapters


def test_runs_are_scored_once_and_their_reports_are_used_while_the_weights_are_the_same(
    trained: Trained, command: Command, tmp_path: Path
) -> None:
    runs = [trained("a"), trained("b", "optimizer.lr=1e-2", "lora.r=4")]
    found, ended = compared(command, tmp_path / "out", *runs)
    assert ended.out.count("scoring ") == 2
    assert [one["name"] for one in found["models"]] == ["a", "b"]
    for run, one in zip(runs, found["models"], strict=True):
        assert one["source"] == str(run / "eval" / "held-out-final")
        assert one["checkpoint"] == str(run / "final")
        last = records(run)[-1]
        for metric, name in (("accuracy", "rewards/accuracies"), ("margin", "rewards/margins"), ("loss", "loss")):
            assert one["metrics"][metric][0] == pytest.approx(last[name], abs=1e-6)
    assert {row["key"]: row["values"] for row in found["config_differences"]} == {
        "optimizer.lr": ["0.001", "0.01"], "lora.r": ["16", "4"],
    }  # fmt: skip
    again, ended = compared(command, tmp_path / "again", *runs)
    assert ended.out.count("scored earlier") == 2 and "scoring" not in ended.out
    assert again == found
    (runs[1] / "final").rename(tmp_path / "old")  # other weights in the same place
    (runs[0] / "final").rename(runs[1] / "final")
    (tmp_path / "old").rename(runs[0] / "final")
    swapped, ended = compared(command, tmp_path / "swapped", *runs)
    assert ended.out.count("scoring ") == 2
    assert swapped["models"][1]["metrics"]["margin"] == pytest.approx(found["models"][0]["metrics"]["margin"], rel=1e-5)


def test_every_kind_of_model_is_compared_on_the_pairs_that_are_named(
    trained: Trained, command: Command, tmp_path: Path
) -> None:
    import shutil

    run = trained("run", "save_every=2", "optimizer.lr=1e-2")
    shutil.copytree(run / "final", tmp_path / "bare")
    held = write_jsonl(tmp_path / "held.jsonl", sample_rows(32)[24:])
    step = run / "checkpoints" / "step-00000002"
    words = (step, run, tmp_path / "bare", "data=jsonl", f"data.eval={held}", "device=cpu")
    with pytest.MonkeyPatch.context() as within:
        within.chdir(tmp_path)
        found, ended = compared(command, tmp_path / "out", *words)
    assert (found["pairs"], ended.out.count("scoring ")) == (8, 3)
    margins = [one["metrics"]["margin"][0] for one in found["models"]]
    assert margins[1] == pytest.approx(margins[2], rel=0.05) and abs(margins[0]) < abs(margins[1])
    names = ["run/step-00000002", "run/final", "bare"]
    assert [one["name"] for one in found["models"]] == names
    assert found["config_differences"] == []
    of_run, ended = compared(command, tmp_path / "other", step, run, f"data.eval={held}")
    assert of_run["models"][1]["metrics"]["margin"][0] == pytest.approx(margins[1], rel=1e-4)
    assert refused(command, run, run / "final") == (
        2, f"{run / 'final'}: is given twice (as {run}); name each model once"
    )  # fmt: skip


def test_a_run_that_held_nothing_out_is_named(trained: Trained, command: Command) -> None:
    a, b = trained("a"), trained("b", "data.eval_fraction=0")
    assert refused(command, a, b) == (
        2, f"{b}: data.eval_fraction=0: the run held nothing out; name pairs with data.eval=PATH"
    )  # fmt: skip


def test_kl_and_length_are_of_the_report_or_of_the_run_at_that_step(command: Command, tmp_path: Path) -> None:
    runs = []
    for name in ("a", "b", "c", "d"):
        run = tmp_path / name
        lines = [{"split": "eval", "step": step, "samples/kl": float(step), "samples/length_ratio": 1.5,
                  "intervals95": {"samples/kl": [step - 1.0, step + 1.0]}} for step in (10, 20, 30)]  # fmt: skip
        facts: dict[str, Any] = {"checkpoint": str(run / "final")}
        if name == "a":
            facts |= {"samples/kl": 7.0, "intervals95": {"samples/kl": [6.0, 8.0]}}
        if name == "c":
            facts["checkpoint"] = str(run / "checkpoints" / "step-00000020")
        report_of(run / "eval" / "held-out-final", [0.1, 0.2, 0.3], **facts)
        (run / "config.yaml").write_text(yaml.safe_dump({"not": "a config"}))
        if name != "d":
            write_jsonl(run / "metrics.jsonl", lines)
        runs.append(run / "eval" / "held-out-final")
    (tmp_path / "b" / "manifest.json").write_text(json.dumps({"final": {"step": 10, "reason": "the best"}}))
    found, ended = compared(command, tmp_path / "out", *runs)
    metrics = [one["metrics"] for one in found["models"]]
    assert [one["kl"] for one in metrics] == [[7.0, 6.0, 8.0], [10.0, 9.0, 11.0], [20.0, 19.0, 21.0], None]
    assert [one["length_ratio"] for one in metrics] == [[1.5, None, None]] * 3 + [None]
    assert "note: no KL of d: dpo-eval checkpoint=PATH measures it\n" in ended.out
    (tmp_path / "b" / "manifest.json").unlink()
    found, _ = compared(command, tmp_path / "out", *runs[:2])
    assert found["models"][1]["metrics"]["kl"] == [30.0, 29.0, 31.0]


# A sweep


@pytest.mark.usefixtures("runs_in_this_process")
def test_a_sweep_names_its_best_run_and_its_unfinished_ones(command: Command, tmp_path: Path, pairs_file: Path) -> None:
    folder = tmp_path / "sweep"
    words = [word for word in tiny_words(pairs_file, folder) if not word.startswith("optimizer")]
    ended = command("dpo-train", "-m", "optimizer.lr=1e-4,1e-2", "beta=0.1,0.5", *words)
    assert ended.out.endswith(f"which is better, with paired intervals: dpo-compare {folder}\n")
    last = folder / "beta-9"
    last.mkdir()
    (last / "config.yaml").write_text((folder / "optimizer.lr-0.01_beta-0.1" / "config.yaml").read_text())
    found, ended = compared(command, tmp_path / "out", folder)
    assert (found["kind"], found["swept"]) == ("sweep", ["optimizer.lr", "beta"])
    names = {f"optimizer.lr-{rate}_beta-{beta}" for rate, beta in product(("0.0001", "0.01"), ("0.1", "0.5"))}
    models = found["models"]
    assert {one["name"] for one in models} == names
    for one in models:
        assert one["name"] == "_".join(f"{key}-{value}" for key, value in one["swept"].items())
        run = folder / one["name"]
        assert one["metrics"]["accuracy"][0] == pytest.approx(records(run)[-1]["rewards/accuracies"])
    accuracies = [one["metrics"]["accuracy"][0] for one in models]
    assert accuracies == sorted(accuracies, reverse=True) and found["best"] == models[0]["name"]
    assert f"best: {found['best']}, with the highest held-out accuracy" in ended.out
    assert found["warnings"][0] == "not compared, unfinished or failed: beta-9"
    assert refused(command, folder, folder / models[0]["name"]) == (
        2, f"{folder}: is the folder of a sweep; compare it alone, or name single runs"
    )  # fmt: skip
    for name in names - {found["best"]}:
        (folder / name / "final").rename(folder / name / "gone")
    code, says = refused(command, folder)
    assert code == 4 and says.startswith(f"{folder}: 1 finished run of 5, and a comparison takes two; unfinished")


def test_of_equal_runs_of_a_sweep_the_lower_loss_is_best_and_the_tie_is_told(command: Command, tmp_path: Path) -> None:
    margins = {"low": [0.2, 0.4, -0.1, 0.3], "high": [2.0, 4.0, -0.1, 3.0], "wrong": [-0.2, 0.4, -0.1, 0.3]}
    models = [read_report(report_of(tmp_path / name, one) / "report.json", name) for name, one in margins.items()]
    comparison, of_models = compare(models, "sweep")
    assert [one["name"] for one in comparison["models"]] == ["high", "low", "wrong"]
    assert of_models == [margins["high"], margins["low"], margins["wrong"]]
    best = next(one for one in sentences(comparison) if one.startswith("best"))
    assert best == (
        "best: high, with the highest held-out accuracy (0.75), shared with low; not told apart from it: low and wrong"
    )
