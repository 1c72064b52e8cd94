"""Reach: from pixels to a LoRA that diffusers loads, by the shipped recipes, on tiny models of the published
layouts.

Each family's tiny transformer, VAE and text encoder are saved as their makers publish them; clips are
cached, the recipe trains a few steps, the adapters are exported, and diffusers' class with the base's weights
and that file must answer as our backbone with its adapters does.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cached import make_clip
from laid import lay, levels_of, read_video, sampled
from motionloom.backbones import FAMILIES
from motionloom.cli.assemble import (
    load_model,
    open_model,
    published_model,
    text_encoder_for,
    training_text,
)
from motionloom.cli.lora import into_weights
from motionloom.config import load_recipe
from motionloom.config.load import dump_recipe
from motionloom.data.cache import open_cache
from motionloom.errors import UserError
from motionloom.flow import DiscretePrediction, state_norm
from motionloom.generate import Model
from motionloom.nn.patching import patchify, unpatchify
from motionloom.plans import NOTHING, Text
from motionloom.rng import torch_generator
from motionloom.text import cached_text_encoder
from motionloom.train import checkpoint
from motionloom.train.lora import base_names
from test_cli import call
from test_text import T5, save_model, save_tokenizer
from test_text_field import theirs as connectors
from test_vae_tokenizers import COGVIDEOX, WAN
from test_vae_tokenizers import LTX2 as LTX_VAE

WORDS = 8
SIGMA = 0.6


@dataclass(frozen=True)
class Case:
    """One family at toy size."""

    recipe: str
    sizes: Mapping[str, Any]
    """What differs from the tiny preset, in the words of diffusers' config.json."""
    vae: str
    vae_config: Mapping[str, Any]
    video: str
    """Width, height, frames, fps."""
    text: str
    """Class of the text encoder."""
    pipeline: str


CASES = {
    "wan": Case(
        "lora_wan",
        {"in_channels": 4, "out_channels": 4},
        "AutoencoderKLWan",
        WAN,
        "{width: 32, height: 32, num_frames: 5, fps: 8}",
        "UMT5EncoderModel",
        "WanPipeline",
    ),
    "cogvideox": Case(
        "lora_cogvideox",
        {"in_channels": 4, "out_channels": 4, "max_text_seq_length": WORDS},
        "AutoencoderKLCogVideoX",
        COGVIDEOX,
        "{width: 32, height: 32, num_frames: 9, fps: 8}",
        "T5EncoderModel",
        "CogVideoXPipeline",
    ),
    "ltx2": Case(
        "lora_ltx2",
        {"in_channels": 8, "out_channels": 8, "caption_channels": 32},
        "AutoencoderKLLTX2Video",
        LTX_VAE,
        "{width: 64, height: 64, num_frames: 9, fps: 8}",
        "Gemma3ForConditionalGeneration",
        "LTX2Pipeline",
    ),
}
families = pytest.mark.parametrize("family", CASES)


def randomise(module: nn.Module, *key: str) -> None:
    """Weights with which every layer matters, and signals keep their size."""
    generator = torch_generator("reach", *key)
    with torch.no_grad():
        for name, p in module.named_parameters():
            drawn = torch.randn(p.shape, generator=generator)
            if p.ndim < 2 or "table" in name:
                p.copy_(drawn * 0.1 + float("norm" in name and name.endswith(("weight", "gamma"))))
            else:
                p.copy_(drawn * 0.7 / p[0].numel() ** 0.5)


def save_models(case: Case, family: str, folder: Path) -> Path:
    """A pipeline's folder: transformer, vae, text_encoder, tokenizer, with random weights."""
    import diffusers

    known = FAMILIES[family]
    config = {**known.preset("tiny").to_diffusers(), **case.sizes}
    transformer = getattr(diffusers, config.pop("_class_name")).from_config(config)
    vae = getattr(diffusers, case.vae)(**case.vae_config)
    for name, module in (("transformer", transformer), ("vae", vae)):
        randomise(module, family, name)
        module.save_pretrained(folder / name)
    save_text(case, family, folder)
    return folder


def save_text(case: Case, family: str, folder: Path) -> None:
    import transformers

    if family == "ltx2":
        save_model(folder / "text_encoder", "gemma3")
        (folder / "tokenizer").mkdir()
        for file in (folder / "text_encoder").glob("tokenizer*"):
            file.rename(folder / "tokenizer" / file.name)
        connectors("2.0").save_pretrained(folder / "connectors")
        return
    kind = case.text.removesuffix("EncoderModel").lower()
    text = getattr(transformers, case.text)(transformers.AutoConfig.for_model(kind, **T5))
    randomise(text, family, "text")
    text.save_pretrained(folder / "text_encoder")
    save_tokenizer(folder / "tokenizer", start=False, end=True, side="right")


