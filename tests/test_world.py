"""The synthetic world: same seed, same bytes; tracks are true; captions tell all but the motion, and so do pixels."""

import re
from functools import lru_cache
from hashlib import sha256
from itertools import combinations

import numpy as np
import pytest

from wan_mini.tiny import world
from wan_mini.tiny.world import (
    BACKGROUNDS,
    COLORS,
    HELD_OUT,
    KINDS,
    LIMBS,
    MOTIONS,
    SHADE,
    SHAPES,
    VIVID,
    make_clip,
    other_scene,
)

ROWS, COLUMNS = np.mgrid[: world.HEIGHT, : world.WIDTH]
# Seed, kind, split, and `fingerprint` of some clips.
STORED = (
    (1, None, "train", "c594d9b2b20a5c92", 0.059866),
    (4, None, "held-out", "db45ad45dd74938b", 0.030222),
    (7, "single", "train", "8692f9e4329c8627", 0.106886),
    (10, "single", "held-out", "4da09e8f9d1333ad", 0.074750),
    (13, "several", "train", "f5a226cd98a744fe", 0.025074),
    (16, "several", "held-out", "44f295e57de6695d", -0.057057),
    (19, "camera", "train", "4b521be7e537c7f3", 0.09860),
    (22, "camera", "held-out", "f459a1bf3ba69f91", 0.001761),
    (25, "articulated", "train", "86f24787266f9d63", 0.165032),
    (28, "articulated", "held-out", "8047ea3aa4bfa1e4", 0.039646),
)
MOTION_WORDS = re.compile(
    r"""\b(accelerat|arc|away|back|bounc|camera|circling|down|drift|fall|fast|float|forth|forward|glid|go|jump|left|line
    |mov|motion|orbit|pan|quick|right|ris|roll|rotat|run|shift|slid|slow|speed|spin|step|stop|sway|swing|toward|travel
    |turn|up|walk|wav|zigzag|zoom)""",
    re.IGNORECASE | re.VERBOSE,
)


@lru_cache
def captions_of(count: int, split: str = "train") -> list[world.Clip]:
    """Clips without their frames."""
    return [make_clip(seed, split=split, frames=[]) for seed in range(count)]


def chroma(frames: np.ndarray) -> np.ndarray:
    return np.ptp(frames.astype(int), axis=-1)


def hue(rgb: np.ndarray) -> np.ndarray:
    """Lightness and saturation taken away: the least of R, G and B becomes 0, the greatest 1."""
    low, high = rgb.min(-1, keepdims=True), rgb.max(-1, keepdims=True)
    return (rgb - low) / np.maximum(high - low, 1.0)


def colors_in(pixels: np.ndarray) -> np.ndarray:
    """(..., 3) levels -> (...) names: in vivid pixels the color of the nearest hue, elsewhere ""."""
    distances = np.linalg.norm(hue(pixels.astype(float))[..., None, :] - hue(np.array([*COLORS.values()])), axis=-1)
    return np.where(chroma(pixels) > VIVID, np.array([*COLORS])[distances.argmin(-1)], "")


def background_in(frame: np.ndarray) -> str:
    """The background whose middle color is nearest; the night sky is nearly all of its dark one."""
    median = np.median(frame[chroma(frame) < VIVID], axis=0)
    middle = {name: SHADE * np.mean(two[:2], axis=0) for name, two in BACKGROUNDS.items()}
    middle["night sky"] = SHADE * np.average(BACKGROUNDS["night sky"][:2], axis=0, weights=[0.9, 0.1])
    return min(middle, key=lambda name: np.linalg.norm(median - middle[name]))


