"""Frozen language models from Hugging Face as text encoders: T5 and kin, CLIP text, Gemma, Qwen and others.

Each architecture gets the class that is only its text part: the encoder stack of an encoder-decoder, the text
tower of CLIP, the language model inside a multimodal one. The embedding is the last hidden state.

What becomes of padding differs in the field. Wan (UMT5-XXL, 512 tokens) cleans a caption, embeds it alone and
shows its backbone zeros behind it; CogVideoX (T5-XXL, 226 tokens) has the encoder read padding as words, and
the backbone see all of it. Backbones that know which tokens are valid need neither.

Shapes: B batch, L text tokens of one caption, C channels.
"""

from __future__ import annotations

import hashlib
import html
import importlib
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from motionloom.config.entries import entry
from motionloom.config.recipe import TextEncoderConfig
from motionloom.errors import UserError

Padding = Literal["hidden", "zero", "attended"]
DType = Literal["float32", "bfloat16", "int8"]

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
        dtype: of weights and embeddings; with ``int8`` (LLM.int8, 2208.07339) the weights of linear layers
            take half the room of bfloat16, in which all else is computed.
        max_length: in the model's tokens; longer captions are cut (see `count_cut`).
        padding: ``hidden``: it is not valid; ``zero``: it is, and zero, and captions are cleaned;
            ``attended``: it is embedded too.

    Raises:
        UserError: transformers is missing, the model cannot be had, it cannot hold ``max_length``, it has no
            padding to attend to, or int8 cannot be had here.
    """

    trainable = False

    def __init__(
        self,
        name_or_path: str,
        max_length: int,
        dtype: torch.dtype,
        padding: Padding = "hidden",
    ) -> None:
        self.name_or_path, self.max_length, self.padding = model_folder(name_or_path), max_length, padding
        self.weight_dtype = dtype
        self._fingerprint = ""
        self.dtype = torch.bfloat16 if dtype == torch.int8 else dtype
        opened = open_model(self.name_or_path, max_length, dtype, padding)
        self.tokenizer, self.model = opened.tokenizer, _weights(opened, dtype).eval().requires_grad_(False)
        # Left padding would shift the positions of short captions; the cache keeps the valid ones, a prefix.
        self.tokenizer.padding_side = self.tokenizer.truncation_side = "right"
        self.dim = _width(self.model.config)

    def to(self, device: torch.device | str) -> HFEncoder:
        """Move the model; embeddings then come on that device. An int8 model stays on its GPU."""
        if self.weight_dtype != torch.int8:
            self.model.to(device)
        return self

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Captions -> last hidden states (B, L, C), and validity (B, L); L = ``max_length``.

        The caption's tokens come first; see ``padding`` for what follows. A caption without any token (many
        decoders have no start token) becomes one start, end or padding token, whichever the model has.
        """
        if self.padding == "attended":
            return self._encode_all(captions)
        ids_BL, valid_BL = self.token_ids(captions)
        out = self.model(input_ids=ids_BL, attention_mask=valid_BL.long())
        x_BLC = torch.where(valid_BL[..., None], out.last_hidden_state, 0).to(self.dtype)
        after = self.max_length - x_BLC.shape[1]
        x_BLC, valid_BL = F.pad(x_BLC, (0, 0, 0, after)), F.pad(valid_BL, (0, after))
        return x_BLC, valid_BL | (self.padding == "zero")

    def token_ids(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids (B, l) on the model's device, and which are the caption's; l is the longest of them."""
        tokens = [ids[: self.max_length] or [self._blank()] for ids in self._tokens(captions, cut=True)]
        longest = max(map(len, tokens))
        ids_BL = torch.full((len(tokens), longest), self._blank())
        valid_BL = torch.zeros(len(tokens), longest, dtype=torch.bool)
        for row, ids in enumerate(tokens):
            ids_BL[row, : len(ids)] = torch.tensor(ids)
            valid_BL[row, : len(ids)] = True
        device = next(self.model.parameters()).device
        return ids_BL.to(device), valid_BL.to(device)

    def _encode_all(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Every row at full length, and no mask anywhere."""
        ids_BL, valid_BL = self.token_ids(captions)
        ids_BL = ids_BL.masked_fill(~valid_BL, self.tokenizer.pad_token_id)
        ids_BL = F.pad(ids_BL, (0, self.max_length - ids_BL.shape[1]), value=self.tokenizer.pad_token_id)
        x_BLC = self.model(input_ids=ids_BL).last_hidden_state.to(self.dtype)
        return x_BLC, torch.ones_like(ids_BL, dtype=torch.bool)

    def count_cut(self, captions: Sequence[str]) -> int:
        """How many captions are longer than ``max_length`` tokens and lose their end."""
        return sum(len(ids) > self.max_length for ids in self._tokens(captions, cut=False))

    def fingerprint(self) -> str:
        """SHA-256 over the weights as used, the tokenizer and the settings, wherever the files lie.

        Taken once: a frozen model of 10 GB would be read anew for every checkpoint that names it.
        """
        self._fingerprint = self._fingerprint or self._digest()
        return self._fingerprint

    def _digest(self) -> str:
        digest = hashlib.sha256()
        digest_weights(digest, self.model.state_dict())
        digest.update(json.dumps(self.tokenizer.get_vocab(), sort_keys=True).encode())
        # A probe covers what the vocabulary does not say: merges, normalisation, start and end tokens.
        probe = ["", "A red circle, moving left; 3 Äpfel & 两只猫."]
        digest.update(json.dumps([self.max_length, self._tokens(probe, cut=True)]).encode())
        if self.padding != "hidden":
            digest.update(self.padding.encode())
        if self.padding == "zero":
            digest.update(clean_caption("schÃ¶n &amp;amp;\n rot").encode())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write ``text_encoder.json``: which model, and its fingerprint. The weights stay where they are."""
        folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "type": "hf",
            "name_or_path": whole_path(self.name_or_path),
            "max_length": self.max_length,
            "dtype": str(self.weight_dtype).removeprefix("torch."),
            "padding": self.padding,
            "fingerprint": self.fingerprint(),
        }
        (folder / "text_encoder.json").write_text(json.dumps(settings, indent=2) + "\n")

    def _tokens(self, captions: Sequence[str], *, cut: bool) -> list[list[int]]:
        if not captions:
            return []
        if self.padding == "zero":
            captions = [clean_caption(caption) for caption in captions]
        length = {"truncation": True, "max_length": self.max_length} if cut else {"truncation": False}
        return self.tokenizer(list(captions), padding=False, verbose=False, **length)["input_ids"]

    def _blank(self) -> int:
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        return next((i for n in names if (i := getattr(self.tokenizer, n)) is not None), 0)


def clean_caption(caption: str) -> str:
    """A caption as Wan's pipeline has it: mended text, no HTML entities, single spaces.

    As there, mis-encoded text ("Ã¶" for "ö") is mended only where the ``ftfy`` package is installed.
    """
    if importlib.util.find_spec("ftfy") is not None:
        caption = importlib.import_module("ftfy").fix_text(caption)
    return " ".join(html.unescape(html.unescape(caption)).split())


def whole_path(name_or_path: str) -> str:
    """A folder's absolute path; a hub name stays."""
    local = Path(name_or_path)
    return str(local.resolve()) if local.is_dir() else name_or_path


def digest_weights(digest: hashlib._Hash, state: Mapping[str, Any]) -> None:
    """Take the names, shapes, dtypes and numbers of weights into a digest."""
    for name, tensor in sorted(state.items()):
        if isinstance(tensor, Tensor):  # quantised layers add names of their format
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


class Opened(NamedTuple):
    """What is known of a language model before its weights are read."""

    name: str
    config: Any
    """As transformers has it, of the whole model."""
    tokenizer: Any


def open_model(name: str, max_length: int, dtype: torch.dtype, padding: Padding = "hidden") -> Opened:
    """Config and tokenizer of a folder or hub name, which say whether the rest can go well.

    Raises:
        UserError: as `HFEncoder`, but for what only the weights can show.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            "text_encoder.type hf needs transformers, which is not installed: pip install 'motionloom[hf]'"
        ) from error
    local = Path(name)
    # A hub's name is OWNER/NAME at most.
    path_alone = local.is_absolute() or name.startswith((".", "~")) or len(local.parts) > 2
    if path_alone and not local.is_dir():
        raise UserError(f"text_encoder.name_or_path {name}: no such folder; check the path")
    if dtype == torch.int8:
        _int8()
    with _one_line(name):
        config = transformers.AutoConfig.from_pretrained(name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(_tokenizer_folder(name))
        if local.is_dir() and not any(local.glob("*.safetensors")) and not any(local.glob("*.bin")):
            raise OSError("it holds no weights")
    if padding == "attended" and tokenizer.pad_token_id is None:
        raise UserError(
            f"text_encoder.padding attended: the tokenizer of {name} has no padding token; set "
            "text_encoder.padding=hidden"
        )
    # T5 has relative positions and no such limit.
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or max_length
    if max_length > longest:
        raise UserError(
            f"text_encoder.max_length {max_length} is more than the {longest} tokens that {name} "
            f"can read: set text_encoder.max_length={longest}"
        )
    return Opened(name, config, tokenizer)


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Every failure inside is one clear line."""
    try:
        yield
    except Exception as error:  # missing, damaged, gated, unknown: a library's failures are of every kind
        local = Path(name)
        if len(local.parts) == 2 and local.parent.is_dir() and not local.is_dir():
            raise UserError(f"text_encoder.name_or_path {name}: no such folder; check the path") from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"text_encoder.name_or_path {name}: cannot be loaded ({reason}); name a folder with config.json, "
            "tokenizer and safetensors, or a hub model that this machine can reach"
        ) from error


