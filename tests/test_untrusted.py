"""Checkpoints from strangers: every wrong value is named, with its file, before anything is run, read or allocated."""

import base64
import json
import os
import pickle
import shutil
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from wan_mini import inspect, json_file, load
from wan_mini.checkpoint import read_checkpoint
from wan_mini.errors import UserError
from wan_mini.hashes import HashCache
from wan_mini.json_file import parse_json, read_json
from wan_mini.tokenizer import Tokenizer

DIT = "diffusion_pytorch_model.safetensors"
posix = pytest.mark.skipif(os.name != "posix", reason="needs pipes, sockets and shell scripts of POSIX")


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the small random checkpoint, to break."""
    return Path(shutil.copytree(folder, tmp_path / "model"))


def refuses(path, pattern, action=load.build_from_folder):
    start = time.process_time()
    with pytest.raises(UserError, match=pattern) as caught:
        action(path)
    assert "\n" not in str(caught.value)
    assert time.process_time() - start < 2


def edit_json(file, change):
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


# JSON


def setting(*names_and_value):
    *names, last, value = names_and_value

    def change(content):
        for name in names:
            content = content[name]
        content[last] = value

    return change


CONFIGS = {
    "heads 0": (setting("num_heads", 0), "config.json: num_heads must be a whole number from 1 .*, got 0"),
    "heads negative": (setting("num_heads", -4), "config.json: num_heads must be .*, got -4"),
    "heads null": (setting("num_heads", None), "config.json: num_heads must be .*, got null"),
    "heads list": (setting("num_heads", [4]), r"config.json: num_heads must be .*, got \[4\]"),
    "heads true": (setting("num_heads", True), "config.json: num_heads must be .*, got True"),
    "heads 1e999": (setting("num_heads", 10**999), "config.json: num_heads must be .*, got 1000.*0"),
    "heads that do not divide": (setting("num_heads", 5), "dim must split into num_heads"),
    "layers text": (setting("num_layers", "6"), 'config.json: num_layers must be .*, got "6"'),
    "layers huge": (setting("num_layers", 10**9), "config.json: num_layers must be .*, got 1000000000"),
    "layers large": (setting("num_layers", 100_000), "num_layers must be at most 128, got 100000"),
    "text length 0": (setting("text_len", 0), "config.json: text_len must be .*, got 0"),
    "text length text": (setting("text_len", "64"), "config.json: text_len must be"),
    "vae null": (setting("vae", None), "config.json: vae must be an object, got null"),
    "vae list": (setting("vae", [1]), r"config.json: vae must be an object, got \[1\]"),
    "mean null": (setting("vae", "mean", None), "config.json: vae.mean must be a list of 1 to 256 items, got null"),
    "mean scalar": (setting("vae", "mean", 0.5), "config.json: vae.mean must be a list"),
    "mean text": (setting("vae", "mean", "0" * 16), "config.json: vae.mean must be a list"),
    "mean of texts": (setting("vae", "mean", 3, "x"), r'config.json: vae.mean\[3\] must be a finite number.*, got "x"'),
    "mean short": (setting("vae", "mean", [0.0] * 3), "mean and std need z_dim=16 numbers, got 3"),
    "std zero": (setting("vae", "std", [0.0] * 16), "std must be at least 1e-06"),
    "std infinite": (setting("vae", "std", 2, 10**400), r"config.json: vae.std\[2\] must be a finite number"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_wrong_values_of_a_config_are_named(case, copy):
    change, pattern = CONFIGS[case]
    for file in copy.glob("*.safetensors"):  # the header's own config would hold
        save_file(load_file(file), file)
    edit_json(copy / "config.json", change)
    refuses(copy, pattern)


BROKEN = {
    "nested": (b'{"a":' * 200_000, "should hold a JSON object"),
    "nested less": (b'{"a":' * 100 + b"1" + b"}" * 100, "is nested deeper than 32 levels"),
    "wide and nested": (b'{"a":[' + b"[[[[]]]]," * 9 + b"[" * 40 + b"]" * 40 + b"]}", "is nested deeper"),
    "NaN": (b'{"dim": NaN}', "should hold a JSON object"),
    "list": (b"[1]", "should hold a JSON object"),
    "digits": (b'{"dim": ' + b"9" * 5000 + b"}", "should hold a JSON object|must be a whole number"),
    "no UTF-8": (b'{"dim": "\xff"}', "should hold a JSON object"),
    "empty": (b"", "should hold a JSON object"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_json_is_refused_wherever_it_is_read(case, copy):
    content, pattern = BROKEN[case]
    for name in ("config.json", "google/umt5-xxl/tokenizer.json"):
        whole = (copy / name).read_bytes()
        (copy / name).write_bytes(content)
        refuses(copy, f"{name}.* {pattern}", lambda path: load.load_wan(path, device="cpu", dtype=torch.float32))
        (copy / name).write_bytes(whole)
    if content.isascii():
        save_file(load_file(copy / DIT), copy / DIT, {"config": content.decode("ascii")})
        refuses(copy, f"{DIT}: config {pattern}")


@posix
def test_json_is_bounded_and_regular(tmp_path, monkeypatch):
    monkeypatch.setattr(json_file, "MAX_DEPTH", 2)
    assert parse_json('{"a": [1]}', "x") == {"a": [1]}
    with pytest.raises(UserError, match="x is nested deeper than 2 levels"):
        parse_json('{"a": [[1]]}', "x")
    (tmp_path / "a.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="a.json has 8 bytes, more than 7"):
        read_json(tmp_path / "a.json", max_bytes=7)
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(UserError, match="pipe.json should hold a JSON object, but is no regular file"):
        read_json(tmp_path / "pipe.json")


def test_a_strangers_config_above_the_folder_is_not_read(copy):
    expected = load.build_from_folder(copy)[1]["vae"].config
    (copy.parent / "config.json").write_text("[1, 2, 3]")
    assert load.build_from_folder(copy)[1]["vae"].config == expected
    edit_json(copy / "config.json", lambda content: content.pop("vae"))
    file = copy / "Wan2.1_VAE.safetensors"
    save_file(load_file(file), file)
    for where in (copy.parent, copy):  # above, and an image model's statistics beside the weights
        (where / "config.json").write_text(json.dumps({"mean": [0.5] * 16, "std": [0.5] * 16}))
        modules = [load.load_vae(file, device="cpu", dtype=torch.float32), *read_vae(copy)]
        assert {module.config.mean for module in modules} == {load.WAN_VAE.mean}


def read_vae(path):
    return [load.build_and_check(read_checkpoint(path).parts["vae"])]


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        ("{}", "index.json must have the field weight_map"),
        ('{"weight_map": []}', r"index.json: weight_map must be an object.*, got \[\]"),
        ('{"weight_map": {"a": ["x"]}}', "index.json: weight_map.a must be the name of a file"),
        ('{"weight_map": {"a": 7}}', "index.json: weight_map.a must be the name of a file .*got 7"),
        ('{"weight_map": {"a": "../../etc/passwd"}}', "index.json: weight_map.a must be .* in the same folder"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "index.json: weight_map.a must be .* in the same folder"),
        ("[" * 100_000, "index.json should hold a JSON object"),
    ],
)
def test_an_index_leads_nowhere_else(content, pattern, copy):
    tensors = load_file(copy / DIT)
    del tensors["head.head.bias"]
    save_file(tensors, copy / DIT, {"config": (copy / "config.json").read_text()})
    (copy / f"{DIT}.index.json").write_text(content)
    refuses(copy, f"1 tensors missing: head.head.bias; and .*{pattern}")


# Headers


def with_header(file, change):
    """Rewrite a safetensors file's header, the data as it was."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header = change(header) or header
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


