"""Sizes of LightningDiT: those that its authors published, and how those of weights are told from them.

The ends of the network (channels of a latent, patch, what it is told by) go with tokenizer and text, so sizes
by name are of its trunk; :meth:`LightningSizes.fitted` gives them ends.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from motionloom.backbones.weights import Weights
from motionloom.config.entries import from_entries, own_keys
from motionloom.config.recipe import ModelConfig
from motionloom.errors import UserError
from motionloom.nn.place import grid_sines
from motionloom.nn.rope import index_rotary

CLASS_NAME = "LightningDiT"
"""``_class_name`` in the ``config.json`` that is written beside converted weights; diffusers has no such
class."""


@dataclass(frozen=True)
class LightningSizes:
    """What tells models apart, by the names that diffusers' ``config.json`` has for such things."""

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    num_layers: int = 28
    mlp_ratio: float = 4.0
    """Of a plain feed-forward layer; the gated one is two thirds as wide, which costs as much."""
    qk_norm: bool = False
    in_channels: int = 64
    """Of a latent cell, and of the answer."""
    patch_size: tuple[int, int, int] = (1, 1, 1)
    """Latent cells (frames, rows, columns) of a token; the published ones are 1 frame and square."""
    text_dim: int = 1001
    """Channels of a word."""
    condition: Literal["class", "text"] = "class"
    """``class``: words are one-hot, the last of them no class at all; a table has a row for each."""

    @property
    def dim(self) -> int:
        """Width D."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def hidden(self) -> int:
        """Width of the gated feed-forward layer."""
        return int(2 / 3 * int(self.dim * self.mlp_ratio))

    @property
    def reads_image(self) -> bool:
        """None of them needs a given image."""
        return False

    @classmethod
    def from_diffusers(cls, config: dict[str, Any]) -> LightningSizes:
        """From the entries of a ``config.json`` that :meth:`to_diffusers` wrote.

        Raises:
            UserError: it is of another class, or holds an entry or a value that is not known here.
        """
        given = own_keys(config, CLASS_NAME, "config.json", "lightning")
        sizes = from_entries(cls, given, "config.json", "lightning")
        if sizes.attention_head_dim % 2:
            raise UserError(f"config.json: attention_head_dim {sizes.attention_head_dim} must be even")
        return sizes

    def to_diffusers(self) -> dict[str, Any]:
        """The entries of ``config.json``."""
        return {"_class_name": CLASS_NAME, **asdict(self), "patch_size": list(self.patch_size)}

    @classmethod
    def from_recipe(cls, config: ModelConfig, latent_channels: int, text_dim: int) -> LightningSizes:
        """Sizes that a recipe chooses."""
        trunk = cls(config.num_heads, config.dim // config.num_heads, config.depth, config.mlp_ratio)
        return trunk.fitted(config, latent_channels, text_dim)

    def fitted(self, config: ModelConfig, latent_channels: int, text_dim: int) -> LightningSizes:
        """This trunk between the ends that a recipe asks for."""
        return replace(
            self,
            qk_norm=config.qk_norm,
            in_channels=latent_channels,
            patch_size=config.patch,
            text_dim=text_dim,
            condition=config.condition,
        )

    def between(self, ends: LightningSizes) -> LightningSizes:
        """This trunk between the ends of another model."""
        names = ("num_attention_heads", "attention_head_dim", "num_layers", "mlp_ratio")
        return replace(ends, **{name: getattr(self, name) for name in names})

    @classmethod
    def from_weights(cls, weights: Weights, preset: LightningSizes | None = None) -> LightningSizes:
        """Sizes of weights in the authors' layout, told by their names and shapes.

        The positions that such a file keeps must be those that are computed here.

        Args:
            preset: the trunk that they are said to be of, where the file does not tell its heads.

        Raises:
            UserError: the shapes do not go together, the heads cannot be told, or the positions are others.
        """
        shapes = {name: stored.shape for name, stored in weights.tensors.items()}
        table, cells = shapes.get("y_embedder.embedding_table.weight"), shapes["x_embedder.proj.weight"]
        dim, qk_norm = cells[0], "blocks.0.attn.q_norm.weight" in shapes
        if len(cells) != 4 or cells[2] != cells[3]:
            raise UserError(f"{weights.where}: x_embedder.proj.weight is {list(cells)}: not of LightningDiT")
        head_dim = _head_dim(shapes, dim, preset)
        if head_dim is None or dim % head_dim or head_dim % 2:
            raise UserError(
                f"{weights.where} does not tell into how many heads its width {dim} divides: name its sizes "
                f"in model.preset (convert: --family lightning --preset), one of {', '.join(PRESETS)}"
            )
        sizes = cls(
            num_attention_heads=dim // head_dim,
            attention_head_dim=head_dim,
            num_layers=len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}),
            qk_norm=qk_norm,
            in_channels=cells[1],
            patch_size=(1, cells[2], cells[3]),
            text_dim=table[0] if table is not None else shapes["y_embedder.linear_1.weight"][1],
            condition="class" if table is not None else "text",
        )
        _check_positions(weights, sizes)
        return sizes


def _head_dim(shapes: dict[str, tuple[int, ...]], dim: int, preset: LightningSizes | None) -> int | None:
    """From the tables of positions, else the norm of queries, else the preset or the published model of that
    width."""
    for name in ("feat_rope.freqs_cos", "blocks.0.attn.q_norm.weight"):
        if name in shapes:
            return shapes[name][-1]
    named = [preset] if preset is not None else list(PRESETS.values())
    return next((one.attention_head_dim for one in named if one.dim == dim), None)


def _check_positions(weights: Weights, sizes: LightningSizes) -> None:
    """Refuse a file whose frozen positions are not the sines and angles of its grid."""
    for name in ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"):
        if name not in weights:
            continue
        kept = weights.read(name).float().flatten(0, -2)
        side = round(len(kept) ** 0.5)
        cells = torch.cartesian_prod(torch.arange(side), torch.arange(side))[None]
        wanted = _positions(name, cells, sizes)[0]
        if wanted.shape != kept.shape or (wanted - kept).abs().max() > 1e-3:
            raise UserError(
                f"{weights.where}: {name} is not the table of LightningDiT for a square grid from 0: these "
                "weights were trained on other positions, which are not built in here"
            )


def _positions(name: str, cell_BN2: Tensor, sizes: LightningSizes) -> Tensor:
    if name == "pos_embed":
        return grid_sines(cell_BN2, sizes.dim).float()
    cos, sin = index_rotary(cell_BN2, head_pairs(sizes.attention_head_dim))
    # Tables here carry the sign of the half; theirs do not.
    return (cos if name.endswith("cos") else sin[..., 1::2].repeat_interleave(2, dim=-1)).float()


def head_pairs(head_dim: int) -> tuple[int, int]:
    """How many rotated pairs of a head go by the row and by the column: half each."""
    pairs = head_dim // 2
    return pairs - pairs // 2, pairs // 2


PRESETS: dict[str, LightningSizes] = {
    "lightning-b": LightningSizes(12, 64, 12),
    "lightning-l": LightningSizes(16, 64, 24),
    "lightning-xl": LightningSizes(16, 72, 28),
    "lightning-1p0b": LightningSizes(24, 64, 24),
    "lightning-1p6b": LightningSizes(28, 64, 28),
    "tiny": LightningSizes(2, 16, 2, in_channels=16, patch_size=(1, 1, 1), text_dim=11),
}
"""Published trunks by name."""
