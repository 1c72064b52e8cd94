"""The recipe's section for students: from a teacher's many steps to a few (see docs/streaming.md)."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator

from motionloom.config.section import BelowOne, Fraction, NotNegative, Positive, Section

Above = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]


class DistilConfig(Section):
    """How a student of few steps is taught, by `train.method` ode, consistency or matching."""

    teacher: str = Field(default="", description="A run or a checkpoint, or a recipe of published weights.")
    num_steps: Positive = Field(default=4, description="Noise levels of the student.")
    shift: Above = Field(default=5.0, description="Of those levels; > 1 moves them towards noise.")
    sigmas: tuple[Fraction, ...] = Field(
        default=(), description="The levels themselves, falling from 1; empty: by `num_steps` and `shift`."
    )
    guidance: Weight = Field(default=4.0, description="Of the teacher.")
    guidance_form: Literal["scale", "delta"] = Field(
        default="scale", description="scale: u + w (c - u); delta: c + w (c - u), so 3 is a scale of 4."
    )
    negative: str = Field(default="", description="What guidance pushes the teacher away from.")
    source: Literal["rollout", "data"] = Field(
        default="rollout",
        description="matching: the student's own roll-outs (Self-Forcing), or clips of the cache made noisy, "
        "each chunk to a level of its own (CausVid).",
    )
    loss: Literal["dmd", "sid", "gan"] = Field(default="dmd", description="matching: what pulls the student.")
    same_exit: bool = Field(default=True, description="rollout: one step with gradient for all chunks.")
    last_exit: bool = Field(default=False, description="rollout: that step is always the last one.")
    context_noise: Fraction = Field(default=0.0, description="Level at which made chunks are remembered.")
    write_through: bool = Field(
        default=False,
        description="Chunks are remembered as their last step saw them, noisy, which saves a pass a chunk "
        "(diffusion forcing); else by a pass over the clean chunk.",
    )
    longest: Positive | None = Field(
        default=None,
        description="rollout: most latent frames; of a longer roll-out its last clip's length is scored.",
    )
    switch: Fraction = Field(
        default=0.0,
        description="rollout: how often what lies before the scored end is made under another caption of "
        "the batch, as when a prompt is changed (LongLive); needs `longest`.",
    )
    critic: Literal["full", "lora"] = Field(
        default="full", description="lora: adapters on the teacher, so that one network is held for both."
    )
    critic_rank: Positive = 64
    critic_from: str = Field(
        default="", description="Whose weights the critic starts from, named like `teacher`; empty: its."
    )
    critic_loss: Literal["flow", "clean"] = Field(
        default="flow",
        description="The critic's error: of the velocity, or of the clean estimate, which is sigma^2 of that "
        "and leaves the least noisy clips less to say; for networks that predict the clean clip.",
    )
    critic_lr: Above | None = Field(
        default=None, description="None: `train.lr`. `train.rest_lr` keeps its ratio to it."
    )
    critic_ratio: Positive = Field(default=5, description="Steps of the critic for each of the student.")
    score_shift: Above = Field(default=5.0, description="Of the levels at which teacher and critic judge.")
    score_range: tuple[Fraction, Fraction] = Field(
        default=(0.02, 0.98), description="Those levels are clamped to it, after the shift."
    )
    normalise: bool = Field(default=True, description="Divide each sample's pull by how far the teacher is.")
    sid_alpha: Weight = 1.0
    gan_weight: Weight = Field(
        default=1.0, description="loss gan: of the judge's word in the student's loss."
    )
    gan_form: Literal["softplus", "relativistic"] = "relativistic"
    gan_blocks: tuple[NotNegative, ...] = Field(
        default=(),
        description="Blocks of the critic that are judged by, from 0; empty: a half, 3/4, the last.",
    )
    gan_dmd: Weight = Field(default=0.0, description="loss gan: weight of DMD's pull beside it.")
    gan_r1: Weight = Field(default=0.0, description="How steep the judge may be on real clips.")
    gan_r2: Weight = Field(default=0.0, description="And on made ones.")
    gan_sigma: Above = Field(default=0.01, description="Step by which that is measured.")
    grid_steps: Positive = Field(default=48, description="Steps of the teacher, for pairs and consistency.")
    grid_solver: Literal["euler", "heun", "dpmpp_2m"] = Field(default="euler", description="pairs.")
    betas: tuple[BelowOne, BelowOne] | None = Field(
        default=None, description="matching: AdamW's for student and critic; none: `train.betas`."
    )

    @model_validator(mode="after")
    def _levels_fall(self) -> DistilConfig:
        if self.sigmas and (
            self.sigmas[0] != 1.0 or any(a <= b for a, b in pairwise(self.sigmas)) or self.sigmas[-1] <= 0
        ):
            raise ValueError(
                f"distil.sigmas {list(self.sigmas)} must fall from 1.0 and end above 0: 0 is where they lead"
            )
        if self.score_range[0] >= self.score_range[1]:
            raise ValueError("distil.score_range must be [low, high] with low < high")
        return self

    @property
    def levels(self) -> tuple[float, ...]:
        """The student's noise levels, falling from 1; the 0 that they lead to is left out."""
        if self.sigmas:
            return self.sigmas
        u = (1 - i / self.num_steps for i in range(self.num_steps))
        return tuple(self.shift * x / (1 + (self.shift - 1) * x) for x in u)

    @property
    def scale(self) -> float:
        """The teacher's guidance as u + scale (c - u)."""
        return self.guidance + (self.guidance_form == "delta")
