"""One random model in every published layout, and a file of it to break: shared by the tests of loading."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import UMT5Config, UMT5EncoderModel

from wan_mini import load
from wan_mini.checkpoint import read_checkpoint
from wan_mini.layouts import detect, rename

FP32 = {"device": "cpu", "dtype": torch.float32}
LAYOUTS = ("diffusers", "shards", "original", "safetensors", "comfy")
KINDS = ("dit", "vae", "text_encoder")
FOLDERS = {"dit": "transformer", "vae": "vae", "text_encoder": "text_encoder"}  # Diffusers'


def randomize(module: torch.nn.Module) -> torch.nn.Module:
    """Weights that are neither zero nor one anywhere, so that no two tensors can be exchanged unnoticed."""
    for name, parameter in module.named_parameters():
        gain = (parameter.ndim == 1 and name.endswith("weight")) or name.endswith("gamma")
        parameter.data = torch.randn(parameter.shape) * 0.3 + gain
    return module.eval().requires_grad_(False)


def reference_modules() -> dict[str, torch.nn.Module]:
    """Diffusers' and transformers' own modules, tiny, random, with sizes that are all different."""
    torch.manual_seed(0)
    dit = WanTransformer3DModel(
        num_attention_heads=3, attention_head_dim=14, in_channels=4, out_channels=4, text_dim=24, freq_dim=32,
        ffn_dim=70, num_layers=3,
    )  # fmt: skip
    statistics = {"latents_mean": [0.1, -0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 0.5, 1.5]}
    vae = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 2, 2, 3], num_res_blocks=1, **statistics)
    sizes = {"vocab_size": 61, "d_model": 24, "d_kv": 6, "num_heads": 5, "d_ff": 40, "num_layers": 3}
    t5 = UMT5EncoderModel(UMT5Config(**sizes, feed_forward_proj="gated-gelu"))
    modules = {"dit": randomize(dit), "vae": randomize(vae), "text_encoder": randomize(t5)}
    vae.decoder.conv_out.weight.data *= 0.01  # Diffusers clamps what it decodes: stay inside [-1, 1]
    vae.decoder.conv_out.bias.data *= 0.01
    return modules


def write_tokenizer(file: Path) -> Path:
    pieces = ["<pad>", "</s>", "<unk>", "▁", "a", "b", "▁ab"]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=2))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens(pieces[:3])
    file.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(file))
    return file


def write_diffusers(folder: Path, reference: dict, shard_bytes: int) -> None:
    """As the -Diffusers repositories: one folder and one config.json for each part."""
    for kind, module in reference.items():
        module.save_pretrained(folder / FOLDERS[kind], max_shard_size=shard_bytes)
    write_tokenizer(folder / "tokenizer/tokenizer.json")


def write_original(folder: Path, models: dict) -> None:
    """As Wan-AI/Wan2.1-T2V-14B: all in one folder, the DiT in shards with an index, VAE and text encoder in pickles."""
    load.save_wan(folder, *models.values(), write_tokenizer(folder.parent / "tokenizer.json"))
    whole = folder / "diffusion_pytorch_model.safetensors"
    tensors, index = load_file(whole), {}
    for shard, names in enumerate([list(tensors)[::2], list(tensors)[1::2]], start=1):
        file = f"diffusion_pytorch_model-0000{shard}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file)
        index |= dict.fromkeys(names, file)
    (folder / f"{whole.name}.index.json").write_text(json.dumps({"weight_map": index}))
    for file, kind in (("Wan2.1_VAE", "vae"), ("models_t5_umt5", "text_encoder")):
        torch.save(models[kind].state_dict(), folder / f"{file}.pth")
        (folder / f"{file}.safetensors").unlink()
    whole.unlink()


def write_comfy(folder: Path, models: dict, reference: dict) -> None:
    """As Comfy-Org: single files, a prefix on the DiT, Hugging Face's names and a stowaway in the text encoder."""
    dit, vae, t5 = models.values()
    for kind in KINDS:
        (folder / "split_files" / kind).mkdir(parents=True)
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in dit.state_dict().items()}
    config = {"config": json.dumps(asdict(dit.config))}
    save_file(tensors, folder / "split_files/dit/wan.safetensors", config)
    config = {"config": json.dumps(asdict(vae.config))}
    save_file(vae.state_dict(), folder / "split_files/vae/wan_2.1_vae.safetensors", config)
    tensors = rename_back("text_encoder", t5.state_dict(), reference) | {
        "spiece_model": torch.ones(9, dtype=torch.uint8)
    }
    save_file(tensors, folder / "split_files/text_encoder/umt5.safetensors")
    write_tokenizer(folder / "tokenizer.json")


