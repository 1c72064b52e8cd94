"""Tokenizers judged: what a clip loses on the way through the latents, and what the latents know of it.

Reconstruction asks nothing of a tokenizer but to encode and decode. Features, words and what goes with them
are those of a VTP model; of any other tokenizer the latent alone can be probed.

Shapes: B batch, P pixel frames, H x W pixels; F latent frames, h x w cells, C channels, N = h * w cells; D
numbers of an embedding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import product
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from motionloom.data.shapeworld import Attributes, Facts, World, adherence, oracle
from motionloom.data.shapeworld.captions import TEMPLATES, word
from motionloom.errors import UserError
from motionloom.evals import fidelity, frechet, probes
from motionloom.evals.adherence import JUDGED
from motionloom.evals.clips import Seen, Set, Shape, Video, batches, evenly, label_of, read
from motionloom.evals.encoders import Extractor
from motionloom.evals.figures import Report, summarise
from motionloom.tokenizers import Tokenizer, TokenizerSpec
from motionloom.tokenizers.vtp.tokenizer import VtpTokenizer, normalised
from motionloom.tokenizers.vtp.words import Words

Row = dict[str, float | None]
Advance = Callable[[int, int], object]

DISTANCES = "rFID and KID"
"""What is told of frames' sets, where it has to be left out."""
MOST_SHOWN = 24
FRAMES_PER_CLIP = 4
"""Frames of a clip that features are taken of: its neighbours say little more, and cost as much."""


# Reconstruction


@dataclass(frozen=True)
class Tools:
    """What reconstructions are looked at with; what is None is left out.

    ``perceive`` and its name: a learned distance; ``world``: ask ShapeWorld's oracle too; ``frames``: what
    networks are shown of a clip, evenly spread.
    """

    extractor: Extractor | None = None
    perceive: tuple[str, fidelity.Perceive] | None = None
    world: World | None = None
    frames: int = FRAMES_PER_CLIP
    batch: int = 8


@dataclass
class Rebuilt:
    """What reconstruction gave: the report, and the first clips with what came back of them.

    ``shapes``: (P, H, W) of the judged clips, counted. ``left_out``: why a figure is not told, or not of all.
    """

    report: Report
    shown: list[tuple[Seen, Video]] = field(default_factory=list)
    shapes: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    left_out: dict[str, str] = field(default_factory=dict)


def judge_reconstruction(
    tokenizer: Tokenizer, clips: Set, shape: Shape, tools: Tools, advance: Advance = lambda done, total: None
) -> Rebuilt:
    """PSNR, SSIM, flicker, and by ``tools`` LPIPS, rFID, KID and the oracle, of a manifest's clips.

    Raises:
        UserError: no clip can be judged.
    """
    rows: list[Row] = []
    names: list[str] = []
    shown: list[tuple[Seen, Video]] = []
    shapes: Counter[tuple[int, int, int]] = Counter()
    misses: dict[str, list[str]] = {}
    features: tuple[list[frechet.Features], list[frechet.Features]] = ([], [])
    for seen, made_PHW3 in _rebuilt(tokenizer, clips, shape, tools.batch):
        try:
            row, missed = _fidelity(seen, made_PHW3, tools)
        except UserError as error:
            what, _, fix = str(error).partition("; ")
            clips.refuse(seen.entry, what, fix, "cannot be compared")
            continue
        rows.append(row)
        names.append(seen.entry.id)
        frames, height, width = seen.video_PHW3.shape[:3]
        shapes[frames, height, width] += 1
        for name, why in missed.items():
            misses.setdefault(name, []).append(why)
        if tools.extractor is not None:
            for side, video in zip(features, (made_PHW3, seen.video_PHW3), strict=True):
                side.append(tools.extractor.features(evenly(video, tools.frames)))
        if len(shown) < MOST_SHOWN:
            shown.append((seen, made_PHW3))
        advance(len(rows), len(clips.entries))
    clips.require(rows)
    left_out = {name: f"{why[0]} ({len(why)} of {len(rows)} clips)" for name, why in misses.items()}
    try:
        details = {} if tools.extractor is None else distances(tools.extractor, *features, tools.frames)
    except UserError as error:
        details, left_out[DISTANCES] = {}, str(error)
    eyes = {"": "pixels", "lpips": tools.perceive[0] if tools.perceive else ""}
    eyes |= {name: "oracle" for row in rows for name in row if name.startswith("oracle")}
    report = summarise("reconstruction", fidelity.PROTOCOL, names, rows, eyes, details=details)
    return Rebuilt(report, shown, shapes, left_out)


