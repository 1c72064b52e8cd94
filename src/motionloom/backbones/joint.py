"""Joint text-video transformer: words and video tokens in one attention, 3D rotary positions on the video.

One stream with weights shared by both modalities, as in CogVideoX (arXiv 2408.06072); each modality has its
own adaLN-Zero modulation, which is what its "expert" layer norm amounts to. Any visibility is exact.

Sound (``model.audio_dim``) is a second stream of the same kind and of a width of its own, with words of its
own and noise levels of its own; in each block its tokens and the video's ask each other by their seconds
(LTX-2, arXiv 2601.03233). Without that attention neither hears of the other, and its gates start at zero: a
model with sound that starts from weights without answers for the video as these do, to the bit. A stream that
is absent leaves out its half. Words beside sound stand at no noise level, since theirs is the video's.

With a cache the words run once, alone, and chunks run without them: words then see words only, as every
causal visibility says, and stand at one noise level that must not change.

Tokens are turned by their seconds and words are not turned, so what video asks of the words depends on
absolute time: a short clip knows its beginning by it, a long stream would leave the seconds that training
showed. A cache with relative positions keeps to them.

Shapes: B batch, L text tokens, N tokens of a stream, J = L + N (with a cache one of them is 0), K noise
levels, P modulation parts, D width of a stream, C channels of a token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from motionloom.backbones.base import Perturbation
from motionloom.backbones.joint_block import (
    ASKS,
    OFFERS,
    PARTS,
    Block,
    Context,
    Cross,
    Crossing,
    Given,
    Sight,
    SoundBlock,
    Streamed,
)
from motionloom.backbones.joint_reach import Reach
from motionloom.backbones.parts import Dropout, Entry, Exit, run_blocks, run_cached
from motionloom.config.recipe import ModelConfig
from motionloom.nn.cache import KVCache, Pair, Past
from motionloom.nn.init import init_linears
from motionloom.nn.modulation import NoiseModulation, one_hot_levels
from motionloom.nn.norms import rms_norm
from motionloom.nn.rope import Rotary
from motionloom.plans.stream import Stream, Streams
from motionloom.plans.visibility import Visibility


class SoundEntry(nn.Module):
    """Latents of sound and words -> tokens of the width of sound."""

    def __init__(self, channels: int, text_dim: int, dim: int) -> None:
        super().__init__()
        self.sound = nn.Linear(channels, dim)
        self.text = nn.Linear(text_dim, dim)

    def sounds(self, audio: Stream, batch: int) -> Tensor:
        """The sound alone, (B, N, D)."""
        dtype = self.sound.weight.dtype
        return self.sound(audio.x_BNC.to(dtype)).to(dtype).expand(batch, -1, -1)

    def words(self, text: Stream, batch: int) -> Tensor:
        """The text alone, (B, L, D)."""
        dtype = self.sound.weight.dtype
        return self.text(rms_norm(text.x_BNC.to(dtype))).to(dtype).expand(batch, -1, -1)


class Leaving(NamedTuple):
    """What the exit is modulated by."""

    modulation_BK2D: Tensor
    one_hot_BNK: Tensor | None


class Joint(nn.Module):
    """See the top of this file. ``forward`` as in :class:`~motionloom.backbones.base.Backbone`.

    Args:
        audio_channels: of a latent of sound; read where ``config.audio_dim`` asks for sound.
    """

    latent_layers = ("entry.video", "exit.out", "audio_entry.sound", "audio_exit.out")

    def __init__(
        self, config: ModelConfig, latent_channels: int, text_dim: int, audio_channels: int = 0
    ) -> None:
        super().__init__()
        self.config = config
        self.patch = config.patch
        self.sound = config.audio_dim > 0
        self.modalities: tuple[str, ...] = ("video", "audio") if self.sound else ("video",)
        dim, audio_dim, heads = config.dim, config.audio_dim, config.num_heads
        self.head_dim = {"video": dim // heads, "audio": audio_dim // heads}
        token_channels = latent_channels * config.patch[0] * config.patch[1] * config.patch[2]
        self.entry = Entry(token_channels, text_dim, dim)
        self.noise = NoiseModulation(dim, 2 * PARTS + 2)
        blocks = (SoundBlock(config) if self.sound else Block(config, dim) for _ in range(config.depth))
        self.layers = nn.ModuleList(blocks)
        self.exit = Exit(dim, token_channels)
        self.dropout = Dropout(config.dropout)
        if self.sound:
            self.audio_entry = SoundEntry(audio_channels, text_dim, audio_dim)
            self.audio_noise = NoiseModulation(audio_dim, PARTS + 2)
            self.audio_exit = Exit(audio_dim, audio_channels)
            widths = {"video": dim, "audio": audio_dim}
            self.audio_cross_noise = nn.ModuleDict(
                {modality: NoiseModulation(width, ASKS + OFFERS) for modality, width in widths.items()}
            )

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks in order."""
        return list(self.layers)

    def grown(self) -> frozenset[str]:
        """As :class:`~motionloom.backbones.base.Growing`: all that sound adds to a model of video."""
        return frozenset(name for name in self.state_dict() if "audio" in name)

    def init_weights(self, generator: torch.Generator) -> None:
        """Every weight anew; adaLN-Zero makes each block the identity and the prediction zero.

        With sound the video's weights are those that the same generator gives a model without.
        """
        linears = {name: part for name, part in self.named_modules() if isinstance(part, nn.Linear)}
        for of_sound in (False, True):
            now = [part for name, part in linears.items() if ("audio" in name) == of_sound]
            init_linears(nn.ModuleList(now), generator)
        for part in self.modules():
            if isinstance(part, NoiseModulation | Exit | Block | Crossing):
                part.init_weights()

    def new_cache(self, **options: Any) -> KVCache:
        """A cache for :meth:`forward`; options as in :class:`~motionloom.nn.cache.KVCache`."""
        return KVCache(len(self.layers), **options)

    def forward(
        self,
        streams: Streams,
        visibility: Visibility,
        cache: KVCache | None = None,
        *,
        perturb: Perturbation | None = None,
    ) -> dict[str, Tensor]:
        """The prediction for video and sound, where they are present, in the dtype of their latents.

        Args:
            cache: of :meth:`new_cache`; the streams are then those of its present chunk, and all chunks bring
                the same modalities.
        """
        perturb = perturb or Perturbation()
        text, present = streams["text"], tuple(streams[m] for m in self.modalities if m in streams)
        assert len(present) == len(streams) - 1 > 0, f"this model reads {self.modalities}, not {[*streams]}"
        batch = max(len(t) for s in (*present, text) for t in (s.x_BNC, s.sigma_BK))
        reach = Reach(present, text, visibility, cache, len(self.layers), self.head_dim)
        crossing = len(present) == 2 and not perturb.isolate
        if cache is not None:
            reach.check_past(crossing)
            if not reach.holds_words():
                self._hold_words(reach, batch)
        words = text if cache is None else None
        x: Streamed = {}
        given: dict[str, Iterator[Given]] = {}
        leaving: dict[str, Leaving] = {}
        for stream in present:
            name = stream.modality
            x[name] = self._enter(stream, words, batch)
            context, leaving[name] = self._context(
                name, stream.sigma_BK, stream.level_BN, words, reach.tables(stream)
            )
            given[name] = self._given(
                x[name], context, reach.masks(stream), reach.past(stream), perturb.skip_self
            )
        between = self._between(reach) if crossing else iter([{}] * len(self.layers))
        x, left = self._run(x, given, between, cached=cache is not None)
        if cache is not None:
            reach.offer(left)
        return {s.modality: self._leave(s, x[s.modality], leaving[s.modality]) for s in present}

    def _hold_words(self, reach: Reach, batch: int) -> None:
        """Each stream's words through all blocks on their own, into the cache."""
        text = reach.text
        x: Streamed = {}
        given: dict[str, Iterator[Given]] = {}
        for name in (stream.modality for stream in reach.streams):
            x[name] = self._words(name, text, batch)
            nothing_B0, tables = text.level_BN[:, :0], reach.word_tables(name)
            context, _ = self._context(name, text.sigma_BK, nothing_B0, text, tables)
            given[name] = self._given(x[name], context, reach.word_masks(), [()] * len(self.layers), ())
        _, left = self._run(x, given, iter([{}] * len(self.layers)), cached=True)
        reach.hold_words(left)

    def _enter(self, stream: Stream, text: Stream | None, batch: int) -> Tensor:
        """Words, if any, and then tokens, (B, J, D)."""
        if stream.modality == "video":
            tokens_BND = self.entry.pictures(stream, batch)
        else:
            tokens_BND = self.audio_entry.sounds(stream, batch)
        if text is None:
            return tokens_BND
        return torch.cat([self._words(stream.modality, text, batch), tokens_BND], dim=1)

    def _words(self, modality: str, text: Stream, batch: int) -> Tensor:
        return (self.entry if modality == "video" else self.audio_entry).words(text, batch)

    def _leave(self, stream: Stream, x_BJD: Tensor, leaving: Leaving) -> Tensor:
        """Tokens -> the prediction, (B, N, C)."""
        x_BND = x_BJD[:, -stream.x_BNC.shape[1] :]
        leave = self.exit if stream.modality == "video" else self.audio_exit
        return leave(x_BND, *leaving).to(stream.x_BNC.dtype)

    def _context(
        self, modality: str, sigma_BK: Tensor, level_BN: Tensor, text: Stream | None, tables: Rotary
    ) -> tuple[Context, Leaving]:
        """What the blocks share for one stream, and what its exit is modulated by."""
        levels, dtype = sigma_BK.shape[1], self.entry.video.weight.dtype
        one_hot_BNK = one_hot_levels(level_BN, levels, dtype)
        if modality == "video":
            text_BKPD, own_BKPD, exit_BK2D = self.noise(sigma_BK).split([PARTS, PARTS, 2], dim=2)
            if text is None:
                text_one_hot_BLK = one_hot_levels(level_BN[:, :0], levels, dtype)
            else:
                # Words count the video's levels, or have their own.
                if text.sigma_BK is not sigma_BK:
                    text_BKPD = self.noise(text.sigma_BK)[:, :, :PARTS]
                text_one_hot_BLK = one_hot_levels(text.level_BN, text.sigma_BK.shape[1], dtype)
        else:
            own_BKPD, exit_BK2D = self.audio_noise(sigma_BK).split([PARTS, 2], dim=2)
            text_BKPD, text_one_hot_BLK = torch.zeros_like(own_BKPD[:1, :1]), None
        words = 0 if text is None else text.x_BNC.shape[1]
        context = Context(words, text_BKPD, own_BKPD, text_one_hot_BLK, one_hot_BNK, tables)
        return context, Leaving(exit_BK2D, one_hot_BNK)

    def _given(
        self,
        x_BJD: Tensor,
        context: Context,
        masks: Sequence[Sight],
        past: Sequence[Past | None],
        skip_self: Collection[int],
    ) -> Iterator[Given]:
        """For each block. One layer's past at a time: a lean cache makes it when asked."""
        for index, mask in enumerate(masks):
            keep = self.dropout.draw(x_BJD, self.training)
            yield Given(context, mask, keep, past[index], index in skip_self)

    def _between(self, reach: Reach) -> Iterator[dict[str, Cross]]:
        """For each block, what the two streams bring to the attention between them."""
        shared, sights, offered = {}, {}, {}
        for stream, other in (reach.streams, reach.streams[::-1]):
            name, levels = stream.modality, stream.sigma_BK.shape[1]
            modulation_BKPD = self.audio_cross_noise[name](stream.sigma_BK)
            one_hot_BNK = one_hot_levels(stream.level_BN, levels, modulation_BKPD.dtype)
            shared[name] = modulation_BKPD, one_hot_BNK, reach.seconds(stream)
            sights[name], offered[name] = reach.sights(stream, other), reach.offered(other)
        for index in range(len(self.layers)):
            yield {m: Cross(*shared[m], *sights[m][index], offered[m][index]) for m in shared}

    def _run(
        self,
        x: Streamed,
        given: Mapping[str, Iterator[Given]],
        between: Iterator[dict[str, Cross]],
        *,
        cached: bool,
    ) -> tuple[Streamed, list[dict[str, Pair]]]:
        """``x`` through all blocks; and what each left for the cache."""
        start: Any = x
        inputs: Iterable[tuple[Any, ...]]
        if self.sound:
            layers = zip(zip(*given.values(), strict=True), between, strict=True)
            inputs = ((dict(zip(given, halves, strict=True)), cross) for halves, cross in layers)
        else:
            start, inputs = x["video"], ((one,) for one in given["video"])
        if not cached:
            out = run_blocks(self.blocks(), start, inputs, self.config)
            return (out if self.sound else {"video": out}), []
        out, left = run_cached(self.blocks(), start, inputs, self.config.checkpoint_blocks)
        return (out, left) if self.sound else ({"video": out}, [{"video": pair} for pair in left])
