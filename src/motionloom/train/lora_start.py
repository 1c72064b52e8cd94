"""``lora.init_from``: a run that goes on from the adapters of a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from motionloom.backbones import FAMILIES
from motionloom.config.recipe import Recipe
from motionloom.errors import UserError
from motionloom.parallel import fill, named_state
from motionloom.train.lora import TRAINED, Adapter, Layer, check_fits, layer_shapes, lora_layers, started
from motionloom.train.lora_files import read_lora, read_parts
from motionloom.train.parts import check_parts, part_shapes, plain_name


def start_from_file(recipe: Recipe, modules: Mapping[str, nn.Module]) -> int:
    """Adapters and parts of the file into those that are to be trained; returns how many layers it adapts.

    Layers that it does not know start as always. Every rank must call it alike.

    Raises:
        UserError: not a LoRA, of another model, of a higher rank, or with what this recipe does not train.
    """
    path, backbone = Path(recipe.lora.init_from), modules["backbone"]
    shapes, family = layer_shapes(backbone), FAMILIES.get(recipe.model.type)
    adapters = read_lora(path, shapes, family.original_keys if family is not None else None)
    where = f"lora.init_from {path}"
    check_fits(adapters, shapes, where)
    layers = lora_layers(backbone)
    values: dict[str, Tensor] = {}
    for name, given in adapters.items():
        if name not in layers:
            raise UserError(f"{where} adapts {name}, which lora.targets leaves as it is: let it in there")
        _refuse_other_kind(name, given, recipe, where)
        values |= _values(f"backbone.{name}", started(_present(layers[name]), given))
    values |= _parts(path, modules, where)
    targets = {name: tensor for name, tensor in named_state(modules).items() if name in values}
    fill(targets, values, where)
    return len(adapters)


def _refuse_other_kind(name: str, given: Adapter, recipe: Recipe, where: str) -> None:
    if given.rank > recipe.lora.rank:
        raise UserError(
            f"{where}: {name} is of rank {given.rank}, more than lora.rank {recipe.lora.rank}: set "
            f"lora.rank={given.rank}"
        )
    if (given.magnitude_O is not None) is not recipe.lora.dora:
        kind = "is DoRA" if given.magnitude_O is not None else "is no DoRA"
        raise UserError(
            f"{where} {kind}: set lora.dora={'true' if given.magnitude_O is not None else 'false'}"
        )


def _present(layer: Layer) -> Adapter:
    """The adapter that is there, whole on every rank and on the CPU."""
    down, up = (_whole(part[TRAINED].weight.detach()) for part in (layer.lora_A, layer.lora_B))
    return Adapter(down, up, layer.scaling[TRAINED] * down.shape[0])


def _whole(t: Tensor) -> Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).cpu()


def _values(layer: str, one: Adapter) -> dict[str, Tensor]:
    """As a checkpoint names them."""
    values = {
        f"{layer}.lora_A.{TRAINED}.weight": one.down_RI,
        f"{layer}.lora_B.{TRAINED}.weight": one.up_OR,
    }
    if one.magnitude_O is not None:
        values[f"{layer}.lora_magnitude_vector.{TRAINED}.weight"] = one.magnitude_O
    return values


def _parts(path: Path, modules: Mapping[str, nn.Module], where: str) -> dict[str, Tensor]:
    parts = read_parts(path)
    check_parts(parts, part_shapes(modules), where)
    trained = {plain_name(name): name for name in named_state(modules)}
    if left := [name for name in parts if name not in trained]:
        raise UserError(
            f"{where} holds {left[0]} as it was trained, which this run keeps frozen: name it in lora.parts"
        )
    return {trained[name]: part for name, part in parts.items()}
