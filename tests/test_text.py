"""Text encoders: every member through the protocol, then what is particular to each."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from motionloom.config.recipe import TextEncoderConfig
from motionloom.errors import UserError
from motionloom.text import build_text_encoder, encode_scenes, load_text_encoder
from motionloom.text.hash import HashEncoder, split_words

CAPTIONS = ["a red circle moves left", "", "a cat"]
WORDS = ["a", "red", "blue", "circle", "square", "moves", "left", "right", "cat", "and", "the", "of", "sky"]

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {**TINY, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 32, "max_position_embeddings": 64}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 32}
CLIP = {**TINY, "vocab_size": 32, "max_position_embeddings": 16, "bos_token_id": 2, "eos_token_id": 1}
VISION = {**TINY, "image_size": 8, "patch_size": 4}
ARCHITECTURES = {
    "t5": ("T5", T5),
    "umt5": ("UMT5", T5),
    "clip": ("CLIP", {"text_config": CLIP, "vision_config": VISION, "projection_dim": 16}),
    "gemma": ("Gemma", DECODER),
    "gemma3": ("Gemma3", {"text_config": {**DECODER, "sliding_window": 4}, "vision_config": VISION}),
    "qwen2": ("Qwen2", DECODER),
    "qwen3": ("Qwen3", DECODER),
}


def save_tokenizer(folder: Path, *, start: bool, end: bool, side: str) -> None:
    """A word-level tokenizer over `WORDS`, with or without start and end tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if start or end:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{'<s> ' if start else ''}$A{' </s>' if end else ''}",
            special_tokens=[("<s>", 2), ("</s>", 1)],
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side=side,
        **({"bos_token": "<s>"} if start else {}),
    ).save_pretrained(folder)


def save_model(folder: Path, kind: str, seed: int = 0) -> Path:
    """A tiny random model of an architecture, whole as its makers publish it, with its tokenizer."""
    import transformers

    name, settings = ARCHITECTURES[kind]
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    nested = {"text_config"} <= settings.keys()
    config = getattr(transformers, f"{name}Config")(**settings, **({} if nested else special))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        whole = {"t5": "ForConditionalGeneration", "umt5": "ForConditionalGeneration"}.get(kind, "Model")
        getattr(transformers, name + whole)(config).save_pretrained(folder)
    start, end = kind in ("clip", "gemma", "gemma3"), kind in ("t5", "umt5", "clip")
    save_tokenizer(folder, start=start, end=end, side="left" if "gemma" in kind else "right")
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: save_model(root / kind, kind) for kind in ARCHITECTURES}


def hf(path: Path, **settings) -> TextEncoderConfig:
    values = {"type": "hf", "name_or_path": str(path), "max_length": 8, "dtype": "float32"}
    return TextEncoderConfig(**{**values, **settings})


def build(kind: str, models: dict[str, Path], **settings):
    if kind == "hash":
        return build_text_encoder(TextEncoderConfig(dim=16, max_length=8, **settings), seed=3)
    return build_text_encoder(hf(models[kind], **settings), seed=3)


@pytest.mark.parametrize("kind", ["hash", *ARCHITECTURES])
def test_protocol(kind: str, models: dict[str, Path], tmp_path: Path) -> None:
    encoder = build(kind, models)
    x_BLC, valid_BL = encoder.encode(CAPTIONS)
    assert x_BLC.shape == (3, 8, encoder.dim)
    assert valid_BL.dtype == torch.bool
    assert valid_BL.any(dim=1).all(), "the empty caption needs a valid token as well"
    lengths_B = valid_BL.sum(dim=1, keepdim=True)
    assert torch.equal(valid_BL, torch.arange(8)[None] < lengths_B), "valid tokens stand first"
    assert (x_BLC[~valid_BL] == 0).all()
    assert x_BLC[valid_BL].isfinite().all()
    assert len({tuple(x_BLC[i].flatten().tolist()) for i in range(3)}) == 3

    # A caption's embedding is its own: neither its neighbours nor the padding they force reach it.
    for caption, x_LC, valid_L in zip(CAPTIONS, x_BLC, valid_BL, strict=True):
        alone_1LC, _ = encoder.encode([caption])
        torch.testing.assert_close(alone_1LC[0][valid_L], x_LC[valid_L], rtol=1e-4, atol=1e-5)

    encoder.save(tmp_path / "text")
    again = load_text_encoder(tmp_path / "text")
    assert again.fingerprint() == encoder.fingerprint()
    torch.testing.assert_close(again.encode(CAPTIONS)[0], x_BLC, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["hash", "t5", "clip", "qwen3"])
