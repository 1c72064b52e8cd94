"""`motionloom convert`, and published models in recipes: opened, trained, given back to diffusers."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from motionloom.backbones.families import CONFIG_NOTE, FAMILIES
from motionloom.backbones.weights import open_weights
from motionloom.cli.assemble import load_model
from motionloom.errors import UserError
from motionloom.train import checkpoint
from published import TINY, reference, save_diffusers, save_original, tensors
from test_cli import call
from test_docs import ROOT, code, rows

GUIDE = ROOT / "docs" / "pretrained.md"
every_family = pytest.mark.parametrize("family", TINY)

RECIPE = """
experiment_name: wan
video: {width: 32, height: 32, num_frames: 17, fps: 8}
tokenizer: {latent_f: 8, latent_t: 4, latent_d: 16, first_alone: true}
text_encoder: {dim: 32, vocab_size: 256}
model: {type: wan, name_or_path: models/wan, patch: [1, 2, 2]}
train: {max_steps: 2, batch_size: 2, lr: 0.01, precision: fp32, sample_num_steps: 2, save_every_steps: 1}
"""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with tiny models, a world, a cache, and a run that began from published weights."""
    folder = tmp_path_factory.mktemp("convert")
    before = Path.cwd()
    os.chdir(folder)
    try:
        for family in TINY:
            save_diffusers(family, folder / "models" / family)
        Path("wan.yaml").write_text(RECIPE)
        world = ("--frames", "17", "--size", "32", "--clips", "12")
        for words in (
            ("data", "shapeworld", "--out", "world", *world),
            ("cache", "wan.yaml", "--manifest", "world/manifest.jsonl", "--out", "cache"),
            ("train", "wan.yaml", "--cache", "cache"),
        ):
            answer = call(*words)
            assert answer.code == 0, answer.err
        yield folder
    finally:
        os.chdir(before)


def converted(*words: str) -> dict[str, Any]:
    answer = call("convert", *words, "--json")
    assert answer.code == 0, answer.err
    return answer.value


def told(*words: str) -> str:
    """What is said of a mistake."""
    answer = call(*words, "--json")
    assert answer.code == 2
    assert "Traceback" not in answer.err
    return str(answer.value["error"])


def opened(family: str, folder: Path | str) -> nn.Module:
    """As diffusers opens it."""
    kind: Any = type(reference(family))
    model: nn.Module = kind.from_pretrained(folder, local_files_only=True)
    return model


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], t) for name, t in theirs.items())


def read(path: Path | str) -> dict[str, Tensor]:
    weights = open_weights(path)
    return {name: weights.read(name) for name in weights}


