"""Recipe -> objects. The one place where members of the axes meet."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from motionloom.backbones import FAMILIES, BackboneModule, backbone_sizes, build_backbone
from motionloom.backbones.families import Sizes, SizesNote, recognise
from motionloom.backbones.growing import with_first_values
from motionloom.backbones.prediction import Predictor
from motionloom.backbones.weights import Weights, load_into, open_weights
from motionloom.cli.adapters import (
    FOLDERS,
    Adapted,
    adapt,
    adapted_checkpoint,
    other_tokenizers,
    same_tokenizer,
    with_whole_paths,
)
from motionloom.cli.lesson import Lesson, make_lesson
from motionloom.config import Recipe, load_recipe, load_recipe_with_notes, packaged_recipes
from motionloom.data.cache import Cache
from motionloom.data.cache.pairs import require_levels
from motionloom.data.loader import Loader
from motionloom.errors import UserError
from motionloom.flow import PATHS
from motionloom.generate import Model
from motionloom.methods import Method, build_method
from motionloom.parallel import Ranks, fill, load_weights, named_state, parallelize, why_not_compile
from motionloom.plans import PLANS, Conditions, Plan
from motionloom.rng import torch_generator
from motionloom.text import build_text_encoder, cached_text_encoder, load_text_encoder
from motionloom.text.base import TextEncoder
from motionloom.tokenizers import (
    AbsentTokenizer,
    Tokenizer,
    fit_audio_tokenizer,
    fit_tokenizer,
    load_audio_tokenizer,
    load_tokenizer,
    needs_clips,
    open_audio_tokenizer,
    open_tokenizer,
    with_decoder,
)
from motionloom.tokenizers.audio import AudioTokenizer
from motionloom.tokenizers.base import TokenizerSpec
from motionloom.train import checkpoint
from motionloom.train.checkpoint import Checkpoint, Saveable
from motionloom.train.loop import OnSample, Trainer
from motionloom.train.lora import cast_blocks, measure_lengths
from motionloom.train.parts import train_only
from motionloom.train.patterns import Target
from motionloom.train.report import Reporter
from motionloom.train.state import base_of
from motionloom.train.tensors import Renamed, TensorFile

LARGE = 500_000_000
"""Parameters."""


def build_plan(recipe: Recipe) -> Plan:
    """The recipe's plan; of its ``plan`` section the plan takes the fields it has."""
    kind = PLANS[recipe.plan.type]
    wanted = {field.name for field in fields(kind)} - {"conditions"}
    conditions = Conditions(recipe.plan.conditions, recipe.plan.choose)
    plan: Plan = kind(conditions=conditions, **recipe.plan.model_dump(include=wanted))
    return plan


@dataclass(frozen=True)
class Start:
    """What a backbone starts from, besides the recipe."""

    sizes: Sizes | None = None
    """Of a published backbone; None for the own ones, whose sizes the recipe says."""
    weights: Weights | None = None
    """None: weights are drawn by the recipe's seed."""


def backbone_start(recipe: Recipe) -> Start:
    """Sizes and weights of the backbone that a recipe names; nothing is read but headers.

    ``model.name_or_path`` may also be a run folder or checkpoint of this project: its (averaged) weights.

    Raises:
        UserError: no such preset, or weights that cannot be opened or are of another family or size.
    """
    model = recipe.model
    if (base := adapted_checkpoint(recipe)) is not None:
        return Start(None, checkpoint_weights(base, ema=True))
    if not model.imported:
        return Start()
    if not model.name_or_path:
        return Start(backbone_sizes(model))
    path = Path(model.name_or_path).expanduser()
    if not is_checkpoint(path):
        found = recognise(open_weights(path), model.type, model.preset)
        return Start(found.sizes, found.weights)
    saved = checkpoint.load(path)
    note = SizesNote.load(saved.folder / "backbone")
    if note.family.name != model.type:
        raise UserError(
            f"{saved.folder} holds a {note.family.name}, but model.type is {model.type}: set that"
        )
    return Start(note.sizes, checkpoint_weights(saved, ema=True))


