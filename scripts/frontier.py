"""From PPO to DPO, shown, part 2: the whole way with a real model, and what it earns against how far it goes.

By the commands alone: a reward model, answers sampled from the reference, labels sampled from the reward model, DPO at
several betas, answers of all policies to held-out prompts. The reward of those answers is set against the sequence KL,
E_{y ~ pi} [log pi(y|x) - log pi_ref(y|x)], beside what choosing the best of n reference answers earns.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from figures import NO_FIGURE, can_draw, panels

from dpo_cli.cli import quiet_libraries
from dpo_cli.console.reporter import Reporter
from dpo_cli.data.formats import FinishReason
from dpo_cli.data.samples import Sample, read_samples
from dpo_cli.labelling.judges import load_judge
from dpo_cli.theory.statistics import Estimate, mean_estimate

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
BEST_OF = (2, 4, 8)
BLUE, GREEN, GREY = "#0072B2", "#009E73", "#9a9a9a"


@dataclass(frozen=True)
class Player:
    """A policy on the held-out prompts."""

    name: str
    kl: Estimate  # of a whole answer to the reference's, in nats
    reward: Estimate
    more: Estimate  # than the reference earns on the same prompts


def run(folder: Path, name: str, command: str, *words: str) -> None:
    """One command of the program, its output in `folder/name.log`; leaves with its code where it fails."""
    log = folder / f"{name}.log"
    function = {"train": "train", "eval": "evaluate", "sample": "sample", "label": "label", "rank": "rank"}[command]
    started = time.monotonic()
    print(f"dpo-{command} {' '.join(words)}", flush=True)
    with log.open("a", encoding="utf-8") as file:
        program = f"from dpo_cli.cli import {function}; {function}()"
        code = subprocess.run([sys.executable, "-c", program, *words], stdout=file, stderr=file, check=False).returncode
    if code:
        print(log.read_text(encoding="utf-8").splitlines()[-1], file=sys.stderr)
        sys.exit(code)
    print(f"    {time.monotonic() - started:.0f} s, {log}", flush=True)


def train(folder: Path, name: str, *words: str) -> Path:
    """A training run in `folder/name`; a stopped one is resumed."""
    resume = ("resume=auto",) if (folder / name).is_dir() else ()
    run(folder, name, "train", *words, f"output_dir={folder / name}", *resume)
    return folder / name


def implicit(checkpoint: Path, samples: Sequence[Sample]) -> list[list[float]]:
    """log pi/pi_ref of every response, in nats: the implicit reward over beta."""
    with redirect_stdout(StringIO()):
        judge = load_judge(str(checkpoint), "implicit", "auto", "auto", False, Reporter(StringIO()))
        rewards = judge.rewards(samples, lambda: None)
    return [[reward / float(judge.facts["beta"]) for reward in row] for row in rewards]


def explicit(judge: Path, samples: Sequence[Sample]) -> list[list[float]]:
    """The reward model's reward of every response."""
    with redirect_stdout(StringIO()):
        return load_judge(str(judge), "reward", "auto", "auto", False, Reporter(StringIO())).rewards(
            samples, lambda: None
        )


def measured(answers: Path, runs: Sequence[Path]) -> list[Player]:
    """The reward and the KL of every policy; the first one is the reference."""
    rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    names = ["reference", *(path.name for path in runs)]
    players = []
    for index, name in enumerate(names):
        rewards = [row["rewards"][index] for row in rows]
        more = [row["rewards"][index] - row["rewards"][0] for row in rows]
        kl = Estimate(0.0, 0.0, 0.0, len(rows))
        if index:
            own = [
                Sample(
                    row["id"], row["prompt"], (row["responses"][index],), (FinishReason(row["finish_reason"][index]),)
                )
                for row in rows
            ]
            kl = mean_estimate([row[0] for row in implicit(runs[index - 1], own)])
        players.append(Player(name, kl, mean_estimate(rewards), mean_estimate(more)))
    return players


def best_of(samples: Path, judge: Path) -> list[tuple[int, float, Estimate]]:
    """n, KL and reward of choosing the best of n answers of the reference, over the prompts that have so many.

    Of independent answers the KL is at most log n - (n-1)/n (A. Beirami et al., https://arxiv.org/abs/2401.01879);
    these are generated to differ.
    """
    rewards = explicit(judge, read_samples(samples))
    found = []
    for number in BEST_OF:
        best = [max(row[:number]) for row in rewards if len(row) >= number]
        found.append((number, math.log(number) - (number - 1) / number, mean_estimate(best)))
    return found


def table(players: Sequence[Player], others: Sequence[tuple[int, float, Estimate]]) -> str:
    """Reward against KL, with 95% intervals."""
    lines = ["policy        sequence KL (nats)        reward                    more than the reference"]
    for one in players:
        lines.append(f"{one.name:<12}  {_shown(one.kl):<24}  {_shown(one.reward):<24}  {_shown(one.more)}")
    lines += [f"best of {n:<4}  {f'some {kl:.2f}':<24}  {_shown(reward)}" for n, kl, reward in others]
    return "\n".join(lines)


