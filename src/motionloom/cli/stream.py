"""``motionloom stream``: a film that is watched while it is made, on a page, in a file or through a pipe."""

from __future__ import annotations

import json
import math
import secrets
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motionloom.cli.console import Out, finite
from motionloom.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from motionloom.generate import Model, Sampling
    from motionloom.generate.stream import Ask, Stream
    from motionloom.studio.stream.film import Film
    from motionloom.studio.stream.record import Make, Reel, Summary, Told

FORMATS = ("mp4", "rgb24")
PIPE = "-"
HOST, PORT = "127.0.0.1", 7861
LEAD = 1.5  # seconds
STRENGTH = 0.6


@dataclass(frozen=True)
class Wish:
    """What the command line asked for."""

    prompt: str | None = None
    negative: str = ""
    out: str | None = None
    format: str = "mp4"
    seconds: float | None = None
    image: Path | None = None
    video: Path | None = None
    strength: float | None = None
    size: str | None = None
    fps: float | None = None
    seed: int = 0
    steps: int | None = None
    solver: str | None = None
    guidance: float | None = None
    window: int | None = None
    sinks: int | None = None
    serve: bool = False
    host: str | None = None
    port: int | None = None
    token: str | None = None
    origins: tuple[str, ...] = ()
    lead: float | None = None
    raw: bool = False
    loras: tuple[str, ...] = ()
    decoder: Path | None = None
    device: str = "auto"


def run(checkpoint: Path, wish: Wish, as_json: bool) -> None:
    """Stream to where the wish says."""
    _check(wish)
    console = Out(as_json)
    if wish.serve:
        _serve(checkpoint, wish, console)
    else:
        _record(checkpoint, wish, console)


def _check(wish: Wish) -> None:
    """What can be known to be wrong before a model is read."""
    if wish.serve == (wish.out is not None):
        raise UserError("say where to: --out FILE.mp4, --out - for a pipe, or --serve for a page")
    if not wish.serve and wish.prompt is None:
        raise UserError("--prompt is missing: say what the film shows")
    if wish.format not in FORMATS:
        raise UserError(f"--format {wish.format}: choose {' or '.join(FORMATS)}")
    if wish.format == "rgb24" and wish.out != PIPE:
        raise UserError("--format rgb24 is for a pipe: say --out - as well")
    if wish.out == PIPE and sys.stdout.isatty():
        raise UserError("--out - writes a film to stdout: pipe it, for instance into ffplay -i -")
    if wish.video is not None and (wish.serve or wish.image is not None):
        other = "--serve" if wish.serve else "--image"
        raise UserError(f"--video is redrawn into a file or a pipe, without {other}: leave one of them out")
    page = {"--host": wish.host, "--port": wish.port, "--token": wish.token, "--lead": wish.lead}
    for name, said in {**page, "--origin": wish.origins or None}.items():
        if said is not None and not wish.serve:
            raise UserError(f"{name} is of the page: say --serve as well, or leave it out")
    if wish.serve and wish.seconds is not None:
        raise UserError("--seconds is the length of a file: a page plays until it is closed; leave it out")
    if wish.strength is not None and wish.video is None:
        raise UserError("--strength is of a film that is redrawn: say --video as well, or leave it out")
    finite("--seconds", wish.seconds)
    if wish.token is not None and not wish.token:
        raise UserError("--token is empty: leave it out, and one is made where one is needed")


def _open(checkpoint: Path, wish: Wish, console: Out) -> tuple[Model, Ask, Sampling]:
    """The model, what is asked of it, and how it walks."""
    from motionloom.cli.assemble import open_model
    from motionloom.cli.lora import into_weights
    from motionloom.config.request import parse_request
    from motionloom.generate import recipe_sampling
    from motionloom.generate.stream import Ask

    said = {"size": wish.size, "fps": wish.fps, "steps": wish.steps, "solver": wish.solver}
    said |= {"prompt": wish.prompt or ""}
    request = parse_request({key: value for key, value in said.items() if value is not None})
    model = open_model(checkpoint, raw=wish.raw, device=wish.device, decoder=wish.decoder, tell=console.note)
    if "video" not in model.modalities:
        raise UserError(
            f"{checkpoint}: makes sound alone, and a film needs pictures: use motionloom generate"
        )
    into_weights(model, wish.loras)
    height, width = request.size or (None, None)
    ask = Ask(
        prompt=wish.prompt or "",
        negative=wish.negative,
        height=height,
        width=width,
        fps=request.fps,
        seed=wish.seed,
        window=wish.window,
        sinks=wish.sinks,
    )
    sampling = recipe_sampling(
        model.recipe, steps=request.steps, solver=request.solver, guidance=wish.guidance
    )
    return model, ask, sampling


