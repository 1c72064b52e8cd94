"""YAML files written for CausVid or Self-Forcing (few-step students of Wan): how their keys read here.

Both read a flat file, and whatever it does not say stands in their code: a Wan of 30 blocks, its VAE, 16
frames a second, a scheduler of 1000 levels. What means the same here passes under our name, the rest of
what those programs do is filled in, and everything that has no place is told, a line each. Their files name
no data and no end: both are given here on top.

Levels: their t is 1000 sigma. A list of steps is u x 1000 if it is ``warped``, sigma = s u / (1 + (s - 1) u)
with the scheduler's shift s, and else t itself, of which their scheduler takes its nearest level.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from shlex import quote
from typing import Any

from motionloom.config.causvid_keys import (
    CAUSVID,
    CAUSVID_DEFAULTS,
    FIXED,
    FLAGS,
    GAN_PASSED,
    GONE,
    NETWORKS,
    PASSED,
    SECRET,
    SELF_FORCING,
    SELF_FORCING_DEFAULTS,
    SIGNS,
    TRAINING,
    WAN,
    WAN_NEGATIVE,
    Network,
)
from motionloom.config.keys import keys, shown
from motionloom.errors import UserError

_GRID = 1000  # levels of both schedulers; a list of steps counts in them
_TEACHER_STEPS = 48  # of a teacher's walk at least; theirs has 48 or 50


class _Given(dict[str, Any]):
    """Values that know which of them were asked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)


@dataclass
class _File:
    """A file while it is read."""

    label: str
    house: str
    """CausVid or Self-Forcing."""
    said: Mapping[str, Any]
    """What it says."""
    given: _Given
    """And what holds where it is silent."""
    values: dict[str, Any]
    """Under our keys."""
    missed: list[str] = field(default_factory=list)
    """What it asks for and is not here."""
    notes: list[str] = field(default_factory=list)

    def refuse(self, key: str, problem: str) -> UserError:
        """An error about a value of the file."""
        return UserError(f"{self.label}: {key} is {shown(self.given.get(key))}; {problem}")

    def miss(self, key: str, here: str) -> None:
        """Note what is not done."""
        self.missed.append(f"{key}: NOT APPLIED: {shown(self.given.get(key))}; here {here}")

    def whole(self, key: str, default: int, least: int = 0) -> int:
        """A whole number. Raises UserError for anything else."""
        value = self.given.get(key, default)
        if not _is_number(value) or value != int(value) or value < least:
            raise self.refuse(key, f"expected a whole number of at least {least}")
        return int(value)

    def number(self, key: str, default: float) -> float:
        """A number. Raises UserError for anything else."""
        value = self.given.get(key, default)
        if not _is_number(value):
            raise self.refuse(key, "expected a number")
        return float(value)


def from_causvid(
    flat: Mapping[str, Any], label: str, beside: Callable[[], Mapping[str, Any]] = dict
) -> tuple[dict[str, Any], list[str]] | None:
    """The values of a flattened CausVid or Self-Forcing file under our keys, and a note on all that did not
    simply pass.

    Args:
        flat: the file by dotted key (``keys.flatten``).
        label: its name, for notes and messages; its stem names the run.
        beside: gives the ``default_config.yaml`` of its folder, flattened, which Self-Forcing reads below
            every file; called for Self-Forcing alone.

    Returns:
        None when the file was not written for either. What it asks for and is not here leads the notes.

    Raises:
        UserError: it cannot be meant for a Wan (SDXL), or a list of steps or a shape is none. Other wrong
            values pass as they are: the recipe refuses them by name.
    """
    sign = next((key for key in flat if key in SIGNS), None)
    if sign is None or set(flat) & (set(keys()) - {"seed"}):
        return None
    file = _opened(flat, label, beside)
    file.notes.append(
        f"{label}: read as a YAML for {file.house}, because of {sign}; keys left out have its defaults"
    )
    kind = _kind(file)
    for read in (_networks, _shape, _plan, _passed, _optimiser):
        read(file)
    if kind == "denoise":
        _denoise(file)
    else:
        _student(file, kind)
    if kind == "matching":
        _judges(file)
    _fixed(file, kind)
    _ending(file, kind)
    file.notes += _told(file)
    return file.values, [*file.missed, *file.notes]


