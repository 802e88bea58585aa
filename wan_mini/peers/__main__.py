"""Other motion-transfer methods, run as fastvmt.py runs FastVMT.

    python -m wan_mini.peers                                       # Follow-Your-Motion, tiny model and bundled clip
    python -m wan_mini.peers --method moft --model Wan2.1-T2V-1.3B --ref clip.mp4 --prompt "a fox runs over a lake"
    python -m wan_mini.peers --method motiondirector --ref clip.mp4 --ref-prompt "a dog runs" --prompt "a fox runs"

A method that trains takes --save dog.safetensors, and later --load dog.safetensors.
"""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from wan_mini.config import ClipConfig
from wan_mini.errors import MissingFile, UserError
from wan_mini.json_file import read_json
from wan_mini.peers import adapted, methods, presets, training_free
from wan_mini.runs.cli import Parser, run
from wan_mini.runs.folder import RECORD
from wan_mini.runs.program import program
from wan_mini.runs.request import Method, build_parser
from wan_mini.tiny import demo

PROG = "python -m wan_mini.peers"
DEFAULT = "fym"
FILES = ("save", "load")  # flags that name one
NAMES = (*methods.METHODS, *training_free.PEERS)


def add_method_flag(parser: Parser) -> None:
    """Add --method."""
    parser.add_argument("--method", choices=NAMES, default=DEFAULT, help="whose options --set reaches (%(default)s)")


def add_training_flags(parser: Parser) -> None:
    """Add --method, and what a method that trains takes."""
    add_method_flag(parser)
    group = parser.add_argument_group("training")
    group.add_argument("--ref-prompt", help="what the reference shows (the tiny world's clip has a caption)")
    group.add_argument("--save", type=Path, metavar="FILE", help="for the adapters; a stopped training goes on there")
    group.add_argument("--load", type=Path, metavar="FILE", help="adapters of an earlier run, instead of training")
    group.add_argument("--check", action="store_true", help="make the reference with its own caption: rebuilt.webp")


def method_named(name: str) -> Method:
    """What the command line needs to know of a method."""
    if name in training_free.PEERS:

        def load_preset(folder: Path | None, config: Any) -> tuple[ClipConfig, Any]:
            return training_free.preset_of(folder, name)

        return Method(
            PROG,
            training_free.PEERS[name].config,
            training_free.transfer,
            training_free.gradient_of,
            training_free.costs,
            training_free.unguided,
            resumable=True,
            add_flags=add_method_flag,
            load_preset=load_preset,
            flags={"method": name},
        )
    return Method(
        PROG,
        methods.METHODS[name].config,
        adapted.transfer,
        methods.gradient_of,
        methods.costs,
        methods.unadapted,
        resumable=True,
        stage="fit",
        add_flags=add_training_flags,
        load_preset=partial(presets.load_preset, name=name),
    )


def caption_of(args: Namespace) -> str:
    """The reference's own caption. Raises UserError if nobody knows it."""
    if args.ref_prompt is not None:
        return str(args.ref_prompt)
    if args.model is None and args.ref is None:
        return demo.reference_clip().caption
    if args.load is not None and not args.check:
        return ""  # nothing is trained or made with it
    raise UserError(f"--method {args.method} needs the reference's own caption: give --ref-prompt TEXT")


def with_training_flags(method: Method, args: Namespace) -> Method:
    """The method with what the command line says of its training. Raises UserError on what cannot be."""
    if args.decode or args.dry_run:
        return method
    if args.compile:
        raise UserError(f"--compile cannot be used with --method {args.method}, which changes layers: leave it out")
    if args.save is not None and args.load is not None:
        raise UserError("--save keeps what is trained and --load trains nothing, got both: keep one")
    if args.save is not None and args.save.exists():
        raise UserError(f"{args.save} is there already: give it to --load, or choose another --save")
    if args.load is not None and not args.load.is_file():
        raise MissingFile(f"{args.load} does not exist: give a file that --save has written")
    flags = {"method": args.method, "ref_prompt": caption_of(args), "check": args.check}
    for name in FILES:
        path = getattr(args, name)
        flags[name] = None if path is None else str(path.resolve())
    return with_flags(method, flags)


def with_flags(method: Method, flags: Mapping[str, Any]) -> Method:
    """The method with the values of add_training_flags' flags, from a command line or from a run.json."""
    options = dict(flags)
    del options["method"]
    for name in FILES:
        options[name] = None if flags[name] is None else Path(flags[name])
    return replace(method, transfer=partial(method.transfer, **options), flags=flags)


def resumed_method(record: Mapping[str, Any]) -> Method:
    """The method of the run whose run.json this is, with its flags. A run of another program is refused later."""
    name = record.get("method", DEFAULT)
    if name not in NAMES:
        raise UserError(f"--resume needs a run of one of {', '.join(NAMES)}, got {name}: start a new run")
    method = method_named(name)
    flags = {flag: record.get(flag) for flag in ("method", "ref_prompt", "check", *FILES)}
    return method if name in training_free.PEERS else with_flags(method, flags)


def run_method(argv: list[str] | None = None) -> None:
    """Do what the command line asks of the method that it names, or of the run that it goes on with."""
    first = Parser(prog=PROG, add_help=False, allow_abbrev=False)
    add_method_flag(first)
    first.add_argument("--resume", type=Path)
    args, _ = first.parse_known_args(argv)
    if args.resume is not None:
        method = resumed_method(read_json(args.resume / RECORD))
    else:
        method = method_named(args.method)
        if args.method in methods.METHODS:
            method = with_training_flags(method, build_parser(method).parse_args(argv))
    program(method, argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 after an error that its user can mend, 130 after Ctrl-C."""
    return run(run_method, argv)


if __name__ == "__main__":
    raise SystemExit(main())
