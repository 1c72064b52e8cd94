"""What the training of a tokenizer is made of: the counterpart of ``assemble.py``, which is for backbones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from motionloom.cli.adapters import with_whole_paths
from motionloom.config import Recipe, load_recipe
from motionloom.data.cache import Cache
from motionloom.data.loader import Loader
from motionloom.data.sheets import contact_sheet
from motionloom.errors import UserError
from motionloom.methods.tokenizer.decoder import FinetuneDecoder
from motionloom.methods.tokenizer.pixels import captions, frames
from motionloom.methods.tokenizer.pretrain import Pretrain
from motionloom.methods.tokenizer.sizes import model_config
from motionloom.parallel import Ranks, parallelize, why_not_compile
from motionloom.tokenizers.vtp import VTPConfig, VTPModel, Words
from motionloom.tokenizers.vtp.config import CLIP_VOCAB
from motionloom.tokenizers.vtp.folder import CONFIG
from motionloom.tokenizers.vtp.tokenizer import as_pixels
from motionloom.train import checkpoint
from motionloom.train.loop import OnSample, Trainer, Weights
from motionloom.train.method import Method
from motionloom.train.report import Reporter

FOLDER = "vtp"
"""Of a checkpoint: the model's config and vocabulary; its weights are the checkpoint's own."""


@dataclass(frozen=True)
class Described:
    """What a checkpoint of a tokenizer carries besides weights."""

    model: VTPModel
    words: Words | None

    def save(self, folder: Path) -> None:
        """Config and vocabulary."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(self.model.config.to_json())
        if self.words is not None:
            self.words.save(folder)


@dataclass(frozen=True)
class TokenizerParts:
    """What a run that trains a tokenizer is made of."""

    recipe: Recipe
    cache: Cache
    model: VTPModel
    words: Words | None
    method: Method
    loader: Loader
    heldout: Loader
    ranks: Ranks
    notes: tuple[str, ...]

    def trainer(
        self, run_dir: Path, reporter: Reporter | None = None, on_sample: OnSample | None = None
    ) -> Trainer:
        """A trainer over these parts, writing to ``run_dir``."""
        return Trainer(
            self.recipe,
            self.method,
            self.loader,
            self.ranks,
            run_dir,
            heldout=self.heldout,
            folders={FOLDER: Described(self.model, self.words)},
            data=self.loader.fingerprint(),
            reporter=reporter,
            on_sample=on_sample,
        )


def assemble_tokenizer(recipe: Recipe, cache: Cache, ranks: Ranks) -> TokenizerParts:
    """Everything that the training of a tokenizer needs.

    Raises:
        UserError: the cache is not the recipe's, holds sound alone, or clips without a caption where they are
            contrasted; or what ``train.init_from`` names is another model.
    """
    recipe = with_whole_paths(recipe)
    if not cache.has_video:
        raise UserError(
            f"{cache.path}: holds sound alone, and a tokenizer of pictures is trained: cache clips"
        )
    loader = Loader(cache, recipe, ranks.rank, ranks.world)
    heldout = Loader(cache, recipe, ranks.rank, ranks.world, split="heldout")
    base = _base(recipe)
    words, told = _words(recipe, cache, loader, base)
    size = words.size if words is not None else (CLIP_VOCAB if recipe.vtp.preset else recipe.vtp.vocab_size)
    side, rebuilt = (
        max(recipe.video.width, recipe.video.height),
        bool(recipe.vtp.rec) or _second_stage(recipe),
    )
    config = model_config(recipe.vtp, side, size, rebuilt=rebuilt)
    if base is not None:
        _require_same(recipe, config, base)
    model = VTPModel(config, recipe.vtp.rope)
    model.init_weights(recipe.seed, recipe.vtp.init)
    notes = list(told)
    obstacle = why_not_compile(ranks.device) if recipe.train.compile else ""
    if obstacle:
        notes.append(f"train.compile: {obstacle}")
    parallelize({"vtp": model}, ranks, "ddp", compile=recipe.train.compile and not obstacle)
    method: Method
    if recipe.train.method == "tokenizer":
        known = _captions(cache, loader) if recipe.vtp.clip_near or recipe.vtp.words else []
        method = Pretrain(recipe, model, words if recipe.vtp.clip else None, ranks, known)
    else:
        method = FinetuneDecoder(recipe, model, ranks)
    return TokenizerParts(recipe, cache, model, words, method, loader, heldout, ranks, tuple(notes))


def _second_stage(recipe: Recipe) -> bool:
    return recipe.train.method == "decoder"


