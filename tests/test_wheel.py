"""The wheel stands alone: installed in a clean environment it composes every group choice from an empty directory."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of an environment that has the wheel, and of the checkout nothing."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, *build, str(ROOT)], check=True, capture_output=True)
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    site = next((folder / "env" / "lib").iterdir()) / "site-packages"
    wheel = next(folder.glob("*.whl"))
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(site)], check=True)
    # The dependencies lie where the tests' own do; a .pth inside that folder, such as an editable install's, is not
    # read when the folder is added this way.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


COMPOSE = """
from dpo_cli.config import composition
from dpo_cli.config.composition import composed, conf_dir, groups, parse_overrides
from dpo_cli.config.schema import EvalConfig, RunConfig, run_config
number = 0
for group, choices in groups().items():
    for choice in choices:
        more = "data.sources={hh: 1, tulu3: 2}" if choice == "mixture" else "data.train=x"
        words = [f"{group}={choice}", *([more] if group == "data" else [])]
        run_config(composed("train", parse_overrides(words), RunConfig).container)
        number += 1
composed("eval", [], EvalConfig)
from dpo_cli.data.files import local_path, read_rows
rows = len(list(read_rows(local_path("sample:train")))), len(list(read_rows(local_path("sample:test"))))
print(conf_dir(), number, *rows)
"""


def test_the_wheel_composes_every_choice_and_carries_the_sample_pairs(installed: Path, tmp_path: Path) -> None:
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [installed, "-c", COMPOSE]
    ended = subprocess.run(words, cwd=tmp_path, env=bare, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    conf, number, train, test = ended.stdout.split()
    assert str(installed.parent.parent) in conf, "the checkout's conf/ was used"
    assert int(number) == sum(len(list(folder.glob("[!_]*.yaml"))) for folder in (ROOT / "conf").iterdir())
    assert int(train) >= 400 and int(test) >= 100


WORDS = {
    "train": ["data=mine"],
    "eval": ["checkpoint=run", "data=mine"],
    "sample": ["model=mine", "prompts=p.txt"],
    "label": ["samples=s.jsonl", "by=rule", "rule=shorter"],
    "rank": ["games=games.csv"],
    "compare": ["a", "b", "data=mine"],
    "export": ["checkpoint=run", "to=folder"],
}


@pytest.mark.parametrize("name", WORDS)
def test_the_wheel_takes_a_users_folder_and_file_as_the_checkout_does(
    installed: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "model").mkdir()
    (tmp_path / "conf" / "data" / "mine.yaml").write_text("defaults: [_base, _self_]\neval: x\ntrain: x\n")
    (tmp_path / "conf" / "model" / "mine.yaml").write_text("defaults: [_base, _self_]\nname_or_path: my/sft\n")
    (tmp_path / "run.yaml").write_text("device: cpu\n" if name != "rank" else "prior: 1\n")
    function = {"eval": "evaluate"}.get(name, name)
    code = f"from dpo_cli.cli import {function}; {function}()"
    words = ["--config-dir", "conf", "--config", "run.yaml", *WORDS[name], "--print-config"]
    bare = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    wheel, checkout = (
        subprocess.run([python, "-c", code, *words], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        for python, env in ((installed, bare), (sys.executable, {**bare, "PYTHONPATH": str(ROOT)}))
    )
    assert wheel.returncode == 0, wheel.stderr
    assert wheel.stdout == checkout.stdout
    assert ("device: cpu" if name != "rank" else "prior: 1") in wheel.stdout
    assert ("my/sft" in wheel.stdout) == (name == "sample") and ("eval: x" in wheel.stdout) == (
        name in ("train", "eval", "compare")
    )
