"""dpo-eval harness=[...] with the real lm_eval, on tiny tasks of this machine: its numbers are those of our own."""

import importlib.util
import json
import logging
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from conftest import Ended, sample_rows, write_jsonl

from dpo_cli.commands import harness
from dpo_cli.theory.statistics import mean_estimate

Command = Callable[..., Ended]
Trained = Callable[..., Path]

ROOT = Path(__file__).parent.parent
END = "<|im_end|>"  # closes a response in our own log-probs
ROWS = [{**row, "choices": [row["chosen"] + END, row["rejected"] + END]} for row in sample_rows(20)]
CHOICES = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc}]
metadata: {version: 3}
"""
WRITING = """
task: tiny_write
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["<|never|>"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wide console, and a cache of data of its own."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture
def tasks(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder of tasks over rows."""

    def made(*texts: str, rows: list[Any] = ROWS) -> Path:
        folder = tmp_path / "tasks"
        folder.mkdir()
        file = write_jsonl(tmp_path / "rows of tasks.jsonl", rows)
        for number, text in enumerate(texts):
            (folder / f"{number}.yaml").write_text(text.replace("ROWS", json.dumps(str(file))))
        return folder

    return made


def words(run: Path, tasks: Path, *names: str) -> list[str]:
    return [f"checkpoint={run}", f"harness=[{','.join(names)}]", f"harness_tasks={tasks}", "trust_remote_code=true"]


def report_in(run: Path, name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((run / "eval" / name / "report.json").read_text())
    return loaded


def greedy_answers(path: str, tokens: int) -> list[str]:
    """The answers of a stored model by argmax, one token after the other, without any of our code or lm_eval's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    answers = []
    for row in ROWS:
        text = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(text, add_special_tokens=False).input_ids
        start = len(ids)
        while len(ids) < start + tokens and ids[-1] != end:
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        answers.append(tokenizer.decode(ids[start:], skip_special_tokens=True))
    return answers


def test_the_numbers_of_a_task_are_those_of_our_own_log_probs(
    trained: Trained, command: Command, tasks: Callable[..., Path], pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder = trained("run", "optimizer.lr=3e-2", "max_steps=6"), tasks(CHOICES)
    seen: list[Any] = []
    compared = harness.compared
    monkeypatch.setattr(harness, "compared", lambda *found: seen.extend(found) or compared(*found))
    ended = command("dpo-eval", *words(run, folder, "tiny_choice"), "data=jsonl", f"data.eval={pairs_file}", "name=all")
    assert (ended.code, ended.err) == (0, "")
    report = report_in(run, "all")
    pairs = [json.loads(line) for line in (run / "eval" / "all" / "pairs.jsonl").read_text().splitlines()]
    measured = report["harness"]["tiny_choice"]
    wins = {}
    for role, found in zip(("policy", "reference"), seen, strict=True):
        samples = sorted(found["samples"]["tiny_choice"], key=lambda sample: sample["doc_id"])
        theirs = [[response[0][0] for response in sample["resps"]] for sample in samples]
        ours = [[pair[f"{role}_logps_{side}"] for side in ("chosen", "rejected")] for pair in pairs]
        # lm_eval counts the line break at the end of the prompt to every choice: it falls out of their difference.
        assert np.diff(theirs) == pytest.approx(np.diff(ours), abs=1e-3)
        wins[role] = [float(chosen > rejected) for chosen, rejected in ours]
        assert measured[role]["acc,none"] == pytest.approx(sum(wins[role]) / 20)
        assert measured[role]["acc,none"] == pytest.approx(report[f"accuracy_without_reference/{role}"])
        share = sum(wins[role]) / 20
        assert measured[role]["acc_stderr,none"] == pytest.approx(math.sqrt(share * (1 - share) / 19))
    differences = [after - before for after, before in zip(wins["policy"], wins["reference"], strict=True)]
    assert sum(differences) > 0  # or a swap of the two would not be seen
    expected = mean_estimate(differences)
    assert measured["difference"]["acc,none"] == pytest.approx([expected.mean, expected.low, expected.high])
    assert (measured["n"], measured["version"]) == (20, 3)
    assert report["lm_eval"] == {"version": "0.4.13", "chat_template": True, "limit": None, "batch_size": 8}
    shown = [line.split() for line in ended.out.splitlines() if line.startswith("tiny_choice")]
    [[_, metric, n, reference, _, policy, _, difference, *_]] = shown
    assert (metric, n) == ("acc", "20")
    assert [float(reference), float(policy)] == pytest.approx(
        [sum(wins[role]) / 20 for role in ("reference", "policy")]
    )
    assert float(difference) == pytest.approx(expected.mean, abs=1e-3) and difference.startswith("+")


def test_each_model_writes_its_own_answers_and_nothing_else_is_shown_or_written(
    trained: Trained, command: Command, tasks: Callable[..., Path], tiny_path: str, tmp_path: Path
) -> None:
    run = trained("run", "optimizer.lr=3e-2")
    answers = greedy_answers(tiny_path, 6)
    folder = tasks(CHOICES, WRITING, rows=[{**row, "answer": text} for row, text in zip(ROWS, answers, strict=True)])
    before = {path for path in tmp_path.rglob("*") if "datasets" not in path.parts}
    there = set(Path.cwd().iterdir())
    ended = command("dpo-eval", *words(run, folder, "tiny_*"), "harness_limit=15", "micro_batch_size=4", "samples=1")
    assert (ended.code, ended.err) == (0, "")
    report = report_in(run, "held-out-final")
    measured = report["harness"]["tiny_write"]
    assert measured["reference"]["exact_match,none"] == 1.0 and measured["n"] == 15
    assert measured["policy"]["exact_match,none"] < 0.9
    assert measured["difference"]["exact_match,none"][0] == measured["policy"]["exact_match,none"] - 1.0
    assert report["lm_eval"]["limit"] == 15 and report["lm_eval"]["batch_size"] == 4
    assert list(report["harness"]) == ["tiny_choice", "tiny_write"]
    lines = ended.out.splitlines()
    about = "benchmarks by lm_eval 0.4.13, with the chat template, the first 15 examples of each task; "
    assert f"harness_tasks={folder}: Python in it runs on this machine" in lines
    begin = lines.index(f"{about}standard errors in brackets")
    assert [line.split()[0] for line in lines[begin + 1 : begin + 4]] == ["task", "tiny_choice", "tiny_write"]
    unknown = [line for line in lines if "%|" in line or "oglikelihood" in line or "WARN" in line or "INFO" in line]
    assert unknown == []
    written = {path for path in tmp_path.rglob("*") if "datasets" not in path.parts} - before
    assert {path.relative_to(run / "eval").parts[0] for path in written if path != run / "eval"} == {"held-out-final"}
    assert set(Path.cwd().iterdir()) == there
    assert logging.getLogger("lm_eval").handlers == []


def test_a_whole_model_is_measured_beside_its_reference_without_a_chat_template(
    command: Command, tasks: Callable[..., Path], tiny_path: str, tmp_path: Path, pairs_file: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    torch.manual_seed(0)
    model.lm_head.weight.data.add_(torch.randn_like(model.lm_head.weight), alpha=1.0)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_path).save_pretrained(tmp_path / "model")
    folder = tasks(CHOICES, rows=[{**row, "choices": [row["chosen"], row["rejected"]]} for row in ROWS])
    ended = command(
        "dpo-eval", *words(tmp_path / "model", folder, "tiny_choice"), f"reference_model={tiny_path}", "data=jsonl",
        f"data.eval={pairs_file}", "data.template=plain", f"output_dir={tmp_path}", "name=whole",
    )  # fmt: skip
    assert (ended.code, ended.err) == (0, "")
    report = json.loads((tmp_path / "whole" / "report.json").read_text())
    assert report["lm_eval"]["chat_template"] is False
    for role, path in (("policy", tmp_path / "model"), ("reference", tiny_path)):
        share = np.mean([ours > theirs for ours, theirs in plain_logps(str(path))])
        assert report["harness"]["tiny_choice"][role]["acc,none"] == pytest.approx(share)
    scores = report["harness"]["tiny_choice"]
    assert scores["policy"] != scores["reference"]


def plain_logps(path: str) -> list[list[float]]:
    """log p of chosen and rejected behind the bare prompt, for each row."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    found = []
    for row in ROWS:
        found.append([])
        for side in ("chosen", "rejected"):
            prompt, whole = tokenizer(row["prompt"]).input_ids, tokenizer(row["prompt"] + row[side]).input_ids
            with torch.no_grad():
                logps = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            found[-1].append(sum(float(logps[at - 1, whole[at]]) for at in range(len(prompt), len(whole))))
    return found


def test_prompts_that_lose_their_beginning_are_said(
    trained: Trained, command: Command, tasks: Callable[..., Path]
) -> None:
    folder = tasks(CHOICES, rows=[{"prompt": "word " * 2500, "choices": ["yes", "no"]}])
    ended = command("dpo-eval", *words(trained(), folder, "tiny_choice"))
    assert ended.code == 0, ended.err
    said = "warning: harness: some prompts are longer than the model's 2,048 tokens and lost their beginning"
    assert ended.out.count(said) == 1


def test_the_difference_is_policy_minus_reference_example_by_example() -> None:
    def found(values: list[float], spread: Any = "N/A") -> dict[str, Any]:
        samples = [{"doc_id": n, "filter": "none", "acc": value, "f1": (1, 0)} for n, value in enumerate(values)]
        mean = sum(values) / len(values)
        return {
            "results": {
                "t": {
                    "alias": "t",
                    "acc,none": mean,
                    "acc_stderr,none": 0.1,
                    "f1,none": mean,
                    "f1_stderr,none": spread,
                },
                "group": {"alias": "group", "acc,none": mean},
            },
            "versions": {"t": 1},
            "higher_is_better": {"t": {"acc": True}},
            "n-samples": {"t": {"original": 9, "effective": len(values)}},
            "samples": {"t": samples[::-1]},
        }

    tasks = harness.compared(found([1, 1, 1, 0]), found([0, 1, 0, 0]))
    # Differences 1, 0, 1, 0: mean 1/2, standard deviation 1/sqrt(3), over sqrt(4), times the 3.182 of Student's t.
    half = 3.182446305 / math.sqrt(12)
    assert tasks["t"]["difference"]["acc,none"] == pytest.approx([0.5, 0.5 - half, 0.5 + half])
    assert tasks["t"]["difference"]["f1,none"] == [0.5, None, None]
    assert tasks["group"]["difference"] == {"acc,none": [0.5, None, None]}
    assert tasks["t"]["policy"] == {"acc,none": 0.75, "acc_stderr,none": 0.1, "f1,none": 0.75}
    assert tasks["t"]["reference"]["acc,none"] == 0.25 and tasks["t"]["n"] == 4
    same = harness.compared(found([1, 0]), found([1, 0]))
    assert same["t"]["difference"]["acc,none"] == [0.0, None, None]  # what differs nowhere may differ elsewhere


def test_mistakes_are_said_before_a_model_is_loaded(
    trained: Trained, command: Command, tasks: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained()
    marker = tmp_path / "ran"
    folder = tasks(
        CHOICES,
        CHOICES.replace("tiny_choice", "tiny_code") + "unsafe_code: true\n",
        CHOICES.replace("tiny_choice", "tiny_far").replace("path: json", "path: nobody/nothing"),
        CHOICES.replace("tiny_choice", "tiny_function") + "process_docs: !function evil.process\n",
        "task: tiny_broken\nmetric_list: [",
    )
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nprocess = None\n")
    no_trust = [f"checkpoint={run}", "harness=[tiny_function]", f"harness_tasks={folder}"]
    for given, code, error in (
        (no_trust, 2, f"harness_tasks={folder}: its YAML can run Python; read it, then add trust_remote_code=true"),
        ([f"checkpoint={run}", "harness=ifeval"], 2, "harness=ifeval: must be a list"),
        ([f"checkpoint={run}", "harness_limit=5"], 2,
         "harness_limit=5: needs tasks, for instance harness=[ifeval,gsm8k]"),
        (words(run, folder, "tiny_code"), 2,
         "harness=tiny_code: runs code that the model writes, which dpo-eval never does"),
        (words(run, tmp_path / "none", "tiny_choice"), 2, f"harness_tasks={tmp_path / 'none'}: no such folder"),
    ):  # fmt: skip
        ended = command("dpo-eval", *given)
        assert (ended.code, ended.err) == (code, f"error: {error}\n")
        assert "loading the model" not in ended.out
    assert not marker.exists()
    ended = command("dpo-eval", *words(run, folder, "tiny_far"))
    assert ended.code == 3 and ended.err.startswith("error: harness=tiny_far: cannot be loaded (")
    assert ended.err.endswith("; HF_HUB_OFFLINE is set: fetch its data once without\n") and ended.err.count("\n") == 1
    # The names of lm_eval itself are looked at, and the file in the folder that could not be read is named.
    ended = command("dpo-eval", *words(run, folder, "gsm8"))
    assert ended.code == 2 and ended.err.startswith("error: harness=gsm8: no such task; near it are gsm8k, ")
    assert f"; Skip {folder}/4.yaml (" in ended.err and ended.err.count("\n") == 1
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    ended = command("dpo-eval", *words(run, folder, "tiny_choice"))
    said = "harness=['tiny_choice']: the package lm_eval is not installed; pip install 'dpo-cli[harness]'"
    assert (ended.code, ended.err) == (2, f"error: {said}\n")


def test_a_reward_model_has_no_benchmarks(trained: Trained, command: Command, tasks: Callable[..., Path]) -> None:
    run, folder = trained("reward", "objective=reward"), tasks(CHOICES)
    ended = command("dpo-eval", *words(run, folder, "tiny_choice"))
    said = "harness=['tiny_choice']: a reward model gives no answers; leave it out"
    assert (ended.code, ended.err) == (2, f"error: {said}\n")


def test_a_task_that_does_not_fit_the_model_is_one_line(
    trained: Trained, command: Command, tasks: Callable[..., Path]
) -> None:
    folder = tasks(WRITING.replace("max_gen_toks: 6", "max_gen_toks: 5000").replace("{{answer}}", "{{chosen}}"))
    ended = command("dpo-eval", *words(trained(), folder, "tiny_write"))
    assert ended.code == 2 and ended.err.count("\n") == 1
    assert "error: harness=['tiny_write']: lm_eval fails on the reference (AssertionError: " in ended.err


def test_sigterm_stops_between_two_batches(
    trained: Trained, command: Command, tasks: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models.huggingface import HFLM

    calls: list[int] = []
    call = HFLM._model_call

    def stopping(self: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        return call(self, *arguments, **options)

    monkeypatch.setattr(HFLM, "_model_call", stopping)
    run = trained()
    ended = command("dpo-eval", *words(run, tasks(CHOICES), "tiny_choice"))
    assert (ended.code, ended.err) == (75, "error: stopped by SIGTERM\n")
    assert len(calls) == 1 and not (run / "eval").exists()


def test_rank_0_measures_for_all(trained: Trained, command: Command, tasks: Callable[..., Path]) -> None:
    run, folder = trained("run", "optimizer.lr=1e-2"), tasks(CHOICES)
    code = "from dpo_cli import cli; cli.evaluate()"
    both = [*words(run, folder, "tiny_choice"), "name=two", "device=cpu", "processes=2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    two = subprocess.run([sys.executable, "-c", code, *both], env=env, capture_output=True, text=True, timeout=300)
    assert (two.returncode, two.stderr) == (0, "")
    assert two.stdout.count("benchmarks by lm_eval") == 1
    one = command("dpo-eval", *words(run, folder, "tiny_choice"), "name=one")
    assert one.code == 0, one.err
    assert report_in(run, "two")["harness"] == report_in(run, "one")["harness"]


def test_without_a_network_nltk_is_not_asked_for_its_data() -> None:
    import nltk

    download = nltk.download
    with harness._offline(), pytest.raises(OSError, match="nltk's punkt_tab is not on this machine"):
        nltk.download("punkt_tab")
    assert nltk.download is download
