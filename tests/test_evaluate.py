"""dpo-eval: every form of checkpoint, the same numbers however batched, and a report that adds up."""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Ended, records, sample_rows, write_jsonl
from safetensors.torch import load_file, save_file

from dpo_cli.theory.statistics import Clusters

Command = Callable[..., Ended]
Trained = Callable[..., Path]


def report(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return loaded


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]


def evaluated(command: Command, checkpoint: Path, *words: object) -> Path:
    ended = command("dpo-eval", f"checkpoint={checkpoint}", *words)
    assert ended.code == 0, ended.err
    where = next(line for line in ended.out.splitlines() if line.startswith("report"))
    return Path(where.split(maxsplit=1)[1]).parent


def test_the_report_equals_what_the_run_saw_at_its_end(trained: Trained, command: Command) -> None:
    run = trained("run", "lora.dropout=0.3")  # which neither evaluation applies
    last = records(run)[-1]
    found = report(evaluated(command, run))
    for name in ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "gradient_weight"):
        assert found[name] == pytest.approx(last[name], abs=1e-6), name


def test_the_report_equals_what_follows_from_the_line_of_each_pair(trained: Trained, command: Command) -> None:
    folder = evaluated(command, trained())
    found, pairs = report(folder), lines(folder)
    margins = []
    for pair in pairs:
        chosen = 0.1 * (pair["policy_logps_chosen"] - pair["reference_logps_chosen"])
        rejected = 0.1 * (pair["policy_logps_rejected"] - pair["reference_logps_rejected"])
        assert pair["reward_chosen"] == pytest.approx(chosen, abs=1e-5)
        assert pair["margin"] == pytest.approx(chosen - rejected, abs=1e-5)
        assert {"index", "key", "prompt_tokens", "chosen_tokens", "rejected_tokens"} <= set(pair)
        margins.append(pair["margin"])
    assert found["pairs"] == len(pairs)
    assert found["rewards/margins"] == pytest.approx(sum(margins) / len(margins), abs=1e-6)
    assert found["loss"] == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / len(margins), abs=1e-6)
    wins = sum(1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in margins)
    assert found["rewards/accuracies"] == pytest.approx(wins / len(margins))
    low, high = found["intervals95"]["rewards/accuracies"]
    assert 0 <= low <= found["rewards/accuracies"] <= high <= 1 and low < high


def test_intervals_follow_from_the_lines_and_count_prompts(trained: Trained, command: Command, tmp_path: Path) -> None:
    rows = [{**row, "prompt": sample_rows(4)[place % 4]["prompt"]} for place, row in enumerate(sample_rows(12))]
    held = write_jsonl(tmp_path / "held.jsonl", rows)
    run = trained()
    ended = command("dpo-eval", f"checkpoint={run}", "data=jsonl", f"data.eval={held}")
    assert (
        "12 pairs of 4 prompts; the intervals take prompts as independent, not pairs (effective number 4.0)"
        in ended.out
    )
    folder = next((run / "eval").iterdir())
    found, pairs = report(folder), lines(folder)
    assert (found["pairs"], found["prompts"], found["prompts_effective"]) == (12, 4, 4.0)
    of_prompts = Clusters([int(pair["prompt"], 16) for pair in pairs])
    margins = of_prompts.mean([pair["margin"] for pair in pairs])
    assert found["intervals95"]["rewards/margins"] == pytest.approx([margins.low, margins.high], abs=1e-6)
    lower = of_prompts.mean([math.log(2) - math.log1p(math.exp(-pair["margin"])) for pair in pairs])
    assert found["loss/improvement"] == pytest.approx(lower.mean, abs=1e-6)
    assert found["intervals95"]["loss/improvement"] == pytest.approx([lower.low, lower.high], abs=1e-6)
    right = of_prompts.share([float(pair["margin"] > 0) for pair in pairs])
    assert found["intervals95"]["rewards/accuracies"] == pytest.approx([right.low, right.high], abs=1e-6)


