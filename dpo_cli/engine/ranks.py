"""Where this process stands among the processes of a run: read from the environment, without torch.

torchrun and Kubernetes set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; Slurm's srun its own variables;
and `start_workers` those of torchrun, with a file in which the ranks of one computer find each other.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from dpo_cli.errors import ConfigError

MEETING_FILE = "DPO_MEETING_FILE"  # set by `start_workers`


@dataclass(frozen=True)
class Place:
    """One process among those of a run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # on its computer
    local_world_size: int | None = None  # None: not known
    meeting: str = ""  # where the ranks find each other: an address of torch.distributed; empty for one process
    attempt: str = "0"  # how often torchrun has started the ranks again: what the last ones left there is not read


def find_place(environ: Mapping[str, str] | None = None) -> Place | None:
    """What a launcher has left in the environment; None where there was none.

    ConfigError where it is not complete.
    """
    found = os.environ if environ is None else environ
    if "RANK" in found and "WORLD_SIZE" in found:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        rank, world, local, local_world, address, port = (found.get(name, "") for name in names)
        file = found.get(MEETING_FILE)
        meeting = f"file://{file}" if file else "env://" if address and port else ""
    elif found.get("SLURM_STEP_NUM_TASKS", "1") != "1" and "SLURM_PROCID" in found:
        rank, world, local = found["SLURM_PROCID"], found["SLURM_STEP_NUM_TASKS"], found.get("SLURM_LOCALID", "0")
        local_world = found.get("SLURM_STEP_TASKS_PER_NODE", found.get("SLURM_NTASKS_PER_NODE", "")).split("(")[0]
        address = found.get("MASTER_ADDR") or first_host(found.get("SLURM_STEP_NODELIST", ""))
        job = found.get("SLURM_JOB_ID", "")
        port = found.get("MASTER_PORT") or str(20000 + (int(job) if job.isdigit() else 0) % 20000)
        meeting = f"tcp://{address}:{port}" if address else ""
    else:
        return None
    try:
        place = Place(
            int(rank), int(world), int(local or 0), int(local_world) if local_world.isdigit() else None, meeting,
            found.get("TORCHELASTIC_RESTART_COUNT", "0"),
        )  # fmt: skip
    except ValueError:
        raise ConfigError(f"RANK={rank}, WORLD_SIZE={world}: a launcher sets whole numbers") from None
    if not 0 <= place.rank < place.world_size:
        raise ConfigError(f"RANK={rank}, WORLD_SIZE={world}: a rank lies between 0 and the number of ranks less one")
    if place.world_size > 1 and not meeting:
        raise ConfigError("RANK and WORLD_SIZE are set, and MASTER_ADDR and MASTER_PORT are not: the ranks cannot meet")
    return place


def first_host(nodes: str) -> str:
    """The first of Slurm's nodes: `gpu[03-05,9],login` is gpu03."""
    name, numbers, rest = re.match(r"([^\[,]*)(?:\[(\d+)[^\]]*\])?([^\[,]*)", nodes).groups()  # type: ignore[union-attr]
    return f"{name}{numbers or ''}{rest or ''}"


def place_of_process() -> Place:
    """The place, for whoever only wants to know whether to speak; that of a single process where it is not known."""
    try:
        return find_place() or Place()
    except ConfigError:
        return Place()
