"""LTX-2's way from a language model's hidden states to the contexts of its video and its audio stream.

All hidden layers of Gemma 3 are normalised, laid side by side and projected; learned registers take the
places of padding; a small transformer over the tokens ends it, one for the video and one for the audio. 2.0
normalises by the mean and range of a caption and shares one projection; 2.3 normalises each token and has
two. Weights are named as in diffusers' ``LTX2TextConnectors``.

Shapes: B batch, L tokens, G channels of the language model, Y its hidden states (layers + 1), D width of a
connector, H heads, d = D/H, R registers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from motionloom.config.entries import from_entries, own_keys
from motionloom.errors import UserError
from motionloom.nn.attention import attend, join_heads
from motionloom.nn.mlp import FeedForward
from motionloom.nn.norms import EPS, rms_norm
from motionloom.nn.rope import Rotary, rotate, rotate_pairs

DIFFUSERS_CLASS = "LTX2TextConnectors"
RANGE = 8.0
"""What a caption's hidden states are spread over by the normalisation of 2.0."""


@dataclass(frozen=True)
class ConnectorSizes:
    """Names and defaults are those of diffusers' ``config.json``."""

    caption_channels: int = 3840
    text_proj_in_factor: int = 49
    """Hidden states of the language model: its layers and its embedding."""
    video_connector_num_attention_heads: int = 30
    video_connector_attention_head_dim: int = 128
    video_connector_num_layers: int = 2
    video_connector_num_learnable_registers: int = 128
    video_gated_attn: bool = False
    audio_connector_num_attention_heads: int = 30
    audio_connector_attention_head_dim: int = 128
    audio_connector_num_layers: int = 2
    audio_connector_num_learnable_registers: int = 128
    audio_gated_attn: bool = False
    connector_rope_base_seq_len: int = 4096
    rope_theta: float = 10000.0
    rope_double_precision: bool = True
    rope_type: Literal["interleaved", "split"] = "interleaved"
    per_modality_projections: bool = False
    """2.3: one for each modality, of ``video_hidden_dim`` and ``audio_hidden_dim``."""
    video_hidden_dim: int = 4096
    audio_hidden_dim: int = 2048
    proj_bias: bool = False

    def width(self, modality: str) -> int:
        """Channels of the context of ``video`` or ``audio``."""
        heads: int = getattr(self, f"{modality}_connector_num_attention_heads")
        head_dim: int = getattr(self, f"{modality}_connector_attention_head_dim")
        return heads * head_dim

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> ConnectorSizes:
        """From the entries of ``config.json``; what is missing has diffusers' default.

        Raises:
            UserError: of another class, or with entries or values that are not known here.
        """
        given = own_keys(config, DIFFUSERS_CLASS, "config.json", "ltx2 text")
        given.pop("causal_temporal_positioning", None)  # diffusers keeps it and does not read it
        sizes = from_entries(cls, given, "config.json", "ltx2 text")
        for modality in ("video", "audio"):
            wanted = getattr(sizes, f"{modality}_hidden_dim")
            wanted = wanted if sizes.per_modality_projections else sizes.caption_channels
            if sizes.width(modality) != wanted:
                raise UserError(
                    f"config.json: the {modality} connector is {sizes.width(modality)} wide, but its "
                    f"features are {wanted}"
                )
        return sizes


class Attention(nn.Module):
    """Tokens see tokens; queries and keys are normalised over all heads together."""

    def __init__(self, heads: int, head_dim: int, *, gated: bool, pairs: bool) -> None:
        super().__init__()
        dim = heads * head_dim
        self.heads, self.turn = heads, rotate_pairs if pairs else rotate
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps=EPS), nn.RMSNorm(dim, eps=EPS)
        self.to_gate_logits = nn.Linear(dim, heads) if gated else None

    def forward(self, x_BLD: Tensor, tables: Rotary) -> Tensor:
        def split(t: Tensor) -> Tensor:
            return t.unflatten(-1, (self.heads, -1))

        q, k = split(self.norm_q(self.to_q(x_BLD))), split(self.norm_k(self.to_k(x_BLD)))
        v = split(self.to_v(x_BLD))
        q, k = (self.turn(t, tables).to(v.dtype) for t in (q, k))
        out_BLD = join_heads(attend(*(t.transpose(1, 2) for t in (q, k, v))))
        if self.to_gate_logits is not None:
            gate_BLH = 2 * self.to_gate_logits(x_BLD).sigmoid()
            out_BLD = (split(out_BLD) * gate_BLH[..., None]).flatten(-2)
        return self.to_out[0](out_BLD)


