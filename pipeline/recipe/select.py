"""The sections of a recipe about the selection (section 3.2). Imports nothing heavy."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from cluster.section import FREE, Section, Unit
from pipeline.recipe.uris import Uri

AUTO, MOST_K = "auto", 10**9
"""Of `select.images_per_class`: K that is found by trying, and the greatest that can be given."""


class Select(Section):
    """Stage (2), second half: the K best images of each class."""

    selection: Uri | None = None
    """A selection of U that exists, in place of a teacher, scores and the picking: the `--out` of a `tophat select`, or a run's `selection`. Its classes must be those of D, in their order. What else decides a selection is left out, or is what it was made with."""
    images_per_class: Annotated[int, Field(ge=1, le=MOST_K)] | Literal["auto"] = 16_000
    """K; with a class distribution, its mean: the total stays K x the number of classes. `auto` tries a few values in short pre-trainings and takes the one whose student knows D best; together they see fewer images than two pre-trainings."""
    tries: Annotated[tuple[Annotated[int, Field(ge=1, le=MOST_K)], ...], Field(min_length=2, max_length=20)] | None = (
        None
    )
    """The values of K that `images_per_class: auto` tries; by default up to 6, from the labels of a class to where images of U are selected once on average."""
    zipf_exponent: float | None = Field(default=None, ge=0.0, le=10.0)
    """Unbalanced: classes in a seeded order get images in proportion to 1, 1/2^s, 1/3^s, and so on (section 4.4)."""
    class_weights: tuple[Annotated[float, Field(ge=0.0, le=1e12)], ...] | None = None
    """Unbalanced: classes get images in proportion to these, one for each class in the order of the classes."""
    classes_per_image: int | None = Field(default=None, ge=1, le=1000)
    """P to select with, at most the P that was stored; by default that one."""
    min_score: float | None = Field(default=None, ge=-1e6, le=1e6, allow_inf_nan=False)
    """Candidates below it are never selected: from 0 to 1, but with `score.logits`, where scores have no bounds."""
    tags: Uri | None = None
    """Tags of U: `sidecar` for those that U has beside its images; else Parquet files with the columns `shard`, `index`, and `tags` (words, as of `teacher.weak`) or `class_ids` (numbers of classes). Then each class gets images at random among those tagged with it, and not the best-scored (section 4.4, "balanced-with-tags")."""
    exclude: tuple[Uri, ...] = ()
    """Parquet files, or folders of them, with columns `shard` and `index`: images that are never selected."""
    memory_mib: Annotated[int, FREE, Unit("in MiB")] = Field(default=2048, ge=64, le=1_000_000)
    """What each scanning task may hold; with more classes x K, the scores are read once for each range of classes that fits."""

    @field_validator("images_per_class", mode="wrap")
    @classmethod
    def _number_or_auto(cls, given: object, check: ValidatorFunctionWrapHandler) -> Any:
        try:
            return check(given)
        except ValidationError:  # which would tell a mistake for each of the two
            raise ValueError(f"must be a whole number from 1 to {MOST_K:,}, or {AUTO}") from None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.tries is not None and self.images_per_class != AUTO:
            raise ValueError(
                f"tries is for images_per_class = {AUTO}, and K is {self.images_per_class}: leave one of them out"
            )
        if self.tries is not None and len(set(self.tries)) < 2:
            raise ValueError(f"tries has the one value {self.tries[0]}: set images_per_class to it, or add others")
        if self.images_per_class == AUTO and self.tags is not None:
            raise ValueError(f"images_per_class = {AUTO} follows scores, which tags have not: give K a number")
        if self.zipf_exponent is not None and self.class_weights is not None:
            raise ValueError("zipf_exponent and class_weights exclude each other: both say how large each class is")
        if self.class_weights is not None and not any(self.class_weights):
            raise ValueError("class_weights must have one above 0")
        if self.tags is not None and (self.min_score is not None or self.classes_per_image is not None):
            raise ValueError("tags have no scores: leave out min_score and classes_per_image")
        return self
