"""``motionloom eval`` and ``motionloom features``: tokenizers, and what generates with them, in numbers."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from motionloom.cli.console import Out, new_folder, skipped
from motionloom.errors import UserError

if TYPE_CHECKING:
    from motionloom.data.shapeworld import World
    from motionloom.evals.clips import Seen, Set, Shape, Video
    from motionloom.evals.encoders import Extractor
    from motionloom.evals.fidelity import Perceive
    from motionloom.evals.figures import Report
    from motionloom.evals.probes import Answers, Labelled
    from motionloom.evals.tokenizer import Embedded, Rebuilt, TokenizerViews
    from motionloom.generate import Model
    from motionloom.studio.page import Table
    from motionloom.tokenizers import Tokenizer

EVALUATED, PAGE, SHEET, SHOWN = "evaluated.json", "evaluated.html", "sheet.png", "shown"
AUTO, NONE = "auto", "none"
LPIPS = ("vgg", "alex")
Heads = tuple[str, ...]
Rows = tuple[str, Heads, list[tuple[str, ...]]]
"""A table: title, heads, rows."""
SHARE = 0.25
"""Of the training clips, set aside where no others are named."""
MOST_FPS = 1000
"""A picture of the page is shown for a whole number of milliseconds."""
T = TypeVar("T")


@dataclass(frozen=True)
class Reading:
    """How clips of a manifest are read, and on what they are coded."""

    clips: int | None = None
    frames: int | None = None
    size: str | None = None
    fps: float | None = None
    batch: int = 8
    device: str = AUTO

    @property
    def shape(self) -> Shape:
        """Raises UserError for a size that is written wrongly, and for a rate that is none."""
        from motionloom.config.request import parse_request
        from motionloom.evals.clips import Shape

        if self.fps is not None and not 0 < self.fps <= MOST_FPS:
            raise UserError(
                f"--fps {self.fps:g}: say frames a second, above 0 and at most {MOST_FPS}, or leave it out"
            )
        size = parse_request({"prompt": "", "size": self.size}).size if self.size else None
        return Shape(self.frames, size, self.fps)


# The commands


def reconstruction(
    tokenizer: Path,
    manifest: Path,
    out: Path,
    reading: Reading,
    extractor: str,
    lpips: str,
    world: str,
    as_json: bool,
) -> None:
    """Clips through a tokenizer and back: figures, page, and originals over reconstructions."""
    from motionloom.evals.clips import open_set
    from motionloom.evals.tokenizer import DISTANCES, Tools, judge_reconstruction

    job, shape, place = _Job(out, as_json), reading.shape, _world(world)
    coder, clips = _tokenizer(tokenizer, reading.device), open_set(manifest, reading.clips)
    told = Tools(
        job.optional(DISTANCES, extractor, _extractor),
        job.optional("lpips", lpips, open_perceptual),
        place,
        batch=reading.batch,
    )
    with job.console.progress("clips") as advance:
        found = judge_reconstruction(coder, clips, shape, told, advance)
    for what, why in found.left_out.items():
        job.leave_out(what, why)
    pairs = [(seen, _over(seen.video_PHW3, made)) for seen, made in found.shown]
    made_by = {**_made_by(tokenizer, coder), **_compressed(coder, found)}
    job.finish(found.report, [clips], made_by, pairs, "originals over reconstructions")


def zero_shot(
    tokenizer: Path,
    manifest: Path,
    out: Path,
    reading: Reading,
    world: str,
    classes: str,
    templates: Sequence[str],
    as_json: bool,
) -> None:
    """Are clips nearest to the words of their own class."""
    from motionloom.evals.clips import open_set
    from motionloom.evals.tokenizer import judge_zero_shot, manifest_classes, world_classes

    if world and (classes or templates):
        raise UserError("--world brings classes and wordings of its own: leave out --classes and --template")
    job = _Job(out, as_json)
    views, clips = _views(tokenizer, reading), open_set(manifest, reading.clips)
    views.require_texts()
    place = _world(world)
    told = world_classes(clips, place) if place else manifest_classes(clips, classes, templates)
    report = judge_zero_shot(views, job.embed(views, clips, reading), told)
    job.finish(report, [clips], {"tokenizer": str(tokenizer), "fingerprint": views.name})


def linear_probe(
    tokenizer: Path,
    train: Path,
    test: Path | None,
    out: Path,
    reading: Reading,
    label: str,
    share: float | None,
    cells: bool,
    seed: int,
    as_json: bool,
) -> None:
    """A linear map from features, and from latents, to a label."""
    from motionloom.evals.probes import PROBE, linear_probe

    sets = _train_and_test(train, test, share, seed, reading)
    _probe("linear-probe", PROBE, linear_probe, tokenizer, sets, out, reading, label, cells, as_json)


def knn(
    tokenizer: Path,
    train: Path,
    test: Path | None,
    out: Path,
    reading: Reading,
    label: str,
    share: float | None,
    k: int,
    seed: int,
    as_json: bool,
) -> None:
    """The label of the nearest clips."""
    from motionloom.evals.probes import KNN, knn

    sets = _train_and_test(train, test, share, seed, reading)
    _probe("knn", KNN, partial(knn, k=k), tokenizer, sets, out, reading, label, False, as_json)


def _train_and_test(
    train: Path, test: Path | None, share: float | None, seed: int, reading: Reading
) -> tuple[Set, Set]:
    from motionloom.evals.clips import open_set, set_aside

    if test is not None and share is not None:
        raise UserError(
            f"--share {share:g} sets clips of --train aside, and --test names others: leave out one of them"
        )
    first = open_set(train, reading.clips)
    if test is not None:
        return first, open_set(test, reading.clips)
    return set_aside(first, SHARE if share is None else share, seed)


def _probe(
    kind: str,
    protocol: str,
    probe: Callable[[Labelled, Labelled], Answers],
    tokenizer: Path,
    sets: tuple[Set, Set],
    out: Path,
    reading: Reading,
    label: str,
    cells: bool,
    as_json: bool,
) -> None:
    from motionloom.evals.clips import labels
    from motionloom.evals.tokenizer import judge_probe

    job = _Job(out, as_json)
    views = _views(tokenizer, reading, cells)
    train, test = sets
    known, asked = labels(train, label), labels(test, label)
    _known_classes_only(test, asked, set(known.values()))
    parts = [(job.embed(views, part, reading), said) for part, said in ((train, known), (test, asked))]
    report = judge_probe(kind, protocol, probe, views, *parts)
    job.finish(
        report, [train, test], {"tokenizer": str(tokenizer), "fingerprint": views.name, "label": label}
    )


def _known_classes_only(test: Set, asked: Mapping[str, Hashable], known: set[Hashable]) -> None:
    for entry in test.entries:
        if asked[entry.id] not in known:
            what = f"no training clip is {asked[entry.id]!r}"
            test.refuse(entry, what, "give training clips of that class", "unknown class")
    test.entries = [entry for entry in test.entries if asked[entry.id] in known]
    test.require(test.entries)


def retrieval(tokenizer: Path, manifest: Path, out: Path, reading: Reading, as_json: bool) -> None:
    """Captions by clips, and clips by captions."""
    from motionloom.evals.clips import open_set
    from motionloom.evals.tokenizer import judge_retrieval

    job = _Job(out, as_json)
    views, clips = _views(tokenizer, reading), open_set(manifest, reading.clips)
    views.require_texts()
    report = judge_retrieval(views, job.embed(views, clips, reading))
    job.finish(report, [clips], {"tokenizer": str(tokenizer), "fingerprint": views.name})


def features(tokenizer: Path, manifest: Path, out: Path, reading: Reading, view: str, as_json: bool) -> None:
    """A vector for every clip, as a table."""
    import numpy as np

    from motionloom.evals.clips import open_set
    from motionloom.evals.encoders import unit
    from motionloom.evals.table import check_name, write_table
    from motionloom.evals.tokenizer import embed

    console, shape = Out(as_json), reading.shape
    check_name(out)
    _check_place(out.parent)
    views, clips = _views(tokenizer, reading, view == "latent cells"), open_set(manifest, reading.clips)
    views.require(view)
    with console.progress("clips") as advance:
        found = embed(views, clips, shape, batch=reading.batch, advance=advance)
    vectors = found.view(view, views)
    # Of the space that is searched by cosine; the others keep their lengths.
    vectors = unit(vectors) if view == "clip" else np.asarray(vectors, np.float32)
    ids, captions = zip(*((seen.entry.id, seen.entry.caption) for seen in found.clips), strict=True)
    write_table(out, ids, captions, vectors, {"tokenizer": views.name, "view": view})
    if len(clips.problems):
        skipped(console, clips.problems.lines())
    answer = {"table": str(out), "clips": len(ids), "numbers": vectors.shape[1], "view": view}
    more = {"tokenizer": views.name, "skipped_clips": [str(problem) for problem in clips.problems]}
    console.result({**answer, **more}, [str(out)])


@dataclass(frozen=True)
class Sampled:
    """How a run makes its clips."""

    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    raw: bool = False
    decoder: Path | None = None


def generation(
    run: Path,
    manifest: Path,
    out: Path,
    reading: Reading,
    how: Sampled,
    extractor: str,
    world: str,
    as_json: bool,
) -> None:
    """Clips that a run makes for a manifest's captions, against the real ones."""
    from motionloom.cli.assemble import open_model
    from motionloom.evals.clips import Shape, open_set, read
    from motionloom.evals.generation import judge_generation

    job, place = _Job(out, as_json), _world(world)
    eye = job.optional("FID and KID", extractor, _extractor)
    if eye is None and place is None:
        raise UserError("nothing to judge by: name an --extractor whose package is installed, or --world")
    model = open_model(run, raw=how.raw, device=reading.device, decoder=how.decoder, tell=job.console.note)
    count = reading.clips or 1
    clips = open_set(manifest, 2 * count)
    frames, height, width = model.clip_shape
    real = list(read(clips, Shape(frames, (height, width), model.fps)))
    clips.require(real)
    # Every second one, so that those whose captions are asked lie all over the manifest.
    asked = (real[::2] + real[1::2])[:count]
    if len(asked) < count:
        job.console.note(f"{manifest}: {len(asked)} clips for --clips {count}; so many are made")
    made = _generated(model, [seen.entry.caption for seen in asked], how, job.console)
    report = judge_generation(made, asked, real, eye, place)
    pairs = [(seen, _over(seen.video_PHW3, video)) for seen, video in zip(asked, made, strict=True)]
    sampling = {"run": str(run), "raw": how.raw, "seed": how.seed, "made": len(made), "real": len(real)}
    if how.decoder is not None:
        sampling["decoder"] = model.tokenizer.fingerprint()
    job.finish(report, [clips], sampling, pairs[:24], "real clips over clips made for their captions")


