"""The training data: clips, pictures and close-ups, rendered by many processes into a cache on disk."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from tqdm import tqdm

from wan_mini.tiny import world
from wan_mini.tiny.loop import Job, replace_file
from wan_mini.tiny.world import FRAMES, Clip, make_clip

SHARD = 64  # clips in a file of the cache


def cached(
    job: Job,
    name: str,
    clips: int,
    convert: Callable[[np.ndarray], np.ndarray],
    make: Callable[[int], Clip] = make_clip,
) -> tuple[list[np.ndarray], list[str]]:
    """Render training clips and keep what `convert` makes of their frames (n,T,H,W,3): memory-mapped shards.

    Also returns the captions. Shards that are there, from the world as it is, are not made again. Raises SystemExit
    when the time is over.
    """
    sources = b"".join(path.read_bytes() for path in sorted(Path(world.__file__).parent.glob("*.py")))
    folder = job.work / f"{name}-{sha256(sources).hexdigest()[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    ranges = [range(at, min(at + SHARD, clips)) for at in range(0, clips, SHARD)]
    files = {seeds: folder / f"{seeds.start:06}-{seeds.stop:06}.npy" for seeds in ranges}
    missing = [seeds for seeds in ranges if not files[seeds].exists()]
    with ProcessPoolExecutor(job.workers, mp_context=get_context("spawn")) as pool:  # a GPU does not survive a fork
        ahead = pool.map(make, missing[0] if missing else ())
        for seeds, following in tqdm(list(zip(missing, [*missing[1:], ()])), desc=name, unit="shard"):
            clips, ahead = list(ahead), pool.map(make, following)  # rendered while these are converted
            captions = "\n".join(clip.caption for clip in clips)
            files[seeds].with_suffix(".txt").write_text(captions + "\n", encoding="utf-8")
            replace_file(files[seeds], partial(np.save, arr=convert(np.stack([clip.frames for clip in clips]))))
            if time.monotonic() > job.deadline:
                raise SystemExit(f"paused while making {name}: the same command goes on")
    texts = [file.with_suffix(".txt").read_text(encoding="utf-8").splitlines() for file in files.values()]
    return [np.load(file, mmap_mode="r") for file in files.values()], sum(texts, [])


def make_picture(seed: int) -> Clip:
    """One frame of some clip for training, not always its first, where motions begin."""
    return make_clip(seed, frames=[seed % FRAMES])


def make_closeup(seed: int) -> Clip:
    """A quarter of a picture, half as high and wide, somewhere around a sprite if it has one."""
    clip, rng = make_picture(seed), np.random.default_rng(seed)
    size = np.array(clip.frames.shape[1:3]) // 2
    points = clip.tracks[clip.owners >= 0, 0]  # (points,1,2) -> (n,2)
    middle = rng.choice(points) if len(points) else size
    top, left = (middle - size * rng.uniform(0.3, 0.7, 2)).clip(0, size).astype(int)
    return replace(clip, frames=clip.frames[:, top : top + size[0], left : left + size[1]])


def to_videos(frames: np.ndarray, device: torch.device) -> Tensor:
    """Clips (B,T,H,W,3) uint8 -> videos (B,3,T,H,W) in [-1,1], converted on the device."""
    return torch.tensor(frames, device=device).movedim(-1, 1).float() / 127.5 - 1


def crops(rng: Generator, shards: list[np.ndarray], phases: Sequence[tuple], progress: float, batch: int) -> np.ndarray:
    """Random pieces (B,T,h,w,3) of random clips, as large as the phase of this share of the steps wants them.

    Each is the one of 3 in which most changes from first to last frame: on much of a clip nothing moves.
    """
    _, frames, height, width, share = next(phase for phase in phases if progress < phase[0])
    room = np.subtract(shards[0].shape[1:4], (frames, height, width)) + 1
    out = []
    for _ in range(max(1, round(batch * share))):
        some = []
        for _ in range(3):
            shard = shards[rng.integers(len(shards))]
            t, y, x = rng.integers(room)
            some.append(shard[rng.integers(len(shard)), t : t + frames, y : y + height, x : x + width])
        out.append(max(some, key=lambda crop: np.abs(crop[-1].astype(int) - crop[0]).sum()))
    return np.stack(out)
