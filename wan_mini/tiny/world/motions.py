"""How a scene moves: paths, poses, and the plan of a clip of each kind.

Whatever moves has a pose: in each frame, the point z of its own plane is at turn * z + shift in the frame (shapes.py
shows these numbers). |turn| is its scale, the angle of turn its rotation. A part is attached to what it belongs to: a
forearm to the elbow of an upper arm, an object at rest to a moving camera. The pose that draws a sprite also carries
the points that are tracked on it, so the tracks are true by construction.
"""

from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from wan_mini.errors import UserError
from wan_mini.tiny.world import constants as c
from wan_mini.tiny.world.constants import FRAMES, HEIGHT, KINDS, REACH, SPLITS, WIDTH
from wan_mini.tiny.world.scenes import Objects, Scene, draw_scene
from wan_mini.tiny.world.shapes import BAR, LIMBS, SHAPES, Shape

TIME = np.linspace(0, 1, FRAMES)
MOTIONS = {  # paths of any size and position, (T,) complex
    "line": TIME + 0j,
    "arc": np.exp(1.3j * np.pi * TIME),
    "zigzag": 2 * TIME + 0.8j * np.interp(TIME, [0, 0.25, 0.5, 0.75, 1], [0, 1, 0, 1, 0]),
    "there-and-back": np.interp(TIME, [0, 0.5, 1], [0, 1, 0]) + 0j,
    "accelerating": TIME**2 + 0j,
    "bouncing": 3 * TIME - 4j * (2 * TIME % 1) * (1 - 2 * TIME % 1),  # two jumps
    "stops": np.interp(TIME, [0, 0.35, 0.65, 1], [0, 1, 1, 2]) + 0j,
}


class Pose(NamedTuple):
    """Where something is in each frame; turn and shift are (T,)."""

    turn: np.ndarray
    shift: np.ndarray

    def apply(self, z: np.ndarray | complex) -> np.ndarray:
        """Points of the sprite's own plane -> points of the frame."""
        return self.turn * z + self.shift

    def invert(self, z: np.ndarray) -> np.ndarray:
        """Points of the frame -> points of the sprite's own plane."""
        return (z - self.shift) / self.turn

    def attach(self, turn: np.ndarray | complex, shift: np.ndarray | complex = 0) -> "Pose":
        """The pose of a part, which is scaled and rotated by `turn` about the point `shift` of this sprite's plane."""
        return Pose(self.turn * turn, self.apply(shift))

    def at(self, frames: np.ndarray) -> "Pose":
        """Only these frames (any shape), which index turn and shift."""
        return Pose(self.turn[frames], self.shift[frames])


class Sprite(NamedTuple):
    """A shape in a color that follows a pose."""

    shape: Shape
    color: str
    pose: Pose
    owner: int  # number of the object that it is, or is a part of


class Motion(NamedTuple):
    """How everything moves."""

    names: tuple[str, ...]  # in MOTIONS, of each object that moves, or of the camera
    camera: Pose | None  # of the background; None: it rests
    sprites: list[Sprite]  # from the lowest to the topmost


class ScenePlan(NamedTuple):
    """All that is decided about a clip before anything is drawn."""

    scene: Scene
    kind: str
    motion: Motion
    rng: Generator  # for the background's texture


def plan_clip(seed: int, kind: str | None = None, split: str = "train") -> ScenePlan:
    """What the clip of a seed shows and how it moves; arguments and errors as in make_clip."""
    if seed < 0 or kind not in (None, *KINDS) or split not in SPLITS:
        raise UserError(f"got {seed=}, {kind=}, {split=}: give a seed >= 0, a kind of {KINDS}, a split of {SPLITS}")
    rng = np.random.default_rng(2 * seed + SPLITS.index(split))  # even numbers train, odd ones are held out
    # All of these are drawn for each kind, so that naming the kind that a seed has anyway changes nothing.
    own_kind = KINDS[rng.integers(len(KINDS))]
    several = int(rng.integers(2, 4))
    resting = int(rng.integers(2))
    kind = kind or own_kind
    if kind == "camera":
        scene = draw_scene(rng, resting, None, split)
        motion = _move_camera(rng, scene.objects)
    elif kind == "articulated":
        limb = str(rng.choice(list(LIMBS)))
        scene = draw_scene(rng, 1, limb, split)
        motion = _swing_limbs(rng, scene.objects)
    else:
        scene = draw_scene(rng, several if kind == "several" else 1, None, split)
        motion = _move_objects(rng, scene.objects)
    return ScenePlan(scene, kind, motion, rng)


