"""Trackers, with the real packages: what they stored is read back with their own readers."""

import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
import yaml

from dpo_cli.errors import ConfigError
from dpo_cli.theory.statistics import Estimate
from dpo_cli.trackers import trackers as room
from dpo_cli.trackers.tables import evaluation_table, markdown_table, samples_table
from dpo_cli.trackers.tracker import Start, Tracker, reachable
from dpo_cli.trackers.trackers import TRACKERS, Trackers, check_installed, metrics_of, open_trackers

CONF = Path(__file__).parent.parent / "conf" / "tracker"
CONFIG = {"beta": 0.1, "lora": {"r": 8}, "data": {"train": "pairs.jsonl"}}
KEY = "0123456789" * 4
SUMMARY = {"status": "finished", "verdict": "green", "findings": ["learned", "held out agrees"], "final": Path("final")}


KILLED = """
import sys
from pathlib import Path
import psutil
from dpo_cli.trackers.trackers import open_trackers

options = {"project": "p", "entity": None, "name": None, "mode": "offline"}
trackers = open_trackers({"wandb": options}, Path(sys.argv[1]), "demo", {}, None, print)
[core] = psutil.Process().children()
core.kill()
psutil.wait_procs([core])
for step in range(100):
    trackers.record({"step": step, "split": "train", "loss": 0.5})
trackers.finish({"status": "finished"})
print("done")
"""


def options(name: str, **changed: Any) -> dict[str, Any]:
    """The options of the packaged YAML, some changed."""
    return yaml.safe_load((CONF / f"{name}.yaml").read_text())[name] | changed


def train(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "epoch": step / 4, "split": "train", "loss": 1 / (step + 1), "rewards/margins": 0.5} | more


def evaluation(step: int) -> dict[str, Any]:
    return {"step": step, "epoch": step / 4, "split": "eval", "loss": 2 / (step + 1)}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Trackers]]:
    """Opens trackers in one run directory; a warning is an error unless the test takes it."""
    (tmp_path / "run").mkdir()

    def opened(chosen: dict[str, Any], resumed_at: int | None = None, warnings: list[str] | None = None) -> Trackers:
        warn = pytest.fail if warnings is None else warnings.append
        return open_trackers(chosen, tmp_path / "run", "demo", CONFIG, resumed_at, warn)

    yield opened


@pytest.fixture
def wandb_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key and no settings but the test's own, and no process left behind."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "NETRC"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    for name in ("WANDB_SILENT", "WANDB_ERROR_REPORTING"):  # the tracker sets them: undone after the test
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    assert [child.name() for child in psutil.Process().children() if "wandb" in child.name()] == []
    assert [thread.name for thread in threading.enumerate() if "wandb" in thread.name] == []


def kill(trackers: Trackers) -> None:
    """Leave TensorBoard's file as a killed process does."""
    trackers._open["tensorboard"]._writer.close()  # type: ignore[attr-defined]


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def scalars(read: Any, tag: str) -> list[tuple[int, float]]:
    return [(event.step, pytest.approx(event.value)) for event in read.Scalars(tag)]


def texts(read: Any, tag: str) -> list[tuple[int, str]]:
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in read.Tensors(tag)]


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log, blocks of 32 KiB after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, whole = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            yield Record.FromString(whole)
            whole = b""


ANSWER = "first | second\n<b>*bold*</b> `code` ![x](http://a.b/c) \x1b[31m \u202e &lt; ${1} \\ [y]: z"
# What of it is shown: control characters and marks of direction as escapes, all else as it is.
SHOWN = "first | second\n<b>*bold*</b> `code` ![x](http://a.b/c) \\x1b[31m \\u202e &lt; ${1} \\ [y]: z"
COLUMNS = ["prompt", "policy | <i>", "kl"]
ROWS: list[list[str | float | None]] = [["why?", ANSWER, 0.25], ["", "x" * 3000, None], [None, "1", float("nan")]]
ROWS_SHOWN = [["why?", SHOWN, 0.25], ["", "x" * 1997 + "...", None], [None, "1", None]]
FINDING = {"name": "overfit", "color": "yellow", "reason": "80% and 60%", "next_step": "fewer epochs"}
VERDICT = {"color": "yellow", "summary": "better, with 1 finding", "findings": [FINDING]}
VERDICT_FLAT = {
    "verdict/color": "yellow",
    "verdict/summary": "better, with 1 finding",
    "verdict/findings/overfit": "yellow: 80% and 60%. Next: fewer epochs",
}


