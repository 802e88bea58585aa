"""The whole program on a random tiny model: the method step by step, files in and out, and every bad input."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from naive import naive
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fastvmt
import wan_mini.transfer as transfer_module
from fastvmt import FastVMT, MotionConfig, main, transfer
from wan_mini.config import ClipConfig, DiTConfig
from wan_mini.device.flops import forward_flops
from wan_mini.device.memory import MemoryPlan
from wan_mini.device.select import compile_blocks
from wan_mini.dit import WanDiT
from wan_mini.errors import UserError
from wan_mini.generate import generate
from wan_mini.load import load_wan
from wan_mini.prompts import NEGATIVE, encode_prompts
from wan_mini.runs import dry_run, program
from wan_mini.runs.cli import field_names
from wan_mini.scheduler import FlowEuler
from wan_mini.tiny import demo
from wan_mini.tiny.world import make_clip
from wan_mini.video import read_video, to_tensor, write_video

CPU = torch.device("cpu")
SMALL = MotionConfig(steps=4, shift=3.0, guidance_fraction=0.5, tau=3.0, window=3, lr=(0.002, 0.001))
FLAGS = ["--height", "64", "--width", "96", "--frames", "9", "--steps", "3", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture(scope="session")
def clip():
    return make_clip(0).frames[:9, ::2, ::2]  # (9, 64, 96, 3)


def test_a_clean_reference_is_read_once():
    """Then the guidance costs a pass of the reference less in each guided step but one."""
    with torch.device("meta"):
        dit = WanDiT(DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30))
    grid = (21, 30, 52)
    teraflops = {}
    for reference in ("noised", "clean"):
        line = fastvmt.costs(MotionConfig(reference=reference), dit, grid)[1]
        teraflops[reference] = float(line.split()[-2].replace(",", ""))
    once = forward_flops(dit.config, 21 * 30 * 52, 14) / 1e12
    assert teraflops["noised"] - teraflops["clean"] == pytest.approx(9 * once, abs=0.1)


def test_defaults_are_the_papers():
    c = MotionConfig()
    assert (c.steps, c.guided_steps, c.optim_steps, c.interval, c.lr) == (50, 10, 10, 3, (0.003, 0.002))
    assert (c.tile, c.window, c.span, c.alpha, c.weights, c.tau) == ((3, 4), 21, 4, 0.2, (5.0, 1.0), 2.0)
    assert replace(c, steps=33).guided_steps == 7  # ceil(6.6)
    assert replace(c, amf="none").guided_steps == 0
    with pytest.raises(ValueError, match="amf must be one of windowed, dense, none, got window"):
        replace(c, amf="window")
    with pytest.raises(ValueError, match="interval must be at least 1 and finite, got 0"):
        replace(c, interval=0)
    for name, value, message in (
        ("strength", 2.0, "at most 1, got 2.0"),
        ("strength", 0.0, "above 0, got 0"),
        ("tile", (3, 0), r"at least 1 and finite, got \(3, 0\)"),
        ("tau", float("nan"), "finite, got nan"),
        ("lr", (-1.0, 0.1), "at least 0 and finite"),
        ("centroid", "mean", "one of argmax, soft, got mean"),
        ("window_anchor", "own", "one of clean, noised, self, got own"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be .*{message}"):
            replace(c, **{name: value})


def test_clips_have_a_least_size():
    for name, value, message in (("height", 8, "at least 16"), ("width", 0, "at least 16"), ("fps", 0.0, "above 0")):
        with pytest.raises(ValueError, match=f"{name} must be .*{message}"):
            replace(ClipConfig(), **{name: value})


def test_the_block_is_the_middle_one():
    for layers, block in ((30, 14), (40, 19), (6, 2), (1, 0)):
        dit = SimpleNamespace(config=SimpleNamespace(num_layers=layers))
        assert MotionConfig().block_of(dit) == block
    with pytest.raises(ValueError, match="block must be at most 0, got 3"):
        MotionConfig(block=3).block_of(dit)


@pytest.mark.parametrize(("strength", "words"), [(1.0, NEGATIVE), (0.6, ""), (1.0, "a cat")])
def test_without_guidance_it_is_euler_with_cfg(wan, clip, strength, words):
    """Written out by hand: the start, both passes, the update."""
    config = replace(SMALL, amf="none", strength=strength, negative=words)
    got = transfer(wan, clip, "a ball", config, seed=5)
    with torch.no_grad():
        text, negative = encode_prompts(wan, ["a ball", words], CPU)
        z = wan.vae.encode(to_tensor(clip))
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(5))
        u = [strength * (1 - i / 4) for i in range(5)]
        sigma = [3 * a / (1 + 2 * a) for a in u]
        x = (1 - sigma[0]) * z + sigma[0] * noise
        for now, then in zip(sigma, sigma[1:]):
            t = torch.tensor([1000 * now])
            c, n = wan.dit(x, t, text), wan.dit(x, t, negative)
            x = x + (then - now) * (n + config.cfg * (c - n))
    torch.testing.assert_close(got.latents, x, rtol=1e-4, atol=1e-4)
    assert got.report["gradients"] == 0 and got.frames.shape == clip.shape and got.frames.dtype == np.uint8


def test_without_guidance_it_is_plain_generation(wan, clip):
    got = transfer(wan, clip, "a ball", replace(SMALL, amf="none"), seed=5).latents
    scheduler = FlowEuler(4, 3.0)
    plain = generate(wan, "a ball", size=(64, 96), frames=9, scheduler=scheduler, cfg=SMALL.cfg, seed=5)
    assert torch.equal(got, plain)


@pytest.mark.parametrize("reference", ["noised", "clean"])
@pytest.mark.parametrize("anchor", ["clean", "noised", "self"])
def test_the_loss_is_the_papers(wan, clip, anchor, reference):
    """FastVMT's loss against the notebooks' loops, from queries and keys up; value and gradient to the latents."""
    loops, losses = naive("07_tiles_and_windows"), naive("08_losses")
    config = replace(SMALL, window_anchor=anchor, reference=reference)
    text, null = encode_prompts(wan, ["a ball", ""], CPU)
    z, noise, x = (torch.randn(1, 16, 3, 8, 12) for _ in range(3))
    t, noised, grid = torch.tensor(800.0), 0.2 * z + 0.8 * noise, (3, 4, 6)
    guide = FastVMT(wan.dit, z, noise, text, null, config)
    x.requires_grad_()
    norms: dict[str, float] = {}
    ours = guide.loss(x, t, guide.target_at(torch.tensor(0.8), t), norms)
    assert guide.grid == grid and guide.block == 2
    pairs = guide.pairs

    def qk(latents, timestep, prompt):
        return wan.dit(latents, timestep.reshape(1), prompt, qk_block=2)

    clean, gen = qk(z, torch.zeros(1), null), qk(x, t, text)
    ref = {"noised": qk(noised, t, null), "clean": clean}[reference]
    source = {"clean": (clean, clean), "noised": (ref, ref), "self": (ref, gen)}[anchor]
    ref_centers, gen_centers = (loops.tile_centers(*pair, grid, pairs, config.tile) for pair in source)
    options = (grid, pairs, config.tau, config.tile, config.window)
    flow_ref, _ = loops.windowed_amf(*ref, *options, ref_centers)
    flow_gen, windows = loops.windowed_amf(*gen, *options, gen_centers)
    slow = 5 * losses.amf_loss(flow_ref.detach(), flow_gen, pairs, config.span, config.alpha)
    slow = slow + losses.window_loss(gen[1], grid, pairs, windows)
    torch.testing.assert_close(ours, slow, rtol=1e-4, atol=1e-5)
    a, b = torch.autograd.grad(ours, x)[0], torch.autograd.grad(slow, x, retain_graph=True)[0]
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())
    window = torch.autograd.grad(losses.window_loss(gen[1], grid, pairs, windows), gen[1])[0]
    assert norms["window"] == pytest.approx(window.norm().item(), rel=1e-3)


def test_guidance_lowers_the_loss_and_counts_gradients(wan, clip):
    result = transfer(wan, clip, "a ball", SMALL)
    assert [len(inner) for inner in result.report["losses"]] == [4, 4] and result.report["gradients"] == 8
    assert result.report["pairs"] == 3
    for inner in transfer(wan, clip, "a ball", replace(SMALL, interval=1)).report["losses"]:
        assert len(inner) == 10 and inner == sorted(inner, reverse=True)
    unguided = transfer(wan, clip, "a ball", replace(SMALL, amf="none"))
    assert (result.latents - unguided.latents).abs().max() > 0.01


EXTREMES = [{"span": 1}, {"window": 1}, {"tile": (5, 5)}, {"span": 99}]
EXTREMES += [{"amf": "dense"}, {"amf": "dense", "reference": "clean"}]


@pytest.mark.parametrize("changes", EXTREMES)
def test_extreme_settings_run(wan, clip, changes):
    assert transfer(wan, clip, "a ball", replace(SMALL, **changes)).latents.isfinite().all()


def test_the_shortest_clip(wan, clip):
    """Five frames are two latent frames: one pair, and no window loss, as that compares two pairs."""
    result = transfer(wan, clip[:5], "a ball", SMALL)
    assert result.report["pairs"] == 1 and result.frames.shape == (5, 64, 96, 3)
    assert [norms["window"] for norms in result.report["key_gradient_norms"]] == [0.0, 0.0]


def test_tiles_of_the_vae_reach_it(wan, clip):
    config = replace(SMALL, amf="none", steps=1, vae_tile=32)
    tiled, whole = (transfer(wan, clip, "a ball", c).frames for c in (config, replace(config, vae_tile=None)))
    assert 0 < np.abs(tiled.astype(int) - whole).mean() < 40


def test_a_window_over_the_whole_frame_is_dense_guidance(wan, clip):
    whole = replace(SMALL, window=99, weights=(5.0, 0.0))
    dense = transfer(wan, clip, "a ball", replace(SMALL, amf="dense"))
    torch.testing.assert_close(transfer(wan, clip, "a ball", whole).latents, dense.latents, rtol=1e-3, atol=1e-3)


def test_seeds(wan, clip):
    one, again, other = (transfer(wan, clip, "a ball", SMALL, seed=seed).latents for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert (one - other).abs().max() > 0.1


def test_latents_that_are_not_finite_stop_the_run_at_their_step(folder, clip):
    wan = load_wan(folder, device="cpu", dtype=torch.float32)
    calls = []

    def poison(module, inputs, output):
        calls.append(1)
        return output * (float("nan") if len(calls) == 3 else 1)  # the second step's first pass

    wan.dit.register_forward_hook(poison)
    with pytest.raises(FloatingPointError, match="not finite after step 2 of 4: try --dtype float32"):
        transfer(wan, clip, "a ball", replace(SMALL, amf="none"))


def test_bfloat16_weights_keep_the_latents_in_float32(folder, wan, clip):
    config = replace(SMALL, steps=2)
    rounded = transfer(load_wan(folder, device="cpu", dtype=torch.bfloat16), clip, "a ball", config).latents
    exact = transfer(wan, clip, "a ball", config).latents
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.1


@pytest.mark.parametrize("recompute", ["selective", "block"])
def test_offloading_and_recomputing_change_no_bit(wan, clip, recompute):
    options = {"config": replace(SMALL, steps=2), "seed": 1}
    plain = transfer(wan, clip, "a ball", **options)
    lean = transfer(wan, clip, "a ball", **options, offload_blocks=True, recompute=recompute)
    assert torch.equal(plain.latents, lean.latents) and np.array_equal(plain.frames, lean.frames)
    assert plain.report["recompute"] == "none" and lean.report["recompute"] == recompute


# From files to files.


def films(tmp_path, clip):
    """The clip as a folder of JPEGs, a GIF, and an mp4 where there is ffmpeg."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, frame in enumerate(clip):
        Image.fromarray(frame).save(pictures / f"{number}.jpg", quality=95)
    images = [Image.fromarray(frame) for frame in clip]
    images[0].save(tmp_path / "clip.gif", save_all=True, append_images=images[1:], duration=60)
    yield pictures
    yield tmp_path / "clip.gif"
    if shutil.which("ffmpeg"):
        yield write_video(tmp_path / "clip.mp4", clip, fps=16)


