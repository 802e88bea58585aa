"""A small world of colored shapes: seeded, captioned clips whose true trajectories are known exactly.

Places are complex numbers, z = column + i row in pixels; the middle of pixel (r, c) is at c + ir. Whatever moves has a
pose, z -> turn z + shift: |turn| is its scale, the angle of turn its rotation. Poses chain as parent @ child: a forearm
is body @ shoulder @ elbow, a thing at rest under a moving camera is camera @ thing. One pose both draws a sprite and
carries the points tracked on it, so the tracks are true by construction.

Sprites are vivid and grounds are muted: the largest minus the smallest of R, G and B tells them apart (VIVID).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

FRAMES, HEIGHT, WIDTH, FPS = 33, 128, 192, 16  # 9 latent frames of 8 x 12 tokens, two seconds
TOP_SPEED = 9.0  # pixels a frame, of objects and pans
VIVID = 76  # levels: in each pixel max(R, G, B) - min(R, G, B) is more inside sprites, less on grounds
KINDS = ("single", "several", "camera", "articulated")
SPLITS = ("train", "held-out")
REACH = 0.65  # points tracked on a sprite lie this far from its center, in its size; a bar's are its two joints


class Shape(NamedTuple):
    """A figure around its center of mass, 0, with a tip towards -i: upwards."""

    tips: int  # one tracked point lies towards each
    edge: Callable[[np.ndarray], np.ndarray]  # z in the figure's size -> signed distance to its edge, negative inside
    nouns: tuple[str, ...] = ()


def _star(tips: int, outer: float, inner: float) -> Callable[[np.ndarray], np.ndarray]:
    """A star between two radii, or a regular polygon: folded into one of 2 tips equal sectors, it has a single edge."""
    half = np.pi / tips
    side = inner * np.exp(1j * half) - outer

    def edge(z: np.ndarray) -> np.ndarray:
        sector = np.abs((np.angle(1j * z) + half) % (2 * half) - half)
        return ((outer - np.abs(z) * np.exp(1j * sector)) * np.conj(side / abs(side))).imag

    return edge


def _box(z: np.ndarray, width: float, height: float) -> np.ndarray:
    return np.maximum(np.abs(z.real) - width, np.abs(z.imag) - height)


SHAPES = {
    "disc": Shape(4, lambda z: np.abs(z) - 0.95, ("disc", "circle")),
    "square": Shape(4, lambda z: _box(z, 0.86, 0.86), ("square",)),
    "triangle": Shape(3, _star(3, 1.3, 0.65), ("triangle",)),
    "star": Shape(5, _star(5, 1.25, 0.56), ("star",)),
    "ring": Shape(4, lambda z: np.abs(np.abs(z) - 0.72) - 0.28, ("ring", "hoop")),
    "cross": Shape(4, lambda z: np.minimum(_box(z, 1, 0.36), _box(z, 0.36, 1)), ("cross", "plus sign")),
}
BAR = Shape(2, lambda z: np.abs(z.real + 1j * np.maximum(np.abs(z.imag) - REACH, 0)) - 0.35)
LIMBS = {"arm": "a {} arm", "legs": "two {} legs"}  # each arm and leg is two bars
COLORS = {
    "red": (226, 38, 44),
    "yellow": (250, 212, 38),
    "green": (32, 188, 74),
    "blue": (38, 98, 240),
    "purple": (150, 56, 222),
    "pink": (255, 80, 170),
}
HELD_OUT = frozenset(zip(SHAPES, COLORS))  # never trained on; each of the shapes and of the colors alone is
GROUNDS = {  # dark color, light color, nouns
    "sand": ((196, 172, 134), (226, 208, 174), ("sand", "a sandy beach")),
    "grass": ((58, 80, 44), (92, 114, 62), ("grass", "a lawn")),
    "wood": ((86, 60, 42), (146, 108, 80), ("wooden planks", "a wooden floor")),
    "water": ((36, 86, 96), (84, 138, 144), ("water", "a lake")),
    "tiles": ((118, 120, 124), (186, 188, 192), ("grey tiles", "a tiled floor")),
    "night sky": ((20, 18, 34), (214, 212, 226), ("the night sky", "a starry sky")),
}
TEXTURES = {  # share of the light color at column x and row y, with n a smooth noise in about [-1, 1]
    "sand": lambda x, y, n: 0.5 + 0.5 * np.sin(y / 3 + 3 * n),
    "grass": lambda x, y, n: 0.5 + 0.5 * np.sin(x / 3 + 2 * n) * np.sin(y / 5 - 3 * n),
    "wood": lambda x, y, n: np.clip(4 * np.abs(np.sin(y / 10)), 0, 1) * (0.7 + 0.3 * np.sin(y / 2 + x / 40 + 4 * n)),
    "water": lambda x, y, n: (1 - 0.5 * np.abs(np.sin(x / 13 + 2 * n) + np.sin(y / 8 - 2 * n))) ** 2,
    "tiles": lambda x, y, n: 0.5 + 0.35 * np.clip(6 * np.sin(x / 8) * np.sin(y / 8), -1, 1) + 0.15 * n,
    "night sky": lambda x, y, n: np.clip(9 * np.sin(x / 9 + n / 3) * np.sin(y / 8 - n / 3) - 8, 0.1 + n / 10, 0.7),
}
SHADE = 0.85  # of a ground's light is left on average
TIME = np.linspace(0, 1, FRAMES)
MOTIONS = {  # paths of any size: each is turned, scaled and placed so that it fits into the frame
    "line": TIME + 0j,
    "arc": np.exp(1.3j * np.pi * TIME),
    "zigzag": 2 * TIME + 0.8j * np.interp(TIME, [0, 0.25, 0.5, 0.75, 1], [0, 1, 0, 1, 0]),
    "there-and-back": np.interp(TIME, [0, 0.5, 1], [0, 1, 0]) + 0j,
    "accelerating": TIME**2 + 0j,
    "bouncing": 3 * TIME - 4j * (2 * TIME % 1) * (1 - 2 * TIME % 1),
    "stops": np.interp(TIME, [0, 0.35, 0.65, 1], [0, 1, 1, 2]) + 0j,
}
Objects = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Scene:
    """What there is to see. Objects are (shape, color); an articulated one is its body and then its limb."""

    caption: str
    objects: Objects
    background: str


@dataclass(frozen=True, eq=False)
class Clip(Scene):
    """A scene in motion. Tracks are (row, column) in pixels; whole numbers are the middles of pixels."""

    frames: np.ndarray  # (T, H, W, 3) uint8
    tracks: np.ndarray  # (points, T, 2) float64, true also where the point is not visible
    visible: np.ndarray  # (points, T) bool: inside the frame and under no other sprite
    owners: np.ndarray  # (points,) place in `objects`, -1 for the background; each sprite's first point is its center
    kind: str
    motions: tuple[str, ...]  # of each object that moves, or of the camera
    split: str


class Pose(NamedTuple):
    """Where something is in each frame: z -> turn z + shift, complex, (T,) or constant."""

    turn: np.ndarray | complex
    shift: np.ndarray | complex

    def __call__(self, z: np.ndarray) -> np.ndarray:
        return self.turn * z + self.shift

    def __matmul__(self, child: "Pose") -> "Pose":
        return Pose(self.turn * child.turn, self(child.shift))

    def inverse(self, z: np.ndarray) -> np.ndarray:
        return (z - self.shift) / self.turn

    def at(self, frames: np.ndarray) -> "Pose":
        """Only these frames, shaped to meet pictures: (T,) -> (frames, 1, 1)."""
        return Pose(self.turn[frames, None, None], self.shift[frames, None, None])


class Sprite(NamedTuple):
    """A shape in a color that follows a pose."""

    shape: Shape
    color: str
    pose: Pose
    owner: int  # number of the object that it is, or is a part of


Motion = tuple[tuple[str, ...], Pose | None, list[Sprite]]  # names, camera, sprites from the lowest to the topmost


class Stage(NamedTuple):
    """All that is decided about a clip before anything is drawn."""

    scene: Scene
    kind: str
    motions: tuple[str, ...]
    camera: Pose | None  # None: it rests
    sprites: list[Sprite]  # from the lowest to the topmost
    rng: Generator  # for the ground's texture


def set_stage(seed: int, kind: str | None = None, split: str = "train") -> Stage:
    """What the clip of a seed shows and how it moves; arguments and errors are make_clip's."""
    if seed < 0 or kind not in (None, *KINDS) or split not in SPLITS:
        raise ValueError(f"got {seed=}, {kind=}, {split=}: give a seed >= 0, a kind of {KINDS}, a split of {SPLITS}")
    rng = np.random.default_rng(2 * seed + SPLITS.index(split))  # even numbers train, odd ones are held out
    own_kind = KINDS[rng.integers(len(KINDS))]  # drawn in any case: to name a seed's own kind changes nothing
    kind = kind or own_kind
    count = {"several": rng.integers(2, 4), "camera": rng.integers(2)}.get(kind, 1)
    limb = str(rng.choice(list(LIMBS))) if kind == "articulated" else None
    scene = _draw_scene(rng, count, limb, split)
    motions, camera, sprites = {"camera": _film, "articulated": _articulate}.get(kind, _move)(rng, scene.objects)
    return Stage(scene, kind, motions, camera, sprites, rng)


