"""Streams: chunk by chunk, what a roll-out makes of the same noise, and what may happen between two chunks.

Shapes: F latent frames, h x w cells, P pixel frames, H x W pixels, Z sound channels, M samples.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from motionloom.cli.assemble import fresh_model
from motionloom.config import Recipe
from motionloom.errors import UserError
from motionloom.flow import Guidance
from motionloom.generate import Ask, Model, Piece, Sampling, Stream, Task, rollout
from motionloom.generate.screen import Decoder
from motionloom.generate.soundtrack import Soundtrack
from motionloom.nn.patching import patchify
from motionloom.plans import Given, Values
from motionloom.plans.given import exactly
from motionloom.plans.past import places
from motionloom.rng import torch_generator
from motionloom.tokenizers import AudioTokenizerSpec
from test_vae_tokenizers import CASES, some_latents, tokenizer
from toy_model import toy_model, toy_recipe

PROMPT, OTHER = "a red ball", "two blue squares turn"
SOUND = {
    "audio": {"enabled": True, "channels": 6, "sample_rate": 4096, "latents_per_second": 16.0},
    "model": {"audio_dim": 16},
}
CHUNKS = {"type": "chunks", "frames": 2}
EULER = Sampling("euler", 2)
GUIDED = Sampling("euler", 2, guidance=Guidance(3.0))
STUDENT = Sampling("consistency", sigmas=(1.0, 0.8, 0.6, 0.3))


class Spy:
    """A tokenizer that tells what was decoded; of ``faults`` it raises one a piece."""

    def __init__(self, tokenizer: Any) -> None:
        self.inner, self.spec = tokenizer, tokenizer.spec
        self.encode, self.decode = tokenizer.encode, tokenizer.decode
        self.resume_from: Callable[[int], int] = tokenizer.resume_from
        self.shown: list[list[Tensor]] = []
        """Latents by decoder."""
        self.faults: list[Exception] = []

    def stream_decode(self, latents: Iterable[Tensor]) -> Iterator[Tensor]:
        self.shown.append(mine := [])

        def seen() -> Iterator[Tensor]:
            for chunk in latents:
                mine.append(chunk)
                yield chunk

        for piece in self.inner.stream_decode(seen()):
            if self.faults:
                raise self.faults.pop()
            yield piece

    @property
    def latents(self) -> Tensor:
        """Of the present decoder, (1, F, h, w, C)."""
        return torch.cat(self.shown[-1], dim=1)


class SpyAudio:
    """An audio tokenizer that tells what was decoded."""

    def __init__(self, tokenizer: Any) -> None:
        self.spec, self.inner = tokenizer.spec, tokenizer
        self.shown: list[Tensor] = []

    def decode(self, latents_BTC: Tensor) -> tuple[Tensor, int]:
        self.shown.append(latents_BTC)
        return self.inner.decode(latents_BTC)


class Heard(nn.Module):
    """A backbone that tells the levels and the seconds it was asked at; of ``faults`` it takes one a pass."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone, self.patch, self.modalities = backbone, backbone.patch, backbone.modalities
        self.new_cache, self.blocks = backbone.new_cache, backbone.blocks
        self.levels: list[float] = []
        self.latest = 0.0
        self.faults: list[Callable[[dict[str, Tensor]], dict[str, Tensor]]] = []

    def forward(self, streams, visibility, cache=None, **how):
        main = streams.get("video", streams.get("audio"))
        self.levels.append(round(float(main.sigma_BN.max()), 4))
        for place in places(main, cache):
            if place is not None:
                self.latest = max(self.latest, float(place.position_BN3[..., 0].max()))
        answer = self.backbone(streams, visibility, cache, **how)
        return self.faults.pop(0)(answer) if self.faults else answer


def spied(model: Model) -> tuple[Model, Spy, Heard]:
    spy, heard = Spy(model.tokenizer), Heard(model.predictor.backbone).eval()
    predictor = replace(model.predictor, backbone=heard)
    return replace(model, tokenizer=spy, predictor=predictor), spy, heard


