"""Conditions: which tokens they give, that these are exact in and out, and that nothing drifts in between."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laid import read_video
from motionloom.backbones import build_backbone
from motionloom.backbones.cogvideox import PRESETS as COGVIDEOX
from motionloom.backbones.cogvideox import CogVideoX
from motionloom.backbones.ltx2 import LTX2
from motionloom.backbones.ltx2 import PRESETS as LTX2_PRESETS
from motionloom.backbones.prediction import Predictor
from motionloom.backbones.wan import PRESETS as WAN
from motionloom.backbones.wan import Wan
from motionloom.config.conditions import (
    FirstFrame,
    Keyframes,
    LastFrame,
    Mask,
    Prefix,
    Reference,
    Scene,
    SpatialCrop,
    Suffix,
    Whole,
)
from motionloom.config.recipe import ModelConfig, Recipe
from motionloom.data.batch import Batch, Latents, move_tensors
from motionloom.data.sample import batch_sample
from motionloom.errors import UserError
from motionloom.flow import LINEAR, Guidance, Term
from motionloom.generate import ClipRequest, Model, Sampling, Source, Task, generate, rollout, task_of
from motionloom.methods import Denoise
from motionloom.nn.patching import patchify
from motionloom.plans import (
    NOTHING,
    Beside,
    Chunks,
    Conditions,
    Geometry,
    Given,
    Layout,
    Plan,
    Sample,
    Scenes,
    Streams,
    Text,
    TextToVideo,
    Values,
    Visibility,
    start,
    to_streams,
    to_streams_at,
    token_geometry,
)
from motionloom.plans.geometry import beside
from motionloom.plans.stream import Stream
from motionloom.rng import torch_generator
from motionloom.tokenizers import AudioTokenizerSpec, TokenizerSpec, scene_seconds, scene_sound, scene_spans
from motionloom.train import StepContext
from toy_model import altered, toy_model

FPS, WORDS, TEXT_DIM, CHANNELS, SOUND_CHANNELS = 8.0, 3, 5, 4, 3
ALONE = TokenizerSpec(CHANNELS, 8, 4, first_alone=True)
GROUPED = TokenizerSpec(CHANNELS, 8, 4, first_alone=False)
SOUND = AudioTokenizerSpec(SOUND_CHANNELS, 1600, 200, 1, first_alone=False)
"""8 latents a second: one for each pixel frame."""
SHOTS = (5, 9)
"""Two scenes."""


def picture(
    shots: Sequence[int] = (17,),
    spec: TokenizerSpec = ALONE,
    patch: tuple[int, int, int] = (1, 1, 1),
    side: tuple[int, int] = (2, 3),
    batch: int = 2,
    fps: float = FPS,
    **more: Any,
) -> Geometry:
    """Tokens of the video of shots that are coded alone; ``side``: rows and columns of tokens."""
    seconds_F, span_F2 = scene_seconds(spec, shots, fps), scene_spans(spec, shots, fps)
    counts = [spec.latent_grid(shot, 8, 8)[0] for shot in shots]
    scene_F = torch.arange(len(shots)).repeat_interleave(torch.tensor(counts))
    return token_geometry(
        (sum(counts), side[0] * patch[1], side[1] * patch[2]),
        patch,
        seconds_F[None],
        scene_F[None],
        spec.spatial,
        batch,
        **{"span_BF2": span_F2[None], "scenes": len(shots), **more},
    )


def noises(shots: Sequence[int] = (17,), batch: int = 2, **more: Any) -> Geometry:
    """Tokens of the sound of shots."""
    counts, seconds_T, span_T2 = scene_sound(SOUND, shots, FPS)
    scene_T = torch.arange(len(shots)).repeat_interleave(torch.tensor(counts))
    return token_geometry(
        (sum(counts), 1, 1),
        (1, 1, 1),
        seconds_T[None],
        scene_T[None],
        0,
        batch,
        **{"span_BF2": span_T2[None], "scenes": len(shots), **more},
    )


def both(shots: Sequence[int] = (17,), batch: int = 2) -> Sample:
    """Picture and sound."""
    return Sample({"video": picture(shots, batch=batch), "audio": noises(shots, batch)}, fps=FPS)


def draw(*shape: int, key: object) -> Tensor:
    return torch.randn(shape, generator=torch_generator("conditions", str(key), *shape))


def words(scenes: int = 1, batch: int = 2) -> Text:
    scene_L = torch.arange(scenes).repeat_interleave(WORDS)
    x_BLC = draw(batch, scenes * WORDS, TEXT_DIM, key="words")
    return Text(x_BLC, torch.ones(x_BLC.shape[:2], dtype=torch.bool), scene_L[None])


def tokens(sample: Sample, key: str, channels: Mapping[str, int] | None = None) -> dict[str, Tensor]:
    channels = channels or {"video": CHANNELS, "audio": SOUND_CHANNELS}
    return {
        m: draw(g.batch, g.grid[0], g.cells, channels[m], key=f"{key} {m}") for m, g in sample.tracks.items()
    }


def marked(given: Given, sample: Sample, modality: str = "video") -> Tensor:
    """(B, F, S): which kind each token is of, 0 where it is made."""
    geometry = sample.tracks[modality]
    if modality not in given.marks:
        return torch.zeros(geometry.batch, geometry.grid[0], geometry.cells, dtype=torch.long)
    kind_BN = given.marks[modality].kind_BN.expand(geometry.batch, -1)
    return kind_BN.unflatten(1, (geometry.grid[0], geometry.cells))


def fixed(sample: Sample, *conditions: Any, modality: str = "video") -> Tensor:
    """(F, S) bool: what a request of these conditions is given."""
    return marked(Conditions(conditions).fixed(sample), sample, modality)[0] > 0


def frames(sample: Sample, *conditions: Any, modality: str = "video") -> list[int]:
    """The frames of which all is given; no frame is given by parts."""
    given_FS = fixed(sample, *conditions, modality=modality)
    assert torch.equal(given_FS.any(dim=1), given_FS.all(dim=1))
    return given_FS.all(dim=1).nonzero().flatten().tolist()


def drawn(sample: Sample, *conditions: Any, choose: Any = "any", key: object = 0) -> Given:
    """What a training step is given."""
    return Conditions(conditions, choose).draw(sample, torch_generator("draw", str(key)))


# --- which tokens a condition gives -------------------------------------------------------------------------

GRIDS = {
    "first alone": (ALONE, (1, 1, 1), 17, [1, 5, 9, 13, 17]),
    "grouped": (GROUPED, (1, 1, 1), 16, [4, 8, 12, 16]),
    "first alone, patch 2": (ALONE, (2, 1, 1), 21, [5, 13, 21]),
    "grouped, patch 2": (GROUPED, (2, 2, 1), 16, [8, 16]),
}
"""Tokenizer, patch, pixel frames of the clip, and the pixel frame at which each token frame ends."""
every_grid = pytest.mark.parametrize("grid", GRIDS)


@every_grid
def test_a_prefix_gives_the_token_frames_that_lie_wholly_in_it(grid: str) -> None:
    spec, patch, length, ends = GRIDS[grid]
    sample = Sample({"video": picture((length,), spec, patch)}, fps=FPS)
    for n in range(1, ends[-1]):
        wanted = [i for i, end in enumerate(ends) if end <= n]
        for c in (Prefix(frames=n), Prefix(seconds=n / FPS)):
            if wanted:
                assert frames(sample, c) == wanted
            else:
                with pytest.raises(UserError, match="prefix: no token of the video lies wholly"):
                    Conditions((c,)).fixed(sample)


@every_grid
def test_a_suffix_gives_the_token_frames_that_lie_wholly_in_it(grid: str) -> None:
    spec, patch, length, ends = GRIDS[grid]
    sample = Sample({"video": picture((length,), spec, patch)}, fps=FPS)
    begins = [0, *ends[:-1]]
    for n in range(length - begins[-1], length):
        wanted = [i for i, begin in enumerate(begins) if begin >= length - n]
        assert frames(sample, Suffix(frames=n)) == wanted
        assert frames(sample, Suffix(seconds=n / FPS)) == wanted


@every_grid
def test_keyframes_are_the_token_frames_that_are_on_at_their_times(grid: str) -> None:
    spec, patch, length, ends = GRIDS[grid]
    sample = Sample({"video": picture((length,), spec, patch)}, fps=FPS)
    for pixel in range(length):
        wanted = next(i for i, end in enumerate(ends) if pixel < end)
        for inside in (0.0, 0.5, 0.9):
            assert frames(sample, Keyframes(times=((pixel + inside) / FPS,))) == [wanted]
    assert frames(sample, FirstFrame()) == [0]
    assert frames(sample, LastFrame()) == [len(ends) - 1]
    if len(ends) > 2:
        assert frames(sample, Keyframes(times=(0.0, (length - 0.5) / FPS))) == [0, len(ends) - 1]


def test_lengths_of_sound_are_frames_of_the_picture_or_seconds() -> None:
    sample = both()
    assert frames(sample, Prefix(modality="audio", frames=4), modality="audio") == [0, 1, 2, 3]
    assert frames(sample, Prefix(modality="audio", seconds=0.3), modality="audio") == [0, 1]
    assert frames(sample, Suffix(modality="audio", seconds=0.25), modality="audio") == [15, 16]
    assert not fixed(sample, Suffix(modality="audio", seconds=0.25)).any(), "nothing of the video"


@pytest.mark.parametrize(
    "region, rows, columns",
    [
        ((0, 0, 8, 16), [0], [0, 1]),
        ((1, 0, 16, 24), [1], [0, 1, 2]),
        ((0, 8, 15, 23), [0], [1]),
        ((0, 0, 16, 8), [0, 1], [0]),
    ],
)
def test_a_crop_gives_the_cells_that_lie_wholly_in_its_pixels(region, rows, columns) -> None:
    wanted = torch.zeros(2, 3, dtype=torch.bool)
    wanted[torch.tensor(rows)[:, None], torch.tensor(columns)] = True
    for patch, scale in (((1, 1, 1), 1), ((1, 2, 2), 2)):
        sample = Sample({"video": picture(patch=patch)}, fps=FPS)
        found = fixed(sample, SpatialCrop(region=tuple(scale * n for n in region)))
        assert torch.equal(found, wanted.flatten()[None].expand(5, -1))


def test_a_mask_of_the_data_is_given_where_it_is_true_and_silent_samples_keep_their_own() -> None:
    mask_BFS = draw(2, 5, 6, key="mask") > 0
    sample = replace(Sample({"video": picture()}, fps=FPS), masks={"video": mask_BFS})
    assert torch.equal(marked(drawn(sample, Mask(masks="data")), sample) > 0, mask_BFS)
    assert torch.equal(marked(Conditions((Mask(),)).fixed(sample), sample) > 0, mask_BFS)


def test_scenes_are_given_by_name_or_rule() -> None:
    sample = both((5, 13, 1))
    assert frames(sample, Scene(scenes=(1,))) == [2, 3, 4, 5]
    assert frames(sample, Scene(scenes=(0, 2))) == [0, 1, 6]
    assert frames(sample, Scene()) == [0, 1, 2, 3, 4, 5]
    assert frames(sample, Scene(), modality="audio") == list(range(18))
    assert frames(sample, Scene(scenes=(2,), modality="audio"), modality="audio") == [18]
    assert not fixed(sample, Scene(scenes=(2,), modality="audio")).any()
    assert frames(sample, Whole(), modality="audio") == list(range(19))


# --- what is drawn ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [(1, 2), (2, 2), (3, 1), (2, 3), (5, 8)])
@pytest.mark.parametrize("area", [(0.25, 0.75), (0.9, 1.0), (0.0, 0.05)])
def test_a_drawn_crop_is_a_rectangle_that_is_never_all_and_never_nothing(side, area) -> None:
    sample = Sample({"video": picture((5,), side=side, batch=512)}, fps=FPS)
    given = drawn(sample, SpatialCrop(area=area), key=(side, area))
    given_BS = (marked(given, sample) > 0)[:, 0]
    assert given.freed_B is not None
    assert not given.freed_B.any()
    assert given_BS.any(dim=1).all()
    assert not given_BS.all(dim=1).any()
    box_BRC = given_BS.unflatten(1, side)
    down_BR, right_BC = box_BRC.any(dim=2), box_BRC.any(dim=1)
    assert torch.equal(box_BRC, down_BR[:, :, None] & right_BC[:, None]), "a rectangle"
    for line_BN in (down_BR, right_BC):
        assert (line_BN.int().diff(dim=1).eq(1).sum(dim=1) + line_BN[:, 0] == 1).all(), "without a hole"


def test_a_drawn_hole_leaves_something_to_make_and_has_about_the_size_that_is_asked_for() -> None:
    sample = Sample({"video": picture((41,), side=(10, 10), batch=2000)}, fps=FPS)
    made_BFS = marked(drawn(sample, Mask(area=(0.2, 0.4), duration=(0.5, 0.75))), sample) == 0
    assert made_BFS.any(dim=2).any(dim=1).all()
    lasts_B = made_BFS.any(dim=2).sum(dim=1)
    assert lasts_B.min() >= 5
    assert lasts_B.max() <= 9
    share_B = made_BFS.any(dim=1).float().mean(dim=1)
    assert abs(share_B.mean() - 0.3) < 0.02
    assert made_BFS.any(dim=0).all(), "any place"
    silence = Sample({"audio": noises(batch=500)}, fps=FPS)
    made_BT = marked(drawn(silence, Mask(modality="audio")), silence, "audio")[..., 0] == 0
    assert made_BT.any(dim=1).all()
    assert not made_BT.all(dim=1).all()


def test_drawn_scenes_are_never_all_and_every_choice_has_its_turn() -> None:
    scene_BF = torch.arange(3).repeat(3000, 1)
    scene_BF[:1000, 2] = 1  # these have two scenes
    sample = Sample({"video": picture((1, 1, 1), side=(1, 1), batch=3000, scenes=3)}, fps=FPS)
    sample = replace(sample, tracks={"video": replace(sample.main, scene_BF=scene_BF)})
    some = marked(drawn(sample, Scene(scenes="some")), sample)[..., 0] > 0
    assert not some.all(dim=1).any()
    seen = {tuple(row) for row in some[1000:].tolist()}
    assert seen == set(itertools.product([False, True], repeat=3)) - {(True,) * 3}
    assert (some[:1000, 1] == some[:1000, 2]).all()
    but_one = marked(drawn(sample, Scene(scenes="all_but_one")), sample)[..., 0] == 0
    assert (but_one[1000:].sum(dim=1) == 1).all()
    assert (but_one[1000:].float().mean(dim=0) - 1 / 3).abs().max() < 0.04
    assert abs(but_one[:1000, 0].float().mean() - 0.5) < 0.06
    last = marked(drawn(sample, Scene()), sample)[..., 0] == 0
    assert last[0].tolist() == [False, True, True]
    assert last[-1].tolist() == [False, False, True]


def test_drawn_keyframes_are_as_many_as_asked_for_and_anywhere() -> None:
    sample = Sample({"video": picture(batch=2000)}, fps=FPS)
    given_BF = marked(drawn(sample, Keyframes(count=(1, 3))), sample)[..., 0] > 0
    counts = given_BF.sum(dim=1).bincount(minlength=6) / 2000
    assert (counts - torch.tensor([0, 1 / 3, 1 / 3, 1 / 3, 0, 0])).abs().max() < 0.04
    assert (given_BF.float().mean(dim=0) - 0.4).abs().max() < 0.04


def test_drawn_lengths_lie_in_their_range() -> None:
    sample = Sample({"video": picture(batch=2000)}, fps=FPS)
    for c in (Prefix(frames=(5, 13)), Prefix(seconds=(5 / FPS, 13.99 / FPS))):
        counts_B = (marked(drawn(sample, c), sample)[..., 0] > 0).sum(dim=1)
        assert set(counts_B.tolist()) == {2, 3, 4}


ONE_OF = (
    FirstFrame(probability=0.3),
    LastFrame(probability=0.2),
    Keyframes(times=(0.5,), probability=0.1),
)


def test_one_of_gives_each_its_share_and_never_two() -> None:
    sample = Sample({"video": picture(side=(1, 1), batch=4000)}, fps=FPS)
    given_BF = marked(drawn(sample, *ONE_OF, choose="one"), sample)[..., 0] > 0
    assert given_BF.sum(dim=1).max() == 1
    shares = given_BF.float().mean(dim=0)
    # Four deviations of 4,000 draws.
    assert (shares - torch.tensor([0.3, 0.1, 0.0, 0.0, 0.2])).abs().max() < 4 * (0.25 / 4000) ** 0.5


def test_any_gives_each_by_itself() -> None:
    sample = Sample({"video": picture(side=(1, 1), batch=4000)}, fps=FPS)
    given_BF = marked(drawn(sample, *ONE_OF), sample)[..., 0] > 0
    shares = given_BF.float().mean(dim=0)
    assert (shares - torch.tensor([0.3, 0.1, 0.0, 0.0, 0.2])).abs().max() < 4 * (0.25 / 4000) ** 0.5
    assert abs((given_BF[:, 0] & given_BF[:, 4]).float().mean() - 0.06) < 4 * (0.06 / 4000) ** 0.5


def test_where_conditions_overlap_the_strongest_holds_whatever_their_order() -> None:
    sample = Sample({"video": picture()}, fps=FPS)
    conditions = (
        Prefix(frames=13, strength=0.5),
        FirstFrame(),
        Prefix(frames=9, noise=0.3),
        Prefix(frames=5, noise=0.1),
        Keyframes(times=(1.9,), strength=0.2),
    )
    wanted = [(1.0, 0.0), (1.0, 0.1), (1.0, 0.3), (0.5, 0.0), (0.2, 0.0)]
    layouts = []
    for order in itertools.permutations(conditions):
        given = Conditions(order).fixed(sample)
        marks = given.marks["video"]
        found = [marks.kinds[k - 1] for k in marked(given, sample)[0, :, 0].tolist()]
        assert [(kind.strength, round(kind.noise, 6)) for kind in found] == wanted
        layouts.append(given)
    assert all(a.marks["video"].kinds == layouts[0].marks["video"].kinds for a in layouts)
    assert all(torch.equal(a.marks["video"].kind_BN, layouts[0].marks["video"].kind_BN) for a in layouts)


def test_a_sample_that_would_be_given_whole_is_made_whole_and_told() -> None:
    sample = both(batch=1000)
    given = drawn(sample, Whole(probability=0.5), Whole(modality="video", probability=0.5))
    video_B = (marked(given, sample) > 0).all(dim=2).all(dim=1)
    audio_B = (marked(given, sample, "audio") > 0).all(dim=2).all(dim=1)
    assert given.freed_B is not None
    assert abs(given.freed_B.float().mean() - 0.25) < 0.06
    assert not (video_B & audio_B).any()
    assert not (video_B | audio_B)[given.freed_B].any()
    assert video_B.any()
    assert audio_B.any()


def test_a_silent_film_that_is_given_leaves_nothing_so_the_film_is_made() -> None:
    present_B = torch.tensor([True, False])
    sample = Sample({"video": picture(), "audio": noises(present_B=present_B)}, fps=FPS)
    given = drawn(sample, Whole(modality="video"))
    assert (marked(given, sample) > 0).all(dim=2).all(dim=1).tolist() == [True, False]
    assert given.freed_B is not None
    assert given.freed_B.tolist() == [False, True]
    alone = Sample({"audio": noises(present_B=present_B)}, fps=FPS)
    free = drawn(alone, Prefix(modality="audio", frames=3, probability=0.0))
    assert free.freed_B is not None
    assert not free.freed_B.any(), "it was not given anything"


@pytest.mark.parametrize(
    "condition, said",
    [
        (Prefix(frames=(2, 5)), "ranges are for training"),
        (Prefix(), "ranges are for training"),
        (Prefix(frames=18), "prefix: 18 frames are more than the clip has"),
        (Suffix(seconds=3.0), "suffix: 3 seconds are more than the clip has"),
        (Prefix(frames=17), "nothing is left to make"),
        (Keyframes(count=2), "ranges are for training"),
        (Keyframes(times=(0.1, 2.2)), r"keyframes: 2\.2 s is not before the clip's end"),
        (SpatialCrop(), "ranges are for training"),
        (SpatialCrop(region=(0, 0, 17, 8)), r"not \[top, left, bottom, right\] inside 24x16"),
        (SpatialCrop(region=(8, 8, 8, 16)), r"not \[top, left, bottom, right\]"),
        (SpatialCrop(region=(1, 1, 8, 8)), "spatial_crop: no token of the video lies wholly"),
        (Mask(), "mask: a request brings the mask itself"),
        (Scene(), "scene: no token of the video lies wholly"),
        (Scene(scenes=(3,)), "scene: no token of the video"),
        (Whole(), "modality: its modality is audio, and the request is one of video"),
        (Whole(modality="video"), "nothing is left to make"),
        (Reference(), "reference: its modality is video, and the request brings none"),
    ],
)
def test_requests_that_leave_something_open_or_give_nothing_are_refused(condition, said) -> None:
    with pytest.raises(UserError, match=said) as error:
        Conditions((condition,)).fixed(Sample({"video": picture()}, fps=FPS))
    assert "\n" not in str(error.value)


def test_masks_that_the_data_has_not_are_told() -> None:
    with pytest.raises(UserError, match=r"finds no masks in the data.*masks\.enabled"):
        drawn(Sample({"video": picture()}, fps=FPS), Mask(masks="data"))


# --- exact in and out ---------------------------------------------------------------------------------------

GIVING: dict[str, tuple[Any, ...]] = {
    "first frame": (FirstFrame(),),
    "last frame": (LastFrame(),),
    "keyframes": (Keyframes(times=(0.0, 1.2)),),
    "prefix": (Prefix(frames=9),),
    "suffix": (Suffix(frames=8),),
    "crop": (SpatialCrop(region=(0, 0, 16, 16)),),
    "mask": (Mask(masks="data"),),
    "scene": (Scene(scenes=(0,), modality="video"),),
    "reference": (Reference(), LastFrame()),
    "a reference alone": (Reference(),),
    "all at once": (FirstFrame(), Suffix(frames=4), SpatialCrop(region=(0, 0, 8, 8)), Mask(masks="data")),
    "a history with noise": (Prefix(frames=9, noise=0.3), LastFrame()),
    "a hint beside": (Prefix(frames=5), Suffix(frames=8, strength=0.4)),
}
HEARING: dict[str, tuple[Any, ...]] = {
    "sound": (Whole(modality="audio"),),
    "film": (Whole(modality="video"),),
    "prefix of sound": (Prefix(modality="audio", frames=6),),
    "suffix of sound": (Suffix(modality="audio", frames=4), FirstFrame()),
    "mask of sound": (Mask(modality="audio", masks="data"),),
    "scene of both": (Scene(scenes=(1,)),),
    "reference of both": (Reference(), Reference(modality="audio"), FirstFrame()),
}
PLANS: dict[str, Plan] = {
    "text to video": TextToVideo(),
    "scenes": Scenes(positions="jump"),
    "scenes, own noise": Scenes(noise="own", visibility="cinetrans"),
    "chunks": Chunks(2),
    "teacher": Chunks(2, forcing="teacher"),
}
every_plan = pytest.mark.parametrize("plan", PLANS)


def of(plan: str, *conditions: Any) -> Plan:
    return replace(PLANS[plan], conditions=Conditions(conditions))  # type: ignore[type-var]


def asked(hears: bool, batch: int = 2) -> Sample:
    """Two scenes with masks, and a reference of a part of them."""
    sample = both(SHOTS, batch)
    masks = {m: draw(1, g.grid[0], g.cells, key=f"mask {m}") > 0.3 for m, g in sample.tracks.items()}
    references = {"video": (picture((9,), batch=batch),), "audio": (noises((9,), batch),)}
    kept = ("video", "audio") if hears else ("video",)
    return Sample(
        {m: sample.tracks[m] for m in kept},
        {m: references[m] for m in kept},
        {m: masks[m] for m in kept},
        FPS,
    )


def awake(model: nn.Module) -> nn.Module:
    """With values where training starts from zero, so that everything matters."""
    generator = torch_generator("conditions")
    for parameter in model.eval().parameters():
        if parameter.std() < 0.05 or not parameter.any():
            nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def joint(audio_dim: int = 0) -> Any:
    sizes = {"dim": 24, "audio_dim": audio_dim, "depth": 2, "num_heads": 2, "mlp_ratio": 1.0}
    config = ModelConfig(type="joint", **sizes)
    return awake(
        build_backbone(config, CHANNELS, TEXT_DIM, audio_channels=SOUND_CHANNELS if audio_dim else 0)
    )


def factorized() -> Any:
    config = ModelConfig(type="factorized", dim=24, depth=2, num_heads=2, window_size=2, mlp_ratio=1.0)
    return awake(build_backbone(config, CHANNELS, TEXT_DIM))


def published(kind: str) -> tuple[Any, dict[str, int], int]:
    """(model, channels of a token, channels of the text)."""
    if kind == "wan":
        sizes = WAN["tiny"]
        return awake(Wan(sizes)), {"video": 4 * sizes.out_channels}, sizes.text_dim
    if kind == "cogvideox":
        cog = COGVIDEOX["tiny"]
        return awake(CogVideoX(cog)), {"video": 4 * cog.out_channels}, cog.text_embed_dim
    ltx = LTX2_PRESETS["tiny2.3"]
    channels = {"video": ltx.in_channels, "audio": ltx.audio_in_channels}
    return awake(LTX2(ltx)), channels, sum(ltx.text_channels)


def task_for(conditions: Sequence[Any], hears: bool, channels: Any = None, dim: int = TEXT_DIM):
    """A request of these conditions; every token of its values is a number of its own."""
    sample = asked(hears)
    values = Values(
        tokens(sample, "clean", channels),
        {
            m: tuple(
                draw(g.batch, g.grid[0], g.cells, x.shape[-1], key=f"reference {m}")
                for g in sample.references[m]
            )
            for m, x in tokens(sample, "clean", channels).items()
        },
    )
    text = words(len(SHOTS))
    text = replace(text, x_BLC=draw(2, text.x_BLC.shape[1], dim, key="words"))
    given = Conditions(tuple(conditions)).fixed(sample)
    return Task(sample, text, tokens(sample, "noise", channels), given=given, values=values)


def exact(task: Task, out: Mapping[str, Tensor]) -> None:
    """What is given has come back to the bit, and nothing else has."""
    for m, x_BFSC in out.items():
        given_BFS = torch.zeros(x_BFSC.shape[:3], dtype=torch.bool)
        if m in task.given.marks:
            given_BFS = ~task.given.marks[m].made_BN.expand(len(x_BFSC), -1).unflatten(1, x_BFSC.shape[1:3])
        assert torch.equal(x_BFSC[given_BFS], task.clean.clean[m][given_BFS])
        assert x_BFSC.isfinite().all()
        assert not (x_BFSC[~given_BFS] == task.clean.clean[m][~given_BFS]).all(dim=-1).any()
    assert (
        any(m in task.given.marks and not task.given.marks[m].made_BN.all() for m in out)
        or task.given.references
    )


@every_plan
@pytest.mark.parametrize("case", [*GIVING, *HEARING])
def test_what_is_given_comes_back_to_the_bit(case: str, plan: str) -> None:
    hears = case in HEARING
    task = task_for((GIVING | HEARING)[case], hears)
    exact(task, rollout(Predictor(joint(12 * hears)), PLANS[plan], task, Sampling(steps=2)))


@every_plan
@pytest.mark.parametrize("case", GIVING)
def test_what_is_given_comes_back_to_the_bit_from_factorized(case: str, plan: str) -> None:
    task = task_for(GIVING[case], False)
    exact(task, rollout(Predictor(factorized()), PLANS[plan], task, Sampling("heun", 1)))


@pytest.mark.parametrize("plan", ["text to video", "scenes", "chunks"])
@pytest.mark.parametrize("case", ["prefix", "all at once", "reference", "a hint beside", "scene of both"])
@pytest.mark.parametrize("kind", ["wan", "cogvideox", "ltx2"])
def test_what_is_given_comes_back_to_the_bit_from_published_networks(kind, case, plan) -> None:
    model, channels, dim = published(kind)
    hears = kind == "ltx2"
    if kind == "cogvideox" and case == "a hint beside":
        return  # its noise levels are DDPM's: refused, see below
    if case in HEARING and not hears:
        return
    task = task_for((GIVING | HEARING)[case], hears, channels, dim)
    exact(task, rollout(Predictor(model), PLANS[plan], task, Sampling(steps=1)))


def recipe(hears: bool, **train: Any) -> Recipe:
    """What a training step reads of one."""
    return Recipe.model_validate(
        {
            "video": {"fps": FPS, "width": 24, "height": 16, "num_frames": 17},
            "tokenizer": {"latent_f": 8, "latent_t": 4, "latent_d": CHANNELS, "first_alone": True},
            "audio": {"enabled": hears},
            "model": {"type": "joint", "dim": 24, "num_heads": 2, "audio_dim": 12 * hears},
            "plan": {"modalities": ["video", "audio"] if hears else ["video"], "audio_loss": 0.5},
            "train": {"precision": "fp32", "cfg_dropout_prob": 0.0, **train},
        }
    )


def batch_of(sample: Sample, *, scenes: int = 1, silent: Tensor | None = None) -> Batch:
    """The latents of such a sample (patch 1)."""

    def latents(m: str, g: Geometry, key: str) -> Latents:
        channels = CHANNELS if m == "video" else SOUND_CHANNELS
        assert g.span_BF2 is not None
        return Latents(
            draw(g.batch, *g.grid, channels, key=f"{key} {m}"),
            g.seconds_BF,
            g.span_BF2,
            g.scene_BF.expand(g.batch, -1),
            int(g.pixels_per_cell[0]),
            silent if m == "audio" else g.present_B,
        )

    text = words(scenes, sample.batch)
    return Batch(
        ids=[str(i) for i in range(sample.batch)],
        latents={m: latents(m, g, "clean") for m, g in sample.tracks.items()},
        captions=[["a"] * scenes] * sample.batch,
        text=text,
        empty_text=replace(text, x_BLC=text.x_BLC[:1], valid_BL=text.valid_BL[:1]),
        references={
            m: tuple(latents(m, g, f"reference {i}") for i, g in enumerate(all_of))
            for m, all_of in sample.references.items()
        },
        masks={
            m: mask.expand(sample.batch, -1, -1).unflatten(2, sample.tracks[m].grid[1:])
            for m, mask in sample.masks.items()
        },
    )


CONTEXT = StepContext(0, 5, 0, 0, torch.device("cpu"), "denoise")


class Fed:
    """One training step, with the noise in our hands."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, backbone: Any, plan: Plan, recipe: Recipe) -> None:
        self.noise: dict[str, Tensor] = {}
        self.streams: Streams = {}
        self.patch, self.backbone = monkeypatch, backbone
        self.method = Denoise(recipe, backbone, plan)
        backbone.register_forward_pre_hook(lambda module, args: self.streams.update(args[0]))

    def losses(self, batch: Batch, noise: Mapping[str, Tensor]) -> Any:
        real = StepContext.randn

        def told(context: StepContext, like: Tensor, purpose: str) -> Tensor:
            m = {"noise": "video", "noise audio": "audio"}.get(purpose)
            return real(context, like, purpose) if m is None else noise[m]

        self.patch.setattr(StepContext, "randn", told)
        return self.method.losses(batch, CONTEXT)


