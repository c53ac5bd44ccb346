"""Runs of recipes in this process, on the Ray of the tests."""

import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.progress import Display
from cluster.session import Session
from cluster.store import Made, RunStore
from pipeline.content import write_run_report
from pipeline.context import Reached, Run
from pipeline.plan import plan, sources_of
from pipeline.recipe.sections import Recipe
from pipeline.run import run


def execute(recipe: Recipe, uri: str, until: str | None = None) -> dict[str, Made[Any]]:
    """The stages of a run, by name; its result is named, and its report written."""
    store = RunStore(uri)
    store.claim(recipe.name, recipe.to_yaml())
    quiet = Display(Console(quiet=True), enabled=False)
    with Session(recipe.cluster) as session:
        this = Run(recipe.name, recipe.to_yaml(), store, sources_of(recipe), session, quiet, until)
        this.after(plan(recipe, store))
        with suppress(Reached):
            run(this, recipe)
        stages = dict(this.made)
        write_run_report(this)
        this.name_result()
    return stages


@dataclass(frozen=True)
class Finished:
    """A finished run in a local directory: where, and its stages."""

    uri: str
    stages: dict[str, Made[Any]]

    def copy(self, place: Path) -> str:
        """The same run in a directory of its own, to go on with."""
        shutil.copytree(self.uri, place, symlinks=True)
        return str(place)


def fresh(stages: dict[str, Made[Any]]) -> list[str]:
    """Names of the stages that were not found finished."""
    return [name for name, made in stages.items() if made.fresh]
