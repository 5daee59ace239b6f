"""What watching costs: preflight and drift radar beside the training steps they guard, on the embedded model.

    python scripts/bench.py [STEPS]

Prints medians and the share of a 200-step run. Nothing else should run beside it.
"""

import io
import statistics
import sys
import tempfile
import time
from pathlib import Path

from dpo_cli.cli import quiet_libraries
from dpo_cli.composition import composed, parse_overrides
from dpo_cli.config import RunConfig, run_config
from dpo_cli.console.reporter import Reporter
from dpo_cli.training.run import Run
from dpo_cli.training.run_directory import RunDirectory
from dpo_cli.training.runner import preflight_of, put_together, train_step

RUN_STEPS = 200


def assembled(folder: Path) -> Run:
    """A run of the demo, put together in silence."""
    choice = composed("train", parse_overrides(["experiment=demo", f"output_dir={folder}"]), RunConfig)
    directory = RunDirectory(folder)
    directory.create()
    return put_together(run_config(choice.container), directory, Reporter(io.StringIO()), lambda: None, None)


def main() -> None:
    """Measure and print."""
    quiet_libraries()
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 6
    with tempfile.TemporaryDirectory() as folder:
        run = assembled(Path(folder))
        preflights, step_seconds, radar_seconds = [], [], []
        for _ in range(3):
            started = time.perf_counter()
            preflight_of(run)
            preflights.append(time.perf_counter() - started)
        for batch in run.schedule.batches(0, steps + 1):
            started = time.perf_counter()
            train_step(run, [run.data.train[place] for place in batch])
            step_seconds.append(time.perf_counter() - started)
            started = time.perf_counter()
            run.radar.alarms(run.radar.drift())
            radar_seconds.append(time.perf_counter() - started)
    step = statistics.median(step_seconds[1:])  # the first one warms up
    preflight, radar = statistics.median(preflights), statistics.median(radar_seconds)
    whole = RUN_STEPS * step
    print(
        f"step        {step:8.3f} s median of {steps} (from {min(step_seconds[1:]):.2f} to {max(step_seconds[1:]):.2f})"
    )
    print(f"preflight   {preflight:8.3f} s median of 3: {100 * preflight / whole:.2f}% of {RUN_STEPS} steps")
    print(f"radar       {1000 * radar:8.3f} ms a logged step: {100 * radar / step:.3f}% of a step")


if __name__ == "__main__":
    main()
