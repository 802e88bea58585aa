"""`transfer` against notebook 10's loop, to the bit, and pass by pass: which latents, which noise level, which text."""

from dataclasses import dataclass, replace

import by_hand
import numpy as np
import pytest
import torch
from torch import Tensor

import wan_mini.transfer as transfer_module
from fastvmt import MotionConfig, transfer
from wan_mini import generate as generate_module
from wan_mini import prompts
from wan_mini.device.offload import on_device
from wan_mini.device.timing import StageTimer
from wan_mini.errors import UserError
from wan_mini.generate import generate
from wan_mini.load import Wan
from wan_mini.prompts import encode_prompts
from wan_mini.scheduler import FlowEuler
from wan_mini.tiny.world import make_clip
from wan_mini.video import to_tensor

CPU = torch.device("cpu")
PROMPT, NEGATIVE, SEED = "a ball", "a dog", 3
SMALL = MotionConfig(steps=4, shift=3.0, cfg=4.0, negative=NEGATIVE, guidance_fraction=0.5, optim_steps=4)
SMALL = replace(SMALL, tau=3.0, tile=(2, 3), window=3, lr=(0.02, 0.005))


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    return make_clip(0).frames[:9, ::2, ::2].copy()  # (9, 64, 96, 3)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("reference", ["clean", "noised"])
def test_it_is_the_notebooks_loop_to_the_bit(wan, clip, reference, seed):
    config = replace(SMALL, reference=reference)
    latents, losses, frames = by_hand.notebook.transfer_by_hand(wan, clip, PROMPT, config, seed=seed)
    result = transfer(wan, clip, PROMPT, config, seed=seed)
    assert torch.equal(result.latents, latents)
    assert result.report["losses"] == losses and result.report["gradients"] == 4
    assert np.array_equal(result.frames, frames)


OTHERS = [{"amf": "dense"}, {"window_anchor": "noised"}, {"window_anchor": "self"}, {"strength": 0.6}]
OTHERS += [{"centroid": "soft", "tau": 60.0}]  # at 3, a random model's soft centers are all in the middle


@pytest.mark.parametrize("reference", ["clean", "noised"])
@pytest.mark.parametrize("changes", OTHERS)
def test_it_is_the_same_loop_for_every_choice(wan, clip, reference, changes):
    config = replace(SMALL, reference=reference, steps=2, **changes)
    latents, losses, _ = by_hand.transfer(wan, clip, PROMPT, config, seed=SEED)
    result = transfer(wan, clip, PROMPT, config, seed=SEED)
    assert torch.equal(result.latents, latents) and result.report["losses"] == losses


def test_one_frame_is_no_motion(wan, clip):
    with pytest.raises(UserError, match="motion needs two latent frames, got 1: give a clip of 5 frames or more"):
        transfer(wan, clip[:1], PROMPT, SMALL, seed=SEED)


def test_each_stored_flow_is_of_its_own_clip(wan, clip):
    result = transfer(wan, clip, PROMPT, SMALL, seed=SEED)
    with torch.no_grad():
        z_ref = wan.vae.encode(to_tensor(clip))
    assert torch.equal(result.flows[0], by_hand.clip_flow(wan, z_ref, SMALL))
    assert torch.equal(result.flows[1], by_hand.clip_flow(wan, result.latents, SMALL))
    assert not torch.equal(*result.flows)


@dataclass
class Pass:
    """One forward of the transformer, with what it got."""

    kind: str  # "qk" or "velocity"
    latents: Tensor
    timestep: float
    text: Tensor


def passes_of(wan, clip, config, seed=SEED) -> list[Pass]:
    """Every forward of the transformer in a transfer, in order."""
    seen = []

    def note(module, inputs, keywords, output):
        latents, timestep, text = inputs
        kind = "qk" if isinstance(output, tuple) else "velocity"
        seen.append(Pass(kind, latents.detach().clone(), timestep.item(), text))

    handle = wan.dit.register_forward_hook(note, with_kwargs=True)
    try:
        transfer(wan, clip, PROMPT, config, seed=seed)
    finally:
        handle.remove()
    return seen


def inputs_by_hand(wan, clip, config):
    """The texts by name, the clean reference, the start noise, and the levels."""
    words = {"prompt": PROMPT, "negative": NEGATIVE, "nothing": ""}
    texts = dict(zip(words, encode_prompts(wan, list(words.values()), CPU), strict=True))
    with torch.no_grad():
        z_ref = wan.vae.encode(to_tensor(clip))
    noise = torch.randn(z_ref.shape, generator=torch.Generator().manual_seed(SEED))
    return texts, z_ref, noise, FlowEuler(config.steps, config.shift)


def name_of(text: Tensor, texts: dict[str, Tensor]) -> str:
    """Which of the texts this is."""
    return next(name for name, other in texts.items() if other.shape == text.shape and torch.equal(other, text))


@pytest.mark.parametrize("reference", ["clean", "noised"])
def test_every_pass_gets_its_level_and_its_text(wan, clip, reference):
    """The reference is read without a prompt, at t = 0 and then as noisy as the latent; the latent with its prompt."""
    config = replace(SMALL, reference=reference, interval=2)
    texts, _, _, scheduler = inputs_by_hand(wan, clip, config)
    wanted = [("qk", 0.0, "nothing")]
    for index, t in enumerate(scheduler.timesteps.tolist()):
        if index < 2:  # half of four steps, the first ones
            wanted += [("qk", t, "nothing")] if reference == "noised" else []
            wanted += [("qk", t, "prompt")] * 2
        wanted += [("velocity", t, "prompt"), ("velocity", t, "negative")]
    wanted += [("qk", 0.0, "nothing")] * 2  # the flows that are stored
    seen = passes_of(wan, clip, config)
    assert [(one.kind, one.timestep, name_of(one.text, texts)) for one in seen] == wanted


