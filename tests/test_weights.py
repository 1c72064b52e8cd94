"""Weights of others: opened unread, loaded strictly, whole or sharded; diffusers reads what is written."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from motionloom.backbones import build_backbone
from motionloom.backbones.families import FAMILIES, SizesNote, as_original, recognise
from motionloom.backbones.keys import Fused, KeyMap, Piece
from motionloom.backbones.weights import (
    Sink,
    Weights,
    load_into,
    open_weights,
    write_file,
    write_folder,
)
from motionloom.backbones.weights.pickles import open_pickle
from motionloom.config.recipe import ModelConfig
from motionloom.errors import UserError
from published import TINY, reference, save_diffusers, save_original, tensors
from test_resume import PROGRAM, finish, start

every_family = pytest.mark.parametrize("family", TINY)


def refusal(work: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        work()
    message = str(caught.value)
    assert "\n" not in message
    return message


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Equal names, types and bits."""
    assert ours.keys() == theirs.keys()
    for name, t in theirs.items():
        assert ours[name].dtype == t.dtype, name
        assert torch.equal(ours[name], t), name


def loaded(weights: Weights) -> dict[str, Tensor]:
    return {name: weights.read(name) for name in weights}


# ---- names


def test_a_map_of_names_reads_in_both_directions():
    keys = KeyMap(
        renamed={"a.*": "b.*", "a.*.deep": "c.*", "norm": "last"},
        fused=(Fused("a.*.qkv", 3, {"b.*.q": (0,), "b.*.kv": (2, 1)}),),
        dropped=("table",),
        prefixes=("net.", ""),
    )
    names = [
        "net.a.0.x",
        "net.a.0.deep.weight",
        "net.a.11.qkv.bias",
        "net.same",
        "net.table.cos",
        "net.normal",
    ]
    there = keys.to_diffusers(names)
    assert there == {
        "b.0.x": (Piece("net.a.0.x"),),
        "c.0.weight": (Piece("net.a.0.deep.weight"),),
        "b.11.q.bias": (Piece("net.a.11.qkv.bias", 0, 3),),
        "b.11.kv.bias": (Piece("net.a.11.qkv.bias", 2, 3), Piece("net.a.11.qkv.bias", 1, 3)),
        "same": (Piece("net.same"),),
        "normal": (Piece("net.normal"),),
    }
    back = keys.to_original(there)
    assert back.keys() == set(names) - {"net.table.cos"}
    assert back["net.a.11.qkv.bias"] == (
        Piece("b.11.q.bias"),
        Piece("b.11.kv.bias", 1, 2),
        Piece("b.11.kv.bias", 0, 2),
    )


def test_names_that_collide_or_lack_a_part_are_refused():
    keys = KeyMap(renamed={"a": "b"}, fused=(Fused("qk", 2, {"q": (0,), "k": (1,)}),))
    assert "both stand for b.x" in refusal(lambda: keys.to_diffusers(["a.x", "b.x"]))
    assert "qk.weight: some of its parts are missing" in refusal(lambda: keys.to_original(["q.weight"]))


@every_family
def test_names_of_every_preset_survive_the_way_to_the_original_and_back(family):
    keys = FAMILIES[family].original_keys
    for preset in FAMILIES[family].presets.values():
        names = set(FAMILIES[family].shapes(preset))
        original = keys.to_original(names)
        assert keys.to_diffusers(original).keys() == names
        assert all(any(prefix + mark in original for prefix in (*keys.prefixes, "")) for mark in keys.marks)


# ---- opening


@every_family
@pytest.mark.parametrize("shard", ["5GB", "60KB"])
def test_what_diffusers_wrote_is_opened(family, shard, tmp_path):
    weights = open_weights(save_diffusers(family, tmp_path / "model", shard))
    assert (
        len(list((tmp_path / "model").glob("*.safetensors"))) == (1 if shard == "5GB" else 2)
        or shard == "60KB"
    )
    assert weights.config["_class_name"] == FAMILIES[family].diffusers
    assert weights.bytes == sum(t.numel() * 4 for t in tensors(family).values())
    same(loaded(weights), tensors(family))


