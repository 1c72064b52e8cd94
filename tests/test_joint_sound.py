"""The joint backbone with sound: what may hear what, and that it is the video's model until it learns more.

Chunks from a cache are in ``test_kv_cache.py``, kind "joint with sound".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

from motionloom.backbones import build_backbone, joint_reach
from motionloom.backbones.base import Perturbation
from motionloom.backbones.growing import branches, lacking, with_first_values
from motionloom.backbones.joint import Joint
from motionloom.backbones.weights import Weights, load_into
from motionloom.cli.adapters import adapt
from motionloom.config.recipe import ModelConfig, Recipe
from motionloom.errors import UserError
from motionloom.parallel import Ranks, load_weights
from motionloom.plans import Visibility, causal_chunks, full, same_scene
from motionloom.plans.stream import Stream, Streams
from motionloom.plans.visibility import TEXT
from motionloom.rng import torch_generator
from motionloom.train import checkpoint
from motionloom.train.lora import choose_modules
from motionloom.train.snapshot import start_from

CHANNELS, SOUND_CHANNELS, TEXT_DIM = 4, 3, 5
FRAMES, CELLS, SOUNDS, WORDS, BATCH = 4, (2, 3), 9, 4, 2
"""Video has 24 tokens in two scenes of two frames; sound has nine in the same second."""
VIDEO = FRAMES * CELLS[0] * CELLS[1]


def draw(*shape: int, key: str) -> Tensor:
    return torch.randn(shape, generator=torch_generator(key, *shape), dtype=torch.float64)


def stream(modality: str, x_BNC: Tensor, sigma_BK: Tensor, position_BN3: Tensor, **fields: object) -> Stream:
    tokens = x_BNC.shape[1]
    nothing = torch.zeros(1, tokens, dtype=torch.long)
    plain = Stream(
        modality=modality,
        grid=(1, 1, tokens),
        x_BNC=x_BNC,
        sigma_BK=sigma_BK.double(),
        level_BN=nothing,
        position_BN3=position_BN3.double(),
        cell_BN3=torch.zeros(1, tokens, 3, dtype=torch.long),
        scene_BN=nothing,
        chunk_BN=nothing,
        context_BN=nothing.bool(),
        loss_BN=torch.ones(1, tokens),
        first_BN=nothing.bool(),
    )
    return replace(plain, **fields)


def make() -> Streams:
    """Two scenes of half a second. Each scene of either stream has a noise level of its own."""
    seconds, rows, columns = torch.meshgrid(
        torch.arange(FRAMES) / FRAMES,
        8.0 * torch.arange(CELLS[0]),
        8.0 * torch.arange(CELLS[1]),
        indexing="ij",
    )
    place = torch.stack([seconds.flatten(), rows.flatten(), columns.flatten()], dim=-1)[None]
    heard = torch.zeros(1, SOUNDS, 3)
    heard[0, :, 0] = torch.arange(SOUNDS) / SOUNDS
    scene = (torch.arange(VIDEO) * 2 // VIDEO)[None]
    heard_scene = (torch.arange(SOUNDS) > SOUNDS // 2).long()[None]
    word_scene = (torch.arange(WORDS) * 2 // WORDS)[None]
    levels = torch.tensor([[0.9, 0.4], [0.7, 0.2]])
    return {
        "text": stream(
            "text",
            draw(BATCH, WORDS, TEXT_DIM, key="words"),
            levels,
            torch.zeros(1, WORDS, 3),
            level_BN=word_scene,
            scene_BN=word_scene,
        ),
        "video": stream(
            "video",
            draw(BATCH, VIDEO, CHANNELS, key="video"),
            levels,
            place,
            level_BN=scene,
            scene_BN=scene,
            chunk_BN=scene,
            cell_BN3=torch.arange(VIDEO)[None, :, None].expand(1, VIDEO, 3),
        ),
        "audio": stream(
            "audio",
            draw(BATCH, SOUNDS, SOUND_CHANNELS, key="audio"),
            torch.tensor([[0.8, 0.3], [0.6, 0.1]]),
            heard,
            level_BN=heard_scene,
            scene_BN=heard_scene,
            chunk_BN=heard_scene,
            cell_BN3=torch.arange(SOUNDS)[None, :, None].expand(1, SOUNDS, 3),
        ),
    }


def only(streams: Streams, *modalities: str) -> Streams:
    return {m: s for m, s in streams.items() if m in ("text", *modalities)}


def put(streams: Streams, modality: str, **fields: object) -> Streams:
    return {**streams, modality: replace(streams[modality], **fields)}


def changed(streams: Streams, modality: str, here_N: Tensor) -> Streams:
    """Other latents where ``here`` is True."""
    x_BNC = streams[modality].x_BNC
    return put(streams, modality, x_BNC=x_BNC + 2.0 * here_N.double()[:, None])


def of_scene(streams: Streams, modality: str, scene: int) -> Tensor:
    return streams[modality].scene_BN[0] == scene


def build(audio_dim: int = 16, *, awake: bool = True, **changes: object) -> Joint:
    """float64; ``awake``: with values where adaLN-Zero starts from zero, so that everything matters."""
    sizes = {"dim": 24, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "audio_dim": audio_dim, **changes}
    model = build_backbone(
        ModelConfig(type="joint", **sizes), CHANNELS, TEXT_DIM, audio_channels=SOUND_CHANNELS
    )
    assert isinstance(model, Joint)
    return wake(model.eval().double(), lambda name: awake)


def wake(model: Joint, which) -> Joint:
    generator = torch_generator("awake")
    for name, parameter in model.named_parameters():
        if which(name) and not parameter.any():
            nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def same_tokens(a: Tensor, b: Tensor) -> list[bool]:
    """For each token whether no bit of its answer differs."""
    return (a == b).all(dim=2).all(dim=0).tolist()


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> bool:
    return (a - b).abs().max().item() <= tolerance * max(1.0, b.abs().max().item())


# --- the video's model, until it learns ---------------------------------------------------------------------


def grown_from(video: Joint) -> Joint:
    """A model with sound that starts from weights without."""
    model = build(awake=False).float()
    weights = Weights.of_tensors("video", video.state_dict())
    load_into(model, with_first_values(model, weights, torch_generator("sound")))
    return model


@pytest.mark.parametrize("visibility", [full, same_scene, causal_chunks()])
def test_weights_without_sound_answer_for_the_video_to_the_bit(visibility):
    video = build(0).float()
    model = grown_from(video)
    streams = {m: replace(s, x_BNC=s.x_BNC.float(), sigma_BK=s.sigma_BK.float()) for m, s in make().items()}
    before = video(only(streams, "video"), visibility)
    assert before["video"].abs().mean() > 1e-2
    for now in (model(only(streams, "video"), visibility), model(streams, visibility)):
        assert torch.equal(now["video"], before["video"])
    # And the gradients of all that the video has; with sound in the loss too.
    before["video"].square().mean().backward()
    now = model(streams, visibility)
    (now["video"].square().mean() + (now["audio"] - 1).square().mean()).backward()
    for name, parameter in video.named_parameters():
        assert torch.equal(parameter.grad, model.get_parameter(name).grad), name


def test_the_first_weights_of_the_video_are_those_of_a_model_without_sound():
    video, model = build(0, awake=False), build(awake=False)
    for name, value in video.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert model.grown() == model.state_dict().keys() - video.state_dict().keys()
    assert video.modalities == ("video",)
    assert model.modalities == ("video", "audio")
    assert not video.grown()


def test_only_what_sound_adds_may_be_missing():
    model = build(awake=False)
    names = set(model.state_dict())
    assert lacking(model, names) == frozenset()
    assert lacking(model, names - model.grown()) == model.grown()
    # Half of it is a damaged file.
    assert lacking(model, names - {"audio_exit.out.weight"}) == frozenset()
    assert branches(model.grown(), names) == [
        "audio_cross_noise",
        "audio_entry",
        "audio_exit",
        "audio_noise",
        "layers.*.audio_block",
        "layers.*.audio_to_video",
        "layers.*.video_to_audio",
    ]
    damaged = {n: t for n, t in build(0).state_dict().items() if n != "exit.out.weight"}
    weights = with_first_values(model, Weights.of_tensors("video", damaged), torch_generator("sound"))
    with pytest.raises(UserError, match=r"1 missing \(exit\.out\.weight\)"):
        load_into(model, weights)


def test_a_run_with_sound_starts_from_a_run_without_and_says_what_is_new(tmp_path: Path):
    video, model = build(0), build(awake=False)
    state = {f"backbone.{name}": t for name, t in video.state_dict().items()}
    contents = checkpoint.Contents(7, {"step": 7}, "{}", {"model": state}, {})
    folder = checkpoint.save(tmp_path / "whole", contents)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    told = start_from(folder, {"backbone": model}, Ranks())
    assert told.startswith(f"step 7; {len(model.grown())} tensors are new: backbone.audio_cross_noise, ")
    assert "backbone.layers.*.audio_to_video" in told
    for name, value in model.state_dict().items():
        wanted = before[name] if name in model.grown() else video.state_dict()[name]
        assert torch.equal(value, wanted), name
    sound = {f"backbone.{name}": t for name, t in model.state_dict().items()}
    again = checkpoint.save(tmp_path / "sound", replace(contents, tensors={"model": sound}))
    assert start_from(again, {"backbone": model}, Ranks()) == "step 7"
    del sound["backbone.audio_exit.out.weight"]
    damaged = checkpoint.save(tmp_path / "damaged", replace(contents, tensors={"model": sound}))
    with pytest.raises(UserError, match=r"lacks backbone\.audio_exit\.out\.weight"):
        start_from(damaged, {"backbone": model}, Ranks())
    with pytest.raises(UserError, match=r"also holds backbone\.audio_cross_noise"):
        start_from(again, {"backbone": video}, Ranks())


def lora(*targets: str) -> Recipe:
    model = {"type": "joint", "dim": 24, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "audio_dim": 16}
    return Recipe.model_validate(
        {
            "model": model,
            "lora": {"enabled": True, "base": "somewhere", "targets": targets, "rank": 2, "alpha": 2.0},
            "train": {"precision": "fp32"},
        }
    )


def test_adapters_on_a_base_without_sound_train_sound_whole():
    video, recipe = build(0).float(), lora("!audio_*", "!video_to_audio", "qkv")
    model = build_backbone(recipe.model, CHANNELS, TEXT_DIM, audio_channels=SOUND_CHANNELS, device="meta")
    grown = model.grown()
    weights = Weights.of_tensors("base", video.state_dict())
    adapted = adapt({"backbone": model}, recipe, weights, Ranks())
    load_weights(model, adapted.weights, Ranks(), besides=adapted.besides)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == grown | adapted.besides
    assert len(adapted.besides) == 2 * 2
    rows = {row.pattern: row.parameters for row in adapted.parts}
    assert rows["layers.*.audio_block (new)"] > 0
    assert sum(rows.values()) == sum(p.numel() for n, p in model.named_parameters() if n in grown)
    streams = {m: replace(s, x_BNC=s.x_BNC.float(), sigma_BK=s.sigma_BK.float()) for m, s in make().items()}
    wanted = video(only(streams, "video"), full)["video"]
    assert close(model(streams, full)["video"], wanted, 1e-6)
    # Drawn by the recipe's seed: the same whenever the run is opened again.
    twin = build_backbone(recipe.model, CHANNELS, TEXT_DIM, audio_channels=SOUND_CHANNELS, device="meta")
    again = adapt({"backbone": twin}, recipe, weights, Ranks())
    assert again.base == adapted.base
    assert all(torch.equal(again.weights.read(name), adapted.weights.read(name)) for name in adapted.weights)


def test_adapters_of_what_the_base_lacks_are_refused():
    model = build_backbone(
        lora("qkv").model, CHANNELS, TEXT_DIM, audio_channels=SOUND_CHANNELS, device="meta"
    )
    weights = Weights.of_tensors("base", build(0).float().state_dict())
    with pytest.raises(UserError, match=r"put !audio_block, !audio_to_video, !video_to_audio first"):
        adapt({"backbone": model}, lora("qkv"), weights, Ranks())


def test_patterns_can_name_sound_alone():
    model = build()
    chosen = choose_modules(model, ["audio_block", "audio_to_video", "video_to_audio", "qkv"])
    assert [len(taken) // 2 for taken in chosen.values()] == [4, 3, 3, 1]
    assert chosen["qkv"] == ("layers.0.qkv", "layers.1.qkv")


# --- who hears whom -----------------------------------------------------------------------------------------


def test_a_new_model_answers_zero_for_both():
    out = build(awake=False)(make(), full)
    assert out["video"].shape == (BATCH, VIDEO, CHANNELS)
    assert out["audio"].shape == (BATCH, SOUNDS, SOUND_CHANNELS)
    assert not any(answer.any() for answer in out.values())


def test_each_hears_of_the_other_and_of_the_words():
    model, streams = build(), make()
    base = model(streams, full)
    for told in ("video", "audio", "text"):
        here = torch.ones(streams[told].x_BNC.shape[1], dtype=torch.bool)
        out = model(changed(streams, told, here), full)
        assert all((out[m] - base[m]).abs().mean() > 1e-3 for m in base), told


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_a_stream_alone_is_the_isolated_one(modality):
    model, streams = build(), make()
    alone = model(only(streams, modality), full)
    apart = model(streams, full, perturb=Perturbation(isolate=True))
    assert alone.keys() == {modality}
    assert torch.equal(alone[modality], apart[modality])
    assert not close(apart[modality], model(streams, full)[modality], 1e-3)


def test_sound_alone_reads_nothing_of_the_videos_noise():
    """There the text's levels are the sound's own."""
    model, streams = build(), make()
    alone = only(streams, "audio")
    other = put(
        alone, "text", sigma_BK=streams["audio"].sigma_BK, level_BN=torch.zeros(1, WORDS, dtype=torch.long)
    )
    assert torch.equal(model(alone, full)["audio"], model(other, full)["audio"])


@pytest.mark.parametrize("changes", ["latents", "noise level"])
@pytest.mark.parametrize("told", ["video", "audio"])
@pytest.mark.parametrize("scene", [0, 1])
def test_scenes_hear_and_see_only_themselves(told, scene, changes):
    model, streams = build(), make()
    if changes == "latents":
        news = changed(streams, told, of_scene(streams, told, scene))
    else:
        louder = streams[told].sigma_BK.clone()
        louder[:, scene] += 0.05
        news = put(streams, told, sigma_BK=louder)
    base, out = model(streams, same_scene), model(news, same_scene)
    for modality in base:
        wanted = (~of_scene(streams, modality, scene)).tolist()
        assert same_tokens(base[modality], out[modality]) == wanted


@pytest.mark.parametrize("told", ["video", "audio"])
def test_no_chunk_hears_of_a_later_one(told):
    """Neither of its latents nor of its noise level."""
    # As causal plans have it: words stand at a level that is no chunk's to change.
    model, streams = build(), put(make(), "text", level_BN=torch.zeros(1, WORDS, dtype=torch.long))
    later = of_scene(streams, told, 1)
    sigma = streams[told].sigma_BK * torch.tensor([1.0, 0.5])
    news = put(changed(streams, told, later), told, sigma_BK=sigma)
    base, out = model(streams, causal_chunks()), model(news, causal_chunks())
    for modality in base:
        assert same_tokens(base[modality], out[modality]) == of_scene(streams, modality, 0).tolist()


@dataclass(frozen=True)
class Late(Visibility):
    """The first scene sees nothing of the other stream; words see words only."""

    def allows(self, q, k):
        alike = (q.modality_BN == k.modality_BN) | (k.modality_BN == TEXT)
        return (alike | (q.scene_BN == 1)) & ((q.modality_BN != TEXT) | (k.modality_BN == TEXT))


def test_who_may_see_nothing_of_the_other_stream_hears_nothing_of_it():
    """Attention must look somewhere; that is left out again."""
    model, streams = build(depth=1), make()
    base = model(streams, Late())
    for told, reached in (("audio", "video"), ("video", "audio")):
        here = torch.ones(streams[told].x_BNC.shape[1], dtype=torch.bool)
        out = model(changed(streams, told, here), Late())
        first = of_scene(streams, reached, 0)
        assert same_tokens(base[reached], out[reached]) == first.tolist()
        alone = model(only(streams, reached), Late())[reached]
        assert close(base[reached][:, first], alone[:, first])


@dataclass(frozen=True)
class NoWords(Visibility):
    """Text is hidden from everyone but text."""

    def allows(self, q, k):
        return (q.modality_BN == TEXT) == (k.modality_BN == TEXT)


def test_only_the_distance_in_seconds_counts_between_the_streams():
    model, streams = build(), make()
    base = model(streams, NoWords())

    def later(streams: Streams, *modalities: str) -> Streams:
        for m in modalities:
            by = torch.tensor([0.75, 0.0, 0.0], dtype=torch.float64)
            streams = put(streams, m, position_BN3=streams[m].position_BN3 + by)
        return streams

    both, one = (model(later(streams, *m), NoWords()) for m in (("video", "audio"), ("audio",)))
    assert all(close(both[m], base[m], 1e-10) for m in base)
    assert all((one[m] - base[m]).abs().mean() > 1e-3 for m in base)
    # Where in the picture something is, is nothing that sound can hear of.
    aside = torch.tensor([0.0, 64.0, 64.0], dtype=torch.float64)
    moved = put(streams, "audio", position_BN3=streams["audio"].position_BN3 + aside)
    assert torch.equal(model(moved, NoWords())["video"], base["video"])


# --- what is not there --------------------------------------------------------------------------------------


def test_a_sample_without_sound_is_as_if_alone():
    model, streams = build(), make()
    there = torch.tensor([[False], [True]]).expand(BATCH, SOUNDS)
    silent = put(streams, "audio", valid_BN=there)
    out = model(silent, full)
    alone, whole = model(only(streams, "video"), full)["video"], model(streams, full)
    assert close(out["video"][:1], alone[:1])
    assert close(out["video"][1:], whole["video"][1:])
    assert close(out["audio"][1:], whole["audio"][1:])
    assert all(answer.isfinite().all() for answer in out.values())
    other = model(changed(silent, "audio", torch.ones(SOUNDS, dtype=torch.bool)), full)
    assert torch.equal(other["video"][:1], out["video"][:1])


@pytest.mark.parametrize("visibility", [full, same_scene])
@pytest.mark.parametrize("modality", ["video", "audio"])
def test_hidden_tokens_influence_nobody(modality, visibility):
    """A part of a stream: a reference that one sample lacks, sound that ends early."""
    model, streams = build(), make()
    tokens = streams[modality].x_BNC.shape[1]
    here = torch.arange(tokens) < tokens // 3
    valid = (~here).expand(BATCH, tokens).clone()
    valid[1] = True
    hidden = put(streams, modality, valid_BN=valid)
    base, out = model(hidden, visibility), model(changed(hidden, modality, here), visibility)
    other = "audio" if modality == "video" else "video"
    assert torch.equal(base[other][0], out[other][0])
    assert torch.equal(base[modality][0, ~here], out[modality][0, ~here])
    assert not torch.equal(base[other][1], out[other][1])
    assert all(answer.isfinite().all() for answer in base.values())
    # The same as a stream without them.
    names = ("x_BNC", "level_BN", "position_BN3", "cell_BN3", "scene_BN", "chunk_BN", "context_BN", "loss_BN")
    kept = {n: getattr(streams[modality], n)[:, ~here] for n in (*names, "first_BN")}
    fewer = put(streams, modality, grid=(1, 1, int((~here).sum())), **kept)
    assert close(base[other][:1], model(fewer, visibility)[other][:1])


def test_references_of_another_size_stand_in_front():
    """Positions are all that is read: neither cells nor a grid, nor the order of tokens."""
    model, streams = build(), make()
    video = streams["video"]
    zeros = torch.zeros(1, 4, dtype=torch.long)
    place = torch.tensor([[0.0, r, c] for r in (4.0, 12.0) for c in (4.0, 12.0)], dtype=torch.float64)

    def beside(front: bool, key: str = "reference", cells: int = 0) -> Streams:
        def joined(reference: Tensor, own: Tensor) -> Tensor:
            reference = reference.expand(len(own), *reference.shape[1:])
            return torch.cat([reference, own] if front else [own, reference], dim=1)

        clean = torch.cat([torch.zeros(BATCH, 1), video.sigma_BK], dim=1)
        return put(
            streams,
            "video",
            grid=(1, 1, 4 + VIDEO),
            x_BNC=joined(draw(BATCH, 4, CHANNELS, key=key), video.x_BNC),
            sigma_BK=clean,
            level_BN=joined(zeros, video.level_BN + 1),
            position_BN3=joined(place[None], video.position_BN3),
            cell_BN3=joined(torch.full((1, 4, 3), cells), video.cell_BN3),
            scene_BN=joined(zeros, video.scene_BN),
            chunk_BN=joined(zeros, video.chunk_BN),
            context_BN=joined(zeros == 0, video.context_BN),
            loss_BN=joined(zeros.float(), video.loss_BN),
            first_BN=joined(zeros == 0, video.first_BN),
        )

    def run(streams: Streams, visibility: Visibility = full) -> dict[str, Tensor]:
        text = streams["text"]
        words = put(streams, "text", sigma_BK=streams["video"].sigma_BK, level_BN=text.level_BN + 1)
        return model(words, visibility)

    front, behind = run(beside(front=True)), run(beside(front=False))
    assert close(front["video"][:, 4:], behind["video"][:, :-4])
    assert close(front["audio"], behind["audio"])
    assert torch.equal(run(beside(front=True, cells=77))["video"], front["video"])
    other = run(beside(front=True, key="another"))
    assert (other["video"][:, 4:] - front["video"][:, 4:]).abs().mean() > 1e-3
    # They belong to scene 0, and nobody else sees them.
    apart, news = (run(beside(front=True, key=key), same_scene) for key in ("reference", "another"))
    assert same_tokens(apart["video"], news["video"])[4:] == of_scene(streams, "video", 1).tolist()


# --- perturbed, and layer by layer --------------------------------------------------------------------------


@dataclass(frozen=True)
class ThemselvesAlone(Visibility):
    """Tokens see themselves, so that attention hands on their values; words see all."""

    def allows(self, q, k):
        itself = (q.modality_BN == k.modality_BN) & (q.cell_BN3 == k.cell_BN3).all(-1)
        return (q.modality_BN == TEXT) | itself


@dataclass(frozen=True)
class Otherwise(Visibility):
    """Another rule in some blocks."""

    rule: Visibility
    layers: tuple[int, ...]
    other: Visibility = full

    def in_layer(self, index, count):
        assert count == 2
        return self.rule if index in self.layers else self.other

    def allows(self, q, k):
        raise AssertionError("blocks ask for their own rule")


@pytest.mark.parametrize("skipped", [(0,), (1,), (0, 1)])
def test_skipped_attention_hands_on_values_and_words_attend(skipped):
    model, streams = build(), make()
    skip = Perturbation(skip_self=skipped, isolate=True)
    out = model(streams, full, perturb=skip)
    wanted = model(streams, Otherwise(ThemselvesAlone(), skipped), perturb=Perturbation(isolate=True))
    for modality in out:
        assert close(out[modality], wanted[modality])
        assert not close(
            out[modality], model(streams, full, perturb=Perturbation(isolate=True))[modality], 1e-3
        )
    nothing = model(streams, full, perturb=Perturbation())
    assert all(torch.equal(answer, model(streams, full)[m]) for m, answer in nothing.items())


@pytest.mark.parametrize("modalities", [("video",), ("audio",), ("video", "audio")])
@pytest.mark.parametrize("layer", [0, 1])
def test_each_block_has_its_own_rule(layer, modalities):
    """News of the other scene arrives in the block that lets it in."""
    model, streams = build(), only(make(), *modalities)
    seen: list[dict[str, Tensor]] = []
    for block in model.blocks():
        block.register_forward_hook(lambda module, args, out: seen.append(out))
    rule = Otherwise(same_scene, (1 - layer,))
    model(streams, rule)
    for told in modalities:
        del seen[2:]
        model(changed(streams, told, of_scene(streams, told, 1)), rule)
        for modality in modalities:
            first = of_scene(streams, modality, 0)
            for index in range(2):
                a, b = (seen[n][modality][:, WORDS:][:, first] for n in (index, 2 + index))
                assert torch.equal(a, b) == (index < layer)


def test_each_rule_is_lowered_once(monkeypatch):
    asked: list[Visibility] = []
    real = joint_reach.lower

    def counted(visibility: Visibility, *sides: object) -> object:
        asked.append(visibility)
        return real(visibility, *sides)

    monkeypatch.setattr(joint_reach, "lower", counted)
    model, streams = build(), make()
    model(streams, same_scene)
    # Video with its words, sound with its words, and each the other.
    assert asked == [same_scene] * 4
    asked.clear()
    model(streams, Otherwise(same_scene, (0,), causal_chunks()))
    assert sorted(map(str, asked)) == sorted(map(str, [same_scene, causal_chunks()] * 4))


# --- training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("awake", [False, True])
def test_every_parameter_gets_a_gradient(awake):
    model = build(awake=awake)
    out = model(make(), full)
    ((out["video"] - 1).square().sum() + (out["audio"] - 1).square().sum()).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    learning = {n for n, p in model.named_parameters() if p.grad.any()}
    if awake:
        assert learning == {n for n, _ in model.named_parameters()}
    else:
        assert learning == {
            "exit.out.weight",
            "exit.out.bias",
            "audio_exit.out.weight",
            "audio_exit.out.bias",
        }


def gates(name: str) -> bool:
    """All that starts at zero but what lets the streams hear each other."""
    return "cross_noise" not in name and "ask_table" not in name and "offer_table" not in name


def test_closed_gates_let_nothing_through_and_learn():
    model, streams = wake(build(awake=False), gates), make()
    news = changed(streams, "audio", torch.ones(SOUNDS, dtype=torch.bool))
    base = model(streams, full)
    assert torch.equal(model(news, full)["video"], base["video"])
    (base["video"].square().sum() + base["audio"].square().sum()).backward()
    for block in model.layers:
        for crossing in (block.audio_to_video, block.video_to_audio):
            shift, scale, gate = crossing.ask_table_PD.grad
            assert gate.any()
            assert not shift.any()
            assert not scale.any()


def test_recomputed_blocks_have_the_same_gradients():
    found = []
    for checkpoint_blocks in (False, True):
        model = build(checkpoint_blocks=checkpoint_blocks).train()
        out = model(make(), same_scene)
        (out["video"].square().mean() + out["audio"].square().mean()).backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_blocks_compile_without_a_break_and_once_for_all(fresh_compiler):
    model, streams = build(depth=3), make()
    expected = model(streams, same_scene)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for block in model.blocks():
        block.compile(fullgraph=True, backend=counter)
    out = model(streams, same_scene)
    sum(answer.sum() for answer in out.values()).backward()
    assert all(close(out[m], expected[m], 1e-10) for m in out)
    assert counter.frame_count == 1


def test_bf16_autocast_follows_float32():
    model = build().float()
    streams = {m: replace(s, x_BNC=s.x_BNC.float(), sigma_BK=s.sigma_BK.float()) for m, s in make().items()}
    exact = model(streams, same_scene)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(streams, same_scene)
    for modality, answer in rough.items():
        assert answer.dtype == torch.float32
        assert 1e-5 < (answer - exact[modality]).norm() / exact[modality].norm() < 0.03


def test_blocks_hold_all_that_repeats():
    model = build()
    inside = {id(p) for block in model.blocks() for p in block.parameters()}
    assert len(model.blocks()) == 2
    assert inside == {id(p) for name, p in model.named_parameters() if name.startswith("layers.")}


# --- wrong wishes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"type": "factorized", "audio_dim": 64}, "model.audio_dim is for joint, factorized has no sound"),
        ({"type": "joint", "audio_dim": 60, "num_heads": 8}, "use 48 or 64"),
        ({"type": "wan", "preset": "tiny", "audio_dim": 64}, "model.audio_dim cannot be chosen"),
    ],
)
def test_widths_of_sound_that_cannot_be(model, told):
    with pytest.raises(ValueError, match=told):
        Recipe.model_validate({"model": model})


def test_sound_needs_a_sound_tokenizer():
    with pytest.raises(UserError, match="there is no sound to read"):
        build_backbone(ModelConfig(type="joint", audio_dim=64), CHANNELS, TEXT_DIM)


def test_a_model_without_sound_is_not_fed_any():
    with pytest.raises(AssertionError, match="this model reads"):
        build(0)(make(), full)
