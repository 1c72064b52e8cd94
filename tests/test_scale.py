"""`motionloom scale`: a study in small, what it leaves behind, how it goes on, and its arithmetic."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import motionloom.cli.train as train_command
from motionloom.cli.console import Out
from motionloom.cli.main import main
from motionloom.cli.scale_files import alone
from motionloom.cli.scale_point import Job, Outcome
from motionloom.cli.scale_report import write_report
from motionloom.config.study import Study, load_study, packaged_studies
from motionloom.config.yaml_text import write_yaml
from motionloom.data.cache import open_cache
from motionloom.data.shapeworld import World, write_dataset
from motionloom.errors import UserError
from motionloom.evals.scaling import Spread, as_loss, over_seeds, power_law, step_operations
from motionloom.rng import numpy_rng
from motionloom.studio.page import line_chart
from motionloom.tokenizers.vtp import PRESETS, VTPModel
from motionloom.train.method import Losses
from motionloom.train.stepper import Stepper

CLIPS = 12
BOTH = {
    "video": {"num_frames": 9, "width": 32, "height": 32},
    "train": {
        "batch_size": 4,
        "warmup_steps": 0,
        "compile": False,
        "precision": "fp32",
        "save_every_steps": 1,
        "heldout_fraction": 0.0,
    },
}
SMALL_VTP = {
    "patch": 8,
    "channels": 8,
    "width": 32,
    "depth": 1,
    "heads": 2,
    "context": 24,
    "text_width": 16,
    "text_depth": 1,
    "text_heads": 2,
    "clip_near": 0,
    "words": 0.0,
    "rec_start": 0.0,
    "global_size": 16,
    "local_size": 8,
    "prototypes": 16,
    "head_hidden": 16,
    "head_bottleneck": 8,
}
SMALL_GENERATOR = [
    *("model.dim=32", "model.depth=1", "model.num_heads=2", "text_encoder.dim=8"),
    *("train.max_steps=2", "train.sample_num_steps=2"),
]
VARIANTS: dict[str, Any] = {"rec": {"vtp.clip": 0, "vtp.ssl": 0}, "all": ["vtp.clip=1", "vtp.ssl=1"]}


class Answer:
    """What a command left behind."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def value(self) -> dict[str, Any]:
        """The one JSON object on stdout."""
        assert self.out.count("\n") == 1, self.out
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value

    def point(self, name: str) -> dict[str, Any]:
        (found,) = [one for one in self.value["points"] if one["name"] == name]
        return dict(found)


def call(*arguments: str | Path) -> Answer:
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = ["motionloom", *map(str, arguments)]
    code: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = before
    return Answer(code, out.getvalue(), err.getvalue())


def tree(place: Path, **changes: Any) -> dict[str, Any]:
    """A study of toys."""
    manifest = str(place / "manifest.jsonl")
    plain = {
        "tokenizer": "vtp_shapeworld",
        "train": manifest,
        "test": manifest,
        "clips": 3,
        "world": "quickstart",
        "extractor": "color-histogram",
        "lpips": "none",
        "both": BOTH,
        "for_tokenizer": {"vtp": SMALL_VTP},
        "for_generator": SMALL_GENERATOR,
        "variants": VARIANTS,
        "budgets": [{"1x": {"train.max_steps": 2}}],
    }
    return {**plain, **changes}


def written(folder: Path, study: dict[str, Any]) -> Path:
    path = folder / "study.yaml"
    path.write_text(write_yaml(study))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_dataset(folder, World.quickstart(32, 9), CLIPS, seed=3)
    return folder


@pytest.fixture(scope="module")
def studied(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Answer]:
    """The folder of a study that was run, and what it answered."""
    folder = tmp_path_factory.mktemp("study")
    return folder / "out", call("scale", written(folder, tree(world)), "--out", folder / "out", "--json")


@pytest.fixture
def copied(studied: tuple[Path, Answer], tmp_path: Path) -> Path:
    """The same folder, to be gone on with."""
    return Path(shutil.copytree(studied[0], tmp_path / "out"))


# A whole study


