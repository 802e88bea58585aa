"""What a clip of the tiny world shows and how it moves, read off its pixels alone, and how near that is to the truth.

Nothing here knows how a clip was made: rendered ones, generated ones and noise are measured alike. As in world.py,
places are complex numbers, column + i row in pixels. Tracks are (points, T), NaN where a point was not found.
"""

from itertools import permutations

import numpy as np

from wan_mini.tiny.world import (
    BAR,
    COLORS,
    GROUNDS,
    HEIGHT,
    LIMBS,
    REACH,
    SHADE,
    SHAPES,
    VIVID,
    WIDTH,
    Clip,
    Objects,
    Pose,
    Scene,
)

COLORFUL = VIVID + 8  # levels, as VIVID, of pixels smoothed with some of the ground around them
FEWEST = 24  # pixels: less of a color is no object
CLEAR = 0.6  # share: less of it covered is no shape
NEAR = 24.0  # pixels: a limb counts where it is further from its body's center, as no body reaches there and hides it
MOVES = 4.0  # pixels, a quarter of a token: a path is judged along an axis if its range there is at least this
STEP = 1.0  # pixels a frame: a step has a direction if it is at least this long
JITTER = 0.1  # pixels a frame: a step shorter than this is no motion


# What there is to see: the oracle.


def label(frames: np.ndarray) -> np.ndarray:
    """Frames (T,H,W,3) uint8 -> (T,H,W): the place in COLORS of each vivid pixel's hue, -1 on the ground."""

    def hue(rgb: np.ndarray) -> np.ndarray:  # without shade and gloss: the least of R, G, B becomes 0, the greatest 1
        low, high = rgb.min(-1, keepdims=True), rgb.max(-1, keepdims=True)
        return (rgb - low) / (high - low)

    smooth = frames.astype(np.float32)
    for axis in (1, 2):  # means of 3 x 3 pixels, or grain on a tinted ground would look vivid
        smooth = (np.roll(smooth, 1, axis) + smooth + np.roll(smooth, -1, axis)) / 3
    labels = np.full(frames.shape[:3], -1)
    vivid = np.ptp(smooth, axis=-1) > COLORFUL
    names = hue(np.array([*COLORS.values()], dtype=np.float32))
    labels[vivid] = np.square(hue(smooth[vivid])[:, None] - names).sum(-1).argmin(-1)  # (n, 6, 3) -> (n,)
    return labels


def read_scene(frames: np.ndarray, labels: np.ndarray, scene: Scene) -> tuple[Objects, dict[str, bool]]:
    """The objects there are, as many as the scene has, and whether colors, background and shapes are the scene's.

    They are the commonest colors, each with its shape; a name is "" where nothing fits. A limb is the object that
    resembles a shape least, and comes last. Where all colors are right, each shape must have its own.
    """
    areas = np.bincount(labels[labels >= 0], minlength=len(COLORS))
    seen = []
    for number in np.argsort(-areas)[: len(scene.objects)]:
        likeness, shape = _read_shape(labels == number)
        seen.append((likeness, shape, [*COLORS][number] if likeness else ""))
    objects = [pair for _, *pair in sorted(seen, reverse=True)]
    if scene.objects and scene.objects[-1][0] in LIMBS:
        objects[-1][0] = scene.objects[-1][0]
    background = _read_ground(frames[labels < 0])
    objects = tuple(map(tuple, objects))
    shape_ok, color_ok = (sorted(p[i] for p in objects) == sorted(p[i] for p in scene.objects) for i in (0, 1))
    if color_ok:
        shape_ok = sorted(objects) == sorted(scene.objects)
    return objects, {"color_ok": color_ok, "background_ok": background == scene.background, "shape_ok": shape_ok}


def _read_ground(pixels: np.ndarray) -> str:
    """Which ground the pixels (n,3) of no object show: the one whose usual color is nearest to their median."""
    median = np.median(pixels, axis=0) if len(pixels) else np.full(3, 255)
    light = dict.fromkeys(GROUNDS, 0.5) | {"night sky": 0.1}  # share of the light color in the usual one
    colors = {name: np.array(two[:2]) for name, two in GROUNDS.items()}
    usual = {name: SHADE * (dark + light[name] * (bright - dark)) for name, (dark, bright) in colors.items()}
    return min(usual, key=lambda name: np.linalg.norm(median - usual[name]))


