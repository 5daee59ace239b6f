"""Labelling by hand: a person judges pairs of sampled answers, and the judgements become labelled pairs.

One idea to keep in mind: the log of judgements is the truth and is on disk after every key; labels, agreement and
biases are computed from it, so that they come out the same whoever computes them, and when.
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
from dpo_cli.data.samples import Sample
from dpo_cli.errors import ConfigError, StoppedError, StorageError
from dpo_cli.labelling.agreement import cohen_kappa
from dpo_cli.labelling.judgements import Judgement, JudgementLog, opened_log
from dpo_cli.labelling.labels import LabelledPair, label_row
from dpo_cli.labelling.screen import CompareScreen, Comparison, require_terminal
from dpo_cli.storage.durable import write_whole
from dpo_cli.theory.bradley_terry import fit
from dpo_cli.theory.statistics import Estimate

BIAS_FROM = 20  # judgements for one side or the other; fewer can hardly show a bias
BIAS_LEVEL = 0.01
EVEN = 1e-9  # of a probability: nearer to 1/2 than this is 1/2, but for the rounding of the fit
SAID = {"left": "1 is better", "right": "2 is better", "tie": "a tie", "skip": "skipped"}


# What is asked


@dataclass(frozen=True)
class Question:
    """Two answers of a sample that are to be compared, as indices into its responses, the lower first."""

    sample: Sample
    pair: tuple[int, int]


@dataclass(frozen=True)
class Questions:
    """What there is to judge, in the order of the file, and how many pairs of answers need no judgement."""

    asked: tuple[Question, ...]
    identical: int
    empty: int  # one answer or both: no pair to train on
    repeated: int  # the same two texts as another pair of the sample

    def __str__(self) -> str:
        kinds = (
            (self.identical, "with identical answers"),
            (self.empty, "with an empty answer"),
            (self.repeated, "that repeat another"),
        )
        left_out = ", ".join(f"{number:,} {words}" for number, words in kinds if number)
        return f"{len(self.asked):,}" + (f"; not asked: {left_out}" if left_out else "")


def questions_of(samples: Sequence[Sample]) -> Questions:
    """Every pair of answers of every sample, but those that nobody can or need tell apart, or that make no pair."""
    asked: list[Question] = []
    left_out: Counter[str] = Counter()
    for sample in samples:
        players = first_alike(sample)
        for first, second in combinations(range(len(sample.responses)), 2):
            if not sample.responses[first].strip() or not sample.responses[second].strip():
                left_out["empty"] += 1
            elif players[first] == players[second]:
                left_out["identical"] += 1
            elif (players[first], players[second]) != (first, second):
                left_out["repeated"] += 1
            else:
                asked.append(Question(sample, (first, second)))
    return Questions(tuple(asked), left_out["identical"], left_out["empty"], left_out["repeated"])


def first_alike(sample: Sample) -> list[int]:
    """For each answer the first that is the same but for white space around it: nobody can see a difference."""
    first: dict[str, int] = {}
    return [first.setdefault(text.strip(), place) for place, text in enumerate(sample.responses)]


def sides(question: Question, annotator: str, seed: int) -> tuple[int, int]:
    """Which answer stands left and which right: by a hash, so the same on resume and another for another annotator."""
    text = json.dumps([seed, annotator, question.sample.id, *question.pair])
    first, second = question.pair
    return (second, first) if hashlib.sha256(text.encode("ascii")).digest()[0] & 1 else (first, second)


def waiting_for(annotator: str, questions: Sequence[Question], judgements: Iterable[Judgement]) -> list[Question]:
    """The questions that the annotator has not answered, skips being answers, in their order."""
    answered = {(judgement.sample, judgement.pair) for judgement in judgements if judgement.annotator == annotator}
    return [question for question in questions if (question.sample.id, question.pair) not in answered]


# The session


@dataclass(frozen=True)
class Aggregate:
    """The labels that judgements come to, and how many pairs of answers they leave undecided."""

    pairs: list[LabelledPair]
    even: int  # at exactly 1/2: ties, or as often one as the other


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
    """Put to the annotator what they have not judged; return the labels that all judgements in the log come to.

    `keep` hears of them while nobody else can add to the log.

    StoppedError where a signal ends it, InterruptedByUserError for Ctrl-C; every judgement is on disk then, too.
    """
    annotator = annotator.strip()
    if not annotator:
        raise ConfigError("annotator: needs a name, so that judgements of several people can be told apart")
    questions = questions_of(samples)
    if questions.asked and not log.exists():
        require_terminal()  # before a log is begun that nobody could go on with
    with opened_log(log, samples, samples_file, reporter.warn) as judgements:
        done = len(questions.asked) - len(waiting_for(annotator, questions.asked, judgements.judgements))
        reporter.facts(
            [
                ("samples", f"{len(samples):,} in {samples_file}"),
                ("questions", str(questions)),
                ("annotator", f"{annotator}: {done:,} answered before, {len(questions.asked) - done:,} to go"),
            ]
        )
        made: list[Judgement] = []
        try:
            if done < len(questions.asked):
                with CompareScreen(reporter.console) as screen:
                    _judge(questions.asked, judgements, annotator, seed, screen, made)
        except StoppedError as stopped:
            _show_session(made, questions, judgements.judgements, annotator, reporter)
            raise type(stopped)(
                f"{stopped}: every judgement is in {safe_text(log)}; the same command goes on"
            ) from None
        _show_session(made, questions, judgements.judgements, annotator, reporter)
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
    made: list[Judgement],
) -> None:
    """Ask until nothing is left or the annotator quits; what they say is in the log before the next question."""
    numbers = {(question.sample.id, question.pair): number for number, question in enumerate(questions, start=1)}
    notice = ""
    while True:
        waiting = waiting_for(annotator, questions, log.judgements)
        if waiting:
            question = waiting[0]
            left, right = sides(question, annotator, seed)
            answer = screen.ask(
                Comparison(
                    prompt=_turns(question.sample),
                    left=question.sample.responses[left],
                    right=question.sample.responses[right],
                    number=numbers[question.sample.id, question.pair],
                    total=len(questions),
                    remaining=len(waiting),
                    annotator=annotator,
                    notice=notice,
                    left_cut=not question.sample.is_finished(left),
                    right_cut=not question.sample.is_finished(right),
                )
            )
            action = answer.action
        else:
            action = screen.end(f"All {plural(len(questions), 'question')} are answered.")
        if action == "quit":
            return
        if action == "undo":
            taken_back = log.take_back(annotator, _now())
            made[:] = [judgement for judgement in made if judgement is not taken_back]
            notice = "nothing to undo"
            if taken_back is not None:
                # A log that was written to by hand may hold a pair that is never asked.
                notice = f"question {numbers.get((taken_back.sample, taken_back.pair), '?')}: undone"
            continue
        seconds = round(answer.seconds, 2)
        judgement = Judgement(question.sample.id, left, right, action, annotator, _now(), seconds)
        log.append(judgement)
        made.append(judgement)
        notice = f"question {numbers[judgement.sample, judgement.pair]:,}: {SAID[action]}"


def _turns(sample: Sample) -> tuple[tuple[str, str], ...]:
    """The prompt as it is read: text as it stands in the file, messages with who speaks."""
    if isinstance(sample.prompt, str):
        return (("", sample.prompt.strip("\n")),)
    turns = sample.read.messages
    return tuple((turn.role if len(turns) > 1 else "", turn.content) for turn in turns)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# Labels


def aggregate(samples: Sequence[Sample], judgements: Iterable[Judgement], prior: float = 1.0) -> Aggregate:
    """One label for every two answers that judgements compare, directly or through others.

    Each prompt's answers are the players of a Bradley-Terry model, every judgement is a game, a tie is half a win for
    both, and `prior` games drawn with an average player keep one judgement from being certainty.
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
                        chosen_finished=sample.is_finished(players[better]),
                        rejected_finished=sample.is_finished(players[worse]),
                    )
                )
    return Aggregate(pairs, even)


