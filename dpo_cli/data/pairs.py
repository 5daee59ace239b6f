"""From a data config to tokenized pairs, for training and held out, with a count of everything that is dropped."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from dpo_cli.config.schema import DataConfig
from dpo_cli.console.text import safe_text
from dpo_cli.data.chat_template import ChatTemplate, RefusedRowError
from dpo_cli.data.files import SourceRow, local_path, open_source
from dpo_cli.data.formats import BadRowError, PreferencePair, fields_read, pairs_of
from dpo_cli.data.groups import first_human_turn, prompt_group
from dpo_cli.data.known_forms import form_of
from dpo_cli.data.leaks import NO_LEAKS, REMEDY, Leaks, TrainedOn, pair_hash
from dpo_cli.data.mapping import RowMapping, canonical, not_used, source_of
from dpo_cli.data.report import Report, count, dropped
from dpo_cli.data.splits import SPLITS, is_held_out
from dpo_cli.data.tokens import PairEncoder, RenderedPair, TokenizedPair, token_ids
from dpo_cli.data.truncation import Truncation, truncate
from dpo_cli.errors import DataError
from dpo_cli.storage.hashing import fingerprint_of_texts

CHUNK = 512  # pairs that are encoded together
TEXTS_KEPT = 64  # training pairs whose texts stay in memory


@dataclass(frozen=True)
class TextPair:
    """A pair as text, with its row."""

    pair: PreferencePair
    index: int
    location: str  # file and line


@dataclass(frozen=True)
class PairData:
    """The tokenized pairs of a run, and their reports."""

    train: list[TokenizedPair]
    held_out: list[TokenizedPair]
    train_report: Report
    held_out_report: Report
    train_texts: list[TextPair]  # of the first pairs of `train`, to check and to show
    held_out_texts: list[TextPair]  # in the order of `held_out`
    fingerprint: str  # of every token of every training pair, in order
    trained_on: TrainedOn | None  # what leaks were looked for in

    def reports(self) -> list[tuple[str, Report]]:
        """The reports of the sides that have rows."""
        sides = [("train", self.train_report), ("held out", self.held_out_report)]
        return [(name, report) for name, report in sides if report.rows]


def content_key(pair: PreferencePair) -> str:
    """A hash of the pair's texts: the same in every file, run and process."""
    return fingerprint_of_texts(pair.prompt_text, pair.chosen, pair.rejected)


def _text_pairs(
    rows: Iterator[SourceRow], encoder: PairEncoder, config: DataConfig, limit: int | None, report: Report
) -> Iterator[tuple[TextPair, RenderedPair]]:
    mapping = RowMapping.of(config)
    for row in rows:
        if limit is not None and row.index >= limit:
            return
        report.rows += 1
        problem, reason = row.problem, "bad_row"
        if row.value is not None:
            try:
                read = canonical(row.value, mapping)
                pairs = pairs_of(read, config.format)
                rendered = [encoder.render(pair) for pair in pairs if not pair.tied]
            except BadRowError as error:
                problem = safe_text(error, limit=300)
                reason = "refused_by_template" if isinstance(error, RefusedRowError) else reason
            else:
                unused = not_used(row.value, config.columns, fields_read(read, config.format))
                if unused and not report.not_used:
                    report.not_used_form = form_of(row.value, config.columns, "; {form} reads {columns}, too")
                for name in unused:
                    count(report.not_used, name)
                if source := source_of(read, config.columns):
                    count(report.sources, source)
                report.pairs += len(pairs)
                if len(rendered) < len(pairs):
                    report.dropped["tie"] += len(pairs) - len(rendered)
                for one in rendered:
                    report.notes.update(one.pair.notes)
                    yield TextPair(one.pair, row.index, row.location), one
                continue
        if config.on_bad_row == "error":
            misread = row.value if reason == "bad_row" and row.value else {}
            form = form_of(misread, config.columns, "; {form} reads such rows")
            raise DataError(f"{row.location}: {problem}{form} (data.on_bad_row=skip counts and drops such rows)")
        report.dropped[reason] += 1


