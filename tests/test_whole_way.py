"""The whole way by its commands: prompts become samples, samples pairs, pairs a policy, policies a ranking."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Ended, sample_rows, write_jsonl

from dpo_cli.config.composition import conf_dir
from dpo_cli.data.formats import prompt_of

Command = Callable[..., Ended]
PROMPTS = [
    "Tell me about cats.",
    "Tell me about rain, and why it falls.",
    "Bread?",
    "Why is the sky blue?",
    "Tea or not?",
]
DRAWING = ("model=tiny", "model.dtype=float32", "max_new_tokens=12")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])


@pytest.fixture
def samples(command: Command, prompts: Path, tmp_path: Path) -> Path:
    path = tmp_path / "samples.jsonl"
    assert command("dpo-sample", *DRAWING, f"prompts={prompts}", f"output={path}").code == 0
    return path


# Samples


def test_samples_hold_different_answers_in_the_order_of_the_prompts_with_where_they_come_from(samples: Path) -> None:
    found = rows(samples)
    assert [row["prompt"] for row in found] == PROMPTS
    assert [row["index"] for row in found] == [0, 1, 2, 3, 4]
    for row in found:
        assert len(row["responses"]) == 2 and row["responses"][0] != row["responses"][1]
        assert all(0 <= tokens <= 12 for tokens in row["tokens"])
        assert (row["model"], row["seed"], row["temperature"], row["top_p"]) == ("dpo-cli/tiny-random", 0, 1.0, 1.0)
    manifest = json.loads((samples.parent / "samples.jsonl.manifest.json").read_text())
    assert (
        manifest["samples"] == 5 and manifest["completions"] == 10 and manifest["job"]["weights"] == found[0]["weights"]
    )
    assert not (samples.parent / "samples.jsonl.part").exists()


def test_the_answers_to_a_prompt_are_the_same_whatever_is_drawn_beside_them(
    command: Command, samples: Path, tmp_path: Path
) -> None:
    """Another batch size, other prompts around it, another order of the file: float32, where roundings are small."""
    others = ["Another one.", *PROMPTS[::-1]]
    turned = write_jsonl(tmp_path / "turned.jsonl", [{"prompt": prompt} for prompt in others])
    other = tmp_path / "other.jsonl"
    assert command("dpo-sample", *DRAWING, f"prompts={turned}", f"output={other}", "batch_size=2").code == 0
    answers = {row["prompt"]: row["responses"] for row in rows(other)}
    assert {row["prompt"]: row["responses"] for row in rows(samples)}.items() <= answers.items()
    changed = tmp_path / "seed.jsonl"
    assert command("dpo-sample", *DRAWING, f"prompts={turned}", f"output={changed}", "seed=1").code == 0
    assert all(row["responses"] != answers[row["prompt"]] for row in rows(changed))


@pytest.mark.parametrize("lost", range(0, 400, 23))
def test_a_sampling_cut_off_anywhere_goes_on_to_the_same_bytes(
    command: Command, prompts: Path, tmp_path: Path, lost: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of one prompt; killed after some of them, the job log's last line cut `lost` bytes before its end."""
    from dpo_cli.commands import sample
    from dpo_cli.generation import sampler
    from dpo_cli.storage import job_log

    words = (*DRAWING, f"prompts={prompts}", "batch_size=2")
    straight, resumed = tmp_path / "straight.jsonl", tmp_path / "resumed.jsonl"
    assert command("dpo-sample", *words, f"output={straight}").code == 0
    sizes: list[int] = []
    generate = sampler.distinct_completions
    monkeypatch.setattr(sampler, "distinct_completions", lambda *a: (sizes.append(len(a[2])), generate(*a))[1])

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sample, "finish_job", killed)
        assert command("dpo-sample", *words, f"output={resumed}").code == 130
    part = job_log.job_log_path(resumed)
    content = part.read_bytes()
    part.write_bytes(content[: len(content) - lost])
    whole = max(0, part.read_bytes().count(b"\n") - 1)  # batches that are on disk
    sizes.clear()
    ended = command("dpo-sample", *words, f"output={resumed}")
    assert ended.code == 0, ended.err
    assert resumed.read_bytes() == straight.read_bytes()
    assert sum(sizes) == 5 - whole
    assert ("its last line is incomplete" in ended.out) == (lost > 0)


