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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from motionloom.config.recipe import LoraConfig
from motionloom.errors import UserError

Layer = Any
"""A ``peft.tuners.lora.LoraLayer``, whose attributes torch's annotations hide."""

TRAINED = "default"
"""Name of the adapter that is trained; files that are added for sampling get names of their own."""


@dataclass(frozen=True)
class Target:
    """What one pattern of ``lora.targets`` chose."""

    pattern: str
    modules: tuple[str, ...]
    parameters: int
    """Trained numbers of its adapters; 0 for a pattern that leaves out."""


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
        """The layer's weight with this adapter in it, acting ``strength`` times; computed in float32."""
        change_OI = self.up_OR.float() @ self.down_RI.float()
        whole_OI = weight_OI.float() + strength * self.alpha / self.rank * change_OI
        if self.magnitude_O is not None:
            length_O1 = torch.linalg.vector_norm(whole_OI, dim=1, keepdim=True)
            whole_OI = whole_OI * self.magnitude_O.float()[:, None] / length_O1
        return whole_OI.to(weight_OI.dtype)


def merged_together(weight_OI: Tensor, adapters: Sequence[tuple[Adapter, float]]) -> Tensor:
    """A layer's weight with several adapters in it, each with its strength, in float32.

    Each stands beside the base alone, so their order does not matter. (peft, before a merge, lets a DoRA
    scale the adapters that come before it as well.)
    """
    base_OI = weight_OI.float()
    return base_OI + sum((one.merged(base_OI, strength) - base_OI for one, strength in adapters), 0.0)


def choose_modules(module: nn.Module, patterns: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Which linear layers each pattern of ``lora.targets`` takes, by pattern.

    A pattern is dotted parts of a module's name, in a row and anywhere in it; ``*`` stands for any letters
    within one part. ``attn1`` takes every linear layer inside modules of that name, ``attn1.to_q`` one in
    each, and ``!blocks.0`` leaves out what it fits. The first pattern that fits a layer decides.

    Raises:
        UserError: a pattern that fits no layer, or only such as earlier patterns have decided.
    """
    names = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    chosen: dict[str, tuple[str, ...]] = {}
    left = names
    for pattern in patterns:
        fits = _matcher(pattern.removeprefix("!"))
        taken = tuple(name for name in left if fits(name))
        if not taken:
            raise UserError(_why_nothing(pattern, any(map(fits, names)), names))
        chosen[pattern] = taken
        left = [name for name in left if name not in set(taken)]
    return chosen


def _matcher(pattern: str) -> Any:
    inner = re.escape(pattern).replace(r"\*", "[^.]*")
    return re.compile(rf"(?:^|\.){inner}(?:\.|$)").search


def _why_nothing(pattern: str, decided: bool, names: Sequence[str]) -> str:
    if decided:
        return (
            f"lora.targets: {pattern} only fits layers that patterns before it have decided: move it up or "
            "remove it"
        )
    tails = sorted({tail for name in names for tail in _tails(name)})
    likely = get_close_matches(pattern.removeprefix("!"), tails, 3, cutoff=0.5)
    near = likely or sorted({next(_tails(name)) for name in names})
    return f"lora.targets: {pattern} fits no linear layer of this model; near are {', '.join(near)}"


def _tails(name: str) -> Iterator[str]:
    """What a pattern may say, without the numbers of blocks: ``blocks.0.attn.to_out.0`` -> to_out.0,
    attn.to_out.0."""
    parts = name.split(".")
    for start in range(len(parts) - 1, -1, -1):
        if parts[start].isdigit():
            if start < len(parts) - 1:
                return
            continue
        yield ".".join(parts[start:])


def add_lora(
    module: nn.Module,
    config: LoraConfig,
    generator: torch.Generator,
    base_dtype: torch.dtype | None = None,
) -> list[Target]:
    """Freeze ``module`` and put fresh adapters, float32, beside the layers that ``config.targets`` choose.

    Args:
        module: its weights may be on ``meta`` still; the adapters are then on the CPU, and with DoRA
            :func:`measure_lengths` is called when the weights are there.
        generator: draws the down-projections (CPU). Equal generators give equal adapters.
        base_dtype: of the frozen linear layers inside ``module.blocks()``; None: as they are. With the dtype
            that autocast computes in, the result is the same and the base takes half the memory.

    Returns:
        A row for each pattern, in order.

    Raises:
        UserError: as :func:`choose_modules`; peft is missing.
    """
    chosen = choose_modules(module, config.targets)
    names = [name for pattern, taken in chosen.items() if pattern[0] != "!" for name in taken]
    if not names:
        raise UserError("lora.targets only leaves out: name the layers that are to be adapted as well")
    if base_dtype is not None:
        cast_blocks(module, base_dtype)
    layers = _inject(module, names, TRAINED, config.rank, config.alpha, config.dropout, config.dora)
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


def cast_blocks(module: nn.Module, dtype: torch.dtype) -> None:
    """Hold the linear layers inside ``module.blocks()`` in ``dtype``."""
    # Outside of the blocks networks read the dtype of their residual stream from a layer's weight.
    for block in module.blocks():  # type: ignore[operator]
        for part in block.modules():
            if isinstance(part, nn.Linear):
                part.to(dtype)


def _on_meta(module: nn.Module) -> bool:
    return any(p.is_meta for p in module.parameters())


def _count(layer: Layer) -> int:
    return sum(p.numel() for name, p in layer.named_parameters() if "lora_" in name)


def _inject(
    module: nn.Module, names: Sequence[str], adapter: str, rank: int, alpha: float, dropout: float, dora: bool
) -> dict[str, Layer]:
    """peft's layers in the place of the linear ones called ``names``; their adapters hold no values yet."""
    peft = import_peft()
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_dora=dora,
        init_lora_weights=False,
        target_modules="|".join(map(re.escape, names)),
    )
    # Without memory at first: peft would draw initial values from the global generator.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        # DoRA measures the base as it comes, so both must have memory or neither.
        bare = not dora or _on_meta(module)
        peft.inject_adapter_in_model(config, module, adapter_name=adapter, low_cpu_mem_usage=bare)
    layers = lora_layers(module)
    for name in names:
        _materialise(layers[name], adapter)
    return layers


