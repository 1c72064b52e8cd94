"""What self-distillation shows of a clip: crops, changed in colour and sharpness, and blocks to be masked.

All frames of a clip get the same crop and the same changes, so motion stays what it is. Every change is a
function of the pixels and of numbers per clip, for a whole batch at once; the numbers come from a generator.

Shapes: B clips, P pixel frames, H x W pixels in [0, 1], S side of a crop, G global and L local crops; F
latent frames, h x w grid, N = h * w patches, M masked patches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from motionloom.errors import UserError

Range = tuple[float, float]
LUMA = (0.299, 0.587, 0.114)
"""How bright red, green and blue look (ITU-R BT.601)."""
TRIES = 10
ASPECT = (3 / 4, 4 / 3)
BLUR_RADIUS = 4
DRAWS = 256


@dataclass(frozen=True)
class CropSpec:
    """Which crops, and what may happen to them; DINOv2's (arXiv 2304.07193), at patches of 16 pixels.

    Raises:
        UserError: a side is no multiple of the patch.
    """

    patch: int = 16
    global_size: int = 224
    local_size: int = 96
    global_crops: int = 2
    local_crops: int = 8
    global_scale: Range = (0.32, 1.0)
    """Share of the frame's area."""
    local_scale: Range = (0.05, 0.32)
    flips: bool = True
    """Left and right change places. Off where words name directions."""
    colours: bool = True
    """Jitter, grey and solarise. Off where words name colours."""
    blur: bool = True

    def __post_init__(self) -> None:
        for name in ("global_size", "local_size"):
            size = getattr(self, name)
            if size < self.patch or size % self.patch:
                below = size // self.patch * self.patch
                near = " or ".join(str(s) for s in (below, below + self.patch) if s)
                raise UserError(
                    f"crops: {name} {size} is no multiple of the patch, {self.patch} pixels: use {near}"
                )


@dataclass(frozen=True)
class Crops:
    """Several views of each clip, in [0, 1]."""

    global_GBP3SS: Tensor
    local_LBP3SS: Tensor


def multi_crop(x_BP3HW: Tensor, spec: CropSpec, generator: torch.Generator) -> Crops:
    """Views of clips in [0, 1], drawn as DINOv2 draws them.

    The first global crop is always blurred, the others rarely, and those may be solarised; of the local ones
    half are blurred.
    """
    with torch.autocast(x_BP3HW.device.type, enabled=False):
        x_BP3HW = x_BP3HW.float()
        wholes = [_view(x_BP3HW, spec, n, True, generator) for n in range(spec.global_crops)]
        parts = [_view(x_BP3HW, spec, n, False, generator) for n in range(spec.local_crops)]
    side = spec.local_size
    none = x_BP3HW.new_zeros(0, *x_BP3HW.shape[:3], side, side)
    return Crops(torch.stack(wholes), torch.stack(parts) if parts else none)


def _view(x_BP3HW: Tensor, spec: CropSpec, number: int, whole: bool, generator: torch.Generator) -> Tensor:
    scale, size = (spec.global_scale, spec.global_size) if whole else (spec.local_scale, spec.local_size)
    clips, (height, width) = len(x_BP3HW), x_BP3HW.shape[-2:]
    x = crop(x_BP3HW, random_boxes(clips, height, width, generator, scale), size)
    if spec.flips:
        x = flip(x, chance(clips, 0.5, generator))
    if spec.colours:
        x = jitter(x, generator, share=0.8)
        x = grey(x, chance(clips, 0.2, generator))
    if spec.blur:
        share = 0.5 if not whole else 1.0 if number == 0 else 0.1
        blurred = blur(x, uniform(clips, (0.1, 2.0), generator))
        x = _where(chance(clips, share, generator), blurred, x)
    if spec.colours and whole and number > 0:
        x = solarise(x, chance(clips, 0.2, generator))
    return x


def uniform(count: int, between: Range, generator: torch.Generator) -> Tensor:
    """(count,) float32 on the generator's device."""
    low, high = between
    return low + (high - low) * torch.rand(count, generator=generator, device=generator.device)


def chance(count: int, share: float, generator: torch.Generator) -> Tensor:
    """(count,) bool, each True with probability ``share``."""
    return torch.rand(count, generator=generator, device=generator.device) < share