def make_clip(seed: int, kind: str | None = None, split: str = "train", frames: Sequence[int] = range(FRAMES)) -> Clip:
    """The clip of a seed: same seed, same bytes.

    seed >= 0; the splits have no generator in common, and "train" has no pair of HELD_OUT. kind: one of KINDS, None
    for any. frames: which of the 33 to draw and track, [] for the caption alone. Raises ValueError on others.
    """
    scene, kind, motions, camera, sprites, rng = set_stage(seed, kind, split)
    tracks, visible, owners = _track(camera, sprites)
    which = np.array(frames, dtype=int)
    pixels = _paint_ground(rng, scene.background, camera, which)
    for sprite in sprites:
        _paint(pixels, sprite, which)
    pixels = pixels.round().clip(0, 255).astype(np.uint8)
    return Clip(**vars(scene), frames=pixels, tracks=tracks[:, which], visible=visible[:, which], owners=owners,
                kind=kind, motions=motions, split=split)  # fmt: skip


def other_scene(clip: Clip, seed: int = 0) -> Scene:
    """What to ask for instead: as many objects (at least one), each shape, each color and the background another.

    A limb stays a limb, in another color. Of a clip for training, the scene has no pair of HELD_OUT either.
    """
    bodies = sum(shape in SHAPES for shape, _ in clip.objects)
    limb = clip.objects[1][0] if clip.kind == "articulated" else None
    return _draw_scene(np.random.default_rng(seed), max(1, bodies), limb, clip.split, clip)