def checkpoint_weights(saved: Checkpoint, *, ema: bool) -> Weights:
    """The backbone's weights in a checkpoint, unread; averaged ones if asked for and there."""
    return open_weights(saved.weights(ema).path).under("backbone.")


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint of this project, or a run that holds them."""
    return (path / checkpoint.MANIFEST).is_file() or (path / "checkpoints").is_dir()


def new_backbone(
    recipe: Recipe, spec: TokenizerSpec, text_dim: int, start: Start | None = None, device: str = "cpu"
) -> BackboneModule:
    """The backbone that a run starts with: its weights loaded, or drawn by the recipe's seed.

    Args:
        start: what :func:`backbone_start` found; None: it is asked.
        device: where; ``meta`` is shapes alone, and loads nothing.
    """
    start = start or backbone_start(recipe)
    shapes = device == "meta" or start.weights is not None
    backbone = build_backbone(
        recipe.model,
        spec.channels,
        text_dim,
        audio_channels=_audio_channels(recipe),
        sizes=start.sizes,
        device="meta" if shapes else device,
    )
    if device == "meta":
        return backbone
    if start.weights is not None:
        generator = torch_generator(recipe.seed, "weights")
        load_into(backbone, with_first_values(backbone, start.weights, generator), device=device)
    else:
        backbone.init_weights(torch_generator(recipe.seed, "weights"))
    return backbone


def _audio_channels(recipe: Recipe) -> int:
    """Channels of a latent of sound; 0 without sound."""
    return recipe.audio.channels if recipe.audio.enabled else 0


def recipe_spec(recipe: Recipe) -> TokenizerSpec:
    """The shape rule of the tokenizer that a recipe names or would fit."""
    config = recipe.tokenizer
    if not needs_clips(config):
        return open_tokenizer(config).spec
    return TokenizerSpec(config.latent_d, config.latent_f, config.latent_t, config.first_alone)


def text_encoder_for(recipe: Recipe) -> TextEncoder:
    """The recipe's text encoder; a trained one with fresh weights, and under adapters the frozen one of their
    base."""
    if (base := adapted_checkpoint(recipe)) is None:
        return build_text_encoder(recipe.text_encoder, recipe.seed)
    text_encoder = load_text_encoder(base.folder / "text_encoder")
    trained = _trained(text_encoder)
    fill(named_state(trained), _only(base.weights(ema=True), "text_encoder."), str(base.folder))
    for module in trained.values():
        module.requires_grad_(False)
    return text_encoder


def training_text(recipe: Recipe, cache: Cache) -> TextEncoder:
    """As :func:`text_encoder_for`; a large frozen model stays on the disk where its embeddings suffice."""
    previews = recipe.train.sample_every_steps > 0  # better now than after a thousand steps
    if recipe.text_encoder.type == "hash" or cache.text is None or previews:
        return text_encoder_for(recipe)
    return cached_text_encoder(recipe.text_encoder, cache.text.dim, cache.text.fingerprint)


def _only(file: TensorFile, prefix: str) -> Renamed:
    return Renamed(file, {name: name for name in file if name.startswith(prefix)})


@dataclass(frozen=True)
class Parts:
    """What a training run is made of."""

    recipe: Recipe
    cache: Cache
    tokenizer: Tokenizer
    text_encoder: TextEncoder
    backbone: BackboneModule
    method: Method
    plan: Plan
    loader: Loader
    heldout: Loader
    ranks: Ranks
    notes: tuple[str, ...]
    """What the user should know before it starts."""
    start: Start = Start()
    adapted: Adapted | None = None
    """With LoRA: what is trained, and on which base."""
    trained: tuple[Target, ...] = ()
    """With ``train.parts``: what they are."""
    audio_tokenizer: AudioTokenizer | None = None
    lesson: Lesson | None = None
    """Of a student: whom it learns from."""

    def tokens_per_clip(self) -> int:
        """Video tokens of the longest clip."""
        cells = max(math.prod(self.cache.latent_shape(bucket)[:3]) for bucket in self.cache.buckets)
        return cells // math.prod(self.recipe.model.patch)

    def model(self) -> Model:
        """The model as it stands, for previews."""
        predictor = _predictor(self.recipe, self.backbone)
        return Model(
            self.recipe,
            self.tokenizer,
            self.text_encoder,
            predictor,
            self.plan,
            self.ranks.device,
            self.audio_tokenizer,
        )

    @property
    def base(self) -> str:
        """Fingerprint of the frozen weights that training leans on: a LoRA's base, a student's teacher."""
        adapted = [] if self.adapted is None else [self.adapted.base]
        return "+".join([*adapted, *([] if self.lesson is None else [self.lesson.fingerprint])])

    def folders(self) -> dict[str, Saveable]:
        """What a checkpoint carries besides weights, to be opened without anything else."""
        # The backbone's own: those of a preset may have been fitted to tokenizer and text.
        backbone: Any = self.backbone
        note = {} if self.start.sizes is None else {"backbone": _note(self.recipe, backbone.sizes)}
        sound = {} if self.audio_tokenizer is None else {"audio_tokenizer": self.audio_tokenizer}
        return {"tokenizer": self.tokenizer, "text_encoder": self.text_encoder, **sound, **note}

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
            folders=self.folders(),
            data=self.loader.fingerprint(),
            base=self.base,
            reporter=reporter,
            on_sample=on_sample,
        )


def assemble(recipe: Recipe, cache: Cache, ranks: Ranks) -> Parts:
    """Everything that training needs. Raises UserError if the cache is not the recipe's."""
    recipe = with_whole_paths(recipe)
    loader = Loader(cache, recipe, ranks.rank, ranks.world)
    heldout = Loader(cache, recipe, ranks.rank, ranks.world, split="heldout")
    text_encoder = training_text(recipe, cache)
    plan = build_plan(recipe)
    tokenizer = cache.tokenizer() if cache.has_video else AbsentTokenizer(recipe_spec(recipe))
    audio = cache.audio_tokenizer() if recipe.audio.enabled else None
    same_tokenizer(adapted_checkpoint(recipe), tokenizer, audio)
    start = backbone_start(recipe)
    # Weights that are there go straight to where each rank wants them; only shapes are built before.
    read = {"backbone": start.weights} if start.weights is not None else {}
    backbone = new_backbone(recipe, tokenizer.spec, text_encoder.dim, start, "meta" if read else "cpu")
    modules: dict[str, nn.Module] = {"backbone": backbone, **_trained(text_encoder)}
    obstacle = why_not_compile(ranks.device) if recipe.train.compile else ""
    compile = recipe.train.compile and not obstacle
    adapted = None
    if recipe.lora.enabled:
        assert start.weights is not None, "a LoRA recipe names a base"
        adapted = adapt(modules, recipe, start.weights, ranks, _held_in(recipe))
        read = {"backbone": adapted.weights}
    parts = train_only(modules, recipe.train.parts) if recipe.train.parts else []
    besides = adapted.besides if adapted is not None else ()
    loaded = parallelize(
        # Roll-outs meet a past of another length in each chunk, and would compile for each.
        modules,
        ranks,
        recipe.train.sharding,
        compile and not _rolls_out(recipe),
        read,
        besides,
    )
    measure_lengths(backbone)
    predictor = _predictor(recipe, backbone)
    student = Model(recipe, tokenizer, text_encoder, predictor, plan, ranks.device, audio)
    lesson = make_lesson(recipe, student, ranks, compile)
    if recipe.train.method == "ode":
        require_levels(cache, recipe.distil.levels, recipe.flow_matching.path)
    whom = () if lesson is None else (lesson.teacher, lesson.critic, lesson.judge, lesson.critic_model)
    method = build_method(recipe, student, backbone, *whom)
    notes = [f"train.compile: {obstacle}"] if obstacle else []
    notes += [f"{read[name].where}: {found}" for name, found in loaded.items()]
    notes += _other_latents(recipe, tokenizer, audio)
    return Parts(
        recipe,
        cache,
        tokenizer,
        text_encoder,
        backbone,
        method,
        plan,
        loader,
        heldout,
        ranks,
        tuple(notes),
        start,
        adapted,
        tuple(parts),
        audio,
        lesson,
    )