def test_any_region_is_read(tmp_path):
    x = torch.arange(60.0).view(5, 4, 3)
    save_file({"x": x, "scalar": torch.tensor(3.0)}, tmp_path / "m.safetensors")
    weights = open_weights(tmp_path / "m.safetensors")
    for region in [(slice(1, 3), slice(0, 4), slice(2, 3)), (slice(5, 5), slice(0, 4), slice(0, 3))]:
        assert torch.equal(weights.read("x", region), x[region])
    assert weights.read("scalar", ()) == 3.0
    turned = weights.under_names({"y": (Piece("x", 4, 5), Piece("x", 1, 5), Piece("x", 3, 5))})
    y = x[[4, 1, 3]]
    assert turned.tensors["y"].shape == (3, 4, 3)
    for rows in [slice(0, 3), slice(1, 2), slice(1, 3), slice(0, 1)]:
        region = (rows, slice(1, 3), slice(0, 2))
        assert torch.equal(turned.read("y", region), y[region])
    again = turned.under_names({"z": (Piece("y", 2, 3), Piece("y", 0, 3))})
    assert torch.equal(again.read("z"), x[[3, 4]])
    assert "does not divide into 2 parts" in refusal(lambda: weights.under_names({"z": (Piece("x", 0, 2),)}))


def test_opening_reads_headers_alone(tmp_path):
    """40 GB of zeros that take no room on the disk."""
    path = tmp_path / "huge.safetensors"
    size = 40 * 10**9
    header = json.dumps({"x": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    begun = time.monotonic()
    weights = open_weights(path)
    assert weights.bytes == size
    assert weights.read("x", (slice(10**9, 10**9 + 3),)).tolist() == [0, 0, 0]
    assert time.monotonic() - begun < 2


def _sharded(folder: Path) -> Path:
    """Two shards and their index."""
    folder.mkdir()
    for i in (1, 2):
        save_file({f"t{i}": torch.ones(i)}, folder / f"m-0000{i}-of-00002.safetensors")
    _index(folder, {f"t{i}": f"m-0000{i}-of-00002.safetensors" for i in (1, 2)})
    return folder


def _index(folder: Path, mapped: Any) -> None:
    (folder / "m.safetensors.index.json").write_text(json.dumps({"weight_map": mapped}))


def _cut(path: Path, by: int = 1) -> None:
    os.truncate(path, path.stat().st_size - by)


FIRST, SECOND = "m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"
DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda f: (f / SECOND).unlink(), f"{SECOND} is missing (1 of 2 shards are): copy"),
    (lambda f: _cut(f / SECOND), f"{SECOND} is not a whole safetensors file"),
    (lambda f: (f / SECOND).write_bytes(b""), f"{SECOND} is not a whole safetensors file"),
    (lambda f: _index(f, {"t1": FIRST, "t2": FIRST}), f"says that t2 is in {FIRST}, where it is not"),
    (lambda f: _index(f, {"t1": FIRST}), "weights"),
    (lambda f: _index(f, {"t1": FIRST, "t2": SECOND, "t3": SECOND}), f"says that t3 is in {SECOND}"),
    (lambda f: _index(f, {"t1": f"../model/{FIRST}"}), "which is not beside it"),
    (lambda f: _index(f, []), "is no index of shards"),
    (lambda f: (f / "m.safetensors.index.json").write_text("{"), "cannot be read as JSON"),
    (lambda f: (f / "config.json").write_text("[]"), "is no JSON object"),
    (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "cannot be read as JSON"),
    (lambda f: (f / "m.safetensors.index.json").unlink(), "holds several sets of weights"),
    (lambda f: save_file({"t2": torch.ones(1), "t4": torch.ones(1)}, f / SECOND), "does not know of t4"),
]


