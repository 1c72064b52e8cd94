"""Weights in and out: opened lazily, loaded strictly, written whole."""

from motionloom.backbones.weights.files import (
    PICKLES,
    Region,
    Stored,
    Weights,
    is_pickle,
    only_pickle,
    open_file,
    open_weights,
    read_json,
    refuse_pickle,
)
from motionloom.backbones.weights.load import Loaded, Part, load_into, mismatch, whole_part
from motionloom.backbones.weights.save import DIFFUSERS_NAME, SHARD_BYTES, Sink, write_file, write_folder

__all__ = [
    "DIFFUSERS_NAME",
    "PICKLES",
    "SHARD_BYTES",
    "Loaded",
    "Part",
    "Region",
    "Sink",
    "Stored",
    "Weights",
    "is_pickle",
    "load_into",
    "mismatch",
    "only_pickle",
    "open_file",
    "open_weights",
    "read_json",
    "refuse_pickle",
    "whole_part",
    "write_file",
    "write_folder",
]