def answers(family: str, model: nn.Module) -> list[Tensor]:
    """What diffusers' module says to some input."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    sizes: Any = FAMILIES[family].preset(TINY[family])
    call: Any = model.eval()
    with torch.no_grad():
        if family == "wan":
            return list(call(noise(1, 16, 3, 4, 6), torch.tensor([500]), noise(1, 7, 32), return_dict=False))
        if family == "cogvideox":
            rotary = (noise(3 * 2 * 3, 16), noise(3 * 2 * 3, 16))
            told = call(
                noise(1, 3, 16, 4, 6),
                noise(1, 8, 32),
                torch.tensor([500]),
                image_rotary_emb=rotary,
                return_dict=False,
            )
            return list(told)
        widths = sizes.text_channels
        told = call(
            noise(1, 2 * 2 * 3, sizes.in_channels),
            noise(1, 5, sizes.audio_in_channels),
            noise(1, 4, widths[0]),
            noise(1, 4, widths[1]),
            torch.full((1, 12), 500.0),
            audio_timestep=torch.full((1, 5), 500.0),
            sigma=torch.tensor([500.0]),
            audio_sigma=torch.tensor([500.0]),
            num_frames=2,
            height=2,
            width=3,
            audio_num_frames=5,
            return_dict=False,
        )
        return list(told)


# ---- layouts


@every_family
def test_one_original_file_becomes_a_folder_that_diffusers_opens_with_equal_output(family, tmp_path):
    save_original(family, tmp_path / "o")
    value = converted(str(tmp_path / "o" / "model.safetensors"), str(tmp_path / "d"))
    assert (value["from"], value["to"], value["family"]) == ("original", "diffusers", family)
    assert value["tensors"] == len(tensors(family))
    assert value["parameters"] == sum(t.numel() for t in tensors(family).values())
    model = opened(family, tmp_path / "d")
    same(dict(model.state_dict()), tensors(family))
    ours, theirs = answers(family, model), answers(family, reference(family))
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        # Mapped weights lie elsewhere in memory, and matrix products may add up in another order.
        assert b.abs().max() > 1e-3
        assert (a - b).abs().max() <= 2e-6 * b.abs().max()


@every_family
def test_there_and_back_gives_the_same_file(family, tmp_path):
    """diffusers -> original, one file -> diffusers in shards -> original."""
    save_diffusers(family, tmp_path / "d")
    first, last = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    assert converted(str(tmp_path / "d"), str(first), "--to", "original")["to"] == "original"
    value = converted(str(first), str(tmp_path / "s"), "--shard-size", "50KB")
    assert len(value["files"]) > 4
    assert "diffusion_pytorch_model.safetensors.index.json" in value["files"]
    converted(str(tmp_path / "s"), str(last), "--to", "original")
    same(read(first), read(last))
    note = open_weights(first).metadata[CONFIG_NOTE]
    assert json.loads(note) == json.loads((tmp_path / "s" / "config.json").read_text())


def test_types_are_chosen(tmp_path):
    save_diffusers("wan", tmp_path / "d")
    half = converted(str(tmp_path / "d"), str(tmp_path / "half"), "--dtype", "bf16")
    assert half["bytes"] < 0.6 * converted(str(tmp_path / "d"), str(tmp_path / "kept"))["bytes"]
    converted(str(tmp_path / "half"), str(tmp_path / "full"), "--dtype", "fp32")
    same(read(tmp_path / "half"), {name: t.bfloat16() for name, t in tensors("wan").items()})
    same(read(tmp_path / "full"), {name: t.bfloat16().float() for name, t in tensors("wan").items()})
    same(read(tmp_path / "kept"), tensors("wan"))


def test_sizes_that_no_preset_has_come_from_the_metadata_or_from_an_option(tmp_path):
    import diffusers

    config = FAMILIES["wan"].preset("tiny").to_diffusers() | {"num_layers": 3}
    kind: Any = diffusers.WanTransformer3DModel
    kind.from_config({k: v for k, v in config.items() if k[0] != "_"}).save_pretrained(tmp_path / "d")
    converted(str(tmp_path / "d"), str(tmp_path / "o"), "--to", "original")
    assert converted(str(tmp_path / "o"), str(tmp_path / "again"))["from"] == "original"
    bare = load_file(tmp_path / "o" / "model.safetensors")
    save_file(bare, tmp_path / "bare.safetensors")
    message = told("convert", str(tmp_path / "bare.safetensors"), str(tmp_path / "x"))
    assert "its shapes are those of no preset of wan" in message
    two = {name: t for name, t in bare.items() if not name.startswith("blocks.2.")}
    save_file(two, tmp_path / "two.safetensors")
    given = ("--family", "wan", "--preset", "tiny")
    assert converted(str(tmp_path / "two.safetensors"), str(tmp_path / "y"), *given)["tensors"] == 69


def test_what_is_no_part_of_the_network_is_counted(tmp_path):
    save_original("ltx2", tmp_path / "o")
    one = load_file(tmp_path / "o" / "model.safetensors")
    save_file(one | {"vae.x": torch.ones(1), "vocoder.y": torch.ones(1)}, tmp_path / "all.safetensors")
    answer = call("convert", str(tmp_path / "all.safetensors"), str(tmp_path / "d"), "--json")
    assert answer.value["left_out"] == 2
    assert "2 tensors of" in answer.err


def test_an_old_pickle_is_taken_out(tmp_path):
    save_original("wan", tmp_path / "o")
    torch.save({"generator": load_file(tmp_path / "o" / "model.safetensors")}, tmp_path / "causal.pt")
    converted(str(tmp_path / "causal.pt"), str(tmp_path / "d"))
    same(dict(opened("wan", tmp_path / "d").state_dict()), tensors("wan"))


# ---- students of CausVid and Self-Forcing


def student(folder: Path, change: float = 0.0, wrapper: str = "model.") -> dict[str, Tensor]:
    """A state dict as their trainers save it: the authors' names behind those of the classes around them."""
    if not (folder / "o").exists():
        save_original("wan", folder / "o")
    original = load_file(folder / "o" / "model.safetensors")
    return {f"{wrapper}{name}": t + change for name, t in original.items()}


