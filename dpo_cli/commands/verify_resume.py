"""verify_resume: proves on the user's machine, model and data that a stopped run resumes to the same bytes.

A few steps are trained straight, and again from the checkpoint in their middle, by the same code that trains and
resumes every run; then every tensor and every metric is compared.
"""

import io
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from dpo_cli.config.schema import DataConfig, RunConfig
from dpo_cli.console.reporter import Reporter
from dpo_cli.console.text import duration, plural, safe_text
from dpo_cli.engine.engine import Engine
from dpo_cli.engine.table import open_engine
from dpo_cli.errors import CheckpointError, StoppedError
from dpo_cli.models.dtype import choose_device
from dpo_cli.runs.checkpoint import checkpoint_name
from dpo_cli.training.runner import train

STEPS, STOP = 4, 2
ANSWERS = 8  # generated at its two evaluations, at most
TIMINGS = ("seconds", "pairs_per_second", "tokens_per_second", "peak_memory_gib")


def verify_resume(config: RunConfig, reporter: Reporter) -> None:
    """Say that resume is exact here; CheckpointError names what differs. No run is left on disk.

    The run is the config's own, shortened: 4 steps without warm-up, on pairs enough for them, with an evaluation and a
    half-full log window after the checkpoint. It goes to its last step, whatever budget it has.
    """
    enough = 2 * STEPS * config.batch_size + 64
    data = _shortened(config.data, enough)
    # Values of this shortened run are not left to others: they would begin a rounding off.
    short = replace(
        config.to_the_end(),
        data=data,
        reference=replace(config.reference, cache="off" if config.reference.cache == "off" else "run"),
        optimizer=replace(config.optimizer, warmup_steps=0),
        max_steps=STEPS,
        save_every=STOP,
        eval_every=STEPS - 1,
        log_every=STEPS - 1,
        keep_checkpoints=STEPS,
        samples=replace(config.samples, n=min(config.samples.n, ANSWERS)),
        verify_resume=False,
        tracker=None,
    )
    engine = open_engine(config.engine, choose_device(config.device).value.type)
    reporter = reporter if engine.rank == 0 else Reporter(io.StringIO())
    with engine.watch(), _shared_folder(engine) as folder:
        straight, resumed = folder / "straight", folder / "resumed"
        try:
            reporter.say(f"training {STEPS} steps straight")
            _train_in_silence(replace(short, output_dir=str(straight)))
            engine.same(lambda: _as_stopped(straight, resumed))
            reporter.say(f"training the last {STEPS - STOP} of them again from the checkpoint after step {STOP}")
            _train_in_silence(replace(short, output_dir=str(resumed), resume="auto"))
        except StoppedError as stop:
            stop.args = (str(stop).split(" at step ")[0],)
            raise
        found = engine.same(lambda: list(_differences(straight, resumed)))
        lines, seconds = engine.same(lambda: (len(_metrics(straight)), _metrics(straight)[-1]["seconds"]))
    if found:
        exact = "" if config.deterministic else "; deterministic=true makes a GPU take the same sums in the same order"
        raise CheckpointError(f"verify_resume: not exact on this machine: {'; '.join(found)}{exact}")
    reporter.say(
        f"resume is exact here: weights, optimizer, random states and {plural(lines, 'line')} of metrics are the same "
        f"to the last bit ({STEPS} steps took {duration(seconds)})"
    )


@contextmanager
def _shared_folder(engine: Engine) -> Iterator[Path]:
    """A folder that every rank knows and that is gone afterwards."""
    folder = engine.same(lambda: Path(tempfile.mkdtemp(prefix="dpo-verify-")))
    try:
        yield folder
    finally:
        if engine.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _shortened(data: DataConfig, enough: int) -> DataConfig:
    """The first rows of the data; of a mixture those of each source, in the same proportions."""
    sources = {
        name: replace(source, weight=source.weight or float(source.pairs or 1), pairs=None,
                      options=_shortened(source.options, enough))
        for name, source in data.sources.items()
    }  # fmt: skip
    return replace(data, limit=min(data.limit or enough, enough), eval_limit=8, sources=sources)


def _train_in_silence(config: RunConfig) -> None:
    silent = Reporter(io.StringIO())
    try:
        train(config, silent, "verify")
    finally:
        silent.close()


def _as_stopped(straight: Path, copy: Path) -> None:
    """A copy of the run as it would lie there had it been killed after the checkpoint in its middle."""
    shutil.copytree(straight, copy)
    shutil.rmtree(copy / "final")
    shutil.rmtree(copy / "checkpoints" / checkpoint_name(STEPS))


def _differences(straight: Path, resumed: Path) -> Iterator[str]:
    """In words, what is not the same in two runs."""
    one, other = (run / "checkpoints" / checkpoint_name(STEPS) for run in (straight, resumed))
    for name in sorted(file.name for file in one.glob("*.safetensors")):
        if (one / name).read_bytes() != (other / name).read_bytes():
            before, after = load_file(one / name), load_file(other / name)
            if before.keys() != after.keys() or not before:
                yield f"{name} holds other tensors"
                continue
            largest, where = max(
                (float((before[key].double() - after[key].double()).abs().max()), key) for key in before
            )
            yield f"{name} is off by up to {largest:.2g} ({safe_text(where)})"
    if len(_metrics(straight)) != len(_metrics(resumed)):
        yield "metrics.jsonl has another number of lines"
    lines = zip(_metrics(straight), _metrics(resumed), strict=False)
    for number, (line, again) in enumerate(lines, start=1):
        for key in line.keys() | again.keys():
            if key not in TIMINGS and line.get(key) != again.get(key):
                yield f"metrics.jsonl line {number}: {key} is {line.get(key)}, resumed {again.get(key)}"


def _metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
