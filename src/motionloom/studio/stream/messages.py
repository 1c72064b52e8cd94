"""What goes over the wire: commands in, news and frames out.

Text messages are JSON objects with a ``type``. Binary messages are a head of 20 bytes, little-endian (kind,
channels, nothing, epoch, count, seconds: ``<BBHIId``), and a body: of kind 1 a picture as PNG or JPEG, of
kind 2 sound as float32 samples, channel after channel. ``epoch`` counts the breaks in the film's time: going
back, and new films.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

MOST_CHARACTERS = 2_000
"""Of a prompt."""
MOST_BYTES = 16_384
"""Of a text message: a prompt in any script, and some."""


class Refused(Exception):
    """A command that is not obeyed; the message is the one line that its viewer reads."""


class _Command(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Say(_Command):
    """Another prompt; the film goes on with it, or begins where none is being made."""

    type: Literal["say"] = "say"
    prompt: str = Field(max_length=MOST_CHARACTERS)
    recache: bool = False


class Restart(_Command):
    """Another film, from its first frame."""

    type: Literal["restart"] = "restart"
    prompt: str | None = Field(default=None, max_length=MOST_CHARACTERS)


class Back(_Command):
    """Go back; ``at`` is what the viewer sees, which is a little behind what is made."""

    type: Literal["back"] = "back"
    seconds: float = Field(ge=0, allow_inf_nan=False)
    at: float | None = Field(default=None, ge=0, allow_inf_nan=False)


class Play(_Command):
    """This viewer wants frames."""

    type: Literal["play"] = "play"


class Pause(_Command):
    """This viewer wants none; where nobody wants any, none are made."""

    type: Literal["pause"] = "pause"


class Seen(_Command):
    """So many frames have come in on this connection: a viewer that says so is not sent too many at once."""

    type: Literal["seen"] = "seen"
    frames: int = Field(ge=0)


Command = Annotated[Say | Restart | Back | Play | Pause | Seen, Field(discriminator="type")]
_ADAPTER: TypeAdapter[Any] = TypeAdapter(Command)


def parse(text: str) -> Say | Restart | Back | Play | Pause | Seen:
    """A text message as a command. Raises `Refused`: too long, no JSON, unknown, wrong values."""
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MOST_BYTES:
        raise Refused(f"a message of {size:,} bytes is too long: at most {MOST_BYTES:,}; shorten the prompt")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise Refused('the message is not JSON: send an object such as {"type": "pause"}') from None
    try:
        return _ADAPTER.validate_python(value)
    except ValidationError as error:
        raise Refused(_said(error)) from None


def _said(error: ValidationError) -> str:
    first = error.errors()[0]
    if first["type"].startswith("union_tag") or first["type"].endswith("_attributes_type"):
        return 'unknown command: "type" is one of say, restart, back, play, pause, seen'
    where = ".".join(str(part) for part in first["loc"][1:])
    if first["type"] == "string_too_long":
        return f"{where} has more than {MOST_CHARACTERS:,} characters: shorten it"
    reason = first["msg"][0].lower() + first["msg"][1:]
    return f'"{where}" of the command: {reason}' if where else reason


def news(type: str, **values: Any) -> str:
    """A text message to viewers; numbers that JSON does not know become null."""
    return json.dumps({"type": type} | _finite(values))


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


PICTURE, SOUND = 1, 2
_HEAD = struct.Struct("<BBHIId")


@dataclass(frozen=True)
class Block:
    """A frame, or a stretch of sound, as it is sent."""

    kind: int
    epoch: int
    count: int
    """Of a picture its number in the film, of sound its samples."""
    seconds: float
    """When it begins, in the film."""
    body: bytes
    channels: int = 0

    def packed(self) -> bytes:
        """The binary message."""
        return _HEAD.pack(self.kind, self.channels, 0, self.epoch, self.count, self.seconds) + self.body

    @classmethod
    def unpacked(cls, data: bytes) -> Block:
        """What :meth:`packed` made."""
        kind, channels, _, epoch, count, seconds = _HEAD.unpack_from(data)
        return cls(kind, epoch, count, seconds, data[_HEAD.size :], channels)
