"""python -m wan_mini.peers: each flag and what it reaches, every bad request; beside the steps by hand."""

import json
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from test_wiring import FLAGS, as_text, named_in_help
from torch.utils.flop_counter import FlopCounterMode

from wan_mini.config import T2V_1_3B, ClipConfig, DiTConfig
from wan_mini.device import flops
from wan_mini.device.memory import Gradient, gradient_bytes
from wan_mini.device.peak import gpu_attention
from wan_mini.dit import WanDiT
from wan_mini.errors import UserError
from wan_mini.lora import attached
from wan_mini.peers import adapted, fit, methods, presets, training_free
from wan_mini.peers.__main__ import NAMES, main, method_named
from wan_mini.peers.fit import Fit
from wan_mini.pipeline import SamplingConfig, decode, denoise
from wan_mini.prompts import encode_prompts
from wan_mini.runs.cli import with_options
from wan_mini.runs.request import apply_flags, build_parser
from wan_mini.scheduler import FlowEuler
from wan_mini.tiny import demo
from wan_mini.tiny.world import make_clip
from wan_mini.video import read_video, to_tensor, write_video

CPU = torch.device("cpu")
CLIP = {"height": 32, "width": 48, "frames": 9}
SAMPLING = {"steps": 2, "shift": 3.0, "negative": "a dog"}
TRAINING = {
    "fit_steps": (1, 2),
    "fit_lr": (0.05, 0.05),
    "fit_shift": 4.0,
    "rank": 4,
    "stride": 2,
    "strengths": (0.0, 0.9),
}
TRAINING["ratio"] = 1.0  # random heads attend everywhere: by the default all of them would be temporal
OWN_FLAGS = {"--method", "--ref-prompt", "--save", "--load", "--check"}


class Program:
    """The program on the small checkpoint; runs in numbered folders."""

    def __init__(self, model, wan, place):
        self.model, self.wan, self.place, self.count = model, wan, place, 0
        self.ref = write_video(place / "ref.webp", make_clip(0).frames[:9, ::4, ::4], fps=16)
        self.clip = read_video(self.ref, size=(32, 48), frames=9, fps=16)

    def argv(self, *flags, method="fym", **sets):
        options = CLIP | SAMPLING | (TRAINING if method == "fym" else {}) | sets
        given = {"--method": method, "--model": self.model, "--ref": self.ref, "--prompt": "a ball", "--seed": 3}
        given |= {"--device": "cpu", "--dtype": "float32"}
        if method in methods.METHODS:
            given["--ref-prompt"] = "a cube"
        words = [word for name, value in given.items() if name not in flags for word in (name, str(value))]
        return [*words, "--set", *(f"{name}={as_text(value)}" for name, value in options.items()), *map(str, flags)]

    def run(self, *flags, **options):
        self.count += 1
        folder = self.place / f"run{self.count}"
        assert main([*self.argv(*flags, **options), "--out", str(folder)]) == 0
        with safe_open(folder / "latents.safetensors", framework="pt") as file:
            latents = file.get_tensor("latents")
        return folder, json.loads((folder / "run.json").read_text(encoding="utf-8")), latents

    def fails(self, capsys, *flags, **options):
        out = self.place / "failed"
        assert main([*self.argv(*flags, **options), "--out", str(out)]) == 2 and not out.exists()
        return capsys.readouterr().err.strip().split("\n")[-1]


@pytest.fixture(scope="module")
def program(folder, wan, tmp_path_factory):
    return Program(folder, wan, tmp_path_factory.mktemp("peers"))


@pytest.fixture(scope="module")
def base(program):
    return program.run("--save", program.place / "base.safetensors", "--check")


def by_hand(program, config, ref_prompt="a cube", seed=3):
    """Follow-Your-Motion step by step: the latents of both videos, and the plan with what it has trained."""
    wan = program.wan
    method = methods.METHODS["fym"]
    with torch.no_grad():
        text, negative, caption = encode_prompts(wan, ["a ball", "a dog", ref_prompt], CPU)
        clips = {"whole": [wan.vae.encode(to_tensor(program.clip))]}
        clips["spatial"] = [wan.vae.encode(to_tensor(program.clip[i : i + 1])) for i in range(9)]
        clips["temporal"] = [wan.vae.encode(to_tensor(program.clip[::2]))]
        plan = method.plan(wan.dit, clips, caption, config, seed)
        Fit(plan.stages, seed=seed).run(wan.dit, caption, shift=config.fit_shift)
        plan.parts["temporal"].set_strength(config.strengths[1])
        noise = torch.randn(clips["whole"][0].shape, generator=torch.Generator().manual_seed(seed))
        videos = []
        for prompt in (text, caption):
            with attached(wan.dit, plan.parts["temporal"]):
                scheduler = FlowEuler(config.steps, config.shift)
                videos.append(denoise(wan.dit, noise, scheduler, prompt, negative, config.cfg))
    return *videos, plan


