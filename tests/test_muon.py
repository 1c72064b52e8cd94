"""Muon beside AdamW as one optimiser: who steps what, by how much, and whether a resume notices."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from motionloom.config.recipe import TrainConfig
from motionloom.errors import UserError
from motionloom.parallel import load_optimizer_state, named_optimizer_state
from motionloom.rng import torch_generator
from motionloom.train.muon import MuonAdamW, muon
from motionloom.train.optim import make_optimizer, set_lr

LR, BETAS = 1e-2, (0.9, 0.95)


class Net(nn.Module):
    """An entry, two blocks and an exit, as backbones have."""

    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.Linear(6, 16)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in "ab"
        )
        self.exit = nn.Linear(16, 6)
        generator = torch_generator("muon net")
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 0.3, generator=generator)

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.exit(x)


def optimizer_of(net: Net, weight_decay: float = 0.0) -> MuonAdamW:
    return muon({"net": net}, LR, BETAS, weight_decay)


def loss_of(net: Net, step: int) -> Tensor:
    x = torch.randn(32, 6, generator=torch_generator("muon data", step))
    return (net(x) - x.flip(1)).square().mean()


def train(net: Net, optimizer: MuonAdamW, begin: int, end: int) -> None:
    for step in range(begin, end):
        optimizer.zero_grad()
        loss_of(net, step).backward()
        optimizer.step()


def in_blocks(name: str) -> bool:
    return name.startswith("layers") and name.endswith("weight")


def test_block_matrices_step_along_the_nearest_orthogonal_matrix() -> None:
    net = Net()
    before = copy.deepcopy(net)
    optimizer = optimizer_of(net)
    for parameter in net.parameters():
        # Of full rank: the orthogonal factor of a direction without gradient would be anybody's guess.
        parameter.grad = torch.randn(parameter.shape, generator=torch_generator("grad", parameter.numel()))
    optimizer.step()
    for (name, new), old in zip(net.named_parameters(), before.parameters(), strict=True):
        if not in_blocks(name):
            continue
        assert new.grad is not None
        u, _, vh = torch.linalg.svd(new.grad, full_matrices=False)
        wanted = -LR * 0.2 * max(new.shape) ** 0.5 * (u @ vh)
        moved = (new - old).detach()
        # Five Newton-Schulz steps bring singular values between about 0.7 and 1.2, not to 1.
        cosine = (moved * wanted).sum() / (moved.norm() * wanted.norm())
        assert cosine > 0.95, name
        assert 0.7 < moved.norm() / wanted.norm() < 1.25, name


def test_the_rest_steps_exactly_as_adamw() -> None:
    net, reference = Net(), Net()
    optimizer = optimizer_of(net)
    rest = [p for name, p in reference.named_parameters() if not in_blocks(name)]
    adamw = torch.optim.AdamW(rest, lr=LR, betas=BETAS, weight_decay=0.0, fused=True)
    for ours, theirs in zip((optimizer,), (adamw,), strict=True):
        loss_of(net, 0).backward()
        loss_of(reference, 0).backward()
        ours.step()
        theirs.step()
    for (name, ours), theirs in zip(net.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs) is not in_blocks(name), name


def test_the_rest_may_have_a_rate_of_its_own() -> None:
    nets = [Net(), Net(), Net()]
    rates = [(LR, None), (LR, LR / 8), (LR / 8, None)]
    for net, (lr, rest) in zip(nets, rates, strict=True):
        optimizer = muon({"net": net}, lr, BETAS, 0.0, rest)
        set_lr(optimizer, 0.5)
        train(net, optimizer, 0, 1)
    whole, own, slow = (dict(net.named_parameters()) for net in nets)
    for name, parameter in own.items():
        like, other = (whole, slow) if in_blocks(name) and parameter.ndim == 2 else (slow, whole)
        assert torch.equal(parameter, like[name]), name
        assert not torch.equal(parameter, other[name]), name


def test_a_critic_at_another_rate_keeps_the_ratio_of_the_rest() -> None:
    t = TrainConfig(optimizer="muon", lr=LR, rest_lr=LR / 8)
    critic = make_optimizer({"net": Net()}, t, lr=LR / 2)
    assert {group["muon"]: group["lr"] for group in critic.param_groups} == {True: LR / 2, False: LR / 16}


def test_it_learns_and_follows_the_schedule() -> None:
    net = Net()
    optimizer = optimizer_of(net, weight_decay=0.01)
    first = loss_of(net, 0).item()
    train(net, optimizer, 0, 60)
    assert loss_of(net, 0).item() < 0.1 * first
    still = copy.deepcopy(net)
    set_lr(optimizer, 0.0)
    train(net, optimizer, 60, 61)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), still.parameters(), strict=True))


def test_a_resume_is_exact() -> None:
    whole, part = Net(), Net()
    optimizer = optimizer_of(whole, 0.01)
    train(whole, optimizer, 0, 8)
    first = optimizer_of(part, 0.01)
    train(part, first, 0, 5)
    saved = named_optimizer_state(first, {p: n for n, p in part.named_parameters()})
    saved = {name: value.clone() for name, value in saved.items()}

    resumed = copy.deepcopy(part)
    second = optimizer_of(resumed, 0.01)
    load_optimizer_state(second, {p: n for n, p in resumed.named_parameters()}, saved, "test")
    train(resumed, second, 5, 8)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert len(saved) == 3 * 8 + 4, (
        "exp_avg, exp_avg_sq and step for eight; a momentum for each of four matrices"
    )


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UserError, match="muon finds no trainable block matrices"):
        muon({"net": nn.Linear(3, 3)}, LR, BETAS, 0.0)


class CallableBlocks(nn.ModuleList):
    """As Wan has them: named ``blocks``, and called."""

    def __call__(self) -> list[nn.Module]:
        return list(self)


def test_nothing_may_be_left_for_adamw() -> None:
    """Adapters inside blocks are matrices alone. Blocks may be a list of modules as well as a method."""
    net = nn.Module()
    net.blocks = CallableBlocks(nn.Linear(4, 8, bias=False) for _ in "ab")
    for name, p in net.named_parameters():
        nn.init.normal_(p, generator=torch_generator(name))
    before = copy.deepcopy(net.state_dict())
    optimizer = muon({"net": net}, LR, BETAS, 0.0)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=torch_generator("grad", len(p)))
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in net.named_parameters())
    names = {p: n for n, p in net.named_parameters()}
    saved = {name: value.clone() for name, value in named_optimizer_state(optimizer, names).items()}
    load_optimizer_state(muon({"net": net}, LR, BETAS, 0.0), names, saved, "test")
    assert len(saved) == 2
