"""The tracker: paths of objects and background, read off pixels alone, and the true paths to compare them with.

Generated clips, rendered ones and noise are tracked alike. Paths are (points,T), column + i row in pixels.
"""

import numpy as np

from wan_mini.tiny.world.classifier import MIN_AREA, mass_centers
from wan_mini.tiny.world.constants import BODY_REACH, HEIGHT, REACH, WIDTH
from wan_mini.tiny.world.motions import Pose
from wan_mini.tiny.world.render import Clip
from wan_mini.tiny.world.scenes import Objects
from wan_mini.tiny.world.shapes import BAR, COLORS, LIMBS, SHAPES

MAX_SHIFT = 7  # pixels of the halved frame: the fastest pan that is looked for


def true_tracks(clip: Clip) -> tuple[np.ndarray, np.ndarray]:
    """What to follow in a clip of the world, (points,T), and owners (points,) as in Clip.

    The points of the background, the center of each body, and of a limb the two corners of `_limb_corners`.
    """
    z = clip.tracks[..., 1] + 1j * clip.tracks[..., 0]
    tracks = list(z[clip.owners == -1])
    owners = [-1] * len(tracks)
    for number, (shape, _) in enumerate(clip.objects):
        points = z[clip.owners == number]
        if shape in SHAPES:
            tracks.append(points[0])
            owners.append(number)
        else:
            bars = _points_on_bars(points.reshape(-1, 3, z.shape[1]))
            tracks += list(_limb_corners(bars, np.ones(bars.shape), tracks[0]))
            owners += [number, number]
    return np.array(tracks), np.array(owners)


def _points_on_bars(tracks: np.ndarray) -> np.ndarray:
    """Points all over the bars whose center and joints have the tracks (bars,3,T) -> (points,T)."""
    center = tracks[:, 0, None]  # (bars,1,T)
    upper = tracks[:, 1, None]
    lower = tracks[:, 2, None]
    axis = np.linspace(-1, 1, 21)
    grid = axis + 1j * axis[:, None]
    own = grid[BAR.distance(grid) < 0]  # (n,), in the bar's plane, where the joints are at -i REACH and i REACH
    turn = (lower - upper) / (2j * REACH)
    return (center + turn * own[:, None]).reshape(-1, tracks.shape[2])  # (bars,n,T) -> (points,T)


def _limb_corners(z: np.ndarray, weights: np.ndarray, body: np.ndarray) -> np.ndarray:
    """Two corners of a limb's box, one standard deviation around its mean, as seen from the body's center.

    Only what no body can hide counts. Two legs of one color cannot be told apart, but the box goes up and down with an
    arm, and opens with each stride.
    z (n,T) or (n,1), weights (n,T), body (T,) -> (2,T)
    """
    weights = weights * (np.abs(z - body) > BODY_REACH)
    total = weights.sum(0)
    mean = (weights * z).sum(0) / total.clip(1)
    offset = z - mean
    width = np.sqrt((weights * offset.real**2).sum(0) / total.clip(1))
    height = np.sqrt((weights * offset.imag**2).sum(0) / total.clip(1))
    corners = mean - body + np.array([[-1], [1]]) * (width + 1j * height)
    return np.where(total >= MIN_AREA, corners, np.nan)


def predicted_tracks(frames: np.ndarray, labels: np.ndarray, objects: Objects, grid: np.ndarray) -> np.ndarray:
    """The tracks of background points that are at `grid` (n,) in frame 0, then of each body and limb as true_tracks.

    The center is that of the part that shows: a body half hidden or half outside is found a few pixels off. NaN where
    an object is not found.
    """
    tracks: list[np.ndarray] = []
    if len(grid):
        tracks += list(track_camera(frames, labels).apply(grid[:, None]))  # (n,1) -> (n,T)
    z = np.arange(labels.shape[2]) + 1j * np.arange(labels.shape[1])[:, None]  # (H,W)
    for shape, color in objects:
        masks = labels == [*COLORS, ""].index(color)
        if shape in LIMBS:
            weights = masks.reshape(len(masks), -1).T  # (T,H,W) -> (H*W,T)
            tracks += list(_limb_corners(z.reshape(-1, 1), weights, tracks[-1]))
        else:
            tracks.append(mass_centers(masks))
    return np.array(tracks)


def fill_missing(tracks: np.ndarray) -> np.ndarray:
    """Tracks without NaN: a lost point stays where it was nearest in time, one never found in the frame's middle.

    So losing an object costs, and no clip drops out of an average.
    """
    filled = np.full_like(tracks, (WIDTH - 1) / 2 + 1j * (HEIGHT - 1) / 2)
    for point, track in enumerate(tracks):
        (known,) = np.nonzero(~np.isnan(track))
        if len(known):
            distance = np.abs(np.arange(len(track))[:, None] - known)  # (T,known) frames
            filled[point] = track[known[distance.argmin(1)]]
    return filled


