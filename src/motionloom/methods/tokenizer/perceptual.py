"""How different two pictures look, by features of a network that has seen many: a loss that sees edges and
texture where L1 sees the mean of what is possible.

LPIPS (arXiv 1801.03924) in its shift-tolerant form (arXiv 2207.13686), whose weights ship in the wheel of
stlpips-pytorch. Only their file is read: the wheel's code wants packages that are needed for nothing here, so
the two feature stacks, which are small, stand below as data.

Shapes: N pictures, B clips, P frames, H x W pixels, C channels.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motionloom.backbones.weights.pickles import open_pickle
from motionloom.errors import UserError

Variant = Literal["vgg", "alex"]
PACKAGE = "stlpips_pytorch"
LEAST = 16
"""Pixels on each side."""
EPS = 1e-10
MARGIN = 2
"""Pixels that are mirrored at the border before every halving."""


@dataclass(frozen=True)
class Stage:
    """Layers up to the next features that are compared."""

    convolutions: tuple[str, ...]
    """By their names in the file; each is followed by a ReLU."""
    padding: int = 1
    pool: int = 0
    """Side of the maximum that opens the stage, which is then halved; 0: none."""
    halved: bool = False
    """The convolution's output is halved, in place of a stride."""


STAGES: dict[Variant, tuple[Stage, ...]] = {
    "vgg": (
        Stage(("slice1.0", "slice1.2")),
        Stage(("slice2.6", "slice2.8"), pool=2),
        Stage(("slice3.12", "slice3.14", "slice3.16"), pool=2),
        Stage(("slice4.20", "slice4.22", "slice4.24"), pool=2),
        Stage(("slice5.28", "slice5.30", "slice5.32"), pool=2),
    ),
    "alex": (
        Stage(("slice1.0",), padding=2, halved=True),
        Stage(("slice2.5",), padding=2, pool=3),
        Stage(("slice3.9",), pool=3),
        Stage(("slice4.11",)),
        Stage(("slice5.13",)),
    ),
}


class Perceptual(nn.Module):
    """Distance of pictures, 0 for equal ones; frozen, and no part of a checkpoint.

    Args:
        variant: ``vgg`` (VGG16), or ``alex`` (AlexNet): smaller and rougher, some three times as fast.

    Raises:
        UserError: the wheel is not installed, or its file holds other weights.
    """

    def __init__(self, variant: Variant = "vgg") -> None:
        super().__init__()
        self.weights = weights_file(variant)
        """The file, for whoever names it beside a figure."""
        self._stages = STAGES[variant]
        tensors = open_pickle(self.weights)
        names = ["scaling_layer.shift", "scaling_layer.scale"]
        for i, stage in enumerate(self._stages):
            names += [f"net.{name}.{part}" for name in stage.convolutions for part in ("weight", "bias")]
            names.append(f"lin{i}.model.1.weight")
        if missing := [name for name in names if name not in tensors]:
            raise UserError(
                f"{self.weights} lacks {missing[0]}: it is of another version; pip install --no-deps "
                "stlpips-pytorch==0.0.2"
            )
        for name in names:
            self.register_buffer(_flat(name), tensors.read(name).float(), persistent=False)

    def forward(self, made: Tensor, real: Tensor) -> Tensor:
        """Pictures (N, 3, H, W) in [0, 1] to (N,); clips (B, P, 3, H, W) to (B,), the mean over frames.

        Gradients flow to ``made`` alone. Features are compared in float32, whatever computed them.

        Raises:
            UserError: a side of the pictures is below 16 pixels.
        """
        assert made.shape == real.shape, (made.shape, real.shape)
        height, width = made.shape[-2:]
        if min(height, width) < LEAST:
            raise UserError(
                f"perceptual loss: frames of {width}x{height} pixels are too small, it needs {LEAST} on each "
                "side: use larger frames, or set its weight to 0"
            )
        with torch.no_grad():
            seen = self._features(real.reshape(-1, 3, height, width))
        features = self._features(made.reshape(-1, 3, height, width))
        total_N = torch.zeros((), device=made.device)
        for i, (ours, theirs) in enumerate(zip(features, seen, strict=True)):
            weight_C11 = self.get_buffer(_flat(f"lin{i}.model.1.weight"))[0]
            apart = (_unit(ours) - _unit(theirs)).square()
            total_N = total_N + (apart * weight_C11).sum(dim=1).mean(dim=(1, 2))
        return total_N.view(*made.shape[:-3], 1).flatten(start_dim=1).mean(dim=1)

    def _features(self, x_N3HW: Tensor) -> list[Tensor]:
        """What each stage leaves, (N, C, h, w)."""
        shift, scale = (self.get_buffer(_flat(f"scaling_layer.{part}")) for part in ("shift", "scale"))
        x = (2 * x_N3HW - 1 - shift) / scale
        found = []
        for stage in self._stages:
            if stage.pool:
                x = _halve(F.max_pool2d(x, stage.pool, stride=1))
            for name in stage.convolutions:
                weight, bias = (self.get_buffer(_flat(f"net.{name}.{part}")) for part in ("weight", "bias"))
                x = F.conv2d(x, weight, bias, padding=stage.padding)
                x = F.relu(_halve(x) if stage.halved else x)
            found.append(x)
        return found


def weights_file(variant: Variant) -> Path:
    """Where the wheel keeps the weights. Raises UserError where it is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    for folder in (found.submodule_search_locations or []) if found else []:
        path = Path(folder) / "weights" / "vST0.0" / f"{variant}_shift_tolerant.pth"
        if path.is_file():
            return path
    raise UserError(
        f"perceptual loss {variant}: stlpips-pytorch, which brings its weights, is not installed; pip "
        "install --no-deps stlpips-pytorch (or pip install 'motionloom[judges]')"
    )


def _halve(x_NCHW: Tensor) -> Tensor:
    """Every second pixel of a binomial blur (1, 2, 1) / 4 in both directions, which keeps what a stride would
    alias (arXiv 1904.11486)."""
    x = _mirrored(x_NCHW)
    x = (x[..., :-2:2] + 2 * x[..., 1:-1:2] + x[..., 2::2]) / 4
    return (x[..., :-2:2, :] + 2 * x[..., 1:-1:2, :] + x[..., 2::2, :]) / 4


def _mirrored(x_NCHW: Tensor) -> Tensor:
    """With a mirrored margin. Maps of one or two pixels, of pictures of 16, are mirrored over and over."""
    if min(x_NCHW.shape[-2:]) > MARGIN:
        return F.pad(x_NCHW, (MARGIN,) * 4, mode="reflect")
    for dim in (-2, -1):
        last = x_NCHW.shape[dim] - 1
        at = torch.arange(-MARGIN, last + 1 + MARGIN, device=x_NCHW.device)
        at = last - (at % max(2 * last, 1) - last).abs()
        x_NCHW = x_NCHW.index_select(dim, at)
    return x_NCHW


def _unit(x_NCHW: Tensor) -> Tensor:
    """Each pixel's features at length 1, or 0."""
    x_NCHW = x_NCHW.float()
    # Where no feature fires the length is 0, at which this norm, unlike a square root, has a slope of 0.
    return x_NCHW / (torch.linalg.vector_norm(x_NCHW, dim=1, keepdim=True) + EPS)


def _flat(name: str) -> str:
    """A buffer's name cannot hold dots."""
    return name.replace(".", "_")
