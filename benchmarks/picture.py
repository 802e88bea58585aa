"""The README's picture: the default run beside its reference and the same seed without guidance, with all paths drawn.

    python -m benchmarks.picture

Run it again after the tiny model has changed. The white line is the reference's true path; the orange line is the path
of the object so far, as the tracker reads it off the pixels.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import fastvmt
from wan_mini.device.select import pick_device, pick_dtype
from wan_mini.load import load_wan
from wan_mini.pipeline import Transfer
from wan_mini.runs.cli import Parser, run
from wan_mini.runs.request import load_preset
from wan_mini.tiny import demo
from wan_mini.tiny.world import FPS, classify_scene, label_pixels, predicted_tracks, true_tracks
from wan_mini.video import EXIF_IMAGE_DESCRIPTION, read_video

PICTURE = Path(__file__).parent / "results" / "default_run.webp"
CAPTION = 30  # pixels above each clip
QUALITY = 70  # of WebP, in percent
SCALE = 2  # pixels of the picture to one of a clip
TRUE_COLOR = "white"
TRACKED_COLOR = "#ff9d00"


def draw_paths(frames: np.ndarray, true: np.ndarray, tracked: np.ndarray) -> np.ndarray:
    """Enlarge frames and draw the true path whole, the tracked path up to each frame, and a ring where it is now.

    frames (T,H,W,3) uint8; true, tracked (T,) complex, column + i row in pixels; NaN where the tracker lost it.
    -> (T,SCALE*H,SCALE*W,3) uint8.
    """
    height, width = frames.shape[1:3]
    drawn = []
    for number, frame in enumerate(frames):
        image = Image.fromarray(frame).resize((SCALE * width, SCALE * height), Image.Resampling.BICUBIC)
        draw = ImageDraw.Draw(image)
        draw_line(draw, true, TRUE_COLOR, width=3)
        draw_line(draw, tracked[: number + 1], TRACKED_COLOR, width=5)
        here = pixel(tracked[number])
        if not np.isnan(here).any():
            draw.circle(here, 8, outline="black", width=6)
            draw.circle(here, 7, outline=TRACKED_COLOR, width=4)
        drawn.append(np.asarray(image))
    return np.stack(drawn)  # T x (H',W',3) -> (T,H',W',3)


def draw_line(draw: ImageDraw.ImageDraw, path: np.ndarray, color: str, width: int) -> None:
    """A line through the points (n,) that are known, with a black edge."""
    points = [pixel(z) for z in path[~np.isnan(path)]]
    if len(points) > 1:
        draw.line(points, fill="black", width=width + 3, joint="curve")
        draw.line(points, fill=color, width=width, joint="curve")


def pixel(z: complex) -> tuple[float, float]:
    """(x, y) in the enlarged picture of a point of the clip."""
    return SCALE * (z.real + 0.5), SCALE * (z.imag + 0.5)


def tracked_path(frames: np.ndarray) -> np.ndarray:
    """The path (T,) of the object that frames (T,H,W,3) uint8 show, looked for as the default run's summary does."""
    labels = label_pixels(frames)
    objects, _ = classify_scene(frames, labels, demo.target_scene())
    return predicted_tracks(frames, labels, objects[:1], np.array([]))[0]


def panels(results: dict[str, Transfer], reference: np.ndarray) -> list[np.ndarray]:
    """The picture's parts (T,H',W',3) from left to right, enlarged, with paths and captions."""
    tracks, _ = true_tracks(demo.reference_clip())
    parts = [with_caption(draw_paths(reference, tracks[0], tracks[0]), "reference")]
    for name, result in results.items():
        assert result.frames is not None  # a transfer that has ended has its frames
        drawn = draw_paths(result.frames, tracks[0], tracked_path(result.frames))
        parts.append(with_caption(drawn, name))
        print(f"{name}: {demo.summary(result.frames)}")
    return parts


def with_caption(frames: np.ndarray, text: str) -> np.ndarray:
    """Frames (T,H',W',3) under a white bar with a text -> (T,CAPTION+H',W',3)."""
    count, _, width = frames.shape[:3]
    bar = Image.new("RGB", (width, CAPTION), "white")
    ImageDraw.Draw(bar).text((8, 3), text, fill="black", font=ImageFont.load_default(20))
    bars = np.broadcast_to(np.asarray(bar), (count, CAPTION, width, 3))  # (CAPTION,W',3) -> (T,CAPTION,W',3)
    return np.concatenate([bars, frames], axis=1)


def save(path: Path, frames: np.ndarray, label: dict[str, object]) -> None:
    """Write frames (T,H',W',3) as an animated WebP that says that it was generated."""
    exif = Image.Exif()
    exif[EXIF_IMAGE_DESCRIPTION] = json.dumps(label)
    images = [Image.fromarray(frame) for frame in frames]
    options = {"append_images": images[1:], "duration": round(1000 / FPS), "quality": QUALITY, "loop": 0}
    images[0].save(path, "WEBP", save_all=True, exif=exif, **options)


def program(argv: list[str] | None = None) -> None:
    """Both runs, then the picture."""
    parser = Parser(prog="python -m benchmarks.picture", description="Make the README's picture again.")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (%(default)s, as in the default run)")
    parser.add_argument("--out", type=Path, default=PICTURE, help="a .webp file (the README's)")
    parser.add_argument("--device", help="cuda, mps or cpu (the best there is)")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    wan = load_wan(demo.CHECKPOINT, device=device, dtype=pick_dtype(device, None))
    _, config = load_preset(demo.CHECKPOINT, fastvmt.MotionConfig())
    reference = read_video(demo.REFERENCE)
    prompt = demo.target_scene().caption
    results = {}
    for name, options in {"FastVMT": config, "without guidance": replace(config, amf="none")}.items():
        results[name] = fastvmt.transfer(wan, reference, prompt, options, seed=args.seed)
    frames = np.concatenate(panels(results, reference), axis=2)  # -> (T,H',3W',3)
    save(args.out, frames, {"ai_generated": True, "model": "tiny", "prompt": prompt, "seed": args.seed})
    height, width = frames.shape[1:3]
    print(f"wrote {args.out}: {width}x{height}, {args.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    raise SystemExit(run(program))
