"""What a recipe, a cache or a checkpoint amounts to, before anything is paid for.

Memory figures are arithmetic, not measurements: weights, gradients, averages and optimiser state in float32,
plus the activations that the backward pass keeps, estimated per token and block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from motionloom.config.recipe import Recipe
from motionloom.data.buckets import Bucket, bucket_lengths, bucket_sizes, cached_fps
from motionloom.data.cache import Cache
from motionloom.generate import Model
from motionloom.tokenizers.base import TokenizerSpec
from motionloom.tokenizers.vtp import VTPModel

GIB = 2**30
# Floats that one block keeps per token for the backward pass, in units of the model's width: inputs of the
# norms, of q, k, v and the projection, both sides of the MLP's activation, residuals.
KEPT_PER_BLOCK = 20


def parameters(modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """Parameters of each module and ``total``."""
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
    return {**counts, "total": sum(counts.values())}


def bucket_rows(recipe: Recipe, spec: TokenizerSpec) -> list[dict[str, Any]]:
    """Every shape that the recipe trains on: pixels, latents, tokens."""
    rows = []
    for width, height in bucket_sizes(recipe):
        for frames in bucket_lengths(recipe):
            latent = spec.latent_grid(frames, height, width)
            tokens = [n // p for n, p in zip(latent, recipe.model.patch, strict=True)]
            rows.append(
                {
                    "bucket": str(Bucket(width, height, frames)),
                    "seconds": frames / cached_fps(recipe),
                    "latent": [*latent, spec.channels],
                    "tokens": tokens[0] * tokens[1] * tokens[2],
                    "pixels_per_latent_number": 3
                    * width
                    * height
                    * frames
                    / (latent[0] * latent[1] * latent[2] * spec.channels),
                }
            )
    return rows


def extent(recipe: Recipe, backbone: Any) -> tuple[int, int]:
    """(width, blocks) of a backbone."""
    if recipe.model.imported:
        return int(backbone.sizes.dim), len(backbone.blocks())
    return recipe.model.dim, recipe.model.depth


def frozen_parameters(modules: Mapping[str, nn.Module]) -> int:
    """How many parameters stay as they are."""
    return sum(p.numel() for module in modules.values() for p in module.parameters() if not p.requires_grad)


def memory(
    recipe: Recipe,
    total_parameters: int,
    most_tokens: int,
    text_tokens: int,
    backbone: Any = None,
    frozen: int = 0,
) -> dict[str, float]:
    """GiB that a training step needs, by part; a published ``backbone`` knows its own width and depth.

    Args:
        frozen: how many of the parameters are not trained.
    """
    width, depth = extent(recipe, backbone)
    bytes_per = 2 if recipe.train.precision == "bf16" else 4
    tokens = recipe.train.batch_size * (most_tokens + text_tokens)
    blocks = 2 if recipe.model.checkpoint_blocks else depth
    trained = total_parameters - frozen
    parts = {
        "weights": (4 * trained + bytes_per * frozen) / GIB,
        "gradients": 4 * trained / GIB,
        "optimiser": 8 * trained / GIB,
        "ema": 4 * trained / GIB if recipe.ema.enabled else 0.0,
        "activations": tokens * blocks * KEPT_PER_BLOCK * width * bytes_per / GIB,
    }
    return {**parts, "total": sum(parts.values())}


def inspect_recipe(recipe: Recipe, spec: TokenizerSpec, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Sizes, tokens, parameters and memory of a recipe's training."""
    rows = bucket_rows(recipe, spec)
    counts = parameters(modules)
    most = max(row["tokens"] for row in rows)
    frozen = frozen_parameters(modules)
    trained = {"trained": counts["total"] - frozen} if frozen else {}
    return {
        "kind": "recipe",
        "plan": recipe.plan.type,
        "backbone": recipe.model.type,
        "parameters": {**counts, **trained},
        "buckets": rows,
        "text_tokens": recipe.text_encoder.max_length,
        "tokens_per_step": recipe.train.batch_size * recipe.train.grad_accum_steps * most,
        "memory_gib": memory(
            recipe, counts["total"], most, recipe.text_encoder.max_length, modules["backbone"], frozen
        ),
    }


def inspect_cache(cache: Cache) -> dict[str, Any]:
    """Clips, shapes, numbers and what made a cache."""
    mean_C, std_C = cache.statistics()
    return {
        "kind": "cache",
        "clips": len(cache),
        "fps": cache.fps,
        "buckets": {str(bucket): len(rows) for bucket, rows in cache.buckets.items()},
        "latent_mean": [round(float(mean_C.min()), 4) + 0.0, round(float(mean_C.max()), 4) + 0.0],
        "latent_std": [round(float(std_C.min()), 4), round(float(std_C.max()), 4)],
        "text_embeddings": cache.text is not None,
        **({"states_at": list(cache.pairs.levels)} if cache.has_states else {}),
        "bytes": sum(f.stat().st_size for f in cache.path.rglob("*") if f.is_file()),
        "made_with": cache.identity.made_with,
        "fingerprint": cache.identity.fingerprint,
        "problems": cache.verify(),
    }


def inspect_model(model: Model, step: int, folder: str) -> dict[str, Any]:
    """Sizes of a checkpoint."""
    modules = {"backbone": model.predictor.backbone, "text_encoder": model.text_encoder}
    real = {name: module for name, module in modules.items() if isinstance(module, nn.Module)}
    return {
        **inspect_recipe(model.recipe, model.tokenizer.spec, real),
        "kind": "checkpoint",
        "folder": folder,
        "step": step,
        "tokenizer": model.tokenizer.fingerprint(),
    }


def sheet_clips(cache: Cache, most: int = 24) -> tuple[list[Any], list[str]]:
    """Decoded clips spread evenly over a cache, with their captions: what training really sees."""
    tokenizer = cache.tokenizer()
    seen = [n for n in range(len(cache)) if not cache.bucket_of(n).is_sound]
    places = torch.linspace(0, len(seen) - 1, min(most, len(seen))).round().long().tolist()
    rows = [seen[n] for n in places]
    clips = [clip_PHW3.numpy() for clip_PHW3 in cache.decoded(rows, tokenizer)]
    return clips, [" | ".join(row["captions"]) for row in cache.metadata(rows)]


def inspect_tokenizer(recipe: Recipe, model: VTPModel) -> dict[str, Any]:
    """What a recipe that trains a tokenizer amounts to; ``model`` may be on ``meta``.

    Memory is of weights, gradients, averages and AdamW's state alone: what activations take depends on crops
    and chunks.
    """
    c = model.config
    spec = TokenizerSpec(
        c.vision_feature_bottleneck, c.vision_patch_size, c.temporal_patch, first_alone=c.temporal_patch > 1
    )
    counts = parameters({"encoder": model.trunk, "decoder": model.pixel_decoder})
    whole = sum(p.numel() for p in model.parameters())
    text = whole - counts["total"]
    copies = 4 if recipe.ema.enabled else 3
    return {
        "recipe": recipe.experiment_name,
        "method": recipe.train.method,
        "parameters": {**counts, "text": text, "total": whole},
        "latent": {"pixels": spec.spatial, "frames": spec.temporal, "channels": spec.channels},
        "memory_gib": {"weights and optimiser": 4 * whole * (copies + 1) / GIB},
        "buckets": bucket_rows(recipe, spec),
        "attention": [],
    }
