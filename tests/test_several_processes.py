"""dpo-eval, dpo-sample, dpo-label and dpo-rank on several processes: what they write is what one process writes."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ended, run_of, sample_rows, tiny_words, write_jsonl
from tiny_models import CPU, SHAPE

from dpo_cli.engine.ddp import DdpEngine
from dpo_cli.engine.engine import SINGLE, SingleEngine, in_turns
from dpo_cli.engine.ranks import Place
from dpo_cli.engine.table import open_data_parallel
from dpo_cli.errors import ConfigError, StoppedError
from dpo_cli.labelling.classifier import scores
from dpo_cli.storage.job_log import job_log_path

Command = Callable[..., Ended]
ROOT = Path(__file__).parent.parent
TIMINGS = {"seconds", "pairs_per_second"}
TWO = ("device=cpu", "processes=2")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    folder = tmp_path_factory.mktemp("run")
    pairs = write_jsonl(folder / "pairs.jsonl", sample_rows(20))
    return run_of(*tiny_words(pairs, folder / "run"), "optimizer.lr=1e-2", "save_every=2")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"prompt": row["prompt"]} for row in sample_rows(7)]
    return write_jsonl(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", rows)


def started(command: str, *words: object, worker: str | None = None) -> subprocess.CompletedProcess[str]:
    """A command of the program, which starts two workers; `worker` is what they run in its place."""
    code = f"from dpo_cli import cli; cli.{command}()"
    if worker is not None:
        code = "import sys; from dpo_cli.engine.workers import start_workers; "
        code += f"sys.exit(start_workers([sys.executable, '-c', {worker!r}, *sys.argv[1:]], 2, print))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words), *TWO], env=env, capture_output=True, text=True, timeout=300
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def same(ours: Any, theirs: Any, off: float = 2e-5) -> None:
    """Equal up to rounding; keys and order too."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for key in ours.keys() - TIMINGS:
            same(ours[key], theirs[key], off)
    elif isinstance(ours, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            same(one, other, off)
    else:
        assert ours == (pytest.approx(theirs, abs=off) if isinstance(ours, float) else theirs)


# Commands


def test_an_evaluation_on_two_processes_is_that_on_one(command: Command, run: Path, tmp_path: Path) -> None:
    # More pairs than a window holds; the reference has seen none of them, so the ranks fill its cache together.
    held_out = write_jsonl(
        tmp_path / "new.jsonl", [{**row, "prompt": f"New: {row['prompt']}"} for row in sample_rows(70)]
    )
    words = (f"checkpoint={run}", "data=jsonl", f"data.eval={held_out}", f"output_dir={tmp_path}", "samples=18",
             "max_new_tokens=8")  # fmt: skip
    two = started("evaluate", *words, "name=two")
    assert two.returncode == 0, two.stderr
    assert "reference log-probs: those of 0 of 70 pairs were in " in two.stdout
    cached = command("dpo-eval", *words, "name=cached")
    assert "reference log-probs: those of 70 of 70 pairs were in " in cached.out
    one = command("dpo-eval", *words, "name=one", "reference_cache=off")
    assert one.code == 0, one.err
    same(lines(tmp_path / "two/pairs.jsonl"), lines(tmp_path / "one/pairs.jsonl"))
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("two", "one")]
    same(*reports, off=1e-3)  # calibration and intervals divide by small numbers
    answers, of_one = (
        text[text.index("greedy answers to 18 ") :].split("report  ")[0] for text in (two.stdout, one.out)
    )
    assert answers == of_one


STOPPING = """
import os, signal, sys
from dpo_cli import cli
from dpo_cli.storage.job_log import JobLog

append = JobLog.append

def append_and_stop(self, part):
    append(self, part)
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)

JobLog.append = append_and_stop
cli.sample()
"""


