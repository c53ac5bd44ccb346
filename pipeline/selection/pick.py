"""The selection that a recipe asks for, once it has a number for K."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.errors import StageError
from cluster.progress import Progress
from cluster.store import Outside
from pipeline.recipe.select import Select
from pipeline.selection.select import Selected, listing, select


@dataclass(frozen=True)
class Table:
    """What is selected from.

    Attributes:
        uri: of a score table, or of one of tags.
        classes: how many there are.
        scored: its images; None of tags, which not every image has.
        left_out: lists of images that are not selected, beside the recipe's.
    """

    uri: str
    classes: int
    scored: int | None
    left_out: Sequence[str] = ()


def pick(settings: Select, table: Table, seed: int, out_uri: str, progress: Progress) -> Selected:
    """Writes the selection to `out_uri`.

    Raises:
        StageError: the table has not the images that were scored.
    """
    assert isinstance(settings.images_per_class, int), "K is settled by now"
    selected = select(
        table.uri,
        out_uri,
        images_per_class=settings.images_per_class,
        classes_per_image=settings.classes_per_image,
        num_classes=table.classes,
        zipf_exponent=settings.zipf_exponent,
        class_weights=settings.class_weights,
        min_score=settings.min_score,
        exclude=(*settings.exclude, *table.left_out),
        tags=table.scored is None,
        seed=seed,
        memory_mib=settings.memory_mib,
        progress=progress,
    )
    if table.scored is not None and selected.images != table.scored:
        raise StageError(f"{table.scored} images are scored, but the selection saw {selected.images}: score again")
    return selected


def lists(settings: Select) -> Mapping[str, Outside]:
    """What a selection depends on beside the table: the user's lists of images to leave out."""

    def outside(field: str, uri: str) -> Outside:
        return Outside.at(field, uri, lambda: listing(field, uri))

    return {f"select.exclude {uri}": outside("select.exclude", uri) for uri in settings.exclude}
