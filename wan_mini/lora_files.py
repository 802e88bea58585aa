"""LoRA files of other programs, merged into the transformer's weights while these are loaded.

    weight = weight + strength * alpha / rank * up @ down        # in float32, before the cast
    weight = weight + strength * difference

Three dialects: PEFT's (`diffusion_model.X.lora_A.weight`, `.lora_B.weight`; `transformer.X` with Diffusers' names),
kohya's (`lora_unet_X_with_underscores.lora_down.weight`, `.lora_up.weight`, `.alpha`), and lightx2v's, which adds whole
differences (`X.diff` to a weight, `X.diff_b` to a bias, `X.diff_m` to a modulation). Without an alpha it is the rank.
A key that fits no weight stops the load: a LoRA that is applied in part changes the video and shows nowhere.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wan_mini.checkpoint import WEIGHT_FILES, abbreviate, read_header, read_tensors
from wan_mini.errors import MissingFile, UserError
from wan_mini.layouts import detect, rename

# Names of few-step models: lightx2v, FastWan, CausVid, Self-Forcing, rCM, TurboWan, DMD, AccVideo.
DISTILLED = r"distil|lightx2v|lightning|fast_?wan|causvid|self.?forc|\brcm|turbo|dmd|accvid|(?<![0-9])[1-8].?steps?"
KOHYA = "lora_unet_"
PREFIX = r"^(transformer|base_model\.model|model\.diffusion_model|diffusion_model)\."
KEY = re.compile(r"(.+)\.(lora_A|lora_B|lora_down|lora_up|alpha|diff_b|diff_m|diff)(\.default)?(\.weight)?$")
ROLES = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up"}
OWNERS = {"diff_b": "bias", "diff_m": "modulation"}  # all others belong to a weight


class LoraFile(NamedTuple):
    """A file and how strongly it counts."""

    path: Path
    strength: float = 1.0

    def __str__(self) -> str:
        """As the flag takes it."""
        return f"{self.path.resolve()}:{self.strength}"


@dataclass
class Change:
    """What one file adds to one parameter."""

    source: str  # file and parameter, for messages
    strength: float
    tensors: dict[str, Tensor] = field(default_factory=dict)  # "up", "down", "alpha", "diff"

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises UserError unless it is complete and fits a parameter of this shape."""
        roles = set(self.tensors)
        if roles not in ({"up", "down"}, {"up", "down", "alpha"}, {"diff"}):
            raise UserError(f"{self.source} needs up and down, or a difference, got only {', '.join(sorted(roles))}")
        if "diff" in roles:
            got = tuple(self.tensors["diff"].shape)
        else:
            flat = min(self.tensors["up"].ndim, self.tensors["down"].ndim) < 2
            if flat or self.tensors["down"].shape[0] < 1 or self.tensors.get("alpha", torch.ones(1)).numel() != 1:
                raise UserError(f"{self.source} needs matrices up and down of a rank above 0, and one alpha")
            up, down = self._matrices()
            if up.shape[1] != down.shape[0]:
                raise UserError(f"{self.source} has up {tuple(up.shape)} and down {tuple(down.shape)}, of two ranks")
            columns = torch.Size(shape[1:]).numel()
            got = (up.shape[0], *shape[1:]) if down.shape[1] == columns else (up.shape[0], down.shape[1])
        if got != shape:
            raise UserError(f"{self.source} is for a tensor {got}, and the model's is {shape}: made for another size?")

    def _matrices(self) -> tuple[Tensor, Tensor]:
        """Up (out,rank) and down (rank,in); a convolution's are flattened."""
        return self.tensors["up"].flatten(1), self.tensors["down"].flatten(1)

    def added_to(self, weight: Tensor) -> Tensor:
        """The parameter with the change, float32."""
        if "diff" in self.tensors:
            return weight.float() + self.strength * self.tensors["diff"].float()
        up, down = self._matrices()
        factor = self.strength
        if "alpha" in self.tensors:
            factor *= self.tensors["alpha"].item() / down.shape[0]
        product = up.float() @ down.float()  # (out,rank) x (rank,in) -> (out,in)
        return weight.float() + factor * product.view(weight.shape)


