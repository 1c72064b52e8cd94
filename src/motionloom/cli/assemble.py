"""Recipe -> objects. The one place where members of the axes meet."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import nn

from motionloom.backbones import Factorized, Joint, build_backbone
from motionloom.backbones.prediction import Predictor
from motionloom.config import Recipe, load_recipe, packaged_recipes
from motionloom.data.cache import Cache
from motionloom.data.loader import Loader
from motionloom.errors import UserError
from motionloom.flow import PATHS
from motionloom.generate import Model
from motionloom.methods import METHODS, Denoise
from motionloom.parallel import Ranks, fill, named_state, parallelize, why_not_compile
from motionloom.plans import PLANS, Plan
from motionloom.rng import torch_generator
from motionloom.text import build_text_encoder, load_text_encoder
from motionloom.text.base import TextEncoder
from motionloom.tokenizers import Tokenizer, fit_tokenizer, load_tokenizer
from motionloom.tokenizers.base import TokenizerSpec
from motionloom.train import checkpoint
from motionloom.train.loop import OnSample, Trainer
from motionloom.train.report import Reporter


def build_plan(recipe: Recipe) -> Plan:
    """The recipe's plan; of its ``plan`` section the plan takes the fields it has."""
    kind = PLANS[recipe.plan.type]
    wanted = {field.name for field in fields(kind)}
    plan: Plan = kind(**recipe.plan.model_dump(include=wanted))
    return plan


def new_backbone(recipe: Recipe, spec: TokenizerSpec, text_dim: int) -> Factorized | Joint:
    """A backbone with fresh weights, keyed by the recipe's seed."""
    backbone = build_backbone(recipe.model, spec.channels, text_dim)
    backbone.init_weights(torch_generator(recipe.seed, "weights"))
    return backbone


def recipe_spec(recipe: Recipe) -> TokenizerSpec:
    """The shape rule of the tokenizer that a recipe names or would fit."""
    config = recipe.tokenizer
    if config.name_or_path:
        return load_tokenizer(config.name_or_path).spec
    return TokenizerSpec(config.latent_d, config.latent_f, config.latent_t, config.first_alone)


def text_encoder_for(recipe: Recipe) -> TextEncoder:
    """The recipe's text encoder; a trained one with fresh weights."""
    return build_text_encoder(recipe.text_encoder, recipe.seed)


@dataclass(frozen=True)
class Parts:
    """What a training run is made of."""

    recipe: Recipe
    cache: Cache
    tokenizer: Tokenizer
    text_encoder: TextEncoder
    backbone: Factorized | Joint
    method: Denoise
    plan: Plan
    loader: Loader
    heldout: Loader
    ranks: Ranks
    notes: tuple[str, ...]
    """What the user should know before it starts."""

    def tokens_per_clip(self) -> int:
        """Video tokens of the longest clip."""
        cells = max(math.prod(self.cache.latent_shape(bucket)[:3]) for bucket in self.cache.buckets)
        return cells // math.prod(self.recipe.model.patch)

    def model(self) -> Model:
        """The model as it stands, for previews."""
        predictor = _predictor(self.recipe, self.backbone)
        return Model(self.recipe, self.tokenizer, self.text_encoder, predictor, self.plan, self.ranks.device)

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
            folders={"tokenizer": self.tokenizer, "text_encoder": self.text_encoder},
            data=self.loader.fingerprint(),
            reporter=reporter,
            on_sample=on_sample,
        )


