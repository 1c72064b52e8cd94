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


CONTINUED = ("quickstart", "cache", "data shapeworld")
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


Json = Annotated[bool, typer.Option("--json", help="Print the answer as one JSON object on stdout.")]
Recipe = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A YAML file, or the name of one that comes along: quickstart, clips, shapeworld, causal, "
        "factorized_256; first_frame, keyframes, extend, extend_back, inpaint, outpaint, conditions, "
        "ic_lora; scenes, scenes_pretrain, scenes_sft, scenes_lora; sound, t2av, v2a, a2v, t2a, "
        "audio_extend, audio_inpaint, a2a, av2av; lora_shape, lora_wan, "
        "lora_cogvideox, lora_ltx2",
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
        Path, typer.Option(help="The run folder; a second call goes on where the first stopped.")
    ] = Path("runs/quickstart"),
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
        str, typer.Option(help="full, or a part that trains in minutes: quickstart; modes, which sounds.")
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
    manifest: Annotated[Path, typer.Option(help="Which clips.")],
    out: Annotated[Path, typer.Option(help="The cache folder; an interrupted one is continued.")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Turn pixels into latents and captions into embeddings, once."""
    from motionloom.cli import cache as command

    command.run(recipe, manifest, out, overrides or [], as_json)


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
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
    as_json: Json = False,
) -> None:
    """Make clips from prompts, scenes and whatever is given: frames, films, sounds, masks, references."""
    said = dict(locals())
    from motionloom.cli import generate as command

    command.run(checkpoint, command.request_tree(said), request, out, raw, device, as_json, lora or [])


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


@app.command(epilog="Example: motionloom judge worlds/small/clips --manifest worlds/small/manifest.jsonl")
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
        typer.Option(help="adherence, conditions, seam, masked, scenes, sound; default: all that fit."),
    ] = None,
    world: Annotated[
        str, typer.Option(help="What ShapeWorld's oracle expects: full, quickstart or modes.")
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
    as_json: Json = False,
) -> None:
    """Do clips show what was asked: attributes, seams, scenes, cuts, sound. Writes judged.json and a page."""
    from motionloom.cli import judge as command

    wish = command.Wish(manifest, request, tuple(kind or ()), world, encoder, cuts, real)
    command.run(clips, wish, as_json)


@app.command(epilog="Example: motionloom convert Wan2.1-T2V-1.3B models/wan-1.3b --dtype bf16")
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
    family: Annotated[str, typer.Option(help="wan, cogvideox or ltx2; else told by the names.")] = "",
    preset: Annotated[str, typer.Option(help="Sizes by name, where no config.json says them.")] = "",
    shard_size: Annotated[str, typer.Option(help="Largest file of a folder.")] = "5GB",
    raw: Annotated[
        bool, typer.Option("--raw", help="Of a checkpoint the last weights, not the averaged ones.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Weights of a published model into another layout, or out of a checkpoint. Nothing is overwritten."""
    from motionloom.cli import convert as command

    command.run(source, target, command.Wish(to, dtype, family, preset, shard_size, raw), as_json)


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
