"""Labelling by hand: a person judges pairs of responses, and the judgements become labelled pairs.

One idea to keep in mind: every judgement is in the log on disk before the next question. Labels, agreement and biases
are computed from the log alone, so they are the same whenever they are computed.
"""

import functools
import hashlib
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from dpo_cli.console.reporter import Reporter
from dpo_cli.console.text import plural, safe_text, significant
from dpo_cli.data.formats import FinishReason
from dpo_cli.data.samples import Sample
from dpo_cli.errors import ConfigError, StoppedError, StorageError
from dpo_cli.labelling.agreement import cohen_kappa
from dpo_cli.labelling.judgements import Judgement, JudgementLog, open_judgement_log
from dpo_cli.labelling.labels import LabelledPair, label_row
from dpo_cli.labelling.screen import CompareScreen, Comparison, require_terminal
from dpo_cli.storage.durable import write_whole
from dpo_cli.theory.bradley_terry import fit
from dpo_cli.theory.statistics import Estimate

BIAS_FROM = 20  # judgements that are not ties; fewer can hardly show a bias
BIAS_LEVEL = 0.01
EVEN = 1e-9  # a probability within this of 1/2 is 1/2, up to rounding
VERDICT_TEXT = {"left": "1 is better", "right": "2 is better", "tie": "a tie", "skip": "skipped"}


# Questions


@dataclass(frozen=True)
class Question:
    """Two responses of a sample to compare, as indices, the lower first."""

    sample: Sample
    pair: tuple[int, int]


@dataclass(frozen=True)
class Questions:
    """The questions in the order of the file, and how many pairs of responses are not asked."""

    asked: tuple[Question, ...]
    identical: int
    empty: int  # one response or both: no pair to train on
    repeated: int  # the same two texts as another pair of the sample

    def __str__(self) -> str:
        kinds = (
            (self.identical, "with identical responses"),
            (self.empty, "with an empty response"),
            (self.repeated, "that repeat another"),
        )
        left_out = ", ".join(f"{number:,} {words}" for number, words in kinds if number)
        return f"{len(self.asked):,}" + (f"; not asked: {left_out}" if left_out else "")


def questions_of(samples: Sequence[Sample]) -> Questions:
    """A question for every two distinct, non-empty responses of every sample, each two texts once."""
    asked: list[Question] = []
    left_out: Counter[str] = Counter()
    for sample in samples:
        same = first_identical(sample)
        for first, second in combinations(range(len(sample.responses)), 2):
            if not sample.responses[first].strip() or not sample.responses[second].strip():
                left_out["empty"] += 1
            elif same[first] == same[second]:
                left_out["identical"] += 1
            elif (same[first], same[second]) != (first, second):
                left_out["repeated"] += 1
            else:
                asked.append(Question(sample, (first, second)))
    return Questions(tuple(asked), left_out["identical"], left_out["empty"], left_out["repeated"])


def first_identical(sample: Sample) -> list[int]:
    """For each response the index of the first that is equal up to surrounding white space."""
    first: dict[str, int] = {}
    return [first.setdefault(text.strip(), index) for index, text in enumerate(sample.responses)]


def sides(question: Question, annotator: str, seed: int) -> tuple[int, int]:
    """The left and the right response: by a hash, so the same on resume and different between annotators."""
    text = json.dumps([seed, annotator, question.sample.id, *question.pair])
    first, second = question.pair
    return (second, first) if hashlib.sha256(text.encode("ascii")).digest()[0] & 1 else (first, second)


def unanswered(annotator: str, questions: Sequence[Question], judgements: Iterable[Judgement]) -> list[Question]:
    """The questions that the annotator has neither answered nor skipped, in order."""
    answered = {(judgement.sample, judgement.pair) for judgement in judgements if judgement.annotator == annotator}
    return [question for question in questions if (question.sample.id, question.pair) not in answered]


# The session


@dataclass(frozen=True)
class Aggregate:
    """The labels that follow from the judgements, and how many pairs of responses are undecided."""

    pairs: list[LabelledPair]
    even: int  # with a probability of exactly 1/2