def _opened(flat: Mapping[str, Any], label: str, beside: Callable[[], Mapping[str, Any]]) -> _File:
    said = _flags(flat, label)
    # A key of the other may stand in a file by mistake, and is told; most of its keys say whose it is.
    if len(said.keys() & (SELF_FORCING - CAUSVID)) <= len(said.keys() & (CAUSVID - SELF_FORCING)):
        return _File(label, "CausVid", said, _Given(CAUSVID_DEFAULTS | said), dict(WAN))
    default = {key: value for key, value in beside().items() if key in SELF_FORCING and key not in said}
    below = _flags(default, "default_config.yaml")
    both = below | said
    file = _File(label, "Self-Forcing", both, _Given(SELF_FORCING_DEFAULTS | both), dict(WAN))
    if below:
        file.notes.append(f"{label}: where it is silent, default_config.yaml beside it holds, as there")
    return file


def _flags(flat: Mapping[str, Any], label: str) -> dict[str, Any]:
    """Without nulls, and what is true or false as such: their reader follows YAML 1.1, where yes is true."""
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    found = {}
    for key, value in flat.items():
        meant = words.get(str(value).lower()) if key in FLAGS else value
        if value is not None and meant is None:
            raise UserError(f"{label}: {key} is {shown(value)}; expected true or false")
        if value is not None:
            found[key] = meant
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _kind(file: _File) -> str:
    """``train.method``: what the file trains."""
    given = file.given
    if file.house == "CausVid":
        stage = given.get("distillation_loss", "dmd" if "dfake_gen_update_ratio" in file.said else "ode")
        if stage not in ("ode", "dmd"):
            raise file.refuse("distillation_loss", "expected ode or dmd")
        kind = "ode" if stage == "ode" else "matching"
        if kind == "matching":
            file.values["distil.loss"] = "dmd"
    else:
        kind = _trainer(file)
    file.values["train.method"] = kind
    return kind


def _trainer(file: _File) -> str:
    """Of Self-Forcing."""
    trainer = file.given["trainer"]
    if trainer not in ("score_distillation", "ode", "gan", "diffusion"):
        raise file.refuse("trainer", "expected score_distillation, ode, gan or diffusion")
    if trainer == "score_distillation":
        loss = file.given["distribution_loss"]
        if loss not in ("dmd", "sid", "causvid"):
            raise file.refuse("distribution_loss", "expected dmd, sid or causvid")
        file.values["distil.loss"] = "sid" if loss == "sid" else "dmd"
        if "sid_alpha" in file.said and loss != "sid":
            # As in its self_forcing_sid.yaml.
            file.notes.append(
                f"sid_alpha: distribution_loss is {loss}, so DMD is trained, there too; for SiD set "
                "distil.loss=sid"
            )
    if trainer == "gan":
        file.values["distil.loss"] = "gan"
    return {"ode": "ode", "diffusion": "denoise"}.get(trainer, "matching")


# What is trained


def _network(file: _File, key: str) -> Network:
    """A published network by the name that ``key`` has. Raises UserError for another."""
    name = Path(str(file.given[key])).name
    if name not in NETWORKS:
        why = ", and images of SDXL are not distilled here" if name.startswith("sdxl") else ""
        raise file.refuse(key, f"expected {', '.join(NETWORKS)}{why}")
    return NETWORKS[name]


def _networks(file: _File) -> None:
    """Student and judges by name, and what the student starts from."""
    given, values = file.given, file.values
    named = ("generator_name", "model_kwargs.model_name", "model_name")
    student = _network(file, next(key for key in named if key in given))
    values["model.preset"] = student.preset
    values["model.name_or_path"] = student.transformer
    file.notes.append(
        f"model.name_or_path, tokenizer and text_encoder: `hf download Wan-AI/{Path(student.folder).name} "
        f"--local-dir {student.folder}`, or name your own"
    )
    if start := given.get("generator_ckpt"):
        if not isinstance(start, str):
            raise file.refuse("generator_ckpt", "expected a path")
        values["model.name_or_path"] = str(start)
    if str(start).endswith((".pt", ".pth", ".ckpt", ".bin")):
        file.notes.append(
            f"generator_ckpt {shown(start)}: its tensors must be taken out once, `motionloom convert "
            f"{quote(str(start))} FOLDER`; then add model.name_or_path=FOLDER"
        )
    if values["train.method"] != "denoise":
        key = "real_name" if "real_name" in given else "model_name"
        teacher = _network(file, key)
        values["distil.teacher"] = teacher.recipe
        file.notes.append(
            f"distil.teacher: recipe {teacher.recipe}, whose weights are in {teacher.transformer}"
        )


