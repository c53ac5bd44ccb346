"""A user's own network, or a package's, by import path, with the weights that it comes with or those of a file."""

from importlib import metadata

from cluster.errors import ModelError
from models.sources.found import Found, read_state
from models.sources.spec import SourceSpec


def find(wanted: SourceSpec, name: str, field: str) -> Found:
    """The network of the factory `wanted.spec`, which is called with `num_classes`."""
    if not wanted.class_names:
        raise ModelError(field, wanted.spec, "does not say its classes", "give their names (--classes FILE)")
    state = read_state("weights", wanted.weights) if wanted.weights else None
    distributions = metadata.packages_distributions().get(wanted.spec.partition(":")[0].partition(".")[0])
    stated = metadata.metadata(distributions[0]).json if distributions else {}
    return Found(
        wanted.spec,
        {},
        list(wanted.class_names),
        state,
        license=str(stated.get("license_expression") or stated.get("license") or "") or None,
        revision=f"{stated['name']} {stated['version']}" if stated else None,
    )
