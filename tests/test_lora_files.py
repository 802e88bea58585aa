"""LoRA files in three dialects, merged while loading, against closed forms and Diffusers' names; every key counts."""

import json
import shutil

import pytest
import torch
from layout_folders import load_one, run
from safetensors.torch import load_file, save_file

from wan_mini.checkpoint import read_checkpoint
from wan_mini.config import DiTConfig
from wan_mini.dit import WanDiT
from wan_mini.errors import MissingFile, UserError
from wan_mini.layouts import LAYOUTS, rename
from wan_mini.load import load_dit, load_wan
from wan_mini.lora_files import Change, LoraFile, parse_lora, read_loras

SIZES = DiTConfig(dim=48, ffn_dim=96, num_heads=2, num_layers=2, freq_dim=32, text_dim=16, text_len=64)
LINEAR = ("blocks.0.self_attn.q", "blocks.1.cross_attn.o", "blocks.1.ffn.2", "time_projection.1", "head.head")
RANK = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A DiT in a file, and its state."""
    torch.manual_seed(5)
    dit = WanDiT(SIZES)
    file = tmp_path_factory.mktemp("base") / "dit.safetensors"
    save_file(dit.state_dict(), file, {"config": json.dumps({"dim": 48, "num_heads": 2})})
    return file, {name: tensor.clone() for name, tensor in dit.state_dict().items()}


def matrices(state, modules=LINEAR) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{module: (up, down)}, random."""
    result = {}
    for module in modules:
        out, columns = state[f"{module}.weight"].flatten(1).shape
        result[module] = torch.randn(out, RANK), torch.randn(RANK, columns)
    return result


def merged(base, tmp_path, tensors, strength=1.0) -> dict[str, torch.Tensor]:
    file, _ = base
    save_file(tensors, tmp_path / "lora.safetensors")
    dit = load_dit(file, device="cpu", dtype=torch.float32, loras=[LoraFile(tmp_path / "lora.safetensors", strength)])
    return dit.state_dict()


def expect(base, got, differences: dict[str, torch.Tensor]) -> None:
    """Each parameter is the base's plus its difference, and all others are untouched."""
    _, before = base
    for name, tensor in before.items():
        if name in differences:
            assert differences[name].abs().max() > 0.1
            torch.testing.assert_close(
                got[name], tensor + differences[name].reshape(tensor.shape), rtol=1e-5, atol=1e-5
            )
        else:
            assert torch.equal(got[name], tensor), name


def peft(parts) -> dict[str, torch.Tensor]:
    tensors = {}
    for module, (up, down) in parts.items():
        tensors |= {f"diffusion_model.{module}.lora_A.weight": down, f"diffusion_model.{module}.lora_B.weight": up}
    return tensors


def products(parts, factor: float) -> dict[str, torch.Tensor]:
    return {f"{module}.weight": factor * up @ down for module, (up, down) in parts.items()}


def test_peft_with_original_names(base, tmp_path):
    parts = matrices(base[1])
    expect(base, merged(base, tmp_path, peft(parts), 0.7), products(parts, 0.7))


def test_peft_with_the_names_of_diffusers(base, tmp_path):
    """Diffusers' norm2 is our norm3; a file of its names must not reach our norm2."""
    theirs = {"attn1.to_q": "self_attn.q", "attn2.to_out.0": "cross_attn.o", "ffn.net.0.proj": "ffn.0"}
    parts, tensors = matrices(base[1], [f"blocks.1.{ours}" for ours in theirs.values()]), {}
    for (their, _), (up, down) in zip(theirs.items(), parts.values(), strict=True):
        tensors |= {
            f"transformer.blocks.1.{their}.lora_A.weight": down,
            f"transformer.blocks.1.{their}.lora_B.weight": up,
        }
    norm = torch.randn(48)
    tensors["transformer.blocks.1.norm2.diff"] = norm
    expect(base, merged(base, tmp_path, tensors), products(parts, 1.0) | {"blocks.1.norm3.weight": norm})


def test_kohya_with_alpha(base, tmp_path):
    """The factor is strength x alpha / rank."""
    parts, tensors = matrices(base[1]), {}
    for module, (up, down) in parts.items():
        name = "lora_unet_" + module.replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.5)}
    expect(base, merged(base, tmp_path, tensors, -2.0), products(parts, -2.0 * 1.5 / RANK))