def test_a_finished_sampling_is_not_done_again_and_another_is_not_mixed_with_it(
    command: Command, samples: Path, prompts: Path
) -> None:
    before = samples.read_bytes()
    again = command("dpo-sample", *DRAWING, f"prompts={prompts}", f"output={samples}")
    assert again.code == 0 and f"already complete: {samples}" in again.out
    other = command("dpo-sample", *DRAWING, f"prompts={prompts}", f"output={samples}", "seed=3", "temperature=0.5")
    assert other.code == 2
    assert other.err == (
        f"error: output={samples}: was started with other settings (seed was 0, is 3; temperature was 1.0, is 0.5); "
        "undo the changes, or name another output\n"
    )
    assert samples.read_bytes() == before


def test_a_strangers_file_is_never_written_over(command: Command, prompts: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text("precious\n")
    ended = command("dpo-sample", *DRAWING, f"prompts={prompts}", f"output={mine}")
    assert ended.code == 2 and ended.err == f"error: output={mine}: already exists; name another file\n"
    assert mine.read_text() == "precious\n"


def test_prompts_are_read_from_lines_messages_dialogues_and_pairs(command: Command, tmp_path: Path) -> None:
    forms = write_jsonl(
        tmp_path / "forms.jsonl",
        [
            {"prompt": "Text."},
            {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Messages?"}]},
            {"prompt": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: A dialogue?\n\nAssistant:"},
            {"chosen": "\n\nHuman: A pair?\n\nAssistant: Yes.", "rejected": "\n\nHuman: A pair?\n\nAssistant: No."},
            {"prompt": "Text."},
            {"prompt": "  "},
        ],
    )
    out = tmp_path / "out.jsonl"
    ended = command("dpo-sample", *DRAWING, f"prompts={forms}", f"output={out}")
    assert ended.code == 0, ended.err
    assert [row["index"] for row in rows(out)] == [0, 1, 2, 3]
    assert rows(out)[3]["prompt"] == "\n\nHuman: A pair?\n\nAssistant:"
    assert "4 prompts of 6 rows" in ended.out
    assert "dropped 1 prompt (repeated)" in ended.out and "dropped 1 prompt (empty)" in ended.out
    text = tmp_path / "lines.txt"
    text.write_text("First line\n\nSecond line\n")
    assert command("dpo-sample", *DRAWING, f"prompts={text}", f"output={tmp_path / 'l.jsonl'}").code == 0
    assert [row["prompt"] for row in rows(tmp_path / "l.jsonl")] == ["First line", "Second line"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "x"}, "no 'prompt' key. A row needs a prompt, as text or messages; it has question"),
        ({"prompt": 3}, "'prompt' must be text, it is a number"),
        ({"prompt": []}, "the prompt must end with a user message"),
        ("{", "not JSON"),
    ],
)
def test_a_row_without_a_prompt_is_named(command: Command, tmp_path: Path, row: Any, words: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"prompt": "fine"}\n' + (row if isinstance(row, str) else json.dumps(row)) + "\n")
    ended = command("dpo-sample", *DRAWING, f"prompts={file}", f"output={tmp_path / 'o.jsonl'}")
    assert ended.code == 3
    assert ended.err.startswith(f"error: {file} line 2: {words}")
    assert not (tmp_path / "o.jsonl.part").exists()
    skipped = command("dpo-sample", *DRAWING, f"prompts={file}", f"output={tmp_path / 'o.jsonl'}", "on_bad_row=skip")
    assert skipped.code == 0 and "dropped 1 prompt (not readable)" in skipped.out


# Pairs