def random_boxes(
    clips: int,
    height: int,
    width: int,
    generator: torch.Generator,
    scale: Range,
    aspect: Range = ASPECT,
) -> Tensor:
    """Where to crop: (B, 4) int64 of top, left, height, width, all within the frame.

    Area and aspect (width over height, even in its logarithm) are drawn until they fit, ten times; then the
    largest centred box of an allowed aspect is taken (GoogLeNet, arXiv 1409.4842, sec. 6).
    """
    area = height * width * uniform(clips * TRIES, scale, generator)
    ratio = uniform(clips * TRIES, (math.log(aspect[0]), math.log(aspect[1])), generator).exp()
    w_BT = (area * ratio).sqrt().round().long().view(clips, TRIES)
    h_BT = (area / ratio).sqrt().round().long().view(clips, TRIES)
    fits_BT = (w_BT > 0) & (w_BT <= width) & (h_BT > 0) & (h_BT <= height)
    first_B1 = fits_BT.int().argmax(dim=1, keepdim=True)
    some_B = fits_BT.any(dim=1)
    most = min(max(width / height, aspect[0]), aspect[1])
    w_B = torch.where(some_B, w_BT.gather(1, first_B1)[:, 0], min(width, round(height * most)))
    h_B = torch.where(some_B, h_BT.gather(1, first_B1)[:, 0], min(height, round(width / most)))
    share = uniform(2 * clips, (0, 1), generator).view(2, clips)
    share = torch.where(some_B, share, 0.5)
    top_B = (share[0] * (height - h_B + some_B)).long().clamp(max=height - h_B)
    left_B = (share[1] * (width - w_B + some_B)).long().clamp(max=width - w_B)
    return torch.stack([top_B, left_B, h_B, w_B], dim=1)


def crop(x_BP3HW: Tensor, boxes_B4: Tensor, size: int) -> Tensor:
    """Each clip's box, (B, 4) of top, left, height, width, at ``size`` squared: (B, P, 3, S, S) in [0, 1].

    Bicubic (a = -0.5) with antialiasing, as Pillow and torch resize, from pixels within the box alone.
    Resizing is linear and treats rows and columns apart, so boxes of different sizes are two products of
    matrices for the whole batch.
    """
    top_B, left_B, h_B, w_B = boxes_B4.to(x_BP3HW.device).unbind(dim=1)
    height, width = x_BP3HW.shape[-2:]
    rows_BSH = _resampling(top_B, h_B, height, size)[:, None, None]
    columns_BSW = _resampling(left_B, w_B, width, size)[:, None, None]
    return (rows_BSH @ x_BP3HW @ columns_BSW.mT).clamp(0, 1)


def _resampling(begin_B: Tensor, length_B: Tensor, pixels: int, size: int) -> Tensor:
    """Weight of each of ``pixels`` in each of ``size`` new ones, (B, size, pixels)."""
    begin_B11, length_B11 = begin_B[:, None, None].float(), length_B[:, None, None].float()
    new = torch.arange(size, device=begin_B.device)[:, None] + 0.5
    old = torch.arange(pixels, device=begin_B.device) + 0.5
    scale = length_B11 / size
    away = ((old - begin_B11 - scale * new) / scale.clamp_min(1)).abs()
    inside = (old > begin_B11) & (old < begin_B11 + length_B11)
    near = (1.5 * away - 2.5) * away.square() + 1
    far = ((-0.5 * away + 2.5) * away - 4) * away + 2
    weight = torch.where(away < 1, near, torch.where(away < 2, far, 0.0)) * inside
    return weight / weight.sum(dim=-1, keepdim=True)


def flip(x_BP3HW: Tensor, which_B: Tensor) -> Tensor:
    """Left and right changed in those clips."""
    return _where(which_B, x_BP3HW.flip(-1), x_BP3HW)


def jitter(
    x_BP3HW: Tensor,
    generator: torch.Generator,
    share: float,
    strengths: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1),
) -> Tensor:
    """Brightness, contrast, saturation and hue changed at random in a ``share`` of the clips.

    The first three are multiplied by 1 - s .. 1 + s, the hue turned by -s .. s of a circle; the order of the
    four is drawn once for the batch.
    """
    clips = len(x_BP3HW)
    changes = (brighten, contrast, saturate, turn_hue)
    factors = [
        uniform(clips, (-s, s) if change is turn_hue else (1 - s, 1 + s), generator)
        for change, s in zip(changes, strengths, strict=True)
    ]
    changed = x_BP3HW
    for i in torch.randperm(4, generator=generator, device=generator.device).tolist():
        changed = changes[i](changed, factors[i])
    return _where(chance(clips, share, generator), changed, x_BP3HW)


