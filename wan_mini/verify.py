"""Does a clip come from the start noise of a given seed, key and model?

    python -m wan_mini.verify clip.mp4 --seed 7 --key studio

The clip is encoded and taken back to noise in 25 Euler steps without a text. What comes out is compared with the start
noise: z = <estimate, noise> / |estimate|. If the clip has nothing to do with that noise, z is exactly a standard normal
number, whatever the clip shows, because the noise is; so the false-positive rate is the normal tail, times the number
of offsets tried. A causal VAE encodes the first frame alone and then groups of four: a clip that lost frames is tried
from each of its first four, at every offset, and mirrored.

Exit status: 0 the mark is there, 1 it was not found, 2 an error. Not found is no proof of another origin.
"""

if __name__ == "__main__":
    from wan_mini.runs.interrupt import end_quietly

    end_quietly()

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from wan_mini.config import TIME_STRIDE, TOKEN_SIZE, ClipConfig, latent_frames, latent_shape, valid_frames
from wan_mini.device.select import DTYPES, pick_device, pick_dtype
from wan_mini.dit import WanDiT
from wan_mini.errors import UserError, check_range
from wan_mini.images import MAX_FRAMES
from wan_mini.load import Wan, load_wan
from wan_mini.pipeline import SamplingConfig, encode
from wan_mini.prompts import encode_prompts
from wan_mini.runs.claim import SIZES, believable_size, read_claim
from wan_mini.runs.cli import Parser, add_common_flags, run, seed_number, with_options
from wan_mini.runs.folder import read_preset
from wan_mini.runs.provenance import package_version
from wan_mini.scheduler import FlowEuler
from wan_mini.tiny.demo import CHECKPOINT
from wan_mini.video import MIN_FRAMES, read_video

STEPS = 25
SMALLEST = {"frames": MIN_FRAMES, "height": TOKEN_SIZE, "width": TOKEN_SIZE}  # clip
RATE = 1e-6  # the mark counts as found below this false-positive rate
SEEDS = 1000  # that are tried where none is given


class View(NamedTuple):
    """A way to look at the clip: without its first frames, mirrored or not."""

    skipped: int  # frames, 0 to 3
    mirrored: bool

    def of(self, frames: np.ndarray) -> np.ndarray:
        """Frames (T,H,W,3), of which 4k+1 are left."""
        rest = frames[self.skipped :]
        rest = rest[: valid_frames(len(rest), len(rest))]
        return np.ascontiguousarray(rest[:, :, ::-1]) if self.mirrored else rest


AS_IT_IS = View(0, False)
VIEWS = tuple(View(skipped, mirrored) for mirrored in (False, True) for skipped in range(TIME_STRIDE))


class Match(NamedTuple):
    """How well an estimate agrees with one noise."""

    seed: int
    view: View
    offset: int  # latent frames of the original before the clip's first
    agreement: float  # share of equal signs, 0.5 by chance
    z: float


@torch.no_grad()
def invert(dit: WanDiT, latents: Tensor, text: Tensor, scheduler: FlowEuler) -> Tensor:
    """Clean latents (1,16,F,h,w) back to noise, by the scheduler's steps in reverse -> the start noise, about."""
    sigmas = scheduler.sigmas.tolist()
    for sigma, higher in zip(reversed(sigmas[1:]), reversed(sigmas[:-1]), strict=True):
        velocity = dit(latents, torch.tensor([1000 * sigma]), text)
        latents = latents + (higher - sigma) * velocity
    return latents


def z_score(estimate: Tensor, noise: Tensor) -> float:
    """<estimate, noise> / |estimate|: standard normal for any estimate that does not know the noise, of any shape."""
    estimate = estimate.double()
    length = estimate.norm().item()
    if length == 0:
        return 0.0
    return (estimate * noise.double()).sum().item() / length