def _rolls_out(recipe: Recipe) -> bool:
    return recipe.train.method == "matching" and recipe.distil.source == "rollout"


def _other_latents(recipe: Recipe, tokenizer: Tokenizer, audio: AudioTokenizer | None) -> list[str]:
    """What ``train.init_from`` has never seen: the network must then learn to read anew."""
    if not recipe.train.init_from:
        return []
    base = checkpoint.load(Path(recipe.train.init_from))
    return [
        f"{base.folder} was trained on latents of another {name} than the cache's: to go on from what it "
        f"knows, make the cache with {name}.name_or_path={base.folder / FOLDERS[name]}"
        for name in other_tokenizers(base, tokenizer, audio)
    ]


def fresh_model(recipe: Recipe, device: torch.device) -> Model:
    """The model that training would start from, for the doctor, who asks for shapes and wiring alone.

    A tokenizer that is yet to be fitted is fitted on noise. Of a published backbone of more than
    :data:`LARGE` parameters only the first blocks are built.
    """
    config = recipe.tokenizer
    if recipe.trains_tokenizer:
        raise UserError(
            f"train.method {recipe.train.method} trains a tokenizer and no backbone: look at it with "
            "`motionloom inspect`"
        )
    if not needs_clips(config):
        tokenizer = open_tokenizer(config)
    else:
        spec = recipe_spec(recipe)
        shape = (spec.pixel_frames(2), 4 * spec.spatial, 4 * spec.spatial, 3)
        noise = torch.rand((64, *shape), generator=torch_generator(recipe.seed, "noise")) * 255
        tokenizer = fit_tokenizer(config, list(noise.to(torch.uint8)))
    text_encoder = text_encoder_for(recipe)
    start = _thinned(recipe, backbone_start(recipe))
    backbone = new_backbone(recipe, tokenizer.spec, text_encoder.dim, start).to(device)
    predictor = _predictor(recipe, backbone)
    plan, audio = build_plan(recipe), _fresh_audio(recipe) if recipe.audio.enabled else None
    return Model(recipe, tokenizer, text_encoder, predictor, plan, device, audio)


