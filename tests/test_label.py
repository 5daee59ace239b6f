"""Labels of judges: rewards as in evaluation, pairs as in the method, and nothing is judged twice."""

import json
import math
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Ended, run_of, sample_rows, tiny_words, write_jsonl
from safetensors.torch import load_file, save_file

from dpo_cli.commands import label as module
from dpo_cli.commands.label import pairs_of_rewards
from dpo_cli.config.composition import composed, parse_overrides
from dpo_cli.config.schema import LabelConfig, config_of
from dpo_cli.data.samples import Sample
from dpo_cli.labelling.judges import ModelJudge, RuleJudge
from dpo_cli.labelling.labels import LabelledPair
from dpo_cli.labelling.rules import RULES
from dpo_cli.objectives.reward import HEAD_FILE

Command = Callable[..., Ended]


def moved(pairs: Path, name: str, *words: str) -> Path:
    """A run of the tiny model that has moved far enough for its rewards to differ."""
    return run_of(*tiny_words(pairs, pairs.with_name(name)), "optimizer.lr=1e-2", "optimizer.warmup_steps=0", *words)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("runs") / "pairs.jsonl", sample_rows(20))


@pytest.fixture(scope="module")
def reward_run(pairs: Path) -> Path:
    return moved(pairs, "reward", "objective=reward", "max_steps=6")


@pytest.fixture(scope="module")
def dpo_run(pairs: Path) -> Path:
    return moved(pairs, "dpo", "beta=0.3", "max_steps=6")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def samples_of(path: Path, answers: dict[str, list[str]], **more: Any) -> Path:
    return write_jsonl(path, [{"prompt": prompt, "responses": texts, **more} for prompt, texts in answers.items()])


def labelled(command: Command, samples: Path, *words: object) -> list[dict[str, Any]]:
    output = samples.with_name("labels.jsonl")
    ended = command("dpo-label", f"samples={samples}", f"output={output}", *words)
    assert ended.code == 0, ended.err
    return rows(output)


def sigmoid(margin: float) -> float:
    return 1 / (1 + math.exp(-margin))


# Rules


def test_the_rules_by_hand() -> None:
    assert RULES["shorter"]("three words here") == pytest.approx(-math.log(4))
    assert RULES["longer"](" three\twords\nhere ") == pytest.approx(math.log(4))
    assert RULES["shorter"]("") == RULES["longer"]("") == 0
    # "a b c a b c" has the runs abc, bca, cab, abc: 3 of 4 are distinct, 4 (3/4 - 1) = -1.
    assert RULES["unrepetitive"]("a b c A B c") == -1.0
    # n times the same word, n > 2: one run of n - 2, 4 (1/3 - 1) = -8/3 for n = 5.
    assert RULES["unrepetitive"]("no no no no no") == pytest.approx(-8 / 3)
    assert RULES["unrepetitive"]("all of these words are distinct") == RULES["unrepetitive"]("too few") == 0.0


@pytest.mark.parametrize(
    ("rule", "chosen", "margin"),
    [
        # One word against three: ln 4 - ln 2 = ln 2, so that the shorter is preferred 2 to 1.
        ("shorter", "one", math.log(2)),
        ("longer", "one two three", math.log(2)),
        ("unrepetitive", "x y z", 1.0),
    ],
)
def test_a_rule_chooses_the_answer_of_the_higher_reward_with_its_probability(
    command: Command, tmp_path: Path, rule: str, chosen: str, margin: float
) -> None:
    texts = ["a b c a b c", "x y z"] if rule == "unrepetitive" else ["one two three", "one"]
    (row,) = labelled(command, samples_of(tmp_path / "s.jsonl", {"Why?": texts}), "by=rule", f"rule={rule}")
    assert (row["prompt"], row["chosen"], row["by"], row["judge"]) == ("Why?", chosen, "rule", rule)
    assert {row["chosen"], row["rejected"]} == set(texts)
    assert row["reward_chosen"] - row["reward_rejected"] == pytest.approx(margin)
    assert row["probability"] == pytest.approx(sigmoid(margin))


# Models


