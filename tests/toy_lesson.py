"""Teachers, students and batches for the proofs of distillation: tiny networks, and networks that know a
distribution in closed form.

Shapes: see ``toy_model``; B batch, N tokens, C channels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from motionloom.backbones.prediction import Predictor
from motionloom.cli.assemble import fresh_model
from motionloom.config import Recipe
from motionloom.data.batch import Batch, Latents
from motionloom.generate import Model
from motionloom.methods import Method, build_method
from motionloom.methods.distil.judge import Judge
from motionloom.methods.distil.lesson import Teacher
from motionloom.nn.cache import KVCache
from motionloom.plans import Streams, Visibility
from motionloom.rng import torch_generator
from motionloom.train.method import StepContext
from toy_model import toy_model

torch.set_num_threads(1)
FRAMES, HEIGHT, WIDTH = 8, 16, 24
CPU = torch.device("cpu")


# --- networks in closed form --------------------------------------------------------------------------------


def gaussian_estimate(x: Tensor, sigma: Tensor, mean: Any, deviation: Any) -> Tensor:
    """E[clean | x] of numbers from N(mean, deviation^2), x = (1 - sigma) clean + sigma noise."""
    kept = 1 - sigma
    gain = kept * deviation**2 / ((kept * deviation) ** 2 + sigma**2)
    return mean + gain * (x - kept * mean)


class Closed(nn.Module):
    """A backbone that answers with a clean estimate of each number alone; one parameter that does nothing."""

    patch = (1, 1, 1)

    def __init__(self, estimate: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.estimate, self.modalities = estimate, ("video",)
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, streams: Streams, visibility: Visibility) -> dict[str, Tensor]:
        x_BNC, sigma_BN1 = streams["video"].x_BNC, streams["video"].sigma_BN[..., None]
        v_BNC = (x_BNC - self.estimate(x_BNC, sigma_BN1)) / sigma_BN1.clamp_min(1e-6)
        return {"video": v_BNC + 0 * self.unused}

    def blocks(self) -> list[nn.Module]:
        return []


def knows_gaussian(law: Callable[[], tuple[Any, Any]]) -> Closed:
    return Closed(lambda x, sigma: gaussian_estimate(x, sigma, *law()))


class Line(Closed):
    """A student of one step: mean + deviation x noise."""

    def __init__(self, mean: float = 0.0, deviation: float = 1.0) -> None:
        super().__init__(lambda x, sigma: self.mean + self.deviation * x)
        self.mean, self.deviation = (nn.Parameter(torch.tensor(v)) for v in (mean, deviation))

    def law(self) -> tuple[Tensor, Tensor]:
        return self.mean.detach(), self.deviation.detach().abs()


# --- networks that are listened to --------------------------------------------------------------------------


class Heard(NamedTuple):
    """One call of a network."""

    graph: bool
    linked: bool
    """Whether its input had a graph already."""
    streams: dict[str, Tensor]
    """Tokens by modality, with a gradient to ask for."""
    sigma_BN: Tensor
    cell_BN3: Tensor
    position_BN3: Tensor
    out: Tensor


class Listening(nn.Module):
    """A backbone whose calls are remembered; ``sees_cache``: whether it says that it has one."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone, self.patch, self.modalities = backbone, backbone.patch, backbone.modalities
        self.heard: list[Heard] = []

    def _call(self, streams: Streams, *rest: Any) -> dict[str, Tensor]:
        linked = any(s.x_BNC.requires_grad for m, s in streams.items() if m != "text")
        leaves = {
            m: s.x_BNC if s.x_BNC.requires_grad else s.x_BNC.detach().requires_grad_()
            for m, s in streams.items()
        }
        out = self.backbone({m: replace(s, x_BNC=leaves[m]) for m, s in streams.items()}, *rest)
        main = next(m for m in ("video", "audio") if m in streams)
        s = streams[main]
        self.heard.append(
            Heard(torch.is_grad_enabled(), linked, leaves, s.sigma_BN, s.cell_BN3, s.position_BN3, out[main])
        )
        return out

    def forward(self, streams: Streams, visibility: Visibility) -> dict[str, Tensor]:
        return self._call(streams, visibility)

    def blocks(self) -> list[nn.Module]:
        return self.backbone.blocks()


class ListeningWithCache(Listening):
    """The same, and it has a cache."""

    def forward(
        self, streams: Streams, visibility: Visibility, cache: KVCache | None = None
    ) -> dict[str, Tensor]:
        return self._call(streams, visibility, cache)

    def new_cache(self, **options: Any) -> KVCache:
        return self.backbone.new_cache(**options)


