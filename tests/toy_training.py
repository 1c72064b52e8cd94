"""A toy run for the trainer's tests; also a program, so that it can be killed and started on several ranks.

python toy_training.py fit RUN_DIR RECIPE_JSON [--resume] [--pause SECONDS]
python toy_training.py compare RUN_DIR RECIPE_JSON   # under torchrun: gradients against one process, then fit
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motionloom.config.recipe import Recipe
from motionloom.data.batch import Batch, Latents
from motionloom.methods import Denoise
from motionloom.parallel import Gradients, Ranks, clip_, grad_norm, parallelize, start_ranks, whole
from motionloom.plans import PLANS, Conditions, Streams, Visibility
from motionloom.rng import numpy_rng, torch_generator
from motionloom.text.hash import HashEncoder
from motionloom.train import Losses, Progress, StepContext, Trainer
from motionloom.train.lora import add_lora
from motionloom.train.optim import adamw

# Toys gain nothing from threads, and lose much when other programs keep the cores busy.
torch.set_num_threads(1)

FRAMES, SIDE, CHANNELS, WIDTH, WORDS = 2, 2, 3, 8, 4
CAPTIONS = ("red square", "blue square", "red circle", "a slow blue circle")


def toy_recipe(**train: Any) -> Recipe:
    """A small recipe; keywords go to ``train``, those with two underscores to their section."""
    first_frame = {"type": "first_frame", "probability": 0.5}
    tree: dict[str, Any] = {"seed": 3, "plan": {"conditions": [first_frame]}, "train": {}}
    defaults = {"batch_size": 4, "lr": 3e-3, "precision": "fp32", "max_steps": 60, "weight_decay": 0.1}
    for key, value in {**defaults, "log_every_steps": 1, "save_every_steps": 1000, **train}.items():
        section, _, name = key.rpartition("__")
        tree.setdefault(section or "train", {})[name] = value
    return Recipe.model_validate(tree)


class Block(nn.Module):
    """With dropout, so that the global generator is put to the test as well."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x_BND: Tensor) -> Tensor:
        return x_BND + self.down(self.dropout(torch.tanh(self.up(self.norm(x_BND)))))


class ToyBackbone(nn.Module):
    """Every token on its own, with its noise level and the mean of the text."""

    patch = (1, 1, 1)

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.tokens, self.words = nn.Linear(CHANNELS, WIDTH), nn.Linear(WORDS, WIDTH)
        self.level, self.out = nn.Linear(1, WIDTH), nn.Linear(WIDTH, CHANNELS)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        for name, p in self.named_parameters():
            generator = torch_generator(seed, "toy", name)
            nn.init.normal_(p, float("norm.weight" in name), 0.3, generator=generator)

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def forward(self, streams: Streams, visibility: Visibility) -> dict[str, Tensor]:
        video, text = streams["video"], streams["text"]
        assert text.valid_BN is not None
        weight_BN1 = text.valid_BN[..., None].float()
        words_B1D = (self.words(text.x_BNC) * weight_BN1).sum(1, keepdim=True) / weight_BN1.sum(
            1, keepdim=True
        )
        x_BND = self.tokens(video.x_BNC) + self.level(video.sigma_BN[..., None]) + words_B1D
        for layer in self.layers:
            x_BND = layer(x_BND)
        return {"video": self.out(x_BND)}


def toy_batch(size: int, *key: int | str) -> Batch:
    """Clips whose mean follows their caption."""
    rng = numpy_rng("toy batch", *key)
    captions = [CAPTIONS[i] for i in rng.integers(len(CAPTIONS), size=size)]
    means = torch.tensor([[1.0 if "red" in c else -1.0, len(c) / 9 - 1, 0.0] for c in captions])
    shape = (size, FRAMES, SIDE, SIDE, CHANNELS)
    noise = torch.from_numpy(rng.standard_normal(shape, dtype="float32"))
    return Batch(
        ids=[f"{key}-{i}" for i in range(size)],
        latents={
            "video": Latents(
                x_BFHWC=means[:, None, None, None, :] + 0.1 * noise,
                seconds_BF=torch.arange(FRAMES).float().repeat(size, 1) / 4,
                span_BF2=(torch.arange(FRAMES)[:, None] + torch.tensor([-0.5, 0.5])).repeat(size, 1, 1) / 4,
                scene_BF=torch.zeros(size, FRAMES, dtype=torch.long),
                pixels=8,
            )
        },
        captions=[[c] for c in captions],
    )


@dataclass
class ToyLoader:
    """Batch n of a rank is a pure function of (seed, rank, n)."""

    size: int
    rank: int = 0
    split: str = "train"

    def batches(self, start: int) -> Iterator[Batch]:
        n = start
        while True:
            yield self.batch(n)
            n += 1

    def batch(self, n: int) -> Batch:
        return toy_batch(self.size, self.split, self.rank, n)

    def examples(self) -> dict[str, Batch]:
        return {"toy": self.batch(0)}

    def __len__(self) -> int:
        return 3


class Affine(nn.Linear):
    """Ours, because torch does not compile a module of its own that stands alone."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Regression:
    """A method without randomness: a linear map must give the latents' mean."""

    def __init__(self, seed: int = 0) -> None:
        self.net = Affine(CHANNELS, 1)
        nn.init.normal_(self.net.weight, generator=torch_generator(seed, "regression"))
        nn.init.zeros_(self.net.bias)
        self._optimizers = {"main": adamw(self.modules(), 1e-2, (0.9, 0.95), 0.0)}

    def modules(self) -> dict[str, nn.Module]:
        return {"net": self.net}

    def beside(self) -> dict[str, nn.Module]:
        return {}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return dict(self._optimizers)

    def turns(self, step: int) -> tuple[str, ...]:
        return ("main",)

    def losses(self, batch: Batch, context: StepContext) -> Losses:
        x_BFHWC = batch.video.x_BFHWC
        wanted_BFHW = x_BFHWC.mean(dim=-1) + 1
        return Losses((self.net(x_BFHWC)[..., 0] - wanted_BFHW).square().mean(dim=(1, 2, 3)))