Table = tuple[tuple[float, ...], ...]


def _tables(sample: Sample, games: Sequence[Judgement]) -> list[tuple[list[int], Table]]:
    """The answers that games join, in groups, each with its table: wins[i][j] is how often i beat j."""
    same = first_alike(sample)
    wins: Counter[tuple[int, int]] = Counter()
    groups: list[set[int]] = []
    for game in games:
        left, right = same[game.left], same[game.right]
        if left == right:
            continue
        for player, other in ((left, right), (right, left)):  # in half wins, so that they are counted exactly
            wins[player, other] += 1 if game.winner is None else 2 * (same[game.winner] == player)
        joined = [group for group in groups if group & {left, right}]
        groups = [group for group in groups if group not in joined] + [set.union({left, right}, *joined)]
    tables = []
    for players in sorted(map(sorted, groups)):
        tables.append((players, tuple(tuple(wins[i, j] / 2 for j in players) for i in players)))
    return tables


@functools.lru_cache(maxsize=4096)
def _fitted(wins: Table, prior: float) -> tuple[list[float], list[list[float]]]:
    """Log strengths and win probabilities of a table; the same few tables come again and again."""
    fitted = fit(torch.tensor(wins, dtype=torch.float64), prior=prior)
    return fitted.log_strengths.tolist(), fitted.win_probabilities.tolist()


