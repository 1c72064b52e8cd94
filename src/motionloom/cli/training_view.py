"""What a training run shows while it goes: a bar with rate and time left, and a line at each logging step."""

from __future__ import annotations

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bars

from motionloom.cli.console import Out
from motionloom.train.report import Progress

SHOWN = ("loss", "grad_norm", "lr", "heldout_loss", "heldout_loss_ema", "samples_per_second")


class TrainingView:
    """A :class:`motionloom.train.report.Reporter` on the console. Use as a context manager."""

    def __init__(self, out: Out) -> None:
        self._out = out
        self._bar: Bars | None = None

    def __enter__(self) -> TrainingView:
        if self._out.err.is_terminal:
            self._bar = Bars(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]} steps/s, {task.fields[left]} left  {task.fields[loss]}"),
                console=self._out.err,
            )
            self._task = self._bar.add_task("training", total=None, rate="", left="", loss="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, progress: Progress) -> None:
        left = f"{progress.seconds_left / 60:.1f} min"
        if self._bar is not None:
            loss = f"loss {progress.values['loss']:.4f}" if "loss" in progress.values else None
            self._bar.update(self._task, completed=progress.step, total=progress.max_steps)
            self._bar.tasks[0].fields.update(rate=f"{progress.steps_per_second:.2f}", left=left)
            if loss:
                self._bar.tasks[0].fields["loss"] = loss
        elif progress.values:
            shown = "  ".join(f"{k} {progress.values[k]:.4g}" for k in SHOWN if k in progress.values)
            self._out.note(
                f"step {progress.step}/{progress.max_steps}  {shown}  "
                f"{progress.steps_per_second:.2f} steps/s, {left} left"
            )

    def note(self, message: str) -> None:
        self._out.note(message)
