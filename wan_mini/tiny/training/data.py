"""Fresh training data: streams of shards, each made from seeds of the training split when it is needed.

A stream's shard number n holds the clips of seeds n * items, n * items + 1, ...: what a step draws follows from the
seed of the run and the number of samples drawn so far, in any process. Worker processes make shards ahead of
the training; a shard that none has begun is made where it is needed.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator

from wan_mini.tiny.training.recipe import Stream
from wan_mini.tiny.world import FRAMES, Clip, make_clip, true_positions

Shard = dict[str, np.ndarray]
Encoder = Callable[[np.ndarray], np.ndarray]
MakeEncoder = Callable[[], Encoder | None]  # a worker process makes its own; None: items stay pixels
FIRST_SEED = {
    "frames": 0,
    "pictures": 10**8,
    "clips": 2 * 10**8,
    "closeups": 3 * 10**8,
    "groups": 4 * 10**8,
}  # no scene is in two
LENGTH = 17  # frames in an item of the stream "frames"
CLOSEUP = (80, 96)  # height and width in pixels of an item of the stream "closeups"
AHEAD = 6  # shards that workers make beyond a window


def make_shard(stream: Stream, number: int, encode: Encoder | None) -> Shard:
    """The items of one shard: frames or latents, captions, and for clips the true positions for the matching loss."""
    seeds = FIRST_SEED[stream.name] + number * stream.items + np.arange(stream.items)
    clips = []
    for seed in seeds.tolist():
        clips.append(make_clip(seed, _kind_of(stream.name, seed), frames=_frames_of(stream.name, seed)))
    shard = {"seeds": seeds, "caption": np.array([clip.caption for clip in clips])}
    if stream.name == "closeups":
        frames = np.stack([crop_object(clip, seed) for clip, seed in zip(clips, seeds.tolist(), strict=True)])
    else:
        frames = np.stack([clip.frames for clip in clips])
    if encode is None:
        return shard | {"frames": frames}
    shard["latents"] = encode(frames)
    if stream.name == "clips":
        shard["positions"] = np.stack([true_positions(seed) for seed in seeds.tolist()]).astype(np.float16)
    return shard


def crop_object(clip: Clip, seed: int) -> np.ndarray:
    """The part (T,80,96,3) of one object's frames (T,H,W,3) that shows it where the first begins, off center.

    A shape fills a third of it: it weighs more in the loss than in a whole frame, at a third of the tokens.
    """
    rng = np.random.default_rng(seed)
    size = np.array(CLOSEUP)
    room = np.array(clip.frames.shape[1:3]) - size
    center = clip.tracks[:, 0].mean(0) + rng.uniform(-0.15, 0.15, 2) * size  # (points,T,2) -> (2,): of body and limb
    top, left = (center - size / 2).clip(0, room).astype(int)
    return clip.frames[:, top : top + CLOSEUP[0], left : left + CLOSEUP[1]]


def _kind_of(name: str, seed: int) -> str | None:
    """Of which kind an item's clip is, None for any; of close-ups every second one shows a limb."""
    if name == "closeups":
        return ("single", "articulated")[seed % 2]
    return "several" if name == "groups" else None


def _frames_of(name: str, seed: int) -> range:
    """Which frames of its clip an item shows."""
    if name == "clips":
        return range(FRAMES)
    if name in ("pictures", "groups", "closeups"):
        return range(seed % FRAMES, seed % FRAMES + 1)  # not always the first, where motions begin
    start = seed % (FRAMES - LENGTH + 1)
    return range(start, start + LENGTH)


