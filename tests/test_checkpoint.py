"""Checkpoints are whole or absent, damage is told in one line, and nothing unpickles."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from motionloom.errors import UserError
from motionloom.methods import Denoise
from motionloom.parallel import Ranks
from motionloom.plans import TextToVideo
from motionloom.text import load_text_encoder
from motionloom.text.hash import HashEncoder
from motionloom.train import checkpoint
from motionloom.train.checkpoint import Contents
from motionloom.train.snapshot import start_from
from motionloom.train.tensors import TensorFile
from toy_training import WIDTH, Listener, Regression, ToyBackbone, metrics, toy_recipe, toy_trainer


class Killed(BaseException):
    """As little can be done about it as about SIGKILL: nothing in the code under test catches it."""


class Note:
    """Something that a checkpoint carries."""

    def save(self, folder: Path) -> None:
        (folder / "note.txt").write_text("hello")


class FullDisk:
    def save(self, folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def contents(step: int, size: int = 4, **folders: Any) -> Contents:
    weights = {"net.weight": torch.full((size,), float(step))}
    tensors = {"model": weights, "optimizer": {"main/net.weight/step": torch.tensor(1.0)}}
    return Contents(step, {"step": step}, "seed: 1\n", tensors, folders or {"tokenizer": Note()})


def test_comes_back_as_it_was(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, contents(60))
    assert folder == tmp_path / "checkpoints" / "step_00000060"
    for path in (folder, tmp_path):
        back = checkpoint.load(path)
        assert back.step == 60
        assert back.recipe == "seed: 1\n"
        assert torch.equal(back.tensors("model")["net.weight"], torch.full((4,), 60.0))
        assert not back.has_ema
    assert (folder / "tokenizer" / "note.txt").read_text() == "hello"
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert there == {*listed, "manifest.json"}


def notes(run: Path, *steps: int) -> list[Path]:
    """What some checkpoints of a run carry beside weights, saved now."""
    return [checkpoint.save(run, contents(step)) / "tokenizer" / "note.txt" for step in steps]


def test_what_stays_the_same_takes_room_once_in_a_run(tmp_path: Path) -> None:
    first, second = notes(tmp_path / "run", 20, 40)
    assert second.samefile(first)
    assert not any(name.startswith(".") for name in os.listdir(second.parent))
    checkpoint.purge(tmp_path / "run", keep=1)
    (third,) = notes(tmp_path / "run", 60)
    assert third.samefile(second)
    assert second.stat().st_nlink == 2
    checkpoint.load(tmp_path / "run")
    (elsewhere,) = notes(tmp_path / "other", 60)
    assert not elsewhere.samefile(third)


def test_a_run_shares_no_file_with_anything_else(tmp_path: Path) -> None:
    """A user may write over a file of theirs where it stands."""
    (first,) = notes(tmp_path, 20)
    (tmp_path / "mine.txt").hardlink_to(first)
    (second,) = notes(tmp_path, 40)
    assert not second.samefile(first)
    (tmp_path / "mine.txt").write_text("other")
    (third,) = notes(tmp_path, 60)
    assert third.samefile(second)
    second.write_text("hullo")  # damaged: it is not passed on
    (fourth,) = notes(tmp_path, 80)
    assert fourth.read_text() == "hello"


def test_killed_between_any_two_writes_it_is_whole_or_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call that touches the disk's order is made to be the last one, in turn."""
    calls, deadly = 0, 0

    def counting(name: str) -> None:
        real: Callable[..., Any] = getattr(os, name)

        def wrapped(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == deadly:
                raise Killed
            return real(*args)

        monkeypatch.setattr(os, name, wrapped)

    for name in ("fsync", "rename"):
        counting(name)
    checkpoint.save(tmp_path / "once", contents(2))
    in_all, outcomes = calls, []
    assert in_all > 6
    for deadly in range(1, in_all + 1):
        run = tmp_path / str(deadly)
        calls = -in_all  # the first checkpoint is not disturbed
        checkpoint.save(run, contents(1))
        calls = 0
        with pytest.raises(Killed):
            checkpoint.save(run, contents(2))
        outcomes.append(checkpoint.load(run).step)
        checkpoint.clean(run)
        left = {path.name for path in (run / "checkpoints").iterdir()}
        assert left == {checkpoint.name_of(step) for step in range(1, outcomes[-1] + 1)}
    assert outcomes == [1] * (in_all - 1) + [2], "only the flush after the rename may come too late to matter"


def test_keeps_the_newest_and_never_the_fewest(tmp_path: Path) -> None:
    for step in (7, 14, 100000007, 21):
        checkpoint.save(tmp_path, contents(step))
    assert checkpoint.purge(tmp_path, keep=3) == []
    assert [checkpoint.load(folder).step for folder in checkpoint.checkpoints(tmp_path)] == [
        14,
        21,
        100000007,
    ]
    checkpoint.purge(tmp_path, keep=0)
    assert [checkpoint.load(folder).step for folder in checkpoint.checkpoints(tmp_path)] == [100000007]
    assert checkpoint.load(tmp_path).step == 100000007


def test_a_checkpoint_that_will_not_go_is_only_remarked_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = Listener()
    recipe = toy_recipe(max_steps=3, save_every_steps=1, keep_checkpoints=1)

    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if target.name.endswith(".tmp"):
            raise OSError(errno.EACCES, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    toy_trainer(recipe, tmp_path, method=Regression(), reporter=listener).fit()
    assert [checkpoint.load(folder).step for folder in checkpoint.checkpoints(tmp_path)] == [1, 2, 3]
    complaints = [note for note in listener.notes if "could not be removed: Permission denied" in note]
    assert len(complaints) == 3, "of step 1 twice and of step 2 once"


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The kernel refuses to let any file grow beyond ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_leaves_the_older_checkpoint_and_no_half_one(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, contents(1))
    full = r"step_00000002 was not written: the disk is full; free some space.*step_00000001 is untouched"
    with files_of_at_most(100_000), pytest.raises(UserError, match=full):
        checkpoint.save(tmp_path, contents(2, size=100_000))
    with pytest.raises(UserError, match=full):
        checkpoint.save(tmp_path, contents(2, tokenizer=FullDisk()))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    assert checkpoint.load(tmp_path).step == 1
    checkpoint.save(tmp_path, contents(2, size=100_000))
    assert checkpoint.load(tmp_path).step == 2


def test_full_disk_is_told_in_one_line_wherever_it_shows(tmp_path: Path) -> None:
    """A run goes on from its last checkpoint once there is room."""
    run(tmp_path)
    with files_of_at_most(3_000), pytest.raises(UserError, match=r"make room|free some space") as caught:
        toy_trainer(toy_recipe(max_steps=200), tmp_path).fit(resume=True)
    assert "\n" not in str(caught.value)
    assert toy_trainer(toy_recipe(max_steps=4), tmp_path).fit(resume=True).step == 4
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4]


def damage(folder: Path, kind: str) -> None:
    model = folder / "model.safetensors"
    data = model.read_bytes()
    manifest = json.loads((folder / "manifest.json").read_text())
    match kind:
        case "truncated":
            model.write_bytes(data[:-5])
        case "changed":
            model.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        case "missing":
            model.unlink()
        case "no manifest":
            (folder / "manifest.json").unlink()
        case "broken manifest":
            (folder / "manifest.json").write_text("{")
        case "future format":
            (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
        case "points outside":
            files = {"../../../outside": {"bytes": 0, "sha256": ""}}
            (folder / "manifest.json").write_text(json.dumps({**manifest, "files": files}))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("truncated", r"model\.safetensors has \d+ bytes instead of \d+: copy .* again, or remove it"),
        ("changed", r"model\.safetensors was changed after it was written"),
        ("missing", r"model\.safetensors is missing: copy"),
        ("no manifest", r"holds no whole checkpoint \(no manifest\.json\)"),
        ("broken manifest", r"manifest\.json cannot be read"),
        ("future format", r"is of format 99, this version reads 1"),
        ("points outside", r"manifest\.json is damaged at '\.\./\.\./\.\./outside'"),
    ],
)
def test_damage_is_told_in_one_line(tmp_path: Path, kind: str, said: str) -> None:
    folder = checkpoint.save(tmp_path, contents(1))
    damage(folder, kind)
    with pytest.raises(UserError, match=said) as caught:
        checkpoint.load(folder)
    assert "\n" not in str(caught.value)