@dataclass
class Listener:
    """A reporter that remembers, and can be slow so that there is time to kill its process."""

    pause: float = 0.0
    notes: list[str] = field(default_factory=list)
    steps: list[Progress] = field(default_factory=list)

    def step(self, progress: Progress) -> None:
        self.steps.append(progress)
        time.sleep(self.pause)

    def note(self, message: str) -> None:
        self.notes.append(message)


def toy_denoise(recipe: Recipe, ranks: Ranks) -> Denoise:
    """Sharded as the recipe says; with LoRA the words are frozen as well."""
    backbone = ToyBackbone(recipe.seed)
    text = HashEncoder(WORDS, 64, 5, seed=recipe.seed, trainable=True)
    if recipe.lora.enabled:
        toy_lora(backbone, recipe)
        text.requires_grad_(False)
    parallelize(
        {"backbone": backbone, "text_encoder": text}, ranks, recipe.train.sharding, recipe.train.compile
    )
    plan = PLANS[recipe.plan.type](conditions=Conditions(recipe.plan.conditions, recipe.plan.choose))
    return Denoise(recipe, backbone, plan, text)


def toy_lora(backbone: ToyBackbone, recipe: Recipe) -> None:
    """Adapters as if some steps were done: while B is 0, A has no gradient."""
    base_dtype = torch.bfloat16 if recipe.train.precision == "bf16" else None
    add_lora(backbone, recipe.lora, torch_generator(recipe.seed, "lora"), base_dtype)
    for name, p in backbone.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, 0, 0.1, generator=torch_generator(recipe.seed, name))


def toy_trainer(recipe: Recipe, run_dir: Path, ranks: Ranks | None = None, **options: Any) -> Trainer:
    """A trainer over the toy world."""
    ranks = ranks or Ranks()
    method = options.pop("method", None) or toy_denoise(recipe, ranks)
    loader = options.pop("loader", None) or ToyLoader(recipe.train.batch_size, ranks.rank)
    return Trainer(recipe, method, loader, ranks, run_dir, **options)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def gradients(
    sharding: str, ranks: Ranks, share: tuple[int, int], options: dict[str, Any]
) -> tuple[dict[str, Tensor], float, float]:
    """Whole gradients of the ranks ``range(*share)``, their norm, and the norm after clipping to 0.1."""
    exact = {"sharding": sharding, "cfg_dropout_prob": 0.0, "precision": "fp32"}
    recipe = toy_recipe(**{**options, **exact})
    method = toy_denoise(recipe, ranks)
    parameters = [p for group in method.optimizers()["denoise"].param_groups for p in group["params"]]
    loss = Gradients(method.losses, parameters, method.modules().values(), ranks)
    for module in method.modules().values():
        module.eval()
    names = {p: f"{top}.{n}" for top, m in method.modules().items() for n, p in m.named_parameters()}
    for micro in range(2):
        with loss.accumulating(last=micro == 1):
            # One process plays both ranks in turn, with the draws of each.
            for rank in range(*share):
                context = StepContext(0, 0, micro, rank, ranks.device, "denoise")
                part = loss(toy_batch(4, rank, micro), context).loss_B.mean()
                (part / (share[1] - share[0])).backward()
    norm = float(grad_norm(parameters))
    named = [(names[p], p.grad) for p in parameters if p.grad is not None]
    found = whole(((name, grad.clone()) for name, grad in named), ranks)
    clip_(parameters, 0.1, grad_norm(parameters))
    return found, norm, float(grad_norm(parameters))


def compare(out: Path, ranks: Ranks, options: dict[str, Any]) -> None:
    """The largest difference of gradients on these ranks to those of one process, and the norms."""
    alone, norm, _ = gradients("ddp", Ranks(), (0, ranks.world), options)
    result: dict[str, Any] = {"world": ranks.world, "single": {"norm": norm}}
    for sharding in ("ddp", "fsdp"):
        found, norm, clipped = gradients(sharding, ranks, (ranks.rank, ranks.rank + 1), options)
        result[sharding] = {"norm": norm, "clipped": clipped, "same_names": found.keys() == alone.keys()}
        result[sharding]["difference"] = max(
            (float((found[n] - alone[n]).abs().max()) for n in found), default=0
        )
    if ranks.is_main:
        out.write_text(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("fit", "compare"))
    parser.add_argument("out", type=Path)
    parser.add_argument("recipe", nargs="?", default="{}")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--pause", type=float, default=0.0)
    args = parser.parse_args()
    with start_ranks("cpu") as ranks:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"{ranks.rank}.pid").write_text(str(os.getpid()))
        if args.what == "compare":
            compare(args.out / "found.json", ranks, json.loads(args.recipe))
        heldout = ToyLoader(2, ranks.rank, "heldout")
        recipe = toy_recipe(**json.loads(args.recipe))
        trainer = toy_trainer(recipe, args.out, ranks, heldout=heldout, reporter=Listener(args.pause))
        print(trainer.fit(args.resume).reason)


if __name__ == "__main__":
    sys.exit(main())
