"""Data-parallel ranks: each holds the whole model, computes its share of a batch, and gradients are summed once a step.

The gradient of a batch is a sum over pairs, so one sum over ranks at the end of a step gives what one process computes,
up to rounding. No wrapper around the model is needed, and a rank without a pair is no special case.
"""

import atexit
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from threading import Event, Thread
from traceback import clear_frames
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpo_cli.engine.engine import SingleEngine
from dpo_cli.engine.ranks import Place
from dpo_cli.errors import ConfigError, DpoError, LostRankError, StoppedError

T = TypeVar("T")
LAST_WORDS = 5.0  # seconds in which every rank that is alive has said so
BEAT = 0.5  # seconds between two looks whether another rank asks
LONG = timedelta(days=7)  # rank 0 may prepare data for hours while the others wait
ROLL_CALL = "lost"  # in the store: a rank has lost another, and asks who is alive
BUCKET = 2**26  # values that are summed in one call
SIGNS_OF_LOSS = ("gloo", "nccl", "connection", "socket", "timed out", "timeout", "broken pipe", "store")


class DdpEngine(SingleEngine):
    """Ranks that each hold every weight."""

    alone = False

    def __init__(self, place: Place, device_type: str, timeout: float) -> None:
        self.rank, self.world_size = place.rank, place.world_size
        self.timeout = timedelta(seconds=timeout)
        on_gpu = device_type == "cuda"
        if on_gpu:
            if place.local_rank >= torch.cuda.device_count():
                raise _said_here(
                    f"rank {place.rank} would be number {place.local_rank + 1} on its computer, which has "
                    f"{torch.cuda.device_count()} GPUs: start one process a GPU"
                )
            torch.cuda.set_device(place.local_rank)
            if self.keeps_all:  # a sum that has failed is seen before its result is used, and nothing wrong is saved
                os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
        self.description = f"{place.world_size} ranks, {'NCCL' if on_gpu else 'gloo'}"
        meeting = _meet(place, "cpu:gloo,cuda:nccl" if on_gpu else "gloo", self.timeout)
        self._store, self._group, self._in_time = meeting

    # Agreement

    @contextmanager
    def watch(self, in_time: bool = False) -> Iterator[None]:
        """Within, a rank that is gone becomes a LostRankError that names it; an error here is told to the others.

        With `in_time` a rank has no more than the time-out for what it does alone, too.
        """
        patient = self._group
        self._group = self._in_time if in_time else patient
        try:
            yield
        except StoppedError as error:
            if not isinstance(error, LostRankError):  # all ranks have agreed to stop
                error.told = self.rank > 0
            raise
        except DpoError as error:
            if error.told is None:
                error.told = self._ends(error.exit_code, str(error))
                if self.rank and not error.told:
                    error.args = (f"rank {self.rank}: {error}",)
            raise
        except (RuntimeError, EOFError) as error:
            if not any(sign in str(error).lower() for sign in SIGNS_OF_LOSS):
                self._ends(1, str(error))
                raise
            raise self._lost(error) from None
        except BaseException as error:
            self._ends(1, type(error).__name__)
            raise
        finally:
            self._group = self._group and patient

    def _leave(self, exit_code: int, text: str) -> None:
        """Say why this rank ends, and let go of the others: a rank that waits for it notices."""
        with suppress(RuntimeError):
            self._store.set(f"ended/{self.rank}", json.dumps([exit_code, text]))
        self._group = self._in_time = None
        _meet.cache_clear()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _ends(self, exit_code: int, text: str) -> bool:
        """Tell the others why this rank ends; whether rank 0 ends with the same words."""
        self._leave(exit_code, text)
        try:  # rank 0 waits until they have read it: the place where they do may end with it
            said = self._last_words(LAST_WORDS, [0] if self.rank else self._others)
        except RuntimeError:
            return False
        return self.rank > 0 and said.get(0, (0, ""))[1] == text

    @property
    def _others(self) -> list[int]:
        return [rank for rank in range(self.world_size) if rank != self.rank]

    def _last_words(self, seconds: float, ranks: Sequence[int]) -> dict[int, tuple[int, str]]:
        """What ranks have said before they ended, of those that say it within some seconds."""
        found: dict[int, tuple[int, str]] = {}
        end = time.monotonic() + seconds
        while len(found) < len(ranks) and time.monotonic() < end:
            for rank in ranks:
                if rank not in found and self._store.check([f"ended/{rank}"]):
                    found[rank] = tuple(json.loads(self._store.get(f"ended/{rank}")))
            time.sleep(0.05)
        return found

    def _lost(self, error: BaseException) -> LostRankError:
        """Which ranks are gone, and why, as far as they have said."""
        clear_frames(error.__traceback__)  # they hold the group, and with it the connections to the others
        try:
            self._store.set(ROLL_CALL, "")
            self._leave(LostRankError.exit_code, "")
            said = self._last_words(LAST_WORDS, self._others)
            alive = [rank for rank in self._others if rank in said or self._store.check([f"alive/{rank}"])]
        except RuntimeError:
            return LostRankError("rank 0 is gone, and with it the place where all ranks meet")
        ended = {rank: words for rank, words in said.items() if words[1]}
        gone = [rank for rank in self._others if rank not in alive]
        if ended:
            rank, (code, text) = next(iter(sorted(ended.items())))
            lost = LostRankError(f"rank {rank} has ended: {text}")
            lost.exit_code, lost.told = code, True
            return lost
        if not gone:  # all are alive, and one has not answered in time
            return LostRankError(f"the ranks have lost each other ({str(error).splitlines()[0]:.160})")
        names = ", ".join(map(str, gone))
        one = len(gone) == 1
        lost = LostRankError(
            f"rank{'' if one else 's'} {names} {'is' if one else 'are'} gone: ended from outside, or silent for "
            f"{self.timeout.total_seconds():g} s"
        )
        lost.told = any(rank < self.rank for rank in alive)
        return lost

    def alike(self, found: Mapping[str, str]) -> None:
        """ConfigError, on every rank, where one has another value than rank 0; empty ones say nothing. Collective."""
        everywhere = self.gather(dict(found))
        for rank, there in enumerate(everywhere):
            for name in sorted({*everywhere[0], *there}):
                first, other = everywhere[0].get(name, ""), there.get(name, "")
                if first and other and first != other:
                    raise ConfigError(
                        f"rank {rank} has another {name} than rank 0: {other:.80} and {first:.80}; every rank must "
                        "find the same program, config and files"
                    )

    def same(self, make: Callable[[], T]) -> T:
        """What `make` returns or raises on rank 0, on every rank; on the others it is not called. Collective."""
        found: list[Any] = [None, None]
        if self.rank == 0:
            try:
                found[0] = make()
            except Exception as error:
                found[1] = error
        dist.broadcast_object_list(found, group=self._group)
        if found[1] is not None:
            raise found[1]
        made: T = found[0]
        return made

    def gather(self, value: T) -> list[T]:
        """The value of each rank, in their order, on every rank. Collective."""
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value, group=self._group)
        return found

    def agree(self, value: int) -> int:
        """The largest value of all ranks. Collective."""
        return int(self._reduced(torch.tensor(value), dist.ReduceOp.MAX))

    def least(self, value: int) -> int:
        """The smallest value of all ranks. Collective."""
        return int(self._reduced(torch.tensor(value), dist.ReduceOp.MIN))

    def _reduced(self, tensor: Tensor, operation: Any) -> Tensor:
        dist.all_reduce(tensor, operation)
        return tensor

    # A step

    def share(self, sizes: Sequence[int]) -> list[int]:
        """This rank's indices: the longest item first, each to the rank that has least."""
        loads, mine = [0] * self.world_size, []
        for index in sorted(range(len(sizes)), key=lambda one: (-sizes[one], one)):
            rank = loads.index(min(loads))
            loads[rank] += sizes[index]
            if rank == self.rank:
                mine.append(index)
        return sorted(mine)

    def rounds(self, own: Sequence[T], spare: T) -> Iterator[tuple[T, bool]]:
        """Its own; the spare one where it has none, so that every rank knows what there is to sum."""
        return ((one, bool(own)) for one in own or [spare])

    def sum(self, table: Tensor) -> Tensor:
        """The table summed over ranks. Collective."""
        return self._reduced(table.detach().clone().contiguous(), dist.ReduceOp.SUM)

    def sum_gradients(self, weights: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over ranks, a bucket of them in one call. Collective, once a step."""
        waiting = iter(weights)
        while bucket := list(_until_full(waiting)):
            flat = torch.cat([_gradient(weight).flatten() for weight in bucket])
            dist.all_reduce(flat)
            for weight, summed in zip(bucket, flat.split([weight.numel() for weight in bucket]), strict=True):
                weight.grad = summed.view_as(weight)


@cache  # a process meets the others once, whatever it trains
def _meet(place: Place, backend: str, timeout: timedelta) -> tuple[dist.Store, Any, Any]:
    """Wait for all ranks: a store that they share, a group whose members wait long for each other, and one in time."""
    try:
        if place.meeting:
            found = next(dist.rendezvous(place.meeting, place.rank, place.world_size, timeout=timeout))[0]
            store: dist.Store = dist.PrefixStore(f"attempt-{place.attempt}", found)
        else:
            store = dist.HashStore()
        dist.init_process_group(
            backend, rank=place.rank, world_size=place.world_size, store=dist.PrefixStore("group", store),
            timeout=timeout,
        )  # fmt: skip
        ended = Event()
        listener = Thread(target=_answer, args=(store, place.rank, ended), daemon=True)
        listener.start()
        atexit.register(listener.join, LAST_WORDS)  # the last that is registered is called first
        atexit.register(ended.set)
        patient, in_time = (dist.new_group(backend="gloo", timeout=limit) for limit in (LONG, timeout))
        return store, patient, in_time
    except (RuntimeError, ValueError) as error:
        raise _said_here(
            f"rank {place.rank} of {place.world_size} has not met the others within {timeout.total_seconds():g} s at "
            f"{place.meeting} ({str(error).splitlines()[0]:.160})"
        ) from None


def _answer(store: dist.Store, rank: int, ended: Event) -> None:
    """Say that this rank is alive once another asks, whatever this one waits for."""
    with suppress(RuntimeError):  # the store is gone
        while not ended.wait(BEAT):
            if store.check([ROLL_CALL]):
                store.set(f"alive/{rank}", "")
                return


def _said_here(text: str) -> ConfigError:
    """The error of one rank, which no other rank says."""
    error = ConfigError(text)
    error.told = False
    return error


def _until_full(weights: Iterator[nn.Parameter]) -> Iterator[nn.Parameter]:
    """The next weights, until there are BUCKET values."""
    values = 0
    for weight in weights:
        yield weight
        values += weight.numel()
        if values >= BUCKET:
            return


def _gradient(weight: nn.Parameter) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad
