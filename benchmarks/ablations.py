"""What parts of the tiny DiT's recipe are worth: one of them changed at a time, for as many steps.

    python -m benchmarks.ablations                                  # all; a stopped run goes on
    python -m benchmarks.ablations --seed 1 --only recipe "rates x 2"
    python -m benchmarks.ablations --show

The steps are the recipe's first ones, on close-ups, where shapes are learned, with the VAE of a finished checkpoint.
A row of the CSV is one training; samples are of scenes that no training draws, and the attribute classifier judges.
"""

import re
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from torch import Tensor

from benchmarks.metrics.closeups import SMALL, Judge, shrink
from benchmarks.metrics.rows import Row, append_rows, check_settings, read_rows
from benchmarks.table1 import settings_of
from wan_mini.config import TINY, TINY_UMT5, DiTConfig
from wan_mini.device.select import DTYPES, pick_device, pick_dtype
from wan_mini.dit import Block, WanDiT
from wan_mini.errors import UserError, check_range
from wan_mini.hashes import sha256_file
from wan_mini.load import Wan, load_vae
from wan_mini.runs.cli import Parser, run
from wan_mini.tiny.demo import CHECKPOINT
from wan_mini.tiny.training import data as training_data
from wan_mini.tiny.training import fast_dit
from wan_mini.tiny.training.data import CLOSEUP, Pool, Sampler
from wan_mini.tiny.training.dit import Example, MakeEncoder, make_example, make_text_encoder, make_tokenizer
from wan_mini.tiny.training.recipe import DIT, Batch, Phase, Recipe, Stream
from wan_mini.tiny.training.trainer import Figures, Items, Job, Trainer
from wan_mini.tiny.training.vae import VAE_FILE
from wan_mini.umt5 import UMT5Encoder

RESULTS = Path(__file__).parent / "results" / "ablations.csv"
MEASURES = (
    "color_ok",
    "background_ok",
    "shape_ok",
    "shape_held_out",
    "limb_ok",
    "wrong_shape",
    "psnr_05",
    "psnr_07",
    "psnr_09",
    "parameters",
    "minutes",
)


@dataclass(frozen=True)
class Ablation:
    """What may differ from the recipe's first phase."""

    dit: DiTConfig = TINY
    items: int = 64  # of a batch
    rate: float = 1.0  # times the recipe's rates
    cached: bool = False  # the same 1,024 close-ups again and again
    small: bool = False  # everything at two thirds of its scale, so that a shape is a matter of fewer tokens
    routed: bool = False  # half of the tokens pass by the blocks between the second and the last
    contrast: float = 0.0  # how much the velocity is pushed away from another item's
    dropout: float = DIT.dropout  # share of captions that are left out
    neighbors: bool = True  # the text encoder's heads look at one neighbor of a word each, else at all words


ABLATIONS = {
    "recipe": Ablation(),
    "text encoder without neighbors": Ablation(neighbors=False),
    "batch of 16": Ablation(items=16),
    "batch of 32": Ablation(items=32),
    "rates x 1/2": Ablation(rate=0.5),
    "rates x 2": Ablation(rate=2.0),
    "1,024 close-ups, cached": Ablation(cached=True),
    "two thirds of the scale": Ablation(small=True),
    "half of the tokens routed past the middle": Ablation(routed=True),
    "contrastive, 0.05": Ablation(contrast=0.05),
    "every caption kept": Ablation(dropout=0.0),
    "4 blocks of width 240": Ablation(dit=replace(TINY, dim=240, ffn_dim=960, num_layers=4)),
    "9 blocks of width 144": Ablation(dit=replace(TINY, dim=144, ffn_dim=576, num_layers=9)),
}


@dataclass(frozen=True)
class Settings:
    """All numbers that a training depends on."""

    ablation: Ablation
    recipe: Recipe


class KeptPool(Pool):
    """Shards that several trainings draw from: nothing is thrown away."""

    def forget(self, stream: Stream, first: int) -> None:
        """Forget nothing; 1,500 steps of 64 close-ups draw from about 100 MB."""