def large_tables() -> list[tuple[str, list[str], list[list[str | float | None]]]]:
    """64 answers of 2,000 characters that Markdown reads much into, and an evaluation of 30 metrics."""
    answers = samples_table([{"prompt": "p" * 2000, "policy": "*|<`\n" * 400, "kl": 0.5} for _ in range(64)])
    metrics = evaluation_table({f"metric/{n}": Estimate(n, n - 0.5, n + 0.5, 9) for n in range(30)})
    return [("samples", *answers), ("evaluation", *metrics)]


def cells_of(html: str) -> list[list[str]]:
    """The cells of a page's only table as a browser shows them, line breaks as such."""
    reader = Cells()
    reader.feed(html)
    return reader.rows


class Cells(HTMLParser):
    """Collects text in cells; any element but those of a table fails."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert tag in ("table", "thead", "tbody", "tr", "th", "td", "br"), tag
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")
            self.inside = True
        elif tag == "br":
            self.rows[-1][-1] += "\n"

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("th", "td")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


def items(update: Any) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in update}


def test_train_metrics_keep_their_names_and_eval_metrics_go_under_eval() -> None:
    line = train(3, alarms={"length": "too long"}, note="text", flag=True, skipped=2)
    assert metrics_of(line) == {"epoch": 0.75, "loss": 0.25, "rewards/margins": 0.5, "skipped": 2.0}
    assert metrics_of(evaluation(3)) == {"eval/epoch": 0.75, "eval/loss": 0.5}


def test_tensorboard_holds_every_number_alarm_and_the_summary(start: Callable[..., Trackers], tmp_path: Path) -> None:
    trackers = start({"tensorboard": options("tensorboard")})
    trackers.record(train(0))
    trackers.record(train(1, alarms={"length": "answers grow"}))
    trackers.record(evaluation(1))
    trackers.alarm(2, "drift", "far from the reference")
    trackers.finish(SUMMARY)
    read = events(tmp_path / "run" / "tensorboard")
    assert read.Tags()["scalars"] == ["epoch", "loss", "rewards/margins", "eval/epoch", "eval/loss"]
    assert scalars(read, "loss") == [(0, 1.0), (1, 0.5)]
    assert scalars(read, "rewards/margins") == [(0, 0.5), (1, 0.5)]
    assert scalars(read, "eval/loss") == [(1, 1.0)]
    assert texts(read, "alarms/length") == [(1, "answers grow")]
    assert texts(read, "alarms/drift") == [(2, "far from the reference")]
    lines = [
        "- **status**: finished",
        "- **verdict**: green",
        '- **findings**: ["learned", "held out agrees"]',
        "- **final**: final",
    ]
    assert texts(read, "summary") == [(1, "\n".join(lines))]
    [(step, config)] = texts(read, "config")
    assert step == 0 and json.loads(config) == CONFIG
    assert read.SummaryMetadata("summary").plugin_data.plugin_name == "text"


def test_a_resumed_run_replaces_what_tensorboard_has_after_the_checkpoint(
    start: Callable[..., Trackers], tmp_path: Path
) -> None:
    chosen = {"tensorboard": options("tensorboard")}
    first = start(chosen)
    for step in range(5):
        first.record(train(step))
    first.alarm(4, "drift", "far")
    kill(first)
    resumed = start(chosen, resumed_at=2)
    resumed.record(train(3, loss=9.0))
    resumed.finish(SUMMARY)
    read = events(tmp_path / "run" / "tensorboard")
    assert scalars(read, "loss") == [(0, 1.0), (1, 0.5), (2, 1 / 3), (3, 9.0)]
    assert [step for step, _ in texts(read, "config")] == [0, 3]
    # What the board itself shows of texts: EventAccumulator forgets no tensors.
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as Board

    board = Board(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in board.Tensors("loss")] == [0, 1, 2, 3]
    assert board.Tensors("alarms/drift") == []
    start(chosen).finish(SUMMARY)  # started anew: nothing of before counts
    assert scalars(events(tmp_path / "run" / "tensorboard"), "loss") == []


# Of TensorBoard's own copy of bleach, when its module for HTML is imported.
@pytest.mark.filterwarnings("ignore:html5lib's sanitizer is deprecated:DeprecationWarning")
def test_tensorboard_shows_tables_as_they_are_and_the_verdict(start: Callable[..., Trackers], tmp_path: Path) -> None:
    from tensorboard.plugin_util import markdown_to_safe_html

    trackers = start({"tensorboard": options("tensorboard")})
    trackers.table(3, "samples", COLUMNS, ROWS)
    trackers.table(4, "samples", COLUMNS, ROWS[:1])
    for name, columns, rows in large_tables():
        trackers.table(5, f"large/{name}", columns, rows)
    trackers.finish({"status": "finished", "verdict": VERDICT, "final": "final"})
    read = events(tmp_path / "run" / "tensorboard")
    assert read.SummaryMetadata("samples").plugin_data.plugin_name == "text"
    [(first, text), (second, _)] = texts(read, "samples")
    assert (first, second) == (3, 4)
    shown = [["" if cell is None else str(cell) for cell in row] for row in ROWS_SHOWN]
    assert cells_of(markdown_to_safe_html(text)) == [COLUMNS, *shown]
    [(_, answers)] = texts(read, "large/samples")
    cells = cells_of(markdown_to_safe_html(answers))
    assert len(cells) == 65 and {len(row) for row in cells} == {8}
    assert cells[64][2] == "\n".join(["*|<`"] * 400)
    [(_, metrics)] = texts(read, "large/evaluation")
    assert cells_of(markdown_to_safe_html(metrics))[30] == ["metric/29", "29", "28.5", "29.5"]
    lines = [f"- **{key}**: {value}" for key, value in VERDICT_FLAT.items()]
    assert texts(read, "summary") == [(0, "\n".join([*lines, "- **status**: finished", "- **final**: final"]))]


def test_tables_of_samples_and_of_an_evaluation_keep_every_value() -> None:
    sample = {
        "prompt": "p", "reference": "r", "policy": "q", "kl": 0.5, "tokens": 3, "reference_tokens": 4,
        "finish_reason": "stop", "reference_finish_reason": "length",
    }  # fmt: skip
    columns, rows = samples_table([sample, {"prompt": "p"}])
    assert [dict(zip(columns, row, strict=True)) for row in rows] == [sample, dict.fromkeys(sample) | {"prompt": "p"}]
    columns, rows = evaluation_table({"loss": Estimate(0.5, 0.25, 0.75, 4), "one": Estimate(1, float("nan"), 2, 1)})
    assert columns == ["metric", "mean", "low", "high"] and rows[0] == ["loss", 0.5, 0.25, 0.75]
    assert markdown_table(columns, rows[:1]) == (
        "| metric | mean | low | high |\n| --- | --- | --- | --- |\n| loss | 0.5 | 0.25 | 0.75 |"
    )


def test_a_folder_of_many_runs_gets_a_subfolder_a_run(start: Callable[..., Trackers], tmp_path: Path) -> None:
    chosen = {"tensorboard": options("tensorboard", directory=str(tmp_path / "boards"))}
    for _ in range(2):
        trackers = start(chosen)
        trackers.record(train(0))
        trackers.finish(SUMMARY)
    run_id = json.loads((tmp_path / "run" / "trackers.json").read_text())["id"]
    folders = sorted(folder.name for folder in (tmp_path / "boards").iterdir())
    assert len(folders) == 2 and f"demo-{run_id}" in folders


def test_wandb_offline_holds_the_run_and_a_resumed_one_has_its_id(
    start: Callable[..., Trackers], tmp_path: Path, wandb_home: None, capfd: pytest.CaptureFixture[str]
) -> None:
    told: list[str] = []
    chosen = {"wandb": options("wandb")}
    trackers = start(chosen, warnings=told)
    trackers.record(train(0))
    trackers.record(train(1, alarms={"length": "answers grow"}))
    trackers.record(evaluation(1))
    print("a line of the console")
    trackers.finish(SUMMARY)
    run_id = json.loads((tmp_path / "run" / "trackers.json").read_text())["id"]
    [folder] = (tmp_path / "run" / "wandb").glob(f"offline-run-*-{run_id}")
    assert told == [
        f"tracker=wandb: offline (no API key: set WANDB_API_KEY or run `wandb login`); upload with: wandb sync {folder}"
    ]
    records = list(wandb_records(folder / f"run-{run_id}.wandb"))
    [run] = [record.run for record in records if record.HasField("run")][:1]
    assert (run.run_id, run.project, run.display_name) == (run_id, "dpo-cli", "demo")
    assert CONFIG.items() <= items(run.config.update).items()
    history = [items(record.history.item) for record in records if record.HasField("history")]
    assert [row["_step"] for row in history] == [0, 1]
    assert history[0]["loss"] == 1.0 and "eval/loss" not in history[0]
    assert (history[1]["loss"], history[1]["eval/loss"], history[1]["alarms/length"]) == (0.5, 1.0, "answers grow")
    summary: dict[str, Any] = {}
    for record in records:
        summary |= items(record.summary.update)
    assert {key: summary[key] for key in SUMMARY} == SUMMARY | {"final": "final"}
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [0]
    # Of the machine and the code nothing is stored: no environment, no files, no output.
    kinds = {record.WhichOneof("record_type") for record in records}
    assert kinds <= {"header", "request", "run", "telemetry", "summary", "history", "exit"}

    while time.strftime("%Y%m%d_%H%M%S") in folder.name:  # the name of its folder has seconds
        time.sleep(0.05)
    resumed = start(chosen, resumed_at=1, warnings=told)
    resumed.record(train(2))
    resumed.finish(SUMMARY | {"status": "stopped"})
    assert len(list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{run_id}"))) == 2
    assert capfd.readouterr() == ("a line of the console\n", "")


def test_wandb_offline_holds_tables_and_the_verdict(
    start: Callable[..., Trackers], tmp_path: Path, wandb_home: None, capfd: pytest.CaptureFixture[str]
) -> None:
    told: list[str] = []
    trackers = start({"wandb": options("wandb")}, warnings=told)
    trackers.record(train(3))
    trackers.table(3, "samples", COLUMNS, ROWS)
    trackers.table(4, "samples", COLUMNS, ROWS[:1])
    for name, columns, rows in large_tables():
        trackers.table(5, f"large/{name}", columns, rows)
    trackers.record(train(5))
    trackers.finish({"status": "finished", "verdict": VERDICT})
    assert len(told) == 1 and capfd.readouterr() == ("", "")
    [folder] = (tmp_path / "run" / "wandb").glob("offline-run-*")
    records = list(wandb_records(next(folder.glob("*.wandb"))))
    history = {row["_step"]: row for row in (items(one.history.item) for one in records if one.HasField("history"))}
    assert list(history) == [3, 4, 5] and history[5]["loss"] == 1 / 6

    def table(step: int, name: str) -> tuple[Any, Any]:
        assert history[step][f"{name}/_type"] == "table-file"
        stored = json.loads((folder / "files" / history[step][f"{name}/path"]).read_text())
        return stored["columns"], stored["data"]

    assert table(3, "samples") == (COLUMNS, ROWS_SHOWN)
    assert table(4, "samples") == (COLUMNS, ROWS_SHOWN[:1])
    assert len(table(5, "large/samples")[1]) == 64
    assert table(5, "large/evaluation")[1][29] == ["metric/29", 29, 28.5, 29.5]
    summary: dict[str, Any] = {}
    for record in records:
        summary |= items(record.summary.update)
    assert {key: summary[key] for key in VERDICT_FLAT} == VERDICT_FLAT
    assert summary["verdict"] == VERDICT


def test_wandb_is_online_only_with_a_key_and_a_server_that_answers(
    start: Callable[..., Trackers], wandb_home: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    why_offline = TRACKERS["wandb"]._why_offline
    url = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("WANDB_BASE_URL", url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    told: list[str] = []
    start({"wandb": options("wandb")}, warnings=told).finish(SUMMARY)
    assert [line.partition(";")[0] for line in told] == [f"tracker=wandb: offline ({url} does not answer)"]
    assert why_offline("online", url) == ""
    assert why_offline("offline", url) == "tracker.wandb.mode=offline"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert why_offline("auto", url) == "WANDB_MODE=offline"
    for path in Path(os.environ["HOME"]).parent.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("mode", ["auto", "online"])
def test_wandb_without_a_key_is_offline_and_never_asks(
    start: Callable[..., Trackers], wandb_home: None, mode: str
) -> None:
    told: list[str] = []
    start({"wandb": options("wandb", mode=mode)}, warnings=told).finish(SUMMARY)
    reason = "offline (no API key: set WANDB_API_KEY or run `wandb login`)"
    assert [line.partition(";")[0] for line in told] == [f"tracker=wandb: {reason}"]


class Server(BaseHTTPRequestHandler):
    """As much of the server of Weights & Biases as a run asks of it; keeps what it is sent."""

    protocol_version = "HTTP/1.1"
    received: ClassVar[list[tuple[str, Any]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.received.append((body.get("operationName", self.path), body.get("variables", body)))
        sent = body.get("variables", {})
        named = {"id": "p", "name": "dpo-cli", "entity": {"id": "e", "name": "me"}}
        bucket = {
            "id": "b",
            "name": sent.get("name"),
            "displayName": "x",
            "config": "{}",
            "historyLineCount": 0,
            "project": named,
        }
        files = [{"name": name, "uploadUrl": ""} for name in sent.get("files", [])]
        artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": {"latestArtifact": None}}
        answers = {
            "CreateArtifact": {"createArtifact": {"artifact": artifact}},
            "RunResumeStatus": {"model": named | {"bucket": None}},
            "Viewer": {"viewer": {"id": "u", "username": "me", "entity": "me"}},
            "UpsertBucket": {"upsertBucket": {"bucket": bucket, "inserted": True}},
            "CreateRunFiles": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}},
        }
        self.answer({"data": answers.get(body.get("operationName"), {"project": None})})

    def do_GET(self) -> None:
        self.answer({})

    def answer(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(wandb_home: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """A running `Server`, known to wandb with a key for it."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(Server, "received", [])
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        serving = threading.Thread(target=running.serve_forever)
        serving.start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{running.server_port}")
        yield running
        running.shutdown()
        serving.join()


