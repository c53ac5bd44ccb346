"""What scoring U will take: a sample of it is scored, as all of it would be, and what that took is scaled to kinds of nodes.

A node's rate follows from what one image takes of it: CPU seconds of reading and of the model or, where a GPU holds the model, seconds
of the GPU. Whichever runs out first is the limit.
"""

import math
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster import storage
from cluster.errors import InputError
from cluster.progress import Display
from cluster.resources import ClusterShape, NodeShape, cluster_shape
from cluster.session import Session
from cluster.tasks import run_task
from pipeline.data.sources import ImageSource
from pipeline.recipe.sections import Recipe, Score
from pipeline.scoring.sampling import Cost, Sample, actors_on, count_images, score_sample
from pipeline.scoring.score import check_cluster

HERE = "here"
"""Name, for prices, of the nodes that Ray runs on now."""


@dataclass(frozen=True)
class NodeType:
    """Nodes that are alike.

    Attributes:
        name: in the cluster file, or `here`.
        instance: what the cloud calls it; empty where nothing says so.
        shape: what one has, and how many there are or can be.
    """

    name: str
    instance: str
    shape: NodeShape


@dataclass(frozen=True)
class Plan:
    """Scoring on some nodes of one type.

    Attributes:
        actors: on all nodes.
        rate: images/s, all nodes together.
        limit: what of the nodes runs out first: `model`, `readers` or `CPU`.
        seconds: for all images, start-up included.
        cost: in the currency of the price; None without one.
        possible: whether there can be so many nodes, and with the recipe's `actors` and `readers` they are in time.
    """

    node: NodeType
    nodes: int
    actors: int
    rate: float
    limit: str
    seconds: float
    cost: float | None
    possible: bool


def nodes_rate(
    resources: Mapping[str, float], settings: Score, cost: Cost, nodes: int = 1, actors: int | None = None
) -> tuple[float, str]:
    """Images/s of some nodes, as long as nothing outside them is slower, and what of them runs out first.

    Args:
        resources: of one node, by Ray's names.
        settings: of the scoring.
        cost: of an image, on hardware like the node's.
        nodes: how many.
        actors: on all of them, at most.
    """
    most, cpus = nodes * actors_on(resources, settings), nodes * resources.get("CPU", 0.0)
    actors = min(most, actors or most, settings.actors or most)
    if not actors:
        return 0.0, "model"
    rates = {
        "CPU": cpus / max(cost.read_cpu_seconds + cost.model_cpu_seconds, 1e-9),
        "model": actors / max(cost.model_cpu_seconds, 1e-9),
    }
    readers = int((cpus - actors * settings.cpus_per_actor) / settings.reader_cpus)
    if settings.gpus_per_actor > 0:
        rates["model"] = actors / max(cost.model_seconds, 1e-9)
    if settings.gpus_per_actor > 0 or settings.readers:
        rates["readers"] = max(1, min(readers, settings.readers or readers)) / max(cost.read_seconds, 1e-9)
    limit = min(rates, key=rates.__getitem__)
    return rates[limit], limit


