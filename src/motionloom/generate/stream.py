"""A clip without end, made chunk by chunk while it is watched.

Each chunk looks at what is held of its past and at the words of now. Past the length that training showed,
old chunks leave the window, the first ones stay as sinks, and what stays closes up behind them, so that the
network never meets a time that it does not know (``KVCache``, positions relative). Memory is then flat.

What may happen between two chunks: other words, with or without what is held being computed anew under them;
a picture from which the film begins anew; frames to be redrawn; a step back to an earlier border.

Shapes: B batch (1), P pixel frames, H x W pixels, F token frames of a chunk, S cells, C channels, Z sound
channels, M samples.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from motionloom.backbones.prediction import Predictor
from motionloom.errors import UserError
from motionloom.flow import PATHS
from motionloom.generate.clip import recipe_sampling
from motionloom.generate.model import Model
from motionloom.generate.roller import Roller, can_stream
from motionloom.generate.soundtrack import Soundtrack
from motionloom.generate.task import Sampling, Task, Tokens
from motionloom.nn.cache import Snapshot
from motionloom.nn.patching import patchify, unpatchify
from motionloom.plans import Sample, Stage, StreamedPlan, Text, Values
from motionloom.plans.given import Given, exactly
from motionloom.rng import torch_generator

AHEAD = 64
"""Latent frames by which the places of tokens are laid out at a time."""
LONGEST_PROMPT = 2_000


@dataclass(frozen=True)
class Piece:
    """What came out of the decoder, and what it took."""

    chunk: int
    """The last chunk that was made."""
    video_PHW3: Tensor | None
    """uint8. None: the model makes sound alone."""
    sound_ZM: Tensor | None
    """float32 in [-1, 1]; None: silent."""
    prompt: str
    network_s: float
    decode_s: float
    whole_s: float


@dataclass(frozen=True)
class Ask:
    """What to stream. ``None`` takes the recipe's value.

    ``window``, ``sinks``: chunks that stay visible; none: the plan's, and where that has no window as many
    chunks as a clip of training has, with the first one as a sink. ``history``: chunks to which
    :meth:`Stream.back` can return.
    """

    prompt: str
    negative: str = ""
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    seed: int = 0
    window: int | None = None
    sinks: int | None = None
    history: int = 16
    decode: bool = True


@dataclass(frozen=True)
class _Border:
    """All there is between two chunks."""

    chunk: int
    caches: Mapping[str, Snapshot]
    kept: OrderedDict[int, Tokens]
    frames: int
    """Pixel frames before it."""
    samples: int
    prompt: str


class Stream:
    """See the top of this file. One thread owns it.

    Args:
        sampling: how chunks are made; none: as the recipe says.

    Raises:
        UserError: the model does not stream, or cannot make the size.
    """

    def __init__(self, model: Model, ask: Ask, sampling: Sampling | None = None) -> None:
        if not can_stream(model.predictor, model.plan):
            raise UserError(
                f"plan.type {model.recipe.plan.type} with model.type {model.recipe.model.type} makes a clip "
                "whole and cannot stream: take one of plan.type: chunks"
            )
        _, usual_height, usual_width = model.clip_shape
        self.height, self.width = ask.height or usual_height, ask.width or usual_width
        self.fps = ask.fps or model.fps
        self.chunk = 0
        self.prompt = _checked(ask.prompt)
        self._model, self._ask = model, ask
        self._sampling = sampling or recipe_sampling(model.recipe)
        self._spent = _Spent()
        self._predictor = _Timed(model.predictor, self._spent)
        self._places = _Places(model, self.height, self.width, self.fps)
        self._text, self._negative = self._words(self.prompt), self._words(ask.negative)
        self._roller = self._fresh_roller()
        self._sound = Soundtrack.of(model, self.fps)
        self._kept: OrderedDict[int, Tokens] = OrderedDict()
        self._borders: OrderedDict[int, _Border] = OrderedDict()
        self._ahead: Callable[[Task], Tokens] | None = None
        self._frames = self._samples = 0
        self._emitted = 0
        self._decoding = self._pixels(0)

    # --- what it is ---

    @property
    def sample_rate(self) -> int:
        """Samples of sound per second; 0: silent."""
        return 0 if self._sound is None else self._sound.rate

    @property
    def seconds(self) -> float:
        """Made so far."""
        return self._frames / self.fps

    @property
    def frames_wanted(self) -> int:
        """Pixel frames of the next chunk: what :meth:`push` takes."""
        stage = self._places.stage(self.chunk)["video"]
        return self._pixel_frames(stage.stop) - self._pixel_frames(stage.start)

    def memory(self) -> int:
        """Bytes of the past that is held, and of what :meth:`back` could return to."""
        return self._roller.memory()

    # --- what comes ---

    def __iter__(self) -> Iterator[Piece]:
        while True:
            yield self.next()

    def next(self) -> Piece:
        """The next piece; makes chunks until the decoder has frames to give.

        Raises:
            FloatingPointError: the network gave numbers that are none. The stream stays at the border before
                that chunk.
        """
        begin, network = time.perf_counter(), self._spent.seconds
        made, sound = self._spent.making, None
        video: Tensor | None = None
        if "video" in self._model.modalities and self._ask.decode:
            video = next(self._decoding)
        else:
            self._make()
        if self._sound is not None:
            sound = self._sound.take()
        whole = time.perf_counter() - begin
        network, making = self._spent.seconds - network, self._spent.making - made
        return Piece(self.chunk - 1, video, sound, self.prompt, network, whole - making, whole)

    def _pixels(self, skip: int) -> Iterator[Tensor]:
        """Pixel frames as they are decided.

        Args:
            skip: frames that were seen before, of chunks that the decoder is shown again.
        """
        for video_BPHW3 in self._model.tokenizer.stream_decode(self._latents()):
            new = video_BPHW3[0, skip:]
            skip = max(0, skip - video_BPHW3.shape[1])
            if len(new):
                self._emitted += len(new)
                yield new.cpu()

    def _latents(self) -> Iterator[Tensor]:
        """Latents of the chunks that are kept, for a decoder that begins anew, and then of new ones."""
        for chunk, tokens in list(self._kept.items()):
            yield self._as_latents(chunk, tokens)
        while True:
            chunk = self.chunk
            yield self._as_latents(chunk, self._make())

    def _as_latents(self, chunk: int, tokens: Tokens) -> Tensor:
        grid = self._places.part(chunk).tracks["video"].grid
        return unpatchify(tokens["video"], grid, self._model.patch)

    # --- a chunk ---

    @torch.no_grad()
    def _make(self) -> Tokens:
        """The next chunk, and remember it. What fails leaves no trace."""
        begin, chunk = time.perf_counter(), self.chunk
        border = self._border()
        task = self._task(chunk)
        generator = torch_generator(self._ask.seed, "stream", chunk, device=self._model.device)
        try:
            with self._model.autocast():
                if self._ahead is None:
                    made = self._roller.make(chunk, task, generator)
                else:
                    made = self._ahead(task)
                _require_finite(made, chunk)
                self._roller.remember(task, made)
        except BaseException:
            self._roller.restore(border.caches)
            raise
        finally:
            self._ahead = None
        self._borders[chunk] = border
        while len(self._borders) > self._ask.history:
            self._borders.popitem(last=False)
        self._keep(chunk, made)
        if self._sound is not None:
            self._sound.add(made["audio"], self._places.part(chunk).tracks["audio"])
        stage = self._places.stage(chunk)
        self.chunk += 1
        if "video" in stage:
            self._frames = self._pixel_frames(stage["video"].stop)
        else:
            self._frames = round(self._places.end(chunk) * self.fps)
        self._spent.making += time.perf_counter() - begin
        return made

    def _task(self, chunk: int) -> Task:
        """What is asked of a chunk under the words of now."""
        sample, model = self._places.part(chunk), self._model
        noise = {}
        for m, geometry in sample.tracks.items():
            channels = model.token_channels if m == "video" else _audio_channels(model)
            generator = torch_generator(self._ask.seed, f"stream {m}", chunk)
            shape = (1, geometry.grid[0], geometry.cells, channels)
            noise[m] = torch.randn(shape, generator=generator).to(model.device)
        return Task(sample, self._text, noise, negative=self._negative)

    def _keep(self, chunk: int, made: Tokens) -> None:
        """Clean tokens of the chunks that are held or may be shown to a new decoder."""
        self._kept[chunk] = made
        window, sinks = self._limits()
        for old in [c for c in self._kept if sinks <= c <= chunk - max(window or 0, 2)]:
            if window is not None and old != 0:
                del self._kept[old]

    def _border(self) -> _Border:
        caches = self._roller.snapshot()
        return _Border(self.chunk, caches, OrderedDict(self._kept), self._frames, self._samples, self.prompt)

    # --- between chunks ---

    def say(self, prompt: str, *, recache: bool = False) -> None:
        """Other words from the next chunk on.

        Args:
            recache: compute what is held anew under them, oldest first (LongLive, 2509.22622). Without, the
                past still speaks of the old words, and the change is softer.
        """
        text = self._words(_checked(prompt))
        self.prompt, self._text = prompt, text
        self._roller.forget_words()
        if recache:
            self._recompute()

    @torch.no_grad()
    def _recompute(self) -> None:
        now = self.chunk
        with self._model.autocast():
            for chunk in self._roller.renew():
                task = self._task(chunk)
                made = self._kept[chunk]
                self._roller.make(chunk, _given(task, made))
                self._roller.remember(task, made)
        self.chunk = now

    def show(self, image_HW3: Tensor) -> None:
        """The film begins anew with a picture (uint8, the stream's size), under the words of now."""
        if tuple(image_HW3.shape) != (self.height, self.width, 3):
            raise UserError(
                f"the image is {'x'.join(map(str, image_HW3.shape))}, the stream {self.height}x{self.width}x3"
            )
        self._restart()
        video = image_HW3[None].expand(self.frames_wanted, -1, -1, -1)
        clean = self._encode(video)
        self._ahead = lambda task: self._roller.make(self.chunk, _given(task, {**_zeros(task), **clean}))

    def push(self, video_PHW3: Tensor, strength: float) -> Piece:
        """Redraw frames as the next chunk: noise up to level ``strength``, and the student's levels below it
        (SDEdit, 2108.01073, as CausVid streams it).

        Args:
            video_PHW3: uint8, :attr:`frames_wanted` frames of the stream's size.
        """
        if not 0 < strength <= 1:
            raise UserError(f"strength {strength} must be above 0 and at most 1: 1 redraws all")
        wanted = (self.frames_wanted, self.height, self.width, 3)
        if tuple(video_PHW3.shape) != wanted:
            raise UserError(f"frames of shape {tuple(video_PHW3.shape)}: this chunk takes {wanted}")
        clean = self._encode(video_PHW3)

        def redraw(task: Task) -> Tokens:
            mix = PATHS[self._sampling.path].mix
            state = {**task.noise, **{m: mix(x, task.noise[m], strength) for m, x in clean.items()}}
            below = tuple(s for s in self._sampling.grid[:-1] if s < strength)
            walk = replace(self._sampling, sigmas=(strength, *below))
            generator = torch_generator(self._ask.seed, "push", self.chunk, device=self._model.device)
            return self._roller.make(self.chunk, replace(task, noise=state), generator, sampling=walk)

        self._ahead = redraw
        return self.next()

    def back(self, seconds: float) -> float:
        """To the last border between chunks that lies so far back, or the oldest that is remembered; returns
        where the film is now, in seconds."""
        aim = max(0.0, self.seconds - seconds) * self.fps
        known = list(self._borders.values())
        if not known:
            return self.seconds
        fitting = [border for border in known if border.frames <= aim + 1e-6]
        self._return(fitting[-1] if fitting else known[0])
        return self.seconds

    def _return(self, border: _Border) -> None:
        self._roller.restore(border.caches)
        self._kept = OrderedDict(border.kept)
        for chunk in [c for c in self._borders if c >= border.chunk]:
            del self._borders[chunk]
        self.chunk, self._frames, self._ahead = border.chunk, border.frames, None
        if border.prompt != self.prompt:
            # The words of now hold on: what is held from then knows the old ones.
            self._roller.forget_words()
        if self._sound is not None:
            audio = [(t["audio"], self._places.part(c).tracks["audio"]) for c, t in self._kept.items()]
            self._sound.begin_again(audio)
        replayed = sum(self._places.frames(c) for c in self._kept)
        self._decoding = self._pixels(self._pixel_frames(replayed) if replayed else 0)

    def _restart(self) -> None:
        """Chunk 0 again; nothing is remembered."""
        self._roller = self._fresh_roller()
        self._kept.clear()
        self._borders.clear()
        self.chunk = self._frames = 0
        self._sound = Soundtrack.of(self._model, self.fps)
        self._decoding = self._pixels(0)

    # --- parts ---

    def _limits(self) -> tuple[int | None, int]:
        plan = self._model.plan
        assert isinstance(plan, StreamedPlan)
        usual = self._places.usual_chunks()
        window = self._ask.window or plan.window or usual
        sinks = self._ask.sinks if self._ask.sinks is not None else plan.sinks
        return window, sinks if plan.window is not None or self._ask.sinks is not None else max(1, sinks)

    def _fresh_roller(self) -> Roller:
        plan = self._model.plan
        assert isinstance(plan, StreamedPlan)
        window, sinks = self._limits()
        # A plan with a window of its own says itself where the past stands.
        positions = {} if plan.window is not None else {"positions": "relative"}
        return Roller(self._predictor, plan, self._sampling, window=window, sinks=sinks, **positions)

    def _words(self, prompt: str) -> Text:
        return self._model.encode_text([[prompt]])

    def _encode(self, video_PHW3: Tensor) -> Tokens:
        """Pixels of one chunk -> clean tokens. Behind the beginning the chunk's first frame stands once more
        in front where a tokenizer codes a first frame alone."""
        model = self._model
        head = model.tokenizer.spec.first_alone and self.chunk > 0
        if head:
            video_PHW3 = torch.cat([video_PHW3[:1], video_PHW3])
        latents = model.tokenizer.encode(video_PHW3[None])[:, int(head) :]
        return {"video": patchify(latents.to(model.device), model.patch)}

    def _pixel_frames(self, token_frames: int) -> int:
        latents = token_frames * self._model.patch[0]
        return self._model.tokenizer.spec.pixel_frames(latents) if latents else 0


def _checked(prompt: str) -> str:
    if len(prompt) > LONGEST_PROMPT:
        raise UserError(f"a prompt of {len(prompt)} characters: use at most {LONGEST_PROMPT}")
    return prompt


def _given(task: Task, made: Mapping[str, Tensor]) -> Task:
    """All of a chunk as given."""
    marks = {
        m: exactly(torch.ones(1, geometry.tokens, dtype=torch.bool, device=geometry.device))
        for m, geometry in task.sample.tracks.items()
        if m in made
    }
    return replace(task, given=Given(marks), values=Values(dict(made)))


def _zeros(task: Task) -> Tokens:
    return {m: torch.zeros_like(x) for m, x in task.noise.items()}


def _audio_channels(model: Model) -> int:
    assert model.audio_tokenizer is not None
    return model.audio_tokenizer.spec.channels


def _require_finite(made: Tokens, chunk: int) -> None:
    if not all(bool(torch.isfinite(x).all()) for x in made.values()):
        raise FloatingPointError(
            f"the network gave numbers that are none in chunk {chunk}: go back, change the prompt, or use "
            "another seed"
        )


class _Places:
    """Where the tokens of a clip without end stand; laid out a stretch at a time."""

    def __init__(self, model: Model, height: int, width: int, fps: float) -> None:
        self._model, self._size = model, (height, width, fps)
        self._stages: list[Stage] = []
        self._sample: Sample | None = None
        self._grow(model.clip_shape[0])

    def usual_chunks(self) -> int:
        """Chunks of a clip of training."""
        return self._usual

    def _grow(self, pixel_frames: int) -> None:
        height, width, fps = self._size
        self._sample = self._model.sample((pixel_frames,), height, width, fps, 1)
        self._stages = self._model.plan.stages(self._sample)
        if not hasattr(self, "_usual"):
            self._usual = len(self._stages)

    def stage(self, chunk: int) -> Stage:
        """Frames of a chunk, by modality."""
        # The last chunk of a layout may be cut short.
        while chunk >= len(self._stages) - 1:
            assert self._sample is not None
            latents = (self._sample.main.grid[0] + AHEAD) * self._model.patch[0]
            self._grow(self._model.tokenizer.spec.pixel_frames(latents))
        return self._stages[chunk]

    def part(self, chunk: int) -> Sample:
        """A chunk's tokens where they stand."""
        stage = self.stage(chunk)
        assert self._sample is not None
        return self._sample.part(stage)

    def frames(self, chunk: int) -> int:
        """Token frames of a chunk's video."""
        frames = self.stage(chunk)["video"]
        return frames.stop - frames.start

    def end(self, chunk: int) -> float:
        """When a chunk ends, in seconds."""
        span = self.part(chunk).main.span_BF2
        assert span is not None
        return float(span[0, -1, 1])


@dataclass
class _Spent:
    """Seconds, summed."""

    seconds: float = 0.0
    making: float = 0.0


class _Timed(Predictor):
    """A predictor whose time is measured."""

    def __init__(self, predictor: Predictor, spent: _Spent) -> None:
        super().__init__(predictor.backbone, predictor.prediction, predictor.path)
        object.__setattr__(self, "_spent", spent)

    def velocity(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        _wait()
        begin = time.perf_counter()
        found = super().velocity(*args, **kwargs)
        _wait()
        self._spent.seconds += time.perf_counter() - begin  # type: ignore[attr-defined]
        return found


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
