"""What a run leaves out of U before it selects (supplement 5)."""

from cluster.store import Made
from pipeline.context import Run, place_of
from pipeline.duplicates import exclude as deduplication
from pipeline.duplicates.exclude import Excluded
from pipeline.evaluation import Trained
from pipeline.recipe.sections import Recipe
from pipeline.scoring.score import Scored
from pipeline.stages import TABLE, LabeledData, Listed, images_of


def exclude(
    this: Run,
    recipe: Recipe,
    teacher: Made[Trained] | None,
    scores: Made[Scored],
    data: LabeledData,
    pool: Made[Listed],
) -> Made[Excluded] | None:
    """What of U is left out before selection (supplement 5); None where nothing is looked for."""
    settings = recipe.deduplicate
    if not settings.on:
        return None
    other = deduplication.features_model(this, "deduplicate.model", settings)
    taught = (
        deduplication.Features("", "") if teacher is None else deduplication.Features(teacher.uri, teacher.fingerprint)
    )
    model = taught if other is None else other
    inputs = {
        "unlabeled": pool.fingerprint,
        **data.validation.inputs,
        **data.test.inputs,
        "model": model.fingerprint if settings.near else "",
        "embeddings": scores.fingerprint if settings.near and other is None else "",
    }
    subject = deduplication.Subject(
        unlabeled=lambda: images_of(pool),
        sets=lambda: tuple(
            deduplication.surveyed_set(name, labeled.uri)
            for name, labeled in (("validation", data.validation), ("test", data.test))
        ),
        model_uri=model.uri,
        embeddings=place_of(scores, "table", TABLE) if other is None else None,
        inputs=inputs,
    )
    return deduplication.deduplicate(this, subject, settings, recipe.score, "deduplicate.decisions")
