"""Adapters: where they sit, what is trained and saved, files in and out, merging, several ranks, resuming."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cached import make_clip
from motionloom.backbones import FAMILIES, build_backbone
from motionloom.cli.assemble import load_model
from motionloom.config.recipe import LoraConfig, ModelConfig
from motionloom.errors import UserError
from motionloom.parallel import Ranks, named_state
from motionloom.plans import Stream, full
from motionloom.rng import torch_generator
from motionloom.train import checkpoint
from motionloom.train.lora import (
    Adapter,
    add_lora,
    choose_modules,
    fingerprint,
    layer_shapes,
    merge_into_base,
    merged,
    merged_together,
    started,
)
from motionloom.train.lora_files import (
    Layout,
    Notes,
    checkpoint_adapters,
    read_lora,
    read_notes,
    write_lora,
)
from motionloom.train.parts import train_only
from published import TINY
from test_cli import call
from test_resume import finish, kill_after, same_tensors, start
from toy_training import ToyBackbone, ToyLoader, metrics, toy_denoise, toy_recipe, toy_trainer

LORA = {
    "lora__enabled": True,
    "lora__base": "toy",
    "lora__rank": 2,
    "lora__alpha": 5.0,
    "lora__targets": ["!layers.0.down", "layers", "tokens"],
}
ADAPTED = {"layers.0.up", "layers.1.up", "layers.1.down", "tokens"}
WAN = FAMILIES["wan"]
both_kinds = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(4, 4), nn.Linear(4, 4)
        self.to_out = nn.ModuleList([nn.Linear(4, 4), nn.Dropout(0.0)])

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out[0](torch.tanh(self.to_q(x)) * self.to_k(x))


class Net(nn.Module):
    """Names as the published models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"attn1": Attention(), "audio_attn1": Attention(), "up": nn.Linear(4, 6)})
            for _ in range(2)
        )
        self.out = nn.Linear(6, 3)
        for name, p in self.named_parameters():
            nn.init.normal_(p, 0, 0.5, generator=torch_generator("net", name))

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["attn1"](x) + layer["audio_attn1"](x)
        return self.out(self.layers[1]["up"](x))


def config(*targets: str, **options: Any) -> LoraConfig:
    return LoraConfig(
        **{"enabled": True, "rank": 2, "alpha": 5.0, "targets": targets or ("attn1", "up"), **options}
    )


def adapted(*targets: str, seed: int = 0, **options: Any) -> Net:
    """With adapters as after some training."""
    net = Net()
    add_lora(net, config(*targets, **options), torch_generator("lora", seed))
    for name, p in net.named_parameters():
        if p.requires_grad:
            nn.init.normal_(p, float("magnitude" in name), 0.3, generator=torch_generator(seed, name))
    return net


def adapters_of(net: nn.Module) -> dict[str, Adapter]:
    trained = {f"backbone.{name}": p.detach() for name, p in net.named_parameters() if ".lora_" in name}
    return checkpoint_adapters(trained, 5.0)


def far(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def x() -> Tensor:
    return torch.randn(5, 4, generator=torch_generator("x"))


# --- where adapters sit -------------------------------------------------------------------------------------


def test_a_pattern_is_parts_of_a_name_and_the_first_that_fits_decides() -> None:
    chosen = choose_modules(Net(), ["!layers.0.attn1.to_k", "attn1", "audio_attn1.to_out.0", "u*", "out"])
    assert {pattern: len(names) for pattern, names in chosen.items()} == {
        "!layers.0.attn1.to_k": 1,
        "attn1": 5,
        "audio_attn1.to_out.0": 2,
        "u*": 2,
        "out": 1,
    }
    assert chosen["out"] == ("out",), "to_out is another name"
    assert not any("audio" in name for name in chosen["attn1"])


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["to_v"], r"to_v fits no linear layer of this model; near are .*to_k"),
        (["atn1.to_q"], r"near are attn1\.to_q"),
        (["zzz"], r"near are out, to_k, to_out\.0, to_q, up"),
        (["to_out.1"], "fits no linear layer"),
        (["attn1", "!layers.0.attn1"], "only fits what patterns before it have decided: move it up"),
        (["attn1", "attn1.to_q"], "only fits what patterns before it have decided"),
        (["!attn1"], "lora.targets only leaves out"),
    ],
)
def test_a_pattern_that_chooses_nothing_is_refused(targets: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        add_lora(Net(), config(*targets), torch_generator("lora"))


@both_kinds
def test_fresh_adapters_change_nothing_and_are_all_that_is_trained(dora: bool) -> None:
    net, plain = Net(), Net()
    before = torch.get_rng_state()
    rows = add_lora(net, config("!layers.0.up", "up", "attn1", dora=dora), torch_generator("lora"))
    assert torch.equal(torch.get_rng_state(), before), "the global generator is not drawn from"
    torch.testing.assert_close(net(x()), plain(x()), rtol=0, atol=1e-6 if dora else 0)
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    assert all(".lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert [(row.pattern, len(row.modules)) for row in rows] == [("!layers.0.up", 1), ("up", 1), ("attn1", 6)]
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in trained.values())
    assert rows[1].parameters == 2 * (4 + 6) + (6 if dora else 0)
    net(x()).sum().backward()
    assert all(p.grad is None for name, p in net.named_parameters() if name not in trained)
    assert net.blocks() == list(net.layers)


def test_first_values_follow_the_generator_and_the_recipe() -> None:
    def first(init: str, seed: int) -> Tensor:
        net = Net()
        add_lora(net, config(init=init), torch_generator("lora", seed))
        return adapters_of(net)["layers.0.up"].down_RI

    assert torch.equal(first("kaiming", 1), first("kaiming", 1))
    assert not torch.equal(first("kaiming", 1), first("kaiming", 2))
    assert first("kaiming", 1).abs().max() <= 4**-0.5
    assert first("gaussian", 1).std() == pytest.approx(0.5, rel=0.7)


def test_a_half_precision_base_gives_the_same_under_autocast() -> None:
    whole, half = Net(), Net()
    for net, dtype in ((whole, None), (half, torch.bfloat16)):
        add_lora(net, config(), torch_generator("lora"), dtype)
    layer = half.layers[0]["attn1"].to_q
    assert layer.base_layer.weight.dtype == torch.bfloat16
    assert layer.lora_A["default"].weight.dtype == torch.float32
    assert half.out.weight.dtype == torch.float32, "outside of the blocks nothing is cast"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(whole(x()), half(x()))


def test_blocks_with_adapters_compile_without_a_break() -> None:
    net = adapted()
    wanted = [layer["attn1"](x()) for layer in net.layers]
    for layer, want in zip(net.layers, wanted, strict=True):
        compiled = torch.compile(layer["attn1"], backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x()), want)


