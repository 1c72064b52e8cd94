"""The player's web application: a page, its socket, and two addresses to send an image and to save the film.

Whoever may open it: without a token only who asks for this machine by one of its own names, so that a page
from elsewhere cannot reach in (by its address or by a name that leads here); with a token whoever knows it.
Sockets are answered only to pages that came from here.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import secrets
import tempfile
from collections.abc import Awaitable, Callable, Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response, WebSocket, WebSocketDisconnect
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
from starlette.background import BackgroundTask
from starlette.requests import HTTPConnection

from motionloom.studio.stream import pictures
from motionloom.studio.stream.hub import Viewer
from motionloom.studio.stream.messages import Refused, news, parse
from motionloom.studio.stream.session import Session, Show

_PICTURES_AT_ONCE = 2
"""Of those that are handed in: each may need some hundred MB while it is decoded."""
_GONE = (WebSocketDisconnect, RuntimeError, OSError)
"""What a socket says when its viewer is no longer there."""


class Door:
    """Who may come in.

    Args:
        token: that visitors must bring; None: none, but they must come from this machine.
        origins: pages from elsewhere that may connect, such as https://films.example.org.
    """

    def __init__(self, token: str | None, origins: Iterable[str] = ()) -> None:
        self._token = token
        self._origins = {origin.rstrip("/").lower() for origin in origins}
        self._names = {urlsplit(origin).netloc.lower() for origin in self._origins}

    def refuses(self, visitor: HTTPConnection) -> tuple[int, str] | None:
        """A status and the one line why a request is turned away; None: come in."""
        host = visitor.headers.get("host", "").lower()
        if self._token is None:
            if not is_loopback(host) and host not in self._names:
                return 403, f"{host[:80] or 'no host'} is not this machine: open http://127.0.0.1 at its port"
        elif not secrets.compare_digest(_token_of(visitor).encode(), self._token.encode()):
            return 401, "the token is missing or wrong: open the address that the command printed"
        origin = visitor.headers.get("origin")
        if origin is not None and not self._own(origin.lower(), host):
            return 403, f"a page of {origin[:80]} may not connect: allow it with --origin"
        return None

    def _own(self, origin: str, host: str) -> bool:
        return origin in self._origins or urlsplit(origin).netloc == host


def _token_of(visitor: HTTPConnection) -> str:
    scheme, _, token = visitor.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    return visitor.headers.get("x-token") or visitor.query_params.get("token", "")


def is_loopback(host: str) -> bool:
    """Whether a host, with a port or without, is this machine to itself: localhost, 127.0.0.1, [::1] ..."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def create_app(session: Session, door: Door) -> FastAPI:
    """The application of a session that was started."""
    app = FastAPI(title="MotionLoom", docs_url=None, redoc_url=None, openapi_url=None)
    page = files("motionloom.studio.stream").joinpath("page.html").read_text("utf-8")
    decoding = asyncio.Semaphore(_PICTURES_AT_ONCE)

    @app.middleware("http")
    async def guarded(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
        refused = door.refuses(request)
        if refused is not None:
            return JSONResponse({"error": refused[1]}, refused[0])
        response = await go_on(request)
        for name, value in _HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 400)

    @app.get("/")
    async def player() -> HTMLResponse:
        nonce = secrets.token_urlsafe(16)
        policy = _POLICY.format(nonce=nonce)
        return HTMLResponse(page.replace("{{nonce}}", nonce), headers={"content-security-policy": policy})

    @app.get("/figures")
    async def figures() -> dict[str, Any]:
        return await run_in_threadpool(session.figures)

    @app.post("/image", status_code=202)
    async def image(request: Request) -> dict[str, str]:
        data = await _body(request, pictures.MOST_BYTES)
        height, width = session.film_size
        async with decoding:
            picture = await run_in_threadpool(pictures.given_picture, data, height, width)
        session.obey(Show(picture))
        return {"image": "taken: the film goes on from it"}

    @app.get("/film.mp4")
    async def film() -> FileResponse:
        folder = tempfile.TemporaryDirectory(prefix="motionloom-film-")
        try:
            await run_in_threadpool(session.spool.save, Path(folder.name) / "film.mp4")
        except BaseException:
            folder.cleanup()
            raise
        done = BackgroundTask(folder.cleanup)
        return FileResponse(Path(folder.name) / "film.mp4", filename="film.mp4", background=done)

    @app.websocket("/play")
    async def play(socket: WebSocket) -> None:
        refused = door.refuses(socket)
        if refused is not None:
            await _turned_away(socket, *refused)
            return
        await socket.accept()
        await _watch(session, socket)

    return app


async def _body(request: Request, most: int) -> bytes:
    """What was sent. Raises `Refused` as soon as it is too much."""
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > most:
            raise Refused(f"the image has more than {most // 10**6} MB: scale it down")
    return bytes(data)


async def _turned_away(socket: WebSocket, status: int, line: str) -> None:
    if "websocket.http.response" in socket.scope.get("extensions", {}):
        await socket.send_denial_response(JSONResponse({"error": line}, status))
    else:
        await socket.close(1008, line[:120])


async def _watch(session: Session, socket: WebSocket) -> None:
    """A viewer from coming to going, however it goes."""
    loop, ready = asyncio.get_running_loop(), asyncio.Event()

    def wake() -> None:
        with contextlib.suppress(RuntimeError):  # the server ends
            loop.call_soon_threadsafe(ready.set)

    try:
        viewer = session.hub.join(wake)
    except Refused as error:
        with contextlib.suppress(*_GONE):
            await socket.send_text(news("error", line=str(error)))
            await socket.close(1013)
        return
    session.hub.tell(session.hello(), viewer)
    session.hub.show(session.figures())
    sending = asyncio.create_task(_send(session, viewer, socket, ready))
    hearing = asyncio.create_task(_hear(session, viewer, socket))
    try:
        await asyncio.wait((sending, hearing), return_when=asyncio.FIRST_COMPLETED)
    finally:
        session.hub.leave(viewer)
        for task in (sending, hearing):
            task.cancel()
        await asyncio.gather(sending, hearing, return_exceptions=True)


async def _send(session: Session, viewer: Viewer, socket: WebSocket, ready: asyncio.Event) -> None:
    with contextlib.suppress(*_GONE):
        while True:
            ready.clear()
            while (message := session.hub.take(viewer)) is not None:
                if isinstance(message, str):
                    await socket.send_text(message)
                else:
                    await socket.send_bytes(message)
            await ready.wait()


async def _hear(session: Session, viewer: Viewer, socket: WebSocket) -> None:
    with contextlib.suppress(*_GONE):
        while True:
            message = await socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            try:
                text = message.get("text")
                if text is None:
                    raise Refused("a binary message: commands are JSON text, images go to /image")
                session.obey(parse(text), viewer)
            except Refused as error:
                session.hub.tell(news("error", line=str(error)), viewer)
            # A viewer that resumes must be sent what waits for it.
            viewer.wake()


_HEADERS = {
    "cache-control": "no-store",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
_POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src blob: data:; "
    "connect-src 'self' ws: wss:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