def _base(recipe: Recipe) -> Path | None:
    """What it goes on from: its own newest checkpoint, for a resume, or that of ``train.init_from``."""
    own = checkpoint.latest(Path(recipe.output_dir) / recipe.experiment_name)
    if own is not None and (own / FOLDER).is_dir():
        return own
    if not recipe.train.init_from:
        return None
    found = checkpoint.load(Path(recipe.train.init_from), verify=False).folder
    if not (found / FOLDER).is_dir():
        raise UserError(
            f"train.init_from {recipe.train.init_from}: trained no tokenizer; name a run that did"
        )
    return found


def _require_same(recipe: Recipe, config: VTPConfig, base: Path) -> None:
    """Raises UserError where the model of a recipe is another than the one that it goes on from."""
    theirs = VTPConfig.read(base / FOLDER / CONFIG)
    free = {"image_size", "init_logit_scale", "init_logit_bias"}
    for field in fields(config):
        mine, other = getattr(config, field.name), getattr(theirs, field.name)
        if mine != other and field.name not in free:
            raise UserError(
                f"{base}: its model has {field.name} {other} and the recipe's vtp section asks for {mine}: "
                "go on with the section that it was trained with"
            )
    rope = load_recipe(base / "recipe.yaml").vtp.rope
    if rope != recipe.vtp.rope:
        raise UserError(
            f"{base}: was trained with vtp.rope {rope}, the recipe says {recipe.vtp.rope}: set it"
        )


def _words(recipe: Recipe, cache: Cache, loader: Loader, base: Path | None) -> tuple[Words | None, list[str]]:
    """The vocabulary: of the run it goes on from, CLIP's, or one that the captions of training make."""
    c = recipe.vtp
    if not c.clip:
        return None, []
    if not _second_stage(recipe):
        _require_captions(cache)
    if base is not None:
        config = VTPConfig.read(base / FOLDER / CONFIG)
        if not config.train_clip:
            raise UserError(f"{base}: was trained without captions: set vtp.clip to 0, or train anew")
        return Words.load(base / FOLDER, config.text_context_length, config.text_vocab_size), []
    if c.preset or c.vocab_size == CLIP_VOCAB:
        return Words(77 if c.preset else c.context), []
    texts = _captions(cache, loader)
    words = Words.learned(texts, c.context, c.vocab_size)
    less = f" of {c.vocab_size} that vtp.vocab_size allows" if words.size < c.vocab_size else ""
    return words, [f"learned {words.size} words{less} from {len(texts)} captions"]


def _captions(cache: Cache, loader: Loader) -> list[str]:
    """Of the clips of training."""
    return [" ".join(row["captions"]) for row in cache.metadata(loader.row_numbers())]


def _require_captions(cache: Cache) -> None:
    """Training draws among all wordings of a clip."""
    rows = cache.metadata(range(len(cache)))
    lacking = [
        row["clip"]
        for row in rows
        if not all(s.strip() for s in (" ".join(row["captions"]), *row["wordings"]))
    ]
    if lacking:
        raise UserError(
            f"{cache.path}: {len(lacking)} of {len(rows)} clips have no caption to be contrasted with, or an "
            f"empty one (the first is {lacking[0]}): caption or leave them out, or set vtp.clip to 0"
        )


class TokenizerPreviews:
    """An ``on_sample``: held-out clips, and what the tokenizer makes of them, below."""

    def __init__(self, parts: TokenizerParts, run_dir: Path) -> None:
        self._parts, self._folder = parts, run_dir / "samples"
        unseen = parts.heldout if len(parts.heldout) else next(iter(parts.loader.examples().values()))
        batch = unseen.batch(0) if isinstance(unseen, Loader) else unseen
        shown = min(len(batch.ids), parts.recipe.train.sample_num_images)
        self._x_BP3HW, self._titles = frames(batch)[:shown], captions(batch)[:shown]

    def __call__(self, step: int, raw: Weights, ema: Weights | None) -> None:
        weights = {"raw": raw}
        if ema is not None and self._parts.recipe.ema.use_for_sampling:
            weights["ema"] = ema
        for name, applied in weights.items():
            with applied():
                made = self._rebuilt()
            if self._parts.ranks.is_main:
                self._folder.mkdir(parents=True, exist_ok=True)
                contact_sheet(
                    [video.numpy() for video in self._pairs(made)],
                    [title for text in self._titles for title in (text, "rebuilt")],
                    self._folder / f"step_{step:08d}_{name}.png",
                )

    @torch.no_grad()
    def _rebuilt(self) -> Tensor:
        model = self._parts.model
        x = self._x_BP3HW.to(self._parts.ranks.device)
        return as_pixels(model.pixel_decoder(model.encode(x))).cpu()

    def _pairs(self, made_BPHW3: Tensor) -> Iterator[Tensor]:
        for real, made in zip(as_pixels(self._x_BP3HW), made_BPHW3, strict=True):
            yield from (real, made)
