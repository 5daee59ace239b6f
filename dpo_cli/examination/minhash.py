"""Near-duplicates by MinHash: texts that share most of their word sequences.

A text is the set of its shingles: the 16 bytes from the start of each word. The share of equal entries in two
signatures estimates the Jaccard similarity: the shingles that two texts share, divided by all their shingles.
A. Broder, On the resemblance and containment of documents (1997). N texts, S shingles.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_cli.storage.hashing import GOLDEN, mixed

SHINGLE = 16  # bytes
SLOTS = 64  # of a signature: the standard error of a similarity of 0.8 is 0.05
BANDS = 16  # of 4 slots each: texts with a similarity of 0.8 share a whole band with a probability of 0.9998
SIMILAR = 0.8
CHUNK = 256  # texts that are hashed together: what is computed then stays in the processor's cache
# Odd multipliers: of 32 bits, one a slot, always the same.
_FACTORS = np.random.default_rng(20).integers(0, 2**31, SLOTS, dtype=np.uint32) * np.uint32(2) + np.uint32(1)

Signatures = NDArray[np.uint32]


def signatures(texts: Sequence[str]) -> Signatures:
    """The signatures of N texts, (N, SLOTS)."""
    chunks = [_signatures(texts[start : start + CHUNK]) for start in range(0, len(texts), CHUNK)]
    return np.concatenate([np.zeros((0, SLOTS), np.uint32), *chunks])


def _signatures(texts: Sequence[str]) -> Signatures:
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    gap = b" " * SHINGLE  # a shingle ends with its text
    joined = np.frombuffer(b" " + b"".join(one + gap for one in encoded), dtype=np.uint8)
    ends = np.cumsum([len(one) + SHINGLE for one in encoded])
    first = np.concatenate([[0], ends[:-1]]) + 1
    letters = joined[1:]
    # A word begins behind a space. Scripts without spaces have a shingle a character.
    starts = ((joined[:-1] == 32) & (letters != 32)) | (letters >= 0xC0)
    starts[first - 1] = True  # an empty text has one shingle, too
    positions = np.flatnonzero(starts) + 1
    windows = np.lib.stride_tricks.sliding_window_view(joined, SHINGLE)[positions]
    hashes = _hashed(windows).astype(np.uint32)
    begins = np.searchsorted(positions, first)
    found = np.empty((SLOTS, len(texts)), np.uint32)
    for slot, factor in enumerate(_FACTORS):
        found[slot] = np.minimum.reduceat((hashes * factor) ^ (hashes >> np.uint32(slot % 13 + 3)), begins)
    return np.ascontiguousarray(found.T)


def _hashed(rows: NDArray[Any]) -> NDArray[np.uint64]:
    """A hash of each row of 16 bytes, (N,)."""
    words = np.ascontiguousarray(rows).view("<u8")
    return mixed(words[:, 0] + GOLDEN * mixed(words[:, 1]))


def near_duplicates(of_texts: Signatures) -> NDArray[np.int64]:
    """Of each text the index of an earlier one that is SIMILAR, (N,); -1 where none is.

    Texts that share a band are compared with the first of them, so the time is that of sorting.
    """
    earlier = np.full(len(of_texts), -1, dtype=np.int64)
    for band in np.split(of_texts, BANDS, axis=1):
        keys = _hashed(band)
        _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        others = first[inverse]
        asked = np.flatnonzero((earlier < 0) & (others < np.arange(len(keys))))
        alike = (of_texts[asked] == of_texts[others[asked]]).mean(axis=1) >= SIMILAR
        earlier[asked[alike]] = others[asked[alike]]
    return earlier
