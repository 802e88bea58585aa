"""From the command line to a request: the flags of every motion-transfer method, and the run that they ask for.

A method comes as callables and a dataclass of options (`Method`). This file never looks into the options, except for
those of sampling, which every method shares.
"""

from argparse import Namespace
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from wan_mini.checkpoint import read_json
from wan_mini.config import ClipConfig, valid_frames, valid_size
from wan_mini.device.memory import Gradient, MemoryPlan, choose_plan
from wan_mini.device.offload import OFFLOAD
from wan_mini.device.parallel import MODES
from wan_mini.device.select import DTYPES, pick_device
from wan_mini.dit import WanDiT
from wan_mini.errors import UserError, check_range
from wan_mini.lora_files import LoraFile, add_lora_flag, parse_loras
from wan_mini.pipeline import SamplingConfig, Transfer
from wan_mini.runs.cli import Parser, add_common_flags, field_names, new_path, parse_pairs, seed_number, with_options
from wan_mini.runs.folder import RECORD, read_preset, remove_states
from wan_mini.runs.label import add_label_flag, label_box
from wan_mini.runs.provenance import package_version
from wan_mini.runs.settings import RUN
from wan_mini.tiny import demo

FLAG_OPTIONS = ("key", "amf", "interval", "steps", "negative", "frames", "height", "width")  # have a flag of their own


def add_no_flags(parser: Parser) -> None:
    """A method without flags of its own."""


def load_preset(folder: Path | None, config: Any) -> tuple[ClipConfig, Any]:
    """A checkpoint folder's own options (motion.json) in place of the defaults, where it has some.

    Raises UserError on a file that holds anything else.
    """
    preset = read_preset(folder)
    clip = with_options(ClipConfig(), preset.get("clip", {}), f"{folder}/motion.json: clip")
    return clip, with_options(config, preset.get("motion", {}), f"{folder}/motion.json: motion")


@dataclass(frozen=True)
class Method:
    """A motion-transfer method as its command line needs it."""

    prog: str  # "fastvmt.py"
    config: SamplingConfig  # its options, at their defaults
    transfer: Callable[..., Transfer]  # as fastvmt.transfer
    gradient: Callable[[Any], Gradient | None]  # of these options: one gradient of the guidance, or None without any
    costs: Callable[[Any, WanDiT, tuple[int, int, int]], list[str]]  # what the guidance costs, in lines for --dry-run
    unguided: Callable[[Any], Any]  # the options without guidance
    resumable: bool = False  # whether transfer takes a journal
    stage: str = "guide"  # under which the memory of its gradient is shown
    add_flags: Callable[[Parser], None] = add_no_flags  # flags of its own
    load_preset: Callable[[Path | None, Any], tuple[ClipConfig, Any]] = load_preset  # a folder's options
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # options by the name that --preset takes
    flags: Mapping[str, Any] = field(default_factory=dict)  # values of its own flags, for run.json


@dataclass(frozen=True)
class Request:
    """One transfer as the command line asks for it."""

    model: Path
    ref: Path
    prompt: str
    seed: int
    clip: ClipConfig
    config: SamplingConfig
    device: torch.device
    dtype: torch.dtype
    offload: str  # one of offload.OFFLOAD
    recompute: str | None  # one of dit.RECOMPUTE; None: the least that fits
    compile: bool
    folder: Path | None  # None: a name of its own
    png: bool
    unguided: bool  # show the same seed without guidance too
    loras: tuple[LoraFile, ...] = ()  # merged into the transformer
    label: str = ""  # drawn on the result's frames


