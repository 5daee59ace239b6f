"""Faults 8 and 9: what is not finite touches no weight; what does not fit into memory is split finer."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ended, records, tiny_words
from harness import LEDGER, before_step, fault, run_words, same_content, start, straight  # noqa: F401
from safetensors.torch import load_file

from dpo_cli.data.batches import SplitByPairs
from dpo_cli.objectives.preference import Preference
from dpo_cli.runs.checkpoint import checkpoints, read_state, validate
from dpo_cli.training import runner

pytestmark = pytest.mark.faults
Command = Callable[..., Ended]
Straight = Callable[..., dict[str, bytes]]


# Fault 8


def steps_begun(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Holds the number of the step under way, from 1; 0 outside of steps, as in the memory probe."""
    original, now = runner.train_step, [0]

    def train_step(context: Any, learner: Any, progress: Any, *more: Any) -> None:
        now[0] = progress.step + 1
        try:
            original(context, learner, progress, *more)
        finally:
            now[0] = 0

    monkeypatch.setattr(runner, "train_step", train_step)
    return now


def poison(monkeypatch: pytest.MonkeyPatch, at: set[int], value: float, where: str) -> None:
    """From within a step, counted from 1: make the loss of its last pair, or a gradient, `value`."""
    original, now = runner.forward_backward, steps_begun(monkeypatch)

    def poisoned(context: Any, learner: Any, batch: Any) -> Any:
        table, names = original(context, learner, batch)
        if now[0] in at:
            if where == "loss":
                table[names.index("loss"), -1] = value
            else:
                learner.trainable[1].grad[0] = value
        return table, names

    monkeypatch.setattr(runner, "forward_backward", poisoned)


def in_forward_backward(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any, Any], Any]) -> None:
    """Have `change(logps, micro_batch)` stand for the policy's log-probs where a step, or the probe, trains on them."""
    score, original, inside = Preference.score, runner.forward_backward, [False]

    def forward_backward(*parts: Any) -> Any:
        inside[0] = True
        try:
            return original(*parts)
        finally:
            inside[0] = False

    def changed(self: Any, policy: Any, micro_batch: Any) -> Any:
        logps = score(self, policy, micro_batch)
        return change(logps, micro_batch) if inside[0] else logps

    monkeypatch.setattr(runner, "forward_backward", forward_backward)
    monkeypatch.setattr(Preference, "score", changed)