def annotate(
    samples: Sequence[Sample],
    log: Path,
    annotator: str,
    seed: int,
    reporter: Reporter,
    *,
    samples_file: Path,
    prior: float = 1.0,
    keep: Callable[[list[LabelledPair]], None] = lambda _: None,
) -> Aggregate:
    """Ask the annotator every unanswered question; return the labels that follow from all judgements in the log.

    `keep` is called with the labels while the log is still locked. StoppedError on a signal, InterruptedByUserError on
    Ctrl-C; every judgement is on disk then.
    """
    annotator = annotator.strip()
    if not annotator:
        raise ConfigError("annotator: is empty; set annotator=NAME, which tells the judgements of several people apart")
    questions = questions_of(samples)
    if questions.asked and not log.exists():
        require_terminal()  # before a log is created
    with open_judgement_log(log, samples, samples_file, reporter.warn) as judgements:
        done = len(questions.asked) - len(unanswered(annotator, questions.asked, judgements.judgements))
        reporter.facts(
            [
                ("samples", f"{len(samples):,} in {samples_file}"),
                ("questions", str(questions)),
                ("annotator", f"{annotator}: {done:,} answered, {len(questions.asked) - done:,} to go"),
            ]
        )
        new: list[Judgement] = []
        try:
            if done < len(questions.asked):
                with CompareScreen(reporter.console) as screen:
                    _judge(questions.asked, judgements, annotator, seed, screen, new)
        except StoppedError as stopped:
            _show_session(new, questions, judgements.judgements, annotator, reporter)
            raise type(stopped)(
                f"{stopped}: every judgement is in {safe_text(log)}; to resume, run the same command"
            ) from None
        _show_session(new, questions, judgements.judgements, annotator, reporter)
        _show_annotators(judgements.judgements, reporter)
        labels = aggregate(samples, judgements.judgements, prior)
        reporter.say(labels_line(labels))
        keep(labels.pairs)
    return labels


def _judge(
    questions: Sequence[Question],
    log: JudgementLog,
    annotator: str,
    seed: int,
    screen: CompareScreen,
    new: list[Judgement],
) -> None:
    """Ask until nothing is left or the annotator quits; every judgement is in the log before the next question."""
    numbers = {(question.sample.id, question.pair): number for number, question in enumerate(questions, start=1)}
    notice = ""
    while True:
        waiting = unanswered(annotator, questions, log.judgements)
        if waiting:
            question = waiting[0]
            left, right = sides(question, annotator, seed)
            choice = screen.ask(
                Comparison(
                    prompt=_turns(question.sample),
                    left=question.sample.responses[left],
                    right=question.sample.responses[right],
                    number=numbers[question.sample.id, question.pair],
                    total=len(questions),
                    remaining=len(waiting),
                    annotator=annotator,
                    notice=notice,
                    left_cut=question.sample.finish_reason(left) is FinishReason.LENGTH,
                    right_cut=question.sample.finish_reason(right) is FinishReason.LENGTH,
                )
            )
            action = choice.action
        else:
            action = screen.end(f"All {plural(len(questions), 'question')} are answered.")
        if action == "quit":
            return
        if action == "undo":
            undone = log.undo(annotator, _now())
            new[:] = [judgement for judgement in new if judgement is not undone]
            notice = "nothing to undo"
            if undone is not None:
                # A log edited by hand may have a pair that is not a question.
                notice = f"question {numbers.get((undone.sample, undone.pair), '?')}: undone"
            continue
        seconds = round(choice.seconds, 2)
        judgement = Judgement(question.sample.id, left, right, action, annotator, _now(), seconds)
        log.append(judgement)
        new.append(judgement)
        notice = f"question {numbers[judgement.sample, judgement.pair]:,}: {VERDICT_TEXT[action]}"


def _turns(sample: Sample) -> tuple[tuple[str, str], ...]:
    """The prompt as (speaker, text): text as in the file, without speaker; messages with their roles."""
    if isinstance(sample.prompt, str):
        return (("", sample.prompt.strip("\n")),)
    turns = sample.read.messages
    return tuple((turn.role if len(turns) > 1 else "", turn.content) for turn in turns)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# Labels


