"""Latents of a stream to pixel frames, as soon as they are decided.

Tokenizers decode a stream by asking for its latents one after the other. Here nobody knows the next ones
before the last are seen, so a decoder runs in a thread of its own, where it can wait. It works while its
frames are looked at, and what goes wrong while chunks are made never reaches it.

A decoder cannot go back. Another one is then shown as many latents again as it needs to go on as the first
one would have (``Tokenizer.resume_from``), and of its frames only new ones come out.

Shapes: F latent frames, h x w cells, C channels, P pixel frames, H x W pixels.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator
from queue import SimpleQueue

import torch
from torch import Tensor

from motionloom.tokenizers import Tokenizer

PATIENCE = 10.0
"""Seconds that a decoder has to end what it is at."""


class Decoder:
    """One ``stream_decode`` that can be asked whether it has anything."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._fed: SimpleQueue[Tensor | _End | None] = SimpleQueue()
        self._given: SimpleQueue[Tensor | BaseException | _End | None] = SimpleQueue()
        self._waits = self._ended = False
        thread = threading.Thread(
            target=_decode, args=(tokenizer, self._fed, self._given), name="decoder", daemon=True
        )
        thread.start()
        # At the end of the process as well: a thread that is still in torch then would abort it.
        weakref.finalize(self, _dismiss, thread, self._fed)

    def take(self) -> Tensor | None:
        """The next frames, uint8 (P, H, W, 3) on the CPU; None: it waits for latents.

        Raises:
            BaseException: whatever the tokenizer raised; the decoder is of no more use then.
        """
        if self._waits or self._ended:
            return None
        given = self._given.get()
        if isinstance(given, BaseException):
            raise given
        if isinstance(given, _End):
            self._ended = True
            return None
        self._waits = given is None
        return given

    def feed(self, latents_FhwC: Tensor) -> None:
        """What comes next; only where it waits."""
        assert self._waits, "the decoder has not taken what it was fed last"
        self._waits = False
        self._fed.put(latents_FhwC)

    def end(self) -> None:
        """No more latents come; only where it waits. What it still holds can be taken."""
        assert self._waits, "the decoder has not taken what it was fed last"
        self._waits = False
        self._fed.put(_End())


class _End:
    """Of a stream: of its latents, or of its frames."""


def _dismiss(thread: threading.Thread, fed: SimpleQueue[Tensor | _End | None]) -> None:
    fed.put(None)
    if thread is not threading.current_thread():
        thread.join(PATIENCE)


class _Abandoned(Exception):
    """Nobody asks for frames any more."""


def _decode(
    tokenizer: Tokenizer,
    fed: SimpleQueue[Tensor | _End | None],
    given: SimpleQueue[Tensor | BaseException | _End | None],
) -> None:
    over = False

    def latents() -> Iterator[Tensor]:
        nonlocal over
        while True:
            given.put(None)
            chunk_FhwC = fed.get()
            if chunk_FhwC is None:
                raise _Abandoned
            if isinstance(chunk_FhwC, _End):
                over = True
                return
            yield chunk_FhwC[None]

    try:
        for video_BPHW3 in tokenizer.stream_decode(latents()):
            given.put(video_BPHW3[0].cpu())
        given.put(_End() if over else RuntimeError("the tokenizer ended a stream whose latents go on"))
    except _Abandoned:
        pass
    except BaseException as error:
        given.put(error)


class Screen:
    """What is seen of a stream: latents in, each frame out once, and a way back."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._device: torch.device = getattr(tokenizer, "device", torch.device("cpu"))
        self.shown = 0
        """Pixel frames that were given out."""
        self._kept: deque[tuple[int, Tensor]] = deque()
        """Latents that a new decoder may need, and the number of the first frame of each piece."""
        self._waiting: deque[Tensor] = deque()
        self._decoder: Decoder | None = None
        self._skip = 0

    def add(self, begin: int, latents_FhwC: Tensor) -> None:
        """A chunk's latents, of which the first is number ``begin`` of the stream."""
        latents_FhwC = latents_FhwC.to(self._device)
        self._kept.append((begin, latents_FhwC))
        self._waiting.append(latents_FhwC)

    def take(self) -> Tensor | None:
        """The next frames, uint8 (P, H, W, 3); None: it takes more latents to decide them.

        Raises:
            BaseException: as :meth:`Decoder.take`. Asked again, it tries again.
        """
        if self._decoder is None:
            self._begin_again()
        assert self._decoder is not None
        try:
            while True:
                video_PHW3 = self._decoder.take()
                if video_PHW3 is None:
                    if not self._waiting:
                        return None
                    self._decoder.feed(self._waiting.popleft())
                    continue
                new_PHW3 = video_PHW3[self._skip :]
                self._skip = max(0, self._skip - len(video_PHW3))
                if len(new_PHW3):
                    self.shown += len(new_PHW3)
                    return new_PHW3
        except Exception:
            self._decoder = None
            raise

    def take_all(self, *, finish: bool = False) -> list[Tensor]:
        """All that is decided.

        Args:
            finish: as if no latents came any more: a decoder that looks ahead gives the rest. If some do
                come, another decoder goes on behind it.

        Raises:
            BaseException: as :meth:`take`. Asked again, it gives all of them again.
        """
        before, found = self.shown, []
        try:
            while (video_PHW3 := self.take()) is not None:
                found.append(video_PHW3)
            if finish and self._kept and self._decoder is not None:
                self._decoder.end()
                while (video_PHW3 := self.take()) is not None:
                    found.append(video_PHW3)
                self._decoder = None
        except BaseException:
            self.shown, self._decoder = before, None
            raise
        return found

    def back(self, latents: int, frame: int) -> None:
        """Forget all but the first ``latents`` of the stream, and show again from a pixel frame, if that was
        shown."""
        while self._kept and self._kept[-1][0] >= latents:
            self._kept.pop()
        self.shown = min(self.shown, frame)
        self._decoder = None

    def let_go(self, frame: int) -> None:
        """Forget latents that nobody needs who goes back no further than a pixel frame."""
        needed = self._resume_from(min(self.shown, frame))
        while self._kept and self._kept[0][0] + len(self._kept[0][1]) <= needed:
            self._kept.popleft()

    def tensors(self) -> Iterator[Tensor]:
        """Latents that are kept."""
        return (latents for _, latents in self._kept)

    def _resume_from(self, frame: int) -> int:
        return self._tokenizer.resume_from(self._tokenizer.spec.latent_of(frame))

    def _begin_again(self) -> None:
        """A new decoder, that goes on behind the frames that were shown."""
        spec, first = self._tokenizer.spec, self._resume_from(self.shown)
        self._waiting = deque(x[max(0, first - begin) :] for begin, x in self._kept if begin + len(x) > first)
        # Where the first latent is one frame, it gives the last one of those that it stands for.
        begins_at = spec.pixel_frames(first + spec.first_alone) - spec.first_alone
        self._skip = self.shown - begins_at
        self._decoder = Decoder(self._tokenizer)