def build_parser(method: Method) -> Parser:
    """The flags; their defaults are the method's and ClipConfig's."""
    config: Any = method.config
    clip = ClipConfig()
    summary = "Generate a video that shows a prompt with the motion of a reference clip."
    parser = Parser(prog=method.prog, description=summary)
    model = parser.add_argument_group("model")
    model.add_argument("--model", type=Path, help="checkpoint folder, any published layout (the tiny model)")
    add_lora_flag(model)
    model.add_argument("--device", help="cuda, mps or cpu (the best there is)")
    model.add_argument("--dtype", choices=list(DTYPES), help="of transformer and text encoder (by the hardware)")
    text = (
        "keep only the part at work on the device, or of its blocks only those at work (none; without a value: parts)"
    )
    model.add_argument("--offload", nargs="?", const="parts", default="none", choices=OFFLOAD, help=text)
    model.add_argument("--memory", type=float, metavar="GB", help="of the GPU: chooses what to offload and recompute")
    model.add_argument("--compile", action="store_true", help="compile the transformer's blocks (slow the first time)")
    text = f"share a run out over the processes of torchrun: {' | '.join(MODES)}"
    model.add_argument("--parallel", choices=MODES, metavar="MODE", help=text)
    content = parser.add_argument_group("clip and prompt")
    content.add_argument("--ref", type=Path, help="mp4, GIF, WebP or folder of pictures (a clip of the tiny world)")
    content.add_argument("--prompt", help=f'what the new video shows ("{demo.target_scene().caption}")')
    content.add_argument("--negative", help="what it should not look like (Wan's default; the tiny model's is empty)")
    content.add_argument("--frames", type=int, help=f"4k+1, at {clip.fps:g} a second ({clip.frames}; tiny 33)")
    content.add_argument("--height", type=int, help=f"pixels, multiple of 16 ({clip.height}; tiny 128)")
    content.add_argument("--width", type=int, help=f"pixels, multiple of 16 ({clip.width}; tiny 192)")
    content.add_argument("--seed", type=seed_number, default=0, help="of the start noise (%(default)s)")
    content.add_argument("--key", help="public text that marks the start noise as yours (none), see wan_mini.verify")
    options = parser.add_argument_group("method")
    if "amf" in field_names(config):
        options.add_argument("--amf", help=f"motion flow: windowed, dense or none ({config.amf})")
        options.add_argument("--interval", type=int, help=f"latent updates per gradient ({config.interval})")
    if method.presets:
        text = "options by name, before those of --set: fast takes less than half of the operations"
        options.add_argument("--preset", choices=list(method.presets), help=text)
    options.add_argument("--steps", type=int, help=f"denoising steps ({config.steps}; tiny 25)")
    names = ", ".join([*field_names(clip), *field_names(config)])
    text = f"any option of ClipConfig or {type(config).__name__}, pairs as lr=0.003,0.002: {names}"
    options.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help=text)
    _add_output_flags(parser)
    method.add_flags(parser)
    add_common_flags(parser, f"fastvmt-mini {package_version()}")
    return parser


def _add_output_flags(parser: Parser) -> None:
    """Where results go, and runs that are not one new one from the start."""
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=new_path, help="new folder for the run (outputs/ and the time)")
    add_label_flag(output)
    output.add_argument("--png", action="store_true", help="write the frames as PNG too")
    output.add_argument(
        "--unguided", action="store_true", help="show the same seed without guidance too (always with the tiny model)"
    )
    output.add_argument("--jobs", type=Path, metavar="FILE", help="do many runs, one a line of JSON (runs/jobs.py)")
    text = "only decode a run's latents.safetensors; takes --model, --ref, --out, --png and --set vae_tile"
    output.add_argument("--decode", type=Path, metavar="LATENTS", help=text)
    text = "go on with a run that was stopped or killed, from its folder; takes --model, --ref, --device, --offload"
    output.add_argument("--resume", type=Path, metavar="RUN", help=text)
    output.add_argument("--dry-run", action="store_true", help="print sizes, costs and memory; load no weights")


def apply_flags(args: Namespace, clip: ClipConfig, config: Any) -> tuple[ClipConfig, Any]:
    """Both configs with what the command line changes. Sizes are rounded with a note."""
    flags = {}
    for name in FLAG_OPTIONS:
        if getattr(args, name, None) is not None:
            flags[name] = getattr(args, name)
    options = parse_pairs(args.set)
    twice = sorted(flags.keys() & options.keys())
    if twice:
        raise UserError(f"{', '.join(twice)} given twice, by a flag and by --set: keep one")
    of_clip: dict[str, Any] = {}
    of_method: dict[str, Any] = {}
    for name, value in (flags | options).items():
        if name in field_names(clip):
            of_clip[name] = value
        elif name in field_names(config):
            of_method[name] = value
        else:
            raise UserError(f"--set needs one of {', '.join([*field_names(clip), *field_names(config)])}, got {name}")
    return round_sizes(with_options(clip, of_clip, "--set")), with_options(config, of_method, "--set")


