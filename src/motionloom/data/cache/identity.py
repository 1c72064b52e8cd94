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
from motionloom.data.media import write_atomic
from motionloom.errors import UserError
from motionloom.tokenizers import Tokenizer, TokenizerSpec, open_tokenizer

FORMAT = 1
LATENT_DTYPE = "float16"
"""Latents have deviation 1; half precision rounds each by at most 2^-11 of itself (0.05 %)."""

IDENTITY_FILE = "cache.json"


@dataclass(frozen=True)
class Identity:
    """What made a cache."""

    made_with: Mapping[str, Any]
    """Recipe keys and their values, as JSON holds them."""
    tokenizer: str
    """The tokenizer's fingerprint."""
    spec: TokenizerSpec
    dtype: str = LATENT_DTYPE
    format: int = FORMAT

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
            found = Identity(content["made_with"], content["tokenizer"], spec, content["dtype"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: is damaged ({error}); restore it or {make}") from error
        if found.fingerprint != content["fingerprint"]:
            raise UserError(f"{file}: was edited by hand, its fingerprint is wrong; restore it or {make}")
        return found

    def _content(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "dtype": self.dtype,
            "tokenizer": self.tokenizer,
            "tokenizer_spec": asdict(self.spec),
            "made_with": dict(self.made_with),
        }


def identify(recipe: Recipe, tokenizer: Tokenizer) -> Identity:
    """The identity of the cache that ``recipe`` makes with ``tokenizer``."""
    return Identity(decisive_keys(recipe), tokenizer.fingerprint(), tokenizer.spec)


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
    return keys


def crop_seed(recipe: Recipe) -> int:
    """Seed of the shifted crops."""
    return recipe.seed if recipe.preprocess.seed is None else recipe.preprocess.seed


def mismatches(identity: Identity, recipe: Recipe, *, tokenizer: Tokenizer | None = None) -> list[str]:
    """Where the recipe, or the tokenizer at hand, is not what made the cache; one phrase per key.

    Without ``tokenizer`` the one that `tokenizer.name_or_path` names is compared; an empty name means the
    cache's own.
    """
    found = []
    wanted = decisive_keys(recipe)
    for key in sorted(identity.made_with.keys() | wanted.keys()):
        if key in wanted and key in identity.made_with and wanted[key] != identity.made_with[key]:
            found.append(f"{key} is {identity.made_with[key]} in the cache and {wanted[key]} in the recipe")
        elif key.startswith("tokenizer."):
            continue
        elif key not in wanted or key not in identity.made_with:
            found += _one_sided(key, identity.made_with, wanted)
    found += _spec_mismatches(identity.spec, recipe, "in the cache")
    if tokenizer is None and recipe.tokenizer.name_or_path:
        tokenizer = open_tokenizer(recipe.tokenizer)
    if tokenizer is not None and tokenizer.fingerprint() != identity.tokenizer:
        name = f" ({recipe.tokenizer.name_or_path})" if recipe.tokenizer.name_or_path else ""
        digests = identity.tokenizer[:12], tokenizer.fingerprint()[:12]
        found.append(f"the tokenizer is {digests[0]} in the cache and {digests[1]}{name} in the recipe")
    return found


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
