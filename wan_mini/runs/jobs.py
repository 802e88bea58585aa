"""Many runs, one a line of a file, by one process or by all that torchrun has started: each takes the next one.

    torchrun --nproc-per-node 8 fastvmt.py --model Wan2.1-T2V-1.3B --jobs jobs.jsonl

    {"ref": "dog.mp4", "prompt": "a fox in the snow", "out": "runs/fox", "seed": 3, "set": ["tau=3"]}

A line's names are flags; they come behind those of the command line. Every process loads the model once. A run that
fails is reported in one line, and the others go on.
"""

import io
import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from traceback import print_exc
from typing import Any

import torch.distributed as dist

from wan_mini.errors import MissingFile, UserError
from wan_mini.json_file import MAX_BYTES
from wan_mini.runs.cli import Parser

OF_A_JOB = (
    *("ref", "prompt", "negative", "frames", "height", "width", "seed"),
    *("amf", "interval", "steps", "set", "out", "png", "unguided"),
)
NOT_WITH_JOBS = ("parallel", "dry_run", "out")
POLL = 0.05  # seconds between two looks at what the other processes do


def run_jobs(args: Namespace, parser: Parser, argv: list[str], run: Callable[[Namespace], None]) -> int:
    """Run what is left of the jobs, one after the other. Returns 1 if one of them failed, in any process, else 0.

    args, argv: the command line; run: does a run with these flags. Raises UserError on flags that are no job's.
    """
    for name in NOT_WITH_JOBS:
        if getattr(args, name):
            raise UserError(f"--jobs runs each line by itself, got --{name.replace('_', '-')} too: leave it out")
    if not args.jobs.is_file():
        raise MissingFile(f"{args.jobs} does not exist: give a file with a job in JSON on each line")
    lines = read_lines(args.jobs)
    names = [f"{args.jobs} line {number}" for number in range(1, len(lines) + 1)]

    def run_line(line: str) -> None:
        if line.strip():
            run(parse_job(line, parser, argv))

    queue = JobQueue()
    queue.run(run_line, lines, names, tracebacks=args.traceback)
    return queue.finish()[0]


def read_lines(file: Path) -> list[str]:
    """The lines of a file of jobs. Raises UserError if it is too large, or no UTF-8."""
    size = file.stat().st_size
    if size > MAX_BYTES:
        raise UserError(f"{file} has {size} bytes, more than {MAX_BYTES}: split it")
    try:
        return file.read_bytes().decode("utf-8").split("\n")  # JSON may hold other breaks of lines as they are
    except UnicodeDecodeError as problem:
        got = f"{problem.reason} at byte {problem.start}"
        raise UserError(f"{file} must be text in UTF-8, got {got}: save it anew") from None


class JobQueue:
    """Jobs of which each process that torchrun has started takes the next one; of a process alone, all are its own.

    A process makes one queue, runs one list of jobs, which is the same in all, and finishes.
    """

    def __init__(self) -> None:
        self.store, self.rank, self.processes = shared_store()

    def begin(self, prepare: Callable[[], None]) -> None:
        """Let the first process prepare what all of them need; the others wait for it."""
        if self.rank == 0:
            prepare()
            self.store.add("jobs/ready", 1)
        wait_for(self.store, "jobs/ready", 1)

    def run(self, work: Callable[[Any], None], jobs: Sequence[Any], names: Sequence[str], *, tracebacks: bool) -> None:
        """Call work(job) for those jobs that fall to this process; one that fails is reported by its name."""
        while True:
            number = self.store.add("jobs/next", 1)  # 1, 2, ..., to one process each
            if number > len(jobs):
                return
            try:
                work(jobs[number - 1])
            except (Exception, SystemExit) as error:  # noqa: BLE001 (whatever it is, the other jobs go on)
                self.store.add("jobs/failed", 1)
                if tracebacks:
                    print_exc()
                print(f"error: {names[number - 1]}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)

    def finish(self, result: str = "") -> tuple[int, list[str]]:
        """Wait for all processes. 1 if a job failed in any of them, else 0; and what each process gives, by rank."""
        self.store.set(f"jobs/result{self.rank}", result)
        self.store.add("jobs/ended", 1)
        wait_for(self.store, "jobs/ended", self.processes)
        failed = self.store.add("jobs/failed", 0)
        results = [self.store.get(f"jobs/result{rank}").decode() for rank in range(self.processes)]
        self.store.add("jobs/read", 1)
        if self.rank == 0:
            wait_for(self.store, "jobs/read", self.processes)  # the store ends with this process
        return int(failed > 0), results


def parse_job(line: str, parser: Parser, argv: list[str]) -> Namespace:
    """The flags of a line behind those of the command line. Raises UserError if it is no job."""
    try:
        job = json.loads(line)
    except ValueError as problem:
        raise UserError(f"not JSON ({problem})") from None
    if not isinstance(job, dict) or "out" not in job or not set(job) <= set(OF_A_JOB):
        raise UserError(f'a job is an object with "out" and any of {", ".join(OF_A_JOB)}, got {line[:80]}')
    flags: list[str] = []
    for name, value in job.items():
        if value is None or isinstance(value, dict):
            raise UserError(f"{name} must be what --{name} takes, got {json.dumps(value)[:80]}")
        flags += words(name, value)
    complaint = io.StringIO()
    try:
        with redirect_stderr(complaint):
            return parser.parse_args([*argv, *flags])
    except SystemExit:
        raise UserError(complaint.getvalue().removeprefix("error: ").strip()) from None


def words(name: str, value: Any) -> list[str]:
    """A name and its value as on a command line: true is a flag alone, a list is several words."""
    if isinstance(value, bool):
        return [f"--{name}"] * value
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={value}"]


def shared_store() -> tuple[dist.Store, int, int]:
    """Numbers that all processes of torchrun share, this one's rank and how many there are; or those of it alone."""
    if "RANK" not in os.environ:
        return dist.HashStore(), 0, 1
    return next(dist.rendezvous("env://"))


def wait_for(store: dist.Store, name: str, processes: int) -> None:
    """Return when every process has counted itself: torchrun ends all of them as soon as one fails."""
    while store.add(name, 0) < processes:
        time.sleep(POLL)
