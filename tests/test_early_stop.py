"""Which step final/ holds: budgets on generated answers, early stopping, the best evaluation; after a kill the same."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Ended, records, run_of, sample_rows, tiny_words, write_jsonl

from dpo_cli.config.composition import composed_run, parse_overrides
from dpo_cli.config.schema import RunConfig, read_config, run_config
from dpo_cli.errors import DivergedError
from dpo_cli.runs.checkpoint import checkpoint_name, checkpoints, prune
from dpo_cli.runs.run_directory import RunDirectory, config_changes
from dpo_cli.training.choice import Choice, choose

Command = Callable[..., Ended]
TIMINGS = ("seconds", "pairs_per_second", "tokens_per_second", "peak_memory_gib")
# The rate is the same at every step, whatever the last one is.
MORE = (
    "max_steps=8", "eval_every=2", "optimizer.lr=0.1", "optimizer.schedule=constant", "optimizer.warmup_steps=0",
    "keep_checkpoints=9", "samples.n=6", "monitor=off",
)  # fmt: skip
WEIGHTS = "adapter_model.safetensors"


def config(*words: str) -> RunConfig:
    every = "eval_every=1"
    return run_config(composed_run(parse_overrides(["data=jsonl", "data.train=a.jsonl", every, *words])).container)


def lines(**columns: list[float]) -> dict[int, dict[str, Any]]:
    """Held-out lines at steps 10, 20, ... with these metrics."""
    names = {"kl": "samples/kl", "length": "samples/length_ratio", "loss": "loss", "accuracy": "rewards/accuracies"}
    number = len(next(iter(columns.values())))
    return {
        10 * (at + 1): {"loss": 0.5} | {names[name]: values[at] for name, values in columns.items()}
        for at in range(number)
    }


# The choice


def test_a_run_ends_at_the_first_evaluation_beyond_its_budget_and_takes_the_one_before() -> None:
    found = choose(config("budget.kl=10"), lines(kl=[2.0, 10.0, 10.5, 3.0]))
    reason = "the last evaluation within the budget; at step 30 samples/kl is 10.5, beyond budget.kl=10"
    assert found == Choice(20, reason, "at step 30 samples/kl is 10.5, beyond budget.kl=10")
    both = choose(config("budget.kl=10", "budget.length=1.5"), lines(kl=[2.0, 3.0], length=[1.5, 1.6]))
    assert (both.step, both.end) == (10, "at step 20 samples/length_ratio is 1.6, beyond budget.length=1.5")
    assert choose(config("budget.kl=10"), lines(kl=[2.0, math.nan])).step == 10
    assert choose(config("budget.kl=10"), lines(kl=[10.1])).step is None
    within = choose(config("budget.kl=10"), lines(kl=[2.0, 3.0]))
    assert within == Choice(20, "the last step", None)


def test_patience_counts_evaluations_since_the_best() -> None:
    losses = lines(loss=[0.6, 0.5, 0.55, 0.5, 0.4])
    two = choose(config("early_stop.patience=2"), losses)
    assert two.step == 40  # 0.5 again is no improvement on 0.5
    assert two.end == "the held-out loss did not improve since step 20 (early_stop.patience=2)"
    assert choose(config("early_stop.patience=3"), losses) == Choice(50, "the last step", None)
    best = choose(config("early_stop.patience=2", "keep_best=true"), losses)
    assert (best.step, best.end) == (20, two.end)
    rising = lines(accuracy=[0.6, 0.7, 0.7], loss=[0.6, 0.5, 0.4])
    of_accuracy = choose(config("early_stop.patience=1", "early_stop.metric=accuracy"), rising)
    assert of_accuracy.end == "the held-out accuracy did not improve since step 20 (early_stop.patience=1)"
    assert choose(config("early_stop.patience=1"), lines(loss=[math.nan])).end is not None


def test_the_best_is_the_first_with_the_best_metric_within_the_budget() -> None:
    found = choose(config("keep_best=true"), lines(loss=[0.6, 0.4, 0.5, 0.4]))
    assert found == Choice(20, "the best held-out loss of 4 evaluations", None)
    accuracy = choose(config("keep_best=true", "early_stop.metric=accuracy"), lines(accuracy=[0.6, 0.8, 0.7]))
    assert accuracy.step == 20
    limited = choose(config("keep_best=true", "budget.kl=1"), lines(loss=[0.6, 0.5, 0.4], kl=[0.1, 0.5, 2.0]))
    assert limited.step == 20
    assert limited.reason.startswith("the best held-out loss of 2 evaluations within the budget; at step 30 samples/kl")
    assert choose(config("keep_best=true"), lines(loss=[math.nan, 0.7])).step == 20
    # An evaluation of before a resume, without answers, is neither within nor beyond.
    assert choose(config("budget.kl=1"), {1: {"loss": 0.6}, **lines(kl=[0.5])}) == Choice(10, "the last step", None)
    assert choose(config("budget.kl=1"), {1: {"loss": 0.6}}).step is None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["budget.kl=0"], "budget.kl=0: must be above 0; nats a response; 10 is usual"),
        (["budget.length=0.9"], "budget.length=0.9: must be at least 1; times the reference's length, which is 1"),
        (["early_stop.patience=0"], "early_stop.patience=0: must be at least 1"),
        (["early_stop.metric=kl"], "early_stop.metric=kl: choose one of loss, accuracy, margin"),
        (["budget.kl=5", "eval_every=0"], "budget.kl=5.0: is decided at evaluations; set the steps between two of"),
        (["keep_best=true", "eval_every=0"], "keep_best=true: is decided at evaluations; set the steps between two"),
        (["early_stop.patience=2", "eval_every=0"], "early_stop.patience=2: is decided at evaluations; set the"),
        (["budget.length=2", "samples.n=0"], "budget.length=2.0: is measured on generated answers; leave samples.n=0"),
        (["keep_best=true", "data.eval_fraction=0"], "keep_best=true: no pair is held out to decide by; set data.eval"),
        (["budget.kl=5", "data.eval_fraction=0"], "budget.kl=5.0: no pair is held out to decide by; set data.eval or"),
        (["early_stop.metric=margin"], "early_stop.metric=margin: decides with early_stop.patience or keep_best=true"),
        (["objective=reward", "samples.n=4"], "samples.n=4: a reward model gives no answers"),
        (["objective=reward", "budget.kl=4"], "budget.kl=4.0: a reward model gives no answers"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_what_no_run_can_meet_is_refused_before_it_starts(
    command: Command, pairs_file: Path, tmp_path: Path, words: list[str], says: str
) -> None:
    given = [word for word in tiny_words(pairs_file, tmp_path / "run") if word.split("=")[0] != "samples.n"]
    ended = command("dpo-train", *given, "eval_every=1", *words)
    assert (ended.code, len(ended.err.splitlines())) == (2, 1), ended.err
    assert says in ended.err
    assert not (tmp_path / "run").exists()


def test_what_decides_the_last_step_is_not_changed_without_a_word() -> None:
    before, after = config("samples.n=4"), config("samples.n=5", "eval_every=2")
    assert config_changes(before, after) == ([], [])
    refused, told = config_changes(config("budget.kl=1", "samples.n=4"), config("budget.kl=2", "samples.n=5"))
    assert (refused, [change.key for change in told]) == ([], ["budget.kl", "samples.n"])


def test_the_chosen_checkpoint_is_not_pruned(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        (tmp_path / checkpoint_name(step)).mkdir()
    prune(tmp_path, 1, {1: 0.7, 2: 0.3, 3: 0.5}, chosen=3)
    assert [path.name[-1] for path in checkpoints(tmp_path)] == ["2", "3", "4"]


# Runs


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("early")
    write_jsonl(folder / "pairs.jsonl", sample_rows(20))
    return folder


def words(home: Path, name: str, *more: str) -> list[str]:
    return [*tiny_words(home / "pairs.jsonl", home / name), *MORE, *more]


@pytest.fixture(scope="module")
def free(home: Path) -> Path:
    """A run that nothing ends: the others do what it does until they end."""
    return run_of(*words(home, "free"))


def held_out(run: Path) -> list[dict[str, Any]]:
    return [line for line in records(run) if line["split"] == "eval"]


@pytest.fixture(scope="module")
def limit(free: Path) -> tuple[float, int, int]:
    """A budget between two evaluations of the free run, and their steps: the later is the first beyond it."""
    values = [line["samples/kl"] for line in held_out(free)]
    at = next(at for at in range(1, len(values)) if values[at] > max(0.01, *values[:at]))
    return (values[at] + max(0.01, *values[:at])) / 2, 2 * at, 2 * (at + 1)


def plain(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in records(run)]


def same_end(one: Path, other: Path) -> None:
    """Metrics, answers, weights and the choice are the same to the last bit."""
    assert plain(one) == plain(other)
    assert (one / "final" / WEIGHTS).read_bytes() == (other / "final" / WEIGHTS).read_bytes()
    manifests = [RunDirectory(run).read_manifest() for run in (one, other)]
    for key in ("final", "weights_sha256", "verdict"):
        assert manifests[0][key] == manifests[1][key]
    names = [sorted(file.name for file in (run / "samples").iterdir()) for run in (one, other)]
    assert names[0] == names[1]
    for name in names[0]:
        assert (one / "samples" / name).read_bytes() == (other / "samples" / name).read_bytes()


@pytest.fixture(scope="module")
def stopped(home: Path, limit: tuple[float, int, int]) -> Path:
    """A run that its budget ended."""
    return run_of(*words(home, "stopped", f"budget.kl={limit[0]}"))


def test_a_budget_ends_the_run_and_final_is_the_step_before(
    free: Path, stopped: Path, limit: tuple[float, int, int], command: Command
) -> None:
    budget, within, beyond = limit
    assert [line["step"] for line in held_out(stopped)] == list(range(2, beyond + 1, 2))
    assert plain(stopped) == plain(free)[: len(plain(stopped))]
    of_step = stopped / "checkpoints" / checkpoint_name(within)
    assert (stopped / "final" / WEIGHTS).read_bytes() == (of_step / WEIGHTS).read_bytes()
    assert (stopped / "final" / WEIGHTS).read_bytes() != (free / "final" / WEIGHTS).read_bytes()
    manifest = RunDirectory(stopped).read_manifest()
    assert manifest["final"]["step"] == within
    assert manifest["final"]["reason"].startswith(f"the last evaluation within the budget; at step {beyond} samples/kl")
    card = (stopped / "final" / "README.md").read_text()
    assert f"The weights are those of step {within} of 8: the last evaluation within the budget; at step" in card
    line = next(line for line in held_out(stopped) if line["step"] == within)
    assert f"| rewards/margins | {line['rewards/margins']:.4g} |" in card
    assert f"accuracy {line['rewards/accuracies']:.3g} " in manifest["verdict"]["summary"]
    again = command("dpo-train", *words(stopped.parent, "stopped", f"budget.kl={budget}", "resume=auto"))
    assert again.code == 0 and f"already complete: {stopped / 'final'}" in again.out
    replayed = command("dpo-train", f"replay={stopped}", f"output_dir={stopped.parent / 'replayed'}")
    assert replayed.code == 0 and f"the same weights as {stopped} (sha256 " in replayed.out
    assert f"final    step {within} of 8: the last evaluation within the budget" in replayed.out


def test_the_last_step_is_held_to_the_budget_too(home: Path, limit: tuple[float, int, int]) -> None:
    budget, within, beyond = limit
    run = run_of(*words(home, "last", f"budget.kl={budget}", f"max_steps={beyond}"))
    assert RunDirectory(run).read_manifest()["final"]["step"] == within
    of_step = run / "checkpoints" / checkpoint_name(within)
    assert (run / "final" / WEIGHTS).read_bytes() == (of_step / WEIGHTS).read_bytes()


def test_a_killed_run_chooses_what_the_straight_one_chose(
    home: Path, stopped: Path, limit: tuple[float, int, int], command: Command
) -> None:
    """From each checkpoint: the newest was written right after the evaluation that chose it."""
    for checkpoint in checkpoints(stopped / "checkpoints"):
        copy = home / f"killed-{checkpoint.name}"
        shutil.copytree(stopped, copy)
        shutil.rmtree(copy / "final")
        for later in checkpoints(copy / "checkpoints"):
            if later.name > checkpoint.name:
                shutil.rmtree(later)
        ended = command("dpo-train", *words(home, copy.name, f"budget.kl={limit[0]}", "resume=auto"))
        assert ended.code == 0, ended.err
        same_end(stopped, copy)


def test_a_resume_that_chooses_a_step_that_was_not_kept_says_so(
    home: Path, free: Path, limit: tuple[float, int, int], command: Command
) -> None:
    """Without a budget the run did not save the step that the budget of the resumed run chooses."""
    last = checkpoints(free / "checkpoints")[-1]
    copy = home / "tightened"
    shutil.copytree(free, copy, ignore=shutil.ignore_patterns("final", "step-????????"))
    shutil.copytree(last, copy / "checkpoints" / last.name)
    ended = command("dpo-train", *words(home, "tightened", f"budget.kl={limit[0]}", "resume=auto"))
    assert ended.code == 4 and not (copy / "final").exists()
    error = ended.err.splitlines()[-1]
    missing = copy / "checkpoints" / checkpoint_name(limit[1])
    assert error.startswith(f"error: {missing}: is not there, and final/ would be of it (the last evaluation within")
    assert error.endswith("; resume as the run began, or without budget.kl"), error
    assert command("dpo-train", *words(home, "tightened", "resume=auto")).code == 0
    same_end(free, copy)


def test_where_nothing_is_within_the_run_fails_and_leaves_no_final(
    home: Path, limit: tuple[float, int, int], command: Command
) -> None:
    budget, _, beyond = limit
    ended = command("dpo-train", *words(home, "none", f"budget.kl={budget}", f"eval_every={beyond}", "max_steps=7"))
    assert (ended.code, len(ended.err.splitlines())) == (DivergedError.exit_code, 1)
    assert f"step {beyond}: no evaluation is within the budget; at step {beyond} samples/kl is " in ended.err
    assert "Start again with a smaller optimizer.lr (0.01), or with a smaller eval_every" in ended.err
    assert not (home / "none" / "final").exists()
    assert not list((home / "none").rglob(".tmp-*"))
    manifest = RunDirectory(home / "none").read_manifest()
    assert "final" not in manifest and manifest["verdict"]["color"] in ("yellow", "red")


@pytest.fixture(scope="module")
def top(free: Path) -> int:
    """The first step at which the free run's held-out accuracy is 1: no later one improves on it."""
    accuracies = {line["step"]: line["rewards/accuracies"] for line in held_out(free)}
    first = next(step for step, accuracy in accuracies.items() if accuracy == 1)
    assert first in (2, 4) and accuracies[2] <= 1
    return first


