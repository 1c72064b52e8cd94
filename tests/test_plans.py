"""Plans, layouts and the dense reference of every visibility, against definitions written out by hand."""

from __future__ import annotations

import itertools

import pytest
import torch

from laid import EXPAND, FIRST_FRAME, lay, noised, read_video, sampled, stages, video
from motionloom.plans import (
    PLANS,
    Chunks,
    Geometry,
    Sample,
    Scenes,
    Text,
    TextToVideo,
    causal_chunks,
    dense_mask,
    full,
    join_attributes,
    keep_given,
    same_scene,
    same_scene_or_both_video,
    spatial_window,
)
from motionloom.plans.visibility import TeacherForcing
from motionloom.rng import torch_generator

ROWS, COLUMNS, CHANNELS = 2, 3, 4


def geometry(scene_frames: tuple[int, ...] = (5,), batch: int = 2) -> Geometry:
    scene_F = torch.repeat_interleave(torch.arange(len(scene_frames)), torch.tensor(scene_frames))
    frames = len(scene_F)
    return Geometry(
        (frames, ROWS, COLUMNS),
        torch.arange(frames)[None] * 0.5,
        (8.0, 8.0),
        scene_F[None],
        batch,
        scenes=len(scene_frames),
    )


def text(scenes: int = 1, length: int = 3, batch: int = 2) -> Text:
    scene_L = torch.arange(scenes).repeat_interleave(length)
    generator = torch_generator("text")
    valid = torch.ones(batch, scenes * length, dtype=torch.bool)
    valid[:, -1] = False
    return Text(torch.randn(batch, scenes * length, 5, generator=generator), valid, scene_L[None])


def tokens(geo: Geometry, purpose: str) -> torch.Tensor:
    shape = (geo.batch, geo.grid[0], ROWS * COLUMNS, CHANNELS)
    return torch.randn(shape, generator=torch_generator(purpose))


def given(geo: Geometry, *frames: int) -> torch.Tensor:
    mask = torch.zeros(geo.batch, geo.grid[0], dtype=torch.bool)
    mask[:, list(frames)] = True
    return mask


def streams_of(plan, geo: Geometry, words: Text, given_BF: torch.Tensor):
    layout = lay(plan, geo, words, given_BF)
    sigma_BD = torch.rand(geo.batch, 8, generator=torch_generator("sigma"))
    return layout, noised(layout, tokens(geo, "clean"), tokens(geo, "noise"), sigma_BD, words)


def rules(plan, geo: Geometry, words: Text) -> tuple[torch.Tensor, list[dict]]:
    """The dense mask over [text | video] of a plan, and each token's facts as plain Python."""
    layout, streams = streams_of(plan, geo, words, given(geo))
    joined = join_attributes([streams["text"].attributes, streams["video"].attributes])
    mask = layout.visibility.allows(joined.queries(), joined.keys())[0]
    names = ("modality", "scene", "chunk", "context")
    values = [getattr(joined, f"{n}_BN")[0].tolist() for n in names] + [joined.cell_BN3[0, :, 0].tolist()]
    return mask, [dict(zip((*names, "frame"), row, strict=True)) for row in zip(*values, strict=True)]


def check(mask: torch.Tensor, facts: list[dict], rule) -> None:
    for (i, q), (j, k) in itertools.product(enumerate(facts), enumerate(facts)):
        assert bool(mask[i, j]) == bool(rule(q, k)), (q, k)


def is_text(token: dict) -> bool:
    return token["modality"] == 0


@pytest.mark.parametrize("scene_frames", [(2, 2), (1, 3, 2), (4,)])
def test_scene_mask_is_the_papers_table_for_any_lengths(scene_frames):
    mask, facts = rules(Scenes(), geometry(scene_frames), text(len(scene_frames)))

    def table(q, k):
        if is_text(q) or is_text(k):
            return q["scene"] == k["scene"]
        return True

    check(mask, facts, table)
    assert torch.equal(mask, mask.T)


@pytest.mark.parametrize("scene_frames", [(2, 2), (1, 3, 2), (4,)])
def test_scene_summaries_show_the_first_frame_of_other_scenes(scene_frames):
    mask, facts = rules(Scenes(visibility="summary"), geometry(scene_frames), text(len(scene_frames)))
    begins = torch.tensor([0, *scene_frames]).cumsum(0).tolist()

    def table(q, k):
        first = not is_text(k) and k["frame"] in begins
        return q["scene"] == k["scene"] or (not is_text(q) and first)

    check(mask, facts, table)
    assert rules(Scenes(visibility="full"), geometry(scene_frames), text(len(scene_frames)))[0].all()


