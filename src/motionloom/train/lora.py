"""LoRA (Hu et al. 2021, 2106.09685): small trained matrices beside the frozen linear layers of a network.

A layer W becomes W + (alpha / rank) B A with A (rank, in) and B (out, rank); B starts at 0, so training
starts from the base. DoRA (2402.09353) trains the length of each row of W besides. The layers are peft's, put
in place of the linear layers that patterns choose: the network keeps its class, its ``blocks()`` and the
names of all other modules, so compiling and sharding see nothing new.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from motionloom.config.recipe import LoraConfig
from motionloom.errors import UserError
from motionloom.train.patterns import Target, choose

Layer = Any
"""A ``peft.tuners.lora.LoraLayer``, whose attributes torch's annotations hide."""

TRAINED = "default"
"""peft's name of the adapter; there is one beside a layer."""


@dataclass(frozen=True)
class Adapter:
    """The adapter of one linear layer."""

    down_RI: Tensor
    """A."""
    up_OR: Tensor
    """B."""
    alpha: float
    magnitude_O: Tensor | None = None
    """DoRA: the trained length of each row."""

    @property
    def rank(self) -> int:
        """Width of the bottleneck."""
        return self.down_RI.shape[0]

    def merged(self, weight_OI: Tensor, strength: float = 1.0) -> Tensor:
        """The layer's weight with this adapter in it, acting ``strength`` times; computed in float32.

        DoRA goes that part of the way from the base to its weight, as in ComfyUI; so 0 is always the base, to
        the bit.
        """
        base_OI = weight_OI.float()
        down_RI, up_OR = (t.to(weight_OI.device, torch.float32) for t in (self.down_RI, self.up_OR))
        change_OI = self.alpha / self.rank * (up_OR @ down_RI)
        if self.magnitude_O is None:
            return (base_OI + strength * change_OI).to(weight_OI.dtype)
        whole_OI = base_OI + change_OI
        length_O = torch.linalg.vector_norm(whole_OI, dim=1)
        turned_OI = whole_OI * (self.magnitude_O.to(length_O) / length_O)[:, None]
        return torch.lerp(base_OI, turned_OI, strength).to(weight_OI.dtype)


Files = Sequence[tuple[Mapping[str, Adapter], float]]
"""Adapters by layer, and how strongly they act."""


def merged_together(weight_OI: Tensor, adapters: Sequence[tuple[Adapter, float]]) -> Tensor:
    """A layer's weight with several adapters in it, each with its strength, in float32.

    Each stands beside the base alone, so their order does not matter. (peft, before a merge, lets a DoRA
    scale the adapters that come before it as well.)
    """
    base_OI = weight_OI.float()
    if len(adapters) == 1:
        return adapters[0][0].merged(base_OI, adapters[0][1])
    return base_OI + sum((one.merged(base_OI, strength) - base_OI for one, strength in adapters), 0.0)


