"""What embeddings know: a linear probe, nearest neighbours, zero-shot classes, and retrieval by words.

Nothing is chosen on the clips that are reported: the probe's learning rate and weight decay come from a part
of the training clips. A tie between the right answer and another counts as wrong, and so does an answer that
nothing of the clip went into, so that embeddings which have collapsed to one point score nothing.

N clips (M of the test), D numbers of an embedding, K classes, G settings of the probe, T templates, U
captions without those that stand twice.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from motionloom.errors import UserError
from motionloom.rng import numpy_rng

PROBE, KNN = "linear-probe-v1", "knn-v1"
ZERO_SHOT, RETRIEVAL = "zero-shot-v1", "retrieval-v1"

RATES = (1.0, 10.0, 100.0)
DECAYS = (0.0, 1e-5, 1e-4, 1e-3)
STEPS, MOMENTUM = 300, 0.9
HELD_BACK = 0.2
"""Share of each class's training clips on which the settings are chosen."""
NEIGHBOURS, TEMPERATURE = 20, 0.07
TOGETHER = 1024
"""Test clips whose neighbours are looked for at once."""
RANKS = (1, 5, 10)
TIE = 1e-9
"""Scores that are no further apart are one, whatever the order of sums."""

Vectors = NDArray[np.floating[Any]]
Whole = NDArray[np.int64]


# Labels


@dataclass(frozen=True)
class Labelled:
    """Embeddings (N, D) and the class of each."""

    x_ND: Vectors
    labels: Sequence[Hashable]


def class_names(labels: Sequence[Hashable]) -> list[Hashable]:
    """Distinct labels in a fixed order. Raises UserError for one class alone, or fewer clips than classes."""
    names = sorted(set(labels), key=lambda label: (str(type(label)), str(label)))
    if len(names) < 2:
        said = f"one class ({names[0]!r})" if names else "no clip"
        raise UserError(f"training labels: {said}; a probe needs two or more: choose another --label")
    if (most := Counter(labels).most_common(1)[0][1]) < 2:
        raise UserError(
            f"training labels: {len(labels)} clips are {len(names)} classes of {most} clip each; choose a "
            "--label that clips share, or give more clips"
        )
    return names


def _checked(x_ND: Vectors, what: str) -> Tensor:
    if not np.isfinite(x_ND).all():
        bad = int((~np.isfinite(x_ND).all(axis=1)).sum())
        raise UserError(f"{what}: {bad} embeddings are NaN or infinite: look at the tokenizer's weights")
    return torch.from_numpy(np.ascontiguousarray(x_ND, np.float32))


def _indices(labels: Sequence[Hashable], names: Sequence[Hashable]) -> Tensor:
    """The class of each. Raises UserError for one that no training clip has."""
    place = {name: n for n, name in enumerate(names)}
    if lost := set(labels) - place.keys():
        raise UserError(f"test label {min(map(str, lost))}: no training clip has it; leave such clips out")
    return torch.tensor([place[label] for label in labels])


@dataclass(frozen=True)
class Answers:
    """Of every test clip its class, as told, and whether that is right.

    ``chance``: what knowing nothing of the clips would reach: the share of the commonest class, or, where
    classes have not been seen, one in K.
    """

    said: tuple[int, ...]
    right: tuple[bool, ...]
    chance: float
    details: Mapping[str, Any]

    @property
    def accuracy(self) -> float:
        """Share of right ones."""
        return float(np.mean(self.right))


def _answers(
    said_N: Tensor, right_N: Tensor, wanted_N: Tensor, names: Sequence[Hashable], details: dict[str, Any]
) -> Answers:
    share = Counter(wanted_N.tolist()).most_common(1)[0][1] / len(wanted_N)
    told = {"classes": len(names), **details}
    return Answers(tuple(said_N.tolist()), tuple(right_N.tolist()), share, told)


def _beats_all(own_N: Tensor, score_NK: Tensor, wanted_N: Tensor) -> Tensor:
    """(N,) whether ``own_N`` is above the scores of all classes but the wanted one."""
    others_N = score_NK.scatter(1, wanted_N[:, None], -math.inf).amax(dim=1)
    return own_N > others_N + TIE


# Linear probe