@pytest.mark.parametrize(
    ("frames", "first_alone", "window", "sinks"),
    [
        (3, False, None, 0),
        (2, False, None, 0),
        (2, True, None, 0),
        (1, False, 2, 0),
        (1, False, 2, 1),
        (5, False, None, 0),
    ],
)
def test_causal_mask_equals_brute_force(frames, first_alone, window, sinks):
    plan = Chunks(frames, first_alone, window, sinks)
    mask, facts = rules(plan, geometry((5,)), text())

    def table(q, k):
        if is_text(k):
            return True
        if is_text(q):
            return False
        near = window is None or q["chunk"] - k["chunk"] < window or k["chunk"] < sinks
        return k["chunk"] <= q["chunk"] and near

    check(mask, facts, table)
    chunks = [f["chunk"] for f in facts if not is_text(f)][:: ROWS * COLUMNS]
    if first_alone:
        assert chunks == [0, 1, 1, 2, 2]


def test_teacher_forcing_mask_equals_brute_force():
    mask, facts = rules(Chunks(2, forcing="teacher", window=2), geometry((5,)), text())

    def table(q, k):
        if is_text(k):
            return True
        if is_text(q):
            return False
        near = k["chunk"] > q["chunk"] - 2
        if q["context"]:
            return k["context"] and k["chunk"] <= q["chunk"] and near
        return (not k["context"] and k["chunk"] == q["chunk"]) or (
            k["context"] and k["chunk"] < q["chunk"] and near
        )

    check(mask, facts, table)


def test_one_chunk_is_bidirectional_for_video():
    mask, facts = rules(Chunks(frames=5), geometry((5,)), text())
    video = [i for i, f in enumerate(facts) if not is_text(f)]
    assert mask[video].all()


