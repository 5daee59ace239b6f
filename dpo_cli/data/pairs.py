"""From a data config to tokenized pairs, for training and held out, with a count of everything that is dropped."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dpo_cli.config.schema import DataConfig
from dpo_cli.console.text import safe_text
from dpo_cli.data.files import Source, local_path, open_source
from dpo_cli.data.groups import first_human_turn
from dpo_cli.data.leaks import NO_LEAKS, REMEDY, Leaks, TrainedOn
from dpo_cli.data.prepare import TextPair, prepare, prompts_of_rows, texts_of
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
    held_out_texts: list[TextPair]  # of the first pairs of `held_out`

    @property
    def train(self) -> TrainingPairs:
        """The training pairs."""
        assert self.training is not None
        return self.training

    def reports(self) -> list[tuple[str, Report]]:
        """The reports of the sides that have rows."""
        sides = [("train", self.train_report), ("held out", self.held_out_report)]
        return [(name, report) for name, report in sides if report.rows]


def check_sources(config: DataConfig) -> None:
    """DataError where a named file is missing or empty; called before anything large is loaded."""
    for source in (config.train, config.eval):
        path = local_path(source) if source else None
        if path is not None and path.stat().st_size == 0:
            raise DataError(f"{safe_text(source)}: the file is empty")


def load_pairs(
    config: DataConfig,
    encoder: PairEncoder,
    seed: int,
    *,
    held_out_only: bool = False,
    trained_on: TrainedOn | None = None,
    poll: Callable[[], None] = lambda: None,
    working: Callable[[str, int], Callable[[int], None]] = lambda _, __: lambda _: None,
) -> PairData:
    """The tokenized, truncated and split pairs of a run, from the cache or made and kept there.

    Held-out pairs are looked for in the training pairs; with `held_out_only` in `trained_on`, where it is known. `poll`
    is called now and then and may raise; `working` starts a progress bar and returns what advances it. DataError where
    a row cannot be read (unless `on_bad_row=skip`), no pair is left, or held-out pairs were trained on (with
    `eval_leaks=error`).
    """
    assert config.train is not None
    training, train, train_texts = None, Report(safe_text(config.train)), list[TextPair]()
    held_out, held_report, held_from = None, Report(""), None
    held_source, held_split = config.eval, config.eval_split or config.train_split
    if held_source is None and config.eval_split is not None and local_path(config.train) is None:
        held_source = config.train

    if not (held_out_only and held_source):
        source = open_source(config.train, config.subset, config.train_split)
        prepared = prepare(source, config.limit, config, encoder, poll, working)
        train = prepared.report
        split = None
        if held_source is None and config.eval_fraction > 0:
            split = Split(config.split_by, config.eval_fraction, seed, lambda: prompts_of_rows(source, config))
        training, by_hash = training_side(prepared.pairs, split, working)
        if by_hash is not None:
            assert by_hash.chosen is not None
            held_out, held_from = StoredPairs(by_hash.store, by_hash.chosen[: config.eval_limit]), source
            train.kept -= len(by_hash)
            train.held_out, train.over_eval_limit = len(held_out), len(by_hash) - len(held_out)
            held_report = Report(
                f"{train.source} (held out by a hash of the {SPLITS[config.split_by]})",
                rows=len(np.unique(held_out.numbers("index"))),
                pairs=len(held_out),
                kept=len(held_out),
            )
        if not held_out_only:
            _require_pairs(len(training), train)
            trained_on = training.trained_on
            train_texts = texts_of(source, config, training[:TEXTS_KEPT])
    if held_source is not None:
        held_from = open_source(held_source, config.subset, held_split)
        prepared = prepare(held_from, config.eval_limit, config, encoder, poll, working)
        held_out, held_report = StoredPairs(prepared.pairs), prepared.report
    if held_out is not None and held_from is not None and trained_on is not None:
        held_out = _look_for_leaks(held_out, trained_on, config, held_report, held_from)
    if held_source is not None or held_out_only or held_report.dropped:
        _require_pairs(len(held_out or ()), held_report)
    return PairData(
        None if held_out_only else training,
        held_out or (),
        train,
        held_report,
        train_texts,
        texts_of(held_from, config, held_out[:TEXTS_KEPT]) if held_out and held_from else [],
    )


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