def test_samples_of_two_processes_that_were_stopped_and_resumed_on_one_are_those_of_one(
    command: Command, prompts: Path, tmp_path: Path
) -> None:
    output, alone = tmp_path / "two.jsonl", tmp_path / "one.jsonl"
    words = ["model=tiny", "model.dtype=float32", "max_new_tokens=8", f"prompts={prompts}", "device=cpu"]
    ours = [*words, f"output={output}", "batch_size=4"]
    stopped = started("sample", *ours, worker=STOPPING)
    assert stopped.returncode == 75, stopped.stderr
    assert stopped.stderr.count("error: ") == 1
    ends = f"error: stopped by SIGTERM; to resume, run the same command with output={output}\n"
    assert stopped.stderr.endswith(ends) and stopped.stdout.count("processes  2 ranks, gloo\n") == 1
    _, *parts = lines(job_log_path(output))
    # 7 prompts in batches of 2 are 4 batches in 2 rounds: the first round is kept, the longest prompts first.
    assert len(parts) == 1 and len(parts[0]["completions"]) == 4 and parts[0]["batch_size"] == 4
    resumed = command("dpo-sample", *ours)
    assert resumed.code == 0 and "resuming: 4 prompts of 7 done" in resumed.out
    assert command("dpo-sample", *words, f"output={alone}").code == 0
    assert lines(output) == lines(alone) and len(lines(alone)) == 7


def test_labels_of_two_processes_are_those_of_one(command: Command, run: Path, prompts: Path, tmp_path: Path) -> None:
    samples = tmp_path / "samples.jsonl"
    rows = [{"prompt": row["prompt"], "responses": [row["chosen"], row["rejected"], f"Well, {row['prompt']}"]}
            for row in sample_rows(70)]  # fmt: skip
    write_jsonl(samples, rows)
    words = (f"samples={samples}", "by=implicit", f"judge={run}")
    two = started("label", *words, f"output={tmp_path / 'two.jsonl'}")
    assert two.returncode == 0, two.stderr
    one = command("dpo-label", *words, f"output={tmp_path / 'one.jsonl'}")
    assert one.code == 0, one.err
    same(lines(tmp_path / "two.jsonl"), lines(tmp_path / "one.jsonl"))
    assert len(lines(tmp_path / "one.jsonl")) == 210
    assert not job_log_path(tmp_path / "two.jsonl").exists()


def test_a_ranking_on_two_processes_is_that_on_one(command: Command, run: Path, prompts: Path, tmp_path: Path) -> None:
    words = (f"checkpoints=[{run}/checkpoints/step-00000002,{run}/final]", f"judge={run}", f"prompts={prompts}",
             "max_new_tokens=8", "prior=1")  # fmt: skip
    two = started("rank", *words, f"output={tmp_path / 'two.json'}")
    assert two.returncode == 0, two.stderr
    one = command("dpo-rank", *words, f"output={tmp_path / 'one.json'}")
    assert one.code == 0, one.err
    same(lines(tmp_path / "two.answers.jsonl"), lines(tmp_path / "one.answers.jsonl"))
    same(*(json.loads((tmp_path / f"{name}.json").read_text()) for name in ("two", "one")))


# What is refused


@pytest.mark.parametrize(
    ("name", "words", "says"),
    [
        ("dpo-label", ["by=rule", "rule=shorter", "processes=2"], "processes=2: by=rule asks no model; leave it out"),
        ("dpo-label", ["by=human", "annotator=a", "processes=2"], "processes=2: by=human asks no model; leave it out"),
        ("dpo-rank", ["processes=2"], "processes=2: games=FILE holds the results already; leave it out"),
        ("dpo-sample", ["processes=0"], "processes=0: must be auto or at least 1"),
        (
            "dpo-sample",
            ["processes=2", "device=cuda:1"],
            "device=cuda:1: is one device, and processes=2 take one each; write device=cuda",
        ),
    ],
)
def test_processes_that_would_do_nothing_are_refused(
    command: Command, prompts: Path, name: str, words: list[str], says: str
) -> None:
    given = {"dpo-label": "samples", "dpo-rank": "games", "dpo-sample": "prompts"}[name]
    ended = command(name, f"{given}={prompts}", *words)
    assert (ended.code, ended.err) == (2, f"error: {says}\n")


