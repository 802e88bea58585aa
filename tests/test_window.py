"""Window and dense AMF against each other, and on motions whose flow is known exactly; test_twins.py has the loops."""

import pytest
import torch
from naive import naive

import window
from benchmarks.speed.measure import logged_peak
from window import dense_amf, frame_pairs, tile_centers, window_keys, windowed_amf

loops = naive("07_tiles_and_windows")


def random_qk(grid, heads=2, width=4, dtype=torch.float64):
    shape = (1, grid[0] * grid[1] * grid[2], heads, width)
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(2))


def gradients(flow, q, k):
    """Gradients of a fixed random projection of the flow."""
    probe = torch.randn(flow.shape, generator=torch.Generator().manual_seed(1), dtype=flow.dtype)
    return torch.autograd.grad((flow * probe).sum(), (q, k), retain_graph=True)


def assert_same(ours, other, q, k):
    torch.testing.assert_close(ours, other, rtol=0, atol=1e-11)
    for a, b in zip(gradients(ours, q, k), gradients(other, q, k)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_pairs():
    assert set(frame_pairs(4, 2)) == {(0, 1), (1, 2), (2, 3), (0, 2), (1, 3)}
    assert len(frame_pairs(21, 4)) == 74
    everything = {(i, j) for i in range(21) for j in range(i + 1, 21)}
    assert set(frame_pairs(21, 20)) == set(frame_pairs(21, 99)) == everything and len(everything) == 210
    with pytest.raises(ValueError, match="at least 2 latent frames"):
        frame_pairs(1, 4)


@pytest.mark.parametrize("grid", [(3, 3, 8), (3, 5, 7), (4, 2, 9)])  # tiles divide, do not, are taller than it
def test_window_as_large_as_the_frame_is_dense(grid):
    q, k = random_qk(grid)
    pairs = frame_pairs(grid[0], 2)
    flow, _ = windowed_amf(q, k, grid, pairs, window=2 * max(grid))
    assert_same(flow, dense_amf(q, k, grid, pairs), q, k)


def test_any_chunk_size_and_pair_order_gives_the_same(monkeypatch):
    grid = (6, 4, 5)
    q, k = random_qk(grid)
    pairs = frame_pairs(6, 3)
    centers = tile_centers(q, k, grid, pairs)
    flow, windows = windowed_amf(q, k, grid, pairs, window=3, centers=centers)
    for limit in (1, 2 * 20 * 20 * 8):  # one pair a chunk, two pairs a chunk
        monkeypatch.setattr(window, "CHUNK_BYTES", limit)
        assert_same(windowed_amf(q, k, grid, pairs, window=3, centers=centers)[0], flow, q, k)
    order = torch.randperm(len(pairs))
    shuffled = windowed_amf(q, k, grid, [pairs[n] for n in order], window=3, centers=centers[order])
    assert_same(shuffled[0], flow[order], q, k)
    assert torch.equal(shuffled[1], windows[order])


def test_chunks_are_long(monkeypatch):
    """All pairs of one distance go in one call when memory allows; else as many as it does."""
    calls = []

    def function(q, k):
        calls.append((int(q[0, 0, 0]), int(k[0, 0, 0]), len(q)))
        return q

    frames = torch.arange(21.0)[:, None, None]  # features that tell the frame
    window.map_pairs(function, frames, frames, frame_pairs(21, 4))
    assert calls == [(0, 1, 20), (0, 2, 19), (0, 3, 18), (0, 4, 17)]
    calls.clear()
    monkeypatch.setattr(window, "CHUNK_BYTES", 12 * 4)  # one logit of 4 bytes a pair
    window.map_pairs(function, frames, frames, frame_pairs(21, 1))
    assert calls == [(0, 1, 12), (12, 13, 8)]


def shifted_frames(grid, dy, dx, width=96):
    """Two frames of a world of distinct unit features, the second seen from (dy, dx) further up and left; q = k."""
    _, h, w = grid
    world = torch.nn.functional.normalize(torch.randn(h + 2 * abs(dy), w + 2 * abs(dx), width), dim=-1)
    y, x = abs(dy), abs(dx)
    frames = torch.stack([world[y : y + h, x : x + w], world[y - dy : y - dy + h, x - dx : x - dx + w]])
    return frames.reshape(1, 2 * h * w, 1, width)


def stays(grid, dy, dx, tile=(3, 4)):
    """Tokens that are still in frame after the shift, and whose tile's representative is."""
    _, h, w = grid
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    rep_y, rep_x = y // tile[0] * tile[0] + tile[0] // 2, x // tile[1] * tile[1] + tile[1] // 2
    inside = [(a + d >= 0) & (a + d < n) for a, d, n in ((y, dy, h), (x, dx, w), (rep_y, dy, h), (rep_x, dx, w))]
    return (inside[0] & inside[1] & inside[2] & inside[3]).flatten()


@pytest.mark.parametrize("shift", [(0, 0), (2, 3), (-3, 4), (0, 7), (9, -12)])
def test_a_shift_is_recovered_exactly(shift):
    grid = (2, 30, 52)
    q = shifted_frames(grid, *shift)
    flow, _ = windowed_amf(q, q, grid, [(0, 1)], tau=2000.0)
    estimated = flow[0, stays(grid, *shift)]
    assert len(estimated) > 500
    torch.testing.assert_close(estimated, torch.tensor(shift).float().expand_as(estimated), rtol=0, atol=1e-4)


def test_displacement_is_absolute():
    """Against a reference that moves 2 columns, a shift by 0..6 costs 4, 1, 0, 1, 4, 9, 16 a token."""
    from losses import amf_loss

    grid = (2, 30, 52)
    flows = []
    for dx in range(7):
        q = shifted_frames(grid, 0, dx)
        flows.append(windowed_amf(q, q, grid, [(0, 1)], tau=2000.0)[0][:, stays(grid, 0, 6)])
    ladder = [amf_loss(flows[2], flow, [(0, 1)], span=4).item() / flow.shape[1] for flow in flows]
    assert ladder == pytest.approx([4, 1, 0, 1, 4, 9, 16], abs=1e-3)


def test_static_clip():
    """Q = k: no motion. q != k, the same in all frames: the flow to any frame is the flow to the own one."""
    grid = (3, 6, 8)
    frame = torch.nn.functional.normalize(torch.randn(1, 48, 1, 32), dim=-1)
    q = frame.repeat(1, 3, 1, 1)
    assert windowed_amf(q, q, grid, frame_pairs(3, 2), tau=2000.0, window=5)[0].abs().max() < 1e-4
    k = torch.randn(1, 48, 1, 32).repeat(1, 3, 1, 1)
    flow, _ = windowed_amf(q, k, grid, [(0, 0), (0, 1), (1, 2), (0, 2)], window=5)
    torch.testing.assert_close(flow, flow[:1].expand_as(flow))
    assert flow.abs().max() > 0.5


@pytest.mark.parametrize("size", [1, 4, 21, 31, 60])
def test_every_window_is_distinct_keys_in_the_frame_around_its_center(size):
    grid = (1, 30, 52)
    centers = torch.stack(torch.meshgrid(torch.arange(30.0), torch.arange(52.0), indexing="ij"), -1).flatten(0, 1)
    windows = window_keys(centers, grid, size)
    assert windows.shape == (1560, min(size, 30) * min(size, 52))
    assert windows.min() >= 0 and windows.max() < 1560
    assert (windows.sort(-1).values.diff(dim=-1) > 0).all()  # distinct
    assert (windows == torch.arange(1560)[:, None]).any(-1).all()  # holds its center


def test_uniform_attention_points_to_the_middle_of_the_window():
    grid = (2, 6, 8)
    q, k = torch.zeros(1, 96, 2, 4), torch.randn(1, 96, 2, 4)
    flow, windows = windowed_amf(q, k, grid, [(0, 1)], window=3)
    coords = torch.stack([torch.arange(48) // 8, torch.arange(48) % 8], -1).float()
    for p, (tokens, _) in enumerate(loops.tiles_of(grid, (3, 4))):
        middle = coords[windows[0, p]].mean(0)
        torch.testing.assert_close(flow[0, tokens], middle - coords[tokens])


def test_sharp_attention_is_the_argmax_in_the_window():
    grid = (2, 6, 8)
    q, k = random_qk(grid)
    flow, windows = windowed_amf(q, k, grid, [(0, 1)], tau=1e6, window=3)
    for p, (tokens, _) in enumerate(loops.tiles_of(grid, (3, 4))):
        for u in tokens:
            best = max(windows[0, p].tolist(), key=lambda s: loops.flow.logits(q, k, u, 48 + s).item())
            expected = torch.tensor([best // 8 - u // 8, best % 8 - u % 8]).double()
            torch.testing.assert_close(flow[0, u], expected)


def test_gradient_with_centers_held_matches_finite_differences():
    grid = (2, 3, 4)
    q, k = random_qk(grid, heads=1, width=2)
    centers = tile_centers(q, k, grid, [(0, 1)], tile=(2, 2))
    assert torch.autograd.gradcheck(
        lambda q, k: windowed_amf(q, k, grid, [(0, 1)], tile=(2, 2), window=2, centers=centers)[0], (q, k), atol=1e-8
    )


def test_logits_are_the_mean_over_heads():
    """Two heads with the same features weigh as one; averaging q and k over heads first is the other reduction."""
    grid = (2, 4, 4)
    q, k = random_qk(grid, heads=1)
    one = dense_amf(q, k, grid, [(0, 1)])
    torch.testing.assert_close(dense_amf(q.repeat(1, 1, 3, 1), k.repeat(1, 1, 3, 1), grid, [(0, 1)]), one)
    q, k = random_qk(grid, heads=2)
    mean_qk = dense_amf(q.mean(2, keepdim=True), k.mean(2, keepdim=True), grid, [(0, 1)])
    assert (mean_qk - dense_amf(q, k, grid, [(0, 1)])).abs().max() > 0.1


def test_bfloat16_input_is_computed_in_float32():
    grid = (2, 6, 8)
    q, k = random_qk(grid, dtype=torch.bfloat16)
    flow, _ = windowed_amf(q, k, grid, [(0, 1)], window=3)
    torch.testing.assert_close(flow, windowed_amf(q.float(), k.float(), grid, [(0, 1)], window=3)[0], rtol=0, atol=0)


def test_errors_name_what_is_expected():
    q, k = random_qk((2, 3, 4))
    with pytest.raises(ValueError, match=r"must be \(1, 48, heads, width\) for grid \(4, 3, 4\), got \(1, 24, 2, 4\)"):
        dense_amf(q, k, (4, 3, 4), [(0, 1)])
    with pytest.raises(ValueError, match=r"got \(1, 24, 2, 4\) and \(1, 24, 1, 4\)"):
        dense_amf(q, k[:, :, :1], (2, 3, 4), [(0, 1)])
    for pair in ((0, 2), (-1, 0), (5, 6)):
        with pytest.raises(ValueError, match=r"pairs must be frames in 0..1"):
            dense_amf(q, k, (2, 3, 4), [(0, 1), pair])
    with pytest.raises(ValueError, match=r"centers must be \(1, 1, 2\) for tiles \(3, 4\), got \(1, 4, 2\)"):
        windowed_amf(q, k, (2, 3, 4), [(0, 1)], centers=torch.zeros(1, 4, 2))
    with pytest.raises(ValueError, match=r"tile must be at least 1x1 tokens, got \(0, 1\)"):
        tile_centers(q, k, (2, 3, 4), [(0, 1)], tile=(0, 1))
    with pytest.raises(ValueError, match='must be "argmax" or "soft", got \'mean\''):
        tile_centers(q, k, (2, 3, 4), [(0, 1)], kind="mean")
    with pytest.raises(ValueError, match="window must be at least 1 token, got 0"):
        windowed_amf(q, k, (2, 3, 4), [(0, 1)], window=0)


@pytest.mark.parametrize("frames", [5, 17])
def test_memory_stays_under_the_stated_bound(monkeypatch, frames):
    monkeypatch.setattr(window, "CHUNK_BYTES", 2**21)
    grid = (frames, 15, 26)
    q, k = random_qk(grid, dtype=torch.float32)
    pairs = frame_pairs(frames, 4)
    results = {}

    def run():
        flow, results["windows"] = windowed_amf(q, k, grid, pairs, window=7)
        torch.autograd.grad(flow.sum(), (q, k))
        results["flow"] = flow

    peak = logged_peak(run)
    # q, k, the scaled q (which is sorted into tiles), their gradients; the flow and its gradient; the windows
    inputs_and_outputs = 6 * q.nbytes + 2 * results["flow"].nbytes + results["windows"].nbytes
    kept = 4 * len(pairs) * 15 * 28 * 49 + results["windows"].nbytes  # softmax, with the border's copies; coordinates
    assert 2**21 < peak < 4 * 2**21 + inputs_and_outputs + kept
    assert len(pairs) * (15 * 26) ** 2 * 4 > (8 if frames == 17 else 1) * 2**21  # all at once would not fit
