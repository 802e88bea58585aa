"""Every public function of the taught modules against its naive twin in a notebook, in value and in gradient.

`@twin` names what a test compares; the last test finds names that none does.
"""

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import error, golden
from naive import naive
from safetensors.torch import save_file
from torch import Tensor, nn

import losses
import skip_optim
import window
from wan_mini import attention, checkpoint, dit, layouts, prompts, tiling, tokenizer, umt5, vae
from wan_mini.config import T2V_1_3B, T2V_14B, DiTConfig, UMT5Config, VAEConfig
from wan_mini.device import flops
from wan_mini.noise import start_noise
from wan_mini.pipeline import guided_velocity
from wan_mini.prompts import NEGATIVE
from wan_mini.scheduler import FlowEuler, FlowUniPC, shift_sigma
from wan_mini.tiny.training.grammar import grammar_tokenizer, tokenizer_json
from wan_mini.tiny.world import make_clip
from wan_mini.verify import invert

ROOT = Path(__file__).parent.parent
MODULES = ("wan_mini/scheduler", "wan_mini/attention", "wan_mini/dit", "wan_mini/tiling", "wan_mini/vae")
MODULES += ("wan_mini/umt5", "wan_mini/tokenizer", "window", "losses", "skip_optim")
COMPARED: set[str] = set()


def twin(*names: str) -> Callable:
    """Record which public names ("dit.Block") a test compares with their loops."""
    COMPARED.update(names)
    return lambda test: test


