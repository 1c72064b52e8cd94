"""Films whose end is not known when they begin: mp4 in fragments, and how fragments become an ordinary file.

P pixel frames of one piece, H x W pixels; Z sound channels, M samples.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterable
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from motionloom.data.media.mux import add_sound_stream, mux_sound
from motionloom.data.media.write import tag_bt709
from motionloom.durable import flush, one_line_on_failure
from motionloom.errors import UserError

if TYPE_CHECKING:
    import av

_WORST, _BEST = 40, 12  # x264's crf at quality 0 and 100, as `write_video` has it
_SECONDS_PER_KEY_FRAME = 2


class Sink(Protocol):
    """Where bytes go: a file, stdout, memory. Nothing is read back, nothing is sought."""

    def write(self, data: bytes, /) -> int:
        """Take all of ``data``. Raises OSError when it cannot."""


class FilmWriter:
    """Frames and sound in, piece by piece; H.264 and AAC in mp4 fragments out, about one a frame.

    Whatever has reached the sink plays, also when the rest never comes. Odd sides are padded to even ones by
    repeating the last row or column. Sound is written in stereo.

    Args:
        fps: frames per second.
        sample_rate: of the sound in Hz; 0 is a silent film.
        quality: 0 to 100 (best).
    """

    def __init__(
        self, sink: Sink, fps: float, height: int, width: int, sample_rate: int = 0, *, quality: int = 80
    ) -> None:
        import av

        self.fps, self.frames, self.samples = fps, 0, 0
        self._even = ((0, 0), (0, height % 2), (0, width % 2), (0, 0))
        options = {**_FRAGMENTS, "frag_duration": str(round(1e6 / fps))}
        self._container = av.open(sink, "w", format="mp4", container_options=options)
        stream = self._container.add_stream("libx264", Fraction(fps).limit_denominator(1001 * 64))
        self._video = cast("av.VideoStream", stream)
        self._video.height, self._video.width = height + height % 2, width + width % 2
        self._video.pix_fmt = "yuv420p"
        context = self._video.codec_context
        context.options = {
            "preset": "veryfast",
            "tune": "zerolatency",
            "mbtree": "0",
            "crf": str(round(_WORST + (_BEST - _WORST) * quality / 100)),
            "g": str(max(1, round(_SECONDS_PER_KEY_FRAME * fps))),
        }
        tag_bt709(context)
        context.thread_count = 1  # the bytes depend on the number of threads otherwise
        self._sound: Any = None
        if sample_rate:
            nothing = np.zeros((2, 0), np.float32)
            self._sound = add_sound_stream(self._container, "aac", nothing, sample_rate)
        self._sample_rate = sample_rate
        self._container.start_encoding()
        self._resampler = self._new_resampler() if sample_rate else None

    def add(self, frames_PHW3: NDArray[np.uint8] | None, sound_ZM: NDArray[np.float32] | None = None) -> None:
        """The next frames (uint8 sRGB, may be none) and the sound that belongs to them (in [-1, 1]).

        Raises:
            OSError: from the sink.
        """
        import av

        for pixels in np.pad(frames_PHW3, self._even, mode="edge") if frames_PHW3 is not None else ():
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
                format="yuv420p", dst_colorspace="ITU709", interpolation="BICUBIC", threads=1
            )
            frame.pts, frame.time_base = self.frames, 1 / self._video.codec_context.framerate
            self.frames += 1
            self._container.mux(self._video.encode(frame))
        if sound_ZM is not None and sound_ZM.shape[1] and self._resampler is not None:
            stereo = np.broadcast_to(sound_ZM, (2, sound_ZM.shape[1])) if len(sound_ZM) == 1 else sound_ZM
            samples = np.ascontiguousarray(np.clip(stereo, -1, 1), dtype=np.float32)
            piece = av.AudioFrame.from_ndarray(samples, format="fltp", layout="stereo")
            piece.sample_rate, piece.pts = self._sample_rate, self.samples
            piece.time_base = Fraction(1, self._sample_rate)
            self.samples += sound_ZM.shape[1]
            self._mux_sound(self._resampler.resample(piece))

    def close(self) -> None:
        """What encoders still hold, and the end of the last fragment. Raises OSError from the sink."""
        try:
            self._container.mux(self._video.encode(None))
            if self._resampler is not None:
                if self.samples:
                    self._mux_sound(self._resampler.resample(None))
                self._mux_packets(self._sound.encode(None))
        finally:
            self._container.close()

    def _mux_sound(self, pieces: Iterable[av.AudioFrame]) -> None:
        for piece in pieces:
            self._mux_packets(self._sound.encode(piece))

    def _mux_packets(self, packets: Iterable[Any]) -> None:
        """All but what the encoder puts in front of time 0 to warm up: fragments have no way to say so, and
        the picture would start that much late. The first 1024 samples fade in instead."""
        for packet in packets:
            if packet.pts >= 0:
                self._container.mux(packet)

    def _new_resampler(self) -> Any:
        import av

        context = self._sound.codec_context
        return av.AudioResampler(
            context.format, "stereo", self._sound.rate, frame_size=context.frame_size or None
        )


# The header first, then fragments of about a frame, each handed on at once; nothing that stamps version or
# time. (`frag_every_frame` gives two fragments one time where sound goes beside the picture.)
_FRAGMENTS = {
    "movflags": "empty_moov+default_base_moof",
    "flush_packets": "1",
    "fflags": "+bitexact",
}
_ORDINARY = {"movflags": "faststart", "fflags": "+bitexact"}


def film_bytes(frames_PHW3: NDArray[np.uint8], fps: float, *, quality: int = 80) -> bytes:
    """A silent film of these frames in memory, which `join_films` can put behind others."""
    buffer = io.BytesIO()
    writer = FilmWriter(buffer, fps, *frames_PHW3.shape[1:3], quality=quality)
    writer.add(frames_PHW3)
    writer.close()
    return buffer.getvalue()


def join_films(
    parts: Iterable[tuple[bytes, int]],
    path: Path,
    *,
    sound: NDArray[np.float32] | None = None,
    sample_rate: int = 0,
) -> None:
    """Silent films of equal size, one after the other, as one mp4 with its index in front. No frame is
    encoded anew.

    Args:
        parts: each a film of `film_bytes`, and how many of its frames are taken.
        sound: (channels, samples) in [-1, 1] for the whole, at ``sample_rate`` Hz.

    Raises:
        OSError: the file cannot be written.
    """
    import av

    with av.open(str(path), "w", format="mp4", container_options=_ORDINARY) as container:
        stream: Any = None
        track = None
        begin = Fraction(0)
        for part, frames in parts:
            with av.open(io.BytesIO(part)) as source:
                if stream is None:
                    stream = container.add_stream_from_template(source.streams.video[0])
                    if sound is not None and sound.shape[1]:
                        track = add_sound_stream(container, "aac", sound, sample_rate)
                begin += _copied(source, {0: stream}, container, begin, frames)
        if track is not None and sound is not None:
            mux_sound(container, track, sound, sample_rate)


def _copied(
    source: Any, streams: dict[int, Any], container: Any, begin: Fraction, most: int | None = None
) -> Fraction:
    """Packets as they are, ``begin`` seconds later; returns the length in seconds of what was copied."""
    end = Fraction(0)
    packets = (packet for packet in source.demux() if packet.dts is not None)
    for packet in islice(packets, most):
        late = int(begin / packet.time_base)
        packet.pts, packet.dts = packet.pts + late, packet.dts + late
        end = max(end, (packet.pts - late + (packet.duration or 0)) * packet.time_base)
        packet.stream = streams[packet.stream.index]
        container.mux(packet)
    return end


class GrowingFilm:
    """A film at ``path`` that can be watched while it is made: until `close` it stands beside it, in
    fragments and named ``.part.mp4``, and plays up to where it was made, whatever becomes of the program.

    Raises:
        UserError: ``path`` does not end in .mp4, it or its unfinished form is there already, or cannot be
            written.
    """

    def __init__(self, path: Path, fps: float, height: int, width: int, sample_rate: int = 0) -> None:
        if path.suffix.lower() != ".mp4":
            raise UserError(f"{path}: films that grow are mp4; name it {path.stem or 'film'}.mp4")
        self.path, self.part = path, path.with_name(f"{path.stem}.part.mp4")
        if path.exists():
            raise UserError(f"{path}: is there already; name another file, or delete it")
        if self.part.exists() and self.part.stat().st_size:
            raise UserError(
                f"{self.part}: is there already, from a run that was killed; it plays: rename or delete it"
            )
        with one_line_on_failure(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.part, "wb")  # noqa: SIM115 - closed by `close`
            try:
                self._writer = FilmWriter(self._file, fps, height, width, sample_rate)
            except BaseException:
                self._file.close()
                self.part.unlink()
                raise
        self._ended, self._whole = False, 0

    @property
    def seconds(self) -> float:
        """Length of what was added."""
        return self._writer.frames / self._writer.fps

    def add(self, frames_PHW3: NDArray[np.uint8] | None, sound_ZM: NDArray[np.float32] | None = None) -> None:
        """As `FilmWriter.add`.

        Raises:
            UserError: the disk is full, or the place is gone; what was made until then stays.
        """
        try:
            self._writer.add(frames_PHW3, sound_ZM)
            self._file.flush()
            self._whole = self._file.tell()
        except OSError as error:
            kept = f"{self.path} holds what was written before" if self._salvaged() else "nothing was kept"
            reason = (error.strerror or str(error)).lower()
            raise UserError(
                f"{self.path}: cannot be written after {self.seconds:.1f} s ({reason}); {kept}; free some "
                "space or choose another place"
            ) from error

    def _salvaged(self) -> bool:
        """What is whole of it under the film's name, where no more can be written; whether there is any."""
        self._ended = True
        with contextlib.suppress(OSError, EOFError):  # the latter where encoders were ended already
            self._writer.close()
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            if self._whole:
                os.truncate(self.part, self._whole)
                os.replace(self.part, self.path)
                return True
            self.part.unlink(missing_ok=True)
        return False

    def close(self) -> bool:
        """End the film, and give it its name and an index in front. False: nothing was added, no file stays.

        Where the disk has no room for a second copy, the fragments themselves take the name.
        """
        if self._ended:
            return self.path.exists()
        self._ended = True
        try:
            self._writer.close()
            self._file.close()
        except OSError:
            return self._salvaged()
        if not self._writer.frames:
            self.part.unlink(missing_ok=True)
            return False
        whole = self.path.with_name(f".{self.path.name[:100]}.{os.getpid()}.tmp")
        try:
            rewrap(self.part, whole)
            flush(whole)
        except OSError:
            whole.unlink(missing_ok=True)
            os.replace(self.part, self.path)
        else:
            os.replace(whole, self.path)
            self.part.unlink()
        flush(self.path.parent)
        return True


def rewrap(source: Path, target: Path) -> None:
    """A film in fragments as one with its index in front: the same pictures and sound, no loss.

    Raises:
        OSError: ``target`` cannot be written.
    """
    import av

    with (
        av.open(str(source)) as old,
        av.open(str(target), "w", format="mp4", container_options=_ORDINARY) as new,
    ):
        streams = {s.index: new.add_stream_from_template(s) for s in (*old.streams.video, *old.streams.audio)}
        _copied(old, streams, new, Fraction(0))
