"""What a run writes while it goes: its record, its state, its latents; and what to do next if it stops."""

import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from wan_mini.checkpoint import read_json
from wan_mini.device.timing import StageTimer
from wan_mini.files import Unwritable
from wan_mini.pipeline import Transfer
from wan_mini.runs.cli import advise
from wan_mini.runs.folder import (
    FLOWS,
    LATENTS,
    RECORD,
    new_folder,
    remove_empty_run,
    remove_states,
    save_latents,
    states,
    write_record,
)
from wan_mini.runs.journal import Journal
from wan_mini.runs.request import Method, Request
from wan_mini.runs.settings import RUN


class RunFiles:
    """The files of one run, up to its result, in a new folder or in that of a run which is resumed.

    A run shared out over processes has one that writes. The others neither write nor read: what is in the folder may
    come from this very run.
    """

    def __init__(
        self, method: Method, request: Request, timer: StageTimer, *, resumed: bool = False, writes: bool = True
    ):
        self.method = method
        self.request = request
        self.timer = timer
        self.writes = writes
        self.folder = request.folder or Path()
        if writes and not resumed:
            self.folder = new_folder(request.folder)
        self.settings: Mapping[str, Any] = {}
        self.machine: Mapping[str, Any] = {}
        self.latents: Path | None = None  # once they are saved
        self.journals: list[Journal] = []
        self.resumed = resumed
        self.is_new = not states(self.folder)

    def begin(self, settings: Mapping[str, Any], machine: Mapping[str, Any]) -> None:
        """Write what the run is to be, from which it could begin again. Raises UserError if its state is of another."""
        self.settings = settings
        self.machine = machine
        if self.writes:
            for file in states(self.folder):
                if file.suffix == ".safetensors":
                    self.journal(file.stem)
        self._write({"status": "started", **settings, **machine})

    def journal(self, name: str) -> dict[str, Journal]:
        """The keyword for a transfer that keeps its state under this name; none if it keeps none."""
        if not (self.method.resumable and self.writes):
            return {}
        hashes = self.machine["checkpoint_sha256"]
        self.journals.append(Journal(self.folder / f"{name}.safetensors", self.settings, hashes))
        return {"journal": self.journals[-1]}

    def save(self, result: Transfer) -> None:
        """Save a result that is not decoded yet."""
        if not self.writes:
            return
        tensors = {"latents": result.latents, **dict(zip(FLOWS, result.flows, strict=True))}
        with self.timer("write"):
            self.latents = save_latents(self.folder / LATENTS, tensors, self.settings)
            self._write(self.record("started", result))

    def end(self, result: Transfer) -> None:
        """Write all costs; the states are no longer needed."""
        self._write(self.record("finished", result))
        remove_states(self.folder)

    def _write(self, record: Mapping[str, Any]) -> None:
        if self.writes:
            write_record(self.folder / RECORD, record)

    def record(self, status: str, result: Transfer) -> dict[str, Any]:
        """All that run.json tells: settings, costs so far, what the guidance did, machine and versions."""
        return {"status": status, **self.settings, **self.machine, "stages": self.timer.table, **result.report}

    def advise_next(self, error: BaseException) -> None:
        """Let the line about an error, or a stop, end with how to go on; a folder with nothing to keep is removed."""
        if not self.writes:
            return
        steps = max([journal.step for journal in self.journals], default=0)
        stopped = isinstance(error, (KeyboardInterrupt, Unwritable))
        command = f"python {self.method.prog.removeprefix('python ')}"
        resumes = states(self.folder) and (steps > 0 or stopped or not self.is_new)
        shown = list(self.folder.glob("result.*"))
        if self.latents is not None and not shown and not (resumes and isinstance(error, KeyboardInterrupt)):
            advise(error, f"the latents are safe, to decode them: {command} --decode {shlex.quote(str(self.latents))}")
        elif resumes:
            advise(error, f"to go on: {command} --resume {shlex.quote(str(self.folder))}")
        elif shown:
            advise(error, f"the result is there: {shown[0]}")
        elif not self.resumed:  # a folder that was there before is not this run's to remove
            with suppress(OSError):  # what cannot be removed must not hide the error
                remove_states(self.folder)
                remove_empty_run(self.folder)


def old_record(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """These settings, and what the record in a folder knows besides."""
    record = read_json(folder / RECORD, RUN) if (folder / RECORD).is_file() else {}
    return {**settings, **record, "status": "finished"}
