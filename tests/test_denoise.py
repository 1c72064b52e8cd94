"""Denoising: objectives against direct implementations, conditions kept exact, captions dropped as told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laid import FIRST_FRAME
from motionloom.backbones import build_backbone
from motionloom.backbones.prediction import Predictor
from motionloom.config.conditions import FirstFrame, Scene
from motionloom.config.recipe import ModelConfig, Recipe
from motionloom.data.batch import Batch, move_tensors
from motionloom.errors import UserError
from motionloom.flow import LINEAR, PATHS, DiscreteSchedule, from_pair
from motionloom.methods import METHODS, Denoise
from motionloom.methods.objective import objective
from motionloom.plans import (
    PLANS,
    Chunks,
    Conditions,
    Given,
    Plan,
    Scenes,
    Streams,
    Text,
    TextToVideo,
    Visibility,
    exactly,
)
from motionloom.plans import Sample as Laid
from motionloom.plans.geometry import token_geometry
from motionloom.text import lay_scenes
from motionloom.text.hash import HashEncoder
from motionloom.train import StepContext
from toy_training import CHANNELS, FRAMES, WORDS, ToyBackbone, metrics, toy_batch, toy_recipe, toy_trainer

CONTEXT = StepContext(0, 5, 0, 0, torch.device("cpu"), "denoise")


class Answer(nn.Module):
    """A backbone that answers what it is told and remembers what it was fed."""

    patch = (1, 1, 1)

    def __init__(self, answer: Callable[[Streams], Tensor]) -> None:
        super().__init__()
        self.answer = answer
        self.unused = nn.Parameter(torch.zeros(1))
        self.fed: list[Streams] = []

    def blocks(self) -> list[nn.Module]:
        return []

    def forward(self, streams: Streams, visibility: Visibility) -> dict[str, Tensor]:
        self.fed.append(streams)
        return {"video": self.answer(streams)}


def embedded(batch: Batch) -> Batch:
    """With cached embeddings: the caption's length everywhere, and minus one for the empty caption."""
    scenes = max(map(len, batch.captions))

    def lay(value_BS: Tensor, exists_BS: Tensor) -> Text:
        x_BSLC = value_BS[..., None, None].expand(-1, -1, 2, WORDS).float()
        return lay_scenes(x_BSLC, exists_BS[..., None].expand(-1, -1, 2))

    lengths = [[len(sample[s]) if s < len(sample) else 0 for s in range(scenes)] for sample in batch.captions]
    exists_BS = torch.tensor([[s < len(sample) for s in range(scenes)] for sample in batch.captions])
    empty_1S = -torch.ones(1, scenes)
    return replace(
        batch,
        text=lay(torch.tensor(lengths), exists_BS),
        empty_text=lay(empty_1S, torch.ones(1, scenes).bool()),
    )


def denoise(
    backbone: nn.Module, plan: Plan | None = None, recipe: Recipe | None = None, **train: Any
) -> Denoise:
    recipe = recipe or toy_recipe(**{"cfg_dropout_prob": 0.0, **train})
    return Denoise(recipe, backbone, plan or TextToVideo())  # type: ignore[arg-type]


def linear_in(x_BNC: Tensor, time_BN: Tensor) -> Tensor:
    """A toy network: linear in its input and its clock."""
    mixing = torch.tensor([[0.5, -0.2, 0.1], [0.3, 0.9, 0.0], [-0.4, 0.2, 0.7]])
    return x_BNC @ mixing + 0.3 * time_BN[..., None]


