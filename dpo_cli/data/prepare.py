"""From the rows of a source to tokenized pairs on disk, by several processes; done once for the same rows and choices.

Each process takes a part's rows, judges them, renders, encodes and cuts them, and writes the part. What is counted on
the way is kept in the part, so that a later run says the same.
"""

import gc
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import chain, islice, takewhile
from json import dumps, loads
from multiprocessing.connection import wait as wait_for_end
from pathlib import Path
from typing import Any

from dpo_cli.config.schema import DataConfig
from dpo_cli.console.pace import StartBar
from dpo_cli.console.text import plural, safe_text
from dpo_cli.data.chat_template import ChatTemplate, RefusedRowError
from dpo_cli.data.files import Source, SourceRow
from dpo_cli.data.formats import SOFT_LABEL, TIE_KEPT, BadRowError, PreferencePair, Row, fields_read, pairs_of
from dpo_cli.data.groups import prompt_group
from dpo_cli.data.known_forms import form_of
from dpo_cli.data.leaks import pair_hash
from dpo_cli.data.mapping import RowMapping, canonical, not_used, source_of
from dpo_cli.data.report import OF_ROWS, Report, count
from dpo_cli.data.store import COMPLETE, PairStore, Part, StoreGoneError, mapped, part_bytes, part_name
from dpo_cli.data.tokens import PairEncoder, RenderedPair, TokenizedPair, token_ids
from dpo_cli.data.truncation import Truncation, truncate
from dpo_cli.errors import DataError, OutOfMemoryError, StorageError
from dpo_cli.signals import left_to_this_process
from dpo_cli.storage.cache_folder import cache_folder, filling, touch
from dpo_cli.storage.durable import write_whole
from dpo_cli.storage.hashing import fingerprint, fingerprint_of_texts

VERSION = 1  # of what is stored; another number is another folder
PART = 2048  # rows
FEW = 8  # parts
CHUNK = 512  # pairs that are encoded together
# What decides no token: where rows are from is in the source's identity, the rest acts on tokenized pairs.
NO_MATTER = (
    "train", "eval", "subset", "train_split", "eval_split", "eval_fraction", "split_by", "eval_leaks", "eval_limit",
    "shuffle", "processes", "max_bad_fraction", "cache_gib", "sources", "stop",
)  # fmt: skip


@dataclass(frozen=True)
class TextPair:
    """A pair as text, with its row."""

    pair: PreferencePair
    index: int
    location: str  # file and line


@dataclass(frozen=True)
class Prepared:
    """The tokenized pairs of a source, and where its rows went."""

    pairs: PairStore
    report: Report


@dataclass(frozen=True)
class Work:
    """What a process needs to tokenize rows."""

    config: DataConfig
    encoder: PairEncoder
    folder: Path


def content_key(pair: PreferencePair) -> str:
    """A hash of the pair's texts: the same in every file, run and process."""
    return fingerprint_of_texts(pair.prompt_text, pair.chosen, pair.rejected)


# Rows to tokenized pairs


def _text_pairs(
    rows: Iterable[SourceRow], encoder: PairEncoder, config: DataConfig, report: Report
) -> Iterator[tuple[TextPair, RenderedPair]]:
    mapping = RowMapping.of(config)
    for row in rows:
        report.rows += 1
        problem, reason = row.problem, "bad_row"
        if row.value is not None:
            try:
                read = canonical(row.value, mapping)
                pairs = [_with_label(pair, read, config.ties) for pair in pairs_of(read, config.format)]
                rendered = [encoder.render(pair) for pair in pairs if not pair.tied]
            except BadRowError as error:
                problem = safe_text(error, limit=300)
                reason = "refused_by_template" if isinstance(error, RefusedRowError) else reason
            else:
                unused = not_used(row.value, mapping.columns, fields_read(read, config.format))
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
                    report.notes.update((*one.pair.notes, *one.notes))
                    report.soft_label_at = report.soft_label_at or (row.location if one.pair.probability != 1 else "")
                    yield TextPair(one.pair, row.index, row.location), one
                continue
        misread = row.value if reason == "bad_row" and row.value else {}
        if config.on_bad_row == "error" or not report.first_bad:
            form = form_of(misread, config.columns, "; {form} reads such rows")
            report.first_bad = f"{row.location}: {problem}{form}"
        if config.on_bad_row == "error":
            raise DataError(f"{report.first_bad} (data.on_bad_row=skip counts and drops such rows)")
        report.dropped[reason] += 1