def assemble(recipe: Recipe, cache: Cache, ranks: Ranks) -> Parts:
    """Everything that training needs. Raises UserError if the cache is not the recipe's."""
    loader = Loader(cache, recipe, ranks.rank, ranks.world)
    heldout = Loader(cache, recipe, ranks.rank, ranks.world, split="heldout")
    text_encoder = text_encoder_for(recipe)
    plan = build_plan(recipe)
    tokenizer = cache.tokenizer()
    backbone = new_backbone(recipe, tokenizer.spec, text_encoder.dim)
    modules: dict[str, nn.Module] = {"backbone": backbone, **_trained(text_encoder)}
    obstacle = why_not_compile(ranks.device) if recipe.train.compile else ""
    parallelize(modules, ranks, recipe.train.sharding, recipe.train.compile and not obstacle)
    method = METHODS[recipe.train.method](recipe, backbone, plan, tokenizer.spec, text_encoder)
    notes = (f"train.compile: {obstacle}",) if obstacle else ()
    return Parts(
        recipe, cache, tokenizer, text_encoder, backbone, method, plan, loader, heldout, ranks, notes
    )


def fresh_model(recipe: Recipe, device: torch.device) -> Model:
    """The model that training would start from. A tokenizer that is yet to be fitted is fitted on noise.

    Only shapes and wiring of such a tokenizer mean anything; the doctor asks no more of it.
    """
    config = recipe.tokenizer
    if config.name_or_path:
        tokenizer = load_tokenizer(config.name_or_path)
    else:
        spec = recipe_spec(recipe)
        shape = (spec.pixel_frames(2), 4 * spec.spatial, 4 * spec.spatial, 3)
        noise = torch.rand((64, *shape), generator=torch_generator(recipe.seed, "noise")) * 255
        tokenizer = fit_tokenizer(config, list(noise.to(torch.uint8)))
    text_encoder = text_encoder_for(recipe)
    backbone = new_backbone(recipe, tokenizer.spec, text_encoder.dim).to(device)
    predictor = _predictor(recipe, backbone)
    return Model(recipe, tokenizer, text_encoder, predictor, build_plan(recipe), device)


def _predictor(recipe: Recipe, backbone: Factorized | Joint) -> Predictor:
    return Predictor(backbone, recipe.model.prediction, PATHS[recipe.flow_matching.path])


def _trained(text_encoder: TextEncoder) -> dict[str, nn.Module]:
    """The text encoder as a module of the run, if it is trained."""
    if not text_encoder.trainable:
        return {}
    assert isinstance(text_encoder, nn.Module)
    return {"text_encoder": text_encoder}


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` takes the accelerator if there is one. Raises UserError for a device that is not here."""
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: cannot be used here ({reason}); use auto or cpu") from None


def names_recipe(what: str) -> bool:
    """Whether a command's argument means a recipe and not a folder; a packaged name wins, as in
    ``load_recipe``.

    Raises:
        UserError: it is neither.
    """
    path = Path(what)
    if what in packaged_recipes() or path.is_file() or path.suffix in (".yaml", ".yml"):
        return True
    if path.is_dir():
        return False
    raise UserError(
        f"{what}: no such recipe, cache or checkpoint; "
        f"recipes that come along: {', '.join(packaged_recipes())}"
    )


def load_model(path: str | Path, *, raw: bool = False, device: str = "auto") -> Model:
    """A model from a checkpoint or run folder, with averaged weights unless ``raw`` or none were kept.

    Raises:
        UserError: no checkpoint there, it is damaged, or no such device; says which.
    """
    place = pick_device(device)
    saved = checkpoint.load(Path(path))
    recipe = load_recipe(saved.folder / "recipe.yaml")
    tokenizer: Tokenizer = load_tokenizer(saved.folder / "tokenizer")
    text_encoder = load_text_encoder(saved.folder / "text_encoder")
    backbone = build_backbone(recipe.model, tokenizer.spec.channels, text_encoder.dim)
    trained: dict[str, nn.Module] = {"backbone": backbone, **_trained(text_encoder)}
    weights = saved.weights(ema=not raw)
    fill(named_state(trained), weights, str(saved.folder))
    for module in (backbone, text_encoder):
        if isinstance(module, nn.Module):
            module.to(place).eval().requires_grad_(False)
    return Model(recipe, tokenizer, text_encoder, _predictor(recipe, backbone), build_plan(recipe), place)