def _tokenize(
    texts: Iterator[tuple[TextPair, RenderedPair]],
    encoder: PairEncoder,
    config: DataConfig,
    report: Report,
    poll: Callable[[], None],
) -> Iterator[tuple[TokenizedPair, TextPair]]:
    for number, chunk in enumerate(iter(lambda: list(islice(texts, CHUNK)), [])):
        poll()
        if encoder.template is not None:
            _look_for_markers([text for text, _ in chunk], encoder.template, report, refuses=number == 0)
        usable = []
        for text, rendered in chunk:
            # Not the rendered text: a template may put words of its own before an answer.
            if not text.pair.chosen.strip() or not text.pair.rejected.strip():
                report.dropped["empty_response"] += 1
            elif rendered.chosen == rendered.rejected:
                report.dropped["identical"] += 1
            else:
                usable.append((text, rendered))
        for (text, _), encoded in zip(usable, encoder.encode_rendered([one for _, one in usable]), strict=True):
            tally = Truncation()
            encoded = encoded if config.prompt_truncation == "turns" else encoded.by_tokens()
            cut = truncate(encoded, config.max_length, config.max_prompt_length, tally)
            if cut is None:
                report.dropped["prompt_too_long"] += 1
            elif cut.chosen == cut.rejected:
                report.dropped["identical_after_truncation"] += 1
            else:
                report.kept += 1
                report.truncation.prompts_cut += tally.prompts_cut
                report.truncation.responses_cut += tally.responses_cut
                ids = (token_ids(cut.prompt), token_ids(cut.chosen), token_ids(cut.rejected))
                key, group = content_key(text.pair), prompt_group(text.pair.prompt)
                yield TokenizedPair(*ids, index=text.index, key=key, group=group), text


def _look_for_markers(texts: list[TextPair], template: ChatTemplate, report: Report, refuses: bool) -> None:
    """Count prompts with a chat template's marker in their text; DataError where most begin with one."""
    if refuses:
        template.refuse_rendered({text.location: text.pair.messages for text in texts}, "data.template")
    found = Counter(template.marker_in(text.pair.messages) for text in texts)
    report.notes.update(
        {f"with {safe_text(marker)}, the marker of a chat template, in the text of the prompt": number
         for marker, number in found.items() if marker is not None}
    )  # fmt: skip


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
) -> PairData:
    """Read, tokenize, truncate and split the pairs of a run.

    Held-out pairs are looked for in the training pairs; with `held_out_only` in `trained_on`, where it is known. `poll`
    is called between chunks and may raise. DataError where a row cannot be read (unless `on_bad_row=skip`), no pair is
    left, or held-out pairs were trained on (with `eval_leaks=error`).
    """
    assert config.train is not None
    train, held_out = Report(safe_text(config.train)), Report("")
    train_rows: list[tuple[TokenizedPair, TextPair]] = []
    held_rows: list[tuple[TokenizedPair, TextPair]] = []
    held_source, held_split = config.eval, config.eval_split or config.train_split
    if held_source is None and config.eval_split is not None and local_path(config.train) is None:
        held_source = config.train
    split = SPLITS[config.split_by]
    train_hashes = array("Q")

    if not (held_out_only and held_source):
        source = open_source(config.train, config.subset, config.train_split)
        train.source = source.name
        texts = _text_pairs(source.rows(), encoder, config, config.limit, train)
        for item in _tokenize(texts, encoder, config, train, poll):
            tokenized, text = item
            by_hash = held_source is None and is_held_out(
                split.shared(tokenized, text.pair), config.eval_fraction, seed
            )
            (held_rows if by_hash else train_rows).append(item)
            if not by_hash and not held_out_only:
                train_hashes.append(pair_hash(text.pair))
        if not held_out_only:
            trained_on = TrainedOn.of(train_hashes, (tokenized.group for tokenized, _ in train_rows))
        if held_source is None and config.eval_fraction > 0:
            train.kept -= len(held_rows)
            held_out_pairs, held_rows = len(held_rows), held_rows[: config.eval_limit]
            train.held_out, train.over_eval_limit = len(held_rows), held_out_pairs - len(held_rows)
            held_out = Report(
                f"{train.source} (held out by a hash of the {split.name})",
                rows=len({text.index for _, text in held_rows}),
                pairs=len(held_rows),
                kept=len(held_rows),
            )
    if held_source is not None:
        source = open_source(held_source, config.subset, held_split)
        held_out.source = source.name
        texts = _text_pairs(source.rows(), encoder, config, config.eval_limit, held_out)
        held_rows = list(_tokenize(texts, encoder, config, held_out, poll))
    if trained_on is not None:
        held_rows = _look_for_leaks(held_rows, trained_on, config, held_out)

    if not held_out_only:
        _require_pairs(train_rows, train)
    if held_source is not None or held_out_only or held_out.dropped:
        _require_pairs(held_rows, held_out)
    return PairData(
        [tokenized for tokenized, _ in train_rows],
        [tokenized for tokenized, _ in held_rows],
        train,
        held_out,
        [text for _, text in train_rows[:TEXTS_KEPT]],
        [text for _, text in held_rows],
        data_fingerprint([tokenized for tokenized, _ in train_rows]),
        trained_on,
    )


