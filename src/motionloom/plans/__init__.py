"""Plans: what each token is. One sample or request in, token streams out (see ``docs/architecture.md``)."""

from motionloom.plans.chunks import Chunks
from motionloom.plans.conditions import Conditions, Draws, region
from motionloom.plans.geometry import Geometry, Sample, token_geometry
from motionloom.plans.given import EXACT, NOTHING, Beside, Given, Kind, Marks, exactly
from motionloom.plans.layout import Layout, Level, Plan, Stage, StreamedPlan, Text, Track
from motionloom.plans.scenes import Scenes
from motionloom.plans.stream import Attributes, Stream, Streams, join_attributes
from motionloom.plans.text_to_video import TextToVideo
from motionloom.plans.tokens import (
    Values,
    as_shown,
    keep_given,
    read_clip,
    speed,
    start,
    to_streams,
    to_streams_at,
)
from motionloom.plans.visibility import (
    Visibility,
    causal_chunks,
    dense_mask,
    full,
    same_scene,
    same_scene_or_both_video,
    scene_summaries,
    separate_references,
    spatial_window,
)

PLANS: dict[str, type] = {"text_to_video": TextToVideo, "scenes": Scenes, "chunks": Chunks}
"""Plans by recipe name; a recipe's ``plan`` section holds the fields of the class."""

__all__ = [
    "EXACT",
    "NOTHING",
    "PLANS",
    "Attributes",
    "Beside",
    "Chunks",
    "Conditions",
    "Draws",
    "Geometry",
    "Given",
    "Kind",
    "Layout",
    "Level",
    "Marks",
    "Plan",
    "Sample",
    "Scenes",
    "Stage",
    "Stream",
    "StreamedPlan",
    "Streams",
    "Text",
    "TextToVideo",
    "Track",
    "Values",
    "Visibility",
    "as_shown",
    "causal_chunks",
    "dense_mask",
    "exactly",
    "full",
    "join_attributes",
    "keep_given",
    "read_clip",
    "region",
    "same_scene",
    "same_scene_or_both_video",
    "scene_summaries",
    "separate_references",
    "spatial_window",
    "speed",
    "start",
    "to_streams",
    "to_streams_at",
    "token_geometry",
]
