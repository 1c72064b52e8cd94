"""Text as the field's models read it: against diffusers' pipelines, on tiny models made here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cached import make_world
from cached import recipe as toy_recipe
from motionloom.config.recipe import Recipe, TextEncoderConfig
from motionloom.data.cache import build_cache
from motionloom.data.cache.tables import TEXT, open_table
from motionloom.data.cache.text import TextTable, cache_text
from motionloom.errors import UserError
from motionloom.rng import torch_generator
from motionloom.text import build_text_encoder, encode_scenes, load_text_encoder
from motionloom.text.connectors import ConnectorSizes, TextConnectors
from test_text import CAPTIONS, save_model

LONG = "red circle " * 20
HEADS = {
    f"{modality}_connector_{name}": value
    for modality in ("video", "audio")
    for name, value in {
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "num_layers": 2,
        "num_learnable_registers": 4,
    }.items()
}
V1 = {"caption_channels": 32, "text_proj_in_factor": 3, "rope_type": "split", **HEADS}
V2 = {
    **V1,
    "video_gated_attn": True,
    "audio_gated_attn": True,
    "audio_connector_attention_head_dim": 4,
    "audio_connector_num_layers": 3,
    "per_modality_projections": True,
    "video_hidden_dim": 32,
    "audio_hidden_dim": 16,
    "proj_bias": True,
}
VARIANTS = {
    "2.0": V1,
    "2.3": V2,
    "interleaved": {**V1, "rope_type": "interleaved", "rope_double_precision": False},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def theirs(variant: str, **changes):
    """diffusers' connectors with weights that all matter."""
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors

    connectors = LTX2TextConnectors(**{**VARIANTS[variant], **changes}).eval()
    generator = torch_generator("connectors", variant)
    with torch.no_grad():
        for parameter in connectors.parameters():
            scale = max(parameter.shape[-1], 4) ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return connectors


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models as in a folder of diffusers: text encoder, tokenizer and connectors side by side."""
    found = {}
    for kind in ("t5", "umt5", "gemma3"):
        root = tmp_path_factory.mktemp(kind)
        save_model(root / "text_encoder", kind)
        (root / "tokenizer").mkdir()
        for file in (root / "text_encoder").glob("tokenizer*"):
            file.rename(root / "tokenizer" / file.name)
        found[kind] = root / "text_encoder"
    for variant in VARIANTS:
        theirs(variant).save_pretrained(found["gemma3"].parent / f"connectors {variant}")
    return found


def config(path: Path, **changes) -> TextEncoderConfig:
    values = {"type": "hf", "name_or_path": str(path), "max_length": 16, "dtype": "float32", **changes}
    return TextEncoderConfig(**values)


def pipeline(path: Path, text_encoder: str, **changes) -> SimpleNamespace:
    """What a diffusers pipeline's prompt methods need of it."""
    import transformers

    model = getattr(transformers, text_encoder).from_pretrained(path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent / "tokenizer")
    return SimpleNamespace(
        text_encoder=model, tokenizer=tokenizer, _execution_device=torch.device("cpu"), **changes
    )


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


# --- T5 and UMT5 --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_captions_for_wan_are_cleaned_as_its_pipeline_does(models):
    """Web text: HTML entities, twice escaped ones, and whitespace of all kinds."""
    from diffusers import WanPipeline

    peer = pipeline(models["umt5"], "UMT5EncoderModel")
    captions = ["  a red &amp;amp; blue\n\tcircle ", "\u2028a&nbsp;star &lt;3"]
    wanted = WanPipeline._get_t5_prompt_embeds(peer, captions, max_sequence_length=16)
    encoder = build_text_encoder(config(models["umt5"], padding="zero"), seed=0)
    assert relative(encoder.encode(captions)[0], wanted) < 1e-5
    other = build_text_encoder(config(models["umt5"]), seed=0)
    assert not torch.equal(other.encode(captions)[0], encoder.encode(captions)[0]), "it is Wan's rule alone"
    entities = ["&amp;amp; " * 10]
    assert (other.count_cut(entities), encoder.count_cut(["&amp;amp;"])) == (1, 0)


