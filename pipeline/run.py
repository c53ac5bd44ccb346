"""The paper's pipeline: section 3.2, from a recipe to a student. Section 3.3 and supplement 3 change the teacher alone."""

from dataclasses import dataclass, replace

from cluster.store import Made
from pipeline.choosing import settle_k
from pipeline.context import Run
from pipeline.evaluation import Trained
from pipeline.exclusion import exclude
from pipeline.given import given_scores, given_selection
from pipeline.measuring import Evaluated, evaluate
from pipeline.ready import existing, fit_linear_head, ready_model
from pipeline.recipe.sections import Recipe
from pipeline.scoring.score import Scored
from pipeline.stages import (
    LabeledData,
    Listed,
    list_unlabeled,
    materialize,
    score_unlabeled,
    select_top_k,
    show_gallery,
    survey_labeled,
)
from pipeline.teaching import Network, Round, fine_tune, pretrain_on_weak_labels, train


@dataclass(frozen=True)
class Result:
    """What a run comes to.

    Attributes:
        teacher: the first one; None where scores or a selection that exist take its place.
        rounds: each from its teacher to its student, who teaches the next.
        baseline: the student's network, trained on D alone (Table 2, "Fully Supervised"); None where the recipe has none.
        evaluation: of all of them, on test images.
    """

    teacher: Made[Trained] | None
    rounds: list[Round]
    baseline: Made[Trained] | None
    evaluation: Made[Evaluated]


def run(this: Run, recipe: Recipe) -> Result:
    """Section 3.2, as often as the recipe has rounds (section 4.2).

    Raises:
        Reached: the stage `this.until` is made.
    """
    data = survey_labeled(this, recipe)  # D
    pool = list_unlabeled(this, recipe.unlabeled)  # U
    teacher = first = obtain_teacher(this, recipe, data, pool)  # (1)
    student = network_of_student(this, recipe, data)
    rounds = []
    for number in range(1, recipe.rounds + 1):
        with this.named(f"round-{number}" if recipe.rounds > 1 else ""):
            rounds.append(distill(this, recipe, student, teacher, data, pool))
        teacher = rounds[-1].student
    this.call("student", rounds[-1].student)
    models, baseline = {**({} if first is None else {"teacher": first}), **models_of(rounds)}, None
    if recipe.baseline:
        models["supervised"] = baseline = train(this, "supervised", student, recipe.supervised, data.train, data)
    return Result(first, rounds, baseline, evaluate(this, recipe.score, data, models))


def obtain_teacher(this: Run, recipe: Recipe, data: LabeledData, pool: Made[Listed]) -> Made[Trained] | None:
    """(1) The teacher: trained on D, or ready; pre-trained on weak labels before that (section 3.3); taught by itself after that
    (supplement 3). None where what it is for exists."""
    wanted = recipe.taught
    if wanted is None:
        return None
    with this.named("self-training" if wanted.self_training else ""):
        teacher, itself = begin_teacher(this, recipe, data)
        network = itself
        if wanted.training is not None:
            if wanted.weak is not None:
                network = pretrain_on_weak_labels(this, wanted.weak, network, data)
            teacher = train(this, "teacher", network, wanted.training, data.train, data)
        assert teacher is not None
        if wanted.self_training is None:
            return teacher
        course = recipe.model_copy(
            update={"pretrain": wanted.self_training.pretrain, "fine_tune": wanted.self_training.fine_tune}
        )
        teacher = distill(this, course, replace(itself, fresh_head=False, afresh=True), teacher, data, pool).student
    this.call("teacher", teacher)
    return teacher


def begin_teacher(this: Run, recipe: Recipe, data: LabeledData) -> tuple[Made[Trained] | None, Network]:
    """The teacher before any training, where it is one that exists; and the network as which it is trained."""
    wanted, seed = recipe.teacher, recipe.seed_of("teacher")
    if not isinstance(wanted.model, str):
        return None, Network(wanted.model, seed)
    model, made = existing(this, "teacher", wanted.model, data, wanted), None
    if wanted.head == "linear":
        name = "teacher" if wanted.training is None else "teacher-head"
        made = fit_linear_head(this, name, model, recipe.score, data, seed)
        model = model.now(made)
    elif wanted.training is None:
        made = ready_model(this, model, wanted.class_map, data)
    return made, Network.of(model, seed, fresh_head=wanted.head == "fresh")


def network_of_student(this: Run, recipe: Recipe, data: LabeledData) -> Network:
    """The student's network, with random weights or those of a model that exists and a new last layer."""
    wanted, seed = recipe.student, recipe.seed_of("student")
    if wanted.start is None:
        return Network(wanted.model, seed)
    model = existing(this, "student", wanted.start, data)
    return Network.of(model, seed, config=wanted.model, transform=wanted.changed_input, fresh_head=True)


def distill(
    this: Run, recipe: Recipe, network: Network, teacher: Made[Trained] | None, data: LabeledData, pool: Made[Listed]
) -> Round:
    """(2) to (4): from a teacher, or from what exists in its place, to a student."""
    scores: Made[Scored] | None = None
    if teacher is None and recipe.select.selection is not None:
        selection = given_selection(this, recipe, data, pool)
    else:
        scores = (  # (2), ranking
            given_scores(this, recipe, data, pool)
            if teacher is None
            else score_unlabeled(this, recipe.score, teacher, data, pool)
        )
        excluded = exclude(this, recipe, teacher, scores, data, pool)
        recipe = settle_k(this, recipe, network, scores, excluded, data, pool)
        selection = select_top_k(this, recipe, scores, excluded, data, pool)  # (2), picking
    dhat = materialize(this, recipe, selection, data, pool)  # D-hat
    show_gallery(this, recipe, selection, dhat, data)
    pretrained = train(this, "pretrained", network, recipe.pretrain, dhat, data)  # (3)
    student = fine_tune(this, network, recipe.fine_tune, data, start=pretrained)  # (4)
    return Round(scores, selection, dhat, pretrained, student)


def models_of(rounds: list[Round]) -> dict[str, Made[Trained]]:
    """The models of each round, by their names in the run."""
    found: dict[str, Made[Trained]] = {}
    for number, each in enumerate(rounds, 1):
        prefix = f"round-{number}/" if len(rounds) > 1 else ""
        found |= {f"{prefix}pretrained": each.pretrained, f"{prefix}student": each.student}
    return found
