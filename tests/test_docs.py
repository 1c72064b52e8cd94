"""The guides: their commands run, what they quote is what the code says, and their links lead somewhere.

A ```bash block is run here, as it stands, those of one guide after the other in one shell. A ```sh block
takes longer or needs a network: its make targets and the options of its commands are checked, nothing is run.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import typer
from PIL import Image

from motionloom.cli.main import app
from motionloom.config.keys import expected, flatten, keys
from motionloom.config.load import packaged_recipes
from motionloom.config.recipe import Recipe
from motionloom.config.yaml_text import read_yaml

ROOT = Path(__file__).resolve().parents[1]
GUIDES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
FIRST = "quickstart.md"  # makes the world and the cache that the other guides go on with
MEDIA = ROOT / "docs" / "media"
UsageError: Any = typer.BadParameter.__base__  # typer exports its children only

guides = pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)


def blocks(guide: Path, language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", guide.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def prose(guide: Path) -> str:
    """A guide without its fenced blocks."""
    return re.sub(r"^\s*```.*?^\s*```", "", guide.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def rows(guide: Path, *heads: str) -> list[list[str]]:
    """The rows of all tables with these heads, cell by cell."""
    found: list[list[str]] = []
    inside = False
    for line in guide.read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if not line.startswith("|"):
            inside = False
        elif cells == list(heads):
            inside = True
        elif inside and not set(line) <= set("|- "):
            found.append(cells)
    assert found, f"{guide.name} has no table {heads}"
    return found


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


# Commands


def run(script: str, folder: Path) -> None:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{script}\n\n{done.stdout}"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the commands of the first guide have been run."""
    folder = tmp_path_factory.mktemp("guides")
    run("\n".join(blocks(ROOT / "docs" / FIRST, "bash")), folder)
    return folder


@pytest.mark.parametrize(
    "guide",
    [guide for guide in GUIDES if guide.name != FIRST and blocks(guide, "bash")],
    ids=lambda path: path.name,
)
def test_commands_of_the_guides_run(workplace, guide):
    run("\n".join(blocks(guide, "bash")), workplace)


def test_the_first_guide_leaves_what_it_says(workplace):
    guide = (ROOT / "docs" / FIRST).read_text("utf-8")
    for name in ("report.json", "index.html", "sheet.png", "sheet.webp", "metrics.jsonl", "provenance.json"):
        assert (workplace / "runs" / "try" / name).is_file(), name
        assert name in guide
    assert (workplace / "runs" / "small" / "checkpoints" / "step_00000020" / "manifest.json").is_file()
    assert len(list((workplace / "clips").glob("*.webp"))) == 2


def test_every_key_of_the_report_is_explained(workplace):
    report = json.loads((workplace / "runs" / "try" / "report.json").read_text())
    explained = {key for row in rows(ROOT / "docs" / FIRST, "key", "meaning") for key in code(row[0])}
    assert report.keys() <= explained
    assert explained <= report.keys()


def test_every_check_of_the_doctor_is_explained(workplace):
    guide = ROOT / "docs" / "troubleshooting.md"
    if not (workplace / "doctor.json").exists():
        run("\n".join(blocks(guide, "bash")), workplace)
    findings = json.loads((workplace / "doctor.json").read_text())["findings"]
    told = rows(guide, "check", "what must hold", "if it is wrong")
    assert [finding["check"] for finding in findings] == [code(row[0])[0] for row in told]


def lines_of(block: str) -> Iterator[list[str]]:
    """The commands of a shell block, each as its words."""
    for line in block.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


@guides
def test_make_targets_exist(guide):
    for block in blocks(guide, "sh"):
        for words in lines_of(block):
            if words[0] == "make":
                done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, check=False)
                assert done.returncode == 0, (words, done.stderr)


