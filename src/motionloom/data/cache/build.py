"""Make or continue a cache: decode, crop, encode, commit; then the captions.

Every commit is atomic, so a run that is killed leaves a readable cache; the next run keeps what is there,
encodes what is missing or whose source changed, and ends with the rows of a run that was never stopped
(to the rounding of a tokenizer whose results depend on the batch).

Shapes: P pixel frames, H x W pixels.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from motionloom.config.recipe import Recipe
from motionloom.data.cache.columns import as_half, track_columns
from motionloom.data.cache.decode import Decoded, decode_all
from motionloom.data.cache.identity import IDENTITY_FILE
from motionloom.data.cache.makers import UNFINISHED, Makers, settle_makers
from motionloom.data.cache.pairs_note import PAIRS_FILE
from motionloom.data.cache.progress import Progress
from motionloom.data.cache.tables import CLIPS, READERS, Writer, clip_schema, open_table
from motionloom.data.cache.text import cache_text, is_trained
from motionloom.data.cache.tracks import tracks_of
from motionloom.data.cache.workers import LOCK, locked
from motionloom.data.manifest import ManifestEntry, Problem, Problems
from motionloom.durable import write_atomic
from motionloom.errors import UserError
from motionloom.text import TextEncoder, build_text_encoder, check_text_encoder
from motionloom.tokenizers import AudioTokenizer, Tokenizer, encode_scenes

SKIPPED = "skipped.jsonl"

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
    holds: tuple[str, ...] = ()
    """What stands beside the frames in the whole cache, a line each."""
    ends_early: int = 0
    """Clips encoded in this run whose sound ends before their picture; silence follows."""

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
        found += self.holds
        if self.ends_early:
            found.append(f"the sound of {self.ends_early} clips ends before the picture: silence follows")
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
    audio: AudioTokenizer | None = None,
    text_encoder: TextEncoder | None = None,
    on_progress: Progress = lambda what, done, total: None,
    commit_seconds: float = 10.0,
) -> CacheReport:
    """Bring the cache at ``out`` in line with the recipe and the manifest's entries.

    Args:
        tokenizer: none: that of `tokenizer.name_or_path`, the cache's own, or one that is fitted now.
        audio: the same for sound and `audio.name_or_path`.
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
    with locked(out):
        makers = settle_makers(recipe, entries, out, tokenizer, audio, on_progress)
        makers.to_fastest()
        run = _Run(out, recipe, makers, commit_seconds)
        run.plan(entries)
        run.encode(on_progress)
        run.finish(len(entries))
        if text_encoder is None and not is_trained(recipe):
            text_encoder = frozen_encoder(recipe)
        embedded = cut = 0
        if text_encoder is not None and not text_encoder.trainable:
            wordings = all_captions(out)
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
    require_folder(out)
    if (out / PAIRS_FILE).exists():
        raise UserError(f"{out}: holds a teacher's pairs ({PAIRS_FILE}), not clips; name another folder")


def require_folder(out: Path) -> None:
    """Refuse what is neither a cache nor on the way to be one. Raises UserError."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; name a folder for the cache")
    if out.is_dir():
        names = {path.name for path in out.iterdir()} - {LOCK, READERS, PAIRS_FILE, *UNFINISHED}
        begun = tuple(f".{file}." for file in (IDENTITY_FILE, PAIRS_FILE))
        foreign = sorted(name for name in names if not name.startswith(begun))
        # Asked for last: who makes the cache at this moment writes it before anything that looks foreign.
        if foreign and not (out / IDENTITY_FILE).exists():
            raise UserError(f"{out}: is not a cache and not empty (it holds {foreign[0]}); name a new folder")


def frozen_encoder(recipe: Recipe) -> TextEncoder:
    """The recipe's text encoder, on a GPU where there is one."""
    encoder = build_text_encoder(recipe.text_encoder, recipe.seed)
    if torch.cuda.is_available() and hasattr(encoder, "to"):
        encoder.to("cuda")
    return encoder


