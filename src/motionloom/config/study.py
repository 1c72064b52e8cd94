"""A study: the same two recipes, a tokenizer's and a generator's, over variants, budgets and seeds.

A point of it is one tokenizer and one generator on its latents. Its recipes are the study's two, with
overrides laid over one another in this order: ``both``, then ``for_tokenizer`` or ``for_generator``; over the
tokenizer's those of its variant and of its budget as well; and the seed last.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from motionloom.config.keys import expected, flatten, shown
from motionloom.config.section import NotNegative, Section
from motionloom.config.yaml_text import read_yaml
from motionloom.errors import UserError

SET_BY_THE_STUDY = ("seed", "output_dir", "experiment_name")
"""Keys of recipes that a study decides itself."""


def _overrides(value: Any) -> tuple[str, ...]:
    """``[train.lr=1e-3]``, ``{train.lr: 1e-3}``, ``{train: {lr: 1e-3}}`` -> overrides of the command line."""
    if isinstance(value, Mapping):
        found = tuple(f"{key}={json.dumps(inner)}" for key, inner in flatten(value).items())
    elif isinstance(value, list | tuple) and all(isinstance(one, str) and "=" in one for one in value):
        found = tuple(value)
    else:
        raise ValueError(f"{shown(value)} is no list of key=value, nor `key: value` lines; write one of them")
    for key in (one.partition("=")[0].strip() for one in found):
        if key in SET_BY_THE_STUDY:
            raise ValueError(f"{key} is decided by the study: leave it out{_instead(key)}")
    return found


def _instead(key: str) -> str:
    return " and say seeds" if key == "seed" else ""


def _budgets(value: Any) -> Any:
    """A list of names with overrides, or a mapping -> by name: a share of the data, and the overrides."""
    if isinstance(value, list) and all(isinstance(one, Mapping) and len(one) == 1 for one in value):
        names = [next(iter(one)) for one in value]
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(f"the budget {twice[0]} stands twice; give each a name of its own")
        value = {name: one[name] for name, one in zip(names, value, strict=True)}
    if not isinstance(value, Mapping):
        raise ValueError(
            f"{shown(value)} is no list of `name: overrides`; write - 1x: {{train.max_steps: 1000}}"
        )
    return {name: _budget({} if one is None else one) for name, one in value.items()}


def _budget(value: Any) -> Any:
    if isinstance(value, Budget):
        return value
    if isinstance(value, Mapping):
        rest = {key: inner for key, inner in value.items() if key != "data"}
        return {**({"data": value["data"]} if "data" in value else {}), "overrides": rest}
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        data = [one.partition("=")[2] for one in value if one.partition("=")[0].strip() == "data"]
        others = [one for one in value if one.partition("=")[0].strip() != "data"]
        return {**({"data": read_yaml(data[-1], "data")} if data else {}), "overrides": others}
    return {"overrides": value}


Overrides = Annotated[tuple[str, ...], BeforeValidator(_overrides)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]


class Budget(Section):
    """How much a tokenizer may cost."""

    data: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0,
        description="Share of the training clips that it sees; less is a part of more.",
    )
    overrides: Overrides = ()


class Study(Section):
    """What is trained and how it is judged. Paths are as on the command line.

    Raises:
        pydantic.ValidationError: a wrong value, or values that do not fit together (:func:`load_study` turns
            it into one line).
    """

    tokenizer: str = Field(description="Recipe, by name or path, that trains a tokenizer.")
    generator: str = Field(default="lightning", description="Recipe of the backbone that judges it.")
    train: str = Field(description="Manifest of the training clips.")
    test: str = Field(description="Manifest of the clips that are judged on.")
    clips: Annotated[int, Field(ge=2)] = Field(
        default=64, description="How many are generated, and rebuilt; the floor needs twice as many."
    )
    world: str = Field(default="", description="Ask ShapeWorld's oracle, as eval --world.")
    extractor: str = Field(default="auto", description="Of FID and KID, as eval --extractor; or none.")
    lpips: str = Field(default="auto", description="Of reconstructions, as eval --lpips; or none.")
    seeds: tuple[NotNegative, ...] = (0,)
    both: Overrides = Field(default=(), description="Overrides of both recipes.")
    for_tokenizer: Overrides = ()
    for_generator: Overrides = ()
    variants: dict[Name, Overrides] = Field(
        default={"all": ()}, description="By name: overrides of the tokenizer's recipe."
    )
    budgets: Annotated[dict[Name, Budget], BeforeValidator(_budgets)] = Field(
        default={"1x": Budget()}, description="By name: overrides of the tokenizer's recipe, and data."
    )
    measure: tuple[str, ...] = Field(
        default=(), description="Figures of the chart; none: adherence, or without a world FID and KID."
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Study:
        if problem := next(_problems(self), None):
            raise ValueError(problem)
        return self

    def points(self) -> list[Point]:
        """All of them; the first seed's before those of the next, so that a table is soon whole."""
        return [
            Point(name, size, seed, budget.data, self._tokenizer(name, budget, seed), self._generator(seed))
            for seed in self.seeds
            for size, budget in self.budgets.items()
            for name in self.variants
        ]

    def _tokenizer(self, variant: str, budget: Budget, seed: int) -> tuple[str, ...]:
        varied = (*self.variants[variant], *budget.overrides)
        return (*self.both, *self.for_tokenizer, *varied, f"seed={seed}")

    def _generator(self, seed: int) -> tuple[str, ...]:
        return (*self.both, *self.for_generator, f"seed={seed}")


