"""Iterated DPO by the program's commands: each round samples from the last policy, labels, trains, and begins there.

Round k: answers of policy k-1, labelled by the judge, DPO with policy k-1, merged into one model, as start and as
reference. After each round the policies answer held-out prompts, and the judge ranks them.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from frontier import SMOLLM2, run, train

from dpo_cli.labelling.rules import RULES
from dpo_cli.theory.statistics import mean_estimate


def main(words: Sequence[str] | None = None) -> None:
    """Some rounds; what is there already is not done again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", required=True, help="a reward model's run, or a rule such as shorter")
    parser.add_argument("--folder", type=Path, default=Path("outputs/iterate"), help="where everything goes")
    parser.add_argument("--model", default="smollm2", help="a choice of conf/model")
    parser.add_argument("--name", default=SMOLLM2, help="the same model as a folder or hub id")
    parser.add_argument("--prompts", default="sample:train", help="a file of prompts to learn on")
    parser.add_argument("--held-out", default="sample:test", help="a file of prompts to compare on")
    parser.add_argument("--each", type=int, default=80, help="prompts a round, each round others")
    parser.add_argument("--compared", type=int, default=100, help="held-out prompts")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--beta", default="0.1")
    parser.add_argument("--lr", default="1e-4")
    parser.add_argument("--max-new-tokens", default="64")
    args = parser.parse_args(words)
    folder = args.folder
    folder.mkdir(parents=True, exist_ok=True)
    rule = args.judge in RULES

    limit = f"max_new_tokens={args.max_new_tokens}"
    policies: list[Path] = []
    for number in range(1, args.rounds + 1):
        drawn, labelled = folder / f"samples-{number}.jsonl", folder / f"pairs-{number}.jsonl"
        policy = (f"checkpoint={policies[-1]}",) if policies else (f"model={args.model}",)
        prompts = _part(args.prompts, folder, number, args.each)
        seed = f"seed={number}"
        run(folder, f"samples-{number}", "sample", *policy, f"prompts={prompts}", seed, limit, f"output={drawn}")
        by = ("by=rule", f"rule={args.judge}") if rule else ("by=reward", f"judge={args.judge}")
        run(folder, f"labels-{number}", "label", f"samples={drawn}", *by, f"output={labelled}")
        start = _start(folder, policies, number)
        dials = (f"model={args.model}", *start, "data=jsonl", f"data.train={labelled}", "data.max_length=384",
                 "data.soft_labels=false")  # fmt: skip
        policies.append(train(folder, f"round-{number}", *dials, f"beta={args.beta}", f"optimizer.lr={args.lr}"))
    players = ",".join([args.name, *map(str, policies)])
    run(folder, "ranking", "rank", f"checkpoints=[{players}]", f"judge={args.judge}", f"prompts={args.held_out}",
        f"limit={args.compared}", limit, "prior=1", f"output={folder / 'ranking.json'}")  # fmt: skip
    print()
    print("\n".join(_figures(folder, ["reference", *(path.name for path in policies)])))


def _part(prompts: str, folder: Path, number: int, each: int) -> Path:
    """The prompts of one round: the next `each` of the file."""
    from dpo_cli.data.prompts import read_prompts

    found, _ = read_prompts(prompts, None, False)
    path = folder / f"prompts-{number}.jsonl"
    rows = [json.dumps({"prompt": prompt.written}) + "\n" for prompt in found[(number - 1) * each : number * each]]
    path.write_text("".join(rows), encoding="utf-8")
    return path


def _start(folder: Path, policies: list[Path], number: int) -> tuple[str, ...]:
    """Where a round begins: at the policy of the round before, merged into one model with all that was before it."""
    if not policies:
        return ()
    merged = folder / f"start-{number}"
    if not merged.is_dir():
        _merge(policies[-1], merged)
    return (f"model.name_or_path={merged}",)


def _merge(policy: Path, folder: Path) -> None:
    """A run's policy as one model: `model.adapter` folds in a single adapter, and a third round would need two."""
    from dataclasses import replace

    import torch

    from dpo_cli.models.loading import find_model, load_model, load_tokenizer
    from dpo_cli.runs.model_ref import ModelName, find_model_ref, load_policy

    subject = find_model_ref(ModelName(str(policy)))
    source = find_model(replace(subject.base, quantization="none"))  # packed weights cannot take a merge
    base = load_model(source, torch.float32, torch.device("cpu"))  # a merge in bfloat16 would round small changes away
    merged = load_policy(subject, base, torch.float32, torch.device("cpu")).merge_and_unload()
    beside = folder.with_name(f".tmp-{folder.name}")
    merged.save_pretrained(beside)
    load_tokenizer(source).save_pretrained(beside)
    beside.rename(folder)


def _figures(folder: Path, names: Sequence[str]) -> list[str]:
    rows = [json.loads(line) for line in (folder / "ranking.answers.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = ["policy      reward                    more than before          words"]
    for place, name in enumerate(names):
        rewards = mean_estimate([row["rewards"][place] for row in rows])
        more = mean_estimate([row["rewards"][place] - row["rewards"][max(0, place - 1)] for row in rows])
        words = sum(len(row["responses"][place].split()) for row in rows) / len(rows)
        shown = [f"{one.mean:.3f} ({one.low:.3f}, {one.high:.3f})" for one in (rewards, more)]
        lines.append(f"{name:<10}  {shown[0]:<24}  {shown[1] if place else '':<24}  {words:.1f}")
    return lines


if __name__ == "__main__":
    main()
