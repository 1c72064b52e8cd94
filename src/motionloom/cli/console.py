"""What commands say: progress and notes for people on stderr, results on stdout, ``--json`` for programs.

Exit codes: 0 done; 1 done, but something that the command looks after is wrong; 2 the request or its input is
wrong and nothing was made; 130 interrupted.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from motionloom.errors import UserError

FAILED, WRONG, INTERRUPTED = 1, 2, 130

Advance = Callable[[int, int], None]
"""(done, total); of a total of 0 nobody knows the end."""


class Rate(ProgressColumn):
    """Work per second, smoothed."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.3g}/s" if speed else "", style="progress.data.speed")


class Out:
    """Where one command writes."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.err = Console(stderr=True, highlight=False)

    def note(self, line: str) -> None:
        """A line for people."""
        self.err.print(escape(line), soft_wrap=True)

    def result(self, value: Mapping[str, Any], lines: Sequence[str] = ()) -> None:
        """The command's answer: ``value`` with --json, else ``lines``."""
        if self.as_json:
            print(json.dumps(value, default=str), flush=True)
            return
        for line in lines:
            print(line, flush=True)

    def table(self, title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table for people, on stdout; nothing with --json."""
        if self.as_json:
            return
        table = Table(title=title or None, title_justify="left", box=None, pad_edge=False)
        for head in heads:
            table.add_column(head)
        for row in rows:
            table.add_row(*map(escape, row))
        Console(highlight=False).print(table)

    @contextmanager
    def progress(self, what: str) -> Iterator[Advance]:
        """A bar with rate and time left; without a terminal a line every tenth of the way."""
        with self.stages() as advance:
            yield lambda done, total: advance(what, done, total)

    @contextmanager
    def stages(self) -> Iterator[Callable[[str, int, int], None]]:
        """As :meth:`progress`, for work that names its stages."""
        if not self.err.is_terminal:
            yield _Lines(self)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            Rate(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.err) as bars:
            tasks: dict[str, Any] = {}

            def advance(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = bars.add_task(what, total=total or None)
                bars.update(tasks[what], completed=done, total=total or None)

            yield advance


class _Lines:
    """Progress for logs: the first item, every tenth of the way, and at least one line a minute."""

    def __init__(self, out: Out) -> None:
        self._out = out
        self._what, self._tenth = "", -1
        self._first, self._began, self._shown = 0, 0.0, 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self._what:
            # The rate counts from the first item on: what was done before it is no part of this stage.
            self._what, self._tenth, self._first, self._began = what, -1, done, now
        tenth = 10 * done // total if total else done.bit_length()
        if tenth == self._tenth and now - self._shown < 60:
            return
        self._tenth, self._shown = tenth, now
        line = f"{what}: {done} of {total}" if total else f"{what}: {done}"
        if done > self._first:
            rate = (done - self._first) / max(now - self._began, 1e-6)
            line += f", {rate:.3g}/s"
            line += f", {duration((total - done) / rate)} left" if done < total else ""
        self._out.note(line)


def duration(seconds: float) -> str:
    """``45 s``, ``7.5 min`` or ``3.2 h``."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"


def finite(name: str, value: float | None) -> None:
    """Raises UserError for infinity and for what is no number."""
    if value is not None and not math.isfinite(value):
        raise UserError(f"{name} {value}: say a number of seconds, or leave it out")


def new_folder(path: Path) -> Path:
    """Make the folder that the user named for output. Raises UserError if it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be made ({error.strerror}); name another folder") from None
    return path


def new_file(path: Path) -> Path:
    """The file that the user named for output. Raises UserError if it is there already."""
    if path.exists():
        raise UserError(f"{path}: is there already; name another file, or delete it")
    return path


def skipped(out: Out, lines: Sequence[str], most: int = 20) -> None:
    """Problem lines: the first few, and always the last, which counts them."""
    for line in lines[:-1][:most]:
        out.note(f"  {line}")
    if len(lines) - 1 > most:
        out.note(f"  ... and {len(lines) - 1 - most} more; --json lists all")
    if lines:
        out.note(lines[-1])


def die(message: str, as_json: bool, code: int = WRONG) -> NoReturn:
    """The one line of an error."""
    if as_json:
        print(json.dumps({"error": message}), flush=True)
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)
