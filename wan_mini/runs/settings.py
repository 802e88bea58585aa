"""What a run's own files may hold, as schemas of json_file.py: they come from folders that anybody can have changed."""

from wan_mini.config import MAX_FPS, MAX_SIDE, MAX_TOKENS, TOKEN_SIZE
from wan_mini.device.offload import OFFLOAD
from wan_mini.dit import RECOMPUTE
from wan_mini.json_file import anything, array, boolean, choice, integer, mapping, number, optional, record, text
from wan_mini.noise import SEEDS
from wan_mini.scheduler import MAX_STEPS

PATH = text(10_000)
WORDS = text(1_000_000)
SIDE = integer(TOKEN_SIZE, MAX_SIDE)
FPS = number(0, MAX_FPS)
CLIP = record(
    {"height": SIDE, "width": SIDE, "frames": integer(1, MAX_TOKENS), "fps": FPS},
    required=("height", "width", "frames", "fps"),
)
COST = record({"seconds": optional(number(0)), "peak_gb": optional(number(0))}, required=("seconds", "peak_gb"))

# Settings and costs of a run: run.json, and the metadata of latents and states. Options are checked by their config.
RUN = record(
    {
        "status": text(100),
        "program": text(200),
        "model": PATH,
        "ref": PATH,
        "save": optional(PATH),
        "load": optional(PATH),
        "ref_sha256": text(100),
        "ref_prompt": optional(WORDS),
        "prompt": WORDS,
        "seed": integer(*SEEDS),
        "loras": array(PATH, 1000),
        "label": text(1000),
        "device": text(100),
        "dtype": text(100),
        "offload": choice(*OFFLOAD),
        "recompute": optional(choice(*RECOMPUTE)),
        "compile": boolean,
        "png": boolean,
        "unguided": boolean,
        "clip": CLIP,
        "fps": FPS,
        "config": mapping(anything, 1000),
        "stages": mapping(COST, 1000),
        "losses": array(array(number(), 100_000), 10_000),
    }
)

# The step that a run has reached, beside its tensors.
STATE = record(
    {"step": integer(0, MAX_STEPS), "history": mapping(anything, 100), "checkpoint_sha256": mapping(text(100))},
    required=("step", "history", "checkpoint_sha256"),
)