def small_config(**changes):
    return replace(methods.METHODS["fym"].config, **(SAMPLING | TRAINING | changes))


def test_a_run_is_the_steps_by_hand(program, base):
    folder, record, latents = base
    config = small_config()
    expected, rebuilt, plan = by_hand(program, config)
    assert torch.equal(latents, expected)
    assert record["config"] == json.loads(json.dumps(asdict(config)))
    assert record["gradients"] == 3 == len(record["losses"][0]) and record["recompute"] == "none"
    assert record["ref_prompt"] == "a cube" and record["labels"] == plan.report["labels"]
    assert record["losses_by_level"].keys() == {"spatial", "temporal"} and record["stages"]["fit"]["seconds"] > 0
    assert {"result.mp4", "result.webp"} & {path.name for path in folder.iterdir()}
    shown = read_video(folder / "rebuilt.webp").astype(float)
    near, far = (abs(shown - decode(program.wan.vae, x)).mean() for x in (rebuilt, expected))
    assert near < far
    start = torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))
    assert not torch.equal(start, latents)


CHANGES = {"fit_steps": (1, 3), "fit_lr": (0.05, 0.01), "fit_decay": (0.0, 50.0), "fit_shift": 1.0, "rank": 2}
CHANGES |= {"targets": "v", "heads": "all", "sparse": "none", "rope": "none", "motion": "none", "strengths": (0.9, 0.9)}


@pytest.mark.parametrize("name", CHANGES)
def test_a_field_changes_the_video(program, base, name):
    config = small_config(**{name: CHANGES[name]})
    latents = adapted.transfer(program.wan, program.clip, "a ball", config, ref_prompt="a cube", seed=3).latents
    assert (latents - base[2]).abs().max() > 1e-6


def test_fields_are_reached_by_set(program, capsys):
    """Every option of every method is one of --set's; a wrong name or value is an error."""
    for name in NAMES:
        method = method_named(name)
        for field in fields(method.config):
            value = getattr(method.config, field.name)
            if value is not None and value != "":
                args = build_parser(method).parse_args(["--set", f"{field.name}={as_text(value)}"])
                assert apply_flags(args, ClipConfig(), method.config)[1] == method.config, field.name
    assert "needs one of height, width" in program.fails(capsys, color="red")
    for word, value in (("false", False), ("True", True)):
        assert with_options(methods.METHODS["motioninversion"].config, {"difference": word}, "").difference is value
    with pytest.raises(UserError, match="--set difference needs a value like True, got 1"):
        with_options(methods.METHODS["motioninversion"].config, {"difference": "1"}, "--set")
    assert "rope must be one of aligned, paper, none, got x" in program.fails(capsys, rope="x")


def test_every_flag_is_known(capsys):
    """Those of fastvmt.py, which runs/ tests, but for three that name its options; and this program's own."""
    shared = FLAGS.keys() - {"--amf", "--interval", "--preset"}
    assert named_in_help(main, capsys) == shared | OWN_FLAGS

    def moft(argv):
        main(["--method", "moft", *argv])

    assert named_in_help(moft, capsys) == shared | {"--method"}


@pytest.mark.parametrize("name", NAMES)
def test_every_method_runs(program, name):
    """Its name, options and preview; and it changes the video, which starts from the same noise."""
    sets = (
        {"fit_steps": (1, 1)}
        if name in methods.METHODS
        else {"guidance_fraction": 0.5, "optim_steps": 1, "lr": (0.1, 0.1)}
    )
    sets |= {"fit_lr": (0.5, 0.5)} if name in methods.METHODS else {}
    folder, record, latents = program.run(method=name, **sets)
    plain = method_named(name).unguided(method_named(name).config)
    plain = replace(plain, **SAMPLING)
    options = {"ref_prompt": "a cube"} if name in methods.METHODS else {}
    unguided = method_named(name).transfer(program.wan, program.clip, "a ball", plain, seed=3, **options)
    assert (latents - unguided.latents).abs().max() > 1e-4
    assert unguided.report["gradients"] == 0
    assert record["gradients"] >= (1 if name != "flowmotion" else 0) and (folder / "preview.webp").exists()
    assert {field.name for field in fields(method_named(name).config)} == record["config"].keys()


