"""Runs of the peers that are killed go on to the same bytes: guided steps, training, and the sampling behind it."""

import json
import os
import signal
from functools import cache
from pathlib import Path

import pytest
from safetensors import safe_open
from test_lasting import at_event
from test_wiring import as_text

from wan_mini.peers import fit, followyourmotion, training_free
from wan_mini.peers.__main__ import main
from wan_mini.peers.fit import Fit
from wan_mini.runs.folder import states
from wan_mini.tiny.world import make_clip
from wan_mini.vae import WanVAE
from wan_mini.video import write_video

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and fork")
SAMPLING = {"height": 32, "width": 32, "frames": 9, "steps": 3}
GUIDANCE = {"guidance_fraction": 0.6, "optim_steps": 2, "lr": (0.1, 0.1)}
TRAINING = {"fit_steps": (1, 2), "fit_lr": (0.05, 0.05), "rank": 2}
# method, its options, flags that take the name of a file or nothing
CASES: dict[str, tuple[dict, list[str]]] = {
    "ditflow": (GUIDANCE, []),
    "moft": (GUIDANCE, []),
    "motionclone": (GUIDANCE | {"update": "score"}, ["--unguided"]),
    "flowmotion": (GUIDANCE, []),
    "fym": (TRAINING | {"stride": 2, "ratio": 1.0, "strengths": (0.0, 0.9)}, ["--check", "--save"]),
    "det": (TRAINING, []),
}


class Small:
    """Small runs of every case, whole or killed."""

    def __init__(self, model: Path, base: Path):
        self.model, self.base = model, base
        self.ref = write_video(base / "ref.webp", make_clip(0).frames[:9, ::4, ::4], fps=16)
        self.whole = cache(self._whole)

    def argv(self, name: str, out: Path) -> list[str]:
        options, flags = CASES[name]
        given = ["--method", name, "--model", str(self.model), "--ref", str(self.ref), "--prompt", "a ball"]
        given += ["--device", "cpu", "--dtype", "float32", "--out", str(out), *flags]
        given += [str(self.adapters(name))] if "--save" in flags else []
        given += [] if name in training_free.PEERS else ["--ref-prompt", "a cube"]
        return [*given, "--set", *(f"{key}={as_text(value)}" for key, value in (SAMPLING | options).items())]

    def adapters(self, name: str) -> Path:
        return self.base / f"{name}.safetensors"

    def _whole(self, name: str) -> tuple[int, dict[str, bytes]]:
        """How many events a run has that nothing interrupts, and what it leaves."""
        with pytest.MonkeyPatch.context() as patch:
            seen = at_event(patch, -1, None)
            patch.setattr(fit, "SAVE_EVERY", 0.0)
            assert main(self.argv(name, self.base / name)) == 0
        return len(seen), self.contents(name, self.base / name)

    def killed(self, name: str, out: Path, moment: int) -> int:
        """Run in a process of its own that kills itself at its event of this number; how it ended."""
        process = os.fork()
        if process == 0:
            with pytest.MonkeyPatch.context() as patch:
                at_event(patch, moment, lambda: os.kill(os.getpid(), signal.SIGKILL))
                patch.setattr(fit, "SAVE_EVERY", 0.0)
                os._exit(main(self.argv(name, out)))
        return os.waitpid(process, 0)[1]

    def contents(self, name: str, out: Path) -> dict[str, bytes]:
        """What must be equal: all files but for times, and the adapters, which are taken away."""
        record = json.loads((out / "run.json").read_text(encoding="utf-8"))
        assert record.pop("status") == "finished" and not states(out) and not list(out.glob(".*"))
        del record["stages"]
        kept = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix in (".safetensors", ".webp")}
        file = self.adapters(name)
        if "--save" in CASES[name][1]:
            assert [path.name for path in self.base.glob(f"*{file.name}*")] == [file.name]  # no state beside it
            with safe_open(file, framework="pt") as adapters:  # the order of its metadata is random
                kept["adapters"] = {key: adapters.get_tensor(key).tolist() for key in sorted(adapters.keys())}
                kept["adapters"] |= adapters.metadata()
            file.unlink()
        return kept | {"record": record}


def same(got: dict, whole: dict) -> None:
    """What run.json says, and then the bytes of every file."""
    assert got["record"] == whole["record"]
    assert [name for name in whole if got.get(name) != whole[name]] == [] and got.keys() == whole.keys()


@pytest.fixture(scope="module")
def small(folder, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")  # a WebP takes less time than ffmpeg's start
        yield Small(folder, tmp_path_factory.mktemp("resumed"))


MOMENTS = {"ditflow": [0.5], "moft": [0.7], "motionclone": [0.3, 0.6], "flowmotion": [0.6]}
MOMENTS |= {"fym": [0.3, 0.6, 0.9], "det": [0.6]}
SHARES = [(name, share) for name in CASES for share in MOMENTS[name]]


@pytest.mark.parametrize(("name", "share"), SHARES)
def test_a_killed_run_goes_on_to_the_same_bytes(small, tmp_path, monkeypatch, name, share):
    events, whole = small.whole(name)
    out = tmp_path / "run"
    assert small.killed(name, out, round(share * events)) == signal.SIGKILL
    if share > 0.5:  # once the training has begun, heads keep their labels
        monkeypatch.setattr(followyourmotion, "label_heads", lambda *_: pytest.fail("labeled again"))
    assert main(["--resume", str(out)]) == 0
    same(small.contents(name, out), whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_run_killed_at_every_tenth_event_goes_on(small, tmp_path, name):
    events, whole = small.whole(name)
    for moment in range(3, events + 1, 10):  # before the third there is nothing to go on with
        out = tmp_path / f"run{moment}"
        assert small.killed(name, out, moment) == signal.SIGKILL
        assert main(["--resume", str(out)]) == 0
        same(small.contents(name, out), whole)


def test_nothing_is_trained_or_encoded_again(small, tmp_path, monkeypatch):
    """What a run has done before it was killed, in its last event."""
    events, whole = small.whole("det")
    out = tmp_path / "run"
    assert small.killed("det", out, events - 3) == signal.SIGKILL
    assert {path.suffix for path in states(out)} == {".safetensors", ".fit"}
    monkeypatch.setattr(Fit, "update", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(WanVAE, "encode", lambda *_, **__: pytest.fail("encoded again"))
    assert main(["--resume", str(out)]) == 0
    same(small.contents("det", out), whole)


def test_what_a_stopped_training_says(small, tmp_path, capsys, monkeypatch):
    """Ctrl-C in a training: the command in the message leads on. It names the program once."""
    out = tmp_path / "run"
    update = Fit.update

    def stopped(self, *arguments):
        if self.step == 1:
            raise KeyboardInterrupt
        update(self, *arguments)

    monkeypatch.setattr(fit, "SAVE_EVERY", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(Fit, "update", stopped)
        assert main(small.argv("det", out)) == 130
    assert f"to go on: python -m wan_mini.peers --resume {out}" in capsys.readouterr().err
    assert main(["--resume", str(out), "--method", "det"]) == 2
    assert "--resume does not use --method: leave it out" in capsys.readouterr().err
    assert main(["--resume", str(out)]) == 0
    same(small.contents("det", out), small.whole("det")[1])
    assert main(["--resume", str(out)]) == 0
    assert "is finished: there is nothing to do" in capsys.readouterr().out
    (out / "run.json").write_text('{"method": "other"}')
    assert main(["--resume", str(out)]) == 2
    assert "--resume needs a run of one of fym, " in capsys.readouterr().err
