"""Make or continue a cache: decode, crop, encode, commit; then the captions.

Every commit is atomic, so a run that is killed leaves a readable cache; the next run keeps what is there,
encodes what is missing or whose source changed, and ends with the rows of a run that was never stopped
(to the rounding of a tokenizer whose results depend on the batch).

Shapes: P pixel frames, H x W pixels.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from motionloom.config.recipe import Recipe
from motionloom.data.cache.decode import Decoded, decode_all, sample_for_fit
from motionloom.data.cache.identity import (
    IDENTITY_FILE,
    Identity,
    identify,
    mismatches,
    require_spec,
)
from motionloom.data.cache.tables import CLIP_SCHEMA, CLIPS, READERS, Writer, open_table
from motionloom.data.cache.text import cache_text, is_trained
from motionloom.data.manifest import ManifestEntry, Problem, Problems
from motionloom.data.media import write_atomic
from motionloom.errors import UserError
from motionloom.text import TextEncoder, build_text_encoder, check_text_encoder
from motionloom.tokenizers import (
    Tokenizer,
    VaeTokenizer,
    encode_scenes,
    fit_tokenizer,
    load_tokenizer,
    open_tokenizer,
)

Progress = Callable[[str, int, int], None]
"""(what is being done, how many of it, of how many)."""

TOKENIZER = "tokenizer"
_SKIPPED, _LOCK = "skipped.jsonl", ".lock"
_TOKENIZER_NEW = ".tokenizer.new"

# Pixels in one encode call: 256 clips of 64 x 64 x 16, or one of 512 x 512 x 64; 200 MB of float32.
_ENCODE_PIXELS = 2**24
_COMMIT_BYTES = 2**26


@dataclass(frozen=True)
class CacheReport:
    """What a run did, in clips; crops of one clip count once."""

    encoded: int
    kept: int
    """Already there and unchanged."""
    recaptioned: int
    """Kept, with a new caption or path."""
    others: int
    """In the cache but not in this manifest; they stay."""
    skipped: Problems
    longer: int
    """Clips of which only the start is used, ..."""
    unused_seconds: float
    """... and how much of them is not."""
    captions: int
    """Embedded in this run."""
    captions_cut: int
    """Longer than `text_encoder.max_length`."""
    seconds: float

    def lines(self) -> list[str]:
        """The report for people."""
        found = [
            f"encoded {self.encoded} clips, kept {self.kept} ({self.recaptioned} with a new caption or path) "
            f"in {self.seconds:.1f} s"
        ]
        if self.others:
            found.append(f"{self.others} clips of other manifests are in the cache as well")
        if self.longer:
            found.append(
                f"{self.longer} clips are longer than the recipe's: {self.unused_seconds:.0f} s stay unused"
            )
        if self.captions:
            found.append(f"embedded {self.captions} captions")
        if self.captions_cut:
            found.append(f"{self.captions_cut} captions exceed text_encoder.max_length and were cut")
        return found + (self.skipped.lines() if len(self.skipped) else [])


def build_cache(
    recipe: Recipe,
    entries: Sequence[ManifestEntry],
    out: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    text_encoder: TextEncoder | None = None,
    on_progress: Progress = lambda what, done, total: None,
    commit_seconds: float = 10.0,
) -> CacheReport:
    """Bring the cache at ``out`` in line with the recipe and the manifest's entries.

    Args:
        tokenizer: none: that of `tokenizer.name_or_path`, the cache's own, or one that is fitted now.
        text_encoder: none: the recipe's, if it is frozen.
        commit_seconds: what a kill may cost.

    Raises:
        UserError: the cache was made otherwise, ``out`` is something else or in use, the disk is full, or not
            one clip could be used. Clips that cannot be used are skipped and listed.
    """
    began = time.monotonic()
    out = Path(out)
    _check_request(recipe, entries, out)
    if text_encoder is None and not is_trained(recipe):
        # The clips take hours, and a wrong path to the words should not show behind them.
        check_text_encoder(recipe.text_encoder)
    with _locked(out):
        tokenizer = _settle_tokenizer(recipe, entries, out, tokenizer, on_progress)
        if isinstance(tokenizer, VaeTokenizer) and torch.cuda.is_available():
            tokenizer.to("cuda")
        run = _Run(out, recipe, tokenizer, commit_seconds)
        run.plan(entries)
        run.encode(on_progress)
        run.finish(len(entries))
        if text_encoder is None and not is_trained(recipe):
            text_encoder = _frozen_encoder(recipe)
        embedded = cut = 0
        if text_encoder is not None and not text_encoder.trainable:
            wordings = _all_captions(out)
            embedded = cache_text(
                out, recipe, text_encoder, wordings, lambda done, total: on_progress("captions", done, total)
            )
            cut = text_encoder.count_cut(wordings)
    return CacheReport(**run.counts(), captions=embedded, captions_cut=cut, seconds=time.monotonic() - began)


def _check_request(recipe: Recipe, entries: Sequence[ManifestEntry], out: Path) -> None:
    if not entries:
        raise UserError(
            "the manifest names no usable clip; look at its problems with: motionloom data ingest"
        )
    if recipe.preprocess.num_crops > 1 and recipe.preprocess.crop == "center":
        raise UserError(
            f"preprocess.num_crops {recipe.preprocess.num_crops} with preprocess.crop center "
            "makes equal crops: set preprocess.crop=shifted, or num_crops=1"
        )
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; name a folder for the cache")
    if out.is_dir() and not (out / IDENTITY_FILE).exists():
        names = {path.name for path in out.iterdir()} - {_LOCK, READERS, _TOKENIZER_NEW}
        foreign = sorted(name for name in names if not name.startswith(f".{IDENTITY_FILE}."))
        if foreign:
            raise UserError(f"{out}: is not a cache and not empty (it holds {foreign[0]}); name a new folder")


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """One writer at a time; the lock goes with the process, however it ends."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = open(out / _LOCK, "w")  # noqa: SIM115 - closed by the with below
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); name another folder") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{out}: another run is writing this cache; wait for it to end") from error
        yield


