"""dpo-label: samples become preference pairs, by people or by a judge that gives rewards.

P(a beats b) = sigmoid(r_a - r_b), Bradley-Terry, Eq. 1 of https://arxiv.org/abs/2305.18290.
"""

import hashlib
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from dpo_cli.config.schema import LabelConfig
from dpo_cli.console.reporter import Reporter
from dpo_cli.console.text import duration, plural, safe_text, shell_word, significant
from dpo_cli.data.files import local_path
from dpo_cli.data.samples import Sample, fingerprint_of, read_samples, templates_of
from dpo_cli.data.tokens import Truncation
from dpo_cli.errors import ConfigError, DataError, StoppedError
from dpo_cli.labelling.annotate import annotate, write_labels
from dpo_cli.labelling.judges import Judge, ModelJudge, load_judge, truncation_in_words
from dpo_cli.labelling.labels import LabelledPair, label_row
from dpo_cli.signals import StopSignals
from dpo_cli.storage.job_log import Journal, finish, is_done, journal_of, opened_journal, output_path

ENDLESS = 0.1  # of the pairs: by how many more chosen than rejected answers may lack an end before it is said
AT_ONCE = 32  # samples a line of the journal

# Why two answers make no pair, with its meaning.
REASONS = {
    "tie": "whose answers have the same reward",
    "identical": "whose answers are the same text",
    "empty_response": "with an empty answer",
}


def label(config: LabelConfig, reporter: Reporter) -> Path:
    """Label the samples by a model or a rule; returns the file of pairs, which appears when all are judged."""
    assert config.samples is not None and config.by is not None
    path, samples = open_samples(config.samples)
    output = output_of(config, path)
    with StopSignals(reporter.warn) as signals:
        name = config.rule if config.by == "rule" else config.judge
        assert name is not None
        judge = load_judge(name, config.by, config.layout, config.device, config.trust_remote_code, reporter)
        _check_template(path, judge)
        reporter.facts([("samples", f"{len(samples):,} from {safe_text(path)}"), ("output", safe_text(output))])
        job = {
            "samples": fingerprint_of(samples),
            "by": config.by,
            **judge.facts,
            "pairs": config.pairs,
            "labels": config.labels,
            **({"seed": config.seed} if config.labels == "sampled" else {}),
        }
        if is_done(output, job):
            reporter.say(f"already complete: {output}")
            return output
        started = time.perf_counter()
        with opened_journal(output, job, ("rewards", "cut"), reporter.warn) as journal:
            try:
                rewards = _judge(journal, samples, judge, reporter, signals)
            except StoppedError as stop:
                raise type(stop)(f"{stop}; the same command goes on") from None
            labelling = pairs_of_rewards(samples, rewards, config, judge.name)
            if not labelling.pairs:
                reasons = ", ".join(f"{number} {reason}" for reason, number in labelling.left_out.items())
                journal_of(output).unlink(missing_ok=True)  # so that another judge or rule may try
                raise DataError(f"{safe_text(path)}: no pair could be labelled ({reasons})")
            facts = {"job": job, "pairs": len(labelling.pairs), "left_out": labelling.left_out}
            finish(journal, output, [label_row(pair) for pair in labelling.pairs], facts)
        lost = Truncation(*map(sum, zip(*(part["cut"] for part in journal.done), strict=True)))
        _tell(reporter, labelling, judge, lost, output, time.perf_counter() - started)
    return output


def open_samples(name: str) -> tuple[Path, list[Sample]]:
    """The file of samples and what is in it; DataError where it is none."""
    path = local_path(name)
    if path is None:
        raise DataError(f"{safe_text(name)}: no such file; samples are what dpo-sample writes")
    return path, read_samples(path)


def output_of(config: LabelConfig, samples: Path) -> Path:
    """Where the pairs go: beside the samples unless the config says otherwise."""
    if config.output is None:
        stem = samples.name.removesuffix(".gz").rsplit(".", 1)[0]
        return samples.with_name(f"{stem}.{config.by}.jsonl")
    output = output_path(config.output, ".jsonl")
    if output.resolve() == samples.resolve():
        raise ConfigError(f"output={safe_text(output)}: is the file of samples itself; name another")
    return output