@every_plan
@pytest.mark.parametrize("case", [*GIVING, *HEARING, "factorized"])
def test_training_is_blind_to_the_noise_of_what_is_given(monkeypatch, case: str, plan: str) -> None:
    """The gradient of the loss by it is exactly 0, another noise leaves the loss as it is to the bit, and
    what is given stands at noise level 0 and does not count."""
    hears = case in HEARING
    conditions = (GIVING | HEARING).get(case, GIVING["all at once"])
    sample = asked(hears)
    backbone = factorized() if case == "factorized" else joint(12 * hears)
    fed = Fed(monkeypatch, backbone, of(plan, *conditions), recipe(hears))
    batch = batch_of(sample, scenes=len(SHOTS))
    noise = {m: x.requires_grad_() for m, x in tokens(sample, "noise").items()}
    losses = fed.losses(batch, noise)
    losses.loss_B.sum().backward()
    given = drawn(sample, *conditions)
    louder, some = {}, False
    for m, g in sample.tracks.items():
        kinds = given.marks[m].kinds if m in given.marks else ()
        # What is shown at a noise level shows its noise by design.
        clean = torch.tensor([False, *(k.strength == 1 and k.noise == 0 for k in kinds)])
        given_BFS = clean[marked(given, sample, m)]
        some = some or bool(given_BFS.any())
        gradient = noise[m].grad
        assert gradient is not None
        assert not gradient[given_BFS].any()
        assert given_BFS.all() or (gradient[~given_BFS] != 0).any()
        louder[m] = torch.where(given_BFS[..., None], 7.0, noise[m].detach())
        stream = fed.streams[m]
        last = g.tokens

        def of_clip(t_BN: Tensor, last: int = last, g: Geometry = g) -> Tensor:
            return t_BN.expand(2, *t_BN.shape[1:])[:, -last:].unflatten(1, (g.grid[0], g.cells))

        clean_BFSC = patchify(batch.latents[m].x_BFHWC, (1, 1, 1))
        assert torch.equal(of_clip(stream.x_BNC)[given_BFS], clean_BFSC[given_BFS])
        assert not of_clip(stream.sigma_BN)[given_BFS].any()
        assert not of_clip(stream.loss_BN)[given_BFS].any()
        exact_BFS = torch.tensor([True, *(k.strength < 1 for k in kinds)])[marked(given, sample, m)]
        assert torch.equal(of_clip(stream.loss_BN) > 0, exact_BFS), "hints count"
    assert some or case == "a reference alone"
    assert torch.equal(fed.losses(batch, louder).loss_B, losses.loss_B)


