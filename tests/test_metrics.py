"""Every metric on cases done by hand, then classifier and tracker on real clips and on spoilt ones."""

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest

from wan_mini.tiny.world import (
    FRAMES,
    HEIGHT,
    KINDS,
    SHAPES,
    WIDTH,
    Clip,
    Scene,
    classify_scene,
    correlation,
    direction,
    error_px,
    fidelity,
    fidelity_published,
    fill_missing,
    label_pixels,
    make_clip,
    motions,
    other_scene,
    predicted_tracks,
    score,
    true_tracks,
)

RAMP = np.arange(9.0)
LINE = (2 * RAMP + 1j * RAMP)[None]  # (1, 9)
EIGHT = (30 + 20 * np.cos(RAMP) + 1j * (40 + 20 * np.sin(RAMP)))[None]


@lru_cache
def copied(number: int, kind: str) -> tuple[Clip, Scene, np.ndarray]:
    """A clip, another scene, and what a perfect method would make of them: that scene, moving as the clip does."""
    clip = make_clip(number, kind, "held-out")
    scene = other_scene(clip, number)
    draw_scene = motions.draw_scene
    with pytest.MonkeyPatch.context() as patch:  # the scene is drawn, and then another one is taken
        patch.setattr(motions, "draw_scene", lambda *args: (draw_scene(*args), scene)[1])
        return clip, scene, make_clip(number, kind, "held-out").frames


def blurred(frames: np.ndarray, times: int) -> np.ndarray:
    x = frames.astype(np.float32)
    for _ in range(times):
        for axis in (1, 2):
            x = (np.roll(x, 1, axis) + 2 * x + np.roll(x, -1, axis)) / 4
    return x.round().astype(np.uint8)


def noisy(frames: np.ndarray, sigma: float) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, sigma, frames.shape)
    return (frames + noise).round().clip(0, 255).astype(np.uint8)


def center_of(clip: Clip, number: int) -> np.ndarray:
    row, column = clip.tracks[clip.owners == number][0].T
    return column + 1j * row


@pytest.mark.parametrize("path", [LINE, EIGHT, np.concatenate([LINE, EIGHT])])
def test_a_perfect_copy(path):
    assert correlation(path, path) == pytest.approx(np.ones(len(path)))
    assert direction(path, path) == pytest.approx(np.ones(len(path)))
    assert np.array_equal(error_px(path, path), np.zeros(len(path)))
    assert fidelity(path, path) == pytest.approx(1)


def test_a_reversed_line():
    back = LINE[:, ::-1]
    assert correlation(back, LINE) == pytest.approx([-1])
    assert direction(back, LINE) == pytest.approx([-1])
    assert fidelity(back, LINE) == pytest.approx(-1)
    assert error_px(back, LINE) == pytest.approx([np.sqrt(5) * np.abs(8 - 2 * RAMP).mean()])


def test_elsewhere_and_smaller():
    """An offset and a factor change the error alone."""
    moved = LINE / 2 + 30 - 40j
    assert correlation(moved, LINE) == pytest.approx([1])
    assert direction(moved, LINE) == pytest.approx([1])
    assert fidelity(moved, LINE) == pytest.approx(1)
    assert error_px(LINE + 3 - 4j, LINE) == pytest.approx([5])


def test_only_axes_that_move_count():
    """Along rows the truth's range is 4, then a little less: in the one case rows count, in the other not."""
    predicted = 2 * RAMP - 0.5j * RAMP
    assert correlation(predicted[None], (2 * RAMP + 0.5j * RAMP)[None]) == pytest.approx([0])  # columns 1, rows -1
    assert correlation(predicted[None], (2 * RAMP + 0.49j * RAMP)[None]) == pytest.approx([1])
    assert np.isnan(correlation(predicted[None], (0.49 * RAMP + 0j)[None])).all()


