"""The notebooks as they are committed: executed, complete, linked, small. `python notebooks/run.py` runs them."""

import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
COURSE = sorted(FOLDER.glob("*.ipynb"))
SOLUTIONS = sorted(FOLDER.glob("solutions/*.ipynb"))

course = pytest.mark.parametrize("path", COURSE, ids=lambda path: path.stem)
every = pytest.mark.parametrize("path", [*COURSE, *SOLUTIONS], ids=lambda path: f"{path.parent.name}-{path.stem}")


def cells(path: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == kind]


def text(path: Path, kind: str) -> str:
    return "\n\n".join("".join(cell["source"]) for cell in cells(path, kind))


@every
def test_executed_from_top_to_bottom(path):
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert path.stat().st_size <= 700_000
    assert not re.search(r"/(home|root|tmp|Users|work)/", json.dumps(outputs))
    assert not re.search(r"^\s*[%!]", text(path, "code"), re.M)  # no magics: the cells are plain Python


@course
def test_each_has_its_parts(path):
    prose, code = text(path, "markdown"), text(path, "code")
    for part in ("# ", "**Question", "**Module", "**Test", "## Exercises", "## Summary"):
        assert part in prose, part
    assert len(prose.split()) >= len(code.split())
    assert "source(" in code and "assert" in code and "compare(" in code
    assert len(re.findall(r"^[-*] ", prose.split("## Summary")[1].split("\n\n")[1], re.M)) == 3
    assert any("image/png" in output.get("data", {}) for cell in cells(path, "code") for output in cell["outputs"])
    naive = [cell for cell in cells(path, "code") if "naive" in cell["metadata"].get("tags", ())]
    assert naive and all(len(cell["source"]) <= 30 for cell in naive)


@every
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text(path, "markdown")):
        assert (path.parent / target).exists(), target


def test_each_has_its_solutions():
    assert [path.name for path in COURSE] == [path.name for path in SOLUTIONS]
    for path in SOLUTIONS:
        assert "assert" in text(path, "code")
