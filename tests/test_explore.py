"""The explorable page: its data against window.py and the model, and in a browser, where there is one, its clicks."""

import base64
import json
import re
import shutil
import subprocess

import explore
import numpy as np
import pytest
import torch

from wan_mini.load import load_wan
from wan_mini.tiny import demo
from wan_mini.tiny.world import true_positions
from wan_mini.video import read_video, to_tensor
from window import frame_pairs, windowed_amf

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
PAGE = explore.PAGE.read_text(encoding="utf-8")
SETTINGS = [  # video, frame i, frame j, block, noise, tau, window
    ("reference", 0, 2, 3, 0, 3.0, 5),
    ("result", 5, 3, 0, 1, 1.0, 12),
    ("reference", 8, 1, 5, 2, 0.5, 4),
]


@pytest.fixture(scope="module")
def data() -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', PAGE, re.S).group(1))


def factors(data: dict, video: str, block: int, noise: int) -> explore.Factors:
    a, b, scale = data["videos"][video]["views"][block * len(data["noise"]) + noise]
    arrays = [np.frombuffer(base64.b64decode(text), np.int8).reshape(-1, data["rank"]) for text in (a, b)]
    return *arrays, np.array(scale)


def test_the_page_is_one_small_file_without_network():
    assert len(PAGE.encode()) <= explore.LARGEST
    code = re.sub(r'"[^"]{2000,}"', '""', PAGE)
    assert "default-src 'none'" in code
    assert not re.findall(r"https?:|@import|fetch\(|XMLHttpRequest|<link|<script[^>]* src", code)
    assert set(re.findall(r'(?:src|href)="([^"$]*)', code)) <= {"#explained", ""}


def test_the_page_is_made_from_the_template():
    template = explore.TEMPLATE.read_text(encoding="utf-8")
    before, after = template.split('"DATA"')
    assert PAGE.startswith(before) and PAGE.endswith(after), "run python notebooks/explore.py"


def test_factors_of_a_low_rank_are_nearly_exact():
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(8, 4 * 16, generator=generator)
    q, k = ((torch.randn(96, 8, generator=generator) @ basis).reshape(1, 96, 4, 16) for _ in range(2))
    logits = q[0].flatten(1) @ k[0].flatten(1).T / (4 * 16**0.5)
    near_q, near_k = explore.expand(explore.compress(q, k))
    near = near_q[0, :, 0] @ near_k[0, :, 0].T / explore.RANK**0.5
    assert (near - logits).abs().max() < 0.03 * logits.abs().max()


@torch.no_grad()
def test_the_data_is_the_checkpoints(data):
    """Flow of the shipped model against flow of the page's numbers; the truth of the clip; sizes and settings."""
    wan = load_wan(demo.CHECKPOINT, device=torch.device("cpu"), dtype=torch.float32)
    reference = wan.vae.encode(to_tensor(read_video(demo.REFERENCE)))
    q, k = explore.queries_keys(wan, reference, data["block"], 0.0)
    grid = tuple(data["grid"])
    assert grid == wan.dit.grid(reference)
    assert len(data["videos"]["result"]["views"]) == wan.dit.config.num_layers * len(explore.NOISE)
    options = {"tau": data["tau"], "tile": tuple(data["tile"]), "window": data["window"]}
    pairs = frame_pairs(grid[0], grid[0] - 1)
    exact, _ = windowed_amf(q, k, grid, pairs, **options)
    near, _ = windowed_amf(*explore.expand(factors(data, "reference", data["block"], 0)), grid, pairs, **options)
    distance = (exact - near).norm(dim=-1)
    assert distance.mean() < 0.1, "run python notebooks/explore.py"
    assert abs(distance.mean().item() - data["error"]["mean"]) < 0.02
    truth = np.frombuffer(base64.b64decode(data["truth"]), "<i2").reshape(grid[0], -1, grid[0], 2)
    expected = true_positions(demo.SEED, demo.KIND, "held-out")
    assert ((truth == -32768) == np.isnan(expected)).all()
    assert np.nanmax(np.abs(np.where(truth == -32768, np.nan, truth / 100) - expected)) < 0.006