# --- merging ------------------------------------------------------------------------------------------------


@both_kinds
def test_merged_weights_answer_alike_and_come_back_to_the_bit(dora: bool) -> None:
    net = adapted(dora=dora)
    wanted, before = net(x()), {name: t.clone() for name, t in net.state_dict().items()}
    assert (wanted - Net()(x())).abs().max() > 0.1
    with merged(net):
        assert far(net(x()), wanted) < 1e-6
        assert not torch.equal(net.layers[0]["up"].weight, before["layers.0.up.base_layer.weight"])
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    torch.testing.assert_close(net(x()), wanted, rtol=0, atol=0)


@both_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_strength_goes_from_the_base_to_the_whole_adapter(dora: bool, dtype: torch.dtype) -> None:
    """0 is the base to the bit, 1 what was trained, and between them the way is straight."""
    trained = adapted("attn1", "up", dora=dora)
    files = adapters_of(trained)

    def with_strength(*strengths: float) -> Net:
        net = Net().to(dtype)
        merge_into_base(net, [(files, strength) for strength in strengths])
        return net

    base, none = Net().to(dtype).state_dict(), with_strength(0.0, 0.0).state_dict()
    assert all(torch.equal(t, base[name]) for name, t in none.items())
    if dtype == torch.float32:
        assert far(with_strength(1.0)(x()), trained(x())) < 1e-6
        whole, half = (with_strength(s).layers[0]["up"].weight.detach() for s in (1.0, 0.5))
        torch.testing.assert_close(half, (whole + base["layers.0.up.weight"]) / 2)
        assert far(with_strength(0.5, 0.5)(x()), with_strength(1.0)(x())) < 1e-6


def test_a_base_in_bfloat16_comes_back_to_the_bit_as_well() -> None:
    net = Net()
    add_lora(net, config(), torch_generator("lora"), torch.bfloat16)
    nn.init.normal_(net.layers[0]["up"].lora_B["default"].weight, generator=torch_generator("b"))
    before = net.layers[0]["up"].base_layer.weight.clone()
    with merged(net):
        assert not torch.equal(net.layers[0]["up"].base_layer.weight, before)
    assert torch.equal(net.layers[0]["up"].base_layer.weight, before)


@both_kinds
def test_merging_for_good_leaves_the_plain_network(dora: bool) -> None:
    net = adapted(dora=dora)
    wanted, adapters = net(x()), adapters_of(net)
    merge_into_base(net)
    assert net.state_dict().keys() == Net().state_dict().keys()
    assert far(net(x()), wanted) < 1e-6
    by_hand = Net()
    for name, adapter in adapters.items():
        layer = by_hand.get_submodule(name)
        layer.weight.data = adapter.merged(layer.weight.data)
    assert far(by_hand(x()), wanted) < 1e-6


def test_several_loras_add_up_by_their_strengths() -> None:
    first, second = (
        adapters_of(adapted("attn1", seed=1)),
        adapters_of(adapted("attn1.to_q", "up", rank=3, seed=2)),
    )
    net, by_hand = Net(), Net()
    files = ((first, 0.8), (second, -1.5))
    for adapters, strength in files:
        for name, one in adapters.items():
            weight = by_hand.get_submodule(name).weight
            weight.data += strength * change(one)
    with merged(net, files):
        assert far(net(x()), by_hand(x())) < 1e-6
    assert all(torch.equal(t, Net().state_dict()[name]) for name, t in net.state_dict().items())
    merge_into_base(net, files)
    assert far(net(x()), by_hand(x())) < 1e-6


@pytest.mark.parametrize("order", [(True, False), (False, True), (True, True)])
def test_dora_beside_others_is_the_same_in_memory_and_in_files(order: tuple[bool, bool]) -> None:
    """Whatever the order, each adapter stands beside the bare base."""
    files = [(adapters_of(adapted("up", seed=i, dora=dora)), 1.0 - 0.5 * i) for i, dora in enumerate(order)]
    net, by_hand = Net(), Net()
    for name in files[0][0]:
        weight = by_hand.get_submodule(name).weight
        weight.data = merged_together(weight.data, [(a[name], strength) for a, strength in reversed(files)])
    merge_into_base(net, files)
    assert far(net(x()), by_hand(x())) < 1e-6


def test_a_merge_that_fails_half_way_leaves_the_base_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    net = adapted()
    wanted, before = net(x()), {name: t.clone() for name, t in net.state_dict().items()}
    turns = iter(range(3))

    def fail_at_last(weight: Tensor, adapters: Any) -> Tensor:
        if next(turns) == 2:
            raise MemoryError("none left")
        return torch.zeros_like(weight)

    monkeypatch.setattr("motionloom.train.lora.merged_together", fail_at_last)
    with pytest.raises(MemoryError), merged(net):
        pass
    assert torch.equal(net(x()), wanted)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


# --- files --------------------------------------------------------------------------------------------------

WAN_LAYERS = ("blocks.0.attn1.to_q", "blocks.11.attn2.to_out.0", "blocks.1.ffn.net.0.proj")


