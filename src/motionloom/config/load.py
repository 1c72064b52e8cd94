"""From files and overrides to a checked recipe, and back to YAML.

A recipe file is a layer over the one that it starts ``from:``, and each dotted override is one more. Every
layer is flattened to dotted keys, so that merging is a dict update and every value knows which layer it came
from: what is wrong with it can then be said with that name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from motionloom.config.causvid import from_causvid
from motionloom.config.former import from_former
from motionloom.config.keys import expected, flatten, keys, shown, unflatten, unknown
from motionloom.config.misfits import cautions
from motionloom.config.mmdit import from_mmdit
from motionloom.config.recipe import OWN_SIZES, Recipe
from motionloom.config.request import error_line
from motionloom.config.yaml_text import read_yaml, write_yaml
from motionloom.errors import UserError

_MOST_BYTES = 1_000_000  # a larger file is a clip or a checkpoint given by mistake
_MOST_PROBLEMS = 5


@dataclass(frozen=True)
class _Layer:
    """Values by dotted key, and where they stand."""

    label: str
    values: dict[str, Any]
    notes: tuple[str, ...] = ()


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A checked recipe.

    Args:
        path_or_name: a YAML file, or the name of a recipe that comes with MotionLoom (``quickstart``).
        overrides: ``key=value`` with dotted keys and YAML values, the last one wins: ``train.lr=3e-4``,
            ``train.sample_prompts=["a cat", "a dog"]``.

    Raises:
        UserError: no such file, broken YAML, unknown keys (the nearest valid one is named), wrong values, or
            values that do not fit together. One line, with up to five problems.
    """
    return load_recipe_with_notes(path_or_name, overrides)[0]


def load_recipe_with_notes(
    path_or_name: str | Path, overrides: Sequence[str] = ()
) -> tuple[Recipe, list[str]]:
    """:func:`load_recipe`, and one line for everything that a YAML written for mmdit, CausVid or Self-Forcing
    says in vain, or that is allowed and seldom meant."""
    path = find_recipe(path_or_name)
    layers = [*_file_layers(path), *map(_override_layer, overrides)]
    problems: list[str] = []
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for layer in layers:
        if layer.values.get("model.name_or_path") and _of_other_weights(layer, origin, overrides):
            # The sizes of the weights that a layer below named are not those of the ones named here.
            values.pop("model.preset", None)
        if layer.values.get("model.preset"):
            # Nor are sizes that a file below chose those of the preset.
            said = {f"override {override}" for override in overrides}
            for key in (f"model.{size}" for size in OWN_SIZES):
                if key in values and origin[key] not in said:
                    del values[key]
        for key, value in layer.values.items():
            if key in keys():
                values[key], origin[key] = value, layer.label
            else:
                problems.append(f"{layer.label}: {unknown(key)}")
    try:
        recipe = Recipe.model_validate(unflatten(values))
    except ValidationError as error:
        whole = f"{_label(path)} with overrides" if overrides else _label(path)
        problems += [_problem(dict(one), origin, whole) for one in error.errors()]
    if problems:
        raise UserError(_one_line(problems))
    return recipe, [*(note for layer in layers for note in layer.notes), *cautions(recipe)]