def _read_shape(masks: np.ndarray) -> tuple[float, str]:
    """Which shape masks (T,H,W) are, if each is moved to middle 0 and scaled to area 1: mean overlap, name."""
    areas, middle = masks.sum((1, 2)), _middle(masks)
    (found,) = np.nonzero(areas >= FEWEST)
    if not len(found):
        return 0.0, ""
    z = np.linspace(-1, 1, 49) + 1j * np.linspace(-1, 1, 49)[:, None]
    at = middle[found, None, None] + np.sqrt(areas[found])[:, None, None] * z  # (n, 49, 49)
    rows, columns = at.imag.round().astype(int), at.real.round().astype(int)
    top, left = rows.clip(0, masks.shape[1] - 1), columns.clip(0, masks.shape[2] - 1)
    inside = (rows == top) & (columns == left)
    shown, scores = masks[found[:, None, None], top, left] & inside, {}
    for name, shape in SHAPES.items():
        size = 1 / np.sqrt(6.25 * np.mean(shape.edge(1.25 * z) < 0))  # of area 1; size 1 reaches to 1.25 or so
        for tilt in (-0.25, -0.12, 0, 0.12, 0.25):
            ideal = shape.edge(z / (size * np.exp(1j * tilt))) < 0
            scores[name, tilt] = np.mean((shown & ideal).sum((1, 2)) / ((shown | ideal) & inside).sum((1, 2)))
    best = max(scores, key=scores.get)
    return float(scores[best]), best[0] if scores[best] >= CLEAR else ""


# How it moves: the tracker.


def _middle(masks: np.ndarray) -> np.ndarray:
    """Center of mass of each mask, (T,H,W) -> (T,)."""
    areas = masks.sum((1, 2))
    moment = masks.sum(1) @ np.arange(masks.shape[2]) + 1j * (masks.sum(2) @ np.arange(masks.shape[1]))
    return np.where(areas >= FEWEST, moment / areas.clip(1), np.nan)


def _limb(z: np.ndarray, weight: np.ndarray, body: np.ndarray) -> np.ndarray:
    """Two corners of a limb's box, one standard deviation around its middle, as seen from the body's center.

    Two legs of one color cannot be told apart, but the box goes up and down with an arm, and opens with each stride.
    z (n,T) or (n,1), weight (n,T), body (T,) -> (2,T)
    """
    weight = weight * (np.abs(z - body) > NEAR)
    total = weight.sum(0)
    middle = (weight * z).sum(0) / total.clip(1)
    off = z - middle
    width, height = (np.sqrt((weight * part**2).sum(0) / total.clip(1)) for part in (off.real, off.imag))
    corners = middle - body + np.array([[-1], [1]]) * (width + 1j * height)
    return np.where(total >= FEWEST, corners, np.nan)


def true_tracks(clip: Clip) -> tuple[np.ndarray, np.ndarray]:
    """What to follow in a clip of the world, (points,T), and owners (points,): as `found_tracks`, but known."""
    z = clip.tracks[..., 1] + 1j * clip.tracks[..., 0]
    bodies = [i for i, (shape, _) in enumerate(clip.objects) if shape in SHAPES]
    tracks = [*z[clip.owners == -1], *(z[clip.owners == i][0] for i in bodies)]
    owners = [-1] * np.sum(clip.owners == -1) + bodies
    if clip.kind == "articulated":
        center, upper, lower = z[clip.owners == 1].reshape(-1, 3, z.shape[1]).swapaxes(0, 1)[:, :, None]  # (bars, 1, T)
        grid = np.linspace(-1, 1, 21)
        grid = (grid + 1j * grid[:, None])[BAR.edge(grid + 1j * grid[:, None]) < 0]  # (n,), places all over a bar
        bars = (center + (lower - upper) / (2j * REACH) * grid[:, None]).reshape(-1, z.shape[1])  # (bars*n, T)
        tracks, owners = [*tracks, *_limb(bars, np.ones(bars.shape), tracks[0])], [*owners, 1, 1]
    return np.array(tracks), np.array(owners)


def found_tracks(frames: np.ndarray, labels: np.ndarray, objects: Objects, grid: np.ndarray) -> np.ndarray:
    """The tracks of ground points that are at `grid` (n,) in frame 0, of each body's center, and of a limb's box.

    The center is that of the part that shows: a body half under another or half outside is found a few pixels off.
    """
    tracks = [*ground_motion(frames, labels)(grid[:, None])] if len(grid) else []
    z = (np.arange(labels.shape[2]) + 1j * np.arange(labels.shape[1])[:, None]).reshape(-1, 1)  # (H*W, 1)
    for shape, color in objects:
        masks = labels == [*COLORS, ""].index(color)
        if shape in LIMBS:
            tracks += [*_limb(z, masks.reshape(len(masks), -1).T, tracks[-1])]
        else:
            tracks.append(_middle(masks))
    return np.array(tracks)


