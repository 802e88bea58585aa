"""Checkpoint files: headers, configs beside them, and the errors for files that are broken, missing or there twice."""

import json
import shutil

import pytest
import torch
from layout_folders import FP32, KINDS, LAYOUTS, load_one, refuses
from safetensors.torch import load_file, save_file

from wan_mini import checkpoint, load
from wan_mini.checkpoint import read_checkpoint, read_header
from wan_mini.errors import MissingFile, UserError


@pytest.mark.parametrize("keep", [4, 2000, -1])
def test_truncated_safetensors_are_refused(keep, broken):
    file = broken("dit", lambda tensors: None)
    file.write_bytes(file.read_bytes()[:keep])
    refuses("dit", file, "broken.safetensors cannot be read, is it truncated?")


def test_pickles_that_run_code_are_refused(tmp_path):
    torch.save({"encoder.conv1.weight": print}, tmp_path / "vae.pth")
    refuses("vae", tmp_path, "vae.pth cannot be read")


def test_two_copies_are_refused(folders, tmp_path):
    file = read_checkpoint(folders["comfy"]).parts["vae"].files[0]
    shutil.copy(file, tmp_path / "fp32.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, tmp_path / "bf16.safetensors")
    refuses("vae", tmp_path, r"bf16.safetensors and .*fp32.safetensors both hold \S+: remove one")
    refuses("vae", tmp_path / "bf16.safetensors", "z_dim=4 .* got 16 and 16; is its config.json beside it")
    (tmp_path / "config.json").write_text(json.dumps({"vae": {"mean": [0] * 4, "std": [1] * 4}}))
    assert load_one("vae", tmp_path / "bf16.safetensors").config.std == (1,) * 4


def test_two_layouts_in_one_folder_are_refused(folders, tmp_path):
    for layout in ("comfy", "original"):
        shutil.copy(read_checkpoint(folders[layout]).parts["text_encoder"].files[0], tmp_path)
    refuses("text_encoder", tmp_path, r"models_t5_umt5.pth and .*umt5.safetensors both hold")


@pytest.mark.parametrize("layout", ["shards", "original"])
def test_a_lost_shard_is_named(layout, folders, tmp_path):
    shards = read_checkpoint(folders[layout]).parts["dit"].files
    shutil.copytree(shards[0].parent, tmp_path / "dit")
    lost = tmp_path / "dit" / shards[1].name
    lost.unlink()
    refuses("dit", tmp_path, f"missing.*index.json also lists {lost.name}: get what is not there")


def test_the_nearest_config_wins(folders, tmp_path):
    file = tmp_path / "sub/dit.safetensors"
    file.parent.mkdir()
    tensors = load_file(read_checkpoint(folders["comfy"]).parts["dit"].files[0])
    save_file(tensors, file)
    for folder, heads in ((tmp_path, 1), (file.parent, 7)):  # above the file, then beside it
        (folder / "config.json").write_text(json.dumps({"dim": 42, "num_heads": heads, "text_len": 8 * heads}))
        config = load_one("dit", tmp_path).config
        assert (config.num_heads, config.text_len) == (heads, 8 * heads)
    save_file(tensors, file, {"config": json.dumps({"dim": 42, "num_heads": 3})})  # and in it
    assert load_one("dit", file).config.num_heads == 3
    (file.parent / "config.json").write_text("[]")
    refuses("dit", file.parent, r"config.json should hold a JSON object")


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_part_is_named_with_its_source(kind, tmp_path):
    file = {"dit": "diffusion_pytorch_model.safetensors", "vae": "Wan2.1_VAE.pth", "text_encoder": "models_t5_umt5-xxl"}
    refuses(kind, tmp_path, f"no {kind} in .*get {file[kind]}.* of Wan-AI/Wan2.1-T2V-1.3B")
    refuses(kind, tmp_path / "nowhere", "does not exist")


def test_what_was_passed_over_is_named_with_the_reason(folders, tmp_path):
    """Checkpoints of training code: another ending, a prefix, a wrapped state dict."""
    tensors = load_file(next(folders["original"].glob("diffusion*.safetensors")))
    for name, content, pattern in (
        ("model.pt", tensors, "model.pt, not named .safetensors or .pth"),
        ("model.SAFETENSORS", tensors, "model.SAFETENSORS, not named .safetensors or .pth"),
        ("ema.pth", {"generator_ema": tensors}, "ema.pth, which holds no tensors by name"),
        ("prefixed.pth", {f"model.{k}": v for k, v in tensors.items()}, "prefixed.pth, whose .*such as model.[a-z]"),
    ):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        torch.save(content, folder / name)
        refuses("dit", folder, rf"no dit in .*\(passed over: {pattern}.*\), get diffusion")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_headers_are_read_once_in_a_run(layout, folders, monkeypatch):
    """A program builds weightless parts to estimate memory, and then loads: from the same headers."""
    opened = []
    monkeypatch.setattr(checkpoint, "read_header", lambda file: opened.append(file) or read_header(file))
    headers = read_checkpoint(folders[layout])
    name, weightless = load.build_from_folder(headers)
    wan = load.load_wan(headers, **FP32, hash_files=False)
    assert opened and len(opened) == len(set(opened))
    assert name == wan.name and wan.folder == folders[layout]
    for kind in KINDS:
        expected = {key: tensor.shape for key, tensor in getattr(wan, kind).state_dict().items()}
        assert {key: tensor.shape for key, tensor in weightless[kind].state_dict().items()} == expected
        assert all(parameter.is_meta for parameter in weightless[kind].parameters())


def test_a_preset_is_built_by_its_name():
    name, parts = load.build_preset("Wan2.1-T2V-1.3B")
    assert (name, parts["dit"].config, len(parts)) == (name, load.T2V_1_3B, 3)
    assert all(parameter.is_meta for part in parts.values() for parameter in part.parameters())
    with pytest.raises(
        MissingFile, match="nowhere does not exist: give a checkpoint folder.* or one of Wan2.1-T2V-1.3B"
    ):
        load.build_preset("nowhere")


def test_headers_come_in_the_order_of_the_bytes(tmp_path):
    tensors = {"b": torch.arange(6).reshape(2, 3).float(), "a": torch.ones(3).bfloat16(), "c": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "x.safetensors", {"config": '{"dim": 3}'})
    headers, config = read_header(tmp_path / "x.safetensors")
    assert config == {"dim": 3}
    described = {header.key: (header.shape, header.dtype) for header in headers}
    assert described == {"b": ((2, 3), "float32"), "a": ((3,), "bfloat16"), "c": ((), "float32")}
    data = b"".join(tensors[header.key].reshape(-1).view(torch.uint8).numpy().tobytes() for header in headers)
    assert (tmp_path / "x.safetensors").read_bytes().endswith(data)


NO_ARCHIVE = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n": "it is a Git LFS pointer, .* git lfs pull",
    b"\n<!DOCTYPE html><html></html>": "it is a web page, not the weights",
    b"PK\x03\x04" + bytes(100): "it is a zip archive without its end: download it again",
    b"hello": "it is no zip archive .* begins with b'hello'",
    b"": "it is no zip archive",
}


