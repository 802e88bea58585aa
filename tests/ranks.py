"""A program in several processes of this machine, as torchrun starts them."""

import os
import signal
import socket
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from fastvmt import main


def run_ranks(
    count: int, argv: list[str], log: Path, program: Callable[[list[str]], int] = main
) -> tuple[list[int], list[str]]:
    """Exit codes of a program in as many processes as torchrun would start, and what each prints, by rank."""
    if os.name != "posix":
        pytest.skip("signals and fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        child = os.fork()  # torch need not be imported again
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            end_with(program, argv, log.with_suffix(f".{rank}"))
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return codes, [log.with_suffix(f".{rank}").read_text() for rank in range(count)]


def end_with(program: Callable[[list[str]], int], argv: list[str], log: Path) -> None:
    """Run a program and end this process with its exit code; after two minutes by an alarm."""
    signal.alarm(60)
    code = 70
    try:
        with log.open("w") as printed, redirect_stdout(printed), redirect_stderr(printed):
            try:
                code = program(argv)
            except SystemExit as end:
                code = end.code
            except Exception:  # noqa: BLE001 (whatever it is, into the log with it)
                traceback.print_exc()
    finally:
        os._exit(code)
