"""The text encoder against the official code's golden file."""

import pytest
import torch
from conftest import error, golden, weights

from wan_mini.config import UMT5Config
from wan_mini.errors import UserError
from wan_mini.umt5 import RelativePosition, UMT5Encoder

CONFIG = UMT5Config(vocab=120, dim=64, dim_attn=48, dim_ffn=96, num_heads=4, num_layers=2)


@torch.no_grad()
def test_equals_the_official_code():
    data = golden("t5")
    model = UMT5Encoder(CONFIG)
    model.load_state_dict(weights(data))
    used = data["in/mask"].bool()
    hidden = model(data["in/ids"], data["in/mask"])
    assert used.sum() < used.numel()  # one row is padded
    assert error(hidden[used], data["out/hidden"][used]) < 1e-5


@torch.no_grad()
def test_padding_does_not_change_a_prompt():
    model = UMT5Encoder(CONFIG)
    ids = torch.randint(120, (1, 9))
    padded, mask = torch.zeros(1, 20, dtype=torch.long), torch.zeros(1, 20, dtype=torch.long)
    padded[:, :9], mask[:, :9] = ids, 1
    torch.testing.assert_close(model(padded, mask)[:, :9], model(ids, torch.ones(1, 9)))


def test_buckets_by_hand():
    """32 buckets: 16 a direction, 8 exact, then 8 logarithmic up to distance 128."""
    bucket = RelativePosition(32, 1).bucket(torch.tensor([0, -1, -7, -8, -15, -16, -127, -128, -900, 1, 7, 8, 500]))
    assert bucket.tolist() == [0, 1, 7, 8, 9, 10, 15, 15, 15, 17, 23, 24, 31]


@torch.no_grad()
def test_bfloat16_runs_and_stays_close():
    model = UMT5Encoder(CONFIG)
    ids, mask = torch.randint(120, (2, 7)), torch.ones(2, 7)
    expected = model(ids, mask)
    got = model.bfloat16()(ids, mask)
    assert got.dtype == torch.bfloat16 and 0 < error(got.float(), expected) < 0.05


def test_an_id_outside_the_vocabulary_is_refused():
    with pytest.raises(UserError, match=r"must be in 0..119, got 0..120"):
        UMT5Encoder(CONFIG)(torch.tensor([[0, 120]]), torch.ones(1, 2))
