"""Soft labels: the loss of a pair whose label is right with probability w, from the row to the weights.

Letters: u = beta times the margin, L(u) a loss. softplus(-u) is DPO's loss, and softplus(u) = softplus(-u) + u.
"""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ended, records, sample_rows, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import CPU, pair
from torch import Tensor

from dpo_cli.config.composition import composed_run, parse_overrides
from dpo_cli.config.schema import run_config
from dpo_cli.data.batches import Layout
from dpo_cli.data.pairs import PairData, load_pairs
from dpo_cli.data.splits import data_fingerprint
from dpo_cli.data.tokens import PairEncoder
from dpo_cli.errors import DataError
from dpo_cli.models.logps import make_micro_batch
from dpo_cli.objectives.preference import Preference
from dpo_cli.objectives.reward import Reward
from dpo_cli.theory.calibration import reliability
from dpo_cli.theory.losses import (
    LOSSES,
    TWO_SIDED,
    LogRatios,
    PairLogps,
    ResponseScores,
    gradient_weight,
    loss_options,
    make_loss,
    sft_loss,
)
from dpo_cli.theory.metrics import pair_metrics, wins

BETA = 0.1
TOKENS = (torch.tensor([2, 4, 5]), torch.tensor([3, 6, 4]))
CHOSEN, REJECTED = torch.tensor([0.0, 0.1, -0.9]), torch.tensor([0.0, -9.9, -20.9])  # u = 0, 1, 2
OPTIONS = {"label_smoothing": 0.1, "temperature": 0.05}


def ratios(w: float | list[float] | None, chosen: Tensor = CHOSEN, rejected: Tensor = REJECTED) -> LogRatios:
    probabilities = None if w is None else torch.as_tensor(w, dtype=chosen.dtype).expand(chosen.shape)
    return LogRatios(chosen, rejected, *TOKENS, probabilities)


def of(name: str, w: float | list[float] | None, **options: float) -> Tensor:
    nothing = PairLogps(torch.zeros(3), torch.zeros(3), *TOKENS)
    used = {option: (OPTIONS | options)[option] for option in loss_options(name)}
    return make_loss(name, BETA, **used)(nothing, ratios(w))


# The loss


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # (1-v) softplus(-u) + v softplus(u) = softplus(-u) + v u, with softplus(-u) = 0.693147, 0.313262, 0.126928;
        # with e = 0.1 the share of the other label is v = 0.75 * 0.1 + 0.25 * 0.9 = 0.3
        ("sigmoid", [0.693147, 0.313262 + 0.3, 0.126928 + 0.6]),
        # robust weighs L(u) by (w - e) / (1 - 2e) = 0.65 / 0.8 = 0.8125, L(-u) by the rest
        ("robust", [0.693147, 0.313262 + 0.1875, 0.126928 + 0.375]),
        # relu(1 - u) = 1, 0, 0 and relu(1 + u) = 1, 2, 3
        ("hinge", [1, 0.5, 0.75]),
        # d = 0, 10, 20 and 1/(2b) = 5: (d - 5)^2 = 25, 25, 225 and (-d - 5)^2 = 25, 225, 625
        ("ipo_sum", [25, 75, 325]),
        # c/n+ - r/n- = 0, 1.675, 5.045: (-1.675 - 5)^2 = 44.555625 and (-5.045 - 5)^2 = 100.902025
        ("ipo", [25, 0.75 * 11.055625 + 0.25 * 44.555625, 0.75 * 0.002025 + 0.25 * 100.902025]),
        # b times the same: 0, 0.1675, 0.5045 with softplus(-x) = 0.693147, 0.6129, 0.47238
        ("sigmoid_norm", [0.693147, 0.6129 + 0.25 * 0.1675, 0.47238 + 0.25 * 0.5045]),
        # m = sigmoid(-20), sigmoid(-40) are 0: the other label gives softplus(1) = 1.313262 and softplus(2) = 2.126928
        ("discopop", [0.846574, 0.75 * 0.367879 + 0.25 * 1.313262, 0.75 * 0.135335 + 0.25 * 2.126928]),
    ],
)
def test_every_two_sided_loss_gives_its_golden_numbers_for_a_label_right_in_three_of_four(
    name: str, expected: list[float]
) -> None:
    assert of(name, 0.75).tolist() == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("name", TWO_SIDED)
