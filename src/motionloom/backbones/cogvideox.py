"""CogVideoX (arXiv 2408.06072): words and video tokens in one sequence, and DDPM inside.

2B (sincos positions), 5B (3D RoPE), 1.5 (two latent frames per token) and image to video. Weights are named
as in diffusers' ``CogVideoXTransformer3DModel``. The modalities share all weights but the outputs of the
adaptive norms, of which each has its own ("expert" norms). With one noise level the answer is the original's;
every token may also have its own, words included, which is what the second mask of Mask2DiT (arXiv
2503.19881) asks for.

The network was trained on DDPM's states at whole timesteps and answers with v; what goes in and out here is
the project's: see :meth:`CogVideoX.forward`, and :meth:`CogVideoX.network` for the bare network.

Shapes: B batch, L text tokens, N video tokens, J = L + N, K noise levels, P parts of the modulation, D width,
E width of the embedded noise level, H heads, d = D/H, C channels of a token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from motionloom.backbones.base import Perturbation
from motionloom.backbones.cogvideox_keys import ORIGINAL_KEYS
from motionloom.backbones.cogvideox_sizes import PRESETS, CogVideoXSizes
from motionloom.errors import UserError
from motionloom.flow import DiscretePrediction, state_norm
from motionloom.nn.attention import Pattern, attend, join_heads
from motionloom.nn.init import fill, init_linears
from motionloom.nn.mlp import FeedForward
from motionloom.nn.modulation import TimestepEmbedding, at_levels
from motionloom.nn.rope import Rotary, index_rotary, rotate_pairs
from motionloom.plans.lower import lower, per_block
from motionloom.plans.stream import Stream, Streams, join_attributes
from motionloom.plans.visibility import Visibility

__all__ = ["ORIGINAL_KEYS", "PRESETS", "CogVideoX", "CogVideoXSizes"]

PARTS = 6
"""Shift, scale and gate of the video, then of the words."""
OFFSET = 2.0
"""What 1.5 image-to-video embeds beside the timestep, in all training and sampling."""


class Noise(NamedTuple):
    """How noisy the tokens of one modality are."""

    time_BKE: Tensor
    """Each level, embedded."""
    level_BN: Tensor | None
    """None where there is one level."""


class Context(NamedTuple):
    """What blocks share; all of them, where the visibility is the same in all."""

    text: Noise
    video: Noise
    rotary: Rotary | None
    """(B or 1, J, 1, d); None for models without."""
    pattern: Pattern | Tensor | None
    """How the sequence sees itself, from ``lower``."""
    skip_self: bool = False
    """Attention hands on the values of the video."""


class AdaNorm(nn.Module):
    """LayerNorm, then each modality shifted and scaled by its own noise."""

    def __init__(self, sizes: CogVideoXSizes) -> None:
        super().__init__()
        self.linear = nn.Linear(sizes.time_embed_dim, PARTS * sizes.dim)
        self.norm = nn.LayerNorm(sizes.dim, sizes.norm_eps, sizes.norm_elementwise_affine)

    def forward(self, x_BJD: Tensor, words: int, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """The sequence, and the gates of words and video for what becomes of it."""
        video = at_levels(self._parts(context.video)[:, :, :3], context.video.level_BN)
        text = at_levels(self._parts(context.text)[:, :, 3:], context.text.level_BN)
        x_BJD = self.norm(x_BJD)
        halves = [_affine(x_BJD[:, :words], *text[:2]), _affine(x_BJD[:, words:], *video[:2])]
        return torch.cat(halves, dim=1), text[2], video[2]

    def _parts(self, noise: Noise) -> Tensor:
        return self.linear(F.silu(noise.time_BKE)).unflatten(-1, (PARTS, -1))


class Attention(nn.Module):
    """Everyone with everyone that the visibility allows; queries and keys are normalised in each head."""

    def __init__(self, sizes: CogVideoXSizes) -> None:
        super().__init__()
        dim, head_dim = sizes.dim, sizes.attention_head_dim
        self.heads = sizes.num_attention_heads
        self.to_q = nn.Linear(dim, dim, bias=sizes.attention_bias)
        self.to_k = nn.Linear(dim, dim, bias=sizes.attention_bias)
        self.to_v = nn.Linear(dim, dim, bias=sizes.attention_bias)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q = nn.LayerNorm(head_dim, eps=1e-6)
        self.norm_k = nn.LayerNorm(head_dim, eps=1e-6)

    def forward(self, x_BJD: Tensor, words: int, context: Context) -> Tensor:
        q, k, v = (p(x_BJD).unflatten(-1, (self.heads, -1)) for p in (self.to_q, self.to_k, self.to_v))
        q, k = self.norm_q(q), self.norm_k(k)
        if context.rotary is not None:
            q, k = (rotate_pairs(t, context.rotary) for t in (q, k))
        q, k, v = (t.to(v.dtype).transpose(1, 2) for t in (q, k, v))
        y_BJD = join_heads(attend(q, k, v, context.pattern))
        if context.skip_self:
            y_BJD = torch.cat([y_BJD[:, :words], join_heads(v[:, :, words:])], dim=1)
        return self.to_out[0](y_BJD)


class Block(nn.Module):
    """Attention and feed-forward over words and video together."""

    def __init__(self, sizes: CogVideoXSizes) -> None:
        super().__init__()
        self.norm1 = AdaNorm(sizes)
        self.attn1 = Attention(sizes)
        self.norm2 = AdaNorm(sizes)
        self.ff = FeedForward(sizes.dim, 4 * sizes.dim, sizes.dim)

    def forward(self, x_BJD: Tensor, words: int, context: Context) -> Tensor:
        y_BJD, *gates = self.norm1(x_BJD, words, context)
        x_BJD = x_BJD + _gated(self.attn1(y_BJD, words, context), words, *gates)
        y_BJD, *gates = self.norm2(x_BJD, words, context)
        return x_BJD + _gated(self.ff(y_BJD), words, *gates)


class FlatConv(nn.Conv2d):
    """A convolution whose stride is its kernel, on tokens that already are patches: one matrix product."""

    def forward(self, x_BNC: Tensor) -> Tensor:
        return F.linear(x_BNC, self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """Latents and words -> tokens of width D."""

    pos_embedding: Tensor
    """(1, longest text + tokens of the trained size, D); only where positions are learned."""

    def __init__(self, sizes: CogVideoXSizes) -> None:
        super().__init__()
        side, frames = sizes.patch_size, sizes.patch_size_t
        self.cells = side * side * (frames or 1)
        self.proj = (
            FlatConv(sizes.in_channels, sizes.dim, side, bias=sizes.patch_bias)
            if frames is None
            else nn.Linear(sizes.in_channels * self.cells, sizes.dim)
        )
        self.text_proj = nn.Linear(sizes.text_embed_dim, sizes.dim)
        if sizes.use_learned_positional_embeddings:
            frames, rows, columns = sizes.base_grid
            places = torch.empty(1, sizes.max_text_seq_length + frames * rows * columns, sizes.dim)
            self.register_buffer("pos_embedding", places)

    def forward(self, x_BNC: Tensor, extra_BNC: Tensor | None, text_BLC: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, D) and (B, N, D). A token's channels are the cells of its patch, each with all its channels;
        the weights want them channel by channel."""
        x = x_BNC.unflatten(-1, (self.cells, -1))
        if extra_BNC is not None:
            x = torch.cat([x, extra_BNC.to(x.dtype).unflatten(-1, (self.cells, -1))], dim=-1)
        return self.text_proj(text_BLC), self.proj(x.transpose(-1, -2).flatten(-2))


