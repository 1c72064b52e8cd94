"""Contrast: a picture and its own words come closer than any others of the batch, on all ranks together.

Shapes: B samples of this rank, W ranks, E numbers of an embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from motionloom.errors import UserError
from motionloom.parallel import Ranks
from motionloom.parallel.gather import gather

ALONE = Ranks()
INFO_NCE_SCALE = math.log(1 / 0.07)
"""Where the logit scale begins (CLIP, arXiv 2103.00020)."""
SIGMOID_SCALE, SIGMOID_BIAS = math.log(10), -10.0
"""Where scale and bias of the sigmoid loss begin (arXiv 2303.15343, sec. 3.2)."""
MOST_SCALE = math.log(100)
_ODD = 0x1E3779B97F4A7C15
"""Spreads small numbers over 64 bits."""


@dataclass(frozen=True)
class Others:
    """What else is known of the texts that a picture is told apart from."""

    near_NE: Tensor | None = None
    """Texts without a picture, not normalised, equally many on every rank: further wrong answers."""
    same_BA: Tensor | None = None
    """(B, W * (B + N)): True where a text says the same as the picture's own, so that it is neither right nor
    wrong: all ranks' texts, then all those without a picture. Its own text counts whatever stands there."""

    @staticmethod
    def of(tokens_BL: Tensor, near_NL: Tensor | None, near_NE: Tensor | None, ranks: Ranks = ALONE) -> Others:
        """From the texts themselves."""
        own_B = _number(tokens_BL)
        all_A = gather(own_B, ranks)
        if near_NL is not None:
            all_A = torch.cat([all_A, gather(_number(near_NL), ranks)])
        return Others(near_NE, own_B[:, None] == all_A)


NOTHING_ELSE = Others()


def info_nce(
    image_BE: Tensor,
    text_BE: Tensor,
    logit_scale: Tensor,
    ranks: Ranks = ALONE,
    others: Others = NOTHING_ELSE,
) -> Tensor:
    """Symmetric softmax contrast (CLIP, arXiv 2103.00020, fig. 3).

    Args:
        image_BE, text_BE: pairs, not normalised; equally many on every rank.
        logit_scale: scalar, the logarithm of what cosines are multiplied by.
        ranks: whose batches are joined.
        others: texts that are no answer, and further ones.

    Returns:
        (B,) mean of the two cross-entropies of each pair, float32. The average over ranks of its mean, and of
        that mean's gradient, is that of one process with the joined batch.

    Raises:
        UserError: the joined batch has one sample.
    """
    _require_company(image_BE, text_BE, ranks)
    with _float32(image_BE):
        image_BE, text_BE = _unit(image_BE), _unit(text_BE)
        scale = logit_scale.float().exp()
        own_B = torch.arange(len(image_BE), device=image_BE.device) + ranks.rank * len(image_BE)
        asked_BA = _asked(own_B, others, ranks)
        texts = scale * image_BE @ _all_texts(text_BE, others, ranks).T
        images = scale * text_BE @ gather(image_BE, ranks).T
        if asked_BA is not None:
            texts = texts.masked_fill(~asked_BA, float("-inf"))
            images = images.masked_fill(~asked_BA[:, : images.shape[1]], float("-inf"))
        to_text = F.cross_entropy(texts, own_B, reduction="none")
        to_image = F.cross_entropy(images, own_B, reduction="none")
        return (to_text + to_image) / 2


def sigmoid(
    image_BE: Tensor,
    text_BE: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    ranks: Ranks = ALONE,
    others: Others = NOTHING_ELSE,
) -> Tensor:
    """Every pair of the batch is a yes-or-no question of its own (SigLIP, arXiv 2303.15343, sec. 3.2).

    Arguments, result and errors are those of :func:`info_nce`; ``logit_bias``: scalar, added to the logits.
    """
    _require_company(image_BE, text_BE, ranks)
    with _float32(image_BE):
        text_AE = _all_texts(_unit(text_BE), others, ranks)
        logits_BA = logit_scale.float().exp() * _unit(image_BE) @ text_AE.T + logit_bias.float()
        own_B = torch.arange(len(image_BE), device=image_BE.device) + ranks.rank * len(image_BE)
        # +1 where the words are the picture's own, -1 elsewhere.
        sign_BA = 2 * F.one_hot(own_B, len(text_AE)) - 1
        lost_BA = -F.logsigmoid(sign_BA * logits_BA)
        asked_BA = _asked(own_B, others, ranks)
        return (lost_BA if asked_BA is None else lost_BA * asked_BA).sum(dim=1)


@torch.no_grad()
def clamp_scale_(logit_scale: Tensor) -> Tensor:
    """Hold a logit scale within 0 .. ln 100, in place: after every step (CLIP, sec. 2.5; OpenCLIP)."""
    return logit_scale.clamp_(0, MOST_SCALE)


