"""Blocks that visit the device: the same bits, few of them there at a time, and all of them home again."""

import pytest
import torch
from torch import nn

from wan_mini.config import DiTConfig, UMT5Config
from wan_mini.device.offload import BlockStream, resident
from wan_mini.device.select import pick_device
from wan_mini.dit import RECOMPUTE, WanDiT
from wan_mini.umt5 import UMT5Encoder

CPU = torch.device("cpu")
DIT = DiTConfig(dim=48, ffn_dim=96, num_heads=2, num_layers=5, freq_dim=32, text_dim=16, text_len=8)
TEXT = UMT5Config(vocab=50, dim=32, dim_attn=24, dim_ffn=48, num_heads=2, num_layers=4)


def dit_outputs(dit: WanDiT, recompute: str) -> list[torch.Tensor]:
    """Velocity, q and k, and a latent gradient."""
    random = torch.Generator().manual_seed(0)
    where = dit.patch_embedding.weight.device
    x = torch.randn(1, 16, 2, 6, 8, generator=random).to(where).requires_grad_()
    inputs = x, torch.tensor([500.0]), torch.randn(1, 8, 16, generator=random).to(where)
    q, k = dit(*inputs, qk_block=4, recompute=recompute)
    return [dit(*inputs), q, k, *torch.autograd.grad((q * k).sum(), x)]


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_a_dit_in_pieces_is_the_same(recompute):
    """Twice, as a second forward meets what the first one's backward has left."""
    dit = WanDiT(DIT).requires_grad_(False)
    whole, blocks = dit_outputs(dit, "none"), dit.blocks
    with resident(dit, CPU, blocks=False):
        assert not list(dit.blocks.parameters())
        pieces = [*dit_outputs(dit, recompute), *dit_outputs(dit, recompute)]
    assert all(torch.equal(a, b) for a, b in zip([*whole, *whole], pieces, strict=True))
    assert dit.blocks is blocks and all(torch.equal(a, b) for a, b in zip(whole, dit_outputs(dit, "none")))


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_copies_wait_for_what_is_still_read(recompute):
    """Where there is a GPU: one that is late must not have its weights overwritten."""
    dit, device = WanDiT(DIT).requires_grad_(False), pick_device()
    with resident(dit, device):
        whole = dit_outputs(dit, "none")
    with resident(dit, device, blocks=False):
        for _ in range(3):
            if torch.cuda.is_available():
                torch.cuda._sleep(10**8)
            pieces = dit_outputs(dit, recompute)
    for a, b in zip(whole, pieces, strict=True):
        torch.testing.assert_close(a, b)


def test_a_text_encoder_in_pieces_is_the_same():
    encoder, ids = UMT5Encoder(TEXT).requires_grad_(False), torch.arange(6)[None]
    whole = encoder(ids, torch.ones_like(ids))
    with resident(encoder, CPU, blocks=False):
        assert torch.equal(encoder(ids, torch.ones_like(ids)), whole)


def test_blocks_are_home_after_an_error(monkeypatch):
    dit = WanDiT(DIT)
    blocks = dit.blocks
    with pytest.raises(KeyError), resident(dit, CPU, blocks=False):
        raise KeyError
    assert dit.blocks is blocks
    moves = iter([MemoryError, None])  # there, and home
    monkeypatch.setattr(dit, "to", lambda device: (_ for _ in ()).throw(error) if (error := next(moves)) else dit)
    with pytest.raises(MemoryError), resident(dit, CPU, blocks=False):
        pass
    assert dit.blocks is blocks
    with pytest.raises(ValueError, match="load them on the CPU first"):
        BlockStream(WanDiT(DIT).to("meta").blocks, CPU)


@pytest.mark.parametrize(
    ("calls", "ahead"),
    [
        ([0, 1, 2], [1, 2, 3]),  # a forward
        ([0, 1, 2, 3, 2, 1, 0], [1, 2, 3, 4, 1, 0, 1]),  # up to q and k of block 3, and back
        ([4, 0, 1], [None, 1, 2]),  # the next forward
    ],
)
def test_the_next_block_is_on_its_way(calls, ahead):
    """The one at work, the one before it, and the one to come are there, and no others."""
    blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(5))
    stream, last, most = BlockStream(blocks, CPU), 0, []
    copy = stream.copy
    stream.copy = lambda index: (copy(index), most.append(len(stream.there)))
    for call, following in zip(calls, ahead):
        block = stream.fetch(call)
        assert torch.equal(block.weight, blocks[call].weight)
        assert max(most) <= 3
        assert {call, following} <= {*stream.there, None} and stream.there.keys() <= {call, following, last}
        elsewhere = set(range(5)) - set(stream.there)
        assert all(stream.shells[index].weight.is_meta for index in elsewhere)
        last = call
