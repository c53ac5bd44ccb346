"""Demands against the cluster, checked before any work starts.

Ray queues what it cannot schedule and says nothing: a recipe that asks for more than the cluster can ever have would
wait for good. So each stage states what it needs *at once*, as bundles, and `check` refuses it in one line if the
cluster, grown as far as its autoscaler may grow it, has no room for them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cluster.errors import ResourceError

AUTOSCALING_FILE: Final = "~/ray_bootstrap_config.yaml"
"""Where `ray up` leaves, on the head node, the cluster file that its autoscaler reads."""

NODE_TYPE: Final = "ray.io/node-group"
HEAD: Final = "node:__internal_head__"
RESOURCES: Final = ("CPU", "GPU", "memory")
TOLERANCE: Final = 1e-6


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


def cluster_shape() -> ClusterShape:
    """What the connected Ray cluster has, and what its autoscaler can add.

    A `ray up` cluster starts as a head that runs no work, and Ray 2.60 does not tell a driver what the autoscaler may
    start. So this reads the file that the autoscaler itself reads, on the head, which is where the Job API runs its
    drivers. The file counts only if the cluster's head node is of the file's head type, as other clusters can be
    started on that machine too.
    """
    import ray

    path = Path(AUTOSCALING_FILE).expanduser()
    autoscaling: dict[str, Any] = {}
    if path.is_file():
        import yaml

        autoscaling = yaml.safe_load(path.read_text())
    return shape_of(ray.nodes(), autoscaling)  # type: ignore[no-untyped-call]


def shape_of(nodes: Iterable[Mapping[str, Any]], autoscaling: Mapping[str, Any]) -> ClusterShape:
    """The shape of a cluster.

    Args:
        nodes: what `ray.nodes()` returns.
        autoscaling: a cluster file as `ray up` completes it (worker types have `resources` and `max_workers`), or empty.
    """
    alive = [node for node in nodes if node["Alive"]]
    head_type = autoscaling.get("head_node_type", "")
    types: dict[str, Any] = {}
    if any(HEAD in node["Resources"] and node["Labels"].get(NODE_TYPE) == head_type for node in alive):
        types = {name: spec for name, spec in autoscaling["available_node_types"].items() if name != head_type}
    return ClusterShape(
        fixed=tuple(NodeShape(n["Resources"], 1) for n in alive if n["Labels"].get(NODE_TYPE) not in types),
        launchable=tuple(NodeShape(t["resources"], t.get("max_workers", 0)) for t in types.values()),
        max_launched=autoscaling["max_workers"] if types else 0,
    )


def check(demands: Iterable[Demand], cluster: ClusterShape) -> None:
    """Refuse the first of `demands` which the cluster can never hold; each is checked alone, as stages run in turn.

    A demand is refused when one of its bundles fits no node, when its bundles together ask for more than all nodes
    have, or when they cannot be placed on the nodes side by side (first fit, largest first).

    Raises:
        ResourceError: names the field, its value, what it needs, what the cluster has, and the fix.
    """
    for demand in demands:
        reason = _unmet([bundle for bundle in demand.bundles if bundle.count and bundle.resources], cluster)
        if reason:
            fix = f"lower {demand.field}, or run where there is more (max_workers and node types in cluster.yaml)"
            raise ResourceError(demand.field, demand.value, reason, fix)


def _unmet(bundles: list[Bundle], cluster: ClusterShape) -> str | None:
    """Why `cluster` can never hold `bundles` at once, as a clause; None when it can."""
    for bundle in bundles:
        if not any(_times(bundle.resources, shape.resources) for shape in cluster.shapes):
            kinds = sorted({_amounts(shape.resources, bundle.resources) for shape in cluster.shapes}) or ["nothing"]
            return f"needs {_amounts(bundle.resources)} on one node, and the cluster's nodes have {'; '.join(kinds)}"
    needed = {name: sum(b.resources.get(name, 0.0) * b.count for b in bundles) for name in RESOURCES}
    total = {name: cluster.total(name) for name in RESOURCES}
    has = f"needs {_amounts(needed)} at once, and the cluster has at most {_amounts(total, needed)}"
    if any(needed[name] > total[name] + TOLERANCE for name in RESOURCES):
        return has
    left = _unplaced(bundles, cluster)
    if left:
        return f"{has}, but {left.count} x {_amounts(left.resources)} would find no node with that much left"
    return None


def _unplaced(bundles: list[Bundle], cluster: ClusterShape) -> Bundle | None:
    """The first of `bundles` that finds no room, with the count left over; None when all are placed.

    Equal nodes are kept together, so that the cost depends on the kinds of nodes and bundles and not on their counts.
    """
    started, unlaunched, room = list(cluster.fixed), list(cluster.launchable), cluster.max_launched
    for bundle in sorted(bundles, key=lambda b: (b.gpus, b.cpus, b.memory), reverse=True):
        need = bundle.resources
        started, left = _fill(started, need, bundle.count)
        for i, shape in sorted(enumerate(unlaunched), key=lambda item: _preference(need, item[1].resources)):
            each = _times(need, shape.resources)
            launched = min(shape.count, room, -(-left // each)) if each else 0
            unlaunched[i], room = NodeShape(shape.resources, shape.count - launched), room - launched
            filled, left = _fill([NodeShape(shape.resources, launched)], need, left)
            started += filled
        if left:
            return Bundle(left, bundle.cpus, bundle.gpus, bundle.memory)
    return None


def _fill(nodes: list[NodeShape], need: Mapping[str, float], left: int) -> tuple[list[NodeShape], int]:
    """What `nodes` have after taking up to `left` bundles of `need`, and how many bundles remain."""
    after: list[NodeShape] = []
    for shape in nodes:
        each = _times(need, shape.resources)
        full = min(shape.count, left // each) if each else 0
        left -= full * each
        last = min(left, each) if full < shape.count else 0
        left -= last
        for count, taken in ((full, each), (int(last > 0), last), (shape.count - full - int(last > 0), 0)):
            if count:
                after.append(NodeShape(_less(shape.resources, need, taken), count))
    return after, left


def _times(need: Mapping[str, float], have: Mapping[str, float]) -> int:
    """How many bundles of `need` one node holds."""
    return min(int((have.get(name, 0.0) + TOLERANCE) / amount) for name, amount in need.items())


def _less(have: Mapping[str, float], need: Mapping[str, float], times: int) -> dict[str, float]:
    return {name: amount - need.get(name, 0.0) * times for name, amount in have.items()}


def _preference(need: Mapping[str, float], have: Mapping[str, float]) -> tuple[float, float]:
    """Sorts node types to launch for a bundle: where it needs no GPU, those without; then the larger."""
    return (0.0 if "GPU" in need else have.get("GPU", 0.0), -have.get("CPU", 0.0))


def _amounts(resources: Mapping[str, float], shown: Mapping[str, float] | None = None) -> str:
    """ "8 CPU + 1 GPU": CPUs always, the rest where there is some or `shown` asks for some."""
    parts = [f"{resources.get('CPU', 0.0):g} CPU"]
    if resources.get("GPU", 0.0) or (shown or {}).get("GPU", 0.0):
        parts.append(f"{resources.get('GPU', 0.0):g} GPU")
    if (shown if shown is not None else resources).get("memory", 0.0):
        parts.append(f"{resources.get('memory', 0.0) / 2**30:.1f} GiB")
    return " + ".join(parts)
