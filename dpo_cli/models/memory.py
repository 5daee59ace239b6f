"""How many tokens one forward and backward pass can hold: measured on two sizes, not guessed from a formula.

What a forward pass keeps for its backward pass grows in proportion to its tokens. Two rows of different length give
the bytes per token; divided into the free memory they give the number of tokens.
"""

import ctypes
import gc
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor

from dpo_cli.console.text import significant
from dpo_cli.data.batches import Layout, longest_side, packed_tokens
from dpo_cli.data.tokens import TokenizedPair
from dpo_cli.engine.engine import SINGLE, Engine, local
from dpo_cli.errors import OutOfMemoryError
from dpo_cli.models.logps import (
    MicroBatch,
    MicroBatcher,
    causal_model,
    make_micro_batch,
    response_logps,
)

# Beyond these a longer row is no faster, only larger.
ENOUGH_TOKENS = {"cpu": 1536, "mps": 4096, "cuda": 16384}
ENOUGH_ELSEWHERE = 4096  # on other devices
TRAINING_BYTES = 12  # of a weight that trains: its gradient and two moments of AdamW, in float32
CGROUP = Path("/sys/fs/cgroup")
T = TypeVar("T")
SHARE = 0.6  # of the free memory that a forward pass may take; the backward pass and other programs need some


@dataclass(frozen=True)
class Budget:
    """Tokens of a micro-batch, forward and backward, and where the number comes from."""

    tokens: int
    fits: int  # how many would fit into memory
    bytes_per_token: float
    free_bytes: int

    def __str__(self) -> str:
        each = f"{significant(self.bytes_per_token / 2**20)} MiB a token"
        if self.tokens < self.fits:
            return f"{self.tokens:,} tokens in a micro-batch: more are no faster; {each}, measured"
        free = significant(self.free_bytes / 2**30)
        return f"{self.tokens:,} tokens in a micro-batch: {each}, {free} GiB free, measured"


def enough_tokens(device: torch.device) -> int:
    """The tokens of a micro-batch beyond which a longer one is no faster."""
    return ENOUGH_TOKENS.get(device.type, ENOUGH_ELSEWHERE)


def ran_out(error: BaseException) -> bool:
    """Whether an error means that a device has no memory left."""
    words = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "alloc" in words and ("memory" in words or "cublas" in words)
    )


@contextmanager
def memory_errors() -> Iterator[None]:
    """Within, the device's own error of memory that ran out becomes an OutOfMemoryError with what usually helps."""
    try:
        yield
    except Exception as error:
        if not ran_out(error):
            raise
        raise OutOfMemoryError(
            "out of memory. What helps, in this order: micro_batch_size=1, engine.gradient_checkpointing=true, "
            "reference=adapter_off, a smaller data.max_length"
        ) from None


class DoesNotFitError(Exception):
    """A micro-batch for which memory ran out; `pairs` are what it held."""

    def __init__(self, pairs: Sequence[TokenizedPair]) -> None:
        super().__init__(f"{len(pairs)} pairs")
        self.pairs = list(pairs)


@contextmanager
def one_forward_pass(pairs: Sequence[TokenizedPair]) -> Iterator[None]:
    """Within, memory that runs out becomes DoesNotFitError, which says for which pairs."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        raise DoesNotFitError(pairs) from None


def make_room(device: torch.device) -> None:
    """Give cached blocks back after memory ran out; call it outside of `except`, because the error holds tensors."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def alone_too_large(pair: TokenizedPair) -> OutOfMemoryError:
    """The error for a pair that does not fit into memory by itself."""
    return OutOfMemoryError(
        f"out of memory on row {pair.index} alone in its forward pass: {pair.tokens:,} tokens "
        f"(prompt {len(pair.prompt):,}, chosen {len(pair.chosen):,}, rejected {len(pair.rejected):,}). "
        "What helps, in this order: engine.gradient_checkpointing=true, reference=adapter_off, a smaller "
        "data.max_length"
    )