@pytest.mark.parametrize("by", ["reward", "implicit"])
def test_rewards_are_those_of_dpo_eval_for_the_same_texts(
    command: Command, pairs: Path, reward_run: Path, dpo_run: Path, tmp_path: Path, by: str
) -> None:
    run = reward_run if by == "reward" else dpo_run
    held = write_jsonl(tmp_path / "held.jsonl", sample_rows(40)[20:])
    ended = command("dpo-eval", f"checkpoint={run}", "data=jsonl", f"data.eval={held}", f"output_dir={tmp_path}",
                    "name=eval")  # fmt: skip
    assert ended.code == 0, ended.err
    expected = {row["index"]: row for row in rows(tmp_path / "eval" / "pairs.jsonl")}
    assert len(expected) == 20
    pair_rows = rows(held)
    samples = samples_of(tmp_path / "s.jsonl", {row["prompt"]: [row["chosen"], row["rejected"]] for row in pair_rows})
    found = {row["prompt"]: row for row in labelled(command, samples, f"by={by}", f"judge={run}")}
    margins = []
    for index, row in enumerate(pair_rows):
        label, evaluated = found[row["prompt"]], expected[index]
        reward = {row["chosen"]: evaluated["reward_chosen"], row["rejected"]: evaluated["reward_rejected"]}
        assert label["reward_chosen"] == pytest.approx(reward[label["chosen"]], abs=1e-4)
        assert label["reward_rejected"] == pytest.approx(reward[label["rejected"]], abs=1e-4)
        margins.append(label["reward_chosen"] - label["reward_rejected"])
        assert label["probability"] == pytest.approx(sigmoid(margins[-1]))
        assert (label["by"], label["judge"]) == (by, str(run / "final"))
    assert min(margins) >= 0 and max(margins) > 0.05
    # By files of labels alone, an evaluation finds the judge always right, and as sure as it said.
    sure = sum(label["probability"] for label in found.values()) / len(found)
    for word, accuracy in (("true", pytest.approx(sure, abs=1e-6)), ("false", 1.0)):
        again = command("dpo-eval", f"checkpoint={run}", "data=jsonl", f"data.eval={tmp_path / 'labels.jsonl'}",
                        f"data.soft_labels={word}", f"output_dir={tmp_path}", f"name=soft_{word}")  # fmt: skip
        assert again.code == 0, again.err
        assert json.loads((tmp_path / f"soft_{word}" / "report.json").read_text())["rewards/accuracies"] == accuracy


def test_an_answer_has_one_reward_whatever_stands_beside_it(command: Command, reward_run: Path, tmp_path: Path) -> None:
    texts = ["Yes.", "No, and why would I?", "Perhaps, if the rain stops before the bread is done."]
    three = samples_of(tmp_path / "three.jsonl", {"Shall we?": texts})
    rewards: dict[str, list[float]] = {text: [] for text in texts}
    for row in labelled(command, three, "by=reward", f"judge={reward_run}"):
        rewards[row["chosen"]].append(row["reward_chosen"])
        rewards[row["rejected"]].append(row["reward_rejected"])
    (tmp_path / "two").mkdir()
    two = samples_of(tmp_path / "two" / "s.jsonl", {"Shall we?": [texts[2], texts[0]], "Other?": texts[:2]})
    first = labelled(command, two, "by=reward", f"judge={reward_run}", "layout=padded")[0]
    rewards[first["chosen"]].append(first["reward_chosen"])
    rewards[first["rejected"]].append(first["reward_rejected"])
    assert [len(values) for values in rewards.values()] == [3, 2, 3]
    for values in rewards.values():
        assert values == pytest.approx([values[0]] * len(values), abs=1e-5)
    assert len({round(values[0], 3) for values in rewards.values()}) == 3


def test_answers_to_a_prompt_that_is_cut_are_compared_behind_the_same_part_of_it(
    command: Command, pairs: Path, tmp_path: Path
) -> None:
    # 150 tokens: the prompt has over 100, one answer some 80 and two a few. Were each two cut by themselves, an answer
    # beside the long one would be read behind a shorter prompt than the third.
    judge = moved(pairs, "narrow", "objective=reward", "max_steps=6", "data.max_length=150")
    prompt = "Tell me all about the many kinds of tea and rain, please, and slowly."
    texts = ["Yes.", "No." + " Perhaps so." * 6, "Well."]
    found: list[dict[str, float]] = []
    for order in ((0, 1, 2), (0, 2, 1), (2, 1, 0)):
        folder = tmp_path / "".join(map(str, order))
        folder.mkdir()
        samples = samples_of(folder / "s.jsonl", {prompt: [texts[place] for place in order]})
        rows_of = labelled(command, samples, "by=reward", f"judge={judge}")
        found.append(
            {row["chosen"]: row["reward_chosen"] for row in rows_of}
            | {row["rejected"]: row["reward_rejected"] for row in rows_of}
        )
    for text in texts:
        assert [one[text] for one in found] == pytest.approx([found[0][text]] * 3, abs=1e-5)


