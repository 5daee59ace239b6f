"""The reward model: where it starts, what it reads, what moves it, and what is left of it on disk."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TOPICS, Assembled, Ended, records, run_of, sample_rows, stop_in, tiny_words, write_jsonl
from safetensors.torch import load_file, save_file
from tiny_models import CPU, LORA, VOCABULARY, pair, tiny
from torch import Tensor

from dpo_cli.data.batches import Layout
from dpo_cli.data.tokens import TokenizedPair, token_ids
from dpo_cli.errors import CheckpointError
from dpo_cli.models.adapters import attach_lora
from dpo_cli.models.logps import MicroBatch, make_micro_batch, plain_attention
from dpo_cli.objectives.history import History
from dpo_cli.objectives.reward import (
    HEAD_FILE,
    Reward,
    attach_head,
    head_of,
    load_head,
    response_rewards,
    save_head,
)
from dpo_cli.theory.losses import LogRatios, PairLogps, make_loss
from dpo_cli.training import preflight as preflight_module
from dpo_cli.training.preflight import check_closing, check_gradients, run_checks

Command = Callable[..., Ended]
LN2 = 0.6931471805599453
TIMINGS = {"seconds", "pairs_per_second", "tokens_per_second", "peak_memory_gib"}
LEARNING = ("objective=reward", "optimizer.lr=1e-2", "optimizer.warmup_steps=0")  # so that a few steps show


def rewards_of(policy: Any, micro_batch: MicroBatch) -> PairLogps:
    return micro_batch.scores(response_rewards(policy, micro_batch)).pairs()


def trained_reward(pairs: Path, folder: Path, *words: str) -> Path:
    """A run of the tiny model with a reward head."""
    return run_of(*tiny_words(pairs, folder), *LEARNING, *words)


@pytest.fixture(scope="module")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("pairs") / "train.jsonl", sample_rows(26)[:20])


@pytest.fixture(scope="module")
def held_file(train_file: Path) -> Path:
    return write_jsonl(train_file.with_name("held.jsonl"), sample_rows(26)[20:])


@pytest.fixture(scope="module")
def run(train_file: Path, held_file: Path, cache: Path) -> Path:
    """A finished run, read by many tests and changed by none."""
    return trained_reward(train_file, train_file.with_name("run"), f"data.eval={held_file}", "max_steps=6")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]


def evaluated(command: Command, checkpoint: Path, output: Path, *words: object) -> Path:
    ended = command("dpo-eval", f"checkpoint={checkpoint}", f"output_dir={output}", "name=x", *words)
    assert ended.code == 0, ended.err
    return output / "x"


# Arithmetic


def reward_model(family: str = "llama", seed: int = 0) -> Any:
    """A small model whose adapters and head point somewhere."""
    policy = attach_lora(tiny(family), LORA, task=None)
    head = attach_head(policy)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=random))
        head.weight.copy_(torch.randn(head.weight.shape, generator=random))
        head.center.fill_(0.25)
    return policy


def last_hidden(policy: Any, prompt: Any, response: Any) -> Tensor:
    """h by the definition: one sequence alone, the decoder's last hidden state at its last token, (D,)."""
    ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
    with plain_attention(policy):
        return policy.get_base_model().get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0, -1]


def both(rewards: PairLogps) -> Tensor:
    """(2, B)."""
    return torch.stack([rewards.chosen, rewards.rejected])