@pytest.mark.parametrize("damage, told", DAMAGES, ids=[told for _, told in DAMAGES])
def test_damage_is_told_in_one_line(damage, told, tmp_path):
    folder = _sharded(tmp_path / "model")
    assert len(open_weights(folder)) == 2
    damage(folder)
    if told == "weights":  # an index may leave out a whole shard, which others' tools do as well
        assert list(open_weights(folder)) == ["t1"]
        return
    assert told in refusal(lambda: open_weights(folder))


def test_what_is_no_weights_is_said_so(tmp_path):
    folder = _sharded(tmp_path / "model")
    assert "no such file or folder" in refusal(lambda: open_weights(tmp_path / "nowhere"))
    assert "is one shard of several: name their folder" in refusal(lambda: open_weights(folder / FIRST))
    (tmp_path / "empty").mkdir()
    assert "holds no .safetensors file" in refusal(lambda: open_weights(tmp_path / "empty"))
    (tmp_path / "empty" / "model.bin").write_bytes(b"x")
    named = tmp_path / "empty" / "model.bin"
    assert f"`motionloom convert {named} FOLDER`" in refusal(lambda: open_weights(tmp_path / "empty"))
    for name in ("a.pt", "a.pth", "a.ckpt", "disguised.safetensors"):
        torch.save({"x": torch.ones(1)}, tmp_path / name)
        assert "is a pickle and is not opened" in refusal(lambda name=name: open_weights(tmp_path / name))
    (tmp_path / "notes.txt").write_text("hello")
    assert "is no .safetensors file" in refusal(lambda: open_weights(tmp_path / "notes.txt"))


def test_a_whole_pipeline_gives_its_transformer_and_variants_are_left_alone(tmp_path):
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    save_diffusers("wan", tmp_path / "pipe" / "transformer")
    same(loaded(open_weights(tmp_path / "pipe")), tensors("wan"))
    save_file(
        {"other": torch.ones(1)}, tmp_path / "pipe/transformer/diffusion_pytorch_model.fp16.safetensors"
    )
    same(loaded(open_weights(tmp_path / "pipe")), tensors("wan"))


# ---- recognising


@pytest.mark.parametrize("shard", ["5GB", "60KB"])
def test_noise_levels_come_from_the_scheduler_of_a_pipeline(shard, tmp_path):
    save_diffusers("cogvideox", tmp_path / "pipe" / "transformer", shard)
    usual = recognise(open_weights(tmp_path / "pipe" / "transformer")).sizes
    (tmp_path / "pipe" / "scheduler").mkdir()
    levels = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "snr_shift_scale": 2.0}
    (tmp_path / "pipe" / "scheduler" / "scheduler_config.json").write_text(json.dumps(levels))
    there = recognise(open_weights(tmp_path / "pipe" / "transformer")).sizes
    assert (there.schedule.snr_shift, there.schedule.spacing) == (2.0, "trailing")
    assert replace(there, schedule=usual.schedule) == usual
    SizesNote(FAMILIES["cogvideox"], there).save(tmp_path)
    assert SizesNote.load(tmp_path).sizes == there


@every_family
def test_family_layout_and_sizes_are_told_from_the_weights(family, tmp_path):
    original = recognise(open_weights(save_original(family, tmp_path / "original", shard_bytes=40_000)))
    there = recognise(open_weights(tmp_path / "original_diffusers"), family)
    assert (original.layout, there.layout) == ("original", "diffusers")
    for found in (original, there):
        assert (found.family.name, found.sizes) == (family, FAMILIES[family].preset(TINY[family]))
        same(loaded(found.weights), tensors(family))
    assert len(list((tmp_path / "original").glob("*.safetensors"))) > 2