def _fresh_audio(recipe: Recipe) -> AudioTokenizer:
    """The audio tokenizer that a recipe names, or one that is fitted on noise."""
    if recipe.audio.name_or_path:
        return open_audio_tokenizer(recipe.audio)
    rate = recipe.audio.sample_rate
    noise = torch.rand((16, 1, 4 * rate), generator=torch_generator(recipe.seed, "noise of sound"))
    return fit_audio_tokenizer(recipe.audio, list(noise * 2 - 1), rate)


def _thinned(recipe: Recipe, start: Start) -> Start:
    """Two blocks of a large published backbone: all are wired alike."""
    if start.sizes is None:
        return start
    family = FAMILIES[recipe.model.type]
    if sum(map(math.prod, family.shapes(start.sizes).values())) <= LARGE:
        return start
    sizes: Any = start.sizes
    thin: Sizes = replace(sizes, num_layers=min(2, sizes.num_layers))
    kept = family.shapes(thin)
    return Start(thin, None if start.weights is None else start.weights.only(kept))


def _note(recipe: Recipe, sizes: Sizes) -> SizesNote:
    return SizesNote(FAMILIES[recipe.model.type], sizes)


def _predictor(recipe: Recipe, backbone: BackboneModule) -> Predictor:
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


@runtime_checkable
class Movable(Protocol):
    """Has a device: VAEs and text encoders of the field."""

    def to(self, device: torch.device) -> object:
        """Go there."""
        ...


@dataclass(frozen=True)
class Opened(Model):
    """A model that was opened to generate with."""

    weights: Weights | None = None
    """What its backbone was read from, without adapters."""


def open_model(
    what: str | Path,
    *,
    raw: bool = False,
    device: str = "auto",
    decoder: Path | None = None,
    tell: Callable[[str], object] = lambda note: None,
) -> Opened:
    """A model to generate with: a run, a checkpoint, or a recipe that names published weights.

    Args:
        decoder: a tokenizer of the same latents, to decode with.

    Raises:
        UserError: as :func:`load_model`, :func:`published_model` and :func:`with_decoder`.
    """
    if str(what) in packaged_recipes() or Path(what).suffix in (".yaml", ".yml"):
        recipe, notes = load_recipe_with_notes(str(what))
        for note in notes:
            tell(note)
        model = published_model(recipe, str(what), device)
    else:
        model = load_model(what, raw=raw, device=device)
    if decoder is None:
        return model
    tokenizer = with_decoder(model.tokenizer, decoder)
    _move(model.device, tokenizer)
    return replace(model, tokenizer=tokenizer)


def published_model(recipe: Recipe, name: str, device: str = "auto") -> Opened:
    """The model that a recipe's ``name_or_path`` keys name, not trained by us.

    Blocks are held in the dtype that they compute in: bf16 takes half the memory and gives the same clips.

    Args:
        name: of the recipe, for messages.

    Raises:
        UserError: the recipe leaves out weights or a tokenizer, or they cannot be opened.
    """
    place = pick_device(device)
    start = backbone_start(recipe)
    if start.weights is None or not recipe.tokenizer.name_or_path:
        missing = "model" if start.weights is None else "tokenizer"
        raise UserError(
            f"{name}: {missing}.name_or_path is empty, so there is nothing to generate with yet: set it, or "
            "train the recipe and name the run"
        )
    tokenizer, text_encoder = open_tokenizer(recipe.tokenizer), text_encoder_for(recipe)
    backbone = new_backbone(recipe, tokenizer.spec, text_encoder.dim, start, "meta")
    if (dtype := _held_in(recipe)) is not None:
        cast_blocks(backbone, dtype)
    load_weights(backbone, start.weights, Ranks(device=place))
    backbone.eval().requires_grad_(False)
    _move(place, tokenizer, text_encoder)
    audio = open_audio_tokenizer(recipe.audio) if recipe.audio.enabled else None
    _move(place, audio)
    predictor, plan = _predictor(recipe, backbone), build_plan(recipe)
    return Opened(recipe, tokenizer, text_encoder, predictor, plan, place, audio, start.weights)


