"""What lies beside a score table: the rejects, the listing of the images, and the record of what it was made of.

`tophat score --out DIR` and the stage `scores` of a run write the same:

    DIR/table/           the score table, and nothing else
    DIR/rejects/         what could not be scored, and why
    DIR/listing.parquet  the source's shards, and the files in them
    DIR/_scoring.json    the model, the source, the classes and the settings

A table may stand alone, as those of others and of earlier versions do: then only its scores can be read.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError

from cluster import storage
from cluster.errors import RunError, one_line
from cluster.store import publish_json, read_json
from pipeline.data.rejects import REJECTS
from pipeline.data.sources import ImageSource
from pipeline.recipe.sections import Score

TABLE, LISTING = "table", "listing.parquet"
OWNER = "_scoring.json"
"""Readers of folders of Parquet files pass over names with an underscore."""


@dataclass(frozen=True)
class Record:
    """What a score table was made of.

    Attributes:
        model: fingerprint of the model.
        source: fingerprint of the source's listing.
        classes: class i of the table is classes[i].
        score: the settings that decide scores, those at their default left out.
    """

    model: str
    source: str
    classes: tuple[str, ...]
    score: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: str, source: ImageSource, classes: Sequence[str], settings: Score) -> Self:
        """Of a scoring that is about to be."""
        deciding = {name: value for name, value in settings.deciding().items() if name != "table"}
        return cls(model, source.fingerprint(), tuple(classes), deciding)

    def plain(self) -> dict[str, Any]:
        """All of it as plain JSON data."""
        return {"model": self.model, "source": self.source, "classes": list(self.classes), **self.score}


@dataclass(frozen=True)
class Found:
    """A score table that exists, finished or not.

    Attributes:
        table: the folder of its files.
        folder: the one that holds the table and what lies beside it; None where it stands alone.
    """

    table: str
    folder: str | None

    @property
    def rejects(self) -> str | None:
        """The folder of the rejects."""
        return None if self.folder is None else storage.join(self.folder, REJECTS)

    def listing(self) -> ImageSource | None:
        """The images that were scored; None where nothing tells."""
        return None if self.folder is None else ImageSource.load(storage.join(self.folder, LISTING))

    def said(self) -> dict[str, Any] | None:
        """The content of its record, also of one that an earlier version wrote into the table; None where there is none."""
        uri = storage.join(self.folder or self.table, OWNER)
        return read_json(uri) if storage.exists(uri) else None

    def record(self) -> Record | None:
        """Its record; None where it has none, or not all of it."""
        said = dict(self.said() or {})
        parts = {name: said.pop(name, None) for name in ("model", "source", "classes")}
        try:
            return TypeAdapter(Record).validate_python({**parts, "score": said})
        except ValidationError:
            return None


def find(uri: str) -> Found:
    """The score table at a location: in a folder that has what lies beside it too, or that very folder of files.

    Nothing is said about whether it holds scores.
    """
    uri = real(uri)
    parent, _, name = uri.rpartition("/")
    for folder in (uri, *([parent] if name == TABLE else [])):
        if storage.exists(storage.join(folder, LISTING)):
            return Found(storage.join(folder, TABLE), folder)
    return Found(uri, None)


def real(uri: str) -> str:
    """An absolute URI, on a local disk without links: a run's readable names are links into its store."""
    uri = storage.absolute(uri).rstrip("/")
    return uri if storage.is_remote(uri) else os.path.realpath(uri)


def publish(folder: str, record: Record, source: ImageSource) -> None:
    """Writes what lies beside the table of a scoring that begins."""
    publish_json(storage.join(folder, OWNER), record.plain())
    source.save(storage.join(folder, LISTING))


def claim(field: str, folder: str, model_uri: str, source: ImageSource, settings: Score) -> None:
    """Makes a folder this scoring's, so that the same command goes on in it and another one is refused.

    Args:
        field: the option that names the folder, for messages.
        folder: of the table and what lies beside it.
        model_uri: the model that scores.
        source: what it scores.
        settings: how.

    Raises:
        RunError: it holds scores of another model or source, or that other settings made.
        StorageError: it cannot be written.
    """
    from models.card import read_card

    card = read_card(model_uri)
    record = Record.of(card.fingerprint, source, card.class_names, settings)
    storage.check_writable(field, folder)
    owner, wanted = storage.join(folder, OWNER), record.plain()
    if storage.exists(owner):
        found = read_json(owner)
        if "classes" not in found:
            rule, fix = "holds scores of an earlier version, among its other files", "give another folder"
            raise RunError(field, folder, rule, f"{fix}; `tophat select` reads the old ones")
        for name in dict.fromkeys((*wanted, *found)):
            if wanted.get(name) != found.get(name):
                raise RunError(field, folder, f"holds scores made with another {one_line(name)}", "give another folder")
        if storage.exists(storage.join(folder, LISTING)):
            return
    elif storage.list_files(folder):
        raise RunError(field, folder, "is not empty and holds no scores", "give another folder")
    publish(folder, record, source)
