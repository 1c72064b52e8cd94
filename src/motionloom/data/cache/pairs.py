"""A teacher's clips as a cache, with the states of each walk at a student's noise levels.

The store is a latent cache like any other, so every method can be trained on it; `ode` reads the states as
well. Rows are made by one run or by several workers at once, in groups that depend on neither: the same call
gives the same rows to the bit, whoever makes them. Every commit is atomic, and a run that is killed goes on
with the rows that are missing.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import pyarrow as pa

from motionloom.config.recipe import Recipe
from motionloom.data.buckets import Bucket
from motionloom.data.cache.build import SKIPPED, frozen_encoder, require_folder
from motionloom.data.cache.columns import as_half
from motionloom.data.cache.identity import Identity
from motionloom.data.cache.makers import AUDIO_TOKENIZER, TOKENIZER
from motionloom.data.cache.pairs_note import SAME, WALKED, PairsNote, shown
from motionloom.data.cache.progress import Progress
from motionloom.data.cache.reader import Cache
from motionloom.data.cache.skeleton import settle
from motionloom.data.cache.tables import (
    CLIP_SCHEMA,
    CLIPS,
    SOUND_FIELDS,
    SOUND_STATE_FIELDS,
    STATE_FIELDS,
    TEXT,
    Writer,
    copy_table,
    open_table,
)
from motionloom.data.cache.text import TextTable, cache_text, is_trained
from motionloom.data.cache.trajectories import (
    Teacher,
    Walked,
    Wish,
    guidance_note,
    in_halves,
    levels_on_grid,
    sound_counts,
    teacher_sampling,
    walk_clips,
    why_not,
)
from motionloom.data.cache.workers import Held, Share, locked
from motionloom.data.manifest import Problem, Problems
from motionloom.durable import write_atomic
from motionloom.errors import UserError
from motionloom.rng import key_to_seed
from motionloom.text import TextEncoder

_TOGETHER, _TOKENS = 8, 2**16
"""Clips that are walked at once: so many, or as have so many tokens. Which stand together moves the last bits
of a matrix product, so it follows from their shape alone; what does not fit into memory is halved."""
_COMMIT_BYTES = 2**26


@dataclass(frozen=True)
class PairsReport:
    """What a run did, in clips."""

    made: int
    kept: int
    """There already."""
    clips: int
    """In the whole store now, those of other workers as well."""
    skipped: Problems
    levels: tuple[float, ...]
    seconds: float

    def lines(self) -> list[str]:
        """The report for people."""
        found = [
            f"made {self.made} clips with states at {len(self.levels)} levels, kept {self.kept} "
            f"in {self.seconds:.1f} s"
        ]
        return found + (self.skipped.lines() if len(self.skipped) else [])


def make_pairs(
    recipe: Recipe,
    teacher: Teacher,
    source: Cache,
    out: str | Path,
    *,
    clips: int | None = None,
    seed: int = 0,
    share: Share | None = None,
    text_encoder: TextEncoder | None = None,
    on_progress: Progress = lambda what, done, total: None,
    commit_seconds: float = 10.0,
) -> PairsReport:
    """Make or continue a cache of a teacher's clips, for the captions, shapes and frame rate of another.

    Args:
        recipe: the student's; its `distil` says how the teacher walks, and which states are kept.
        clips: how many; None: one for each row of ``source``. More than it has rows go round again, with
            other noise.
        seed: of the noise.
        share: of several workers; None: all rows.
        text_encoder: frozen; None: the recipe's, where the source holds no embeddings of it.
        commit_seconds: what a kill may cost, beside the clips that are on their way.

    Raises:
        UserError: the teacher does not go with the source or the recipe, the levels are not on its grid, the
            store is something else or was made otherwise, another run has the share, the disk is full, or not
            one clip could be made. Clips that cannot be made are skipped and listed.
    """
    began, out = time.monotonic(), Path(out)
    plan = _Plan.of(recipe, teacher, source, seed)
    require_folder(out)
    if out.resolve() == source.path.resolve():
        raise UserError(f"{out}: is the cache whose captions are taken; name a new folder with --out")
    rows = list(_rows(source, clips))
    share = share or Share()
    with locked(out, wait=True):
        settle(out, plan.identity, plan.makers(), plan.note, plan.schema)
        _settle_text(out, recipe, source, rows, text_encoder, on_progress)
        held = Held(out, share)
    run = _Run(out, plan, teacher, commit_seconds)
    try:
        run.make(_groups(rows, teacher, source, share), on_progress)
    finally:
        with locked(out, wait=True):
            alone = held.release()
            run.list_skipped()
            if alone:
                run.tidy()
    run.refuse_nothing()
    count = open_table(out / CLIPS).count_rows()
    seconds = time.monotonic() - began
    return PairsReport(run.made, run.kept, count, run.problems, plan.note.levels, seconds)


def require_levels(cache: Cache, levels: Sequence[float], path: str = "linear") -> None:
    """Refuse to learn from states at other noise levels than a student's.

    Args:
        levels: of the student, falling from 1: ``recipe.distil.levels``.
        path: of the student's flow.

    Raises:
        UserError: the cache has no states, or others; names both and the mend.
    """
    make = f"motionloom pairs RECIPE --cache {cache.path} --out DIR"
    if not cache.has_states:
        raise UserError(
            f"{cache.path}: holds no states of a teacher, which train.method ode learns from; "
            f"make them: {make}"
        )
    note = cache.pairs
    has = note.levels
    if len(has) != len(levels) or any(abs(a - b) > SAME for a, b in zip(has, levels, strict=True)):
        raise UserError(
            f"{cache.path}: holds states at the levels {shown(has)}, and the recipe's are {shown(levels)}; "
            f"set distil.sigmas={shown(has)}, or make pairs of the recipe's levels in a new folder"
        )
    if note.path != path:
        raise UserError(
            f"{cache.path}: holds states of the {note.path} path, and flow_matching.path is {path}: set it "
            f"to {note.path}"
        )


@dataclass(frozen=True)
class _Plan:
    """What is to be made, checked."""

    recipe: Recipe
    source: Cache
    note: PairsNote
    identity: Identity

    @staticmethod
    def of(recipe: Recipe, teacher: Teacher, source: Cache, seed: int) -> _Plan:
        """Raises UserError where recipe, teacher and source do not go together."""
        source.require(recipe)
        modalities = _modalities(recipe, teacher, source)
        _require_tokenizers(teacher, source, modalities)
        kept, sampling = levels_on_grid(recipe.distil), teacher_sampling(recipe, teacher)
        model = teacher.model
        identity = _identity(source, modalities)
        note = PairsNote(
            sigmas=sampling.grid,
            kept=kept,
            levels_from=WALKED,
            modalities=modalities,
            path=sampling.path,
            tokenizer=identity.tokenizer,
            audio_tokenizer=identity.audio_tokenizer,
            solver=sampling.solver,
            shift=sampling.shift,
            guidance=guidance_note(recipe.distil, sampling),
            negative=recipe.distil.negative,
            seed=seed,
            teacher={
                "where": teacher.where,
                "weights": teacher.weights(),
                "recipe": model.recipe.model_dump(mode="json"),
            },
        )
        return _Plan(recipe, source, note, identity)

    @property
    def schema(self) -> pa.Schema:
        """Of the clips."""
        fields = [*CLIP_SCHEMA, *STATE_FIELDS]
        if "audio" in self.note.modalities:
            fields += [*SOUND_FIELDS, *SOUND_STATE_FIELDS]
        return pa.schema(fields)

    def makers(self) -> dict[str, Any]:
        """The tokenizers' folders, as they stand in the source."""
        has = {TOKENIZER: self.identity.tokenizer, AUDIO_TOKENIZER: self.identity.audio_tokenizer}
        return {name: partial(shutil.copytree, self.source.path / name) for name, what in has.items() if what}


