"""Wan 2.2's two experts behind one module: who is called when, from every layout; and what is refused."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import random_checkpoint
from safetensors.torch import load_file, save_file

from fastvmt import MotionConfig, transfer
from wan_mini import load
from wan_mini.device.memory import weight_bytes
from wan_mini.device.offload import on_device
from wan_mini.errors import MissingFile, UserError
from wan_mini.experts import Experts
from wan_mini.generate import preset
from wan_mini.inspect import inspect
from wan_mini.load import load_dit, load_wan
from wan_mini.lora_files import LoraFile
from wan_mini.peers.guidance import check_one_transformer, stream_before
from wan_mini.pipeline import denoise
from wan_mini.prompts import encode_prompts
from wan_mini.scheduler import FlowEuler

FP32 = {"device": "cpu", "dtype": torch.float32}
DIT = "diffusion_pytorch_model.safetensors"
FOLDERS = {"original": ("high_noise_model", "low_noise_model"), "diffusers": ("transformer", "transformer_2")}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Two models that differ in their weights."""
    root = tmp_path_factory.mktemp("two")
    return [random_checkpoint(root / name, seed) for name, seed in (("high", 1), ("low", 2))]


@pytest.fixture(scope="module")
def pair(originals, tmp_path_factory):
    """A folder as Wan-AI/Wan2.2-T2V-A14B: the first model with both transformers."""
    return write_pair(originals, tmp_path_factory.mktemp("pair") / "A14B", "original")


def write_pair(originals, folder, layout, boundary=None):
    shutil.copytree(originals[0], folder)
    for source, name in zip(originals, FOLDERS[layout], strict=True):
        (folder / name).mkdir()
        shutil.copy(source / DIT, folder / name / DIT)
        shutil.copy(source / "config.json", folder / name)
    (folder / DIT).unlink()
    if boundary is not None:
        (folder / "model_index.json").write_text(json.dumps({"boundary_ratio": boundary}))
    return folder


def inputs(timestep: float):
    random = torch.Generator().manual_seed(0)
    return (
        torch.randn(1, 16, 2, 4, 6, generator=random),
        torch.tensor([timestep]),
        torch.randn(1, 5, 16, generator=random),
    )


@pytest.mark.parametrize(("layout", "boundary"), [("original", None), ("diffusers", 0.9)])
@torch.no_grad()
def test_the_timestep_decides(layout, boundary, originals, tmp_path):
    """At the boundary and above it the first, below it the second; Diffusers' boundary is that of its model_index."""
    wan = load_wan(write_pair(originals, tmp_path / "pair", layout, boundary), **FP32)
    high, low = (load_dit(folder, **FP32) for folder in originals)
    limit = 1000 * (boundary or 0.875)
    for timestep, expert in ((1000.0, high), (limit, high), (limit - 0.1, low), (0.0, low)):
        assert torch.equal(wan.dit(*inputs(timestep)), expert(*inputs(timestep)))
        for got, expected in zip(wan.dit(*inputs(timestep), qk_block=2), expert(*inputs(timestep), qk_block=2)):
            assert torch.equal(got, expected)
    assert not torch.equal(high(*inputs(limit)), low(*inputs(limit)))
    with pytest.raises(UserError, match="must be for one expert"):
        wan.dit.at(torch.tensor([1000.0, 1.0]))
    assert len(wan.hashes) == 4 and wan.name == "custom"


@torch.no_grad()
def test_sampling_is_the_loop_with_both(originals, pair):
    wan = load_wan(pair, **FP32)
    high, low = (load_dit(folder, **FP32) for folder in originals)
    scheduler = FlowEuler(6, 5.0)
    text, negative = encode_prompts(wan, ["a ball", "a dog"], torch.device("cpu"))
    noise = inputs(0)[0]
    got = denoise(wan.dit, noise, scheduler, text, negative, 3.0)
    used, x = [], noise
    for index, timestep in enumerate(scheduler.timesteps):
        used.append(bool(timestep >= 875))
        expert = high if used[-1] else low
        c, u = (expert(x, timestep.reshape(1), prompt) for prompt in (text, negative))
        x = x + (scheduler.sigmas[index + 1] - scheduler.sigmas[index]) * (u + 3.0 * (c - u))
    assert set(used) == {True, False}
    torch.testing.assert_close(got, x, rtol=1e-5, atol=1e-5)


