"""Nothing is lost: files whole or absent, runs killed and gone on with, full disks, folders of one run each."""

import errno
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fastvmt
from fastvmt import main
from wan_mini import files
from wan_mini.device.timing import StageTimer
from wan_mini.dit import WanDiT
from wan_mini.files import Unwritable, partial_name, write_bytes, write_whole
from wan_mini.runs import folder as folder_module
from wan_mini.runs import journal, program
from wan_mini.runs.cli import run
from wan_mini.runs.folder import load_tensors, new_folder
from wan_mini.runs.record import RunFiles
from wan_mini.runs.request import resumed_request
from wan_mini.tiny.world import make_clip
from wan_mini.vae import WanVAE
from wan_mini.video import read_video, write_video

SETS = ["height=32", "width=32", "frames=5", "steps=3", "optim_steps=2", "guidance_fraction=0.6", "window=3"]
pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and fork")


class Small:
    """The smallest run there is, without ffmpeg, its files, and what kills it."""

    def __init__(self, model: Path, base: Path):
        self.model, self.base = model, base
        self.ref = write_video(base / "ref.webp", make_clip(0).frames[:5, ::4, ::4], fps=16)
        self.count = 0

    def out(self) -> Path:
        self.count += 1
        return self.base / f"run{self.count}"

    def argv(self, out: Path, *more: str) -> list[str]:
        given = ["--model", str(self.model), "--ref", str(self.ref), "--prompt", "a ball", "--device", "cpu"]
        return [*given, "--dtype", "float32", "--set", *SETS, "--out", str(out), *more]

    def killed(self, out: Path, moment: int, *more: str) -> int:
        """Run in a process of its own that kills itself at its event of this number; how it ended."""
        process = os.fork()
        if process == 0:
            with pytest.MonkeyPatch.context() as patch:
                at_event(patch, moment, lambda: os.kill(os.getpid(), signal.SIGKILL))
                os._exit(main(self.argv(out, *more)))
        return os.waitpid(process, 0)[1]


def at_event(patch: pytest.MonkeyPatch, moment: int, act) -> list[int]:
    """Do something at an event of a run: a pass of the transformer, work of the VAE, before or after a renaming."""
    seen: list[int] = []

    def count(owner, name):
        before = getattr(owner, name)

        def counted(*args, **options):
            seen.append(1)
            if len(seen) == moment:
                act()
            return before(*args, **options)

        patch.setattr(owner, name, counted)

    for owner, name in ((WanDiT, "forward"), (WanVAE, "encode"), (WanVAE, "decode"), (files, "sync")):
        count(owner, name)
    patch.setitem(journal.Journal.__init__.__kwdefaults__, "every", 0.0)  # every step is kept
    return seen


