"""Weights that are on the device only while they work: the same bits, and the same weights behind it."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from wan_mini.config import DiTConfig, UMT5Config
from wan_mini.device.offload import BlockPrefetcher, HostBlock, lay_out, on_device
from wan_mini.dit import RECOMPUTE, WanDiT
from wan_mini.errors import UserError
from wan_mini.umt5 import UMT5Encoder

CPU, META = torch.device("cpu"), torch.device("meta")
DIT = DiTConfig(dim=48, ffn_dim=96, num_heads=2, num_layers=5, freq_dim=32, text_dim=16, text_len=8)
TEXT = UMT5Config(vocab=50, dim=32, dim_attn=24, dim_ffn=48, num_heads=2, num_layers=4)
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def dit_outputs(dit: WanDiT, recompute: str) -> list[torch.Tensor]:
    """Velocity, q and k, and a latent gradient."""
    random = torch.Generator().manual_seed(0)
    where = dit.patch_embedding.weight.device
    x = torch.randn(1, 16, 2, 6, 8, generator=random).to(where).requires_grad_()
    inputs = x, torch.tensor([500.0]), torch.randn(1, 8, 16, generator=random).to(where)
    q, k = dit(*inputs, qk_block=4, recompute=recompute)
    return [dit(*inputs), q, k, *torch.autograd.grad((q * k).sum(), x)]


def pointers(module: nn.Module) -> list[tuple[int, int]]:
    """Which parameter objects a module has, and where their contents lie."""
    return [(id(weight), weight.data_ptr()) for weight in module.parameters()]


def linear_prefetcher(count: int = 5) -> tuple[nn.ModuleList, BlockPrefetcher]:
    blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(count))
    placeholders = [nn.Linear(3, 3, device="meta") for _ in range(count)]
    return blocks, BlockPrefetcher(blocks, placeholders, CPU)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_offloaded_dit_is_the_same(recompute):
    """Twice, as a second forward meets what the first one's backward has left."""
    dit = WanDiT(DIT).requires_grad_(False)
    expected, blocks = dit_outputs(dit, "none"), dit.blocks
    with on_device(dit, CPU, offload_blocks=True):
        assert not list(dit.blocks.parameters())
        outputs = [*dit_outputs(dit, recompute), *dit_outputs(dit, recompute)]
    for a, b in zip([*expected, *expected], outputs, strict=True):
        assert torch.equal(a, b)
    assert dit.blocks is blocks
    for a, b in zip(expected, dit_outputs(dit, "none"), strict=True):
        assert torch.equal(a, b)


def test_offloaded_text_encoder_is_the_same():
    encoder, ids = UMT5Encoder(TEXT).requires_grad_(False), torch.arange(6)[None]
    expected = encoder(ids, torch.ones_like(ids))
    with on_device(encoder, CPU, offload_blocks=True):
        assert torch.equal(encoder(ids, torch.ones_like(ids)), expected)


@pytest.mark.parametrize("offload_blocks", [False, True])
def test_weights_are_not_copied_back(offload_blocks):
    """From the meta device there is nothing to copy back; and behind the `with`, all is where it was."""
    dit = WanDiT(DIT).bfloat16().requires_grad_(False)
    dit.head.float().requires_grad_(True)
    before = {name: weight.clone() for name, weight in dit.named_parameters()}
    with on_device(dit, META, offload_blocks=offload_blocks):
        assert all(weight.is_meta for weight in dit.parameters())
        assert dit.head.head.weight.requires_grad and not dit.patch_embedding.weight.requires_grad
    for name, weight in dit.named_parameters():
        assert torch.equal(weight, before[name]) and weight.dtype == before[name].dtype
    kept = pointers(dit)
    with pytest.raises(KeyError), on_device(dit, META, offload_blocks=offload_blocks):
        raise KeyError
    assert pointers(dit) == kept  # also after an error, and a packed block is not packed again


