"""A wheel holds what the checkout holds, and works where no checkout is."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from motionloom.tokenizers import shipped_tokenizers

ROOT = Path(__file__).parents[1]
PARTS = ("src", "recipes", "studies", "tokenizers")
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")


@pytest.mark.slow
def test_a_wheel_has_every_module_recipe_study_and_tokenizer(tmp_path: Path) -> None:
    source, unpacked = tmp_path / "source", tmp_path / "unpacked"
    for part in PARTS:
        shutil.copytree(
            ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    for file in FILES:
        shutil.copy(ROOT / file, source / file)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, source]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    inside = {
        "src/motionloom": "",
        "tokenizers": "shipped_tokenizers",
        "recipes": "recipes",
        "studies": "studies",
    }
    for part, where in inside.items():
        for path in (source / part).rglob("*"):
            if path.is_file():
                copied = unpacked / "motionloom" / where / path.relative_to(source / part)
                assert copied.read_bytes() == path.read_bytes(), path

    ask = (
        "import motionloom; from motionloom.config import load_recipe; "
        "from motionloom.tokenizers import shipped_tokenizers; "
        "load_recipe('quickstart'); print(motionloom.__file__, *shipped_tokenizers())"
    )
    said = subprocess.run(
        [sys.executable, "-c", ask],
        env={"PYTHONPATH": str(unpacked)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    where, *found = said.stdout.split()
    assert Path(where).is_relative_to(unpacked)
    assert found == list(shipped_tokenizers())