def _rebuilt(tokenizer: Tokenizer, clips: Set, shape: Shape, batch: int) -> Iterable[tuple[Seen, Video]]:
    """Each clip and what comes back of it; one whose latents are not finite is listed instead."""
    for together in batches(read(clips, shape, tokenizer.spec), batch):
        video = torch.from_numpy(np.stack([seen.video_PHW3 for seen in together]))
        with torch.no_grad():
            latents = tokenizer.encode(video)
            finite = latents.flatten(1).isfinite().all(dim=1).tolist()
            made = tokenizer.decode(latents.nan_to_num()).cpu().numpy()
        for seen, ok, video_PHW3 in zip(together, finite, made, strict=True):
            if ok:
                yield seen, video_PHW3
            else:
                what, fix = "its latents are NaN or infinite", "look at the tokenizer's weights"
                clips.refuse(seen.entry, what, fix, "not finite")


def _fidelity(seen: Seen, made_PHW3: Video, tools: Tools) -> tuple[Row, dict[str, str]]:
    """The figures of a clip; and of those that it is too small for, why."""
    real_PHW3 = seen.video_PHW3
    row: Row = {"psnr (dB)": fidelity.psnr(made_PHW3, real_PHW3)}
    asked: dict[str, Callable[[], float | None]] = {
        "ssim": lambda: fidelity.ssim(made_PHW3, real_PHW3),
        "flicker (levels)": lambda: fidelity.flicker(made_PHW3, real_PHW3),
    }
    if tools.perceive is not None:
        made, real = (evenly(video, tools.frames) for video in (made_PHW3, real_PHW3))
        asked["lpips"] = partial(fidelity.lpips, made, real, tools.perceive[1])
    missed: dict[str, str] = {}
    for name, figure in asked.items():
        try:
            row[name] = figure()
        except UserError as error:
            missed[name] = str(error)
    if tools.world is not None and (facts := seen.facts) is not None:
        row |= read_back(made_PHW3, facts, tools.world)
        row |= read_back(real_PHW3, facts, tools.world, ", originals")
    return row, missed


def read_back(video_PHW3: Video, facts: Facts, world: World, where: str = "") -> Row:
    """What the oracle still reads as it should be: colour, shape, motion, and all three at once."""
    obeyed = adherence(oracle(video_PHW3, world), facts)
    read = {name: float(obeyed[name]) for name in JUDGED}
    return {f"oracle: {name}{where}": yes for name, yes in {"all": min(read.values()), **read}.items()}


def distances(
    extractor: Extractor, made: Sequence[frechet.Features], real: Sequence[frechet.Features], frames: int
) -> dict[str, Any]:
    """FID and KID of what was made against real clips with their floor, and all that they depend on.

    Args:
        made, real: features (frames, D) of each clip.
        frames: at most so many of a clip.
    """
    sets = frechet.with_floor(made, real)
    return {
        "distances": [one.record() for one in sets],
        "extractor": extractor.name,
        "distance_protocol": f"{frechet.PROTOCOL}, {frames} frames a clip, {real[0].shape[1]} features",
        "warning": frechet.warning(sets),
    }


# Embeddings