def test_more_processes_than_gpus_are_refused_before_they_start(
    command: Command, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    ended = command("dpo-sample", f"prompts={prompts}", "processes=2")
    assert (ended.code, ended.err) == (
        2,
        "error: processes=2: this computer has 1 GPU, and each process takes one\n",
    )


def test_a_launcher_that_started_another_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_data_parallel("auto", "cpu") is SINGLE and open_data_parallel(2, "cpu") is SINGLE
    for name, value in {"RANK": 0, "WORLD_SIZE": 4, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 4, "MASTER_ADDR": "x",
                        "MASTER_PORT": 1}.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ConfigError, match="processes=2: the launcher has started 4 here; leave processes out"):
        open_data_parallel(2, "cpu")


# Sharing


class OneOfTwo(SingleEngine):
    """A rank of two that are threads."""

    alone = False
    world_size = 2

    def __init__(self, rank: int, values: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.values, self.barrier = rank, values, barrier

    def gather(self, value: Any) -> list[Any]:
        self.values[self.rank] = value
        self.barrier.wait(60)
        found = list(self.values)
        self.barrier.wait(60)
        return found


def on_threads(work: Callable[[OneOfTwo], Any]) -> list[Any]:
    """What `work` returns or raises on each of two ranks."""
    values, barrier, ended = [None, None], threading.Barrier(2), [None, None]

    def act(rank: int) -> None:
        try:
            ended[rank] = work(OneOfTwo(rank, values, barrier))
        except Exception as error:
            ended[rank] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=act, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return ended


def test_items_are_taken_in_turns_and_every_rank_knows_all_results() -> None:
    done: list[tuple[int, int]] = []

    def work(engine: OneOfTwo) -> list[list[tuple[int, int]]]:
        return list(in_turns(engine, [1, 2, 3, 4, 5], lambda item: done.append((engine.rank, item)) or item * item))

    squares = [[(1, 1), (2, 4)], [(3, 9), (4, 16)], [(5, 25)]]
    assert on_threads(work) == [squares, squares]
    assert sorted(done) == [(0, 1), (0, 3), (0, 5), (1, 2), (1, 4)]
    assert list(in_turns(SINGLE, [1, 2], lambda item: item * item)) == [[(1, 1)], [(2, 4)]]


def test_a_rank_that_stops_in_the_middle_loses_its_own_item_alone() -> None:
    kept: list[list[Any]] = [[], []]

    def work(engine: OneOfTwo) -> None:
        received = False

        def poll() -> None:
            if any(engine.gather(received)):
                raise StoppedError("stopped")

        def compute(item: int) -> int:
            nonlocal received
            if item == 4:
                received = True
                raise StoppedError("stopped")
            return -item

        for some in in_turns(engine, [1, 2, 3, 4, 5, 6], compute, poll):
            kept[engine.rank] += some

    first, second = on_threads(work)
    assert isinstance(first, StoppedError) and isinstance(second, StoppedError)
    assert kept == [[(1, -1), (2, -2), (3, -3)]] * 2


def test_a_reward_model_of_others_gives_the_scores_of_one_process(tiny_tokenizer: Any) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **{**SHAPE, "vocab_size": len(tiny_tokenizer), "num_labels": 1})
    sequences = [[5 + number % 7, *range(10, 10 + number % 23)] for number in range(40)]  # 3 batches

    def work(engine: SingleEngine) -> list[float]:
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for number, weight in enumerate(model.parameters()):
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)))
        return scores(model, sequences, CPU, engine=engine)

    alone = work(SINGLE)
    assert on_threads(work) == [alone, alone] and len(set(alone)) > 20


def test_ranks_gather_plain_objects() -> None:
    assert SINGLE.gather({"a": 1}) == [{"a": 1}]
    engine = DdpEngine(Place(), "cpu", 30)
    try:
        assert engine.gather([("text", 3)]) == [[("text", 3)]]
        engine.alike({"version": "1"})
    finally:
        torch.distributed.destroy_process_group()
