"""What ``motionloom generate`` leaves in a folder: clips, ``clips.json`` that says what each is, a sheet.

``clips.json`` is what ``motionloom judge`` reads; its form is told in ``evals/asked.py``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from motionloom.config.request import Request
from motionloom.data.media import write_sound, write_video
from motionloom.data.sheets import contact_sheet
from motionloom.durable import write_atomic
from motionloom.generate import Clip
from motionloom.requests.prepared import Prepared
from motionloom.requests.sources import Given

GIVEN = "given"
"""Folder, beside the clips, of what was handed in: at the clips' size, as many frames as are given."""


def slug(prompt: str) -> str:
    """A prompt as a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_")[:48] or "empty"


def write_clip(file: Path, clip: Clip, fps: float) -> None:
    """One clip, with its sound where it has one and the format holds any."""
    sound = None if clip.sound_ZM is None else clip.sound_ZM.numpy()
    if file.suffix == ".wav":
        assert sound is not None
        write_sound(file, sound, clip.sample_rate)
        return
    assert clip.video_PHW3 is not None
    heard = sound is not None and file.suffix in (".mp4", ".webm")
    write_video(
        file,
        clip.video_PHW3.numpy(),
        fps,
        sound=sound if heard else None,
        sample_rate=clip.sample_rate if heard else None,
    )


def write_sheet(file: Path, clips: Sequence[Clip], titles: Sequence[str], prepared: Prepared) -> Path:
    """Frames of all clips; what is given of them is marked."""
    videos = [clip.video_PHW3.numpy() for clip in clips if clip.video_PHW3 is not None]
    share = prepared.given_share()
    return contact_sheet(videos, titles, file, given=[share] * len(videos) if any(share) else None)


def titles(wish: Request, prepared: Prepared) -> list[str]:
    """What clips are called by."""
    said = " | ".join(scene.caption for scene in wish.scenes)
    return [prompt or said for prompt in prepared.clips.prompts]


def describe(
    out: Path,
    files: Sequence[Path],
    wish: Request,
    prepared: Prepared,
    fps: float,
    made_by: Mapping[str, Any],
) -> None:
    """``clips.json``, which ``motionloom judge`` reads: what was asked of every clip, and what made it."""
    sampling = prepared.sampling
    how = {key: getattr(sampling, key) for key in ("solver", "steps", "shift", "eta")}
    how["guidance"] = asdict(sampling.guidance)
    scenes = [
        {"caption": scene.caption, "frames": frames, "role": scene.role}
        for scene, frames in zip(wish.scenes, prepared.shots, strict=False)
    ]
    conditions = [_told(out, n, one) for n, one in enumerate(prepared.given)]
    records = [
        {
            "file": file.name,
            "prompt": prompt,
            "negative": wish.negative,
            "fps": fps,
            "frames": sum(prepared.shots),
            "seed": wish.seed,
            "number": number,
            "scenes": scenes,
            "conditions": conditions,
            **wish.model_dump(mode="json", include={"extend", "memory"}, exclude_none=True),
            "sampling": how,
            **made_by,
        }
        for number, (file, prompt) in enumerate(zip(files, prepared.clips.prompts, strict=True))
    ]
    write_atomic(out / "clips.json", (json.dumps(records, indent=1) + "\n").encode())


def _told(out: Path, number: int, given: Given) -> dict[str, Any]:
    """A condition, with the frames and pixels that it gave and copies of them."""
    c = given.condition
    record: dict[str, Any] = c.model_dump(mode="json", exclude_unset=True, exclude={"source", "mask"})
    record |= {"type": c.type, "modality": c.modality, "strength": c.strength, "noise": c.noise}
    record |= {"from": c.source, "region": None}
    if not given.where_PHW.any() or given.video_PHW3 is None:
        return record
    frames = np.asarray(given.where_PHW.any(axis=(1, 2)))
    edges = np.flatnonzero(np.diff(np.concatenate([[0], frames.astype(np.int8), [0]])))
    record["given"] = edges.reshape(-1, 2).tolist()
    video = given.video_PHW3.numpy()
    if len(video) == len(frames):
        video = video[frames]
    video = np.broadcast_to(video, (int(frames.sum()), *video.shape[1:]))
    record["source"] = f"{GIVEN}/{number:02d}_{c.type}.webp"
    write_video(out / record["source"], np.ascontiguousarray(video), 8, quality=100)
    if c.type == "spatial_crop":
        rows, columns = (np.flatnonzero(given.where_PHW.any(axis=(0, axis))) for axis in (2, 1))
        record["region"] = [int(n) for n in (rows[0], columns[0], rows[-1] + 1, columns[-1] + 1)]
    elif c.type == "mask":
        record["mask"] = f"{GIVEN}/{number:02d}_where.webp"  # its pixels are in NN_mask.webp
        white = np.repeat(given.where_PHW[..., None], 3, axis=3).astype(np.uint8) * 255
        write_video(out / record["mask"], white, 8, quality=100)
    return record