# A one-token prompt and one-token responses, a long pair, and a ranking of three answers to one prompt.
FIRST, THIRD = pair(5, 3, 7, 1), pair(9, 4, 2, 3)
PAIRS = [
    FIRST, pair(1, 1, 1, 2), THIRD, pair(14, 9, 11, 5),
    replace(FIRST, rejected=pair(1, 6, 1, 6).chosen), replace(FIRST, chosen=FIRST.rejected, rejected=THIRD.chosen),
]  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3", "mixtral"])
@pytest.mark.parametrize("layout", [*Layout])
def test_a_reward_is_read_at_the_last_token_however_the_batch_is_laid_out(family: str, layout: Layout) -> None:
    policy = reward_model(family)
    weight = head_of(policy).weight  # type: ignore[union-attr]
    with torch.no_grad():
        # r = w . h - c, each response in a sequence of its own
        sides = [
            torch.stack([last_hidden(policy, one.prompt, side) @ weight - 0.25 for side in side_of])
            for one in PAIRS
            for side_of in [(one.chosen, one.rejected)]
        ]
        expected = torch.stack(sides, 1)
        together = both(rewards_of(policy, make_micro_batch(PAIRS, CPU, layout)))
    assert float(expected.std()) > 1  # so that agreeing says something
    assert float((together - expected).abs().max()) <= 5e-5 * float(expected.abs().max())


@pytest.mark.parametrize("layout", [*Layout])
def test_a_reward_depends_on_every_token_of_prompt_and_response_and_on_none_of_the_other_response(
    layout: Layout,
) -> None:
    policy = reward_model()
    one = pair(4, 5, 3)

    def reward_of_chosen(changed: TokenizedPair) -> float:
        with torch.no_grad():
            return float(rewards_of(policy, make_micro_batch([changed], CPU, layout)).chosen[0])

    def another(ids: Any, place: int) -> Any:
        values = ids.tolist()
        values[place] = 2 + (values[place] - 1) % (VOCABULARY - 2)
        return token_ids(values)

    before = reward_of_chosen(one)
    for place in range(4):
        assert abs(reward_of_chosen(replace(one, prompt=another(one.prompt, place))) - before) > 1e-3
    for place in range(5):
        assert abs(reward_of_chosen(replace(one, chosen=another(one.chosen, place))) - before) > 1e-3
    for place in range(3):
        assert abs(reward_of_chosen(replace(one, rejected=another(one.rejected, place))) - before) < 1e-5


def test_the_gradient_by_the_head_is_minus_sigmoid_of_minus_the_margin_times_the_difference_of_states() -> None:
    # d/dw -log sigmoid(w . (h+ - h-)) = -sigmoid(-m) (h+ - h-); the constant c falls out.
    policy = reward_model()
    head = head_of(policy)
    assert head is not None
    rewards = rewards_of(policy, make_micro_batch(PAIRS[:4], CPU, Layout.PACKED_SEGMENTS))
    ratios = LogRatios.between(rewards, zeros_like(rewards))
    (got,) = torch.autograd.grad(make_loss("sigmoid", 1.0)(rewards, ratios).sum(), head.weight)
    with torch.no_grad():
        apart = torch.stack(
            [last_hidden(policy, one.prompt, one.chosen) - last_hidden(policy, one.prompt, one.rejected)
             for one in PAIRS[:4]]
        )  # fmt: skip
        margins = apart @ head.weight
        by_hand = -(torch.sigmoid(-margins)[:, None] * apart).sum(0)
    assert float(by_hand.norm()) > 0.1
    assert float((got - by_hand).norm()) <= 1e-4 * float(by_hand.norm())


def zeros_like(rewards: PairLogps) -> PairLogps:
    nothing = torch.zeros_like(rewards.chosen)
    return PairLogps(nothing, nothing, rewards.chosen_tokens, rewards.rejected_tokens)


def given(chosen: list[float], rejected: list[float]) -> PairLogps:
    ones = torch.ones(len(chosen), dtype=torch.int64)
    return PairLogps(torch.tensor(chosen), torch.tensor(rejected), ones, ones)