def test_a_label_with_probability_one_is_a_certain_label_bit_by_bit(name: str) -> None:
    assert torch.equal(of(name, 1.0), of(name, None))
    grads = []
    for w in (1.0, None):
        sides = [one.clone().requires_grad_() for one in (CHOSEN, REJECTED)]
        used = {option: OPTIONS[option] for option in loss_options(name)}
        nothing = PairLogps(torch.zeros(3), torch.zeros(3), *TOKENS)
        make_loss(name, BETA, **used)(nothing, ratios(w, *sides)).sum().backward()
        grads.append(torch.stack([torch.as_tensor(one.grad) for one in sides]))
    assert torch.equal(*grads)


@pytest.mark.parametrize("name", TWO_SIDED)
def test_a_label_with_probability_zero_is_the_other_label(name: str) -> None:
    used = {option: OPTIONS[option] for option in loss_options(name)}
    swapped = LogRatios(REJECTED, CHOSEN, *reversed(TOKENS))
    assert of(name, 0.0).tolist() == pytest.approx(make_loss(name, BETA, **used).loss(swapped).tolist(), rel=1e-6)


def test_a_soft_label_is_label_smoothing_of_each_pair() -> None:
    for w in (0.6, 0.75, 0.9):
        soft, smooth = of("sigmoid", w, label_smoothing=0.0), of("sigmoid", None, label_smoothing=1 - w)
        assert soft.tolist() == pytest.approx(smooth.tolist(), rel=1e-6)
    mixed = of("sigmoid", [0.6, 0.75, 1.0], label_smoothing=0.0)
    alone = [of("sigmoid", w, label_smoothing=0.0)[index] for index, w in enumerate((0.6, 0.75, 1.0))]
    assert torch.equal(mixed, torch.stack(alone))


def test_a_tie_has_no_gradient_where_the_policy_has_not_moved_and_pulls_back_where_it_has() -> None:
    # d/du of -0.5 log sig(u) - 0.5 log sig(-u) is sig(u) - 1/2; per nat of c it is b times that.
    chosen = torch.tensor([0.0, 10.0, -10.0], dtype=torch.float64, requires_grad=True)
    nothing = torch.zeros(3, dtype=torch.float64)
    make_loss("sigmoid", BETA)(PairLogps(nothing, nothing, *TOKENS), ratios(0.5, chosen, nothing)).sum().backward()
    side = BETA * (1 / (1 + math.exp(-1)) - 0.5)
    assert torch.as_tensor(chosen.grad).tolist() == pytest.approx([0.0, side, -side], abs=1e-12)


@given(st.floats(0.02, 0.98))
def test_the_loss_is_least_where_the_policy_says_what_the_label_is_worth(w: float) -> None:
    u = torch.full((3,), math.log(w / (1 - w)), dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(3, dtype=torch.float64)
    make_loss("sigmoid", 1.0)(PairLogps(zero, zero, *TOKENS), ratios(w, u, zero)).sum().backward()
    assert torch.as_tensor(u.grad).abs().max() < 1e-9


@pytest.mark.parametrize("name", TWO_SIDED)
def test_autograd_of_soft_labels_agrees_with_finite_differences(name: str) -> None:
    used = {option: OPTIONS[option] for option in loss_options(name)}
    sides = [torch.tensor(values, dtype=torch.float64, requires_grad=True)
             for values in ([0.3, -1.1, 2.0], [-0.2, 0.4, -1.3])]  # fmt: skip

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        probabilities = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)
        policy = PairLogps(chosen, rejected, *TOKENS, probabilities)
        return make_loss(name, BETA, sft_weight=0.3, **used)(
            policy, LogRatios(chosen, rejected, *TOKENS, probabilities)
        ).sum()

    assert torch.autograd.gradcheck(loss, sides, eps=1e-6, atol=1e-6)


def test_labels_drawn_with_their_probability_have_the_soft_loss_as_their_mean() -> None:
    w, n = 0.7, 20_000
    right = torch.rand(n, generator=torch.Generator().manual_seed(0)) < w
    for name in TWO_SIDED:
        kept, flipped, soft = of(name, 1.0), of(name, 0.0), of(name, w)
        share = float(right.double().mean())
        drawn = share * kept + (1 - share) * flipped
        # Four standard deviations of the share times what a label changes.
        most = 4 * math.sqrt(w * (1 - w) / n) * (kept - flipped).abs() + 1e-5
        assert bool(((drawn - soft).abs() <= most).all()), name


