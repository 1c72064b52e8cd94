"""The doctor: in seconds, before a run is paid for, is this model alive and is its data the right data?

Every check perturbs one thing that must matter, or one that must not, and looks at the output. Layers that
start at zero are given small values first (``wake``), since a fresh adaLN-Zero network answers 0 to everything.

Shapes: B batch, F token frames, S cells of a frame, C channels of a token, N tokens, L text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from motionloom.data.cache import Cache
from motionloom.generate import Given, Model
from motionloom.plans import (
    Attributes,
    Geometry,
    Layout,
    Streams,
    Text,
    join_attributes,
    read_video,
    to_streams_at,
)
from motionloom.rng import torch_generator

Status = Literal["ok", "wrong", "skipped"]

# Relative to the output's RMS: below it a change is rounding, above it an influence. Float32 rounding through
# a deep network stays near 1e-6; an attention that uses its input moves the output by far more than 1e-4.
NOTHING, SOMETHING = 1e-5, 1e-4
# The doctor looks at a small clip: structure does not depend on size.
SIDE, FRAMES = 4, 8
CAPTIONS = (
    "a small red circle moves left on a dark background",
    "two large green cats sleep, light background",
)


@dataclass(frozen=True)
class Finding:
    """One check: what was seen, and if it is wrong, how to mend it."""

    check: str
    status: Status
    seen: str
    mend: str = ""

    def __str__(self) -> str:
        mark = {"ok": "ok     ", "wrong": "WRONG  ", "skipped": "skipped"}[self.status]
        return f"{mark} {self.check}: {self.seen}" + (f"; {self.mend}" if self.mend else "")


def wake(modules: Iterable[nn.Module], seed: int = 0) -> None:
    """Give small random values to parameters that are all zero, in place. For fresh models only."""
    generator = torch_generator(seed, "doctor", "wake")
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                if not parameter.any():
                    noise = torch.randn(parameter.shape, generator=generator) * 0.05
                    parameter.copy_(noise.to(parameter))


class Doctor:
    """Examines one model on its own kind of input.

    Args:
        fresh: the model is untrained; wake it first with :func:`wake`.
    """

    def __init__(self, model: Model, cache: Cache | None = None) -> None:
        self.model, self.cache = model, cache
        self.geometry = self._geometry()
        self.text = model.encode_text([[CAPTIONS[0]] * self._scenes])
        self.layout = self._layout(self.text)
        shape = (
            1,
            self.geometry.grid[0],
            self.geometry.grid[1] * self.geometry.grid[2],
            model.token_channels,
        )
        generator = torch_generator("doctor", "latents")
        self.x_BFSC = torch.randn(shape, generator=generator).to(model.device)
        self.other_BFSC = torch.randn(shape, generator=generator).to(model.device)
        self.base_BFSC = self._answer()

    def examine(self) -> list[Finding]:
        """All checks."""
        checks: tuple[Callable[[], Finding], ...] = (
            self.answers,
            self.text_matters,
            self.padding_is_hidden,
            self.time_matters,
            self.order_matters,
            self.given_matters,
            self.given_is_exact,
            self.hidden_is_hidden,
            self.gradients_reach,
            self.latents_are_scaled,
            self.cache_is_this_recipes,
        )
        return [check() for check in checks]

    def answers(self) -> Finding:
        """The output is finite and not 0."""
        if not torch.isfinite(self.base_BFSC).all():
            return Finding("output", "wrong", "it is not finite", "look for a division or a mask with no key")
        rms = _rms(self.base_BFSC)
        if rms == 0:
            return Finding("output", "wrong", "it is 0 everywhere", "train from weights that are not zero")
        return Finding("output", "ok", f"finite, RMS {rms:.3g}")

    def text_matters(self) -> Finding:
        """Another caption gives another output."""
        other = self.model.encode_text([[CAPTIONS[1]] * self._scenes])
        change = self._change(self._answer(text=other))
        return _must_matter(
            "text", change, "the caption", "check the text mask and that the text encoder is not constant"
        )

    def padding_is_hidden(self) -> Finding:
        """What stands in padding has no influence, what stands in words has."""
        padding_BL1 = ~self.text.valid_BL[..., None]
        noise = torch.randn(self.text.x_BLC.shape, generator=torch_generator("doctor", "padding")).to(
            self.text.x_BLC
        )
        words = self._change(
            self._answer(text=replace(self.text, x_BLC=torch.where(padding_BL1, self.text.x_BLC, noise)))
        )
        if not padding_BL1.any():
            return Finding(
                "text mask", "skipped", "the caption fills max_length; there is no padding to hide"
            )
        leak = self._change(
            self._answer(text=replace(self.text, x_BLC=torch.where(padding_BL1, noise, self.text.x_BLC)))
        )
        if leak > NOTHING and words <= SOMETHING:
            mend = "the mask is inverted: True must mean that a token is valid"
            return Finding("text mask", "wrong", "only padding is attended to", mend)
        if leak > NOTHING:
            mend = "hand Stream.valid_BN to the attention as its key mask"
            return Finding("text mask", "wrong", f"padding changes the output by {leak:.2g}", mend)
        return Finding("text mask", "ok", "padding has no influence")

    def time_matters(self) -> Finding:
        """Another noise level gives another output."""
        change = self._change(self._answer(sigma=0.9))
        return _must_matter(
            "noise level", change, "sigma", "check the embedding of Stream.sigma_BK and its modulation"
        )

    def order_matters(self) -> Finding:
        """Swapping two frames does more than swap two frames of the output."""
        if self.geometry.grid[0] < 2:
            return Finding("frame order", "skipped", "there is one frame")
        swap = [1, 0, *range(2, self.geometry.grid[0])]
        change = self._change(self._answer(x=self.x_BFSC[:, swap])[:, swap])
        return _must_matter(
            "frame order", change, "the order of frames", "give the tokens their time position"
        )

    def given_matters(self) -> Finding:
        """A given frame changes what is made of the others."""
        if not self.model.plan.knows_given or self.geometry.grid[0] < 2:
            return Finding("given frames", "skipped", "this plan gives none")
        a, b = (self._with_given(clean) for clean in (self.x_BFSC, self.other_BFSC))
        change = _rms((a - b)[:, 1:]) / max(_rms(a[:, 1:]), 1e-12)
        return _must_matter("given frames", change, "the given frame", "let later tokens see the given ones")

    def given_is_exact(self) -> Finding:
        """Given tokens enter bit-identical, at sigma 0, with no loss on them."""
        if not self.model.plan.knows_given or self.geometry.grid[0] < 2:
            return Finding("given frames are exact", "skipped", "this plan gives none")
        given = self._given(self.other_BFSC)
        layout = self.model.plan.layout(self.geometry, self.text, given.given_BF)
        video = self._streams(layout, given.clean_BFSC, self.x_BFSC, 0.5, self.text)["video"]
        # The context copies of teacher forcing stand in front; the clip is the tail.
        first = video.x_BNC.unflatten(1, (video.grid[0], -1))[:, -self.geometry.grid[0]]
        sigma_first = video.sigma_BN.unflatten(1, (video.grid[0], -1))[:, -self.geometry.grid[0]]
        if not torch.equal(first, self.other_BFSC[:, 0]) or sigma_first.any():
            mend = "build streams with plans.to_streams, which copies given tokens"
            return Finding("given frames are exact", "wrong", "they change on the way in", mend)
        return Finding("given frames are exact", "ok", "bit-identical, at noise level 0")

    def hidden_is_hidden(self) -> Finding:
        """A token that cannot be seen, through any number of layers, has no influence."""
        streams = self._streams(self.layout, self.x_BFSC, self.x_BFSC, 0.5, self.text)
        sees = self._reach([streams["text"].attributes, streams["video"].attributes])
        words = streams["text"].grid[2]
        sees_video_QK = sees[words:, words:]
        if sees_video_QK.all():
            return Finding("hidden tokens", "ok", "this plan hides no video token")
        worst = 0.0
        for key in (sees_video_QK.float().mean(dim=0)).argsort()[:4].tolist():
            x_BNC = streams["video"].x_BNC.clone()
            x_BNC[:, key] += 1.0
            changed = {**streams, "video": streams["video"].with_x(x_BNC, streams["video"].sigma_BK)}
            difference_N = (self._velocity(changed) - self._velocity(streams)).abs().amax(dim=(0, 2))
            worst = max(worst, float(difference_N[~sees_video_QK[:, key]].max()))
        if worst > NOTHING * max(_rms(self.base_BFSC), 1e-12):
            mend = "a mask is missing somewhere: compare the backbone with plans.dense_mask"
            return Finding("hidden tokens", "wrong", f"one changes the output by {worst:.2g}", mend)
        return Finding("hidden tokens", "ok", "they have no influence")

    def gradients_reach(self) -> Finding:
        """Every parameter that is to be trained gets a gradient that is not 0."""
        modules: dict[str, object] = {"backbone": self.model.predictor.backbone}
        if self.model.text_encoder.trainable:
            modules["text_encoder"] = self.model.text_encoder
        named = [
            (f"{name}.{path}", parameter)
            for name, module in modules.items()
            if isinstance(module, nn.Module)
            for path, parameter in module.named_parameters()
        ]
        with torch.enable_grad():
            text = self._text_with_gradient()
            streams = self._streams(self.layout, self.x_BFSC, self.x_BFSC, 0.5, text)
            loss = self._velocity(streams).square().mean()
            wanted = [parameter for _, parameter in named if parameter.requires_grad]
            gradients = (
                torch.autograd.grad(loss, wanted, allow_unused=True)
                if loss.requires_grad
                else [None] * len(wanted)
            )
        alive = {id(p) for p, g in zip(wanted, gradients, strict=True) if g is not None and bool(g.any())}
        dead = [name for name, parameter in named if id(parameter) not in alive]
        if dead:
            shown = ", ".join(dead[:3]) + (f" and {len(dead) - 3} more" if len(dead) > 3 else "")
            mend = "let them take part in the output, set requires_grad, or remove them"
            return Finding(
                "gradients", "wrong", f"{len(dead)} of {len(named)} parameters get none: {shown}", mend
            )
        return Finding("gradients", "ok", f"reach all {len(named)} parameters")

    def latents_are_scaled(self) -> Finding:
        """Every channel of the cached latents has mean near 0 and deviation near 1."""
        if self.cache is None:
            return Finding("latent scale", "skipped", "no cache was named (--cache)")
        mean_C, std_C = self.cache.statistics()
        low, high, off = float(std_C.min()), float(std_C.max()), float(mean_C.abs().max())
        if low < 0.3 or high > 3.0 or off > 1.0:
            seen = f"deviations {low:.3g} to {high:.3g}, means up to {off:.3g}; noise has 1 and 0"
            mend = "normalise per channel in the tokenizer, then make the cache again"
            return Finding("latent scale", "wrong", seen, mend)
        return Finding("latent scale", "ok", f"deviations {low:.2f} to {high:.2f}, means up to {off:.2f}")

    def cache_is_this_recipes(self) -> Finding:
        """The cache is the one that this recipe would make."""
        if self.cache is None:
            return Finding("cache", "skipped", "no cache was named (--cache)")
        if wrong := self.cache.mismatches(self.model.recipe):
            mend = "make it again: motionloom cache RECIPE --manifest M --out NEW"
            return Finding("cache", "wrong", f"made otherwise: {'; '.join(wrong)}", mend)
        return Finding("cache", "ok", f"the one that this recipe makes, {len(self.cache)} clips")

    # How the questions are put

    @property
    def _scenes(self) -> int:
        return 2 if self.model.recipe.plan.type == "scenes" else 1

    def _geometry(self) -> Geometry:
        """A small clip of this recipe's kind."""
        spec, patch, video = self.model.tokenizer.spec, self.model.patch, self.model.recipe.video
        frames = min(spec.latent_grid(video.num_frames, spec.spatial, spec.spatial)[0] // patch[0], FRAMES)
        frames = max(frames, self._scenes) * patch[0]
        scenes = [frames // 2, frames - frames // 2] if self._scenes == 2 else [frames]
        side = SIDE * spec.spatial
        return self.model.geometry(
            spec.pixel_frames(frames), side * patch[1], side * patch[2], video.fps, scenes, batch=1
        )

    def _layout(self, text: Text, given: Given | None = None) -> Layout:
        nothing_BF = torch.zeros(1, self.geometry.grid[0], dtype=torch.bool, device=self.model.device)
        return self.model.plan.layout(self.geometry, text, nothing_BF if given is None else given.given_BF)

    def _given(self, clean_BFSC: Tensor) -> Given:
        given_BF = torch.zeros(1, self.geometry.grid[0], dtype=torch.bool, device=self.model.device)
        given_BF[:, 0] = True
        return Given(clean_BFSC, given_BF)

    def _with_given(self, clean_BFSC: Tensor) -> Tensor:
        given = self._given(clean_BFSC)
        layout = self._layout(self.text, given)
        with torch.no_grad():
            streams = self._streams(layout, given.clean_BFSC, self.x_BFSC, 0.5, self.text)
            return read_video(layout, self._velocity(streams))

    def _streams(self, layout: Layout, clean: Tensor, x: Tensor, sigma: float, text: Text) -> Streams:
        sigma_BD = torch.full((1, layout.num_draws), sigma, device=self.model.device)
        return to_streams_at(layout, clean, x, layout.levels(sigma_BD), text)

    def _velocity(self, streams: Streams) -> Tensor:
        return self.model.predictor.velocity(streams, self.layout.visibility)["video"]

    def _answer(self, x: Tensor | None = None, sigma: float = 0.5, text: Text | None = None) -> Tensor:
        x, text = self.x_BFSC if x is None else x, self.text if text is None else text
        layout = self._layout(text)
        with torch.no_grad():
            return read_video(layout, self._velocity(self._streams(layout, x, x, sigma, text)))

    def _text_with_gradient(self) -> Text:
        """The caption encoded so that a trained encoder is part of the graph."""
        from motionloom.text import encode_scenes

        if not self.model.text_encoder.trainable:
            return self.text
        return encode_scenes(self.model.text_encoder, [[CAPTIONS[0]] * self._scenes])

    def _reach(self, attributes: list[Attributes]) -> Tensor:
        """(N, N): True where a query can learn of a key through any number of layers."""
        joined = join_attributes(attributes)
        reach_NN = self.layout.visibility.allows(joined.queries(), joined.keys())[0].float()
        reach_NN.fill_diagonal_(1.0)
        while True:
            further_NN = ((reach_NN @ reach_NN) > 0).float()
            if torch.equal(further_NN, reach_NN):
                return reach_NN.bool()
            reach_NN = further_NN

    def _change(self, answer_BFSC: Tensor) -> float:
        return _rms(answer_BFSC - self.base_BFSC) / max(_rms(self.base_BFSC), 1e-12)


def _rms(x: Tensor) -> float:
    return float(x.float().square().mean().sqrt())


def _must_matter(check: str, change: float, what: str, mend: str) -> Finding:
    if change > SOMETHING:
        return Finding(check, "ok", f"{what} changes the output by {change:.2g} of its size")
    return Finding(check, "wrong", f"{what} has no influence on the output ({change:.1g})", mend)
