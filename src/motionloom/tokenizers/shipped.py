"""Tokenizers that come with MotionLoom, by name.

They are kept in ``tokenizers/`` at the root of the repository, each with a card of data and figures; a wheel
carries a copy inside the package (``setup.py``).
"""

from __future__ import annotations

from pathlib import Path

NOTE = "tokenizer.json"
"""What makes a folder a tokenizer's."""


def shipped_tokenizers() -> dict[str, Path]:
    """Their folders."""
    package = Path(__file__).resolve().parents[1]
    folder = package / "shipped_tokenizers"
    if not folder.is_dir():
        folder = package.parents[1] / "tokenizers"
    return {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{NOTE}"))}


def tokenizer_folder(path_or_name: str | Path) -> Path:
    """The folder that is meant: what stands at a path, else what comes along under that name."""
    path = Path(path_or_name)
    return path if path.exists() else shipped_tokenizers().get(str(path_or_name), path)