@dataclass(frozen=True)
class Walk:
    """What the commands left behind."""

    family: str
    models: Path
    run: Path
    overrides: list[str]
    file: Path
    said: str
    """By ``train``."""


def ok(*arguments: str) -> str:
    answer = call(*arguments)
    assert answer.code == 0, answer.err
    return answer.out + answer.err


def walk(family: str, folder: Path) -> Walk:
    """ingest, cache, train, export: as a user would, with the shipped recipe."""
    case = CASES[family]
    models = save_models(case, family, folder / "models")
    clips = folder / "clips"
    clips.mkdir()
    for i in range(6):
        make_clip(clips / f"{i}.mp4", i, frames=12)
        (clips / f"{i}.txt").write_text(("a red circle moves left", "a cat and the sky")[i % 2])
    spatial, temporal = (32, 8) if family == "ltx2" else (8, 4)
    channels = case.vae_config.get("z_dim") or case.vae_config["latent_channels"]
    overrides = [
        f"output_dir={folder / 'runs'}",
        f"video={case.video}",
        f"tokenizer.name_or_path={models / 'vae'}",
        f"tokenizer.latent_d={channels}",
        f"tokenizer.latent_f={spatial}",
        f"tokenizer.latent_t={temporal}",
        f"text_encoder.name_or_path={models / 'text_encoder'}",
        f"text_encoder.max_length={WORDS}",
        "text_encoder.dtype=float32",
        f"model.name_or_path={models / 'transformer'}",
        *("lora.rank=3", "lora.alpha=7"),
        *("train.precision=fp32", "train.compile=false", "train.batch_size=2", "train.grad_accum_steps=1"),
        *("train.lr=3e-2", "train.warmup_steps=0", "train.max_steps=4", "train.heldout_fraction=0.34"),
    ]
    ok("data", "ingest", str(clips), "--out", str(folder / "clips.jsonl"))
    ok(
        "cache",
        case.recipe,
        *overrides,
        "--manifest",
        str(folder / "clips.jsonl"),
        "--out",
        str(folder / "cache"),
    )
    said = ok("train", case.recipe, *overrides, "--cache", str(folder / "cache"))
    run, file = folder / "runs" / case.recipe, folder / "lora" / "style.safetensors"
    ok("lora", "export", str(run), str(file))
    return Walk(family, models, run, overrides, file, said)


@pytest.fixture(scope="module", params=CASES)
def walked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Walk:
    return walk(request.param, tmp_path_factory.mktemp(request.param))


@dataclass(frozen=True)
class Question:
    """Latents at one noise level, and words."""

    x_BFHWC: Tensor
    text_BLC: Tensor


def ask(model: Model) -> Question:
    frames, height, width = model.clip_shape
    grid = model.tokenizer.spec.latent_grid(frames, height, width)
    generator = torch_generator("question")
    x = torch.randn((2, *grid, model.tokenizer.spec.channels), generator=generator)
    words = torch.randn((2, text_length(model), model.text_encoder.dim), generator=generator)
    return Question(x, words)


def text_length(model: Model) -> int:
    return model.recipe.text_encoder.max_length


@torch.no_grad()
def ours(model: Model, question: Question) -> Tensor:
    """The velocity (B, F, H, W, C) by our backbone."""
    frames, height, width = model.clip_shape
    geometry = model.geometry([frames], height, width, model.fps, batch=2)
    valid = torch.ones(question.text_BLC.shape[:2], dtype=torch.bool)
    text = Text(question.text_BLC, valid, torch.zeros(1, valid.shape[1], dtype=torch.long))
    layout = lay(model.plan, geometry, text, NOTHING)
    x_BFSC = patchify(question.x_BFHWC, model.patch)
    levels = levels_of(layout, torch.full((2, 8), SIGMA))
    streams = sampled(layout, torch.zeros_like(x_BFSC), x_BFSC, levels, text)
    v_BNC = model.predictor.velocity(streams, layout.visibility)["video"]
    return unpatchify(read_video(layout, v_BNC), geometry.grid, model.patch)


