"""The launch recipes: linted, checked against what each scheduler reads, and their commands composed by the program."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from documents import fenced

from dpo_cli.cli import read_words
from dpo_cli.config.command_line import run_of
from dpo_cli.config.schema import RunConfig

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
SKYPILOT = yaml.safe_load((RECIPES / "skypilot.yaml").read_text())
SERVICE, JOB = yaml.safe_load_all((RECIPES / "kubernetes.yaml").read_text())
POD = JOB["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]

# What a job finds in its environment on the second of two nodes, by the documents of Slurm and SkyPilot.
ENVIRONMENT = {
    "SLURM_JOB_ID": "31",
    "SLURM_CPUS_PER_TASK": "8",
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NUM_GPUS_PER_NODE": "8",
    "SKYPILOT_NODE_RANK": "1",
    "SKYPILOT_NODE_IPS": "10.0.0.5\n10.0.0.6",
    **SKYPILOT["envs"],
}


def lint(tool: str, *words: str, text: str | None = None) -> None:
    program = Path(sys.executable).parent / tool
    if not program.exists():
        pytest.skip(f"{tool} is not installed")
    ended = subprocess.run([program, *words], input=text, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout + ended.stderr) == (0, "")


def run(script: str, folder: Path, code: int = 0) -> tuple[int, dict[str, list[str]]]:
    """Run a script in which launchers only note their words and end with `code`: its exit code, and those words."""
    for name in ("srun", "scontrol", "torchrun"):
        stub = folder / name
        ends = code if name == "srun" else 0
        stub.write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" >> "{folder}/{name}.words"\nexit {ends}\n')
        stub.chmod(0o755)
    environment = {**ENVIRONMENT, "PATH": f"{folder}:/usr/bin:/bin", "HOME": str(folder)}
    ended = subprocess.run(
        ["bash", "-c", script, "recipe", "beta=0.2"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    said = {path.stem: path.read_text().split("\0")[:-1] for path in folder.glob("*.words")}
    assert ended.stderr == ""
    return ended.returncode, said


def composed(words: list[str]) -> RunConfig:
    """The config that the words behind `dpo-train` make, by the program's own reader."""
    return run_of(read_words("train", words[words.index("dpo-train") + 1 :]).read())[0]


SLURM = (RECIPES / "slurm.sh").read_text()


def launched(recipe: str, folder: Path) -> list[str]:
    if recipe == "slurm":
        return run(f"{SLURM}", folder)[1]["srun"]
    if recipe == "skypilot":
        return run(SKYPILOT["run"], folder)[1]["torchrun"]
    if recipe == "kubernetes":
        return [*CONTAINER["command"], *CONTAINER["args"]]
    (command,) = [block for block in fenced(ROOT / "docs" / "scale.md", "bash") if block.startswith("torchrun")]
    return run(command, folder)[1]["torchrun"]


@pytest.mark.parametrize("recipe", ["slurm", "skypilot", "kubernetes", "guide"])
def test_the_command_of_a_recipe_composes_and_resumes_by_itself(recipe: str, tmp_path: Path) -> None:
    config = composed(launched(recipe, tmp_path))
    assert config.engine.name == "ddp"
    assert config.resume == "auto" and config.output_dir is not None and Path(config.output_dir).is_absolute()
    assert config.save_every > 0 or recipe == "guide"
    assert config.beta == (0.2 if recipe == "slurm" else 0.1)  # words behind the script reach the program


@pytest.mark.parametrize("recipe", ["skypilot", "kubernetes", "guide"])
def test_torchrun_takes_every_option_and_leaves_time_to_save(recipe: str, tmp_path: Path) -> None:
    from torch.distributed.run import get_args_parser

    words = [word for word in launched(recipe, tmp_path) if word != "torchrun"]
    given = get_args_parser().parse_args(words)
    assert (given.nnodes, given.nproc_per_node, given.no_python) == ("2", "8", True)
    assert given.training_script == "dpo-train"
    assert given.shutdown_timeout == 300
    if recipe == "skypilot":  # the first node is the meeting place
        assert (given.node_rank, given.master_addr) == (1, "10.0.0.5")
    else:
        first = {"kubernetes": "dpo-0.dpo", "guide": "node1"}[recipe]
        assert given.rdzv_backend == "c10d" and given.rdzv_endpoint == f"{first}:29400"


