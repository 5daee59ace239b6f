"""One pass over a source: what becomes of each pair, in columns of numbers, and a sample of pairs as text.

Only the sample keeps texts. What needs the text of another row reads the source again (`rows_with_pairs`).
"""

import random
from array import array
from collections import Counter
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from dpo_cli.config.schema import DataConfig
from dpo_cli.console.text import safe_text
from dpo_cli.data.files import SourceRow, open_source
from dpo_cli.data.formats import BadRowError, PreferencePair, fields_read, pairs_of
from dpo_cli.data.groups import normalised, prompt_group
from dpo_cli.data.known_forms import form_of
from dpo_cli.data.leaks import pair_hash
from dpo_cli.data.mapping import RowMapping, canonical, not_used, source_of
from dpo_cli.data.pairs import held_out_sets
from dpo_cli.data.report import count
from dpo_cli.errors import ConfigError
from dpo_cli.examination.minhash import Signatures, near_duplicates, signatures

CHUNK = 2048  # rows between two looks at signals
# Why a pair is dropped, in the order in which reasons are looked for: a pair counts once, under the first.
OF_PAIRS = ("tie", "empty_response", "identical", "contradictory", "duplicate", "leaked")
# Reasons that depend on tokenizer and template: of pairs that the others leave.
OF_TOKENS = ("refused_by_template", "prompt_too_long", "identical_after_truncation")
KEPT = -1  # in place of the number of a reason
UNLABELLED = ("tie", "empty_response", "identical")  # a pair that prefers nothing is no duplicate of another


@dataclass(frozen=True)
class ReadRow:
    """A row of a source and the pairs that it makes, or why it makes none."""

    row: SourceRow
    pairs: tuple[PreferencePair, ...]
    problem: str | None
    source: str  # where the row is from, where a column says so
    not_used: tuple[str, ...] = ()  # columns that nothing reads
    soft_label: bool = False


@dataclass(frozen=True)
class SampledPair:
    """A pair whose text is kept."""

    position: int  # among the pairs of its side
    index: int  # the row in its file, from 0
    location: str
    group: int
    pair: PreferencePair


@dataclass(frozen=True)
class SourceName:
    """Which rows are read: what `data.train` or `data.eval` names."""

    name: str | list[str]
    split: str
    limit: int | None


def sources_of(config: DataConfig) -> tuple[SourceName, SourceName | None]:
    """The training rows and the held-out rows; None where a part of the training rows is held out."""
    if config.sources:
        raise ConfigError("data=mixture: dpo-data examines one source; run it for each, with data= and data.train=")
    assert config.train is not None
    sets, split = [*held_out_sets(config).values()], config.eval_split or config.train_split
    held = sets[0] if len(sets) == 1 else None
    if len(sets) > 1:  # of files, read as one
        held = [file for one in sets for file in ([one] if isinstance(one, str) else one)]
    train = SourceName(config.train, config.train_split, config.limit)
    return train, SourceName(held, split, config.eval_limit) if held is not None else None


def rows_of(config: DataConfig, which: SourceName) -> Iterator[SourceRow]:
    """Every row as it stands in the source."""
    for row in open_source(which.name, config.subset, which.split).rows():
        if which.limit is not None and row.index >= which.limit:
            return
        yield row


def read_row(row: SourceRow, config: DataConfig, mapping: RowMapping) -> ReadRow:
    """A row with its pairs; one that cannot be read comes with its problem."""
    if row.value is None:
        return ReadRow(row, (), row.problem, "")
    try:
        read = canonical(row.value, mapping)
        pairs, soft = pairs_of(read, config.format), read.get("probability", 1.0) != 1
        unused = not_used(row.value, mapping.columns, fields_read(read, config.format))
        return ReadRow(row, pairs, None, source_of(read, config.columns), tuple(unused), soft)
    except BadRowError as error:
        return ReadRow(row, (), safe_text(error, limit=300), "")


