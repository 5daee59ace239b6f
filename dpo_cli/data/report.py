"""Where every row of a source went, as counts for the manifest and as sentences for the header."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from dpo_cli.console.text import plural, safe_text
from dpo_cli.data.leaks import Leaks
from dpo_cli.data.truncation import Truncation

# Why a pair is dropped: the key in the manifest, the console and report.json, and what it means.
REASONS = {
    "bad_row": "that could not be read",
    "refused_by_template": "that the chat template refuses",
    "tie": "whose two responses are equally good (a tie)",
    "identical": "whose two responses are the same text",
    "empty_response": "with an empty response",
    "prompt_too_long": "whose prompt leaves no room for a response",
    "identical_after_truncation": "whose responses are the same text after truncation",
    "trained_on": "found in training",
    "prompt_trained_on": "with a first human turn found in training",
}
NAMES_KEPT = 100  # columns and sources that are counted by name: those of a broken file could be endless
NAMES_SHOWN = 12
OF_ROWS = ("bad_row", "refused_by_template")  # reasons that count rows, from which no pair was made


@dataclass
class Report:
    """Where the rows of a source went: pairs kept, held out or dropped for which reason, and changed.

    rows = rows dropped + rows that made pairs; pairs = kept + held_out + over_eval_limit + pairs dropped.
    """

    source: str
    rows: int = 0
    pairs: int = 0  # that the rows made
    kept: int = 0
    held_out: int = 0  # by a hash, and in the other report
    over_eval_limit: int = 0  # held out too, and not evaluated
    dropped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    truncation: Truncation = field(default_factory=Truncation)
    not_used: Counter[str] = field(default_factory=Counter)  # rows by the column that nothing reads
    not_used_form: str = ""  # another YAML that reads such columns
    soft_label_at: str = ""  # file and line of the first pair with a soft label
    sources: Counter[str] = field(default_factory=Counter)  # rows by where they are from
    first_bad: str = ""  # the first row that could not be read, and why
    leaks: Leaks | None = None  # of the held-out pairs that were kept; None: of training, or not known

    def sentences(self, max_length: int) -> list[str]:
        """The counts as sentences, one a line."""
        lines = [f"kept {plural(self.kept, 'pair')} of {plural(self.rows, 'row')} from {self.source}"]
        if self.pairs != self.rows - sum(self.dropped[reason] for reason in OF_ROWS):
            lines.append(f"the rows make {plural(self.pairs, 'pair')}")
        if self.held_out:
            lines.append(f"held out {plural(self.held_out, 'pair')}")
        if self.over_eval_limit:
            lines.append(f"held out {plural(self.over_eval_limit, 'pair')} more, which data.eval_limit leaves out")
        lines += [
            f"dropped {dropped(reason, number)}"
            + (f" (max_length={max_length})" if reason in ("prompt_too_long", "identical_after_truncation") else "")
            for reason, number in self.dropped.items()
        ]
        lines += [f"{plural(number, 'pair')} {note}" for note, number in self.notes.items()]
        if self.sources:
            shown = [f"{safe_text(name, 40)} {number:,}" for name, number in self.sources.most_common()]
            lines.append(f"rows by source: {_first(shown)}")
        if self.not_used:
            lines.append(f"not used: {columns_not_used(self.not_used)}{self.not_used_form}")
        lines += [f"also in training: {self.leaks}"] if self.leaks else []
        if self.truncation.prompts_cut:
            lines.append(
                f"{plural(self.truncation.prompts_cut, 'prompt')} lost their oldest part (max_length={max_length})"
            )
        if self.truncation.responses_cut:
            cut = plural(self.truncation.responses_cut, "response")
            lines.append(f"{cut} cut at the end, without the closing EOS (max_length={max_length})")
        return lines

    def add(self, other: "Report") -> None:
        """Count what another part of the same source has counted."""
        for name in ("rows", "pairs", "kept", "held_out", "over_eval_limit"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("dropped", "notes", "not_used", "sources"):
            for key, number in getattr(other, name).items():
                count(getattr(self, name), key, number)
        self.truncation.prompts_cut += other.truncation.prompts_cut
        self.truncation.responses_cut += other.truncation.responses_cut
        self.not_used_form = self.not_used_form or other.not_used_form
        self.first_bad = self.first_bad or other.first_bad
        self.soft_label_at = self.soft_label_at or other.soft_label_at

    def stored(self) -> dict[str, Any]:
        """The counts of a part, for `restored`."""
        names = ("rows", "pairs", "kept", "not_used_form", "first_bad", "soft_label_at")
        counters = ("dropped", "notes", "not_used", "sources")
        return {
            **{name: getattr(self, name) for name in names},
            **{name: dict(getattr(self, name)) for name in counters},
            "truncation": asdict(self.truncation),
        }

    @classmethod
    def restored(cls, source: str, stored: dict[str, Any]) -> "Report":
        """The inverse of `stored`."""
        counters = {name: Counter(value) for name, value in stored.items() if isinstance(value, dict)}
        truncation = Truncation(**counters.pop("truncation"))
        return cls(source, **{**stored, **counters, "truncation": truncation})

    def as_dict(self) -> dict[str, Any]:
        """The counts under their keys, for the manifest."""
        return {
            "source": self.source,
            "rows": self.rows,
            "pairs": self.pairs,
            "kept": self.kept,
            "held_out": self.held_out,
            "over_eval_limit": self.over_eval_limit,
            "dropped": dict(self.dropped),
            "notes": dict(self.notes),
            "not_used": {safe_text(name, 40): number for name, number in self.not_used.items()},
            "sources": {safe_text(name, 40): number for name, number in self.sources.items()},
            "prompts_cut": self.truncation.prompts_cut,
            "responses_cut": self.truncation.responses_cut,
            **({"leaks": self.leaks.as_dict()} if self.leaks is not None else {}),
        }


def dropped(reason: str, number: int) -> str:
    """How many rows or pairs were dropped, and for which reason, in words."""
    return f"{plural(number, 'row' if reason in OF_ROWS else 'pair')} {REASONS[reason]}"


def columns_not_used(rows: Counter[str]) -> str:
    """The columns that nothing reads, each with its number of rows."""
    by_rows: dict[int, list[str]] = {}
    for name, number in rows.most_common():
        by_rows.setdefault(number, []).append(safe_text(name, 40))
    return _first([f"{_first(names)} ({plural(number, 'row')})" for number, names in by_rows.items()])


def _first(names: list[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def count(counts: Counter[str], name: str, number: int = 1) -> None:
    """Count a name; those of a broken file, which could be endless, are counted as others."""
    counts[name if name in counts or len(counts) < NAMES_KEPT else "others"] += number
