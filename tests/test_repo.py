"""The rules of the house: who imports whom, how dense a page may be, which words it uses, and documents that are true.

Each failure lists files, lines and numbers, so that it can be worked through from the top. What the linter and the type
checker see (docstrings, hints, zips) is theirs: `make lint`.

    python -m pytest tests/test_repo.py -k density      # prints the table of the densest files, passed or failed
"""

import ast
import contextlib
import functools
import graphlib
import io
import json
import re
import runpy
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE = [ROOT / "window.py", ROOT / "losses.py", ROOT / "skip_optim.py"]
METHOD = [ROOT / "fastvmt.py", *CORE]
PRODUCT = [*METHOD, *sorted((ROOT / "wan_mini").rglob("*.py"))]
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))
CODE = [*PRODUCT, *BENCHMARKS]
RUN_TIME_PACKAGES = {"torch", "safetensors", "numpy", "PIL", "tqdm"}
MAY_BE_IMPORTED = {"core": {"torch"}, "wan_mini": {"wan_mini", *RUN_TIME_PACKAGES}}
MAY_BE_IMPORTED["fastvmt"] = MAY_BE_IMPORTED["wan_mini"] | {"window", "losses", "skip_optim"}

TOP_LEVEL = {"wan_mini", "fastvmt.py", "losses.py", "window.py", "skip_optim.py", "notebooks", "tests", "benchmarks"}
TOP_LEVEL |= {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "Makefile", "pyproject.toml"}
TOP_LEVEL |= {"requirements.txt", "requirements-dev.txt"}
NEVER_COMMITTED = {"outputs", "checkpoints", "build", "dist", "__pycache__"}

LONGEST_FUNCTION = 50
LONGEST_FILE = 300
LONGEST_FASTVMT = 320
LONGEST_README = 150
PER_1000_LINES = {"comprehensions": 20, "conditionals": 10, "tuple assignments": 25, "walrus": 0}

# Words that have a standard term beside them. Identifiers only, part by part: `ground_mask` counts, `background` does
# not. `middle` is no such word: the published VAE calls its modules so.
PRIVATE_WORDS = {
    "ground": "background",
    "grounds": "backgrounds",
    "wanted": "target",
    "found": "predicted, matched",
    "place": "position, coordinates",
    "places": "positions, coordinates",
    "told": "labeled, logged",
    "said": "labeled, logged",
    "taught": "supervised",
    "knob": "option, hyperparameter",
    "knobs": "options, hyperparameters",
    "pull": "gradient",
    "pulls": "gradients",
    "null": "unconditional",
    "ghosts": "placeholders",
    "shells": "placeholders",
    "visitor": "proxy",
    "blueprint": "build_and_check",
    "foresee": "estimate",
    "islands": "keep_in_fp32",
    "resident": "on_device",
    "sheet": "sample grid",
    "turns": "schedule",
    "oracle": "attribute classifier",
    "yardstick": "evaluation",
}
STANDARD_PHRASES = re.compile(r"ground_truth|in_place")  # the field's own words
# Written with brackets, so that this file has none of them itself. A caption of the trained model says "grey tiles".
BRITISH = re.compile(
    r"\w*(?:colo[u]r|cent[r]e|optimi[s]|normali[s]|gr[e]y(?!\stiles)|neighbo[u]r|behavio[u]r|favo[u]r|initiali[s]|visuali[s]"
    r"|synchroni[s]|minimi[s]e|maximi[s]e|recogni[s]e|summari[s]e|label[l]ed|licen[c]e|analy[s]e)\w*",
    re.IGNORECASE,
)


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(text_of(path))


def report(findings: list[str]) -> str:
    """A work list: how many in which file, the worst first, and then each."""
    files = Counter(finding.split(":")[0].split(" ")[0] for finding in findings)
    counts = ", ".join(f"{name} {count}" for name, count in files.most_common())
    return f"{len(findings)} to mend ({counts})\n  " + "\n  ".join(findings)


def keep(rule: Callable[[Path], Iterator[str]], paths: list[Path]) -> None:
    """Fail with all that a rule finds in these files."""
    findings = []
    for path in paths:
        findings += rule(path)
    assert not findings, report(findings)


# Imports