def test_lightx2v_with_differences(base, tmp_path):
    parts, tensors, differences = matrices(base[1], LINEAR[:2]), {}, {}
    for module, (up, down) in parts.items():
        tensors |= {f"diffusion_model.{module}.lora_down.weight": down, f"diffusion_model.{module}.lora_up.weight": up}
    kinds = {"diff": "weight", "diff_b": "bias", "diff_m": "modulation"}
    for kind, modules in {
        "diff": ("patch_embedding", "blocks.0.norm3", "blocks.1.self_attn.norm_k", "head.head"),
        "diff_b": ("blocks.0.self_attn.q", "time_embedding.0"),
        "diff_m": ("blocks.1", "head"),
    }.items():
        for module in modules:
            difference = torch.randn(base[1][f"{module}.{kinds[kind]}"].shape)
            tensors[f"diffusion_model.{module}.{kind}"] = difference
            differences[f"{module}.{kinds[kind]}"] = 0.5 * difference
    expect(base, merged(base, tmp_path, tensors, 0.5), products(parts, 0.5) | differences)


def test_a_convolution(base, tmp_path):
    up, down = torch.randn(48, RANK, 1, 1, 1), torch.randn(RANK, 16, 1, 2, 2)
    tensors = {"diffusion_model.patch_embedding.lora_down.weight": down}
    tensors["diffusion_model.patch_embedding.lora_up.weight"] = up
    difference = torch.einsum("or,rixyz->oixyz", up[..., 0, 0, 0], down)
    expect(base, merged(base, tmp_path, tensors), {"patch_embedding.weight": difference})


def test_two_files_add_up_and_are_rounded_once(base, tmp_path):
    file, before = base
    loras, total = [], before["blocks.0.self_attn.q.weight"].double()
    for number, strength in enumerate((1.0, 0.25)):
        parts = matrices(before, LINEAR[:1])
        save_file(peft(parts), tmp_path / f"{number}.safetensors")
        loras.append(LoraFile(tmp_path / f"{number}.safetensors", strength))
        up, down = parts[LINEAR[0]]
        total = total + strength * up.double() @ down.double()
    got = load_dit(file, device="cpu", dtype=torch.bfloat16, loras=loras).blocks[0].self_attn.q.weight
    assert got.dtype == torch.bfloat16
    assert ((got.double() - total).abs() <= total.abs() * 2**-8 + 1e-5).all()  # half a unit of 8 bits


def test_the_same_file_for_every_layout(folders, tmp_path):
    """A LoRA in our names changes a checkpoint in Diffusers' names just as much."""
    state = load_one("dit", folders["comfy"]).state_dict()
    save_file(peft(matrices(state, LINEAR[:3])), tmp_path / "lora.safetensors")
    outputs = []
    for layout in ("comfy", "shards"):
        lora = [LoraFile(tmp_path / "lora.safetensors")]
        outputs.append(run("dit", load_dit(folders[layout], device="cpu", dtype=torch.float32, loras=lora))[0])
    assert torch.equal(*outputs)
    assert (outputs[0] - run("dit", load_one("dit", folders["comfy"]))[0]).abs().max() > 1e-3


def test_diffusers_reads_the_same_names(base):
    """Its own conversion of a PEFT file in the original's names, beside our table."""
    lora = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    parts = matrices(
        base[1], [f"blocks.{i}.{m}" for i in (0, 1) for m in ("self_attn.k", "cross_attn.v", "ffn.0", "ffn.2")]
    )
    theirs = lora._convert_non_diffusers_wan_lora_to_diffusers(dict(peft(parts)))
    modules = {key.removeprefix("transformer.").rpartition(".lora_")[0] for key in theirs}
    ours = rename(LAYOUTS[0], [f"{module}.weight" for module in modules])
    assert set(ours.values()) == {f"{module}.weight" for module in parts}


