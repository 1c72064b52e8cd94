"""The recipe: one typed, frozen tree that says everything about a run.

Sections and keys follow the mmdit YAML where they fit, so a YAML written for mmdit loads (``mmdit.py``).
Every key here is read by some code; a key that nothing reads does not belong in the tree.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from motionloom.config.conditions import Condition
from motionloom.config.distil import DistilConfig
from motionloom.config.guidance import GuidanceConfig
from motionloom.config.section import (
    BelowOne,
    BetweenZeroAndOne,
    Byte,
    Fraction,
    NotNegative,
    Positive,
    Section,
)
from motionloom.config.vtp import VtpConfig


class VideoConfig(Section):
    """The clip that training sees."""

    width: Positive = 256
    height: Positive = 256
    fps: Annotated[float, Field(gt=0, le=240)] = 16.0
    num_frames: Positive = 16
    frame_stride: Positive = Field(default=1, description="Take every n-th frame of the source at `fps`.")


class BucketingConfig(Section):
    """Sizes that clips are sorted into; off: every clip takes `video.width` x `video.height`."""

    enabled: bool = False
    buckets: tuple[tuple[Positive, Positive], ...] = Field(default=(), description="[width, height] pairs.")
    frames: tuple[Positive, ...] = Field(default=(), description="Lengths; empty: `video.num_frames` alone.")


class PreprocessConfig(Section):
    """From source pixels to the size of a bucket."""

    crop: Literal["center", "shifted"] = "center"
    shift_fraction: Fraction = Field(default=1.0, description="How far a shifted crop may leave the centre.")
    num_crops: Positive = 1
    seed: NotNegative | None = Field(default=None, description="Of the shifts; none: the recipe's seed.")
    background: tuple[Byte, Byte, Byte] = Field(
        default=(255, 255, 255), description="Colour behind transparent clips, 0-255."
    )


class TokenizerConfig(Section):
    """Pixels <-> latents. `patch` is fitted in closed form on the first clips that it sees; `pixels` leaves
    them as they are, for the training of tokenizers."""

    type: Literal["patch", "pixels", "vtp", "wan_vae", "cogvideox_vae", "ltx2_vae"] = "patch"
    name_or_path: str = Field(
        default="",
        description="A saved tokenizer, a VTP, a diffusers VAE; empty: fit a `patch` one while caching.",
    )
    latent_f: Positive = Field(default=8, description="Pixels per latent cell.")
    latent_t: Positive = Field(default=4, description="Frames per latent frame.")
    latent_d: Positive = Field(default=48, description="Channels.")
    first_alone: bool = Field(default=False, description="First frame alone, then groups of latent_t.")
    whiten: Fraction = Field(
        default=1.0,
        description="1: every channel has deviation 1; less: strong channels stay stronger, RMS 1.",
    )
    fit_clips: Positive = Field(
        default=512, description="How many clips a basis, or a VTP's statistics, come from."
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="VAEs and VTP: what they compute in."
    )
    rope: Literal["bf16", "fp32"] | None = Field(
        default=None,
        description="VTP only: of rotary angles. None: as it was saved, of a released one bf16.",
    )
    tile: NotNegative = Field(default=0, description="VAEs only: pixels of a square tile; 0: whole frames.")
    tile_overlap: NotNegative = Field(default=64, description="VAEs only: pixels that tiles share.")


class AudioConfig(Section):
    """Sound <-> latents. `spectral` is fitted in closed form on the sound of the first clips that it sees."""

    enabled: bool = Field(default=False, description="Whether clips have sound beside their picture.")
    type: Literal["spectral", "ltx2_audio"] = "spectral"
    name_or_path: str = Field(
        default="",
        description="A saved tokenizer or an LTX-2 folder; empty: fit a `spectral` one while caching.",
    )
    sample_rate: Positive = Field(default=16_000, description="Hz at which sound is looked at.")
    channels: Positive = Field(default=24, description="Numbers in a latent.")
    latents_per_second: Annotated[float, Field(gt=0)] = 16.0
    whiten: Fraction = Field(
        default=0.0,
        description="spectral only. 1: every channel has deviation 1; less: strong channels stay stronger.",
    )
    fit_clips: Positive = Field(default=512, description="spectral only: how many sounds it is fitted on.")


class ReferencesConfig(Section):
    """Clips to be looked at, which the manifest names (`reference`); off: they are not cached."""

    enabled: bool = False
    downscale: Literal[1, 2, 4] = Field(
        default=1, description="How many times smaller a reference is, both ways."
    )
    frame_stride: Positive = Field(default=1, description="Take every n-th of the clip's moments.")
    audio: bool = Field(default=False, description="Whether the sound of references is cached as well.")


class MasksConfig(Section):
    """What of a clip is given, as the manifest says (`mask`); off: it is not cached."""

    enabled: bool = False


class StoriesConfig(Section):
    """Clips of several shots: how long they are, and how they are put together while training."""

    frames: Positive | None = Field(
        default=None, description="Longest shot; none: a whole story is cut to the clip's length."
    )
    shots: Positive | None = Field(
        default=None, description="Stories of more shots are used by windows of so many; none: whole."
    )
    join: tuple[NotNegative, NotNegative] = Field(
        default=(0, 0), description="[least, most] unrelated clips laid end to end as shots; zeros: none."
    )
    max_latent_frames: Positive | None = Field(
        default=None, description="Most latent frames of windows and of joined clips; none: any."
    )
    global_caption: bool = Field(
        default=False, description="Whether the caption of the whole stands beside those of the shots."
    )


class TextEncoderConfig(Section):
    """Captions -> token embeddings."""

    type: Literal["hash", "hf", "ltx2", "classes"] = "hash"
    classes: tuple[str, ...] = Field(
        default=(), description="classes only: every caption is one of them, or empty."
    )
    dim: Positive = Field(default=256, description="hash only; hf models bring their own.")
    vocab_size: Positive = Field(default=4096, description="hash only.")
    max_length: Positive = 32
    name_or_path: str = Field(default="", description="hf, ltx2: a local folder or a hub name.")
    connectors: str = Field(
        default="", description="ltx2 only: a folder; empty: the one beside `name_or_path`."
    )
    padding: Literal["hidden", "zero", "attended"] = Field(
        default="hidden",
        description="hf only. Who sees it: nobody; backbones, as zeros, and captions are cleaned (Wan); all, "
        "embedded (CogVideoX).",
    )
    trainable: bool = Field(default=True, description="hash only: train the table with the model.")
    dtype: Literal["float32", "bfloat16", "int8"] = Field(
        default="bfloat16", description="hf, ltx2. int8: weights alone, on a GPU, by bitsandbytes."
    )


OWN_BACKBONES = ("factorized", "joint")
"""Backbones whose sizes a recipe chooses; the others take theirs from a preset or from the weights, and
lightning either way."""

OWN_SIZES = ("dim", "audio_dim", "depth", "num_heads", "mlp_ratio", "window_size", "dropout")
"""Keys of ``model`` that only the own backbones read."""


class ModelConfig(Section):
    """The backbone."""

    type: Literal["factorized", "joint", "wan", "cogvideox", "ltx2", "lightning"] = "factorized"
    preset: str = Field(default="", description="Name of published sizes; not for factorized and joint.")
    name_or_path: str = Field(
        default="",
        description="Weights to start from, a folder or a safetensors file; not for factorized and joint.",
    )
    dim: Positive = 512
    audio_dim: NotNegative = Field(
        default=0, description="joint only: width of the stream of sound; 0: there is none."
    )
    depth: Positive = 8
    num_heads: Positive = 8
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    window_size: Positive = Field(
        default=8, description="factorized only: side of a spatial window, in tokens."
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    patch: tuple[Positive, Positive, Positive] = Field(
        default=(1, 1, 1), description="Latent cells (frames, rows, columns) per token."
    )
    prediction: Literal["velocity", "clean", "noise"] = Field(
        default="velocity", description="What the network's output means; the loss follows `train.objective`."
    )
    condition: Literal["text", "class"] = Field(
        default="text",
        description="lightning only: told by the mean of the words, or by a table of classes.",
    )
    qk_norm: bool = Field(
        default=False, description="lightning only: queries and keys are normalised (the others always do)."
    )
    checkpoint_blocks: bool = Field(default=False, description="Recompute blocks in the backward pass.")

    @property
    def imported(self) -> bool:
        """Whether the sizes are those of a published model, and the sizes above are not read."""
        if self.type == "lightning":
            return bool(self.preset or self.name_or_path)
        return self.type not in OWN_BACKBONES


class LoraConfig(Section):
    """Low-rank adapters beside frozen weights (LoRA, 2106.09685); off: every weight is trained."""

    enabled: bool = False
    base: str = Field(
        default="", description="A checkpoint of MotionLoom to adapt; empty: `model.name_or_path`."
    )
    rank: Positive = Field(default=32, description="Width of an adapter.")
    alpha: Annotated[float, Field(gt=0)] = Field(
        default=32.0, description="An adapter is added alpha / rank times."
    )
    dropout: BelowOne = Field(default=0.0, description="Of an adapter's input.")
    targets: tuple[str, ...] = Field(
        default=("to_q", "to_k", "to_v", "to_out.0"),
        description="Ordered patterns of module names; the first that fits decides, ! leaves out.",
    )
    dora: bool = Field(default=False, description="Train the length of each row of the weights too.")
    init: Literal["kaiming", "gaussian"] = Field(
        default="kaiming", description="Of the down-projections; the others start at 0."
    )
    init_from: str = Field(default="", description="A LoRA file whose adapters to start from; a new run.")
    parts: tuple[str, ...] = Field(
        default=(), description="Ordered patterns of parameters that are trained whole beside the adapters."
    )


class PlanConfig(Section):
    """What each token is."""

    type: Literal["text_to_video", "scenes", "chunks"] = "text_to_video"
    modalities: tuple[Literal["video", "audio"], ...] = Field(
        default=("video",), description="What is made or given: video, audio or both."
    )
    audio_loss: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="Weight of the sound's loss beside the video's."
    )
    conditions: tuple[Condition, ...] = Field(
        default=(), description="What may be given, see docs/conditions.md; none: all is made."
    )
    choose: Literal["any", "one"] = Field(
        default="any", description="any: each is drawn by itself; one: at most one of them per sample."
    )
    visibility: Literal["mask2dit", "summary", "cinetrans", "full"] = Field(
        default="mask2dit", description="scenes: what they see of each other."
    )
    positions: Literal["continuous", "reset", "jump", "gap"] = Field(
        default="continuous", description="scenes: where the next one stands in time."
    )
    jump: Annotated[float, Field(gt=0)] = Field(
        default=0.5, description="positions jump: token frames that each cut adds."
    )
    gap: Annotated[float, Field(gt=0)] = Field(
        default=4.0, description="positions gap: seconds that each cut adds."
    )
    noise: Literal["shared", "own"] = Field(
        default="shared", description="scenes: one noise level for all, or one for each."
    )
    frames: Positive = Field(default=3, description="chunks: latent frames of a chunk.")
    first_alone: bool = Field(default=False, description="chunks: chunk 0 is one frame.")
    window: Positive | None = Field(
        default=None, description="chunks: visible chunks, the present one included."
    )
    sinks: NotNegative = Field(default=0, description="chunks: first chunks that stay visible.")
    rebase: bool = Field(
        default=False, description="chunks: those in the window close up behind the sinks as others leave."
    )
    forcing: Literal["diffusion", "teacher"] = Field(default="diffusion", description="chunks.")


class DiffusionConfig(Section):
    """Discrete noise schedule, for `train.objective: ddpm_*`."""

    num_timesteps: Positive = 1000
    schedule: Literal["cosine", "linear", "scaled_linear"] = "cosine"
    beta_start: BetweenZeroAndOne = Field(default=1e-4, description="linear and scaled_linear.")
    beta_end: BetweenZeroAndOne = Field(default=2e-2, description="linear and scaled_linear.")
    zero_terminal_snr: bool = Field(default=False, description="The last step holds no signal at all.")
    snr_shift: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="Every signal-to-noise ratio is divided by it."
    )
    spacing: Literal["linspace", "trailing"] = Field(default="linspace", description="Of sampling steps.")

    @property
    def schedule_terms(self) -> dict[str, Any]:
        """The arguments of ``flow.DiscreteSchedule``."""
        terms = self.model_dump()
        return {"betas": terms.pop("schedule"), "steps": terms.pop("num_timesteps"), **terms}


class FlowMatchingConfig(Section):
    """Path and training times, for `train.objective: flow`."""

    path: Literal["linear", "cosine"] = "linear"
    times: Literal["uniform", "logit_normal"] = "uniform"
    mean: float = Field(default=0.0, description="logit_normal.")
    std: Annotated[float, Field(gt=0)] = Field(default=1.0, description="logit_normal.")
    shift: Annotated[float, Field(gt=0)] = Field(default=1.0, description="> 1 moves times towards noise.")
    t_min: Fraction = 0.0
    t_max: Fraction = 1.0
    weighting: Literal["uniform", "min_snr", "eps", "bell", "cosmap"] = "uniform"
    min_snr_gamma: Annotated[float, Field(gt=0)] = 5.0
    direction: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="Weight of 1 - cosine between predicted and true velocity in the loss; LightningDiT: 1.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> FlowMatchingConfig:
        if self.t_min >= self.t_max:
            raise ValueError(
                f"flow_matching.t_min {self.t_min} is not below flow_matching.t_max {self.t_max}: lower it"
            )
        return self


class TrainConfig(Section):
    """The optimisation."""

    method: Literal["denoise", "ode", "consistency", "matching", "tokenizer", "decoder"] = Field(
        default="denoise",
        description="What a step optimises; ode, consistency and matching teach a student (`distil`), "
        "tokenizer and decoder train a tokenizer (`vtp`).",
    )
    objective: Literal["flow", "ddpm_eps", "ddpm_v"] = "flow"
    precision: Literal["bf16", "fp32"] = "bf16"
    compile: bool = Field(default=False, description="Compile each block.")
    batch_size: Positive = Field(default=8, description="Per rank and micro-batch.")
    grad_accum_steps: Positive = 1
    optimizer: Literal["adamw", "muon"] = Field(
        default="adamw", description="muon: for the matrices of blocks; the rest takes AdamW."
    )
    lr: Annotated[float, Field(gt=0)] = 1e-4
    rest_lr: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="muon: of what AdamW takes; none: `lr` too."
    )
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: NotNegative = 0
    min_lr_ratio: Fraction = Field(default=0.0, description="Where cosine and linear end, as a part of `lr`.")
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    max_steps: Positive = 1000
    max_minutes: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Stop cleanly, with a checkpoint, after so long; a resume goes on."
    )
    cfg_dropout_prob: Fraction = Field(
        default=0.1, description="How often a caption is replaced by the empty one."
    )
    log_every_steps: Positive = 50
    save_every_steps: Positive = 500
    keep_checkpoints: Annotated[int, Field(ge=1)] = Field(
        default=2, description="The newest K; the last always."
    )
    heldout_fraction: Fraction = Field(default=0.05, description="Of the cache, kept out of training.")
    heldout_every_steps: NotNegative = Field(
        default=0, description="And after the first step; 0: only at the end."
    )
    sharding: Literal["ddp", "fsdp"] = "ddp"
    init_from: str = Field(default="", description="Checkpoint whose weights to start from; a new run.")
    parts: tuple[str, ...] = Field(
        default=(),
        description="Ordered patterns of parameters; what they take is trained, the rest frozen. Empty: all.",
    )
    sample_every_steps: NotNegative = Field(default=0, description="0: no samples while training.")
    sample_prompts: tuple[str, ...] = Field(default=(), description="None: the first held-out captions.")
    sample_requests: tuple[str | dict[str, Any], ...] = Field(
        default=(), description="More samples: requests, or files of them (see docs/requests.md)."
    )
    sample_num_images: Positive = 4
    sample_num_steps: Positive = 50
    sample_solver: Literal["euler", "heun", "dpmpp_2m", "ddim"] = "euler"
    sample_eta: Fraction = Field(default=0.0, description="ddim only.")
    sample_cfg_scale: Annotated[float, Field(ge=0)] = 5.0
    sample_cfg_interval: tuple[Fraction, Fraction] = (0.0, 1.0)
    sample_cfg_rescale: Fraction = 0.0
    sample_shift: Annotated[float, Field(gt=0)] = 1.0
    sample_seed: NotNegative = 0


class EmaConfig(Section):
    """Moving average of the weights."""

    enabled: bool = True
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    update_every: Positive = 1
    start_step: NotNegative = 0
    use_for_sampling: bool = True


class Recipe(Section):
    """A whole run.

    Raises:
        pydantic.ValidationError: a wrong value, or values that do not fit together (``load_recipe`` turns it
            into one line).
    """

    experiment_name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    output_dir: str = "runs"
    seed: NotNegative = 42
    num_workers: NotNegative = Field(default=2, description="Threads that read the cache.")
    video: VideoConfig = VideoConfig()
    bucketing: BucketingConfig = BucketingConfig()
    preprocess: PreprocessConfig = PreprocessConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    audio: AudioConfig = AudioConfig()
    references: ReferencesConfig = ReferencesConfig()
    masks: MasksConfig = MasksConfig()
    stories: StoriesConfig = StoriesConfig()
    text_encoder: TextEncoderConfig = TextEncoderConfig()
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    plan: PlanConfig = PlanConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    flow_matching: FlowMatchingConfig = FlowMatchingConfig()
    train: TrainConfig = TrainConfig()
    guidance: GuidanceConfig = GuidanceConfig()
    distil: DistilConfig = DistilConfig()
    vtp: VtpConfig = VtpConfig()
    ema: EmaConfig = EmaConfig()

    @property
    def trains_tokenizer(self) -> bool:
        """Whether it is a tokenizer that is trained, and no backbone."""
        return self.train.method in ("tokenizer", "decoder")

    @property
    def of_shots(self) -> bool:
        """Whether its clips are stories of several shots: of a plan of scenes, or chunks of stories."""
        told = self.stories.frames is not None or self.stories.join[1] > 0
        return self.plan.type == "scenes" or (self.plan.type == "chunks" and told)

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        from motionloom.config.misfits import misfits  # which knows all sections, and so imports this file

        if problem := next(misfits(self), None):
            raise ValueError(problem)
        return self