def test_the_sft_loss_of_a_soft_label_is_that_of_both_responses() -> None:
    # -log pi / n: chosen 2/2, rejected 9/3; 0.75 * 1 + 0.25 * 3 = 1.5
    one = [torch.tensor([value]) for value in (-2.0, -9.0, 2, 3)]
    assert float(sft_loss(PairLogps(*one, torch.tensor([0.75])))) == pytest.approx(1.5)
    assert float(sft_loss(PairLogps(*one))) == 1.0


def test_the_losses_that_take_soft_labels_are_those_of_one_difference() -> None:
    """Of which a constant added to both log-ratios a token changes nothing."""
    for name in LOSSES:
        used = {option: OPTIONS[option] for option in loss_options(name)}
        equal = (torch.tensor([4, 4, 4]),) * 2
        at, moved = (make_loss(name, BETA, **used).loss(LogRatios(CHOSEN + by, REJECTED + by, *equal)) for by in (0, 8))
        assert (name in (*TWO_SIDED, "exo_pair")) == torch.allclose(at, moved, atol=1e-4), name


@pytest.mark.parametrize("name", sorted(set(LOSSES) - set(TWO_SIDED)))
def test_a_loss_without_a_form_for_them_refuses_soft_labels_by_name(name: str) -> None:
    objective = Preference(BETA, make_loss(name, BETA), name)
    objective.check_soft_labels("")
    with pytest.raises(DataError) as error:
        objective.check_soft_labels("pairs.jsonl line 3")
    assert str(error.value) == (
        f"pairs.jsonl line 3: has a soft label, which the loss {name} does not take; choose one of sigmoid, robust, "
        "hinge, ipo, ipo_sum, sigmoid_norm, discopop, or data.soft_labels=false and data.ties=drop"
    )


# Metrics


def test_accuracy_is_the_share_expected_of_labels_drawn_with_the_probabilities() -> None:
    differences, w = torch.tensor([2.0, -2.0, 0.0, 5.0]), torch.tensor([0.75, 0.75, 0.75, 0.5])
    assert wins(differences, w).tolist() == [0.75, 0.25, 0.5, 0.5]
    assert wins(differences, torch.ones(4)).tolist() == wins(differences).tolist() == [1.0, 0.0, 0.5, 1.0]
    policy, found = PairLogps(CHOSEN, REJECTED, *TOKENS), ratios([0.9, 0.8, 0.3])
    metrics = pair_metrics(policy, found, torch.zeros(3), torch.zeros(3), BETA)
    assert metrics["rewards/accuracies"].tolist() == pytest.approx([0.5, 0.8, 0.3])


def test_the_gradient_weight_is_that_of_a_certain_label() -> None:
    loss = make_loss("sigmoid", BETA).loss
    # sigmoid(-u) for u = 0, 1, 2
    assert gradient_weight(loss, ratios(0.5)).tolist() == pytest.approx([0.5, 0.268941, 0.119203], abs=1e-6)


def test_calibration_counts_a_pair_as_right_with_its_probability() -> None:
    # Two pairs at confidence sigmoid(1) = 0.73: one ahead with w = 0.9, one behind with w = 0.8: (0.9 + 0.2) / 2
    (found,) = reliability([1.0, -1.0], None, [0.9, 0.8])
    assert found.right.mean == pytest.approx(0.55)


# From the row to the micro-batch


def test_the_probabilities_of_a_micro_batch_follow_its_pairs() -> None:
    pairs = [pair(3, 2, 4, seed=n) for n in range(3)]
    for layout in (Layout.PADDED, Layout.PACKED_MASK):
        assert make_micro_batch(pairs, CPU, layout).probabilities is None
        soft = [replace(one, probability=w) for one, w in zip(pairs, (1.0, 0.25, 0.5), strict=True)]
        scores = make_micro_batch(soft, CPU, layout).scores(torch.arange(6.0))
        assert scores.probabilities is not None and scores.probabilities.tolist() == [1.0, 0.25, 0.5]
        assert scores.pairs().probabilities is scores.probabilities


