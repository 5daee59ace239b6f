"""How much a text repeats itself: shares of its n-grams, runs of n tokens that follow each other.

A model that is optimised too far loops, which no score of given responses shows. S. Welleck et al., Neural text
generation with unlikelihood training, https://arxiv.org/abs/1908.04319 (seq-rep-n); J. Li et al., A
diversity-promoting objective function for neural conversation models, https://arxiv.org/abs/1510.03055 (distinct-n).
"""

from collections.abc import Iterator, Sequence


def ngrams(tokens: Sequence[int], n: int) -> Iterator[tuple[int, ...]]:
    """Every run of n adjacent tokens, T - n + 1 of T tokens; none of a text that is shorter."""
    return (tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1))


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """The share of a text's n-grams that stand in it before, 1 - distinct / all: 0 where it has none."""
    found = list(ngrams(tokens, n))
    return 1 - len(set(found)) / len(found) if found else 0.0


def distinct(texts: Sequence[Sequence[int]], n: int = 2) -> float:
    """The distinct n-grams of all texts together as a share of all their n-grams: 0 where they have none."""
    found = [ngram for tokens in texts for ngram in ngrams(tokens, n)]
    return len(set(found)) / len(found) if found else 0.0
