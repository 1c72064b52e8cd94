"""The doctor: in seconds, before a run is paid for, is this model alive and is its data the right data?

Every check perturbs one thing that must matter, or one that must not, and looks at the network's answer.
Layers that start at zero are given small values first (``wake``), since a fresh adaLN-Zero network answers 0
to everything.

Shapes: B batch, F token frames, S cells of a frame, C channels of a token, L text tokens, N tokens that are
made (those of the sound behind those of the video), J = L + N.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from motionloom.data.cache import Cache
from motionloom.data.cache.identity import mismatches
from motionloom.flow import LINEAR
from motionloom.generate import Model
from motionloom.plans import (
    NOTHING,
    Geometry,
    Given,
    Layout,
    Sample,
    Streams,
    Text,
    Values,
    exactly,
    join_attributes,
    read_clip,
    to_streams_at,
)
from motionloom.rng import torch_generator
from motionloom.text import encode_scenes

Status = Literal["ok", "wrong", "warning", "skipped"]

# Relative to the output's RMS. What has no influence leaves the output equal to the bit (a masked weight is
# an exact 0), so this only has to be above nothing; a network in its first steps is moved by 1e-4.
NO_CHANGE = 1e-6
# The doctor looks at a small clip: structure does not depend on size.
SIDE, FRAMES = 4, 8
KEYS = 4
"""How many hidden tokens of each modality are tried."""
# As many words in both: a network that only counts them is deaf.
CAPTIONS = (
    "a small red circle moves left on a dark background",
    "two large green cats sleep under the very light tree",
)
CROSSING = (".av_", "a2v", "v2a", "cross", "audio_to_video", "video_to_audio")
OF_SOUND = ("audio", ".av_", "a2v", "v2a")
"""In the names of parameters that are idle without a stream of sound."""
HOPS = {1: 1, 2: 3}
"""How many looks one block takes, by how many streams it makes: beside its own, each looks at the other's,
which has looked before."""
TEXT_CHECKS = ("text encoder", "text mask", "text")


@dataclass(frozen=True)
class Finding:
    """One check: what was seen, and if it is wrong or doubtful, how to mend it or what to look at."""

    check: str
    status: Status
    seen: str
    mend: str = ""

    def __str__(self) -> str:
        mark = {"ok": "ok     ", "wrong": "WRONG  ", "warning": "warning", "skipped": "skipped"}[self.status]
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
        model: a fresh one must be woken first (:func:`wake`).
        cache: what the model is, or is to be, trained on.
        trained: its tokenizer is the one that it learned with, which the cache must then have.
    """

    def __init__(self, model: Model, cache: Cache | None = None, *, trained: bool = False) -> None:
        self.model, self.cache, self.trained = model, cache, trained
        self.sample = self._sample()
        self.main = "video" if "video" in self.sample.tracks else "audio"
        self.geometry = self.sample.tracks[self.main]
        self.text = model.encode_text(self._captions(0))
        self.x, self.other = self._latents(0), self._latents(1)
        self.base_BFSC = self._answer()
        self._wrong: set[str] = set()

    def examine(self) -> list[Finding]:
        """All checks. One that could only repeat what an earlier one found is skipped and says so."""
        of_network: tuple[Callable[[], Finding], ...] = (
            self.captions_differ,
            self.padding_is_hidden,
            self.text_matters,
            self.noise_level_matters,
            self.time_matters,
            self.space_matters,
            self.given_matters,
            self.given_is_exact,
            self.hidden_is_hidden,
            self.gradients_reach,
        )
        of_data = self.latents_are_scaled, self.cache_is_this_recipes
        findings = [self.answers()]
        if findings[0].status == "wrong":
            findings.append(Finding("all else in the network", "skipped", "mend the output first"))
            of_network = ()
        for check in (*of_network, *of_data):
            findings.append(check())
            if findings[-1].status == "wrong":
                self._wrong.add(findings[-1].check)
        return findings

    def answers(self) -> Finding:
        """The output is finite and not 0."""
        if not torch.isfinite(self.base_BFSC).all():
            return Finding("output", "wrong", "it is not finite", "look for a division or a mask with no key")
        rms = _rms(self.base_BFSC)
        if rms == 0:
            return Finding("output", "wrong", "it is 0 everywhere", "train from weights that are not zero")
        return Finding("output", "ok", f"finite, RMS {rms:.3g}")

    def captions_differ(self) -> Finding:
        """The text encoder gives two captions different embeddings, in the tokens that it calls valid."""
        check, other = "text encoder", self.model.encode_text(self._captions(1))
        if not torch.isfinite(self.text.x_BLC).all():
            return Finding(check, "wrong", "its embeddings are not finite", "look at its weights and dtype")
        words = self.text.x_BLC[self.text.valid_BL]
        if not words.any():
            mend = "the mask is inverted: True must mean that a token is valid"
            return Finding(check, "wrong", "the embeddings of valid tokens are 0", mend)
        both_BL = self.text.valid_BL & other.valid_BL
        change = _rms((self.text.x_BLC - other.x_BLC)[both_BL]) / _rms(words)
        if change <= NO_CHANGE:
            mend = "it is constant: look at its weights and at the ids that reach them"
            return Finding(check, "wrong", "two captions have the same embedding", mend)
        return Finding(check, "ok", f"two captions differ by {change:.2g} of their size")

    def padding_is_hidden(self) -> Finding:
        """What stands in padding has no influence."""
        padding_BL1 = ~self.text.valid_BL[..., None]
        rule = self.model.recipe.text_encoder
        if rule.type == "ltx2" or rule.padding != "hidden":
            stands = (
                "learned registers stand in its place" if rule.type == "ltx2" else f"it is {rule.padding}"
            )
            return Finding("text mask", "skipped", f"padding is read by design ({stands}): nothing is masked")
        if not padding_BL1.any():
            return Finding("text mask", "skipped", "the caption fills max_length: there is no padding")
        leak = self._change(self._answer(text=self._noise_where(padding_BL1)))
        if leak <= NO_CHANGE:
            return Finding("text mask", "ok", "padding has no influence")
        if self._change(self._answer(text=self._noise_where(~padding_BL1))) <= NO_CHANGE:
            mend = "the mask is inverted: True must mean that a token is valid"
            return Finding("text mask", "wrong", "only padding is attended to", mend)
        mend = "hand Stream.valid_BN to the attention as its key mask"
        return Finding("text mask", "wrong", f"padding changes the output by {leak:.2g}", mend)

    def text_matters(self) -> Finding:
        """Another caption gives another output."""
        if because := self._wrong.intersection(TEXT_CHECKS):
            return Finding("text", "skipped", f"mend the {because.pop()} first")
        other = self.model.encode_text(self._captions(1))
        change = self._change(self._answer(text=other))
        return _must_matter("text", change, "the caption", "let the video's tokens attend to the text stream")

    def noise_level_matters(self) -> Finding:
        """Another noise level gives another output."""
        change = self._change(self._answer(sigma=0.9))
        return _must_matter(
            "noise level", change, "sigma", "check the embedding of Stream.sigma_BK and its modulation"
        )

    def time_matters(self) -> Finding:
        """The same frames at twice the distance give another output."""
        if self.geometry.grid[0] < 2:
            return Finding("time", "skipped", "there is one frame")
        slower = replace(self.geometry, seconds_BF=2 * self.geometry.seconds_BF)
        change = self._change(self._answer(geometry=slower, apart=(2, 1, 1)))
        mend = "use the seconds of Stream.position_BN3, or the frames of Stream.cell_BN3"
        return _must_matter("time", change, "a token's time", mend)

    def space_matters(self) -> Finding:
        """The same cells at twice the distance give another output."""
        if self.main == "audio":
            return Finding("space", "skipped", "sound has no place in a picture")
        down, right = self.geometry.pixels_per_cell
        wider = replace(self.geometry, pixels_per_cell=(2 * down, 2 * right))
        change = self._change(self._answer(geometry=wider, apart=(1, 2, 2)))
        mend = "use the pixels of Stream.position_BN3, or the rows and columns of Stream.cell_BN3"
        return _must_matter("space", change, "a token's place", mend)

    def given_matters(self) -> Finding:
        """A given frame changes what is made of the others."""
        if self.geometry.grid[0] < 2:
            return Finding("given frames", "skipped", "there is one frame")
        a, b = (self._answer(first=clean)[:, 1:] for clean in (self.x, self.other))
        change = _rms(a - b) / max(_rms(a), 1e-12)
        return _must_matter("given frames", change, "the given frame", "let later tokens see the given ones")

    def given_is_exact(self) -> Finding:
        """Given tokens enter bit-identical, at sigma 0, with no loss on them."""
        check = "given frames are exact"
        if self.geometry.grid[0] < 2:
            return Finding(check, "skipped", "there is one frame")
        layout = self._layout(self.text, self._first())
        stream = self._streams(layout, self.other, 0.5, self.text)[self.main]

        def of_frame(t_BN: Tensor) -> Tensor:
            # The context copies of teacher forcing stand in front; the clip is the tail.
            return t_BN.unflatten(1, (stream.grid[0], -1))[:, -self.geometry.grid[0]]

        mend = "build streams with plans.to_streams, which copies given tokens"
        if not torch.equal(of_frame(stream.x_BNC), self.other[self.main][:, 0]):
            return Finding(check, "wrong", "they change on the way in", mend)
        if of_frame(stream.sigma_BN).any() or of_frame(stream.loss_BN).any():
            return Finding(check, "wrong", "they have a noise level or count in the loss", mend)
        return Finding(check, "ok", "bit-identical, at noise level 0, not in the loss")

    def hidden_is_hidden(self) -> Finding:
        """A token that a query may not see, at once or through other tokens, has no influence on it.

        The whole network is held against everything that can be reached through any number of layers; its
        first block alone against the visibility itself, which many layers wash out.
        """
        layout = self._layout(self.text)
        streams = self._streams(layout, self.x, 0.5, self.text)
        joined = join_attributes([stream.attributes for stream in streams.values()])
        sees_JJ = layout.visibility.allows(joined.queries(), joined.keys())[0]
        sees_JJ = sees_JJ | torch.eye(len(sees_JJ), dtype=torch.bool, device=sees_JJ.device)
        words = streams["text"].grid[2]
        if sees_JJ[words:].all():
            return Finding("hidden tokens", "ok", "this plan hides nothing from what is made")
        block_JJ = torch.linalg.matrix_power(sees_JJ.float(), HOPS[len(layout.tracks)])
        if getattr(self.model.predictor.backbone, "words_first", False):
            told_JJ = torch.eye(len(sees_JJ)).to(block_JJ)
            told_JJ[:, :words] += sees_JJ[:, :words]
            block_JJ = block_JJ @ told_JJ
        block_JJ = block_JJ > 0
        with torch.no_grad():
            leak = self._leak(streams, layout, _reach(sees_JJ)[words:])
            with self._first_block_alone():
                leak = max(leak, self._leak(streams, layout, block_JJ[words:]))
        if leak > NO_CHANGE:
            mend = "a mask is missing somewhere: compare the backbone with plans.dense_mask"
            return Finding("hidden tokens", "wrong", f"one changes the output by {leak:.2g}", mend)
        return Finding("hidden tokens", "ok", "they have no influence")

    def gradients_reach(self) -> Finding:
        """Every parameter that is to be trained gets a gradient that is not 0."""
        modules: dict[str, object] = {"backbone": self.model.predictor.backbone}
        if self._learns_text:
            modules["text_encoder"] = self.model.text_encoder
        named = {
            f"{name}.{path}": parameter
            for name, module in modules.items()
            if isinstance(module, nn.Module)
            for path, parameter in module.named_parameters()
        }
        dead = self._without_gradient(named)
        # A network of sound and pictures trains as well where one of them is not there: half of it rests.
        resting = [name for name in dead if self._rests(name)]
        dead = [name for name in dead if name not in resting]
        if dead:
            shown = ", ".join(dead[:3]) + (f" and {len(dead) - 3} more" if len(dead) > 3 else "")
            mend = "let them take part in the output, or remove them"
            if frozen := [name for name in dead if not named[name].requires_grad]:
                mend = f"set requires_grad on them ({len(frozen)} are frozen), or do not call them trained"
            seen = f"{len(dead)} of {len(named)} parameters get none: {shown}"
            return Finding("gradients", "wrong", seen, mend)
        lacks = "pictures" if self.main == "audio" else "sound"
        rest = f"; {len(resting)} are for {lacks}, of which there is none" if resting else ""
        return Finding("gradients", "ok", f"reach all {len(named) - len(resting)} parameters{rest}")

    def _rests(self, name: str) -> bool:
        """Whether a parameter may be idle, since its modality is not there."""
        if len(self.sample.tracks) > 1:
            return False
        of_sound = any(mark in name for mark in OF_SOUND)
        crosses = any(mark in name for mark in CROSSING)
        return of_sound if self.main == "video" else not of_sound or crosses

    def _without_gradient(self, named: dict[str, nn.Parameter]) -> list[str]:
        """Names of the parameters that the output's size does not depend on."""
        wanted = [parameter for parameter in named.values() if parameter.requires_grad]
        with torch.enable_grad():
            if self._learns_text:
                text = encode_scenes(self.model.text_encoder, self._captions(0))
            else:
                text = self._noise_where(torch.ones_like(self.text.valid_BL[..., None]))
            layout = self._layout(text)
            answers = self._predict(layout, self._streams(layout, self.x, 0.5, text))
            loss = torch.stack([answer.square().mean() for answer in answers.values()]).sum()
            if not loss.requires_grad:
                return list(named)
            gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
        alive = {id(p) for p, g in zip(wanted, gradients, strict=True) if g is not None and bool(g.any())}
        return [name for name, parameter in named.items() if id(parameter) not in alive]

    def latents_are_scaled(self) -> Finding:
        """The cached latents have the scale of the noise: deviation near 1 over all channels, means near 0.

        Channels may differ (``tokenizer.whiten``), as those of many learned tokenizers do.
        """
        if self.cache is None:
            return Finding("latent scale", "skipped", "no cache was named (--cache)")
        mean_C, std_C = self.cache.statistics()
        scale, off = _rms(std_C), float(mean_C.abs().max())
        seen = (
            f"deviation {scale:.3g} (channels {float(std_C.min()):.2g} to {float(std_C.max()):.2g}), "
            f"means up to {off:.2g}"
        )
        if not 0.5 <= scale <= 2.0 or off > 1.0:
            if self.model.recipe.tokenizer.type != "patch":
                mend = (
                    "a published VAE has 1 and 0 over the clips that it was made for: yours are unlike them "
                    "(flat colours, drawings), which may well train, or it is not the VAE of these weights: "
                    "look at the clips as it sees them with motionloom inspect CACHE"
                )
                return Finding("latent scale", "warning", seen, mend)
            mend = "noise has 1 and 0: normalise in the tokenizer, then make the cache again"
            return Finding("latent scale", "wrong", seen, mend)
        return Finding("latent scale", "ok", seen)

    def cache_is_this_recipes(self) -> Finding:
        """The cache is the one that this recipe would make."""
        if self.cache is None:
            return Finding("cache", "skipped", "no cache was named (--cache)")
        tokenizer = self.model.tokenizer if self.trained else None
        if wrong := mismatches(self.cache.identity, self.model.recipe, tokenizer=tokenizer):
            mend = "make it again: motionloom cache RECIPE --manifest M --out NEW"
            return Finding("cache", "wrong", f"made otherwise: {'; '.join(wrong)}", mend)
        return Finding("cache", "ok", f"the one that this recipe makes, {len(self.cache)} clips")

    # How the questions are put

    def _captions(self, which: int) -> list[list[str]]:
        """One sample, the same caption in every scene."""
        return [[CAPTIONS[which]] * (1 + int(self.geometry.scene_BF.max()))]

    @property
    def _learns_text(self) -> bool:
        """Whether gradients should reach the text encoder; not while text does not get through anyway."""
        return self.model.text_encoder.trainable and not self._wrong.intersection(TEXT_CHECKS)

    def _sample(self) -> Sample:
        """A small clip of this recipe's kind, in two scenes: plans without scenes do not mind."""
        spec, patch = self.model.tokenizer.spec, self.model.patch
        latent_frames = spec.latent_grid(self.model.clip_shape[0], spec.spatial, spec.spatial)[0]
        frames = min(latent_frames // patch[0], FRAMES)
        scenes = [part * patch[0] for part in (frames // 2, frames - frames // 2) if part]
        shots = [spec.pixel_frames(scenes[0])]
        if len(scenes) > 1:
            alone = self.model.shots_alone(2)
            rest = spec.pixel_frames(scenes[1]) if alone else spec.pixel_frames(sum(scenes)) - shots[0]
            shots.append(rest)
        side = SIDE * spec.spatial
        return self.model.sample(shots, side * patch[1], side * patch[2], self.model.fps, batch=1)

    def _latents(self, which: int) -> dict[str, Tensor]:
        found, audio = {}, self.model.audio_tokenizer
        for modality, geometry in self.sample.tracks.items():
            channels = self.model.token_channels
            if modality == "audio":
                assert audio is not None
                channels = audio.spec.channels
            shape = (2, 1, geometry.grid[0], geometry.cells, channels)
            generator = torch_generator("doctor", "latents", *([] if modality == "video" else [modality]))
            found[modality] = torch.randn(shape, generator=generator)[which].to(self.model.device)
        return found

    def _first(self) -> Given:
        """The first frame given."""
        index_N = torch.arange(self.geometry.tokens, device=self.model.device)
        return Given({self.main: exactly((index_N < self.geometry.cells)[None])})

    def _layout(self, text: Text, given: Given = NOTHING, geometry: Geometry | None = None) -> Layout:
        tracks = {**self.sample.tracks, self.main: geometry or self.geometry}
        return self.model.plan.layout(replace(self.sample, tracks=tracks), text, given)

    def _streams(self, layout: Layout, clean: Mapping[str, Tensor], sigma: float, text: Text) -> Streams:
        """What is made at ``x``, what is given of ``clean``."""
        levels = {
            m: track.sigmas(torch.full((1, track.num_draws), sigma, device=self.model.device))
            for m, track in layout.tracks.items()
        }
        return to_streams_at(layout, Values(clean), self.x, self.x, levels, text, LINEAR.mix)

    def _predict(self, layout: Layout, streams: Streams) -> dict[str, Tensor]:
        """The network's own answers (B, N, C): as velocities they would depend on sigma, whatever the network
        made of it."""
        return self.model.predictor.backbone(streams, layout.visibility)

    @torch.no_grad()
    def _answer(
        self,
        sigma: float = 0.5,
        text: Text | None = None,
        first: Mapping[str, Tensor] | None = None,
        geometry: Geometry | None = None,
        apart: tuple[int, int, int] = (1, 1, 1),
    ) -> Tensor:
        """The network's answer for the clip (B, F, S, C), with what is asked for otherwise.

        Args:
            first: a clip whose first frame is given.
            apart: how many cells (frames, rows, columns) lie from one token to the next.
        """
        text = self.text if text is None else text
        layout = self._layout(text, NOTHING if first is None else self._first(), geometry)
        streams = self._streams(layout, self.x if first is None else first, sigma, text)
        stream = streams[self.main]
        cell_BN3 = stream.cell_BN3 * torch.tensor(apart, device=stream.cell_BN3.device)
        answers = self._predict(layout, {**streams, self.main: replace(stream, cell_BN3=cell_BN3)})
        return read_clip(layout, self.main, answers[self.main])

    def _noise_where(self, where_BL1: Tensor) -> Text:
        """The caption with noise in the place of some embeddings."""
        noise = torch.randn(self.text.x_BLC.shape, generator=torch_generator("doctor", "text"))
        return replace(self.text, x_BLC=torch.where(where_BL1, noise.to(self.text.x_BLC), self.text.x_BLC))

    def _leak(self, streams: Streams, layout: Layout, sees_NJ: Tensor) -> float:
        """The largest change of a token that is made by one that it should not know of, relative to its
        modality's output."""
        base = self._predict(layout, streams)
        worst = 0.0
        lengths = [stream.x_BNC.shape[1] for stream in streams.values()]
        for modality, hidden_NK in zip(streams, (~sees_NJ).split(lengths, dim=1), strict=True):
            stream = streams[modality]
            if stream.valid_BN is not None:
                hidden_NK = hidden_NK & stream.valid_BN
            keys = hidden_NK.any(dim=0).nonzero().flatten()
            for key in keys[torch.linspace(0, len(keys) - 1, min(KEYS, len(keys))).long()].tolist():
                x_BKC = stream.x_BNC.clone()
                x_BKC[:, key] += 1.0
                found = self._predict(layout, {**streams, modality: replace(stream, x_BNC=x_BKC)})
                difference_N = torch.cat(
                    [
                        (found[m] - base[m]).abs().amax(dim=(0, 2)) / max(_rms(base[m]), 1e-12)
                        for m in layout.tracks
                    ]
                )
                worst = max(worst, float(difference_N[hidden_NK[:, key]].max()))
        return worst

    @contextmanager
    def _first_block_alone(self) -> Iterator[None]:
        """All blocks but the first hand their input on."""
        later = self.model.predictor.backbone.blocks()[1:]
        hooks = [block.register_forward_hook(lambda _, inputs, output: inputs[0]) for block in later]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _change(self, answer_BFSC: Tensor) -> float:
        return _rms(answer_BFSC - self.base_BFSC) / max(_rms(self.base_BFSC), 1e-12)


def _reach(sees_JJ: Tensor) -> Tensor:
    """(J, J): True where a query can learn of a key through any number of layers."""
    reach_JJ = sees_JJ.float()
    while True:
        further_JJ = ((reach_JJ @ reach_JJ) > 0).float()
        if torch.equal(further_JJ, reach_JJ):
            return reach_JJ.bool()
        reach_JJ = further_JJ


def _rms(x: Tensor) -> float:
    return float(x.float().square().mean().sqrt())


def _must_matter(check: str, change: float, what: str, mend: str) -> Finding:
    if change > NO_CHANGE:
        return Finding(check, "ok", f"{what} changes the output by {change:.2g} of its size")
    return Finding(check, "wrong", f"{what} has no influence on the output", mend)
