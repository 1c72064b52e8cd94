"""YAML files written for mmdit (a video diffusion trainer): how their keys read here.

mmdit takes any key and ignores those it does not know, so its files hold keys that nothing ever read. What
means the same here passes; what is named or defaulted otherwise is translated; the rest is told, a line each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from motionloom.config.keys import keys, nearest, shown

# What mmdit does where a file is silent and our own default says otherwise.
_DEFAULTS: dict[str, Any] = {
    "experiment_name": "t2v_mmdit",
    "num_workers": 4,
    "tokenizer.latent_f": 16,
    "tokenizer.latent_d": 64,
    "tokenizer.latent_t": 1,
    "text_encoder.type": "hash",
    "text_encoder.dim": 512,
    "text_encoder.vocab_size": 65536,
    "text_encoder.trainable": False,
    "model.type": "factorized",
    "train.objective": "ddpm_eps",
    "train.batch_size": 1,
    "train.clip_grad_norm": None,
    "train.cfg_dropout_prob": 0.0,
    "ema.enabled": False,
    "ema.decay": 0.9999,
}
_TEXT_LENGTH = {"hash": 128, "hf": 77}  # text_encoder.max_length by text_encoder.type

_SAME = frozenset(
    f"{section}.{key}".lstrip(".")
    for section, names in {
        "": "experiment_name output_dir seed num_workers",
        "video": "width height fps num_frames frame_stride",
        "bucketing": "enabled buckets",
        "preprocess": "crop shift_fraction num_crops seed",
        "tokenizer": "latent_f latent_d",
        "text_encoder": "type dim vocab_size max_length trainable name_or_path",
        "model": "dim depth num_heads window_size mlp_ratio dropout",
        "diffusion": "num_timesteps schedule",
        "flow_matching": "path t_min t_max",
        "train": "objective precision batch_size grad_accum_steps lr weight_decay max_steps log_every_steps "
        "save_every_steps cfg_dropout_prob sample_every_steps sample_num_images sample_num_steps sample_eta "
        "sample_solver sample_cfg_scale sample_seed sample_prompts",
        "ema": "enabled decay update_every start_step use_for_sampling",
    }.items()
    for key in names.split()
)

# Keys that only mmdit has, and what becomes of them.
_GONE = {
    "bucketing.strategy": "not a choice, the closest aspect ratio is always taken",
    "tokenizer.name_or_path": "not loaded, it names a VTP checkpoint",
    "tokenizer.repo_path": "dropped, no foreign code is put on the import path",
    "tokenizer.latent_scale": "dropped, latents are normalised per channel",
    "text_encoder.freeze": "dropped, text models from Hugging Face are always frozen (in mmdit too)",
    "text_encoder.use_processor": "dropped, the tokenizer of the model is used",
    "text_encoder.trust_remote_code": "dropped, code from a model's folder is never run",
    "diffusion.prediction_type": "mmdit never read it; train.objective decides",
    "flow_matching.time_scale": "dropped, the backbone reads sigma in [0, 1]",
    "train.sample_save_denoise_debug": "dropped, the held-out loss by noise level takes its place",
    "train.sample_denoise_t": "dropped, the held-out loss by noise level takes its place",
}
_GONE_SECTIONS = {
    "tread": "tokens are not routed around blocks, every block sees all of them",
    "lora": "mmdit could not load a base to adapt; every weight is trained, see `lora` in the recipes guide",
}
_THEIR_LORA = ("lora.target_modules", "lora.train_lora_only")
"""What mmdit's section has and our own has not."""

_OBJECTIVES = {
    **dict.fromkeys(("ddpm", "ddpm_eps", "diffusion", "eps"), "ddpm_eps"),
    **dict.fromkeys(("flow", "flow_matching", "fm", "rectified_flow"), "flow"),
}
_ZERO_MEANS = {"train.sample_num_images": 4, "train.sample_num_steps": 50, "train.sample_cfg_scale": 5.0}
_PRECISIONS = {"bf16": "bf16", "fp16": "bf16", "fp32": "fp32", "no": "fp32", "none": "fp32"}


def from_mmdit(flat: Mapping[str, Any], label: str) -> tuple[dict[str, Any], list[str]] | None:
    """The values of a flattened mmdit file under our keys, and a note on all that did not simply pass.

    Args:
        flat: the file by dotted key (``keys.flatten``).
        label: its name, for the first note.

    Returns:
        None when the file was not written for mmdit. Values that are wrong in mmdit too pass as they are: the
        recipe refuses them by name. Features that were on and are not here lead the notes.
    """
    sign = _sign(flat)
    if sign is None:
        return None
    given = {key: value for key, value in flat.items() if value is not None}
    values = _DEFAULTS | {key: value for key, value in given.items() if key in _SAME}
    values.setdefault("text_encoder.max_length", _TEXT_LENGTH.get(str(values["text_encoder.type"])))
    missed = [name for name in _GONE_SECTIONS if _is_on(given, name)]
    notes = [
        *(f"{name}.enabled: NOT APPLIED: {_GONE_SECTIONS[name]}" for name in missed),
        f"{label}: read as a YAML for mmdit, because of {sign}; keys left out have mmdit's defaults",
        *_tokenizer(given, values),
        *_objective(given, values),
        *_precision(values),
        *_sampling(given, values),
        *_rest(given, values),
        *_dropped(flat),
    ]
    return values, notes