def rename_back(kind: str, state: dict, reference: dict) -> dict:
    """Our state dict under the other layout's names: the rename table, inverted on the names it is for."""
    names = [name for name in reference[kind].state_dict() if name != "encoder.embed_tokens.weight"]
    back = {ours: theirs for theirs, ours in rename(detect(names), names).items()}
    return {back[name]: tensor for name, tensor in state.items()}


def write_folders(reference: dict[str, torch.nn.Module], root: Path) -> dict[str, Path]:
    """The same random model in every layout, {layout: folder}."""
    folders = {layout: root / layout for layout in LAYOUTS}
    write_diffusers(folders["diffusers"], reference, shard_bytes=10**9)
    write_diffusers(folders["shards"], reference, shard_bytes=20_000)
    wan = load.load_wan(folders["diffusers"], **FP32)
    models = {kind: getattr(wan, kind) for kind in KINDS}
    load.save_wan(folders["safetensors"], *models.values(), write_tokenizer(root / "tokenizer.json"))
    write_original(folders["original"], models)
    write_comfy(folders["comfy"], models, reference)
    return folders


def inputs(kind: str) -> tuple[torch.Tensor, ...]:
    """Fixed inputs of odd sizes, two of each."""
    random = torch.Generator().manual_seed(1)
    if kind == "dit":
        latents, text = torch.randn(2, 4, 3, 6, 10, generator=random), torch.randn(2, 7, 24, generator=random)
        return latents, torch.tensor([3.0, 41.0]), text
    if kind == "vae":
        return (torch.rand(2, 3, 9, 24, 40, generator=random) * 2 - 1,)
    return torch.randint(61, (2, 11), generator=random), torch.arange(11) < torch.tensor([[11], [6]])


@torch.no_grad()
def run(kind: str, module: torch.nn.Module) -> list[torch.Tensor]:
    """Outputs of one of our modules."""
    if kind == "vae":
        latents = module.encode(*inputs(kind))
        return [latents, module.decode(latents)]
    output = module(*inputs(kind))
    return [output if kind == "dit" else output * inputs(kind)[1][..., None]]  # T5 may output anything at padding


@torch.no_grad()
def run_reference(kind: str, module: torch.nn.Module) -> list[torch.Tensor]:
    """The same with Diffusers' and transformers' modules."""
    if kind == "vae":
        mean, std = (torch.tensor(module.config[f"latents_{key}"]).view(1, -1, 1, 1, 1) for key in ("mean", "std"))
        mode = module.encode(*inputs(kind)).latent_dist.mode()
        return [(mode - mean) / std, module.decode(mode).sample]
    if kind == "dit":
        latents, timestep, text = inputs(kind)
        text = torch.nn.functional.pad(text, (0, 0, 0, 512 - text.shape[1]))  # (2,7,24) -> (2,512,24)
        return [module(latents, timestep, text, return_dict=False)[0]]
    ids, mask = inputs(kind)
    return [module(ids, mask.long()).last_hidden_state * mask[..., None]]


def load_one(kind: str, path: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return getattr(load, f"load_{kind}")(path, device="cpu", dtype=dtype)


def refuses(kind: str, path: Path, pattern: str, dtype: torch.dtype = torch.float32) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=pattern) as caught:
        load_one(kind, path, dtype)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def write_broken(folders: dict[str, Path], kind: str, edit: Callable, folder: Path) -> Path:
    """A copy of the Hugging Face-named file of one part, after edit(its tensors)."""
    file = read_checkpoint(folders["comfy"]).parts[kind].files[0]
    tensors = {name.removeprefix("model.diffusion_model."): tensor for name, tensor in load_file(file).items()}
    edit(tensors)
    save_file(tensors, folder / "broken.safetensors", {"config": json.dumps({"dim": 42, "num_heads": 3})})
    return folder / "broken.safetensors"