def test_order_counts_and_long_captions_are_cut(kind: str, models: dict[str, Path]) -> None:
    encoder = build(kind, models)
    x_BLC, valid_BL = encoder.encode(["red and blue", "blue and red"])
    assert (x_BLC[0] - x_BLC[1])[valid_BL[0]].abs().max() > 1e-3
    long = " ".join(["red"] * 50)
    assert encoder.encode([long])[1].sum() == 8
    assert encoder.count_cut([long, "red", ""]) == 1
    assert encoder.count_cut([]) == 0


def test_tokens_of_a_caption_do_not_see_padding_ids(models: dict[str, Path]) -> None:
    for kind in ARCHITECTURES:
        encoder = build(kind, models)
        before, valid_BL = encoder.encode(CAPTIONS)
        encoder.tokenizer.pad_token_id = None
        encoder.tokenizer.bos_token_id = encoder.tokenizer.eos_token_id = 7
        after, _ = encoder.encode(CAPTIONS)
        same = valid_BL.clone()
        same[1] = False  # where the empty caption has no token of its own, the blank is its content
        torch.testing.assert_close(after[same], before[same], rtol=0, atol=0)


def test_only_the_text_part_is_kept(models: dict[str, Path]) -> None:
    names = {kind: type(build(kind, models).model).__name__ for kind in ARCHITECTURES}
    assert names == {
        "t5": "T5EncoderModel",
        "umt5": "UMT5EncoderModel",
        "clip": "CLIPTextModel",
        "gemma": "GemmaModel",
        "gemma3": "Gemma3TextModel",
        "qwen2": "Qwen2Model",
        "qwen3": "Qwen3Model",
    }


def test_text_part_has_the_saved_weights(models: dict[str, Path]) -> None:
    """A part read under wrong names would be silently random."""
    for kind in ARCHITECTURES:
        saved = load_file(models[kind] / "model.safetensors")
        for name, tensor in build(kind, models).model.state_dict().items():
            if "position_ids" in name or tensor.numel() < 32:
                continue
            assert any(t.shape == tensor.shape and torch.equal(t, tensor) for t in saved.values()), (
                kind,
                name,
            )


def test_frozen_and_in_the_dtype_asked_for(models: dict[str, Path]) -> None:
    encoder = build("qwen3", models, dtype="bfloat16")
    x_BLC, _ = encoder.encode(CAPTIONS)
    assert x_BLC.dtype == torch.bfloat16
    assert not x_BLC.requires_grad
    assert not encoder.trainable
    assert not any(p.requires_grad for p in encoder.model.parameters())
    assert not encoder.model.training


def test_hf_fingerprint_follows_the_content_not_the_place(models: dict[str, Path], tmp_path: Path) -> None:
    first = build_text_encoder(hf(models["t5"]), 0).fingerprint()
    moved = shutil.copytree(models["t5"], tmp_path / "moved")
    assert build_text_encoder(hf(moved), 0).fingerprint() == first
    assert build_text_encoder(hf(models["t5"], max_length=9), 0).fingerprint() != first
    other = save_model(tmp_path / "other", "t5", seed=1)
    assert build_text_encoder(hf(other), 0).fingerprint() != first


def test_saved_hf_encoder_refuses_changed_weights(models: dict[str, Path], tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "qwen2")
    build_text_encoder(hf(folder), 0).save(tmp_path / "text")
    save_model(folder, "qwen2", seed=1)
    with pytest.raises(UserError, match="is not the text encoder that"):
        load_text_encoder(tmp_path / "text")


