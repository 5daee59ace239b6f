"""What the README shows is run: its commands, its changes to the program, its map."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from conftest import Ended, records, sample_rows, write_jsonl
from documents import PAGES, README, ROOT, apply, commands, fenced
from test_architecture import floor

Command = Callable[..., Ended]
TEXT = README.read_text(encoding="utf-8")


def test_it_is_read_in_five_minutes() -> None:
    assert len(TEXT.splitlines()) < 150


def test_the_commands_run_as_written_on_a_tiny_model(command: Command, tmp_path: Path, tiny_path: str) -> None:
    """The training line for one's own model and data, then the evaluation of its run."""
    pairs = write_jsonl(tmp_path / "pairs.jsonl", sample_rows(20))
    run = tmp_path / "run"
    there = {"path/to/my-sft": tiny_path, "pairs.jsonl": str(pairs), "outputs/my-run": str(run)}
    examine, train, sweep, evaluate, *_ = (
        [re.sub("|".join(map(re.escape, there)), lambda hit: there[hit[0]], word) for word in words]
        for words in commands(README)
    )
    assert "-m" in sweep
    assert command(*examine, f"output_dir={tmp_path / 'examined'}").code == 0
    assert command(*train, "dry_run=true").code == 0
    ended = command(*train, "max_steps=2", f"output_dir={run}")
    assert ended.code == 0, ended.err
    assert records(run)[-1]["split"] == "eval"
    ended = command(*evaluate, "max_new_tokens=3", "name=again")
    assert ended.code == 0, ended.err
    for name in ("metrics.jsonl", "config.yaml", "manifest.json", "train.log", "final", "eval/again/report.html"):
        assert name in TEXT.replace("<name>", "again")
        assert (run / name).exists(), name


def test_the_row_shown_is_a_pair() -> None:
    from dpo_cli.data.formats import standard

    row = re.search(r'`(\{"prompt".*?\})`', TEXT)
    assert row
    assert standard(json.loads(row[1])).chosen == "A star."


EVERY_CHANGE = """
import json, sys
from dpo_cli import cli
for words in json.loads(sys.argv[1]):
    sys.argv = words
    try:
        cli.train()
    except SystemExit as ended:
        assert not ended.code, (words, ended.code)
"""


def test_every_change_shown_works_in_a_copy_of_the_program(tmp_path: Path) -> None:
    for name in ("dpo_cli", "conf"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for page in PAGES:
        for diff in fenced(page, "diff"):
            apply(diff, tmp_path)
    mine = tmp_path / "my_conf" / "model" / "mine.yaml"
    mine.write_text(mine.read_text().replace("path/to/my-sft", "dpo-cli/tiny-random"))
    rows = sample_rows(8)
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    write_jsonl(tmp_path / "qa.jsonl", [{"q": r["prompt"], "good": r["chosen"], "bad": r["rejected"]} for r in rows])
    shown = [words for words in commands(README) if any(word in SHOWN for word in words)]
    assert len(shown) == len(SHOWN)
    shown += [words for words in commands(ROOT / "docs" / "extending.md") if "--config-dir" in words]
    filled = []
    for number, words in enumerate(shown):
        more = [] if any(word.startswith("data=") for word in words) else ["data=jsonl", "data.train=pairs.jsonl"]
        more += [] if any(word.startswith("model=") for word in words) else ["model=tiny"]
        words = [word.replace("pairs", "qa") if "data.format=qa" in words else word for word in words]
        filled.append([*words, *more, "max_steps=2", "data.eval_fraction=0", f"output_dir={number}"])
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", EVERY_CHANGE, json.dumps(filled)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    folders = {word: tmp_path / str(number) for number, words in enumerate(shown) for word in words}
    for word, (line, start) in SHOWN.items():
        assert line in (folders[word] / "config.yaml").read_text(), word
        assert round(records(folders[word])[0]["loss"], 3) == start, word
        assert (folders[word] / "final" / "adapter_model.safetensors").is_file(), word
    assert "0,loss,0.69" in (folders["tracker=csv"] / "metrics.csv").read_text()
    assert json.loads((folders["objective=near"] / "final" / "adapter_config.json").read_text())["r"] == 16


# A word of each change -> what the run's config says, and the loss before the first update.
SHOWN = {
    "loss=cubic": ("name: cubic", 1.0),
    "optimizer=nadam": ("name: nadam", 0.693),
    "data.format=qa": ("format: qa", 0.693),
    "objective=near": ("objective: near", 0.693),
    "tracker=csv": ("file: metrics.csv", 0.693),
}


def test_the_map_of_rooms_is_the_tree_from_top_to_bottom() -> None:
    listed = re.findall(r"^    (\S+?)/?  +\S", TEXT.split("## Where things are")[1], re.M)
    tree = {path.name for path in (ROOT / "dpo_cli").iterdir() if path.is_dir() or path.suffix == ".py"}
    assert set(listed) == tree - {"__init__.py", "__pycache__"}
    floors = [floor(name.removesuffix(".py")) for name in listed]
    assert floors == sorted(floors, reverse=True)
    assert (ROOT / "dpo_cli" / "training" / "runner.py").is_file()
    assert "`dpo_cli/training/runner.py` first" in TEXT


def test_the_exit_codes_are_those_of_the_help(command: Command) -> None:
    shown = command("dpo-train", "--help").out.split("Exit codes: ")[1]
    codes = set(re.findall(r"\b(\d+)\s\w", shown))
    assert (
        codes == set(re.findall(r"\b(\d+) \w", TEXT.split("Exit codes: ")[1].split("`make`")[0])) >= {"0", "75", "130"}
    )
