"""Imports run one way, and what starts the command line is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("cluster", "models", "tuning", "pipeline")
FILES = [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]
HEAVY = ("torch", "torchvision", "ray", "pyarrow", "numpy", "pandas", "boto3", "plotly", "optuna", "sklearn")


def imported(source: str) -> set[str]:
    """The top-level names that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("relative" if node.level else str(node.module).partition(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found |= {str(a.value).partition(".")[0] for a in node.args if isinstance(a, ast.Constant)}
    return found


def upward(layer: str, source: str) -> set[str]:
    """The layers above `layer` that a file of it imports."""
    return imported(source) & {*LAYERS[LAYERS.index(layer) + 1 :], "relative", "tests", "benchmarks"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_import_goes_upward(path: Path) -> None:
    assert upward(path.relative_to(ROOT).parts[0], path.read_text()) == set()


@pytest.mark.parametrize(
    "source",
    [
        "import pipeline.store",
        "from pipeline import store",
        "def f():\n    from pipeline.store import RunStore",
        "from . import x",
        "import importlib\nimportlib.import_module('pipeline.store')",
    ],
)
def test_an_upward_import_is_found(source: str) -> None:
    assert upward("models", source) != set()
    assert upward("models", source.replace("pipeline", "cluster").replace("from . import x", "")) == set()


def test_the_layers_are_all_there() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(LAYERS)


def loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sorted(m for m in sys.modules if '.' not in m))"
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert process.returncode == 0, process.stderr
    return set(process.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "module", ["pipeline.recipe", "cluster.config", "models.config", "tuning.config", "cluster.errors", "pipeline.cli"]
)
def test_what_help_loads_is_light(module: str) -> None:
    if not (ROOT / f"{module.replace('.', '/')}.py").exists():
        pytest.skip("not written yet")
    assert loaded_by(f"import {module}") & set(HEAVY) == set()


def test_showing_help_is_light() -> None:
    if not (ROOT / "pipeline" / "cli.py").exists():
        pytest.skip("not written yet")
    show = "sys.argv = ['tophat', '--help']\nfrom pipeline.cli import main\ntry:\n    main()\nexcept SystemExit: pass"
    assert loaded_by(show) & set(HEAVY) == set()
