"""The attribute classifier: which shapes, colors and background frames show, read off their pixels alone."""

import numpy as np

from wan_mini.tiny.world.constants import SHADE, TILT, VIVID
from wan_mini.tiny.world.scenes import Objects, Scene
from wan_mini.tiny.world.shapes import BACKGROUNDS, COLORS, LIMBS, SHAPES, Distance

COLORFUL = VIVID + 8  # levels, as VIVID, of pixels averaged with some of the background around them
MIN_AREA = 24  # pixels: less of a color is no object
MIN_OVERLAP = 0.6  # with the outline of a shape: less of it is no shape
TEMPLATE_SIDE = 49  # pixels, of masks moved to their center and scaled to area 1, from -1 to 1 along each axis


def label_pixels(frames: np.ndarray) -> np.ndarray:
    """Frames (T,H,W,3) uint8 -> (T,H,W): the number in COLORS of each vivid pixel's hue, -1 on the background."""
    smooth: np.ndarray = frames.astype(np.float32)
    for axis in (1, 2):  # means of 3 x 3 pixels, or grain on a tinted background would look vivid
        smooth = (np.roll(smooth, 1, axis) + smooth + np.roll(smooth, -1, axis)) / 3
    vivid = np.ptp(smooth, axis=-1) > COLORFUL
    hues = _hue(np.array(list(COLORS.values()), dtype=np.float32))  # (6,3)
    distances = np.square(_hue(smooth[vivid])[:, None] - hues).sum(-1)  # (n,1,3), (6,3) -> (n,6)
    labels = np.full(frames.shape[:3], -1)
    labels[vivid] = distances.argmin(-1)
    return labels


def _hue(rgb: np.ndarray) -> np.ndarray:
    """Without shade and gloss: the least of R, G and B becomes 0, the greatest 1."""
    low = rgb.min(-1, keepdims=True)
    high = rgb.max(-1, keepdims=True)
    return (rgb - low) / (high - low)


def classify_scene(frames: np.ndarray, labels: np.ndarray, scene: Scene) -> tuple[Objects, dict[str, bool]]:
    """The objects that frames (T,H,W,3) with labels (T,H,W) show, as many as the scene has, and what of it is right.

    They are the commonest colors, each with its shape; a name is "" where nothing fits. A limb is the object that
    resembles a shape least, and comes last. Where all colors are right, each shape must have its own.
    """
    areas = np.bincount(labels[labels >= 0], minlength=len(COLORS))
    seen = []
    for number in np.argsort(-areas)[: len(scene.objects)]:
        overlap, shape = _classify_shape(labels == number)
        color = list(COLORS)[number] if overlap else ""
        seen.append((overlap, shape, color))
    seen.sort(reverse=True)
    pairs = [(shape, color) for _, shape, color in seen]
    if scene.objects and scene.objects[-1][0] in LIMBS:
        pairs[-1] = (scene.objects[-1][0], pairs[-1][1])
    right = {
        "color_ok": _same(pairs, scene.objects, 1),
        "background_ok": _classify_background(frames[labels < 0]) == scene.background,
        "shape_ok": _same(pairs, scene.objects, 0),
    }
    if right["color_ok"]:
        right["shape_ok"] = sorted(pairs) == sorted(scene.objects)
    return tuple(pairs), right


def _same(one: list[tuple[str, str]], other: Objects, column: int) -> bool:
    """Whether both have the same shapes (column 0) or colors (column 1), in any order."""
    return sorted(pair[column] for pair in one) == sorted(pair[column] for pair in other)


def _classify_background(pixels: np.ndarray) -> str:
    """Which background the pixels (n,3) of no object show: the one whose usual color is nearest to their median."""
    median = np.median(pixels, axis=0) if len(pixels) else np.full(3, 255)
    distances = {}
    for name, background in BACKGROUNDS.items():
        dark = np.array(background.dark)
        share = 0.1 if name == "night sky" else 0.5  # of the light color, in the usual one
        usual = SHADE * (dark + share * (background.light - dark))
        distances[name] = float(np.linalg.norm(median - usual))
    return min(distances, key=distances.__getitem__)


def _classify_shape(masks: np.ndarray) -> tuple[float, str]:
    """The shape that masks (T,H,W) overlap most (intersection over union, mean over frames), and how much."""
    areas = masks.sum((1, 2))
    (frames,) = np.nonzero(areas >= MIN_AREA)
    if not len(frames):
        return 0.0, ""
    axis = np.linspace(-1, 1, TEMPLATE_SIDE)
    grid = axis + 1j * axis[:, None]  # (49,49)
    centers = mass_centers(masks)[frames, None, None]
    scales = np.sqrt(areas[frames])[:, None, None]
    z = centers + scales * grid  # (n,49,49): where in each frame the template's points are
    rows = z.imag.round().astype(int)
    columns = z.real.round().astype(int)
    nearest_row = rows.clip(0, masks.shape[1] - 1)
    nearest_column = columns.clip(0, masks.shape[2] - 1)
    inside = (rows == nearest_row) & (columns == nearest_column)
    shown = masks[frames[:, None, None], nearest_row, nearest_column] & inside
    overlaps = {}
    for name, shape in SHAPES.items():
        for tilt in (-TILT, -0.12, 0, 0.12, TILT):
            template = _template(shape.distance, grid, tilt)
            union = ((shown | template) & inside).sum((1, 2))
            overlaps[name, tilt] = float(np.mean((shown & template).sum((1, 2)) / union))
    best = max(overlaps, key=overlaps.__getitem__)
    return overlaps[best], best[0] if overlaps[best] >= MIN_OVERLAP else ""


def _template(distance: Distance, grid: np.ndarray, tilt: float) -> np.ndarray:
    """The mask of a shape of area 1, rotated by tilt, at the points of a grid from -1 to 1."""
    share = np.mean(distance(1.25 * grid) < 0)  # of a square of side 2.5, into which each shape of size 1 fits
    size = 1 / np.sqrt(6.25 * share)
    return distance(grid / (size * np.exp(1j * tilt))) < 0


def mass_centers(masks: np.ndarray) -> np.ndarray:
    """Center of mass of each mask, (T,H,W) -> (T,) complex; NaN where it has less than MIN_AREA pixels."""
    areas = masks.sum((1, 2))
    columns = masks.sum(1) @ np.arange(masks.shape[2])
    rows = masks.sum(2) @ np.arange(masks.shape[1])
    return np.where(areas >= MIN_AREA, (columns + 1j * rows) / areas.clip(1), np.nan)
