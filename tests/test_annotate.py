"""Labelling by hand: no judgement is lost or asked twice, sides are blind, and labels follow from the judgements.

The screen itself is driven by keys in a pseudo-terminal, and read as a terminal would show it.
"""

import fcntl
import io
import itertools
import json
import math
import os
import pty
import re
import resource
import runpy
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_words, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from dpo_cli.console.reporter import Reporter
from dpo_cli.data.formats import FinishReason, Message, pairs_of
from dpo_cli.data.samples import Sample, read_samples, sample_id, samples_fingerprint
from dpo_cli.errors import ConfigError, DataError, StorageError
from dpo_cli.labelling.annotate import (
    AnnotatorStats,
    Question,
    aggregate,
    agreement_table,
    agreements,
    annotate,
    annotator_stats,
    labels_line,
    questions_of,
    sides,
    write_labels,
)
from dpo_cli.labelling.judgements import Judgement, open_judgement_log
from dpo_cli.labelling.labels import LabelledPair, label_row
from dpo_cli.labelling.screen import (
    ACTIONS,
    Comparison,
    KeyDecoder,
    comparison_page,
    frame,
    help_page,
    last_top,
    wrapped,
)

ROOT = Path(__file__).parent.parent
FILE = Path("answers.jsonl")


def sample(prompt: Any, *responses: str) -> Sample:
    return Sample(sample_id(prompt, responses), prompt, responses)


def samples(number: int = 4) -> list[Sample]:
    return [sample(f"prompt {index}?", f"yes {index}", f"no {index}") for index in range(number)]


def judgement(
    of: Sample, verdict: str = "left", left: int = 0, right: int = 1, annotator: str = "ann", seconds: float = 2.0
) -> Judgement:
    return Judgement(of.id, left, right, verdict, annotator, "2026-01-31T12:00:00+00:00", seconds)


# The log


def written_log(path: Path, of: list[Sample], *judgements: Judgement) -> bytes:
    with open_judgement_log(path, of, FILE, pytest.fail) as log:
        for one in judgements:
            log.append(one)
    return path.read_bytes()


def reopened(path: Path, of: list[Sample], warned: list[str] | None = None) -> list[Judgement]:
    with open_judgement_log(path, of, FILE, pytest.fail if warned is None else warned.append) as log:
        return list(log.judgements)


def test_a_judgement_is_on_disk_when_it_is_made(tmp_path: Path) -> None:
    path, of = tmp_path / "log.jsonl", samples()
    with open_judgement_log(path, of, FILE, pytest.fail) as log:
        for number, one in enumerate(of, start=2):
            log.append(judgement(one))
            assert len(path.read_bytes().splitlines()) == number
    first, second, *_ = path.read_text().splitlines()
    assert json.loads(first) == {"judgements": 1, "samples": samples_fingerprint(of), "file": "answers.jsonl"}
    assert json.loads(second) == {
        "sample": of[0].id, "left": 0, "right": 1, "verdict": "left", "annotator": "ann",
        "time": "2026-01-31T12:00:00+00:00", "seconds": 2.0,
    }  # fmt: skip
    assert reopened(path, of) == [judgement(one) for one in of]


@pytest.mark.parametrize("last", ["judgement", "undo"])
def test_a_kill_at_any_byte_of_the_last_line_loses_that_line_alone(tmp_path: Path, last: str) -> None:
    path, of = tmp_path / "log.jsonl", samples()
    whole = written_log(path, of, judgement(of[0]), judgement(of[1]))
    with open_judgement_log(path, of, FILE, pytest.fail) as log:
        if last == "undo":
            log.undo("ann", "2026-01-31T12:00:00+00:00")
        else:
            log.append(judgement(of[2]))
    added = path.read_bytes()[len(whole) :]
    assert added.endswith(b"\n")
    for length in range(1, len(added)):
        path.write_bytes(whole + added[:length])
        warned: list[str] = []
        assert reopened(path, of, warned) == [judgement(of[0]), judgement(of[1])]
        assert path.read_bytes() == whole
        assert warned == [
            f"{path} line 4: is incomplete, as after a kill; it is removed, and its question is asked again"
        ]


def test_a_kill_at_any_byte_of_the_first_line_starts_the_log_again(tmp_path: Path) -> None:
    path, of = tmp_path / "log.jsonl", samples()
    header = written_log(path, of)
    for length in range(len(header)):
        path.write_bytes(header[:length])
        warned: list[str] = []
        assert reopened(path, of, warned) == []
        assert path.read_bytes() == header and len(warned) == (length > 0)


def test_undo_removes_the_annotators_own_latest_judgement_and_rewrites_nothing(tmp_path: Path) -> None:
    path, of = tmp_path / "log.jsonl", samples()
    bens = [judgement(of[index], annotator="ben") for index in (1, 2)]
    before = written_log(path, of, judgement(of[0]), judgement(of[1]), *bens)
    with open_judgement_log(path, of, FILE, pytest.fail) as log:
        assert log.undo("ann", "now") == judgement(of[1])
        assert log.undo("ann", "now") == judgement(of[0])
        assert log.undo("ann", "now") is None
        log.append(judgement(of[1], "tie"))
    assert path.read_bytes().startswith(before)
    assert reopened(path, of) == [*bens, judgement(of[1], "tie")]


def test_of_several_pairs_of_a_sample_undo_removes_the_latest(tmp_path: Path) -> None:
    path, of = tmp_path / "log.jsonl", [sample("p", "a", "b", "c")]
    made = [judgement(of[0], left=left, right=right) for left, right in ((0, 1), (2, 0), (1, 2))]
    written_log(path, of, *made)
    with open_judgement_log(path, of, FILE, pytest.fail) as log:
        log.undo("ann", "now")
    assert reopened(path, of) == made[:2]


