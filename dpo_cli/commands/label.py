"""dpo-label: make preference pairs of samples, labelled by people or by a judge that gives rewards.

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

from dpo_cli.commands.on_ranks import on_every_rank
from dpo_cli.config.schema import LabelConfig
from dpo_cli.console.reporter import Reporter
from dpo_cli.console.text import duration, plural, safe_text, shell_word, significant
from dpo_cli.data.files import local_path
from dpo_cli.data.formats import FinishReason
from dpo_cli.data.samples import Sample, read_samples, samples_fingerprint, templates_of
from dpo_cli.data.truncation import Truncation
from dpo_cli.engine.ranks import find_place
from dpo_cli.errors import ConfigError, DataError, StoppedError
from dpo_cli.labelling.annotate import annotate, write_labels
from dpo_cli.labelling.judges import Judge, ModelJudge, describe_truncation, load_judge
from dpo_cli.labelling.labels import LabelledPair, label_row
from dpo_cli.signals import StopSignals
from dpo_cli.storage.job_log import JobLog, finish_job, is_done, job_log_path, output_path, shared_job_log

LENGTH_LIMITED = 0.1  # of the pairs: warn where so many more chosen than rejected responses have finish_reason length
PART_SIZE = 32  # samples in a line of the job log, for each rank

# Why two responses make no pair, and what that means.
REASONS = {
    "tie": "whose responses have the same reward",
    "identical": "whose responses are the same text",
    "empty_response": "with an empty response",
}


def label(config: LabelConfig, reporter: Reporter) -> Path:
    """Label the samples by a model or a rule; return the file of pairs, which is written when all are judged."""
    assert config.samples is not None and config.by is not None
    with on_every_rank(config, reporter) as (engine, reporter, signals):
        path, samples = open_samples(config.samples)
        output = output_of(config, path)
        name = config.rule if config.by == "rule" else config.judge
        assert name is not None
        judge = load_judge(name, config.by, config.layout, config.device, config.trust_remote_code, reporter, engine)
        _check_template(path, judge)
        reporter.facts([("samples", f"{len(samples):,} from {safe_text(path)}"), ("output", safe_text(output))])
        job = {
            "samples": samples_fingerprint(samples),
            "by": config.by,
            **judge.facts,
            "pairs": config.pairs,
            "labels": config.labels,
            **({"seed": config.seed} if config.labels == "sampled" else {}),
        }
        engine.alike({key: str(value) for key, value in job.items()})
        if engine.same(lambda: is_done(output, job)):
            reporter.say(f"already complete: {output}")
            return output
        started = time.perf_counter()
        with shared_job_log(engine, output, job, ("rewards", "cut"), reporter.warn) as log:
            try:
                rewards = _judge(log, samples, judge, reporter, signals, PART_SIZE * engine.world_size)
            except StoppedError as stop:
                raise type(stop)(f"{stop}; to resume, run the same command") from None
            labelling = pairs_of_rewards(samples, rewards, config, judge.name)
            if not labelling.pairs:
                reasons = ", ".join(f"{number} {reason}" for reason, number in labelling.left_out.items())
                # So that another judge or rule can use this output.
                engine.same(lambda: job_log_path(output).unlink(missing_ok=True))
                raise DataError(f"{safe_text(path)}: no two responses make a pair ({reasons})")
            facts = {"job": job, "pairs": len(labelling.pairs), "left_out": labelling.left_out}
            engine.same(lambda: finish_job(output, [label_row(pair) for pair in labelling.pairs], facts))
        lost = Truncation(*map(sum, zip(*(part["cut"] for part in log.done), strict=True)))
        _show_result(reporter, labelling, judge, lost, output, time.perf_counter() - started)
    return output


def open_samples(name: str) -> tuple[Path, list[Sample]]:
    """The file of samples and its content; DataError where it is not one."""
    path = local_path(name)
    if path is None:
        raise DataError(f"{safe_text(name)}: no such file; make samples with dpo-sample")
    return path, read_samples(path)


def output_of(config: LabelConfig, samples: Path) -> Path:
    """The file of pairs: beside the samples, unless the config names one."""
    if config.output is None:
        stem = samples.name.removesuffix(".gz").rsplit(".", 1)[0]
        return samples.with_name(f"{stem}.{config.by}.jsonl")
    output = output_path(config.output, ".jsonl")
    if output.resolve() == samples.resolve():
        raise ConfigError(f"output={safe_text(output)}: is the file of samples; name another file")
    return output


def _check_template(path: Path, judge: Judge) -> None:
    """ConfigError where the judge would read the prompts in another template than the one of the completions."""
    if not isinstance(judge, ModelJudge):
        return
    for template in sorted(templates_of(path) - {judge.encoder.kind or ""}):
        raise ConfigError(
            f"{safe_text(path)}: generated with template={safe_text(template)}, but the judge "
            f"{safe_text(judge.name)} reads template={judge.encoder.kind}; sample again with "
            f"template={judge.encoder.kind}, or use a judge trained with data.template={safe_text(template)}"
        )


def _judge(
    log: JobLog, samples: list[Sample], judge: Judge, reporter: Reporter, signals: StopSignals, part_size: int
) -> list[list[float]]:
    """The rewards of every sample's responses; those in the job log are taken from it, the others are added to it."""
    known = {str(key): value for part in log.done for key, value in part.get("rewards", {}).items()}
    waiting = [sample for sample in samples if sample.id not in known]
    if known:
        reporter.say(f"resuming: {plural(len(samples) - len(waiting), 'sample')} of {len(samples):,} done")
    reporter.start("sample", len(samples), len(samples) - len(waiting))
    for start in range(0, len(waiting), part_size):
        signals.poll()
        some = waiting[start : start + part_size]
        lost = judge.truncation.prompts_cut, judge.truncation.responses_cut
        found = judge.rewards(some, signals.poll)
        new = {sample.id: rewards for sample, rewards in zip(some, found, strict=True)}
        cut = [judge.truncation.prompts_cut - lost[0], judge.truncation.responses_cut - lost[1]]
        log.append({"rewards": new, "cut": cut})
        known |= new
        reporter.advance(len(some))
    reporter.stop()
    return [known[sample.id] for sample in samples]


