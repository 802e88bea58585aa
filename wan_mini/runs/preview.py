"""Clips side by side in one animation, with arrows that show where each tile of tokens goes next."""

import math
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from wan_mini.config import TIME_STRIDE

CAPTION = 14  # pixels above each clip

Point = tuple[float, float]  # (x, y) in pixels


def draw_arrow(draw: ImageDraw.ImageDraw, start: Point, move: Point, size: float) -> None:
    """Draw an arrow from start (x, y) along move (x, y), in pixels: black under white, or a dot if it moves < 1 pixel.

    size: width of its line in pixels; the head is twice as wide.
    """
    x, y = start
    length = math.hypot(*move)
    if length < 1:
        radius = size / 2
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill="white", outline="black")
        return
    tip_x = x + move[0]
    tip_y = y + move[1]
    along_x = move[0] / length  # unit vector along the arrow; (along_y, -along_x) is at right angles to it
    along_y = move[1] / length
    left = (tip_x - size * (along_x * 2 - along_y), tip_y - size * (along_y * 2 + along_x))
    right = (tip_x - size * (along_x * 2 + along_y), tip_y - size * (along_y * 2 - along_x))
    line = [(x, y), (tip_x, tip_y)]
    draw.line(line, fill="black", width=max(1, round(size)))
    draw.line(line, fill="white", width=max(1, round(size / 2)))
    draw.polygon([(tip_x, tip_y), left, right], fill="white", outline="black")


def with_arrows(frames: np.ndarray, flow: Tensor, grid: tuple[int, int, int], tile: tuple[int, int]) -> np.ndarray:
    """Draw each latent frame's motion flow on its video frames.

    frames (T,H',W',3) uint8; flow (F-1,S,2), the displacement from latent frame f to f+1, (rows, columns) in tokens;
    grid (F,H,W) tokens; tile (rows, columns) tokens, each with one arrow at its center, for its mean displacement.
    An arrow is the motion of 4 video frames; those of the last latent frame show the flow that led to it.
    -> a copy, (T,H',W',3) uint8.
    """
    _, rows, columns = grid
    token = frames.shape[1] / rows  # pixels of one token
    flow = flow.detach().cpu().float().unflatten(1, (rows, columns))  # (F-1,S,2) -> (F-1,H,W,2)
    drawn = []
    for number, frame in enumerate(frames):
        latent_frame = (number + TIME_STRIDE - 1) // TIME_STRIDE  # video frames 0 | 1-4 | 5-8 are latent frames 0, 1, 2
        displacement = flow[min(latent_frame, len(flow) - 1)]  # (H,W,2)
        image = Image.fromarray(frame)
        draw_tile_arrows(ImageDraw.Draw(image), displacement, tile, token)
        drawn.append(np.asarray(image))
    return np.stack(drawn)  # T x (H',W',3) -> (T,H',W',3)


def draw_tile_arrows(draw: ImageDraw.ImageDraw, displacement: Tensor, tile: tuple[int, int], token: float) -> None:
    """Draw the mean displacement of each tile; displacement (H,W,2) in tokens, token: pixels of one."""
    for center, move in tile_moves(displacement, tile, token):
        draw_arrow(draw, center, move, size=max(3.0, token / 5))


def tile_moves(displacement: Tensor, tile: tuple[int, int], token: float) -> Iterator[tuple[Point, Point]]:
    """Center and mean displacement of each tile in pixels, for displacement (H,W,2) in tokens; token: pixels of one."""
    rows, columns = displacement.shape[:2]
    for top in range(0, rows, tile[0]):
        for left in range(0, columns, tile[1]):
            inside = displacement[top : top + tile[0], left : left + tile[1]]  # (H,W,2) -> (rows, columns, 2)
            height, width = inside.shape[:2]  # smaller tiles at the border
            mean_y, mean_x = (inside.mean((0, 1)) * token).tolist()
            yield ((left + width / 2) * token, (top + height / 2) * token), (mean_x, mean_y)


def side_by_side(clips: dict[str, np.ndarray]) -> np.ndarray:
    """Clips (T,H,W,3) uint8 of one height in a row, each under its name -> (shortest T, H + caption, sum of W, 3)."""
    count = min(len(clip) for clip in clips.values())
    panels = []
    for name, clip in clips.items():
        width = clip.shape[2]
        bar = Image.new("RGB", (width, CAPTION), "white")
        ImageDraw.Draw(bar).text((3, 1), name, fill="black")
        caption = np.broadcast_to(np.asarray(bar), (count, CAPTION, width, 3))  # (CAPTION, W, 3) -> (T, CAPTION, W, 3)
        panel = np.concatenate([caption, clip[:count]], axis=1)  # -> (T, CAPTION + H, W, 3)
        panels.append(panel)
    return np.concatenate(panels, axis=2)  # -> (T, CAPTION + H, sum of W, 3)