def linear_probe(train: Labelled, test: Labelled) -> Answers:
    """Logistic regression on standardised embeddings, by full-batch gradient descent from zero.

    Every pair of learning rate (``RATES``) and weight decay (``DECAYS``) is fitted on four fifths of the
    training clips of each class; the one that is best on the rest (of equal ones the lower loss) is fitted
    again on all of them and answers for the test clips, which nothing else ever sees. Nesterov momentum 0.9,
    cosine decay over 300 steps; embeddings are scaled so that one step size means the same at every width.

    Raises:
        UserError: fewer than two classes, classes of one clip each, or an embedding that is not finite.
    """
    names = class_names(train.labels)
    x_ND, target_N = _checked(train.x_ND, "training clips"), _indices(train.labels, names)
    kept, held = _split(target_N)
    rates, decays = zip(*product(RATES, DECAYS), strict=True)
    scale = _Scale.of(x_ND[kept])
    heads = _fit(scale(x_ND[kept]), target_N[kept], len(names), rates, decays)
    logits_GNK = heads(scale(x_ND[held]))
    right_G = (logits_GNK.argmax(-1) == target_N[held]).float().mean(1)
    loss_G = torch.stack([F.cross_entropy(logits, target_N[held]) for logits in logits_GNK])
    best = max(range(len(rates)), key=lambda g: (float(right_G[g]), -_number(loss_G[g])))
    scale = _Scale.of(x_ND)
    final = _fit(scale(x_ND), target_N, len(names), rates[best : best + 1], decays[best : best + 1])
    y_MD, wanted_M = scale(_checked(test.x_ND, "test clips")), _indices(test.labels, names)
    logits_MK = final(y_MD)[0]
    own_M = logits_MK.gather(1, wanted_M[:, None])[:, 0]
    # Of a clip without any number that varies the bias alone would speak, which knows the commonest class.
    right_M = _beats_all(own_M, logits_MK, wanted_M) & (y_MD != 0).any(dim=1)
    chosen = {
        "learning_rate": rates[best],
        "weight_decay": decays[best],
        "chosen_on": len(held),
        "accuracy_there": round(float(right_G[best]), 4),
        "trained_on": len(x_ND),
        "numbers": x_ND.shape[1],
    }
    return _answers(logits_MK.argmax(-1), right_M, wanted_M, names, chosen)


def _number(loss: Tensor) -> float:
    """A loss; one that is none counts as the largest."""
    return float(loss) if bool(loss.isfinite()) else math.inf


def _split(target_N: Tensor) -> tuple[Tensor, Tensor]:
    """What the settings are fitted on and what they are chosen on; of every class, one clip at least is
    fitted on."""
    order = torch.from_numpy(numpy_rng(PROBE, len(target_N)).permutation(len(target_N)))
    held = []
    for k in target_N.unique():
        mine = order[target_N[order] == k]
        held.append(mine[: min(math.ceil(HELD_BACK * len(mine)), len(mine) - 1)])
    back = torch.cat(held)
    mask = torch.ones(len(target_N), dtype=torch.bool)
    mask[back] = False
    return mask.nonzero()[:, 0], back.sort().values


@dataclass(frozen=True)
class _Scale:
    """Mean 0 and deviation 1 per number, and a mean squared length of 1, so that the curvature of the loss is
    bounded whatever D is."""

    mean_D: Tensor
    std_D: Tensor

    @staticmethod
    def of(x_ND: Tensor) -> _Scale:
        std_D = x_ND.std(dim=0, correction=0)
        # What never changes says nothing; divided by its rounding it would say noise.
        still = std_D <= 1e-6 * x_ND.abs().amax(dim=0).clamp_min(1e-30)
        return _Scale(x_ND.mean(dim=0), torch.where(still, torch.inf, std_D))

    def __call__(self, x_ND: Tensor) -> Tensor:
        return (x_ND - self.mean_D) / self.std_D / math.sqrt(x_ND.shape[1])


def _fit(
    x_ND: Tensor, target_N: Tensor, classes: int, rates: Sequence[float], decays: Sequence[float]
) -> Callable[[Tensor], Tensor]:
    """Logistic regressions of all settings at once; returns (N, D) to logits (G, N, K)."""
    x_N1D = torch.cat([x_ND, torch.ones(len(x_ND), 1)], dim=1)
    wanted_NK = F.one_hot(target_N, classes).float()
    w_GDK = torch.zeros(len(rates), x_N1D.shape[1], classes)
    speed = torch.zeros_like(w_GDK)
    rate_G11 = torch.tensor(rates)[:, None, None]
    decay_G11 = torch.tensor(decays)[:, None, None].repeat(1, x_N1D.shape[1], 1)
    decay_G11[:, -1] = 0  # not of the bias
    for step in range(STEPS):
        probability = (x_N1D @ w_GDK).softmax(-1)
        slope = x_N1D.T @ (probability - wanted_NK) / len(x_ND) + decay_G11 * w_GDK
        speed = MOMENTUM * speed + slope
        w_GDK = w_GDK - rate_G11 * 0.5 * (1 + math.cos(math.pi * step / STEPS)) * (slope + MOMENTUM * speed)

    def logits(x: Tensor) -> Tensor:
        return torch.cat([x, torch.ones(len(x), 1)], dim=1) @ w_GDK

    return logits


