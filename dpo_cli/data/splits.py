"""Which side of a split a pair is on: decided by a seeded hash of what it has in common with others."""

from collections.abc import Callable
from dataclasses import dataclass

from dpo_cli.data.formats import PreferencePair
from dpo_cli.data.tokens import TokenizedPair
from dpo_cli.storage.hashing import fingerprint_of_texts


@dataclass(frozen=True)
class SplitBy:
    """What pairs that stay on one side have in common."""

    name: str  # in words
    shared: Callable[[TokenizedPair, PreferencePair], str]  # as text


# Chosen by `data.split_by`.
SPLITS = {
    "first_turn": SplitBy("first human turn", lambda tokenized, _: f"{tokenized.group:016x}"),
    "prompt": SplitBy("prompt", lambda _, pair: pair.prompt_text),  # how version 2 and earlier split
}


def is_held_out(shared: str, fraction: float, seed: int) -> bool:
    """Whether pairs with this in common are held out: in every run and on every rank alike."""
    value = int(fingerprint_of_texts(f"split {seed}", shared)[:16], 16)
    return value < fraction * 2**64
