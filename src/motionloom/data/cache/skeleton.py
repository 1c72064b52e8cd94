"""A new cache before its first row: tokenizers, what made it, and the table that rows are added to."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow as pa

from motionloom.data.cache.identity import IDENTITY_FILE, Identity
from motionloom.data.cache.makers import AUDIO_TOKENIZER, TOKENIZER, UNFINISHED
from motionloom.data.cache.pairs_note import PAIRS_FILE, PairsNote
from motionloom.data.cache.tables import CLIPS, create_table
from motionloom.errors import UserError

Save = Callable[[Path], object]
"""Writes a tokenizer into a folder that is not there yet."""


def settle(
    out: Path, identity: Identity, makers: Mapping[str, Save], note: PairsNote | None, schema: pa.Schema
) -> None:
    """Make a cache that holds no row yet, or find the same one. Hold its lock meanwhile.

    A kill on the way leaves something that the next call finishes.

    Args:
        makers: by the name of their folder, of ``TOKENIZER`` and ``AUDIO_TOKENIZER``.
        note: of a cache with states.

    Raises:
        UserError: what is there was made otherwise; names what differs.
    """
    if (out / IDENTITY_FILE).exists() or (out / PAIRS_FILE).exists():
        _refuse_other(out, identity, note)
    if not (out / IDENTITY_FILE).exists():
        for name in UNFINISHED:
            shutil.rmtree(out / name, ignore_errors=True)
        for name, save in makers.items():
            save(out / f".{name}.new")
        if note is not None:
            note.write(out)
        identity.write(out)
    for name in (TOKENIZER, AUDIO_TOKENIZER):
        if (out / f".{name}.new").exists():
            (out / f".{name}.new").rename(out / name)
    create_table(out / CLIPS, schema)


def _refuse_other(out: Path, identity: Identity, note: PairsNote | None) -> None:
    found = PairsNote.read(out) if (out / PAIRS_FILE).exists() else None
    if (found is None) != (note is None):
        what = "holds a teacher's pairs" if note is None else "is a cache of clips and holds no pairs"
        raise UserError(f"{out}: {what}; name a new folder with --out")
    wrong = [] if found is None or note is None else found.differences(note)
    if (out / IDENTITY_FILE).exists():
        there = Identity.read(out)
        if there.fingerprint != identity.fingerprint:
            wrong += _other_identity(there, identity)
    if wrong:
        raise UserError(
            f"{out}: was made otherwise and cannot be continued: {'; '.join(wrong)}; "
            "give the same again, or name a new folder with --out"
        )


def _other_identity(there: Identity, here: Identity) -> list[str]:
    keys = sorted(there.made_with.keys() | here.made_with.keys())
    wrong = [
        f"{key} is {there.made_with.get(key)} there and {here.made_with.get(key)} here"
        for key in keys
        if there.made_with.get(key) != here.made_with.get(key)
    ]
    if there.tokenizer != here.tokenizer:
        wrong.append(f"the tokenizer is {there.tokenizer[:12]} there and {here.tokenizer[:12]} here")
    return wrong or ["its shapes or its sound are of other tokenizers"]
