"""Which pairs are trained on, and which are held out by a seeded hash of what they have in common with others.

What goes through all training pairs (the split, a fingerprint, what leaks are looked for in, the longest pairs) is done
once and kept beside the stored pairs: a later run begins at once, whatever their number.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_cli.console.pace import StartBar
from dpo_cli.data.leaks import TrainedOn
from dpo_cli.data.store import Indices, PairStore, StoredPairs, fingerprinted
from dpo_cli.data.tokens import TokenizedPair
from dpo_cli.storage.cache_folder import filled_once
from dpo_cli.storage.hashing import fingerprint, fingerprint_of_texts

VERSION = 1  # of what is kept
LONGEST = 1024  # pairs

# What pairs that stay on one side have in common, by `data.split_by`.
SPLITS = {
    "first_turn": "first human turn",
    "prompt": "prompt",  # as configs up to version 2
}


def is_held_out(shared: str, fraction: float, seed: int) -> bool:
    """Whether pairs that have `shared` in common are held out; the same in every run and on every rank.

    `fraction` is the expected share of held-out groups, 0 to 1.
    """
    value = int(fingerprint_of_texts(f"split {seed}", shared)[:16], 16)
    return value < fraction * 2**64


@dataclass(frozen=True)
class Split:
    """How a source is split: by `data.split_by`, the share of groups that are held out, and the seed."""

    by: str
    fraction: float
    seed: int
    prompt_of_rows: Callable[[], dict[int, str]]  # the text of each row's prompt, where whole prompts are compared

    def held_out(self, store: PairStore) -> NDArray[np.bool_]:
        """Which pairs of a store are held out: (pairs,)."""
        if self.by == "prompt":
            prompts = self.prompt_of_rows()
            held = [is_held_out(prompts[index], self.fraction, self.seed) for index in store.numbers("index").tolist()]
            return np.array(held, dtype=np.bool_)
        groups, which = np.unique(store.numbers("group"), return_inverse=True)
        held = [is_held_out(f"{group:016x}", self.fraction, self.seed) for group in groups.tolist()]
        return np.array(held, dtype=np.bool_)[which]


class TrainingPairs(StoredPairs):
    """The pairs that a run trains on, with what is known of all of them."""

    def __init__(self, store: PairStore, chosen: Indices | None, folder: Path) -> None:
        """`folder` holds what `write_facts` found."""
        super().__init__(store, chosen)
        facts = json.loads((folder / "facts.json").read_bytes())
        self.fingerprint: str = facts["fingerprint"]  # of every token of every pair, in order
        self.largest_token: int = facts["largest_token"]
        self.most_tokens: int = facts["most_tokens"]  # of a prompt with both its responses
        self._longest: list[int] = facts["longest"]
        self.rows = stored_numbers(folder / "rows", np.int32) if facts["rows"] else None
        self.trained_on_file = folder / "trained_on.safetensors"
        self.trained_on = TrainedOn.mapped(self.trained_on_file)

    def longest(self, number: int) -> list[TokenizedPair]:
        """The pairs with the longest side, at most so many of them (and of 1,024), the longest first."""
        return [self[place] for place in self._longest[:number]]


def training_side(store: PairStore, split: Split | None, working: StartBar) -> tuple[TrainingPairs, StoredPairs | None]:
    """The pairs that are trained on, and those that the split holds out; `working` starts a progress bar."""
    key = [VERSION] if split is None else [VERSION, split.by, split.fraction, split.seed]
    folder = store.folder / f"training-{fingerprint(key)}"

    def write(beside: Path) -> None:
        chosen = None
        if split is not None:
            held_out = split.held_out(store)
            chosen = np.flatnonzero(~held_out)
            chosen.tofile(beside / "chosen")
            np.flatnonzero(held_out).tofile(beside / "held_out")
        advance = working("pair", len(store)) if len(store) > LONGEST else lambda _: None
        write_facts(StoredPairs(store, chosen), beside, advance)

    folder = filled_once(folder, write)
    if split is None:
        return TrainingPairs(store, None, folder), None
    chosen, held_out = (stored_numbers(folder / name, np.int64) for name in ("chosen", "held_out"))
    return TrainingPairs(store, chosen, folder), StoredPairs(store, held_out)


def write_facts(pairs: StoredPairs, folder: Path, advance: Callable[[int], None]) -> None:
    """Go once through all pairs, and keep what is found, for `TrainingPairs`."""
    digest, largest_token, most_tokens, seen = hashlib.sha256(), -1, 0, 0
    longest = np.zeros((0, 2), dtype=np.int64)  # tokens of the longer side, and the pair's place; the longest first
    for part, places in pairs.store.parts(pairs.chosen):
        digest.update(part.fingerprinted(places))
        lengths = part.lengths()[places]
        sides = lengths[:, 0] + lengths[:, 1:].max(axis=1)
        longest = np.concatenate([longest, np.stack([sides, seen + np.arange(len(places))], axis=1)])
        longest = longest[np.argsort(-longest[:, 0], kind="stable")[:LONGEST]]
        largest_token = max(largest_token, part.largest_token())
        most_tokens = max(most_tokens, int(lengths.sum(axis=1).max()))
        seen += len(places)
        advance(len(places))
    rows = row_sizes(pairs.store.rows(pairs.chosen))
    if rows is not None:
        rows.tofile(folder / "rows")
    facts = {
        "fingerprint": digest.hexdigest(), "largest_token": largest_token, "most_tokens": most_tokens,
        "longest": longest[:, 1].tolist(), "rows": rows is not None,
    }  # fmt: skip
    (folder / "facts.json").write_text(json.dumps(facts), encoding="ascii")
    content = TrainedOn.of(pairs.numbers("hash"), pairs.numbers("group")).to_bytes()
    (folder / "trained_on.safetensors").write_bytes(content)


def stored_numbers(file: Path, dtype: Any) -> NDArray[Any]:
    """The numbers in a file, mapped."""
    return np.memmap(file, dtype, "r") if file.stat().st_size else np.zeros(0, dtype)


def row_sizes(index: NDArray[np.int64]) -> NDArray[np.int32] | None:
    """Pairs of each row, in order, from the row of each pair, (pairs,); None where every row makes one."""
    starts = np.flatnonzero(np.diff(index, prepend=-1))
    if len(starts) == len(index):
        return None
    return np.diff(starts, append=len(index)).astype(np.int32)


def data_fingerprint(pairs: Iterable[TokenizedPair]) -> str:
    """A hash of every token of every pair, in order, and of the soft labels."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(fingerprinted(pair))
    return digest.hexdigest()
