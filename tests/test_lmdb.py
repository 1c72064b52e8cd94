"""LMDBs of CausVid and Self-Forcing in a cache: their values to the bit, and every fault of a row."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch

from cached import make_clip
from motionloom.config import Recipe
from motionloom.data.cache import Cache, build_cache, open_cache
from motionloom.data.cache.lmdb_import import LmdbReport, import_lmdb
from motionloom.data.cache.pairs import require_levels
from motionloom.data.loader import Loader
from motionloom.data.manifest import ManifestEntry
from motionloom.errors import UserError
from motionloom.rng import numpy_rng
from motionloom.tokenizers import fit_tokenizer
from test_cli import call
from toy_model import toy_recipe

FRAMES, CHANNELS, ROWS, COLUMNS = 4, 6, 4, 6
"""Of the toy recipe's latents, as CausVid lays them."""
LEVELS = 4


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tokenizer, in the place of a VAE."""
    folder = tmp_path_factory.mktemp("tokenizer")
    noise = torch.rand((32, 8, 16, 24, 3), generator=torch.Generator().manual_seed(3)) * 255
    fit_tokenizer(toy_recipe().tokenizer, list(noise.to(torch.uint8))).save(folder / "vae")
    return folder / "vae"


def recipe(tokenizer: Path, **sections: dict[str, Any]) -> Recipe:
    named = {
        "tokenizer": {"name_or_path": str(tokenizer)},
        "train": {"batch_size": 2, "heldout_fraction": 0.0},
    }
    return toy_recipe(**{k: {**named.get(k, {}), **sections.get(k, {})} for k in named | sections})


def latents(key: int, states: int = 1) -> np.ndarray:
    """A row as their scripts make it: (T, F, C, h, w), or (F, C, h, w) of a VAE's."""
    x = numpy_rng("lmdb", key).standard_normal((states, FRAMES, CHANNELS, ROWS, COLUMNS)).astype(np.float16)
    return x if states > 1 else x[0]