def some_adapters(alpha: float = 5.0, rank: int = 2) -> dict[str, Adapter]:
    def draw(*shape: int, key: str) -> Tensor:
        return torch.randn(shape, generator=torch_generator("adapter", key, *shape))

    return {name: Adapter(draw(rank, 4, key=name), draw(6, rank, key=name), alpha) for name in WAN_LAYERS}


def change(one: Adapter) -> Tensor:
    """What is added to a weight: all that a file must keep."""
    return one.alpha / one.rank * one.up_OR @ one.down_RI


@pytest.mark.parametrize("family", ["wan", "ltx2"])
@pytest.mark.parametrize("layout", ["diffusers", "comfyui"])
def test_files_keep_what_is_added_where_alpha_is_not_the_rank(
    layout: Any, family: str, tmp_path: Path
) -> None:
    wrote, file = some_adapters(), tmp_path / "new" / "lora.safetensors"
    keys = FAMILIES[family].original_keys
    write_lora(file, wrote, layout, family=family, original=keys, notes={"base": "somewhere"})
    read = read_lora(file, WAN_LAYERS, keys)
    assert read.keys() == wrote.keys()
    for name in wrote:
        torch.testing.assert_close(change(read[name]), change(wrote[name]), rtol=1e-6, atol=1e-6)
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["base"] == "somewhere"


def test_the_comfyui_layout_has_the_authors_names_and_alpha_beside(tmp_path: Path) -> None:
    write_lora(
        tmp_path / "a.safetensors", some_adapters(), "comfyui", family="wan", original=WAN.original_keys
    )
    tensors = load_file(tmp_path / "a.safetensors")
    assert float(tensors["diffusion_model.blocks.11.cross_attn.o.alpha"]) == 5.0
    assert "diffusion_model.blocks.1.ffn.0.lora_A.weight" in tensors
    assert "diffusion_model.blocks.0.self_attn.q.lora_B.weight" in tensors


def test_layers_of_other_ranks_and_alphas_are_named_in_the_header(tmp_path: Path) -> None:
    wrote = {**some_adapters(), WAN_LAYERS[1]: some_adapters(alpha=1.0, rank=3)[WAN_LAYERS[1]]}
    write_lora(tmp_path / "a.safetensors", wrote, "diffusers")
    read = read_lora(tmp_path / "a.safetensors", WAN_LAYERS)
    assert {name: (one.rank, one.alpha) for name, one in read.items()} == {
        name: (one.rank, one.alpha) for name, one in wrote.items()
    }


@pytest.mark.parametrize(
    "prefix", ["transformer.", "diffusion_model.", "base_model.model.", "lora_unet_", ""]
)
@pytest.mark.parametrize("names", [("lora_A", "lora_B"), ("lora_down", "lora_up")])
def test_files_of_other_trainers_are_read(prefix: str, names: tuple[str, str], tmp_path: Path) -> None:
    wrote, tensors = some_adapters(), {}
    for name, one in wrote.items():
        layer = prefix + (name.replace(".", "_") if prefix == "lora_unet_" else name)
        tensors |= {f"{layer}.{names[0]}.weight": one.down_RI, f"{layer}.{names[1]}.weight": one.up_OR}
        tensors[f"{layer}.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "a.safetensors")
    read = read_lora(tmp_path / "a.safetensors", WAN_LAYERS, WAN.original_keys)
    assert {name: one.alpha for name, one in read.items()} == dict.fromkeys(WAN_LAYERS, 1.0)
    save_file({k: t for k, t in tensors.items() if "alpha" not in k}, tmp_path / "b.safetensors")
    read = read_lora(tmp_path / "b.safetensors", WAN_LAYERS, WAN.original_keys)
    assert {one.alpha for one in read.values()} == {2.0}, "without alpha it is the rank"


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_files_by_peft_itself_act_as_peft_says(options: dict[str, bool], tmp_path: Path) -> None:
    """Ranks and alphas of their own for some layers, in peft's folder and in diffusers' single file."""
    import peft

    patterns = {"rank_pattern": {"layers.0.attn1.to_q": 3}, "alpha_pattern": {"to_q": 1.5, "up": 4}}
    wish = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["to_q", "up"], **patterns, **options)
    theirs = peft.get_peft_model(Net(), wish)
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, float("magnitude" in name), 0.3, generator=torch_generator(name))
    theirs.save_pretrained(str(tmp_path))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    settings = {f"transformer.{k}": v for k, v in wish.to_dict().items() if isinstance(v, int | float | dict)}
    header = {"lora_adapter_metadata": json.dumps(settings)}
    plain = {f"transformer.{name.removeprefix('base_model.model.')}": t for name, t in tensors.items()}
    save_file(plain, tmp_path / "one.safetensors", metadata=header)
    for file in ("one.safetensors", "adapter_model.safetensors"):
        read = read_lora(tmp_path / file, layer_shapes(Net()))
        assert {one.rank for one in read.values()} == {2, 3}
        with merged(net := Net(), [(read, 1.0)]):
            assert far(net(x()), theirs(x())) < 1e-6
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter_config\.json beside it cannot be read"):
        read_lora(tmp_path / "adapter_model.safetensors", layer_shapes(Net()))


def test_rank_stable_scales_and_doubled_layers_are_not_misread(tmp_path: Path) -> None:
    adapters = {"layers.0.up": Adapter(torch.ones(4, 8), torch.ones(8, 4), 8.0)}
    write_lora(tmp_path / "plain.safetensors", adapters, "diffusers")
    tensors = load_file(tmp_path / "plain.safetensors")
    header = {
        "lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8, "transformer.use_rslora": True})
    }
    save_file(tensors, tmp_path / "stable.safetensors", metadata=header)
    (one,) = read_lora(tmp_path / "stable.safetensors", ["layers.0.up"], None).values()
    assert one.alpha / one.rank == pytest.approx(8 / 4**0.5)
    twice = {
        **tensors,
        **{name.replace("transformer", "diffusion_model"): t.clone() for name, t in tensors.items()},
    }
    save_file(twice, tmp_path / "twice.safetensors")
    with pytest.raises(UserError, match=r"adapts layers\.0\.up twice"):
        read_lora(tmp_path / "twice.safetensors", ["layers.0.up"], None)