@pytest.mark.parametrize("kind", ["noise", "v"])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_ddpm_objectives_equal_their_direct_form(kind: str, schedule: Any) -> None:
    """sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps into a linear network, and its mean squared error."""
    steps, batch = 50, embedded(toy_batch(6))
    table = DiscreteSchedule(schedule, steps)
    t_B1 = torch.randint(steps, (6, 1), generator=CONTEXT.generator("sigma"))
    clean_BNC = batch.video.x_BFHWC.flatten(1, 3)
    noise_BNC = torch.randn(clean_BNC.unflatten(1, (FRAMES, -1)).shape, generator=CONTEXT.generator("noise"))
    noise_BNC = noise_BNC.flatten(1, 2)
    abar_B11 = table.alpha_bar()[t_B1].float()[..., None]
    x_vp = abar_B11.sqrt() * clean_BNC + (1 - abar_B11).sqrt() * noise_BNC
    answer_BNC = linear_in(x_vp, t_B1.float() / steps)
    target_BNC = (
        noise_BNC if kind == "noise" else abar_B11.sqrt() * noise_BNC - (1 - abar_B11).sqrt() * clean_BNC
    )
    wanted_B = (answer_BNC - target_BNC).square().mean(dim=(1, 2))

    def network(streams: Streams) -> Tensor:
        """The same network behind the house's convention: x / n is DDPM's state, and sigma its time."""
        video = streams["video"]
        sigma_BN = video.sigma_BN.double()
        norm_BN1 = torch.hypot(sigma_BN, 1 - sigma_BN)[..., None]
        found = linear_in((video.x_BNC / norm_BN1).float(), (table.timestep(sigma_BN) / steps).float())
        if kind == "noise":
            return found
        # From v of Salimans & Ho to the noise: eps = (s x_vp + a v), with a^2 + s^2 = 1.
        a, s = (1 - sigma_BN)[..., None] / norm_BN1, sigma_BN[..., None] / norm_BN1
        return (s * video.x_BNC / norm_BN1 + a * found).float()

    recipe = toy_recipe(
        objective="ddpm_eps" if kind == "noise" else "ddpm_v",
        cfg_dropout_prob=0.0,
        diffusion__schedule=schedule,
        diffusion__num_timesteps=steps,
        model__prediction="noise",
    )
    losses = denoise(Answer(network), recipe=recipe).losses(batch, CONTEXT)
    # The last steps hold next to no signal, so that v cannot be told from an exact noise there in float32.
    reliable_B = abar_B11[:, 0, 0] > (0 if kind == "noise" else 1e-3)
    assert reliable_B.sum() >= 4
    torch.testing.assert_close(losses.loss_B[reliable_B], wanted_B[reliable_B], rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["velocity", "clean", "noise"])
def test_the_right_answer_costs_nothing_and_a_wrong_one_something(path: str, prediction: Any) -> None:
    batch = embedded(toy_batch(8))
    noise_BNC = torch.randn((8, FRAMES, 4, CHANNELS), generator=CONTEXT.generator("noise")).flatten(1, 2)
    clean_BNC = batch.video.x_BFHWC.flatten(1, 3)

    def right(streams: Streams) -> Tensor:
        return from_pair(prediction, clean_BNC, noise_BNC, streams["video"].sigma_BN, PATHS[path])

    recipe = toy_recipe(cfg_dropout_prob=0.0, model__prediction=prediction, flow_matching__path=path)
    assert denoise(Answer(right), recipe=recipe).losses(batch, CONTEXT).loss_B.max() < 1e-6
    wrong = denoise(Answer(lambda s: right(s) + 0.1), recipe=recipe).losses(batch, CONTEXT).loss_B
    assert (wrong > 1e-4).all()
    assert (wrong <= 400 * 0.01 * 1.01).all(), "no error is magnified without bound"


def test_flow_loss_is_the_mean_squared_velocity_error() -> None:
    batch = embedded(toy_batch(4))
    noise_BNC = torch.randn((4, FRAMES, 4, CHANNELS), generator=CONTEXT.generator("noise")).flatten(1, 2)
    backbone = Answer(lambda s: torch.zeros_like(s["video"].x_BNC))
    losses = denoise(backbone).losses(batch, CONTEXT)
    wanted_B = (noise_BNC - batch.video.x_BFHWC.flatten(1, 3)).square().mean(dim=(1, 2))
    torch.testing.assert_close(losses.loss_B, wanted_B)
    assert losses.sigma_B is not None
    torch.testing.assert_close(losses.sigma_B, backbone.fed[0]["video"].sigma_BN[:, 0])
    assert losses.num_tokens == 4 * FRAMES * 4


def test_weighting_multiplies_the_velocity_error() -> None:
    batch = embedded(toy_batch(4))
    plain, weighted = (
        denoise(
            Answer(lambda s: torch.zeros_like(s["video"].x_BNC)),
            recipe=toy_recipe(cfg_dropout_prob=0.0, flow_matching__weighting=name),
        ).losses(batch, CONTEXT)
        for name in ("uniform", "eps")
    )
    assert plain.sigma_B is not None
    torch.testing.assert_close(weighted.loss_B, plain.loss_B * (1 - plain.sigma_B) ** 2)


def test_drawn_sigmas_follow_the_recipe() -> None:
    recipe = toy_recipe(
        flow_matching__times="logit_normal",
        flow_matching__shift=3.0,
        flow_matching__t_min=0.1,
        flow_matching__t_max=0.9,
    )
    sigma_BD = objective(recipe).draw((512, 3), CONTEXT.generator("sigma"))
    assert sigma_BD.shape == (512, 3)
    assert sigma_BD.min() >= 0.1
    assert sigma_BD.max() <= 0.9
    assert sigma_BD.mean() > 0.6
    ddpm = objective(toy_recipe(objective="ddpm_eps", diffusion__num_timesteps=4))
    levels = DiscreteSchedule("cosine", 4).sigma(torch.arange(4))
    assert set(ddpm.draw((64, 1), CONTEXT.generator("sigma")).flatten().tolist()) == set(levels.tolist())