def shape_in(mask: np.ndarray) -> str:
    """The shape that covers the mask best, at the mask's own middle and area."""
    z = COLUMNS + 1j * ROWS
    near = np.abs(z - z[mask].mean()) < 60
    z, mask = z[near], mask[near]
    grid = np.linspace(-1.5, 1.5, 91)
    scores = {}
    for name, shape in SHAPES.items():
        unit_area = 9 * (shape.distance(grid + 1j * grid[:, None]) < 0).mean()
        for tilt in (-0.2, 0, 0.2):
            turn = np.sqrt(mask.sum() / unit_area) * np.exp(1j * tilt)
            template = shape.distance((z - z[mask].mean()) / turn) < 0
            scores[name, tilt] = (template & mask).sum() / (template | mask).sum()
    return max(scores, key=scores.get)[0]


def test_same_seed_same_bytes():
    for kind in KINDS:
        one, two = make_clip(5, kind), make_clip(5, kind)
        for field, value in vars(one).items():
            assert np.array_equal(value, getattr(two, field)), (kind, field)
        assert one.kind == kind
        assert one.frames.shape == (33, 128, 192, 3)
        assert one.frames.dtype == np.uint8
        assert one.tracks.shape == (len(one.owners), 33, 2)
        assert one.visible.shape == one.tracks.shape[:2]


def fingerprint(clip: world.Clip) -> tuple[str, float]:
    """A hash of a clip's scene and tracks (to 1e-4 pixels), and a weighted mean of its pixels.

    The pixels have no hash, because their last bit may depend on the processor's sines.
    """
    parts = [clip.caption, clip.objects, clip.background, clip.kind, clip.motions, clip.owners.tolist()]
    parts += [clip.visible.astype(int).tolist(), (clip.tracks.round(4) + 0.0).tolist()]
    weights = np.random.default_rng(0).standard_normal(clip.frames.shape)
    return sha256(repr(parts).encode()).hexdigest()[:16], float((clip.frames * weights).mean())


@pytest.mark.parametrize(("seed", "kind", "split", "digest", "mean"), STORED)
def test_clips_are_those_that_the_checkpoint_was_made_and_measured_with(seed, kind, split, digest, mean):
    """Whoever changes the world on purpose needs a new checkpoint, a new evaluation.csv, and these numbers anew."""
    new_digest, new_mean = fingerprint(make_clip(seed, kind, split, frames=range(0, 33, 8)))
    assert new_digest == digest
    assert new_mean == pytest.approx(mean, abs=1e-4)


def test_a_seed_has_a_kind_of_its_own():
    clip = make_clip(3, frames=[4])
    assert np.array_equal(clip.frames, make_clip(3, clip.kind, frames=[4]).frames)


@pytest.mark.parametrize("kind", KINDS)
def test_some_frames_are_those_of_the_whole(kind):
    whole, part = make_clip(2, kind), make_clip(2, kind, frames=[30, 7])
    assert np.array_equal(part.frames, whole.frames[[30, 7]])
    assert np.array_equal(part.tracks, whole.tracks[:, [30, 7]])
    assert np.array_equal(part.visible, whole.visible[:, [30, 7]])
    none = make_clip(2, kind, frames=[])
    assert none.frames.shape == (0, 128, 192, 3)
    assert none.caption == whole.caption


def test_seeds_look_different():
    clips = [make_clip(seed, split=split, frames=[0]) for seed in range(6) for split in world.SPLITS]
    for one, two in combinations([clip.frames.astype(float) for clip in clips], 2):
        assert np.abs(one - two).mean() > 3


def test_splits_share_no_generator(monkeypatch):
    seeds = {split: [] for split in world.SPLITS}
    original = np.random.default_rng
    for split, seen in seeds.items():
        monkeypatch.setattr(np.random, "default_rng", lambda seed, seen=seen: seen.append(seed) or original(seed))
        for seed in range(20):
            make_clip(seed, split=split, frames=[])
        assert len(set(seen)) == 20
    assert not set(seeds["train"]) & set(seeds["held-out"])


def test_held_out_pairs_stay_out_of_training():
    train, held_out = captions_of(200), captions_of(100, "held-out")
    pairs = {pair for clip in train for pair in [*clip.objects, *other_scene(clip).objects]}
    assert not pairs & HELD_OUT
    assert {shape for shape, _ in pairs} >= set(SHAPES)  # each word alone is trained on
    assert {color for _, color in pairs} == set(COLORS)
    assert len({pair for clip in held_out for pair in clip.objects} & HELD_OUT) >= 4


