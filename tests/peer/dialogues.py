"""Pairs for the peer tests: dialogues in HH's shape, made here, or real ones where $DPO_HH names a file of them."""

import contextlib
import gzip
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

from dpo_cli.data.formats import BadRowError, PreferencePair, hh

HUMAN, ASSISTANT = "\n\nHuman: ", "\n\nAssistant:"
QUESTIONS = ["How do I bake bread?", "Why is the sky blue?", "Is it OK to lie?", "naïve café ☕, qué?", "ok\nand then?"]
ANSWERS = [" Mix flour, water and salt.", " I'm not sure.", " No.", "", " It depends —\n\n1. on you\n2. on the day\n"]


def made_pairs(number: int) -> list[PreferencePair]:
    """One to three turns; responses from nothing at all to some hundred characters, chosen and rejected unlike."""
    pairs = []
    for row in range(number):
        turns = [QUESTIONS[(row + turn) % 5] + f"{ASSISTANT}{ANSWERS[turn]}" for turn in range(row % 3)]
        prompt = "".join(f"{HUMAN}{turn}" for turn in [*turns, QUESTIONS[row % 5]]) + ASSISTANT
        chosen = ANSWERS[row % 5] + f" Number {row}." * (row % 4)
        rejected = ANSWERS[(row + 1 + row // 5) % 5] + " Really?" * (row % 7)
        pairs.append(hh({"chosen": prompt + chosen, "rejected": prompt + rejected}))
    return pairs


LONGEST = 800  # characters of a real dialogue: the tiny model reads bytes, and attention is quadratic in them


def pairs_to_compare(number: int) -> list[PreferencePair]:
    """The first pairs of the .jsonl.gz file of HH dialogues that $DPO_HH names, else made ones."""
    if "DPO_HH" not in os.environ:
        return made_pairs(number)
    return list(itertools.islice(_real_pairs(Path(os.environ["DPO_HH"])), number))


def _real_pairs(path: Path) -> Iterator[PreferencePair]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if max(len(row["chosen"]), len(row["rejected"])) <= LONGEST:
                with contextlib.suppress(BadRowError):
                    yield hh(row)