class Embedder(Protocol):
    """Gives clips, and perhaps words, as vectors."""

    name: str
    spec: TokenizerSpec

    def clips(self, video_BPHW3: Tensor) -> Mapping[str, Tensor]:
        """uint8 clips to (B, D) by the name of the view."""
        ...

    def texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Texts to (N, D) in the space of the view ``clip``. Raises UserError where there is none."""
        ...


class TokenizerViews:
    """The views of a tokenizer.

    ``latent``: mean over cells and frames, C numbers. ``latent cells``: all of it, where ``cells`` is asked
    for. Of a VTP model also ``cls`` and ``patch``, means over the clip of what stands before the bottleneck,
    and ``clip``, its place in the space that it shares with texts.
    """

    def __init__(self, tokenizer: Tokenizer, name: str, cells: bool = False) -> None:
        self.name = f"{name}@{tokenizer.fingerprint()[:12]}"
        self.spec = tokenizer.spec
        self._tokenizer, self._cells = tokenizer, cells
        self._vtp = tokenizer if isinstance(tokenizer, VtpTokenizer) else None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the views that :meth:`clips` gives."""
        found = ("latent", *(["latent cells"] if self._cells else []))
        if self._vtp is None:
            return found
        return (*found, "cls", "patch", *(["clip"] if self._vtp.model.config.train_clip else []))

    def require(self, view: str) -> None:
        """Raises UserError where the tokenizer has no such view; needs no clip for it."""
        _require_view(view, self.names, self.name)

    @torch.no_grad()
    def clips(self, video_BPHW3: Tensor) -> dict[str, Tensor]:
        latents_BFhwC = self._tokenizer.encode(video_BPHW3).float().cpu()
        views = {"latent": latents_BFhwC.mean(dim=(1, 2, 3))}
        if self._cells:
            views["latent cells"] = latents_BFhwC.flatten(1)
        if self._vtp is None:
            return views
        model = self._vtp.model
        found = model.trunk(normalised(video_BPHW3.to(self._vtp.device)))
        views["cls"], views["patch"] = found.clip_BD, found.patches_BFND.mean(dim=(1, 2))
        if model.config.train_clip:
            views["clip"] = model.clip_image(found)
        return {name: x.float().cpu() for name, x in views.items()}

    def require_texts(self) -> None:
        """Raises UserError where the tokenizer reads no texts; needs no clip for it."""
        _ = self._reader

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        vtp, words = self._reader
        tokens_BL = words(texts).to(vtp.device)
        answer: NDArray[np.float32] = vtp.model.clip_text(tokens_BL).float().cpu().numpy()
        return answer

    @cached_property
    def _reader(self) -> tuple[VtpTokenizer, Words]:
        if self._vtp is None:
            raise UserError(f"{self.name}: this tokenizer reads no texts; name a VTP model, which does")
        return self._vtp, self._vtp.words()


@dataclass(frozen=True)
class Embedded:
    """Clips that were read and their vectors (N, D) by view."""

    clips: list[Seen]
    views: dict[str, NDArray[np.float32]]

    def view(self, name: str, embedder: Embedder) -> NDArray[np.float32]:
        """Raises UserError where the tokenizer has no such view."""
        _require_view(name, self.views, embedder.name)
        return self.views[name]


def _require_view(view: str, views: Collection[str], embedder: str) -> None:
    if view not in views:
        raise UserError(
            f"{embedder}: has no view {view}, only {', '.join(views)}; name one of them, or a VTP model that "
            "reads texts"
        )