# Nearest neighbours


def knn(train: Labelled, test: Labelled, k: int = NEIGHBOURS, temperature: float = TEMPERATURE) -> Answers:
    """Each test clip's ``k`` nearest training clips by cosine vote with weight exp(cosine / temperature).

    Where clips are as near as the last that votes and there is no place for all of them, whichever vote: an
    answer is right only if it is right with those that speak against it most.

    Source: Wu et al., Unsupervised Feature Learning via Instance Discrimination (arXiv:1805.01978), 3.4.

    Raises:
        UserError: as :func:`linear_probe`, or fewer training clips than ``k``.
    """
    names = class_names(train.labels)
    if len(train.labels) < k:
        raise UserError(f"--k {k}: there are only {len(train.labels)} training clips; say --k or give more")
    x_ND, y_MD = (
        F.normalize(_checked(part.x_ND, what).double(), dim=1)
        for part, what in ((train, "training clips"), (test, "test clips"))
    )
    target_N = _indices(train.labels, names)
    wanted_M, kind_NK = _indices(test.labels, names), F.one_hot(target_N, len(names)).double()
    said, right = [], []
    for y_BD, wanted_B in zip(y_MD.split(TOGETHER), wanted_M.split(TOGETHER), strict=True):
        least_BK, most_BK, apart_B = _votes(y_BD @ x_ND.T, kind_NK, k, temperature)
        own_B = least_BK.gather(1, wanted_B[:, None])[:, 0]
        said.append(most_BK.argmax(1))
        right.append(_beats_all(own_B, most_BK, wanted_B) & apart_B)
    details = {"k": k, "temperature": temperature, "trained_on": len(x_ND), "numbers": x_ND.shape[1]}
    return _answers(torch.cat(said), torch.cat(right), wanted_M, names, details)


