"""Options of the training methods for the tiny model, beside those of its motion.json."""

from pathlib import Path
from typing import Any

from wan_mini.config import ClipConfig
from wan_mini.pipeline import SamplingConfig
from wan_mini.runs.cli import field_names, with_options
from wan_mini.runs.folder import read_preset

# The shift of the noise levels matters most: a clip's paths are decided at high noise. MotionInversion's and
# MotionDirector's were chosen by benchmarks/tuning.py on training clips, the others are starting values.
TINY: dict[str, dict[str, Any]] = {
    "fym": {
        "fit_steps": (200, 200),
        "fit_lr": (1e-2, 1e-2),
        "fit_decay": (0.0, 0.0),
        "fit_shift": 12.0,
        "rank": 16,
        "stride": 2,
        "strengths": (0.0, 1.0),
    },
    "motiondirector": {
        "fit_steps": (0, 200),
        "fit_lr": (0.0, 1e-2),
        "fit_decay": (0.0, 0.0),
        "fit_shift": 12.0,
        "rank": 16,
        "spatial_share": 0.0,
    },
    "motioninversion": {
        "fit_steps": (0, 200),
        "fit_decay": (0.0, 0.0),
        "fit_shift": 12.0,
        "value": "full",
        "difference": False,
        "debiased": True,
        "adapter_strength": 0.7,
    },
    "det": {
        "fit_steps": (0, 200),
        "fit_lr": (0.0, 1e-3),
        "fit_decay": (0.0, 0.0),
        "fit_shift": 12.0,
        "rank": 16,
    },
}


def load_preset(folder: Path | None, config: Any, name: str) -> tuple[ClipConfig, Any]:
    """A method's options for a checkpoint: sampling as its motion.json says, and then TINY's; else the defaults.

    Raises UserError on a file that holds anything else.
    """
    preset = read_preset(folder)
    clip = with_options(ClipConfig(), preset.get("clip", {}), f"{folder}/motion.json: clip")
    motion = preset.get("motion", {})
    if not motion:
        return clip, config
    sampling = {key: value for key, value in motion.items() if key in field_names(SamplingConfig())}
    config = with_options(config, sampling, f"{folder}/motion.json: motion")
    return clip, with_options(config, TINY[name], f"preset of {name}:")
