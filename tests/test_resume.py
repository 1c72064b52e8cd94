"""The golden rule: N steps equal k steps + SIGKILL + resume + N - k, to the bit; on one rank and on two."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from motionloom.errors import UserError
from motionloom.rng import numpy_rng
from motionloom.train import checkpoint
from toy_training import metrics, toy_recipe, toy_trainer

PROGRAM = Path(__file__).with_name("toy_training.py")
STEPS = 60
RECIPE = {"max_steps": STEPS, "save_every_steps": 7, "heldout_every_steps": 25, "ema__start_step": 10}
TWO_RANKS = {"sharding": "fsdp", "grad_accum_steps": 4, "schedule": "cosine", "warmup_steps": 5}
TIMED = {"samples_per_second", "tokens_per_second", "peak_memory_gib"}


def start(ranks: int, *args: str, program: Path = PROGRAM) -> subprocess.Popen[str]:
    """A program of the tests, under torchrun when it has several ranks, in a process group of its own."""
    command = [sys.executable, str(program), *args]
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        rendezvous = ["--master_addr", "127.0.0.1", "--master_port", str(port)]
        command[1:1] = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), *rendezvous]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(process: subprocess.Popen[str], timeout: float = 60) -> str:
    """Its output; it must end well."""
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    return output


def kill_after(process: subprocess.Popen[str], run_dir: Path, step: int, delay: float) -> None:
    """SIGKILL the launcher and every rank a moment after ``step`` shows in the metrics."""
    deadline = time.monotonic() + 60
    lines = run_dir / "metrics.jsonl"
    while not (lines.exists() and lines.read_text().count("\n") >= step):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run never got so far"
        time.sleep(0.001)
    time.sleep(delay)
    ranks = [int(path.read_text()) for path in run_dir.glob("*.pid")]
    for pid in {process.pid, *ranks}:
        os.kill(pid, signal.SIGKILL)
    process.communicate()


def same_tensors(a: Path, b: Path, name: str) -> None:
    """Both files hold the same names with the same bits."""
    one, two = checkpoint.load(a).tensors(name), checkpoint.load(b).tensors(name)
    assert one.keys() == two.keys()
    assert len(one) > 10
    for key in one:
        assert torch.equal(one[key], two[key]), f"{name}: {key}"


def figures(run_dir: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMED} for line in metrics(run_dir)]


def killed_and_whole(folder: Path, ranks: int, recipe: dict[str, Any], program: str) -> tuple[Path, Path]:
    """(a run that was never stopped, the same run killed at a random moment and resumed)."""
    text = json.dumps(recipe)
    whole, killed = folder / "whole", folder / "killed"
    rng = numpy_rng("kill", ranks)
    finish(start(ranks, program, str(whole), text))
    slow = start(ranks, "fit", str(killed), text, "--pause", "0.03")
    kill_after(slow, killed, step=int(rng.integers(8, 36)), delay=float(rng.uniform(0, 0.06)))
    reached = max(line["step"] for line in metrics_so_far(killed))
    assert reached < STEPS, "the kill came too late to prove anything"
    saved = checkpoint.latest(killed)
    assert saved is not None
    assert 0 < checkpoint.load(saved).step < STEPS
    finish(start(ranks, "fit", str(killed), text, "--resume"))
    return whole, killed


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return killed_and_whole(tmp_path_factory.mktemp("one"), 1, RECIPE, "fit")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Sharded with FSDP2 (the text table with DDP); the first run compares gradients as well."""
    return killed_and_whole(tmp_path_factory.mktemp("two"), 2, {**RECIPE, **TWO_RANKS}, "compare")


@pytest.fixture(params=["one_rank", "two_ranks"])
def runs(request: pytest.FixtureRequest) -> tuple[Path, Path]:
    return request.getfixturevalue(request.param)


def metrics_so_far(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def test_killed_and_resumed_equals_never_stopped(runs: tuple[Path, Path]) -> None:
    whole, killed = runs
    a, b = checkpoint.latest(whole), checkpoint.latest(killed)
    assert a is not None
    assert b is not None
    assert a.name == b.name == checkpoint.name_of(STEPS)
    for name in ("model", "ema", "optimizer"):
        same_tensors(a, b, name)
    states = [checkpoint.load(folder).state["train"] for folder in (a, b)]
    for key in ("step", "micro_batches", "samples"):
        assert states[0][key] == states[1][key]


def test_metrics_tell_each_step_once_and_the_same(runs: tuple[Path, Path]) -> None:
    whole, killed = runs
    assert [line["step"] for line in metrics(killed)] == list(range(1, STEPS + 1))
    assert figures(killed) == figures(whole)


def test_weights_and_averages_moved(runs: tuple[Path, Path]) -> None:
    """Equal files would prove nothing if training did nothing."""
    whole, _ = runs
    first, last = checkpoint.checkpoints(whole)[0], checkpoint.checkpoints(whole)[-1]
    model, ema = checkpoint.load(last).tensors("model"), checkpoint.load(last).tensors("ema")
    assert first != last
    earlier = checkpoint.load(first).tensors("model")
    assert all(not torch.equal(model[k], earlier[k]) for k in model if "places" not in k)
    assert any(not torch.equal(model[k], ema[k]) for k in model)


def test_another_world_size_is_refused(two_ranks: tuple[Path, Path]) -> None:
    recipe = toy_recipe(**{**RECIPE, **TWO_RANKS})
    with pytest.raises(UserError, match=r"world was 2, is 1.*train\.init_from"):
        toy_trainer(recipe, two_ranks[0]).fit(resume=True)


def test_lr_follows_optimiser_steps(two_ranks: tuple[Path, Path], tmp_path: Path) -> None:
    """With two ranks and accumulation 4 the rates are those of one process without."""
    toy_trainer(toy_recipe(**{**RECIPE, **TWO_RANKS, "grad_accum_steps": 1}), tmp_path).fit()
    one, two = ([line["lr"] for line in metrics(run)] for run in (tmp_path, two_ranks[0]))
    assert one == two
    assert len(set(one)) > 50


def test_gradients_on_two_ranks_equal_one_process(two_ranks: tuple[Path, Path]) -> None:
    """DDP and FSDP2, with accumulation, against one process that plays both ranks."""
    found = json.loads((two_ranks[0] / "found.json").read_text())
    assert found["world"] == 2
    assert found["single"]["norm"] > 0.1
    for sharding in ("ddp", "fsdp"):
        assert found[sharding]["same_names"]
        assert found[sharding]["difference"] < 1e-5
        assert found[sharding]["norm"] == pytest.approx(found["single"]["norm"], rel=1e-5)
        assert found[sharding]["clipped"] == pytest.approx(0.1, rel=1e-4)
