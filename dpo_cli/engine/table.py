"""The engines by name, and how a run gets its own."""

from collections.abc import Callable
from typing import Protocol

from dpo_cli.engine.engine import SINGLE, Engine
from dpo_cli.engine.ranks import Place, find_place
from dpo_cli.errors import ConfigError

TIMEOUT = 1800.0  # seconds after which a rank of a command without `engine.timeout` counts as lost


class Options(Protocol):
    """What a config says of the engine."""

    timeout: float
    cpu_offload: bool

    @property
    def name(self) -> str:
        """One of `ENGINES`."""
        ...

    @property
    def processes(self) -> int | str:
        """On this computer, or auto."""
        ...


def _ddp(place: Place, device_type: str, options: Options) -> Engine:
    from dpo_cli.engine.ddp import DdpEngine

    return DdpEngine(place, device_type, options.timeout)


def _fsdp(place: Place, device_type: str, options: Options) -> Engine:
    from dpo_cli.engine.fsdp import FsdpEngine

    if place.world_size == 1 and not options.cpu_offload:
        raise ConfigError("engine=fsdp: one rank shards nothing; choose engine=single, or more engine.processes")
    if options.cpu_offload and device_type == "cpu":
        raise ConfigError("engine.cpu_offload=true: a CPU has no other memory to move weights to; leave it out")
    return FsdpEngine(place, device_type, options.timeout, options.cpu_offload)


# Chosen by `engine.name`.
ENGINES: dict[str, Callable[[Place, str, Options], Engine]] = {
    "single": lambda place, device_type, options: SINGLE,
    "ddp": _ddp,
    "fsdp": _fsdp,
}


def open_engine(options: Options, device_type: str) -> Engine:
    """The engine of a config for this process; the ranks have met when it returns.

    ConfigError where the launcher and the config do not agree.
    """
    place = find_place() or Place()
    if options.name == "single" and place.world_size > 1:
        raise ConfigError(
            f"engine=single: started as rank {place.rank} of {place.world_size}, and each would train a run of its "
            "own; choose engine=ddp or engine=fsdp"
        )
    _check_processes("engine.processes", options.processes, place)
    return ENGINES[options.name](place, device_type, options)


def open_data_parallel(processes: int | str, device_type: str) -> Engine:
    """The engine of a command that holds the whole model in each of its processes; SINGLE for one process.

    `processes` is what the config says, on this computer; ConfigError where the launcher has started another number.
    """
    place = find_place()
    if place is None or place.world_size == 1:
        return SINGLE
    _check_processes("processes", processes, place)
    from dpo_cli.engine.ddp import DdpEngine

    return DdpEngine(place, device_type, TIMEOUT)


def _check_processes(key: str, processes: int | str, place: Place) -> None:
    here = place.local_world_size
    if processes != "auto" and here is not None and int(processes) != here:
        raise ConfigError(f"{key}={processes}: the launcher has started {here} here; leave {key} out")
