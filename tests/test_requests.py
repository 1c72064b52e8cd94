"""Requests: a YAML and the command line say the same; files stand where they are given; mistakes are told."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import motionloom.cli.generate as command
from cached import make_clip
from motionloom.cli.assemble import fresh_model
from motionloom.cli.main import main
from motionloom.config import Recipe, load_recipe
from motionloom.config.conditions import CONDITIONS
from motionloom.config.request import Request, parse_request, read_request
from motionloom.data.media import read_clip, read_sound, write_sound
from motionloom.errors import UserError
from motionloom.evals.asked import read_samples
from motionloom.generate import Clip, Model
from motionloom.generate.clip import task_of
from motionloom.generate.extend import Memory, chosen, windows
from motionloom.plans import Streams, Visibility
from motionloom.requests import Prepared, prepare
from motionloom.rng import numpy_rng, torch_generator
from toy_model import altered

torch.set_num_threads(1)
FPS = 8.0
SOUND: dict[str, dict[str, Any]] = {
    "audio": {"enabled": True, "sample_rate": 4096, "latents_per_second": 8, "channels": 4},
    "model": {"audio_dim": 16},
    "plan": {"modalities": ["video", "audio"]},
}
SCENES: dict[str, dict[str, Any]] = {"plan": {"type": "scenes"}}


def build(**sections: dict[str, Any]) -> Model:
    """9 frames of 16 x 24 pixels at 8 a second, the first alone: 5 x 4 x 6 tokens; an awake network."""
    base: dict[str, dict[str, Any]] = {
        "video": {"height": 16, "width": 24, "num_frames": 9, "fps": FPS},
        "tokenizer": {"latent_f": 4, "latent_t": 2, "latent_d": 8, "first_alone": True},
        "text_encoder": {"dim": 12, "vocab_size": 256, "max_length": 12},
        "model": {"type": "joint", "dim": 24, "depth": 2, "num_heads": 2},
        "train": {"precision": "fp32", "sample_num_steps": 2, "sample_cfg_scale": 3.0},
    }
    merged = {key: {**base.get(key, {}), **sections.get(key, {})} for key in base | sections}
    model = fresh_model(Recipe.model_validate(merged), torch.device("cpu"))
    backbone: Any = model.predictor.backbone
    for name, parameter in backbone.eval().named_parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3, generator=torch_generator("toy request", name))
    return model


@cache
def model_of(kind: str) -> Model:
    return build(**{"video": {}, "sound": SOUND, "scenes": SCENES}[kind])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """film.mp4 of 20 frames, short.mp4 of 3, with.mp4 with sound, tone.wav and others that requests name."""
    folder = tmp_path_factory.mktemp("requests")
    make_clip(folder / "film.mp4", 3, frames=20, height=32, width=48)
    make_clip(folder / "short.mp4", 4, frames=3, height=32, width=48)
    make_clip(folder / "film.webp", 5, frames=20, height=16, width=24)
    rng = numpy_rng("request files")
    Image.fromarray(rng.integers(0, 256, (32, 48, 3), "uint8")).save(folder / "dog.png")
    mask = np.zeros((32, 48), np.uint8)
    mask[:, 24:] = 255
    Image.fromarray(mask).save(folder / "right.png")
    Image.fromarray(mask * 0).save(folder / "black.png")
    Image.fromarray(mask[:, :20]).save(folder / "narrow.png")
    time = np.arange(4096 * 3) / 4096
    tone = 0.5 * np.sin(2 * np.pi * 300 * time * (1 + time))[None].astype(np.float32)
    write_sound(folder / "tone.wav", tone, 4096)
    write_sound(folder / "blip.wav", tone[:, :1000], 4096)
    (folder / "broken.mp4").write_bytes(b"not a film")
    (folder / "text.yaml").write_text("just words")
    (folder / "tab.yaml").write_text("prompt: a\n\tframes: 9")
    (folder / "latin.yaml").write_bytes(b"prompt: caf\xe9")
    return folder


@dataclass
class Answer:
    """What a command left behind."""

    code: int
    out: str
    err: str


def call(*arguments: str) -> Answer:
    """The command line in this process."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
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


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, files: Path) -> None:
    """MODEL is the name of a toy, and the working folder is that of the files."""
    monkeypatch.setattr("motionloom.cli.assemble.open_model", lambda what, **_: model_of(str(what)))
    monkeypatch.setattr("motionloom.cli.lora.into_weights", lambda model, wishes: None)
    monkeypatch.chdir(files)


def ready(kind: str, tree: dict[str, Any]) -> Prepared:
    return prepare(model_of(kind), parse_request(tree))


def made(kind: str, tree: dict[str, Any]) -> list[Clip]:
    return list(ready(kind, tree).run(model_of(kind)))


# One request, two ways to say it

