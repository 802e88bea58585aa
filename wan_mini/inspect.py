"""Look into checkpoints."""

import re
import sys
from pathlib import Path

import torch
from torch import Tensor

from wan_mini.checkpoint import Part, find_parts
from wan_mini.load import MODULES, SOURCES, build_and_check, find_tokenizer, load_dit, require_part
from wan_mini.runs.cli import Parser


def inspect(path: Path) -> bool:
    """Print each part found, broken or missing, from headers alone; True if all are there and fit."""
    parts, complete = find_parts(path), True
    for kind in SOURCES:
        try:
            facts = describe(require_part(parts, kind, path)) if kind in MODULES else find_tokenizer(path)
            print(f"[ok]      {kind}: {facts}")
        except FileNotFoundError as problem:
            complete = False
            print(f"[missing] {kind}: {problem}")
        except ValueError as problem:
            complete = False
            print(f"[broken]  {kind}: {problem}")
    return complete


def describe(part: Part) -> str:
    """One part in one line. Raises ValueError if it is incomplete."""
    module = build_and_check(part)
    dtypes = "/".join(sorted({entry.dtype for _, entry in part.tensors}))
    parameters = sum(parameter.numel() for parameter in module.parameters())
    size = sum(file.stat().st_size for file in part.files)
    return f"{part.layout.naming} names, {dtypes}, {parameters:,} parameters, {size / 1e9:.2f} GB, {part.where}"


@torch.no_grad()
def trace(path: str | Path) -> dict[str, Tensor]:
    """The output of every embedding, block and head of a DiT, in float32, for one seeded random input."""
    dit = load_dit(path, device="cpu", dtype=torch.float32)
    outputs: dict[str, Tensor] = {}
    for name, module in dit.named_modules():
        if re.fullmatch(r"\w+_\w+|blocks\.\d+|head", name):  # \w+_\w+: the embeddings and the time projection
            module.register_forward_hook(lambda _, __, output, name=name: outputs.update({name: output}))
    random, config = torch.Generator().manual_seed(0), dit.config
    size = [n * p for n, p in zip((2, 4, 6), config.patch_size)]  # a grid of 2 x 4 x 6 tokens
    latents = torch.randn(1, config.in_dim, *size, generator=random)
    dit(latents, torch.tensor([500.0]), torch.randn(1, 7, config.text_dim, generator=random))
    return outputs


def compare(a: str | Path, b: str | Path) -> bool:
    """Print the difference of two DiT checkpoints stage by stage, up to the first that differs; True if none does."""
    ours, theirs = trace(a), trace(b)
    if {name: x.shape for name, x in ours.items()} != {name: x.shape for name, x in theirs.items()}:
        raise ValueError(f"{a} and {b} are models of different sizes")
    for name, x in ours.items():
        error = (x - theirs[name]).abs()
        same = error.max() <= 1e-5 * x.abs().max()
        print(f"[{'ok' if same else 'diff'}]".ljust(6), f"{name:16} max={error.max():.1e} mean={error.mean():.1e}")
        if not same:
            print(f"first difference: {name}")
            return False
    return True


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 complete or equal, 1 incomplete or different, 2 an error."""
    parser = Parser(prog="python -m wan_mini.load", description="Look into Wan 2.1 checkpoints.")
    parser.add_argument("folder", nargs="?", type=Path, help="checkpoint folder or weight file to describe")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two DiT checkpoints to run on the same input")
    options = parser.parse_args(argv)
    if (options.folder is None) == (options.compare is None):
        parser.error("give either a FOLDER or --compare A B")
    try:
        good = compare(*options.compare) if options.compare else inspect(options.folder)
    except (ValueError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
