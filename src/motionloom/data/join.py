"""Several manifests as one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from motionloom.data.manifest import ManifestEntry, Problems, read_manifest, safe_id
from motionloom.errors import UserError


def join(manifests: Sequence[Path], times: Sequence[int] = ()) -> tuple[list[ManifestEntry], Problems]:
    """All usable clips of several manifests, with the name of each one's folder in front of its ids.

    Args:
        times: how often each one's clips are listed, so that a few are not lost among many; the copies of
            ``cats/jump`` are ``cats_2/jump``, ``cats_3/jump``, ... Empty: once.

    Raises:
        UserError: no such file, or clips of two manifests would get equal ids.
    """
    entries: list[ManifestEntry] = []
    problems = Problems()
    named: dict[str, Path] = {}
    for path, count in zip(manifests, times or [1] * len(manifests), strict=True):
        name = Path(os.path.abspath(path)).parent.name
        copies = [name, *(f"{name}_{n}" for n in range(2, count + 1))]
        for copy in copies:
            if copy in named:
                raise UserError(
                    f"{path}: its clips would be called {copy}/... like those of {named[copy]}: rename the "
                    "folder of one, or name the manifest once"
                )
            named[copy] = path
        usable, found = read_manifest(path)
        entries += [replace(entry, id=safe_id(f"{copy}/{entry.id}")) for copy in copies for entry in usable]
        for problem in found:
            problems.add(replace(problem, where=f"{name}: {problem.where}"))
    problems.usable = len(entries)
    return entries, problems