def _with_label(pair: PreferencePair, row: Row, ties: str) -> PreferencePair:
    """The pair with its soft label: that of the row, or 1/2 for a tie where ties are kept."""
    if pair.tied:
        return pair if ties == "drop" else replace(pair, tied=False, probability=0.5, notes=(*pair.notes, TIE_KEPT))
    w = row.get("probability", 1.0)
    return pair if w == 1 else replace(pair, probability=w, notes=(*pair.notes, SOFT_LABEL))


def _tokenized(
    texts: Iterator[tuple[TextPair, RenderedPair]],
    encoder: PairEncoder,
    config: DataConfig,
    report: Report,
    is_first: bool,
    poll: Callable[[], None],
) -> Iterator[tuple[TokenizedPair, TextPair]]:
    for number, chunk in enumerate(iter(lambda: list(islice(texts, CHUNK)), [])):
        poll()
        if encoder.template is not None:
            refuses = is_first and number == 0
            _look_for_markers([text for text, _ in chunk], encoder.template, report, refuses)
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
                unscored = (token_ids(cut.chosen_unscored), token_ids(cut.rejected_unscored))
                yield TokenizedPair(*ids, text.index, key, group, *unscored, text.pair.probability), text


def _look_for_markers(texts: list[TextPair], template: ChatTemplate, report: Report, refuses: bool) -> None:
    """Count prompts with a chat template's marker in their text; DataError where most begin with one."""
    if refuses:
        template.refuse_rendered({text.location: text.pair.messages for text in texts}, "data.template")
    found = Counter(template.marker_in(text.pair.messages) for text in texts)
    report.notes.update(
        {f"with {safe_text(marker)}, the marker of a chat template, in the text of the prompt": number
         for marker, number in found.items() if marker is not None}
    )  # fmt: skip


