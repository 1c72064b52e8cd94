"""LightningDiT against a reference written out from the paper's facts; its weights; what belongs to it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from cached import make_world
from laid import lay, noised
from motionloom.backbones import FAMILIES, build_backbone
from motionloom.backbones.families import as_original, recognise
from motionloom.backbones.lightning import Lightning, LightningSizes
from motionloom.backbones.weights import Weights, load_into
from motionloom.backbones.weights.pickles import read_pickle
from motionloom.cli.assemble import load_model
from motionloom.config import Recipe, load_recipe
from motionloom.config.recipe import ModelConfig, TextEncoderConfig
from motionloom.data.cache.text import text_settings
from motionloom.data.manifest import write_manifest
from motionloom.errors import UserError
from motionloom.flow import FirstChannels, Guidance, Scales, Term
from motionloom.generate.guided import recipe_guidance
from motionloom.methods.denoise import Denoise, direction_error
from motionloom.nn.patching import patchify
from motionloom.plans import Geometry, Layout, Streams, Text, TextToVideo
from motionloom.plans.visibility import full, same_scene
from motionloom.rng import torch_generator
from motionloom.text import build_text_encoder, load_text_encoder
from motionloom.text.base import encode_scenes
from test_cli import call
from test_denoise import CONTEXT, Answer, embedded
from toy_training import CHANNELS, toy_batch, toy_recipe

SIDE, CLASSES, BATCH = 4, 6, 3
"""Latent cells along a side, classes without the one that is none, pictures."""


# --- the reference, from specs and the paper: names and layout are the authors' -----------------------------


def draw(*shape: int, key: str) -> Tensor:
    return torch.randn(shape, generator=torch_generator("lightning", key, *shape))


def published(
    *, channels: int = 5, patch: int = 1, dim: int = 24, head_dim: int = 12, depth: int = 2, qk: bool = False
) -> dict[str, Tensor]:
    """Random weights in the authors' layout; RMS norms near one."""
    hidden, side = int(2 / 3 * 4 * dim), SIDE // patch
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.weight": (dim, channels, patch, patch),
        "x_embedder.proj.bias": (dim,),
        "t_embedder.mlp.0.weight": (dim, 256),
        "t_embedder.mlp.0.bias": (dim,),
        "t_embedder.mlp.2.weight": (dim, dim),
        "t_embedder.mlp.2.bias": (dim,),
        "y_embedder.embedding_table.weight": (CLASSES + 1, dim),
        "final_layer.norm_final.weight": (dim,),
        "final_layer.linear.weight": (patch * patch * channels, dim),
        "final_layer.linear.bias": (patch * patch * channels,),
        "final_layer.adaLN_modulation.1.weight": (2 * dim, dim),
        "final_layer.adaLN_modulation.1.bias": (2 * dim,),
    }
    for i in range(depth):
        layers = {
            "attn.qkv": (3 * dim, dim),
            "attn.proj": (dim, dim),
            "mlp.w12": (2 * hidden, dim),
            "mlp.w3": (dim, hidden),
            "adaLN_modulation.1": (6 * dim, dim),
        }
        for name, shape in layers.items():
            shapes[f"blocks.{i}.{name}.weight"], shapes[f"blocks.{i}.{name}.bias"] = shape, shape[:1]
        norms = {"norm1": dim, "norm2": dim} | (
            {"attn.q_norm": head_dim, "attn.k_norm": head_dim} if qk else {}
        )
        shapes |= {f"blocks.{i}.{name}.weight": (width,) for name, width in norms.items()}
    tensors = {name: draw(*shape, key=name) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    tensors = {n: 1 + t if "norm" in n else t for n, t in tensors.items()}
    cos, sin = rope_tables(side, head_dim)
    tensors |= {"feat_rope.freqs_cos": cos, "feat_rope.freqs_sin": sin}
    return tensors | {"pos_embed": fixed_places(side, dim)[None]}


def fixed_places(side: int, dim: int) -> Tensor:
    """(N, D): the column's sines, its cosines, the row's sines, its cosines."""
    table = torch.zeros(side * side, dim)
    quarter = dim // 4
    for n in range(side * side):
        for part, place in enumerate((n % side, n // side)):
            for i in range(quarter):
                angle = place / 10000 ** (i / quarter)
                table[n, 2 * part * quarter + i] = math.sin(angle)
                table[n, (2 * part + 1) * quarter + i] = math.cos(angle)
    return table


def rope_tables(side: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """(N, d) each: the first half of a head's channels by the row, the second by the column, in pairs."""
    angle = torch.zeros(side * side, head_dim)
    half = head_dim // 2
    for n in range(side * side):
        for part, place in enumerate((n // side, n % side)):
            for i in range(half):
                angle[n, part * half + i] = place / 10000 ** (i // 2 * 2 / half)
    return angle.cos(), angle.sin()


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight


def affine(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def turned(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    other = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    return x * w["feat_rope.freqs_cos"] + other * w["feat_rope.freqs_sin"]


def block(w: dict[str, Tensor], i: int, x: Tensor, c: Tensor, head_dim: int) -> Tensor:
    at = f"blocks.{i}."
    parts = affine(w, at + "adaLN_modulation.1", F.silu(c))[:, None].chunk(6, dim=-1)
    h = affine(w, at + "attn.qkv", rms(x, w[at + "norm1.weight"]) * (1 + parts[1]) + parts[0])
    q, k, v = (t.unflatten(-1, (-1, head_dim)).transpose(1, 2) for t in h.chunk(3, dim=-1))
    if at + "attn.q_norm.weight" in w:
        q, k = rms(q, w[at + "attn.q_norm.weight"]), rms(k, w[at + "attn.k_norm.weight"])
    scores = turned(q, w) @ turned(k, w).transpose(-1, -2) / head_dim**0.5
    mixed = (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
    x = x + parts[2] * affine(w, at + "attn.proj", mixed)
    gate, value = affine(w, at + "mlp.w12", rms(x, w[at + "norm2.weight"]) * (1 + parts[4]) + parts[3]).chunk(
        2, -1
    )
    return x + parts[5] * affine(w, at + "mlp.w3", F.silu(gate) * value)


def official(w: dict[str, Tensor], x_BCHW: Tensor, t_B: Tensor, label_B: Tensor, head_dim: int) -> Tensor:
    """The authors' velocity, from noise to data, (B, C, H, W)."""
    kernel, channels = w["x_embedder.proj.weight"], x_BCHW.shape[1]
    patch, side = kernel.shape[-1], SIDE // kernel.shape[-1]
    x = F.conv2d(x_BCHW, kernel, w["x_embedder.proj.bias"], stride=patch).flatten(2).transpose(1, 2)
    x = x + w["pos_embed"]
    angle = t_B[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    t = affine(w, "t_embedder.mlp.0", torch.cat([angle.cos(), angle.sin()], dim=-1))
    c = affine(w, "t_embedder.mlp.2", F.silu(t)) + w["y_embedder.embedding_table.weight"][label_B]
    for i in range(sum(name.endswith("norm1.weight") for name in w)):
        x = block(w, i, x, c, head_dim)
    shift, scale = affine(w, "final_layer.adaLN_modulation.1", F.silu(c))[:, None].chunk(2, dim=-1)
    x = affine(w, "final_layer.linear", rms(x, w["final_layer.norm_final.weight"]) * (1 + scale) + shift)
    cells = x.reshape(-1, side, side, patch, patch, channels)
    return torch.einsum("nhwpqc->nchpwq", cells).reshape(-1, channels, SIDE, SIDE)


# --- the same, here -----------------------------------------------------------------------------------------


def imported(tensors: dict[str, Tensor], preset: str = "") -> Lightning:
    found = recognise(Weights.of_tensors("x.pt", tensors), "lightning", preset)
    assert (found.family.name, found.layout) == ("lightning", "original")
    model = found.family.on_meta(found.sizes)
    load_into(model, found.weights)
    assert isinstance(model, Lightning)
    return model.eval()


def picture(seconds: float = 0.0, frames: int = 1, patch: int = 1) -> Geometry:
    side = SIDE // patch
    times = seconds + torch.arange(frames)[None] / 8
    return Geometry((frames, side, side), times, (8.0, 8.0), torch.zeros(1, frames).long(), BATCH)


def streams_of(
    geometry: Geometry, clean_BFSC: Tensor, noise_BFSC: Tensor, sigma_B: Tensor, text: Text
) -> tuple[Layout, Streams]:
    layout = lay(TextToVideo(), geometry, text)
    return layout, noised(layout, clean_BFSC, noise_BFSC, sigma_B[:, None], text)


def labels(label_B: Tensor) -> Text:
    """As the encoder of classes has them; its last row is no class."""
    encoder = build_text_encoder(class_config(), 0)
    return encode_scenes(encoder, [[NAMES[i] if i < CLASSES else ""] for i in label_B.tolist()])


NAMES = ("cat", "dog", "fox", "hen", "owl", "yak")
LABELS = torch.tensor([2, 0, CLASSES])
SIGMA = torch.tensor([0.1, 0.5, 0.97])


def class_config(*names: str) -> TextEncoderConfig:
    return TextEncoderConfig(type="classes", classes=names or NAMES)


def refusal(function: Any) -> str:
    with pytest.raises(UserError) as caught:
        function()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def tokens(x_BCHW: Tensor, patch: int) -> Tensor:
    return patchify(x_BCHW.permute(0, 2, 3, 1)[:, None], (1, patch, patch))


@pytest.mark.parametrize("qk", [False, True])
@pytest.mark.parametrize(("patch", "head_dim"), [(1, 12), (2, 8)])
def test_published_weights_answer_as_the_authors_network(qk: bool, patch: int, head_dim: int) -> None:
    """Classes and none, each picture at a time of its own; t = 1 is data there, and velocity points to it."""
    weights = published(patch=patch, head_dim=head_dim, qk=qk)
    clean, noise = draw(BATCH, 5, SIDE, SIDE, key="clean"), draw(BATCH, 5, SIDE, SIDE, key="noise")
    t_B = 1 - SIGMA
    state = t_B[:, None, None, None] * clean + SIGMA[:, None, None, None] * noise
    wanted = official(weights, state, t_B, LABELS, head_dim)
    model = imported(weights)
    assert model.sizes.qk_norm == qk
    for seconds in (0.0, 5.0):  # of one frame it does not matter when it is
        geometry = picture(seconds, patch=patch)
        layout, streams = streams_of(
            geometry, tokens(clean, patch), tokens(noise, patch), SIGMA, labels(LABELS)
        )
        with torch.no_grad():
            found = model(streams, layout.visibility)["video"]
        torch.testing.assert_close(found, -tokens(wanted, patch)[:, 0], rtol=1e-5, atol=1e-5)
    assert wanted.std() > 0.1


def test_sizes_are_the_published_ones() -> None:
    """Parameters with 64 channels and 1,001 classes, in millions: counted from the authors' own classes."""
    found = {}
    for name, preset in FAMILIES["lightning"].presets.items():
        shapes = FAMILIES["lightning"].shapes(preset)
        found[name] = round(sum(map(math.prod, shapes.values())) / 1e6, 1)
    assert (found["lightning-b"], found["lightning-xl"], found["lightning-1p0b"]) == (130.4, 675.0, 1029.1)
    hidden = {name: preset.hidden for name, preset in FAMILIES["lightning"].presets.items()}
    assert (hidden["lightning-b"], hidden["lightning-xl"], hidden["lightning-1p0b"]) == (2048, 3072, 4096)


# --- words and time -----------------------------------------------------------------------------------------


def small(**changes: Any) -> Lightning:
    """Told by words, with values where it starts from zero."""
    sizes = LightningSizes(2, 12, 2, in_channels=5, text_dim=7, condition="text")
    model = Lightning(replace(sizes, **changes))
    model.init_weights(torch_generator("small"))
    for name, p in model.named_parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.3, generator=torch_generator("small", name))
    return model.double().eval()


def told(words_BLT: Tensor, scene_L: Tensor) -> Text:
    return Text(words_BLT, torch.ones(words_BLT.shape[:2]).bool(), scene_L[None])


def scenes_apart(scenes: tuple[int, ...], key: str = "apart") -> tuple[Geometry, Tensor, Tensor, Text]:
    """A clip of one-frame scenes, and two words for each."""
    frames = len(scenes)
    whole = {n: draw(BATCH, 3, SIDE * SIDE, 5, key=n + key).double() for n in ("clean", "noise")}
    words = draw(BATCH, 6, 7, key="words" + key).double().unflatten(1, (3, 2))
    geometry = replace(picture(frames=frames), scene_BF=torch.arange(frames)[None], scenes=frames)
    picked = list(scenes)
    text = told(words[:, picked].flatten(1, 2), torch.arange(frames).repeat_interleave(2))
    return geometry, whole["clean"][:, picked], whole["noise"][:, picked], text


def test_each_scene_is_told_its_own_words() -> None:
    """Scenes that see nothing of each other answer as if each were alone."""
    model, sigma_B = small(), SIGMA.double()
    with torch.no_grad():
        _, streams = streams_of(*scenes_apart((0, 1, 2))[:3], sigma_B, scenes_apart((0, 1, 2))[3])
        together = model(streams, same_scene)["video"].unflatten(1, (3, -1))
        for scene in range(3):
            geometry, clean, noise, text = scenes_apart((scene,))
            _, alone = streams_of(geometry, clean, noise, sigma_B, text)
            torch.testing.assert_close(together[:, scene], model(alone, full)["video"], rtol=0, atol=1e-10)
        assert (together - model(streams, full)["video"].unflatten(1, (3, -1))).abs().mean() > 1e-3


def test_the_order_of_words_does_not_matter_and_hidden_ones_may_hold_anything() -> None:
    model = small()
    geometry, clean, noise, text = scenes_apart((0,))
    padded = Text(
        torch.cat([text.x_BLC.flip(1), torch.full_like(text.x_BLC, math.nan)], dim=1),
        torch.tensor([[True, True, False, False]]).expand(BATCH, -1),
        torch.zeros(1, 4).long(),
    )
    with torch.no_grad():
        found = [
            model(streams_of(geometry, clean, noise, SIGMA.double(), one)[1], full)["video"]
            for one in (text, padded, replace(text, x_BLC=text.x_BLC * 100))
        ]
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=1e-4)  # nor the encoder's scale


def test_time_turns_what_space_does_not() -> None:
    """Frames are told apart, time counts by differences, and a frame of the same time is the same place."""
    model = small()
    clean, noise = (draw(BATCH, 3, SIDE * SIDE, 5, key=n).double() for n in ("c", "n"))
    text = told(draw(BATCH, 2, 7, key="t").double(), torch.zeros(2).long())

    def run(*seconds: float) -> Tensor:
        geometry = replace(picture(frames=3), seconds_BF=torch.tensor([seconds]))
        with torch.no_grad():
            return model(streams_of(geometry, clean, noise, SIGMA.double(), text)[1], full)["video"]

    still = run(0.0, 0.25, 0.5)
    torch.testing.assert_close(run(100.0, 100.25, 100.5), still, rtol=0, atol=1e-10)
    assert (run(0.0, 0.5, 1.0) - still).abs().mean() > 1e-3
    same = run(0.0, 0.0, 0.0).unflatten(1, (3, -1))
    clean, noise = clean.flip(1), noise.flip(1)
    torch.testing.assert_close(run(0.0, 0.0, 0.0).unflatten(1, (3, -1)).flip(1), same, rtol=0, atol=1e-10)


# --- weights in and out -------------------------------------------------------------------------------------


def test_a_file_of_the_authors_becomes_a_folder_and_goes_back(tmp_path: Path) -> None:
    """``ema`` is taken, with --raw ``model``; what comes back lacks the positions, which are computed."""
    weights = published()
    last = {name: t if "pos" in name or "rope" in name else t + 1 for name, t in weights.items()}
    content = {"model": last, "ema": weights, "opt": {"state": {0: torch.ones(1)}}, "config": {"a": 1}}
    torch.save(content, tmp_path / "0100000.pt")
    assert read_pickle(tmp_path / "0100000.pt").taken == "ema"
    for words, wanted in (((), weights), (("--raw",), last)):
        folder = tmp_path / f"folder{len(words)}"
        answer = call("convert", str(tmp_path / "0100000.pt"), str(folder), *words, "--json")
        assert answer.code == 0, answer.err
        assert answer.value["left_out"] == 3
        config = json.loads((folder / "config.json").read_text())
        assert (config["num_attention_heads"], config["attention_head_dim"], config["text_dim"]) == (2, 12, 7)
        back = tmp_path / f"back{len(words)}.safetensors"
        assert call("convert", str(folder), str(back), "--to", "original", "--json").code == 0
        assert load_file(back).keys() == {n for n in weights if "pos_embed" not in n and "feat_rope" not in n}
        assert all(torch.equal(t, wanted[name]) for name, t in load_file(back).items())


def without(name: str) -> dict[str, Tensor]:
    return {key: t for key, t in published().items() if key != name}


def shifted(name: str) -> dict[str, Tensor]:
    return {key: t + 0.1 if key == name else t for key, t in published().items()}


HEADLESS = {n: t for n, t in published(dim=32, head_dim=16).items() if not n.startswith("feat_rope")}


@pytest.mark.parametrize(
    ("tensors", "preset", "problem"),
    [
        (without("blocks.1.norm2.weight"), "", "1 missing (layers.1.norm2.weight)"),
        (published() | {"blocks.1.extra": torch.ones(1)}, "", "1 unexpected (layers.1.extra)"),
        (published() | {"blocks.0.mlp.w3.bias": torch.ones(3)}, "", "layers.0.mlp.w3.bias is [3]"),
        (shifted("pos_embed"), "", "pos_embed is not the table of LightningDiT"),
        (shifted("feat_rope.freqs_sin"), "", "feat_rope.freqs_sin is not the table"),
        ({n: t for n, t in published().items() if "rope" not in n}, "", "does not tell into how many heads"),
        (published(), "lightning-b", "is not what model.preset lightning-b says"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tensors: dict[str, Tensor], preset: str, problem: str) -> None:
    assert problem in refusal(lambda: imported(tensors, preset))


def test_a_preset_tells_heads_that_the_file_does_not() -> None:
    model = imported(HEADLESS, "tiny")
    assert (model.sizes.num_attention_heads, model.sizes.in_channels) == (2, 5)
    twin = imported(published(dim=32, head_dim=16))
    assert model.sizes == twin.sizes
    assert as_original(Weights.of_tensors("x", twin.state_dict()), FAMILIES["lightning"]).tensors.keys() == {
        n for n in HEADLESS if n != "pos_embed"
    }


def test_a_preset_takes_the_ends_of_the_recipe_and_weights_keep_theirs(tmp_path: Path) -> None:
    config = ModelConfig(type="lightning", preset="tiny", patch=(2, 1, 2), qk_norm=True)
    model = build_backbone(config, 3, 9)
    assert isinstance(model, Lightning)
    wanted = (2 * 2 * 3, (2, 1, 2), 9, "text", True)
    sizes = model.sizes
    assert (
        model.exit.out.out_features,
        sizes.patch_size,
        sizes.text_dim,
        sizes.condition,
        sizes.qk_norm,
    ) == wanted
    of_weights = LightningSizes.from_weights(Weights.of_tensors("x", published()))
    named = config.model_copy(
        update={"preset": "", "name_or_path": "x", "patch": (1, 1, 1), "qk_norm": False}
    )
    assert "write model.condition: class" in refusal(lambda: build_backbone(named, 5, 7, sizes=of_weights))
    classes = named.model_copy(update={"condition": "class"})
    assert "latents have 3 channels" in refusal(lambda: build_backbone(classes, 3, 7, sizes=of_weights))
    assert "text embeddings have 9" in refusal(lambda: build_backbone(classes, 5, 9, sizes=of_weights))
    other = classes.model_copy(update={"qk_norm": True})
    assert "write model.qk_norm: false" in refusal(lambda: build_backbone(other, 5, 7, sizes=of_weights))
    assert build_backbone(classes, 5, 7, sizes=of_weights, device="meta").patch == (1, 1, 1)


# --- classes ------------------------------------------------------------------------------------------------


def test_a_class_is_one_word_and_the_empty_caption_is_none_of_them(tmp_path: Path) -> None:
    encoder = build_text_encoder(class_config(), 0)
    x_BLC, valid_BL = encoder.encode(["hen", "", "cat"])
    assert x_BLC.shape == (3, 1, CLASSES + 1)
    assert x_BLC.argmax(dim=-1).flatten().tolist() == [3, CLASSES, 0]
    assert x_BLC.sum() == 3
    assert valid_BL.all()
    assert "caption 'foxx' is none of the 6 text_encoder.classes: did you mean 'fox'?" in refusal(
        lambda: encoder.encode(["foxx"])
    )
    encoder.save(tmp_path)
    again = load_text_encoder(tmp_path)
    assert again.fingerprint() == encoder.fingerprint()
    assert build_text_encoder(class_config(*NAMES[::-1]), 0).fingerprint() != encoder.fingerprint()
    # A cache compares what it kept as JSON with the recipe.
    settings = text_settings(Recipe(text_encoder=class_config()))
    assert json.loads(json.dumps(settings)) == settings


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["text_encoder.type=classes"], "list text_encoder.classes"),
        (["text_encoder={type: classes, classes: [a, a]}"], "names a twice"),
        (["text_encoder={type: classes, classes: [a, '']}"], "the empty caption"),
        (["text_encoder.classes=[a]"], "are for text_encoder.type classes, not hash"),
        (["model.condition=class"], "set text_encoder.type: classes"),
        (["model={type: joint, qk_norm: true}"], "model.qk_norm is for lightning"),
        (["model={type: joint, condition: class}"], "model.condition class is for lightning"),
        (["model={type: lightning, preset: lightning-b, dim: 64}"], "model.dim cannot be chosen"),
        (["flow_matching.direction=1", "train.objective=ddpm_v"], "flow_matching.direction is for"),
        (["flow_matching.direction=-1"], "a number of at least 0"),
        (["guidance.text_channels=0"], "a whole number above 0"),
    ],
)
def test_what_does_not_fit_together_is_refused(words: list[str], problem: str) -> None:
    recipe = "quickstart" if any(word.startswith("model={") for word in words) else "lightning"
    assert problem in refusal(lambda: load_recipe(recipe, words))


def test_the_recipe_also_takes_published_sizes_and_classes() -> None:
    """As its comment says, in place of its own sizes."""
    words = ["model.preset=lightning-b", "model.condition=class"]
    words += ["text_encoder.type=classes", "text_encoder.classes=[a, b]"]
    plain = load_recipe("lightning")
    assert (plain.model.imported, plain.flow_matching.direction) == (False, 1.0)
    recipe = load_recipe("lightning", words)
    assert recipe.model.imported
    shapes = build_backbone(recipe.model, 48, 3, device="meta").state_dict()
    assert shapes["told.table.weight"].shape == (3, 768)
    assert shapes["entry.proj.weight"].shape == (768, 48, 1, 1)


# --- the objective and the guidance of its authors ----------------------------------------------------------


def test_direction_is_the_cosine_over_the_channels_of_each_cell() -> None:
    target = torch.tensor([[[3.0, 4.0, 1.0, 0.0]]])
    velocity = torch.tensor([[[6.0, 8.0, 0.0, 2.0]]])  # along the first cell's, across the second's
    assert direction_error(velocity, target, 2).item() == pytest.approx(0.5)
    assert direction_error(velocity, target, 1).item() == pytest.approx(1 - 50 / (104 * 26) ** 0.5)
    assert direction_error(-target, target, 2).item() == pytest.approx(2.0)
    v = velocity.clone().requires_grad_()
    direction_error(v, target, 2).sum().backward()
    assert v.grad is not None
    assert torch.allclose((v.grad * velocity).unflatten(-1, (2, 2)).sum(-1), torch.zeros(2), atol=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
def test_the_loss_is_squared_error_and_a_weight_of_direction(weight: float) -> None:
    """Over the tokens that count, beside the weighting of noise levels, which it does not take."""
    batch = embedded(toy_batch(4))
    answer = draw(4, batch.video.x_BFHWC[0, ..., 0].numel(), CHANNELS, key="answer")
    backbone = Answer(lambda streams: answer)

    def losses(**keys: Any) -> Tensor:
        recipe = toy_recipe(cfg_dropout_prob=0.0, flow_matching__weighting="bell", **keys)
        return Denoise(recipe, backbone, TextToVideo()).losses(batch, CONTEXT).loss_B  # type: ignore[arg-type]

    plain, found = losses(), losses(flow_matching__direction=weight)
    video = backbone.fed[-1]["video"]
    noise_BNC = (video.x_BNC - (1 - video.sigma_BN[..., None]) * batch.video.x_BFHWC.flatten(1, 3)) / (
        video.sigma_BN[..., None]
    )
    target_BNC = noise_BNC - batch.video.x_BFHWC.flatten(1, 3)
    cosine_BN = (answer * target_BNC).sum(-1) / (answer.norm(dim=-1) * target_BNC.norm(dim=-1))
    torch.testing.assert_close(found, plain + weight * (1 - cosine_BN).mean(dim=1), rtol=1e-4, atol=1e-5)


def test_guidance_of_the_text_may_act_on_the_first_channels_alone() -> None:
    p = {name: draw(2, 3, 4, 8, key=name) for name in ("cond", "negative", "skip")}
    guidance = Guidance(3.0, channels=FirstChannels(3), skip=Term(1.5), skip_blocks=(1,))
    whole = replace(guidance, channels=None).combine(p, 0.5)
    some = guidance.combine(p, 0.5)
    assert torch.equal(some[..., :3], whole[..., :3])
    other = Guidance(skip=Term(1.5), skip_blocks=(1,)).combine(p, 0.5)
    torch.testing.assert_close(some[..., 3:], other[..., 3:])
    assert not torch.allclose(some[..., 3:], whole[..., 3:])
    # Of tokens of two cells with four channels each, the first three of both.
    pairs = replace(guidance, channels=FirstChannels(3, cells=2)).combine(p, 0.5)
    kept = torch.tensor([True, True, True, False] * 2)
    assert torch.equal(pairs[..., kept], whole[..., kept])
    torch.testing.assert_close(pairs[..., ~kept], other[..., ~kept])
    # Sound has channels of its own.
    heard = replace(guidance, audio=Scales(Term(3.0)))
    assert torch.equal(heard.combine(p, 0.5, modality="audio"), Guidance(3.0).combine(p, 0.5))


def test_recipes_say_how_many_channels_are_guided() -> None:
    keys = ["guidance.text_channels=3", "model.patch=[1, 2, 2]", "train.sample_cfg_interval=[0, 0.9]"]
    found = recipe_guidance(load_recipe("lightning", keys))
    assert (found.channels, found.interval) == (FirstChannels(3, 4), (0.0, 0.9))
    assert found.restricted(("video",), ("video",), ()).channels == FirstChannels(3, 4)
    assert [one.name for one in found.passes(0.95)] == ["cond"]
    assert recipe_guidance(load_recipe("lightning")).channels is None
    assert "give 1 or more" in refusal(lambda: FirstChannels(0))


def test_a_preset_is_trained_on_classes_and_its_run_opens_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run keeps the ends that the preset was given: 12 channels, four classes and none."""
    monkeypatch.chdir(tmp_path)
    entries = make_world(tmp_path / "world", 4)
    write_manifest("manifest.jsonl", entries)
    names = [str(entry.caption) for entry in entries]
    recipe = {
        "video": {"width": 32, "height": 32, "fps": 8, "num_frames": 8},
        "tokenizer": {"latent_f": 8, "latent_t": 4, "latent_d": 12},
        "text_encoder": {"type": "classes", "classes": names},
        "model": {"type": "lightning", "preset": "tiny", "condition": "class"},
        "flow_matching": {"direction": 1},
        "train": {"max_steps": 1, "batch_size": 2, "precision": "fp32", "sample_num_steps": 1},
    }
    Path("classes.yaml").write_text(json.dumps(recipe))
    for words in (
        ("cache", "classes.yaml", "--manifest", "manifest.jsonl", "--out", "cache"),
        ("train", "classes.yaml", "--cache", "cache"),
        ("generate", "runs/run", "--prompt", names[1], "--out", "clips", "--format", "webp"),
    ):
        answer = call(*words, "--json")
        assert answer.code == 0, answer.err
    sizes = load_model("runs/run", device="cpu").predictor.backbone.sizes  # type: ignore[attr-defined]
    assert (sizes.in_channels, sizes.text_dim, sizes.condition) == (12, 5, "class")
    answer = call("generate", "runs/run", "--prompt", "a wave number 9", "--out", "clips2", "--json")
    assert "is none of the 4 text_encoder.classes" in str(answer.value["error"])