def test_the_loss_is_the_same_function_as_dpos_with_the_reward_in_the_place_of_beta_times_the_log_ratio() -> None:
    # r+ - r- = ln 3: sigmoid is 3/4 and the loss ln 4/3; 0: ln 2; -ln 3: ln 4.
    rewards = given([math.log(3) + 5, 0.7, -2.0], [5.0, 0.7, -2.0 + math.log(3)])
    losses = make_loss("sigmoid", 1.0)(rewards, LogRatios.between(rewards, zeros_like(rewards)))
    assert losses.tolist() == pytest.approx([math.log(4 / 3), LN2, math.log(4)], rel=1e-5)
    # A policy with beta log pi/pi_ref = r, whatever the reference: its DPO loss is that number.
    reference = given([-12.0, -3.0, -8.0], [-9.0, -20.0, -8.5])
    policy = given(
        (reference.chosen + rewards.chosen / 0.1).tolist(), (reference.rejected + rewards.rejected / 0.1).tolist()
    )
    of_dpo = make_loss("sigmoid", 0.1)(policy, LogRatios.between(policy, reference))
    assert of_dpo.tolist() == pytest.approx(losses.tolist(), rel=1e-4)


# The run


def test_a_run_starts_at_ln2_with_every_reward_exactly_zero(run: Path) -> None:
    first = records(run)[0]
    assert (first["step"], first["split"]) == (0, "train")
    assert first["loss"] == pytest.approx(LN2, abs=1e-7)
    assert [first[f"rewards/{name}"] for name in ("chosen", "rejected", "margins")] == [0.0, 0.0, 0.0]
    assert first["rewards/accuracies"] == 0.5


def test_the_first_update_moves_the_head_alone_the_second_b_and_the_third_a(
    assembled: Callable[..., Assembled],
) -> None:
    # dL/dh = -sigmoid(-m) w, which is 0 while w is: no adapter has a gradient. With w it reaches B; the gradient of A
    # is multiplied by B, and B is 0 until the second update.
    run = assembled(*LEARNING, "beta=1", "samples.n=0")
    for movers in ({"head"}, {"head", "B"}, {"head", "B", "A"}):
        before = {name: weight.detach().clone() for name, weight in run.learner.policy.named_parameters()}
        run.step(run.material.data.train[:4])
        for name, weight in run.learner.policy.named_parameters():
            part = "head" if "reward_head" in name else "B" if "lora_B" in name else "A" if "lora_A" in name else "base"
            assert (not torch.equal(weight, before[name])) == (part in movers), name


def test_metrics_speak_of_rewards_and_of_no_log_probs_or_nats(run: Path) -> None:
    logged = records(run)
    for record in logged:
        assert not [name for name in record if "logp" in name or "per_token" in name or "kl" in name]
        assert {"loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"} <= set(record)
    assert (logged[-1]["step"], logged[-1]["split"]) == (6, "eval")


def test_the_report_says_what_follows_from_the_line_of_each_pair_and_what_the_run_saw(
    run: Path, command: Command, tmp_path: Path
) -> None:
    folder = evaluated(command, run, tmp_path)
    report, pairs = json.loads((folder / "report.json").read_text()), lines(folder)
    margins = [one["reward_chosen"] - one["reward_rejected"] for one in pairs]
    assert len(margins) == 6 and max(map(abs, margins)) > 1e-3
    assert [one["margin"] for one in pairs] == pytest.approx(margins, abs=1e-6)
    right = sum(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in margins) / 6
    assert report["rewards/accuracies"] == pytest.approx(right)
    assert report["rewards/margins"] == pytest.approx(sum(margins) / 6, abs=1e-6)
    assert report["loss"] == pytest.approx(sum(math.log1p(math.exp(-margin)) for margin in margins) / 6, abs=1e-6)
    # ECE over one wide bin would be |mean confidence - share right|; the bins must add up to all pairs.
    assert sum(one["pairs"] for one in report["calibration"]["bins"]) == 6
    assert not [name for name in (*report, *pairs[0]) if "logp" in name or "reference_" in name]
    assert (report["beta"], report["reference"]) == (1.0, None)
    for name in ("loss", "rewards/margins", "rewards/chosen"):
        assert records(run)[-1][name] == pytest.approx(report[name], abs=1e-6), name


