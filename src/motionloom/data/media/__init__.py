"""Clips and sound, in and out of files.

Pixels are (F, H, W, 3) uint8 sRGB with a rate in frames per second; sound is (channels, samples) float32.
"""

from motionloom.data.media.info import IMAGE_SUFFIXES, VIDEO_SUFFIXES, MediaError, MediaInfo
from motionloom.data.media.pixels import random_offset, resize_cover_crop
from motionloom.data.media.read import Clip, probe, read_clip
from motionloom.data.media.sound import SOUND_SUFFIXES, is_sound, read_sound, sound_seconds
from motionloom.data.media.write import write_video
from motionloom.data.media.write_sound import write_sound

__all__ = [
    "IMAGE_SUFFIXES",
    "SOUND_SUFFIXES",
    "VIDEO_SUFFIXES",
    "Clip",
    "MediaError",
    "MediaInfo",
    "is_sound",
    "probe",
    "random_offset",
    "read_clip",
    "read_sound",
    "resize_cover_crop",
    "sound_seconds",
    "write_sound",
    "write_video",
]
