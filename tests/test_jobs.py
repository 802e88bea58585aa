"""Many runs from one file: each process takes the next, and a broken one stops no other."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file

from fastvmt import main
from wan_mini.runs import program as program_module
from wan_mini.tiny.world import make_clip
from wan_mini.video import write_video

SETS = ["height=32", "width=64", "frames=9", "steps=1", "amf=none"]


@pytest.fixture(scope="module")
def flags(folder, tmp_path_factory) -> list[str]:
    """What all jobs share."""
    ref = write_video(tmp_path_factory.mktemp("jobs") / "ref.webp", make_clip(0).frames[:18, ::2, ::2], fps=16)
    return ["--model", str(folder), "--ref", str(ref), "--device", "cpu", "--dtype", "float32", "--set", *SETS]


def write_jobs(path, jobs) -> str:
    path.write_text("".join(json.dumps(job) + "\n" for job in jobs), encoding="utf-8")
    return str(path)


def test_six_jobs_on_two_processes_one_of_them_broken(flags, tmp_path):
    """Five results, one line of error, exit code 1 in both; a job gives what its flags give alone."""
    jobs = [{"prompt": "a ball", "seed": seed, "out": str(tmp_path / f"run{seed}")} for seed in range(6)]
    jobs[2]["ref"] = "nowhere.mp4"
    codes, printed = run_ranks(2, [*flags, "--jobs", write_jobs(tmp_path / "jobs.jsonl", jobs)], tmp_path / "log")
    assert codes == [1, 1], printed
    done = sorted(path.parent.name for path in tmp_path.glob("run*/result.*"))
    assert done == ["run0", "run1", "run3", "run4", "run5"]
    errors = [line for text in printed for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "jobs.jsonl line 3: " in errors[0] and "nowhere.mp4" in errors[0]
    assert all(text.count("wrote ") >= 1 for text in printed)
    assert sum(text.count("wrote ") for text in printed) == 5
    alone = tmp_path / "alone"
    assert main([*flags, "--prompt", "a ball", "--seed", "4", "--out", str(alone)]) == 0
    expected, got = (load_file(path / "latents.safetensors") for path in (alone, tmp_path / "run4"))
    assert torch.equal(got["latents"], expected["latents"])


def test_every_kind_of_broken_line_is_named(flags, tmp_path, capsys, monkeypatch):
    """One process: no store of others; the model is loaded once for both that run."""
    loads = []
    load_wan = program_module.load_wan
    monkeypatch.setattr(program_module, "load_wan", lambda *_, **how: loads.append(1) or load_wan(*_, **how))
    out = str(tmp_path / "out")
    jobs = [
        {"prompt": "a ball"},
        {"prompt": "a ball", "out": out, "device": "cpu"},
        {"prompt": "a ball", "out": out, "seed": "x"},
        {"prompt": "a ball", "out": out, "steps": 2, "set": ["cfg=2.0"], "png": True},
        {"prompt": "-", "out": out},
        {"prompt": "a ball", "out": str(tmp_path / "other"), "png": False},
    ]
    file = tmp_path / "jobs.jsonl"
    write_jobs(file, jobs)
    file.write_text("{\n\n" + file.read_text(), encoding="utf-8")
    without_sets = flags[: flags.index("--set")]
    assert main([*without_sets, "--set", *SETS[:3], "--amf", "none", "--jobs", str(file)]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    wanted = ["line 1: not JSON", 'line 3: a job is an object with "out"', "line 4: a job is an object", "line 5: "]
    wanted += ["line 7: "]
    for line, part in zip(errors, wanted, strict=True):
        assert part in line, line
    assert "already holds" in errors[-1] and "needs a seed from" in errors[-2]
    assert (tmp_path / "out" / "frame0000.png").exists() and not list((tmp_path / "other").glob("*.png"))
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (record["config"]["cfg"], record["config"]["steps"]) == (2.0, 2)
    assert len(loads) == 1


CHANGES = {"model": Path("b"), "dtype": torch.bfloat16, "compile": True, "loras": ("style",), "offload": "parts"}


def test_a_model_is_kept_until_another_is_asked_for(monkeypatch):
    loads = []
    monkeypatch.setattr(
        program_module, "load_wan", lambda *_, **options: loads.append(options) or SimpleNamespace(dit=0)
    )
    monkeypatch.setattr(program_module, "compile_blocks", lambda dit: None)
    same = {"device": torch.device("cpu"), "offload": "none", "dtype": torch.float32, "compile": False, "loras": ()}
    request, loader = SimpleNamespace(model=Path("a"), **same), program_module.Loader()
    assert loader(request, request.model) is loader(request, request.model)
    for number, (name, value) in enumerate(CHANGES.items(), 2):
        setattr(request, name, value)
        assert loader(request, request.model) is loader(request, request.model)
        assert len(loads) == number, name
    assert (loads[-1]["dtype"], loads[-1]["loras"], loads[-1]["on_demand"]) == (torch.bfloat16, ("style",), True)


@pytest.mark.parametrize("words", [["--parallel", "cfg"], ["--dry-run"], ["--out", "x"]])
def test_what_is_of_one_run_does_not_go_with_jobs(flags, tmp_path, words, capsys):
    file = write_jobs(tmp_path / "jobs.jsonl", [])
    assert main([*flags, "--jobs", file, *words]) == 2
    assert f"got {words[0]} too" in capsys.readouterr().err


def test_no_jobs_are_done_and_a_missing_file_is_named(flags, tmp_path, capsys):
    assert main([*flags, "--jobs", write_jobs(tmp_path / "jobs.jsonl", [])]) == 0
    assert main([*flags, "--jobs", str(tmp_path / "none")]) == 2
    assert "none does not exist: give a file" in capsys.readouterr().err