def _draw_scene(rng: Generator, count: int, limb: str | None, split: str, unlike: Scene | None = None) -> Scene:
    """Objects of different shapes and colors on some ground, none of them used in `unlike`."""
    used = {word for pair in unlike.objects for word in pair} | {unlike.background} if unlike else set()
    shapes, colors, grounds = ([name for name in names if name not in used] for names in (SHAPES, COLORS, GROUNDS))
    while True:
        names = rng.permutation(shapes)[:count].tolist() + [limb] * bool(limb)
        objects = tuple(zip(names, rng.permutation(colors).tolist()))
        if split == "held-out" or HELD_OUT.isdisjoint(objects):
            background = str(rng.choice(grounds))
            return Scene(_describe(rng, objects, background), objects, background)


def _describe(rng: Generator, objects: Objects, background: str) -> str:
    """A caption: what there is, in which colors, on what ground, and never how it moves."""
    ground = rng.choice(GROUNDS[background][-1])
    bodies = [f"a {color} {rng.choice(SHAPES[shape].nouns)}" for shape, color in objects if shape in SHAPES]
    limbs = [f" with {LIMBS[limb].format(color)}" for limb, color in objects if limb in LIMBS]
    things = " and ".join(filter(None, [", ".join(bodies[:-1]), *bodies[-1:]])) + "".join(limbs)
    on = rng.choice(["on", "over", "against", "in front of"])
    some = [f"{things} {on} {ground}", f"a picture of {things} {on} {ground}", f"{on} {ground}, {things}"]
    none = [ground, f"a picture of {ground}", f"nothing but {ground}"]
    sentence = rng.choice(some if things else none)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _path(rng: Generator, margin: float, share: tuple[float, float], level: bool = False) -> tuple[str, Pose]:
    """A motion in some direction (level: left or right), over a share of the room that the margin leaves."""
    motion = str(rng.choice(list(MOTIONS)))
    path = MOTIONS[motion] if rng.random() < 0.5 else -MOTIONS[motion].conj()  # mirrored, left and right
    path = path if level or motion == "bouncing" else path * np.exp(2j * np.pi * rng.random())
    path = path - (path.real.min() + 1j * path.imag.min())  # its box now begins at 0
    room = np.array([WIDTH, HEIGHT]) - 1 - 2 * margin
    extent = np.array([path.real.max(), path.imag.max()])
    scale = min(*room / extent.clip(1e-9), TOP_SPEED / np.abs(np.diff(path)).max()) * rng.uniform(*share)
    column, row = margin + rng.random(2) * (room - scale * extent)
    return motion, Pose(np.ones(FRAMES), scale * path + column + 1j * row)