def test_a_response_of_finish_reason_length_is_judged_as_generated_and_trained_on_without_eos(
    command: Command, reward_run: Path, dpo_run: Path, tmp_path: Path
) -> None:
    texts, prompt = ["Yes, and", "No, never."], "Shall we?"
    found: dict[tuple[str, str], tuple[dict[str, float], str]] = {}
    for ends, reasons in (("length", ["length", "stop"]), ("stop", ["stop", "stop"])):
        for by, run in (("reward", reward_run), ("implicit", dpo_run)):
            folder = tmp_path / f"{ends}-{by}"
            folder.mkdir()
            samples = samples_of(folder / "s.jsonl", {prompt: texts}, finish_reason=reasons)
            output = folder / "pairs.jsonl"
            ended = command("dpo-label", f"samples={samples}", f"output={output}", f"by={by}", f"judge={run}")
            assert ended.code == 0, ended.err
            (row,) = rows(output)
            expected = dict(zip(texts, reasons, strict=True))
            assert row["chosen_finish_reason"] == expected[row["chosen"]]
            assert row["rejected_finish_reason"] == expected[row["rejected"]]
            rewards = {row["chosen"]: row["reward_chosen"], row["rejected"]: row["reward_rejected"]}
            found[ends, by] = rewards, ended.out
    assert (
        "1 of 2 responses have finish_reason length: judged with EOS, trained on without it"
        in found["length", "reward"][1]
    )
    assert "1 of 2 responses have finish_reason length: judged without EOS" in found["length", "implicit"][1]
    assert "finish_reason length" not in found["stop", "implicit"][1]
    # A reward model reads the closing token after both; an implicit reward is of the generated tokens only.
    assert found["length", "reward"][0] == found["stop", "reward"][0]
    (cut, _), (whole, _) = found["length", "implicit"], found["stop", "implicit"]
    assert cut[texts[1]] == pytest.approx(whole[texts[1]], abs=1e-5)
    assert abs(cut[texts[0]] - whole[texts[0]]) > 1e-4
    # The pairs are read by dpo-eval and dpo-train as they were judged.
    labels = tmp_path / "length-implicit" / "pairs.jsonl"
    ended = command("dpo-eval", f"checkpoint={dpo_run}", "data=jsonl", f"data.eval={labels}", f"output_dir={tmp_path}",
                    "name=eval")  # fmt: skip
    assert ended.code == 0, ended.err
    (line,) = rows(tmp_path / "eval" / "pairs.jsonl")
    judged = sorted(cut.values(), reverse=True)
    assert [line["reward_chosen"], line["reward_rejected"]] == pytest.approx(judged, abs=1e-5)
    for objective, words in (("dpo", "left without a closing EOS"), ("reward", "closed all the same")):
        overrides = [*tiny_words(labels, tmp_path / objective), "data.eval_fraction=0", "max_steps=1", "batch_size=1"]
        ended = command("dpo-train", *overrides, *(["objective=reward"] if objective == "reward" else []))
        assert ended.code == 0, ended.err
        assert f"1 response with finish_reason length: {words}" in " ".join(ended.out.split())


