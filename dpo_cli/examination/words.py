"""How well a bag of words finds the chosen response: what a policy must beat, and the phrases that predict it.

Logistic regression on the counts of words and of two words in a row, chosen minus rejected. There is no intercept and
the sides are swapped at random, so guessing is right half of the time.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_cli.data.formats import PreferencePair
from dpo_cli.theory.statistics import Clusters, Estimate

FOLDS = 5
FEWEST = 50  # pairs and, of them, prompts
CHARACTERS = 12_000_000  # of all responses that are read: some seconds
MIN_PAIRS = 5  # a phrase stands in so many responses, or it is left out
MAX_PHRASES = 50_000  # the most frequent
STRENGTH = 0.03  # of the regression: 1 / (the weight of the squared norm)
SHOWN = 10  # phrases of each side
WORD = r"\w+|[^\w\s]"  # punctuation may predict labels, too


@dataclass(frozen=True)
class Phrase:
    """A word or two words in a row, and how often responses hold it."""

    text: str
    weight: float  # log-odds of chosen for one more of it: above 0 it predicts chosen
    chosen: float  # the share of chosen responses that hold it
    rejected: float


@dataclass(frozen=True)
class Words:
    """What the classifier found."""

    accuracy: Estimate  # on pairs that it did not see, over prompts
    pairs: int
    phrases: list[Phrase]  # those that count most, of both sides


def classify(pairs: Sequence[PreferencePair], groups: Sequence[int], seed: int) -> Words | None:
    """Train on four fifths of the prompts and judge the rest, five times; None for too few pairs or prompts.

    Pairs of one prompt (`groups`) are on one side. ImportError where scikit-learn is not installed.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold

    pairs, groups = _affordable(pairs, groups)
    if len(pairs) < FEWEST or len(set(groups)) < FEWEST:
        return None
    phrases = CountVectorizer(
        ngram_range=(1, 2), min_df=MIN_PAIRS, max_features=MAX_PHRASES, token_pattern=WORD, dtype=np.float32
    )
    try:
        counts = phrases.fit_transform([text for pair in pairs for text in (pair.chosen, pair.rejected)])
    except ValueError:  # no phrase stands in MIN_PAIRS responses
        return None
    chosen, rejected = counts[0::2], counts[1::2]
    labels = np.where(np.random.default_rng(seed).random(len(pairs)) < 0.5, 1, -1)
    differences = (chosen - rejected).multiply(labels[:, None]).tocsr()

    def trained(rows: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the last digit of a weight does not matter here
            model = LogisticRegression(C=STRENGTH, fit_intercept=False, tol=1e-3, max_iter=100)
            return model.fit(differences[rows], labels[rows])

    scores = np.zeros(len(pairs))
    _, numbers = np.unique(np.asarray(groups, dtype=np.uint64), return_inverse=True)
    for rows, held_out in GroupKFold(FOLDS).split(differences, groups=numbers):
        scores[held_out] = trained(rows).decision_function(differences[held_out]) * labels[held_out]
    right = np.where(scores > 0, 1.0, np.where(scores == 0, 0.5, 0.0))
    accuracy = Clusters(groups).share(right)
    if accuracy.low <= 0.5:  # no better than guessing: no phrase predicts a label
        return Words(accuracy, len(pairs), [])
    weights = trained(np.arange(len(pairs))).coef_[0]
    # A weight counts as far as pairs differ in the phrase.
    spread = np.sqrt(np.asarray(differences.multiply(differences).mean(axis=0)).ravel())
    of_chosen, of_rejected = (np.asarray((side > 0).mean(axis=0)).ravel() for side in (chosen, rejected))
    # Some words count only beside others. Shown are those that are also more frequent on the side that they predict.
    clear = weights * (of_chosen - of_rejected) > 0
    order = [n for n in np.argsort(-np.abs(weights) * spread) if clear[n]]
    best = [n for sign in (1, -1) for n in [n for n in order if weights[n] * sign > 0][:SHOWN]]
    names = phrases.get_feature_names_out()
    found = [Phrase(str(names[n]), float(weights[n]), float(of_chosen[n]), float(of_rejected[n])) for n in best]
    return Words(accuracy, len(pairs), found)


def _affordable(
    pairs: Sequence[PreferencePair], groups: Sequence[int]
) -> tuple[Sequence[PreferencePair], Sequence[int]]:
    """As many pairs as CHARACTERS allows, from all over the sample."""
    length = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
    step = max(1, -(-length // CHARACTERS))
    return pairs[::step], groups[::step]
