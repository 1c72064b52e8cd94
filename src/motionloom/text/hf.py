"""Frozen language models from Hugging Face as text encoders: T5 and kin, CLIP text, Gemma, Qwen and others.

Each architecture gets the class that is only its text part: the encoder stack of an encoder-decoder, the text
tower of CLIP, the language model inside a multimodal one. The embedding is the last hidden state.

Shapes: B batch, L text tokens of one caption, C channels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from motionloom.config.recipe import TextEncoderConfig
from motionloom.errors import UserError

_TEXT_PART = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
}
"""Architectures whose text part loads alone; of all others the whole model is read and the rest let go."""


class HFEncoder:
    """A frozen language model, read from a local folder or by hub name. Code from the hub is never run.

    Args:
        dtype: of weights and embeddings.
        max_length: in the model's tokens; longer captions are cut (see `count_cut`).

    Raises:
        UserError: transformers is missing, the model cannot be had, or it cannot hold ``max_length``.
    """

    trainable = False

    def __init__(self, name_or_path: str, max_length: int, dtype: torch.dtype) -> None:
        self.name_or_path, self.max_length, self.dtype = name_or_path, max_length, dtype
        self.tokenizer, self.model = _read(name_or_path)
        self.model = self.model.eval().requires_grad_(False).to(dtype)
        # Left padding would shift the positions of short captions; the cache keeps the valid ones, a prefix.
        self.tokenizer.padding_side = self.tokenizer.truncation_side = "right"
        config = self.model.config
        self.dim: int = getattr(config, "hidden_size", None) or config.d_model
        # T5 has relative positions and no such limit.
        longest = getattr(config, "max_position_embeddings", None) or max_length
        if max_length > longest:
            raise UserError(
                f"text_encoder.max_length {max_length} is more than the {longest} tokens that {name_or_path} "
                f"can read: set text_encoder.max_length={longest}"
            )

    def to(self, device: torch.device | str) -> HFEncoder:
        """Move the model; embeddings then come on that device."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Captions -> last hidden states (B, L, C), zero at padding, and validity (B, L); L = ``max_length``.

        Valid tokens come first. A caption without any token (many decoders have no start token) becomes one
        start, end or padding token, whichever the model has.
        """
        tokens = [ids[: self.max_length] or [self._blank()] for ids in self._tokens(captions, cut=True)]
        longest = max(map(len, tokens))
        ids_BL = torch.full((len(tokens), longest), self._blank())
        valid_BL = torch.zeros(len(tokens), longest, dtype=torch.bool)
        for row, ids in enumerate(tokens):
            ids_BL[row, : len(ids)] = torch.tensor(ids)
            valid_BL[row, : len(ids)] = True
        device = next(self.model.parameters()).device
        ids_BL, valid_BL = ids_BL.to(device), valid_BL.to(device)
        out = self.model(input_ids=ids_BL, attention_mask=valid_BL.long())
        x_BLC = torch.where(valid_BL[..., None], out.last_hidden_state, 0).to(self.dtype)
        after = self.max_length - longest
        return torch.nn.functional.pad(x_BLC, (0, 0, 0, after)), torch.nn.functional.pad(valid_BL, (0, after))

    def count_cut(self, captions: Sequence[str]) -> int:
        """How many captions are longer than ``max_length`` tokens and lose their end."""
        return sum(len(ids) > self.max_length for ids in self._tokens(captions, cut=False))

    def fingerprint(self) -> str:
        """SHA-256 over the weights as used, the tokenizer and the settings, wherever the files lie."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()))
        digest.update(json.dumps(self.tokenizer.get_vocab(), sort_keys=True).encode())
        # A probe covers what the vocabulary does not say: merges, normalisation, start and end tokens.
        probe = ["", "A red circle, moving left; 3 Äpfel & 两只猫."]
        digest.update(json.dumps([self.max_length, self._tokens(probe, cut=True)]).encode())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write ``text_encoder.json``: which model, and its fingerprint. The weights stay where they are."""
        folder.mkdir(parents=True, exist_ok=True)
        local = Path(self.name_or_path)
        settings = {
            "type": "hf",
            "name_or_path": str(local.resolve()) if local.is_dir() else self.name_or_path,
            "max_length": self.max_length,
            "dtype": str(self.dtype).removeprefix("torch."),
            "fingerprint": self.fingerprint(),
        }
        (folder / "text_encoder.json").write_text(json.dumps(settings, indent=2) + "\n")

    def _tokens(self, captions: Sequence[str], *, cut: bool) -> list[list[int]]:
        if not captions:
            return []
        length = {"truncation": True, "max_length": self.max_length} if cut else {"truncation": False}
        return self.tokenizer(list(captions), padding=False, verbose=False, **length)["input_ids"]

    def _blank(self) -> int:
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        return next((i for n in names if (i := getattr(self.tokenizer, n)) is not None), 0)


def _read(name: str) -> tuple[Any, Any]:
    """Tokenizer and text model of a folder or hub name; every failure is one clear line."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            "text_encoder.type hf needs transformers, which is not installed: pip install 'motionloom[hf]'"
        ) from error
    local = Path(name)
    if (local.is_absolute() or name.startswith(".")) and not local.is_dir():
        raise UserError(f"text_encoder.name_or_path {name}: no such folder; check the path")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        alone = _TEXT_PART.get(config.model_type)
        if alone == "CLIPTextModel":
            config = getattr(config, "text_config", config)
        loader = getattr(transformers, alone or "AutoModel")
        with _quiet():
            model, read = loader.from_pretrained(name, config=config, output_loading_info=True)
    except Exception as error:  # missing, damaged, gated, unknown: a library's failures are of every kind
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"text_encoder.name_or_path {name}: cannot be loaded ({reason}); name a folder with config.json, "
            "tokenizer and safetensors, or a hub model that this machine can reach"
        ) from error
    if missing := sorted(read["missing_keys"]):
        raise UserError(
            f"text_encoder.name_or_path {name}: lacks weights of a {type(model).__name__} ({missing[0]} and "
            f"{len(missing) - 1} more), which would be left random; name the folder of a whole model"
        )
    return tokenizer, model if alone else _text_part(model)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from drawing bars and from listing the weights that are left out on purpose."""
    from transformers.utils import logging

    before, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bar:
            logging.enable_progress_bar()


def _text_part(model: Any) -> Any:
    """The part of a whole model that reads text."""
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    for name in ("language_model", "text_model"):
        if isinstance(part := getattr(model, name, None), torch.nn.Module):
            return part
    return model


def build(config: TextEncoderConfig, seed: int) -> HFEncoder:
    """The encoder that a recipe names; frozen, so ``seed`` decides nothing."""
    return HFEncoder(config.name_or_path, config.max_length, getattr(torch, config.dtype))


def load(folder: Path, settings: dict[str, Any]) -> HFEncoder:
    """The encoder that `HFEncoder.save` named.

    Raises:
        UserError: the model is gone, or is no longer the one that was saved.
    """
    name, note = settings["name_or_path"], folder / "text_encoder.json"
    encoder = HFEncoder(name, settings["max_length"], getattr(torch, settings["dtype"]))
    if encoder.fingerprint() != settings["fingerprint"]:
        raise UserError(
            f"{name}: is not the text encoder that {note} was saved with (its weights or tokenizer changed); "
            "put the former model back, or correct name_or_path there"
        )
    return encoder
