"""Correctness and speed of the training step on a GPU, from a machine that has torch, transformers and peft alone.

    python scripts/bench_gpu.py [--shapes 0.5B,1.5B,7B] [--trl PYTHON] [--compile] [--json FILE]

Random weights in the shapes of Qwen2.5-0.5B, 1.5B and 7B, bfloat16, LoRA r=16 on all linear layers; pairs of random
tokens with the lengths of HH dialogues. First the log-probs and gradients of every layout of micro-batches are compared
with plain rows in float32, then each mode is timed in turn: a step with its reference in the loop, one with the
reference cached, one with checkpointing. No network, no file of the project besides its Python modules. On a machine
without a GPU `--device cpu --shapes tiny` tries the script itself.

The share of the matmul peak is the arithmetic of the step (`floor_flops`) at the rate that products of the
model's own size reach on the device.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dpo_cli.data.batches import Layout, SplitByTokens, packed_tokens
from dpo_cli.data.tokens import TokenizedPair, token_ids
from dpo_cli.models.adapters import attach_lora
from dpo_cli.models.dtype import best_seconds, wait_for
from dpo_cli.models.loading import compile_layers, disable_dropout
from dpo_cli.models.logps import (
    MicroBatcher,
    causal_model,
    make_micro_batch,
    pair_logps,
)
from dpo_cli.models.packing import choose_layout

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 1000},
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152064},
}  # fmt: skip
BATCH, BETA = 32, 0.1  # pairs a step
BUDGET = {"cuda": 16384, "cpu": 1024}


@dataclass(frozen=True)
class Lora:
    """The adapters, in PEFT's names."""

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: Any = "all-linear"


def random_model(shape: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Random weights in a shape of Qwen2.5, made on the device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen2", max_position_embeddings=4096, **SHAPES[shape])
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    disable_dropout(model)
    return model.eval()


def dialogue_lengths(number: int, vocabulary: int) -> list[TokenizedPair]:
    """Pairs of random tokens with lengths like those of HH: prompts around 80 tokens, responses around 60."""
    random = np.random.default_rng(0)
    pairs = []
    for row in range(number):
        sizes = np.clip(random.lognormal([4.2, 3.8, 3.8], 0.7), 2, 250).astype(int)
        ids = [token_ids(random.integers(10, vocabulary, size).tolist()) for size in sizes]
        pairs.append(TokenizedPair(ids[0], ids[1], ids[2], index=row, key=str(row), group=row))
    return pairs


def matmul_rate(hidden: int, device: torch.device, dtype: torch.dtype) -> float:
    """The best rate of products of the model's own size, in FLOP/s."""
    rows, wide = (8192, 4 * hidden) if device.type == "cuda" else (256, 4 * hidden)
    left = torch.ones(rows, hidden, device=device, dtype=dtype)
    right = torch.ones(hidden, wide, device=device, dtype=dtype)
    return 2 * rows * hidden * wide / best_seconds(left, right, times=20)


def floor_flops(policy: Any, pairs: list[TokenizedPair], reference_in_loop: bool) -> float:
    """Multiplications and additions that no implementation of a step on these pairs can leave out."""
    causal = causal_model(policy)
    head = causal.get_input_embeddings().weight.numel()
    adapters = sum(weight.numel() for weight in policy.parameters() if weight.requires_grad)
    outside = {id(causal.get_input_embeddings().weight), id(causal.get_output_embeddings().weight)}
    layers = sum(w.numel() for w in causal.parameters() if w.ndim == 2 and id(w) not in outside) - adapters
    tokens = sum(packed_tokens([pair]) for pair in pairs)
    responses = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
    asked = tokens * 2 * layers + responses * 2 * head if reference_in_loop else 0
    return float(tokens * (4 * layers + 6 * adapters) + responses * 4 * head + asked)


def check(device: torch.device) -> list[dict[str, Any]]:
    """Every layout against plain rows in float32 on a small model, log-probs and adapter gradients; and in bfloat16."""
    lines: list[dict[str, Any]] = []
    for dtype in (torch.float32, torch.bfloat16):
        policy = attach_lora(random_model("tiny", device, dtype), Lora())  # type: ignore[arg-type]
        weights = [weight for weight in policy.parameters() if weight.requires_grad]
        generator = torch.Generator(device="cpu").manual_seed(0)
        with torch.no_grad():
            for weight in weights:
                weight.copy_(0.05 * torch.randn(weight.shape, generator=generator))
        pairs = dialogue_lengths(6, 1000)
        outcomes = {}
        for layout in Layout:
            try:
                logps = pair_logps(policy, make_micro_batch(pairs, device, layout))
                found = torch.autograd.grad((logps.chosen - logps.rejected).sum(), weights)
                outcomes[layout] = (torch.cat([logps.chosen, logps.rejected]).detach(),
                                 torch.cat([one.flatten() for one in found]))  # fmt: skip
            except Exception as error:  # a layout that this device cannot compute is told, and the others are checked
                lines.append({"dtype": str(dtype), "layout": layout.value, "fails": str(error).splitlines()[0][:200]})
        plain, plain_gradients = outcomes[Layout.PADDED]
        for layout, (values, gradients) in outcomes.items():
            off = float((values - plain).abs().max())
            slope = float((gradients - plain_gradients).norm() / plain_gradients.norm())
            lines.append({"dtype": str(dtype), "layout": layout.value, "log_probs_off": off, "gradients_off": slope})
            if dtype is torch.float32:
                assert off < 1e-2 and slope < 1e-3, lines[-1]
    return lines


def time_steps(
    policy: Any, reference: Any | None, batcher: MicroBatcher, batches: list[list[TokenizedPair]]
) -> dict[str, Any]:
    """Seconds of each step, the first left out, and the most memory it took."""
    device = batcher.device
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-5, fused=device.type == "cuda")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    policy.train()
    for pairs in batches:
        wait_for(device)
        began = time.perf_counter()
        for micro_batch in batcher.micro_batches(pairs):
            margin = torch.zeros(len(micro_batch.examples), device=device)
            if reference is not None:
                with torch.no_grad():
                    known = pair_logps(reference, micro_batch)
                margin = known.chosen - known.rejected
            logps = pair_logps(policy, micro_batch)
            (-F.logsigmoid(BETA * (logps.chosen - logps.rejected - margin)).sum() / len(pairs)).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait_for(device)
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    return {"seconds": seconds[1:], "peak_gib": peak}