def recipe_of(ablation: Ablation, steps: int) -> Recipe:
    """The recipe's first phase in so many steps, with what the ablation changes; rates fall over the last quarter."""
    closeups = DIT.streams[0]
    if ablation.cached:
        closeups = replace(closeups, window=4, reuse=float(steps * ablation.items))
    return replace(
        DIT,
        streams=(closeups,),
        phases=(Phase(steps, (Batch("closeups", 1, ablation.items),)),),
        muon_lr=ablation.rate * DIT.muon_lr,
        adam_lr=ablation.rate * DIT.adam_lr,
        decay=steps // 4,
        dropout=ablation.dropout,
    )


def ablation_loss(ablation: Ablation, dit: WanDiT, example: Example, rng: Generator, dtype: torch.dtype) -> Tensor:
    """Error of the velocity, less `contrast` times its distance from the velocity of the batch's next item -> ().

    Source of the second term: contrastive flow matching (arXiv 2506.05350).
    """
    level = example.sigma.to(example.clean.device)[:, None, None, None, None]  # (B,) -> (B,1,1,1,1)
    noisy = (1 - level) * example.clean + level * example.noise
    target = example.noise - example.clean
    timestep = 1000 * example.sigma
    if ablation.routed:
        velocity = routed_velocity(dit, noisy, timestep, example.text, rng, dtype)
    else:
        velocity, _ = fast_dit.velocity(dit, noisy, timestep, example.text, dtype)
    loss = F.mse_loss(velocity, target)
    return loss - ablation.contrast * F.mse_loss(velocity, target.roll(1, dims=0))