def test_all_there_is_appears():
    clips = captions_of(200)
    assert {clip.kind for clip in clips} == set(KINDS)
    assert {clip.background for clip in clips} == set(BACKGROUNDS)
    assert {shape for clip in clips for shape, _ in clip.objects} == {*SHAPES, *LIMBS}
    for kind in KINDS:
        assert {motion for clip in clips if clip.kind == kind for motion in clip.motions} == set(MOTIONS), kind
    counts = {kind: {len(clip.objects) for clip in clips if clip.kind == kind} for kind in KINDS}
    assert counts == {"single": {1}, "several": {2, 3}, "camera": {0, 1}, "articulated": {2}}


def test_captions_name_what_is_seen_and_never_motion():
    clips = captions_of(200) + captions_of(100, "held-out")
    for clip in clips:
        words = re.findall(r"[a-z]+", clip.caption.lower())
        assert not MOTION_WORDS.search(clip.caption), clip.caption
        assert any(noun in clip.caption.lower() for noun in BACKGROUNDS[clip.background][-1])
        assert sorted(w for w in words if w in COLORS) == sorted(color for _, color in clip.objects)
        for shape, _ in clip.objects:
            nouns = (shape,) if shape in LIMBS else SHAPES[shape].nouns
            assert any(noun in clip.caption for noun in nouns), clip.caption
        assert re.fullmatch(r"[A-Z][a-z ,]+\.", clip.caption)
    assert len({clip.caption for clip in clips}) > 220


def test_other_scene_differs_in_all_three():
    for clip in captions_of(200) + captions_of(100, "held-out"):
        new = other_scene(clip, seed=1)
        assert new.background != clip.background
        assert not {c for _, c in new.objects} & {c for _, c in clip.objects}
        shared = {s for s, _ in new.objects} & {s for s, _ in clip.objects}
        assert shared == {s for s, _ in clip.objects} & set(LIMBS)  # an arm stays an arm
        assert len(new.objects) == max(1, len(clip.objects))
        assert new == other_scene(clip, seed=1)
    assert len({other_scene(clip, seed).caption for seed in range(20)}) > 15


@pytest.mark.parametrize("shape", SHAPES)
def test_center_track_is_the_centroid_of_the_pixels(shape):
    seeds = (s for s in range(200) if make_clip(s, "single", "held-out", frames=[]).objects[0][0] == shape)
    clip = make_clip(next(seeds), "single", "held-out")
    for frame, track in zip(clip.frames, clip.tracks[0]):
        mask = chroma(frame) > VIVID
        assert np.abs([ROWS[mask].mean(), COLUMNS[mask].mean()] - track).max() < 0.3
    assert np.ptp(clip.tracks[0], axis=0).max() > 20  # and it moved


def test_camera_tracks_follow_the_background():
    """Frame 0 sampled where the tracks say is frame t; half a pixel beside, it is so less."""
    for seed in range(6):
        clip = make_clip(seed, "camera", frames=[0, 10, 32])
        points = clip.tracks[clip.owners == -1] @ [1j, 1]  # (points, 3): column + i row
        for t in (1, 2):
            a, b = np.polyfit(points[:, t], points[:, 0], 1)  # frame t -> frame 0 is a similarity
            assert np.abs(a * points[:, t] + b - points[:, 0]).max() < 1e-9
            errors = {beside: warp_error(clip.frames[0], clip.frames[t], a, b + beside) for beside in (0, 0.5, 0.5j)}
            assert errors[0] < 2
            assert errors[0] < 0.7 * min(errors[0.5], errors[0.5j])