def test_context_is_never_in_the_loss_and_is_clean(monkeypatch) -> None:
    sample = asked(True)
    conditions = (Reference(), Reference(modality="audio"), Prefix(frames=5))
    fed = Fed(monkeypatch, joint(12), of("teacher", *conditions), recipe(True))
    fed.losses(batch_of(sample, scenes=len(SHOTS)), tokens(sample, "noise"))
    for m, g in sample.tracks.items():
        stream = fed.streams[m]
        before = stream.x_BNC.shape[1] - g.tokens
        assert before == g.tokens + sample.references[m][0].tokens
        assert stream.context_BN.expand(2, -1)[:, :before].all()
        assert not stream.context_BN[:, before:].any()
        assert not stream.loss_BN[:, :before].any()
        assert not stream.sigma_BN[:, :before].any()


# --- hints and noise ----------------------------------------------------------------------------------------


def streams_of(
    plan: Plan, sample: Sample, given: Given, sigma: float | None = None
) -> tuple[Layout, Streams, dict[str, Tensor]]:
    """Of a training step; sigma: of all draws."""
    layout = plan.layout(sample, words(sample.main.scenes, sample.batch), given)
    values = Values(
        tokens(sample, "clean"),
        {
            m: tuple(
                draw(g.batch, g.grid[0], g.cells, CHANNELS if m == "video" else SOUND_CHANNELS, key=f"r {i}")
                for i, g in enumerate(all_of)
            )
            for m, all_of in sample.references.items()
        },
    )
    sigma_BK = {}
    for m, track in layout.tracks.items():
        draws = torch.rand(sample.batch, track.num_draws, generator=torch_generator("sigma", m))
        sigma_BK[m] = track.sigmas(draws if sigma is None else torch.full_like(draws, sigma))
    text = words(sample.main.scenes, sample.batch)
    streams = to_streams(layout, values, tokens(sample, "noise"), sigma_BK, text, LINEAR.mix)
    return layout, dict(streams), sigma_BK