def test_wrong_files_are_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    good = {"transformer.a.lora_A.weight": torch.ones(2, 4), "transformer.a.lora_B.weight": torch.ones(6, 2)}

    def refused(tensors: dict[str, Tensor], message: str, **header: str) -> None:
        save_file(tensors, file, metadata=header)
        with pytest.raises(UserError, match=message) as caught:
            read_lora(file, ["a"])
        assert "\n" not in str(caught.value)

    refused({"a.weight": torch.ones(2)}, "holds no LoRA")
    refused({k: t for k, t in good.items() if "A" in k}, "the up-projection of a is missing")
    refused({**good, "transformer.a.lora_B.weight": torch.ones(6, 3)}, "do not fit together")
    refused({k.replace(".a.", ".b."): t for k, t in good.items()}, "adapts b, which this model does not have")
    refused(good, "lora_adapter_metadata in its header cannot be read", lora_adapter_metadata="{")
    with pytest.raises(UserError, match="no such file"):
        read_lora(tmp_path / "none.safetensors", ["a"])
    with pytest.raises(UserError, match="comfyui layout is for wan, ltx2"):
        write_lora(file, some_adapters(), "comfyui", family="joint")
    dora = {name: replace(one, magnitude_O=torch.ones(6)) for name, one in some_adapters().items()}
    with pytest.raises(UserError, match="DoRA is not written in the comfyui layout"):
        write_lora(file, dora, "comfyui", family="wan", original=WAN.original_keys)


def test_notes_stand_in_the_header_and_are_read_as_the_ltx_trainer_writes_them(tmp_path: Path) -> None:
    file, notes = tmp_path / "a.safetensors", Notes("models/wan", "ab" * 32, 2, 4)
    write_lora(file, some_adapters(), "diffusers", notes=notes.header())
    assert read_notes(file) == notes
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    assert header["reference_downscale_factor"] == header["reference_spatial_scale_factor"] == "2"
    assert header["reference_temporal_scale_factor"] == "4"
    assert Notes(reference_downscale=1).header() == {"reference_downscale": "1"}
    theirs = {"reference_spatial_scale_factor": "2", "reference_temporal_scale_factor": "3"}
    save_file(load_file(file), file, metadata=theirs)
    assert read_notes(file) == Notes(reference_downscale=2, reference_frame_stride=3)
    save_file(load_file(file), file)
    assert read_notes(file) == Notes()
    for wrong in ("two", "1.5", "0"):
        save_file(load_file(file), file, metadata={"reference_downscale_factor": wrong})
        with pytest.raises(UserError, match="reference_downscale in its header"):
            read_notes(file)


def test_a_continued_adapter_acts_as_the_one_in_the_file() -> None:
    for rank, alpha in ((2, 5.0), (2, 1.0), (3, 7.0)):
        net = Net()
        add_lora(net, config(rank=rank, alpha=alpha), torch_generator("lora"))
        fresh = {name: replace(one, alpha=alpha) for name, one in adapters_of(net).items()}
        for name, given in adapters_of(adapted()).items():
            own = started(fresh[name], given)
            assert (own.rank, own.alpha) == (rank, alpha)
            torch.testing.assert_close(change(own), change(given), rtol=1e-6, atol=1e-6)
            assert bool(own.down_RI.any(dim=1).all()), "what is left of the rank can still learn"
            if (rank, alpha) == (2, 5.0):
                assert torch.equal(own.up_OR, given.up_OR)


# --- every backbone -----------------------------------------------------------------------------------------

TARGETS = {
    "joint": ["!layers.0.qkv", "qkv", "mlp"],
    "joint with sound": ["!audio_block.mlp", "audio_block", "mlp", "audio_to_video.q"],
    "factorized": ["space.qkv", "text.q", "mlp.up"],
    "wan": ["!blocks.0.attn1", "attn1.to_q", "attn2", "ffn"],
    "cogvideox": ["attn1", "!ff.net.0", "ff"],
    "lightning": ["attn.qkv", "!layers.0.mlp", "mlp", "modulation"],
    "ltx2": ["attn1.to_k", "audio_attn1", "audio_to_video_attn", "audio_ff"],
}


def any_backbone(kind: str) -> nn.Module:
    """A tiny one whose every weight matters."""
    if kind in TINY:
        model = FAMILIES[kind].on_meta(FAMILIES[kind].preset(TINY[kind]))
    else:
        sizes = ModelConfig(
            type=kind.split()[0],
            dim=24,
            depth=2,
            num_heads=2,
            window_size=2,
            mlp_ratio=2.0,
            audio_dim=16 if "sound" in kind else 0,
        )
        model = build_backbone(sizes, 4, 5, audio_channels=6, device="meta")
    model.to_empty(device="cpu")
    model.init_weights(torch_generator("backbone"))
    for name, p in model.named_parameters():
        if not p.any():  # adaLN-Zero starts asleep
            nn.init.normal_(p, 0, 0.2, generator=torch_generator("awake", name))
    return model.eval()


