"""The host's memory: weights that do not fit are refused or changed unread; what was read is given back."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastvmt import main
from wan_mini.checkpoint import read_tensors
from wan_mini.device import host
from wan_mini.device.host import PIECE, fit_dtype, forget_pages, free_host_memory, pieces
from wan_mini.device.memory import set_weight_dtypes, weight_bytes
from wan_mini.device.offload import on_device
from wan_mini.errors import UserError
from wan_mini.load import build_from_folder, load_wan
from wan_mini.runs import program as program_module
from wan_mini.tiny.world import make_clip
from wan_mini.video import write_video

CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16


@pytest.fixture
def sizes(folder) -> dict[tuple[torch.dtype, str], int]:
    """Bytes of the weights that are held at once."""
    _, parts = build_from_folder(folder)
    held = {}
    for dtype in (FP32, BF16):
        set_weight_dtypes(parts, dtype)
        for offload in ("none", "parts"):
            held[dtype, offload] = max(weight_bytes(parts, offload).values())
    return held


def fits(folder, dtype, **options) -> torch.dtype:
    _, parts = build_from_folder(folder)
    return fit_dtype(parts, dtype, CPU, **{"offload": "none", "named": False} | options)


def test_free_memory_is_read_from_the_system(tmp_path, monkeypatch):
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:  9 kB\nMemFree:  1 kB\nMemAvailable:    5 kB\n")
    monkeypatch.setattr(host, "MEMORY_INFO", file)
    assert free_host_memory() == 5 * 1024
    monkeypatch.setattr(host, "MEMORY_INFO", tmp_path / "none")
    assert free_host_memory() is None


def test_what_fits_stays_and_what_does_not_becomes_bfloat16(folder, sizes, monkeypatch, capsys):
    """Nine tenths of the free memory are taken at most; only a dtype that nobody named is changed."""
    free = {}
    monkeypatch.setattr(host, "free_host_memory", lambda: free["bytes"])
    free["bytes"] = int(sizes[FP32, "none"] / 0.89)
    assert fits(folder, FP32) == FP32 and capsys.readouterr().out == ""
    free["bytes"] = int(sizes[FP32, "none"] / 0.91)
    assert fits(folder, FP32) == BF16
    assert capsys.readouterr().out.startswith("note: weights of torch.float32 take ")
    with pytest.raises(UserError, match="in torch.float32 and .* try --dtype bfloat16 or --offload"):
        fits(folder, FP32, named=True)
    free["bytes"] = int(sizes[BF16, "none"] / 0.91)
    with pytest.raises(UserError, match="in torch.bfloat16 and .* try --offload"):
        fits(folder, FP32)
    assert sizes[BF16, "parts"] < sizes[BF16, "none"] and fits(folder, BF16, offload="parts") == BF16
    free["bytes"] = None
    assert fits(folder, FP32, named=True) == FP32


def test_a_run_is_refused_before_weights_are_read(folder, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(host, "free_host_memory", lambda: 1000)
    monkeypatch.setattr(program_module, "load_wan", lambda *_, **__: pytest.fail("weights were read"))
    argv = ["--model", str(folder), "--ref", "x.mp4", "--prompt", "a ball", "--device", "cpu", "--out", str(tmp_path)]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the weights take ") and error.count("\n") == 1
    assert main([*argv, "--dry-run"]) == 0


def test_parts_are_read_when_they_work(folder, wan):
    """Off the disk, with the same bits, and gone again; the files' hashes come with the first reading."""
    waiting = load_wan(folder, device=CPU, dtype=FP32, on_demand=True)
    assert waiting.device.type == "meta" and not waiting.hashes and waiting.dtype == FP32
    for name in ("dit", "vae", "text_encoder"):
        part, expected = getattr(waiting, name), getattr(wan, name).state_dict()
        for _ in range(2):
            with on_device(part, CPU):
                got = part.state_dict()
                assert got.keys() == expected.keys()
                assert all(torch.equal(got[key], expected[key]) for key in expected)
        assert all(weight.is_meta for weight in part.parameters())
    assert waiting.hashes == wan.hashes


def resident_kb() -> int:
    """Pages of mapped files that this process holds."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssFile:"):
            return int(line.split()[1])
    raise AssertionError("no line RssFile")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no other system says what is in memory")
def test_pages_are_given_back_and_can_be_read_again(tmp_path):
    values = torch.arange(2**22, dtype=torch.float32)  # 16 MB
    save_file({"x": values}, tmp_path / "x.safetensors")
    ((_, mapped),) = read_tensors(tmp_path / "x.safetensors", ["x"])
    before = resident_kb()
    assert torch.equal(mapped, values)
    read = resident_kb()
    forget_pages(mapped)
    forgotten = resident_kb()
    assert read - forgotten > 15_000, (before, read, forgotten)
    assert torch.equal(mapped, values)


def test_a_mapped_tensor_is_held_piece_by_piece(tmp_path):
    """In order, also of a view whose elements do not lie in order."""
    values = torch.arange(2**24, dtype=torch.float32).view(2**12, 2**12)  # 64 MB, four pieces
    save_file({"x": values}, tmp_path / "x.safetensors")
    ((_, mapped),) = read_tensors(tmp_path / "x.safetensors", ["x"])
    before, held, start = resident_kb(), [], 0
    for piece in pieces(mapped):
        assert piece.nbytes <= PIECE and torch.equal(piece, values.view(-1)[start : start + len(piece)])
        held.append(resident_kb() - before)
        start += len(piece)
    assert start == values.numel() and max(held) < 2 * PIECE / 1024, held
    assert torch.equal(torch.cat([piece.clone() for piece in pieces(mapped.mT)]), values.mT.reshape(-1))


def test_offloading_on_a_cpu_is_the_same_run(folder, tmp_path):
    ref = write_video(tmp_path / "ref.webp", make_clip(0).frames[:18, ::2, ::2], fps=16)
    argv = ["--model", str(folder), "--ref", str(ref), "--prompt", "a ball", "--device", "cpu", "--dtype", "float32"]
    argv += ["--set", "height=32", "width=64", "frames=9", "steps=1", "guidance_fraction=1", "optim_steps=1"]
    runs = []
    for words in ([], ["--offload"]):
        out = tmp_path / f"run{len(words)}"
        assert main([*argv, *words, "--out", str(out)]) == 0
        record = json.loads((out / "run.json").read_text())
        runs.append((load_file(out / "latents.safetensors")["latents"], record["checkpoint_sha256"]))
    assert torch.equal(runs[0][0], runs[1][0]) and runs[0][1] == runs[1][1] and len(runs[0][1]) == 3
