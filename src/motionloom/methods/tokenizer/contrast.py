"""Contrast: a picture and its own words come closer than any others of the batch, on all ranks together.

Shapes: B samples of this rank, W ranks, E numbers of an embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
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


def info_nce(image_BE: Tensor, text_BE: Tensor, logit_scale: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """Symmetric softmax contrast (CLIP, arXiv 2103.00020, fig. 3).

    Args:
        image_BE, text_BE: pairs, not normalised; equally many on every rank.
        logit_scale: scalar, the logarithm of what cosines are multiplied by.
        ranks: whose batches are joined.

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
        to_text = F.cross_entropy(scale * image_BE @ gather(text_BE, ranks).T, own_B, reduction="none")
        to_image = F.cross_entropy(scale * text_BE @ gather(image_BE, ranks).T, own_B, reduction="none")
        return (to_text + to_image) / 2


def sigmoid(
    image_BE: Tensor, text_BE: Tensor, logit_scale: Tensor, logit_bias: Tensor, ranks: Ranks = ALONE
) -> Tensor:
    """Every pair of the batch is a yes-or-no question of its own (SigLIP, arXiv 2303.15343, sec. 3.2).

    Arguments, result and errors are those of :func:`info_nce`; ``logit_bias``: scalar, added to the logits.
    """
    _require_company(image_BE, text_BE, ranks)
    with _float32(image_BE):
        text_AE = gather(_unit(text_BE), ranks)
        logits_BA = logit_scale.float().exp() * _unit(image_BE) @ text_AE.T + logit_bias.float()
        # +1 where the words are the picture's own, -1 elsewhere.
        sign_BA = 2 * torch.eye(len(text_AE), device=logits_BA.device) - 1
        begin = ranks.rank * len(image_BE)
        return -F.logsigmoid(sign_BA[begin : begin + len(image_BE)] * logits_BA).sum(dim=1)


@torch.no_grad()
def clamp_scale_(logit_scale: Tensor) -> Tensor:
    """Hold a logit scale within 0 .. ln 100, in place: after every step (CLIP, sec. 2.5; OpenCLIP)."""
    return logit_scale.clamp_(0, MOST_SCALE)


def embed_in_chunks(
    encode: Callable[[int], tuple[Tensor, Tensor]], chunks: int, parameters: Iterable[nn.Parameter]
) -> tuple[Tensor, Tensor]:
    """Embeddings of a batch whose activations would not fit into memory (GradCache, arXiv 2101.06983).

    All chunks are embedded without a graph. A loss of the embeddings, gathered over ranks or not, gives their
    gradients; with them each chunk is embedded again, with a graph, and passed backwards, one at a time. The
    gradients of ``parameters`` arrive where autograd expects them, so DDP averages them as any others.

    Args:
        encode: image and text embeddings, (b, E) each, of the n-th chunk. Called twice for each: what it
            draws must be keyed by the chunk.
        chunks: how many there are.
        parameters: everything that ``encode`` trains. What is not named here gets no gradient.

    Returns:
        Image and text embeddings (B, E) of all chunks in order.

    Raises:
        UserError: a parameter is cut over ranks (FSDP), whose whole weights exist in a forward pass alone.
    """
    trained = [p for p in parameters if p.requires_grad]
    if any(isinstance(p, DTensor) for p in trained):
        raise UserError(
            "contrast in chunks does not work with weights that are cut over ranks: set train.sharding=ddp, "
            "or embed the batch in one chunk"
        )
    image_BE, text_BE = _Chunked.apply(encode, chunks, *trained)
    return image_BE, text_BE


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, encode: Callable[[int], tuple[Tensor, Tensor]], chunks: int, *trained: Tensor
    ) -> tuple[Tensor, Tensor]:
        # The second pass is run by the backward, which is called outside of autocast.
        kind = trained[0].device.type if trained else "cpu"
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        ctx.precision = lambda: torch.autocast(kind, dtype=dtype, enabled=enabled)
        parts = [encode(n) for n in range(chunks)]
        ctx.encode, ctx.trained = encode, trained
        ctx.sizes = [len(image) for image, _ in parts]
        images, texts = zip(*parts, strict=True)
        return torch.cat(images), torch.cat(texts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None] * len(ctx.trained)
        cuts = zip(*(grad.split(ctx.sizes) for grad in grads), strict=True)
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
