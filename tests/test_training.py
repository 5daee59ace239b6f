"""The runner: where a run starts, what moves and what does not, and that a stopped run goes on to the same bytes."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Assembled, Ended, records, sample_rows, stop_in, tiny_words, write_jsonl
from safetensors.torch import load_file
from tiny_models import tiny

from dpo_cli.runs.checkpoint import checkpoints, validate

Command = Callable[..., Ended]
Trained = Callable[..., Path]
LN2 = 0.6931471805599453
TIMINGS = {"seconds", "pairs_per_second", "tokens_per_second", "peak_memory_gib"}


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "final" / "adapter_model.safetensors")


def without_timings(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key not in TIMINGS} for record in records(run)]


def same_bytes(one: Path, other: Path, name: str) -> bool:
    return (one / name).read_bytes() == (other / name).read_bytes()


def test_a_run_starts_at_ln2_with_margins_of_exactly_zero(trained: Trained) -> None:
    first = records(trained())[0]
    assert first["step"] == 0 and first["split"] == "train"
    assert first["loss"] == pytest.approx(LN2, abs=1e-7)
    for name in ("rewards/margins", "rewards/chosen", "rewards/rejected"):
        assert first[name] == 0.0
    assert first["rewards/accuracies"] == 0.5
    assert first["gradient_weight"] == 0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("reference", ["frozen", "adapter_off"])
def test_every_reference_and_dtype_starts_at_exactly_zero(trained: Trained, dtype: str, reference: str) -> None:
    run = trained("run", f"model.dtype={dtype}", f"reference={reference}", "max_steps=1")
    assert records(run)[0]["rewards/margins"] == 0.0


def test_metrics_carry_the_names_of_the_contract(trained: Trained) -> None:
    logged = records(trained())
    train = {
        "step", "epoch", "split", "loss", "rewards/chosen", "rewards/rejected", "rewards/margins",
        "rewards/accuracies", "logps/chosen", "logps/rejected", "gradient_weight", "grad_norm", "lr",
        "pairs_per_second", "tokens_per_second", "peak_memory_gib", "seconds",
    }  # fmt: skip
    assert set(logged[1]) >= train
    assert [(record["step"], record["split"]) for record in logged] == [
        (0, "train"), (1, "train"), (2, "train"), (3, "train"), (3, "eval"),
    ]  # fmt: skip


def test_training_raises_the_margin_of_the_pairs_it_sees(trained: Trained) -> None:
    logged = records(trained("run", "max_steps=25", "optimizer.lr=5e-3", "data.eval_fraction=0"))
    assert logged[-1]["rewards/margins"] > 0.1
    assert logged[-1]["loss"] < 0.65
    assert logged[-1]["rewards/accuracies"] == 1.0


def test_the_first_step_moves_b_and_leaves_a(assembled: Callable[..., Assembled]) -> None:
    run = assembled()
    before = {name: weight.detach().clone() for name, weight in run.learner.policy.named_parameters()}
    run.step(run.material.data.train[:4])
    for name, weight in run.learner.policy.named_parameters():
        moved = not torch.equal(weight, before[name])
        assert moved == ("lora_B" in name), name


def test_the_reference_never_moves(assembled: Callable[..., Assembled]) -> None:
    run = assembled()
    reference = run.learner.reference.model  # type: ignore[attr-defined]
    before = {name: value.clone() for name, value in reference.state_dict().items()}
    for start in (0, 4, 8):
        run.step(run.material.data.train[start : start + 4])
    assert all(torch.equal(value, before[name]) for name, value in reference.state_dict().items())
    assert all(not weight.requires_grad and weight.grad is None for weight in reference.parameters())
    assert not reference.training
    shared = {weight.data_ptr() for weight in reference.parameters()}
    assert not shared & {weight.data_ptr() for weight in run.learner.policy.parameters()}


def gradients(run: Assembled, batch: int, first: int = 0) -> dict[str, torch.Tensor]:
    """The gradient of one step, caught before the optimizer uses it."""
    caught: dict[str, torch.Tensor] = {}

    def catch(*_: Any, **__: Any) -> None:
        caught.update({n: p.grad.clone() for n, p in run.learner.policy.named_parameters() if p.grad is not None})

    run.learner.optimizer.step = catch  # type: ignore[method-assign, assignment]
    run.context.config.max_grad_norm = 1e9
    run.step(run.material.data.train[first : first + batch])
    return caught


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_gradient_does_not_depend_on_how_the_batch_is_split(assembled: Callable[..., Assembled], size: int) -> None:
    # 7 pairs in micro-batches of 2 or 3 leave a short last one, which must not weigh more.
    whole = gradients(assembled("micro_batch_size=7"), 7)
    split = gradients(assembled(f"micro_batch_size={size}"), 7)
    assert whole.keys() == split.keys()
    for name, value in whole.items():
        assert torch.allclose(value, split[name], atol=1e-7, rtol=1e-4), name


def test_the_gradient_of_a_batch_is_the_mean_of_its_pairs_whatever_batch_size_says(
    assembled: Callable[..., Assembled],
) -> None:
    # A ragged last batch of 3 under batch_size=4 divides by 3.
    batch = gradients(assembled(), 3)
    singles = []
    for place in range(3):
        run = assembled()
        singles.append(gradients(run, 1, place))
    for name, value in batch.items():
        mean = (singles[0][name] + singles[1][name] + singles[2][name]) / 3
        assert torch.allclose(value, mean, atol=1e-7, rtol=1e-4), name


def test_a_step_leaves_no_gradient_behind(assembled: Callable[..., Assembled]) -> None:
    run = assembled()
    run.step(run.material.data.train[:4])
    assert all(weight.grad is None for weight in run.learner.policy.parameters())


def test_a_gradient_longer_than_max_grad_norm_is_scaled_down_to_it(assembled: Callable[..., Assembled]) -> None:
    run, caught = assembled(), []
    run.context.config.max_grad_norm = 1e-3
    run.learner.optimizer.step = lambda: caught.append(  # type: ignore[method-assign, assignment, misc]
        sum(float((weight.grad**2).sum()) for weight in run.learner.trainable if weight.grad is not None) ** 0.5
    )
    run.step(run.material.data.train[:4])
    assert run.progress.window.grad_norm > 1e-3  # what is logged is the norm before
    assert caught == [pytest.approx(1e-3, rel=1e-3)]


def test_gradient_checkpointing_changes_nothing(assembled: Callable[..., Assembled]) -> None:
    plain, run = gradients(assembled(), 4), assembled("engine.gradient_checkpointing=true")
    forwards: list[int] = []
    run.learner.policy.get_base_model().model.layers[0].mlp.register_forward_pre_hook(lambda *_: forwards.append(1))
    checkpointed = gradients(run, 4)
    assert len(forwards) == 2  # once forward, once more in the backward pass
    assert all(torch.allclose(value, checkpointed[name], atol=1e-7) for name, value in plain.items())


def test_both_references_give_the_same_run(trained: Trained) -> None:
    one, other = trained("frozen", "reference=frozen"), trained("off", "reference=adapter_off")
    assert all(torch.allclose(value, adapter(other)[name], atol=1e-6) for name, value in adapter(one).items())


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(trained: Trained) -> None:
    runs = [trained("a"), trained("b"), trained("c", "seed=1")]
    assert same_bytes(runs[0], runs[1], "final/adapter_model.safetensors")
    assert without_timings(runs[0]) == without_timings(runs[1])
    assert not same_bytes(runs[0], runs[2], "final/adapter_model.safetensors")


def test_log_every_gives_means_over_all_pairs_in_between(trained: Trained) -> None:
    words = ("max_steps=4", "batch_size=5", "data.eval_fraction=0")
    each, both = trained("each", *words), trained("both", *words, "log_every=2")
    singles = [record["loss"] for record in records(each)[1:]]
    pairs = [record["loss"] for record in records(both)[1:]]
    assert pairs == pytest.approx([(singles[0] + singles[1]) / 2, (singles[2] + singles[3]) / 2])


def test_epochs_end_with_a_smaller_batch_that_still_counts(trained: Trained) -> None:
    run = trained("run", "max_steps=null", "epochs=2", "batch_size=8", "data.eval_fraction=0")
    assert [record["step"] for record in records(run)] == [0, 1, 2, 3, 4, 5, 6]  # 20 pairs: 8, 8, 4, twice
    assert records(run)[-1]["epoch"] == 2.0


def test_lora_off_trains_every_weight_and_saves_the_model(trained: Trained, tiny_path: str) -> None:
    run = trained("full", "lora=off", "model.dtype=auto", "optimizer.lr=1e-4", "optimizer.warmup_steps=0")
    assert records(run)[0]["rewards/margins"] == 0.0
    before = load_file(Path(tiny_path) / "model.safetensors")
    after = load_file(run / "final" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before if "norm" not in name)


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop", "sgd"])
def test_every_optimizer_trains(trained: Trained, optimizer: str) -> None:
    run = trained("run", f"optimizer={optimizer}")
    assert any(value.abs().max() > 0 for name, value in adapter(run).items() if "lora_B" in name)


def test_final_loads_with_peft_as_it_is(trained: Trained, tiny_path: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = trained()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_path), run / "final")
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    assert model(**tokenizer("hello", return_tensors="pt")).logits.isfinite().all()
    card = (run / "final" / "README.md").read_text()
    named = json.loads((run / "final" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == "dpo-cli/tiny-random"  # the name, not a path in somebody's cache
    assert tiny_path not in card
    assert "library_name: peft" in card and 'PeftModel.from_pretrained(model, "final")' in card


def test_an_sft_adapter_is_folded_into_policy_and_reference_alike(trained: Trained) -> None:
    sft = trained("sft", "optimizer.lr=1e-2", "max_steps=8")
    plain, folded = trained("plain"), trained("folded", f"model.adapter={sft / 'final'}")
    first = records(folded)[0]
    assert (first["loss"], first["rewards/margins"]) == (pytest.approx(LN2, abs=1e-7), 0.0)
    assert abs(first["logps/chosen"] - records(plain)[0]["logps/chosen"]) > 1e-3


def test_the_manifest_says_what_the_numbers_depend_on(trained: Trained) -> None:
    manifest = json.loads((trained() / "manifest.json").read_text())
    assert {"packages", "seed", "dtype", "device", "data_fingerprint", "data", "model"} <= set(manifest)
    assert manifest["data"]["train"]["rows"] == 20


# Checkpoints and resume


@pytest.mark.parametrize("forward_pass", [1, 2, 3, 5, 8, 10, "evaluation"])
def test_a_stopped_run_resumes_to_the_same_bytes(
    trained: Trained, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forward_pass: int | str
) -> None:
    """Stopped by a signal in the middle of a step or an evaluation, with dropout on and a half-full log window."""
    words = ("max_steps=5", "micro_batch_size=2", "lora.dropout=0.1", "log_every=2", "eval_every=3", "save_every=2")
    straight = trained("straight", *words)
    stopped_words = [*tiny_words(tmp_path / "pairs.jsonl", tmp_path / "stopped"), *words]
    with monkeypatch.context() as patched:
        stop_in(patched, forward_pass)
        stopped = command("dpo-train", *stopped_words)
    assert stopped.code == 75, stopped.err
    assert stopped.err.startswith("error: stopped by SIGTERM at step ")
    done = int(stopped.err.split("at step ")[1].split(";")[0])
    assert checkpoints(tmp_path / "stopped" / "checkpoints")[-1].name == f"step-{done:08d}"  # nothing done is lost
    resumed = command("dpo-train", *stopped_words, "resume=auto")
    assert resumed.code == 0, resumed.err
    for name in ("adapter_model.safetensors", "optimizer.safetensors", "rng.safetensors"):
        assert same_bytes(straight, tmp_path / "stopped", f"checkpoints/step-00000005/{name}"), name
    assert without_timings(straight) == without_timings(tmp_path / "stopped")


def test_resume_auto_without_a_checkpoint_starts_from_the_beginning(
    trained: Trained, command: Command, pairs_file: Path
) -> None:
    import shutil

    run = trained()
    once = without_timings(run)
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints")  # as a crash before the first save leaves it
    ended = command("dpo-train", *tiny_words(pairs_file, run), "resume=auto")
    assert ended.code == 0, ended.err
    assert f"no checkpoint in {run} yet: starting from the beginning" in ended.out
    assert without_timings(run) == once


def test_an_older_checkpoint_sets_the_newer_ones_aside(trained: Trained, command: Command, pairs_file: Path) -> None:
    run = stopped_run(trained("run", "save_every=1", "keep_checkpoints=9"))
    words = [word for word in tiny_words(pairs_file, run) if not word.startswith("output_dir")]
    kept = ("save_every=1", "keep_checkpoints=9")
    ended = command("dpo-train", *words, *kept, f"resume={run / 'checkpoints' / 'step-00000001'}")
    assert ended.code == 0, ended.err
    assert "step-00000003 lies after step 1 and is set aside" in ended.out
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["abandoned-step-00000002", "abandoned-step-00000003", "step-00000001", "step-00000002",
                     "step-00000003"]  # fmt: skip
    elsewhere = command("dpo-train", *words, f"resume={run}", "output_dir=elsewhere")
    assert elsewhere.code == 2 and "leave output_dir out" in elsewhere.err


def test_resume_of_a_finished_run_says_so(trained: Trained, command: Command, pairs_file: Path) -> None:
    run = trained()
    ended = command("dpo-train", *tiny_words(pairs_file, run), "resume=auto")
    assert ended.code == 0 and ended.out.endswith(f"\nalready complete: {run / 'final'}\n")


def test_a_second_run_in_the_same_directory_is_refused(trained: Trained, command: Command, pairs_file: Path) -> None:
    run = trained()
    ended = command("dpo-train", *tiny_words(pairs_file, run))
    assert ended.code == 2
    assert ended.err == f"error: output_dir={run}: holds a run already; resume=auto continues it\n"


def stopped_run(run: Path) -> Path:
    """The run as a crash before its end would leave it."""
    import shutil

    shutil.rmtree(run / "final")
    return run


def test_resume_with_another_config_is_refused_by_name(trained: Trained, command: Command, pairs_file: Path) -> None:
    run = stopped_run(trained())
    ended = command("dpo-train", *tiny_words(pairs_file, run), "resume=auto", "beta=0.2", "log_every=2")
    assert ended.code == 4
    assert "beta: 0.1 -> 0.2" in ended.err and "log_every" not in ended.err


def test_resume_with_other_data_is_refused(trained: Trained, command: Command, pairs_file: Path) -> None:
    run = stopped_run(trained())
    write_jsonl(pairs_file, sample_rows(21))
    ended = command("dpo-train", *tiny_words(pairs_file, run), "resume=auto")
    assert ended.code == 4 and "was trained on other data" in ended.err


@pytest.mark.parametrize("harm", ["truncate", "flip", "delete", "append", "symlink"])
def test_a_damaged_checkpoint_is_passed_over_or_refused(
    trained: Trained, command: Command, pairs_file: Path, tmp_path: Path, harm: str
) -> None:
    run = stopped_run(trained("run", "save_every=1", "keep_checkpoints=9"))
    file = run / "checkpoints" / "step-00000003" / "adapter_model.safetensors"
    data = file.read_bytes()
    if harm == "truncate":
        file.write_bytes(data[:-1])
    elif harm == "flip":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif harm == "append":
        file.write_bytes(data + b"\0")
    else:
        file.unlink()
    if harm == "symlink":
        (tmp_path / "elsewhere").write_bytes(data)
        file.symlink_to(tmp_path / "elsewhere")
    explicit = command("dpo-train", *tiny_words(pairs_file, run), f"resume={file.parent}")
    assert explicit.code == 4 and "adapter_model.safetensors" in explicit.err
    ended = command("dpo-train", *tiny_words(pairs_file, run), "resume=auto")
    assert ended.code == 0 and "passed over a checkpoint" in ended.out
    assert "resuming from" in ended.out and "at step 2" in ended.out


def test_a_manifest_that_names_files_elsewhere_is_refused(trained: Trained) -> None:
    from dpo_cli.errors import CheckpointError

    checkpoint = trained() / "checkpoints" / "step-00000003"
    manifest = json.loads((checkpoint / "MANIFEST.json").read_text())
    manifest["files"]["../../config.yaml"] = {"bytes": 1, "sha256": ""}
    (checkpoint / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="names a file outside the checkpoint"):
        validate(checkpoint)


def test_old_checkpoints_go_and_new_ones_stay(trained: Trained) -> None:
    run = trained("run", "save_every=1", "keep_checkpoints=2")
    assert [path.name for path in checkpoints(run / "checkpoints")] == ["step-00000002", "step-00000003"]
    assert not list((run / "checkpoints").glob(".tmp*"))


def test_a_failed_save_leaves_earlier_checkpoints(
    trained: Trained, assembled: Callable[..., Assembled], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpo_cli.errors import StorageError
    from dpo_cli.runs import checkpoint

    run = assembled()
    run.recorder.save()
    run.progress.step = 1

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(StorageError, match="No space left on device"):
        run.recorder.save()
    left = list(run.context.directory.checkpoints.iterdir())
    assert [path.name for path in left] == ["step-00000000"]
    validate(left[0])


def test_a_loss_that_is_not_finite_ends_the_run_before_a_weight_moves(assembled: Callable[..., Assembled]) -> None:
    from dpo_cli.errors import DivergedError

    run = assembled()
    with torch.no_grad():
        next(p for n, p in run.learner.policy.named_parameters() if "lora_B" in n).fill_(float("inf"))
    before = {name: weight.detach().clone() for name, weight in run.learner.policy.named_parameters()}
    with pytest.raises(DivergedError, match=r"step 1: the loss of rows .* of the data is not finite .*not touched"):
        run.step(run.material.data.train[:4])
    assert all(torch.equal(weight, before[name]) for name, weight in run.learner.policy.named_parameters())


def test_ranked_responses_train_with_every_comparison_of_a_prompt_in_one_batch(
    command: Callable[..., Ended], tmp_path: Path
) -> None:
    rows = [{"prompt": f"Question {n}?", "responses": [f"good {n}", f"fair {n}", f"poor {n}"]} for n in range(4)]
    file = write_jsonl(tmp_path / "ranked.jsonl", rows)
    words = ["data.eval_fraction=0", "batch_size=3", "max_steps=4", "log_every=1"]
    ended = command("dpo-train", *tiny_words(file, tmp_path / "run"), *words)
    assert ended.code == 0, ended.err
    assert "kept 12 pairs of 4 rows" in ended.out
    assert records(tmp_path / "run")[-1]["epoch"] == 1


def test_pairs_longer_than_the_positions_a_model_has_learned_are_refused(
    command: Command, pairs_file: Path, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    model = tmp_path / "gpt2"
    tiny("gpt2", vocab_size=len(tiny_tokenizer), max_position_embeddings=100).save_pretrained(model)
    tiny_tokenizer.save_pretrained(model)
    words = [*tiny_words(pairs_file, tmp_path / "run"), f"model.name_or_path={model}"]
    ended = command("dpo-train", *words, "data.max_length=512")
    assert ended.code == 2, ended.err
    assert re.fullmatch(
        r"error: data\.max_length=512: there are pairs of \d+ tokens, and this model has learned 100 positions; "
        r"data\.max_length=100 fits\n",
        ended.err,
    )
    ended = command("dpo-train", *words, "data.max_length=100", "max_steps=1")
    assert ended.code == 0, ended.err
    judge = ["dpo-eval", f"checkpoint={tmp_path / 'run'}", "data=jsonl", f"data.eval={pairs_file}"]
    longer = command(*judge, "data.max_length=200")
    assert longer.code == 2 and "this model has learned 100 positions" in longer.err
    assert command(*judge, "data.max_length=100").code == 0
