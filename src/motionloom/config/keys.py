"""The keys of a recipe: which there are, what each takes, and which one a misspelling meant."""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import SequenceMatcher, get_close_matches
from functools import cache
from typing import Any

from motionloom.config.recipe import Recipe, Section

# What other trainers call our keys, where the spelling alone would not tell.
_ELSEWHERE = {
    "accumulation": "train.grad_accum_steps",
    "attention_heads": "model.num_heads",
    "caption_dropout": "train.cfg_dropout_prob",
    "cfg": "train.sample_cfg_scale",
    "cfg_scale": "train.sample_cfg_scale",
    "channels": "tokenizer.latent_d",
    "dtype": "train.precision",
    "ema_decay": "ema.decay",
    "epochs": "train.max_steps",
    "frames": "video.num_frames",
    "grad_clip": "train.clip_grad_norm",
    "gradient_accumulation": "train.grad_accum_steps",
    "gradient_accumulation_steps": "train.grad_accum_steps",
    "gradient_checkpointing": "model.checkpoint_blocks",
    "guidance": "train.sample_cfg_scale",
    "guidance_scale": "train.sample_cfg_scale",
    "hidden_dim": "model.dim",
    "hidden_size": "model.dim",
    "layers": "model.depth",
    "learning_rate": "train.lr",
    "lora_alpha": "lora.alpha",
    "lora_rank": "lora.rank",
    "lr_scheduler": "train.schedule",
    "max_grad_norm": "train.clip_grad_norm",
    "max_train_steps": "train.max_steps",
    "minutes": "train.max_minutes",
    "mixed_precision": "train.precision",
    "name": "experiment_name",
    "num_epochs": "train.max_steps",
    "num_layers": "model.depth",
    "num_steps": "train.max_steps",
    "pretrained_model_name_or_path": "model.name_or_path",
    "prompts": "train.sample_prompts",
    "solver": "train.sample_solver",
    "stg_blocks": "guidance.skip_blocks",
    "stg_scale": "guidance.skip_scale",
    "steps": "train.max_steps",
    "timestep_shift": "flow_matching.shift",
    "warmup": "train.warmup_steps",
}


@cache
def sections() -> tuple[str, ...]:
    """Names of the sections: ``video``, ``train``, ..."""
    return tuple(name for name, field in Recipe.model_fields.items() if _is_section(field.annotation))


@cache
def keys() -> tuple[str, ...]:
    """Every key that takes a value, dotted: ``seed``, ``train.lr``, ..."""
    dotted: list[str] = []
    for name, field in Recipe.model_fields.items():
        inner = field.annotation.model_fields if _is_section(field.annotation) else ()  # type: ignore[union-attr]
        dotted += [f"{name}.{key}" for key in inner] or [name]
    return tuple(dotted)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings -> dotted keys. An empty or absent section leaves nothing; lists are values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping) and (value or dotted in sections()):
            flat |= flatten(value, f"{dotted}.")
        elif value is not None or dotted not in sections():
            flat[dotted] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys -> sections; the inverse of :func:`flatten` for known keys."""
    tree: dict[str, Any] = {}
    for dotted, value in flat.items():
        section, _, key = dotted.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[key] = value
    return tree


def unknown(dotted: str) -> str:
    """One line about a dotted key that does not exist, naming the nearest that does."""
    if dotted in sections():
        return f"{dotted} is a section, not a value: write keys below it, such as {_inside(dotted)[0]}"
    parent = dotted.rpartition(".")[0]
    if parent in keys():
        return f"{parent} takes one value, not keys such as {dotted}: expected {expected(parent)}"
    meant = nearest(dotted)
    if meant:
        return f"{dotted} is not a key; did you mean {meant}?"
    inside = _inside(dotted.partition(".")[0])
    if inside:
        names = ", ".join(key.partition(".")[2] for key in inside)
        return f"{dotted} is not a key; {dotted.partition('.')[0]} has {names}"
    return f"{dotted} is not a key; the sections are {', '.join(sections())}"


def _inside(section: str) -> list[str]:
    return [key for key in keys() if key.startswith(f"{section}.")]


def nearest(dotted: str) -> str | None:
    """The key that ``dotted`` most likely meant, in its section or in any other; None: no idea."""
    section, _, name = dotted.rpartition(".")
    if section and section not in sections():
        corrected = get_close_matches(section, sections(), 1)
        if corrected and f"{corrected[0]}.{name}" in keys():
            return f"{corrected[0]}.{name}"
    # A tokenizer of one's own has a width and blocks as well: it is meant only where nothing else is named.
    elsewhere = [key for key in keys() if section in ("", "vtp") or not key.startswith("vtp.")]
    named_so = [key for key in elsewhere if key.rpartition(".")[2] == name]
    if named_so:
        return max(named_so, key=lambda key: SequenceMatcher(None, key, dotted).ratio())
    if name in _ELSEWHERE:
        return _ELSEWHERE[name]
    # In its own section a looser likeness is enough.
    for candidates, likeness in ((_inside(section), 0.6), (keys(), 0.7), (sections(), 0.7)):
        by_name = {key.rpartition(".")[2]: key for key in reversed(candidates)}
        if close := get_close_matches(name, by_name, 1, cutoff=likeness):
            return by_name[close[0]]
    return None


def expected(dotted: str, of: type[Section] = Recipe) -> str:
    """What the key takes, in words: ``a whole number above 0``.

    Args:
        of: what the key is of.
    """
    node = of.model_json_schema()
    definitions = node.get("$defs", {})
    for part in dotted.split("."):
        if "$ref" in node:
            node = definitions[node["$ref"].rpartition("/")[2]]
        node = node["properties"][part]
    return _in_words(node)


def _in_words(node: dict[str, Any]) -> str:
    if node.keys() & {"$ref", "oneOf"}:
        return "keys of its own"
    if "anyOf" in node:
        return " or ".join(_in_words(option) for option in node["anyOf"])
    if "enum" in node or "const" in node:
        *most, last = map(str, node.get("enum", [node.get("const")]))
        return f"{', '.join(most)} or {last}" if most else last
    if "prefixItems" in node:
        return f"a list of {len(node['prefixItems'])}, each {_in_words(node['prefixItems'][0])}"
    kind = node.get("type", "")
    if kind == "array":
        return f"a list, each item {_in_words(node['items'])}"
    words = {
        "integer": "a whole number",
        "number": "a number",
        "boolean": "true or false",
        "null": "null",
        "object": "keys of its own",
    }
    text = words.get(kind, "a text")
    if "pattern" in node:
        return f"{text} of letters, digits, '.', '_' and '-'"
    at_least = "from" if node.keys() & {"maximum", "exclusiveMaximum"} else "of at least"
    words_of = {
        "exclusiveMinimum": "above",
        "minimum": at_least,
        "exclusiveMaximum": "below",
        "maximum": "to",
    }
    return " ".join([text, *(f"{word} {node[name]:g}" for name, word in words_of.items() if name in node)])


def shown(value: Any) -> str:
    """A value for a message: short, and as YAML would write it."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
