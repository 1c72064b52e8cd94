"""A teacher's walks in a cache: against closed forms, over kills and workers, and what is refused.

The teacher of most tests knows one clip: data that is a point m has the velocity (x - m) / sigma, whose flow
is the straight line (1 - sigma) m + sigma noise. Every solver that is exact on straight lines stays on it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import wave
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from cached import make_clip, make_world
from motionloom.backbones.prediction import Predictor
from motionloom.cli.assemble import build_plan
from motionloom.config import Recipe
from motionloom.data.buckets import Bucket
from motionloom.data.cache import Cache, build_cache, open_cache
from motionloom.data.cache.pairs import PairsReport, make_pairs, require_levels
from motionloom.data.cache.pairs_note import PairsNote
from motionloom.data.cache.trajectories import Teacher, Wish, in_halves, levels_on_grid
from motionloom.data.cache.workers import Held, Share, locked
from motionloom.data.loader import Loader
from motionloom.data.manifest import ManifestEntry, Scene
from motionloom.errors import UserError
from motionloom.flow import Guidance
from motionloom.generate import Model, Sampling, rollout, task_of
from motionloom.generate.clip import ClipRequest
from motionloom.nn.patching import patchify
from motionloom.plans import Streams, Visibility
from motionloom.text import encode_scenes
from motionloom.tokenizers import load_audio_tokenizer
from toy_model import toy_model, toy_recipe

CLIPS = 10
HALF = {"rtol": 2**-10, "atol": 2**-10}
"""What float16 rounds, twice."""


def student(**sections: dict[str, Any]) -> Recipe:
    """Four levels on a grid of eight steps."""
    distil = {"teacher": "teacher", "num_steps": 4, "shift": 2.0, "grid_steps": 8, "guidance": 3.0}
    return toy_recipe(**{**sections, "distil": {**distil, **sections.get("distil", {})}})


class OneClip(nn.Module):
    """Knows a clip of one value for each caption, the mean of its words; NaN for some captions.

    With ``company`` the value depends on how many clips are walked at once: as last bits do, but to be seen.
    """

    patch = (1, 1, 1)

    def __init__(
        self,
        modalities: tuple[str, ...] = ("video",),
        spoiled: Callable[[Tensor], Tensor] | None = None,
        company: float = 0.0,
    ) -> None:
        super().__init__()
        self.modalities, self.spoiled, self.company = modalities, spoiled, company
        self.scale = nn.Parameter(torch.tensor(10.0), requires_grad=False)

    def forward(self, streams: Streams, visibility: Visibility) -> dict[str, Tensor]:
        text = streams["text"]
        assert text.valid_BN is not None
        value_B = clip_value(text.x_BNC, text.valid_BN) * self.scale
        value_B = value_B + self.company * len(value_B)
        if self.spoiled is not None:
            value_B = torch.where(self.spoiled(value_B), torch.nan, value_B)
        found = {}
        for m in self.modalities:
            x_BNC, sigma_BN1 = streams[m].x_BNC, streams[m].sigma_BN[..., None]
            v_BNC = (x_BNC - value_B[:, None, None]) / sigma_BN1.clamp_min(1e-9)
            found[m] = torch.where(sigma_BN1 > 0, v_BNC, 0.0)
        return found

    def blocks(self) -> list[nn.Module]:
        return []


def clip_value(x_BLC: Tensor, valid_BL: Tensor) -> Tensor:
    return (x_BLC.mean(-1) * valid_BL).sum(1) / valid_BL.sum(1).clamp_min(1)


def knowing(model: Model, recipe: Recipe | None = None, **options: Any) -> Teacher:
    """A teacher that knows one clip, under a recipe's plan."""
    recipe = recipe or model.recipe
    predictor = Predictor(OneClip(**options))
    return Teacher(replace(model, recipe=recipe, predictor=predictor, plan=build_plan(recipe)), "teacher")


def value_of(model: Model, caption: str) -> float:
    text = encode_scenes(model.text_encoder, [[caption]])
    with torch.no_grad():
        return float(clip_value(text.x_BLC, text.valid_BL) * 10)


@pytest.fixture(scope="module")
def model() -> Model:
    return toy_model()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> list[ManifestEntry]:
    return make_world(tmp_path_factory.mktemp("world"), CLIPS, height=16, width=24)


