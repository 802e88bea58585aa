"""Measures of quality and motion fidelity, on clips and features whose values are known in closed form."""

import numpy as np
import pytest

from benchmarks.metrics.features import aesthetic, consistency, smoothness, text_similarity
from benchmarks.metrics.fidelity import (
    best_match_fidelity,
    chance_levels,
    det_fidelity,
    jitter_tracks,
    straight_tracks,
)
from benchmarks.metrics.world import (
    background_consistency,
    dynamic_degree,
    jerk,
    quality,
    shown_objects,
    subject_consistency,
    temporal_consistency,
)
from wan_mini.tiny.world import KINDS, fidelity, fidelity_published, label_pixels, make_clip, true_tracks
from wan_mini.tiny.world.motions import Pose
from wan_mini.tiny.world.tracker import track_camera


def turning(frames: int, theta: float) -> np.ndarray:
    """Features (T,2) that turn by theta a frame; their lengths do not matter."""
    angles = theta * np.arange(frames)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.arange(1, frames + 1)[:, None]


def test_consistency_in_closed_form():
    theta = 0.3
    assert consistency(np.ones((5, 4))) == pytest.approx(1)
    assert consistency(turning(6, theta)) == pytest.approx(np.cos(theta))
    t = np.arange(1, 8)
    expected = np.mean((np.cos(t * theta).clip(0) + np.cos(theta)) / 2)  # frame 7 has turned by more than 90 degrees
    assert consistency(turning(8, theta), first=True) == pytest.approx(expected)
    assert consistency(np.eye(4)) == consistency(np.eye(4), first=True) == 0
    assert consistency(turning(3, np.pi)) == 0  # opposite, clipped
    assert consistency(turning(3, np.pi), first=True) == pytest.approx(1 / 4)  # frame 2 is as frame 0


def test_text_and_aesthetic_scores():
    frames, text = turning(3, np.pi / 3), np.array([5.0, 0.0])
    assert text_similarity(frames, text) == pytest.approx((1 + 0.5 - 0.5) / 3)
    assert text_similarity(frames, text, scale=100) == pytest.approx(100 / 3)
    assert aesthetic(frames, np.array([6.0, 0.0]), 4.0) == pytest.approx((6 / 3 + 4) / 10)


def test_smoothness_in_closed_form():
    fade = np.broadcast_to(np.arange(0, 70, 10, dtype=np.uint8)[:, None, None, None], (7, 4, 4, 3))
    assert smoothness(fade) == 1
    off = fade.copy()
    off[1::2] += 6
    assert smoothness(off) == pytest.approx(1 - 6 / 255)
    assert smoothness(off, fade[1::2]) == pytest.approx(1 - 6 / 255)
    last = np.concatenate([fade[:5], np.full_like(fade[:1], 255)])  # of six frames the sixth has no neighbor behind
    assert smoothness(last) == 1


# Fidelity


def test_the_published_form_in_chunks_is_the_worlds(monkeypatch):
    one, other = jitter_tracks(30, 12, 0), jitter_tracks(30, 12, 1)
    assert best_match_fidelity(one, other) == pytest.approx(fidelity_published(one, other))
    monkeypatch.setattr("benchmarks.metrics.fidelity.LIMIT", 7 * 30)
    assert best_match_fidelity(one, other) == pytest.approx(fidelity_published(one, other))
    assert best_match_fidelity(one[:20], other, both=True) == pytest.approx(
        best_match_fidelity(other, one[:20], both=True)
    )


def test_one_direction_does_not_see_missing_motions():
    true = np.array([[1], [1j], [-1]]) * np.arange(5)
    assert best_match_fidelity(true[:1], true, both=True) == pytest.approx((1 + (1 + 0 - 1) / 3) / 2)
    assert best_match_fidelity(true[[1, 0]], true) == pytest.approx(1)  # but the own track does not count
    assert best_match_fidelity(true[[0]], true) == pytest.approx(0)


def test_chance_is_far_above_zero():
    """Jitter against jitter, at the literature's number of frames; straight random tracks match perfectly."""
    one, other = jitter_tracks(3025, 24, 0), jitter_tracks(3025, 24, 1)
    assert best_match_fidelity(one, other) == pytest.approx(0.508, abs=0.01)
    assert best_match_fidelity(one, other, both=True) == pytest.approx(0.508, abs=0.01)
    assert best_match_fidelity(straight_tracks(400, 24, 0), straight_tracks(400, 24, 1)) > 0.999


def test_dets_hybrid():
    """The start counts as one step of T: with it alike all is 1, opposite a T-th of the cosines is lost."""
    size = (10, 20)
    still = np.array([[10 + 5j, 10 + 5j]]) + 1e-9 * np.arange(2)
    assert det_fidelity(still, still, size) == pytest.approx(1, abs=1e-6)
    line = (4 + 2j) + 2 * np.arange(3)[None]
    mean = np.abs(np.subtract.outer([0, 0.1, 0.2], [0, 0.1, 0.2])).mean()
    assert det_fidelity(line, line, size) == pytest.approx((1 + 1 / (1 + mean)) / 2)
    turned = -(4 + 2j) + 2 * np.arange(3)[None]
    shift = 2 * (0.2 + 0.2j)
    far = np.abs(np.subtract.outer([0, 0.1, 0.2], [0, 0.1, 0.2]) - shift).mean()
    assert det_fidelity(turned, line, size) == pytest.approx((1 / 3 + 1 / (1 + far)) / 2)