def module_name(path: Path) -> str:
    """wan_mini/tiny/demo.py -> wan_mini.tiny.demo; a package by its folder."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


MODULES = {module_name(path): path for path in CODE}


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import of a file, in functions too; of a module where `from package` names one."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{short(path)}:{node.lineno} has a relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield node.lineno, submodule if submodule in MODULES else node.module


def group_of(path: Path) -> str:
    """Which line of MAY_BE_IMPORTED holds for a file of the product."""
    if path in CORE:
        return "core"
    if path == ROOT / "fastvmt.py":
        return "fastvmt"
    return "wan_mini"


def imports_up(path: Path) -> Iterator[str]:
    allowed = MAY_BE_IMPORTED[group_of(path)]
    for line, name in imports_of(path):
        first = name.split(".")[0]
        if first not in allowed and first not in sys.stdlib_module_names:
            yield f"{short(path)}:{line} imports {name}"


def imports_tests(path: Path) -> Iterator[str]:
    for line, name in imports_of(path):
        if name.split(".")[0] in {"tests", "conftest", "notebooks", "course", "naive"}:
            yield f"{short(path)}:{line} imports {name}"


def test_imports_go_one_way():
    """The method's three modules know torch alone, wan_mini itself alone, fastvmt both; five packages in all."""
    keep(imports_up, PRODUCT)
    keep(imports_tests, BENCHMARKS)


def test_no_import_cycles():
    graph = {}
    for name, path in MODULES.items():
        targets = {target for _, target in imports_of(path)}
        graph[name] = targets & set(MODULES) - {name}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail("import cycle: " + " <- ".join(error.args[1]))


def imports_by_string(path: Path) -> Iterator[str]:
    for line, name in imports_of(path):
        hides = name.split(".")[0] in {"importlib", "runpy", "pkgutil"}
        if hides and not name.startswith(("importlib.metadata", "importlib.resources")):
            yield f"{short(path)}:{line} imports {name}"
        if name.startswith("unittest") and path in PRODUCT:
            yield f"{short(path)}:{line} imports {name}"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in {"__import__", "exec", "eval"} or called.split(".")[-1] in {"import_module", "find_spec"}:
                yield f"{short(path)}:{node.lineno} calls {called}"


def test_no_import_by_string():
    """A name in a string hides an arrow of the import graph; nor does the product replace parts of itself."""
    keep(imports_by_string, CODE)


def happens_at_import(path: Path) -> Iterator[str]:
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for node in tree_of(path).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        entry = isinstance(node, ast.If) and ast.unparse(node.test) in {"__name__ == '__main__'", "TYPE_CHECKING"}
        if not (isinstance(node, allowed) or docstring or entry):
            yield f"{short(path)}:{node.lineno} {ast.unparse(node)[:60]}"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Global):
            yield f"{short(path)}:{node.lineno} {ast.unparse(node)}"


def test_nothing_happens_at_import():
    """At top level: imports, definitions, constants, the program's entry; no loose calls, and no `global` anywhere."""
    keep(happens_at_import, CODE)


DEVICE_MODULES = {"torch.cuda", "torch.mps", "torch.backends.cuda", "torch.backends.mps"}


def chooses_device(path: Path) -> Iterator[str]:
    if path.is_relative_to(ROOT / "wan_mini" / "device"):
        return
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"(cuda|mps)(:\d*)?", node.value):
                yield f"{short(path)}:{node.lineno} {node.value!r}"
        elif isinstance(node, ast.Attribute) and path in PRODUCT and ast.unparse(node) in DEVICE_MODULES:
            yield f"{short(path)}:{node.lineno} {ast.unparse(node)}"


def test_devices_are_chosen_in_one_place():
    """No "cuda" or "mps" outside wan_mini/device, and no torch.cuda in the product: a device is an argument."""
    keep(chooses_device, CODE)


# Density


@dataclass
class Page:
    """What makes a file hard to read aloud: its length, its longest function, and how much a line holds."""

    name: str
    lines: int
    longest: int
    counts: dict[str, int]

    def excess(self) -> float:
        """How many constructs it has beyond what its length allows."""
        total = 0.0
        for kind, limit in PER_1000_LINES.items():
            total += max(0.0, self.counts[kind] - limit * self.lines / 1000)
        return total

    def row(self) -> str:
        cells = "".join(f"{self.counts[kind]:6}" for kind in PER_1000_LINES)
        return f"{self.name:40}{self.lines:7}{self.longest:9}{cells}{self.excess():7.1f}"


FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSION = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
HEADER = f"{'':40}{'lines':>7}{'longest':>9}{'comp':>6}{'cond':>6}{'tuple':>6}{'walr':>6}{'over':>7}"


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the last, docstring included."""
    return function.end_lineno - function.lineno + 1


def unpacks(node: ast.AST) -> bool:
    """Whether it assigns to several names at once: a, b = ..."""
    return isinstance(node, ast.Assign) and any(isinstance(target, (ast.Tuple, ast.List)) for target in node.targets)


def measure(path: Path) -> Page:
    page = Page(short(path), len(text_of(path).splitlines()), 0, dict.fromkeys(PER_1000_LINES, 0))
    for node in ast.walk(tree_of(path)):
        page.counts["comprehensions"] += isinstance(node, COMPREHENSION)
        page.counts["conditionals"] += isinstance(node, ast.IfExp)
        page.counts["tuple assignments"] += unpacks(node)
        page.counts["walrus"] += isinstance(node, ast.NamedExpr)
        if isinstance(node, FUNCTION):
            page.longest = max(page.longest, length(node))
    return page


def density_table(pages: list[Page], rows: int = 25) -> str:
    """The densest files first; the columns are counts, the last one what is too many for the file's length."""
    total = Page("all", 0, 0, dict.fromkeys(PER_1000_LINES, 0))
    for page in pages:
        total.lines += page.lines
        total.longest = max(total.longest, page.longest)
        for kind, count in page.counts.items():
            total.counts[kind] += count
    lines = [HEADER]
    for page in sorted(pages, key=Page.excess, reverse=True)[:rows]:
        lines.append(page.row())
    lines.append(total.row())
    for kind, limit in PER_1000_LINES.items():
        lines.append(f"{kind:20} {1000 * total.counts[kind] / total.lines:5.1f} per 1000 lines, at most {limit}")
    return "\n".join(lines)


@pytest.mark.parametrize("paths", [PRODUCT, BENCHMARKS], ids=["product", "benchmarks"])
def test_density_of_a_page(paths, request, capsys):
    """One idea a line: comprehensions, conditional expressions, a, b = ..., and := per 1000 lines."""
    pages = [measure(path) for path in paths]
    table = density_table(pages)
    if "density" in request.config.getoption("keyword"):
        with capsys.disabled():
            print(f"\n{table}")
    lines = sum(page.lines for page in pages)
    over = []
    for kind, limit in PER_1000_LINES.items():
        count = sum(page.counts[kind] for page in pages)
        if 1000 * count > limit * lines:
            over.append(f"{kind}: {1000 * count / lines:.1f} per 1000 lines, at most {limit}")
    assert not over, report(over) + "\n" + table


def test_density_of_functions_and_files():
    over = []
    for path in CODE:
        limit = LONGEST_FASTVMT if path == ROOT / "fastvmt.py" else LONGEST_FILE
        lines = len(text_of(path).splitlines())
        if lines > limit:
            over.append(f"{short(path)} has {lines} lines, at most {limit}")
        for node in ast.walk(tree_of(path)):
            if isinstance(node, FUNCTION) and length(node) > LONGEST_FUNCTION:
                over.append(f"{short(path)}:{node.lineno} {node.name} has {length(node)} lines")
    assert not over, report(over)


def unexplained(path: Path) -> Iterator[str]:
    for node in tree_of(path).body:
        public = isinstance(node, (*FUNCTION, ast.ClassDef)) and not node.name.startswith("_")
        if public and not ast.get_docstring(node):
            yield f"{short(path)}:{node.lineno} {node.name}"


def test_public_names_are_explained():
    keep(unexplained, CODE)


# Words


def identifiers_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and name of everything that a file gives a name to; not what it calls of others."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, (*FUNCTION, ast.ClassDef)):
            yield node.lineno, node.name
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.alias) and node.asname:
            yield node.lineno, node.asname


def words_in(identifier: str) -> list[str]:
    """noised_reference -> noised, reference; BlockStream -> block, stream."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", STANDARD_PHRASES.sub("", identifier))
    return spaced.lower().split("_")


def test_words_are_taken_apart():
    assert words_in("noised_reference") == ["noised", "reference"]
    assert words_in("GroundColor") == ["ground", "color"]
    assert "ground" not in words_in("ground_truth") and "place" not in words_in("add_in_place")


def private_words(path: Path) -> Iterator[str]:
    for line, identifier in sorted(set(identifiers_of(path))):
        for word in words_in(identifier):
            if word in PRIVATE_WORDS:
                yield f"{short(path)}:{line} {identifier} ({word}: {PRIVATE_WORDS[word]})"


def test_identifiers_use_standard_terms():
    keep(private_words, CODE)


def prose_of(path: Path) -> str:
    """A file's text; of a notebook its cells, without outputs; of a page its text, without data."""
    if path.suffix == ".html":
        return re.sub(r'"[^"]{2000,}"', '""', text_of(path))
    if path.suffix != ".ipynb":
        return text_of(path)
    return "\n".join("".join(cell["source"]) for cell in json.loads(text_of(path))["cells"])


def documents() -> list[Path]:
    """Everything that people read: code, tests, lessons, pages."""
    files = list(CODE)
    for folder in ("tests", "notebooks", "wan_mini", "benchmarks", ".github"):
        for pattern in ("*.py", "*.ipynb", "*.md", "*.html", "*.yml"):
            files += (ROOT / folder).rglob(pattern)
    files += ROOT.glob("*.md")
    return sorted({path for path in files if ".ipynb_checkpoints" not in path.parts})


def british_words(path: Path) -> Iterator[str]:
    for number, line in enumerate(prose_of(path).splitlines(), start=1):
        for match in BRITISH.finditer(line):
            yield f"{short(path)}:{number} {match.group()}"


