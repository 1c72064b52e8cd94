"""YAML files written for CausVid and Self-Forcing: every key is mapped or told, and the numbers agree.

The files are made here from the published table of keys; a value that the table leaves open is a plain one.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from motionloom.backbones.families import FAMILIES, as_original
from motionloom.backbones.weights import Sink, Weights, write_folder
from motionloom.config import Recipe, dump_recipe, load_recipe, load_recipe_with_notes
from motionloom.config.causvid import from_causvid
from motionloom.config.keys import flatten
from motionloom.errors import UserError
from motionloom.flow import sigma_schedule
from motionloom.rng import torch_generator
from motionloom.train import checkpoint
from test_cli import call

NEGATIVE = "色调艳丽，过曝，静态"
WANDB = {f"wandb_{what}": f"WANDB_{what}" for what in ("host", "key", "entity", "project", "name")}
FSDP = {
    f"{net}_fsdp_wrap_strategy": "size" for net in ("generator", "real_score", "fake_score", "text_encoder")
}
SHAPE = [1, 21, 16, 60, 104]

# What all of CausVid's files say, then what each says beside it.
CAUSVID_ALL: dict[str, Any] = {
    "model_name": "wan",
    "generator_grad": {"model": True},
    "denoising_step_list": [1000, 757, 522, 0],
    "warp_denoising_step": False,
    "generator_task": "causal_video",
    "batch_size": 1,
    "image_or_video_shape": SHAPE,
    "lr": 2e-6,
    "beta1": 0.9,
    "beta2": 0.999,
    "sharding_strategy": "hybrid_full",
    "gradient_checkpointing": True,
    "mixed_precision": True,
    "seed": 0,
    "log_iters": 200,
    "output_path": "/fsx/out",
    **WANDB,
}
CAUSVID_DMD: dict[str, Any] = {
    "real_score_grad": {"model": False},
    "fake_score_grad": {"model": True},
    "num_train_timestep": 1000,
    "timestep_shift": 8.0,
    "real_guidance_scale": 3.5,
    "denoising_loss_type": "flow",
    "distillation_loss": "dmd",
    "dfake_gen_update_ratio": 5,
    "negative_prompt": NEGATIVE,
    **FSDP,
}
CAUSAL: dict[str, Any] = {
    "generator_name": "causal_wan",
    "generator_ckpt": "/fsx/ode/checkpoint_model_003000/model.pt",
    "real_task_type": "bidirectional_video",
    "fake_task_type": "bidirectional_video",
    "backward_simulation": False,
    "num_frame_per_block": 3,
    "data_path": "/data/mixkit_latents_lmdb",
}
BIDIRECTIONAL: dict[str, Any] = {
    "denoising_step_list": [1000, 757, 522],
    "generator_task": "bidirectional_video",
    "real_task_type": "bidirectional_video",
    "fake_task_type": "bidirectional_video",
}
WARPED = {
    "denoising_step_list": [1000, 750, 500, 250, 0],
    "warp_denoising_step": True,
    "real_guidance_scale": 2.0,
}
CAUSVID: dict[str, dict[str, Any]] = {
    "wan_causal_ode": {
        **CAUSVID_ALL,
        "model_name": "causal_wan",
        "num_frame_per_block": 3,
        "distillation_loss": "ode",
        "data_path": "/data/mixkit_ode_lmdb",
        "batch_size": 2,
        "generator_fsdp_wrap_strategy": "size",
        "text_encoder_fsdp_wrap_strategy": "size",
    },
    "wan_causal_dmd": {**CAUSVID_ALL, **CAUSVID_DMD, **CAUSAL},
    "wan_causal_dmd_warp_4step_cfg2": {**CAUSVID_ALL, **CAUSVID_DMD, **CAUSAL, **WARPED},
    "wan_bidirectional_dmd": {
        **CAUSVID_ALL,
        **CAUSVID_DMD,
        **BIDIRECTIONAL,
        "data_path": "mixkit_prompts.txt",
        "generator_ckpt": None,
    },
    "wan_bidirectional_dmd_from_scratch": {
        **CAUSVID_ALL,
        **CAUSVID_DMD,
        **BIDIRECTIONAL,
        "backward_simulation": False,
        "data_path": "/data/mixkit_latents_lmdb",
    },
}

DEFAULT_CONFIG: dict[str, Any] = {
    "independent_first_frame": False,
    "warp_denoising_step": False,
    "weight_decay": 0.01,
    "same_step_across_blocks": True,
    "discriminator_lr_multiplier": 1.0,
    "last_step_only": False,
    "i2v": False,
    "num_training_frames": 21,
    "gc_interval": 100,
    "context_noise": 0,
    "causal": True,
    "ckpt_step": 0,
    "prompt_name": "MovieGenVideoBench",
    "prompt_path": "prompts/MovieGenVideoBench.txt",
    "eval_first_n": 64,
    "num_samples": 1,
    "height": 480,
    "width": 832,
    "num_frames": 81,
}
SELF_FORCING_DMD: dict[str, Any] = {
    "generator_ckpt": "checkpoints/ode_init.pt",
    "real_name": "Wan2.1-T2V-14B",
    "fake_name": "Wan2.1-T2V-1.3B",
    "denoising_step_list": [1000, 750, 500, 250],
    "warp_denoising_step": True,
    "ts_schedule": False,
    "ts_schedule_max": False,
    "num_train_timestep": 1000,
    "timestep_shift": 5.0,
    "guidance_scale": 3.0,
    "denoising_loss_type": "flow",
    "mixed_precision": True,
    "seed": 0,
    "sharding_strategy": "hybrid_full",
    "lr": 2e-6,
    "lr_critic": 4e-7,
    "beta1": 0.0,
    "beta2": 0.999,
    "beta1_critic": 0.0,
    "beta2_critic": 0.999,
    "data_path": "prompts/vidprom_filtered_extended.txt",
    "batch_size": 1,
    "total_batch_size": 64,
    "ema_weight": 0.99,
    "ema_start_step": 200,
    "log_iters": 50,
    "negative_prompt": NEGATIVE,
    "dfake_gen_update_ratio": 5,
    "image_or_video_shape": SHAPE,
    "distribution_loss": "dmd",
    "trainer": "score_distillation",
    "gradient_checkpointing": True,
    "num_frame_per_block": 3,
    "load_raw_video": False,
    "model_kwargs": {"timestep_shift": 5.0, "local_attn_size": -1, "sink_size": 0},
    **WANDB,
    **FSDP,
}
GAN: dict[str, Any] = {
    "trainer": "gan",
    "distribution_loss": "gan",
    "gen_lr": 2e-6,
    "critic_lr": 2e-6,
    "gan_g_weight": 0.01,
    "gan_d_weight": 0.01,
    "r1_weight": 0.0,
    "r2_weight": 0.0,
    "r1_sigma": 0.01,
    "r2_sigma": 0.01,
    "relativistic_discriminator": True,
    "critic_timestep_shift": 5.0,
    "discriminator_warmup_steps": 0,
    "max_grad_norm_generator": 10.0,
    "max_grad_norm_critic": 10.0,
    "concat_time_embeddings": False,
    "num_class": 1,
}
OPTIONAL: dict[str, Any] = {
    "min_score_timestep": 0,
    "text_encoder_cpu_offload": False,
    "max_pair": 1000,
    "fake_guidance_scale": 0.0,
    "real_guidance_scale": 3.0,
}
SELF_FORCING: dict[str, dict[str, Any]] = {
    "self_forcing_dmd": SELF_FORCING_DMD,
    "self_forcing_sid": {
        **SELF_FORCING_DMD,
        "real_name": "Wan2.1-T2V-1.3B",
        "lr_critic": 2e-6,
        "weight_decay": 0.0,
        "sid_alpha": 1.0,
    },
    "merged_and_optional": {**DEFAULT_CONFIG, **SELF_FORCING_DMD, **OPTIONAL},
    "gan": {**DEFAULT_CONFIG, **SELF_FORCING_DMD, **GAN},
    "causvid_loss": {**SELF_FORCING_DMD, "distribution_loss": "causvid"},
    "ode": {**DEFAULT_CONFIG, **SELF_FORCING_DMD, "trainer": "ode", "distribution_loss": "ode"},
    "teacher_forcing": {
        **DEFAULT_CONFIG,
        **SELF_FORCING_DMD,
        "trainer": "diffusion",
        "teacher_forcing": True,
        "noise_augmentation_max_timestep": 0,
    },
}
ALL = {**CAUSVID, **SELF_FORCING}
every_file = pytest.mark.parametrize("name", ALL)

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a file of theirs as YAML."""

    def _write(tree: dict[str, Any] | str, name: str = "theirs") -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree, allow_unicode=True), "utf-8")
        return path

    return _write