@dataclass(frozen=True)
class Point:
    """One tokenizer, and one generator on its latents."""

    variant: str
    budget: str
    seed: int
    data: float
    """Share of the training clips that the tokenizer sees; the generator sees all."""
    tokenizer: tuple[str, ...]
    """Overrides of the tokenizer's recipe."""
    generator: tuple[str, ...]
    """Overrides of the generator's recipe, those that say the tokenizer's shape left out."""

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.variant}_{self.budget}_{self.seed}"

    def __str__(self) -> str:
        return f"{self.variant}, {self.budget}, seed {self.seed}"


def packaged_studies() -> dict[str, Path]:
    """The studies that come with MotionLoom, by name; kept where recipes are (``packaged_recipes``)."""
    package = Path(__file__).resolve().parents[1]
    folder = package / "studies"
    if not folder.is_dir():
        folder = package.parents[1] / "studies"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_study(path_or_name: str | Path) -> Study:
    """A checked study, of a YAML file or of the name of one that comes along.

    Raises:
        UserError: no such file, broken YAML, unknown keys (the nearest is named) or wrong values; one line.
            What is wrong with overrides is said where the recipes are loaded with them.
    """
    path = packaged_studies().get(str(path_or_name), Path(path_or_name).expanduser())
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        brought = ", ".join(packaged_studies())
        raise UserError(
            f"{path}: cannot be read ({error.strerror}): name a YAML file, or what comes along: {brought}"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file (UTF-8): name a YAML file") from None
    tree = read_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a study is `key: value` lines; it needs tokenizer, train and test")
    try:
        return Study.model_validate(tree)
    except ValidationError as error:
        first, *more = error.errors()
        told = f" (and {len(more)} more)" if more else ""
        raise UserError(f"{path}: {_error_line(dict(first))}{told}") from None


def _problems(study: Study) -> Iterator[str]:
    """Each with its mend."""
    for name in ("seeds", "variants", "budgets"):
        if not getattr(study, name):
            yield f"{name} is empty: name at least one, or leave the key out"
    if twice := [seed for seed, count in Counter(study.seeds).items() if count > 1]:
        yield f"seeds: {twice[0]} stands twice; keep one"
    if twice_named := [name for name, n in Counter(p.name for p in study.points()).items() if n > 1]:
        yield f"two points would be called {twice_named[0]}: rename a variant or a budget"
    if study.extractor == "none" and not study.world:
        yield "nothing to judge by: name an extractor whose package is installed, or a world"


def _error_line(error: Mapping[str, Any]) -> str:
    """One pydantic error as a line: key, what it is, what was expected."""
    place, kind = [str(part) for part in error["loc"]], error["type"]
    within: type[Section] = Budget if place[:1] == ["budgets"] and len(place) > 2 else Study
    key = place[2] if within is Budget else (place[0] if place else "")
    dotted = ".".join(place if within is Budget else place[:2])
    if kind == "extra_forbidden":
        close = get_close_matches(key, within.model_fields, 1)
        meant = f"did you mean {close[0]}?" if close else f"it may be {', '.join(within.model_fields)}"
        return f"{dotted} is not a key; {meant}"
    if kind == "missing":
        return f"{dotted} is missing: {within.model_fields[key].description}"
    if kind == "value_error":
        return f"{dotted}: {error['ctx']['error']}" if dotted else str(error["ctx"]["error"])
    if place[2:] == ["[key]"]:
        return f"{place[0]}: the name {shown(error['input'])} must be of letters, digits, '.', '_' and '-'"
    return f"{dotted} is {shown(error['input'])}; expected {expected(key, within)}"
