"""Which words a caption has, told from its clip: classification with captions in the place of labels
(SuperClass, arXiv 2411.03313).

Contrast has to learn at once what a word means and what it looks like, and stands still for long where both
are unknown. Here the words are the classes, so that what they look like is learned by itself.

Shapes: B clips, L places of a text, D width of the encoder, V words, T captions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motionloom.nn.init import fill


class BagOfWords(nn.Module):
    """A linear map from a clip's feature to words, and the loss of it.

    A word counts for log(T / captions that have it), so that one that all have counts for nothing; the words
    of a caption share 1. That is the paper's weight, but for its 1 + in the denominator.

    Args:
        known_TL: captions of training, as the text tower reads them, padded with zeros.
    """

    weight_V: Tensor

    def __init__(self, width: int, known_TL: Tensor, size: int, generator: torch.Generator) -> None:
        super().__init__()
        self.to_words = nn.Linear(width, size)
        self.init_weights(generator)
        # Each word once for each caption that has it, and no table of all captions by all words.
        sorted_TL = known_TL.sort(dim=1).values
        first_TL = torch.ones_like(sorted_TL, dtype=torch.bool)
        first_TL[:, 1:] = sorted_TL[:, 1:] != sorted_TL[:, :-1]
        captions_V = sorted_TL[first_TL].bincount(minlength=size)
        self.register_buffer("weight_V", (len(known_TL) / captions_V.clamp_min(1)).log())

    def init_weights(self, generator: torch.Generator) -> None:
        """Not 0, from where nothing leads on to what is hard to see: the map waits for features that tell a
        word, and these for a map that asks for them."""
        width = self.to_words.in_features
        self.to_words.weight.data.normal_(std=width**-0.5, generator=generator)
        fill(0.0, self.to_words.bias)

    def forward(self, feature_BD: Tensor, tokens_BL: Tensor) -> Tensor:
        """(B,) cross-entropy with the words of each caption, float32; 0 where it has none that tells."""
        wanted_BV = _has(tokens_BL, len(self.weight_V)) * self.weight_V
        wanted_BV = wanted_BV / wanted_BV.sum(dim=1, keepdim=True).clamp_min(1e-6)
        return -(wanted_BV * F.log_softmax(self.to_words(feature_BD).float(), dim=-1)).sum(dim=1)


def _has(tokens_BL: Tensor, size: int) -> Tensor:
    """(B, V) 1 where a text has a word. What fills short texts up is in all of them, or is no word."""
    return torch.zeros(len(tokens_BL), size, device=tokens_BL.device).scatter_(1, tokens_BL, 1.0)
