"""Shared by all tests: no network, a cache folder of their own, tiny real objects."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["OMP_NUM_THREADS"] = "1"  # tiny tensors: a second thread only waits

import pytest
from hypothesis import HealthCheck, settings

# Property tests: few cases, the same in every run. `thorough` draws many new ones: make test-thorough, or
# HYPOTHESIS_PROFILE=thorough, or pytest --hypothesis-profile=thorough. Slowness is no failure.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("quick", UNHURRIED, max_examples=50, derandomize=True)
settings.register_profile("thorough", UNHURRIED, max_examples=1000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


def share(part: float) -> settings:
    """Examples of a property, as a part of the profile's: fewer where each is slow, more where most say little."""
    return settings(max_examples=max(1, round(part * settings.default.max_examples)))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built-in models are written here, not into the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["DPO_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_path() -> str:
    """The folder of the tiny random Llama."""
    from dpo_cli.models.builtin import TINY, resolve_builtin

    return resolve_builtin(TINY, print)[0]


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_path: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_path)


TOPICS = ["cats", "rain", "bread", "the moon", "a bicycle", "music", "tea", "old maps", "ants", "a lighthouse"]


def sample_rows(number: int) -> list[dict[str, str]]:
    """Rows with texts of differing lengths, all distinct."""
    return [
        {
            "prompt": f"Tell me {'something ' * (row % 3)}about {TOPICS[row % 10]}, number {row}.",
            "chosen": f"Here is {row}: {TOPICS[row % 10]} are fine." + " Yes." * (row % 4),
            "rejected": f"No {row}." + " I would rather not say." * (row % 3),
        }
        for row in range(number)
    ]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "pairs.jsonl", sample_rows(20))


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """Runs a command of the program in this process, from the first word to the exit code."""
    from dpo_cli import cli

    def run(name: str, *words: object) -> Ended:
        entry = {
            "dpo-train": cli.train,
            "dpo-eval": cli.evaluate,
            "dpo-sample": cli.sample,
            "dpo-label": cli.label,
            "dpo-rank": cli.rank,
            "dpo-data": cli.data,
            "dpo-compare": cli.compare,
            "dpo-export": cli.export,
        }[name]
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        capsys.readouterr()
        watched = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)}
        try:
            with pytest.raises(SystemExit) as ended:
                entry()
        finally:  # a command that was stopped leaves them ignored, since its process ends
            for number, handler in watched.items():
                signal.signal(number, handler)
        shown = capsys.readouterr()
        return Ended(int(ended.value.code or 0), shown.out, shown.err)

    return run