def _modalities(recipe: Recipe, teacher: Teacher, source: Cache) -> tuple[str, ...]:
    """What the store will hold, of what the teacher makes."""
    for section in ("references", "masks"):
        if getattr(recipe, section).enabled:
            raise UserError(
                f"{section}.enabled is true, and a teacher's clips are made from captions alone: set it to "
                "false for pairs and for the student that learns from them"
            )
    has = {"video": source.has_video, "audio": source.has_sound and recipe.audio.enabled}
    found = tuple(m for m in teacher.model.modalities if has[m])
    if lacks := [m for m in recipe.plan.modalities if m not in found]:
        raise UserError(
            f"plan.modalities has {lacks[0]}, which distil.teacher {teacher.where} does not make "
            f"({', '.join(teacher.model.modalities)}) or {source.path} does not hold: take another teacher"
        )
    return found


def _require_tokenizers(teacher: Teacher, source: Cache, modalities: Sequence[str]) -> None:
    """A teacher of other latents knows nothing of these."""
    model, identity = teacher.model, source.identity
    pairs = {
        "video": ("tokenizer", model.tokenizer, identity.tokenizer),
        "audio": ("audio tokenizer", model.audio_tokenizer, identity.audio_tokenizer),
    }
    for modality in modalities:
        what, maker, cached = pairs[modality]
        own = "" if maker is None else maker.fingerprint()
        if own != cached:
            raise UserError(
                f"distil.teacher {teacher.where} has another {what} ({own[:12]}) than {source.path} "
                f"({cached[:12]}): name the cache that it was trained on, or one made with its {what}"
            )