def _check_template(path: Path, judge: Judge) -> None:
    """ConfigError where the answers were given to other prompts than the judge would read: plain text is no chat."""
    if not isinstance(judge, ModelJudge):
        return
    for template in sorted(templates_of(path) - {judge.encoder.kind or ""}):
        raise ConfigError(
            f"{safe_text(path)}: these answers were drawn with template={safe_text(template)}, and the judge "
            f"{safe_text(judge.name)} reads them as {judge.encoder.kind}; sample again with "
            f"template={judge.encoder.kind}, or take a judge trained with data.template={safe_text(template)}"
        )


def _judge(
    journal: Journal, samples: list[Sample], judge: Judge, reporter: Reporter, signals: StopSignals
) -> list[list[float]]:
    """The rewards of every sample's responses: those of the journal, and the others, which join it."""
    known = {str(key): value for part in journal.done for key, value in part.get("rewards", {}).items()}
    waiting = [sample for sample in samples if sample.id not in known]
    if known:
        reporter.say(f"going on: {plural(len(samples) - len(waiting), 'sample')} of {len(samples):,} were judged")
    reporter.start("sample", len(samples), len(samples) - len(waiting))
    for start in range(0, len(waiting), AT_ONCE):
        signals.poll()
        some = waiting[start : start + AT_ONCE]
        lost = judge.truncation.prompts_cut, judge.truncation.responses_cut
        found = judge.rewards(some, signals.poll)
        new = {sample.id: rewards for sample, rewards in zip(some, found, strict=True)}
        cut = [judge.truncation.prompts_cut - lost[0], judge.truncation.responses_cut - lost[1]]
        journal.append({"rewards": new, "cut": cut})
        known |= new
        reporter.advance(len(some))
    reporter.stop()
    return [known[sample.id] for sample in samples]


@dataclass(frozen=True)
class Labelling:
    """The pairs that rewards come to, and how many couples of answers make none, by reason."""

    pairs: tuple[LabelledPair, ...]
    left_out: dict[str, int]


def pairs_of_rewards(
    samples: Sequence[Sample], rewards: Sequence[Sequence[float]], config: LabelConfig, judge: str
) -> Labelling:
    """The pairs of every sample, the better answer first."""
    pairs: list[LabelledPair] = []
    left_out: Counter[str] = Counter()
    for sample, scores in zip(samples, rewards, strict=True):
        for couple in _couples(sample, scores, config):
            reason = _why_not(sample, couple, scores, config)
            if reason is None:
                pairs.append(_pair(sample, couple, scores, config, judge))
            else:
                left_out[reason] += 1
    return Labelling(tuple(pairs), dict(left_out))


def _couples(sample: Sample, scores: Sequence[float], config: LabelConfig) -> list[tuple[int, int]]:
    """All two of the answers, or the best and the worst of those that say something, and not the same."""
    places = list(range(len(scores)))
    if config.pairs == "all":
        return list(combinations(places, 2))
    said = {text.strip(): place for place, text in reversed(list(enumerate(sample.responses))) if text.strip()}
    places = sorted(said.values()) if len(said) > 1 else places[:2]
    best = max(places, key=lambda place: scores[place])
    return [(best, min((place for place in places if place != best), key=lambda place: scores[place]))]


def _why_not(sample: Sample, couple: tuple[int, int], scores: Sequence[float], config: LabelConfig) -> str | None:
    """Why two answers make no pair, as a word of REASONS; None where they make one."""
    one, other = (sample.responses[place].strip() for place in couple)
    if not one or not other:
        return "empty_response"
    if one == other:
        return "identical"
    return "tie" if config.labels == "best" and scores[couple[0]] == scores[couple[1]] else None


def _pair(
    sample: Sample, couple: tuple[int, int], scores: Sequence[float], config: LabelConfig, judge: str
) -> LabelledPair:
    chosen, rejected = couple[::-1] if _second_is_chosen(sample, *couple, scores, config) else couple
    margin = scores[chosen] - scores[rejected]
    return LabelledPair(
        sample=sample.id,
        prompt=sample.prompt,
        chosen=sample.responses[chosen],
        rejected=sample.responses[rejected],
        probability=1 / (1 + math.exp(-margin)) if margin > -700 else 0.0,
        reward_chosen=scores[chosen],
        reward_rejected=scores[rejected],
        by=str(config.by),
        judge=judge,
        chosen_finished=sample.is_finished(chosen),
        rejected_finished=sample.is_finished(rejected),
    )