def test_rewards_of_final_are_those_of_the_last_checkpoint_moved_to_mean_zero(
    run: Path, train_file: Path, command: Command, tmp_path: Path
) -> None:
    on = ("data=jsonl", f"data.eval={train_file}")
    final = lines(evaluated(command, run / "final", tmp_path / "final", *on))
    last = lines(evaluated(command, run / "checkpoints" / "step-00000006", tmp_path / "last", *on))
    rewards = [one[side] for one in final for side in ("reward_chosen", "reward_rejected")]
    before = [one[side] for one in last for side in ("reward_chosen", "reward_rejected")]
    assert len(rewards) == 40 and sum(rewards) / 40 == pytest.approx(0, abs=1e-5)
    center = sum(before) / 40
    assert abs(center) > 1e-3
    assert [one - other for one, other in zip(before, rewards, strict=True)] == pytest.approx([center] * 40, abs=1e-5)
    assert float(load_file(run / "final" / HEAD_FILE)["center"]) == pytest.approx(center, abs=1e-5)


def separable(number: int, flip: bool) -> list[dict[str, str]]:
    """Pairs whose better answer ends politely; or, flipped by coins, with labels that mean nothing."""
    rows = []
    coins = np.random.default_rng(3).random(number) < 0.5
    for row in range(number):
        polite, rude = f"About {TOPICS[row % 10]}: yes, with joy!", f"About {TOPICS[row % 10]}: no, go away."
        swapped = flip and bool(coins[row])
        rows.append({"prompt": f"{row}?", "chosen": rude if swapped else polite,
                     "rejected": polite if swapped else rude})  # fmt: skip
    return rows


@pytest.mark.parametrize("flip", [False, True])
def test_separable_pairs_are_learned_and_random_labels_are_not(tmp_path: Path, flip: bool) -> None:
    pairs = write_jsonl(tmp_path / "pairs.jsonl", separable(60, flip))
    held = records(trained_reward(pairs, tmp_path / "run", "max_steps=8", "batch_size=8"))[-1]
    assert held["split"] == "eval"
    if flip:
        assert 0.1 < held["rewards/accuracies"] < 0.9
        assert held["loss"] > 0.6
    else:
        assert held["rewards/accuracies"] == 1.0
        assert held["loss"] < 0.6


# Stopping and going on

STOPPED = ("max_steps=4", "micro_batch_size=2", "lora.dropout=0.1", "log_every=2", "eval_every=3", "save_every=2")


@pytest.fixture(scope="module")
def straight(train_file: Path, cache: Path) -> Path:
    """The run that the stopped ones must come to."""
    return trained_reward(train_file, train_file.with_name("straight"), *STOPPED)


@pytest.mark.parametrize("forward_pass", [1, 2, 4, 7, "evaluation"])
def test_a_stopped_run_resumes_to_the_same_bytes_head_included(
    straight: Path,
    train_file: Path,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    forward_pass: int | str,
) -> None:
    words = [*tiny_words(train_file, tmp_path / "stopped"), *LEARNING, *STOPPED]
    with monkeypatch.context() as patched:
        stop_in(patched, forward_pass)
        stopped = command("dpo-train", *words)
    assert stopped.code == 75, stopped.err
    resumed = command("dpo-train", *words, "resume=auto")
    assert resumed.code == 0, resumed.err
    saved = ("adapter_model.safetensors", HEAD_FILE)
    files = [f"final/{name}" for name in saved]
    files += [f"checkpoints/step-00000004/{name}" for name in (*saved, "optimizer.safetensors", "rng.safetensors")]
    for name in files:
        assert (straight / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes(), name
    kept = [
        [{key: value for key, value in record.items() if key not in TIMINGS} for record in records(folder)]
        for folder in (straight, tmp_path / "stopped")
    ]
    assert kept[0] == kept[1]


def test_verify_resume_proves_it_for_a_reward_model(train_file: Path, command: Command, tmp_path: Path) -> None:
    ended = command("dpo-train", *tiny_words(train_file, tmp_path / "run"), *LEARNING, "verify_resume=true")
    assert ended.code == 0, ended.err
    assert "resume is exact here" in ended.out and not (tmp_path / "run").exists()


# What is left on disk


def test_final_loads_with_peft_as_it_is(run: Path, tiny_path: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_path), run / "final")
    stored = load_file(run / "final" / "adapter_model.safetensors")
    loaded = {name.replace(".default.", "."): weight for name, weight in model.named_parameters() if "lora_" in name}
    assert loaded.keys() == stored.keys() and len(stored) == 28  # A and B on 7 linear layers of 2 blocks
    assert all(torch.equal(weight, stored[name]) for name, weight in loaded.items())
    named = json.loads((run / "final" / "adapter_config.json").read_text())
    assert (named["base_model_name_or_path"], named["task_type"]) == ("dpo-cli/tiny-random", None)
    assert set(load_file(run / "final" / HEAD_FILE)) == {"weight", "center"}


