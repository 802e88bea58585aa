"""WanVAE against the original's recorded output, against Diffusers, and against itself: chunks, time, tiles, dtypes."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import DATA, error, golden, weights
from diffusers import AutoencoderKLWan

from wan_mini.config import TINY_VAE, WAN_VAE, VAEConfig
from wan_mini.errors import UserError
from wan_mini.tiling import apply_in_chunks, tile_slices
from wan_mini.vae import CausalConv3d, WanVAE


@pytest.fixture(scope="module")
def recorded():
    return golden("vae")


@pytest.fixture(scope="module")
def vae(recorded):
    """The recorded tiny model, with its own statistics."""
    mean, std = (tuple(recorded[name].tolist()) for name in ("in/mean", "in/std"))
    vae = WanVAE(replace(TINY_VAE, mean=mean, std=std)).requires_grad_(False)
    vae.load_state_dict(weights(recorded))
    return vae


def random_vae(dim_mult=(1, 2, 4, 4), num_res_blocks=1):
    torch.manual_seed(0)
    vae = WanVAE(VAEConfig(dim=8, dim_mult=dim_mult, num_res_blocks=num_res_blocks))
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):  # all ones by default, which would hide a forgotten gain
            parameter.data.normal_(1, 0.3)
    return vae.requires_grad_(False)


def random_video(*shape):
    """A clip of smooth, moving blobs."""
    coarse = torch.randn(*shape[:2], 3, shape[3] // 8, shape[4] // 8, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, size=shape[2:], mode="trilinear").clamp(-1, 1)


def random_latents(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def tensors_in(cache):
    if isinstance(cache, list):
        return [tensor for entry in cache for tensor in tensors_in(entry)]
    return [] if cache is None else [cache]


# The original


def test_equals_the_recorded_original(vae, recorded):
    assert error(vae.encode(recorded["in/video"]), recorded["out/latents"]) <= 1e-5
    assert error(vae.decode(recorded["out/latents"]), recorded["out/video"]) <= 1e-5


def test_full_size_has_the_names_and_shapes_of_the_official_checkpoint():
    with torch.device("meta"):
        state = WanVAE(WAN_VAE).state_dict()
    manifest = json.loads((DATA / "manifests/wan2.1.vae.official.json").read_text())["tensors"]
    assert {name: list(tensor.shape) for name, tensor in state.items()} == manifest


def diffusers_twin(vae):
    """Diffusers' model with our weights. Both register them in one order, but for the attention in the middle."""
    names = list(vae.state_dict())
    for part in ("encoder", "decoder"):
        attention = [name for name in names if name.startswith(f"{part}.middle.1.")]
        names = [name for name in names if name not in attention]
        first = names.index(f"{part}.middle.0.residual.0.gamma")
        names[first:first] = attention
    config = vae.config
    twin = AutoencoderKLWan(
        base_dim=config.dim, dim_mult=list(config.dim_mult), num_res_blocks=config.num_res_blocks
    ).requires_grad_(False)
    twin.load_state_dict(dict(zip(twin.state_dict(), map(vae.state_dict().get, names), strict=True)))
    return twin.eval()


@pytest.mark.parametrize(
    ("dim_mult", "num_res_blocks", "shape"),
    [
        ((1, 2, 4, 4), 1, (2, 3, 5, 24, 40)),
        ((1, 1, 2, 2), 2, (1, 3, 13, 16, 24)),
        ((1, 2, 2, 3), 1, (1, 3, 9, 40, 24)),
        ((2, 1, 3, 1), 2, (1, 3, 1, 8, 8)),
    ],
)
def test_equals_diffusers(dim_mult, num_res_blocks, shape):
    vae = random_vae(dim_mult, num_res_blocks)
    twin = diffusers_twin(vae)
    mean, std = torch.tensor([WAN_VAE.mean, WAN_VAE.std])[:, :, None, None, None]
    video = random_video(*shape)
    latents = vae.encode(video)
    assert error(latents, (twin.encode(video).latent_dist.mode() - mean) / std) <= 1e-5
    latents = random_latents(*latents.shape)
    video = vae.decode(latents)
    assert video.shape == shape
    assert error(video.clamp(-1, 1), twin.decode(latents * std + mean).sample) <= 1e-5


# Time


def test_chunks_equal_the_whole_clip(vae):
    video, latents = random_video(1, 3, 13, 16, 24), random_latents(1, 16, 4, 2, 3)
    for network, clip, chunkings, shape in (
        (vae.encoder, video, ([1, 12], [1, 4, 4, 4], [1, 8, 4]), (1, 32, 4, 2, 3)),
        (vae.decoder, latents, ([1, 3], [1, 1, 1, 1], [1, 1, 2]), (1, 3, 13, 16, 24)),
    ):
        whole, *others = (apply_in_chunks(network, clip, chunks, shape, None, None) for chunks in chunkings)
        for other in others:
            assert error(other, whole) <= 1e-5


