"""The command line: every example in the help runs, answers are JSON, and mistakes end in one clear line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import motionloom.cli.console as console
from cached import make_clip
from motionloom.backbones import FAMILIES, build_backbone
from motionloom.backbones.families import as_original
from motionloom.backbones.weights import Sink, Weights, write_folder
from motionloom.cli.main import main
from motionloom.config import packaged_recipes
from motionloom.config.recipe import ModelConfig
from motionloom.rng import numpy_rng
from motionloom.tokenizers.vtp import VTPConfig, VTPModel, VtpTokenizer, Words

COMMANDS = (
    "data shapeworld",
    "data ingest",
    "data join",
    "cache",
    "train",
    "pairs",
    "quickstart",
    "generate",
    "stream",
    "inspect",
    "doctor",
    "convert",
    "judge",
    "judge stream",
    "eval reconstruction",
    "eval zero-shot",
    "eval linear-probe",
    "eval knn",
    "eval retrieval",
    "eval generation",
    "features",
    "scale",
)
"""In the order in which their examples build on one another."""

TINY = (
    *("model.dim=16", "model.depth=1", "model.num_heads=2"),
    *("text_encoder.dim=8", "text_encoder.vocab_size=256"),
    *("train.batch_size=4", "train.warmup_steps=0", "train.sample_num_steps=2"),
    *("train.precision=fp32", "train.compile=false"),
)
SMALLER = {
    "data shapeworld": ["--clips", "20", "--world", "quickstart"],
    "train": [*TINY, "train.max_steps=3"],
    "pairs": ["distil.grid_steps=4", "--clips", "5"],
    "quickstart": ["--minutes", "0.02", "--no-open", "--out", "runs/quickstart", *TINY],
    "generate": ["--steps", "2"],
    "stream": ["--seconds", "1", "--steps", "1"],
    "eval reconstruction": ["--clips", "4", "--extractor", "color-histogram", "--lpips", "none"],
    "eval zero-shot": ["--clips", "4"],
    "eval generation": ["--clips", "3", "--steps", "1", "--extractor", "color-histogram"],
    "scale": ["--dry-run"],
}
"""What makes the examples quick: a later option wins over an earlier one."""
TINY_TOWER = {"embed_dim": 32, "depth": 1, "num_heads": 2}
BEFORE = {
    "stream": (
        *("train", "causal", "--cache", "caches/small", "experiment_name=stream"),
        *("video.num_frames=16", *TINY, "train.max_steps=1"),
    ),
}
"""What an example needs besides those before it."""


@dataclass
class Answer:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def value(self) -> dict[str, Any]:
        """The one JSON object on stdout."""
        value = json.loads(self.out)
        assert isinstance(value, dict)
        assert self.out.count("\n") == 1
        return value


def call(*arguments: str) -> Answer:
    """The command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = ["motionloom", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
        code: Any = 0
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = before
    return Answer(code, out.getvalue(), err.getvalue())


def help_text(command: str) -> str:
    answer = call(*command.split(), "--help")
    assert answer.code == 0
    return answer.out


def example(command: str) -> list[str]:
    """The arguments of the example in a command's help."""
    text = help_text(command)
    found = " ".join(text[text.index("Example: motionloom ") :].split())
    return shlex.split(found.removeprefix("Example: motionloom "))


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Answer]]:
    """A folder in which every example was run, and what each answered."""
    folder = tmp_path_factory.mktemp("workshop")
    before = Path.cwd()
    os.chdir(folder)
    try:
        for i, name in enumerate(("a red ball", "two_cats", "waves", "green-hill")):
            make_clip(Path("my_clips") / f"{name}.mp4", i, frames=20, height=40, width=48)
        Path("my_clips/broken.mp4").write_bytes(b"not a video")
        Image.fromarray(numpy_rng("cli").integers(0, 256, (30, 40, 3), "uint8")).save("my_clips/a still.png")
        tiny_wan(Path(example("convert")[1]))
        tiny_vtp(Path(example("features")[1]))
        tiny_study(Path(example("scale")[1]), example("cache")[3])
        yield {c: tried(c) for c in COMMANDS}
    finally:
        os.chdir(before)


def tried(command: str) -> Answer:
    """What the example answers."""
    if command in BEFORE:
        assert call(*BEFORE[command]).code == 0
    return call(*example(command), *SMALLER.get(command, []), "--json")


def tiny_wan(folder: Path) -> None:
    """Weights as Wan's authors name them."""
    wan = FAMILIES["wan"]
    config = ModelConfig(type="wan", preset="tiny", patch=(1, 2, 2))
    state = build_backbone(config, 16, 32).state_dict()
    weights = as_original(Weights.of_tensors("tiny", state), wan)
    write_folder(folder, Sink.of(weights), None)


