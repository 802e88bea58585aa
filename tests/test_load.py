"""Loading: names against the published manifests, three layouts against each other, every refusal, the command line."""

import json
import re
import shutil
import subprocess
import sys
import weakref
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import DATA, error
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import UMT5Config, UMT5EncoderModel

from fastvmt import MotionConfig, transfer
from wan_mini import load
from wan_mini.checkpoint import CONFIGS, find_parts
from wan_mini.config import T2V_1_3B, T2V_14B, TINY, TINY_UMT5, TINY_VAE, UMT5_XXL, WAN_VAE
from wan_mini.dit import WanDiT
from wan_mini.layouts import detect, rename
from wan_mini.tiny.world import make_clip
from wan_mini.umt5 import UMT5Encoder
from wan_mini.vae import WanVAE

FP32 = {"device": "cpu", "dtype": torch.float32}
LAYOUTS = ("diffusers", "shards", "original", "safetensors", "comfy")
KINDS = ("dit", "vae", "text_encoder")
FOLDERS = {"dit": "transformer", "vae": "vae", "text_encoder": "text_encoder"}  # Diffusers'


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors of a few hundred numbers are slower on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randomize(module: torch.nn.Module) -> torch.nn.Module:
    """Weights that are neither zero nor one anywhere, so that no two tensors can be exchanged unnoticed."""
    for name, parameter in module.named_parameters():
        gain = parameter.ndim == 1 and name.endswith("weight") or name.endswith("gamma")
        parameter.data = torch.randn(parameter.shape) * 0.3 + gain
    return module.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.nn.Module]:
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


