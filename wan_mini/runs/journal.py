"""What a run has reached, kept in a file, so that a run which was killed can go on: `--resume RUN`."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wan_mini.errors import UserError
from wan_mini.files import Unwritable
from wan_mini.json_file import parse_json
from wan_mini.pipeline import Guidance
from wan_mini.runs.folder import save_tensors
from wan_mini.runs.settings import STATE as SAVED_STATE
from wan_mini.scheduler import FlowEuler, FlowUniPC

STATE = "state."  # before the names of a guidance's tensors
EVERY = 60.0  # seconds between two saves; a step is never cut
OF_RUN = ("reference", "latents")  # tensors; any other is the guidance's or the sampler's
SAMPLER = "sampler."  # before the names of the sampler's tensors
PATHS = ("model", "ref")  # settings that may change: files move, their hashes tell whether they are the same


class Journal:
    """The state of one denoising run: the reference's latents, the latents, the step, guidance's and sampler's history.

    There is no random state beside: the start noise is that of the seed, and nothing else is drawn. A wan_mini.pipeline
    .Journal. A disk that is full stops no run: it is said once, and the run goes on.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        hashes: Mapping[str, str],
        *,
        every: float = EVERY,
        sampler: FlowEuler | FlowUniPC | None = None,
    ):
        """Read the state if the file is there. sampler: may have a memory. Raises UserError if it is of another run."""
        self.path = path
        self.settings = {name: value for name, value in settings.items() if name not in PATHS}
        self.hashes = hashes  # of parts that are read when they work, they come later
        self.begun_with: Mapping[str, str] = {}  # the hashes of the run that goes on
        self.every = every
        self.sampler = sampler if isinstance(sampler, FlowUniPC) else None  # Euler's steps know nothing of each other
        self.step = 0
        self.history: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        self._failed = False
        self._saved = time.monotonic()
        if path.exists():
            self._read()

    @property
    def reference(self) -> Tensor | None:
        """The reference's latents (1,16,F,h,w), once they are encoded."""
        return self.tensors.get("reference")

    def begin(self) -> None:
        """Save what the run is to be, from which it could begin again."""
        if not self.path.exists():
            self._write()

    def keep_reference(self, latents: Tensor) -> None:
        """Save the reference's latents (1,16,F,h,w), which took a stage of their own."""
        self.tensors["reference"] = latents
        self._write()

    def start(self, latents: Tensor, guidance: Guidance | None) -> tuple[int, Tensor]:
        """The step to go on with and its latents, on the device of those given, which are the start's."""
        if "latents" not in self.tensors:
            return 0, latents
        self._check_state(latents, guidance)
        memory = {}
        for name, tensor in self.tensors.items():
            here = tensor.to(latents.device)
            if name.startswith(SAMPLER):
                memory[name.removeprefix(SAMPLER)] = here
            elif name.startswith(STATE):
                guidance.state[name.removeprefix(STATE)] = here  # type: ignore[union-attr]
            elif name not in OF_RUN:
                setattr(guidance, name, here)
        for name, value in self.history.items():
            kept = getattr(guidance, name)
            if isinstance(kept, list):
                kept[:] = value  # the same list: others may append to it, too
            else:
                setattr(guidance, name, value)
        if self.sampler is not None:
            self.sampler.remember(memory)
        return self.step, self.tensors["latents"].to(latents.device)

    def _check_state(self, latents: Tensor, guidance: Guidance | None) -> None:
        """Raises UserError if the file has what a state of this run has not."""
        lasting = getattr(guidance, "history", ())
        for name, tensor in self.tensors.items():
            of_latents = name in OF_RUN or name.startswith(SAMPLER)
            known = of_latents or name in lasting or (name.startswith(STATE) and hasattr(guidance, "state"))
            if not known or (of_latents and tensor.shape != latents.shape):
                raise UserError(f"{self.path} holds {name} {tuple(tensor.shape)}, not of this run: start a new run")
        for name, value in self.history.items():
            kept_as_list = name in lasting and isinstance(getattr(guidance, name), list)
            if name not in lasting or (kept_as_list and not isinstance(value, list)):
                raise UserError(f"{self.path} holds a history {name} that is not of this run: start a new run")

    def beside(self, suffix: str) -> Path:
        """A file for what a method keeps itself: it lasts as long as the state."""
        return self.path.with_suffix(suffix)

    def keep(self, step: int, steps: int, latents: Tensor, guidance: Guidance | None) -> None:
        """Note that `step` of `steps` are done; save it once a minute, and at the end."""
        self.step = step
        self.tensors = {name: value for name, value in self.tensors.items() if name in OF_RUN}
        self.tensors["latents"] = latents
        if self.sampler is not None:
            self.tensors |= {f"{SAMPLER}{name}": tensor for name, tensor in self.sampler.memory().items()}
        self.history = {}
        for name in getattr(guidance, "history", ()):
            value = getattr(guidance, name)
            (self.tensors if isinstance(value, Tensor) else self.history)[name] = value
        for name, tensor in getattr(guidance, "state", {}).items():
            self.tensors[f"{STATE}{name}"] = tensor
        if step == steps or time.monotonic() - self._saved >= self.every:
            self._write()

    def _write(self) -> None:
        self._check_weights()
        try:
            state = {"checkpoint_sha256": self.hashes, "step": self.step, "history": self.history}
            save_tensors(self.path, self.tensors, self.settings, state=state)
        except Unwritable as error:
            if not self._failed:
                print(f"note: {error}; the run goes on, but cannot be resumed from here", file=sys.stderr)
            self._failed = True
        self._saved = time.monotonic()

    def _read(self) -> None:
        try:
            if not self.path.is_file():
                raise UserError(f"{self.path} is no regular file: remove it, and start a new run")
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata()
                state = parse_json(metadata["state"], f"{self.path}: state", SAVED_STATE)
                settings = parse_json(metadata["settings"], f"{self.path}: settings")
                for name in file.keys():  # noqa: SIM118 (the file is no dict)
                    self.tensors[name] = file.get_tensor(name)
            self.step = state["step"]
            self.history = state["history"]
            self.begun_with = state["checkpoint_sha256"]
            self._check_weights()
            self._check("settings", settings, json.loads(json.dumps(self.settings)))
        except (SafetensorError, TypeError, KeyError, ValueError) as problem:
            if isinstance(problem, UserError):
                raise
            raise UserError(f"{self.path} is no run's state ({problem}): start a new run") from None
        for name, tensor in self.tensors.items():
            if tensor.dtype != torch.float32 or not tensor.isfinite().all():
                raise UserError(f"{self.path} holds {name} of {tensor.dtype} that are no latents: start a new run")

    def _check_weights(self) -> None:
        """The weights read so far must be those that the run began with."""
        read = {name: digest for name, digest in self.hashes.items() if self.begun_with}
        self._check("checkpoint", {name: self.begun_with.get(name, "none") for name in read}, read)

    def _check(self, what: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        for name in sorted(saved.keys() | now.keys()):
            if saved.get(name) != now.get(name):
                got = f"{what} {name} was {saved.get(name)} and is {now.get(name)}"
                raise UserError(f"cannot go on with {self.path.parent}, because its {got}: put back what it began with")
