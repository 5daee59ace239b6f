"""Where a run starts: from the SFT model, from a checkpoint, or as an earlier run did that it replays."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_cli.config.schema import RunConfig, public_container, read_config, tracker_options
from dpo_cli.console.text import safe_text
from dpo_cli.errors import CheckpointError, StoppedError
from dpo_cli.models.generators import set_rng_states
from dpo_cli.paths import user_path
from dpo_cli.runs.checkpoint import (
    ResolvedSettings,
    TrainingState,
    checkpoint_name,
    read_state,
    restore,
    set_aside_newer,
)
from dpo_cli.runs.manifest import environment, settings_in
from dpo_cli.runs.replay import differences
from dpo_cli.runs.run_directory import RunDirectory, config_changes, find_checkpoint
from dpo_cli.theory.metrics import MeanOverPairs
from dpo_cli.trackers.trackers import Trackers, open_trackers
from dpo_cli.training.optimizers import allocate_state, state_shapes
from dpo_cli.training.parts import Choices, Context, Learner, Material, Progress, Window


@dataclass(frozen=True)
class Start:
    """What a run starts from."""

    checkpoint: Path | None = None
    state: TrainingState | None = None  # of the checkpoint
    changes: list[str] = field(default_factory=list)  # of the config that a resumed run is allowed, in words
    restarted: bool = False  # a run that is resumed without a checkpoint
    earlier: dict[str, Any] = field(default_factory=dict)  # the manifest of the run that is resumed or replayed

    @property
    def settings(self) -> ResolvedSettings | None:
        """What was measured when the run began."""
        return self.state.settings if self.state is not None else settings_in(self.earlier)

    def resume(self, context: Context, learner: Learner, material: Material, progress: Progress) -> None:
        """Restore weights, optimizer, random generators, monitor and progress from the checkpoint."""
        state, checkpoint = self.state, self.checkpoint
        assert state is not None and checkpoint is not None
        if state.step > material.total_steps:
            raise CheckpointError(
                f"{checkpoint}: is at step {state.step}, and the run now ends at {material.total_steps}"
            )
        shapes = state_shapes(learner.trainable, context.config.optimizer)
        allocate_state(learner.optimizer)
        restored = restore(checkpoint, learner.policy, learner.objective, learner.optimizer, shapes)
        set_rng_states(restored.rng)
        learner.monitor.restore(restored.window, state.alarms_sounded)
        metrics = MeanOverPairs.from_sums(state.sums, state.sums_pairs)
        progress.window = Window(metrics, state.sums_tokens, state.sums_seconds)
        progress.step, progress.seconds, progress.skipped_steps = state.step, state.seconds, state.skipped_steps
        progress.records_kept, progress.resumed = state.records, True
        context.reporter.say(f"resuming from {checkpoint} at step {state.step}")


def find_start(context: Context, resumed: bool) -> Start:
    """The checkpoint that a resumed run continues from, and what is known of the run it resumes or replays."""
    config, directory, reporter = context.config, context.directory, context.reporter
    checkpoint, passed_over = context.engine.same(lambda: find_checkpoint(config, directory))
    changes = _check_same_run(context) if checkpoint is not None else []
    if not config.dry_run and context.engine.rank == 0:
        reporter.open_log(directory.log)
    for reason in passed_over:
        reporter.warn(f"passed over a checkpoint: {reason}")
    state = read_state(checkpoint) if checkpoint is not None else None
    earlier = context.engine.same(lambda: _earlier_manifest(directory, config, resumed))
    return Start(checkpoint, state, changes, resumed and checkpoint is None, earlier)


def _check_same_run(context: Context) -> list[str]:
    """CheckpointError for a change that would make it another run; the changes that are allowed, in words."""
    directory, reporter = context.directory, context.reporter
    refused, told = config_changes(read_config(directory.config), context.config)
    if refused:
        reporter.say(f"resume: the config is not that of {directory.path}")
        reporter.grid(["key", "was", "is"], [[change.key, change.was, change.now] for change in refused], left=3)
        raise CheckpointError(
            f"resume: the config is not that of {directory.path} ({'; '.join(map(str, refused))}); "
            "start a new run, or undo the changes"
        )
    for change in told:
        reporter.warn(f"resuming with another {change}: the run is no longer the one that was started")
    return [str(change) for change in told]


def _earlier_manifest(directory: RunDirectory, config: RunConfig, resumed: bool) -> dict[str, Any]:
    """The manifest of the run that this one resumes, restarts or replays; else empty."""
    if resumed and directory.config.is_file():
        same = not config_changes(read_config(directory.config), config)[0]
        return directory.read_manifest() if same else {}
    if config.replay is None:
        return {}
    return RunDirectory(user_path(config.replay, CheckpointError, "replay")).read_manifest()


def manifest_of(context: Context, learner: Learner, material: Material, choices: Choices) -> dict[str, Any]:
    """What manifest.json says of a run: enough to run it again, and to say what is different then."""
    config, source, settings = context.config, material.source, learner.settings
    return {
        **environment(choices.device.value),
        "argv": sys.argv[1:],
        "seed": config.seed,
        "device": str(choices.device.value),
        "dtype": settings.dtype,
        "deterministic": config.deterministic,
        "model": {
            "name": source.name,
            "revision": config.model.revision,
            "path": source.path,
            "origin": source.origin,
            "fingerprint": learner.fingerprint,
        },
        "batches": {
            "layout": settings.layout,
            "token_budget": settings.token_budget,
            "max_pairs": settings.max_pairs,
        },
        "template": {"kind": material.encoder.kind, "closing_token": material.encoder.closing},
        "data_fingerprint": material.data.train.fingerprint,
        "data": material.data.facts(),
        "total_steps": material.total_steps,
    }


def say_what_differs(context: Context, learner: Learner, material: Material, choices: Choices, start: Start) -> None:
    """Say what is different from the run that this one resumes, restarts or replays: its numbers may be, too."""
    earlier, reporter, replay = start.earlier, context.reporter, context.config.replay
    if not earlier:
        return
    found = differences(earlier, manifest_of(context, learner, material, choices))
    changes = earlier.get("resumed_with")
    if replay is not None and isinstance(changes, list):
        found += [f"it was resumed with {safe_text(change, 100)}" for change in changes]
    for difference in found:
        reporter.warn(f"different from when the run started: {difference}")
    if found:
        reporter.warn("the numbers are those of the earlier run only as far as these differences allow")
    elif replay is not None and start.checkpoint is None:
        reporter.say(f"replay of {safe_text(replay)}: versions, device, data and model are the same")


def open_records(
    context: Context, learner: Learner, material: Material, choices: Choices, start: Start, progress: Progress
) -> None:
    """Make the run directory ready for new lines: what was recorded after the checkpoint is taken back."""
    directory, reporter, engine = context.directory, context.reporter, context.engine
    for path in engine.same(lambda: set_aside_newer(directory.checkpoints, progress.step)):
        reporter.warn(f"{path.name} lies after step {progress.step} and is set aside")
    evaluations = engine.same(lambda: _kept_evaluations(directory, progress.records_kept))
    progress.evaluated = {line["step"]: line for line in evaluations}
    engine.same(lambda: directory.remove_samples(checkpoint_name(progress.step)))
    if start.restarted:
        reporter.say(f"no checkpoint in {directory.path} yet: starting from the beginning")
    if start.checkpoint is None:
        engine.same(lambda: directory.write_config(context.config))
        facts = manifest_of(context, learner, material, choices)
        engine.same(lambda: directory.write_manifest(facts))
    elif start.changes:  # what is written is what is done, and a replay says that there was a change
        before = directory.read_manifest()
        resumed_with = [*before.get("resumed_with", []), *start.changes]
        engine.same(lambda: directory.write_manifest({**before, "resumed_with": resumed_with}))
        engine.same(lambda: directory.write_config(context.config))
    engine.same(lambda: directory.take(material.data.train.trained_on_file, directory.trained_on))


@contextmanager
def tracked(context: Context, progress: Progress) -> Iterator[Trackers]:
    """Within, the trackers of the config are open, on rank 0; a run that does not end tells them how it ended."""
    config, directory = context.config, context.directory
    options = tracker_options(config) if context.engine.rank == 0 else {}
    resumed_at = progress.step if progress.resumed else None
    name = f"{directory.path.parent.name}/{directory.path.name}"
    facts = public_container(config)
    trackers = open_trackers(options, directory.path, name, facts, resumed_at, context.reporter.warn)
    try:
        yield trackers
    except BaseException as error:
        status = "stopped" if isinstance(error, StoppedError) else "failed"
        trackers.finish({"status": status, "reason": str(error)})
        raise


def _kept_evaluations(directory: RunDirectory, records: int) -> list[dict[str, Any]]:
    directory.metrics.cut(records)
    return [line for line in directory.metrics.read() if line["split"] == "eval"]
