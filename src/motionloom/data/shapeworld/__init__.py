"""ShapeWorld: a procedural world of captioned clips whose truth is known, and an oracle to read it back."""

from motionloom.data.shapeworld.beside import (
    REFERENCES,
    random_mask,
    reference_caption,
    reference_video,
    swapped,
)
from motionloom.data.shapeworld.captions import Facts, caption, facts, parse, prompt
from motionloom.data.shapeworld.dataset import write_dataset
from motionloom.data.shapeworld.oracle import ObjectReading, Reading, Track, adherence, find_cuts, oracle
from motionloom.data.shapeworld.render import Rendered, render, render_video
from motionloom.data.shapeworld.sound import Heard, hear
from motionloom.data.shapeworld.sound_oracle import SoundAgreement, sound_agrees
from motionloom.data.shapeworld.spec import (
    BACKGROUNDS,
    COLORS,
    MOTIONS,
    PRESETS,
    SHAPES,
    SIZES,
    Attributes,
    ClipSpec,
    ObjectSpec,
    World,
)
from motionloom.data.shapeworld.story import StorySpec, sample_story, scene_captions, story_caption

__all__ = [
    "BACKGROUNDS",
    "COLORS",
    "MOTIONS",
    "PRESETS",
    "REFERENCES",
    "SHAPES",
    "SIZES",
    "Attributes",
    "ClipSpec",
    "Facts",
    "Heard",
    "ObjectReading",
    "ObjectSpec",
    "Reading",
    "Rendered",
    "SoundAgreement",
    "StorySpec",
    "Track",
    "World",
    "adherence",
    "caption",
    "facts",
    "find_cuts",
    "hear",
    "oracle",
    "parse",
    "prompt",
    "random_mask",
    "reference_caption",
    "reference_video",
    "render",
    "render_video",
    "sample_story",
    "scene_captions",
    "sound_agrees",
    "story_caption",
    "swapped",
    "write_dataset",
]