def same(loops: Tensor, module: Tensor, inputs: tuple | list = (), limit: float = 1e-4) -> None:
    """Assert equal values, and equal gradients of a random projection with respect to the inputs."""
    probe, pairs = torch.randn_like(module), [(loops, module)]
    if inputs:
        pairs += zip(*(torch.autograd.grad((x * probe).sum(), inputs, retain_graph=True) for x in (loops, module)))
    for ours, expected in pairs:
        assert ours.shape == expected.shape
        assert (ours - expected).abs().max() <= limit * expected.abs().max().clamp(min=1e-3)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Parameters by name; gains and biases are drawn at random, or a mistake in them would not show."""
    named = dict(module.named_parameters())
    for name, parameter in named.items():
        if parameter.ndim == 1 or "gamma" in name or "norm" in name:
            nn.init.uniform_(parameter, 0.5, 2)
    return named


# 01: scheduler.py


@pytest.fixture(scope="module")
def flow():
    return naive("01_flow_matching")


@pytest.fixture(scope="module")
def unipc():
    return naive("A1_unipc")


@twin("scheduler.shift_sigma")
@pytest.mark.parametrize("shift", [0.3, 1.0, 7.0])
def test_shift(flow, shift):
    u = torch.linspace(0, 0.99, 34, dtype=torch.float64, requires_grad=True)
    same(torch.stack([flow.naive_shift(v, shift) for v in u]), shift_sigma(u, shift), [u])


@twin("scheduler.FlowEuler")
@pytest.mark.parametrize("schedule", [(4, 3.0, 1.0), (50, 7.0, 0.75), (1, 5.0, 0.5)])
def test_euler(flow, schedule):
    sampler, (x, v) = FlowEuler(*schedule), (leaf(1, 4, 3, 2, 2), leaf(1, 4, 3, 2, 2))
    levels = flow.naive_levels(*schedule)
    same(torch.tensor(levels), sampler.sigmas)
    for index, pair in enumerate(zip(levels, levels[1:])):
        same(flow.naive_euler_step(x, v, *pair), sampler.step(index, x, v), [x, v])


@twin("scheduler.FlowUniPC")
@pytest.mark.parametrize("schedule", [(1, 1.0), (2, 3.0), (10, 5.0), (25, 1.0)])
def test_unipc(unipc, schedule):
    sampler, (levels, times) = FlowUniPC(*schedule), unipc.naive_unipc_levels(*schedule)
    same(torch.tensor(levels), sampler.sigmas)
    assert sampler.timesteps.tolist() == times

    def velocity(index: int, x: Tensor) -> Tensor:
        return torch.tanh(x.flip(1)) * (0.5 + levels[index])

    start = leaf(6, 2, dtype=torch.float64)
    path = [start.float()]
    for index in range(schedule[0]):
        path.append(sampler.step(index, path[-1], velocity(index, path[-1])))
    loops = unipc.naive_unipc(start, velocity, levels)
    assert all(error(a, b.float()) < 1e-5 for a, b in zip(path, loops, strict=True))
    same(loops[-1].float(), path[-1], [start], limit=1e-3)


@pytest.mark.parametrize("schedule", [(10, 5.0), (7, 3.0)])
def test_unipc_loops_equal_the_official_sampler(unipc, schedule):
    data = {key.split("/")[1]: x for key, x in golden("unipc").items() if key.startswith(f"unipc_{schedule[0]}_")}
    levels, times = unipc.naive_unipc_levels(*schedule)

    def velocity(index: int, x: Tensor) -> Tensor:
        return torch.einsum("ij,bjfhw->bifhw", data["A"].double(), torch.tanh(x)) * (0.5 + times[index] / 1000)

    path = unipc.naive_unipc(data["trajectory"][0].double(), velocity, levels)
    assert all(error(a.float(), b) < 1e-5 for a, b in zip(path, data["trajectory"]))


@twin("attention.OneProcess")
@pytest.mark.parametrize("cfg", [0.0, 1.0, 5.8])
def test_classifier_free_guidance(flow, cfg):
    def model(x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return torch.tanh(x * text) + timestep / 1000

    x, inputs = leaf(3, 4), (torch.tensor(800.0), *torch.randn(2, 4), cfg)
    same(flow.naive_guided(model, x, *inputs), guided_velocity(model, x, *inputs), [x])


# 02: dit.py


class Case:
    """A small DiT, its weights, and inputs; the loops know no batch."""

    def __init__(self):
        self.loops = naive("02_wan_dit")
        self.config = DiTConfig(dim=48, ffn_dim=64, num_heads=3, num_layers=2, freq_dim=32, text_dim=10, text_len=6)
        self.model = dit.WanDiT(self.config)
        self.w, self.grid = weights(self.model), (2, 2, 3)
        self.block = self.model.blocks[1]
        self.angles = self.loops.rope_table(self.grid, 16)
        self.rope = dit.rope_table(self.grid, 16, torch.device("cpu"))
        self.latents, self.text = leaf(1, 16, 2, 4, 6), leaf(1, 4, 10)
        self.x, self.context = leaf(1, 12, 48), leaf(1, 6, 48)
        self.t = torch.tensor([637.0])
        self.e, self.time = self.loops.time_vectors(637.0, self.w, 32)

    def of(self, layer: str) -> list[Tensor]:
        return [parameter for name, parameter in self.w.items() if name.startswith(layer)]


@pytest.fixture
def case() -> Case:
    return Case()


@twin("dit.timestep_embedding")
def test_time(case):
    embedded = dit.timestep_embedding(case.t, 32)
    same(case.loops.timestep_embedding(637.0, 32), embedded[0])
    whole = case.model.time_embedding(embedded)
    same(case.e, whole[0], case.of("time_embedding"))
    same(case.time, case.model.time_projection(whole)[0].unflatten(0, (6, -1)), case.of("time_"))


@twin("attention.rope_table", "attention.apply_rope")
def test_rope(case):
    same(case.angles.cos().float(), case.rope[0][:, 0])
    same(case.angles.sin().float(), case.rope[1][:, 0])
    q = leaf(1, 12, 3, 16)
    same(case.loops.apply_rope(q[0], case.angles), dit.apply_rope(q, case.rope)[0], [q])


@twin("attention.attention", "attention.plain_attention", "dit.Attention")
def test_attention(case):
    q, k, v = leaf(1, 12, 3, 16), leaf(1, 5, 3, 16), leaf(1, 5, 3, 16)
    for function in (attention.attention, attention.plain_attention):
        same(case.loops.attention(q[0], k[0], v[0]), function(q, k, v)[0], [q, k, v])
    for loops, module in zip(
        case.loops.queries_keys(case.x[0], case.x[0], case.w, "blocks.1.self_attn", 3, case.angles),
        case.block.self_attn.qk(case.x, case.x, case.rope),
    ):
        same(loops, module[0], [case.x])
    loops = case.loops.attention_layer(case.x[0], case.x[0], case.w, "blocks.1.self_attn", 3, case.angles)
    same(loops, case.block.self_attn(case.x, rope=case.rope)[0], [case.x, *case.of("blocks.1.self_attn")])
    loops = case.loops.attention_layer(case.x[0], case.context[0], case.w, "blocks.1.cross_attn", 3)
    module = case.block.cross_attn(case.x, case.context)[0]
    same(loops, module, [case.x, case.context, *case.of("blocks.1.cross_attn")])


@twin("dit.RMSNorm", "dit.LayerNorm")
@pytest.mark.parametrize("size", [1.0, 1e-3])  # at the small one, the norms' eps of 1e-6 matters
def test_norms(case, size):
    x, gain = case.x * size, case.w["blocks.1.self_attn.norm_q.weight"]
    same(case.loops.rms_norm(x[0], gain), case.block.self_attn.norm_q(x)[0], [case.x, gain])
    same(case.loops.layer_norm(x[0]), case.block.norm1(x)[0], [case.x])
    affine = case.w["blocks.1.norm3.weight"], case.w["blocks.1.norm3.bias"]
    same(case.loops.layer_norm(x[0], *affine), case.block.norm3(x)[0], [case.x, *affine])


@twin("dit.Block", "dit.Head")
def test_block_and_head(case):
    time, e = case.time.detach(), case.e.detach()
    loops = case.loops.block(case.x[0], time, case.context[0], case.angles, case.w, "blocks.1", 3)
    module = case.block(case.x, time[None], case.context, case.rope)[0]
    same(loops, module, [case.x, case.context, *case.of("blocks.1.")])
    same(case.loops.head(case.x[0], e, case.w), case.model.head(case.x, e[None])[0], [case.x, *case.of("head.")])


@twin("dit.keeps_float32")
def test_float32_parts(case):
    """The original's rule, by substrings."""
    for config in (case.config, T2V_1_3B):
        with torch.device("meta"):
            names = [name for name, _ in dit.WanDiT(config).named_parameters()]
        for name in names:
            parts = ("time_embedding", "time_projection", "modulation", "norm", "head.")
            assert dit.keeps_float32(name) == any(part in name for part in parts)


