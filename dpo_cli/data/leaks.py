"""Leaks: held-out pairs that were trained on, or whose prompt was.

Pairs are compared by 64-bit hashes, so a run can keep what it was trained on in 16 bytes a pair. With ten thousand
held-out pairs and ten million training pairs, the chance of one false match is below 1 in 100 million.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from dpo_cli.console.text import plural
from dpo_cli.data.formats import PreferencePair
from dpo_cli.data.groups import normalised
from dpo_cli.storage.hashing import fingerprint_of_texts

Hashes = NDArray[np.uint64]
CONSEQUENCE = "on them accuracy says nothing about new prompts"
REMEDY = "data.eval_leaks=drop takes them out"


def pair_hash(pair: PreferencePair) -> int:
    """A hash of 64 bits of the normalised prompt and both responses, the same whichever of them is chosen."""
    prompt = [part for message in pair.messages for part in (message.role, normalised(message.content))]
    responses = sorted((normalised(pair.chosen), normalised(pair.rejected)))
    return int(fingerprint_of_texts(*prompt, *responses)[:16], 16)


@dataclass(frozen=True)
class TrainedOn:
    """What a run was trained on."""

    pairs: Hashes  # (pairs,): `pair_hash` of each, sorted, each once
    groups: Hashes  # (groups,): `prompt_group` of each, sorted, each once

    @classmethod
    def of(cls, pairs: Iterable[int], groups: Iterable[int]) -> "TrainedOn":
        """From the hashes of the training pairs, in any order."""
        return cls(*(np.unique(np.fromiter(hashes, dtype=np.uint64)) for hashes in (pairs, groups)))

    def to_bytes(self) -> bytes:
        """As the content of a safetensors file: 8 bytes a pair and 8 a group."""
        return save({"pairs": self.pairs, "groups": self.groups})

    @classmethod
    def mapped(cls, file: Path) -> "TrainedOn":
        """From such a file, mapped into memory; ValueError where it is something else, OSError where there is none."""
        size = file.stat().st_size
        try:
            with file.open("rb") as content:
                begin = 8 + int.from_bytes(content.read(8), "little")
                header = json.loads(content.read(begin - 8)) if begin <= size else {}
            found = {}
            for name in ("pairs", "groups"):
                (start, stop), (length,) = header[name]["data_offsets"], header[name]["shape"]
                if (
                    header[name]["dtype"] != "U64"
                    or stop - start != 8 * length
                    or not 0 <= start <= stop <= size - begin
                ):
                    raise ValueError
                found[name] = np.memmap(file, "<u8", "r", begin + start, (length,)) if length else np.zeros(0, "<u8")
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError("not a record of training pairs") from None
        return cls(**found)

    def find(self, pairs: Hashes, groups: Hashes) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which held-out pairs were trained on, and of which only the first human turn was: (B,) each."""
        same = _among(pairs, self.pairs)
        return same, _among(groups, self.groups) & ~same


def _among(hashes: Hashes, known: Hashes) -> NDArray[np.bool_]:
    """Which hashes are among the known ones, which are sorted: by search, so that a mapped file is not read whole."""
    if not len(known):
        return np.zeros(len(hashes), dtype=np.bool_)
    places = np.searchsorted(known, hashes).clip(max=len(known) - 1)
    found: NDArray[np.bool_] = np.asarray(known[places]) == hashes
    return found


@dataclass(frozen=True)
class Leaks:
    """How many held-out pairs are also in training."""

    pairs: int = 0  # the pair itself, its responses in either order
    prompts: int = 0  # its first human turn alone

    def __bool__(self) -> bool:
        return self.pairs + self.prompts > 0

    def __str__(self) -> str:
        if not self.prompts:
            return plural(self.pairs, "pair")
        more = plural(self.prompts, "other" if self.pairs else "pair")
        return (f"{plural(self.pairs, 'pair')}, and " if self.pairs else "") + f"the first human turn of {more}"

    @property
    def warning(self) -> str:
        """What follows from them, and what to do."""
        return f"held-out pairs are also in training ({self}): {CONSEQUENCE}; {REMEDY}"

    def as_dict(self) -> dict[str, int]:
        """The counts, for the manifest and report.json."""
        return asdict(self)


NO_LEAKS = Leaks()