def streams_for(model: nn.Module) -> dict[str, Stream]:
    """Two short clips with sound, where the model hears."""
    widths = {"video": getattr(model, "latent_channels", 4) * math.prod(model.patch)}
    widths["text"] = getattr(model, "text_dim", 5)
    if "audio" in model.modalities:
        widths["audio"] = getattr(model, "audio_channels", 6)
    grids = {"video": (3, 2, 4), "audio": (5, 1, 1), "text": (1, 1, 4)}
    streams = {}
    for modality, width in widths.items():
        count = math.prod(grids[modality])
        cells = torch.cartesian_prod(*(torch.arange(side) for side in grids[modality]))[None]
        nothing = torch.zeros(1, count, dtype=torch.long)
        streams[modality] = Stream(
            modality,
            grids[modality],
            torch.randn(2, count, width, generator=torch_generator("streams", modality)),
            sigma_BK=torch.tensor([[0.3], [0.8]]),
            level_BN=nothing,
            position_BN3=cells * torch.tensor([0.25, 8.0, 8.0]),
            cell_BN3=cells,
            scene_BN=nothing,
            chunk_BN=nothing,
            context_BN=nothing.bool(),
            loss_BN=nothing.float() + 1,
            valid_BN=torch.ones(2, count, dtype=torch.bool) if modality == "text" else None,
        )
    return streams


def answer(model: nn.Module, streams: dict[str, Stream]) -> Tensor:
    return torch.cat([t.flatten() for _, t in sorted(model(streams, full).items())])


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", TARGETS)
def test_every_backbone_takes_adapters(kind: str, dora: bool, tmp_path: Path) -> None:
    """Fresh ones change nothing, all that is trained is theirs and learns, a file and back gives the same
    answers, and taking them out again gives the base's bits."""
    model, plain = any_backbone(kind), any_backbone(kind)
    streams = streams_for(model)
    before = answer(plain, streams)
    wish = config(*TARGETS[kind], dora=dora)
    rows = add_lora(model, wish, torch_generator("lora"))
    assert far(answer(model, streams), before) < (1e-5 if dora else 1e-30)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, 0, 0.3, generator=torch_generator("trained", name))
    after = answer(model, streams)
    assert far(after, before) > 0.01
    after.square().sum().backward()
    learns = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    own = {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert learns == own
    assert sum(row.parameters for row in rows) == sum(
        p.numel() for n, p in model.named_parameters() if n in own
    )

    family = FAMILIES.get(kind)
    keys = family.original_keys if family is not None else None
    trained = {f"backbone.{name}": p.detach() for name, p in model.named_parameters() if name in own}
    layouts: list[Layout] = (
        ["diffusers", "comfyui"] if kind in ("wan", "ltx2") and not dora else ["diffusers"]
    )
    for layout in layouts:
        file = tmp_path / f"{layout}.safetensors"
        write_lora(file, checkpoint_adapters(trained, wish.alpha), layout, family=kind, original=keys)
        read = read_lora(file, layer_shapes(plain), keys)
        with merged(plain, [(read, 1.0)]):
            assert far(answer(plain, streams), after) < 1e-6
        assert torch.equal(answer(plain, streams), before)


# --- training -----------------------------------------------------------------------------------------------


def test_checkpoints_averages_and_optimiser_hold_adapters_alone(tmp_path: Path) -> None:
    recipe = toy_recipe(**LORA, max_steps=5)
    method = toy_denoise(recipe, Ranks())
    backbone = method.modules()["backbone"]
    before = {name: p.clone() for name, p in backbone.named_parameters() if not p.requires_grad}
    toy_trainer(recipe, tmp_path, method=method).fit()
    saved = checkpoint.load(tmp_path)
    for name in ("model", "ema"):
        layers = checkpoint_adapters(saved.tensors(name), recipe.lora.alpha)
        assert layers.keys() == ADAPTED
        assert len(saved.tensors(name)) == 2 * len(ADAPTED)
    assert {name.split("/")[1] for name in saved.tensors("optimizer")} == set(saved.tensors("model"))
    assert all(torch.equal(p, before[name]) for name, p in backbone.named_parameters() if name in before)
    moved, first = saved.tensors("model"), toy_denoise(recipe, Ranks()).modules()["backbone"].state_dict()
    assert all(not torch.equal(moved[name], first[name.removeprefix("backbone.")]) for name in moved)


def test_killed_and_resumed_equals_never_stopped(tmp_path: Path) -> None:
    options = {**LORA, "lora__dropout": 0.1, "lora__dora": True, "precision": "bf16", "max_steps": 40}
    options |= {"save_every_steps": 7, "ema__start_step": 10}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    kill_after(
        start(1, "fit", str(killed), json.dumps(options), "--pause", "0.03"), killed, step=16, delay=0.01
    )
    reached = checkpoint.latest(killed)
    assert reached is not None
    assert reached.name == checkpoint.name_of(14)
    for run in (whole, killed):
        recipe = toy_recipe(**options)
        trainer = toy_trainer(recipe, run, heldout=ToyLoader(2, 0, "heldout"))
        assert trainer.fit(resume=run == killed).step == 40
    for name in ("model", "ema", "optimizer"):
        same_tensors(whole, killed, name)
    assert len(metrics(killed)) == 40


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    """DDP and FSDP2 gradients against one process that plays both ranks; then a few steps in mixed dtypes."""
    recipe = {**LORA, "precision": "bf16", "sharding": "fsdp", "max_steps": 3}
    finish(start(2, "compare", str(tmp_path), json.dumps(recipe)))
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["world"] == 2
    assert found["single"]["norm"] > 0.1
    for sharding in ("ddp", "fsdp"):
        assert found[sharding]["same_names"]
        assert found[sharding]["difference"] < 1e-5
    assert len(checkpoint.load(tmp_path).tensors("model")) == 2 * len(ADAPTED)
    assert len(metrics(tmp_path)) == 3


def toy_state(seed: int) -> dict[str, Tensor]:
    return ToyBackbone(seed).state_dict()


def test_a_resume_on_another_base_is_refused(tmp_path: Path) -> None:
    recipe = toy_recipe(**LORA, max_steps=2)
    one, other, again = (fingerprint(state, state.__getitem__) for state in map(toy_state, (0, 1, 0)))
    assert one != other
    assert one == again
    toy_trainer(recipe, tmp_path, base=one).fit()
    longer = toy_recipe(**LORA, max_steps=4)
    with pytest.raises(UserError, match=r"base was lora\.base toy \(sha256 .*\), is .*\. Start it as it was"):
        toy_trainer(longer, tmp_path, base=other).fit(resume=True)
    assert toy_trainer(longer, tmp_path, base=one).fit(resume=True).step == 4


def test_a_run_may_start_from_the_adapters_of_another(tmp_path: Path) -> None:
    toy_trainer(toy_recipe(**LORA, max_steps=5, ema__enabled=False), tmp_path / "first").fit()
    recipe = toy_recipe(**LORA, max_steps=1, lr=1e-12, init_from=str(tmp_path / "first"))
    toy_trainer(recipe, tmp_path / "second").fit()
    a, b = (checkpoint.load(tmp_path / run).tensors("model") for run in ("first", "second"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-6)
    wider = toy_recipe(**{**LORA, "lora__rank": 3}, max_steps=1, init_from=str(tmp_path / "first"))
    with pytest.raises(UserError, match=r"has shape .* the recipe's model wants"):
        toy_trainer(wider, tmp_path / "third").fit()


def test_layers_are_known_by_their_plain_names() -> None:
    assert layer_shapes(adapted()) == layer_shapes(Net())
    assert layer_shapes(Net())["layers.1.up"] == (6, 4)
    assert F.linear(x(), Net().layers[1]["up"].weight).shape == (5, 6)


# --- on a model of one's own, by the commands ---------------------------------------------------------------

OWN = (
    *(
        "model.dim=16",
        "model.depth=2",
        "model.num_heads=2",
        "text_encoder.dim=8",
        "text_encoder.vocab_size=256",
    ),
    *("video={width: 16, height: 16, num_frames: 8, fps: 8}", "train.batch_size=4", "train.warmup_steps=0"),
    *("train.precision=fp32", "train.compile=false", "train.max_steps=3", "train.heldout_fraction=0.3"),
    *("train.optimizer=adamw", "train.lr=1e-2"),
)
ADAPTERS = ("lora.enabled=true", "lora.rank=3", "lora.alpha=7", "lora.targets=[qkv, mlp]")


def ok(*arguments: str) -> str:
    answer = call(*arguments)
    assert answer.code == 0, answer.err
    return answer.out


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with clips, a cache, a trained base and a LoRA on it."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "clips").mkdir()
    for i in range(8):
        make_clip(folder / "clips" / f"{i}.mp4", i, height=16, width=16)
        (folder / "clips" / f"{i}.txt").write_text(f"wave number {i}")
    ok("data", "ingest", str(folder / "clips"), "--out", str(folder / "clips.jsonl"))
    where = (*OWN, f"output_dir={folder}")
    ok(
        "cache",
        "quickstart",
        "--manifest",
        str(folder / "clips.jsonl"),
        "--out",
        str(folder / "cache"),
        *where,
    )
    ok("train", "quickstart", "--cache", str(folder / "cache"), *where, "experiment_name=base")
    adapters = (*ADAPTERS, f"lora.base={folder / 'base'}", "experiment_name=style")
    ok("train", "quickstart", "--cache", str(folder / "cache"), *where, *adapters)
    return folder


def picture(out: Path, run: Path, *options: str) -> bytes:
    ok("generate", str(run), "--out", str(out), "--prompt", "wave number 1", "--steps", "2", *options)
    return (out / "sheet.png").read_bytes()


def test_the_base_with_the_file_makes_the_clips_of_the_run(own: Path, tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    ok("lora", "export", str(own / "style"), str(file))
    wanted, plain = picture(tmp_path / "1", own / "style"), picture(tmp_path / "2", own / "base")
    strong = picture(tmp_path / "3", own / "base", "--lora", f"{file}:90")
    assert picture(tmp_path / "4", own / "base", "--lora", str(file)) == wanted
    assert picture(tmp_path / "5", own / "base", "--lora", f"{file}:0") == plain
    assert picture(tmp_path / "6", own / "base", "--lora", f"{file}:60", "--lora", f"{file}:30") == strong
    assert strong != plain


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["lora.base={own}/style"], r"is a LoRA itself: name its own base .*train\.init_from"),
        (["model.depth=1"], r"lora\.base .* is of another model: set model\.depth=2"),
        (["lora.base={own}/nothing"], "no such checkpoint"),
        (["lora.base="], "there is no base: set model.name_or_path or lora.base"),
        (["lora.targets=[to_q]"], "lora.targets: to_q fits no linear layer of this model; near are"),
        (["lora.dropout=0.1", "model.checkpoint_blocks=true"], r"lora\.dropout would differ"),
    ],
)
def test_what_cannot_be_adapted_is_refused_in_one_line(own: Path, changes: list[str], message: str) -> None:
    arguments = [*OWN, *ADAPTERS, f"lora.base={own / 'base'}", f"output_dir={own}", "experiment_name=x"]
    answer = call(
        "train",
        "quickstart",
        "--cache",
        str(own / "cache"),
        *arguments,
        *(c.format(own=own) for c in changes),
    )
    assert answer.code == 2
    assert re.search(message, answer.err), answer.err
    assert not (own / "x" / "checkpoints").exists()