@twin("dit.Embedded")
def test_embedding(case):
    embedded = case.model.embed(case.latents, case.t, case.text)
    patch = case.w["patch_embedding.weight"], case.w["patch_embedding.bias"]
    same(case.loops.patchify(case.latents[0], *patch), embedded.tokens[0], [case.latents, *patch])
    same(case.e, embedded.time[0], case.of("time_embedding"))
    same(case.time, embedded.modulation[0], case.of("time_"))
    same(case.loops.embed_text(case.text[0], case.w, 6), embedded.text[0], [case.text])
    same(case.angles.sin().float(), embedded.rope[1][:, 0])


@twin("dit.WanDiT")
def test_dit(case):
    patch = case.w["patch_embedding.weight"], case.w["patch_embedding.bias"]
    tokens = case.model.patch_embedding(case.latents).flatten(2).transpose(1, 2)[0]
    same(case.loops.patchify(case.latents[0], *patch), tokens, [case.latents, *patch])
    patches = leaf(1, 12, 64)
    same(case.loops.unpatchify(patches[0], case.grid), case.model.unpatchify(patches, case.grid)[0], [patches])
    same(case.loops.embed_text(case.text[0], case.w, 6), case.model.embed_text(case.text)[0], [case.text])
    inputs = case.latents[0], 637.0, case.text[0], case.w, case.config
    velocity = case.model(case.latents, case.t, case.text)[0]
    same(case.loops.wan_dit(*inputs), velocity, [case.latents, case.text, *case.w.values()])
    for block in (0, 1):
        module = case.model(case.latents, case.t, case.text, qk_block=block)
        for ours, expected in zip(case.loops.wan_dit(*inputs, block), module):
            same(ours, expected[0], [case.latents])


