"""The ``motionloom`` command. Thin: every command names its inputs, calls a room and shows the answer.

Nothing heavy is imported before a command runs, so that ``--help`` is quick.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

# Read when torch is loaded. Threads that spin while they wait halve the speed of a shared machine, and DDP
# says the same thing about unused parameters once per rank.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import typer

from motionloom import __version__
from motionloom.cli.console import INTERRUPTED, WRONG, die
from motionloom.errors import UserError

app = typer.Typer(
    help="From a folder of captioned clips to a text-to-video model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
data_app = typer.Typer(help="Make or collect captioned clips.", no_args_is_help=True)
app.add_typer(data_app, name="data")

lora_app = typer.Typer(
    help="Adapters: a run's for other programs, or merged into weights.", no_args_is_help=True
)
app.add_typer(lora_app, name="lora")

# Wrong options and arguments. Typer exports only this child of it.
_UsageError: Any = typer.BadParameter.__base__


CONTINUED = ("quickstart", "cache", "pairs", "data shapeworld", "scale")
"""Commands that go on where they were interrupted (`train` does with --resume, and says so itself)."""


def _version(wanted: bool) -> None:
    if wanted:
        print(f"motionloom {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """From a folder of captioned clips to a text-to-video model."""


Decoder = Annotated[
    Path | None,
    typer.Option(metavar="TOKENIZER", help="Decode with it: the model's own after a second stage."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the answer as one JSON object on stdout.")]
Recipe = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A YAML file, or the name of one that comes along: quickstart, quickstart_vtp, clips, "
        "shapeworld, lightning, causal, factorized_256; first_frame, keyframes, extend, extend_back, "
        "inpaint, outpaint, conditions, ic_lora; scenes, scenes_pretrain, scenes_sft, scenes_lora; sound, "
        "t2av, v2a, a2v, t2a, audio_extend, audio_inpaint, a2a, av2av; lora_shape, lora_wan, "
        "lora_cogvideox, lora_ltx2; endless, causal_teacher, causvid_ode, causvid_dmd, self_forcing, "
        "self_forcing_sid, self_forcing_gan, self_forcing_long, self_forcing_live, self_forcing_frame, "
        "self_forcing_scenes, self_forcing_sound, causal_consistency, few_step; wan, wan_14b, "
        "causvid_ode_wan, causvid_dmd_wan, self_forcing_wan; vtp_shapeworld, vtp_emoji, vtp_decoder, vtp_b",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe: train.lr=3e-4"),
]
Seed = Annotated[int, typer.Option(min=0, help="Decides everything that is random.")]


@app.command(epilog="Example: motionloom quickstart --data my_clips --minutes 8")
def quickstart(
    data: Annotated[
        Path | None, typer.Option(help="Your captioned clips (folder or zip); else ShapeWorld.")
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.01, help="How long to train.")] = 8.0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The run folder; a second call goes on where the first stopped. Else runs/quickstart, with "
            "--data runs/own."
        ),
    ] = None,
    seed: Seed = 0,
    clips: Annotated[int, typer.Option(min=16, help="How many clips ShapeWorld makes.")] = 6000,
    prompts: Annotated[int, typer.Option(min=1, help="How many unseen prompts are judged.")] = 128,
    keep: Annotated[
        list[str] | None, typer.Option(help="With --data: only clips whose attribute is this, key=value.")
    ] = None,
    overrides: Overrides = None,
    open_page: Annotated[bool, typer.Option("--open/--no-open", help="Show the page in a browser.")] = True,
    as_json: Json = False,
) -> None:
    """The main job, whole: clips, cache, training, generation, and a page that shows the result."""
    from motionloom.cli import quickstart as command

    sizes = command.Sizes(minutes, clips, prompts)
    out = out or Path("runs/quickstart" if data is None else "runs/own")
    command.run(data, sizes, out, seed, keep or [], overrides or [], open_page, as_json)


@data_app.command(
    epilog="Example: motionloom data shapeworld --out worlds/small --clips 200 --frames 16 --size 32"
)
def shapeworld(
    out: Annotated[Path, typer.Option(help="Folder for the clips and their manifest.jsonl.")],
    clips: Annotated[int, typer.Option(min=1, help="How many.")] = 200,
    frames: Annotated[int, typer.Option(help="Frames per clip (per scene).")] = 16,
    size: Annotated[int, typer.Option(help="Pixels a side.")] = 64,
    seed: Seed = 0,
    fps: Annotated[float, typer.Option(help="Frames per second.")] = 8.0,
    world: Annotated[
        str,
        typer.Option(
            help="full, or a part that trains in minutes: quickstart; modes, which sounds; endless."
        ),
    ] = "full",
    split: Annotated[str, typer.Option(help="train, test (held-out combinations) or all.")] = "train",
    scenes: Annotated[int, typer.Option(min=1, help="More than 1: stories with one character.")] = 1,
    scene_frames: Annotated[
        str | None, typer.Option(help="Lengths that a scene may have, such as 9,13; instead of --frames.")
    ] = None,
    sound: Annotated[bool, typer.Option("--sound", help="Write the sound track into the files.")] = False,
    references: Annotated[
        str | None,
        typer.Option(
            help="A reference beside each clip: swap (another colour), edges (its outlines) or small (half "
            "the size)."
        ),
    ] = None,
    masks: Annotated[bool, typer.Option("--masks", help="A mask of what is given beside each clip.")] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only clips with this shape, color, motion, size or background; repeatable."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a world of captioned clips: shapes that move, bounce and sound."""
    from motionloom.cli import data as command

    command.shapeworld(
        out,
        clips,
        frames,
        size,
        seed,
        fps,
        world,
        split,
        scenes,
        scene_frames,
        sound,
        references,
        masks,
        only or [],
        as_json,
    )