def test_the_future_changes_no_earlier_frame(vae):
    video, latents = random_video(1, 3, 13, 16, 16), random_latents(1, 16, 4, 2, 2)
    changed = video.clone()
    changed[:, :, 9:] += 1
    before, after = vae.encode(video), vae.encode(changed)
    assert torch.equal(before[:, :, :3], after[:, :, :3]) and not torch.allclose(before[:, :, 3], after[:, :, 3])
    changed = latents.clone()
    changed[:, :, 2:] += 1
    before, after = vae.decode(latents), vae.decode(changed)
    assert torch.equal(before[:, :, :5], after[:, :, :5]) and not torch.allclose(before[:, :, 5], after[:, :, 5])


def test_an_image_is_a_clip_of_one_frame(vae):
    video, latents = random_video(1, 3, 5, 16, 16), random_latents(1, 16, 2, 2, 2)
    assert error(vae.encode(video[:, :, :1]), vae.encode(video)[:, :, :1]) < 1e-6
    assert error(vae.decode(latents[:, :, :1]), vae.decode(latents)[:, :, :1]) < 1e-6


@pytest.mark.parametrize(("part", "channels", "length"), [("encoder", 3, 4), ("decoder", 16, 1)])
def test_memory_does_not_grow_with_the_clip(vae, part, channels, length):
    cache, sizes = None, set()
    for frames in [1] + 5 * [length]:
        _, cache = getattr(vae, part)(random_latents(1, channels, frames, 8, 8), cache)
        kept = tensors_in(cache)
        sizes.add(sum(tensor.nbytes for tensor in kept))
        sizes.add(sum(tensor.untyped_storage().nbytes() for tensor in kept))  # more, if one is a view of a chunk
    assert len(sizes) == 1


def test_modules_keep_no_state_so_two_clips_can_take_turns(vae):
    attributes = {name: set(vars(module)) for name, module in vae.named_modules()}
    clips = [random_latents(1, 16, 3, 2, 2), -random_latents(1, 16, 3, 2, 2)]
    caches, frames = [None, None], [[], []]
    for i in range(3):
        for j, clip in enumerate(clips):
            y, caches[j] = vae.decoder(clip[:, :, i : i + 1], caches[j])
            frames[j].append(y)
    for clip, got in zip(clips, frames):
        assert torch.equal(
            torch.cat(got, dim=2), apply_in_chunks(vae.decoder, clip, [1] * 3, (1, 3, 9, 16, 16), None, None)
        )
    assert attributes == {name: set(vars(module)) for name, module in vae.named_modules()}
    assert not list(vae.buffers())


# Space