def test_counts(case):
    for config in (case.config, T2V_1_3B, T2V_14B):
        assert sum(case.loops.count_parameters(config).values()) == flops.parameters(config)
        for block in (None, 0, 1):
            assert sum(case.loops.count_flops(config, 12, block).values()) == flops.forward_flops(config, 12, block)


# 03: vae.py


@pytest.fixture(scope="module")
def video():
    return naive("03_causal_vae")


@twin("vae.CausalLayer", "vae.CausalConv3d")
@pytest.mark.parametrize(("kernel", "stride"), [((3, 3, 3), 1), ((3, 1, 1), 1), ((3, 1, 1), 2)])
def test_causal_convolution(video, kernel, stride):
    conv, x, before = vae.CausalConv3d(3, 4, kernel, stride), leaf(2, 3, 6, 4, 5), leaf(2, 3, 3 - stride, 4, 5)
    for cache in (None, before):
        y, after = conv(x, cache)
        loops, after_loops = video.causal_conv(x, conv.weight, conv.bias, cache, stride)
        assert torch.equal(after, after_loops)
        same(loops, y, [x, *conv.parameters(), *([] if cache is None else [cache])])


@twin("vae.RMSNorm")
@pytest.mark.parametrize(("axes", "shape"), [(3, (2, 4, 3, 2, 3)), (2, (2, 4, 3, 5))])
def test_vae_norm(video, axes, shape):
    norm, x = vae.RMSNorm(4, axes), leaf(*shape)
    nn.init.normal_(norm.gamma)
    same(video.rms_norm(x, norm.gamma), norm(x), [x, norm.gamma])


@twin("vae.CausalSequential", "vae.ResidualBlock")
@pytest.mark.parametrize("width", [4, 6])
def test_residual_block(video, width):
    block, x = vae.ResidualBlock(4, width), leaf(1, 4, 5, 3, 4)
    w = weights(block)
    loops = video.in_chunks(lambda x, cache: video.residual_block(x, w, cache), x, [1, 4])
    same(loops, video.in_chunks(block, x, [1, 4]), [x, *w.values()])


@twin("vae.AttentionBlock", "vae.per_frame")
def test_attention_within_frames(video):
    layer, x = vae.AttentionBlock(4), leaf(2, 4, 3, 2, 3)
    w = weights(layer)
    same(video.attention_block(x, w), layer(x), [x, *w.values()])
    same(video.each_frame(layer.attend, x), vae.per_frame(layer.attend, x), [x])


@twin("vae.Downsample", "vae.Upsample")
@pytest.mark.parametrize("temporal", [True, False])
def test_resampling(video, temporal):
    for layer, loops in ((vae.Downsample(4, temporal), video.downsample), (vae.Upsample(4, temporal), video.upsample)):
        x, w = leaf(2, 4, 9, 4, 6), weights(layer)
        ours = video.in_chunks(lambda x, cache, loops=loops, w=w: loops(x, w, cache), x, [1, 4, 4])
        same(ours, video.in_chunks(layer, x, [1, 4, 4]), [x, *w.values()])


@twin("vae.encoder", "vae.decoder", "vae.WanVAE")
def test_vae(video):
    model = vae.WanVAE(VAEConfig(dim=4, num_res_blocks=1))
    w, statistics = weights(model), (torch.tensor(model.config.mean), torch.tensor(model.config.std))
    for method, loops, x, parts in (
        (model.encode, video.encode, leaf(1, 3, 9, 8, 16), ("encoder.", "conv1.")),
        (model.decode, video.decode, leaf(1, 16, 3, 1, 2), ("decoder.", "conv2.")),
    ):
        same(loops(x, w, *statistics), method(x), [x, *(p for name, p in w.items() if name.startswith(parts))])