@dataclass(frozen=True)
class Labelling:
    """The pairs that follow from rewards, and how many were left out, by reason."""

    pairs: tuple[LabelledPair, ...]
    left_out: dict[str, int]


def pairs_of_rewards(
    samples: Sequence[Sample], rewards: Sequence[Sequence[float]], config: LabelConfig, judge: str
) -> Labelling:
    """The pairs of every sample, the chosen response first."""
    pairs: list[LabelledPair] = []
    left_out: Counter[str] = Counter()
    for sample, scores in zip(samples, rewards, strict=True):
        for pair in _pairs_to_label(sample, scores, config):
            reason = _reason_left_out(sample, pair, scores, config)
            if reason is None:
                pairs.append(_pair(sample, pair, scores, config, judge))
            else:
                left_out[reason] += 1
    return Labelling(tuple(pairs), dict(left_out))


def _pairs_to_label(sample: Sample, scores: Sequence[float], config: LabelConfig) -> list[tuple[int, int]]:
    """Every two of the responses; with `pairs=extremes` the best and the worst of the distinct, non-empty ones."""
    indices = list(range(len(scores)))
    if config.pairs == "all":
        return list(combinations(indices, 2))
    distinct = {text.strip(): index for index, text in reversed(list(enumerate(sample.responses))) if text.strip()}
    indices = sorted(distinct.values()) if len(distinct) > 1 else indices[:2]
    best = max(indices, key=lambda index: scores[index])
    return [(best, min((index for index in indices if index != best), key=lambda index: scores[index]))]


def _reason_left_out(sample: Sample, pair: tuple[int, int], scores: Sequence[float], config: LabelConfig) -> str | None:
    """Why two responses make no pair, as a key of REASONS; None where they make one."""
    one, other = (sample.responses[index].strip() for index in pair)
    if not one or not other:
        return "empty_response"
    if one == other:
        return "identical"
    return "tie" if config.labels == "best" and scores[pair[0]] == scores[pair[1]] else None


def _pair(
    sample: Sample, pair: tuple[int, int], scores: Sequence[float], config: LabelConfig, judge: str
) -> LabelledPair:
    chosen, rejected = pair[::-1] if _second_is_chosen(sample, *pair, scores, config) else pair
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
        chosen_finish_reason=sample.finish_reason(chosen),
        rejected_finish_reason=sample.finish_reason(rejected),
        sampled=config.labels == "sampled",
    )


