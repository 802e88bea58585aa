"""The course as static pages, made by `python notebooks/run.py --site DIR`; nothing is executed.

DIR mirrors the repository: notebooks/01_flow_matching.html beside notebooks/explore.html, and each file that a page
links to at its own path. DIR/index.html lists all pages. MathJax, loaded from the network, sets the formulas.
"""

import re
import shutil
import textwrap
from html import escape, unescape
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html
from pygments.formatters import HtmlFormatter

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "notebooks/README.md", "wan_mini/README.md", "CONTRIBUTING.md", "benchmarks/README.md")
DOCUMENTS += ("benchmarks/transfer.md", "benchmarks/frontier.md", "benchmarks/studies/README.md")
DOCUMENTS += ("benchmarks/methods.md", "benchmarks/speed/README.md", "benchmarks/published_code.md")
DOCUMENTS += ("wan_mini/tiny/training/README.md",)
EXPLORE = "notebooks/explore.html"
MATHJAX = "https://cdn.jsdelivr.net/npm/mathjax@3/es5/tex-mml-chtml.js"
LINK = re.compile(r'(?<=\s)(href|src)="([^"#]*)(#[^"]*)?"')
STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 60rem; padding: 0 1rem 4rem; font: 1rem/1.6 system-ui, sans-serif; color: #1b1b1b; }
nav { border-bottom: 1px solid #ccc; padding: .6rem 0; } a { color: #0062a3; }
img, svg { max-width: 100%; height: auto; } pre { overflow-x: auto; padding: .6rem; background: #f6f6f6; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
td, th { border: 1px solid #ccc; padding: .2rem .6rem; }
.jp-InputPrompt, .jp-OutputPrompt, .prompt, .anchor-link { display: none; }
"""


def page(title: str, description: str, body: str, path: str, highlight: str) -> str:
    """A whole HTML page at a path of the site; description: what a search engine shows."""
    up = "../" * path.count("/")
    mathjax = f'<script defer src="{MATHJAX}"></script>' if "$" in body or "\\(" in body else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="description" content="{escape(description)}">
<title>{escape(title)} - FastVMT-mini</title>
<style>{STYLE}{highlight}</style>
<script>MathJax = {{ tex: {{ inlineMath: [["$", "$"], ["\\\\(", "\\\\)"]], processEscapes: true }} }};</script>
{mathjax}
</head>
<body>
<nav><a href="{up}index.html">Contents</a> <a href="{up}notebooks/README.html">Plan and glossary</a>
<a href="{up}{EXPLORE}">Explorable page</a></nav>
<main>
{body}
</main>
</body>
</html>
"""


def plain(markdown: str) -> str:
    """The first paragraph that is text, without Markdown's signs, at most 160 characters."""
    for paragraph in markdown.split("\n\n"):
        if paragraph.strip() and not paragraph.startswith(("#", "!", "|", "$", "`", "<", "- ")):
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", paragraph)
            return textwrap.shorten(re.sub(r"[*`$\\]", "", text), 160, placeholder=" ...")
    return ""


def github_anchors(body: str) -> str:
    """Give headings the ids that links in the repository use: lower case, words joined by hyphens."""

    def renamed(match: re.Match) -> str:
        level = match.group(1)
        heading = re.sub(r'<a class="anchor-link".*?</a>', "", match.group(3))
        words = re.sub(r"[^\w\- ]", "", unescape(re.sub(r"<[^>]*>", "", heading)).lower()).strip()
        return f'<h{level} id="{words.replace(" ", "-")}">{heading}</h{level}>'

    return re.sub(r"<h([1-6])( [^>]*)?>(.*?)</h\1>", renamed, body, flags=re.DOTALL)


def relink(body: str, path: str, pages: set[str], files: set[str]) -> str:
    """Let links to notebooks and documents lead to their pages; note the other files of the repository."""

    def replaced(match: re.Match) -> str:
        attribute, target, anchor = match.group(1), match.group(2), match.group(3) or ""
        if not target or re.match(r"[a-z]+:", target):
            return match.group()
        name = (ROOT / path).parent.joinpath(target).resolve().relative_to(ROOT).as_posix()
        if name in pages:
            target = re.sub(r"\.(ipynb|md)$", ".html", target)
        elif (ROOT / name).is_file():
            files.add(name)
        else:  # a folder: the list of its pages
            target = "../" * path.count("/") + "index.html"
        return f'{attribute}="{target}{anchor}"'

    return LINK.sub(replaced, body)


def render(path: str, exporter: HTMLExporter) -> tuple[str, str, str]:
    """Title, description and body of a notebook or document."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return re.search(r"^# (.*)$", text, re.MULTILINE).group(1), plain(text), markdown2html(text)
    notebook = nbformat.reads(text, as_version=4)
    prose = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    title = re.search(r"^# (.*)$", prose, re.MULTILINE).group(1)
    body, _ = exporter.from_notebook_node(notebook)
    return title, plain(prose), body


def build(folder: Path, paths: list[str] | None = None) -> list[str]:
    """Write the site; paths: of notebooks and documents in the repository, None: all. Returns the files written."""
    if paths is None:
        notebooks = [*(ROOT / "notebooks").glob("*.ipynb"), *(ROOT / "notebooks" / "solutions").glob("*.ipynb")]
        paths = [*DOCUMENTS, *sorted(file.relative_to(ROOT).as_posix() for file in notebooks)]
    exporter = HTMLExporter(template_name="basic")
    highlight = HtmlFormatter(style="default").get_style_defs(".highlight")
    files = {EXPLORE, *(figure.relative_to(ROOT).as_posix() for figure in (ROOT / "notebooks/figures").glob("*.svg"))}
    written = []
    contents = {}
    for path in paths:
        title, description, body = render(path, exporter)
        name = re.sub(r"\.(ipynb|md)$", ".html", path)
        body = relink(github_anchors(body), path, set(paths), files)
        write(folder / name, page(title, description, body, path, highlight))
        contents[name] = (title, description)
        written.append(name)
    for name in sorted(files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    write(folder / "index.html", page("Contents", "All pages of the course.", table(contents), "index.html", ""))
    return [*written, *sorted(files), "index.html"]


def table(contents: dict[str, tuple[str, str]]) -> str:
    """The list of all pages, in three parts."""
    parts = {"Course": [], "Solutions": [], "Documents": []}
    for name, (title, description) in contents.items():
        part = "Solutions" if "/solutions/" in name else "Course"
        if Path(name).stem in {"README", "CONTRIBUTING"}:
            part = "Documents"
        parts[part].append(f'<li><a href="{name}">{escape(title)}</a><br>{escape(description)}</li>')
    parts["Course"].append(f'<li><a href="{EXPLORE}">Attention as motion: an explorable page</a></li>')
    lists = [f"<h2>{part}</h2>\n<ul>\n" + "\n".join(items) + "\n</ul>" for part, items in parts.items()]
    return "<h1>FastVMT-mini: the course</h1>\n" + "\n".join(lists)


def write(path: Path, text: str) -> None:
    """Write a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
