"""The longest batch forward and backward before anything is trained; dry_run stops there, with an estimate."""

import time

import numpy as np
import torch

from dpo_cli.console.text import duration, plural, significant
from dpo_cli.data.batches import longest_side
from dpo_cli.data.tokens import TokenizedPair
from dpo_cli.models.loading import wait_for
from dpo_cli.models.memory import peak_memory_in_words
from dpo_cli.runs.checkpoint import rng_states, set_rng_states
from dpo_cli.training.build import trained_batches
from dpo_cli.training.run import Run
from dpo_cli.training.step import cut_until_it_fits, forward_backward


def rehearse_longest(run: Run) -> None:
    """Forward and backward of the largest pass that can come: memory that will run out does so in the first seconds.

    The batch is cut finer until it fits; weights and random generators stay as they were. OutOfMemoryError where the
    longest pair alone does not fit.
    """
    trained_on = (pair for batch in trained_batches(run) for pair in batch)
    longest = sorted(trained_on, key=longest_side, reverse=True)[: run.config.batch_size]
    largest = longest[:1]
    for pair in longest[1:]:  # as many of the longest as still make one pass
        if len(run.batching.cut([*largest, pair])) == 1:
            largest.append(pair)
    rng = rng_states()
    # The optimizer's memory comes with the first update: until then something of its size stands in for it.
    on_cpu = run.device.type == "cpu"
    stand_in = None if on_cpu else torch.empty(int(_optimizer_gib(run) * 2**28), device=run.device)
    cut_until_it_fits(run, lambda: forward_backward(run, largest))
    del stand_in
    run.optimizer.zero_grad(set_to_none=True)
    set_rng_states(rng)


def rehearse(run: Run) -> None:
    """Show the lengths of the pairs, rehearse the longest batch, and estimate time and memory of the whole run."""
    rows = []
    for name, lengths in _lengths(run.data.train):
        quantiles = np.percentile(lengths, [50, 90, 99, 100], method="nearest").astype(int)
        rows.append([name, *(f"{value:,}" for value in quantiles)])
    run.reporter.grid(["tokens", "p50", "p90", "p99", "max"], rows)
    longest = sorted(run.data.train, key=longest_side, reverse=True)[: run.config.batch_size]
    _forward_backward(run, longest)
    peak = peak_memory_in_words(run.device)
    typical = [run.data.train[place] for place in next(run.schedule.batches(0, 1))]
    started = time.perf_counter()
    _forward_backward(run, typical)
    seconds = time.perf_counter() - started
    every = run.config.eval_every
    evaluations = 1 + ((run.total_steps - 1) // every if every else 0)
    # No backward pass: two of the four forward passes' worth of work that a step is.
    evaluation = evaluations * len(run.data.held_out) / len(typical) * seconds / 2
    run.reporter.say()
    run.reporter.facts(
        [
            ("longest", f"{plural(longest_side(longest[0]), 'token')}: the longest batch fits, forward and backward"),
            ("memory", f"peak {peak} so far; the optimizer adds {significant(_optimizer_gib(run))}"),
            (
                "time",
                f"about {duration(seconds * run.total_steps + evaluation)}: {plural(run.total_steps, 'step')} of "
                f"{duration(seconds)}, and {plural(evaluations, 'evaluation')} of "
                f"{plural(len(run.data.held_out), 'held-out pair')}"
                + ("; less where reference log-probs are on disk" if run.config.reference.cache != "off" else ""),
            ),
            ("dry run", "nothing was trained and nothing written; leave dry_run out to begin"),
        ]
    )


def _lengths(pairs: list[TokenizedPair]) -> list[tuple[str, list[int]]]:
    return [
        ("prompt", [len(pair.prompt) for pair in pairs]),
        ("chosen", [len(pair.chosen) for pair in pairs]),
        ("rejected", [len(pair.rejected) for pair in pairs]),
        ("prompt + longer", [longest_side(pair) for pair in pairs]),
    ]


def _forward_backward(run: Run, batch: list[TokenizedPair]) -> None:
    cut_until_it_fits(run, lambda: forward_backward(run, batch))
    run.optimizer.zero_grad(set_to_none=True)
    wait_for(run.device)  # the clock must not stop before the work does


def _optimizer_gib(run: Run) -> float:
    """Two float32 values a trained weight for AdamW, one for RMSprop, none for SGD."""
    values = {"adamw": 2, "rmsprop": 1, "sgd": 0}[run.config.optimizer.name]
    return values * 4 * sum(weight.numel() for weight in run.trainable) / 2**30
