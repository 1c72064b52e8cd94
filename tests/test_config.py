"""Recipes: what loads, what is refused and in which words, and what is written beside a run."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import motionloom
from motionloom import config, errors
from motionloom.config import (
    Recipe,
    describe_run,
    dump_recipe,
    find_recipe,
    load_recipe,
    load_recipe_with_notes,
    packaged_recipes,
    write_provenance,
)
from motionloom.errors import UserError


@pytest.fixture
def write(tmp_path):
    """Write a recipe file from text or a tree; returns its path."""

    def _write(content: str | dict, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return path

    return _write


def refusal(path: Path | str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert "pydantic" not in message
    return message


# ---- files and layers


def test_an_empty_file_is_all_defaults(write):
    assert load_recipe(write("")) == Recipe()
    assert load_recipe(write("# nothing\ntrain:\n")) == Recipe()


def test_scalars_are_read_as_people_write_them(write):
    recipe = load_recipe(
        write(
            "train: {lr: 1e-4, max_steps: 2e3, sample_prompts: [no, 16:9, '1e5']}\n"
            "seed: 010\nema: {enabled: off}"
        )
    )
    assert recipe.train.lr == 1e-4
    assert recipe.train.max_steps == 2000
    assert recipe.train.sample_prompts == ("no", "16:9", "1e5")
    assert recipe.seed == 10
    assert recipe.ema.enabled is False


def test_from_merges_sections_over_a_chain(write):
    write("train: {lr: 1e-3, batch_size: 3}\nvideo: {fps: 8}\nseed: 1", "base/a.yaml")
    write("from: a.yaml\ntrain: {batch_size: 5}", "base/b.yaml")
    recipe = load_recipe(write("from: base/b.yaml\nvideo: {num_frames: 32}\nseed: 2"))
    assert (recipe.train.lr, recipe.train.batch_size) == (1e-3, 5)
    assert (recipe.video.fps, recipe.video.num_frames, recipe.seed) == (8, 32, 2)


def test_from_takes_the_name_of_a_packaged_recipe(write):
    recipe = load_recipe(write("from: quickstart\nexperiment_name: mine"))
    assert recipe == load_recipe("quickstart").model_copy(update={"experiment_name": "mine"})


def test_from_in_a_circle_is_refused(write):
    write("from: b.yaml", "a.yaml")
    message = refusal(write("from: a.yaml", "b.yaml"))
    assert "circle: b.yaml -> a.yaml -> b.yaml" in message


def test_from_nowhere_names_both_files(write):
    message = refusal(write("from: quikstart"))
    assert "recipe.yaml: from quikstart" in message
    assert "did you mean quickstart?" in message
    assert "expected the name or path of one other recipe" in refusal(write("from: [a, b]"))


def test_overrides_win_in_order_and_take_yaml_values(write):
    path = write("train: {lr: 1, batch_size: 7}")
    recipe = load_recipe(
        path,
        [
            "train.lr=3e-3",
            "train.lr=3e-4",
            "video.num_frames=32",
            'train.sample_prompts=["a: b", "c"]',
            "train.clip_grad_norm=null",
            "train.init_from=",
            "video={width: 64, height: 128}",
            "model.patch=[1, 2, 2]",
        ],
    )
    assert recipe.train.lr == 3e-4
    assert recipe.train.batch_size == 7
    assert recipe.train.sample_prompts == ("a: b", "c")
    assert recipe.train.clip_grad_norm is None
    assert recipe.train.init_from == ""
    assert (recipe.video.width, recipe.video.height, recipe.video.num_frames) == (64, 128, 32)
    assert recipe.model.patch == (1, 2, 2)


def test_a_recipe_is_frozen():
    with pytest.raises(ValueError):
        Recipe().train.lr = 1.0  # type: ignore[misc]


# ---- unknown keys


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("train.learning_rate", "train.lr"),
        ("train.lrr", "train.lr"),
        ("train.batchsize", "train.batch_size"),
        ("train.fps", "video.fps"),
        ("fps", "video.fps"),
        ("video.fpz", "video.fps"),
        ("trian.lr", "train.lr"),
        ("num_frames", "video.num_frames"),
        ("model.hidden_size", "model.dim"),
        ("guidance_scale", "train.sample_cfg_scale"),
        ("name", "experiment_name"),
        ("ema.ema_decay", "ema.decay"),
        ("train.video.fps", "video.fps"),
        ("pretrained_model_name_or_path", "model.name_or_path"),
        ("lora.tragets", "lora.targets"),
    ],
)
def test_an_unknown_key_names_the_nearest(write, key, meant):
    tree: dict = {}
    *parents, last = key.split(".")
    node = tree
    for part in parents:
        node = node.setdefault(part, {})
    node[last] = 1
    path = write(tree)
    assert refusal(path) == f"{path}: {key} is not a key; did you mean {meant}?"
    assert refusal(write(""), f"{key}=1") == f"override {key}=1: {key} is not a key; did you mean {meant}?"


def test_an_unknown_key_without_likeness_lists_what_there_is(write):
    assert "bucketing has enabled, buckets, frames" in refusal(write("bucketing: {zzz: 1}"))
    assert "the sections are video, " in refusal(write("zzz: 1"))
    assert "train is a section" in refusal(write("train: 5"))
    assert "train.lr takes one value" in refusal(write("train: {lr: {high: 1}}"))


def test_the_layer_that_holds_the_mistake_is_named(write):
    base = write("video: {fsp: 8}", "base.yaml")
    assert refusal(write("from: base.yaml\nseed: 1")).startswith(f"{base}: video.fsp")


def test_several_problems_come_together_and_not_more_than_five(write):
    message = refusal(write("train: {learning_rate: 1, lr: fast}\nvideo: {fpss: 2}"))
    assert "train.learning_rate is not a key" in message
    assert "(and 2 more: " in message
    assert 'train.lr is "fast"' in message
    many = refusal(write("a: 1\nb: 1\nc: 1\nd: 1\ne: 1\nf: 1\ng: 1"))
    assert "(and 6 more: " in many
    assert many.count("is not a key") == 5


# ---- wrong values


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("train: {lr: fast}", 'train.lr is "fast"; expected a number above 0'),
        ("train: {lr: 0}", "train.lr is 0; expected a number above 0"),
        ("train: {lr: .inf}", "train.lr is Infinity; expected a number above 0"),
        ("train: {lr: .nan}", "train.lr is NaN; expected a number above 0"),
        ("train: {lr: }", "train.lr is null; expected a number above 0"),
        ("train: {lr: {}}", "train.lr is {}; expected a number above 0"),
        ("train: {batch_size: true}", "train.batch_size is true; expected a whole number above 0"),
        ("train: {batch_size: 1.5}", "train.batch_size is 1.5; expected a whole number above 0"),
        ("train: {compile: maybe}", 'train.compile is "maybe"; expected true or false'),
        ("train: {cfg_dropout_prob: 2}", "expected a number from 0 to 1"),
        ("train: {betas: [0.9]}", "train.betas is [0.9]; expected a list of 2, each a number from 0 below 1"),
        ("train: {betas: [0.9, 2]}", "train.betas[1] is 2;"),
        ("train: {sample_prompts: a cat}", 'is "a cat"; expected a list, each item a text'),
        ("train: {clip_grad_norm: -1}", "expected a number above 0 or null"),
        ("model: {type: unet}", "expected factorized, joint, wan, cogvideox, ltx2 or lightning"),
        ("preprocess: {background: [0, 0, 256]}", "preprocess.background[2] is 256"),
        ("preprocess: {seed: -1}", "expected a whole number of at least 0 or null"),
        ("experiment_name: a/b", "expected a text of letters, digits"),
        ("experiment_name: 2024", "experiment_name is 2024; expected a text"),
    ],
)
def test_a_wrong_value_names_key_value_and_what_is_expected(write, line, told):
    path = write(line)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert told in message


@pytest.mark.parametrize(
    ("overrides", "mend"),
    [
        (["model.num_heads=7"], "use num_heads 4"),
        (["model.dim=255", "model.num_heads=5"], "use an even dim"),
        (["text_encoder.type=hf"], "give a folder or hub name"),
        (["bucketing.enabled=true"], "list [width, height] pairs"),
        (["bucketing={enabled: true, buckets: [[64, 60]]}"], "use 56 or 64"),
        (
            ["video.width=250"],
            "video.width 250 does not divide by 8 (tokenizer.latent_f x model.patch): use 248 or 256",
        ),
        (["video.height=4"], "use 8"),
        (["video.width=40", "model.patch=[1, 1, 2]"], "use 32 or 48"),
        (["video.num_frames=18"], "use 16 or 20"),
        (["video.num_frames=2"], "use 4"),
        (
            ["tokenizer.first_alone=true"],
            "video.num_frames 16 is not 1 + a multiple of tokenizer.latent_t 4: use 13 or 17",
        ),
        (["model.patch=[3, 1, 1]"], "do not divide by model.patch[0] 3: use 12 or 24"),
        (
            ["video.num_frames=81", "tokenizer.first_alone=true", "model.patch=[2, 2, 2]"],
            "video.num_frames 81 gives 21 latent frames, which do not divide by model.patch[0] 2: "
            "use 77 or 85",
        ),
        (["video.num_frames=80", "tokenizer.first_alone=true", "model.patch=[2, 2, 2]"], "use 77 or 85"),
        (["video.num_frames=3", "tokenizer.first_alone=true", "model.patch=[2, 2, 2]"], "use 5"),
        (["tokenizer.latent_d=769"], "use at most 768"),
        (
            ["flow_matching.t_min=0.5", "flow_matching.t_max=0.5"],
            "is not below flow_matching.t_max 0.5: lower it",
        ),
        (["train.sample_cfg_interval=[0.5, 0.5]"], "low < high"),
        (["train.objective=ddpm_v", "flow_matching.path=cosine"], "use path linear or objective flow"),
        (["train.schedule=cosine", "train.warmup_steps=1000"], "use fewer"),
        (["diffusion.beta_start=0.1"], "diffusion.beta_start 0.1 is above diffusion.beta_end 0.02: lower it"),
        (["model.preset=tiny"], "of wan, cogvideox, ltx2 or lightning, but model.type is factorized"),
        (["model.name_or_path=x"], "start from a checkpoint of your own with train.init_from"),
        (["model.type=wan"], "model.type wan has no sizes yet: set model.preset"),
        (
            ["model.type=wan", "model.preset=x", "model.dim=64"],
            "model.dim cannot be chosen for model.type wan",
        ),
        (["model.type=wan", "model.preset=x", "model.depth=2", "model.dropout=0.1"], "leave them out"),
        (["model.type=ltx2", "model.preset=x", "model.prediction=noise"], "ltx2 answers with a velocity"),
        (["lora.enabled=true"], "there is no base"),
        (["tokenizer.type=wan_vae"], "set tokenizer.name_or_path to a folder with a diffusers VAE"),
        (["tokenizer.type=wan_vae", "tokenizer.name_or_path=x"], "set tokenizer.first_alone to true"),
        (
            [
                "tokenizer={type: wan_vae, name_or_path: x, first_alone: true, tile: 60}",
                "video.num_frames=17",
            ],
            "tokenizer.tile 60 does not divide by tokenizer.latent_f 8: take off 4",
        ),
        (
            [
                "tokenizer={type: wan_vae, name_or_path: x, first_alone: true, tile: 64}",
                "video.num_frames=17",
            ],
            "tokenizer.tile_overlap 64 leaves nothing of tokenizer.tile 64: use less",
        ),
    ],
)
def test_values_that_do_not_fit_together_name_the_mend(write, overrides, mend):
    path = write("")
    message = refusal(path, *overrides)
    assert message.startswith(f"{path} with overrides: ")
    assert mend in message


ENCODERS = {
    "wan": "{type: hf, name_or_path: t, padding: zero, max_length: 512}",
    "cogvideox": "{type: hf, name_or_path: t, padding: attended, max_length: 226}",
    "ltx2": "{type: ltx2, name_or_path: t, max_length: 1024}",
}
"""How published weights were trained to read captions."""


def published_overrides(family: str, text: str) -> list[str]:
    objective = ["train.objective=ddpm_v"] if family == "cogvideox" else []
    return [f"model={{type: {family}, name_or_path: w}}", f"text_encoder={text}", *objective]


@pytest.mark.parametrize(
    ("family", "text", "mend"),
    [
        (
            "wan",
            "{type: hf, name_or_path: t, max_length: 77}",
            "text_encoder.padding hidden is not how the weights of wan were trained to read captions: "
            "write text_encoder.padding: zero",
        ),
        ("wan", ENCODERS["cogvideox"], "write text_encoder.padding: zero"),
        ("cogvideox", ENCODERS["wan"], "write text_encoder.padding: attended"),
        ("wan", ENCODERS["ltx2"], "write text_encoder.type: hf and text_encoder.padding: zero"),
        ("ltx2", ENCODERS["wan"], "text_encoder.type hf is not how .* write text_encoder.type: ltx2"),
    ],
)
def test_published_weights_want_the_captions_that_they_were_trained_on(write, family, text, mend):
    path = write("")
    overrides = published_overrides(family, text)
    assert re.search(mend, refusal(path, *overrides))
    # Fresh weights may learn from any; and so may published ones from a new table of words.
    assert load_recipe(path, [*overrides, "model.name_or_path=", "model.preset=tiny"])
    assert load_recipe(path, published_overrides(family, "{dim: 32}"))


@pytest.mark.parametrize("family", ENCODERS)
def test_another_length_of_captions_is_told_and_allowed(write, family):
    path, overrides = write(""), published_overrides(family, ENCODERS[family])
    assert load_recipe_with_notes(path, overrides)[1] == []
    shorter = [*overrides, "text_encoder.max_length=128"]
    recipe, notes = load_recipe_with_notes(path, shorter)
    usual = load_recipe(path, overrides).text_encoder.max_length
    assert recipe.text_encoder.max_length == 128
    assert len(notes) == 1
    assert f"write text_encoder.max_length: {usual} unless" in notes[0]
    assert load_recipe_with_notes(path, [*shorter, "model.name_or_path=", "model.preset=tiny"])[1] == []


@pytest.mark.parametrize("family", ["wan", "ltx2"])
def test_weights_of_flow_matching_are_not_trained_by_ddpm(write, family):
    path, overrides = write(""), published_overrides(family, ENCODERS[family])
    told = refusal(path, *overrides, "train.objective=ddpm_v")
    assert f"weights of {family} were trained by flow matching: set train.objective to flow" in told
    fresh = ["model.name_or_path=", "model.preset=tiny", "train.objective=ddpm_v"]
    assert load_recipe(path, [*overrides, *fresh])


def test_a_preset_goes_with_the_weights_it_stands_beside(write):
    assert load_recipe("lora_wan").model.preset == "wan2.1-t2v-1.3b"
    assert load_recipe("lora_wan", ["model.name_or_path=w"]).model.preset == ""
    assert load_recipe(write("from: lora_wan\nmodel: {name_or_path: w}")).model.preset == ""
    for order in (1, -1):
        overrides = ["model.name_or_path=w", "model.preset=wan2.1-t2v-14b"][::order]
        assert load_recipe("lora_wan", overrides).model.preset == "wan2.1-t2v-14b"
    assert load_recipe(write("from: lora_wan\ntrain: {lr: 1}")).model.preset == "wan2.1-t2v-1.3b"


def test_small_slips_of_the_shell_are_told_apart(write):
    assert "a space is missing behind a colon: write width: 64" in refusal(
        "quickstart", "video={width:64,height:64}"
    )
    assert "expected a list, each item a text: write [attn1]" in refusal("lora_wan", "lora.targets=attn1")


def test_an_override_without_a_value_says_how_to_write_one():
    assert "write key=value, such as train.lr=3e-4" in refusal("quickstart", "train.lr")
    assert "override train.lr=[1, line 1, column" in refusal("quickstart", "train.lr=[1")


# ---- broken files


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("seed: 1\ntrain: {lr: 1\nvideo: 2", "recipe.yaml, line 3, column "),
        ("seed: 1\n\tfps: 2", "recipe.yaml, line 2, column 1: found character '\\t'"),
        ("train:\n  lr: 1\n  lr: 2", "recipe.yaml, line 3, column 3: the key 'lr' stands twice"),
        ("? [a]\n: 1", "line 1, column 3: a key must be a word"),
        ("seed: 1\n---\nseed: 2", "line 2, column 1"),
        ("seed: !!python/object:os.system {}", "line 1, column 7: could not determine a constructor"),
        ("seed: !!timestamp 2024-01-01", "type date has no place in a recipe"),
        ("seed: !!int many", "invalid literal"),
        ("seed: &a [*a]", "an anchor that contains itself"),
        ("- 1\n- 2", "a recipe is `key: value` lines, not a list"),
        ("just text", "not a str"),
        ("seed: \x01", "recipe.yaml: not YAML text"),
    ],
)
def test_broken_yaml_names_file_line_and_column(write, content, told):
    assert told in refusal(write(content))


def test_what_is_no_recipe_file_is_said_so(tmp_path):
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"\x00\x00\x00\x1cftyp\xff\xfe")
    assert "not a text file (UTF-8)" in refusal(clip)
    clip.write_bytes(b"a" * 2_000_000)
    assert "too large for a recipe (2,000,000 bytes)" in refusal(clip)
    assert "is a folder" in refusal(tmp_path)
    assert "no such recipe file" in refusal(tmp_path / "absent.yaml")
    assert f"MotionLoom brings {', '.join(sorted(packaged_recipes()))}" in refusal("zzzz")


# ---- there and back


def test_dump_round_trips_awkward_values(write):
    recipe = load_recipe(
        "quickstart",
        [
            'train.sample_prompts=["1e5", "yes", "null", "", "a: b", "# x", "Bär", "1\\n2", "1:3", "~"]',
            "train.lr=1e-7",
            "train.weight_decay=1e22",
            "bucketing.buckets=[[64, 32], [32, 64]]",
            "plan.window=3",
        ],
    )
    text = dump_recipe(recipe)
    assert load_recipe(write(text)) == recipe
    assert "Bär" in text
    assert "buckets: [[64, 32], [32, 64]]" in text


# ---- conditions that could never hold

SHAPE = [
    "video={width: 32, height: 24, num_frames: 17, fps: 8}",
    "tokenizer={latent_f: 8, latent_t: 4, first_alone: true}",
    "model={type: joint, dim: 48, num_heads: 2, audio_dim: 48}",
    "references.enabled=true",
]
"""Clips of 1 + 4 x 4 frames, that is of five token frames of 3 x 4 cells."""
SOUND = ["audio.enabled=true", "plan.modalities=[video, audio]"]

NEVER = [
    ("{type: first_frame, source: dog.png}", "[0].source is a request's"),
    ("{type: mask, mask: m.png}", "[0].mask is a request's"),
    ("{type: mask, made: [[0, 1]]}", "[0].made is a request's"),
    ("{type: reference, caption: a cat}", "[0].caption is a request's"),
    ("{type: first_frame, probability: 0}", "[0].probability is 0, so it never holds: raise it"),
    (
        "{type: prefix, frames: 40}",
        "[0].frames 40 is longer than the clip, 17 frames (2.125 s): use at most 16",
    ),
    ("{type: prefix, frames: [5, 40]}", "is longer than the clip, 17 frames (2.125 s): use at most 16"),
    ("{type: prefix, frames: 17}", "[0].frames 17 gives all of the clip, 17 frames (2.125 s)"),
    ("{type: suffix, seconds: 9}", "[0].seconds 9.0 is longer than the clip"),
    ("{type: suffix, frames: [1, 3]}", "[0].frames [1, 3] is less than a token, 4 frames"),
    ("{type: prefix, seconds: [1.5, 0.5]}", "[0].seconds: a range is [least, most], not [1.5, 0.5]"),
    ("{type: prefix, frames: 5, seconds: 1}", "[0]: frames and seconds both say how long it is"),
    ("{type: prefix, frame: 5}", "[0].frame is not a key; did you mean frames?"),
    ("{type: perfix}", "[0]: type perfix is no condition; did you mean prefix?"),
    ("{type: keyframes, times: [0.5, 2.125]}", "[0].times has 2.125, which is not before the clip's end"),
    ("{type: keyframes, times: [0.5], count: 3}", "[0]: times says which keyframes are given"),
    ("{type: keyframes, count: [3, 1]}", "[0].count: a range is [least, most], not [3, 1]"),
    ("{type: keyframes, count: 50}", "[0].count 50 is too many for a clip of 5 token frames: use at most 4"),
    ("{type: keyframes, count: 5}", "[0].count 5 is too many"),
    ("{type: spatial_crop, region: [0, 0, 64, 64]}", "[0].region [0, 0, 64, 64] leaves the frame of 32x24"),
    ("{type: spatial_crop, region: [0, 0, 32, 24]}", "right] up to 24 and 32"),
    ("{type: spatial_crop, region: [4, 0, 12, 8]}", "[0].region [4, 0, 12, 8] holds no whole token of 8x8"),
    ("{type: spatial_crop, region: [0, 0, 24, 32]}", "[0].region [0, 0, 24, 32] is the whole frame"),
    (
        "{type: spatial_crop, region: [8, 0, 8, 8]}",
        "[0].region [8, 0, 8, 8] is not [top,",
    ),
    ("{type: spatial_crop, region: [0, 0, 8, 8], area: [0.1, 0.2]}", "[0]: region says what is given"),
    ("{type: spatial_crop, area: [0.9, 0.1]}", "[0].area: a range is [least, most], not [0.9, 0.1]"),
    ("{type: mask, duration: [0.9, 0.1]}", "[0].duration: a range is [least, most]"),
    ("{type: mask, masks: data, area: [0.1, 0.2]}", "[0]: area draws masks, and masks: data takes"),
    ("{type: scene, scenes: [7]}", "[0].scenes [7] names scene 7, and a clip has at most 5"),
    ("{type: scene, scenes: []}", "[0].scenes: names no scene"),
    ("{type: modality, modality: video}", "[0].modality video is all that plan.modalities has"),
    ("{type: last_frame}, {type: prefix, frames: 18}", "[1].frames 18 is longer than the clip"),
]


@pytest.mark.parametrize(("conditions", "told"), NEVER, ids=[conditions for conditions, _ in NEVER])
def test_conditions_that_never_hold_are_refused(write, conditions, told):
    message = refusal(write(""), *SHAPE, f"plan.conditions=[{conditions}]")
    assert "plan.conditions" in message
    assert told in message


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["plan.conditions=[{type: modality, modality: video}, {type: modality}]"], "always, so nothing is"),
        (["plan.conditions=[{type: prefix, modality: audio, seconds: 0.01}]"], "a latent of the sound, 0.5"),
        (["plan.conditions=[{type: mask, modality: audio, duration: [1, 1]}]"], "makes all of the sound"),
        (
            ["plan={choose: one, conditions: [{type: first_frame}, {type: last_frame}]}"],
            "sum up to at most 1",
        ),
        (
            ["plan.type=scenes", "stories.shots=2", "plan.conditions=[{type: scene, scenes: [2]}]"],
            "use 0 to 1",
        ),
        (["plan.type=scenes", "stories.shots=1", "plan.conditions=[{type: scene}]"], "these have one"),
    ],
)
def test_conditions_on_sound_and_scenes_that_never_hold_are_refused(write, overrides, told):
    assert told in refusal(write(""), *SHAPE, *SOUND, *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["plan.conditions=[{type: prefix, frames: 17, strength: 0.5}]"],
        ["plan.conditions=[{type: modality, modality: video, strength: 0.5}]"],
        ["plan.conditions=[{type: prefix, frames: 16}, {type: suffix, frames: 4}, {type: prefix}]"],
        ["plan.conditions=[{type: keyframes, times: [0, 2.1]}, {type: keyframes, count: [1, 5]}]"],
        ["plan.conditions=[{type: scene, scenes: [4]}]"],
        [*SOUND, "plan.conditions=[{type: prefix, frames: 17}, {type: modality, modality: audio}]"],
        [*SOUND, "plan.conditions=[{type: modality, modality: video}, {type: modality, probability: 0.5}]"],
        [
            "plan={type: scenes, conditions: [{type: prefix, frames: 30}]}",
            "stories.join=[1, 3]",
            "references.enabled=false",
        ],
        ["plan={type: scenes, conditions: [{type: scene, scenes: [9]}]}", "stories.frames=9"],
    ],
)
def test_conditions_that_can_hold_are_taken_and_read_back(write, overrides):
    recipe = load_recipe(write(""), [*SHAPE, *overrides])
    assert load_recipe(write(dump_recipe(recipe), "again.yaml")) == recipe


def test_a_condition_that_holds_in_one_of_several_buckets_is_taken(write):
    buckets = "bucketing={enabled: true, buckets: [[16, 16], [64, 48]], frames: [5, 33]}"
    fitting = "plan.conditions=[{type: prefix, frames: 20}, {type: spatial_crop, region: [0, 0, 40, 64]}]"
    assert len(load_recipe(write(""), [*SHAPE, buckets, fitting]).plan.conditions) == 2
    for never in ("{type: prefix, frames: 34}", "{type: spatial_crop, region: [0, 0, 56, 64]}"):
        assert "plan.conditions[0]." in refusal(write(""), *SHAPE, buckets, f"plan.conditions=[{never}]")


@pytest.mark.parametrize("name", sorted(packaged_recipes()))
def test_every_packaged_recipe_loads_and_round_trips(write, name):
    recipe, notes = load_recipe_with_notes(name)
    assert notes == []
    assert recipe.experiment_name == name
    assert load_recipe(find_recipe(name)) == recipe
    assert load_recipe(write(dump_recipe(recipe))) == recipe


def test_sizes_that_a_published_backbone_does_not_read_are_not_written(write):
    recipe = load_recipe(write("model: {type: wan, preset: tiny, patch: [1, 2, 2]}"))
    assert recipe.model.imported
    text = dump_recipe(recipe)
    assert "num_heads" not in text
    assert "preset: tiny" in text
    assert load_recipe(write(text)) == recipe


def test_the_recipes_of_the_readme_are_there():
    expected = {"quickstart", "clips", "first_frame", "scenes", "causal", "factorized_256"}
    assert expected <= set(packaged_recipes())
    plans = {name: load_recipe(name).plan for name in expected}
    assert [one.type for one in plans["first_frame"].conditions] == ["first_frame"]
    assert plans["scenes"].type == "scenes"
    assert plans["causal"].type == "chunks"


# ---- provenance


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(
        ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments],
        check=True,
        capture_output=True,
    )


def test_describe_run_says_what_made_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["motionloom", "train", "a b.yaml"])
    told = describe_run(load_recipe("quickstart"))
    assert told["command"] == "motionloom train 'a b.yaml'"
    assert told["packages"]["torch"]
    assert told["packages"]["pylance"]
    assert told["python"].startswith("3.")
    assert told["recipe"]["train"]["batch_size"] == load_recipe("quickstart").train.batch_size
    assert told["git"]["here"] is None
    assert json.loads(json.dumps(told)) == told


def test_describe_run_knows_commit_and_changes_of_the_present_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-qm", "one")
    clean = describe_run(Recipe())["git"]["here"]
    (tmp_path / "file").write_text("2")
    changed = describe_run(Recipe())["git"]["here"]
    assert len(clean["commit"]) == 40
    assert (clean["dirty"], changed["dirty"]) == (False, True)
    assert changed["commit"] == clean["commit"]


def test_describe_run_claims_a_commit_for_the_code_only_where_git_tracks_it(tmp_path):
    package = tmp_path / "repo" / "src" / "motionloom"
    for source in (
        Path(motionloom.__file__),
        Path(errors.__file__),
        *Path(config.__file__).parent.glob("*.py"),
    ):
        target = package / source.relative_to(Path(motionloom.__file__).parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    script = "import motionloom.config as c, json; print(json.dumps(c.describe_run(c.Recipe())['git']))"

    def told() -> dict:
        command = [sys.executable, "-c", script]
        environment = os.environ | {"PYTHONPATH": str(package.parent)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
        return json.loads(done.stdout)

    git(tmp_path / "repo", "init", "-q")
    assert told() == {"motionloom": None, "here": None}  # as site-packages inside somebody's repository
    git(tmp_path / "repo", "add", ".")
    git(tmp_path / "repo", "commit", "-qm", "one")
    assert len(told()["motionloom"]["commit"]) == 40


def test_provenance_is_whole_and_keeps_every_start(tmp_path):
    run = tmp_path / "runs" / "one"
    first, second = load_recipe("quickstart"), load_recipe("quickstart", ["train.max_steps=9999"])
    write_provenance(run, first)
    write_provenance(run, second)
    assert load_recipe(run / "recipe.yaml") == second
    starts = json.loads((run / "provenance.json").read_text())
    assert [start["recipe"]["train"]["max_steps"] for start in starts] == [first.train.max_steps, 9999]
    assert sorted(path.name for path in run.iterdir()) == ["provenance.json", "recipe.yaml"]


def test_a_run_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_provenance(tmp_path / "file" / "run", Recipe())
    (tmp_path / "provenance.json").write_text("{broken")
    with pytest.raises(UserError, match=r"provenance.json is not JSON: move it away"):
        write_provenance(tmp_path, Recipe())


# ---- YAML files written for mmdit: its ten shipped configurations, from the published table


# One row per file: objective, frames, stride, batch x accumulation and so on; the rest is the same in all.
TABLE = """
t2v_vtp_256_smoke: {obj: ddpm, frames: 16, stride: 5, batch: 1, accum: 8, steps: 2000, wd: 0.01}
t2v_vtp_256_32f: {obj: ddpm, frames: 32, stride: 2, text: clip, depth: 12, batch: 1, accum: 16, steps: 20000,
  wd: 0.01}