def test_a_rule_labels_samples_and_dpo_trains_on_the_pairs(
    command: Command, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """shorter: r = -log(1 + words), so that P(chosen) = (1 + words of rejected) / (2 + words of both)."""
    written = write_jsonl(
        tmp_path / "written.jsonl",
        [
            {"prompt": "One?", "responses": ["one two three", "one"]},
            {"prompt": [{"role": "user", "content": "Two?"}], "responses": ["a b", "a b c d e"]},
            {"prompt": "\n\nHuman: Three?\n\nAssistant:", "responses": ["x y", "z w"]},
            {"prompt": "Four?", "responses": ["same", " same"]},
        ],
    )
    ended = command("dpo-label", f"samples={written}", "by=rule", "rule=shorter")
    assert ended.code == 0, ended.err
    pairs = rows(tmp_path / "written.rule.jsonl")
    assert [(row["chosen"], row["rejected"]) for row in pairs] == [("one", "one two three"), ("a b", "a b c d e")]
    assert [row["probability"] for row in pairs] == [pytest.approx(4 / 6), pytest.approx(6 / 9)]
    assert "left out 1 pair whose responses have the same reward" in ended.out
    assert "left out 1 pair whose responses are the same text" in ended.out
    trained = command(
        "dpo-train", "model=tiny", "data=jsonl", f"data.train={tmp_path / 'written.rule.jsonl'}",
        "data.eval_fraction=0", "max_steps=1", f"output_dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert trained.code == 0, trained.err
    assert "2 pairs with a soft label, their probability that chosen is better" in " ".join(trained.out.split())


def test_three_answers_make_three_pairs_or_the_two_extremes(command: Command, tmp_path: Path) -> None:
    three = write_jsonl(tmp_path / "three.jsonl", [{"prompt": "Q?", "responses": ["a b", "a b c", "a"]}])
    for choice, expected in (
        ("all", [("a b", "a b c"), ("a", "a b"), ("a", "a b c")]),
        ("extremes", [("a", "a b c")]),
    ):
        out = tmp_path / f"{choice}.jsonl"
        words = ("by=rule", "rule=shorter", f"pairs={choice}", f"output={out}")
        assert command("dpo-label", f"samples={three}", *words).code == 0
        assert [(row["chosen"], row["rejected"]) for row in rows(out)] == expected


def test_sampled_labels_are_wrong_as_often_as_bradley_terry_says(command: Command, tmp_path: Path) -> None:
    """Answers of 1 and of 3 words: P = 4/6 for the shorter. Of 1,500 pairs 1,000 +- 18.3 (one standard deviation)."""
    some = [{"prompt": f"Q{number}?", "responses": ["a b c", "a"]} for number in range(1500)]
    many = write_jsonl(tmp_path / "many.jsonl", some)
    words = ("by=rule", "rule=shorter", "labels=sampled")
    assert command("dpo-label", f"samples={many}", *words).code == 0
    found = rows(tmp_path / "many.rule.jsonl")
    right = sum(row["chosen"] == "a" for row in found)
    assert abs(right - 1000) < 4 * math.sqrt(1500 * (2 / 3) * (1 / 3))
    assert {round(row["sampled_with_probability"], 9) for row in found} == {round(4 / 6, 9), round(2 / 6, 9)}
    turned = write_jsonl(tmp_path / "turned.jsonl", some[::-1])
    assert command("dpo-label", f"samples={turned}", *words).code == 0
    assert sorted(map(str, rows(tmp_path / "turned.rule.jsonl"))) == sorted(map(str, found))


def test_implicit_rewards_are_those_of_dpo_eval(command: Command, tmp_path: Path) -> None:
    """beta log pi/pi_ref of the same two texts, by way of samples and by way of pairs."""
    pairs = sample_rows(20)
    train = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    run = tmp_path / "run"
    words = ("model=tiny", "model.dtype=float32", "data=jsonl", f"data.train={train}", "optimizer.lr=1e-2", "beta=0.3")
    ended = command("dpo-train", *words, "max_steps=4", "batch_size=4", f"data.eval={train}", f"output_dir={run}")
    assert ended.code == 0, ended.err
    assert command("dpo-eval", f"checkpoint={run}", "name=x").code == 0
    expected = {}
    for line in rows(run / "eval" / "x" / "pairs.jsonl"):
        row = pairs[line["index"]]
        expected[row["prompt"]] = {row["chosen"]: line["reward_chosen"], row["rejected"]: line["reward_rejected"]}
    samples = write_jsonl(
        tmp_path / "samples.jsonl",
        [{"prompt": row["prompt"], "responses": [row["rejected"], row["chosen"]]} for row in pairs],
    )
    assert command("dpo-label", f"samples={samples}", "by=implicit", f"judge={run}").code == 0
    found = rows(tmp_path / "samples.implicit.jsonl")
    assert len(found) == 20
    for row in found:
        rewards = expected[row["prompt"]]
        assert row["reward_chosen"] == pytest.approx(rewards[row["chosen"]], abs=1e-4)
        assert row["reward_rejected"] == pytest.approx(rewards[row["rejected"]], abs=1e-4)
        margin = row["reward_chosen"] - row["reward_rejected"]
        assert margin > 0 and row["probability"] == pytest.approx(1 / (1 + math.exp(-margin)))
    refused = command("dpo-label", f"samples={samples}", "by=reward", f"judge={run}")
    assert refused.code == 2 and refused.err.startswith(f"error: judge={run}: is not a reward model; set by=implicit")


def test_labels_of_other_samples_are_refused_with_what_differs(command: Command, samples: Path, tmp_path: Path) -> None:
    out = tmp_path / "pairs.jsonl"
    assert command("dpo-label", f"samples={samples}", "by=rule", "rule=longer", f"output={out}").code == 0
    other = write_jsonl(tmp_path / "other.jsonl", [{"prompt": "Q?", "responses": ["a", "b c"]}])
    ended = command("dpo-label", f"samples={other}", "by=rule", "rule=longer", f"output={out}")
    assert ended.code == 2
    assert re.match(
        rf"error: output={re.escape(str(out))}: was started with other settings \(samples was \w+, is ", ended.err
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "has no samples; make them with dpo-sample"),
        ('{"prompt": "x", "chosen": "a", "rejected": "b"}\n', "no 'responses' key with a list of two texts or more"),
        ('{"prompt": "x", "responses": ["a"]}\n', "has one response, and labels need two; sample with n=2 or more"),
        ('{"responses": ["a", "b"]}\n', "no 'prompt' key"),
        ('{"prompt": "x", "responses": ["a", 3]}\n', "no 'responses' key with a list of two texts or more"),
    ],
)
def test_a_file_that_holds_no_samples_is_refused(command: Command, tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "s.jsonl"
    file.write_text(content)
    ended = command("dpo-label", f"samples={file}", "by=rule", "rule=shorter")
    assert ended.code == 3 and words in ended.err and ended.err.count("\n") == 1


def test_half_a_line_at_the_end_of_samples_is_named(command: Command, samples: Path) -> None:
    samples.write_bytes(samples.read_bytes()[:-30])
    ended = command("dpo-label", f"samples={samples}", "by=rule", "rule=shorter")
    assert ended.code == 3 and ended.err.startswith(f"error: {samples} line 5: not JSON (")


def test_samples_that_nobody_labelled_are_no_ranking(command: Command, samples: Path, tmp_path: Path) -> None:
    words = ("model=tiny", "data=jsonl", f"data.train={samples}", f"output_dir={tmp_path / 'run'}")
    ended = command("dpo-train", *words)
    assert ended.code == 3
    assert f"{samples} line 1: has responses without labels; make pairs of them with dpo-label" in ended.err


def test_a_system_message_is_in_the_samples_that_were_drawn_under_it(command: Command, tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be terse."}, {"role": "user", "content": "Hi"}]
    answers = {side: [*turns, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [answers])
    out = tmp_path / "out.jsonl"
    assert command("dpo-sample", *DRAWING, f"prompts={pairs}", f"output={out}").code == 0
    stored = rows(out)[0]["prompt"]
    assert [message.as_dict() for message in prompt_of({"prompt": stored}).messages] == turns


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("by=reward",), "judge=null: by=reward needs it: judge=RUN, a run of dpo-train objective=reward"),
        (("by=rule", "rule=shorter", "judge=x"), "judge=x: by=rule does not use it; leave it out"),
        (("by=rule", "rule=shortest"), "rule=shortest: choose one of shorter, longer, unrepetitive"),
        (("by=human",), "annotator=null: by=human needs it: annotator=NAME, under which the judgements are kept"),
        (("by=robot",), "by=robot: choose one of human, reward, implicit, rule"),
        ((), "by=null: say who labels: human, reward, implicit, rule"),
    ],
)
def test_what_a_labeller_needs_is_said(command: Command, samples: Path, words: tuple[str, ...], error: str) -> None:
    ended = command("dpo-label", f"samples={samples}", *words)
    assert ended.code == 2 and ended.err == f"error: {error}\n"