def code_of_card(final: Path, base: str) -> str:
    card = (final / "README.md").read_text()
    assert "- reward-model" in card and "the Bradley-Terry loss -log sigmoid(r+ - r-)" in card and "beta" not in card
    assert card.count("```python\n") == 1 and "generate" not in card
    return card.split("```python\n")[1].split("```")[0].replace("path/to/tiny-random", base)


def test_the_code_of_the_model_card_gives_the_reward_that_the_report_says(
    run: Path, held_file: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_path: str
) -> None:
    from transformers import AutoTokenizer

    first = lines(evaluated(command, run, tmp_path))[0]
    row = json.loads(held_file.read_text().splitlines()[first["index"]])
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    # Up to the token that closes the response: without the line's end that the template puts after it.
    text = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n{row['chosen']}<|im_end|>"
    input_ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    assert input_ids.shape[1] == first["prompt_tokens"] + first["chosen_tokens"]
    monkeypatch.chdir(run)
    names: dict[str, Any] = {"input_ids": input_ids}
    exec(code_of_card(run / "final", tiny_path), names)
    assert float(names["reward"]) == pytest.approx(first["reward_chosen"], abs=1e-4)
    assert abs(first["reward_chosen"]) > 1e-2


HARMS = {
    "missing": "cannot be read",
    "garbage": "cannot be read",
    "cut": "cannot be read",
    "shape": "is not the head of a reward model of this size",
    "names": "is not the head of a reward model of this size",
    "nan": "holds values that are no numbers",
    "integers": "holds values that are no numbers",
}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("place", ["run", "final"])
def test_a_head_that_does_not_fit_is_refused_by_its_files_name(
    run: Path, command: Command, tmp_path: Path, harm: str, place: str
) -> None:
    import shutil

    copy = shutil.copytree(run, tmp_path / "copy")
    file = copy / "final" / HEAD_FILE
    stored = load_file(file)
    weight, center = stored["weight"].clone(), stored["center"].clone()
    if harm == "missing":
        file.unlink()
    elif harm == "garbage":
        file.write_bytes(b"not tensors at all")
    elif harm == "cut":
        file.write_bytes(file.read_bytes()[:-4])
    elif harm == "shape":
        save_file({"weight": weight[:-1], "center": center}, file)
    elif harm == "names":
        save_file({"weight": weight}, file)
    elif harm == "nan":
        weight[3] = math.nan
        save_file({"weight": weight, "center": center}, file)
    else:
        save_file({"weight": weight.long(), "center": center}, file)
    ended = command("dpo-eval", f"checkpoint={copy if place == 'run' else copy / 'final'}")
    assert ended.code == 4, ended.err
    assert ended.err.startswith(f"error: {file}: {HARMS[harm]}") and ended.err.count("\n") == 1