WRAPPED = {
    "causvid": "model.",
    "fsdp": "model._fsdp_wrapped_module.",
    "every wrapper": "_fsdp_wrapped_module.model._fsdp_wrapped_module._checkpoint_wrapped_module.",
    "ddp": "module.model.",
    "compiled": "_orig_mod.model.",
}


@pytest.mark.parametrize("wrapper", WRAPPED.values(), ids=WRAPPED)
def test_a_causvid_model_pt_becomes_a_folder_that_a_recipe_names(wrapper, tmp_path):
    saved = tmp_path / "checkpoint_model_003000"
    saved.mkdir()
    weights = {"generator": student(tmp_path, wrapper=wrapper), "critic": student(tmp_path, 1.0)}
    torch.save(weights, saved / "model.pt")
    answer = call("convert", str(saved), str(tmp_path / "d"), "--json")  # the folder, as it is trained
    assert answer.code == 0, answer.err
    assert "model.pt: generator is taken, not critic" in answer.err
    same(dict(opened("wan", tmp_path / "d").state_dict()), tensors("wan"))


def test_blocks_alone_may_be_wrapped(tmp_path):
    names = student(tmp_path)
    wrapped = {re.sub(r"blocks\.(\d+)\.", r"blocks.\1._fsdp_wrapped_module.", n): t for n, t in names.items()}
    assert wrapped.keys() != names.keys()
    torch.save({"generator": wrapped}, tmp_path / "model.pt")
    converted(str(tmp_path / "model.pt"), str(tmp_path / "d"))
    same(read(tmp_path / "d"), tensors("wan"))


def test_of_a_self_forcing_student_the_averaged_weights_are_taken_or_with_raw_the_last(tmp_path):
    fsdp = "model._fsdp_wrapped_module."
    content = {
        "generator": student(tmp_path, 1.0),
        "critic": {},
        "generator_ema": student(tmp_path, 0.0, fsdp),
    }
    torch.save(content, tmp_path / "model.pt")
    answer = call("convert", str(tmp_path / "model.pt"), str(tmp_path / "ema"), "--json")
    assert "generator_ema is taken, not generator, critic (generator: --raw)" in answer.err
    answer = call("convert", str(tmp_path / "model.pt"), str(tmp_path / "last"), "--raw", "--json")
    assert "generator is taken, not critic, generator_ema" in answer.err
    same(read(tmp_path / "ema"), tensors("wan"))
    same(read(tmp_path / "last"), {name: t + 1.0 for name, t in tensors("wan").items()})


def test_what_stands_beside_the_network_in_a_student_is_counted(tmp_path):
    beside = {"scheduler.sigmas": torch.ones(3), "_cls_pred_branch.0.weight": torch.ones(2, 2)}
    torch.save({"generator": student(tmp_path) | beside}, tmp_path / "model.pt")
    assert converted(str(tmp_path / "model.pt"), str(tmp_path / "d"))["left_out"] == 2
    same(read(tmp_path / "d"), tensors("wan"))


