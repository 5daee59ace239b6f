"""Scoring pairs: the four log-probs of each, and everything that follows from them.

The numbers are per pair and in the order of the pairs, so they cannot depend on how the pairs were batched.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dpo_cli.data.tokens import TokenizedPair
from dpo_cli.engine.engine import SINGLE, Engine
from dpo_cli.models.logps import MicroBatch, MicroBatcher, soft_labels
from dpo_cli.models.memory import each_micro_batch
from dpo_cli.models.reference import Reference
from dpo_cli.objectives.objective import Objective
from dpo_cli.theory.losses import LogRatios, ResponseScores
from dpo_cli.theory.metrics import wins
from dpo_cli.theory.statistics import Clusters, Estimate

WINDOW = 64  # pairs that micro-batches of like size are split from


@dataclass(frozen=True)
class Scorer:
    """What scores pairs."""

    policy: Any
    objective: Objective
    reference: Reference
    batcher: MicroBatcher
    engine: Engine = SINGLE


@dataclass(frozen=True)
class ScoredPairs:
    """The scores of policy and reference on B pairs, on the CPU, in the order of the pairs."""

    policy: ResponseScores
    reference: ResponseScores

    @property
    def ratios(self) -> LogRatios:
        """log pi/pi_ref of each response."""
        return LogRatios.between(self.policy.pairs(), self.reference.pairs())

    def of(self, indices: Sequence[int]) -> "ScoredPairs":
        """The scores of some of the pairs."""
        return ScoredPairs(*(_of_pairs(scores, indices) for scores in (self.policy, self.reference)))


def _of_pairs(scores: ResponseScores, indices: Sequence[int]) -> ResponseScores:
    some = list(indices)
    responses = scores.units[some].flatten()
    labels = None if scores.probabilities is None else scores.probabilities[some]
    return ResponseScores(scores.values[responses], scores.tokens[responses], _units(len(some)), labels)


def _units(pairs: int) -> torch.Tensor:
    """Chosen and rejected of each pair, (B, 2), among scores in their order, (2 B,)."""
    return torch.arange(2 * pairs).view(-1, 2)


def windows(pairs: Sequence[TokenizedPair]) -> Iterator[list[TokenizedPair]]:
    """The pairs in the batches in which they are scored."""
    return (list(pairs[start : start + WINDOW]) for start in range(0, len(pairs), WINDOW))


def score_pairs(
    scorer: Scorer,
    pairs: Sequence[TokenizedPair],
    poll: Callable[[], None] = lambda: None,
    advance: Callable[[int], None] = lambda _: None,
) -> ScoredPairs:
    """Score every pair without gradient and without dropout; `advance` hears how many are done."""
    policy, engine = scorer.policy, scorer.engine
    table = torch.zeros(2, len(pairs), 2)  # of policy and reference, chosen and rejected
    tokens = torch.zeros(len(pairs), 2, dtype=torch.int64)
    was_training = policy.training

    def score(micro_batch: MicroBatch) -> tuple[tuple[TokenizedPair, ...], torch.Tensor]:
        if engine.alone:
            poll()
        of_policy = scorer.objective.score(policy, micro_batch)[micro_batch.units]
        of_reference = scorer.reference.logps(micro_batch)[micro_batch.units]
        return micro_batch.examples, torch.stack([of_policy, of_reference]).float().cpu()

    policy.eval()
    try:
        for number, window in enumerate(windows(pairs)):
            poll()
            column = {id(pair): WINDOW * number + place for place, pair in enumerate(window)}
            counted = torch.tensor([pair.scored_tokens for pair in window])
            tokens[WINDOW * number : WINDOW * number + len(window)] = counted
            for scored, values in each_micro_batch(scorer.batcher, window, score, engine):
                table[:, [column[id(pair)] for pair in scored]] = values
                if engine.alone:
                    advance(len(scored))
            if not engine.alone:
                advance(len(window))
    finally:
        policy.train(was_training)
    of_policy, of_reference = engine.sum(table).flatten(1)  # (2 B,) each
    tokens = tokens.flatten()
    what = (tokens, _units(len(pairs)), soft_labels(pairs, torch.device("cpu")))
    return ScoredPairs(ResponseScores(of_policy, *what), ResponseScores(of_reference, *what))


def summarize(scores: ScoredPairs, objective: Objective, prompts: Clusters) -> dict[str, Estimate]:
    """Every metric of the training log over the scored pairs, each with its 95% interval over their prompts.

    `loss/improvement` is by how much the loss is lower than at the start, where the policy was the reference. Of
    log-probs besides: their change since the reference, in nats a token, and how often each model finds the chosen
    response likelier than the rejected one (`accuracy_without_reference`).
    """
    metrics = objective(scores.policy, scores.reference).metrics
    metrics["loss/improvement"] = objective(scores.reference, scores.reference).losses - metrics["loss"]
    shares = {"rewards/accuracies": metrics.pop("rewards/accuracies")}
    if objective.scores_are_logps:
        ratios = scores.ratios
        metrics["logps_change_per_token/chosen"] = ratios.chosen / ratios.chosen_tokens
        metrics["logps_change_per_token/rejected"] = ratios.rejected / ratios.rejected_tokens
        for who, logps in (("policy", scores.policy.pairs()), ("reference", scores.reference.pairs())):
            shares[f"accuracy_without_reference/{who}"] = wins(logps.chosen - logps.rejected, logps.probabilities)
    means = {name: prompts.mean(values.double().numpy()) for name, values in metrics.items()}
    return means | {name: prompts.share(values.double().numpy()) for name, values in shares.items()}


def by_source(
    scores: ScoredPairs, objective: Objective, pairs: Sequence[TokenizedPair]
) -> dict[str, tuple[int, dict[str, Estimate]]]:
    """Of each source that the scored pairs have, in their order: its number of pairs, and every metric over them."""
    indices: dict[str, list[int]] = {}
    groups = []
    for index, pair in enumerate(pairs):
        groups.append(pair.group)
        if pair.source:
            indices.setdefault(pair.source, []).append(index)
    return {
        source: (len(some), summarize(scores.of(some), objective, Clusters([groups[index] for index in some])))
        for source, some in indices.items()
    }


def with_sources(of_sources: dict[str, tuple[int, dict[str, Estimate]]]) -> dict[str, Estimate]:
    """The metrics of each source under one name each: `rewards/margins/hh`."""
    return {
        f"{name}/{source}": estimate
        for source, (_, estimates) in of_sources.items()
        for name, estimate in estimates.items()
    }


def prompts_of(pairs: Sequence[TokenizedPair]) -> Clusters:
    """Which pairs share a prompt: what counts as independent."""
    return Clusters([pair.group for pair in pairs])