def all_captions(out: Path) -> list[str]:
    """Every caption in the cache, those of clips from other manifests included."""
    dataset = open_table(out / CLIPS)
    said = [name for name in ("captions", "wordings", "reference_caption") if name in dataset.schema.names]
    found: set[str] = set()
    for column in dataset.to_table(columns=said).columns:
        for value in column.to_pylist():
            found |= set(value) if isinstance(value, list) else {value or ""}
    return sorted(found)


def _wordings(entry: ManifestEntry) -> list[str]:
    return list(dict.fromkeys([entry.caption, *entry.captions]))


def crop_ids(entry: ManifestEntry, recipe: Recipe) -> list[str]:
    """Ids of the rows of an entry: its own, or one per crop."""
    crops = recipe.preprocess.num_crops
    return [entry.id] if crops == 1 else [f"{entry.id}__c{crop:02d}" for crop in range(crops)]


def source_stamp(entry: ManifestEntry, beside: Sequence[str] = ()) -> str:
    """Changes when a file does (by size and time of writing), or the part of it that is taken.

    Args:
        beside: which files beside the clip are read, of `manifest.BESIDE`.
    """
    files = [_files_facts([file]) for file in entry.files(*beside)]
    times = [(scene.start, scene.end) for scene in entry.scenes]
    part: list[Any] = [entry.start, entry.end, entry.fps if entry.path.is_dir() else None, times]
    if entry.scenes and "reference" in beside and entry.reference is not None:
        part.append("reference in step with its shots")  # those of before there was such a care are made anew
    # A clip of one file keeps the stamp that it had when there was nothing beside it.
    facts: Any = files[0] if len(files) == 1 else [files, [str(file) for file in entry.files(*beside)]]
    return hashlib.blake2b(json.dumps([facts, part]).encode(), digest_size=16).hexdigest()