def make_small(folder, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")  # a WebP takes less time than ffmpeg's start
        yield Small(folder, tmp_path_factory.mktemp("small"))


def make_latents(small) -> Path:
    out = small.out()
    assert main(small.argv(out)) == 0
    return out / "latents.safetensors"


small = pytest.fixture(scope="module")(make_small)
latents = pytest.fixture(scope="module")(make_latents)


@pytest.fixture(scope="module")
def whole(small) -> dict[str, bytes]:
    """The files of a run that nothing interrupts, and how many events it has under "events"."""
    out = small.out()
    with pytest.MonkeyPatch.context() as patch:
        seen = at_event(patch, -1, None)
        assert main(small.argv(out, "--unguided")) == 0
    return contents(out) | {"events": len(seen)}


def contents(out: Path) -> dict[str, bytes]:
    """What must be equal: the latents, the result, the preview, and what the guidance reports."""
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert record["status"] == "finished" and not list(out.glob("state*")) and not list(out.glob(".*"))
    kept = {name: (out / name).read_bytes() for name in ("latents.safetensors", "result.webp", "preview.webp")}
    names = ("losses", "key_gradient_norms", "gradients", "pairs", "block", "clip", "config", "seed", "unguided")
    return kept | {name: record[name] for name in names}


def goes_on(small: Small, whole: dict, moment: int) -> None:
    """Kill a run at an event, go on, and compare."""
    out = small.out()
    assert small.killed(out, moment, "--unguided") == signal.SIGKILL, f"not killed at event {moment}"
    assert main(["--resume", str(out)]) == 0
    assert contents(out) == {name: value for name, value in whole.items() if name != "events"}, f"event {moment}"


@pytest.mark.parametrize("share", [0.3, 0.55, 0.8])
def test_a_killed_run_goes_on(small, whole, share):
    goes_on(small, whole, round(share * whole["events"]))


@pytest.mark.slow
def test_a_run_killed_at_twenty_random_moments_goes_on(small, whole):
    """From the third event: before, when not even its settings are written, there is nothing to go on with."""
    for moment in random.Random(0).sample(range(3, whole["events"] + 1), 20):
        goes_on(small, whole, moment)


def test_a_resumed_run_repeats_no_step_and_no_encoding(small, whole, monkeypatch):
    out = small.out()
    small.killed(out, whole["events"] - 2, "--unguided")  # at the end: all is computed
    monkeypatch.setattr(WanVAE, "encode", lambda *_, **__: pytest.fail("encoded again"))
    monkeypatch.setattr(fastvmt, "optimize", lambda *_, **__: pytest.fail("optimized again"))
    assert main(["--resume", str(out)]) == 0


def test_every_setting_of_the_record_is_resumed(small, whole):
    out = small.out()
    small.killed(out, round(0.4 * whole["events"]))
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    settings = {"seed": 7, "prompt": "a cube", "label": "AI", "offload": "parts", "recompute": "block"}
    settings |= {"png": True, "unguided": True, "compile": True}
    (out / "run.json").write_text(json.dumps({**record, **settings, "dtype": "torch.bfloat16"}), encoding="utf-8")
    args = SimpleNamespace(resume=out, model=None, ref=None, device=None, offload="none")
    request = resumed_request(args, fastvmt.method(), ())
    assert {name: getattr(request, name) for name in settings} == settings and request.dtype == torch.bfloat16
    assert (request.folder, str(request.ref)) == (out, record["ref"]) and request.config.steps == 3


def test_a_run_that_is_still_going_is_not_resumed(small, whole, capsys):
    out = small.out()
    small.killed(out, round(0.4 * whole["events"]))
    before = {path: path.read_bytes() for path in out.iterdir()}
    with folder_module.locked(out):
        assert main(["--resume", str(out)]) == 2
    assert "is of a run that is still going" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in out.iterdir()}
    assert main(["--resume", str(out)]) == 0


def test_what_cannot_be_resumed_says_why(small, whole, capsys):
    out = small.out()
    small.killed(out, round(0.4 * whole["events"]), "--unguided")
    state = out / "state.safetensors"
    kept = state.read_bytes()
    for flags, message in (
        (["--steps", "3"], "--resume does not use --steps: leave it out"),
        (["--seed", "0"], "--resume does not use --seed: leave it out"),
        (["--ref", str(small.base / "none.webp")], "none.webp"),
    ):
        assert main(["--resume", str(out), *flags]) == 2
        assert message in capsys.readouterr().err
    other = write_video(small.base / "other.webp", make_clip(5).frames[:5, ::4, ::4], fps=16)
    assert main(["--resume", str(out), "--ref", str(other)]) == 2
    assert "cannot go on with" in (said := capsys.readouterr().err) and "ref_sha256 was" in said
    for damage in (b"", kept[:100], b"hello"):
        state.write_bytes(damage)
        assert main(["--resume", str(out)]) == 2
        assert "is no run's state" in capsys.readouterr().err
    tensors = load_file(save_bytes(state, kept))
    tensors["latents"][0] = torch.nan
    save_file(tensors, state, dict(files_metadata(kept, small.base)))
    assert main(["--resume", str(out)]) == 2
    assert "that are no latents" in capsys.readouterr().err
    save_bytes(state, kept)
    assert main(["--resume", str(out), "--model", str(small.model), "--offload"]) == 0
    assert contents(out) == {name: value for name, value in whole.items() if name != "events"}
    assert main(["--resume", str(out)]) == 0
    assert "is finished: there is nothing to do" in capsys.readouterr().out
    assert main(["--resume", str(small.base / "nowhere")]) == 2
    (out / "run.json").write_text("{}")
    assert main(["--resume", str(out)]) == 2
    assert "--resume needs a run of fastvmt.py, got" in capsys.readouterr().err


def save_bytes(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def files_metadata(data: bytes, base: Path) -> dict[str, str]:
    header = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + header])["__metadata__"]


# Full disks.


