"""The loader: who is in which batch, that a restart finds its place, and what a batch holds."""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cached import FPS, make_clip, make_world, recipe
from motionloom.config.recipe import Recipe
from motionloom.data.batch import Batch
from motionloom.data.cache import Cache, build_cache, open_cache
from motionloom.data.loader import Loader, heldout_clips
from motionloom.data.manifest import ManifestEntry, Scene
from motionloom.data.order import Order
from motionloom.errors import UserError
from motionloom.text import build_text_encoder, encode_scenes

BUCKETS = {"enabled": True, "buckets": [(32, 32), (64, 32)]}


def bucketed(**sections) -> Recipe:
    return recipe(bucketing=BUCKETS, **sections)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """13 square clips, 6 wide ones and a story of two scenes; with embeddings of the frozen hash encoder."""
    root = tmp_path_factory.mktemp("loader")
    square = make_world(root / "square", 13)
    wide = [replace(e, id="wide" + e.id) for e in make_world(root / "wide", 6, width=64)]
    square[0] = replace(square[0], captions=("another wording", "a third"))
    scenes = (Scene(0.0, 0.5, "first a wave"), Scene(0.5, 1.0, "then another"))
    story = ManifestEntry("story", make_clip(root / "story.mp4", 50), "all", scenes=scenes)
    build_cache(bucketed(text_encoder={"trainable": False}), [*square, *wide, story], root / "cache")
    return open_cache(root / "cache")


def take(loader: Loader, count: int, start: int = 0) -> list[Batch]:
    return list(itertools.islice(loader.batches(start), count))


def equal(a: Batch, b: Batch) -> bool:
    tensors = ("x_BFHWC", "seconds_BF", "scene_BF")
    same = all(torch.equal(getattr(a.video, name), getattr(b.video, name)) for name in tensors)
    return same and a.ids == b.ids and a.captions == b.captions


# The order


@pytest.mark.parametrize("batch", [1, 3, 4, 7, 50])
def test_every_pass_takes_each_sample_once(batch: int) -> None:
    counts = {"a": 13, "b": 4, "c": 0, "d": 1}
    order = Order(counts, batch, seed=1)
    lines: dict[str, list[int]] = {name: [] for name in counts}
    epochs = 60
    for n in range(order.batches_through(epochs)):
        name, samples = order.batch(n)
        assert len(samples) == batch
        lines[name].extend(samples.tolist())
    for name, count in counts.items():
        line = lines[name]
        assert len(line) == epochs * count // batch * batch, "all but what is left for the next epoch"
        for begin in range(0, len(line) - count + 1, count or 1):
            assert sorted(line[begin : begin + count]) == list(range(count))


def test_order_is_random_and_a_function_of_the_seed() -> None:
    counts = {"a": 40, "b": 40}
    first = [Order(counts, 4, seed=1).batch(n) for n in range(40)]
    again = Order(counts, 4, seed=1)
    backwards = [again.batch(n) for n in reversed(range(40))][::-1]
    assert [(name, s.tolist()) for name, s in first] == [(name, s.tolist()) for name, s in backwards]
    other = [Order(counts, 4, seed=2).batch(n) for n in range(40)]
    assert [s.tolist() for _, s in first] != [s.tolist() for _, s in other]
    names = [name for name, _ in first[:20]]
    assert Counter(names) == {"a": 10, "b": 10}
    assert names not in (sorted(names), sorted(names, reverse=True)), "buckets are mixed"
    passes = [np.concatenate([s for name, s in first[i : i + 20] if name == "a"]) for i in (0, 20)]
    assert passes[0].tolist() != passes[1].tolist()


@pytest.mark.parametrize("batch", [1, 5, 64, 1000])
def test_epoch_of_a_batch(batch: int) -> None:
    order = Order({"a": 13, "b": 100, "c": 1}, batch, seed=0)
    ends = [order.batches_through(e) for e in range(200)]
    for n in range(min(300, ends[-1])):
        epoch = order.epoch_of(n)
        assert ends[epoch] <= n < ends[epoch + 1]


def test_far_batches_are_found_at_once() -> None:
    order = Order({"a": 100_000, "b": 7}, 64, seed=0)
    began = time.perf_counter()
    name, samples = order.batch(10**7)
    assert time.perf_counter() - began < 0.5
    assert samples.max() < {"a": 100_000, "b": 7}[name]


# Restart, ranks, threads