def _votes(cosine_BN: Tensor, kind_NK: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(B, K) the least and the most votes that a class can have, whichever of the clips that are as near as
    the last one vote; and (B,) whether training clips are not all equally near, in which case the votes would
    only say how common each class is."""
    near = cosine_BN.topk(k, dim=1).values
    last_B1, best_B1 = near[:, -1:], near[:, :1]
    # Relative to the nearest, whose weight is then 1: exp(1 / 0.07) is more than half precision holds.
    sure_BN = cosine_BN > last_B1 + TIE
    votes_BK = (((cosine_BN - best_B1) / temperature).exp() * sure_BN) @ kind_NK
    last_weight_B1 = ((last_B1 - best_B1) / temperature).exp()
    tied_BK = ((cosine_BN - last_B1).abs() <= TIE).double() @ kind_NK
    places_B1 = k - sure_BN.sum(dim=1, keepdim=True)
    # What is left of the places once all others that tie have taken theirs.
    left_BK = (places_B1 - (tied_BK.sum(dim=1, keepdim=True) - tied_BK)).clamp_min(0)
    least_BK = votes_BK + last_weight_B1 * left_BK
    most_BK = votes_BK + last_weight_B1 * tied_BK.minimum(places_B1)
    return least_BK, most_BK, cosine_BN.amax(dim=1) > cosine_BN.amin(dim=1) + TIE


# Words


EmbedText = Callable[[Sequence[str]], Vectors]
"""Texts to (N, D); not normalised."""


def class_embeddings(wordings: Sequence[Sequence[str]], embed: EmbedText, batch: int = 256) -> Vectors:
    """(K, D) unit vectors of classes that may be said in several ways, the same number each.

    Each wording's embedding is normalised, those of a class are averaged, and the mean is normalised again.
    Source: Radford et al. (arXiv:2103.00020), 3.1.4.
    """
    texts = [text for ways in wordings for text in ways]
    if not all(text.strip() for text in texts):
        raise UserError("a class has an empty wording: give every class a name and every template some words")
    parts = [embed(texts[start : start + batch]) for start in range(0, len(texts), batch)]
    x_TD = F.normalize(_checked(np.concatenate(parts), "wordings"), dim=1)
    ways = torch.tensor([len(way) for way in wordings])
    owner = torch.arange(len(wordings)).repeat_interleave(ways)
    sum_KD = torch.zeros(len(wordings), x_TD.shape[1]).index_add_(0, owner, x_TD)
    return F.normalize(sum_KD / ways[:, None], dim=1).numpy()


def zero_shot(x_ND: Vectors, classes_KD: Vectors, wanted: Sequence[int]) -> Answers:
    """Whether each clip's own class is nearer to it by cosine than every other.

    Raises:
        UserError: one class alone, or an embedding that is not finite.
    """
    if len(classes_KD) < 2:
        raise UserError("zero-shot: one class alone is always right; give clips of two or more")
    cosine_NK = _cosines(x_ND, classes_KD)
    wanted_N = torch.tensor(list(wanted))
    right = tuple((_rank(cosine_NK, wanted_N) == 0).tolist())
    said = tuple(cosine_NK.argmax(dim=1).tolist())
    return Answers(said, right, 1 / len(classes_KD), {"classes": len(classes_KD)})


def zero_shot_part(
    x_ND: Vectors, classes_KD: Vectors, wanted: Sequence[int], values: Sequence[Hashable]
) -> tuple[bool, ...]:
    """Of each clip whether the nearest of the classes that share a part with its own (say, the colour) is
    nearer than all that do not.

    Args:
        values: that part of each class.
    """
    score_NK = _cosines(x_ND, classes_KD)
    place = {value: n for n, value in enumerate(dict.fromkeys(values))}
    part_K = torch.tensor([place[value] for value in values])
    same_NK = part_K[torch.tensor(list(wanted))][:, None] == part_K
    own_N = score_NK.masked_fill(~same_NK, -math.inf).amax(dim=1)
    others_N = score_NK.masked_fill(same_NK, -math.inf).amax(dim=1)
    return tuple((own_N > others_N + TIE).tolist())


def _cosines(x_ND: Vectors, y_KD: Vectors) -> Tensor:
    """(N, K), in float64: equal vectors then tie, whatever the order of sums."""
    x, y = _checked(x_ND, "clips").double(), _checked(y_KD, "texts").double()
    return F.normalize(x, dim=1) @ F.normalize(y, dim=1).T


def _rank(score_NK: Tensor, wanted_N: Tensor) -> Tensor:
    """(N,) how many others score as high as the wanted one or higher."""
    own_N1 = score_NK.gather(1, wanted_N[:, None])
    return (score_NK >= own_N1 - TIE).sum(dim=1) - 1


@dataclass(frozen=True)
class Found:
    """Of every query whether a right answer is among the first 1, 5 and 10, and what chance would give."""

    right: tuple[Mapping[int, bool], ...]
    chance: Mapping[int, float]

    def recall(self, rank: int) -> float:
        """R@rank."""
        return float(np.mean([one[rank] for one in self.right]))


def retrieval(x_ND: Vectors, texts_UD: Vectors, owner: Sequence[int]) -> tuple[Found, Found]:
    """R@1, 5 and 10 of clips to texts (one query per clip) and of texts to clips (one per text).

    Args:
        texts_UD: one embedding per distinct caption.
        owner: the caption of each clip. Of a caption that several clips have, any of them is right.

    Raises:
        UserError: fewer than two distinct captions, or an embedding that is not finite.
    """
    if len(texts_UD) < 2:
        raise UserError("retrieval: all clips have one caption; give clips of two or more")
    score_NU = _cosines(x_ND, texts_UD)
    owner_N = torch.tensor(list(owner))
    to_text = _rank(score_NU, owner_N)
    mine_NU = F.one_hot(owner_N, len(texts_UD)).bool()
    best_U = score_NU.masked_fill(~mine_NU, -math.inf).amax(dim=0)
    # Clips of other captions that score as high as the best of its own.
    to_clip = ((score_NU >= best_U - TIE) & ~mine_NU).sum(dim=0)
    return (
        _found(to_text, _chance(len(texts_UD), [1])),
        _found(to_clip, _chance(len(x_ND), mine_NU.sum(dim=0).tolist())),
    )


def _chance(among: int, right: Sequence[int]) -> dict[int, float]:
    """Recall of a random order of ``among`` answers, of which so many are right for each query."""
    chance = {}
    for rank in RANKS:
        k = min(rank, among)
        missed = [math.comb(among - count, k) / math.comb(among, k) for count in right]
        chance[rank] = 1 - float(np.mean(missed))
    return chance


def _found(rank: Tensor, chance: Mapping[int, float]) -> Found:
    return Found(tuple({k: one < k for k in RANKS} for one in rank.tolist()), chance)
