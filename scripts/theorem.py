"""Show DPO's theorem in numbers and in a picture: the loss, minimised, gives the policy that the reward asks for.

One prompt with six responses, a reference that rates them the other way round than the reward does, and three
values of beta. DPO is told preferences, never the reward. First the exact Bradley-Terry probabilities, then ever
more sampled labels.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import NO_FIGURE, can_draw, panels
from tabular import (
    every_pair,
    fit_dpo,
    kl_divergence,
    objective,
    optimum,
    preference_probabilities,
    sample_preferences,
    sampling_error,
)
from torch import Tensor

from dpo_cli.theory.losses import implicit_rewards

BETAS = (0.1, 0.5, 2.0)
REWARDS = torch.tensor([-1.0, -0.6, -0.1, 0.3, 0.6, 0.8], dtype=torch.float64)
REFERENCE_LOGPS = torch.tensor([0.30, 0.25, 0.20, 0.13, 0.08, 0.04], dtype=torch.float64).log()
SAMPLED_BETA = 0.5
NUMBERS = tuple(100 * 2**doubling for doubling in range(9))  # preferences, 100 to 25,600
RESOLUTION = 1e-10  # differences below are rounding; printed as a bound, they look alike on every machine

# Okabe and Ito's palette: told apart with any colour vision; the markers differ as well.
COLORS = dict(zip(BETAS, ("#D55E00", "#009E73", "#0072B2"), strict=True))
MARKERS = dict(zip(BETAS, ("o", "s", "^"), strict=True))
GREY = "#9a9a9a"


@dataclass(frozen=True)
class Sampled:
    """How far policies fitted to sampled preferences are from pi*, for each of NUMBERS."""

    errors: list[float]  # root mean square over the repeats of the Euclidean distance |pi - pi*|
    predicted: list[float]  # the same from the Fisher information, proportional to 1/sqrt(number)
    slope: float  # of log error over log number, least squares


def fitted(beta: float) -> Tensor:
    """log pi, (R,), as DPO finds it from the exact preference probabilities."""
    return fit_dpo(REFERENCE_LOGPS, preference_probabilities(REWARDS), beta)


def implicit_reward(policy: Tensor, beta: float) -> Tensor:
    """beta log pi/pi_ref of each response, (R,)."""
    return implicit_rewards(every_pair(policy, REFERENCE_LOGPS), beta)[0][:, 0]


def measure_sampled(repeats: int, seed: int = 0) -> Sampled:
    """Fit `repeats` policies to as many independent draws of each number of preferences."""
    rng = np.random.default_rng(seed)
    best = optimum(REFERENCE_LOGPS, REWARDS, SAMPLED_BETA).logps.exp()
    errors = []
    for number in NUMBERS:
        counts = sample_preferences(REWARDS.expand(repeats, -1), number, rng)
        policies = fit_dpo(REFERENCE_LOGPS.expand(repeats, -1), counts, SAMPLED_BETA)
        errors.append(float((policies.exp() - best).square().sum(-1).mean().sqrt()))
    predicted = [float(sampling_error(REFERENCE_LOGPS, REWARDS, SAMPLED_BETA, number)) for number in NUMBERS]
    return Sampled(errors, predicted, float(np.polyfit(np.log(NUMBERS), np.log(errors), 1)[0]))


def exact_table() -> str:
    """For each beta, how near DPO comes to pi*, the reward and beta log Z when the preferences are exact."""

    def bound(difference: Tensor) -> str:
        worst = float(difference.abs().max())
        return f"< {RESOLUTION:.0e}" if worst < RESOLUTION else f"{worst:.1e}"

    lines = [
        "exact preferences",
        " beta  KL(pi||ref)  objective  beta log Z  |pi - pi*|  |implicit r - (r - beta log Z)|",
    ]
    for beta in BETAS:
        policy, best = fitted(beta), optimum(REFERENCE_LOGPS, REWARDS, beta)
        reached, limit = objective(policy, REFERENCE_LOGPS, REWARDS, beta), beta * best.log_partition
        lines.append(
            f"{beta:>5}  {float(kl_divergence(policy, REFERENCE_LOGPS)):>11.6f}  {float(reached):>9.6f}"
            f"  {float(limit):>10.6f}  {bound(policy.exp() - best.logps.exp()):>10}"
            f"  {bound(implicit_reward(policy, beta) - (REWARDS - limit)):>31}"
        )
    return "\n".join(lines)


def sampled_table(sampled: Sampled) -> str:
    """The error against the number of sampled preferences."""
    lines = [f"sampled preferences, beta {SAMPLED_BETA}", "preferences  |pi - pi*|  predicted  ratio"]
    for number, error, predicted in zip(NUMBERS, sampled.errors, sampled.predicted, strict=True):
        lines.append(f"{number:>11,}  {error:>10.5f}  {predicted:>9.5f}  {error / predicted:>5.2f}")
    return "\n".join([*lines, f"slope of log error over log number: {sampled.slope:.3f} (1/sqrt: -0.500)"])


def draw(sampled: Sampled, path: Path) -> None:
    """Three panels: DPO as markers, what the theory says as lines."""
    with panels(path, 3, (12, 4.3), "theorem") as (left, middle, right):
        _draw_policies(left)
        _draw_rewards(middle)
        _draw_errors(right, sampled)


def _draw_policies(axes: Any) -> None:
    responses = np.arange(1, len(REWARDS) + 1)
    axes.bar(responses, REFERENCE_LOGPS.exp().numpy(), width=0.8, color="#e0e0e0", label="reference")
    for beta in BETAS:
        best = optimum(REFERENCE_LOGPS, REWARDS, beta).logps.exp().numpy()
        axes.plot(responses, best, color=COLORS[beta])
        axes.plot(
            responses, fitted(beta).exp().numpy(), MARKERS[beta], color=COLORS[beta], label=f"β = {beta}", clip_on=False
        )
    axes.set(
        title="DPO (markers) arrives at π* (lines)",
        xlabel="response, by rising reward",
        ylabel="probability",
        xticks=responses,
        ylim=(0, 0.85),
    )
    axes.legend(loc="upper left")


def _draw_rewards(axes: Any) -> None:
    rewards = REWARDS.numpy()
    for beta in BETAS:
        limit = float(beta * optimum(REFERENCE_LOGPS, REWARDS, beta).log_partition)
        implicit = implicit_reward(fitted(beta), beta).numpy()
        axes.plot(rewards, rewards - limit, color=COLORS[beta])
        axes.plot(rewards, implicit, MARKERS[beta], color=COLORS[beta], label=f"β = {beta}")
    axes.set(
        title="Its reward is r − β log Z (lines)",
        xlabel="reward r",
        ylabel="implicit reward  β log π / π$_{ref}$",
        xticks=(-1, -0.5, 0, 0.5),
    )
    axes.legend(loc="upper left")


def _draw_errors(axes: Any, sampled: Sampled) -> None:
    beta = SAMPLED_BETA
    axes.loglog(
        NUMBERS,
        sampled.errors,
        MARKERS[beta],
        color=COLORS[beta],
        label=f"β = {beta}, slope {sampled.slope:.2f}".replace("-", "−"),
    )
    axes.loglog(NUMBERS, sampled.predicted, color=GREY, zorder=1, label="expected from\nFisher information")
    axes.minorticks_off()
    axes.set_xticks((100, 1000, 10000), ("100", "1,000", "10,000"))
    axes.set_yticks((0.01, 0.02, 0.05, 0.1, 0.2), ("0.01", "0.02", "0.05", "0.1", "0.2"))
    axes.set(
        title="The error falls as 1/√N (line)",
        xlabel="sampled preferences N",
        ylabel="error  |π − π*|",
        ylim=(0.01, 0.5),
    )
    axes.legend(loc="lower left")


def main(words: Sequence[str] | None = None) -> None:
    """Print the two tables and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", type=Path, default=Path("docs/theorem.svg"), help="where to draw: .svg or .png")
    parser.add_argument("--repeats", type=int, default=400, help="policies fitted per number of sampled preferences")
    args = parser.parse_args(words)

    sampled = measure_sampled(args.repeats)
    print(exact_table(), sampled_table(sampled), sep="\n\n")
    if not can_draw():
        sys.exit(NO_FIGURE)
    draw(sampled, args.figure)
    print(f"\nwrote {args.figure}")


if __name__ == "__main__":
    main()