def test_patience_ends_a_run_and_the_best_evaluation_is_final(home: Path, top: int, command: Command) -> None:
    more = ("early_stop.patience=1", "early_stop.metric=accuracy", "keep_best=true", "log_every=3")
    ended = command("dpo-train", *words(home, "patience", *more))
    assert ended.code == 0, ended.err
    run, last = home / "patience", top + 2
    assert [line["step"] for line in held_out(run)] == list(range(2, last + 1, 2))
    logged = [line["step"] for line in records(run) if line["split"] == "train"]
    assert logged == [step for step in range(last + 1) if step % 2 == 0 or step % 3 == 0]  # what may be last is logged
    of_step = run / "checkpoints" / checkpoint_name(top)
    assert (run / "final" / WEIGHTS).read_bytes() == (of_step / WEIGHTS).read_bytes()
    reason = (
        f"the best held-out accuracy of {top // 2 + 1} evaluations; the held-out accuracy did not improve since step "
        f"{top} (early_stop.patience=1)"
    )
    assert RunDirectory(run).read_manifest()["final"] == {"step": top, "reason": reason}
    assert f"final    step {top} of 8: {reason}" in ended.out
    for checkpoint in checkpoints(run / "checkpoints"):  # a kill right after the evaluation that saved it
        copy = home / f"patience-{checkpoint.name}"
        shutil.copytree(run, copy)
        shutil.rmtree(copy / "final")
        for later in checkpoints(copy / "checkpoints"):
            if later.name > checkpoint.name:
                shutil.rmtree(later)
        assert command("dpo-train", *words(home, copy.name, *more, "resume=auto")).code == 0
        same_end(run, copy)