def test_latents_that_the_base_does_not_know_are_refused(own: Path, tmp_path: Path) -> None:
    where = [*OWN, f"output_dir={tmp_path}", "tokenizer.whiten=1"]
    ok(
        "cache",
        "quickstart",
        "--manifest",
        str(own / "clips.jsonl"),
        "--out",
        str(tmp_path / "cache"),
        *where,
    )
    answer = call(
        "train",
        "quickstart",
        "--cache",
        str(tmp_path / "cache"),
        *where,
        *ADAPTERS,
        f"lora.base={own / 'base'}",
    )
    assert answer.code == 2
    assert "made with another tokenizer than lora.base knows" in answer.err


def test_inspection_counts_what_is_trained(own: Path) -> None:
    answer = call("inspect", str(own / "style"), "--json").value
    assert answer["parameters"]["trained"] == 2 * (3 * (16 + 48) + 2 * 3 * (16 + 64))
    assert answer["memory_gib"]["gradients"] < answer["memory_gib"]["weights"] / 2


def train_words(own: Path, *changes: str) -> list[str]:
    return [
        *("train", "quickstart", "--cache", str(own / "cache"), *OWN, f"output_dir={own}"),
        *(*ADAPTERS, f"lora.base={own / 'base'}", *changes),
    ]


