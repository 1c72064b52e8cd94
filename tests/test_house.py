"""The house rules that no type checker knows: read from the source, each with the few exceptions named."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from motionloom.config import load_recipe, packaged_recipes

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "motionloom"
LONGEST_FUNCTION = 100

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package, by its path below ``src/motionloom``."""
    paths = sorted(SOURCE.rglob("*.py"))
    return {path.relative_to(SOURCE).as_posix(): ast.parse(path.read_text("utf-8")) for path in paths}


def nodes() -> Iterator[tuple[str, ast.AST]]:
    for name, tree in modules().items():
        for node in ast.walk(tree):
            yield name, node


def test_the_checks_below_have_something_to_look_at():
    assert {"cli/main.py", "plans/layout.py", "train/loop.py"} <= modules().keys()


def test_no_function_is_longer_than_a_hundred_lines():
    long = [
        f"{name}:{node.lineno} {node.name}"
        for name, node in nodes()
        if isinstance(node, FUNCTIONS) and (node.end_lineno or 0) - node.lineno + 1 > LONGEST_FUNCTION
    ]
    assert not long


def test_imports_point_one_way():
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "KEPT" in done.stdout


# Said once elsewhere: a network's forward by its class, the drawing of first weights by the backbone, a
# column of a progress bar by rich.
PRESCRIBED = {"forward", "init_weights", "render"}


def promised() -> set[str]:
    """Names of methods that a protocol or an abstract class of the house documents for all its members."""
    names = set()
    for _, node in nodes():
        if isinstance(node, ast.ClassDef):
            bases = {getattr(base, "id", getattr(base, "attr", "")) for base in node.bases}
            if bases & {"Protocol", "ABC"}:
                names |= {part.name for part in node.body if isinstance(part, FUNCTIONS) and said(part)}
    return names


def said(node: ast.AST) -> bool:
    return bool(ast.get_docstring(node))  # type: ignore[arg-type]


def silent(node: ast.Module | ast.ClassDef, where: str, excused: set[str]) -> Iterator[str]:
    """Public functions, classes and methods without a docstring, those of private classes left out."""
    for part in node.body:
        if not isinstance(part, (*FUNCTIONS, ast.ClassDef)) or part.name.startswith("_"):
            continue
        method = isinstance(node, ast.ClassDef)
        if not said(part) and not (method and part.name in excused):
            yield f"{where}:{part.lineno} {part.name}"
        if isinstance(part, ast.ClassDef):
            yield from silent(part, where, excused)


def test_every_module_says_what_it_is():
    assert not [name for name, tree in modules().items() if not said(tree)]


def test_everything_public_says_what_it_does():
    excused = promised() | PRESCRIBED
    assert {"layout", "stages", "encode", "losses"} <= excused
    assert not [line for name, tree in modules().items() for line in silent(tree, name, excused)]


def imported_by(statement: str) -> set[str]:
    """Top-level packages that are loaded after a statement, in a fresh interpreter."""
    script = f"{statement}\nimport json, sys\nprint(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in json.loads(done.stdout)}


HEAVY = {"torch", "numpy", "transformers", "pyarrow", "lance", "av", "PIL", "grain", "tensorboard", "jinja2"}


def test_the_package_itself_imports_nothing_heavy():
    assert not imported_by("import motionloom") & (HEAVY | {"pydantic", "yaml", "typer", "rich"})


def test_the_command_line_starts_without_the_heavy_ones():
    assert not imported_by("import motionloom.cli.main") & HEAVY


@pytest.mark.parametrize("name", sorted(packaged_recipes()))
def test_every_recipe_loads(name):
    assert load_recipe(name).experiment_name


UNPICKLING = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def calls() -> Iterator[tuple[str, ast.Call, str]]:
    """Every call in the house: its module, itself, and what is called, dotted (``torch.randn``)."""
    for name, node in nodes():
        if isinstance(node, ast.Call):
            yield name, node, ast.unparse(node.func)


# Module and call -> why it may.
MAY_UNPICKLE = {
    ("backbones/weights/pickles.py", "torch.load"): "published weights that exist in no other form: tensors "
    "alone, and only for `motionloom convert`",
}


def test_nothing_unpickles():
    found = []
    for name, node in nodes():
        if isinstance(node, ast.Import):
            found += [f"{name}: import {alias.name}" for alias in node.names if alias.name in UNPICKLING]
        elif isinstance(node, ast.ImportFrom) and node.module in UNPICKLING:
            found.append(f"{name}: from {node.module}")
    for name, call, called in calls():
        given = {word.arg: word.value for word in call.keywords}
        allowed = isinstance(given.get("allow_pickle"), ast.Constant) and given["allow_pickle"].value is True
        unsafe = "weights_only" in given and ast.unparse(given["weights_only"]) != "True"
        if (name, called) in MAY_UNPICKLE and "weights_only" in given and not unsafe:
            continue
        if called == "torch.load" or allowed or unsafe:
            found.append(f"{name}:{call.lineno} {called}")
    assert not found


# Draws of torch that take a generator; without one they take the global generator.
DRAWS = {
    *("torch.rand", "torch.randn", "torch.randint", "torch.randperm", "torch.normal", "torch.bernoulli"),
    *("torch.multinomial", "torch.poisson"),
}
IN_PLACE = {
    "normal_",
    "uniform_",
    "bernoulli_",
    "exponential_",
    "random_",
    "log_normal_",
    "cauchy_",
    "geometric_",
}
# These take no generator at all.
GLOBAL_ONLY = {
    *("torch.rand_like", "torch.randn_like", "torch.randint_like", "torch.manual_seed", "torch.seed"),
    *("torch.cuda.manual_seed", "torch.cuda.manual_seed_all", "torch.set_rng_state"),
    *("nn.Dropout", "F.dropout", "torch.dropout", "nn.functional.dropout"),
}
KEYED_NUMPY = {"np.random.Generator", "np.random.PCG64"}

# Module and call -> why it may.
MAY_TOUCH_THE_GLOBAL_GENERATOR: dict[tuple[str, str], str] = {
    ("train/stepper.py", "torch.manual_seed"): "pins the global generator to a key of the step, so that even "
    "a foreign layer that draws from it resumes to the bit",
}


def test_nothing_draws_from_a_global_generator():
    touched = set()
    for name, node in nodes():
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if "random" in names or (isinstance(node, ast.ImportFrom) and node.module == "random"):
            touched.add((name, "import random"))
    for name, call, called in calls():
        keyed = any(word.arg == "generator" for word in call.keywords)
        method = called.rpartition(".")[2]
        unkeyed = called in GLOBAL_ONLY or ((called in DRAWS or method in IN_PLACE) and not keyed)
        numpy_global = called.startswith(("np.random.", "numpy.random.")) and called not in KEYED_NUMPY
        if unkeyed or numpy_global or called.startswith(("nn.init.", "init.trunc_normal")):
            touched.add((name, called))
    assert touched == MAY_TOUCH_THE_GLOBAL_GENERATOR.keys()
