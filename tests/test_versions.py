"""Run directories of every version stay usable: their configs are migrated, their checkpoints resume."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Ended, records, write_jsonl
from safetensors.torch import load_file

from dpo_cli.config.composition import composed, parse_overrides
from dpo_cli.config.schema import RunConfig, config_text, group_of, read_config, run_config, schema_keys, walk
from dpo_cli.config.versions import MIGRATIONS, VERSION, Added, Removed, Renamed, ValueRenamed, flat
from dpo_cli.errors import CheckpointError

Command = Callable[..., Ended]
RUNS = Path(__file__).parent / "runs" / "version-1"


def default_config() -> RunConfig:
    return run_config(composed("train", parse_overrides([]), RunConfig).container)


# The table of migrations


def test_the_migrations_lead_from_the_keys_of_version_1_to_the_schema() -> None:
    """Whoever adds, renames or removes a key without an entry in MIGRATIONS fails here."""
    keys = set(flat(yaml.safe_load((RUNS / "dpo" / "config.yaml").read_text())))
    for number in sorted(MIGRATIONS):
        for change in MIGRATIONS[number]:
            keys = change.keys(keys)
    groups = {key for key, field, _ in walk(RunConfig) if group_of(field.annotation) and "tracker" not in key}
    assert keys == set(schema_keys(RunConfig)) - groups


def test_a_config_of_version_1_reads_as_the_run_it_was() -> None:
    config = read_config(RUNS / "dpo" / "config.yaml")
    assert (config.monitor, config.layout, config.tracker, config.max_steps) == ("warn", "auto", None, 4)
    assert read_config(RUNS / "reward" / "config.yaml").objective == "reward"


def test_values_of_version_1_are_kept_under_their_names_of_today(tmp_path: Path) -> None:
    text = (RUNS / "dpo" / "config.yaml").read_text()
    for old, chosen in (("batching: auto", "batching: padded"), ("radar: warn", "radar: stop")):
        assert text.count(old) == 1
        text = text.replace(old, chosen)
    (tmp_path / "config.yaml").write_text(text)
    config = read_config(tmp_path / "config.yaml")
    assert (config.layout, config.monitor) == ("padded", "stop")


def test_a_stored_config_begins_with_its_version_and_reads_back(tmp_path: Path) -> None:
    config = default_config()
    (tmp_path / "config.yaml").write_text(config_text(config))
    assert (tmp_path / "config.yaml").read_text().startswith(f"version: {VERSION}\nmodel:\n")
    assert read_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("version", "says"),
    [
        (VERSION + 1, f"written by a newer dpo-cli (config version {VERSION + 1}; this one reads up to {VERSION}); "
         "update dpo-cli"),
        (0, "version=0: is not a version of a config"),
        (True, "version=True: is not a version of a config"),
        ("two", "version=two: is not a version of a config"),
    ],
)  # fmt: skip
def test_a_config_of_an_unknown_version_is_refused(tmp_path: Path, version: Any, says: str) -> None:
    file = tmp_path / "config.yaml"
    container = yaml.safe_load(config_text(default_config()))
    file.write_text(yaml.safe_dump({**container, "version": version, "new_key": 1}))
    with pytest.raises(CheckpointError) as error:
        read_config(file)
    assert str(error.value) == f"{file}: {says}"


def test_each_kind_of_change_does_what_it_says() -> None:
    values = {"a.old": 1, "gone": 2, "mode": "drawn", "kept": None}
    changes = [
        Renamed("a.old", "b.new"),
        Removed("gone"),
        ValueRenamed("mode", "drawn", "sampled"),
        Added("more", 3),
        Added("mode", "other"),
        Renamed("kept", "still"),
        Renamed("absent", "nothing"),
    ]
    for change in changes:
        change.apply(values)
    assert values == {"b.new": 1, "mode": "sampled", "more": 3, "still": None}


# Run directories of version 1


@pytest.fixture
def old(tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a run of version 1."""
    return lambda name: Path(shutil.copytree(RUNS / name, tmp_path / f"old-{name}"))


def words_of_the_dpo_run(folder: Path) -> list[str]:
    words = json.loads((RUNS / "dpo" / "manifest.json").read_text())["argv"]
    return [word for word in words if not word.startswith("output_dir")] + [f"output_dir={folder}"]


def test_a_run_of_version_1_is_evaluated(command: Command, old: Callable[[str], Path]) -> None:
    for name in ("dpo", "reward"):
        run = old(name)
        ended = command("dpo-eval", f"checkpoint={run}", "name=again")
        assert ended.code == 0, ended.err
        report = json.loads((run / "eval" / "again" / "report.json").read_text())
        stored = [line for line in records(run) if line["split"] == "eval"][-1]
        assert report["pairs"] == 6
        for name in ("loss", "rewards/accuracies", "rewards/margins"):
            assert report[name] == pytest.approx(stored[name], abs=1e-6)


def test_a_run_of_version_1_resumes_to_the_weights_it_had(command: Command, old: Callable[[str], Path]) -> None:
    run = old("dpo")
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    ended = command("dpo-train", *words_of_the_dpo_run(run), "resume=auto")
    assert ended.code == 0, ended.err
    weights = load_file(run / "checkpoints" / "step-00000004" / "adapter_model.safetensors")
    stored = load_file(RUNS / "dpo" / "checkpoints" / "step-00000004" / "adapter_model.safetensors")
    assert weights.keys() == stored.keys()
    for name in stored:
        torch.testing.assert_close(weights[name], stored[name], rtol=0, atol=1e-6)


def test_a_run_of_version_1_is_replayed(command: Command, tmp_path: Path) -> None:
    ended = command("dpo-train", f"replay={RUNS / 'dpo'}", f"output_dir={tmp_path / 'again'}")
    assert ended.code == 0, ended.err
    now, then = records(tmp_path / "again")[-1], records(RUNS / "dpo")[-1]
    assert now["loss"] == pytest.approx(then["loss"], abs=1e-6)


def test_runs_of_version_1_label_samples(command: Command, old: Callable[[str], Path], tmp_path: Path) -> None:
    rows = [{"prompt": "Say hello.", "responses": ["Hello.", "No, I would rather not."]}]
    samples = write_jsonl(tmp_path / "samples.jsonl", rows)
    for by, name in (("reward", "reward"), ("implicit", "dpo")):
        output = tmp_path / f"{by}.jsonl"
        ended = command("dpo-label", f"samples={samples}", f"by={by}", f"judge={old(name)}", f"output={output}")
        assert ended.code == 0, ended.err
        assert len(output.read_text().splitlines()) == 1