class FullDisk:
    """From the write of this number on, none into this folder succeeds."""

    def __init__(self, patch: pytest.MonkeyPatch, first: int, folder: Path):
        self.writes = 0
        sync = files.sync

        def fails(path: Path) -> None:
            if path.is_relative_to(folder) and path.is_file():
                self.writes += 1
                if self.writes >= first:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(path)

        patch.setattr(files, "sync", fails)
        patch.setitem(journal.Journal.__init__.__kwdefaults__, "every", 0.0)  # every step is kept


def test_a_full_disk_at_each_write_loses_no_run(small, whole, capsys, monkeypatch):
    """Each error is one line, and the command in it leads to the result that the run would have had."""
    lost, first, ended = [], 1, 2
    while ended != 0:
        out = small.out()
        capsys.readouterr()
        with monkeypatch.context() as patch:
            disk = FullDisk(patch, first, out)
            ended = main(small.argv(out))
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == (ended != 0) and not list(out.glob(".*")), errors
        if ended != 0 and first == 1:
            assert "No space left on device" in errors[0] and not out.exists()  # before anything was computed
        elif ended != 0:
            assert str(out) in errors[0] and "No space left on device" in errors[0]
            command = shlex.split(re.search(r"python fastvmt.py (--.*)", errors[0])[1])
            assert main(command) == 0
            result = Path(command[1]).parent if command[0] == "--decode" else out
            if (result / "result.webp").read_bytes() != whole["result.webp"]:
                lost.append(first)
        first += 1
    assert not lost and first - 1 > disk.writes > 8, (lost, first, disk.writes)


def test_a_disk_without_room_is_found_before_the_work(small, capsys, monkeypatch):
    monkeypatch.setattr(folder_module.shutil, "disk_usage", lambda path: os.terminal_size((0, 0)) and Usage())
    monkeypatch.setattr(program, "load_wan", lambda *_, **__: pytest.fail("weights were loaded"))
    out = small.out()
    assert main(small.argv(out)) == 2
    assert re.search(r"error: a run needs about 0.0 MB in .*: make room, or choose another", capsys.readouterr().err)
    assert not out.exists()


class Usage:
    free = 20000


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "new" / "file.txt"
    write_bytes(path, b"old")
    with pytest.raises(KeyError), write_whole(path) as partial:
        partial.write_bytes(b"half")
        assert partial == partial_name(path) and path.read_bytes() == b"old"
        raise KeyError
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"] and path.read_bytes() == b"old"
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()  # also latents: a colleague may read them
    with pytest.raises(Unwritable, match=r"cannot write into .*file.txt \(.*\): choose another folder"):
        write_bytes(path / "below", b"")


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_state_is_kept_once_a_minute_and_at_the_end(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(journal.time, "monotonic", lambda: now[0])
    state = journal.Journal(tmp_path / "state.safetensors", {}, {})
    kept = []
    for step in range(1, 8):
        now[0] += 25.0
        state.keep(step, 7, torch.full((1,), float(step)), None)
        kept.append(load_file(state.path)["latents"].item() if state.path.exists() else 0)
    assert kept == [0, 0, 3, 3, 3, 6, 7]


def test_another_process_of_a_run_neither_reads_nor_writes(tmp_path):
    """The state that it finds may be one that the first process has just written."""
    (tmp_path / "state.safetensors").write_bytes(b"the first step of this very run")
    method = SimpleNamespace(resumable=True, prog="fastvmt.py")
    other = RunFiles(method, SimpleNamespace(folder=tmp_path), StageTimer(torch.device("cpu")), writes=False)
    other.begin({"seed": 1}, {"checkpoint_sha256": {}})
    assert other.journal("state") == {}
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


# Folders.


@pytest.mark.parametrize("make", [lambda p: (p / "run").symlink_to(p / "gone" / "far"), lambda p: (p / "run").touch()])
def test_an_unwritable_folder_is_found_before_the_work(small, tmp_path, capsys, monkeypatch, make):
    make(tmp_path)
    monkeypatch.setattr(program, "read_reference", lambda *_: pytest.fail("the clip was read"))
    for out in (tmp_path / "run", Path("/proc/fastvmt")):
        assert main(small.argv(out)) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "choose another --out" in said


def test_no_two_runs_share_a_folder(tmp_path):
    """However many begin in one second, by name or without one."""
    taken: list[Path] = []
    refused: list[Exception] = []

    def take(out):
        try:
            taken.append(new_folder(out, tmp_path / "outputs"))
        except ValueError as error:
            refused.append(error)

    threads = [threading.Thread(target=take, args=(out,)) for out in [None] * 8 + [tmp_path / "named"] * 8]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(taken)) == len(taken) == 9 and len(refused) == 7
    assert all("already holds" in str(error) for error in refused)