@pytest.fixture
def runs_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs of a sweep begin in this process, which has imported everything, rather than in one of their own."""
    from dpo_cli import cli
    from dpo_cli.commands import sweep

    def run(words: list[str]) -> int:
        with monkeypatch.context() as within, pytest.raises(SystemExit) as ended:
            within.setattr(sys, "argv", ["dpo-train", *words])
            cli.train()
        return int(ended.value.code or 0)

    monkeypatch.setattr(sweep, "run_alone", run)


@pytest.fixture
def trained(command: Callable[..., Ended], pairs_file: Path, tmp_path: Path) -> Callable[..., Path]:
    """Trains the tiny model for a few steps and returns the run directory."""

    def run(name: str = "run", *words: object) -> Path:
        folder = tmp_path / name
        ended = command("dpo-train", *tiny_words(pairs_file, folder), *words)
        assert ended.code == 0, ended.err
        return folder

    return run


@dataclass
class Assembled:
    """A run of the tiny model, put together and not yet started."""

    context: Any
    learner: Any
    material: Any
    choices: Any
    progress: Any
    recorder: Any

    def step(self, batch: Any) -> None:
        """One optimizer step."""
        from dpo_cli.training.runner import train_step

        train_step(self.context, self.learner, self.progress, batch, self.recorder)


@pytest.fixture
def assembled(pairs_file: Path, tmp_path: Path) -> Callable[..., Assembled]:
    """Puts a run of the tiny model together; its reference is asked in every step."""

    def run(*words: str) -> Assembled:
        return assemble(*tiny_words(pairs_file, tmp_path / "assembled"), "reference.cache=off", *words)

    return run


def assemble(*words: str) -> Assembled:
    """The parts of a run with these words, in its output_dir."""
    from dpo_cli.config.composition import composed, parse_overrides
    from dpo_cli.config.schema import RunConfig, run_config
    from dpo_cli.console.reporter import Reporter
    from dpo_cli.engine.engine import SINGLE
    from dpo_cli.runs.run_directory import RunDirectory
    from dpo_cli.trackers.trackers import Trackers
    from dpo_cli.training.build import build
    from dpo_cli.training.parts import Context, Progress
    from dpo_cli.training.records import Recorder

    config = run_config(composed("train", parse_overrides(list(words)), RunConfig).container)
    directory = RunDirectory(Path(config.output_dir))
    directory.create()
    context = Context(config, directory, Reporter(), SINGLE, lambda: None)
    learner, material, choices = build(context, None, None)
    progress = Progress()
    return Assembled(
        context,
        learner,
        material,
        choices,
        progress,
        Recorder(context, learner, material, progress, Trackers(lambda _: None)),
    )


def stop_in(monkeypatch: pytest.MonkeyPatch, where: int | str) -> None:
    """Have SIGTERM arrive in the micro-batch with that number, from 1, or in the first evaluation."""
    from dpo_cli.training import records, runner

    module, name = (records, "score_pairs") if where == "evaluation" else (runner, "one_forward_pass")
    original, seen = getattr(module, name), []

    def interrupted(*arguments: Any) -> Any:
        seen.append(1)
        if len(seen) == (1 if where == "evaluation" else where):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(module, name, interrupted)


def tiny_words(pairs: Path, folder: Path) -> list[str]:
    """The words of a short run of the tiny model in float32."""
    return [
        "model=tiny",
        "model.dtype=float32",
        "data=jsonl",
        f"data.train={pairs}",
        "data.eval_fraction=0.3",
        "batch_size=4",
        "max_steps=3",
        "optimizer.lr=1e-3",
        "samples.max_new_tokens=4",
        "page=false",
        f"output_dir={folder}",
    ]


def run_of(*words: str) -> Path:
    """A run of dpo-train with these words, in this process; returns its directory."""
    from dpo_cli.config.composition import composed_run, parse_overrides
    from dpo_cli.config.schema import run_config
    from dpo_cli.console.reporter import Reporter
    from dpo_cli.training.runner import train

    reporter = Reporter(io.StringIO())
    try:
        return train(run_config(composed_run(parse_overrides(list(words))).container), reporter)
    finally:
        reporter.close()


def records(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def must_not_skip(report: Any) -> bool:
    """Whether a report is a skip that counts as a failure: with $DPO_CI set, any but for a missing GPU."""
    if not (report.skipped and os.environ.get("DPO_CI")) or hasattr(report, "wasxfail"):
        return False
    return not any(word in str(report.longrepr[2]) for word in ("GPU", "CUDA"))


def fail_if_skipped(report: Any) -> Any:
    """A test that continuous integration skips is no test."""
    if must_not_skip(report):
        report.outcome, report.longrepr = "failed", f"{report.longrepr[2]}; with DPO_CI set a skip is a failure"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Any:
    return fail_if_skipped((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Any:
    return fail_if_skipped((yield))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The fault tests end with a table: what was tried, what was survived."""
    harness = sys.modules.get("harness")
    if harness is not None and harness.LEDGER.tried:
        terminalreporter.section("faults")
        for line in harness.closing_table():
            terminalreporter.line(line)


def both_at_once(code: str, path: Path) -> None:
    """Run code in two processes, given `path` and 1 or 2: each prints `ready`, and goes on when both have."""
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(path), str(who)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for who in (1, 2)
    ]  # fmt: skip
    assert [writer.stdout.readline() for writer in writers if writer.stdout] == ["ready\n", "ready\n"]
    for writer in writers:  # from here on both write at once
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    assert [writer.communicate(timeout=120) and writer.returncode for writer in writers] == [0, 0]