def measure(shape: str, device: torch.device, compiled: bool) -> dict[str, Any]:
    """Every mode on one shape, in turn."""
    dtype = torch.bfloat16
    policy = attach_lora(random_model(shape, device, dtype), Lora())  # type: ignore[arg-type]
    reference = random_model(shape, device, dtype)
    if compiled:
        compile_layers(causal_model(policy))
        compile_layers(reference)
    pairs = dialogue_lengths(BATCH * 6, SHAPES[shape]["vocab_size"])
    batches = [pairs[start : start + BATCH] for start in range(0, len(pairs), BATCH)]
    chosen = choose_layout("auto", policy.get_base_model(), pairs[:64], device)
    rate = matmul_rate(SHAPES[shape]["hidden_size"], device, dtype)
    print(f"\n{shape}: {chosen.value} ({chosen.reason}); matmul {rate / 1e12:.1f} TFLOP/s", flush=True)
    print("| | pairs/s | tokens/s | of the matmul rate | peak GiB |\n|---|---|---|---|---|")
    budget = BUDGET[device.type]
    results: dict[str, Any] = {"chosen": chosen.value.value, "reason": chosen.reason, "matmul": rate}
    modes = {
        "packed, cached reference": (chosen.value, None, False),
        "packed, reference in the loop": (chosen.value, reference, False),
        "packed, cached, checkpointed": (chosen.value, None, True),
        "padded, cached reference": (Layout.PADDED, None, False),
        "padded, reference in the loop": (Layout.PADDED, reference, False),
    }
    for name, (layout, asked, checkpointed) in modes.items():
        if checkpointed:
            policy.activation_checkpointing_enable()
        try:
            result = time_steps(policy, asked, MicroBatcher(device, layout, SplitByTokens(budget, layout)), batches)
        except torch.OutOfMemoryError:
            print(f"| {name} | out of memory |", flush=True)
            continue
        finally:
            if checkpointed:
                policy.activation_checkpointing_disable()
        middle = statistics.median(result["seconds"])
        tokens = sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs[BATCH:]) / (len(batches) - 1)
        flops = floor_flops(policy, pairs[BATCH:], asked is not None) / (len(batches) - 1)
        line = {"pairs_per_second": BATCH / middle, "tokens_per_second": tokens / middle,
                "share": flops / rate / middle, **result}  # fmt: skip
        results[name] = line
        print(f"| {name} | {line['pairs_per_second']:.1f} | {line['tokens_per_second']:.0f} | "
              f"{100 * line['share']:.0f}% | {line['peak_gib']:.2f} |", flush=True)  # fmt: skip
    return results


def measure_trl(python: str, shape: str, device: torch.device) -> dict[str, Any]:
    """TRL on the same lengths and shape, in a process of its own."""
    pairs = dialogue_lengths(BATCH * 6, SHAPES[shape]["vocab_size"])
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        triples = [[p.prompt.tolist(), p.chosen[:-1].tolist(), p.rejected[:-1].tolist()] for p in pairs]
        rows.write_text(json.dumps(triples))  # TRL closes every response itself
        task = {"shape": SHAPES[shape], "rows": str(rows), "batch": BATCH, "micro": 8, "cpu": device.type == "cpu"}
        script = str(Path(__file__).with_name("bench_gpu_trl.py"))
        done = subprocess.run([python, script, json.dumps(task)], capture_output=True, text=True, check=False)
    line = next((one for one in done.stdout.splitlines() if one.startswith("RESULT ")), None)
    if line is None:
        print(f"| TRL did not finish: {done.stderr.strip().splitlines()[-1][:200]} |", flush=True)
        return {"failed": done.stderr[-2000:]}
    result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    for name in ("in_the_loop", "cached"):
        one = result[name]
        print(f"| TRL {result['trl']}, reference {name.replace('_', ' ')} | {one['pairs_per_second']:.1f} | | | "
              f"{one['peak_gib']:.2f} |", flush=True)  # fmt: skip
    return result


def main() -> None:
    """Check, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", default="0.5B,1.5B,7B", help="which of 0.5B, 1.5B, 7B, tiny")
    parser.add_argument("--compile", action="store_true", help="compile every layer")
    parser.add_argument("--trl", help="a Python that has trl: its time on the same shapes")
    parser.add_argument("--json", help="write everything here too")
    words = parser.parse_args()
    if words.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; --device cpu --shapes tiny tries the script without one")
    device = torch.device(words.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}")
    everything: dict[str, Any] = {"device": name, "check": check(device)}
    for line in everything["check"]:
        print("  ".join(f"{key} {value:.2g}" if isinstance(value, float) else str(value)
                        for key, value in line.items()))  # fmt: skip
    for shape in words.shapes.split(","):
        everything[shape] = measure(shape, device, words.compile)
        if words.trl:
            everything[shape]["trl"] = measure_trl(words.trl, shape, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if words.json:
        Path(words.json).write_text(json.dumps(everything, indent=1, default=str), encoding="utf-8")


if __name__ == "__main__":
    main()