def test_the_rest_of_a_whole_system_is_left_out(tmp_path):
    save_original("ltx2", tmp_path / "o")
    one = load_file(tmp_path / "o" / "model.safetensors")
    assert all(name.startswith("model.diffusion_model.") for name in one)
    others = {
        "vae.encoder.x": torch.ones(2),
        "model.diffusion_model.video_embeddings_connector.x": torch.ones(2),
    }
    save_file(one | others, tmp_path / "all.safetensors")
    found = recognise(open_weights(tmp_path / "all.safetensors"))
    assert found.left_out == 2
    same(loaded(found.weights), tensors("ltx2"))


def test_what_cannot_be_recognised_is_said_so(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    x = open_weights(tmp_path / "x.safetensors")
    told = refusal(lambda: recognise(x))
    assert "is of none of the families wan, cogvideox, ltx2, lightning (it holds x ...)" in told
    wan = open_weights(save_diffusers("wan", tmp_path / "wan"))
    assert "holds weights of wan, not of ltx2: use type wan" in refusal(lambda: recognise(wan, "ltx2"))
    assert "did you mean wan2.1-t2v-14b?" in refusal(lambda: recognise(wan, "wan", "wan2.1-t2-14b"))
    big = refusal(lambda: recognise(wan, preset="wan2.1-t2v-1.3b"))
    assert "is not what model.preset wan2.1-t2v-1.3b says: 756 missing" in big
    config = json.loads((tmp_path / "wan" / "config.json").read_text())
    (tmp_path / "wan" / "config.json").write_text(json.dumps(config | {"num_layers": 3}))
    said = refusal(lambda: recognise(open_weights(tmp_path / "wan")))
    assert "is not what its config.json says" in said
    (tmp_path / "wan" / "config.json").unlink()
    few = open_weights(tmp_path / "wan").under("")
    few = few.only([name for name in few if not name.startswith("blocks.1.")])
    assert "its shapes are those of no preset of wan" in refusal(lambda: recognise(few))


@pytest.mark.parametrize(
    "family, entries, told",
    [
        ("wan", {"num_layers": True}, "num_layers is True, expected a whole number above 0"),
        ("wan", {"patch_size": [1, 2, "2"]}, "expected a list of 3, each a whole number above 0"),
        ("wan", {"image_dim": "1280"}, "image_dim is '1280', expected a whole number above 0 or null"),
        ("wan", {"eps": float("nan")}, "eps is nan, expected a number above 0"),
        ("cogvideox", {"norm_eps": float("inf")}, "norm_eps is inf"),
        ("cogvideox", {"attention_bias": 1}, "attention_bias is 1, expected true or false"),
        ("cogvideox", {"schedule": {}}, "does not know schedule"),
        ("ltx2", {"vae_scale_factors": None}, "vae_scale_factors is None, expected a list of 3"),
        ("ltx2", {"vae_scale_factors": 8}, "vae_scale_factors is 8"),
        ("ltx2", {"vae_scale_factors": "x"}, "vae_scale_factors is 'x'"),
        ("ltx2", {"vae_scale_factors": [1, 2]}, r"vae_scale_factors is \(1, 2\)"),
        ("ltx2", {"_class_name": "LTXVideoTransformer3DModel"}, "ltx2 reads LTX2VideoTransformer3DModel"),
        ("ltx2", {"num_layers": 0}, "num_layers is 0"),
    ],
)
def test_sizes_of_wrong_types_are_one_line(family, entries, told):
    config = FAMILIES[family].preset(TINY[family]).to_diffusers()
    assert re.search(told, refusal(lambda: FAMILIES[family].from_diffusers(config | entries)))


@pytest.mark.parametrize(
    "family, preset",
    [
        ("wan", "wan2.1-i2v-14b"),
        ("wan", "wan2.1-flf2v-14b"),
        ("wan", "wan2.2-i2v-a14b"),
        ("cogvideox", "cogvideox-5b-i2v"),
        ("cogvideox", "cogvideox1.5-5b-i2v"),
    ],
)
def test_models_that_read_an_image_are_refused_before_any_weight_is(family, preset):
    def build(name: str) -> Any:
        patch = FAMILIES[family].on_meta(FAMILIES[family].preset(name)).patch
        return build_backbone(ModelConfig(type=family, preset=name, patch=patch), 16, 4096, device="meta")

    told = refusal(lambda: build(preset))
    assert f"{family} ({preset}) reads a given image beside the noisy video, and no plan.type brings" in told
    assert build(next(name for name, sizes in FAMILIES[family].presets.items() if not sizes.reads_image))


@every_family
def test_a_note_of_sizes_comes_back(family, tmp_path):
    for name, sizes in FAMILIES[family].presets.items():
        SizesNote(FAMILIES[family], sizes).save(tmp_path)
        assert SizesNote.load(tmp_path).sizes == sizes, name
    note = json.loads((tmp_path / "backbone.json").read_text())
    for schedule in (3, {"steps": "1000"}, {"noise": 1}):
        (tmp_path / "backbone.json").write_text(json.dumps(note | {"schedule": schedule}))
        assert "backbone.json: schedule" in refusal(lambda: SizesNote.load(tmp_path))
    (tmp_path / "backbone.json").write_text("{}")
    assert "is of no backbone known here" in refusal(lambda: SizesNote.load(tmp_path))


# ---- loading


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(6))
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