def _settle_tokenizer(
    recipe: Recipe,
    entries: Sequence[ManifestEntry],
    out: Path,
    tokenizer: Tokenizer | None,
    on_progress: Progress,
) -> Tokenizer:
    """The cache's tokenizer; that of a new cache is saved, with ``cache.json``, before its first row."""
    new = out / _TOKENIZER_NEW
    if (out / IDENTITY_FILE).exists():
        if wrong := mismatches(Identity.read(out), recipe, tokenizer=tokenizer):
            raise UserError(
                f"{out}: was made otherwise and cannot be continued: {'; '.join(wrong)}; "
                "give the recipe the cache's values, or name a new folder with --out"
            )
        if new.exists():
            new.rename(out / TOKENIZER)
        return tokenizer or load_tokenizer(out / TOKENIZER)
    if tokenizer is None and recipe.tokenizer.name_or_path:
        tokenizer = open_tokenizer(recipe.tokenizer)
    if tokenizer is None:
        clips = sample_for_fit(recipe, entries, on_progress)
        tokenizer = fit_tokenizer(recipe.tokenizer, clips)
    require_spec(tokenizer.spec, recipe)
    shutil.rmtree(new, ignore_errors=True)  # of a run that was killed right here
    tokenizer.save(new)
    identify(recipe, tokenizer).write(out)
    new.rename(out / TOKENIZER)
    return tokenizer


def _frozen_encoder(recipe: Recipe) -> TextEncoder:
    encoder = build_text_encoder(recipe.text_encoder, recipe.seed)
    if torch.cuda.is_available() and hasattr(encoder, "to"):
        encoder.to("cuda")
    return encoder


def _all_captions(out: Path) -> list[str]:
    """Every caption in the cache, those of clips from other manifests included."""
    table = open_table(out / CLIPS).to_table(columns=["captions", "wordings"])
    columns = (table[name].to_pylist() for name in table.column_names)
    return sorted({caption for column in columns for captions in column for caption in captions})


