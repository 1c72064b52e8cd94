"""Tokenizers that are trained as runs: every loss falls, a resume loses nothing, what comes out is used."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from cached import make_world
from motionloom.cli.main import main
from motionloom.cli.tokenizer_run import TokenizerParts, TokenizerPreviews, assemble_tokenizer
from motionloom.config import Recipe
from motionloom.config.load import dump_recipe, load_recipe, load_recipe_with_notes
from motionloom.config.vtp import VtpConfig
from motionloom.data.batch import Batch
from motionloom.data.cache import Cache, build_cache, open_cache
from motionloom.data.manifest import ManifestEntry, read_entry, write_manifest
from motionloom.errors import UserError
from motionloom.methods.tokenizer.decoder import FinetuneDecoder
from motionloom.methods.tokenizer.pretrain import Pretrain
from motionloom.methods.tokenizer.sizes import model_config
from motionloom.parallel import Ranks
from motionloom.rng import torch_generator
from motionloom.tokenizers import load_tokenizer
from motionloom.tokenizers.vtp import PRESETS, VTPModel, VtpTokenizer
from motionloom.train import checkpoint
from motionloom.train.method import StepContext

VTP = {
    "patch": 8,
    "channels": 8,
    "width": 32,
    "depth": 2,
    "heads": 2,
    "text_width": 16,
    "text_depth": 1,
    "text_heads": 2,
    "vocab_size": 300,
    "context": 16,
    "perceptual": 0.0,
    "rec_share": 1.0,
    "ssl_share": 0.5,
    "prototypes": 24,
    "head_hidden": 24,
    "head_bottleneck": 12,
    "head_layers": 2,
    "global_size": 16,
    "local_size": 8,
    "local_crops": 2,
    "teacher_warmup_steps": 4,
    "gan_layers": 2,
    "gan_width": 8,
}


def recipe(method: str = "tokenizer", vtp: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    """Nine frames of 16 x 24 pixels, coded in groups of four."""
    train = {
        "method": method,
        "batch_size": 4,
        "max_steps": 4,
        "lr": 1e-3,
        "warmup_steps": 0,
        "precision": "fp32",
        "save_every_steps": 2,
        "keep_checkpoints": 50,
        "heldout_fraction": 0.2,
        "log_every_steps": 1,
        **sections.pop("train", {}),
    }
    return Recipe.model_validate(
        {
            "seed": 3,
            "video": {"height": 16, "width": 24, "num_frames": 9, "fps": 8.0},
            "tokenizer": {"type": "pixels", "latent_f": 1, "latent_t": 1, "latent_d": 3},
            "text_encoder": {"dim": 4, "vocab_size": 16, "max_length": 4},
            "vtp": {**VTP, "temporal_patch": 4, **(vtp or {})},
            "train": train,
            **sections,
        }
    )


def quick(tokenizer: dict[str, Any]) -> Recipe:
    """A recipe that uses a tokenizer."""
    return Recipe.model_validate(
        {
            "seed": 3,
            "video": {"height": 16, "width": 24, "num_frames": 9, "fps": 8.0},
            "tokenizer": tokenizer,
            "text_encoder": {"dim": 4, "vocab_size": 16, "max_length": 4},
        }
    )


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> list[ManifestEntry]:
    return make_world(tmp_path_factory.mktemp("clips"), 10, frames=9, height=16, width=24)


@pytest.fixture(scope="module")
def cache(entries: list[ManifestEntry], tmp_path_factory: pytest.TempPathFactory) -> Cache:
    out = tmp_path_factory.mktemp("pixels") / "cache"
    build_cache(recipe(), entries, out)
    return open_cache(out)


def run(asked: Recipe, cache: Cache, folder: Path, *, resume: bool = False) -> Path:
    assemble_tokenizer(asked, cache, Ranks()).trainer(folder).fit(resume)
    return folder


def context(step: int = 0, turn: str = "tokenizer", **more: Any) -> StepContext:
    return StepContext(3, step, 0, 0, torch.device("cpu"), turn, **more)


def batch_of(parts: TokenizerParts) -> Batch:
    return next(parts.loader.batches(0))


def tensors_of(run_dir: Path, step: int, name: str) -> dict[str, Tensor]:
    file = checkpoint.load(run_dir / "checkpoints" / checkpoint.name_of(step)).tensors(name)
    return {key: file[key] for key in file}


def test_the_cache_holds_pixels_to_the_level(cache: Cache, entries: list[ManifestEntry]) -> None:
    row = cache.row(0)
    source = read_entry(entries[0], fps=8.0, size=(16, 24), background=(255, 255, 255)).video_FHW3
    assert torch.equal(row.decode(cache.tokenizer()), torch.from_numpy(source[:9].copy()))


# Each loss alone

ALONE: dict[str, dict[str, Any]] = {
    "reconstruction": {"rec": 1.0, "clip": 0.0, "ssl": 0.0},
    "squares": {"rec": 1.0, "l1": 0.0, "l2": 1.0, "clip": 0.0, "ssl": 0.0},
    "contrast": {"rec": 0.0, "clip": 1.0, "ssl": 0.0},
    "sigmoid": {"rec": 0.0, "clip": 1.0, "clip_loss": "sigmoid", "ssl": 0.0},
    "contrast in chunks": {"rec": 0.0, "clip": 1.0, "clip_chunk": 3, "ssl": 0.0},
    "contrast, near captions": {"rec": 0.0, "clip": 1.0, "clip_near": 3, "ssl": 0.0},
    "words": {"rec": 0.0, "clip": 1e-6, "words": 1.0, "ssl": 0.0},
    "distillation": {"rec": 0.0, "clip": 0.0, "ssl": 1.0, "koleo": 0.0, "mask_ratio": [0.3, 0.5]},
    "distillation, mean": {"rec": 0.0, "clip": 0.0, "ssl": 1.0, "koleo": 0.0, "centring": "mean"},
}


@pytest.mark.parametrize("name", ALONE)
def test_each_loss_alone_falls_on_one_batch(name: str, cache: Cache) -> None:
    parts = assemble_tokenizer(recipe(vtp=ALONE[name], train={"max_steps": 400}), cache, Ranks())
    batch, method = batch_of(parts), parts.method
    (optimizer,) = method.optimizers().values()
    for group in optimizer.param_groups:
        group["lr"] = 3e-3
    found = []
    for _ in range(30):
        # The same draws in every step, so that it is one number that falls.
        loss = method.losses(batch, context(1)).loss_B.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    assert all(math.isfinite(x) for x in found)
    assert found[-1] < 0.9 * found[0], (found[0], found[-1])


def test_weights_of_zero_take_out_what_they_alone_need(cache: Cache) -> None:
    parts = assemble_tokenizer(recipe(vtp={"clip": 0.0, "ssl": 0.0}), cache, Ranks())
    assert parts.method.beside() == {}
    logs = parts.method.losses(batch_of(parts), context()).logs
    assert set(logs) == {"l1", "psnr"}


def test_the_sum_is_of_the_weighted_parts(cache: Cache) -> None:
    parts = assemble_tokenizer(
        recipe(vtp={"rec": 0.5, "clip": 2.0, "ssl": 3.0, "koleo": 0.1}), cache, Ranks()
    )
    found = parts.method.losses(batch_of(parts), context())
    logs = found.logs
    distilled = logs["dino"] + logs["ibot"] + 0.1 * logs["koleo"]
    wanted = 0.5 * logs["l1"] + 2 * logs["clip"] + 3 * distilled
    assert float(found.loss_B.mean().detach()) == pytest.approx(float(wanted), rel=1e-5)


def test_parts_of_the_batch_are_drawn_anew_in_each_step(cache: Cache) -> None:
    asked = recipe(vtp={"rec": 1.0, "clip": 0.0, "ssl": 0.0, "rec_share": 0.25})
    parts = assemble_tokenizer(asked, cache, Ranks())
    batch = batch_of(parts)
    used = [tuple(parts.method.losses(batch, context(n)).loss_B.nonzero()[:, 0].tolist()) for n in range(12)]
    assert all(len(rows) == 1 for rows in used)
    assert len(set(used)) > 1
    assert used[0] == tuple(parts.method.losses(batch, context(0)).loss_B.nonzero()[:, 0].tolist())


def test_contrast_in_chunks_is_contrast_at_once(cache: Cache) -> None:
    found = []
    for chunk in (0, 3):
        asked = recipe(vtp={"rec": 0.0, "ssl": 0.0, "clip": 1.0, "clip_chunk": chunk, "clip_drop": 0.0})
        parts = assemble_tokenizer(asked, cache, Ranks())
        loss = parts.method.losses(batch_of(parts), context()).loss_B.mean()
        loss.backward()
        found.append((loss, {n: p.grad for n, p in parts.model.named_parameters() if p.grad is not None}))
    (loss, grads), (loss_too, grads_too) = found
    assert loss.item() == pytest.approx(loss_too.item(), abs=1e-6)
    assert {n for n, g in grads.items() if g.any()} == {n for n, g in grads_too.items() if g.any()}
    for name, grad in grads_too.items():
        # By their size: what single precision leaves of an embedding's gradients is more than 1e-6.
        assert (grad - grads[name]).norm() <= 2e-6 * grads[name].norm() + 1e-8, name


def test_a_clip_is_encoded_once_for_both_losses_and_to_the_same_effect(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, counts = [], []
    for chunk in (0, 2):
        both = {
            "rec": 1.0,
            "rec_share": 0.5,
            "ssl": 0.0,
            "clip": 1.0,
            "clip_near": 2,
            "clip_chunk": chunk,
            "words": 0.5,
        }
        parts = assemble_tokenizer(recipe(vtp=both), cache, Ranks())
        seen: list[int] = []
        parts.model.trunk.register_forward_hook(
            lambda module, given, made, seen=seen: seen.append(len(given[0]))
        )
        result = parts.method.losses(batch_of(parts), context())
        result.loss_B.mean().backward()
        grads = {n: p.grad for n, p in parts.model.named_parameters() if p.grad is not None}
        found.append((result, grads))
        counts.append(seen)
    # In chunks: the rebuilt half, then all in twos without a graph and once more with one.
    assert counts == [[4], [2, 2, 2, 2, 2]]
    (result, grads), (result_too, grads_too) = found
    torch.testing.assert_close(result.loss_B, result_too.loss_B, atol=1e-6, rtol=0)
    assert grads.keys() == grads_too.keys()
    for name, grad in grads_too.items():
        assert (grad - grads[name]).norm() <= 4e-6 * grads[name].norm() + 1e-8, name


def test_near_captions_are_for_training_alone(cache: Cache) -> None:
    losses = []
    for near in (0, 3):
        asked = recipe(vtp={"rec": 0.0, "ssl": 0.0, "clip": 1.0, "clip_near": near})
        parts = assemble_tokenizer(asked, cache, Ranks())
        batch = batch_of(parts)
        told = [parts.method.losses(batch, context(phase=p)).logs["clip"] for p in ("train", "heldout")]
        losses.append([float(loss) for loss in told])
    assert losses[1][0] > losses[0][0] + 0.1, "more wrong answers, a larger loss"
    assert losses[1][1] == losses[0][1]


def test_nothing_is_rebuilt_before_its_time_and_every_weight_has_a_gradient(cache: Cache) -> None:
    parts = assemble_tokenizer(recipe(vtp={"rec_start": 0.5}), cache, Ranks())
    batch = batch_of(parts)
    for step, rebuilt in ((0, False), (1, False), (2, True)):
        parts.model.zero_grad()
        found = parts.method.losses(batch, context(step=step))
        found.loss_B.mean().backward()
        assert ("l1" in found.logs) is rebuilt
        assert [name for name, p in parts.model.named_parameters() if p.grad is None] == []
        moved = any(bool(p.grad.any()) for p in parts.model.pixel_decoder.parameters() if p.grad is not None)
        assert moved is rebuilt


@pytest.mark.slow
def test_compiled_blocks_train_a_tokenizer_like_eager_ones(cache: Cache) -> None:
    """Clips, crops and hidden patches, with stochastic depth and a look back."""
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        every = {"ssl_drop": 0.25, "clip_near": 2, "temporal_window": 1, "conv_kernel": 3, "init": "fan_in"}
        asked = recipe(vtp=every, train={"compile": compiled, "precision": "bf16"})
        parts = assemble_tokenizer(asked, cache, Ranks())
        assert parts.notes == () or not any("compile" in note for note in parts.notes)
        with torch.autocast("cpu", torch.bfloat16):
            loss = parts.method.losses(batch_of(parts), context()).loss_B.mean()
        loss.backward()
        grads = [p.grad.flatten() for p in parts.model.parameters() if p.grad is not None]
        found.append((loss.detach(), torch.cat(grads)))
    (loss, grads), (loss_too, grads_too) = found
    assert float(loss_too) == pytest.approx(float(loss), rel=0.02)
    assert (grads_too - grads).norm() < 0.05 * grads.norm()
    torch._dynamo.reset()


# The teacher


def teacher_of(method: Pretrain) -> torch.nn.Module:
    return method.beside()["teacher"]


def test_the_teacher_follows_without_gradients(cache: Cache) -> None:
    asked = recipe(vtp={"momentum": 0.5}, train={"max_steps": 1000})
    parts = assemble_tokenizer(asked, cache, Ranks())
    method, batch = parts.method, batch_of(parts)
    assert isinstance(method, Pretrain)
    teacher = teacher_of(method)
    before = {n: p.clone() for n, p in teacher.named_parameters()}
    student = {f"trunk.{n}": p for n, p in parts.model.trunk.named_parameters()}
    assert all(torch.equal(before[n], p) for n, p in student.items()), "it begins as the student"
    method.losses(batch, context()).loss_B.mean().backward()
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    with torch.no_grad():
        for p in parts.model.trunk.parameters():
            p += 1.0
    method.losses(batch, context(1))
    for n, p in teacher.named_parameters():
        if n in student:
            torch.testing.assert_close(p, before[n] + 0.5, atol=1e-3, rtol=0)
    for standing in (context(2, rehearsal=True), context(2, phase="heldout")):
        kept = {n: p.clone() for n, p in teacher.named_parameters()}
        method.losses(batch, standing)
        assert all(torch.equal(kept[n], p) for n, p in teacher.named_parameters())


def test_the_head_is_trained_and_the_teacher_is_no_part_of_what_is_kept(cache: Cache) -> None:
    method = assemble_tokenizer(recipe(), cache, Ranks()).method
    assert set(method.modules()) == {"vtp"}
    assert set(method.beside()) == {"head", "teacher", "centres"}
    held = {id(p) for group in method.optimizers()["tokenizer"].param_groups for p in group["params"]}
    assert all(id(p) in held for p in method.beside()["head"].parameters())
    assert not any(id(p) in held for p in method.beside()["teacher"].parameters())


# Runs


@pytest.mark.parametrize("centring", ["sinkhorn", "mean"])
def test_a_resumed_pretraining_is_the_unbroken_one(centring: str, cache: Cache, tmp_path: Path) -> None:
    asked = recipe(vtp={"centring": centring, "ssl_drop": 0.3, "clip_chunk": 3, "clip_near": 2, "words": 0.5})
    whole, shorter = run(asked, cache, tmp_path / "whole"), run(asked, cache, tmp_path / "other")
    shutil.rmtree(shorter / "checkpoints" / checkpoint.name_of(4))  # as if it had been killed in step 3
    resumed = run(asked, cache, shorter, resume=True)
    for name in ("model", "beside", "ema", "optimizer"):
        one, two = tensors_of(whole, 4, name), tensors_of(resumed, 4, name)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one), name
    assert any(key.startswith("teacher.") for key in tensors_of(whole, 4, "beside"))


def test_the_second_stage_changes_the_decoder_alone(cache: Cache, tmp_path: Path) -> None:
    first = run(recipe(), cache, tmp_path / "first")
    more = {"gan_lecam": 0.1, "gan_r1": 1.0, "gan_start": 1}
    asked = recipe("decoder", vtp=more, train={"init_from": str(first)})
    second = run(asked, cache, tmp_path / "second")
    again = run(asked, cache, tmp_path / "again")
    before, after = tensors_of(first, 4, "ema"), tensors_of(second, 4, "model")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert all(key.startswith("vtp.pixel_decoder.") for key in changed)
    beside = tensors_of(second, 4, "beside")
    assert beside["lecam.updates"] == 4
    assert all(torch.equal(value, beside[key]) for key, value in tensors_of(again, 4, "beside").items())


def test_the_judge_counts_from_its_step_on(cache: Cache, tmp_path: Path) -> None:
    first = run(recipe(), cache, tmp_path / "first")
    asked = recipe("decoder", vtp={"gan_start": 2}, train={"init_from": str(first)})
    parts = assemble_tokenizer(asked, cache, Ranks())
    assert isinstance(parts.method, FinetuneDecoder)
    batch = batch_of(parts)
    early, late = (parts.method.losses(batch, context(n, "decoder")).logs for n in (1, 2))
    assert "gan" not in early
    assert late["gan_weight"] > 0
    fixed = recipe("decoder", vtp={"gan_adaptive": False, "gan": 0.25}, train={"init_from": str(first)})
    method = assemble_tokenizer(fixed, cache, Ranks()).method
    assert method.losses(batch, context(2, "decoder")).logs["gan_weight"] == 0.25


def test_what_was_trained_is_converted_cached_and_decoded(
    cache: Cache, entries: list[ManifestEntry], tmp_path: Path
) -> None:
    run_dir = run(recipe(), cache, tmp_path / "run")
    manifest = tmp_path / "manifest.jsonl"
    write_manifest(manifest, entries)
    measured, bare = tmp_path / "measured", tmp_path / "bare"
    _command("convert", str(run_dir), str(measured), "--cache", str(cache.path))
    _command("convert", str(run_dir), str(bare))
    tokenizer = load_tokenizer(measured)
    ema = tensors_of(run_dir, 4, "ema")
    assert torch.equal(tokenizer.model.trunk.norm.weight, ema["vtp.trunk.norm.weight"])  # type: ignore[union-attr]
    text = """