class ExitNorm(nn.Module):
    """LayerNorm, shifted and scaled by the noise."""

    def __init__(self, sizes: CogVideoXSizes) -> None:
        super().__init__()
        self.linear = nn.Linear(sizes.time_embed_dim, 2 * sizes.dim)
        self.norm = nn.LayerNorm(sizes.dim, sizes.norm_eps, sizes.norm_elementwise_affine)

    def forward(self, x_BND: Tensor, noise: Noise) -> Tensor:
        parts_BK2D = self.linear(F.silu(noise.time_BKE)).unflatten(-1, (2, -1))
        return _affine(self.norm(x_BND), *at_levels(parts_BK2D, noise.level_BN))


class CogVideoX(nn.Module):
    """See the top of this file. ``forward`` as in :class:`~motionloom.backbones.base.Backbone`.

    Args:
        checkpoint_blocks: recompute blocks in the backward pass.
    """

    modalities: tuple[str, ...] = ("video",)

    def __init__(self, sizes: CogVideoXSizes, *, checkpoint_blocks: bool = False) -> None:
        super().__init__()
        self.sizes, self.checkpoint_blocks = sizes, checkpoint_blocks
        self.patch = sizes.patch
        self.latent_channels, self.text_dim = sizes.out_channels, sizes.text_embed_dim
        self.schedule = sizes.schedule
        """The noise levels that the network knows. Training draws from it, and sampling steps on them to the
        clean end; heun also asks there, which goes in as the cleanest of them (timestep 0)."""
        self.patch_embed = PatchEmbed(sizes)
        self.time_embedding = TimestepEmbedding(sizes.dim, sizes.time_embed_dim)
        if sizes.ofs_embed_dim is not None:
            self.ofs_embedding = TimestepEmbedding(sizes.ofs_embed_dim, sizes.ofs_embed_dim)
        self.transformer_blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.num_layers))
        self.norm_final = nn.LayerNorm(sizes.dim, sizes.norm_eps, sizes.norm_elementwise_affine)
        self.norm_out = ExitNorm(sizes)
        self.proj_out = nn.Linear(sizes.dim, sizes.out_channels * self.patch_embed.cells)

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks in order."""
        return list(self.transformer_blocks)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Every weight anew; adaLN-Zero makes each block the identity and the network's answer zero."""
        init_linears(self, generator)
        proj = self.patch_embed.proj
        if isinstance(proj, FlatConv):
            proj.weight.normal_(std=proj.weight[0].numel() ** -0.5, generator=generator)
            if proj.bias is not None:
                fill(0.0, proj.bias)
        for part in self.modules():
            if isinstance(part, AdaNorm):
                fill(0.0, part.linear.weight, part.linear.bias)
            if isinstance(part, nn.LayerNorm) and part.elementwise_affine:
                fill(1.0, part.weight)
                fill(0.0, part.bias)
        fill(0.0, self.norm_out.linear.weight, self.norm_out.linear.bias)
        fill(0.0, self.proj_out.weight, self.proj_out.bias)
        if self.sizes.use_learned_positional_embeddings:
            places = self.patch_embed.pos_embedding
            cells = torch.cartesian_prod(
                *(torch.arange(n, device=places.device) for n in self.sizes.base_grid)
            )
            fill(0.0, places)
            places[:, self.sizes.max_text_seq_length :] = _sincos(cells[None], self.sizes, places.dtype)

    def forward(
        self, streams: Streams, visibility: Visibility, *, perturb: Perturbation | None = None
    ) -> dict[str, Tensor]:
        """The velocity of the video, in the dtype of its latents.

        A token at sigma on the linear path is DDPM's state up to the factor ``state_norm(sigma)``; its
        timestep is the schedule's, fractional between trained levels, and 0 for given tokens, which go in
        clean.
        """
        video, text = streams["video"], streams["text"]
        sigma_BN = video.sigma_BN
        x_BNC = video.x_BNC / state_norm(sigma_BN)[..., None]
        v_BNC = self.network(
            streams,
            visibility,
            x_BNC.to(video.x_BNC.dtype),
            self.schedule.timestep(video.sigma_BK),
            self.schedule.timestep(text.sigma_BK),
            perturb,
        )
        return {"video": DiscretePrediction(self.schedule, "v").velocity(v_BNC, video.x_BNC, sigma_BN)}

    def network(
        self,
        streams: Streams,
        visibility: Visibility,
        x_BNC: Tensor,
        t_BK: Tensor,
        text_t_BK: Tensor,
        perturb: Perturbation | None = None,
    ) -> Tensor:
        """The bare network: v (B, N, C) for the video at DDPM's state ``x_BNC``.

        Everything but the latents and noise levels of the video is read from the streams.

        Args:
            t_BK: timestep of each of the video's noise levels, 0 .. steps - 1; ``text_t_BK`` of the text's.

        Raises:
            UserError: the streams do not bring the given image's channels, or the learned positions do not
                have theirs.
        """
        video, text = streams["video"], streams["text"]
        x_BJD, words = self._enter(video, text, x_BNC)
        attributes = join_attributes([text.attributes, video.attributes])
        valid, noise = _valid(text, video), (self._noise(text, text_t_BK), self._noise(video, t_BK))
        rotary = self._rotary(video, words, x_BJD.dtype)
        contexts = per_block(
            visibility,
            len(self.transformer_blocks),
            lambda rule: Context(*noise, rotary, lower(rule, attributes, attributes, valid)),
        )
        if perturb is not None:
            contexts = [c._replace(skip_self=i in perturb.skip_self) for i, c in enumerate(contexts)]
        for block, context in zip(self.transformer_blocks, contexts, strict=True):
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x_BJD = checkpoint(
                    block, x_BJD, words, context, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x_BJD = block(x_BJD, words, context)
        out_BNC = self.proj_out(self.norm_out(self.norm_final(x_BJD[:, words:]), noise[1]))
        # Channel by channel, as the weights have it -> cell by cell.
        return out_BNC.unflatten(-1, (self.latent_channels, -1)).transpose(-1, -2).flatten(-2)

    def _enter(self, video: Stream, text: Stream, x_BNC: Tensor) -> tuple[Tensor, int]:
        """The sequence (B, J, D) with whatever positions are added to it, and how many of it are words."""
        if (video.extra_BNC is None) != (self.sizes.extra_channels == 0):
            raise UserError(
                f"this cogvideox reads {self.sizes.extra_channels} channels of a given image beside the "
                f"latents and the plan brings {'none' if video.extra_BNC is None else 'some'}: choose a plan "
                "and a model.preset that fit together"
            )
        dtype = self.proj_out.weight.dtype
        text_BLD, x_BND = self.patch_embed(x_BNC.to(dtype), video.extra_BNC, text.x_BNC.to(dtype))
        if self.sizes.use_learned_positional_embeddings:
            text_BLD, x_BND = self._with_learned(text_BLD, x_BND, video)
        elif not self.sizes.use_rotary_positional_embeddings:
            x_BND = x_BND + _sincos(video.index_BN3, self.sizes, dtype)
        batch = max(x_BND.shape[0], text_BLD.shape[0], video.sigma_BK.shape[0])
        parts = [t.to(dtype).expand(batch, -1, -1) for t in (text_BLD, x_BND)]
        return torch.cat(parts, dim=1), text_BLD.shape[1]

    def _with_learned(self, text_BLD: Tensor, x_BND: Tensor, video: Stream) -> tuple[Tensor, Tensor]:
        """Positions by table, which knows one frame size and so many frames; each caption begins anew."""
        places, longest = self.patch_embed.pos_embedding, self.sizes.max_text_seq_length
        _, rows, columns = self.sizes.base_grid
        frame_BN, row_BN, column_BN = _in_table(video, self.sizes.base_grid).unbind(-1)
        index_BN = longest + (frame_BN * rows + row_BN) * columns + column_BN
        word_L = torch.arange(text_BLD.shape[1], device=text_BLD.device) % longest
        return text_BLD + places[0, word_L], x_BND + places[0, index_BN]

    def _noise(self, stream: Stream, t_BK: Tensor) -> Noise:
        time_BKE = self.time_embedding(t_BK)
        if self.sizes.ofs_embed_dim is not None:
            time_BKE = time_BKE + self.ofs_embedding(torch.full_like(t_BK, OFFSET, dtype=torch.float32))
        return Noise(time_BKE, stream.level_BN if t_BK.shape[1] > 1 else None)

    def _rotary(self, video: Stream, words: int, dtype: torch.dtype) -> Rotary | None:
        """Words stand nowhere. A quarter of a head is for time, 3/8 each for rows and columns."""
        if not self.sizes.use_rotary_positional_embeddings:
            return None
        share = self.sizes.attention_head_dim // 16
        cos, sin = index_rotary(_places(video, self.sizes), (2 * share, 3 * share, 3 * share))
        still = [torch.full_like(cos[:, :1], value).expand(-1, words, -1) for value in (1.0, 0.0)]
        dtype = torch.promote_types(dtype, torch.float32)
        cos, sin = (
            torch.cat(pair, dim=1)[:, :, None].to(dtype) for pair in zip(still, (cos, sin), strict=True)
        )
        return cos, sin


def _in_table(video: Stream, grid: tuple[int, int, int]) -> Tensor:
    """The places of the tokens in a table of this size, (B or 1, N, 3) int64; refuses what has none there."""
    index_BN3 = video.index_BN3
    # Counted by cells, not by the grid: copies of a frame stand where the frame does.
    given = (index_BN3.amax(dim=(0, 1)) + 1).tolist()
    sized = all((count == n).all() for count, n in zip(_rows_and_columns(video), grid[1:], strict=True))
    if not sized or any(n > most for n, most in zip(given, grid, strict=True)):
        raise UserError(
            f"this cogvideox has learned positions for up to {' x '.join(map(str, grid))} tokens (frames, "
            f"rows, columns) and is given {' x '.join(f'{n:g}' for n in given)}: choose its size"
        )
    whole_BN3 = index_BN3.long()
    if (whole_BN3 != index_BN3).any() or (whole_BN3 < 0).any():
        raise UserError(
            "this cogvideox has learned positions, none of them between two frames or before the first: let "
            "scenes jump by whole frames"
        )
    return whole_BN3


def _places(video: Stream, sizes: CogVideoXSizes) -> Tensor:
    """Where RoPE has each token, (B or 1, N, 3) of (frame, row, column).

    1.5 counts cells. 1.0 fits the picture into the grid it was trained on: with its proportions kept, it is
    resized to touch two sides and centred on whole cells between the others; rows then lie evenly from the
    region's first cell to (n - 1) / n of its end, as the original's tables have them (which for a centred
    picture is not quite n-ths of the region). At the trained size the places are the cells.
    """
    if sizes.patch_size_t is not None:
        return video.index_BN3.double()
    counts = _rows_and_columns(video)
    scale = torch.minimum(*(base / count for base, count in zip(sizes.base_grid[1:], counts, strict=True)))
    frame_BN, *cells = video.index_BN3.double().unbind(-1)
    places = [frame_BN]
    for cell_BN, count, base in zip(cells, counts, sizes.base_grid[1:], strict=True):
        length = (scale * count).round()
        first = ((base - length) / 2).round()
        last = (first + length) * (count - 1) / count
        places.append(first + cell_BN * ((last - first) / (count - 1).clamp(min=1)))
    return torch.stack(places, dim=-1)


def _rows_and_columns(video: Stream) -> tuple[Tensor, ...]:
    """How many the clip of each token has, two of (B or 1, N or 1), float64. The samples of a packed row may
    differ, references do not count, and the grid says nothing of either."""
    cell_BN2 = video.cell_BN3[..., 1:].double().masked_fill(video.context_BN[..., None], 0)
    if video.sample_BN is None:
        return (cell_BN2.amax(dim=1, keepdim=True) + 1).unbind(-1)
    sample_BN2 = video.sample_BN[..., None].expand_as(cell_BN2)
    last_BN2 = torch.zeros_like(cell_BN2).scatter_reduce(1, sample_BN2, cell_BN2, "amax")
    return (last_BN2.gather(1, sample_BN2) + 1).unbind(-1)


def _sincos(index_BN3: Tensor, sizes: CogVideoXSizes, dtype: torch.dtype) -> Tensor:
    """Sines and cosines of frame, row and column, (B or 1, N, D): a quarter of the width for the frame, the
    rest for column and row."""
    frame, row, column = index_BN3.double().unbind(-1)
    parts = [
        (frame / sizes.temporal_interpolation_scale, sizes.dim // 4),
        (column / sizes.spatial_interpolation_scale, sizes.dim // 8 * 3),
        (row / sizes.spatial_interpolation_scale, sizes.dim // 8 * 3),
    ]
    waves = []
    for place, width in parts:
        exponent = torch.arange(width // 2, dtype=torch.float64, device=place.device) / (width // 2)
        angle = place[..., None] * 1e4**-exponent
        waves += [angle.sin().to(dtype), angle.cos().to(dtype)]
    return torch.cat(waves, dim=-1)


def _affine(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def _gated(y_BJD: Tensor, words: int, text_gate: Tensor, video_gate: Tensor) -> Tensor:
    return torch.cat([text_gate * y_BJD[:, :words], video_gate * y_BJD[:, words:]], dim=1)


def _valid(text: Stream, video: Stream) -> Tensor | None:
    """Which of the sequence is no padding, (B or 1, J)."""
    if text.valid_BN is None and video.valid_BN is None:
        return None
    parts = [
        torch.ones_like(s.scene_BN, dtype=torch.bool) if s.valid_BN is None else s.valid_BN
        for s in (text, video)
    ]
    batch = max(part.shape[0] for part in parts)
    return torch.cat([part.expand(batch, -1) for part in parts], dim=1)