@twin("tiling.apply_in_chunks", "tiling.tile_slices", "tiling.Tile")
def test_chunks_and_tiles(video):
    tiles = naive("A5_vae_tiles")
    conv, x = vae.CausalConv3d(2, 3), leaf(1, 2, 9, 4, 6)
    same(video.in_chunks(conv, x, [1, 4, 4]), tiling.apply_in_chunks(conv, x, [9], (1, 3, 9, 4, 6), None, None), [x])
    decoder, z, shape = vae.decoder(VAEConfig(dim=4, num_res_blocks=1)), leaf(1, 16, 2, 4, 7), (1, 3, 5, 32, 56)
    tiled = tiling.apply_in_chunks(decoder, z, [1, 1], shape, 32, None)
    same(tiles.in_tiles(decoder, z, [1, 1], shape, 32), tiled, [z])
    for source, target, tile in ((160, 160, 64), (20, 160, 64), (160, 20, 64), (8, 64, 32), (40, 40, 64)):
        starts, tile_weights = tiles.tile_weights(source, target, min(tile, max(source, target)))
        pieces = tiling.tile_slices(source, target, tile)
        assert len(pieces) == len(starts)
        for row, (_, target, weight) in zip(tile_weights, pieces):
            torch.testing.assert_close(row[target], weight)
            assert row.count_nonzero() == len(weight)


# 04: umt5.py and tokenizer.py


@pytest.fixture(scope="module")
def words():
    return naive("04_text")


@twin("prompts.clean_prompt")
def test_cleaning():
    words = naive("A2_cleaning")
    messy = ["", "  “A  fox”\n runs ", "ｗｉｄｅ　ｔｅｘｔ，ﬁne", "salt &amp;amp; pepper", "<b> &lt;i&gt;", NEGATIVE]
    for text in [*messy, "cafe\u0301 \x93x\x94 10² \x07", "\u3000全角，", "‘’‚ʼ a\x7fb\ufeff"]:
        assert words.clean_prompt(text) == prompts.clean_prompt(text)


@twin("tokenizer.Tokenizer")
def test_tokenizer(words):
    captions = [make_clip(seed, frames=[]).caption for seed in range(100)]
    ours = tokenizer.Tokenizer(grammar_tokenizer(captions))
    for text in (*captions[:20], "", " ", "A crimson star ☀☀, far  away", "a ☀ ☀☀"):
        ids = ours.encode(text)
        assert ids == words.encode(text, ours.scores)
        assert ours.decode(ids) == words.decode(ids, ours.scores)
    small = tokenizer.Tokenizer(
        tokenizer_json({"a": -3.1, "b": -4.2, "ab": -5.3, "aba": -7.7, "ba": -6.4, "bab": -9.9})
    )
    for word in ("abab", "babab", "abcba", "aabbab"):
        assert small._best_cut(word) == words.best_cut(word, small.scores) == words.best_by_trying(word, small.scores)


@twin("umt5.T5Norm", "umt5.RelativePosition", "umt5.Attention", "umt5.FeedForward", "umt5.Block", "umt5.UMT5Encoder")
def test_text_encoder(words):
    model = umt5.UMT5Encoder(UMT5Config(vocab=50, dim=32, dim_attn=24, dim_ffn=48, num_heads=2, num_layers=2))
    w, block, x = weights(model), model.blocks[0], leaf(1, 7, 32)
    position = block.pos_embedding
    table = position.embedding.weight
    distances = torch.arange(-700, 701)
    assert position.bucket(distances).tolist() == [words.bucket(distance) for distance in distances.tolist()]
    same(words.position_bias(20, table), position(20)[0], [table])
    mask = torch.tensor([1, 1, 1, 1, 1, 0, 0])
    hidden = torch.finfo(torch.float32).min * (1.0 - mask)
    same(words.norm(x[0], w["norm.weight"]), model.norm(x)[0], [x, w["norm.weight"]])
    feed = [p for name, p in w.items() if name.startswith("blocks.0.ffn")]
    same(words.feed_forward(x[0], w, "blocks.0.ffn"), block.ffn(x)[0], [x, *feed])
    same(words.attention(x[0], position(7)[0], mask, w, "blocks.0.attn"), block.attn(x, position(7) + hidden)[0], [x])
    mine = [p for name, p in w.items() if name.startswith("blocks.0.")]
    same(words.block(x[0], mask, w, "blocks.0"), block(x, hidden)[0], [x, *mine])
    ids = torch.randint(50, (1, 7))
    same(words.encode_text(ids[0], mask, w, 2), model(ids, mask[None])[0], [*w.values()])


