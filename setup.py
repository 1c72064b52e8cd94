"""Build hook: a wheel carries the recipes, which stand at the root of the repository, inside the package."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """Everything under ``src``, and ``recipes/`` as ``motionloom/recipes/``.

    An editable install needs no copy: ``motionloom.config`` looks at the root of the checkout.
    """

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self.copy_tree("recipes", str(Path(self.build_lib, "motionloom", "recipes")))


setup(cmdclass={"build_py": BuildWithRecipes})
