"""Whether `select.images_per_class: auto` finds a good K: its choice against a whole study over the same values, over several seeds.

    python -m benchmarks.choose_k demo --seeds 3 --data runs/choose-k

Every seed draws data, weights and order anew, as in `method`. Its runs share a directory, so that they differ in nothing but K: first K is left
open, then each value that was tried gets the whole run. All figures are the fine-tuned student's top-1 on the test images, in percent.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.method import DATA, ROOT
from pipeline.data import known as datasets


@dataclass(frozen=True)
class Study:
    """What one seed gave.

    Attributes:
        top1: of each K that was tried, in percent.
        chosen: the K that was taken.
        trainings: images that the trials saw, in whole pre-trainings.
        seconds: of the choice, and of a pre-training.
    """

    top1: Mapping[int, float]
    chosen: int
    trainings: float
    seconds: tuple[float, float]


def run(recipe: str, k: int | str, data: Path, place: Path, seed: int) -> None:
    """`tophat run` with that K."""
    sets = [f"select.images_per_class={k}", f"seed={seed}", f"unlabeled.uri={data / 'unlabeled'}"]
    sets += [f"labeled.{part}.uri={data / part}" for part in ("train", "validation", "test")]
    words = [argument for field in sets for argument in ("--set", field)]
    command = [sys.executable, "-m", "pipeline", "run", recipe, "--run-dir", str(place), *words]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def said(place: Path, stage: str) -> Any:
    """The record of a stage of the run's result."""
    return json.loads((place / stage / "_record.json").read_text())


def study(recipe: str, seed: int, folder: Path) -> Study:
    """Makes the data of a seed, leaves K open, and then gives each value the whole run."""
    data, place = folder / f"data-{seed}", folder / f"run-{seed}"
    datasets.make(DATA[recipe], str(data), seed=seed)
    run(recipe, "auto", data, place, seed)
    choice, training = said(place, "chosen-k"), said(place, "pretrained")
    values = [one["images_per_class"] for one in choice["outputs"]["rungs"][0]]
    top1 = {}
    for k in values:
        run(recipe, k, data, place, seed)
        top1[k] = 100 * said(place, "evaluation")["outputs"]["models"]["student"]["top1"]
    trainings = choice["outputs"]["images"] / training["outputs"]["images"]
    return Study(top1, choice["outputs"]["images_per_class"], trainings, (choice["seconds"], training["seconds"]))


def summary(found: Sequence[Study]) -> str:
    """The means over the seeds, and how far the choices are from the value that is best on average."""
    values = [k for k in found[0].top1 if all(k in one.top1 for one in found)]
    means = {k: mean(one.top1[k] for one in found) for k in values}
    best = max(values, key=lambda k: means[k])
    behind = [one.top1[one.chosen] - one.top1[best] for one in found]
    error = stdev(behind) / sqrt(len(behind))
    lines = [
        *(f"K = {k:>6,}: {means[k]:.1f}" for k in values),
        f"auto      : {mean(one.top1[one.chosen] for one in found):.1f}",
        f"auto against the best K of the study ({best:,}): {mean(behind):+.2f} ± {error:.2f} points",
        f"cost: {mean(one.trainings for one in found):.2f} pre-trainings in images, "
        f"{mean(one.seconds[0] for one in found):,.0f} s, of which a pre-training takes {mean(one.seconds[1] for one in found):,.0f}",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=sorted(DATA))
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0; at least 2")
    parser.add_argument("--data", type=Path, help="where data and runs are kept; by default a temporary folder")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error("--seeds: a standard error needs at least 2")
    kept = arguments.data and arguments.data.resolve()
    with nullcontext(kept) if kept else tempfile.TemporaryDirectory(prefix="tophat-choose-k-") as folder:
        found = []
        for seed in range(arguments.seeds):
            found.append(study(arguments.recipe, seed, Path(folder)))
            each = ", ".join(f"{k:,}: {top1:.1f}" for k, top1 in found[-1].top1.items())
            print(f"seed {seed}: {each}; took {found[-1].chosen:,}", flush=True)
        print(summary(found))


if __name__ == "__main__":
    main()
