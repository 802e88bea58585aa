"""The truth about motion: points tracked on a clip's sprites and background, and where each token's content goes."""

from collections.abc import Sequence

import numpy as np

from wan_mini.tiny.world.constants import FRAMES, HEIGHT, REACH, WIDTH
from wan_mini.tiny.world.motions import Motion, Pose, Sprite, plan_clip

TOKEN = 16  # pixels, the side of a token: latents are 8 times smaller, patches have 2 x 2 of their positions
GRID = (1 + (FRAMES - 1) // 4, HEIGHT // TOKEN, WIDTH // TOKEN)  # latent frames, rows and columns of tokens
LATENT_FRAMES = [range(1), *(range(start, start + 4) for start in range(1, FRAMES, 4))]  # frames of each latent frame


def in_frame(z: np.ndarray) -> np.ndarray:
    """Whether points lie on some pixel, same shape."""
    from_middle = z - ((WIDTH - 1) / 2 + 1j * (HEIGHT - 1) / 2)
    return (np.abs(from_middle.real) < WIDTH / 2) & (np.abs(from_middle.imag) < HEIGHT / 2)


def topmost(sprites: list[Sprite], z: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """The number of the topmost sprite at points z in `frames`, which broadcast with z; -1 is the background."""
    layers = np.full(z.shape, -1)
    for layer, sprite in enumerate(sprites):
        own = sprite.pose.at(frames).invert(z)
        layers[sprite.shape.distance(own) <= 0] = layer
    return layers


def track_points(motion: Motion) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Follow the center and tips of each sprite, and under a camera a 4 x 6 grid of the background of frame 0.

    -> tracks (points,T,2) row and column in pixels, visible (points,T) bool, owners (points,), as in Clip.
    """
    paths = []
    layers = []
    if motion.camera:
        grid = np.linspace(16, WIDTH - 17, 6) + 1j * np.linspace(16, HEIGHT - 17, 4)[:, None]  # (4,6)
        start = motion.camera.at(np.array(0)).invert(grid)
        paths.append(motion.camera.apply(start.reshape(-1, 1)))  # (24,1) -> (24,T)
        layers += [-1] * grid.size
    for layer, sprite in enumerate(motion.sprites):
        angles = 2j * np.pi * np.arange(sprite.shape.tips) / sprite.shape.tips
        tips = -1j * REACH * np.exp(angles)
        points = np.append(0, tips)
        paths.append(sprite.pose.apply(points[:, None]))  # (1+tips,1) -> (1+tips,T)
        layers += [layer] * len(points)
    z = np.concatenate(paths)  # (points,T)
    layer_of = np.array(layers)  # (points,)
    visible = in_frame(z) & (topmost(motion.sprites, z, np.arange(FRAMES)) <= layer_of[:, None])
    owners = np.array([sprite.owner for sprite in motion.sprites] + [-1])  # the last entry is number -1
    return np.stack([z.imag, z.real], axis=-1), visible, owners[layer_of]  # (points,T) -> (points,T,2)


def patch_centers(side: int) -> np.ndarray:
    """Centers of the squares of so many pixels that tile a frame, complex, (rows,columns)."""
    columns = side * np.arange(WIDTH // side)
    rows = side * np.arange(HEIGHT // side)
    return columns + 1j * rows[:, None] + (1 + 1j) * (side - 1) / 2


def middle_frames(groups: Sequence[Sequence[int]]) -> np.ndarray:
    """The frame that stands for each group of frames of a latent frame: the middle one, of four the second."""
    return np.array([frames[(len(frames) - 1) // 2] for frames in groups])


def true_positions(seed: int, kind: str | None = None, split: str = "train") -> np.ndarray:
    """The exact motion flow of a clip: where what is at each token's center is in each latent frame.

    -> (F,S,F,2) float32: from latent frame and token to latent frame, row and column in tokens. NaN where it has left
    the frame or is behind another sprite. A latent frame stands for its middle frame.
    """
    motion = plan_clip(seed, kind, split).motion
    frames = middle_frames(LATENT_FRAMES)  # (F,)
    start_frames = frames[:, None, None]  # (F,1,1)
    centers = patch_centers(TOKEN).flatten()  # (S,)
    start = np.broadcast_to(centers, (len(frames), len(centers)))[:, :, None]  # (F,S,1)
    layers = topmost(motion.sprites, start, start_frames)  # (F,S,1)
    end = np.broadcast_to(start, (*start.shape[:2], len(frames)))  # (F,S,F): the background rests without a camera
    poses: list[Pose | None] = [motion.camera, *(sprite.pose for sprite in motion.sprites)]
    for layer, pose in enumerate(poses, -1):
        if pose is not None:
            own = pose.at(start_frames).invert(start)
            end = np.where(layers == layer, pose.at(frames).apply(own), end)  # (F,S,F)
    lost = ~in_frame(end) | (topmost(motion.sprites, end, frames) > layers)
    end = np.where(lost, complex(np.nan, np.nan), end)
    rows_columns = np.stack([end.imag, end.real], axis=-1)  # (F,S,F) -> (F,S,F,2), pixels
    return ((rows_columns + 0.5) / TOKEN - 0.5).astype(np.float32)