def test_what_a_judge_truncates_is_counted_once_also_across_a_stop(
    command: Command, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = moved(pairs, "short", "objective=reward", "max_steps=1", "data.max_length=150")
    prompt = "Tell me all about the many kinds of tea and rain, please, and slowly."  # it and an answer do not fit
    texts = [f"{word}." + " Perhaps so." * number for word, number in (("Yes", 9), ("No", 9), ("Well", 0))]
    samples = samples_of(tmp_path / "s.jsonl", {prompt: texts, f"And {prompt}": texts, "Why?": ["a", "b", "c"]})
    monkeypatch.setattr(module, "PART_SIZE", 1)
    words = (f"samples={samples}", "by=reward", f"judge={judge}")
    straight = command("dpo-label", *words, f"output={tmp_path / 'straight.jsonl'}")
    assert "the judge truncated 2 prompts and 4 responses" in straight.out
    rewards, calls = ModelJudge.rewards, []

    def stopped(self: ModelJudge, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return rewards(self, *arguments)

    monkeypatch.setattr(ModelJudge, "rewards", stopped)
    assert command("dpo-label", *words, f"output={tmp_path / 'labels.jsonl'}").code == 75
    resumed = command("dpo-label", *words, f"output={tmp_path / 'labels.jsonl'}")
    assert "the judge truncated 2 prompts and 4 responses" in resumed.out


def test_labels_of_another_head_are_not_taken_for_those_of_this_one(
    command: Command, pairs: Path, tmp_path: Path
) -> None:
    judge = moved(pairs, "beheaded", "objective=reward", "max_steps=2")
    samples, output = samples_of(tmp_path / "s.jsonl", numbered(2)), tmp_path / "labels.jsonl"
    words = (f"samples={samples}", "by=reward", f"judge={judge}", f"output={output}")
    assert command("dpo-label", *words).code == 0
    tensors = load_file(judge / "final" / HEAD_FILE)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, judge / "final" / HEAD_FILE)
    other = command("dpo-label", *words)
    assert other.code == 2 and "was started with other settings (reward_head.safetensors was" in other.err


def test_chosen_responses_without_eos_give_a_warning(command: Command, tmp_path: Path) -> None:
    for rule, warned in (("longer", True), ("shorter", False)):  # the longer response of each has finish reason length
        (tmp_path / rule).mkdir()
        texts = {f"Why {number}?": ["Yes.", "Because of the rain, and"] for number in range(9)}
        samples = samples_of(tmp_path / rule / "s.jsonl", texts, finish_reason=["stop", "length"])
        ended = command("dpo-label", f"samples={samples}", "by=rule", f"rule={rule}")
        assert ended.code == 0, ended.err
        said = "9 of 9 chosen and 0 rejected responses have finish_reason length: a policy trained on them learns not"
        assert (said in " ".join(ended.out.split())) is warned


PROMPTS: dict[str, Any] = {
    "text": "Tell me about tea.",
    "dialogue": "\n\nHuman: Hello\n\nAssistant: Hi.\n\nHuman: Tell me about tea.\n\nAssistant:",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Tell me about tea."},
        {"role": "assistant", "content": "It is warm."},
        {"role": "user", "content": "More."},
    ],
}


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("template", ["chat", "plain"])
def test_dpo_train_reads_the_labels_as_the_very_tokens_that_were_judged(
    command: Command, pairs: Path, reward_run: Path, tmp_path: Path, kind: str, template: str
) -> None:
    judge = reward_run if template == "chat" else moved(pairs, f"plain-{kind}", "objective=reward", "max_steps=2",
                                                          "data.template=plain")  # fmt: skip
    written = {"prompt": PROMPTS[kind], "responses": ["A leaf in water.", "I would rather not say, you see."]}
    (label,) = labelled(command, write_jsonl(tmp_path / "s.jsonl", [written]), "by=reward", f"judge={judge}")
    assert label["prompt"] == PROMPTS[kind]
    # Scored again as the pair that dpo-train would read: other tokens would have other rewards.
    ended = command("dpo-eval", f"checkpoint={judge}", "data=jsonl", f"data.eval={tmp_path / 'labels.jsonl'}",
                    f"data.template={template}", f"output_dir={tmp_path}", "name=eval")  # fmt: skip
    assert ended.code == 0, ended.err
    (line,) = rows(tmp_path / "eval" / "pairs.jsonl")
    assert line["reward_chosen"] == pytest.approx(label["reward_chosen"], abs=1e-5)
    assert line["reward_rejected"] == pytest.approx(label["reward_rejected"], abs=1e-5)
    assert abs(label["reward_chosen"] - label["reward_rejected"]) > 1e-4


def test_a_file_of_labels_trains(command: Command, tmp_path: Path) -> None:
    answers = ["A leaf in water.", "I would rather not say, you see."]
    samples = write_jsonl(
        tmp_path / "s.jsonl", [{"prompt": prompt, "responses": answers} for prompt in PROMPTS.values()]
    )
    labelled(command, samples, "by=rule", "rule=longer")
    words = [*tiny_words(tmp_path / "labels.jsonl", tmp_path / "run"), "data.eval_fraction=0", "max_steps=1"]
    ended = command("dpo-train", *words)
    assert ended.code == 0, ended.err
    assert "kept 3 pairs of 3 rows" in ended.out


# Pairs


def label_config(**changes: Any) -> LabelConfig:
    words = ["samples=x", "by=rule", "rule=shorter", *(f"{key}={value}" for key, value in changes.items())]
    return config_of(composed("label", parse_overrides(words), LabelConfig).container, LabelConfig)


def sample(number: int, texts: list[str]) -> Sample:
    return Sample(f"{number:032x}", f"Prompt {number}?", tuple(texts))


def paired(samples: list[Sample], rewards: list[list[float]], **changes: Any) -> list[LabelledPair]:
    return list(pairs_of_rewards(samples, rewards, label_config(**changes), "judge").pairs)


def test_three_answers_make_three_pairs_or_the_best_against_the_worst() -> None:
    one = [sample(0, ["low", "high", "middle"])]
    rewards = [[-1.0, 2.0, 0.5]]
    said = [(pair.chosen, pair.rejected, pair.probability) for pair in paired(one, rewards)]
    assert said == [
        ("high", "low", pytest.approx(sigmoid(3.0))),
        ("middle", "low", pytest.approx(sigmoid(1.5))),
        ("high", "middle", pytest.approx(sigmoid(1.5))),
    ]
    extremes = paired(one, rewards, pairs="extremes")
    assert [(pair.chosen, pair.rejected) for pair in extremes] == [("high", "low")]


