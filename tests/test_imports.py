"""Each file is in a room, imports run one way between rooms, no files go round in a circle, and what starts the command line is light."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = (
    ("cluster",),
    ("models", "models.inputs"),
    ("models.training", "models.sources"),
    ("tuning",),
    ("pipeline.recipe",),
    ("pipeline.data",),
    ("pipeline.context", "pipeline.evaluation"),
    ("pipeline.scoring",),
    ("pipeline.selection",),
    ("pipeline.report", "pipeline.duplicates"),
    ("pipeline.guide",),
    ("pipeline.stages",),
    ("pipeline.ready",),
    ("pipeline.exclusion", "pipeline.given", "pipeline.measuring", "pipeline.teaching"),
    ("pipeline.choosing",),
    ("pipeline.run",),
    ("pipeline.plan",),
    ("pipeline.advice",),
    ("pipeline.content",),
    ("pipeline.cli", "pipeline.__main__"),
)
"""Folders, and the files that stand in none of `pipeline`'s, from the ground up: a file imports from its own floor and those below."""
FLOOR = {room: number for number, rooms in enumerate(ROOMS) for room in rooms}
FILES = sorted(path for top in ("cluster", "models", "tuning", "pipeline") for path in (ROOT / top).rglob("*.py"))
HEAVY = ("torch", "torchvision", "ray", "pyarrow", "numpy", "pandas", "boto3", "plotly", "optuna", "sklearn")


def module(path: Path) -> str:
    """The name by which a file is imported."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path): path for path in FILES}


def room(name: str) -> str | None:
    """The room of a module: itself, or the folder that it is directly in; None where it is in none."""
    if name in FLOOR:
        return name
    folder = name.rpartition(".")[0]
    return folder if folder in FLOOR else None


def imported(source: str) -> set[str]:
    """The modules of ours that a file imports, anywhere in it; `relative`, where it does so by dots."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = inside & MODULES.keys()
            found |= {"relative"} if node.level else modules or {str(node.module)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found |= {str(a.value) for a in node.args if isinstance(a, ast.Constant)}
    ours = {name for name in found if name.partition(".")[0] in ("cluster", "models", "tuning", "pipeline")}
    return ours | (found & {"relative", "tests", "benchmarks"})


def upward(name: str, source: str) -> set[str]:
    """What a module imports from floors above its own, or from no room."""
    own = room(name)
    assert own is not None
    places = {other: room(other) for other in imported(source)}
    return {other for other, place in places.items() if place is None or FLOOR[place] > FLOOR[own]}


@pytest.mark.parametrize("name", [n for n, path in MODULES.items() if path.name != "__init__.py"])
def test_every_file_is_in_a_room_and_imports_nothing_from_above(name: str) -> None:
    assert room(name) is not None, "which room is it in?"
    assert upward(name, MODULES[name].read_text()) == set()


def test_every_room_is_there() -> None:
    assert {room(name) for name, path in MODULES.items() if path.name != "__init__.py"} == set(FLOOR)


def test_no_files_go_round_in_a_circle() -> None:
    graph = {name: imported(path.read_text()) & MODULES.keys() for name, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize(
    "source",
    [
        "import pipeline.run",
        "from pipeline import run",
        "def f():\n    from pipeline.run import run",
        "from . import x",
        "from pipeline.nowhere import x",
        "import importlib\nimportlib.import_module('pipeline.cli.app')",
    ],
)
def test_an_upward_import_is_found(source: str) -> None:
    assert upward("pipeline.scoring.score", source) != set()


def test_a_downward_import_is_none() -> None:
    source = "import models.config\nfrom cluster import storage\nfrom pipeline.data.shards import Row\nimport torch"
    assert imported(source) == {"models.config", "cluster.storage", "pipeline.data.shards"}
    assert upward("pipeline.scoring.score", source) == set()


def test_a_file_outside_the_rooms_is_found() -> None:
    assert room("pipeline.helpers") is None
    assert room("pipeline.data.deeper.file") is None


def loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sorted(m for m in sys.modules if '.' not in m))"
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert process.returncode == 0, process.stderr
    return set(process.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "name",
    [
        "pipeline.recipe.sections",
        "pipeline.recipe.reading",
        "cluster.config",
        "models.config",
        "models.sources",
        "tuning.config",
        "cluster.errors",
        "pipeline.cli",
    ],
)
def test_what_help_loads_is_light(name: str) -> None:
    assert loaded_by(f"import {name}") & set(HEAVY) == set()


def test_showing_help_is_light() -> None:
    show = "sys.argv = ['tophat', '--help']\nfrom pipeline.cli import main\ntry:\n    main()\nexcept SystemExit: pass"
    assert loaded_by(show) & set(HEAVY) == set()
