"""The gallery of a selection without D-hat: only the images that it shows are read, and no copy of them stays."""

from collections.abc import Sequence

from cluster import storage
from cluster.errors import InputError
from cluster.progress import SILENT, Progress
from pipeline.data.sources import ImageSource
from pipeline.recipe.sections import Report
from pipeline.report.gallery import ClassCount, Gallery, place, places_of, write_gallery
from pipeline.selection.dhat import copy_selected
from pipeline.selection.select import Selected, read_selection

# isort: split
# After cluster.storage: pyarrow loads pyarrow.fs, which reads the environment that cluster.storage sets.
import numpy as np
import pyarrow as pa

COPIES = "copies"
"""Folder, in the gallery's, of the images while it is made."""
MARK = "assets/gallery.js"
"""What every gallery has."""
IMAGES_PER_SHARD = 512


def check_gallery(field: str, uri: str) -> None:
    """Makes sure that a gallery can be put into a folder.

    Raises:
        InputError: it holds something else; names `field`.
    """
    files = storage.list_files(uri)
    if files and not any(file.path.endswith(MARK) for file in files):
        raise InputError(field, uri, "holds files that are no gallery", "give an empty or new folder")


def show_selection(
    out_uri: str,
    selected: Selected,
    source: ImageSource,
    class_names: Sequence[str] | None,
    *,
    title: str,
    progress: Progress = SILENT,
) -> Gallery:
    """Publishes the gallery of a selection into the folder `out_uri`, on the Ray that is initialized.

    Args:
        out_uri: the folder.
        selected: the selection.
        source: the images that it was made of.
        class_names: by class id; numbers where they are not known.
        title: of the pages.
        progress: counts thumbnails.

    Raises:
        StageError: nothing is selected, or an image is not in the source any more.
        SourceError: the selection is of other images.
    """
    settings = Report()
    names = class_names or [str(number) for number in range(selected.num_classes)]
    facts = zip(names, selected.counts, selected.lowest_scores, strict=True)
    classes = [ClassCount(number, *fact) for number, fact in enumerate(facts)]
    rows = read_selection(selected.uri)
    wanted = places_of(classes, settings.first_ranks, settings.strided_ranks)
    shown = np.isin(place(rows["class_id"].to_numpy(), rows["rank"].to_numpy()), wanted)
    copies = storage.join(out_uri, COPIES)
    try:
        copy_selected(rows.filter(pa.array(shown)), source, copies, images_per_shard=IMAGES_PER_SHARD)
        return write_gallery(
            out_uri,
            copies,
            classes,
            title=title,
            first_ranks=settings.first_ranks,
            strided_ranks=settings.strided_ranks,
            progress=progress,
        )
    finally:
        storage.delete_tree(copies)
