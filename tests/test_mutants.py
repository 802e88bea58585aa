"""The list of mutants fits the code of today, and the runner tells a killed one from a survivor."""

import ast
import functools
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.mutants import Mutant, apply_mutant, main, read_mutants

ROOT = Path(__file__).parent.parent
MUTANTS = read_mutants()


def test_there_are_enough_and_no_two_alike():
    assert len(MUTANTS) >= 40
    assert len({mutant.file for mutant in MUTANTS}) >= 15
    assert not [name for name, count in Counter(mutant.name for mutant in MUTANTS).items() if count > 1]
    changes = Counter((mutant.file, mutant.old, mutant.new) for mutant in MUTANTS)
    assert max(changes.values()) == 1


@functools.cache
def names_in(path: str) -> set[str]:
    """Names of a file's tests."""
    body = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef)}


@functools.cache
def syntax_of(source: str) -> str:
    """What Python makes of a file, without comments and line numbers."""
    return ast.dump(ast.parse(source))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_fits_its_file_and_names_tests_that_exist(mutant):
    source = (ROOT / mutant.file).read_text(encoding="utf-8")
    assert syntax_of(apply_mutant(source, mutant)) != syntax_of(source)  # it can be imported, and is no comment
    assert mutant.tests
    for test in mutant.tests:
        path, _, name = test.partition("::")
        assert not name or name.split("[")[0] in names_in(path), test


def test_an_old_text_that_is_gone_names_its_mutant():
    mutant = Mutant("gone", "x.py", "a + b", "a - b", ())
    for source, count in (("a * b", 0), ("a + b + a + b", 2)):
        with pytest.raises(ValueError, match=rf"mutant 'gone': 'a \+ b' must be in x.py once, got {count}"):
            apply_mutant(source, mutant)


def test_the_runner_tells_killed_from_survived(tmp_path, capsys):
    (tmp_path / "x.py").write_text("def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n")
    (tmp_path / "test_x.py").write_text("from x import add\n\n\ndef test_add():\n    assert add(2, 3) == 5\n")
    tests = ("test_x.py::test_add",)
    killed = Mutant("plus", "x.py", "a + b", "a * b", tests)
    survivor = Mutant("minus", "x.py", "a - b", "a + b", tests)
    broken = Mutant("broken", "x.py", "return a + b", "return (", tests)
    assert main([], [killed], tmp_path) == 0
    assert main([], [killed, survivor, broken], tmp_path) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == ["killed       1", "survived     1: minus", "error        1: broken"]
    assert main([], [Mutant("gone", "x.py", "a / b", "a", tests)], tmp_path) == 2
    assert "mutant 'gone'" in capsys.readouterr().err
    (tmp_path / "test_x.py").write_text("def test_add():\n    assert False\n")
    assert main([], [killed], tmp_path) == 1
    assert "fail without any mutant" in capsys.readouterr().err
    assert main(["--only", "nobody"], [killed], tmp_path) == 2
    assert (tmp_path / "x.py").read_text().startswith("def add(a, b):\n    return a + b")