def choose_modules(module: nn.Module, patterns: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Which linear layers each pattern of ``lora.targets`` takes, by pattern.

    Raises:
        UserError: as :func:`~motionloom.train.patterns.choose`.
    """
    names = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    return choose(names, patterns, "lora.targets", "linear layer")


def add_lora(
    module: nn.Module,
    config: LoraConfig,
    generator: torch.Generator,
    base_dtype: torch.dtype | None = None,
    whole: Collection[str] = (),
) -> list[Target]:
    """Freeze ``module`` and put fresh adapters, float32, beside the layers that ``config.targets`` choose.

    Args:
        module: its weights may be on ``meta`` still; the adapters are then on the CPU, and with DoRA
            :func:`measure_lengths` is called when the weights are there.
        generator: draws the down-projections (CPU). Equal generators give equal adapters.
        base_dtype: of the frozen linear layers inside ``module.blocks()``; None: as they are. With the dtype
            that autocast computes in, the result is the same and the base takes half the memory.
        whole: names of parameters that keep their dtype, since they are to be trained.

    Returns:
        A row for each pattern, in order.

    Raises:
        UserError: as :func:`choose_modules`; peft is missing.
    """
    chosen = choose_modules(module, config.targets)
    names = [name for pattern, taken in chosen.items() if pattern[0] != "!" for name in taken]
    if base_dtype is not None:
        cast_blocks(module, base_dtype, whole)
    layers = _inject(module, names, config)
    for name in names:
        down, up = layers[name].lora_A[TRAINED].weight, layers[name].lora_B[TRAINED].weight
        with torch.no_grad():
            if config.init == "gaussian":
                down.normal_(0.0, 1 / config.rank, generator=generator)
            else:  # Kaiming et al. with a = sqrt 5, as a linear layer starts
                bound = down.shape[1] ** -0.5
                down.uniform_(-bound, bound, generator=generator)
            up.zero_()
    if not _on_meta(module):
        measure_lengths(module)
    return [
        Target(
            pattern,
            taken,
            0 if pattern[0] == "!" else sum(_count(layers[name]) for name in taken),
        )
        for pattern, taken in chosen.items()
    ]


def cast_blocks(module: nn.Module, dtype: torch.dtype, besides: Collection[str] = ()) -> None:
    """Hold the linear layers inside ``module.blocks()`` in ``dtype``, ``besides`` some parameters."""
    keep = {id(p) for name, p in module.named_parameters() if name in besides}
    # Outside of the blocks networks read the dtype of their residual stream from a layer's weight.
    for block in module.blocks():  # type: ignore[operator]
        for part in block.modules():
            for p in part.parameters(recurse=False) if isinstance(part, nn.Linear) else ():
                if id(p) not in keep:
                    p.data = p.data.to(dtype)


def _on_meta(module: nn.Module) -> bool:
    return any(p.is_meta for p in module.parameters())


def _count(layer: Layer) -> int:
    return sum(p.numel() for name, p in layer.named_parameters() if "lora_" in name)


def _inject(module: nn.Module, names: Sequence[str], wish: LoraConfig) -> dict[str, Layer]:
    """peft's layers in the place of the linear ones called ``names``; their adapters hold no values yet."""
    peft = import_peft()
    config = peft.LoraConfig(
        r=wish.rank,
        lora_alpha=wish.alpha,
        lora_dropout=wish.dropout,
        use_dora=wish.dora,
        init_lora_weights=False,
        target_modules="|".join(map(re.escape, names)),
    )
    # Without memory at first: peft would draw initial values from the global generator.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        # DoRA measures the base as it comes, so both must have memory or neither.
        bare = not wish.dora or _on_meta(module)
        peft.inject_adapter_in_model(config, module, adapter_name=TRAINED, low_cpu_mem_usage=bare)
    layers = lora_layers(module)
    for name in names:
        _materialise(layers[name])
    return layers


def _materialise(layer: Layer) -> None:
    """Float32 beside the base's weight, whatever that is in; on the CPU where it has no memory yet."""
    base = layer.get_base_layer().weight
    device = torch.device("cpu") if base.is_meta else base.device
    for part in (layer.lora_A[TRAINED], layer.lora_B[TRAINED]):
        empty = torch.zeros(part.weight.shape, dtype=torch.float32, device=device)
        part.weight = nn.Parameter(empty, requires_grad=True)
    if TRAINED in layer.lora_magnitude_vector:
        part = layer.lora_magnitude_vector[TRAINED]
        part.weight = nn.Parameter(torch.zeros(len(base), device=device), requires_grad=True)


@torch.no_grad()
def measure_lengths(module: nn.Module) -> None:
    """DoRA: begin with the rows' own lengths. Once the base has its values; nothing to do without DoRA."""
    for layer in lora_layers(module).values():
        for part in layer.lora_magnitude_vector.values():
            part.weight.copy_(torch.linalg.vector_norm(layer.get_base_layer().weight.float(), dim=1))


def adapter_names(module: nn.Module) -> frozenset[str]:
    """Names of the parameters that adapters have added to ``module``."""
    return frozenset(name for name, _ in module.named_parameters() if ".lora_" in name)


def layer_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of the weight of every linear layer, by the name that it has without adapters."""
    plain = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    adapted = {name: layer.get_base_layer() for name, layer in lora_layers(module).items()}
    own = {name: part for name, part in plain.items() if ".lora_" not in name and ".base_layer" not in name}
    return {name: tuple(part.weight.shape) for name, part in {**own, **adapted}.items()}


def base_names(module: nn.Module) -> dict[str, str]:
    """Every tensor of the base: its name without adapters, and its name now."""
    return {name.replace(".base_layer.", "."): name for name in module.state_dict() if ".lora_" not in name}


def lora_layers(module: nn.Module) -> dict[str, Layer]:
    """peft's layers in ``module``, by the name of the linear layer that each one adapts."""
    if not getattr(module, "peft_config", None):
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: part for name, part in module.named_modules() if isinstance(part, LoraLayer)}