def test_guidance_falls_to_the_high_noise_expert(pair):
    """Every gradient and every noised reference; only the clean clips are read by the other one."""
    wan = load_wan(pair, **FP32)
    calls = {"high_noise": [], "low_noise": []}
    for name, timesteps in calls.items():
        getattr(wan.dit, name).register_forward_pre_hook(
            lambda module, args, kwargs, seen=timesteps: seen.append((args[0].requires_grad, args[1].item())),
            with_kwargs=True,
        )
    config = MotionConfig(steps=5, shift=7.0, guidance_fraction=0.4, optim_steps=2, interval=1, window=3)
    clip = np.random.default_rng(0).integers(0, 255, (9, 32, 48, 3), dtype=np.uint8)
    result = transfer(wan, clip, "a ball", config)
    gradients = [timestep for with_gradient, timestep in calls["high_noise"] if with_gradient]
    assert len(gradients) == result.report["gradients"] == 4 and min(gradients) > 875
    assert not any(with_gradient for with_gradient, _ in calls["low_noise"])
    assert {timestep for _, timestep in calls["low_noise"] if timestep == 0} == {0}


@torch.no_grad()
def test_offloaded_blocks_give_the_same_bits(pair):
    wan = load_wan(pair, **FP32)
    expected = [wan.dit(*inputs(timestep)) for timestep in (990.0, 10.0)]
    with on_device(wan.dit, torch.device("cpu"), offload_blocks=True):
        got = [wan.dit(*inputs(timestep)) for timestep in (990.0, 10.0)]
    assert all(torch.equal(a, b) for a, b in zip(got, expected))
    assert len(wan.dit.blocks) == 12
    sizes = weight_bytes({"dit": wan.dit}, "blocks")["dit"], weight_bytes({"dit": wan.dit}, "parts")["dit"]
    block = sum(parameter.nbytes for parameter in wan.dit.blocks[0].parameters())
    assert sizes[1] - sizes[0] == 6 * block  # three of each expert's six stay


def test_a_lora_for_one_expert(pair, tmp_path):
    plain = load_wan(pair, **FP32)
    key = "diffusion_model.blocks.0.self_attn.q.diff_b"
    for name in ("x_high_noise.safetensors", "x_LOW-noise.safetensors", "both.safetensors"):
        save_file({key: torch.ones(48)}, tmp_path / name)
    for name, changed in (("x_high_noise", [1, 0]), ("x_LOW-noise", [0, 1]), ("both", [1, 1])):
        wan = load_wan(pair, **FP32, loras=[LoraFile(tmp_path / f"{name}.safetensors")])
        for expert, change in zip(("high_noise", "low_noise"), changed, strict=True):
            before, after = (getattr(w.dit, expert).blocks[0].self_attn.q.bias for w in (plain, wan))
            torch.testing.assert_close(after, before + change)


def test_one_expert_alone_is_refused(originals, tmp_path):
    folder = write_pair(originals, tmp_path / "pair", "original")
    shutil.rmtree(folder / "low_noise_model")
    with pytest.raises(MissingFile, match="no low-noise expert in .* get low_noise_model/ of Wan-AI/Wan2.2-T2V-A14B"):
        load_wan(folder, **FP32)
    folder = write_pair(originals, tmp_path / "other", "original")
    shutil.rmtree(folder / "high_noise_model")
    with pytest.raises(MissingFile, match="no dit in"):
        load_wan(folder, **FP32)
    folder = write_pair(originals, tmp_path / "third", "diffusers", 0.875)
    shutil.rmtree(folder / "transformer_2")
    with pytest.raises(MissingFile, match="no low-noise expert"):
        load_wan(folder, **FP32)
    for number, boundary in enumerate((0, 1.5, "high", True)):
        folder = write_pair(originals, tmp_path / f"boundary{number}", "diffusers", boundary)
        with pytest.raises(UserError, match="boundary_ratio must be a number between 0 and 1"):
            load_wan(folder, **FP32)


def test_experts_of_two_sizes_are_refused(originals):
    high = load_dit(originals[0], **FP32)
    low = load_dit(originals[1], **FP32)
    low.config = replace(low.config, num_heads=4)
    with pytest.raises(UserError, match="two experts must have one size"):
        Experts(high, low, 0.875)


