"""What made a cache: everything that decides its latents, by recipe key, and the words for what differs.

Two caches with equal identities hold equal latents for equal clips; a recipe of another is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from motionloom.config.recipe import Recipe
from motionloom.durable import write_atomic
from motionloom.errors import UserError
from motionloom.tokenizers import (
    AudioTokenizer,
    AudioTokenizerSpec,
    Tokenizer,
    TokenizerSpec,
    mixes_frames,
    named_otherwise,
    open_audio_tokenizer,
)

FORMAT = 1
LATENT_DTYPE = "float16"
"""Latents have deviation 1; half precision rounds each by at most 2^-11 of itself (0.05 %)."""

IDENTITY_FILE = "cache.json"

PARTS = {"audio": "sound", "references": "references", "masks": "masks"}
"""Sections of a recipe that add something to each clip, with ``enabled``, and what that is called."""

STORY_KEYS = ("plan.type", "stories.frames")
"""Keys that decide nothing but the latents of clips of several shots."""


@dataclass(frozen=True)
class Identity:
    """What made a cache."""

    made_with: Mapping[str, Any]
    """Recipe keys and their values, as JSON holds them."""
    tokenizer: str
    """The tokenizer's fingerprint; empty for sound alone."""
    spec: TokenizerSpec
    dtype: str = LATENT_DTYPE
    format: int = FORMAT
    audio_tokenizer: str = ""
    """The audio tokenizer's fingerprint; empty without sound."""
    audio_spec: AudioTokenizerSpec | None = None

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all the above."""
        return hashlib.sha256(json.dumps(self._content(), sort_keys=True).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Write ``cache.json``, whole or not at all."""
        content = {"fingerprint": self.fingerprint, **self._content()}
        write_atomic(folder / IDENTITY_FILE, (json.dumps(content, indent=2) + "\n").encode())

    @staticmethod
    def read(folder: Path) -> Identity:
        """Read ``cache.json``.

        Raises:
            UserError: the folder is no cache, or one of another format.
        """
        file = folder / IDENTITY_FILE
        make = "make one: motionloom cache RECIPE --manifest M --out DIR"
        if not file.is_file():
            raise UserError(f"{folder}: is not a cache ({IDENTITY_FILE} is missing); name one or {make}")
        try:
            content = json.loads(file.read_text())
            if content["format"] != FORMAT:
                raise UserError(
                    f"{folder}: is a cache of format {content['format']}, this version reads {FORMAT}; {make}"
                )
            spec = TokenizerSpec(**content["tokenizer_spec"])
            heard = content.get("audio_spec")
            found = Identity(
                content["made_with"],
                content["tokenizer"],
                spec,
                content["dtype"],
                audio_tokenizer=content.get("audio_tokenizer", ""),
                audio_spec=None if heard is None else AudioTokenizerSpec(**heard),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: is damaged ({error}); restore it or {make}") from error
        if found.fingerprint != content["fingerprint"]:
            raise UserError(f"{file}: was edited by hand, its fingerprint is wrong; restore it or {make}")
        return found

    def _content(self) -> dict[str, Any]:
        heard: dict[str, Any] = {}
        if self.audio_spec is not None:
            heard = {"audio_tokenizer": self.audio_tokenizer, "audio_spec": asdict(self.audio_spec)}
        return {
            "format": self.format,
            "dtype": self.dtype,
            "tokenizer": self.tokenizer,
            "tokenizer_spec": asdict(self.spec),
            "made_with": dict(self.made_with),
            **heard,
        }


def identify(recipe: Recipe, tokenizer: Tokenizer | None, audio: AudioTokenizer | None = None) -> Identity:
    """The identity of the cache that ``recipe`` makes with these tokenizers; sound needs none of pixels."""
    return Identity(
        decisive_keys(recipe),
        "" if tokenizer is None else tokenizer.fingerprint(),
        asked_spec(recipe) if tokenizer is None else tokenizer.spec,
        audio_tokenizer="" if audio is None else audio.fingerprint(),
        audio_spec=None if audio is None else audio.spec,
    )


def asked_spec(recipe: Recipe) -> TokenizerSpec:
    """The shape rule that a recipe asks of its tokenizer."""
    t = recipe.tokenizer
    return TokenizerSpec(t.latent_d, t.latent_f, t.latent_t, t.first_alone)


def decisive_keys(recipe: Recipe) -> dict[str, Any]:
    """The recipe keys that decide latents and are in force; one that another switches off is left out."""
    keys: dict[str, Any] = {
        "video.fps": recipe.video.fps,
        "video.frame_stride": recipe.video.frame_stride,
        "bucketing.enabled": recipe.bucketing.enabled,
        "preprocess.crop": recipe.preprocess.crop,
        "preprocess.num_crops": recipe.preprocess.num_crops,
        "preprocess.background": list(recipe.preprocess.background),
    }
    if recipe.bucketing.enabled:
        keys["bucketing.buckets"] = sorted(map(list, set(recipe.bucketing.buckets)))
    else:
        keys |= {"video.width": recipe.video.width, "video.height": recipe.video.height}
    if recipe.bucketing.enabled and recipe.bucketing.frames:
        keys["bucketing.frames"] = sorted(set(recipe.bucketing.frames))
    else:
        keys["video.num_frames"] = recipe.video.num_frames
    if not recipe.tokenizer.name_or_path:
        # How the cache's own tokenizer is fitted; a named one is compared by its fingerprint.
        keys["tokenizer.whiten"] = recipe.tokenizer.whiten
    if recipe.preprocess.crop == "shifted":
        keys |= {
            "preprocess.shift_fraction": recipe.preprocess.shift_fraction,
            "preprocess.seed": crop_seed(recipe),
        }
    return keys | _story_keys(recipe) | _part_keys(recipe)


def _story_keys(recipe: Recipe) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    if recipe.of_shots and not mixes_frames(recipe.tokenizer):
        keys["plan.type"] = "scenes"  # shots are encoded alone; those of a VAE always are
    if recipe.stories.frames is not None:
        keys["stories.frames"] = recipe.stories.frames
    return keys


def _part_keys(recipe: Recipe) -> dict[str, Any]:
    """Keys of what stands beside the frames."""
    keys: dict[str, Any] = {}
    if recipe.audio.enabled:
        named = ("enabled", "type", "sample_rate", "channels", "latents_per_second")
        keys |= {f"audio.{name}": getattr(recipe.audio, name) for name in named}
        if not recipe.audio.name_or_path:
            keys["audio.whiten"] = recipe.audio.whiten
    if recipe.references.enabled:
        keys |= {f"references.{name}": value for name, value in recipe.references.model_dump().items()}
    if recipe.masks.enabled:
        keys["masks.enabled"] = True
    return keys


def crop_seed(recipe: Recipe) -> int:
    """Seed of the shifted crops."""
    return recipe.seed if recipe.preprocess.seed is None else recipe.preprocess.seed


def mismatches(
    identity: Identity,
    recipe: Recipe,
    *,
    tokenizer: Tokenizer | None = None,
    audio: AudioTokenizer | None = None,
    reading: bool = False,
    stories: bool = True,
) -> list[str]:
    """Where the recipe, or a tokenizer at hand, is not what made the cache; one phrase per key.

    Without ``tokenizer`` the one that `tokenizer.name_or_path` names is compared; an empty name means the
    cache's own. The same holds for ``audio``.

    Args:
        reading: the cache may hold more than the recipe asks for, such as sound.
        stories: False for a cache without a clip of several shots, where what decides only those is free.
    """
    found = []
    made_with, wanted = dict(identity.made_with), decisive_keys(recipe)
    for part, what in PARTS.items():
        has, wants = (f"{part}.enabled" in keys for keys in (made_with, wanted))
        if has != wants and not (reading and has):
            holds = (
                f"{part}.enabled is {str(has).lower()} in the cache and {str(wants).lower()} in the recipe"
            )
            found.append(f"{holds} (it holds {'no ' * (not has)}{what})")
        if has != wants:
            made_with, wanted = (_without(keys, f"{part}.") for keys in (made_with, wanted))
    for key in sorted(made_with.keys() | wanted.keys()):
        if key in STORY_KEYS and not stories:
            continue
        if key in wanted and key in made_with and wanted[key] != made_with[key]:
            found.append(f"{key} is {made_with[key]} in the cache and {wanted[key]} in the recipe")
        elif key.startswith(("tokenizer.", "audio.")):
            continue
        elif key not in wanted or key not in made_with:
            found += _one_sided(key, made_with, wanted)
    found += _spec_mismatches(identity.spec, recipe, "in the cache")
    if identity.tokenizer:
        named, own = recipe.tokenizer.name_or_path, None
        if tokenizer is not None:
            own = None if tokenizer.fingerprint() == identity.tokenizer else tokenizer.fingerprint()
        elif named:
            own = named_otherwise(recipe.tokenizer, identity.tokenizer)
        found += _other_tokenizer("tokenizer", identity.tokenizer, own, named)
    if identity.audio_tokenizer and recipe.audio.enabled:
        named = recipe.audio.name_or_path
        if audio is None and named:
            audio = open_audio_tokenizer(recipe.audio)
        same = audio is None or audio.fingerprint() == identity.audio_tokenizer
        own = None if same or audio is None else audio.fingerprint()
        found += _other_tokenizer("audio tokenizer", identity.audio_tokenizer, own, named)
    return found


def _without(keys: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if not key.startswith(prefix)}


def _other_tokenizer(what: str, cached: str, own: str | None, named: str) -> list[str]:
    """Args: own: the fingerprint of another one; none: it is the cache's."""
    if own is None:
        return []
    name = f" ({named})" if named else ""
    return [f"the {what} is {cached[:12]} in the cache and {own[:12]}{name} in the recipe"]


def _one_sided(key: str, cached: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """A key that one side alone has follows from a switch that differs anyway, and earns no phrase ..."""
    switches = ("bucketing.enabled", "preprocess.crop")
    if any(cached.get(switch) != wanted.get(switch) for switch in switches):
        return []
    # ... but for the two ways of giving lengths, which need no switch.
    sides = [f"set to {side[key]}" if key in side else "not set" for side in (cached, wanted)]
    return [f"{key} is {sides[0]} in the cache and {sides[1]} in the recipe"]


def _spec_mismatches(spec: TokenizerSpec, recipe: Recipe, where: str) -> list[str]:
    asked = recipe.tokenizer
    pairs = {
        "tokenizer.latent_f": (spec.spatial, asked.latent_f),
        "tokenizer.latent_t": (spec.temporal, asked.latent_t),
        "tokenizer.latent_d": (spec.channels, asked.latent_d),
        "tokenizer.first_alone": (spec.first_alone, asked.first_alone),
    }
    return [
        f"{key} is {has} {where} and {wants} in the recipe"
        for key, (has, wants) in pairs.items()
        if has != wants
    ]


def require_spec(spec: TokenizerSpec, recipe: Recipe) -> None:
    """Refuse a tokenizer whose shape rule is not the recipe's.

    Raises:
        UserError: names the first key that differs.
    """
    if wrong := _spec_mismatches(spec, recipe, "in the tokenizer"):
        raise UserError(
            f"{wrong[0]}: set the recipe's to the tokenizer's, or name another tokenizer.name_or_path"
        )
