"""What a run's numbers depend on, and running it again: versions, device, data and weights, compared by name."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dpo_cli.config.schema import RunConfig
from dpo_cli.config.versions import flat
from dpo_cli.console.text import first_line, safe_text
from dpo_cli.errors import CheckpointError, ConfigError
from dpo_cli.paths import user_path
from dpo_cli.runs.manifest import weights_sha256
from dpo_cli.runs.run_directory import RunDirectory

# What must be the same for the same bytes to come out, besides config and settings: keys of the manifest.
DECIDING = ("dpo_cli", "git_revision", "python", "platform", "packages", "hardware", "data_fingerprint", "model")
# Of those, what says where something lies and not what it is.
PASSING = ("model.path", "model.origin", "hardware.device")


def differences(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In words, `key: was -> is`, where two manifests differ in what decides a run's bytes."""
    before, after = flat(earlier), flat(now)
    return [
        f"{key}: {safe_text(before.get(key), 60)} -> {safe_text(after.get(key), 60)}"
        for key in sorted(before.keys() | after.keys())
        if key.split(".")[0] in DECIDING and key not in PASSING and before.get(key) != after.get(key)
    ]


def describe_replay(config: RunConfig, weights: str | None) -> list[tuple[str, str]]:
    """Whether a replayed run has come to the same weights."""
    if config.replay is None:
        return []
    replayed = RunDirectory(user_path(config.replay, CheckpointError, "replay"))
    before = replayed.read_manifest().get("weights_sha256") or weights_sha256(replayed.final)
    if before is None:
        return [("replay", f"{safe_text(replayed.path)} is not finished: there is nothing to compare with")]
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
        raise ConfigError(
            f"deterministic=true: this model uses an operation that has no deterministic form ({first})"
        ) from None
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