class Block(nn.Module):
    """Attention and feed-forward behind plain norms."""

    def __init__(self, heads: int, head_dim: int, *, gated: bool, pairs: bool) -> None:
        super().__init__()
        self.attn1 = Attention(heads, head_dim, gated=gated, pairs=pairs)
        self.ff = FeedForward(heads * head_dim, 4 * heads * head_dim, heads * head_dim)

    def forward(self, x_BLD: Tensor, tables: Rotary) -> Tensor:
        x_BLD = x_BLD + self.attn1(rms_norm(x_BLD), tables)
        return x_BLD + self.ff(rms_norm(x_BLD))


class Connector(nn.Module):
    """Features of the words -> the context of one modality."""

    def __init__(self, sizes: ConnectorSizes, modality: str) -> None:
        super().__init__()

        def size(name: str) -> int:
            value: int = getattr(sizes, f"{modality}_connector_{name}")
            return value

        self.sizes, self.heads = sizes, size("num_attention_heads")
        head_dim, gated = size("attention_head_dim"), bool(getattr(sizes, f"{modality}_gated_attn"))
        pairs = sizes.rope_type == "interleaved"
        self.learnable_registers = nn.Parameter(
            torch.zeros(size("num_learnable_registers"), self.heads * head_dim)
        )
        self.transformer_blocks = nn.ModuleList(
            Block(self.heads, head_dim, gated=gated, pairs=pairs) for _ in range(size("num_layers"))
        )

    def forward(self, x_BLD: Tensor, valid_BL: Tensor) -> Tensor:
        """(B, L, D), all of it valid. The words stand first; L is a multiple of the registers, which fill the
        rest each at its own place."""
        length, width = x_BLD.shape[1:]
        registers = self.learnable_registers.to(x_BLD.dtype)
        registers_LD = registers.repeat(length // registers.shape[0], 1)
        x_BLD = torch.where(valid_BL[..., None], x_BLD, registers_LD)
        tables = self._tables(length, width, x_BLD.device)
        for block in self.transformer_blocks:
            x_BLD = block(x_BLD, tables)
        return rms_norm(x_BLD)

    def _tables(self, length: int, width: int, device: torch.device) -> Rotary:
        """(L, H, d): frequencies run over the whole width, so every head has its own.

        Angles reach thousands of radians, where float32 is coarse: they are rounded where the original does.
        """
        sizes = self.sizes
        dtype = torch.float64 if sizes.rope_double_precision else torch.float32
        exponent = torch.linspace(0, 1, width // 2, dtype=dtype, device=device)
        frequency = (torch.pow(sizes.rope_theta, exponent) * torch.pi / 2).float()
        place_L = torch.arange(length, dtype=torch.float32, device=device) / sizes.connector_rope_base_seq_len
        angle = ((place_L[:, None] * 2 - 1) * frequency).unflatten(-1, (self.heads, -1))
        cos, sin = angle.cos(), angle.sin()
        if sizes.rope_type == "interleaved":
            return cos.repeat_interleave(2, dim=-1), torch.stack([-sin, sin], dim=-1).flatten(-2)
        return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


class TextConnectors(nn.Module):
    """See the top of this file."""

    def __init__(self, sizes: ConnectorSizes) -> None:
        super().__init__()
        self.sizes = sizes
        inputs, bias = sizes.caption_channels * sizes.text_proj_in_factor, sizes.proj_bias
        if sizes.per_modality_projections:
            self.video_text_proj_in = nn.Linear(inputs, sizes.video_hidden_dim, bias=bias)
            self.audio_text_proj_in = nn.Linear(inputs, sizes.audio_hidden_dim, bias=bias)
        else:
            self.text_proj_in = nn.Linear(inputs, sizes.caption_channels, bias=bias)
        self.video_connector = Connector(sizes, "video")
        self.audio_connector = Connector(sizes, "audio")

    def features(self, hidden_BLGY: Tensor, valid_BL: Tensor) -> tuple[Tensor, Tensor]:
        """All hidden states of the language model -> features for video and for audio, (B, L, D) each."""
        sizes = self.sizes
        if not sizes.per_modality_projections:
            x = _flat(spread_per_caption(hidden_BLGY, valid_BL), self.text_proj_in)
            features = self.text_proj_in(x)
            return features, features
        x = spread_per_token(hidden_BLGY, valid_BL)
        video, audio = (
            projection(_flat(x * math.sqrt(projection.out_features / sizes.caption_channels), projection))
            for projection in (self.video_text_proj_in, self.audio_text_proj_in)
        )
        return video, audio

    def contexts(self, video_BLD: Tensor, audio_BLD: Tensor, valid_BL: Tensor) -> Tensor:
        """Features -> contexts side by side, (B, L, video's + audio's channels); all tokens are valid."""
        video_BLD = self.video_connector(video_BLD, valid_BL)
        return torch.cat([video_BLD, self.audio_connector(audio_BLD, valid_BL)], dim=-1)


def spread_per_caption(hidden_BLGY: Tensor, valid_BL: Tensor) -> Tensor:
    """2.0: each layer of each caption less its mean, over its range, times ``RANGE``; float32, 0 at padding.

    (B, L, G, Y), and validity (B, L).
    """
    x, valid = hidden_BLGY.float(), valid_BL[:, :, None, None]
    count = valid.sum(dim=(1, 2), keepdim=True) * x.shape[2]
    mean = x.masked_fill(~valid, 0).sum(dim=(1, 2), keepdim=True) / (count + EPS)
    low = x.masked_fill(~valid, float("inf")).amin(dim=(1, 2), keepdim=True)
    high = x.masked_fill(~valid, float("-inf")).amax(dim=(1, 2), keepdim=True)
    return ((x - mean) / (high - low + EPS) * RANGE).masked_fill(~valid, 0)


def spread_per_token(hidden_BLGY: Tensor, valid_BL: Tensor) -> Tensor:
    """2.3: each layer of each token over its root mean square; float32, 0 at padding.

    (B, L, G, Y), and validity (B, L).
    """
    x = hidden_BLGY.float()
    x = x * torch.rsqrt(x.square().mean(dim=2, keepdim=True) + EPS)
    return x.masked_fill(~valid_BL[:, :, None, None], 0)


def _flat(x_BLGY: Tensor, projection: nn.Linear) -> Tensor:
    return x_BLGY.flatten(2).to(projection.weight.dtype)


def read_sizes(folder: Path) -> ConnectorSizes:
    """The sizes of connectors in a diffusers folder, which has weights too.

    Raises:
        UserError: there is no such folder, or its config.json or its weights are not there or not readable.
    """
    where = f"text_encoder.connectors {folder}"
    if not folder.is_dir():
        raise UserError(
            f"{where}: no such folder; name a diffusers folder of connectors in text_encoder.connectors"
        )
    try:
        sizes = ConnectorSizes.from_diffusers(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{where}: no readable config.json; name a diffusers folder of connectors") from error
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{where}: no safetensors in it; name a diffusers folder of connectors")
    return sizes


def load_connectors(folder: Path, dtype: torch.dtype) -> TextConnectors:
    """Connectors from a diffusers folder: ``config.json`` and safetensors, in one file or in shards.

    Raises:
        UserError: a file is missing, damaged or of another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    where = f"text_encoder.connectors {folder}"
    sizes = read_sizes(folder)
    files = sorted(folder.glob("*.safetensors"))
    with torch.device("meta"):
        connectors = TextConnectors(sizes)
    state: dict[str, Tensor] = {}
    try:
        for file in files:
            state |= {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
        connectors.load_state_dict(state, assign=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{where}: cannot be read ({error}); copy it again") from error
    except RuntimeError as error:
        problem = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{where}: its weights are not what its config.json says: {problem}") from error
    return connectors.eval().requires_grad_(False)
