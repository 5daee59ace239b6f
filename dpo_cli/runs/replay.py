"""What a run's numbers depend on, and running it again: versions, device, data and weights, compared by name."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dpo_cli.config.schema import RunConfig, flat, read_config
from dpo_cli.console.text import first_line, safe_text
from dpo_cli.errors import CheckpointError, ConfigError
from dpo_cli.paths import user_path
from dpo_cli.runs.manifest import environment, weights_digest
from dpo_cli.runs.run_directory import RunDirectory, config_changes
from dpo_cli.training.run import Run

# What must be the same for the same bytes to come out, besides config and settled choices: keys of the manifest.
DECIDING = ("dpo_cli", "git_revision", "python", "platform", "packages", "hardware", "data_fingerprint", "model")
# Of those, what says where something lies and not what it is.
PASSING = ("model.path", "model.origin", "hardware.device")


def manifest_of(run: Run) -> dict[str, Any]:
    """What manifest.json says of a run: enough to run it again, and to say what is different then."""
    return {
        **environment(run.device),
        "argv": sys.argv[1:],
        "seed": run.config.seed,
        "device": str(run.device),
        "dtype": run.settled.dtype,
        "deterministic": run.config.deterministic,
        "model": {
            "name": run.source.name,
            "revision": run.config.model.revision,
            "path": run.source.path,
            "origin": run.source.origin,
            "digest": run.digest,
        },
        "batches": {"way": run.batching.way.value, "token_budget": run.token_budget},
        "template": {"kind": run.encoder.kind, "closing_token": run.encoder.closing},
        "data_fingerprint": run.data.fingerprint,
        "data": {name.replace(" ", "_"): report.as_dict() for name, report in run.data.reports()},
        "total_steps": run.total_steps,
    }


def differences(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In words, `key: was -> is`, where two manifests differ in what decides a run's bytes."""
    before, after = flat(earlier), flat(now)
    return [
        f"{key}: {safe_text(before.get(key), 60)} -> {safe_text(after.get(key), 60)}"
        for key in sorted(before.keys() | after.keys())
        if key.split(".")[0] in DECIDING and key not in PASSING and before.get(key) != after.get(key)
    ]


def earlier_manifest(directory: RunDirectory, config: RunConfig, going_on: bool) -> dict[str, Any]:
    """The manifest of the run that this one goes on with, begins anew or replays; else empty."""
    if going_on and directory.config.is_file():
        same = not config_changes(read_config(directory.config), config)[0]
        return directory.read_manifest() if same else {}
    if config.replay is None:
        return {}
    return RunDirectory(user_path(config.replay, CheckpointError, "replay")).read_manifest()


def say_what_differs(run: Run, earlier: dict[str, Any]) -> None:
    """Under which conditions this run's numbers are not those of the run it repeats or goes on with."""
    found = differences(earlier, manifest_of(run))
    changes = earlier.get("resumed_with")
    if run.config.replay is not None and isinstance(changes, list):
        found += [f"it was resumed with {safe_text(change, 100)}" for change in changes]
    for difference in found:
        run.reporter.warn(f"other than when the run was begun: {difference}")
    if found:
        run.reporter.warn("its numbers are those of the run that was begun only as far as these allow")
    elif run.config.replay is not None and not run.resumed:
        run.reporter.say(f"replay of {safe_text(run.config.replay)}: versions, device, data and model are the same")


def replay_in_words(run: Run, weights: str | None) -> list[tuple[str, str]]:
    """Whether a replayed run has come to the same weights."""
    if run.config.replay is None:
        return []
    replayed = RunDirectory(user_path(run.config.replay, CheckpointError, "replay"))
    before = replayed.read_manifest().get("weights_sha256") or weights_digest(replayed.final)
    if before is None:
        return [("replay", f"{safe_text(replayed.path)} has not come to its end: there is nothing to compare with")]
    same = "the same weights as" if before == weights else "other weights than"
    return [("replay", f"{same} {safe_text(replayed.path)} (sha256 {safe_text(before, 16)} and {weights!s:.13}...)")]


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Within, torch takes only algorithms that give the same bits every time, and says so where it has none."""
    if not wanted:
        yield
        return
    # cuBLAS reads this when it is first used: two buffers of 4 MiB, as its documentation asks for.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        first = safe_text(first_line(error), limit=160)
        raise ConfigError(f"deterministic=true: this model needs what has no such form ({first})") from None
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