def _body(rng: Generator, pose: Pose, shape: str, color: str, size: float, owner: int = 0) -> Sprite:
    return Sprite(SHAPES[shape], color, pose @ Pose(size * np.exp(1j * rng.uniform(-0.25, 0.25)), 0), owner)


def _move(rng: Generator, objects: Objects) -> Motion:
    """Each object on its own path: of 32 draws, the one that keeps them furthest apart."""

    def clearance(paths: list[tuple[str, Pose]]) -> float:
        return min((np.abs(a.shift - b.shift).min() for (_, a), (_, b) in combinations(paths, 2)), default=0)

    share, size = ((0.5, 1), rng.uniform(20, 26)) if len(objects) == 1 else ((0.3, 0.8), rng.uniform(16, 21))
    paths = max(([_path(rng, 24, share) for _ in objects] for _ in range(32)), key=clearance)
    sprites = [_body(rng, path, *pair, size, owner) for owner, ((_, path), pair) in enumerate(zip(paths, objects))]
    return tuple(motion for motion, _ in paths), None, sprites


def _film(rng: Generator, objects: Objects) -> Motion:
    """A camera that pans, zooms, or both: the path is where the world's origin, with the object at rest, is seen."""
    pans, zooms = [(True, False), (False, True), (True, True)][rng.integers(3)]
    motion, camera = _path(rng, 32, (0.3, 0.7) if pans else (0, 0))
    if zooms:
        progress = np.abs(MOTIONS[motion] - MOTIONS[motion][0])
        camera @= Pose(rng.uniform(1.4, 2) ** (rng.choice([-1, 1]) * (progress / progress.max() - 0.5)), 0)
    return (motion,), camera, [_body(rng, camera, *pair, 22) for pair in objects]


def _articulate(rng: Generator, objects: Objects) -> Motion:
    """A body on a path, with an arm in any direction or upright on two legs: links that swing about their joints."""
    body, (limb, color) = objects
    walks = limb == "legs"
    motion, root = _path(rng, 42, (0.5, 1), level=walks)
    root @= Pose(1 if walks else np.exp(2j * np.pi * rng.random()), 0)
    swing, bend, size = rng.uniform(0.4, 0.8), rng.uniform(0.3, 0.6) * rng.choice([-1, 1]), 15 if walks else 19
    phase = 2 * np.pi * (rng.uniform(1, 2) * TIME + rng.random())
    sprites = []
    for side in (0, np.pi)[: 1 + walks]:  # the legs swing in turn
        joint = root
        for angle in (swing * np.sin(phase + side), bend * (1 + np.cos(phase + side))):  # knees bend one way only
            joint @= Pose(np.exp(1j * angle), 0)
            sprites.append(Sprite(BAR, color, joint @ Pose(size, 1j * REACH * size), 1))
            joint @= Pose(1, 2j * REACH * size)
    top = Pose(np.ones(FRAMES), root(-14j))
    return (motion,), None, [*sprites, _body(rng, top, *body, 18)]


def in_frame(z: np.ndarray) -> np.ndarray:
    """Whether places lie on some pixel."""
    return (np.abs(z.real - (WIDTH - 1) / 2) < WIDTH / 2) & (np.abs(z.imag - (HEIGHT - 1) / 2) < HEIGHT / 2)


def topmost(sprites: list[Sprite], z: np.ndarray, times: np.ndarray) -> np.ndarray:
    """The number of the topmost sprite at places z in frames `times`, which broadcasts with z; -1 is the ground."""
    owner = np.full(z.shape, -1)
    for layer, sprite in enumerate(sprites):
        pose = Pose(sprite.pose.turn[times], sprite.pose.shift[times])
        owner[sprite.shape.edge(pose.inverse(z)) <= 0] = layer
    return owner