# 05: layouts.py


def test_names_and_headers(tmp_path):
    loops, files = naive("A3_layouts"), naive("05_official_weights")
    tables = {"wan2.1_t2v_1.3b.dit": loops.dit_names(30), "wan2.1_t2v_14b.dit": loops.dit_names(40)}
    tables |= {"wan2.1.vae": loops.vae_names(2), "umt5_xxl.encoder": loops.text_names(24)}
    for part, table in tables.items():
        for naming in ("official", "diffusers"):
            keys = json.loads((ROOT / f"tests/data/manifests/{part}.{naming}.json").read_text())["tensors"]
            layout = layouts.detect(keys)
            assert loops.guess(keys) == (layout.part, layout.naming)
            if naming == "diffusers":
                assert layouts.rename(layout, keys) == {key: table[key] for key in keys}
    save_file({"a": torch.ones(2, 3), "b": torch.ones(2).bfloat16()}, tmp_path / "x.safetensors", {"config": "{}"})
    file = tmp_path / "x.safetensors"
    ours = {entry.key: (entry.shape, entry.dtype) for entry in checkpoint.read_header(file)[0]}
    loops = {key: (shape, checkpoint.DTYPES[dtype]) for key, (shape, dtype) in files.header(file).items()}
    assert ours == loops


# 06, 07: window.py

GRIDS = pytest.mark.parametrize("grid", [(3, 3, 8), (3, 5, 7), (4, 2, 9)])  # tiles divide, do not, are taller than it


class Motion:
    """Queries and keys of a small clip, in float64, and the pairs of its frames."""

    def __init__(self, grid: tuple[int, int, int]):
        self.loops, self.grid = naive("07_tiles_and_windows"), grid
        self.q, self.k = (leaf(1, grid[0] * grid[1] * grid[2], 2, 4, dtype=torch.float64) for _ in range(2))
        self.pairs = window.frame_pairs(grid[0], 2)
        self.inputs = (self.q, self.k, grid, self.pairs)


@twin("window.frame_pairs")
@pytest.mark.parametrize(("frames", "span"), [(2, 1), (4, 2), (9, 4), (5, 99), (21, 4)])
def test_frame_pairs(frames, span):
    assert window.frame_pairs(frames, span) == naive("06_attention_motion_flow").frame_pairs(frames, span)


@twin("window.dense_amf")
@GRIDS
def test_dense_amf(grid):
    case = Motion(grid)
    slow, flow = case.loops.flow.dense_amf(*case.inputs, 3.0), window.dense_amf(*case.inputs, tau=3.0)
    same(slow, flow, [case.q, case.k], limit=1e-11)


@twin("window.tile_centers")
@GRIDS
@pytest.mark.parametrize("kind", ["argmax", "soft"])
def test_tile_centers(grid, kind):
    case = Motion(grid)
    centers = window.tile_centers(*case.inputs, kind=kind, tau=1.5)
    same(case.loops.tile_centers(*case.inputs, (3, 4), kind, 1.5), centers, limit=1e-11)
    assert not centers.requires_grad  # Eq. 4 has no gradient, and Eq. 2 shall have none


