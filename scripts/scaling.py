"""How the time of a training step grows with the number of GPUs: a calculation, not a measurement.

    python scripts/scaling.py [--figure docs/scale.svg]

A step takes arithmetic / rate + memory traffic / bandwidth + communication: bytes / bandwidth + hops * latency. The
last is fitted to all-reduces measured here, between processes over gloo. The constants of GPUs are those of
datasheets, times a utilisation that is assumed: nothing of that part was measured.
"""

import argparse
import sys
import tempfile
import timeit
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from figures import NO_FIGURE, can_draw, panels

PAIRS = 8  # of a rank a step, in one micro-batch
RANK_TOKENS = PAIRS * 1024  # a prompt and its two responses: 1,024 tokens
NODE = 8  # GPUs that NVLink joins
SQUARES = [(n, n) for n in (256, 512, 1024)]  # of the products that are measured
SIZES = [2**power for power in range(12, 26, 2)]  # bytes of the all-reduces that are measured


class Machine(NamedTuple):
    """What one rank can do."""

    rate: float  # FLOP/s of matrix products
    memory: float  # bytes/s
    link: float  # bytes/s of a ring, in one direction
    latency: float  # s a hop


class Model(NamedTuple):
    """A decoder of Llama's form; `keys` is the width of keys and of values."""

    hidden: int
    intermediate: int
    layers: int
    keys: int
    vocabulary: int

    def weights(self) -> int:
        """Of the linear layers and of the head."""
        layer = self.hidden * (2 * self.hidden + 2 * self.keys + 3 * self.intermediate)
        return self.layers * layer + self.hidden * self.vocabulary

    def adapters(self, r: int) -> int:
        """Weights of LoRA on every linear layer."""
        return self.layers * r * (9 * self.hidden + 2 * self.keys + 3 * self.intermediate)


class Case(NamedTuple):
    """What is trained, and how."""

    name: str
    model: Model
    r: int  # of LoRA on a bfloat16 model; 0 trains every weight, in float32
    least: int  # GPUs that hold it: more than one means fsdp, else ddp
    color: str


SMOLLM2 = Model(576, 1536, 30, 192, 49152)
LLAMA_7B = Model(4096, 11008, 32, 4096, 32000)
CASES = (
    Case("LoRA, 7B, ddp", LLAMA_7B, 16, 1, "#009E73"),
    Case("LoRA, 70B, fsdp", Model(8192, 28672, 80, 1024, 128256), 16, 8, "#0072B2"),
    Case("every weight, 7B, fsdp", LLAMA_7B, 0, 8, "#D55E00"),
)


def all_gather(size: float, ranks: int, machine: Machine, messages: int = 1) -> float:
    """Seconds in which a ring gives every rank the whole of `size` bytes; a reduce-scatter takes as long."""
    return (ranks - 1) / ranks * size / machine.link + messages * (ranks - 1) * machine.latency


def all_reduce(size: float, ranks: int, machine: Machine) -> float:
    """Seconds of a reduce-scatter and an all-gather."""
    return 2 * all_gather(size, ranks, machine)


def step_seconds(case: Case, ranks: int, machine: Machine) -> tuple[float, float, float]:
    """Arithmetic, memory traffic and communication of a step, each in seconds. The reference is cached."""
    model, weights = case.model, case.model.weights()
    trained = model.adapters(case.r) if case.r else weights
    # A frozen weight needs its product forward and that of the inputs' gradient: 4 FLOP a token; a trained one 6.
    flops = RANK_TOKENS * (4 * weights + 6 * trained if case.r else 6 * weights)
    # Weights are read forward and backward. For the backward pass 17 values a token, layer and unit of width are
    # written and read (https://arxiv.org/abs/2205.05198, Eq. 1, without attention). AdamW moves 28 bytes a weight.
    size = 2 if case.r else 4  # bytes of a value
    traffic = 2 * size * (weights + 17 * RANK_TOKENS * model.hidden * model.layers)
    if case.least == 1:
        return flops / machine.rate, (traffic + 28 * trained) / machine.memory, all_reduce(4 * trained, ranks, machine)
    # Weights are gathered forward and backward, layer by layer: written and copied once more. Gradients are scattered.
    traffic += 4 * size * weights + 28 * trained // ranks
    link = sum(all_gather(n, ranks, machine, model.layers) for n in (size * weights, size * weights, 4 * trained))
    return flops / machine.rate, traffic / machine.memory, link


def h100(case: Case, ranks: int, adapters: int) -> Machine:
    """A GPU of a node with 8 H100 and so many network adapters of 400 Gb/s, all of which a ring between nodes uses."""
    # Datasheet: 989 TFLOP/s in bfloat16 and 67 in float32, 3.35 TB/s, NVLink 900 GB/s, which is 450 GB/s a direction.
    # Assumed: half of the FLOP/s, 80% of every bandwidth, 2 us a hop within a node and 5 us between nodes.
    link, latency = (450e9, 2e-6) if ranks <= NODE else (min(450e9, adapters * 50e9), 5e-6)
    return Machine(0.5 * (989e12 if case.r else 67e12), 0.8 * 3.35e12, 0.8 * link, latency)


