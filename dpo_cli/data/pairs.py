"""From a data config to tokenized pairs, for training and held out, with a count of everything that is dropped."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import numpy as np

from dpo_cli.config.schema import DataConfig
from dpo_cli.console.pace import StartBar
from dpo_cli.console.text import safe_text
from dpo_cli.data.files import Source, local_files, name_of, open_source
from dpo_cli.data.groups import first_human_turn
from dpo_cli.data.leaks import NO_LEAKS, REMEDY, Leaks, TrainedOn
from dpo_cli.data.mixture import MixedStore, Share, mix, pairs_of_weights
from dpo_cli.data.prepare import Prepared, TextPair, content_key, prepare, prompts_of_rows, texts_of
from dpo_cli.data.report import Report, dropped
from dpo_cli.data.splits import SPLITS, Split, TrainingPairs, training_side
from dpo_cli.data.store import StoredPairs
from dpo_cli.data.tokens import PairEncoder, TokenizedPair
from dpo_cli.errors import DataError

TEXTS_KEPT = 64  # pairs of each side whose texts stay in memory


@dataclass(frozen=True)
class PairData:
    """The tokenized pairs of a run, and their reports."""

    training: TrainingPairs | None  # None where only held-out pairs were asked for
    held_out: Sequence[TokenizedPair]
    train_report: Report
    held_out_report: Report
    train_texts: list[TextPair]  # of the first pairs of `train`, to check and to show
    held_out_texts: list[TextPair]  # of the first pairs of `held_out`, of each set alike where there are several
    train_parts: dict[str, Report] = field(default_factory=dict)  # by the source of a mixture
    held_out_parts: dict[str, Report] = field(default_factory=dict)  # by the name of the set, where they have names
    shares: tuple[Share, ...] = ()  # what an epoch takes of each source of a mixture

    @property
    def train(self) -> TrainingPairs:
        """The training pairs."""
        assert self.training is not None
        return self.training

    def reports(self) -> list[tuple[str, Report]]:
        """The reports of the sides that have rows; where pairs have a source, those of each source."""
        sides = [
            ("train", self.train_report, self.train_parts),
            ("held out", self.held_out_report, self.held_out_parts),
        ]
        found = [
            (f"{side} {safe_text(name)}".rstrip(), report)
            for side, whole, parts in sides
            for name, report in (parts or {"": whole}).items()
        ]
        return [(name, report) for name, report in found if report.rows]

    def facts(self) -> dict[str, Any]:
        """Where all rows went, for the manifest: of both sides, and of each source where pairs have one."""
        sides = {"train": self.train_report, "held_out": self.held_out_report}
        facts: dict[str, Any] = {side: report.as_dict() for side, report in sides.items() if report.rows}
        parts = {"train": self.train_parts, "held_out": self.held_out_parts}
        epoch = {share.source: {"pairs": share.pairs, "available": share.available} for share in self.shares}
        by_source: dict[str, Any] = {}
        for name in {**self.train_parts, **self.held_out_parts}:
            reports = {side: found[name].as_dict() for side, found in parts.items() if name in found}
            by_source[name] = {**({"epoch": epoch[name]} if name in epoch else {}), **reports}
        return {**facts, **({"by_source": by_source} if by_source else {})}

    def describe_mixture(self) -> str:
        """What an epoch takes of each source, in words; nothing where there is no mixture."""
        total = sum(share.pairs for share in self.shares)
        parts = [
            f"{safe_text(share.source)} {share.pairs:,} of {share.available:,} ({100 * share.pairs / total:.3g}%"
            + (f", each {share.pairs / share.available:.3g} times)" if share.pairs > share.available else ")")
            for share in self.shares
        ]
        return f"{total:,} pairs an epoch: {', '.join(parts)}" if parts else ""


@dataclass
class HeldOut:
    """A held-out set."""

    name: str  # of the set, or of the source that it is split off from; "" where there is one alone
    pairs: StoredPairs
    report: Report
    source: Source
    config: DataConfig
    by_hash: bool  # split off from training rows, not named by data.eval


@dataclass(frozen=True)
class OfSource:
    """What one source gives: training pairs, and held-out sets."""

    training: TrainingPairs | None  # None where only held-out pairs were asked for
    report: Report
    source: Source | None
    config: DataConfig
    held_out: list[HeldOut]


def check_sources(config: DataConfig) -> None:
    """DataError where a named file is missing or empty; called before anything large is loaded."""
    for source in config.named():
        files = local_files(source) or ()
        for file in files:
            if file.stat().st_size == 0:
                raise DataError(f"{name_of(source) if len(files) == 1 else safe_text(file)}: the file is empty")


def held_out_sets(config: DataConfig) -> dict[str, str | list[str]]:
    """The held-out sets by name: those of `data.eval`, or the `eval_split` of a hub data set. Empty without either.

    DataError where `data.train` names neither files nor a hub data set.
    """
    assert config.train is not None
    sets = config.held_out_sets()
    if sets or config.eval_split is None or local_files(config.train) is not None:
        return sets
    return {"": config.train}


@dataclass(frozen=True)
class Loader:
    """What it takes to make tokenized pairs of a source."""

    encoder: PairEncoder
    seed: int
    held_out_only: bool
    poll: Callable[[], None]
    working: StartBar

    def prepared(self, source: Source, limit: int | None, config: DataConfig) -> Prepared:
        """The tokenized pairs of the first rows."""
        return prepare(source, limit, config, self.encoder, self.poll, self.working)

    def load(self, name: str, config: DataConfig) -> OfSource:
        """Everything of one source; DataError where it has no pair to train on."""
        assert config.train is not None
        training, report, source = None, Report(name_of(config.train)), None
        held_out: list[HeldOut] = []
        sets, held_out_split = held_out_sets(config), config.eval_split or config.train_split
        splits = not sets and config.eval_fraction > 0
        if splits or not self.held_out_only:
            source = open_source(config.train, config.subset, config.train_split)
            prepared = self.prepared(source, config.limit, config)
            report, rows = prepared.report, source
            how = Split(config.split_by, config.eval_fraction, self.seed, lambda: prompts_of_rows(rows, config))
            training, by_hash = training_side(prepared.pairs, how if splits else None, self.working)
            if by_hash is not None:
                assert by_hash.chosen is not None
                pairs = StoredPairs(by_hash.store, by_hash.chosen[: config.eval_limit])
                report.kept -= len(by_hash)
                report.held_out, report.over_eval_limit = len(pairs), len(by_hash) - len(pairs)
                of_pairs = Report(
                    f"{report.source} (held out by a hash of the {SPLITS[config.split_by]})",
                    rows=len(np.unique(pairs.numbers("index"))),
                    pairs=len(pairs),
                    kept=len(pairs),
                )
                held_out.append(HeldOut(name, pairs, of_pairs, source, config, by_hash=True))
            if not self.held_out_only:
                _require_pairs(len(training), report)
        for one, files in sets.items():
            its_source = open_source(files, config.subset, held_out_split)
            prepared = self.prepared(its_source, config.eval_limit, config)
            whole = StoredPairs(prepared.pairs)
            held_out.append(HeldOut(one or name, whole, prepared.report, its_source, config, by_hash=False))
        return OfSource(training, report, source, config, held_out)


def load_pairs(
    config: DataConfig,
    encoder: PairEncoder,
    seed: int,
    *,
    held_out_only: bool = False,
    trained_on: TrainedOn | None = None,
    poll: Callable[[], None] = lambda: None,
    working: StartBar = lambda _, __: lambda _: None,
) -> PairData:
    """The tokenized, truncated and split pairs of a run, from the cache or made and kept there.

    Held-out pairs are looked for in the training pairs; with `held_out_only` in `trained_on`, where it is known. `poll`
    is called now and then and may raise; `working` starts a progress bar and returns what advances it. DataError where
    a row cannot be read (unless `on_bad_row=skip`), no pair is left, or held-out pairs were trained on (with
    `eval_leaks=error`).
    """
    found, held_out = _load_sources(config, Loader(encoder, seed, held_out_only, poll, working))
    training, shares = None, tuple[Share, ...]()
    if not held_out_only:
        training, shares = _mixed(config, found, seed, working)
        trained_on = training.trained_on
    for one in held_out:
        if trained_on is not None:
            one.pairs = _look_for_leaks(one.pairs, trained_on, one.config, one.report, one.source)
        if not one.by_hash or one.report.dropped:
            _require_pairs(len(one.pairs), one.report)
    named = {one.name: one.report for one in held_out if one.name}
    held_out_report = _sum(named) if named else held_out[0].report if held_out else Report("")
    if held_out_only:
        _require_pairs(sum(len(one.pairs) for one in held_out), held_out_report)
    reports = {name: one.report for name, one in found.items() if name}
    return PairData(
        training=training,
        held_out=_together(held_out),
        train_report=_sum(reports) if reports else found[""].report if found else Report(""),
        held_out_report=held_out_report,
        train_texts=_first_texts(training, found) if training is not None else [],
        held_out_texts=_some_texts(held_out),
        train_parts=reports,
        held_out_parts=named,
        shares=shares,
    )


def _load_sources(config: DataConfig, loader: Loader) -> tuple[dict[str, OfSource], list[HeldOut]]:
    """What each source gives, by its name, and all held-out sets; a name is "" where there is no mixture."""
    if not config.sources or config.eval is None:
        found = {name: loader.load(name, part) for name, part in config.parts().items()}
        return found, [one for of_source in found.values() for one in of_source.held_out]
    # data.eval takes the place of what the sources hold out.
    parts = {} if loader.held_out_only else config.parts()
    without = {name: replace(part, eval=None, eval_split=None, eval_fraction=0.0) for name, part in parts.items()}
    of_whole = replace(config, train=next(iter(config.held_out_sets().values())), sources={}, stop="first")
    found = {name: loader.load(name, part) for name, part in without.items()}
    return found, replace(loader, held_out_only=True).load("", of_whole).held_out


def _mixed(
    config: DataConfig, found: dict[str, OfSource], seed: int, working: StartBar
) -> tuple[TrainingPairs, tuple[Share, ...]]:
    """The training pairs of all sources together, and the share of each; no shares where there is no mixture."""
    sides = {name: one.training for name, one in found.items() if one.training is not None}
    if "" in sides:
        return sides[""], ()
    shares = _shares(config, {name: len(side) for name, side in sides.items()})
    return mix(sides, {share.source: share.pairs for share in shares}, seed, working), shares


def _shares(config: DataConfig, available: dict[str, int]) -> tuple[Share, ...]:
    """Pairs of each source in an epoch; DataError for a source that gives none, or fewer than it is to give."""
    pairs = {name: source.pairs for name, source in config.sources.items() if source.pairs is not None}
    if not pairs:
        weights = {name: source.weight for name, source in config.sources.items()}
        pairs = pairs_of_weights(weights, available, config.stop)
    for name, number in pairs.items():
        if number == 0:
            raise DataError(
                f"data.sources.{name}.weight={config.sources[name].weight:g}: gives none of {sum(pairs.values()):,} "
                "pairs an epoch; raise it, or leave the source out"
            )
        if number > available[name] and config.stop == "first":
            raise DataError(
                f"data.sources.{name}.pairs={number}: it has {available[name]:,} training pairs; take fewer, or repeat "
                "them with data.stop=all"
            )
    return tuple(Share(name, pairs[name], available[name]) for name in config.sources)


def _together(held_out: list[HeldOut]) -> Sequence[TokenizedPair]:
    """The held-out pairs of all sets; where sets have names, each pair with the name of its set."""
    sets = [one for one in held_out if len(one.pairs)]
    if not sets or not sets[0].name:
        return sets[0].pairs if sets else ()
    return StoredPairs(MixedStore(sets[0].pairs.store.folder, [(one.name, one.pairs) for one in sets]))


def _sum(reports: dict[str, Report]) -> Report:
    """The counts of several sources as one report."""
    total = Report("+".join(reports))
    for report in reports.values():
        total.add(report)
    leaks = [report.leaks for report in reports.values() if report.leaks is not None]
    total.leaks = Leaks(sum(one.pairs for one in leaks), sum(one.prompts for one in leaks)) if leaks else None
    return total


def _first_texts(training: TrainingPairs, found: dict[str, OfSource]) -> list[TextPair]:
    """The texts of the first training pairs, in their order."""
    first = training[:TEXTS_KEPT]
    if "" in found:
        return _texts_of(found[""], first)
    texts = {
        (name, text.index, content_key(text.pair)): text
        for name, one in found.items()
        for text in _texts_of(one, [pair for pair in first if pair.source == name])
    }
    return [texts[pair.source, pair.index, pair.key] for pair in first]


def _texts_of(one: OfSource, pairs: list[TokenizedPair]) -> list[TextPair]:
    assert one.source is not None
    return texts_of(one.source, one.config, pairs)


def _some_texts(held_out: list[HeldOut]) -> list[TextPair]:
    """The texts of the first held-out pairs, taken in turns from each set."""
    sets = [one for one in held_out if len(one.pairs)]
    each = [texts_of(one.source, one.config, one.pairs[: TEXTS_KEPT // len(sets)]) for one in sets]
    return [text for texts in zip_longest(*each) for text in texts if text is not None]


def _look_for_leaks(
    pairs: StoredPairs, trained_on: TrainedOn, config: DataConfig, report: Report, source: Source
) -> StoredPairs:
    """Count the held-out pairs that are also in training; the pairs that stay, as `eval_leaks` says."""
    same, prompts = trained_on.find(pairs.numbers("hash"), pairs.numbers("group"))
    report.leaks = Leaks(int(same.sum()), int(prompts.sum()))
    if not report.leaks or config.eval_leaks == "warn":
        return pairs
    if config.eval_leaks == "error":
        place = int((same if report.leaks.pairs else prompts).argmax())
        (text,) = texts_of(source, config, pairs[place : place + 1])
        example = f"row {text.index + 1}, {safe_text(repr(first_human_turn(text.pair.prompt).strip()), limit=80)}"
        raise DataError(f"{report.source}: also in training: {report.leaks}; for instance {example} ({REMEDY})")
    counts = {"trained_on": report.leaks.pairs, "prompt_trained_on": report.leaks.prompts}
    report.dropped.update({reason: number for reason, number in counts.items() if number})
    stay = np.flatnonzero(~(same | prompts))
    report.kept, report.leaks = len(stay), NO_LEAKS
    return StoredPairs(pairs.store, stay if pairs.chosen is None else pairs.chosen[stay])


def _require_pairs(number: int, report: Report) -> None:
    if number:
        return
    source = report.source or "held-out data"
    if not report.dropped:
        raise DataError(f"{source}: has no pairs; name another file, or change data.eval_fraction")
    reasons = ", ".join(dropped(reason, number) for reason, number in report.dropped.items())
    lengthy = report.dropped.keys() & {"prompt_too_long", "identical_after_truncation"}
    refused = "refused_by_template" in report.dropped
    remedy = "; raise data.max_length" if lengthy else "; choose data.template=plain" if refused else ""
    raise DataError(f"{source}: no pair can be used: {reasons}{remedy}")
