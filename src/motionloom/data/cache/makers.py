"""The tokenizers of a cache: found in it, named by the recipe, or fitted; saved before the first row."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from motionloom.config.recipe import Recipe
from motionloom.data.buckets import bucket_lengths, cached_fps
from motionloom.data.cache.decode import sample_for_fit
from motionloom.data.cache.identity import IDENTITY_FILE, Identity, identify, mismatches, require_spec
from motionloom.data.cache.progress import Progress
from motionloom.data.manifest import ManifestEntry
from motionloom.data.media import VIDEO_SUFFIXES, MediaError, is_sound, read_sound
from motionloom.errors import UserError
from motionloom.rng import key_to_seed
from motionloom.tokenizers import (
    AudioTokenizer,
    Tokenizer,
    fit_audio_tokenizer,
    fit_tokenizer,
    load_audio_tokenizer,
    load_tokenizer,
    needs_clips,
    open_audio_tokenizer,
    open_tokenizer,
)

TOKENIZER, AUDIO_TOKENIZER = "tokenizer", "audio_tokenizer"
UNFINISHED = (f".{TOKENIZER}.new", f".{AUDIO_TOKENIZER}.new")
"""What a run that was killed may leave before there is a cache."""


@dataclass(frozen=True)
class Makers:
    """What makes the latents."""

    tokenizer: Tokenizer | None
    """None in a cache of sound alone."""
    audio: AudioTokenizer | None
    """None in a cache without sound."""

    def to_fastest(self) -> None:
        """Move what computes much to a GPU, where there is one."""
        if not torch.cuda.is_available():
            return
        for maker in (self.tokenizer, self.audio):
            if maker is not None and hasattr(maker, "to"):
                maker.to("cuda")


def settle_makers(
    recipe: Recipe,
    entries: Sequence[ManifestEntry],
    out: Path,
    tokenizer: Tokenizer | None,
    audio: AudioTokenizer | None,
    on_progress: Progress,
) -> Makers:
    """The cache's tokenizers; those of a new cache are saved, with ``cache.json``, before its first row.

    Raises:
        UserError: the cache was made otherwise, or there is nothing to fit a tokenizer on.
    """
    if (out / IDENTITY_FILE).exists():
        return _found(recipe, entries, out, tokenizer, audio)
    for name in UNFINISHED:
        shutil.rmtree(out / name, ignore_errors=True)  # of a run that was killed right here
    if any(not is_sound(entry.path) for entry in entries):
        tokenizer = tokenizer or _new_tokenizer(recipe, entries, on_progress)
        require_spec(tokenizer.spec, recipe)
    if recipe.audio.enabled:
        audio = audio or _new_audio(recipe, entries, on_progress)
    made: dict[str, Any] = {TOKENIZER: tokenizer, AUDIO_TOKENIZER: audio}
    made = {name: maker for name, maker in made.items() if maker is not None}
    for name, maker in made.items():
        maker.save(out / f".{name}.new")
    identify(recipe, tokenizer, audio).write(out)
    for name in made:
        (out / f".{name}.new").rename(out / name)
    return Makers(tokenizer, audio)


def _found(
    recipe: Recipe,
    entries: Sequence[ManifestEntry],
    out: Path,
    tokenizer: Tokenizer | None,
    audio: AudioTokenizer | None,
) -> Makers:
    identity = Identity.read(out)
    wrong = mismatches(identity, recipe, tokenizer=tokenizer, audio=audio)
    if not identity.tokenizer and any(not is_sound(entry.path) for entry in entries):
        wrong.append("it holds sound alone, and the manifest has pictures")
    if wrong:
        raise UserError(
            f"{out}: was made otherwise and cannot be continued: {'; '.join(wrong)}; "
            "give the recipe the cache's values, or name a new folder with --out"
        )
    for name in (TOKENIZER, AUDIO_TOKENIZER):
        if (out / f".{name}.new").exists():
            (out / f".{name}.new").rename(out / name)
    if tokenizer is None and identity.tokenizer:
        tokenizer = cached_tokenizer(out, identity)
    if audio is None and identity.audio_tokenizer:
        audio = cached_audio_tokenizer(out, identity)
    return Makers(tokenizer, audio)


def cached_tokenizer(folder: Path, identity: Identity) -> Tokenizer:
    """The tokenizer in a cache, which is the one that made its latents.

    Raises:
        UserError: it is missing or damaged, or another one has come in its place.
    """
    tokenizer = load_tokenizer(folder / TOKENIZER)
    _require_same(folder / TOKENIZER, tokenizer.fingerprint(), identity.tokenizer)
    return tokenizer


def cached_audio_tokenizer(folder: Path, identity: Identity) -> AudioTokenizer:
    """The same of sound."""
    tokenizer = load_audio_tokenizer(folder / AUDIO_TOKENIZER)
    _require_same(folder / AUDIO_TOKENIZER, tokenizer.fingerprint(), identity.audio_tokenizer)
    return tokenizer


def _require_same(place: Path, found: str, cached: str) -> None:
    if found != cached:
        raise UserError(
            f"{place}: is {found[:12]} and the cache's latents were made by {cached[:12]}: its files were "
            "changed since; restore them, or cache the clips anew"
        )


def _new_tokenizer(recipe: Recipe, entries: Sequence[ManifestEntry], on_progress: Progress) -> Tokenizer:
    if not needs_clips(recipe.tokenizer):
        return open_tokenizer(recipe.tokenizer)
    return fit_tokenizer(recipe.tokenizer, sample_for_fit(recipe, entries, on_progress))


def _new_audio(recipe: Recipe, entries: Sequence[ManifestEntry], on_progress: Progress) -> AudioTokenizer:
    if recipe.audio.name_or_path:
        return open_audio_tokenizer(recipe.audio)
    sounds = _sounds_for_fit(recipe, entries, on_progress)
    return fit_audio_tokenizer(recipe.audio, sounds, recipe.audio.sample_rate)


def _sounds_for_fit(recipe: Recipe, entries: Sequence[ManifestEntry], on_progress: Progress) -> list[Tensor]:
    """Sounds (S, N) to fit a tokenizer on: spread over the manifest by a hash, whatever its order."""
    seconds = bucket_lengths(recipe)[-1] / cached_fps(recipe)
    wanted = min(recipe.audio.fit_clips, len(entries))
    sounds: list[Tensor] = []
    for entry in sorted(entries, key=lambda entry: key_to_seed("fit", entry.id)):
        path = entry.audio or entry.files()[0]
        if not is_sound(path) and path.suffix.lower() not in VIDEO_SUFFIXES:
            continue
        start = entry.scenes[0].start if entry.of_several_files else entry.start
        try:
            sound = read_sound(path, recipe.audio.sample_rate, start=start, seconds=seconds)
        except MediaError:
            continue  # silent, or bad: then it is listed when its turn comes
        if not sound.shape[1]:
            continue
        sounds.append(torch.from_numpy(sound))
        on_progress("sounds to fit the audio tokenizer on", len(sounds), wanted)
        if len(sounds) == wanted:
            break
    if not sounds:
        raise UserError(
            f"audio.enabled is true, but not one of {len(entries)} clips has sound: set it to false, or name "
            'sounds in the manifest ("audio")'
        )
    return sounds
