"""Mistakes that the tests must notice: each is put into a copy of the repository, where the tests named beside it run.

    python -m benchmarks.mutants               # all, some fifteen minutes on one thread
    python -m benchmarks.mutants --only NAME   # those whose name contains NAME
    python -m benchmarks.mutants --list

A mutant that its tests let pass has survived: then the exit code is 1, and a test is missing. The tests are first run
without any mistake, since failing ones prove nothing. The mutants are in mutants.json; after code has moved, change
their entries there.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from wan_mini.errors import UserError
from wan_mini.runs.cli import Parser

ROOT = Path(__file__).resolve().parent.parent
MUTANTS = Path(__file__).with_name("mutants.json")
LIMIT = 300  # seconds; a mutant that makes its tests run longer is killed by that
OUTCOMES = ("killed", "survived", "error", "not run")


@dataclass(frozen=True)
class Mutant:
    """One mistake: `old`, which is once in `file`, becomes `new`; `tests` (as pytest takes them) must fail."""

    name: str
    file: str  # relative to the repository
    old: str
    new: str
    tests: tuple[str, ...]
    gpu: bool = False  # shows on a GPU only


def read_mutants(path: Path = MUTANTS) -> list[Mutant]:
    """The mutants of a JSON list of objects with Mutant's fields. Raises UserError on an entry without a field."""
    mutants = []
    for entry in json.loads(path.read_text(encoding="utf-8")):
        tests = tuple(entry.get("tests", ()))
        try:
            mutants.append(Mutant(**{**entry, "tests": tests}))
        except TypeError as problem:
            raise UserError(f"{path}: {entry.get('name')} is no mutant ({problem})") from None
    return mutants


def apply_mutant(source: str, mutant: Mutant) -> str:
    """A file's text with the mistake. Raises UserError, which names the mutant, unless `old` is in it exactly once."""
    count = source.count(mutant.old)
    if count != 1:
        raise UserError(f"mutant {mutant.name!r}: {mutant.old!r} must be in {mutant.file} once, got {count}")
    return source.replace(mutant.old, mutant.new)


def copy_repository(root: Path, target: Path) -> None:
    """The files that git knows or would add, where there is git; else all but caches and outputs."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True)
    names = listed.stdout.strip("\0")
    if listed.returncode != 0 or not names:
        ignored = shutil.ignore_patterns("__pycache__", ".git", "outputs")
        shutil.copytree(root, target, ignore=ignored, dirs_exist_ok=True)
        return
    for name in names.split("\0"):
        if (root / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, target / name)


def run_tests(folder: Path, tests: Sequence[str], limit: float | None = LIMIT) -> tuple[int | None, str]:
    """The exit code of pytest, None after `limit` seconds, and the end of what it printed."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", *tests]
    # No bytecode: a file written twice in a second, to the same size, would not be compiled again.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": ""}
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return None, f"stopped after {limit} s"
    return done.returncode, (done.stdout + done.stderr)[-2000:]


def judge(folder: Path, mutant: Mutant) -> str:
    """Put the mistake in, run the tests, take it out: "killed", "survived", or "error" if no test could judge it."""
    path = folder / mutant.file
    source = path.read_text(encoding="utf-8")
    path.write_text(apply_mutant(source, mutant), encoding="utf-8")
    try:
        code, output = run_tests(folder, mutant.tests)
    finally:
        path.write_text(source, encoding="utf-8")
    outcomes = {0: "survived", 1: "killed", None: "killed"}
    if code not in outcomes:  # nothing collected, or a file that cannot be imported
        print(output)
    return outcomes.get(code, "error")


def judge_all(folder: Path, mutants: Sequence[Mutant]) -> dict[str, str]:
    """The outcome of each mutant in a copy of the repository, printed as it comes; GPU mutants only run on a GPU."""
    has_gpu = torch.cuda.is_available()
    outcomes = {}
    for mutant in mutants:
        start = time.perf_counter()
        outcome = "not run"
        if has_gpu or not mutant.gpu:
            outcome = judge(folder, mutant)
        outcomes[mutant.name] = outcome
        print(f"{outcome:9} {time.perf_counter() - start:5.1f} s  {mutant.name} ({mutant.file})", flush=True)
    return outcomes


def print_summary(outcomes: dict[str, str]) -> None:
    """Print how many mutants had which outcome, and the names of those that were not killed."""
    print()
    for outcome in OUTCOMES:
        names = [name for name in outcomes if outcomes[name] == outcome]
        if not names:
            continue
        line = f"{outcome:9} {len(names):4}"
        if outcome == "not run":
            line += " (no GPU here)"
        if outcome != "killed":
            line += ": " + "; ".join(names)
        print(line)


def choose(mutants: Sequence[Mutant], text: str, root: Path) -> list[Mutant]:
    """The mutants whose name contains the text. Raises UserError if there is none, or if one does not fit its file."""
    chosen = [mutant for mutant in mutants if text in mutant.name]
    if not chosen:
        raise UserError(f"no mutant's name contains {text!r}: see --list")
    for mutant in chosen:
        apply_mutant((root / mutant.file).read_text(encoding="utf-8"), mutant)
    return chosen


def main(argv: list[str] | None = None, mutants: Sequence[Mutant] | None = None, root: Path = ROOT) -> int:
    """Exit code: 0 if all that ran were killed, 1 if one survived or could not be judged, 2 for a wrong mutant."""
    parser = Parser(prog="python -m benchmarks.mutants", description="Do the tests notice mistakes?")
    parser.add_argument("--only", default="", metavar="NAME", help="only mutants whose name contains this")
    parser.add_argument("--list", action="store_true", help="name the mutants and their tests, and run nothing")
    args = parser.parse_args(argv)
    try:
        chosen = choose(read_mutants() if mutants is None else mutants, args.only, root)
    except (UserError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    if args.list:
        for mutant in chosen:
            print(f"{mutant.name:48} {mutant.file:26} {' '.join(mutant.tests)}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        copy_repository(root, Path(folder))
        tests = sorted({test for mutant in chosen for test in mutant.tests})
        code, output = run_tests(Path(folder), tests, limit=None)  # those of all mutants take minutes
        if code != 0:
            print(f"error: the tests fail without any mutant\n{output}", file=sys.stderr)
            return 1
        outcomes = judge_all(Path(folder), chosen)
    print_summary(outcomes)
    return 1 if {"survived", "error"} & set(outcomes.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
