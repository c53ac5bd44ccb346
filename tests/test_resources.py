"""Demands against the cluster's shape: pure, against brute force, and on a real cluster."""

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ResourceError
from cluster.resources import Bundle, ClusterShape, Demand, NodeShape, check, cluster_shape, shape_of

GIB = 2.0**30
LAPTOP = ClusterShape((NodeShape({"CPU": 2, "memory": 8 * GIB}, 1),))
GROWN = ClusterShape(
    fixed=(NodeShape({"memory": 16 * GIB}, 1),),
    launchable=(NodeShape({"CPU": 16}, 8), NodeShape({"CPU": 48, "GPU": 4, "memory": 128 * GIB}, 16)),
    max_launched=24,
)


def holds(cluster: ClusterShape, *bundles: Bundle) -> bool:
    try:
        check([Demand("field", 1, bundles)], cluster)
    except ResourceError:
        return False
    return True


def refusal(cluster: ClusterShape, *bundles: Bundle) -> str:
    with pytest.raises(ResourceError) as error:
        check([Demand("pretrain.workers", 64, bundles)], cluster)
    message = str(error.value)
    assert message.startswith("pretrain.workers = 64: ")
    assert "lower pretrain.workers" in message
    assert "\n" not in message
    return message


def test_a_cluster_that_has_to_grow_first_holds_the_papers_64_workers() -> None:
    assert holds(GROWN, Bundle(64, cpus=1, gpus=1), Bundle(1, cpus=1))
    assert not holds(GROWN, Bundle(65, cpus=1, gpus=1))


def test_too_much_in_all() -> None:
    message = refusal(LAPTOP, Bundle(2, cpus=0.75), Bundle(1, cpus=1))
    assert "needs 2.5 CPU at once, and the cluster has at most 2 CPU" in message
    message = refusal(GROWN, Bundle(65, cpus=1, gpus=1))
    assert "needs 65 CPU + 65 GPU at once, and the cluster has at most 896 CPU + 64 GPU" in message


def test_a_bundle_that_fits_no_node() -> None:
    message = refusal(LAPTOP, Bundle(64, cpus=1, gpus=1))
    assert "needs 1 CPU + 1 GPU on one node, and the cluster's nodes have 2 CPU" in message
    assert "needs 4 CPU + 8 GPU on one node" in refusal(GROWN, Bundle(1, cpus=4, gpus=8))
    assert "needs 1 CPU + 9.0 GiB on one node, and the cluster's nodes have 2 CPU + 8.0 GiB" in refusal(
        LAPTOP, Bundle(1, cpus=1, memory=9 * GIB)
    )


def test_enough_in_all_but_in_pieces_too_small() -> None:
    two_nodes = ClusterShape((NodeShape({"CPU": 2}, 2),))
    assert "needs 3.6 CPU at once" in refusal(two_nodes, Bundle(3, cpus=1.2))
    assert "1 x 1.2 CPU would find no node" in refusal(two_nodes, Bundle(3, cpus=1.2))
    assert holds(two_nodes, Bundle(2, cpus=1.2), Bundle(2, cpus=0.8))


def test_a_cluster_without_anything() -> None:
    assert "nodes have nothing" in refusal(ClusterShape(()), Bundle(1, cpus=1))
    assert "nodes have 0 CPU" in refusal(ClusterShape((NodeShape({}, 1),)), Bundle(1, cpus=1))
    assert holds(ClusterShape(()), Bundle(0, cpus=1), Bundle(5))


def test_the_cap_on_launched_nodes_holds_for_all_types_together() -> None:
    small_and_large = (NodeShape({"CPU": 1}, 100), NodeShape({"CPU": 64}, 100))
    assert holds(ClusterShape((), small_and_large, 2), Bundle(100, cpus=1))
    assert not holds(ClusterShape((), small_and_large, 2), Bundle(129, cpus=1))
    assert ClusterShape((), small_and_large, 101).total("CPU") == 6401
    assert not holds(ClusterShape((), small_and_large, 0), Bundle(1, cpus=1))