def test_from_file_to_file(folder, tmp_path, clip, capsys):
    for ref in films(tmp_path, np.concatenate([clip, clip[::-1]])):
        out = tmp_path / f"out-{ref.name}"
        assert main(["--model", str(folder), "--ref", str(ref), "--prompt", "a cat", "--out", str(out), *FLAGS]) == 0
        names = {path.name for path in out.iterdir()}
        assert {"latents.safetensors", "run.json", "preview.webp", "report.html"} < names and len(names) == 5
        result = out / ("result.mp4" if shutil.which("ffmpeg") else "result.webp")
        assert read_video(result).shape == (9, 64, 96, 3)
        assert read_video(out / "preview.webp", fps=16).shape[0] == 9
        record = json.loads((out / "run.json").read_text(encoding="utf-8"))
        assert record["clip"]["frames"] == 9 and record["prompt"] == "a cat" and record["seed"] == 0
        assert record["config"]["negative"] == NEGATIVE
        stages = {"plan", "read", "load", "text", "encode", "move", "guide", "denoise", "flows", "decode", "write"}
        assert set(record["stages"]) == stages
        assert len(record["checkpoint_sha256"]) == 3 and record["versions"]["torch"] == torch.__version__
        assert len(record["losses"]) == 1 and record["gradients"] == 4  # 20 % of 3 steps, rounded up
    assert "wrote" in capsys.readouterr().out