@pytest.mark.parametrize("name", ["fym", "moft"])
def test_a_key_makes_the_noise(program, name):
    """Also where nothing is trained or guided."""
    method = method_named(name)
    plain = replace(method.unguided(method.config), **SAMPLING)
    options = {"ref_prompt": "a cube"} if name in methods.METHODS else {}
    latents = []
    for key in ("", "studio", "studio"):
        config = replace(plain, key=key)
        latents.append(method.transfer(program.wan, program.clip, "a ball", config, seed=3, **options).latents)
    assert (latents[0] - latents[1]).abs().max() > 0.1
    assert torch.equal(latents[1], latents[2])


def test_the_references_caption_is_trained_with(program, base):
    _, record, latents = program.run("--ref-prompt", "a red fox")
    assert record["ref_prompt"] == "a red fox" and (latents - base[2]).abs().max() > 1e-6
    assert torch.equal(latents, by_hand(program, small_config(), "a red fox")[0])


def test_saved_adapters_give_the_same_video(program, base, capsys):
    file = program.place / "base.safetensors"
    assert not file.with_name(file.name + ".state").exists()
    _, record, latents = program.run("--load", file, fit_steps=(7, 7), rank=2)  # the file's own options hold
    assert torch.equal(latents, base[2]) and record["gradients"] == 0 and "losses" not in record
    assert record["adapters_sha256"] == base[1]["adapters_sha256"]
    assert record["spatial_heads"] == base[1]["spatial_heads"]
    other = program.run("--load", file, strengths=(0.0, 0.1))[2]
    assert not torch.equal(other, latents)  # how strongly they act is the run's
    assert "is there already: give it to --load" in program.fails(capsys, "--save", file)
    assert "got both: keep one" in program.fails(capsys, "--save", "x", "--load", file)
    assert "does not exist: give a file that --save has written" in program.fails(capsys, "--load", "none")
    message = program.fails(capsys, "--load", file, method="det")
    assert "holds adapters of fym, got --method det: give the same" in message


def test_adapters_belong_to_their_model(program, base, tmp_path, capsys):
    from conftest import random_checkpoint

    other = random_checkpoint(tmp_path / "other", seed=1)
    message = program.fails(capsys, "--model", other, "--load", program.place / "base.safetensors")
    assert "was trained beside other weights than these" in message