def _reduce(rank: int, ranks: int, sizes: Sequence[int], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    tensors = [torch.ones(size // 4) for size in sizes]
    seconds = [min(timeit.repeat(partial(dist.all_reduce, tensor), number=1, repeat=100)) for tensor in tensors]
    np.save(f"{folder}/{rank}.npy", seconds)
    dist.destroy_process_group()


def measured_reduces(ranks: int, sizes: Sequence[int]) -> list[float]:
    """Seconds of an all-reduce of each size between so many processes of this machine, over gloo."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_reduce, (ranks, sizes, folder), nprocs=ranks)
        return np.max([np.load(f"{folder}/{rank}.npy") for rank in range(ranks)], axis=0).tolist()


def fit_link(ranks: int, sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Bandwidth and latency of `all_reduce`, by least squares of the relative errors."""
    rows = [[2 * (ranks - 1) / ranks * size / s, 2 * (ranks - 1) / s] for size, s in zip(sizes, seconds, strict=True)]
    (inverse, latency), *_ = np.linalg.lstsq(np.array(rows), np.ones(len(rows)), rcond=None)
    return 1 / float(inverse), float(latency)


def table() -> str:
    """The parts of a step on nodes of 8 H100, with several or one network adapter a node."""
    lines = ["calculated, ms a step     GPUs  adapters  arithmetic    memory      link   pairs/s"]
    for case in CASES:
        for ranks, adapters in ((1, 8), (8, 8), (16, 8), (16, 1), (64, 8), (64, 1), (1024, 8), (1024, 1)):
            if ranks >= case.least:
                parts = step_seconds(case, ranks, h100(case, ranks, adapters))
                cells = "  ".join(f"{1e3 * part:>8,.0f}" for part in parts)
                lines.append(f"{case.name:<24}{ranks:>6,}{adapters:>10}    {cells}{ranks * PAIRS / sum(parts):>10,.0f}")
    return "\n".join(lines)


def draw(measured: dict[int, list[float]], path: Path) -> None:
    """On the left what was measured here and the fit; on the right what is calculated for H100 nodes."""
    with panels(path, 2, (12, 4.6), "scale") as (left, right):
        for (ranks, seconds), marker in zip(measured.items(), "os", strict=True):
            left.loglog(SIZES, seconds, marker, color="#555555", label=f"{ranks} processes, measured")
            here = Machine(1, 1, *fit_link(ranks, SIZES, seconds))
            left.loglog(SIZES, [all_reduce(size, ranks, here) for size in SIZES], color="#9a9a9a", zorder=1)
        left.set(title="Measured here: an all-reduce over gloo (lines: fit)", xlabel="bytes", ylabel="seconds")
        left.legend(loc="upper left")
        for case in CASES:
            gpus = [2**power for power in range(11) if 2**power >= case.least]
            for adapters, line, name in ((NODE, "-", case.name), (1, "--", None)):
                parts = [step_seconds(case, n, h100(case, n, adapters)) for n in gpus]
                share = [100 * flops / (flops + memory + link) for flops, memory, link in parts]
                right.semilogx(gpus, share, line, color=case.color, label=name)
                if case.least > 1 and name:  # at best the next layer is gathered while this one computes
                    best = [100 * flops / max(flops + memory, link) for flops, memory, link in parts]
                    right.fill_between(gpus, share, best, color=case.color, alpha=0.12, linewidth=0)
        right.minorticks_off()
        right.set_xticks((1, 8, 64, 1024), ("1", "8", "64", "1,024"))
        right.set(title="Calculated, not measured: nodes of 8 H100", xlabel="GPUs", ylabel="arithmetic, % of a step")
        right.legend(loc="lower left")


def main(words: Sequence[str] | None = None) -> None:
    """Measure the link here, print the calculated table and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", type=Path, default=Path("docs/scale.svg"), help="where to draw: .svg or .png")
    figure = parser.parse_args(words).figure
    torch.set_num_threads(1)
    seconds = [min(timeit.repeat(partial(torch.matmul, a, a), number=1, repeat=20)) for a in map(torch.ones, SQUARES)]
    rate = max(2 * n**3 / s for (n, _), s in zip(SQUARES, seconds, strict=True))
    source, target = torch.ones(2, 2**24)
    memory = 2 * source.nbytes / min(timeit.repeat(partial(target.copy_, source), number=1, repeat=20))
    print(f"measured here, one thread: {rate / 1e9:.0f} GFLOP/s in float32, copies {memory / 1e9:.1f} GB/s")
    measured, size = {}, 4 * SMOLLM2.adapters(16)  # not among the sizes of the fit
    for ranks in (2, 4):
        *measured[ranks], apart = measured_reduces(ranks, [*SIZES, size])
        here = Machine(rate, memory, *fit_link(ranks, SIZES, measured[ranks]))
        print(f"{ranks} processes over gloo: {here.link / 1e9:.2f} GB/s, {1e6 * here.latency:.0f} us a hop")
        shown = f"measured {1e3 * apart:.1f} ms, calculated {1e3 * all_reduce(size, ranks, here):.1f} ms"
        print(f"  gradients of LoRA r=16 on SmolLM2, {size / 1e6:.1f} MB: {shown}")
    print(f"\n{table()}")
    if not can_draw():
        sys.exit(NO_FIGURE)
    draw(measured, figure)
    print(f"\nwrote {figure}")


if __name__ == "__main__":
    main()