def rows_with_pairs(config: DataConfig, which: SourceName, wanted: Container[int] | None = None) -> Iterator[ReadRow]:
    """Every row with its pairs, or those with the `wanted` indices; one that cannot be read comes with its problem."""
    mapping = RowMapping.of(config)
    return (read_row(row, config, mapping) for row in rows_of(config, which) if wanted is None or row.index in wanted)


def advice(read: ReadRow, config: DataConfig) -> str:
    """The problem of a row that cannot be read, with the YAML that reads such rows where there is one."""
    return f"{read.problem}{form_of(read.row.value or {}, config.columns, '; {form} reads such rows')}"


@dataclass
class Side:
    """The pairs of the training or the held-out source. N pairs, in the order of the file."""

    which: SourceName
    name: str
    rows: int = 0
    first_problem: str = ""  # file and line of the first bad row, and why it cannot be read
    bad_rows: "array[int]" = field(default_factory=lambda: array("q"))  # their indices
    indices: "array[int]" = field(default_factory=lambda: array("q"))  # (N,) row of each pair
    hashes: "array[int]" = field(default_factory=lambda: array("Q"))  # (N,) of prompt and the set of responses
    groups: "array[int]" = field(default_factory=lambda: array("Q"))  # (N,) of the prompt
    ordered: "array[int]" = field(default_factory=lambda: array("b"))  # (N,) 1: chosen sorts before rejected
    reasons: NDArray[np.int8] = field(default_factory=lambda: np.zeros(0, np.int8))  # (N,) index in OF_PAIRS, or KEPT
    near: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))  # (N,) similar earlier pair, or -1
    sources: Counter[str] = field(default_factory=Counter)  # pairs by where they are from
    not_used: Counter[str] = field(default_factory=Counter)  # rows by the column that nothing reads
    not_used_form: str = ""  # another YAML that reads such columns
    soft_labels: int = 0  # rows whose label has a probability below 1
    sources_of_sample: dict[int, str] = field(default_factory=dict)  # position -> source
    sample: list[SampledPair] = field(default_factory=list)  # of the pairs that are kept, in order
    signatures: Signatures = field(default_factory=lambda: signatures([]))

    @property
    def pairs(self) -> int:
        """N."""
        return len(self.indices)

    def dropped(self) -> Counter[str]:
        """Rows and pairs by reason."""
        found = Counter({"bad_row": len(self.bad_rows)} if self.bad_rows else {})
        for number, reason in enumerate(OF_PAIRS):
            if total := int((self.reasons == number).sum()):
                found[reason] = total
        return found

    @property
    def kept(self) -> int:
        """Pairs that no reason drops."""
        return int((self.reasons == KEPT).sum())


def read_side(config: DataConfig, which: SourceName, sampled: int | None, seed: int, poll: Callable[[], None]) -> Side:
    """Read a source; `sampled` pairs are kept as text, all where it is None. DataError where it cannot be opened."""
    side = Side(which, open_source(which.name, config.subset, which.split).name)
    reasons = array("b")
    drawn = random.Random(seed)
    usable = 0
    parts: list[Signatures] = []
    reader = rows_with_pairs(config, which)
    for chunk in iter(lambda: list(islice(reader, CHUNK)), []):
        poll()
        texts = []
        for read in chunk:
            side.rows += 1
            if read.problem is not None:
                side.first_problem = side.first_problem or f"{read.row.location}: {advice(read, config)}"
                side.bad_rows.append(read.row.index)
            side.soft_labels += read.soft_label
            if read.not_used and not side.not_used:
                side.not_used_form = form_of(read.row.value or {}, config.columns, "; {form} reads {columns}, too")
            for name in read.not_used:
                count(side.not_used, name)
            for pair in read.pairs:
                reason = _reason(pair)
                chosen, rejected = normalised(pair.chosen), normalised(pair.rejected)
                group = prompt_group(pair.prompt)
                if reason == KEPT:
                    one = SampledPair(side.pairs, read.row.index, read.row.location, group, pair)
                    _draw(side, one, read.source, usable, sampled, drawn)
                    usable += 1
                side.indices.append(read.row.index)
                side.hashes.append(pair_hash(pair))
                side.groups.append(group)
                side.ordered.append(chosen < rejected)
                reasons.append(reason)
                if read.source:
                    count(side.sources, read.source)
                texts.append(" ".join((normalised(pair.messages[-1].content), *sorted((chosen, rejected)))))
        parts.append(signatures(texts))
    side.signatures = np.concatenate([side.signatures, *parts])
    side.reasons = np.array(reasons, dtype=np.int8)
    return side


