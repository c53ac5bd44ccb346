"""The recipe's section about what is left out before selection. Imports nothing heavy."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from cluster.section import Section
from pipeline.recipe.uris import RESNET18, TEACHER, Uri


class Deduplicate(Section):
    """What of U is left out before selection: near-duplicates of evaluation images (supplement 5) and copies inside U. Off by default."""

    nearest: int | None = Field(default=None, ge=1, le=10**6)
    """So many images of U, the nearest to any validation or test image, are left out; 5000 in the paper."""
    within: float | None = Field(default=None, ge=0.0, le=2.0)
    """Images of U at most so far from a validation or test image are left out: Euclidean, between L2-normalized features."""
    copies: bool = False
    """Of images of U with the same bytes only the first, by shard and index, stays."""
    model: Uri = RESNET18
    """Whose features are compared: `resnet18`, torchvision's, trained on ImageNet, downloaded once, which takes a second pass over U; `teacher`,
    whose features `score.embedding` keeps; or a model directory."""
    pairs: int = Field(default=10_000, ge=1, le=10**6)
    """Nearest pairs that are ranked and shown for review: at least as many as are left out."""
    index: Literal["exact", "ivf", "hnsw"] = "exact"
    """How the nearest evaluation image is searched (Faiss): by brute force, or approximately in inverted lists or a graph, for large evaluation
    sets."""
    probes: int = Field(default=32, ge=1, le=65_536)
    """Of `ivf`, the lists that are searched; of `hnsw`, the breadth of the search. More finds more and takes longer."""
    decisions: Uri | None = None
    """The decision file of a review, which overrides `nearest` and `within` for the pairs that it names."""

    @property
    def near(self) -> bool:
        """Whether near-duplicates are looked for."""
        return self.nearest is not None or self.within is not None

    @property
    def second_pass(self) -> bool:
        """Whether U goes through another model than the teacher."""
        return self.near and self.model != TEACHER

    @property
    def on(self) -> bool:
        """Whether anything is left out."""
        return self.near or self.copies

    @field_validator("model", mode="before")
    @classmethod
    def _null_is_the_teacher(cls, model: object) -> object:
        return TEACHER if model is None else model

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.nearest is not None and self.nearest > self.pairs:
            raise ValueError(
                f"pairs = {self.pairs} must be at least nearest = {self.nearest}: only ranked pairs can be left out"
            )
        if self.decisions is not None and not self.near:
            raise ValueError("decisions needs nearest or within: the pairs that it was made on are ranked again")
        return self
