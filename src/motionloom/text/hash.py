"""Words by hash: a trainable text encoder that needs no download and no vocabulary file.

A caption is cut into words and punctuation; each becomes a row of a table by a hash that is the same on every
machine; a learned embedding of the word's place is added, so that order counts.

Shapes: B batch, L text tokens of one caption, C channels.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from motionloom.config.entries import entry
from motionloom.config.recipe import TextEncoderConfig
from motionloom.durable import write_tensors
from motionloom.errors import UserError
from motionloom.rng import torch_generator

PADDING, EMPTY = 0, 1
"""The two ids that no word can take: padding, and the one token of the empty caption."""
_FIRST_WORD = 2

# In scripts without spaces (kana, Han) each sign is a word; elsewhere a word is a run of letters.
_SIGN = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_SIGN}]|[^\W{_SIGN}]+|[^\w\s]")

# Words stand out from their places: the sum has deviation 1, four fifths of its variance from the word.
_WORD_STD, _PLACE_STD = 0.8**0.5, 0.2**0.5


def split_words(caption: str) -> list[str]:
    """Lowercased words and punctuation marks, in order."""
    return _WORD.findall(caption.lower())


class HashEncoder(nn.Module):
    """Word table plus place table. Its first state is drawn from ``seed`` alone: the same on every rank.

    Args:
        vocab_size: rows of the table; two words in one row cannot be told apart (see `collisions`).
        trainable: train the tables with the backbone; otherwise they stay as drawn.
    """

    def __init__(self, dim: int, vocab_size: int, max_length: int, *, seed: int, trainable: bool) -> None:
        super().__init__()
        if vocab_size <= _FIRST_WORD:
            raise UserError(
                f"text_encoder.vocab_size {vocab_size} leaves no row for words: set some thousands"
            )
        self.dim, self.vocab_size, self.max_length = dim, vocab_size, max_length
        self.seed, self.trainable = seed, trainable
        # Given their values, since a new embedding draws its own from the global generator.
        self.words = nn.Embedding(vocab_size, dim, _weight=torch.empty(vocab_size, dim))
        self.places = nn.Embedding(max_length, dim, _weight=torch.empty(max_length, dim))
        with torch.no_grad():
            self.words.weight.normal_(0, _WORD_STD, generator=torch_generator(seed, "text", "words"))
            self.places.weight.normal_(0, _PLACE_STD, generator=torch_generator(seed, "text", "places"))
        self.requires_grad_(trainable)

    def word_id(self, word: str) -> int:
        """The row of a word, equal on every machine and in every process (unlike Python's ``hash``)."""
        digest = hashlib.sha256(word.encode()).digest()
        return _FIRST_WORD + int.from_bytes(digest[:8], "big") % (self.vocab_size - _FIRST_WORD)

    def ids(self, captions: Sequence[str]) -> Tensor:
        """Captions -> ids (B, max_length), 0 where padded; words past ``max_length`` are cut."""
        ids_BL = torch.full((len(captions), self.max_length), PADDING)
        for row, caption in enumerate(captions):
            found = [self.word_id(word) for word in split_words(caption)[: self.max_length]] or [EMPTY]
            ids_BL[row, : len(found)] = torch.tensor(found)
        return ids_BL

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Captions -> embeddings (B, L, C), zero at padding, and validity (B, L); L = ``max_length``."""
        ids_BL = self.ids(captions).to(self.words.weight.device)
        return self(ids_BL), ids_BL != PADDING

    def forward(self, ids_BL: Tensor) -> Tensor:
        """Ids (B, L) -> embeddings (B, L, C), zero at padding."""
        places_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
        x_BLC = self.words(ids_BL) + self.places(places_L)
        return x_BLC * (ids_BL != PADDING)[..., None]

    def count_cut(self, captions: Sequence[str]) -> int:
        """How many captions are longer than ``max_length`` and lose their end."""
        return sum(len(split_words(caption)) > self.max_length for caption in captions)

    def collisions(self, captions: Iterable[str]) -> list[list[str]]:
        """Groups of different words of these captions that share a row, sorted; a larger table has fewer."""
        by_id: dict[int, set[str]] = {}
        for word in {word for caption in captions for word in split_words(caption)}:
            by_id.setdefault(self.word_id(word), set()).add(word)
        return sorted(sorted(words) for words in by_id.values() if len(words) > 1)

    def fingerprint(self) -> str:
        """Digest of what decides the first state of the tables; training does not change it."""
        return hashlib.sha256(json.dumps(self._settings(), sort_keys=True).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write ``text_encoder.json`` and the tables, ``text_encoder.safetensors``."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_tensors(folder / "text_encoder.safetensors", state)
        (folder / "text_encoder.json").write_text(json.dumps(self._settings(), indent=2) + "\n")

    def _settings(self) -> dict[str, object]:
        names = ("dim", "vocab_size", "max_length", "seed", "trainable")
        return {"type": "hash", **{name: getattr(self, name) for name in names}}


def check(config: TextEncoderConfig) -> int:
    """Channels of a recipe's encoder, which can always be had."""
    return config.dim


def build(config: TextEncoderConfig, seed: int) -> HashEncoder:
    """A new encoder for a recipe."""
    return HashEncoder(
        config.dim, config.vocab_size, config.max_length, seed=seed, trainable=config.trainable
    )


def load(folder: Path, settings: dict[str, object]) -> HashEncoder:
    """The encoder that `HashEncoder.save` wrote.

    Raises:
        UserError: an entry is missing or wrong; the tables are missing, damaged or of another size.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file, note = folder / "text_encoder.safetensors", str(folder / "text_encoder.json")
    dim, rows, length = (entry(settings, key, int, note) for key in ("dim", "vocab_size", "max_length"))
    seed = entry(settings, "seed", int, note, zero=True)
    encoder = HashEncoder(dim, rows, length, seed=seed, trainable=entry(settings, "trainable", bool, note))
    try:
        encoder.load_state_dict(load_file(file))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(
            f"{file}: is not the table that text_encoder.json describes ({error}); copy the folder whole"
        ) from error
    return encoder