@twin("window.window_keys")
@pytest.mark.parametrize("size", [1, 2, 3, 8, 30])
def test_place_windows(size):
    """Centers between tokens are rounded half up; at the border the window is shifted into the frame."""
    grid, loops = (1, 7, 9), naive("07_tiles_and_windows")
    centers = torch.tensor([7.0, 9.0]) * torch.rand(200, 2) - 0.5
    centers[:2] = torch.tensor([[2.5, 3.5], [3.5, 4.5]])
    expected = [loops.window_keys(center, grid, size) for center in centers]
    assert window.window_keys(centers, grid, size).tolist() == expected


@twin("window.windowed_amf")
@GRIDS
@pytest.mark.parametrize("size", [1, 4, 7])
def test_windowed_amf(grid, size):
    case = Motion(grid)
    centers = case.loops.tile_centers(*case.inputs, (3, 4))
    slow, slow_windows = case.loops.windowed_amf(*case.inputs, 3.0, (3, 4), size, centers)
    flow, windows = window.windowed_amf(*case.inputs, tau=3.0, window=size)
    assert torch.equal(windows, slow_windows)
    same(slow, flow, [case.q, case.k], limit=1e-11)


@twin("window.logit_features", "window.token_coords")
@GRIDS
def test_logits_and_coordinates(grid):
    case, tokens = Motion(grid), grid[1] * grid[2]
    flow = case.loops.flow
    queries, keys = window.logit_features(case.q, case.k, grid, 3.0)
    assert queries.shape == keys.shape == (grid[0], tokens, 8)
    for u, s in ((0, 0), (3, 7), (tokens - 1, 1)):
        slow = 3.0 * flow.logits(case.q, case.k, u, tokens + s)
        same(slow, queries[0, u] @ keys[1, s], [case.q, case.k], limit=1e-11)
    assert window.token_coords(grid, case.q).tolist() == [list(flow.coords(s, grid)) for s in range(tokens)]
    assert window.token_coords(grid, case.q.bfloat16()).dtype == torch.float32


@twin("window.tile_tokens", "window.raster_slot")
@GRIDS
@pytest.mark.parametrize("tile", [(3, 4), (1, 1), (2, 2), (9, 9)])
def test_tiles(grid, tile):
    loops = naive("07_tiles_and_windows").tiles_of(grid, tile)
    device = torch.device("cpu")
    tokens, slots = window.tile_tokens(grid, tile, device), window.raster_slot(grid, tile, device)
    assert tokens.shape == (len(loops), tile[0] * tile[1])
    for row, (of_tile, _) in zip(tokens.tolist(), loops, strict=True):
        assert set(row) == set(of_tile)  # a row may repeat border tokens
    assert tokens.flatten()[slots].tolist() == list(range(grid[1] * grid[2]))  # back to raster order


def test_tiles_of_the_docstring():
    grid, tile, device = (1, 2, 3), (2, 2), torch.device("cpu")
    assert window.tile_tokens(grid, tile, device).tolist() == [[0, 1, 3, 4], [2, 2, 5, 5]]
    assert window.raster_slot(grid, tile, device).tolist() == [0, 1, 4, 2, 3, 6]


@twin("window.map_pairs", "window.recomputed")
def test_pairs_one_by_one():
    queries, keys, extra = leaf(5, 3, 4, dtype=torch.float64), leaf(5, 6, 4, dtype=torch.float64), torch.randn(7, 1, 1)
    pairs = window.frame_pairs(5, 2)

    def function(q: Tensor, k: Tensor, e: Tensor) -> Tensor:
        return (q @ k.mT + e).softmax(-1)

    loops = torch.stack([function(queries[i], keys[j], e) for (i, j), e in zip(pairs, extra, strict=True)])
    for way in (function, window.recomputed(function)):
        same(loops, window.map_pairs(way, queries, keys, pairs, extra), [queries, keys], limit=1e-11)


# 08: losses.py


