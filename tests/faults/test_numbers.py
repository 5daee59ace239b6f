"""Faults 8 and 9: what is not finite touches no weight; what does not fit into memory is cut finer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ended, records, tiny_words
from harness import LEDGER, fault, run_words, same_content, start, straight  # noqa: F401
from safetensors.torch import load_file

from dpo_cli.runs.checkpoint import checkpoints, read_state, validate
from dpo_cli.training import runner, step

pytestmark = pytest.mark.faults
Command = Callable[..., Ended]
Straight = Callable[..., dict[str, bytes]]


# Fault 8


def poison(monkeypatch: pytest.MonkeyPatch, at: set[int], value: float, where: str) -> None:
    """From within a step, counted from 1: make the loss of its last pair, or a gradient, `value`."""
    original = runner.forward_backward

    def poisoned(run: Any, batch: Any) -> Any:
        measured = original(run, batch)
        if run.step + 1 in at and run.directory.metrics.records > 0:  # not in the rehearsal
            if where == "loss":
                measured.losses[-1] = measured.losses[-1].clone()
                measured.losses[-1][-1] = value
            else:
                run.trainable[1].grad[0] = value
        return measured

    monkeypatch.setattr(runner, "forward_backward", poisoned)


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
    original, bad = step.response_scores_todo, 7

    def for_one_pair(policy: Any, layout: Any) -> Any:
        logps = original(policy, layout)
        here = torch.tensor([pair.index == bad for pair in layout.pairs])
        return type(logps)(torch.where(here, torch.nan, logps.chosen), logps.rejected, *_tokens(logps))

    monkeypatch.setattr(step, "response_scores_todo", for_one_pair)
    with fault(8):
        ended = command("dpo-train", *tiny_words(pairs_file, tmp_path / "run"), *WORDS)
        assert ended.code == 5
        assert f"the loss of rows {bad} of the data is not finite (mean loss nan, gradient norm nan)" in ended.err


def _tokens(logps: Any) -> tuple[Any, Any]:
    return logps.chosen_tokens, logps.rejected_tokens


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

    def overflowing(run: Any, batch: Any) -> None:
        original(run, batch)
        if run.step == 3:
            with torch.no_grad():
                run.trainable[1][0] = float("inf")

    monkeypatch.setattr(runner, "train_step", overflowing)
    with fault(8):
        words = [*tiny_words(pairs_file, tmp_path / "run"), *WORDS, "keep_checkpoints=1"]
        ended = command("dpo-train", *words)
        assert ended.code == 5
        assert "step 3: base_model.model." in ended.err and "is no longer finite, and is not saved" in ended.err
        assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000002"]


# Fault 9


def small_memory(monkeypatch: pytest.MonkeyPatch, place: Any, tokens: int, kind: type[Exception]) -> list[int]:
    """A device on which a pass of more than so many tokens runs out of memory, after part of its work."""
    original, refused = place.response_scores_todo, []

    def limited(policy: Any, layout: Any) -> Any:
        logps = original(policy, layout)
        if layout.input_ids.numel() > tokens:
            if logps.chosen.requires_grad:  # a gradient is there already: it must not stay
                (logps.chosen.sum() * 0.25).backward()
            refused.append(layout.input_ids.numel())
            raise kind("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")
        return logps

    monkeypatch.setattr(place, "response_scores_todo", limited)
    return refused


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError, MemoryError])
@pytest.mark.parametrize("words", [["micro_batch_size=auto"], ["micro_batch_size=4"], ["layout=padded"]], ids=str)
def test_a_batch_that_does_not_fit_is_cut_finer_with_the_same_result(
    command: Command, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str],
    kind: type[Exception],
) -> None:  # fmt: skip
    more = [*words, "max_steps=5", "lora.dropout=0", "reference.cache=off"]
    assert command("dpo-train", *tiny_words(pairs_file, tmp_path / "whole"), *more).code == 0
    refused = small_memory(monkeypatch, step, 300, kind)
    with fault(9):
        ended = command("dpo-train", *tiny_words(pairs_file, tmp_path / "cut"), *more)
        assert ended.code == 0, ended.err
        assert refused and "memory ran out on a pass of " in ended.out
        warned = ended.out.index("memory ran out on a pass of")
        assert warned < ended.out.index("step 0/5")  # the rehearsal finds it, before the first step
        assert len(refused) <= 4  # and nothing in the run itself is refused again
        one, other = (load_file(tmp_path / run / "final" / "adapter_model.safetensors") for run in ("whole", "cut"))
        assert all(torch.allclose(one[name], other[name], atol=2e-5) for name in one)
        for before, after in zip(records(tmp_path / "whole"), records(tmp_path / "cut"), strict=True):
            assert after["loss"] == pytest.approx(before["loss"], abs=1e-5)


def test_memory_that_runs_out_in_the_middle_of_a_run_redoes_the_step_from_its_start(
    tmp_path: Path, straight: Straight
) -> None:
    """With dropout on: the random numbers are those of the finer cut from the step's start, as if cut so before."""

    def prepare(at: int) -> Callable[[], None]:
        def fine_from() -> None:
            original, pair_logps = runner.train_step, step.response_scores_todo

            def train_step(run: Any, batch: Any) -> None:
                if run.step == 2 and at == 0:
                    step.cut_finer(run, batch)
                train_step_now[0] = run.step
                original(run, batch)

            def limited(policy: Any, layout: Any) -> Any:
                logps = pair_logps(policy, layout)
                if at == 1 and train_step_now[0] == 2 and len(layout.pairs) > 2:
                    logps.chosen.sum().backward()
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
                return logps

            train_step_now = [-1]
            runner.train_step, step.response_scores_todo = train_step, limited

        return fine_from

    from harness import content

    more = ("micro_batch_size=4",)
    with fault(9):
        for at in (0, 1):
            left = start(tmp_path / str(at), run_words(tmp_path / str(at), *more), prepare(at)).wait()
            assert left.code == 0, left.err
            assert "batches are cut finer from here on: 2 pairs a pass" in left.out
        LEDGER.compared[9] += same_content(tmp_path / "1" / "run", content(tmp_path / "0" / "run"))
        last = checkpoints(tmp_path / "1" / "run" / "checkpoints")[-1]
        assert read_state(last).settled.pairs_a_pass == 2  # and a resumed run does not begin with 4 again


