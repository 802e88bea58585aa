"""Clips side by side in one animation, with arrows that show where each tile of tokens goes next."""

import math

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

CAPTION = 14  # pixels above each clip


def draw_arrow(draw: ImageDraw.ImageDraw, start: tuple[float, float], move: tuple[float, float], size: float) -> None:
    """An arrow from start (x, y) along move (x, y), in pixels, black under white; a dot where it moves < 1 pixel."""
    x, y = start
    length = math.hypot(*move)
    if length < 1:
        draw.ellipse([x - size / 2, y - size / 2, x + size / 2, y + size / 2], fill="white", outline="black")
        return
    ux, uy = move[0] / length, move[1] / length
    tip = (x + move[0], y + move[1])
    barbs = [(tip[0] - size * (ux * 2 + side * uy), tip[1] - size * (uy * 2 - side * ux)) for side in (-1, 1)]
    for color, width in (("black", size), ("white", size / 2)):
        draw.line([start, tip], fill=color, width=max(1, round(width)))
    draw.polygon([tip, *barbs], fill="white", outline="black")


def with_arrows(frames: np.ndarray, flow: Tensor, grid: tuple[int, int, int], every: tuple[int, int]) -> np.ndarray:
    """Draw latent frame f's flow on each of its video frames.

    frames (T,H',W',3) uint8; flow (F-1,S,2) from latent frame f to f+1, (rows, columns) in tokens; one arrow in each
    tile of `every` (rows, columns) tokens, at its middle, for the tile's mean flow. So an arrow is the way of 4 video
    frames; those of the last latent frame show the flow that led to it. -> a copy, (T,H',W',3) uint8.
    """
    _, h, w = grid
    pixels = frames.shape[1] / h  # of one token
    moves = flow.detach().cpu().float().unflatten(1, (h, w))  # (F-1,S,2) -> (F-1,H,W,2)
    out = []
    for t, frame in enumerate(frames):
        image = Image.fromarray(frame)
        draw = ImageDraw.Draw(image)
        move = moves[
            min((t + 3) // 4, len(moves) - 1)
        ]  # video frames 0 | 1-4 | 5-8 ... are latent frames 0 | 1 | 2 ...
        for top in range(0, h, every[0]):
            for left in range(0, w, every[1]):
                tile = move[top : top + every[0], left : left + every[1]]
                rows, columns = tile.shape[:2]
                dy, dx = (tile.mean((0, 1)) * pixels).tolist()
                middle = ((left + columns / 2) * pixels, (top + rows / 2) * pixels)
                draw_arrow(draw, middle, (dx, dy), size=max(3.0, pixels / 5))
        out.append(np.asarray(image))
    return np.stack(out)


def side_by_side(clips: dict[str, np.ndarray]) -> np.ndarray:
    """Clips (T,H,W,3) uint8 of one height in a row, each under its name -> (shortest T, H + caption, sum of W, 3)."""
    count = min(len(clip) for clip in clips.values())
    panels = []
    for name, clip in clips.items():
        bar = Image.new("RGB", (clip.shape[2], CAPTION), "white")
        ImageDraw.Draw(bar).text((3, 1), name, fill="black")
        caption = np.broadcast_to(np.asarray(bar), (count, CAPTION, clip.shape[2], 3))
        panels.append(np.concatenate([caption, clip[:count]], axis=1))  # -> (T, CAPTION + H, W, 3)
    return np.concatenate(panels, axis=2)
