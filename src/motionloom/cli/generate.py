"""``motionloom generate``: prompts, and whatever is given, to clips."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motionloom.cli.console import Out, new_folder
from motionloom.errors import UserError

if TYPE_CHECKING:
    from motionloom.generate import Model
    from motionloom.requests import Prepared


def run(
    checkpoint: Path,
    options: Mapping[str, Any],
    request: Path | None,
    out: Path,
    raw: bool,
    device: str,
    as_json: bool,
    loras: Sequence[str] = (),
    decoder: Path | None = None,
) -> None:
    """Generate: a file for every prompt, ``clips.json`` that says what each is, and a sheet of all.

    Args:
        options: the tree of a request, from the command line; it goes before the file.
        request: a file with one.
        loras: files to add, each with ``:strength`` or without.
        decoder: a tokenizer of the model's latents, to decode with.
    """
    from motionloom.cli.assemble import open_model
    from motionloom.cli.lora import into_weights
    from motionloom.config.request import parse_request, read_tree
    from motionloom.requests import prepare, written

    tree = joined(read_tree(request), options) if request is not None else options
    wish = parse_request(tree, "" if request is None else str(request))
    console = Out(as_json)
    model = open_model(checkpoint, raw=raw, device=device, decoder=decoder, tell=console.note)
    into_weights(model, loras)
    if (out / "clips.json").exists():
        raise UserError(f"{out}: holds clips already; name another folder, or delete it")
    new_folder(out)
    prepared = prepare(model, wish)
    for line in filter(None, (*prepared.notes, _larger_than_trained(model, prepared))):
        console.note(line)
    with console.progress("solver steps, all clips") as advance:
        clips = list(prepared.run(model, advance))
    names = written.titles(wish, prepared)
    files = [out / f"{i:03d}_{written.slug(name)}.{wish.format}" for i, name in enumerate(names)]
    fps = prepared.clips.fps or model.fps
    for clip, file in zip(clips, files, strict=True):
        written.write_clip(file, clip, fps)
    made_by = {"model": str(checkpoint), "raw": raw, "lora": list(loras)}
    if decoder is not None:
        made_by["decoder"] = str(decoder)
    written.describe(out, files, wish, prepared, fps, made_by)
    answer: dict[str, Any] = {"clips": [str(file) for file in files], "request": str(out / "clips.json")}
    lines = list(answer["clips"])
    if "video" in model.modalities:
        answer["sheet"] = str(written.write_sheet(out / "sheet.png", clips, names, prepared))
        lines.append(answer["sheet"])
    console.result({**answer, "seed": wish.seed}, lines)


def joined(file: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """A request file with what the command line says besides. Its conditions come to those of the file; one
    that a clip has once only takes the place of the file's, and so does all else."""
    from motionloom.config.request import ONCE

    more = dict(options)
    if isinstance(file.get("conditions"), list) and "conditions" in more:
        anew = {(one["type"], one.get("modality")) for one in more["conditions"] if one["type"] in ONCE}
        kept = [one for one in file["conditions"] if _kind(one) not in anew]
        more["conditions"] = [*kept, *more["conditions"]]
    for section in ("guidance", "extend", "memory"):
        if isinstance(file.get(section), dict) and isinstance(more.get(section), dict):
            more[section] = file[section] | more[section]
    if "prompt" in more or "prompts" in more:
        file = {key: value for key, value in file.items() if key not in ("prompt", "prompts")}
    return {**file, **more}


def _kind(condition: Any) -> tuple[Any, Any] | None:
    """What a condition of a file is; whatever is wrong with it is told where it is read."""
    if not isinstance(condition, Mapping):
        return None
    return condition.get("type"), condition.get("modality")


def _larger_than_trained(model: Model, prepared: Prepared) -> str:
    """What a size beyond the trained one means, for whoever did not mean it; empty if it is none."""
    if "video" not in model.modalities or prepared.in_rounds:
        return ""
    usual_frames, usual_height, usual_width = usual = model.clip_shape
    request = prepared.clips
    size = sum(prepared.shots), request.height or usual_height, request.width or usual_width
    patch = math.prod(model.patch)
    alone = prepared.shots if model.shots_alone(len(prepared.shots)) else size[:1]
    tokens = sum(math.prod(model.latent_grid(frames, *size[1:])) for frames in alone) // patch
    frames, *cells = model.latent_grid(*usual)
    stories = model.recipe.stories
    if model.recipe.of_shots:
        # A sample of several shots is as long as they are together, within the recipe's budget.
        frames = stories.max_latent_frames or frames * max(1, stories.shots or 1, stories.join[1])
    trained = frames * math.prod(cells) // patch
    if tokens <= trained:
        return ""
    return (
        f"{size[2]}x{size[1]}x{size[0]} is {tokens:,} tokens a clip; this model was trained at "
        f"{usual_width}x{usual_height}x{usual_frames}, {trained:,} tokens at most: it takes longer by more "
        f"than {tokens / trained:.0f} times, and may look worse"
    )


# Options