def test_a_run_begins_with_a_converted_student(workshop, tmp_path):
    torch.save({"generator": student(tmp_path)}, tmp_path / "model.pt")
    folder = f"model.name_or_path={tmp_path / 'd'}"
    pickled = f"model.name_or_path={tmp_path / 'model.pt'}"
    assert f"motionloom convert {tmp_path / 'model.pt'} FOLDER" in told("inspect", "wan.yaml", pickled)
    converted(str(tmp_path / "model.pt"), str(tmp_path / "d"))
    words = (folder, "plan.type=chunks", "plan.frames=1", "experiment_name=student", "train.max_steps=1")
    answer = call("train", "wan.yaml", "--cache", "cache", *words, "--json")
    assert answer.code == 0, answer.err
    first = checkpoint.load(workshop / "runs/student").weights(ema=False)
    moved = [float((first[f"backbone.{name}"] - t).abs().max()) for name, t in tensors("wan").items()]
    assert 0 < max(moved) <= 0.011, "one step of 0.01 away"


def _without(names: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name: t for name, t in names.items() if part not in name}


FAULTY_STUDENTS: dict[str, tuple[Any, str]] = {
    "a critic alone": (
        lambda s: {"critic": s, "step": 3},
        "holds no dictionary of tensors (it has critic, step)",
    ),
    "an empty one": (lambda s: {"generator": {}}, "holds no dictionary of tensors (it has generator)"),
    "a number inside": (
        lambda s: {"generator": {**s, "step": 3}},
        "generator holds more than tensors (step)",
    ),
    "cut by FSDP": (
        lambda s: {"generator": {"model._fsdp_wrapped_module._flat_param": torch.ones(9)}},
        "is a part of weights that FSDP has cut: save them whole (FULL_STATE_DICT)",
    ),
    "a name twice": (
        lambda s: {"generator": {**s, **{f"_orig_mod.{name}": t for name, t in s.items()}}},
        "twice, once as _orig_mod.model.",
    ),
    "a block missing": (
        lambda s: {"generator": _without(s, "blocks.1.")},
        "its shapes are those of no preset",
    ),
    "a tensor missing": (
        lambda s: {"generator": _without(s, "head.head.bias")},
        "; of tiny 1 missing (proj_out.bias",
    ),
    "another network": (
        lambda s: {"generator": {f"model.unet.{i}": torch.ones(1) for i in range(3)}},
        "is of none of the families wan",
    ),
    "an object": (
        lambda s: {"generator": s, "config": Path("x")},
        "holds more than tensors, which is not built",
    ),
}


@pytest.mark.parametrize("make, message", FAULTY_STUDENTS.values(), ids=FAULTY_STUDENTS)
def test_a_student_that_is_not_whole_is_one_line(make, message, tmp_path):
    torch.save(make(student(tmp_path)), tmp_path / "model.pt")
    assert message in told("convert", str(tmp_path / "model.pt"), str(tmp_path / "d"))
    assert not (tmp_path / "d").exists()


def test_raw_needs_averaged_weights_beside_others(tmp_path):
    torch.save({"generator": student(tmp_path)}, tmp_path / "model.pt")
    words = ("convert", str(tmp_path / "model.pt"), str(tmp_path / "d"), "--raw")
    assert "model.pt holds no averaged weights beside others: leave it out" in told(*words)


def test_a_student_cut_short_is_one_line(tmp_path):
    torch.save({"generator": student(tmp_path)}, tmp_path / "model.pt")
    os.truncate(tmp_path / "model.pt", 20_000)
    assert "copy it again" in told("convert", str(tmp_path / "model.pt"), str(tmp_path / "d"))