t2v_vtp_256_80f: {obj: ddpm, frames: 80, text: clip, depth: 12, batch: 1, accum: 32, steps: 50000, wd: 0.01}
t2i_vtp_256_smoke: {obj: ddpm, batch: 32, steps: 20000, preview: 200, cfg: 1.0}
t2i_vtp_256_flow_matching: {obj: flow, path: linear, batch: 32, steps: 10000, preview: 500, cfg: 5.0}
t2i_vtp_256_t5gemma270m: {obj: flow, path: linear, text: t5, batch: 32, steps: 10000, preview: 500, cfg: 5.0}
t2i_vtp_256_anime: {obj: flow, path: linear, text: t5, batch: 32, steps: 10000, wd: 0.1, preview: 500,
  cfg: 5.0}
t2i_vtp_256_anime_buckets: {obj: flow, path: cosine, text: t5, batch: 64, accum: 2, steps: 100000, wd: 0.001,
  drop: 0.05, scale: 6.509, preview: 500, cfg: 5.0, bucket: true, tread: true, ema: true, ema_samples: true}
t2i_vtp_256_anime_buckets_big: {obj: flow, path: cosine, text: t5, dim: 768, depth: 12, heads: 12, batch: 256,
  steps: 200000, wd: 0.001, drop: 0.05, scale: 6.287, preview: 500, cfg: 5.0, bucket: true, tread: false,
  ema: true}