def test_a_head_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    policy, other = reward_model(seed=1), attach_lora(tiny(), LORA, task=None)
    one = head_of(policy)
    assert one is not None
    save_head(policy, tmp_path, one.weight)
    load_head(other, tmp_path)
    two = head_of(other)
    assert two is not None
    assert torch.equal(one.weight, two.weight) and float(two.center) == 0.25
    with pytest.raises(CheckpointError, match="is not the head of a reward model of this size"):
        load_head(attach_lora(tiny(hidden_size=16, head_dim=4), LORA, task=None), tmp_path)


def test_a_damaged_head_in_a_checkpoint_is_found_by_its_manifest(run: Path, command: Command, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(run, tmp_path / "copy")
    file = copy / "checkpoints" / "step-00000006" / HEAD_FILE
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    ended = command("dpo-eval", f"checkpoint={file.parent}")
    assert ended.code == 4 and HEAD_FILE in ended.err and ended.err.count("\n") == 1


# What is said, and what is refused


def of_nats(out: str) -> list[str]:
    """The lines that speak of nats, but for the one on batches: that is measured on the language model."""
    return [line for line in out.splitlines() if "nats" in line and not line.startswith("batches ")]


def test_a_run_says_what_it_is_and_never_speaks_of_nats_or_asks_for_a_reference(
    command: Command, train_file: Path, held_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "cache"))
    words = [*tiny_words(train_file, tmp_path / "run"), f"data.eval={held_file}"]
    ended = command("dpo-train", *words, *LEARNING)
    assert ended.code == 0, ended.err
    assert not of_nats(ended.out) and "log-prob" not in ended.out
    assert "preflight passed in" in ended.out and "the loss starts at 0.6931 and margins at 0 (off by 0)" in ended.out
    assert "gradient reaches all 14 adapters and nothing else" in ended.out
    assert "rewards are centred: 0 is the mean of the responses of 20 training pairs" in ended.out
    assert f"dpo-label by=reward judge={tmp_path / 'run'} samples=..." in ended.out
    evaluated(command, tmp_path / "run", tmp_path / "report")
    assert not (tmp_path / "cache" / "reference").exists()
    dpo = command("dpo-train", *words[:-1], f"output_dir={tmp_path / 'dpo'}")  # which has one, and keeps its values
    assert dpo.code == 0, dpo.err
    assert len(list((tmp_path / "cache" / "reference").glob("*.logps"))) == 1


def test_no_word_of_a_verdict_on_a_reward_model_is_of_nats() -> None:
    said: dict[str, str] = {}
    for accuracy in (0.5, 1.0):  # on training pairs: nothing was learned, or all by heart
        train_records = [
            {"step": step, "split": "train", "loss": 9.0 if step == 6 else 0.6, "rewards/accuracies": accuracy,
             "rewards/margins": 0.01, "drift/margin_length_correlation": 0.9, "drift/pairs": 100}
            for step in range(12)
        ]  # fmt: skip
        for lower in (0.0, -1.3):  # the held-out loss, than at the start
            held_out = {
                "step": 11, "split": "eval", "loss": 0.693 - lower, "rewards/accuracies": 0.5,
                "rewards/margins": 0.01, "loss/improvement": lower,
                "intervals95": {"loss/improvement": [lower - 0.1, lower + 0.1]},
            }  # fmt: skip
            history = History.of([*train_records, held_out], 40, 1e-3, 1.0, 0.693)
            rules = [rule for rule in Reward.findings if rule.holds(history)]
            said |= {rule.name: rule.reason(history) + rule.next_step(history) for rule in rules}
    assert {"lr_too_high", "not_learning", "overfit", "length_driven"} <= set(said)
    for name, words in said.items():
        assert not [word for word in ("nats", "beta", "answers", "sigmoid_norm") if word in words], (name, words)


def test_a_dry_run_goes_through_and_writes_nothing(command: Command, train_file: Path, tmp_path: Path) -> None:
    ended = command("dpo-train", *tiny_words(train_file, tmp_path / "run"), *LEARNING, "dry_run=true")
    assert ended.code == 0, ended.err
    for said in ("preflight passed in", "the longest batch fits", "memory", "time", "nothing was"):
        assert said in ended.out, said
    assert not of_nats(ended.out) and not (tmp_path / "run").exists()


