"""Several processes give what one gives: gloo on a CPU, started as torchrun would, one thread each."""

import json
import re
from dataclasses import replace

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file

from benchmarks.speed import random_models, traffic
from fastvmt import main
from wan_mini.config import DiTConfig, UMT5Config, VAEConfig
from wan_mini.device import parallel
from wan_mini.device.flops import forward_flops
from wan_mini.device.parallel import Ranks
from wan_mini.dit import WanDiT
from wan_mini.load import save_wan
from wan_mini.tiny.world import make_clip
from wan_mini.umt5 import UMT5Encoder
from wan_mini.vae import WanVAE
from wan_mini.video import write_video

FLAGS = ["--prompt", "a ball", "--seed", "3", "--device", "cpu", "--dtype", "float32", "--set"]
FLAGS += ["height=64", "width=96", "frames=13", "steps=2", "guidance_fraction=0.5", "optim_steps=4", "interval=2"]
FLAGS += ["window=3", "tile=2,3", "lr=0.02,0.005"]  # 4 x 4 x 6 = 96 tokens


@pytest.fixture(scope="module")
def argv(tmp_path_factory, folder) -> list[str]:
    """A run with a model of four heads, so that four processes can share them."""
    place = tmp_path_factory.mktemp("parallel")
    dit = DiTConfig(dim=48, ffn_dim=96, num_heads=4, num_layers=4, freq_dim=32, text_dim=16, text_len=64)
    text = UMT5Config(vocab=100, dim=16, dim_attn=16, dim_ffn=32, num_heads=2, num_layers=2)
    torch.manual_seed(0)
    modules = WanDiT(dit), WanVAE(VAEConfig(dim=4, num_res_blocks=1)), UMT5Encoder(text)
    save_wan(place / "model", *modules, next(folder.rglob("tokenizer.json")))
    ref = write_video(place / "ref.webp", make_clip(0).frames[:18, ::2, ::2], fps=16)
    return ["--model", str(place / "model"), "--ref", str(ref), *FLAGS]


@pytest.fixture(scope="module")
def alone(argv, tmp_path_factory) -> dict[str, torch.Tensor]:
    """What one process makes of it."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert main([*argv, "--out", str(out)]) == 0
    return load_file(out / "latents.safetensors")


@pytest.mark.parametrize(
    ("mode", "count"),
    [
        ("cfg", 2),
        ("sequence", 2),
        ("cfg,sequence", 4),
        ("cfg,weights", 2),
        ("sequence,weights", 2),
        ("cfg,sequence,weights", 4),
    ],
)
def test_several_processes_make_what_one_makes(mode, count, argv, alone, tmp_path):
    """Guided latents and flows within 1e-5; only the first process writes and prints. Weights are shared evenly."""
    out = tmp_path / "run"
    codes, printed = run_ranks(count, [*argv, "--parallel", mode, "--out", str(out)], tmp_path / "log")
    assert codes == [0] * count, printed
    got = load_file(out / "latents.safetensors")
    assert got.keys() == alone.keys()
    for name, expected in alone.items():
        assert (got[name] - expected).abs().max() <= 1e-5, name
    assert json.loads((out / "run.json").read_text())["parallel"] == mode
    assert "wrote" in printed[0] and not any(printed[1:])
    shares = re.findall(r"^weights of the transformer: (\S+) of (\S+) GB", printed[0], re.M)
    assert len(shares) == mode.endswith("weights")
    for held, whole in shares:
        assert 1 <= count * float(held) / float(whole) < 1.1  # the first process has what does not split evenly


def test_what_does_not_split_evenly_is_refused_in_one_line(argv, tmp_path):
    """Before any weight is loaded; the other process is silent."""
    out = tmp_path / "run"
    for flags, message in (
        (["--parallel", "cfg,sequence"], "--parallel cfg,sequence takes 4, 6 ... processes of torchrun, got 2"),
        (["--parallel", "sequence", "--height", "80", "--frames", "9", "--width", "48"], "got 4 heads and 45 tokens"),
        (["--parallel", "sequence", "--offload", "blocks"], "needs blocks that stay on the device"),
        (["--parallel", "cfg,weights", "--offload", "blocks"], "cfg,weights needs blocks that stay on the device"),
        (["--parallel", "cfg,weights", "--offload"], "needs weights that are read before the run"),
    ):
        words = [word for word in argv if not flags[2:] or word.partition("=")[0] not in ("height", "width", "frames")]
        codes, printed = run_ranks(2, [*words, *flags, "--out", str(out)], tmp_path / "log")
        lines = [line for line in printed[0].splitlines() if not line.startswith(("note", "memory"))]
        assert codes == [2, 2] and not printed[1] and not out.exists()
        assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], printed[0]


def test_one_process_alone_is_refused(argv, capsys):
    assert main([*argv, "--parallel", "cfg"]) == 2
    assert "--parallel cfg needs torchrun" in capsys.readouterr().err


def test_all_processes_agree_on_the_largest(monkeypatch):
    ranks = object.__new__(Ranks)  # without a process group
    ranks.size = 3

    def gather(values, value):
        values[:] = [0, 2, value]

    monkeypatch.setattr(parallel.dist, "all_gather_object", gather)
    assert ranks.agree(1) == 2 and ranks.agree(3) == 3


@pytest.mark.parametrize(("mode", "count"), traffic.LAYOUTS)
def test_collectives_of_a_block(mode, count):
    """At 81 frames of 480x832: two all-to-alls forward and two backward, of q, k, v and of the output, in bfloat16."""
    size = random_models.named_size("1.3B")
    size = replace(size, dit=replace(size.dit, num_layers=2), motion=replace(size.motion, block=1))
    measured = traffic.traffic_of(size, mode, count)
    step, gradient = measured["denoising step"], measured["gradient"]
    halves = 2 if mode == "cfg,sequence" else 1
    n = 1 if mode == "cfg" else count // halves  # processes that share the tokens of a pass
    stream = 2 * 32760 * 1536 / n * (n - 1) / n  # bytes of a process's share of one bfloat16 stream that go elsewhere
    velocity = 4 * 16 * 21 * 60 * 104
    passes = 2 if mode == "sequence" else 1
    assert step.per_block == (0 if n == 1 else 2)
    assert step.calls["all_gather"] == passes * (n > 1) + (mode != "sequence")
    joined = passes * velocity / n * (n - 1) + (velocity if mode != "sequence" else 0)
    assert step.bytes == pytest.approx(passes * 2 * 4 * stream + joined)
    n = 1 if mode == "cfg" else min(count, 4)  # of a gradient; eight do not divide twelve heads
    stream = 2 * 32760 * 1536 / n * (n - 1) / n
    assert gradient.per_block == (0 if n == 1 else 4)
    assert gradient.calls["all_gather"] == (0 if n == 1 else 3)  # q, k, and the gradient of the tokens
    assert gradient.bytes == pytest.approx(8 * stream + 3 * 4 * 32760 * 1536 / n * (n - 1))
    whole = 2 * forward_flops(size.dit, 32760)
    assert step.operations == pytest.approx(whole / count)
