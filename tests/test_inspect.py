"""The command line that looks into checkpoints."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from layout_folders import LAYOUTS

from wan_mini import inspect


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inspect_describes_every_layout(layout, folders, capsys):
    assert inspect.main([str(folders[layout])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(line.startswith("[ok]") for line in lines)
    naming = {"diffusers": "Diffusers", "shards": "Diffusers"}.get(layout, "original")
    assert re.search(rf"dit: {naming} names, float32, 81,202 parameters, \S+ GB, .*{layout}", lines[0])


def test_inspect_names_what_to_get(folders, tmp_path, capsys):
    shutil.copytree(folders["original"], tmp_path / "wan")
    (tmp_path / "wan/Wan2.1_VAE.pth").unlink()
    assert inspect.main([str(tmp_path / "wan")]) == 1
    vae = capsys.readouterr().out.splitlines()[1]
    assert vae.startswith("[missing] vae: no vae in")
    for source in ("Wan2.1_VAE.pth of Wan-AI/", "vae/ of Wan-AI/", "vae/wan_2.1_vae.safetensors of Comfy-Org/"):
        assert source in vae


def test_inspect_reports_a_broken_part(broken, capsys):
    assert inspect.main([str(broken("dit", lambda tensors: tensors.pop("blocks.1.norm3.bias")))]) == 1
    assert re.match(r"\[broken\]  dit: .* 1 tensors missing: blocks.1.norm3.bias", capsys.readouterr().out)


def test_compare_finds_the_perturbed_block(folders, broken, capsys):
    assert inspect.main(["--compare", str(folders["original"]), str(folders["shards"])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and all(re.match(r"\[ok\] +\S+ +max=0.0e\+00 mean=0.0e\+00", line) for line in lines)
    file = broken("dit", lambda tensors: tensors["blocks.1.cross_attn.v.bias"].add_(0.01))
    assert inspect.main(["--compare", str(folders["original"]), str(file)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"\[diff\] blocks.1 +max=\d.\de-0\d mean=", lines[-2]) and lines[-1] == "first difference: blocks.1"
    assert all(line.startswith("[ok]") for line in lines[:-2]) and lines[-3].split()[1] == "blocks.0"


def test_compare_refuses_different_sizes(folders, broken, capsys):
    file = broken("dit", lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("blocks.2.")])
    assert inspect.main(["--compare", str(file), str(folders["comfy"])]) == 2
    assert "different sizes" in capsys.readouterr().err


def test_errors_are_one_line_and_status_two(tmp_path):
    (tmp_path / "dit.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    command = [sys.executable, "-m", "wan_mini.inspect", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(inspect.__file__).parents[1])
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: .*dit.safetensors cannot be read, it is a Git LFS pointer, .*\n", done.stderr)
