"""`motionloom eval` and `motionloom features`: what they say of tokenizers whose truth is known, what they
leave behind, and how they refuse."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

import motionloom.cli.assemble as assemble
from motionloom.cli.main import main
from motionloom.config.recipe import TokenizerConfig
from motionloom.data.manifest import ManifestEntry, read_manifest, write_manifest
from motionloom.data.media import read_clip, write_video
from motionloom.data.shapeworld import MOTIONS, World, parse, write_dataset
from motionloom.errors import UserError
from motionloom.evals.clips import Shape, label_of, labels, open_set, set_aside
from motionloom.evals.tokenizer import (
    Tools,
    embed,
    judge_reconstruction,
    judge_retrieval,
    judge_zero_shot,
    manifest_classes,
    world_classes,
)
from motionloom.rng import numpy_rng
from motionloom.tokenizers import TokenizerSpec, fit_tokenizer
from motionloom.tokenizers.patch import PatchTokenizer
from motionloom.tokenizers.vtp import VTPConfig, VTPModel, VtpTokenizer, Words
from toy_model import toy_model

SIDE, FRAMES, CLIPS = 32, 8, 12

WORLD = World.quickstart(SIDE, FRAMES)
VTP = VTPConfig(
    image_size=SIDE,
    vision_patch_size=8,
    vision_embed_dim=32,
    vision_depth=1,
    vision_num_heads=2,
    vision_feature_bottleneck=6,
    text_context_length=40,
    text_embed_dim=16,
    text_num_heads=2,
    text_depth=1,
    decoder_embed_dim=32,
    decoder_num_heads=2,
    decoder_depth=1,
)


class Same:
    """A tokenizer that loses nothing; ``spoil`` changes the latents on the way."""

    spec = TokenizerSpec(3, 1, 1)

    def __init__(self, spoil: Any = lambda latents: latents) -> None:
        self.spoil = spoil

    def encode(self, video_BPHW3: Tensor) -> Tensor:
        return self.spoil(video_BPHW3.float() / 127.5 - 1)

    def decode(self, latents_BFhwC: Tensor) -> Tensor:
        return ((latents_BFhwC + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    def fingerprint(self) -> str:
        return "0" * 64


class Quarters:
    """Mean colours of the four quarters of a frame."""

    name = "quarters"

    def embed(self, frames_NHW3: np.ndarray) -> np.ndarray:
        return self.features(frames_NHW3)

    def features(self, frames_NHW3: np.ndarray) -> np.ndarray:
        half = SIDE // 2
        cells = frames_NHW3.reshape(-1, 2, half, 2, half, 3).mean(axis=(2, 4))
        return cells.reshape(len(cells), 12).astype(np.float32)


class Reader:
    """An embedder that reads captions off clips by their order: what a perfect model would answer."""

    name, spec = "reader", Same.spec

    def __init__(self, captions: Sequence[str]) -> None:
        self.captions, self.at = list(captions), 0

    def clips(self, video_BPHW3: Tensor) -> dict[str, Tensor]:
        some = self.captions[self.at : self.at + len(video_BPHW3)]
        self.at += len(video_BPHW3)
        return {"clip": torch.from_numpy(self.texts(some))}

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        return np.stack([self.vector(text) for text in texts]).astype(np.float32)

    def vector(self, text: str) -> np.ndarray:
        facts = parse(text)
        if facts is None:
            return direction(text)
        (one,) = facts.objects
        said = (
            (one.shape, 1.0),
            (one.color, 1.0),
            (one.motion, 1.0),
            (one.size, 0.3),
            (facts.background, 0.3),
        )
        return np.sum([weight * direction(name) for name, weight in said], axis=0)


@cache
def direction(name: str) -> np.ndarray:
    return numpy_rng("word", name).standard_normal(40)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small world's folder, with a patch tokenizer and a VTP one beside its manifest."""
    folder = tmp_path_factory.mktemp("eval")
    manifest = write_dataset(folder / "world", WORLD, CLIPS, seed=3)
    entries, _ = read_manifest(manifest)
    videos = [torch.from_numpy(read_clip(entry.path).video_FHW3) for entry in entries]
    fit_tokenizer(TokenizerConfig(latent_f=8, latent_t=4, latent_d=32), videos).save(folder / "patch")
    words = Words.learned([entry.caption for entry in entries], 40, 300)
    model = VTPModel(replace(VTP, text_vocab_size=words.size))
    model.init_weights(0)
    words.save(folder / "words")
    VtpTokenizer.measured(model, videos[:4], words=folder / "words").save(folder / "vtp")
    return folder


