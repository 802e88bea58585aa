"""Five defects of the published code (mayuelala/FastVMT at 34a050b), each shown on an input whose answer is known.

What it computes is written anew here from its description in benchmarks/published_code.md. Each test
first shows the defect, then that this repository's code does not have it.
"""

import torch

from losses import window_loss
from window import frame_pairs, window_keys, windowed_amf

GRID = (2, 30, 52)  # two frames of 480 x 832 pixels
WINDOW = 21
CORNER = torch.tensor([[1.0, 2.0]])  # the center of a corner tile's window


def features(shift: int) -> torch.Tensor:
    """Random features of a frame and of the same frame moved by `shift` columns: (1,2*S,1,64)."""
    frame = torch.randn(30, 52, 64, generator=torch.Generator().manual_seed(0))
    moved = frame.roll(shift, dims=1)
    return torch.cat([frame, moved]).reshape(1, -1, 1, 64)


def inner_flow(shift: int) -> torch.Tensor:
    """Mean column displacement and mean column inside the window, over tokens whose windows fit into the frame."""
    x = features(shift)
    flow, windows = windowed_amf(x, x, GRID, [(0, 1)], tau=20.0)
    columns = flow[0, :, 1].reshape(10, 3, 13, 4)  # (S,) -> (tile rows, 3, tile columns, 4)
    window_left = windows[0, :, 0].reshape(10, 13) % 52
    tile_left = 4 * torch.arange(13)
    inside = columns - (window_left - tile_left)[:, None, :, None]  # without the window's own displacement
    return torch.stack([columns[:, :, 4:9].mean(), inside[:, :, 4:9].mean()])


def test_1_heads_are_averaged_over_tokens_instead():
    """models/wan_video_dit.py:178. Each entry names its token and its head; one slot must name one token."""
    named = torch.stack(torch.meshgrid(torch.arange(6.0), torch.arange(3.0), indexing="ij"), -1)[None]  # (1,N,M,2)
    token, head = named.reshape(1, 2, 3, 6).mean(2).reshape(6, 2)[1]
    assert (token, head) == (1, 1)  # slot 1: tokens 0, 1, 2 of head 1
    assert named.mean(2)[0, 1].tolist() == [1, 1] and named.mean(2)[0, 2].tolist() == [2, 1]  # slot n: token n
    assert named.reshape(1, 2, 3, 6).mean(2).reshape(6, 2)[2].tolist() == [1, 2]  # slot 2 names token 1, head 2


def test_2_a_corner_window_has_6_keys_of_441():
    """pipelines/wan_video.py:414-417. Entries are clamped, with the bounds of a center."""
    offsets = torch.cartesian_prod(torch.arange(-10, 11), torch.arange(-10, 11))
    entries = CORNER.long() + offsets
    clamped = entries.clamp(min=torch.tensor([10, 10]), max=torch.tensor([19, 41]))
    assert len(clamped.unique(dim=0)) == 6
    assert len(window_keys(CORNER, GRID, WINDOW).unique()) == WINDOW**2


def test_3_a_translation_is_invisible():
    """pipelines/wan_video.py:436-442. The position inside the window does not depend on the motion; ours does."""
    still, moved = inner_flow(0), inner_flow(5)
    assert (still[1] - moved[1]).abs() < 0.1
    assert (moved[0] - still[0] - 5).abs() < 0.1


def test_4_every_other_coordinate_is_zero():
    """pipelines/wan_video.py:529-531. The mean position of equal attention is the window's middle, 10, not 5."""
    coordinates = torch.cartesian_prod(torch.arange(21.0), torch.arange(21.0))  # (441,2)
    halved = coordinates * (torch.arange(441) % 2 == 0)[:, None]
    assert coordinates.mean(0).tolist() == [10, 10] and (halved.mean(0) < 5.1).all()
    x = torch.zeros(1, 2 * 30 * 52, 1, 4)  # equal attention to all keys
    flow, _ = windowed_amf(x, x, GRID, [(0, 1)], window=WINDOW, centers=torch.tensor([15.0, 26.0]).expand(1, 130, 2))
    torch.testing.assert_close(flow[0, 0], torch.tensor([15.0, 26.0]))  # token 0, at row 0 and column 0


def test_5_the_window_loss_averages_channels():
    """pipelines/wan_video.py:426. Keys in another order are the same window; its mean must not notice."""
    generator = torch.Generator().manual_seed(0)
    content = torch.randn(48, 16, generator=generator)
    shuffled = [content[torch.randperm(48, generator=generator)] for _ in range(5)]
    channel_means = torch.stack([frame.mean(1) for frame in shuffled])  # (5,48), what the published code compares
    assert channel_means.diff(dim=0).norm(dim=1).min() > 0.1
    pairs = frame_pairs(5, 4)
    whole = torch.arange(48).expand(len(pairs), 1, 48)
    assert window_loss(torch.cat(shuffled)[None, :, None], (5, 6, 8), pairs, whole) < 1e-9


def test_latents_in_bfloat16_do_not_move():
    """A sixth, of precision: an update of 0.003 is lost on every value of 1 or more."""
    assert torch.tensor(1.5, dtype=torch.bfloat16) + 0.003 == 1.5