def _track(camera: Pose | None, sprites: list[Sprite]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Center and tips of each sprite, and with a camera a 4 x 6 grid on the ground that frame 0 shows."""
    places, layers = [], []
    if camera:
        grid = np.linspace(16, WIDTH - 17, 6) + 1j * np.linspace(16, HEIGHT - 17, 4)[:, None]  # (4, 6)
        world = Pose(camera.turn[0], camera.shift[0]).inverse(grid)
        places.append(camera(world.reshape(-1, 1)))  # (24, 1) -> (24, T)
        layers += [-1] * world.size
    for layer, sprite in enumerate(sprites):
        tips = -1j * REACH * np.exp(2j * np.pi * np.arange(sprite.shape.tips) / sprite.shape.tips)
        places.append(sprite.pose(np.append(0, tips)[:, None]))  # (1 + tips, 1) -> (1 + tips, T)
        layers += [layer] * (1 + len(tips))
    z, layers = np.concatenate(places), np.array(layers)  # (points, T), (points,)
    visible = in_frame(z) & (topmost(sprites, z, np.arange(FRAMES)) <= layers[:, None])
    owners = np.array([sprite.owner for sprite in sprites] + [-1])[layers]
    return np.stack([z.imag, z.real], axis=-1), visible, owners  # (points, T) -> (points, T, 2)


def _paint_ground(rng: Generator, background: str, camera: Pose | None, frames: np.ndarray) -> np.ndarray:
    """(T, H, W, 3) levels from 0 to 255."""
    z = np.arange(WIDTH) + 1j * np.arange(HEIGHT)[None, :, None]  # (1, H, W)
    z = camera.at(frames).inverse(z) if camera else z[: len(frames)]  # -> (T, H, W), or one picture for all frames
    x, y = ((part + 500 * rng.random()).astype(np.float32) for part in (z.real, z.imag))
    noise = _waves(rng, x, y, 30, 90)
    shade = SHADE + 0.25 * _waves(rng, x, y, 60, 150).clip(-1, 1)  # as under clouds: no two places look the same
    dark, light = np.array(GROUNDS[background][:2], dtype=np.float32)
    pixels = dark + (light - dark) * TEXTURES[background](x, y, noise)[..., None]  # (T, H, W) -> (T, H, W, 3)
    pixels = shade[..., None] * pixels
    return np.broadcast_to(pixels, (len(frames), *pixels.shape[1:])).copy()  # (1, H, W, 3) -> (T, H, W, 3)


def _waves(rng: Generator, x: np.ndarray, y: np.ndarray, shortest: float, longest: float) -> np.ndarray:
    """Smooth noise in about [-1, 1]: plane waves in all directions, so many pixels long."""
    noise = np.float32(0)
    for _ in range(6):
        length, angle, phase = rng.uniform((shortest, 0, 0), (longest, 2 * np.pi, 2 * np.pi)).astype(np.float32)
        noise = noise + np.cos(2 * np.pi / length * (np.cos(angle) * x + np.sin(angle) * y) + phase) / 3
    return noise


def _paint(pixels: np.ndarray, sprite: Sprite, frames: np.ndarray) -> None:
    """Lay a sprite and its soft shadow over pixels (T, H, W, 3), drawing only a patch around it in each frame."""
    pose, size = sprite.pose.at(frames), np.abs(sprite.pose.turn)[frames, None, None]
    side = int(3 * np.abs(sprite.pose.turn).max()) + 8  # patches of one size, shifted to lie inside the frame
    top = (pose.shift.imag - side / 2).clip(0, HEIGHT - side).astype(int)  # (T, 1, 1)
    left = (pose.shift.real - side / 2).clip(0, WIDTH - side).astype(int)
    rows, columns = top + np.arange(side)[:, None], left + np.arange(side)  # (T, side, 1), (T, 1, side)
    patch = np.arange(len(frames))[:, None, None], rows, columns  # together (T, side, side)
    z = columns + 1j * rows
    edge, at = sprite.shape.edge(pose.inverse(z)), (z - pose.shift) / size  # at: as `inverse`, but not turned
    shadow = 0.4 * (0.5 - 2.5 * sprite.shape.edge(pose.inverse(z - (0.15 + 0.2j) * size))).clip(0, 1)
    tone = (1 - 0.1 * (at.real + at.imag)) * (1 - 0.3 * (10 * edge + 1.5).clip(0, 1))  # light from top left; a rim
    gloss = 0.35 * np.exp(-(np.abs(at + 0.35 + 0.35j) ** 2) / 0.08)
    color = np.array(COLORS[sprite.color]) * tone[..., None]  # (T, side, side) -> (T, side, side, 3)
    color += gloss[..., None] * (255 - color)
    cover = (0.5 - size * edge).clip(0, 1)[..., None]  # an edge one pixel wide
    pixels[patch] = cover * color + (1 - cover) * (1 - shadow[..., None]) * pixels[patch]
