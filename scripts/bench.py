"""Speed and memory, side by side in one run: every mode of ours, and TRL where a Python that has it is named.

    python scripts/bench.py [--trl PYTHON] [--data PAIRS.jsonl.gz] [--repeats 3] [--json FILE] [--tables modes,growth]

Table `modes`: SmolLM2-135M, LoRA r=16 on all linear layers, 8 pairs a step, max_length 512, the first 24 pairs of the
data as plain text after one warm-up step. Every measurement has a process of its own; the modes take turns, and each
figure is the median over the repeats. Table `growth`: cost against length, number of pairs and LoRA rank. Table
`watching`: what preflight, memory probe, monitor, guards and a save cost. Nothing else should run beside it.

The floor is the arithmetic at the matmul rate measured in the same process: for each token a forward and a backward
product with every weight of the layers and of the adapters, with the adapters' own gradients, and the head for
response tokens; a reference in the loop adds its forward pass.
"""

import argparse
import gc
import io
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_gpu import floor_flops

from dpo_cli.cli import quiet_libraries
from dpo_cli.config.composition import composed, parse_overrides
from dpo_cli.config.schema import RunConfig, run_config
from dpo_cli.console.reporter import Reporter
from dpo_cli.data.batches import Layout, Schedule, SplitByTokens
from dpo_cli.data.files import read_rows
from dpo_cli.data.formats import FORMATS
from dpo_cli.data.pairs import load_pairs
from dpo_cli.data.tokens import PairEncoder, TokenizedPair, token_ids
from dpo_cli.engine.engine import SINGLE
from dpo_cli.models.builtin import SMOLLM2, resolve_builtin
from dpo_cli.models.dtype import best_seconds
from dpo_cli.models.generators import rng_states
from dpo_cli.models.loading import find_model, load_tokenizer
from dpo_cli.models.logps import MicroBatcher
from dpo_cli.models.reference_cache import CachedReference, ReferenceCache
from dpo_cli.runs.checkpoint import checkpoints, save_policy, trained_weights
from dpo_cli.runs.run_directory import RunDirectory
from dpo_cli.trackers.trackers import Trackers
from dpo_cli.training.build import build
from dpo_cli.training.memory_probe import probe_memory
from dpo_cli.training.parts import Context, Learner, Material, Progress
from dpo_cli.training.preflight import preflight
from dpo_cli.training.records import Recorder
from dpo_cli.training.reference_logps import complete_reference
from dpo_cli.training.runner import forward_backward, train_step

SAMPLE = Path(__file__).resolve().parents[1] / "dpo_cli" / "assets" / "sample" / "train.jsonl"
BATCH, WARMUP, TIMED = 8, 1, 3  # pairs a step; steps
WORDS = [
    "data=jsonl", "data.eval_fraction=0", "data.template=plain", "data.shuffle=false", "optimizer.schedule=constant",
    "optimizer.warmup_steps=0", "optimizer.weight_decay=0", f"batch_size={BATCH}", "lora.r=16", "lora.alpha=32",
]  # fmt: skip
MODES: dict[str, list[str]] = {
    "packed, cached reference": [],
    "packed, reference in the loop": ["reference.cache=off"],
    "packed, adapter switched off": ["reference=adapter_off", "reference.cache=off"],
    "packed, cached, checkpointed": ["engine.gradient_checkpointing=true"],
    "padded, cached reference": ["layout=padded"],
    "packed, cached, float32": ["model.dtype=float32"],
    "packed, in the loop, float32": ["model.dtype=float32", "reference.cache=off"],
}
TRL_MODES = {"TRL, its defaults": {"best": False}, "TRL, its best flags": {"best": True}}


# One measurement, in a process of its own