def _identity(source: Cache, modalities: Sequence[str]) -> Identity:
    """The source's, without what a teacher's clips do not have beside them."""
    there, sound = source.identity, "audio" in modalities
    gone = ("references.", "masks.") if sound else ("references.", "masks.", "audio.")
    made_with = {key: value for key, value in there.made_with.items() if not key.startswith(gone)}
    heard = there.audio_spec if sound else None
    return Identity(
        made_with,
        there.tokenizer,
        there.spec,
        there.dtype,
        audio_tokenizer=there.audio_tokenizer if sound else "",
        audio_spec=heard,
    )


@dataclass(frozen=True)
class _Row:
    """A clip to be made: a row of the source, without its latents, under an id of its own."""

    id: str
    round: int
    told: dict[str, Any]

    @property
    def whole(self) -> str:
        """What is said of a story beside the captions of its scenes; empty: nothing."""
        several = len(self.told["captions"]) > 1
        return self.told["wordings"][0] if several and self.told["wordings"] else ""

    @property
    def stamp(self) -> str:
        """Changes with all that the source says of the clip."""
        facts = [self.told[key] for key in ("captions", "bucket", "scene_frames")]
        text = json.dumps([*facts, self.whole], ensure_ascii=False)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _rows(source: Cache, clips: int | None) -> Iterator[_Row]:
    """The rows in an order that is mixed and the same for every number of clips, round after round."""
    order = sorted(range(len(source)), key=lambda i: (key_to_seed("pairs", source.ids[i]), source.ids[i]))
    told = source.metadata(order)
    for n in range(len(order) if clips is None else clips):
        turn, i = divmod(n, len(order))
        id_ = told[i]["id"]
        yield _Row(f"{id_}~{turn}" if turn else id_, turn, told[i])


