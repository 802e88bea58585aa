"""2,000 damaged inputs with fixed seeds: each is read or refused as UserError, at once, and touches nothing else.

Each case may take 2 seconds of the processor and 1 GB; while it runs, Python's audit events show every program that
is started, every address that is contacted and every file that is opened.
"""

import base64
import contextlib
import json
import os
import pickle
import random
import shutil
import socket
import struct
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import fastvmt
from wan_mini.checkpoint import read_checkpoint
from wan_mini.config import DiTConfig
from wan_mini.dit import WanDiT
from wan_mini.errors import UserError
from wan_mini.load import build_and_check
from wan_mini.runs import program
from wan_mini.runs.request import load_preset
from wan_mini.tiny import demo
from wan_mini.tokenizer import Tokenizer
from wan_mini.video import read_video

SECONDS, BYTES = 2.0, 10**9
STRANGE = [
    None,
    True,
    -1,
    0,
    1,
    7,
    2**31,
    2**63,
    10**30,
    1e308,
    -0.5,
    0.5,
    "",
    "x",
    "64",
    "\x1b[2J",
    "../../etc/passwd",
]
STRANGE += [[], {}, [[]], [0] * 16, ["a"], {"a": {"b": []}}, "é" * 99]

# What a case does, seen by Python itself

STARTS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.startfile"}
CONTACTS = {"socket.connect", "socket.getaddrinfo", "socket.sendto", "urllib.Request"}
LIBRARIES = [str(Path(folder).resolve()) for folder in {sys.prefix, sys.base_prefix, *torch.__path__}]
LIBRARIES += [str(Path(fastvmt.__file__).parent / "pyproject.toml"), str(demo.CHECKPOINT)]  # our own
seen: list[str] | None = None  # None: nobody looks
home = ""


def watch(event, arguments):
    if seen is None:
        return
    if event in STARTS | CONTACTS:
        seen.append(f"{event} {arguments[0]}")
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        own = path.startswith((home, *LIBRARIES, "/proc/self", "/sys")) or path.endswith((".py", ".pyc"))
        if not own:
            seen.append(f"open {path}")


@contextlib.contextmanager
def canary(folder):
    """The list of all that happens outside of a folder."""
    global seen, home
    if not hasattr(sys, "fuzz_watched"):
        sys.addaudithook(watch)
        sys.fuzz_watched = True
    seen, home = [], os.path.realpath(folder)
    try:
        yield seen
    finally:
        seen = None


def peak_memory() -> int:
    """Bytes that this process had at most since the last forget_peak; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return 0


def forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def fuzz(folder: Path, count: int, seed: int, case: Callable[[random.Random, Path], None]) -> None:
    """Run a case `count` times, each with a generator and a folder of its own."""
    faults = []
    refused = 0
    for number in range(count):
        rng = random.Random(1_000_000 * seed + number)
        own = folder / "case"
        own.mkdir()
        forget_peak()
        memory, start = peak_memory(), time.process_time()
        with canary(folder) as events, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                case(rng, own)
            except UserError as error:
                refused += 1
                if "\n" in str(error) or "\x1b" in str(error):
                    events.append(f"message {str(error)!r}")
            except Exception as error:  # noqa: BLE001 (what this test is for)
                events.append(f"{type(error).__name__}: {error}"[:300])
        seconds, more = time.process_time() - start, peak_memory() - memory
        if seconds > SECONDS or more > BYTES:
            events.append(f"{seconds:.1f} s, {more / 1e6:.0f} MB")
        faults += [f"case {number}: {event}" for event in events]
        shutil.rmtree(own)
    outside = [path.name for path in folder.parent.iterdir() if path != folder]
    assert not faults, f"{len(faults)} faults\n" + "\n".join(faults[:20])
    assert not outside and not list(folder.iterdir())
    assert refused > count / 10  # else the mutations do nothing


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder for the cases, in an empty one that is the working folder as well."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


# Mutations


def mutate_bytes(rng: random.Random, data: bytes, start: int = 0) -> bytes:
    """A few bytes changed, cut out, doubled, or replaced by the numbers that programs stumble on."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        at = rng.randrange(start, max(start + 1, len(data)))
        kind = rng.randrange(6)
        if kind == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del data[at : at + rng.choice([1, 2, 8, 100])]
        elif kind == 2:
            data[at:at] = data[at : at + rng.choice([1, 4, 64])]
        elif kind == 3:
            width = rng.choice([1, 2, 4, 8])
            number = rng.choice([0, 1, 2 ** (8 * width) - 1, 2 ** (8 * width - 1), 2 ** (4 * width)])
            data[at : at + width] = number.to_bytes(width, rng.choice(["little", "big"]))
        elif kind == 4:
            data[at : at + 4] = rng.randbytes(4)
        elif rng.random() < 0.3:
            del data[at:]
    return bytes(data)


