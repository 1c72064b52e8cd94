"""The recipe: one typed, frozen tree, from YAML and dotted overrides, with a record of what made a run."""

from motionloom.config.load import (
    dump_recipe,
    find_recipe,
    load_recipe,
    load_recipe_with_notes,
    packaged_recipes,
)
from motionloom.config.provenance import describe_run, write_provenance
from motionloom.config.recipe import Recipe

__all__ = [
    "Recipe",
    "describe_run",
    "dump_recipe",
    "find_recipe",
    "load_recipe",
    "load_recipe_with_notes",
    "packaged_recipes",
    "write_provenance",
]
