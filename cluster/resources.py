"""Demands against the cluster, checked before any work starts.

Ray queues what it cannot schedule and says nothing about it: a recipe that asks for more than the cluster can ever have would wait for good.
So each stage states what it needs *at once*, as bundles, and `check` refuses it in one line if the cluster, grown as far as its autoscaler
may grow it, has no room for them.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cluster.errors import ResourceError

AUTOSCALING_FILE: Final = "~/ray_bootstrap_config.yaml"
"""Where `ray up` leaves, on the head node, the cluster file that its autoscaler reads."""

RESOURCES: Final = ("CPU", "GPU", "memory")


@dataclass(frozen=True)
class Bundle:
    """Resources that must be free together on one node, `count` times: an actor, a training worker, a task.

    Args:
        count: how many such bundles are needed at the same time.
        cpus: CPU cores of each, as Ray counts them (fractions allowed).
        gpus: GPUs of each.
        memory: bytes of heap memory of each, 0 where Ray need not reserve any.
    """

    count: int
    cpus: float = 0.0
    gpus: float = 0.0
    memory: float = 0.0

    @property
    def resources(self) -> dict[str, float]:
        """What one bundle takes, by Ray's names, without zeros."""
        named = zip(RESOURCES, (self.cpus, self.gpus, self.memory), strict=True)
        return {name: amount for name, amount in named if amount > 0}


@dataclass(frozen=True)
class Demand:
    """What one stage needs at once.

    Args:
        field: the recipe field that sets it (`pretrain.workers`).
        value: the value of that field.
        bundles: all that must be scheduled at the same time.
    """

    field: str
    value: object
    bundles: tuple[Bundle, ...]


@dataclass(frozen=True)
class NodeShape:
    """Nodes that are alike.

    Args:
        resources: what one node has, by Ray's names (`CPU`, `GPU`, `memory` in bytes).
        count: how many nodes there are or, of a type that the autoscaler starts, can be.
    """

    resources: Mapping[str, float]
    count: int


@dataclass(frozen=True)
class ClusterShape:
    """What the cluster can have at most.

    Args:
        fixed: the nodes that are there to stay.
        launchable: the types of nodes that the autoscaler can start, those already started included.
        max_launched: how many nodes of all `launchable` types there can be together.
    """

    fixed: tuple[NodeShape, ...]
    launchable: tuple[NodeShape, ...] = ()
    max_launched: int = 0

    def total(self, resource: str) -> float:
        """The most of `resource` that the cluster can have."""
        room, amount = self.max_launched, sum(s.resources.get(resource, 0.0) * s.count for s in self.fixed)
        for shape in sorted(self.launchable, key=lambda s: -s.resources.get(resource, 0.0)):
            launched = min(room, shape.count)
            room, amount = room - launched, amount + shape.resources.get(resource, 0.0) * launched
        return amount

    @property
    def shapes(self) -> tuple[NodeShape, ...]:
        """Every kind of node that is there or can be."""
        return tuple(s for s in self.fixed if s.count) + tuple(
            s for s in self.launchable if min(s.count, self.max_launched)
        )


def check(demands: Iterable[Demand], cluster: ClusterShape) -> None:
    """Refuse the first of `demands` which the cluster can never hold; each is checked alone, as stages run in turn.

    A demand is refused when one of its bundles fits no node, when its bundles together ask for more than all nodes have,
    or when they cannot be placed on the nodes side by side (first fit, largest first).

    Raises:
        ResourceError: names the field, its value, what it needs, what the cluster has, and the fix.
    """
    for demand in demands:
        reason = _unmet(demand.bundles, cluster)
        if reason:
            fix = f"lower {demand.field}, or run where there is more (max_workers and node types in cluster.yaml)"
            raise ResourceError(demand.field, demand.value, reason, fix)