def test_the_best_is_kept_though_only_the_newest_checkpoints_are(home: Path, top: int) -> None:
    more = ("keep_best=true", "early_stop.metric=accuracy", "keep_checkpoints=1", "save_every=1")
    run = run_of(*words(home, "best", *more))
    assert RunDirectory(run).read_manifest()["final"] == {
        "step": top,
        "reason": "the best held-out accuracy of 4 evaluations",
    }
    kept = {path.name for path in checkpoints(run / "checkpoints")}
    assert kept >= {checkpoint_name(top), checkpoint_name(8)} and len(kept) <= 3  # one may have the lowest loss
    of_step = run / "checkpoints" / checkpoint_name(top)
    assert (run / "final" / WEIGHTS).read_bytes() == (of_step / WEIGHTS).read_bytes()


# What answers cost: nothing that training does


@pytest.mark.parametrize("more", [("lora.dropout=0.1",), ("lora=off", "optimizer.lr=1e-3")], ids=["adapters", "all"])
def test_weights_are_the_same_with_answers_and_without(home: Path, more: tuple[str, ...]) -> None:
    more = (*more, "save_every=4", "tracker=tensorboard")
    runs = [run_of(*words(home, f"n-{n}-{len(more)}", *more, f"samples.n={n}")) for n in (0, 8)]
    name = "model.safetensors" if "lora=off" in more else WEIGHTS
    for file in (f"final/{name}", *(f"checkpoints/step-0000000{step}/{part}" for step in (4, 8)
                                     for part in (name, "optimizer.safetensors", "rng.safetensors"))):  # fmt: skip
        assert (runs[0] / file).read_bytes() == (runs[1] / file).read_bytes(), file
    without, answered = (held_out(run)[-1] for run in runs)
    sent = [b"".join(file.read_bytes() for file in run.glob("tensorboard/*")) for run in runs]
    assert [b"Tell me" in records for records in sent] == [False, True]  # samples.n=0 sends no text of the data
    assert not (runs[0] / "samples").exists() and not [key for key in without if key.startswith("samples/")]
    assert answered["samples/n"] == 6  # there are no more
    assert math.isfinite(answered["samples/kl"]) and answered["samples/kl"] != 0
    assert set(answered["intervals95"]) >= {"samples/kl", "samples/length_ratio", "samples/ends"}
    assert RunDirectory(runs[0]).read_manifest()["final"] == {"step": 8, "reason": "the last step"}
    texts = [json.loads(line) for line in (runs[1] / "samples" / "step-00000008.jsonl").read_text().splitlines()]
    assert [*texts[0]] == [
        "prompt", "reference", "policy", "kl", "tokens", "reference_tokens", "finish_reason",
        "reference_finish_reason",
    ]  # fmt: skip
    assert sum(text["kl"] for text in texts) / 6 == pytest.approx(answered["samples/kl"])
    assert all(text["prompt"].startswith("Tell me") and "\n" not in text["prompt"] for text in texts)
    first = [json.loads(line) for line in (runs[1] / "samples" / "step-00000002.jsonl").read_text().splitlines()]
    assert [text["reference"] for text in first] == [text["reference"] for text in texts]  # it never moves


def test_a_reward_model_needs_no_word_about_answers(home: Path) -> None:
    given = [word for word in tiny_words(home / "pairs.jsonl", home / "reward") if not word.startswith("samples")]
    run = run_of(*given, "objective=reward", "eval_every=1", "keep_best=true")
    assert read_config(run / "config.yaml").samples.n == 0
    assert RunDirectory(run).read_manifest()["final"]["step"] in (1, 2, 3)