@pytest.fixture(scope="module")
def folders(reference: dict, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same random model in every layout."""
    root = tmp_path_factory.mktemp("checkpoints")
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
    return [output if kind == "dit" else output * inputs(kind)[1][..., None]]  # what T5 says of padding is free


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


# Names and shapes of the published checkpoints.

PUBLISHED = {
    "wan2.1_t2v_1.3b.dit": (WanDiT, T2V_1_3B),
    "wan2.1_t2v_14b.dit": (WanDiT, T2V_14B),
    "wan2.1.vae": (WanVAE, WAN_VAE),
    "umt5_xxl.encoder": (UMT5Encoder, UMT5_XXL),
}


def manifest(name: str, layout: str) -> dict[str, tuple[int, ...]]:
    tensors = json.loads((DATA / f"manifests/{name}.{layout}.json").read_text())["tensors"]
    return {key: tuple(shape) for key, shape in tensors.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_modules_have_the_published_tensors(name):
    builder, config = PUBLISHED[name]
    with torch.device("meta"):
        module = builder(config)
    assert {key: tuple(t.shape) for key, t in module.state_dict().items()} == manifest(name, "official")


@pytest.mark.parametrize("name", PUBLISHED)
def test_rename_tables_turn_one_manifest_into_the_other(name):
    ours, theirs = manifest(name, "official"), manifest(name, "diffusers")
    assert detect(ours).naming == "original" and detect(theirs).naming != "original"
    assert detect(ours).part == detect(theirs).part
    names = rename(detect(theirs), theirs)
    assert {names[key]: shape for key, shape in theirs.items()} == ours
    assert rename(detect(ours), ours) == {key: key for key in ours}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_tell_the_configuration(name):
    shapes = manifest(name, "official")
    assert CONFIGS[detect(shapes).part](shapes, []) == PUBLISHED[name][1]


# The same model, whatever the layout.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["diffusers", "shards"])
def test_outputs_equal_the_reference_implementation(kind, layout, folders, reference):
    assert len(find_parts(folders[layout])[kind].files) == 1 or layout == "shards"
    outputs = run(kind, load_one(kind, folders[layout]))
    for ours, theirs in zip(outputs, run_reference(kind, reference[kind]), strict=True):
        assert theirs.abs().max() > 0.01
        assert error(ours, theirs) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_bits(layout, folders):
    wanted, wan = load.load_wan(folders["diffusers"], **FP32), load.load_wan(folders[layout], **FP32)
    for kind in KINDS:
        ours, theirs = getattr(wan, kind), getattr(wanted, kind)
        assert ours.config == theirs.config
        state = ours.state_dict()
        assert state.keys() == theirs.state_dict().keys()
        assert all(state[name].equal(tensor) for name, tensor in theirs.state_dict().items())
        assert all(a.equal(b) for a, b in zip(run(kind, ours), run(kind, theirs), strict=True))
        assert not ours.training and not any(p.requires_grad for p in ours.parameters())
    assert wan.tokenizer.encode("ab a") == wanted.tokenizer.encode("ab a")
    assert wan.name == "custom"


def test_every_layout_gives_the_same_latents(folders):
    """A whole motion transfer, from clip and prompt to latents and frames."""
    config = MotionConfig(height=32, width=48, frames=9, steps=3, guided=0.5, window=2, lr=(0.02, 0.01))
    clip = make_clip(0).frames[:9, ::4, ::4]  # (9, 32, 48, 3)
    runs = [transfer(load.load_wan(folders[layout], **FP32), clip, "ab a", config) for layout in LAYOUTS]
    assert runs[0].latents.isfinite().all() and runs[0].report["gradients"] == 8
    for other in runs[1:]:
        assert torch.equal(other.latents, runs[0].latents) and (other.frames == runs[0].frames).all()


def test_a_single_file_loads_like_its_folder(folders):
    file = find_parts(folders["comfy"])["dit"].files[0]
    assert run("dit", load_one("dit", file))[0].equal(run("dit", load_one("dit", folders["comfy"]))[0])


def test_the_tiny_preset_is_recognized(tmp_path):
    modules = [randomize(WanDiT(TINY)), randomize(WanVAE(TINY_VAE)), randomize(UMT5Encoder(TINY_UMT5))]
    load.save_wan(tmp_path / "tiny", *modules, write_tokenizer(tmp_path / "tokenizer.json"))
    wan = load.load_wan(tmp_path / "tiny", **FP32)
    assert wan.name == "tiny"
    assert (wan.vae.config, wan.text_encoder.config) == (TINY_VAE, TINY_UMT5)


def test_bfloat16_spares_the_islands_and_the_vae(folders):
    wan = load.load_wan(folders["original"], device="cpu", dtype=torch.bfloat16)
    island = re.compile(r"time_embedding|time_projection|modulation|norm|^head\.")
    for name, parameter in wan.dit.named_parameters():
        assert parameter.dtype == (torch.float32 if island.search(name) else torch.bfloat16), name
    assert {p.dtype for p in wan.text_encoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in wan.vae.parameters()} == {torch.float32}


def test_tied_embedding_may_have_either_name_or_both(folders, tmp_path):
    file = find_parts(folders["comfy"])["text_encoder"].files[0]
    tensors, wanted = load_file(file), load_one("text_encoder", file).token_embedding.weight
    table = tensors.pop("shared.weight")
    for tables in (
        {"encoder.embed_tokens.weight": table},
        {"shared.weight": table, "encoder.embed_tokens.weight": table},
    ):
        save_file(tensors | {key: table.clone() for key in tables}, tmp_path / "t5.safetensors")
        assert load_one("text_encoder", tmp_path).token_embedding.weight.equal(wanted)
    save_file(tensors | {"shared.weight": table, "encoder.embed_tokens.weight": table + 1}, tmp_path / "t5.safetensors")
    refuses("text_encoder", tmp_path, "shared.weight differs from another copy of token_embedding.weight")


# Memory.


@pytest.mark.parametrize("layout", ["shards", "original"])
def test_no_tensor_of_a_file_outlives_it(layout, folders, monkeypatch):
    """So beside the model at most one file's pages are in use, and nothing of the file is left in the model."""
    read_tensors, opened, borrowed = load.read_tensors, [], []

    def watched(file, keys):
        assert not any(reference() is not None for reference in borrowed)
        opened.append(file)
        for key, tensor in read_tensors(file, keys):
            borrowed.append(weakref.ref(tensor))
            yield key, tensor
            del tensor
            assert file.suffix == ".pth" or borrowed[-1]() is None  # of safetensors, even one tensor at a time

    monkeypatch.setattr(load, "read_tensors", watched)
    wan = load.load_wan(folders[layout], **FP32)
    parts = find_parts(folders[layout]).values()
    assert sorted(opened) == sorted(file for part in parts for file in part.files)
    assert len(borrowed) == sum(len(getattr(wan, kind).state_dict()) for kind in KINDS)


def test_the_model_survives_its_file(folders, tmp_path):
    file = Path(shutil.copy(find_parts(folders["comfy"])["dit"].files[0], tmp_path / "dit.safetensors"))
    dit = load_one("dit", file)
    before = run("dit", dit)[0]
    with file.open("r+b") as stream:
        stream.write(bytes(file.stat().st_size))
    assert run("dit", dit)[0].equal(before)


# Refusals: one line each, with the tensor and the file.


def refuses(kind: str, path: Path, pattern: str, dtype: torch.dtype = torch.float32) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=pattern) as caught:
        load_one(kind, path, dtype)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.fixture