def test_given_frames_go_in_bit_identical_and_count_nothing() -> None:
    batch = embedded(toy_batch(8))
    backbone = Answer(lambda s: s["video"].x_BNC * 1e3 * (s["video"].sigma_BN == 0)[..., None])
    losses = denoise(backbone, TextToVideo(Conditions((FirstFrame(probability=0.5),)))).losses(batch, CONTEXT)
    video = backbone.fed[0]["video"]
    given_B = video.sigma_BN[:, 0] == 0
    assert 0 < given_B.sum() < 8
    clean_BNC = batch.video.x_BFHWC.flatten(1, 3)
    cells = 4
    assert torch.equal(video.x_BNC[given_B, :cells], clean_BNC[given_B, :cells])
    assert not (video.x_BNC[:, cells:] == clean_BNC[:, cells:]).any()
    assert losses.loss_B.max() < 100, "what the network says about given tokens is not read"


def test_a_fully_given_sample_has_loss_zero_and_is_counted() -> None:
    @dataclass(frozen=True)
    class AllOfTheFirst(Conditions):
        def draw(self, sample: Laid, generator: torch.Generator) -> Given:
            given_BN = torch.zeros(sample.batch, sample.main.tokens, dtype=torch.bool)
            given_BN[0] = True
            return Given({"video": exactly(given_BN)})

    backbone = Answer(lambda s: torch.ones_like(s["video"].x_BNC))
    losses = denoise(backbone, TextToVideo(AllOfTheFirst())).losses(embedded(toy_batch(4)), CONTEXT)
    assert losses.loss_B[0] == 0
    assert (losses.loss_B[1:] > 0.1).all()
    assert losses.logs["nothing_to_learn"] == 0.25
    assert losses.sigma_B is not None
    assert losses.sigma_B[0] < 0


def two_scenes(size: int) -> Batch:
    """Each sample has a scene per frame, but the last one has a single scene."""
    batch = toy_batch(size)
    scene_BF = torch.arange(FRAMES).repeat(size, 1)
    scene_BF[-1] = 0
    captions = [["first scene", "second"] for _ in range(size - 1)] + [["only one"]]
    video = replace(batch.video, scene_BF=scene_BF)
    return replace(batch, latents={"video": video}, captions=captions)


def test_a_dropped_caption_is_empty_in_all_scenes_of_its_sample() -> None:
    batch = embedded(two_scenes(32))
    backbone = Answer(lambda s: s["video"].x_BNC)
    denoise(backbone, Scenes(), cfg_dropout_prob=0.4).losses(batch, CONTEXT)
    text = backbone.fed[0]["text"]
    empty_BL = text.x_BNC[..., 0] == -1
    dropped_B = empty_BL[:, 0]
    assert 5 < dropped_B.sum() < 25
    assert (empty_BL == dropped_B[:, None]).all()
    assert text.valid_BN is not None
    assert text.valid_BN[:-1].all()
    assert text.valid_BN[-1].tolist() == [True, True, False, False], "a scene that is not there stays padding"
    kept = ~dropped_B[:-1]
    assert torch.equal(text.x_BNC[:-1][kept], batch.text.x_BLC[:-1][kept])  # type: ignore[union-attr]


def test_a_trained_encoder_drops_alike_and_learns() -> None:
    encoder = HashEncoder(WORDS, 64, 5, seed=1, trainable=True)
    asked: list[list[str]] = []
    encode = encoder.encode

    def listen(captions: Any) -> Any:
        asked.append(list(captions))
        return encode(captions)

    encoder.encode = listen  # type: ignore[method-assign]
    recipe = toy_recipe(cfg_dropout_prob=0.4)
    method = Denoise(recipe, ToyBackbone(), Scenes(), encoder)
    batch = two_scenes(32)
    method.losses(batch, CONTEXT).loss_B.mean().backward()
    cached = Answer(lambda s: s["video"].x_BNC)
    denoise(cached, Scenes(), cfg_dropout_prob=0.4).losses(embedded(batch), CONTEXT)
    dropped_B = cached.fed[0]["text"].x_BNC[:, 0, 0] == -1
    pairs = [asked[0][i : i + 2] for i in range(0, 64, 2)]
    assert [pair == ["", ""] for pair in pairs] == dropped_B.tolist()
    assert encoder.words.weight.grad is not None
    assert encoder.words.weight.grad.abs().sum() > 0
    assert set(method.modules()) == {"backbone", "text_encoder"}
    held_out = replace(CONTEXT, phase="heldout")
    asked.clear()
    method.losses(batch, held_out)
    assert "" not in [caption for i, caption in enumerate(asked[0]) if i != 63], "nothing is dropped"


