"""One optimiser step: accumulate, average over ranks, clip, guard, step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from motionloom.config.recipe import TrainConfig
from motionloom.data.batch import Batch
from motionloom.parallel import Gradients, Ranks, clip_, grad_norm
from motionloom.rng import key_to_seed
from motionloom.train.guard import Guard
from motionloom.train.method import Losses, Method, StepContext, all_modules
from motionloom.train.metrics import Running
from motionloom.train.optim import set_lr
from motionloom.train.schedule import lr_ratio


class Stepper:
    """Takes steps for a method. Figures go to ``running`` and stay on the device."""

    def __init__(
        self, method: Method, config: TrainConfig, seed: int, ranks: Ranks, running: Running
    ) -> None:
        self._method, self._config, self._seed, self._ranks, self._running = (
            method,
            config,
            seed,
            ranks,
            running,
        )
        self.guard = Guard(ranks)
        self.lr = 0.0
        self.num_tokens = 0
        """Video tokens seen by this rank so far in the session."""
        self._optimizers = method.optimizers()
        self._parameters = {turn: _trained(o) for turn, o in self._optimizers.items()}
        modules = all_modules(method).values()
        self._gradients = {
            turn: Gradients(method.losses, parameters, modules, ranks)
            for turn, parameters in self._parameters.items()
        }

    def autocast(self) -> torch.autocast:
        """The recipe's precision. Weights, averages and optimiser state stay float32."""
        return torch.autocast(
            self._ranks.device.type, dtype=torch.bfloat16, enabled=self._config.precision == "bf16"
        )

    def step(self, step: int, micro_batches: Sequence[Batch], stop: int) -> None:
        """Optimiser step ``step`` (from 0) of every turn, all on the same micro-batches.

        ``stop`` is this rank's wish to end after it; ``guard.stopping`` tells what all ranks agreed on.
        """
        c = self._config
        ratio = lr_ratio(step, c.schedule, c.warmup_steps, c.max_steps, c.min_lr_ratio)
        for turn in self._method.turns(step):
            loss = self._backward(step, turn, micro_batches)
            parameters = self._parameters[turn]
            norm = grad_norm(parameters)
            if c.clip_grad_norm is not None:
                clip_(parameters, c.clip_grad_norm, norm)
            self.lr = set_lr(self._optimizers[turn], ratio)
            self.guard.step(self._optimizers[turn], step, loss, norm, stop)
            # All of them: a critic's loss also reaches the generator, whose turn it is not.
            for optimizer in self._optimizers.values():
                optimizer.zero_grad(set_to_none=True)
            self._running.add(_name("grad_norm", turn, self._optimizers), norm)

    def rehearse(self, step: int, batch: Batch) -> None:
        """Forward and backward of every turn of ``step``; no gradient and no figure is kept."""
        for turn in self._method.turns(step):
            self._backward(step, turn, [batch], record=False)
            for optimizer in self._optimizers.values():
                optimizer.zero_grad(set_to_none=True)

    def _backward(self, step: int, turn: str, micro_batches: Sequence[Batch], record: bool = True) -> Tensor:
        """Gradients of the mean loss over micro-batches and ranks; returns this rank's part of it."""
        gradients, parts = self._gradients[turn], []
        for micro, batch in enumerate(micro_batches):
            context = StepContext(
                self._seed,
                step,
                micro,
                self._ranks.rank,
                self._ranks.device,
                turn,
                rehearsal=not record,
            )
            # Dropout knows no generator but the global one. Keyed here, it survives a resume, and whatever a
            # preview drew before this step is forgotten.
            torch.manual_seed(key_to_seed(self._seed, "global", step, micro, self._ranks.rank, turn))
            with gradients.accumulating(last=micro == len(micro_batches) - 1):
                with self.autocast():
                    losses: Losses = gradients(batch, context)
                    part = losses.loss_B.mean() / len(micro_batches)
                part.backward()
            parts.append(part.detach())
            if record:
                self._record(losses, turn)
        return torch.stack(parts).sum()

    def _record(self, losses: Losses, turn: str) -> None:
        self.num_tokens += losses.num_tokens
        self._running.add(_name("loss", turn, self._optimizers), losses.loss_B.mean())
        for name, value in losses.logs.items():
            self._running.add(name, value)
        if losses.sigma_B is not None:
            self._running.add_by_sigma(losses.loss_B, losses.sigma_B)


def _name(what: str, turn: str, turns: dict[str, torch.optim.Optimizer]) -> str:
    return what if len(turns) == 1 else f"{what}/{turn}"


def _trained(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]