@pytest.fixture(scope="module")
def source(model: Model, world: list[ManifestEntry], tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Ten clips under the teacher's tokenizer."""
    path = tmp_path_factory.mktemp("source") / "cache"
    build_cache(toy_recipe(), world, path, tokenizer=model.tokenizer)
    return open_cache(path)


@pytest.fixture(scope="module")
def made(model: Model, source: Cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole store of a teacher with a network, to be read only."""
    path = tmp_path_factory.mktemp("made") / "pairs"
    make_pairs(student(), Teacher(model, "teacher"), source, path)
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    table = lance.dataset(str(path / "clips.lance")).to_table()
    return sorted(table.to_pylist(), key=lambda row: row["id"])


def line_of(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# What a row holds


@pytest.mark.parametrize("plan", [{"type": "text_to_video"}, {"type": "chunks", "frames": 1}])
@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m"])
def test_states_stand_on_the_straight_line_from_noise_to_the_guided_clip(
    plan: dict[str, Any], solver: str, model: Model, source: Cache, tmp_path: Path
) -> None:
    recipe = student(distil={"grid_solver": solver, "negative": "dull grey"})
    teacher = knowing(model, toy_recipe(plan=plan))
    report = make_pairs(recipe, teacher, source, tmp_path / "pairs")
    assert (report.made, report.kept, report.clips, len(report.skipped)) == (CLIPS, 0, CLIPS, 0)
    cache = open_cache(tmp_path / "pairs")
    assert cache.verify() == []
    assert cache.ids == source.ids
    levels = torch.tensor(recipe.distil.levels)[:, None, None, None, None]
    assert levels.flatten().tolist() == pytest.approx(
        [1, 6 / 7, 2 / 3, 0.4]
    )  # 2u / (1 + u) of 1, .75, .5, .25
    away = value_of(model, "dull grey")
    noises = []
    for i in range(CLIPS):
        states = torch.from_numpy(cache.states([i])[0].astype(np.float32))
        assert states.shape == (4, 4, 4, 6, 6)
        (caption,) = cache.row(i).captions
        guided = away + 3 * (value_of(model, caption) - away)
        noises.append(states[0])
        torch.testing.assert_close(states, (1 - levels) * guided + levels * states[0], rtol=2e-3, atol=4e-3)
        torch.testing.assert_close(cache.row(i).latents_FhwC, torch.full((4, 4, 6, 6), guided), **HALF)
    noise = torch.stack(noises)
    assert abs(float(noise.mean())) < 0.05
    assert abs(float(noise.std()) - 1) < 0.05
    assert len({float(one[0, 0, 0, 0]) for one in noise}) == CLIPS


@pytest.mark.parametrize("plan", ["text_to_video", "chunks"])
def test_the_walk_of_a_network_ends_where_generation_from_its_noise_does(
    plan: str, source: Cache, tmp_path: Path
) -> None:
    """With chunks: from a cache, each stage on its own."""
    model = toy_model("joint", plan)
    source_model = replace(model, tokenizer=source.tokenizer())
    make_pairs(student(), Teacher(source_model, "t"), source, tmp_path / "pairs", clips=3)
    cache = open_cache(tmp_path / "pairs")
    rows = cache.rows(range(3))
    sampling = Sampling(steps=8, shift=2.0, guidance=Guidance(3.0))
    task, _ = task_of(source_model, ClipRequest(tuple(row.captions[0] for row in rows)), sampling)
    start = torch.from_numpy(np.stack([cache.states([i])[0][0] for i in range(3)]).astype(np.float32))
    task = replace(task, noise={"video": patchify(start, model.patch)})
    seen: dict[float, list[Tensor]] = {}
    ended = rollout(
        source_model.predictor,
        source_model.plan,
        task,
        sampling,
        watch=lambda stage, step, sigma, states, clean: seen.setdefault(sigma, []).append(states["video"]),
    )["video"]
    torch.testing.assert_close(
        patchify(torch.stack([row.latents_FhwC for row in rows]), model.patch), ended, rtol=0.02, atol=0.03
    )
    third = patchify(torch.from_numpy(np.stack([x[2] for x in cache.states(range(3))])).float(), model.patch)
    (level,) = (sigma for sigma in seen if abs(sigma - student().distil.levels[2]) < 1e-6)
    torch.testing.assert_close(third, torch.cat(seen[level], dim=1), rtol=0.02, atol=0.03)
    assert ended.std() > 0.1


def test_the_manifest_says_how_the_states_came_about(made: Path, source: Cache) -> None:
    told = json.loads((made / "pairs.json").read_text())
    assert len(told["sigmas"]) == 9
    assert told["sigmas"][0] == 1.0
    assert told["sigmas"][-1] == 0.0
    assert told["kept"] == [0, 2, 4, 6]
    assert told["levels"] == [told["sigmas"][i] for i in told["kept"]]
    assert (told["solver"], told["shift"], told["path"], told["seed"]) == ("euler", 2.0, "linear", 0)
    assert (told["guidance"]["said"], told["guidance"]["form"], told["guidance"]["scale"]) == (
        3.0,
        "scale",
        3.0,
    )
    assert (told["negative"], told["teacher"]["where"]) == ("", "teacher")
    assert len(told["teacher"]["weights"]) == 64
    assert told["teacher"]["recipe"]["plan"]["type"] == "text_to_video"
    assert told["tokenizer"] == source.identity.tokenizer
    assert open_cache(made).pairs.levels == tuple(told["levels"])


def test_a_store_is_a_cache_like_its_source(made: Path, source: Cache) -> None:
    cache = open_cache(made)
    assert cache.identity.fingerprint == source.identity.fingerprint
    assert cache.tokenizer().fingerprint() == source.tokenizer().fingerprint()
    cache.require(toy_recipe())
    told = cache.metadata([4])[0]
    assert told | {"source": 0, "stamp": 0} == source.metadata([4])[0] | {"source": 0, "stamp": 0}
    assert not np.array_equal(cache.latents([4])[0], source.latents([4])[0])


def test_other_wordings_are_left_out_for_the_teacher_never_read_them(
    model: Model, world: list[ManifestEntry], tmp_path: Path
) -> None:
    several = [replace(entry, captions=("another way to say it",)) for entry in world[:2]]
    build_cache(toy_recipe(), several, tmp_path / "cache", tokenizer=model.tokenizer)
    source = open_cache(tmp_path / "cache")
    assert len(source.row(0).wordings) == 2
    make_pairs(student(), knowing(model), source, tmp_path / "pairs")
    assert open_cache(tmp_path / "pairs").row(0).wordings == ["a wave number 0"]


# From the store to the batch


def test_a_batch_brings_the_states_of_its_clips(made: Path, source: Cache) -> None:
    recipe = student(train={"batch_size": 3, "heldout_fraction": 0.0})
    cache = open_cache(made)
    batch = Loader(cache, recipe).batch(0)
    assert batch.states.keys() == {"video"}
    x = batch.states["video"]
    assert (x.shape, x.dtype) == ((3, 4, 4, 4, 6, 6), torch.float32)
    for b, id_ in enumerate(batch.ids):
        stored = cache.states([cache.ids.index(id_)])[0]
        assert torch.equal(x[b], torch.from_numpy(stored.astype(np.float32)))
    assert batch.to(torch.device("meta")).states["video"].is_meta
    assert Loader(source, recipe).batch(0).states == {}


def test_another_store_is_other_data_to_a_resumed_run(
    model: Model, source: Cache, made: Path, tmp_path: Path
) -> None:
    recipe = student()
    make_pairs(recipe, Teacher(model, "moved"), source, tmp_path / "same")
    make_pairs(recipe, Teacher(model, "teacher"), source, tmp_path / "other", seed=1)
    first, same, other = (
        Loader(open_cache(p), recipe).fingerprint() for p in (made, tmp_path / "same", tmp_path / "other")
    )
    assert first == same != other


def test_a_frozen_encoder_finds_its_embeddings(
    model: Model, world: list[ManifestEntry], tmp_path: Path
) -> None:
    frozen = {"text_encoder": {"trainable": False}}
    build_cache(toy_recipe(**frozen), world[:4], tmp_path / "cache", tokenizer=model.tokenizer)
    source = open_cache(tmp_path / "cache")
    recipe = student(**frozen, train={"batch_size": 2})
    make_pairs(recipe, knowing(model), source, tmp_path / "pairs")
    pairs = open_cache(tmp_path / "pairs")
    assert pairs.text is not None
    assert source.text is not None
    assert torch.equal(pairs.text.embed(["a wave number 3"])[0], source.text.embed(["a wave number 3"])[0])
    assert Loader(pairs, recipe).batch(0).text is not None
    # Another encoder than the source's: embedded anew.
    other = student(text_encoder={"trainable": False, "dim": 16}, train={"batch_size": 2})
    make_pairs(other, knowing(model), source, tmp_path / "other")
    text = Loader(open_cache(tmp_path / "other"), other).batch(0).text
    assert text is not None
    assert text.x_BLC.shape[-1] == 16


def test_sound_walks_beside_the_picture(tmp_path: Path) -> None:
    audio = {"enabled": True, "channels": 5, "latents_per_second": 8.0, "sample_rate": 8000}
    both = {"audio": audio, "plan": {"modalities": ["video", "audio"]}, "model": {"audio_dim": 8}}
    world = make_world(tmp_path / "clips", 4, height=16, width=24)
    for key, entry in enumerate(world):
        t = np.arange(12_000) / 8000
        with wave.open(str(tmp_path / f"{key}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8000)
            file.writeframes((9000 * np.sin((300 + 90 * key) * 6.28 * t**1.2)).astype(np.int16).tobytes())
        world[key] = replace(entry, audio=tmp_path / f"{key}.wav")
    model = toy_model(**both)
    build_cache(toy_recipe(**both), world, tmp_path / "cache", tokenizer=model.tokenizer)
    source = open_cache(tmp_path / "cache")
    heard = replace(model, audio_tokenizer=load_audio_tokenizer(tmp_path / "cache" / "audio_tokenizer"))
    teacher = knowing(heard, modalities=("video", "audio"))
    recipe = student(**both, train={"batch_size": 2, "heldout_fraction": 0.0})
    make_pairs(recipe, teacher, source, tmp_path / "pairs")
    cache = open_cache(tmp_path / "pairs")
    assert cache.verify() == []
    batch = Loader(cache, recipe).batch(0)
    x, clean = batch.states["audio"], batch.latents["audio"].x_BFHWC
    assert x.shape == (2, 4, 8, 1, 1, 5)  # a second at eight a second
    levels = torch.tensor(recipe.distil.levels)[:, None, None, None, None]
    torch.testing.assert_close(x, (1 - levels) * clean[:, None] + levels * x[:, :1], rtol=2e-3, atol=4e-3)
    # Who wants the picture alone leaves the sound out, and gets another cache.
    silent = student(train={"batch_size": 2})
    make_pairs(silent, teacher, source, tmp_path / "silent")
    assert not open_cache(tmp_path / "silent").has_sound
    assert Loader(open_cache(tmp_path / "silent"), silent).batch(0).states.keys() == {"video"}
    with pytest.raises(UserError, match=r"another audio tokenizer .* than .*cache"):
        make_pairs(recipe, knowing(model, modalities=("video", "audio")), source, tmp_path / "x")
    with pytest.raises(
        UserError, match=r"plan.modalities has audio, which distil.teacher teacher does not make"
    ):
        make_pairs(recipe, knowing(toy_model()), source, tmp_path / "y")


def test_shots_walk_with_their_captions_and_come_apart_in_windows(tmp_path: Path) -> None:
    scenes = {"plan": {"type": "scenes"}, "video": {"num_frames": 8}}
    model = toy_model(plan="scenes", video={"num_frames": 8})
    entries = []
    for key in range(2):
        path = make_clip(tmp_path / f"s{key}.mp4", key, frames=8, height=16, width=24)
        shots = (Scene(0.0, 0.5, f"shot one of {key}"), Scene(0.5, 1.0, f"then two of {key}"))
        entries.append(ManifestEntry(f"s{key}", path, f"all of {key}", scenes=shots))
    build_cache(toy_recipe(**scenes), entries, tmp_path / "cache", tokenizer=model.tokenizer)
    source = open_cache(tmp_path / "cache")
    assert source.row(0).bucket.shots == (4, 4)
    recipe = student(**scenes, train={"batch_size": 2, "heldout_fraction": 0.0}, stories={"shots": 1})
    make_pairs(recipe, Teacher(model, "t"), source, tmp_path / "pairs")
    cache = open_cache(tmp_path / "pairs")
    assert (cache.verify(), cache.row(1).captions) == ([], ["shot one of 1", "then two of 1"])
    batch = Loader(cache, recipe).batch(0)
    stored = [torch.from_numpy(x.astype(np.float32)) for x in cache.states([0, 1])]
    halves = [half for x in stored for half in (x[:, :2], x[:, 2:])]
    assert batch.states["video"].shape == (2, 4, 2, 4, 6, 6)
    assert all(any(torch.equal(x, half) for half in halves) for x in batch.states["video"])


def test_clips_that_the_teacher_cannot_make_are_skipped(
    model: Model, world: list[ManifestEntry], tmp_path: Path
) -> None:
    lengths = {"bucketing": {"enabled": True, "buckets": [[24, 16]], "frames": [6, 8]}}
    short = make_clip(tmp_path / "short.mp4", 50, frames=6, height=16, width=24)
    entries = [*world[:2], ManifestEntry("short", short, "a short one")]
    build_cache(toy_recipe(**lengths), entries, tmp_path / "cache", tokenizer=model.tokenizer)
    teacher = knowing(model, toy_recipe(model={"patch": [2, 1, 1]}))
    report = make_pairs(student(**lengths), teacher, open_cache(tmp_path / "cache"), tmp_path / "pairs")
    assert (report.made, report.clips) == (2, 2)
    (problem,) = report.skipped
    assert problem.where == "short"
    assert (
        "frames 6 does not fill latent cells and tokens of model.patch [2, 1, 1]: use 4 or 8" in problem.what
    )
    states = open_cache(tmp_path / "pairs").states([0])[0]
    assert states.shape == (4, 4, 4, 6, 6)


def test_damage_is_found(made: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(made, tmp_path / "pairs"))
    rows = rows_of(path)
    rows[1]["states"] = rows[1]["states"][:-2]
    spoiled = np.frombuffer(rows[3]["states"], np.float16).copy()
    spoiled[7] = np.nan
    rows[3]["states"] = spoiled.tobytes()
    schema = lance.dataset(str(path / "clips.lance")).schema
    lance.write_dataset(pa.Table.from_pylist(rows, schema), str(path / "clips.lance"), mode="overwrite")
    size = 4 * 4 * 4 * 6 * 6 * 2
    assert open_cache(path).verify() == [
        f"clip001: {size - 2} bytes of states where {size} are needed",
        "clip003: states that are not finite",
    ]
    (path / "pairs.json").write_text('{"format": 1, "levels": [1')
    with pytest.raises(UserError, match=r"pairs.json: cannot be read .* restore it") as error:
        open_cache(path).states([0])
    line_of(error)


# Again, in parts, by several


def stop_after(count: int) -> Callable[[str, int, int], None]:
    def on_progress(what: str, done: int, total: int) -> None:
        if done >= count:
            raise KeyboardInterrupt

    return on_progress


def test_a_stopped_run_goes_on_and_ends_with_the_same_rows_to_the_bit(
    model: Model, source: Cache, tmp_path: Path
) -> None:
    teacher, out = knowing(model, company=0.1), tmp_path / "pairs"
    make_pairs(student(), teacher, source, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        make_pairs(student(), teacher, source, out, on_progress=stop_after(1), commit_seconds=0)
    assert len(open_cache(out)) == 8
    assert open_cache(out).verify() == []
    # Rows that are lost are made again in the company that they had.
    lance.dataset(str(out / "clips.lance")).delete(f"id = '{open_cache(out).ids[3]}'")
    report = make_pairs(student(), teacher, source, out)
    assert (report.made, report.kept) == (3, 7)
    assert rows_of(out) == rows_of(tmp_path / "whole")
    again = make_pairs(student(), teacher, source, out)
    assert (again.made, again.kept, again.clips) == (0, CLIPS, CLIPS)


def test_a_new_caption_in_the_source_makes_its_clip_anew(
    model: Model, world: list[ManifestEntry], source: Cache, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(source.path, tmp_path / "cache"))
    make_pairs(student(), knowing(model), source, tmp_path / "pairs")
    changed = [replace(world[0], caption="something else"), *world[1:]]
    build_cache(toy_recipe(), changed, path)
    report = make_pairs(student(), knowing(model), open_cache(path), tmp_path / "pairs")
    assert (report.made, report.kept, report.clips) == (1, CLIPS - 1, CLIPS)
    assert open_cache(tmp_path / "pairs").row(0).captions == ["something else"]


def test_more_clips_come_to_those_that_are_there(model: Model, source: Cache, tmp_path: Path) -> None:
    def make(clips: int) -> PairsReport:
        return make_pairs(student(), knowing(model), source, tmp_path / "pairs", clips=clips)

    assert make(3).made == 3
    few = {row["id"]: row for row in rows_of(tmp_path / "pairs")}
    report = make(CLIPS + 2)
    assert (report.made, report.kept) == (CLIPS - 1, 3)
    many = {row["id"]: row for row in rows_of(tmp_path / "pairs")}
    assert few.items() <= many.items()
    # More than there are rows: the same captions from other noise.
    again = [id_ for id_ in many if id_.endswith("~1")]
    assert len(again) == 2
    for id_ in again:
        first = many[id_.removesuffix("~1")]
        assert many[id_]["clip"] == first["clip"]
        assert many[id_]["captions"] == first["captions"]
        assert many[id_]["states"] != first["states"]


def test_workers_at_once_leave_what_one_run_makes(model: Model, source: Cache, tmp_path: Path) -> None:
    """Of four at once each commits after every group: as many writers meet as can."""
    out, told = tmp_path / "pairs", [Share(n, 4) for n in range(1, 5)]

    def work(share: Share) -> int:
        return make_pairs(
            student(), knowing(model, company=0.1), source, out, clips=70, share=share, commit_seconds=0
        ).made

    with ThreadPoolExecutor(4) as workers:
        made = list(workers.map(work, told))
    assert sum(made) == 70
    assert sum(count > 0 for count in made) > 1
    make_pairs(student(), knowing(model, company=0.1), source, tmp_path / "alone", clips=70)
    assert rows_of(out) == rows_of(tmp_path / "alone")


WORKER = """
import sys, time, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_pairs import *
def on_progress(what, done, total):
    print(done, flush=True)
    time.sleep({pause} if done else 0)
make_pairs(student(), Teacher(toy_model(), "teacher"), open_cache({source!r}), {out!r},
           clips=40, share=Share.parse({share!r}), on_progress=on_progress, commit_seconds=0)
"""


@pytest.mark.slow
def test_of_two_workers_one_may_be_killed(model: Model, source: Cache, tmp_path: Path) -> None:
    teacher, out = Teacher(model, "teacher"), tmp_path / "pairs"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(share: str, pause: float) -> subprocess.Popen[str]:
        facts = {"tests": str(Path(__file__).parent), "source": str(source.path), "out": str(out)}
        script = [sys.executable, "-c", WORKER.format(**facts, share=share, pause=pause)]
        return subprocess.Popen(script, env=environment, stdout=subprocess.PIPE, text=True)

    doomed, other = start("1/2", 600), start("2/2", 0)
    assert doomed.stdout is not None
    assert any(int(line) > 0 for line in doomed.stdout), "it ended before it had made one"
    os.kill(doomed.pid, signal.SIGKILL)
    doomed.communicate()
    assert other.communicate(timeout=120)[0]
    assert other.returncode == 0
    survivors = open_cache(out)
    assert 0 < len(survivors) < 40
    assert survivors.verify() == []
    # The lock of the dead is no lock.
    left = make_pairs(student(), teacher, source, out, clips=40, share=Share(1, 2))
    assert left.made > 0
    assert left.clips == 40
    make_pairs(student(), teacher, source, tmp_path / "alone", clips=40)
    assert rows_of(out) == rows_of(tmp_path / "alone")


def test_shares_are_held_by_one_each(model: Model, source: Cache, tmp_path: Path) -> None:
    out, teacher = tmp_path / "pairs", knowing(model)
    make_pairs(student(), teacher, source, out, share=Share(1, 3))
    with locked(out):
        held = Held(out, Share(2, 3))
    with pytest.raises(UserError, match=r"another run makes this share \(2/3\); wait") as same:
        make_pairs(student(), teacher, source, out, share=Share(2, 3))
    with pytest.raises(UserError, match=r"worker 2/3 is at work there, and 1/2 would divide") as divided:
        make_pairs(student(), teacher, source, out, share=Share(1, 2))
    line_of(same)
    line_of(divided)
    make_pairs(student(), teacher, source, out, share=Share(1, 3))
    with locked(out):
        assert held.release()
    made = [make_pairs(student(), teacher, source, out, share=Share(n, 3)) for n in (2, 3)]
    assert made[-1].clips == CLIPS
    assert sorted(p.name for p in out.glob(".worker*")) == []


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_a_share_is_written_as_one_of_several(text: str) -> None:
    with pytest.raises(UserError, match=r"--worker .*: write I/N") as error:
        Share.parse(text)
    line_of(error)


# What is skipped and what is refused


def test_a_walk_to_nowhere_is_skipped_listed_and_counted(model: Model, source: Cache, tmp_path: Path) -> None:
    bad = value_of(model, "a wave number 4")
    teacher = knowing(model, spoiled=lambda value_B: (value_B - bad).abs() < 1e-4)
    report = make_pairs(student(), teacher, source, tmp_path / "pairs")
    assert (report.made, report.skipped.skipped, report.clips) == (CLIPS - 1, 1, CLIPS - 1)
    assert report.lines()[-1] == "skipped 1 of 10 clips: 1 NaN walk"
    (line,) = (tmp_path / "pairs" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["where"] == "clip004"
    assert open_cache(tmp_path / "pairs").verify() == []
    nowhere = knowing(model, spoiled=lambda value_B: value_B == value_B)
    with pytest.raises(UserError, match="not one of 10 clips could be made; the first: clip") as error:
        make_pairs(student(), nowhere, source, tmp_path / "none")
    line_of(error)


OTHERWISE: dict[str, tuple[dict[str, Any], int, str]] = {
    "grid": ({"grid_steps": 16}, 0, "distil.grid_steps is 8 there and 16 here"),
    "levels": ({"num_steps": 2}, 0, "the levels (distil) is [1,0.85714287,0.66666669,0.40000001] there and"),
    "shift": ({"shift": 3.0}, 0, "distil.shift is 2 there and 3 here"),
    "solver": ({"grid_solver": "heun"}, 0, "distil.grid_solver is euler there and heun here"),
    "guidance": ({"guidance": 4.0}, 0, "guidance, as u + scale (c - u) is 3 there and 4 here"),
    "negative": ({"negative": "dull"}, 0, "distil.negative is '' there and dull here"),
    "seed": ({}, 5, "--seed is 0 there and 5 here"),
}


@pytest.mark.parametrize("key", OTHERWISE)
def test_a_store_is_not_continued_otherwise(key: str, model: Model, made: Path, source: Cache) -> None:
    distil, seed, said = OTHERWISE[key]
    before = rows_of(made)
    with pytest.raises(UserError) as error:
        make_pairs(student(distil=distil), Teacher(model, "teacher"), source, made, seed=seed)
    assert said in line_of(error)
    assert "cannot be continued" in str(error.value)
    assert rows_of(made) == before


def test_another_teacher_does_not_continue_but_guidance_may_be_said_otherwise(
    model: Model, made: Path, source: Cache
) -> None:
    other = toy_model()
    assert isinstance(other.predictor.backbone, nn.Module)
    with torch.no_grad():
        next(iter(other.predictor.backbone.parameters())).view(-1)[0] += 1e-3
    with pytest.raises(UserError, match=r"the teacher \(its weights\) is .* there and .* here"):
        make_pairs(student(), Teacher(other, "teacher"), source, made)
    delta = student(distil={"guidance": 2.0, "guidance_form": "delta"})
    assert make_pairs(delta, Teacher(model, "elsewhere"), source, made).kept == CLIPS


def test_levels_beside_the_grid_are_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="do not lie on the teacher's grid") as error:
        levels_on_grid(student(distil={"num_steps": 3, "grid_steps": 8}).distil)
    said = line_of(error)
    assert "0.8 is none of its points" in said
    assert "distil.grid_steps=9" in said
    mended = said.split("distil.sigmas=")[1].split(" ")[0]
    again = student(distil={"sigmas": json.loads(mended), "grid_steps": 8})
    assert levels_on_grid(again.distil) == (0, 3, 5)
    # CausVid's list on its grid of 50 steps at shift 8: points 0, 36 and 44.
    causvid = {"grid_steps": 50, "shift": 8.0, "sigmas": [1.0, 0.7567567568, 0.5217391304]}
    assert levels_on_grid(student(distil=causvid).distil) == (0, 36, 44)
    with pytest.raises(
        UserError, match=r"0.757 is none of its points; set distil.sigmas=\[1,0.7567567\d*,0.52"
    ):
        levels_on_grid(student(distil={**causvid, "sigmas": [1.0, 0.757, 0.522]}).distil)


def test_a_student_of_other_levels_is_refused(made: Path, source: Cache) -> None:
    pairs = open_cache(made)
    require_levels(pairs, student().distil.levels)
    with pytest.raises(UserError, match=r"holds no states of a teacher, which train.method ode") as none:
        require_levels(source, student().distil.levels)
    assert f"motionloom pairs RECIPE --cache {source.path}" in line_of(none)
    with pytest.raises(
        UserError, match=r"holds states at the levels \[1,0.857\d*,0.666\d*,0.4\d*\]"
    ) as other:
        require_levels(pairs, student(distil={"num_steps": 3}).distil.levels)
    mended = line_of(other).split("distil.sigmas=")[1].split(",  ")[0].split(", ")[0]
    require_levels(pairs, student(distil={"sigmas": json.loads(mended)}).distil.levels)
    with pytest.raises(UserError, match=r"states of the linear path, and flow_matching.path is cosine"):
        require_levels(pairs, student().distil.levels, "cosine")


def test_what_does_not_go_together_is_refused(
    model: Model, world: list[ManifestEntry], source: Cache, made: Path, tmp_path: Path
) -> None:
    def refused(match: str, recipe: Recipe, teacher: Teacher, cache: Cache, out: Path) -> None:
        with pytest.raises(UserError, match=match) as error:
            make_pairs(recipe, teacher, cache, out)
        line_of(error)

    out, teacher = tmp_path / "out", knowing(model)
    build_cache(toy_recipe(), world, tmp_path / "fitted")
    refused("has another tokenizer", student(), teacher, open_cache(tmp_path / "fitted"), out)
    ddpm = Teacher(replace(model, recipe=toy_recipe(train={"objective": "ddpm_v"})), "ddpm")
    refused("distil.teacher ddpm was trained as DDPM", student(), ddpm, source, out)
    cosine = Teacher(replace(model, recipe=toy_recipe(flow_matching={"path": "cosine"})), "t")
    refused("flow_matching.path is cosine in distil.teacher t and linear", student(), cosine, source, out)
    refused(
        "video.num_frames is 8 in the cache and 12 in the recipe",
        student(video={"num_frames": 12}),
        teacher,
        source,
        out,
    )
    assert not out.exists()
    refused("is the cache whose captions are taken", student(), teacher, source, source.path)
    plain = Path(shutil.copytree(source.path, tmp_path / "plain"))
    refused("is a cache of clips and holds no pairs", student(), teacher, source, plain)
    (tmp_path / "file").write_text("x")
    refused("is a file; name a folder", student(), teacher, source, tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("x")
    refused(
        r"is not a cache and not empty \(it holds notes.txt\)", student(), teacher, source, tmp_path / "full"
    )
    with pytest.raises(UserError, match=r"holds a teacher's pairs .* not clips; name another folder"):
        build_cache(toy_recipe(), world, made)


def test_a_kill_before_the_first_row_is_made_good(model: Model, source: Cache, tmp_path: Path) -> None:
    """Each file of a new store may be the last that was written."""
    whole = tmp_path / "whole"
    make_pairs(student(), knowing(model), source, whole, clips=2)
    for missing in (
        ["cache.json", "tokenizer", "clips.lance", "skipped.jsonl"],
        ["clips.lance"],
        ["tokenizer"],
    ):
        cut = Path(shutil.copytree(whole, tmp_path / f"cut{len(missing)}{missing[0]}"))
        if missing == ["tokenizer"]:
            (cut / "tokenizer").rename(cut / ".tokenizer.new")
        for name in missing:
            shutil.rmtree(cut / name, ignore_errors=True)
            (cut / name).unlink(missing_ok=True)
        make_pairs(student(), knowing(model), source, cut, clips=2)
        assert rows_of(cut) == rows_of(whole)
        assert open_cache(cut).tokenizer().fingerprint() == source.identity.tokenizer


def test_what_does_not_fit_into_memory_is_halved() -> None:
    wish = Wish(tuple("abcde"), (("x",),) * 5, ("",) * 5, Bucket(24, 16, 8), (8,), 8.0)

    def make(most: int) -> Callable[[Wish], Any]:
        def walk(some: Wish) -> Any:
            if len(some.ids) > most:
                raise RuntimeError("CUDA out of memory. Tried to allocate 3 GiB")
            return "walked"

        return walk

    assert ["".join(part.ids) for part, _ in in_halves(make(2), wish)] == ["ab", "c", "de"]
    with pytest.raises(UserError, match="a: one clip of 24x16x8 and its teacher do not fit") as error:
        in_halves(make(0), wish)
    line_of(error)

    def broken(some: Wish) -> Any:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        in_halves(broken, wish)


def test_a_damaged_note_is_one_line(made: Path, tmp_path: Path) -> None:
    for text in ("", "[]", '{"format": 9}', '{"format": 1, "levels": []}', "\x00"):
        (tmp_path / "pairs.json").write_text(text)
        with pytest.raises(UserError, match=r"pairs.json: (cannot be read|is of format 9)") as error:
            PairsNote.read(tmp_path)
        line_of(error)
