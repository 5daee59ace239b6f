"""The device and the dtype of a run: decisions taken for the user, each with its reason."""

import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_cli.console.text import plural
from dpo_cli.errors import ConfigError
from dpo_cli.storage.measurements import note, recall


@dataclass(frozen=True)
class Decision:
    """A choice made for the user, and why."""

    value: Any
    reason: str


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def choose_device(requested: str) -> Decision:
    """The device a run is computed on; ConfigError where the one requested is not there."""
    if requested == "auto":
        if torch.cuda.is_available():
            return Decision(torch.device("cuda"), torch.cuda.get_device_name())
        if torch.backends.mps.is_available():
            return Decision(torch.device("mps"), "no CUDA device; Apple's GPU found")
        return Decision(torch.device("cpu"), f"no GPU found; {plural(torch.get_num_threads(), 'thread')}")
    try:
        device = torch.device(requested)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        has = "cuda, cpu" if torch.cuda.is_available() else "cpu"
        raise ConfigError(f"device={requested}: not on this machine; it has {has}") from None
    return Decision(device, "as requested")


def choose_dtype(requested: str, device: torch.device, lora: bool, keep: bool = True) -> Decision:
    """The dtype of the base weights, of policy and reference alike. Adapters are float32 in any case.

    What is measured for it on a CPU is measured once a machine, and noted in the cache folder unless `keep` is false.
    """
    if requested != "auto":
        if requested == "float16" and device.type == "cpu":
            raise ConfigError("model.dtype=float16: a CPU computes it slowly and loosely; choose bfloat16 or float32")
        if requested != "float32" and not lora:
            raise ConfigError(
                f"model.dtype={requested}: with lora=off every weight trains, and updates this small vanish in "
                f"{requested}; choose float32"
            )
        return Decision(getattr(torch, requested), "as requested")
    if not lora:
        return Decision(torch.float32, "every weight trains, and small updates vanish in bfloat16")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Decision(torch.bfloat16, "this GPU has it")
        return Decision(torch.float32, "this GPU has no bfloat16")
    if device.type == "cpu":
        ratio, when = _bfloat16_speed(keep)
        if ratio > 1.25:
            return Decision(torch.bfloat16, f"{ratio:.1f} times as fast as float32 on this CPU, {when}")
        return Decision(torch.float32, f"bfloat16 is {ratio:.1f} times as fast on this CPU, {when}")
    return Decision(torch.float32, f"the safe choice on {device.type}")


def _bfloat16_speed(keep: bool) -> tuple[float, str]:
    """How many times as fast as float32 this CPU multiplies matrices of a small layer, and when it was measured.

    In turns, and the best of many: other work on the machine slows both, and must not change the decision.
    """
    how = [torch.__version__, _cpu_name(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
    known = recall("cpus", how)
    if known is not None and isinstance(known.get("ratio"), float):
        return known["ratio"], "measured earlier"
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    for _ in range(12):
        for dtype in best:
            left, right = torch.ones(512, 768, dtype=dtype), torch.ones(768, 1536, dtype=dtype)
            best[dtype] = min(best[dtype], best_seconds(left, right, times=4))
    ratio = best[torch.float32] / best[torch.bfloat16]
    if keep:
        note("cpus", how, {"ratio": ratio})
    return ratio, "measured"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def best_seconds(left: Tensor, right: Tensor, times: int) -> float:
    """The shortest of several products of two matrices: the best is what noise cannot lower."""
    best = float("inf")
    for _ in range(times):
        wait_for(left.device)
        start = time.perf_counter()
        left @ right
        wait_for(left.device)
        best = min(best, time.perf_counter() - start)
    return best


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has finished its queued work; a CPU has none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