def broken(folders: dict[str, Path], tmp_path: Path):
    """broken(kind, edit): a copy of the Hugging Face-named file of one part, after edit(its tensors)."""

    def make(kind: str, edit) -> Path:
        file = find_parts(folders["comfy"])[kind].files[0]
        tensors = {name.removeprefix("model.diffusion_model."): tensor for name, tensor in load_file(file).items()}
        edit(tensors)
        save_file(tensors, tmp_path / "broken.safetensors", {"config": json.dumps({"dim": 42, "num_heads": 3})})
        return tmp_path / "broken.safetensors"

    return make


def swap(tensors: dict, name: str, change) -> None:
    tensors[name] = change(tensors[name]).contiguous()


ONE_NAN = "blocks.1.ffn.0.bias"
REFUSALS = {
    "missing": (
        "dit",
        lambda t: t.pop("blocks.1.self_attn.q.weight"),
        r"1 tensors missing: blocks.1.self_attn.q.weight",
    ),
    "many missing": (
        "dit",
        lambda t: [t.pop(k) for k in list(t) if "blocks.1.cross" in k],
        r"10 tensors .* and 7 more",
    ),
    "first missing": ("dit", lambda t: t.pop("patch_embedding.weight"), r"tensor 'patch_embedding.weight' is missing"),
    "unexpected": ("dit", lambda t: t.update(k_img=torch.ones(1)), r"1 tensors unexpected: k_img in .*broken"),
    "shape": (
        "dit",
        lambda t: swap(t, "blocks.2.ffn.2.weight", lambda x: x.T),
        r"blocks.2.ffn.2.weight \(70, 42\), not ",
    ),
    "nan": ("dit", lambda t: t[ONE_NAN].__setitem__(3, torch.nan), rf"{ONE_NAN} is not finite"),
    "infinite": ("dit", lambda t: t["head.modulation"].fill_(-torch.inf), r"head.modulation is not finite"),
    "zero embedding": ("text_encoder", lambda t: t["shared.weight"].zero_(), r"shared.weight is all zero"),
    "zero matrix": ("dit", lambda t: t["head.head.weight"].zero_(), r"head.head.weight is all zero"),
    "no embedding": ("text_encoder", lambda t: t.pop("shared.weight"), r"tensor 'token_embedding.weight' is missing"),
    "fp8": ("dit", lambda t: swap(t, "blocks.0.ffn.0.weight", lambda x: x.to(torch.float8_e4m3fn)), r"fp8 .*1.3B_fp16"),
    "fp8 scale": (
        "text_encoder",
        lambda t: t.update(scaled_fp8=torch.ones(2)),
        r"fp8 .* get .*umt5_xxl_fp16.safetensors",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_tensors_are_refused(case, broken):
    kind, edit, pattern = REFUSALS[case]
    refuses(kind, broken(kind, edit), pattern)


def test_zero_biases_are_fine(broken):
    file = broken("dit", lambda tensors: tensors["head.head.bias"].zero_())
    assert not load_one("dit", file).head.head.bias.any()


def test_a_dtype_too_narrow_is_refused(broken):
    file = broken("dit", lambda tensors: tensors["blocks.0.ffn.0.bias"].fill_(1e6))
    load_one("dit", file, torch.bfloat16)
    refuses("dit", file, "blocks.0.ffn.0.bias is not finite as torch.float16", torch.float16)


@pytest.mark.parametrize("keep", [4, 2000, -1])
def test_truncated_safetensors_are_refused(keep, broken):
    file = broken("dit", lambda tensors: None)
    file.write_bytes(file.read_bytes()[:keep])
    refuses("dit", file, "broken.safetensors cannot be read, is it truncated?")


def test_pickles_that_run_code_are_refused(tmp_path):
    torch.save({"encoder.conv1.weight": print}, tmp_path / "vae.pth")
    refuses("vae", tmp_path, "vae.pth cannot be read")


def test_two_copies_are_refused(folders, tmp_path):
    file = find_parts(folders["comfy"])["vae"].files[0]
    shutil.copy(file, tmp_path / "fp32.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, tmp_path / "bf16.safetensors")
    refuses("vae", tmp_path, r"bf16.safetensors and .*fp32.safetensors both hold \S+: remove one")
    refuses("vae", tmp_path / "bf16.safetensors", "z_dim=4 .* got 16 and 16; is its config.json beside it")
    (tmp_path / "config.json").write_text(json.dumps({"vae": {"mean": [0] * 4, "std": [1] * 4}}))
    assert load_one("vae", tmp_path / "bf16.safetensors").config.std == (1,) * 4


def test_two_layouts_in_one_folder_are_refused(folders, tmp_path):
    for layout in ("comfy", "original"):
        shutil.copy(find_parts(folders[layout])["text_encoder"].files[0], tmp_path)
    refuses("text_encoder", tmp_path, r"models_t5_umt5.pth and .*umt5.safetensors both hold")


@pytest.mark.parametrize("layout", ["shards", "original"])
def test_a_lost_shard_is_named(layout, folders, tmp_path):
    shards = find_parts(folders[layout])["dit"].files
    shutil.copytree(shards[0].parent, tmp_path / "dit")
    lost = tmp_path / "dit" / shards[1].name
    lost.unlink()
    refuses("dit", tmp_path, f"missing.*index.json also lists {lost.name}: get what is not there")


def test_a_lost_last_block_is_missed_because_the_config_counts_it(broken):
    file = broken("dit", lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("blocks.2.")])
    assert len(load_one("dit", file).blocks) == 2  # nothing says there was a third
    (file.parent / "config.json").write_text(json.dumps({"dim": 42, "num_heads": 3, "num_layers": 3}))
    refuses("dit", file, "27 tensors missing: blocks.2.modulation")


def test_the_number_of_heads_is_not_guessed(folders, tmp_path):
    save_file(load_file(find_parts(folders["comfy"])["dit"].files[0]), tmp_path / "dit.safetensors")
    with pytest.raises(ValueError, match="dit.safetensors: num_heads is unknown for width 42; is its config.json"):
        load_one("dit", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"dim": 24, "num_heads": 2}))  # of something else
    with pytest.raises(ValueError, match="dit.safetensors: num_heads is unknown for width 42; is its config.json"):
        load_one("dit", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"dim": 42, "num_heads": 7}))
    assert load_one("dit", tmp_path).config.num_heads == 7