def test_a_cache_without_embeddings_is_told() -> None:
    with pytest.raises(UserError, match=r"holds no text embeddings.*motionloom cache"):
        denoise(ToyBackbone()).losses(toy_batch(2), CONTEXT)


def test_token_geometry() -> None:
    seconds_BF = torch.tensor([[0.0, 1.0, 2.0, 4.0]])
    scene_BF = torch.tensor([[0, 0, 0, 1]])
    geometry = token_geometry((4, 6, 8), (2, 3, 2), seconds_BF, scene_BF, 8, 5)
    assert geometry.grid == (2, 2, 4)
    assert geometry.seconds_BF.tolist() == [[0.5, 3.0]]
    assert geometry.pixels_per_cell == (24.0, 16.0)
    assert geometry.scene_BF.tolist() == [[0, 0]]
    assert geometry.batch == 5


def test_predictor_converts_each_token_at_its_own_level() -> None:
    """With the first frame clean and the second noisy, both halves come back finite and right."""
    batch = embedded(toy_batch(8))
    backbone = Answer(lambda s: batch.video.x_BFHWC.flatten(1, 3))
    denoise(backbone, FIRST_FRAME).losses(batch, CONTEXT)
    streams = backbone.fed[0]
    velocity_BNC = Predictor(backbone, "clean", LINEAR).velocity(streams, TextToVideo)["video"]  # type: ignore[arg-type]
    assert velocity_BNC.isfinite().all()
    video = streams["video"]
    back_BNC = video.x_BNC - video.sigma_BN[..., None] * velocity_BNC
    torch.testing.assert_close(back_BNC, batch.video.x_BFHWC.flatten(1, 3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("model", ["factorized", "joint", "lightning"])
@pytest.mark.parametrize("plan", [*PLANS, "first_frame", "teacher"])
def test_every_backbone_learns_under_every_plan(model: Any, plan: str) -> None:
    """One step along the gradient lowers the loss of the same draws."""
    config = ModelConfig(
        type=model, dim=16, depth=2, num_heads=2, window_size=2, patch=(1, 2, 1), dropout=0.1
    )
    backbone = build_backbone(config, CHANNELS, WORDS)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in backbone.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    conditions = Conditions((FirstFrame(probability=0.5), Scene(probability=0.5)), "one")
    chosen = {
        "text_to_video": TextToVideo(),
        "first_frame": FIRST_FRAME,
        "scenes": Scenes(conditions),
        "chunks": Chunks(conditions=conditions),
        "teacher": Chunks(frames=1, forcing="teacher", conditions=conditions),
    }[plan]
    recipe = toy_recipe(cfg_dropout_prob=0.2, model__dropout=0.1, weight_decay=0.0)
    method = Denoise(recipe, backbone, chosen)
    batch, optimizer = embedded(two_scenes(4)), method.optimizers()["denoise"]
    backbone.train()
    losses = method.losses(batch, CONTEXT)
    assert losses.loss_B.isfinite().all()
    assert losses.loss_B.shape == (4,)
    losses.loss_B.mean().backward()
    optimizer.step()
    again = method.losses(batch, CONTEXT)
    assert again.loss_B.mean() < losses.loss_B.mean()


def test_one_sample_is_learnt_by_heart(tmp_path: Path) -> None:
    """With a single clip its velocity follows from the noisy input, so the loss can go to 0."""
    config = ModelConfig(type="joint", dim=32, depth=2, num_heads=2)
    backbone = build_backbone(config, CHANNELS, WORDS)
    batch = embedded(toy_batch(1))

    class OneSample:
        def batches(self, start: int) -> Any:
            many = replace(
                batch,
                ids=batch.ids * 16,
                captions=batch.captions * 16,
                latents={"video": batch.video.map(lambda t: t.expand(16, *t.shape[1:]))},
                text=move_tensors(batch.text, lambda t: t.expand(16, *t.shape[1:])),
            )
            while True:
                yield many

    recipe = toy_recipe(
        lr=1e-2,
        max_steps=200,
        schedule="linear",
        cfg_dropout_prob=0.0,
        weight_decay=0.0,
        flow_matching__t_min=0.1,
    )
    method = Denoise(recipe, backbone, TextToVideo())
    toy_trainer(recipe, tmp_path, method=method, loader=OneSample()).fit()
    losses = [line["loss"] for line in metrics(tmp_path)]
    assert losses[0] > 1
    assert sum(losses[-10:]) / 10 < 0.03


def test_registry() -> None:
    assert METHODS["denoise"] is Denoise