def _held_in(recipe: Recipe) -> torch.dtype | None:
    """What frozen linear layers of blocks may be held in: what autocast makes of them anyhow."""
    return torch.bfloat16 if recipe.train.precision == "bf16" else None


def _move(place: torch.device, *parts: object) -> None:
    for part in parts:
        if isinstance(part, Movable):
            part.to(place)


def load_model(
    path: str | Path, *, raw: bool = False, device: str = "auto", shapes_only: bool = False
) -> Opened:
    """A model from a checkpoint or run folder, with averaged weights unless ``raw`` or none were kept.

    Args:
        shapes_only: build the backbone on ``meta``, to be looked at and not to be run.

    Raises:
        UserError: no checkpoint there, it is damaged, or no such device; says which.
    """
    place = pick_device(device)
    saved = checkpoint.load(Path(path))
    recipe = load_recipe(saved.folder / "recipe.yaml")
    if recipe.trains_tokenizer:
        raise UserError(
            f"{path} trained a tokenizer, not a model: write it out with `motionloom convert {path} FOLDER "
            "--cache CACHE`, and name the folder in tokenizer.name_or_path"
        )
    tokenizer: Tokenizer = load_tokenizer(saved.folder / "tokenizer")
    text_encoder = load_text_encoder(saved.folder / "text_encoder")
    sizes = SizesNote.load(saved.folder / "backbone").sizes if recipe.model.imported else None
    audio = load_audio_tokenizer(saved.folder / "audio_tokenizer") if recipe.audio.enabled else None
    backbone = build_backbone(
        recipe.model,
        tokenizer.spec.channels,
        text_encoder.dim,
        audio_channels=_audio_channels(recipe),
        sizes=sizes,
        device="meta",
    )
    trained: dict[str, nn.Module] = {"backbone": backbone, **_trained(text_encoder)}
    weights = None
    if recipe.lora.enabled:
        weights = _add_adapters(saved, recipe, trained, place, shapes_only)
    elif not shapes_only:
        backbone.to_empty(device=place)
    elif recipe.train.parts:
        train_only(trained, recipe.train.parts)
    if not shapes_only:
        _move(place, tokenizer, text_encoder, audio)
        fill(named_state(trained), saved.weights(ema=not raw), str(saved.folder))
    for module in (backbone, text_encoder):
        if isinstance(module, nn.Module):
            module.to("meta" if shapes_only else place).eval()
            if not shapes_only:  # whoever looks at shapes asks what was trained
                module.requires_grad_(False)
    weights = weights or checkpoint_weights(saved, ema=not raw)
    predictor, plan = _predictor(recipe, backbone), build_plan(recipe)
    return Opened(recipe, tokenizer, text_encoder, predictor, plan, place, audio, weights)


def _add_adapters(
    saved: Checkpoint, recipe: Recipe, modules: dict[str, nn.Module], place: torch.device, shapes_only: bool
) -> Weights:
    """The base's weights again, and adapters that are yet to be filled. Refuses another base; returns it."""
    try:
        weights = backbone_start(recipe).weights
    except UserError as error:
        raise UserError(
            f"{saved.folder} holds adapters alone and needs their base, {base_of(recipe)}: {error}. Put it "
            "back there, or write them to a file (motionloom lora export) and give that with --lora to the "
            "base where it is now"
        ) from None
    assert weights is not None, "a LoRA recipe names a base"
    if recipe.lora.base and "text_encoder" in modules:
        modules["text_encoder"].requires_grad_(False)
    adapted = adapt(modules, recipe, weights, Ranks(), _held_in(recipe))
    if adapted.base != saved.state["identity"]["base"]:
        raise UserError(
            f"{weights.where} ({base_of(recipe).split()[0]}) is not the base that {saved.folder} was trained "
            "on (its weights changed): put the former weights back"
        )
    if not shapes_only:
        load_weights(modules["backbone"], adapted.weights, Ranks(device=place), besides=adapted.besides)
    return weights
