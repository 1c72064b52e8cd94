"""What a model's files say of it, looked at before anything is coded with it. All raise ValueError, one line.

Shapes: C channels of a latent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a model's class raises where a value of its config is of a wrong kind: it does not look at them."""
_LARGEST = torch.finfo(torch.float32).max


def one_line(error: Exception) -> str:
    """What an error says; with its type where it would be a mere word, such as the key of a KeyError."""
    said = str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
    return " ".join(said.split())[:200]


@contextmanager
def damage_as_value_error() -> Iterator[None]:
    """Whatever a damaged config makes the code inside raise leaves as ValueError."""
    try:
        yield
    except DAMAGE as error:
        raise ValueError(one_line(error)) from None


def require_counts(**counts: Any) -> None:
    """Every value is a whole number above 0."""
    for name, value in counts.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} is {value!r}, not a whole number above 0")


def require_numbers(values: Any, name: str) -> None:
    """Every one of the values is a number."""
    if not isinstance(values, list | tuple) or not all(type(value) in (int, float) for value in values):
        raise ValueError(f"{name} is {values!r}, not a list of numbers")
    if any(type(value) is int and not fits(value) for value in values):
        raise ValueError(f"a number of {name} is too large")


def fits(value: float) -> bool:
    """Whether float32 has room for a number: JSON sets no end to whole ones, and torch raises."""
    return -_LARGEST <= value <= _LARGEST


def require_factor(value: Any, name: str) -> None:
    """The value is a finite number above 0."""
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}, not a number above 0")


def require_truths(config: Any, *names: str) -> None:
    """Every one of those values of a config is true or false."""
    for name in names:
        if not isinstance(config[name], bool):
            raise ValueError(f"{name} is {config[name]!r}, neither true nor false")


def require_statistics(mean_C: Tensor, std_C: Tensor, channels: int) -> None:
    """One finite mean and one deviation above 0 for each channel of a latent.

    One number for all would be broadcast, and a deviation of 0 divided by: both in silence.
    """
    for name, values_C in (("means", mean_C), ("deviations", std_C)):
        if values_C.shape != (channels,):
            found = " x ".join(map(str, values_C.shape)) or "single"
            raise ValueError(f"{found} {name} for latents of {channels} numbers")
        if not values_C.isfinite().all():
            raise ValueError(f"the {name} of its latents are not all finite")
    if not (std_C > 0).all():
        raise ValueError("the deviations of its latents are not all above 0")
