"""Build hook: a wheel carries the recipes, studies and small tokenizers, which stand at the root of the
repository, inside the package."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

# Code has the name of the last one already.
FOLDERS = {"recipes": "recipes", "studies": "studies", "tokenizers": "shipped_tokenizers"}


class BuildWithRecipes(build_py):
    """Everything under ``src``, and the folders of the root inside ``motionloom/``.

    An editable install needs no copy: ``motionloom.config`` looks at the root of the checkout.
    """

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for folder, inside in FOLDERS.items():
                self.copy_tree(folder, str(Path(self.build_lib, "motionloom", inside)))


setup(cmdclass={"build_py": BuildWithRecipes})
