"""Every flag and every field of a config: what it must reach, and what it must change there.

Each case is a run of the command line beside plain loops (by_hand.py) with the same value, and beside a run without it.
"""

import hashlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import by_hand
import numpy as np
import pytest
import torch
from conftest import random_checkpoint
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import fastvmt
import wan_mini.transfer as transfer_module
from fastvmt import MotionConfig, main, transfer
from wan_mini import generate as generate_module
from wan_mini import hashes, load
from wan_mini.config import ClipConfig
from wan_mini.device import memory
from wan_mini.device.memory import MemoryPlan, estimate, gradient_bytes, strategies
from wan_mini.device.peak import peak_bytes
from wan_mini.device.timing import StageTimer
from wan_mini.errors import UserError
from wan_mini.generate import GenerateConfig
from wan_mini.generate import program as generate_program
from wan_mini.load import Wan, build_from_folder, load_wan
from wan_mini.lora_files import LoraFile
from wan_mini.noise import start_noise
from wan_mini.pipeline import SamplingConfig, decode
from wan_mini.prompts import NEGATIVE
from wan_mini.runs import program as program_module
from wan_mini.runs.cli import run, with_options
from wan_mini.runs.label import with_label
from wan_mini.runs.preview import side_by_side, with_arrows
from wan_mini.runs.request import load_preset
from wan_mini.tiny.demo import CHECKPOINT
from wan_mini.tiny.world import make_clip
from wan_mini.vae import WanVAE
from wan_mini.video import read_video, write_video

CPU = torch.device("cpu")
PROMPT, SEED = "a ball", 3
# What every run of fastvmt below sets, one gradient step of two; small and quick.
CLIP = {"height": 64, "width": 96, "frames": 9}
MOTION = {"steps": 2, "shift": 3.0, "guidance_fraction": 0.5, "optim_steps": 4, "negative": "a dog"}
MOTION |= {"tau": 3.0, "tile": (2, 3), "window": 3, "lr": (0.02, 0.005)}
BASE = CLIP | MOTION


STAGES = {"plan", "read", "load", "text", "encode", "move", "guide", "denoise", "flows", "decode", "write"}
# Flags, and where and in which dtype the model is then loaded, on a machine with a GPU and a CPU without bfloat16.
LOADED = [
    ([], "cuda", torch.bfloat16),
    (["--device", "cuda"], "cuda", torch.bfloat16),
    (["--device", "cpu"], "cpu", torch.float32),
    (["--device", "cuda", "--offload"], "cpu", torch.bfloat16),  # weights wait in the host's memory
    (["--device", "cuda", "--dtype", "float32"], "cuda", torch.float32),
]


def as_text(value: Any) -> str:
    """A value as --set takes it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of ClipConfig, and those of MotionConfig."""
    names = {field.name for field in fields(ClipConfig)}
    of_clip = {name: value for name, value in options.items() if name in names}
    return of_clip, {name: value for name, value in options.items() if name not in names}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass
class Run:
    """A run's folder and what its files hold."""

    folder: Path
    record: dict[str, Any]
    latents: torch.Tensor
    flows: dict[str, torch.Tensor]
    settings: dict[str, Any]  # of the latents' file

    @classmethod
    def read(cls, folder: Path) -> "Run":
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        with safe_open(folder / "latents.safetensors", framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (the file is no dict)
            settings = json.loads(file.metadata()["settings"])
        return cls(folder, record, tensors.pop("latents"), tensors, settings)


class Program:
    """fastvmt.py on the small checkpoint and a reference of 18 frames."""

    def __init__(self, model: Path, wan: Wan, place: Path):
        self.model, self.wan, self.place, self.count = model, wan, place, 0
        self.ref = write_video(place / "ref.webp", make_clip(0).frames[:18, ::2, ::2], fps=16)

    def argv(self, *flags: str, without: tuple[str, ...] = (), drop: tuple[str, ...] = (), **sets: Any) -> list[str]:
        options = {name: value for name, value in (BASE | sets).items() if name not in without}
        given = {"--model": self.model, "--ref": self.ref, "--prompt": PROMPT, "--seed": SEED}
        given |= {"--device": "cpu", "--dtype": "float32"}
        argv = [word for name, value in given.items() if name not in flags + drop for word in (name, str(value))]
        return [*argv, "--set", *(f"{name}={as_text(value)}" for name, value in options.items()), *flags]

    def run(self, *flags: str, without: tuple[str, ...] = (), **sets: Any) -> Run:
        self.count += 1
        folder = self.place / f"run{self.count}"
        assert main([*self.argv(*flags, without=without, **sets), "--out", str(folder)]) == 0
        return Run.read(folder)

    def by_hand(self, *, wan: Wan | None = None, prompt: str = PROMPT, seed: int = SEED, ref=None, **changes: Any):
        """Latents, losses, frames."""
        of_clip, of_motion = split(BASE | changes)
        clip = ClipConfig(**of_clip)
        frames = read_video(ref or self.ref, size=(clip.height, clip.width), frames=clip.frames, fps=clip.fps)
        return by_hand.transfer(wan or self.wan, frames, prompt, MotionConfig(**of_motion), seed=seed)


@pytest.fixture(scope="module")
def program(folder, wan, tmp_path_factory) -> Program:
    return Program(folder, wan, tmp_path_factory.mktemp("wiring"))


@pytest.fixture(scope="module")
def base(program) -> Run:
    return program.run()


def same(run: Run, expected: tuple) -> None:
    """The run's latents and losses are those of the loops, to the bit."""
    latents, losses, _ = expected
    assert torch.equal(run.latents, latents)
    assert run.record["losses"] == losses


def differs(run: Run, base: Run) -> None:
    """The latents are not those of the run without the flag."""
    assert run.latents.shape != base.latents.shape or (run.latents - base.latents).abs().max() > 1e-4


# Fields of ClipConfig, SamplingConfig and MotionConfig, each with another value than BASE's.

FIELDS = {"height": 32, "width": 64, "frames": 5, "fps": 8.0}
FIELDS |= {"steps": 3, "shift": 5.0, "cfg": 2.0, "negative": "a cube", "strength": 0.7, "vae_tile": 32}
FIELDS |= {"amf": "dense", "guidance_fraction": 1.0, "optim_steps": 7, "interval": 1, "lr": (0.01, 0.03), "block": 4}
FIELDS |= {"tau": 1.0, "tile": (1, 2), "window": 2, "span": 1, "alpha": 0.9, "weights": (0.1, 3.0)}
FIELDS |= {"window_anchor": "self", "reference": "clean", "centroid": "soft", "key": "studio"}

# Fields of SavingsConfig, beside a run of four guided steps; the loops know none of them, test_savings.py does.
SAVINGS = {"cfg_interval": (0.0, 0.8), "cache": 2.0, "guide_every": 3, "gradient_every": 2, "anchor_every": 2}
SAVINGS |= {"frames_every": 2, "tokens_every": 2, "stop_loss": 1.0}
FOUR = {"steps": 4, "guidance_fraction": 1.0, "interval": 2}


def test_every_field_has_a_case():
    names = [f.name for config in (ClipConfig, SamplingConfig, MotionConfig) for f in fields(config)]
    assert FIELDS.keys() | SAVINGS.keys() == set(names) and not FIELDS.keys() & SAVINGS.keys()
    assert {f.name for f in fields(SamplingConfig)} < {f.name for f in fields(MotionConfig)}


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_reaches_the_run(program, base, name, monkeypatch):
    value = FIELDS[name]
    got = program.run(**{name: value})
    recorded = list(value) if isinstance(value, tuple) else value
    for part, before in (("clip", base.record["clip"]), ("config", base.record["config"])):
        change = {name: recorded} if name in before else {}
        assert got.record[part] == before | change == got.settings[part]
    if name == "vae_tile":  # the loops know no tiles: encode does it for them
        monkeypatch.setattr(program.wan.vae, "encode", lambda x: WanVAE.encode(program.wan.vae, x, tile=value))
    if name == "key":  # nor keys: they get this noise from torch
        monkeypatch.setattr(torch, "randn", lambda shape, **_: start_noise(shape, SEED, "studio", "custom"))
    same(got, program.by_hand(**{name: value}))
    differs(got, base)


@pytest.fixture(scope="module")
def four(program) -> Run:
    return program.run(**FOUR)


@pytest.mark.parametrize("name", SAVINGS)
def test_a_saving_reaches_the_run(program, four, name):
    value = SAVINGS[name]
    got = program.run(**FOUR, **{name: value})
    recorded = list(value) if isinstance(value, tuple) else value
    assert got.record["config"] == four.record["config"] | {name: recorded} == got.settings["config"]
    differs(got, four)
    flops = [sum(run.record["flops"].values()) for run in (got, four)]
    assert flops[0] < flops[1]


def test_the_second_and_third_choices_reach_the_run(program, base):
    for changes in ({"amf": "none"}, {"window_anchor": "noised"}):
        got = program.run(**changes)
        differs(got, base)
        same(got, program.by_hand(**({"guidance_fraction": 0.0} if "amf" in changes else changes)))
    assert got.record["losses"] and not program.run(amf="none").record["losses"]


def test_tiles_are_decoded_too(program):
    got = program.run(vae_tile=32, amf="none")
    shown = read_video(next(got.folder.glob("result.*")))
    tiled, whole = (decode(program.wan.vae, got.latents, tile=tile) for tile in (32, None))
    near, far = (np.abs(shown.astype(float) - frames).mean() for frames in (tiled, whole))
    assert near < far


@pytest.mark.parametrize("fps", [8.0, 16.0])
def test_the_rate_is_that_of_what_is_written(program, fps):
    preview = Image.open(program.run(fps=fps).folder / "preview.webp")
    preview.load()
    assert preview.info["duration"] == pytest.approx(1000 / fps, abs=1)


# Flags of fastvmt.py. Each check gets the program, the run without the flag, and pytest's monkeypatch, capsys.

Check = Callable[[Program, Run, pytest.MonkeyPatch, pytest.CaptureFixture], None]
FLAGS: dict[str, Check] = {}


def flag(name: str) -> Callable[[Check], Check]:
    """Enter a check into the table."""

    def enter(check: Check) -> Check:
        FLAGS[name] = check
        return check

    return enter


def named_in_help(show: Callable[[list[str]], Any], capsys) -> set[str]:
    """The flags that --help lists."""
    with pytest.raises(SystemExit):
        show(["--help"])
    return set(re.findall(r"^ +(?:-\w, )?(--[a-z][a-z-]*)", capsys.readouterr().out, re.M)) - {"--help"}


def test_every_flag_has_a_case(capsys):
    assert FLAGS.keys() == named_in_help(main, capsys)


@flag("--model")
def _(program, base, monkeypatch, capsys):
    other = random_checkpoint(program.place / "other", seed=1)
    got = program.run("--model", str(other))
    wan = load_wan(other, device="cpu", dtype=torch.float32)
    same(got, program.by_hand(wan=wan))
    differs(got, base)
    assert got.record["model"] == str(other.resolve()) == got.settings["model"]
    assert base.record["model"] == str(program.model.resolve())


def write_lora(program: Any, name: str) -> Path:
    """A LoRA for one matrix of the small checkpoint."""
    q = program.wan.dit.blocks[1].self_attn.q.weight
    parts = {"lora_A": torch.randn(2, q.shape[1]), "lora_B": torch.randn(q.shape[0], 2)}
    file = program.place / name
    save_file({f"diffusion_model.blocks.1.self_attn.q.{part}.weight": t for part, t in parts.items()}, file)
    return file


@flag("--lora")
def _(program, base, monkeypatch, capsys):
    """As a model with both files merged by hand; the record names and hashes them, and a 4-step LoRA gets a note."""
    files = [write_lora(program, "style.safetensors"), write_lora(program, "x_4steps.safetensors")]
    got = program.run("--lora", str(files[0]), "--lora", f"{files[1]}:0.5")
    loras = [LoraFile(files[0]), LoraFile(files[1], 0.5)]
    same(got, program.by_hand(wan=load_wan(program.model, device="cpu", dtype=torch.float32, loras=loras)))
    differs(got, base)
    assert got.record["loras"] == [f"{files[0]}:1.0", f"{files[1]}:0.5"] and base.record["loras"] == []
    label = json.loads(Image.open(got.folder / "preview.webp").getexif()[0x010E])
    assert label["loras"] == ["style.safetensors:1.0", "x_4steps.safetensors:0.5"]
    hashes = {f"lora {number}: {file.name}": sha256(file) for number, file in enumerate(files, start=1)}
    assert got.record["checkpoint_sha256"] == base.record["checkpoint_sha256"] | hashes
    notes = [line for line in capsys.readouterr().out.splitlines() if "distilled" in line]
    assert len(notes) == 1 and notes[0].startswith("note: x_4steps.safetensors seems to be distilled")


@flag("--ref")
def _(program, base, monkeypatch, capsys):
    other = write_video(program.place / "other.webp", make_clip(5).frames[:9, ::2, ::2], fps=16)
    got = program.run("--ref", str(other))
    same(got, program.by_hand(ref=other))
    differs(got, base)
    clip = read_video(other, size=(64, 96), frames=9, fps=16)
    assert got.record["ref"] == str(other.resolve())
    assert got.record["ref_sha256"] == hashlib.sha256(clip.tobytes()).hexdigest() != base.record["ref_sha256"]


@flag("--prompt")
def _(program, base, monkeypatch, capsys):
    got = program.run("--prompt", "a red fox")
    same(got, program.by_hand(prompt="a red fox"))
    differs(got, base)
    assert (got.record["prompt"], base.record["prompt"]) == ("a red fox", PROMPT)


@flag("--seed")
def _(program, base, monkeypatch, capsys):
    got = program.run("--seed", "11")
    same(got, program.by_hand(seed=11))
    differs(got, base)
    assert (got.record["seed"], base.record["seed"]) == (11, SEED)


@flag("--dtype")
def _(program, base, monkeypatch, capsys):
    got = program.run("--dtype", "bfloat16")
    same(got, program.by_hand(wan=load_wan(program.model, device="cpu", dtype=torch.bfloat16)))
    differs(got, base)
    assert (got.record["dtype"], base.record["dtype"]) == ("torch.bfloat16", "torch.float32")


def option_flag(name: str, words: list[str], **value: Any) -> None:
    """A flag that sets a field: the same as --set, and as the loops."""

    @flag(name)
    def _(program, base, monkeypatch, capsys):
        got = program.run(name, *words, without=tuple(value))
        of_clip, of_motion = split(value)
        assert got.record["clip"] == base.record["clip"] | of_clip
        assert got.record["config"] == base.record["config"] | of_motion
        same(got, program.by_hand(**value))
        differs(got, base)


option_flag("--negative", ["a cube"], negative="a cube")
option_flag("--frames", ["5"], frames=5)
option_flag("--height", ["32"], height=32)
option_flag("--width", ["64"], width=64)
option_flag("--interval", ["1"], interval=1)
option_flag("--steps", ["3"], steps=3)
option_flag("--amf", ["dense"], amf="dense")


@flag("--key")
def _(program, base, monkeypatch, capsys):
    """As --set key=, which is compared with the loops above; "" is no key."""
    got = program.run("--key", "studio")
    assert torch.equal(got.latents, program.run(key="studio").latents)
    assert torch.equal(program.run("--key", "").latents, base.latents)
    differs(got, base)
    assert (got.record["config"]["key"], base.record["config"]["key"]) == ("studio", "")


option_flag("--set", ["cfg=2.0", "fps=8"], cfg=2.0, fps=8.0)


def demo_motion() -> dict[str, Any]:
    """The tiny model's own options."""
    return json.loads((CHECKPOINT / "motion.json").read_text(encoding="utf-8"))["motion"]


@flag("--preset")
def _(program, base, monkeypatch, capsys):
    """As its options by --set, which come behind it."""
    own = fastvmt.PRESETS["fast"] | {"cache": 2.0}  # which reuses a velocity in a run of two steps
    got, by_set = program.run("--preset", "fast", cache=2.0), program.run(**own)
    assert got.record["config"] == by_set.record["config"] and torch.equal(got.latents, by_set.latents)
    assert got.record["config"]["cfg_interval"] == [0.6, 1.0] and base.record["config"]["cfg_interval"] != [0.6, 1.0]
    assert fastvmt.PRESETS["fast"]["cache"] != 2.0
    differs(got, base)
    steps = demo_motion()["steps"]  # a model's own options stay
    assert main(["--dry-run", "--preset", "fast", "--frames", "9", "--height", "64", "--width", "96"]) == 0
    assert f" of {steps} steps, block" in capsys.readouterr().out


@flag("--out")
def _(program, base, monkeypatch, capsys):
    assert base.folder.parent == program.place and (base.folder / "run.json").exists()
    monkeypatch.chdir(program.place)
    before = time.strftime("%Y%m%d-%H%M%S")
    assert main(program.argv(steps=1, amf="none")) == 0
    (folder,) = (program.place / "outputs").iterdir()
    assert before <= folder.name <= time.strftime("%Y%m%d-%H%M%S")
    assert (folder / "run.json").exists()


@flag("--png")
def _(program, base, monkeypatch, capsys):
    got = program.run("--png")
    assert not list(base.folder.glob("*.png"))
    pictures = [np.asarray(Image.open(path)) for path in sorted(got.folder.glob("*.png"))]
    assert np.array_equal(np.stack(pictures), decode(program.wan.vae, got.latents))


@flag("--label")
def _(program, base, monkeypatch, capsys):
    """On the result, in the preview too, and again by --decode; the latents know nothing of it."""
    got = program.run("--label", "made by a", "--png")
    assert torch.equal(got.latents, base.latents)
    assert (got.record["label"], base.record["label"]) == ("made by a", "")
    pictures = np.stack([np.asarray(Image.open(path)) for path in sorted(got.folder.glob("*.png"))])
    assert np.array_equal(pictures, with_label(decode(program.wan.vae, got.latents), "made by a"))
    previews = [np.asarray(Image.open(run.folder / "preview.webp").convert("RGB")) for run in (got, base)]
    assert not np.array_equal(*previews)
    assert program.run("--label").record["label"] == "AI-generated"
    again = program.place / "labeled again"
    again.mkdir()
    (again / "latents.safetensors").write_bytes((got.folder / "latents.safetensors").read_bytes())
    assert main(["--decode", str(again / "latents.safetensors"), "--device", "cpu"]) == 0
    assert (again / "preview.webp").read_bytes() == (got.folder / "preview.webp").read_bytes()


@flag("--unguided")
def _(program, base, monkeypatch, capsys):
    """The third panel is the second one of a run without guidance: the same seed, frames and arrows."""
    got, plain = program.run("--unguided"), program.run("--amf", "none")
    assert set(got.record["stages"]) == STAGES | {"unguided"}
    assert torch.equal(got.latents, base.latents)
    three, two, known = (read_video(run.folder / "preview.webp").astype(float) for run in (got, plain, base))
    assert (three.shape[2], two.shape[2], known.shape[2]) == (288, 192, 192)
    panel = three[:, 20:, 192:]  # under the caption
    right, wrong = (np.abs(panel - other[:, 20:, 96:]).mean() for other in (two, known))
    other = read_video(program.run("--amf", "none", "--seed", "4").folder / "preview.webp").astype(float)
    other_seed = np.abs(panel - other[:, 20:, 96:]).mean()
    assert right < 0.5 * min(wrong, other_seed)  # WebP is not exact


@flag("--decode")
def _(program, base, monkeypatch, capsys):
    """The same files from the latents alone, decoded in tiles as the run was."""
    whole, again = program.run(vae_tile=32), program.place / "again"
    again.mkdir()
    (again / "latents.safetensors").write_bytes((whole.folder / "latents.safetensors").read_bytes())
    assert main(["--decode", str(again / "latents.safetensors"), "--device", "cpu"]) == 0
    written = {path.name for path in whole.folder.iterdir()}
    assert {path.name for path in again.iterdir()} == written
    for name in written - {"run.json", "result.mp4", "report.html"}:
        assert (again / name).read_bytes() == (whole.folder / name).read_bytes(), name


@flag("--resume")
def _(program, base, monkeypatch, capsys):
    """A run that stopped before it was decoded ends as one that did not."""
    stopped = program.place / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(transfer_module, "decode", lambda *_, **__: (_ for _ in ()).throw(Stop("seen")))
        assert main([*program.argv(), "--out", str(stopped)]) == 2
    assert main(["--resume", str(stopped)]) == 0
    for name in {path.name for path in base.folder.iterdir()} - {"run.json", "result.mp4", "report.html"}:
        assert (stopped / name).read_bytes() == (base.folder / name).read_bytes(), name
    assert Run.read(stopped).record["losses"] == base.record["losses"]


@flag("--dry-run")
def _(program, base, monkeypatch, capsys):
    monkeypatch.setattr(program_module, "load_wan", lambda *_, **__: pytest.fail("weights were loaded"))
    folder = program.place / "dry"
    assert main([*program.argv(tile=(2, 4), window=5), "--dry-run", "--out", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "9 frames of 96x64" in shown and "3 x 4 x 6 = 72" in shown and "tiles 2x4, window 5" in shown
    assert "1 of 2 steps" in shown and "2 gradients for 4" in shown
    assert not folder.exists()


@flag("--compile")
def _(program, base, monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append(type(self).__name__))
    got = program.run("--compile")
    assert compiled == ["Block"] * 6 and torch.equal(got.latents, base.latents)
    assert (got.record["compile"], base.record["compile"]) == (True, False)


@flag("--parallel")
def _(program, base, monkeypatch, capsys):
    """What several processes make of it is in test_parallel.py; one alone is refused."""
    assert base.record["parallel"] == "none"
    assert main([*program.argv("--parallel", "cfg"), "--out", str(program.place / "none")]) == 2
    assert "--parallel cfg needs torchrun" in capsys.readouterr().err


@flag("--jobs")
def _(program, base, monkeypatch, capsys):
    """A line's flags come behind the command line's."""
    out = program.place / "job"
    file = program.place / "jobs.jsonl"
    file.write_text(json.dumps({"prompt": "a red fox", "out": str(out)}), encoding="utf-8")
    assert main([*program.argv(), "--jobs", str(file)]) == 0
    same(Run.read(out), program.by_hand(prompt="a red fox"))


@flag("--offload")
def _(program, base, monkeypatch, capsys):
    """The same bits; blocks elsewhere must be recomputed, or a backward would keep all their copies."""
    for words, way, recompute in ((["parts"], "parts", "none"), ([], "parts", "none"), (["blocks"], "blocks", "sel")):
        got = program.run("--offload", *words)
        assert torch.equal(got.latents, base.latents)
        assert got.record["offload"] == way and got.record["recompute"].startswith(recompute)
    assert (base.record["offload"], base.record["recompute"]) == ("none", "none")


@flag("--traceback")
def _(program, base, monkeypatch, capsys):
    errors_in_one_line(main, [*program.argv("--ref", "nowhere.mp4"), "--out", str(program.place / "none")], capsys)
    monkeypatch.setattr(sys, "argv", ["fastvmt.py", "--device", "abacus", "--traceback"])
    assert main() == 2 and "Traceback" in capsys.readouterr().err


@flag("--version")
def _(program, base, monkeypatch, capsys):
    shows_the_version(main, capsys)
    assert base.record["versions"]["fastvmt-mini"] == version_of_pyproject()


@flag("--memory")
def _(program, base, monkeypatch, capsys):
    """Of what is foreseen, the fastest way within 90 % of the budget is taken."""
    got = program.run("--memory", "100")
    assert (got.record["offload"], got.record["recompute"]) == ("none", "none")
    needs = (9, 9, 9, 9, 4, 9, 3, 2)  # GB of each plan, the fastest first
    plans = [MemoryPlan(*way, {"guide": gb}) for way, gb in zip(strategies(), needs, strict=True)]
    monkeypatch.setattr(program_module, "plan_memory", lambda *_: plans)
    chosen = {"10.1": ("none", "none"), "5": ("parts", "selective"), "4": ("blocks", "selective")}
    for budget, way in chosen.items():
        got = program.run("--memory", budget)
        assert (got.record["offload"], got.record["recompute"]) == way
        assert torch.equal(got.latents, base.latents)
    assert main([*program.argv("--memory", "2"), "--out", str(program.place / "small")]) == 2
    assert "memory must be at least 2.2 GB here" in capsys.readouterr().err


def errors_in_one_line(call: Callable[[list[str]], int], argv: list[str], capsys) -> None:
    """What this command line fails with is one line; with --traceback, where it came from stands before it."""
    assert call(argv) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    assert call([*argv, "--traceback"]) == 2
    long = capsys.readouterr().err
    assert long.startswith("Traceback") and long.endswith(line)


def version_of_pyproject() -> str:
    text = (Path(fastvmt.__file__).parent / "pyproject.toml").read_text(encoding="utf-8")
    return re.search(r'^version = "(.+?)"', text, re.MULTILINE)[1]


def shows_the_version(call: Callable[[list[str]], int], capsys) -> None:
    with pytest.raises(SystemExit) as end:
        call(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"fastvmt-mini {version_of_pyproject()}\n"


class Stop(UserError):  # noqa: N818 (it is no error)
    """Ends a program where a test has seen enough."""


def pretend_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """A GPU that can be asked about, but holds no tensors."""
    patch.setattr(torch.cpu, "get_capabilities", dict, raising=False)  # nor is there fast bfloat16 on the CPU
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "device_count", lambda: 1)
    patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    patch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    for name in ("synchronize", "max_memory_allocated", "reset_peak_memory_stats"):
        patch.setattr(torch.cuda, name, lambda device: 0)


def where_it_loads(monkeypatch, module, call, argv) -> dict[str, Any]:
    """The keywords with which a program loads its model, on a machine that seems to have a GPU."""
    seen = {}

    def load(*_, **keywords):
        seen.update(keywords)
        raise Stop("seen")

    with monkeypatch.context() as patch:
        pretend_a_gpu(patch)
        patch.setattr(module, "load_wan", load)
        assert call(argv) == 2
    return seen


@flag("--device")
def _(program, base, monkeypatch, capsys):
    assert base.record["device"] == "cpu"
    assert main([*program.argv("--device", "abacus"), "--out", str(program.place / "none")]) == 2
    assert "device abacus is not available" in capsys.readouterr().err
    out = ["--out", str(program.place / "none")]
    for words, device, dtype in LOADED:
        argv = [*program.argv(*words, drop=("--dtype", "--device")), *out]
        seen = where_it_loads(monkeypatch, program_module, main, argv)
        assert torch.device(seen["device"]).type == device and seen["dtype"] == dtype


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_reaches_the_run(name, program, base, monkeypatch, capsys):
    FLAGS[name](program, base, monkeypatch, capsys)


def test_a_run_works_where_it_was_told(program, monkeypatch):
    """The device and the seed that transfer gets."""
    seen = {}

    def stop(*_, **options):
        seen.update(options)
        raise Stop("seen")

    monkeypatch.setattr(fastvmt, "transfer", stop)
    monkeypatch.setattr(program_module, "load_wan", lambda *_, **__: program.wan)
    pretend_a_gpu(monkeypatch)
    flags = ["--device", "cuda", "--dtype", "float32", "--seed", "8", "--out", str(program.place / "nowhere")]
    assert main(program.argv(*flags)) == 2
    assert torch.device(seen["device"]).type == "cuda" and seen["seed"] == 8


def test_one_bad_number_stops_a_run(folder):
    """One NaN among all the latents' numbers, in the second step."""
    wan, calls = load_wan(folder, device="cpu", dtype=torch.float32), []

    def poison(module, inputs, output):
        calls.append(output)
        if len(calls) == 3 and isinstance(output, torch.Tensor):
            output[0, 0, 0, 0, 0] = float("nan")

    wan.dit.register_forward_hook(poison)
    config = replace(MotionConfig(), **(MOTION | {"amf": "none"}))
    with pytest.raises(FloatingPointError, match="not finite after step 2 of 2"):
        transfer(wan, make_clip(0).frames[:9, ::2, ::2].copy(), PROMPT, config)


# The record beside the files.


def test_the_record_agrees_with_the_files(program, base):
    record, weights = base.record, set(program.model.rglob("*.safetensors"))
    assert record["checkpoint_sha256"] == {str(path.relative_to(program.model)): sha256(path) for path in weights}
    assert len(weights) == 3
    assert (record["seed"], record["prompt"], record["config"]["negative"]) == (SEED, PROMPT, "a dog")
    assert record["clip"] == CLIP | {"fps": 16.0}
    assert record["config"].keys() == {f.name for f in fields(MotionConfig)}
    assert json.loads(json.dumps(MOTION)).items() <= record["config"].items()
    assert (record["config"]["block"], record["block"]) == (None, 2)  # what was asked for, and what was read
    assert base.settings.items() <= record.items()
    assert set(record["stages"]) == STAGES
    assert all(cost["seconds"] >= 0 for cost in record["stages"].values())
    assert record["stages"]["denoise"]["seconds"] > 0
    assert record["gradients"] == sum(map(len, record["losses"])) == 2
    assert record["pairs"] == 3 and len(record["key_gradient_norms"]) == 1
    assert record["versions"]["torch"] == torch.__version__
    clip = read_video(program.ref, size=(64, 96), frames=9, fps=16)
    assert record["ref_sha256"] == hashlib.sha256(clip.tobytes()).hexdigest()


def test_the_latents_file_holds_what_the_run_made(program, base):
    expected = program.by_hand()
    same(base, expected)
    config = MotionConfig(**MOTION)
    assert torch.equal(base.flows["flow_result"], by_hand.clip_flow(program.wan, base.latents, config))
    assert base.latents.dtype == torch.float32 and set(base.flows) == {"flow_reference", "flow_result"}
    result = base.folder / "result.webp"
    if result.exists():
        again = write_video(program.place / "again.webp", expected[2], 16.0)
        assert np.array_equal(read_video(result), read_video(again))


def test_the_preview_is_both_clips_with_their_own_arrows(program, base):
    frames, tile, grid = program.by_hand()[2], (3, 4), (3, 4, 6)
    clip = read_video(program.ref, size=(64, 96), frames=9, fps=16)
    panels = {"reference": with_arrows(clip, base.flows["flow_reference"], grid, tile)}
    panels["result"] = with_arrows(frames, base.flows["flow_result"], grid, tile)
    by_hand_file = write_video(program.place / "panels.webp", side_by_side(panels), 16.0)
    assert np.array_equal(read_video(base.folder / "preview.webp"), read_video(by_hand_file))


def test_the_stages_add_up_to_the_wall_clock(program, monkeypatch):
    """Within 5 % of all that main takes, in one of five runs: others use this CPU too."""
    timers = []

    class Kept(StageTimer):
        def __init__(self, device):
            super().__init__(device)
            timers.append(self)

    monkeypatch.setattr(program_module, "StageTimer", Kept)
    shares = []
    while len(shares) < 5 and max(shares, default=0) < 0.95:
        start = time.perf_counter()
        got = program.run(steps=50)
        wall = time.perf_counter() - start
        timer = timers.pop()
        written = sum(cost["seconds"] for cost in got.record["stages"].values())
        assert written == pytest.approx(timer.total(), abs=0.001 * len(STAGES))
        assert timer.total() <= timer.elapsed()
        shares.append(timer.total() / wall)
    assert 0.95 <= max(shares) <= 1


def test_a_run_reads_each_weight_once(program, monkeypatch):
    """While it loads: for the hashes in run.json, no file is read a second time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(program.place / "no cache yet"))
    reads, read_tensors = [], load.read_tensors

    def noted(file, keys):
        for key, tensor in read_tensors(file, keys):
            reads.append((file, key))
            yield key, tensor

    monkeypatch.setattr(load, "read_tensors", noted)
    monkeypatch.setattr(hashes, "sha256_file", lambda file: pytest.fail(f"{file} was read again"))
    got = program.run(steps=1, amf="none")
    assert len(reads) == len(set(reads)) > 100
    weights = sorted(program.model.rglob("*.safetensors"))
    assert got.record["checkpoint_sha256"] == {path.name: sha256(path) for path in weights}


def test_what_is_written_says_how_it_was_made(base):
    label = json.loads(Image.open(base.folder / "preview.webp").getexif()[0x010E])
    wanted = {"ai_generated": True, "seed": SEED, "prompt": PROMPT, "ref": "ref.webp", "config": base.record["config"]}
    assert wanted.items() <= label.items()
    assert label["model"] == Path(base.record["model"]).name


# Plain text to video.

GENERATE = {"--model": None, "--prompt": PROMPT, "--height": "64", "--width": "96", "--frames": "5", "--steps": "2"}
GENERATE |= {"--device": "cpu", "--dtype": "float32"}
SETTINGS = {"seed": 0, "sampler": "unipc", "steps": 2, "shift": 8.0, "cfg": 6.0, "prompt": PROMPT}
# flag: its value, what the loops get for it
OPTIONS = {"--prompt": ("a red fox", {"prompt": "a red fox"}), "--negative": ("a cube", {"negative": "a cube"})}
OPTIONS |= {"--height": ("32", {"height": 32}), "--width": ("64", {"width": 64}), "--frames": ("9", {"frames": 9})}
OPTIONS |= {"--steps": ("3", {"steps": 3}), "--sampler": ("euler", {"sampler": "euler"})}
OPTIONS |= {"--key": ("studio", {"key": "studio"})}
OPTIONS |= {"--shift": ("2.5", {"shift": 2.5}), "--cfg": ("2.0", {"cfg": 2.0}), "--seed": ("11", {"seed": 11})}
OTHERS = {
    "--model",
    "--lora",
    "--label",
    "--dtype",
    "--vae-tile",
    "--out",
    "--device",
    "--offload",
    "--compile",
    "--decode",
    "--resume",  # test_generate_resume.py
    "--version",
    "--traceback",
}


class Generate:
    """python -m wan_mini.generate on the small checkpoint."""

    def __init__(self, model: Path, wan: Wan, place: Path):
        self.model, self.wan, self.place, self.count = model, wan, place, 0

    def argv(self, *flags: str, drop: tuple[str, ...] = ()) -> list[str]:
        given = GENERATE | {"--model": str(self.model)}
        return [*(word for name, value in given.items() if name not in flags + drop for word in (name, value)), *flags]

    def run(self, *flags: str) -> tuple[Path, torch.Tensor, dict[str, Any]]:
        self.count += 1
        out = self.place / f"clip{self.count}.webp"
        assert run(generate_program, [*self.argv(*flags), "--out", str(out)]) == 0
        with safe_open(out.with_suffix(".safetensors"), framework="pt") as file:
            return out, file.get_tensor("latents"), json.loads(file.metadata()["settings"])

    def by_hand(self, prompt: str = PROMPT, negative: str = NEGATIVE, *, wan: Wan | None = None, **changes: Any):
        return by_hand.generate(wan or self.wan, prompt, negative, **changes)


@pytest.fixture(scope="module")
def generate(folder, wan, tmp_path_factory) -> Generate:
    return Generate(folder, wan, tmp_path_factory.mktemp("generate"))


@pytest.fixture(scope="module")
def plain(generate):
    return generate.run()


def test_every_flag_of_generate_has_a_case(capsys):
    assert OPTIONS.keys() | OTHERS == named_in_help(lambda argv: run(generate_program, argv), capsys)


def test_generate_without_flags_is_the_loops(generate, plain):
    _, latents, settings = plain
    assert torch.equal(latents, generate.by_hand())
    assert settings.items() >= (SETTINGS | {"negative": NEGATIVE, "ai_generated": True, "model": "custom"}).items()


@pytest.mark.parametrize("name", OPTIONS)
def test_a_flag_of_generate_reaches_the_run(generate, plain, name):
    value, changes = OPTIONS[name]
    _, latents, settings = generate.run(name, value)
    assert torch.equal(latents, generate.by_hand(**changes))
    assert latents.shape != plain[1].shape or (latents - plain[1]).abs().max() > 1e-4
    assert {key: new for key, new in changes.items() if key in settings}.items() <= settings.items()


def test_model_and_dtype_of_generate(generate, plain):
    other = random_checkpoint(generate.place / "other", seed=1)
    for flags, folder, dtype in (
        (["--model", str(other)], other, torch.float32),
        (["--dtype", "bfloat16"], generate.model, torch.bfloat16),
    ):
        _, latents, _ = generate.run(*flags)
        assert torch.equal(latents, generate.by_hand(wan=load_wan(folder, device="cpu", dtype=dtype)))
        assert (latents - plain[1]).abs().max() > 1e-4


def test_label_of_generate(generate, plain):
    out, latents, settings = generate.run("--label", "AI")
    assert torch.equal(latents, plain[1]) and settings["label"] == "AI" and plain[2]["label"] == ""
    labeled = with_label(decode(generate.wan.vae, latents), "AI")
    expected = write_video(generate.place / "labeled.webp", labeled, 16)
    assert np.array_equal(read_video(out), read_video(expected))


def test_lora_of_generate(generate, plain):
    file = write_lora(generate, "lora.safetensors")
    _, latents, settings = generate.run("--lora", f"{file}:2")
    merged = load_wan(generate.model, device="cpu", dtype=torch.float32, loras=[LoraFile(file, 2.0)])
    assert torch.equal(latents, generate.by_hand(wan=merged)) and not torch.equal(latents, plain[1])
    assert settings["loras"] == [f"{file}:2.0"]


def test_out_and_decode_of_generate(generate, plain, monkeypatch):
    """The frames are those of the latents; --decode makes the same file of them."""
    out, latents, _ = plain
    same_frames = write_video(generate.place / "by_hand.webp", decode(generate.wan.vae, latents), 16)
    assert np.array_equal(read_video(out), read_video(same_frames))
    again = generate.place / "again.webp"
    argv = ["--model", str(generate.model), "--decode", str(out.with_suffix(".safetensors")), "--device", "cpu"]
    assert run(generate_program, [*argv, "--out", str(again)]) == 0
    assert again.read_bytes() == out.read_bytes()
    monkeypatch.chdir(generate.place)
    assert run(generate_program, generate.argv("--steps", "1")) == 0
    assert len(list((generate.place / "outputs").glob("generated.*"))) == 3  # with its page


def test_tiles_of_generate(generate, plain):
    """For the decoder only; --decode takes others."""
    out, latents, settings = generate.run("--vae-tile", "32")
    assert torch.equal(latents, plain[1]) and settings["vae_tile"] == 32
    tiled, whole = (decode(generate.wan.vae, latents, tile=tile) for tile in (32, None))
    again = ["--model", str(generate.model), "--decode", str(out.with_suffix(".safetensors")), "--device", "cpu"]
    again += ["--out", str(generate.place / "64.webp"), "--vae-tile", "64"]
    assert run(generate_program, again) == 0
    for path, near, far in ((out, tiled, whole), (generate.place / "64.webp", whole, tiled)):
        shown = read_video(path).astype(float)
        assert np.abs(shown - near).mean() < np.abs(shown - far).mean()


def test_generate_never_overwrites(generate, plain):
    """As `python -m wan_mini.generate`, with the video of another run or its latents there, or both."""
    out, _, _ = plain
    video, latents = out.read_bytes(), out.with_suffix(".safetensors").read_bytes()
    argv = [*generate.argv("--seed", "1"), "--out", str(out)]
    root = Path(fastvmt.__file__).parent
    done = subprocess.run([sys.executable, "-m", "wan_mini.generate", *argv], cwd=root, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"error: {out} exists already: choose another --out\n"
    for kept in (".webp", ".safetensors"):  # what is left when the other has been moved away
        alone = generate.place / f"alone-{kept[1:]}.webp"
        alone.with_suffix(kept).write_bytes(out.with_suffix(kept).read_bytes())
        decode_again = ["--model", str(generate.model), "--decode", str(out.with_suffix(".safetensors"))]
        assert run(generate_program, [*generate.argv("--seed", "1"), "--out", str(alone)]) == 2
        if kept == ".webp":  # to decode into a new video beside the latents is what --decode is for
            assert run(generate_program, [*decode_again, "--device", "cpu", "--out", str(alone)]) == 2
        assert [path.name for path in generate.place.glob("alone-*")] == [alone.with_suffix(kept).name]
        alone.with_suffix(kept).unlink()
    assert (video, latents) == (out.read_bytes(), out.with_suffix(".safetensors").read_bytes())


def test_version_and_traceback_of_generate(generate, capsys):
    def call(argv):
        return run(generate_program, argv)

    shows_the_version(call, capsys)
    errors_in_one_line(call, [*generate.argv("--model", "nowhere"), "--out", "none.webp"], capsys)


def test_options_of_generate_are_those_of_its_config(generate, plain):
    _, _, settings = plain
    options = OPTIONS.keys() | {"--vae-tile"}
    assert {f.name for f in fields(GenerateConfig)} <= {name.removeprefix("--").replace("-", "_") for name in options}
    assert {f.name for f in (*fields(GenerateConfig), *fields(ClipConfig))} <= settings.keys()


def test_device_and_offload_of_generate(generate, plain, monkeypatch, capsys):
    def call(argv):
        return run(generate_program, argv)

    for words, device, dtype in LOADED:
        argv = [*generate.argv(*words, drop=("--dtype", "--device")), "--out", str(generate.place / "none.webp")]
        seen = where_it_loads(monkeypatch, generate_module, call, argv)
        assert torch.device(seen["device"]).type == device and seen["dtype"] == dtype
    assert torch.equal(generate.run("--offload")[1], plain[1])


def test_compile_of_generate(generate, plain, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append(type(self).__name__))
    assert torch.equal(generate.run("--compile")[1], plain[1]) and compiled == ["Block"] * 6


# Memory.

TRANSFER = MotionConfig(**(MOTION | {"steps": 1, "guidance_fraction": 1.0, "optim_steps": 1}))
LATENTS = (1, 16, 3, 8, 12)


@pytest.mark.parametrize("policy", ["none", "selective"])
@pytest.mark.parametrize("share", [0.89, 0.91])
def test_at_most_90_percent_of_the_free_memory_is_used(program, monkeypatch, policy, share):
    """A policy whose gradient takes this share of the free memory is chosen, or is just too large."""
    gradient = fastvmt.gradient_of(TRANSFER)
    kept = gradient_bytes(program.wan.dit.config, torch.float32, LATENTS, gradient, policy, False)
    monkeypatch.setattr(memory, "free_memory", lambda device: int(kept / share))
    clip = make_clip(0).frames[:9, ::2, ::2].copy()
    chosen = transfer(program.wan, clip, PROMPT, TRANSFER, seed=SEED).report["recompute"]
    assert (chosen == policy) == (share < 0.9)


def test_blocks_that_are_elsewhere_are_recomputed(program):
    clip = make_clip(0).frames[:9, ::2, ::2].copy()
    options = {"prompt": PROMPT, "config": TRANSFER, "seed": SEED}
    there, elsewhere = (transfer(program.wan, clip, **options, offload_blocks=away) for away in (False, True))
    assert there.report["recompute"] == "none" and elsewhere.report["recompute"] == "selective"
    assert torch.equal(there.latents, elsewhere.latents)


AT_WORK = {"text": "text_encoder", "encode": "vae", "guide": "dit", "denoise": "dit", "decode": "vae"}


def test_each_stage_counts_the_weights_that_work_in_it(program):
    """What "parts" saves beside "none" are the weights of the parts that are not at work."""
    _, parts = build_from_folder(program.model)
    weights = {part: sum(p.nbytes for p in module.parameters()) for part, module in parts.items()}
    gradient = fastvmt.gradient_of(MotionConfig(**MOTION))
    shapes = {"video_shape": (1, 3, 9, 64, 96), "latent_shape": LATENTS}
    plans = {
        (plan.offload, plan.recompute): plan.stages
        for plan in estimate(parts, dtype=torch.float32, **shapes, gradient=gradient)
    }
    for stage, part in AT_WORK.items():
        saved = plans["none", "none"][stage] - plans["parts", "none"][stage]
        assert saved * 1e9 == pytest.approx(sum(weights.values()) - weights[part], abs=1)
    blocks = sum(p.nbytes for p in parts["dit"].blocks.parameters())
    saved = plans["parts", "block"]["guide"] - plans["blocks", "block"]["guide"]
    assert saved * 1e9 == pytest.approx(blocks / 2, abs=1)  # three blocks of six are there
    assert len(set(weights.values())) == 3


def test_the_memory_that_is_planned_is_this_runs(program):
    """Of this clip, with this VAE tile, and one pass a step where cfg is 1."""
    _, parts = build_from_folder(program.model)
    shapes = {"dtype": torch.float32, "video_shape": (1, 3, 9, 64, 96), "latent_shape": LATENTS}
    clip = ClipConfig(height=64, width=96, frames=9)
    cases = [
        (MotionConfig(**MOTION, amf="none"), {"cfg_passes": 2}),
        (MotionConfig(**MOTION, amf="none", cfg=1.0, vae_tile=64), {"cfg_passes": 1, "vae_tile": 64}),
    ]
    tables = []
    for config, options in cases:
        plans = program_module.plan_memory(fastvmt.method(), parts, clip, config, torch.float32)
        expected = estimate(parts, **shapes, **options)
        assert [plan.stages for plan in plans] == [plan.stages for plan in expected]
        assert all(plan.peak == max(plan.stages.values()) for plan in plans)
        tables.append(plans[0].stages)
    assert tables[1]["denoise"] < tables[0]["denoise"] and tables[1]["decode"] < tables[0]["decode"]


def test_the_more_a_gradient_recomputes_the_less_it_keeps(program):
    _, parts = build_from_folder(program.model)
    clip = ClipConfig(height=64, width=96, frames=9)
    plans = program_module.plan_memory(fastvmt.method(), parts, clip, MotionConfig(**MOTION), torch.float32)
    none, selective, block = (plan.stages["guide"] for plan in plans[:3])
    assert none > selective > block


def test_views_take_no_memory():
    x = torch.empty(6, 4, device="meta")
    assert peak_bytes(lambda: x.mT.unflatten(0, (2, 2)).unbind()) == 0
    assert peak_bytes(lambda: (x + 1).reshape(3, 8)) == x.nbytes


# Options by name.


def test_a_config_takes_its_own_names_and_types_only():
    config = with_options(MotionConfig(), {"tile": "2,5", "block": "none", "lr": [0.1, 0.2], "steps": "7"}, "--set")
    assert (config.tile, config.block, config.lr, config.steps) == ((2, 5), None, (0.1, 0.2), 7)
    for options, message in (
        ({"frames": 9}, "--set needs one of steps, shift, .*, got frames"),
        ({"steps": 2.5}, "--set steps needs a value like 50, got 2.5"),
        ({"tile": "1,2,3"}, r"--set tile needs a value like \(3, 4\), got 1,2,3"),
        ({"negative": 7}, "--set negative needs a value like .*, got 7"),
        ({"lr": 0.1}, r"--set lr needs a value like \(0.003, 0.002\), got 0.1"),
    ):
        with pytest.raises(UserError, match=message):
            with_options(MotionConfig(), options, "--set")


def test_a_checkpoint_brings_its_own_options(tmp_path):
    clip, motion = {"frames": 5, "fps": 8}, {"steps": 7, "shift": 2.0, "cfg": 3.0, "negative": "", "lr": [0.1, 0.2]}
    (tmp_path / "motion.json").write_text(json.dumps({"clip": clip, "motion": motion}))
    own_clip, own_motion = load_preset(tmp_path, MotionConfig())
    assert own_clip == ClipConfig(frames=5, fps=8.0)
    assert own_motion == MotionConfig(**(motion | {"lr": (0.1, 0.2)}))
    assert load_preset(None, MotionConfig()) == (ClipConfig(), MotionConfig())
    assert generate_module.preset("custom", tmp_path) == GenerateConfig(shift=2.0, cfg=3.0, negative="")
    (tmp_path / "motion.json").write_text(json.dumps({"clip": clip, "motion": {"color": "red"}}))
    with pytest.raises(UserError, match="motion.json: motion needs one of steps, .*, got color"):
        load_preset(tmp_path, MotionConfig())


@pytest.mark.gpu
def test_a_stage_waits_for_the_gpu():
    device = torch.device("cuda")
    stage = StageTimer(device)
    with stage("late"):
        torch.cuda._sleep(10**9)
    assert stage.table["late"]["seconds"] > 0.1


@pytest.mark.gpu
def test_a_gpu_run_is_the_cpus_within_tolerance(program, base):
    got = program.run("--device", "cuda", "--dtype", "float32")
    assert got.record["device"] == "cuda" and got.record["stages"]["guide"]["peak_gb"] > 0
    assert (got.latents - base.latents).abs().mean() < 0.05
    parts = program.run("--device", "cuda", "--dtype", "float32", "--offload", "parts")
    assert parts.record["stages"]["encode"]["peak_gb"] <= got.record["stages"]["encode"]["peak_gb"]