def test_a_stopped_training_goes_on(program, base, monkeypatch, capsys):
    file = program.place / "stopped.safetensors"
    update, calls = Fit.update, []

    def stop(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        update(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(fit, "SAVE_EVERY", 0.0)
        patch.setattr(Fit, "update", stop)
        assert main([*program.argv("--save", file), "--out", str(program.place / "stopped")]) == 130
    state = file.with_name(file.name + ".state")
    assert state.exists() and not file.exists()
    assert "was begun with other settings" in program.fails(capsys, "--save", file, fit_shift=5.0)
    assert torch.equal(program.run("--save", file)[2], base[2])
    assert file.exists() and not state.exists()


@pytest.mark.parametrize("flags", [("--offload",), ("--offload", "blocks")])
def test_offloading_changes_no_bit(program, base, flags):
    assert torch.equal(program.run(*flags)[2], base[2])


def test_bad_requests(program, capsys):
    good = ["--model", str(program.model), "--ref", str(program.ref), "--prompt", "a ball"]
    assert main(good) == 2
    assert "--method fym needs the reference's own caption: give --ref-prompt TEXT" in capsys.readouterr().err
    assert main(["--ref", str(program.ref), "--method", "det"]) == 2
    assert "--method det needs the reference's own caption" in capsys.readouterr().err
    assert "--compile cannot be used with --method fym" in program.fails(capsys, "--compile")
    assert "stride must leave 4m+1 of 9 frames, got 3: try 1, 2" in program.fails(capsys, stride=3)
    for argv in (["--method", "none"], ["--method", "moft", "--save", "x"], ["--ref-prompt"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2 and "error: " in capsys.readouterr().err


def test_a_dry_run_has_a_training_row(program, capsys):
    assert main([*program.argv(), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "training     fym, " in out and "spatial      1 steps of 1 latent frames" in out
    assert "temporal     2 steps of 2 latent frames" in out
    header = next(line for line in out.splitlines() if "offload" in line and "text" in line)
    assert header.split() == ["offload", "recompute", "text", "encode", "fit", "denoise", "decode", "pinned"]
    config = methods.unadapted(methods.METHODS["fym"].config)
    assert methods.costs(config, program.wan.dit, (3, 2, 3)) == ["training     none"]


def test_presets_of_the_tiny_model():
    """For the world's clips; and values of its motion.json for all that is sampling's."""
    assert presets.TINY.keys() == methods.METHODS.keys()
    stored = json.loads((demo.CHECKPOINT / "motion.json").read_text("utf-8"))["motion"]
    for name, method in methods.METHODS.items():
        clip, config = presets.load_preset(demo.CHECKPOINT, method.config, name)
        assert clip.frames == 33 and type(config) is type(method.config)
        for field, value in presets.TINY[name].items():
            assert getattr(config, field) == value
        for field in fields(SamplingConfig):
            assert getattr(config, field.name) == stored.get(field.name, getattr(method.config, field.name))
        assert max(config.fit_steps) <= 200 and len(method.frame_sets(config, 33)["temporal"][0]) > 4
        clip, config = presets.load_preset(None, method.config, name)
        assert (clip, config) == (ClipConfig(), method.config)
    for name, peer in training_free.PEERS.items():
        assert method_named(name).load_preset(demo.CHECKPOINT, peer.config)[1].steps == stored["steps"]


# Costs.


def step_flops(config: DiTConfig, size: tuple[int, int, int], recompute: str) -> int:
    """Operations of one training step of a dense clip, counted on meta tensors with flash attention."""
    method = methods.METHODS["fym"].config
    with torch.device("meta"):
        dit = WanDiT(config).requires_grad_(False)
        latents = torch.zeros(1, 16, *size)
        text = torch.zeros(1, config.text_len, config.text_dim)
    options = replace(method, sparse="none", rank=16)
    step = methods.plan_without_contents(options, dit, latents, text).stages[1].passes[0]
    with gpu_attention(), FlopCounterMode(display=False) as counter:
        fit.gradients_of(dit, step, text, np.random.default_rng(0), 1.0, recompute)
    return counter.get_total_flops()


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_training_flops(recompute):
    config = DiTConfig(dim=96, ffn_dim=384, num_heads=2, num_layers=6, freq_dim=64, text_dim=24, text_len=8)
    counted = step_flops(config, (5, 16, 24), recompute)
    assert flops.training_flops(config, 5 * 8 * 12, recompute) == pytest.approx(counted, rel=0.15)


def test_a_sparse_clip_is_as_much_cheaper_as_computed():
    """81 frames of 480x832 at 1.3B, in TFLOP: dense and sparse steps, selective."""
    dense, sparse, still = (flops.training_flops(T2V_1_3B, f * 30 * 52, "selective") / 1e12 for f in (21, 5, 1))
    assert (dense, sparse, still) == pytest.approx((949, 101, 14), rel=0.01)
    assert dense / sparse == pytest.approx(9.4, abs=0.05)


def training_gigabytes(config) -> float:
    gradient: Gradient | None = methods.gradient_of(config)
    assert gradient is not None
    return gradient_bytes(T2V_1_3B, torch.bfloat16, (1, 16, 21, 60, 104), gradient, "selective", False) / 1e9


@pytest.mark.slow
def test_training_at_full_size_fits_into_9_gb():
    """Follow-Your-Motion at 1.3B, 81 frames, the transformer's weights of 2.8 GB included; and the cost as counted."""
    assert training_gigabytes(methods.METHODS["fym"].config) + flops.parameters(T2V_1_3B) * 2 / 1e9 < 9
    counted = [step_flops(T2V_1_3B, (frames, 60, 104), "selective") for frames in (21, 5)]
    assert counted[0] / counted[1] == pytest.approx(9.4, rel=0.1)


def test_no_training_takes_no_memory():
    config = methods.METHODS["fym"].config
    assert methods.gradient_of(methods.unadapted(config)) is None
    with pytest.raises(UserError, match="stride must leave"):
        methods.METHODS["fym"].frame_sets(replace(config, stride=7), 81)
