"""report.html of a run: drawn when it ends, from its files; and what trackers are told besides."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Ended, tiny_words

from dpo_cli.trackers.trackers import Trackers

Command = Callable[..., Ended]
Trained = Callable[..., Path]


def test_a_run_ends_with_its_page(command: Command, pairs_file: Path, tmp_path: Path) -> None:
    ended = command("dpo-train", *tiny_words(pairs_file, tmp_path / "run"), "page=true")
    assert ended.code == 0, ended.err
    assert f"page     {tmp_path / 'run' / 'report.html'}" in ended.out
    page = (tmp_path / "run" / "report.html").read_text()
    verdict = json.loads((tmp_path / "run" / "manifest.json").read_text())["verdict"]
    assert f'<div class="verdict {verdict["color"]}">' in page and verdict["findings"][0]["name"] in page
    assert "<h3>Loss</h3>" in page and "<h3>KL of generated answers</h3>" in page and "Answers before and after" in page
    assert not (
        command("dpo-train", *tiny_words(pairs_file, tmp_path / "none")),
        (tmp_path / "none/report.html").exists(),
    )[1]


def test_a_page_that_cannot_be_written_leaves_the_run_whole(command: Command, pairs_file: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "report.html").mkdir(parents=True)
    ended = command("dpo-train", *tiny_words(pairs_file, tmp_path / "run"), "page=true")
    assert ended.code == 0 and "warning: " in ended.out and "report.html: cannot be written" in ended.out
    assert (tmp_path / "run" / "final" / "adapter_model.safetensors").is_file() and "\npage " not in ended.out


def test_the_page_is_there_before_the_run_is_complete(
    command: Command, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed in between is resumed; a complete one is not, and would never get its page."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dpo_cli.training.records.write_folder", full)
    ended = command("dpo-train", *tiny_words(pairs_file, tmp_path / "run"), "page=true")
    assert ended.code == 7 and not (tmp_path / "run" / "final").exists()
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_run_without_a_step_within_its_budget_has_its_page(
    command: Command, pairs_file: Path, tmp_path: Path
) -> None:
    words = [
        "page=true",
        "eval_every=1",
        "budget.kl=1e-9",
        "optimizer.lr=0.3",
        "optimizer.warmup_steps=0",
        "monitor=off",
    ]  # far at once
    ended = command("dpo-train", *tiny_words(pairs_file, tmp_path / "run"), *words)
    assert ended.code == 5 and "so there is no final/" in ended.err, ended.out
    assert '<div class="verdict' in (tmp_path / "run" / "report.html").read_text()


def test_trackers_get_a_table_of_each_evaluation_and_of_its_answers(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, str, list[str], list[list[Any]]]] = []
    monkeypatch.setattr(Trackers, "table", lambda _, *what: told.append(what))
    run = trained("run", "eval_every=2")
    assert [(step, name) for step, name, _, _ in told] == [
        (2, "evaluation"), (2, "samples"), (3, "evaluation"), (3, "samples"),
    ]  # fmt: skip
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["split"] == "eval"][-1]
    _, _, columns, rows = told[-2]
    table = {row[0]: row[1:] for row in rows}
    assert columns == ["metric", "mean", "low", "high"]
    assert table["rewards/margins"] == [last["rewards/margins"], *last["intervals95"]["rewards/margins"]]
    assert table["samples/kl"][0] == last["samples/kl"]
    assert [row[:3] for row in told[-1][3]] == [
        [answer["prompt"], answer["reference"], answer["policy"]]
        for answer in map(json.loads, (run / "samples" / "step-00000003.jsonl").read_text().splitlines())
    ]