def _materialise(layer: Layer, adapter: str) -> None:
    """Float32 beside the base's weight, whatever that is in; on the CPU where it has no memory yet."""
    base = layer.get_base_layer().weight
    device = torch.device("cpu") if base.is_meta else base.device
    for part in (layer.lora_A[adapter], layer.lora_B[adapter]):
        empty = torch.zeros(part.weight.shape, dtype=torch.float32, device=device)
        part.weight = nn.Parameter(empty, requires_grad=True)
    if adapter in layer.lora_magnitude_vector:
        part = layer.lora_magnitude_vector[adapter]
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


def attach(module: nn.Module, adapters: Mapping[str, Adapter], adapter: str, strength: float = 1.0) -> None:
    """Put finished adapters beside the layers that they name; those that are there stay active.

    Args:
        adapters: by layer; they fit (:func:`check_fits`).
        adapter: their name in the module.
        strength: how much they count.
    """
    kinds: dict[tuple[int, float, bool], list[str]] = {}
    for name, one in adapters.items():
        kinds.setdefault((one.rank, one.alpha, one.magnitude_O is not None), []).append(name)
    for n, ((rank, alpha, dora), names) in enumerate(kinds.items()):
        inner = f"{adapter}_{n}" if n else adapter
        layers = _inject(module, names, inner, rank, alpha, 0.0, dora)
        for name in names:
            _fill(layers[name], inner, adapters[name])
            layers[name].set_scale(inner, strength)
    for layer in lora_layers(module).values():
        layer.set_adapter(list(layer.lora_A), inference_mode=True)


@torch.no_grad()
def _fill(layer: Layer, adapter: str, values: Adapter) -> None:
    layer.lora_A[adapter].weight.copy_(values.down_RI)
    layer.lora_B[adapter].weight.copy_(values.up_OR)
    if values.magnitude_O is not None:
        layer.lora_magnitude_vector[adapter].weight.copy_(values.magnitude_O)


@contextmanager
def merged(module: nn.Module) -> Iterator[None]:
    """Inside, the adapters are part of the weights and cost nothing; after, the base is as it was, to the
    bit.

    Keeps a copy of every adapted weight meanwhile. The merged weights are rounded to the base's dtype.
    """
    layers = lora_layers(module).values()
    own = [layer.get_base_layer().weight.detach().clone() for layer in layers]
    try:
        with torch.no_grad():
            for layer in layers:
                layer.merge()
        yield
    finally:
        with torch.no_grad():
            for layer, weight in zip(layers, own, strict=True):
                if layer.merged:
                    layer.unmerge()
                layer.get_base_layer().weight.copy_(weight)


def merge_into_base(module: nn.Module) -> None:
    """Add the adapters to the weights for good, and take peft's layers out again."""
    for name, layer in lora_layers(module).items():
        with torch.no_grad():
            base = layer.get_base_layer().weight
            base.copy_(merged_together(base, _adapters(layer)))
        parent, _, own = name.rpartition(".")
        setattr(module.get_submodule(parent), own, layer.get_base_layer())
    module.__dict__.pop("peft_config", None)


def _adapters(layer: Layer) -> list[tuple[Adapter, float]]:
    """What stands beside a layer, its strength in its scale."""
    found = []
    for name, down in layer.lora_A.items():
        lengths = layer.lora_magnitude_vector
        magnitude_O = lengths[name].weight if name in lengths else None
        rank = down.weight.shape[0]
        found.append(
            (Adapter(down.weight, layer.lora_B[name].weight, layer.scaling[name] * rank, magnitude_O), 1.0)
        )
    return found


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