def _second_is_chosen(sample: Sample, first: int, second: int, scores: Sequence[float], config: LabelConfig) -> bool:
    """Whether the second response wins: by the higher reward, or sampled with the Bradley-Terry probability."""
    if config.labels == "best":
        return scores[second] > scores[first]
    low, high = min(first, second), max(first, second)
    name = hashlib.sha256(f"{sample.id} {low} {high}".encode("ascii")).digest()
    key = np.array([config.seed, int.from_bytes(name[:8], "little")], dtype=np.uint64)
    raw = np.random.Philox(key=key).random_raw(1)
    uniform = float(raw[0] >> np.uint64(11)) * 2.0**-53
    margin = min(max(scores[low] - scores[high], -700.0), 700.0)
    return (low if uniform < 1 / (1 + math.exp(-margin)) else high) == second


def _show_result(
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
    lines = [
        ("done", f"{plural(len(pairs), 'pair')} in {duration(seconds)}"),
        ("", f"mean margin {significant(sum(margins) / len(pairs))}, mean confidence {100 * sure:.0f}%"),
        ("", f"the chosen response is the longer one in {100 * longer:.0f}% of the pairs"),
    ]
    lines += [
        ("", f"left out {plural(number, 'pair')} {REASONS[reason]}") for reason, number in labelling.left_out.items()
    ]
    cut = sum(_length_limited(pairs))
    if cut:
        with_eos = not isinstance(judge, ModelJudge) or judge.objective.always_closes
        judged = "judged with" if with_eos else "judged without"
        share = f"{cut:,} of {2 * len(pairs):,} responses have finish_reason length"
        lines.append(("", f"{share}: {judged} EOS, trained on without it"))
    lines += [("", line) for line in describe_truncation(lost)]
    lines += [("pairs", str(output)), ("next", f"dpo-train data=jsonl {shell_word('data.train', output)}")]
    reporter.say()
    reporter.facts(lines)
    _warn_of_length_limit(pairs, reporter)


def _warn_of_length_limit(pairs: Sequence[LabelledPair], reporter: Reporter) -> None:
    """Warn where mostly chosen responses lack EOS: then the policy sees EOS mostly in rejected responses."""
    chosen, rejected = _length_limited(pairs)
    if chosen - rejected > LENGTH_LIMITED * len(pairs):
        reporter.warn(
            f"{chosen:,} of {len(pairs):,} chosen and {rejected:,} rejected responses have finish_reason length: a "
            "policy trained on them learns not to stop; sample again with a higher max_new_tokens"
        )


def _length_limited(pairs: Sequence[LabelledPair]) -> tuple[int, int]:
    """How many of the chosen and of the rejected responses have finish reason `length`."""
    limit = FinishReason.LENGTH
    chosen = sum(pair.chosen_finish_reason is limit for pair in pairs)
    return chosen, sum(pair.rejected_finish_reason is limit for pair in pairs)


def label_by_hand(config: LabelConfig, reporter: Reporter) -> Path:
    """Have a person judge; return the file of pairs, computed from all judgements in the log beside it."""
    assert config.samples is not None and config.annotator is not None
    if (place := find_place()) is not None and place.world_size > 1:
        raise ConfigError(f"by=human: was started as {place.world_size} processes; one asks at one keyboard")
    path, samples = open_samples(config.samples)
    output = output_of(config, path)
    log = output.with_name(f"{output.name.removesuffix('.jsonl')}.judgements.jsonl")
    if output.exists() and not log.exists():
        raise ConfigError(
            f"output={safe_text(output)}: already exists, without a log of judgements beside it; name another file"
        )

    def keep(pairs: list[LabelledPair]) -> None:
        if pairs or output.exists():  # also where all judgements were undone
            write_labels(output, pairs)

    found = annotate(
        samples, log, config.annotator, config.seed, reporter, samples_file=path, prior=config.prior, keep=keep
    )
    lines = [("judgements", str(log))]
    if found.pairs:
        lines += [("pairs", str(output)), ("next", f"dpo-train data=jsonl {shell_word('data.train', output)}")]
    reporter.facts(lines)
    _warn_of_length_limit(found.pairs, reporter)
    return output
