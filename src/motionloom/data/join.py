"""Several manifests as one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from motionloom.data.manifest import ManifestEntry, Problem, Problems, read_manifest, safe_id
from motionloom.errors import UserError


def join(manifests: Sequence[Path]) -> tuple[list[ManifestEntry], Problems]:
    """All usable clips of several manifests, with the name of each one's folder in front of its ids.

    Raises:
        UserError: no such file, or two manifests lie in folders of one name.
    """
    entries: list[ManifestEntry] = []
    problems = Problems()
    named: dict[str, Path] = {}
    for path in manifests:
        name = Path(os.path.abspath(path)).parent.name
        if name in named:
            raise UserError(
                f"{path}: its folder is called {name} like that of {named[name]}, and so would its clips be: "
                "rename one of the folders, or name the manifest once"
            )
        named[name] = path
        usable, found = read_manifest(path)
        entries += [replace(entry, id=safe_id(f"{name}/{entry.id}")) for entry in usable]
        for problem in found:
            problems.add(Problem(f"{name}: {problem.where}", problem.what, problem.fix, problem.kind))
    problems.usable = len(entries)
    return entries, problems