@cache
def toy(kind: str = "joint", **plan: Any) -> Model:
    """8 frames of 16 x 24 at 8 a second; 4 latent frames, 2 chunks, unless the plan says otherwise."""
    if kind == "sound":
        return toy_model("joint", {**CHUNKS, **plan, "modalities": ["video", "audio"]}, **SOUND)
    if kind == "sound alone":
        return toy_model("joint", {**CHUNKS, **plan, "modalities": ["audio"]}, **SOUND)
    if kind == "joint":
        return toy_model("joint", {**CHUNKS, **plan})
    if kind == "first alone":
        clip = {"video": {"num_frames": 9}, "tokenizer": {"first_alone": True}}
        return toy_model("joint", {**CHUNKS, "first_alone": True, **plan}, **clip)
    return published(kind, plan)


def published(kind: str, plan: dict[str, Any]) -> Model:
    """Wan or LTX-2, tiny."""
    sound = kind == "ltx2"
    sections: dict[str, Any] = toy_recipe("joint", {**CHUNKS, **plan}).model_dump(exclude_unset=True)
    sections["model"] = {"type": kind, "preset": "tiny", "patch": [1, 1, 1] if sound else [1, 2, 2]}
    sections["text_encoder"]["dim"] = 24 if sound else 32
    sections["tokenizer"]["latent_d"] = 16
    if sound:
        sections["plan"]["modalities"] = ["video", "audio"]
        sections["audio"] = {"enabled": True, "channels": 32, "latents_per_second": 16.0}
    model = fresh_model(Recipe.model_validate(sections), torch.device("cpu"))
    generator = torch_generator("published")
    assert isinstance(model.predictor.backbone, nn.Module)
    for parameter in model.predictor.backbone.eval().parameters():
        if not parameter.any() or parameter.std() < 0.05:
            nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


@cache
def of_vae(name: str, frames: int = 2) -> Model:
    """The toy model in front of a tiny VAE."""
    channels, cell, temporal = CASES[name].shape
    sizes = {"latent_d": channels, "latent_f": cell, "latent_t": temporal, "first_alone": True}
    video = {"height": 2 * cell, "width": 2 * cell, "num_frames": 1 + 3 * temporal}
    plan = {**CHUNKS, "frames": frames, "window": 2, "sinks": 1}
    model = toy_model("joint", plan, tokenizer={"latent_d": channels})
    recipe = toy_recipe("joint", plan, tokenizer=sizes, video=video)
    return replace(model, recipe=recipe, tokenizer=tokenizer(name))


def film(stream: Stream, chunks: int) -> Tensor:
    """So many more chunks, (P, H, W, 3)."""
    end, pieces = stream.chunk + chunks, []
    while stream.chunk < end:
        pieces.append(stream.next())
    return torch.cat([piece.video_PHW3 for piece in pieces])


def both(stream: Stream, chunks: int) -> tuple[Tensor, Tensor]:
    """Frames and sound."""
    pieces = [stream.next() for _ in range(chunks)]
    return torch.cat([p.video_PHW3 for p in pieces]), torch.cat([p.sound_ZM for p in pieces], dim=1)


def frames_of(stream: Stream, count: int, key: str = "frames") -> Tensor:
    shape = (count, stream.height, stream.width, 3)
    return (torch.rand(shape, generator=torch_generator(key)) * 255).to(torch.uint8)


# --- what a stream is ---------------------------------------------------------------------------------------


def clip_task(model: Model, prompt: str, seed: int = 0, given: Tensor | None = None) -> Task:
    """A clip of training under the noise of a stream; ``given`` latents stand at its beginning."""
    frames, height, width = model.clip_shape
    sample = model.sample((frames,), height, width, model.fps, 1)
    stages = model.plan.stages(sample)
    noise = {}
    for m, geometry in sample.tracks.items():
        channels = model.token_channels if m == "video" else model.audio_tokenizer.spec.channels
        noise[m] = torch.cat(
            [
                torch.randn(
                    (1, stage[m].stop - stage[m].start, geometry.cells, channels),
                    generator=torch_generator(seed, f"stream {m}", c),
                )
                for c, stage in enumerate(stages)
            ],
            dim=1,
        )
    task = Task(sample, model.encode_text([[prompt]]), noise, negative=model.encode_text([[""]]))
    if given is None:
        return task
    tokens = patchify(given, model.patch)
    values = torch.cat([tokens, torch.zeros_like(noise["video"][:, tokens.shape[1] :])], dim=1)
    cells = sample.main.cells
    marks = exactly((torch.arange(sample.main.tokens) < tokens.shape[1] * cells)[None])
    return replace(task, given=Given({"video": marks}), values=Values({"video": values}))