def _files_facts(paths: Sequence[Path]) -> list[int]:
    """How many files there are, a folder's counted singly, their bytes, and when the last was written."""
    files = [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    stats = [file.stat() for file in files]
    return [len(files), sum(s.st_size for s in stats), max((s.st_mtime_ns for s in stats), default=0)]


@dataclass
class _Run:
    """One run over the clips table."""

    out: Path
    recipe: Recipe
    makers: Makers
    commit_seconds: float
    todo: list[ManifestEntry] = field(default_factory=list)
    kept: int = 0
    recaptioned: int = 0
    others: int = 0
    longer: int = 0
    unused_seconds: float = 0.0
    ends_early: int = 0
    encoded: set[str] = field(default_factory=set)
    problems: Problems = field(default_factory=Problems)

    def __post_init__(self) -> None:
        self._schema = clip_schema(self.recipe)
        self._writer = Writer(self.out / CLIPS, self._schema)
        self._beside = tracks_of(self.recipe)
        self._rows: list[dict[str, Any]] = []
        self._committed = time.monotonic()
        self._present: dict[str, dict[str, Any]] = {}
        self._stamps: dict[str, str] = {}

    def plan(self, entries: Sequence[ManifestEntry]) -> None:
        """Sort the entries into those to keep, to re-caption and to encode."""
        table = open_table(self.out / CLIPS)
        if table is not None:
            columns = ["id", "clip", "stamp", "captions", "wordings", "source"]
            columns += ["reference_caption"] if "reference_caption" in self._schema.names else []
            self._present = {row["id"]: row for row in table.to_table(columns=columns).to_pylist()}
        refresh: list[ManifestEntry] = []
        for entry in entries:
            try:
                self._stamps[entry.id] = source_stamp(entry, self._beside)
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
        write_atomic(self.out / SKIPPED, "".join(lines).encode())
        table = open_table(self.out / CLIPS)
        if table is None or table.count_rows() == 0:
            first = next(iter(self.problems), "no reason is known")
            raise UserError(f"{self.out}: not one of {asked} clips could be cached; the first: {first}")
        self._writer.tidy()

    def counts(self) -> dict[str, Any]:
        """What the report says of the clips."""
        names = ("kept", "recaptioned", "others", "longer", "unused_seconds", "ends_early")
        return {name: getattr(self, name) for name in names} | {
            "encoded": len(self.encoded),
            "skipped": self.problems,
            "holds": tuple(_holds(self.out)),
        }

    def _told(self, entry: ManifestEntry, row: dict[str, Any]) -> dict[str, Any]:
        """What the manifest says of a row and may change without its latents."""
        captions = [scene.caption for scene in entry.scenes][: len(row["captions"])] or [entry.caption]
        told: dict[str, Any] = {"captions": captions, "wordings": _wordings(entry), "source": str(entry.path)}
        if "reference_caption" in self._schema.names:
            told["reference_caption"] = entry.reference_caption
        return told

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
        self.ends_early += clip.tracks.sound_ends_early
        if clip.unused_seconds:
            self.longer += 1
            self.unused_seconds += clip.unused_seconds

    def _flush(self, waiting: dict[str, list[Decoded]]) -> None:
        for name in list(waiting):
            self._encode(waiting.pop(name))
        self._commit()

    @torch.no_grad()
    def _encode(self, clips: Sequence[Decoded]) -> None:
        blobs: list[bytes | None] = [b""] * len(clips)
        if not clips[0].bucket.is_sound:
            assert self.makers.tokenizer is not None
            videos = torch.stack([clip.video_PHW3 for clip in clips])
            latents = encode_scenes(self.makers.tokenizer, videos, clips[0].bucket.alone)
            blobs = [as_half(latents_FhwC) for latents_FhwC in latents]
        columns = track_columns(clips, self.makers, self.recipe)
        for clip, blob, more in zip(clips, blobs, columns, strict=True):
            row = {"latents": blob, **more}
            if None in row.values():
                what = "its latents are not finite in half precision"
                self._skip(
                    clip.entry,
                    Problem(clip.entry.id, what, "look at the clip and the tokenizer", "NaN latents"),
                )
                continue
            self.encoded.add(clip.entry.id)
            self._rows.append(self._row(clip, row))
        if sum(len(row["latents"]) for row in self._rows) >= _COMMIT_BYTES:
            self._commit()

    def _row(self, clip: Decoded, columns: dict[str, Any]) -> dict[str, Any]:
        row = {
            "id": crop_ids(clip.entry, self.recipe)[clip.crop],
            "clip": clip.entry.id,
            "crop": clip.crop,
            "bucket": str(clip.bucket),
            "captions": clip.captions,
            "scene_frames": clip.scene_frames,
            "stamp": self._stamps[clip.entry.id],
            **columns,
        }
        return row | self._told(clip.entry, row)

    def _commit(self) -> None:
        rows, self._rows = self._rows, []
        if rows and any(row["id"] in self._present for row in rows):
            self._writer.replace(rows)
        elif rows:
            self._writer.append(rows)
        self._committed = time.monotonic()


def _holds(out: Path) -> Iterator[str]:
    """What stands beside the frames of the clips in a cache, a line each."""
    table = open_table(out / CLIPS)
    for column, has, lacks in (
        ("sound_latents", "have sound", "are silent"),
        ("reference_grid", "have a reference to see", "have none"),
        ("reference_sound_latents", "have a reference to hear", "have none"),
        ("masked", "have a mask", "have none"),
    ):
        if column in table.schema.names:
            rows = table.to_table(columns=["clip", column])
            clips = dict(zip(rows["clip"].to_pylist(), map(bool, rows[column].to_pylist()), strict=True))
            found = sum(clips.values())
            yield f"{found} clips {has}, {len(clips) - found} {lacks}"