@pytest.mark.parametrize("kind", KINDS)
def test_chance_levels_of_a_clip(kind):
    clip = make_clip(5, kind)
    levels = dict(chance_levels(clip, 5))
    assert list(levels) == ["chance: tracks of another clip", "chance: jitter"]
    true, _ = true_tracks(clip)
    assert levels["chance: jitter"]["fidelity"] < 0.75 < fidelity(true, true)
    assert set(levels["chance: jitter"]) == {"fidelity", "published", "error_px"}


# The world


@pytest.fixture(scope="module")
def clip():
    return make_clip(3, "single", "train", range(0, 33, 4))  # nine frames


def test_real_clips_are_whole_lively_and_steady(clip):
    measured = quality(clip.frames, clip, clip)
    assert measured["subject"] == 1
    assert measured["temporal"] > 0.99
    assert measured["background"] > 0.98  # but for the shadow
    assert measured["dynamic"] == pytest.approx(1, abs=0.1)
    assert abs(measured["jerk"]) < 1


def test_a_frozen_clip_is_perfect_but_for_its_motion(clip):
    measured = quality(np.repeat(clip.frames[:1], 9, axis=0), clip, clip)
    assert measured["subject"] == measured["smoothness"] == 1
    assert measured["temporal"] == pytest.approx(1) and measured["background"] == pytest.approx(1, abs=1e-3)
    assert measured["dynamic"] < 0.05 and measured["jerk"] < 0


def test_what_turns_into_another_thing_is_seen(clip):
    """In the last four of nine frames the object is another: colors and shapes of all frames together hide it."""
    other = make_clip(4, "single", "train", range(0, 33, 4))
    assert other.objects != clip.objects
    frames = np.concatenate([clip.frames[:5], other.frames[5:]])
    labels = label_pixels(frames)
    shown = shown_objects(frames, labels, clip)
    assert shown[:5] == [clip.objects] * 5 and subject_consistency(shown) == pytest.approx(5 / 9)
    whole = shown_objects(clip.frames, label_pixels(clip.frames), clip)
    steady = temporal_consistency(clip.frames, label_pixels(clip.frames), whole)
    assert temporal_consistency(frames, labels, shown) < steady - 0.05


def test_features_of_temporal_consistency():
    """Two frames of one muted color: with the same object 1; with another one the half that is the objects is lost."""
    frames = np.full((2, 8, 8, 3), 100, dtype=np.uint8)
    labels = np.full((2, 8, 8), -1)
    one, other = (("star", "red"),), (("star", "blue"),)
    assert temporal_consistency(frames, labels, [one, one]) == pytest.approx(1)
    assert temporal_consistency(frames, labels, [one, other]) == pytest.approx(1 / 2)
    frames[1] = 200
    assert temporal_consistency(frames, labels, [one, one]) == pytest.approx(1 / 2)


def test_the_background_moves_with_the_camera():
    """A texture that shifts by 3 pixels a frame: 1 with that camera, and less with a camera at rest."""
    texture = np.random.default_rng(0).integers(80, 120, size=(40, 100), dtype=np.uint8)
    frames = np.stack([texture[:, 20 - 3 * t : 80 - 3 * t] for t in range(4)])[..., None].repeat(3, axis=-1)
    labels = np.full(frames.shape[:3], -1)
    pan = Pose(np.ones(4), 3.0 * np.arange(4) + 0j)
    rest = Pose(np.ones(4), np.zeros(4) + 0j)
    assert background_consistency(frames, labels, pan) == pytest.approx(1, abs=1e-6)
    assert background_consistency(frames, labels, rest) == pytest.approx(1 - 13.3 / 255, abs=0.01)
    darker = frames.copy()
    darker[1:] -= 51
    assert background_consistency(darker, labels, pan) == pytest.approx(0.8, abs=1e-6)
    labels[:, :20] = 0  # only what is background in both frames counts
    frames[:, :20] = 255
    assert background_consistency(frames, labels, pan) == pytest.approx(1, abs=1e-6)


def test_a_real_pan_is_steady():
    clip = make_clip(1, "camera", "train", range(8))
    labels = label_pixels(clip.frames)
    camera = track_camera(clip.frames, labels)
    rest = Pose(np.ones(8), np.zeros(8) + 0j)
    steady = background_consistency(clip.frames, labels, camera)
    assert steady > 0.97 and steady > background_consistency(clip.frames, labels, rest)


def test_jerk_and_dynamic_degree():
    line = np.arange(6) * (2 + 1j) + np.zeros((3, 1))
    assert jerk(line) == 0
    assert jerk(np.arange(6)[None] ** 2) == pytest.approx(2)
    assert dynamic_degree(line, line) == 1 and dynamic_degree(0.5 * line, line) == 0.5
    assert dynamic_degree(0 * line, line) == 0