@twin("losses.amf_loss", "losses.window_loss", "losses.total_loss", "losses.key_gradient_norms")
@pytest.mark.parametrize(("frames", "span"), [(5, 4), (4, 2), (3, 1), (3, 4), (2, 4)])
def test_losses(frames, span):
    loops, pairs, grid = naive("08_losses"), window.frame_pairs(frames, span), (frames, 5, 7)
    q, k = (leaf(1, frames * 35, 2, 4, dtype=torch.float64) for _ in range(2))
    flow, windows = window.windowed_amf(q, k, grid, pairs, window=3)
    reference, still = torch.randn_like(flow), 0 * (q.sum() + k.sum())  # where a loss is a constant: gradient 0

    def flow_loss(by: Any) -> Tensor:
        return still + by.amf_loss(reference, flow, pairs, span, 0.5)

    def tracking_loss(by: Any) -> Tensor:
        return still + by.window_loss(k, grid, pairs, windows)

    same(flow_loss(loops), flow_loss(losses), [q, k], limit=1e-9)
    same(tracking_loss(loops), tracking_loss(losses), [k], limit=1e-9)
    parts = flow_loss(losses), tracking_loss(losses)
    same(loops.total_loss(*parts, (1.0, 10.0)), losses.total_loss(*parts, (1.0, 10.0)), [q, k], limit=1e-9)
    norms = loops.key_gradient_norms(flow_loss(loops), tracking_loss(loops), (1.0, 10.0), k)
    assert losses.key_gradient_norms(*parts, (1.0, 10.0), k) == pytest.approx(norms, rel=1e-9)


# 09: skip_optim.py


@twin("skip_optim.optimize", "skip_optim.Report")
@pytest.mark.parametrize(("steps", "interval"), [(10, 3), (10, 1), (1, 1), (7, 2), (4, 9)])
def test_optimize(steps, interval):
    loops, (x, target), calls = naive("09_gradient_reuse"), torch.randn(2, 3, 4), []

    def loss(x: Tensor) -> Tensor:
        calls.append(x)
        return ((x - target) ** 4).sum() + torch.sin(3 * x).sum()

    def gradient(x: Tensor) -> Tensor:
        return 4 * (x - target) ** 3 + 3 * torch.cos(3 * x)

    ours, report = skip_optim.optimize(x, loss, steps=steps, interval=interval, lr=(0.02, 0.01))
    assert report.gradients == len(calls) == -(-steps // interval)
    same(loops.optimize(x, gradient, steps, interval, (0.02, 0.01)), ours)
    assert report.losses == pytest.approx(loops.report(x, loss, gradient, steps, interval, (0.02, 0.01)), rel=1e-5)


@twin("losses.key_gradient_norms")
def test_key_gradient_norms():
    """Of losses whose gradients are known: 2 k and 1, each times its weight; a constant has none."""
    k = leaf(1, 6, 2, 4)
    norms = losses.key_gradient_norms(k.square().sum(), k.sum(), (5.0, 3.0), k)
    assert norms["amf"] == pytest.approx(10 * k.norm().item(), rel=1e-5)
    assert norms["window"] == pytest.approx(3 * 48**0.5, rel=1e-5)
    assert losses.key_gradient_norms(k.square().sum(), torch.zeros(()), (5.0, 3.0), k)["window"] == 0


# A6, of the start noise


@pytest.mark.parametrize("steps", [1, 7])
def test_keyed_noise_and_the_path_back_to_it(steps):
    loops, sampler = naive("A6_proof_of_origin"), FlowEuler(steps, 3.0)
    noise = loops.keyed_noise((1, 16, 3, 4, 6), 5, "studio", "m")
    assert torch.equal(noise, start_noise((1, 16, 3, 4, 6), 5, "studio", "m"))
    ours = invert(lambda x, t, text: torch.sin(3 * x) + t / 500, noise, torch.zeros(0), sampler)
    same(loops.back_to_noise(lambda x, sigma: torch.sin(3 * x) + 2 * sigma, noise, sampler.sigmas.tolist()), ours)


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_has_a_twin(module):
    tree = ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))
    public = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    name = module.split("/")[-1]
    assert {f"{name}.{one}" for one in public if not one.startswith("_")} == {
        c for c in COMPARED if c.split(".")[0] == name
    }
