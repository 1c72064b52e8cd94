"""The one training loop. It knows steps and files; what a step optimises is the method's business.

Golden rule: N steps equal k steps + a kill + a resume + N - k, to the bit. So everything that a step depends
on is either in the checkpoint (weights, averages, optimisers, the step and the data cursor) or drawn from a
key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from motionloom.config.recipe import Recipe
from motionloom.data.batch import Batch
from motionloom.nn.attention import CHOICES
from motionloom.parallel import Ranks, is_compiled
from motionloom.train import checkpoint
from motionloom.train.checkpoint import Saveable
from motionloom.train.clock import Clock
from motionloom.train.ema import Ema
from motionloom.train.guard import NotFinite
from motionloom.train.heldout import heldout_loss
from motionloom.train.lora_start import start_from_file
from motionloom.train.method import HeldOut, Loader, Method, all_modules
from motionloom.train.metrics import Running, Writer, peak_memory_gib
from motionloom.train.report import Progress, Reporter, Silent
from motionloom.train.signals import StopWish, listening
from motionloom.train.snapshot import Snapshots, start_from
from motionloom.train.state import Identity, TrainState
from motionloom.train.stepper import Stepper
from motionloom.train.warm_up import warm_up

Weights = Callable[[], AbstractContextManager[None]]
OnSample = Callable[[int, Weights, Weights | None], None]
"""``on_sample(step, raw, ema)``: make previews. ``with raw():`` and ``with ema():`` put those weights into
the modules, in eval mode. Called on every rank, since sharded weights need all of them; write files on the
main one."""


Reason = Literal["done", "time", "signal"]
_TIME, _SIGNAL = 1, 2
_REASONS: dict[int, Reason] = {_TIME: "time", _SIGNAL: "signal"}


@dataclass(frozen=True)
class Outcome:
    """How a session ended."""

    step: int
    """Optimiser steps done, over all sessions."""
    reason: Reason
    checkpoint: Path
    seconds: float
    """Spent training in this session."""


class Trainer:
    """Runs a method over a loader's batches until the recipe's end.

    Args:
        method: its modules are already on their device and sharded (``parallel.parallelize``).
        run_dir: receives ``metrics.jsonl``, ``tensorboard/`` and ``checkpoints/``.
        heldout: clips that training never sees.
        folders: what each checkpoint carries besides weights, by folder name (tokenizer, text encoder).
        data: fingerprint of the training data; a resume on other data is refused.
        base: fingerprint of the frozen weights that adapters belong to; likewise.
    """

    def __init__(
        self,
        recipe: Recipe,
        method: Method,
        loader: Loader,
        ranks: Ranks,
        run_dir: Path,
        *,
        heldout: HeldOut | None = None,
        folders: Mapping[str, Saveable] | None = None,
        data: str = "",
        base: str = "",
        reporter: Reporter | None = None,
        on_sample: OnSample | None = None,
    ) -> None:
        self._recipe, self._config, self._method, self._loader = recipe, recipe.train, method, loader
        self._ranks, self._run_dir, self._heldout, self._on_sample = ranks, run_dir, heldout, on_sample
        self._reporter: Reporter = reporter if reporter is not None and ranks.is_main else Silent()
        self.state = TrainState()
        self.ema = Ema(method.modules(), recipe.ema) if recipe.ema.enabled else None
        self._running = Running(ranks.device)
        self._stepper = Stepper(method, recipe.train, recipe.seed, ranks, self._running)
        self._snapshots = Snapshots(
            run_dir,
            recipe,
            method,
            self.ema,
            ranks,
            Identity.of(recipe, ranks.world, data, base),
            folders if folders is not None else {},
        )
        self._saved: Path | None = None

    def fit(self, resume: bool = False) -> Outcome:
        """Train to ``max_steps``, ``max_minutes`` or a signal; ends with a checkpoint of the last step.

        Raises:
            UserError: the run folder holds another run; a resume that cannot be exact; a checkpoint that
                could not be written.
            NotFinite: loss or gradient; the weights on disk are the last good ones.
        """
        self._begin(resume)
        self._seconds_before = self.state.seconds
        self._clock = Clock(self.state.step, samples=self.state.samples, tokens=0)
        self._writer = Writer(self._run_dir, self.state.step) if self._ranks.is_main else None
        try:
            choices = self._run_dir / f"attention-{self._ranks.rank}.json"
            with listening() as wish, CHOICES.keep_in(choices, resume=resume):
                self._warm_up()
                reason = self._loop(wish)
        except NotFinite as error:
            raise NotFinite(f"{error}; {self._last_good()}") from error
        finally:
            if self._writer is not None:
                self._writer.close()
        assert self._saved is not None
        return Outcome(self.state.step, reason, self._saved, self._clock.training)

    def _loop(self, wish: StopWish) -> Reason:
        if self.state.step >= self._config.max_steps:
            self._reporter.note(
                f"all {self._config.max_steps} steps are done: raise train.max_steps to go on"
            )
            return "done"
        micro_batches = self._loader.batches(self.state.micro_batches)
        self._train_mode(True)
        while True:
            self._one_step(micro_batches, stop=self._wish(wish))
            if self.state.step == self._config.max_steps:
                reason: Reason | None = "done"
            else:
                reason = _REASONS.get(self._stepper.guard.stopping())
            self._after_step(reason)
            if reason is not None:
                return reason

    def _warm_up(self) -> None:
        """Compile for every shape before the first step; the time counts as a pause."""
        compiled = any(map(is_compiled, all_modules(self._method).values()))
        if not compiled or self.state.step >= self._config.max_steps:
            return
        self._train_mode(True)
        device = self._ranks.device
        examples = {name: batch.to(device) for name, batch in self._loader.examples().items()}
        shapes = "1 shape" if len(examples) == 1 else f"{len(examples)} shapes"
        self._reporter.note(f"compiling for {shapes} before the first step")
        with self._clock.pause():
            if line := warm_up(self._stepper, self.state.step, examples):
                self._reporter.note(line)

    def _one_step(self, micro_batches: Iterator[Batch], stop: int) -> None:
        count = self._config.grad_accum_steps
        batches = [batch.to(self._ranks.device) for batch in islice(micro_batches, count)]
        assert len(batches) == count, "the loader ended; it must go on for ever"
        self._stepper.step(self.state.step, batches, stop)
        self.state.step += 1
        self.state.micro_batches += count
        self.state.samples += sum(len(batch.ids) for batch in batches) * self._ranks.world
        if self.ema is not None:
            self.ema.update(self.state.step)

    def _after_step(self, end: Reason | None) -> None:
        """Log, measure, preview and save what is due; ``end`` says why this step is the last one."""
        c, step = self._config, self.state.step
        save = end is not None or step % c.save_every_steps == 0
        # A checkpoint closes the figures' window as well: a resume starts with an empty one.
        log = save or step == 1 or step % c.log_every_steps == 0
        # A machine that is being taken away leaves no time to measure.
        # At the first step too: what the others are to be compared with.
        due = _due(step, c.heldout_every_steps) or (step == 1 and c.heldout_every_steps > 0)
        measure = bool(self._heldout) and (end in ("done", "time") or due)
        sample = self._on_sample is not None and end != "signal" and _due(step, c.sample_every_steps)
        values: dict[str, float] = {}
        if save or log or measure or sample:
            self._stepper.guard.look()
            values = self._figures() if log else {}
            if measure and end is not None:
                self._reporter.note("measuring the held-out loss before the end")
            with self._clock.pause(), self._measuring():
                self._do_what_is_due(values, measure=measure, sample=sample, save=save)
        limit = None if c.max_minutes is None else c.max_minutes * 60
        left = self._clock.left(step, c.max_steps, limit)
        self._reporter.step(Progress(step, c.max_steps, self._clock.rate(step), left, values))

    def _do_what_is_due(self, values: dict[str, float], *, measure: bool, sample: bool, save: bool) -> None:
        if measure:
            values |= self._heldout_losses()
        if values and self._writer is not None:
            self._writer.write(self.state.step, values)
        if sample and self._on_sample is not None:
            self._on_sample(self.state.step, nullcontext, self.ema.applied if self.ema else None)
        if save:
            self.state.seconds = self._seconds_before + self._clock.training
            self._saved, complaints = self._snapshots.save(self.state)
            for line in complaints:
                self._reporter.note(line)

    def _figures(self) -> dict[str, float]:
        tokens = self._stepper.num_tokens * self._ranks.world
        return {
            **self._running.take(self._ranks),
            "lr": self._stepper.lr,
            **self._clock.rates(samples=self.state.samples, tokens=tokens),
            "peak_memory_gib": peak_memory_gib(self._ranks.device),
        }

    def _heldout_losses(self) -> dict[str, float]:
        assert self._heldout is not None
        heldout = self._heldout

        def loss() -> float:
            autocast = self._stepper.autocast()
            return heldout_loss(self._method, heldout, self._ranks, self._recipe.seed, autocast)

        values = {"heldout_loss": loss()}
        if self.ema is not None:
            with self.ema.applied():
                values["heldout_loss_ema"] = loss()
        return values

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        self._train_mode(False)
        yield
        self._train_mode(True)

    def _train_mode(self, on: bool) -> None:
        for module in all_modules(self._method).values():
            module.train(on)

    def _begin(self, resume: bool) -> None:
        """Restore, or start anew."""
        self._ranks.main_does(lambda: self._refuse_or_clean(resume))
        restored = self._snapshots.restore(self.state) if resume else None
        if restored is not None:
            self._saved, changes = restored
            self._reporter.note(f"resumed from {self._saved}")
            if changes:
                self._reporter.note(
                    f"the recipe changed since, so it is another run from here: {', '.join(changes)}"
                )
            return
        if resume:
            self._reporter.note(f"{self._run_dir} holds no checkpoint yet: starting at step 0")
        if source := self._config.init_from:
            found = start_from(Path(source), self._method.modules(), self._ranks)
        elif source := self._recipe.lora.init_from:
            found = f"{start_from_file(self._recipe, self._method.modules())} layers"
        else:
            return
        self._reporter.note(f"starting from the weights of {source}, {found}")
        if self.ema is not None:
            self.ema.update(0)

    def _refuse_or_clean(self, resume: bool) -> None:
        checkpoint.clean(self._run_dir)
        if not resume:
            checkpoint.refuse_held(self._run_dir)

    def _last_good(self) -> str:
        newest = checkpoint.latest(self._run_dir)
        if newest is None:
            return (
                "there is no checkpoint yet: lower train.lr or lengthen train.warmup_steps, and start again"
            )
        return f"the last good checkpoint is {newest}: lower train.lr, then go on from it with --resume"

    def _wish(self, wish: StopWish) -> int:
        """Why this rank would end after the coming step; 0 if it would not."""
        if wish.name:
            return _SIGNAL
        limit = self._config.max_minutes
        return _TIME if limit is not None and self._clock.wall >= limit * 60 else 0


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
