"""Loading: every layout against the reference implementations and each other, every refusal of a bad tensor."""

import json
import re
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from conftest import error
from layout_folders import FP32, KINDS, LAYOUTS, load_one, randomize, refuses, run, run_reference, write_tokenizer
from safetensors.torch import load_file, save_file

from fastvmt import MotionConfig, transfer
from wan_mini import load
from wan_mini.checkpoint import read_checkpoint
from wan_mini.config import TINY, TINY_UMT5, TINY_VAE
from wan_mini.dit import WanDiT
from wan_mini.tiny.world import make_clip
from wan_mini.umt5 import UMT5Encoder
from wan_mini.vae import WanVAE

# The same model, whatever the layout.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["diffusers", "shards"])
def test_outputs_equal_the_reference_implementation(kind, layout, folders, reference):
    assert len(read_checkpoint(folders[layout]).parts[kind].files) == 1 or layout == "shards"
    outputs = run(kind, load_one(kind, folders[layout]))
    for ours, theirs in zip(outputs, run_reference(kind, reference[kind]), strict=True):
        assert theirs.abs().max() > 0.01
        assert error(ours, theirs) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_bits(layout, folders):
    expected, wan = load.load_wan(folders["diffusers"], **FP32), load.load_wan(folders[layout], **FP32)
    for kind in KINDS:
        ours, theirs = getattr(wan, kind), getattr(expected, kind)
        assert ours.config == theirs.config
        state = ours.state_dict()
        assert state.keys() == theirs.state_dict().keys()
        assert all(state[name].equal(tensor) for name, tensor in theirs.state_dict().items())
        assert all(a.equal(b) for a, b in zip(run(kind, ours), run(kind, theirs), strict=True))
        assert not ours.training and not any(p.requires_grad for p in ours.parameters())
    assert wan.tokenizer.encode("ab a") == expected.tokenizer.encode("ab a")
    assert wan.name == "custom"


def test_every_layout_gives_the_same_latents(folders):
    """A whole motion transfer, from clip and prompt to latents and frames."""
    config = MotionConfig(steps=3, guidance_fraction=0.5, window=2, lr=(0.02, 0.01))
    clip = make_clip(0).frames[:9, ::4, ::4]  # (9, 32, 48, 3)
    runs = [transfer(load.load_wan(folders[layout], **FP32), clip, "ab a", config) for layout in LAYOUTS]
    assert runs[0].latents.isfinite().all() and runs[0].report["gradients"] == 8
    for other in runs[1:]:
        assert torch.equal(other.latents, runs[0].latents) and (other.frames == runs[0].frames).all()


def test_a_single_file_loads_like_its_folder(folders):
    file = read_checkpoint(folders["comfy"]).parts["dit"].files[0]
    assert run("dit", load_one("dit", file))[0].equal(run("dit", load_one("dit", folders["comfy"]))[0])


def test_the_tiny_preset_is_recognized(tmp_path):
    modules = [randomize(WanDiT(TINY)), randomize(WanVAE(TINY_VAE)), randomize(UMT5Encoder(TINY_UMT5))]
    load.save_wan(tmp_path / "tiny", *modules, write_tokenizer(tmp_path / "tokenizer.json"))
    wan = load.load_wan(tmp_path / "tiny", **FP32)
    assert wan.name == "tiny"
    assert (wan.vae.config, wan.text_encoder.config) == (TINY_VAE, TINY_UMT5)


def test_bfloat16_leaves_some_parameters_and_the_vae_in_float32(folders):
    wan = load.load_wan(folders["original"], device="cpu", dtype=torch.bfloat16)
    kept = re.compile(r"time_embedding|time_projection|modulation|norm|^head\.")
    for name, parameter in wan.dit.named_parameters():
        assert parameter.dtype == (torch.float32 if kept.search(name) else torch.bfloat16), name
    assert {p.dtype for p in wan.text_encoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in wan.vae.parameters()} == {torch.float32}


def test_tied_embedding_may_have_either_name_or_both(folders, tmp_path):
    file = read_checkpoint(folders["comfy"]).parts["text_encoder"].files[0]
    tensors, expected = load_file(file), load_one("text_encoder", file).token_embedding.weight
    table = tensors.pop("shared.weight")
    for tables in (
        {"encoder.embed_tokens.weight": table},
        {"shared.weight": table, "encoder.embed_tokens.weight": table},
    ):
        save_file(tensors | {key: table.clone() for key in tables}, tmp_path / "t5.safetensors")
        assert load_one("text_encoder", tmp_path).token_embedding.weight.equal(expected)
    save_file(tensors | {"shared.weight": table, "encoder.embed_tokens.weight": table + 1}, tmp_path / "t5.safetensors")
    refuses("text_encoder", tmp_path, "shared.weight differs from another copy of token_embedding.weight")


# Memory.


@pytest.mark.parametrize("hash_files", [False, True])
@pytest.mark.parametrize("layout", ["shards", "original"])
def test_no_tensor_of_a_file_outlives_it(layout, hash_files, folders, monkeypatch, tmp_path):
    """So beside the model at most one file's pages are in use, and nothing of the file is left in the model."""
    read_tensors, opened, borrowed = load.read_tensors, [], []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def watched(file, keys):
        assert not any(reference() is not None for reference in borrowed)
        opened.append(file)
        for key, tensor in read_tensors(file, keys):
            borrowed.append(weakref.ref(tensor))
            yield key, tensor
            del tensor
            # Of safetensors even one tensor at a time: read_tensors itself holds the last one.
            assert file.suffix == ".pth" or all(reference() is None for reference in borrowed[:-1])

    monkeypatch.setattr(load, "read_tensors", watched)
    wan = load.load_wan(folders[layout], **FP32, hash_files=hash_files)
    parts = read_checkpoint(folders[layout]).parts.values()
    assert sorted(opened) == sorted(file for part in parts for file in part.files)
    assert len(borrowed) == sum(len(getattr(wan, kind).state_dict()) for kind in KINDS)