def _wordings(entry: ManifestEntry) -> list[str]:
    return list(dict.fromkeys([entry.caption, *entry.captions]))


def crop_ids(entry: ManifestEntry, recipe: Recipe) -> list[str]:
    """Ids of the rows of an entry: its own, or one per crop."""
    crops = recipe.preprocess.num_crops
    return [entry.id] if crops == 1 else [f"{entry.id}__c{crop:02d}" for crop in range(crops)]


def source_stamp(entry: ManifestEntry) -> str:
    """Changes when the file does (by size and time of writing), or the part of it that is taken."""
    files = sorted(entry.path.iterdir()) if entry.path.is_dir() else [entry.path]
    stats = [file.stat() for file in files]
    times = [(scene.start, scene.end) for scene in entry.scenes]
    facts = [len(files), sum(s.st_size for s in stats), max((s.st_mtime_ns for s in stats), default=0)]
    part = [entry.start, entry.end, entry.fps if entry.path.is_dir() else None, times]
    return hashlib.blake2b(json.dumps([facts, part]).encode(), digest_size=16).hexdigest()


@dataclass
class _Run:
    """One run over the clips table."""

    out: Path
    recipe: Recipe
    tokenizer: Tokenizer
    commit_seconds: float
    todo: list[ManifestEntry] = field(default_factory=list)
    kept: int = 0
    recaptioned: int = 0
    others: int = 0
    longer: int = 0
    unused_seconds: float = 0.0
    encoded: set[str] = field(default_factory=set)
    problems: Problems = field(default_factory=Problems)

    def __post_init__(self) -> None:
        self._writer = Writer(self.out / CLIPS, CLIP_SCHEMA)
        self._rows: list[dict[str, Any]] = []
        self._committed = time.monotonic()
        self._present: dict[str, dict[str, Any]] = {}
        self._stamps: dict[str, str] = {}

    def plan(self, entries: Sequence[ManifestEntry]) -> None:
        """Sort the entries into those to keep, to re-caption and to encode."""
        table = open_table(self.out / CLIPS)
        if table is not None:
            columns = ["id", "clip", "stamp", "captions", "wordings", "source"]
            self._present = {row["id"]: row for row in table.to_table(columns=columns).to_pylist()}
        refresh: list[ManifestEntry] = []
        for entry in entries:
            try:
                self._stamps[entry.id] = source_stamp(entry)
            except OSError as error:
                what = f"cannot be read ({(error.strerror or str(error)).lower()})"
                self._skip(entry, Problem(entry.id, what, "restore the file", "missing file"))
                continue
            rows = [self._present.get(id_) for id_ in crop_ids(entry, self.recipe)]
            if any(row is None or row["stamp"] != self._stamps[entry.id] for row in rows):
                self.todo.append(entry)
                continue
            self.kept += 1
            if any(row and row | self._told(entry, row) != row for row in rows):
                refresh.append(entry)
        named = {entry.id for entry in entries}
        self.others = len({row["clip"] for row in self._present.values()} - named)
        self._recaption(refresh)

    def encode(self, on_progress: Progress) -> None:
        """Decode in threads, encode clips of one shape together, commit as time goes by."""
        waiting: dict[str, list[Decoded]] = {}
        try:
            for done, result in enumerate(decode_all(self.recipe, self.todo), start=1):
                if isinstance(result, Problem):
                    self._skip(self.todo[done - 1], result)
                else:
                    self._note_length(result[0])
                    for clip in result:
                        group = waiting.setdefault(str(clip.bucket), [])
                        group.append(clip)
                        if len(group) * clip.video_PHW3[..., 0].numel() >= _ENCODE_PIXELS:
                            self._encode(waiting.pop(str(clip.bucket)))
                # A slow source must not hold finished neighbours back from the disk.
                if time.monotonic() - self._committed > self.commit_seconds:
                    self._flush(waiting)
                on_progress("clips", done, len(self.todo))
            self._flush(waiting)
        finally:
            self._commit()

    def finish(self, asked: int) -> None:
        """List what was skipped, drop old versions; refuse a cache without clips."""
        self.problems.usable = len(self.encoded) + self.kept
        lines = [json.dumps(vars(problem), ensure_ascii=False) + "\n" for problem in self.problems]
        write_atomic(self.out / _SKIPPED, "".join(lines).encode())
        table = open_table(self.out / CLIPS)
        if table is None or table.count_rows() == 0:
            first = next(iter(self.problems), "no reason is known")
            raise UserError(f"{self.out}: not one of {asked} clips could be cached; the first: {first}")
        self._writer.tidy()

    def counts(self) -> dict[str, Any]:
        """What the report says of the clips."""
        names = ("kept", "recaptioned", "others", "longer", "unused_seconds")
        return {name: getattr(self, name) for name in names} | {
            "encoded": len(self.encoded),
            "skipped": self.problems,
        }

    def _told(self, entry: ManifestEntry, row: dict[str, Any]) -> dict[str, Any]:
        """What the manifest says of a row and may change without its latents."""
        captions = [scene.caption for scene in entry.scenes][: len(row["captions"])] or [entry.caption]
        wordings = [] if entry.scenes else _wordings(entry)
        return {"captions": captions, "wordings": wordings, "source": str(entry.path)}

    def _recaption(self, entries: Sequence[ManifestEntry]) -> None:
        by_id = {id_: entry for entry in entries for id_ in crop_ids(entry, self.recipe)}
        table = open_table(self.out / CLIPS)
        numbers = [i for i, id_ in enumerate(self._present) if id_ in by_id]
        for begin in range(0, len(numbers), 256):
            rows = table.take(numbers[begin : begin + 256]).to_pylist()
            self._writer.replace([{**row, **self._told(by_id[row["id"]], row)} for row in rows])
        self.recaptioned = len(entries)

    def _skip(self, entry: ManifestEntry, problem: Problem) -> None:
        """List it, and let go of the rows of what the source was before: they show something that is gone."""
        self.problems.add(problem)
        if stale := [id_ for id_ in crop_ids(entry, self.recipe) if id_ in self._present]:
            self._writer.remove(stale)

    def _note_length(self, clip: Decoded) -> None:
        if clip.unused_seconds:
            self.longer += 1
            self.unused_seconds += clip.unused_seconds

    def _flush(self, waiting: dict[str, list[Decoded]]) -> None:
        for name in list(waiting):
            self._encode(waiting.pop(name))
        self._commit()

    @torch.no_grad()
    def _encode(self, clips: Sequence[Decoded]) -> None:
        bucket, videos = clips[0].bucket, torch.stack([clip.video_PHW3 for clip in clips])
        latents = encode_scenes(self.tokenizer, videos, bucket.shots or (bucket.frames,))
        halves = latents.to("cpu", torch.float16)
        for clip, half_FhwC in zip(clips, halves, strict=True):
            if not half_FhwC.isfinite().all():
                what = "its latents are not finite in half precision"
                self._skip(
                    clip.entry,
                    Problem(clip.entry.id, what, "look at the clip and the tokenizer", "NaN latents"),
                )
                continue
            self.encoded.add(clip.entry.id)
            self._rows.append(self._row(clip, half_FhwC.contiguous().numpy().tobytes()))
        if sum(len(row["latents"]) for row in self._rows) >= _COMMIT_BYTES:
            self._commit()

    def _row(self, clip: Decoded, latents: bytes) -> dict[str, Any]:
        row = {
            "id": crop_ids(clip.entry, self.recipe)[clip.crop],
            "clip": clip.entry.id,
            "crop": clip.crop,
            "bucket": str(clip.bucket),
            "captions": clip.captions,
            "scene_frames": clip.scene_frames,
            "stamp": self._stamps[clip.entry.id],
            "latents": latents,
        }
        return row | self._told(clip.entry, row)

    def _commit(self) -> None:
        rows, self._rows = self._rows, []
        if rows and any(row["id"] in self._present for row in rows):
            self._writer.replace(rows)
        elif rows:
            self._writer.append(rows)
        self._committed = time.monotonic()
