"""The house rules: who imports whom, what may stand at a module's top level, and a README that is true."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastvmt
from wan_mini import generate

ROOT = Path(__file__).parent.parent
CORE = ["window.py", "losses.py", "skip_optim.py"]
MODULES = [ROOT / "fastvmt.py", *(ROOT / name for name in CORE), *sorted((ROOT / "wan_mini").rglob("*.py"))]
FIVE = {"torch", "safetensors", "numpy", "PIL", "tqdm"}
README = (ROOT / "README.md").read_text(encoding="utf-8")

modules = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))


def imports(path: Path) -> set[str]:
    """First names of all modules a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found.add(node.module.split(".")[0])
    return found


@modules
def test_five_packages_and_one_direction(path):
    own = imports(path) - sys.stdlib_module_names - FIVE
    if path.name in CORE:
        assert not own and not imports(path) & (FIVE - {"torch"})
    elif path.name == "fastvmt.py":
        assert own == {"wan_mini", "window", "losses", "skip_optim"}
    else:
        assert own <= {"wan_mini"}


@modules
def test_nothing_happens_at_import(path):
    """At top level: imports, definitions, constants, and the program's entry; no loose calls."""
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        entry = isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
        assert isinstance(node, allowed) or text or entry, f"line {node.lineno}"


@modules
def test_public_names_are_explained_and_short(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.col_offset == 0 and node.name[0] != "_":
            assert ast.get_docstring(node), node.name


@modules
def test_devices_are_chosen_in_one_place(path):
    names = {node.value for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Constant)}
    assert path.name == "runtime.py" or not names & {"cuda", "mps"}


def test_readme_names_every_file_and_no_other():
    """The file guide's first column is what is there."""
    guide = README.split("## Files")[1].split("```")[1]
    named = {line.split()[0].rstrip("/") for line in guide.strip().splitlines() if not line.startswith(" " * 8)}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    listed = listed or [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if "__pycache__" not in path.parts]
    top = {name.split("/")[0] for name in listed if not name.startswith(".")}
    inside = {name for name in listed if re.fullmatch(r"wan_mini/(\w+/)?\w+\.py", name) and "__init__" not in name}
    assert named == (top - {"wan_mini", "README.md"}) | inside


def test_readme_flags_exist():
    for program, parser in (("fastvmt.py", fastvmt.parser()), ("wan_mini.generate", generate.parser())):
        known = {option for action in parser._actions for option in action.option_strings}
        for line in re.findall(rf"^.*python .*{program} .*$", README, re.M):
            assert set(re.findall(r"(?<=\s)--[a-z-]+", line)) <= known, line


def test_readme_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