def _sign(flat: Mapping[str, Any]) -> str | None:
    """What shows that mmdit is meant; a key that only MotionLoom has says that it is not."""
    ours = {key for key in set(keys()) - _SAME - set(_GONE) if key.partition(".")[0] not in _GONE_SECTIONS}
    if (ours - {"tokenizer.type"}) & set(flat):
        return None
    for key in flat:
        if key not in keys() and (key.startswith("tread.") or key in _GONE or key in _THEIR_LORA):
            return key
    aliases = {
        "tokenizer.type": {"vtp", "dummy"},
        "train.objective": set(_OBJECTIVES) - set(_OBJECTIVES.values()),
        "train.precision": set(_PRECISIONS) - set(_PRECISIONS.values()),
    }
    named = {key: str(flat[key]).lower() for key in aliases if flat.get(key) is not None}
    return next((f"{key} {name}" for key, name in named.items() if name in aliases[key]), None)


def _is_on(given: Mapping[str, Any], section: str) -> bool:
    # mmdit's reader follows YAML 1.1, where these words are true as well.
    return str(given.get(f"{section}.enabled")).lower() in ("true", "yes", "on", "1")


def _tokenizer(given: Mapping[str, Any], values: dict[str, Any]) -> Iterator[str]:
    size = f"latent_f {values['tokenizer.latent_f']} and latent_d {values['tokenizer.latent_d']}"
    named = given.get("tokenizer.type", "vtp")
    yield (
        f"tokenizer.type: {named} is not here; a patch tokenizer of the same {size} takes its place, fitted "
        f"while caching (caches made by mmdit are not read)"
    )


def _objective(given: Mapping[str, Any], values: dict[str, Any]) -> Iterator[str]:
    written = values["train.objective"]
    objective = values["train.objective"] = _OBJECTIVES.get(str(written).lower(), written)
    if objective != written:
        yield f"train.objective: {written} is called {objective} here"
    if objective == "flow":
        if values.pop("train.sample_eta", 0):
            yield "train.sample_eta: dropped, mmdit reads it for ddpm objectives only"
        return
    values["model.prediction"] = "noise"
    values["train.sample_solver"] = "ddim"
    if "train.sample_solver" in given:
        yield "train.sample_solver: ddim, which mmdit always takes for ddpm objectives"
    flow_keys = [key for key in values if key.startswith("flow_matching.")]
    for key in flow_keys:
        del values[key]
        yield f"{key}: dropped, mmdit reads it for train.objective flow only"


def _precision(values: dict[str, Any]) -> Iterator[str]:
    written = values.get("train.precision", "bf16")
    values["train.precision"] = _PRECISIONS.get(str(written).lower(), written)
    if str(written).lower() == "fp16":
        yield "train.precision: bf16 instead of fp16, which needs loss scaling (mmdit had none)"


def _sampling(given: Mapping[str, Any], values: dict[str, Any]) -> Iterator[str]:
    for key, default in _ZERO_MEANS.items():
        if given.get(key) == 0:
            values[key] = default
            yield f"{key}: {default}, which 0 means in mmdit"
    scale = values.get("train.sample_cfg_scale")
    if isinstance(scale, (int, float)) and 0 < scale < 1:
        values["train.sample_cfg_scale"] = 1.0
        yield f"train.sample_cfg_scale: 1.0 (no guidance) for {scale}, since mmdit guides above 1 only"


def _rest(given: Mapping[str, Any], values: dict[str, Any]) -> Iterator[str]:
    if "video.fps" in given:
        yield "video.fps: mmdit never read it; here clips are brought to this rate"
    if str(given.get("text_encoder.trainable")).lower() == "true":
        yield "text_encoder.trainable: had no effect in mmdit; here the table is trained"
    if _is_on(given, "bucketing") and not given.get("bucketing.buckets"):
        values["bucketing.buckets"] = [[given.get("video.width", 256), given.get("video.height", 256)]]
        yield "bucketing.buckets: one bucket of the video's size, as in mmdit"
    if _is_on(given, "ema"):
        yield "ema.decay: reached after a warm-up (mmdit had none)"
    yield "train.heldout_fraction: a part of the cache is held out of training (mmdit trained on all)"


def _dropped(flat: Mapping[str, Any]) -> Iterator[str]:
    for section, what in _GONE_SECTIONS.items():
        if inside := [key for key in flat if key.partition(".")[0] == section]:
            yield f"{', '.join(inside)}: dropped, {what}"
    for key, value in flat.items():
        if key in _GONE:
            yield f"{key} {shown(value)}: {_GONE[key]}"
        elif key not in _SAME | {"tokenizer.type"} and key.partition(".")[0] not in _GONE_SECTIONS:
            meant = nearest(key)
            yield f"{key}: ignored, no key of mmdit either{f'; did you mean {meant}?' if meant else ''}"