def test_wandb_online_sends_records_alerts_config_and_summary_and_nothing_else(
    start: Callable[..., Trackers], server: ThreadingHTTPServer, capfd: pytest.CaptureFixture[str]
) -> None:
    trackers = start({"wandb": options("wandb", project="p", entity="me")})
    trackers.record(train(0, alarms={"length": "answers grow"}))
    trackers.record(evaluation(0))
    trackers.finish(SUMMARY | {"status": "failed"})
    [created, *_] = [sent for name, sent in Server.received if name == "UpsertBucket"]
    given = {key: value for key, value in created.items() if value is not None}
    config = json.loads(given.pop("config"))
    run_id = given.pop("name")
    assert given == {"project": "p", "entity": "me", "displayName": "demo", "program": "dpo-train"}
    assert {key: value["value"] for key, value in config.items() if key != "_wandb"} == CONFIG
    assert set(config["_wandb"]["value"]) <= {"t", "m", "cli_version", "python_version"}
    [alert] = [sent for name, sent in Server.received if name == "NotifyScriptableRunAlert"]
    assert (alert["runName"], alert["title"], alert["text"]) == (run_id, "length at step 0", "answers grow")
    streams = [sent for name, sent in Server.received if name.endswith("/file_stream")]
    files = {file for sent in streams for file in sent.get("files", {})}
    assert files == {"wandb-history.jsonl", "wandb-summary.json"}
    [row] = [
        json.loads(line) for sent in streams for line in sent["files"].get("wandb-history.jsonl", {}).get("content", [])
    ]
    expected = {"_step": 0, "loss": 1.0, "eval/loss": 2.0, "alarms/length": "answers grow"}
    assert {key: row[key] for key in expected} == expected
    last = json.loads(
        [
            sent["files"]["wandb-summary.json"]["content"][-1]
            for sent in streams
            if "wandb-summary.json" in sent["files"]
        ][-1]
    )
    assert (last["verdict"], last["status"], last["findings"]) == ("green", "failed", SUMMARY["findings"])
    assert [sent["exitcode"] for sent in streams if "exitcode" in sent] == [1]
    uploads = {file for name, sent in Server.received if name == "CreateRunFiles" for file in sent["files"]}
    assert uploads == {"config.yaml", "wandb-summary.json"}
    names = {name for name, _ in Server.received if "/" not in name}
    assert names == {"RunResumeStatus", "UpsertBucket", "NotifyScriptableRunAlert", "CreateRunFiles"}
    assert capfd.readouterr() == ("", "")


