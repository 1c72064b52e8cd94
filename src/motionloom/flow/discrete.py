"""DDPM's world: discrete noise schedules, and networks that were trained on them.

A schedule gives abar_t for an integer t. Here each t is also a sigma (see ``convert``: the state is the same
up to a factor), so sampling laws, solvers and per-token noise levels work on a DDPM network unchanged.
Shapes: t and sigma have any shape; against a state x they line up with its leading dims.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from motionloom.errors import UserError
from motionloom.flow.convert import Kind, alpha_bar_to_sigma, convert, from_pair, state_norm
from motionloom.flow.paths import LINEAR, Path, Sigma, broadcast_sigma, widen

Betas = Literal["cosine", "linear", "scaled_linear"]
Spacing = Literal["linspace", "trailing"]


@dataclass(frozen=True)
class DiscreteSchedule:
    """A DDPM noise schedule: abar_t for t = 0 .. steps - 1, t rising with the noise, in float64.

    ``cosine``: beta_t = min(1 - f(t + 1) / f(t), 0.999), f(t) = cos^2(((t / steps) + 0.008) / 1.008 * pi / 2)
    (Nichol & Dhariwal 2021, 2102.09672, eq. 17). ``linear``: beta from ``beta_start`` to ``beta_end`` (Ho et
    al. 2020). ``scaled_linear``: sqrt(beta) linear between their roots (latent diffusion; 0.00085 and 0.012
    there). All signal-to-noise ratios abar / (1 - abar) are divided by ``snr_shift`` (CogVideoX, 2408.06072;
    SD3's shift for resolution, 2403.03206, in DDPM's terms). ``zero_terminal_snr`` then moves and scales
    sqrt(abar) so that the last step holds no signal at all (Lin et al. 2023, 2305.08891, alg. 1).
    ``spacing`` says which steps ``grid`` visits (the same paper, table 2): ``linspace`` from the last to the
    first, ``trailing`` every (steps / n)-th back from the last. Raises UserError for values that make no
    schedule.
    """

    betas: Betas = "cosine"
    steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 2e-2
    zero_terminal_snr: bool = False
    snr_shift: float = 1.0
    spacing: Spacing = "linspace"

    def __post_init__(self) -> None:
        if self.betas not in get_args(Betas):
            raise UserError(
                f"noise schedule {self.betas!r} is unknown; use one of {', '.join(get_args(Betas))}"
            )
        if self.steps < 2:
            raise UserError(f"noise schedule: steps must be at least 2, got {self.steps}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise UserError(
                "noise schedule: betas must obey 0 < beta_start <= beta_end < 1, "
                f"got {self.beta_start} and {self.beta_end}"
            )
        if not self.snr_shift > 0:
            raise UserError(f"noise schedule: snr_shift must be above 0, got {self.snr_shift}")
        if self.spacing not in get_args(Spacing):
            raise UserError(
                f"noise schedule: spacing {self.spacing!r} is unknown; "
                f"use one of {', '.join(get_args(Spacing))}"
            )

    def alpha_bar(self) -> Tensor:
        """(steps,) float64 on the CPU: the share of variance that is signal, falling with t."""
        abar = torch.cumprod(1 - self._beta_table(), 0)
        root = (abar / (abar + self.snr_shift * (1 - abar))).sqrt()
        if self.zero_terminal_snr:
            root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        return root**2

    def _beta_table(self) -> Tensor:
        if self.betas == "cosine":
            u = torch.arange(self.steps + 1, dtype=torch.float64) / self.steps
            f = torch.cos((u + 0.008) / 1.008 * torch.pi / 2) ** 2
            return (1 - f[1:] / f[:-1]).clamp(0, 0.999)
        power = 0.5 if self.betas == "scaled_linear" else 1.0
        ends = self.beta_start**power, self.beta_end**power
        return torch.linspace(*ends, self.steps, dtype=torch.float64) ** (1 / power)

    def sigma(self, t: Tensor, path: Path = LINEAR) -> Tensor:
        """sigma of timestep t: the table's at integers, linear between them, t clamped to 0 .. steps - 1."""
        t = widen(t) if t.is_floating_point() else t.to(torch.float32)
        table = _sigma_table(self, path, t.device, t.dtype)
        t = t.clamp(0, self.steps - 1)
        below = t.floor().clamp(max=self.steps - 2).long()
        return torch.lerp(table[below], table[below + 1], t - below)

    def timestep(self, sigma: Tensor, path: Path = LINEAR) -> Tensor:
        """The inverse of ``sigma``: a fractional t in 0 .. steps - 1, for networks that embed t as a number.

        A sigma outside the schedule goes to its nearer end: there is no t for perfectly clean data, and for
        pure noise only with ``zero_terminal_snr``.
        """
        sigma = widen(sigma)
        table = _sigma_table(self, path, sigma.device, sigma.dtype)
        above = torch.searchsorted(table, sigma.contiguous()).clamp(1, self.steps - 1)
        low, high = table[above - 1], table[above]
        return (above - 1 + (sigma - low) / (high - low)).clamp(0, self.steps - 1)

    def sample(self, shape: int | tuple[int, ...], generator: torch.Generator, path: Path = LINEAR) -> Tensor:
        """Sigmas of t ~ U{0 .. steps - 1}, the law DDPM trains with: float32, on the generator's device."""
        shape = (shape,) if isinstance(shape, int) else shape
        t = torch.randint(self.steps, shape, generator=generator, device=generator.device)
        return self.sigma(t, path)

    def grid(self, steps: int, path: Path = LINEAR) -> Tensor:
        """A solver's grid, float32: the sigmas of up to ``steps`` even integer timesteps, falling, then 0.

        It starts at the noisiest trained step and steps on trained ones alone, to the clean end, for which
        none is trained. Only ``heun`` asks the network there; it is told t = 0. Raises UserError for
        steps < 1.
        """
        if steps < 1:
            raise UserError(f"sampling steps must be at least 1, got {steps}")
        if self.spacing == "trailing":
            steps = min(steps, self.steps)
            t = torch.arange(steps, 0, -1, dtype=torch.float64).mul(self.steps / steps).round() - 1
        else:
            t = torch.linspace(self.steps - 1, 0, steps, dtype=torch.float64).round().unique().flip(0)
        return torch.cat([self.sigma(t, path), torch.zeros(1)]).to(torch.float32)

    def start(self, noise: Tensor, path: Path = LINEAR) -> Tensor:
        """The first state on ``grid``, n * noise: DDPM starts from unit noise at a sigma that is below 1.

        noise: any shape, N(0, 1); the result has its dtype.
        """
        last = _sigma_table(self, path, noise.device, widen(noise).dtype)[-1]
        return (widen(noise) * state_norm(last, path)).to(noise.dtype)