t2i_vtp_256_anime_buckets_test: {obj: flow, path: cosine, text: t5, batch: 1, steps: 20000, drop: 0.0,
  scale: 6.47, preview: 500, cfg: 1.0, bucket: true, tread: true}
"""
COMMON = """
output_dir: runs
seed: 42
video: {width: 256, height: 256, fps: 16, num_frames: 1, frame_stride: 1}
tokenizer: {type: vtp, name_or_path: PATH_TO_VTP, repo_path: ./VTP, latent_f: 16, latent_d: 64}
model: {dim: 512, depth: 8, num_heads: 8, window_size: 8, mlp_ratio: 4.0, dropout: 0.0}
diffusion: {num_timesteps: 1000, schedule: cosine, prediction_type: eps}
train: {precision: bf16, lr: 1.0e-4, log_every_steps: 50, save_every_steps: 500}
lora: {enabled: false, rank: 16, alpha: 16, dropout: 0.0, target_modules: [q, k, v, proj]}
"""
TEXTS = """
hash: {type: hash, dim: 512, vocab_size: 65536, max_length: 128, trainable: false}
clip: {type: hf, name_or_path: openai/clip-vit-base-patch32, max_length: 77, freeze: true}
t5: {type: hf, name_or_path: google/t5gemma-2-270m-270m, max_length: 128, freeze: true, use_processor: false}
"""


def mmdit_yaml(name: str, row: dict) -> dict:
    """The file of one row, with every key that the real one has."""
    tree = yaml.safe_load(COMMON)
    tree["experiment_name"] = name
    tree["text_encoder"] = yaml.safe_load(TEXTS)[row.get("text", "hash")]
    tree["train"] |= {"objective": row["obj"], "batch_size": row["batch"], "max_steps": row["steps"]}
    tree["train"] |= {"grad_accum_steps": row.get("accum", 1), "weight_decay": row.get("wd", 0.0)}
    tree["train"] |= {"cfg_dropout_prob": row.get("drop", 0.1)}
    for key, ours in (("dim", "dim"), ("depth", "depth"), ("heads", "num_heads")):
        tree["model"][ours] = row.get(key, tree["model"][ours])
    if "frames" in row:
        tree["video"] |= {"width": 448, "num_frames": row["frames"], "frame_stride": row.get("stride", 1)}
    if "path" in row:
        tree["flow_matching"] = {"path": row["path"], "t_min": 0.0, "t_max": 1.0, "time_scale": 999.0}
    if "preview" in row:
        tree["train"] |= {"sample_every_steps": row["preview"], "sample_cfg_scale": row["cfg"]}
    if "scale" in row:
        tree["tokenizer"]["latent_scale"] = row["scale"]
    if "bucket" in row:
        tree["bucketing"] = {"enabled": True, "strategy": "closest_ar", "buckets": [[256, 256]]}
    if "tread" in row:
        tree["tread"] = {"enabled": row["tread"], "selection_rate": 0.5, "apply_to": ["cross", "mlp"]}
    if "ema" in row:
        tree["ema"] = {"enabled": True, "decay": 0.9999, "use_for_sampling": row.get("ema_samples", False)}
    return tree


SHIPPED = [mmdit_yaml(name, row) for name, row in yaml.safe_load(TABLE).items()]


@pytest.mark.parametrize("tree", SHIPPED, ids=lambda tree: tree["experiment_name"])
def test_a_shipped_mmdit_yaml_loads_with_its_numbers(write, tree):
    recipe, notes = load_recipe_with_notes(write(tree))
    assert recipe.experiment_name == tree["experiment_name"]
    assert recipe.video.model_dump() == tree["video"]
    assert {key: getattr(recipe.model, key) for key in tree["model"]} == tree["model"]
    assert recipe.model.type == "factorized"
    assert (recipe.tokenizer.type, recipe.tokenizer.latent_t) == ("patch", 1)
    assert (recipe.tokenizer.latent_f, recipe.tokenizer.latent_d, recipe.tokenizer.name_or_path) == (
        16,
        64,
        "",
    )
    for key in ("lr", "batch_size", "grad_accum_steps", "max_steps", "weight_decay", "cfg_dropout_prob"):
        assert getattr(recipe.train, key) == tree["train"][key], key
    ddpm = tree["train"]["objective"] == "ddpm"
    assert recipe.train.objective == ("ddpm_eps" if ddpm else "flow")
    assert recipe.model.prediction == ("noise" if ddpm else "velocity")
    assert recipe.train.sample_solver == ("ddim" if ddpm else "euler")
    assert recipe.flow_matching.path == tree.get("flow_matching", {}).get("path", "linear")
    assert (recipe.train.schedule, recipe.train.warmup_steps, recipe.train.clip_grad_norm) == (
        "constant",
        0,
        None,
    )
    assert recipe.ema.enabled == tree.get("ema", {}).get("enabled", False)
    assert recipe.text_encoder.max_length == tree["text_encoder"]["max_length"]
    for key in (
        "diffusion.prediction_type",
        "tokenizer.type",
        "tokenizer.name_or_path",
        "tokenizer.repo_path",
    ):
        assert any(note.startswith(key) for note in notes), key
    assert any(note.startswith("tokenizer.latent_scale") for note in notes) == (
        "latent_scale" in tree["tokenizer"]
    )
    assert all("\n" not in note for note in notes)
    # The resolved recipe is one of ours and says the same.
    assert load_recipe_with_notes(write(dump_recipe(recipe), "resolved.yaml")) == (recipe, [])


def test_mmdit_features_that_are_on_but_absent_lead_the_notes(write):
    _, notes = load_recipe_with_notes(
        write({"tread": {"enabled": True}, "lora": {"enabled": "yes", "rank": 8}})
    )
    assert notes[0].startswith("tread.enabled: NOT APPLIED")
    assert notes[1].startswith("lora.enabled: NOT APPLIED")
    _, notes = load_recipe_with_notes(write({"tread": {"enabled": False}, "lora": {"enabled": False}}))
    assert not any("NOT APPLIED" in note for note in notes)


def test_mmdit_files_take_mmdit_defaults_where_they_are_silent(write):
    recipe = load_recipe(write("tokenizer: {type: vtp}"))
    assert recipe.train.objective == "ddpm_eps"
    assert (recipe.train.batch_size, recipe.train.cfg_dropout_prob) == (1, 0.0)
    assert (recipe.text_encoder.dim, recipe.text_encoder.max_length, recipe.text_encoder.trainable) == (
        512,
        128,
        False,
    )
    assert recipe.ema.enabled is False
    named = load_recipe(write("tokenizer: {type: vtp}\ntext_encoder: {type: hf, name_or_path: x}"))
    assert named.text_encoder.max_length == 77


@pytest.mark.parametrize(
    ("written", "objective"),
    [
        *((name, "ddpm_eps") for name in ("ddpm", "diffusion", "eps")),
        *((name, "flow") for name in ("flow_matching", "fm", "rectified_flow")),
    ],
)
def test_mmdit_objective_names(write, written, objective):
    assert load_recipe(write({"train": {"objective": written}})).train.objective == objective


@pytest.mark.parametrize(("written", "precision"), [("no", "fp32"), ("none", "fp32"), ("fp16", "bf16")])
def test_mmdit_precision_names(write, written, precision):
    recipe, notes = load_recipe_with_notes(write(f"train: {{precision: {written}}}"))
    assert recipe.train.precision == precision
    assert any("instead of fp16" in note for note in notes) == (written == "fp16")


def test_mmdit_quirks_of_sampling(write):
    recipe, notes = load_recipe_with_notes(
        write(
            "tokenizer: {type: vtp}\ntrain: {objective: flow, sample_num_images: 0, sample_num_steps: 0, "
            "sample_cfg_scale: 0, sample_eta: 0.5, sample_prompts: null}"
        )
    )
    train = recipe.train
    assert (train.sample_num_images, train.sample_num_steps, train.sample_cfg_scale) == (4, 50, 5.0)
    assert train.sample_eta == 0.0
    assert train.sample_prompts == ()
    assert sum("which 0 means in mmdit" in note for note in notes) == 3
    below = load_recipe(write("tokenizer: {type: vtp}\ntrain: {sample_cfg_scale: 0.5}"))
    assert math.isclose(below.train.sample_cfg_scale, 1.0)


def test_mmdit_keys_of_flow_are_dead_under_ddpm(write):
    recipe, notes = load_recipe_with_notes(
        write("tokenizer: {type: vtp}\ntrain: {objective: ddpm}\nflow_matching: {path: cosine}")
    )
    assert recipe.flow_matching == Recipe().flow_matching
    assert any(note.startswith("flow_matching.path: dropped") for note in notes)


def test_mmdit_files_may_hold_keys_that_nobody_knows(write):
    recipe, notes = load_recipe_with_notes(write("tokenizer: {type: vtp}\ntrain: {learning_rate: 5}"))
    assert recipe.train.lr == 1e-4
    assert "train.learning_rate: ignored, no key of mmdit either; did you mean train.lr?" in notes


def test_mmdit_bucketing_without_buckets_takes_the_video_size(write):
    recipe = load_recipe(write("tokenizer: {type: vtp}\nvideo: {width: 448}\nbucketing: {enabled: true}"))
    assert recipe.bucketing.buckets == ((448, 256),)


def test_mmdit_files_still_refuse_wrong_values(write):
    message = refusal(
        write("tokenizer: {type: vtp}\ntrain: {objective: gan, lr: [1]}\ntext_encoder: {type: [x]}")
    )
    assert 'train.objective is "gan"; expected flow, ddpm_eps or ddpm_v' in message
    assert "train.lr is [1]" in message
    assert "text_encoder.type" in message


def test_a_key_that_only_motionloom_has_makes_it_our_recipe(write):
    message = refusal(write("plan: {type: scenes}\ntokenizer: {latent_scale: 2}"))
    assert "tokenizer.latent_scale is not a key" in message


def test_overrides_and_from_go_on_top_of_an_mmdit_file(write):
    write(SHIPPED[7], "old.yaml")
    recipe, notes = load_recipe_with_notes(
        write("from: old.yaml\nmodel: {type: joint}"), ["train.batch_size=2", "tokenizer.latent_d=32"]
    )
    assert (recipe.model.type, recipe.train.batch_size, recipe.tokenizer.latent_d) == ("joint", 2, 32)
    assert recipe.train.max_steps == 100_000
    assert notes[0].startswith("tread.enabled: NOT APPLIED")