def _weights(opened: Opened, dtype: torch.dtype) -> Any:
    """The text model."""
    import transformers

    name, config = opened.name, opened.config
    how = _int8() if dtype == torch.int8 else {"dtype": dtype}
    alone = _TEXT_PART.get(config.model_type)
    if alone == "CLIPTextModel":
        config = getattr(config, "text_config", config)
    loader = getattr(transformers, alone or "AutoModel")
    with _one_line(name), _quiet():
        model, read = loader.from_pretrained(name, config=config, output_loading_info=True, **how)
    if missing := sorted(read["missing_keys"]):
        raise UserError(
            f"text_encoder.name_or_path {name}: lacks weights of a {type(model).__name__} ({missing[0]} and "
            f"{len(missing) - 1} more), which would be left random; name the folder of a whole model"
        )
    model = model if alone else _text_part(model)
    # Some architectures keep a few layers wider than they were asked to.
    return model if dtype == torch.int8 else model.to(dtype)


def _width(config: Any) -> int:
    """Channels of the hidden states."""
    width: int = getattr(config, "hidden_size", None) or config.d_model
    return width


def model_folder(name_or_path: str) -> str:
    """The folder or hub name of the model; of a whole pipeline of diffusers its ``text_encoder``."""
    inside = Path(name_or_path) / "text_encoder"
    whole = not (inside.parent / "config.json").exists() and (inside / "config.json").exists()
    return str(inside) if whole else name_or_path