def test_only_steps_that_move_count():
    true = np.array([[0, 2, 2, 2.9, 2.9 + 3j]])  # steps of 2, 0, 0.9 and 3 pixels
    predicted = np.array([[0, 1, 5, 1, 0]])  # cosines 1 and, of the last, 0
    assert direction(predicted, true) == pytest.approx([0.5])
    assert np.isnan(direction(predicted, np.zeros((1, 5)))).all()
    assert direction(np.array([[0, 1 + 1j]]), np.array([[0, 2]])) == pytest.approx([np.sqrt(0.5)])


def test_a_still_clip_scores_nothing():
    still = np.full_like(LINE, 50 + 50j)
    for predicted in (still, still + 1e-3 * RAMP):  # rounding is no motion
        assert correlation(predicted, LINE) == pytest.approx([0], abs=0.03)
        assert direction(predicted, LINE) == pytest.approx([0])
        assert fidelity(predicted, LINE) == 0
    assert np.isnan(fidelity_published(still, LINE))
    assert np.isnan(fidelity(LINE, still))


def test_fidelity_of_two_tracks_by_hand():
    """Steps of unit length: predicted right right, and up up; true right up, and left left."""
    predicted, true = np.array([[0, 5, 10], [0, -5j, -10j]]), np.array([[0, 5, 5 - 5j], [0, -5, -10]])
    # Similarities (predicted, true): 1/2 and -1; 1/2 and 0. Less the identity: -1/2 and -1; 1/2 and -1.
    assert fidelity_published(predicted, true) == pytest.approx((-1 / 2 + 1 / 2) / 2)
    # Best of each true track 1/2 and 0, of each predicted one 1/2 and 1/2.
    assert fidelity(predicted, true) == pytest.approx((1 / 4 + 1 / 2) / 2)
    # Ten times as far is the same direction; and a perfect copy is marked down by the identity.
    assert fidelity(10 * predicted, true) == pytest.approx(3 / 8)
    assert fidelity_published(LINE, LINE) == pytest.approx(0)


def test_fidelity_over_moving_steps():
    """A stop in both clips costs nothing, in one of them it does: 2 of 4 steps, cosine 2 / sqrt(2 * 4)."""
    stops, goes = np.array([[0, 5, 5, 5, 10]]), np.array([[0, 5, 10, 15, 20]])
    assert fidelity(stops, stops) == pytest.approx(1)
    assert fidelity(stops, goes) == pytest.approx(np.sqrt(0.5))


def test_lost_points_stay_where_they_were():
    nan, middle = np.nan, (WIDTH - 1) / 2 + 1j * (HEIGHT - 1) / 2
    filled = fill_missing(np.array([[nan, 1 + 1j, nan, nan, 4, nan], [nan] * 6]))
    assert filled.tolist() == [[1 + 1j, 1 + 1j, 1 + 1j, 4, 4, 4], [middle] * 6]


@pytest.mark.parametrize("spoil", ["clean", "blurred", "noisy"])
def test_classifier_reads_real_clips(spoil):
    """At least 99 % of shapes, colors and backgrounds; and as much after the blur and grain of a small VAE."""
    change = {"clean": lambda x: x, "blurred": lambda x: blurred(x, 3), "noisy": lambda x: noisy(x, 8)}[spoil]
    rows = []
    for number in range(60):
        clip = make_clip(number, KINDS[number % 4], "held-out", range(0, FRAMES, 16))
        frames = change(clip.frames)
        rows.append([*classify_scene(frames, label_pixels(frames), clip)[1].values()])
    assert np.mean(rows, axis=0).min() >= 0.99


def test_classifier_sees_what_is_wrong():
    clip, scene, frames = copied(3, "several")
    labels = label_pixels(frames)
    assert classify_scene(frames, labels, scene)[1] == {"color_ok": 1, "background_ok": 1, "shape_ok": 1}
    assert classify_scene(frames, labels, clip)[1] == {"color_ok": 0, "background_ok": 0, "shape_ok": 0}
    (one, red), (two, blue), *rest = scene.objects
    swapped = replace(scene, objects=((one, blue), (two, red), *rest))  # all there, but in each other's color
    assert classify_scene(frames, labels, swapped)[1] == {"color_ok": 1, "background_ok": 1, "shape_ok": 0}
    gray = np.full_like(frames, 150)
    assert classify_scene(gray, label_pixels(gray), scene) == (
        (("", ""),) * len(scene.objects),
        {"color_ok": 0, "background_ok": scene.background == "tiles", "shape_ok": 0},
    )