def aggregate(samples: Sequence[Sample], judgements: Iterable[Judgement], prior: float = 1.0) -> Aggregate:
    """One label for every two responses that judgements compare, directly or through others.

    A Bradley-Terry fit for each prompt: responses are players, judgements are games, a tie is half a win for both.
    `prior` ties with an average player keep the probability of a single judgement below 1.
    """
    games: dict[str, list[Judgement]] = {}
    for judgement in judgements:
        if judgement.verdict != "skip":
            games.setdefault(judgement.sample, []).append(judgement)
    pairs: list[LabelledPair] = []
    even = 0
    for sample in samples:
        played = games.get(sample.id, [])
        for players, wins in _tables(sample, played):
            judges = ", ".join(sorted({game.annotator for game in played}))
            rewards, probabilities = _fitted(wins, prior)
            for first, second in combinations(range(len(players)), 2):
                if abs(probabilities[first][second] - 0.5) < EVEN:
                    even += 1
                    continue
                better, worse = (first, second) if rewards[first] > rewards[second] else (second, first)
                pairs.append(
                    LabelledPair(
                        sample=sample.id,
                        prompt=sample.prompt,
                        chosen=sample.responses[players[better]],
                        rejected=sample.responses[players[worse]],
                        probability=probabilities[better][worse],
                        reward_chosen=rewards[better],
                        reward_rejected=rewards[worse],
                        by="human",
                        judge=judges,
                        chosen_finish_reason=sample.finish_reason(players[better]),
                        rejected_finish_reason=sample.finish_reason(players[worse]),
                    )
                )
    return Aggregate(pairs, even)


Table = tuple[tuple[float, ...], ...]


def _tables(sample: Sample, games: Sequence[Judgement]) -> list[tuple[list[int], Table]]:
    """The responses in groups that games connect, each with its table: wins[i][j] is how often i beat j."""
    same = first_identical(sample)
    wins: Counter[tuple[int, int]] = Counter()
    groups: list[set[int]] = []
    for game in games:
        left, right = same[game.left], same[game.right]
        if left == right:
            continue
        for player, other in ((left, right), (right, left)):  # in half wins, which are exact integers
            wins[player, other] += 1 if game.winner is None else 2 * (same[game.winner] == player)
        joined = [group for group in groups if group & {left, right}]
        groups = [group for group in groups if group not in joined] + [set.union({left, right}, *joined)]
    tables = []
    for players in sorted(map(sorted, groups)):
        tables.append((players, tuple(tuple(wins[i, j] / 2 for j in players) for i in players)))
    return tables


@functools.lru_cache(maxsize=4096)
def _fitted(wins: Table, prior: float) -> tuple[list[float], list[list[float]]]:
    """Log strengths and win probabilities of a table; cached, since few different tables occur."""
    fitted = fit(torch.tensor(wins, dtype=torch.float64), prior=prior)
    return fitted.log_strengths.tolist(), fitted.win_probabilities.tolist()