def _second_is_chosen(sample: Sample, first: int, second: int, scores: Sequence[float], config: LabelConfig) -> bool:
    """By the higher reward; or drawn with Bradley-Terry's probability, by a number that is the pair's own."""
    if config.labels == "best":
        return scores[second] > scores[first]
    low, high = min(first, second), max(first, second)
    name = hashlib.sha256(f"{sample.id} {low} {high}".encode("ascii")).digest()
    key = np.array([config.seed, int.from_bytes(name[:8], "little")], dtype=np.uint64)
    raw = np.random.Philox(key=key).random_raw(1)
    uniform = float(raw[0] >> np.uint64(11)) * 2.0**-53
    margin = min(max(scores[low] - scores[high], -700.0), 700.0)
    return (low if uniform < 1 / (1 + math.exp(-margin)) else high) == second


def _tell(
    reporter: Reporter,
    labelling: Labelling,
    judge: Judge,
    lost: Truncation,
    output: Path,
    seconds: float,
) -> None:
    pairs = labelling.pairs
    margins = [pair.reward_chosen - pair.reward_rejected for pair in pairs]
    sure = sum(max(pair.probability, 1 - pair.probability) for pair in pairs) / len(pairs)
    longer = sum(len(pair.chosen) > len(pair.rejected) for pair in pairs) / len(pairs)
    told = [
        ("done", f"{plural(len(pairs), 'pair')} in {duration(seconds)}"),
        ("", f"mean margin {significant(sum(margins) / len(pairs))}, the judge is {100 * sure:.0f}% sure on average"),
        ("", f"the chosen answer is the longer one in {100 * longer:.0f}% of them"),
    ]
    told += [
        ("", f"left out {plural(number, 'couple')} {REASONS[reason]}") for reason, number in labelling.left_out.items()
    ]
    cut = sum(_cut_answers(pairs))
    if cut:
        open_ended = isinstance(judge, ModelJudge) and not judge.objective.always_closes
        judged = "judged and" if open_ended else "judged as if they ended there, but"
        share = f"{cut:,} of their {2 * len(pairs):,} answers were cut when drawn"
        told.append(("", f"{share}: {judged} trained on without an end"))
    told += [("", line) for line in truncation_in_words(lost)]
    told += [("pairs", str(output)), ("next", f"dpo-train data=jsonl {shell_word('data.train', output)}")]
    reporter.say()
    reporter.facts(told)
    _warn_of_endings(pairs, reporter)


def _warn_of_endings(pairs: Sequence[LabelledPair], reporter: Reporter) -> None:
    """Where the better answers are those that did not end, the only endings in the pairs are those of the worse."""
    chosen, rejected = _cut_answers(pairs)
    if chosen - rejected > ENDLESS * len(pairs):
        reporter.warn(
            f"{chosen:,} of {len(pairs):,} chosen answers were cut when drawn, and {rejected:,} of the rejected: "
            "trained on these the policy learns not to end; sample again with a higher max_new_tokens"
        )


def _cut_answers(pairs: Sequence[LabelledPair]) -> tuple[int, int]:
    """How many of the chosen and of the rejected answers were cut when drawn."""
    return sum(not pair.chosen_finished for pair in pairs), sum(not pair.rejected_finished for pair in pairs)


def label_by_hand(config: LabelConfig, reporter: Reporter) -> Path:
    """Have a person judge; returns the file of pairs, made anew from all judgements in the log beside it."""
    assert config.samples is not None and config.annotator is not None
    path, samples = open_samples(config.samples)
    output = output_of(config, path)
    log = output.with_name(f"{output.name.removesuffix('.jsonl')}.judgements.jsonl")
    if output.exists() and not log.exists():
        raise ConfigError(
            f"output={safe_text(output)}: is there already, without judgements beside it; name another file"
        )

    def keep(pairs: list[LabelledPair]) -> None:
        if pairs or output.exists():  # undone judgements leave no labels behind
            write_labels(output, pairs)

    found = annotate(
        samples, log, config.annotator, config.seed, reporter, samples_file=path, prior=config.prior, keep=keep
    )
    told = [("judgements", str(log))]
    if found.pairs:
        told += [("pairs", str(output)), ("next", f"dpo-train data=jsonl {shell_word('data.train', output)}")]
    reporter.facts(told)
    _warn_of_endings(found.pairs, reporter)
    return output