def _unmet(bundles: tuple[Bundle, ...], cluster: ClusterShape) -> str | None:
    for bundle in bundles:
        if bundle.count and not any(_times(bundle.resources, shape.resources) for shape in cluster.shapes):
            kinds = sorted({_amounts(shape.resources) for shape in cluster.shapes}) or ["nothing"]
            return f"needs {_amounts(bundle.resources)} on one node, and the cluster's nodes have {'; '.join(kinds)}"
    needed = {name: sum(b.resources.get(name, 0.0) * b.count for b in bundles) for name in RESOURCES}
    total = {name: cluster.total(name) for name in RESOURCES}
    if any(needed[name] > total[name] + 1e-6 for name in RESOURCES):
        return f"needs {_amounts(needed)} at once, and the cluster has at most {_amounts(total, needed)}"
    left = _unplaced(bundles, cluster)
    if left:
        return (
            f"needs {_amounts(needed)} at once, and though the cluster has at most {_amounts(total, needed)}, "
            f"{left.count} x {_amounts(left.resources)} finds no node with that much left"
        )
    return None


def _unplaced(bundles: tuple[Bundle, ...], cluster: ClusterShape) -> Bundle | None:
    """The first of `bundles` that finds no room, with the count left over; None when all are placed.

    Groups of equal nodes are kept together, so that the cost depends on the kinds of nodes and bundles and not on their counts.
    """
    groups = [NodeShape(dict(s.resources), s.count) for s in cluster.fixed]
    unlaunched, room = list(cluster.launchable), cluster.max_launched
    for bundle in sorted(bundles, key=lambda b: (b.gpus, b.cpus, b.memory), reverse=True):
        need, left = bundle.resources, bundle.count
        groups, left = _fill(groups, need, left)
        for i, shape in sorted(enumerate(unlaunched), key=lambda item: _waste(need, item[1].resources)):
            opened = NodeShape(shape.resources, min(shape.count, room))
            filled, left_after = _fill([opened], need, left)
            used = sum(g.count for g in filled if g.resources != shape.resources)
            unlaunched[i], room = NodeShape(shape.resources, shape.count - used), room - used
            groups += [g for g in filled if g.resources != shape.resources]
            left = left_after
        if left:
            return Bundle(left, bundle.cpus, bundle.gpus, bundle.memory)
    return None


def _fill(groups: list[NodeShape], need: Mapping[str, float], left: int) -> tuple[list[NodeShape], int]:
    """`groups` after taking up to `left` bundles of `need`, and the bundles that remain."""
    after: list[NodeShape] = []
    for group in groups:
        each = _times(need, group.resources)
        if not need or not each or not left:
            after.append(group)
            left = 0 if not need and group.count else left
            continue
        full = min(group.count, left // each)
        left -= full * each
        last = min(left, each) if full < group.count else 0
        left -= last
        parts = ((full, each), (int(last > 0), last), (group.count - full - int(last > 0), 0))
        after += [NodeShape(_less(group.resources, need, taken), nodes) for nodes, taken in parts if nodes]
    return after, left


def _times(need: Mapping[str, float], have: Mapping[str, float]) -> int:
    """How many bundles of `need` one node holds; 1 for a bundle that needs nothing."""
    return min((int((have.get(name, 0.0) + 1e-6) / amount) for name, amount in need.items()), default=1)


def _less(have: Mapping[str, float], need: Mapping[str, float], times: int) -> dict[str, float]:
    return {name: amount - need.get(name, 0.0) * times for name, amount in have.items()}


def _waste(need: Mapping[str, float], have: Mapping[str, float]) -> tuple[float, float]:
    """Sorts node types for a bundle: those without GPUs first where it needs none, then the smaller."""
    return (have.get("GPU", 0.0) if "GPU" not in need else 0.0, have.get("CPU", 0.0))


def _amounts(resources: Mapping[str, float], shown: Mapping[str, float] | None = None) -> str:
    """ "8 CPU + 1 GPU": CPUs always, the rest where there is some or `shown` asks for some."""
    parts = [f"{resources.get('CPU', 0.0):g} CPU"]
    if resources.get("GPU", 0.0) or (shown or {}).get("GPU", 0.0):
        parts.append(f"{resources.get('GPU', 0.0):g} GPU")
    if (shown if shown is not None else resources).get("memory", 0.0):
        parts.append(f"{resources.get('memory', 0.0) / 2**30:.1f} GiB")
    return " + ".join(parts)
