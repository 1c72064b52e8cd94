"""Adherence, nearest clips, inspection figures and the page."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cached import make_world
from motionloom.data.cache import build_cache, open_cache
from motionloom.data.manifest import ManifestEntry
from motionloom.data.shapeworld import Facts, World, parse, render_video
from motionloom.data.windows import cut_into_windows
from motionloom.evals.adherence import held_out_prompts, judge
from motionloom.evals.inspection import inspect_cache, inspect_model, inspect_recipe, memory, sheet_clips
from motionloom.evals.nearest import nearest_clips
from motionloom.rng import numpy_rng, torch_generator
from motionloom.studio.page import Chart, Page, Sample, Table, Tile, line_chart, write_page
from motionloom.tokenizers import TokenizerSpec
from toy_model import toy_model, toy_recipe

WORLDS = [World.quickstart(), World.full()]


# Adherence


@pytest.mark.parametrize("world", WORLDS, ids=["quickstart", "full"])
def test_prompts_are_of_combinations_that_training_never_holds(world: World) -> None:
    prompts = held_out_prompts(world, 128, seed=3)
    assert len(prompts) == 128
    assert not {what.objects[0].combination for _, what in prompts} & set(world.combinations("train"))
    assert all(parse(prompt) == what for prompt, what in prompts)


@pytest.mark.parametrize("count", [1, 7, 128, 300])
def test_prompts_are_spread_evenly(count: int) -> None:
    world = World.quickstart()
    prompts = held_out_prompts(world, count, seed=0)
    used = Counter(what.objects[0].combination for _, what in prompts)
    most, least = max(used.values()), min(used[c] for c in world.combinations("test"))
    assert sum(used.values()) == count
    assert most - least <= 1
    settings = Counter((what.objects[0].size, what.background) for _, what in prompts)
    assert max(settings.values()) - min(settings.values()) <= 1 + count / len(world.combinations("test"))


def test_prompts_follow_the_seed() -> None:
    world = World.quickstart()
    assert held_out_prompts(world, 9, 0) == held_out_prompts(world, 9, 0)
    assert held_out_prompts(world, 9, 0) != held_out_prompts(world, 9, 1)


def rendered(world: World, wanted: list[Facts]) -> list[np.ndarray]:
    rng = numpy_rng("evals tests")
    return [render_video(world.stage(what.objects, what.background, rng)) for what in wanted]


def test_perfect_clips_obey_and_swapped_captions_do_not() -> None:
    world = World.quickstart()
    wanted = [what for _, what in held_out_prompts(world, 57, seed=0)]
    clips = rendered(world, wanted)
    rates = judge(clips, wanted, world).rates()
    assert rates == dict.fromkeys(("color", "shape", "motion", "size", "background", "all"), 1.0)
    # Neighbours differ in most attributes.
    swapped = judge(clips, [*wanted[1:], wanted[0]], world).rates()
    assert swapped["all"] <= 0.05
    assert all(swapped[name] < 0.6 for name in ("color", "shape", "motion"))


def test_all_is_the_three_of_one_clip_at_once() -> None:
    world = World.quickstart()
    wanted = [what for _, what in held_out_prompts(world, 6, seed=0)]
    clips = rendered(world, wanted)
    other = {"red": "blue"}
    wrong_color = [
        Facts((replace(w.objects[0], color=other.get(w.objects[0].color, "red")),), w.background)
        for w in wanted[:3]
    ]
    result = judge(clips, [*wrong_color, *wanted[3:]], world)
    assert (result.rates()["color"], result.rates()["shape"], result.rates()["all"]) == (0.5, 1.0, 0.5)
    assert [clip["color"] for clip in result.obeyed] == [False] * 3 + [True] * 3


# Nearest clips


def test_a_copy_is_found_at_distance_zero() -> None:
    generator = torch_generator("nearest tests")
    training = torch.randint(0, 256, (60, 12, 24, 40, 3), generator=generator, dtype=torch.uint8)
    found = nearest_clips(training[[41, 0, 59]], training)
    assert [(near.index, near.distance) for near in found] == [(41, 0.0), (0, 0.0), (59, 0.0)]


def test_distances_are_in_levels() -> None:
    grey = torch.full((8, 16, 16, 3), 100, dtype=torch.uint8)
    training = [grey - 40, grey + 30, grey + 200 - 100]
    (near,) = nearest_clips([grey], training)
    assert (near.index, round(near.distance, 3)) == (1, 30.0)


def test_clips_of_other_sizes_are_compared() -> None:
    video = torch.from_numpy(render_video(World.quickstart().sample(0, 0)))
    larger = video.repeat_interleave(2, 1).repeat_interleave(2, 2)[::2]
    (near,) = nearest_clips([larger], [255 - video, video])
    assert near.index == 1
    assert near.distance < 10


# Inspection


def test_a_recipes_figures() -> None:
    recipe = toy_recipe(
        bucketing={"enabled": True, "buckets": [[24, 16], [16, 8]], "frames": [4, 8]},
        model={"patch": [1, 2, 2]},
        train={"batch_size": 3, "grad_accum_steps": 2},
    )
    model = toy_model()
    backbone = model.predictor.backbone
    assert isinstance(backbone, nn.Module)
    answer = inspect_recipe(recipe, TokenizerSpec(6, 4, 2), {"backbone": backbone})
    counted = sum(p.numel() for p in backbone.parameters())
    assert answer["parameters"] == {"backbone": counted, "total": counted}
    rows = {row["bucket"]: row for row in answer["buckets"]}
    assert list(rows) == ["16x8x4", "16x8x8", "24x16x4", "24x16x8"]
    assert rows["24x16x8"]["latent"] == [4, 4, 6, 6]
    assert (rows["24x16x8"]["tokens"], rows["24x16x8"]["seconds"]) == (24, 1.0)
    assert rows["24x16x8"]["pixels_per_latent_number"] == 4 * 4 * 2 * 3 / 6
    assert answer["tokens_per_step"] == 3 * 2 * 24


def test_memory_follows_what_is_switched_on() -> None:
    recipe = toy_recipe(train={"batch_size": 4})
    parts = memory(recipe, 2**28, most_tokens=96, text_tokens=12)
    assert (parts["weights"], parts["gradients"], parts["optimiser"], parts["ema"]) == (1, 1, 2, 1)
    assert parts["total"] == pytest.approx(5 + parts["activations"])
    assert memory(toy_recipe(ema={"enabled": False}), 2**28, 96, 12)["ema"] == 0
    deep, shallow = (
        memory(toy_recipe(model={"depth": 8, "checkpoint_blocks": on}), 1, 96, 12) for on in (False, True)
    )
    assert shallow["activations"] < deep["activations"]


def test_a_checkpoints_figures() -> None:
    model = toy_model()
    answer = inspect_model(model, 7, "somewhere")
    assert (answer["kind"], answer["step"], answer["folder"]) == ("checkpoint", 7, "somewhere")
    assert answer["tokenizer"] == model.tokenizer.fingerprint()
    assert answer["parameters"]["text_encoder"] == 12 * (256 + 12)


def test_a_caches_figures_and_sheet(tmp_path: Path) -> None:
    entries = make_world(tmp_path / "clips", 5, height=16, width=24)
    build_cache(toy_recipe(), entries, tmp_path / "cache")
    cache = open_cache(tmp_path / "cache")
    answer = inspect_cache(cache)
    assert (answer["clips"], answer["fps"], answer["buckets"]) == (5, 8.0, {"24x16x8": 5})
    assert answer["problems"] == []
    assert answer["bytes"] > 0
    clips, captions = sheet_clips(cache, most=3)
    assert captions == [entries[i].caption for i in (0, 2, 4)]
    assert clips[0].shape == (8, 16, 24, 3)
    assert clips[0].dtype == np.uint8


# Windows


def entry(**fields: object) -> ManifestEntry:
    return ManifestEntry("long", Path("long.mp4"), "a wave", fps=8.0, **fields)  # type: ignore[arg-type]


def test_long_clips_are_cut_into_windows() -> None:
    cut = cut_into_windows([entry(frames=41)], seconds=2.0)
    assert [(e.id, e.start, e.end) for e in cut] == [("long__w00", 0.0, 2.0), ("long__w01", 2.0, 4.0)]
    part = cut_into_windows([entry(frames=80, start=1.0, end=5.0)], seconds=2.0)
    assert [(e.start, e.end) for e in part] == [(1.0, 3.0), (3.0, 5.0)]


@pytest.mark.parametrize("fields", [{"frames": 31}, {"frames": 1}, {"frames": None}])
def test_short_clips_stills_and_unknown_lengths_stay(fields: dict) -> None:
    assert cut_into_windows([entry(**fields)], seconds=2.0) == [entry(**fields)]


# The page


def page(**changes: object) -> Page:
    sample = Sample("<b>a red star</b>", "clips/0.webp", "clips/0_nearest.webp", "12 levels", {"color": True})
    plain = {
        "title": "A run",
        "subtitle": "of a test",
        "tiles": [Tile("steps", "12")],
        "samples": [sample],
        "samples_title": "Clips",
        "samples_note": "Left: made.",
        "charts": [Chart("Loss", "by step", line_chart({"train": [(1, 2.0), (2, 1.0)]}, "step"))],
        "tables": [Table("Time", ("stage", "seconds"), [("train", "3")])],
        "commands": "motionloom doctor runs/x",
    }
    return Page(**{**plain, **changes})  # type: ignore[arg-type]


def test_the_page_shows_everything_and_escapes_prompts(tmp_path: Path) -> None:
    write_page(page(), tmp_path / "new" / "index.html")
    html = (tmp_path / "new" / "index.html").read_text()
    for part in ("A run", "12 levels", "clips/0.webp", "<svg", "motionloom doctor runs/x", "✓ color"):
        assert part in html, part
    assert "&lt;b&gt;a red star" in html
    assert "<b>a red" not in html
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["index.html"], "nothing temporary is left"


def test_a_chart_leaves_out_what_is_not_a_number() -> None:
    chart = line_chart(
        {"<train>": [(1, 2.0), (2, float("nan")), (3, 1.0), (4, float("inf"))], "none": []}, "step"
    )
    assert chart.count("<polyline") == 1
    assert "nan" not in chart
    assert "&lt;train&gt;" in chart
    assert "<polyline" not in line_chart({}, "step")
