"""Running again: a proof that resume is exact, replays that say what differs, the best checkpoint kept."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ended, records, sample_rows, tiny_words, write_jsonl

from dpo_cli.commands import verify_resume
from dpo_cli.errors import StorageError
from dpo_cli.runs.checkpoint import ResolvedSettings, checkpoints, read_state
from dpo_cli.runs.manifest import settings_in
from dpo_cli.runs.replay import determinism, differences
from dpo_cli.storage.durable import sweep, write_folder, write_whole
from dpo_cli.storage.line_log import MetricsLog

Command = Callable[..., Ended]


def words(pairs: Path, folder: Path, *more: str) -> list[str]:
    return [*tiny_words(pairs, folder), *more]


# verify_resume


def test_verify_resume_proves_it_and_leaves_nothing(
    command: Command, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    ended = command("dpo-train", *words(pairs_file, tmp_path / "run", "verify_resume=true", "lora.dropout=0.1"))
    assert ended.code == 0, ended.err
    assert ended.out.splitlines()[-1].startswith(
        "resume is exact here: weights, optimizer, random states and 5 lines of metrics are the same to the last bit"
    )
    assert not (tmp_path / "run").exists() and not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize("lost", ["set_rng_states", "_restore_optimizer"])
def test_verify_resume_notices_what_a_resume_forgets(
    command: Command, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    from dpo_cli.runs import checkpoint
    from dpo_cli.training import start

    monkeypatch.setattr(start if lost == "set_rng_states" else checkpoint, lost, lambda *_: None)
    ended = command("dpo-train", *words(pairs_file, tmp_path / "run", "verify_resume=true", "lora.dropout=0.1"))
    assert ended.code == 4
    assert "verify_resume: not exact on this machine: adapter_model.safetensors is off by up to " in ended.err
    assert "metrics.jsonl line 4: " in ended.err


def test_verify_resume_is_no_resume_and_no_dry_run(command: Command, pairs_file: Path, tmp_path: Path) -> None:
    for other in ("resume=auto", "dry_run=true"):
        ended = command("dpo-train", *words(pairs_file, tmp_path / "run", "verify_resume=true", other))
        assert ended.code == 2 and "leave resume and dry_run out" in ended.err


def test_the_steps_to_verify_hold_an_evaluation_and_half_a_window() -> None:
    assert verify_resume.STOP < verify_resume.STEPS - 1 < verify_resume.STEPS


# replay


def test_a_replay_comes_to_the_same_weights_and_says_so(command: Command, pairs_file: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    assert command("dpo-train", *words(pairs_file, first, "beta=0.3", "seed=5")).code == 0
    ended = command("dpo-train", f"replay={first}", f"output_dir={tmp_path / 'again'}")
    assert ended.code == 0, ended.err
    assert f"replay of {first}: versions, device, data and model are the same" in ended.out
    assert f"the same weights as {first} (sha256 " in ended.out
    names = [run / "final" / "adapter_model.safetensors" for run in (first, tmp_path / "again")]
    assert names[0].read_bytes() == names[1].read_bytes()
    assert "beta: 0.3" in (tmp_path / "again" / "config.yaml").read_text()


def test_a_replay_says_what_differs(command: Command, tmp_path: Path) -> None:
    pairs = write_jsonl(tmp_path / "pairs.jsonl", sample_rows(20))
    first = tmp_path / "first"
    assert command("dpo-train", *words(pairs, first)).code == 0
    manifest = json.loads((first / "manifest.json").read_text())
    manifest["packages"]["torch"] = "1.0"
    (first / "manifest.json").write_text(json.dumps(manifest))
    write_jsonl(pairs, sample_rows(21)[1:])
    ended = command("dpo-train", f"replay={first}", f"output_dir={tmp_path / 'again'}")
    assert ended.code == 0, ended.err
    assert f"warning: different from when the run started: packages.torch: 1.0 -> {torch.__version__}" in ended.out
    assert "warning: different from when the run started: data_fingerprint: " in ended.out
    assert f"other weights than {first}" in ended.out


def test_a_replay_takes_what_was_measured_then_and_no_other_dial(
    command: Command, pairs_file: Path, tmp_path: Path
) -> None:
    first = tmp_path / "first"
    assert command("dpo-train", *words(pairs_file, first, "model.dtype=auto")).code == 0
    manifest = json.loads((first / "manifest.json").read_text())
    manifest["dtype"], manifest["batches"] = "float32", {"way": "mask", "token_budget": 321}
    (first / "manifest.json").write_text(json.dumps(manifest))
    ended = command("dpo-train", f"replay={first}", f"output_dir={tmp_path / 'again'}", "save_every=1")
    assert ended.code == 0, ended.err
    state = read_state(checkpoints(tmp_path / "again" / "checkpoints")[-1])
    assert state.settings == ResolvedSettings("cpu", "float32", "packed_mask", 321)
    refused = command("dpo-train", f"replay={first}", "beta=0.5")
    assert refused.code == 2
    assert refused.err.startswith(
        f"error: beta=0.5: replay={first} runs a config as it was; with it go data.max_bad_fraction, data.processes, "
        "data.cache_gib, reference.cache, reference.cache_gib, engine.processes, engine.timeout, engine.cpu_offload, "
        "tracker, "
    )


def test_a_replay_that_was_stopped_goes_on(command: Command, pairs_file: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    assert command("dpo-train", *words(pairs_file, first, "save_every=1")).code == 0
    assert command("dpo-train", f"replay={first}", f"output_dir={again}").code == 0
    shutil.rmtree(again / "final")
    shutil.rmtree(again / "checkpoints" / "step-00000003")
    ended = command("dpo-train", f"replay={first}", f"output_dir={again}", "resume=auto")
    assert ended.code == 0 and "at step 2" in ended.out and f"the same weights as {first}" in ended.out


def test_what_decides_a_runs_bytes_is_compared_and_nothing_else() -> None:
    was = {
        "packages": {"torch": "1"},
        "hardware": {"threads": 2, "device": "cpu"},
        "model": {"digest": "a", "path": "x"},
    }
    now = {
        "packages": {"torch": "2"},
        "hardware": {"threads": 1, "device": "cuda"},
        "model": {"digest": "b", "path": "y"},
    }
    assert differences({**was, "argv": []}, {**now, "argv": ["x"]}) == [
        "hardware.threads: 2 -> 1", "model.digest: a -> b", "packages.torch: 1 -> 2",
    ]  # fmt: skip
    assert differences(was, was) == []


@pytest.mark.parametrize("manifest", [{}, {"batches": 3}, {"batches": {"way": "segments"}}, {
    "device": "cpu", "dtype": "load", "batches": {"way": "segments", "token_budget": 3}}, {
    "device": "cpu", "dtype": "float32", "batches": {"way": "segments", "token_budget": "3"}}])  # fmt: skip
def test_a_manifest_that_says_nothing_of_use_settles_nothing(manifest: dict[str, Any]) -> None:
    assert settings_in(manifest) is None


# deterministic


def test_deterministic_holds_within_a_run_and_not_after_it(
    command: Command, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpo_cli.training import runner

    original, seen = runner.train_step, []

    def watched(*arguments: Any) -> None:
        seen.append(torch.are_deterministic_algorithms_enabled())
        original(*arguments)

    monkeypatch.setattr(runner, "train_step", watched)
    assert command("dpo-train", *words(pairs_file, tmp_path / "run", "deterministic=true")).code == 0
    assert seen == [True] * 3 and not torch.are_deterministic_algorithms_enabled()
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["deterministic"] is True
    with determinism(False):
        assert not torch.are_deterministic_algorithms_enabled()


# Checkpoints: the best is kept


def test_the_checkpoint_with_the_lowest_held_out_loss_is_kept_and_named(
    command: Command, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpo_cli.objectives import preference
    from dpo_cli.training import records as recording

    original = preference.pair_metrics

    def worse_after_two(*arguments: Any) -> dict[str, torch.Tensor]:
        found = original(*arguments)
        return {**found, "loss": found["loss"] + abs(len(seen_steps) - 2)}

    seen_steps: list[int] = []
    score = recording.score_pairs
    monkeypatch.setattr(preference, "pair_metrics", worse_after_two)
    monkeypatch.setattr(recording, "score_pairs", lambda run, *rest: (seen_steps.append(1), score(run, *rest))[1])
    more = ("max_steps=6", "save_every=1", "eval_every=1", "keep_checkpoints=1")
    ended = command("dpo-train", *words(pairs_file, tmp_path / "run", *more))
    assert ended.code == 0, ended.err
    kept = checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name for path in kept] == ["step-00000002", "step-00000006"]
    losses = {line["step"]: line["loss"] for line in records(tmp_path / "run") if line["split"] == "eval"}
    assert min(losses, key=lambda step: losses[step]) == 2
    assert f"best     {kept[0]}: held-out loss " in ended.out


# Files that are whole or not there


def test_a_write_that_fails_leaves_the_earlier_file_and_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_whole(tmp_path / "a.json", b"first")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "a.json", b"second")
    with pytest.raises(OSError, match="No space"):
        write_folder(tmp_path / "folder", lambda beside: (beside / "x").write_text("y"))  # type: ignore[arg-type, return-value]
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_bytes() == b"first"


def test_a_sweep_takes_only_what_is_unfinished(tmp_path: Path) -> None:
    for name in (".tmp-manifest.json", "file", ".lock", ".tmp-of-somebody-else"):
        (tmp_path / name).write_text("x")
    for name in (".tmp-step-00000002-99", ".tmp-removed-step-00000001", ".tmp-final-7"):
        (tmp_path / name).mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_text("x")
    (tmp_path / ".tmp-config.yaml").symlink_to(tmp_path / "elsewhere")
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".lock",
        ".tmp-of-somebody-else",
        "elsewhere",
        "file",
    ]
    assert (tmp_path / "elsewhere" / "precious").exists()


def test_metrics_wait_while_there_is_no_room_and_are_cut_to_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def line(step: int) -> dict[str, Any]:
        return {"step": step, "split": "train", "loss": 0.5}

    log = MetricsLog(tmp_path / "metrics.jsonl")
    assert log.append(line(0)) is None
    room = log._write

    def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log, "_write", full)
    assert "its lines wait in memory" in str(log.append(line(1)))
    assert log.append(line(2)) is None  # said once
    with pytest.raises(StorageError, match="No space left"):
        log.flush()
    assert [record["step"] for record in log.read()] == [0, 1, 2] and log.records == 3
    monkeypatch.setattr(log, "_write", room)
    log.flush()
    with log.path.open("ab") as file:
        file.write(b'{"step": 3')  # a kill in the middle of a line
    again = MetricsLog(log.path)
    again.cut(2)
    assert [json.loads(text) for text in log.path.read_text().splitlines()] == [line(0), line(1)] and again.records == 2


def test_values_of_one_run_alone_start_at_exactly_zero_and_go_on_with_it(
    command: Command, pairs_file: Path, tmp_path: Path, cache: Path
) -> None:
    files = sorted((cache / "reference").glob("*")) if (cache / "reference").exists() else []
    run, more = tmp_path / "run", ("reference.cache=run", "model.dtype=bfloat16", "save_every=1", "seed=11")
    ended = command("dpo-train", *words(pairs_file, run, *more))
    assert ended.code == 0 and "computed once, for this run alone" in ended.out
    assert records(run)[0]["rewards/margins"] == 0.0
    assert (sorted((cache / "reference").glob("*")) if (cache / "reference").exists() else []) == files
    before = (run / "final" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / "step-00000003")
    assert command("dpo-train", *words(pairs_file, run, *more, "resume=auto")).code == 0
    assert (run / "final" / "adapter_model.safetensors").read_bytes() == before


# What a stop or a change must not do


def test_a_run_that_has_learned_its_pairs_by_heart_can_be_resumed(
    command: Command, pairs_file: Path, tmp_path: Path
) -> None:
    """Hinge is flat beyond its margin: no gradient is left, and that is no fault."""
    run, more = tmp_path / "run", ("loss=hinge", "beta=1", "optimizer.lr=0.3", "max_steps=12", "save_every=8")
    assert command("dpo-train", *words(pairs_file, run, *more)).code == 0
    assert records(run)[-2]["loss"] == 0.0
    before = (run / "final" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    ended = command("dpo-train", *words(pairs_file, run, *more, "resume=auto"))
    assert ended.code == 0, ended.err
    assert (run / "final" / "adapter_model.safetensors").read_bytes() == before


def test_the_best_checkpoint_stays_the_best_where_a_stop_fell_into_its_evaluation(
    command: Command, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import signal

    from dpo_cli.training import records as recording

    more = ("optimizer.lr=0.3", "optimizer.warmup_steps=0", "max_steps=6", "save_every=2", "eval_every=2")
    more = (*more, "keep_checkpoints=1")
    assert command("dpo-train", *words(pairs_file, tmp_path / "straight", *more)).code == 0
    kept = [path.name for path in checkpoints(tmp_path / "straight" / "checkpoints")]
    original, seen = recording.score_pairs, []

    def stopped(*arguments: Any) -> Any:
        seen.append(1)
        if len(seen) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(recording, "score_pairs", stopped)
    for stop_at in (1, 2):
        seen.clear()
        run = tmp_path / str(stop_at)
        assert command("dpo-train", *words(pairs_file, run, *more)).code == 75
        assert command("dpo-train", *words(pairs_file, run, *more, "resume=auto")).code == 0
        assert [path.name for path in checkpoints(run / "checkpoints")] == kept


def test_changes_on_resume_are_kept_refused_or_said(command: Command, pairs_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert command("dpo-train", *words(pairs_file, run, "max_steps=6")).code == 0
    finished = command("dpo-train", *words(pairs_file, run, "max_steps=9", "resume=auto"))
    assert finished.code == 0
    assert "max_steps: 6 -> 9 has no effect: a finished run is not trained on" in finished.out
    shutil.rmtree(run / "final")
    lower = command("dpo-train", *words(pairs_file, run, "max_steps=3", "resume=auto"))
    assert lower.code == 4 and "is at step 6, and the run now ends at 3" in lower.err
    assert command("dpo-train", *words(pairs_file, run, "max_steps=8", "resume=auto")).code == 0
    assert "max_steps: 8" in (run / "config.yaml").read_text()
    again = command("dpo-train", f"replay={run}", f"output_dir={tmp_path / 'again'}")
    assert "warning: different from when the run started: it was resumed with max_steps: 6 -> 8" in again.out


@pytest.mark.parametrize("key", ["output_dir", "resume", "replay"])
def test_an_empty_name_is_no_place(command: Command, key: str) -> None:
    ended = command("dpo-train", f"{key}=")
    assert ended.code == 2 and f"{key}=" in ended.err and "is empty" in ended.err


def test_a_sweep_goes_on_when_its_reader_goes_away(pairs_file: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    sweep = [word for word in words(pairs_file, tmp_path) if not word.startswith("output_dir")]
    program = [
        sys.executable,
        "-c",
        "from dpo_cli.cli import train; train()",
        "-m",
        *sweep,
        "max_steps=1",
        "beta=0.1,0.2",
    ]
    with subprocess.Popen(program, stdout=subprocess.PIPE, cwd=tmp_path, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline().startswith("run 1/2: ")
        child.stdout.close()
        assert child.wait() == 0
    assert len(list((tmp_path / "outputs").glob("multirun/*/*/final"))) == 2


def test_a_sweep_shows_its_configs_and_stops(command: Command, pairs_file: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    sweep = [word for word in words(pairs_file, tmp_path) if not word.startswith("output_dir")]
    program = [
        sys.executable,
        "-c",
        "from dpo_cli.cli import train; train()",
        "-m",
        *sweep,
        "beta=0.1,0.2",
        "--print-config",
    ]
    done = subprocess.run(program, capture_output=True, cwd=tmp_path, text=True, check=True)
    assert done.stdout.count("\nobjective: dpo\n") == 2 and not (tmp_path / "outputs").exists()