SAME: list[tuple[str, dict[str, Any]]] = [
    ("--prompt a", {"prompt": "a"}),
    ("--prompt a --prompt b --seed 3", {"prompts": ["a", "b"], "seed": 3}),
    (
        "--prompt a --negative b --frames 17 --size 32x48 --fps 12 --steps 4 --solver heun --format webp",
        {"prompt": "a", "negative": "b", "frames": 17, "size": [32, 48], "fps": 12, "steps": 4}
        | {"solver": "heun", "format": "webp"},
    ),
    (
        "--prompt a --image dog.png --last-image dog.png --strength 0.5",
        {
            "prompt": "a",
            "conditions": [
                {"type": "first_frame", "source": "dog.png", "strength": 0.5},
                {"type": "last_frame", "source": "dog.png", "strength": 0.5},
            ],
        },
    ),
    (
        "--prompt a --keyframe 0.5=dog.png --keyframe 1=film.mp4",
        {
            "prompt": "a",
            "conditions": [
                {"type": "keyframes", "times": [0.5], "source": "dog.png"},
                {"type": "keyframes", "times": [1], "source": "film.mp4"},
            ],
        },
    ),
    (
        "--prompt a --prefix film.mp4:5 --suffix tone.wav --extend 8 --backwards",
        {
            "prompt": "a",
            "conditions": [
                {"type": "prefix", "source": "film.mp4", "frames": 5},
                {"type": "suffix", "modality": "audio", "source": "tone.wav"},
            ],
            "extend": {"frames": 8, "direction": "backwards"},
        },
    ),
    (
        "--prompt a --mask right.png --crop 0,4,16,20 --source film.mp4",
        {
            "prompt": "a",
            "conditions": [
                {"type": "mask", "mask": "right.png", "source": "film.mp4"},
                {"type": "spatial_crop", "region": [0, 4, 16, 20], "source": "film.mp4"},
            ],
        },
    ),
    (
        "--prompt a --mask 0.25-0.75 --source tone.wav",
        {
            "prompt": "a",
            "conditions": [
                {"type": "mask", "modality": "audio", "made": [[0.25, 0.75]], "source": "tone.wav"}
            ],
        },
    ),
    (
        "--prompt a --reference film.mp4 --reference tone.wav --audio tone.wav",
        {
            "prompt": "a",
            "conditions": [
                {"type": "reference", "source": "film.mp4"},
                {"type": "reference", "modality": "audio", "source": "tone.wav"},
                {"type": "modality", "modality": "audio", "source": "tone.wav"},
            ],
        },
    ),
    (
        "--prompt a --video film.mp4 --guidance 2 --skip-guidance 1:0,1 --cross-guidance 3 "
        "--condition-guidance modality=1.5",
        {
            "prompt": "a",
            "conditions": [{"type": "modality", "modality": "video", "source": "film.mp4"}],
            "guidance": {"text": 2, "skip": 1, "skip_blocks": [0, 1], "cross": 3}
            | {"conditions": {"modality": 1.5}},
        },
    ),
    (
        "--scene a --scene b --scene-frames 5 --scene-source 0=film.mp4 --memory similar:2",
        {
            "scenes": [
                {"caption": "a", "frames": 5, "role": "given", "source": "film.mp4"},
                {"caption": "b", "frames": 5},
            ],
            "memory": {"policy": "similar", "keep": 2},
        },
    ),
    (
        "--scene a --scene b --scene-frames 5 --scene-frames 9",
        {"scenes": [{"caption": "a", "frames": 5}, {"caption": "b", "frames": 9}]},
    ),
]


@pytest.mark.parametrize("line, tree", SAME, ids=[line for line, _ in SAME])
def test_the_command_line_says_what_a_file_says(
    opened: None, files: Path, tmp_path: Path, line: str, tree: dict[str, Any], monkeypatch: Any
) -> None:
    heard: list[dict[str, Any]] = []
    monkeypatch.setattr(command, "run", lambda checkpoint, options, *_: heard.append(options))
    # Paths on the command line are as they are; those of a file are beside it, whatever the folder.
    words = [
        f"{left}{files / right}" if (files / right).is_file() else word
        for word in line.split()
        for left, right in [_file_in(word)]
    ]
    words = [word.replace("film.mp4:5", f"{files / 'film.mp4'}:5") for word in words]
    answer = call("generate", "video", *words, "--out", "x")
    assert answer.code == 0, answer.err
    beside = files / "request.yaml"
    beside.write_text(yaml.safe_dump(tree))
    assert parse_request(heard[0]) == read_request(beside)


def _file_in(word: str) -> tuple[str, str]:
    left, equals, right = word.rpartition("=")
    return left + equals, right