def line(**changes: Any) -> str:
    record = {
        "sample": samples()[1].id, "left": 0, "right": 1, "verdict": "left", "annotator": "ann", "time": "now",
        "seconds": 1.5,
    }  # fmt: skip
    return json.dumps({key: value for key, value in {**record, **changes}.items() if value is not ...})


FIELDS = "is not a judgement; it needs sample (or undo), annotator and time, each a text"
BAD_LINES = {
    "no json": "is not a judgement: no json",
    "[1]": "is not a judgement: [1]",
    "": "is not a judgement: ",
    "\x1b[2J": "is not a judgement: \\x1b[2J",
    "[" * 100_000: "is not a judgement: " + "[" * 57 + "...",
    line(annotator=...): FIELDS,
    line(time=3): FIELDS,
    line(sample=["x"]): FIELDS,
    line(sample="0" * 32): f"sample {'0' * 32} is not in answers.jsonl; remove the line, or name the samples it "
    "belongs to",
    line(left=2): "left and right must be two different numbers from 0 to 1",
    line(left=1): "left and right must be two different numbers from 0 to 1",
    line(left=True, right=0): "left and right must be two different numbers from 0 to 1",
    line(verdict="Left"): "verdict is Left, not one of left, right, tie, skip",
    line(verdict=["tie"]): "verdict is ['tie'], not one of left, right, tie, skip",
    line(seconds=-1): "seconds is -1, not a number from 0 to 1e+09",
    line(seconds=True): "seconds is True, not a number from 0 to 1e+09",
    line(seconds=...): "seconds is None, not a number from 0 to 1e+09",
    line(sample=samples()[0].id): "ann has judged this already in line 2; remove one of them",
    json.dumps({"undo": samples()[1].id, "annotator": "ann", "time": "now"}): "undoes a judgement that ann has not "
    "made; remove the line",
}


@pytest.mark.parametrize("bad", BAD_LINES, ids=lambda bad: bad[:40])
def test_a_line_that_is_not_a_judgement_is_named_and_the_log_is_not_changed(tmp_path: Path, bad: str) -> None:
    path, of = tmp_path / "log.jsonl", samples()
    content = written_log(path, of, judgement(of[0])) + bad.encode() + b"\n" + line().encode() + b"\n" + b'{"half'
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        reopened(path, of, [])
    assert str(error.value) == f"{path} line 3: {BAD_LINES[bad]}"
    assert path.read_bytes() == content


def test_a_log_of_other_samples_is_refused_with_both_files_and_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    content = written_log(path, samples(4), judgement(samples(4)[0]))
    with pytest.raises(DataError) as error, open_judgement_log(path, samples(3), Path("new.jsonl"), pytest.fail):
        pass
    assert str(error.value) == (
        f"{path}: has judgements of other samples than new.jsonl: it was started with answers.jsonl; name those "
        "samples, or another output"
    )
    path.write_bytes(content.replace(b'"judgements": 1', b'"judgements": 2'))
    with pytest.raises(DataError, match="is a log of version 2; this program reads version 1"):
        reopened(path, samples(4))


@pytest.mark.parametrize("content", ["A letter to a friend", "first\nsecond", '{"prompt": "p"}\n', "{}"])
def test_a_file_that_is_no_log_is_not_touched(tmp_path: Path, content: str) -> None:
    path = tmp_path / "letter.txt"
    path.write_text(content)
    with pytest.raises(DataError) as error:
        reopened(path, samples())
    assert str(error.value) == f"{path}: is not a log of judgements; name another output"
    assert path.read_text() == content
    with pytest.raises(StorageError, match="cannot be written"):
        reopened(tmp_path, samples())


def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    path, of = tmp_path / "log.jsonl", samples()
    with open_judgement_log(path, of, FILE, pytest.fail), pytest.raises(ConfigError) as error:
        reopened(path, of)
    assert str(error.value) == (f"{path}: another process is writing it; wait for it, or name another output")
    assert reopened(path, of) == []


def test_a_full_disk_leaves_no_half_of_a_line(tmp_path: Path) -> None:
    path, of = tmp_path / "log.jsonl", samples()
    before = written_log(path, of, judgement(of[0]))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_judgement_log(path, of, FILE, pytest.fail) as log:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, hard))
            with pytest.raises(StorageError) as error:
                log.append(judgement(of[1]))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert str(error.value) == (f"{path}: cannot be written (File too large); what was done before is in it")
        assert path.read_bytes() == before and log.judgements == [judgement(of[0])]
        log.append(judgement(of[1]))
    assert len(reopened(path, of)) == 2


def test_a_log_that_was_removed_takes_no_judgement(tmp_path: Path) -> None:
    path, of = tmp_path / "log.jsonl", samples()
    with open_judgement_log(path, of, FILE, pytest.fail) as log:
        path.unlink()
        with pytest.raises(StorageError, match="was removed or replaced meanwhile, and is written no more"):
            log.append(judgement(of[0]))


# Questions


def test_every_pair_of_answers_is_asked_but_those_that_nobody_can_tell_apart() -> None:
    of = [
        sample("p", "a", "b"),
        sample("p", "same", "same\n"),  # nobody sees the line end
        sample("p", "", "  "),
        sample("p", "", "b"),
        sample("p", "x", "x", "y"),  # x and x; then x and y, and the same once more
        sample("p", "a", "b", "c"),
    ]
    questions = questions_of(of)
    assert [(of.index(question.sample), question.pair) for question in questions.asked] == [
        (0, (0, 1)), (4, (0, 2)), (5, (0, 1)), (5, (0, 2)), (5, (1, 2)),
    ]  # fmt: skip
    assert str(questions) == (
        "5; not asked: 2 with identical responses, 2 with an empty response, 1 that repeat another"
    )
    assert str(questions_of(samples(1200))) == "1,200"


