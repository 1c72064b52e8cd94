"""``motionloom inspect``: what a recipe, a cache or a checkpoint amounts to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motionloom.cli.console import Out
from motionloom.errors import UserError

if TYPE_CHECKING:
    from motionloom.config.recipe import Recipe


def run(what: str, overrides: list[str], sheet: Path | None, as_json: bool) -> None:
    """Find out what ``what`` is, and show it."""
    from motionloom.cli.assemble import names_recipe

    console = Out(as_json)
    path = Path(what)
    if names_recipe(what):
        answer = _recipe(what, overrides)
    elif overrides:
        raise UserError(f"{overrides[0]}: {what} has its own recipe; key=value is for recipes")
    elif (path / "cache.json").is_file():
        answer = _cache(path, sheet or path.parent / f"{path.name}_sheet.png")
    else:
        answer = _checkpoint(path)
    console.result(answer, _lines({k: v for k, v in answer.items() if k not in ("buckets", "attention")}))
    if isinstance(answer["buckets"], list):
        heads = list(answer["buckets"][0])
        rows = [[_short(row[head]) for head in heads] for row in answer["buckets"]]
        console.table("", [head.replace("_", " ") for head in heads], rows)
        _show_attention(console, answer["attention"])
    else:
        console.table("", ["bucket", "clips"], [[k, str(v)] for k, v in answer["buckets"].items()])


def _cache(path: Path, sheet: Path) -> dict[str, Any]:
    from motionloom.data.cache import open_cache
    from motionloom.data.sheets import contact_sheet
    from motionloom.evals.inspection import inspect_cache, sheet_clips

    cache = open_cache(path)
    contact_sheet(*sheet_clips(cache), sheet, columns=2)
    return {**inspect_cache(cache), "sheet": str(sheet)}


def _checkpoint(path: Path) -> dict[str, Any]:
    from motionloom.cli.assemble import load_model
    from motionloom.config import load_recipe
    from motionloom.evals.inspection import inspect_model
    from motionloom.train import checkpoint

    saved = checkpoint.load(path)
    recipe = load_recipe(saved.folder / "recipe.yaml")
    if recipe.trains_tokenizer:
        return {"checkpoint": str(saved.folder), "step": saved.step, **_tokenizer(recipe)}
    model = load_model(saved.folder, device="cpu", shapes_only=True)
    answer = inspect_model(model, saved.step, str(saved.folder))
    return {**answer, "attention": _attention(model.recipe, answer, model.predictor.backbone)}


def _recipe(name: str, overrides: list[str]) -> dict[str, Any]:
    from torch import nn

    from motionloom.cli.adapters import add_adapters
    from motionloom.cli.assemble import backbone_start, new_backbone, recipe_spec, text_encoder_for
    from motionloom.config import load_recipe_with_notes
    from motionloom.evals.inspection import inspect_recipe
    from motionloom.train.parts import train_only

    recipe, notes = load_recipe_with_notes(name, overrides)
    if recipe.trains_tokenizer:
        return {**_tokenizer(recipe), "notes": notes}
    recipe, assumed = _on_paper(recipe)
    notes += assumed
    modules: dict[str, nn.Module] = {}
    if recipe.text_encoder.type == "hash" or recipe.lora.base:
        text_encoder = text_encoder_for(recipe)
        text_dim = text_encoder.dim
        if isinstance(text_encoder, nn.Module):
            modules["text_encoder"] = text_encoder
    else:
        text_dim = _text_channels(recipe, notes)
    spec = recipe_spec(recipe)
    backbone = new_backbone(recipe, spec, text_dim, device="meta")
    modules = {"backbone": backbone, **modules}
    if recipe.lora.enabled:
        add_adapters(modules, recipe, backbone_start(recipe).weights)
    elif recipe.train.parts:
        train_only(modules, recipe.train.parts)
    answer = inspect_recipe(recipe, spec, modules)
    return {**answer, "attention": _attention(recipe, answer, backbone), "notes": notes}


def _tokenizer(recipe: Recipe) -> dict[str, Any]:
    """The tokenizer that a recipe trains, with the largest vocabulary that it may learn."""
    import torch

    from motionloom.evals.inspection import inspect_tokenizer
    from motionloom.methods.tokenizer.sizes import model_config
    from motionloom.tokenizers.vtp import PRESETS, VTPModel

    c = recipe.vtp
    words = PRESETS[c.preset].text_vocab_size if c.preset else c.vocab_size
    side = max(recipe.video.width, recipe.video.height)
    with torch.device("meta"):
        model = VTPModel(model_config(c, side, words, rebuilt=True), c.rope)
    return inspect_tokenizer(recipe, model)


def _on_paper(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe without the folders that are not here but whose sizes it says itself, and notes of them.

    Raises:
        UserError: weights are not here, and no preset says their sizes.
    """
    from motionloom.tokenizers import shipped_tokenizers

    notes = []
    tokenizer, model = recipe.tokenizer, recipe.model
    if _is_missing(tokenizer.name_or_path) and tokenizer.name_or_path not in shipped_tokenizers():
        notes.append(
            f"tokenizer.name_or_path {tokenizer.name_or_path} is not here: taken as the recipe says, "
            f"{tokenizer.latent_d} channels, {tokenizer.latent_f} pixels and {tokenizer.latent_t} frames "
            "a cell"
        )
        tokenizer = tokenizer.model_copy(update={"name_or_path": ""})
    if _is_missing(model.name_or_path):
        if not model.preset:
            raise UserError(
                f"model.name_or_path {model.name_or_path}: no such file or folder; check the path, or name "
                "published sizes in model.preset to ask without the weights"
            )
        notes.append(
            f"model.name_or_path {model.name_or_path} is not here: taken as model.preset {model.preset}"
        )
        model = model.model_copy(update={"name_or_path": ""})
    return recipe.model_copy(update={"tokenizer": tokenizer, "model": model}), notes