def test_the_nearest_config_wins(folders, tmp_path):
    file = tmp_path / "sub/dit.safetensors"
    file.parent.mkdir()
    tensors = load_file(find_parts(folders["comfy"])["dit"].files[0])
    save_file(tensors, file)
    for place, heads in ((tmp_path, 1), (file.parent, 7)):  # above the file, then beside it
        (place / "config.json").write_text(json.dumps({"dim": 42, "num_heads": heads, "text_len": 8 * heads}))
        assert (load_one("dit", file).config.num_heads, load_one("dit", file).config.text_len) == (heads, 8 * heads)
    save_file(tensors, file, {"config": json.dumps({"dim": 42, "num_heads": 3})})  # and in it
    assert load_one("dit", file).config.num_heads == 3
    (file.parent / "config.json").write_text("[]")
    refuses("dit", file.parent, r"config.json should hold a JSON object")


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_part_is_named_with_its_source(kind, tmp_path):
    file = {"dit": "diffusion_pytorch_model.safetensors", "vae": "Wan2.1_VAE.pth", "text_encoder": "models_t5_umt5-xxl"}
    refuses(kind, tmp_path, f"no {kind} in .*get {file[kind]}.* of Wan-AI/Wan2.1-T2V-1.3B")
    refuses(kind, tmp_path / "nowhere", "does not exist")


