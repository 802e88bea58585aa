"""The noise that a run starts from. It is a mark as well: verify.py finds it again in the finished video.

Without a key it is torch's own for a seed, as ever: any program that starts from torch's CPU generator has the same.
With a key it belongs to (key, model, seed), all of which may be public: nobody else starts from it by accident. Either
way each value is an independent standard normal one, so no video is likelier or less likely than without the mark.
"""

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

SEEDS = (-(2**63), 2**64 - 1)  # the least and the greatest that torch's generator takes


def start_noise(shape: Sequence[int], seed: int, key: str = "", model: str = "") -> Tensor:
    """Standard normal noise of a shape such as (1,16,F,h,w), float32 on the CPU; equal arguments give equal bytes.

    key: public text that names who generates; "" for torch's noise of the seed. model: Wan.name, only with a key.
    """
    if not key:
        return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))
    generator = np.random.Generator(np.random.Philox(key=philox_key(seed, key, model)))
    return torch.from_numpy(generator.standard_normal(tuple(shape), dtype=np.float32))


def philox_key(seed: int, key: str, model: str) -> int:
    """The counter-based generator's 128 bits: the beginning of the SHA-256 of [key, model, seed] as JSON.

    torch's CPU generator would keep 32 of them, of which two keys soon share one.
    """
    identifier = json.dumps([key, model, seed])
    return int.from_bytes(hashlib.sha256(identifier.encode()).digest()[:16], "big")
