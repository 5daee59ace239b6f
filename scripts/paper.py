"""From PPO to DPO, shown: both climb one objective, and end at one policy.

Part 1, tables: 16 prompts with 32 responses each, where the best policy is known in closed form. On the frontier of
reward against KL it shows DPO, the exact policy gradient that PPO estimates, and both with the noise of samples.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import NO_FIGURE, can_draw, panels
from tabular import (
    Position,
    climb,
    climb_sampled,
    expected_shortfall,
    fit_dpo,
    frontier,
    highest_reward,
    objective,
    optimum,
    position,
    preference_probabilities,
    sample_preferences,
)
from torch import Tensor

from dpo_cli.theory import bradley_terry

PROMPTS, RESPONSES = 16, 32
BETAS = (0.1, 0.25, 0.5, 2.0)  # in units of reward, whose standard deviation over responses is about 1
EDGE_BETAS = tuple(np.geomspace(0.02, 50, 200).tolist())  # spaced by 4%: the frontier to some four digits
ITERATIONS = (10, 100, 1000, 10_000)  # of the exact gradient
SAMPLED_BETA = 0.5
LABELS = (500, 2000, 8000, 32_000)  # sampled preferences per prompt; there are 496 pairs of responses
LEARNED_FROM = 2000  # labels per prompt: those that the reward model of the two-stage way is fitted to
STEPS = (0.3, 1.0, 3.0)  # of the sampled gradient; a step of 10 goes astray
LEARNED_STEP = 1.0
DRAWS = 4  # responses per prompt and step of the sampled gradient
QUERIES = (64, 256, 1024, 4096, 16_384)  # rewards asked for per prompt; DRAWS times the number of steps
RESOLUTION = 1e-10  # differences below are rounding; printed as a bound, they look alike on every machine

# Okabe and Ito's palette: told apart with any colour vision; the markers differ as well.
COLORS = dict(zip(BETAS, ("#D55E00", "#CC79A7", "#009E73", "#0072B2"), strict=True))
MARKERS = dict(zip(BETAS, ("o", "D", "s", "^"), strict=True))
DPO, GRADIENT, GREY = "#009E73", "#E69F00", "#9a9a9a"


@dataclass(frozen=True)
class World:
    """What is to be learned: P prompts, all alike likely, and for each the reference and the reward of R responses."""

    reference_logps: Tensor  # (P, R) float64
    rewards: Tensor  # (P, R) float64

    @classmethod
    def drawn(cls, seed: int = 0) -> "World":
        """Logits of the reference and rewards are standard normal, independent of each other."""
        generator = torch.Generator().manual_seed(seed)
        logits, rewards = torch.randn(2, PROMPTS, RESPONSES, generator=generator, dtype=torch.float64)
        return cls(logits.log_softmax(-1), rewards)

    def position(self, logps: Tensor) -> Position:
        """KL and reward, means over prompts, (...) for `logps` (..., P, R)."""
        return position(logps, self.reference_logps, self.rewards).mean()

    def frontier(self, betas: Sequence[float]) -> Position:
        """KL and reward of the best policies, means over prompts, (B,)."""
        return frontier(self.reference_logps, self.rewards, betas).mean()

    def limit(self, beta: float) -> float:
        """The greatest objective there is: beta log Z, mean over prompts."""
        return float(beta * optimum(self.reference_logps, self.rewards, beta).log_partition.mean())

    def shortfall(self, logps: Tensor, beta: float) -> Tensor:
        """How far the objective is below the greatest, mean over prompts, (...) for `logps` (..., P, R)."""
        return self.limit(beta) - objective(logps, self.reference_logps, self.rewards, beta).mean(-1)

    def below_frontier(self, at: Position) -> Tensor:
        """How much reward the frontier offers at the same KL and the policy has not, (...)."""
        return highest_reward(at.kl, EDGE_BETAS, self.frontier(EDGE_BETAS)) - at.reward


@dataclass(frozen=True)
class Climb:
    """A climb, watched at some of its iterations; the dimensions after the first are repeats."""

    iterations: list[int]
    positions: Position  # (iterations, ...)
    shortfalls: Tensor  # (iterations, ...)

    def shortfall_after(self, iterations: int) -> float:
        """The mean over repeats."""
        return float(self.shortfalls[self.iterations.index(iterations)].mean())


@dataclass(frozen=True)
class Labelled:
    """DPO on sampled preferences, so many per prompt; one policy for each repeat."""

    positions: Position  # (repeats,)
    shortfalls: Tensor  # (repeats,)
    below_frontier: Tensor  # (repeats,)
    expected: float  # shortfall, from the Fisher information of a label


@dataclass(frozen=True)
class PartOne:
    """All numbers of the tables and the figure."""

    world: World
    dpo: dict[float, Tensor]  # beta: log pi, (P, R), from exact preferences
    gradient: dict[float, Climb]  # beta: along the exact gradient
    labelled: dict[int, Labelled]  # labels per prompt
    sampled: dict[float, Climb]  # step: along the sampled gradient, the reward known
    learned: Climb  # along the sampled gradient, step 1, the reward learned from LEARNED_FROM labels per prompt
    two_stage_difference: float  # |pi - pi_DPO| at most: pi* of the learned rewards, and DPO from the same labels


def spaced(*needed: int) -> list[int]:
    """Iterations to watch: these, and some fifty more, evenly spaced on a log scale."""
    return sorted({0, *needed, *np.geomspace(1, max(needed), 60).astype(int).tolist()})


def watched(policies: Iterator[Tensor], at: Sequence[int], world: World, beta: float) -> Climb:
    """Follow a climb to the last of the iterations `at`, and keep where it stood at each of them."""
    wanted = set(at)
    logps = torch.stack([logps for number, logps in enumerate(islice(policies, max(wanted) + 1)) if number in wanted])
    return Climb(sorted(wanted), world.position(logps), world.shortfall(logps, beta))


def sampled_labels(world: World, number: int, repeats: int) -> Tensor:
    """How often i was preferred to j, (repeats, P, R, R), in `number` labels per prompt: the same at every call."""
    return sample_preferences(world.rewards.expand(repeats, -1, -1), number, np.random.default_rng(number))


def measure_labelled(world: World, number: int, repeats: int) -> Labelled:
    """Fit `repeats` policies, each to labels of its own."""
    references = world.reference_logps.expand(repeats, -1, -1)
    policies = fit_dpo(references, sampled_labels(world, number, repeats), SAMPLED_BETA)
    positions = world.position(policies)
    return Labelled(
        positions,
        world.shortfall(policies, SAMPLED_BETA),
        world.below_frontier(positions),
        float(expected_shortfall(world.reference_logps, world.rewards, SAMPLED_BETA, number).mean()),
    )


def learned_rewards(labels: Tensor) -> Tensor:
    """The reward model: Bradley-Terry's maximum-likelihood rewards of each table of labels, shaped (..., R)."""
    tables = labels.flatten(0, -3)
    return torch.stack([bradley_terry.fit(table).log_strengths for table in tables]).view(labels.shape[:-1])


