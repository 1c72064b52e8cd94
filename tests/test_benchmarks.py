"""The device benchmark runs from end to end on whatever there is; its figures mean nothing at toy widths."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
def test_backbones_are_measured_beside_their_peers() -> None:
    command = [sys.executable, str(BENCHMARKS / "backbones.py"), "--tiny", "--eager", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found["train"]) == {"wan", "cogvideox", "ltx2"}
    assert all(row["seconds"] > 0 and row["peer_seconds"] > 0 for row in found["train"].values())
    assert found["stream"]["ours"]["fps_with_decoding"] < found["stream"]["ours"]["fps"]


@pytest.mark.slow
@pytest.mark.parametrize("wan", [False, True])
def test_streams_are_measured_beside_other_ways(wan: bool) -> None:
    quick = ["--wan"] if wan else ["--steps", "4", "--times", "2"]
    command = [sys.executable, str(BENCHMARKS / "streaming.py"), "--tiny", "--rounds", "1", *quick, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    if wan:
        found = found["wan"]
        assert found["with decoding"]["frames/s"] < found["without decoding"]["frames/s"]
        assert found["without a cache"]["frames/s"] > 0
        return
    # Four guided steps over the whole clip, against four and a clean pass over each chunk.
    ratio = found["ratios"]["times fewer evaluations a clip"]
    assert ratio["median"] == pytest.approx(2 * 4 / 5, rel=0.05)
    assert ratio["met"] is False
    assert found["long"]["most memory, MB"] > 0


@pytest.mark.slow
def test_tokenizers_are_measured_bare_and_through_the_cache() -> None:
    quick = ["--layers", "1", "--size", "32", "--clips", "4", "--rounds", "1", "--latents", "8"]
    command = [sys.executable, str(BENCHMARKS / "tokenizer.py"), *quick, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["encoding"]["ratio"] > 0
    assert found["decoding"]["constant"]