@torch.no_grad()
def theirs(family: str, transformer: Any, question: Question) -> Tensor:
    """The same by diffusers' class."""
    x = question.x_BFHWC
    if family == "cogvideox":
        return theirs_cogvideox(transformer, question)
    if family == "ltx2":
        return theirs_ltx2(transformer, question)
    answer = transformer(
        hidden_states=x.movedim(-1, 1),
        timestep=torch.full((2,), 1000 * SIGMA),
        encoder_hidden_states=question.text_BLC,
        return_dict=False,
    )[0]
    return answer.movedim(1, -1)


def theirs_cogvideox(transformer: Any, question: Question) -> Tensor:
    """Its network answers DDPM's state with v; the velocity follows (``flow.discrete``)."""
    from test_cogvideox import rope

    x = question.x_BFHWC
    sizes = FAMILIES["cogvideox"].from_diffusers(dict(transformer.config))
    schedule = sizes.schedule  # type: ignore[attr-defined]
    sigma = torch.full((2, 1, 1, 1, 1), SIGMA)
    shaped = type("Sized", (), {"sizes": sizes})()
    v = transformer(
        hidden_states=(x / state_norm(sigma)).movedim(-1, 2),
        encoder_hidden_states=question.text_BLC,
        timestep=schedule.timestep(sigma.flatten()),
        image_rotary_emb=rope(shaped, *x.shape[1:4]),
        return_dict=False,
    )[0]
    return DiscretePrediction(schedule, "v").velocity(v.movedim(2, -1), x, sigma)


def theirs_ltx2(transformer: Any, question: Question) -> Tensor:
    """Video alone: some sound must be given, and is cut off."""
    x = question.x_BFHWC
    config = transformer.config
    video_text, audio_text = question.text_BLC.chunk(2, dim=-1)
    sigma = torch.full((2,), 1000 * SIGMA)
    answer = transformer(
        hidden_states=x.flatten(1, 3),
        audio_hidden_states=torch.zeros(2, 3, config.audio_in_channels),
        encoder_hidden_states=video_text,
        audio_encoder_hidden_states=audio_text,
        timestep=sigma[:, None].expand(-1, x[0, ..., 0].numel()),
        audio_timestep=sigma[:, None].expand(-1, 3),
        sigma=sigma,
        num_frames=x.shape[1],
        height=x.shape[2],
        width=x.shape[3],
        fps=8.0,
        audio_num_frames=3,
        isolate_modalities=True,
        return_dict=False,
    )[0]
    return answer.view(x.shape)


def diffusers_model(walked: Walk, folder: Path | None = None) -> Any:
    """The base, or the weights in another folder."""
    import diffusers

    folder = folder or walked.models / "transformer"
    name = json.loads((folder / "config.json").read_text())["_class_name"]
    return getattr(diffusers, name).from_pretrained(folder).eval()


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def test_diffusers_with_the_file_answers_as_our_backbone_does(walked: Walk) -> None:
    """Rank 3, alpha 7: a reader that takes alpha for the rank would be far off."""
    model = load_model(walked.run, device="cpu")
    question = ask(model)
    transformer = diffusers_model(walked)
    base = theirs(walked.family, transformer, question)
    transformer.load_lora_adapter(str(walked.file.parent), weight_name=walked.file.name, prefix="transformer")
    found = ours(model, question)
    assert difference(found, theirs(walked.family, transformer, question)) < 1e-5
    assert difference(found, base) > 1e-2, "the steps must have changed something"


def test_diffusers_pipeline_reads_both_layouts(walked: Walk, tmp_path: Path) -> None:
    import diffusers

    loader = getattr(diffusers, CASES[walked.family].pipeline)
    files = {"diffusers": walked.file}
    if walked.family == "cogvideox":
        answer = call(
            "lora", "export", str(walked.run), str(tmp_path / "a.safetensors"), "--layout", "comfyui"
        )
        assert answer.code == 2
        assert "the comfyui layout is for wan, ltx2" in answer.err
    else:
        files["comfyui"] = tmp_path / "comfyui.safetensors"
        ok("lora", "export", str(walked.run), str(files["comfyui"]), "--layout", "comfyui")
    model = load_model(walked.run, device="cpu")
    question = ask(model)
    for file in files.values():
        transformer = diffusers_model(walked)
        adapters, settings = loader.lora_state_dict(str(file), return_lora_metadata=True)
        loader.load_lora_into_transformer(adapters, transformer, metadata=settings)
        assert difference(ours(model, question), theirs(walked.family, transformer, question)) < 1e-5