class Pool:
    """The shards of one folder, made on demand and thrown away after use; safe for several processes."""

    def __init__(self, folder: Path, encode: Encoder | None):
        self.folder = folder
        self.encode = encode
        self.open: dict[tuple[str, int], Shard] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def file(self, stream: Stream, number: int) -> Path:
        """Where a shard is, or will be."""
        return self.folder / f"{stream.name}-{number:06}.npz"

    def make(self, stream: Stream, number: int) -> bool:
        """Make a shard unless it is there or another process makes it; whether it is there now."""
        file = self.file(stream, number)
        if file.exists():
            return True
        claim = file.with_suffix(".claim")
        try:
            claim.touch(exist_ok=False)
        except FileExistsError:
            return False
        part = file.with_suffix(f".{os.getpid()}.part")  # another run's worker may still finish the same
        with part.open("wb") as output:
            np.savez(output, **make_shard(stream, number, self.encode))  # type: ignore[arg-type]
        part.replace(file)
        claim.unlink(missing_ok=True)
        return True

    def get(self, stream: Stream, number: int) -> Shard:
        """A shard, waited for if another process makes it."""
        key = (stream.name, number)
        if key not in self.open:
            while not self.make(stream, number):
                time.sleep(0.05)
            with np.load(self.file(stream, number)) as arrays:
                self.open[key] = dict(arrays)
        return self.open[key]

    def forget(self, stream: Stream, first: int) -> None:
        """Drop the shards of a stream before number `first`, from memory and disk."""
        for name, number in list(self.open):
            if name == stream.name and number < first:
                del self.open[name, number]
                self.file(stream, number).unlink(missing_ok=True)


class Sampler:
    """Draws items of all streams; its whole state is the number of items drawn from each."""

    def __init__(self, pool: Pool, streams: Sequence[Stream]):
        self.pool = pool
        self.streams = {stream.name: stream for stream in streams}
        self.drawn = dict.fromkeys(self.streams, 0)

    def first(self, stream: Stream) -> int:
        """The oldest shard in a stream's window."""
        return int(self.drawn[stream.name] / (stream.reuse * stream.items))

    def draw(self, name: str, count: int, rng: Generator) -> list[dict[str, Any]]:
        """`count` items of a stream, each from any shard of its window."""
        stream = self.streams[name]
        items = []
        for _ in range(count):
            shard = self.pool.get(stream, self.first(stream) + int(rng.integers(stream.window)))
            index = int(rng.integers(stream.items))
            items.append({key: values[index] for key, values in shard.items()})
        self.drawn[name] += count
        self.pool.forget(stream, self.first(stream))
        return items

    def publish(self) -> None:
        """Write down where each window is, for the workers."""
        entries = [f"{name}={self.first(stream)}" for name, stream in self.streams.items()]
        part = self.pool.folder / "windows.part"
        part.write_text(" ".join(entries))
        part.replace(self.pool.folder / "windows.txt")


def work_ahead(folder: Path, streams: Sequence[Stream], make_encoder: MakeEncoder) -> None:
    """Make the shards that the windows will need next, for as long as the parent lives."""
    if hasattr(os, "nice"):  # not on Windows
        os.nice(10)
    torch.set_num_threads(1)
    pool = Pool(folder, make_encoder())
    parent = os.getppid()
    while os.getppid() == parent:
        if not make_next(pool, streams):
            time.sleep(0.2)


def make_next(pool: Pool, streams: Sequence[Stream]) -> bool:
    """Make the first missing shard of each stream's window and what follows it; whether any was made."""
    windows = pool.folder / "windows.txt"
    if not windows.exists():
        return False
    first = dict(entry.split("=") for entry in windows.read_text().split())
    busy = False
    for stream in streams:
        start = int(first[stream.name])
        for number in range(start, start + stream.window + AHEAD):
            missing = not pool.file(stream, number).exists()
            if missing and pool.make(stream, number):  # False: the training makes it itself, so the next one is due
                busy = True
                break
    return busy


@contextmanager
def workers(count: int, folder: Path, streams: Sequence[Stream], make_encoder: MakeEncoder) -> Iterator[None]:
    """Let `count` processes work ahead inside the `with`. Claims and windows of an earlier run are void."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in [*folder.glob("*.claim"), *folder.glob("*.part"), *folder.glob("windows.txt")]:
        stale.unlink()
    context = get_context("spawn")  # a GPU does not survive a fork
    processes = [context.Process(target=work_ahead, args=(folder, streams, make_encoder)) for _ in range(count)]
    for process in processes:
        process.daemon = True  # it ends with this one, whatever happens
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.terminate()