def matmul_rate(dtype: torch.dtype) -> float:
    """The best rate of matrix products of a layer's shape, in FLOP/s."""
    left, right = torch.ones(1024, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
    return 2 * 1024 * 576 * 1536 / best_seconds(left, right, times=30)


@dataclass(frozen=True)
class Assembled:
    """A run put together, its reference complete."""

    context: Context
    learner: Learner
    material: Material
    progress: Progress
    recorder: Recorder
    reference_seconds: float  # of the reference pass

    def step(self, pairs: list[TokenizedPair]) -> None:
        """One optimizer step."""
        train_step(self.context, self.learner, self.progress, pairs, self.recorder)

    def preflight(self) -> None:
        """What is checked before the first step."""
        preflight(self.learner, self.material, SINGLE, at_start=True)

    def batches(self) -> Iterator[list[TokenizedPair]]:
        """The pairs of every step."""
        return map(self.material.batch, self.material.schedule.batches(0, self.material.total_steps))


def assembled(folder: Path, words: list[str]) -> Assembled:
    """A run put together in silence."""
    quiet_libraries()
    choice = composed("train", parse_overrides([*words, f"output_dir={folder}"]), RunConfig)
    directory = RunDirectory(folder)
    directory.create()
    context = Context(run_config(choice.container), directory, Reporter(io.StringIO()), SINGLE, lambda: None)
    learner, material, _ = build(context, None, None)
    began = time.perf_counter()
    complete_reference(context, learner, material, resumed=False)
    seconds, progress = time.perf_counter() - began, Progress()
    recorder = Recorder(context, learner, material, progress, Trackers(lambda _: None))
    return Assembled(context, learner, material, progress, recorder, seconds)


def measure_mode(task: dict[str, Any]) -> dict[str, Any]:
    """Train a few steps and say what they took."""
    with tempfile.TemporaryDirectory() as folder:
        run = assembled(Path(folder), task["words"])
        learner = run.learner
        if task["adapter"]:  # the start of ours and TRL's, for their losses to be compared
            save_policy(
                learner.policy, Path(task["adapter"]), learner.objective, trained_weights(learner.policy, SINGLE)
            )
        if task["preflight"]:
            run.preflight()
        startup = time.time() - task["began"]
        seconds, losses, tokens, flops = [], [], 0, 0.0
        for pairs in run.batches():
            began = time.perf_counter()
            run.step(pairs)
            seconds.append(time.perf_counter() - began)
            run.recorder.log()
            if len(seconds) > WARMUP:
                tokens += sum(2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs)
                flops += floor_flops(learner.policy, pairs, not isinstance(learner.reference, CachedReference))
        losses = [line["loss"] for line in run.context.directory.metrics.read() if line["step"] > 0]
        return {
            "step_seconds": seconds,
            "reference_seconds": run.reference_seconds,
            "pairs": len(run.material.data.train),
            "losses": losses,
            "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "startup_seconds": startup,
            "tokens": tokens,
            "floor_seconds": flops / matmul_rate(learner.dtype),
            "layout": learner.settings.layout,
            "token_budget": learner.settings.token_budget,
        }


def measure_length(task: dict[str, Any]) -> dict[str, Any]:
    """A step on one pair of a given length, a quarter of it prompt."""
    with tempfile.TemporaryDirectory() as folder:
        run = assembled(Path(folder), [*task["words"], "reference.cache=off", "reference=adapter_off"])
        length = task["length"]
        random = np.random.default_rng(0)
        sizes = (length // 4, length - length // 4, length - length // 4)
        ids = [token_ids(random.integers(10, 40_000, size).tolist()) for size in sizes]
        pair = TokenizedPair(ids[0], ids[1], ids[2], index=0, key="", group=0)
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            run.step([pair])
            seconds.append(time.perf_counter() - began)
        return {
            "seconds": min(seconds[1:]),
            "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }


def measure_pairs(task: dict[str, Any]) -> dict[str, Any]:
    """Everything but the model's own work on many generated pairs: reading, tokenizing, order, batches, the cache."""
    with tempfile.TemporaryDirectory() as folder:
        file, number = Path(folder) / "pairs.jsonl", task["pairs"]
        with file.open("w", encoding="utf-8") as out:
            for row in range(number):
                question = f"What is {row} plus {row % 97}, and is it more than {row % 13} times {row % 11}?"
                good, bad = f"It is {row + row % 97}, which you can check.", f"I am not sure about {row}, sorry."
                out.write(json.dumps({"prompt": question, "chosen": good, "rejected": bad}) + "\n")
        choice = composed("train", parse_overrides([*WORDS, f"data.train={file}"]), RunConfig)
        config = run_config(choice.container)
        encoder = PairEncoder(load_tokenizer(find_model(config.model)), config.data.template)
        began = time.perf_counter()
        pairs = load_pairs(config.data, encoder, 0).train
        loading = time.perf_counter() - began
        gc.collect()
        cache = ReferenceCache(Path(folder) / "values.logps")
        began = time.perf_counter()
        for start in range(0, number, 4096):
            some = pairs[start : start + 4096]
            cache.add([key for pair in some for key in pair.response_keys], [-1.0, -2.0] * len(some))
        writing = time.perf_counter() - began
        began = time.perf_counter()
        reference = CachedReference(ReferenceCache(Path(folder) / "values.logps"))
        reading = time.perf_counter() - began
        batcher = MicroBatcher(torch.device("cpu"), Layout.PACKED_SEGMENTS, SplitByTokens(1024, Layout.PACKED_SEGMENTS))
        schedule = Schedule(number, BATCH, 0, True)
        steps = min(200, schedule.steps_per_epoch)
        began = time.perf_counter()
        for indices in schedule.batches(0, steps):
            for micro_batch in batcher.micro_batches([pairs[index] for index in indices]):
                reference.logps(micro_batch)
        return {
            "loading_seconds": loading,
            "cache_write_seconds": writing,
            "cache_read_seconds": reading,
            "batch_milliseconds": 1000 * (time.perf_counter() - began) / steps,
            "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }


def measure_watching(task: dict[str, Any]) -> dict[str, Any]:
    """What preflight, memory probe, monitor, guard and saving cost beside the steps they guard, in seconds."""

    def seconds(work: Callable[[], Any]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    with tempfile.TemporaryDirectory(dir=task["folder"]) as folder:
        run = assembled(Path(folder), task["words"])
        context, learner, material, monitor = run.context, run.learner, run.material, run.learner.monitor
        took: dict[str, list[float]] = {
            name: [] for name in ("preflight", "memory probe", "step", "monitor", "guard", "save")
        }
        for _ in range(3):
            took["preflight"].append(seconds(run.preflight))
            took["memory probe"].append(seconds(lambda: probe_memory(context, learner, material, forward_backward)))
        for pairs in run.batches():
            took["step"].append(seconds(partial(run.step, pairs)))
            took["monitor"].append(seconds(lambda: monitor.alarms(monitor.drift())))
            took["save"].append(seconds(run.recorder.save))
            # What a step does for the sake of safety, besides looking at two numbers: the generators are noted twice.
            took["guard"].append(2 * seconds(rng_states))
        middle = {name: statistics.median(times[name == "step" :]) for name, times in took.items()}
        checkpoint = checkpoints(context.directory.checkpoints)[0]
        size = sum(file.stat().st_size for file in checkpoint.iterdir())
        return {**middle, "slowest_save": max(took["save"]), "checkpoint_mb": size / 1e6}


MEASURES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "mode": measure_mode,
    "length": measure_length,
    "pairs": measure_pairs,
    "watching": measure_watching,
}


# Many measurements, side by side


def in_a_process(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """The result that a measuring process prints."""
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        raise SystemExit(f"a measurement failed: {' '.join(command)[:300]}\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return result


def ours(task: dict[str, Any], cache: Path) -> dict[str, Any]:
    """A measurement of this program."""
    task = {"adapter": None, "preflight": True, "began": time.time(), **task}
    command = [sys.executable, __file__, "--worker", json.dumps(task)]
    return in_a_process(command, {"DPO_CACHE": str(cache), "HF_HUB_OFFLINE": "1"})


def write_rows(data: str | None, target: Path) -> None:
    """The first pairs of the data, as rows that both programs read alike."""
    rows = []
    for row in read_rows(Path(data) if data else SAMPLE):
        assert row.value is not None, row.problem
        pair = FORMATS["auto"](row.value)
        if not pair.notes:  # a dialogue whose turns differ earlier is read differently by others
            rows.append({"prompt": pair.prompt_text, "chosen": pair.chosen, "rejected": pair.rejected})
        if len(rows) == BATCH * (WARMUP + TIMED):
            break
    target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def model_folder() -> str:
    """The embedded model's folder, made if it is not there yet."""
    return resolve_builtin(SMOLLM2, print)[0]


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the repeats of one mode."""
    timed = [sum(one["step_seconds"][WARMUP:]) for one in results]
    pairs = len(results[0]["step_seconds"][WARMUP:]) * BATCH
    passes = [one["reference_seconds"] / one["pairs"] * pairs for one in results]
    middle = statistics.median
    line = {
        "pairs_per_second": middle(pairs / one for one in timed),
        "lowest": pairs / max(timed),
        "highest": pairs / min(timed),
        "with_reference_pass": middle(pairs / (one + two) for one, two in zip(timed, passes, strict=True)),
        "peak_gib": middle(one["peak_gib"] for one in results),
        "losses": results[-1]["losses"],
    }
    if "floor_seconds" in results[0]:
        line["tokens_per_second"] = middle(one["tokens"] / two for one, two in zip(results, timed, strict=True))
        line["share_of_floor"] = middle(one["floor_seconds"] / two for one, two in zip(results, timed, strict=True))
        line["layout"], line["token_budget"] = results[0]["layout"], results[0]["token_budget"]
    return line


def table_modes(words: argparse.Namespace) -> dict[str, Any]:
    """Every mode of ours and TRL's, taking turns."""
    model = model_folder()
    results: dict[str, list[dict[str, Any]]] = {}
    startups: list[float] = []
    chosen = {name: mode for name, mode in MODES.items() if not words.modes or any(w in name for w in words.modes)}
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows.jsonl"
        write_rows(words.data, rows)
        base = [*WORDS, f"model.name_or_path={model}", f"data.train={rows}", f"max_steps={WARMUP + TIMED}"]
        for repeat in range(words.repeats):
            for name, mode in chosen.items():
                cache = Path(scratch) / f"cache-{repeat}-{len(mode)}-{abs(hash(name))}"
                result = ours({"measure": "mode", "words": [*base, *mode], "began": time.time()}, cache)
                results.setdefault(name, []).append(result)
                say(name, result)
                if name == "packed, cached reference":  # again, now that every value is in the cache
                    again = ours({"measure": "mode", "words": [*base, *mode], "began": time.time()}, cache)
                    startups.append(again["startup_seconds"])
            for name, flags in (TRL_MODES if words.trl else {}).items():
                task = {"model": model, "rows": str(rows), "fp32": False, "adapter": None, **flags}
                result = in_a_process([words.trl, str(Path(__file__).with_name("bench_trl.py")), json.dumps(task)], {})
                results.setdefault(name, []).append(result)
                say(name, result)
        lines = {name: summary(some) for name, some in results.items()}
        fp32 = compare_losses(words.trl, base, model, rows, Path(scratch)) if words.trl else None
    best = lines.get("TRL, its best flags")
    default = lines.get("TRL, its defaults")
    print()
    print("| | pairs/s (lowest to highest) | with the reference pass | tokens/s | peak GiB | of the floor |", end="")
    print(" x TRL's defaults | x TRL's best |" if best else "")
    print("|---|---|---|---|---|---|" + ("---|---|" if best else ""))
    for name, line in lines.items():
        spread = f"{line['pairs_per_second']:.2f} ({line['lowest']:.2f} to {line['highest']:.2f})"
        cells = [name, spread, f"{line['with_reference_pass']:.2f}"]
        cells.append(f"{line['tokens_per_second']:.0f}" if "tokens_per_second" in line else "")
        cells.append(f"{line['peak_gib']:.2f}")
        cells.append(f"{100 * line['share_of_floor']:.0f}%" if "share_of_floor" in line else "")
        if best and default:
            for other in (default, best):
                both = ("pairs_per_second", "with_reference_pass")
                cells.append(" / ".join(f"{line[key] / other[key]:.1f}" for key in both))
        print("| " + " | ".join(cells) + " |")
    if startups:
        print(f"\nstart-up to the first step on a warm cache: {statistics.median(startups):.1f} s")
    if fp32:
        print(
            f"float32 losses, ours and TRL's from one adapter: {fp32['ours']} {fp32['trl']}: off by {fp32['off']:.1e}"
        )
    return {"modes": lines, "startup_seconds": startups, "float32": fp32}


def compare_losses(trl: str, base: list[str], model: str, rows: Path, scratch: Path) -> dict[str, Any]:
    """Losses of the first three steps in float32, both programs from the same adapter."""
    adapter = scratch / "adapter"
    words = [*base, "model.dtype=float32", "max_steps=3"]
    mine = ours({"measure": "mode", "words": words, "adapter": str(adapter)}, scratch / "cache-fp32")["losses"]
    first = scratch / "first.jsonl"
    first.write_text("".join(rows.read_text().splitlines(keepends=True)[: 3 * BATCH]))
    start = str(adapter / "adapter_model.safetensors")
    task = {"model": model, "rows": str(first), "best": True, "fp32": True, "adapter": start}
    theirs = in_a_process([trl, str(Path(__file__).with_name("bench_trl.py")), json.dumps(task)], {})["losses"]
    return {"ours": mine, "trl": theirs, "off": max(abs(a - b) for a, b in zip(mine, theirs, strict=True))}


def say(name: str, result: dict[str, Any]) -> None:
    """One measurement as it comes in."""
    steps = " ".join(f"{one:.2f}" for one in result["step_seconds"])
    print(f"{name:32} steps {steps} s  reference {result['reference_seconds']:.1f} s  {result['peak_gib']:.2f} GiB",
          flush=True)  # fmt: skip


def table_growth(words: argparse.Namespace) -> dict[str, Any]:
    """How cost grows with length, number of pairs, and rank."""
    model = model_folder()
    grown: dict[str, Any] = {"length": {}, "pairs": {}, "rank": {}}
    with tempfile.TemporaryDirectory() as scratch:
        rows, cache = Path(scratch) / "rows.jsonl", Path(scratch) / "cache"
        write_rows(words.data, rows)
        base = [*WORDS, f"model.name_or_path={model}", f"data.train={rows}", f"max_steps={WARMUP + TIMED}"]
        print("\n| tokens of a side | s a pair | ms a token | peak GiB |\n|---|---|---|---|")
        for length in (256, 512, 1024, 2048, 4096):
            one = grown["length"][length] = ours({"measure": "length", "words": base, "length": length}, cache)
            row = length // 4 + 2 * (length - length // 4)
            print(f"| {length:,} | {one['seconds']:.2f} | {1000 * one['seconds'] / row:.2f} | {one['peak_gib']:.2f} |",
                  flush=True)  # fmt: skip
        print("\n| pairs | read and tokenize s | cache: write, read s | batch of 8 ms | peak GiB |")
        print("|---|---|---|---|---|")
        for number in (1_000, 10_000, 100_000, 1_000_000)[: words.sizes]:
            one = grown["pairs"][number] = ours({"measure": "pairs", "pairs": number}, cache)
            both = f"{one['cache_write_seconds']:.2f}, {one['cache_read_seconds']:.2f}"
            print(f"| {number:,} | {one['loading_seconds']:.1f} | {both} | {one['batch_milliseconds']:.2f} |"
                  f" {one['peak_gib']:.2f} |", flush=True)  # fmt: skip
        print("\n| LoRA rank | pairs/s | peak GiB |\n|---|---|---|")
        for rank in (4, 16, 64, 256):
            mode = [*base, f"lora.r={rank}", f"lora.alpha={2 * rank}"]
            one = grown["rank"][rank] = summary([ours({"measure": "mode", "words": mode}, cache)])
            print(f"| {rank} | {one['pairs_per_second']:.2f} | {one['peak_gib']:.2f} |", flush=True)
    return grown


def table_watching(words: argparse.Namespace) -> dict[str, Any]:
    """What is checked and saved beside a run of 200 steps."""
    with tempfile.TemporaryDirectory() as scratch:
        run = ["experiment=demo", "max_steps=7", f"model.name_or_path={model_folder()}"]
        one = ours({"measure": "watching", "words": run, "folder": words.saves}, Path(scratch))
    whole = 200 * one["step"]
    print(f"\nstep         {one['step']:8.3f} s, median of 6")
    for name in ("preflight", "memory probe"):
        print(f"{name:<12} {one[name]:8.3f} s, median of 3: {100 * one[name] / whole:.2f}% of 200 steps")
    for name in ("monitor", "guard"):
        print(f"{name:<12} {1000 * one[name]:8.3f} ms a step: {100 * one[name] / one['step']:.3f}% of it")
    checks = one["preflight"] + one["memory probe"] + 200 * (one["monitor"] + one["guard"])
    print(f"together     {checks:8.3f} s: {100 * checks / whole:.2f}% of 200 steps")
    stall = f"{one['save']:8.3f} s, median of 7, slowest {one['slowest_save']:.3f} s"
    print(f"save         {stall}: {one['checkpoint_mb']:.1f} MB, hashed and flushed to disk")
    return one


TABLES = {"modes": table_modes, "growth": table_growth, "watching": table_watching}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--trl", help="a Python that has trl")
    parser.add_argument("--data", help="pairs to time; the shipped sample if not given")
    parser.add_argument("--repeats", type=int, default=3, help="rounds over the modes")
    parser.add_argument(
        "--modes", type=lambda text: text.split(";"), help="only modes whose name holds one of these; by ;"
    )
    parser.add_argument("--sizes", type=int, default=4, help="how many of 1,000, 10,000, 100,000, 1,000,000 pairs")
    parser.add_argument("--tables", default="modes,growth,watching", help="which of modes, growth, watching")
    parser.add_argument("--saves", help="a folder on the disk whose saves are timed; the temporary one if not given")
    parser.add_argument("--json", help="write everything here too")
    words = parser.parse_args()
    if words.worker:
        task = json.loads(words.worker)
        print("RESULT " + json.dumps(MEASURES[task["measure"]](task)), flush=True)
        return
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}; matmul "
          f"{matmul_rate(torch.bfloat16) / 1e9:.0f} GFLOP/s bfloat16, {matmul_rate(torch.float32) / 1e9:.0f} float32",
          flush=True)  # fmt: skip
    everything = {name: TABLES[name](words) for name in words.tables.split(",")}
    if words.json:
        Path(words.json).write_text(json.dumps(everything, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