def test_nothing_is_written_where_something_is_wrong(tmp_path):
    save_diffusers("wan", tmp_path / "d", "60KB")
    next((tmp_path / "d").glob("*-00002-of-*")).unlink()
    assert "is missing (1 of" in told("convert", str(tmp_path / "d"), str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


# ---- recipes and runs


def test_a_run_begins_with_the_published_weights(workshop):
    first = checkpoint.load(workshop / "runs/wan/checkpoints/step_00000001")
    weights = first.tensors("model")
    moved = [float((weights[f"backbone.{name}"] - t).abs().max()) for name, t in tensors("wan").items()]
    assert 0 < max(moved) <= 0.011, "one step of 0.01 away"


def test_a_checkpoint_opens_where_the_base_is_gone_and_is_what_was_trained(workshop):
    shutil.move("models/wan", "models/away")
    try:
        model = load_model("runs/wan", device="cpu")
    finally:
        shutil.move("models/away", "models/wan")
    backbone = model.predictor.backbone
    assert isinstance(backbone, nn.Module)
    saved = checkpoint.load(workshop / "runs/wan").weights(ema=True)
    same(dict(backbone.state_dict()), {name: saved[f"backbone.{name}"] for name in backbone.state_dict()})


@pytest.mark.parametrize("raw", [False, True])
def test_a_checkpoint_becomes_a_folder_of_diffusers(workshop, raw):
    out = f"out_{raw}"
    value = converted("runs/wan", out, *(["--raw"] if raw else []))
    assert value["from"] == "checkpoint"
    saved = checkpoint.load(workshop / "runs/wan").weights(ema=not raw)
    same(
        dict(opened("wan", out).state_dict()),
        {name.removeprefix("backbone."): saved[name] for name in saved if name.startswith("backbone.")},
    )
    assert not torch.equal(read(out)["proj_out.weight"], tensors("wan")["proj_out.weight"])


def test_a_run_begins_where_another_ended(workshop):
    words = ("model.name_or_path=runs/wan", "experiment_name=more", "train.max_steps=1")
    answer = call("train", "wan.yaml", "--cache", "cache", *words, "--json")
    assert answer.code == 0, answer.err
    before = checkpoint.load(workshop / "runs/wan").weights(ema=True)
    after = checkpoint.load(workshop / "runs/more").weights(ema=False)
    moved = [float((after[name] - before[name]).abs().max()) for name in after if name[:9] == "backbone."]
    assert 0 < max(moved) <= 0.011


def test_a_resume_goes_on_and_clips_are_made(workshop):
    answer = call("train", "wan.yaml", "--cache", "cache", "--resume", "train.max_steps=3", "--json")
    assert (answer.code, answer.value["step"]) == (0, 3)
    made = call("generate", "runs/wan", "--prompt", "a red star", "--out", "clips", "--json")
    assert made.code == 0, made.err
    assert call("inspect", "runs/wan", "--json").value["parameters"]["backbone"] == 40_864


def test_the_doctor_finds_a_published_backbone_alive(workshop):
    answer = call("doctor", "wan.yaml", "--cache", "cache", "--json")
    assert [f for f in answer.value["findings"] if f["status"] == "wrong"] == []


def _peak() -> int:
    """Bytes of memory that this process ever had."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def test_14_billion_parameters_are_inspected_in_no_memory(workshop):
    before = _peak()
    big = ("model.name_or_path=", "model.preset=wan2.1-t2v-14b", "text_encoder.dim=4096")
    value = call("inspect", "wan.yaml", *big, "--json").value
    assert value["parameters"]["backbone"] == 14_288_491_584
    assert value["memory_gib"]["weights"] == pytest.approx(53.2, abs=0.1)
    assert _peak() - before < 200e6


MISTAKES = [
    (["model.patch=[1, 1, 1]"], "model.patch is [1, 1, 1], but wan (models/wan) was made for another: write"),
    (["tokenizer.latent_d=20"], "latents have 20 channels, but wan (models/wan) takes 16"),
    (["text_encoder.dim=31"], "text embeddings have 31 channels, but wan (models/wan) takes 32"),
    (["model.preset=wan2.1-14b"], "did you mean wan2.1-"),
    (["model.name_or_path=models/none"], "models/none: no such file or folder"),
    (["model.name_or_path=models/ltx2"], "holds weights of ltx2, not of wan: use type ltx2"),
    (["model.name_or_path="], "model.type wan has no sizes yet: set model.preset"),
    (["model.dim=512"], "model.dim cannot be chosen for model.type wan"),
    (
        ["model.depth=2", "model.dropout=0.1"],
        "model.depth, model.dropout cannot be chosen for model.type wan",
    ),
    (["model.prediction=clean"], "wan answers with a velocity: leave it out"),
    (["model.type=joint"], "is for wan, cogvideox, ltx2 and lightning, but model.type is joint"),
    (["model.type=joint", "model.name_or_path=", "model.preset=tiny"], "but model.type is joint"),
]


@pytest.mark.parametrize("words, message", MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_what_does_not_go_with_the_backbone_is_one_clear_line(workshop, words, message):
    assert message in told("inspect", "wan.yaml", *words)


def test_the_recipe_of_a_run_loads_again_and_names_no_sizes_that_are_not_read(workshop):
    text = Path("runs/wan/recipe.yaml").read_text()
    assert "num_heads" not in text
    assert call("inspect", "runs/wan/recipe.yaml", "--json").code == 0


def test_the_guide_names_every_preset_with_what_goes_with_it():
    found = {}
    heads = ("`model.type`", "`model.preset`", "`model.patch`", "latent channels", "text channels")
    for kind, presets, patch, latents, text in rows(GUIDE, *heads):
        for preset in code(presets):
            found[code(kind)[0], preset] = (json.loads(code(patch)[0]), int(latents), int(text))
    expected = {}
    for name, family in FAMILIES.items():
        for preset, sizes in family.presets.items():
            if not preset.startswith("tiny"):
                network: Any = family.on_meta(sizes)
                expected[name, preset] = (list(network.patch), network.latent_channels, network.text_dim)
    assert found == expected


# ---- what a new user meets


def test_a_pickle_is_named_as_it_was_given_and_taken_from_its_folder(tmp_path):
    save_diffusers("wan", tmp_path / "a b")
    file = next((tmp_path / "a b").glob("*.safetensors"))
    torch.save(load_file(file), pickle := file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(UserError) as caught:
        open_weights(tmp_path / "a b")
    command = shlex.split(re.findall("`motionloom (.*)`", str(caught.value))[0])
    assert command == ["convert", str(pickle), "FOLDER"]
    converted(*command[1:2], str(tmp_path / "d"))
    converted(str(tmp_path / "a b"), str(tmp_path / "e"))
    for out in ("d", "e"):
        same(dict(opened("wan", tmp_path / out).state_dict()), tensors("wan"))


def test_a_pipeline_needs_no_index_and_a_second_network_is_noted(tmp_path):
    for name in ("transformer", "transformer_2"):
        save_diffusers("wan", tmp_path / "p" / name)
    answer = call("convert", str(tmp_path / "p"), str(tmp_path / "x"), "--json")
    assert answer.code == 0, answer.err
    assert f"convert {tmp_path / 'p' / 'transformer_2'} as well" in answer.err
    same(read(tmp_path / "x"), tensors("wan"))


def test_merge_writes_the_file_that_is_named(tmp_path):
    save_diffusers("wan", tmp_path / "wan")
    layer, weights = "blocks.0.attn1.to_q", tensors("wan")
    out, inside = weights[f"{layer}.weight"].shape
    adapter = {f"{layer}.lora_A.weight": torch.ones(2, inside), f"{layer}.lora_B.weight": torch.ones(out, 2)}
    save_file(adapter, tmp_path / "l.safetensors")
    words = ("lora", "merge", str(tmp_path / "wan"), str(tmp_path / "m.safetensors"))
    answer = call(*words, "--lora", str(tmp_path / "l.safetensors"), "--json")
    assert answer.value["file"] == str(tmp_path / "m.safetensors")
    weights[f"{layer}.weight"] = weights[f"{layer}.weight"] + 2
    same(load_file(tmp_path / "m.safetensors"), weights)
    assert converted(str(tmp_path / "m.safetensors"), str(tmp_path / "again"))["family"] == "wan"


def test_options_are_named_where_they_are_wrong(tmp_path):
    save_diffusers("wan", tmp_path / "wan")
    words = ("convert", str(tmp_path / "wan"), str(tmp_path / "x"))
    assert "use --family wan" in told(*words, "--family", "ltx2")
    assert "--preset tinyy is not one of wan: did you mean tiny" in told(
        *words, "--family", "wan", "--preset", "tinyy"
    )
    assert "near are tiny (" in told(*words, "--preset", "tinyy")
    assert "which the preset is of: wan" in told(*words, "--preset", "tiny")
    assert ".ckpt is not written" in told(*words[:2], str(tmp_path / "x.ckpt"))
