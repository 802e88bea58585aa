"""Weights in 8 bits with a scale beside them, as Comfy-Org's fp8_scaled files hold them.

    weight = 8-bit weight * scale        # in float32, where the product is rounded once; then cast as any weight

A matrix X.weight is float8; its scale, one number, is X.scale_weight or in newer files X.weight_scale. Without it the
values are wrong by a factor, which no shape shows: so an 8-bit weight without a scale is refused, and so is a scale
without an 8-bit weight. X.scale_input and X.input_scale are for products in 8 bits, which are not computed here.
"""

import json
import re
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

from wan_mini.checkpoint import Part, TensorHeader, read_tensors
from wan_mini.errors import UserError
from wan_mini.layouts import COMFY, SOURCES

FP8 = ("float8_e4m3fn", "float8_e5m2")
SCALE = r"(.+)\.(scale_weight|weight_scale)$"
MARKER = r"(.+\.)?scaled_fp8$"
FORMAT = r"(.+)\.comfy_quant$"  # JSON as bytes, {"format": "float8_e4m3fn"}
LONGEST_FORMAT = 4096  # bytes


def scale_headers(part: Part) -> dict[str, TensorHeader]:
    """{key of an 8-bit weight: header of its scale}. Raises UserError unless both are there, each once."""
    weights = {}
    scales: dict[str, TensorHeader] = {}
    markers = []
    for tensor in part.tensors:
        if re.match(MARKER, tensor.key):
            markers.append(tensor)
        match = re.match(SCALE, tensor.key)
        if match is not None:
            weight = f"{match[1]}.weight"
            if weight in scales:
                raise UserError(f"{tensor.file}: {weight} has two scales, {scales[weight].key} and {tensor.key}")
            if prod(tensor.shape) != 1:
                raise UserError(f"{tensor.file}: {tensor.key} must be one number, got shape {tensor.shape}")
            scales[weight] = tensor
        elif tensor.key in part.names and tensor.dtype in FP8:
            weights[tensor.key] = tensor
    for key, tensor in weights.items():
        if key not in scales:
            raise UserError(f"{tensor.file}: {key} is fp8 without a scale, {_better_file(part, tensor)}")
    for weight, tensor in scales.items():
        if weight not in weights:
            raise UserError(f"{tensor.file}: {tensor.key} is a scale, but there is no fp8 {weight}")
    if markers and not scales:
        raise UserError(f"{markers[0].file}: {markers[0].key} says that there are scales, and there are none")
    return scales


def read_scales(part: Part) -> dict[str, Tensor]:
    """{key of an 8-bit weight: its scale, () float32}. Raises UserError on one that is not finite and above 0."""
    headers = scale_headers(part)
    if not headers:
        return {}
    scales = {}
    for weight, header in headers.items():
        ((_, tensor),) = read_tensors(header.file, [header.key])
        scale = tensor.float().reshape(()).clone()
        if not (scale.isfinite() and scale > 0):
            raise UserError(f"{header.file}: {header.key} must be finite and above 0, got {scale.item()}")
        scales[weight] = scale
    for header in part.tensors:
        if re.match(FORMAT, header.key):
            _check_format(header)
    return scales


def _check_format(header: TensorHeader) -> None:
    """Raises UserError if a weight's comfy_quant names a format that is not one scale for a whole matrix."""
    name: object = None
    if header.dtype == "U8" and prod(header.shape) <= LONGEST_FORMAT:
        ((_, tensor),) = read_tensors(header.file, [header.key])
        with suppress(ValueError, AttributeError):
            name = json.loads(bytes(tensor.to(torch.uint8).tolist())).get("format")
    if name not in FP8:
        raise UserError(f"{header.file}: {header.key} must name one of {', '.join(FP8)}, got {name}")


def _better_file(part: Part, tensor: TensorHeader) -> str:
    """A file of the same publisher that can be loaded, as the end of a message."""
    fp16 = SOURCES[part.layout.part].comfy
    if 5120 in tensor.shape:
        fp16 = fp16.replace("1.3B", "14B")
    return f"as if it were lost: get {fp16} of {COMFY}, or a file with fp8_scaled or scaled in its name"