def embed(
    embedder: Embedder,
    clips: Set,
    shape: Shape,
    *,
    batch: int = 8,
    advance: Advance = lambda done, total: None,
) -> Embedded:
    """All clips of a set; those that cannot be read, or whose vectors are not finite, are listed.

    Raises:
        UserError: no clip is left, or latents of several sizes where all their cells are asked for.
    """
    found: list[Seen] = []
    parts: dict[str, list[NDArray[np.float32]]] = {}
    for together in batches(read(clips, shape, embedder.spec), batch):
        views = embedder.clips(torch.from_numpy(np.stack([seen.video_PHW3 for seen in together])))
        for n, seen in enumerate(together):
            if not all(bool(x_BD[n].isfinite().all()) for x_BD in views.values()):
                what, fix = "its features are NaN or infinite", "look at the tokenizer's weights"
                clips.refuse(seen.entry, what, fix, "not finite")
                continue
            for name, x_BD in views.items():
                parts.setdefault(name, []).append(x_BD[n].numpy())
            # Pixels are not needed any more, and all clips at once may be more than fits.
            found.append(Seen(seen.entry, seen.video_PHW3[:0], seen.fps))
        advance(len(found), len(clips.entries))
    clips.require(found)
    for name, rows in parts.items():
        if len({row.shape for row in rows}) > 1:
            raise UserError(f"{clips.path}: {name} of clips of several sizes; say --size and --frames")
    return Embedded(found, {name: np.stack(rows) for name, rows in parts.items()})


# Probes


Kind = Callable[[probes.Labelled, probes.Labelled], probes.Answers]


def judge_probe(
    kind: str,
    protocol: str,
    probe: Kind,
    embedder: Embedder,
    train: tuple[Embedded, Mapping[str, Hashable]],
    test: tuple[Embedded, Mapping[str, Hashable]],
) -> Report:
    """A probe on every view apart, trained on some clips and told of others.

    Args:
        train, test: clips with the label of each by its id.

    Raises:
        UserError: as the probe.
    """
    rows: list[Row] = [{} for _ in test[0].clips]
    details: dict[str, Any] = {}
    known, asked = ([said[seen.entry.id] for seen in part.clips] for part, said in (train, test))
    for view, x_ND in train[0].views.items():
        if view == "clip":
            continue  # a linear map of the others
        answers = probe(probes.Labelled(x_ND, known), probes.Labelled(test[0].views[view], asked))
        for row, right in zip(rows, answers.right, strict=True):
            row[view] = float(right)
        details[view] = {"chance": answers.chance, **answers.details}
    names = [seen.entry.id for seen in test[0].clips]
    return summarise(kind, protocol, names, rows, {"": embedder.name}, details={"views": details})


def judge_retrieval(embedder: Embedder, found: Embedded) -> Report:
    """Captions by clips and clips by captions: R@1, 5 and 10, with what a random order would reach."""
    captions = list(dict.fromkeys(seen.entry.caption for seen in found.clips))
    place = {caption: n for n, caption in enumerate(captions)}
    texts_UD = probes.class_embeddings([[caption] for caption in captions], embedder.texts)
    owner = [place[seen.entry.caption] for seen in found.clips]
    to_text, to_clip = probes.retrieval(found.view("clip", embedder), texts_UD, owner)
    rows: list[Row] = []
    for way, answers in (("clip to text", to_text), ("text to clip", to_clip)):
        rows += [{f"{way} R@{k}": float(yes) for k, yes in one.items()} for one in answers.right]
    chance = {
        f"{way} R@{k}": value
        for way, answers in (("clip to text", to_text), ("text to clip", to_clip))
        for k, value in answers.chance.items()
    }
    names = [*(seen.entry.id for seen in found.clips), *captions]
    details = {"chance": chance, "clips": len(found.clips), "texts": len(captions)}
    return summarise("retrieval", probes.RETRIEVAL, names, rows, {"": embedder.name}, details=details)


# Zero-shot


MANIFEST_TEMPLATES = ("{}", "a picture of {}", "a video of {}", "an animation of {}")


@dataclass(frozen=True)
class Classes:
    """What clips are told apart by: the wordings of each class, and the class of each clip by its id.

    ``parts``: what a class is made of, where it is of several things, by name.
    """

    names: list[str]
    wordings: list[list[str]]
    of_clip: dict[str, int]
    parts: dict[str, list[Hashable]] = field(default_factory=dict)
    held_out: frozenset[int] = frozenset()
    """Classes that no training split of the world holds."""