def net_file(folder: Path, change: Callable[[dict[str, Tensor]], object] = lambda state: None) -> Weights:
    generator = torch_of("net")
    state = {
        name: torch.randn(t.shape, generator=generator) if t.is_floating_point() else t + 7
        for name, t in Net().state_dict().items()
    }
    change(state)
    save_file(state, folder / "net.safetensors")
    return open_weights(folder / "net.safetensors")


def torch_of(*key: str) -> torch.Generator:
    from motionloom.rng import torch_generator

    return torch_generator(*key)


@pytest.mark.parametrize("place", ["meta", "cpu"])
def test_a_module_is_filled_where_it_stands(place, tmp_path):
    weights = net_file(tmp_path)
    with torch.device(place):
        net = Net()
    before = dict(net.named_parameters())
    calls: list[tuple[int, int]] = []
    report = load_into(net, weights, progress=lambda *at: calls.append(at))
    same(dict(net.state_dict()), loaded(weights))
    assert (report.tensors, report.bytes, report.converted) == (14, weights.bytes, {})
    assert calls[-1] == (14, 14)
    assert [p.requires_grad for p in net.parameters()] == [p.requires_grad for p in Net().parameters()]
    if place == "cpu":
        assert all(p is before[name] for name, p in net.named_parameters())
    net.layers[0].weight.data.add_(1)  # its own memory, not the file's
    assert not torch.equal(net.layers[0].weight, weights.read("layers.0.weight"))


def test_types_are_converted_and_counted(tmp_path):
    weights = net_file(tmp_path)
    with torch.device("meta"):
        net = Net()
    report = load_into(net, weights, dtype=torch.bfloat16)
    assert report.converted == {"float32 -> bfloat16": 13}
    assert str(report) == "14 tensors read, 3.04e-07 GB, 13 from float32 to bfloat16"
    assert {t.dtype for t in net.state_dict().values()} == {torch.bfloat16, torch.int64}
    assert torch.equal(net.layers[5].weight, weights.read("layers.5.weight").bfloat16())


def _two_missing(state: dict[str, Tensor]) -> None:
    for i in range(5):
        del state[f"layers.{i}.bias"]


@pytest.mark.parametrize(
    "change, told",
    [
        (_two_missing, "5 missing (layers.0.bias, layers.1.bias, layers.2.bias and 2 more) (of 14"),
        (lambda s: s.update(x=torch.ones(1)), "1 unexpected (x)"),
        (lambda s: s.update(frozen=torch.ones(3)), "1 of another shape (frozen is [3], the model's is [2])"),
        (lambda s: (s.pop("frozen"), s.update(y=torch.ones(1))), "1 missing (frozen); 1 unexpected (y)"),
    ],
)
def test_what_does_not_fit_is_listed_and_nothing_is_touched(change, told, tmp_path):
    weights = net_file(tmp_path, change)
    net = Net()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    assert told in refusal(lambda: load_into(net, weights))
    same(dict(net.state_dict()), before)