def test_same_seed_same_bytes(folder, tmp_path, clip):
    write_video(tmp_path / "ref.webp", clip, 16)
    command = ["--model", str(folder), "--ref", str(tmp_path / "ref.webp"), "--prompt", "a cat", *FLAGS]
    for out in ("a", "b"):
        assert main([*command, "--out", str(tmp_path / out)]) == 0
    first, second = ((tmp_path / out / "latents.safetensors").read_bytes() for out in ("a", "b"))
    assert first == second


def no_memory(*_, **__):
    raise torch.OutOfMemoryError("no memory")


def test_a_run_that_fails_to_decode_can_be_finished(folder, tmp_path, clip, monkeypatch, capsys):
    write_video(tmp_path / "ref.webp", clip, 16)
    command = ["--model", str(folder), "--ref", str(tmp_path / "ref.webp"), "--prompt", "a cat", *FLAGS]
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(transfer_module, "decode", no_memory)
        assert main([*command, "--out", str(tmp_path / "cut")]) == 2
    assert "error: out of memory" in capsys.readouterr().err
    cut = tmp_path / "cut"
    assert {path.name for path in cut.iterdir()} == {"latents.safetensors", "run.json", "state.safetensors"}
    assert json.loads((cut / "run.json").read_text(encoding="utf-8"))["gradients"] == 4
    monkeypatch.chdir("/")  # paths are kept absolute
    assert main(["--decode", str(cut / "latents.safetensors"), "--png"]) == 0
    assert len(list(cut.glob("frame*.png"))) == 9
    for name in ("preview.webp", "result.mp4" if shutil.which("ffmpeg") else "result.webp"):
        assert np.array_equal(read_video(cut / name), read_video(tmp_path / "whole" / name))
    assert main(["--decode", str(tmp_path / "ref.webp")]) == 2
    assert "holds no run's latents" in capsys.readouterr().err