def test_a_study_is_trained_judged_and_written(studied: tuple[Path, Answer]) -> None:
    out, answer = studied
    assert answer.code == 0, answer.err
    assert answer.value["measure"] == ["generation/oracle: all"]
    assert [(one["name"], one["state"], one["steps"]) for one in answer.value["points"]] == [
        ("rec_1x_0", "done", 2),
        ("all_1x_0", "done", 2),
    ]
    for point in answer.value["points"]:
        figures = point["figures"]
        assert all(math.isfinite(value) for value in figures.values())
        assert {"generation/oracle: all", "generation/FID", "generation/KID, floor"} <= figures.keys()
        assert figures["reconstruction/psnr (dB)"] > 0
        for part in ("tokenizer/tokenizer.json", "generation/evaluated.json", "reconstruction/sheet.png"):
            assert (out / "points" / point["name"] / part).is_file(), part
    assert answer.point("all_1x_0")["operations"] > answer.point("rec_1x_0")["operations"] > 1e7
    assert len([path for path in (out / "caches").iterdir() if path.is_dir()]) == 1, (
        "both read the same clips"
    )
    assert "point 2 of 2 (all, 1x, seed 0): training the tokenizer" in answer.err
    kept = json.loads((out / "scaled.json").read_text())
    assert kept["points"] == answer.value["points"]
    page = (out / "scaled.html").read_text()
    assert page.count("<circle") == 2
    assert "rec" in page
    assert ElementTree.parse(out / "scaled.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_the_generator_is_given_the_shape_of_the_tokenizer(studied: tuple[Path, Answer]) -> None:
    cache = open_cache(studied[0] / "points" / "rec_1x_0" / "latents")
    assert cache.latent_shape(next(iter(cache.buckets))) == (3, 4, 4, 8)  # 1 + 2 x 4 frames, 32 / 8 cells


def test_a_second_call_computes_nothing(studied: tuple[Path, Answer], copied: Path, world: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (copied / "points").rglob("*")}
    again = call("scale", written(copied.parent, tree(world)), "--out", copied, "--json")
    assert again.code == 0
    assert again.err == ""
    assert again.value["points"] == studied[1].value["points"]
    assert {path: path.stat().st_mtime_ns for path in (copied / "points").rglob("*")} == before


def test_people_get_the_tables(copied: Path, world: Path) -> None:
    text = call("scale", written(copied.parent, tree(world)), "--out", copied).out
    assert "means, and least .. largest of the seeds" in text
    assert "generation/oracle: all" in text
    assert str(copied / "scaled.svg") in text


def test_a_dry_run_lists_what_each_point_will_cost(
    studied: tuple[Path, Answer], world: Path, tmp_path: Path
) -> None:
    answer = call("scale", written(tmp_path, tree(world)), "--out", tmp_path / "out", "--dry-run", "--json")
    for point in answer.value["points"]:
        assert point["operations"] == studied[1].point(point["name"])["operations"]
    assert not (tmp_path / "out").exists()


def test_steps_that_rebuild_nothing_cost_less(world: Path, tmp_path: Path) -> None:
    shares = {"whole": 0.0, "half": 0.5, "late": 0.75}
    variants = {name: {"vtp.ssl": 0, "vtp.rec_start": share} for name, share in shares.items()}
    study = written(tmp_path, tree(world, variants=variants))
    answer = call("scale", study, "--out", tmp_path / "out", "--dry-run", "--json")
    whole, half, late = (answer.point(f"{name}_1x_0")["operations"] for name in variants)
    assert half < whole
    assert half - late == pytest.approx((whole - half) / 2)


# Going on


def test_a_study_that_was_killed_goes_on_to_the_same_figures(
    studied: tuple[Path, Answer], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = written(tmp_path, tree(world, variants={"rec": VARIANTS["rec"]}))
    step = Stepper.step

    def killed(self: Stepper, number: int, *rest: Any) -> None:
        if number == 1:
            raise KeyboardInterrupt
        step(self, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "step", killed)
        first = call("scale", study, "--out", tmp_path / "out", "--json")
    assert first.code == 130
    assert "the same command goes on from there" in first.err
    again = call("scale", study, "--out", tmp_path / "out", "--json")
    assert again.code == 0, again.err
    assert "resumed from" in again.err
    assert "caching pixels" not in again.err
    for key in ("figures", "operations", "steps"):
        assert again.point("rec_1x_0")[key] == studied[1].point("rec_1x_0")[key], key


def test_a_point_that_fails_is_listed_and_the_others_go_on(copied: Path, world: Path) -> None:
    wild = {**VARIANTS["rec"], "train.lr": 1e30, "train.rest_lr": 1e30}
    study = written(copied.parent, tree(world, variants={"wild": wild, "rec": VARIANTS["rec"]}))
    answer = call("scale", study, "--out", copied, "--json")
    assert answer.code == 1
    point = answer.point("wild_1x_0")
    assert "not finite" in point["reason"]
    assert (point["state"], point["figures"], point["operations"]) == ("failed", {}, None)
    assert "\n" not in point["reason"]
    assert answer.point("rec_1x_0")["state"] == "done"
    assert f"point 1 of 2 (wild, 1x, seed 0) failed: {point['reason']}" in answer.err
    assert [one["variant"] for one in answer.value["means"]] == ["rec"]


def test_a_defect_leaves_its_traceback_beside_the_point(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no such thing\nat all")

    monkeypatch.setattr(train_command, "run", broken)
    half = {"half": {"data": 0.5, "train.max_steps": 2}, "whole": ["train.max_steps=2", "data=1"]}
    study = written(tmp_path, tree(world, variants={"rec": VARIANTS["rec"]}, budgets=half))
    answer = call("scale", study, "--out", tmp_path / "out", "--json")
    assert answer.code == 1
    file = tmp_path / "out" / "points" / "rec_half_0" / "failed.txt"
    assert answer.point("rec_half_0")["reason"] == f"RuntimeError: no such thing ({file} tells where)"
    assert "Traceback" in file.read_text()
    caches = [open_cache(path) for path in (tmp_path / "out" / "caches").iterdir() if path.is_dir()]
    few, many = sorted((set(cache.ids) for cache in caches), key=len)
    assert (len(few), len(many)) == (CLIPS // 2, CLIPS)
    assert few < many


def test_a_point_whose_settings_changed_is_refused(copied: Path, world: Path) -> None:
    wider = {**VARIANTS, "all": ["vtp.clip=1", "vtp.ssl=1", "vtp.width=48"]}
    answer = call("scale", written(copied.parent, tree(world, variants=wider)), "--out", copied, "--json")
    assert answer.code == 1
    assert answer.point("rec_1x_0")["state"] == "done"
    reason = answer.point("all_1x_0")["reason"]
    assert "begun with tokenizer: vtp.width 32 and the study now says 48" in reason
    assert "delete that folder" in reason


# Damage, and disk that was freed


BIG = ("tokenizer_run", "generator_run", "tokenizer", "latents")


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever trains fails the test."""

    def trained(*_: Any) -> None:
        raise AssertionError("it was trained again")

    monkeypatch.setattr(train_command, "run", trained)


def older(out: Path) -> None:
    """As a study that kept nothing of its points but what their stages left behind."""
    for path in out.glob("points/*/outcome.json"):
        path.unlink()


@pytest.mark.usefixtures("untrained")
def test_finished_points_outlive_what_was_freed(
    studied: tuple[Path, Answer], copied: Path, world: Path
) -> None:
    for part in BIG:
        shutil.rmtree(copied / "points" / "rec_1x_0" / part)
    shutil.rmtree(copied / "caches")
    shutil.rmtree(copied / "points" / "all_1x_0" / "tokenizer_run" / "checkpoints")
    shutil.rmtree(copied / "points" / "all_1x_0" / "generation")
    shutil.rmtree(copied / "points" / "all_1x_0" / "generator_run")
    again = call("scale", written(copied.parent, tree(world)), "--out", copied, "--json")
    assert again.code == 0, again.err
    assert again.value["points"] == studied[1].value["points"]
    assert again.err == ""


@pytest.mark.usefixtures("untrained")
def test_points_of_an_older_study_are_read_and_kept(
    studied: tuple[Path, Answer], copied: Path, world: Path
) -> None:
    older(copied)
    for part in BIG:
        shutil.rmtree(copied / "points" / "rec_1x_0" / part)
    study = written(copied.parent, tree(world))
    again = call("scale", study, "--out", copied, "--json")
    assert again.code == 0, again.err
    assert again.value["points"] == studied[1].value["points"]
    assert again.err == ""
    for name in ("rec_1x_0", "all_1x_0"):
        kept = json.loads((copied / "points" / name / "outcome.json").read_text())
        assert kept == {key: again.point(name)[key] for key in ("operations", "steps", "seconds", "figures")}


def test_a_new_variant_is_tried_whatever_became_of_the_others(copied: Path, world: Path) -> None:
    older(copied)
    shutil.rmtree(copied / "points" / "rec_1x_0" / "tokenizer_run" / "checkpoints")
    (copied / "points" / "all_1x_0" / "stages.json").write_text('{"done": ["pix')
    wider = {**VARIANTS, "none": {"vtp.clip": 0, "vtp.ssl": 0, "vtp.width": 24, "train.max_steps": 1}}
    study = tree(
        world, variants=wider, budgets={"1x": {}}, for_tokenizer={"vtp": SMALL_VTP, "train.max_steps": 2}
    )
    answer = call("scale", written(copied.parent, study), "--out", copied, "--json")
    assert answer.code == 1, answer.err
    states = {one["name"]: one["state"] for one in answer.value["points"]}
    assert states == {"rec_1x_0": "done", "all_1x_0": "failed", "none_1x_0": "done"}
    assert answer.point("rec_1x_0")["steps"] == 2


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(
    "file",
    [
        "stages.json",
        "settings.json",
        "operations.json",
        "generation/evaluated.json",
        "reconstruction/evaluated.json",
        "outcome.json",
    ],
)
def test_a_damaged_file_is_named_and_made_anew_once_deleted(
    file: str, studied: tuple[Path, Answer], copied: Path, world: Path
) -> None:
    study, path = written(copied.parent, tree(world)), copied / "points" / "all_1x_0" / file
    if file != "outcome.json":
        older(copied)
    path.write_bytes(path.read_bytes()[:-30])
    answer = call("scale", study, "--out", copied, "--json")
    assert answer.code == 1, answer.err
    point = answer.point("all_1x_0")
    assert point["reason"] == (
        f"{path}: cannot be read (it was cut short, or is no JSON); delete it, and the same command makes it "
        "anew"
    )
    assert answer.point("rec_1x_0")["state"] == "done"
    path.unlink()
    again = call("scale", study, "--out", copied, "--json")
    assert again.code == 0, again.err
    for key in ("figures", "operations", "steps"):
        assert again.point("all_1x_0")[key] == studied[1].point("all_1x_0")[key], key


@pytest.mark.usefixtures("untrained")
def test_what_was_judged_is_judged_again_where_it_is_gone(
    studied: tuple[Path, Answer], copied: Path, world: Path
) -> None:
    first, second = (copied / "points" / name for name in ("rec_1x_0", "all_1x_0"))
    (first / "outcome.json").unlink()
    shutil.rmtree(first / "generation")
    # Of an evaluation that broke off before its page was written.
    (second / "reconstruction" / "evaluated.html").unlink()
    again = call("scale", written(copied.parent, tree(world)), "--out", copied, "--json")
    assert again.code == 0, again.err
    assert "point 1 of 2 (rec, 1x, seed 0): judging generated clips" in again.err
    assert "point 2 of 2 (all, 1x, seed 0): judging reconstructions" in again.err
    assert again.err.count("judging") == 2
    assert (first / "generation" / "evaluated.html").is_file()
    for name in ("rec_1x_0", "all_1x_0"):
        assert again.point(name)["figures"] == studied[1].point(name)["figures"]


def test_a_study_is_gone_on_with_by_one_call_at_a_time(copied: Path, world: Path) -> None:
    study = written(copied.parent, tree(world))
    with alone(copied):
        answer = call("scale", study, "--out", copied, "--json")
    assert answer.code == 2
    assert answer.err.count("\n") == 1
    assert f"error: {copied}: process {os.getpid()} on {socket.gethostname()} (since 2" in answer.err
    assert "is at work on this study; wait for it to end, or name another --out" in answer.err
    assert call("scale", study, "--out", copied, "--json").code == 0


# The file


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seedz": [1]}, "seedz is not a key; did you mean seeds?"),
        ({"clips": "many"}, 'clips is "many"; expected a whole number of at least 2'),
        ({"seeds": [1, 1]}, "seeds: 1 stands twice"),
        ({"seeds": []}, "seeds is empty"),
        ({"both": ["train.lr"]}, "both: "),
        ({"both": {"seed": 3}}, "seed is decided by the study: leave it out and say seeds"),
        ({"variants": {"a b": []}}, "variants: the name"),
        ({"budgets": [{"1x": {"data": 2}}]}, "budgets.1x.data is 2; expected a number above 0 to 1"),
        ({"budgets": [{"1x": {}}, {"1x": {}}]}, "the budget 1x stands twice"),
        ({"budgets": 3}, "3 is no list of `name: overrides`"),
        ({"variants": {"a": [], "a_b": []}, "budgets": {"b_c": {}, "c": {}}}, "would be called a_b_c_0"),
        ({"world": "", "extractor": "none"}, "nothing to judge by"),
        ({"world": "mars"}, "world mars: choose"),
        ({"extractor": "eyes"}, "encoder eyes: choose"),
        ({"lpips": "squeeze"}, "lpips squeeze: choose vgg, alex, auto or none"),
        ({"train": "nowhere.jsonl"}, "train nowhere.jsonl: no such manifest"),
        ({"tokenizer": "lightning"}, "point rec, 1x, seed 0: "),
        ({"generator": "vtp_shapeworld"}, "point rec, 1x, seed 0: "),
        ({"variants": {"a": {"vtp.widht": 3}}}, "did you mean vtp.width?"),
        ({"variants": {"a": {"vtp.rec": 0, "vtp.clip": 1}}}, "vtp.rec is 0"),
    ],
)
def test_a_wrong_study_ends_in_one_line(
    changes: dict[str, Any], says: str, world: Path, tmp_path: Path
) -> None:
    answer = call("scale", written(tmp_path, tree(world, **changes)), "--out", tmp_path / "out")
    assert answer.code == 2
    assert answer.err.count("\n") == 1, answer.err
    assert says in answer.err
    assert not (tmp_path / "out").exists()


def test_a_study_that_is_not_there_or_lacks_a_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.yaml: cannot be read .*claim, .*curve"):
        load_study(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="train is missing: Manifest of the training clips"):
        load_study(written(tmp_path, {"tokenizer": "vtp_shapeworld", "test": "x"}))


def test_points_lay_overrides_over_one_another(world: Path, tmp_path: Path) -> None:
    budgets = {"1x": {"train.max_steps": 2}, "2x": {"train": {"max_steps": 4}}}
    study = load_study(written(tmp_path, tree(world, seeds=[5, 6], budgets=budgets)))
    points = study.points()
    assert [str(point) for point in points[:3]] == ["rec, 1x, seed 5", "all, 1x, seed 5", "rec, 2x, seed 5"]
    assert len(points) == 8
    assert points[3].tokenizer[-4:] == ("vtp.clip=1", "vtp.ssl=1", "train.max_steps=4", "seed=5")
    assert points[3].generator[-2:] == ("train.sample_num_steps=2", "seed=5")
    assert "video.num_frames=9" in points[0].tokenizer
    assert "video.num_frames=9" in points[0].generator


@pytest.mark.parametrize("name", ["claim", "curve"])
def test_every_study_that_comes_along_is_whole(name: str) -> None:
    assert name in packaged_studies()
    study = load_study(name)
    assert len(study.points()) >= 6
    for point in study.points():
        Job(study, point, Path("nowhere"), Out(as_json=False)).check()


# Operations


class OneLoss:
    """A method whose loss is what a function makes of a network."""

    def __init__(self, net: nn.Module, loss: Any) -> None:
        self.net, self.loss = net, loss

    def modules(self) -> dict[str, nn.Module]:
        return {"net": self.net}

    def beside(self) -> dict[str, nn.Module]:
        return {}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {}

    def turns(self, step: int) -> tuple[str, ...]:
        return ("only",)

    def losses(self, batch: Any, context: Any) -> Losses:
        return Losses(self.loss(self.net))


def counted(net: nn.Module, loss: Any) -> int:
    return step_operations(OneLoss(net, loss), None, 0, torch.device("cpu"))  # type: ignore[arg-type]


def test_operations_are_those_of_the_products_forward_and_backward() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    x = torch.ones(5, 8)
    forward = 2 * 5 * (8 * 16 + 16 * 4)
    weights, inputs = forward, 2 * 5 * 16 * 4  # nobody asks for the gradient of the pixels
    assert counted(net, lambda net: net(x).sum(-1)) == forward + weights + inputs
    assert all(p.grad is None for p in net.parameters())


def test_attention_counts_as_the_products_that_it_is() -> None:
    net = nn.Linear(6, 3 * 6, bias=False)
    x = torch.ones(1, 1, 7, 6)

    def loss(net: nn.Module) -> Tensor:
        q, k, v = net(x).chunk(3, dim=-1)
        return nn.functional.scaled_dot_product_attention(q, k, v).flatten(1).sum(-1)

    linear, pairs = 2 * 7 * 6 * 18, 2 * 7 * 7 * 6
    assert counted(net, loss) == 2 * linear + 2 * pairs + 4 * pairs


def test_a_released_size_costs_what_its_layers_say() -> None:
    """VTP-S at 256 x 256: 12.3 G forward through the encoder and 12.2 G through the decoder."""
    config = PRESETS["S"]
    with torch.device("meta"):
        model = VTPModel(config)
        x = torch.empty(1, 3, 256, 256)

    def loss(model: nn.Module) -> Tensor:
        return model.get_latents_decoded_images(model.get_reconstruction_latents(x)).flatten(1).mean(1)  # type: ignore[operator]

    assert counted(model, loss) == pytest.approx(3 * 24.5e9, rel=0.01)


# Arithmetic


def test_a_power_law_is_found_exactly_where_there_is_one() -> None:
    x = [1e9, 3e9, 1e10, 7e10]
    law = power_law(x, [5 * value**-0.3 for value in x])
    assert law is not None
    assert (law.a, law.b, law.points) == (pytest.approx(5), pytest.approx(-0.3), 4)
    assert law(2e9) == pytest.approx(5 * 2e9**-0.3)


def test_a_power_law_is_the_nearest_in_logarithms() -> None:
    rng = numpy_rng("power law")
    x, y = 10 ** rng.uniform(8, 12, 30), 10 ** rng.uniform(-2, 1, 30)
    law = power_law(list(x), list(y))
    slope, level = np.polyfit(np.log(x), np.log(y), 1)
    assert law is not None
    assert (law.b, math.log(law.a)) == (pytest.approx(slope), pytest.approx(level))


def test_a_power_law_needs_three_budgets_and_losses_above_nothing() -> None:
    assert power_law([1, 2, 2], [3, 2, 2]) is None
    assert power_law([1, 2, 3], [3, -1, 2]) is None
    # Seeds of one budget, whose vocabularies differ by a word.
    assert power_law([2.3938e13, 2.3942e13, 2.3935e13], [0.48, 0.40, 0.46]) is None
    # Steeper than any number says.
    assert power_law([1e30, 1.2e30, 1.5e30], [1.0, 1e-30, 1e-60]) is None
    law = power_law([1, 2, 3, 4], [1, 1 / 2, float("nan"), 1 / 4])
    assert law is not None
    assert (law.b, law.points) == (pytest.approx(-1), 3)


def test_figures_as_losses() -> None:
    assert as_loss("generation/oracle: all", 0.75) == 0.25
    assert as_loss("reconstruction/ssim", 0.9) == pytest.approx(0.1)
    assert as_loss("reconstruction/psnr (dB)", 20) == pytest.approx(0.01)
    assert as_loss("generation/FID", 3.0) == 3.0


def test_figures_over_seeds() -> None:
    found = over_seeds([{"a": 1.0, "b": 2.0}, {"a": 4.0}])
    assert found == {"a": Spread(2.5, 1.0, 4.0, 2), "b": Spread(2.0, 2.0, 2.0, 1)}


# The plot


def corners(svg: str) -> Iterator[float]:
    points = svg.split('points="')[1].split('"')[0]
    return (float(point.split(",")[0]) for point in points.split())


def test_a_logarithmic_axis_sets_equal_ratios_equally_far_apart() -> None:
    line = [(0.0, 1.0), (1e3, 1.0), (1e4, 2.0), (1e5, 3.0)]
    svg = line_chart({"all": line}, "operations", log_x=True, dots={"all": [(1e5, 6.0), (1e4, float("nan"))]})
    left, middle, right = corners(svg)
    assert middle - left == pytest.approx(right - middle, abs=0.11)
    assert svg.count("<circle") == 1
    assert "logarithmic" in svg


def test_every_line_is_drawn_however_many() -> None:
    lines = {f"line {n}": [(0.0, 1.0), (1.0, 2.0)] for n in range(7)}
    assert line_chart(lines, "step").count("<polyline") == 7


def test_equal_efforts_stand_side_by_side() -> None:
    """Operations of two variants that differ by a thousandth, on an axis of a factor of four."""
    ends = {"rec": [(2.384e13, 0.5)], "all": [(2.386e13, 0.6)]}
    svg = line_chart(ends, "operations", log_x=True, dots=ends)
    first, second = (float(x) for x in re.findall(r'<circle cx="([\d.]+)"', svg))
    assert 0 < second - first < 2
    assert "operations 1.192e+13" in svg


def test_every_line_of_a_report_is_of_points_that_came_to_an_end(world: Path, tmp_path: Path) -> None:
    """Three budgets on an exact power law, one failed point, and means over two seeds."""
    budgets = {f"{n}x": {"train.max_steps": n} for n in (1, 2, 4)}
    study = load_study(written(tmp_path, tree(world, seeds=[0, 1], budgets=budgets)))
    outcomes = []
    for point in study.points():
        cost = int(point.budget[0]) * 1_000_000
        lacking = 200 * cost**-0.5 * (2 if point.variant == "all" else 1)
        found = Outcome(point, cost, cost // 10**6, 1.0, {"generation/oracle: all": 1 - lacking})
        wrong = point.name == "rec_4x_1"
        outcomes.append(Outcome(point, failed="it broke") if wrong else found)
    answer, tables = write_report(study, outcomes, tmp_path)
    laws = {law["variant"]: law for law in answer["power_laws"]}
    assert (laws["rec"]["b"], laws["rec"]["a"], laws["rec"]["points"]) == (
        pytest.approx(-0.5),
        pytest.approx(200),
        5,
    )
    assert (laws["all"]["b"], laws["all"]["a"], laws["all"]["points"]) == (
        pytest.approx(-0.5),
        pytest.approx(400),
        6,
    )
    means = {(one["variant"], one["budget"]): one["figures"] for one in answer["means"]}
    assert means["rec", "4x"]["generation/oracle: all"]["count"] == 1
    assert means["rec", "1x"]["generation/oracle: all"]["mean"] == pytest.approx(0.8)
    assert [title for title, _, _ in tables][-1].startswith("loss = a * operations^b")
    assert "it broke" in (tmp_path / "scaled.html").read_text()


def test_every_key_of_a_study_is_explained() -> None:
    guide = (Path(__file__).parents[1] / "docs" / "tokenizers.md").read_text("utf-8")
    table = guide.split("| key of a study | meaning |\n")[1].split("\n\n")[0]
    told = {name for row in table.splitlines()[1:] for name in re.findall(r"`(\w+)`", row.split(" | ")[0])}
    assert told == Study.model_fields.keys()
