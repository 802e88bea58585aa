"""Plain generation goes on after a kill: the same bytes as a run that nothing interrupts, with either sampler."""

import json
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_lasting import FullDisk, at_event

from wan_mini import generate
from wan_mini.runs.cli import run
from wan_mini.runs.folder import load_tensors, locked
from wan_mini.runs.reserved import lock_file
from wan_mini.scheduler import FlowUniPC

SMALL = ["--height", "32", "--width", "48", "--frames", "5", "--steps", "5", "--seed", "3", "--key", "studio"]
SMALL += ["--device", "cpu", "--dtype", "float32"]
pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and fork")


class Runs:
    """The smallest run of one sampler, its files, and what kills it."""

    def __init__(self, model: Path, base: Path, sampler: str):
        self.model, self.base, self.sampler = ["--model", str(model)], base, sampler
        self.count = 0

    def out(self) -> Path:
        self.count += 1
        return self.base / f"{self.sampler}{self.count}" / "clip.webp"

    def argv(self, out: Path) -> list[str]:
        given = [*self.model, "--prompt", "a ball", "--negative", "no", "--sampler", self.sampler]
        return [*given, *SMALL, "--out", str(out)]

    def resume(self, out: Path, *more: str) -> int:
        return run(generate.program, [*self.model, "--resume", str(out), *more])

    def killed(self, out: Path, moment: int) -> int:
        """Run in a process of its own that kills itself at its event of this number; how it ended."""
        process = os.fork()
        if process == 0:
            with pytest.MonkeyPatch.context() as patch:
                at_event(patch, moment, lambda: os.kill(os.getpid(), signal.SIGKILL))
                os._exit(run(generate.program, self.argv(out)))
        return os.waitpid(process, 0)[1]


def contents(out: Path) -> dict[str, bytes]:
    """All that a run leaves, but for the page, which tells seconds."""
    files = {path.name: path.read_bytes() for path in out.parent.iterdir()}
    assert files.pop("clip.html") and set(files) == {"clip.webp", "clip.safetensors"}
    return files


@pytest.fixture(scope="module", params=["unipc", "euler"])
def runs(request, folder, tmp_path_factory):
    return Runs(folder, tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def whole(runs) -> dict:
    out = runs.out()
    with pytest.MonkeyPatch.context() as patch:
        seen = at_event(patch, -1, None)
        assert run(generate.program, runs.argv(out)) == 0
    return {"files": contents(out), "events": len(seen)}


def goes_on(runs: Runs, whole: dict, moment: int) -> None:
    out = runs.out()
    assert runs.killed(out, moment) == signal.SIGKILL, f"not killed at event {moment}"
    assert runs.resume(out) == 0
    assert contents(out) == whole["files"], f"event {moment}"


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_killed_generation_goes_on(runs, whole, share):
    goes_on(runs, whole, round(share * whole["events"]))


@pytest.mark.slow
def test_generation_killed_at_every_moment_goes_on(runs, whole):
    """From the third event: then its state is there, with which it begins."""
    moments = range(3, whole["events"] + 1)
    for moment in random.Random(0).sample(moments, min(20, len(moments))):
        goes_on(runs, whole, moment)


def test_no_step_is_computed_again(runs, whole, monkeypatch):
    """All steps but the last are done; the sampler knows what came before."""
    out = runs.out()
    runs.killed(out, round(0.7 * whole["events"]))
    kept = load_file(out.with_suffix(".state.safetensors"))
    assert {"latents"} | ({"sampler.start", "sampler.clean0"} if runs.sampler == "unipc" else set()) <= set(kept)
    with monkeypatch.context() as patch:
        seen = at_event(patch, -1, None)
        assert runs.resume(out) == 0
    assert len(seen) < 0.75 * whole["events"] and contents(out) == whole["files"]


def test_a_stop_says_how_to_go_on(runs, whole, capsys, monkeypatch):
    out = runs.out()
    with monkeypatch.context() as patch:
        at_event(patch, round(0.6 * whole["events"]), lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(generate.program, runs.argv(out)) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"stopped; to go on: python -m wan_mini.generate {' '.join(runs.model)} --resume {out}"
    assert [path.name for path in out.parent.iterdir()] == ["clip.state.safetensors"]
    assert run(generate.program, runs.argv(out)) == 2  # nor does a new run take its name
    assert "clip.state.safetensors exists already: choose another --out" in capsys.readouterr().err
    assert runs.resume(out) == 0 and contents(out) == whole["files"]


def test_what_cannot_go_on_says_why(runs, whole, capsys):
    out = runs.out()
    assert runs.resume(out) == 2
    assert "--resume needs the --out of a run that was stopped" in capsys.readouterr().err
    runs.killed(out, round(0.6 * whole["events"]))
    state = out.with_suffix(".state.safetensors")
    good = state.read_bytes()
    assert runs.resume(out, "--seed", "3") == 2
    assert "--resume does not use --seed: leave it out" in capsys.readouterr().err
    assert run(generate.program, [*runs.model, "--resume", str(out), "--prompt", "a"]) == 2
    assert "give either --prompt or --decode, or --resume" in capsys.readouterr().err
    lock_file(out).touch()
    with locked(lock_file(out)):
        assert runs.resume(out) == 2
    assert "is of a run that is still going" in capsys.readouterr().err
    tensors, settings = load_tensors(state)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # not mapped: the file is written over
    for content, message in (
        (b"hello", "holds no run's latents"),
        (settings | {"program": "fastvmt.py"}, "is of fastvmt.py: start a new run"),
        (settings | {"steps": "many"}, "steps needs a value like"),
        (settings | {"seed": "x"}, "seed must be a whole number"),
        ({"program": "-m wan_mini.generate"}, "is no run's state"),
    ):
        if isinstance(content, bytes):
            state.write_bytes(content)
        else:
            save_file(tensors, state, {"settings": json.dumps(content), "step": "1", "history": "{}"})
        assert runs.resume(out) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
    state.write_bytes(good)
    assert runs.resume(out) == 0 and contents(out) == whole["files"]


@pytest.mark.parametrize("runs", ["unipc"], indirect=True)
def test_a_full_disk_at_each_write_loses_no_generation(runs, whole, capsys, monkeypatch):
    """Each error is one line; what it names leads to the video that the run would have had."""
    first, ended = 1, 2
    while ended != 0:
        out = runs.out()
        capsys.readouterr()
        with monkeypatch.context() as patch:
            disk = FullDisk(patch, first, out.parent)
            ended = run(generate.program, runs.argv(out))
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == (ended != 0) and not list(out.parent.glob(".*"))
        if ended != 0:
            assert "No space left on device" in errors[0]
            words = errors[0].split("python -m wan_mini.generate ")[1].split()
            words[words.index("VIDEO") if "VIDEO" in words else -1] = str(out.with_name("again.webp"))
            assert run(generate.program, words) == 0
            assert out.with_name("again.webp").read_bytes() == whole["files"]["clip.webp"]
        first += 1
    assert first - 1 > disk.writes >= 3


def test_the_memory_of_unipc_is_all_that_a_step_needs():
    velocities, latents = torch.randn(6, 1, 16, 2, 3, 4), torch.randn(1, 16, 2, 3, 4)
    one = FlowUniPC(6, 5.0)
    for step in range(6):
        other = FlowUniPC(6, 5.0)
        if step > 0:
            other.remember(one.memory())
        expected = one.step(step, latents, velocities[step])
        assert torch.equal(other.step(step, latents, velocities[step]), expected)
        latents = expected
