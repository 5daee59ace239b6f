"""Hold the plan of a run (plan=true) to the memory that real short runs take on this computer's CPU.

    python scripts/check_plan.py [case ...]

Each case trains some steps in a process of its own. What is resident before its model is loaded is the base; the peak
above it is compared with the plan, for the pass that fills the reference's cache and for training. The C library is
told to give freed memory back at once, so that the peak is what is in use, as a GPU's allocator counts it; `as it is`
is the peak without that, since it holds freed memory for later. Linux only.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dpo_cli.models.memory import give_memory_back

GIB = 2**30
SMOLLM2 = ["model=smollm2", "data=sample", "max_steps=2", "batch_size=4", "data.eval_limit=2", "device=cpu"]
QWEN = [*SMOLLM2[1:], "model.dtype=bfloat16", "batch_size=2"]
CASES: dict[str, list[str]] = {
    "float32": [*SMOLLM2, "model.dtype=float32"],
    "bfloat16": [*SMOLLM2, "model.dtype=bfloat16"],
    "reference.cache=off": [*SMOLLM2, "model.dtype=float32", "reference.cache=off"],
    "adapter_off": [*SMOLLM2, "model.dtype=float32", "reference=adapter_off", "reference.cache=run"],
    "gradient_checkpointing": [*SMOLLM2, "model.dtype=float32", "engine.gradient_checkpointing=true"],
    "layout=padded": [*SMOLLM2, "model.dtype=float32", "layout=padded"],
    "lora=off": [*SMOLLM2, "lora=off"],
    "lora=off checkpointing": [*SMOLLM2, "lora=off", "engine.gradient_checkpointing=true"],
    "lora.r=64 micro_batch_size=2": [*SMOLLM2, "model.dtype=float32", "lora.r=64", "micro_batch_size=2"],
    "nf4": [*SMOLLM2, "model.dtype=bfloat16", "model.quantization=nf4"],
    "0.5B bfloat16": QWEN,
    "0.5B checkpointing": [*QWEN, "engine.gradient_checkpointing=true"],
}


def config_of(words: list[str]) -> Any:
    """The config of a run with these words."""
    from dpo_cli.config.composition import composed_run, parse_overrides
    from dpo_cli.config.schema import run_config

    return run_config(composed_run(parse_overrides(words)).container)


def planned(words: list[str]) -> dict[str, float]:
    """Bytes by the plan: of the pass that fills the cache, and of training."""
    import io

    from dpo_cli.console.reporter import Reporter
    from dpo_cli.training.plan import Planner

    config = config_of(words)
    phases = Planner.of(config, Reporter(io.StringIO())).plan(config).phases
    of = {phase.name: phase.total for phase in phases}
    return {"reference": of.pop("reference", 0), "training": max(of.values())}


def trained(words: list[str]) -> dict[str, float]:
    """Bytes that the same run takes above what is resident before its model is loaded."""
    import io

    from dpo_cli.console.reporter import Reporter
    from dpo_cli.training import build, reference_logps, runner

    found: dict[str, float] = {}

    def at(module: Any, name: str, before: Callable[[], None], after: Callable[[], None]) -> None:
        function = getattr(module, name)

        def wrapped(*arguments: Any) -> Any:
            before()
            result = function(*arguments)
            after()
            return result

        setattr(module, name, wrapped)

    def note(name: str, figure: str) -> None:
        found.setdefault(name, resident(figure) - found.get("base", 0))

    def nothing() -> None:
        pass

    # While a model is loaded, its file is mapped besides: that is left out, as it lies in no GPU's memory.
    at(build, "load_model", lambda: note("base", "VmRSS"), nothing)
    at(reference_logps, "load_reference", nothing, reset_peak)
    at(runner, "complete_reference", reset_peak, lambda: note("reference", "VmHWM"))
    at(runner, "probe_memory", reset_peak, nothing)
    runner.train(config_of(words), Reporter(io.StringIO()))
    note("training", "VmHWM")
    return found


def resident(name: str) -> int:
    """A figure of this process's memory in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def reset_peak() -> None:
    """Give freed memory back, and let the peak begin at what is resident then."""
    give_memory_back(torch.device("cpu"))
    Path("/proc/self/clear_refs").write_text("5")


def in_a_process(what: str, words: list[str], **environment: str) -> dict[str, float]:
    """The figures of `planned` or `trained` in a process of its own, with a cache of its own for log-probs."""
    ended = subprocess.run(
        [sys.executable, __file__, f"--{what}", *words], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    if ended.returncode:
        sys.exit(ended.stderr)
    figures: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return figures


def write_half_a_billion(folder: Path) -> None:
    """A random model of the shape of Qwen2.5-0.5B, with the small tokenizer of the tiny one."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from dpo_cli.models.builtin import TINY, resolve_builtin

    config = Qwen2Config(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                         num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True)  # fmt: skip
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve_builtin(TINY, print)[0]).save_pretrained(folder)


def main(names: list[str]) -> None:
    """Print plan against measured, a line a case and phase."""
    print(f"{'case':<30}{'phase':<11}{'plan':>8}{'in use':>8}{'off':>8}{'as it is':>10}   GiB")
    with tempfile.TemporaryDirectory() as place:
        for name in names or CASES:
            words = list(CASES[name])
            if name.startswith("0.5B"):
                model = Path(place, "half_a_billion")
                if not model.exists():
                    write_half_a_billion(model)
                words.append(f"model.name_or_path={model}")
            plan = in_a_process("planned", words)
            words += [f"output_dir={place}/run-{{}}"]
            runs = []
            for number, settings in enumerate(({"MALLOC_MMAP_THRESHOLD_": "65536"}, {})):
                cache = [] if "reference.cache=off" in words else ["reference.cache=run"]
                folder = [word.format(f"{name.replace('=', '-').replace(' ', '-')}-{number}") for word in words]
                runs.append(in_a_process("trained", [*folder, *cache], **settings))
            for phase in ("reference", "training"):
                if plan[phase]:
                    used, plain = runs[0][phase], runs[1][phase]
                    off = 100 * (plan[phase] - used) / used
                    print(f"{name:<30}{phase:<11}{plan[phase] / GIB:>8.3f}{used / GIB:>8.3f}{off:>+7.1f}%"
                          f"{plain / GIB:>10.3f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] in (["--planned"], ["--trained"]):
        print(json.dumps({"--planned": planned, "--trained": trained}[sys.argv[1]](sys.argv[2:])))
    else:
        main(sys.argv[1:])
