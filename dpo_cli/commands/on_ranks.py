"""What the commands share that spread their work over processes, each of which holds the whole model.

Every rank runs the whole command on the same prompts, samples or pairs, computes its share of them, and knows the
results of all. Rank 0 alone prints and writes.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dpo_cli.console.reporter import Reporter
from dpo_cli.engine.engine import Engine
from dpo_cli.engine.table import open_data_parallel
from dpo_cli.models.dtype import choose_device
from dpo_cli.runs.manifest import what_ranks_share
from dpo_cli.signals import StopSignals


@contextmanager
def on_every_rank(config: Any, reporter: Reporter) -> Iterator[tuple[Engine, Reporter, StopSignals]]:
    """The engine of a command whose config has `processes` and `device`, the reporter of this rank, and stop signals.

    Within, a signal to any rank stops all, and where a rank is lost all end. ConfigError where ranks differ in config
    or versions.
    """
    engine = open_data_parallel(config.processes, choose_device(config.device).value.type)
    own = reporter if engine.rank == 0 else Reporter(io.StringIO())
    with engine.watch():
        if not engine.alone:
            engine.alike(what_ranks_share(config))
            own.facts([("processes", engine.description)])
        with StopSignals(own.warn, engine.agree, announces=engine.rank == 0) as signals:
            yield engine, own, signals
