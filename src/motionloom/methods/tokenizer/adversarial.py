"""A judge of reconstructions, and what keeps it from winning too early: for the decoder's second training.

VQGAN's recipe (arXiv 2012.09841): patches are judged, not frames; hinge losses; the judge's weight follows
from the gradients. ``discriminator`` is the field's word for the judge.

Shapes: B clips, P pixel frames, H x W pixels, h x w patches that are judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motionloom.errors import UserError
from motionloom.nn.init import fill
from motionloom.parallel import Ranks

ALONE = Ranks()
MOST_WEIGHT = 1e4
GROUP = 16
"""Channels that are normalised together, where their number allows it."""


class PatchDiscriminator(nn.Module):
    """PatchGAN (pix2pix, arXiv 1611.07004): convolutions alone, one logit for every patch of every frame.

    Group norms stand where pix2pix has batch norms, so that what is said of a clip does not depend on the
    others of its batch: on a cut batch, on two ranks and under a gradient penalty it means the same.

    Args:
        layers: halvings of the frame's sides; 3 judges patches of 70 pixels.
        width: channels after the first.
        temporal: sees the frame before and the frame after in every layer; otherwise frames stand alone.
    """

    def __init__(self, layers: int = 3, width: int = 64, temporal: bool = False) -> None:
        super().__init__()
        self.layers, self.temporal = layers, temporal
        widths = [3, *(width * min(2**i, 8) for i in range(layers + 1))]
        parts: list[nn.Module] = []
        for i, (inputs, outputs) in enumerate(pairwise(widths)):
            parts.append(self._convolution(inputs, outputs, 2 if i < layers else 1))
            if i:
                parts.append(nn.GroupNorm(math.gcd(outputs, max(1, outputs // GROUP)), outputs))
            parts.append(nn.LeakyReLU(0.2))
        parts.append(self._convolution(widths[-1], 1, 1))
        self.net = nn.Sequential(*parts)

    def _convolution(self, inputs: int, outputs: int, stride: int) -> nn.Module:
        if not self.temporal:
            return nn.Conv2d(inputs, outputs, 4, stride, padding=1)
        return nn.Conv3d(inputs, outputs, (3, 4, 4), (1, stride, stride), padding=1)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Every weight anew: convolutions with deviation 0.02 (pix2pix, sec. 6.2), norms 1, biases 0."""
        for part in self.net:
            if isinstance(part, nn.Conv2d | nn.Conv3d):
                part.weight.normal_(std=0.02, generator=generator)
            elif isinstance(part, nn.GroupNorm):
                fill(1.0, part.weight)
            if isinstance(bias := getattr(part, "bias", None), Tensor):
                fill(0.0, bias)

    def forward(self, x_BP3HW: Tensor) -> Tensor:
        """Frames to logits (B, P, h, w), large where they look real.

        Raises:
            UserError: a frame is smaller than the last layer needs.
        """
        height, width = x_BP3HW.shape[-2:]
        least = 3 * 2**self.layers
        if min(height, width) < least:
            raise UserError(
                f"discriminator: frames of {width}x{height} pixels are too small for {self.layers} layers, "
                f"which need {least} on each side: use fewer layers or larger frames"
            )
        if self.temporal:
            return self.net(x_BP3HW.transpose(1, 2))[:, 0]
        return self.net(x_BP3HW.flatten(end_dim=1)).unflatten(0, x_BP3HW.shape[:2])[:, :, 0]


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """What a judge loses by not telling clips apart, logits (B, ...) to (B,): hinge (arXiv 1705.02894)."""
    return (_mean(F.relu(1 - real)) + _mean(F.relu(1 + fake))) / 2


def hinge_generator(fake: Tensor) -> Tensor:
    """What a decoder loses by being told apart, logits (B, ...) to (B,)."""
    return -_mean(fake)


def r1(discriminator: Callable[[Tensor], Tensor], real_B: Tensor) -> Tensor:
    """Squared slope of a judge at real clips (arXiv 1801.04406, eq. 9, without its gamma / 2).

    Args:
        discriminator: clips (B, ...) to logits (B, ...); a clip's word is their mean.

    Returns:
        (B,), float32, with a gradient for the judge's weights.
    """
    real_B = real_B.detach().float().requires_grad_()
    with torch.enable_grad(), torch.autocast(real_B.device.type, enabled=False):
        (slope_B,) = torch.autograd.grad(_mean(discriminator(real_B)).sum(), real_B, create_graph=True)
    return slope_B.square().flatten(start_dim=1).sum(dim=1)


class LeCam(nn.Module):
    """Holds what a judge says of real clips near what it has been saying of fake ones, and the other way
    round (arXiv 2104.03310; one-sided and without the bias of its start, as in the authors' code).

    The two averages are state: buffers, saved with a checkpoint.
    """

    real: Tensor
    fake: Tensor
    updates: Tensor

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        self._decay = decay
        for name in ("real", "fake", "updates"):
            self.register_buffer(name, torch.zeros(()))

    @torch.no_grad()
    def update(self, real: Tensor, fake: Tensor, ranks: Ranks = ALONE) -> None:
        """Follow the mean logits of all ranks' clips; before :meth:`forward`."""
        means = ranks.sum_(torch.stack([real.float().mean(), fake.float().mean()])) / ranks.world
        self.real.lerp_(means[0], 1 - self._decay)
        self.fake.lerp_(means[1], 1 - self._decay)
        self.updates += 1

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """Logits (B, ...) of real and fake clips to (B,)."""
        share = (1 - self._decay**self.updates).clamp_min(1 - self._decay)
        above = F.relu(real.float() - self.fake / share)
        below = F.relu(self.real / share - fake.float())
        return _mean(above.square()) + _mean(below.square())


def adaptive_weight(
    reconstruction: Tensor, adversarial: Tensor, last: Tensor, ranks: Ranks = ALONE, eps: float = 1e-4
) -> Tensor:
    """What to multiply a judge's loss by, so that it moves the decoder's last layer as much as the
    reconstruction does (VQGAN, eq. 7).

    Args:
        reconstruction, adversarial: scalars whose graphs are kept.
        last: weight of the decoder's last layer.
        ranks: over whose gradients the two are averaged first.

    Returns:
        A scalar without a graph, at most 1e4.
    """
    norms = []
    for loss in (reconstruction, adversarial):
        (grad,) = torch.autograd.grad(loss, last, retain_graph=True)
        norms.append(torch.linalg.vector_norm(ranks.sum_(grad.float().clone()) / ranks.world))
    return (norms[0] / (norms[1] + eps)).clamp(0, MOST_WEIGHT)


def _mean(x_B: Tensor) -> Tensor:
    """(B, ...) -> (B,), float32."""
    return x_B.float().reshape(len(x_B), -1).mean(dim=1)