def test_methods_that_hook_blocks_refuse_two_experts_and_shared_tokens(originals):
    """Their hooks would see the high-noise expert alone, or a part of the tokens."""
    high = load_dit(originals[0], **FP32)
    check_one_transformer(high)
    with pytest.raises(UserError, match="reads the blocks of one transformer"):
        check_one_transformer(Experts(high, load_dit(originals[1], **FP32), 0.875))
    latents, text = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 3, high.config.text_dim)
    high.ranks = SimpleNamespace(name="cfg,sequence")
    with pytest.raises(UserError, match="needs all tokens in each process, got --parallel cfg,sequence"):
        stream_before(high, 1, latents, torch.tensor(500.0), text)


def test_inspect_names_both(pair, capsys):
    assert inspect(pair)
    assert "[ok]      low_noise_dit: original names" in capsys.readouterr().out


def test_the_published_defaults(tmp_path):
    config = preset("Wan2.2-T2V-A14B", tmp_path)
    assert (config.shift, config.cfg) == (12.0, 4.0)
    with torch.device("meta"):
        dits = [load.WanDiT(load.T2V_14B) for _ in range(2)]
    assert load._model_name({"dit": Experts(*dits, 0.875)}) == "Wan2.2-T2V-A14B"


# Other models, refused by name.


def edited(folder, tmp_path, edit):
    tensors = load_file(folder / DIT)
    edit(tensors)
    save_file(tensors, tmp_path / "dit.safetensors", {"config": json.dumps({"dim": 48, "num_heads": 2})})
    return tmp_path / "dit.safetensors"


def channels(taken: int, given: int):
    def edit(tensors):
        tensors["patch_embedding.weight"] = torch.randn(48, taken, 1, 2, 2)
        tensors["head.head.weight"], tensors["head.head.bias"] = torch.randn(4 * given, 48), torch.randn(4 * given)

    return edit


OTHERS = {
    "vace": (lambda t: t.update({"vace_blocks.0.self_attn.q.weight": torch.ones(3, 3)}), "is VACE"),
    "i2v 2.1": (
        lambda t: t.update({"blocks.0.cross_attn.k_img.weight": torch.ones(3, 3)}),
        r"is an image-to-video model \(I2V or",
    ),
    "i2v 2.2": (channels(36, 16), "takes 36 channels and gives 16, so it is an image-to-video"),
    "5B": (channels(48, 48), "is TI2V-5B of Wan 2.2"),
    "animate": (lambda t: t.update({"face_adapter.fuser_blocks.0.k": torch.ones(3, 3)}), "is Wan-Animate"),
    "speech": (lambda t: t.update({"casual_audio_encoder.weights": torch.ones(3, 3)}), "is S2V"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_models_are_refused_by_name(case, originals, tmp_path):
    edit, pattern = OTHERS[case]
    with pytest.raises(UserError, match=f"dit.safetensors {pattern}.*only text-to-video models") as caught:
        load_dit(edited(originals[0], tmp_path, edit), **FP32)
    assert "\n" not in str(caught.value)


def test_a_vae_of_5b_is_refused_by_name(tmp_path):
    nested = {
        "encoder.conv1.weight": torch.ones(4, 12),
        "encoder.downsamples.0.downsamples.0.residual.2.weight": torch.ones(3),
    }
    save_file(nested, tmp_path / "vae.safetensors")
    with pytest.raises(UserError, match=r"vae.safetensors is the VAE of Wan 2.2's 5B model"):
        load.load_vae(tmp_path / "vae.safetensors", **FP32)


def test_gguf_is_refused_by_name(originals, tmp_path):
    """As a file, in a folder, and under another name."""
    for name in ("wan.gguf", "renamed.safetensors"):
        (tmp_path / name).write_bytes(b"GGUF" + bytes(60))
        with pytest.raises(UserError, match=f"{name} is a GGUF file"):
            load_dit(tmp_path / name, **FP32)
    (tmp_path / "renamed.safetensors").unlink()
    with pytest.raises(MissingFile, match="no dit in .*, wan.gguf is a GGUF file, which cannot be read here: get"):
        load_dit(tmp_path, **FP32)
    folder = shutil.copytree(originals[0], tmp_path / "model")
    shutil.copy(tmp_path / "wan.gguf", folder)
    assert load_wan(folder, **FP32).name == "custom"  # beside a whole model it does no harm