def loaded(write: Write, name: str, **changes: Any) -> tuple[Recipe, list[str]]:
    return load_recipe_with_notes(write({**ALL[name], **changes}, name))


def refusal(write: Write, name: str, **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        loaded(write, name, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def missed(notes: list[str]) -> list[str]:
    return [note.partition(":")[0] for note in notes if "NOT APPLIED" in note]


# ---- whole files


@every_file
def test_a_file_of_theirs_loads_and_what_it_became_is_a_recipe_of_ours(write: Write, name: str) -> None:
    recipe, notes = loaded(write, name)
    assert recipe.experiment_name == name
    assert notes
    assert all("\n" not in note and len(note) < 260 for note in notes)
    told = len(missed(notes))
    assert all("NOT APPLIED" in note for note in notes[:told]), "what is not done stands first"
    assert load_recipe_with_notes(write(dump_recipe(recipe), "resolved")) == (recipe, [])
    assert (recipe.model.type, recipe.model.preset) == ("wan", "wan2.1-t2v-1.3b")
    assert (recipe.video.num_frames, recipe.video.height, recipe.video.width, recipe.video.fps) == (
        81,
        480,
        832,
        16,
    )
    assert (recipe.tokenizer.type, recipe.tokenizer.first_alone) == ("wan_vae", True)
    assert (recipe.text_encoder.max_length, recipe.text_encoder.padding) == (512, "zero")
    assert (recipe.train.lr, recipe.train.clip_grad_norm, recipe.train.precision) == (2e-6, 10.0, "bf16")
    assert (recipe.train.sharding, recipe.model.checkpoint_blocks) == ("fsdp", True)
    assert recipe.train.cfg_dropout_prob == 0


OTHERS: dict[str, list[Any]] = {
    "model_name": ["Wan2.1-T2V-14B"],
    "generator_name": ["wan"],
    "real_name": ["causal_wan"],
    "fake_name": ["causal_wan"],
    "generator_task": ["causal_video", "bidirectional_video"],
    "trainer": ["diffusion", "gan"],
    "distribution_loss": ["sid", "dmd"],
    "distillation_loss": ["ode", "dmd"],
    "sharding_strategy": ["no_shard"],
    "denoising_step_list": [[1000, 900, 400]],
    "image_or_video_shape": [[1, 6, 16, 30, 52]],
    "local_attn_size": [9],
    "sink_size": [3],
}
"""Another value by key, where one more or its opposite would be none; the first that is another."""


def other(key: str, value: Any) -> Any:
    name = key.rpartition(".")[2]
    if name in OTHERS:
        return next(one for one in OTHERS[name] if one != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1 if isinstance(value, int) else value / 2 or 0.25
    return f"{value}2"


@every_file
def test_no_key_is_passed_over_in_silence(name: str) -> None:
    """Another value makes another recipe, or is told as not applied; else the key has a note."""
    flat = {key: value for key, value in flatten(ALL[name]).items() if value is not None}
    before, notes = translated(flat)
    silent = []
    for key, value in flat.items():
        if any(note.startswith((f"{key} ", f"{key}:")) for note in notes):
            continue
        after, changed_notes = translated({**flat, key: other(key, value)})
        if after == before and key not in missed(changed_notes):
            silent.append(key)
    assert silent == []


def translated(flat: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    found = from_causvid(flat, "theirs.yaml")
    assert found is not None
    return found


def test_causvid_keeps_its_numbers(write: Write) -> None:
    recipe, notes = loaded(write, "wan_causal_dmd")
    d, t = recipe.distil, recipe.train
    assert (t.method, d.loss, d.source, d.teacher, d.critic) == ("matching", "dmd", "data", "wan", "full")
    assert (d.guidance, d.guidance_form, d.scale) == (3.5, "delta", 4.5)
    assert (d.score_shift, d.score_range, d.critic_ratio, d.shift) == (8.0, (0.02, 0.98), 5, 8.0)
    assert (t.betas, t.weight_decay, t.batch_size, t.save_every_steps) == ((0.9, 0.999), 0.01, 1, 200)
    assert (recipe.plan.type, recipe.plan.frames, recipe.plan.forcing) == ("chunks", 3, "diffusion")
    assert recipe.ema.enabled is False
    assert (recipe.seed, recipe.output_dir, d.negative) == (0, "/fsx/out", NEGATIVE)
    assert recipe.model.name_or_path == "/fsx/ode/checkpoint_model_003000/model.pt"
    assert missed(notes) == []
    assert any(
        "`motionloom convert /fsx/ode/checkpoint_model_003000/model.pt FOLDER`" in note for note in notes
    )
    assert any("--lmdb /data/mixkit_latents_lmdb" in note for note in notes)
    assert not any("WANDB_key" in note for note in notes), "a secret is not repeated"


def test_self_forcing_keeps_its_numbers(write: Write) -> None:
    recipe, _ = loaded(write, "self_forcing_dmd")
    d, t = recipe.distil, recipe.train
    assert (t.method, d.loss, d.source, d.teacher) == ("matching", "dmd", "rollout", "wan_14b")
    assert d.critic_from == "wan"
    assert (d.scale, d.score_shift, d.critic_lr, t.lr) == (4.0, 5.0, 4e-7, 2e-6)
    assert (t.betas, t.weight_decay, d.same_exit, d.last_exit) == ((0.0, 0.999), 0.01, True, False)
    assert (recipe.ema.enabled, recipe.ema.decay, recipe.ema.start_step) == (True, 0.99, 200)
    assert (d.context_noise, d.longest, recipe.plan.window, recipe.plan.sinks) == (0.0, None, None, 0)
    sid, notes = loaded(write, "self_forcing_sid")
    assert (sid.distil.loss, sid.distil.teacher, sid.train.weight_decay) == ("dmd", "wan", 0.0)
    assert any(note.startswith("sid_alpha: distribution_loss is dmd") for note in notes)
    assert loaded(write, "self_forcing_sid", distribution_loss="sid")[0].distil.loss == "sid"


def test_the_stages_of_both(write: Write) -> None:
    ode, notes = loaded(write, "wan_causal_ode")
    assert (ode.train.method, ode.train.batch_size, ode.plan.type) == ("ode", 2, "chunks")
    assert (ode.distil.guidance, ode.distil.guidance_form) == (6.0, "scale")
    assert ode.distil.negative == load_recipe("causvid_ode_wan").distil.negative
    assert missed(notes) == []
    for name, source in {
        "wan_bidirectional_dmd": "rollout",
        "wan_bidirectional_dmd_from_scratch": "data",
    }.items():
        recipe, notes = loaded(write, name)
        assert (recipe.plan.type, recipe.distil.source) == ("text_to_video", source)
        assert missed(notes) == []
    assert loaded(write, "causvid_loss")[0].distil.source == "data"
    gan = loaded(write, "gan")[0].distil
    assert (gan.loss, gan.gan_form, gan.gan_weight, gan.gan_blocks) == (
        "gan",
        "relativistic",
        0.01,
        (13, 21, 29),
    )
    teacher = loaded(write, "teacher_forcing")[0]
    assert (teacher.train.method, teacher.plan.forcing) == ("denoise", "teacher")
    assert (teacher.flow_matching.shift, teacher.flow_matching.weighting) == (5.0, "bell")
    assert teacher.distil == Recipe().distil


# ---- levels


def test_lists_of_steps_are_levels_of_the_scheduler(write: Write) -> None:
    """Warped: 1000 s u / (1 + (s - 1) u) of u = step / 1000. Else t itself, at the nearest of 1000 levels."""
    warped = loaded(write, "wan_causal_dmd_warp_4step_cfg2")[0].distil
    assert [1000 * s for s in warped.levels] == pytest.approx([1000, 960, 888.8889, 727.2727], abs=1e-4)
    assert warped.scale == 3.0
    levels = loaded(write, "self_forcing_dmd")[0].distil.levels
    assert [1000 * s for s in levels] == pytest.approx([1000, 937.5, 833.3333, 625], abs=1e-4)
    plain, notes = loaded(write, "wan_causal_dmd")
    assert plain.distil.levels == pytest.approx((1, 28 / 37, 12 / 23), abs=1e-12)
    assert any("757 is sigma 0.756757" in note and "-0.000243" in note for note in notes)
    assert any("522 is sigma 0.521739" in note and "-0.000261" in note for note in notes)


@pytest.mark.parametrize(
    ("name", "steps"), [("wan_causal_ode", 50), ("wan_causal_dmd", 50), ("self_forcing_dmd", 48), ("ode", 48)]
)
def test_the_levels_lie_on_the_teachers_walk(write: Write, name: str, steps: int) -> None:
    """CausVid's on 50 steps and Self-Forcing's on 48, as their own scripts walk."""
    d = loaded(write, name)[0].distil
    assert d.grid_steps == steps
    grid = sigma_schedule(d.grid_steps, shift=d.shift)
    assert all(float((grid - level).abs().min()) < 1e-6 for level in d.levels)


def test_a_list_off_every_short_walk_takes_a_long_one(write: Write) -> None:
    d = loaded(write, "wan_causal_ode", denoising_step_list=[1000, 748, 502, 0])[0].distil
    grid = sigma_schedule(d.grid_steps, shift=d.shift)
    assert all(float((grid - level).abs().min()) < 1e-6 for level in d.levels)
    assert d.levels == pytest.approx((1, 0.748, 0.502), abs=1e-3)


def test_the_papers_999_is_noise_alone(write: Write) -> None:
    recipe, notes = loaded(write, "wan_causal_dmd", denoising_step_list=[999, 748, 502, 247])
    assert recipe.distil.levels[0] == 1.0
    assert len(recipe.distil.levels) == 4
    assert any("999 becomes 1000" in note for note in notes)


# ---- what is not done is said


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("wan_causal_dmd", {"generator_grad": {"model": False}}),
        ("wan_causal_dmd", {"real_score_grad": {"model": True}}),
        ("wan_causal_dmd", {"denoising_loss_type": "x0"}),
        ("wan_causal_dmd", {"real_task_type": "causal_video"}),
        ("wan_causal_dmd", {"real_name": "causal_wan"}),
        ("wan_causal_dmd", {"num_train_timestep": 500}),
        ("wan_causal_dmd", {"generator_task": "bidirectional_video"}),
        ("wan_bidirectional_dmd", {"generator_task": "causal_video"}),
        ("self_forcing_dmd", {"ts_schedule": True}),
        ("self_forcing_dmd", {"fake_guidance_scale": 1.5}),
        ("self_forcing_dmd", {"beta1_critic": 0.5}),
        ("self_forcing_dmd", {"num_training_frames": 9}),
        ("self_forcing_dmd", {"min_score_timestep": 100}),
        ("gan", {"r2_sigma": 0.1}),
        ("gan", {"critic_timestep_shift": 1.0}),
        ("gan", {"max_grad_norm_critic": 1.0}),
        ("teacher_forcing", {"noise_augmentation_max_timestep": 100}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_what_a_file_wants_and_is_not_here_leads_the_notes(write: Write, name: str, changes: Any) -> None:
    usual = missed(loaded(write, name)[1])
    (key,) = flatten(changes)
    found = missed(loaded(write, name, **changes)[1])
    assert key in found
    assert key not in usual
    assert set(usual) <= set(found)


def test_silence_of_self_forcing_ties_the_judges_level_and_that_is_told(write: Write) -> None:
    tree = {key: value for key, value in SELF_FORCING_DMD.items() if key != "ts_schedule"}
    assert "ts_schedule" in missed(load_recipe_with_notes(write(tree))[1])


def test_keys_of_nobody_are_named_with_the_nearest(write: Write) -> None:
    recipe, notes = loaded(write, "wan_causal_dmd", denoising_steps_list=[1000, 1], lr_rate=3)
    assert recipe.train.lr == 2e-6
    assert (
        "denoising_steps_list: ignored, no key of CausVid either; did you mean denoising_step_list?" in notes
    )
    assert any(note.startswith("lr_rate: ignored, no key of CausVid either") for note in notes)


def test_most_keys_say_whose_a_file_is(write: Write) -> None:
    recipe, notes = loaded(write, "wan_causal_ode", num_training_frames=21)
    assert recipe.train.method == "ode"
    assert any(note.startswith("num_training_frames: ignored, no key of CausVid") for note in notes)
    recipe, notes = loaded(write, "self_forcing_dmd", backward_simulation=False)
    assert recipe.distil.source == "rollout"
    assert any(note.startswith("backward_simulation: ignored, no key of Self-Forcing") for note in notes)


# ---- chunks, lengths, windows


def test_frames_become_chunks(write: Write) -> None:
    kwargs = {"timestep_shift": 5.0, "local_attn_size": 9, "sink_size": 3}
    recipe, notes = loaded(write, "self_forcing_dmd", model_kwargs=kwargs)
    assert (recipe.plan.window, recipe.plan.sinks) == (3, 1)
    assert not any("kept whole" in note for note in notes)
    recipe, notes = loaded(
        write, "self_forcing_dmd", model_kwargs={**kwargs, "local_attn_size": 10, "sink_size": 1}
    )
    assert (recipe.plan.window, recipe.plan.sinks) == (3, 1)
    assert sum("kept whole" in note for note in notes) == 2
    assert loaded(write, "self_forcing_dmd", num_training_frames=63)[0].distil.longest == 63
    assert loaded(write, "self_forcing_dmd", context_noise=100)[0].distil.context_noise == pytest.approx(0.1)
    first = loaded(write, "self_forcing_dmd", independent_first_frame=True)[0].plan
    assert (first.first_alone, first.conditions) == (True, ())
    given = loaded(write, "self_forcing_dmd", i2v=True)[0].plan
    assert given.first_alone
    assert [one.type for one in given.conditions] == ["first_frame"]
    assert loaded(write, "self_forcing_dmd", causal=False)[0].plan.type == "text_to_video"


def test_a_shape_is_a_clip(write: Write) -> None:
    video = loaded(write, "wan_causal_dmd", image_or_video_shape=[4, 6, 16, 30, 52])[0].video
    assert (video.num_frames, video.height, video.width) == (21, 240, 416)


# ---- files on files


def test_default_config_beside_a_file_of_self_forcing_holds_where_it_is_silent(write: Write) -> None:
    write({**DEFAULT_CONFIG, "weight_decay": 0.3, "lr": 1.0, "last_step_only": "yes"}, "default_config")
    recipe, notes = loaded(write, "self_forcing_dmd")
    assert (recipe.train.weight_decay, recipe.distil.last_exit) == (0.3, True)
    assert recipe.train.lr == 2e-6, "the file itself comes first"
    assert any("default_config.yaml beside it holds" in note for note in notes)
    recipe, notes = loaded(write, "wan_causal_dmd")
    assert recipe.train.weight_decay == 0.01, "CausVid reads no such file"


def test_ours_goes_on_top(write: Write) -> None:
    write(ALL["wan_causal_dmd"], "theirs")
    mine = write("from: theirs.yaml\nexperiment_name: mine\nplan: {window: 5}", "mine")
    recipe, notes = load_recipe_with_notes(mine, ["train.max_steps=7", "distil.critic=lora"])
    assert (recipe.plan.frames, recipe.plan.window, recipe.train.max_steps) == (3, 5, 7)
    assert recipe.distil.critic == "lora"
    assert any("read as a YAML for CausVid" in note for note in notes)
    folder = load_recipe(mine, ["model.name_or_path=models/other"])
    assert (folder.model.name_or_path, folder.model.preset) == ("models/other", ""), (
        "its weights say the sizes"
    )


def test_a_file_of_ours_is_not_taken_for_theirs(write: Write) -> None:
    with pytest.raises(UserError, match="num_frame_per_block is not a key"):
        load_recipe(write({"train": {"lr": 1e-4}, "num_frame_per_block": 3}))


# ---- what is refused


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("wan_causal_dmd", {"model_name": "sdxl"}, "images of SDXL are not distilled here"),
        (
            "wan_causal_dmd",
            {"generator_name": "cogvideo"},
            'generator_name is "cogvideo"; expected wan, causal_wan',
        ),
        (
            "wan_causal_dmd",
            {"denoising_step_list": None},
            "denoising_step_list is null; expected a list of numbers",
        ),
        (
            "wan_causal_dmd",
            {"denoising_step_list": "1000,757"},
            "expected a list of numbers from 1000 down to 0",
        ),
        (
            "wan_causal_dmd",
            {"denoising_step_list": [1000, "x"]},
            "expected a list of numbers from 1000 down to 0",
        ),
        (
            "wan_causal_dmd",
            {"denoising_step_list": [1000, 2000]},
            "expected a list of numbers from 1000 down to 0",
        ),
        ("wan_causal_dmd", {"denoising_step_list": [1000, 522, 757, 0]}, "expected levels that fall"),
        ("wan_causal_dmd", {"denoising_step_list": [0]}, "expected levels that fall"),
        ("wan_causal_dmd", {"denoising_step_list": [757, 522, 0]}, "a clip begins as noise alone"),
        (
            "self_forcing_dmd",
            {"denoising_step_list": [1000, 750.5]},
            "whole numbers, which warp_denoising_step",
        ),
        ("wan_causal_dmd", {"image_or_video_shape": [1, 21, 4, 60, 104]}, "[batch, latent frames, 16, rows"),
        ("wan_causal_dmd", {"image_or_video_shape": 21}, "image_or_video_shape is 21; expected [batch,"),
        ("wan_causal_dmd", {"image_or_video_shape": None}, "image_or_video_shape is null"),
        ("wan_causal_dmd", {"num_frame_per_block": 0}, "expected a whole number of at least 1"),
        ("wan_causal_dmd", {"num_frame_per_block": 1.5}, "expected a whole number of at least 1"),
        ("wan_causal_dmd", {"distillation_loss": "gan"}, 'distillation_loss is "gan"; expected ode or dmd'),
        ("wan_causal_dmd", {"backward_simulation": "perhaps"}, "expected true or false"),
        ("wan_causal_dmd", {"sharding_strategy": "zero3"}, "expected full, hybrid_full"),
        (
            "wan_causal_dmd",
            {"real_guidance_scale": "high"},
            'real_guidance_scale is "high"; expected a number',
        ),
        ("wan_causal_dmd", {"lr": "fast"}, 'train.lr is "fast"; expected a number above 0'),
        ("wan_causal_dmd", {"batch_size": 0}, "train.batch_size is 0; expected a whole number above 0"),
        ("self_forcing_dmd", {"trainer": "rl"}, "expected score_distillation, ode, gan or diffusion"),
        (
            "self_forcing_dmd",
            {"distribution_loss": "ot"},
            'distribution_loss is "ot"; expected dmd, sid or causvid',
        ),
        ("self_forcing_dmd", {"ema_weight": "x"}, 'ema.decay is "x"'),
        ("self_forcing_dmd", {"model_kwargs": {"timestep_shift": 0}}, "expected a number above 0"),
        (
            "self_forcing_dmd",
            {"model_kwargs": {"local_attn_size": -2}},
            "expected a whole number of at least -1",
        ),
    ],
    ids=lambda value: " ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_wrong_values_are_one_line(write: Write, name: str, changes: Any, told: str) -> None:
    message = refusal(write, name, **changes)
    assert told in message
    assert f"{name}.yaml" in message


def test_yes_is_true_as_their_reader_has_it(write: Write) -> None:
    text = yaml.safe_dump(ALL["wan_causal_dmd"]).replace(
        "gradient_checkpointing: true", "gradient_checkpointing: yes"
    )
    recipe = load_recipe(write(text.replace("warp_denoising_step: false", "warp_denoising_step: off")))
    assert recipe.model.checkpoint_blocks is True


# ---- the recipes for GPUs say the same


def test_the_recipes_hold_what_the_files_say(write: Write) -> None:
    """Section by section; what a person chooses is left out: names, places, ends."""
    pairs = {
        "causvid_ode_wan": "wan_causal_ode",
        "causvid_dmd_wan": "wan_causal_dmd",
        "self_forcing_wan": "self_forcing_dmd",
    }
    chosen = {"init_from", "log_every_steps", "max_steps"}
    for ours, theirs in pairs.items():
        a, b = load_recipe(ours), loaded(write, theirs)[0]
        assert a.plan == b.plan
        assert a.video == b.video
        assert a.tokenizer == b.tokenizer
        assert a.text_encoder == b.text_encoder
        assert a.distil.levels == pytest.approx(b.distil.levels, abs=1e-15)
        assert a.train.model_dump(exclude=chosen) == b.train.model_dump(exclude=chosen)
        own = {"sigmas", "num_steps", "negative"}
        unread = {"critic_lr", "score_shift"} if a.train.method == "ode" else set()
        assert a.distil.model_dump(exclude=own | unread) == b.distil.model_dump(exclude=own | unread)
        assert a.ema.enabled == b.ema.enabled
        assert a.distil.grid_steps == b.distil.grid_steps
        assert math.isclose(a.distil.scale, b.distil.scale)


# ---- and they run, at the size of a toy


TINY = {
    "video": {"width": 32, "height": 32, "num_frames": 17, "fps": 8},
    "tokenizer": {"type": "patch", "name_or_path": "tokenizer"},
    "text_encoder": {
        "type": "hash",
        "padding": "hidden",
        "dim": 32,
        "vocab_size": 256,
        "max_length": 8,
        "name_or_path": "",
    },
    "model": {"preset": "tiny", "name_or_path": "models/wan"},
    "train": {
        "precision": "fp32",
        "sharding": "ddp",
        "batch_size": 2,
        "max_steps": 1,
        "heldout_fraction": 0.25,
        "sample_num_steps": 2,
    },
    "output_dir": "runs",
    "num_workers": 0,
    "seed": 0,  # one table of words for teacher and student
}
FEWER = ("distil.grid_steps=25", "distil.teacher=teacher.yaml")  # 0, 18 and 22 of 25 are 0, 36 and 44 of 50


WAN = FAMILIES["wan"]


@cache
def published(who: str = "wan") -> Weights:
    """A Wan of the tiny preset, every weight a small random number."""
    draw, shapes = torch_generator(who), WAN.shapes(WAN.preset("tiny"))
    return Weights.of_tensors(who, {n: 0.1 * torch.randn(s, generator=draw) for n, s in shapes.items()})


def tensors(weights: Weights) -> dict[str, Tensor]:
    return {name: weights.read(name) for name in weights}


def tiny(base: str, **more: Any) -> dict[str, Any]:
    return {"from": base, **TINY, **more}


def done(*words: str) -> Any:
    answer = call(*words, "--json")
    assert answer.code == 0, answer.err
    return answer.value


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a tiny Wan, a world, its cache, a tokenizer, and the recipes from those for GPUs."""
    folder, before = tmp_path_factory.mktemp("causvid"), Path.cwd()
    os.chdir(folder)
    try:
        write_folder(folder / "models/wan", Sink.of(published()), WAN.preset("tiny").to_diffusers())
        own = {"type": "patch", "name_or_path": ""}
        Path("first.yaml").write_text(yaml.safe_dump(tiny("wan", tokenizer=own)))
        done("data", "shapeworld", "--out", "world", "--frames", "17", "--size", "32", "--clips", "8")
        done("cache", "first.yaml", "--manifest", "world/manifest.jsonl", "--out", "cache")
        shutil.copytree("cache/tokenizer", "tokenizer")
        Path("teacher.yaml").write_text(yaml.safe_dump(tiny("wan")))
        for name in ("causvid_ode_wan", "causvid_dmd_wan", "self_forcing_wan"):
            Path(f"{name}.yaml").write_text(yaml.safe_dump(tiny(name)))
        yield folder
    finally:
        os.chdir(before)


def weights_of(run: str) -> dict[str, Tensor]:
    saved = checkpoint.load(Path(run)).weights(ema=False)
    return {name.removeprefix("backbone."): saved[name] for name in saved if name.startswith("backbone.")}


def apart(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The largest difference of weights; they must all be finite."""
    assert a.keys() == b.keys()
    assert all(t.isfinite().all() for t in (*a.values(), *b.values()))
    return max(float((a[name] - b[name]).abs().max()) for name in a)


ONE_STEP = 2.5e-6  # AdamW's first moves every weight by lr = 2e-6, and rounding adds to it


def test_both_stages_of_causvid_run_one_from_the_other(workshop: Path) -> None:
    done("pairs", "causvid_ode_wan.yaml", "--cache", "cache", "--out", "pairs", *FEWER)
    done("train", "causvid_ode_wan.yaml", "--cache", "pairs", *FEWER)
    assert 0 < apart(weights_of("runs/causvid_ode_wan"), tensors(published())) < ONE_STEP
    done("train", "causvid_dmd_wan.yaml", "--cache", "cache", *FEWER)
    assert 0 < apart(weights_of("runs/causvid_dmd_wan"), weights_of("runs/causvid_ode_wan")) < ONE_STEP
    answer = call("train", "causvid_ode_wan.yaml", "--cache", "cache", *FEWER, "experiment_name=x", "--json")
    assert answer.code == 2, "a cache without states is no cache of pairs"
    assert "Traceback" not in answer.err


def test_self_forcing_runs_from_a_student_that_came_as_a_model_pt(workshop: Path) -> None:
    original = tensors(as_original(published("student"), WAN))
    student = {f"model._fsdp_wrapped_module.{name}": t for name, t in original.items()}
    torch.save({"generator_ema": student}, "ode_init.pt")
    done("convert", "ode_init.pt", "models/ode_init")
    judges = ("distil.teacher=teacher.yaml", "distil.critic_from=teacher.yaml")
    start = ("model.name_or_path=models/ode_init", *judges)
    done("train", "self_forcing_wan.yaml", "--cache", "cache", *start)
    assert 0 < apart(weights_of("runs/self_forcing_wan"), tensors(published("student"))) < ONE_STEP
    recipe = load_recipe("runs/self_forcing_wan/recipe.yaml")
    assert (recipe.train.method, recipe.distil.source, recipe.plan.type) == ("matching", "rollout", "chunks")


def lmdb_of_theirs(folder: Path, states: int, captions: Sequence[str]) -> None:
    """Rows as their scripts write them, (T, F, C, h, w) or (F, C, h, w); T ends with the clean state."""
    lmdb = pytest.importorskip("lmdb")
    shape = (*([states] if states > 1 else []), 5, 16, 4, 4)
    draw = np.random.default_rng(0)
    with lmdb.open(str(folder), map_size=2**24) as env, env.begin(write=True) as rows:
        for i, caption in enumerate(captions):
            rows.put(f"latents_{i}_data".encode(), draw.normal(size=shape).astype(np.float16).tobytes())
            rows.put(f"prompts_{i}_data".encode(), caption.encode())
        rows.put(b"latents_shape", " ".join(map(str, (len(captions), *shape))).encode())
        rows.put(b"prompts_shape", str(len(captions)).encode())


@pytest.mark.parametrize(
    ("name", "states"),
    [
        ("wan_causal_ode", 4),
        ("wan_causal_dmd", 1),
        ("wan_bidirectional_dmd", 1),
        ("self_forcing_dmd", 1),
        ("gan", 1),
    ],
)
def test_a_file_of_theirs_trains_on_data_of_theirs(workshop: Path, name: str, states: int) -> None:
    """`motionloom train their.yaml`, their LMDB behind it; only sizes are brought down."""
    lmdb_of_theirs(
        workshop / f"{name}_lmdb", states, ["a red star", "a blue circle", "a green square", "a cat"]
    )
    theirs = {**ALL[name], "image_or_video_shape": [1, 5, 16, 4, 4], "generator_ckpt": None}
    Path(f"{name}.yaml").write_text(yaml.safe_dump(theirs))
    Path(f"small_{name}.yaml").write_text(
        yaml.safe_dump(tiny(f"{name}.yaml", experiment_name=f"small_{name}", distil={"gan_blocks": [0, 1]}))
    )
    done("cache", f"small_{name}.yaml", "--lmdb", f"{name}_lmdb", "--out", f"{name}_cache")
    value = done(
        "train",
        f"small_{name}.yaml",
        "--cache",
        f"{name}_cache",
        "distil.teacher=teacher.yaml",
        "distil.critic_from=teacher.yaml",
    )
    assert value["step"] == 1
    assert any("read as a YAML for" in note for note in value["notes"])
    assert 0 < apart(weights_of(f"runs/small_{name}"), tensors(published())) < ONE_STEP