def embed_in_chunks(
    encode: Callable[[int], tuple[Tensor, ...]], chunks: int, parameters: Iterable[nn.Parameter]
) -> tuple[Tensor, ...]:
    """Embeddings of a batch whose activations would not fit into memory (GradCache, arXiv 2101.06983).

    All chunks are embedded without a graph. A loss of the embeddings, gathered over ranks or not, gives their
    gradients; with them each chunk is embedded again, with a graph, and passed backwards, one at a time. The
    gradients of ``parameters`` arrive where autograd expects them, so DDP averages them as any others.

    Args:
        encode: embeddings of the n-th chunk, of images, texts and what else there is, (b, E) each. Called
            twice for each: what it draws must be keyed by the chunk.
        chunks: how many there are.
        parameters: everything that ``encode`` trains. What is not named here gets no gradient.

    Returns:
        The embeddings (B, E) of all chunks in order, each kind by itself.

    Raises:
        UserError: a parameter is cut over ranks (FSDP), whose whole weights exist in a forward pass alone.
    """
    trained = [p for p in parameters if p.requires_grad]
    if any(isinstance(p, DTensor) for p in trained):
        raise UserError(
            "contrast in chunks does not work with weights that are cut over ranks: set train.sharding=ddp, "
            "or embed the batch in one chunk"
        )
    joined: tuple[Tensor, ...] = _Chunked.apply(encode, chunks, *trained)
    return joined


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, encode: Callable[[int], tuple[Tensor, ...]], chunks: int, *trained: Tensor
    ) -> tuple[Tensor, ...]:
        # The second pass is run by the backward, which is called outside of autocast.
        kind = trained[0].device.type if trained else "cpu"
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        ctx.precision = lambda: torch.autocast(kind, dtype=dtype, enabled=enabled)
        parts = [encode(n) for n in range(chunks)]
        ctx.encode, ctx.trained = encode, trained
        kinds = list(zip(*parts, strict=True))
        ctx.sizes = [[len(part) for part in kind] for kind in kinds]
        return tuple(torch.cat(kind) for kind in kinds)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None] * len(ctx.trained)
        cuts = zip(*(grad.split(sizes) for grad, sizes in zip(grads, ctx.sizes, strict=True)), strict=True)
        for n, cut in enumerate(cuts):
            with torch.enable_grad(), ctx.precision():
                embedded = ctx.encode(n)
            learned = [(e, g) for e, g in zip(embedded, cut, strict=True) if e.requires_grad]
            parts = torch.autograd.grad(
                [e for e, _ in learned], ctx.trained, [g for _, g in learned], allow_unused=True
            )
            for i, part in enumerate(parts):
                if part is not None:
                    so_far = found[i]
                    found[i] = part if so_far is None else so_far + part
        return None, None, *found


def _number(tokens_BL: Tensor) -> Tensor:
    """A number of 64 bits for each text, so that two are compared in one step and not word by word, which for
    batches of thousands would fill the memory. Products wrap around."""
    weight_L = torch.arange(1, tokens_BL.shape[1] + 1, device=tokens_BL.device) * _ODD
    return ((tokens_BL + 1) * (weight_L ^ (weight_L >> 29)) * _ODD).sum(dim=1)


def _all_texts(text_BE: Tensor, others: Others, ranks: Ranks) -> Tensor:
    """Those of all ranks, and behind them those without a picture."""
    text_AE = gather(text_BE, ranks)
    if others.near_NE is None:
        return text_AE
    return torch.cat([text_AE, gather(_unit(others.near_NE), ranks)])


def _asked(own_B: Tensor, others: Others, ranks: Ranks) -> Tensor | None:
    """(B, A) where a text is right or wrong; None: all are."""
    if others.same_BA is None:
        return None
    return ~others.same_BA | F.one_hot(own_B, others.same_BA.shape[1]).bool()


def _require_company(image_BE: Tensor, text_BE: Tensor, ranks: Ranks) -> None:
    assert image_BE.shape == text_BE.shape, (image_BE.shape, text_BE.shape)
    if len(image_BE) * ranks.world < 2:
        raise UserError(
            "contrast: a batch of one sample has nothing to be told apart from; raise train.batch_size to 2 "
            "or more, or turn the contrastive loss off"
        )


def _unit(x_BE: Tensor) -> Tensor:
    return F.normalize(x_BE.float(), dim=-1)


def _float32(x: Tensor) -> AbstractContextManager[None]:
    """Logits of up to 100 must not be rounded to bfloat16, which autocast would do to their product."""
    return torch.autocast(x.device.type, enabled=False)