@torch.no_grad()
def test_umt5_is_embedded_as_wan_does(models):
    from diffusers import WanPipeline

    peer = pipeline(models["umt5"], "UMT5EncoderModel")
    captions = [*CAPTIONS, LONG]
    wanted = WanPipeline._get_t5_prompt_embeds(peer, captions, max_sequence_length=16)
    encoder = build_text_encoder(config(models["umt5"], padding="zero"), seed=0)
    x_BLC, valid_BL = encoder.encode(captions)
    assert relative(x_BLC, wanted) < 1e-5
    assert valid_BL.all()
    assert not x_BLC[1, 1:].any(), "behind the empty caption's end token there are zeros"
    assert x_BLC[3].any(dim=1).all(), "a caption of full length has no padding"


@torch.no_grad()
def test_t5_is_embedded_as_cogvideox_does(models):
    from diffusers import CogVideoXPipeline

    peer = pipeline(models["t5"], "T5EncoderModel")
    captions = [*CAPTIONS, LONG]
    wanted = CogVideoXPipeline._get_t5_prompt_embeds(peer, captions, max_sequence_length=16)
    encoder = build_text_encoder(config(models["t5"], padding="attended"), seed=0)
    x_BLC, valid_BL = encoder.encode(captions)
    assert relative(x_BLC, wanted) < 1e-5
    assert valid_BL.all()
    assert x_BLC.any(dim=2).all(), "padding is embedded"
    # Words see the padding: their embeddings are not those of the caption alone.
    alone, _ = build_text_encoder(config(models["t5"]), seed=0).encode(captions)
    assert relative(x_BLC[1, :1], alone[1, :1]) > 1e-3
    # But no caption sees its neighbours.
    torch.testing.assert_close(encoder.encode(CAPTIONS[2:])[0][0], x_BLC[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding", ["hidden", "zero", "attended"])
def test_padding_is_part_of_what_an_encoder_is(models, tmp_path, padding):
    encoder = build_text_encoder(config(models["t5"], padding=padding), seed=0)
    encoder.save(tmp_path)
    again = load_text_encoder(tmp_path)
    assert again.fingerprint() == encoder.fingerprint()
    for one, other in zip(again.encode(CAPTIONS), encoder.encode(CAPTIONS), strict=True):
        assert torch.equal(one, other)
    others = {"hidden", "zero", "attended"} - {padding}
    for kind in others:
        other = build_text_encoder(config(models["t5"], padding=kind), seed=0)
        assert other.fingerprint() != encoder.fingerprint()


def test_encoders_saved_before_padding_could_be_chosen_still_load(models, tmp_path):
    encoder = build_text_encoder(config(models["t5"]), seed=0)
    encoder.save(tmp_path)
    note = json.loads((tmp_path / "text_encoder.json").read_text())
    del note["padding"]
    (tmp_path / "text_encoder.json").write_text(json.dumps(note))
    assert load_text_encoder(tmp_path).fingerprint() == encoder.fingerprint()


def test_attended_padding_needs_a_padding_token(models, tmp_path):
    save_model(tmp_path / "text_encoder", "t5")
    file = tmp_path / "text_encoder" / "tokenizer_config.json"
    note = json.loads(file.read_text())
    del note["pad_token"]
    file.write_text(json.dumps(note))
    (tmp_path / "text_encoder" / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match="no padding token"):
        build_text_encoder(config(tmp_path / "text_encoder", padding="attended"), seed=0)


@pytest.mark.parametrize("padding", ["zero", "attended"])
def test_scenes_that_a_sample_lacks_stay_padding(models, padding):
    encoder = build_text_encoder(config(models["t5"], padding=padding), seed=0)
    text = encode_scenes(encoder, [["a cat", "a red circle"], ["a cat"]])
    assert text.valid_BL.sum(dim=1).tolist() == [32, 16]


# --- LTX-2 --------------------------------------------------------------------------------------------------


@every_variant
@torch.no_grad()
def test_connectors_equal_diffusers(variant):
    """Words first here and padded on the left there; ragged, full and single captions; names both ways."""
    other = theirs(variant)
    sizes = ConnectorSizes.from_diffusers(other.config)
    ours = TextConnectors(sizes)
    ours.load_state_dict(other.state_dict(), strict=True)
    generator = torch_generator("hidden")
    hidden = torch.randn(3, 12, 32, 3, generator=generator) * torch.tensor([1.0, 7.0, 40.0])
    lengths = torch.tensor([5, 12, 1])
    valid_BL = torch.arange(12) < lengths[:, None]
    left = torch.stack([row.roll(12 - n, 0) for row, n in zip(hidden, lengths.tolist(), strict=True)])
    video, audio, mask = other(left.flatten(2), valid_BL.flip(1).long(), padding_side="left")
    assert mask.all()
    features = ours.features(hidden, valid_BL)
    found = ours.contexts(*features, valid_BL)
    wanted = torch.cat([video, audio], dim=-1)
    assert found.shape[-1] == sizes.width("video") + sizes.width("audio")
    assert relative(found, wanted) < 1e-5
    assert (found - wanted).abs().max() < 1e-4
    noise = torch.where(valid_BL[..., None, None], hidden, 5.0)
    again = ours.contexts(*ours.features(noise, valid_BL), valid_BL)
    assert torch.equal(again, found), "what stands at padding is never read"


@pytest.mark.parametrize(
    "config",
    [
        {"rope_type": "split"},
        {
            **{k: v for k, v in V2.items() if k in ("video_gated_attn", "audio_gated_attn", "proj_bias")},
            "rope_type": "split",
            "per_modality_projections": True,
            "video_connector_num_attention_heads": 32,
            "video_connector_num_layers": 8,
            "audio_connector_num_attention_heads": 32,
            "audio_connector_attention_head_dim": 64,
            "audio_connector_num_layers": 8,
        },
    ],
    ids=["2.0", "2.3"],
)
def test_connectors_of_published_sizes_have_diffusers_weights(config):
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors

    with torch.device("meta"):
        other = LTX2TextConnectors(**config)
        ours = TextConnectors(ConnectorSizes.from_diffusers(other.config))
    assert {n: t.shape for n, t in ours.state_dict().items()} == {
        n: t.shape for n, t in other.state_dict().items()
    }


@every_variant
@torch.no_grad()
def test_gemma_is_embedded_as_ltx2_does(models, variant):
    from diffusers import LTX2Pipeline
    from transformers import Gemma3Model

    peer = pipeline(models["gemma3"], Gemma3Model.__name__)
    captions = [f"  {CAPTIONS[0]} ", *CAPTIONS[1:], LONG]
    embeds, mask = LTX2Pipeline._get_gemma_prompt_embeds(
        peer, captions, max_sequence_length=16, dtype=torch.float32
    )
    video, audio, _ = theirs(variant)(embeds, mask, padding_side="left")
    folder = models["gemma3"].parent / f"connectors {variant}"
    encoder = build_text_encoder(config(models["gemma3"], type="ltx2", connectors=str(folder)), seed=0)
    x_BLC, valid_BL = encoder.encode(captions)
    assert x_BLC.shape == (4, 16, encoder.dim)
    assert valid_BL.all()
    assert relative(x_BLC, torch.cat([video, audio], dim=-1)) < 1e-5
    assert encoder.count_cut(captions) == 1


def test_ltx2_text_protocol(models, tmp_path):
    folder = models["gemma3"].parent / "connectors 2.3"
    recipe = config(models["gemma3"], type="ltx2", connectors=str(folder))
    encoder = build_text_encoder(recipe, seed=0)
    x_BLC, _ = encoder.encode(CAPTIONS)
    assert not encoder.trainable
    assert not any(p.requires_grad for p in encoder.connectors.parameters())
    for caption, x_LC in zip(CAPTIONS, x_BLC, strict=True):
        torch.testing.assert_close(encoder.encode([caption])[0][0], x_LC, rtol=1e-4, atol=1e-5)
    encoder.save(tmp_path / "text")
    again = load_text_encoder(tmp_path / "text")
    assert torch.equal(again.encode(CAPTIONS)[0], x_BLC)
    rough, _ = build_text_encoder(recipe.model_copy(update={"dtype": "bfloat16"}), seed=0).encode(CAPTIONS)
    assert rough.dtype == torch.bfloat16
    assert relative(rough.float(), x_BLC) < 0.1

    file = next(folder.glob("*.safetensors"))
    state = load_file(file)
    try:
        save_file({**state, "video_text_proj_in.bias": state["video_text_proj_in.bias"] + 1}, file)
        with pytest.raises(UserError, match="not the text encoder"):
            load_text_encoder(tmp_path / "text")
    finally:
        save_file(state, file)


def test_connectors_beside_the_model_are_found(models, tmp_path):
    for name in ("text_encoder", "tokenizer"):
        (tmp_path / name).symlink_to(models["gemma3"].parent / name)
    with pytest.raises(UserError, match=r"connectors: no such folder"):
        build_text_encoder(config(tmp_path / "text_encoder", type="ltx2"), seed=0)
    (tmp_path / "connectors").symlink_to(models["gemma3"].parent / "connectors 2.0")
    assert build_text_encoder(config(tmp_path / "text_encoder", type="ltx2"), seed=0).dim == 64


def test_connectors_that_do_not_fit_are_refused(models, tmp_path):
    good = models["gemma3"].parent / "connectors 2.0"

    def wrong(words: str, settings: dict | None = None, path: Path = tmp_path / "c", **changes) -> None:
        values = {"type": "ltx2", "connectors": str(path), **(settings or {})}
        recipe = config(models["gemma3"]).model_copy(update=values)
        if changes:
            path.mkdir(exist_ok=True)
            note = json.loads((good / "config.json").read_text()) | changes
            (path / "config.json").write_text(json.dumps(note))
        with pytest.raises(UserError, match=words):
            build_text_encoder(recipe, seed=0)

    wrong("no such folder")
    (tmp_path / "c").mkdir()
    wrong("no readable config.json")
    wrong("no safetensors", text_proj_in_factor=3)
    (tmp_path / "c" / "w.safetensors").symlink_to(next(good.glob("*.safetensors")))
    wrong("not what its config.json says", text_proj_in_factor=4)
    wrong("does not know windows", windows=3)
    wrong("_class_name is Other", _class_name="Other")
    wrong("rope_type is 'none', expected interleaved or split", rope_type="none")
    wrong("registers is None, expected a whole", video_connector_num_learnable_registers=None)
    wrong("heads is None, expected a whole number above 0", video_connector_num_attention_heads=None)
    wrong("head_dim is None", audio_connector_attention_head_dim=None)
    wrong("factor is '3'", text_proj_in_factor="3")
    wrong("rope_theta is 'x', expected a number above 0", rope_theta="x")
    wrong("base_seq_len is 0", connector_rope_base_seq_len=0)
    wrong("video_gated_attn is 1, expected true or false", video_gated_attn=1)
    wrong("24 wide, but its features are 32", audio_connector_num_attention_heads=3)
    wrong(
        "no multiple of the connectors' 4 registers: set text_encoder.max_length=16", {"max_length": 14}, good
    )
    theirs("2.0", text_proj_in_factor=4).save_pretrained(tmp_path / "deeper")
    wrong("32 channels and 3 layers; .* has 32 and 2", path=tmp_path / "deeper")
    wrong("is a umt5, and LTX-2 reads Gemma 3", {"name_or_path": str(models["umt5"])}, good)


@pytest.mark.parametrize("kind", ["hash", "hf", "ltx2"])
def test_a_damaged_note_of_an_encoder_is_one_line(models, tmp_path, kind):
    folder = models["gemma3"].parent / "connectors 2.0"
    recipe = {
        "hash": TextEncoderConfig(dim=8, max_length=4),
        "hf": config(models["t5"]),
        "ltx2": config(models["gemma3"], type="ltx2", connectors=str(folder)),
    }[kind]
    build_text_encoder(recipe, seed=0).save(tmp_path)
    note = tmp_path / "text_encoder.json"
    good = json.loads(note.read_text())
    for key in good.keys() - {"type", "padding"}:
        note.write_text(json.dumps({name: value for name, value in good.items() if name != key}))
        with pytest.raises(UserError, match=f"text_encoder.json: {key} is missing"):
            load_text_encoder(tmp_path)
    for key in good.keys() - {"type"}:
        note.write_text(json.dumps(good | {key: ["float99"]}))
        with pytest.raises(UserError, match=rf"text_encoder.json: {key} is \('float99',\), expected"):
            load_text_encoder(tmp_path)
    if kind != "hash":
        note.write_text(json.dumps(good | {"dtype": "float99"}))
        with pytest.raises(UserError, match="dtype is 'float99', expected float32 or bfloat16 or int8"):
            load_text_encoder(tmp_path)


# --- 8-bit, cache, recipe -----------------------------------------------------------------------------------


def test_int8_says_what_is_missing(models, monkeypatch):
    recipe = config(models["t5"], dtype="int8")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"bitsandbytes.*motionloom\[int8\]"):
        build_text_encoder(recipe, seed=0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="needs a CUDA GPU"):
        build_text_encoder(recipe, seed=0)


@pytest.mark.parametrize("kind", ["zero", "attended", "ltx2"])
def test_cached_embeddings_are_the_encoders(models, tmp_path, kind):
    if kind == "ltx2":
        folder = models["gemma3"].parent / "connectors 2.3"
        text = config(models["gemma3"], type="ltx2", connectors=str(folder))
    else:
        text = config(models["t5"], padding=kind)
    recipe = Recipe(text_encoder=text)
    encoder = build_text_encoder(text, seed=0)
    assert cache_text(tmp_path, recipe, encoder, CAPTIONS, lambda done, total: None) == 3
    table = TextTable(open_table(tmp_path / TEXT))
    x_BLC, _ = encoder.encode(CAPTIONS)
    assert [len(x_LC) for x_LC in table.embed(CAPTIONS)] == [16, 16, 16]
    torch.testing.assert_close(torch.stack(table.embed(CAPTIONS)), x_BLC, rtol=1e-4, atol=1e-5)
    assert table.mismatches(recipe) == []
    assert table.verify() == []
    changed = {"connectors": ""} if kind == "ltx2" else {"padding": "hidden"}
    other = Recipe(text_encoder=text.model_copy(update=changed))
    assert len(table.mismatches(other)) == 1


@pytest.mark.parametrize(
    "values, words",
    [
        ({"type": "ltx2"}, "name_or_path is empty"),
        ({"type": "hf", "name_or_path": "x", "connectors": "y"}, "are for text_encoder.type ltx2"),
        ({"type": "ltx2", "name_or_path": "x", "padding": "zero"}, "is for text_encoder.type hf"),
    ],
)
def test_keys_that_are_not_read_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        Recipe(text_encoder=values)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("path", "no such folder; check the path"),
        ("nested path", "no such folder; check the path"),
        ("no encoder", "cannot be loaded"),
        ("no weights", "it holds no weights"),
        ("length", r"set text_encoder\.max_length=16"),
        ("connectors", "connectors: no such folder"),
        ("not gemma", "LTX-2 reads Gemma 3"),
    ],
)
def test_a_text_encoder_that_cannot_be_had_shows_before_the_first_clip(
    models, tmp_path, monkeypatch, case, said
):
    world = make_world(tmp_path / "clips", 1, height=16, width=16)
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKLWan"}')
    kind, length, name = "hf", 8, ""
    if case == "path":
        name = "models/nowhere"
    elif case == "nested path":
        name = "models/Wan/text_encoder"
    elif case == "no encoder":
        name = str(tmp_path / "vae")
    elif case == "no weights":
        name = str(
            shutil.copytree(models["t5"], tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
        )
    elif case == "length":
        name, length = str(save_model(tmp_path / "clip", "clip")), 77
    elif case == "connectors":
        kind, name = "ltx2", str(shutil.copytree(models["gemma3"], tmp_path / "alone" / "text_encoder"))
    else:
        kind, name = "ltx2", str(models["t5"])
    text = {"type": kind, "name_or_path": name, "max_length": length, "dtype": "float32"}
    started: list[str] = []
    with pytest.raises(UserError, match=said):
        build_cache(
            toy_recipe(text_encoder=text),
            world,
            tmp_path / "cache",
            on_progress=lambda what, done, total: started.append(what),
        )
    assert started == []
    assert not (tmp_path / "cache").exists()


def test_a_whole_pipeline_stands_for_its_text_encoder(models, tmp_path):
    shutil.copytree(models["t5"], tmp_path / "text_encoder")
    whole, part = (build_text_encoder(config(path), 0) for path in (tmp_path, tmp_path / "text_encoder"))
    assert whole.fingerprint() == part.fingerprint()
    whole.save(tmp_path / "saved")
    assert load_text_encoder(tmp_path / "saved").fingerprint() == part.fingerprint()