def test_options_go_before_a_file(opened: None, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (files / "both.yaml").write_text(
        "prompt: a\nseed: 1\nsteps: 9\nguidance: {text: 2, rescale: 0.5}\n"
        "conditions: [{type: first_frame, source: dog.png}, {type: last_frame, source: gone.png}]\n"
    )
    heard: list[Any] = []
    monkeypatch.setattr("motionloom.requests.prepare", lambda model, wish: heard.append(wish) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(
            *("generate", "video", "--request", "both.yaml", "--out", "out"),
            *("--prompt", "b", "--seed", "0", "--guidance", "3", "--last-image", "dog.png"),
        )
    wish = heard[0]
    assert (wish.prompt, wish.seed, wish.steps) == ("b", 0, 9)
    assert (wish.guidance.text, wish.guidance.rescale) == (3, 0.5)
    assert [(c.type, c.source.endswith("dog.png")) for c in wish.conditions] == [
        ("first_frame", True),
        ("last_frame", True),
    ]


# Files stand where they are given


def pixels(files: Path, name: str, **options: Any) -> np.ndarray:
    return read_clip(files / name, size=(16, 24), fps=FPS, **options).video_FHW3


def test_a_prefix_is_the_end_of_a_longer_film_and_a_suffix_the_beginning_of_one(files: Path) -> None:
    film = pixels(files, "film.mp4")
    for kind, wanted, where in (("prefix", film[-5:], slice(0, 5)), ("suffix", film[:4], slice(5, 9))):
        one = {"type": kind, "source": str(files / "film.mp4"), "frames": len(wanted)}
        (given,) = ready("video", {"prompt": "a", "conditions": [one]}).given
        assert given.video_PHW3 is not None
        assert np.array_equal(given.video_PHW3.numpy(), wanted)
        assert np.flatnonzero(given.where_PHW.all(axis=(1, 2))).tolist() == list(range(9))[where]
        assert f"{len(wanted)} frames of {files / 'film.mp4'}" in given.notes[0]


def test_a_length_that_ends_within_a_latent_frame_gives_the_whole_ones_up_to_the_films_end(
    files: Path,
) -> None:
    one = {"type": "prefix", "source": str(files / "film.mp4"), "frames": 6}
    (given,) = ready("video", {"prompt": "a", "conditions": [one]}).given
    assert given.video_PHW3 is not None
    assert np.array_equal(given.video_PHW3.numpy(), pixels(files, "film.mp4")[-5:])


def test_a_film_of_another_rate_is_read_at_the_models(files: Path, tmp_path: Path) -> None:
    from motionloom.data.media import write_video

    film = pixels(files, "film.mp4")
    write_video(tmp_path / "fast.webp", np.repeat(film, 3, axis=0), 3 * FPS, quality=100)
    one = {"type": "prefix", "source": str(tmp_path / "fast.webp"), "frames": 5}
    (given,) = ready("video", {"prompt": "a", "conditions": [one]}).given
    assert given.video_PHW3 is not None
    assert np.array_equal(given.video_PHW3.numpy(), film[-5:])


GIVING: dict[str, tuple[str, dict[str, Any]]] = {
    "first_frame": ("video", {"source": "dog.png"}),
    "last_frame": ("video", {"source": "film.mp4"}),
    "keyframes": ("video", {"source": "film.mp4", "times": [0.5]}),
    "prefix": ("video", {"source": "film.mp4", "seconds": 0.4}),
    "suffix": ("sound", {"source": "tone.wav", "modality": "audio", "seconds": 0.5}),
    "spatial_crop": ("video", {"source": "film.mp4", "region": [4, 0, 16, 12]}),
    "mask": ("video", {"source": "film.mp4", "mask": "right.png"}),
    "scene": ("scenes", {}),
    "modality": ("sound", {"source": "tone.wav", "modality": "audio"}),
}


@pytest.mark.parametrize("kind", GIVING)
def test_what_is_given_comes_back_to_the_bit(files: Path, kind: str) -> None:
    model_kind, told = GIVING[kind]
    named = {k: str(files / v) if k in ("source", "mask") else v for k, v in told.items()}
    tree: dict[str, Any] = {"prompt": "a", "conditions": [{"type": kind, **named}]}
    if kind == "scene":
        film = {"caption": "a", "role": "given", "source": str(files / "film.mp4"), "frames": 5}
        tree = {"scenes": [{"caption": "b", "frames": 3}, film, {"caption": "c", "frames": 5}]}
    model, prepared = model_of(model_kind), ready(model_kind, tree)
    task, _ = task_of(model, prepared.clips, prepared.sampling)
    assert task.values is not None
    (clip,) = prepared.run(model)
    some = 0
    for m, marks in task.given.marks.items():
        given_FS = ~marks.made_BN[0].unflatten(0, clip.tokens[m].shape[:2])
        assert torch.equal(clip.tokens[m][given_FS], task.values.clean[m][0][given_FS])
        some += int(given_FS.sum())
        if m == "video":
            latents = given_FS.any(dim=1).sum()
            assert bool(latents), "what is said to be given is given"
    assert some > 0


def test_every_condition_has_its_file_read(files: Path) -> None:
    assert GIVING.keys() | {"reference"} == CONDITIONS.keys()
    film = {"type": "reference", "source": str(files / "film.mp4"), "caption": "a film"}
    prepared = ready("video", {"prompt": "a", "conditions": [film]})
    assert np.array_equal(prepared.given[0].video_PHW3, pixels(files, "film.mp4")[:9])
    still = {"type": "reference", "source": str(files / "dog.png")}
    assert len(ready("video", {"prompt": "a", "conditions": [still]}).given[0].video_PHW3) == 1
    assert made("video", {"prompt": "a", "conditions": [film, still]})[0].video_PHW3.shape == (9, 16, 24, 3)


def test_conditions_may_overlap_where_they_agree_or_one_is_stronger(files: Path) -> None:
    dog, film = str(files / "dog.png"), str(files / "film.mp4")
    still = {"type": "keyframes", "times": [0.15], "source": dog}
    prefix = {"type": "prefix", "frames": 5, "source": film}
    for other in (
        {"type": "keyframes", "times": [0.2], "source": dog},
        {"type": "keyframes", "times": [0.4], "source": film},
        {**prefix, "strength": 0.5},
        {**prefix, "noise": 0.2},
    ):
        assert len(ready("video", {"prompt": "a", "conditions": [still, other]}).given) == 2
    crop = {"type": "spatial_crop", "region": [0, 0, 16, 12], "source": film}
    mask = {"type": "mask", "mask": str(files / "right.png"), "source": dog}
    assert len(ready("video", {"prompt": "a", "conditions": [crop, mask]}).given) == 2


def test_sound_is_laid_where_it_is_given(files: Path) -> None:
    tone = read_sound(files / "tone.wav", 4096)
    length, latent = round(9 / FPS * 4096), 512
    for kind, wanted, at in (("prefix", tone[:, -2 * latent :], 0), ("suffix", tone[:, : 2 * latent], -2)):
        one = {"type": kind, "modality": "audio", "seconds": 0.25, "source": str(files / "tone.wav")}
        (given,) = ready("sound", {"prompt": "a", "conditions": [one]}).given
        assert given.sound_ZM is not None
        assert given.sound_ZM.shape == (1, length)
        begin = at * latent % length
        assert np.array_equal(given.sound_ZM[:, begin : begin + 2 * latent].numpy(), wanted)


def test_seconds_of_sound_are_made_anew(files: Path) -> None:
    one = {"type": "mask", "modality": "audio", "made": [[0.2, 0.5]], "source": str(files / "tone.wav")}
    (given,) = ready("sound", {"prompt": "a", "conditions": [one]}).given
    assert given.mask_Fhw is not None
    # Latents of 1/8 s: those that touch 0.2 to 0.5 s are 1, 2 and 3.
    assert given.mask_Fhw.flatten().tolist() == [True, False, False, False, *[True] * 5]


def test_a_scene_with_sound_brings_both_and_a_silent_one_its_picture(files: Path) -> None:
    from motionloom.data.media import write_video

    heard = files / "heard.mp4"
    write_video(heard, pixels(files, "film.mp4"), FPS, sound=read_sound(files / "tone.wav"), sample_rate=4096)
    model = build(**{**SOUND, "plan": {"modalities": ["video", "audio"], "type": "scenes"}})
    for source, wanted in ((heard, {"video", "audio"}), (files / "film.mp4", {"video"})):
        scenes = [
            {"caption": "a", "frames": 5, "role": "given", "source": str(source)},
            {"caption": "b", "frames": 5},
        ]
        prepared = prepare(model, parse_request({"scenes": scenes}))
        task, _ = task_of(model, prepared.clips, prepared.sampling)
        assert set(task.given.marks) == wanted
        assert next(prepared.run(model)).sound_ZM is not None


def test_what_is_given_whole_comes_back_as_it_was_handed_in(files: Path) -> None:
    sound = {"type": "modality", "modality": "audio", "source": str(files / "tone.wav")}
    (clip,) = made("sound", {"prompt": "a", "conditions": [sound]})
    assert clip.sound_ZM is not None
    assert np.array_equal(clip.sound_ZM.numpy(), read_sound(files / "tone.wav", 4096)[:, :4608])
    film = {"type": "modality", "modality": "video", "source": str(files / "film.mp4")}
    (clip,) = made("sound", {"prompt": "a", "conditions": [film]})
    assert clip.video_PHW3 is not None
    assert np.array_equal(clip.video_PHW3.numpy(), pixels(files, "film.mp4")[:9])


def test_scales_of_a_request_stand_in_for_the_recipes(files: Path) -> None:
    prefix = {"type": "prefix", "source": str(files / "film.mp4"), "frames": 5}
    scales = {"text": 2, "rescale": 0.25, "skip": 1, "skip_blocks": [1], "conditions": {"prefix": 1.5}}
    sampling = ready("video", {"prompt": "a", "conditions": [prefix], "guidance": scales}).sampling
    guidance = sampling.guidance
    assert (guidance.scale, guidance.rescale) == (2, 0.25)
    assert (guidance.skip.scale, guidance.skip_blocks) == (1, (1,))
    assert guidance.conditions["prefix"].scale == 1.5
    plain = ready("video", {"prompt": "a", "conditions": [prefix], "guidance": 1})
    more = replace(plain, sampling=replace(plain.sampling, guidance=guidance))
    (a,), (b,) = plain.run(model_of("video")), more.run(model_of("video"))
    assert not torch.equal(a.tokens["video"], b.tokens["video"])


def test_seconds_become_the_nearest_length_that_can_be_made() -> None:
    for seconds, frames in ((0.1, 1), (1.0, 7), (1.1, 9), (1.125, 9), (2.1, 17)):
        assert ready("video", {"prompt": "a", "seconds": seconds}).shots == (frames,)
    assert "1 s are 8 frames; 7 can be made" in ready("video", {"prompt": "a", "seconds": 1}).notes[0]


def test_a_scene_is_as_long_as_a_shot_in_training() -> None:
    wish = parse_request({"scenes": [{"caption": "a"}, {"caption": "b"}]})
    for stories, frames in (({}, 3), ({"join": [2, 3]}, 9), ({"join": [2, 3], "frames": 5}, 5)):
        model = build(**SCENES, stories=stories)
        assert prepare(model, wish).shots == (frames, frames), stories


def test_notes_tell_what_a_model_was_never_shown(files: Path) -> None:
    prefix = {"type": "prefix", "source": str(files / "film.mp4"), "frames": 5}
    tree = {"prompt": "a", "conditions": [prefix]}
    assert "never trained with prefix (plan.conditions has none)" in " ".join(ready("video", tree).notes)
    knows = build(plan={"conditions": [{"type": "prefix"}]})
    assert not any("never trained" in note for note in prepare(knows, parse_request(tree)).notes)
    scenes = {"prompt": "all", "scenes": [{"caption": "a", "frames": 4}, {"caption": "b", "frames": 5}]}
    told = " ".join(ready("video", scenes).notes)
    assert "clips of one scene" in told
    assert "caption of the whole" in told


# Longer than one rollout


@pytest.mark.parametrize(
    "total, window, keep, head, backwards, wanted",
    [
        (5, 5, None, 1, False, [(0, 5)]),
        (9, 5, 2, 1, False, [(0, 5), (3, 7), (5, 9)]),
        (8, 5, 2, 1, False, [(0, 5), (3, 7), (5, 8)]),
        (9, 4, 1, 0, False, [(0, 4), (3, 7), (6, 9)]),
        (9, 5, 2, 1, True, [(5, 9), (3, 7), (0, 5)]),
        (10, 5, 2, 1, True, [(6, 10), (4, 8), (2, 6), (0, 4)]),
        (8, 4, 2, 0, True, [(4, 8), (2, 6), (0, 4)]),
        (9, 5, None, 1, False, [(0, 5), (3, 7), (5, 9)]),
    ],
)
def test_rounds_cover_a_clip_and_share_what_they_keep(
    total: int, window: int, keep: int | None, head: int, backwards: bool, wanted: list[tuple[int, int]]
) -> None:
    found = windows(total, window, keep, head, backwards=backwards)
    assert [(part.start, part.stop) for part in found] == wanted


class Heard:
    """What a backbone is fed, call after call."""

    def __init__(self, model: Model) -> None:
        self.streams: list[Streams] = []
        self.model = altered(model, self._note)
        self.model.predictor.backbone.modalities = model.predictor.backbone.modalities  # type: ignore[attr-defined]

    def _note(self, streams: Streams, visibility: Visibility) -> tuple[Streams, Visibility]:
        self.streams.append(streams)
        return streams, visibility


@pytest.mark.parametrize("kind", ["video", "sound"])
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_an_extended_clip_begins_with_the_clip_that_is_extended(kind: str, noise: float) -> None:
    short = made(kind, {"prompt": "a", "seed": 3})[0].tokens
    long = made(kind, {"prompt": "a", "seed": 3, "extend": {"frames": 8, "noise": noise}})[0]
    for m, tokens in short.items():
        assert torch.equal(long.tokens[m][: len(tokens)], tokens), "given from round to round to the bit"
        assert len(long.tokens[m]) > len(tokens)
    assert long.video_PHW3 is not None
    assert len(long.video_PHW3) == 17
    assert not torch.equal(long.tokens["video"][5:7], long.tokens["video"][7:9])


@pytest.mark.parametrize("direction, ends", [("forwards", slice(0, 2)), ("backwards", slice(2, 4))])
def test_a_round_is_given_the_last_of_what_is_known(direction: str, ends: slice) -> None:
    heard = Heard(model_of("video"))
    tree = {"prompt": "a", "guidance": 1, "extend": {"frames": 4, "direction": direction, "keep": 2}}
    prepared = prepare(heard.model, parse_request(tree))
    (clip,) = prepared.run(heard.model)
    assert len(clip.tokens["video"]) == 7
    last = heard.streams[-1]["video"]
    frames = last.grid[0]
    given_F = (last.loss_BN[0] == 0).unflatten(0, (frames, -1)).all(dim=1)
    x_FSC = last.x_BNC[0].unflatten(0, (frames, -1))
    if direction == "forwards":
        assert given_F.tolist() == [True, True, False, False]
        assert torch.equal(x_FSC[:2], clip.tokens["video"][3:5])
        # Behind the place of the first frame, which stands alone and which the round lacks.
        assert last.position_BN3[0, 0, 0] == pytest.approx((1 + 3) / 2 / FPS)
    else:
        assert given_F.tolist()[-2:] == [True, True]
        assert torch.equal(x_FSC[-2:], clip.tokens["video"][frames - 2 : frames])
        assert last.position_BN3[0, 0, 0] == pytest.approx(0.5 / FPS)


def test_noise_on_the_history_is_shown_and_never_kept() -> None:
    heard = Heard(model_of("video"))
    tree = {"prompt": "a", "guidance": 1, "extend": {"frames": 4, "noise": 0.25}}
    (clip,) = prepare(heard.model, parse_request(tree)).run(heard.model)
    last = heard.streams[-1]["video"]
    given_N = last.loss_BN[0] == 0
    assert last.sigma_BN[0][given_N].unique().tolist() == [0.25]
    shown = last.x_BNC[0][given_N].unflatten(0, (2, -1))
    assert not torch.allclose(shown, clip.tokens["video"][3:5])


def test_conditions_hold_over_all_rounds(files: Path) -> None:
    """A film comes first, a picture stands in the last round, and the sound is given throughout."""
    conditions = [
        {"type": "prefix", "source": str(files / "film.mp4"), "frames": 5},
        {"type": "last_frame", "source": str(files / "dog.png")},
        {"type": "modality", "modality": "audio", "source": str(files / "tone.wav")},
    ]
    prepared = ready("sound", {"prompt": "a", "conditions": conditions, "extend": {"rounds": 2}})
    assert prepared.shots == (17,)
    task, _ = task_of(model_of("sound"), prepared.clips, prepared.sampling)
    assert task.values is not None
    (clip,) = prepared.run(model_of("sound"))
    for part in (slice(0, 3), slice(8, 9)):
        assert torch.equal(clip.tokens["video"][part], task.values.clean["video"][0, part])
    assert torch.equal(clip.tokens["audio"], task.values.clean["audio"][0])


@pytest.mark.parametrize(
    "policy, keep, wanted",
    [
        ("last", 1, [3]),
        ("last", 2, [2, 3]),
        ("first_last", 1, [0, 3]),
        ("first_last", 9, [0, 1, 2, 3]),
        ("similar", 2, [1, 6]),
        ("all", 1, [0, 1, 2, 3, 6]),
    ],
)
def test_memories(policy: Any, keep: int, wanted: list[int]) -> None:
    """Of scene 4, where 0 to 3 and 6 are known."""
    near_Z = torch.tensor([0.1, 0.9, 0.2, 0.2, 1.0, 1.0, 0.5])
    assert chosen(Memory(policy, keep), 4, [0, 1, 2, 3, 6], near_Z) == wanted


def test_scenes_are_made_one_after_the_other_from_what_is_remembered() -> None:
    heard = Heard(model_of("scenes"))
    captions = ("a red circle", "two blue cats", "green hills", "a red circle")
    scenes = [{"caption": c, "frames": n} for c, n in zip(captions, (5, 3, 7, 5), strict=True)]
    tree = {"guidance": 1, "steps": 1, "scenes": scenes, "memory": {"policy": "similar"}}
    prepared = prepare(heard.model, parse_request(tree))
    (clip,) = prepared.run(heard.model)
    assert clip.video_PHW3 is not None
    assert len(clip.video_PHW3) == 20
    assert [x["video"].grid[0] for x in heard.streams][:2] == [3, 5]
    tokens, last = clip.tokens["video"], heard.streams[-1]["video"]
    x_FSC = last.x_BNC[0].unflatten(0, (6, -1))
    assert torch.equal(x_FSC[:3], tokens[:3]), "the first scene has the nearest caption, and is given"
    assert (last.loss_BN[0].unflatten(0, (6, -1))[:3] == 0).all()
    text = heard.streams[-1]["text"]
    encoded = model_of("scenes").encode_text([[captions[0], captions[3]]])
    assert torch.equal(text.x_BNC, encoded.x_BLC)


def test_any_subset_of_scenes_may_be_given_and_all_stay_exact(files: Path) -> None:
    film = {"caption": "b", "role": "given", "source": str(files / "film.mp4"), "frames": 5}
    scenes = [{"caption": "a", "frames": 3}, film, {"caption": "c", "frames": 5}]
    at_once = ready("scenes", {"scenes": scenes})
    after = ready("scenes", {"scenes": scenes, "memory": {"policy": "all", "noise": 0.1}})
    task, _ = task_of(model_of("scenes"), at_once.clips, at_once.sampling)
    assert task.values is not None
    assert at_once.given_share() == [0.0] * 3 + [1.0] * 5 + [0.0] * 5
    for prepared in (at_once, after):
        (clip,) = prepared.run(model_of("scenes"))
        assert torch.equal(clip.tokens["video"][2:5], task.values.clean["video"][0, 2:5])


def test_a_longer_scene_with_sound_keeps_the_sound_of_each(files: Path) -> None:
    model = build(**{**SOUND, "plan": {"modalities": ["video", "audio"], "type": "scenes"}})
    scenes = [{"caption": c, "frames": n} for c, n in (("a", 5), ("b", 3), ("c", 7))]
    tree = {"scenes": scenes, "memory": {"policy": "last"}}
    (clip,) = prepare(model, parse_request(tree)).run(model)
    first = {"scenes": [*scenes[:1], {"caption": "x", "frames": 3}], "memory": {"policy": "last"}}
    (other,) = prepare(model, parse_request(first)).run(model)
    assert torch.equal(clip.tokens["audio"][:5], other.tokens["audio"][:5])
    assert len(clip.tokens["audio"]) == 15


# What is left behind


def test_clips_json_is_what_the_judge_reads(opened: None, files: Path, tmp_path: Path) -> None:
    answer = call(
        *("generate", "video", "--prompt", "a red circle", "--prompt", "b", "--seed", "4"),
        *("--prefix", "film.mp4:5", "--mask", "right.png", "--source", "film.mp4", "--steps", "1"),
        *("--format", "webp", "--out", str(tmp_path), "--json"),
    )
    assert answer.code == 0, answer.err
    assert "prefix: last 5 frames of film.mp4, at frames 0 to 4 of the clip" in answer.err.replace("\n", " ")
    value = json.loads(answer.out)
    assert [Path(clip).is_file() for clip in value["clips"]] == [True, True]
    found = read_samples(tmp_path)
    assert not list(found.problems)
    first = found.items[0]
    assert (first.asked.prompt, first.asked.seed, first.asked.fps) == ("a red circle", 4, FPS)
    prefix, mask = first.asked.given
    assert prefix.given == ((0, 5),)
    assert prefix.source_PHW3 is not None
    assert np.array_equal(prefix.source_PHW3, pixels(files, "film.mp4")[-5:])
    assert mask.mask_PHW is not None
    assert mask.mask_PHW.shape == (9, 16, 24)
    assert np.array_equal(mask.mask_PHW[0], np.arange(24)[None].repeat(16, 0) >= 12)
    assert first.given_PHW[:5].all()
    assert first.given_PHW[5:].mean() == pytest.approx(0.5)
    sheet = np.asarray(Image.open(value["sheet"]))
    assert (sheet == (0, 158, 90)).all(axis=2).any(), "what is given is marked"


def test_scenes_are_told_with_their_roles(opened: None, files: Path, tmp_path: Path) -> None:
    words = ("--scene", "a", "--scene", "b", "--scene-frames", "5", "--scene-source", "0=film.mp4")
    answer = call("generate", "scenes", *words, "--steps", "1", "--out", str(tmp_path), "--format", "webp")
    assert answer.code == 0, answer.err
    (record,) = json.loads((tmp_path / "clips.json").read_text())
    assert record["scenes"] == [
        {"caption": "a", "frames": 5, "role": "given"},
        {"caption": "b", "frames": 5, "role": "generate"},
    ]
    (sample,) = read_samples(tmp_path).items
    assert sample.asked.cuts == (5,)
    assert sample.given_P.tolist() == [True] * 5 + [False] * 5


def test_sound_is_written_with_the_film_and_alone(opened: None, tmp_path: Path) -> None:
    for suffix in ("mp4", "wav"):
        words = (
            "--prompt",
            "a",
            "--steps",
            "1",
            "--format",
            suffix,
            "--out",
            str(tmp_path / suffix),
            "--json",
        )
        answer = call("generate", "sound", *words)
        assert answer.code == 0, answer.err
        sound = read_sound(json.loads(answer.out)["clips"][0], 4096)
        assert sound.shape[1] == pytest.approx(9 / FPS * 4096, abs=1024)
        assert np.abs(sound).max() > 0.01


def test_a_model_of_sound_alone_makes_and_extends_sound(
    opened: None, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(**{**SOUND, "plan": {"modalities": ["audio"]}})
    monkeypatch.setattr("motionloom.cli.assemble.open_model", lambda what, **_: model)
    words = ("--prefix", "tone.wav:4", "--extend", "8", "--format", "wav", "--out", str(tmp_path), "--json")
    answer = call("generate", "sound", "--prompt", "a", *words)
    assert answer.code == 0, answer.err
    value = json.loads(answer.out)
    assert read_sound(value["clips"][0]).shape == (1, 17 * 512)
    assert "sheet" not in value
    refused = call("generate", "sound", "--prompt", "a", "--out", str(tmp_path / "b"))
    assert refused.err.count("choose wav") == 1


def test_a_request_can_be_all_that_is_said(opened: None, files: Path, tmp_path: Path) -> None:
    (files / "whole.yaml").write_text(
        "prompt: a\nformat: webp\nsteps: 1\nconditions:\n- {type: first_frame, source: dog.png}\n"
    )
    answer = call("generate", "video", "--request", str(files / "whole.yaml"), "--out", str(tmp_path))
    assert answer.code == 0, answer.err
    assert (tmp_path / "000_a.webp").is_file()


# Samples while training


def test_samples_while_training_are_requests(files: Path, tmp_path: Path) -> None:
    from types import SimpleNamespace

    from motionloom.cli.previews import Previews
    from motionloom.parallel import Ranks

    (files / "sample.yaml").write_text(
        "prompt: from a file\nconditions: [{type: first_frame, source: dog.png}]"
    )
    prefix = {"type": "prefix", "source": str(files / "film.mp4"), "frames": 5}
    requests = [str(files / "sample.yaml"), {"prompt": "b", "conditions": [prefix]}]
    model = build(train={"sample_requests": requests, "sample_prompts": ["c"], "sample_num_steps": 1})

    def parts(model: Model) -> Any:
        return SimpleNamespace(recipe=model.recipe, ranks=Ranks(), model=lambda: model)

    @contextlib.contextmanager
    def weights() -> Iterator[None]:
        yield

    Previews(parts(model), tmp_path)(7, weights, weights)
    for name in ("raw", "ema"):
        sheet = np.asarray(Image.open(tmp_path / "samples" / f"step_00000007_{name}.png"))
        assert (sheet == (0, 158, 90)).all(axis=2).any()
        assert sheet.shape[0] > 3 * 96, "three rows"
    wrong = build(train={"sample_requests": [{"prompt": "b", "frames": 8}]})
    with pytest.raises(UserError, match="use 7 or 9"):
        Previews(parts(wrong), tmp_path)


def test_a_recipe_refuses_requests_that_are_none() -> None:
    with pytest.raises(UserError, match=r"sample_requests\[0\]: promt is not a key; did you mean prompt\?"):
        load_recipe("quickstart", ["train.sample_requests=[{promt: a}]"])


# Mistakes: (model, what is said, a part of the line)

MISTAKES: list[tuple[str, str, str]] = [
    # Nothing to do, or two things at once
    ("video", "", "nothing to make: give a prompt"),
    ("video", "--prompt a --image dog.png --image dog.png", "first_frame) stands twice for video"),
    ("video", "--prompt a --prefix film.mp4:3 --prefix film.mp4:5", "prefix) stands twice"),
    ("video", "--prompt a --mask right.png", "--mask has no --source"),
    ("video", "--prompt a --source film.mp4", "--source is the film of a --mask or a --crop"),
    ("video", "--prompt a --crop 0,0,8,8 --source film.mp4 --source dog.png", "has 2 times --source"),
    ("video", "--prompt a --keyframe 0.5=dog.png --keyframe 0.5=film.mp4", "0.5 s is given twice"),
    (
        "video",
        "--prompt a --keyframe 0.15=dog.png --keyframe 0.2=film.mp4",
        "conditions[0] (keyframes) and conditions[1] (keyframes) both give frames 1 to 2 of the clip, "
        "dog.png and film.mp4",
    ),
    ("video", "--prompt a --image dog.png --prefix film.mp4:5", "both give frame 0 of the clip"),
    ("video", "--prompt a --last-image dog.png --suffix film.mp4:4", "both give frames 7 to 8 of the clip"),
    ("video", "--prompt a --image dog.png --crop 0,0,16,12 --source film.mp4", "both give frame 0"),
    (
        "sound",
        "--prompt a --prefix blip.wav:1 --mask 0.8-1.2 --source tone.wav",
        "both give the sound from 0",
    ),
    ("scenes", "--scene a --scene b --scene-source 0=film.mp4 --image dog.png", "and scenes[0] both give"),
    ("video", "--prompt a --strength 0.5", "--strength is of what is given"),
    ("video", "--prompt a --backwards", "for instance --extend 16"),
    ("video", "--prompt a --scene-frames 5", "list them with --scene"),
    # Files
    ("video", "--prompt a --image nowhere.png", "(first_frame): nowhere.png: does not exist"),
    ("video", "--prompt a --prefix broken.mp4:5", "(prefix): broken.mp4"),
    ("video", "--prompt a --image tone.wav", "tone.wav is a sound, and pixels are asked for"),
    ("video", "--prompt a --image text.yaml", "text.yaml: is of no known kind"),
    ("video", "--prompt a --prefix short.mp4:5", "short.mp4 has 3 frames at 8 a second, and 5 are given"),
    ("video", "--prompt a --prefix film.mp4", "film.mp4 lasts 2.5 s and the clip 1.125 s"),
    ("sound", "--prompt a --audio dog.png", "dog.png is a picture, which has no sound"),
    ("sound", "--prompt a --audio film.mp4", "film.mp4: has no sound"),
    ("sound", "--prompt a --audio blip.wav", "blip.wav has 0.244"),
    ("sound", "--prompt a --reference blip.wav --audio nowhere.wav", "nowhere.wav: does not exist"),
    ("video", "--request nowhere.yaml", "nowhere.yaml: cannot be read"),
    ("video", "--request text.yaml", "a request is `key: value` lines"),
    ("video", "--request tab.yaml", "tab.yaml, line 2"),
    ("video", "--request latin.yaml", "not a text file (UTF-8)"),
    # What does not fit the clip
    ("video", "--prompt a --prefix film.mp4:40", "40 frames are more than the clip has"),
    ("video", "--prompt a --prefix film.mp4:9", "nothing is left to make"),
    ("video", "--prompt a --suffix film.mp4:1", "(suffix): gives nothing: a token is 4x4 pixels of 2 frames"),
    ("video", "--prompt a --keyframe 1.125=dog.png", "1.125 s is not before the clip's end"),
    ("video", "--prompt a --crop 0,0,20,8 --source film.mp4", "not [top, left, bottom, right] inside 24x16"),
    ("video", "--prompt a --crop 8,0,8,8 --source film.mp4", "nothing is inside"),
    ("video", "--prompt a --crop 1,1,4,4 --source film.mp4", "gives nothing: a token is 4x4 pixels"),
    ("video", "--prompt a --crop 0,0,16,24 --source film.mp4", "nothing is left to make"),
    ("video", "--prompt a --mask narrow.png --source film.mp4", "narrow.png: has 20x32 pixels"),
    ("video", "--prompt a --mask black.png --source film.mp4", "black.png gives nothing"),
    ("video", "--prompt a --mask 2-3 --source film.mp4", "made [2.0, 3.0] begins after the clip's end"),
    ("video", "--prompt a --mask 1-0.5 --source film.mp4", "ends before it begins"),
    ("video", "--prompt a --mask right.png --source tone.wav", "sound has no pixels"),
    ("video", "--prompt a --frames 8", "use 7 or 9"),
    ("video", "--prompt a --size 18", "use 16 or 20"),
    ("video", "--prompt a --size wide", "for instance 64x96"),
    ("video", "--prompt a --extend 7", "extend.frames 7 does not fill latent frames of 2: use 6 or 8"),
    ("video", "--prompt a --frames 3 --extend 8", "extend.keep 1 leaves nothing to make"),
    ("video", "--prompt a --extend 8 --reference film.mp4", "extend does not go with a reference"),
    # What this model has not
    ("video", "--prompt a --audio tone.wav", "gives audio, this model makes video alone"),
    ("video", "--prompt a --format wav", "format: wav is sound, and this model makes video alone"),
    ("video", "--prompt a --video film.mp4", "nothing is left to make"),
    ("video", "--scene a --scene b --scene-frames 3 --scene-frames 6 --memory last", "scenes apart"),
    # Scenes
    ("scenes", "--scene a --scene=", "scenes[1] has no caption"),
    ("scenes", "--scene a --scene b --scene-source 2=film.mp4", "there are 2 scenes, which count from 0"),
    ("scenes", "--scene a --scene b --scene-source film.mp4", "write NUMBER=FILE"),
    ("scenes", "--scene a --scene-source 0=film.mp4", "all scenes are given"),
    ("scenes", "--scene a --scene b --scene-frames 3 --scene-frames 4", "scenes[1].frames: 4"),
    ("scenes", "--scene a --scene b --scene c --scene-frames 3 --scene-frames 3", "stands 2 times for 3"),
    ("scenes", "--scene a --scene b --extend 8", "extend goes on with one scene"),
    ("scenes", "--scene a --scene b --frames 9", "say those of each scene"),
    ("scenes", "--prompt a --memory last", "memory is for scenes"),
    ("scenes", "--scene a --scene b --memory newest", "expected last, first_last, similar or all"),
    ("scenes", "--scene a --scene b --memory last:many", "--memory: many is not a whole number"),
    ("scenes", "--scene a --scene b --scene-source 0=short.mp4 --scene-frames 5", "scenes[0]: "),
    # Numbers
    ("video", "--prompt a --prefix film.mp4:-5", "frames is -5; expected a whole number above 0"),
    ("video", "--prompt a --keyframe -1=dog.png", "expected a list, each item a number of at least 0"),
    ("video", "--prompt a --keyframe dog.png", "write SECONDS=FILE"),
    ("video", "--prompt a --keyframe soon=dog.png", "--keyframe: soon is not a number"),
    ("video", "--prompt a --crop 0,0,8 --source film.mp4", "expected a list of 4"),
    ("video", "--prompt a --crop a,b,c,d --source film.mp4", "--crop: a is not a whole number"),
    ("video", "--prompt a --image dog.png --strength 1.5", "strength is 1.5; expected a number"),
    ("video", "--prompt a --extend -4", "extend.frames is -4; expected a whole number above 0"),
    ("video", "--prompt a --fps 0", "fps is 0"),
    # Guidance and solvers
    ("video", "--prompt a --skip-guidance 1", "say guidance.skip_blocks, of 0 to 1"),
    ("video", "--prompt a --skip-guidance 1:7", "names block 7, and this model has 2"),
    ("video", "--prompt a --condition-guidance reference=2", "the request gives none"),
    ("video", "--prompt a --condition-guidance refrence=2", "refrence is no condition"),
    ("video", "--prompt a --condition-guidance reference", "write CONDITION=SCALE"),
    ("video", "--prompt a --solver magic", "expected euler, heun, dpmpp_2m or ddim"),
    ("video", "--prompt a --format avi", "expected mp4"),
    ("eta", "--prompt a --image dog.png --strength 0.5 --solver ddim", "does not go with the fresh noise"),
]

WRONG_TREES: list[tuple[dict[str, Any], str]] = [
    ({"promt": "a"}, "promt is not a key; did you mean prompt?"),
    ({"prompt": "a", "prompts": ["b"]}, "prompt and prompts both"),
    ({"prompt": "a", "frames": 9, "seconds": 1}, "frames and seconds both"),
    ({"prompt": "a", "seed": -1}, "seed is -1"),
    ({"prompt": "a", "seed": True}, "seed: true and false"),
    ({"scenes": [{"captoin": "a"}]}, "scenes[0].captoin is not a key; did you mean caption?"),
    ({"scenes": [{"caption": "a", "role": "given"}]}, "scenes[0] is given and has no source"),
    ({"scenes": [{"caption": "a", "source": "x"}]}, "scenes[0] has a source and is to be made"),
    ({"scenes": [{"caption": "a", "frames": 5, "seconds": 1}]}, "scenes[0]: frames and seconds both"),
    ({"scenes": [{"caption": "a", "role": "made"}]}, 'scenes[0].role is "made"; expected generate or given'),
    ({"scenes": ["a"]}, "scenes[0] is"),
    ({"prompt": "a", "extend": {}}, "extend: say either frames or rounds"),
    ({"prompt": "a", "extend": {"frames": 8, "way": "up"}}, "extend.way is not a key"),
    ({"prompt": "a", "guidance": {"scale": 3}}, "guidance.scale is not a key"),
    ({"prompt": "a", "guidance": {"interval": [1, 0]}}, "low < high"),
]

WRONG_CONDITIONS: list[tuple[dict[str, Any], str]] = [
    ({"source": "x"}, "conditions[0]: it has no type"),
    ({"type": "perfix", "source": "x"}, "did you mean prefix?"),
    ({"type": "prefix", "frames": 5}, "(prefix) has no source"),
    ({"type": "prefix", "frames": 5, "seconds": 1, "source": "x"}, "both say how long"),
    ({"type": "prefix", "frames": [1, 5], "source": "x"}, "a range is for training"),
    ({"type": "prefix", "probability": 0.5, "source": "x"}, "probability is for training"),
    ({"type": "prefix", "lenght": 5, "source": "x"}, "conditions[0].lenght is not a key"),
    ({"type": "first_frame", "modality": "audio", "source": "x"}, "expected video"),
    ({"type": "first_frame", "strength": 0.5, "noise": 0.1, "source": "x"}, "set one of them"),
    ({"type": "first_frame", "strength": 0, "source": "x"}, "strength is 0"),
    ({"type": "first_frame", "noise": 1, "source": "x"}, "noise is 1"),
    ({"type": "keyframes", "source": "x"}, "times is empty"),
    ({"type": "spatial_crop", "source": "x"}, "region is missing"),
    ({"type": "keyframes", "times": [0.5], "count": 3, "source": "x"}, "and count draws them: keep one"),
    ({"type": "scene", "scenes": [], "source": "x"}, "conditions[0].scenes: names no scene"),
    ({"type": "spatial_crop", "region": [8, 0, 8, 8], "source": "x"}, "region [8, 0, 8, 8] is not"),
    ({"type": "mask", "made": [[1, 0.5]], "source": "x"}, "conditions[0].made: [1.0, 0.5] ends before"),
    ({"type": "mask", "source": "x"}, "say either mask, a file, or made"),
    ({"type": "scene", "scenes": "some", "source": "x"}, "scenes must be a list of numbers"),
    ({"type": "modality", "modality": "smell", "source": "x"}, "expected video or audio"),
]


def test_there_are_many_wrong_ways() -> None:
    assert len(MISTAKES) + len(WRONG_TREES) + len(WRONG_CONDITIONS) > 100


@pytest.fixture(scope="module")
def stochastic() -> Callable[[], Model]:
    return cache(lambda: build(train={"sample_eta": 1.0}))


@pytest.mark.parametrize("kind, line, said", MISTAKES, ids=[f"{k} {line}" for k, line, _ in MISTAKES])
def test_a_mistake_on_the_command_line_ends_in_one_clear_line(
    opened: None,
    monkeypatch: pytest.MonkeyPatch,
    stochastic: Callable[[], Model],
    tmp_path: Path,
    kind: str,
    line: str,
    said: str,
) -> None:
    if kind == "eta":
        monkeypatch.setattr("motionloom.cli.assemble.open_model", lambda what, **_: stochastic())
    answer = call("generate", kind, *line.split(), "--out", str(tmp_path))
    assert answer.code == 2
    lines = [text for text in answer.err.splitlines() if text.startswith("error: ")]
    assert len(lines) == 1, answer.err
    assert answer.err.rstrip().endswith(lines[0])
    assert said in lines[0]
    assert not list(tmp_path.glob("*.mp4"))


@pytest.mark.parametrize("tree, said", WRONG_TREES, ids=[said for _, said in WRONG_TREES])
def test_a_mistake_in_a_file_names_the_file_and_the_key(
    tmp_path: Path, tree: dict[str, Any], said: str
) -> None:
    path = tmp_path / "request.yaml"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError) as caught:
        read_request(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)


@pytest.mark.parametrize("condition, said", WRONG_CONDITIONS, ids=[said for _, said in WRONG_CONDITIONS])
def test_a_mistake_in_a_condition_names_it(condition: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_request({"prompt": "a", "conditions": [condition]})
    assert "conditions[0]" in str(caught.value)
    assert said in str(caught.value)


def test_the_guide_names_every_key_and_condition() -> None:
    guide = (Path(__file__).resolve().parents[1] / "docs" / "requests.md").read_text("utf-8")
    named = re.findall(r"^\| `(\w+)` \|", guide, re.MULTILINE)
    assert named == [*Request.model_fields, *CONDITIONS]