class Answer:
    """What a command left behind."""

    def __init__(self, *arguments: object) -> None:
        out, err = io.StringIO(), io.StringIO()
        before, self.code = sys.argv, 0
        sys.argv = ["motionloom", *map(str, arguments)]
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                main()
        except SystemExit as stop:
            self.code = int(stop.code or 0)
        finally:
            sys.argv = before
        self.out, self.err = out.getvalue(), err.getvalue()

    @property
    def value(self) -> dict[str, Any]:
        assert self.code == 0, self.err
        answer: dict[str, Any] = json.loads(self.out)
        return answer

    def figures(self) -> dict[str, float]:
        (report,) = self.value["reports"]
        return {figure["name"]: figure["mean"] for figure in report["figures"]}

    def refused(self, what: str) -> bool:
        """Whether it ended in one line that says so."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        return self.code == 2 and len(lines) == 1 and what in lines[0] and "Traceback" not in self.err


def evaluate(kind: str, tokenizer: Path, manifest: Path, out: Path, *more: object) -> Answer:
    name = "--train" if kind in ("linear-probe", "knn") else "--manifest"
    return Answer("eval", kind, tokenizer, name, manifest, "--out", out, "--json", *more)


def plain(*more: object) -> tuple[object, ...]:
    return ("--extractor", "color-histogram", "--lpips", "none", *more)


# Reconstruction


def test_what_loses_nothing_scores_full_marks(world: Path) -> None:
    tools = Tools(Quarters(), ("mean gap", lambda a, b: (a - b).abs().mean(dim=(1, 2, 3))), WORLD)
    rebuilt = judge_reconstruction(Same(), open_set(world / "world/manifest.jsonl"), Shape(), tools)  # type: ignore[arg-type]
    value = rebuilt.report.value
    assert value("psnr (dB)") == 100
    assert value("ssim") == pytest.approx(1)
    assert value("flicker (levels)") == value("lpips") == 0
    assert value("oracle: all") == value("oracle: all, originals") == 1
    same, *_, floor = rebuilt.report.details["distances"]
    assert same["fid"] < 1e-6 < floor["fid"]
    assert len(rebuilt.shown) == CLIPS


def test_each_loss_is_seen_by_what_looks_for_it(world: Path) -> None:
    clips = open_set(world / "world/manifest.jsonl", 6)

    def judged(spoil: Any) -> Any:
        tools = Tools(Quarters(), None, WORLD)
        return judge_reconstruction(Same(spoil), clips, Shape(), tools).report  # type: ignore[arg-type]

    tint = judged(lambda z: z * 0.9)
    assert 18 < tint.value("psnr (dB)") < 40
    blink = judged(lambda z: z * torch.tensor([1.0, 0.9] * (FRAMES // 2))[None, :, None, None, None])
    assert blink.value("flicker (levels)") > 5 * tint.value("flicker (levels)")
    backwards = judged(lambda z: z.flip(1))
    assert backwards.value("oracle: color") == 1
    assert backwards.value("oracle: motion") < 0.5
    assert backwards.value("oracle: motion, originals") == 1


def test_the_command_leaves_figures_a_page_and_originals_over_reconstructions(
    world: Path, tmp_path: Path
) -> None:
    manifest, out = world / "world/manifest.jsonl", tmp_path / "out"
    answer = evaluate("reconstruction", world / "patch", manifest, out, *plain("--world", "quickstart"))
    figures = answer.figures()
    assert 20 < figures["psnr (dB)"] < 50
    assert figures["oracle: all"] == 1
    value = answer.value
    assert (value["clips"], value["skipped_clips"], value["left_out"]) == (CLIPS, [], {})
    assert value["pixel_values_per_latent_value"] == 3 * 8 * 8 * 4 / 32
    assert value["frames_per_clip"] == "8"
    kept = json.loads((out / "evaluated.json").read_text())
    assert kept["reports"] == value["reports"]
    first, same, floor = kept["reports"][0]["distances"]
    assert (first["frames"], same["frames"], floor["frames"]) == (4 * CLIPS, 2 * CLIPS, 2 * CLIPS)
    assert first["rank_deficient"] is True
    assert f"note: FID of {2 * CLIPS} frames" in answer.err
    html = (out / "evaluated.html").read_text()
    assert html.count("<img") == CLIPS
    assert "floor: real and other real" in html
    with Image.open(out / "shown/000.webp") as pair:
        assert (pair.size, pair.n_frames) == ((SIDE, 2 * SIDE), FRAMES)
    assert Path(value["sheet"]).is_file()
    again = evaluate("reconstruction", world / "patch", manifest, out, *plain())
    assert again.refused("holds an evaluation already")


@pytest.mark.parametrize(("frames", "expected"), [(5, 5 / 3), (1, 1.0)])
def test_compression_is_counted_on_the_clips_with_their_first_frame_alone(
    world: Path, tmp_path: Path, frames: int, expected: float
) -> None:
    """A first frame has latents of its own, as many as two frames behind it have together."""
    model = VTPModel(replace(VTP, temporal_patch=2, train_clip=False))
    model.init_weights(0)
    noise = numpy_rng("compression").integers(0, 256, (4, 5, SIDE, SIDE, 3), "uint8")
    videos = list(torch.from_numpy(noise))
    VtpTokenizer.measured(model, videos).save(tmp_path / "pairs")
    short = ("--frames", frames, "--clips", 2)
    answer = evaluate(
        "reconstruction", tmp_path / "pairs", world / "world/manifest.jsonl", tmp_path / "out", *plain(*short)
    )
    per_frame = 3 * 8 * 8 / VTP.vision_feature_bottleneck
    assert answer.value["pixel_values_per_latent_value"] == pytest.approx(per_frame * expected, abs=1e-3)
    assert answer.value["frames_per_clip"] == str(frames)


def test_an_evaluation_that_broke_off_is_no_finished_one(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise UserError("the disk is full")

    call = ("reconstruction", world / "patch", world / "world/manifest.jsonl", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("motionloom.studio.page.write_page", full)
        assert evaluate(*call, *plain("--clips", 2)).refused("the disk is full")
    assert not (tmp_path / "out/evaluated.json").exists()
    assert evaluate(*call, *plain("--clips", 2)).value["clips"] == 2


def test_small_frames_leave_out_the_figures_that_need_larger_ones(world: Path, tmp_path: Path) -> None:
    """LPIPS needs 16 pixels a side and SSIM 11; the others are told all the same."""
    from motionloom.methods.tokenizer.perceptual import LEAST

    class Needs:
        def __call__(self, made: Tensor, real: Tensor) -> Tensor:
            if min(made.shape[-2:]) < LEAST:
                raise UserError(f"frames are too small, it needs {LEAST}")
            return (made - real).abs().mean(dim=(1, 2, 3))

    tools = Tools(None, ("mean gap", Needs()))
    manifest = world / "world/manifest.jsonl"
    for side, told, left_out in (
        (8, {"psnr (dB)"}, {"ssim", "lpips"}),
        (12, {"ssim"}, {"lpips"}),
        (16, {"lpips"}, set()),
    ):
        clips = open_set(manifest, 3)
        rebuilt = judge_reconstruction(Same(), clips, Shape(size=(side, side)), tools)  # type: ignore[arg-type]
        figures = {figure.name for figure in rebuilt.report.figures}
        assert told <= figures
        assert not left_out & figures
        assert rebuilt.left_out.keys() == left_out
        assert len(clips.problems) == 0
    small = evaluate("reconstruction", world / "patch", manifest, tmp_path / "out", *plain("--size", 8))
    assert small.value["left_out"]["ssim"].endswith("its window needs 11 pixels a side (12 of 12 clips)")
    assert "left out: ssim; SSIM: frames of 8x8" in small.err
    assert small.figures().keys() == {"psnr (dB)", "flicker (levels)"}


def test_distances_of_too_few_frames_leave_the_other_figures(world: Path) -> None:
    clips = open_set(world / "world/manifest.jsonl", 1)
    rebuilt = judge_reconstruction(Same(), clips, Shape(frames=1), Tools(Quarters()))  # type: ignore[arg-type]
    assert rebuilt.report.value("psnr (dB)") == 100
    assert "needs 2 frames" in rebuilt.left_out["rFID and KID"]


def test_what_cannot_be_judged_is_listed_and_the_rest_goes_on(world: Path, tmp_path: Path) -> None:
    entries, _ = read_manifest(world / "world/manifest.jsonl")
    odd = write_video(tmp_path / "odd.mp4", np.full((FRAMES, 36, 44, 3), 90, np.uint8), 8.0)
    short = write_video(tmp_path / "short.mp4", np.full((6, SIDE, SIDE, 3), 90, np.uint8), 8.0)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    bad = [ManifestEntry(path.stem, path, "grey") for path in (odd, short, tmp_path / "broken.mp4")]
    write_manifest(tmp_path / "some.jsonl", [*entries[:4], *bad])
    with (tmp_path / "some.jsonl").open("a") as file:
        file.write(json.dumps({"id": "silent", "path": str(odd), "caption": " "}) + "\n")
    answer = evaluate("reconstruction", world / "patch", tmp_path / "some.jsonl", tmp_path / "out", *plain())
    said = answer.value["skipped_clips"]
    assert answer.value["clips"] == 4
    assert len(said) == 4
    assert any("odd: height 36 does not divide" in line and "use 32 or 40" in line for line in said)
    assert any("short: 6 frames do not divide" in line and "use 4 or 8" in line for line in said)
    assert any("the caption is empty" in line for line in said)
    assert answer.err.count("skipped 4 of 8 clips") == 1
    scaled = ("--size", SIDE, "--frames", 4, *plain())
    more = evaluate("reconstruction", world / "patch", tmp_path / "some.jsonl", tmp_path / "scaled", *scaled)
    assert (more.value["clips"], len(more.value["skipped_clips"])) == (6, 2)


def test_latents_that_are_no_numbers_are_listed(world: Path) -> None:
    clips = open_set(world / "world/manifest.jsonl", 4)

    def second_is_nan(latents: Tensor) -> Tensor:
        latents[1] = float("nan")
        return latents

    rebuilt = judge_reconstruction(Same(second_is_nan), clips, Shape(), Tools())  # type: ignore[arg-type]
    assert len(rebuilt.report.names) == 3
    assert [problem.kind for problem in clips.problems] == ["not finite"]
    every = judge_reconstruction
    with pytest.raises(UserError, match="no clip of it can be judged"):
        every(Same(lambda z: z * float("nan")), open_set(clips.path, 4), Shape(), Tools())  # type: ignore[arg-type]


# Words


def test_a_model_that_reads_and_sees_tells_every_combination(world: Path) -> None:
    clips = open_set(world / "world/manifest.jsonl")
    reader = Reader([entry.caption for entry in clips.entries])
    classes = world_classes(clips, WORLD)
    assert len(classes.names) == len(WORLD.combinations("all")) == 4 * 6 * 5
    assert len(classes.wordings[0]) == 6 * 2 * 2
    report = judge_zero_shot(reader, embed(reader, clips, Shape()), classes)
    assert report.value("top-1") == report.value("motion") == 1
    assert report.value("top-1, training combinations") == 1
    assert report.details["chance"]["top-1"] == pytest.approx(1 / 120)
    # The wrong clips for the same captions.
    clips = open_set(world / "world/manifest.jsonl")
    blind = Reader([entry.caption for entry in clips.entries[::-1]])
    assert judge_zero_shot(blind, embed(blind, clips, Shape()), classes).value("top-1") < 0.5


def test_clips_of_another_world_are_listed(world: Path) -> None:
    clips = open_set(world / "world/manifest.jsonl")
    motions = {facts.objects[0].motion for e in clips.entries if (facts := parse(e.caption))}
    gone = min(motions)
    smaller = World(objects=(1,), motions=tuple(m for m in MOTIONS if m != gone))
    classes = world_classes(clips, smaller)
    assert 0 < len(classes.of_clip) < CLIPS
    assert {problem.kind for problem in clips.problems} == {"another world"}
    assert len(clips.problems) == CLIPS - len(classes.of_clip)


def test_classes_of_a_manifest_are_a_field_or_its_captions(world: Path) -> None:
    clips = open_set(world / "world/manifest.jsonl")
    by_field = manifest_classes(clips, "background", ["a {} room"])
    assert by_field.wordings == [["a dark room"], ["a light room"]]
    assert set(by_field.of_clip.values()) == {0, 1}
    by_caption = manifest_classes(clips, "")
    assert sorted(by_caption.names) == sorted({entry.caption for entry in clips.entries})
    # Other braces are words.
    assert manifest_classes(clips, "background", ["{} {x}", "{} {"]).wordings[0] == ["dark {x}", "dark {"]
    with pytest.raises(UserError, match=r"write \{\} once"):
        manifest_classes(clips, "background", ["a room"])


def test_a_model_that_has_collapsed_tells_no_part_of_a_class(world: Path) -> None:
    clips = open_set(world / "world/manifest.jsonl")
    reader = Reader([""] * CLIPS)
    reader.vector = lambda text: np.ones(40)  # type: ignore[method-assign]
    report = judge_zero_shot(reader, embed(reader, clips, Shape()), world_classes(clips, WORLD))
    assert [report.value(name) for name in ("top-1", "shape", "color", "motion")] == [0, 0, 0, 0]


def test_retrieval_finds_what_a_perfect_model_would(world: Path) -> None:
    clips = open_set(world / "world/manifest.jsonl")
    reader = Reader([entry.caption for entry in clips.entries])
    report = judge_retrieval(reader, embed(reader, clips, Shape(), batch=5))
    assert report.value("clip to text R@1") == report.value("text to clip R@1") == 1
    assert report.details["chance"]["clip to text R@1"] == pytest.approx(1 / report.details["texts"])


def test_the_commands_of_words_run_on_a_vtp_model(world: Path, tmp_path: Path) -> None:
    manifest = world / "world/manifest.jsonl"
    named = evaluate("zero-shot", world / "vtp", manifest, tmp_path / "b", "--classes", "background")
    assert named.value["reports"][0]["chance"] == {"top-1": 0.5}
    found = evaluate("retrieval", world / "vtp", manifest, tmp_path / "c")
    assert len(found.figures()) == 6
    assert (tmp_path / "c/evaluated.html").is_file()


# Labels


def test_probes_tell_views_apart_and_never_train_on_what_they_report(world: Path, tmp_path: Path) -> None:
    manifest = world / "world/manifest.jsonl"
    probe = evaluate(
        "linear-probe", world / "vtp", manifest, tmp_path / "a", "--label", "background", "--cells"
    )
    assert probe.figures().keys() == {"cls", "patch", "latent", "latent cells"}
    views = probe.value["reports"][0]["views"]
    assert views["latent cells"]["numbers"] == views["latent"]["numbers"] * FRAMES * 16
    assert {view["trained_on"] for view in views.values()} == {9}
    assert probe.value["clips"] == 3
    # Dark and light are told by the patch tokenizer's means alone.
    near = evaluate("knn", world / "patch", manifest, tmp_path / "b", "--label", "background", "--k", "3")
    assert near.figures() == {"latent": 1.0}
    apart = ("--label", "objects.0.color", "--test", manifest)
    given = evaluate("linear-probe", world / "patch", manifest, tmp_path / "c", *apart)
    assert given.value["clips"] == CLIPS


def test_labels_are_fields_of_the_manifest(world: Path) -> None:
    clips = open_set(world / "world/manifest.jsonl")
    (first, *_) = clips.entries
    assert label_of(first, "objects.0.shape") in WORLD.shapes
    with pytest.raises(UserError, match="has no field group; extra fields of it: objects, background"):
        label_of(first, "group")
    with pytest.raises(UserError, match="a label is one word"):
        label_of(first, "objects")
    with pytest.raises(UserError, match=r"no clip of it can be judged; manifest\.jsonl train-000000: has no"):
        labels(clips, "group")


def test_a_share_is_set_aside_once_for_all(world: Path) -> None:
    train, test = set_aside(open_set(world / "world/manifest.jsonl"), 0.25, 0)
    assert (len(train.entries), len(test.entries)) == (9, 3)
    assert not {e.id for e in train.entries} & {e.id for e in test.entries}
    again, _ = set_aside(open_set(world / "world/manifest.jsonl"), 0.25, 0)
    assert [e.id for e in again.entries] == [e.id for e in train.entries]


def test_clips_whose_class_was_never_shown_are_listed(world: Path, tmp_path: Path) -> None:
    entries, _ = read_manifest(world / "world/manifest.jsonl")
    color = {e.id: e.attributes["objects"][0]["color"] for e in entries}
    gone = color[entries[0].id]
    write_manifest(tmp_path / "train.jsonl", [e for e in entries if color[e.id] != gone])
    label = ("--label", "objects.0.color", "--k", "2", "--test", world / "world/manifest.jsonl")
    answer = evaluate("knn", world / "patch", tmp_path / "train.jsonl", tmp_path / "out", *label)
    hidden = sum(c == gone for c in color.values())
    assert answer.value["clips"] == CLIPS - hidden
    assert all(f"no training clip is '{gone}'" in line for line in answer.value["skipped_clips"])
    assert len(answer.value["skipped_clips"]) == hidden


# Tables


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "lance"])
def test_features_are_a_table_of_ids_and_vectors(world: Path, tmp_path: Path, suffix: str) -> None:
    table = tmp_path / f"vectors.{suffix}"
    manifest = ("--manifest", world / "world/manifest.jsonl", "--out", table, "--json")
    value = Answer("features", world / "vtp", *manifest).value
    assert (value["clips"], value["numbers"], value["view"]) == (CLIPS, 16, "clip")
    rows = read_rows(table)
    assert [row["id"] for row in rows] == [f"train-{n:06d}" for n in range(CLIPS)]
    lengths = [np.linalg.norm(row["vector"]) for row in rows]
    assert lengths == pytest.approx([1.0] * CLIPS, abs=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == [table.name]
    assert Answer("features", world / "vtp", *manifest).refused("is there already")


def read_rows(table: Path) -> list[dict[str, Any]]:
    if table.suffix == ".jsonl":
        return [json.loads(line) for line in table.read_text().splitlines()]
    if table.suffix == ".parquet":
        read = pq.read_table(table)
        assert read.schema.metadata[b"view"] == b"clip"
        return list(read.to_pylist())
    import lance

    return list(lance.dataset(str(table)).to_table().to_pylist())


def test_vectors_are_those_of_the_model(world: Path, tmp_path: Path) -> None:
    """Of a clip of one frame they are what the released models' own method gives."""
    manifest = ("--manifest", world / "world/manifest.jsonl", "--frames", "1")
    Answer("features", world / "vtp", *manifest, "--out", tmp_path / "v.jsonl")
    model = VTPModel.from_pretrained(world / "vtp")
    entries, _ = read_manifest(world / "world/manifest.jsonl")
    frame = torch.from_numpy(read_clip(entries[2].path, frames=1).video_FHW3).permute(0, 3, 1, 2) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    image = (frame - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        expected = model.get_clip_image_feature(image)[0].tolist()
    assert read_rows(tmp_path / "v.jsonl")[2]["vector"] == pytest.approx(expected, abs=1e-4)


# Generation


def test_generation_is_judged_beside_the_floor(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = toy_model(
        tokenizer={"latent_f": 8, "latent_t": 4, "latent_d": 8}, video={"height": 32, "width": 32}
    )
    monkeypatch.setattr(assemble, "open_model", lambda *_, **__: model)
    wish = ("--clips", "5", "--extractor", "color-histogram", "--world", "quickstart", "--steps", "1")
    answer = evaluate("generation", Path("run"), world / "world/manifest.jsonl", tmp_path / "out", *wish)
    (report,) = answer.value["reports"]
    made, floor = report["distances"]
    assert (made["clips"], floor["clips"], answer.value["real"]) == (5, 5, 10)
    assert made["fid"] > 5 * floor["fid"]
    assert answer.figures()["oracle: all, real clips"] == 1
    assert answer.figures()["oracle: all"] < 1
    assert len({clip["clip"] for clip in report["clips"]}) == 5
    assert Path(answer.value["sheet"]).is_file()


# Refused


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("reconstruction", "patch", "--world", "mars"), "--world mars: choose full"),
        (("reconstruction", "patch", "--extractor", "vit"), "encoder vit: choose"),
        (("reconstruction", "patch", "--lpips", "squeeze"), "--lpips squeeze: choose vgg"),
        (("reconstruction", "patch", "--size", "tiny"), "size: tiny: write one side"),
        (("reconstruction", "world"), "no tokenizer here"),
        (("zero-shot", "patch"), "this tokenizer reads no texts"),
        (("zero-shot", "vtp", "--world", "quickstart", "--classes", "x"), "leave out --classes"),
        (("retrieval", "patch"), "this tokenizer reads no texts"),
        (("linear-probe", "patch", "--label", "group"), "has no field group"),
        (("knn", "patch", "--label", "background"), "--k 20: there are only 9 training clips"),
        (("knn", "patch", "--label", "objects.0.size", "--share", "0.01"), "of 12 clips a share of 0.01"),
        (("knn", "patch", "--label", "x", "--share", "0.5", "--test", "x"), "leave out one of them"),
        (
            ("linear-probe", "patch", "--label", "x", "--share", "0.25", "--test", "x"),
            "leave out one of them",
        ),
        (("reconstruction", "patch", "--fps", "inf"), "--fps inf: say frames a second"),
        (("knn", "patch", "--label", "background", "--fps", "1e12"), "--fps 1e+12: say frames a second"),
    ],
)
def test_mistakes_end_in_one_line(world: Path, tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    kind, tokenizer, *more = arguments
    plainly = ("--lpips", "none", "--extractor", "none") if kind == "reconstruction" else ()
    answer = evaluate(
        kind, world / tokenizer, world / "world/manifest.jsonl", tmp_path / "out", *plainly, *more
    )
    assert answer.refused(said), answer.err
    assert not (tmp_path / "out" / "evaluated.json").exists()


def test_what_no_clip_is_needed_for_is_told_before_any_is_coded(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def coded(*_: Any) -> None:
        raise AssertionError("a clip was coded")

    for kind in (PatchTokenizer, VtpTokenizer):
        monkeypatch.setattr(kind, "encode", coded)
    manifest, file = world / "world/manifest.jsonl", tmp_path / "file"
    file.write_text("")
    for judged in ("zero-shot", "retrieval"):
        assert evaluate(judged, world / "patch", manifest, tmp_path / judged).refused("reads no texts")
    for out in (file, file / "within"):
        answer = evaluate("reconstruction", world / "patch", manifest, out, *plain())
        assert answer.refused(f"{file} is a file; name another folder"), answer.err
        assert evaluate("retrieval", world / "vtp", manifest, out).refused("is a file")
    table = ("features", world / "vtp", "--manifest", manifest, "--out")
    assert Answer(*table, tmp_path / "v.jsonl", "--view", "bogus").refused(
        "has no view bogus, only latent, cls, patch, clip"
    )
    assert Answer(*table, file / "v.jsonl").refused("is a file")
    assert Answer(*table, tmp_path / "v.jsonl", "--fps", "inf").refused("--fps inf: say frames a second")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_one_class_and_other_mistakes_of_tables(world: Path, tmp_path: Path) -> None:
    manifest = world / "world/manifest.jsonl"
    entries, _ = read_manifest(manifest)
    dark = [e for e in entries if e.attributes["background"] == "dark"]
    write_manifest(tmp_path / "dark.jsonl", dark)
    label = ("--label", "background", "--test", manifest)
    one = evaluate("linear-probe", world / "patch", tmp_path / "dark.jsonl", tmp_path / "out", *label)
    assert one.refused("one class ('dark')")
    table = ("features", world / "patch", "--manifest", manifest, "--out")
    assert Answer(*table, tmp_path / "v.csv").refused("cannot write .csv; name it .parquet")
    assert Answer(*table, tmp_path / "v.jsonl").refused("has no view clip, only latent")
    assert Answer(*table, tmp_path / "w.jsonl", "--view", "latent").code == 0
    assert Answer(*table[:3], tmp_path / "none.jsonl", "--out", tmp_path / "x.jsonl").refused("is not a file")


def test_without_its_wheel_a_network_is_left_out_and_told(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import motionloom.cli.eval as command

    def missing(name: str) -> Any:
        raise UserError(f"{name} is not installed; pip install it")

    monkeypatch.setattr(command, "_extractor", missing)
    monkeypatch.setattr(command, "open_perceptual", missing)
    manifest = world / "world/manifest.jsonl"
    answer = evaluate("reconstruction", world / "patch", manifest, tmp_path / "out")
    assert answer.value["left_out"].keys() == {"rFID and KID", "lpips"}
    assert "left out: lpips; auto is not installed" in answer.err
    assert "lpips" not in answer.figures()
    assert "distances" not in answer.value["reports"][0]