def test_a_pair_too_long_for_the_memory_ends_with_6_in_the_rehearsal_with_its_lengths(
    command: Command, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_memory(monkeypatch, step, 20, torch.OutOfMemoryError)
    with fault(9):
        ended = command("dpo-train", *tiny_words(pairs_file, tmp_path / "run"))
        assert ended.code == 6 and "step 0/" not in ended.out
        assert ended.err.startswith("error: out of memory on row ") and ended.err.count("\n") == 1
        assert "alone in its forward pass: " in ended.err and " tokens (prompt " in ended.err
        assert "engine.gradient_checkpointing=true, reference=adapter_off, a smaller data.max_length" in ended.err


def test_scoring_cuts_what_does_not_fit_and_finds_the_same_numbers(
    command: Command, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpo_cli.evaluation import scores

    assert command("dpo-train", *tiny_words(pairs_file, tmp_path / "run")).code == 0
    words = [f"checkpoint={tmp_path / 'run'}", "data=jsonl", f"data.eval={pairs_file}", "reference_cache=off"]
    assert command("dpo-eval", *words, "name=whole").code == 0
    refused = small_memory(monkeypatch, scores, 300, torch.OutOfMemoryError)
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

    monkeypatch.setattr(step, "response_scores_todo", broken)
    with fault(9), pytest.raises(RuntimeError, match="mat1 and mat2"):
        command("dpo-train", *tiny_words(pairs_file, tmp_path / "run"))