def mutate_value(rng: random.Random, value):
    """A JSON value of which one node is lost, doubled, renamed or something strange."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        name = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.1:
            return {key: item for key, item in value.items() if key != name}
        if kind < 0.2:
            return {**value, rng.choice(["", "\x1b]0;x\x07", "blocks.99999999.x", name + "x"]): value[name]}
        return {**value, name: mutate_value(rng, value[name])}
    if isinstance(value, list) and value and rng.random() < 0.85:
        index = rng.randrange(min(len(value), 40))
        changed = mutate_value(rng, value[index])
        return value[:index] + [changed] * rng.choice([0, 1, 1, 1, 2]) + value[index + 1 :]
    if rng.random() < 0.05:
        for _ in range(rng.choice([20, 50, 3000])):
            value = [value]
        return value
    return rng.choice(STRANGE)


def dumps(value) -> bytes:
    try:
        return json.dumps(value).encode()
    except RecursionError:
        return b"[" * 3000 + b"]" * 3000


def mutate_json(rng: random.Random, content: bytes) -> bytes:
    if rng.random() < 0.25:
        return mutate_bytes(rng, content)
    value = json.loads(content)
    for _ in range(rng.choice([1, 1, 2, 5])):
        value = mutate_value(rng, value)
    return dumps(value)


# The cases


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    """A transformer of one small block, in a file, and its config."""
    config = DiTConfig(dim=12, ffn_dim=12, num_heads=1, num_layers=1, freq_dim=8, text_dim=8, text_len=8)
    file = tmp_path_factory.mktemp("fuzz") / "dit.safetensors"
    save_file(WanDiT(config).state_dict(), file)
    file.with_name("config.json").write_text(json.dumps(asdict(config)))
    build_and_check(read_checkpoint(file).require("dit"))  # torch imports seconds' worth for the first one
    return file


def test_headers(work, dit):
    dit_file, config = dit.read_bytes(), dit.with_name("config.json").read_bytes()
    (length,) = struct.unpack("<Q", dit_file[:8])
    header, data = dit_file[8 : 8 + length], dit_file[8 + length :]

    def case(rng, own):
        changed = mutate_json(rng, header)
        size = struct.pack("<Q", len(changed))
        if rng.random() < 0.1:
            size = mutate_bytes(rng, size)
        (own / "dit.safetensors").write_bytes(size + changed + data)
        (own / "config.json").write_bytes(config)
        build_and_check(read_checkpoint(own).require("dit"))

    fuzz(work, 400, 1, case)


def test_configs_and_indices(work, dit):
    config = dit.with_name("config.json").read_bytes()
    tensors = load_file(dit)
    lost = dit.with_name("lost.safetensors")
    save_file(dict(list(tensors.items())[:-3]), lost)
    index = json.dumps({"weight_map": dict.fromkeys(tensors, "x-00001-of-00002.safetensors")}).encode()

    def case(rng, own):
        if rng.random() < 0.7:
            os.link(dit, own / "dit.safetensors")
            (own / "config.json").write_bytes(mutate_json(rng, config))
        else:
            os.link(lost, own / "dit.safetensors")
            (own / "config.json").write_bytes(config)
            (own / "x.index.json").write_bytes(mutate_json(rng, index))
        build_and_check(read_checkpoint(own).require("dit"))

    fuzz(work, 350, 2, case)


def test_tokenizers_and_presets(work, folder):
    spec = (folder / "google/umt5-xxl/tokenizer.json").read_bytes()
    blob = struct.pack("<I", 1024) + struct.pack("<256I", *range(1024, 256 + 1024)) + b"ab\0"
    charsmap = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(blob).decode()}
    mapped = json.dumps({**json.loads(spec), "normalizer": charsmap}).encode()
    motion = {"steps": 25, "lr": [0.01, 0.007], "amf": "dense", "block": 3}
    preset = json.dumps({"clip": {"height": 128, "frames": 33, "fps": 16}, "motion": motion}).encode()

    def case(rng, own):
        if rng.random() < 0.3:
            (own / "motion.json").write_bytes(mutate_json(rng, preset))
            load_preset(own, fastvmt.MotionConfig())
            return
        (own / "tokenizer.json").write_bytes(mutate_json(rng, rng.choice([spec, mapped])))
        tokenizer = Tokenizer.from_file(own / "tokenizer.json")
        tokenizer.encode("a red ring </s> on  grass <pad>, ½ é")

    fuzz(work, 350, 3, case)


def clips(folder: Path) -> dict[str, bytes]:
    pictures = []
    for i in range(6):
        picture = Image.new("RGBA", (32, 32), (10 * i, 90, 0, 255 - 40 * i))
        picture.putpixel((i, i), (255, 0, 0, 255))
        pictures.append(picture)
    contents = {}
    for kind in ("gif", "webp", "png"):
        file = folder.parent / f"whole.{kind}"
        pictures[0].save(file, save_all=True, append_images=pictures[1:], duration=100)
        contents[kind] = file.read_bytes()
        file.unlink()
    return contents


def test_pictures(work):
    contents = clips(work)

    def case(rng, own):
        kind = rng.choice(list(contents))
        name = rng.choice([kind, kind, kind, "gif", "webp", "png", "apng", "jpg"])
        content = mutate_bytes(rng, contents[kind], rng.choice([0, 6, 12, 40]))
        file = own / f"clip.{name}"
        if rng.random() < 0.2:
            for i in range(5):
                (own / f"{i}.png").write_bytes(contents["png"] if i != 3 else content)
            file = own
        else:
            file.write_bytes(content)
        read_video(
            file, size=rng.choice([None, (32, 16)]), frames=rng.choice([None, 5]), fps=rng.choice([None, 10, 16])
        )

    fuzz(work, 500, 4, case)


class Runs:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_pickles(work):
    file = work.parent / "whole.pth"
    torch.save({"encoder.conv1.weight": torch.ones(4, 3, 3, 3, 3), "conv2.weight": torch.ones(4, 4, 1, 1, 1)}, file)
    whole = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    file.unlink()

    def case(rng, own):
        target = own / "vae.pth"
        if rng.random() < 0.5:
            target.write_bytes(mutate_bytes(rng, whole))
        else:
            with zipfile.ZipFile(target, "w", rng.choice([zipfile.ZIP_STORED] * 4 + [zipfile.ZIP_DEFLATED])) as archive:
                for name, content in entries.items():
                    if name.endswith("data.pkl"):
                        content = rng.choice([mutate_bytes(rng, content, 2), pickle.dumps(Runs())])
                    archive.writestr(name, content)
        read_checkpoint(own).require("vae")

    fuzz(work, 150, 5, case)


FLAGS = ["--amf", "--interval", "--steps", "--negative", "--frames", "--height", "--width", "--seed", "--memory"]
FLAGS += ["--set", "--device", "--dtype", "--offload", "--compile", "--ref", "--prompt", "--png", "--nosuch", "tile"]
VALUES = ["0", "-1", "1", "5", "nan", "inf", "1e308", "x", "dense", "cpu", "cpu:x", "blocks", "steps=2", "None"]
VALUES += ["tile=0,0", "tile=1e9,1", "lr=1", "lr=1,nan", "tau=", "=3"]
VALUES += ["9" * 30, "9" * 5000, "", " ", "a\x1b[2Jb", "\udce9", "fps=1e9", "height=1" + "0" * 400]
VALUES += [f"{name}={value}" for name in ("block", "window", "span", "alpha") for value in (-1, 10**20, "inf")]


def test_command_lines(work, monkeypatch):
    model = program.open_model(None)
    monkeypatch.setattr(program, "open_model", lambda path: model)
    monkeypatch.setattr(program, "print_costs", lambda *arguments: None)

    def case(rng, own):
        argv = ["--dry-run"]
        for _ in range(rng.choice([1, 1, 2, 3, 6])):
            argv += [rng.choice(FLAGS)] + [rng.choice(VALUES) for _ in range(rng.choice([0, 1, 1, 1, 2]))]
        printed = own / "printed"
        with printed.open("w") as stream, contextlib.redirect_stderr(stream), contextlib.redirect_stdout(stream):
            try:
                code = fastvmt.main(argv)
            except SystemExit as stop:
                code = stop.code
        text = printed.read_text()
        assert code in (0, 2) and "\x1b" not in text and "Traceback" not in text
        if code:
            raise UserError(text.strip().splitlines()[-1])

    fuzz(work, 250, 6, case)


def test_the_canary_sings(work):
    """What the other tests would not see, they could not fail on."""
    with canary(work) as events:
        os.system("true")
        (work / "own").write_text("x")
        Path("/etc/hostname").exists()
        with contextlib.suppress(OSError), open("/etc/passwd"):  # noqa: PTH123
            pass
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", 9), timeout=0.01)
    assert [event.split()[0] for event in events if "socket" not in event] == ["os.system", "open"]
    assert any(event.startswith("socket.connect") for event in events)
