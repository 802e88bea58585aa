"""The usual video metrics as formulas over features, whatever model made them.

CLIP, DINO and the aesthetic head are not here: a user brings their features (benchmarks/methods.md has the recipe).
Each function names the convention that it follows, because tables with the same column names follow different ones.
"""

import numpy as np


def unit(features: np.ndarray) -> np.ndarray:
    """Vectors (...,C) scaled to length 1; a zero vector stays zero."""
    length = np.linalg.norm(features, axis=-1, keepdims=True)
    return features / np.maximum(length, 1e-12)


def consistency(features: np.ndarray, *, first: bool = False) -> float:
    """Mean cosine of each frame's features (T,C) with the frame before; negative cosines count 0.

    first=True: averaged with the cosine with frame 0. That is VBench's subject consistency (DINO ViT-B/16, short side
    224, not cropped) and background consistency (CLIP ViT-B/32, center crop). first=False is the tables' "temporal
    consistency" (CLIP image features), in which no cosine is negative in practice. A frozen clip has 1 in all of them.
    """
    vectors = unit(features)
    previous = (vectors[1:] * vectors[:-1]).sum(-1).clip(0)  # (T,C) -> (T-1,)
    if not first:
        return float(previous.mean())
    beginning = (vectors[1:] @ vectors[0]).clip(0)  # (T-1,)
    return float((previous + beginning).mean() / 2)


def text_similarity(frames: np.ndarray, text: np.ndarray, *, scale: float = 1.0) -> float:
    """Mean cosine of frames' features (T,C) with a prompt's (C,); DeT's tables multiply it by CLIP's scale of 100."""
    return scale * float((unit(frames) @ unit(text)).mean())


def aesthetic(features: np.ndarray, weight: np.ndarray, bias: float) -> float:
    """LAION's linear head on normalized CLIP ViT-L/14 features (T,C), weight (C,), divided by 10, mean over frames."""
    return float((unit(features) @ weight + bias).mean() / 10)


def smoothness(frames: np.ndarray, interpolated: np.ndarray | None = None) -> float:
    """1 minus the mean difference of every second frame from its interpolation, as a share of 255.

    frames (T,H,W,3) uint8; interpolated (n,H,W,3), the frames 1, 3, ... made from their neighbors, in VBench by AMT-S.
    None: the mean of both neighbors. Of an even T the last frame is not used.
    """
    count = (len(frames) - 1) // 2
    middle = frames[1::2][:count].astype(np.float64)
    if interpolated is None:
        before = frames[0::2][:count].astype(np.float64)
        after = frames[2::2][:count].astype(np.float64)
        interpolated = (before + after) / 2
    return float((255 - np.abs(middle - interpolated).mean()) / 255)