def test_tokenizer_missing_or_twofold(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer in .* get google/umt5-xxl/tokenizer.json of Wan-AI"):
        load.load_tokenizer(tmp_path)
    file = write_tokenizer(tmp_path / "a/tokenizer.json")
    assert load.load_tokenizer(file).encode("ab") == load.load_tokenizer(tmp_path).encode("ab") == [6, 1]
    write_tokenizer(tmp_path / "b/tokenizer.json")
    with pytest.raises(ValueError, match=r"a/tokenizer.json and .*b/tokenizer.json are both tokenizers"):
        load.load_tokenizer(tmp_path)


# The command line.


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inspect_describes_every_layout(layout, folders, capsys):
    assert load.main([str(folders[layout])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(line.startswith("[ok]") for line in lines)
    naming = {"diffusers": "Diffusers", "shards": "Diffusers"}.get(layout, "original")
    assert re.search(rf"dit: {naming} names, float32, 81,202 parameters, \S+ GB, .*{layout}", lines[0])


def test_inspect_names_what_to_get(folders, tmp_path, capsys):
    shutil.copytree(folders["original"], tmp_path / "wan")
    (tmp_path / "wan/Wan2.1_VAE.pth").unlink()
    assert load.main([str(tmp_path / "wan")]) == 1
    vae = capsys.readouterr().out.splitlines()[1]
    assert vae.startswith("[missing] vae: no vae in")
    for source in ("Wan2.1_VAE.pth of Wan-AI/", "vae/ of Wan-AI/", "vae/wan_2.1_vae.safetensors of Comfy-Org/"):
        assert source in vae


def test_inspect_reports_a_broken_part(broken, capsys):
    assert load.main([str(broken("dit", lambda tensors: tensors.pop("blocks.1.norm3.bias")))]) == 1
    assert re.match(r"\[broken\]  dit: .* 1 tensors missing: blocks.1.norm3.bias", capsys.readouterr().out)


def test_compare_finds_the_perturbed_block(folders, broken, capsys):
    assert load.main(["--compare", str(folders["original"]), str(folders["shards"])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and all(re.match(r"\[ok\] +\S+ +max=0.0e\+00 mean=0.0e\+00", line) for line in lines)
    file = broken("dit", lambda tensors: tensors["blocks.1.cross_attn.v.bias"].add_(0.01))
    assert load.main(["--compare", str(folders["original"]), str(file)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"\[diff\] blocks.1 +max=\d.\de-0\d mean=", lines[-2]) and lines[-1] == "first difference: blocks.1"
    assert all(line.startswith("[ok]") for line in lines[:-2]) and lines[-3].split()[1] == "blocks.0"


def test_compare_refuses_different_sizes(folders, broken, capsys):
    file = broken("dit", lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("blocks.2.")])
    assert load.main(["--compare", str(file), str(folders["comfy"])]) == 2
    assert "different sizes" in capsys.readouterr().err


def test_errors_are_one_line_and_status_two(tmp_path):
    (tmp_path / "dit.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    command = [sys.executable, "-m", "wan_mini.load", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(load.__file__).parents[1])
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: .*dit.safetensors cannot be read, is it truncated\? .*\n", done.stderr)
