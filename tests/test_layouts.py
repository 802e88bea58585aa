"""Names and shapes against the published manifests; every row of every rename table."""

import json

import pytest
import torch
from conftest import DATA

from wan_mini.config import T2V_1_3B, T2V_14B, UMT5_XXL, WAN_VAE
from wan_mini.dit import WanDiT
from wan_mini.layouts import LAYOUTS, decoder_block_number, detect, rename
from wan_mini.sizes import CONFIGS
from wan_mini.umt5 import UMT5Encoder
from wan_mini.vae import WanVAE

PUBLISHED = {
    "wan2.1_t2v_1.3b.dit": (WanDiT, T2V_1_3B),
    "wan2.1_t2v_14b.dit": (WanDiT, T2V_14B),
    "wan2.1.vae": (WanVAE, WAN_VAE),
    "umt5_xxl.encoder": (UMT5Encoder, UMT5_XXL),
}


def manifest(name: str, layout: str) -> dict[str, tuple[int, ...]]:
    tensors = json.loads((DATA / f"manifests/{name}.{layout}.json").read_text())["tensors"]
    return {key: tuple(shape) for key, shape in tensors.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_modules_have_the_published_tensors(name):
    builder, config = PUBLISHED[name]
    with torch.device("meta"):
        module = builder(config)
    assert {key: tuple(t.shape) for key, t in module.state_dict().items()} == manifest(name, "official")


@pytest.mark.parametrize("name", PUBLISHED)
def test_rename_tables_turn_one_manifest_into_the_other(name):
    ours, theirs = manifest(name, "official"), manifest(name, "diffusers")
    assert detect(ours).naming == "original" and detect(theirs).naming != "original"
    assert detect(ours).part == detect(theirs).part
    names = rename(detect(theirs), theirs)
    assert {names[key]: shape for key, shape in theirs.items()} == ours
    assert rename(detect(ours), ours) == {key: key for key in ours}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_give_the_configuration(name):
    shapes = manifest(name, "official")
    assert CONFIGS[detect(shapes).part](shapes, []) == PUBLISHED[name][1]


OTHERS = [layout for layout in LAYOUTS if layout.naming != "original"]
PART_MANIFESTS = {"dit": "wan2.1_t2v_1.3b.dit", "vae": "wan2.1.vae", "text_encoder": "umt5_xxl.encoder"}
ROWS = [
    pytest.param(layout, table, row, id=f"{layout.part} {table} {row}")
    for layout in OTHERS
    for table in ("starts", "inner")
    for row in getattr(layout, table)
]


@pytest.mark.parametrize(("layout", "table", "row"), ROWS)
def test_every_row_is_needed(layout, table, row):
    names = manifest(PART_MANIFESTS[layout.part], "diffusers")
    if layout.part == "text_encoder":
        names["encoder.embed_tokens.weight"] = names["shared.weight"]
    without = {key: value for key, value in getattr(layout, table).items() if key != row}
    assert rename(layout._replace(**{table: without}), names) != rename(layout, names)


@pytest.mark.parametrize("layout", OTHERS, ids=lambda layout: layout.part)
def test_the_order_of_rows_does_not_matter(layout):
    names = manifest(PART_MANIFESTS[layout.part], "diffusers")
    turned = {table: dict(reversed(getattr(layout, table).items())) for table in ("starts", "inner")}
    assert rename(layout._replace(**turned), names) == rename(layout, names)


@pytest.mark.parametrize(
    ("stage", "position", "number"), [(0, 0, 0), (0, 2, 2), (0, 3, 3), (1, 0, 4), (2, 3, 11), (3, 0, 12), (3, 2, 14)]
)
def test_decoder_blocks_are_counted_through_all_stages(stage, position, number):
    """Official: 3 residual blocks and one upsampling in each of 4 stages, without the last upsampling: 0 to 14."""
    assert decoder_block_number(stage, position, 3) == number


def test_more_than_ten_stages_or_blocks_keep_their_order():
    names = [f"decoder.up_blocks.{stage}.resnets.{i}.conv1.weight" for stage in range(12) for i in range(11)]
    numbers = [int(name.split(".")[2]) for name in rename(detect(names), names).values()]
    assert numbers == [stage * 12 + i for stage in range(12) for i in range(11)]


def test_a_prefix_is_taken_off_and_unknown_names_stay():
    layout = detect(["model.diffusion_model.blocks.0.attn1.to_q.weight"])
    assert layout is OTHERS[0] and detect(["model.weight"]) is None
    assert rename(layout, ["diffusion_model.blocks.0.attn1.to_q.weight", "blocks.0.my_attn1.x"]) == {
        "diffusion_model.blocks.0.attn1.to_q.weight": "blocks.0.self_attn.q.weight",
        "blocks.0.my_attn1.x": "blocks.0.my_attn1.x",
    }
