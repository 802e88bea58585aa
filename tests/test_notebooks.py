"""The notebooks as they are committed: executed, complete, linked, short; their exercises tell right from wrong.

`python notebooks/run.py` runs them.
"""

import json
import re
from pathlib import Path

import checks
import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
LESSONS = sorted(FOLDER.glob("[0-9]*.ipynb"))
APPENDICES = sorted(FOLDER.glob("A*.ipynb"))
SOLUTIONS = sorted(FOLDER.glob("solutions/*.ipynb"))
TAUGHT = [*LESSONS, FOLDER / "A6_proof_of_origin.ipynb"]  # with an exercise that is checked

WORDS = 3000  # of prose in a notebook
CELL_WORDS = 150
MINUTES = 90  # a lecture
# Private words, and the standard term: review of the course, section 5.2.
PRIVATE = {
    r"\bgrounds?\b(?! truth)": "background",
    r"\bthings?\b": "object, or name it",
    r"\bplaces?\b": "position",
    r"\bwanted\b": "target",
    r"\bway (back|there)\b": "backward or forward pass",
    r"\btaught\b": "supervised",
    r"\b(pulls?|pulled)\b": "gradient",
    r"\bknobs?\b": "hyperparameter",
    r"\b(mean way|blind flow)\b": "mean displacement, trivial baseline",
    r"\bthird number\b": "selectivity",
    r"\bmended\b": "corrected",
    r"\b[Ww]hoever\b|\bwho (does not|looks|wants)\b": "if you",
    r"\bstands? in\b|\bgoes? astray\b|\bby heart\b|\bon the way\b": "plain English",
    r"\bnot shown\b": "show it, or leave it out",
}

lesson = pytest.mark.parametrize("path", TAUGHT, ids=lambda path: path.stem)
prose = pytest.mark.parametrize("path", [*LESSONS, *APPENDICES], ids=lambda path: path.stem)
every = pytest.mark.parametrize(
    "path", [*LESSONS, *APPENDICES, *SOLUTIONS], ids=lambda path: f"{path.parent.name}-{path.stem}"
)


def cells(path: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == kind]


def text(path: Path, kind: str) -> str:
    return "\n\n".join("".join(cell["source"]) for cell in cells(path, kind))


def exercises(path: Path) -> dict[str, tuple[str, str]]:
    """By check, the cells in which students write or solutions are, up to the check: definition, the check's line."""
    found = {}
    for cell in cells(path, "code"):
        if "exercise" in cell["metadata"].get("tags", ()):
            source = "".join(cell["source"])
            line = re.search(r"^\w+ = (check_\w\d[a-z]?)\(\w+\)$", source, re.M)
            found[line[1]] = source[: line.start()], line[0]
    return found


# (notebook, name of the check), and with each wrong answer
EXERCISES = [(path, name) for path in TAUGHT for name in exercises(path)]
MISTAKES = [(*exercise, mistake) for exercise in EXERCISES for mistake in getattr(checks, exercise[1]).mistakes]
filled = pytest.mark.parametrize(("path", "name"), EXERCISES, ids=[name for _, name in EXERCISES])


@every
def test_executed_from_top_to_bottom(path):
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert path.stat().st_size <= 1_500_000
    assert not re.search(r"/(home|root|tmp|Users|work)/", json.dumps(outputs))
    assert not re.search(r"^\s*[%!]", text(path, "code"), re.M)  # no magics: the cells are plain Python


@lesson
def test_each_has_its_parts(path):
    markdown, code = text(path, "markdown"), text(path, "code")
    parts = ("# ", "**Question", "**Goals", "**Prerequisites", "**Module", "**Test", "## Exercises", "## Summary")
    for part in (*parts, "**Predict.**", "**Change.**", "Difficulty:", "Expected time:", "<details>"):
        assert part in markdown, part
    assert "source(" in code and "assert" in code
    assert len(re.findall(r"^- ", markdown.split("**Goals")[1].split("\n\n")[1], re.M)) in (2, 3, 4)
    assert len(re.findall(r"^- ", markdown.split("## Summary")[1].split("\n\n")[1], re.M)) == 3
    assert any("image/png" in output.get("data", {}) for cell in cells(path, "code") for output in cell["outputs"])
    naive = [cell for cell in cells(path, "code") if "naive" in cell["metadata"].get("tags", ())]
    assert all(len(cell["source"]) <= 30 for cell in naive)


@lesson
def test_sections_have_minutes(path):
    sections = re.findall(r"^## (.*)$", text(path, "markdown"), re.M)
    minutes = [re.search(r"\((\d+) min\)$", section) for section in sections]
    assert [section for section, found in zip(sections, minutes) if not found] == ["Exercises", "Summary"]
    assert sum(int(found[1]) for found in minutes if found) <= MINUTES