def _reason(pair: PreferencePair) -> int:
    if pair.tied:
        return OF_PAIRS.index("tie")
    if not pair.chosen.strip() or not pair.rejected.strip():
        return OF_PAIRS.index("empty_response")
    return OF_PAIRS.index("identical") if pair.chosen == pair.rejected else KEPT


def _draw(side: Side, one: SampledPair, source: str, seen: int, sampled: int | None, drawn: random.Random) -> None:
    """Keep a pair in a sample in which every pair has the same chance (reservoir sampling)."""
    if sampled is None or len(side.sample) < sampled:
        side.sample.append(one)
    elif (place := drawn.randrange(seen + 1)) < sampled:
        side.sources_of_sample.pop(side.sample[place].position, None)
        side.sample[place] = one
    else:
        return
    if source:
        side.sources_of_sample[one.position] = source


def compare(train: Side, held_out: Side | None) -> None:
    """Find duplicates and contradictions within each side, near-duplicates in both, and leaks between them.

    Changes `reasons`, `near` and `sample` of the sides.
    """
    sides = [train] if held_out is None else [train, held_out]
    for side in sides:
        _look_within(side)
    if held_out is not None:
        _look_for_leaks(train, held_out)
    _look_for_near_duplicates(sides)
    for side in sides:
        kept = (one for one in side.sample if side.reasons[one.position] == KEPT)
        side.sample = sorted(kept, key=lambda one: one.position)


def _look_for_leaks(train: Side, held_out: Side) -> None:
    for one, other in ((train, held_out), (held_out, train)):
        kept = one.reasons == KEPT
        same_pair = np.isin(column(one.hashes), column(other.hashes))
        same_prompt = np.isin(column(one.groups), column(other.groups))
        one.reasons[kept & (same_pair | same_prompt)] = OF_PAIRS.index("leaked")


def _look_for_near_duplicates(sides: list[Side]) -> None:
    near = near_duplicates(np.concatenate([side.signatures for side in sides]))
    hashes = np.concatenate([column(side.hashes) for side in sides])
    rows = np.concatenate([np.asarray(side.indices) for side in sides])
    start = 0
    for side in sides:
        of_side = near[start : start + side.pairs]
        own = np.arange(start, start + side.pairs)
        # Exact copies have a reason of their own, and the pairs of one ranked row share their responses.
        other_text = hashes[own] != hashes[of_side]
        other_row = (of_side < start) | (rows[own] != rows[of_side])
        side.near = np.where((side.reasons == KEPT) & (of_side >= 0) & other_text & other_row, of_side, -1)
        start += side.pairs


def _look_within(side: Side) -> None:
    unlabelled = [OF_PAIRS.index(reason) for reason in UNLABELLED]
    labelled = np.flatnonzero(~np.isin(side.reasons, unlabelled))
    _, first, inverse = np.unique(column(side.hashes)[labelled], return_index=True, return_inverse=True)
    ordered = np.asarray(side.ordered)[labelled].astype(bool)
    one_way, other_way = (np.bincount(inverse, weights=way, minlength=len(first)) for way in (ordered, ~ordered))
    both = ((one_way > 0) & (other_way > 0))[inverse]
    later = first[inverse] < np.arange(len(labelled))
    side.reasons[labelled[both]] = OF_PAIRS.index("contradictory")
    side.reasons[labelled[later & ~both]] = OF_PAIRS.index("duplicate")


def column(values: "array[int]") -> NDArray[np.uint64]:
    """Hashes as an array."""
    return np.asarray(values, dtype=np.uint64)
