"""In continuous integration a test that is skipped counts as failed, unless what it lacks is a GPU."""

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