def test_spatial_window_and_composition():
    _, streams = streams_of(TextToVideo(), geometry((1,)), text(), given(geometry((1,))))
    a = streams["video"].attributes
    mask = spatial_window(2).allows(a.queries(), a.keys())[0]
    for i, j in itertools.product(range(ROWS * COLUMNS), repeat=2):
        same = (i // COLUMNS // 2, i % COLUMNS // 2) == (j // COLUMNS // 2, j % COLUMNS // 2)
        assert bool(mask[i, j]) == same
    both = (spatial_window(2) & same_scene).allows(a.queries(), a.keys())[0]
    assert torch.equal(both, mask)
    either = (spatial_window(2) | same_scene).allows(a.queries(), a.keys())[0]
    assert either.all()
    assert not spatial_window(2).whole_frames
    assert (spatial_window(2) | full).whole_frames
    assert not (spatial_window(2) & full).unrestricted


def test_dense_mask_is_none_only_when_nothing_is_hidden():
    words = text()
    _, streams = streams_of(TextToVideo(), geometry(), words, given(geometry()))
    video, caption = streams["video"].attributes, streams["text"].attributes
    assert dense_mask(full, video, video) is None
    padded = dense_mask(full, video, caption, streams["text"].valid_BN)
    assert padded is not None
    assert not padded[..., -1].any()
    assert padded[..., :-1].all()
    assert dense_mask(causal_chunks(), video, video) is not None


def test_a_query_that_may_see_nothing_still_sees_valid_keys():
    words = text(scenes=2)
    geo = geometry((2, 2))
    _, streams = streams_of(Scenes(), geo, words, given(geo))
    words_valid = torch.tensor([[True] * 3 + [False] * 3])
    mask = dense_mask(same_scene, streams["video"].attributes, streams["text"].attributes, words_valid)
    assert mask is not None
    assert mask.any(-1).all()
    assert not mask[..., 3:].any()


@pytest.mark.parametrize("forcing", ["diffusion", "teacher"])
@pytest.mark.parametrize("name", sorted(PLANS))
def test_given_frames_enter_and_leave_bit_identical(name, forcing):
    plan = Chunks(forcing=forcing) if name == "chunks" else PLANS[name]()
    geo = geometry((3, 2)) if name == "scenes" else geometry((5,))
    words = text(2 if name == "scenes" else 1)
    kept = given(geo, 0, 1, 2) if name == "scenes" else given(geo, 0)
    layout, streams = streams_of(plan, geo, words, kept)
    clean = tokens(geo, "clean")

    def of_clip(t_BN: torch.Tensor) -> torch.Tensor:
        t_BN = t_BN.expand(geo.batch, *t_BN.shape[1:])
        return t_BN.unflatten(1, (-1, geo.cells))[:, -geo.grid[0] :]

    x = of_clip(streams["video"].x_BNC)
    assert torch.equal(x[kept], clean[kept])
    assert (x[~kept] != clean[~kept]).all()
    sigma = of_clip(streams["video"].sigma_BN)
    assert (sigma[kept] == 0).all()
    assert (sigma[~kept] > 0).all()
    loss = of_clip(streams["video"].loss_BN)
    assert (loss[kept] == 0).all()
    assert (loss[~kept] == 1).all()

    noisy = tokens(geo, "solver state")
    fed = sampled(layout, clean, noisy, streams["video"].sigma_BK, words)["video"]
    x = of_clip(fed.x_BNC)
    assert torch.equal(x[kept], clean[kept])
    assert torch.equal(x[~kept], noisy[~kept])
    back = keep_given(layout, "video", clean, noisy)
    assert torch.equal(back[kept], clean[kept])
    assert torch.equal(back[~kept], noisy[~kept])


def drawn(plan, geo: Geometry) -> torch.Tensor:
    """Which frames a training step is given, (B, F)."""
    made = plan.conditions.draw(Sample({"video": geo}, fps=8.0), torch_generator("d")).marks
    if "video" not in made:
        return given(geo)
    return (made["video"].kind_BN > 0).expand(geo.batch, -1).unflatten(1, (geo.grid[0], -1)).all(dim=2)


def test_first_frame_alone_leaves_a_clip_of_one_frame_free():
    assert not drawn(FIRST_FRAME, geometry((1,))).any()
    assert drawn(FIRST_FRAME, geometry()).tolist() == [[True, False, False, False, False]] * 2
    assert not drawn(TextToVideo(), geometry()).any()


def test_scenes_expand_the_last_of_each_sample():
    geo = geometry((2, 1, 2))
    assert drawn(Scenes(EXPAND), geo).tolist() == [[True, True, True, False, False]] * 2
    _, streams = streams_of(Scenes(EXPAND), geo, text(3), None)
    sigma_BL = streams["text"].sigma_BN
    assert not sigma_BL[:, :6].any(), "words of what is given are at the clean level"
    assert (sigma_BL[:, 6:] == streams["video"].sigma_BN[:, -1:]).all()
    assert (sigma_BL[:, 6:] > 0).all()
    _, nothing = streams_of(Scenes(), geo, text(3), given(geo))
    assert (nothing["text"].sigma_BN == nothing["video"].sigma_BN[:, :1]).all()


def test_chunks_draw_their_own_noise_level_and_shared_levels_agree():
    geo = geometry((5,))
    layout, streams = streams_of(Chunks(2), geo, text(), given(geo))
    sigma = streams["video"].sigma_BN.unflatten(1, (5, -1))
    assert (sigma[:, 0] == sigma[:, 1]).all()
    assert (sigma[:, 1] != sigma[:, 2]).all()
    assert video(layout).num_draws == 3
    teacher, tf_streams = streams_of(Chunks(2, forcing="teacher"), geo, text(), given(geo))
    tf_sigma = tf_streams["video"].sigma_BN.unflatten(1, (10, -1))
    assert (tf_sigma[:, :5] == 0).all()
    assert torch.equal(tf_sigma[:, 5:], sigma)
    x = tf_streams["video"].x_BNC.unflatten(1, (10, -1))
    assert torch.equal(x[:, :5], tokens(geo, "clean"))
    position = tf_streams["video"].position_BN3.unflatten(1, (10, -1))
    assert torch.equal(position[:, :5], position[:, 5:])
    numbered = torch.arange(60.0).view(1, 60, 1).expand(2, -1, 1)
    assert torch.equal(read_video(teacher, numbered).flatten(1), torch.arange(30.0, 60.0).expand(2, -1))


def test_positions_are_seconds_and_pixels_of_the_centre():
    _, streams = streams_of(TextToVideo(), geometry(), text(), given(geometry()))
    position = streams["video"].position_BN3[0].unflatten(0, (5, ROWS, COLUMNS))
    assert position[3, 1, 2].tolist() == [1.5, 12.0, 20.0]


def test_teacher_forcing_rejects_nothing_when_unwindowed():
    """Every noisy token sees at least its own chunk: softmax never meets an empty row."""
    mask, _ = rules(Chunks(2, forcing="teacher"), geometry((5,)), text())
    assert mask.any(-1).all()
    assert isinstance(
        lay(Chunks(2, forcing="teacher"), geometry(), text(), given(geometry())).visibility, TeacherForcing
    )
    assert same_scene_or_both_video.whole_frames


@pytest.mark.parametrize("first_alone", [False, True])
@pytest.mark.parametrize("frames", [1, 2, 3, 5, 7])
def test_stages_are_the_chunks(frames, first_alone):
    plan = Chunks(frames=3, first_alone=first_alone)
    geo = geometry((frames,))
    chunk_F = plan.chunk_of(frames)
    parts = stages(plan, geo)
    assert [chunk_F[stage].unique().tolist() for stage in parts] == [[n] for n in range(len(parts))]
    assert sum(len(chunk_F[stage]) for stage in parts) == frames