def _groups(rows: Sequence[_Row], teacher: Teacher, source: Cache, share: Share) -> list[list[_Row]]:
    """Clips of one shape that are walked together, of a worker's share. A clip's share is the same however
    many clips are asked for, so that no two workers ever make one."""
    shapes: dict[tuple[Any, ...], list[_Row]] = {}
    for row in rows:
        key = (row.round, row.told["bucket"], *row.told["scene_frames"])
        shapes.setdefault(key, []).append(row)
    found = []
    for key, same in shapes.items():
        cells = prod(source.latent_shape(Bucket.parse(same[0].told["bucket"]))[:3])
        size = min(_TOGETHER, max(1, _TOKENS * prod(teacher.model.patch) // max(1, cells)))
        first = key_to_seed("group", *key)
        groups = [same[begin : begin + size] for begin in range(0, len(same), size)]
        found += [group for n, group in enumerate(groups) if share.has(first + n)]
    return found


def _settle_text(
    out: Path,
    recipe: Recipe,
    source: Cache,
    rows: Sequence[_Row],
    encoder: TextEncoder | None,
    on_progress: Progress,
) -> None:
    """Embeddings of the captions, where the recipe's encoder is frozen: the source's, or new ones."""
    if is_trained(recipe):
        return
    captions = {caption for row in rows for caption in (*row.told["captions"], row.whole)}
    if (table := open_table(out / TEXT)) is not None and _embedded(TextTable(table), recipe, captions):
        return
    if table is None and source.text is not None and _embedded(source.text, recipe, captions):
        copy_table(source.path / TEXT, out / TEXT)
        return
    encoder = encoder or frozen_encoder(recipe)
    cache_text(out, recipe, encoder, captions, lambda done, total: on_progress("captions", done, total))


def _embedded(table: TextTable, recipe: Recipe, captions: set[str]) -> bool:
    return not table.mismatches(recipe) and not table.missing({"", *captions})


@dataclass
class _Run:
    """One worker's rows."""

    out: Path
    plan: _Plan
    teacher: Teacher
    commit_seconds: float
    made: int = 0
    kept: int = 0
    problems: Problems = field(default_factory=Problems)

    def __post_init__(self) -> None:
        self._sampling = teacher_sampling(self.plan.recipe, self.teacher)
        self._writer = Writer(self.out / CLIPS, self.plan.schema, shared=True)
        table = open_table(self.out / CLIPS).to_table(columns=["id", "stamp"])
        self._present = dict(zip(table["id"].to_pylist(), table["stamp"].to_pylist(), strict=True))
        self._waiting: list[dict[str, Any]] = []
        self._committed = time.monotonic()
        self._asked: set[str] = set()

    def make(self, groups: Sequence[Sequence[_Row]], on_progress: Progress) -> None:
        """Walk every group that lacks a row, whole, so that its rows do not depend on which were there."""
        self._asked = {row.id for group in groups for row in group}
        missing = {row.id for group in groups for row in group if self._present.get(row.id) != row.stamp}
        self.kept = len(self._asked) - len(missing)
        done = 0
        if missing:
            on_progress("clips", done, len(missing))
        try:
            for group in groups:
                if wanted := [row for row in group if row.id in missing]:
                    self._make(group, {row.id for row in wanted})
                    done += len(wanted)
                    on_progress("clips", done, len(missing))
        finally:
            self._commit()
            self.problems.usable = self.made + self.kept

    def _make(self, group: Sequence[_Row], wanted: set[str]) -> None:
        first = group[0].told
        whole = self.teacher.model.recipe.stories.global_caption
        wish = Wish(
            tuple(row.id for row in group),
            tuple(tuple(row.told["captions"]) for row in group),
            tuple(row.whole if whole else "" for row in group),
            Bucket.parse(first["bucket"]),
            tuple(first["scene_frames"]),
            self.plan.source.fps,
        )
        if why := why_not(self.teacher, wish, self.plan.source.latent_shape(wish.bucket)):
            for id_ in sorted(wanted):
                fix = "take a teacher of such clips, or a cache of others"
                self.problems.add(Problem(id_, why, fix, "does not fit the teacher"))
            return
        note = self.plan.note
        walk = partial(walk_clips, self.teacher, sampling=self._sampling, kept=note.kept)
        seeded = partial(walk, recipe=self.plan.recipe, seed=note.seed)
        of_id = {row.id: row for row in group}
        for part, walked in in_halves(seeded, wish):
            for i, id_ in enumerate(part.ids):
                if id_ in wanted:
                    self._take(of_id[id_], self._columns(part, walked, i))
        if self._due():
            self._commit()

    def _columns(self, wish: Wish, walked: Walked, i: int) -> dict[str, Any]:
        """The latents and states of a clip; None where they are not finite in half precision."""
        columns: dict[str, Any] = {"latents": b"", "states": b""}
        if "video" in self.plan.note.modalities and not wish.bucket.is_sound:
            columns = {
                "latents": as_half(walked.latents["video"][i]),
                "states": as_half(walked.states["video"][i]),
            }
        if "audio" in self.plan.note.modalities:
            columns |= {
                "sound": as_half(walked.latents["audio"][i]),
                "sound_states": as_half(walked.states["audio"][i]),
                "sound_latents": sound_counts(self.teacher.model, wish),
            }
        return columns

    def _take(self, row: _Row, columns: dict[str, Any]) -> None:
        if any(value is None for value in columns.values()):
            what = "the teacher's walk came to values that are not finite in half precision"
            fix = "look at the teacher, lower distil.guidance, or make pairs with another --seed"
            self.problems.add(Problem(row.id, what, fix, "NaN walk"))
            return
        told = {key: row.told[key] for key in ("clip", "crop", "bucket", "captions", "scene_frames")}
        # Other wordings were never asked for: the clip is what came of this one.
        wordings = told["captions"][:1] if len(told["captions"]) == 1 else [row.whole] * bool(row.whole)
        own = {"id": row.id, "wordings": wordings, "source": self.teacher.where, "stamp": row.stamp}
        self._waiting.append({**told, **own, **columns})
        self.made += 1

    def _due(self) -> bool:
        size = sum(len(row["latents"]) + len(row["states"]) for row in self._waiting)
        return size >= _COMMIT_BYTES or time.monotonic() - self._committed > self.commit_seconds

    def _commit(self) -> None:
        rows, self._waiting = self._waiting, []
        stale = [row for row in rows if row["id"] in self._present]
        if stale:
            self._writer.replace(stale)
        if fresh := [row for row in rows if row["id"] not in self._present]:
            self._writer.append(fresh)
        self._committed = time.monotonic()

    def list_skipped(self) -> None:
        """Into a file that workers share; what this one was asked for is said anew. Hold the lock."""
        file = self.out / SKIPPED
        lines = file.read_text("utf-8").splitlines() if file.exists() else []
        others = [line for line in lines if json.loads(line)["where"] not in self._asked]
        own = [json.dumps(vars(problem), ensure_ascii=False) for problem in self.problems]
        write_atomic(file, "".join(f"{line}\n" for line in [*others, *own]).encode())

    def tidy(self) -> None:
        """Join small files; only while nobody else writes."""
        self._writer.tidy()

    def refuse_nothing(self) -> None:
        """Raises UserError if all that was asked for came to nothing."""
        if self._asked and not self.made and not self.kept:
            raise UserError(
                f"{self.out}: not one of {len(self._asked)} clips could be made; the first: "
                f"{next(iter(self.problems))}"
            )
