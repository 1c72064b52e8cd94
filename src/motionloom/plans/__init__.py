"""Plans: what each token is. One sample or request in, token streams out (see ``docs/architecture.md``)."""

from motionloom.plans.chunks import Chunks
from motionloom.plans.layout import (
    Geometry,
    Layout,
    Plan,
    StreamedPlan,
    Text,
    keep_given,
    read_video,
    to_streams,
    to_streams_at,
)
from motionloom.plans.scenes import Scenes
from motionloom.plans.stream import Attributes, Stream, Streams, join_attributes
from motionloom.plans.text_to_video import FirstFrame, TextToVideo
from motionloom.plans.visibility import (
    Visibility,
    causal_chunks,
    dense_mask,
    full,
    same_scene,
    same_scene_or_both_video,
    scene_summaries,
    spatial_window,
)

PLANS: dict[str, type] = {
    "text_to_video": TextToVideo,
    "first_frame": FirstFrame,
    "scenes": Scenes,
    "chunks": Chunks,
}
"""Plans by recipe name; a recipe's ``plan`` section holds the fields of the class."""

__all__ = [
    "PLANS",
    "Attributes",
    "Chunks",
    "FirstFrame",
    "Geometry",
    "Layout",
    "Plan",
    "Scenes",
    "Stream",
    "StreamedPlan",
    "Streams",
    "Text",
    "TextToVideo",
    "Visibility",
    "causal_chunks",
    "dense_mask",
    "full",
    "join_attributes",
    "keep_given",
    "read_video",
    "same_scene",
    "same_scene_or_both_video",
    "scene_summaries",
    "spatial_window",
    "to_streams",
    "to_streams_at",
]