def write_labels(path: Path, pairs: Iterable[LabelledPair]) -> None:
    """Write a row a pair, atomically."""
    lines = "".join(json.dumps(label_row(pair), ensure_ascii=False) + "\n" for pair in pairs)
    try:
        write_whole(path, lines.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise StorageError(f"{safe_text(path)}: cannot be written ({error.strerror})") from None


# Statistics of annotators


@dataclass(frozen=True)
class AnnotatorStats:
    """The verdicts of one annotator, by side of the screen."""

    left: int
    right: int
    ties: int
    skipped: int
    median_seconds: float | None  # of left, right and tie

    @property
    def judged(self) -> int:
        """Judgements without skips."""
        return self.left + self.right + self.ties

    @property
    def side_p_value(self) -> float:
        """The exact two-sided binomial test of left against right at 1/2."""
        number, heads = self.left + self.right, max(self.left, self.right)
        ways, tail = math.comb(number, heads), 0
        while ways:  # sums the ways to get `heads` heads or more, as exact integers
            tail += ways
            ways = ways * (number - heads) // (heads + 1)
            heads += 1
        return min(1.0, 2 * tail / (1 << number))

    @property
    def is_biased(self) -> bool:
        """Whether one side was chosen significantly more often."""
        return self.left + self.right >= BIAS_FROM and self.side_p_value < BIAS_LEVEL


def annotator_stats(judgements: Sequence[Judgement]) -> AnnotatorStats:
    """The statistics of one annotator's judgements."""
    counts = Counter(judgement.verdict for judgement in judgements)
    seconds = [judgement.seconds for judgement in judgements if judgement.verdict != "skip"]
    median = statistics.median(seconds) if seconds else None
    return AnnotatorStats(counts["left"], counts["right"], counts["tie"], counts["skip"], median)


def agreement_table(first: Sequence[Judgement], second: Sequence[Judgement]) -> Tensor:
    """How two annotators judged their common questions, (3, 3): the first response, the second, a tie.

    First and second are by the order in the file, not by the side of the screen, which differs between annotators.
    """
    theirs = {(judgement.sample, judgement.pair): judgement for judgement in second if judgement.verdict != "skip"}
    table = torch.zeros(3, 3, dtype=torch.float64)
    for judgement in first:
        other = theirs.get((judgement.sample, judgement.pair))
        if other is not None and judgement.verdict != "skip":
            table[_category(judgement), _category(other)] += 1
    return table


def _category(judgement: Judgement) -> int:
    return 2 if judgement.winner is None else judgement.pair.index(judgement.winner)


def agreements(judgements: Sequence[Judgement]) -> list[tuple[str, str, Estimate]]:
    """Cohen's kappa of every two annotators with common questions, with its interval and their number."""
    by_name = _by_annotator(judgements)
    found = []
    for first, second in combinations(by_name, 2):
        table = agreement_table(by_name[first], by_name[second])
        if float(table.sum()) > 0:
            found.append((first, second, cohen_kappa(table).kappa))
    return found


def _by_annotator(judgements: Iterable[Judgement]) -> dict[str, list[Judgement]]:
    names: dict[str, list[Judgement]] = {}
    for judgement in judgements:
        names.setdefault(judgement.annotator, []).append(judgement)
    return dict(sorted(names.items()))


# The report at the end


def _show_session(
    new: Sequence[Judgement],
    questions: Questions,
    judgements: Sequence[Judgement],
    annotator: str,
    reporter: Reporter,
) -> None:
    """Show the counts of this session, and of every annotator in total."""
    rows = [_stats_row("this session", new, "")]
    by_name = {annotator: [], **_by_annotator(judgements)}
    for name, theirs in by_name.items():
        to_go = len(unanswered(name, questions.asked, theirs))
        rows.append(_stats_row(f"{safe_text(name, limit=30)}, total", theirs, f"{to_go:,}"))
    reporter.grid(["", "judged", "ties", "skipped", "to go", "median s"], rows)
    to_go = len(unanswered(annotator, questions.asked, judgements))
    if to_go:
        reporter.say(f"{plural(to_go, 'question')} to go; to continue, run the same command")
    else:
        reporter.say(f"{annotator} has answered every question")


def _stats_row(label: str, judgements: Sequence[Judgement], to_go: str) -> list[str]:
    counts = annotator_stats(judgements)
    median = "-" if counts.median_seconds is None else significant(counts.median_seconds)
    return [label, f"{counts.judged:,}", f"{counts.ties:,}", f"{counts.skipped:,}", to_go, median]


def _show_annotators(judgements: Sequence[Judgement], reporter: Reporter) -> None:
    """Show how far annotators agree, and warn where one of them prefers a side of the screen."""
    found = agreements(judgements)
    if found:
        rows = []
        for first, second, kappa in found:
            interval = f"{significant(kappa.low)} to {significant(kappa.high)}"
            names = f"{safe_text(first, limit=30)} and {safe_text(second, limit=30)}"
            rows.append([names, f"{kappa.n:,}", significant(kappa.mean), interval])
        reporter.grid(["annotators", "common questions", "Cohen's kappa", "95% interval"], rows)
    for name, theirs in _by_annotator(judgements).items():
        counts = annotator_stats(theirs)
        if counts.is_biased:
            side, number = ("left", counts.left) if counts.left > counts.right else ("right", counts.right)
            reporter.warn(
                f"{name} chose the {side} response {number:,} times of {counts.left + counts.right:,}, although sides "
                f"are random (p={significant(counts.side_p_value)}): a position bias; read both before judging"
            )


def labels_line(labels: Aggregate) -> str:
    """`50 labelled pairs; 7 pairs left out, whose probability is exactly 1/2`."""
    words = plural(len(labels.pairs), "labelled pair")
    if labels.even:
        words += f"; {plural(labels.even, 'pair')} left out, whose probability is exactly 1/2"
    return words
