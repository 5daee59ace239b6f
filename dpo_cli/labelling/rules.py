"""Rules: rewards computed from the text of a response alone, to try the method and to compare with.

A rule is a function from a response to a reward; P(a beats b) = sigmoid(r_a - r_b), as with any other reward.
"""

import math
from collections.abc import Callable


def words(text: str) -> list[str]:
    """The words of a text, split at white space."""
    return text.split()


def shorter(text: str) -> float:
    """-log(1 + words): a response half as long is preferred about 2 to 1."""
    return -math.log1p(len(words(text)))


def longer(text: str) -> float:
    """log(1 + words): the opposite of `shorter`."""
    return math.log1p(len(words(text)))


def unrepetitive(text: str) -> float:
    """4 (distinct / all - 1) of the word trigrams: 0 where none repeats, lower the more of them do."""
    runs = list(zip(*(words(text.lower())[start:] for start in range(3)), strict=False))
    return 4.0 * (len(set(runs)) / len(runs) - 1) if runs else 0.0


RULES: dict[str, Callable[[str], float]] = {"shorter": shorter, "longer": longer, "unrepetitive": unrepetitive}