def _shape(file: _File) -> None:
    """``image_or_video_shape``: batch, latent frames, channels, rows, columns."""
    shape = file.given.get("image_or_video_shape")
    whole = (
        isinstance(shape, list) and len(shape) == 5 and all(_is_number(n) and n == int(n) >= 1 for n in shape)
    )
    if not isinstance(shape, list) or not whole or shape[2] != file.values["tokenizer.latent_d"]:
        raise file.refuse("image_or_video_shape", "expected [batch, latent frames, 16, rows, columns]")
    _, frames, _, rows, columns = map(int, shape)
    cell = file.values["tokenizer.latent_f"]
    file.values |= {
        "video.num_frames": 1 + file.values["tokenizer.latent_t"] * (frames - 1),
        "video.height": rows * cell,
        "video.width": columns * cell,
    }
    if file.values["train.method"] != "matching":
        return
    longest = file.whole("num_training_frames", frames, 1)
    chunk = file.whole("num_frame_per_block", 1, 1)
    if longest >= frames + chunk:
        file.values["distil.longest"] = longest
    elif longest != frames:
        file.miss("num_training_frames", f"every roll-out has the {frames} latent frames of the clip")


def _plan(file: _File) -> None:
    """Causal chunks, or the whole clip at once."""
    given, values = file.given, file.values
    task = given.get("generator_task", given.get("generator_task_type", "causal_video"))
    if file.house == "CausVid":
        causal = str(given.get("generator_name", given["model_name"])).startswith("causal")
        if causal != (task == "causal_video") and {"generator_task", "generator_task_type"} & set(file.said):
            key = "generator_task" if "generator_task" in file.said else "generator_task_type"
            own = (
                "each chunk of a causal student has a level of its own" if causal else "a clip has one level"
            )
            file.miss(key, own)
    else:
        causal = given["causal"] is not False
    values["plan.type"] = "chunks" if causal else "text_to_video"
    if not causal:
        return
    chunk = values["plan.frames"] = file.whole("num_frame_per_block", 1, 1)
    values["plan.first_alone"] = bool(given.get("independent_first_frame") or given.get("i2v"))
    if given.get("i2v"):
        values["plan.conditions"] = [{"type": "first_frame"}]
        file.notes.append("i2v: the first frame is given (plan.conditions), and a chunk by itself")
    if given.get("teacher_forcing"):
        values["plan.forcing"] = "teacher"
    window = file.whole("model_kwargs.local_attn_size", -1, -1)
    if window >= 0:
        values["plan.window"] = max(1, window // chunk)
        _inexact(file, "model_kwargs.local_attn_size", window, values["plan.window"], chunk)
    if sinks := file.whole("model_kwargs.sink_size", 0):
        values["plan.sinks"] = -(-sinks // chunk)
        _inexact(file, "model_kwargs.sink_size", sinks, values["plan.sinks"], chunk)


def _inexact(file: _File, key: str, frames: int, chunks: int, chunk: int) -> None:
    if frames != chunks * chunk or file.values["plan.first_alone"]:
        file.notes.append(f"{key} {frames}: {chunks} chunks of {chunk} latent frames, chunks are kept whole")


# How


def _passed(file: _File) -> None:
    """What has another name and nothing else."""
    read = {"ode": ("distil.negative",), "denoise": ()}.get(file.values["train.method"])
    for theirs, ours in PASSED.items():
        if theirs in file.given and (read is None or ours in read or not ours.startswith("distil.")):
            file.values[ours] = file.given[theirs]
    if "seed" in file.said and file.given["seed"] == 0:
        file.notes.append("seed 0: a random one there; here 0 is a seed like any other")
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", Path(file.label).stem).lstrip("._-")
    file.values["experiment_name"] = stem or "run"


def _optimiser(file: _File) -> None:
    given, values = file.given, file.values
    values["train.betas"] = [given["beta1"], given["beta2"]]
    values["train.precision"] = "fp32" if given["mixed_precision"] is False else "bf16"
    if cut := given.get("sharding_strategy"):
        if cut not in ("full", "hybrid_full", "hybrid_zero2", "no_shard"):
            raise file.refuse("sharding_strategy", "expected full, hybrid_full, hybrid_zero2 or no_shard")
        values["train.sharding"] = "ddp" if cut == "no_shard" else "fsdp"
        file.notes.append(f"sharding_strategy {cut}: train.sharding {values['train.sharding']}, for torchrun")
    values["ema.enabled"] = bool(given.get("ema_weight"))
    if values["ema.enabled"]:
        file.notes.append(f"ema_weight: reached after a warm-up ({file.house} has none)")
    else:
        values.pop("ema.decay", None)
    if "total_batch_size" in given:
        file.notes.append(
            f"total_batch_size {shown(given['total_batch_size'])}: not used by {file.house} either; set "
            "train.grad_accum_steps to it / (batch_size x processes)"
        )


def _scheduler_shift(file: _File) -> float:
    shift = file.number("model_kwargs.timestep_shift", 8.0)
    if shift <= 0:
        raise file.refuse("model_kwargs.timestep_shift", "expected a number above 0")
    return shift


def _denoise(file: _File) -> None:
    """Self-Forcing's trainer of causal teachers."""
    values, shift = file.values, _scheduler_shift(file)
    values |= {"flow_matching.shift": shift, "flow_matching.weighting": "bell"}
    values |= {"train.sample_shift": shift, "train.sample_cfg_scale": file.number("guidance_scale", 1.0)}
    values["train.sample_num_steps"] = 50


def _student(file: _File, kind: str) -> None:
    """Levels of the student, and the teacher's walk."""
    values, shift = file.values, _scheduler_shift(file)
    warped = file.given.get("warp_denoising_step") is True
    us = [*_grid_points(file, shift, warped)]
    values["distil.sigmas"] = [_warp(u / _GRID, shift) for u in us]
    values["distil.shift"] = values["train.sample_shift"] = shift
    values["train.sample_num_steps"] = len(us)
    # The fewest steps with the levels among them, as many as theirs or more: 50 and 48 for their own lists.
    fewest = _GRID // math.gcd(_GRID, *us)
    values["distil.grid_steps"] = -(-_TEACHER_STEPS // fewest) * fewest
    if kind == "ode":
        values |= {"distil.guidance": 6.0, "distil.guidance_form": "scale", "distil.grid_solver": "euler"}
        values.setdefault("distil.negative", WAN_NEGATIVE)
        file.notes.append(
            f"distil: `motionloom pairs` walks {values['distil.grid_steps']} Euler steps of shift {shift:g} "
            f"with guidance 6 away from Wan's negative prompt, as generate_ode_pairs.py does"
        )


def _grid_points(file: _File, shift: float, warped: bool) -> Iterator[int]:
    """The levels of ``denoising_step_list`` without its final 0, as points of the scheduler's grid in u."""
    key, steps = "denoising_step_list", file.given.get("denoising_step_list")
    good = isinstance(steps, list) and steps and all(_is_number(t) and 0 <= t <= _GRID for t in steps)
    if not isinstance(steps, list) or not good:
        raise file.refuse(key, f"expected a list of numbers from {_GRID} down to 0")
    kept = steps[:-1] if steps[-1] == 0 else steps
    if len(kept) < len(steps):
        file.notes.append(f"{key}: its final 0 is left out, it is where the levels lead")
    if not kept or any(a <= b for a, b in pairwise(kept)) or kept[-1] == 0:
        raise file.refuse(key, "expected levels that fall")
    last = None
    for i, t in enumerate(kept):
        if warped and t != int(t):
            raise file.refuse(key, "expected whole numbers, which warp_denoising_step takes as places")
        u = (
            int(t)
            if warped
            else min(range(1, _GRID + 1), key=lambda n: abs(_warp(n / _GRID, shift) - t / _GRID))
        )
        if i == 0 and u != _GRID:
            if t < 0.98 * _GRID:
                raise file.refuse(key, f"expected {_GRID} first, since a clip begins as noise alone")
            file.notes.append(f"{key}: {t:g} becomes {_GRID}, since a clip begins as noise alone")
            u = _GRID
        if u == last:
            raise file.refuse(key, f"expected levels that differ on the scheduler's {_GRID}: two are {u}")
        last = u
        off = _warp(u / _GRID, shift) - t / _GRID
        if not warped and abs(off) > 1e-9 and u != _GRID:
            file.notes.append(
                f"{key}: {t:g} is sigma {_warp(u / _GRID, shift):.6f}, the nearest of the scheduler's "
                f"{_GRID} levels of shift {shift:g} (off by {off:+.6f}), as there"
            )
        yield u


def _warp(u: float, shift: float) -> float:
    return shift * u / (1 + (shift - 1) * u)


# What judges


def _judges(file: _File) -> None:
    """Who judges, source of clips, guidance and levels."""
    given, values = file.given, file.values
    for key in ("real_name", "fake_name"):
        if str(given.get(key)).startswith("causal"):
            file.miss(key, "teacher and critic judge whole clips")
    critic = _network(file, "fake_name" if "fake_name" in given else "model_name").recipe
    if critic != values["distil.teacher"]:
        values["distil.critic_from"] = critic
    if file.house == "CausVid":
        rollout = given["backward_simulation"] is True
        if rollout and values["plan.type"] == "chunks":
            file.notes.append("backward_simulation: the causal student's own roll-outs (CausVid stops there)")
    else:
        rollout = given["trainer"] == "gan" or given["distribution_loss"] != "causvid"
    values["distil.source"] = "rollout" if rollout else "data"
    key = "real_guidance_scale" if "real_guidance_scale" in given else "guidance_scale"
    weight = file.number(key, 0.0)
    values |= {"distil.guidance": weight, "distil.guidance_form": "delta"}
    file.notes.append(
        f"{key} {weight:g}: adds w (c - u) to c, a scale of {1 + weight:g} (distil.guidance_form delta)"
    )
    for n in (1, 2):
        if given.get(key := f"beta{n}_critic", given[f"beta{n}"]) != given[f"beta{n}"]:
            file.miss(key, f"the critic has the student's, {given[f'beta{n}']}")
    if given.get(key := "max_grad_norm_critic", 10.0) != values["train.clip_grad_norm"]:
        file.miss(key, f"the critic's gradient is clipped as the student's, {values['train.clip_grad_norm']}")
    values["distil.context_noise"] = file.number("context_noise", 0.0) / _GRID
    values["distil.score_range"] = [0.02, 0.98]
    if values["distil.loss"] == "gan":
        _gan(file)


def _gan(file: _File) -> None:
    given, values = file.given, file.values
    values["distil.gan_form"] = "relativistic" if given.get("relativistic_discriminator") else "softplus"
    values["distil.gan_blocks"] = [13, 21, 29]
    for theirs, ours in GAN_PASSED.items():
        if theirs not in given:
            continue
        values[ours] = given[theirs]
        if (other := next((key for key in PASSED if PASSED[key] == ours), None)) in file.said:
            file.notes.append(f"{other}: not read by what this file trains, {theirs} is")
    if given.get("r2_sigma", 0.01) != given.get("r1_sigma", 0.01):
        file.miss("r2_sigma", "one step measures both, r1_sigma")
    if given.get("critic_timestep_shift", given["timestep_shift"]) != given["timestep_shift"]:
        file.miss("critic_timestep_shift", "all who judge have one shift, timestep_shift")


def _fixed(file: _File, kind: str) -> None:
    """What is always so here: told, or missed where the file wants it otherwise."""
    if file.house == "CausVid" and (task := file.given.get("generator_task")):
        # There the judges' levels are tied as the student's are, unless it is said.
        for key in ("real_task_type", "fake_task_type"):
            file.given.setdefault(key, task)
    for key, fixed in FIXED.items():
        if kind not in fixed.methods or (given := file.given.get(key)) is None:
            continue
        if given != fixed.value:
            file.miss(key, fixed.here)
        elif key in file.said:
            file.notes.append(f"{key} {shown(given)}: as always here, {fixed.here}")


# The rest


def _ending(file: _File, kind: str) -> None:
    """When training ends, and on what it runs."""
    file.values["train.max_steps"] = TRAINING[file.house, kind]
    file.notes.append(
        f"train.max_steps: {file.values['train.max_steps']}, as published; {file.house} trains until it is "
        "stopped"
    )
    name = quote(Path(file.label).name)
    if (place := file.given.get("data_path")) is not None:
        lmdb = not str(place).endswith((".txt", ".json", ".csv"))
        read = f"read it by `motionloom cache {name} --lmdb {quote(str(place))} --out OUT`, then"
        prompts = "captions of a cache are the prompts,"
        file.notes.append(
            f"data_path {shown(place)}: {read if lmdb else prompts} `motionloom train {name} --cache OUT`"
        )
    file.notes.append("train.heldout_fraction: a part of the cache is held out of training (there none is)")


def _told(file: _File) -> Iterator[str]:
    """A line for every key that nothing has asked for."""
    known = CAUSVID if file.house == "CausVid" else SELF_FORCING
    for key, value in file.said.items():
        text = "" if key == SECRET else f" {shown(value)}"
        if key in GONE:
            yield f"{key}{text}: {GONE[key]}"
        elif key in file.given.asked:
            continue
        elif key in known:
            yield f"{key}{text}: not read by what this file trains"
        else:
            near = get_close_matches(key, known, 1, cutoff=0.7)
            meant = f"; did you mean {near[0]}?" if near else ""
            yield f"{key}: ignored, no key of {file.house} either{meant}"
