"""Compiled regions: whole graphs, the same numbers, and nothing compiled again from step to step."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from benchmarks.speed.full_run import random_clip
from benchmarks.speed.random_models import REHEARSAL, named_size, random_wan
from fastvmt import transfer
from wan_mini.device.select import compile_regions

CPU = torch.device("cpu")


@pytest.mark.slow
def test_regions_are_compiled_in_the_first_step_only():
    """A guided run of one step compiles all; one of three steps, with another seed, compiles nothing more."""
    size = named_size(REHEARSAL)
    config = replace(size.motion, steps=1, guidance_fraction=1.0, cfg=3.0)
    longer = replace(config, steps=3, guidance_fraction=0.5)
    wan = random_wan(size, REHEARSAL, CPU, torch.float32)
    clip = random_clip(size)
    expected = transfer(wan, clip, "a ball", config, seed=1).latents
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compile_regions(wan.dit, wan.text_encoder, backend=counter)
    got = transfer(wan, clip, "a ball", config, seed=1).latents
    assert (got - expected).norm() <= 1e-3 * expected.norm()
    compiled = counter.frame_count
    assert compiled >= 6, compiled  # a block and its q and k, with and without a gradient; head; a block of text
    with torch.compiler.set_stance("fail_on_recompile"):
        transfer(wan, clip, "a ball", longer, seed=2)
    assert counter.frame_count == compiled