# To a file or a pipe


def _record(checkpoint: Path, wish: Wish, console: Out) -> None:
    from motionloom.generate.stream import Stream
    from motionloom.studio.stream.record import record
    from motionloom.train.signals import listening

    assert wish.out is not None
    if wish.out != PIPE:
        _require_new(Path(wish.out))
    length = wish.seconds if wish.video is None else _length(wish.video, wish.seconds)
    model, ask, sampling = _open(checkpoint, wish, console)
    film = Stream(model, replace(ask, history=0), sampling)  # nobody goes back
    if wish.image is not None:
        film.show(_read(wish.image, film))
    lines = _Lines(console, film, length, wish.out == PIPE)
    reel, close = _reel(wish, film, console)
    stopped: FloatingPointError | None = None
    summary: Summary | None = None
    with listening() as stop, lines.shown():
        try:
            make = _make(film, wish)
            summary = record(
                film, reel, seconds=length, stop=lambda: bool(stop.name), each=lines.each, make=make
            )
        except FloatingPointError as error:
            stopped = error
        finally:
            whole = close()
    if stopped is not None or summary is None:
        kept = f"; {wish.out} holds what was made before" if whole and wish.out != PIPE else ""
        raise UserError(f"the film stopped after {lines.seconds:.1f} s: {stopped}{kept}")
    lines.end({"out": wish.out, "fps": film.fps, "height": film.height, "width": film.width}, summary)


def _require_new(path: Path) -> None:
    """As `GrowingFilm`, before a model is read."""
    if path.suffix.lower() != ".mp4":
        raise UserError(f"{path}: films that grow are mp4; name it {path.stem or 'film'}.mp4")
    if path.exists():
        raise UserError(f"{path}: is there already; name another file, or delete it")


def _make(film: Stream, wish: Wish) -> Make:
    """How chunks are made: of nothing, or of a film that is redrawn."""
    from motionloom.studio.stream.record import pieces_of

    if wish.video is None:
        return lambda film: film.next()
    return pieces_of(film.push, _source(wish.video, film), wish.strength or STRENGTH)


def _length(video: Path, seconds: float | None) -> float:
    """How long a redrawn film is."""
    from motionloom.data.media import probe

    info = probe(video)
    if info.duration <= 0:
        raise UserError(f"{video}: is a still, and --video is a film: give it as --image")
    return info.duration if seconds is None else min(seconds, info.duration)


def _source(video: Path, film: Film) -> Iterator[NDArray[np.uint8]]:
    """A film that is to be redrawn, in chunks; the last frame is held to fill the last one."""
    from motionloom.data.media import MediaError, read_clip

    taken = 0
    while True:
        frames = film.frames_wanted
        try:
            clip = read_clip(
                video,
                start=taken / film.fps,
                frames=frames,
                fps=film.fps,
                size=(film.height, film.width),
                short="hold",
            )
        except MediaError as error:
            if error.kind == "start after the end":
                return
            raise
        yield clip.video_FHW3
        taken += frames


def _read(image: Path, film: Film) -> Tensor:
    """(H, W, 3) uint8, scaled to cover the film and cropped."""
    import torch

    from motionloom.data.media import read_clip

    return torch.from_numpy(read_clip(image, frames=1, size=(film.height, film.width)).video_FHW3[0])


def _reel(wish: Wish, film: Stream, console: Out) -> tuple[Reel, Callable[[], bool]]:
    """Where frames go, and how that ends: whether anything was kept."""
    from motionloom.data.media.film import FilmWriter, GrowingFilm
    from motionloom.studio.stream.record import Pipe, RawFrames

    if wish.out != PIPE:
        growing = GrowingFilm(Path(str(wish.out)), film.fps, film.height, film.width, film.sample_rate)
        return growing, growing.close
    pipe = Pipe(sys.stdout.fileno())
    if wish.format == "rgb24":
        sound = "; its sound is left out" if film.sample_rate else ""
        console.note(f"rgb24, {film.width}x{film.height} pixels, {film.fps:g} frames a second{sound}")
        console.note(
            f"to read it: | ffmpeg -f rawvideo -pixel_format rgb24 -video_size {film.width}x{film.height} "
            f"-framerate {film.fps:g} -i - film.mp4"
        )
        return RawFrames(pipe), lambda: True
    console.note("mp4 in fragments; to watch it: | ffplay -i -   to keep it: | ffmpeg -i - -c copy film.mkv")
    writer = FilmWriter(pipe, film.fps, film.height, film.width, film.sample_rate)

    def close() -> bool:
        try:
            writer.close()
        except BrokenPipeError:
            return False
        return True

    return writer, close