def test_tensors_from_elsewhere_stay_as_they_are(tmp_path):
    weights = net_file(tmp_path, lambda state: state.pop("frozen"))
    net = Net()
    load_into(net, weights, besides=["frozen"])
    assert torch.equal(net.frozen, torch.zeros(2))
    assert torch.equal(net.layers[0].weight, weights.read("layers.0.weight"))


def _private_memory() -> int:
    """Bytes that are this process's own, mapped files left out."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024


def test_beyond_the_module_one_tensor_is_in_memory(tmp_path):
    """32 tensors of 8 MB, in bfloat16 in the file and float32 in the module."""
    count, side = 32, 1448
    each = side * side * 4
    state = {f"{i}.weight": torch.full((side, side), float(i), dtype=torch.bfloat16) for i in range(count)}
    save_file(state, tmp_path / "net.safetensors")
    del state
    weights = open_weights(tmp_path / "net.safetensors")
    with torch.device("meta"):
        net = nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(count)))
    begun, most = _private_memory(), 0

    def look(done: int, total: int) -> None:
        nonlocal most
        most = max(most, _private_memory() - begun - done * each)

    load_into(net, weights, progress=look)
    assert most < 2 * each
    assert float(net[count - 1].weight[0, 0].detach()) == count - 1


@every_family
def test_loaded_backbones_hold_what_the_file_holds(family, tmp_path):
    found = recognise(open_weights(save_original(family, tmp_path / "o", shard_bytes=60_000)))
    module = found.family.on_meta(found.sizes)
    load_into(module, found.weights)
    same(dict(module.state_dict()), tensors(family))


def test_two_ranks_read_their_own_parts_straight_into_fsdp2(tmp_path):
    """From diffusers' layout and from the original, where rows of fused tensors go to several."""
    folder = tmp_path / "models"
    for family in TINY:
        save_original(family, folder / f"{family}_o")
        if family != "wan":
            shutil.rmtree(folder / f"{family}_o_diffusers")
    finish(start_program(tmp_path / "models", tmp_path / "told"))
    told = [json.loads((tmp_path / f"told.{rank}").read_text()) for rank in (0, 1)]
    assert told[0].keys() == {"wan_o_diffusers", "wan_o", "cogvideox_o", "ltx2_o"}
    for name, first in told[0].items():
        second = told[1][name]
        assert first["equal"] == second["equal"] == first["all"]
        assert first["read"] + second["read"] == first["bytes"], "every byte is read by one rank alone"
        assert second["read"] > 0.4 * first["bytes"]


def start_program(folder: Path, out: Path) -> Any:
    program = PROGRAM.with_name("published.py")
    return start(2, str(folder), str(out), program=program)


# ---- writing


@every_family
def test_round_trips_are_equal_to_the_byte(family, tmp_path):
    """diffusers -> ours -> diffusers, and original -> diffusers -> original, in bfloat16 for one of them."""
    state = {name: t.bfloat16() if "proj_out" in name else t for name, t in tensors(family).items()}
    sizes = FAMILIES[family].preset(TINY[family])
    write_folder(tmp_path / "a", Sink.of_tensors(state), sizes.to_diffusers())
    a = recognise(open_weights(tmp_path / "a"))
    write_folder(tmp_path / "b", Sink.of(a.weights), a.sizes.to_diffusers(), shard_bytes=50_000)
    same(loaded(open_weights(tmp_path / "b")), state)
    assert (tmp_path / "a" / "config.json").read_bytes() == (tmp_path / "b" / "config.json").read_bytes()

    write_file(tmp_path / "o.safetensors", Sink.of(as_original(a.weights, a.family)))
    there = recognise(open_weights(tmp_path / "o.safetensors"))
    write_folder(tmp_path / "c", Sink.of(there.weights), there.sizes.to_diffusers())
    same(loaded(open_weights(tmp_path / "c")), state)
    back = recognise(open_weights(tmp_path / "c"))
    write_file(tmp_path / "o2.safetensors", Sink.of(as_original(back.weights, back.family)))
    assert (tmp_path / "o.safetensors").read_bytes() == (tmp_path / "o2.safetensors").read_bytes()


