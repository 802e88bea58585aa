"""What a run of wan_mini.generate is to make: its options, and all else that its latents depend on."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from wan_mini.config import ClipConfig
from wan_mini.device.select import DTYPES
from wan_mini.errors import UserError, check_choice, check_positive, check_range
from wan_mini.experts import A14B
from wan_mini.lora_files import LoraFile, parse_loras
from wan_mini.pipeline import check_vae_tile
from wan_mini.prompts import NEGATIVE
from wan_mini.runs.cli import field_names, with_options
from wan_mini.runs.folder import read_preset
from wan_mini.runs.provenance import GENERATED
from wan_mini.scheduler import MAX_STEPS, FlowEuler, FlowUniPC

PROGRAM = "-m wan_mini.generate"
SAMPLERS = {"unipc": FlowUniPC, "euler": FlowEuler}


@dataclass(frozen=True)
class GenerateConfig:
    """The options of text-to-video; defaults are the official README's for 1.3B."""

    steps: int = 50
    sampler: str = "unipc"
    shift: float = 8.0  # of the noise levels; 5 for 14B
    cfg: float = 6.0  # scale of classifier-free guidance; 5 for 14B
    negative: str = NEGATIVE  # prompt that classifier-free guidance leads away from
    vae_tile: int | None = None  # pixels, multiple of 32: decode in tiles, less memory, not quite the same
    key: str = ""  # of the start noise, public text (noise.py); "": none

    def __post_init__(self) -> None:
        check_range("steps", self.steps, 1, MAX_STEPS)
        check_choice("sampler", self.sampler, SAMPLERS)
        check_positive("shift", self.shift)
        check_range("cfg", self.cfg)
        check_vae_tile(self.vae_tile)


def preset(name: str, folder: Path) -> GenerateConfig:
    """The options that suit a model: its checkpoint's own (motion.json), else the official README's."""
    motion = read_preset(folder).get("motion", {})
    own: dict[str, Any] = {}
    for option in ("shift", "cfg", "negative"):
        if option in motion:
            own[option] = motion[option]
    published = GenerateConfig()
    if name == "Wan2.1-T2V-14B":
        published = GenerateConfig(shift=5.0, cfg=5.0)
    if name == A14B:
        published = GenerateConfig(shift=12.0, cfg=4.0)  # officially 3 below the boundary
    return with_options(published, own, f"{folder}/motion.json: motion")


@dataclass(frozen=True)
class Order:
    """What a run is to make: all that its latents depend on beside the weights."""

    prompt: str
    clip: ClipConfig
    config: GenerateConfig
    seed: int
    dtype: torch.dtype
    loras: Sequence[LoraFile]
    label: str

    def settings(self, name: str) -> dict[str, Any]:
        """What is kept beside the latents and in every file's metadata; name: the model's."""
        return {
            **GENERATED,
            "program": PROGRAM,
            "model": name,
            "prompt": self.prompt,
            "seed": self.seed,
            "dtype": str(self.dtype).removeprefix("torch."),
            **asdict(self.config),
            **asdict(self.clip),
            "loras": [str(lora) for lora in self.loras],
            "label": self.label,
        }


def order_of(settings: Mapping[str, Any], source: Path, model: Path) -> Order:
    """The order whose settings a run has kept in the file `source`; model: its checkpoint, for its LoRA files.

    Raises UserError if they are none.
    """
    try:
        if settings["program"] != PROGRAM:
            raise UserError(f"{source} is of {settings['program']}: start a new run")
        clip = {name: settings[name] for name in field_names(ClipConfig())}
        config = {name: settings[name] for name in field_names(GenerateConfig())}
        return Order(
            prompt=str(settings["prompt"]),
            clip=with_options(ClipConfig(), clip, str(source)),
            config=with_options(GenerateConfig(), config, str(source)),
            seed=int(settings["seed"]),
            dtype=DTYPES[settings["dtype"]],
            loras=parse_loras(settings["loras"], model),
            label=str(settings["label"]),
        )
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as problem:
        raise UserError(f"{source} is no run's state ({problem}): start a new run") from None
