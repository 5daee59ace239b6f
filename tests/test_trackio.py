"""tracker=trackio with the real package, in a process of its own, and read back from its store."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
OPTIONS = {"project": "dpo-cli", "name": None, "space_id": None, "private": True}
RECORD = """
import json, sys, threading
from pathlib import Path
from dpo_cli.trackers.trackers import check_installed, open_trackers

directory, options, resumed_at, first = Path(sys.argv[1]), *map(json.loads, sys.argv[2:])
check_installed(["trackio"])
told = []
trackers = open_trackers({"trackio": options}, directory, "demo", {"beta": 0.1}, resumed_at, told.append)
for step in range(first, first + 2):
    trackers.record({"step": step, "split": "train", "loss": step + 0.5, "alarms": {"drift": f"far at {step}"}})
trackers.record({"step": first + 1, "split": "eval", "loss": 0.25})
columns = ["prompt", "policy", "kl"]
rows = [["why?", "a | b\\n<b>\\x1b[1m \\ud800", 0.25], ["", "x" * 3000, float("nan")]]
trackers.table(first + 1, "samples", columns, rows)
trackers.table(first + 1, "large/samples", columns, [["p" * 2000, "*|<`\\n" * 400, 0.5]] * 64)
finding = {"name": "overfit", "color": "yellow", "reason": "80% and 60%", "next_step": "fewer epochs"}
verdict = {"color": "yellow", "summary": "better, with 1 finding", "findings": [finding]}
trackers.finish({"status": "finished", "verdict": verdict})
assert threading.enumerate() == [threading.main_thread()], threading.enumerate()
(directory / "told.json").write_text(json.dumps(told))
"""
VERDICT = (
    "- **verdict/color**: yellow",
    "- **verdict/summary**: better, with 1 finding",
    "- **verdict/findings/overfit**: yellow: 80% and 60%. Next: fewer epochs",
    "- **status**: finished",
)
READ = """
import json
import trackio
from trackio.sqlite_storage import SQLiteStorage

print(json.dumps([
    {"name": run.name, "beta": run.config["beta"], "alerts": run.alerts(),
     "rows": SQLiteStorage.get_logs("dpo-cli", run.name, run_id=run.id)}
    for run in trackio.Api().runs("dpo-cli")
]))
"""


def run(folder: Path, code: str, *words: object) -> subprocess.CompletedProcess[str]:
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("TRACKIO_", "HF_"))}
    home = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder), "TRACKIO_DIR": str(folder / "store")}
    command = [
        sys.executable,
        "-W",
        "error",
        "-c",
        code,
        *(str(word) if isinstance(word, Path) else json.dumps(word) for word in words),
    ]
    ended = subprocess.run(
        command, env=bare | home | {"PYTHONPATH": str(ROOT)}, cwd=folder, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended


def store(folder: Path) -> list[dict[str, Any]]:
    return json.loads(run(folder, READ).stdout)


def test_trackio_holds_the_run_and_a_resumed_one_goes_on_in_it(tmp_path: Path) -> None:
    assert run(tmp_path, RECORD, tmp_path, OPTIONS, None, 0).stdout == ""
    assert json.loads((tmp_path / "told.json").read_text()) == []
    run_id = json.loads((tmp_path / "trackers.json").read_text())["id"]
    [stored] = store(tmp_path)
    assert (stored["name"], stored["beta"]) == (f"demo-{run_id}", 0.1)
    rows = [{key: value for key, value in row.items() if key != "timestamp"} for row in stored["rows"]]
    tables = {key: row.pop(key) for row in rows for key in ("samples", "large/samples") if key in row}
    numbers = [{"step": 0, "loss": 0.5}, {"step": 1, "loss": 1.5}, {"step": 1, "eval/loss": 0.25}]
    assert rows == [*numbers, {"step": 1}, {"step": 1}]
    assert tables["samples"] == {
        "_type": "trackio.table",
        "_value": [
            {"prompt": "why?", "policy": "a | b\n<b>\\x1b[1m \\ud800", "kl": 0.25},
            {"prompt": "", "policy": "x" * 1997 + "...", "kl": None},
        ],
    }
    assert len(tables["large/samples"]["_value"]) == 64
    alerts = sorted((alert["step"], alert["level"], alert["title"], alert["text"]) for alert in stored["alerts"])
    assert alerts == [
        (0, "warn", "drift", "far at 0"),
        (1, "info", "run finished", "\n".join(VERDICT)),
        (1, "warn", "drift", "far at 1"),
    ]
    assert run(tmp_path, RECORD, tmp_path, OPTIONS, 1, 2).stdout == ""
    [resumed] = store(tmp_path)
    assert [row["loss"] for row in resumed["rows"] if "loss" in row] == [0.5, 1.5, 2.5, 3.5]
    run(tmp_path, RECORD, tmp_path, OPTIONS, None, 0)  # a new run of the same name is another run
    assert len(store(tmp_path)) == 2


def test_a_space_that_cannot_be_reached_leaves_the_run_on_this_machine(tmp_path: Path) -> None:
    run(tmp_path, RECORD, tmp_path, OPTIONS | {"space_id": "me/board"}, None, 0)
    assert json.loads((tmp_path / "told.json").read_text()) == [
        "tracker=trackio: local (HF_HUB_OFFLINE is set); "
        "upload with: trackio sync --project dpo-cli --space-id me/board"
    ]
    assert len(store(tmp_path)[0]["rows"]) == 5


def test_a_store_that_cannot_be_written_warns_once(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("in the way")
    run(tmp_path, RECORD, tmp_path, OPTIONS, None, 0)
    [told] = json.loads((tmp_path / "told.json").read_text())
    assert told.startswith("tracker=trackio: failed and is off (")