Q = "diffusion_model.blocks.0.self_attn.q"
REFUSED = {
    "a stranger": (
        lambda t: t.update({"diffusion_model.blocks.9.ffn.0.lora_A.weight": torch.ones(3, 48)}),
        "1 of 11 keys fit no",
    ),
    "text encoder": (
        lambda t: t.update({"lora_te_blocks_0_attn_q.lora_up.weight": torch.ones(3, 48)}),
        "lora_te_blocks_0",
    ),
    "dora": (lambda t: t.update({f"{Q}.dora_scale": torch.ones(48)}), "1 of 11 keys fit no weight .*dora_scale"),
    "one half": (
        lambda t: t.pop(f"{Q}.lora_B.weight"),
        "blocks.0.self_attn.q.weight needs up and down, .*got only down",
    ),
    "alpha alone": (
        lambda t: t.update({"diffusion_model.blocks.0.ffn.0.alpha": torch.ones(1)}),
        "ffn.0.weight needs up",
    ),
    "two ranks": (
        lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 48)}),
        r"up \(48, 3\) and down \(4, 48\), of two",
    ),
    "other width": (
        lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(3, 64)}),
        r"for a tensor \(48, 64\), .*\(48, 48\)",
    ),
    "twice": (
        lambda t: t.update({"lora_unet_blocks_0_self_attn_q.lora_up.weight": torch.ones(48, 3)}),
        "comes a second time",
    ),
    "not finite": (lambda t: t[f"{Q}.lora_A.weight"].fill_(torch.nan), "blocks.0.self_attn.q.weight is not finite"),
    "nothing": (lambda t: t.clear(), "0 of 0 keys"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_every_key_is_accounted_for(case, base, tmp_path):
    edit, pattern = REFUSED[case]
    tensors = peft(matrices(base[1]))
    edit(tensors)
    with pytest.raises(UserError, match=pattern) as caught:
        merged(base, tmp_path, tensors)
    assert "\n" not in str(caught.value) and ".safetensors" in str(caught.value)


def test_the_flag_takes_a_strength(tmp_path):
    file = tmp_path / "a:b.safetensors"
    file.touch()
    assert parse_lora(str(file)) == LoraFile(file, 1.0)
    assert parse_lora(f"{file}:0.8") == LoraFile(file, 0.8)
    for strength in (0.8, 1 / 3, 12.3456789):  # a run that goes on, goes on with the very same
        assert str(parse_lora(f"{file}:{strength}")) == f"{file}:{strength}"
    for text, pattern in ((f"{file}:much", "FILE:STRENGTH, got"), (f"{file}:nan", "strength from"), ("", "no file")):
        with pytest.raises(UserError, match=pattern):
            parse_lora(text)
    with pytest.raises(MissingFile, match="no file nowhere"):
        parse_lora("nowhere:1")


def test_a_lora_among_the_checkpoints_files_is_no_part_of_it(folder, tmp_path):
    """It is passed over, and its hash is kept where it is used."""
    shutil.copytree(folder, tmp_path / "model")
    plain = load_wan(tmp_path / "model", device="cpu", dtype=torch.float32)
    lora = tmp_path / "model" / "style.safetensors"
    save_file(peft(matrices(plain.dit.state_dict(), LINEAR[:2])), lora)
    again = load_wan(tmp_path / "model", device="cpu", dtype=torch.float32)
    assert again.hashes == plain.hashes and torch.equal(again.dit.head.head.weight, plain.dit.head.head.weight)
    styled = load_wan(tmp_path / "model", device="cpu", dtype=torch.float32, loras=[LoraFile(lora)])
    assert styled.hashes.keys() - plain.hashes.keys() == {"lora 1: style.safetensors"}
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "style.safetensors"
    save_file(peft(matrices(plain.dit.state_dict(), LINEAR[2:3])), other)
    both = load_wan(tmp_path / "model", device="cpu", dtype=torch.float32, loras=[LoraFile(lora), LoraFile(other)])
    assert both.hashes.keys() - styled.hashes.keys() == {"lora 2: style.safetensors"}
    assert not torch.equal(styled.dit.blocks[0].self_attn.q.weight, plain.dit.blocks[0].self_attn.q.weight)
    assert "dit" not in read_checkpoint(lora).parts


def test_files_are_read_once_for_weightless_modules(base, tmp_path):
    parts = matrices(base[1])
    save_file(peft(parts), tmp_path / "lora.safetensors")
    with torch.device("meta"):
        dit = WanDiT(SIZES)
    changes = read_loras([LoraFile(tmp_path / "lora.safetensors")], dit)
    assert changes.keys() == {f"{module}.weight" for module in parts}
    assert load_file(tmp_path / "lora.safetensors").keys() == peft(parts).keys()


@pytest.mark.parametrize(
    "tensors",
    [
        {"up": torch.ones(4, 2), "down": torch.ones(3)},
        {"up": torch.ones(4, 0), "down": torch.ones(0, 3), "alpha": torch.ones(())},
        {"up": torch.ones(4, 2), "down": torch.ones(2, 3), "alpha": torch.ones(2)},
    ],
)
def test_shapes_that_are_no_matrices_are_refused(tensors):
    with pytest.raises(UserError, match="needs matrices up and down of a rank above 0, and one alpha"):
        Change("file: q", 1.0, tensors).check((4, 3))
