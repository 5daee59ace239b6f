"""The scales of dpo-eval: the policy with its adapter at a scale, and what an evaluation says in one sentence."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ended
from tiny_models import CPU, LORA, pair, tiny

from dpo_cli.console.text import safe_text
from dpo_cli.data.batches import Layout, SplitByPairs
from dpo_cli.errors import CheckpointError
from dpo_cli.evaluation.summary import summary_of
from dpo_cli.evaluation.token_ratios import best_and_worst, pieces_of, token_ratios
from dpo_cli.models.adapters import adapter_scale, attach_lora
from dpo_cli.models.logps import MicroBatcher, pair_logps
from dpo_cli.models.reference import AdapterOffReference
from dpo_cli.theory.statistics import Clusters, Estimate

Command = Callable[..., Ended]
Trained = Callable[..., Path]


def moved(family: str = "llama", strength: float = 0.3) -> Any:
    """A tiny policy whose adapters are not zero."""
    policy = attach_lora(tiny(family), LORA)
    torch.manual_seed(3)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=strength)
    return policy.eval()


def test_a_scale_multiplies_the_change_of_the_weights_and_ends_with_the_block() -> None:
    policy = moved()
    batch = MicroBatcher(CPU, Layout.PADDED, SplitByPairs(4)).lay_out([pair(5, 6, 7)])
    usual = pair_logps(policy, batch).chosen.detach()
    with adapter_scale(policy, 0.5):
        half = pair_logps(policy, batch).chosen.detach()
    assert torch.equal(pair_logps(policy, batch).chosen.detach(), usual)
    for name, weight in policy.named_parameters():  # half of B A, made without a scale
        if "lora_B" in name:
            weight.data.mul_(0.5)
    assert torch.allclose(half, pair_logps(policy, batch).chosen.detach(), atol=1e-5)
    assert not torch.allclose(half, usual, atol=1e-3)
    with pytest.raises(CheckpointError, match="cannot be scaled"), adapter_scale(tiny(), 0.5):
        pass


def test_the_scales_go_from_the_reference_to_the_policy(trained: Trained, command: Command) -> None:
    run = trained("run", "optimizer.lr=1e-2")
    ended = command("dpo-eval", f"checkpoint={run}", "scales=[0,0.5,1]", "samples=2", "max_new_tokens=4")
    assert ended.code == 0, ended.err
    report = json.loads((run / "eval" / "held-out-final" / "report.json").read_text())
    nothing, half, whole = report["scales"]
    assert nothing["rewards/margins"] == [0.0, 0.0, 0.0] and nothing["rewards/accuracies"][0] == 0.5
    assert nothing["loss"][0] == pytest.approx(math.log(2))
    low, high = report["intervals95"]["rewards/margins"]
    assert whole["rewards/margins"] == pytest.approx([report["rewards/margins"], low, high], abs=1e-6)
    assert half["rewards/margins"][0] not in (0.0, pytest.approx(report["rewards/margins"]))
    assert nothing["samples/kl"][0] == pytest.approx(0, abs=1e-4) and nothing["samples/length_ratio"][0] == 1.0
    assert whole["samples/kl"][0] == pytest.approx(report["samples/kl"], abs=1e-6)
    before, after = ([line.split(": ", 1)[1] for line in ended.out.splitlines() if line.startswith(who)]
                     for who in ("reference (before)", "policy (after)"))  # fmt: skip
    assert [before, after] == [[safe_text(one) for one in end["answers"]] for end in (nothing, whole)]
    assert "0 is the reference, 1 the policy as trained" in ended.out


@pytest.mark.parametrize(
    "words", [["scales=[-1]"], ["scales=[1e300]"], ["scales=[.nan]"], ["scales=0.5"], ["scales=[a]"]]
)
def test_a_scale_that_is_no_scale_is_refused(command: Command, words: list[str]) -> None:
    ended = command("dpo-eval", "checkpoint=anything", *words)
    assert ended.code == 2 and "must be a list" in ended.err


def test_what_has_no_adapter_or_gives_no_answers_has_no_scales(trained: Trained, command: Command) -> None:
    whole = command("dpo-eval", f"checkpoint={trained('full', 'lora=off', 'model.dtype=auto')}", "scales=[0.5]")
    assert whole.code == 2 and "a whole model has no adapter to scale" in whole.err
    rewards = command("dpo-eval", f"checkpoint={trained('rewards', 'objective=reward')}", "scales=[0.5]")
    assert rewards.code == 2 and "scales=[0.5]: a reward model gives no answers" in rewards.err


@pytest.mark.parametrize("layout", [Layout.PADDED, Layout.PACKED_MASK])
def test_the_ratios_of_tokens_add_up_to_those_of_responses(layout: Layout) -> None:
    policy = moved()
    pairs = [pair(5, 6, 7, seed=1), pair(4, 3, 9, seed=2), pair(5, 2, 2, seed=3)]
    batcher, reference = MicroBatcher(CPU, layout, SplitByPairs(2)), AdapterOffReference(policy)
    found = token_ratios(policy, reference, batcher, pairs)
    assert [tuple(map(len, both)) for both in found] == [one.scored_tokens for one in pairs]
    for one, (chosen, rejected) in zip(pairs, found, strict=True):
        batch = batcher.lay_out([one])
        before = batch.scores(reference.logps(batch)).pairs()
        now = pair_logps(policy, batch)
        assert sum(chosen) == pytest.approx(float(now.chosen.detach() - before.chosen), abs=1e-4)
        assert sum(rejected) == pytest.approx(float(now.rejected.detach() - before.rejected), abs=1e-4)


def test_pieces_are_the_text_and_keep_every_ratio(tiny_tokenizer: Any) -> None:
    import numpy as np

    text = "Déjà vu 🦊, twice. Then naïve."
    ids = np.array(tiny_tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)
    unscored = np.array([1, 3], dtype=np.int32)
    ratios = [0.5] * (len(ids) - 2)
    pieces = pieces_of(tiny_tokenizer.decode, int(ids[0]), ids, unscored, ratios)
    assert "".join(piece for piece, _ in pieces) == text
    assert sum(value for _, value in pieces if value is not None) == pytest.approx(sum(ratios))
    assert not any("\ufffd" in piece for piece, _ in pieces)


def test_the_best_come_first_and_no_pair_is_both() -> None:
    assert best_and_worst([0.1, -2.0, math.nan, 3.0]) == [("best", 3), ("best", 0), ("worst", 1)]
    assert best_and_worst([1.0]) == [("best", 0)]
    assert best_and_worst([math.inf]) == []
    many = best_and_worst([float(number) for number in range(100)])
    assert many[0] == ("best", 99) and many[20] == ("worst", 0) and len(many) == 40


@pytest.mark.parametrize(
    ("accuracy", "lower", "color", "says"),
    [
        ((0.6, 0.55, 0.65), (0.02, 0.01, 0.03), "green", "prefers the chosen responses beyond chance"),
        ((0.6, 0.55, 0.65), (0.02, -0.01, 0.03), "yellow", "cannot be told from the reference"),
        ((0.52, 0.45, 0.6), (0.02, 0.01, 0.03), "yellow", "cannot be told from the reference"),
        ((0.6, 0.55, 0.65), (-0.2, -0.3, -0.1), "yellow", "its loss is higher than at the start"),
        ((0.3, 0.2, 0.4), (-0.2, -0.3, -0.1), "red", "prefers the rejected responses"),
    ],
)
def test_an_evaluation_says_in_a_sentence_what_its_intervals_allow(
    accuracy: tuple[float, ...], lower: tuple[float, ...], color: str, says: str
) -> None:
    found = {"rewards/accuracies": Estimate(*accuracy, 50), "loss/improvement": Estimate(*lower, 50)}
    said = summary_of(found, Clusters(range(50)), None, 0)
    assert said["color"] == color and says in said["text"]
    assert summary_of(found, Clusters(range(50)), None, 3)["color"] == "red"


def test_a_model_that_loops_is_red_however_right_it_is() -> None:
    def measured(**means: float) -> dict[str, Estimate]:
        usual = {"kl": 3.0, "length": 40.0, "length_ratio": 1.0, "ends": 0.9, "repetition": 0.02, "distinct_2": 0.6}
        usual |= {f"reference_{name}": value for name, value in usual.items() if name not in ("kl", "length_ratio")}
        values = {f"samples/{name}": value for name, value in (usual | means).items()}
        values |= {"rewards/accuracies": 0.8, "loss/improvement": 0.2}
        return {name: Estimate(mean, mean * 0.95, mean * 1.05, 50) for name, mean in values.items()}

    def color(**means: float) -> str:
        return summary_of(measured(**means), Clusters(range(50)), None, 0)["color"]

    assert color() == "green"
    assert color(repetition=0.5) == "red" and color(distinct_2=0.1) == "red"
    assert color(length_ratio=2.0) == color(ends=0.2) == color(kl=60.0) == "yellow"
    assert color(ends=0.02, reference_ends=0.02, kl=19.0) == "green"


def test_the_best_and_worst_pairs_of_a_run_add_up_to_their_margins(
    trained: Trained, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpo_cli.commands import evaluate

    given: list[Any] = []
    page = evaluate.evaluation_page
    monkeypatch.setattr(evaluate, "evaluation_page", lambda *what: given.append(what) or page(*what))
    run = trained("run", "optimizer.lr=1e-2")
    assert command("dpo-eval", f"checkpoint={run}").code == 0
    ((_, lines, examples, _),) = given
    margins = {line["margin"] for line in lines}
    for one in examples:
        chosen, rejected = (sum(value for _, value in one[side]) for side in ("chosen", "rejected"))
        assert one["margin"] in margins and 0.1 * (chosen - rejected) == pytest.approx(one["margin"], abs=1e-4)
    assert [one["kind"] for one in examples] == sorted(one["kind"] for one in examples)


def test_what_is_said_of_sampled_answers_follows_from_their_lines(trained: Trained, command: Command) -> None:
    run = trained("run", "optimizer.lr=1e-2")
    ended = command("dpo-eval", f"checkpoint={run}", "max_new_tokens=6")
    folder = run / "eval" / "held-out-final"
    report = json.loads((folder / "report.json").read_text())
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == report["samples/n"] == 6  # as many as there are prompts
    kls = [line["kl"] for line in lines]
    assert report["samples/kl"] == pytest.approx(sum(kls) / 6, abs=1e-6)
    low, high = report["intervals95"]["samples/kl"]
    spread = math.sqrt(sum((kl - sum(kls) / 6) ** 2 for kl in kls) / 5 / 6)
    assert (high - low) / 2 == pytest.approx(2.5706 * spread, rel=1e-3)  # Student's t, 5 degrees of freedom
    assert report["samples/length"] == pytest.approx(sum(line["tokens"] for line in lines) / 6)
    assert "sampled answers to 6 held-out prompts, temperature 1, at most 6 tokens" in ended.out
    none = command("dpo-eval", f"checkpoint={run}", "kl_samples=0")
    assert none.code == 0 and "sampled answers" not in none.out
    assert "samples/kl" not in json.loads((folder / "report.json").read_text())


def test_prompts_that_leave_no_room_for_an_answer_are_said(
    trained: Trained, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpo_cli.commands import evaluate

    run = trained()
    monkeypatch.setattr(evaluate, "position_limit", lambda model: 30)
    ended = command("dpo-eval", f"checkpoint={run}", "max_new_tokens=29")
    said = (
        "warning: max_new_tokens=29: no held-out prompt leaves room for so many within the 30 positions of this model"
    )
    assert ended.code == 0 and said in ended.out