def test_pairs_of_one_prompt_give_no_interval(trained: Trained, command: Command, tmp_path: Path) -> None:
    rows = [{**row, "prompt": "The same question."} for row in sample_rows(5)]
    run = trained()
    ended = command(
        "dpo-eval", f"checkpoint={run}", "data=jsonl", f"data.eval={write_jsonl(tmp_path / 'held.jsonl', rows)}"
    )
    assert "5 pairs of 1 prompt: too little for an interval" in ended.out
    assert report(next((run / "eval").iterdir()))["intervals95"]["rewards/margins"] == [None, None]


def test_scores_that_are_not_finite_are_said_and_are_null(trained: Trained, command: Command) -> None:
    run = trained()
    file = run / "final" / "adapter_model.safetensors"
    tensors = load_file(file)
    first = min(tensors)
    save_file({**tensors, first: tensors[first] * math.nan}, file, {"format": "pt"})
    ended = command("dpo-eval", f"checkpoint={run}", "scales=[1]")
    folder = next((run / "eval").iterdir())
    found, pairs = report(folder), lines(folder)
    assert f"warning: the scores of {len(pairs)} of {len(pairs)} pairs are not finite, so no mean above " in ended.out
    assert found["loss"] is None and found["intervals95"]["loss"] == [None, None] and pairs[0]["margin"] is None
    assert found["scales"][0]["loss"] == [None, None, None]
    assert "NaN" not in (folder / "report.json").read_text() + (folder / "pairs.jsonl").read_text()


def test_with_the_sft_loss_the_improvement_is_of_the_whole_loss(trained: Trained, command: Command) -> None:
    run = trained("run", "loss.sft_weight=0.5")
    found, pairs = report(evaluated(command, run)), lines(next((run / "eval").iterdir()))
    starts = [math.log(2) - 0.5 * pair["reference_logps_chosen"] / pair["chosen_tokens"] for pair in pairs]
    assert found["loss"] + found["loss/improvement"] == pytest.approx(sum(starts) / len(starts), abs=1e-5)


@pytest.mark.parametrize(("loss", "claims"), [("sigmoid", True), ("ipo", False)])
def test_calibration_is_shown_where_sigmoid_of_the_margin_claims_to_be_a_probability(
    trained: Trained, command: Command, loss: str, claims: bool
) -> None:
    run = trained("run", f"loss={loss}")
    ended = command("dpo-eval", f"checkpoint={run}")
    assert ("calibration error " in ended.out) == claims
    assert ("calibration" in report(next((run / "eval").iterdir()))) == claims


def test_batch_size_changes_nothing(trained: Trained, command: Command) -> None:
    run = trained()
    reports = [report(evaluated(command, run, f"micro_batch_size={n}", f"name=size-{n}")) for n in (1, 2, 5)]
    for name in ("loss", "rewards/margins", "logps/rejected"):
        assert [one[name] for one in reports] == pytest.approx([reports[0][name]] * 3, abs=1e-6)


def test_every_form_of_checkpoint_gives_the_same_numbers(trained: Trained, command: Command, tmp_path: Path) -> None:
    import shutil

    run = trained()
    bare = tmp_path / "bare-adapter"
    shutil.copytree(run / "final", bare)
    held = write_jsonl(tmp_path / "held.jsonl", sample_rows(26)[20:])
    forms = [run, run / "checkpoints" / "step-00000003", run / "final", bare]
    found = [
        report(evaluated(command, form, "data=jsonl", f"data.eval={held}", f"output_dir={tmp_path / str(n)}"))
        for n, form in enumerate(forms)
    ]
    assert [one["rewards/margins"] for one in found] == pytest.approx([found[0]["rewards/margins"]] * 4, rel=0.05)
    assert [one["rewards/margins"] for one in found[:3]] == [found[0]["rewards/margins"]] * 3


