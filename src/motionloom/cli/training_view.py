"""What a training run shows while it goes: a bar with rate and time left, and a line at each logging step."""

from __future__ import annotations

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bars

from motionloom.cli.console import Out, duration
from motionloom.train.report import Progress

SHOWN = {
    "loss": "loss",
    "heldout_loss": "held out",
    "heldout_loss_ema": "held out, EMA",
    "grad_norm": "gradient",
    # Of a student and its critic each has its own.
    "loss/student": "student",
    "loss/critic": "critic",
    "from_teacher": "from the teacher",
    "gan_judge": "judge",
}


class TrainingView:
    """A :class:`motionloom.train.report.Reporter` on the console. Use as a context manager."""

    def __init__(self, out: Out) -> None:
        self._out = out
        self._bars = Bars(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[pace]}  {task.fields[figures]}"),
            console=out.err,
            disable=not out.err.is_terminal,
        )
        self._task = self._bars.add_task("training", total=None, pace="", figures="")

    def __enter__(self) -> TrainingView:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def step(self, progress: Progress) -> None:
        """After an optimiser step: move the bar, or write a line where there is something to write."""
        pace = f"{progress.steps_per_second:.3g} steps/s, {duration(progress.seconds_left)} left"
        figures = {name: progress.values[key] for key, name in SHOWN.items() if key in progress.values}
        shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        if self._bars.disable:
            if shown:
                self._out.note(f"step {progress.step}/{progress.max_steps}  {shown}  {pace}")
            return
        self._bars.update(self._task, completed=progress.step, total=progress.max_steps, pace=pace)
        if shown:
            self._bars.update(self._task, figures=shown)

    def note(self, message: str) -> None:
        """A line for people."""
        self._out.note(message)