@pytest.mark.parametrize("kind", ["single", "several", "articulated"])
def test_tracker_finds_centers(kind):
    """Within half a pixel of the truth on average; where one object hides another, within a few."""
    seen, hidden = [], []
    for seed in range(20):
        clip = make_clip(seed, kind, "held-out", range(0, FRAMES, 4))
        labels = label_pixels(clip.frames)
        predicted = predicted_tracks(clip.frames, labels, clip.objects, np.empty(0))
        for number, (shape, _) in enumerate(clip.objects):
            if shape in SHAPES:
                errors = np.abs(predicted[number] - center_of(clip, number))  # (T,)
                visible = clip.visible[clip.owners == number].all(0)  # (points,T) -> (T,)
                seen += errors[visible].tolist()
                hidden += errors[~visible].tolist()
    assert np.mean(seen) < 0.4 and max(seen) < 5
    assert kind != "several" or np.mean(hidden) < 4
    assert kind == "several" or not hidden


def test_tracker_follows_the_background():
    """Grid points within a fifth of a pixel of the truth on average, however far the camera goes."""
    errors = []
    for number in range(6):
        clip = make_clip(number, "camera", "held-out")
        true, owners = true_tracks(clip)
        labels = label_pixels(clip.frames)
        errors.append(error_px(predicted_tracks(clip.frames, labels, (), true[owners == -1, 0]), true[:24]).mean())
    assert np.mean(errors) < 0.2
    assert max(errors) < 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_method_and_spoilt_ones(kind):
    """Another scene with the same motion gets full marks; what spoils appearance or motion takes the right ones."""
    for number in range(2):
        clip, scene, frames = copied(number, kind)
        full = score(frames, clip, scene)
        assert full["correlation"] > 0.97
        assert full["direction"] > 0.93
        assert full["fidelity"] > 0.88
        assert full["error_px"] < 1.5
        assert (full["color_ok"], full["background_ok"], full["shape_ok"], full["leak"]) == (1, 1, 1, 0)
    still = score(np.repeat(frames[:1], len(frames), axis=0), clip, scene)
    assert abs(still["correlation"]) < 0.05
    assert (still["direction"], still["fidelity"], still["color_ok"]) == (pytest.approx(0, abs=0.01), 0, 1)
    order = np.random.default_rng(0).permutation(len(frames))
    shuffled = score(frames[order], clip, scene)
    for name in ("correlation", "direction", "fidelity"):
        assert shuffled[name] < full[name] - 0.3, name
    assert shuffled["error_px"] > full["error_px"] + 5
    own = score(clip.frames, clip, scene)  # the clip itself: its motion, and its looks
    assert own["correlation"] > 0.97
    assert (own["color_ok"], own["background_ok"], own["leak"]) == (0, 0, bool(clip.objects))


def test_limb_is_followed_beside_its_body():
    """A limb that hangs still from a body that moves well is worth half: bodies and limbs count alike."""
    clip, scene, _ = copied(0, "articulated")
    true, owners = true_tracks(clip)
    assert owners.tolist() == [0, 1, 1]
    stiff = true.copy()
    stiff[1:] = true[1:, :1]
    assert correlation(stiff, true) == pytest.approx([1, 0, 0])
    assert true[0] == pytest.approx(center_of(clip, 0))


def test_noise_and_darkness_are_measured_too():
    clip, scene, frames = copied(1, "camera")
    for pixels in (np.random.default_rng(0).integers(0, 256, frames.shape).astype(np.uint8), np.zeros_like(frames)):
        scores = score(pixels, clip, scene)
        assert all(np.isfinite(scores[name]) for name in ("correlation", "error_px", "direction", "fidelity"))
        assert scores["correlation"] < 0.6