def test_a_folder_that_two_runs_find_empty_is_taken_once(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(()))  # as both see it in the same moment
    assert new_folder(tmp_path / "run") == tmp_path / "run"
    with pytest.raises(ValueError, match="already holds a run or is a file: choose another --out"):
        new_folder(tmp_path / "run")


def test_files_of_others_are_left_alone(small, tmp_path, capsys):
    (tmp_path / "result.mp4").write_bytes(b"mine")
    assert main(small.argv(tmp_path)) == 2
    assert "already holds result.mp4: choose another --out" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["result.mp4"]


# Stops and logs.


@pytest.fixture
def heeded():
    """Signals as a terminal's programs get them, also where these tests run in the background or under nohup."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_every_signal_is_a_stop_that_says_how_to_go_on(small, whole, capsys, monkeypatch, heeded, number):
    out = small.out()
    with monkeypatch.context() as patch:
        at_event(patch, round(0.5 * whole["events"]), lambda: signal.raise_signal(number))
        assert main(small.argv(out, "--unguided")) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"stopped; to go on: python fastvmt.py --resume {out}"
    assert signal.getsignal(number) != signal.SIG_IGN and not list(out.glob(".*"))


@pytest.mark.parametrize("program", ["fastvmt.py", "wan_mini/generate.py", "wan_mini/verify.py"])
def test_ctrl_c_during_the_imports_says_nothing(tmp_path, heeded, program):
    """A torch that takes its time to be imported, and is interrupted."""
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    root = Path(fastvmt.__file__).parent
    command = (
        [sys.executable, program] if program == "fastvmt.py" else [sys.executable, "-m", program[:-3].replace("/", ".")]
    )
    done = subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True)
    assert done.returncode == -signal.SIGINT and done.stderr == done.stdout == b""


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        assert run(lambda argv: os.kill(os.getpid(), signal.SIGHUP)) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_log_has_one_line_a_stage(small, capsys):
    assert main(small.argv(small.out())) == 0
    lines = capsys.readouterr().err.splitlines()
    stages = [re.fullmatch(r" +\d+\.\d s  (\w+)", line)[1] for line in lines]
    assert stages == ["text", "encode", "move", "guide", "denoise", "flows", "decode"]


BROKEN = """
import os, sys
from pathlib import Path
from wan_mini.runs.cli import run

def main(argv):
    for number in range(3000):  # more than any buffer holds
        print("a line of a run that talks", number)
        print("and of its log", file=sys.stderr)
    Path(sys.argv[1]).write_text("whole")

