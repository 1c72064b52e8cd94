"""What is said about a clip: several wordings of the same facts, and the way back from words to facts."""

from __future__ import annotations

import re
from dataclasses import dataclass

from motionloom.data.shapeworld.spec import BACKGROUNDS, COLORS, SHAPES, SIZES, Attributes, ClipSpec

VERB = {
    "left": ("moves left", "moving to the left"),
    "right": ("moves right", "moving to the right"),
    "up": ("moves up", "moving up"),
    "down": ("moves down", "moving down"),
    "bounce": ("bounces", "bouncing"),
    "circle": ("circles around", "circling around"),
    "spin": ("spins", "spinning"),
    "grow": ("grows", "growing"),
    "shrink": ("shrinks", "shrinking"),
    "still": ("stays still", "staying still"),
}
# {noun}: "small red square"; {things}: the objects doing what they do; {doing}: the same with participles.
TEMPLATES = (
    "{things} on a {background} background",
    "on a {background} background, {things}",
    "{doing} on a {background} background",
    "{listed}, {background} background",
    "a video of {doing}, the background is {background}",
    "{background} background: {things}",
)


@dataclass(frozen=True)
class Facts:
    """What a caption promises."""

    objects: tuple[Attributes, ...]
    background: str


def facts(spec: ClipSpec) -> Facts:
    """What the clip shows."""
    return Facts(tuple(obj.attributes for obj in spec.objects), spec.background)


def caption(spec: ClipSpec) -> str:
    """The clip's caption, in the wording that was drawn with it."""
    return word(facts(spec), spec.wording)


def prompt(spec: ClipSpec | Facts) -> str:
    """The canonical caption: the same for all clips that show the same."""
    return word(spec if isinstance(spec, Facts) else facts(spec), 0)


def word(what: Facts, wording: int) -> str:
    """Facts in the given wording (any integer; 0 is the canonical one)."""
    return TEMPLATES[wording % len(TEMPLATES)].format(
        things=clauses(what.objects), background=what.background, **_participles(what.objects)
    )


def clauses(objects: tuple[Attributes, ...]) -> str:
    """ "a small red square moves left and a large blue star spins"."""
    return " and ".join(f"{article(noun(a))} {VERB[a.motion][0]}" for a in objects)


def noun(a: Attributes) -> str:
    """ "small red square"."""
    return f"{a.size} {a.color} {a.shape}"


def _participles(objects: tuple[Attributes, ...]) -> dict[str, str]:
    return {
        "doing": " and ".join(f"{article(noun(a))} {VERB[a.motion][1]}" for a in objects),
        "listed": " and ".join(f"{a.color} {a.shape}, {a.size}, {VERB[a.motion][1]}" for a in objects),
    }


def article(phrase: str) -> str:
    """The phrase with its indefinite article."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


_MOTION = re.compile(
    r"\b(?:mov\w+ (?:to the )?(left|right|up|down)|(bounc|circl|spin|grow|shrink)(?:s|es|ing|ning)|(still))\b"
)


def parse(text: str) -> Facts | None:
    """Read a caption back; None where it does not name every attribute of one or two objects.

    Takes any wording that names colour, shape, size and motion of each object, objects joined by "and".
    """
    text = text.lower()
    background = re.search(rf"\b({'|'.join(BACKGROUNDS)})\b", text)
    objects = tuple(_parse_object(part) for part in re.split(r"\band\b", text))
    complete = tuple(a for a in objects if a is not None)
    if background is None or len(complete) != len(objects) or len(objects) > 2:
        return None
    return Facts(complete, background.group(1))


def _parse_object(text: str) -> Attributes | None:
    found = [re.search(rf"\b({'|'.join(names)})\b", text) for names in (SHAPES, tuple(COLORS), SIZES)]
    motion = _MOTION.search(text)
    if motion is None or any(match is None for match in found):
        return None
    direction, stem, still = motion.groups()
    name = direction or {"bounc": "bounce", "circl": "circle"}.get(stem, stem) or still
    shape, color, size = (match.group(1) for match in found if match is not None)
    return Attributes(shape, color, size, name)
