"""Whether the method works: fine-tuned students against supervised ones, over several seeds.

    python benchmarks/method.py demo --seeds 5 --data runs/method
    python benchmarks/method.py drawings --from DIR --init --teacher models.sources.efficientnet:lite0

Every seed draws D, the validation set, U, the initial weights and the order of the images anew (the test set stays), and runs the whole recipe
with `tophat run` in a process of its own: the shipped one, or with --init what `tophat init` writes for the images of that seed. The two
students of a seed share all but the method, so that their difference is a paired one.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pipeline.data import known as datasets  # noqa: E402 - found beside this folder

DATA = {"demo": "digits", "fashion-mnist": "fashion-mnist", "drawings": "drawings"}
"""The known data set of each recipe."""
COLUMNS = ("teacher", "pretrained", "student", "supervised", "gain", "purity", "seconds")
HEADS = ("teacher", "pre-trained", "fine-tuned", "supervised", "gain", "purity", "seconds")


@dataclass(frozen=True)
class Measured:
    """What one seed gave: top-1 on the test set and purity in percent, gain in points, wall time of the process in seconds."""

    teacher: float
    pretrained: float
    student: float
    supervised: float
    purity: float
    seconds: float

    @property
    def gain(self) -> float:
        """Fine-tuned minus supervised."""
        return self.student - self.supervised


def run_seed(
    recipe: str,
    seed: int,
    folder: Path,
    *,
    origin: str | None = None,
    labels: int | None = None,
    init: Sequence[str] | None = None,
) -> Measured:
    """Makes the data of a seed, and runs the recipe on it, in `folder`.

    Args:
        recipe: the shipped one.
        seed: of everything random.
        folder: where data and runs are kept.
        origin: where the data set's files are.
        labels: images of each class in D; None for the data set's own number.
        init: options of `tophat init`, which then writes the recipe, and knows nothing of the shipped one.
    """
    data, run = folder / f"data-{seed}", folder / f"run-{seed}"
    datasets.make(DATA[recipe], str(data), origin=origin, train_per_class=labels, seed=seed)
    sets = [f"seed={seed}"]
    start = time.monotonic()
    if init is None:
        sets += [f"unlabeled.uri={data / 'unlabeled'}"]
        sets += [f"labeled.{part}.uri={data / part}" for part in ("train", "validation", "test")]
    else:
        written = str(folder / f"init-{seed}.yaml")
        places = {"--labeled": "train", "--unlabeled": "unlabeled", "--test": "test"}
        given = [word for option, part in places.items() for word in (option, str(data / part))]
        _tophat("init", *given, *init, "--out", written, "--force")
        recipe = written
    _tophat("run", recipe, "--run-dir", str(run), *(argument for field in sets for argument in ("--set", field)))
    seconds = time.monotonic() - start
    models = json.loads((run / "evaluation" / "_record.json").read_text())["outputs"]["models"]
    top1 = {name: 100 * found["top1"] for name, found in models.items()}
    return Measured(**top1, purity=100 * purity(run / "dhat", data / datasets.TRUTH_FILE), seconds=seconds)


def _tophat(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pipeline", *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def purity(dhat: Path, truth_file: Path) -> float:
    """The share of D-hat's images, in [0, 1], that belong to the class they were selected for."""
    table = pq.read_table(truth_file)
    keys = zip(table["shard"].to_pylist(), table["index"].to_pylist(), strict=True)
    truth = dict(zip(keys, table["label"].to_pylist(), strict=True))
    hits: list[bool] = []
    for file in sorted(dhat.glob("*.parquet")):
        images = pq.read_table(file, columns=["shard", "index", "label"]).to_pylist()
        hits += [truth[image["shard"], image["index"]] == image["label"] for image in images]
    return mean(hits)


def summary(found: Sequence[Measured]) -> str:
    """The rows below the seeds: mean and standard error of every column, and the gain in standard errors."""
    values = {name: [getattr(one, name) for one in found] for name in COLUMNS}
    errors = {name: stdev(column) / sqrt(len(column)) for name, column in values.items()}
    gain = mean(values["gain"])
    return "\n".join(
        [
            row("mean", [mean(values[name]) for name in COLUMNS]),
            row("std. error", [errors[name] for name in COLUMNS]),
            "",
            f"paired gain {gain:+.2f} ± {errors['gain']:.2f} points: {gain / errors['gain']:.1f} standard errors",
        ]
    )


def row(name: str, numbers: Sequence[float]) -> str:
    """A row of a Markdown table."""
    return (
        f"| {name:<10} | "
        + " | ".join(f"{number:>{len(head)}.1f}" for number, head in zip(numbers, HEADS, strict=True))
        + " |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=sorted(DATA))
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0; at least 2")
    parser.add_argument("--data", type=Path, help="where data and runs are kept; by default a temporary folder")
    parser.add_argument(
        "--from", dest="origin", metavar="DIR", help="as of `tophat ingest`: where the data set's files are"
    )
    parser.add_argument("--labels", type=int, metavar="N", help="of each class in D; by default the data set's own")
    parser.add_argument("--init", action="store_true", help="with the recipe that `tophat init` writes")
    parser.add_argument("--teacher", metavar="SPEC", help="of --init")
    arguments = parser.parse_args()
    if arguments.teacher and not arguments.init:
        parser.error("--teacher: an option of --init")
    init = (["--teacher", arguments.teacher] if arguments.teacher else []) if arguments.init else None
    if arguments.seeds < 2:
        parser.error("--seeds: a standard error needs at least 2")

    kept = arguments.data and arguments.data.resolve()
    with nullcontext(kept) if kept else tempfile.TemporaryDirectory(prefix="tophat-method-") as folder:
        print(f"| seed       | {' | '.join(HEADS)} |\n|---|{'---:|' * len(HEADS)}", flush=True)
        found = []
        for seed in range(arguments.seeds):
            settings = {"origin": arguments.origin, "labels": arguments.labels, "init": init}
            found.append(run_seed(arguments.recipe, seed, Path(folder), **settings))
            print(row(str(seed), [getattr(found[-1], name) for name in COLUMNS]), flush=True)
        print(summary(found))


if __name__ == "__main__":
    main()
