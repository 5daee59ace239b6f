"""Drift, alarms and verdicts: each rule with a history that triggers it and one that does not."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.data.leaks import Leaks
from dpo_cli.objectives.alarms import ENOUGH, of_length, preference_alarms
from dpo_cli.objectives.drift import correlation, kl_per_token, measure_drift
from dpo_cli.objectives.findings import Verdict, assess, finding_rules
from dpo_cli.objectives.history import History
from dpo_cli.objectives.preference import Preference, columns_of
from dpo_cli.objectives.reward import Reward
from dpo_cli.theory.losses import LOSSES, LogRatios, loss_options, make_loss, sigmoid
from dpo_cli.theory.statistics import proportion_estimate
from dpo_cli.training.monitor import WINDOW, Monitor


def ratios(chosen: Any, rejected: Any, chosen_tokens: Any = 10, rejected_tokens: Any = 10) -> LogRatios:
    columns = [torch.as_tensor(value, dtype=torch.float32) for value in (chosen, rejected)]
    width = max(column.numel() for column in columns)
    tokens = [torch.as_tensor(value, dtype=torch.float32).expand(width) for value in (chosen_tokens, rejected_tokens)]
    return LogRatios(*(column.expand(width) for column in columns), *tokens)


def monitor(mode: str = "warn", beta: float = 0.1, loss: str = "sigmoid") -> Monitor:
    options = {"label_smoothing": 0.1, "temperature": 0.05}
    used = {name: value for name, value in options.items() if name in loss_options(loss) and loss != "sigmoid"}
    return Monitor(Preference(beta, make_loss(loss, beta, **used), loss), mode)


DPO = partial(sigmoid, beta=0.1)


# Drift


def test_drift_counts_by_hand() -> None:
    # b = 0.1, d = [0, 30, -30, 60]: weights sigmoid(-b d) = 1/2, 0.0474, 0.9526, 0.0025
    drift = measure_drift(ratios([0.0, 20.0, -20.0, 40.0], [0.0, -10.0, 10.0, -20.0], 10, 5), 0.1, DPO)
    assert drift.weight_over_09 == 0.25
    assert drift.weight_under_01 == 0.5
    assert drift.saturated == 0.25
    assert drift.heaviest_share == 1.0  # fewer than ten pairs
    assert (drift.chosen_nats, drift.rejected_nats) == (10.0, -5.0)
    assert drift.moved_nats == 15.0  # (0 + 20 + 20 + 40 + 0 + 10 + 10 + 20) / 8
    assert drift.chosen_longer == 1.0
    assert drift.chosen_per_token == 1.0
    assert drift.rejected_per_token == -1.0  # -5 nats over 5 tokens
    assert drift.margin == pytest.approx(0.1 * 15)
    assert drift.case == "apart"


def test_the_ten_heaviest_pairs_share_of_the_gradient() -> None:
    # ten pairs at weight 1/2, ninety at sigmoid(-2.2) = 0.0998: 5 / (5 + 8.98)
    drift = measure_drift(ratios([0.0] * 10 + [22.0] * 90, 0.0), 0.1, DPO)
    light = 1 / (1 + math.exp(2.2))
    assert drift.heaviest_share == pytest.approx(5 / (5 + 90 * light), abs=1e-6)


@pytest.mark.parametrize(
    ("chosen", "rejected", "case"),
    [(1, 2, "both up"), (-2, -1, "both down"), (1, -1, "apart"), (-1, 1, "crossed"), (0.01, -0.01, "still")],
)
def test_the_four_cases_have_names(chosen: float, rejected: float, case: str) -> None:
    assert measure_drift(ratios([float(chosen)], float(rejected)), 0.1, DPO).case == case


def test_the_share_of_longer_chosen_responses_counts_equal_lengths_half() -> None:
    lengths = torch.tensor([20.0, 20.0, 10.0, 5.0])
    assert measure_drift(ratios([0.0] * 4, 0.0, lengths, 10), 0.1, DPO).chosen_longer == (1 + 1 + 0.5 + 0) / 4


def test_length_is_learned_where_the_margin_follows_it_or_one_length_is_always_chosen() -> None:
    assert of_length(0.85, 0.5, 64) == "the margin follows the length gap (correlation +0.85)"
    assert of_length(0.1, 0.95, 64) == "the longer response is the chosen one in 95% of the pairs"
    assert of_length(0.1, 0.05, 64) == "the shorter response is the chosen one in 95% of the pairs"
    assert of_length(0.75, 0.88, 64) is None and of_length(0.9, 0.95, 63) is None


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
    "displacement": (ratios([-40.0] * 64, -90.0), ratios([-19.0] * 64, -60.0, 40, 40)),
    "crossed": (ratios([-5.0] * 64, 5.0), ratios([-0.9] * 64, 5.0)),
    "far": (ratios([50.0] * 64, -60.0, 50, 50), ratios([8.0] * 64, -10.0)),
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


def test_eight_odd_batches_among_healthy_ones_sound_no_alarm() -> None:
    healthy, odd = (columns_of(ratios([chosen] * 8, rejected, 100, 100)) for chosen, rejected in ((0, 0), (-40, -90)))
    watch = monitor("warn")
    for batch in [*[healthy] * 24, *[odd] * 8]:
        watch.add(batch)
    assert watch.alarms(watch.drift()) == []
    for batch in [odd] * 16:  # now they are three quarters of what the window holds
        watch.add(batch)
    assert "displacement" in [alarm.name for alarm in watch.alarms(watch.drift())]


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


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_saturation_goes_by_the_pull_of_each_loss(loss: str) -> None:
    # ipo and sppo_hard pull hardest far from their target; the others pull no more where the margin is large
    watch = monitor("warn", 0.1, loss)
    watch.add(columns_of(ratios([600.0] * 64, -600.0, 1000, 1000)))
    saturated = "saturated" in [alarm.name for alarm in watch.alarms(watch.drift())]
    pulls_back = {"ipo", "ipo_sum", "sppo_hard"}
    still_learning = {"sigmoid_norm", "nca_pair", "robust"}  # a token moved little; NCA and robust never let go
    assert saturated == (loss not in pulls_back | still_learning)


def test_a_loss_that_lowers_chosen_responses_is_not_told_so() -> None:
    falling = columns_of(ratios([-30.0] * 64, -60.0, 50, 50))
    for loss in LOSSES:
        watch = monitor("stop", 0.1, loss)
        watch.add(falling)
        ruin = watch.ruin(watch.drift())
        assert (ruin is not None and ruin.name == "displacement") == (loss != "apo_down")
    for chosen, ruined in ((-70.0, False), (-90.0, True)):  # of 100 tokens
        watch = monitor("stop", 0.1, "apo_down")
        watch.add(columns_of(ratios([chosen] * 64, -100.0, 100, 100)))
        found = watch.ruin(watch.drift())
        assert (found is not None and found.name == "displacement") == ruined


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_short_answers_may_move_more_a_token_but_not_by_any_amount(loss: str) -> None:
    eight_tokens = {"falls a nat a token": (-8.0, -13.0), "half a nat": (-4.0, -9.0)}
    found = []
    for chosen, rejected in eight_tokens.values():
        watch = monitor("warn", 0.1, loss)
        watch.add(columns_of(ratios([chosen] * 64, rejected, 8, 8)))
        found.append("displacement" in [alarm.name for alarm in watch.alarms(watch.drift())])
    assert found == [loss != "apo_down", False]


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_short_answers_at_an_ordinary_margin_are_no_ruin(loss: str) -> None:
    # eight tokens, a margin of 12 nats: 0.5 nats a token up, 1 down, a KL estimate of 0.4 a token
    watch = monitor("stop", 0.1, loss)
    watch.add(columns_of(ratios([4.0] * 64, -8.0, 8, 8)))
    drift = watch.drift()
    assert drift.kl_per_token > 0.25 and watch.ruin(drift) is None


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
    noise: float = 0.05,
    loss_noise: float | None = None,
    held_out: int = 200,
    prompts: int = 200,
    train_accuracy: float = 0.72,
    early_accuracy: float = 0.6,
    chosen: float = -0.02,
    rejected: float = -0.1,
    tokens: int = 100,
    correlation: float = 0.1,
    chosen_longer: float = 0.55,
    saturated: float = 0.0,
    skipped: int = 0,
    worst: float = 0.7,
    alarm: str | None = None,
    leaked: int = 0,
    start: float = math.log(2),
    beta: float = 0.1,
    **answers: float,
) -> History:
    """A healthy history, but for what a test changes; `noise` is half the interval of margin and improvement.

    `answers` are metrics of generated answers, each with an interval of 10% to either side.
    """
    train = [
        {
            "split": "train", "step": step, "loss": start if step == 0 else worst if step == 6 else min(start, 0.6),
            "rewards/margins": margin, "rewards/accuracies": early_accuracy if step < 11 else train_accuracy,
            "drift/chosen_per_token": chosen, "drift/rejected_per_token": rejected, "drift/pairs": 256,
            "drift/chosen_per_response": chosen * tokens, "drift/rejected_per_response": rejected * tokens,
            "drift/margin_length_correlation": correlation, "drift/saturated": saturated,
            "drift/chosen_longer": chosen_longer, "skipped_steps": skipped,
            "alarms": {alarm: "too far"} if alarm and step == 7 else {},
        }
        for step in range(21)
    ]  # fmt: skip
    share = proportion_estimate(accuracy * max(held_out, 1), max(held_out, 1))
    lower = start - loss
    end = {
        "split": "eval", "step": 20, "rewards/accuracies": accuracy, "rewards/margins": margin, "loss": loss,
        "loss/improvement": lower, "prompts": min(held_out, prompts),
        "intervals95": {
            "rewards/accuracies": share.ends(),
            "rewards/margins": [margin - noise, margin + noise],
            "loss/improvement": [lower - (loss_noise or noise), lower + (loss_noise or noise)],
        },
    }  # fmt: skip
    for name, value in {**ANSWERS, **answers}.items():
        end[f"samples/{name}"] = value
        end["intervals95"][f"samples/{name}"] = [0.9 * value, 1.1 * value]
    lines = [*train, end] if held_out else train
    return History.of(lines, held_out, lr=5e-5, beta=beta, start_loss=start, leaks=Leaks(0, leaked))


def judged(name: str = "sigmoid", **changes: Any) -> Verdict:
    return assess(history(**changes), finding_rules(name))


def names(verdict: Verdict) -> list[str]:
    return [finding.name for finding in verdict.findings]


# A healthy policy whose reference seldom ends by itself.
ANSWERS = {
    "kl": 4.0, "length": 60.0, "length_ratio": 1.1, "ends": 0.2, "repetition": 0.02, "distinct_2": 0.7,
    "reference_length": 55.0, "reference_ends": 0.3, "reference_repetition": 0.01, "reference_distinct_2": 0.75,
}  # fmt: skip
NOTHING = {"accuracy": 0.51, "margin": 0.001, "loss": math.log(2) - 0.001}
VERDICTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # what triggers a rule, and what comes close and does not
    "leak": ({"leaked": 1}, {"leaked": 0}),
    "wrong_way": ({"accuracy": 0.3, "margin": -0.4}, {"accuracy": 0.47}),
    "damaged": ({"chosen": -0.4}, {"chosen": -0.4, "tokens": 40}),
    "warned": ({"alarm": "far"}, {"alarm": "length"}),
    "lr_too_high": ({"loss": 1.2, "noise": 0.1}, {"loss": 1.2, "noise": 0.6}),
    "worse": ({"loss": 0.8}, {"loss": 0.72}),
    "too_small": (
        {"margin": 0.01, "loss": 0.688, "noise": 0.002, "chosen": 0.001, "rejected": -0.001},
        {"margin": 0.12, "loss": 0.65, "noise": 0.02, "chosen": 0.001, "rejected": -0.001},
    ),
    "not_learning": (
        {**NOTHING, "chosen": 0.001, "rejected": 0.001},
        {"margin": 0.04, "loss": 0.67, "noise": 0.01, "chosen": 0.001, "rejected": 0.001},
    ),
    "not_separating": ({**NOTHING, "chosen": -0.2, "train_accuracy": 0.55}, {"accuracy": 0.7, "margin": 0.3}),
    "overfit": ({"accuracy": 0.6, "train_accuracy": 0.98}, {"accuracy": 0.68, "train_accuracy": 0.75}),
    "chance": ({"accuracy": 0.5, "held_out": 8, "noise": 0.9}, {"accuracy": 0.7}),
    "separable": (
        {"accuracy": 1.0, "early_accuracy": 0.99, "train_accuracy": 1.0},
        {"accuracy": 0.9, "early_accuracy": 0.99, "train_accuracy": 0.9},
    ),
    "length_driven": ({"correlation": -0.9}, {"correlation": -0.5}),
    "repetitive": ({"repetition": 0.14}, {"repetition": 0.12}),
    "rambling": ({"length_ratio": 1.7}, {"length_ratio": 1.6}),
    "unending": ({"ends": 0.11}, {"ends": 0.13}),
    "answers_far": ({"kl": 24.0}, {"kl": 24.0, "length": 80.0}),
    "saturated": ({"saturated": 0.8}, {"saturated": 0.3}),
    "skipped_updates": ({"skipped": 3}, {"skipped": 2}),  # of 20
}


@pytest.mark.parametrize("name", [rule.name for rule in finding_rules()])
def test_every_verdict_is_given_when_it_should_and_not_otherwise(name: str) -> None:
    triggers, quiet = VERDICTS[name]
    found = judged(**triggers)
    assert name in names(found)
    assert found.color != "green"
    assert name not in names(judged(**quiet))


@pytest.mark.parametrize("changes", [{"loss": 1.2}, {"worst": 2.5}])
def test_a_loss_that_explodes_reads_as_too_high_a_rate(changes: dict[str, float]) -> None:
    assert names(judged(**changes)) == ["lr_too_high"]


def test_a_margin_that_a_large_beta_alone_makes_is_not_green() -> None:
    verdict = judged(beta=100, chosen=0.002, rejected=-0.003)
    assert names(verdict) == ["too_small"]
    assert verdict.findings[0].next_step == "beta=10: a large beta holds the policy at the reference"
    assert judged(beta=100, chosen=0.05, rejected=-0.06).color == "green"


def test_a_tiny_step_in_the_right_direction_is_not_green() -> None:
    # three steps: margin 0.003, 0.001 nats a token, and every margin above 0, so that accuracy is 1
    tiny = {"accuracy": 1.0, "margin": 0.003, "loss": math.log(2) - 0.0015, "noise": 0.0002}
    verdict = judged(**tiny, chosen=0.001, rejected=-0.001, train_accuracy=0.9)
    assert (verdict.color, names(verdict)) == ("yellow", ["too_small"])
    assert verdict.findings[0].reason == (
        "the direction is right, the step too small: margin 0.003, 0.03 nats a response; responses moved by 0.001 "
        "nats a token"
    )
    assert verdict.findings[0].next_step == "optimizer.lr=0.00025, or more steps"


def test_an_improvement_within_its_interval_is_not_green() -> None:
    verdict = judged(noise=0.25, held_out=30, accuracy=0.6)
    assert names(verdict) == ["chance"]
    assert "cannot tell this result from no change" in verdict.findings[0].reason
    assert judged(noise=0.15).color == "green"  # 0.19 lower
    assert names(judged(loss=0.66, loss_noise=0.05)) == ["chance"]  # the loss alone is within


def test_an_accuracy_that_could_be_chance_is_not_green() -> None:
    # a few pairs with large margins lift margin and loss; the others are in no order
    verdict = judged(accuracy=0.52, train_accuracy=0.55)
    assert names(verdict) == ["chance"] and "accuracy 0.45 to 0.59" in verdict.findings[0].reason
    assert names(judged(accuracy=1.0, held_out=2)) == ["chance"]  # 0.34 to 1


def test_a_margin_within_its_interval_is_not_green_though_the_loss_fell() -> None:
    assert names(judged("apo_down", loss=0.4, start=1.0, noise=0.3, margin=0.2)) == ["chance"]


def test_memorised_pairs_were_learned_and_what_hardly_moved_was_not() -> None:
    still = judged(**NOTHING, train_accuracy=0.98, chosen=0.001, rejected=0.001)
    moved = judged(**NOTHING, train_accuracy=0.98, chosen=-0.2)
    assert names(still) == ["not_learning"]
    assert names(moved) == ["overfit"]


def test_at_a_small_beta_a_small_margin_is_learned_all_the_same() -> None:
    # margin 0.04 at beta 0.01: 4 nats apart
    assert judged(beta=0.01, margin=0.04, loss=0.675, noise=0.01).color == "green"
    assert names(judged(beta=0.01, margin=0.04, held_out=0, train_accuracy=0.9)) == []
    assert names(judged(margin=0.04, held_out=0, train_accuracy=0.55, chosen=-0.2)) == ["not_separating"]


def test_answers_that_are_all_alike_are_repetitive_and_a_wide_interval_says_nothing() -> None:
    alike = judged(distinct_2=0.25)
    assert (alike.color, names(alike)) == ("red", ["repetitive"])
    assert names(judged(distinct_2=0.35)) == []
    assert (
        "14% of their 4-grams stand in them before (1% in the reference's" in judged(repetition=0.14).findings[0].reason
    )
    far = judged(kl=24.0).findings[0]
    assert far.reason.startswith("generated answers are 24 (22 to 26) nats each from the reference, 0.4 a token")
    assert far.next_step.startswith("budget.kl=10 keeps the last step before; or beta=0.2")
    unknown = history(repetition=0.9, length_ratio=3.0, kl=90.0, ends=0.0)
    end = unknown.held_out[-1]
    for name in end["intervals95"]:
        end["intervals95"][name] = [None, None] if name.startswith("samples/") else end["intervals95"][name]
    assert names(assess(unknown, finding_rules())) == []


def test_a_reference_that_never_ends_asks_no_other_of_the_policy() -> None:
    assert names(judged(ends=0.0, reference_ends=0.0)) == []
    assert names(judged(ends=0.0, reference_ends=0.3)) == ["unending"]


def test_a_handful_of_held_out_pairs_gives_no_green_light() -> None:
    verdict = judged(accuracy=0.0, held_out=1, margin=-0.1, loss=0.75, noise=math.inf, train_accuracy=0.1)
    assert verdict.color == "yellow" and names(verdict) == ["not_separating"]
    assert "accuracy 0 (0 to 0.79)" in verdict.summary and verdict.summary.endswith("; 1 held-out pair")


def test_pairs_of_few_prompts_are_said() -> None:
    assert judged(prompts=60).summary.endswith("; 200 held-out pairs of 60 prompts")


def test_the_loss_is_judged_by_where_it_started_whatever_the_loss() -> None:
    # ipo starts at 25, bco_pair at 2 ln 2: neither is an explosion.
    for start, now in ((25.0, 20.0), (2 * math.log(2), 1.3)):
        assert judged("ipo", start=start, loss=now, worst=now).color == "green"


def test_a_skipped_first_update_does_not_move_the_start() -> None:
    whole = history(worst=1.9)
    without = [*whole.train, *whole.held_out]  # no line of step 0
    again = History.of(without, 200, lr=5e-5, beta=0.1, start_loss=math.log(2))
    assert again.start_loss == whole.start_loss == pytest.approx(math.log(2))
    only_train = History.of(whole.train, 0, lr=5e-5, beta=0.1, start_loss=math.log(2))
    assert only_train.start_loss == math.log(2)


@pytest.mark.parametrize(
    ("loss", "start"),
    [("sigmoid", math.log(2)), ("hinge", 1.0), ("ipo", 25.0), ("sppo_hard", 50.0), ("bco_pair", 2 * math.log(2))],
)
def test_the_loss_before_the_first_update_is_known_from_the_formula(loss: str, start: float) -> None:
    assert Preference(0.1, make_loss(loss, 0.1), loss).start_loss == pytest.approx(start, rel=1e-6)
    assert Reward().start_loss == pytest.approx(math.log(2))


def test_a_healthy_run_is_green_with_its_numbers() -> None:
    verdict = judged()
    assert (verdict.color, verdict.findings) == ("green", [])
    assert verdict.summary == (
        "accuracy 0.7 (0.63 to 0.76), margin 0.5 (0.45 to 0.55), 0.1 nats a token moved, "
        "loss 0.693 at the start, lower by 0.19 (0.14 to 0.24); 200 held-out pairs"
    )


def test_a_reward_model_is_judged_without_nats() -> None:
    whole = history()
    lines = [{k: v for k, v in line.items() if "_per_" not in k} for line in (*whole.train, *whole.held_out)]
    verdict = assess(History.of(lines, 200, 5e-5, 1.0, math.log(2)), Reward().findings)
    assert verdict.color == "green" and "nats" not in verdict.summary


def test_red_comes_first_and_colors_the_run() -> None:
    verdict = judged(correlation=0.9, chosen=-0.9)
    assert verdict.color == "red"
    assert [finding.color for finding in verdict.findings] == ["red", "yellow"]
    assert verdict.findings[0].next_step.startswith("optimizer.lr=5e-06; ")
    assert names(judged("apo_down", chosen=-0.5)) == []  # it is there to lower chosen responses


def test_an_alarm_of_ruin_is_not_followed_by_green() -> None:
    verdict = judged(alarm="displacement")
    assert (verdict.color, names(verdict)) == ("yellow", ["warned"])
    assert verdict.findings[0].reason == "the monitor warned on the way: too far"
    assert names(judged(alarm="far", chosen=-0.9)) == ["damaged"]


def test_without_held_out_pairs_nothing_is_green() -> None:
    verdict = judged(held_out=0)
    assert verdict.color == "yellow" and verdict.summary.startswith("no held-out pairs")