raise SystemExit(run(main, []))
"""


@pytest.mark.parametrize("tail", ["| head -1", "2>&1 | head -1", ">&- 2>&-", ">/dev/full"])
def test_a_log_that_nobody_reads_stops_no_run(tmp_path, tail):
    """A reader that leaves, a stream that is closed, a full disk."""
    command = f'"{sys.executable}" program.py result {tail}; echo "${{PIPESTATUS[0]}}" >status'
    (tmp_path / "program.py").write_text(BROKEN)
    root = str(Path(fastvmt.__file__).parent)
    env = {**os.environ, "PATH": os.defpath, "PYTHONPATH": root}  # the small run of this file empties PATH
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (tmp_path / "result").read_text() == "whole" and (tmp_path / "status").read_text() == "0\n"
    assert "Error" not in done.stdout + done.stderr


# --decode.


def test_decode_takes_what_applies(small, latents, tmp_path, monkeypatch, capsys):
    """A tile, another model folder, another place; without the reference, the result alone."""
    seen = {}
    decode = WanVAE.decode
    monkeypatch.setattr(WanVAE, "decode", lambda self, x, **o: seen.update(o) or decode(self, x, **o))
    moved = tmp_path / "moved"
    moved.symlink_to(small.model)
    tensors, settings = load_tensors(latents)
    lonely = tmp_path / "latents.safetensors"
    save_file(tensors, lonely, {"settings": json.dumps(settings | {"ref": "/gone.webp", "model": "/gone"})})
    out = tmp_path / "out"
    command = ["--decode", str(lonely), "--model", str(moved), "--set", "vae_tile=32", "--out", str(out)]
    assert main(command) == 0 and seen["tile"] == 32
    assert "gone.webp cannot be read" in capsys.readouterr().out
    assert read_video(out / "preview.webp").shape[2] == 32 and (out / "result.webp").exists()
    assert main([*command[:-1], str(tmp_path / "both"), "--ref", str(small.ref)]) == 0
    assert read_video(tmp_path / "both" / "preview.webp").shape[2] == 64
    for name in ("result.webp", "preview.webp"):
        assert (latents.parent / name).exists()
    assert main(["--decode", str(latents)]) == 2  # beside a result: nothing is overwritten
    assert "already holds result.webp: choose another folder with --out" in capsys.readouterr().err
    assert main([*command[:-1], str(tmp_path / "wrong"), "--ref", str(out / "result.webp")]) == 2
    assert "--ref" in capsys.readouterr().err and not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--frames", "9"], "--decode does not use --frames"),
        (["--seed", "0", "--prompt", "x"], "--decode does not use --prompt, --seed"),
        (["--set", "steps=9"], "--decode takes --set vae_tile=PIXELS only, got steps"),
        (["--set", "vae_tile=banana"], "--set vae_tile needs a value like"),
        (["--resume", "."], "--decode does not use --resume"),
        (["--dry-run"], "--decode does not use --dry-run"),
    ],
)
def test_decode_refuses_what_does_not_apply(latents, tmp_path, capsys, flags, message):
    assert main(["--decode", str(latents), "--out", str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda t, s: s.pop("clip") and s.pop("program"),
        lambda t, s: s["clip"].update(height="tall"),
        lambda t, s: s["clip"].update(frames=9),
        lambda t, s: s.update(dtype=None),
        lambda t, s: s.update(config=[]),
        lambda t, s: s["config"].update(vae_tile="x"),
        lambda t, s: t.update(latents=t["latents"] * torch.nan),
        lambda t, s: t.update(latents=t["latents"][:, :, :1]),
        lambda t, s: t.update(flow_result=t["flow_result"][:, :1]),
        lambda t, s: t.pop("latents"),
        lambda t, s: s["config"].update(vae_tile=0),
        lambda t, s: s.update(clip=[1]),
        lambda t, s: s.update(clip={**s["clip"], "fps": 0}),
        lambda t, s: s.update(deep=json.loads("[" * 900 + "]" * 900)),
    ],
)
def test_damaged_latents_are_one_line(latents, tmp_path, capsys, change):
    tensors, settings = load_tensors(latents)
    change(tensors, settings)
    damaged = tmp_path / "damaged.safetensors"
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, damaged, {"settings": json.dumps(settings)})
    assert main(["--decode", str(damaged), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "damaged.safetensors" in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_everything_says_that_it_is_generated(latents):
    _, settings = load_tensors(latents)
    assert settings["ai_generated"] is True
    assert json.loads((latents.parent / "run.json").read_text(encoding="utf-8"))["ai_generated"] is True


def test_names_that_are_no_text_stop_no_run(small):
    """A clip whose name is not UTF-8, and a prompt."""
    ref = small.base / os.fsdecode(b"caf\xe9.webp")
    ref.write_bytes(small.ref.read_bytes())
    out = small.out()
    argv = small.argv(out)
    argv[argv.index(str(small.ref))] = str(ref)
    argv[argv.index("a ball")] = os.fsdecode(b"a caf\xe9")
    assert main(argv) == 0 and json.loads((out / "run.json").read_text(encoding="utf-8"))["status"] == "finished"


@pytest.mark.slow
def test_a_real_process_is_killed_and_goes_on(small, whole):
    """kill -9 from outside, once its state is there."""
    out = small.out()
    command = [sys.executable, fastvmt.__file__, *small.argv(out, "--unguided")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.endswith("guide\n"):
            break
    process.kill()
    process.communicate()
    assert (out / "state.safetensors").exists()
    assert main(["--resume", str(out)]) == 0
    assert contents(out)["latents.safetensors"] == whole["latents.safetensors"]
    assert np.array_equal(read_video(out / "result.webp").shape, (5, 32, 32, 3))