def test_what_is_no_checkpoint_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such checkpoint"):
        checkpoint.load(tmp_path / "nothing")
    (tmp_path / "weights.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(UserError, match="is a file: name the checkpoint's folder"):
        checkpoint.load(tmp_path / "weights.safetensors")


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    """Neither by name nor in disguise; a bomb would leave its mark."""
    mark = tmp_path / "exploded"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {mark}",)

    for name in ("model.pt", "model.ckpt", "disguised.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
        for opening in (checkpoint.load, TensorFile):
            with pytest.raises(UserError, match="is a pickle and is not opened"):
                opening(tmp_path / name)
    torch.save({"a": torch.ones(1)}, tmp_path / "zipped")
    with pytest.raises(UserError, match="is a pickle"):
        checkpoint.load(tmp_path / "zipped")
    assert not mark.exists()


def test_tensor_files_that_are_not_whole_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.safetensors is not a whole safetensors file"):
        TensorFile(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="no such file"):
        TensorFile(tmp_path / "b.safetensors")


def run(folder: Path, **train: Any) -> Path:
    return toy_trainer(toy_recipe(**{"max_steps": 2, **train}), folder).fit().checkpoint


def test_a_run_is_not_begun_over_another(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(UserError, match=r"already holds a run \(step_00000002\): go on with --resume"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"batch_size": 2}, "batch_size was 4, is 2"),
        ({"grad_accum_steps": 2}, "grad_accum_steps was 1, is 2"),
        ({"experiment_name": "other"}, None),
    ],
)
def test_resume_is_exact_or_refused(tmp_path: Path, now: dict[str, Any], said: str | None) -> None:
    run(tmp_path)
    tree = toy_recipe(max_steps=3).model_dump()
    for key, value in now.items():
        (tree if key in tree else tree["train"])[key] = value
    recipe = type(toy_recipe()).model_validate(tree)
    trainer = toy_trainer(recipe, tmp_path)
    if said is None:
        assert trainer.fit(resume=True).step == 3
    else:
        with pytest.raises(UserError, match=f"cannot be resumed exactly: {said}"):
            trainer.fit(resume=True)


