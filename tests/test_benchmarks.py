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