@every_family
def test_diffusers_opens_what_is_written(family, tmp_path):
    config = FAMILIES[family].preset(TINY[family]).to_diffusers()
    files = write_folder(tmp_path / "m", Sink.of_tensors(tensors(family)), config, shard_bytes=100_000)
    names = [file.name for file in files]
    assert "diffusion_pytorch_model.safetensors.index.json" in names
    model = type(reference(family)).from_pretrained(tmp_path / "m", local_files_only=True)
    same(dict(model.state_dict()), tensors(family))
    assert {k: v for k, v in model.config.items() if k[0] != "_"} == {
        k: v for k, v in reference(family).config.items() if k[0] != "_"
    }
    for file in files:
        if file.suffix == ".safetensors":
            assert file.stat().st_size < 100_000 + 8_000


def test_the_library_reads_the_files_and_odd_tensors_survive(tmp_path):
    state = {
        "scalar": torch.tensor(2.5),
        "none": torch.empty(0, 3),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "halves": torch.randn(3, generator=torch_of("odd")).half(),
        "ints": torch.arange(3),
        "across": torch.arange(6.0).view(2, 3).T,
    }
    write_file(tmp_path / "m.safetensors", Sink.of_tensors(state), metadata={"note": "café"})
    same(load_file(tmp_path / "m.safetensors"), state)
    weights = open_weights(tmp_path / "m.safetensors")
    same(loaded(weights), state)
    assert weights.metadata["note"] == "café"


@pytest.mark.parametrize("write", [write_folder, write_file])
def test_nothing_is_overwritten_and_nothing_is_left_half_written(write, tmp_path):
    sink = Sink.of_tensors({f"{i}": torch.ones(4) for i in range(4)})
    rest: dict[str, Any] = {"config": {}, "shard_bytes": 16} if write is write_folder else {}
    (tmp_path / "there").mkdir()
    message = refusal(lambda: write(tmp_path / "there", sink, **rest))
    assert "is there already and is not overwritten" in message

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "new", sink, **rest, progress=stop)
    (tmp_path / "file").write_text("x")
    assert "was not written" in refusal(lambda: write(tmp_path / "file" / "m", sink, **rest))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "there"]


# ---- pickles


def test_tensors_are_taken_out_of_others_pickles(tmp_path):
    state = tensors("wan")
    wrapped = {f"model._fsdp_wrapped_module.{name}": t for name, t in state.items()}
    forms = {
        "plain.pth": state,
        "trainer.pt": {"step": 3, "generator_ema": wrapped, "generator": {"x": torch.ones(1)}},
    }
    for name, content in forms.items():
        torch.save(content, tmp_path / name)
        same(loaded(open_pickle(tmp_path / name)), state)
    torch.save(state, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    same(loaded(open_pickle(tmp_path / "old.bin")), state)


def test_pickles_of_more_than_tensors_are_refused(tmp_path):
    torch.save({"model": Net()}, tmp_path / "module.pt")
    assert "is not built, since that could run any code" in refusal(
        lambda: open_pickle(tmp_path / "module.pt")
    )
    torch.save([1, 2], tmp_path / "list.pt")
    assert "holds no dictionary of tensors" in refusal(lambda: open_pickle(tmp_path / "list.pt"))
    torch.save({"x": torch.ones(999)}, tmp_path / "cut.pt")
    _cut(tmp_path / "cut.pt", 500)
    assert "copy it again" in refusal(lambda: open_pickle(tmp_path / "cut.pt"))