def _look_for_leaks(
    rows: list[tuple[TokenizedPair, TextPair]], trained_on: TrainedOn, config: DataConfig, report: Report
) -> list[tuple[TokenizedPair, TextPair]]:
    """Count the held-out rows that are also in training; the rows that stay, as `eval_leaks` says."""
    pairs, prompts = trained_on.find(
        [pair_hash(text.pair) for _, text in rows], [tokenized.group for tokenized, _ in rows]
    )
    report.leaks = Leaks(int(pairs.sum()), int(prompts.sum()))
    if not report.leaks or config.eval_leaks == "warn":
        return rows
    if config.eval_leaks == "error":
        text = rows[int((pairs if report.leaks.pairs else prompts).argmax())][1]
        example = f"row {text.index + 1}, {safe_text(repr(first_human_turn(text.pair.prompt).strip()), limit=80)}"
        raise DataError(f"{report.source}: also in training: {report.leaks}; for instance {example} ({REMEDY})")
    counts = {"trained_on": report.leaks.pairs, "prompt_trained_on": report.leaks.prompts}
    report.dropped.update({reason: number for reason, number in counts.items() if number})
    kept = [row for row, leaks in zip(rows, pairs | prompts, strict=True) if not leaks]
    report.kept, report.leaks = len(kept), NO_LEAKS
    return kept


def _require_pairs(rows: list[tuple[TokenizedPair, TextPair]], report: Report) -> None:
    if rows:
        return
    source = report.source or "held-out data"
    if not report.dropped:
        raise DataError(f"{source}: has no pairs; name another file, or change data.eval_fraction")
    reasons = ", ".join(dropped(reason, number) for reason, number in report.dropped.items())
    lengthy = report.dropped.keys() & {"prompt_too_long", "identical_after_truncation"}
    refused = "refused_by_template" in report.dropped
    remedy = "; raise data.max_length" if lengthy else "; choose data.template=plain" if refused else ""
    raise DataError(f"{source}: no pair can be used: {reasons}{remedy}")


def data_fingerprint(pairs: list[TokenizedPair]) -> str:
    """A hash of every token of every pair, in order."""
    digest = hashlib.sha256()
    for pair in pairs:
        for ids in (pair.prompt, pair.chosen, pair.rejected):
            digest.update(len(ids).to_bytes(4, "little") + ids.tobytes())
    return digest.hexdigest()
