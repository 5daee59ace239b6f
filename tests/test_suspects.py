"""dpo-data run=: planted wrong labels are found by policies that did not see them, and their share is estimated."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Ended, tiny_words, write_jsonl

from dpo_cli.examination.label_noise import label_noise

Command = Callable[..., Ended]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3])
def test_the_share_of_wrong_labels_is_found_within_its_interval(share: float) -> None:
    source = np.random.default_rng(1)
    strength = 6 * source.standard_normal(3000)
    # The first response is better with probability sigmoid(strength); the label names it, or is turned round.
    first_is_better = source.random(3000) < 1 / (1 + np.exp(-strength))
    wrong = source.random(3000) < share
    margins = np.where(first_is_better ^ wrong, strength, -strength)
    found = label_noise((0.37 * margins).tolist(), range(3000), 0)  # whatever the margins' unit
    assert found.share.low <= share <= found.share.high and found.share.high - found.share.low < 0.06
    if share:
        sure = found.probabilities > 0.9
        assert wrong[sure].mean() > 0.85 and wrong[found.probabilities < 0.1].mean() < 0.1


def test_margins_that_say_nothing_leave_the_share_unknown() -> None:
    margins = np.random.default_rng(0).standard_normal(500).tolist()
    found = label_noise(margins, range(500), 0).share
    assert found.high > 0.4  # no model knows here whether a label is wrong


def test_planted_wrong_labels_are_suspects(command: Command, tmp_path: Path) -> None:
    source = random.Random(0)
    rows: list[dict[str, Any]] = []
    for number in range(120):
        good, bad = "yes" * source.randint(1, 12), "no" * source.randint(1, 12)
        rows.append({"prompt": f"Question {number}?", "chosen": good, "rejected": bad})
    planted = set(range(3, 120, 10))
    for number in planted:
        rows[number] = {**rows[number], "chosen": rows[number]["rejected"], "rejected": rows[number]["chosen"]}
    run = tmp_path / "run"
    words = [*tiny_words(write_jsonl(tmp_path / "pairs.jsonl", rows), run), "max_steps=30", "optimizer.lr=5e-3"]
    assert command("dpo-train", *words).code == 0
    ended = command("dpo-data", f"run={run}")
    assert ended.code == 0, ended.err
    facts = json.loads((run / "suspects" / "suspects.json").read_text())
    assert facts["pairs"] == 120 and facts["folds"] == 2
    low, high = facts["wrong_labels"]["interval95"]
    assert low <= 0.1 <= high and high < 0.25
    assert 0.05 <= facts["label_smoothing"] <= 0.15 and f"loss.label_smoothing={facts['label_smoothing']}" in ended.out
    suspects = [json.loads(line) for line in (run / "suspects" / "suspects.jsonl").read_text().splitlines()]
    assert {one["index"] for one in suspects} == planted and facts["suspects"] == len(planted)
    assert all(one["margin"] < 0 and "no" in one["chosen"] and "yes" in one["rejected"] for one in suspects)
    assert suspects[0]["location"].endswith(f"pairs.jsonl line {suspects[0]['index'] + 1}")
    again = command("dpo-data", f"run={run}")  # what is finished is not trained again
    assert again.code == 0 and again.out.count("already complete") == 2
    assert json.loads((run / "suspects" / "suspects.json").read_text()) == facts


def test_no_fold_scores_a_prompt_that_it_was_trained_on(command: Command, tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {number % 40}?", "chosen": f"a{number}", "rejected": f"b{number}"}
            for number in range(80)]  # fmt: skip
    run = tmp_path / "run"
    assert command("dpo-train", *tiny_words(write_jsonl(tmp_path / "pairs.jsonl", rows), run)).code == 0
    assert command("dpo-data", f"run={run}", "folds=3", f"output_dir={tmp_path / 'out'}").code == 0
    seen = []
    for fold in (1, 2, 3):
        inside, others = (
            [json.loads(line) for line in (tmp_path / "out" / f"{name}-{fold}.jsonl").read_text().splitlines()]
            for name in ("fold", "others")
        )
        assert not {row["prompt"] for row in inside} & {row["prompt"] for row in others}
        assert len(inside) + len(others) == 80
        seen += inside
    assert sorted(row["chosen"] for row in seen) == sorted(row["chosen"] for row in rows)


def test_mistakes_are_one_line(command: Command, tmp_path: Path) -> None:
    ended = command("dpo-data", f"run={tmp_path}")
    assert ended.code == 4 and "config.yaml: no such file; a run directory holds a config.yaml" in ended.err
    ended = command("dpo-data", f"run={tmp_path}", "data=hh")
    assert (ended.code, ended.err) == (2, "error: data=hh: run= takes data and options of that run; leave it out\n")
    assert command("dpo-data", f"run={tmp_path}", "folds=1").err == "error: folds=1: must be in [2, 20]\n"
