"""The same run on one process and on several: its numbers side by side, and the largest differences.

    python scripts/trajectories.py [--model tiny] [--steps 24] [WORD ...]

Runs go one after the other in float32 on the shipped pairs. Further words are overrides of dpo-train, such as lora=off.
The last row goes on with fewer ranks twice: fsdp 4, then ddp 2, then one process.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

MODES = {"single": [], **{f"{name} {ranks}": [f"engine={name}", f"engine.processes={ranks}"]
                          for name in ("ddp", "fsdp") for ranks in (2, 4)}}  # fmt: skip
CHAIN = ("fsdp 4", "ddp 2", "single")
TRAIN = [sys.executable, "-c", "from dpo_cli.cli import train; train()"]
TIMINGS = ("seconds", "pairs_per_second", "tokens_per_second", "peak_memory_gib")


def run(words: list[str], mode: str, folder: Path, stop_at: int | None = None) -> None:
    """One run to its end, or to a checkpoint from which it goes on."""
    subprocess.run([*TRAIN, *words, *MODES[mode], f"output_dir={folder}"], check=True, stdout=subprocess.DEVNULL)
    if stop_at is not None:  # as if it had been killed there
        import shutil

        shutil.rmtree(folder / "final")
        for checkpoint in (folder / "checkpoints").glob("step-*"):
            if int(checkpoint.name.removeprefix("step-")) > stop_at:
                shutil.rmtree(checkpoint)


def records(folder: Path) -> list[dict[str, float]]:
    """The numbers in metrics.jsonl."""
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if isinstance(value, float) and key not in TIMINGS}
            for line in lines if line["split"] == "train"]  # fmt: skip


def tensors(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """The trained weights, or the state of the optimizer, at the end."""
    if name == "weights":
        return {
            key: value
            for file in sorted((folder / "final").glob("*.safetensors"))
            for key, value in load_file(file).items()
        }
    last = max((folder / "checkpoints").glob("step-*"))
    return load_file(last / "optimizer.safetensors")


def largest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of any value."""
    return max(float((one[key].double() - other[key].double()).abs().max()) for key in one)


def main() -> None:
    """Run every mode and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("words", nargs="*")
    options = parser.parse_args()
    steps = options.steps
    words = [f"model={options.model}", "model.dtype=float32", "data=sample", "data.eval_limit=8", "batch_size=4",
             f"max_steps={steps}", f"save_every={steps // 3}", "keep_checkpoints=9", *options.words]  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        folders = {mode: Path(place) / mode.replace(" ", "-") for mode in MODES}
        for mode, folder in folders.items():
            run(words, mode, folder)
            print(f"{mode}: done", file=sys.stderr)
        folders["4, 2, 1 ranks"] = chain = Path(place) / "chain"
        for number, mode in enumerate(CHAIN, start=1):
            again = ["resume=auto"] if number > 1 else []
            run([*words, *again], mode, chain, number * (steps // 3) if number < len(CHAIN) else None)
        first = records(folders["single"])
        shown = [0, steps // 3, 2 * steps // 3, steps]
        print(f"| run | {' | '.join(f'loss, step {step}' for step in shown)} | metrics | weights | optimizer |")
        print("|---|" + "---|" * (len(shown) + 3))
        for mode, folder in folders.items():
            lines = records(folder)
            off = max(abs(line[key] - same[key]) for line, same in zip(lines, first, strict=True) for key in same)
            apart = [
                largest(tensors(folder, name), tensors(folders["single"], name)) for name in ("weights", "optimizer")
            ]
            losses = " | ".join(f"{lines[step]['loss']:.7f}" for step in shown)
            print(f"| {mode} | {losses} | {off:.1e} | {apart[0]:.1e} | {apart[1]:.1e} |")


if __name__ == "__main__":
    main()