@lru_cache(maxsize=32)
def _sigma_table(schedule: DiscreteSchedule, path: Path, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(steps,) rising sigmas. Kept per device: a copy from the host in every step would stall it."""
    return alpha_bar_to_sigma(schedule.alpha_bar(), path).to(device=device, dtype=dtype)


@dataclass(frozen=True)
class DiscretePrediction:
    """A network that lives in DDPM's world, trained and sampled under the project's convention.

    ``inputs`` is what it is fed, ``target`` what it is regressed on, ``velocity`` how its answer is read.
    Raises UserError for noise prediction on a zero-terminal-SNR schedule, where it cannot start.
    """

    schedule: DiscreteSchedule
    kind: Kind = "noise"
    path: Path = LINEAR

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UserError(f"prediction {self.kind!r} is unknown; use one of {', '.join(get_args(Kind))}")
        if self.kind == "noise" and self.schedule.zero_terminal_snr:
            raise UserError(
                "noise prediction cannot start from pure noise; with zero_terminal_snr use prediction v"
            )

    def inputs(self, x: Tensor, sigma: Sigma) -> tuple[Tensor, Tensor]:
        """(x_vp, t): x at DDPM's scale, and the fractional timestep, float, shaped like sigma."""
        sigma_t = sigma if isinstance(sigma, Tensor) else broadcast_sigma(sigma, x)
        n = broadcast_sigma(state_norm(sigma_t, self.path), x)
        return (widen(x) / n).to(x.dtype), self.schedule.timestep(sigma_t, self.path)

    def target(self, clean: Tensor, noise: Tensor, sigma: Sigma) -> Tensor:
        """What the network should answer for this pair."""
        return from_pair(self.kind, clean, noise, sigma, self.path)

    def velocity(self, output: Tensor, x: Tensor, sigma: Sigma) -> Tensor:
        """The project's velocity for the network's ``output`` at the state x (x itself, not x_vp)."""
        return convert(output, x, sigma, self.kind, "velocity", self.path)

    def velocity_fn(self, network: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, float], Tensor]:
        """A solver's velocity function from ``network(x_vp, t)``; t comes as (B,)."""

        def velocity(x: Tensor, sigma: float) -> Tensor:
            x_vp, t = self.inputs(x, sigma)
            return self.velocity(network(x_vp, t.expand(x.shape[0])), x, sigma)

        return velocity