@prose
def test_short(path):
    assert len(text(path, "markdown").split()) <= WORDS
    for cell in cells(path, "markdown"):
        source = "".join(cell["source"])
        assert len(source.split()) <= CELL_WORDS, source[:60]


@prose
def test_standard_terms(path):
    sentences = text(path, "markdown")
    assert {word: found for word in PRIVATE if (found := re.findall(f".*{word}.*", sentences))} == {}


def test_lectures_fit():
    """Six lectures of 90 minutes, of which reading the text aloud takes at most 35, at 150 words a minute."""
    rows = re.findall(r"^\| \d\. [^|]*\|([^|]*)\|([^|]*)\|", (FOLDER / "README.md").read_text("utf-8"), re.M)
    assert len(rows) == 6
    for notebooks, plan in rows:
        paths = [path for path in LESSONS if path.stem[:2] in notebooks]
        assert len(paths) == len(notebooks.split(","))
        assert sum(len(text(path, "markdown").split()) for path in paths) <= 35 * 150
        assert sum(int(minutes) for minutes in re.findall(r" (\d+)(?=[,;]| *$)", plan)) == MINUTES


@every
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text(path, "markdown")):
        assert (path.parent / target).exists(), target


def test_each_has_its_solutions():
    assert [path.name for path in TAUGHT] == [path.name for path in SOLUTIONS]
    for path in SOLUTIONS:
        assert "assert" in text(path, "code")


@pytest.mark.parametrize("path", TAUGHT, ids=lambda path: path.stem[:2])
def test_solutions_quote_the_exercises(path):
    """Each section of a solution begins with the exercise as it stands in the notebook, but for the links' folder."""
    asked = re.findall(r"^(\d)\. \*\(.*?\)\* (.*)$", text(path, "markdown"), re.M)
    worked = text(FOLDER / "solutions" / path.name, "markdown").replace("](../", "](")
    quoted = re.findall(r"^## (?:Exercise )?(\d)\b.*\n\n> (.*)$", worked, re.M)
    assert [number for number, _ in asked] == ["1", "2", "3"]
    assert asked == quoted and len(re.findall(r"^> ", worked, re.M)) == 3


def test_each_has_its_exercise():
    assert {path.stem[:2] for path in TAUGHT} == {path.stem[:2] for path, _ in EXERCISES}
    assert all(name[6:8] == path.stem[:2].lower() for path, name in EXERCISES)
    assert {name for _, name in EXERCISES} == {name for name in vars(checks) if name.startswith("check_")}


@filled
def test_unwritten_function_is_the_courses(path, name, capsys):
    names: dict = {}
    definition, last_line = exercises(path)[name]
    assert "NotImplementedError" in definition
    exec(f"import torch\nfrom checks import *\n{definition}{last_line}", names)
    assert "still to be written" in capsys.readouterr().out
    written = re.search(r"^def (\w+)\(", definition, re.M)[1]
    assert names[written] is getattr(checks, name).answer


@filled
def test_solution_is_right(path, name, capsys):
    definition, last_line = exercises(FOLDER / "solutions" / path.name)[name]
    assert "NotImplementedError" not in definition
    exec(f"import torch\nfrom checks import *\n{definition}{last_line}", {})
    assert "is right" in capsys.readouterr().out


@pytest.mark.parametrize(("path", "name", "mistake"), MISTAKES)
def test_wrong_answers_fail_by_name(path, name, mistake):
    check = getattr(checks, name)
    definition, last_line = exercises(path)[name]
    written = re.search(r"^def (\w+)\(", definition, re.M)[1]
    with pytest.raises(checks.WrongAnswer) as error:
        exec(last_line, {written: check.mistakes[mistake], name: check})
    assert len(check.mistakes) >= 3
    assert str(error.value) == f"not yet: {mistake}"


@pytest.mark.parametrize(
    ("check", "answer", "example"),
    [
        ("check_11", lambda share, factor: 7.0, "for 0.5, 2.0, the result is 7, it should be 1.333"),
        (
            "check_06",
            lambda weights, positions: None,
            "for a tensor of shape (12, 12), a tensor of shape (12, 2), the result",
        ),
        ("check_06", lambda weights, positions: None, "the result is None: return what was computed"),
        ("check_02", lambda x, angle: x[0], "the result has the shape (8,), it should be (5, 8)"),
        ("check_03", lambda x, kernel: 0 * x + 1, "entry [0] of the result is 1, it should be"),
        (
            "check_10",
            lambda x, *others: 0 * x,
            "for a tensor of shape (4,), [1.0, 0.7, 0.4, 0.0], 2, a function, a function,",
        ),
    ],
)
def test_other_wrong_answers_fail_with_an_example(check, answer, example):
    with pytest.raises(checks.WrongAnswer) as error:
        getattr(checks, check)(answer)
    assert example in str(error.value)