def warp_error(first: np.ndarray, frame: np.ndarray, a: complex, b: complex) -> float:
    """Mean difference of `frame` from `first` at a z + b (bilinear), over background far from any sprite."""
    z = a * (COLUMNS + 1j * ROWS) + b
    row, column = np.floor(z.imag).astype(int), np.floor(z.real).astype(int)
    inside = (row >= 0) & (row < world.HEIGHT - 1) & (column >= 0) & (column < world.WIDTH - 1)
    row, column, z, frame = row[inside], column[inside], z[inside], frame[inside].astype(float)
    y, x = (z.imag - row)[:, None], (z.real - column)[:, None]
    corners = [first[row + i, column + j] * abs(1 - i - y) * abs(1 - j - x) for i in (0, 1) for j in (0, 1)]
    return np.median(np.abs(sum(corners) - frame))


def test_a_resting_thing_moves_with_the_background():
    clip = next(
        clip for clip in (make_clip(seed, "camera", frames=range(0, 33, 8)) for seed in range(9)) if clip.objects
    )
    points = clip.tracks @ [1j, 1]
    background = clip.owners == -1
    for t in range(1, 5):
        a, b = np.polyfit(points[background, 0], points[background, t], 1)
        assert np.abs(a * points[:, 0] + b - points[:, t]).max() < 1e-9


@pytest.mark.parametrize("limb", LIMBS)
def test_limbs_are_rigid_jointed_and_bend(limb):
    clip = next(c for c in (make_clip(s, "articulated", frames=range(33)) for s in range(9)) if c.objects[1][0] == limb)
    links = (clip.tracks[clip.owners == 1] @ [1j, 1]).reshape(-1, 2, 3, 33)  # limb, link, (middle, upper, lower), time
    upper, lower = links[:, 0], links[:, 1]
    assert len(links) == {"arm": 1, "legs": 2}[limb]
    assert np.abs(upper[:, 2] - lower[:, 1]).max() < 1e-9  # the elbow holds
    lengths = np.abs(links[:, :, 2] - links[:, :, 1])
    assert np.ptp(lengths) < 1e-9
    assert lengths.min() > 16
    angles = np.angle((lower[:, 2] - lower[:, 1]) / (upper[:, 2] - upper[:, 1]))
    assert np.ptp(angles, axis=-1).min() > 0.4
    body = clip.tracks[clip.owners == 0][0] @ [1j, 1]
    hips = upper[:, 1]
    assert np.abs(hips - hips[:1]).max() < 1e-9
    assert np.ptp(np.abs(body - hips[0])) < 1e-9  # a body and its limb move as one
    assert np.abs(body - body[0]).max() > 15


def test_hidden_points_lie_under_another_color():
    """At a visible point its owner's color is seen (none of them on the background), at a hidden one another's."""
    agrees = {True: [], False: []}
    for clip in [make_clip(seed, kind, frames=range(0, 33, 4)) for seed in range(20) for kind in ("several", "camera")]:
        expected = np.array([*(color for _, color in clip.objects), ""])[clip.owners]
        row, column = np.rint(clip.tracks).astype(int).transpose(2, 0, 1)  # (points, T, 2) -> (points, T) each
        inside = (row >= 0) & (row < world.HEIGHT) & (column >= 0) & (column < world.WIDTH)
        solid = np.array([owner == -1 or clip.objects[owner][0] != "ring" for owner in clip.owners])  # no holes
        for point, t in zip(*np.nonzero(inside & solid[:, None])):
            pixel = clip.frames[t, row[point, t], column[point, t]]
            agrees[bool(clip.visible[point, t])].append(colors_in(pixel) == expected[point])
    assert len(agrees[False]) > 50
    assert np.mean(agrees[True]) > 0.98
    assert np.mean(agrees[False]) < 0.1


def test_points_out_of_frame_are_not_visible():
    outside = 0
    for seed in range(10):
        clip = make_clip(seed, "camera", frames=range(0, 33, 8))
        inside = ((clip.tracks > -0.5) & (clip.tracks < [127.5, 191.5])).all(-1)
        assert not clip.visible[~inside].any()
        outside += (~inside).sum()
        background = clip.owners == -1
        assert clip.visible[background, 0].mean() > 0.7  # all but those under the object
        if not clip.objects:
            assert np.array_equal(clip.visible, inside)
    assert outside > 50