# Rankings


def test_checkpoints_play_each_other_before_a_judge(command: Command, prompts: Path, tmp_path: Path) -> None:
    """A policy trained to be short against the model it came from, by the rule `shorter`."""
    short = [{"prompt": prompt, "chosen": "a", "rejected": "b" * 30} for prompt in PROMPTS]
    train = write_jsonl(tmp_path / "short.jsonl", short)
    run = tmp_path / "run"
    data_options = ("model=tiny", "model.dtype=float32", "optimizer.lr=3e-2", "optimizer.warmup_steps=0", "beta=0.01")
    ended = command(
        "dpo-train", *data_options, "data=jsonl", f"data.train={train}", "data.eval_fraction=0", "max_steps=12",
        "batch_size=5", f"output_dir={run}",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    out = tmp_path / "rank.json"
    played = command(
        "dpo-rank", f"checkpoints=[dpo-cli/tiny-random,{run}]", "judge=shorter", f"prompts={prompts}",
        "max_new_tokens=20", "prior=1", f"output={out}",
    )  # fmt: skip
    assert played.code == 0, played.err
    answers = rows(tmp_path / "rank.answers.jsonl")
    assert [row["prompt"] for row in answers] == PROMPTS
    assert all(row["players"] == ["tiny-random", "run"] for row in answers)
    for row in answers:
        assert row["rewards"] == [pytest.approx(-math.log(1 + len(text.split()))) for text in row["responses"]]
    ranking = json.loads(out.read_text())
    assert set(ranking["names"]) == {"tiny-random", "run"} and ranking["clusters"] == 5
    assert "mean reward (95%)" in played.out and "intervals are over 5 prompts" in played.out


def test_a_tie_is_half_a_win_and_nobody_plays_themselves() -> None:
    from dpo_cli.labelling.match import Match

    match = Match(["a", "b", "c"], [], [], [[1.0, 1.0, 0.0], [2.0, 0.0, 3.0]])
    assert match.tables.tolist() == [
        [[0.0, 0.5, 1.0], [0.5, 0.0, 1.0], [0.0, 0.0, 0.0]],
        [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0]],
    ]


