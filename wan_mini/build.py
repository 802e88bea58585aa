"""From the headers of a part to its module on the meta device: sizes, names and shapes must fit exactly."""

from collections.abc import Mapping

import torch
from torch import nn

from wan_mini.checkpoint import Part, TensorHeader, abbreviate, index_tensors, missing_shards
from wan_mini.dit import WanDiT, keeps_float32
from wan_mini.errors import UserError
from wan_mini.fp8 import scale_headers
from wan_mini.other_models import refuse_other_models
from wan_mini.sizes import CONFIGS
from wan_mini.umt5 import UMT5Encoder
from wan_mini.vae import WanVAE

MODULES: dict[str, type[nn.Module]] = {"dit": WanDiT, "vae": WanVAE, "text_encoder": UMT5Encoder}


def build_and_check(part: Part) -> nn.Module:
    """The part's module on the meta device, once the headers alone have shown that the files fill it exactly.

    Raises UserError that names tensors and files if any is missing, unexpected or of another shape.
    """
    index = index_tensors(part)
    scale_headers(part)  # refuses 8-bit weights without one
    shapes = {name: tensor.shape for name, tensor in index.items()}
    refuse_other_models(part.location, shapes)
    try:
        config = CONFIGS[part.layout.part](shapes, part.configs)
    except KeyError as name:
        raise UserError(f"{part.location}: tensor {name} is missing{missing_shards(part)}") from None
    except ValueError as problem:
        raise UserError(f"{part.location}: {problem}; is its config.json beside it?") from None
    with torch.device("meta"):
        module = MODULES[part.layout.part](config)
    for fault, names in _compare_shapes(module, index).items():
        if names:
            listed = f"{len(names)} tensors {fault}: {abbreviate(names)}"
            raise UserError(f"{part.location}: {listed}{missing_shards(part)}")
    return module


def _compare_shapes(module: nn.Module, index: dict[str, TensorHeader]) -> dict[str, list[str]]:
    """{fault: descriptions of the tensors that have it} of the files' tensors against a module's."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    missing = [name for name in expected if name not in index]
    unexpected = []
    wrong_shape = []
    for name, tensor in index.items():
        if name not in expected:
            unexpected.append(f"{tensor.key} in {tensor.file}")
        elif tensor.shape != expected[name]:
            wrong_shape.append(f"{name} {tensor.shape}, not {expected[name]}, in {tensor.file}")
    return {"missing": missing, "unexpected": unexpected, "wrongly shaped": wrong_shape}


def set_weight_dtypes(parts: Mapping[str, nn.Module], dtype: torch.dtype) -> None:
    """Give parts on the meta device the dtypes that load.load_wan gives them, and freeze them."""
    for part_name, part in parts.items():
        part.requires_grad_(False)
        for name, weight in part.named_parameters():
            if part_name == "text_encoder" or (part_name == "dit" and not keeps_float32(name)):
                weight.data = weight.data.to(dtype)
