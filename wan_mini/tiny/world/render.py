"""Clips: a plan drawn frame by frame, with its caption and its true tracks.

Sprites are vivid and backgrounds are muted: the largest minus the smallest of R, G and B tells them apart (VIVID).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from wan_mini.tiny.world.constants import FRAMES, HEIGHT, SHADE, WIDTH
from wan_mini.tiny.world.motions import Pose, Sprite, plan_clip
from wan_mini.tiny.world.scenes import Scene, draw_scene
from wan_mini.tiny.world.shapes import BACKGROUNDS, COLORS, SHAPES
from wan_mini.tiny.world.tracks import track_points


@dataclass(frozen=True, eq=False)
class Clip(Scene):
    """A scene in motion. Tracks are (row, column) in pixels; whole numbers are centers of pixels."""

    frames: np.ndarray  # (T,H,W,3) uint8
    tracks: np.ndarray  # (points,T,2) float64, true also where the point is not visible
    visible: np.ndarray  # (points,T) bool: inside the frame and under no other sprite
    owners: np.ndarray  # (points,) index into `objects`, -1 for the background; each sprite's first point is its center
    kind: str
    motions: tuple[str, ...]  # of each object that moves, or of the camera
    split: str


def make_clip(seed: int, kind: str | None = None, split: str = "train", frames: Sequence[int] = range(FRAMES)) -> Clip:
    """The clip of a seed: same seed, same bytes.

    seed >= 0; the splits have no generator in common, and "train" has no pair of HELD_OUT. kind: one of KINDS, None
    for any. frames: which of the 33 to draw and track, [] for the caption alone. Raises UserError on others.
    """
    plan = plan_clip(seed, kind, split)
    scene = plan.scene
    tracks, visible, owners = track_points(plan.motion)
    which = np.array(frames, dtype=int)
    pixels = _paint_background(plan.rng, scene.background, plan.motion.camera, which)
    for sprite in plan.motion.sprites:
        _paint_sprite(pixels, sprite, which)
    return Clip(
        scene.caption,
        scene.objects,
        scene.background,
        frames=pixels.round().clip(0, 255).astype(np.uint8),
        tracks=tracks[:, which],
        visible=visible[:, which],
        owners=owners,
        kind=plan.kind,
        motions=plan.motion.names,
        split=split,
    )


def other_scene(clip: Clip, seed: int = 0) -> Scene:
    """What to ask for instead: as many objects (at least one), each shape, each color and the background another.

    A limb stays a limb, in another color. Of a clip for training, the scene has no pair of HELD_OUT either.
    """
    bodies = sum(shape in SHAPES for shape, _ in clip.objects)
    limb = clip.objects[1][0] if clip.kind == "articulated" else None
    return draw_scene(np.random.default_rng(seed), max(1, bodies), limb, clip.split, unlike=clip)


def _paint_background(rng: Generator, background: str, camera: Pose | None, frames: np.ndarray) -> np.ndarray:
    """The background in each frame, (T,H,W,3) float, levels from 0 to 255, with shade as under clouds.

    The shade makes every spot look different, though textures repeat themselves.
    """
    z = np.arange(WIDTH) + 1j * np.arange(HEIGHT)[None, :, None]  # (1,H,W)
    if camera:
        z = camera.at(frames[:, None, None]).invert(z)  # (1,H,W) -> (T,H,W)
    else:
        z = z[: len(frames)]  # one picture for all frames, or none for none
    column = (z.real + 500 * rng.random()).astype(np.float32)
    row = (z.imag + 500 * rng.random()).astype(np.float32)
    noise = _smooth_noise(rng, column, row, 30, 90)
    shade = SHADE + 0.25 * _smooth_noise(rng, column, row, 60, 150).clip(-1, 1)
    look = BACKGROUNDS[background]
    dark = np.array(look.dark, dtype=np.float32)
    light = np.array(look.light, dtype=np.float32)
    share = look.texture(column, row, noise)
    pixels = dark + (light - dark) * share[..., None]  # (T,H,W) -> (T,H,W,3)
    pixels = shade[..., None] * pixels
    return np.broadcast_to(pixels, (len(frames), *pixels.shape[1:])).copy()  # a resting (1,H,W,3) -> (T,H,W,3)


def _smooth_noise(rng: Generator, column: np.ndarray, row: np.ndarray, shortest: float, longest: float) -> np.ndarray:
    """About [-1, 1], as column and row: the sum of six plane waves, of lengths in pixels between these two."""
    noise = np.zeros((), np.float32)
    for _ in range(6):
        drawn = rng.uniform((shortest, 0, 0), (longest, 2 * np.pi, 2 * np.pi)).astype(np.float32)
        length, angle, phase = drawn
        along = np.cos(angle) * column + np.sin(angle) * row
        noise = noise + np.cos(2 * np.pi / length * along + phase) / 3
    return noise


def _paint_sprite(pixels: np.ndarray, sprite: Sprite, frames: np.ndarray) -> None:
    """Lay a sprite and its soft shadow over pixels (T,H,W,3), drawing only a square patch around it in each frame."""
    pose = sprite.pose.at(frames[:, None, None])  # turn and shift (T,1,1)
    size = np.abs(pose.turn)
    side = int(3 * np.abs(sprite.pose.turn).max()) + 8  # patches of one size, shifted to lie inside the frame
    top = (pose.shift.imag - side / 2).clip(0, HEIGHT - side).astype(int)
    left = (pose.shift.real - side / 2).clip(0, WIDTH - side).astype(int)
    rows = top + np.arange(side)[:, None]  # (T,side,1)
    columns = left + np.arange(side)  # (T,1,side)
    patch = (np.arange(len(frames))[:, None, None], rows, columns)  # together (T,side,side)
    z = columns + 1j * rows

    distance = sprite.shape.distance(pose.invert(z))  # in the sprite's size, as all below
    offset = (z - pose.shift) / size  # from its center, not rotated with it: the light comes from the frame's top left
    light = 1 - 0.1 * (offset.real + offset.imag)
    rim = 1 - 0.3 * (10 * distance + 1.5).clip(0, 1)
    gloss = 0.35 * np.exp(-(np.abs(offset + 0.35 + 0.35j) ** 2) / 0.08)
    color = np.array(COLORS[sprite.color]) * (light * rim)[..., None]  # (T,side,side) -> (T,side,side,3)
    color += gloss[..., None] * (255 - color)

    shadow_distance = sprite.shape.distance(pose.invert(z - (0.15 + 0.2j) * size))
    shadow = 0.4 * (0.5 - 2.5 * shadow_distance).clip(0, 1)
    coverage = (0.5 - size * distance).clip(0, 1)[..., None]  # falls from 1 to 0 within one pixel
    pixels[patch] = coverage * color + (1 - coverage) * (1 - shadow[..., None]) * pixels[patch]