def told(*arguments: str) -> str:
    answer = call(*arguments)
    assert answer.code == 2, answer.out
    assert "Traceback" not in answer.err
    return answer.err


def trained_names(run: Path) -> set[str]:
    return {name.split("/")[1] for name in checkpoint.load(run).tensors("optimizer")}


WORDS = {"text_encoder.words.weight", "text_encoder.places.weight"}


def test_parts_are_trained_beside_adapters_and_travel_with_them(own: Path, tmp_path: Path) -> None:
    """The table of words, which adapters leave as it is: new words are learned."""
    words = train_words(own, "experiment_name=words", "lora.dora=true", "ema.enabled=false")
    said = told(*words, "lora.parts=[text_encoder, text_encoder.words]")
    assert "lora.parts: text_encoder.words only fits what patterns before it have decided" in said
    answer = call(*words, "lora.parts=[text_encoder, exit]")
    assert answer.code == 0, answer.err
    assert re.search(r"text_encoder\s+2\s+2,176", answer.out), answer.out
    saved, base = checkpoint.load(own / "words"), checkpoint.load(own / "base")
    assert trained_names(own / "words") == set(saved.tensors("model"))
    whole = {name for name in trained_names(own / "words") if ".lora_" not in name}
    assert whole > WORDS
    assert all("backbone.exit." in name for name in whole - WORDS)
    before = base.weights(ema=True)
    assert all(not torch.equal(saved.tensors("model")[name], before[name]) for name in whole)

    file = tmp_path / "words.safetensors"
    answer = call("lora", "export", str(own / "words"), str(file))
    assert answer.code == 0, answer.err
    assert "also holds what was trained whole" in answer.err
    wanted, plain = picture(tmp_path / "1", own / "words"), picture(tmp_path / "2", own / "base")
    assert picture(tmp_path / "3", own / "base", "--lora", str(file)) == wanted
    assert picture(tmp_path / "4", own / "base", "--lora", f"{file}:0") == plain
    assert wanted != plain


