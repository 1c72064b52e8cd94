"""A clip without end, made chunk by chunk while it is watched.

Each chunk looks at what is held of its past and at the words of now. Past the length that training showed,
old chunks leave the window, the first ones stay as sinks, and what stays closes up behind them, so that the
network never meets a time that it does not know (``KVCache``, positions relative). Memory is then flat.

What may happen between two chunks: other words, with or without what is held being computed anew under them;
a picture from which the film begins anew; frames to be redrawn; a step back to an earlier border. Whatever
fails leaves the stream at the border where it was.

The noise of chunk c is keyed by (seed, modality, c), so the same commands make the same film, to the bit.

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

from motionloom.errors import UserError
from motionloom.flow import PATHS
from motionloom.generate.clip import recipe_sampling
from motionloom.generate.model import Model
from motionloom.generate.places import Places
from motionloom.generate.roller import Roller, can_stream
from motionloom.generate.screen import Screen
from motionloom.generate.soundtrack import Heard, Soundtrack
from motionloom.generate.stopwatch import Stopwatch, TimedPredictor
from motionloom.generate.task import Sampling, Task, Tokens
from motionloom.nn.cache import Snapshot
from motionloom.nn.patching import patchify, unpatchify
from motionloom.plans import StreamedPlan, Text, Values
from motionloom.plans.given import Given, exactly
from motionloom.rng import torch_generator

LONGEST_PROMPT = 2_000
"""Characters."""
LARGEST_SIDE = 8192
"""Pixels."""
SLOWEST, FASTEST = 0.1, 1000.0
"""Frames per second."""


@dataclass(frozen=True)
class Piece:
    """What came out of the decoder, and what it took."""

    chunk: int
    """The last chunk that was made."""
    video_PHW3: Tensor | None
    """uint8; no frames while a tokenizer still waits. None: the model makes sound alone, or nothing is
    decoded."""
    sound_ZM: Tensor | None
    """float32 in [-1, 1]; None: silent."""
    prompt: str
    """Under which that chunk was made."""
    network_s: float
    decode_s: float
    whole_s: float


@dataclass(frozen=True)
class Ask:
    """What to stream. ``None`` takes the recipe's value.

    ``window``, ``sinks``: chunks that stay visible; none: the plan's, and where that has no window as many in
    all as a clip of training has, the first one as a sink. Where the plan has no window, positions are
    relative; a plan with one says so itself (``plan.rebase``). ``history``: chunks to which
    :meth:`Stream.back` can return.

    Raises:
        UserError: numbers out of range.
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

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("sinks", 0), ("history", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} {value}: a stream takes {least} chunks or more")
        for name in ("height", "width"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= LARGEST_SIDE:
                raise UserError(f"{name} {value}: must be from 1 to {LARGEST_SIDE} pixels")
        if self.fps is not None and not SLOWEST <= self.fps <= FASTEST:
            raise UserError(f"fps {self.fps:g}: must be from {SLOWEST:g} to {FASTEST:g}")


@dataclass(frozen=True)
class _Border:
    """All there is between two chunks."""

    chunk: int
    caches: Mapping[str, Snapshot]
    kept: Mapping[int, Tokens]
    heard: Heard | None
    prompt: str


_Walk = Callable[[int, Task, torch.Generator], Tokens]
"""How a chunk is made of its task."""


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
        self.prompt = _checked(ask.prompt)
        self._model, self._ask = model, ask
        self._places = Places(model, self.height, self.width, self.fps)
        self._watch = Stopwatch(model.device)
        self._making = 0.0
        self._sampling = _for_streams(sampling or recipe_sampling(model.recipe), model)
        self._text, self._negative = self._words(self.prompt), self._words(_checked(ask.negative))
        self._begin_anew()

    def _begin_anew(self, picture: Tokens | None = None) -> None:
        """At chunk 0; nothing is remembered.

        Args:
            picture: clean tokens of chunk 0.
        """
        model = self._model
        self.chunk = 0
        """The next chunk's number."""
        self._picture = picture
        self._roller = self._new_roller()
        self._owed: tuple[Task, Tokens] | None = None
        """The last chunk, where it is not remembered yet."""
        self._kept: dict[int, Tokens] = {}
        """Clean tokens of the chunks that the caches hold."""
        self._borders: OrderedDict[int, _Border] = OrderedDict()
        self._told = self.prompt
        self._screen = Screen(model.tokenizer) if self._pictures and self._ask.decode else None
        audio = model.audio_tokenizer if "audio" in model.modalities else None
        self._sound = None if audio is None else Soundtrack(audio, model.device)
        self._ready: list[tuple[int, Tensor]] = []
        """Sound that is still to be given out, and its chunk."""

    # --- what it is ---

    @property
    def sample_rate(self) -> int:
        """Samples of sound per second; 0: silent."""
        return 0 if self._sound is None else self._sound.rate

    @property
    def seconds(self) -> float:
        """Made so far, since it began or since :meth:`show`."""
        return self._places.begin(self.chunk)

    @property
    def frames_wanted(self) -> int:
        """Pixel frames of the next chunk: what :meth:`push` takes. 0: the model makes sound alone."""
        return self._frames_of(self.chunk) if self._pictures else 0

    def memory(self) -> int:
        """Bytes of keys and values: of the past that is held, and of what :meth:`back` can return to, which
        are as many chunks as ``window``, ``sinks`` and ``history`` say, however long the stream is."""
        return self._roller.memory(border.caches for border in self._borders.values())

    @property
    def _pictures(self) -> bool:
        return "video" in self._model.modalities

    def _frames_of(self, chunk: int) -> int:
        return self._places.frames(chunk + 1) - self._places.frames(chunk)

    # --- what comes ---

    def __iter__(self) -> Iterator[Piece]:
        while True:
            yield self.next()

    def next(self) -> Piece:
        """What is decoded of the chunks that are made, or else the next chunk, as far as it is decoded: a
        decoder may give a chunk in several pieces, or none before it has seen the next.

        Raises:
            FloatingPointError: the network gave numbers that are none. The stream stays at the border before
                that chunk.
        """
        lap = self._lap()
        video_PHW3 = self._decoded()
        if video_PHW3 is None:
            self._make()
            video_PHW3 = self._decoded()
        return self._piece(lap, [] if video_PHW3 is None else [video_PHW3])

    def finish(self) -> Piece:
        """What a decoder that looks ahead still holds, as if the film ended here. It may go on."""
        return self._piece(self._lap(), self._all_decoded(finish=True))

    def _decoded(self) -> Tensor | None:
        return None if self._screen is None else self._screen.take()

    def _all_decoded(self, *, finish: bool = False) -> list[Tensor]:
        return [] if self._screen is None else self._screen.take_all(finish=finish)

    def _lap(self) -> tuple[float, float, float]:
        return time.perf_counter(), self._watch.seconds, self._making

    def _piece(self, since: tuple[float, float, float], videos: list[Tensor]) -> Piece:
        """Args: since: the lap that began with it."""
        sound_ZM = None
        if self._sound is not None:
            nothing_Z0 = self._sound.heard.tail_ZM[:, :0]
            sound_ZM = torch.cat([nothing_Z0, *(sound for _, sound in self._ready)], dim=1)
            self._ready.clear()
        video_PHW3 = None
        if self._screen is not None:
            nothing_0HW3 = torch.zeros(0, self.height, self.width, 3, dtype=torch.uint8)
            video_PHW3 = torch.cat(videos) if videos else nothing_0HW3
        network_s = self._watch.seconds - since[1]
        whole_s, making_s = time.perf_counter() - since[0], self._making - since[2]
        return Piece(self.chunk - 1, video_PHW3, sound_ZM, self._told, network_s, whole_s - making_s, whole_s)

    # --- a chunk ---

    @torch.no_grad()
    def _make(self, walk: _Walk | None = None) -> None:
        """The next chunk."""
        begin, chunk = time.perf_counter(), self.chunk
        self._settle()
        border, task = self._border(), self._task(chunk)
        generator = torch_generator(self._ask.seed, "stream", chunk, device=self._model.device)
        try:
            with self._model.autocast():
                made = (walk or self._roller.make)(chunk, task, generator)
            # Asked last: until here nothing waits for the device.
            _require_finite(made, chunk)
            self._making += time.perf_counter() - begin
            if self._sound is not None:
                self._ready.append((chunk, self._sound.add(made["audio"][0].flatten(0, 1))))
        except BaseException:
            self._roller.restore(border.caches)
            raise
        self._take_in(border, made)
        self._owed = task, made

    @torch.no_grad()
    def _settle(self) -> None:
        """Remember the last chunk. Put off until its frames are out: they need not wait for that pass."""
        if self._owed is not None:
            with self._model.autocast():
                self._roller.remember(*self._owed)
            self._owed = None

    def _take_in(self, border: _Border, made: Tokens) -> None:
        """What was made is the past now."""
        chunk = self.chunk
        if self._ask.history:
            self._borders[chunk] = border
        while len(self._borders) > self._ask.history:
            self._borders.popitem(last=False)
        window, sinks = self._limits()
        self._kept[chunk] = made
        for old in [c for c in self._kept if sinks <= c <= chunk - window]:
            del self._kept[old]
        self.chunk, self._told = chunk + 1, self.prompt
        if self._screen is not None:
            grid = self._places.part(chunk).tracks["video"].grid
            latents_FhwC = unpatchify(made["video"], grid, self._model.patch)[0]
            self._screen.add(self._places.latents(chunk), latents_FhwC)
            self._screen.let_go(self._places.frames(next(iter(self._borders), self.chunk)))

    def _task(self, chunk: int) -> Task:
        """What is asked of a chunk under the words of now."""
        sample, model = self._places.part(chunk), self._model
        noise = {}
        for m, geometry in sample.tracks.items():
            channels = model.token_channels if m == "video" else _audio_channels(model)
            generator = torch_generator(self._ask.seed, f"stream {m}", chunk)
            shape = (1, geometry.grid[0], geometry.cells, channels)
            noise[m] = torch.randn(shape, generator=generator).to(model.device)
        task = Task(sample, self._text, noise, negative=self._negative)
        return task if chunk or self._picture is None else _given(task, self._picture)

    def _border(self) -> _Border:
        heard = None if self._sound is None else self._sound.heard
        return _Border(self.chunk, self._roller.snapshot(), dict(self._kept), heard, self.prompt)

    # --- between chunks ---

    def say(self, prompt: str, *, recache: bool = False) -> None:
        """Other words from the next chunk on.

        Args:
            recache: compute what is held anew under them, oldest first (LongLive, 2509.22622). Without, the
                past still speaks of the old words, and the change is softer.

        Raises:
            UserError: a prompt longer than :data:`LONGEST_PROMPT`, or that is no text.
            FloatingPointError: the past could not be computed anew; the old words stay.
        """
        text = self._words(_checked(prompt))
        self._settle()
        before = self.prompt, self._text, self._roller.snapshot()
        self.prompt, self._text = prompt, text
        try:
            self._roller.forget_words()
            if recache:
                self._recompute()
        except BaseException:
            self.prompt, self._text, caches = before
            self._roller.restore(caches)
            raise

    @torch.no_grad()
    def _recompute(self) -> None:
        with self._model.autocast():
            for chunk in self._roller.renew():
                made = self._kept[chunk]
                task = _given(self._task(chunk), made)
                self._roller.make(chunk, task)
                self._roller.remember(task, made)
        if not self._roller.finite():
            raise FloatingPointError(
                "the network gave numbers that are none for the past under these words: the old ones stay"
            )

    def show(self, image_HW3: Tensor) -> None:
        """The film begins anew with a picture (uint8, the stream's size), under the words of now: chunk 0 is
        the picture, standing still for as long as that chunk is (a plan with ``first_alone`` makes that one
        frame). Sound that goes with it is made.

        Raises:
            UserError: another size, or a model of sound alone.
        """
        self._require_shape("the image", image_HW3, (self.height, self.width, 3))
        still_PHW3 = image_HW3[None].expand(self._frames_of(0), -1, -1, -1)
        self._begin_anew(self._encode(0, still_PHW3))

    def push(self, video_PHW3: Tensor, strength: float) -> Piece:
        """Redraw frames as the next chunk: noise up to level ``strength``, and the student's levels below it
        (SDEdit, 2108.01073, as CausVid streams it). Sound begins at that level too, with the mean of all.

        Args:
            video_PHW3: uint8, :attr:`frames_wanted` frames of the stream's size.

        Returns:
            that chunk, as far as it is decoded, behind what was not given out yet of those before.

        Raises:
            UserError: other frames than that, a strength out of range, or a model that this cannot be asked.
            FloatingPointError: as :meth:`next`.
        """
        if not 0 < strength <= 1:
            raise UserError(f"strength {strength} must be above 0 and at most 1: 1 redraws all")
        self._require_shape("frames", video_PHW3, (self.frames_wanted, self.height, self.width, 3))
        if self._model.predictor.schedule is not None or self._sampling.schedule is not None:
            raise UserError("this network knows DDPM's noise levels alone and cannot redraw frames: show one")
        lap = self._lap()
        clean = self._encode(self.chunk, video_PHW3)
        self._make(lambda chunk, task, generator: self._redraw(chunk, task, generator, clean, strength))
        return self._piece(lap, self._all_decoded())

    def _redraw(
        self, chunk: int, task: Task, generator: torch.Generator, clean: Tokens, strength: float
    ) -> Tokens:
        mix = PATHS[self._sampling.path].mix
        clean = {**_zeros(task), **clean}
        state = {m: mix(clean[m], noise, strength) for m, noise in task.noise.items()}
        # A picture that was shown gives way to the frames.
        task = Task(task.sample, task.text, state, negative=task.negative)
        below = tuple(sigma for sigma in self._sampling.grid[:-1] if sigma < strength)
        sampling = replace(self._sampling, sigmas=(strength, *below))
        return self._roller.make(chunk, task, generator, sampling=sampling)

    def back(self, seconds: float) -> float:
        """To the last border between chunks at or before so many seconds ago, or the oldest that is
        remembered; returns where the film is now, in seconds.

        The words of now hold on: what is held from then speaks of those of then. With them, and with the same
        commands, the same film comes again, to the bit. Frames come from that border on, or from where the
        decoder was if it had not come so far.
        """
        aim = self.seconds - seconds
        if seconds <= 0 or not self._borders:
            return self.seconds
        known = list(self._borders.values())
        fitting = [border for border in known if self._places.begin(border.chunk) <= aim + 1e-6]
        self._return(fitting[-1] if fitting else known[0])
        return self.seconds

    def _return(self, border: _Border) -> None:
        self._roller.restore(border.caches)
        self._owed = None
        if border.prompt != self.prompt:
            self._roller.forget_words()
        self.chunk, self._kept = border.chunk, dict(border.kept)
        for later in [c for c in self._borders if c >= border.chunk]:
            del self._borders[later]
        if self._sound is not None:
            assert border.heard is not None
            self._sound.heard = border.heard
            self._ready = [(c, sound) for c, sound in self._ready if c < border.chunk]
        if self._screen is not None:
            self._screen.back(self._places.latents(border.chunk), self._places.frames(border.chunk))

    # --- parts ---

    def _limits(self) -> tuple[int, int]:
        """Window and sinks, in chunks."""
        plan, ask = self._plan, self._ask
        sinks = plan.sinks if ask.sinks is None else ask.sinks
        if plan.window is not None:
            return ask.window or plan.window, sinks
        trained = self._places.trained
        if ask.sinks is None:
            sinks = max(1, sinks)
        return ask.window or max(1, trained - sinks), sinks

    def _new_roller(self) -> Roller:
        window, sinks = self._limits()
        positions = {} if self._plan.window is not None else {"positions": "relative"}
        timed = TimedPredictor(**vars(self._model.predictor), watch=self._watch)
        return Roller(timed, self._plan, self._sampling, window=window, sinks=sinks, **positions)

    @property
    def _plan(self) -> StreamedPlan:
        plan = self._model.plan
        assert isinstance(plan, StreamedPlan), "see can_stream"
        return plan

    def _words(self, prompt: str) -> Text:
        return self._model.encode_text([[prompt]])

    def _encode(self, chunk: int, video_PHW3: Tensor) -> Tokens:
        """Pixels of one chunk -> clean tokens. Behind the beginning the chunk's first frame stands once more
        in front where a tokenizer codes a first frame alone."""
        model = self._model
        lead = int(model.tokenizer.spec.first_alone and chunk > 0)
        video_PHW3 = torch.cat([video_PHW3[:1].expand(lead, -1, -1, -1), video_PHW3])
        latents = model.tokenizer.encode(video_PHW3[None])[:, lead:]
        return {"video": patchify(latents.to(model.device), model.patch)}

    def _require_shape(self, what: str, pixels: Tensor, wanted: tuple[int, ...]) -> None:
        if not self._pictures:
            raise UserError("this model makes sound alone: it takes no pictures")
        if tuple(pixels.shape) != wanted or pixels.dtype != torch.uint8:
            shapes = ["x".join(map(str, shape)) for shape in (pixels.shape, wanted)]
            raise UserError(
                f"{what}: {pixels.dtype} of {shapes[0]}, here is wanted torch.uint8 of {shapes[1]}"
            )


def _for_streams(sampling: Sampling, model: Model) -> Sampling:
    """Guidance by conditions asks for something that a stream is not given."""
    guidance = sampling.guidance.restricted(model.modalities, model.modalities, ())
    return replace(sampling, guidance=guidance)


def _checked(prompt: str) -> str:
    if len(prompt) > LONGEST_PROMPT:
        raise UserError(f"a prompt of {len(prompt)} characters: use at most {LONGEST_PROMPT}")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError("the prompt holds characters that are none: write it in UTF-8") from None
    return prompt


def _given(task: Task, clean: Mapping[str, Tensor]) -> Task:
    """All of some modalities of a chunk as given."""
    geometries = {m: task.sample.tracks[m] for m in clean}
    marks = {
        m: exactly(torch.ones(1, geometry.tokens, dtype=torch.bool, device=geometry.device))
        for m, geometry in geometries.items()
    }
    return replace(task, given=Given(marks), values=Values({**_zeros(task), **clean}))


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
