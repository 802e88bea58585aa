"""Random checkpoints with the names, shapes, dtypes and files of the published 1.3B folders: load, plan, transfer.

Here with 2 of 30 and 1 of 24 layers and a short vocabulary: 1.5 GB of files a folder. With FULL_SIZE=1 in the
environment with all of them, 18 GB of files in the original layout and 23 GB in diffusers': minutes.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from math import prod
from mmap import MAP_SHARED
from pathlib import Path

import pytest
import torch
from conftest import DATA
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import set_default_mmap_options, skip_data

from wan_mini.config import WAN_VAE
from wan_mini.tiny.training.grammar import CHARACTERS, tokenizer_json
from wan_mini.tiny.world import make_clip
from wan_mini.video import write_video

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are in other units elsewhere"),
]
ROOT = Path(__file__).resolve().parent.parent
FULL = "FULL_SIZE" in os.environ
LAYERS = {"dit": 2, "text_encoder": 1}  # where not all are wanted
VOCABULARY = 8192
PIECES = 256000 if FULL else 0  # of the tokenizer, beside single characters
MANIFESTS = {"dit": "wan2.1_t2v_1.3b.dit", "vae": "wan2.1.vae", "text_encoder": "umt5_xxl.encoder"}
ORIGINAL = {"dit": "diffusion_pytorch_model.safetensors", "vae": "Wan2.1_VAE.pth"}
ORIGINAL["text_encoder"] = "models_t5_umt5-xxl-enc-bf16.pth"
DIFFUSERS = {"dit": "transformer", "vae": "vae", "text_encoder": "text_encoder"}
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
VALUES = 0.02 * torch.randn(2**20, generator=torch.Generator().manual_seed(0))
CONFIGS = {
    "dit": {"num_heads": 12, "dim": 1536, "num_attention_heads": 12, "attention_head_dim": 128, "text_len": 512},
    "vae": {"latents_mean": list(WAN_VAE.mean), "latents_std": list(WAN_VAE.std)},
    "text_encoder": {"num_heads": 64, "d_kv": 64},
}
REF = ["height=64", "width=96", "frames=5", "steps=2", "guidance_fraction=0.5", "optim_steps=2", "window=3", "tile=2,3"]
WORKING = 1.2e9  # activations of a transfer: the VAE's, and a gradient's through blocks of full width
Shapes = dict[str, list[int]]


def shapes_of(kind: str, naming: str, whole: bool) -> Shapes:
    """The published names and shapes, unless the whole model is wanted with few layers and a short vocabulary."""
    published = json.loads((DATA / f"manifests/{MANIFESTS[kind]}.{naming}.json").read_text())["tensors"]
    shapes = {}
    for name, shape in published.items():
        layer = re.search(r"\bblocks?\.(\d+)\.", name)
        left_out = not whole and kind in LAYERS and layer is not None and int(layer[1]) >= LAYERS[kind]
        if left_out or name == "encoder.embed_tokens.weight":  # the same as shared.weight
            continue
        shapes[name] = shape
        if kind == "text_encoder" and shape[0] == 256384 and not whole:
            shapes[name] = [VOCABULARY, shape[1]]
    return shapes


def random_values(count: int, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """So many numbers, in pieces."""
    for start in range(0, count, len(VALUES)):
        yield VALUES[: count - start].to(dtype)


def write_safetensors(file: Path, shapes: Shapes, dtype: torch.dtype, numbers: bool = True) -> None:
    """As safetensors does, without ever holding a tensor; without numbers the file is sparse."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
        for shape in shapes.values() if numbers else ():
            for piece in random_values(prod(shape), dtype):
                stream.write(piece.view(torch.uint8).numpy().data)


def write_pickle(file: Path, shapes: Shapes, dtype: torch.dtype, numbers: bool = True) -> None:
    """As torch.save does, without ever holding a tensor: an archive with room for them, and then their numbers."""
    with FakeTensorMode():
        tensors = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
    with skip_data(materialize_fake_tensors=True):
        torch.save(tensors, file)
    if not numbers:
        return
    with set_default_mmap_options(MAP_SHARED):
        tensors = torch.load(file, mmap=True)
    for tensor in tensors.values():
        end = 0
        for piece in random_values(tensor.numel(), dtype):
            start, end = end, end + len(piece)
            tensor.view(-1)[start:end] = piece


def write_folder(folder: Path, naming: str, whole: bool, numbers: bool = True) -> dict[str, int]:
    """A checkpoint folder; bytes of each part in bfloat16, as it is held (the VAE in float32)."""
    held = {}
    for kind in MANIFESTS:
        shapes = shapes_of(kind, naming, whole)
        held[kind] = sum(map(prod, shapes.values())) * (4 if kind == "vae" else 2)
        place = folder / DIFFUSERS[kind] if naming == "diffusers" else folder
        place.mkdir(parents=True, exist_ok=True)
        if naming == "diffusers":
            for number in (1, 2):
                half = dict(list(shapes.items())[number - 1 :: 2])
                write_safetensors(place / f"model-{number:05}-of-00002.safetensors", half, torch.float32, numbers)
            (place / "config.json").write_text(json.dumps(CONFIGS[kind]))
        elif kind == "dit":
            write_safetensors(folder / ORIGINAL[kind], shapes, torch.float32, numbers)
            (folder / "config.json").write_text(json.dumps(CONFIGS[kind]))
        else:
            dtype = torch.float32 if kind == "vae" else torch.bfloat16
            write_pickle(folder / ORIGINAL[kind], shapes, dtype, numbers)
    tokenizer = folder / ("tokenizer" if naming == "diffusers" else "google/umt5-xxl") / "tokenizer.json"
    tokenizer.parent.mkdir(parents=True)
    scores = dict.fromkeys(CHARACTERS, -1.0) | {f"piece{number}": -9.0 for number in range(PIECES)}
    tokenizer.write_text(json.dumps(tokenizer_json(scores)), encoding="utf-8")
    return held