def test_wandb_online_sends_tables_and_the_verdict(
    start: Callable[..., Trackers], server: ThreadingHTTPServer, capfd: pytest.CaptureFixture[str]
) -> None:
    trackers = start({"wandb": options("wandb")})
    trackers.table(1, "samples", COLUMNS, ROWS)
    trackers.finish({"status": "finished", "verdict": VERDICT})
    [artifact] = [sent["input"] for name, sent in Server.received if name == "CreateArtifact"]
    assert artifact["artifactTypeName"] == "run_table" and artifact["artifactCollectionName"].endswith("-samples")
    files = [sent["files"] for name, sent in Server.received if name.endswith("/file_stream") and "files" in sent]
    [row] = [json.loads(line) for sent in files for line in sent.get("wandb-history.jsonl", {}).get("content", [])]
    assert (row["_step"], row["samples"]["_type"], row["samples"]["nrows"]) == (1, "table-file", 3)
    uploads = {file for name, sent in Server.received if name == "CreateRunFiles" for file in sent["files"]}
    assert row["samples"]["path"] in uploads
    [*_, last] = [sent["wandb-summary.json"]["content"][-1] for sent in files if "wandb-summary.json" in sent]
    summary = json.loads(last)
    assert {key: summary[key] for key in VERDICT_FLAT} == VERDICT_FLAT
    assert capfd.readouterr() == ("", "")