def test_sampled_labels_are_upset_as_often_as_bradley_terry_says() -> None:
    for margin in (0.0, 0.5, 2.0):
        samples = [sample(number, ["worse", "better"][:: 1 if number % 2 else -1]) for number in range(2000)]
        rewards = [[0.0, margin] if number % 2 else [margin, 0.0] for number in range(2000)]
        found = paired(samples, rewards, labels="sampled")
        upset = sigmoid(-margin)
        share = sum(pair.chosen == "worse" for pair in found) / 2000
        assert len(found) == 2000
        assert abs(share - upset) < 4 * math.sqrt(upset * (1 - upset) / 2000)
        # The probability is that of the answer that was chosen, an upset's below one half.
        wanted = {"better": sigmoid(margin), "worse": sigmoid(-margin)}
        assert all(pair.probability == pytest.approx(wanted[pair.chosen]) for pair in found)


def test_sampled_labels_are_a_matter_of_seed_and_sample_and_not_of_the_order_of_the_file() -> None:
    samples = [sample(number, ["a", "b", "c"]) for number in range(200)]
    rewards = [[0.0, 0.3, -0.2]] * 200

    def chosen(seed: int, some: list[Sample]) -> dict[tuple[str, str], str]:
        pairs = paired(some, rewards[: len(some)], labels="sampled", seed=seed)
        return {(pair.sample, min(pair.chosen, pair.rejected) + max(pair.chosen, pair.rejected)): pair.chosen
                for pair in pairs}  # fmt: skip

    first = chosen(0, samples)
    assert len(first) == 600
    assert chosen(0, samples[::-1]) == first == chosen(0, samples)
    part = chosen(0, samples[50:60])
    assert len(part) == 30 and all(first[key] == value for key, value in part.items())
    other = chosen(1, samples)
    assert 150 < sum(first[key] != other[key] for key in first) < 450  # about half of 600


def test_sampled_labels_of_one_sample_are_independent_of_each_other() -> None:
    # Three answers of one reward: each of the 2^3 outcomes of their three games in 1 of 8 samples, cycles among them.
    samples = [sample(number, ["a", "b", "c"]) for number in range(800)]
    found = paired(samples, [[0.0, 0.0, 0.0]] * 800, labels="sampled")
    outcomes = Counter(tuple(pair.chosen for pair in found[start : start + 3]) for start in range(0, 2400, 3))
    assert len(outcomes) == 8
    assert all(abs(number - 100) < 4 * math.sqrt(800 * 1 / 8 * 7 / 8) for number in outcomes.values())


def test_extreme_margins_have_probability_zero_and_one() -> None:
    one = [sample(0, ["a", "b"])]
    (pair,) = paired(one, [[-1000.0, 1000.0]])
    assert (pair.chosen, pair.probability) == ("b", 1.0)
    (sampled,) = paired(one, [[1000.0, -1000.0]], labels="sampled")
    assert (sampled.chosen, sampled.probability) == ("a", 1.0)


def test_ties_identical_and_empty_answers_are_left_out_and_counted(command: Command, tmp_path: Path) -> None:
    answers = {
        "tie?": ["two words", "same number"],
        "identical?": ["one answer", " one answer\n"],
        "empty?": ["  ", "something"],
        "good?": ["brief", "not so brief"],
    }
    samples = samples_of(tmp_path / "s.jsonl", answers)
    output = tmp_path / "labels.jsonl"
    ended = command("dpo-label", f"samples={samples}", f"output={output}", "by=rule", "rule=shorter")
    assert ended.code == 0, ended.err
    assert [row["chosen"] for row in rows(output)] == ["brief"]
    said = " ".join(ended.out.split())
    assert "left out 1 pair whose responses have the same reward" in said
    assert "left out 1 pair whose responses are the same text" in said
    assert "left out 1 pair with an empty response" in said
    manifest = json.loads(output.with_name("labels.jsonl.manifest.json").read_text())
    assert (manifest["pairs"], manifest["left_out"]) == (1, {"tie": 1, "identical": 1, "empty_response": 1})
    del answers["good?"]
    samples = samples_of(tmp_path / "none.jsonl", answers)
    ended = command("dpo-label", f"samples={samples}", "by=rule", "rule=shorter")
    assert (ended.code, ended.err) == (
        3, f"error: {samples}: no two responses make a pair (1 tie, 1 identical, 1 empty_response)\n"
    )  # fmt: skip


# Files


