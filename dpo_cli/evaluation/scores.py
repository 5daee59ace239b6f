"""Scoring pairs: the four log-probs of each, and everything that follows from them.

The numbers are per pair and in the order of the pairs, so they cannot depend on how the pairs were batched.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dpo_cli.data.tokens import TokenizedPair
from dpo_cli.models.logps import Batch, Batching
from dpo_cli.models.memory import in_passes
from dpo_cli.models.reference import Reference
from dpo_cli.objectives.reward_model import pair_scores
from dpo_cli.theory.losses import LogRatios, Objective, PairLogps
from dpo_cli.theory.metrics import pair_metrics, reward_metrics
from dpo_cli.theory.statistics import Estimate, mean_estimate, proportion_estimate


@dataclass(frozen=True)
class PairScores:
    """The log-probs of policy and reference on B pairs, each (B,) on the CPU, in the order of the pairs."""

    policy: PairLogps
    reference: PairLogps

    @property
    def ratios(self) -> LogRatios:
        """log pi/pi_ref of each response."""
        return LogRatios.between(self.policy, self.reference)


WINDOW = 64  # pairs that pieces of like size are cut from


def windows(pairs: list[TokenizedPair]) -> list[list[TokenizedPair]]:
    """The pairs in the batches in which they are scored."""
    return [pairs[start : start + WINDOW] for start in range(0, len(pairs), WINDOW)]


def score_pairs(
    policy: Any,
    reference: Reference,
    pairs: list[TokenizedPair],
    batching: Batching,
    poll: Callable[[], None] = lambda: None,
    advance: Callable[[int], None] = lambda _: None,
) -> PairScores:
    """Score every pair without gradient and without dropout; `advance` hears how many are done."""
    place = {id(pair): position for position, pair in enumerate(pairs)}
    columns = torch.zeros(8, len(pairs))
    was_training = policy.training

    def score(batch: Batch) -> tuple[tuple[TokenizedPair, ...], torch.Tensor]:
        poll()
        rows = [*_columns(pair_scores(policy, batch)), *_columns(reference.logps(batch))]
        return batch.pairs, torch.stack([row.float().cpu() for row in rows])

    policy.eval()
    try:
        for window in windows(pairs):
            for scored, rows in in_passes(batching, window, score):
                columns[:, torch.tensor([place[id(pair)] for pair in scored])] = rows
                advance(len(scored))
    finally:
        policy.train(was_training)
    return PairScores(PairLogps(*columns[:4]), PairLogps(*columns[4:]))


def _columns(logps: PairLogps) -> tuple[torch.Tensor, ...]:
    return logps.chosen, logps.rejected, logps.chosen_tokens, logps.rejected_tokens


def summarize(scores: PairScores, objective: Objective, beta: float, of_rewards: bool = False) -> dict[str, Estimate]:
    """Every metric of the training log over the scored pairs, each with its 95% interval.

    Besides them: the change of log-prob since the reference, in nats a token, and how often each model finds the
    chosen response likelier than the rejected one (`accuracy_without_reference`). Scores that are `of_rewards` are no
    log-probs, and only what holds of rewards is said of them.
    """
    ratios = scores.ratios
    metrics = pair_metrics(scores.policy, ratios, objective(scores.policy, ratios), beta)
    if of_rewards:
        metrics = reward_metrics(ratios, metrics["loss"])
    else:
        metrics["logps_change_per_token/chosen"] = ratios.chosen / ratios.chosen_tokens
        metrics["logps_change_per_token/rejected"] = ratios.rejected / ratios.rejected_tokens
    estimates = {
        name: mean_estimate(values.double().tolist())
        for name, values in metrics.items()
        if name != "rewards/accuracies"
    }
    n = len(ratios.chosen)
    estimates["rewards/accuracies"] = proportion_estimate(float(metrics["rewards/accuracies"].double().sum()), n)
    for who, logps in () if of_rewards else (("policy", scores.policy), ("reference", scores.reference)):
        difference = logps.chosen - logps.rejected
        wins = float((difference > 0).double().sum() + 0.5 * (difference == 0).double().sum())
        estimates[f"accuracy_without_reference/{who}"] = proportion_estimate(wins, n)
    return estimates