def write(
    folder: Path, rows: Sequence[np.ndarray], prompts: Sequence[str] | None = None, count: int | None = None
) -> Path:
    """The layout of ``create_lmdb_iterative.py``: `latents_shape` is that of the last array, its first side
    the number of rows."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = [f"a prompt {i}" for i in range(len(rows))] if prompts is None else prompts
    shape = [count if count is not None else len(rows), *rows[-1].shape]
    values: dict[str, bytes] = {"latents_shape": " ".join(map(str, shape)).encode()}
    values["prompts_shape"] = str(shape[0]).encode()
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        values |= {f"latents_{i}_data": row.tobytes(), f"prompts_{i}_data": prompt.encode()}
    change(folder, values)
    return folder


def change(folder: Path, values: Mapping[str, bytes | None]) -> None:
    """Put keys into an LMDB; None takes one out."""
    with lmdb.open(str(folder), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        for key, value in values.items():
            if value is None:
                transaction.delete(key.encode())
            else:
                transaction.put(key.encode(), value)


def fault(report: LmdbReport, where: str) -> str:
    (problem,) = (one for one in report.skipped if one.where == where)
    assert "\n" not in str(problem)
    return problem.what


def row_of(cache: Cache, id_: str) -> int:
    return cache.ids.index(id_)


def test_latents_become_a_cache_that_trains(tokenizer: Path, tmp_path: Path) -> None:
    rows = [latents(i) for i in range(4)]
    folder = write(tmp_path / "mixkit_latents_lmdb", rows, ["one", "zwei", "三", "four"])
    said: list[tuple[str, int, int]] = []
    settings = recipe(tokenizer)
    report = import_lmdb(settings, folder, tmp_path / "cache", on_progress=lambda *now: said.append(now))
    assert (report.read, report.kept, report.skipped.skipped, report.levels) == (4, 0, 0, ())
    assert said[-1] == ("rows", 4, 4)
    cache = open_cache(tmp_path / "cache")
    assert cache.verify() == []
    assert cache.has_states is False
    assert not (tmp_path / "cache" / "pairs.json").exists()
    cache.require(settings)
    for i, prompt in enumerate(("one", "zwei", "三", "four")):
        row = cache.row(i)
        assert (row.id, row.captions) == (f"mixkit_latents_lmdb/{i:08d}", [prompt])
        assert str(row.bucket) == "24x16x8"
        # Channels come last, and nothing is rounded.
        assert torch.equal(row.latents_FhwC, torch.from_numpy(rows[i]).float().permute(0, 2, 3, 1))
    assert cache.fps == 8.0
    assert cache.row(2).decode(cache.tokenizer()).shape == (8, 16, 24, 3)
    assert Loader(cache, settings).batch(0).latents["video"].x_BFHWC.shape == (2, 4, 4, 6, 6)


def test_trajectories_become_states_whose_levels_the_recipe_states(tokenizer: Path, tmp_path: Path) -> None:
    rows = [latents(i, LEVELS + 1) for i in range(3)]
    folder = write(tmp_path / "ode_lmdb", rows)
    settings = recipe(tokenizer, distil={"num_steps": LEVELS, "shift": 8.0})
    report = import_lmdb(settings, folder, tmp_path / "cache")
    assert report.levels == pytest.approx((1.0, 0.96, 8 / 9, 8 / 11))
    assert any("are stated by the recipe (distil)" in line for line in report.lines())
    note = json.loads((tmp_path / "cache" / "pairs.json").read_text())
    assert note["levels_from"] == "stated by the recipe"
    assert (note["solver"], note["teacher"], note["seed"], note["guidance"]) == (None,) * 4
    cache = open_cache(tmp_path / "cache")
    assert cache.verify() == []
    require_levels(cache, settings.distil.levels)
    for i in range(3):
        wanted = rows[i].transpose(0, 1, 3, 4, 2)
        assert np.array_equal(cache.states([i])[0], wanted[:-1])
        assert np.array_equal(cache.latents([i])[0], wanted[-1])
    batch = Loader(cache, settings).batch(0)
    assert batch.states["video"].shape == (2, LEVELS, 4, 4, 6, 6)
    # Other levels are other states: not the same store.
    other = recipe(tokenizer, distil={"num_steps": LEVELS, "shift": 5.0})
    with pytest.raises(
        UserError, match=r"the levels \(distil\) is \[1,0.96,.* there and \[1,0.9375"
    ) as error:
        import_lmdb(other, folder, tmp_path / "cache")
    assert "\n" not in str(error.value)


def test_bad_rows_are_skipped_listed_and_counted(tokenizer: Path, tmp_path: Path) -> None:
    rows = [latents(i) for i in range(10)]
    rows[3][0, 0, 0, 0] = np.nan
    rows[4][1, 2, 3, 4] = np.inf
    prompts = [f"prompt {i}" for i in range(10)]
    prompts[5] = prompts[2]
    folder = write(tmp_path / "db", rows, prompts, count=13)
    whole = rows[6].tobytes()
    odd = {
        "latents_0_data": None,
        "prompts_1_data": None,
        "latents_6_data": whole[: len(whole) // 2],
        "latents_7_data": whole * 2,
        "prompts_8_data": b"\xff\xfe",
    }
    change(folder, odd)
    report = import_lmdb(recipe(tokenizer), folder, tmp_path / "cache")
    assert (report.read, report.skipped.skipped) == (2, 11)
    assert fault(report, "db/00000000") == "latents_0_data is missing"
    assert fault(report, "db/00000001") == "prompts_1_data is missing"
    assert fault(report, "db/00000003") == fault(report, "db/00000004") == "latents that are not finite"
    assert fault(report, "db/00000005") == "has the prompt of db/00000002"
    size = FRAMES * CHANNELS * ROWS * COLUMNS * 2
    assert (
        fault(report, "db/00000006")
        == f"{size // 2} bytes of latents are truncated: 4x6x4x6 float16 takes {size}"
    )
    assert fault(report, "db/00000007").startswith(f"{size * 2} bytes of latents are too long")
    assert fault(report, "db/00000008") == "its prompt is not UTF-8"
    assert fault(report, str(folder)) == "latents_shape counts 3 rows more than there are"
    assert report.lines()[-1] == (
        "skipped 11 of 13 clips: 5 missing key, 2 NaN latents, 1 duplicate prompt, 1 truncated, 1 too long, "
        "1 unreadable prompt"
    )
    assert len((tmp_path / "cache" / "skipped.jsonl").read_text().splitlines()) == 9
    assert open_cache(tmp_path / "cache").ids == ["db/00000002", "db/00000009"]


def test_an_import_goes_on_where_it_stopped(tokenizer: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "db", [latents(i) for i in range(4)])

    def stop(what: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_lmdb(recipe(tokenizer), folder, tmp_path / "cache", on_progress=stop)
    assert len(open_cache(tmp_path / "cache")) == 2
    report = import_lmdb(recipe(tokenizer), folder, tmp_path / "cache")
    assert (report.read, report.kept, len(open_cache(tmp_path / "cache"))) == (2, 2, 4)
    # A row that was spoiled since then goes, and a changed one is read again.
    change(folder, {"latents_1_data": b"short", "latents_2_data": latents(9).tobytes()})
    report = import_lmdb(recipe(tokenizer), folder, tmp_path / "cache")
    assert report.skipped.skipped == 1
    cache = open_cache(tmp_path / "cache")
    assert cache.ids == ["db/00000000", "db/00000002", "db/00000003"]
    assert np.array_equal(cache.latents([1])[0], latents(9).transpose(0, 2, 3, 1))


def test_shards_are_read_one_after_the_other(tokenizer: Path, tmp_path: Path) -> None:
    for shard in range(3):
        rows = [latents(10 * shard + i) for i in range(2)]
        write(tmp_path / "set" / f"shard_{shard}", rows, [f"{shard} {i}" for i in range(2)])
    report = import_lmdb(recipe(tokenizer), tmp_path / "set", tmp_path / "cache")
    assert report.read == 6
    cache = open_cache(tmp_path / "cache")
    assert cache.ids[2:4] == ["set/shard_1/00000000", "set/shard_1/00000001"]
    assert np.array_equal(cache.latents([3])[0], latents(11).transpose(0, 2, 3, 1))


@pytest.mark.parametrize("shape", [b"3", b"3 0 6 4 6", None])
@pytest.mark.parametrize("states", [1, LEVELS + 1])
def test_a_shape_that_says_nothing_is_told_by_the_rows(
    shape: bytes | None, states: int, tokenizer: Path, tmp_path: Path
) -> None:
    """Their scripts write the shape of the last file, which is empty if all its prompts were there before."""
    folder = write(tmp_path / "db", [latents(i, states) for i in range(3)])
    change(folder, {"latents_shape": shape})
    report = import_lmdb(recipe(tokenizer), folder, tmp_path / "cache")
    assert (report.read, len(report.levels)) == (3, states - 1)


def test_clips_of_other_shapes_than_the_recipe_makes_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    def refused(match: str, folder: Path, settings: Recipe) -> None:
        with pytest.raises(UserError, match=match) as error:
            import_lmdb(settings, folder, tmp_path / "cache")
        assert "\n" not in str(error.value)
        assert not (tmp_path / "cache").exists()

    folder = write(tmp_path / "db", [latents(0)])
    longer = recipe(tokenizer, video={"num_frames": 12})
    refused(r"holds latents of \[4, 6, 4, 6\], and the recipe's clips are \[6, 6, 4, 6\]", folder, longer)
    ode = write(tmp_path / "ode", [latents(0, 5)])
    three = recipe(tokenizer, distil={"num_steps": 3})
    refused(r"holds 5 states of each walk, the last of them clean, and the recipe has 3 levels", ode, three)
    refused("rows of 1152 bytes", changed(write(tmp_path / "b", [latents(0)]), b"1"), longer)
    refused("tokenizer.name_or_path is empty, and an LMDB holds no pixels", folder, toy_recipe())
    refused("is not a folder", tmp_path / "nowhere", recipe(tokenizer))
    (tmp_path / "empty").mkdir()
    refused(r"holds no LMDB \(data.mdb is missing\)", tmp_path / "empty", recipe(tokenizer))
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "data.mdb").write_bytes(b"no database" * 2000)
    refused("cannot be read as an LMDB", tmp_path / "junk", recipe(tokenizer))
    short = write(tmp_path / "short", [latents(i) for i in range(40)])
    whole = (short / "data.mdb").read_bytes()
    for size in (len(whole) // 2, len(whole) - 1, 8192, 4096, 100, 0):
        (short / "data.mdb").write_bytes(whole[:size])
        refused(r"short(/data.mdb)?: (is cut short|cannot be read as an LMDB)", short, recipe(tokenizer))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    change(foreign, {"images_0": b"x"})
    refused("holds no row", foreign, recipe(tokenizer))
    damaged = changed(write(tmp_path / "damaged", [latents(0)]), b"one two")
    refused("latents_shape is b'one two' and not numbers", damaged, recipe(tokenizer))
    sound = recipe(tokenizer, audio={"enabled": True}, model={"audio_dim": 8})
    refused("audio.enabled is true, and an LMDB of latents has no sound", folder, sound)


def changed(folder: Path, shape: bytes) -> Path:
    change(folder, {"latents_shape": shape})
    return folder


def test_a_folder_with_something_else_is_left_alone(tokenizer: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "db", [latents(0)])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"is not a cache and not empty"):
        import_lmdb(recipe(tokenizer), folder, tmp_path / "full")
    bad = write(tmp_path / "bad", [latents(0)])
    change(bad, {"latents_0_data": b""})
    with pytest.raises(UserError, match=r"not one row could be used; the first: bad/00000000: 0 bytes"):
        import_lmdb(recipe(tokenizer), bad, tmp_path / "none")
    # Clips and rows of one recipe may stand in one cache; latents and trajectories may not.
    clip = make_clip(tmp_path / "clip.mp4", 1, height=16, width=24)
    build_cache(recipe(tokenizer), [ManifestEntry("clip", clip, "a wave")], tmp_path / "cache")
    assert import_lmdb(recipe(tokenizer), folder, tmp_path / "cache").read == 1
    assert open_cache(tmp_path / "cache").ids == ["clip", "db/00000000"]
    ode = write(tmp_path / "ode", [latents(0, 5)])
    with pytest.raises(UserError, match="is a cache of clips and holds no pairs"):
        import_lmdb(recipe(tokenizer), ode, tmp_path / "cache")


def test_captions_of_a_frozen_encoder_are_embedded(tokenizer: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "db", [latents(i) for i in range(2)])
    frozen = recipe(tokenizer, text_encoder={"trainable": False})
    assert import_lmdb(frozen, folder, tmp_path / "cache").captions == 3  # and the empty one
    assert Loader(open_cache(tmp_path / "cache"), frozen).batch(0).text is not None


def test_without_the_library_one_line_says_what_to_install(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "db", [latents(0)])
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(UserError, match=r"pip install 'motionloom\[lmdb\]'"):
        import_lmdb(recipe(tokenizer), folder, tmp_path / "cache")


def test_the_command_reads_them(tokenizer: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "db", [latents(i, 5) for i in range(3)])
    change(folder, {"latents_1_data": None})
    yaml = tmp_path / "toy.yaml"
    yaml.write_text(
        "from: quickstart\nvideo: {width: 24, height: 16, num_frames: 8, fps: 8}\n"
        f"tokenizer: {{name_or_path: {tokenizer}, latent_f: 4, latent_t: 2, latent_d: 6}}\n"
    )
    wish = ("cache", str(yaml), "--lmdb", str(folder), "--out", str(tmp_path / "cache"))
    answer = call(*wish, "--json")
    assert answer.code == 0, answer.err
    assert (answer.value["clips"], answer.value["read"], answer.value["skipped"]) == (2, 2, 1)
    assert answer.value["levels"] == pytest.approx([1, 15 / 16, 5 / 6, 5 / 8])
    assert "latents_1_data is missing" in answer.value["problems"][0]
    assert "stated by the recipe" in answer.err
    both = call(*wish, "--manifest", "m.jsonl")
    assert (both.code, "name either --manifest" in both.err) == (2, True)
    assert call(*wish[:2], *wish[4:]).code == 2