def log10_tail(z: float) -> float:
    """log10 of the share of standard normal numbers above z; far out, where erfc underflows, a bound just above it."""
    if z < 30:
        return math.log10(0.5 * math.erfc(z / math.sqrt(2)))
    return -(z * z / 2 + math.log(z * math.sqrt(2 * math.pi))) / math.log(10)


def match(estimate: Tensor, noise: Tensor, seed: int, view: View, offset: int) -> Match:
    """Compare an estimate (1,16,G,h,w) with the frames of noise (1,16,F,h,w) from `offset` on.

    Where the clip does not begin with the original's first frame, its first latent frame stands for one frame and the
    noise's for four: it does not count.
    """
    first = 1 if offset > 0 or view.skipped > 0 else 0
    end = min(estimate.shape[2], noise.shape[2] - offset)
    mine = estimate[:, :, first:end]
    theirs = noise[:, :, offset + first : offset + end]
    agreement = ((mine > 0) == (theirs > 0)).double().mean().item()
    return Match(seed, view, offset, agreement, z_score(mine, theirs))


def offsets(view: View, frames: int) -> range:
    """The offsets, in latent frames, at which a view of a clip may lie in an original of `frames`."""
    least = 1 if view.skipped > 0 else 0
    return range(least, latent_frames(frames) - 1)


class Verifier:
    """Everything about one clip: its views are taken back to noise when they are needed."""

    def __init__(self, wan: Wan, frames: np.ndarray, original: tuple[int, int, int], device: torch.device):
        """frames (T,H,W,3) uint8, of the original's height and width; original: its (frames, height, width)."""
        self.wan = wan
        self.frames = frames
        self.original = original
        self.device = device
        motion = read_preset(wan.folder).get("motion", {})
        own = {"shift": motion["shift"]} if "shift" in motion else {}
        shift = with_options(SamplingConfig(), own, f"{wan.folder}/motion.json: motion").shift
        self.scheduler = FlowEuler(STEPS, shift)
        self.text = encode_prompts(wan, [""], device)[0]

    @torch.no_grad()
    def estimate(self, view: View) -> Tensor:
        """The noise (1,16,G,h,w) that a view of the clip seems to come from."""
        latents = encode(self.wan.vae, view.of(self.frames))  # (T,H,W,3) -> (1,16,G,h,w)
        return invert(self.wan.dit, latents, self.text, self.scheduler).cpu()

    def matches(self, view: View, seeds: Sequence[int], key: str) -> Iterator[Match]:
        """One view against every seed, at every offset."""
        estimate = self.estimate(view)
        shape = latent_shape(*self.original, self.wan.dit.config.in_dim)
        for seed in seeds:
            noise = self.wan.start_noise(shape, seed, key)
            for offset in offsets(view, self.original[0]):
                yield match(estimate, noise, seed, view, offset)

    def best(self, seeds: Sequence[int], key: str, views: Sequence[View] = VIEWS) -> tuple[Match, float]:
        """The best match and log10 of its false-positive rate. A view that settles it ends the search.

        The rate counts all views and offsets, whether they were needed or not.
        """
        views = [view for view in views if len(self.frames) - view.skipped >= MIN_FRAMES]
        tries = len(seeds) * sum(len(offsets(view, self.original[0])) for view in views)
        best: Match | None = None
        for view in views:
            for candidate in self.matches(view, seeds, key):
                if best is None or candidate.z > best.z:
                    best = candidate
            if best is not None and log10_rate(best.z, tries) <= math.log10(RATE):
                break
        assert best is not None
        return best, log10_rate(best.z, tries)


def log10_rate(z: float, tries: int) -> float:
    """log10 of a bound on the chance that any of so many tries gives z or more without the mark."""
    return min(0.0, log10_tail(z) + math.log10(tries))


