"""Losses of tokenizer pre-training on several ranks, against one process that has all their samples.

python -m torch.distributed.run --nproc_per_node 2 toy_contrast.py OUT.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from motionloom.methods.tokenizer.adversarial import LeCam, adaptive_weight
from motionloom.methods.tokenizer.contrast import Others, embed_in_chunks, info_nce, sigmoid
from motionloom.methods.tokenizer.self_distil import Centre, sinkhorn
from motionloom.parallel import Gradients, Ranks, start_ranks
from motionloom.rng import torch_generator

torch.set_num_threads(1)

CHUNKS, CHUNK, PIXELS, WIDTH = 3, 2, 12, 8
LOSSES = ("info_nce", "sigmoid")


class Towers(nn.Module):
    """Pictures and words of one sample are two looks at the same numbers, so that there is something to find.

    One layer is of no use: it must stay without a gradient, as a decoder does in this loss.
    """

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(PIXELS, 16), nn.GELU(), nn.Linear(16, WIDTH))
        self.text = nn.Linear(PIXELS, WIDTH)
        self.idle = nn.Linear(3, 3)
        self.logit_scale = nn.Parameter(torch.tensor(1.5))
        self.logit_bias = nn.Parameter(torch.tensor(-1.0))
        generator = torch_generator("toy contrast, towers")
        with torch.no_grad():
            for part in self.modules():
                if isinstance(part, nn.Linear):
                    part.weight.normal_(std=part.in_features**-0.5, generator=generator)
                    part.bias.normal_(std=0.1, generator=generator)

    def encode(self, rank: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """The n-th chunk of a rank, (CHUNK, WIDTH) each, and a text without a picture for each; drop-out is
        drawn anew, the same, on every call."""
        generator = torch_generator("toy contrast, data", rank, n)
        x = torch.randn(CHUNK, PIXELS, generator=generator)
        kept = torch.rand(CHUNK, PIXELS, generator=generator) > 0.25
        near = x + torch.randn(CHUNK, PIXELS, generator=generator)
        return self.image(x * kept), self.text(x.flip(-1)), self.text(near.flip(-1))

    def loss(self, name: str, found: Sequence[Tensor], said: Sequence[Tensor], ranks: Ranks) -> Tensor:
        """(B,) of one of LOSSES. ``said``: the texts and those without a picture, (B, 1) each."""
        image, text, near = found
        others = Others.of(*said, near, ranks)
        if name == "info_nce":
            return info_nce(image, text, self.logit_scale, ranks, others)
        return sigmoid(image, text, self.logit_scale, self.logit_bias, ranks, others)


def words(rank: int, n: int) -> tuple[Tensor, Tensor]:
    """What the texts of a chunk say, and those without a picture: some the same, on both ranks."""
    number = torch.arange(CHUNK)[:, None] + CHUNK * (rank * CHUNKS + n)
    return number % 5, (number + 2) % 7


def joined(parts: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Chunks as one, each kind by itself."""
    return tuple(torch.cat(kind) for kind in zip(*parts, strict=True))


def gradients(name: str, chunked: bool, ranks: Ranks, share: Sequence[int]) -> dict[str, Tensor]:
    """Gradients of the mean loss over the chunks of the ranks in ``share``, and the loss, averaged."""
    towers = Towers()
    parts = list(product(share, range(CHUNKS)))

    def losses() -> Tensor:
        if chunked:
            trained = [*towers.image.parameters(), *towers.text.parameters(), *towers.idle.parameters()]
            found = embed_in_chunks(lambda n: towers.encode(*parts[n]), len(parts), trained)
        else:
            found = joined(towers.encode(*part) for part in parts)
        return towers.loss(name, found, joined(words(*part) for part in parts), ranks)

    averaged = Gradients(losses, towers.parameters(), [], ranks)
    loss = averaged().mean()
    loss.backward()
    found = {n: p.grad.clone() for n, p in towers.named_parameters() if p.grad is not None}
    return {**found, "loss": ranks.sum_(loss.detach().clone()) / ranks.world}


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest of any tensor; a missing one is to be read as zeros, which is what DDP leaves."""
    return max(
        float((a.get(n, torch.zeros(())) - b.get(n, torch.zeros(()))).abs().max())
        for n in a.keys() | b.keys()
    )


def contrasts(ranks: Ranks) -> dict[str, Any]:
    """Per loss and way: the difference to one process with the joined batch, and how large that is."""
    found: dict[str, Any] = {}
    for name in LOSSES:
        alone = gradients(name, False, Ranks(), range(ranks.world))
        found[f"{name} size"] = max(float(g.abs().max()) for n, g in alone.items() if n != "loss")
        for chunked in (False, True):
            here = gradients(name, chunked, ranks, [ranks.rank])
            found[f"{name} {'chunks' if chunked else 'plain'}"] = difference(here, alone)
    return found


def targets(ranks: Ranks) -> dict[str, float]:
    """Differences of what a teacher is told on ranks with 5 and 0 tokens to one process with all of them."""
    logits_MK = torch.randn(5, 7, generator=torch_generator("toy contrast, logits"))
    mine_MK = logits_MK if ranks.rank == 0 else logits_MK[:0]
    cut_MK = logits_MK[:2] if ranks.rank == 0 else logits_MK[2:]
    alone, here = Centre(7), Centre(7)
    alone.update(logits_MK)
    here.update(mine_MK, ranks)
    whole_MK = sinkhorn(logits_MK, 0.05)
    whole_cut_MK = whole_MK[:2] if ranks.rank == 0 else whole_MK[2:]
    rest = sinkhorn(mine_MK, 0.05, ranks)
    assert len(rest) == len(mine_MK)
    return {
        "centre": float((alone.centre_K - here.centre_K).abs().max()),
        "sinkhorn": float((sinkhorn(cut_MK, 0.05, ranks) - whole_cut_MK).abs().max()),
        "sinkhorn, none here": float((rest - whole_MK[: len(rest)]).abs().sum()),
    }


def judges(ranks: Ranks) -> dict[str, float]:
    """The same of a judge's averages and of its weight."""
    real, fake = torch.randn(2, 4, 3, generator=torch_generator("toy contrast, logits of a judge"))
    alone, here = LeCam(), LeCam()
    own = slice(ranks.rank * 2, ranks.rank * 2 + 2)
    alone.update(real, fake)
    here.update(real[own], fake[own], ranks)
    weight = torch.ones(3, requires_grad=True)

    def weigh(which: slice, of: Ranks) -> Tensor:
        one, other = (real[which] @ weight).square().mean(), (fake[which] @ weight).sin().mean()
        return adaptive_weight(one, other, weight, of)

    return {
        "lecam": float((alone(real, fake)[own] - here(real[own], fake[own])).abs().max()),
        "weight": abs(float(weigh(own, ranks) / weigh(slice(None), Ranks())) - 1),
    }


def main() -> None:
    with start_ranks("cpu") as ranks:
        found = {"world": ranks.world, **contrasts(ranks), **targets(ranks), **judges(ranks)}
        worst = {k: float(ranks.max_(torch.tensor(float(v)))) for k, v in found.items()}
        if ranks.is_main:
            Path(sys.argv[1]).write_text(json.dumps(worst))


if __name__ == "__main__":
    main()
