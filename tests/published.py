"""Tiny published models with random weights, written by diffusers, for the tests of weights.

Run as a program under torchrun it loads one of them into FSDP2: ``python published.py FOLDER OUT``.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from motionloom.backbones.families import FAMILIES, as_original, recognise
from motionloom.backbones.weights import Sink, open_weights, write_folder
from motionloom.rng import torch_generator

TINY = {"wan": "tiny", "cogvideox": "tiny", "ltx2": "tiny2.3"}
"""Preset by family."""


@cache
def reference(family: str) -> nn.Module:
    """diffusers' own module of the family's tiny preset; every weight is random, none is zero."""
    import diffusers

    known = FAMILIES[family]
    config = known.preset(TINY[family]).to_diffusers()
    kind: Any = getattr(diffusers, known.diffusers)
    model: nn.Module = kind.from_config({k: v for k, v in config.items() if not k.startswith("_")})
    generator = torch_generator("published", family)
    with torch.no_grad():
        for t in model.state_dict().values():
            t.normal_(generator=generator)
    return model


def tensors(family: str) -> dict[str, Tensor]:
    """Its weights."""
    return reference(family).state_dict()


def save_diffusers(family: str, folder: Path, shard: str = "5GB") -> Path:
    """As diffusers saves it."""
    reference(family).save_pretrained(folder, max_shard_size=shard)  # type: ignore[operator]
    return folder


def save_original(family: str, folder: Path, shard_bytes: int = 10**9) -> Path:
    """The same under the authors' names, with nothing beside it that says the sizes."""
    found = recognise(open_weights(save_diffusers(family, folder.with_name(folder.name + "_diffusers"))))
    write_folder(
        folder, Sink.of(as_original(found.weights, found.family)), None, name="model", shard_bytes=shard_bytes
    )
    return folder


def load_sharded(folder: Path, out: Path) -> None:
    """Load ``folder`` on this rank of several, and write down what came of it."""
    from motionloom.parallel import Ranks, load_weights, parallelize, start_ranks

    with start_ranks("cpu") as ranks:
        told = {}
        for place in sorted(folder.iterdir()):
            found = recognise(open_weights(place))
            single = found.family.on_meta(found.sizes)
            load_weights(single, found.weights, Ranks())
            cut = found.family.on_meta(found.sizes)
            parallelize({"backbone": cut}, ranks, "fsdp", weights={"backbone": found.weights})
            again = load_weights(cut, found.weights, ranks)  # onto what is there, as well
            whole = {name: t.full_tensor() for name, t in cut.state_dict().items()}
            told[place.name] = {
                "equal": [name for name, t in single.state_dict().items() if torch.equal(whole[name], t)],
                "all": list(single.state_dict()),
                "read": again.bytes,
                "bytes": found.weights.bytes,
            }
        out.with_suffix(f".{ranks.rank}").write_text(json.dumps(told))


if __name__ == "__main__":
    load_sharded(Path(sys.argv[1]), Path(sys.argv[2]))
