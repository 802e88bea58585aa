"""8-bit weights with scales: de-quantized exactly, in every spelling; refused where anything is missing or odd."""

import copy
import json

import pytest
import torch
from conftest import error
from layout_folders import load_one, refuses, run, run_reference
from safetensors.torch import load_file, save_file

from wan_mini import load
from wan_mini.checkpoint import read_checkpoint
from wan_mini.hashes import FileHasher, sha256_file
from wan_mini.inspect import describe
from wan_mini.layouts import detect, rename

QUANT = json.dumps({"format": "float8_e4m3fn"}).encode()
SPELLINGS = {
    "old": lambda t, name, scale: t.update({f"{name}.scale_weight": scale, f"{name}.scale_input": torch.ones(1)}),
    "new": lambda t, name, scale: t.update(
        {f"{name}.weight_scale": scale[0], f"{name}.comfy_quant": torch.tensor(list(QUANT), dtype=torch.uint8)}
    ),
}


def quantize(tensors: dict, spelling: str, dtype: torch.dtype = torch.float8_e4m3fn) -> dict[str, torch.Tensor]:
    """Put 8-bit matrices and scales in place of all linear weights of the blocks; {key: their values, in float64}."""
    values = {}
    for key in [key for key, tensor in tensors.items() if tensor.ndim == 2 and "block" in key]:
        scale = tensors[key].abs().max().reshape(1) / torch.finfo(dtype).max
        tensors[key] = (tensors[key] / scale).to(dtype)
        values[key] = tensors[key].double() * scale.double()
        SPELLINGS[spelling](tensors, key.removesuffix(".weight"), scale)
    if spelling == "old":
        tensors["scaled_fp8"] = torch.zeros(2, dtype=dtype)
    return values


@pytest.mark.parametrize("kind", ["dit", "text_encoder"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_values_and_outputs_are_those_of_the_definition(kind, spelling, broken, reference):
    """Diffusers' and transformers' modules, given 8-bit value times scale, compute the same."""
    values: dict[str, torch.Tensor] = {}
    file = broken(kind, lambda tensors: values.update(quantize(tensors, spelling)))
    module = load_one(kind, file)
    assert len(values) >= 21
    back = {ours: theirs for theirs, ours in rename(detect(values), values).items()}
    state = module.state_dict()
    for ours, theirs in back.items():
        assert torch.equal(state[ours], values[theirs].float())  # the exact product, rounded once
    other = copy.deepcopy(reference[kind])
    names = {ours: theirs for theirs, ours in rename(detect(other.state_dict()), other.state_dict()).items()}
    other.load_state_dict({names[ours]: values[theirs].float() for ours, theirs in back.items()}, strict=False)
    for got, expected in zip(run(kind, module), run_reference(kind, other), strict=True):
        assert error(got, expected) < 1e-5
    before = run_reference(kind, reference[kind])[0]
    assert error(run(kind, module)[0], before) > 1e-3  # 8 bits are not 32


def test_the_other_float8_too(broken):
    values: dict[str, torch.Tensor] = {}
    file = broken("dit", lambda tensors: values.update(quantize(tensors, "old", torch.float8_e5m2)))
    state = load_one("dit", file).state_dict()
    assert all(torch.equal(state[key], value.float()) for key, value in values.items())
    half = load_one("dit", file, torch.bfloat16).state_dict()
    assert all(torch.equal(half[key], value.float().bfloat16()) for key, value in values.items())


def test_a_file_in_8_bits_is_hashed_and_described(broken, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = broken("dit", lambda tensors: quantize(tensors, "new"))
    part = read_checkpoint(file).require("dit")
    assert "float32/float8_e4m3fn" in describe(part)
    hasher = FileHasher()
    load.load_weights(load.build_and_check(part), part, "cpu", torch.float32, hasher)
    assert hasher.digests == {file: sha256_file(file)}


MATRIX = "blocks.1.ffn.2"
FAULTS = {
    "scale lost": (lambda t: t.pop(f"{MATRIX}.scale_weight"), rf"{MATRIX}.weight is fp8 without a scale, .*1.3B_fp16"),
    "scale empty": (lambda t: t.update({f"{MATRIX}.scale_weight": torch.ones(0)}), r"must be one number, .*\(0,\)"),
    "scale a row": (lambda t: t.update({f"{MATRIX}.scale_weight": torch.ones(42)}), r"must be one number, .*\(42,\)"),
    "two scales": (lambda t: t.update({f"{MATRIX}.weight_scale": torch.ones(1)}), "has two scales, .*scale.*scale"),
    "scale zero": (lambda t: t[f"{MATRIX}.scale_weight"].zero_(), "must be finite and above 0, got 0"),
    "scale negative": (lambda t: t[f"{MATRIX}.scale_weight"].neg_(), "must be finite and above 0, got -"),
    "scale not a number": (lambda t: t[f"{MATRIX}.scale_weight"].fill_(torch.nan), "finite and above 0, got nan"),
    "weight not in 8 bits": (
        lambda t: t.update({f"{MATRIX}.weight": t[f"{MATRIX}.weight"].float()}),
        f"{MATRIX}.scale_weight is a scale, but there is no fp8 {MATRIX}.weight",
    ),
    "int8": (lambda t: t.update({f"{MATRIX}.weight": torch.ones(42, 70, dtype=torch.int8)}), "weight holds I8, not"),
    "another format": (
        lambda t: t.update({f"{MATRIX}.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)}),
        "comfy_quant must name one of float8_e4m3fn, float8_e5m2, got nvfp4",
    ),
    "a format that is no JSON": (
        lambda t: t.update({f"{MATRIX}.comfy_quant": torch.tensor([91, 93], dtype=torch.uint8)}),
        "comfy_quant must name one of .*, got None",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_faults_of_scaled_files_are_refused(case, broken):
    edit, pattern = FAULTS[case]

    def both(tensors):
        quantize(tensors, "old")
        edit(tensors)

    refuses("dit", broken("dit", both), pattern)


def test_8_bits_in_two_files(broken, tmp_path):
    """A scale need not be in its weight's file."""
    file = broken("dit", lambda tensors: quantize(tensors, "old"))
    expected, tensors = run("dit", load_one("dit", file))[0], load_file(file)
    config = {"config": json.dumps({"dim": 42, "num_heads": 3})}
    scales = {key: tensors.pop(key) for key in list(tensors) if key.endswith("scale_weight")}
    first = dict(list(tensors.items())[:40])
    save_file(first, file, config)
    save_file({key: tensors[key] for key in tensors.keys() - first.keys()} | scales, tmp_path / "rest.safetensors")
    assert torch.equal(run("dit", load_one("dit", tmp_path))[0], expected)
