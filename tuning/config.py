"""The recipe's section about sweeps."""

from typing import Annotated

from pydantic import Field

from cluster.section import FREE, USUAL, Section
from models.config import PER_256

Rate = Annotated[float, Field(gt=0.0, le=100.0)]


class Sweep(Section):
    """A sweep over the initial learning rate (section 3.2: fine-tuning "requires a parameter sweep")."""

    learning_rates: Annotated[tuple[Rate, ...], PER_256] = Field(default=USUAL, min_length=1, max_length=1000)
    """Learning rates to try, per 256 images: a trial's peak is its rate / 256 x the minibatch (linear scaling). The one best on held-out labeled images wins."""
    concurrent: Annotated[int, FREE] = Field(default=1, ge=1, le=1000)
    """Trials that run at the same time; each takes its training's workers."""
