"""Keys of CausVid's and Self-Forcing's YAML files, as data: which pass, which are fixed, which are gone."""

from __future__ import annotations

from typing import Any, NamedTuple


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


class Network(NamedTuple):
    """A Wan by the name that their files give it."""

    preset: str
    """``model.preset``."""
    recipe: str
    """Of the published weights, as ``distil.teacher`` names it."""
    folder: str
    """Of diffusers."""

    @property
    def transformer(self) -> str:
        """Folder of its weights."""
        return f"{self.folder}/transformer"


_SMALL = Network("wan2.1-t2v-1.3b", "wan", "models/Wan2.1-T2V-1.3B-Diffusers")
_LARGE = Network("wan2.1-t2v-14b", "wan_14b", "models/Wan2.1-T2V-14B-Diffusers")
NETWORKS = {"wan": _SMALL, "causal_wan": _SMALL, "Wan2.1-T2V-1.3B": _SMALL, "Wan2.1-T2V-14B": _LARGE}
"""What ``model_name`` and its like may say."""

WAN: dict[str, Any] = {
    "video.fps": 16.0,
    "tokenizer.type": "wan_vae",
    "tokenizer.name_or_path": f"{_SMALL.folder}/vae",
    "tokenizer.latent_f": 8,
    "tokenizer.latent_t": 4,
    "tokenizer.latent_d": 16,
    "tokenizer.first_alone": True,
    "text_encoder.type": "hf",
    "text_encoder.name_or_path": f"{_SMALL.folder}/text_encoder",
    "text_encoder.max_length": 512,
    "text_encoder.padding": "zero",
    "text_encoder.trainable": False,
    "model.type": "wan",
    "model.patch": [1, 2, 2],
    "train.objective": "flow",
    "train.clip_grad_norm": 10.0,
    "train.cfg_dropout_prob": 0.0,
    "train.sample_cfg_scale": 1.0,
}
"""What stands in their code, under our keys."""

WAN_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)
"""The negative prompt that Wan was published with."""

CAUSVID_DEFAULTS: dict[str, Any] = {
    "model_name": "wan",
    "backward_simulation": True,
    "num_frame_per_block": 1,
    "weight_decay": 0.01,
    "beta1": 0.9,
    "beta2": 0.999,
    "mixed_precision": True,
    "timestep_shift": 1.0,
    "dfake_gen_update_ratio": 5,
}
SELF_FORCING_DEFAULTS: dict[str, Any] = {
    "model_name": "Wan2.1-T2V-1.3B",
    "trainer": "score_distillation",
    "distribution_loss": "dmd",
    "causal": True,
    "num_frame_per_block": 1,
    "weight_decay": 0.01,
    "beta1": 0.0,
    "beta2": 0.999,
    "mixed_precision": True,
    "timestep_shift": 1.0,
    "dfake_gen_update_ratio": 5,
    "ts_schedule": True,
    "num_training_frames": 21,
    "gan_g_weight": 0.01,
}
"""Where a file is silent."""

TRAINING = {
    ("CausVid", "ode"): 3000,
    ("CausVid", "matching"): 6000,
    ("Self-Forcing", "ode"): 3000,
    ("Self-Forcing", "matching"): 600,
    ("Self-Forcing", "denoise"): 3000,
}
"""Steps by program and method, as published; of what has no figure, those of CausVid's first stage."""

PASSED = {
    "lr": "train.lr",
    "lr_critic": "distil.critic_lr",
    "batch_size": "train.batch_size",
    "weight_decay": "train.weight_decay",
    "max_grad_norm_generator": "train.clip_grad_norm",
    "dfake_gen_update_ratio": "distil.critic_ratio",
    "timestep_shift": "distil.score_shift",
    "negative_prompt": "distil.negative",
    "sid_alpha": "distil.sid_alpha",
    "same_step_across_blocks": "distil.same_exit",
    "last_step_only": "distil.last_exit",
    "ema_weight": "ema.decay",
    "ema_start_step": "ema.start_step",
    "gradient_checkpointing": "model.checkpoint_blocks",
    "log_iters": "train.save_every_steps",
    "output_path": "output_dir",
    "seed": "seed",
}
"""Same meaning, other name."""

GAN_PASSED = {
    "gen_lr": "train.lr",
    "critic_lr": "distil.critic_lr",
    "gan_g_weight": "distil.gan_weight",
    "r1_weight": "distil.gan_r1",
    "r2_weight": "distil.gan_r2",
    "r1_sigma": "distil.gan_sigma",
}
"""Likewise, for ``trainer: gan``."""


class Fixed(NamedTuple):
    """A choice of theirs that is none here."""

    value: Any
    """What holds here."""
    here: str
    """In words, after "here"."""
    methods: tuple[str, ...]
    """``train.method`` of the files that read it."""