class _Lines:
    """What is said while a film grows: with --json a line a chunk, on stderr; else how far it is."""

    def __init__(self, console: Out, film: Film, seconds: float | None, piped: bool) -> None:
        self._console, self._fps, self._piped = console, film.fps, piped
        self._total = None if seconds is None else max(1, round(seconds * film.fps))
        self._advance: Callable[[int, int], None] | None = None
        self.seconds = 0.0

    @contextmanager
    def shown(self) -> Iterator[None]:
        """While it lasts."""
        if self._console.as_json:
            yield
            return
        if self._total is None:
            self._console.note("Ctrl-C ends the film and keeps it")
        with self._console.progress("frames") as advance:
            self._advance = advance
            yield

    def each(self, told: Told) -> None:
        """A chunk was made."""
        self.seconds = told.seconds
        if self._console.as_json:
            print(json.dumps(asdict(told)), file=sys.stderr, flush=True)
        elif self._advance is not None:
            self._advance(round(told.seconds * self._fps), self._total or 0)

    def end(self, facts: dict[str, Any], summary: Summary) -> None:
        """The answer; through stdout only where no film goes there."""
        value = {**facts, **summary.plain()}
        gaps = summary.gap_p95_s
        steady = "" if math.isnan(gaps) else f", 95 % of gaps within {gaps:.2f} s"
        line = (
            f"{facts['out']}: {summary.seconds:.1f} s, {summary.frames} frames ({summary.ended}); first "
            f"frame after {summary.first_frame_s:.2f} s, {summary.made_per_second:.1f} frames a second"
            f"{steady}, {summary.memory_bytes / 1e6:.1f} MB of cache"
        )
        if not self._piped:
            self._console.result(value, [line])
        elif self._console.as_json:
            print(json.dumps(value), file=sys.stderr, flush=True)
        else:
            self._console.note(line)


# To a page


def _serve(checkpoint: Path, wish: Wish, console: Out) -> None:
    try:
        from motionloom.studio.stream.serve import listen, serve
        from motionloom.studio.stream.server import Door, is_loopback
    except ImportError as error:
        raise UserError(f"--serve needs {error.name}: pip install 'motionloom[stream]'") from None
    from motionloom.generate.stream import Stream
    from motionloom.studio.stream import Hub, Session, Spool

    host, lead = wish.host or HOST, LEAD if wish.lead is None else wish.lead
    listener = listen(host, PORT if wish.port is None else wish.port)
    with listener:
        model, ask, sampling = _open(checkpoint, wish, console)
        check = Stream(model, ask, sampling)  # here a wrong size is told at once
        image = None if wish.image is None else _read(wish.image, check)
        del check

        def begin(prompt: str, take: int) -> Film:
            film = Stream(model, replace(ask, prompt=prompt, seed=ask.seed + take), sampling)
            if image is not None and take == 0:
                film.show(image)
            return film

        token = wish.token
        if token is None and not is_loopback(host):
            token = secrets.token_urlsafe(24)
        session = Session(begin, Hub(), Spool(), prompt=wish.prompt, lead=lead, log=console.note)
        page = _page(host, listener.getsockname()[1], token)

        def ready(end: Callable[[], None]) -> None:
            console.result({"page": page, "token": token}, [page])
            console.note("open this page in a browser; Ctrl-C ends the server")

        serve(session, Door(token, wish.origins), listener, ready)
        figures = session.figures()
        line = f"ended after {figures['seconds']:.1f} s of film; {figures['dropped']} frames were dropped"
        console.result({"ended": "interrupted", **figures}, [line])


def _page(host: str, port: int, token: str | None) -> str:
    """The address that a browser opens."""
    name = socket.gethostname() if host in ("0.0.0.0", "::", "") else host
    name = f"[{name}]" if ":" in name else name
    return f"http://{name}:{port}/" + (f"?token={token}" if token else "")