def _of_other_weights(layer: _Layer, origin: Mapping[str, str], overrides: Sequence[str]) -> bool:
    """Whether a preset was named for other weights than the layer's: by a file, beside weights of its own."""
    preset = origin.get("model.preset")
    own = {f"override {override}" for override in overrides}
    return preset is not None and preset not in own and origin.get("model.name_or_path") == preset


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe as YAML, defaults written out; ``load_recipe`` reads it back equal.

    Sizes that the recipe's kind of backbone does not read are left out.
    """
    unread = {"model": set(OWN_SIZES)} if recipe.model.imported else None
    return write_yaml(recipe.model_dump(mode="json", exclude=unread))


def packaged_recipes() -> dict[str, Path]:
    """The recipes that come with MotionLoom, by name.

    They are kept in ``recipes/`` at the root of the repository, where people read them; a wheel carries a
    copy inside the package (``setup.py``).
    """
    package = Path(__file__).resolve().parents[1]
    folder = package / "recipes"
    if not folder.is_dir():
        folder = package.parents[1] / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(path_or_name: str | Path, beside: Path = Path()) -> Path:
    """The file of a recipe: a name that comes with MotionLoom, else a path relative to folder ``beside``.

    Raises:
        UserError: there is no such file or name; says which name is nearest.
    """
    name = str(path_or_name)
    packaged = packaged_recipes()
    if name in packaged:
        return packaged[name]
    path = beside / Path(name).expanduser()
    if path.is_dir():
        inside = path / "recipe.yaml"
        raise UserError(
            f"{path} is a folder: name a YAML file{f', such as {inside}' if inside.exists() else ''}"
        )
    if not path.exists():
        close = get_close_matches(Path(name).stem, packaged, 1)
        meant = f"did you mean {close[0]}?" if close else f"MotionLoom brings {', '.join(packaged)}"
        raise UserError(f"{path}: no such recipe file, nor a recipe of that name; {meant}")
    return path


def _label(path: Path) -> str:
    """What messages call a recipe file."""
    return f"recipe {path.stem}" if path in packaged_recipes().values() else str(path)


def _file_layers(path: Path, above: tuple[Path, ...] = ()) -> list[_Layer]:
    """The layers of a file, what it starts from first."""
    chain = (*above, path)
    if path.resolve() in [one.resolve() for one in above]:
        raise UserError(f"{above[0]}: `from` goes in a circle: {' -> '.join(one.name for one in chain)}")
    tree = _read(path)
    if "from" not in tree:
        return [_root_layer(path, flatten(tree))]
    parent = tree.pop("from")
    if not isinstance(parent, str) or not parent:
        raise UserError(f"{path}: from is {shown(parent)}; expected the name or path of one other recipe")
    try:
        start = find_recipe(parent, beside=path.parent)
    except UserError as error:
        raise UserError(f"{path}: from {parent}: {error}") from error
    values, notes = from_former(flatten(tree), _label(path))
    return [*_file_layers(start, chain), _Layer(_label(path), values, notes)]


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UserError(
                f"{path} is too large for a recipe ({path.stat().st_size:,} bytes): name a YAML file"
            )
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file (UTF-8): name a YAML file") from error
    tree = read_yaml(text, _label(path))
    if tree is None:  # an empty file: all defaults
        return {}
    if not isinstance(tree, Mapping):
        raise UserError(f"{path}: a recipe is `key: value` lines, not a {type(tree).__name__}")
    return dict(tree)


def _root_layer(path: Path, flat: dict[str, Any]) -> _Layer:
    """A file that starts from no other: ours, or one for mmdit, CausVid or Self-Forcing."""

    def defaults() -> dict[str, Any]:
        beside = path.with_name("default_config.yaml")
        return flatten(_read(beside)) if beside != path and beside.is_file() else {}

    label = _label(path)
    translated = from_mmdit(flat, label) or from_causvid(flat, label, defaults)
    if translated is None:
        return _Layer(_label(path), *from_former(flat, _label(path)))
    values, notes = translated
    return _Layer(_label(path), values, tuple(notes))


def _override_layer(override: str) -> _Layer:
    key, equals, text = override.partition("=")
    label = f"override {override}"
    if not equals or not key.strip():
        raise UserError(f"override {override!r}: write key=value, such as train.lr=3e-4")
    value = read_yaml(text, label) if text.strip() else ""
    if isinstance(value, dict) and (
        glued := [name for name, inner in value.items() if inner is None and ":" in name]
    ):
        raise UserError(f"{label}: a space is missing behind a colon: write {glued[0].replace(':', ': ', 1)}")
    return _Layer(label, flatten({key.strip(): value}))


def _problem(error: dict[str, Any], origin: dict[str, str], whole: str) -> str:
    """One pydantic error as a line: the value's layer, its key, what it is and what was expected."""
    place = [str(part) for part in error["loc"]]
    if place[:2] == ["plan", "conditions"] and len(place) > 2:
        # The same language as in requests, so the same words.
        return f"{origin['plan.conditions']}: plan.{error_line({**error, 'loc': error['loc'][1:]})}"
    for length in (1, 2):
        key, items = ".".join(place[:length]), place[length:]
        if key in keys():
            break
    else:
        return f"{whole}: {error['ctx']['error']}"  # of several keys at once: says itself how to mend it
    at = "".join(f"[{item}]" for item in items if error["type"] != "missing")
    line = f"{origin[key]}: {key}{at} is {shown(error['input'])}; expected {expected(key)}"
    alone = not items and isinstance(error["input"], (str, int, float)) and error["input"] != ""
    return f"{line}: write [{error['input']}]" if alone and "a list, each" in line else line


def _one_line(problems: list[str]) -> str:
    first, *more = problems
    if not more:
        return first
    told = "; ".join(more[: _MOST_PROBLEMS - 1])
    return f"{first} (and {len(more)} more: {told}{'; ...' if len(more) >= _MOST_PROBLEMS else ''})"