def routed_velocity(
    dit: WanDiT, latents: Tensor, timestep: Tensor, text: Tensor, rng: Generator, dtype: torch.dtype
) -> Tensor:
    """Velocity as by fast_dit.velocity, but half of the tokens skip the blocks between the second and the last.

    Source: TREAD (arXiv 2501.04765). There each item draws its own tokens; here one draw serves the batch.
    """
    x, time, modulation, text, rope = dit.embed(latents, timestep, text)
    text = text.to(dtype)
    cos, sin = (wave.repeat_interleave(2, -1) for wave in rope)  # (N,1,D/2) -> (N,1,D): one for each channel
    tokens = x.shape[1]
    kept = torch.from_numpy(np.sort(rng.permutation(tokens)[: tokens // 2])).to(x.device)  # (N/2,)
    block_forward = fast_dit.compiled(fast_dit.block_forward, False)
    for index, block in enumerate(dit.blocks):
        assert isinstance(block, Block)
        if 1 < index < len(dit.blocks) - 1:
            some = block_forward(block, x[:, kept], modulation, text, cos[kept], sin[kept])  # (B,N/2,C)
            x = x.index_copy(1, kept, some)
        else:
            x = block_forward(block, x, modulation, text, cos, sin)
    return dit.unpatchify(dit.head(x, time), dit.grid(latents))


def train(ablation: Ablation, steps: int, job: Job, data: Path, model: Path) -> Row:
    """Train as the ablation says, with the VAE of the checkpoint folder `model`, and judge the result."""
    encode_whole = MakeEncoder(model, job.dtype)()

    def encode(frames: np.ndarray) -> np.ndarray:
        return encode_whole(shrink(frames) if ablation.small else frames)

    recipe = recipe_of(ablation, steps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        # Before the DiT, so that all have the same.
        text_encoder = make_text_encoder(TINY_UMT5) if ablation.neighbors else UMT5Encoder(TINY_UMT5).half().float()
        dit = WanDiT(ablation.dit)
    sampler = Sampler(KeptPool(data / ("small" if ablation.small else "whole"), encode), recipe.streams)
    trainer = Trainer("dit", recipe, job, dit, sampler)
    vae = load_vae(model / VAE_FILE, device=job.device, dtype=torch.float32)
    tokenizer = make_tokenizer(job.work / "tokenizer.json", recipe.captions)
    wan = Wan(trainer.ema, vae, text_encoder.requires_grad_(False).to(job.device), tokenizer, "tiny")
    judge = Judge(encode, SMALL if ablation.small else CLOSEUP, job.dtype)

    def loss_of(dit: WanDiT, items: Items, batch: Batch, rng: Generator) -> tuple[Tensor, Figures]:
        example = make_example(items, batch, rng, wan, recipe, job.device)
        return ablation_loss(ablation, dit, example, rng, job.dtype), {}

    trainer.run(loss_of, lambda: judge.report(wan)[1])
    figures, _ = judge.report(wan)  # once more: the training may have ended in an earlier run, which was then stopped
    parameters = sum(weight.numel() for weight in dit.parameters())
    minutes = sum(entry["step_s"] for entry in trainer.losses) / 60
    return {**figures, "parameters": parameters, "minutes": minutes}


def rows_of(args: Namespace, names: Sequence[str], done: set[tuple[str, str]]) -> Iterator[Row]:
    """One row for each ablation whose (seed, name) is not in `done`."""
    device = pick_device(args.device)
    dtype = pick_dtype(device, args.dtype)
    vae, code = sha256_file(args.model / VAE_FILE), sha256_file(Path(training_data.__file__))
    data = args.work / f"data-{vae[:8]}-{code[:8]}"  # latents of one VAE, of scenes chosen in one way
    for name in names:
        if (str(args.seed), name) in done:
            continue
        digest = settings(name, args)
        work = args.work / f"{args.seed}-{re.sub('[^0-9a-z]+', '-', name)}-{digest}"
        work.mkdir(parents=True, exist_ok=True)
        job = Job(work, work, device, dtype, args.seed)
        print(f"{name}: samples in {work}", flush=True)
        head = {"clip": str(args.seed), "kind": "closeups", "method": name, "settings": digest}
        yield {**head, **train(ABLATIONS[name], args.steps, job, data, args.model)}


def settings(name: str, args: Namespace) -> str:
    """Eight letters that differ if what a row depends on does."""
    whole = Settings(ABLATIONS[name], recipe_of(ABLATIONS[name], args.steps))
    return settings_of(whole, {"vae": sha256_file(args.model / VAE_FILE)})


def table(rows: Sequence[Row]) -> str:
    """Means over seeds in Markdown, in the order of ABLATIONS."""
    lines = ["| ablation | seeds | " + " | ".join(MEASURES) + " |", "|---" * (len(MEASURES) + 2) + "|"]
    for name in ABLATIONS:
        group = [row for row in rows if row["method"] == name]
        if group:
            means = [f"{np.mean([row[measure] for row in group]):.4g}" for measure in MEASURES]
            lines.append("| " + " | ".join([name, str(len(group)), *means]) + " |")
    return "\n".join(lines)


def parser() -> Parser:
    """The command line."""
    p = Parser(prog="python -m benchmarks.ablations", description="Parts of the tiny DiT's recipe, changed one by one.")
    p.add_argument("--model", type=Path, default=CHECKPOINT, help="folder with the VAE (the tiny model)")
    p.add_argument("--seed", type=int, default=0, help="of weights and batches (%(default)s)")
    p.add_argument("--steps", type=int, default=1500, help="of each training (%(default)s)")
    p.add_argument("--only", nargs="+", metavar="NAME", help="some ablations (all)")
    p.add_argument("--work", type=Path, default=Path("outputs/ablations"), help="data, states, samples (%(default)s)")
    p.add_argument("--csv", type=Path, default=RESULTS, help="one row a training (%(default)s)")
    p.add_argument("--show", action="store_true", help="run nothing, show what the CSV has")
    p.add_argument("--device", help="cuda, mps or cpu (the best there is)")
    p.add_argument("--dtype", choices=list(DTYPES), help="of products (bfloat16 where that is fast, else float32)")
    return p


def program(argv: list[str] | None = None) -> None:
    """Run what the CSV lacks, and print the table."""
    args = parser().parse_args(argv)
    check_range("--seed", args.seed)
    check_range("--steps", args.steps, 1)
    names = args.only or list(ABLATIONS)
    unknown = sorted(set(names) - ABLATIONS.keys())
    if unknown:
        raise UserError(f"got --only {', '.join(unknown)}: choose from {'; '.join(ABLATIONS)}")
    rows = read_rows(args.csv, MEASURES)
    if not args.show:
        check_settings(rows, {name: settings(name, args) for name in names}, args.csv)
        done = {(row["clip"], row["method"]) for row in rows}
        append_rows(rows_of(args, names, done), args.csv, MEASURES)
    print(table(read_rows(args.csv, MEASURES)))


if __name__ == "__main__":
    raise SystemExit(run(program))
