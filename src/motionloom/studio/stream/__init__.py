"""A film that is watched while it is made: the thread that makes it, its viewers, and what they see."""

from motionloom.studio.stream.film import Film, Piece
from motionloom.studio.stream.hub import Hub
from motionloom.studio.stream.session import Session
from motionloom.studio.stream.spool import Spool

__all__ = ["Film", "Hub", "Piece", "Session", "Spool"]
