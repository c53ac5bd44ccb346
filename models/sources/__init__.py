"""Networks that exist elsewhere, by SPEC, as ordinary model directories."""

from typing import TYPE_CHECKING

from models.sources.spec import SourceSpec, is_spec

if TYPE_CHECKING:
    from models.card import ModelCard

__all__ = ["SourceSpec", "is_spec", "obtain"]


def obtain(wanted: SourceSpec, out: str, field: str) -> "ModelCard":
    """Makes the model directory `out` of a network that exists.

    Nothing is written before the network is built again from its card and the weights are found to fit.

    Args:
        wanted: which network.
        out: the model directory, which should be empty or new.
        field: what asked for it, for messages.

    Raises:
        ModelError: it cannot be had, or is none that images can be classified with.
        StorageError: the store refuses.
    """
    from models.sources.obtaining import obtain_model

    return obtain_model(wanted, out, field)