def write_labels(path: Path, pairs: Iterable[LabelledPair]) -> None:
    """A row a pair, the file whole or as it was."""
    lines = "".join(json.dumps(label_row(pair), ensure_ascii=False) + "\n" for pair in pairs)
    try:
        write_whole(path, lines.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise StorageError(f"{safe_text(path)}: cannot be written ({error.strerror})") from None


# What the judgements say about those who judged


@dataclass(frozen=True)
class Habit:
    """What an annotator has said, by where the answers stood."""

    left: int
    right: int
    ties: int
    skipped: int
    median_seconds: float | None  # of left, right and tie

    @property
    def judged(self) -> int:
        """Judgements, ties among them."""
        return self.left + self.right + self.ties

    @property
    def side_p_value(self) -> float:
        """How often fair coins would favour one side this much or more: the exact two-sided binomial test."""
        number, heads = self.left + self.right, max(self.left, self.right)
        ways, tail = math.comb(number, heads), 0
        while ways:  # of `heads` heads or more, counted in whole numbers
            tail += ways
            ways = ways * (number - heads) // (heads + 1)
            heads += 1
        return min(1.0, 2 * tail / (1 << number))

    @property
    def is_biased(self) -> bool:
        """Whether one side was chosen too often to be chance."""
        return self.left + self.right >= BIAS_FROM and self.side_p_value < BIAS_LEVEL


def habit(judgements: Sequence[Judgement]) -> Habit:
    """The counts of one annotator's judgements."""
    said = Counter(judgement.verdict for judgement in judgements)
    seconds = [judgement.seconds for judgement in judgements if judgement.verdict != "skip"]
    median = statistics.median(seconds) if seconds else None
    return Habit(said["left"], said["right"], said["tie"], said["skip"], median)


def agreement_table(first: Sequence[Judgement], second: Sequence[Judgement]) -> Tensor:
    """What two annotators said of the questions that both judged, (3, 3): the first answer, the second, a tie.

    By the answers' places in the file, not by the sides they stood on, which differ between annotators.
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
    """Cohen's kappa of every two annotators who judged the same questions, with its interval and their number."""
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


# What is said at the end


def _show_session(
    made: Sequence[Judgement],
    questions: Questions,
    judgements: Sequence[Judgement],
    annotator: str,
    reporter: Reporter,
) -> None:
    """What there is now: of this session, and in all, annotator by annotator."""
    rows = [_habit_row("this session", made, "")]
    by_name = {annotator: [], **_by_annotator(judgements)}
    for name, theirs in by_name.items():
        to_go = len(waiting_for(name, questions.asked, theirs))
        rows.append(_habit_row(f"{safe_text(name, limit=30)}, in all", theirs, f"{to_go:,}"))
    reporter.grid(["", "judged", "ties", "skipped", "to go", "median s"], rows)
    to_go = len(waiting_for(annotator, questions.asked, judgements))
    if to_go:
        reporter.say(f"{plural(to_go, 'question')} to go: the same command goes on with them")
    else:
        reporter.say(f"{annotator} has answered every question")


def _habit_row(label: str, judgements: Sequence[Judgement], to_go: str) -> list[str]:
    said = habit(judgements)
    median = "-" if said.median_seconds is None else significant(said.median_seconds)
    return [label, f"{said.judged:,}", f"{said.ties:,}", f"{said.skipped:,}", to_go, median]


def _show_annotators(judgements: Sequence[Judgement], reporter: Reporter) -> None:
    """How far annotators agree, and whether one of them prefers a side of the screen."""
    found = agreements(judgements)
    if found:
        rows = []
        for first, second, kappa in found:
            interval = f"{significant(kappa.low)} to {significant(kappa.high)}"
            names = f"{safe_text(first, limit=30)} and {safe_text(second, limit=30)}"
            rows.append([names, f"{kappa.n:,}", significant(kappa.mean), interval])
        reporter.grid(["annotators", "questions in common", "Cohen's kappa", "95% interval"], rows)
    for name, theirs in _by_annotator(judgements).items():
        said = habit(theirs)
        if said.is_biased:
            side, number = ("left", said.left) if said.left > said.right else ("right", said.right)
            reporter.warn(
                f"{name} chose the {side} answer {number:,} times of {said.left + said.right:,}; sides are drawn by "
                f"chance, and chance alone does so with p={significant(said.side_p_value)}: the position was judged, "
                "not the answers alone"
            )


def labels_line(labels: Aggregate) -> str:
    """`50 labelled pairs; 7 left out, at exactly 1/2: ties, or judged as often one way as the other`."""
    words = plural(len(labels.pairs), "labelled pair")
    if labels.even:
        words += f"; {labels.even:,} left out, at exactly 1/2: ties, or judged as often one way as the other"
    return words