def test_a_run_goes_on_from_a_file(own: Path, tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    ok("lora", "export", str(own / "style"), str(file))
    begin = (f"lora.init_from={file}", "train.max_steps=1", "train.lr=1e-12", "ema.enabled=false")

    def refused(message: str, *changes: str) -> None:
        said = told(*train_words(own, *begin, "experiment_name=refused", *changes))
        assert re.search(message, said), said

    ok(*train_words(own, *begin, "experiment_name=on", "lora.rank=4", "lora.alpha=2"))
    again = tmp_path / "again.safetensors"
    ok("lora", "export", str(own / "on"), str(again))
    shapes = layer_shapes(load_model(own / "base", device="cpu").predictor.backbone)  # type: ignore[arg-type]
    first, second = read_lora(file, shapes), read_lora(again, shapes)
    assert first.keys() == second.keys()
    for name, one in first.items():
        torch.testing.assert_close(change(second[name]), change(one), rtol=1e-5, atol=1e-7)
    refused(r"is of rank 3, more than lora\.rank 2: set lora\.rank=3", "lora.rank=2")
    refused(r"which lora\.targets leaves as it is", "lora.targets=[mlp]")
    refused(r"is no DoRA: set lora\.dora=false", "lora.dora=true")
    refused("both say where adapters start", f"train.init_from={own / 'style'}")
    refused("no such file", "lora.init_from=nowhere.safetensors")
    refused("set but lora.enabled is false", "lora.enabled=false", "lora.base=")
    refused("train.parts is for training without LoRA", "train.parts=[mlp]")
    refused(r"lora\.parts: qkv takes layers\.0\.qkv, which lora\.targets adapts", "lora.parts=[qkv]")
    refused(
        r"lora\.parts: txt_encoder fits no parameter .* near are text_encoder", "lora.parts=[txt_encoder]"
    )


def test_chosen_parts_are_trained_and_checkpoints_stay_whole(own: Path, tmp_path: Path) -> None:
    words = [
        *("train", "quickstart", "--cache", str(own / "cache"), *OWN, f"output_dir={own}"),
        *("experiment_name=some", f"train.init_from={own / 'base'}"),
    ]
    chosen = "train.parts=['!layers.1.mlp.down', layers.1, text_encoder.words]"
    answer = call(*words, chosen, "train.max_steps=2")
    assert answer.code == 0, answer.err
    assert re.search(r"!layers\.1\.mlp\.down\s+\d+\s+0", answer.out + answer.err)
    assert call(*words, chosen, "train.max_steps=4", "--resume").code == 0
    saved, base = checkpoint.load(own / "some"), checkpoint.load(own / "base").weights(ema=True)
    trained = trained_names(own / "some")
    assert {name.split(".")[0] for name in trained} == {"backbone", "text_encoder"}
    assert all(".layers.1." in n and "mlp.down" not in n for n in trained if n.startswith("backbone"))
    for kind in ("model", "ema"):
        tensors = saved.tensors(kind)
        assert set(tensors) == set(base)
        assert all(torch.equal(tensors[name], base[name]) == (name not in trained) for name in tensors)
    answer = call("inspect", str(own / "some"), "--json").value
    assert answer["parameters"]["trained"] == sum(saved.tensors("model")[n].numel() for n in trained)
    assert picture(tmp_path / "1", own / "some") != picture(tmp_path / "2", own / "base")
    said = told(*words, "experiment_name=none", "train.parts=[layer.1]")
    assert re.search(r"train\.parts: layer\.1 fits no parameter of this model; near are .*layers", said), said
    said = told(*words, "experiment_name=none", "train.parts=['!layers']")
    assert "train.parts only leaves out" in said


def test_what_a_file_holds_besides_is_noted(own: Path, tmp_path: Path) -> None:
    file, more = tmp_path / "style.safetensors", tmp_path / "more.safetensors"
    ok("lora", "export", str(own / "style"), str(file))
    with safe_open(file, "pt") as opened:
        header = {**opened.metadata(), **Notes(reference_downscale=2).header()}
    save_file({**load_file(file), "layers.0.qkv.diff_b": torch.ones(3)}, more, metadata=header)
    words = ("--out", str(tmp_path / "out"), "--prompt", "wave", "--steps", "1", "--lora", str(more))
    answer = call("generate", str(own / "base"), *words)
    assert answer.code == 0, answer.err
    assert (
        "1 of its tensors are no adapters of linear layers and are left out (layers.0.qkv.diff_b)"
        in answer.err
    )
    assert "was trained with references.downscale 2, and here it is 1" in answer.err


@pytest.mark.parametrize("family", TINY)
def test_chosen_parts_of_published_backbones(family: str) -> None:
    model = any_backbone(family)
    rows = train_only({"backbone": model}, ["!attn1.to_q", "attn1"])
    free = {name for name, p in model.named_parameters() if p.requires_grad}
    assert free == {n for n in model.state_dict() if ".attn1." in n and ".attn1.to_q." not in n}
    assert [row.pattern for row in rows] == ["!attn1.to_q", "attn1"]
    assert rows[0].parameters == 0
    assert rows[1].parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert named_state({"backbone": model}).keys() == {f"backbone.{name}" for name in model.state_dict()}


def test_muon_trains_adapters_inside_blocks_and_resumes(own: Path) -> None:
    words = train_words(own, "experiment_name=muon", "train.optimizer=muon")
    ok(*words)
    assert call(*words, "train.max_steps=4", "--resume").code == 0
    names = {name.rpartition("/")[2] for name in checkpoint.load(own / "muon").tensors("optimizer")}
    assert names == {"momentum_buffer"}


def test_a_run_finds_its_base_from_every_folder(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(own)
    words = train_words(own, "experiment_name=near")
    ok(*words, "lora.base=base")
    answer = call(*words, "lora.base=./base", "train.max_steps=4", "--resume")
    assert answer.code == 0, answer.err
    assert "lora.base" not in answer.err
    monkeypatch.chdir(tmp_path)
    assert picture(tmp_path / "1", own / "near")
    (own / "base").rename(own / "away")
    try:
        said = told("generate", str(own / "near"), "--out", "x", "--prompt", "wave")
    finally:
        (own / "away").rename(own / "base")
    assert f"{own / 'near'}" in said
    assert f"needs their base, lora.base {own / 'base'}" in said


def test_a_refused_start_reads_no_base(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise AssertionError("the base was read")

    monkeypatch.setattr("motionloom.cli.adapters.fingerprint", read)
    words = train_words(own, "experiment_name=style")
    assert "already holds a run" in told(*words)
    assert "seed was 42, is 5" in told(*words, "--resume", "seed=5")
    assert "data was" in told(*words, "--resume", "train.heldout_fraction=0.2")


def test_files_are_not_overwritten_and_readable_by_others(own: Path, tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    ok("lora", "export", str(own / "style"), str(file))
    assert "is there already and is not overwritten" in told("lora", "export", str(own / "style"), str(file))
    plain = tmp_path / "plain"
    plain.touch()
    saved = checkpoint.load(own / "style").folder
    for written in (file, *saved.glob("*.safetensors")):
        assert written.stat().st_mode == plain.stat().st_mode, written
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["base"] == "/".join((own / "base").parts[-2:])


def test_what_export_and_merge_do_not_take_is_said_as_it_is(own: Path, tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    said = told("lora", "export", str(own / "base"), str(file))
    assert "holds no LoRA" in said
    assert "convert" not in said
    ok("lora", "export", str(own / "style"), str(file))
    merge = ("lora", "merge", str(own / "style"), str(tmp_path / "out"), "--lora", str(file))
    assert f"is a run, which merge does not take: name its base, {own / 'base'}" in told(*merge)
    assert "a joint is not known to diffusers" in told(*merge[:2], str(own / "base"), *merge[3:])
    assert ".ckpt is not written" in told(*merge[:3], str(tmp_path / "x.ckpt"), *merge[4:])


def test_a_doubtful_file_is_noted(own: Path, tmp_path: Path) -> None:
    file, other = tmp_path / "style.safetensors", tmp_path / "other.safetensors"
    ok("lora", "export", str(own / "style"), str(file), "--dtype", "bf16")
    with safe_open(file, "pt") as opened:
        save_file(load_file(file), other, metadata={**opened.metadata(), "base_sha256": "0" * 64})

    def said(run: str, path: Path) -> str:
        words = (
            "--out",
            str(tmp_path / run / path.stem),
            "--prompt",
            "wave",
            "--steps",
            "1",
            "--lora",
            str(path),
        )
        answer = call("generate", str(own / run), *words)
        assert answer.code == 0, answer.err
        return answer.err

    assert "they now count twice" in said("style", file)
    assert "was trained on other weights than" in said("base", other)
    fine = said("base", file)
    assert "twice" not in fine
    assert "other weights" not in fine


def test_a_pickled_lora_is_refused_with_a_command_that_works(tmp_path: Path) -> None:
    file = tmp_path / "x y.pt"
    torch.save({"a.lora_A.weight": torch.ones(2, 4), "a.lora_B.weight": torch.ones(6, 2)}, file)
    with pytest.raises(UserError, match="is a pickle and is not opened") as caught:
        read_lora(file, ["a"])
    command = shlex.split(re.findall("`(.*)`", str(caught.value))[0])
    subprocess.run([sys.executable, *command[1:]], check=True)
    assert read_lora(tmp_path / "x y.safetensors", ["a"]).keys() == {"a"}