def test_merged_weights_are_a_plain_model_for_diffusers(walked: Walk, tmp_path: Path) -> None:
    wish = f"{walked.file}:0.5"
    ok(
        "lora",
        "merge",
        str(walked.models / "transformer"),
        str(tmp_path / "merged"),
        "--lora",
        wish,
        "--lora",
        wish,
    )
    model = load_model(walked.run, device="cpu")
    question = ask(model)
    found = theirs(walked.family, diffusers_model(walked, tmp_path / "merged"), question)
    assert difference(found, ours(model, question)) < 1e-5


def test_only_adapters_are_trained_and_kept(walked: Walk) -> None:
    saved = checkpoint.load(walked.run)
    assert all(".lora_" in name for name in saved.tensors("model"))
    assert "LoRA" in walked.said
    assert "pattern" in walked.said
    base = load_file(walked.models / "transformer" / "diffusion_pytorch_model.safetensors")
    backbone = load_model(walked.run, device="cpu").predictor.backbone
    assert isinstance(backbone, nn.Module)
    names = base_names(backbone)
    state = backbone.state_dict()
    assert base.keys() <= names.keys()
    assert all(torch.equal(state[names[name]], tensor) for name, tensor in base.items())


def test_a_run_generates_clips(walked: Walk, tmp_path: Path) -> None:
    ok("generate", str(walked.run), "--out", str(tmp_path), "--prompt", "a red cat", "--steps", "2")
    assert len(list(tmp_path.glob("*.mp4"))) == 1


def test_a_recipe_that_names_weights_needs_no_run(walked: Walk, tmp_path: Path) -> None:
    """The base as published, with the file beside it, is what the run came to."""
    file = tmp_path / "ready.yaml"
    file.write_text(dump_recipe(load_recipe(CASES[walked.family].recipe, walked.overrides)))
    command = ["generate", str(file), "--lora", str(walked.file), "--prompt", "a red cat", "--steps", "2"]
    ok(*command, "--out", str(tmp_path / "clips"))
    assert len(list((tmp_path / "clips").glob("*.mp4"))) == 1
    model, run = open_model(file, device="cpu"), load_model(walked.run, device="cpu")
    into_weights(model, [str(walked.file)])
    question = ask(run)
    assert difference(ours(model, question), ours(run, question)) < 1e-5


def test_weights_held_in_half_precision_answer_the_same(walked: Walk) -> None:
    """Under autocast the layers of blocks compute in bfloat16 anyhow."""
    answers = {}
    for precision in ("fp32", "bf16"):
        recipe = load_recipe(CASES[walked.family].recipe, [*walked.overrides, f"train.precision={precision}"])
        model = published_model(recipe, "test", device="cpu")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            answers[precision] = ours(model, ask(model))
    backbone = model.predictor.backbone
    assert isinstance(backbone, nn.Module)
    assert torch.bfloat16 in {p.dtype for p in backbone.parameters()}
    assert torch.equal(answers["fp32"], answers["bf16"])


def test_a_recipe_without_weights_is_refused(tmp_path: Path) -> None:
    answer = call("generate", "quickstart", "--prompt", "a cat", "--out", str(tmp_path / "clips"))
    assert answer.code == 2
    assert "quickstart: model.name_or_path is empty" in answer.err