def test_what_else_a_prompts_messages_carry_is_not_asked(command: Command, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Why?", "name": "Ann", "weight": "\ud800"}]
    file = write_jsonl(tmp_path / "s.jsonl", [{"prompt": turns, "responses": ["a b c", "d"], "finish_reason": None}])
    (row,) = labelled(command, file, "by=rule", "rule=shorter")
    assert row["prompt"] == [{"role": "user", "content": "Why?", "name": "Ann"}] and row["chosen"] == "d"


def test_a_judge_that_labels_nothing_leaves_room_for_another(command: Command, tmp_path: Path) -> None:
    samples = samples_of(tmp_path / "s.jsonl", {"Why?": ["a b", "c d"]})
    tied = command("dpo-label", f"samples={samples}", "by=rule", "rule=shorter")
    assert (tied.code, tied.err) == (3, f"error: {samples}: no two responses make a pair (1 tie)\n")
    assert [path.name for path in tmp_path.iterdir()] == ["s.jsonl"]
    drawn = command("dpo-label", f"samples={samples}", "by=rule", "rule=shorter", "labels=sampled")
    assert drawn.code == 0, drawn.err
    again = command("dpo-label", f"samples={samples}", "by=rule", "rule=shorter")
    assert "(labels was sampled, is best; seed was 0, is not set)" in again.err


def test_what_is_no_file_of_samples_is_refused(command: Command, tmp_path: Path) -> None:
    good = {"prompt": "Why?", "responses": ["a", "b"]}
    file = tmp_path / "s.jsonl"
    what = "no 'responses' key with a list of two texts or more; it has"
    for row, says in (
        (
            {"prompt": "Why?", "chosen": "a", "rejected": "b"},
            f"{what} prompt, chosen, rejected. Make samples with dpo-sample",
        ),
        ({"prompt": "Why?", "responses": ["a"]}, "has one response, and labels need two; sample with n=2 or more"),
        (
            {**good, "finish_reason": ["stop"]},
            '\'finish_reason\' must be a list of "stop" or "length", one for each response',
        ),
        ({**good, "finish_reason": ["stop", "eos"]}, "'finish_reason' is 'eos'; it must be \"stop\" or \"length\""),
        (
            {**good, "finished": [True, False]},
            '\'finished\' is an older name; write "finish_reason": a list of "stop" or "length"',
        ),
        ({"prompt": "Why?", "responses": ["a", 7]}, f"{what} prompt, responses. Make samples with dpo-sample"),
        ({"responses": ["a", "b"]}, "no 'prompt' key. A row needs a prompt, as text or messages; it has nothing"),
        ([1], "not a JSON object: [1]"),
    ):
        write_jsonl(file, [good, row, good])
        ended = command("dpo-label", f"samples={file}", "by=rule", "rule=shorter")
        assert ended.code == 3 and ended.err.startswith(f"error: {file} line 2: {says}"), ended.err
        assert ended.err.count("\n") == 1
    write_jsonl(file, [])
    ended = command("dpo-label", f"samples={file}", "by=rule", "rule=shorter")
    assert (ended.code, ended.err) == (3, f"error: {file}: has no samples; make them with dpo-sample\n")
    gone = command("dpo-label", f"samples={tmp_path / 'gone.jsonl'}", "by=rule", "rule=shorter")
    assert gone.code == 3 and gone.err.count("\n") == 1 and "gone.jsonl" in gone.err
    assert [path.name for path in tmp_path.iterdir()] == ["s.jsonl"]  # no job log was created


def numbered(number: int) -> dict[str, list[str]]:
    return {f"Question {row}?": [f"brief {row}", f"not so very brief {row}"] for row in range(number)}


def test_half_a_line_of_samples_is_named_wherever_it_stands(command: Command, tmp_path: Path) -> None:
    samples = samples_of(tmp_path / "s.jsonl", numbered(3))
    whole = samples.read_bytes()
    for cut in (whole[:-10], whole[:-10] + b"\n" + whole):
        samples.write_bytes(cut)
        ended = command("dpo-label", f"samples={samples}", "by=rule", "rule=shorter")
        assert ended.code == 3 and ended.err.startswith(f"error: {samples} line 3: not JSON")


def test_a_finished_file_is_complete_and_labels_of_other_samples_are_refused(command: Command, tmp_path: Path) -> None:
    samples, output = samples_of(tmp_path / "s.jsonl", numbered(3)), tmp_path / "labels.jsonl"
    words = (f"samples={samples}", f"output={output}", "by=rule", "rule=shorter")
    assert command("dpo-label", *words).code == 0
    before = output.read_bytes()
    again = command("dpo-label", *words)
    assert (again.code, again.err) == (0, "") and f"already complete: {output}" in again.out
    for changed, key in (("pairs=extremes", "pairs was all, is extremes"), ("rule=longer", "rule was shorter, is"),
                         ("labels=sampled", "labels was best, is sampled")):  # fmt: skip
        ended = command("dpo-label", *(words[:-1] if "rule" in changed else words), changed)
        assert ended.code == 2 and ended.err.startswith(f"error: output={output}: was started with other settings (")
        assert key in ended.err and ended.err.count("\n") == 1
    samples_of(samples, numbered(4))
    other = command("dpo-label", *words)
    assert other.code == 2
    assert other.err.startswith(f"error: output={output}: was started with other settings (samples was ")
    assert other.err.endswith("; undo the changes, or name another output\n")
    assert output.read_bytes() == before
    assert command("dpo-label", *words[:1], f"output={samples}", *words[2:]).err == (
        f"error: output={samples}: is the file of samples; name another file\n"
    )


@pytest.mark.parametrize("cut", [0, 5])
def test_a_stopped_labelling_resumes_and_judges_nothing_twice(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    """Parts of 2 of 7 samples; stopped in the second, whose line is kept whole or cut in its middle."""
    samples, output = samples_of(tmp_path / "s.jsonl", numbered(7)), tmp_path / "labels.jsonl"
    words = (f"samples={samples}", f"output={output}", "by=rule", "rule=shorter")
    monkeypatch.setattr(module, "PART_SIZE", 2)
    straight = command("dpo-label", *words[:1], f"output={tmp_path / 'straight.jsonl'}", *words[2:])
    assert straight.code == 0, straight.err
    original, judged = RuleJudge.rewards, []

    def counted(self: RuleJudge, some: Any, poll: Any) -> list[list[float]]:
        judged.extend(one.prompt for one in some)
        if len(judged) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, some, poll)

    monkeypatch.setattr(RuleJudge, "rewards", counted)
    stopped = command("dpo-label", *words)
    assert stopped.code == 75, stopped.err
    assert stopped.err == "error: stopped by SIGTERM; to resume, run the same command\n"
    assert not output.exists() and len(judged) == 4
    log = tmp_path / "labels.jsonl.part"
    log.write_bytes(log.read_bytes()[: -cut or None])
    del judged[:]
    monkeypatch.setattr(
        RuleJudge, "rewards", lambda self, some, poll: judged.extend(some) or original(self, some, poll)
    )
    resumed = command("dpo-label", *words)
    assert resumed.code == 0, resumed.err
    assert ("its last line is incomplete; that part is done again" in resumed.out) == bool(cut)
    asked = [int(one.prompt.split()[1].rstrip("?")) for one in judged]
    assert asked == ([2, 3, 4, 5, 6] if cut else [4, 5, 6])
    assert f"resuming: {7 - len(asked)} samples of 7 done" in resumed.out
    assert output.read_bytes() == (tmp_path / "straight.jsonl").read_bytes()
    assert not log.exists()


# Refused judges


def test_a_judge_of_another_kind_is_refused(
    command: Command, reward_run: Path, dpo_run: Path, tiny_path: str, tmp_path: Path
) -> None:
    samples = samples_of(tmp_path / "s.jsonl", numbered(1))
    gone = tmp_path / "gone"
    for words, code, says in (
        (("by=reward", f"judge={dpo_run}"), 2,
         f"judge={dpo_run}: is not a reward model; set by=implicit for a DPO run's implicit reward, or train a "
         "reward model with dpo-train objective=reward"),
        (("by=implicit", f"judge={reward_run}"), 2, f"judge={reward_run}: is a reward model; set by=reward"),
        (("by=implicit", f"judge={tiny_path}"), 2,
         f"judge={tiny_path}: is a model without an adapter; name a run's adapter, or a sequence-classification "
         "model with one label"),
        (("by=reward", f"judge={tiny_path}"), 2,
         f"judge={tiny_path}: is not a reward model; set by=implicit for a DPO run's implicit reward, or train a "
         "reward model with dpo-train objective=reward"),
        (("by=rule", "rule=prettier"), 2, "rule=prettier: choose one of shorter, longer, unrepetitive"),
        (("by=reward", f"judge={gone}"), 4,
         f"judge={gone}: no such directory; name a run directory, checkpoints/step-*, final/, a PEFT adapter "
         "directory or a model"),
    ):  # fmt: skip
        ended = command("dpo-label", f"samples={samples}", *words)
        assert (ended.code, ended.err) == (code, f"error: {says}\n")
    assert not list(tmp_path.glob("*.part"))


def test_a_reward_run_whose_head_is_gone_is_not_asked_for_an_implicit_reward(
    command: Command, reward_run: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(reward_run, tmp_path / "copy")
    (copy / "final" / HEAD_FILE).unlink()
    samples = samples_of(tmp_path / "s.jsonl", numbered(1))
    assert command("dpo-label", f"samples={samples}", "by=implicit", f"judge={copy}").code == 2
    ended = command("dpo-label", f"samples={samples}", "by=reward", f"judge={copy}")
    assert ended.code == 4 and ended.err.startswith(f"error: {copy / 'final' / HEAD_FILE}: cannot be read")


def test_a_judge_whose_tokenizer_was_changed_is_refused(command: Command, dpo_run: Path, tmp_path: Path) -> None:
    samples = samples_of(tmp_path / "s.jsonl", numbered(1))
    copy = shutil.copytree(dpo_run, tmp_path / "copy")
    template = copy / "final" / "chat_template.jinja"
    template.write_text(template.read_text() + "{# #} ")
    ended = command("dpo-label", f"samples={samples}", "by=implicit", f"judge={copy}")
    assert (ended.code, ended.err) == (
        4,
        f"error: judge={copy / 'final'}: was trained with another tokenizer than dpo-cli/tiny-random has now (its chat "
        "template differs); restore that base model\n",
    )
    manifest = json.loads((copy / "manifest.json").read_text())
    closing = manifest["template"]["closing_token"]
    manifest["template"]["closing_token"] = 0
    (copy / "manifest.json").write_text(json.dumps(manifest))
    ended = command("dpo-label", f"samples={samples}", "by=implicit", f"judge={copy}")
    assert (ended.code, ended.err) == (
        4,
        f"error: judge={copy / 'final'}: was trained with template chat and closing token 0, but dpo-cli/tiny-random "
        f"now has chat and {closing}; restore the base model of its training\n",
    )


def test_answers_under_another_template_than_the_judges_are_refused(
    command: Command, dpo_run: Path, tmp_path: Path
) -> None:
    samples = samples_of(tmp_path / "s.jsonl", numbered(1), template="plain")
    ended = command("dpo-label", f"samples={samples}", "by=implicit", f"judge={dpo_run}")
    assert (ended.code, ended.err) == (
        2,
        f"error: {samples}: generated with template=plain, but the judge {dpo_run / 'final'} reads template=chat; "
        "sample again with template=chat, or use a judge trained with data.template=plain\n",
    )
    samples_of(samples, numbered(1), template="chat")
    assert command("dpo-label", f"samples={samples}", "by=implicit", f"judge={dpo_run}").code == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "by=null: say who labels: human, reward, implicit, rule"),
        (("by=peer",), "by=peer: choose one of human, reward, implicit, rule"),
        (("by=rule",), "rule=null: by=rule needs it: rule=NAME, for instance rule=shorter"),
        (("by=reward",), "judge=null: by=reward needs it: judge=RUN, a run of dpo-train objective=reward"),
        (("by=human",), "annotator=null: by=human needs it: annotator=NAME, under which the judgements are kept"),
        (("by=rule", "rule=shorter", "judge=x"), "judge=x: by=rule does not use it; leave it out"),
        (("by=reward", "judge=x", "rule=shorter"), "rule=shorter: by=reward does not use it; leave it out"),
        (("by=rule", "rule=shorter", "annotator=ann"), "annotator=ann: by=rule does not use it; leave it out"),
        (("by=human", "annotator=ann", "pairs=extremes"),
         "pairs=extremes: people are asked for all pairs, and their word is taken; leave it out with by=human"),
        (("by=human", "annotator=ann", "labels=sampled"),
         "labels=sampled: people are asked for all pairs, and their word is taken; leave it out with by=human"),
        (("by=rule", "rule=shorter", "device=cpu"), "device=cpu: by=rule asks no model; leave it out"),
        (("by=human", "annotator=ann", "layout=packed"), "layout=packed: by=human asks no model; leave it out"),
        (("by=rule", "rule=shorter", "prior=2"),
         "prior=2: of by=human; by=rule fits no strengths; leave it out"),
        (("by=rule", "rule=shorter", "seed=1"),
         "seed=1: of labels=sampled; nothing is sampled with labels=best; leave it out"),
        (("by=rule", "rule=shorter", "pairs=best"), "pairs=best: choose one of extremes, all"),
        (("by=human", "annotator=ann"),
         "by=human: standard input is not a terminal, which it needs to show answers and read keys; run it in a "
         "terminal, or use by=reward, by=implicit or by=rule"),
    ],
)  # fmt: skip
def test_what_does_not_belong_to_the_labeller_is_refused(
    command: Command, tmp_path: Path, words: tuple[str, ...], says: str
) -> None:
    samples = samples_of(tmp_path / "s.jsonl", numbered(1))
    ended = command("dpo-label", f"samples={samples}", *words)
    assert (ended.code, ended.err) == (2, f"error: {says}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["s.jsonl"]