def test_the_model_survives_its_file(folders, tmp_path):
    file = Path(shutil.copy(read_checkpoint(folders["comfy"]).parts["dit"].files[0], tmp_path / "dit.safetensors"))
    dit = load_one("dit", file)
    before = run("dit", dit)[0]
    with file.open("r+b") as stream:
        stream.write(bytes(file.stat().st_size))
    assert run("dit", dit)[0].equal(before)


# Refusals: one line each, with the tensor and the file.


def swap(tensors: dict, name: str, change) -> None:
    tensors[name] = change(tensors[name]).contiguous()


ONE_NAN = "blocks.1.ffn.0.bias"
REFUSALS = {
    "missing": (
        "dit",
        lambda t: t.pop("blocks.1.self_attn.q.weight"),
        r"1 tensors missing: blocks.1.self_attn.q.weight",
    ),
    "many missing": (
        "dit",
        lambda t: [t.pop(k) for k in list(t) if "blocks.1.cross" in k],
        r"10 tensors .* and 7 more",
    ),
    "first missing": ("dit", lambda t: t.pop("patch_embedding.weight"), r"tensor 'patch_embedding.weight' is missing"),
    "unexpected": ("dit", lambda t: t.update(k_img=torch.ones(1)), r"1 tensors unexpected: k_img in .*broken"),
    "shape": (
        "dit",
        lambda t: swap(t, "blocks.2.ffn.2.weight", lambda x: x.T),
        r"blocks.2.ffn.2.weight \(70, 42\), not ",
    ),
    "nan": ("dit", lambda t: t[ONE_NAN].__setitem__(3, torch.nan), rf"{ONE_NAN} is not finite"),
    "infinite": ("dit", lambda t: t["head.modulation"].fill_(-torch.inf), r"head.modulation is not finite"),
    "zero embedding": ("text_encoder", lambda t: t["shared.weight"].zero_(), r"shared.weight is all zero"),
    "zero matrix": ("dit", lambda t: t["head.head.weight"].zero_(), r"head.head.weight is all zero"),
    "no embedding": ("text_encoder", lambda t: t.pop("shared.weight"), r"tensor 'token_embedding.weight' is missing"),
    "fp8": (
        "dit",
        lambda t: swap(t, "blocks.0.ffn.0.weight", lambda x: x.to(torch.float8_e4m3fn)),
        r"fp8 without .*fp16",
    ),
    "fp8 scale": (
        "text_encoder",
        lambda t: t.update(scaled_fp8=torch.ones(2)),
        r"scaled_fp8 says that there are scales, and there are none",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_tensors_are_refused(case, broken):
    kind, edit, pattern = REFUSALS[case]
    refuses(kind, broken(kind, edit), pattern)


def test_zero_biases_are_fine(broken):
    file = broken("dit", lambda tensors: tensors["head.head.bias"].zero_())
    assert not load_one("dit", file).head.head.bias.any()


def test_a_dtype_too_narrow_is_refused(broken):
    file = broken("dit", lambda tensors: tensors["blocks.0.ffn.0.bias"].fill_(1e6))
    load_one("dit", file, torch.bfloat16)
    refuses("dit", file, "blocks.0.ffn.0.bias is not finite as torch.float16", torch.float16)


def test_a_lost_last_block_is_missed_because_the_config_counts_it(broken):
    file = broken("dit", lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("blocks.2.")])
    assert len(load_one("dit", file).blocks) == 2  # there is no sign of a third
    (file.parent / "config.json").write_text(json.dumps({"dim": 42, "num_heads": 3, "num_layers": 3}))
    refuses("dit", file, "27 tensors missing: blocks.2.modulation")


def test_the_number_of_heads_is_not_guessed(folders, tmp_path):
    save_file(load_file(read_checkpoint(folders["comfy"]).parts["dit"].files[0]), tmp_path / "dit.safetensors")
    with pytest.raises(ValueError, match="dit.safetensors: num_heads is unknown for width 42; is its config.json"):
        load_one("dit", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"dim": 24, "num_heads": 2}))  # of something else
    with pytest.raises(ValueError, match="dit.safetensors: num_heads is unknown for width 42; is its config.json"):
        load_one("dit", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"dim": 42, "num_heads": 7}))
    assert load_one("dit", tmp_path).config.num_heads == 7


def test_tokenizer_missing_or_twofold(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer in .* get google/umt5-xxl/tokenizer.json of Wan-AI"):
        load.load_tokenizer(tmp_path)
    file = write_tokenizer(tmp_path / "a/tokenizer.json")
    assert load.load_tokenizer(file).encode("ab") == load.load_tokenizer(tmp_path).encode("ab") == [6, 1]
    write_tokenizer(tmp_path / "b/tokenizer.json")
    with pytest.raises(ValueError, match=r"a/tokenizer.json and .*b/tokenizer.json are both tokenizers"):
        load.load_tokenizer(tmp_path)