def each_micro_batch(
    batcher: MicroBatcher, pairs: Sequence[TokenizedPair], work: Callable[[MicroBatch], T], engine: Engine = SINGLE
) -> Iterator[T]:
    """`work` on each micro-batch of this rank's share of the pairs, without gradient.

    One that does not fit is halved until it does; OutOfMemoryError where a single pair does not fit. Where ranks cannot
    try again by themselves, nothing is halved.
    """
    rounds = batcher.rounds(pairs, engine)
    if not engine.retries:
        for some, counts in rounds:
            with torch.no_grad():
                done = work(batcher.lay_out(some))
            if counts:
                yield done
        return
    waiting = [some for some, counts in rounds if counts][::-1]
    while waiting:
        some = waiting.pop()
        found: list[T] = []
        with suppress(DoesNotFitError), one_forward_pass(some), torch.no_grad():
            found.append(work(batcher.lay_out(some)))
        if found:
            yield found[0]
        elif len(some) == 1:
            raise alone_too_large(some[0])
        else:
            make_room(batcher.device)
            waiting += [some[len(some) // 2 :], some[: len(some) // 2]]


def give_memory_back(device: torch.device) -> None:
    """Hand memory that is free inside the process back to the system: after a model has gone, say.

    Not in every step: to get new pages again costs a tenth of a step.
    """
    if device.type == "cpu" and sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


def peak_memory_gib(device: torch.device) -> float | None:
    """The most memory used so far: the allocator's on CUDA, else this process's resident memory; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def describe_peak_memory(device: torch.device) -> str:
    """The same for people: `1.5 GiB`, or that it is not known."""
    peak = peak_memory_gib(device)
    return "not known on this system" if peak is None else f"{significant(peak)} GiB"


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take: of the GPU, or of the machine and the container it runs in."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return min(_available_on_machine(), _left_in_container())


def _available_on_machine() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return 4 * 2**30  # no such file outside Linux: a careful guess


def _left_in_container() -> int:
    for folder, limit, used, cached in (
        (CGROUP, "memory.max", "memory.current", "inactive_file"),
        (CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            left = int((folder / limit).read_text()) - int((folder / used).read_text())
            # Files that were read, the model among them, count as used and give way when memory is asked for.
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            return left + int(counts.get(cached, 0))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return 2**62


def weight_bytes(folder: str, dtype: torch.dtype) -> int | None:
    """Bytes that a model's weights will take in `dtype`, from the headers of its files; None where it is not local."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        return None
    total = 0
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total * dtype.itemsize


def plan_memory(folder: str, dtype: torch.dtype, device: torch.device, second_model: bool, saved: int = 0) -> str:
    """In words, what the weights will take of the memory that is free; OutOfMemoryError where they cannot fit.

    Asked before anything is loaded. `second_model` says whether the reference is loaded beside the policy, `saved` how
    many bytes of a model go when it is quantised.
    """
    weights, free = weight_bytes(folder, dtype), free_memory(device)
    if weights is None:
        return f"{significant(free / 2**30)} GiB free on {device}"
    weights -= saved
    models = 2 if second_model else 1
    needed, left = (f"{significant(size / 2**30)} GiB" for size in (models * weights, free))
    if models * weights > free:
        what = "two models' weights" if second_model else "the model's weights"
        remedy = (
            "reference=adapter_off or reference.cache=auto holds them once"
            if second_model
            else "a smaller model or a larger device is needed"
        )
        name = str(dtype).removeprefix("torch.")
        name += ", quantised," if saved else ""
        raise OutOfMemoryError(f"{what} in {name} take {needed}, and {device} has {left} free: {remedy}")
    return f"weights{' of both models' if second_model else ''} {needed}, of {left} free on {device}"


def kept_bytes(policy: Any, pairs: Sequence[TokenizedPair], device: torch.device, layout: Layout) -> tuple[int, int]:
    """Tokens of a forward pass on these pairs, and the bytes it keeps for its backward pass, weights aside."""
    # By the storage itself and not its address: tensors without content (models/meter.py) all have the address 0.
    weights = {local(weight).untyped_storage()._cdata for weight in policy.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            storages[storage._cdata] = storage.nbytes()
        return tensor.detach()  # an output that its own graph held would never be freed

    micro_batch = make_micro_batch(pairs, device, layout)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logps = response_logps(policy, micro_batch)
    del logps
    return micro_batch.input_ids.numel(), sum(storages.values())


def measure_budget(policy: Any, pairs: Sequence[TokenizedPair], device: torch.device, layout: Layout) -> Budget:
    """The token budget of a forward and backward pass, from what a short and a longer row of real pairs keep."""
    kept = [kept_bytes(policy, some, device, layout) for some in two_sizes(pairs)]
    return budget_of(kept, policy, free_memory(device), device)


def budget_of(kept: Sequence[tuple[int, int]], policy: Any, free: int, device: torch.device) -> Budget:
    """The token budget from the tokens and the kept bytes of two rows, with `free` bytes beside the weights."""
    (few, little), (many, much) = kept
    per_token = (much - little) / (many - few) if many > few and much > little else much / many
    # The backward pass holds gradients beside what was kept, a layer's worth at a time; with checkpointing also what
    # that layer computes again, which is as much as all that was kept, or more.
    checkpointed = getattr(causal_model(policy), "is_activation_checkpointing", False)
    per_token *= 2.5 if checkpointed else 1.25
    free -= TRAINING_BYTES * sum(local(weight).numel() for weight in policy.parameters() if weight.requires_grad)
    fits = max(1, int(SHARE * free / per_token))
    return Budget(min(enough_tokens(device), fits), fits, per_token, max(0, free))


def two_sizes(pairs: Sequence[TokenizedPair]) -> list[list[TokenizedPair]]:
    """A row of some 60 tokens and one of some 180, of the shortest pairs."""
    rows: list[list[TokenizedPair]] = []
    for wanted in (60, 180):
        row: list[TokenizedPair] = []
        for pair in sorted(pairs[:256], key=longest_side):
            row.append(pair)
            if packed_tokens(row) >= wanted:
                break
        rows.append(row)
    return rows