def make_part(
    work: Work, number: int, rows: list[SourceRow], poll: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Tokenize the rows of a part and write it; returns its facts. DataError for a row that cannot be read."""
    report, encoder = Report(""), work.encoder
    before = {name: getattr(encoder, name) for name in encoder.COUNTERS}
    texts = _text_pairs(rows, encoder, work.config, report)
    pairs, hashes = [], []
    for pair, text in _tokenized(texts, encoder, work.config, report, number == 0, poll):
        pairs.append(pair)
        hashes.append(pair_hash(text.pair))
    counted = {name: getattr(encoder, name) - before[name] for name in encoder.COUNTERS}
    for name, value in before.items():  # they are added once, when all parts are there
        setattr(encoder, name, value)
    facts = {"pairs": len(pairs), "report": report.stored(), "encoder": counted}
    write_whole(work.folder / part_name(number), part_bytes(pairs, hashes, facts), shared=True)
    return facts


# In several processes


_work: Work | None = None  # of a process that makes parts


def _begin(work: Work) -> None:
    """Make a process ready: it leaves Ctrl-C to its parent, takes one core, and ends when its parent is gone."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.freeze()  # what is imported need not be searched for garbage again and again
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait_for_end([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _make_part(number: int, rows: list[SourceRow]) -> dict[str, Any]:
    assert _work is not None
    return make_part(_work, number, rows)


def _by_processes(
    work: Work, parts: Iterator[tuple[int, list[SourceRow]]], processes: int, poll: Callable[[], None]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each part's number and facts, made by so many processes; rows are read as they are needed.

    This process is one of them: it makes a part where it would wait for another.
    """
    # Not by fork: threads of the tokenizer, or a GPU, would be copied in the middle of something.
    context = multiprocessing.get_context("spawn")
    with left_to_this_process():
        pool = ProcessPoolExecutor(processes - 1, mp_context=context, initializer=_begin, initargs=(work,))
    under_way: deque[tuple[int, Future[dict[str, Any]]]] = deque()
    gc.freeze()
    try:
        more = True
        while more or under_way:
            following = next(parts, None) if more else None
            more = following is not None
            if following is not None:
                number, rows = following
                if len(under_way) < 2 * (processes - 1):
                    with left_to_this_process():
                        under_way.append((number, pool.submit(_make_part, number, rows)))
                else:  # there is enough for the others to do
                    try:
                        made = make_part(work, number, rows, poll)
                    except DataError:
                        for _, earlier in under_way:  # the first mistake in the file is the one to name
                            earlier.result()
                        raise
                    yield number, made
            while under_way and (under_way[0][1].done() or not more):
                number, future = under_way[0]
                while not wait([future], timeout=0.1).done:
                    poll()
                under_way.popleft()
                yield number, future.result()
    except BrokenProcessPool:
        for _ in range(5):  # a SIGTERM may have come to all processes of the job
            poll()
            time.sleep(0.1)
        raise OutOfMemoryError(
            "a process that tokenized pairs was ended from outside, for want of memory most likely; "
            "data.processes=1 needs less"
        ) from None
    finally:
        gc.unfreeze()
        pool.shutdown(wait=True, cancel_futures=True)


def processes_for(config: DataConfig) -> int:
    """How many processes tokenize: as the config says, else one for each core that this process may use."""
    if config.processes != "auto":
        return int(config.processes)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# A source


def prepare(
    source: Source,
    limit: int | None,
    config: DataConfig,
    encoder: PairEncoder,
    poll: Callable[[], None],
    working: StartBar,
) -> Prepared:
    """The tokenized pairs of a source's first `limit` rows: from the cache, or made and kept there.

    DataError where a row cannot be read (unless `on_bad_row=skip`) or too many cannot.
    """
    facts = {name: value for name, value in asdict(config).items() if name not in NO_MATTER}
    how = [VERSION, source.identity(), limit, facts, encoder.identity(), version("tokenizers"), version("transformers")]
    folder = cache_folder("tokens") / fingerprint(how)
    for tries_left in (2, 1, 0):
        try:
            known = _complete(folder)
            if known is None:
                with filling(folder, poll) as writable:
                    folder = writable
                    known = _complete(folder) or _filled(folder, source, limit, config, encoder, poll, working)
            touch(folder)
            pairs = PairStore(folder, known["sizes"])
            break
        except StoreGoneError:
            if not tries_left:
                raise
    assert known is not None
    for name in encoder.COUNTERS:
        setattr(encoder, name, getattr(encoder, name) + known["encoder"].get(name, 0))
    report = Report.restored(source.name, known["report"])
    _refuse_many_bad_rows(report, config)
    return Prepared(pairs, report)


def _filled(
    folder: Path,
    source: Source,
    limit: int | None,
    config: DataConfig,
    encoder: PairEncoder,
    poll: Callable[[], None],
    working: StartBar,
) -> dict[str, Any]:
    """Make what is missing in a store; returns what it says of itself."""
    made = _make(source, limit, Work(config, encoder, folder), poll, working)
    report, counted = Report(source.name), Counter[str]()
    for one in made:
        report.add(Report.restored(source.name, one["report"]))
        counted.update(one["encoder"])
    known = {"sizes": [one["pairs"] for one in made], "report": report.stored(), "encoder": dict(counted)}
    _written(folder / COMPLETE, dumps(known).encode("ascii"))
    return known


def _written(path: Path, data: bytes) -> None:
    try:
        write_whole(path, data, shared=True)
    except FileNotFoundError:
        raise StoreGoneError(f"{safe_text(path.parent)}: was removed meanwhile; start again") from None
    except OSError as error:
        raise StorageError(
            f"{safe_text(path)}: cannot be written ({error.strerror}); DPO_CACHE names a folder"
        ) from None


def _complete(folder: Path) -> dict[str, Any] | None:
    """What a complete store says of itself; None where it is not complete, or a part was removed."""
    try:
        known: dict[str, Any] = loads((folder / COMPLETE).read_bytes())
        parts = [folder / part_name(number) for number in range(len(known["sizes"]))]
        return known if all(part.is_file() for part in parts) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _make(
    source: Source,
    limit: int | None,
    work: Work,
    poll: Callable[[], None],
    working: StartBar,
) -> list[dict[str, Any]]:
    """Make every part that is not there yet; returns their facts."""
    rows = takewhile(lambda row: limit is None or row.index < limit, source.rows())

    def read() -> list[SourceRow]:
        some = list(islice(rows, PART))
        source.check_unchanged()  # else the part would lie under the name of other rows
        return some

    first = read()
    parts = enumerate(chain([first], iter(read, [])))
    total = (source.count() if len(first) == PART else None) or 0
    is_small = len(first) < PART or 0 < total <= FEW * PART  # then it is done before other processes have started
    processes = 1 if is_small else processes_for(work.config)
    # Fewer rows take less than a bar, and how many there are may not be known.
    advance = working("row", min(limit or total, total)) if total else lambda _: None

    def missing() -> Iterator[tuple[int, list[SourceRow]]]:
        for number, some in parts:
            poll()
            known = _known_part(work.folder / part_name(number))
            if known is None:
                yield number, some
            else:
                facts[number] = known
                advance(known["report"]["rows"])

    facts: dict[int, dict[str, Any]] = {}
    try:
        made = (
            _by_processes(work, missing(), processes, poll)
            if processes > 1
            else ((number, make_part(work, number, some, poll)) for number, some in missing())
        )
        for number, one in made:
            facts[number] = one
            advance(one["report"]["rows"])
    except FileNotFoundError:
        raise StoreGoneError(f"{safe_text(work.folder)}: was removed meanwhile; start again") from None
    except OSError as error:
        raise StorageError(
            f"{safe_text(work.folder)}: tokens cannot be kept ({error.strerror}); set DPO_CACHE to a folder with space"
        ) from None
    return [facts[number] for number in sorted(facts)]


def _known_part(path: Path) -> dict[str, Any] | None:
    """The facts of a part that is there; None where it is not, or is damaged."""
    if not path.is_file():
        return None
    try:
        return Part(path, mapped(path)).facts
    except StorageError:
        return None


def _refuse_many_bad_rows(report: Report, config: DataConfig) -> None:
    """DataError where more rows are bad than `max_bad_fraction` allows: it is the mapping, then, not a few rows."""
    bad = sum(report.dropped[reason] for reason in OF_ROWS)
    if bad > config.max_bad_fraction * report.rows:
        raise DataError(
            f"{report.source}: {bad:,} of {plural(report.rows, 'row')} cannot be used "
            f"({100 * bad / report.rows:.2g}%), more than data.max_bad_fraction={config.max_bad_fraction:g} allows; "
            f"the first is {report.first_bad}"
        )


def prompts_of_rows(source: Source, config: DataConfig) -> dict[int, str]:
    """The text of each readable row's prompt, by the row."""
    mapping, found = RowMapping.of(config), {}
    for row in source.rows():
        with suppress(BadRowError):
            if row.value is not None:
                found[row.index] = pairs_of(canonical(row.value, mapping), config.format)[0].prompt_text
    return found


def texts_of(source: Source, config: DataConfig, pairs: Iterable[TokenizedPair]) -> list[TextPair]:
    """The texts of stored pairs, in their order, read again from their source up to the last of them."""
    wanted = {(pair.index, pair.key): place for place, pair in enumerate(pairs)}
    found: dict[int, TextPair] = {}
    mapping, last = RowMapping.of(config), max((index for index, _ in wanted), default=-1)
    rows = {index for index, _ in wanted}
    for row in takewhile(lambda row: row.index <= last, source.rows()) if wanted else ():
        if row.index in rows and row.value is not None:
            for pair in pairs_of(canonical(row.value, mapping), config.format):
                place = wanted.get((row.index, content_key(pair)))
                if place is not None:
                    found.setdefault(place, TextPair(pair, row.index, row.location))
    return [found[place] for place in sorted(found)]