def test_sides_are_stable_balanced_and_differ_between_annotators() -> None:
    questions = questions_of(samples(1000)).asked
    first = [sides(question, "ann", seed=0) for question in questions]
    assert first == [sides(Question(question.sample, question.pair), "ann", seed=0) for question in questions]
    for other in ([sides(q, "ben", seed=0) for q in questions], [sides(q, "ann", seed=1) for q in questions]):
        assert {tuple(sorted(pair)) for pair in other} == {(0, 1)}
        # Of 1000 fair coins 500 fall alike, give or take 16: five times that is never met.
        assert abs(sum(pair == (0, 1) for pair in other) - 500) < 80
        assert abs(sum(one == another for one, another in zip(first, other, strict=True)) - 500) < 80


# Labels


def test_one_judgement_makes_odds_not_certainty() -> None:
    of = samples(1)
    labels = aggregate(of, [judgement(of[0], "right", left=1, right=0)], prior=1.0)
    (label,) = labels.pairs
    assert (label.chosen, label.rejected, label.by, label.judge) == ("yes 0", "no 0", "human", "ann")
    # A game won, and one drawn by each with an average player at 0; t and -t are the strengths, x = e^t. The slope of
    # the likelihood is 1/(1 + x^2) + 1/2 - x/(1 + x) = 0, so x^3 - x^2 - x - 3 = 0: x = 2.1304, p = x^2/(1 + x^2).
    x = math.exp(label.reward_chosen)
    assert x**3 - x**2 - x - 3 == pytest.approx(0, abs=1e-9)
    assert label.reward_rejected == pytest.approx(-label.reward_chosen)
    assert label.probability == pytest.approx(x**2 / (1 + x**2)) == pytest.approx(0.81945, abs=1e-5)


def test_a_second_annotator_of_one_mind_makes_it_surer_and_of_another_leaves_nothing() -> None:
    of = samples(2)
    said = [judgement(of[0]), judgement(of[1]), judgement(of[0], annotator="ben"),
            judgement(of[1], left=1, right=0, annotator="ben")]  # fmt: skip
    labels = aggregate(of, said)
    (label,) = labels.pairs
    x = math.exp(label.reward_chosen)  # two games won: 2/(1 + x^2) + 1/2 - x/(1 + x) = 0
    assert x**3 - x**2 - 3 * x - 5 == pytest.approx(0, abs=1e-9)
    assert (label.sample, label.judge) == (of[0].id, "ann, ben")
    assert labels.even == 1
    assert labels_line(labels) == ("1 labelled pair; 1 pair left out, whose probability is exactly 1/2")


def test_a_label_has_the_finish_reasons_of_its_responses() -> None:
    reasons = ((FinishReason.STOP, FinishReason.LENGTH), (FinishReason.LENGTH, FinishReason.LENGTH))
    of = [replace(one, finish_reasons=both) for one, both in zip(samples(2), reasons, strict=True)]
    labels = aggregate(of, [judgement(of[0], "right"), judgement(of[1])])
    assert [(pair.chosen_finish_reason, pair.rejected_finish_reason) for pair in labels.pairs] == [
        ("length", "stop"),
        ("length", "length"),
    ]


def test_ties_and_skips_label_nothing() -> None:
    of = samples(3)
    labels = aggregate(of, [judgement(of[0], "tie"), judgement(of[1], "skip")])
    assert (labels.pairs, labels.even) == ([], 1)