Changes = dict[str, list[Change]]  # {name of a parameter: what is added to it}


def parse_lora(text: str) -> LoraFile:
    """FILE or FILE:STRENGTH. Raises MissingFile if there is no such file, UserError on a strength that is none."""
    path, _, strength = text.rpartition(":")
    lora = LoraFile(Path(text))
    if path and not lora.path.is_file():
        try:
            lora = LoraFile(Path(path), float(strength))
        except ValueError:
            raise UserError(f"--lora needs FILE or FILE:STRENGTH, got {text}") from None
    if not lora.path.is_file():
        raise MissingFile(f"--lora: no file {lora.path}")
    if not -100 <= lora.strength <= 100:
        raise UserError(f"--lora needs a strength from -100 to 100, got {text}")
    return lora


def add_lora_flag(parser: Any) -> None:
    """Add --lora to a parser, or to a group of one."""
    text = "LoRA file to merge into the transformer; may be given more than once"
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[:STRENGTH]", help=text)


def parse_loras(texts: Sequence[str], model: Path) -> tuple[LoraFile, ...]:
    """The files of --lora. A note is printed if one of them, or the model, is known to be distilled."""
    loras = tuple(parse_lora(text) for text in texts)
    for path in (model, *(lora.path for lora in loras)):
        note = distilled_note(path)
        if note:
            print(note)
    return loras


def distilled_note(path: Path) -> str:
    """What to know about a checkpoint or LoRA that is distilled to few steps, by its files' names; "" about others.

    Its weights look like any others, so a name is all there is. Source of the warning: MotionEcho (arXiv 2506.19348).
    """
    names = [path.name]
    if path.is_dir():
        names += sorted(file.name for file in path.rglob("*") if file.suffix in WEIGHT_FILES)
    for name in names:
        if re.search(DISTILLED, name, re.IGNORECASE):
            advice = "give few --steps and a cfg of 1; motion guidance suffers, because its steps are few and large"
            return f"note: {name} seems to be distilled to few steps: {advice}"
    return ""


def read_loras(loras: Sequence[LoraFile], dit: nn.Module) -> Changes:
    """What all files add to the parameters of a DiT (weightless will do). Raises UserError on a key that fits none."""
    shapes = {name: tuple(parameter.shape) for name, parameter in dit.named_parameters()}
    changes: Changes = {}
    for lora in loras:
        of_file: dict[str, Change] = {}
        keys = [header.key for header in read_header(lora.path)[0]]
        targets = targets_of(keys, shapes)
        strange = [key for key in keys if key not in targets]
        if strange or not keys:
            listed = abbreviate(strange) or "no keys"
            raise UserError(f"{lora.path}: {len(strange)} of {len(keys)} keys fit no weight of this model ({listed})")
        for key, tensor in read_tensors(lora.path, keys):
            name, role = targets[key]
            change = of_file.setdefault(name, Change(f"{lora.path}: {name}", lora.strength))
            if role in change.tensors:
                raise UserError(f"{lora.path}: {key} comes a second time")
            change.tensors[role] = tensor.clone()
        for name, change in of_file.items():
            change.check(shapes[name])
            changes.setdefault(name, []).append(change)
    return changes


def targets_of(keys: Iterable[str], parameters: Mapping[str, object]) -> dict[str, tuple[str, str]]:
    """{key: (our name of the parameter, role)} of the keys that fit; role: "up", "down", "alpha" or "diff"."""
    underscored = {}
    for name in parameters:
        module = name.rpartition(".")[0]
        underscored[KOHYA + module.replace(".", "_")] = module
    owners = {}
    roles = {}
    for key in keys:
        match = KEY.fullmatch(key)
        if match is None:
            continue
        module = underscored.get(match[1], re.sub(PREFIX, "", match[1]))
        owners[key] = f"{module}.{OWNERS.get(match[2], 'weight')}"
        role = ROLES.get(match[2], match[2])
        roles[key] = "diff" if match[2] in OWNERS else role
    layout = detect(owners.values())
    if layout is None or layout.part != "dit":
        return {}
    names = rename(layout, owners.values())
    targets = {}
    for key, owner in owners.items():
        if names[owner] in parameters:
            targets[key] = (names[owner], roles[key])
    return targets