def test_a_table_is_left_out_while_the_server_of_wandb_is_gone(
    start: Callable[..., Trackers], server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    trackers = start({"wandb": options("wandb")}, warnings=told)
    monkeypatch.setattr("dpo_cli.trackers.wandb.reachable", lambda url: False)
    trackers.table(1, "samples", COLUMNS, ROWS)
    trackers.record(train(1))
    trackers.finish(SUMMARY)
    url = f"http://127.0.0.1:{server.server_port}"
    assert told == [f"tracker=wandb: {url} does not answer: the table samples of step 1 is left out"]
    sent = json.dumps(Server.received)
    assert "rewards/margins" in sent and "table-file" not in sent


def test_a_server_that_refuses_the_run_leaves_it_offline(
    start: Callable[..., Trackers], wandb_home: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo_cli.trackers.wandb.PATIENCE", 0.5)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free_port()}")
    told: list[str] = []
    trackers = start({"wandb": options("wandb", mode="online")}, warnings=told)
    trackers.record(train(0))
    trackers.finish(SUMMARY)
    [line] = told
    assert line.startswith("tracker=wandb: offline (")
    folder = Path(line.rpartition(" ")[2])
    [file] = folder.glob("*.wandb")
    assert [items(row.history.item)["loss"] for row in wandb_records(file) if row.HasField("history")] == [1.0]


def test_a_server_that_goes_away_neither_stops_nor_holds_the_run(
    start: Callable[..., Trackers], server: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo_cli.trackers.wandb.PATIENCE", 3)
    told: list[str] = []
    trackers = start({"wandb": options("wandb")}, warnings=told)
    server.shutdown()
    server.server_close()
    trackers.record(train(0))
    trackers.finish(SUMMARY)
    [folder] = (tmp_path / "run" / "wandb").glob("run-*")
    assert told == [
        f"tracker=wandb: failed and is off (the server has not taken everything; upload with: wandb sync {folder})"
    ]


def test_when_the_process_of_wandb_dies_the_run_goes_on_without_it(tmp_path: Path, wandb_home: None) -> None:
    ended = subprocess.run([sys.executable, "-c", KILLED, tmp_path], capture_output=True, text=True, check=True)
    assert ended.stderr == ""
    [offline, failed, last] = ended.stdout.splitlines()
    assert offline.startswith("tracker=wandb: offline (")
    assert (failed, last) == ("tracker=wandb: failed and is off (Connection lost)", "done")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_server_is_reachable_whatever_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class NotFound(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), NotFound) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert reachable(f"http://127.0.0.1:{server.server_port}")
        thread.join()
    assert not reachable(f"http://127.0.0.1:{free_port()}", seconds=0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection and says nothing
        assert not reachable(f"http://127.0.0.1:{silent.getsockname()[1]}", seconds=0.2)


class Toy(Tracker):
    """A tracker in few lines, without tables: a text file in the run directory."""

    package = "json"

    def __init__(self, options: Any, start: Start) -> None:
        self.file = start.directory / options["file"]
        self._add(f"{start.name} {start.config['beta']} {start.resumed_at}")

    def record(self, step: int, metrics: dict[str, float]) -> None:
        self._add(f"{step} {metrics}")

    def alarm(self, step: int, name: str, text: str) -> None:
        self._add(f"{step} {name}: {text}")

    def finish(self, step: int, summary: dict[str, Any]) -> None:
        self._add(f"{step} {summary['status']}")

    def close(self) -> None:
        self._add("closed")

    def _add(self, line: str) -> None:
        with self.file.open("a") as file:
            file.write(line + "\n")


def test_a_tracker_is_added_with_a_class_and_an_entry(
    start: Callable[..., Trackers], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TRACKERS, "toy", Toy)
    check_installed(["toy"])
    trackers = start({"toy": {"file": "toy.txt"}})
    trackers.record({"step": 0, "split": "train", "loss": 0.5, "alarms": {"drift": "far"}})
    trackers.record({"step": 0, "split": "eval", "loss": 0.25})
    trackers.table(0, "samples", COLUMNS, ROWS)
    trackers.finish({"status": "stopped"})
    trackers.record(train(1))  # closed: goes nowhere
    assert (tmp_path / "run" / "toy.txt").read_text().splitlines() == [
        "demo 0.1 None", "0 {'loss': 0.5}", "0 drift: far", "0 {'eval/loss': 0.25}", "0 stopped", "closed",
    ]  # fmt: skip


class Broken(Toy):
    def record(self, step: int, metrics: dict[str, float]) -> None:
        if step == 1:
            raise OSError(28, "No space left\n\x1b[31m on device")
        super().record(step, metrics)

    def table(self, step: int, name: str, columns: list[str], rows: Any) -> None:
        raise RuntimeError(f"no {name} today")


def test_a_tracker_that_fails_warns_once_and_the_others_go_on(
    start: Callable[..., Trackers], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TRACKERS, "broken", Broken)
    told: list[str] = []
    trackers = start({"broken": {"file": "toy.txt"}, "tensorboard": options("tensorboard")}, warnings=told)
    for step in range(4):
        trackers.record(train(step))
    trackers.finish(SUMMARY)
    assert told == ["tracker=broken: failed and is off ([Errno 28] No space left)"]
    assert (tmp_path / "run" / "toy.txt").read_text().splitlines()[-1] == "closed"
    assert [step for step, _ in scalars(events(tmp_path / "run" / "tensorboard"), "loss")] == [0, 1, 2, 3]


def test_a_tracker_that_fails_in_a_table_warns_once_and_the_others_go_on(
    start: Callable[..., Trackers], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TRACKERS, "broken", Broken)
    told: list[str] = []
    trackers = start({"broken": {"file": "toy.txt"}, "tensorboard": options("tensorboard")}, warnings=told)
    trackers.record(train(0))
    for step in range(3):
        trackers.table(step, "samples", COLUMNS, ROWS)
    trackers.finish(SUMMARY)
    assert told == ["tracker=broken: failed and is off (no samples today)"]
    assert (tmp_path / "run" / "toy.txt").read_text().splitlines()[-1] == "closed"
    assert [step for step, _ in texts(events(tmp_path / "run" / "tensorboard"), "samples")] == [0, 1, 2]


def test_a_full_disk_under_tensorboard_warns_once(start: Callable[..., Trackers]) -> None:
    told: list[str] = []
    trackers = start({"tensorboard": options("tensorboard")}, warnings=told)
    writer: Any = trackers._open["tensorboard"]._writer  # type: ignore[attr-defined]
    writer.close()
    with open("/dev/full", "wb", buffering=0) as full:
        writer._writer = full
        for step in range(3):
            trackers.record(train(step))
        trackers.finish(SUMMARY)
    assert told == ["tracker=tensorboard: failed and is off ([Errno 28] No space left on device)"]


def test_a_folder_that_cannot_be_made_and_a_package_that_cannot_be_imported_warn_once(
    start: Callable[..., Trackers], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wandb_home: None
) -> None:
    (tmp_path / "run" / "tensorboard").write_text("in the way")
    monkeypatch.setitem(sys.modules, "wandb", None)
    told: list[str] = []
    trackers = start({"tensorboard": options("tensorboard"), "wandb": options("wandb")}, warnings=told)
    trackers.record(train(0))
    trackers.finish(SUMMARY)
    folder = tmp_path / "run" / "tensorboard"
    assert told == [
        f"tracker=tensorboard: failed and is off ([Errno 17] File exists: '{folder}')",
        "tracker=wandb: failed and is off (import of wandb halted; None in sys.modules)",
    ]


def test_a_package_that_is_not_installed_is_a_mistake_found_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_installed([])
    check_installed(["tensorboard", "wandb"])
    with pytest.raises(ConfigError) as refused:
        check_installed(["tensorboard", "tensorbored"])
    assert str(refused.value) == "tracker=tensorbored: no such tracker; there are tensorboard, wandb, trackio"
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError) as missing:
        check_installed(["tensorboard", "wandb"])
    message = "tracker=wandb: the package wandb is not installed; pip install 'dpo-cli[wandb]'"
    assert str(missing.value) == message
    # A folder wandb/ of earlier runs in the current directory is importable, and not the package.
    monkeypatch.delitem(sys.modules, "wandb")
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ConfigError) as folder:
        check_installed(["wandb"])
    assert str(folder.value) == message