def track_camera(frames: np.ndarray, labels: np.ndarray) -> Pose:
    """How the muted pixels of frame 0 shift and zoom until each frame, from frames (T,H,W,3) and labels (T,H,W).

    Neighboring frames are registered, all pairs at once, at half the size: an exhaustive search first, for textures
    repeat themselves and the least error tells their periods apart; then Gauss-Newton (`_refine`).
    """
    gray = _halve(frames.mean(-1, dtype=np.float32))  # (T,h,w)
    muted = _halve(labels < 0) == 1
    turn = np.ones((len(gray) - 1, 1))
    shift = _best_shift(gray, muted)[:, None]
    for _ in range(9):
        turn, shift = _refine(gray, muted, turn, shift)
    camera = [(1.0, 0j)]
    for scale, offset in zip(turn[:, 0], shift[:, 0], strict=True):
        step = 2 * offset + (0.5 + 0.5j) * (1 - scale)  # of whole frames, where half pixel n lies at 2 n + 1/2
        last_turn, last_shift = camera[-1]
        camera.append((scale * last_turn, scale * last_shift + step))
    factors, shifts = zip(*camera, strict=True)
    return Pose(np.array(factors), np.array(shifts))


def _halve(x: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 pixels, (T,H,W) -> (T,H/2,W/2)."""
    return x.reshape(len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2).mean((2, 4))


def _best_shift(gray: np.ndarray, muted: np.ndarray) -> np.ndarray:
    """The whole shift of each frame to the next with the least mean difference, (T,h,w) -> (T-1,)."""
    _, h, w = gray.shape
    shifts = []
    costs = []
    for dy in range(-MAX_SHIFT, MAX_SHIFT + 1):
        for dx in range(-MAX_SHIFT, MAX_SHIFT + 1):
            before = np.s_[:-1, max(0, -dy) : h - max(0, dy), max(0, -dx) : w - max(0, dx)]
            after = np.s_[1:, max(0, dy) : h - max(0, -dy), max(0, dx) : w - max(0, -dx)]
            both = muted[before] & muted[after]
            difference = np.abs(gray[before] - gray[after]) * both
            costs.append(difference.sum((1, 2)) / (both.sum((1, 2)) + 1))
            shifts.append(dx + 1j * dy)
    return np.array(shifts)[np.argmin(costs, axis=0)]


def _refine(gray: np.ndarray, muted: np.ndarray, turn: np.ndarray, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One Gauss-Newton step for scale and shift, (T-1,1) each, with weights that ignore pixels that do not fit."""
    _, h, w = gray.shape
    z = (np.arange(w) + 1j * np.arange(h)[:, None]).reshape(1, -1)  # (1,h*w)
    slope_down, slope_right = np.gradient(gray[1:], axis=(1, 2))
    after = np.stack([gray[1:], slope_right, slope_down, muted[1:]], axis=-1)  # (T-1,h,w,4)
    sampled = _sample(after, turn * z + shift)  # (T-1,h*w,4)
    right = sampled[..., 1]
    down = sampled[..., 2]
    error = gray[:-1].reshape(len(gray) - 1, -1) - sampled[..., 0]
    weight = muted[:-1].reshape(error.shape) * (sampled[..., 3] > 0.99)
    scale = 10 + 2 * np.sum(weight * np.abs(error), 1, keepdims=True) / (weight.sum(1, keepdims=True) + 1)
    weight = weight / (1 + np.square(error / scale)) ** 2
    jacobian = np.stack([right, down, right * z.real + down * z.imag], axis=-1)  # (T-1,h*w,3): right, down, scale
    weighted = np.swapaxes(jacobian * weight[..., None], 1, 2)
    step = np.linalg.solve(weighted @ jacobian + 1e-3 * np.eye(3), weighted @ error[..., None])  # (T-1,3,1)
    return (turn + step[:, 2]).clip(0.9, 1.1), shift + step[:, 0] + 1j * step[:, 1]


def _sample(pictures: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Pictures (n,h,w,c) at points z (n,k), linear between pixels and 0 outside -> (n,k,c)."""
    n, h, w, channels = pictures.shape
    x = z.real.clip(0, w - 1.001)
    y = z.imag.clip(0, h - 1.001)
    inside = (np.abs(x - z.real) < 0.01) & (np.abs(y - z.imag) < 0.01)
    column = x.astype(int)
    row = y.astype(int)
    right = (x % 1)[..., None].astype(np.float32)  # shares of the pixels to the right and below
    down = (y % 1)[..., None].astype(np.float32)
    flat = pictures.reshape(n * h * w, channels)
    here = (np.arange(n)[:, None] * h + row) * w + column  # numbers of rows of `flat`
    upper = (1 - right) * flat[here] + right * flat[here + 1]
    lower = (1 - right) * flat[here + w] + right * flat[here + w + 1]
    return ((1 - down) * upper + down * lower) * inside[..., None]
