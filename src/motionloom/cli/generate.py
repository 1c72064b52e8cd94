"""``motionloom generate``: prompts to clips."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from motionloom.cli.console import Out, new_folder
from motionloom.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from motionloom.generate import ClipRequest, Model

SOLVERS = ("euler", "heun", "dpmpp_2m", "ddim")
FORMATS = ("mp4", "webm", "webp", "gif", "png")


@dataclass(frozen=True)
class Wish:
    """What the command line asked for; None takes the recipe's value."""

    prompts: tuple[str, ...]
    steps: int | None
    guidance: float | None
    seed: int
    negative: str
    frames: int | None
    size: str | None
    first_frame: Path | None
    solver: str | None
    format: str


def parse_size(size: str | None) -> tuple[int | None, int | None]:
    """``"64"`` or ``"64x96"`` (height x width) -> (height, width)."""
    if size is None:
        return None, None
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", size)
    if match is None or int(match[1]) == 0:
        raise UserError(f"--size {size}: write one side or HEIGHTxWIDTH in pixels, for instance 64x96")
    return int(match[1]), int(match[2] or match[1])


def run(
    checkpoint: Path,
    wish: Wish,
    out: Path,
    raw: bool,
    device: str,
    as_json: bool,
    loras: Sequence[str] = (),
) -> None:
    """Generate, write one file per prompt and a sheet of all.

    Args:
        loras: files to add, each with ``:strength`` or without.
    """
    from motionloom.cli.assemble import open_model
    from motionloom.cli.lora import into_weights
    from motionloom.data.media import write_video
    from motionloom.data.sheets import contact_sheet
    from motionloom.generate import ClipRequest, generate_clips, recipe_sampling

    if wish.format not in FORMATS:
        raise UserError(f"--format {wish.format}: choose one of {', '.join(FORMATS)}")
    if wish.solver is not None and wish.solver not in SOLVERS:
        raise UserError(f"--solver {wish.solver}: choose one of {', '.join(SOLVERS)}")
    height, width = parse_size(wish.size)
    console = Out(as_json)
    model = open_model(checkpoint, raw=raw, device=device, tell=console.note)
    into_weights(model, loras)
    new_folder(out)
    sampling = recipe_sampling(model.recipe, steps=wish.steps, guidance=wish.guidance, solver=wish.solver)
    request = ClipRequest(
        wish.prompts,
        wish.frames,
        height,
        width,
        negative=wish.negative,
        first_frames=_first_frames(model, wish, height, width),
        seed=wish.seed,
    )
    if line := _larger_than_trained(model, request):
        console.note(line)
    with console.progress("solver steps, all clips") as advance:
        clips = [clip.numpy() for clip in generate_clips(model, request, sampling, progress=advance)]
    files = [out / f"{i:03d}_{slug(prompt)}.{wish.format}" for i, prompt in enumerate(wish.prompts)]
    for clip, file in zip(clips, files, strict=True):
        write_video(file, clip, model.fps)
    sheet = contact_sheet(clips, wish.prompts, out / "sheet.png")
    console.result(
        {"clips": [str(file) for file in files], "sheet": str(sheet), "seed": wish.seed},
        [*map(str, files), str(sheet)],
    )


def _larger_than_trained(model: Model, request: ClipRequest) -> str:
    """What a size beyond the trained one means, for whoever did not mean it; empty if it is none."""
    usual_frames, usual_height, usual_width = usual = model.clip_shape
    frames = request.frames or usual_frames
    size = frames, request.height or usual_height, request.width or usual_width
    tokens, trained = (math.prod(model.latent_grid(*s)) // math.prod(model.patch) for s in (size, usual))
    if tokens <= trained:
        return ""
    return (
        f"{size[2]}x{size[1]}x{size[0]} is {tokens:,} tokens a clip; this model was trained at "
        f"{usual_width}x{usual_height}x{usual_frames}, {trained:,} tokens: it takes longer by more than "
        f"{tokens / trained:.0f} times, and may look worse"
    )


def slug(prompt: str) -> str:
    """A prompt as a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_")[:48] or "empty"


def _first_frames(model: Model, wish: Wish, height: int | None, width: int | None) -> Tensor | None:
    """The start of the given image or clip, once per prompt: the pixels of the first token frame."""
    import torch

    from motionloom.data.media import read_clip

    if wish.first_frame is None:
        return None
    needed = model.tokenizer.spec.pixel_frames(model.patch[0])
    _, usual_height, usual_width = model.clip_shape
    size = (height or usual_height, width or usual_width)
    clip = read_clip(wish.first_frame, size=size, background=model.recipe.preprocess.background)
    pixels = torch.from_numpy(clip.video_FHW3[:needed])
    if len(pixels) < needed:
        if len(pixels) != 1:
            raise UserError(
                f"{wish.first_frame}: {len(pixels)} frames, the model's start is {needed}: give more"
            )
        pixels = pixels.expand(needed, -1, -1, -1)
    return pixels[None].expand(len(wish.prompts), -1, -1, -1, -1).contiguous()
