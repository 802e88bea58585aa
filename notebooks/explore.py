"""Make notebooks/explore.html, one file without network in which a reader explores attention as motion:

    python notebooks/explore.py
    python notebooks/explore.py --latents outputs/20261128-120000/latents.safetensors    with the result of a run

It holds the default run's reference and result, with queries and keys of every block at three noise levels. To fit,
they are factors of the logits of rank RANK, in 8 bits. Run it again after the tiny model has changed.
"""

import argparse
import base64
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import fastvmt  # noqa: E402
from wan_mini.load import Wan, load_wan  # noqa: E402
from wan_mini.pipeline import decode  # noqa: E402
from wan_mini.prompts import encode_prompts  # noqa: E402
from wan_mini.runs.request import load_preset  # noqa: E402
from wan_mini.tiny import demo  # noqa: E402
from wan_mini.tiny.world import LATENT_FRAMES, middle_frames, true_positions  # noqa: E402
from wan_mini.video import read_video, to_tensor  # noqa: E402
from window import frame_pairs, windowed_amf  # noqa: E402

PAGE = HERE / "explore.html"
TEMPLATE = HERE / "explore_template.html"
LARGEST = 3_000_000  # bytes
NOISE = (0.0, 0.5, 0.9)  # noise levels sigma
RANK = 32
CPU = torch.device("cpu")
Factors = tuple[np.ndarray, np.ndarray, np.ndarray]  # (N,RANK) int8, (N,RANK) int8, (RANK,) float


def compress(q: Tensor, k: Tensor) -> Factors:
    """Queries and keys (1,N,M,D) -> integers a, b (N,RANK) and scales, logits / tau = (a * scale) @ b.T, nearly.

    The product's best approximation of that rank (by its singular values), each column in 8 bits.
    """
    heads, width = q.shape[2:]
    queries = q[0].flatten(1).double() / (heads * width**0.5)  # (1,N,M,D) -> (N,C)
    keys = k[0].flatten(1).double()
    basis_q, rest_q = torch.linalg.qr(queries)
    basis_k, rest_k = torch.linalg.qr(keys)
    left, values, right = torch.linalg.svd(rest_q @ rest_k.T)
    root = values[:RANK].sqrt()
    a = (basis_q @ left[:, :RANK]) * root  # (N,RANK)
    b = (basis_k @ right[:RANK].T) * root  # (N,RANK)
    step_a = a.abs().amax(0) / 127
    step_b = b.abs().amax(0) / 127
    rounded = [(x / step).round().to(torch.int8).numpy() for x, step in ((a, step_a), (b, step_b))]
    return rounded[0], rounded[1], (step_a * step_b).numpy()


def expand(factors: Factors) -> tuple[Tensor, Tensor]:
    """Queries and keys (1,N,1,RANK) with the logits of the factors, for window.py."""
    a, b, scale = (torch.from_numpy(np.array(x)).float() for x in factors)
    return (a * scale * RANK**0.5)[None, :, None], b[None, :, None]  # (N,RANK) -> (1,N,1,RANK)


@torch.no_grad()
def queries_keys(wan: Wan, latents: Tensor, block: int, sigma: float) -> tuple[Tensor, Tensor]:
    """Of a block, (1,N,M,D) each, for latents with that much of the default run's noise and without a prompt."""
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    noised = (1 - sigma) * latents + sigma * noise
    text = encode_prompts(wan, [""], CPU)[0]
    return wan.dit(noised, torch.tensor([1000 * sigma]), text, qk_block=block)


def video_data(wan: Wan, latents: Tensor, frames: np.ndarray) -> dict[str, Any]:
    """What the page needs of one video: a picture of each latent frame, factors of each block and noise level."""
    views = []
    for block in range(wan.dit.config.num_layers):
        for sigma in NOISE:
            a, b, scale = compress(*queries_keys(wan, latents, block, sigma))
            views.append([text_of(a), text_of(b), [float(f"{x:.6g}") for x in scale]])
    return {"frames": [picture(frames[number]) for number in middle_frames(LATENT_FRAMES)], "views": views}