def test_a_hint_is_trained_from_its_part_of_the_noise() -> None:
    sample = Sample({"video": picture()}, fps=FPS)
    given = drawn(sample, Prefix(frames=5, strength=0.6))
    _, streams, _ = streams_of(TextToVideo(), sample, given)
    video = streams["video"]
    sigma_BN = video.sigma_BN
    assert torch.allclose(sigma_BN[:, :12], 0.4 * sigma_BN[:, -1:], rtol=1e-6)
    clean, noise = (tokens(sample, key)["video"].flatten(1, 2) for key in ("clean", "noise"))
    assert torch.equal(video.x_BNC, LINEAR.mix(clean, noise, sigma_BN))
    assert (video.loss_BN == 1).all()


class Gauss(nn.Module):
    """The exact velocity towards independent normal data of deviation ``spread``, at each token's level."""

    patch, modalities = (1, 1, 1), ("video",)

    def __init__(self, spread: float) -> None:
        super().__init__()
        self.spread = spread

    def forward(self, streams: Streams, visibility: Visibility) -> dict[str, Tensor]:
        video = streams["video"]
        s, a = video.sigma_BN[..., None], 1 - video.sigma_BN[..., None]
        variance = (a * self.spread) ** 2 + s**2
        # E[noise - clean | x].
        return {"video": video.x_BNC * (s - a * self.spread**2) / variance}


@pytest.mark.parametrize("solver, steps", [("euler", 400), ("heun", 40), ("dpmpp_2m", 60)])
def test_a_hint_flows_as_the_exact_flow_has_it(solver, steps) -> None:
    """The flow of normal data only scales: from level t, of deviation d(t), to the data's own."""
    spread, sample = 0.5, Sample({"video": picture()}, fps=FPS)
    hint = Conditions((Prefix(frames=9, strength=0.3), LastFrame())).fixed(sample)
    clean, noise = tokens(sample, "clean"), tokens(sample, "noise")
    task = Task(sample, words(), noise, given=hint, values=Values(clean))
    out = rollout(Predictor(Gauss(spread)), TextToVideo(), task, Sampling(solver, steps))["video"]
    wanted = spread * noise["video"]
    begin = 0.3 * clean["video"] + 0.7 * noise["video"]
    wanted[:, :3] = begin[:, :3] * spread / ((0.3 * spread) ** 2 + 0.7**2) ** 0.5
    wanted[:, 4] = clean["video"][:, 4]
    torch.testing.assert_close(out, wanted, atol=0.02, rtol=0)


class Straight(nn.Module):
    """Knows the one clip that there is."""

    patch, modalities = (1, 1, 1), ("video",)

    def __init__(self, clean_BFSC: Tensor) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.clean_BNC = clean_BFSC.flatten(1, 2)

    def forward(self, streams: Streams, visibility: Visibility) -> dict[str, Tensor]:
        video = streams["video"]
        return {"video": (video.x_BNC - self.clean_BNC) / video.sigma_BN[..., None].clamp_min(1e-6)}