def test_all_is_as_before_when_a_device_is_full(monkeypatch):
    dit = WanDiT(DIT)
    blocks, before = dit.blocks, pointers(dit.head)

    def full(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(dit, "load_state_dict", full)
    with pytest.raises(torch.OutOfMemoryError), on_device(dit, CPU, offload_blocks=True):
        raise AssertionError("never runs")
    assert dit.blocks is blocks and pointers(dit.head) == before


def test_blocks_must_be_on_the_host():
    with pytest.raises(UserError, match="must be loaded on the CPU first, got some on meta"):
        BlockPrefetcher(WanDiT(DIT).to("meta").blocks, [], CPU)


@pytest.mark.parametrize(
    ("calls", "ahead"),
    [
        ([0, 1, 2], [1, 2, 3]),  # a forward
        ([0, 1, 2, 3, 2, 1, 0], [1, 2, 3, 4, 1, 0, 1]),  # up to q and k of block 3, and back
        ([4, 0, 1], [None, 1, 2]),  # the next forward
    ],
)
def test_the_next_block_is_prefetched(calls, ahead):
    """The one at work, the one before it, and the one to come are there, and no others."""
    blocks, prefetcher = linear_prefetcher()
    last, most = 0, []
    prefetch = prefetcher.prefetch
    prefetcher.prefetch = lambda index: (prefetch(index), most.append(len(prefetcher.copies)))
    for call, following in zip(calls, ahead):
        block = prefetcher.fetch(call)
        assert torch.equal(block.weight, blocks[call].weight) and torch.equal(block.bias, blocks[call].bias)
        assert max(most) <= 3
        assert {call, following} <= {*prefetcher.copies, None}
        assert prefetcher.copies.keys() <= {call, following, last}
        for index in set(range(5)) - set(prefetcher.copies):
            assert prefetcher.placeholders[index].weight.is_meta
        last = call
    prefetcher.close()
    assert not prefetcher.copies


class FakeStream:
    """A queue of a GPU that only keeps a record of what waits for what."""

    def __init__(self, name: str, log: list[str]):
        self.name, self.log, self.events = name, log, 0

    def wait_stream(self, other: "FakeStream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        self.events += 1
        self.log.append(f"copy {self.events}")
        return f"copy {self.events}"

    def synchronize(self) -> None:
        self.log.append(f"{self.name} is done")


def test_streams_wait_for_each_other(monkeypatch):
    """A copy begins after all work queued before it; work begins after its copy; so does the release of its memory."""
    log: list[str] = []
    main = FakeStream("main", log)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    _, prefetcher = linear_prefetcher()
    prefetcher.stream = FakeStream("side", log)
    make_copy = ["side waits for main", "copy {}"]
    prefetcher.fetch(0)
    expected = [*make_copy, "main waits for copy 1", *make_copy]
    assert log == [line.format(number) for line, number in zip(expected, (1, 1, 1, 2, 2))]
    log.clear()
    prefetcher.fetch(4)  # copy 2 is dropped, and was never fetched
    assert log == ["main waits for copy 2", "side waits for main", "copy 3", "main waits for copy 3"]
    log.clear()
    prefetcher.close()
    assert sorted(log[:-1]) == ["main waits for copy 1", "main waits for copy 3"] and log[-1] == "side is done"


def test_a_block_lies_in_one_buffer_of_its_size():
    block = WanDiT(DIT).blocks[0].bfloat16()
    block.norm3.float()
    before = {name: weight.clone() for name, weight in block.named_parameters()}
    host = HostBlock(block, CPU)
    assert sum(x.nbytes for x in before.values()) <= host.buffer.nbytes
    assert host.buffer.nbytes < sum(x.nbytes for x in before.values()) + 64 * len(before)
    ends = 0
    for name, weight in block.named_parameters():
        segment = host.segments[name]
        assert torch.equal(weight, before[name])
        assert weight.data_ptr() == host.buffer.data_ptr() + segment.start
        assert segment.start % 64 == 0 and segment.start >= ends
        ends = segment.stop
    assert HostBlock(block, CPU).buffer.data_ptr() == host.buffer.data_ptr()  # packed once
    block.ffn[0].weight.data = torch.zeros_like(block.ffn[0].weight)  # elsewhere now
    assert HostBlock(block, CPU).buffer.data_ptr() != host.buffer.data_ptr()
    assert block.ffn[0].weight.data_ptr() != 0 and not block.ffn[0].weight.any()


class FakeCudart:
    """Page-locks nothing, and keeps a record."""

    def __init__(self, fail_after: int):
        self.fail_after = fail_after
        self.pinned: dict[int, int] = {}

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:  # noqa: N802 (CUDA's name)
        if len(self.pinned) == self.fail_after:
            return 2  # cudaErrorMemoryAllocation
        self.pinned[pointer] = size
        return 0

    def cudaHostUnregister(self, pointer: int) -> int:  # noqa: N802
        del self.pinned[pointer]
        return 0


def test_pinned_memory_is_exact_and_released(monkeypatch):
    cudart = FakeCudart(fail_after=2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    blocks = WanDiT(DIT).blocks
    cuda = torch.device("cuda")
    hosts = [HostBlock(block, cuda) for block in blocks[:2]]
    needed = max(segment.stop for segment in lay_out(blocks[0]).values())
    assert list(cudart.pinned.values()) == [needed, needed]
    with pytest.raises(UserError, match=r"cannot pin a block of 0.00 GB .*CUDA error 2.: offload parts"):
        HostBlock(blocks[2], cuda)
    for host in hosts:
        host.release()
        host.release()  # twice is once
    assert not cudart.pinned


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_copies_wait_for_what_is_still_read(recompute):
    """Bitwise, with a GPU that is late: no weights may be overwritten before they are used."""
    dit, device = WanDiT(DIT).requires_grad_(False), torch.device("cuda")
    with on_device(dit, device):
        expected = dit_outputs(dit, recompute)
    for _ in range(20):
        with on_device(dit, device, offload_blocks=True):
            torch.cuda._sleep(10**8)
            outputs = dit_outputs(dit, recompute)
            for a, b in zip(expected, outputs, strict=True):
                assert torch.equal(a, b)


@pytest.mark.gpu
@gpu
def test_pinned_memory_on_a_gpu():
    """Pinned inside, pageable and unchanged behind it; three blocks on the device and not all."""
    dit, device = WanDiT(DIT).requires_grad_(False), torch.device("cuda")
    before = [weight.clone() for weight in dit.parameters()]
    block_bytes = HostBlock(dit.blocks[0], CPU).buffer.nbytes
    with on_device(dit, device, offload_blocks=True):
        prefetcher = dit.blocks[0].prefetcher
        assert all(host.buffer.is_pinned() for host in prefetcher.host)
        dit_outputs(dit, "block")
        assert sum(copy.buffer.nbytes for copy in prefetcher.copies.values()) <= 3 * block_bytes
    assert not any(weight.is_pinned() for weight in dit.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, dit.parameters(), strict=True))


@pytest.mark.gpu
@gpu
def test_prefetching_overlaps_with_work():
    """A pass with blocks offloaded takes less than its copies and its work one after the other."""
    config = DiTConfig(dim=2048, ffn_dim=8192, num_heads=16, num_layers=6, text_dim=16, text_len=8)
    device = torch.device("cuda")
    dit = WanDiT(config).bfloat16().requires_grad_(False)
    inputs = torch.randn(1, 16, 8, 60, 104, device=device), torch.tensor([500.0]), torch.randn(1, 8, 16, device=device)

    def seconds(call) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        call()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    with torch.no_grad():
        with on_device(dit, device):
            work = seconds(lambda: dit(*inputs))
        with on_device(dit, device, offload_blocks=True):
            both = seconds(lambda: dit(*inputs))
            buffers = [host.buffer for host in dit.blocks[0].prefetcher.host]
            copies = seconds(lambda: [buffer.to(device, non_blocking=True) for buffer in buffers])
    assert both < 0.9 * (work + copies)