def test_resume_on_other_data_is_refused(tmp_path: Path) -> None:
    toy_trainer(toy_recipe(max_steps=2), tmp_path, data="abc").fit()
    with pytest.raises(UserError, match="data was 'abc', is 'xyz'"):
        toy_trainer(toy_recipe(max_steps=3), tmp_path, data="xyz").fit(resume=True)


def test_resume_says_what_changed_in_the_recipe(tmp_path: Path) -> None:
    run(tmp_path)
    listener = Listener()
    toy_trainer(toy_recipe(max_steps=3, lr=0.5), tmp_path, reporter=listener).fit(resume=True)
    assert any("train.lr 0.003 -> 0.5, train.max_steps 2 -> 3" in note for note in listener.notes)


def test_resume_from_nothing_starts(tmp_path: Path) -> None:
    listener = Listener()
    assert toy_trainer(toy_recipe(max_steps=2), tmp_path, reporter=listener).fit(resume=True).step == 2
    assert any("no checkpoint yet" in note for note in listener.notes)


def test_another_model_is_named(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(
        UserError, match=r"model\.safetensors lacks net\.bias, net\.weight: it is of another model"
    ):
        toy_trainer(toy_recipe(max_steps=3), tmp_path, method=Regression()).fit(resume=True)


def test_init_from_takes_averaged_weights_into_a_new_run(tmp_path: Path) -> None:
    first = run(tmp_path / "a", max_steps=20)
    recipe = toy_recipe(max_steps=1, init_from=str(first), lr=1e-12, weight_decay=0.0)
    trainer = toy_trainer(recipe, tmp_path / "b")
    trainer.fit()
    new, old = checkpoint.load(tmp_path / "b"), checkpoint.load(first)
    for name, wanted in old.tensors("ema").items():
        torch.testing.assert_close(new.tensors("model")[name], wanted, atol=1e-6, rtol=0)
        torch.testing.assert_close(new.tensors("ema")[name], wanted, atol=1e-6, rtol=0)
    differ = [n for n, t in old.tensors("ema").items() if not torch.equal(t, old.tensors("model")[n])]
    assert differ, "the averages must differ from the weights for this to prove anything"
    assert trainer.state.samples == 4


def test_init_from_goes_on_with_latents_of_another_shape(tmp_path: Path) -> None:
    """The layers that latents go through begin anew; all others, and what of them has its shape, go on."""
    first = checkpoint.load(run(tmp_path / "a", max_steps=20))
    text = HashEncoder(4, 64, 5, seed=0, trainable=True)
    swapped = ToyBackbone(seed=1)
    swapped.tokens, swapped.out = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 5)
    modules = {"backbone": swapped, "text_encoder": text}
    before = {name: t.clone() for name, t in swapped.state_dict().items()}
    with pytest.raises(UserError, match=r"backbone\.tokens\.weight has shape .*: use the recipe"):
        start_from(first.folder, modules, Ranks())
    swapped.latent_layers = ("tokens", "out")  # type: ignore[assignment]
    told = start_from(first.folder, modules, Ranks())
    assert told == "step 20; 3 tensors are new: backbone.out, backbone.tokens.weight"
    new = {"tokens.weight", "out.weight", "out.bias"}
    for name, tensor in swapped.state_dict().items():
        wanted = before[name] if name in new else first.tensors("ema")[f"backbone.{name}"]
        assert torch.equal(tensor, wanted), name


def test_a_checkpoint_carries_its_text_encoder(tmp_path: Path) -> None:
    recipe = toy_recipe(max_steps=5, lr=0.1)
    encoder = HashEncoder(4, 64, 5, seed=recipe.seed, trainable=True)
    before = encoder.words.weight.detach().clone()
    method = Denoise(recipe, ToyBackbone(), TextToVideo(), encoder)
    trainer = toy_trainer(recipe, tmp_path, method=method, folders={"text_encoder": encoder})
    folder = trainer.fit().checkpoint
    back = load_text_encoder(folder / "text_encoder")
    assert isinstance(back, HashEncoder)
    assert torch.equal(back.words.weight, encoder.words.weight)
    assert not torch.equal(back.words.weight, before)