def _shown(one: Estimate) -> str:
    return f"{one.mean:.3f} ({one.low:.3f}, {one.high:.3f})"


def draw(players: Sequence[Player], others: Sequence[tuple[int, float, Estimate]], path: Path) -> None:
    """The points with their 95% intervals."""
    with panels(path, 1, (4.4, 4.5), "paper") as (axes,):
        reference = players[0].reward.mean
        kls = [0.0, *(kl for _, kl, _ in others)]
        axes.plot(kls, [reference, *(reward.mean for _, _, reward in others)], "--", color=GREY, zorder=1)
        for number, kl, reward in others:
            axes.annotate(f"best of {number}", (kl, reward.mean), xytext=(6, -12), textcoords="offset points",
                          color=GREY, fontsize=10)  # fmt: skip
        for one in players:
            errors: dict[str, Any] = {
                "xerr": [[one.kl.mean - one.kl.low], [one.kl.high - one.kl.mean]],
                "yerr": [[one.reward.mean - one.reward.low], [one.reward.high - one.reward.mean]],
            }
            color = BLUE if one is players[0] else GREEN
            axes.errorbar(one.kl.mean, one.reward.mean, fmt="o", color=color, capsize=2, **errors)
            axes.annotate(one.name.replace("beta-", "β = "), (one.kl.mean, one.reward.mean), xytext=(6, 6),
                          textcoords="offset points", color=color)  # fmt: skip
        axes.set(title="Reward of sampled answers", xlabel="sequence KL to the reference, nats", ylabel="reward")


def main(words: Sequence[str] | None = None) -> None:
    """Go the whole way; what is there already is not done again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("outputs/paper"), help="where everything goes")
    parser.add_argument("--model", default="smollm2", help="a choice of conf/model")
    parser.add_argument("--name", default=SMOLLM2, help="the same model as a folder or hub id")
    parser.add_argument("--pairs", default="sample:train", help="pairs for the reward model; prompts to sample")
    parser.add_argument("--held-out", default="sample:test", help="pairs to evaluate it on; prompts to compare on")
    parser.add_argument("--judge", type=Path, help="a reward model's run, where there is one already")
    parser.add_argument("--prompts", type=int, default=240, help="prompts that are sampled and labelled")
    parser.add_argument("--answers", type=int, default=2, help="to a prompt; of more than two the best and the worst")
    parser.add_argument(
        "--labels", default="sampled", choices=("sampled", "best"), help="best suits a judge unsure of itself"
    )
    parser.add_argument("--compared", type=int, default=100, help="held-out prompts that the policies answer")
    parser.add_argument("--betas", nargs="+", default=["0.03", "0.1", "0.3"])
    parser.add_argument("--lr", default="1e-4", help="of the reward model and of DPO")
    parser.add_argument("--epochs", default="2", help="of DPO over the labelled pairs")
    parser.add_argument("--max-new-tokens", default="64")
    parser.add_argument("--figure", type=Path, default=Path("docs/paper-smollm2.svg"))
    args = parser.parse_args(words)
    folder = args.folder
    folder.mkdir(parents=True, exist_ok=True)

    model, limit, rate = f"model={args.model}", f"max_new_tokens={args.max_new_tokens}", f"optimizer.lr={args.lr}"
    of_pairs = ("data=jsonl", f"data.train={args.pairs}", f"data.eval={args.held_out}", "data.max_length=384")
    judge = args.judge or train(folder, "reward", "objective=reward", model, *of_pairs, rate)
    samples_file, labelled = folder / "samples.jsonl", folder / "pairs.jsonl"
    some = f"limit={args.prompts}"
    run(
        folder,
        "samples",
        "sample",
        model,
        f"prompts={args.pairs}",
        f"n={args.answers}",
        some,
        limit,
        f"output={samples_file}",
    )
    labelling = ("by=reward", f"judge={judge}", f"labels={args.labels}", "pairs=extremes")
    run(folder, "labels", "label", f"samples={samples_file}", *labelling, f"output={labelled}")
    fitting = ("data=jsonl", f"data.train={labelled}", "data.max_length=384", f"epochs={args.epochs}", rate,
               "data.split_by=prompt", "data.soft_labels=false")  # fmt: skip  # as for the published figures
    runs = [train(folder, f"beta-{beta}", model, *fitting, f"beta={beta}") for beta in args.betas]
    several = folder / "several.jsonl"
    held_out = (f"prompts={args.held_out}", f"limit={args.compared}", limit)
    run(folder, "several", "sample", model, *held_out, f"n={max(BEST_OF)}", f"output={several}")
    players = ",".join([args.name, *map(str, runs)])
    ranking = folder / "ranking.json"
    run(folder, "ranking", "rank", f"checkpoints=[{players}]", f"judge={judge}", *held_out, "prior=1",
        f"output={ranking}")  # fmt: skip

    quiet_libraries()
    found, others = measured(folder / "ranking.answers.jsonl", runs), best_of(several, judge)
    print(f"\n{table(found, others)}\n")
    if not can_draw():
        sys.exit(NO_FIGURE)
    draw(found, others, args.figure)
    print(f"wrote {args.figure}")


if __name__ == "__main__":
    main()