def measure(repeats: int) -> PartOne:
    """Everything that part one shows."""
    world = World.drawn()
    reference = world.reference_logps
    wins = preference_probabilities(world.rewards)

    def climb_once(beta: float) -> Climb:
        return watched(climb(reference, world.rewards, beta), spaced(*ITERATIONS), world, beta)

    def climb_by_samples(rewards: Tensor, step: float) -> Climb:
        rng = np.random.default_rng(0)
        references = reference.expand(repeats, -1, -1)
        policies = climb_sampled(references, rewards, SAMPLED_BETA, draws=DRAWS, step=step, rng=rng)
        return watched(policies, spaced(*(number // DRAWS for number in QUERIES)), world, SAMPLED_BETA)

    labels = sampled_labels(world, LEARNED_FROM, repeats)
    rewards = learned_rewards(labels)
    two_stages = optimum(reference, rewards, SAMPLED_BETA).logps
    one_stage = fit_dpo(reference.expand(repeats, -1, -1), labels, SAMPLED_BETA)
    return PartOne(
        world=world,
        dpo={beta: fit_dpo(reference, wins, beta) for beta in BETAS},
        gradient={beta: climb_once(beta) for beta in BETAS},
        labelled={number: measure_labelled(world, number, repeats) for number in LABELS},
        sampled={step: climb_by_samples(world.rewards, step) for step in STEPS},
        learned=climb_by_samples(rewards, LEARNED_STEP),
        two_stage_difference=float((two_stages.exp() - one_stage.exp()).abs().max()),
    )


def bound(difference: float) -> str:
    """The number, or that it is too small to be more than rounding."""
    return f"< {RESOLUTION:.0e}" if difference < RESOLUTION else f"{difference:.1e}"


def exact_table(world: World, dpo: dict[float, Tensor]) -> str:
    """For each beta, the point of the frontier and how near to it DPO comes when the preferences are exact."""
    lines = [
        f"exact preferences; means over {PROMPTS} prompts of {RESPONSES} responses",
        "      the frontier at pi*                     DPO, off by",
        " beta  KL(pi*||ref)      E[r]  beta log Z       KL     E[r]  |pi - pi*|",
    ]
    for beta, logps in dpo.items():
        edge, found = world.frontier([beta]), world.position(logps)
        best = optimum(world.reference_logps, world.rewards, beta).logps
        lines.append(
            f"{beta:>5}  {float(edge.kl):>12.6f}  {float(edge.reward):>8.6f}  {world.limit(beta):>10.6f}"
            f"  {bound(float((found.kl - edge.kl).abs())):>7}  {bound(float((found.reward - edge.reward).abs())):>7}"
            f"  {bound(float((logps.exp() - best.exp()).abs().max())):>10}"
        )
    return "\n".join(lines)


def gradient_table(gradient: dict[float, Climb]) -> str:
    """How far the exact gradient is from the end, by iterations."""
    lines = [
        "the exact policy gradient: short of beta log Z by, after so many iterations",
        " beta" + "".join(f"  {number:>8,}" for number in ITERATIONS),
    ]
    for beta, path in gradient.items():
        lines.append(f"{beta:>5}" + "".join(f"  {path.shortfall_after(number):>8.1e}" for number in ITERATIONS))
    return "\n".join(lines)


def labelled_table(labelled: dict[int, Labelled], fastest: Climb, two_stage_difference: float) -> str:
    """DPO's shortfall by the number of labels."""
    lines = [
        f"DPO on sampled preferences, beta {SAMPLED_BETA}; short of beta log Z; means over "
        f"{len(next(iter(labelled.values())).shortfalls)} repeats",
        "labels per prompt  KL(pi||ref)      E[r]  below frontier  short by  expected  rewards for the gradient",
    ]
    for number, fits in labelled.items():
        where, short = fits.positions.mean(), float(fits.shortfalls.mean())
        lines.append(
            f"{number:>17,}  {float(where.kl):>11.4f}  {float(where.reward):>8.4f}"
            f"  {float(fits.below_frontier.mean()):>14.4f}  {short:>8.4f}  {fits.expected:>8.4f}"
            f"  {queries_for(short, fastest):>24}"
        )
    lines.append(
        f"a reward model of the same {LEARNED_FROM:,} labels, then its pi*: off DPO's policy by "
        f"{bound(two_stage_difference)}"
    )
    return "\n".join(lines)


def queries_for(shortfall: float, path: Climb) -> str:
    """How many rewards per prompt the sampled gradient had asked for when it was first seen as near as this."""
    near = (path.shortfalls.mean(-1) <= shortfall).nonzero()
    return f"{path.iterations[int(near[0])] * DRAWS:,}" if len(near) else f"> {path.iterations[-1] * DRAWS:,}"


def sampled_table(numbers: PartOne) -> str:
    """How far the sampled gradient is from the end, by the rewards asked for."""
    lines = [
        f"the sampled policy gradient, beta {SAMPLED_BETA}, {DRAWS} draws a step: short of beta log Z by",
        "rewards asked for          known reward          reward learned from",
        "       per prompt"
        + "".join(f"  step {step}" for step in STEPS)
        + f"   {LEARNED_FROM:,} labels, step {LEARNED_STEP}",
    ]
    for number in QUERIES:
        known = "".join(f"  {path.shortfall_after(number // DRAWS):>8.4f}" for path in numbers.sampled.values())
        lines.append(f"{number:>17,}{known}  {numbers.learned.shortfall_after(number // DRAWS):>23.4f}")
    return "\n".join(lines)


def draw(numbers: PartOne, path: Path) -> None:
    """Three panels: exact, sampled, and how fast."""
    with panels(path, 3, (13.2, 4.5), "paper") as (left, middle, right):
        _draw_exact(left, numbers)
        _draw_sampled(middle, numbers)
        _draw_shortfalls(right, numbers)


def _draw_exact(axes: Any, numbers: PartOne) -> None:
    edge = numbers.world.frontier(EDGE_BETAS)
    axes.plot(edge.kl, edge.reward, color=GREY, linewidth=4, alpha=0.5, label="frontier")
    for beta, logps in numbers.dpo.items():
        path, end = numbers.gradient[beta].positions, numbers.world.position(logps)
        axes.plot(path.kl, path.reward, color=COLORS[beta])
        axes.plot(end.kl, end.reward, MARKERS[beta], color=COLORS[beta], label=f"β = {beta}")
    axes.set(
        title="DPO (markers), exact gradient (lines)",
        xlabel="KL(π ‖ π$_{ref}$) in nats",
        ylabel="expected reward",
        xlim=(-0.1, 3.5),
    )
    axes.legend(loc="lower right")


def _draw_sampled(axes: Any, numbers: PartOne) -> None:
    edge = numbers.world.frontier(EDGE_BETAS)
    axes.plot(edge.kl, edge.reward, color=GREY, linewidth=4, alpha=0.5)
    positions = numbers.sampled[LEARNED_STEP].positions
    for repeat in range(min(3, positions.kl.shape[-1])):
        label = "sampled gradient" if repeat == 0 else None
        axes.plot(positions.kl[:, repeat], positions.reward[:, repeat], color=GRADIENT, linewidth=1, label=label)
    for shade, (number, fits) in zip((0.25, 0.5, 0.75, 1), numbers.labelled.items(), strict=True):
        axes.plot(
            fits.positions.kl, fits.positions.reward, "o",
            color=DPO, alpha=shade, markersize=5, markeredgewidth=0, label=f"DPO, {number:,} labels",
        )  # fmt: skip
    axes.set(
        title=f"From samples, β = {SAMPLED_BETA}",
        xlabel="KL(π ‖ π$_{ref}$) in nats",
        ylabel="expected reward",
        xlim=(0.8, 2.0),
        ylim=(1.1, 1.85),
    )
    axes.legend(loc="lower right")


def _draw_shortfalls(axes: Any, numbers: PartOne) -> None:
    means = [float(fits.shortfalls.mean()) for fits in numbers.labelled.values()]
    axes.loglog(LABELS, means, "o", color=DPO, label="DPO")
    axes.loglog(
        LABELS, [fits.expected for fits in numbers.labelled.values()], color=GREY, zorder=1, label="DPO, expected"
    )
    for path, line, label in [
        (numbers.sampled[LEARNED_STEP], "-", "gradient"),
        (numbers.learned, "--", "gradient, learned reward"),
    ]:
        axes.loglog(
            [number * DRAWS for number in path.iterations[1:]], path.shortfalls[1:].mean(-1), line,
            color=GRADIENT, label=label,
        )  # fmt: skip
    axes.minorticks_off()
    axes.set(
        title="Short of the greatest objective by",
        xlabel="labels, or rewards read, per prompt",
        ylabel="β log Z − J(π)",
        ylim=(1e-4, 1.5),
    )
    axes.legend(loc="lower left")


def main(words: Sequence[str] | None = None) -> None:
    """Print the tables, and draw the figure where matplotlib is installed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("docs"), help="where the figure goes")
    parser.add_argument("--repeats", type=int, default=16, help="independent draws of everything that is sampled")
    args = parser.parse_args(words)

    numbers = measure(args.repeats)
    fastest = numbers.sampled[STEPS[-1]]
    print(
        exact_table(numbers.world, numbers.dpo),
        gradient_table(numbers.gradient),
        labelled_table(numbers.labelled, fastest, numbers.two_stage_difference),
        sampled_table(numbers),
        sep="\n\n",
    )
    if not can_draw():
        sys.exit(NO_FIGURE)
    figure = args.folder / "paper-tabular.svg"
    draw(numbers, figure)
    print(f"\nwrote {figure}")


if __name__ == "__main__":
    main()
