"""Latents of CausVid and Self-Forcing into a cache: no pixel is read, the recipe says what they were.

Shapes: K levels, F latent frames, h x w latent cells, C channels.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, field
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import pyarrow as pa

from motionloom.config.recipe import Recipe
from motionloom.data.buckets import Bucket, bucket_lengths, bucket_sizes
from motionloom.data.cache.build import SKIPPED, all_captions, frozen_encoder, require_folder
from motionloom.data.cache.identity import asked_spec, identify
from motionloom.data.cache.lmdb_rows import LmdbFault, LmdbRow, Rows, find_lmdbs, read_rows
from motionloom.data.cache.makers import TOKENIZER
from motionloom.data.cache.pairs_note import STATED, PairsNote, shown
from motionloom.data.cache.progress import Progress
from motionloom.data.cache.skeleton import settle
from motionloom.data.cache.tables import CLIP_SCHEMA, CLIPS, STATE_FIELDS, Writer, open_table
from motionloom.data.cache.text import cache_text, is_trained
from motionloom.data.cache.workers import locked
from motionloom.data.manifest import Problem, Problems
from motionloom.durable import write_atomic
from motionloom.errors import UserError
from motionloom.text import TextEncoder, check_text_encoder
from motionloom.tokenizers import Tokenizer, open_tokenizer

_COMMIT_BYTES = 2**26


@dataclass(frozen=True)
class LmdbReport:
    """What a run did, in rows."""

    read: int
    kept: int
    """There already and unchanged."""
    skipped: Problems
    levels: tuple[float, ...]
    """Of the states, as the recipe states them; empty for rows of latents."""
    captions: int
    """Embedded in this run."""
    seconds: float

    def lines(self) -> list[str]:
        """The report for people."""
        what = f"states at {len(self.levels)} levels" if self.levels else "latents"
        found = [f"read {self.read} rows of {what}, kept {self.kept} in {self.seconds:.1f} s"]
        if self.levels:
            found.append(
                "an LMDB does not say at which noise levels its states stand: "
                f"{shown(self.levels)} are stated by the recipe (distil)"
            )
        if self.captions:
            found.append(f"embedded {self.captions} captions")
        return found + (self.skipped.lines() if len(self.skipped) else [])


def import_lmdb(
    recipe: Recipe,
    folder: str | Path,
    out: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    text_encoder: TextEncoder | None = None,
    on_progress: Progress = lambda what, done, total: None,
) -> LmdbReport:
    """Bring the rows of an LMDB into the cache at ``out``: a new one, or one of the same recipe.

    Rows of trajectories become clips with states at the levels of ``recipe.distil``.

    Args:
        tokenizer: that made the latents; None: ``tokenizer.name_or_path``.
        text_encoder: frozen; None: the recipe's.

    Raises:
        UserError: there is no LMDB, its rows are of another shape than the recipe's clips or have another
            number of states than its levels, the recipe names no tokenizer, ``out`` was made otherwise or is
            in use, or not one row could be used. Rows that cannot be used are skipped and listed.
    """
    began, out = time.monotonic(), Path(out)
    require_folder(out)
    if recipe.audio.enabled:
        raise UserError("audio.enabled is true, and an LMDB of latents has no sound: set it to false")
    shards = find_lmdbs(Path(folder))
    if text_encoder is None and not is_trained(recipe):
        check_text_encoder(recipe.text_encoder)
    tokenizer = tokenizer or _named_tokenizer(recipe)
    bucket, states = _shape_of(recipe, shards[0])
    note = _note(recipe, tokenizer, states) if states > 1 else None
    schema = pa.schema([*CLIP_SCHEMA, *STATE_FIELDS] if states > 1 else [*CLIP_SCHEMA])
    with locked(out):
        settle(out, identify(recipe, tokenizer), {TOKENIZER: tokenizer.save}, note, schema)
        run = _Run(
            out, schema, bucket, (*bucket.latent_grid(tokenizer.spec), tokenizer.spec.channels), states
        )
        run.read(shards, on_progress)
        run.finish()
        captions = 0
        if not is_trained(recipe):
            encoder = text_encoder or frozen_encoder(recipe)
            captions = cache_text(
                out, recipe, encoder, all_captions(out), lambda n, total: on_progress("captions", n, total)
            )
    levels = () if note is None else note.levels
    return LmdbReport(run.done, run.kept, run.problems, levels, captions, time.monotonic() - began)


def _named_tokenizer(recipe: Recipe) -> Tokenizer:
    if not recipe.tokenizer.name_or_path:
        raise UserError(
            "tokenizer.name_or_path is empty, and an LMDB holds no pixels to fit a tokenizer on: name the "
            "one that made its latents"
        )
    return open_tokenizer(recipe.tokenizer)


def _shape_of(recipe: Recipe, rows: Rows) -> tuple[Bucket, int]:
    """The clips that the rows hold, and the entries of a row, by what the LMDB says of itself; where it says
    nothing, by the bytes of its rows."""
    spec, levels = asked_spec(recipe), recipe.distil.levels
    made: dict[tuple[int, ...], Bucket] = {}
    for (width, height), frames in product(bucket_sizes(recipe), bucket_lengths(recipe)):
        f, h, w = (bucket := Bucket(width, height, frames)).latent_grid(spec)
        made[f, spec.channels, h, w] = bucket
    shape = rows.shape
    if len(shape) not in (4, 5) or 0 in shape:
        likely = [(states, *one) for one in made for states in (1, len(levels) + 1)]
        shape = next((one for one in likely if 2 * prod(one) == rows.row_bytes), ())
    if (found := made.get(shape[-4:])) is None:
        has = f"latents of {list(shape[-4:])}" if shape else f"rows of {rows.row_bytes} bytes"
        raise UserError(
            f"{rows.folder}: holds {has}, and the recipe's clips are "
            f"{' or '.join(str(list(one)) for one in made)} (frames, channels, height, width): set video "
            "(width, height, num_frames) and tokenizer to what made them"
        )
    states = shape[0] if len(shape) == 5 else 1
    if len(shape) == 5 and states not in (1, len(levels) + 1):
        raise UserError(
            f"{rows.folder}: holds {states} states of each walk, the last of them clean, and the recipe has "
            f"{len(levels)} levels, {shown(levels)}: set distil.sigmas to the {states - 1} of the others"
        )
    return found, states


def _note(recipe: Recipe, tokenizer: Tokenizer, states: int) -> PairsNote:
    return PairsNote(
        sigmas=(*recipe.distil.levels, 0.0),
        kept=tuple(range(states - 1)),
        levels_from=STATED,
        modalities=("video",),
        path=recipe.flow_matching.path,
        tokenizer=tokenizer.fingerprint(),
    )


@dataclass
class _Run:
    """One run over the rows."""

    out: Path
    schema: pa.Schema
    bucket: Bucket
    latent_shape: tuple[int, int, int, int]
    states: int
    done: int = 0
    kept: int = 0
    problems: Problems = field(default_factory=Problems)

    def __post_init__(self) -> None:
        self._writer = Writer(self.out / CLIPS, self.schema)
        table = open_table(self.out / CLIPS).to_table(columns=["id", "stamp"])
        self._present = dict(zip(table["id"].to_pylist(), table["stamp"].to_pylist(), strict=True))
        self._prompts: dict[str, str] = {}
        self._waiting: list[dict[str, Any]] = []

    def read(self, shards: list[Rows], on_progress: Progress) -> None:
        """All rows of all shards; a kill loses no more than what one commit holds."""
        total, n = sum(len(rows.numbers) for rows in shards), 0
        try:
            for rows in shards:
                if rows.missing:
                    what = f"latents_shape counts {rows.missing} rows more than there are"
                    self._skip(str(rows.folder), what, "missing key", rows.missing)
                for number, row in read_rows(rows, self.states, self.latent_shape):
                    n += 1
                    self._take(rows, number, row)
                    on_progress("rows", n, total)
        finally:
            self._commit()

    def _take(self, rows: Rows, number: int, row: LmdbRow | LmdbFault) -> None:
        id_ = f"{rows.name}/{number:08d}"
        if isinstance(row, LmdbFault):
            self._skip(id_, row.what, row.kind)
            return
        first = self._prompts.setdefault(row.prompt, id_)
        if first != id_:
            self._skip(id_, f"has the prompt of {first}", "duplicate prompt")
            return
        facts = json.dumps([number, *rows.stamp, self.states])
        stamp = hashlib.blake2b(facts.encode(), digest_size=16).hexdigest()
        if self._present.get(id_) == stamp:
            self.kept += 1
            return
        self._waiting.append(self._row(id_, row, stamp, f"{rows.folder}#{number}"))
        self.done += 1
        if sum(len(one["latents"]) * self.states for one in self._waiting) >= _COMMIT_BYTES:
            self._commit()

    def _row(self, id_: str, row: LmdbRow, stamp: str, source: str) -> dict[str, Any]:
        columns = {
            "id": id_,
            "clip": id_,
            "crop": 0,
            "bucket": str(self.bucket),
            "captions": [row.prompt],
            "wordings": [row.prompt],
            "scene_frames": [self.bucket.frames],
            "source": source,
            "stamp": stamp,
            "latents": row.x_KFhwC[-1].tobytes(),
        }
        return columns | ({"states": row.x_KFhwC[:-1].tobytes()} if self.states > 1 else {})

    def _skip(self, where: str, what: str, kind: str, count: int = 1) -> None:
        fix = "make the row again, or leave it out"
        self.problems.add(Problem(where, what, fix, kind, count))
        if where in self._present:
            self._writer.remove([where])

    def _commit(self) -> None:
        rows, self._waiting = self._waiting, []
        if rows and any(row["id"] in self._present for row in rows):
            self._writer.replace(rows)
        elif rows:
            self._writer.append(rows)

    def finish(self) -> None:
        """List what was skipped, drop old versions; refuse a cache without clips."""
        self.problems.usable = self.done + self.kept
        lines = [json.dumps(vars(problem), ensure_ascii=False) + "\n" for problem in self.problems]
        write_atomic(self.out / SKIPPED, "".join(lines).encode())
        if not self.problems.usable:
            first = next(iter(self.problems))
            raise UserError(f"{self.out}: not one row could be used; the first: {first}")
        self._writer.tidy()