def brighten(x_BP3HW: Tensor, factor_B: Tensor) -> Tensor:
    """Every value times a factor, cut to [0, 1]."""
    return (x_BP3HW * _per_clip(factor_B, x_BP3HW)).clamp(0, 1)


def contrast(x_BP3HW: Tensor, factor_B: Tensor) -> Tensor:
    """Distances from the clip's mean brightness times a factor, cut to [0, 1]."""
    mean = luma(x_BP3HW).mean(dim=(1, 2, 3, 4), keepdim=True)
    return (mean + (x_BP3HW - mean) * _per_clip(factor_B, x_BP3HW)).clamp(0, 1)


def saturate(x_BP3HW: Tensor, factor_B: Tensor) -> Tensor:
    """Distances from each pixel's own grey times a factor, cut to [0, 1]."""
    own = luma(x_BP3HW)
    return (own + (x_BP3HW - own) * _per_clip(factor_B, x_BP3HW)).clamp(0, 1)


def turn_hue(x_BP3HW: Tensor, turn_B: Tensor) -> Tensor:
    """Hues turned by a share of the circle, at the same saturation and value (HSV)."""
    r, g, b = x_BP3HW.unbind(dim=2)
    value, least = x_BP3HW.amax(dim=2), x_BP3HW.amin(dim=2)
    chroma = value - least
    unit = torch.where(chroma > 0, chroma, 1)
    sixth = torch.where(
        value == r, (g - b) / unit, torch.where(value == g, (b - r) / unit + 2, (r - g) / unit + 4)
    )
    sixth = sixth + 6 * _per_clip(turn_B, sixth)
    # One formula for the six sextants: each channel is the value less a trapezoid of the hue.
    turned = []
    for offset in (5, 3, 1):
        at = (sixth + offset) % 6
        turned.append(value - chroma * torch.minimum(at, 4 - at).clamp(0, 1))
    return torch.stack(turned, dim=2)


def luma(x_BP3HW: Tensor) -> Tensor:
    """Brightness as it is seen, (B, P, 1, H, W)."""
    return (x_BP3HW * x_BP3HW.new_tensor(LUMA).view(3, 1, 1)).sum(dim=2, keepdim=True)


def grey(x_BP3HW: Tensor, which_B: Tensor) -> Tensor:
    """Colour taken out of those clips."""
    return _where(which_B, luma(x_BP3HW).expand_as(x_BP3HW), x_BP3HW)


def solarise(x_BP3HW: Tensor, which_B: Tensor) -> Tensor:
    """Bright values, from a half on, turned to their negative in those clips."""
    return _where(which_B, torch.where(x_BP3HW >= 0.5, 1 - x_BP3HW, x_BP3HW), x_BP3HW)


def blur(x_BP3HW: Tensor, sigma_B: Tensor) -> Tensor:
    """Gaussian blur of each clip's own deviation in pixels, over 9 x 9, mirrored at the border."""
    return _blur_rows(_blur_rows(x_BP3HW, sigma_B).mT, sigma_B).mT


def _blur_rows(x_BP3HW: Tensor, sigma_B: Tensor) -> Tensor:
    width = x_BP3HW.shape[-1]
    radius = min(BLUR_RADIUS, width - 1)
    away = torch.arange(-radius, radius + 1, device=sigma_B.device)
    weight_BT = (-(away / sigma_B[:, None]).square() / 2).exp()
    weight_BT = weight_BT / weight_BT.sum(dim=1, keepdim=True)
    wide = F.pad(x_BP3HW, (radius, radius, 0, 0, 0, 0), mode="reflect")
    blurred = torch.zeros_like(x_BP3HW)
    for i, weight_B in enumerate(weight_BT.unbind(dim=1)):
        blurred = blurred + wide[..., i : i + width] * _per_clip(weight_B, wide)
    return blurred