def request_tree(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the command line as the tree of a request; those that were not given are left out.

    Raises:
        UserError: an option that is written wrongly, or that lacks the one it goes with.
    """
    tree: dict[str, Any] = {}
    plain = ("negative", "frames", "size", "fps", "seed", "steps", "solver", "format", "prompts")
    tree |= {key: options[key] for key in plain if options.get(key) not in (None, [], ())}
    if len(tree.get("prompts", ())) == 1:
        (tree["prompt"],) = tree.pop("prompts")
    tree |= {"scenes": _scenes(options)} if options.get("scene") else {}
    tree |= {"conditions": found} if (found := _conditions(options)) else {}
    tree |= {"guidance": scales} if (scales := _scales(options)) else {}
    if options.get("extend"):
        tree["extend"] = {"frames": options["extend"]}
        tree["extend"] |= {"direction": "backwards"} if options.get("backwards") else {}
    elif options.get("backwards"):
        raise UserError("--backwards says which way to extend: say how far as well, for instance --extend 16")
    if options.get("memory"):
        policy, _, keep = options["memory"].partition(":")
        tree["memory"] = {"policy": policy} | ({"keep": _number("--memory", keep, int)} if keep else {})
    for option in ("scene_frames", "scene_source"):
        if options.get(option) and not options.get("scene"):
            raise UserError(f"--{option.replace('_', '-')} is of scenes: list them with --scene as well")
    return tree


def _scenes(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    scenes: list[dict[str, Any]] = [{"caption": caption} for caption in options["scene"]]
    lengths = list(options.get("scene_frames") or ())
    if len(lengths) not in (0, 1, len(scenes)):
        raise UserError(
            f"--scene-frames stands {len(lengths)} times for {len(scenes)} scenes: once for all, or once each"
        )
    for scene, frames in zip(scenes, lengths * (len(scenes) if len(lengths) == 1 else 1), strict=False):
        scene["frames"] = frames
    for text in options.get("scene_source") or ():
        number, path = _pair("--scene-source", text, "NUMBER=FILE, for instance 0=first.mp4")
        index = _number("--scene-source", number, int)
        if not 0 <= index < len(scenes):
            raise UserError(f"--scene-source {text}: there are {len(scenes)} scenes, which count from 0")
        if "source" in scenes[index]:
            raise UserError(f"--scene-source {text}: scene {index} has a source already: keep one")
        scenes[index] |= {"role": "given", "source": path}
    return scenes


def _conditions(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for option, kind in (("image", "first_frame"), ("last_image", "last_frame")):
        found += [{"type": kind, "source": str(path)} for path in options.get(option) or ()]
    for text in options.get("keyframe") or ():
        time, path = _pair("--keyframe", text, "SECONDS=FILE, for instance 1.5=dog.png")
        found.append({"type": "keyframes", "times": [_number("--keyframe", time, float)], "source": path})
    for kind in ("prefix", "suffix"):
        found += [_stretch(kind, text) for text in options.get(kind) or ()]
    found += _parts(options)
    found += [_of_file("reference", path) for path in options.get("reference") or ()]
    for modality in ("audio", "video"):
        paths = options.get(modality) or ()
        found += [{"type": "modality", "modality": modality, "source": str(path)} for path in paths]
    if options.get("strength") is not None:
        if not found:
            raise UserError("--strength is of what is given: give something, for instance --image FILE")
        found = [{**one, "strength": options["strength"]} for one in found]
    return found


def _parts(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Those of one film: ``--source``."""
    sources = list(options.get("source") or ())
    masks, crops = list(options.get("mask") or ()), list(options.get("crop") or ())
    if not masks and not crops:
        if sources:
            raise UserError("--source is the film of a --mask or a --crop: give one of them as well")
        return []
    if len(sources) != 1:
        few = "has no" if not sources else f"has {len(sources)} times"
        raise UserError(f"--{'mask' if masks else 'crop'} {few} --source: name one film that it is a part of")
    found = []
    for mask in masks:
        one = _of_file("mask", sources[0])
        stretch = re.fullmatch(r"([0-9.]+)-([0-9.]+)", mask)
        if stretch is None:
            found.append({**one, "mask": mask})
        else:
            found.append({**one, "made": [[_number("--mask", n, float) for n in stretch.groups()]]})
    for crop in crops:
        region = [_number("--crop", n, int) for n in crop.split(",")]
        found.append({"type": "spatial_crop", "region": region, "source": str(sources[0])})
    return found


def _stretch(kind: str, text: str) -> dict[str, Any]:
    """``FILE[:FRAMES]``."""
    path, colon, frames = text.rpartition(":")
    if not colon or not frames.lstrip("-").isdecimal():
        return _of_file(kind, text)
    return {**_of_file(kind, path), "frames": int(frames)}


def _of_file(kind: str, path: Any) -> dict[str, Any]:
    """A condition on what a file holds: a file of sound alone gives sound."""
    from motionloom.data.media import is_sound

    sound = {"modality": "audio"} if is_sound(Path(path)) else {}
    return {"type": kind, **sound, "source": str(path)}


def _scales(options: Mapping[str, Any]) -> dict[str, Any]:
    scales: dict[str, Any] = {}
    for option, key in (("guidance", "text"), ("cross_guidance", "cross")):
        if options.get(option) is not None:
            scales[key] = options[option]
    if options.get("skip_guidance"):
        scale, colon, blocks = options["skip_guidance"].partition(":")
        scales["skip"] = _number("--skip-guidance", scale, float)
        if colon:
            scales["skip_blocks"] = [_number("--skip-guidance", block, int) for block in blocks.split(",")]
    for text in options.get("condition_guidance") or ():
        name, scale = _pair("--condition-guidance", text, "CONDITION=SCALE, for instance reference=2")
        scales.setdefault("conditions", {})[name] = _number("--condition-guidance", scale, float)
    return scales


def _pair(option: str, text: str, form: str) -> tuple[str, str]:
    left, equals, right = text.partition("=")
    if not (left and equals and right):
        raise UserError(f"{option} {text}: write {form}")
    return left, right


def _number(option: str, text: str, kind: type[int] | type[float]) -> Any:
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"{option}: {text or 'nothing'} is not {what}: write one") from None
