"""What an installed copy holds and does, and that the places that name a version or a package agree."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
CHECKPOINT = ROOT / "wan_mini" / "tiny" / "checkpoint"
MODULES = [f"{name}.py" for name in PYPROJECT["tool"]["setuptools"]["py-modules"]]


def call(*command: str | Path, cwd: Path, **variables: str) -> str:
    """Output of a command that must succeed, in an environment that does not know this checkout."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
    environment |= {"PYTHONUTF8": "1", **variables}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, f"{words}: {done.stderr or done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with what the wheel installs. Built without a network, from a copy: setuptools leaves files behind."""
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    source.mkdir()
    for name in ["pyproject.toml", "README.md", "LICENSE", *MODULES]:
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "wan_mini", source / "wan_mini", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    call(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, source, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    call(*pip, "install", "--no-deps", "--no-index", "--target", folder / "installed", wheel, cwd=folder)
    return folder / "installed"


def test_wheel_holds_the_embedded_model(installed):
    for path in CHECKPOINT.rglob("*"):
        if path.is_file():
            copy = installed / path.relative_to(ROOT)
            assert copy.exists(), f"{path.relative_to(ROOT)} is not in the wheel"
            assert copy.read_bytes() == path.read_bytes(), path.name
    reference = Path("wan_mini/tiny/reference.webp")
    assert (installed / reference).read_bytes() == (ROOT / reference).read_bytes()


def test_wheel_holds_every_module_and_page(installed):
    for pattern in ("*.py", "*.html"):
        for path in (ROOT / "wan_mini").rglob(pattern):
            assert (installed / path.relative_to(ROOT)).exists(), f"{path.relative_to(ROOT)} is not in the wheel"


def test_wheel_installs_nothing_else(installed):
    names = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert names - {"__pycache__"} == {"wan_mini", "bin", *MODULES}


def test_installed_command_runs_from_an_empty_folder(installed, tmp_path):
    command = shutil.which("fastvmt", path=str(installed / "bin"))
    assert command, "the wheel installs no command fastvmt"
    printed = call(command, "--dry-run", cwd=tmp_path, PYTHONPATH=str(installed))
    assert "tiny" in printed
    assert not list(tmp_path.iterdir()), "a dry run leaves files"
    (tmp_path / "losses.py").write_text("raise SystemExit('another losses.py was run')")  # of a user's own work
    assert PROJECT["version"] in call(command, "--version", cwd=tmp_path, PYTHONPATH=str(installed))


def test_installed_model_loads(installed, tmp_path):
    program = """
import torch
from pathlib import Path
import wan_mini
from wan_mini.load import load_wan
folder = Path(wan_mini.__file__).parent
print(folder)
print(type(load_wan(folder / "tiny" / "checkpoint", device="cpu", dtype=torch.float32)).__name__)
"""
    printed = call(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(installed)).splitlines()
    assert Path(printed[0]).resolve() == (installed / "wan_mini").resolve()
    assert printed[1] == "Wan"


def test_version_of_an_installed_copy(installed, tmp_path):
    (metadata,) = importlib.metadata.distributions(name="fastvmt-mini", path=[str(installed)])
    assert metadata.version == PROJECT["version"]
    command = shutil.which("fastvmt", path=str(installed / "bin"))
    printed = call(command, "--version", cwd=tmp_path, PYTHONPATH=str(installed))
    assert PROJECT["version"] in printed


def test_version_of_a_checkout(tmp_path):
    assert PROJECT["version"] in call(sys.executable, ROOT / "fastvmt.py", "--version", cwd=tmp_path)


def test_changelog_begins_with_this_version():
    versions = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert versions[0] == PROJECT["version"]
    assert versions == sorted(versions, key=lambda version: [int(part) for part in version.split(".")], reverse=True)


def names_and_versions(lines: list[str]) -> dict[str, list[str]]:
    """torch>=2.11 or torch==2.13.0; python_version ... -> {"torch": ["2.13.0"]}; a package may have several lines."""
    versions: dict[str, list[str]] = {}
    for line in lines:
        match = re.match(r"([A-Za-z0-9_-]+)[=>]=([0-9.]+)", line)
        if match:
            versions.setdefault(match[1].lower(), []).append(match[2])
    return versions


def pinned(name: str) -> dict[str, list[str]]:
    return names_and_versions((ROOT / name).read_text(encoding="utf-8").splitlines())


def numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


DEVELOPMENT = PROJECT["optional-dependencies"]["test"] + PROJECT["optional-dependencies"]["notebooks"]


@pytest.mark.parametrize(
    ("bounds", "pins"), [(PROJECT["dependencies"], "requirements.txt"), (DEVELOPMENT, "requirements-dev.txt")]
)
def test_pins_and_bounds_agree(bounds, pins):
    """The requirement files pin the same packages as pyproject.toml bounds, none below its bound."""
    lowest, versions = names_and_versions(bounds), pinned(pins)
    assert set(lowest) == set(versions)
    for name, (bound,) in lowest.items():
        for version in versions[name]:
            assert numbers(version) >= numbers(bound), f"{name} {version} in {pins}, {bound} in pyproject.toml"


def test_citation_names_the_paper():
    """CITATION.cff has what version 1.2.0 of the format demands, and no version of its own to forget."""
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    keys = set(re.findall(r"^([a-z-]+):", text, re.MULTILINE))
    assert {"cff-version", "message", "title", "authors"} <= keys
    assert "version" not in keys
    assert "2602.05551" in text
