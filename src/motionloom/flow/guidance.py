"""Guidance: pushing a prediction away from worse ones, each of which lacks one thing.

    guided = c + (text - 1)(c - u) + skip (c - p) + (cross - 1)(c - m) + sum over k of (s_k - 1)(c - n_k)

c is the prediction as asked for. u is shown the negative text instead (classifier-free guidance, Ho &
Salimans 2022, 2207.12598). In p the self-attention of some blocks hands on its values (spatio-temporal skip
guidance, Hyung et al. 2024, 2411.18664). In m sound and picture do not see each other. In n_k condition k is
left out, so that (c - n_k) is classifier-free guidance on that condition. Scales are such that a term of
scale 1 adds nothing, as u + text (c - u) has it; ``skip`` counts from 0. Whoever writes c + w (c - u),
CausVid and Self-Forcing among them, means text = 1 + w.

A term that adds nothing costs nothing: :meth:`Guidance.passes` names the forwards that are needed.

Shapes: predictions are (B, ...), as a rule (B, N, C). Arithmetic is at least float32, results as cond.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from motionloom.errors import UserError
from motionloom.flow.paths import widen


def delta_to_scale(w: float) -> float:
    """The scale of a codebase that writes cond + w * (cond - uncond): w = 3.5 there is 4.5 here."""
    return 1.0 + w


def classifier_free(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """uncond + scale * (cond - uncond) (Ho & Salimans 2022, 2207.12598, with scale = 1 + their w)."""
    wide = widen(uncond)
    return (wide + scale * (widen(cond) - wide)).to(cond.dtype)


def rescale(guided: Tensor, cond: Tensor, phi: float, mask: Tensor | None = None) -> Tensor:
    """Takes back the gain in contrast that a high scale brings (Lin et al. 2023, 2305.08891, sec. 3.4).

    phi = 1 gives ``guided`` the standard deviation of ``cond``, phi = 0 leaves it; between them a blend. The
    deviation is taken per sample over all other dims, in the parametrisation that the predictions come in:
    velocities, where a sampler of ours asks (LTX takes it of clean estimates).
    ``mask`` (leading dims of cond, such as (B, N); True counts) leaves out tokens that are not generated:
    padding and context would otherwise set the contrast of the rest.
    """
    wide, wide_cond = widen(guided), widen(cond)
    if mask is None:
        keep = torch.ones_like(wide, dtype=torch.bool)
    else:
        keep = mask.reshape(mask.shape + (1,) * (wide.ndim - mask.ndim)).expand_as(wide)
    std, std_cond = _std(wide, keep), _std(wide_cond, keep)
    ratio = torch.where(std > 0, std_cond / std, 1.0)
    return (wide * (phi * ratio + (1 - phi))).to(guided.dtype)


def _std(x: Tensor, keep: Tensor) -> Tensor:
    dims = tuple(range(1, x.ndim))
    count = keep.sum(dims, keepdim=True).clamp_min(1)
    mean = torch.where(keep, x, 0.0).sum(dims, keepdim=True) / count
    # where, not a product: a masked token may hold NaN.
    return (torch.where(keep, x - mean, 0.0).square().sum(dims, keepdim=True) / count).sqrt()


@dataclass(frozen=True)
class Perturbation:
    """What a forward leaves out, so that guidance can point away from its answer."""

    skip_self: tuple[int, ...] = ()
    """Blocks whose self-attention hands on its values (spatio-temporal skip guidance, arXiv 2411.18664)."""
    isolate: bool = False
    """No attention between sound and picture (modality guidance)."""


@dataclass(frozen=True)
class Pass:
    """One forward of the network over the same noisy tokens, for all modalities at once."""

    name: str
    """Under which its predictions go to :meth:`Guidance.combine`."""
    negative: bool = False
    """Shown the negative text in place of the prompt."""
    perturb: Perturbation | None = None
    without: str | None = None
    """The condition that it is not shown; what that gives is then to be made, or is not there."""


COND = "cond"
"""Name of the pass that leaves nothing out."""


@dataclass(frozen=True)
class Term:
    """How far guidance goes in one direction, and at which noise levels.

    It acts for low <= sigma <= high of ``interval`` (Kynkäänniemi et al. 2024, 2404.07724). Raises UserError
    for numbers out of range.
    """

    scale: float
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not 0 <= self.scale < float("inf"):
            raise UserError(f"guidance scale must be 0 or more, and a number, got {self.scale}")
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise UserError(f"guidance interval must obey 0 <= low <= high <= 1, got {low}, {high}")

    def acts(self, sigma: float | None) -> bool:
        """Whether sigma, a Python float, is inside; None stands for any."""
        return sigma is None or self.interval[0] <= sigma <= self.interval[1]


@dataclass(frozen=True)
class Scales:
    """The terms of one modality. Raises UserError for numbers out of range."""

    text: Term = Term(1.0)
    """0 makes what the negative text says."""
    skip: Term = Term(0.0)
    cross: Term = Term(1.0)
    conditions: Mapping[str, Term] = field(default_factory=dict)
    """By the name of the condition that a pass leaves out."""
    rescale: float = 0.0
    """phi of :func:`rescale`, applied to the sum of all terms."""

    def __post_init__(self) -> None:
        if not 0 <= self.rescale <= 1:
            raise UserError(f"guidance rescale must be between 0 and 1, got {self.rescale}")

    def weights(self, sigma: float | None) -> dict[str, float]:
        """What (c - other) counts, by the name of the other's pass; those that act at sigma alone."""
        terms = {"negative": (self.text, 1.0), "skip": (self.skip, 0.0), "isolate": (self.cross, 1.0)}
        terms |= {f"without {name}": (term, 1.0) for name, term in self.conditions.items()}
        return {
            name: term.scale - nothing
            for name, (term, nothing) in terms.items()
            if term.scale != nothing and term.acts(sigma)
        }