def world_classes(clips: Set, world: World) -> Classes:
    """Every combination of shape, colour and motion that a world has, in each of its wordings, sizes and
    backgrounds; clips that do not show one object of it are listed.

    Raises:
        UserError: no clip is left.
    """
    combinations = world.combinations("all")
    place = {combination: n for n, combination in enumerate(combinations)}
    wordings = [
        [
            word(Facts((Attributes(shape, color, size, motion),), background), wording)
            for wording, size, background in product(range(len(TEMPLATES)), world.sizes, world.backgrounds)
        ]
        for shape, color, motion in combinations
    ]
    of_clip: dict[str, int] = {}
    for entry in clips.entries:
        facts = Seen(entry, np.zeros((0, 1, 1, 3), np.uint8), 0.0).facts
        mine = None if facts is None or len(facts.objects) != 1 else facts.objects[0].combination
        if mine in place:
            of_clip[entry.id] = place[mine]
        else:
            what = f'"{entry.caption}" is not one object of this world'
            clips.refuse(entry, what, "choose another --world, or leave the clip out", "another world")
    clips.entries = [entry for entry in clips.entries if entry.id in of_clip]
    clips.require(clips.entries)
    columns = [list(column) for column in zip(*combinations, strict=True)]
    parts: dict[str, list[Hashable]] = dict(zip(("shape", "color", "motion"), columns, strict=True))
    unseen = frozenset(place[combination] for combination in world.combinations("test"))
    names = [f"{color} {shape}, {motion}" for shape, color, motion in combinations]
    return Classes(names, wordings, of_clip, parts, unseen)


def manifest_classes(clips: Set, name: str, templates: Sequence[str] = ()) -> Classes:
    """The values of a field of the manifest, or each distinct caption (``name`` empty), in some templates.

    Raises:
        UserError: a template without ``{}``, or no clip with that field.
    """
    for template in templates:
        if template.count("{}") != 1:
            raise UserError(f"--template {template!r}: write {{}} once, where the class's name goes")
    said: dict[str, str] = {}
    for entry in clips.entries:
        try:
            said[entry.id] = str(label_of(entry, name)) if name else entry.caption
        except UserError as error:
            what, _, fix = str(error).partition("; ")
            clips.refuse(entry, what, fix, "no class")
    clips.entries = [entry for entry in clips.entries if entry.id in said]
    clips.require(clips.entries)
    names = sorted(set(said.values()))
    usual = MANIFEST_TEMPLATES if name else ("{}",)
    wordings = [[template.replace("{}", one) for template in templates or usual] for one in names]
    return Classes(names, wordings, {id: names.index(one) for id, one in said.items()})


def judge_zero_shot(embedder: Embedder, found: Embedded, classes: Classes) -> Report:
    """Top-1 over all classes, and of classes made of several things each of them apart.

    Raises:
        UserError: the tokenizer reads no texts, or there is one class alone.
    """
    known_KD = probes.class_embeddings(classes.wordings, embedder.texts)
    wanted = [classes.of_clip[seen.entry.id] for seen in found.clips]
    x_ND = found.view("clip", embedder)
    answers = probes.zero_shot(x_ND, known_KD, wanted)
    parts = {
        part: probes.zero_shot_part(x_ND, known_KD, wanted, values) for part, values in classes.parts.items()
    }
    rows: list[Row] = []
    for n, (right, own) in enumerate(zip(answers.right, wanted, strict=True)):
        row: Row = {"top-1": float(right)}
        if classes.held_out:
            split = "held-out" if own in classes.held_out else "training"
            row[f"top-1, {split} combinations"] = float(right)
        rows.append(row | {part: float(told[n]) for part, told in parts.items()})
    details = {
        "chance": {"top-1": answers.chance},
        "classes": len(classes.names),
        "wordings": len(classes.wordings[0]),
        "examples": classes.wordings[0][:3],
    }
    names = [seen.entry.id for seen in found.clips]
    return summarise("zero-shot", probes.ZERO_SHOT, names, rows, {"": embedder.name}, details=details)
