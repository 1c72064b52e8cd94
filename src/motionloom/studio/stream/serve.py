"""From an address to a server that answers at it, until somebody ends it."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable

from motionloom.errors import UserError
from motionloom.studio.stream.server import Door, create_app
from motionloom.studio.stream.session import Session

_MESSAGE = 2**20
"""Bytes of the longest message that is read at all; shorter ones that are too long are answered."""
_SENT_AHEAD = 2**18
"""Bytes that the system may hold for a viewer. More would hide for long that it is slow."""
_PATIENCE = 3
"""Seconds that viewers have to go when the server ends."""


def listen(host: str, port: int) -> socket.socket:
    """A socket at the address; port 0 takes any that is free.

    Raises:
        UserError: the address is taken, not this machine's, or not allowed.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError:
        raise UserError(f"--host {host}: no such address; 127.0.0.1 is this machine alone") from None
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SENT_AHEAD)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"--port {port} is in use: name another, or 0 for any that is free") from None
        if error.errno == errno.EACCES:
            raise UserError(f"--port {port} needs the rights of root: name one above 1023") from None
        if error.errno == errno.EADDRNOTAVAIL:
            raise UserError(f"--host {host} is no address of this machine: try 127.0.0.1") from None
        raise
    return listener


def serve(
    session: Session,
    door: Door,
    listener: socket.socket,
    ready: Callable[[Callable[[], None]], object] = lambda end: None,
) -> None:
    """Answer until SIGINT or SIGTERM (in the main thread); then all is closed.

    Args:
        ready: called when the page can be opened, with what ends the server.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready(self.end)

        def end(self) -> None:
            self.should_exit = True

    config = uvicorn.Config(
        create_app(session, door),
        ws_max_size=_MESSAGE,
        ws_per_message_deflate=False,  # pictures are compressed already
        timeout_graceful_shutdown=_PATIENCE,
        log_level="error",
        access_log=False,  # it would print tokens
        server_header=False,
    )
    session.start()
    try:
        Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        pass  # uvicorn ends in good order, then raises what made it end
    finally:
        session.close()
        listener.close()
