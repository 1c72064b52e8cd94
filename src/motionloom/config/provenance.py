"""What made a run: its resolved recipe, the code's commit, package versions, machine and command."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from motionloom.config.load import dump_recipe
from motionloom.config.recipe import Recipe
from motionloom.errors import UserError

RECIPE_FILE = "recipe.yaml"
PROVENANCE_FILE = "provenance.json"

_PACKAGES = (
    *("motionloom", "torch", "numpy", "safetensors", "pydantic", "pyyaml", "pylance", "pyarrow", "grain"),
    *("av", "pillow", "transformers", "tensorboard"),
)


def describe_run(recipe: Recipe) -> dict[str, Any]:
    """Everything about this process that a reader of its results may ask for, as plain JSON values.

    ``git`` has the checkout that the code runs from (``motionloom``, None when it is installed) and the one
    of the present folder (``here``), each with its commit and whether tracked files differ from it.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "folder": os.getcwd(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "git": {"motionloom": _checkout_of_code(), "here": _checkout(Path.cwd())},
        "recipe": recipe.model_dump(mode="json"),
    }


def write_provenance(run_dir: Path, recipe: Recipe) -> None:
    """Write ``recipe.yaml`` (loadable) and ``provenance.json`` into ``run_dir``, each whole or not at all.

    ``provenance.json`` is a list with one entry per start, so a resume by other code stays visible.

    Raises:
        UserError: the folder cannot be written, or its ``provenance.json`` is not ours.
    """
    path = run_dir / PROVENANCE_FILE
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        starts = json.loads(path.read_text()) if path.exists() else []
        if not isinstance(starts, list):
            raise UserError(f"{path} is not a list of starts: move it away or choose another run folder")
        _write_whole(run_dir / RECIPE_FILE, dump_recipe(recipe))
        _write_whole(path, json.dumps([*starts, describe_run(recipe)], indent=1) + "\n")
    except ValueError as error:
        raise UserError(f"{path} is not JSON: move it away or choose another run folder") from error
    except OSError as error:
        raise UserError(f"{error.filename or run_dir}: cannot be written: {error.strerror}") from error


def _write_whole(path: Path, text: str) -> None:
    """A reader sees the old file or the new one, also after a crash: temporary file, fsync, rename."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp keeps others out
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _checkout_of_code() -> dict[str, Any] | None:
    code = Path(__file__).resolve().parents[1] / "__init__.py"
    # An installed copy may lie inside someone's repository; it belongs to it only if git tracks the file.
    return _checkout(code.parent) if _git(code.parent, "ls-files", "--", code.name) else None


def _checkout(folder: Path) -> dict[str, Any] | None:
    """Commit and dirtiness of the repository around ``folder``; None outside of one or without git."""
    top = _git(folder, "rev-parse", "--show-toplevel")
    if top is None:
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"folder": top, "commit": _git(folder, "rev-parse", "--verify", "HEAD"), "dirty": bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    # Without optional locks a look at the status never disturbs a git command running beside it.
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            env=environment,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