def test_spelling_is_american():
    keep(british_words, documents())


def test_british_words_are_seen():
    for word in ("col" + "our", "Cent" + "res", "optimi" + "ser", "light" + "gr" + "ey", "un" + "normali" + "sed"):
        assert BRITISH.search(word), word
    for word in ("color", "centers", "optimizer", "gray", "normalized", "percentage", "analysis", "surprise"):
        assert not BRITISH.search(word), word


# Documents


def committed() -> list[str]:
    """Paths under version control; in a copy without git, what lies there."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    if listed:
        return [name for name in listed if (ROOT / name).exists()]
    return [short(path) for path in ROOT.rglob("*") if path.is_file() and not NEVER_COMMITTED & set(path.parts)]


def test_top_level_holds_what_belongs_there():
    names = {name.split("/")[0] for name in committed()}
    surplus = sorted(name for name in names - TOP_LEVEL if not name.startswith("."))
    assert not surplus, report(surplus)
    assert names >= TOP_LEVEL, report(sorted(TOP_LEVEL - names))


PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("[bnw]*/**/*.md")])
README = text_of(ROOT / "README.md")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_readme_is_a_front_door():
    """Short, and its first two bash blocks run the program and its tests; CI reads the second."""
    blocks = [block for language, block in FENCED.findall(README) if language == "bash"]
    assert re.search(r"^python fastvmt\.py$", blocks[0], re.MULTILINE)
    assert re.search(r"^pip install -r requirements-dev\.txt$", blocks[1], re.MULTILINE)
    assert re.search(r"^python -m pytest\b", blocks[1], re.MULTILINE)
    lines = README.count("\n")
    assert lines <= LONGEST_README


def test_readme_guide_names_what_is_there():
    """The block that lists wan_mini names each of its modules and folders, the top level's modules, and no other."""
    guides = [block for _, block in FENCED.findall(README) if re.search(r"^wan_mini/", block, re.MULTILINE)]
    assert guides, "README.md has no fenced list of files with a line that begins with wan_mini/"
    named = set(re.findall(r"[\w./-]+(?:\.py|/)", guides[0]))
    mentioned = set()
    for name in named:
        mentioned |= set(Path(name).parts)
    there = set()
    for name in committed():
        there |= set(Path(name).parts)
    expected = {path.name for path in METHOD}
    for name in committed():
        if re.fullmatch(r"wan_mini/(?!__)(\w+\.py|\w+/.*)", name):
            expected.add(Path(name).parts[1])
    assert not expected - mentioned, report(sorted(expected - mentioned))
    assert not mentioned - there, report(sorted(mentioned - there))


def commands() -> set[tuple[str, str, str]]:
    """(page, program, flag) of all commands in the documents, fenced or inline."""
    program = re.compile(r"python (fastvmt\.py|-m (?:wan_mini|benchmarks)[\w.]*)([^`#\n]*)")
    uses = set()
    for page in PAGES:
        if not page.exists():
            continue
        text = re.sub(r"\\\n", " ", text_of(page))
        inline = re.sub(r"`[^`\n]*(?:\n[^`\n]+)?`", lambda match: match.group().replace("\n", " "), text)
        for name, rest in program.findall(inline):
            for flag in re.findall(r"(?<=\s)--[a-z][a-z0-9-]*", rest):
                uses.add((short(page), name, flag))
    return uses


def run_as_program(program: str) -> None:
    """As `python fastvmt.py` or `python -m module` would, in this process, which has imported torch already."""
    if program.startswith("-m "):
        runpy.run_module(program.removeprefix("-m "), run_name="__main__")
    else:
        runpy.run_path(str(ROOT / program), run_name="__main__")


@functools.cache
def flags_of(program: str) -> set[str]:
    """The flags that a program prints for --help; none if there is no such program, or it does not answer."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # runpy's: the module is imported already
        patch.setattr(sys, "argv", [program, "--help"])
        with contextlib.suppress(SystemExit, ImportError):
            run_as_program(program)
    return set(re.findall(r"--[a-z][a-z0-9-]*", printed.getvalue()))


def test_documented_flags_exist():
    """Every program that a page runs answers --help, and knows the flags that the page gives it."""
    wrong = []
    for page, program, flag in sorted(commands()):
        if flag not in flags_of(program):
            wrong.append(f"{page}: python {program} {flag}")
    assert "--prompt" in flags_of("fastvmt.py")
    assert not wrong, report(wrong)


def dead_links(page: Path) -> Iterator[str]:
    for target in re.findall(r"\]\((?!http|mailto)([^)#\s]+)[^)]*\)", text_of(page)):
        if not (page.parent / target).exists():
            yield f"{short(page)}: {target}"


def test_links_lead_somewhere():
    keep(dead_links, PAGES)
