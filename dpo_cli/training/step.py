"""The gradient of one batch: forward, loss and backward, pass by pass, and what is measured on the way.

A batch is cut into passes by its size in memory, and where memory runs out all the same it is cut finer and begun
again from the start, gradients and random numbers included: the result is that of the finer cut and of nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from torch import Tensor

from dpo_cli.data.batches import Way, by_size, cut_by_tokens, packed_tokens, padded_tokens
from dpo_cli.data.tokens import TokenizedPair
from dpo_cli.models.memory import DoesNotFitError, alone_too_large, make_room, one_pass
from dpo_cli.objectives.reward_model import pair_scores
from dpo_cli.runs.checkpoint import rng_states, set_rng_states
from dpo_cli.theory.losses import LogRatios
from dpo_cli.theory.metrics import MeanOverPairs
from dpo_cli.training.run import Run

T = TypeVar("T")


@dataclass
class Measured:
    """What the passes over one batch leave besides its gradient."""

    metrics: MeanOverPairs = field(default_factory=MeanOverPairs)
    pairs: list[TokenizedPair] = field(default_factory=list)  # in the order of the passes
    losses: list[Tensor] = field(default_factory=list)  # (B,) of each pass
    ratios: list[LogRatios] = field(default_factory=list)
    tokens: int = 0


def forward_backward(run: Run, batch: list[TokenizedPair]) -> Measured:
    """Add the gradient of the batch's mean loss to the policy's weights."""
    measured = Measured()
    for layout in run.batching.batches(batch):
        run.poll()
        with one_pass(layout.pairs):
            reference_logps = run.reference.logps(layout)
            policy_logps = pair_scores(run.policy, layout)
            ratios = LogRatios.between(policy_logps, reference_logps)
            losses = run.objective(policy_logps, ratios)
            # The sum over the batch size: the gradient does not depend on how the batch was cut.
            (losses.sum() / len(batch)).backward()
        measured.metrics.add(run.measure(policy_logps.detach(), ratios, losses))
        measured.pairs += layout.pairs
        measured.losses.append(losses.detach())
        measured.ratios.append(ratios.detach())
        measured.tokens += layout.real_tokens
    return measured


def cut_until_it_fits(run: Run, work: Callable[[], T]) -> T:
    """The result of `work`, a batch's passes; where memory runs out, of the same batch cut finer.

    OutOfMemoryError where one pair alone does not fit.
    """
    while True:
        rng = rng_states()
        try:
            return work()
        except DoesNotFitError as error:
            pairs = error.pairs
        run.optimizer.zero_grad(set_to_none=True)
        set_rng_states(rng)
        make_room(run.device)
        cut_finer(run, pairs)


def cut_finer(run: Run, pairs: list[TokenizedPair]) -> None:
    """From here on cut batches so that a pass like this one, which did not fit, becomes two."""
    if len(pairs) == 1:
        raise alone_too_large(pairs[0])
    if run.token_budget is None:
        size = (len(pairs) + 1) // 2
        run.batching, run.pairs_a_pass = replace(run.batching, cut=by_size(size)), size
        words = f"{size} pairs a pass"
    else:
        # Less than what did not fit, or the same passes would come again.
        size = padded_tokens(pairs) if run.batching.way is Way.PADDED else packed_tokens(pairs)
        run.token_budget = max(1, min(run.token_budget, size) // 2)
        run.batching = replace(run.batching, cut=cut_by_tokens(run.token_budget, run.batching.way))
        words = f"{run.token_budget:,} tokens a pass"
    run.reporter.warn(f"memory ran out on a pass of {len(pairs)} pairs; batches are cut finer from here on: {words}")
