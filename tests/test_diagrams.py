"""The drawn diagrams: as the script makes them, legible, and with the shapes that the modules really have."""

import math
import xml.etree.ElementTree as ET

import pytest
import torch
from diagrams import DIAGRAMS, FIGURES, FRAMES, GRID, HEIGHT, WIDTH, shape, vae_levels
from svg import INK, KINDS, Drawing

from wan_mini.config import TINY, TINY_VAE
from wan_mini.dit import WanDiT
from wan_mini.vae import CausalLayer, WanVAE

every = pytest.mark.parametrize("name", DIAGRAMS)


@every
def test_the_file_is_what_the_script_draws(name):
    committed = (FIGURES / f"{name}.svg").read_text(encoding="utf-8")
    assert committed == DIAGRAMS[name]().svg(), "run python notebooks/diagrams.py"


@every
def test_nothing_overlaps(name):
    drawing = DIAGRAMS[name]()
    assert not drawing.problems(), "\n".join(drawing.problems())
    assert len(drawing.texts) > 10


@every
def test_it_has_a_text_alternative_and_needs_no_network(name):
    root = ET.fromstring(DIAGRAMS[name]().svg())
    texts = {child.tag.split("}")[1]: child.text for child in root[:2]}
    assert set(texts) == {"title", "desc"} and len(texts["desc"].split()) > 30
    assert root.get("role") == "img"
    assert "href" not in DIAGRAMS[name]().svg() and "url(" not in DIAGRAMS[name]().svg()


def test_overlaps_are_seen():
    """Each kind of fault, on purpose."""
    drawing = Drawing(200, 100, "", "")
    drawing.box(10, 10, 40, 20, "much too long for it")
    drawing.text(190, 80, "off the page")
    drawing.text(40, 62, "one")
    drawing.text(44, 64, "another")
    drawing.arrow((0, 58), (100, 58))
    faults = "\n".join(drawing.problems())
    for word in ("crosses the outline", "off the page", "lies on", "is crossed by the arrow"):
        assert word in faults


def luminance(color: str) -> float:
    """WCAG 2's relative luminance of #rrggbb."""
    total = 0.0
    for start, weight in ((1, 0.2126), (3, 0.7152), (5, 0.0722)):
        value = int(color[start : start + 2], 16) / 255
        total += weight * (value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4)
    return total


def test_text_stands_out_from_every_box():
    """Contrast of at least 7 (WCAG AAA); outlines of at least 3 on white, but for the cells of a grid."""
    for kind, (fill, outline, *_) in KINDS.items():
        assert (luminance(fill) + 0.05) / (luminance(INK) + 0.05) >= 7
        assert kind == "cell" or 1.05 / (luminance(outline) + 0.05) >= 3


@torch.no_grad()
def test_shapes_of_the_transformer():
    dit = WanDiT(TINY)
    latents = torch.zeros(1, 16, GRID[0], HEIGHT // 8, WIDTH // 8)
    text = torch.zeros(1, TINY.text_len, TINY.text_dim)
    embedded = dit.embed(latents, torch.zeros(1), text)
    q, _ = dit(latents, torch.zeros(1), text, qk_block=0)
    patches = dit.head(embedded.tokens, embedded.time)
    drawn = {text for _, text in DIAGRAMS["dit_block"]().texts}
    for tensor in (latents, embedded.tokens, embedded.modulation, embedded.text, q, patches):
        assert shape(*tensor.shape) in drawn
    assert q.shape[1] == math.prod(GRID)


@torch.no_grad()
def test_shapes_of_the_vae():
    """Whole levels of the real encoder, its frames counted over all chunks."""
    vae = WanVAE(TINY_VAE)
    frames: dict[int, int] = {}
    sizes: dict[int, tuple[int, int, int, int]] = {}
    boxes = [vae.encoder.conv1]
    blocks = TINY_VAE.num_res_blocks + 1  # of a level: residual blocks, then a halving
    layers = list(vae.encoder.downsamples)
    boxes += [layers[min(end, len(layers)) - 1] for end in range(blocks, len(layers) + blocks, blocks)]
    boxes += [vae.encoder.middle, vae.encoder.head]

    def note(module: CausalLayer, _: object, output: tuple[torch.Tensor, object]) -> None:
        index = boxes.index(module)
        y = output[0]
        frames[index] = frames.get(index, 0) + y.shape[2]
        sizes[index] = (y.shape[1], frames[index], *y.shape[3:])

    for module in boxes:
        module.register_forward_hook(note)
    vae.encode(torch.zeros(1, 3, FRAMES, HEIGHT, WIDTH))
    assert [sizes[index] for index in range(len(boxes))] == [size for _, size in vae_levels()]
