"""The doctor: healthy models pass, and what is broken on purpose is found by the check meant for it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cached import make_world
from motionloom.backbones import FAMILIES
from motionloom.cli.assemble import fresh_model
from motionloom.config import Recipe, load_recipe, packaged_recipes
from motionloom.data.cache import Cache, build_cache, open_cache
from motionloom.evals.doctor import Doctor, Finding, wake
from motionloom.generate import Model
from motionloom.plans import (
    NOTHING,
    Given,
    Layout,
    Sample,
    Streams,
    Text,
    TextToVideo,
    Track,
    Visibility,
    causal_chunks,
    full,
)
from motionloom.tokenizers import Tokenizer, shipped_tokenizers
from toy_model import BACKBONES, PLANS, altered, toy_model, toy_recipe

EACH_BACKBONE = pytest.mark.parametrize("backbone", BACKBONES)


def wrong(model: Model, cache: Cache | None = None, **options: Any) -> dict[str, Finding]:
    """What the doctor calls wrong, by the check that says so."""
    findings = Doctor(model, cache, **options).examine()
    return {finding.check: finding for finding in findings if finding.status == "wrong"}


def sick(found: dict[str, Finding], check: str, mend: str) -> None:
    """Exactly this check complains, and its mend says this."""
    assert list(found) == [check], [str(finding) for finding in found.values()]
    assert mend in str(found[check])


# Healthy


def without_downloads(name: str) -> Recipe:
    """A recipe that comes along, without what other commands make first; one that begins with published
    weights on a tiny model of the family."""
    recipe = load_recipe(name)
    comes_along = recipe.tokenizer.name_or_path in shipped_tokenizers()
    made_before = [
        *(() if comes_along else ("tokenizer.name_or_path=",)),
        "audio.name_or_path=",
        "text_encoder.name_or_path=",
        "lora.enabled=false",
        "lora.base=",
    ]
    if not recipe.model.imported:
        return load_recipe(name, made_before)
    family = FAMILIES[recipe.model.type]
    tiny: Any = family.on_meta(family.preset("tiny"))
    own = [
        "model.preset=tiny",
        f"tokenizer.latent_d={tiny.latent_channels}",
        f"text_encoder.dim={tiny.text_dim}",
    ]
    own += [
        "tokenizer.type=patch",
        "tokenizer.latent_f=4",
        "tokenizer.latent_t=2",
        "text_encoder.type=hash",
        "text_encoder.padding=hidden",
        "text_encoder.max_length=8",
    ]
    return load_recipe(name, [*own, "model.name_or_path=", *made_before])


@pytest.mark.parametrize("name", [n for n in packaged_recipes() if not load_recipe(n).trains_tokenizer])
def test_every_recipe_that_comes_along_is_alive(name: str) -> None:
    model = fresh_model(without_downloads(name), torch.device("cpu"))
    modules = [m for m in (model.predictor.backbone, model.text_encoder) if isinstance(m, nn.Module)]
    wake(modules)
    for module in modules:
        module.eval()
    assert wrong(model) == {}


@pytest.mark.parametrize("plan", PLANS)
@EACH_BACKBONE
def test_every_plan_on_every_backbone_is_alive(backbone: str, plan: str) -> None:
    findings = Doctor(toy_model(backbone, plan)).examine()
    assert {f.check for f in findings if f.status == "wrong"} == set()
    skipped = {f.check for f in findings if f.status == "skipped"} - {"latent scale", "cache"}
    assert skipped == set()


AUDIO: dict[str, Any] = {"enabled": True, "sample_rate": 8192, "channels": 4, "latents_per_second": 8.0}


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_with_sound_is_alive(plan: str) -> None:
    section = {**PLANS[plan], "modalities": ["video", "audio"]}
    findings = Doctor(toy_model(plan=section, model={"audio_dim": 12}, audio=AUDIO)).examine()
    assert {str(f) for f in findings if f.status == "wrong"} == set()
    (gradients,) = (f for f in findings if f.check == "gradients")
    assert gradients.seen.startswith("reach all")
    assert "there is none" not in gradients.seen


def test_sound_alone_is_alive_and_has_no_place() -> None:
    model = toy_model(plan={"modalities": ["audio"]}, model={"audio_dim": 12}, audio=AUDIO)
    findings = Doctor(model).examine()
    assert {str(f) for f in findings if f.status == "wrong"} == set()
    assert {f.check for f in findings if f.status == "skipped"} == {"space", "latent scale", "cache"}
    (gradients,) = (f for f in findings if f.check == "gradients")
    assert "for pictures, of which there is none" in gradients.seen


def test_sound_that_leaks_across_chunks_is_found() -> None:
    section = {"type": "chunks", "frames": 1, "window": 1, "modalities": ["video", "audio"]}
    model = toy_model(plan=section, model={"audio_dim": 12}, audio=AUDIO)
    sick(wrong(altered(model, lambda streams, _: (streams, full))), "hidden tokens", "a mask is missing")


def test_a_model_of_single_images_is_alive() -> None:
    images = {"tokenizer": {"first_alone": True}, "video": {"num_frames": 1}}
    findings = Doctor(toy_model("factorized", **images)).examine()
    assert {f.check for f in findings if f.status == "wrong"} == set()
    skipped = {f.check for f in findings if f.status == "skipped"} - {"latent scale", "cache"}
    assert skipped == {"time", "given frames", "given frames are exact"}


@pytest.mark.parametrize("prediction", ["clean", "noise"])
def test_other_predictions_are_alive(prediction: str) -> None:
    assert wrong(toy_model(model={"prediction": prediction})) == {}


def test_the_doctor_warns_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    Doctor(toy_model(plan="chunks")).examine()
    assert not [str(w.message) for w in recwarn if issubclass(w.category, UserWarning)]


def test_a_model_in_its_first_steps_is_alive() -> None:
    # adaLN-Zero gates have hardly opened: everything has an influence, but a small one.
    model = toy_model()
    backbone = model.predictor.backbone
    assert isinstance(backbone, nn.Module)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if "table" in name or "project" in name:
                parameter.mul_(1e-2)
    assert wrong(model) == {}


# The output


def test_a_dead_output_is_found_and_nothing_else_is_blamed() -> None:
    sick(wrong(toy_model(awake=False)), "output", "0 everywhere")


def test_an_output_that_is_not_finite_is_found() -> None:
    def break_it(streams: Streams, visibility: Visibility) -> tuple[Streams, Visibility]:
        video = streams["video"]
        return {**streams, "video": replace(video, x_BNC=video.x_BNC / 0)}, visibility

    sick(wrong(altered(toy_model(), break_it)), "output", "not finite")


# Text


def with_text(streams: Streams, **changes: Any) -> Streams:
    return {**streams, "text": replace(streams["text"], **changes)}


@EACH_BACKBONE
def test_an_inverted_text_mask_is_found(backbone: str) -> None:
    def invert(streams: Streams, visibility: Visibility) -> tuple[Streams, Visibility]:
        valid_BN = streams["text"].valid_BN
        assert valid_BN is not None
        return with_text(streams, valid_BN=~valid_BN), visibility

    sick(wrong(altered(toy_model(backbone), invert)), "text mask", "the mask is inverted")


@EACH_BACKBONE
def test_a_missing_text_mask_is_found(backbone: str) -> None:
    sick(
        wrong(altered(toy_model(backbone), lambda s, v: (with_text(s, valid_BN=None), v))),
        "text mask",
        "hand Stream.valid_BN to the attention",
    )


@EACH_BACKBONE
def test_a_network_that_is_deaf_to_text_is_found(backbone: str) -> None:
    def deafen(streams: Streams, visibility: Visibility) -> tuple[Streams, Visibility]:
        return with_text(streams, x_BNC=torch.ones_like(streams["text"].x_BNC)), visibility

    sick(wrong(altered(toy_model(backbone), deafen)), "text", "attend to the text stream")


@dataclass
class Encoder:
    """A frozen text encoder with a defect."""

    inner: Any
    defect: str
    trainable = False

    def __post_init__(self) -> None:
        self.dim, self.max_length = self.inner.dim, self.inner.max_length

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        x_BLC, valid_BL = self.inner.encode(captions)
        x_BLC = x_BLC.detach()
        if self.defect == "constant":
            x_BLC = torch.ones_like(x_BLC) * valid_BL[..., None]
        if self.defect == "inverted":
            valid_BL = ~valid_BL
        if self.defect == "not finite":
            x_BLC = x_BLC / 0
        return x_BLC, valid_BL


@pytest.mark.parametrize(
    "defect, mend", [("constant", "it is constant"), ("inverted", "the mask is inverted")]
)
@EACH_BACKBONE
def test_a_text_encoder_that_says_nothing_is_found(backbone: str, defect: str, mend: str) -> None:
    model = toy_model(backbone)
    model = replace(model, text_encoder=Encoder(model.text_encoder, defect))  # type: ignore[arg-type]
    sick(wrong(model), "text encoder", mend)


def test_a_trained_text_encoder_that_is_frozen_is_found() -> None:
    model = toy_model()
    assert isinstance(model.text_encoder, nn.Module)
    model.text_encoder.requires_grad_(False)
    sick(wrong(model), "gradients", "set requires_grad on them (2 are frozen)")


def test_a_trained_text_encoder_without_a_graph_is_found() -> None:
    model = toy_model()
    encode = model.text_encoder.encode
    model.text_encoder.encode = torch.no_grad()(encode)  # type: ignore[method-assign]
    found = wrong(model)
    sick(found, "gradients", "take part in the output")
    assert "2 of " in found["gradients"].seen
    assert "text_encoder.words.weight" in found["gradients"].seen


# Noise, time and place


@pytest.mark.parametrize("prediction", ["velocity", "clean"])
@EACH_BACKBONE
def test_a_dead_embedding_of_the_noise_level_is_found(backbone: str, prediction: str) -> None:
    model = toy_model(backbone, model={"prediction": prediction})
    kind: Any = model.predictor.backbone
    noise = kind.time if backbone == "lightning" else kind.noise
    forward = noise.forward
    noise.forward = lambda sigma_BK: forward(torch.full_like(sigma_BK, 0.5))
    sick(wrong(model), "noise level", "Stream.sigma_BK")


@pytest.mark.parametrize("axes, check", [((0,), "time"), ((1, 2), "space")])
@pytest.mark.parametrize("plan", ["text_to_video", "chunks"])
@EACH_BACKBONE
def test_dead_positions_are_found(backbone: str, plan: str, axes: tuple[int, ...], check: str) -> None:
    def flatten(streams: Streams, visibility: Visibility) -> tuple[Streams, Visibility]:
        video = streams["video"]
        position = video.position_BN3.clone()
        position[..., list(axes)] = 0
        cell = video.cell_BN3.clone()
        if backbone == "lightning":  # it reads rows and columns of the grid
            cell[..., [axis for axis in axes if axis > 0]] = 0
        return {**streams, "video": replace(video, position_BN3=position, cell_BN3=cell)}, visibility

    sick(wrong(altered(toy_model(backbone, plan), flatten)), check, "Stream.position_BN3")


# Masks and conditions


@pytest.mark.parametrize("plan", ["chunks", "teacher", "scenes"])
@EACH_BACKBONE
def test_a_leaking_mask_is_found(backbone: str, plan: str) -> None:
    leaking = altered(toy_model(backbone, plan), lambda streams, _: (streams, full))
    if (backbone, plan) == ("lightning", "scenes"):
        # Words are in the pictures of their scene, which all scenes see: no word is hidden from any of them.
        assert not wrong(leaking)
        return
    sick(wrong(leaking), "hidden tokens", "compare the backbone with plans.dense_mask")


@EACH_BACKBONE
def test_a_window_that_is_ignored_is_found(backbone: str) -> None:
    # Through two layers a window of two chunks reaches everything that it hides at once.
    leaking = altered(toy_model(backbone, "chunks"), lambda streams, _: (streams, causal_chunks()))
    sick(wrong(leaking), "hidden tokens", "a mask is missing")


class Forgetful(TextToVideo):
    """A plan that takes given frames and makes them all the same."""

    def layout(self, sample: Sample, text: Text, given: Given) -> Layout:
        return super().layout(sample, text, NOTHING)


def test_given_frames_that_are_forgotten_are_found() -> None:
    found = wrong(replace(toy_model(), plan=Forgetful()))
    assert set(found) == {"given frames", "given frames are exact"}


class Loud(Track):
    """Nothing is quite clean."""

    def sigmas(self, sigma_BD: Tensor) -> Tensor:
        return super().sigmas(sigma_BD) + 0.1


def _given_to(track: Track) -> dict[str, Any]:
    return {f.name: getattr(track, f.name) for f in fields(track) if f.init}


class Noising(TextToVideo):
    """A plan that copies given frames but calls them noisy."""

    def layout(self, sample: Sample, text: Text, given: Given) -> Layout:
        layout = super().layout(sample, text, given)
        return replace(
            layout,
            tracks={
                m: Loud(**{f.name: getattr(track, f.name) for f in fields(track) if f.init})
                for m, track in layout.tracks.items()
            },
        )


def test_given_frames_with_a_noise_level_are_found() -> None:
    sick(wrong(replace(toy_model(), plan=Noising())), "given frames are exact", "have a noise level")


@EACH_BACKBONE
def test_a_parameter_that_takes_no_part_is_found(backbone: str) -> None:
    model = toy_model(backbone)
    model.predictor.backbone.register_parameter("spare", nn.Parameter(torch.ones(3)))  # type: ignore[attr-defined]
    found = wrong(model)
    sick(found, "gradients", "or remove them")
    assert "backbone.spare" in found["gradients"].seen


# The cache


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    folder = tmp_path_factory.mktemp("doctor")
    return folder, make_world(folder / "clips", 6, height=16, width=24)


def recipe(**sections: Any) -> Recipe:
    return toy_recipe(**sections)


def test_the_right_cache_is_right(world: tuple[Path, list]) -> None:
    folder, entries = world
    build_cache(recipe(), entries, folder / "right")
    cache = open_cache(folder / "right")
    findings = {f.check: f.status for f in Doctor(toy_model(), cache).examine()}
    assert (findings["latent scale"], findings["cache"]) == ("ok", "ok")


def test_unequal_channels_are_no_fault(world: tuple[Path, list], tmp_path: Path) -> None:
    _, entries = world
    build_cache(recipe(tokenizer={"whiten": 0.0}), entries, tmp_path)
    cache = open_cache(tmp_path)
    std_C = cache.statistics()[1]
    assert std_C.max() > 5 * std_C.min()
    assert wrong(toy_model(tokenizer={"whiten": 0.0}), cache) == {}


@dataclass
class Unscaled:
    """A tokenizer that forgot to normalise."""

    inner: Tokenizer

    def __post_init__(self) -> None:
        self.spec, self.decode, self.save = self.inner.spec, self.inner.decode, self.inner.save
        self.stream_decode = self.inner.stream_decode

    def encode(self, video_BPHW3: Tensor) -> Tensor:
        return 0.16 * self.inner.encode(video_BPHW3)

    def fingerprint(self) -> str:
        return "0.16 of " + self.inner.fingerprint()


def test_unscaled_latents_are_found(world: tuple[Path, list]) -> None:
    folder, entries = world
    build_cache(recipe(), entries, folder / "scaled")
    tokenizer = Unscaled(open_cache(folder / "scaled").tokenizer())
    build_cache(recipe(), entries, folder / "unscaled", tokenizer=tokenizer)
    sick(wrong(toy_model(), open_cache(folder / "unscaled")), "latent scale", "normalise in the tokenizer")


def test_unlike_clips_of_a_published_vae_are_a_warning(world: tuple[Path, list]) -> None:
    folder, entries = world
    build_cache(recipe(), entries, folder / "like")
    tokenizer = Unscaled(open_cache(folder / "like").tokenizer())
    build_cache(recipe(), entries, folder / "unlike", tokenizer=tokenizer)
    model = toy_model()
    published = model.recipe.tokenizer.model_copy(update={"type": "wan_vae"})
    model = replace(model, recipe=model.recipe.model_copy(update={"tokenizer": published}))
    found = Doctor(model, open_cache(folder / "unlike")).latents_are_scaled()
    assert found.status == "warning"
    assert "not the VAE of these weights" in found.mend


@pytest.mark.parametrize("padding", ["zero", "attended"])
def test_padding_that_is_read_by_design_is_said_so(padding: str) -> None:
    model = toy_model()
    text = model.recipe.text_encoder.model_copy(update={"type": "hf", "padding": padding})
    model = replace(model, recipe=model.recipe.model_copy(update={"text_encoder": text}))
    found = Doctor(model).padding_is_hidden()
    assert found.status == "skipped"
    assert f"read by design (it is {padding})" in found.seen


@pytest.mark.parametrize(
    "sections, said",
    [
        ({"video": {"fps": 4.0, "num_frames": 4}}, "video.fps is 4.0 in the cache and 8.0 in the recipe"),
        ({"tokenizer": {"latent_d": 5}}, "tokenizer.latent_d"),
        ({"preprocess": {"background": [0, 0, 0]}}, "preprocess.background"),
    ],
)
def test_a_stale_cache_is_found(world: tuple[Path, list], sections: dict, said: str, tmp_path: Path) -> None:
    _, entries = world
    build_cache(recipe(**sections), entries, tmp_path)
    found = wrong(toy_model(), open_cache(tmp_path))
    sick(found, "cache", "make it again")
    assert said in found["cache"].seen


def test_a_checkpoints_cache_must_have_its_tokenizer(world: tuple[Path, list], tmp_path: Path) -> None:
    _, entries = world
    build_cache(recipe(), entries, tmp_path)
    cache = open_cache(tmp_path)
    model = toy_model()
    found = wrong(model, cache, trained=True)
    sick(found, "cache", "the tokenizer is")
    assert wrong(replace(model, tokenizer=cache.tokenizer()), cache, trained=True) == {}
