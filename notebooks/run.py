"""Run all notebooks and solutions from top to bottom, and keep their outputs:

    python notebooks/run.py                 all
    python notebooks/run.py 06 solutions/06 those whose path begins with one of these
    python notebooks/run.py --check         run, report, change no file
    python notebooks/run.py --jobs 2        two at a time; figures of time are then of a busy machine
    python notebooks/run.py --site DIR      run nothing; write the course as static pages into DIR (needs nbconvert)

Stops at the first error of a notebook, goes on with the next, and exits with 1 if any had one.
"""

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

HERE = Path(__file__).resolve().parent
LIMIT = 1200  # seconds a cell: none needs a tenth of it, but a busy machine may
LARGEST = 1_500_000  # bytes


def execute(path: Path, check: bool) -> str:
    """Run one notebook in a fresh kernel, in its own folder; returns what is wrong with it, or nothing."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=LIMIT, coalesce_streams=True, resources={"metadata": {"path": str(path.parent)}}
    )
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        return str(error)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
        outputs = [out for out in cell.get("outputs", []) if out.get("name") != "stderr"]  # progress bars
        cell.update({"outputs": outputs} if cell.cell_type == "code" else {})
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    text = nbformat.writes(notebook)
    if str(HERE.parent) in text:
        return "an output names a folder of this machine"
    if len(text.encode()) > LARGEST:
        return f"{len(text.encode())} bytes, more than {LARGEST}: smaller pictures"
    if not check:
        path.write_text(text + "\n", encoding="utf-8")
    return ""


def name_of(path: Path) -> str:
    """A notebook's path below this folder, as --help and the output have it."""
    return path.relative_to(HERE).as_posix()


def run(path: Path, check: bool) -> bool:
    """Run one notebook and print a line about it; whether nothing is wrong with it."""
    start = time.perf_counter()
    problem = execute(path, check)
    print(f"{name_of(path):44} {time.perf_counter() - start:6.1f} s  {problem or 'ok'}", flush=True)
    return not problem


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python notebooks/run.py", description="Run notebooks, and keep their outputs.")
    p.add_argument("names", nargs="*", metavar="NAME", help="those whose path begins so: 06, solutions/06 (all)")
    p.add_argument("--check", action="store_true", help="run and report, change no file")
    p.add_argument("--jobs", type=int, default=1, help="notebooks that run at a time (%(default)s)")
    p.add_argument("--site", type=Path, metavar="DIR", help="run nothing, write the course as static pages into DIR")
    return p


def make_site(folder: Path) -> int:
    """Write the course as static pages; returns the exit code."""
    try:
        from website import build
    except ModuleNotFoundError as error:
        print(f"error: --site needs {error.name}: pip install -r requirements-dev.txt", file=sys.stderr)
        return 2
    print(f"wrote {len(build(folder))} files, begin with {folder / 'index.html'}")
    return 0


def main(argv: list[str]) -> int:
    """Run what the arguments choose; returns the exit code."""
    args = parser().parse_args(argv)
    if args.site is not None:
        return make_site(args.site)
    if args.jobs < 1:
        print(f"error: got --jobs {args.jobs}: give at least 1", file=sys.stderr)
        return 2
    paths = [*sorted(HERE.glob("*.ipynb")), *sorted(HERE.glob("solutions/*.ipynb"))]
    chosen = [path for path in paths if not args.names or name_of(path).startswith(tuple(args.names))]
    with ThreadPoolExecutor(args.jobs) as pool:  # each notebook computes in a process of its own
        results = list(pool.map(partial(run, check=args.check), chosen))
    return 0 if all(results) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
