"""Captions that differ little from a clip's own, as further wrong answers of a contrastive loss.

A batch of some dozen captions is told apart by what differs most, a colour, a background, and then nothing
asks for the rest. Captions that share most of their words differ in just that rest. They come without their
clips, so they cost a pass of the text tower alone. They are other clips' captions, where NegCLIP's hard
negatives (arXiv 2210.01936) are written anew.

Shapes: T captions that are known, B of the batch, L places of a text, P drawn to look among, V columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST = 1 << 16
"""Captions that are kept to draw from; of more, a part."""
LOOKED_AT = 4096
"""Captions that a step looks among."""
AMONG = 32
"""One is drawn of so many nearest: the very nearest may be another wording of the same."""
COLUMNS = 1024
"""Words are told apart by so many columns, whatever the vocabulary: two in one column are taken for alike."""


class NearCaptions:
    """Draws captions by the words that they share with others.

    Args:
        tokens_TL: all that are known, as the text tower reads them.
        generator: which of more than :data:`MOST` are kept.
    """

    def __init__(self, tokens_TL: Tensor, generator: torch.Generator) -> None:
        if len(tokens_TL) > MOST:
            tokens_TL = tokens_TL[torch.randperm(len(tokens_TL), generator=generator)[:MOST]]
        self._known_TL = tokens_TL

    def draw(self, own_BL: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """(B * count, L) captions near to each of the batch's; those of the first one first.

        None has exactly the words of the one that it is near to, while there are others.
        """
        order = torch.randperm(len(self._known_TL), generator=generator)[:LOOKED_AT]
        pool_PL = self._known_TL[order]
        near_BP = alike(own_BL, pool_PL)
        nearest = near_BP.masked_fill(near_BP == 1, -1).topk(min(AMONG, len(pool_PL)), dim=1).indices
        chance = torch.rand(len(own_BL), max(nearest.shape[1], count), generator=generator)
        picked = chance.argsort(dim=1)[:, :count] % nearest.shape[1]
        return pool_PL[nearest.gather(1, picked)].flatten(0, 1)


def alike(own_BL: Tensor, other_PL: Tensor) -> Tensor:
    """(B, P) words that two texts share, over all words of both (Jaccard); 1 where none differs."""
    own_BV, other_PV = _bags(own_BL), _bags(other_PL)
    shared = own_BV @ other_PV.T
    return shared / (own_BV.sum(dim=1)[:, None] + other_PV.sum(dim=1) - shared)


def _bags(tokens_BL: Tensor) -> Tensor:
    return torch.zeros(len(tokens_BL), COLUMNS).scatter_(1, tokens_BL % COLUMNS, 1.0)