from: quickstart
video: {height: 16, width: 24, num_frames: 9, fps: 8.0}
tokenizer: {type: vtp, name_or_path: %s, latent_f: 8, latent_t: 4, latent_d: 8, first_alone: true, rope: fp32}
"""
    for name in (measured, bare):
        asked = tmp_path / "use.yaml"
        asked.write_text(text % name)
        out = tmp_path / f"cache_{name.name}"
        for _ in range(2):  # the second time it goes on with what is there
            _command("cache", str(asked), "--manifest", str(manifest), "--out", str(out))
        used = open_cache(out)
        assert used.row(0).decode(used.tokenizer()).shape == (9, 16, 24, 3)
    other = tmp_path / "other"
    _command("convert", str(run_dir), str(other), "--raw")
    asked.write_text(text % other)
    with pytest.raises(SystemExit):
        main_of("cache", str(asked), "--manifest", str(manifest), "--out", str(out))


def test_another_tokenizer_in_a_caches_place_is_refused(entries: list[ManifestEntry], tmp_path: Path) -> None:
    """Latents of one model are never decoded, trained on or added to by another."""
    config = replace(
        model_config(recipe().vtp, 24, 300, rebuilt=True), vision_feature_bottleneck=6, train_clip=False
    )
    for seed, name in enumerate(("mine", "other")):
        model = VTPModel(config, "fp32")
        model.init_weights(seed)
        noise = torch.randint(0, 256, (9, 16, 24, 3), generator=torch_generator("c"), dtype=torch.uint8)
        VtpTokenizer.measured(model, [noise]).save(tmp_path / name)
    shape = {"latent_f": 8, "latent_t": 4, "latent_d": 6, "first_alone": True, "rope": "fp32"}
    asked = quick({"type": "vtp", "name_or_path": str(tmp_path / "mine"), **shape})
    build_cache(asked, entries[:4], tmp_path / "cache")
    cached = open_cache(tmp_path / "cache").tokenizer().fingerprint()
    own, weights = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("mine", "other"))
    (tmp_path / "mine" / "model.safetensors").write_bytes(weights)
    assert open_cache(tmp_path / "cache").tokenizer().fingerprint() == cached
    (tmp_path / "cache" / "tokenizer" / "model.safetensors").write_bytes(weights)
    said = (
        rf"cache/tokenizer: is \w{{12}} and the cache's latents were made by {cached[:12]}: .* restore them"
    )
    with pytest.raises(UserError, match=said):
        open_cache(tmp_path / "cache").tokenizer()
    (tmp_path / "mine" / "model.safetensors").write_bytes(own)
    with pytest.raises(UserError, match=said):
        build_cache(asked, entries, tmp_path / "cache")


def test_previews_show_held_out_clips_over_what_became_of_them(cache: Cache, tmp_path: Path) -> None:
    parts = assemble_tokenizer(recipe(), cache, Ranks())
    from contextlib import nullcontext

    TokenizerPreviews(parts, tmp_path)(2, nullcontext, nullcontext)
    assert sorted(file.name for file in (tmp_path / "samples").iterdir()) == [
        "step_00000002_ema.png",
        "step_00000002_raw.png",
    ]


def main_of(*arguments: str) -> None:
    import sys
    from unittest import mock

    with mock.patch.object(sys, "argv", ["motionloom", *arguments]):
        main()


def _command(*arguments: str) -> None:
    with pytest.raises(SystemExit) as end:
        main_of(*arguments)
    assert end.value.code in (0, None), arguments


# What is refused

PUBLISHED = {
    **{name: VtpConfig.model_fields[name].default for name in VTP},
    "preset": "S",
    "perceptual": 0.0,
    "global_size": 32,
    "local_size": 16,
}
SQUARE = {"width": 32, "height": 32, "num_frames": 9}
WRONG: list[tuple[str, Callable[[], Recipe], str]] = [
    (
        "latents",
        lambda: recipe(tokenizer={"type": "patch"}),
        "learns from pixels: set tokenizer.type to pixels",
    ),
    ("nothing", lambda: recipe(vtp={"rec": 0, "clip": 0, "ssl": 0}), "so there is nothing to learn"),
    ("no part", lambda: recipe(vtp={"l1": 0}), "vtp.rec has no part with a weight"),
    ("one clip", lambda: recipe(train={"batch_size": 1}), "tells a clip from others of its batch"),
    ("sides", lambda: recipe(vtp={"patch": 5}), "video.width 24 is no multiple of vtp.patch 5: use 20 or 25"),
    (
        "frames",
        lambda: recipe(vtp={"temporal_patch": 2}, video={"num_frames": 8, "width": 24, "height": 16}),
        "use 7 or 9",
    ),
    (
        "crops",
        lambda: recipe(vtp={"local_size": 12}),
        "vtp.local_size 12 is no multiple of vtp.patch 8: use 8 or 16",
    ),
    ("heads", lambda: recipe(vtp={"heads": 3}), "vtp.width 32 is no multiple of 12: use 24 or 36"),
    ("cut", lambda: recipe(train={"sharding": "fsdp"}), "set train.sharding to ddp"),
    ("second stage", lambda: recipe("decoder"), "name its run in train.init_from"),
    (
        "small",
        lambda: recipe(vtp={"perceptual": 1, "patch": 8}, video={"height": 8, "width": 24, "num_frames": 9}),
        "and video.height is 8",
    ),
    (
        "shown",
        lambda: recipe(vtp={"ssl_frames": 4}),
        "vtp.ssl_frames 4 is not one frame and groups of 4: use 5",
    ),
    ("words", lambda: recipe(vtp={"context": 2}), "leaves a caption no word"),
    ("words without contrast", lambda: recipe(vtp={"clip": 0.0, "words": 1.0}), "set vtp.words to 0"),
    (
        "nothing at first",
        lambda: recipe(vtp={"clip": 0.0, "ssl": 0.0, "rec_start": 0.5}),
        "vtp.rec_start gives the first steps nothing to learn",
    ),
    ("near without contrast", lambda: recipe(vtp={"clip": 0.0, "clip_near": 2}), "set vtp.clip_near to 0"),
    ("a rate of no rest", lambda: recipe(train={"rest_lr": 1e-3}), "train.optimizer muon"),
    ("denoise", lambda: recipe("denoise"), "tokenizer.type pixels is for train.method tokenizer"),
    ("one prototype", lambda: recipe(vtp={"prototypes": 1}), "vtp.prototypes 1 leaves nothing to sort by"),
    ("none rebuilt", lambda: recipe(vtp={"rec_share": 0}), "vtp.rec_share is 0, and vtp.rec is not"),
    ("none distilled", lambda: recipe(vtp={"ssl_share": 0}), "vtp.ssl_share is 0, and vtp.ssl is not"),
    ("masks", lambda: recipe(vtp={"mask_ratio": [0.9, 0.1]}), "vtp.mask_ratio goes from 0.9 down to 0.1"),
    ("whole", lambda: recipe(vtp={"global_scale": [1, 0.3]}), "vtp.global_scale goes from 1 down to 0.3"),
    ("parts", lambda: recipe(vtp={"local_scale": [0.3, 0.1]}), "vtp.local_scale goes from 0.3 down to 0.1"),
    (
        "sizes beside a preset",
        lambda: recipe(vtp={**PUBLISHED, "width": 96, "qk_norm": True}, video=SQUARE),
        "vtp.preset S has sizes of its own, so vtp.width, vtp.qk_norm would not be read: leave them out",
    ),
    (
        "words beside a preset",
        lambda: recipe(vtp={**PUBLISHED, "vocab_size": 512}, video=SQUARE),
        "vtp.preset S has sizes of its own, so vtp.vocab_size would not be read: leave it out, or the preset",
    ),
    (
        "frames of a preset",
        lambda: recipe(vtp=PUBLISHED, video={**SQUARE, "num_frames": 8}),
        "video.num_frames 8 is not one frame and groups of vtp.temporal_patch 4: use 5 or 9",
    ),
]


@pytest.mark.parametrize(("name", "asked", "said"), WRONG, ids=[name for name, _, _ in WRONG])
def test_recipes_that_do_not_fit_are_refused(name: str, asked: Callable[[], Recipe], said: str) -> None:
    with pytest.raises(ValidationError) as error:
        asked()
    assert said in str(error.value)


def test_what_no_loss_reads_is_not_looked_at() -> None:
    free = {"prototypes": 1, "ssl_share": 0, "mask_ratio": [0.9, 0.1]}
    assert recipe(vtp={"ssl": 0, **free}).vtp.prototypes == 1
    assert recipe(vtp={"rec": 0, "rec_share": 0}).vtp.rec_share == 0


def test_our_options_apply_to_a_released_size() -> None:
    options = {"temporal_patch": 2, "temporal_window": 1, "conv_kernel": 3}
    asked = recipe(vtp={**PUBLISHED, **options}, video=SQUARE)
    config = model_config(asked.vtp, 32, 49408, rebuilt=True)
    assert config == replace(PRESETS["S"], image_size=32, **options)
    with torch.device("meta"):
        model = VTPModel(config)
    z = model.latents(model.trunk(torch.zeros(1, 9, 3, 32, 32, device="meta")))
    assert z.shape == (1, 5, 2, 2, 64)


def test_crops_that_are_larger_than_frames_are_told() -> None:
    asked = ["vtp.ssl=1", "vtp.global_size=64"]
    assert any("vtp.global_size is 64" in note for note in load_recipe_with_notes("vtp_shapeworld", asked)[1])
    assert not load_recipe_with_notes("vtp_shapeworld", asked[:1])[1]


def test_clips_without_words_are_refused_before_the_first_step(
    entries: list[ManifestEntry], tmp_path: Path
) -> None:
    silent = [replace(entry, caption="" if n < 2 else entry.caption) for n, entry in enumerate(entries)]
    build_cache(recipe(), silent, tmp_path / "cache")
    found = open_cache(tmp_path / "cache")
    with pytest.raises(UserError, match="2 of 10 clips have no caption to be contrasted with") as error:
        assemble_tokenizer(recipe(), found, Ranks())
    assert "the first is clip000" in str(error.value)
    assemble_tokenizer(recipe(vtp={"clip": 0.0}), found, Ranks())


def test_another_model_than_the_one_to_start_from_is_refused(cache: Cache, tmp_path: Path) -> None:
    first = run(recipe(), cache, tmp_path / "first")
    for change, said in (({"width": 64}, "vision_embed_dim 32"), ({"text_heads": 4}, "text_num_heads 2")):
        with pytest.raises(UserError, match=f"its model has {said}"):
            assemble_tokenizer(recipe(vtp=change, train={"init_from": str(first)}), cache, Ranks())


def test_a_recipe_is_written_and_read_again(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(dump_recipe(recipe()))
    assert load_recipe(tmp_path / "a.yaml") == recipe()


def test_a_run_without_words_is_not_gone_on_from_with_them(cache: Cache, tmp_path: Path) -> None:
    first = run(recipe(vtp={"clip": 0.0}), cache, tmp_path / "first")
    assert not any("text" in name or "token_embedding" in name for name in tensors_of(first, 4, "model"))
    with pytest.raises(UserError, match="was trained without captions"):
        assemble_tokenizer(recipe(train={"init_from": str(first)}), cache, Ranks())


def test_another_rope_than_the_run_to_start_from_is_refused(cache: Cache, tmp_path: Path) -> None:
    first = run(recipe(), cache, tmp_path / "first")
    with pytest.raises(UserError, match=r"was trained with vtp\.rope fp32, the recipe says bf16"):
        assemble_tokenizer(recipe(vtp={"rope": "bf16"}, train={"init_from": str(first)}), cache, Ranks())


def test_pictures_are_judged_at_the_layer_of_the_first_frame(cache: Cache, tmp_path: Path) -> None:
    first = run(recipe(), cache, tmp_path / "first")
    parts = assemble_tokenizer(recipe("decoder", train={"init_from": str(first)}), cache, Ranks())
    batch = batch_of(parts)
    one = replace(batch, latents={"video": replace(batch.video, x_BFHWC=batch.video.x_BFHWC[:, :1])})
    assert parts.method.losses(one, context(2, "decoder")).logs["gan_weight"] > 0


def test_a_filled_folder_is_not_written_into(cache: Cache, tmp_path: Path) -> None:
    run_dir = run(recipe(), cache, tmp_path / "run")
    _command("convert", str(run_dir), str(tmp_path / "out"))
    for more in ([str(tmp_path / "out")], [str(tmp_path / "new"), "--dtype", "bf16"]):
        with pytest.raises(SystemExit) as end:
            main_of("convert", str(run_dir), *more)
        assert end.value.code == 2