@dataclass(frozen=True)
class Forecast:
    """What scoring all of U takes.

    Attributes:
        images: of U, about.
        images_error: standard error of that, as a share.
        shards: of U.
        source_bytes: of U.
        teacher: what was scored with, in words.
        settings: of the scoring.
        sample: what was measured.
        measured_on: the resources of the node that it was measured on.
        types: of nodes.
        deadline: seconds that there are; None where any time will do.
        prices: of an hour of a node, by the name of its type or instance.
    """

    images: int
    images_error: float
    shards: int
    source_bytes: int
    teacher: str
    settings: Score
    sample: Sample
    measured_on: Mapping[str, float]
    types: Sequence[NodeType]
    deadline: float | None = None
    prices: Mapping[str, float] = field(default_factory=dict)

    @property
    def efficiency(self) -> float:
        """The measured rate as a share of what the cost of an image would allow; what else runs on a node takes the rest."""
        ideal, _ = nodes_rate(self.measured_on, self.settings, self.sample.cost, actors=self.sample.actors)
        if self.sample.rate is None or not ideal:
            return 1.0
        return min(1.0, self.sample.rate / ideal)

    def plans(self) -> list[Plan]:
        """On one node of each type and on as many as there are; with a deadline, on as many as it takes."""
        return [plan for node in self.types for plan in self._plans(node)]

    def _plans(self, node: NodeType) -> list[Plan]:
        one, _ = nodes_rate(node.shape.resources, self.settings, self.sample.cost)
        if not one:
            return []
        if self.deadline is None:
            return [self._plan(node, count) for count in sorted({1, max(1, node.shape.count)})]
        count = math.ceil(self.images / (one * self.efficiency) / (self.deadline - self.sample.start_seconds))
        return [self._plan(node, count)]

    def _plan(self, node: NodeType, nodes: int) -> Plan:
        rate, limit = nodes_rate(node.shape.resources, self.settings, self.sample.cost, nodes)
        rate *= self.efficiency
        seconds = self.sample.start_seconds + self.images / rate
        price = self.prices.get(node.name, self.prices.get(node.instance))
        cost = None if price is None else price * nodes * seconds / 3600
        actors = nodes * actors_on(node.shape.resources, self.settings)
        in_time = self.deadline is None or seconds <= 1.001 * self.deadline
        possible = nodes <= node.shape.count and in_time
        return Plan(node, nodes, min(actors, self.settings.actors or actors), rate, limit, seconds, cost, possible)


def forecast(
    recipe: Recipe,
    source: ImageSource,
    run_dir: str,
    display: Display,
    *,
    images: int,
    seconds: float,
    deadline: float | None,
    prices: Sequence[str],
    cluster_file: str | None,
    teacher: tuple[str, str] | None = None,
    verbose: bool = False,
) -> Forecast:
    """Scores a sample of a recipe's U with its teacher; with a network of random weights where that is not trained, which is as fast.

    Args:
        recipe: whose `score`, `cluster` and `teacher` count.
        source: U.
        run_dir: beside it, a folder is made and removed.
        display: shows how the sample goes.
        images: in the sample, about.
        seconds: when it ends at the latest.
        deadline: hours.
        prices: `TYPE=PRICE`, of a node for an hour.
        cluster_file: a file for `ray up`.
        teacher: its model directory, and what it is, in words; None where there is none yet.
        verbose: shows Ray's messages.

    Raises:
        InputError: something given is wrong.
        StageError: no image could be scored.
    """
    if deadline is not None and not math.isfinite(deadline):
        raise InputError("--deadline", deadline, "must be a finite number of hours", "leave it out for no deadline")
    if recipe.labeled.classes:
        recipe.check_class_count(len(recipe.labeled.classes))
    given = [*node_types(ClusterShape(()), cluster_file), NodeType(HERE, "", NodeShape({}, 0))]
    costs = read_prices(prices, given)
    place = f"{storage.absolute(run_dir)}-estimate-{secrets.token_hex(4)}"
    storage.check_writable("--run-dir", place)
    try:
        with Session(recipe.cluster, on_start=lambda: check_cluster(recipe.score), verbose=verbose) as session:
            count, error = count_images(source)
            began = time.monotonic()
            session.start()
            starting = time.monotonic() - began
            shape = cluster_shape()
            types = node_types(shape, cluster_file)
            if not any(actors_on(node.shape.resources, recipe.score) for node in types):
                rule = "describes no node that can score as the recipe says, nor is such a node here for good"
                raise InputError("--cluster-file", cluster_file, rule, "give the file that the cluster was made with")
            if teacher is None:
                teacher = run_task(_untrained, recipe, storage.join(place, "teacher"))
            model_uri, words = teacher
            with display.task("sample", min(images, count)) as progress:
                sample = score_sample(
                    source,
                    model_uri,
                    place,
                    recipe.score,
                    images=images,
                    image_bytes=max(1.0, source.bytes / count),
                    seconds=seconds,
                    shape=shape,
                    progress=progress,
                    began=time.monotonic() - starting,
                )
    finally:
        storage.delete_tree(place)  # after the session, whose actors may publish until it ends
    if deadline is not None and 3600 * deadline <= sample.start_seconds:
        rule = f"is less than the {sample.start_seconds:.0f} s that scoring takes to start"
        raise InputError("--deadline", deadline, rule, "give more hours")
    measured = max(shape.shapes, key=lambda node: actors_on(node.resources, recipe.score)).resources
    return Forecast(
        images=count,
        images_error=error,
        shards=len(source.listing),
        source_bytes=source.bytes,
        teacher=words,
        settings=recipe.score,
        sample=sample,
        measured_on=measured,
        types=types,
        deadline=None if deadline is None else 3600 * deadline,
        prices=costs,
    )