@pytest.mark.parametrize("content", NO_ARCHIVE)
def test_a_pth_that_is_no_archive_is_described(content, tmp_path):
    (tmp_path / "vae.pth").write_bytes(content)
    refuses("vae", tmp_path, f"vae.pth cannot be read, {NO_ARCHIVE[content]}")


def test_a_pickle_of_old_torch_says_how_to_convert_it(folders, tmp_path):
    state = load_one("vae", folders["original"]).state_dict()
    old = tmp_path / "Wan2.1_VAE.pth"
    torch.save(state, old, _use_new_zipfile_serialization=False)
    refuses(
        "vae", tmp_path, r"it is a pickle from before torch 1.6, .* torch.save\(torch.load\('.*', weights_only=True\)"
    )
    torch.save(torch.load(old, weights_only=True), old)  # as the message says
    shutil.copy(folders["original"] / "config.json", tmp_path)
    assert load_one("vae", tmp_path).conv1.weight.equal(state["conv1.weight"])


def test_refusals_are_user_errors(tmp_path):
    (tmp_path / "dit.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(UserError, match="cannot be read"):
        load_one("dit", tmp_path)
    with pytest.raises(MissingFile, match="no folder .*nowhere: get diffusion_pytorch_model.safetensors"):
        load.load_wan(tmp_path / "nowhere", **FP32)