def test_no_arguments_at_all(tmp_path, monkeypatch, capsys):
    """The first command of the README, on a smaller clip."""
    monkeypatch.chdir(tmp_path)
    assert main(FLAGS) == 0
    (run,) = (tmp_path / "outputs").iterdir()
    assert read_video(run / "preview.webp").shape[2] == 3 * 96  # reference, result, result without guidance
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["config"]["negative"] == ""
    assert "correlation" not in capsys.readouterr().out  # the true path is that of the whole clip


def test_pictures_on_request(folder, tmp_path, clip):
    write_video(tmp_path / "ref.webp", clip, 16)
    out = tmp_path / "out"
    command = ["--model", str(folder), "--ref", str(tmp_path / "ref.webp"), "--prompt", "", "--amf", "none", "--png"]
    assert main([*command, "--out", str(out), *FLAGS]) == 0
    assert read_video(out).shape == (9, 64, 96, 3)  # a folder of pictures, in order
    said = [json.loads(Image.open(out / "frame0000.png").info["Description"])]
    said.append(json.loads(Image.open(out / "preview.webp").getexif()[0x010E]))
    for label in said:
        assert label["ai_generated"] and label["ref"] == "ref.webp" and label["model"] == folder.name


@pytest.fixture
def no_table(monkeypatch):
    """Let --dry-run count no memory, which takes seconds."""
    monkeypatch.setattr(dry_run, "plan_memory", lambda *_: [MemoryPlan("none", "none", {"guide": 1.0})])


