"""How often a 95% interval holds the truth where pairs share prompts: the table of docs/evaluation.md.

A prompt has one answer of the data and k sampled ones; every two of them make a pair. An answer has a quality, and
of a pair the better one is chosen. The policy's reward of an answer is its skill on this prompt times the quality,
plus noise. Pairs of one prompt share the skill and the answers, so they are not independent. A policy that knows
nothing has skill 0 everywhere.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from dpo_cli.theory.statistics import Clusters

RESPONSES = (1, 2, 4, 6, 8)
SKILL, SPREAD = 0.5, 0.5  # of the policy: mean over prompts, and standard deviation


@dataclass(frozen=True)
class Answers:
    """What is evaluated: so many prompts, with so many sampled answers each."""

    prompts: int
    responses: int

    @property
    def pairs(self) -> int:
        """Pairs of a prompt."""
        return self.responses * (self.responses + 1) // 2

    def margins(self, prompts: int, knows: bool, random: np.random.Generator) -> NDArray[np.float64]:
        """The policy's margins on the pairs of some prompts, (prompts, pairs)."""
        quality = random.standard_normal((prompts, self.responses + 1))
        skill = random.normal(SKILL, SPREAD, (prompts, 1)) if knows else 0.0
        reward = skill * quality + random.standard_normal(quality.shape)
        first, second = np.array(list(combinations(range(self.responses + 1), 2))).T
        sign = np.where(quality[:, first] > quality[:, second], 1.0, -1.0)
        return sign * (reward[:, first] - reward[:, second])


@dataclass(frozen=True)
class Found:
    """Shares of the runs."""

    share: float  # whose interval of the accuracy holds the true accuracy
    mean: float  # whose interval of the margin holds the true margin
    called: float  # in which a policy that knows nothing is called better or worse than chance


def run(answers: Answers, runs: int, seed: int, independent: bool = False) -> Found:
    """Evaluate `runs` times on prompts of their own; `independent` forgets which pairs share a prompt."""
    random = np.random.default_rng(seed)
    truth = answers.margins(400_000 // answers.pairs, True, random)
    accuracy, margin = float((truth > 0).mean()), float(truth.mean())
    ids = np.repeat(np.arange(answers.prompts), answers.pairs).tolist()
    clusters = Clusters(range(len(ids)) if independent else ids)
    holds = np.zeros(3)
    for _ in range(runs):
        margins = answers.margins(answers.prompts, True, random).ravel()
        share, mean = clusters.share((margins > 0).astype(float)), clusters.mean(margins)
        chance = clusters.share((answers.margins(answers.prompts, False, random).ravel() > 0).astype(float))
        holds += (
            share.low <= accuracy <= share.high,
            mean.low <= margin <= mean.high,
            not chance.low <= 0.5 <= chance.high,
        )
    return Found(*(holds / runs).tolist())


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--runs", type=int, default=1000)
    options = parser.parse_args(arguments)
    print(f"{options.prompts} prompts, {options.runs:,} runs each\n")
    print("| answers a prompt | pairs | intervals over | holds the accuracy | holds the margin | called by luck |")
    print("|---|---|---|---|---|---|")
    for responses in RESPONSES:
        answers = Answers(options.prompts, responses)
        for name, independent in (("pairs", True), ("prompts", False)):
            found = run(answers, options.runs, seed=responses, independent=independent)
            cells = (f"{100 * value:.1f}%" for value in (found.share, found.mean, found.called))
            print(f"| {responses} | {answers.pairs * answers.prompts:,} | {name} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
