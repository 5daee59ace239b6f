"""Which side of a split a pair is on: decided by a seeded hash of what it has in common with others."""

from collections.abc import Callable
from dataclasses import dataclass

from dpo_cli.data.formats import PreferencePair
from dpo_cli.data.tokens import TokenizedPair
from dpo_cli.storage.hashing import fingerprint_of_texts


@dataclass(frozen=True)
class SplitBy:
    """What pairs that stay on one side have in common."""

    name: str  # shown to the user
    shared: Callable[[TokenizedPair, PreferencePair], str]  # what is hashed


# Chosen by `data.split_by`.
SPLITS = {
    "first_turn": SplitBy("first human turn", lambda tokenized, _: f"{tokenized.group:016x}"),
    "prompt": SplitBy("prompt", lambda _, pair: pair.prompt_text),  # as configs up to version 2
}


def is_held_out(shared: str, fraction: float, seed: int) -> bool:
    """Whether pairs that have `shared` in common are held out; the same in every run and on every rank.

    `fraction` is the expected share of held-out groups, 0 to 1.
    """
    value = int(fingerprint_of_texts(f"split {seed}", shared)[:16], 16)
    return value < fraction * 2**64