def _tokenizer_folder(name: str) -> str:
    """Where the tokenizer is: with the model or, in a folder of diffusers, beside it."""
    local = Path(name)
    beside = local.parent / "tokenizer"
    alone = local.is_dir() and not (local / "tokenizer_config.json").exists()
    return str(beside) if alone and (beside / "tokenizer_config.json").exists() else name


def _int8() -> dict[str, Any]:
    """How transformers is told to load 8-bit weights.

    Raises:
        UserError: bitsandbytes or a GPU is missing.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "text_encoder.dtype int8 needs bitsandbytes, which is not installed: pip install "
            "'motionloom[int8]', or set text_encoder.dtype=bfloat16"
        )
    if not torch.cuda.is_available():
        raise UserError(
            "text_encoder.dtype int8 needs a CUDA GPU, and there is none: set text_encoder.dtype=bfloat16"
        )
    from transformers import BitsAndBytesConfig

    return {
        "dtype": torch.bfloat16,
        "quantization_config": BitsAndBytesConfig(load_in_8bit=True),
        "device_map": {"": torch.cuda.current_device()},
    }


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


def describe(config: TextEncoderConfig) -> dict[str, Any]:
    """What `HFEncoder.save` writes of the encoder that a recipe names, but for its fingerprint."""
    return {
        "type": "hf",
        "name_or_path": whole_path(model_folder(config.name_or_path)),
        "max_length": config.max_length,
        "dtype": config.dtype,
        "padding": config.padding,
    }


def check(config: TextEncoderConfig) -> int:
    """Channels of the encoder that a recipe names, without reading its weights; raises what `build` would, as
    far as can be told so."""
    name = model_folder(config.name_or_path)
    opened = open_model(name, config.max_length, getattr(torch, config.dtype), config.padding)
    return _width(opened.config.get_text_config())


def build(config: TextEncoderConfig, seed: int) -> HFEncoder:
    """The encoder that a recipe names; frozen, so ``seed`` decides nothing."""
    return HFEncoder(config.name_or_path, config.max_length, getattr(torch, config.dtype), config.padding)


def load(folder: Path, settings: dict[str, Any]) -> HFEncoder:
    """The encoder that `HFEncoder.save` named.

    Raises:
        UserError: an entry is missing or wrong, the model is gone, or is no longer the one that was saved.
    """
    note = str(folder / "text_encoder.json")
    name = entry(settings, "name_or_path", str, note)
    length = entry(settings, "max_length", int, note)
    dtype = getattr(torch, entry(settings, "dtype", DType, note))
    padding = entry(settings, "padding", Padding, note, "hidden")
    fingerprint = entry(settings, "fingerprint", str, note)
    encoder = HFEncoder(name, length, dtype, padding)
    if encoder.fingerprint() != fingerprint:
        cleaned = ", or ftfy came or went" if padding == "zero" else ""
        raise UserError(
            f"{name}: is not the text encoder that {note} was saved with (its weights or tokenizer "
            f"changed{cleaned}); put the former back, or correct name_or_path there"
        )
    return encoder