# What a reader does, and what the page then holds, as JSON in the document.
ACTIONS = """<pre id="report"></pre><script>
const out = { flows: [], errors: [] };
window.addEventListener("error", event => out.errors.push(event.message));
function set(id, value) {
  document.getElementById(id).value = value;
  document.getElementById(id).dispatchEvent(new Event("input", { bubbles: true }));
}
for (const [video, i, j, block, noise, tau, size] of SETTINGS) {
  document.querySelector(`input[value=${video}]`).click();
  set("i", i); set("j", j); set("block", block); set("noise", noise); set("tau", tau); set("window", size);
  out.flows.push(window.explore.flow);
}
const source = document.getElementById("source"), area = source.getBoundingClientRect();
const point = { clientX: area.left + area.width * 5.5 / 12, clientY: area.top + area.height * 2.5 / 8 };
source.dispatchEvent(new MouseEvent("click", { bubbles: true, ...point }));
out.clicked = [window.explore.state.row, window.explore.state.column];
out.before = document.getElementById("readout").textContent;
const press = key => source.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
for (const key of ["ArrowRight", "ArrowDown", "x"]) press(key);
out.keyed = [window.explore.state.row, window.explore.state.column];
out.after = document.getElementById("readout").textContent;
for (let n = 0; n < 20; n++) press("ArrowLeft");
out.edge = window.explore.state.column;
document.getElementById("all").click();
out.arrows = source.querySelectorAll("polygon, circle").length;
out.ladder = window.explore.ladder;
out.names = [...document.querySelectorAll("svg")].map(svg => svg.getAttribute("aria-label"));
out.wide = document.documentElement.scrollWidth;
document.getElementById("report").textContent = JSON.stringify(out);
</script>"""


def open_page(tmp_path, page: str, width: int, state: str = "") -> tuple[dict, str]:
    """The report of a page that was opened in a browser, in a state of its address, and what its console says."""
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=5000"]
    options += [
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},900",
        "--dump-dom",
        path.as_uri() + state,
    ]
    done = subprocess.run([BROWSER, *options], capture_output=True, text=True, timeout=300)
    report = re.search(r'<pre id="report">(.*?)</pre>', done.stdout, re.S).group(1)
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return json.loads(report.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")), console


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: the page is not opened, only its data are tested")
def test_in_a_browser(tmp_path, data):
    """Sliders, clicks and keys; the page's own flow is window.py's; no error, no text alternative missing."""
    actions = ACTIONS.replace("SETTINGS", json.dumps(SETTINGS))
    report, console = open_page(tmp_path, PAGE.replace("</body>", actions + "</body>"), 1200)
    assert report["errors"] == [] and console == ""
    grid = tuple(data["grid"])
    for (video, i, j, block, noise, tau, window), flow in zip(SETTINGS, report["flows"]):
        q, k = explore.expand(factors(data, video, block, noise))
        expected, _ = windowed_amf(q, k, grid, [(i, j)], tau=tau, tile=tuple(data["tile"]), window=window)
        torch.testing.assert_close(torch.tensor(flow), expected[0], rtol=0, atol=1e-3)
    assert report["clicked"] == [2, 5] and report["keyed"] == [3, 6] and report["edge"] == 0
    assert report["before"] != report["after"] and "row 3, column 6" in report["after"]
    assert report["arrows"] == grid[1] * grid[2]
    assert dict(report["ladder"])[0] == 0 and len(report["ladder"]) == 9
    assert len(report["names"]) == 3 and all(len(name) > 20 for name in report["names"])
    assert report["wide"] <= 1200


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: the page is not opened, only its data are tested")
def test_on_a_phone_nothing_is_cut_off_and_an_address_keeps_the_settings(tmp_path, data):
    script = '<pre id="report"></pre><script>document.getElementById("report").textContent = JSON.stringify({'
    script += "wide: document.documentElement.scrollWidth, inner: window.innerWidth, state: window.explore.state,"
    script += "hash: location.hash});</script>"
    address = "#video=result&i=3&j=5&row=99&column=4&block=1&noise=2&tau=0.5&window=7&all=true&x=1"
    report, console = open_page(tmp_path, PAGE.replace("</body>", script + "</body>"), 500, address)
    assert console == "" and report["wide"] <= report["inner"]
    expected = {"video": "result", "i": 3, "j": 5, "column": 4, "block": 1, "noise": 2, "tau": 0.5, "window": 7}
    assert report["state"] == {**expected, "row": data["grid"][1] - 1, "all": True}
    assert "video=result&i=3" in report["hash"]