@dataclass(frozen=True)
class Masks:
    """Patches that the student does not see."""

    mask_BFN: Tensor
    """bool; True: masked. The same in all latent frames."""
    weight_B: Tensor
    """One over the number of a clip's masked patches; 0 for a clip without."""
    index_M: Tensor
    """Where the masked patches stand among all B * F * N, in order."""
    image_M: Tensor
    """Index in B of each masked patch's clip."""

    def to(self, device: torch.device) -> Masks:
        """The same masks on ``device``."""
        return Masks(*(t.to(device) for t in (self.mask_BFN, self.weight_B, self.index_M, self.image_M)))

    def take(self, patches_BFND: Tensor) -> Tensor:
        """The masked ones among patches (B, F, N, D): (M, D), without asking the device how many."""
        return patches_BFND.flatten(end_dim=2).index_select(0, self.index_M)


def block_masks(
    clips: int,
    frames: int,
    grid: tuple[int, int],
    generator: torch.Generator,
    share: float = 0.5,
    ratio: Range = (0.1, 0.5),
    least: int = 4,
    aspect: Range = (0.3, 3.33),
) -> Masks:
    """Blocks of patches (BEiT, arXiv 2106.08254, alg. 1) in a ``share`` of the clips, as DINOv2 spreads them.

    How much of a clip is masked runs evenly over ``ratio`` from one masked clip to the next, so that a batch
    always holds easy and hard ones; a clip may get a little less where no block fits any more. A mask is a
    tube: the same cells in all latent frames, for what one frame hides the next would tell.

    Args:
        clips: B, crops of a batch taken together.
        frames: latent frames.
        grid: (h, w).
        least: patches of the smallest block, where so many are left to mask.
        aspect: height over width of a block.

    Returns:
        Masks on the CPU; the generator must be there too.
    """
    cells = math.prod(grid)
    mask_BN = torch.zeros(clips, cells, dtype=torch.bool)
    draws = _draws(generator)
    masked = torch.randperm(clips, generator=generator)[: int(clips * share)].tolist()
    step = (ratio[1] - ratio[0]) / max(len(masked), 1)
    for n, clip in enumerate(masked):
        wanted = max(1, int(cells * (ratio[0] + step * (n + next(draws)))))
        mask_BN[clip] = _blocks(grid, wanted, least, aspect, draws).flatten()
    mask_BFN = mask_BN[:, None].repeat(1, frames, 1)
    count_B = mask_BFN.sum(dim=(1, 2))
    index_M = mask_BFN.flatten().nonzero()[:, 0]
    weight_B = torch.where(count_B > 0, 1 / count_B.clamp_min(1), 0.0)
    return Masks(mask_BFN, weight_B, index_M, index_M // (frames * cells))


def _blocks(grid: tuple[int, int], wanted: int, least: int, aspect: Range, draws: Iterator[float]) -> Tensor:
    """(h, w) bool with at most ``wanted`` cells True."""
    mask = torch.zeros(grid, dtype=torch.bool)
    left, tries = wanted, 0
    while left and tries < TRIES:
        smallest = min(least, left)
        area = smallest + (left - smallest) * next(draws)
        steep = aspect[0] * (aspect[1] / aspect[0]) ** next(draws)
        high, wide = round(math.sqrt(area * steep)), round(math.sqrt(area / steep))
        top, begin = int(next(draws) * (grid[0] - high + 1)), int(next(draws) * (grid[1] - wide + 1))
        block = mask[max(top, 0) : top + high, max(begin, 0) : begin + wide]
        new = high * wide - int(block.sum())
        if high <= grid[0] and wide <= grid[1] and 0 < new <= left:
            block.fill_(True)
            left, tries = left - new, 0
        else:
            tries += 1
    return mask


def _draws(generator: torch.Generator) -> Iterator[float]:
    """Numbers in [0, 1), one by one."""
    while True:
        yield from torch.rand(DRAWS, generator=generator).tolist()


def _per_clip(values_B: Tensor, like: Tensor) -> Tensor:
    """Numbers of clips, to be broadcast over the rest of a tensor (B, ...)."""
    return values_B.to(like).view(-1, *([1] * (like.ndim - 1)))


def _where(which_B: Tensor, changed: Tensor, kept: Tensor) -> Tensor:
    return torch.where(_per_clip(which_B, kept) > 0, changed, kept)