@pytest.mark.parametrize("code", [0, 1, 6, 75, 137])
def test_a_slurm_job_is_requeued_when_it_was_stopped_with_a_checkpoint_and_only_then(tmp_path: Path, code: int) -> None:
    ended, said = run(SLURM, tmp_path, code)
    assert ended == code
    assert said.get("scontrol") == (["requeue", "31"] if code == 75 else None)


def test_slurm_has_one_task_a_gpu_and_tells_the_tasks_before_the_limit() -> None:
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)", SLURM, re.M))
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"] == "USR1@300"  # B:USR1 would go to the script alone
    assert "requeue" in options and options["open-mode"] == "append"
    assert SLURM.index("#SBATCH --open-mode") < SLURM.index("set -euo")  # Slurm reads options up to the first command


def test_shell_scripts_are_clean() -> None:
    lint("shellcheck", *map(str, RECIPES.glob("*.sh")))
    for part in ("setup", "run"):
        lint("shellcheck", "--shell=bash", "-", text=SKYPILOT[part])


def test_skypilot_reads_every_key() -> None:
    """Keys and types of https://docs.skypilot.co/en/latest/reference/yaml-spec.html"""
    assert set(SKYPILOT) == {"name", "num_nodes", "workdir", "resources", "envs", "file_mounts", "setup", "run"}
    assert set(SKYPILOT["resources"]) == {"accelerators", "use_spot", "network_tier", "disk_size", "job_recovery"}
    assert set(SKYPILOT["resources"]["job_recovery"]) == {"max_restarts_on_errors"}
    assert all(isinstance(value, str) for value in SKYPILOT["envs"].values())
    bucket = SKYPILOT["file_mounts"]["/runs"]
    assert set(bucket) == {"name", "mode"} and bucket["mode"] == "MOUNT_CACHED"
    assert re.fullmatch(r"[a-z0-9][a-z0-9-]{1,61}[a-z0-9]", bucket["name"])


@pytest.mark.parametrize("part", [SERVICE, JOB], ids=["service", "job"])
def test_kubernetes_takes_every_key(part: dict[str, Any]) -> None:
    kubernetes_validate.validate(part, kubernetes_validate.latest_version(), strict=True)


def test_pods_of_the_job_find_each_other_and_have_time_to_save() -> None:
    spec = JOB["spec"]
    assert POD["subdomain"] == SERVICE["metadata"]["name"] == JOB["metadata"]["name"]
    assert SERVICE["spec"] == {
        "clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"job-name": JOB["metadata"]["name"]}
    }  # fmt: skip
    assert spec["completions"] == spec["parallelism"] and f"--nnodes={spec['completions']}" in CONTAINER["args"]
    assert f"--nproc-per-node={CONTAINER['resources']['limits']['nvidia.com/gpu']}" in CONTAINER["args"]
    assert POD["terminationGracePeriodSeconds"] > 300
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == set(volumes)


DOCKERFILE = (RECIPES / "Dockerfile").read_text()


def test_the_dockerfile_is_clean_and_runs_as_the_user_of_the_pod() -> None:
    lint("hadolint", str(RECIPES / "Dockerfile"))
    assert re.findall(r"^USER (.*)$", DOCKERFILE, re.M) == [str(POD["securityContext"]["runAsUser"])]
    images = set(re.findall(r"^FROM (\S+)", DOCKERFILE, re.M)) - set(re.findall(r" AS (\S+)$", DOCKERFILE, re.M))
    assert all(re.fullmatch(r"nvidia/cuda:[\d.]+-base-ubuntu\d\d\.04", image) for image in images) and len(images) == 1


def test_what_the_dockerfile_copies_makes_the_wheel(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    copied = [line.split() for line in re.findall(r"^COPY (?!--)(.*)$", DOCKERFILE, re.M)]
    for *names, to in copied:
        for name in names:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, source / to)
            else:
                shutil.copy(ROOT / name, source / to)
    for name in re.findall(r"type=bind,source=([\w.]+)", DOCKERFILE):
        assert (ROOT / name).is_file()
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, *build, str(source)], check=True, capture_output=True, env=dict(os.environ))
    (wheel,) = tmp_path.glob("*.whl")
    version = re.search(r"--tag dpo-cli:(\S+)", DOCKERFILE)
    assert version and wheel.name.startswith(f"dpo_cli-{version[1]}-")
    assert CONTAINER["image"] == f"dpo-cli:{version[1]}"
