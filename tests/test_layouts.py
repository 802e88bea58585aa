"""Names and shapes against the published manifests; every row of every rename table."""

import json

import pytest
import torch
from conftest import DATA

from wan_mini.config import T2V_1_3B, T2V_14B, UMT5_XXL, WAN_VAE
from wan_mini.dit import WanDiT
from wan_mini.layouts import detect, rename
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
def test_published_shapes_tell_the_configuration(name):
    shapes = manifest(name, "official")
    assert CONFIGS[detect(shapes).part](shapes, []) == PUBLISHED[name][1]