WORDS = ["max_steps=6", "save_every=1", "keep_checkpoints=9", "log_every=1", "data.eval_fraction=0"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_ends_the_run_before_the_update_and_is_never_saved(
    command: Command, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, value: float
) -> None:
    poison(monkeypatch, {4}, value, where)
    with fault(8):
        ended = command("dpo-train", *tiny_words(pairs_file, tmp_path / "run"), *WORDS)
        assert ended.code == 5
        assert ended.err.startswith(f"error: step 4: the {where} of rows ") and ended.err.count("\n") == 1
        assert "the weights were not touched. Usual remedies: a smaller optimizer.lr (now 0.0008)" in ended.err
        saved = checkpoints(tmp_path / "run" / "checkpoints")
        assert [path.name for path in saved] == [f"step-0000000{number}" for number in (1, 2, 3)]
        for checkpoint in saved:
            validate(checkpoint)
            assert all(
                tensor.isfinite().all() for tensor in load_file(checkpoint / "adapter_model.safetensors").values()
            )


def test_the_pair_whose_loss_is_not_finite_is_named_and_no_other(
    command: Command, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, now = 7, steps_begun(monkeypatch)

    def for_one_pair(logps: Any, micro_batch: Any) -> Any:
        here = torch.zeros(len(logps), dtype=torch.bool)
        here[[int(unit[0]) for pair, unit in zip(micro_batch.examples, micro_batch.units, strict=True)
              if pair.index == bad and now[0]]] = True  # fmt: skip
        return torch.where(here, torch.nan, logps)

    in_forward_backward(monkeypatch, for_one_pair)
    with fault(8):
        ended = command("dpo-train", *tiny_words(pairs_file, tmp_path / "run"), *WORDS)
        assert ended.code == 5
        assert f"the loss of rows {bad} of the data is not finite (mean loss nan, gradient norm nan)" in ended.err


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_skipped_updates_are_said_counted_and_leave_weights_and_moments_alone(
    command: Command, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    poison(monkeypatch, {3, 5}, float("nan"), where)
    run = tmp_path / "run"
    with fault(8, tries=2):
        ended = command("dpo-train", *tiny_words(pairs_file, run), *WORDS, "non_finite=skip")
        assert ended.code == 0, ended.err
        assert ended.out.count(": its update is skipped") == 2
        assert "2 updates skipped as not finite" in ended.out
        assert json.loads((run / "manifest.json").read_text())["skipped_steps"] == 2
        logged = records(run)
        assert [record["step"] for record in logged] == [0, 1, 2, 4, 6]  # no line without a pair in it
        assert logged[-1]["skipped_steps"] == 2
        assert all(torch.isfinite(torch.tensor(record["loss"])) for record in logged)
        for before, after in ((2, 3), (4, 5)):
            for name in ("adapter_model.safetensors", "optimizer.safetensors"):
                files = [run / "checkpoints" / f"step-0000000{number}" / name for number in (before, after)]
                assert files[0].read_bytes() == files[1].read_bytes(), (name, after)
        moved = [run / "checkpoints" / f"step-0000000{number}" / "adapter_model.safetensors" for number in (5, 6)]
        assert moved[0].read_bytes() != moved[1].read_bytes()


def test_skipping_does_not_go_on_for_ever(
    command: Command, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, set(range(3, 99)), float("nan"), "loss")
    with fault(8):
        words = [*tiny_words(pairs_file, tmp_path / "run"), "max_steps=50", "non_finite=skip"]
        ended = command("dpo-train", *words)
        assert ended.code == 5 and "step 13: " in ended.err
        assert "the 10 steps before it were skipped for the same reason" in ended.err


def test_a_run_of_which_every_update_was_skipped_says_that_nothing_was_trained(
    command: Command, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*_: Any) -> str:
        return "step: its update is skipped"

    monkeypatch.setattr("dpo_cli.training.guard.NonFiniteGuard.before_update", nothing)
    with fault(8):
        ended = command("dpo-train", *tiny_words(pairs_file, tmp_path / "run"), "non_finite=skip")
        assert ended.code == 0, ended.err
        assert "verdict  red: no update was made" in ended.out


def test_the_count_of_skipped_updates_survives_a_resume(
    command: Command, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {2}, float("nan"), "loss")
    words = [*tiny_words(pairs_file, tmp_path / "run"), "max_steps=3", "save_every=1", "non_finite=skip"]
    with fault(8):
        assert command("dpo-train", *words).code == 0
        import shutil

        shutil.rmtree(tmp_path / "run" / "final")
        assert "1 update skipped" in command("dpo-train", *words, "resume=auto").out


def test_a_state_that_is_not_finite_is_never_saved_and_no_healthy_one_removed_for_it(
    command: Command, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient is finite and the update is not, as with an overflow: seen before it is saved."""
    original = runner.train_step

    def overflowing(context: Any, learner: Any, progress: Any, *more: Any) -> None:
        original(context, learner, progress, *more)
        if progress.step == 3:
            with torch.no_grad():
                learner.trainable[1][0] = float("inf")

    monkeypatch.setattr(runner, "train_step", overflowing)
    with fault(8):
        words = [*tiny_words(pairs_file, tmp_path / "run"), *WORDS, "keep_checkpoints=1"]
        ended = command("dpo-train", *words)
        assert ended.code == 5
        assert "step 3: base_model.model." in ended.err and "is no longer finite, and is not saved" in ended.err
        assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000002"]


# Fault 9


def no_more_than(tokens: int, kind: type[Exception]) -> tuple[Callable[[Any, Any], Any], list[int]]:
    """A device on which a micro-batch of more than so many tokens runs out of memory, after part of its work."""
    refused: list[int] = []

    def limited(logps: Any, micro_batch: Any) -> Any:
        if micro_batch.input_ids.numel() > tokens:
            if logps.requires_grad:  # a gradient is there already: it must not stay
                (logps.sum() * 0.25).backward()
            refused.append(micro_batch.input_ids.numel())
            raise kind("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")
        return logps

    return limited, refused


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError, MemoryError])
@pytest.mark.parametrize("words", [["micro_batch_size=auto"], ["micro_batch_size=4"], ["layout=padded"]], ids=str)
def test_a_batch_that_does_not_fit_is_split_finer_with_the_same_result(
    command: Command, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str],
    kind: type[Exception],
) -> None:  # fmt: skip
    more = [*words, "max_steps=5", "lora.dropout=0", "reference.cache=off"]
    assert command("dpo-train", *tiny_words(pairs_file, tmp_path / "whole"), *more).code == 0
    limited, refused = no_more_than(300, kind)
    in_forward_backward(monkeypatch, limited)
    with fault(9):
        ended = command("dpo-train", *tiny_words(pairs_file, tmp_path / "cut"), *more)
        assert ended.code == 0, ended.err
        assert refused and "memory ran out on a micro-batch of " in ended.out
        warned = ended.out.index("memory ran out on a micro-batch of")
        assert warned < ended.out.index("step 0/5")  # the probe finds it, before the first step
        assert len(refused) <= 4  # and nothing in the run itself is refused again
        one, other = (load_file(tmp_path / run / "final" / "adapter_model.safetensors") for run in ("whole", "cut"))
        assert all(torch.allclose(one[name], other[name], atol=2e-5) for name in one)
        for before, after in zip(records(tmp_path / "whole"), records(tmp_path / "cut"), strict=True):
            assert after["loss"] == pytest.approx(before["loss"], abs=1e-5)


def test_memory_that_runs_out_in_the_middle_of_a_run_redoes_the_step_from_its_start(
    tmp_path: Path, straight: Straight
) -> None:
    """With dropout on: the random numbers are those of the finer split from the step's start, as if split so before."""

    def fine_from_the_start() -> None:
        def split(_: Any, learner: Any, step: int) -> None:
            if step == 2:
                learner.batcher = replace(learner.batcher, split=SplitByPairs(2))

        before_step(split)

    def fine_once_it_runs_out() -> None:
        patch = pytest.MonkeyPatch()
        now = steps_begun(patch)

        def limited(logps: Any, micro_batch: Any) -> Any:
            if now[0] == 3 and len(micro_batch.examples) > 2:
                logps.sum().backward()
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return logps

        in_forward_backward(patch, limited)

    from harness import content

    more = ("micro_batch_size=4",)
    with fault(9):
        said = "memory ran out on a micro-batch of 4 pairs; from here on at most 2 pairs in a micro-batch"
        for at, prepare in enumerate((fine_from_the_start, fine_once_it_runs_out)):
            left = start(tmp_path / str(at), run_words(tmp_path / str(at), *more), prepare).wait()
            assert left.code == 0, left.err
            assert (said in left.out) == (at == 1)
        LEDGER.compared[9] += same_content(tmp_path / "1" / "run", content(tmp_path / "0" / "run"))
        last = checkpoints(tmp_path / "1" / "run" / "checkpoints")[-1]
        assert read_state(last).settings.max_pairs == 2  # and a resumed run does not begin with 4 again


def test_a_pair_too_long_for_the_memory_ends_with_6_in_the_memory_probe_with_its_lengths(
    command: Command, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_forward_backward(monkeypatch, no_more_than(20, torch.OutOfMemoryError)[0])
    with fault(9):
        ended = command("dpo-train", *tiny_words(pairs_file, tmp_path / "run"))
        assert ended.code == 6 and "step 0/" not in ended.out
        assert ended.err.startswith("error: out of memory on row ") and ended.err.count("\n") == 1
        assert "alone in its forward pass: " in ended.err and " tokens (prompt " in ended.err
        assert "engine.gradient_checkpointing=true, reference=adapter_off, a smaller data.max_length" in ended.err


def test_scoring_splits_what_does_not_fit_and_finds_the_same_numbers(
    command: Command, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("dpo-train", *tiny_words(pairs_file, tmp_path / "run")).code == 0
    words = [f"checkpoint={tmp_path / 'run'}", "data=jsonl", f"data.eval={pairs_file}", "reference_cache=off"]
    assert command("dpo-eval", *words, "name=whole").code == 0
    (limited, refused), score = no_more_than(300, torch.OutOfMemoryError), Preference.score
    monkeypatch.setattr(Preference, "score", lambda *parts: limited(score(*parts), parts[2]))
    with fault(9):
        assert command("dpo-eval", *words, "name=cut").code == 0
        assert refused
        reports = [tmp_path / "run" / "eval" / name / "pairs.jsonl" for name in ("whole", "cut")]
        lines = [[json.loads(line) for line in report.read_text().splitlines()] for report in reports]
        for one, other in zip(*lines, strict=True):
            assert one["index"] == other["index"] and other["margin"] == pytest.approx(one["margin"], abs=1e-5)


def test_other_errors_of_the_device_are_not_taken_for_memory(
    command: Command, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    in_forward_backward(monkeypatch, broken)
    with fault(9), pytest.raises(RuntimeError, match="mat1 and mat2"):
        command("dpo-train", *tiny_words(pairs_file, tmp_path / "run"))