def parses(words: list[str]) -> None:
    """Raises an error of usage if the command line does not know this command, option or kind of value."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("motionloom", list(words))
    while isinstance(command, typer.core.TyperGroup):
        name, command, words = command.resolve_command(context, list(words))
        context = command.make_context(name, list(words))
    command.make_context("motionloom", list(words))


@guides
def test_commands_that_are_not_run_are_understood(guide):
    for block in blocks(guide, "sh") + blocks(guide, "bash"):
        for words in lines_of(block):
            if "motionloom" in (Path(word).name for word in words[:5]):
                at = next(i for i, word in enumerate(words) if Path(word).name == "motionloom")
                end = words.index("|") if "|" in words else len(words)
                parses(words[at + 1 : end])


@pytest.mark.parametrize(
    "wrong",
    [
        "trian quickstart",
        "data shapewold",
        "train quickstart --cash x",
        "inspect",
        "quickstart --minutes ten",
    ],
)
def test_a_command_that_does_not_exist_is_not_understood(wrong):
    with pytest.raises(UsageError):
        parses(wrong.split())


@guides
def test_snippets_run(guide):
    for block in blocks(guide, "python"):
        exec(compile(block, guide.name, "exec"), {})


# What the guides quote


def test_every_key_of_a_recipe_is_explained_as_it_is():
    told = {
        code(key)[0]: (read_yaml(code(default)[0], key), takes)
        for key, default, takes, _ in rows(ROOT / "docs" / "recipes.md", "key", "default", "takes", "meaning")
    }
    defaults = flatten(Recipe().model_dump(mode="json"))
    assert told.keys() == set(keys())
    assert told == {key: (defaults[key], expected(key)) for key in keys()}


def test_every_recipe_that_comes_along_is_named():
    told = rows(ROOT / "docs" / "recipes.md", "name", "what it is for")
    assert {code(row[0])[0] for row in told} == packaged_recipes().keys()


@cache
def literals() -> str:
    """All texts in the source, a placeholder of an f-string as a line break."""
    texts = []
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (str(p.value) if isinstance(p, ast.Constant) else "\n" for p in node.values)
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\0".join([*texts, (ROOT / "Makefile").read_text("utf-8")])


def test_messages_are_quoted_as_the_code_says_them():
    told = rows(ROOT / "docs" / "troubleshooting.md", "it says", "why", "what mends it")
    for row in told:
        for piece in code(row[0])[0].split("…"):
            # Of a piece, what stands before or after a name or number; a lone mark says nothing.
            words = piece.strip(" :;,?()")
            assert not re.search(r"[a-z]", words) or words in literals(), f"nothing says {words!r}"


@guides
def test_tests_that_are_named_exist(guide):
    for file, name in re.findall(r"(tests/test_\w+\.py)::(\w+)", guide.read_text("utf-8")):
        assert f"def {name}(" in (ROOT / file).read_text("utf-8"), f"{file} has no {name}"


# Links and pictures


def anchors(guide: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", prose(guide), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@guides
def test_links_lead_somewhere(guide):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(guide)):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = (guide.parent / name).resolve() if name else guide
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def test_the_picture_of_the_readme_moves_and_is_light():
    with Image.open(MEDIA / "shapeworld.webp") as picture:
        assert picture.n_frames >= 16
    assert (MEDIA / "shapeworld.webp").stat().st_size <= 1_500_000


def test_pictures_can_be_drawn_anew(tmp_path):
    subprocess.run([sys.executable, MEDIA / "make.py", tmp_path], check=True, capture_output=True)
    for name in ("shapeworld.webp", "stories.png"):
        with Image.open(tmp_path / name) as fresh, Image.open(MEDIA / name) as kept:
            assert fresh.size == kept.size


def test_the_drawing_is_whole_and_says_what_it_shows():
    drawing = ElementTree.parse(MEDIA / "one_clip.svg").getroot()
    names = {element.tag.rpartition("}")[2] for element in drawing}
    assert {"title", "desc", "style"} <= names