@pytest.mark.parametrize("strength", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("plan", ["text to video", "scenes", "chunks"])
def test_a_hint_of_the_truth_comes_back(plan: str, strength: float) -> None:
    sample = Sample({"video": picture(SHOTS)}, fps=FPS)
    clean = tokens(sample, "clean")
    task = Task(
        sample,
        words(len(SHOTS)),
        tokens(sample, "noise"),
        given=Conditions((Suffix(frames=8, strength=strength), FirstFrame())).fixed(sample),
        values=Values(clean),
    )
    out = rollout(Predictor(Straight(clean["video"])), PLANS[plan], task, Sampling(steps=3))["video"]
    torch.testing.assert_close(out, clean["video"], atol=1e-5, rtol=0)


def test_the_start_of_a_hint_is_its_part_of_the_noise() -> None:
    sample = Sample({"video": picture()}, fps=FPS)
    given = Conditions((Prefix(frames=5, strength=0.25),)).fixed(sample)
    layout = TextToVideo().layout(sample, words(), given)
    clean, noise = tokens(sample, "clean")["video"], tokens(sample, "noise")["video"]
    begin = start(layout, "video", clean, noise, LINEAR.mix)
    assert torch.equal(begin[:, 2:], noise[:, 2:])
    torch.testing.assert_close(begin[:, :2], 0.25 * clean[:, :2] + 0.75 * noise[:, :2])


def listening(backbone: Any) -> list[dict[str, Stream]]:
    heard: list[dict[str, Stream]] = []
    backbone.register_forward_pre_hook(lambda module, args: heard.append(dict(args[0])))
    return heard


@every_plan
def test_a_history_is_shown_at_its_noise_level_and_comes_back_clean(plan: str) -> None:
    backbone = joint()
    heard = listening(backbone)
    task = task_for((Prefix(frames=5, noise=0.3),), False)
    exact(task, rollout(Predictor(backbone), PLANS[plan], task, Sampling(steps=2)))
    shown = LINEAR.mix(task.clean.clean["video"], task.noise["video"], torch.full((2, 5, 6), 0.3))[:, :2]
    first = [
        s["video"] for s in heard if s["video"].cell_BN3[0, -1, 0] >= 1 and s["video"].scene_BN.min() >= 0
    ]
    seen = 0
    for video in first:
        frame_N = video.cell_BN3[0, :, 0]
        for frame in (0, 1):
            here = frame_N == frame
            if here.any():
                seen += 1
                x = video.x_BNC[:, here].unflatten(1, (-1, 6))
                assert torch.allclose(x, shown[:, frame, None].expand_as(x), atol=1e-6)
                torch.testing.assert_close(
                    video.sigma_BN[:, here], torch.full_like(x[..., 0], 0.3).flatten(1)
                )
    assert seen


def test_training_draws_the_level_of_a_history_up_to_its_noise() -> None:
    sample = Sample({"video": picture(batch=500)}, fps=FPS)
    _, streams, _ = streams_of(TextToVideo(), sample, drawn(sample, FirstFrame(noise=0.4)))
    sigma_B = streams["video"].sigma_BN[:, 0]
    assert torch.equal(streams["video"].sigma_BN[:, :6], sigma_B[:, None].expand(-1, 6))
    assert sigma_B.max() <= 0.4
    assert abs(sigma_B.mean() - 0.2) < 0.03
    assert not streams["video"].loss_BN[:, :6].any()
    held = Conditions((FirstFrame(noise=0.4),)).fixed(sample)
    _, streams, _ = streams_of(TextToVideo(), sample, held)
    torch.testing.assert_close(streams["video"].sigma_BN[:, :6], torch.full((500, 6), 0.4))


@pytest.mark.parametrize("solver, eta", [("consistency", 0.0), ("ddim", 0.5)])
def test_a_hint_does_not_go_with_fresh_noise(solver, eta) -> None:
    task = task_for((FirstFrame(strength=0.5),), False)
    with pytest.raises(UserError, match="strength below 1"):
        rollout(Predictor(joint()), TextToVideo(), task, Sampling(solver, 2, eta=eta))
    model, channels, dim = published("cogvideox")
    task = task_for((FirstFrame(strength=0.5),), False, channels, dim)
    with pytest.raises(UserError, match="strength below 1"):
        rollout(Predictor(model), TextToVideo(), task, Sampling(steps=1))


# --- references ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [ALONE, GROUPED], ids=["first alone", "grouped"])
@pytest.mark.parametrize("downscale", [1, 2, 4])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_a_reference_covers_the_clip(stride: int, downscale: int, spec: TokenizerSpec) -> None:
    """In pixels its cells are larger. In time each frame lasts ``stride`` times as long; where the first
    stands alone all are moved back by (stride - 1) frames of the clip and never before its start (LTX-2)."""
    first = int(spec.first_alone)
    target = picture((16 + first,), spec, side=(4, 8), batch=1)
    reference = picture(
        (16 // stride + first,), spec, side=(4 // downscale, 8 // downscale), batch=1, fps=FPS / stride
    )
    frame_px = [(0, 1)] * first + [(first + 4 * i, first + 4 * i + 4) for i in range(4 // stride)]
    late = (stride - 1) * first
    wanted = [(max(0, b * stride - late) + max(0, e * stride - late)) / 2 / FPS for b, e in frame_px]
    placed = beside(target, reference)
    torch.testing.assert_close(placed.seconds_BF[0], torch.tensor(wanted))
    last_end = max(0, frame_px[-1][1] * stride - late) / FPS
    assert last_end == pytest.approx(float(target.span_BF2[0, -1, 1])), "they end together"

    sample = Sample({"video": target}, {"video": (reference,)}, fps=FPS)
    _, streams, _ = streams_of(TextToVideo(), sample, drawn(sample, Reference()))
    video = streams["video"]
    here = video.context_BN[0]
    position = video.position_BN3[0, here].unflatten(0, reference.grid)
    assert here[: reference.tokens].all()
    assert not here[reference.tokens :].any()
    for axis, count in ((1, 4 // downscale), (2, 8 // downscale)):
        cell = 8 * downscale
        along = position.select(0, 0).select(2 - axis, 0)[:, axis]
        assert along.tolist() == [(i + 0.5) * cell for i in range(count)]
    assert video.cell_BN3[0, here].amax(dim=0).tolist()[1:] == [4 - downscale, 8 - downscale]
    gridded = downscale == 1
    shape = (target.grid[0] + reference.grid[0], 4, 8)
    assert video.grid == (shape if gridded else (1, 1, target.tokens + reference.tokens))


def test_a_sample_without_its_reference_is_one_of_a_layout_without_any() -> None:
    sample = asked(True)
    model, seen = joint(12).double(), {}

    def answers(given: Given, sample: Sample) -> dict[str, Tensor]:
        layout, streams, _ = streams_of(TextToVideo(), sample, given)
        double = {
            m: replace(s, x_BNC=s.x_BNC.double(), sigma_BK=s.sigma_BK.double()) for m, s in streams.items()
        }
        with torch.no_grad():
            out = model(double, layout.visibility)
        return {m: x[:, -sample.tracks[m].tokens :] for m, x in out.items()}

    has_B = torch.tensor([True, False])
    for name, held in (("one", has_B), ("both", None), ("none", ~torch.ones(2, dtype=torch.bool))):
        given = Given({}, {m: (Beside(present_B=held),) for m in sample.tracks})
        seen[name] = answers(given, sample)
    seen["no layout"] = answers(NOTHING, sample)
    for m in sample.tracks:
        torch.testing.assert_close(seen["one"][m][1], seen["no layout"][m][1], atol=1e-10, rtol=0)
        torch.testing.assert_close(seen["none"][m], seen["no layout"][m], atol=1e-10, rtol=0)
        torch.testing.assert_close(seen["one"][m][0], seen["both"][m][0], atol=1e-10, rtol=0)
        assert (seen["both"][m][0] - seen["no layout"][m][0]).abs().max() > 1e-3


def test_references_of_several_sizes_in_a_batch_are_one_reference() -> None:
    """Each sample has its own; they stand in one scene, whose caption they share."""
    sizes = [
        picture((5,), side=(1, 2), present_B=torch.tensor([True, False])),
        picture((9,), side=(2, 3), present_B=torch.tensor([False, True])),
    ]
    sample = Sample({"video": picture()}, {"video": tuple(sizes)}, fps=FPS)
    given = drawn(sample, Reference(probability=0.9))
    _, streams, _ = streams_of(TextToVideo(), sample, given)
    video = streams["video"]
    here = video.context_BN[0]
    assert here.sum() == sum(size.tokens for size in sizes)
    assert video.scene_BN[0, here].unique().tolist() == [1]
    assert video.valid_BN is not None
    small = sizes[0].tokens
    taken = given.references["video"][0].present_B
    assert taken is not None
    assert torch.equal(video.valid_BN[:, 0], taken & torch.tensor([True, False]))
    assert torch.equal(video.valid_BN[:, small], taken & torch.tensor([False, True]))
    assert video.valid_BN[:, -sample.main.tokens :].all()


def test_a_reference_is_dropped_by_its_probability_and_shown_at_its_noise(monkeypatch) -> None:
    sample = replace(asked(False, batch=400), masks={})
    backbone = Straight(tokens(sample, "clean")["video"])
    plan = of("text to video", Reference(probability=0.3, noise=0.5))
    fed = Fed(monkeypatch, backbone, plan, recipe(False))

    def forward(streams: Streams, visibility: Visibility) -> dict[str, Tensor]:
        return {"video": streams["video"].x_BNC * backbone.unused}

    monkeypatch.setattr(backbone, "forward", forward)
    batch = batch_of(sample, scenes=len(SHOTS))
    fed.losses(batch, tokens(sample, "noise"))
    video = fed.streams["video"]
    assert video.valid_BN is not None
    assert abs(video.valid_BN[:, 0].float().mean() - 0.3) < 0.1
    level_B = video.sigma_BN[:, 0]
    assert level_B.max() <= 0.5
    assert abs(level_B.mean() - 0.25) < 0.04
    clean = batch.references["video"][0].x_BFHWC.flatten(1, 3)
    noise = (video.x_BNC[:, : clean.shape[1]] - (1 - level_B[:, None, None]) * clean) / level_B[:, None, None]
    assert abs(noise.std() - 1) < 0.02
    assert abs((noise * clean).mean()) < 0.02


def test_references_do_not_see_each_other_under_teacher_forcing_either() -> None:
    sample = asked(False)
    sample = replace(sample, references={"video": (*sample.references["video"], picture((5,)))})
    given = Conditions((Reference(), Reference())).fixed(sample)
    layout, streams, _ = streams_of(PLANS["teacher"], sample, given)
    a = streams["video"].attributes
    sees = layout.visibility.allows(a.queries(), a.keys())[0]
    one, two = sample.references["video"][0].tokens, sample.references["video"][1].tokens
    copies = slice(one + two, one + two + sample.main.tokens)
    assert not sees[:one, one : one + two].any()
    assert not sees[one : one + two, :one].any()
    assert sees[:one, :one].all()
    assert sees[copies, : one + two].all(), "the clean past sees them, as a past that was made does"
    assert sees[-1, : one + two].all()


# --- sound --------------------------------------------------------------------------------------------------


def test_sound_has_a_noise_level_and_a_loss_of_its_own(monkeypatch) -> None:
    sample = asked(True)
    fed = Fed(monkeypatch, joint(12), TextToVideo(audio_loss=0.5), recipe(True))
    losses = fed.losses(batch_of(sample, scenes=len(SHOTS)), tokens(sample, "noise"))
    sigma = {m: fed.streams[m].sigma_BN for m in ("video", "audio")}
    assert all((s == s[:, :1]).all() for s in sigma.values())
    assert (sigma["video"][:, 0] != sigma["audio"][:, 0]).all()
    assert torch.equal(fed.streams["text"].sigma_BN[:, 0], sigma["video"][:, 0])
    mean = losses.logs["loss_video"] + 0.5 * losses.logs["loss_audio"]
    torch.testing.assert_close(losses.loss_B.mean(), mean)
    alone = Fed(monkeypatch, fed.backbone, TextToVideo(audio_loss=0.5), recipe(False))
    silent = batch_of(asked(False), scenes=len(SHOTS))
    video_alone = alone.losses(silent, tokens(sample, "noise"))
    assert "loss_audio" not in video_alone.logs
    assert torch.equal(alone.streams["video"].sigma_BN, sigma["video"]), "video draws what it drew alone"


@every_plan
def test_a_clip_that_lacks_its_sound_learns_its_picture_alone(monkeypatch, plan: str) -> None:
    sample = asked(True)
    fed = Fed(monkeypatch, joint(12), of(plan), recipe(True))
    present_B = torch.tensor([False, True])
    batch = batch_of(sample, scenes=len(SHOTS), silent=present_B)
    noise = tokens(sample, "noise")
    losses = fed.losses(batch, noise)
    other = {**noise, "audio": torch.where(present_B[:, None, None, None], noise["audio"], 9.0)}
    again = fed.losses(batch, other)
    assert torch.equal(again.loss_B, losses.loss_B)
    assert not fed.streams["audio"].loss_BN.expand(2, -1)[0].any()
    assert fed.streams["audio"].loss_BN.expand(2, -1)[1].any()
    whole = fed.losses(batch_of(sample, scenes=len(SHOTS)), noise)
    torch.testing.assert_close(whole.loss_B[1], losses.loss_B[1])
    assert losses.logs["nothing_to_learn"] == 0


def test_sound_in_chunks_belongs_to_the_picture_that_sounds_with_it() -> None:
    sample = both()
    for plan in (Chunks(2), Chunks(2, first_alone=True), Chunks(3, forcing="teacher")):
        layout = plan.layout(sample, words(), NOTHING)
        chunk_F = plan.chunk_of(5).tolist()
        ends = [1, 5, 9, 13, 17]
        wanted = [chunk_F[next(i for i, end in enumerate(ends) if t < end)] for t in range(17)]
        assert layout.tracks["audio"].chunk_T[-17:].tolist() == wanted
        stages = plan.stages(sample)
        for n, stage in enumerate(stages):
            assert wanted[stage["audio"]] == [n] * wanted.count(n)
            assert chunk_F[stage["video"]] == [n] * chunk_F.count(n)
        assert stages[-1]["audio"].stop == 17
    # A picture of one cell is no sound.
    small = Sample({"video": picture(side=(1, 1)), "audio": noises()}, fps=FPS)
    assert Chunks(2).layout(small, words(), NOTHING).tracks["audio"].chunk_T.tolist()[:5] == [0] * 5


# --- scenes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan, later",
    [
        (Scenes(), 0.0),
        (Scenes(positions="jump", jump=0.5), 0.25),
        (Scenes(positions="gap", gap=4.0), 4.0),
        (Scenes(positions="reset"), None),
    ],
    ids=["continuous", "jump", "gap", "reset"],
)
def test_where_the_next_scene_stands(plan: Scenes, later: float | None) -> None:
    """A usual token frame lasts half a second; the last scene is one frame that stands alone."""
    lengths = (5, 9, 1)
    sample = both(lengths)
    _, streams, _ = streams_of(plan, sample, NOTHING)
    seconds, frame = [], []
    for n, length in enumerate(lengths):
        begin = sum(lengths[:n])
        starts = [0, *range(1, length, 4)]
        for i, b in enumerate(starts):
            e = 1 if b == 0 else b + 4
            own = (b + e) / 2 / FPS
            seconds.append(own if later is None else begin / FPS + own + n * later)
            frame.append(float(i) if later is None else len(frame) + n * later / 0.5)
    video = streams["video"]
    torch.testing.assert_close(video.position_BN3[0, ::6, 0], torch.tensor(seconds))
    torch.testing.assert_close(video.index_BN3[0, ::6, 0].float(), torch.tensor(frame))
    assert (video.jump_BN is None) == (later == 0.0)
    assert torch.equal(video.cell_BN3[0, ::6, 0], torch.arange(6))
    sound = [
        (i + 0.5) / FPS if later is None else (sum(lengths[:n]) + i + 0.5) / FPS + n * later
        for n, length in enumerate(lengths)
        for i in range(length)
    ]
    torch.testing.assert_close(streams["audio"].position_BN3[0, :, 0], torch.tensor(sound))
    if later:
        wanted = torch.arange(15) + torch.tensor([0] * 5 + [1] * 9 + [2]) * later * FPS
        torch.testing.assert_close(streams["audio"].index_BN3[0, :, 0], wanted)


def test_each_scene_has_a_noise_level_of_its_own_if_the_plan_says_so() -> None:
    sample = both((5, 9, 5))
    _, streams, _ = streams_of(Scenes(noise="own"), sample, drawn(sample, Scene(scenes=(1,))))
    for m in ("video", "audio"):
        sigma_BN, scene_N = streams[m].sigma_BN, streams[m].scene_BN[0]
        levels = [sigma_BN[:, scene_N == n] for n in range(3)]
        assert all((level == level[:, :1]).all() for level in levels)
        assert not levels[1].any()
        assert (levels[0][:, 0] != levels[2][:, 0]).all()
    text = streams["text"]
    for n, level in enumerate(
        [streams["video"].sigma_BN[:, 0], torch.zeros(2), streams["video"].sigma_BN[:, -1]]
    ):
        assert torch.equal(text.sigma_BN[:, text.scene_BN[0] == n], level[:, None].expand(-1, WORDS))
    _, shared, _ = streams_of(Scenes(), sample, NOTHING)
    assert (shared["video"].sigma_BN == shared["video"].sigma_BN[:, :1]).all()


def test_words_of_a_scene_that_is_given_with_noise_stand_at_that_level() -> None:
    sample = both((5, 9))
    _, streams, _ = streams_of(Scenes(), sample, Conditions((Scene(noise=0.2),)).fixed(sample))
    text = streams["text"].sigma_BN
    torch.testing.assert_close(text[:, :WORDS], torch.full((2, WORDS), 0.2))
    assert torch.equal(text[:, WORDS:], streams["video"].sigma_BN[:, -1:].expand(-1, WORDS))


def test_a_plan_without_conditions_keeps_one_level_and_no_mask() -> None:
    """The fast way: nothing that could be given costs anything."""
    sample = Sample({"video": picture()}, fps=FPS)
    for plan in (TextToVideo(), Scenes()):
        layout, streams, _ = streams_of(plan, sample, plan.conditions.draw(sample, torch_generator("x")))
        assert layout.tracks["video"].all_made
        assert streams["video"].sigma_BK.shape[1] == 1
        assert len(streams["video"].level_BN) == 1
        assert streams["text"].sigma_BK is streams["video"].sigma_BK
        assert streams["video"].valid_BN is None


@every_plan
def test_a_training_step_never_waits_for_the_device(plan: str) -> None:
    """On a device without values every read of one is an error, and so are tensors left behind."""
    conditions = (
        FirstFrame(probability=0.5),
        Keyframes(times=(0.0, 1.2)),
        Keyframes(count=(1, 2)),
        Prefix(frames=(3, 9), noise=0.2),
        Prefix(),
        Suffix(seconds=0.5, strength=0.4),
        SpatialCrop(region=(0, 0, 8, 8)),
        SpatialCrop(),
        Mask(),
        Mask(masks="data"),
        Mask(modality="audio"),
        Scene(scenes="some"),
        Scene(scenes="all_but_one"),
        Scene(scenes=(0,)),
        Whole(probability=0.2),
        Reference(noise=0.3, probability=0.5),
        Reference(modality="audio"),
    )

    def away(t: Tensor) -> Tensor:
        return t.to("meta")

    here = asked(True)
    sample = Sample(
        {m: move_tensors(g, away) for m, g in here.tracks.items()},
        {m: tuple(move_tensors(g, away) for g in all_of) for m, all_of in here.references.items()},
        {m: away(mask) for m, mask in here.masks.items()},
        FPS,
    )
    layout = PLANS[plan].layout(sample, move_tensors(words(len(SHOTS)), away), drawn(sample, *conditions))
    clean = {m: away(x) for m, x in tokens(here, "clean").items()}
    references = {
        m: tuple(away(torch.zeros(2, g.grid[0], g.cells, clean[m].shape[-1])) for g in all_of)
        for m, all_of in sample.references.items()
    }
    sigma = {m: track.sigmas(away(torch.zeros(2, track.num_draws))) for m, track in layout.tracks.items()}
    text = move_tensors(words(len(SHOTS)), away)
    streams = to_streams(layout, Values(clean, references), clean, sigma, text, LINEAR.mix)
    held = [t for s in streams.values() for t in (*vars(s).values(), s.sigma_BN, s.index_BN3)]
    assert {t.device.type for t in held if isinstance(t, Tensor)} == {"meta"}


# --- from the cache and guided by conditions ----------------------------------------------------------------


class Plain(nn.Module):
    """A backbone that does not say that it has a cache."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone, self.patch, self.modalities = backbone, backbone.patch, backbone.modalities

    def forward(self, streams: Streams, visibility: Visibility, **how: Any) -> dict[str, Tensor]:
        return self.backbone(streams, visibility, **how)

    def blocks(self) -> Any:
        return self.backbone.blocks()


@pytest.mark.parametrize("forcing", ["diffusion", "teacher"])
@pytest.mark.parametrize(
    "conditions",
    [
        (FirstFrame(), Keyframes(times=(1.2,))),
        (Prefix(frames=5),),
        (Prefix(frames=9, noise=0.3), Suffix(frames=4, strength=0.5)),
        (SpatialCrop(region=(0, 0, 16, 8)), Prefix(modality="audio", frames=6)),
        (Scene(scenes=(0,), modality="audio", strength=0.7), LastFrame(noise=0.5)),
    ],
    ids=["frames", "a whole chunk", "noise and a hint", "crop and sound", "hint of sound"],
)
def test_a_guided_rollout_from_the_cache_is_the_masked_one(conditions, forcing) -> None:
    """With guidance by text, by each condition, by skipped attention and between sound and picture."""
    task = task_for(conditions, True)
    model = joint(12).double()

    def doubled(held: Any) -> Any:
        return {m: x.double() for m, x in held.items()}

    names = {c.type for c in conditions}
    sampled = Conditions(tuple(conditions))
    task = replace(
        task,
        noise=doubled(task.noise),
        text=replace(task.text, x_BLC=task.text.x_BLC.double()),
        negative=replace(task.text, x_BLC=-task.text.x_BLC.double()),
        values=Values(doubled(task.clean.clean)),
        without={name: sampled.without(name).fixed(task.sample) for name in names},
    )
    guidance = Guidance(
        2.0,
        rescale=0.3,
        skip=Term(0.5),
        skip_blocks=(1,),
        cross=Term(1.5),
        conditions={name: Term(1.7) for name in names},
    )
    plan = Chunks(2, forcing=forcing, first_alone=True)
    masked, cached = (
        rollout(Predictor(backbone), plan, task, Sampling(steps=2, guidance=guidance))
        for backbone in (Plain(model), model)
    )
    plain = rollout(Predictor(model), plan, task, Sampling(steps=2))
    for m in task.sample.tracks:
        assert (masked[m] - cached[m]).abs().max() < 1e-9 * cached[m].abs().max()
        assert (plain[m] - cached[m]).abs().max() > 1e-3
    exact(task, cached)


def test_guidance_by_a_condition_is_away_from_the_same_without_it() -> None:
    """Two steps of Euler by hand: what a pass is not given it sees as noisy as what is made."""
    task = task_for((FirstFrame(), Prefix(frames=5, strength=0.4), LastFrame()), False)
    without = {"first_frame": Conditions((Prefix(frames=5, strength=0.4), LastFrame())).fixed(task.sample)}
    model = joint()
    guided = Sampling("euler", 2, guidance=Guidance(conditions={"first_frame": Term(3.0)}))
    out = rollout(Predictor(model), TextToVideo(), replace(task, without=without), guided)["video"]
    clean, noise = task.clean.clean["video"], task.noise["video"]

    def velocity(given: Given, x: Tensor, sigma: float) -> Tensor:
        layout = TextToVideo().layout(task.sample, task.text, given)
        track = layout.tracks["video"]
        levels = {"video": track.sigmas(torch.full((2, track.num_draws), sigma))}
        args = layout, task.clean, {"video": x}, task.noise, levels, task.text, LINEAR.mix
        with torch.no_grad():
            return read_video(layout, model(to_streams_at(*args), layout.visibility))

    # The first frame is given; without it, it is a hint. The second is a hint, the last is given.
    share = torch.tensor([0.0, 0.6, 1.0, 1.0, 0.0])[None, :, None, None]
    x = torch.where(share == 0.6, 0.4 * clean + 0.6 * noise, noise)
    for sigma in (1.0, 0.5):
        other = x.clone()
        other[:, 0] = ((1 - 0.6 * sigma) * clean + 0.6 * sigma * noise)[:, 0]
        c, n = velocity(task.given, x, sigma), velocity(without["first_frame"], other, sigma)
        x = x - 0.5 * share * (c + 2.0 * (c - n))
    wanted = torch.where(share == 0, clean, x)
    torch.testing.assert_close(out, wanted, atol=1e-4, rtol=1e-4)


# --- no drift between trainer and sampler -------------------------------------------------------------------

DRIFT: dict[str, dict[str, Any]] = {
    "first frame": {"conditions": [{"type": "first_frame"}]},
    "crop and suffix": {
        "conditions": [
            {"type": "spatial_crop", "region": [0, 0, 16, 8]},
            {"type": "suffix", "frames": 4, "strength": 0.5},
        ]
    },
    "history in chunks": {
        "type": "chunks",
        "frames": 2,
        "conditions": [{"type": "prefix", "frames": 4, "noise": 0.4}],
    },
    "teacher": {
        "type": "chunks",
        "frames": 1,
        "forcing": "teacher",
        "conditions": [
            {"type": "keyframes", "times": [0.0, 0.8]},
            {"type": "prefix", "frames": 4, "noise": 0.4},
        ],
    },
    "scenes": {
        "type": "scenes",
        "positions": "jump",
        "noise": "own",
        "conditions": [{"type": "scene", "scenes": [0], "modality": "video"}],
    },
    "sound": {
        "modalities": ["video", "audio"],
        "conditions": [{"type": "prefix", "modality": "audio", "frames": 3}, {"type": "first_frame"}],
    },
    "scenes with sound": {
        "type": "scenes",
        "positions": "reset",
        "modalities": ["video", "audio"],
        "conditions": [{"type": "scene", "scenes": [1]}],
    },
    "reference": {
        "conditions": [
            {"type": "reference", "noise": 0.2},
            {"type": "mask", "masks": "data"},
        ]
    },
}


def drift_model(name: str, rate: int = 8192, latents: float = 8.0) -> Model:
    plan = DRIFT[name]
    hears = "audio" in plan.get("modalities", ())
    audio = {"enabled": True, "sample_rate": rate, "channels": 4, "latents_per_second": latents}
    return toy_model(
        model={"audio_dim": 12 if hears else 0, "depth": 1},
        plan=plan,
        audio=audio if hears else {},
        train={"cfg_dropout_prob": 0.0},
        references={"enabled": name == "reference", "downscale": 2},
        masks={"enabled": name == "reference"},
    )


def training_batch(model: Model, lengths: tuple[int, ...], request: ClipRequest) -> Batch:
    """What the loader would hand out of the clips that the request brings."""
    spec, batch = model.tokenizer.spec, len(request.prompts)
    coded = lengths if model.shots_alone(len(lengths)) else (sum(lengths),)
    source = request.sources[0]
    pixels = next(s.video_BPHW3 for s in request.sources if s.video_BPHW3 is not None and s is not BESIDE)
    grids = [spec.latent_grid(n, 16, 24) for n in coded]
    encoded = torch.cat([model.tokenizer.encode(shot) for shot in pixels.split(list(coded), dim=1)], dim=1)
    scene_F = torch.arange(len(lengths)).repeat_interleave(torch.tensor([g[0] for g in grids]))
    latents = {
        "video": Latents(
            encoded,
            scene_seconds(spec, coded, FPS).repeat(batch, 1),
            scene_spans(spec, coded, FPS).repeat(batch, 1, 1),
            scene_F.repeat(batch, 1),
            spec.spatial,
        )
    }
    if model.audio_tokenizer is not None:
        hears = model.audio_tokenizer
        sound = next(s for s in request.sources if s.sound_BZM is not None)
        counts, seconds_T, span_T2 = scene_sound(hears.spec, coded, FPS)
        sizes = [round(n / FPS * sound.sample_rate) for n in coded]
        parts = [hears.encode(part, sound.sample_rate) for part in sound.sound_BZM.split(sizes, dim=-1)]
        latents["audio"] = Latents(
            torch.cat(parts, dim=1)[:, :, None, None],
            seconds_T.repeat(batch, 1),
            span_T2.repeat(batch, 1, 1),
            torch.arange(len(coded)).repeat_interleave(torch.tensor(counts)).repeat(batch, 1),
        )
    references, masks = {}, {}
    if source is BESIDE:
        small = model.tokenizer.encode(source.video_BPHW3)
        f = small.shape[1]
        places = spec.seconds(f, FPS)[None], spec.spans(f, FPS)[None], torch.zeros(batch, f).long()
        references = {"video": (Latents(small, *places, 2 * spec.spatial),)}
        masks = {"video": request.sources[1].mask_BFhw}
    return Batch(
        [str(i) for i in range(batch)],
        latents,
        [list(captions) for captions in request.scenes] or [[p] for p in request.prompts],
        references=references,
        masks=masks,
        reference_captions=["what it shows"] * batch if references else None,
    )


def clips(batch: int, *shape: int) -> Tensor:
    generator = torch_generator("pixels", *shape)
    return torch.randint(0, 256, (batch, *shape, 3), generator=generator, dtype=torch.uint8)


BESIDE = Source(clips(2, 8, 8, 12))


def request_of(name: str, model: Model) -> tuple[ClipRequest, tuple[int, ...]]:
    conditions = model.recipe.plan.conditions
    lengths = (4, 4) if name.startswith("scenes") else (8,)
    whole = Source(clips(2, 8, 16, 24))
    if model.audio_tokenizer is not None:
        whole = replace(whole, sound_BZM=draw(2, 1, 8192, key="sound").clamp(-1, 1), sample_rate=8192)
    sources = [whole] * len(conditions)
    if name == "reference":
        # A request may say what its reference shows; training has no words for that.
        conditions = (conditions[0].model_copy(update={"caption": "what it shows"}), *conditions[1:])
        sources = [BESIDE, replace(whole, mask_BFhw=draw(2, 4, 4, 6, key="mask") > 0.5)]
    request = ClipRequest(
        ("a red circle", "two blue cats"),
        scenes=(("a", "b"), ("c", "d")) if len(lengths) > 1 else (),
        shots=lengths,
        conditions=conditions,
        sources=tuple(sources),
    )
    if request.scenes:
        request = replace(request, prompts=("", ""))
    return request, lengths


def layout_marks(task: Task, modality: str) -> Tensor:
    """(B or 1, F, S, 1): what is given."""
    grid = task.noise[modality].shape[1:3]
    return (task.given.marks[modality].kind_BN > 0).unflatten(1, grid)[..., None]


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal to the bit, whether or not a batch of one stands for all."""
    if a is None or b is None:
        return a is b
    a, b = torch.broadcast_tensors(a, b)
    return a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("name", DRIFT)
def test_a_training_step_can_be_rebuilt_from_a_request(monkeypatch, name: str) -> None:
    """Every field of every stream, to the bit: from the same clips, at the same noise and levels."""
    model = drift_model(name)
    request, lengths = request_of(name, model)
    asked_of: list[tuple[Plan, Given, Sample]] = []
    kind = type(model.plan)
    whole = kind.layout

    def spy(plan: Plan, sample: Sample, text: Text, given: Given) -> Layout:
        asked_of.append((plan, given, sample))
        return whole(plan, sample, text, given)

    monkeypatch.setattr(kind, "layout", spy)
    backbone: Any = model.predictor.backbone
    method = Denoise(
        Recipe.model_validate(
            {
                **model.recipe.model_dump(),
                "train": {**model.recipe.train.model_dump(), "cfg_dropout_prob": 0.0},
            }
        ),
        backbone,
        model.plan,
        model.text_encoder,
    )
    fed: list[dict[str, Stream]] = []
    hook = backbone.register_forward_pre_hook(lambda module, args: fed.append(dict(args[0])))
    noise: dict[str, Tensor] = {}
    real = StepContext.randn

    def keep(context: StepContext, like: Tensor, purpose: str) -> Tensor:
        drawn_noise = real(context, like, purpose)
        if purpose in ("noise", "noise audio"):
            noise["audio" if "audio" in purpose else "video"] = drawn_noise
        return drawn_noise

    monkeypatch.setattr(StepContext, "randn", keep)
    batch = training_batch(model, lengths, request)
    method.losses(batch, CONTEXT)
    hook.remove()
    (trained,) = fed
    assert [plan for plan, _, _ in asked_of] == [model.plan]
    assert asked_of[0][0] is model.plan
    _, given, _ = asked_of.pop()

    task, _ = task_of(model, request, Sampling())
    assert set(task.given.marks) == set(given.marks)
    for m, marks in task.given.marks.items():
        assert marks.kinds == given.marks[m].kinds
        assert same(marks.kind_BN, given.marks[m].kind_BN)
        assert (marks.noise_BG is None) == (given.marks[m].noise_BG is None)
    # How loud what is given is shown was drawn; all else follows from the request.
    task = replace(
        task,
        given=replace(
            task.given,
            marks={m: replace(k, noise_BG=given.marks[m].noise_BG) for m, k in task.given.marks.items()},
            references=given.references,
        ),
    )
    values = task.clean
    if name == "reference":  # shown at a level, with noise of another key
        shown = trained["video"].x_BNC[:, : 4 * 2 * 3].unflatten(1, (4, 6))
        values = replace(values, references={"video": (shown,)})
    layout = model.plan.layout(task.sample, task.text, task.given)
    if name == "teacher":  # the copies show what has been made by then
        made_BFS1 = ~layout_marks(task, "video")
        truth = patchify(batch.video.x_BFHWC, model.patch)
        values = replace(values, clean={"video": torch.where(made_BFS1, truth, values.clean["video"])})
    x, levels = {}, {}
    for m, track in layout.tracks.items():
        state = trained[m].x_BNC[:, -track.geometry.tokens :].unflatten(1, noise[m].shape[1:3])
        # The request must bring what is given by itself.
        x[m] = torch.where(
            (track.speed_BN > 0).unflatten(1, noise[m].shape[1:3])[..., None], state, torch.nan
        )
        purpose = "sigma" if m == "video" else f"sigma {m}"
        draws = method._objective.draw((2, track.num_draws), CONTEXT.generator(purpose))
        levels[m] = track.sigmas(draws)
    rebuilt = to_streams_at(layout, values, x, noise, levels, task.text, LINEAR.mix)
    assert set(rebuilt) == set(trained)
    for m, stream in rebuilt.items():
        for field in vars(stream):
            ours, theirs = getattr(stream, field), getattr(trained[m], field)
            if isinstance(ours, Tensor) or isinstance(theirs, Tensor):
                assert same(ours, theirs), (m, field)
            else:
                assert ours == theirs, (m, field)
    asked_of.clear()
    list(generate(model, request, Sampling(steps=1)))
    assert asked_of or kind is Chunks
    assert all(plan is model.plan for plan, _, _ in asked_of)


def test_the_geometry_of_a_batch_is_that_of_a_request() -> None:
    """Also where the sound of a shot is no whole number of latents: each begins with its frames."""
    model = drift_model("scenes with sound", 8000, 10.0)
    request, _ = request_of("scenes with sound", model)
    lengths = (2, 6)
    trained = batch_sample(training_batch(model, lengths, request), model.patch, model.fps, model.modalities)
    asked_for = model.sample(lengths, 16, 24, model.fps, 2)
    for m, ours in trained.tracks.items():
        theirs = asked_for.tracks[m]
        assert ours.grid == theirs.grid
        assert ours.pixels_per_cell == theirs.pixels_per_cell
        assert ours.scenes == theirs.scenes
        for field in ("seconds_BF", "scene_BF", "span_BF2"):
            assert same(getattr(ours, field), getattr(theirs, field)), (m, field)


# --- what requests bring ------------------------------------------------------------------------------------


def test_pictures_stand_at_their_own_times_whatever_their_order() -> None:
    model = toy_model(tokenizer={"latent_d": 96})  # a patch loses nothing
    pictures = clips(1, 2, 16, 24)
    last = (7 / FPS, 0.0)
    made = []
    for times, brought in ((last, pictures), (last[::-1], pictures.flip(1))):
        request = ClipRequest(("a",), conditions=(Keyframes(times=times),), sources=(Source(brought),))
        task, _ = task_of(model, request, Sampling())
        made.append(task.clean.clean["video"])
    assert torch.equal(*made)
    clip = next(iter(generate(model, request, Sampling(steps=1)))).video_PHW3
    assert clip is not None
    assert torch.equal(clip[:2], pictures[0, 1:].expand(2, -1, -1, -1))
    assert torch.equal(clip[6:], pictures[0, :1].expand(2, -1, -1, -1))


@pytest.mark.parametrize(
    "condition, source, said",
    [
        (Keyframes(times=(0.0, 0.1)), Source(clips(1, 2, 16, 24)), "in the same token frame as another"),
        (Keyframes(times=(0.0, 0.5)), Source(clips(1, 3, 16, 24)), "2 times and 3 pictures"),
        (Prefix(frames=6), Source(clips(1, 3, 16, 24)), "has 3 frames and 6 are given"),
        (Prefix(frames=4), Source(clips(1, 4, 8, 24)), "is 24x8 pixels, the clip 24x16"),
        (FirstFrame(), Source(), "its source has no pixels"),
        (Scene(scenes=(0,)), Source(clips(1, 4, 16, 24)), "its source has no sound.*modality to video"),
        (
            Prefix(modality="audio", seconds=0.5),
            Source(sound_BZM=torch.zeros(1, 1, 2048), sample_rate=8192),
            r"0\.25 s of sound, which do not fill what is given, 0 to 0\.5 s",
        ),
    ],
)
def test_sources_that_do_not_fit_are_refused(condition, source, said) -> None:
    model = drift_model("sound" if condition.modality != "video" else "first frame")
    scenes = {"scenes": (("a", "b"),), "shots": (4, 4)} if isinstance(condition, Scene) else {}
    request = ClipRequest(("a",), conditions=(condition,), sources=(source,), **scenes)
    with pytest.raises(UserError, match=said) as error:
        task_of(model, request, Sampling())
    assert "\n" not in str(error.value)


def test_the_end_of_a_sound_may_be_brought_alone() -> None:
    model = drift_model("sound")
    sound = draw(1, 1, 8192, key="sound").clamp(-1, 1)
    suffix = Suffix(modality="audio", seconds=0.25)
    found = []
    for brought in (sound, sound[..., 6144:]):
        request = ClipRequest(
            ("a",), conditions=(suffix,), sources=(Source(sound_BZM=brought, sample_rate=8192),)
        )
        task, _ = task_of(model, request, Sampling())
        found.append(task.clean.clean["audio"][:, -1:])
    torch.testing.assert_close(*found)


def test_altered_models_keep_working_with_conditions() -> None:
    """A request's given pixels come back as the tokenizer makes them, whatever the network says."""
    model = altered(toy_model(tokenizer={"latent_d": 96}), lambda streams, rule: (streams, rule))
    film = clips(2, 8, 16, 24)
    request = ClipRequest(("a", "b"), conditions=(Prefix(frames=4),), sources=(Source(film),))
    for made, truth in zip(generate(model, request, Sampling(steps=1), batch_size=1), film, strict=True):
        assert made.video_PHW3 is not None
        assert torch.equal(made.video_PHW3[:4], truth[:4])
        assert not torch.equal(made.video_PHW3[4:], truth[4:])