@pytest.mark.parametrize("kind", ["joint", "first alone", "sound", "wan", "ltx2"])
def test_the_first_chunks_are_the_rollout_of_the_same_noise(kind):
    """With guidance: a cache for each of two passes."""
    model, spy, _ = spied(toy(kind))
    audio = SpyAudio(model.audio_tokenizer) if model.audio_tokenizer else None
    model = replace(model, audio_tokenizer=audio)
    task = clip_task(model, PROMPT)
    stream = Stream(model, Ask(PROMPT), GUIDED)
    stages = model.plan.stages(task.sample)
    film(stream, len(stages))
    with torch.no_grad():
        made = rollout(model.predictor, model.plan, task, GUIDED)
    torch.testing.assert_close(patchify(spy.latents, model.patch), made["video"], rtol=1e-4, atol=1e-5)
    if audio is not None:
        heard = [x[:, x.shape[1] - (s["audio"].stop - s["audio"].start) :]
                 for x, s in zip(audio.shown[1:], stages, strict=True)]  # fmt: skip
        torch.testing.assert_close(torch.cat(heard, dim=1)[:, :, None], made["audio"], rtol=1e-4, atol=1e-5)


def test_seeds_make_films_and_films_do_not_mix():
    model = toy()
    alone = film(Stream(model, Ask(PROMPT, seed=3), STUDENT), 3)
    one, other = Stream(model, Ask(PROMPT, seed=3), STUDENT), Stream(model, Ask(OTHER, seed=4), STUDENT)
    mixed = [(film(one, 1), film(other, 1)) for _ in range(3)]
    assert torch.equal(torch.cat([a for a, _ in mixed]), alone)
    assert not torch.equal(torch.cat([b for _, b in mixed]), alone)


@pytest.mark.parametrize("limits", [{}, {"window": 2, "sinks": 2}], ids=["none", "given"])
@pytest.mark.parametrize("kind", ["joint", "wan"])
def test_past_the_trained_length_no_later_time_is_met_and_memory_is_flat(kind, limits):
    plan = {"frames": 1, **({"rebase": True, **limits} if limits else {})}
    model, spy, heard = spied(toy(kind, **plan))
    trained = model.sample((8,), 16, 24, model.fps, 1).main.seconds_BF.max()
    stream = Stream(model, Ask(PROMPT, history=2), STUDENT)
    sizes = []
    for _ in range(16):
        stream.next()
        sizes.append(stream.memory())
    assert heard.latest <= float(trained) + 1e-6
    assert len(set(sizes[-8:])) == 1 < len(set(sizes[:4]))
    # And what stays in view still matters: other words at the beginning, another chunk at the end.
    other, seen, _ = spied(toy(kind, **plan))
    film(Stream(other, Ask(OTHER, history=0), STUDENT), 16)
    assert not torch.equal(seen.latents[:, -1], spy.latents[:, -1])


def test_limits_without_a_window_are_a_clip_of_training():
    model = toy(frames=1)  # four chunks
    usual, same, less = (
        film(Stream(model, Ask(PROMPT, **limits), STUDENT), 9)
        for limits in ({}, {"window": 3, "sinks": 1}, {"window": 2, "sinks": 1})
    )
    assert torch.equal(usual, same)
    assert torch.equal(usual[: 3 * 2], less[: 3 * 2])
    assert not torch.equal(usual, less)


def test_memory_counts_both_passes_and_what_can_be_gone_back_to():
    model, sizes = toy(frames=1), {}
    for name, history, sampling in (("none", 0, EULER), ("some", 6, EULER), ("guided", 0, GUIDED)):
        stream = Stream(model, Ask(PROMPT, history=history), sampling)
        film(stream, 12)
        sizes[name] = stream.memory()
    assert sizes["guided"] == 2 * sizes["none"]
    # Six chunks more are held, of 24 tokens and two layers of 24 numbers twice.
    assert sizes["some"] >= sizes["none"] + 5 * 24 * 2 * 24 * 2 * 4


def test_another_rate_and_size():
    model = toy("first alone")
    stream = Stream(model, Ask(PROMPT, height=32, width=16, fps=4.0), STUDENT)
    assert (stream.frames_wanted, stream.seconds) == (1, 0.0)
    lengths = []
    for _ in range(4):
        wanted = stream.frames_wanted
        piece = stream.next()
        assert piece.video_PHW3.shape == (wanted, 32, 16, 3)
        lengths.append(wanted)
    assert lengths == [1, 4, 4, 4]
    assert stream.seconds == 13 / 4
    with pytest.raises(UserError, match="height 30"):
        Stream(model, Ask(PROMPT, height=30))