def tiny_vtp(folder: Path) -> None:
    """A visual tokenizer that reads words, as nobody trained it."""
    words = Words.learned(["a small red star moves up on a dark background"], 40, 300)
    sizes = {f"{tower}_{name}": n for tower in ("vision", "decoder") for name, n in TINY_TOWER.items()}
    text = {"text_embed_dim": 16, "text_num_heads": 2, "text_depth": 1, "text_context_length": 40}
    config = VTPConfig(
        vision_patch_size=8, vision_feature_bottleneck=6, text_vocab_size=words.size, **sizes, **text
    )
    model = VTPModel(config)
    model.init_weights(0)
    words.save(folder)
    noise = numpy_rng("vtp clips").integers(0, 256, (2, 4, 32, 32, 3), "uint8")
    VtpTokenizer.measured(model, list(torch.from_numpy(noise)), words=folder).save(folder)


def tiny_study(file: Path, manifest: str) -> None:
    """One point on the clips that the first example makes."""
    train = "train: {batch_size: 2, compile: false, precision: fp32}"
    file.write_text(
        f"tokenizer: vtp_shapeworld\ntrain: {manifest}\ntest: {manifest}\n"
        f"both: {{video.num_frames: 13, {train}}}\nfor_tokenizer: [vtp.width=24, vtp.depth=1]\n"
    )


# Every command