def check_fits(adapters: Mapping[str, Adapter], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raises UserError for an adapter of a layer that ``shapes`` (of weights, by layer) lacks or has
    otherwise."""
    for name, one in adapters.items():
        if name not in shapes:
            raise UserError(f"{where} adapts {name}, which this model does not have: it is of another model")
        if (has := (one.up_OR.shape[0], one.down_RI.shape[1])) != tuple(shapes[name]):
            raise UserError(
                f"{where}: its {name} is for a layer of shape {list(has)}, this model's is "
                f"{list(shapes[name])}: it is of another size"
            )


def same_adapters(module: nn.Module, adapters: Mapping[str, Adapter]) -> bool:
    """Whether ``adapters`` are those that are trained in ``module``, but for rounding to bfloat16."""
    own = lora_layers(module)
    return own.keys() == adapters.keys() and all(
        _close(layer.lora_A[TRAINED].weight, adapters[name].down_RI)
        and _close(layer.lora_B[TRAINED].weight, adapters[name].up_OR)
        for name, layer in own.items()
    )


def _close(own: Tensor, other: Tensor) -> bool:
    own, other = own.detach().cpu().float(), other.float()
    return own.shape == other.shape and bool((own - other).norm() <= 0.01 * own.norm())


@contextmanager
def merged(module: nn.Module, files: Files = ()) -> Iterator[None]:
    """Inside, the module's own adapters and those of ``files`` are part of the weights and cost nothing;
    after, the base is as it was, to the bit.

    Keeps a copy of every changed weight meanwhile. The merged weights are rounded to the base's dtype.
    """
    layers = lora_layers(module)
    beside = _beside(module, files)
    own = {name: _weight(module, name).detach().clone() for name in beside}
    try:
        _put_in(module, beside)
        for layer in layers.values():
            layer.merged_adapters.extend(layer.lora_A)
        yield
    finally:
        with torch.no_grad():
            for name, weight in own.items():
                _weight(module, name).copy_(weight)
        for layer in layers.values():
            layer.merged_adapters.clear()


@contextmanager
def without_adapters(module: nn.Module) -> Iterator[None]:
    """Inside, the module answers as its base; it must not be trained there."""
    layers = lora_layers(module).values()
    for layer in layers:
        layer._disable_adapters = True  # peft's own switch would freeze the adapters as well
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merge_into_base(module: nn.Module, files: Files = ()) -> None:
    """Add the module's own adapters and those of ``files`` to the weights for good, and take peft's layers
    out again. What acts 0 times leaves the weights as they are, to the bit."""
    _put_in(module, _beside(module, files))
    for name, layer in lora_layers(module).items():
        parent, _, own = name.rpartition(".")
        setattr(module.get_submodule(parent), own, layer.get_base_layer())
    module.__dict__.pop("peft_config", None)


def _beside(module: nn.Module, files: Files) -> dict[str, list[tuple[Adapter, float]]]:
    """What stands beside each layer."""
    beside = {name: [(_own(layer), 1.0)] for name, layer in lora_layers(module).items()}
    for adapters, strength in files:
        for name, one in adapters.items() if strength else ():
            beside.setdefault(name, []).append((one, strength))
    return beside


@torch.no_grad()
def _put_in(module: nn.Module, beside: Mapping[str, list[tuple[Adapter, float]]]) -> None:
    for name, adapters in beside.items():
        weight = _weight(module, name)
        weight.copy_(merged_together(weight, adapters))


def _weight(module: nn.Module, name: str) -> Tensor:
    layer: Any = module.get_submodule(name)
    weight: Tensor = (layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer).weight
    return weight


def _own(layer: Layer) -> Adapter:
    """The adapter that is trained beside a layer."""
    down_RI, up_OR = (part[TRAINED].weight.detach() for part in (layer.lora_A, layer.lora_B))
    lengths = layer.lora_magnitude_vector
    magnitude_O = lengths[TRAINED].weight.detach() if TRAINED in lengths else None
    return Adapter(down_RI, up_OR, layer.scaling[TRAINED] * down_RI.shape[0], magnitude_O)


def started(own: Adapter, given: Adapter) -> Adapter:
    """An adapter of the rank and alpha of ``own`` that acts exactly as ``given``, whose rank is not larger.

    What is left of the rank keeps the down-projection of ``own``, and is silent.
    """
    down_RI, up_OR = own.down_RI.clone(), torch.zeros_like(own.up_OR)
    down_RI[: given.rank] = given.down_RI
    up_OR[:, : given.rank] = given.up_OR * (given.alpha * own.rank / (given.rank * own.alpha))
    return Adapter(down_RI, up_OR, own.alpha, given.magnitude_O)


def fingerprint(names: Iterable[str], read: Callable[[str], Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes: which base adapters belong to. One tensor at a time."""
    digest = hashlib.sha256()
    for name in sorted(names):
        tensor = read(name)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(flat.numpy().data)
    return digest.hexdigest()


def import_peft() -> Any:
    """peft, imported late: it takes two seconds.

    Raises:
        UserError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError("LoRA needs peft, which is not installed: pip install 'motionloom[hf]'") from error
    return peft