@pytest.mark.parametrize("workers", [0, 3])
def test_restart_anywhere_gives_the_same_batches(cache: Cache, workers: int) -> None:
    settings = bucketed(num_workers=workers)
    straight = take(Loader(cache, settings), 25)
    for start in (0, 1, 7, 20):
        again = take(Loader(cache, settings), 25 - start, start)
        assert all(equal(a, b) for a, b in zip(straight[start:], again, strict=True))


def test_threads_change_nothing_and_end(cache: Cache) -> None:
    one, many = (take(Loader(cache, bucketed(num_workers=w)), 12) for w in (0, 4))
    assert all(equal(a, b) for a, b in zip(one, many, strict=True))
    before = threading.active_count()
    batches = Loader(cache, bucketed(num_workers=4)).batches()
    next(batches)
    batches.close()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_a_process_that_stops_in_the_middle_ends(cache: Cache) -> None:
    """Reading threads must not hold a finished run open, and nobody hears of JAX."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from cached import recipe\n"
        "from motionloom.data.cache import open_cache\n"
        "from motionloom.data.loader import Loader\n"
        "buckets = {'enabled': True, 'buckets': [(32, 32), (64, 32)]}\n"
        "batches = Loader(open_cache(sys.argv[2]), recipe(bucketing=buckets)).batches()\n"
        "print(next(batches).ids)"
    )
    args = [sys.executable, "-c", code, str(Path(__file__).parent), str(cache.path)]
    done = subprocess.run(args, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(take(Loader(cache, bucketed()), 1)[0].ids)
    assert done.stderr == ""


def test_examples_show_every_shape_that_training_will_see(cache: Cache) -> None:
    loader = Loader(cache, bucketed())
    examples = loader.examples()
    shapes = {name: tuple(batch.video.x_BFHWC.shape) for name, batch in examples.items()}
    assert set(shapes) == {row.shape for row in loader.report()}
    assert {tuple(batch.video.x_BFHWC.shape) for batch in take(loader, 40)} == set(shapes.values())


def test_ranks_share_each_batch(cache: Cache) -> None:
    together = take(Loader(cache, bucketed(train={"batch_size": 4})), 30)
    parts = [take(Loader(cache, bucketed(train={"batch_size": 2}), rank, 2), 30) for rank in (0, 1)]
    for whole, *split in zip(together, *parts, strict=True):
        assert whole.ids == split[0].ids + split[1].ids
        assert split[0].video.x_BFHWC.shape == split[1].video.x_BFHWC.shape
        within_a_pass = len(set(whole.ids)) == 4
        if within_a_pass:
            assert not set(split[0].ids) & set(split[1].ids)
    assert sum(len(set(batch.ids)) == 4 for batch in together) > 15


# The splits


def test_splits_are_disjoint_and_complete(cache: Cache) -> None:
    train, heldout = Loader(cache, bucketed()), Loader(cache, bucketed(), split="heldout")
    assert train.clips + heldout.clips == len(cache) == 20
    seen = {id_ for batch in take(train, 60) for id_ in batch.ids}
    kept = [id_ for batch in heldout.batches() for id_ in batch.ids]
    assert len(kept) == len(set(kept)) == heldout.clips > 0
    assert seen.isdisjoint(kept)
    assert seen | set(kept) == set(cache.ids), "nothing is lost"
    assert len(list(heldout.batches())) == len(heldout)
    assert [b.ids for b in heldout.batches(1)] == [b.ids for b in heldout.batches()][1:]
    assert list(heldout.batches(len(heldout))) == []


def test_heldout_ranks_see_equally_many_batches(cache: Cache) -> None:
    settings = bucketed(train={"batch_size": 2, "heldout_fraction": 0.5})
    alone = Loader(cache, settings, split="heldout")
    ranks = [Loader(cache, settings, rank, 3, split="heldout") for rank in range(3)]
    batches = [list(loader.batches()) for loader in ranks]
    assert len({len(found) for found in batches}) == 1
    for together in zip(*batches, strict=True):
        assert len({batch.video.x_BFHWC.shape for batch in together}) == 1
    everywhere = {id_ for found in batches for batch in found for id_ in batch.ids}
    assert everywhere == {id_ for batch in alone.batches() for id_ in batch.ids}


def test_heldout_clips() -> None:
    ids = [f"clip{i}" for i in range(2000)]
    chosen = heldout_clips(ids, 0.05)
    assert 60 < len(chosen) < 140
    assert heldout_clips(list(reversed(ids)), 0.05) == chosen
    assert heldout_clips(ids[:1000], 0.05) == chosen & set(ids[:1000]), (
        "more clips move none to the other side"
    )
    assert heldout_clips(ids, 0.0) == set()
    assert len(heldout_clips(["a", "b"], 0.001)) == 1
    assert len(heldout_clips(["a", "b", "c"], 1.0)) == 2
    assert heldout_clips(["a"], 0.5) == set()
    assert heldout_clips(["a", "a", "a"], 0.5) == set(), "crops of one clip are one clip"


def test_crops_stay_together(tmp_path: Path) -> None:
    world = make_world(tmp_path / "clips", 4, width=64)
    crops = recipe(preprocess={"crop": "shifted", "num_crops": 3}, train={"heldout_fraction": 0.4})
    build_cache(crops, world, tmp_path / "cache")
    cache = open_cache(tmp_path / "cache")
    heldout = [id_ for batch in Loader(cache, crops, split="heldout").batches() for id_ in batch.ids]
    train = {id_ for batch in take(Loader(cache, crops), 20) for id_ in batch.ids}
    assert {id_[:7] for id_ in heldout}.isdisjoint({id_[:7] for id_ in train})
    assert len(heldout) % 3 == 0


# Reports and refusals


def test_report_counts_every_clip(cache: Cache) -> None:
    loader = Loader(cache, bucketed(train={"batch_size": 4, "heldout_fraction": 0.0}))
    report = {row.shape: row for row in loader.report()}
    assert report.keys() == {"32x32x8", "64x32x8"}
    assert (report["32x32x8"].clips, report["32x32x8"].batches, report["32x32x8"].dropped) == (14, 3.5, 0)
    assert report["32x32x8"].why == "each once per epoch; 2 left over open the next"
    assert (report["64x32x8"].clips, report["64x32x8"].batches) == (6, 1.5)
    heldout = Loader(cache, bucketed(), split="heldout")
    assert sum(row.clips for row in heldout.report()) == heldout.clips
    assert sum(row.batches for row in heldout.report()) == len(heldout)


def test_a_bucket_smaller_than_a_batch_still_trains(cache: Cache) -> None:
    loader = Loader(cache, bucketed(train={"batch_size": 64, "heldout_fraction": 0.0}))
    why = {row.shape: row.why for row in loader.report()}
    assert why["64x32x8"] == "fewer than a batch of 64 over all ranks: clips repeat within it"
    batches = take(loader, 4)
    assert {len(batch.ids) for batch in batches} == {64}
    wide = Counter(next(b for b in take(loader, 20) if b.video.x_BFHWC.shape[3] == 8).ids)
    assert len(wide) == 6
    assert max(wide.values()) - min(wide.values()) <= 1


def test_one_clip_is_enough(tmp_path: Path) -> None:
    build_cache(recipe(), make_world(tmp_path / "clips", 1), tmp_path / "cache")
    cache = open_cache(tmp_path / "cache")
    assert take(Loader(cache, recipe()), 2)[1].ids == ["clip000"] * 4
    assert len(Loader(cache, recipe(), split="heldout")) == 0


def test_the_cache_of_another_recipe_is_refused(cache: Cache) -> None:
    with pytest.raises(UserError, match=r"video\.fps is 8\.0 in the cache and 12\.0 in the recipe"):
        Loader(cache, bucketed(video={"fps": 12.0}))


def test_embeddings_of_another_encoder_are_refused(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"another encoder: text_encoder\.dim is 16 in the cache and 8 in the"
    ):
        Loader(cache, bucketed(text_encoder={"trainable": False, "dim": 8}))
    with pytest.raises(UserError, match="seed is 7 in the cache and 8 in the recipe"):
        Loader(cache, bucketed(seed=8, text_encoder={"trainable": False}))
    world = make_world(tmp_path / "clips", 2)
    build_cache(recipe(), world, tmp_path / "cache")
    with pytest.raises(UserError, match="holds no text embeddings"):
        Loader(open_cache(tmp_path / "cache"), recipe(text_encoder={"trainable": False}))


def test_captions_without_embedding_are_refused(tmp_path: Path) -> None:
    frozen, world = recipe(text_encoder={"trainable": False}), make_world(tmp_path / "clips", 3)
    build_cache(frozen, world, tmp_path / "cache")
    build_cache(recipe(), [replace(world[1], caption="new")], tmp_path / "cache")
    with pytest.raises(UserError, match=r"1 captions have no embedding .first: 'new'."):
        Loader(open_cache(tmp_path / "cache"), frozen)


def test_fingerprint_follows_what_decides_the_order(cache: Cache) -> None:
    first = Loader(cache, bucketed()).fingerprint()
    assert Loader(cache, bucketed(num_workers=0, train={"lr": 1.0})).fingerprint() == first
    assert Loader(cache, bucketed(train={"batch_size": 2}), 1, 2).fingerprint() == first
    assert Loader(cache, bucketed(seed=1)).fingerprint() != first
    assert Loader(cache, bucketed(train={"batch_size": 5})).fingerprint() != first
    assert Loader(cache, bucketed(train={"heldout_fraction": 0.5})).fingerprint() != first


# What a batch holds


def test_batches_hold_the_cached_rows(cache: Cache) -> None:
    for batch in take(Loader(cache, bucketed()), 10):
        assert batch.video.x_BFHWC.dtype == torch.float32
        assert batch.video.seconds_BF.shape == batch.video.scene_BF.shape == batch.video.x_BFHWC.shape[:2]
        for b, id_ in enumerate(batch.ids):
            row = cache.row(cache.ids.index(id_))
            assert torch.equal(batch.video.x_BFHWC[b], row.latents_FhwC)
            assert batch.video.seconds_BF[b].tolist() == [2 / FPS, 6 / FPS]
            assert batch.video.scene_BF[b].tolist() == ([0, 1] if id_ == "story" else [0, 0])
            assert batch.captions[b] == row.captions or batch.captions[b][0] in row.wordings
        assert batch.text is None
        assert batch.empty_text is None


def test_wordings_are_drawn_in_training_only(cache: Cache) -> None:
    settings = bucketed(train={"heldout_fraction": 0.0})
    batches = take(Loader(cache, settings), 120)
    told = Counter(b.captions[i][0] for b in batches for i, id_ in enumerate(b.ids) if id_ == "clip000")
    assert told.keys() == {"a wave number 0", "another wording", "a third"}
    again = take(Loader(cache, settings), 20, start=100)
    assert [b.captions for b in again] == [b.captions for b in batches[100:]]
    everything = bucketed(train={"heldout_fraction": 0.95})
    kept = [b for b in Loader(cache, everything, split="heldout").batches() if "clip000" in b.ids]
    assert kept[0].captions[kept[0].ids.index("clip000")] == ["a wave number 0"]


def test_frozen_text_is_what_the_encoder_would_say(cache: Cache) -> None:
    frozen = bucketed(text_encoder={"trainable": False}, train={"heldout_fraction": 0.0, "batch_size": 14})
    encoder = build_text_encoder(frozen.text_encoder, frozen.seed)
    batch = next(b for b in take(Loader(cache, frozen), 6) if "story" in b.ids)
    assert batch.text is not None
    assert batch.empty_text is not None
    expected = encode_scenes(encoder, batch.captions)
    assert torch.equal(batch.text.x_BLC * expected.valid_BL[..., None], batch.text.x_BLC)
    assert torch.equal(batch.text.valid_BL, expected.valid_BL)
    assert torch.equal(batch.text.x_BLC[expected.valid_BL], expected.x_BLC[expected.valid_BL])
    assert torch.equal(batch.text.scene_BL, expected.scene_BL)
    empty = encode_scenes(encoder, [["", ""]])
    assert torch.equal(batch.empty_text.x_BLC, empty.x_BLC)
    assert torch.equal(batch.empty_text.valid_BL, empty.valid_BL)
    assert torch.equal(batch.empty_text.scene_BL, empty.scene_BL)


def test_new_captions_under_old_ids_change_the_fingerprint(tmp_path) -> None:
    """A resume on other captions would be another run."""
    world = make_world(tmp_path / "clips", 6)
    build_cache(recipe(), world, tmp_path / "cache")
    before = Loader(open_cache(tmp_path / "cache"), recipe()).fingerprint()
    assert Loader(open_cache(tmp_path / "cache"), recipe()).fingerprint() == before
    build_cache(recipe(), [replace(entry, caption="something else") for entry in world], tmp_path / "cache")
    assert Loader(open_cache(tmp_path / "cache"), recipe()).fingerprint() != before


def test_caches_of_video_alone_keep_the_fingerprint_of_old_runs(cache: Cache) -> None:
    """Written out: what is added for other data must not keep these from being resumed."""
    settings = bucketed(train={"heldout_fraction": 0.0})
    digest = hashlib.sha256(repr([7, 4, "train", cache.identity.fingerprint]).encode())
    for bucket, rows in cache.buckets.items():
        digest.update(str(bucket).encode())
        for row in cache.metadata(rows):
            facts = [row["id"], row["captions"], row["wordings"], row["scene_frames"]]
            digest.update(repr(facts).encode())
    assert Loader(cache, settings).fingerprint() == digest.hexdigest()
