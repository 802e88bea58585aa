"""Draw the diagrams of the course as SVG, with the sizes of the tiny model and the defaults of the method:

    python notebooks/diagrams.py        writes notebooks/figures/*.svg

Every number is computed from wan_mini/config.py, MotionConfig and window.py, so a diagram cannot contradict the code.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from svg import INK, PAPER, Drawing  # noqa: E402

from fastvmt import MotionConfig  # noqa: E402
from wan_mini.config import TINY, TINY_VAE, latent_shape, token_grid  # noqa: E402
from window import window_keys  # noqa: E402

FIGURES = Path(__file__).resolve().parent / "figures"
FRAMES, HEIGHT, WIDTH = 33, 128, 192  # the tiny model's clips, in video frames and pixels
GRID = token_grid(FRAMES, HEIGHT, WIDTH)
TOKENS = math.prod(GRID)
LATENTS = latent_shape(FRAMES, HEIGHT, WIDTH)
WINDOW = 5  # tokens, small enough to be drawn on the tiny model's grid


def shape(*sizes: int) -> str:
    """(1,16,9,16,24)"""
    return "(" + ",".join(str(size) for size in sizes) + ")"


def dit_block() -> Drawing:
    """The transformer and one of its blocks."""
    dim = TINY.dim
    width = dim // TINY.num_heads
    stream = shape(1, TOKENS, dim)
    d = Drawing(
        1120,
        600,
        "The diffusion transformer and one of its blocks",
        f"Latents {shape(*LATENTS)} become {TOKENS} tokens of {dim} channels. {TINY.num_layers} blocks add "
        "self-attention, cross-attention to the text, and a feed-forward network to the token stream. The "
        "timestep sets a shift, a scale and a gate for the first and the last. A head turns tokens into a "
        f"velocity. FastVMT reads queries and keys {shape(1, TOKENS, TINY.num_heads, width)} of one block's "
        "self-attention, after norm and rotary positions.",
    )
    d.text(20, 34, "WanDiT", size=20, anchor="start", bold=True)
    d.box(20, 56, 250, 50, f"noisy latents\n{shape(*LATENTS)}", "data")
    d.arrow((145, 106), (145, 132))
    d.box(20, 132, 250, 50, "patch embedding\nConv3d, patches of 1x2x2")
    d.arrow((145, 182), (145, 232))
    d.text(157, 212, stream, anchor="start")
    d.box(20, 232, 250, 50, f"{TINY.num_layers} blocks")
    d.arrow((145, 282), (145, 332))
    d.text(157, 312, stream, anchor="start")
    d.box(20, 332, 250, 50, "head: norm, linear")
    d.arrow((145, 382), (145, 432))
    d.text(157, 412, shape(1, TOKENS, 4 * LATENTS[1]), anchor="start")
    d.box(20, 432, 250, 50, f"velocity, unpatchified\n{shape(*LATENTS)}", "data")
    _dit_inside(d, stream, width)
    d.box(20, 534, 250, 50, f"timestep (), sinusoids, MLP\n{shape(1, 6, dim)}", "condition", size=14)
    d.text(300, 556, "2 shifts, 2 scales, 2 gates: the", size=14, anchor="start")
    d.text(300, 576, "dotted green boxes of every block", size=14, anchor="start")
    return d


def _dit_inside(d: Drawing, stream: str, width: int) -> None:
    """One block: three branches that leave the token stream and are added to it again."""
    d.box(300, 20, 800, 500, kind="frame")
    d.text(316, 48, "one block", size=20, anchor="start", bold=True)
    d.text(1084, 48, "token stream, float32", size=14, anchor="end")
    d.text(316, 88, stream, anchor="start")
    names = ["self-attention", "cross-attention", "feed-forward"]
    details = [
        f"{TINY.num_heads} heads of {width}\nq, k: RMS norm and RoPE",
        f"{TINY.num_heads} heads of {width}\nq, k: RMS norm",
        f"{TINY.dim} > {TINY.ffn_dim} > {TINY.dim}\nGELU",
    ]
    for number, name in enumerate(names):
        left = 320 + 260 * number
        down = left + 58
        up = left + 186
        timed = name != "cross-attention"
        d.arrow((down, 100), (down, 140))
        d.box(left, 140, 120, 36, "LayerNorm")
        d.arrow((down, 176), (down, 204 if timed else 300))
        if timed:
            d.box(left, 204, 120, 56, "x (1 + scale)\n+ shift", "condition")
            d.arrow((down, 260), (down, 300))
            d.box(left + 130, 204, 112, 56, "x gate", "condition")
            d.arrow((up, 204), (up, 112))
        d.box(left, 300, 242, 84, f"{name}\n{details[number]}")
        d.arrow((up, 300), (up, 260 if timed else 112))
        d.arrow((up + 12 - 260 if number else 304, 100), (up - 12, 100))
        d.plus(up, 100)
    d.arrow((1038, 100), (1092, 100))
    d.arrow((441, 384), (441, 428), kind="method")
    d.box(320, 428, 242, 76, f"FastVMT reads q and k here\n{shape(1, TOKENS, TINY.num_heads, width)}\neach", "method")
    d.arrow((701, 428), (701, 384))
    d.box(580, 428, 242, 76, f"text through an MLP\n{shape(1, TINY.text_len, TINY.dim)}", "condition")


def vae_levels() -> list[tuple[str, tuple[int, int, int, int]]]:
    """What follows what in the encoder, with the size behind it: channels, frames, height, width."""
    frames = FRAMES
    height = HEIGHT
    width = WIDTH
    levels = [("conv1", (TINY_VAE.dim, frames, height, width))]
    for level, mult in enumerate(TINY_VAE.dim_mult):
        name = f"level {level}"
        if level < 3:
            height //= 2
            width //= 2
            name += "\nhalves space"
        if level in (1, 2):
            frames = (frames - 1) // 2 + 1
            name += "\nand time"
        levels.append((name, (TINY_VAE.dim * mult, frames, height, width)))
    levels.append(("middle\nattention\nin a frame", levels[-1][1]))
    levels.append(("head", (2 * TINY_VAE.z_dim, frames, height, width)))
    return levels


def causal_vae() -> Drawing:
    """The encoder over time and over its levels."""
    chunks = LATENTS[2]
    d = Drawing(
        1120,
        560,
        "The causal video VAE, encoding",
        f"{FRAMES} video frames enter in chunks of 1, 4, 4, ... frames. Each chunk gives one latent frame. "
        "Every causal layer hands its last frames to the next chunk as a cache, and nothing flows back in "
        "time. Inside, three levels halve height and width, two of them also time, from "
        f"{shape(3, FRAMES, HEIGHT, WIDTH)} to {shape(*LATENTS[1:])}. The decoder mirrors the encoder.",
    )
    d.text(20, 34, "In time: chunk by chunk", size=20, anchor="start", bold=True)
    chunk_shape = shape(1, 3, 4, HEIGHT, WIDTH)
    d.text(1100, 34, f"{FRAMES} video frames, {chunk_shape} a chunk", size=15, anchor="end")
    for chunk in range(chunks):
        left = 20 + 122 * chunk
        count = 4 if chunk else 1
        start = left + 52 - 11 * count
        for frame in range(count):
            d.box(start + 22 * frame, 52, 20, 26, kind="cell")
        first = 4 * chunk - 3
        d.text(left + 52, 98, f"{first} to {first + 3}" if chunk else "0", size=14)
        d.arrow((left + 52, 104), (left + 52, 132))
        d.box(left, 132, 104, 44, "encoder")
        d.arrow((left + 52, 176), (left + 52, 204))
        d.box(left + 12, 204, 80, 40, f"latent {chunk}", "data", size=14)
        if chunk:
            d.arrow((left - 18, 154), (left, 154), kind="method")
    d.note(20, 272, "orange arrows: the feature cache of every causal layer, its last one or two frames")
    d.text(1100, 272, f"{shape(1, LATENTS[1], 1, *LATENTS[3:])} a latent frame".replace("(", " (", 1), 15, "end")
    d.text(
        20,
        292,
        "nothing flows from a later chunk to an earlier one; the first frame is a chunk of its own",
        15,
        "start",
    )

    d.text(20, 346, "Inside: levels, for the whole clip", size=20, anchor="start", bold=True)
    d.text(1100, 346, "(channels,frames,height,width)", size=15, anchor="end")
    levels = vae_levels()
    pitch = 142
    d.text(70, 382, shape(3, FRAMES, HEIGHT, WIDTH), size=14)
    for number, (name, size) in enumerate(levels):
        left = 44 + pitch * number
        d.arrow((left - 34, 430), (left, 430))
        d.box(left, 394, 108, 72, name, size=14)
        above = 382 if number % 2 else 490
        d.text(left + 116, above, shape(*size), size=14)
    d.text(
        20,
        530,
        f"The head's {2 * TINY_VAE.z_dim} channels are mean and log-variance. Only the mean is kept, and",
        15,
        "start",
    )
    d.text(
        20,
        550,
        f"normalized by channel: latents {'x'.join(map(str, LATENTS[1:]))}. The decoder mirrors all this.",
        15,
        "start",
    )
    d.arrow((44 + pitch * 6 + 108, 430), (1036, 430), head=False)
    return d


def sampler() -> Drawing:
    """The sampling loop with the loop over updates inside."""
    c = MotionConfig()
    gradients = math.ceil(c.optim_steps / c.interval)
    d = Drawing(
        1120,
        640,
        "The sampler with FastVMT's inner loop",
        f"The reference clip is encoded once. For each of {c.steps} noise levels the transformer gives a "
        f"velocity and the latents take an Euler step. Before each of the first {c.guided_steps} steps an "
        f"inner loop updates the latents {c.optim_steps} times with {gradients} gradients, until the motion "
        "flow read from the queries and keys of one block matches the reference's. At the end the decoder "
        "turns latents into the result.",
    )
    video = shape(1, 3, FRAMES, HEIGHT, WIDTH)
    latents = shape(*LATENTS)
    d.box(20, 20, 210, 54, f"reference clip\n{video}", "data")
    d.arrow((230, 47), (268, 47))
    d.box(268, 20, 130, 54, "VAE encoder")
    d.arrow((398, 47), (436, 47))
    d.box(436, 20, 220, 54, f"reference latents\n{latents}", "data")
    d.box(830, 20, 270, 54, "prompt, tokenizer, UMT5\n" + shape(1, TINY.text_len, TINY.text_dim), "condition")
    d.box(20, 110, 1080, 420, kind="frame")
    d.text(36, 138, f"for each of {c.steps} noise levels", size=18, anchor="start", bold=True)
    d.box(270, 152, 600, 290, kind="reuse")
    d.text(286, 190, f"first {c.guided_steps} steps only", size=16, anchor="start", bold=True)
    d.note(286, 214, f"{c.optim_steps} updates, {gradients} gradients")
    _inner_loop(d)
    d.arrow((575, 74), (575, 174))
    d.text(587, 98, "plus the same noise", size=14, anchor="start")
    d.box(40, 262, 200, 60, f"latents\n{latents}", "data")
    d.arrow((240, 292), (290, 292))
    d.box(900, 262, 180, 60, "DiT, two passes\nwith cfg")
    d.arrow((965, 74), (965, 262))
    d.text(975, 200, "text", size=14, anchor="start")
    d.arrow((990, 322), (990, 462))
    d.text(1000, 396, "velocity", size=14, anchor="start")
    d.box(770, 462, 310, 54, f"Euler step to the next noise level\n{latents}")
    d.arrow((770, 489), (140, 489), (140, 322))
    d.text(450, 478, "next step", size=14)
    d.box(20, 566, 210, 54, f"noise from the seed\n{latents}", "data")
    d.arrow((60, 566), (60, 322))
    d.arrow((925, 516), (925, 566))
    d.text(935, 552, "at noise level 0", size=14, anchor="start")
    d.box(830, 566, 190, 54, "VAE decoder")
    d.arrow((830, 593), (700, 593))
    d.box(490, 566, 210, 54, f"result\n{video}", "data")
    return d


def _inner_loop(d: Drawing) -> None:
    """What happens before a guided step."""
    heads = shape(1, TOKENS, TINY.num_heads, TINY.dim // TINY.num_heads)
    d.box(500, 174, 150, 54, f"DiT: q, k\n{heads}")
    d.arrow((650, 201), (680, 201))
    d.box(680, 174, 170, 54, "target flow\n(pairs,S,2)", "data")
    d.arrow((765, 228), (765, 262))
    d.box(290, 262, 150, 60, f"DiT: q, k\n{heads}")
    d.arrow((440, 292), (470, 292))
    d.box(470, 262, 180, 60, "motion flow, windows\n(pairs,S,2)", "method", size=14)
    d.arrow((650, 292), (680, 292))
    d.box(680, 262, 170, 60, "loss, Eq. 8\n()", "method")
    d.arrow((765, 322), (765, 366), kind="method")
    d.text(755, 350, "gradient", size=14, anchor="end")
    d.box(680, 366, 170, 60, "AdamW update\nof the latents", "method")
    d.arrow((680, 396), (365, 396), (365, 322), kind="method")
    d.text(520, 386, "next update", size=14)
    d.arrow((850, 396), (885, 396), (885, 292), (900, 292))


def tiles_and_windows() -> Drawing:
    """A tile of frame i, its match in frame j, and the window around it."""
    c = MotionConfig()
    _, rows, columns = GRID
    side = 36
    tile_rows, tile_columns = c.tile
    tiles = math.ceil(rows / tile_rows) * math.ceil(columns / tile_columns)
    d = Drawing(
        1120,
        560,
        "Tiles and windows",
        f"Frame i has {rows} by {columns} tokens in tiles of {tile_rows} by {tile_columns}. The middle token"
        " of a tile is compared with every token of frame j; the best match is the center of the tile's "
        f"window. Each token of the tile then searches only the {WINDOW} by {WINDOW} tokens of that window: "
        "a softmax over their logits gives its matched position, and the difference is its displacement. A "
        "window that would stick out of the frame is shifted inside.",
    )
    tile = (tile_rows, tile_columns)  # the second row and column of tiles
    center = (tile[0] + tile[0] // 2 - 1, tile[1] + tile[1] // 2 + 2)
    _token_grid(d, 30, 90, side, "frame i: queries")
    _token_grid(d, 650, 90, side, "frame j: keys")
    for row in range(0, rows, tile_rows):
        for column in range(0, columns, tile_columns):
            height = min(tile_rows, rows - row) * side
            d.parts.append(
                f'<rect x="{30 + column * side}" y="{90 + row * side}" width="{tile_columns * side}" height="{height}" '
                'fill="none" stroke="#0072b2" stroke-width="3"/>'
            )
    representative = (tile[0] + tile[0] // 2, tile[1] + tile[1] // 2)
    for number in window_keys(torch.tensor(center), GRID, WINDOW).tolist():
        _fill(d, 650, 90, side, divmod(number, columns), "#fde3cf")
    for number in window_keys(torch.tensor((rows - 1, 0)), GRID, WINDOW).tolist():
        _fill(d, 650, 90, side, divmod(number, columns), "#eeeeee", "4 3")
    for row in range(tile_rows):
        for column in range(tile_columns):
            _fill(d, 30, 90, side, (tile[0] + row, tile[1] + column), "#d9ebf8")
    _fill(d, 30, 90, side, representative, "#0072b2")
    _fill(d, 650, 90, side, center, "#c14f00")
    start = (30 + (representative[1] + 0.5) * side, 90 + (representative[0] + 0.5) * side)
    end = (650 + (center[1] + 0.5) * side, 90 + (center[0] + 0.5) * side)
    d.arrow(start, (start[0], 60), (end[0], 60), (end[0], end[1] - side / 2), kind="method")
    d.text(
        (start[0] + end[0]) / 2 + 20, 50, "best match of the tile's middle token in the whole frame (Eq. 1, 4)", size=15
    )
    token = (tile[0], tile[1])
    own = (650 + (token[1] + 0.5) * side, 90 + (token[0] + 0.5) * side)
    match = (own[0] + 2.4 * side, own[1] - 1.2 * side)
    for x, y, color in ((own[0] - 620, own[1], INK), (*own, PAPER), (*match, INK)):
        d.parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="7" fill="{color}" stroke="{INK}" stroke-width="2"/>')
    d.arrow((own[0] + 6, own[1] - 3), (match[0] - 6, match[1] + 3))
    d.arrow((470, 234), (642, 234))
    d.text(556, 222, "search", size=15)
    d.text(556, 258, "in the window", size=15)
    d.text(556, 278, "Eq. 3", size=15)
    lines = [
        f"blue: a tile of {tile_rows}x{tile_columns} tokens, its middle token dark; {tiles} tiles a frame",
        f"orange: its window of {WINDOW}x{WINDOW} keys; windows {shape(1, tiles, WINDOW**2)} for each frame pair",
        "black dots: a token and its matched position, the mean over the window; the arrow is its displacement",
        "gray: a window at the border is shifted inside; it always has as many distinct keys",
        f"logits {shape(rows * columns, rows * columns)}, motion flow {shape(1, rows * columns, 2)} a frame pair",
    ]
    for number, line in enumerate(lines):
        d.text(30, 410 + 28 * number, line, size=16, anchor="start")
    d.note(30, 550, f"The method's default window is {c.window}x{c.window} tokens, for grids of 30x52.")
    return d


def _token_grid(d: Drawing, x: int, y: int, side: int, name: str) -> None:
    """A frame of tokens, with its name and size under it."""
    _, rows, columns = GRID
    for row in range(rows):
        for column in range(columns):
            d.box(x + column * side, y + row * side, side, side, kind="cell")
    d.text(x, y - 12, name, size=16, anchor="start", bold=True)


def _fill(d: Drawing, x: int, y: int, side: int, token: tuple[int, int], color: str, dashes: str = "") -> None:
    """Color one token."""
    square = f'x="{x + token[1] * side}" y="{y + token[0] * side}" width="{side}" height="{side}"'
    d.parts.append(f'<rect {square} fill="{color}" stroke="#777777" stroke-dasharray="{dashes}"/>')


def gradient_reuse() -> Drawing:
    """The updates of one guided step, and which of them compute a gradient."""
    c = MotionConfig()
    fresh = range(0, c.optim_steps, c.interval)
    d = Drawing(
        1120,
        500,
        "Gradient reuse in one guided step",
        f"{c.optim_steps} AdamW updates of the latents. Updates {', '.join(map(str, fresh))} compute a "
        "gradient: the transformer's first blocks forward and backward. The others reuse the last gradient "
        f"and run no model. The learning rate falls from {c.lr[0]} to {c.lr[1]}.",
    )
    d.text(20, 34, f"One guided step: {c.optim_steps} updates, {len(fresh)} gradients", 20, "start", bold=True)
    left = 180
    pitch = 93
    d.text(20, 110, "gradient", size=16, anchor="start", bold=True)
    d.text(20, 132, "Eq. 9", size=14, anchor="start")
    d.text(20, 252, "AdamW update", size=16, anchor="start", bold=True)
    d.text(20, 274, "Eq. 10", size=14, anchor="start")
    d.text(20, 372, "learning rate", size=16, anchor="start", bold=True)
    for step in range(c.optim_steps):
        x = left + pitch * step
        if step in fresh:
            wide = min(c.interval, c.optim_steps - step) * pitch - 13
            work = "DiT to block b, flow, loss\nforward and backward" if wide > 200 else "DiT\nforward\nbackward"
            d.box(x, 80, max(wide, 80), 70, work, "method")
        d.arrow((x + 40, 150), (x + 40, 220), kind="method" if step in fresh else "reuse")
        d.box(x, 220, 80, 64, f"{step}", "data", size=18)
        rate = c.lr[0] + (c.lr[1] - c.lr[0]) * step / (c.optim_steps - 1)
        height = 100 * rate / c.lr[0]
        d.parts.append(f'<rect x="{x + 24}" y="{430 - height:.1f}" width="32" height="{height:.1f}" fill="#0072b2"/>')
        if step in (0, c.optim_steps - 1):
            d.text(x + 40, 322, f"{rate:g}", size=14)
    d.arrow((left - 40, 430), (left + pitch * c.optim_steps, 430))
    d.text(
        20,
        60,
        f"thick orange arrow: a new gradient, {shape(*LATENTS)};   dashed: the same one again, no model runs",
        15,
        "start",
    )
    d.text(
        20,
        464,
        f"Latents and gradient are {'x'.join(map(str, LATENTS[1:]))}, float32. AdamW's moments also advance",
        15,
        "start",
    )
    d.note(20, 486, "at the updates that reuse a gradient, without weight decay.")
    return d


def neighbors() -> Drawing:
    """Where the methods of motion transfer read the transformer, and where they change it."""
    d = Drawing(
        1120,
        600,
        "Where nine methods read and change the transformer",
        "Latents pass through block 0, the blocks before block b, block b, and the blocks after it, and become a "
        "velocity. Methods without training read in the middle: space-time features and MOFT read the stream that "
        "enters block b, FastVMT, DiTFlow and MotionClone its queries and keys, FlowMotion the clean prediction at "
        "the end. Their gradient changes the latents. Methods with training add small parts to every block: adapters "
        "at heads, embeddings at the inputs of q, k and v, convolutions behind the self-attention. Their gradient "
        "changes these parts.",
    )
    d.text(20, 34, "Without training: read, compare, change the latents", 18, "start", bold=True)
    d.box(20, 250, 110, 70, "latents\nx", "data")
    d.arrow((130, 285), (170, 285))
    d.box(170, 250, 110, 70, "block 0")
    d.arrow((280, 285), (320, 285))
    d.box(320, 250, 150, 70, "blocks 1 to b-1")
    d.arrow((470, 285), (550, 285))
    d.text(510, 306, "stream", size=13)
    d.box(550, 250, 150, 70, "block b\nq, k")
    d.arrow((700, 285), (740, 285))
    d.box(740, 250, 150, 70, "blocks b+1 ...")
    d.arrow((890, 285), (930, 285))
    d.box(930, 250, 170, 70, "velocity v\nx0 = x - sigma v", "data")
    d.box(140, 130, 170, 64, "DiTFlow: the first\nK and V become\nthe reference's", "reuse", size=14)
    d.arrow((225, 194), (225, 250), kind="reuse")
    d.arrow((492, 285), (492, 194), kind="method")
    d.box(330, 130, 180, 64, "SMM: frame means\nMOFT: channels", "method", size=14)
    d.arrow((625, 250), (625, 194), kind="method")
    d.box(526, 130, 198, 64, "FastVMT, DiTFlow: flow\nMotionClone: frame maps", "method", size=14)
    d.arrow((1015, 250), (1015, 194), kind="method")
    d.box(920, 130, 180, 64, "FlowMotion: x0 itself\nno backward pass", "method", size=14)
    d.arrow((420, 130), (420, 90), (75, 90), (75, 250), kind="method")
    d.arrow((625, 130), (625, 90), (420, 90), kind="method", head=False)
    d.text(250, 80, "gradient of a distance to the reference", size=14)
    d.arrow((1015, 130), (1015, 60), (40, 60), (40, 250), kind="method")
    d.text(830, 80, "gradient through x0 alone", size=14)
    d.box(160, 360, 740, 130, kind="frame")
    d.text(176, 386, "small parts in every block, trained on the one reference", 15, "start", bold=True)
    d.box(
        176,
        400,
        232,
        76,
        "adapters at q, k, v, o\nFollow-Your-Motion: by head\nMotionDirector: all",
        "condition",
        size=14,
    )
    d.box(420, 400, 220, 76, "embeddings at the inputs\nof q, k and v\nMotionInversion", "condition", size=14)
    d.box(660, 400, 220, 76, "convolution over time\nafter self-attention\nDeT", "condition", size=14)
    for x in (225, 395, 625, 815):
        d.arrow((x, 360), (x, 320), kind="condition")
    d.arrow((1015, 320), (1015, 530), (530, 530), (530, 490), kind="condition")
    d.text(770, 520, "gradient of the denoising loss", size=14)
    d.text(
        20, 580, "With training: the weights of the model stay, the small parts learn the clip", 18, "start", bold=True
    )
    return d


DIAGRAMS: dict[str, Callable[[], Drawing]] = {
    "dit_block": dit_block,
    "causal_vae": causal_vae,
    "sampler": sampler,
    "tiles_and_windows": tiles_and_windows,
    "gradient_reuse": gradient_reuse,
    "neighbors": neighbors,
}


def main() -> int:
    """Write all diagrams; returns 1 and says why if one has overlapping text."""
    FIGURES.mkdir(exist_ok=True)
    failed = 0
    for name, draw in DIAGRAMS.items():
        drawing = draw()
        (FIGURES / f"{name}.svg").write_text(drawing.svg(), encoding="utf-8")
        print(f"figures/{name}.svg", *drawing.problems(), sep="\n    ")
        failed += bool(drawing.problems())
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