def test_motion_can_be_measured_and_stays_in_frame():
    speeds, extents, inside = [], [], []
    for clip in [make_clip(seed, kind) for seed in range(6) for kind in ("single", "several", "articulated")]:
        for owner in range(len(clip.motions)):
            center = clip.tracks[clip.owners == owner][0]
            extents.append(np.linalg.norm(np.ptp(center, axis=0)))
            speeds.append(np.linalg.norm(np.diff(center, axis=0), axis=-1).max())
        inside.append(((clip.tracks > -0.5) & (clip.tracks < [127.5, 191.5])).all(-1).mean())
    assert min(extents) > 20
    assert max(speeds) <= world.TOP_SPEED + 1e-9
    assert max(speeds) > 3 * min(speeds)
    assert min(inside) > 0.9


@pytest.mark.parametrize("motion", MOTIONS)
def test_motions_do_what_they_are_called(motion):
    path = MOTIONS[motion]
    step = np.diff(path)
    speed, turn = np.abs(step), np.abs(np.angle(step[1:] * np.conj(step[:-1]) + 1e-15))
    straight = np.abs(path.imag).max() == 0
    rests, sharp = (speed < 1e-9).sum(), (turn > 1).sum()
    expected = {  # straight, frames at rest, sharp turns, fastest over slowest step above 2
        "line": (True, 0, 0, False),
        "arc": (False, 0, 0, False),
        "zigzag": (False, 0, 3, False),
        "there-and-back": (True, 0, 1, False),
        "accelerating": (True, 0, 0, True),
        "bouncing": (False, 0, 1, True),
        "stops": (True, pytest.approx(9, abs=1), 0, True),
    }
    assert (straight, rests, sharp, speed.max() > 2 * speed.min()) == expected[motion]


def test_sprites_are_vivid_and_backgrounds_are_muted():
    for seed in range(40):
        clip = make_clip(seed, "camera", frames=[0])
        if not clip.objects:
            assert chroma(clip.frames).max() < VIVID
    for seed in range(20):
        clip = make_clip(seed, "single", frames=[16])
        tips = np.rint(clip.tracks[1:, 0]).astype(int)
        assert chroma(clip.frames)[0, tips[:, 0], tips[:, 1]].min() > VIVID


def test_pixels_tell_colors_background_and_shapes():
    right = {"colors": [], "background": [], "shape": []}
    for clip in [make_clip(seed, kind, "held-out", frames=[20]) for seed in range(20) for kind in KINDS]:
        frame = clip.frames[0]
        names = colors_in(frame)
        masks = {name: names == name for name in COLORS if (names == name).sum() > 90}
        right["colors"].append(set(masks) == {color for _, color in clip.objects})
        right["background"].append(background_in(frame) == clip.background)
        for owner, (shape, color) in enumerate(clip.objects):
            if shape in SHAPES and color in masks and clip.visible[clip.owners == owner].all():
                right["shape"].append(shape_in(masks[color]) == shape)
    assert {name: np.mean(answers) >= 0.99 for name, answers in right.items()} == dict.fromkeys(right, True)
    assert len(right["shape"]) > 60


def test_edges_are_smooth():
    """Between a vivid sprite and gray tiles lie pixels of both: a hard edge would have none."""
    clip = next(c for c in (make_clip(s, "single", frames=[0]) for s in range(99)) if c.background == "tiles")
    vividness = chroma(clip.frames[0])
    rows = (vividness > VIVID).any(axis=1)
    assert (((vividness > 20) & (vividness < VIVID)).sum(axis=1)[rows] >= 1).mean() > 0.8


@pytest.mark.parametrize("bad", [{"seed": -1}, {"seed": 0, "kind": "many"}, {"seed": 0, "split": "test"}])
def test_unknown_arguments_are_refused(bad):
    with pytest.raises(ValueError, match="give a seed >= 0"):
        make_clip(**bad)
