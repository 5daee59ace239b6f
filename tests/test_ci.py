"""Continuous integration: every part runs and counts, and so does a test that is skipped."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MODULE = """
import pytest

def test_passes():
    pass

def test_needs_a_package():
    pytest.importorskip("no_such_package")

@pytest.mark.skipif(True, reason="needs a GPU")
def test_needs_a_gpu():
    pass

@pytest.mark.skipif(True, reason="not today")
def test_is_put_off():
    pass
"""


@pytest.mark.parametrize(
    ("in_ci", "summary"), [("1", "1 failed, 1 passed, 1 skipped, 2 errors"), ("", "1 passed, 4 skipped")]
)
def test_in_ci_a_skip_is_a_failure_unless_a_gpu_is_missing(tmp_path: Path, in_ci: str, summary: str) -> None:
    shutil.copy(Path(__file__).parent / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_some.py").write_text(MODULE)
    (tmp_path / "test_whole_file.py").write_text('import pytest\npytest.importorskip("no_such_package")\n')
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "--continue-on-collection-errors", "-p", "no:cacheprovider", "."],
        cwd=tmp_path, env={**os.environ, "DPO_CI": in_ci, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert f" {summary} in " in ended.stdout, ended.stdout
    assert ("not today; with DPO_CI set a skip is a failure" in ended.stdout) == bool(in_ci)


FIRST = ["browser", "check"]
PARTS = [*FIRST, "test-faults", "test", "test-peer"]


@pytest.mark.parametrize("failing", [None, *PARTS])
def test_ci_fails_where_any_part_fails(tmp_path: Path, failing: str | None) -> None:
    make = tmp_path / "make"
    make.write_text(f'#!/bin/sh\necho "$1 DPO_CI=$DPO_CI"\n[ "$1" != "{failing}" ]\n')
    make.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ci = Path(__file__).parent.parent / ".ci" / "run"
    ended = subprocess.run([ci], env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0 if failing is None else ended.returncode != 0
    ran = PARTS[: PARTS.index(failing) + 1] if failing in FIRST else PARTS
    assert sorted(ended.stdout.splitlines()) == sorted(f"{part} DPO_CI=1" for part in ran)
