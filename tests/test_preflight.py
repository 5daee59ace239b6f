"""The preflight: passes on a sound run and leaves it as it was; names the cause of every unsound one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ended, records, tiny_words

from dpo_cli.data.batches import Layout
from dpo_cli.errors import CheckpointError
from dpo_cli.models.logps import MicroBatch, make_micro_batch
from dpo_cli.models.reference import FrozenReference
from dpo_cli.objectives.alarms import AlarmRule
from dpo_cli.objectives.preference import Preference
from dpo_cli.training import preflight as module
from dpo_cli.training.preflight import (
    PreflightSubject,
    check_batch_invariance,
    check_chain_rule,
    check_closing,
    check_distinct,
    check_finite,
    check_gradients,
    check_round_trip,
    check_start,
    choose_pairs,
    run_checks,
)

Assembled = Callable[..., Any]
Command = Callable[..., Ended]


def subject_of(run: Any) -> PreflightSubject:
    pairs, texts = choose_pairs(run.material.data.train, run.material.data.train_texts)
    return PreflightSubject(
        run.learner.policy, run.learner.reference, run.learner.objective, run.material.encoder, pairs, texts,
        run.learner.batcher.device, run.learner.batcher.layout, run.learner.dtype, run.context.engine,
        at_start=True,
    )  # fmt: skip


class Shifted(Preference):
    """DPO that scores other positions than it is given."""

    def score(self, policy: Any, micro_batch: MicroBatch) -> torch.Tensor:
        return super().score(policy, replace(micro_batch, positions=micro_batch.positions - 1))


class SeesNeighbours(Preference):
    """DPO whose scores depend on how many responses there are."""

    def score(self, policy: Any, micro_batch: MicroBatch) -> torch.Tensor:
        return super().score(policy, micro_batch) + (2.0 if len(micro_batch.tokens) > 2 else 0.0)


def with_objective(subject: PreflightSubject, kind: type[Preference]) -> PreflightSubject:
    assert isinstance(subject.objective, Preference)
    return replace(subject, objective=kind(subject.objective.beta, subject.objective.loss))


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("model.dtype=bfloat16",),
        ("reference=adapter_off",),
        ("lora=off", "model.dtype=auto"),
        ("lora=attention", "lora.dropout=0.2"),
        ("loss=ipo",),
        ("loss=apo_down", "loss.sft_weight=0.1"),
        ("data.max_length=60",),
    ],
)
def test_a_sound_run_passes(assembled: Assembled, words: tuple[str, ...]) -> None:
    said = run_checks(subject_of(assembled(*words)))
    assert said.startswith("preflight passed in ") and "(off by 0)" in said
    # hinge, ipo and the others start elsewhere: 25 = (1 / (2 * 0.1))^2, 1 = sigmoid(0) + 1 - sigmoid(0)
    start = "25 " if "loss=ipo" in words else "0.6931 " if not any("loss" in word for word in words) else ""
    assert f"the loss starts at {start}" in said
    assert ("gradient reaches all 14 adapters and nothing else" in said) == (
        words[:1] != ("lora=off",) and "lora=attention" not in words
    )


def test_it_leaves_mode_gradients_and_generators_as_they_were(assembled: Assembled) -> None:
    run = assembled("lora.dropout=0.2")
    before = torch.get_rng_state()
    run_checks(subject_of(run))
    assert torch.equal(torch.get_rng_state(), before)
    assert run.learner.policy.training
    assert all(weight.grad is None for weight in run.learner.policy.parameters())


def test_a_run_says_that_it_passed_before_the_first_step(command: Command, pairs_file: Path, tmp_path: Path) -> None:
    out = command("dpo-train", *tiny_words(pairs_file, tmp_path / "run")).out
    assert 0 < out.index("preflight passed in") < out.index("step 0/3")


def test_a_reference_that_is_the_policy_is_refused(assembled: Assembled) -> None:
    subject = subject_of(assembled())
    same = FrozenReference(subject.policy.get_base_model())
    with pytest.raises(CheckpointError, match=r"policy and reference share \d+ weights"):
        check_distinct(subject.policy, same)


def test_a_reference_that_is_not_frozen_is_refused(assembled: Assembled) -> None:
    subject = subject_of(assembled())
    subject.reference.model.requires_grad_(True)  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match="weights of the reference take a gradient"):
        check_distinct(subject.policy, subject.reference)


def test_a_reference_of_other_weights_is_refused_with_the_size_of_the_gap(assembled: Assembled) -> None:
    subject = subject_of(assembled())
    with torch.no_grad():
        for weight in subject.reference.model.parameters():  # type: ignore[attr-defined]
            weight.add_(0.3 * torch.randn_like(weight))
    with pytest.raises(CheckpointError, match=r"differs from the policy's start by up to \d+\.\d\d nats a response"):
        check_start(subject)


def test_log_probs_that_are_not_finite_are_refused(assembled: Assembled) -> None:
    subject = subject_of(assembled())
    with torch.no_grad():
        subject.policy.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(CheckpointError, match=r"log-probs are not finite \(nan first\): its weights are damaged"):
        check_finite(subject)
    with pytest.raises(CheckpointError, match=r"try model\.dtype=float32"):
        check_finite(replace(subject, dtype=torch.bfloat16))


def test_weights_that_no_gradient_reaches_are_named(assembled: Assembled) -> None:
    subject = subject_of(assembled())
    subject.policy.requires_grad_(False)
    with pytest.raises(CheckpointError, match="no gradient reaches the trainable weights"):
        check_gradients(subject)


def test_an_adapter_outside_the_forward_pass_is_named(assembled: Assembled) -> None:
    subject = subject_of(assembled())
    subject.policy.add_module("ghost", torch.nn.ModuleDict({"lora_B": torch.nn.Linear(2, 2)}))
    with pytest.raises(CheckpointError, match=r"no gradient reaches 1 of \d+ adapters \(ghost first\)"):
        check_gradients(subject)


def test_a_base_weight_that_trains_beside_the_adapters_is_named(assembled: Assembled) -> None:
    subject = subject_of(assembled())
    next(weight for name, weight in subject.policy.named_parameters() if "norm" in name).requires_grad_(True)
    with pytest.raises(CheckpointError, match="1 weights of the base train beside the adapters"):
        check_gradients(subject)


def test_a_shifted_mask_breaks_the_chain_rule(assembled: Assembled) -> None:
    subject = subject_of(assembled())
    with torch.no_grad():  # a random tiny model is nearly uniform: make its predictions differ from place to place
        for weight in subject.policy.parameters():
            weight.mul_(6.0)
    check_chain_rule(subject)
    with pytest.raises(CheckpointError, match=r"off the chain rule by \d+\.\d\d nats on row \d+"):
        check_chain_rule(with_objective(subject, Shifted))


def test_a_pair_that_sees_its_neighbours_is_named(assembled: Assembled) -> None:
    subject = subject_of(assembled())
    said = check_batch_invariance(subject)
    assert float(said.removeprefix("a pair alone equals the pair in a batch to ")) < 1e-3
    with pytest.raises(CheckpointError, match=r"row \d+ scores 2\.00 nats differently in a batch than alone"):
        check_batch_invariance(with_objective(subject, SeesNeighbours))


def test_a_closing_token_that_is_not_scored_is_named(assembled: Assembled, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = subject_of(assembled())
    assert check_closing(subject) == "EOS is scored"

    def without_closing(pairs: Any, device: torch.device, layout: Layout) -> MicroBatch:
        return make_micro_batch([replace(one, chosen=one.chosen[:-1]) for one in pairs], device, layout)

    monkeypatch.setattr(module, "make_micro_batch", without_closing)
    with pytest.raises(CheckpointError, match=r"the closing EOS of row \d+ is not scored"):
        check_closing(subject)


def test_tokens_that_do_not_read_back_are_named(assembled: Assembled) -> None:
    subject = subject_of(assembled())
    check_round_trip(subject)
    own_eos = [replace(text, pair=replace(text.pair, chosen=text.pair.chosen + "<|im_end|>")) for text in subject.texts]
    check_round_trip(replace(subject, texts=own_eos))  # a text may bring its own, which is taken once
    texts = [replace(text, pair=replace(text.pair, chosen="something else")) for text in subject.texts]
    with pytest.raises(CheckpointError, match=r"row \d+ does not read back from its tokens"):
        check_round_trip(replace(subject, texts=texts))


def test_a_dry_run_shows_what_a_run_would_cost_and_writes_nothing(
    command: Command, pairs_file: Path, tmp_path: Path
) -> None:
    ended = command("dpo-train", *tiny_words(pairs_file, tmp_path / "run"), "dry_run=true")
    assert ended.code == 0, ended.err
    for said in ("preflight passed in", "prompt + longer", "the longest batch fits", "memory", "time", "nothing was"):
        assert said in ended.out, said
    assert "step 0" not in ended.out and not (tmp_path / "run").exists()


def test_a_dry_run_of_a_resume_leaves_the_run_as_it_was(
    trained: Callable[..., Path], command: Command, pairs_file: Path
) -> None:
    import shutil

    run = trained("run", "save_every=1", "keep_checkpoints=9")
    shutil.rmtree(run / "final")
    before = (run / "metrics.jsonl").read_bytes()
    older = run / "checkpoints" / "step-00000001"
    ended = command("dpo-train", *tiny_words(pairs_file, run), f"resume={older}", "dry_run=true")
    assert ended.code == 0, ended.err
    assert (run / "metrics.jsonl").read_bytes() == before
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step-00000001", "step-00000002", "step-00000003"]


def test_the_monitor_stops_a_run_where_it_is_told_to(
    command: Command, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpo_cli.objectives import preference
    from dpo_cli.training import monitor

    monkeypatch.setattr(monitor, "ENOUGH", 8)
    far = AlarmRule("far", lambda d: d.pairs >= 8, lambda d: "too far", ruins=True)
    monkeypatch.setattr(preference, "preference_alarms", lambda loss: (far,))
    words = tiny_words(pairs_file, tmp_path / "run")
    ended = command("dpo-train", *words, "monitor=stop", "page=true")
    saved = tmp_path / "run" / "checkpoints" / "step-00000002"
    assert ended.code == 5
    assert ended.err == f"error: step 2: stopped by the monitor (monitor=stop), saved as {saved}: too far\n"
    assert "warning: step 2: too far" in ended.out and "verdict  " in ended.out
    assert records(tmp_path / "run")[-1]["alarms"] == {"far": "too far"}
    assert saved.is_dir() and not (tmp_path / "run" / "final").exists()
    assert "<h2>Alarms</h2>" in (tmp_path / "run" / "report.html").read_text()
    other = [word for word in words if not word.startswith("output_dir")]
    assert command("dpo-train", *other, f"output_dir={tmp_path / 'warned'}", "monitor=warn").code == 0


def test_a_run_ends_with_a_verdict(command: Command, pairs_file: Path, tmp_path: Path) -> None:
    import json

    ended = command("dpo-train", *tiny_words(pairs_file, tmp_path / "run"), "optimizer.lr=1e-9")
    assert "verdict  yellow: accuracy" in ended.out
    assert "not_learning: nothing was learned" in ended.out and "next: optimizer.lr=5e-09, or more steps" in ended.out
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["verdict"]["color"] == "yellow"