def test_each_demand_is_checked_alone_and_the_first_that_fails_is_named() -> None:
    fits, fails = Demand("a", 2, (Bundle(2, cpus=1),)), Demand("b", 3, (Bundle(3, cpus=1),))
    check([fits, fits], LAPTOP)
    with pytest.raises(ResourceError, match=r"^b = 3"):
        check([fits, fails, Demand("c", 4, (Bundle(4, cpus=1),))], LAPTOP)


def test_a_billion_small_bundles_cost_no_more_than_one() -> None:
    many = ClusterShape((NodeShape({"CPU": 64}, 10**8),))
    assert holds(many, Bundle(64 * 10**8, cpus=1))
    assert not holds(many, Bundle(64 * 10**8 + 1, cpus=1))


def placeable(need: list[tuple[int, int]], nodes: list[tuple[int, int]]) -> bool:
    """Every way to put each (cpus, gpus) of `need` onto one of `nodes`."""
    for places in itertools.product(range(len(nodes)), repeat=len(need)):
        used = [[0, 0] for _ in nodes]
        for place, (cpus, gpus) in zip(places, need, strict=True):
            used[place][0] += cpus
            used[place][1] += gpus
        if all(u[0] <= n[0] and u[1] <= n[1] for u, n in zip(used, nodes, strict=True)):
            return True
    return False


amounts = st.tuples(st.integers(0, 3), st.integers(0, 2))


@given(st.lists(amounts, max_size=4), amounts.filter(any), st.integers(0, 4), st.booleans())
def test_one_kind_of_bundle_against_brute_force(
    nodes: list[tuple[int, int]], need: tuple[int, int], count: int, launched: bool
) -> None:
    shapes = tuple(NodeShape({"CPU": cpus, "GPU": gpus}, 1) for cpus, gpus in nodes)
    cluster = ClusterShape((), shapes, len(shapes)) if launched else ClusterShape(shapes)
    assert holds(cluster, Bundle(count, *need)) == placeable([need] * count, nodes)


@given(st.lists(amounts, max_size=3), st.lists(amounts.filter(any), max_size=4), st.booleans())
def test_what_is_let_through_can_be_placed(
    nodes: list[tuple[int, int]], needs: list[tuple[int, int]], launched: bool
) -> None:
    shapes = tuple(NodeShape({"CPU": cpus, "GPU": gpus}, 1) for cpus, gpus in nodes)
    cluster = ClusterShape((), shapes, len(shapes)) if launched else ClusterShape(shapes)
    if holds(cluster, *(Bundle(1, *need) for need in needs)):
        assert placeable(needs, nodes)


AUTOSCALING = {
    "max_workers": 5,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 0}, "max_workers": 0},
        "cpu": {"resources": {"CPU": 16}, "max_workers": 3},
        "gpu": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 2},
    },
}


def node(node_type: str | None, resources: Mapping[str, float], alive: bool = True) -> dict[str, Any]:
    head = {"node:__internal_head__": 1.0} if node_type in ("head", None) else {}
    labels = {"ray.io/node-group": node_type} if node_type else {}
    return {"Alive": alive, "Labels": labels, "Resources": {**resources, **head}}


def test_the_shape_counts_launched_workers_once_and_dead_nodes_never() -> None:
    nodes = [node("head", {}), node("cpu", {"CPU": 16}), node("cpu", {"CPU": 16}, alive=False), node("own", {"CPU": 7})]
    shape = shape_of(nodes, AUTOSCALING)
    assert (shape.total("CPU"), shape.total("GPU")) == (7 + 3 * 16 + 2 * 8, 2)
    assert shape.max_launched == 5


@pytest.mark.parametrize("head_type", [None, "another"])
def test_the_file_of_another_cluster_does_not_count(head_type: str | None) -> None:
    nodes = [{**node(None, {"CPU": 4}), "Labels": {"ray.io/node-group": head_type} if head_type else {}}]
    for autoscaling in (AUTOSCALING, {}):
        shape = shape_of(nodes, autoscaling)
        assert (shape.total("CPU"), shape.total("GPU"), shape.launchable) == (4, 0, ())


@pytest.mark.usefixtures("ray_local")
def test_the_shape_of_a_real_cluster() -> None:
    shape = cluster_shape()
    assert shape.total("CPU") == 2
    assert shape.total("memory") > 0
    assert holds(shape, Bundle(2, cpus=1))
    assert not holds(shape, Bundle(3, cpus=1))