def ground_motion(frames: np.ndarray, labels: np.ndarray) -> Pose:
    """The camera: how the muted pixels of frame 0 shift and zoom until each frame, (T,).

    Neighboring frames are registered, at half the size: an exhaustive search, for textures repeat themselves and
    the least error tells their periods apart, then Gauss-Newton with weights that ignore what does not fit.
    """

    def halved(x: np.ndarray) -> np.ndarray:
        return x.reshape(len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2).mean((2, 4))  # (T, H, W) -> (T, h, w)

    gray, muted = halved(frames.mean(-1, dtype=np.float32)), halved(labels < 0) == 1
    z = (np.arange(gray.shape[2]) + 1j * np.arange(gray.shape[1])[:, None]).reshape(1, -1)  # (1, h*w)
    down, right = np.gradient(gray[1:], axis=(1, 2))
    target = np.stack([gray[1:], right, down, muted[1:]], axis=-1)  # (T-1, h, w, 4)
    start, clear = gray[:-1].reshape(len(target), -1), muted[:-1].reshape(len(target), -1)  # (T-1, h*w)
    turn, shift = np.ones((len(target), 1)), _best_shift(gray, muted)[:, None]
    for _ in range(9):  # all pairs at once
        value, right, down, clear_too = np.moveaxis(_sample(target, turn * z + shift), -1, 0)  # -> 4 of (T-1, h*w)
        weight = clear * (clear_too > 0.99)
        scale = 10 + 2 * np.sum(weight * np.abs(start - value), 1, keepdims=True) / (weight.sum(1, keepdims=True) + 1)
        weight = weight / (1 + np.square((start - value) / scale)) ** 2
        jacobian = np.stack([right, down, right * z.real + down * z.imag], axis=-1)  # (T-1, h*w, 3)
        weighted = np.swapaxes(jacobian * weight[..., None], 1, 2)
        step = np.linalg.solve(weighted @ jacobian + 1e-3 * np.eye(3), weighted @ (start - value)[..., None])
        shift, turn = shift + step[:, 0] + 1j * step[:, 1], (turn + step[:, 2]).clip(0.9, 1.1)
    camera = [Pose(1.0, 0j)]
    for a, b in zip(turn[:, 0], shift[:, 0]):  # half pixel n lies at 2n + 1/2
        camera.append(Pose(a, 2 * b + (0.5 + 0.5j) * (1 - a)) @ camera[-1])
    return Pose(*map(np.array, zip(*camera)))


def _best_shift(gray: np.ndarray, muted: np.ndarray, reach: int = 7) -> np.ndarray:
    """The whole shift of each frame to the next with the least mean difference, (T,h,w) -> (T-1,)."""
    _, h, w = gray.shape
    costs = {}
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            a = np.s_[:-1, max(0, -dy) : h - max(0, dy), max(0, -dx) : w - max(0, dx)]
            b = np.s_[1:, max(0, dy) : h - max(0, -dy), max(0, dx) : w - max(0, -dx)]
            both = muted[a] & muted[b]
            costs[dx + 1j * dy] = (np.abs(gray[a] - gray[b]) * both).sum((1, 2)) / (both.sum((1, 2)) + 1)
    return np.array([*costs])[np.argmin([*costs.values()], axis=0)]