_ALL, _MATCHING, _DENOISE = ("ode", "matching", "denoise"), ("matching",), ("denoise",)
FIXED = {
    "generator_grad.model": Fixed(True, "the student is trained", _ALL),
    "real_score_grad.model": Fixed(False, "the teacher is frozen", _MATCHING),
    "fake_score_grad.model": Fixed(True, "the critic is trained", _MATCHING),
    "real_task_type": Fixed("bidirectional_video", "a clip is judged at one level", _MATCHING),
    "fake_task_type": Fixed("bidirectional_video", "a clip is judged at one level", _MATCHING),
    "denoising_loss_type": Fixed("flow", "the critic learns the velocity", _MATCHING),
    "fake_guidance_scale": Fixed(0, "the critic is not guided", _MATCHING),
    "num_train_timestep": Fixed(
        1000, "levels are those of [0, 1], of which 2 % at each end are cut", _MATCHING
    ),
    "min_score_timestep": Fixed(0, "levels are those of [0, 1], of which 2 % at each end are cut", _MATCHING),
    "ts_schedule": Fixed(False, "the judges' level does not follow the student's step", _MATCHING),
    "ts_schedule_max": Fixed(False, "the judges' level does not follow the student's step", _MATCHING),
    "discriminator_lr_multiplier": Fixed(1, "all of the critic has one learning rate", _MATCHING),
    "discriminator_warmup_steps": Fixed(0, "the judge learns with the critic from the start", _MATCHING),
    "gan_d_weight": Fixed(1, "the judge's own loss has weight 1", _MATCHING),
    "concat_time_embeddings": Fixed(False, "the judge sees no embedding of the level", _MATCHING),
    "noise_augmentation_max_timestep": Fixed(0, "the past is clean", _DENOISE),
    "load_raw_video": Fixed(False, "training reads latents, pixels are cached once", _ALL),
}

_WANDB = "dropped, runs are kept in metrics.jsonl and TensorBoard"
_FSDP = "dropped, FSDP2 cuts block by block"
_PLACES = "dropped, it belongs to making clips: `motionloom generate` and `stream`"
SECRET = "wandb_key"
"""Its value is not repeated."""
GONE = {
    **dict.fromkeys(("wandb_host", "wandb_entity", "wandb_project", "wandb_name"), _WANDB),
    SECRET: f"{_WANDB}, and a key does not belong in a file that is shared",
    **{
        f"{network}_fsdp_{what}": _FSDP
        for network in ("generator", "real_score", "fake_score", "text_encoder")
        for what in ("wrap_strategy", "transformer_module")
    },
    "text_encoder_cpu_offload": "dropped, captions are encoded before they are needed",
    "gc_interval": "dropped, Python collects by itself",
    "max_pair": "dropped, cut the cache instead",
    "num_class": "dropped, the judge gives one answer",
    **dict.fromkeys(
        (
            *("ckpt_step", "prompt_name", "prompt_path", "eval_first_n", "num_samples"),
            *("height", "width", "num_frames"),
        ),
        _PLACES,
    ),
}
"""Keys that have no place here, and why."""

FLAGS = _words(
    """
    generator_grad.model real_score_grad.model fake_score_grad.model warp_denoising_step
    backward_simulation gradient_checkpointing mixed_precision independent_first_frame i2v
    same_step_across_blocks last_step_only causal ts_schedule ts_schedule_max load_raw_video
    teacher_forcing concat_time_embeddings relativistic_discriminator text_encoder_cpu_offload
    """
)
"""Keys that are true or false."""

_BOTH = _words(
    """
    model_name generator_name real_name fake_name generator_ckpt denoising_step_list warp_denoising_step
    num_train_timestep timestep_shift real_guidance_scale denoising_loss_type num_frame_per_block
    data_path batch_size image_or_video_shape lr beta1 beta2 weight_decay dfake_gen_update_ratio
    sharding_strategy gradient_checkpointing mixed_precision seed log_iters negative_prompt output_path
    max_pair
    """
) | {key for key in GONE if "fsdp" in key or "wandb" in key}
CAUSVID = _BOTH | _words(
    """
    generator_grad.model real_score_grad.model fake_score_grad.model generator_task generator_task_type
    real_task_type fake_task_type backward_simulation distillation_loss
    """
)
SELF_FORCING = _BOTH | _words(
    """
    trainer distribution_loss causal independent_first_frame i2v same_step_across_blocks last_step_only
    discriminator_lr_multiplier num_training_frames gc_interval context_noise ckpt_step prompt_name
    prompt_path eval_first_n num_samples height width num_frames ts_schedule ts_schedule_max
    model_kwargs.model_name model_kwargs.timestep_shift model_kwargs.local_attn_size
    model_kwargs.sink_size guidance_scale fake_guidance_scale lr_critic beta1_critic beta2_critic
    ema_weight ema_start_step total_batch_size load_raw_video sid_alpha min_score_timestep
    teacher_forcing noise_augmentation_max_timestep concat_time_embeddings num_class
    relativistic_discriminator critic_timestep_shift gan_g_weight gan_d_weight r1_weight r2_weight
    r1_sigma r2_sigma discriminator_warmup_steps max_grad_norm_generator max_grad_norm_critic
    text_encoder_cpu_offload gen_lr critic_lr
    """
)

SIGNS = _words(
    """
    denoising_step_list dfake_gen_update_ratio num_frame_per_block generator_task generator_ckpt
    generator_name distillation_loss distribution_loss backward_simulation image_or_video_shape
    same_step_across_blocks warp_denoising_step
    """
)
"""Keys that show what a file was written for."""