def parser() -> Parser:
    """The command line."""
    p = Parser(prog="python -m wan_mini.verify", description="Does a clip come from the start noise of a seed and key?")
    p.add_argument("clip", type=Path, metavar="CLIP", help="mp4, GIF, WebP or folder of pictures")
    p.add_argument("--model", type=Path, default=CHECKPOINT, help="the checkpoint that made it (the tiny model)")
    p.add_argument("--seed", type=seed_number, help="of the run (what the clip's metadata says, else a search)")
    p.add_argument("--seeds", type=int, default=SEEDS, help="without any seed, try so many from 0 (%(default)s)")
    p.add_argument("--key", help="of the run (what the metadata says, else none)")
    p.add_argument("--frames", type=int, help="of the original (what the metadata says, else the clip's)")
    p.add_argument("--height", type=int, help="of the original, pixels")
    p.add_argument("--width", type=int, help="of the original, pixels")
    p.add_argument("--quick", action="store_true", help="only as it is: not mirrored, no lost frames")
    p.add_argument("--device", help="cuda, mps or cpu (the best there is)")
    p.add_argument("--dtype", choices=list(DTYPES), help="of transformer and text encoder (by the hardware)")
    add_common_flags(p, f"fastvmt-mini {package_version()}")
    return p


def read_clip(clip: Path, args: Any, claim: dict[str, Any]) -> tuple[np.ndarray, tuple[int, int, int]]:
    """The clip's frames at the original's size, and the original's (frames, height, width).

    args: the flags, which go before the clip's claim. What neither says is the clip's own, whose frames are 4k+1.
    """
    if (args.height is None) != (args.width is None):
        raise UserError("give both --height and --width of the original, or neither")
    given = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    if "frames" in given:
        check_range("frames", given["frames"], MIN_FRAMES, MAX_FRAMES)
        latent_frames(given["frames"])
    ClipConfig(**{**SMALLEST, **given})  # refused before anything is read
    frames = read_video(clip)
    own = dict(zip(SIZES, frames.shape[:3], strict=True))
    original = ClipConfig(**{**own, **believable_size(claim, frames.shape), **given})
    size = (original.height, original.width)
    if size != frames.shape[1:3]:
        frames = read_video(clip, size=size)
    return frames, (original.frames, *size)


def verify(args: Any) -> bool:
    """Print what was found; True if it is the mark."""
    check_range("seeds", args.seeds, 1, 1_000_000)
    claim = read_claim(args.clip)
    seed = claim.get("seed") if args.seed is None else args.seed
    key = claim.get("key", "") if args.key is None else args.key
    device = pick_device(args.device)
    frames, original = read_clip(args.clip, args, claim)
    wan = load_wan(args.model, device=device, dtype=pick_dtype(device, args.dtype), hash_files=False)
    seeds = range(args.seeds) if seed is None else [seed]
    tried = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds 0 to {len(seeds) - 1}"
    size = f"{len(frames)} frames of {frames.shape[2]}x{frames.shape[1]}"
    print(f"{args.clip}: {size}, {wan.name} on {device}, {tried}, {f'key {key!r}' if key else 'no key'}")
    verifier = Verifier(wan, frames, original, device)
    best, rate = verifier.best(seeds, key, [AS_IT_IS] if args.quick else VIEWS)
    print(describe(best, rate))
    return rate <= math.log10(RATE)


def describe(best: Match, rate: float) -> str:
    """One line about the best match; rate: log10."""
    verdict = "this noise" if rate <= math.log10(RATE) else "not found"
    where = f"from its frame {best.view.skipped}, {best.offset} latent frames into the original"
    if best.view.mirrored:
        where += ", mirrored"
    figures = f"agreement {100 * best.agreement:.1f} %, z {best.z:.1f}, false-positive rate 1e{rate:.0f}"
    return f"{verdict}: seed {best.seed}, {figures} ({where})"


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 found, 1 not found, 2 an error."""
    verdicts = []

    def program(words: list[str] | None) -> None:
        verdicts.append(verify(parser().parse_args(words)))

    status = run(program, argv)
    if status != 0:
        return status
    return int(not verdicts[0])


if __name__ == "__main__":
    sys.exit(main())
