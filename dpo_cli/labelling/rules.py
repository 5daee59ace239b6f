"""Rules that judge an answer by its text alone: rewards with no model, to try the method by and to compare with.

A rule is a function from an answer to a reward; P(a beats b) = sigmoid(r_a - r_b), as with any other reward.
"""

import math
from collections.abc import Callable


def words(text: str) -> list[str]:
    """The words of a text, as white space parts them."""
    return text.split()


def shorter(text: str) -> float:
    """-log(1 + words): an answer half as long is preferred 2 to 1."""
    return -math.log1p(len(words(text)))


def longer(text: str) -> float:
    """log(1 + words): the other way round."""
    return math.log1p(len(words(text)))


def unrepetitive(text: str) -> float:
    """4 (distinct / all - 1) of its runs of three words: 0 where none comes twice, below it the more of them do."""
    runs = list(zip(*(words(text.lower())[start:] for start in range(3)), strict=False))
    return 4.0 * (len(set(runs)) / len(runs) - 1) if runs else 0.0


RULES: dict[str, Callable[[str], float]] = {"shorter": shorter, "longer": longer, "unrepetitive": unrepetitive}