def test_a_resume_goes_on_and_another_base_is_refused(walked: Walk, tmp_path: Path) -> None:
    case = CASES[walked.family]
    shutil.copytree(walked.run, tmp_path / case.recipe)
    command = ["train", case.recipe, *walked.overrides, f"output_dir={tmp_path}", "--resume"]
    command += ["--cache", str(walked.run.parents[1] / "cache")]
    moved = shutil.copytree(walked.models / "transformer", tmp_path / "moved")
    said = ok(*command, "train.max_steps=5", f"model.name_or_path={moved}")
    assert "5 steps (done)" in said
    assert "name_or_path" not in said, "the same weights in another place are the same base"
    other = shutil.copytree(walked.models / "transformer", tmp_path / "other")
    file = other / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors[min(tensors)].view(-1)[0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    answer = call(*command, "train.max_steps=6", f"model.name_or_path={other}")
    assert answer.code == 2
    assert "cannot be resumed exactly: base was" in answer.err
    assert f"is model.name_or_path {other} (sha256" in answer.err


@families
def test_sizes_are_told_before_any_download(family: str) -> None:
    """By preset, by the recipe, and by what the family reads; and what was assumed is said."""
    case = CASES[family]
    answer = call("inspect", case.recipe, "--json")
    assert answer.code == 0, answer.err
    tokenizer, model, text = answer.value["notes"]
    assert re.match(r"tokenizer.name_or_path models/\S+ is not here: taken as the recipe says", tokenizer)
    assert re.match(r"model.name_or_path models/\S+ is not here: taken as model.preset", model)
    assert re.match(r"text_encoder.name_or_path models/\S+ is not here: taken with the \d+ channels", text)
    frozen = answer.value["parameters"]["total"] - answer.value["parameters"]["trained"]
    sizes = FAMILIES[family].preset(load_recipe(case.recipe).model.preset)
    assert frozen == sum(math.prod(shape) for shape in FAMILIES[family].shapes(sizes).values())
    memory = answer.value["memory_gib"]
    assert memory["gradients"] < 0.1 * memory["weights"], "of the adapters alone"


def test_a_recipe_without_weights_and_sizes_says_what_is_missing(tmp_path: Path) -> None:
    answer = call("inspect", "lora_wan", "model.preset=")
    assert answer.code == 2
    assert "models/Wan2.1-T2V-1.3B-Diffusers/transformer: no such file or folder" in answer.err
    assert "model.preset" in answer.err
    (tmp_path / "vae").mkdir()
    answer = call("inspect", "lora_wan", f"tokenizer.name_or_path={tmp_path / 'vae'}")
    assert answer.code == 2, "a folder that is there is read"


def test_a_cache_is_made_without_the_weights_and_says_so(tmp_path: Path) -> None:
    models = save_models(CASES["wan"], "wan", tmp_path / "models")
    make_clip(tmp_path / "clips.mp4", 0, frames=12)
    (tmp_path / "clips.txt").write_text("a red circle")
    ok("data", "ingest", str(tmp_path), "--out", str(tmp_path / "clips.jsonl"))
    said = ok(
        *("cache", "lora_wan", f"video={CASES['wan'].video}", "tokenizer.latent_d=4"),
        *(f"tokenizer.name_or_path={models / 'vae'}", f"text_encoder.name_or_path={models}"),
        *("text_encoder.dtype=float32", "text_encoder.max_length=8"),
        *("--manifest", str(tmp_path / "clips.jsonl"), "--out", str(tmp_path / "cache")),
    )
    assert "transformer: no such file or folder; the cache does not need it, training will" in said
    assert "trained with 512 tokens of a caption" in said


@pytest.mark.slow
def test_a_base_cut_over_two_ranks_gives_the_same_adapters(tmp_path: Path) -> None:
    """FSDP2, where each rank reads its part of the base only, against DDP: as torchrun starts them."""
    start_walk = walk("wan", tmp_path)
    found = {}
    for sharding in ("ddp", "fsdp"):
        name = f"experiment_name={sharding}"
        overrides = [
            *start_walk.overrides,
            name,
            f"train.sharding={sharding}",
            "train.batch_size=1",
            "lora.dora=true",
        ]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
        command += ["-m", "motionloom", "train", "lora_wan", *overrides, "--cache", str(tmp_path / "cache")]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found[sharding] = checkpoint.load(tmp_path / "runs" / sharding).tensors("model")
    assert found["ddp"].keys() == found["fsdp"].keys()
    for name, tensor in found["ddp"].items():
        assert difference(found["fsdp"][name], tensor) < 1e-4, name


def test_training_leaves_the_text_encoder_on_the_disk(walked: Walk) -> None:
    """And a checkpoint names it as it would name itself."""
    recipe = load_recipe(CASES[walked.family].recipe, walked.overrides)
    cache = open_cache(walked.run.parents[1] / "cache")
    asleep, awake = training_text(recipe, cache), text_encoder_for(recipe)
    assert "_encoder" not in vars(asleep)
    assert (asleep.dim, asleep.max_length) == (awake.dim, awake.max_length)
    assert asleep.fingerprint() == awake.fingerprint()
    awake.save(walked.run / "awake")
    saved = checkpoint.load(walked.run).folder / "text_encoder" / "text_encoder.json"
    assert json.loads((walked.run / "awake" / "text_encoder.json").read_text()) == json.loads(
        saved.read_text()
    )
    assert torch.equal(asleep.encode(["a red cat"])[0], awake.encode(["a red cat"])[0])
    changed = cached_text_encoder(recipe.text_encoder, asleep.dim, "0")
    with pytest.raises(UserError, match="is not the text encoder that made the cache's embeddings"):
        changed.encode(["a red cat"])
