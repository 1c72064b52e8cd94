"""Pure diffusion maths: paths, noise levels, conversions, loss weights, guidance and solvers.

One convention: sigma in [0, 1], 1 is pure noise; x = (1 - sigma) clean + sigma noise; v = noise - clean.
A leaf of the house: it imports torch and ``motionloom.errors`` and nothing else.
"""

from motionloom.flow.convert import (
    Kind,
    alpha_bar_to_sigma,
    convert,
    flip_time,
    from_pair,
    sigma_to_alpha_bar,
    state_norm,
    to_pair,
)
from motionloom.flow.discrete import DiscretePrediction, DiscreteSchedule
from motionloom.flow.guidance import (
    FirstChannels,
    Guidance,
    Pass,
    Perturbation,
    Scales,
    Term,
    classifier_free,
    delta_to_scale,
    rescale,
)
from motionloom.flow.paths import COSINE, LINEAR, PATHS, Path, broadcast_sigma
from motionloom.flow.solvers import (
    SOLVERS,
    Callback,
    Solver,
    VelocityFn,
    consistency,
    ddim,
    dpmpp_2m,
    euler,
    heun,
)
from motionloom.flow.times import TimeSampling, shift_sigma, sigma_schedule, warped_steps
from motionloom.flow.weighting import WEIGHTINGS

__all__ = [
    "COSINE",
    "LINEAR",
    "PATHS",
    "SOLVERS",
    "WEIGHTINGS",
    "Callback",
    "DiscretePrediction",
    "DiscreteSchedule",
    "FirstChannels",
    "Guidance",
    "Kind",
    "Pass",
    "Path",
    "Perturbation",
    "Scales",
    "Solver",
    "Term",
    "TimeSampling",
    "VelocityFn",
    "alpha_bar_to_sigma",
    "broadcast_sigma",
    "classifier_free",
    "consistency",
    "convert",
    "ddim",
    "delta_to_scale",
    "dpmpp_2m",
    "euler",
    "flip_time",
    "from_pair",
    "heun",
    "rescale",
    "shift_sigma",
    "sigma_schedule",
    "sigma_to_alpha_bar",
    "state_norm",
    "to_pair",
    "warped_steps",
]