HELD = "a reward model (objective=reward) is held to no reference; leave it out"


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("beta=0.2", f"beta=0.2: {HELD}"),
        ("reference=adapter_off", f"reference=adapter_off: {HELD}"),
        ("reference.cache=off", f"reference.cache=off: {HELD}"),
        ("loss=ipo", "loss=ipo: a reward model has the sigmoid loss"),
        ("loss.sft_weight=0.1", "loss.sft_weight=0.1: a reward model gives no answers"),
        ("lora=off", "lora=off: a reward model trains adapters and a head; choose a LoRA"),
        ("objective=rewards", "objective=rewards: choose one of dpo, reward; did you mean 'reward'?"),
    ],
)
def test_what_does_not_belong_to_a_reward_model_is_refused(
    command: Command, train_file: Path, tmp_path: Path, word: str, says: str
) -> None:
    ended = command("dpo-train", *tiny_words(train_file, tmp_path / "run"), "objective=reward", word)
    assert (ended.code, ended.err) == (2, f"error: {says}\n")
    assert not (tmp_path / "run").exists()


def test_answers_of_a_reward_model_are_refused(run: Path, command: Command) -> None:
    ended = command("dpo-eval", f"checkpoint={run}", "samples=2")
    assert (ended.code, ended.err) == (2, "error: samples=2: a reward model gives no answers; leave it out\n")


# The preflight


def subject_of(run: Assembled) -> Any:
    pairs, texts = preflight_module.choose_pairs(run.material.data.train, run.material.data.train_texts)
    return preflight_module.PreflightSubject(
        run.learner.policy, run.learner.reference, run.learner.objective, run.material.encoder, pairs, texts,
        run.learner.batcher.device, run.learner.batcher.layout, run.learner.dtype, run.context.engine,
        at_start=True,
    )  # fmt: skip


@pytest.fixture
def subject(assembled: Callable[..., Assembled]) -> Any:
    return subject_of(assembled(*LEARNING, "beta=1", "samples.n=0"))


def test_the_preflight_passes_and_leaves_the_head_at_zero_without_a_gradient(subject: Any) -> None:
    said = run_checks(subject)
    assert "(off by 0); gradient reaches all 14 adapters and nothing else; a pair alone equals" in said
    assert "chain rule" not in said
    head = head_of(subject.policy)
    assert head is not None and not bool(head.weight.any()) and head.weight.grad is None
    assert all(weight.grad is None for weight in subject.policy.parameters())


def test_an_adapter_outside_the_forward_pass_is_named(subject: Any) -> None:
    subject.policy.add_module("ghost", torch.nn.ModuleDict({"lora_B": torch.nn.Linear(2, 2)}))
    with pytest.raises(CheckpointError, match=r"no gradient reaches 1 of 15 adapters \(ghost first\)"):
        run_checks(subject)


def test_a_base_weight_that_trains_beside_head_and_adapters_is_named(subject: Any) -> None:
    next(weight for name, weight in subject.policy.named_parameters() if "norm" in name).requires_grad_(True)
    with pytest.raises(CheckpointError, match="1 weights of the base train beside the adapters"):
        check_gradients(subject)


class TooEarly(Reward):
    """A reward model that is read one token before the last."""

    def score(self, policy: Any, micro_batch: MicroBatch) -> torch.Tensor:
        return super().score(policy, replace(micro_batch, ends=micro_batch.ends - 1))


def test_a_reward_that_is_read_before_the_closing_token_is_refused(subject: Any) -> None:
    assert check_closing(subject) == "EOS is scored"
    with pytest.raises(CheckpointError, match=r"the closing EOS of row \d+ is not scored"):
        run_checks(replace(subject, objective=TooEarly()))
