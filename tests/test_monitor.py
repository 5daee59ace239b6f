"""Drift, alarms and verdicts: each rule with a history that triggers it and one that does not."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.objectives.alarms import ENOUGH, preference_alarms
from dpo_cli.objectives.drift import correlation, kl_per_token, measure_drift
from dpo_cli.objectives.findings import History, Verdict, assess, finding_rules
from dpo_cli.objectives.preference import Preference, columns_of
from dpo_cli.objectives.reward import Reward
from dpo_cli.theory.losses import LogRatios, make_loss
from dpo_cli.training.monitor import WINDOW, Monitor


def ratios(chosen: Any, rejected: Any, chosen_tokens: Any = 10, rejected_tokens: Any = 10) -> LogRatios:
    columns = [torch.as_tensor(value, dtype=torch.float32) for value in (chosen, rejected)]
    width = max(column.numel() for column in columns)
    tokens = [torch.as_tensor(value, dtype=torch.float32).expand(width) for value in (chosen_tokens, rejected_tokens)]
    return LogRatios(*(column.expand(width) for column in columns), *tokens)


def monitor(mode: str = "warn", beta: float = 0.1, loss: str = "sigmoid") -> Monitor:
    return Monitor(Preference(beta, make_loss(loss, beta), loss), mode)


# Drift


def test_drift_counts_by_hand() -> None:
    # b = 0.1, d = [0, 30, -30, 60]: weights sigmoid(-b d) = 1/2, 0.0474, 0.9526, 0.0025
    drift = measure_drift(ratios([0.0, 20.0, -20.0, 40.0], [0.0, -10.0, 10.0, -20.0], 10, 5), beta=0.1)
    assert drift.weight_over_09 == 0.25
    assert drift.weight_under_01 == 0.5
    assert drift.saturated == 0.25
    assert drift.heaviest_share == 1.0  # fewer than ten pairs
    assert drift.chosen_nats == 10.0
    assert drift.chosen_per_token == 1.0
    assert drift.rejected_per_token == -1.0  # -5 nats over 5 tokens
    assert drift.margin == pytest.approx(0.1 * 15)
    assert drift.case == "apart"


def test_the_ten_heaviest_pairs_share_of_the_gradient() -> None:
    # ten pairs at weight 1/2, ninety at sigmoid(-2.2) = 0.0998: 5 / (5 + 8.98)
    drift = measure_drift(ratios([0.0] * 10 + [22.0] * 90, 0.0), beta=0.1)
    light = 1 / (1 + math.exp(2.2))
    assert drift.heaviest_share == pytest.approx(5 / (5 + 90 * light), abs=1e-6)


@pytest.mark.parametrize(
    ("chosen", "rejected", "case"),
    [(1, 2, "both up"), (-2, -1, "both down"), (1, -1, "apart"), (-1, 1, "crossed"), (0.01, -0.01, "still")],
)
def test_the_four_cases_have_names(chosen: float, rejected: float, case: str) -> None:
    assert measure_drift(ratios([float(chosen)], float(rejected)), 0.1).case == case


def test_correlation_is_pearsons() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert correlation(x, 3 * x + 1) == pytest.approx(1.0)
    assert correlation(x, -x) == pytest.approx(-1.0)
    assert correlation(x, torch.ones(4)) == 0.0
    # deviations [-1.5, -.5, .5, 1.5] and [-1, 1, -1, 1]: 2 / sqrt(5 * 4)
    assert correlation(x, torch.tensor([0.0, 2.0, 0.0, 2.0])) == pytest.approx(2 / math.sqrt(20))


@given(st.floats(-20, 20), st.floats(-20, 20))
def test_the_kl_estimate_is_never_negative_and_zero_at_the_start(chosen: float, rejected: float) -> None:
    assert kl_per_token(ratios([chosen], rejected)) >= 0
    assert kl_per_token(ratios([0.0], 0.0)) == 0
    # a log-ratio of 1 nat a token: e^-1 - 1 + 1 = 0.3679
    assert kl_per_token(ratios([10.0], 10.0)) == pytest.approx(math.exp(-1), abs=1e-6)


# Monitor

ALARMS = {
    # a window that triggers the rule, and one close by that does not
    "displacement": (ratios([-40.0] * 64, -90.0), ratios([-1.0] * 64, -6.0)),
    "crossed": (ratios([-5.0] * 64, 5.0), ratios([-5.0] * 64, -5.0)),
    "far": (ratios([8.0] * 64, -10.0), ratios([1.0] * 64, -1.0)),
    "length": (
        ratios(torch.arange(64.0), 0.0, 100 + torch.arange(64.0), 100.0),
        ratios(torch.arange(64.0), 0.0, 100 + torch.arange(64.0) % 2, 100.0),
    ),
    "saturated": (ratios([60.0] * 64, 0.0, 1000, 1000), ratios([20.0] * 64, 0.0, 1000, 1000)),
}


@pytest.mark.parametrize("name", [rule.name for rule in preference_alarms("sigmoid")])
def test_every_alarm_sounds_when_it_should_and_not_otherwise(name: str) -> None:
    triggers, quiet = ALARMS[name]
    watch = monitor("warn")
    watch.add(columns_of(triggers))
    assert name in [alarm.name for alarm in watch.alarms(watch.drift())]
    calm = monitor("warn")
    calm.add(columns_of(quiet))
    assert name not in [alarm.name for alarm in calm.alarms(calm.drift())]


def test_an_alarm_gives_its_numbers_and_a_remedy_and_sounds_once() -> None:
    watch = monitor("warn")
    watch.add(columns_of(ALARMS["displacement"][0]))
    alarms = {alarm.name: alarm for alarm in watch.alarms(watch.drift())}
    assert alarms["displacement"].text == (
        "chosen fell 40 nats a response (4.00 a token) while the margin grows: likelihood displacement; "
        "a smaller optimizer.lr or loss.sft_weight=0.1 usually stops it"
    )
    assert watch.alarms(watch.drift()) == []


def test_stop_ends_a_run_for_what_holds_now_said_before_or_not() -> None:
    watch = monitor("stop")
    watch.restore(torch.zeros(4, 0), ["displacement"])
    watch.add(columns_of(ALARMS["displacement"][0]))
    ruin = watch.ruin(watch.drift())
    assert ruin is not None and ruin.name == "displacement"
    warned, calm = monitor("warn"), monitor("stop")
    warned.add(columns_of(ALARMS["displacement"][0]))
    calm.add(columns_of(ALARMS["length"][0]))  # an alarm, and no ruin
    assert warned.ruin(warned.drift()) is None and calm.ruin(calm.drift()) is None


def test_a_reward_model_is_warned_in_words_of_its_own() -> None:
    for name, (triggers, _) in ALARMS.items():
        watch = Monitor(Reward(), "stop")
        watch.add(columns_of(triggers))
        alarms = {alarm.name: alarm.text for alarm in watch.alarms(watch.drift())}
        assert watch.ruin(watch.drift()) is None and alarms.keys() <= {"length", "saturated"}
        if name == "length":
            assert "balance the lengths of the pairs" in alarms["length"]
            assert "policy" not in alarms["length"] and "loss=" not in alarms["length"]


def test_saturation_is_a_matter_of_the_sigmoid_loss() -> None:
    watch = monitor("warn", 2.0, "sigmoid_norm")
    watch.add(columns_of(ALARMS["saturated"][0]))
    assert "saturated" not in [alarm.name for alarm in watch.alarms(watch.drift())]


def test_off_is_silent_and_few_pairs_prove_nothing() -> None:
    off, young = monitor("off"), monitor("warn")
    off.add(columns_of(ALARMS["displacement"][0]))
    young.add(columns_of(ratios([-40.0] * (ENOUGH - 1), -90.0)))
    assert off.alarms(off.drift()) == [] == young.alarms(young.drift())


def test_the_window_forgets_and_survives_a_checkpoint() -> None:
    watch = monitor("warn")
    watch.add(columns_of(ratios([-40.0] * 10, -90.0)))
    watch.add(columns_of(ratios([0.0] * WINDOW, 0.0)))
    assert watch.drift().chosen_nats == 0.0 and watch.drift().pairs == WINDOW
    again = monitor("warn")
    again.restore(watch.state(), ["far"])
    assert again.drift() == watch.drift() and again.sounded == ["far"]


# Verdict


def history(
    *,
    accuracy: float = 0.7,
    margin: float = 0.5,
    loss: float = 0.5,
    held_out: int = 200,
    train_accuracy: float = 0.72,
    early_accuracy: float = 0.6,
    chosen: float = -0.02,
    rejected: float = -0.1,
    correlation: float = 0.1,
    saturated: float = 0.0,
    skipped: int = 0,
    worst: float = 0.7,
    start: float = math.log(2),
) -> History:
    """A healthy history, but for what a test changes."""
    train = [
        {
            "split": "train", "step": step, "loss": start if step == 0 else worst if step == 6 else 0.6,
            "rewards/margins": margin, "rewards/accuracies": early_accuracy if step < 11 else train_accuracy,
            "drift/chosen_per_token": chosen, "drift/rejected_per_token": rejected, "drift/pairs": 256,
            "drift/margin_length_correlation": correlation, "drift/saturated": saturated,
            "skipped_steps": skipped,
        }
        for step in range(21)
    ]  # fmt: skip
    end = {"split": "eval", "step": 20, "rewards/accuracies": accuracy, "rewards/margins": margin, "loss": loss}
    return History.of([*train, end] if held_out else train, held_out, lr=5e-5, beta=0.1)


def judged(name: str = "sigmoid", **changes: Any) -> Verdict:
    return assess(history(**changes), finding_rules(in_nats=True, loss=name))


VERDICTS: dict[str, tuple[dict[str, float], dict[str, float]]] = {
    # what triggers a rule, and what comes close and does not
    "wrong_way": ({"accuracy": 0.3, "margin": -0.4}, {"accuracy": 0.47}),
    "lr_too_high": ({"chosen": -0.9}, {"chosen": -0.1}),
    "not_learning": (
        {"accuracy": 0.51, "margin": 0.001, "chosen": 0.001, "rejected": 0.001},
        {"accuracy": 0.7, "margin": 0.04, "chosen": 0.001, "rejected": 0.001},
    ),
    "not_separating": (
        {"accuracy": 0.51, "margin": 0.001, "chosen": -0.2, "train_accuracy": 0.55},
        {"accuracy": 0.7, "margin": 0.3},
    ),
    "overfit": ({"accuracy": 0.6, "train_accuracy": 0.98}, {"accuracy": 0.68, "train_accuracy": 0.75}),
    "chance": ({"accuracy": 0.5, "held_out": 8}, {"accuracy": 0.7}),
    "separable": (
        {"accuracy": 1.0, "early_accuracy": 0.99, "train_accuracy": 1.0},
        {"accuracy": 0.9, "early_accuracy": 0.99, "train_accuracy": 0.9},
    ),
    "length_driven": ({"correlation": -0.9}, {"correlation": -0.5}),
    "saturated": ({"saturated": 0.8}, {"saturated": 0.3}),
    "skipped_updates": ({"skipped": 3}, {"skipped": 2}),  # of 20
}


@pytest.mark.parametrize("name", [rule.name for rule in finding_rules(in_nats=True)])
def test_every_verdict_is_given_when_it_should_and_not_otherwise(name: str) -> None:
    triggers, quiet = VERDICTS[name]
    found = judged(**triggers)
    assert name in [finding.name for finding in found.findings]
    assert found.color != "green"
    assert name not in [finding.name for finding in judged(**quiet).findings]


@pytest.mark.parametrize("changes", [{"loss": 1.2}, {"worst": 2.5}])
def test_a_loss_that_explodes_reads_as_too_high_a_rate(changes: dict[str, float]) -> None:
    assert [finding.name for finding in judged(**changes).findings] == ["lr_too_high"]


def test_memorised_pairs_were_learned_and_what_hardly_moved_was_not() -> None:
    chance = {"accuracy": 0.51, "margin": 0.001, "train_accuracy": 0.98}
    still = judged(**chance, chosen=0.001, rejected=0.001)
    moved = judged(**chance, chosen=-0.2)
    assert [finding.name for finding in still.findings] == ["not_learning"]
    assert [finding.name for finding in moved.findings] == ["overfit"]


def test_a_handful_of_held_out_pairs_gives_no_green_light() -> None:
    verdict = judged(accuracy=0.0, held_out=1, margin=-0.1, train_accuracy=0.1)
    assert verdict.color == "yellow" and [finding.name for finding in verdict.findings] == ["chance"]
    assert verdict.findings[0].reason == "1 held-out pair cannot tell this accuracy from a coin's"
    assert "(95% interval 0 to 0.79, 1 pair)" in verdict.summary


def test_the_loss_is_judged_by_where_it_started_whatever_the_loss() -> None:
    # ipo starts at 25, bco_pair at 2 ln 2: neither is an explosion.
    for start, now in ((25.0, 20.0), (2 * math.log(2), 1.3)):
        assert judged("ipo", start=start, loss=now, worst=now).color == "green"
    assert judged("sigmoid_norm", saturated=0.8).color == "green"


def test_a_healthy_run_is_green_with_its_numbers() -> None:
    verdict = judged()
    assert (verdict.color, verdict.findings) == ("green", [])
    assert verdict.summary == "held-out accuracy 0.7 (95% interval 0.63 to 0.76, 200 pairs), margin 0.5"


def test_red_comes_first_and_colors_the_run() -> None:
    verdict = judged(correlation=0.9, chosen=-0.9)
    assert verdict.color == "red"
    assert [finding.color for finding in verdict.findings] == ["red", "yellow"]
    assert verdict.findings[0].next_step.startswith("optimizer.lr=5e-06; ")


def test_without_held_out_pairs_nothing_is_green() -> None:
    verdict = judged(held_out=0)
    assert verdict.color == "yellow" and verdict.summary.startswith("no held-out pairs")
