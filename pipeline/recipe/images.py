"""The sections of a recipe about labeled and unlabeled images. Imports nothing heavy."""

from typing import Annotated, Literal
from unicodedata import normalize

from pydantic import (
    Field,
    field_validator,
)

from cluster.section import Section
from pipeline.recipe.uris import Uri


class Source(Section):
    """Images in an object store or on a disk."""

    uri: Uri
    """The root: a local path, `s3://bucket/prefix` or `gs://bucket/prefix`."""
    layout: Literal["auto", "webdataset", "parquet", "folder"] = "auto"
    """`webdataset`: tar shards; `parquet`: files with a column of encoded images; `folder`: image files, one folder per class when labeled; `auto`: by what is found."""
    image_column: str | None = Field(default=None, min_length=1, max_length=200)
    """Parquet: the column of image bytes, or of structs with a `bytes` field; by default `image` where there is one, else the only column of encoded images."""
    label_column: str = Field(default="label", min_length=1, max_length=200)
    """Parquet: the column of class numbers or names."""
    labels: Uri | None = None
    """Folder: a CSV, TSV or Parquet file with the label of each image, by its path relative to `uri`, in place of one folder per class."""


class Labeled(Section):
    """The labeled set D, and the sets that models are chosen and measured on."""

    train: Source
    """D. Teacher, fine-tuning and the supervised baseline train on it."""
    validation: Source | None = None
    """Labeled images to choose the fine-tuning learning rate on."""
    validation_fraction: float = Field(default=0.1, gt=0.0, lt=1.0)
    """Without `validation`: the share of D that is held out for it (a fixed draw from `seed`), of what `test_fraction` leaves."""
    test: Source | None = None
    """Labeled images that every result is measured on; nothing is chosen on them."""
    test_fraction: float = Field(default=0.2, gt=0.0, lt=1.0)
    """Without `test`: the share of D that is held out for it, class by class (a fixed draw from `seed`)."""
    balance: bool = False
    """Whether trainings on D see as many images of each class: those of smaller classes several times in an epoch, which is as long as if every class were as large as the largest."""
    classes: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] | None = None
    """Class names in the order of the network's outputs; by default what D itself says, else sorted."""

    @field_validator("classes")
    @classmethod
    def _distinct(cls, classes: tuple[str, ...] | None) -> tuple[str, ...] | None:
        numbers: dict[str, int] = {}
        for number, name in enumerate(classes or ()):
            first = numbers.setdefault(normalize("NFC", name), number)
            if first != number:
                raise ValueError(f"must be distinct names: those at {first} and {number} are the same text")
        return classes