def listening(model: Model, cached: bool = True) -> tuple[Model, Listening]:
    """The model, and what listens to it."""
    ear = (ListeningWithCache if cached else Listening)(model.predictor.backbone)
    return replace(model, predictor=replace(model.predictor, backbone=ear)), ear


# --- models, batches, methods -------------------------------------------------------------------------------


def student_of(
    backbone: str = "joint", plan: str | dict[str, Any] = "chunks", method: str = "matching", **sections: Any
) -> Model:
    """A toy model to be taught, in training."""
    train = {"method": method, "batch_size": 2, **sections.pop("train", {})}
    distil = {"teacher": "teacher", "critic_ratio": 1, **sections.pop("distil", {})}
    model = toy_model(backbone, plan, train=train, distil=distil, **sections)
    assert isinstance(model.predictor.backbone, nn.Module)
    model.predictor.backbone.train()
    return model


def tiny_wan(plan: dict[str, Any], **train: Any) -> Model:
    """The tiny preset of Wan, every weight awake, on latents of 4 x 2 x 3 tokens."""
    recipe = Recipe.model_validate(
        {
            "video": {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "fps": 8.0},
            "tokenizer": {"latent_f": 4, "latent_t": 2, "latent_d": 16},
            "text_encoder": {"dim": 32, "vocab_size": 256, "max_length": 12},
            "model": {"type": "wan", "preset": "tiny", "patch": [1, 2, 2], **train.pop("model", {})},
            "plan": plan,
            "distil": {"teacher": "teacher", "critic_ratio": 1},
            "train": {"precision": "fp32", "batch_size": 2, **train},
        }
    )
    model = fresh_model(recipe, CPU)
    assert isinstance(model.predictor.backbone, nn.Module)
    generator = torch_generator("awake wan")
    for parameter in model.predictor.backbone.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def clips(
    model: Model,
    count: int = 2,
    size: tuple[int, int, int] = (FRAMES, HEIGHT, WIDTH),
    *,
    key: object = 0,
    shots: tuple[int, ...] = (),
    captions: tuple[str, ...] = ("a red star", "a blue circle"),
    levels: int = 0,
    law: tuple[float, float] = (0.0, 1.0),
) -> Batch:
    """Random latents under a model's tokenizer; ``levels``: states of a teacher beside them."""
    frames, height, width = size
    sample = model.sample(shots or (frames,), height, width, 8.0, count)
    latents, states = {}, {}
    for m, geometry in sample.tracks.items():
        patch = model.patch if m == "video" else (1, 1, 1)
        grid = [n * p for n, p in zip(geometry.grid, patch, strict=True)]
        channels = model.tokenizer.spec.channels if m == "video" else model.audio_tokenizer.spec.channels
        shape = (count, *grid, channels)
        x = law[0] + law[1] * torch.randn(shape, generator=torch_generator("clips", m, str(key)))
        pixels = 4 if m == "video" else 0
        fields = (geometry.seconds_BF, geometry.span_BF2, geometry.scene_BF)
        latents[m] = Latents(x, *fields, pixels)
        if levels:
            draw = torch_generator("states", m, str(key))
            states[m] = torch.randn((count, levels, *grid, channels), generator=draw)
    said = [[captions[i % len(captions)]] * max(1, len(shots)) for i in range(count)]
    return Batch([str(i) for i in range(count)], latents, said, states=states)


def at(turn: str, step: int = 0, micro: int = 0, rank: int = 0) -> StepContext:
    return StepContext(0, step, micro, rank, CPU, turn)


def taught(
    student: Model,
    teacher: Model | None = None,
    *,
    scale: float = 1.0,
    critic: nn.Module | None = None,
    judge: Judge | None = None,
) -> Method:
    """The student's method. The critic starts as the teacher unless it is given."""
    teacher = teacher or toy_model("joint", "text_to_video")
    backbone = teacher.predictor.backbone
    assert isinstance(backbone, nn.Module)
    backbone.requires_grad_(False)
    critic = critic or copy.deepcopy(backbone).requires_grad_(True)
    own = student.predictor.backbone
    return build_method(student.recipe, student, own, Teacher(teacher, scale), critic, judge)


def toy_judge(width: int = 24, depth: int = 2) -> Judge:
    judge = Judge(width, depth)
    judge.init_weights(torch_generator("toy judge"))
    return judge


def in_closed_form(model: Model, backbone: nn.Module) -> Model:
    """The model with another network."""
    return replace(model, predictor=Predictor(backbone))  # type: ignore[arg-type]