@pytest.mark.parametrize("objective", [Preference.default(), Reward.default()], ids=["dpo", "reward"])
def test_an_objective_uses_the_probability_of_each_pair(objective: Any) -> None:
    units, values = torch.tensor([[0, 1], [2, 3]]), torch.tensor([5.0, 1.0, 0.0, 3.0])
    nothing = torch.zeros(4)
    w = torch.tensor([0.9, 0.2])
    found = objective(ResponseScores(values, torch.ones(4), units, w), ResponseScores(nothing, torch.ones(4), units, w))
    u = objective.beta * torch.tensor([4.0, -3.0])
    expected = torch.log1p(torch.exp(-u)) + (1 - w) * u
    assert found.losses.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert objective.start_loss == pytest.approx(math.log(2))


def load(folder: Path, tokenizer: Any, rows: list[Any], *words: str) -> PairData:
    words = ("data=jsonl", *words, f"data.train={write_jsonl(folder / 'rows.jsonl', rows)}", "data.eval_fraction=0")
    config = run_config(composed_run(parse_overrides([*words])).container).data
    return load_pairs(config, PairEncoder(tokenizer, "chat"), 0)


def row(**more: Any) -> dict[str, Any]:
    return {"prompt": "q", "chosen": "a", "rejected": "b", **more}


def test_a_probability_in_the_row_is_the_label_of_its_pair(tiny_tokenizer: Any, tmp_path: Path) -> None:
    values = [0.8, 0.3, "0.5", None, "", 1, 0]
    rows = [row(probability=value) for value in values] + [row()]
    data = load(tmp_path, tiny_tokenizer, rows)
    assert [one.probability for one in data.train] == [0.8, 0.3, 0.5, 1.0, 1.0, 1.0, 0.0, 1.0]
    # A probability below one half is no reason to swap the two.
    assert {(text.pair.chosen, text.pair.rejected) for text in data.train_texts} == {("a", "b")}
    assert data.train_report.sentences(512)[1:] == [
        "4 pairs with a soft label, their probability that chosen is better; data.soft_labels=false takes it as certain"
    ]
    certain = load(tmp_path, tiny_tokenizer, rows, "data.soft_labels=false")
    assert {one.probability for one in certain.train} == {1.0}
    assert certain.train_report.sentences(512)[1:] == ["not used: probability (5 rows)"]
    assert certain.train.fingerprint == data_fingerprint(certain.train) != data.train.fingerprint


def test_the_probability_may_have_another_name_and_must_then_be_there(tiny_tokenizer: Any, tmp_path: Path) -> None:
    words = ("data.columns.probability=meta.sure",)
    (one,) = load(tmp_path, tiny_tokenizer, [row(meta={"sure": 0.6}, probability=0.9)], *words).train
    assert one.probability == 0.6
    with pytest.raises(DataError, match=r"line 1: no 'meta\.sure' key \(data\.columns\.probability\)"):
        load(tmp_path, tiny_tokenizer, [row(probability=0.9)], *words)


@pytest.mark.parametrize("value", [1.5, -0.1, "much", "nan", True, [0.5]])
def test_what_is_no_probability_is_refused_with_its_column(tiny_tokenizer: Any, tmp_path: Path, value: Any) -> None:
    with pytest.raises(DataError) as error:
        load(tmp_path, tiny_tokenizer, [row(probability=value)])
    assert f"rows.jsonl line 1: 'probability' must be a probability from 0 to 1, it is {value!r}" in str(error.value)


def test_a_ranked_row_has_no_probability_and_its_column_is_listed(tiny_tokenizer: Any, tmp_path: Path) -> None:
    ranked = {"prompt": "q", "responses": ["a", "b"], "probability": 0.7}
    data = load(tmp_path, tiny_tokenizer, [ranked])
    assert [one.probability for one in data.train] == [1.0]
    assert data.train_report.not_used == {"probability": 1}


def test_ties_are_dropped_or_kept_with_probability_one_half(tiny_tokenizer: Any, tmp_path: Path) -> None:
    ranked = {"prompt": "q", "responses": ["a", "b", "c"], "scores": [2, 2, 1]}
    dropped = load(tmp_path, tiny_tokenizer, [ranked])
    assert [one.probability for one in dropped.train] == [1.0, 1.0] and dropped.train_report.dropped == {"tie": 1}
    kept = load(tmp_path, tiny_tokenizer, [ranked], "data.ties=half")
    assert [one.probability for one in kept.train] == [0.5, 1.0, 1.0] and not kept.train_report.dropped
    assert kept.train_report.sentences(512)[1:] == [
        "the rows make 3 pairs",
        "1 pair with two equally good responses (a tie): their label has probability 1/2",
    ]