@data_app.command(epilog="Example: motionloom data ingest my_clips --out manifest.jsonl")
def ingest(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="Folder or zip with videos, animations, images, frame folders; or another trainer's list.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The manifest to write.")] = Path("manifest.jsonl"),
    keep: Annotated[
        list[str] | None, typer.Option(help="Only clips whose attribute is this, key=value; repeatable.")
    ] = None,
    windows: Annotated[
        float | None, typer.Option(min=0.01, help="Cut longer clips into windows of so many seconds.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Find the clips in a folder and their captions, check each, and list what cannot be used."""
    from motionloom.cli import data as command

    command.ingest(source, out, keep or [], windows, as_json)


@data_app.command(
    epilog="Example: motionloom data join worlds/small/manifest.jsonl manifest.jsonl:3 --out both.jsonl"
)
def join(
    manifests: Annotated[
        list[str], typer.Argument(metavar="FILE[:TIMES]...", help="Which, and how often each is listed.")
    ],
    out: Annotated[Path, typer.Option(help="The manifest to write.")],
    as_json: Json = False,
) -> None:
    """One manifest of several; each one's folder names its clips."""
    from motionloom.cli import data as command

    command.join(manifests, out, as_json)


@app.command(
    epilog="Example: motionloom cache quickstart --manifest worlds/small/manifest.jsonl --out caches/small"
)
def cache(
    recipe: Recipe,
    out: Annotated[Path, typer.Option(help="The cache folder; an interrupted one is continued.")],
    manifest: Annotated[Path | None, typer.Option(help="Which clips.")] = None,
    lmdb: Annotated[
        Path | None,
        typer.Option(help="... or latents of CausVid or Self-Forcing, an LMDB folder; no pixels are read."),
    ] = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Turn pixels into latents and captions into embeddings, once."""
    from motionloom.cli import cache as command

    command.run(recipe, manifest, out, overrides or [], as_json, lmdb)


@app.command(
    epilog="Example: motionloom pairs quickstart distil.teacher=runs/mine --cache caches/small "
    "--out caches/pairs"
)
def pairs(
    recipe: Recipe,
    cache: Annotated[Path, typer.Option(help="The cache whose captions, shapes and frame rate are taken.")],
    out: Annotated[Path, typer.Option(help="A cache folder of its own; an interrupted one is continued.")],
    overrides: Overrides = None,
    clips: Annotated[
        int | None, typer.Option(min=1, help="How many; default: one for each row of the cache.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise.")] = 0,
    worker: Annotated[
        str, typer.Option(metavar="I/N", help="The share of the I-th of N that write one store at once.")
    ] = "1/1",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
    as_json: Json = False,
) -> None:
    """Let a student's teacher make clips, and keep where its walks stood at the student's noise levels."""
    from motionloom.cli import pairs as command

    command.run(recipe, cache, out, overrides or [], clips, seed, worker, device, as_json)


@app.command(
    epilog="Example: motionloom train quickstart --cache caches/small experiment_name=mine train.max_steps=99"
)
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    cache: Annotated[Path | None, typer.Option(help="The cache folder; else the run folder's.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint, to the bit.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a recipe on a cache, alone or under torchrun. The run folder is output_dir/experiment_name."""
    from motionloom.cli import train as command

    command.run(recipe, overrides or [], cache, resume, as_json)


Files = list[str] | None
"""Of an option that may be repeated."""
Aesthetic = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="vbench: LAION's linear head as safetensors, for clip:FOLDER."),
]


@app.command(
    epilog='Example: motionloom generate runs/quickstart --prompt "a small red star moves up" --out clips'
)
def generate(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="A run folder (its newest checkpoint), a step_... folder, or a recipe that names weights.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the clips, clips.json and a sheet.")],
    prompts: Annotated[Files, typer.Option("--prompt", help="What to show; repeat for more clips.")] = None,
    request: Annotated[Path | None, typer.Option(help="A YAML that says it all; options go before.")] = None,
    negative: Annotated[str | None, typer.Option(help="What guidance pushes away from.")] = None,
    scene: Annotated[Files, typer.Option(help="A scene's caption; repeat, in order.")] = None,
    scene_frames: Annotated[
        list[int] | None, typer.Option(help="A scene's length; once for all, or once each.")
    ] = None,
    scene_source: Annotated[
        Files, typer.Option(metavar="N=FILE", help="A scene that is given; the first is 0.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="POLICY[:K]",
            help="Scene after scene, each shown K of those before: last, first_last, similar or all.",
        ),
    ] = None,
    image: Annotated[Files, typer.Option(metavar="FILE", help="The first frame.")] = None,
    last_image: Annotated[Files, typer.Option(metavar="FILE", help="The last frame.")] = None,
    keyframe: Annotated[Files, typer.Option(metavar="SECONDS=FILE", help="A picture at a time.")] = None,
    prefix: Annotated[
        Files, typer.Option(metavar="FILE[:FRAMES]", help="A film (or sound) whose end comes first.")
    ] = None,
    suffix: Annotated[
        Files, typer.Option(metavar="FILE[:FRAMES]", help="One whose beginning comes last.")
    ] = None,
    mask: Annotated[
        Files, typer.Option(metavar="FILE|FROM-TO", help="White is given of --source; or seconds to make.")
    ] = None,
    crop: Annotated[
        Files, typer.Option(metavar="TOP,LEFT,BOTTOM,RIGHT", help="A rectangle is given of --source.")
    ] = None,
    source: Annotated[Files, typer.Option(metavar="FILE", help="The film of --mask or --crop.")] = None,
    reference: Annotated[Files, typer.Option(metavar="FILE", help="A clip to look at.")] = None,
    audio: Annotated[Files, typer.Option(metavar="FILE", help="The sound, to be filmed.")] = None,
    video: Annotated[Files, typer.Option(metavar="FILE", help="The film, to be heard.")] = None,
    strength: Annotated[
        float | None, typer.Option(help="Of what is given here; below 1 it is a hint, made anew.")
    ] = None,
    extend: Annotated[int | None, typer.Option(metavar="FRAMES", help="Go on for so many.")] = None,
    backwards: Annotated[bool, typer.Option("--backwards", help="... before the beginning.")] = False,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of a clip.")] = None,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH or one side, in pixels.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second, if not the model's.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Decides all that is random; 0.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Solver steps.")] = None,
    solver: Annotated[str | None, typer.Option(help="euler, heun, dpmpp_2m or ddim.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="On the text; 1 is none.")] = None,
    skip_guidance: Annotated[
        str | None, typer.Option(metavar="SCALE:BLOCKS", help="Away from attention left out; 1.0:3,4")
    ] = None,
    cross_guidance: Annotated[
        float | None, typer.Option(min=0, help="Sound and picture towards each other; 1 is none.")
    ] = None,
    condition_guidance: Annotated[
        Files, typer.Option(metavar="CONDITION=SCALE", help="On what is given; reference=2")
    ] = None,
    format: Annotated[str | None, typer.Option(help="mp4, webm, webp, gif, png or wav.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="The last weights instead of the averaged ones.")
    ] = False,
    lora: Annotated[
        Files, typer.Option(metavar="FILE[:STRENGTH]", help="A LoRA to add; repeat for several at once.")
    ] = None,
    decoder: Decoder = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
    as_json: Json = False,
) -> None:
    """Make clips from prompts, scenes and whatever is given: frames, films, sounds, masks, references."""
    said = dict(locals())
    from motionloom.cli import generate as command

    command.run(
        checkpoint, command.request_tree(said), request, out, raw, device, as_json, lora or [], decoder
    )


@app.command(
    epilog='Example: motionloom stream runs/stream --prompt "a blue ball" --out film.mp4 --seconds 4'
)
def stream(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run of a model that makes chunks (plan.type: chunks).")
    ],
    prompt: Annotated[str | None, typer.Option(help="What to show; on a page it may come later.")] = None,
    out: Annotated[
        str | None, typer.Option(metavar="FILE.mp4|-", help="A film that grows, or - for stdout.")
    ] = None,
    format: Annotated[
        str, typer.Option(help="Of stdout: mp4, in fragments, or rgb24, frame after frame.")
    ] = "mp4",
    seconds: Annotated[float | None, typer.Option(min=0.01, help="Its length; else until Ctrl-C.")] = None,
    serve: Annotated[bool, typer.Option("--serve", help="A page that plays it, to be steered.")] = False,
    host: Annotated[
        str | None, typer.Option(help="Of the page, else 127.0.0.1; beyond loopback with a token.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Of the page, else 7861; 0: any.")
    ] = None,
    token: Annotated[str | None, typer.Option(help="That viewers must bring; else made if needed.")] = None,
    origin: Annotated[
        Files, typer.Option(metavar="URL", help="A page from elsewhere that may connect; a proxy's address.")
    ] = None,
    lead: Annotated[
        float | None, typer.Option(min=0, help="Seconds made before they are seen on the page, else 1.5.")
    ] = None,
    negative: Annotated[str, typer.Option(help="What guidance pushes away from.")] = "",
    image: Annotated[Path | None, typer.Option(metavar="FILE", help="The first frame.")] = None,
    video: Annotated[Path | None, typer.Option(metavar="FILE", help="A film to redraw.")] = None,
    strength: Annotated[
        float | None,
        typer.Option(min=0.01, max=1, help="How much of --video is drawn anew, else 0.6; 1: all."),
    ] = None,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH or one side, in pixels.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second, if not the model's.")] = None,
    seed: Seed = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Solver steps a chunk.")] = None,
    solver: Annotated[str | None, typer.Option(help="euler, heun, dpmpp_2m or ddim.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="On the text; 1 is none.")] = None,
    window: Annotated[int | None, typer.Option(min=1, help="Chunks that a chunk sees, itself too.")] = None,
    sinks: Annotated[int | None, typer.Option(min=0, help="First chunks that it sees besides.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="The last weights instead of the averaged ones.")
    ] = False,
    lora: Annotated[
        Files, typer.Option(metavar="FILE[:STRENGTH]", help="A LoRA to add; repeat for several at once.")
    ] = None,
    decoder: Decoder = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
    as_json: Json = False,
) -> None:
    """A film without end, watched while it is made: on a page, in a file, through a pipe."""
    from motionloom.cli import stream as command

    wish = command.Wish(
        prompt=prompt,
        negative=negative,
        out=out,
        format=format,
        seconds=seconds,
        image=image,
        video=video,
        strength=strength,
        size=size,
        fps=fps,
        seed=seed,
        steps=steps,
        solver=solver,
        guidance=guidance,
        window=window,
        sinks=sinks,
        serve=serve,
        host=host,
        port=port,
        token=token,
        origins=tuple(origin or ()),
        lead=lead,
        raw=raw,
        loras=tuple(lora or ()),
        decoder=decoder,
        device=device,
    )
    command.run(checkpoint, wish, as_json)


@lora_app.command(epilog="Example: motionloom lora export runs/lora_wan lora/style.safetensors")
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or one of its checkpoints.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The .safetensors file to write.")],
    layout: Annotated[str, typer.Option(help="diffusers, or comfyui: the names of the model's authors.")] = (
        "diffusers"
    ),
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    raw: Annotated[
        bool, typer.Option("--raw", help="The last weights instead of the averaged ones.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write the adapters of a LoRA run as a file that diffusers or ComfyUI loads."""
    from motionloom.cli import lora as command

    command.export(run, out, layout, dtype, raw, as_json)


@lora_app.command(
    epilog="Example: motionloom lora merge models/wan/transformer models/mine --lora style.safetensors:0.8"
)
def merge(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="A folder or file of weights.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder, in diffusers' layout.")],
    lora: Annotated[
        list[str],
        typer.Option(metavar="FILE[:STRENGTH]", help="A LoRA to put in; repeat for several at once."),
    ],
    as_json: Json = False,
) -> None:
    """Put LoRA files into a model's weights for good."""
    from motionloom.cli import lora as command

    command.merge(base, out, lora, as_json)


@app.command(epilog="Example: motionloom inspect caches/small --sheet sheet.png")
def inspect(
    what: Annotated[str, typer.Argument(metavar="RECIPE|CACHE|CHECKPOINT", help="What to look at.")],
    overrides: Overrides = None,
    sheet: Annotated[
        Path | None, typer.Option(help="A cache's contact sheet (PNG); default: beside the cache.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Sizes, tokens, parameters, buckets, memory; a cache also as a contact sheet."""
    from motionloom.cli import inspect as command

    command.run(what, overrides or [], sheet, as_json)


@app.command(epilog="Example: motionloom doctor quickstart --cache caches/small")
def doctor(
    what: Annotated[str, typer.Argument(metavar="RECIPE|CHECKPOINT", help="What to examine.")],
    overrides: Overrides = None,
    cache: Annotated[Path | None, typer.Option(help="The cache it is to be trained on.")] = None,
    as_json: Json = False,
) -> None:
    """Is it alive? Does the output follow text, time and conditions; is the cache right. Exit 1 if not."""
    from motionloom.cli import doctor as command

    command.run(what, overrides or [], cache, as_json)


class _ClipsFirst(typer.core.TyperGroup):
    """``judge CLIPS`` is a command itself, beside which there is ``judge stream RUN``."""

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self._clips = self.commands.pop("clips")

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Of the group where ``args`` begin with a command of it, else of the command without a name."""
        if args and args[0] in self.commands:
            return super().make_context(info_name, args, parent, **extra)
        return self._clips.make_context(info_name, args, parent, **extra)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As :meth:`make_context`."""
        if args and args[0] in self.commands:
            return super().resolve_command(ctx, args)
        return self.name, self._clips, args


judge_app = typer.Typer(
    cls=_ClipsFirst, help="Do clips show what was asked; what becomes of a stream as it goes on."
)
app.add_typer(judge_app, name="judge")


@judge_app.command(
    "clips", epilog="Example: motionloom judge worlds/small/clips --manifest worlds/small/manifest.jsonl"
)
def judge(
    clips: Annotated[Path, typer.Argument(metavar="CLIPS", help="A folder of clips and their clips.json.")],
    manifest: Annotated[
        Path | None, typer.Option(help="What was asked, where no clips.json says it: entries by file name.")
    ] = None,
    request: Annotated[
        Path | None, typer.Option(help="... or a YAML of one request for all clips, or of one each.")
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            help="adherence, conditions, seam, masked, scenes, sound; default: all that fit. And vbench."
        ),
    ] = None,
    world: Annotated[
        str, typer.Option(help="What ShapeWorld's oracle expects: full, quickstart, modes or endless.")
    ] = "full",
    encoder: Annotated[
        str, typer.Option(help="What compares frames: color-histogram, efficientnet-lite0 or clip:FOLDER.")
    ] = "color-histogram",
    cuts: Annotated[
        str, typer.Option(help="What finds cuts: auto, shapeworld, pixels, transnetv2 or scenedetect.")
    ] = "auto",
    real: Annotated[
        Path | None, typer.Option(help="A manifest of real clips, to measure jumps and consistency by.")
    ] = None,
    aesthetic: Aesthetic = None,
    as_json: Json = False,
) -> None:
    """Do clips show what was asked: attributes, seams, scenes, cuts, sound. Writes judged.json and a page.

    What becomes of a run that streams: motionloom judge stream RUN.
    """
    from motionloom.cli import judge as command

    wish = command.Wish(manifest, request, tuple(kind or ()), world, encoder, cuts, real, aesthetic)
    command.run(clips, wish, as_json)


@judge_app.command(
    "stream", epilog='Example: motionloom judge stream runs/stream --prompt "a red star bounces" --out judged'
)
def judge_stream(
    target: Annotated[
        Path,
        typer.Argument(metavar="RUN|CLIPS", help="A run that streams, or a folder of clips and clips.json."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for figures, page, sheet and films.")],
    prompt: Annotated[Files, typer.Option(help="What to show; repeat for more roll-outs.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="... or a file with one prompt a line.")] = None,
    world: Annotated[
        str, typer.Option(help="Of ShapeWorld: ask its oracle, and without prompts show its held-out ones.")
    ] = "",
    clips: Annotated[int, typer.Option(min=1, help="How many of --world's prompts.")] = 8,
    seconds: Annotated[
        float | None, typer.Option(min=0.01, help="Length of a roll-out; else four trained clips.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Each prompt with each of them: 0,1,2.")] = "0",
    window: Annotated[
        int | None, typer.Option(min=4, help="Frames that are looked at at once; else a trained clip's.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH or one side, in pixels.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second, if not the model's.")] = None,
    negative: Annotated[str, typer.Option(help="What guidance pushes away from.")] = "",
    switch: Annotated[
        float | None, typer.Option(min=0, help="After so many seconds go over to the next prompt.")
    ] = None,
    recache: Annotated[
        bool, typer.Option("--recache", help="... and compute anew under it what is remembered.")
    ] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Solver steps, if not the recipe's.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="On the text; 1 is none.")] = None,
    teacher: Annotated[
        Path | None, typer.Option(help="A run to compare with, from the same noise under the same words.")
    ] = None,
    teacher_steps: Annotated[int | None, typer.Option(min=1, help="Its solver steps.")] = None,
    teacher_guidance: Annotated[float | None, typer.Option(min=0, help="Its guidance on the text.")] = None,
    encoder: Annotated[
        str, typer.Option(help="What compares frames: color-histogram, efficientnet-lite0 or clip:FOLDER.")
    ] = "color-histogram",
    vbench: Annotated[
        bool, typer.Option("--vbench", help="VBench's dimensions of every window, as far as they go here.")
    ] = False,
    aesthetic: Aesthetic = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="The last weights instead of the averaged ones.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
    as_json: Json = False,
) -> None:
    """Roll-outs of a run: do they drift, how long are the waits, is a student like its teacher."""
    from motionloom.cli import judge_stream as command

    wish = command.Wish(
        out,
        tuple(prompt or ()),
        prompts,
        world,
        clips,
        seconds,
        seeds,
        window,
        size,
        fps,
        negative,
        switch,
        recache,
        steps,
        guidance,
        teacher,
        teacher_steps,
        teacher_guidance,
        encoder,
        vbench,
        aesthetic,
        raw,
        device,
    )
    command.run(target, wish, as_json)


eval_app = typer.Typer(
    help="Tokenizers, and what generates with them, in numbers: reconstruction, probes, words, FID.",
    epilog="Example: motionloom eval reconstruction vtp_shapeworld --manifest worlds/small/manifest.jsonl "
    "--frames 13 --out evaluated/rebuilt",
    no_args_is_help=True,
)
app.add_typer(eval_app, name="eval")

TokenizerFolder = Annotated[
    Path,
    typer.Argument(
        metavar="TOKENIZER",
        help="A saved tokenizer: what `convert` wrote, the tokenizer folder of a cache, or one that comes "
        "along, by name.",
    ),
]
Clips = Annotated[Path, typer.Option("--manifest", help="The clips, their captions and labels.")]
Evaluated = Annotated[Path, typer.Option(help="A new folder for evaluated.json, a page and a sheet.")]
Most = Annotated[
    int | None, typer.Option("--clips", min=2, help="At most so many, evenly spread over the manifest.")
]
Frames = Annotated[int | None, typer.Option(min=1, help="Frames of each clip, from its first; else all.")]
Size = Annotated[
    str | None, typer.Option(help="HEIGHTxWIDTH or one side; clips are scaled and cropped. Else their own.")
]
Fps = Annotated[float | None, typer.Option(min=0.01, help="Frames per second; else the clips' own.")]
AtOnce = Annotated[int, typer.Option("--batch-size", min=1, help="Clips that are coded at once.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda ...")]
ExtractorName = Annotated[
    str,
    typer.Option(
        help="Whose features FID and KID compare: efficientnet-lite0, color-histogram, clip:FOLDER; auto is "
        "the first if it is installed; none."
    ),
]
OracleWorld = Annotated[
    str, typer.Option(help="Of ShapeWorld's clips: ask its oracle; full, quickstart, modes or endless.")
]
Label = Annotated[
    str,
    typer.Option(help="Which extra field of the manifest is to be told; dots lead into it: objects.0.color."),
]
Train = Annotated[Path, typer.Option("--train", help="Manifest of clips to learn from.")]
Test = Annotated[
    Path | None, typer.Option("--test", help="Manifest of clips to be told; else a share of --train.")
]
Share = Annotated[
    float | None,
    typer.Option(min=0.01, max=0.99, help="Without --test: that share of --train is set aside; else 0.25."),
]


@eval_app.command(
    epilog="Example: motionloom eval reconstruction caches/small/tokenizer --manifest "
    "worlds/small/manifest.jsonl --world quickstart --out evaluated/pixels"
)
def reconstruction(
    tokenizer: TokenizerFolder,
    manifest: Clips,
    out: Evaluated,
    clips: Most = None,
    frames: Frames = None,
    size: Size = None,
    fps: Fps = None,
    world: OracleWorld = "",
    extractor: ExtractorName = "auto",
    lpips: Annotated[str, typer.Option(help="vgg, alex, auto (vgg if installed) or none.")] = "auto",
    batch: AtOnce = 8,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """What clips lose on the way through latents: PSNR, SSIM, LPIPS, rFID, flicker, what an oracle reads."""
    from motionloom.cli import eval as command

    reading = command.Reading(clips, frames, size, fps, batch, device)
    command.reconstruction(tokenizer, manifest, out, reading, extractor, lpips, world, as_json)


@eval_app.command(
    "zero-shot",
    epilog="Example: motionloom eval zero-shot my_tokenizer --manifest worlds/small/manifest.jsonl "
    "--frames 13 --world quickstart --out evaluated/words",
)
def zero_shot(
    tokenizer: TokenizerFolder,
    manifest: Clips,
    out: Evaluated,
    world: Annotated[
        str, typer.Option(help="Classes: all shapes, colours and motions of full, quickstart, modes ...")
    ] = "",
    classes: Annotated[
        str, typer.Option(help="... or the values of this field of the manifest. Else every caption is one.")
    ] = "",
    template: Annotated[
        Files, typer.Option(metavar="TEXT", help="A wording, {} for the class; repeat, their mean counts.")
    ] = None,
    clips: Most = None,
    frames: Frames = None,
    size: Size = None,
    fps: Fps = None,
    batch: AtOnce = 8,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Is a clip nearer to the words of its class than to all others; of a VTP model that reads texts."""
    from motionloom.cli import eval as command

    reading = command.Reading(clips, frames, size, fps, batch, device)
    command.zero_shot(tokenizer, manifest, out, reading, world, classes, template or [], as_json)


@eval_app.command(
    "linear-probe",
    epilog="Example: motionloom eval linear-probe caches/small/tokenizer --train worlds/small/manifest.jsonl "
    "--label background --out evaluated/probe",
)
def linear_probe(
    tokenizer: TokenizerFolder,
    train: Train,
    label: Label,
    out: Evaluated,
    test: Test = None,
    share: Share = None,
    cells: Annotated[
        bool,
        typer.Option("--cells", help="Probe the whole latent too, cell by cell, and not its mean alone."),
    ] = False,
    clips: Most = None,
    frames: Frames = None,
    size: Size = None,
    fps: Fps = None,
    seed: Seed = 0,
    batch: AtOnce = 8,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """What a linear map reads from features and from latents, its settings chosen on training clips alone."""
    from motionloom.cli import eval as command

    reading = command.Reading(clips, frames, size, fps, batch, device)
    command.linear_probe(tokenizer, train, test, out, reading, label, share, cells, seed, as_json)


@eval_app.command(
    epilog="Example: motionloom eval knn caches/small/tokenizer --train worlds/small/manifest.jsonl --k 5 "
    "--label background --out evaluated/knn"
)
def knn(
    tokenizer: TokenizerFolder,
    train: Train,
    label: Label,
    out: Evaluated,
    test: Test = None,
    share: Share = None,
    k: Annotated[int, typer.Option(min=1, help="Neighbours that vote.")] = 20,
    clips: Most = None,
    frames: Frames = None,
    size: Size = None,
    fps: Fps = None,
    seed: Seed = 0,
    batch: AtOnce = 8,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """What the nearest clips by cosine say of a clip, view by view."""
    from motionloom.cli import eval as command

    reading = command.Reading(clips, frames, size, fps, batch, device)
    command.knn(tokenizer, train, test, out, reading, label, share, k, seed, as_json)


@eval_app.command(
    epilog="Example: motionloom eval retrieval my_tokenizer --manifest worlds/small/manifest.jsonl "
    "--frames 13 --out evaluated/retrieval"
)
def retrieval(
    tokenizer: TokenizerFolder,
    manifest: Clips,
    out: Evaluated,
    clips: Most = None,
    frames: Frames = None,
    size: Size = None,
    fps: Fps = None,
    batch: AtOnce = 8,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Captions found by clips and clips by captions, R@1, 5 and 10; of a VTP model that reads texts."""
    from motionloom.cli import eval as command

    reading = command.Reading(clips, frames, size, fps, batch, device)
    command.retrieval(tokenizer, manifest, out, reading, as_json)


@eval_app.command(
    epilog="Example: motionloom eval generation runs/mine --manifest worlds/small/manifest.jsonl --clips 8 "
    "--world quickstart --out evaluated/run"
)
def generation(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or one of its checkpoints.")],
    manifest: Clips,
    out: Evaluated,
    clips: Annotated[int, typer.Option(min=2, help="How many are made; the floor needs twice as many.")] = 64,
    world: OracleWorld = "",
    extractor: ExtractorName = "auto",
    steps: Annotated[int | None, typer.Option(min=1, help="Solver steps, if not the recipe's.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="On the text; 1 is none.")] = None,
    seed: Seed = 0,
    raw: Annotated[
        bool, typer.Option("--raw", help="The last weights instead of the averaged ones.")
    ] = False,
    decoder: Decoder = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Clips made for a manifest's captions against its real ones: FID, KID, their floor, the oracle."""
    from motionloom.cli import eval as command

    reading = command.Reading(clips=clips, device=device)
    how = command.Sampled(steps, guidance, seed, raw, decoder)
    command.generation(run, manifest, out, reading, how, extractor, world, as_json)


@app.command(epilog="Example: motionloom scale study.yaml --out studies/mine")
def scale(
    study: Annotated[
        str,
        typer.Argument(
            metavar="STUDY", help="A YAML file, or the name of one here: claim, claim_emoji, curve."
        ),
    ],
    out: Annotated[Path, typer.Option(help="A folder; a second call goes on where the first stopped.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the points and what they cost; train nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Tokenizers and models on them over variants, budgets and seeds: quality against pre-training."""
    from motionloom.cli import scale as command

    command.run(study, out, dry_run, as_json)


@app.command(
    epilog="Example: motionloom features my_tokenizer --manifest worlds/small/manifest.jsonl "
    "--frames 13 --out vectors.parquet"
)
def features(
    tokenizer: TokenizerFolder,
    manifest: Clips,
    out: Annotated[Path, typer.Option(help="A new table: .parquet, .lance or .jsonl.")],
    view: Annotated[
        str,
        typer.Option(
            help="clip (unit vectors that compare with texts), cls, patch, latent (its mean) or latent cells."
        ),
    ] = "clip",
    clips: Most = None,
    frames: Frames = None,
    size: Size = None,
    fps: Fps = None,
    batch: AtOnce = 8,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """A vector for every image or clip, in a table with its id: for search or clustering."""
    from motionloom.cli import eval as command

    reading = command.Reading(clips, frames, size, fps, batch, device)
    command.features(tokenizer, manifest, out, reading, view, as_json)


@app.command(
    epilog="Of a run that trained a tokenizer: motionloom convert runs/vtp_shapeworld my_tokenizer --cache "
    "caches/pixels. Example: motionloom convert Wan2.1-T2V-1.3B models/wan-1.3b --dtype bf16"
)
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC", help="A folder or file of weights in either layout, or a run folder or checkpoint."
        ),
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", help="A new folder, or a new .safetensors file.")],
    to: Annotated[str, typer.Option(help="diffusers, or original: as the authors name them.")] = "diffusers",
    dtype: Annotated[str, typer.Option(help="keep, fp32 or bf16.")] = "keep",
    family: Annotated[
        str, typer.Option(help="wan, cogvideox, ltx2 or lightning; else told by the names.")
    ] = "",
    preset: Annotated[str, typer.Option(help="Sizes by name, where no config.json says them.")] = "",
    shard_size: Annotated[str, typer.Option(help="Largest file of a folder.")] = "5GB",
    raw: Annotated[
        bool,
        typer.Option("--raw", help="Of a checkpoint or a student's .pt the last weights, not the averaged."),
    ] = False,
    cache: Annotated[
        Path | None,
        typer.Option(help="Of a run that trained a tokenizer: its cache, to measure latents on."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Weights of a published model into another layout, or out of a checkpoint. Nothing is overwritten."""
    from motionloom.cli import convert as command

    command.run(source, target, command.Wish(to, dtype, family, preset, shard_size, raw, cache), as_json)


def main() -> None:
    """Entry point: errors of the user in one line with exit code 2, defects with their traceback."""
    as_json = "--json" in sys.argv
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        die(str(error), as_json)
    except _UsageError as error:
        if as_json:
            die(error.format_message(), as_json)
        error.show()
        code = WRONG
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:
        command = " ".join(word for word in sys.argv[1:] if not word.startswith("-"))
        kept = "what was finished is kept, the same command goes on from there"
        die(f"interrupted; {kept if command.startswith(CONTINUED) else 'run it again'}", as_json, code)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
