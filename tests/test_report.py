"""report.html: one file that shows the run, and says how to make it again."""

import base64
import io
import json
import re
import shlex
import shutil
import subprocess
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastvmt
from fastvmt import MotionConfig
from wan_mini.config import ClipConfig
from wan_mini.generate import parser as generate_parser
from wan_mini.runs.provenance import SOURCE_TYPE
from wan_mini.runs.report import command_of, loss_plot, write_report
from wan_mini.runs.request import apply_flags, build_parser
from wan_mini.tiny.world import make_clip

PROMPT = "</script><script>document.title='hacked'</script> & $summary \u2028"
VOID = {"meta", "input", "br"}
OPEN_ENDED = {"html", "td", "th"}  # their end tags may be left out


class Page(HTMLParser):
    """Tags that match, text by tag, and every address."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID | OPEN_ENDED:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in OPEN_ENDED:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.seen)


@pytest.fixture(scope="module")
def record():
    settings = {"ai_generated": True, "program": "fastvmt.py", "model": "/secret/model", "ref": "/secret/clip.gif"}
    settings |= {"prompt": PROMPT, "seed": 7, "device": "cpu", "dtype": "torch.float32"}
    settings |= {"clip": asdict(ClipConfig(64, 96, 9, 8.0)), "config": asdict(MotionConfig(tile=(2, 5), block=4))}
    stages = {"guide": {"seconds": 3.0, "peak_gb": 1.5}, "decode": {"seconds": 1.5, "peak_gb": None}}
    return settings | {"stages": stages, "losses": [[4.0, 2.0], [3.0, 1.0]], "versions": {"torch": "9.9"}}


@pytest.fixture(scope="module")
def flow():
    return torch.arange(2 * 24 * 2).reshape(2, 24, 2) / 10  # (F-1,S,2), 4 x 6 tokens


@pytest.fixture(scope="module")
def path(record, flow, tmp_path_factory):
    clip = make_clip(0).frames[:9, ::2, ::2]
    panels = {"reference": (clip, flow), "result": (clip[::-1].copy(), flow * 2), "plain": (clip, None)}
    return write_report(tmp_path_factory.mktemp("report") / "report.html", panels, record)


def clips_of(path: Path) -> list[dict]:
    return json.loads(re.search(r"const clips = (\[.*?\]), fps = 8, stride = 4;", path.read_text("utf-8"))[1])


def test_the_page_is_whole_and_asks_for_nothing(path):
    text = path.read_text("utf-8")
    page = Page(text)
    policy = next(attrs["content"] for tag, attrs in page.seen if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert not [attrs for _, attrs in page.seen if {"src", "href"} & attrs.keys()]
    text = text.replace(SOURCE_TYPE, "")  # an address that names a kind of source, in the settings
    assert "http:" not in text and "https:" not in text and "/secret" not in text
    assert page.count("script") == 1 and ("h1", PROMPT) in page.texts
    assert (
        "AI-generated" in text
        and "9.9" in text
        and re.search('guide<td class="number">3.0<td class="number">1.5', text)
    )


def test_the_clips_are_those_of_the_run(path, flow):
    clip = make_clip(0).frames[:9, ::2, ::2]
    reference, result, plain = clips_of(path)
    assert [one["name"] for one in (reference, result, plain)] == ["reference", "result", "plain"]
    for shown, frames in ((reference, clip), (result, clip[::-1])):
        for data, frame in zip(shown["frames"], frames, strict=True):
            picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)
            assert np.abs(picture - frame).mean() < 6
    assert plain["arrows"] == [] and len(reference["arrows"]) == 2
    x, y, dx, dy = reference["arrows"][1][0]  # of the first tile of 3 x 4 tokens
    tile = flow[1].reshape(4, 6, 2)[:3, :4].mean((0, 1)) * 16
    assert (x, y) == (32, 24) and (dy, dx) == pytest.approx(tile.tolist(), abs=0.051)
    assert result["arrows"][0][-1][2] == pytest.approx(2 * reference["arrows"][0][-1][2], abs=0.2)


def test_the_losses_are_drawn(record):
    page = Page(loss_plot(record["losses"]))
    heights = [float(attrs["cy"]) for tag, attrs in page.seen if tag == "circle"]
    assert heights == [40, 100, 70, 130] and page.count("polyline") == 2  # 40 is the top, 160 is zero
    assert loss_plot([]) == ""


def test_the_command_makes_the_same_run(record):
    words = shlex.split(command_of({**record, "loras": ["a.safetensors:0.5", "b.safetensors:1"], "label": "a model's"}))
    assert words[:2] == ["python", "fastvmt.py"]
    method = fastvmt.method()
    args = build_parser(method).parse_args(words[2:])
    assert apply_flags(args, ClipConfig(), method.config) == (
        ClipConfig(64, 96, 9, 8.0),
        MotionConfig(tile=(2, 5), block=4),
    )
    assert (args.prompt, args.seed, args.dtype, args.device) == (PROMPT, 7, "float32", "cpu")
    assert (args.lora, args.label) == (["a.safetensors:0.5", "b.safetensors:1"], "a model's")
    plain = {"program": "-m wan_mini.generate", "model": "m", "prompt": "a", "seed": 3, "dtype": "float32"}
    plain |= {"height": 64, "width": 96, "frames": 9, "fps": 16.0, "steps": 4, "sampler": "euler", "vae_tile": None}
    plain["key"] = "studio"
    words = shlex.split(command_of(plain))
    args = generate_parser().parse_args(words[3:])
    assert args.key == "studio"
    assert (words[:3], args.height, args.sampler, args.vae_tile) == (
        ["python", "-m", "wan_mini.generate"],
        64,
        "euler",
        None,
    )


PROBE = """<script>
const log = [];
window.onerror = message => log.push(message);
const pixels = clip => Array.from(clip.canvas.getContext("2d").getImageData(0, 0, clip.width, clip.height).data).join();
setTimeout(() => {
  const first = pixels(clips[0]);
  arrows.click();
  log.push(pixels(clips[0]) !== first);
  slider.value = 8; slider.oninput();
  log.push(number.textContent, pixels(clips[0]) !== first, play.textContent);
  play.click();
  log.push(play.textContent);
  setTimeout(() => { log.push(slider.value !== "8"); play.click(); log.push(play.textContent);
    document.body.dataset.log = JSON.stringify(log) }, 400);
}, 500);
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_the_page_works_in_a_browser(path, tmp_path):
    """No error; arrows go, the scrubber changes the picture, one button plays all."""
    probed = tmp_path / "probed.html"
    probed.write_text(path.read_text("utf-8") + PROBE, "utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run([*command, "--enable-logging=stderr", probed.as_uri()], capture_output=True, text=True)
    log = json.loads(re.search(r'data-log="(.*?)"', done.stdout)[1].replace("&quot;", '"'))
    assert log == [True, "9 / 9", True, "Play", "Pause", True, "Play"]
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line and "willReadFrequently" not in line]
    assert not said  # that one is about the probe