def test_hf_mistakes_are_one_clear_line(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        build_text_encoder(hf(tmp_path / "nothing"), 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot be loaded"):
        build_text_encoder(hf(tmp_path / "empty"), 0)
    broken = save_model(tmp_path / "broken", "t5")
    (broken / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="cannot be loaded"):
        build_text_encoder(hf(broken), 0)
    without = shutil.copytree(models["gemma"], tmp_path / "without")
    weights = load_file(without / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layers.1" not in name}
    save_file(kept, without / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks weights of a GemmaModel"):
        build_text_encoder(hf(without), 0)
    with pytest.raises(UserError, match=r"set text_encoder\.max_length=16"):
        build_text_encoder(hf(models["clip"], max_length=77), 0)


def test_a_hub_that_cannot_be_reached_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="motionloom-tests/no-such-model: cannot be loaded"):
        build_text_encoder(hf(Path("motionloom-tests/no-such-model")), 0)


def test_missing_transformers_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'motionloom\[hf\]'"):
        build_text_encoder(hf(Path("any")), 0)


def test_words() -> None:
    assert split_words("A red ball, moving LEFT!") == ["a", "red", "ball", ",", "moving", "left", "!"]
    assert split_words("Äpfel 两只猫 🦊") == ["äpfel", "两", "只", "猫", "🦊"]
    assert split_words(" \n") == []


def test_hash_ids_are_the_same_everywhere() -> None:
    encoder = HashEncoder(4, 4096, 4, seed=0, trainable=True)
    ids = encoder.ids(["a red ball", ""])
    assert ids.tolist() == [[2050, 1757, 2737, 0], [1, 0, 0, 0]]
    code = (
        "from motionloom.text.hash import HashEncoder;"
        "print(HashEncoder(4, 4096, 4, seed=0, trainable=True).ids(['a red ball'])[0].tolist())"
    )
    env = {"PYTHONHASHSEED": "12345", "OMP_NUM_THREADS": "1"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert out.stdout.strip() == str(ids[0].tolist())


def test_hash_first_state_follows_the_seed_alone() -> None:
    config = TextEncoderConfig(dim=16, max_length=4)
    torch.manual_seed(1)
    first = build_text_encoder(config, 5)
    torch.manual_seed(2)
    second, other = build_text_encoder(config, 5), build_text_encoder(config, 6)
    assert torch.equal(first.encode(["a b"])[0], second.encode(["a b"])[0])
    assert not torch.equal(first.encode(["a b"])[0], other.encode(["a b"])[0])
    assert first.fingerprint() == second.fingerprint() != other.fingerprint()
    x_LC = build_text_encoder(TextEncoderConfig(dim=512, max_length=16), 0).encode(["w " * 16])[0][0]
    assert x_LC.std().item() == pytest.approx(1.0, abs=0.1), "the backbone's input has scale 1"


def test_hash_trains_when_asked_to() -> None:
    encoder = build_text_encoder(TextEncoderConfig(dim=8, max_length=4), 0)
    assert encoder.trainable
    encoder.encode(["red"])[0].sum().backward()
    touched = encoder.words.weight.grad.abs().sum(dim=1).nonzero().flatten().tolist()
    assert touched == [encoder.word_id("red")], "padding and other words get no gradient"
    frozen = build_text_encoder(TextEncoderConfig(dim=8, max_length=4, trainable=False), 0)
    assert not frozen.trainable
    assert not any(p.requires_grad for p in frozen.parameters())


def test_trained_hash_table_survives_saving(tmp_path: Path) -> None:
    encoder = build_text_encoder(TextEncoderConfig(dim=8, max_length=4), 0)
    with torch.no_grad():
        encoder.words.weight += 1
    encoder.save(tmp_path)
    assert torch.equal(load_text_encoder(tmp_path).encode(["red"])[0], encoder.encode(["red"])[0])


def test_collisions_are_found() -> None:
    encoder = HashEncoder(4, 12, 8, seed=0, trainable=True)
    groups = encoder.collisions([" ".join(WORDS)])
    assert groups
    for group in groups:
        assert len({encoder.word_id(word) for word in group}) == 1
    shared = sum(len(group) - 1 for group in groups)
    assert shared == len(WORDS) - len({encoder.word_id(word) for word in WORDS})
    assert HashEncoder(4, 65536, 8, seed=0, trainable=True).collisions([" ".join(WORDS)]) == []


def test_bad_folders_and_settings(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no text encoder's"):
        load_text_encoder(tmp_path)
    (tmp_path / "text_encoder.json").write_text('{"type": "magic"}')
    with pytest.raises(UserError, match="no text encoder's"):
        load_text_encoder(tmp_path)
    build_text_encoder(TextEncoderConfig(dim=8, max_length=4), 0).save(tmp_path)
    (tmp_path / "text_encoder.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match="is not the table"):
        load_text_encoder(tmp_path)
    with pytest.raises(UserError, match="vocab_size 2"):
        build_text_encoder(TextEncoderConfig(dim=8, vocab_size=2), 0)


def test_scenes_lie_end_to_end() -> None:
    encoder = build_text_encoder(TextEncoderConfig(dim=8, max_length=4), 0)
    text = encode_scenes(encoder, [["a b", "c"], ["d"]])
    assert text.x_BLC.shape == (2, 8, 8)
    assert text.scene_BL.tolist() == [[0] * 4 + [1] * 4]
    assert text.valid_BL.tolist() == [
        [True, True, False, False, True, False, False, False],
        [True, False, False, False, False, False, False, False],
    ]