# Whole runs

Command = Callable[..., Ended]


def trained(command: Command, folder: Path, rows: list[Any], *words: str) -> list[dict[str, Any]]:
    file = write_jsonl(folder.with_suffix(".jsonl"), rows)
    ended = command("dpo-train", "model=tiny", "model.dtype=float32", "data=jsonl", f"data.train={file}",
                    f"data.eval={file}", "data.limit=8", "data.eval_limit=4", "batch_size=4", "max_steps=3",
                    "optimizer.lr=1e-2", "optimizer.warmup_steps=0", "log_every=1", f"output_dir={folder}",
                    *words)  # fmt: skip
    assert ended.code == 0, ended.err
    return records(folder)


def test_a_label_and_its_probability_may_be_turned_round_together(command: Command, tmp_path: Path) -> None:
    """w for (a, b) is 1-w for (b, a): the same loss at every step, and the margin with the other sign."""
    rows = sample_rows(8)
    there = [one | {"probability": 0.8} for one in rows]
    back = [one | {"chosen": one["rejected"], "rejected": one["chosen"], "probability": 0.2} for one in rows]
    runs = [trained(command, tmp_path / name, some) for name, some in (("there", there), ("back", back))]
    hard = trained(command, tmp_path / "hard", there, "data.soft_labels=false")
    for one, other in zip(*runs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["rewards/margins"] == pytest.approx(-other["rewards/margins"], abs=1e-4)
        assert one["rewards/accuracies"] == pytest.approx(other["rewards/accuracies"], abs=1e-6)
    assert abs(runs[0][-1]["loss"] - hard[-1]["loss"]) > 0.01
    ended = command("dpo-eval", f"checkpoint={tmp_path / 'there'}", "name=again")
    assert ended.code == 0, ended.err
    report = json.loads((tmp_path / "there" / "eval" / "again" / "report.json").read_text())
    last = [one for one in runs[0] if one["split"] == "eval"][-1]
    for name in ("loss", "rewards/accuracies", "rewards/margins"):
        assert report[name] == pytest.approx(last[name], abs=1e-5)
    lines = (tmp_path / "there" / "eval" / "again" / "pairs.jsonl").read_text().splitlines()
    assert {json.loads(line)["probability"] for line in lines} == {0.8}


def test_a_run_of_ties_and_a_loss_that_takes_none(command: Command, tmp_path: Path) -> None:
    rows = [
        {"prompt": one["prompt"], "responses": [one["chosen"], one["rejected"]], "scores": [1, 1 + n % 2]}
        for n, one in enumerate(sample_rows(8))
    ]
    found = trained(command, tmp_path / "run", rows, "data.ties=half")
    assert found[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    ended = command("dpo-train", "model=tiny", "data=jsonl", f"data.train={file}", "data.ties=half", "loss=apo_zero",
                    "data.eval_fraction=0", f"output_dir={tmp_path / 'other'}")  # fmt: skip
    assert ended.code == 3
    assert "rows.jsonl line 1: has a soft label, which the loss apo_zero does not take; choose one of" in ended.err


def test_a_resumed_run_keeps_labels_as_they_were_when_it_began(command: Command, tmp_path: Path) -> None:
    """A run of an earlier version took every label as certain; its column probability must not change that."""
    rows = [one | {"probability": 0.6} for one in sample_rows(8)]
    whole = trained(command, tmp_path / "whole", rows, "data.soft_labels=false", "save_every=2", "keep_checkpoints=5")
    config = tmp_path / "whole" / "config.yaml"
    text = config.read_text()
    assert "soft_labels: false" in text
    lines = [line for line in text.splitlines() if "soft_labels" not in line]
    config.write_text("\n".join(["version: 4", *lines[1:]]) + "\n")
    shutil.rmtree(tmp_path / "whole" / "checkpoints" / "step-00000003")
    shutil.rmtree(tmp_path / "whole" / "final")
    again = trained(command, tmp_path / "whole", rows, "save_every=2", "keep_checkpoints=5", "resume=auto")
    assert again[-1]["loss"] == pytest.approx(whole[-1]["loss"], abs=1e-6)
