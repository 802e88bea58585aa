"""What CI runs: no test is left out of `.ci/run`, and the workflow knows every Python that pyproject.toml names."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import LONGEST, pytest_collection_modifyitems

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / ".ci" / "run"
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
WORKFLOW = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")


def test_what_the_suite_leaves_out_is_run_by_ci():
    (left_out,) = re.findall(r'addopts = .*"-m", "not (\w+)"', PYPROJECT)
    commands = [line for line in SCRIPT.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert f"python -m pytest -q -m {left_out} --no-loadscope-reorder" in commands
    assert "python notebooks/run.py --check --jobs 2" in commands and "mypy" in commands and "ruff check ." in commands
    assert any('"$work/test_command"' in line and "bash" in line for line in commands)


def test_the_longest_files_come_first():
    stems = ["test_amf", *LONGEST[::-1], "test_z", "test_b"]
    items = [SimpleNamespace(path=ROOT / "tests" / f"{stem}.py", keywords={}) for stem in stems]
    pytest_collection_modifyitems(items)
    assert [item.path.stem for item in items] == [*LONGEST, "test_amf", "test_z", "test_b"]
    for name in LONGEST:
        assert "pytest.mark.slow" in (ROOT / "tests" / f"{name}.py").read_text(encoding="utf-8")


@pytest.mark.skipif(sys.platform == "win32" or shutil.which("bash") is None, reason="needs bash and modes of files")
def test_the_script_can_be_called():
    assert SCRIPT.stat().st_mode & 0o111
    assert subprocess.run(["bash", "-n", str(SCRIPT)], check=False).returncode == 0


def test_the_workflow_runs_every_python_and_system():
    versions = re.findall(r"Python :: (3\.\d+)\"", PYPROJECT)
    (matrix,) = re.findall(r"python: \[(.*)\]", WORKFLOW)
    assert re.findall(r'"(.*?)"', matrix) == versions  # quoted: 3.10 is a number otherwise, 3.1
    assert {"ubuntu", "macos", "windows"} == set(re.findall(r"(\w+)-latest[,\]]", WORKFLOW))
    assert "run: .ci/run" in WORKFLOW and "run: python -m pytest" in WORKFLOW