def test_sound_alone():
    model = toy("sound alone")
    stream = Stream(model, Ask(PROMPT), EULER)
    pieces = [stream.next() for _ in range(5)]
    assert all(piece.video_PHW3 is None for piece in pieces)
    sound = torch.cat([piece.sound_ZM for piece in pieces], dim=1)
    held = round(0.01 * stream.sample_rate)
    assert sound.shape == (1, round(stream.seconds * stream.sample_rate) - held)
    assert stream.frames_wanted == 0
    with pytest.raises(UserError, match="sound alone"):
        stream.show(torch.zeros(16, 24, 3, dtype=torch.uint8))
    now = stream.seconds
    assert stream.back(0.2) == pytest.approx(now - 0.25)
    again = torch.cat([stream.next().sound_ZM for _ in range(2)], dim=1)
    assert torch.equal(again, sound[:, -again.shape[1] :])


def test_what_cannot_be_streamed_is_refused():
    with pytest.raises(UserError, match="makes a clip whole"):
        Stream(toy_model(), Ask(PROMPT))
    for wrong in ({"window": 0}, {"sinks": -1}, {"history": -1}, {"fps": 0.0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            Ask(PROMPT, **wrong)
    with pytest.raises(UserError, match="2001 characters"):
        Stream(toy(), Ask("x" * 2001))


# --- pixels and sound ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["joint", "first alone", "wan2.1", "ltx2-causal", "cogvideox"])
def test_what_is_shown_is_the_whole_decoded(kind):
    model, spy, _ = spied(of_vae(kind) if kind in CASES else toy(kind))
    stream = Stream(model, Ask(PROMPT), EULER)
    pieces = []
    while stream.chunk < 4:
        pieces.append(stream.next())
    whole = model.tokenizer.decode(spy.latents)[0]
    shown = torch.cat([piece.video_PHW3 for piece in pieces])
    assert torch.equal(shown, whole[: len(shown)])
    assert len(shown) > len(whole) // 2
    # A VAE gives a latent frame at a time; chunk 0 has two.
    assert [piece.chunk for piece in pieces[:2]] == ([0, 0] if kind in ("wan2.1", "ltx2-causal") else [0, 1])


def test_a_decoder_that_looks_ahead_gives_nothing_at_first():
    model, spy, _ = spied(of_vae("ltx2", frames=3))
    stream = Stream(model, Ask(PROMPT), EULER)
    first = stream.next()
    assert (first.chunk, len(first.video_PHW3)) == (0, 0)
    shown = film(stream, 9)
    assert len(shown) > 8
    assert torch.equal(shown, model.tokenizer.decode(spy.latents)[0, : len(shown)])


@pytest.mark.parametrize("name", ["wan2.1", "wan2.2", "cogvideox", "ltx2", "ltx2-causal"])
def test_a_decoder_may_resume_where_its_tokenizer_says(name):
    tokens = tokenizer(name)
    spec, frames = tokens.spec, 12
    near = next(n for n in range(200) if tokens.resume_from(n) > 0)
    latents = some_latents(name, near + frames, cells=(1, 2))
    whole = torch.cat(list(tokens.stream_decode(latents.split(1, dim=1))), dim=1)
    for latent in (near, near + 1):
        first = tokens.resume_from(latent)
        parts = latents[:, first:].split(1, dim=1)
        again = torch.cat(list(tokens.stream_decode(parts)), dim=1)
        begin = spec.pixel_frames(latent)
        assert spec.latent_of(begin) == latent
        assert torch.equal(again[:, begin - whole.shape[1] :], whole[:, begin:])


class Held:
    """A sound tokenizer without memory: LTX-2's shape rule, each frame of a latent held for its hop."""

    spec = AudioTokenizerSpec(channels=1, sample_rate=400, hop=4, temporal=4, first_alone=True)

    def decode(self, latents_BTC: Tensor) -> tuple[Tensor, int]:
        sound = latents_BTC[..., 0].repeat_interleave(8 * 4, dim=1)  # at 800 Hz
        return sound[:, None, 3 * 8 :].clone(), 800


def test_sound_keeps_time_over_many_chunks():
    """LTX-2's first latent is a frame and the others are four, whichever of them comes first."""
    latents = torch.rand((60, 1), generator=torch_generator("sound"))
    track = Soundtrack(Held(), torch.device("cpu"))  # type: ignore[arg-type]
    parts = [track.add(x) for x in latents.split([5, 0, 1, 30, 7, 17])]
    whole, rate = Held().decode(latents[None])
    assert track.rate == rate
    assert parts[1].shape == (1, 0)
    sound = torch.cat(parts, dim=1)
    assert sound.shape[1] == whole.shape[2] - 8  # 0.01 s are held back
    assert torch.equal(sound, whole[0, :, : sound.shape[1]])


# --- words --------------------------------------------------------------------------------------------------


def test_other_words_act_from_the_next_chunk_on():
    stream, plain = (Stream(toy(frames=1), Ask(PROMPT), STUDENT) for _ in range(2))
    assert torch.equal(film(stream, 2), film(plain, 2))
    stream.say(OTHER)
    piece = stream.next()
    assert (piece.prompt, stream.prompt) == (OTHER, OTHER)
    assert not torch.equal(piece.video_PHW3, film(plain, 1))
    with pytest.raises(UserError, match="2001 characters"):
        stream.say("x" * 2001)
    assert stream.prompt == OTHER


@pytest.mark.parametrize("kind", ["joint", "wan"])
def test_a_past_computed_anew_is_the_past_given_under_the_new_words(kind):
    model, spy, _ = spied(toy(kind, frames=1))
    chunks = {}
    for recache in (False, True):
        stream = Stream(model, Ask(PROMPT), GUIDED)
        film(stream, 3)
        given = spy.latents
        stream.say(OTHER, recache=recache)
        stream.next()
        chunks[recache] = spy.latents[:, 3:]
    with torch.no_grad():
        made = rollout(model.predictor, model.plan, clip_task(model, OTHER, given=given), GUIDED)
    fresh = made["video"][:, 3:]
    torch.testing.assert_close(patchify(chunks[True], model.patch), fresh, rtol=1e-4, atol=1e-5)
    assert (patchify(chunks[False], model.patch) - fresh).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["joint", "sound"])
def test_the_past_is_computed_anew_behind_an_eviction(kind):
    stream = Stream(toy(kind, frames=1), Ask(PROMPT), STUDENT)
    film(stream, 7)
    before = stream.memory()
    stream.say(OTHER, recache=True)
    assert torch.isfinite(film(stream, 3).float()).all()
    stream.say(PROMPT, recache=True)
    assert stream.memory() >= before
    assert stream.chunk == 10


# --- pictures and frames ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["joint", "first alone", "sound", "wan2.1"])
def test_a_film_begins_anew_with_a_picture(kind):
    model = of_vae(kind) if kind in CASES else toy(kind)
    stream = Stream(model, Ask(PROMPT), STUDENT)
    stream.next()
    picture = frames_of(stream, 1)[0]
    with pytest.raises(UserError, match="the image"):
        stream.show(picture[1:])
    assert stream.chunk == 1
    stream.show(picture)
    assert (stream.chunk, stream.seconds) == (0, 0.0)
    still = picture.expand(stream.frames_wanted, -1, -1, -1)
    known = model.tokenizer.decode(model.tokenizer.encode(still[None]))[0]
    first = torch.cat([*iter_pieces(stream, len(known))])
    assert torch.equal(first, known)
    after = film(stream, 2)
    other = Stream(model, Ask(PROMPT), STUDENT)
    other.show(255 - picture)
    assert not torch.equal(film(other, 3)[len(known) :], after)
    if kind != "sound":
        return
    stream.show(picture)
    assert stream.next().sound_ZM.abs().max() > 0


def iter_pieces(stream: Stream, frames: int) -> Iterator[Tensor]:
    """Pieces until there are so many frames."""
    while frames > 0:
        piece = stream.next().video_PHW3
        frames -= len(piece)
        yield piece


@pytest.mark.parametrize("kind", ["joint", "first alone", "sound"])
def test_frames_are_redrawn_from_a_level_of_noise(kind):
    model, _, heard = spied(toy(kind))
    stream = Stream(model, Ask(PROMPT), STUDENT)
    for chunk, (strength, levels) in enumerate(
        [(1.0, [1.0, 0.8, 0.6, 0.3]), (0.7, [0.7, 0.6, 0.3]), (0.6, [0.6, 0.3]), (1e-4, [1e-4])]
    ):
        heard.levels.clear()
        frames = frames_of(stream, stream.frames_wanted, f"frames {chunk}")
        piece = stream.push(frames, strength)
        assert heard.levels == [*([0.0] if chunk else []), *levels], "the one before is remembered first"
        assert (piece.chunk, len(piece.video_PHW3)) == (chunk, len(frames))
    # Hardly any noise: what the tokenizer makes of the frames.
    one = int(model.tokenizer.spec.first_alone)
    lead = torch.cat([frames[:1].expand(one, -1, -1, -1), frames])
    known = model.tokenizer.decode(model.tokenizer.encode(lead[None]))[0, one:]
    assert (piece.video_PHW3.int() - known.int()).abs().max() <= 1
    assert (stream.next().sound_ZM is not None) == (kind == "sound")


@pytest.mark.parametrize("kind", ["joint", "first alone"])
def test_what_was_shown_comes_back_when_it_is_encoded_again(kind):
    """9 of the list: a film that is anchored anew on frames of its own goes on with the same frames."""
    model, spy, _ = spied(toy(kind))
    stream = Stream(model, Ask(PROMPT), STUDENT)
    shown = [stream.next().video_PHW3 for _ in range(4)]
    latents = []
    for _ in range(2):
        again = Stream(model, Ask(PROMPT, seed=1), STUDENT)
        back = [again.push(frames, 1e-4).video_PHW3 for frames in shown]
        for one, two in zip(shown, back, strict=True):
            assert (one.int() - two.int()).abs().max() <= 2
        shown = back
        latents.append(spy.latents)
    torch.testing.assert_close(*latents, rtol=0, atol=0.05)


def test_a_push_that_fails_takes_nothing_with_it():
    """Frames that were decided before it still come."""
    model, _, heard = spied(of_vae("wan2.1"))
    stream = Stream(model, Ask(PROMPT), STUDENT)
    first = stream.next().video_PHW3
    frames = frames_of(stream, 8)
    heard.faults = [passes, not_numbers]
    with pytest.raises(FloatingPointError):
        stream.push(frames, 0.5)
    heard.faults.clear()
    again = torch.cat([first, stream.push(frames, 0.5).video_PHW3])
    whole = Stream(of_vae("wan2.1"), Ask(PROMPT), STUDENT)
    assert torch.equal(again, torch.cat([whole.next().video_PHW3, whole.push(frames, 0.5).video_PHW3]))


@pytest.mark.parametrize("name", ["wan2.1", "ltx2"])
def test_at_its_end_a_film_is_whole_and_may_go_on(name):
    """A decoder that looks ahead gives the rest; what comes after is what would have come."""
    model, spy, _ = spied(of_vae(name))
    stream, pieces = Stream(model, Ask(PROMPT), STUDENT), []
    for _ in range(2):
        chunks = stream.chunk + 2
        while stream.chunk < chunks:
            pieces.append(stream.next().video_PHW3)
        pieces.append(stream.finish().video_PHW3)
        made = model.tokenizer.spec.pixel_frames(sum(len(x[0]) for x in spy.shown[0]))
        if len(spy.shown) == 1:
            assert torch.equal(torch.cat(pieces), model.tokenizer.decode(spy.latents)[0])
            assert sum(map(len, pieces)) == made
    assert sum(map(len, pieces)) == round(stream.seconds * stream.fps)


@pytest.mark.parametrize("kind", ["joint", "sound"])
def test_words_under_which_the_past_is_no_number_are_not_taken(kind):
    class Mad:
        """Nothing that it says is a number, once it has gone mad."""

        gone = False

        def __getattr__(self, name: str) -> Any:
            return getattr(toy(kind).text_encoder, name)

        def encode(self, captions: Any) -> tuple[Tensor, Tensor]:
            x_BLC, valid_BL = toy(kind).text_encoder.encode(captions)
            return x_BLC * (torch.nan if self.gone else 1), valid_BL

    mad = Mad()
    stream = Stream(replace(toy(kind), text_encoder=mad), Ask(PROMPT), STUDENT)
    same = Stream(toy(kind), Ask(PROMPT), STUDENT)
    before = film(stream, 2)
    mad.gone = True
    with pytest.raises(FloatingPointError, match="the old ones stay"):
        stream.say(OTHER, recache=True)
    assert stream.prompt == PROMPT
    assert torch.equal(torch.cat([before, film(stream, 1)]), film(same, 3))


def test_a_push_gives_its_chunk_whole_and_refuses_what_does_not_fit():
    model, spy, _ = spied(of_vae("wan2.1"))
    stream = Stream(model, Ask(PROMPT), STUDENT)
    first = stream.next()
    assert len(first.video_PHW3) == 1  # four frames of chunk 0 wait
    with pytest.raises(UserError, match="strength 0 must be above 0"):
        stream.push(frames_of(stream, 8), 0)
    with pytest.raises(UserError, match=r"here is wanted torch\.uint8 of 8x16x16x3"):
        stream.push(frames_of(stream, 9), 0.5)
    piece = stream.push(frames_of(stream, 8), 0.5)
    assert (piece.chunk, len(piece.video_PHW3)) == (1, 4 + 8)
    whole = torch.cat([first.video_PHW3, piece.video_PHW3])
    assert torch.equal(whole, model.tokenizer.decode(spy.latents)[0])


# --- going back ---------------------------------------------------------------------------------------------


def commands(stream: Stream) -> list[Piece]:
    """Something of everything."""
    pieces = [stream.next()]
    stream.say(OTHER)
    pieces += [stream.next(), stream.push(frames_of(stream, stream.frames_wanted), 0.7)]
    stream.say(PROMPT, recache=True)
    return [*pieces, stream.next(), stream.next()]


@pytest.mark.parametrize("kind", ["joint", "first alone", "sound"])
def test_the_same_commands_make_the_same_future(kind):
    stream = Stream(toy(kind, frames=1), Ask(PROMPT), GUIDED)
    film(stream, 3)
    now = stream.seconds
    ahead = commands(stream)
    for _ in range(2):
        assert stream.back(stream.seconds - now) == now
        assert stream.chunk == 3
        for a, b in zip(commands(stream), ahead, strict=True):
            assert (a.chunk, a.prompt) == (b.chunk, b.prompt)
            assert torch.equal(a.video_PHW3, b.video_PHW3)
            if kind == "sound":
                assert torch.equal(a.sound_ZM, b.sound_ZM)


def test_the_words_of_now_hold_on():
    stream = Stream(toy(frames=1), Ask(PROMPT), STUDENT)
    old = film(stream, 4)
    stream.say(OTHER)
    stream.next()
    stream.back(1.0)
    assert (stream.chunk, stream.prompt) == (1, OTHER)
    piece = stream.next()
    other = Stream(toy(frames=1), Ask(PROMPT), STUDENT)
    film(other, 1)
    other.say(OTHER)
    assert piece.prompt == OTHER
    assert torch.equal(piece.video_PHW3, film(other, 1))
    assert not torch.equal(piece.video_PHW3, old[2:4])


def test_borders():
    """Chunks of a quarter of a second; history of four."""
    stream = Stream(toy(frames=1), Ask(PROMPT, history=4), STUDENT)
    assert stream.back(1.0) == 0.0
    film(stream, 8)
    assert stream.back(0.0) == 2.0
    assert stream.back(-1.0) == 2.0
    assert stream.back(0.3) == 1.5
    assert stream.chunk == 6
    assert stream.back(10.0) == 1.0
    assert stream.back(10.0) == 1.0  # nothing before is remembered
    stream.next()
    assert stream.back(0.25) == 1.0
    stream.show(frames_of(stream, 1)[0])
    shown = film(stream, 2)
    assert stream.back(10.0) == 0.0
    assert torch.equal(film(stream, 2), shown)  # the picture again
    forgetful = Stream(toy(frames=1), Ask(PROMPT, history=0), STUDENT)
    film(forgetful, 3)
    assert forgetful.back(0.5) == 0.75


@pytest.mark.parametrize("name", ["wan2.1", "ltx2"])
def test_a_decoder_with_a_memory_goes_on_as_it_would_have(name):
    """Another one is shown as many latents again as it needs; LTX-2's lags behind what is made."""
    model, spy, _ = spied(of_vae(name, frames=3))
    stream = Stream(model, Ask(PROMPT, history=9), EULER)
    lead = next(n for n in range(200) if spy.resume_from(n))
    before = film(stream, lead // 3 + 10)
    stream.back(8 * stream.frames_wanted / stream.fps)
    at = min(len(before), round(stream.seconds * stream.fps))
    again = film(stream, 9)
    first, second = spy.shown
    assert not torch.equal(second[0][:, 0], first[0][:, 0]), "a new one begins later"
    assert 0 < len(before) - at <= len(again)
    assert torch.equal(again[: len(before) - at], before[at:])


# --- faults -------------------------------------------------------------------------------------------------


def breaks(answer: dict[str, Tensor]) -> dict[str, Tensor]:
    raise RuntimeError("out of memory")


def not_numbers(answer: dict[str, Tensor]) -> dict[str, Tensor]:
    return {m: torch.full_like(x, torch.nan) for m, x in answer.items()}


def passes(answer: dict[str, Tensor]) -> dict[str, Tensor]:
    return answer


@pytest.mark.parametrize(
    "fault, error, at",
    [
        # The first pass remembers the chunk before: no answer of it is read.
        *[pytest.param(breaks, RuntimeError, at, id=f"breaks in pass {at}") for at in range(3)],
        *[pytest.param(not_numbers, FloatingPointError, at, id=f"no numbers in {at}") for at in (1, 2)],
    ],
)
@pytest.mark.parametrize("kind", ["sound", "wan2.1"])
def test_a_chunk_that_fails_leaves_the_stream_where_it_was(kind, fault, error, at):
    model, _, heard = spied(of_vae(kind) if kind in CASES else toy(kind))
    stream, calm = Stream(model, Ask(PROMPT), EULER), Stream(model, Ask(PROMPT), EULER)
    film(stream, 2)
    before = stream.seconds
    while (piece := stream._decoded()) is not None:
        assert kind == "wan2.1"
        del piece
    heard.faults = [*[passes] * at, fault]
    with pytest.raises(error):
        stream.next()
    heard.faults.clear()
    assert stream.seconds == before
    whole = film(calm, 5)
    rest = film(stream, 3)
    assert torch.equal(rest, whole[-len(rest) :])
    assert stream.memory() == calm.memory()


def test_numbers_that_are_none_say_so_and_other_words_go_on():
    model, _, heard = spied(toy())
    stream = Stream(model, Ask(PROMPT), EULER)
    stream.next()
    heard.faults = [passes, not_numbers]
    with pytest.raises(FloatingPointError, match="none in chunk 1: go back, change the prompt"):
        stream.next()
    stream.say(OTHER)
    assert stream.next().chunk == 1


def test_a_decoder_that_fails_is_asked_again():
    model, spy, _ = spied(toy("first alone", frames=1))
    stream, calm = (
        Stream(model, Ask(PROMPT), STUDENT),
        Stream(toy("first alone", frames=1), Ask(PROMPT), STUDENT),
    )
    first = film(stream, 2)
    spy.faults.append(MemoryError("no room for pixels"))
    with pytest.raises(MemoryError, match="no room"):
        stream.next()
    assert stream.chunk == 3
    missed = stream.next()
    assert missed.chunk == 2
    assert torch.equal(torch.cat([first, missed.video_PHW3, film(stream, 2)]), film(calm, 5))


def test_words_that_fail_are_not_taken():
    model, _, heard = spied(toy(frames=1))
    stream, calm = Stream(model, Ask(PROMPT), STUDENT), Stream(toy(frames=1), Ask(PROMPT), STUDENT)
    film(stream, 3)
    heard.faults = [passes, breaks]
    with pytest.raises(RuntimeError, match="out of memory"):
        stream.say(OTHER, recache=True)
    assert stream.prompt == PROMPT
    assert torch.equal(film(stream, 2), film(calm, 5)[-4:])


def test_a_decoder_has_ended_when_whoever_had_it_goes() -> None:
    """At the end of the process too: a thread that is still at work then would abort it."""
    ended = []

    class Slow:
        def stream_decode(self, latents: Iterator[Tensor]) -> Iterator[Tensor]:
            try:
                yield from latents
            finally:
                time.sleep(0.2)
                ended.append(True)

    decoder = Decoder(Slow())  # type: ignore[arg-type]
    assert decoder.take() is None
    decoder.feed(torch.zeros(1, 1, 1, 1))
    assert decoder.take() is not None
    del decoder
    assert ended == [True]
