"""What of a recipe does not fit together, each with its mend: checks over several keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from motionloom.config.given_misfits import given_misfits
from motionloom.config.recipe import (
    OWN_SIZES,
    AudioConfig,
    ModelConfig,
    Recipe,
    TextEncoderConfig,
    TokenizerConfig,
)
from motionloom.config.request import request_problem
from motionloom.config.vtp_misfits import vtp_cautions, vtp_misfits


class ReadText(NamedTuple):
    """The captions that the published weights of a family were trained on."""

    keys: dict[str, str]
    """Of ``text_encoder``."""
    max_lengths: tuple[int, ...]
    """The first is the one to write."""


READ_TEXT = {
    "wan": ReadText({"type": "hf", "padding": "zero"}, (512,)),
    # The authors' own code gives 1.5 two tokens fewer.
    "cogvideox": ReadText({"type": "hf", "padding": "attended"}, (226, 224)),
    "ltx2": ReadText({"type": "ltx2"}, (1024,)),
}
"""By ``model.type``."""


def misfits(r: Recipe) -> Iterator[str]:
    """Cross-field problems, each with its mend."""
    yield from _imported_misfits(r) if r.model.imported else _own_misfits(r.model)
    yield from _lightning_misfits(r)
    yield from _lora_misfits(r)
    yield from _text_misfits(r.text_encoder)
    yield from _read_text_misfits(r)
    if r.bucketing.enabled and not r.bucketing.buckets:
        yield "bucketing.enabled is true but bucketing.buckets is empty: list [width, height] pairs"
    if r.train.sample_cfg_interval[0] >= r.train.sample_cfg_interval[1]:
        yield "train.sample_cfg_interval must be [low, high] with low < high"
    yield from _guidance_misfits(r)
    yield from _student_misfits(r)
    yield from _chunk_misfits(r)
    if r.flow_matching.direction > 0 and (r.train.objective, r.train.method) != ("flow", "denoise"):
        yield (
            f"flow_matching.direction is for train.objective flow and train.method denoise, not "
            f"{r.train.objective} and {r.train.method}: leave it out"
        )
    if r.train.rest_lr is not None and r.train.optimizer != "muon":
        yield "train.rest_lr is for train.optimizer muon, which leaves a rest: leave it out, or take muon"
    if r.train.objective != "flow" and r.flow_matching.path != "linear":
        yield "flow_matching.path cosine needs train.objective flow: use path linear or objective flow"
    if r.diffusion.beta_start > r.diffusion.beta_end:
        yield (
            f"diffusion.beta_start {r.diffusion.beta_start} is above diffusion.beta_end "
            f"{r.diffusion.beta_end}: lower it"
        )
    if r.train.schedule != "constant" and r.train.warmup_steps >= r.train.max_steps:
        yield (
            f"train.warmup_steps {r.train.warmup_steps} leaves none of train.max_steps {r.train.max_steps} "
            f"for the {r.train.schedule} schedule: use fewer"
        )
    most = r.tokenizer.latent_f**2 * 3 * (1 if r.tokenizer.first_alone else r.tokenizer.latent_t)
    if r.tokenizer.type == "patch" and r.tokenizer.latent_d > most:
        yield f"tokenizer.latent_d {r.tokenizer.latent_d} is more than a patch has values: use at most {most}"
    yield from _vae_misfits(r.tokenizer)
    yield from vtp_misfits(r)
    if r.audio.enabled:
        yield from _audio_misfits(r.audio)
    yield from _size_misfits(r)
    yield from _length_misfits(r)
    yield from _reference_misfits(r)
    yield from _condition_misfits(r)
    yield from given_misfits(r)
    yield from _story_misfits(r)
    for i, request in enumerate(r.train.sample_requests):
        if isinstance(request, dict) and (problem := request_problem(request)):
            yield f"train.sample_requests[{i}]: {problem}"


def _guidance_misfits(r: Recipe) -> Iterator[str]:
    """Directions that are not there, and noise levels that are none."""
    more = r.guidance
    conditions = {f"conditions ({one.condition})": one.interval for one in more.conditions}
    intervals = {"skip_interval": more.skip_interval, "cross_interval": more.cross_interval, **conditions}
    for name, (low, high) in intervals.items():
        if low >= high:
            yield f"guidance.{name}: an interval must be [low, high] with low < high"
    if (more.skip_scale or more.audio_skip_scale) and not more.skip_blocks:
        yield "guidance.skip_scale leaves out self-attention in no block: list guidance.skip_blocks, from 0"
    if len({one.condition for one in more.conditions}) < len(more.conditions):
        yield "guidance.conditions names a condition twice: keep one scale for each"


def _student_misfits(r: Recipe) -> Iterator[str]:
    """What a student cannot be taught, and keys of one method that another does not read."""
    method, d = r.train.method, r.distil
    if method == "denoise" or r.trains_tokenizer:
        return
    if method != "ode" and not d.teacher:
        yield f"train.method {method} learns from a teacher: name a run or a checkpoint in distil.teacher"
    if r.train.objective != "flow":
        yield f"train.method {method} needs train.objective flow, not {r.train.objective}: leave that out"
    if r.model.dropout > 0:
        yield f"train.method {method} takes every step as it will be played: set model.dropout to 0"
    if any(0 < condition.strength < 1 for condition in r.plan.conditions):
        yield (
            f"train.method {method} draws fresh noise between its steps, which hints do not go with: use "
            "plan.conditions of strength 1"
        )
    rolls = method == "matching" and d.source == "rollout"
    if method != "matching" and d.loss != "dmd":
        yield f"distil.loss {d.loss} is for train.method matching, not {method}: leave it out"
    if d.longest is not None and not (rolls and r.plan.type == "chunks"):
        yield (
            "distil.longest is for roll-outs of chunks (train.method matching, distil.source rollout, "
            "plan.type chunks): leave it out"
        )
    if d.write_through and d.context_noise > 0:
        yield "distil.write_through remembers the last step's level: set distil.context_noise to 0"
    if d.switch > 0 and d.longest is None:
        yield "distil.switch changes the words before a roll-out's scored end: set distil.longest"
    if d.switch > 0 and r.train.batch_size < 2:
        yield "distil.switch takes other words from the batch: set train.batch_size to 2 or more"
    if d.switch > 0 and r.of_shots:
        yield "distil.switch is for clips of one scene, and stories have several: leave one of them out"
    if d.critic == "lora" and d.critic_from:
        yield "distil.critic lora is the teacher with adapters: leave distil.critic_from out"
    if d.critic == "lora" and d.loss == "gan":
        yield "distil.loss gan trains its critic's blocks as the judge's trunk: use distil.critic full"


def _chunk_misfits(r: Recipe) -> Iterator[str]:
    """Scenes that chunks cannot tell apart."""
    if r.plan.type == "chunks" and r.plan.positions == "reset":
        yield (
            "plan.positions reset sets scenes at one time, and chunks know their past by its time: use "
            "continuous, jump or gap"
        )


def _text_misfits(text: TextEncoderConfig) -> Iterator[str]:
    """Keys of one text encoder that another does not read, and what it cannot do without."""
    if text.type == "classes":
        yield from _class_misfits(text)
    elif text.classes:
        yield f"text_encoder.classes are for text_encoder.type classes, not {text.type}: leave them out"
    if text.type in ("hf", "ltx2") and not text.name_or_path:
        yield (
            f"text_encoder.name_or_path is empty but text_encoder.type is {text.type}: give a folder or hub "
            "name"
        )
    if text.type != "hf" and text.padding != "hidden":
        yield f"text_encoder.padding {text.padding} is for text_encoder.type hf, not {text.type}: drop it"
    if text.type != "ltx2" and text.connectors:
        yield f"text_encoder.connectors are for text_encoder.type ltx2, not {text.type}: leave them out"


def _class_misfits(text: TextEncoderConfig) -> Iterator[str]:
    """Classes that cannot be told apart."""
    if not text.classes:
        yield "text_encoder.type classes knows no classes yet: list text_encoder.classes"
    if "" in text.classes:
        yield "text_encoder.classes holds the empty caption, which is no class: leave it out"
    if twice := [name for i, name in enumerate(text.classes) if name in text.classes[:i]]:
        yield f"text_encoder.classes names {twice[0]} twice: keep one"


def _reads_captions(r: Recipe) -> ReadText | None:
    """What published weights should be given; None where nothing was published, or a new table of words takes
    the place of the encoder that they were trained with."""
    published = r.model.imported and r.model.name_or_path and r.text_encoder.type != "hash"
    return READ_TEXT.get(r.model.type) if published else None


def _read_text_misfits(r: Recipe) -> Iterator[str]:
    """Captions not given to published weights as in their training: clips get worse, and nothing says so."""
    if (read := _reads_captions(r)) is None:
        return
    given = {key: getattr(r.text_encoder, key) for key in read.keys}
    if wrong := {key: value for key, value in read.keys.items() if given[key] != value}:
        has, needs = (
            " and ".join(f"text_encoder.{key}{sep}{values[key]}" for key in wrong)
            for sep, values in ((" ", given), (": ", read.keys))
        )
        yield f"{has} is not how the weights of {r.model.type} were trained to read captions: write {needs}"


def cautions(r: Recipe) -> Iterator[str]:
    """What fits together and is seldom meant."""
    read = _reads_captions(r)
    if read is not None and r.text_encoder.max_length not in read.max_lengths:
        yield (
            f"text_encoder.max_length is {r.text_encoder.max_length}, and the weights of {r.model.type} were "
            f"trained with {read.max_lengths[0]} tokens of a caption: write text_encoder.max_length: "
            f"{read.max_lengths[0]} unless you mean it"
        )
    yield from vtp_cautions(r)


def _own_misfits(model: ModelConfig) -> Iterator[str]:
    """Sizes of the own backbones, and keys that only the others have."""
    if model.dim % (2 * model.num_heads):
        # Rotary positions turn pairs of channels, so every head needs an even number of them.
        fitting = [h for h in range(1, model.num_heads) if model.dim % (2 * h) == 0]
        yield (
            f"model.dim {model.dim} does not divide into model.num_heads {model.num_heads} heads of an "
            f"even width: use {f'num_heads {fitting[-1]}' if fitting else 'an even dim'}"
        )
    if model.audio_dim and model.type != "joint":
        yield (
            f"model.audio_dim is for joint, {model.type} has no sound: set model.type: joint, or leave it out"
        )
    if model.audio_dim % (2 * model.num_heads):
        step = 2 * model.num_heads
        yield (
            f"model.audio_dim {model.audio_dim} does not divide into model.num_heads {model.num_heads} heads "
            f"of an even width: use {neighbours(model.audio_dim, step)}"
        )
    if model.preset:
        yield (
            f"model.preset {model.preset} names sizes of wan, cogvideox, ltx2 or lightning, but model.type "
            f"is {model.type}: set model.type, or leave the preset out"
        )
    if model.name_or_path:
        yield (
            f"model.name_or_path is for wan, cogvideox, ltx2 and lightning, but model.type is {model.type}: "
            f"set model.type, or start from a checkpoint of your own with train.init_from"
        )


def _lightning_misfits(r: Recipe) -> Iterator[str]:
    """What only lightning reads, and a table of classes without classes."""
    model = r.model
    if model.type != "lightning":
        if model.condition != "text":
            yield f"model.condition {model.condition} is for lightning, not {model.type}: leave it out"
        if model.qk_norm:
            yield f"model.qk_norm is for lightning, and {model.type} needs no such key: leave it out"
    elif model.condition == "class" and r.text_encoder.type != "classes":
        yield (
            f"model.condition class wants classes, and text_encoder.type {r.text_encoder.type} gives words: "
            "set text_encoder.type: classes, or model.condition: text"
        )


def _imported_misfits(r: Recipe) -> Iterator[str]:
    """Keys that a backbone with published sizes does not have."""
    model = r.model
    if changed := [key for key in OWN_SIZES if key in model.model_fields_set]:
        yield (
            f"{', '.join(f'model.{key}' for key in changed)} cannot be chosen for model.type {model.type}, "
            f"whose sizes come from model.preset or model.name_or_path: leave "
            f"{'it' if len(changed) == 1 else 'them'} out"
        )
    if not model.preset and not model.name_or_path:
        yield (
            f"model.type {model.type} has no sizes yet: set model.preset (tiny, for instance), or "
            f"model.name_or_path to a folder or file of weights"
        )
    if model.type == "cogvideox" and r.train.objective != "ddpm_v":
        yield (
            f"train.objective is {r.train.objective}, but cogvideox knows only the noise levels that it was "
            f"trained on: set train.objective to ddpm_v"
        )
    if model.type != "cogvideox" and model.name_or_path and r.train.objective != "flow":
        yield (
            f"train.objective is {r.train.objective}, but the weights of {model.type} were trained by flow "
            "matching: set train.objective to flow"
        )
    if r.flow_matching.path != "linear":
        yield f"flow_matching.path {r.flow_matching.path} is not {model.type}'s: leave it linear"
    if model.prediction != "velocity":
        yield (
            f"model.prediction {model.prediction} is for the own backbones, {model.type} answers with a "
            f"velocity: leave it out"
        )


def _lora_misfits(r: Recipe) -> Iterator[str]:
    """Adapters that would have nothing to stand on, and keys that would say nothing."""
    if not r.lora.enabled:
        for key in ("base", "init_from", "parts"):
            if getattr(r.lora, key):
                yield f"lora.{key} is set but lora.enabled is false: set that to true, or leave it out"
        return
    if r.train.parts:
        yield "train.parts is for training without LoRA: name them in lora.parts, beside the adapters"
    if r.train.init_from and r.lora.init_from:
        yield "train.init_from and lora.init_from both say where adapters start: keep one"
    if not (r.model.name_or_path or r.lora.base):
        yield "lora.enabled is true but there is no base: set model.name_or_path or lora.base"
    if r.lora.base and r.model.imported:
        yield (
            f"lora.base is for factorized and joint, not {r.model.type}: name the checkpoint in "
            "model.name_or_path"
        )
    if not r.lora.targets:
        yield "lora.enabled is true but lora.targets is empty: name modules, such as [to_q, to_v]"
    if r.lora.dropout > 0 and r.model.checkpoint_blocks:
        yield (
            "lora.dropout would differ where blocks are recomputed: set it to 0, or "
            "model.checkpoint_blocks to false"
        )


def _audio_misfits(audio: AudioConfig) -> Iterator[str]:
    """Latents of sound hold whole numbers of samples, which the spectrograms divide."""
    if audio.type != "spectral":
        if not audio.name_or_path:
            yield (
                f"audio.type {audio.type} is not fitted: set audio.name_or_path to a folder with audio_vae/ "
                "and vocoder/"
            )
        return
    if audio.sample_rate < 4000:
        yield (
            f"audio.sample_rate {audio.sample_rate} holds no pitch above {audio.sample_rate // 2} Hz, and "
            "spectral listens above 1500 too: set it to 4000 or more"
        )
    samples, parts = audio.sample_rate / audio.latents_per_second, 8
    if samples % parts:
        near = max(1, round(samples / parts)) * parts
        yield (
            f"audio.sample_rate {audio.sample_rate} gives {samples:g} samples to a latent, not a multiple of "
            f"{parts}: set audio.sample_rate to {audio.latents_per_second * near:g}, or another "
            f"audio.latents_per_second"
        )


def _vae_misfits(tokenizer: TokenizerConfig) -> Iterator[str]:
    """A trained tokenizer is loaded, not fitted, and its shape rule is given."""
    if tokenizer.type == "patch":
        return
    if tokenizer.type == "pixels":
        yield from _pixels_misfits(tokenizer)
        return
    if not tokenizer.name_or_path:
        what = "VTP model" if tokenizer.type == "vtp" else "diffusers VAE"
        yield (
            f"tokenizer.type {tokenizer.type} is not fitted: set tokenizer.name_or_path to a folder with a "
            f"{what}"
        )
    if tokenizer.type == "vtp":
        yield from _vtp_misfits(tokenizer)
        return
    if not tokenizer.first_alone:
        yield (
            f"tokenizer.type {tokenizer.type} encodes the first frame alone: set tokenizer.first_alone to "
            f"true"
        )
    if tokenizer.tile:
        for key in ("tile", "tile_overlap"):
            if pixels := getattr(tokenizer, key) % tokenizer.latent_f:
                yield (
                    f"tokenizer.{key} {getattr(tokenizer, key)} does not divide by tokenizer.latent_f "
                    f"{tokenizer.latent_f}: take off {pixels}"
                )
        if tokenizer.tile_overlap >= tokenizer.tile:
            yield (
                f"tokenizer.tile_overlap {tokenizer.tile_overlap} leaves nothing of tokenizer.tile "
                f"{tokenizer.tile}: use less"
            )


def _pixels_misfits(tokenizer: TokenizerConfig) -> Iterator[str]:
    """Pixels as they are: a cell is a pixel of a frame."""
    for key, value in (("latent_f", 1), ("latent_t", 1), ("latent_d", 3)):
        if getattr(tokenizer, key) != value:
            yield f"tokenizer.type pixels has tokenizer.{key} {value}, not {getattr(tokenizer, key)}: set it"


def _vtp_misfits(tokenizer: TokenizerConfig) -> Iterator[str]:
    """The first frame stands alone where frames are put together."""
    if tokenizer.first_alone != (tokenizer.latent_t > 1):
        yield (
            f"tokenizer.type vtp with tokenizer.latent_t {tokenizer.latent_t} has tokenizer.first_alone "
            f"{str(tokenizer.latent_t > 1).lower()}: set it"
        )
    if tokenizer.tile:
        yield "tokenizer.tile is not for tokenizer.type vtp, whose blocks see whole frames: set it to 0"


def _size_misfits(r: Recipe) -> Iterator[str]:
    """Widths and heights that do not divide into tokens."""
    _, rows, columns = r.model.patch
    steps = (r.tokenizer.latent_f * columns, r.tokenizer.latent_f * rows)
    sizes = r.bucketing.buckets if r.bucketing.enabled else ((r.video.width, r.video.height),)
    where = "a bucket's {} in bucketing.buckets:" if r.bucketing.enabled else "video.{}"
    for size in sizes:
        for name, pixels, step in zip(("width", "height"), size, steps, strict=True):
            if pixels % step:
                yield (
                    f"{where.format(name)} {pixels} does not divide by {step} "
                    f"(tokenizer.latent_f x model.patch): use {neighbours(pixels, step)}"
                )


def _length_misfits(r: Recipe) -> Iterator[str]:
    """Numbers of frames that do not divide into latent frames and tokens."""
    several = r.bucketing.enabled and r.bucketing.frames
    lengths = r.bucketing.frames if several else (r.video.num_frames,)
    where = "bucketing.frames:" if several else "video.num_frames"
    head, step = int(r.tokenizer.first_alone), r.tokenizer.latent_t
    use = frame_rule(step, r.tokenizer.first_alone, r.model.patch[0])
    for frames in lengths:
        if (frames - head) % step:
            yield (
                f"{where} {frames} is not {'1 + ' if head else ''}a multiple of tokenizer.latent_t {step}: "
                f"use {neighbours(frames, *use)}"
            )
        elif (head + (frames - head) // step) % r.model.patch[0]:
            yield (
                f"{where} {frames} gives {head + (frames - head) // step} latent frames, which do not "
                f"divide by model.patch[0] {r.model.patch[0]}: use {neighbours(frames, *use)}"
            )


def _condition_misfits(r: Recipe) -> Iterator[str]:
    """Conditions on what the data has not, which would never be drawn."""
    held = r.plan.modalities
    if "audio" in held and not r.audio.enabled:
        yield "plan.modalities has audio but audio.enabled is false: set audio.enabled to true as well"
    if r.plan.choose == "one" and sum(one.probability for one in r.plan.conditions) > 1 + 1e-6:
        yield "plan.conditions: with choose one their probabilities are shares, and sum up to at most 1"
    beside = [one.modality for one in r.plan.conditions if one.type == "reference"]
    if len(set(beside)) < len(beside):
        yield "plan.conditions has two references of one modality, and the data one per clip: keep one"
    for one in r.plan.conditions:
        if one.modality not in ("all", *held):
            yield (
                f"plan.conditions: {one.type} is of {one.modality}, which plan.modalities {list(held)} has "
                "not: add it there, or leave the condition out"
            )
        if one.type == "mask" and one.masks == "data" and not r.masks.enabled:
            yield "plan.conditions: a mask of the data, but masks.enabled is false: set it, or masks: drawn"
        if one.type == "reference" and not r.references.enabled:
            yield "plan.conditions has a reference, but references.enabled is false: set it to true"
        if one.type == "reference" and one.modality == "audio" and not r.references.audio:
            yield "plan.conditions has a reference of audio, but references.audio is false: set it to true"


def _reference_misfits(r: Recipe) -> Iterator[str]:
    """References that the tokenizer cannot make, or whose sound has nothing to make it."""
    if not r.references.enabled:
        return
    if r.references.audio and not r.audio.enabled:
        yield "references.audio is true but audio.enabled is false: set audio.enabled to true as well"
    down, (_, rows, columns) = r.references.downscale, r.model.patch
    sizes = r.bucketing.buckets if r.bucketing.enabled else ((r.video.width, r.video.height),)
    for size in sizes:
        for name, pixels, cells in zip(("width", "height"), size, (columns, rows), strict=True):
            if pixels % (step := r.tokenizer.latent_f * cells * down):
                yield (
                    f"references.downscale {down}: a {name} of {pixels} does not divide by {step} "
                    f"(tokenizer.latent_f x model.patch x downscale): use {neighbours(pixels, step)}, or a "
                    "smaller downscale"
                )


def _story_misfits(r: Recipe) -> Iterator[str]:
    """Ways of putting shots together that leave no place for something else, or say nothing."""
    stories, (least, most) = r.stories, r.stories.join
    asked = {
        "shots": stories.shots is not None,
        "join": most > 0,
        "global_caption": stories.global_caption,
        "frames": stories.frames is not None,
    }
    if not r.of_shots and (keys := [key for key, given in asked.items() if given]):
        yield f"stories.{keys[0]} is for plan.type scenes, not {r.plan.type}: set the type, or leave it out"
    if most and not 1 <= least <= most:
        yield f"stories.join {[least, most]} is not [least, most] with 1 or more in each: use [1, {most}]"
    if stories.frames is not None:
        step, rest = frame_rule(r.tokenizer.latent_t, r.tokenizer.first_alone, r.model.patch[0])
        if (stories.frames - rest) % step or stories.frames < step + rest:
            yield (
                f"stories.frames {stories.frames} does not fill tokens of {step} frames"
                f"{' after a first frame alone' if rest else ''}: use "
                f"{neighbours(stories.frames, step, rest)}"
            )
    parts = {"join": most > 0, "shots": stories.shots, "max_latent_frames": stories.max_latent_frames}
    if r.references.enabled and (keys := [key for key, given in parts.items() if given]):
        yield (
            f"stories.{keys[0]} leaves no place for the reference of a whole clip: leave it out, or "
            "references"
        )


def frame_rule(temporal: int, first_alone: bool, patch: int) -> tuple[int, int]:
    """(step, rest): pixel frames that fill latent frames, and these tokens of ``patch``, are rest + k x step.

    Args:
        temporal: pixel frames of a latent frame; with ``first_alone`` the first frame is one by itself.
    """
    # That frame is as good as a whole group.
    return temporal * patch, 1 - temporal if first_alone else 0


def neighbours(value: int, step: int, rest: int = 0) -> str:
    """The two values next to ``value`` of the form rest + k x step, without those below 1."""
    below = (value - rest) // step * step + rest
    return f"{below} or {below + step}" if below > 0 else f"{below + step}"