@dataclass(frozen=True)
class FirstChannels:
    """The first ``count`` channels of every latent cell of a token. Raises UserError for none."""

    count: int
    cells: int = 1
    """Latent cells of a token."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"guidance acts on {self.count} channels: give 1 or more, or none for all")

    def of(self, guided: Tensor, others: Tensor) -> Tensor:
        """(..., cells x C): these channels of ``guided``, the rest of ``others``."""
        channels = guided.shape[-1] // self.cells
        chosen = torch.arange(guided.shape[-1], device=guided.device) % channels < self.count
        return torch.where(chosen, guided, others)


@dataclass(frozen=True)
class Guidance:
    """How one generation is guided; ``Guidance(scale, rescale, interval)`` is guidance on the text alone.

    Raises UserError for numbers out of range.
    """

    scale: float = 1.0
    """Of the text; 1 is no guidance, 0 makes what the negative text says."""
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)
    """Sigmas between which text guidance acts."""
    skip: Term = Term(0.0)
    """0 is off."""
    skip_blocks: tuple[int, ...] = ()
    """Whose self-attention ``skip`` leaves out; one forward serves all modalities."""
    cross: Term = Term(1.0)
    """Between sound and picture."""
    conditions: Mapping[str, Term] = field(default_factory=dict)
    """By the name of the condition that a pass leaves out."""
    audio: Scales | None = None
    """Of the sound; None: as the video's."""
    channels: FirstChannels | None = None
    """Of the video, where guidance of the text acts; None: all. DiT's own sampler guides three, and
    LightningDiT's published scales are of that."""

    def __post_init__(self) -> None:
        parts = (self._video, self.audio)  # the first refuses what is out of range
        skips = any(one.skip.scale for one in parts if one is not None)
        if skips and not self.skip_blocks:
            raise UserError("guidance skips self-attention in no block: give skip_blocks")
        if any(block < 0 for block in self.skip_blocks):
            raise UserError(f"guidance skip_blocks count from 0, got {list(self.skip_blocks)}")

    @property
    def _video(self) -> Scales:
        text = Term(self.scale, self.interval)
        return Scales(text, self.skip, self.cross, self.conditions, self.rescale)

    def of(self, modality: str) -> Scales:
        """The terms of ``video`` or ``audio``."""
        return self.audio if modality == "audio" and self.audio is not None else self._video

    def restricted(
        self, streams: Collection[str], made: Collection[str], conditions: Collection[str]
    ) -> Guidance:
        """What of it matters to a request: no pass is computed for the rest.

        Args:
            streams: modalities that the network is shown.
            made: those of them that are denoised; what is given whole is not guided.
            conditions: names of those that the request holds.
        """

        def part(modality: str) -> Scales:
            if modality not in made:
                return Scales()
            whole = self.of(modality)
            held = {name: term for name, term in whole.conditions.items() if name in conditions}
            cross = whole.cross if {"video", "audio"} <= set(streams) else Term(1.0)
            return replace(whole, cross=cross, conditions=held)

        video = part("video")
        return replace(
            self,
            scale=video.text.scale,
            rescale=video.rescale,
            interval=video.text.interval,
            skip=video.skip,
            cross=video.cross,
            conditions=video.conditions,
            audio=part("audio"),
        )

    def passes(self, sigma: float | None = None) -> tuple[Pass, ...]:
        """The forwards that are needed at sigma, a Python float: no device is asked. None: at any sigma.

        The first is always ``cond``; with no term that acts it is the only one.
        """
        # One pass serves every modality that wants it.
        wanted = dict.fromkeys([*self.of("video").weights(sigma), *self.of("audio").weights(sigma)])
        return (Pass(COND), *map(self._pass, wanted))

    def _pass(self, name: str) -> Pass:
        if name == "negative":
            return Pass(name, negative=True)
        if name == "skip":
            return Pass(name, perturb=Perturbation(skip_self=self.skip_blocks))
        if name == "isolate":
            return Pass(name, perturb=Perturbation(isolate=True))
        return Pass(name, without=name.removeprefix("without "))

    def combine(
        self,
        predictions: Mapping[str, Tensor],
        sigma: float,
        mask: Tensor | None = None,
        modality: str = "video",
    ) -> Tensor:
        """The guided prediction of one modality; where no term acts the prediction ``cond`` itself.

        Args:
            predictions: by name of pass, those of :meth:`passes` at least; of the modality, equal in shape.
            mask: as in :func:`rescale`: the tokens that are made.
        """
        cond = predictions[COND]
        scales = self.of(modality)
        weights = scales.weights(sigma)
        if not weights:
            return cond
        wide = widen(cond)
        guided = wide
        if weights.pop("negative", None) is not None:
            guided = classifier_free(wide, predictions["negative"], scales.text.scale)
            if self.channels is not None and modality == "video":
                guided = self.channels.of(guided, wide)
        for name, weight in weights.items():
            guided = guided + weight * (wide - widen(predictions[name]))
        guided = guided.to(cond.dtype)
        return rescale(guided, cond, scales.rescale, mask) if scales.rescale else guided