def _sample(pictures: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Pictures (n,h,w,c) at places z (n,k), linear between pixels and 0 outside -> (n,k,c)."""
    n, h, w, _ = pictures.shape
    x, y = z.real.clip(0, w - 1.001), z.imag.clip(0, h - 1.001)
    inside = (abs(x - z.real) < 0.01) & (abs(y - z.imag) < 0.01)
    column, row = x.astype(int), y.astype(int)
    flat, here = pictures.reshape(n * h * w, -1), (np.arange(n)[:, None] * h + row) * w + column
    right, down = ((part % 1)[..., None].astype(np.float32) for part in (x, y))
    upper, lower = ((1 - right) * flat[at] + right * flat[at + 1] for at in (here, here + w))
    return ((1 - down) * upper + down * lower) * inside[..., None]


# How near that is: the metrics. Of tracks found and true, (points,T) each, without NaN.


def correlation(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Pearson correlation of the paths, along columns and along rows, averaged over the axes that truly move.

    In [-1, 1], (points,). An axis moves if the true path's range is MOVES or more; NaN if none does, 0 if the found
    path stands still. Neither place nor size of a motion matters here: `error_px` sees those.
    """
    paths = np.stack([[x.real, x.imag] for x in (found, true)])  # (2, 2 axes, points, T)
    off = paths - paths.mean(-1, keepdims=True)
    a, b = off / np.sqrt(np.square(off).mean(-1, keepdims=True)).clip(JITTER)  # a still path is not blown up
    return _mean((a * b).mean(-1), np.ptp(paths[1], axis=-1) >= MOVES, axis=0)  # (2, points, T) -> (points,)


def error_px(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Mean distance in pixels, (points,). No offset is taken out: where a motion happens is part of it."""
    return np.abs(found - true).mean(-1)


def direction(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Mean cosine between the steps of found and true path, in [-1, 1], (points,).

    Over steps whose true length is STEP or more; NaN if there are none. A point that does not move counts as 0.
    """
    a, b = np.diff(found), np.diff(true)
    return _mean((_unit(a) * _unit(b).conj()).real, np.abs(b) >= STEP, axis=1)


def fidelity_published(found: np.ndarray, true: np.ndarray) -> float:
    """Motion fidelity as the script of SMM has it (Yatim et al., arXiv 2311.17009, Sec. 5.1), faults and all.

    Cosines of steps, averaged over time; less the identity; the best match of each found track, averaged. So a track
    is matched with any but its own, and a step of length 0 makes the whole NaN.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        a, b = (np.diff(x) / np.abs(np.diff(x)) for x in (found, true))
    similarity = (a[:, None] * b.conj()).real.mean(-1)  # (points, T-1) twice -> (points, points)
    return float((similarity - np.eye(len(similarity))).max(1).mean())


def fidelity(found: np.ndarray, true: np.ndarray) -> float:
    """Motion fidelity mended, in [-1, 1]: best matches in both directions, over the steps and tracks that move.

    A track moves if one axis's range is MOVES or more, a step if it is longer than JITTER. NaN if no true track
    moves, 0 if no found one does.
    """
    a, b = (_unit(np.diff(x[_range(x) >= MOVES])) for x in (found, true))
    if not len(a) or not len(b):
        return 0.0 if len(b) else float("nan")
    a, b = (x / np.sqrt((np.abs(x) ** 2).sum(1, keepdims=True)).clip(1) for x in (a, b))  # by their moving steps
    similarity = (a @ b.conj().T).real
    return float((similarity.max(0).mean() + similarity.max(1).mean()) / 2)


def _range(tracks: np.ndarray) -> np.ndarray:
    return np.maximum(np.ptp(tracks.real, axis=-1), np.ptp(tracks.imag, axis=-1))


def _unit(steps: np.ndarray) -> np.ndarray:
    length = np.abs(steps)
    return np.where(length > JITTER, steps / length.clip(JITTER), 0)


def _mean(values: np.ndarray, where: np.ndarray, axis: int) -> np.ndarray:
    """Mean where it is wanted, NaN where it nowhere is."""
    count = where.sum(axis)
    return np.where(count > 0, (values * where).sum(axis) / count.clip(1), np.nan)


def hold(tracks: np.ndarray) -> np.ndarray:
    """Tracks without NaN: a point lost stays where it was nearest in time, one never found in the frame's middle.

    So losing an object costs, and no clip drops out of an average.
    """
    out = np.full_like(tracks, (WIDTH - 1) / 2 + 1j * (HEIGHT - 1) / 2)
    for point, track in enumerate(tracks):
        (known,) = np.nonzero(~np.isnan(track))
        if len(known):
            nearest = np.abs(np.arange(len(track))[:, None] - known).argmin(1)
            out[point] = track[known[nearest]]
    return out


def score(frames: np.ndarray, clip: Clip, scene: Scene) -> dict[str, float]:
    """How far frames (T,H,W,3) show the scene, and move as the clip does: every measure by its name.

    Points count by their owner: all the ground's weigh as much as one object. Where there are several objects, a
    prompt does not say which of them moves how, so that they are paired with the clip's at the least error.
    """
    labels = label(frames)
    objects, right = read_scene(frames, labels, scene)
    true, owners = true_tracks(clip)
    found = hold(found_tracks(frames, labels, objects[: len(clip.objects)], true[owners == -1, 0]))
    if clip.kind == "several":
        found = min((found[list(order)] for order in permutations(owners)), key=lambda x: error_px(x, true).mean())

    def owned(values: np.ndarray) -> float:
        each = [values[(owners == owner) & ~np.isnan(values)] for owner in np.unique(owners)]
        means = [group.mean() for group in each if len(group)]
        return float(np.mean(means)) if means else float("nan")

    return {
        "correlation": owned(correlation(found, true)),
        "error_px": owned(error_px(found, true)),
        "direction": owned(direction(found, true)),
        "fidelity": fidelity(found, true),
        "published": fidelity_published(found, true),
        **right,
        "leak": not {color for _, color in clip.objects}.isdisjoint(color for _, color in objects),
    }