def round_sizes(clip: ClipConfig) -> ClipConfig:
    """Height and width cut down to whole tokens, frames to the nearest 4k+1; a change is printed."""
    height, width = valid_size((clip.height, clip.width))
    check_range("frames", clip.frames, 5)  # two latent frames, or nothing moves
    rounded = replace(clip, height=height, width=width, frames=valid_frames(clip.frames))
    for name in ("height", "width", "frames"):
        if getattr(rounded, name) != getattr(clip, name):
            print(f"note: {name} {getattr(clip, name)} becomes {getattr(rounded, name)}")
    return rounded


def request_of(
    args: Namespace,
    clip: ClipConfig,
    config: Any,
    device: torch.device,
    dtype: torch.dtype,
    plans: Callable[[], list[MemoryPlan]],
) -> Request:
    """The run that the command line asks for. Raises UserError on what cannot be run, before anything is loaded."""
    offload = args.offload
    recompute = None
    if args.memory is not None:
        if offload != "none":
            raise UserError(f"--memory chooses what to offload, got --offload {offload} too: keep one")
        plan = choose_plan(plans(), args.memory)
        offload, recompute = plan.offload, plan.recompute
        limit = f"at most {plan.peak:.1f} GB, to {plan.largest_stage}"
        print(f"memory: --offload {offload}, recompute {recompute}; {limit}")
    if args.compile and offload == "blocks":
        raise UserError("--compile needs blocks that stay on the device, got --offload blocks (or --memory chose it)")
    model, ref, prompt = args.model, args.ref, args.prompt
    if model is None:
        model = demo.CHECKPOINT
        ref = demo.REFERENCE if ref is None else ref
        prompt = demo.target_scene().caption if prompt is None else prompt
    if ref is None or prompt is None:
        raise UserError("a transfer needs --ref CLIP and --prompt TEXT (see --help)")
    label_box(args.label, clip.height, clip.width)  # refused now, not after the run
    if not prompt.strip():
        print("note: the prompt is empty, so the model chooses what the video shows")
    return Request(
        model=model,
        ref=ref,
        prompt=prompt,
        seed=args.seed,
        clip=clip,
        config=config,
        device=device,
        dtype=dtype,
        offload=offload,
        recompute=recompute,
        compile=args.compile,
        folder=args.out,
        png=args.png,
        unguided=args.unguided or args.model is None,
        loras=parse_loras(args.lora, model),
        label=args.label,
    )


def resumed_request(args: Namespace, method: Method, given: Collection[str]) -> Request | None:
    """The run in the folder that --resume names, as its run.json tells; None if it is finished.

    Raises UserError on a folder without a run of this method.
    """
    folder = args.resume
    record = read_json(folder / RECORD, RUN)
    source = f"{folder}/{RECORD}"
    if record.get("program") != method.prog:
        got = f"one of {record.get('program')}, which has computed nothing"
        raise UserError(f"--resume needs a run of {method.prog}, got {source} with {got}: start a new run")
    if record.get("status") == "finished":
        remove_states(folder)
        return None
    try:
        clip = with_options(ClipConfig(), record["clip"], f"{source}: clip")
        label_box(record["label"], clip.height, clip.width)
        return Request(
            model=args.model or Path(record["model"]),
            ref=args.ref or Path(record["ref"]),
            prompt=str(record["prompt"]),
            seed=int(record["seed"]),
            clip=clip,
            config=with_options(method.config, record["config"], f"{source}: config"),
            device=pick_device(args.device or record["device"]),
            dtype=DTYPES[record["dtype"].removeprefix("torch.")],
            offload=args.offload if "offload" in given else str(record["offload"]),
            recompute=record.get("recompute"),
            compile=bool(record["compile"]),
            folder=folder,
            png=bool(record["png"]),
            unguided=bool(record["unguided"]),
            loras=parse_loras(record["loras"], Path(record["model"])),
            label=str(record["label"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise UserError(f"{source} is no record of a run ({problem}): start a new run") from None