def _generated(model: Model, captions: Sequence[str], how: Sampled, console: Out) -> list[Video]:
    from motionloom.generate import ClipRequest, generate_clips, recipe_sampling

    sampling = recipe_sampling(model.recipe, steps=how.steps, guidance=how.guidance)
    with console.progress("solver steps, all clips") as advance:
        request = ClipRequest(tuple(captions), seed=how.seed)
        return [clip.numpy() for clip in generate_clips(model, request, sampling, progress=advance)]


# What is named


def _tokenizer(folder: Path, device: str) -> Tokenizer:
    from motionloom.cli.assemble import Movable, pick_device
    from motionloom.tokenizers import load_tokenizer

    tokenizer, place = load_tokenizer(folder), pick_device(device)
    if isinstance(tokenizer, Movable):
        tokenizer.to(place)
    return tokenizer


def _views(folder: Path, reading: Reading, cells: bool = False) -> TokenizerViews:
    from motionloom.evals.tokenizer import TokenizerViews

    return TokenizerViews(_tokenizer(folder, reading.device), folder.absolute().name, cells)


def _made_by(folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    spec = tokenizer.spec
    head = "a first frame alone, then " if spec.first_alone else ""
    shape = f"{head}{spec.temporal} x {spec.spatial} x {spec.spatial} pixels to {spec.channels} numbers"
    return {"tokenizer": str(folder), "fingerprint": tokenizer.fingerprint(), "latents": shape}


def _compressed(tokenizer: Tokenizer, found: Rebuilt) -> dict[str, Any]:
    """How much less the latents of the judged clips are than their pixels, both counted. Where a first frame
    stands alone, that depends on how many frames there are."""
    pixels, latents = 0, 0
    for shape, clips in found.shapes.items():
        pixels += clips * 3 * math.prod(shape)
        latents += clips * tokenizer.spec.channels * math.prod(tokenizer.spec.latent_grid(*shape))
    frames = sorted({shape[0] for shape in found.shapes})
    told = f"{frames[0]}" if len(frames) == 1 else f"{frames[0]} to {frames[-1]}"
    return {"pixel_values_per_latent_value": round(pixels / latents, 3), "frames_per_clip": told}


def _world(name: str) -> World | None:
    from motionloom.data.shapeworld import PRESETS

    if name and name not in PRESETS:
        raise UserError(f"--world {name}: choose {', '.join(PRESETS)}")
    return PRESETS[name]() if name else None


def _extractor(name: str) -> Extractor:
    from motionloom.evals.encoders import open_encoder

    return open_encoder("efficientnet-lite0" if name == AUTO else name)


def open_perceptual(name: str) -> tuple[str, Perceive]:
    """LPIPS and its name. Raises UserError for an unknown one, or where its wheel is not installed."""
    if name not in (AUTO, *LPIPS):
        raise UserError(f"--lpips {name}: choose {', '.join(LPIPS)}, {AUTO} or {NONE}")
    from motionloom.evals.encoders import fingerprint
    from motionloom.methods.tokenizer.perceptual import Perceptual

    variant: Literal["vgg", "alex"] = "alex" if name == "alex" else "vgg"
    net = Perceptual(variant).eval()
    return f"st-lpips-{variant}@{fingerprint(net.weights)}", net


def _over(above_PHW3: Video, below_PHW3: Video) -> Video:
    """Two clips in one picture; the longer one loses its end."""
    import numpy as np

    frames = min(len(above_PHW3), len(below_PHW3))
    return np.concatenate([above_PHW3[:frames], below_PHW3[:frames]], axis=1)


# What is answered


def _check_place(folder: Path) -> None:
    """Raises UserError, before any clip is coded, where a folder cannot be made because a file is there."""
    there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if not there.is_dir():
        raise UserError(f"--out {folder}: {there} is a file; name another folder")


class _Job:
    """Where one evaluation writes, and what it could not look at."""

    def __init__(self, out: Path, as_json: bool) -> None:
        _check_place(out)
        if (out / EVALUATED).exists():
            raise UserError(f"{out}: holds an evaluation already; name another folder, or delete it")
        self.out, self.console = out, Out(as_json)
        self.left_out: dict[str, str] = {}

    def optional(self, what: str, name: str, opened: Callable[[str], T]) -> T | None:
        """What looks at clips, by name; with ``auto`` one that is not installed is told and left out."""
        if name == NONE:
            return None
        try:
            return opened(name)
        except UserError as error:
            if name != AUTO:
                raise
            self.leave_out(what, str(error))
            return None

    def leave_out(self, what: str, why: str) -> None:
        """A figure that cannot be told; the others are."""
        self.left_out[what] = why
        self.console.note(f"left out: {what}; {why}")

    def embed(self, views: TokenizerViews, clips: Set, reading: Reading) -> Embedded:
        """Clips as vectors."""
        from motionloom.evals.tokenizer import embed

        with self.console.progress(f"clips of {clips.path.name}") as advance:
            return embed(views, clips, reading.shape, batch=reading.batch, advance=advance)

    def finish(
        self,
        report: Report,
        sets: Sequence[Set],
        made_by: Mapping[str, Any],
        pairs: Sequence[tuple[Seen, Video]] = (),
        pictured: str = "",
    ) -> None:
        """Tables on the terminal; in the folder a sheet, a page and, once they are there, evaluated.json."""
        from motionloom.cli.judge import show
        from motionloom.durable import write_atomic

        problems = [problem for clips in sets for problem in clips.problems]
        for clips in sets:
            if len(clips.problems):
                skipped(self.console, clips.problems.lines())
        answer: dict[str, Any] = {
            **made_by,
            "manifests": [str(clips.path) for clips in sets],
            "clips": len(report.names) if report.kind != "retrieval" else report.details["clips"],
            "skipped_clips": [str(problem) for problem in problems],
            "left_out": self.left_out,
            "reports": [report.record()],
            "command": shlex.join(["motionloom", *sys.argv[1:]]),
        }
        new_folder(self.out)
        files = {"evaluated": str(self.out / EVALUATED)}
        if pairs:
            files["sheet"] = str(self._sheet(pairs))
        files["page"] = str(self._page(report, pairs, answer, pictured))
        write_atomic(self.out / EVALUATED, json.dumps(answer, indent=1).encode())
        show(self.console, report)
        for rows in more_tables(report):
            self.console.table(*rows)
        if warning := report.details.get("warning"):
            self.console.note(f"note: {warning}")
        lines = [files[name] for name in ("evaluated", "page", "sheet") if name in files]
        self.console.result({**answer, **files}, lines)

    def _sheet(self, pairs: Sequence[tuple[Seen, Video]]) -> Path:
        from motionloom.data.sheets import contact_sheet

        videos, captions = [video for _, video in pairs], [seen.entry.caption for seen, _ in pairs]
        return contact_sheet(videos, captions, self.out / SHEET, cell=192)

    def _page(
        self,
        report: Report,
        pairs: Sequence[tuple[Seen, Video]],
        answer: Mapping[str, Any],
        pictured: str,
    ) -> Path:
        from motionloom.cli.judge import tables
        from motionloom.data.media import write_video
        from motionloom.studio.page import Page, Sample, Table, Tile, write_page

        shown = []
        for n, (seen, video) in enumerate(pairs):
            file = f"{SHOWN}/{n:03d}.webp"
            write_video(self.out / file, video, seen.fps, quality=100)
            row = report.clips[report.names.index(seen.entry.id)]
            note = ", ".join(f"{name} {value:.3g}" for name, value in row.items() if value is not None)
            shown.append(Sample(seen.entry.caption, file, note=note))
        more: list[Table] = [Table(*rows) for rows in more_tables(report)]
        page = Page(
            title=f"MotionLoom: {report.kind}",
            subtitle=f"{answer.get('tokenizer') or answer.get('run')}: {answer['clips']} clips of "
            f"{', '.join(answer['manifests'])}.",
            tiles=[Tile(f.name, f"{f.interval.mean:.4g}") for f in report.figures[:4]],
            samples=shown,
            samples_title="Clips",
            samples_note=f"The first {len(shown)}: {pictured}.",
            charts=[],
            tables=[*tables([report]), *more],
            commands=str(answer["command"]),
        )
        write_page(page, self.out / PAGE)
        return self.out / PAGE


def more_tables(report: Report) -> list[Rows]:
    """What is said beside means over clips: distances of sets, settings of probes, chance."""
    details = report.details
    found: list[Rows] = []
    rows: list[tuple[str, ...]] = []
    if "distances" in details:
        for one in details["distances"]:
            kid = one["kid"]
            subsets = f"{kid['subsets']} of {kid['size']}"
            counts = (str(one["clips"]), str(one["frames"]))
            rows.append((one["name"], f"{one['fid']:.4g}", f"{kid['mean']:.4g}", subsets, *counts))
        title = f"distances of sets ({details['distance_protocol']}, seen by {details['extractor']})"
        found.append((title, ("sets", "FID", "KID", "KID's subsets", "clips", "frames"), rows))
    if "views" in details:
        keys = list(dict.fromkeys(key for one in details["views"].values() for key in one))
        rows = [(name, *(f"{one[key]:.4g}" for key in keys)) for name, one in details["views"].items()]
        found.append(("how each view was probed", ("view", *(key.replace("_", " ") for key in keys)), rows))
    if "chance" in details:
        rows = [(name, f"{value:.4f}") for name, value in details["chance"].items()]
        found.append(("chance", ("figure", "chance"), rows))
    return found