def test_answers_that_were_compared_through_others_are_labelled_too_and_no_others() -> None:
    chain = sample("chain", "a", "b", "c", "d")
    labels = aggregate([chain], [judgement(chain, left=0, right=1), judgement(chain, left=1, right=2)])
    assert [(label.chosen, label.rejected) for label in labels.pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    first, both, second = (math.log(label.probability / (1 - label.probability)) for label in labels.pairs)
    assert both == pytest.approx(first + second) and first == pytest.approx(second)
    apart = aggregate([chain], [judgement(chain, left=0, right=1), judgement(chain, left=3, right=2)])
    assert [(label.chosen, label.rejected) for label in apart.pairs] == [("a", "b"), ("d", "c")]
    assert apart.pairs[0].probability == pytest.approx(0.81945, abs=1e-5)
    circle = aggregate([chain], [judgement(chain, left=a, right=b) for a, b in ((0, 1), (1, 2), (2, 0))])
    assert (circle.pairs, circle.even) == ([], 3)


def test_answers_with_the_same_text_are_one_player() -> None:
    of = sample("p", "x", "x ", "y")
    labels = aggregate([of], [judgement(of, left=0, right=2), judgement(of, "right", left=2, right=1)])
    assert [(label.chosen, label.rejected) for label in labels.pairs] == [("x", "y")]
    x = math.exp(labels.pairs[0].reward_chosen)
    assert x**3 - x**2 - 3 * x - 5 == pytest.approx(0, abs=1e-9)  # two games, as above


def test_the_probability_is_that_of_the_rewards() -> None:
    of = sample("p", *"abcde")
    verdicts = itertools.cycle(["left", "right", "tie", "left"])
    said = [
        judgement(of, next(verdicts), left, right, annotator)
        for annotator in ("ann", "ben", "cat")
        for left, right in itertools.combinations(range(5), 2)
    ]
    labels = aggregate([of], said, prior=0.5)
    assert len(labels.pairs) + labels.even == 10
    for label in labels.pairs:
        margin = label.reward_chosen - label.reward_rejected
        assert label.probability == pytest.approx(1 / (1 + math.exp(-margin))) and label.probability > 0.5


CONVERSATION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where do ants live?"}]
DIALOGUE = "\n\nHuman: Where do ants live?\n\nAssistant:"


def labelled(prompt: Any) -> LabelledPair:
    return LabelledPair("0" * 32, prompt, " In colonies.", " On the moon.", 0.8, 0.7, -0.7, "human", "ann, Bén\udc80")


def test_a_row_of_labels_is_a_row_of_pairs() -> None:
    question = Message("user", "Where do ants live?")
    for prompt, messages, text in (
        ("Where do ants live?", (question,), "Where do ants live?"),
        (CONVERSATION, (Message("system", "Be brief."), question), f"Be brief.{DIALOGUE}"),
        (DIALOGUE, (question,), DIALOGUE),
    ):
        (pair,) = pairs_of(json.loads(json.dumps(label_row(labelled(prompt)))), "auto")
        assert (pair.messages, pair.prompt_text) == (messages, text)
        assert (pair.chosen.strip(), pair.rejected.strip()) == ("In colonies.", "On the moon.")
    assert list(label_row(labelled("p"))) == [
        "prompt", "chosen", "rejected", "chosen_finish_reason", "rejected_finish_reason",
        "probability", "reward_chosen", "reward_rejected", "by", "judge", "sample",
    ]  # fmt: skip


def test_dpo_train_reads_what_is_written(command: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    write_labels(path, [labelled(prompt) for prompt in ("Where do ants live?", CONVERSATION, DIALOGUE)])
    ended = command("dpo-train", *tiny_words(path, tmp_path / "run"), "data.eval_fraction=0", "max_steps=1")
    assert ended.code == 0, ended.err
    assert "3 pairs" in ended.out
    with pytest.raises(StorageError, match="cannot be written"):
        write_labels(tmp_path / "none" / "labels.jsonl", [])


# Annotators


def test_agreement_is_by_the_answers_not_by_the_sides() -> None:
    of = samples(6)
    ann = [judgement(one) for one in of[:2]]  # the first answers, left
    ann += [judgement(of[2], left=1, right=0), judgement(of[3], left=1, right=0)]  # the second ones
    ben = [judgement(one, "right", left=1, right=0, annotator="ben") for one in of[:3]]  # the first answers
    ben += [judgement(of[3], "right", annotator="ben")]  # the second
    ann += [judgement(of[4], "skip"), judgement(of[5])]
    ben += [judgement(of[4], annotator="ben")]
    assert agreement_table(ann, ben).tolist() == [[2, 0, 0], [1, 1, 0], [0, 0, 0]]
    ((first, second, kappa),) = agreements([*ben, *ann])
    # Agreed on 3 of 4; by chance 1/2 3/4 + 1/2 1/4 = 1/2. So (3/4 - 1/2) / (1 - 1/2).
    assert (first, second, kappa.n) == ("ann", "ben", 4) and kappa.mean == pytest.approx(0.5)
    assert kappa.low < 0.5 < kappa.high


def test_a_side_is_told_as_preferred_where_chance_would_do_so_once_in_a_hundred_or_less() -> None:
    def said(left: int, right: int) -> AnnotatorStats:
        return AnnotatorStats(left, right, ties=5, skipped=0, median_seconds=None)

    # Of 2^20 ways 20 coins can fall, 1 + 20 + 190 + 1140 = 1351 have 17 heads or more, and 4845 have 16.
    assert said(17, 3).side_p_value == 2 * 1351 / 2**20 and said(17, 3).is_biased and said(3, 17).is_biased
    assert said(4, 16).side_p_value == 2 * (1351 + 4845) / 2**20 and not said(4, 16).is_biased
    assert said(19, 0).side_p_value == 2 / 2**19 and not said(19, 0).is_biased  # too few to say
    assert said(0, 0).side_p_value == said(10, 10).side_p_value == 1.0
    assert said(10_000, 20_000).is_biased


def test_the_median_is_over_judgements_not_skips() -> None:
    of = samples(1)[0]
    made = [judgement(of, verdict, seconds=seconds) for verdict, seconds in
            (("left", 1.0), ("tie", 5.0), ("right", 3.0), ("skip", 90.0))]  # fmt: skip
    assert annotator_stats(made) == AnnotatorStats(left=1, right=1, ties=1, skipped=1, median_seconds=3.0)
    assert annotator_stats(made).judged == 3 and annotator_stats([]).median_seconds is None


def test_a_log_that_leaves_no_question_needs_no_terminal_and_says_what_there_is(tmp_path: Path) -> None:
    of = samples(22)
    path = tmp_path / "log.jsonl"
    ann = [judgement(one, seconds=4.25) for one in of[:20]] + [judgement(of[20], "tie"), judgement(of[21], "skip")]
    ben = [judgement(one, annotator="ben") for one in of[:4]]
    written_log(path, of, *ann, *ben)
    stream = io.StringIO()
    labels = annotate(of, path, " ann ", 0, Reporter(stream), samples_file=FILE)
    assert (len(labels.pairs), labels.even) == (20, 1)
    shown = [" ".join(row.split()) for row in stream.getvalue().splitlines()]
    assert shown == [
        "samples 22 in answers.jsonl",
        "questions 22",
        "annotator ann: 22 answered, 0 to go",
        "judged ties skipped to go median s",
        "this session 0 0 0 -",
        "ann, total 21 1 1 0 4.25",
        "ben, total 4 0 0 18 2",
        "ann has answered every question",
        "annotators common questions Cohen's kappa 95% interval",
        "ann and ben 4 0 -1 to 1",
        "warning: ann chose the left response 20 times of 20, although sides are random (p=1.91e-06): a position bias; "
        "read both before judging",
        "20 labelled pairs; 1 pair left out, whose probability is exactly 1/2",
    ]


def test_an_annotator_has_a_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="annotator: is empty; set annotator=NAME, which tells"):
        annotate(samples(), tmp_path / "log.jsonl", " ", 0, Reporter(io.StringIO()), samples_file=FILE)


# What is shown


def comparison(left: str, right: str, prompt: str = "Where do ants live?", **more: Any) -> Comparison:
    return Comparison(((("", prompt)),), left, right, number=3, total=40, remaining=38, annotator="ann", **more)


def screen_of(question: Comparison, top: int = 0, width: int = 80, height: int = 24, encoding: str = "utf-8") -> str:
    page = comparison_page(question, width, height, encoding)
    return "\n".join(line.text for line in frame(page, top, width, height, encoding))


def test_short_answers_stand_beside_each_other() -> None:
    assert screen_of(comparison("In colonies.", "", notice="question 2: a tie")) == "\n".join([
        "question 3 of 40, 38 to go                                                   ann",
        "─" * 80,
        "prompt",
        "Where do ants live?",
        "",
        "1 left                                 │ 2 right",
        "In colonies.                           │ (empty)",
        "question 2: a tie",
        "1 left  2 right  t tie  s skip  u undo  q quit  j/k scroll  ? help",
    ])  # fmt: skip


def test_an_answer_that_was_cut_says_so() -> None:
    for width in (80, 40):
        shown = screen_of(comparison("In colonies, mostly", "No.", left_cut=True), width=width)
        assert shown.count("(cut here)") == 1
        assert shown.index("In colonies, mostly") < shown.index("(cut here)")
    assert "(cut here)" not in screen_of(comparison("In colonies.", "No."))


def test_the_note_of_a_cut_answer_stands_below_that_answer() -> None:
    for left in (True, False):
        shown = screen_of(comparison("In colonies, mostly", "No.", left_cut=left, right_cut=not left), width=40)
        assert (shown.index("(cut here)") < shown.index("2 second")) == left


def test_on_a_narrow_terminal_one_stands_under_the_other() -> None:
    assert screen_of(comparison("In colonies, mostly under the ground, or in wood.", "No."), width=40) == "\n".join([
        "question 3 of 40, 38 to go           ann",
        "─" * 40,
        "prompt",
        "Where do ants live?",
        "",
        "1 first",
        "1 │ In colonies, mostly under the",
        "1 │ ground, or in wood.",
        "",
        "2 second",
        "2 │ No.",
        "",
        "1 first 2 second t tie s skip u q ? help",
    ])  # fmt: skip


def test_long_answers_stand_under_each_other_and_the_screen_says_that_there_is_more() -> None:
    question = comparison("ants " * 200, "more ants " * 200, notice="question 2: a tie")
    page = comparison_page(question, 80, 24)
    rows = len(page.rows)
    assert screen_of(question).endswith(
        f"more below: lines 1-20 of {rows}   question 2: a tie\n"
        "1 first  2 second  t tie  s skip  u undo  q quit  j/k scroll  ? help"
    )
    assert f"\nmore above and below: lines 2-21 of {rows}   " in screen_of(question, top=1)
    bottom = last_top(page, 24)
    assert f"\nmore above: lines {bottom + 1}-{rows} of {rows}   " in screen_of(question, top=bottom)


@given(
    text=st.text(st.sampled_from("ab \n日é\u0301\ufe0f\x1b\u202e\r\t❤"), max_size=300),
    width=st.integers(40, 130),
    height=st.integers(4, 40),
    encoding=st.sampled_from(["utf-8", "ascii", "latin-1"]),
)
def test_no_row_is_wider_than_the_screen_and_scrolling_shows_every_character(
    text: str, width: int, height: int, encoding: str
) -> None:
    question = comparison(f"<{text}>", "short")
    page = comparison_page(question, width, height, encoding)
    shown = [frame(page, top, width, height, encoding) for top in range(last_top(page, height) + 1)]
    assert all(len(lines) <= height for lines in shown)
    assert all(cell_len(line.text) <= width for lines in shown for line in lines)
    assert all(line.text.isprintable() for lines in shown for line in lines)
    for row in page.rows:
        assert any(row.text.rstrip() in (line.text for line in lines) for lines in shown)
    # All of the answer is there, in its order: put together again, but for spaces at the ends of rows.
    start = page.rows.index(next(row for row in page.rows if row.text.startswith("1 "))) + 1
    rows = [row.text for row in page.rows[start:]]
    if rows[0].startswith("1 "):
        pieces = [row[4:] for row in rows if row.startswith("1 ")]
    else:
        column = (width - 3) // 2
        pieces = [_cells(row, column) for row in rows]
    escaped = text.replace("\r\n", "\n").replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
    escaped = escaped.replace("\r", "\\r").replace("\t", "\\t").encode(encoding, "backslashreplace").decode(encoding)
    assert "".join("".join(pieces).split()) == "".join(f"<{escaped}>".split())


def _cells(row: str, cells: int) -> str:
    """The beginning of a row that is so many cells wide."""
    while cell_len(row) > cells:
        row = row[:-1]
    return row


def test_rows_break_at_spaces_and_inside_words_that_are_too_long() -> None:
    assert wrapped("one two three", 7) == ["one two", "three"]
    assert wrapped("one two three", 8) == ["one two", "three"]
    assert wrapped("    indented line", 12) == ["    indented", "line"]
    assert wrapped("abcdefghij k", 4) == ["abcd", "efgh", "ij k"]
    assert wrapped("日本語です", 4) == ["日本", "語で", "す"]
    assert wrapped("", 4) == [""]
    assert len(wrapped("word " * 40_000, 40)) == 5000


def test_text_of_others_cannot_act_on_the_screen() -> None:
    shown = screen_of(comparison("a\x1b[2Jb\rc\td", "x\r\ny\x07"), encoding="utf-8")
    assert "a\\x1b[2Jb\\rc\\td" in shown
    assert re.search(r"│ x\n.*│ y\\x07", shown)
    assert "caf\\xe9" in screen_of(comparison("café", "no"), encoding="ascii")
    assert screen_of(comparison("café", "no"), encoding="ascii").isascii()


def test_the_help_fits_one_screen_and_tells_every_key() -> None:
    page = help_page(80)
    assert last_top(page, 24) == 0 and all(cell_len(row.text) <= 80 for row in page.rows)
    assert max(cell_len(row.text) for row in help_page(40).rows) <= 40


def test_only_whole_keys_come_out_however_they_are_cut() -> None:
    typed = b"1\x1b[D\x1bOC2\x1b[6~\x1b[1;2Dt\x1b[1~\xc3\xa9j\x1b[M"
    keys = ["1", "<left>", "<right>", "2", "<page down>", "t", "<home>", "\xc3", "\xa9", "j"]
    assert KeyDecoder().feed(typed) == keys
    for cut in range(len(typed)):
        for late in (False, True):
            decoder = KeyDecoder()
            assert decoder.feed(typed[:cut]) + decoder.feed(typed[cut:], late=late) == keys, (cut, late)
    decoder = KeyDecoder()
    assert [key for byte in typed for key in decoder.feed(bytes([byte]))] == keys


def test_a_key_chooses_the_answer_on_its_side() -> None:
    for typed, action in {b"1": "left", b"\x1b[D": "left", b"2": "right", b"\x1b[C": "right"}.items():
        assert [ACTIONS[key] for key in KeyDecoder().feed(typed)] == [action]


def test_a_lone_escape_is_no_key_and_hides_none_that_comes_later() -> None:
    decoder = KeyDecoder()
    assert decoder.feed(b"\x1b") == []
    assert decoder.feed(b"1", late=True) == ["1"]
    assert decoder.feed(b"\x1b\x1b1") == []  # with Alt it is another key
    assert decoder.feed(b"1") == ["1"]
    assert decoder.feed(b"\x1b[") == []
    assert decoder.feed(b"1", late=True) == []  # it may be the rest of Home
    assert decoder.feed(b"1", late=True) == ["1"]


# The screen, in a pseudo-terminal

DRIVER = """
import os, signal, sys
# Whoever runs the tests under nohup or in the background ignores some of them, and so would we.
signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)
from pathlib import Path
from dpo_cli.console.reporter import Reporter
from dpo_cli.data.samples import read_samples
from dpo_cli.errors import DpoError
from dpo_cli.labelling.annotate import annotate, write_labels

file, log, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
reporter, code = Reporter(), 0
try:
    labels = annotate(read_samples(file), log, name, 0, reporter, samples_file=file)
    write_labels(log.with_name("labels.jsonl"), labels.pairs)
except DpoError as error:
    code = error.exit_code
    reporter.say(f"error: {error}")
reporter.close()
for number in sys.argv[4:]:  # who has asked it to stop asks again
    os.kill(os.getpid(), int(number))
os._exit(code)
"""
# The smallest shell with job control: says when the job stops, and goes on with it after a line of input.
SHELL = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
job = os.fork()
if not job:
    os.setpgid(0, 0)
    os.tcsetpgrp(0, os.getpid())
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    os.execv(sys.executable, [sys.executable, "-c", *sys.argv[1:]])
while True:
    _, status = os.waitpid(job, os.WUNTRACED)
    os.tcsetpgrp(0, os.getpgrp())
    if not os.WIFSTOPPED(status):
        os._exit(os.waitstatus_to_exitcode(status))
    print("the shell is back", flush=True)
    sys.stdin.readline()
    os.tcsetpgrp(0, job)
    os.kill(-job, signal.SIGCONT)
"""
OWN_TERMINAL = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"


class Terminal:
    """A program in a terminal of its own, what the terminal shows, and a keyboard."""

    def __init__(self, program: str, *words: object, columns: int = 80, lines: int = 24, **environment: str) -> None:
        self.ours, theirs = pty.openpty()
        self._set_size(columns, lines)
        self.before = termios.tcgetattr(theirs)
        self.screen = runpy.run_path(str(ROOT / "scripts" / "record_session.py"))["Screen"](columns, lines)
        self.raw = b""
        without = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE")
        inherited = {name: value for name, value in os.environ.items() if name not in without}
        self.child = subprocess.Popen(
            [sys.executable, "-c", OWN_TERMINAL + program, *map(str, words)],
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, cwd=ROOT,
            env={**inherited, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8", **environment},
        )  # fmt: skip
        os.close(theirs)

    def _set_size(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def resize(self, columns: int, lines: int) -> None:
        self.screen.resize(columns, lines)
        self._set_size(columns, lines)

    def press(self, keys: str) -> None:
        os.write(self.ours, keys.encode())

    def until(self, *words: str) -> str:
        """Read on until the terminal shows all of these; returns all that it shows, the rest of a frame perhaps not."""
        deadline = time.monotonic() + 120
        while not all(word in str(self.screen) for word in words):
            assert time.monotonic() < deadline, f"'{words}' is not to be seen:\n{self.screen}"
            assert self._read() or self.child.poll() is None or self._read(), f"ended without '{words}':\n{self.screen}"
        return str(self.screen)

    def _read(self) -> bool:
        if not select.select([self.ours], [], [], 0.05)[0]:
            return False
        try:
            data = os.read(self.ours, 1 << 16)
        except OSError:  # the last who had it open has ended
            return False
        self.raw += data
        self.screen.feed(data)
        return bool(data)

    def wait(self) -> int:
        """Read to the end; the exit code."""
        deadline = time.monotonic() + 120
        while self.child.poll() is None:
            assert time.monotonic() < deadline, f"still running:\n{self.screen}"
            self._read()
        while self._read():
            pass
        return self.child.returncode

    @property
    def given_back(self) -> bool:
        """Whether the terminal is as it was: its mode, its screen, its cursor."""
        same = termios.tcgetattr(self.ours)[:4] == self.before[:4]
        return same and not self.screen.alternate and not self.screen.cursor_hidden

    def close(self) -> None:
        self.child.kill()
        self.child.wait()
        if self.ours >= 0:
            os.close(self.ours)


Start = Callable[..., Terminal]


@pytest.fixture
def labelling(tmp_path: Path) -> Iterator[Start]:
    """Starts the driver on four samples; the log is log.jsonl in the test's folder."""
    file = write_jsonl(
        tmp_path / "answers.jsonl",
        [{"prompt": one.prompt, "responses": list(one.responses)} for one in samples(4)],
    )
    started: list[Terminal] = []

    def start(annotator: str = "ann", *signals: int, program: str = DRIVER, **more: Any) -> Terminal:
        words = [DRIVER] if program is SHELL else []
        started.append(Terminal(program, *words, file, tmp_path / "log.jsonl", annotator, *signals, **more))
        return started[-1]

    yield start
    for terminal in started:
        terminal.close()


def logged(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()][1:]


def winners(tmp_path: Path) -> list[str]:
    """What the log says, in words: the better answer, or the verdict."""
    texts = {one.id: one.responses for one in read_samples(tmp_path / "answers.jsonl")}
    said = []
    for record in logged(tmp_path):
        if "undo" in record:
            said.append("undo")
        else:
            index = {"left": record["left"], "right": record["right"]}.get(record["verdict"])
            said.append(record["verdict"] if index is None else texts[record["sample"]][index])
    return said


def on_the_left(shown: str) -> str:
    """The answer that the screen shows on the left."""
    (row,) = [row for row in shown.splitlines() if re.match(r"(yes|no) \d +[│|]", row)]
    return re.split(" +[│|]", row)[0]


def test_keys_judge_scroll_undo_and_end(labelling: Start, tmp_path: Path) -> None:
    terminal = labelling()
    shown = terminal.until("? help")
    assert shown.startswith("question 1 of 4, 4 to go") and terminal.screen.cursor_hidden
    first = on_the_left(shown)
    terminal.press("xZ9\x1b1\x1b[1~?")  # keys without a meaning, 1 with Alt, Home; and then help
    terminal.until("skip: no judgement", "any other key returns")
    terminal.press("1")  # returns, and judges nothing
    terminal.until("question 1 of 4")
    terminal.press("1")
    second = on_the_left(terminal.until("question 2 of 4, 3 to go", "question 1: 1 is better"))
    terminal.press("\x1b[C")  # the right arrow
    terminal.until("question 3 of 4, 2 to go")
    terminal.press("t")
    terminal.until("question 4 of 4, 1 to go")
    terminal.press("s")
    terminal.until("All 4 questions are answered.")
    terminal.press("1u")
    terminal.until("question 4 of 4", "question 4: undone")
    terminal.press("u")
    terminal.until("question 3 of 4")
    terminal.press("\x1b[D")
    fourth = on_the_left(terminal.until("question 4 of 4", "question 3: 1 is better"))
    terminal.press("1")
    terminal.until("All 4 questions are answered.")
    terminal.press("q")
    assert terminal.wait() == 0 and terminal.given_back
    said = winners(tmp_path)
    assert said[0] == first and {said[1], second} == {"yes 1", "no 1"}
    assert said[2:6] == ["tie", "skip", "undo", "undo"] and said[7] == fourth and said[6] in ("yes 2", "no 2")
    ended = " ".join(terminal.until("4 labelled pairs").split())
    assert "this session 4 0 0" in ended and "ann has answered every question" in ended
    assert len((tmp_path / "labels.jsonl").read_text().splitlines()) == 4
    assert all(record["annotator"] == "ann" and record["time"].endswith("+00:00") for record in logged(tmp_path))


def test_killed_in_the_middle_nothing_is_lost_and_nothing_asked_twice(labelling: Start, tmp_path: Path) -> None:
    killed = labelling()
    killed.until("? help")
    for number in (2, 3):
        killed.press("1")
        killed.until(f"question {number} of 4")
    killed.child.kill()
    assert killed.wait() == -signal.SIGKILL
    before = (tmp_path / "log.jsonl").read_bytes()
    with (tmp_path / "log.jsonl").open("ab") as file:  # as if it had been killed while writing
        file.write(b'{"sample": "')
    resumed = labelling()
    resumed.until("question 3 of 4, 2 to go")
    resumed.press("2")
    resumed.until("question 4 of 4, 1 to go")
    resumed.press("2")
    resumed.until("All 4 questions")
    resumed.press("q")
    assert resumed.wait() == 0
    shown = " ".join(resumed.until("4 labelled pairs").split())
    assert "line 4: is incomplete, as after a kill" in shown
    assert "2 answered, 2 to go" in shown and "this session 2 0 0" in shown and "ann, total 4 0 0 0" in shown
    assert (tmp_path / "log.jsonl").read_bytes().startswith(before)
    asked = [record["sample"] for record in logged(tmp_path)]
    assert asked == [one.id for one in samples(4)]


def test_two_annotators_share_a_log_and_only_one_at_a_time(labelling: Start, tmp_path: Path) -> None:
    first = labelling()
    first.until("? help")
    second = labelling("ben")
    assert second.wait() == 2
    assert "another process is writing it; wait for it, or name" in second.until("another output")
    first.press("1")
    first.until("question 2 of 4")
    first.press("q")
    assert first.wait() == 0
    again = labelling("ben")
    again.until("question 1 of 4, 4 to go")
    again.press("t")
    again.until("question 2 of 4")
    again.press("\x04")  # Ctrl-D: no more input
    assert again.wait() == 0
    shown = " ".join(again.until("1 labelled pair").split())
    assert "ann, total 1 0 0 3" in shown and "ben, total 1 1 0 3" in shown
    assert "ann and ben 1" in shown and "3 questions to go; to continue, run the same command" in shown


def test_what_was_typed_before_a_question_was_seen_does_not_judge_it(labelling: Start, tmp_path: Path) -> None:
    terminal = labelling()
    terminal.until("? help")
    terminal.press("1" * 50)  # a key held down: how many count depends on how soon the next question is there
    terminal.until("question 2 of 4")
    terminal.press("?")
    terminal.until("any other key returns")
    terminal.press("\x03")
    assert terminal.wait() == 130
    assert len(logged(tmp_path)) < 4


@pytest.mark.parametrize(
    ("way", "code", "says"),
    [
        ("Ctrl-C", 130, "error: stopped by Ctrl-C: every judgement is in"),
        ("SIGTERM", 75, "error: stopped by SIGTERM: every judgement is in"),
        ("SIGQUIT", 75, "error: stopped by SIGQUIT: every judgement is in"),
        ("SIGHUP", 0, "3 questions to go; to continue, run the same command"),
    ],
)
def test_whatever_stops_it_the_terminal_is_given_back(
    labelling: Start, tmp_path: Path, way: str, code: int, says: str
) -> None:
    again = [] if way == "Ctrl-C" else [int(signal.Signals[way])]
    terminal = labelling("ann", *again)
    terminal.until("? help")
    terminal.press("1")
    terminal.until("question 2 of 4")
    assert not terminal.given_back
    if way == "Ctrl-C":
        terminal.press("\x03")
    else:
        terminal.child.send_signal(signal.Signals[way])
    assert terminal.wait() == code and terminal.given_back
    assert says in terminal.until(says) and "this session" in str(terminal.screen)
    assert len(logged(tmp_path)) == 1


def test_a_closed_terminal_is_as_quit(labelling: Start, tmp_path: Path) -> None:
    terminal = labelling()
    terminal.until("? help")
    terminal.press("1")
    terminal.until("question 2 of 4")
    os.close(terminal.ours)
    terminal.ours = -1
    assert terminal.child.wait(120) == 0
    assert len(logged(tmp_path)) == 1
    assert len((tmp_path / "labels.jsonl").read_text().splitlines()) == 1


def test_a_stopped_session_gives_the_terminal_back_and_takes_it_again(labelling: Start, tmp_path: Path) -> None:
    terminal = labelling(program=SHELL)
    terminal.until("? help")
    terminal.press("1")
    terminal.until("question 2 of 4")
    terminal.press("\x1a")  # Ctrl-Z
    terminal.until("the shell is back")
    assert terminal.given_back
    terminal.press("fg\n")
    terminal.until("question 2 of 4")
    assert not terminal.given_back
    terminal.press("2")
    terminal.until("question 3 of 4")
    terminal.press("q")
    assert terminal.wait() == 0 and terminal.given_back
    assert [record["verdict"] for record in logged(tmp_path)] == ["left", "right"]


def test_it_follows_the_size_of_the_terminal(labelling: Start) -> None:
    terminal = labelling(COLUMNS="80", LINES="24")  # of the shell, and true only when it began
    terminal.until("? help")
    assert "1 left" in str(terminal.screen)
    terminal.resize(40, 10)
    terminal.until("1 first", "more below: lines 1-6 of 8", "? help")
    terminal.press("j")
    terminal.until("more above and below: lines 2-7 of 8")
    terminal.press("\x1b[6~")
    terminal.until("2 second", "more above: lines 3-8 of 8")
    terminal.resize(130, 50)
    shown = terminal.until("? help")
    assert "1 left" in shown and "more above" not in shown
    terminal.press("q")
    assert terminal.wait() == 0


@pytest.mark.parametrize("kind", ["dumb", "ascii", "no color"])
def test_odd_terminals_show_the_same_questions(labelling: Start, tmp_path: Path, kind: str) -> None:
    environment = {"dumb": {"TERM": "dumb"}, "ascii": {"PYTHONIOENCODING": "ascii"}, "no color": {"NO_COLOR": "1"}}
    terminal = labelling("Änn", **environment[kind], columns=80, lines=40)
    terminal.until("? help")
    left = on_the_left(terminal.until("question 1 of 4"))
    terminal.press("1")
    terminal.until("question 2 of 4", "\\xc4nn" if kind == "ascii" else "Änn")
    terminal.press("q")
    assert terminal.wait() == 0 and terminal.given_back
    assert winners(tmp_path) == [left]
    assert (b"\x1b" in terminal.raw) == (kind != "dumb")
    if kind == "ascii":
        assert terminal.raw.isascii() and b" | 2 right" in terminal.raw
    if kind == "no color":
        assert not re.search(rb"\x1b\[[0-9;]*[34][0-7]m", terminal.raw)


@pytest.mark.parametrize("missing", ["input", "output"])
def test_without_a_terminal_one_line_says_what_else_there_is(tmp_path: Path, missing: str) -> None:
    ours, theirs = pty.openpty()
    write_jsonl(tmp_path / "answers.jsonl", [{"prompt": "p", "responses": ["a", "b"]}])
    streams = {"stdin": subprocess.DEVNULL, "stdout": theirs} if missing == "input" else {"stdin": theirs}
    ended = subprocess.run(
        [sys.executable, "-c", DRIVER, tmp_path / "answers.jsonl", tmp_path / "log.jsonl", "ann"],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": ROOT, "check": False, **streams},
    )
    shown = ended.stdout.decode() if missing == "output" else os.read(ours, 4096).decode()
    os.close(ours)
    os.close(theirs)
    assert ended.returncode == 2 and ended.stderr == b""
    assert " ".join(shown.split()) == (
        f"error: by=human: standard {missing} is not a terminal, which it needs to show answers and read keys; run it "
        "in a terminal, or use by=reward, by=implicit or by=rule"
    )
    assert not (tmp_path / "log.jsonl").exists()
