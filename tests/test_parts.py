"""What tokens show a part of, against tracks and pixels, and the loss that asks for it against its definition."""

import numpy as np
import pytest
import torch
from torch import nn

from wan_mini.tiny.parts import ANSWERS, FIGURES, LATENT, near_sprites, parts_loss, reader, stream_after, true_parts
from wan_mini.tiny.world import COLORS, FRAMES, KINDS, SHAPES, VIVID, make_clip, plan_clip

ROWS, COLUMNS = 8, 12


def seeds_of(kind: str, count: int) -> list[int]:
    return [seed for seed in range(200) if plan_clip(seed).kind == kind][:count]


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_points_at_the_center_of_its_figure(kind):
    """From the token's middle, so many sizes away, lies the center of a sprite of that figure and color."""
    found = 0
    for seed in seeds_of(kind, 6):
        motion, times = plan_clip(seed).motion, [0, 13, FRAMES - 1]
        parts = true_parts(seed, times).reshape(len(times), ROWS, COLUMNS, 5)
        for t, row, column in zip(*np.nonzero(parts[..., 0])):
            number, color, right, down, size = parts[t, row, column]
            names = FIGURES[int(number) - 1], [*COLORS][int(color) - 1]
            at = 16 * (column + 1j * row) + 7.5 + 7.5j + 16 * size * (right + 1j * down)
            same = [s for s in motion.sprites if s.shape is names[0] and s.color == names[1]]
            assert min(abs(s.pose.shift[times[t]] - at) for s in same) < 1e-3
            assert any(abs(abs(s.pose.turn[times[t]]) - 16 * size) < 1e-3 for s in same)
            found += 1
    assert found > 20


def test_tokens_full_of_a_sprite_have_its_part_and_far_ones_none():
    for seed in seeds_of("single", 10):
        clip, (shape, _) = make_clip(seed, frames=[20]), plan_clip(seed).scene.objects[0]
        numbers = true_parts(seed, [20])[0, :, 0].reshape(ROWS, COLUMNS)
        share = (np.ptp(clip.frames[0].astype(int), axis=-1) > VIVID).reshape(ROWS, 16, COLUMNS, 16).mean((1, 3))
        assert (numbers[share > 0.5] == 1 + [*SHAPES].index(shape)).all() and (share > 0.5).any()
        assert not share[numbers == 0].any() or share[numbers == 0].max() < 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_latents_near_sprites_are_those_with_vivid_pixels(kind):
    times, found = [range(1), range(9, 13)], []
    for seed in seeds_of(kind, 4):
        vivid = [np.ptp(make_clip(seed, frames=t).frames.astype(int), axis=-1) > VIVID for t in times]
        share = [v.reshape(len(v), 2 * ROWS, LATENT, 2 * COLUMNS, LATENT).mean((2, 4)).max(0) for v in vivid]
        near, share = near_sprites(seed, times), np.array(share)
        assert near.shape == share.shape == (2, 2 * ROWS, 2 * COLUMNS)
        assert near[share > 0.25].all()
        around = np.pad(share, ((0, 0), (1, 1), (1, 1)), mode="edge")  # each position's, and those beside it
        around = np.lib.stride_tricks.sliding_window_view(around, (3, 3), axis=(1, 2)).max((3, 4))
        assert not near[around == 0].any()
        found.append((share > 0.25).any())
    assert any(found)  # a camera's clip may be without sprites


def test_the_loss_by_hand():
    """Three tokens: a part of figure 2, none, a part of figure 7."""
    guess = torch.randn(1, 3, 1 + 7 + 6 + 3, generator=torch.Generator().manual_seed(0))
    parts = torch.tensor([[[2.0, 3.0, 0.5, -0.5, 1.0], [0] * 5, [7.0, 1.0, 0.0, 1.0, 1.5]]])
    figure, color = guess[0, :, :8].log_softmax(-1), guess[0, :, 8:14].log_softmax(-1)
    off = [(guess[0, n, 14:] - parts[0, n, 2:]).abs().mean() for n in (0, 2)]
    right = figure[0, 2] + figure[2, 7] + color[0, 2] + color[2, 0]
    wanted = -right / 2 + 2 * (off[0] + off[1]) / 2 - 0.5 * figure[1, 0]
    assert parts_loss(guess, parts).item() == pytest.approx(wanted.item(), rel=1e-5)


def answers(parts: torch.Tensor) -> torch.Tensor:
    """The answers of a reader that knows the parts, as ones and zeros and places."""
    figure, color = parts[..., 0].long(), (parts[..., 1].long() - 1).clamp(0)
    return torch.cat([torch.eye(ANSWERS[0])[figure], torch.eye(ANSWERS[1])[color], parts[..., 2:]], dim=-1)


def test_the_truth_costs_nothing():
    parts = torch.from_numpy(true_parts(3, range(4)))
    guess = answers(parts)
    guess[..., :-3] *= 40
    assert parts_loss(guess, parts).item() < 1e-6


def test_a_picture_without_figures_has_a_loss():
    guess = torch.zeros(1, 5, sum(ANSWERS))
    assert parts_loss(guess, torch.zeros(1, 5, 5)).item() == pytest.approx(0.5 * np.log(1 + len(FIGURES)), rel=1e-5)


def test_the_stream_is_what_the_block_passes_on_and_no_hook_stays():
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    with pytest.raises(RuntimeError, match="stop"), stream_after(layer) as streams:
        y = layer(x)
        raise RuntimeError("stop")
    assert len(streams) == 1 and streams[0] is y
    layer(x)
    assert len(streams) == 1 and not layer._forward_hooks


def test_a_reader_can_learn_to_read():
    """A linear layer on channels that hold the parts in some mixture."""
    parts = torch.from_numpy(true_parts(5, range(0, FRAMES, 4)))
    code = answers(parts)
    mixture = code @ torch.randn(code.shape[-1], 24, generator=torch.Generator().manual_seed(0))
    read = reader(24)
    adam = torch.optim.Adam(read.parameters(), 0.05)
    losses = []
    for _ in range(100):
        losses.append(parts_loss(read(mixture), parts))
        losses[-1].backward()
        adam.step()
        adam.zero_grad()
    assert losses[-1] < 0.2 * losses[0]
