"""Look into checkpoints: what a folder holds, and where two transformers begin to differ.

python -m wan_mini.inspect FOLDER           what is there, what is missing and where to get it
python -m wan_mini.inspect --compare A B    do two DiT checkpoints compute the same, block by block?
"""

import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan_mini.checkpoint import LOW_NOISE, Checkpoint, Part, read_checkpoint
from wan_mini.errors import MissingFile, UserError
from wan_mini.layouts import SOURCES
from wan_mini.load import build_and_check, build_from_folder, find_tokenizer, load_dit
from wan_mini.runs.cli import Parser, plain_output

TOLERANCE = 1e-5  # of a stage's largest output


def inspect(path: Path) -> bool:
    """Print each part found, broken or missing, from headers alone; True if all are there and fit.

    Raises MissingFile if there is no such path, UserError for a file that cannot be read.
    """
    checkpoint = read_checkpoint(path)
    complete = True
    kinds = [*SOURCES]
    if LOW_NOISE in checkpoint.parts:
        kinds.append(LOW_NOISE)
    for kind in kinds:
        try:
            print(f"[ok]      {kind}: {_describe_kind(checkpoint, kind)}")
        except MissingFile as problem:
            complete = False
            print(f"[missing] {kind}: {problem}")
        except UserError as problem:
            complete = False
            print(f"[broken]  {kind}: {problem}")
    if complete:
        try:
            build_from_folder(checkpoint)
        except UserError as problem:
            complete = False
            print(f"[broken]  together: {problem}")
    return complete


def _describe_kind(checkpoint: Checkpoint, kind: str) -> str:
    if kind == "tokenizer":
        return str(find_tokenizer(checkpoint.path))
    return describe(checkpoint.require(kind))


def describe(part: Part) -> str:
    """One part in one line: naming, dtypes, parameters, size, location. Raises UserError if it is incomplete."""
    module = build_and_check(part)
    dtypes = "/".join(sorted({tensor.dtype for tensor in part.tensors if tensor.key in part.names}))
    parameters = sum(parameter.numel() for parameter in module.parameters())
    size = sum(file.stat().st_size for file in part.files)
    return f"{part.layout.naming} names, {dtypes}, {parameters:,} parameters, {size / 1e9:.2f} GB, {part.location}"


@torch.no_grad()
def stage_outputs(path: str | Path) -> dict[str, Tensor]:
    """{stage: output} of every embedding, block and head of a DiT, in float32, for one seeded random input.

    Raises as load_dit.
    """
    dit = load_dit(path, device="cpu", dtype=torch.float32)
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
            outputs[name] = output

        return hook

    for name, module in dit.named_modules():
        if re.fullmatch(r"\w+_\w+|blocks\.\d+|head", name):  # \w+_\w+: the embeddings and the time projection
            module.register_forward_hook(keep(name))
    random = torch.Generator().manual_seed(0)
    frames, height, width = dit.config.patch_size
    latents = torch.randn(1, dit.config.in_dim, 2 * frames, 4 * height, 6 * width, generator=random)  # 2 x 4 x 6 tokens
    text = torch.randn(1, 7, dit.config.text_dim, generator=random)
    dit(latents, torch.tensor([500.0]), text)
    return outputs


def compare(first: str | Path, second: str | Path) -> bool:
    """Print the difference of two DiT checkpoints stage by stage, up to the first that differs; True if none does.

    Raises UserError if their sizes differ, and as load_dit.
    """
    ours = stage_outputs(first)
    theirs = stage_outputs(second)
    if _shapes(ours) != _shapes(theirs):
        raise UserError(f"{first} and {second} are models of different sizes: compare two of one size")
    for name, output in ours.items():
        error = (output - theirs[name]).abs()
        figures = f"{name:16} max={error.max():.1e} mean={error.mean():.1e}"
        if error.max() > TOLERANCE * output.abs().max():
            print(f"[diff] {figures}")
            print(f"first difference: {name}")
            return False
        print(f"[ok]   {figures}")
    return True


def _shapes(outputs: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: output.shape for name, output in outputs.items()}


@plain_output()
def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 complete or equal, 1 incomplete or different, 2 an error."""
    parser = Parser(prog="python -m wan_mini.inspect", description="Look into Wan 2.1 checkpoints.")
    parser.add_argument("folder", nargs="?", type=Path, help="checkpoint folder or weight file to describe")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two DiT checkpoints to run on the same input")
    options = parser.parse_args(argv)
    if (options.folder is None) == (options.compare is None):
        parser.error("give either a FOLDER or --compare A B")
    try:
        if options.compare:
            good = compare(*options.compare)
        else:
            good = inspect(options.folder)
    except (UserError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