@pytest.mark.parametrize(("source", "target"), [(112, 112), (112, 14), (14, 112)])
def test_tiles_blend_linearly(source, target):
    (_, first, weight), (source_slice, second, other_weight) = tile_slices(source, target, 64)  # pixels 0-64 and 48-112
    overlap = 16 * target // 112
    ramp = (torch.arange(overlap) + 0.5) / overlap
    assert source_slice == slice(48 * source // 112, source)
    assert (first, second) == (slice(0, 64 * target // 112), slice(48 * target // 112, target))
    flat = torch.ones(48 * target // 112)
    torch.testing.assert_close(weight, torch.cat([flat, 1 - ramp]))
    torch.testing.assert_close(other_weight, torch.cat([ramp, flat]))


@pytest.mark.parametrize("side", [8, 32, 40, 64, 72, 88, 104, 480, 832])
def test_tiles_cover_any_side_and_weigh_one(side):
    for source, target in ((side, side // 8), (side // 8, side)):
        total = torch.zeros(target)
        for before, after, weight in tile_slices(source, target, 32):
            assert (before.start * target, before.stop * target) == (after.start * source, after.stop * source)
            assert (after.stop - after.start) * side == min(32, side) * target
            assert (weight > 0).all()
            total[after] += weight
        torch.testing.assert_close(total, torch.ones(target))
    ((_, _, weight),) = tile_slices(side, side, None)
    assert torch.equal(weight, torch.ones(side))


@pytest.mark.parametrize("size", [(64, 112), (112, 64)])
def test_tiles_are_near_the_whole_and_leave_no_seam(vae, size):
    """In standard deviations of the whole: the error's rms, and the rms of its steps across the worst line of pixels.

    Measured for the two sizes: encode 0.072 and 0.075, decode 0.111 and 0.134, steps 0.19 and 0.23. (Untrained weights
    are a hard case.) Equal weights in the overlap give 0.098 and 0.102, 0.138 and 0.172, 0.55 and 0.54; no overlap
    gives 0.131 and 0.119, 0.166 and 0.207, 0.77 and 0.92.
    """
    video = random_video(1, 3, 5, *size)
    latents = vae.encode(video)
    difference = (vae.encode(video, tile=64) - latents) / latents.std()
    assert 0 < difference.square().mean().sqrt() < 0.085
    whole = vae.decode(latents)
    difference = (vae.decode(latents, tile=64) - whole) / whole.std()
    assert 0 < difference.square().mean().sqrt() < 0.15
    across = difference.movedim(3 if size[0] > 64 else 4, 0)  # the axis that is cut, first
    assert across.diff(dim=0).flatten(1).square().mean(dim=1).sqrt().max() < 0.35
    assert torch.equal(vae.decode(latents[:, :, :1], tile=128), whole[:, :, :1])


# Numbers and edges


def test_gradients_reach_the_input_and_every_weight():
    vae = random_vae().requires_grad_()
    video = random_video(1, 3, 5, 40, 16).requires_grad_()
    vae.decode(vae.encode(video, tile=32), tile=32).square().mean().backward()
    assert video.grad.abs().amax(dim=(0, 1, 3, 4)).gt(0).all()  # every frame
    assert [name for name, weight in vae.named_parameters() if not weight.grad.abs().max() > 0] == []


def test_bfloat16_weights_take_and_return_float32(vae):
    latents = random_latents(1, 16, 2, 2, 2)
    video = vae.decode(latents)
    half = WanVAE(vae.config).to(torch.bfloat16)
    half.load_state_dict(vae.state_dict())
    with torch.no_grad():
        half_video, half_latents = half.decode(latents), half.encode(video.to(torch.bfloat16))
    assert half_video.dtype == half_latents.dtype == torch.float32
    assert error(half_video, video) < 0.04  # measured 0.017, bfloat16 has a resolution of 0.008
    assert error(half_latents, vae.encode(video)) < 0.02


def test_progress_wraps_every_step(vae):
    seen = []

    def progress(steps):
        seen.append(len(steps))
        return steps

    vae.encode(random_video(1, 3, 9, 40, 16), progress=progress)
    vae.decode(random_latents(1, 16, 2, 5, 2), tile=32, progress=progress)
    assert seen == [3, 2 * 2]  # chunks; tiles times latent frames


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 4, 16, 16), "4k+1 frames and sides in multiples of 8, got 4 frames of 16x16"),
        ((1, 3, 5, 16, 20), "got 5 frames of 16x20"),
        ((1, 3, 5, 12, 16), "got 5 frames of 12x16"),
        ((1, 4, 5, 16, 16), "video must be (batch, 3, frames, height, width), got (1, 4, 5, 16, 16)"),
        ((3, 5, 16, 16), "got (3, 5, 16, 16)"),
        ((1, 3, 0, 16, 16), "got (1, 3, 0, 16, 16)"),
    ],
)
def test_encode_names_a_wrong_shape(vae, shape, message):
    with pytest.raises(UserError) as caught:
        vae.encode(torch.zeros(shape))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_decode_names_a_wrong_shape(vae):
    with pytest.raises(UserError, match=r"latents must be \(batch, 16, frames, height, width\), got \(1, 3, 2, 2, 2\)"):
        vae.decode(torch.zeros(1, 3, 2, 2, 2))


@pytest.mark.parametrize("tile", [0, -32, 40])
def test_a_wrong_tile_is_named(vae, tile):
    with pytest.raises(UserError, match=f"multiple of 32 pixels.*got {tile}"):
        vae.decode(torch.zeros(1, 16, 1, 2, 2), tile=tile)


def test_wrong_levels_are_named():
    with pytest.raises(UserError, match=r"4 levels.*got \(1, 2\)"):
        WanVAE(VAEConfig(dim_mult=(1, 2)))


@pytest.mark.parametrize(("kernel", "stride"), [((3, 3, 3), 1), ((3, 1, 1), 1), ((3, 1, 1), 2)])
def test_causal_convolution_is_the_3d_convolution(kernel, stride):
    """What runs on a CPU against what runs elsewhere: PyTorch's own 3D convolution after cached frames or zeros."""
    conv, x = CausalConv3d(3, 4, kernel, stride), torch.randn(2, 3, 4, 5, 6)
    zeros, cached = torch.zeros(2, 3, 3 - stride, 5, 6), torch.randn(2, 3, 3 - stride, 5, 6)
    for frames, before in ((x, cached), (x, None), *([(x[:, :, :1], None)] if stride == 1 else [])):
        whole = torch.cat([zeros if before is None else before, frames], dim=2)
        y, after = conv(frames, before)
        assert error(y, torch.nn.Conv3d.forward(conv, whole)) < 1e-6
        assert torch.equal(after, whole[:, :, stride - 3 :])
        with torch.autocast("cpu", torch.bfloat16):  # as in training where bfloat16 is native
            rough, _ = conv(frames, before)
        assert rough.dtype == torch.bfloat16 and error(rough.float(), y) < 0.05