def test_the_reference_carries_the_steps_noise(wan, clip):
    config = replace(SMALL, reference="noised")
    texts, z_ref, noise, scheduler = inputs_by_hand(wan, clip, config)
    seen = passes_of(wan, clip, config)
    read = [one for one in seen if one.kind == "qk" and name_of(one.text, texts) == "nothing"]
    assert torch.equal(read[0].latents, z_ref)  # the windows' centers
    for one, sigma in zip(read[1:3], scheduler.sigmas[:2], strict=True):
        assert torch.equal(one.latents, (1 - sigma) * z_ref + sigma * noise)
    assert torch.equal(read[3].latents, z_ref) and not torch.equal(read[4].latents, z_ref)


def test_rates_go_from_the_first_to_the_second(wan, clip):
    """Adam's update with one gradient is its rate, whatever the gradient; so the first of two rates shows alone."""
    for updates, move in ((1, 0.02), (2, 0.02 + 0.005)):
        config = replace(SMALL, steps=1, guidance_fraction=1.0, optim_steps=updates, interval=2, lr=(0.02, 0.005))
        _, _, noise, _ = inputs_by_hand(wan, clip, config)
        after = next(one for one in passes_of(wan, clip, config) if one.kind == "velocity").latents
        assert (after - noise).abs().median().item() == pytest.approx(move, rel=1e-3)


def test_without_guidance_only_the_stored_flows_are_read(wan, clip):
    seen = passes_of(wan, clip, replace(SMALL, amf="none", steps=2))
    assert [one.kind for one in seen] == ["velocity"] * 4 + ["qk"] * 2
    once = passes_of(wan, clip, replace(SMALL, amf="none", steps=2, cfg=1.0))
    assert [one.kind for one in once] == ["velocity"] * 2 + ["qk"] * 2


def test_the_result_is_there_before_it_is_decoded(wan, clip):
    """So that a run which fails to decode has lost nothing."""
    before = []
    timer = StageTimer(CPU)
    result = transfer(
        wan,
        clip,
        PROMPT,
        replace(SMALL, steps=1),
        timer=timer,
        on_latents=lambda result: before.append((result.frames, result.latents, set(timer.table))),
    )
    assert len(before) == 1 and before[0][0] is None and torch.equal(before[0][1], result.latents)
    assert before[0][2] == {"text", "encode", "move", "guide", "denoise", "flows"}
    assert set(timer.table) == before[0][2] | {"decode"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frames_are_decoded_in_the_models_dtype_and_in_its_tiles(wan, clip, monkeypatch, dtype):
    seen = []
    monkeypatch.setattr(Wan, "dtype", dtype)
    monkeypatch.setattr(transfer_module, "decode", lambda vae, latents, **options: seen.append(options))
    transfer(wan, clip, PROMPT, replace(SMALL, steps=1, vae_tile=64))
    assert seen == [{"tile": 64, "dtype": dtype}]


# Where it works.

HERE = torch.device("cpu", 0)  # the same place as "cpu", but unequal to it


@pytest.mark.parametrize(("device", "expected"), [(None, HERE), ("cpu", CPU), (CPU, CPU)])
def test_it_runs_where_it_is_told_and_else_where_the_model_is(wan, clip, monkeypatch, device, expected):
    """Every part of a model that somebody else has loaded, and everything that is made for it."""
    devices, recomputes = {}, []

    def note(module, place, **options):
        devices.setdefault(type(module).__name__, []).append(place)
        return on_device(module, place, **options)

    def choose(dit, shape, gradient, place, **options):
        recomputes.append(place)
        return "none"

    monkeypatch.setattr(Wan, "device", HERE)
    monkeypatch.setattr(prompts, "on_device", note)
    monkeypatch.setattr(transfer_module, "on_device", note)
    monkeypatch.setattr(transfer_module, "choose_recompute", choose)
    transfer(wan, clip, PROMPT, replace(SMALL, steps=1), device=device)
    assert devices == {"UMT5Encoder": [expected], "WanVAE": [expected] * 2, "WanDiT": [expected]}
    assert recomputes == [expected]


def test_only_blocks_at_work_are_there(wan, clip, monkeypatch):
    offloaded = {}

    def note(module, place, **options):
        offloaded[type(module).__name__] = options.get("offload_blocks", False)
        return on_device(module, place, **options)

    monkeypatch.setattr(prompts, "on_device", note)
    monkeypatch.setattr(transfer_module, "on_device", note)
    for blocks in (True, False):
        transfer(wan, clip, PROMPT, replace(SMALL, steps=1), offload_blocks=blocks)
        assert offloaded == {"UMT5Encoder": blocks, "WanVAE": False, "WanDiT": blocks}


@pytest.mark.parametrize(("device", "expected"), [(None, HERE), (CPU, CPU)])
def test_so_does_plain_generation(wan, monkeypatch, device, expected):
    devices = {}

    def note(module, place, **options):
        devices[type(module).__name__] = place
        return on_device(module, place, **options)

    monkeypatch.setattr(Wan, "device", HERE)
    monkeypatch.setattr(prompts, "on_device", note)
    monkeypatch.setattr(generate_module, "on_device", note)
    scheduler = FlowEuler(1, 3.0)
    generate(wan, PROMPT, size=(32, 32), frames=5, scheduler=scheduler, cfg=1.0, seed=0, device=device)
    assert devices == {"UMT5Encoder": expected, "WanDiT": expected}