def test_a_file_of_games_is_ranked_by_the_command(command: Command, tmp_path: Path) -> None:
    games = tmp_path / "games.csv"
    games.write_text("winner,loser,count\nA,B,8\nB,A,4\nA,C,3\nC,A,5\n")
    ended = command("dpo-rank", f"games={games}", f"output={tmp_path / 'r.json'}")
    assert ended.code == 0, ended.err
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["names"] == ["C", "A", "B"]
    assert found["win_probabilities"][2][0] == pytest.approx(3 / 13)
    assert "20 games between 3 players" in ended.out


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ((), "games=null: give games=FILE, or checkpoints=[a,b,c] judge=... prompts=FILE"),
        (("checkpoints=[a,b]",), "judge=null: name a reward model's run, a DPO run, or a rule"),
        (("checkpoints=[a,a]", "judge=shorter"), "checkpoints=['a', 'a']: name each once"),
        (("checkpoints=[a]", "judge=shorter"), "checkpoints=['a']: must be two or more, for instance"),
        (("games=x.csv", "judge=shorter"), "judge=shorter: games=FILE holds the results already; leave it out"),
    ],
)
def test_what_a_ranking_needs_is_said(command: Command, words: tuple[str, ...], error: str) -> None:
    ended = command("dpo-rank", *words)
    assert ended.code == 2 and ended.err.startswith(f"error: {error}")


# The commands themselves


@pytest.mark.parametrize("name", ["sample", "label", "rank"])
def test_help_names_every_key_and_answers_without_torch(name: str) -> None:
    program = f"import sys; sys.argv=['x', '--help-all']; from dpo_cli.cli import {name}\ntry: {name}()\nfinally: " \
              "assert 'torch' not in sys.modules"  # fmt: skip
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    keys = set(yaml.safe_load((conf_dir() / f"{name}.yaml").read_text())) - {"defaults"}
    assert {key for key in keys if not re.search(rf"\b{key}=", shown)} == set()
    assert max(map(len, shown.splitlines())) <= 120
