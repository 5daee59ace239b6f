"""The memory probe: the longest micro-batch is tried before step 1; a batch is split finer where memory runs out."""

import time
from collections.abc import Callable
from dataclasses import replace
from heapq import nlargest
from typing import TypeVar

import numpy as np
import torch

from dpo_cli.console.text import duration, plural, significant
from dpo_cli.data.batches import Split, longest_side
from dpo_cli.data.tokens import TokenizedPair
from dpo_cli.engine.engine import SINGLE, local
from dpo_cli.errors import OutOfMemoryError
from dpo_cli.models.dtype import wait_for
from dpo_cli.models.generators import rng_states, set_rng_states
from dpo_cli.models.memory import DoesNotFitError, alone_too_large, describe_peak_memory, make_room
from dpo_cli.training.optimizers import STATE_VALUES
from dpo_cli.training.parts import Context, Learner, Material
from dpo_cli.training.reference_logps import trained_batches

T = TypeVar("T")
FEW = 1024  # batches
LENGTHS = ("prompt", "chosen", "rejected", "prompt + longer")
ForwardBackward = Callable[[Context, Learner, list[TokenizedPair]], object]


def until_it_fits(context: Context, learner: Learner, work: Callable[[], T]) -> T:
    """The result of `work` on a batch; where memory runs out, of the same batch split finer, from the start.

    Gradients and random numbers start again too: the result is that of the finer split and of nothing else.
    OutOfMemoryError where one pair alone does not fit.
    """
    while True:
        rng = rng_states()
        try:
            return work()
        except DoesNotFitError as error:
            pairs = error.pairs
        if not context.engine.retries:
            raise OutOfMemoryError(
                f"out of memory on a micro-batch of {plural(len(pairs), 'pair')}, {longest_side(pairs[0]):,} tokens a "
                f"sequence; ranks that share every weight cannot try again by themselves: micro_batch_size=1 or "
                "engine.gradient_checkpointing=true need less"
            )
        learner.optimizer.zero_grad(set_to_none=True)
        set_rng_states(rng)
        make_room(learner.batcher.device)
        if len(pairs) == 1:
            raise alone_too_large(pairs[0])
        split = learner.batcher.split.finer(pairs)
        learner.batcher = replace(learner.batcher, split=split)
        context.reporter.warn(f"memory ran out on a micro-batch of {len(pairs)} pairs; from here on at most {split}")


def longest_trained(material: Material, number: int) -> list[TokenizedPair]:
    """The longest of the pairs that a run trains on, the longest first."""
    if min(material.total_steps, material.schedule.steps_per_epoch) > FEW:  # then the longest of all is among them
        return material.data.train.longest(number)
    return nlargest(number, (pair for batch in trained_batches(material) for pair in batch), key=longest_side)


def largest_micro_batch(longest: list[TokenizedPair], split: Split) -> list[TokenizedPair]:
    """As many of the longest pairs as still make one micro-batch."""
    largest = longest[:1]
    for pair in longest[1:]:
        if len(split([*largest, pair])) == 1:
            largest.append(pair)
    return largest


def probe_memory(context: Context, learner: Learner, material: Material, forward_backward: ForwardBackward) -> None:
    """Run the largest possible micro-batch forward and backward, so that a lack of memory shows within seconds.

    The batch is split finer until it fits; weights and random generators stay as they were. OutOfMemoryError where the
    longest pair alone does not fit.
    """
    longest = longest_trained(material, context.config.batch_size)
    largest = largest_micro_batch(longest, learner.batcher.split)
    rng, device = rng_states(), learner.batcher.device
    # The optimizer takes its memory at the first update: until then an empty tensor of that size takes its place.
    on_cpu = device.type == "cpu"
    stand_in = None if on_cpu else torch.empty(int(_optimizer_gib(context, learner) * 2**28), device=device)
    _work(replace(context, engine=SINGLE), learner, largest, forward_backward)  # on every rank the whole of it
    del stand_in
    set_rng_states(rng)


def dry_run(context: Context, learner: Learner, material: Material, forward_backward: ForwardBackward) -> None:
    """Show the lengths of the pairs, try the longest batch, and estimate time and memory of the whole run."""
    config, reporter, train, held_out = context.config, context.reporter, material.data.train, material.data.held_out
    rows = []
    tokens = train.lengths()
    longest_sides = tokens[:, 0] + tokens[:, 1:].max(axis=1)
    for name, lengths in zip(LENGTHS, [*tokens.T, longest_sides], strict=True):
        quantiles = np.percentile(lengths, [50, 90, 99, 100], method="nearest").astype(int)
        rows.append([name, *(f"{value:,}" for value in quantiles)])
    reporter.grid(["tokens", "p50", "p90", "p99", "max"], rows)
    longest = train.longest(config.batch_size)
    _work(context, learner, longest, forward_backward)
    peak = describe_peak_memory(learner.batcher.device)
    typical = material.batch(next(material.schedule.batches(0, 1)))
    started = time.perf_counter()
    _work(context, learner, typical, forward_backward)
    seconds = time.perf_counter() - started
    steps, every = material.total_steps, config.eval_every
    evaluations = 1 + ((steps - 1) // every if every else 0)
    # No backward pass: two of the four forward passes' worth of work that a step is.
    evaluation = evaluations * len(held_out) / len(typical) * seconds / 2
    of_optimizer = significant(_optimizer_gib(context, learner))
    reporter.say()
    reporter.facts(
        [
            ("longest", f"{plural(longest_side(longest[0]), 'token')}: the longest batch fits, forward and backward"),
            ("memory", f"peak {peak} so far; the optimizer adds {of_optimizer}"),
            (
                "time",
                f"about {duration(seconds * steps + evaluation)}: {plural(steps, 'step')} of "
                f"{duration(seconds)}, and {plural(evaluations, 'evaluation')} of "
                f"{plural(len(held_out), 'held-out pair')}"
                + (", and their generated answers on top" if config.samples.n and held_out else "")
                + ("; less where reference log-probs are on disk" if config.reference.cache != "off" else ""),
            ),
            ("dry run", "nothing was trained, and only tokens were kept in the cache; leave dry_run out to start"),
        ]
    )


def _work(context: Context, learner: Learner, batch: list[TokenizedPair], forward_backward: ForwardBackward) -> None:
    until_it_fits(context, learner, lambda: forward_backward(context, learner, batch))
    learner.optimizer.zero_grad(set_to_none=True)
    wait_for(learner.batcher.device)  # the clock must not stop before the work does


def _optimizer_gib(context: Context, learner: Learner) -> float:
    """The size of the optimizer's state in float32."""
    values = STATE_VALUES.get(context.config.optimizer.name, 2)
    return values * 4 * sum(local(weight).numel() for weight in learner.trainable) / 2**30