def write_elsewhere(folder: Path, *how: str | bool) -> dict[str, int]:
    """write_folder in a process of its own: the peak of a process counts what its parent held when it began."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            (folder.parent / "held").write_text(json.dumps(write_folder(folder, *how)))
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    return json.loads((folder.parent / "held").read_text())


def run(*command: str, log: Path, code: int = 0) -> int:
    """Run Python with this; peak bytes of the process, with the pages of the files that it has mapped."""
    start = time.perf_counter()
    with log.open("w") as printed:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=printed, stderr=printed)
        _, status, usage = os.wait4(process.pid, 0)
    peak = usage.ru_maxrss * 1024
    seconds, cpu = time.perf_counter() - start, usage.ru_utime + usage.ru_stime
    print(f"{seconds:7.1f} s {cpu:7.1f} s of CPU {peak / 1e9:6.2f} GB  {' '.join(command)[:90]!r}", flush=True)
    assert os.waitstatus_to_exitcode(status) == code, log.read_text()[-2000:]
    return peak


IDLE = """
import sys, torch, fastvmt
from wan_mini.checkpoint import read_checkpoint
read_checkpoint(sys.argv[1])
x = torch.ones(1000, 1000, dtype=torch.bfloat16)
x.aminmax(), x @ x
"""
SMALL_MACHINE = """
import sys, fastvmt
from wan_mini.device import host, select
host.free_host_memory = lambda: 18e9
select.has_fast_bfloat16 = lambda device: False
sys.exit(fastvmt.main())
"""
LOAD = """
import sys, torch
from wan_mini.load import *
for kind in sys.argv[2:]:
    globals()["load_" + kind](sys.argv[1], device="cpu", dtype=torch.bfloat16)
"""


@pytest.mark.parametrize("naming", ["official", "diffusers"])
def test_the_published_files(naming, tmp_path):
    """Every program takes them; a part is read within 1.1 of its size, a transfer holds one part at a time."""
    folder, log = tmp_path / "model", tmp_path / "log"
    held = write_elsewhere(folder, naming, FULL)
    print(f"\n{sum(file.stat().st_size for file in folder.rglob('*.*')) / 1e9:.1f} GB of files; held: {held}")
    model = str(folder)
    idle = run("-c", IDLE, model, log=log)  # what a process has that loads nothing
    run("-m", "wan_mini.inspect", model, log=log)
    base = ["fastvmt.py", "--model", model, "--device", "cpu"]
    run(*base, "--dtype", "bfloat16", "--dry-run", "--set", *REF, log=log)
    assert "text_encoder" in log.read_text()
    kinds = ["text_encoder", "dit", "vae"]  # the largest first; of float32 files the first is narrowed on the way
    peak = run("-c", LOAD, model, *kinds, log=log)
    print(f"        peak / largest part: {(peak - idle) / max(held.values()):.3f}")
    assert peak - idle <= 1.1 * max(held.values()), (peak, idle, held)
    ref = write_video(tmp_path / "ref.webp", make_clip(0).frames[:10, ::2, ::2], fps=16)
    flags = ["--ref", str(ref), "--prompt", "a ball", "--out", str(tmp_path / "run"), "--set", *REF]
    peak = run(*base, "--dtype", "bfloat16", "--offload", *flags, log=log)
    print(log.read_text())
    assert peak - idle <= 1.1 * max(held.values()) + (0 if FULL else WORKING), (peak, idle, held)
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["offload"] == "parts" and len(record["checkpoint_sha256"]) >= 3


@pytest.mark.parametrize(
    ("words", "begins"),
    [
        ([], "note: weights of torch.float32 take "),
        (["--dtype", "float32"], "error: the weights take "),
        (["--dtype", "float32", "--offload"], "error: the weights take "),
    ],
    ids=["changed", "refused", "refused though offloaded"],
)
def test_too_large_a_dtype_is_named_before_memory_is_taken(words, begins, tmp_path):
    """All layers, in files without numbers, where 18 GB are free and the default is float32: one line says so."""
    folder, log = tmp_path / "model", tmp_path / "log"
    write_elsewhere(folder, "official", True, False)
    idle = run("-c", IDLE, str(folder), log=log)
    flags = ["--model", str(folder), "--device", "cpu", "--ref", "none.mp4", "--prompt", "a"]
    flags += ["--out", str(tmp_path / "out")]
    peak = run("-c", SMALL_MACHINE, *flags, *words, log=log, code=2)
    first, *others = log.read_text().splitlines()
    print(first)
    assert first.startswith(begins) and len(others) == (not words), (first, others)
    assert peak - idle < 0.2e9, (peak, idle)