def _untrained(recipe: Recipe, uri: str) -> tuple[str, str]:
    """Makes a teacher of random weights at `uri`; returns that, and what it is, in words."""
    from models.architectures import build
    from models.directory import save

    assert recipe.taught is not None
    assert not isinstance(recipe.taught.model, str)
    classes = len(recipe.labeled.classes or ()) or 1000
    config, names = recipe.taught.model, [str(number) for number in range(classes)]
    save(uri, build(config, classes), config=config, class_names=names, metrics={}, provenance={})
    return uri, f"a {config.architecture} of random weights, as the run has trained none yet"


def node_types(shape: ClusterShape, cluster_file: str | None) -> list[NodeType]:
    """The nodes that run now, and the worker types of a cluster file.

    Raises:
        InputError: the file is none.
    """
    alike: dict[tuple[float, float], int] = {}
    for node in shape.fixed:
        key = (node.resources.get("CPU", 0.0), node.resources.get("GPU", 0.0))
        alike[key] = alike.get(key, 0) + node.count
    found = [NodeType(HERE, "", NodeShape({"CPU": cpus, "GPU": gpus}, n)) for (cpus, gpus), n in alike.items()]
    return found + ([] if cluster_file is None else _from_file(cluster_file))


def _from_file(path: str) -> list[NodeType]:
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        types, most = content["available_node_types"], content["max_workers"]
        return [
            NodeType(
                str(name),
                str(spec.get("node_config", {}).get("InstanceType", "")),
                NodeShape(
                    {key: float(value) for key, value in spec["resources"].items()},
                    min(int(most), int(spec.get("max_workers", most))),
                ),
            )
            for name, spec in types.items()
            if name != content.get("head_node_type")
        ]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError("--cluster-file", path, f"cannot be read ({error})", "give a file for `ray up`") from None
    except (KeyError, TypeError, ValueError, AttributeError):
        rule = "has no max_workers and available_node_types with the resources of each"
        raise InputError("--cluster-file", path, rule, "give a file for `ray up`, such as cluster.yaml") from None


def read_prices(given: Sequence[str], types: Sequence[NodeType]) -> dict[str, float]:
    """Prices by type, from `TYPE=PRICE`.

    Raises:
        InputError: one that is no number, or of no type.
    """
    known = list(dict.fromkeys(name for node in types for name in (node.name, node.instance) if name))
    prices = {}
    for item in given:
        name, _, text = item.rpartition("=")
        try:
            price = float(text)
        except ValueError:
            price = math.nan
        if not name or not (math.isfinite(price) and price >= 0):
            raise InputError(
                "--price", item, "must have the form TYPE=PRICE", "write e.g. gpu=4.60, for an hour of a node"
            )
        if name not in known:
            raise InputError("--price", item, "names no type of node", f"use one of {', '.join(known)}")
        prices[name] = price
    return prices
