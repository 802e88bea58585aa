"""Hashes of weight files: those of the files, from what loading reads, remembered until a file changes."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from layout_folders import FP32, LAYOUTS

from wan_mini import hashes, load
from wan_mini.checkpoint import read_checkpoint, read_header, read_tensors
from wan_mini.hashes import FileHasher, HashCache, cache_folder, sha256_file


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The cache file of this test, not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user cache"))
    return tmp_path / "user cache/fastvmt-mini/sha256.json"


@pytest.fixture
def copy(folders, tmp_path):
    """A function, layout -> copy of its folder, whose files are an hour old."""

    def make(layout: str) -> Path:
        folder = Path(shutil.copytree(folders[layout], tmp_path / layout))
        for file in folder.rglob("*.*"):
            make_older(file, 3600)
        return folder

    return make


def make_older(file: Path, seconds: int) -> None:
    changed = file.stat().st_mtime_ns - seconds * 10**9
    os.utime(file, ns=(changed, changed))


def expected_hashes(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.suffix in (".safetensors", ".pth")]
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hashes_are_those_of_the_files(layout, copy):
    folder = copy(layout)
    first = load.load_wan(folder, **FP32)
    assert first.hashes == expected_hashes(folder) != {}
    assert load.load_wan(folder, **FP32).hashes == first.hashes  # now from the cache
    assert load.load_wan(folder, **FP32, hash_files=False).hashes == {}
    plain = load.load_wan(folder, **FP32, hash_files=False)
    for name, tensor in first.dit.state_dict().items():
        assert plain.dit.state_dict()[name].equal(tensor)


class CountedSha256:
    """hashlib.sha256 that keeps the sizes of what it gets after its start."""

    sizes: ClassVar[list[int]] = []
    make = staticmethod(hashlib.sha256)

    def __init__(self, start: bytes = b"") -> None:
        self.sha256 = self.make(start)

    def update(self, piece) -> None:
        self.sizes.append(len(piece))
        self.sha256.update(piece)

    def hexdigest(self) -> str:
        return self.sha256.hexdigest()


def test_a_file_is_hashed_once_and_in_the_steps_of_its_tensors(copy, monkeypatch):
    """So that the system still has what loading has just read; the second time nothing is hashed."""
    folder = copy("original")
    tensors, files = [], []
    for part in read_checkpoint(folder).parts.values():
        for file in part.files:
            tensors += [tensor.nbytes for _, tensor in read_tensors(file, part.keys(file))]
            files.append(file.stat().st_size)
    monkeypatch.setattr(CountedSha256, "sizes", [])
    monkeypatch.setattr(hashes, "hashlib", SimpleNamespace(sha256=CountedSha256))
    for _ in range(2):
        load.load_wan(folder, **FP32)
        assert sum(CountedSha256.sizes) == sum(files) > 0
        assert len(CountedSha256.sizes) == len(tensors) + len(files)  # and what is left of each file


def test_a_changed_file_is_hashed_again(copy, cache):
    folder = copy("safetensors")
    before = load.load_wan(folder, **FP32).hashes
    entries = json.loads(cache.read_text())
    assert {Path(name).relative_to(folder).as_posix() for name in entries} == before.keys()
    file = folder / "Wan2.1_VAE.safetensors"
    status = file.stat()
    entries[str(file)][2] = "remembered"
    cache.write_text(json.dumps(entries))
    assert load.load_wan(folder, **FP32).hashes[file.name] == "remembered"  # the cache is used
    make_older(file, 1)
    assert load.load_wan(folder, **FP32).hashes == before  # another time of change
    os.utime(file, ns=(status.st_mtime_ns, status.st_mtime_ns))
    assert HashCache().get(file) is None
    entries = json.loads(cache.read_text())
    entries[str(file)] = [status.st_size + 1, status.st_mtime_ns, "remembered"]
    cache.write_text(json.dumps(entries))
    assert load.load_wan(folder, **FP32).hashes == before  # another size


def test_a_file_that_has_just_changed_is_not_remembered(folders, tmp_path, cache):
    file = Path(shutil.copy(folders["safetensors"] / "Wan2.1_VAE.safetensors", tmp_path / "vae.safetensors"))
    now = file.stat().st_mtime_ns + 10**9
    os.utime(file, ns=(now, now))
    HashCache().store(file, (file.stat().st_size, now), "x")
    assert not cache.exists()
    make_older(file, 60)
    HashCache().store(file, (file.stat().st_size, now), "x")  # changed while it was read
    assert not cache.exists()
    HashCache().store(file, (file.stat().st_size, file.stat().st_mtime_ns), "x")
    assert HashCache().get(file) == "x"


def test_files_that_are_gone_are_forgotten(tmp_path, cache):
    for name in "ab":
        file = tmp_path / name
        file.write_text(name)
        make_older(file, 60)
        HashCache().store(file, (1, file.stat().st_mtime_ns), name)
        assert list(json.loads(cache.read_text())) == [str(file)]
        file.unlink()


def test_a_file_that_cannot_be_looked_at_is_forgotten(tmp_path, cache):
    """Its name is too long for this disk; what a closed folder or a lost disk gives is an OSError as well."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text(json.dumps({"/tmp/" + 300 * "x": [1, 2, "old"]}))
    file = tmp_path / "a"
    file.write_text("a")
    make_older(file, 60)
    HashCache().store(file, (1, file.stat().st_mtime_ns), "a")
    assert list(json.loads(cache.read_text())) == [str(file)]


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 3}'])
def test_a_broken_cache_is_no_error(content, copy, cache):
    folder = copy("comfy")
    cache.parent.mkdir(parents=True)
    cache.write_text(content)
    assert load.load_wan(folder, **FP32).hashes == expected_hashes(folder)
    assert len(json.loads(cache.read_text())) >= 3


def test_an_unwritable_cache_is_no_error(copy, cache):
    cache.parent.parent.write_text("a file where the folder should be")
    folder = copy("comfy")
    assert load.load_wan(folder, **FP32).hashes == expected_hashes(folder)


def test_the_cache_is_where_the_user_says(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "user cache/fastvmt-mini"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache/fastvmt-mini"


def test_a_tensor_left_out_costs_a_second_look_and_no_wrong_hash(folders):
    file = folders["safetensors"] / "Wan2.1_VAE.safetensors"
    keys = [header.key for header in read_header(file)[0]][1:]
    hasher = FileHasher()
    assert [key for key, _ in hasher.watch(file, read_tensors(file, keys))] == keys
    assert hasher.digests == {file: sha256_file(file)}


def test_a_loader_that_stops_leaves_no_hash(broken, cache):
    file = broken("dit", lambda tensors: tensors["blocks.1.ffn.0.bias"].fill_(torch.nan))
    make_older(file, 60)
    part = read_checkpoint(file).parts["dit"]
    hasher = FileHasher()
    with pytest.raises(ValueError, match="not finite"):
        load.load_weights(load.build_and_check(part), part, "cpu", torch.float32, hasher)
    assert hasher.digests == {} and not cache.exists()