@pytest.mark.usefixtures("no_table")
def test_dry_run_loads_nothing(folder, capsys, monkeypatch):
    """The tiny model, which needs no name; a published one by its name; a folder."""
    monkeypatch.setattr(program, "load_wan", lambda *_, **__: pytest.fail("weights were loaded"))
    assert main(["--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "9 x 8 x 12 = 864" in out and "36 frame pairs" in out and "20 gradients for 50 latent updates" in out
    assert main(["--model", "Wan2.1-T2V-1.3B", "--dry-run", "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "21 x 30 x 52 = 32760" in out and "74 frame pairs" in out and "block 14 of 30" in out
    assert "50 steps, 100 passes, 28,300.2 TFLOP" in out and "17,536.7 TFLOP" in out
    assert main(["--model", str(folder), "--dry-run"]) == 0
    assert "custom" in (out := capsys.readouterr().out) and "block 2 of 6" in out


@pytest.mark.slow
def test_the_memory_of_the_published_model(capsys):
    assert main(["--model", "Wan2.1-T2V-1.3B", "--dry-run", "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    table = dict(re.findall(r"(\w+ +\w+)  +[\d.]+ +[\d.]+ +([\d.]+)", out))  # GB of the gradient, by way
    assert float(table["none      none"]) > 45 and float(table["blocks     block"]) < 8.2


def test_memory_chooses_and_says_so(folder, tmp_path, clip, capsys, monkeypatch):
    """From a budget to the arguments of transfer; what they do is tested above, what is foreseen in test_plan.py."""
    ways = [
        MemoryPlan("none", "none", {"guide": 50, "decode": 9}, 0.0),
        MemoryPlan("parts", "block", {"guide": 9, "decode": 11}, 0.0),
        MemoryPlan("blocks", "selective", {"guide": 8, "decode": 10}, 0.0),
    ]
    seen = {}

    def stop(*args, **options):
        seen.update(options)
        raise UserError("stop")

    monkeypatch.setattr(program, "plan_memory", lambda *_: ways)
    monkeypatch.setattr(fastvmt, "transfer", stop)
    files = ["--model", str(folder), "--ref", str(next(films(tmp_path, clip))), "--prompt", "a ball", *FLAGS]
    said = ("50.0 GB, to guide", "11.0 GB, to decode", "10.0 GB, to decode")
    for budget, way, stage in zip(("80", "24", "12"), ways, said):
        assert main([*files, "--memory", budget]) == 2
        assert (seen["offload_blocks"], seen["recompute"]) == (way.offload == "blocks", way.recompute)
        assert f"--offload {way.offload}, recompute {way.recompute}; at most {stage}" in capsys.readouterr().out
    for flags, message in (
        (["--memory", "8"], "got 8: try tiles (vae_tile=256)"),
        (["--memory", "8", "--offload"], "keep one"),
    ):
        assert main([*files, *flags]) == 2
        assert message in capsys.readouterr().err


def test_recomputing_for_lack_of_memory_is_said(folder, tmp_path, clip, capsys, monkeypatch):
    monkeypatch.setattr(transfer_module, "choose_recompute", lambda *_, **__: "selective")
    ref = next(films(tmp_path, clip))
    command = ["--model", str(folder), "--ref", str(ref), "--prompt", "a ball", *FLAGS, "--out", str(tmp_path / "run")]
    assert main(command) == 0
    assert "a gradient recomputed, to fit into memory: selective" in capsys.readouterr().out


def test_blocks_are_compiled_on_request(folder, tmp_path, clip, capsys, monkeypatch):
    """By a backend that says once that it fails, as one without a compiler does, then by one that works."""

    def backend(graph, inputs):
        raise RuntimeError("no compiler here\nand more")

    ways = [backend, lambda graph, inputs: graph.forward]
    monkeypatch.setattr(program, "compile_blocks", lambda dit: compile_blocks(dit, backend=ways.pop(0)))
    files = ["--model", str(folder), "--ref", str(next(films(tmp_path, clip))), "--prompt", "a ball", *FLAGS]
    runs = [[*files, "--out", str(tmp_path / name)] for name in ("failed", "compiled", "plain")]
    assert main([*runs[0], "--compile"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"error: cannot compile here, run without --compile \(.*no compiler here.*\)", said)
    assert main([*runs[1], "--compile"]) == 0 and main(runs[2]) == 0
    compiled, plain = (load_file(tmp_path / name / "latents.safetensors") for name in ("compiled", "plain"))
    torch.testing.assert_close(compiled["latents"], plain["latents"], rtol=1e-4, atol=1e-4)
    assert not ways
    assert json.loads((tmp_path / "compiled" / "run.json").read_text())["compile"]


@pytest.mark.usefixtures("no_table")
def test_every_option_can_be_set(capsys):
    knobs = "tau=3 tile=2,5 weights=1,0.5 block=7 window_anchor=self lr=0.01,0.005 negative="
    assert main(["--dry-run", "--model", "Wan2.1-T2V-14B", "--set", "span=2", "--set", *knobs.split()]) == 0
    assert "tiles 2x5" in (out := capsys.readouterr().out) and "block 7 of 40, 39 pairs" in out.replace("frame ", "")


def test_help_is_true(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    assert "(81; tiny 33)" in out and "latent updates per gradient (3)" in out and "multiple of 16 (480; tiny" in out
    for option in field_names(MotionConfig()):
        assert option in out


# Bad input: one line, exit code 2, nothing written.


def broken_checkpoint(folder, tmp_path, change):
    """A copy of the checkpoint whose DiT file is changed."""
    copy = tmp_path / "broken"
    shutil.copytree(folder, copy)
    change(copy / "diffusion_pytorch_model.safetensors")
    return copy


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1000])


def rewrite(edit):
    def change(file):
        tensors = load_file(file)
        with safe_open(file, framework="pt") as header:
            metadata = header.metadata()
        edit(tensors)
        save_file(tensors, file, metadata)

    return change


def drop(tensors):
    del tensors["blocks.1.ffn.0.weight"]


def reshape(tensors):
    tensors["blocks.1.ffn.0.weight"] = torch.ones(3, 3)


def expect(capsys, tmp_path, argv, message):
    out = tmp_path / "out"
    code = main([*argv, "--out", str(out), *FLAGS])
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert code == 2 and error.startswith("error: ") and message in error, error
    assert not out.exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "missing.mp4", "missing.mp4"),
        (lambda p: (p / "empty").mkdir() or p / "empty", "empty"),
        (lambda p: write_pictures(p / "one", 1), "1 frames"),
        (lambda p: (p / "text.mp4").write_text("hello") and p / "text.mp4", "ffmpeg"),
        (lambda p: (p / "text.gif").write_text("hello") and p / "text.gif", "text.gif"),
    ],
)
def test_bad_clips(folder, tmp_path, capsys, make, message):
    expect(capsys, tmp_path, ["--model", str(folder), "--ref", str(make(tmp_path)), "--prompt", "a cat"], message)


def write_pictures(path, count):
    path.mkdir()
    for number, frame in enumerate(make_clip(0).frames[:count, ::2, ::2]):
        Image.fromarray(frame).save(path / f"{number}.png")
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (truncate, "diffusion_pytorch_model.safetensors"),
        (rewrite(drop), "blocks.1.ffn.0.weight"),
        (rewrite(reshape), "blocks.1.ffn.0.weight"),
        (lambda file: file.unlink(), "diffusion_pytorch_model.safetensors"),
    ],
)
def test_bad_checkpoints(folder, tmp_path, clip, capsys, change, message):
    ref = write_pictures(tmp_path / "ref", 9)
    model = broken_checkpoint(folder, tmp_path, change)
    expect(capsys, tmp_path, ["--model", str(model), "--ref", str(ref), "--prompt", "a cat"], message)


def test_bad_requests(folder, tmp_path, capsys):
    ref = write_pictures(tmp_path / "ref", 9)
    good = ["--model", str(folder), "--ref", str(ref), "--prompt", "a cat"]
    expect(capsys, tmp_path, ["--model", str(tmp_path / "nowhere"), *good[2:]], "get diffusion_pytorch_model.safeten")
    expect(capsys, tmp_path, ["--model", "Wan2.1-T2V-1.3B", *good[2:]], "no folder Wan2.1-T2V-1.3B: get diffusion_py")
    expect(capsys, tmp_path, [*good, "--set", "frames=13"], "frames given twice, by a flag and by --set")
    expect(capsys, tmp_path, [*good, "--set", "alpha=0.1", "--set", "tau=0"], "tau must be above 0, got 0")
    expect(capsys, tmp_path, good[:4], "a transfer needs --ref CLIP and --prompt TEXT")
    expect(capsys, tmp_path, [*good, "--set", "window=wide"], "--set window needs a value like 21, got wide")
    expect(capsys, tmp_path, [*good, "--set", "color=red"], "--set needs one of height, width")
    expect(capsys, tmp_path, [*good, "--set", "tile=3"], "--set tile needs a value like (3, 4), got 3")
    expect(capsys, tmp_path, [*good, "--amf", "sparse"], "amf must be one of windowed, dense, none, got sparse")
    expect(capsys, tmp_path, [*good, "--set", "block=6"], "block must be at most 5, got 6")
    expect(capsys, tmp_path, [*good, "--compile", "--offload", "blocks"], "--compile needs blocks that stay on the de")


def test_a_device_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--device", "cuda"]) == 2
    assert "device cuda is not available here, choose one of: " in capsys.readouterr().err


def test_unwritable_output(folder, tmp_path, capsys):
    ref = write_pictures(tmp_path / "ref", 9)
    (tmp_path / "file").write_text("in the way")
    command = ["--model", str(folder), "--ref", str(ref), "--prompt", "a cat", *FLAGS]
    assert main([*command, "--out", str(tmp_path / "file" / "run")]) == 2
    assert "cannot write into" in capsys.readouterr().err
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert main([*command, "--out", str(tmp_path / "run")]) == 2
    assert "run already holds " in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize("argv", [["--nonsense"], ["--height", "big"], ["--frames", "many"]])
def test_unknown_flags_and_values(argv):
    done = subprocess.run([sys.executable, fastvmt.__file__, *argv], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_what_is_mended_is_said(folder, tmp_path, capsys):
    ref = write_pictures(tmp_path / "ref", 12)
    command = ["--model", str(folder), "--ref", str(ref), "--prompt", "", "--out", str(tmp_path / "out")]
    assert main([*command, "--height", "70", "--width", "100", "--frames", "80", "--steps", "2"]) == 0
    out = capsys.readouterr().out
    assert "note: height 70 becomes 64" in out and "note: width 100 becomes 96" in out
    assert "note: frames 80 becomes 81" in out and "is shorter than 81 frames, so 9 are used" in out
    assert "the prompt is empty" in out
    assert read_video(tmp_path / "out" / "preview.webp", fps=16).shape[0] == 9


@pytest.mark.usefixtures("no_table")
def test_a_folder_brings_its_own_options(folder, tmp_path, capsys):
    """motion.json of the folder given holds, also for a copy of the tiny model; without one, the tiny model's does."""
    copy = Path(shutil.copytree(demo.CHECKPOINT, tmp_path / "copy"))
    (copy / "motion.json").write_text(json.dumps({"clip": {"frames": 17}, "motion": {"steps": 7}}))
    assert main(["--model", str(copy), "--dry-run", "--height", "64", "--width", "96"]) == 0
    assert "of 7 steps" in (out := capsys.readouterr().out) and "17 frames of 96x64" in out
    (copy / "motion.json").unlink()
    assert main(["--model", str(copy), "--dry-run"]) == 0
    assert "guidance     5 of 25 steps" in capsys.readouterr().out
    (copy / "motion.json").write_text(json.dumps({"motion": {"step": 7}}))
    assert main(["--model", str(copy), "--dry-run"]) == 2
    assert "motion.json: motion needs one of steps" in capsys.readouterr().err
