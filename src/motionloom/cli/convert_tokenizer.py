"""``motionloom convert`` of a run that trained a tokenizer: a folder in the released models' layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from motionloom.cli.console import Out
from motionloom.durable import write_atomic
from motionloom.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from motionloom.data.cache import Cache
    from motionloom.tokenizers.vtp.layers import RopePrecision
    from motionloom.train.checkpoint import Checkpoint

MEASURED_CLIPS = 512


def tokenizer_checkpoint(source: Path) -> Checkpoint | None:
    """The checkpoint of a run that trained a tokenizer; None: it is something else."""
    from motionloom.train import checkpoint

    if not (source / checkpoint.MANIFEST).is_file() and checkpoint.latest(source) is None:
        return None
    saved = checkpoint.load(source)
    return saved if (saved.folder / "vtp").is_dir() else None


def run(saved: Checkpoint, target: Path, cache_path: Path | None, raw: bool, out: Out) -> None:
    """Write model and words; with a cache of pixels also the statistics, which make it a tokenizer.

    Raises:
        UserError: the cache holds no pixels, or its clips do not fit the tokenizer.
    """
    from motionloom.data.cache import open_cache
    from motionloom.parallel import fill, named_state
    from motionloom.tokenizers.vtp import VTPConfig, VTPModel, VtpTokenizer
    from motionloom.tokenizers.vtp.words import WORDS

    if any(target.glob("*")):
        raise UserError(f"{target}: is not empty; name a new folder")
    described = saved.folder / "vtp"
    cache = None if cache_path is None else open_cache(cache_path)
    if cache is not None and cache.latent_shape(next(iter(cache.buckets)))[-1] != 3:
        raise UserError(f"--cache {cache_path}: holds latents and no pixels: name the cache of the training")
    model = VTPModel(VTPConfig.read(described / "config.json"), _rope(saved))
    fill(named_state({"vtp": model}), saved.weights(ema=not raw), str(saved.folder))
    model.eval()
    words = described if (described / WORDS).is_file() else None
    if cache is None:
        model.save_pretrained(target)
        if words is not None:
            write_atomic(target / WORDS, (words / WORDS).read_bytes())
    else:
        VtpTokenizer.measured(model, _clips(cache), words=words).save(target)
    told = (
        ""
        if cache is not None
        else (
            "; its latents are not measured yet: give --cache, or cache clips with tokenizer.type=vtp "
            f"tokenizer.name_or_path={target}"
        )
    )
    parameters = sum(p.numel() for p in model.parameters())
    out.result(
        {"target": str(target), "step": saved.step, "parameters": parameters, "measured": cache is not None},
        [f"{target}: a VTP of {parameters / 1e6:.2f} M parameters, from step {saved.step}{told}"],
    )


def _rope(saved: Checkpoint) -> RopePrecision:
    from motionloom.config import load_recipe

    return load_recipe(saved.folder / "recipe.yaml").vtp.rope


def _clips(cache: Cache) -> Iterator[Tensor]:
    """The first clips in order of a hash, whatever their order in the cache: uint8 (P, H, W, 3)."""
    from motionloom.rng import key_to_seed

    numbers = sorted(range(len(cache)), key=lambda n: key_to_seed("fit", cache.ids[n]))[:MEASURED_CLIPS]
    yield from cache.decoded(numbers, cache.tokenizer())