def test_the_help_lists_every_command() -> None:
    text = call("--help").out
    assert all(command.split()[0] in text for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_fits_a_terminal(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    text = help_text(command)
    assert max(map(len, text.splitlines())) <= 80
    assert "--json" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_example_works(workshop: dict[str, Answer], command: str) -> None:
    answer = workshop[command]
    assert answer.code == 0, answer.err
    assert "error" not in answer.value
    assert "Traceback" not in answer.err


@pytest.mark.parametrize("command", ["data shapeworld", "cache", "quickstart", "generate", "convert"])
def test_long_work_tells_its_rate_and_the_time_left(workshop: dict[str, Answer], command: str) -> None:
    lines = re.findall(r".+: (\d+) of (\d+), (\S+)/s(.*)", workshop[command].err)
    assert lines
    for done, total, rate, ends in lines:
        assert float(rate) > 0
        assert ends.endswith("left") == (done != total)


def test_shapeworld_answers_with_its_manifest(workshop: dict[str, Answer]) -> None:
    value = workshop["data shapeworld"].value
    assert value == {"manifest": "worlds/small/manifest.jsonl", "clips": 20}
    assert len(Path(value["manifest"]).read_text().splitlines()) == 20


def test_join_lists_a_set_as_often_as_asked(workshop: dict[str, Answer]) -> None:
    found, listed = (len(Path(f).read_text().splitlines()) for f in ("manifest.jsonl", "both.jsonl"))
    assert workshop["data join"].value["clips"] == listed == 20 + 3 * found
    again = call("data", "join", "manifest.jsonl", "--out", "both.jsonl")
    assert again.code == 2
    assert "both.jsonl: is there already" in again.err


def test_ingest_takes_captions_from_file_names_and_lists_what_it_skips(workshop: dict[str, Answer]) -> None:
    value = workshop["data ingest"].value
    lines = [json.loads(line) for line in Path(value["manifest"]).read_text().splitlines()]
    captions = {line["caption"] for line in lines}
    assert captions == {"a red ball", "two cats", "waves", "green hill", "a still"}
    assert len(value["skipped_clips"]) == 1
    assert "broken" in value["skipped_clips"][0]


def test_a_cache_is_continued(workshop: dict[str, Answer]) -> None:
    first = workshop["cache"].value
    assert (first["encoded"], first["kept"], first["skipped"], first["clips"]) == (20, 0, 0, 20)
    again = call(*example("cache"), "--json").value
    assert (again["encoded"], again["kept"]) == (0, 20)


def test_pairs_are_a_cache_that_trains(workshop: dict[str, Answer]) -> None:
    value = workshop["pairs"].value
    assert (value["made"], value["kept"], value["skipped"], value["clips"]) == (5, 0, 0, 5)
    assert value["levels"] == pytest.approx([1, 15 / 16, 5 / 6, 5 / 8])
    more = call(*example("pairs"), *SMALLER["pairs"], "--worker", "1/1", "--json", "--clips", "7").value
    assert (more["made"], more["kept"], more["clips"]) == (2, 5, 7)
    run = ("train", "quickstart", "--cache", "caches/pairs", "experiment_name=on_pairs", "--json")
    assert call(*run, *TINY, "train.max_steps=1").value["step"] == 1
    nameless = call("pairs", "quickstart", "--cache", "caches/small", "--out", "caches/other")
    assert (nameless.code, "distil.teacher is empty: name a run" in nameless.err) == (2, True)
    beside = call(*example("pairs"), "distil.grid_steps=6")
    assert (beside.code, "do not lie on the teacher's grid" in beside.err) == (2, True)


def test_a_run_is_written_with_its_provenance(workshop: dict[str, Answer]) -> None:
    value = workshop["train"].value
    assert (value["step"], value["reason"], value["run"]) == (3, "done", "runs/mine")
    run = Path(value["run"])
    assert Path(value["checkpoint"]) == run / "checkpoints" / "step_00000003"
    assert "max_steps: 3" in (run / "recipe.yaml").read_text()
    assert json.loads((run / "provenance.json").read_text())[0]["packages"]["torch"]
    assert "bucket 32x32x16" in workshop["train"].err


def test_a_run_is_resumed_and_previews_are_made(workshop: dict[str, Answer]) -> None:
    more = (
        "--resume",
        "--json",
        "train.max_steps=4",
        "train.sample_every_steps=4",
        "train.sample_num_images=2",
    )
    answer = call(*example("train"), *TINY, *more)
    assert answer.value["step"] == 4
    assert "resumed from" in answer.err
    names = sorted(file.name for file in Path("runs/mine/samples").iterdir())
    assert names == ["step_00000004_ema.png", "step_00000004_raw.png"]
    assert len(json.loads(Path("runs/mine/provenance.json").read_text())) == 2


def test_generate_says_what_a_size_beyond_the_trained_one_means(workshop: dict[str, Answer]) -> None:
    small = call("generate", "runs/mine", "--prompt", "red", "--steps", "1", "--out", "as_trained")
    large = call("generate", "runs/mine", "--prompt", "red", "--steps", "1", "--size", "64", "--out", "large")
    assert (small.code, large.code) == (0, 0)
    assert "tokens a clip" not in small.err
    assert "tokens a clip; this model was trained at 32x32x" in large.err
    assert "more than 4 times" in large.err


def test_generate_writes_a_file_for_every_prompt_and_a_sheet(workshop: dict[str, Answer]) -> None:
    value = workshop["generate"].value
    assert value["clips"] == ["clips/000_a_small_red_star_moves_up.mp4"]
    assert Path(value["sheet"]).is_file()
    several = ("--prompt", "one", "--prompt", "", "--steps", "1", "--format", "webp", "--size", "32x48")
    made = call("generate", "runs/mine", *several, "--frames", "8", "--seed", "5", "--out", "more", "--json")
    assert made.value["clips"] == ["more/000_one.webp", "more/001_empty.webp"]
    with Image.open("more/000_one.webp") as picture:
        assert (picture.size, picture.n_frames) == ((48, 32), 8)
    raw = ("--raw", "--guidance", "1", "--solver", "heun", "--negative", "blue", "--format", "png")
    assert call("generate", "runs/mine", *several, *raw, "--out", "raw").code == 0


def test_inspect_looks_at_recipes_caches_and_checkpoints(workshop: dict[str, Answer]) -> None:
    cache = workshop["inspect"].value
    assert (cache["kind"], cache["clips"], cache["problems"]) == ("cache", 20, [])
    with Image.open(cache["sheet"]) as sheet:
        assert sheet.height > 10 * 96
    recipe = call("inspect", "quickstart", "model.depth=2", "--json").value
    assert (recipe["kind"], recipe["buckets"][0]["tokens"]) == ("recipe", 64)
    assert recipe["parameters"]["total"] > 1_000_000
    checkpoint = call("inspect", "runs/mine", "--json").value
    assert checkpoint["kind"] == "checkpoint"
    text = call("inspect", "runs/mine").out
    assert f"step             {checkpoint['step']}" in text
    assert "32x32x16" in text


def test_doctor_says_what_is_wrong_with_exit_code_1(workshop: dict[str, Answer]) -> None:
    assert workshop["doctor"].value["ok"] is True
    stale = call("doctor", "quickstart", "video.fps=4", *TINY, "--cache", "caches/small", "--json")
    assert (stale.code, stale.value["ok"]) == (1, False)
    assert [f["check"] for f in stale.value["findings"] if f["status"] == "wrong"] == ["cache"]
    text = call("doctor", "quickstart", "video.fps=4", *TINY, "--cache", "caches/small")
    assert text.code == 1
    assert (
        "WRONG   cache: made otherwise: video.fps is 8.0 in the cache and 4.0 in the recipe; make it"
        in text.out
    )
    assert text.out.splitlines()[-1].startswith("1 wrong, ")


def test_doctor_examines_checkpoints(workshop: dict[str, Answer]) -> None:
    assert call("doctor", "runs/mine", "--cache", "caches/small", "--json").code == 0
    # Another cache of the same recipe has a tokenizer of its own.
    call("data", "shapeworld", "--out", "worlds/other", "--clips", "17", "--size", "32", "--json")
    call("cache", "quickstart", "--manifest", "worlds/other/manifest.jsonl", "--out", "caches/other")
    other = call("doctor", "runs/mine", "--cache", "caches/other", "--json")
    assert other.code == 1
    assert "the tokenizer is" in str(other.value["findings"])


def test_stream_leaves_a_film_as_long_as_asked(workshop: dict[str, Answer]) -> None:
    value = workshop["stream"].value
    assert (value["out"], value["ended"], value["seconds"], value["frames"]) == ("film.mp4", "done", 1, 8)
    chunks = [json.loads(line) for line in workshop["stream"].err.splitlines() if line.startswith("{")]
    assert [chunk["chunk"] for chunk in chunks] == list(range(value["chunks"]))
    assert chunks[-1]["seconds"] == 1
    assert Path("film.mp4").is_file()


def test_judge_stream_leaves_figures_a_page_a_sheet_and_the_films(workshop: dict[str, Answer]) -> None:
    value = workshop["judge stream"].value
    assert [report["kind"] for report in value["reports"]] == ["drift", "latency"]
    assert (value["roll_outs"], value["skipped"]) == (1, [])
    assert json.loads(Path("judged/judged.json").read_text())["reports"] == value["reports"]
    html = Path(value["page"]).read_text()
    shown = re.findall(r'<img src="([^"]+)"', html)
    assert shown
    assert all((Path("judged") / file).is_file() for file in shown)
    assert "Looks" in html
    assert "Time of a chunk" in html
    # Its films are clips as any others: what can be said without having seen them made.
    again = call("judge", "stream", value["films"], "--window", "16", "--out", "again", "--vbench", "--json")
    assert again.code == 0, again.err
    kinds = {report["kind"]: report for report in again.value["reports"]}
    assert set(kinds) == {"drift", "vbench-style"}
    assert kinds["vbench-style"]["left_out"]["imaging quality"] == "needs MUSIQ"
    assert call("judge", value["films"], "--kind", "vbench", "--json").code == 0


def test_judge_stream_compares_with_a_teacher_and_asks_the_oracle(workshop: dict[str, Answer]) -> None:
    wish = ("--world", "endless", "--clips", "2", "--seeds", "0,1", "--seconds", "2", "--out", "compared")
    teacher = ("--teacher", "runs/mine", "--teacher-steps", "2", "--json")
    answer = call("judge", "stream", "runs/stream", *wish, *teacher)
    assert answer.code == 0, answer.err
    reports = {report["kind"]: report for report in answer.value["reports"]}
    assert set(reports) == {"drift", "latency", "likeness"}
    assert len(reports["likeness"]["clips"]) == 4
    assert "first window: all" in {figure["name"] for figure in reports["drift"]["figures"]}
    assert "adherence gap" in {figure["name"] for figure in reports["likeness"]["figures"]}
    assert {clip["clip"] for clip in reports["drift"]["clips"]} == {"000", "001", "002", "003"}


def test_judge_stream_changes_the_words_on_the_way(workshop: dict[str, Answer]) -> None:
    wish = ("--world", "endless", "--clips", "2", "--seconds", "7", "--switch", "3", "--recache")
    answer = call("judge", "stream", "runs/stream", *wish, "--out", "switched", "--json")
    assert answer.code == 0, answer.err
    report = next(report for report in answer.value["reports"] if report["kind"] == "switch")
    assert [row["clip"] for row in report["clips"]] == ["000.0", "001.0"]
    assert {"all, before", "all, 2 chunks on"} <= {figure["name"] for figure in report["figures"]}
    said = json.loads(Path("switched/films/clips.json").read_text())
    assert [one["switches"] for one in said] == [[[24, said[1]["prompt"]]], [[24, said[0]["prompt"]]]]


def test_a_roll_out_that_turns_to_nan_is_listed_and_the_others_are_judged(
    workshop: dict[str, Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    from motionloom.generate import Stream

    usual = Stream.next

    def next_piece(stream: Stream) -> Any:
        if stream.prompt == "two" and stream.chunk == 2:
            raise FloatingPointError("the network gave numbers that are none in chunk 2")
        return usual(stream)

    monkeypatch.setattr(Stream, "next", next_piece)
    wish = ("--prompt", "one", "--prompt", "two", "--prompt", "three", "--seconds", "2")
    answer = call("judge", "stream", "runs/stream", *wish, "--out", "some_nan", "--json")
    assert answer.code == 0
    assert (answer.value["roll_outs"], len(answer.value["skipped"])) == (2, 1)
    assert answer.value["skipped"][0].startswith("001 (two, seed 0): the network gave numbers that are none")
    assert answer.err.splitlines()[-1] == "1 skipped"
    alone = call("judge", "stream", "runs/stream", "--prompt", "two", "--seconds", "2", "--out", "all_nan")
    assert (alone.code, "no roll-out came to its end; 000 (two" in alone.err) == (2, True)


def test_a_first_frame_is_given_on_the_command_line(workshop: dict[str, Answer]) -> None:
    call("data", "shapeworld", "--out", "worlds/17", "--clips", "12", "--frames", "17", "--size", "32")
    call("cache", "first_frame", "--manifest", "worlds/17/manifest.jsonl", "--out", "caches/17")
    train = ("first_frame", "--cache", "caches/17", *TINY, "train.max_steps=1")
    assert call("train", *train).code == 0
    Image.new("RGB", (90, 90), (226, 50, 48)).save("red.png")
    given = ("--image", "red.png", "--steps", "2", "--format", "webp", "--out", "given", "--json")
    answer = call("generate", "runs/first_frame", "--prompt", "red", *given)
    assert answer.code == 0, answer.err
    with Image.open(answer.value["clips"][0]) as clip:
        assert clip.n_frames == 17
        mean = [
            sum(v * n for v, n in enumerate(band.histogram())) / 32**2 for band in clip.convert("RGB").split()
        ]
    assert mean == pytest.approx([226, 50, 48], abs=12)


# The main job


def test_the_quickstart_on_own_clips(workshop: dict[str, Answer]) -> None:
    report = workshop["quickstart"].value
    assert report["ingest"]["clips"] == 5
    assert report["ingest"]["skipped"] == 1
    assert report["train"]["steps"] >= 1
    assert set(report["heldout_loss"]) == {"first", "lowest", "last"}
    assert report == json.loads(Path("runs/quickstart/report.json").read_text()) | {"page": report["page"]}
    html = Path(report["page"]).read_text()
    shown = re.findall(r'<img src="([^"]+)"', html)
    assert shown
    assert all((Path("runs/quickstart") / file).is_file() for file in shown), (
        "each sample and its nearest clip"
    )
    assert "the captions of held-out clips" in html


def test_the_quickstart_on_shapeworld(workshop: dict[str, Answer]) -> None:
    small = ("--minutes", "0.02", "--clips", "20", "--prompts", "3", "--out", "runs/world", *TINY)
    answer = call("quickstart", *small, "video.num_frames=13", "--json")
    report = answer.value
    assert answer.code == 0, answer.err
    assert set(report["prompt_adherence"]) == {"color", "shape", "motion", "all"}
    assert "3 prompts of held-out combinations" in report["protocol"]
    assert report["after_the_tokenizer_alone"]["shape"] > 0.9
    assert report["unseen_by_the_tokenizer_too"]["prompts"] == 3
    stages = {"world", "cache", "calibrate", "train", "generate", "judge", "pictures"}
    assert set(report["seconds"]) == {*stages, "all"}
    assert report["seconds"]["all"] == pytest.approx(sum(report["seconds"][s] for s in stages), abs=0.1)
    # A second call goes on with the first one's recipe: nothing is made twice, and the time spent adds up.
    again = call("quickstart", *small, "--json")
    assert "going on from step_" in again.err
    assert "video.num_frames" not in (again.out + again.err)
    assert again.value["clips"] == {"cached": 20, "skipped": 0}
    assert again.value["seconds"]["train"] >= report["seconds"]["train"]
    assert again.value["seconds"]["calibrate"] == report["seconds"]["calibrate"]
    # A path that was a slip does not keep a folder from the right one.
    assert call("quickstart", "--data", "nowhere", "--out", "runs/slip", *TINY).code == 2
    assert not Path("runs/slip/clips.txt").exists()
    # Other clips are none of its business, and are refused before anything in it changes.
    before = {path: path.read_bytes() for path in Path("runs/world").rglob("*") if path.is_file()}
    other = call("quickstart", "--data", "my_clips", *small)
    assert other.code == 2
    assert "error: runs/world: holds a run on ShapeWorld, not on " in other.err
    assert before == {path: path.read_bytes() for path in Path("runs/world").rglob("*") if path.is_file()}


def test_the_quickstart_on_a_single_image(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    Image.new("RGB", (70, 50), (200, 30, 30)).save(tmp_path / "one" / "a red wall.png")
    run = tmp_path / "runs" / "7"
    tiny = ("--minutes", "0.02", "--no-open", *TINY)
    answer = call("quickstart", "--data", str(tmp_path / "one"), "--out", str(run), *tiny)
    assert answer.code == 0, answer.err
    assert answer.out.splitlines()[-1] == f"the page: {run}/index.html"
    assert "steps; ingest" in answer.out
    assert "a red wall" in (run / "index.html").read_text()


# Mistakes


@pytest.fixture(scope="module")
def mistakes(workshop: dict[str, Answer]) -> None:
    """Things to stumble over, in the workshop's folder."""
    Path("empty").mkdir()
    Path("a_file").write_text("hello")
    Path("blank.txt").write_text("\n \n")
    Image.new("RGB", (90, 90), (226, 50, 48)).save("red.png")
    Path("foreign.pt").write_bytes(pickle.dumps({"weights": [1, 2]}))
    Path("foreign").mkdir()
    Path("foreign/things.txt").write_text("mine")


MISTAKES = [
    ("train nosuch", "nosuch: no such recipe file"),
    ("train quikstart", "did you mean quickstart?"),
    ("train quickstart train.learning_rate=1", "did you mean train.lr?"),
    ("train quickstart train.lr=fast", "expected a number above 0"),
    ("train quickstart model", "write key=value"),
    ("train quickstart --cache nowhere", "nowhere: no such folder"),
    ("train quickstart --cache empty", "empty: is not a cache"),
    ("train quickstart video.fps=4 --cache caches/small", "video.fps is 8.0 in the cache"),
    (f"train quickstart --cache caches/small experiment_name=mine {' '.join(TINY)}", "--resume"),
    ("cache quickstart --manifest nowhere.jsonl --out x", "nowhere.jsonl"),
    ("cache quickstart --manifest worlds/small/manifest.jsonl --out foreign", "is not a cache and not empty"),
    ("cache clips --manifest worlds/small/manifest.jsonl --out caches/small", "was made otherwise"),
    ("cache quickstart --manifest worlds/small/manifest.jsonl --out a_file", "a_file: is a file"),
    ("data shapeworld --out worlds/small --seed 9", "another world, seed or quality"),
    ("data shapeworld --out x --frames 2", "motions need at least 4"),
    ("data shapeworld --out x --world round", "choose full, quickstart, modes"),
    ("data shapeworld --out x --split half", "choose train, test or all"),
    ("data shapeworld --out a_file/x", "a_file"),
    ("data ingest nowhere --out else.jsonl", "nowhere"),
    ("data ingest empty --out x.jsonl", "no clip of it can be used"),
    ("data ingest my_clips --keep animals --out x.jsonl", "write attribute=value"),
    ("generate nowhere --prompt a --out x", "nowhere: no such checkpoint"),
    ("generate empty --prompt a --out x", "empty holds no whole checkpoint"),
    ("generate foreign.pt --prompt a --out x", "foreign.pt"),
    ("generate runs/mine --prompt a --out a_file", "a_file: cannot be made"),
    ("generate runs/mine --prompt a --out x --size wide", "for instance 64x96"),
    ("generate runs/mine --prompt a --out x --size 33", "use 32 or 40"),
    ("generate runs/mine --prompt a --out x --frames 7", "use 4 or 8"),
    ("generate runs/mine --prompt a --out x --format avi", "expected mp4, webm"),
    ("generate runs/mine --prompt a --out x --solver magic", "expected euler, heun"),
    ("generate runs/mine --prompt a --out x --device nosuch", "--device nosuch: cannot be used here"),
    ("generate runs/mine --prompt a --out x --image nowhere.png", "nowhere.png"),
    ("stream runs/mine --prompt a --out x.mp4", "makes a clip whole and cannot stream"),
    ("stream empty --prompt a --out x.mp4", "empty holds no whole checkpoint"),
    ("stream runs/stream --prompt a", "say where to: --out FILE.mp4, --out - for a pipe, or --serve"),
    ("stream runs/stream --out x.mp4", "--prompt is missing"),
    ("stream runs/stream --prompt a --out film.mp4", "film.mp4: is there already"),
    ("stream runs/stream --prompt a --out x.gif", "films that grow are mp4; name it x.mp4"),
    ("stream runs/stream --prompt a --out x.mp4 --format rgb24", "--format rgb24 is for a pipe"),
    ("stream runs/stream --prompt a --out x.mp4 --size 33", "use 32 or 40"),
    ("stream runs/stream --prompt a --out x.mp4 --size wide", "for instance 64x96"),
    ("stream runs/stream --prompt a --out x.mp4 --image nowhere.png", "nowhere.png: does not exist"),
    ("stream runs/stream --prompt a --out x.mp4 --video red.png", "is a still, and --video is a film"),
    ("inspect empty", "empty holds no whole checkpoint"),
    ("inspect runs/mine model.depth=2", "key=value is for recipes"),
    ("inspect foreign.pt", "foreign.pt"),
    ("doctor runs/mine model.depth=2", "key=value is for recipes"),
    ("doctor nosuch", "nosuch: no such recipe, cache or checkpoint"),
    ("quickstart --data empty --out runs/x", "no clip of it can be used"),
    ("quickstart --out a_file/x", "a_file/x: cannot be made"),
    ("quickstart --out runs/x model.heads=3", "did you mean model.num_heads?"),
    ("generate runs/mine --out x", "--prompt"),
    ("cache quickstart --out x", "--manifest"),
    ("generate runs/mine --prompt a --out x --steps 0", "--steps"),
    ("train quickstart --nosuch", "--nosuch"),
    ("convert nowhere x", "nowhere: no such file or folder of weights"),
    ("convert empty x", "empty holds no .safetensors file"),
    ("convert foreign.pt x", "foreign.pt is no file of torch.save"),
    ("convert runs/mine x", "holds a joint, which diffusers does not know"),
    ("convert Wan2.1-T2V-1.3B a_file", "a_file is there already and is not overwritten"),
    ("convert Wan2.1-T2V-1.3B x --to onnx", "choose one of diffusers, original"),
    ("convert Wan2.1-T2V-1.3B x --dtype fp8", "choose one of keep, fp32, bf16"),
    ("convert Wan2.1-T2V-1.3B x --family vae", "choose one of wan, cogvideox, ltx2, lightning"),
    ("convert Wan2.1-T2V-1.3B x --family ltx2", "holds weights of wan, not of ltx2"),
    ("convert Wan2.1-T2V-1.3B x --preset tiny", "say --family as well"),
    ("convert Wan2.1-T2V-1.3B x --shard-size big", "for instance 5GB or 800MB"),
    ("convert Wan2.1-T2V-1.3B x --raw", "is no checkpoint of motionloom"),
    ("judge", "CLIPS"),
    ("judge nowhere", "nowhere: no such folder"),
    ("judge stream runs/stream --out x", "say --prompt, --prompts FILE, or --world"),
    ("judge stream runs/stream --prompt a --out x --seeds 1,1", "write different numbers"),
    ("judge stream runs/stream --prompt a --out x --seeds one", "write different numbers"),
    ("judge stream runs/stream --prompt a --out x --world round", "--world round: choose full"),
    ("judge stream runs/stream --prompts nowhere.txt --out x", "nowhere.txt: cannot be read"),
    ("judge stream runs/stream --prompts blank.txt --out x", "blank.txt: holds no prompt"),
    ("judge stream runs/stream --prompt a --out x --size wide", "for instance 64x96"),
    ("judge stream runs/stream --prompt a --out x --size 33", "use 32 or 40"),
    ("judge stream runs/stream --prompt a --out x --encoder eye", "encoder eye: choose color-histogram"),
    ("judge stream runs/stream --prompt a --out x --aesthetic foreign.pt", "--aesthetic foreign.pt: is no"),
    ("judge stream runs/stream --prompt a --out judged", "judged: holds judged roll-outs already"),
    ("judge stream runs/stream --prompt a --out a_file", "a_file: cannot be made"),
    ("judge stream runs/mine --prompt a --out x", "makes a clip whole and cannot stream"),
    ("judge stream runs/stream --prompt a --out x --switch 1", "give two prompts or more"),
    ("judge stream empty --prompt a --out x", "empty holds no whole checkpoint"),
    ("judge stream judged/films --out x", "--window: say how many frames"),
    ("judge stream judged/films --window 8 --teacher runs/mine --out x", "--teacher: compares two runs"),
    ("nosuch", "nosuch"),
]


@pytest.mark.parametrize("line, said", MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_ends_in_one_clear_line(mistakes: None, line: str, said: str) -> None:
    answer = call(*shlex.split(line), "--json")
    assert answer.code == 2
    assert list(answer.value) == ["error"]
    assert said in answer.value["error"]
    assert answer.err.splitlines()[-1] == f"error: {answer.value['error']}"
    assert "Traceback" not in answer.err


def test_a_mistake_leaves_nothing_behind(mistakes: None) -> None:
    before = Path("runs/mine/provenance.json").read_bytes()
    call("train", "quickstart", "--cache", "caches/small", "experiment_name=mine", *TINY)
    assert Path("runs/mine/provenance.json").read_bytes() == before, "the run in the way is untouched"
    call("quickstart", "--out", "runs/typo", "train.nosuch=1")
    assert not Path("runs/typo").exists()


def test_the_help_names_every_recipe() -> None:
    for command in ("train", "cache"):
        words = re.sub(r"[\s│]+", " ", help_text(command))
        assert all(re.search(rf"\b{name}\b", words) for name in packaged_recipes())


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["generate", "x"], "interrupted; run it again"),
        (["cache", "x"], "the same command goes on from there"),
        (["data", "shapeworld"], "the same command goes on from there"),
    ],
)
def test_an_interrupted_command_says_what_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str], said: str
) -> None:
    def interrupted(**_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("motionloom.cli.main.app", interrupted)
    monkeypatch.setattr(sys, "argv", ["motionloom", *command])
    with pytest.raises(SystemExit, match="130"):
        main()
    assert said in capsys.readouterr().err


def test_wrong_usage_is_explained_to_people() -> None:
    answer = call("generate", "runs/mine")
    assert (answer.code, answer.out) == (2, "")
    assert "Missing option '--out'" in answer.err
    assert "--help" in answer.err


def test_no_command_shows_the_help() -> None:
    answer = call()
    assert answer.code == 2
    assert "quickstart" in answer.out + answer.err


# Progress


def progress_lines(
    monkeypatch: pytest.MonkeyPatch, times: list[float], *calls: tuple[str, int, int]
) -> list[str]:
    """What is told without a terminal when these calls come at these times."""
    clock = iter(times)
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    err = io.StringIO()
    with contextlib.redirect_stderr(err), console.Out(as_json=False).stages() as advance:
        for what, done, total in calls:
            advance(what, done, total)
    return err.getvalue().splitlines()


def test_progress_without_a_terminal_is_a_line_every_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [("clips", done, 40) for done in range(1, 41)]
    lines = progress_lines(monkeypatch, [2.0 * n for n in range(40)], *calls)
    assert len(lines) == 11
    assert lines[:2] == ["clips: 1 of 40", "clips: 4 of 40, 0.5/s, 72 s left"]
    assert lines[-2:] == ["clips: 36 of 40, 0.5/s, 8 s left", "clips: 40 of 40, 0.5/s"]


def test_slow_progress_is_a_line_every_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [("clips", done, 1000) for done in range(1, 8)]
    lines = progress_lines(monkeypatch, [20.0 * n for n in range(7)], *calls)
    assert lines == [
        "clips: 1 of 1000",
        "clips: 4 of 1000, 0.05/s, 5.5 h left",
        "clips: 7 of 1000, 0.05/s, 5.5 h left",
    ]


def test_each_stage_has_a_rate_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [("fit", 1, 2), ("fit", 2, 2), ("clips", 10, 20), ("clips", 20, 20)]
    lines = progress_lines(monkeypatch, [0.0, 1.0, 60.0, 62.0], *calls)
    assert lines == ["fit: 1 of 2", "fit: 2 of 2, 1/s", "clips: 10 of 20", "clips: 20 of 20, 5/s"]


# Processes


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, **options
    )


def test_nothing_heavy_is_imported_for_the_help() -> None:
    heavy = "torch", "transformers", "lance", "pyarrow", "av", "grain", "numpy", "PIL", "tensorboard"
    code = f"import sys, motionloom.cli.main; print([m for m in {heavy} if m in sys.modules])"
    assert run("-c", code).stdout.strip() == "[]"


def test_it_runs_as_a_module() -> None:
    done = run("-m", "motionloom", "--help")
    assert done.returncode == 0
    assert "quickstart" in done.stdout


def test_an_interrupted_training_leaves_a_checkpoint_and_says_so(workshop: dict[str, Answer]) -> None:
    command = [
        *("-m", "motionloom", "train", "quickstart", "--cache", "caches/small", "experiment_name=stopped"),
        *(*TINY, "train.max_steps=1000000", "train.log_every_steps=1"),
    ]
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step 2/"):
                break
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "(signal)" in out
    assert "the same command with --resume goes on" in out
    assert list(Path("runs/stopped/checkpoints").glob("step_*/manifest.json"))


def test_training_goes_on_without_a_compiler(workshop: dict[str, Answer]) -> None:
    """`compile` on a machine with Python and make alone: a note, and blocks run as they are."""
    wanted = [*TINY, "train.compile=true", "train.max_steps=2", "experiment_name=no_compiler"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "motionloom",
            "train",
            "quickstart",
            "--cache",
            "caches/small",
            *wanted,
            "--json",
        ],
        env={**os.environ, "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "train.compile: no C++ compiler was found" in done.stderr
    assert json.loads(done.stdout)["step"] == 2


def test_windows_cut_long_clips(workshop: dict[str, Answer]) -> None:
    answer = call("data", "ingest", "my_clips", "--out", "cut.jsonl", "--windows", "0.5", "--json")
    assert answer.code == 0
    ids = [json.loads(line)["id"] for line in Path("cut.jsonl").read_text().splitlines()]
    whole = workshop["data ingest"].value["clips"]
    assert len(ids) > whole
    assert any(id_.endswith("__w01") for id_ in ids)