def test_a_whole_model_needs_its_reference(trained: Trained, command: Command, tiny_path: str, tmp_path: Path) -> None:
    run = trained("full", "lora=off", "model.dtype=auto", "optimizer.lr=1e-3")
    held = write_jsonl(tmp_path / "held.jsonl", sample_rows(26)[20:])
    bare = tmp_path / "model"
    (run / "final").rename(bare)
    words = (f"checkpoint={bare}", "data=jsonl", f"data.eval={held}", f"output_dir={tmp_path / 'out'}")
    alone = command("dpo-eval", *words)
    assert alone.code == 2 and "add reference_model=<the SFT model>" in alone.err
    assert command("dpo-eval", *words, f"reference_model={tiny_path}").code == 0
    assert report(tmp_path / "out" / "held-model")["rewards/margins"] != 0


def test_the_held_out_pairs_are_those_of_the_run(trained: Trained, command: Command) -> None:
    run = trained()
    manifest = json.loads((run / "manifest.json").read_text())
    pairs = lines(evaluated(command, run))
    assert len(pairs) == manifest["data"]["held_out"]["kept"] > 0
    assert (run / "eval" / "held-out-final" / "report.json").is_file()


def test_samples_show_answers_of_both(trained: Trained, command: Command) -> None:
    ended = command("dpo-eval", f"checkpoint={trained()}", "samples=2", "max_new_tokens=4")
    assert ended.code == 0
    assert ended.out.count("prompt: ") == ended.out.count("policy (after): ") == 2


def test_other_data_of_the_run_is_set_by_key(trained: Trained, command: Command, tmp_path: Path) -> None:
    held = write_jsonl(tmp_path / "other.jsonl", sample_rows(33)[30:])
    folder = evaluated(command, trained(), f"data.eval={held}", "data.max_length=300")
    assert [line["index"] for line in lines(folder)] == [0, 1, 2]
    assert folder.name == "other-final"
    three = evaluated(command, folder.parent.parent, "++data.eval_limit=2")
    assert len(lines(three)) == 2


def test_a_bare_adapter_remembers_the_sft_adapter_under_it(trained: Trained, command: Command, tmp_path: Path) -> None:
    import shutil

    sft = trained("sft", "optimizer.lr=1e-2", "max_steps=8")
    run = trained("run", f"model.adapter={sft / 'final'}")
    shutil.copytree(run / "final", tmp_path / "bare")
    held = write_jsonl(tmp_path / "held.jsonl", sample_rows(26)[20:])
    words = ("data=jsonl", f"data.eval={held}")
    of_run = lines(evaluated(command, run, *words, f"output_dir={tmp_path / 'a'}"))
    of_bare = lines(evaluated(command, tmp_path / "bare", *words, f"output_dir={tmp_path / 'b'}"))
    key = "reference_logps_chosen"
    assert [line[key] for line in of_bare] == pytest.approx([line[key] for line in of_run], rel=5e-3)
    shutil.copytree(sft / "final", tmp_path / "plain")
    of_plain = lines(evaluated(command, tmp_path / "plain", *words, f"output_dir={tmp_path / 'c'}"))
    assert abs(of_plain[0][key] - of_run[0][key]) > 0.5


def test_a_stopped_run_is_evaluated_at_its_newest_checkpoint(trained: Trained, command: Command) -> None:
    import shutil

    run = trained("run", "save_every=1")
    shutil.rmtree(run / "final")
    assert report(evaluated(command, run))["checkpoint"].endswith("step-00000003")


@pytest.mark.parametrize("code", [4])
def test_what_is_no_checkpoint_is_named(command: Command, tmp_path: Path, code: int) -> None:
    (tmp_path / "empty").mkdir()
    for name, says in (
        (tmp_path / "nowhere", "no such directory; name a run directory, checkpoints/step-*, final/,"),
        (tmp_path / "empty", "neither a run, nor a checkpoint, adapter or model"),
    ):
        ended = command("dpo-eval", f"checkpoint={name}")
        assert ended.code == code and says in ended.err and ended.err.count("\n") == 1


