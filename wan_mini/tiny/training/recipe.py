"""Every number of the recipe, in one place."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Batch:
    """What one step is trained on: items of a stream, how many frames of each, to which size they are cut.

    matching is the weight of the DiT's matching loss, the only auxiliary term.
    """

    stream: str
    frames: int
    items: int
    height: int = 0  # of a crop in pixels, for the VAE; 0: whole frames
    width: int = 0
    matching: float = 0.0


@dataclass(frozen=True)
class Phase:
    """Batches in rotation, one a step, for so many steps."""

    steps: int
    batches: tuple[Batch, ...]


@dataclass(frozen=True)
class Stream:
    """Fresh data in shards: each item is used `reuse` times on average, then new ones replace it."""

    name: str
    items: int  # in a shard
    window: int  # shards that are drawn from at any time
    reuse: float


@dataclass(frozen=True)
class Recipe:
    """How one stage is trained. Rates are Muon's for matrices, Adam's for the rest."""

    streams: tuple[Stream, ...]
    phases: tuple[Phase, ...]
    muon_lr: float
    adam_lr: float
    warmup: int = 100  # steps
    decay: int = 0  # the last so many steps, in which the rates fall linearly to zero
    ema: float = 0.999
    statistics: int = 64  # VAE: training clips that the latents' mean and std are measured on
    noise: float = 0.0  # VAE: latents get noise of 0 to this many standard deviations
    captions: int = 3000  # DiT: of so many training scenes, the tokenizer is made
    dropout: float = 0.1  # DiT: share of captions that are replaced by the empty prompt
    matched: int = 2  # DiT: how many clips of a batch the matching loss is computed on, as it is slow
    samples: int = 4  # clips that each save is judged by; DiT: also 4 times as many pictures; VAE: 3 times at its end

    @property
    def steps(self) -> int:
        """Steps of all phases."""
        return sum(phase.steps for phase in self.phases)


VAE = Recipe(
    streams=(Stream("frames", items=16, window=12, reuse=16),),  # clips of 17 frames, as pixels: several crops of each
    phases=(
        Phase(2000, (Batch("frames", 1, 16, 64, 64),)),
        Phase(600, (Batch("frames", 5, 8, 64, 64),)),
        Phase(1900, (Batch("frames", 17, 3, 64, 64),)),  # a decoder that only saw 5 frames loses 6 dB on 33
        Phase(200, (Batch("frames", 17, 1),)),  # whole frames: the attention in the middle looks at all positions
    ),
    muon_lr=0.02,
    adam_lr=3e-3,
    decay=3000,
    noise=0.3,
)

_CLOSEUPS = Batch("closeups", 1, 64)
_PICTURES = Batch("pictures", 1, 32)
_GROUPS = Batch("groups", 1, 32)
_SHORT = Batch("clips", 3, 16, matching=0.3)
_LONG = Batch("clips", 9, 6, matching=0.3)
DIT = Recipe(
    streams=(
        Stream("closeups", items=256, window=24, reuse=6),  # latents of crops of single frames around one object
        Stream("pictures", items=256, window=24, reuse=6),  # latents of single frames
        Stream("groups", items=256, window=24, reuse=6),  # the same of several objects only, which are learned last
        Stream("clips", items=8, window=60, reuse=8),  # latents of whole clips
    ),
    phases=(
        Phase(3000, (_CLOSEUPS,)),  # shapes, where they are large: whole frames teach them ten times slower
        Phase(4000, (_CLOSEUPS, _PICTURES, _PICTURES)),
        Phase(1300, (_PICTURES, _SHORT)),  # pictures in between, so that shapes stay in the data
        Phase(4500, (_PICTURES, _LONG, _GROUPS, _LONG)),
    ),
    muon_lr=0.02,
    adam_lr=3e-3,
    decay=3000,
    samples=8,
)

NEIGHBORS = (-2, -1, 1, 2)  # of the text encoder: head m of each layer looks at the token at this distance
NEIGHBOR_BIAS = 8.0  # of its logits there; all others have about 1
BLOCK = 3  # of the matching loss: the block that the method reads
TAU = 3.0  # of the matching loss: the factor of its logits
EMPTY = ""  # the prompt that stands for none
SHIFT = 3.0  # of the noise levels, in training and sampling
CFG = 3.0  # guidance scale of the samples


def without_matching(recipe: Recipe) -> Recipe:
    """The same recipe without its auxiliary loss: what flow matching alone teaches."""
    phases = []
    for phase in recipe.phases:
        batches = tuple(replace(batch, matching=0.0) for batch in phase.batches)
        phases.append(replace(phase, batches=batches))
    return replace(recipe, phases=tuple(phases))