def _draw_path(rng: Generator, margin: float, share: tuple[float, float], level: bool = False) -> tuple[str, Pose]:
    """A motion's name and the pose of its path: over a share of the room inside the margin, not above TOP_SPEED.

    It is mirrored at random, and rotated, unless it is to stay level: walkers do, and what bounces falls downwards.
    """
    name = str(rng.choice(list(MOTIONS)))
    path = MOTIONS[name]
    if rng.random() >= 0.5:
        path = -path.conj()  # left and right exchanged
    if not level and name != "bouncing":
        path = path * np.exp(2j * np.pi * rng.random())
    path = path - (path.real.min() + 1j * path.imag.min())  # its bounding box begins at 0
    extent = np.array([path.real.max(), path.imag.max()])  # width, height
    room = np.array([WIDTH, HEIGHT]) - 1 - 2 * margin
    fastest = np.abs(np.diff(path)).max()
    scale = min(*(room / extent.clip(1e-9)), c.TOP_SPEED / fastest) * rng.uniform(*share)
    corner = margin + rng.random(2) * (room - scale * extent)
    return name, Pose(np.ones(FRAMES), scale * path + corner[0] + 1j * corner[1])


def _body(rng: Generator, pose: Pose, shape: str, color: str, size: float, owner: int) -> Sprite:
    tilt = np.exp(1j * rng.uniform(-c.TILT, c.TILT))
    return Sprite(SHAPES[shape], color, pose.attach(size * tilt), owner)


def _move_objects(rng: Generator, objects: Objects) -> Motion:
    """Each object on a path of its own; of TRIES sets of paths, the one that keeps them furthest apart."""
    if len(objects) == 1:
        share = c.SINGLE_SHARE
        size = rng.uniform(*c.SINGLE_SIZE)
        margin = c.SINGLE_MARGIN
    else:
        share = c.SEVERAL_SHARE
        size = rng.uniform(*c.SEVERAL_SIZE)
        margin = c.SEVERAL_MARGIN
    paths: list[tuple[str, Pose]] = []
    widest = -1.0
    for _ in range(c.TRIES):
        candidate = [_draw_path(rng, margin, share) for _ in objects]
        distance = _clearance([pose for _, pose in candidate])
        if distance > widest:
            paths = candidate
            widest = distance
    sprites = []
    for owner, (shape, color) in enumerate(objects):
        sprites.append(_body(rng, paths[owner][1], shape, color, size, owner))
    return Motion(tuple(name for name, _ in paths), None, sprites)


def _clearance(poses: list[Pose]) -> float:
    """Least distance in pixels of two of them in any frame; 0 for a single one."""
    distances = [np.abs(one.shift - other.shift).min() for one, other in combinations(poses, 2)]
    return min(distances, default=0.0)


def _move_camera(rng: Generator, objects: Objects) -> Motion:
    """A camera that pans, zooms, or both: its pose is where the world's origin, with an object at rest, is seen."""
    pans, zooms = ((True, False), (False, True), (True, True))[rng.integers(3)]
    name, camera = _draw_path(rng, c.CAMERA_MARGIN, c.CAMERA_SHARE if pans else (0, 0))
    if zooms:
        progress = np.abs(MOTIONS[name] - MOTIONS[name][0])
        ratio = rng.uniform(*c.ZOOM)
        sign = rng.choice([-1, 1])  # out or in
        camera = camera.attach(ratio ** (sign * (progress / progress.max() - 0.5)))
    sprites = [_body(rng, camera, shape, color, c.RESTING_SIZE, 0) for shape, color in objects]
    return Motion((name,), camera, sprites)


def _swing_limbs(rng: Generator, objects: Objects) -> Motion:
    """A body on a path, with an arm in any direction, or upright on two legs that swing in turn.

    A limb is two bars. The first swings about the path, the second bends at the end of the first, one way only.
    """
    (shape, body_color), (limb, limb_color) = objects
    walks = limb == "legs"
    name, root = _draw_path(rng, c.LIMB_MARGIN, c.SINGLE_SHARE, level=walks)
    if not walks:
        root = root.attach(np.exp(2j * np.pi * rng.random()))
    swing = rng.uniform(0.4, 0.8)  # radians
    bend = rng.uniform(0.3, 0.6) * rng.choice([-1, 1])
    phase = 2 * np.pi * (rng.uniform(1, 2) * TIME + rng.random())  # one to two swings a clip
    size = c.LEG_SIZE if walks else c.ARM_SIZE
    sprites = []
    for offset in (0, np.pi) if walks else (0,):
        joint = root
        for angle in (swing * np.sin(phase + offset), bend * (1 + np.cos(phase + offset))):
            joint = joint.attach(np.exp(1j * angle))
            sprites.append(Sprite(BAR, limb_color, joint.attach(size, 1j * REACH * size), 1))
            joint = joint.attach(1, 2j * REACH * size)  # the other end of the bar
    top = Pose(np.ones(FRAMES), root.apply(-1j * c.BODY_HEIGHT))
    sprites.append(_body(rng, top, shape, body_color, c.BODY_SIZE, 0))
    return Motion((name,), None, sprites)