def picture(frame: np.ndarray) -> str:
    """One frame (H,W,3) uint8 as a data URI."""
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def text_of(array: np.ndarray) -> str:
    """The bytes of an array, in base64."""
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def true_data() -> str:
    """Where what is at a token's center is in each frame, (F,S,F,2) in hundredths of a token, -32768 for nowhere."""
    positions = true_positions(demo.SEED, demo.KIND, "held-out")
    hundredths = np.where(np.isnan(positions), -32768, np.round(100 * np.nan_to_num(positions)))
    return text_of(hundredths.astype("<i2"))


def start_token() -> tuple[int, int]:
    """Row and column of the token of latent frame 0 that is nearest to the object's middle."""
    clip = demo.reference_clip()
    row, column = clip.tracks[np.flatnonzero(clip.owners == 0)[0], 0]  # pixels
    return int(row // 16), int(column // 16)


def flow_error(wan: Wan, latents: Tensor, config: fastvmt.MotionConfig) -> dict[str, float]:
    """How far compression moves matched positions, in tokens, over all pairs of the reference's frames."""
    grid = wan.dit.grid(latents)
    pairs = frame_pairs(grid[0], grid[0] - 1)
    q, k = queries_keys(wan, latents, config.block_of(wan.dit), 0.0)
    options: dict[str, Any] = {"tau": config.tau, "tile": config.tile, "window": config.window}
    exact, _ = windowed_amf(q, k, grid, pairs, **options)
    near, _ = windowed_amf(*expand(compress(q, k)), grid, pairs, **options)
    distance = (exact - near).norm(dim=-1).flatten()
    return {"mean": round(distance.mean().item(), 3), "p99": round(distance.quantile(0.99).item(), 2)}


@torch.no_grad()
def page_data(result: Path | None) -> dict[str, Any]:
    """Everything that goes into the page; result: latents of a default run, None: make that run."""
    wan = load_wan(demo.CHECKPOINT, device=CPU, dtype=torch.float32)
    _, config = load_preset(demo.CHECKPOINT, fastvmt.MotionConfig())
    frames = read_video(demo.REFERENCE)
    reference = wan.vae.encode(to_tensor(frames))
    if result is None:
        latents = fastvmt.transfer(wan, frames, demo.target_scene().caption, config).latents
    else:
        latents = load_file(result)["latents"].float()
    videos = {"reference": video_data(wan, reference, frames)}
    videos["result"] = video_data(wan, latents, decode(wan.vae, latents))
    return {
        "grid": wan.dit.grid(reference),
        "tile": config.tile,
        "window": config.window,
        "tau": config.tau,
        "block": config.block_of(wan.dit),
        "noise": NOISE,
        "rank": RANK,
        "start": start_token(),
        "error": flow_error(wan, reference, config),
        "truth": true_data(),
        "videos": videos,
    }


def write_page(data: dict[str, Any], path: Path) -> int:
    """Put the data into the template; returns the bytes written. Raises ValueError if they are too many."""
    text = TEMPLATE.read_text(encoding="utf-8").replace('"DATA"', json.dumps(data, separators=(",", ":")))
    size = len(text.encode())
    if size > LARGEST:
        raise ValueError(f"the page would have {size} bytes, at most {LARGEST}: lower RANK")
    path.write_text(text, encoding="utf-8")
    return size


def main(argv: list[str] | None = None) -> int:
    """Make the page."""
    parser = argparse.ArgumentParser(prog="python notebooks/explore.py", description="Make the explorable page.")
    parser.add_argument("--latents", type=Path, help="latents.safetensors of a default run (make that run)")
    parser.add_argument("--out", type=Path, default=PAGE, help="an .html file (notebooks/explore.html)")
    args = parser.parse_args(argv)
    data = page_data(args.latents)
    print(f"wrote {args.out}, {write_page(data, args.out) / 1e6:.2f} MB; compression: {data['error']} tokens")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
