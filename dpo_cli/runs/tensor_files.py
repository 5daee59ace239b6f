"""Named tensors in safetensors files: one file, or several parts where together they are too many for memory.

Parts are named as transformers names those of a model: `optimizer-00001-of-00003.safetensors`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dpo_cli.storage.durable import UNFINISHED

PART_BYTES = 4 * 2**30


@dataclass
class Gathered:
    """Tensors that are ready to be written: in memory, and before those in files of which each is full."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    full_parts: list[Path] = field(default_factory=list)
    trouble: Exception | None = None  # for which a part could not be written

    def write(self, file: Path) -> None:
        """Write them to `file`, or to its parts. OSError or SafetensorError where that fails."""
        if self.trouble is not None:
            raise self.trouble
        parts = len(self.full_parts) + bool(self.tensors or not self.full_parts)
        for number, part in enumerate(self.full_parts, start=1):
            part.rename(_part(file, number, parts))
        if self.tensors or not self.full_parts:
            save_file(self.tensors, file if parts == 1 else _part(file, parts, parts))

    def discard(self) -> None:
        """Remove the parts that were not written."""
        for part in self.full_parts:
            part.unlink(missing_ok=True)


def gather(named: Iterable[tuple[str, Tensor]], scratch: Path, keeps: bool) -> Gathered:
    """Take what `named` yields, PART_BYTES at a time in memory; full parts go to files in the folder `scratch`.

    `named` may be made by all ranks together, so it is gone through to its end whatever happens; one that does not
    keep its tensors passes keeps=False.
    """
    found, size = Gathered(), 0
    for name, tensor in named:
        if not keeps or found.trouble is not None:
            continue
        found.tensors[name] = tensor
        size += tensor.nbytes
        if size >= PART_BYTES:
            part = scratch / f"{UNFINISHED}part-{len(found.full_parts)}"
            try:
                scratch.mkdir(parents=True, exist_ok=True)
                save_file(found.tensors, part)
            except (OSError, SafetensorError) as error:
                found.trouble = error
            found.full_parts.append(part)
            found.tensors, size = {}, 0
    return found


def _part(file: Path, number: int, parts: int) -> Path:
    return file.with_name(f"{file.stem}-{number:05d}-of-{parts:05d}{file.suffix}")


def is_part_of(name: str, file: str) -> bool:
    """Whether a file's name is `file` or that of one of its parts."""
    stem, dot, ending = file.rpartition(".")
    return name == file or (name.startswith(f"{stem}-") and name.endswith(f"{dot}{ending}"))


def parts_of(file: Path) -> list[Path]:
    """The file, or its parts in their order; empty where there is neither."""
    return sorted(path for path in file.parent.iterdir() if is_part_of(path.name, file.name))


def names_in(file: Path) -> set[str]:
    """The names of the tensors in a file or its parts."""
    names: set[str] = set()
    for part in parts_of(file):
        with safe_open(part, framework="pt") as tensors:
            names |= set(tensors.keys())
    return names


def tensors_in(file: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a file or its parts, one after the other, in memory of their own.

    They are read from a mapped file. Without a copy, a checkpoint that the run prunes would keep its space on the disk,
    and truncating the file would kill the run.
    """
    for part in parts_of(file):
        with safe_open(part, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                yield name, tensors.get_tensor(name).clone()