def _is_missing(name_or_path: str) -> bool:
    return bool(name_or_path) and not Path(name_or_path).expanduser().exists()


def _text_channels(recipe: Recipe, notes: list[str]) -> int:
    """Channels of a frozen language model, by its config; else those that a published backbone reads."""
    from motionloom.backbones import FAMILIES
    from motionloom.cli.assemble import backbone_start
    from motionloom.text import check_text_encoder

    text = recipe.text_encoder
    try:
        return check_text_encoder(text)
    except UserError:
        sizes = backbone_start(recipe).sizes
        if sizes is None or not _is_missing(text.name_or_path):
            raise
    backbone: Any = FAMILIES[recipe.model.type].on_meta(sizes)
    channels = int(backbone.text_dim)
    notes.append(
        f"text_encoder.name_or_path {text.name_or_path} is not here: taken with the {channels} channels that "
        f"{recipe.model.type} reads"
    )
    return channels


def _attention(recipe: Recipe, answer: Mapping[str, Any], backbone: Any) -> list[dict[str, Any]]:
    """At the largest of the recipe's sizes."""
    from motionloom.cli.assemble import build_plan
    from motionloom.evals.attention import attention_rows

    largest = max(answer["buckets"], key=lambda bucket: bucket["tokens"])
    frames, rows, columns = (n // p for n, p in zip(largest["latent"][:3], recipe.model.patch, strict=True))
    return attention_rows(recipe, build_plan(recipe), (frames, rows, columns), backbone)


def _show_attention(console: Out, rows: list[dict[str, Any]]) -> None:
    if console.as_json or not rows:
        return
    heads = ["attention", "queries", "keys", "seen", "gflop", "way"]
    console.table("", heads, [[_short(row[head]) for head in heads] for row in rows])
    lines = ["seen: share of query-key pairs that the plan allows; gflop: forward, all heads, one clip"]
    for row in rows:
        tried = sorted(row["milliseconds"].items(), key=lambda one: one[1])
        if tried:
            heads_tried = f"{(n := row['heads_measured'])} head{'s' if n > 1 else ''}"
            lines.append(f"{row['attention']}, forward and backward on this CPU, {heads_tried}:")
            lines += [f"  {ms:8.3g} ms  {way}" for way, ms in tried]
    console.result({}, lines)


def _lines(answer: Mapping[str, Any]) -> list[str]:
    """A line for each thing; one that is long has a line for each of its parts."""
    width = max(map(len, answer))
    lines = []
    for key, value in answer.items():
        parts = [_short(value)]
        if isinstance(value, Mapping):
            parts = [f"{name} {_short(part)}" for name, part in value.items()]
        elif isinstance(value, list) and value and isinstance(value[0], str):
            parts = value
        if sum(map(len, parts)) < 60:
            parts = [", ".join(parts)]
        lines.append(f"{key.replace('_', ' '):{width}}  {parts[0]}")
        lines += [" " * (width + 2) + part for part in parts[1:]]
    return lines


def _short(value: Any) -> str:
    if isinstance(value, list) and not value:
        return "none"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10_000:
        return f"{value:,}"
    return str(value)
