"""A day with a GPU: check, speed and train, each in calls of at most nine minutes, all files in one folder.

    python -m benchmarks.gpu_day check --out day      # the suite's gpu tests, file by file
    python -m benchmarks.gpu_day speed --out day      # all tables of benchmarks/speed, the most important first
    python -m benchmarks.gpu_day train --out day --state last_day/train
    python -m benchmarks.gpu_day check speed train --out day --rehearse        # on a CPU, tiny sizes, minutes

A stage is a list of steps, a process each. A step that succeeded is not done again, so the same command goes on where
the last one stopped, also with a copy of the folder on another machine. What a step printed is in STAGE/STEP.log, and
what it was run with in STAGE/STEP.json. A step is stopped when the stage's minutes are over, and is then begun anew.
Exit code 0 when all steps are done, 1 if one failed, 3 if some are left for the next call.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.speed.bench import ROOT, describe_machine
from benchmarks.speed.random_models import REHEARSAL
from wan_mini.device.select import pick_device
from wan_mini.runs.cli import Parser

GPU_TESTS = ("test_gpu", "test_offload", "test_memory", "test_select", "test_wiring")
TABLES = (
    "full_run --size 1.3B",
    "limits --size 1.3B",
    "gradient --size 1.3B --repeats 3",
    "dit --size 1.3B",
    "vae --size 1.3B --repeats 1",
    "full_run --size 1.3B --compile",
    "full_run --size 1.3B --compile regions",
    "full_run --size 1.3B --tf32",
    "amf --size 1.3B --repeats 3 --frames 9 21 41 81 161 --limit 2",
    "scaling --size small",
    "startup --repeats 1",
)
REHEARSED_TABLES = (
    *("full_run", "limits", "gradient", "dit", "vae"),
    *("full_run --compile", "full_run --compile regions", "full_run --tf32", "amf --frames 3 5"),
)
DONE, FAILED, LEFT = 0, 1, 3
PAUSED = "the same command goes on"  # what training prints when its minutes are over


@dataclass(frozen=True)
class Step:
    """One process of a stage."""

    name: str
    command: list[str]  # after `python`


def check_steps(rehearse: bool) -> list[Step]:
    """The gpu tests; a rehearsal runs on the CPU what can run there."""
    files: tuple[str, ...] = GPU_TESTS
    if rehearse:
        files = GPU_TESTS[:1]
    steps = []
    for file in files:
        command = ["-m", "pytest", "-n", "0", "-q", "-rA", "-m", "gpu", f"tests/{file}.py"]
        steps.append(Step(file, [*command, "-p", "no:cacheprovider"]))
    return steps


def speed_steps(rehearse: bool, device: str) -> list[Step]:
    """The tables, in the order in which they matter."""
    tables: tuple[str, ...] = TABLES
    if rehearse:
        tables = tuple(f"{table} --size {REHEARSAL} --repeats 1" for table in REHEARSED_TABLES)
    steps = []
    for table in tables:
        name, *flags = table.split()
        label = name + "-compiled" * ("--compile" in flags)
        label += "-regions" * ("regions" in flags) + "-tf32" * ("--tf32" in flags)
        steps.append(Step(label, ["-m", f"benchmarks.speed.{name}", *flags, "--device", device]))
    return steps


def train_steps(rehearse: bool, device: str, folder: Path, minutes: float) -> list[Step]:
    """The tiny Wan's training, which saves its state and pauses by itself before the stage's time is over."""
    stage = "all"
    minutes -= 1  # for what follows the last step
    if rehearse:
        stage = "vae"
        minutes = 0.1
    command = ["-m", "wan_mini.tiny.training", stage, "--minutes", f"{minutes:g}"]
    command += ["--work", str(folder / "work"), "--folder", str(folder / "checkpoint"), "--device", device]
    return [Step("train", command)]


def run_step(step: Step, folder: Path, device: str, seconds: float, rehearse: bool) -> str:
    """Run a step, and leave its log and its record; "done", "failed", "stopped" by its time, or "paused" by itself."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if rehearse:
        environment |= {"REHEARSE_GPU": "1", "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    outcome = "done"
    with (folder / f"{step.name}.log").open("w") as log:
        try:
            command = [sys.executable, *step.command]
            process = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=seconds
            )
            if process.returncode != 0:
                outcome = "failed"
        except subprocess.TimeoutExpired:
            outcome = "stopped"
    if outcome == "failed" and PAUSED in (folder / f"{step.name}.log").read_text(errors="replace"):
        outcome = "paused"
    record = {"outcome": outcome, "seconds": round(time.perf_counter() - start, 1), "command": step.command}
    record["machine"] = describe_machine(pick_device(device))
    (folder / f"{step.name}.json").write_text(json.dumps(record, indent=2) + "\n")
    return outcome


def is_done(step: Step, folder: Path) -> bool:
    """Whether an earlier call has done this step, with this very command."""
    file = folder / f"{step.name}.json"
    if not file.is_file():
        return False
    record = json.loads(file.read_text())
    return record["outcome"] == "done" and record["command"] == step.command


def run_stage(steps: list[Step], folder: Path, device: str, minutes: float, rehearse: bool) -> dict[str, str]:
    """Do what is left of a stage within its minutes; what became of each step."""
    end = time.monotonic() + 60 * minutes
    outcomes = {}
    for step in steps:
        left = end - time.monotonic()
        if is_done(step, folder):
            outcomes[step.name] = "done before"
        elif left <= 0:
            outcomes[step.name] = "left"
        else:
            outcomes[step.name] = run_step(step, folder, device, left, rehearse)
        print(f"{folder.name:6} {step.name:20} {outcomes[step.name]}", flush=True)
    return outcomes


def main(argv: list[str] | None = None) -> int:
    """Run the stages that are named, one after the other."""
    parser = Parser(prog="python -m benchmarks.gpu_day", description=str(__doc__).splitlines()[0])
    parser.add_argument("stages", nargs="+", choices=("check", "speed", "train"), metavar="check|speed|train")
    parser.add_argument("--out", type=Path, required=True, help="folder of all files; the same one goes on")
    parser.add_argument("--minutes", type=float, default=9, help="of each stage, at most (%(default)s)")
    parser.add_argument("--state", type=Path, help="train from this copy of an earlier day's train folder")
    parser.add_argument("--device", help="cuda, mps or cpu (the best there is)")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny sizes")
    args = parser.parse_args(argv)
    if args.rehearse:
        args.device = "cpu"
    try:
        device = str(pick_device(args.device))
    except ValueError as error:
        parser.error(str(error))
    out = args.out.resolve()
    outcomes: list[str] = []
    for stage in args.stages:
        folder = out / stage
        folder.mkdir(parents=True, exist_ok=True)
        if stage == "train" and args.state is not None and not (folder / "work").exists():
            shutil.copytree(args.state, folder, dirs_exist_ok=True)
            (folder / "train.json").unlink(missing_ok=True)  # that day's; this one goes on
        steps = {
            "check": check_steps(args.rehearse),
            "speed": speed_steps(args.rehearse, device),
            "train": train_steps(args.rehearse, device, folder, args.minutes),
        }[stage]
        outcomes += run_stage(steps, folder, device, args.minutes, args.rehearse).values()
    if "failed" in outcomes:
        return FAILED
    if {"left", "stopped", "paused"} & set(outcomes):
        return LEFT
    return DONE


if __name__ == "__main__":
    raise SystemExit(main())
