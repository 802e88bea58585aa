"""The front door: short, in the reader's order, and true. The words of all that the code says to people.

test_repo.py has the two commands, the guide of files, flags and links.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *ROOT.glob("[bnw]*/**/*.md")))
CODE = [*ROOT.glob("*.py"), *(ROOT / "wan_mini").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
CODE += [ROOT / "notebooks" / f"{name}.py" for name in ("diagrams", "explore", "run", "svg", "website")]
FENCED = re.compile(r"^```.*?^```\n", re.MULTILINE | re.DOTALL)

# Wan 2.1: the model, the sampler, and the loading of three layouts; not the programs and files around it.
WAN = "attention build checkpoint config dit errors hashes layouts load pipeline prompts scheduler sizes tiling"
WAN += " tokenizer umt5 vae"

# Words of this project's own for what has a standard term, and what takes their place.
PRIVATE = {
    r"grounds?\b(?![ _-]truth)": "background",
    r"(?:of|each|every|any|random|right|wrong|true|matched) places?\b": "position, coordinates",
    r"things?\b": "object, sprite, or its name",
    r"wanted\b": "target, expected",
    r"way (?:back|there)\b": "backward pass, forward pass",
    r"taught\b": "supervised, trained",
    r"pull(?:s|ed|ing)?\b": "gradient",
    r"knobs?\b": "option, hyperparameter",
    r"mean way\b": "mean displacement",
    r"blind flow\b": "trivial baseline",
    r"third number\b": "selectivity",
}
PRIVATE_WORD = re.compile("|".join(rf"\b(?:{word})" for word in PRIVATE), re.IGNORECASE)
STANDARD = re.compile(r"(?:what (?:is|was)|most) wanted|git lfs pull|pull requests?", re.IGNORECASE)


def prose(text: str) -> str:
    """A page without commands, tables and the targets of links."""
    lines = [line for line in FENCED.sub("", text).splitlines() if not line.startswith("|")]
    return re.sub(r"\]\([^)]*\)", "]", "\n".join(lines))


def test_readme_is_short():
    numbers = re.findall(r"\d[\d.,]*", prose(README))
    assert README.count("\n") <= 150
    assert len(README.split()) <= 1200
    assert len(numbers) <= 40, numbers
    rows = [line for line in FENCED.sub("", README).splitlines() if line.startswith("|")]
    assert len(rows) - 2 <= 4  # without the head


def test_readme_answers_in_the_readers_order():
    """What it is, the picture, the two commands, what it does, what has not been run, why; all within 50 lines."""
    marks = ["# FastVMT-mini", "default_run.webp", "python fastvmt.py", "-m pytest", "**What it does.**"]
    marks += ["**What has not been run yet.**", "## Why it is worth a look", "five\n  defects", "|---"]
    positions = [README.index(mark) for mark in marks]
    assert positions == sorted(positions)
    assert README[: README.index("|---")].count("\n") <= 60
    opening = README.split("\n\n")[1]
    assert len(re.findall(r"\.(?:\s|$)", opening)) == 2 and len(opening.split()) <= 50


def test_wan_has_under_3000_lines():
    lines = 0
    for name in WAN.split():
        lines += (ROOT / "wan_mini" / f"{name}.py").read_text(encoding="utf-8").count("\n")
    assert lines < 3000
    assert "under 3,000 lines" in README


def test_five_defects_have_a_test_each():
    tests = (ROOT / "tests" / "test_published_code.py").read_text(encoding="utf-8")
    assert len(re.findall(r"^def test_[1-5]_", tests, re.MULTILINE)) == 5


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    names = set()
    for heading in re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        names.add(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-"))
    return names


@pytest.mark.parametrize("page", PAGES)
def test_anchors_exist(page):
    path = ROOT / page
    for target, anchor in re.findall(r"\]\((?!http)([^)#\s]*)#([^)\s]+)\)", path.read_text(encoding="utf-8")):
        goal = (path.parent / target) if target else path
        assert anchor in anchors(goal), f"{page}: {target}#{anchor}"


def strings_of(path: Path) -> list[tuple[int, str]]:
    """Line and text of every string of a file: docstrings, messages, help; of f-strings the words, not the names."""
    texts = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append((node.lineno, node.value))
    return texts


def private_words(text: str) -> list[str]:
    """What must not be there."""
    return [match.group() for match in PRIVATE_WORD.finditer(STANDARD.sub("", text))]


def test_private_words_are_seen():
    for text in ("on grass ground", "the wanted flow", "way back", "a thing", "taught", "turn a knob", "at each place"):
        assert private_words(text), text
    for text in ("ground truth", "in another place", "what was wanted", "git lfs pull", "background", "everything"):
        assert not private_words(text), text


def test_strings_use_standard_terms():
    findings = []
    for path in CODE:
        for line, text in strings_of(path):
            findings += [f"{path.relative_to(ROOT)}:{line} {word}" for word in private_words(text)]
    assert not findings, "\n".join(findings)


@pytest.mark.parametrize("page", [*PAGES, "notebooks/explore_template.html"])
def test_pages_use_standard_terms(page):
    text = FENCED.sub("", (ROOT / page).read_text(encoding="utf-8"))
    assert not private_words(text)