NAME = "head.head.bias"
HEADERS = {
    "list": (lambda header: [header], "its header should hold a JSON object"),
    "tensor a list": (setting(NAME, []), "must be an object"),
    "no offsets": (lambda header: header[NAME].pop("data_offsets") and None, "must have the field data_offsets"),
    "offsets text": (setting(NAME, "data_offsets", "0,4"), "data_offsets must be a list of 2"),
    "offset negative": (setting(NAME, "data_offsets", 0, -4), r"data_offsets\[0\] must be a whole number"),
    "offset behind the end": (setting(NAME, "data_offsets", [10**12, 10**12 + 256]), "is it truncated"),
    "offset reversed": (setting(NAME, "data_offsets", [8, 4]), "is it truncated"),
    "shape of a petabyte": (setting(NAME, "shape", [2**40, 2**10]), "is it truncated"),
    "shape negative": (setting(NAME, "shape", [-1]), r"shape\[0\] must be a whole number"),
    "shape text": (setting(NAME, "shape", "64"), "shape must be a list"),
    "shape nested": (setting(NAME, "shape", [[64]]), r"shape\[0\] must be a whole number"),
    "dtype number": (setting(NAME, "dtype", 7), "dtype must be a text"),
    "dtype other": (setting(NAME, "dtype", "F64"), "is it truncated"),
    "metadata a list": (setting("__metadata__", [1]), "__metadata__ must be an object"),
    "metadata not text": (setting("__metadata__", {"config": 1}), "__metadata__.config must be a text"),
    "config a list": (setting("__metadata__", {"config": "[]"}), "config should hold a JSON object"),
    "scalar": (setting("patch_embedding.weight", {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}), "truncated"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_wrong_headers_are_named(case, copy):
    change, pattern = HEADERS[case]
    with_header(copy / DIT, change)
    refuses(copy, f"{DIT}.*{pattern}")


@pytest.mark.parametrize("length", [0, 2, 2**24 + 1, 99_000_000, 2**60, 2**64 - 1])
def test_a_header_has_a_largest_length(length, copy):
    (copy / DIT).write_bytes(struct.pack("<Q", length) + b"{}" * 100)
    refuses(copy, f"{DIT} cannot be read")


NUMBERED = {
    "blocks.100000.self_attn.q.weight": "more than 128 blocks",
    "blocks.1000000000.ffn.0.weight": "more than 128 blocks",
    f"blocks.{'9' * 5000}.ffn.0.weight": "more than 128 blocks|digits",
}


@pytest.mark.parametrize("name", NUMBERED)
def test_a_block_number_builds_no_blocks(name, copy):
    tensors = load_file(copy / DIT)
    save_file(tensors | {name: torch.ones(2, 2)}, copy / DIT, {"config": (copy / "config.json").read_text()})
    refuses(copy, NUMBERED[name])


SHAPES = {
    "patch_embedding.weight": torch.ones(()),
    "blocks.0.ffn.0.weight": torch.ones(0, 48),
    "time_embedding.0.weight": torch.ones(48),
    "head.head.weight": torch.ones(1, 1, 1),
}


@pytest.mark.parametrize("name", SHAPES)
def test_sides_are_counted(name, copy):
    tensors = load_file(copy / DIT)
    save_file(tensors | {name: SHAPES[name]}, copy / DIT, {"config": (copy / "config.json").read_text()})
    refuses(copy, f"{name} must have . sides")


@posix
def test_weights_are_regular_files(copy):
    os.mkfifo(copy / "more.safetensors")
    refuses(copy, "more.safetensors is no regular file")


@pytest.mark.parametrize(
    ("start", "pattern"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer, .*run git lfs pull"),
        (b"<!DOCTYPE html>", "web page"),
        (b"PK\3\4" + bytes(60), "pickle"),
        (b"GGUF\3\0\0\0" + bytes(60), "GGUF"),
    ],
)
def test_what_is_no_safetensors_file_is_described(start, pattern, copy):
    (copy / DIT).write_bytes(start)
    refuses(copy, f"{DIT} (cannot be read, it )?is a {pattern}")


# Parts that do not fit one another


@pytest.mark.parametrize(
    ("shapes", "pattern"),
    [
        ({"text_embedding.0.weight": (48, 32)}, "the DiT reads text of width 32, the encoder gives 16"),
        (
            {"patch_embedding.weight": (48, 8, 1, 2, 2), "head.head.weight": (32, 48), "head.head.bias": (32,)},
            "the DiT takes 8 channels and gives 8, the VAE has 16",
        ),
    ],
)
def test_parts_of_two_models_are_refused_before_anything_is_read(shapes, pattern, copy, capsys):
    tensors = load_file(copy / DIT) | {name: torch.ones(shape) for name, shape in shapes.items()}
    save_file(tensors, copy / DIT, {"config": (copy / "config.json").read_text()})
    refuses(copy, pattern)
    assert inspect.inspect(copy) is False
    assert capsys.readouterr().out.splitlines()[-1].startswith("[broken]  together: the DiT")


# Pickles


class Runs:
    """A pickle that runs a command when it is read without care."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def archive(file, content, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(file, "w", compression) as zipped:
        zipped.writestr("a/data.pkl", content)
        zipped.writestr("a/version", "3\n")
        zipped.writestr("a/byteorder", "little")


def test_no_pickle_runs_code(tmp_path):
    sign, file = tmp_path / "ran", tmp_path / "vae.pth"
    command = f"touch {sign}"
    read = [lambda path: read_checkpoint(path)]
    torch.save({"encoder.conv1.weight": Runs(command)}, file)
    refuses(file, r"holds more than tensors, which could run code \((posix|nt).system\)", *read)
    file.write_bytes(pickle.dumps(Runs(command)))
    refuses(file, "pickle from before torch 1.6", *read)
    archive(file, pickle.dumps(Runs(command)))
    refuses(file, "cannot be read", *read)
    file.write_bytes(torch.jit.script(torch.nn.Linear(2, 2)).save_to_buffer())
    refuses(file, "cannot be read", *read)
    (tmp_path / "vae.safetensors").write_bytes(pickle.dumps(Runs(command)))
    refuses(tmp_path / "vae.safetensors", "it is a pickle", *read)
    assert not sign.exists()


def test_a_pickle_has_a_largest_size(tmp_path):
    """Three megabytes that unpack to gigabytes, entries that say more than the file holds."""
    file = tmp_path / "vae.pth"
    archive(file, bytes(10**7), zipfile.ZIP_DEFLATED)
    refuses(file, "torch.save has not written its a/data.pkl", read_checkpoint)
    archive(file, bytes(10**7))
    refuses(file, "torch.save has not written its a/data.pkl", read_checkpoint)


STRANGE = {
    "stride 0": lambda: torch.zeros(1).expand(2**40),
    "meta": lambda: torch.zeros(2**40, device="meta"),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
}


@pytest.mark.parametrize("case", STRANGE)
def test_tensors_without_their_data_are_refused(case, tmp_path):
    torch.save({"encoder.conv1.weight": STRANGE[case]()}, tmp_path / "vae.pth")
    refuses(tmp_path / "vae.pth", "vae.pth cannot be read", read_checkpoint)


def test_what_is_no_tensor_is_passed_over(tmp_path):
    tensor = torch.ones(2)
    for content in ({1: tensor, "a": 3, "encoder.conv1.weight": tensor}, [tensor], tensor, {}):
        torch.save(content, tmp_path / "vae.pth")
        parts = read_checkpoint(tmp_path / "vae.pth").parts
        assert [header.key for part in parts.values() for header in part.tensors] == ["encoder.conv1.weight"] * len(
            parts
        )


# The tokenizer


def damaged_charsmap(trie, replacements=b"\0"):
    blob = struct.pack("<I", 4 * len(trie)) + struct.pack(f"<{len(trie)}I", *trie) + replacements
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(blob).decode()}


@pytest.mark.parametrize("trie", [[], [2**31], [1 << 10 | 1 << 9] * 4, [1 << 10, *[0x61 | 1 << 8 | 1 << 30] * 255]])
def test_a_damaged_charsmap_is_an_error_of_its_user(trie, folder):
    spec = json.loads((folder / "google/umt5-xxl/tokenizer.json").read_text())
    spec["normalizer"] = damaged_charsmap(trie)
    with pytest.raises(UserError, match="precompiled_charsmap"):
        Tokenizer(spec).encode("a")


TOKENIZERS = {
    "unknown below 0": (setting("model", "unk_id", -1), "model .*unk_id"),
    "unknown text": (setting("model", "unk_id", "0"), "model .*unk_id"),
    "score text": (setting("model", "vocab", 3, ["a", "b"]), r"model.vocab\[3\] must be a finite number"),
    "score infinite": (setting("model", "vocab", 3, ["a", 10**400]), r"model.vocab\[3\] must be a finite number"),
    "piece number": (setting("model", "vocab", 3, [1, 1.0]), r"model.vocab\[3\] must be a text"),
    "piece long": (setting("model", "vocab", 3, ["a" * 10**6, 1.0]), r"model.vocab\[3\] must be a text"),
    "no lstrip": (lambda spec: spec["added_tokens"][0].pop("lstrip"), "added_tokens.0. must have the field lstrip"),
    "token empty": (setting("added_tokens", 0, "content", ""), "content must be a text of 1"),
    "token number": (setting("added_tokens", 0, "content", 1), "content must be a text"),
    "id text": (setting("added_tokens", 0, "id", "0"), "id must be a whole number"),
    "charsmap list": (setting("normalizer", {"type": "Precompiled", "precompiled_charsmap": [1]}), "normalizer"),
    "model list": (setting("model", []), "model"),
    "added object": (setting("added_tokens", {}), "added_tokens must be a list"),
    "pre-tokenizer text": (setting("pre_tokenizer", "Metaspace"), "pre_tokenizer"),
    "suffix of texts": (setting("post_processor", "special_tokens", "</s>", "ids", 1), "not iterable"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_wrong_values_of_a_tokenizer_are_named(case, copy):
    change, pattern = TOKENIZERS[case]
    edit_json(copy / "google/umt5-xxl/tokenizer.json", change)
    refuses(copy, f"tokenizer.json is not a UMT5 tokenizer.json: .*{pattern}", load.load_tokenizer)


def test_a_broken_cache_of_hashes_is_no_error(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "fastvmt-mini").mkdir()
    for content in ("[" * 100_000, "[]", '{"a": 1}', "\0"):
        (tmp_path / "fastvmt-mini/sha256.json").write_text(content)
        assert HashCache().get(Path(__file__)) is None