def test_no_tracker_leaves_no_file(start: Callable[..., Trackers], tmp_path: Path) -> None:
    trackers = start({})
    trackers.record(train(0))
    trackers.finish(SUMMARY)
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("stored", ["", "[]", "{}", '{"id": "../../up", "name": "x"}', '{"id": 5, "name": "x"}'])
def test_a_damaged_trackers_json_starts_a_new_run_and_says_so(
    start: Callable[..., Trackers], tmp_path: Path, stored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TRACKERS, "toy", Toy)
    path = tmp_path / "run" / "trackers.json"
    path.write_text(stored)
    told: list[str] = []
    start({"toy": {"file": "toy.txt"}}, resumed_at=3, warnings=told)
    assert told == [f"{path}: cannot be read; the trackers start a new run"]
    first = json.loads(path.read_text())
    start({"toy": {"file": "toy.txt"}}, resumed_at=3)
    assert json.loads(path.read_text()) == first
    start({"toy": {"file": "toy.txt"}})
    assert json.loads(path.read_text())["id"] != first["id"]


def test_importing_the_room_imports_no_tracker_and_no_torch() -> None:
    code = (
        "import sys, dpo_cli.trackers.trackers; print({'torch', 'tensorboard', 'wandb', 'trackio'} & set(sys.modules))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "set()\n"


def test_every_tracker_has_a_yaml_and_several_compose_into_one_mapping() -> None:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    names = {file.stem for file in CONF.glob("*.yaml")}
    assert names == {"none", *room.TRACKERS}
    with initialize_config_dir(str(CONF.parent), version_base="1.3"):
        for words, expected in (
            (["+tracker=none"], {}),
            (["+tracker=wandb", "tracker.wandb.project=x"], {"wandb": options("wandb", project="x")}),
            (["+tracker=[tensorboard,trackio]"], {name: options(name) for name in ("tensorboard", "trackio")}),
        ):
            composed = OmegaConf.to_container(compose(config_name=None, overrides=words))
            assert composed.get("tracker", {}) == expected  # type: ignore[union-attr]