def test_an_adapter_of_another_shape_is_refused(trained: Trained, command: Command, pairs_file: Path) -> None:
    run = trained()
    config = json.loads((run / "final" / "adapter_config.json").read_text())
    (run / "final" / "adapter_config.json").write_text(json.dumps({**config, "r": 8}))
    ended = command("dpo-eval", f"checkpoint={run}")
    assert ended.code == 4 and "this adapter does not fit the model" in ended.err


def test_an_adapter_that_lacks_tensors_or_comes_as_a_pickle_is_refused(trained: Trained, command: Command) -> None:
    from safetensors.torch import load_file, save_file

    run = trained()
    file = run / "final" / "adapter_model.safetensors"
    tensors = load_file(file)
    lost = min(tensors)
    save_file({name: value for name, value in tensors.items() if name != lost}, file)
    ended = command("dpo-eval", f"checkpoint={run}")
    assert ended.code == 4 and f"lacks 1 tensors of the adapter, {lost} first" in ended.err
    file.rename(run / "final" / "adapter_model.bin")
    ended = command("dpo-eval", f"checkpoint={run}")
    assert ended.code == 4 and "has no adapter_model.safetensors; only safetensors are read" in ended.err


def test_a_config_with_an_interpolation_is_not_resolved(trained: Trained, command: Command) -> None:
    run = trained()
    text = (run / "config.yaml").read_text().replace("output_dir: ", "output_dir: ${oc.env:HOME}", 1)
    (run / "config.yaml").write_text(text)
    ended = command("dpo-eval", f"checkpoint={run}")
    assert ended.code == 4 and "holds an interpolation" in ended.err


def test_beta_and_loss_are_those_of_the_run(trained: Trained, command: Command) -> None:
    run = trained("smooth", "loss.label_smoothing=0.2", "beta=0.5")
    found = report(evaluated(command, run))
    margins = [line["margin"] for line in lines(run / "eval" / "held-out-final")]
    expected = [0.8 * math.log1p(math.exp(-m)) + 0.2 * math.log1p(math.exp(m)) for m in margins]
    assert found["beta"] == 0.5
    assert found["loss"] == pytest.approx(sum(expected) / len(expected), abs=1e-6)
    losses = [line["loss"] for line in lines(run / "eval" / "held-out-final")]
    assert losses == pytest.approx(expected, abs=1e-6)
    assert (found["loss_name"], found["loss_options"]) == ("sigmoid", {"label_smoothing": 0.2})


def test_a_report_says_which_weights_it_is_of(trained: Trained, command: Command) -> None:
    run = trained()
    found = report(evaluated(command, run))
    weights = (run / "final" / "adapter_model.safetensors").read_bytes()
    assert found["weights_sha256"] == hashlib.sha256(weights).hexdigest()


def test_neither_the_cache_nor_the_way_of_making_batches_changes_the_numbers(
    trained: Trained, command: Command
) -> None:
    run = trained("run", "optimizer.lr=1e-2")
    ways = ([], ["reference_cache=off"], ["layout=padded"], ["layout=padded", "reference_cache=off"])
    folders = [evaluated(command, run, f"name=way{number}", *words) for number, words in enumerate(ways)]
    assert [report(folder)["layout"] for folder in folders] == [
        "packed_segments",
        "packed_segments",
        "padded",
        "padded",
    ]
    for folder in folders[1:]:
        for one, other in zip(lines(folders[0]), lines(folder), strict=True):
            for name, value in one.items():
                assert other[name] == (pytest.approx(value, abs=1e-4) if isinstance(value, float) else value)


def test_an_evaluation_takes_the_way_that_the_run_took(trained: Trained, command: Command) -> None:
    padded = trained("padded", "layout=padded")
    assert report(evaluated(command, padded))["layout"] == "padded"
