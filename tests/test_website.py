"""The course as static pages: every link and anchor leads somewhere, titles are there, nothing is left of notebooks."""

import re
from pathlib import Path

import pytest
import run as notebooks_run

pytest.importorskip("nbconvert", reason="nbconvert is not installed: pip install -r requirements-dev.txt")

import website  # needs nbconvert

ROOT = website.ROOT


def faults(site: Path, name: str) -> list[str]:
    """What is wrong with the links of one page, with its title and with its ids."""
    text = (site / name).read_text(encoding="utf-8")
    wrong = []
    for _, target, anchor in website.LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        goal = (site / name).parent / target if target else site / name
        if not goal.is_file():
            wrong.append(f"{name}: {target}")
        elif anchor and goal.suffix == ".html" and f'id="{anchor[1:]}"' not in goal.read_text(encoding="utf-8"):
            wrong.append(f"{name}: {target}{anchor}")
    for pattern in (r"<title>[^<]{8,90}</title>", r'<meta name="description" content="[^"]{20,}', r"<h1"):
        if not re.search(pattern, text):
            wrong.append(f"{name}: no {pattern}")
    return wrong


def check(site: Path, written: list[str]) -> None:
    pages = [name for name in written if name.endswith(".html") and name != website.EXPLORE]
    wrong = []
    for name in pages:
        wrong += faults(site, name)
    assert not wrong, "\n".join(wrong)
    index = (site / "index.html").read_text(encoding="utf-8")
    assert all(f'href="{name}"' in index for name in pages if name != "index.html")
    assert website.EXPLORE in index and (site / website.EXPLORE).read_bytes() == (ROOT / website.EXPLORE).read_bytes()


def test_documents_one_lesson_and_its_solution(tmp_path):
    lesson = min((ROOT / "notebooks").glob("0*.ipynb"), key=lambda path: path.stat().st_size)
    solution = f"notebooks/solutions/{lesson.name}"
    chosen = [*website.DOCUMENTS, f"notebooks/{lesson.name}"]
    if (ROOT / solution).exists():
        chosen.append(solution)
    written = website.build(tmp_path, chosen)
    check(tmp_path, written)
    text = (tmp_path / f"notebooks/{lesson.stem}.html").read_text(encoding="utf-8")
    assert "<nav>" in text and "<h2" in text and 'class="highlight' in text


@pytest.mark.slow
def test_all_pages(tmp_path, capsys):
    assert notebooks_run.main(["--site", str(tmp_path)]) == 0
    names = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    check(tmp_path, names)
    assert f"wrote {len(names)} files" in capsys.readouterr().out
    lessons = [*(ROOT / "notebooks").glob("*.ipynb"), *(ROOT / "notebooks/solutions").glob("*.ipynb")]
    for lesson in lessons:
        assert lesson.relative_to(ROOT).with_suffix(".html").as_posix() in names


def test_the_folder_is_needed(capsys):
    for flags in (["--site"], ["--hepl"]):
        with pytest.raises(SystemExit) as stopped:
            notebooks_run.main(flags)
        assert stopped.value.code == 2
    assert "--site" in capsys.readouterr().err


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_every_chosen_notebook_is_run_and_an_error_of_one_counts(monkeypatch, capsys, jobs):
    seen = []

    def execute(path, check):
        seen.append((notebooks_run.name_of(path), check))
        return "went wrong" if "07" in path.name else ""

    monkeypatch.setattr(notebooks_run, "execute", execute)
    assert notebooks_run.main(["06", "07", "solutions/06", "--check", "--jobs", jobs]) == 1
    names = sorted(name for name, _ in seen)
    assert [name[:12] for name in names] == ["06_attention", "07_tiles_and", "solutions/06"]
    assert all(check for _, check in seen)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and sum(line.endswith("went wrong") for line in lines) == 1
    assert notebooks_run.main(["06", "--jobs", jobs]) == 0 and seen[-1][1] is False


def test_no_jobs_are_refused(capsys):
    assert notebooks_run.main(["--jobs", "0"]) == 2
    assert capsys.readouterr().err == "error: got --jobs 0: give at least 1\n"


def test_anchors_are_those_of_the_repository():
    heading = '<h2 id="The-x">The <code>x</code> of a, b &amp; c<a class="anchor-link" href="#The-x">&#182;</a></h2>'
    assert website.github_anchors(heading) == '<h2 id="the-x-of-a-b--c">The <code>x</code> of a, b &amp; c</h2>'


def test_a_description_is_plain_text():
    text = "# Title\n\n$$x^2$$\n\n**Question:** what does [this](a.md) do\nwith `q` and $k$?\n\nMore."
    assert website.plain(text) == "Question: what does this do with q and k?"
    assert len(website.plain("word " * 100)) <= 160 and website.plain("word " * 100).endswith("word ...")
