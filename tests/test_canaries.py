"""Whole programs on inputs that try to run code, to read a file that is not theirs, or to contact an address.

Python's own audit events are the canary (test_fuzz.py): every program that is started, every address, every file.
"""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_fuzz import canary

import fastvmt
from wan_mini import generate, verify
from wan_mini.runs.cli import run
from wan_mini.video import write_video

SMALL = ["--device", "cpu", "--height", "32", "--width", "32", "--frames", "5", "--set", "steps=1", "optim_steps=1"]
ADDRESS = "http://127.0.0.1:9"
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"
SVG = f'<svg xmlns="http://www.w3.org/2000/svg"><image href="{ADDRESS}/a.png"/></svg>'.encode()
PLAYLIST = f"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXTINF:1,\n{ADDRESS}/film.ts\n#EXT-X-ENDLIST\n".encode()


class Runs:
    """A pickle that runs a command when it is read without care."""

    def __reduce__(self):
        return os.system, ("echo ran > ran",)


class Contacts:
    """A pickle that asks an address."""

    def __reduce__(self):
        import urllib.request

        return urllib.request.urlopen, (ADDRESS,)


@pytest.fixture
def home(tmp_path, folder, monkeypatch):
    """A folder with a model and a clip, in which everything happens."""
    shutil.copytree(folder, tmp_path / "model")
    Image.new("RGB", (32, 32)).save(tmp_path / "still.png")
    write_video(tmp_path / "clip.webp", torch.randint(0, 255, (9, 32, 32, 3), dtype=torch.uint8).numpy(), 16)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def strange(events: list[str]) -> list[str]:
    """What happened, but for this package's own files and the size of the machine's memory."""
    own = (f"open {Path(fastvmt.__file__).parent}/wan_mini/", "open /proc/meminfo", "open /proc/cpuinfo")
    return [event for event in events if not event.startswith(own)]


def transfer(*words: str) -> int:
    return fastvmt.main(["--model", "model", "--ref", "clip.webp", "--prompt", "a", *SMALL, "--out", "out", *words])


def bad_clip(name: str, content: bytes):
    def case():
        Path(name).write_bytes(content)
        return [transfer("--ref", name), verify.main([name, "--model", "model", "--device", "cpu"])]

    return case


def bad_frames(content: bytes):
    def case():
        Path("frames").mkdir()
        for number in range(9):
            shutil.copy("still.png", f"frames/{number}.png")
        Path("frames/4.png").write_bytes(content)
        return [transfer("--ref", "frames")]

    return case


def bad_weights(write):
    def case():
        for file in Path("model").glob("*VAE.safetensors"):
            file.unlink()
        write(Path("model/Wan2.1_VAE.pth"))
        return [transfer(), run(generate.program, ["--model", "model", "--prompt", "a", "--out", "a.webp"])]

    return case


def bad_index():
    shards = {"a": "../../../../../../../../etc/passwd", "b": "/etc/hostname", "c": f"{ADDRESS}/x.safetensors"}
    (weights,) = Path("model").glob("diffusion*.safetensors")
    tensors = load_file(weights)
    tensors.popitem()
    save_file(tensors, weights)
    Path(f"{weights}.index.json").write_text(json.dumps({"weight_map": shards}))
    return [transfer()]


def bad_lora():
    torch.save({"blocks.0.self_attn.q.lora_A.weight": Runs()}, "lora.pth")
    Path("lora.safetensors").write_bytes(pickle.dumps(Runs()))
    return [transfer("--lora", "lora.safetensors"), transfer("--lora", "lora.pth")]


def bad_latents():
    Path("latents.safetensors").write_bytes(pickle.dumps(Runs()))
    codes = [fastvmt.main(["--decode", "latents.safetensors", "--out", "out"])]
    settings = {"clip": {"height": 32, "width": 32, "frames": 5}, "config": {}, "dtype": "__import__('os').system('x')"}
    save_file({"latents": torch.zeros(1, 16, 2, 4, 4)}, "latents.safetensors", {"settings": json.dumps(settings)})
    return [*codes, fastvmt.main(["--decode", "latents.safetensors", "--out", "out"])]


def bad_run():
    Path("run").mkdir()
    record = {"program": "fastvmt.py", "status": "started", "ref": ADDRESS, "model": f"{ADDRESS}/m", "prompt": "a"}
    Path("run/run.json").write_text(json.dumps(record))
    Path("run/state.safetensors").write_bytes(pickle.dumps(Runs()))
    return [fastvmt.main(["--resume", "run"])]


def addresses():
    return [transfer("--ref", f"{ADDRESS}/a.mp4"), transfer("--model", f"{ADDRESS}/model"), transfer("--ref", "|id")]


CASES = {
    "PostScript": bad_clip("clip.gif", POSTSCRIPT),
    "PostScript among frames": bad_frames(POSTSCRIPT),
    "SVG": bad_clip("a.png", SVG),
    "SVG among frames": bad_frames(SVG),
    "playlist": bad_clip("a.mp4", PLAYLIST),
    "playlist as a picture": bad_clip("a.webp", PLAYLIST),
    "pickle that runs": bad_weights(lambda path: torch.save({"encoder.conv1.weight": Runs()}, path)),
    "pickle that asks": bad_weights(lambda path: torch.save({"encoder.conv1.weight": Contacts()}, path)),
    "bare pickle": bad_weights(lambda path: path.write_bytes(pickle.dumps(Runs()))),
    "index": bad_index,
    "LoRA": bad_lora,
    "latents": bad_latents,
    "run": bad_run,
    "addresses": addresses,
}


@pytest.mark.parametrize("case", CASES)
def test_no_input_runs_code_reads_a_strangers_file_or_contacts_an_address(case, home, capsys):
    with canary(home) as events:
        codes = CASES[case]()
    said = capsys.readouterr().err
    assert strange(events) == [] and not Path("ran").exists()
    assert set(codes) == {2} and said.count("error: ") == said.count("\n") == len(codes), said
    assert not Path("out").exists()


def test_a_prompt_is_no_command(home):
    """Text that a shell, a format string or a template would obey, on a run that succeeds."""
    with canary(home) as events:
        code = transfer("--prompt", "$(echo ran > ran) `echo ran > ran` ; echo ran > ran | {0.__class__} %s <script>")
    assert code == 0 and strange(events) == [] and not Path("ran").exists()
    record = json.loads(Path("out/run.json").read_text())
    assert record["prompt"].startswith("$(echo ran > ran)")
    assert "<script>" not in Path("out/report.html").read_text().split("</head>")[-1].split("<script")[0]
