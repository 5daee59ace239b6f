"""What several ranks cost and hold: bytes a rank of weights, gradients, optimizer, bytes sent and seconds a step.

    python scripts/bench_ranks.py [--rounds 2] [--steps 8] [--model smollm2] [--only ddp]

Every mode is a run of its own on the shipped pairs, in turns. Ranks of one computer share its cores: seconds say what
an engine costs, not how it scales. Sent are the whole buffers of torch's collectives in a step, on one rank; a ring
moves each of them once (gather, scatter) or twice (sum), less the rank's own part.
"""

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

WORDS = [
    "data=sample", "data.eval_fraction=0", "batch_size=8", "log_every=0", "data.max_length=256"
]  # fmt: skip
MODES: dict[str, list[str]] = {
    "single, LoRA": [],
    "ddp 1, LoRA": ["engine=ddp", "engine.processes=1"],
    "ddp 2, LoRA": ["engine=ddp", "engine.processes=2"],
    "fsdp 2, LoRA": ["engine=fsdp", "engine.processes=2"],
    "single, every weight": ["lora=off"],
    "ddp 2, every weight": ["lora=off", "engine=ddp", "engine.processes=2"],
    "fsdp 2, every weight": ["lora=off", "engine=fsdp", "engine.processes=2"],
    "fsdp 4, every weight": ["lora=off", "engine=fsdp", "engine.processes=4"],
}
SENDS = ("all_reduce", "reduce_scatter_single", "all_gather_single", "broadcast")


def measure(words: list[str], folder: Path) -> None:
    """Train as one rank and write down what it held and sent."""
    import torch
    import torch.distributed as dist

    from dpo_cli import cli
    from dpo_cli.engine.engine import local
    from dpo_cli.training import runner

    sent: dict[str, float] = defaultdict(float)

    def counted(name: str, original: Any) -> Any:
        def send(*arguments: Any, **more: Any) -> Any:
            given = [one.nbytes for one in (*arguments, *more.values()) if isinstance(one, torch.Tensor)]
            sent[name] += max(given)
            return original(*arguments, **more)

        return send

    for name in SENDS:
        setattr(dist, name, counted(name, getattr(dist, name)))
    steps: list[dict[str, float]] = []
    train_step = runner.train_step

    def bytes_of(tensors: Any) -> int:
        return sum(local(tensor).nbytes for tensor in tensors)

    def watched(context: Any, learner: Any, *others: Any) -> None:
        held: dict[str, float] = {"weights": bytes_of(learner.policy.parameters())}
        update = learner.optimizer.step

        def step_and_look(*arguments: Any) -> Any:
            held["gradients"] = bytes_of(one.grad for one in learner.trainable if one.grad is not None)
            return update(*arguments)

        learner.optimizer.step = step_and_look
        sent.clear()
        started = time.perf_counter()
        train_step(context, learner, *others)
        held["seconds"] = time.perf_counter() - started
        learner.optimizer.step = update
        state = [value for values in learner.optimizer.state.values() for value in values.values()]
        held["optimizer"] = bytes_of(value for value in state if isinstance(value, torch.Tensor))
        steps.append({**held, **{f"sent {name}": value for name, value in sent.items()}})

    runner.train_step = watched  # type: ignore[assignment]
    sys.argv = ["dpo-train", *words]
    try:
        cli.train()
    finally:
        from dpo_cli.models.memory import peak_memory_gib

        last = {**steps[-1], "seconds": statistics.median(step["seconds"] for step in steps[1:])}
        last["peak"] = (peak_memory_gib(torch.device("cpu")) or 0) * 2**30
        (folder / f"rank-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(last), encoding="utf-8")


def run(words: list[str]) -> list[dict[str, float]]:
    """What each rank of a run has measured."""
    from dpo_cli.engine.workers import start_workers

    processes = next((int(word.split("=")[1]) for word in words if word.startswith("engine.processes=")), 1)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--rank", folder, *words, f"output_dir={folder}/run"]
        if processes == 1:
            import subprocess

            code = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
        else:
            code = start_workers([*command[:2], "--quiet", *command[2:]], processes, print)
        if code:
            raise SystemExit(f"{' '.join(words)}: exit {code}")
        return [json.loads(file.read_text()) for file in sorted(Path(folder).glob("rank-*.json"))]


def main() -> None:
    """Measure the modes in turns and print two tables."""
    if "--rank" in sys.argv:
        start = sys.argv.index("--rank")
        if "--quiet" in sys.argv:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        measure(sys.argv[start + 2 :], Path(sys.argv[start + 1]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--only", default="", help="modes whose name matches this pattern")
    options = parser.parse_args()
    modes = {name: words for name, words in MODES.items() if re.search(options.only, name)}
    seconds: dict[str, list[float]] = {name: [] for name in modes}
    ranks: dict[str, list[dict[str, float]]] = {}
    for _ in range(options.rounds):
        for name, words in modes.items():
            ranks[name] = run([f"model={options.model}", *WORDS, f"max_steps={options.steps}", *words])
            seconds[name].append(ranks[name][0]["seconds"])
            print(f"{name}: {seconds[name][-1]:.2f} s a step; a rank: {ranks[name][-1]}", file=sys.stderr)
    print("| mode | seconds a step | weights | gradients | optimizer | largest resident | sent a step |")
    print("|---|---|---|---|---|---|---|")
    for name, found in ranks.items():
        times = seconds[name]
        held = (max(one.get(key, 0.0) for one in found) for key in ("weights", "gradients", "optimizer", "peak"))
        cells = [f"{size / 2**20:,.1f} MiB" for size in held]
        sent = max(sum(value for key, value in one.items() if key.startswith("sent")) for one in found) / 2**20
        took = f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})"
        print(f"| {name} | {took} | {' | '.join(cells)} | {sent:,.1f} MiB |")


if __name__ == "__main__":
    main()
