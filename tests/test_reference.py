"""The fields of a recipe in words: the command that explains them, and the page of all."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from cluster.errors import InputError
from cluster.section import FREE, Section, Unit
from pipeline.recipe.images import Labeled
from pipeline.recipe.reading import load, load_text
from pipeline.recipe.reference import entries, explain, page, places
from pipeline.recipe.uris import Uri

Answer = tuple[int, str, str]
DOCS = Path(__file__).parent.parent / "docs" / "recipe.md"


def test_the_page_is_what_the_fields_say() -> None:
    assert DOCS.read_text() == page(), "run `make docs`"


class Example(Section):
    """An example."""

    given: int = Field(ge=1, le=5_000)
    """One. Two."""
    rate: Annotated[float | None, Unit("per 256 images")] = Field(default=None, gt=0.0, le=1e6)
    """A rate."""
    rates: Annotated[tuple[Annotated[float, Field(ge=0.5, lt=2.0)], ...], Unit("per 256 images")] = Field(
        default=(0.5, 1.0), min_length=2
    )
    """Rates."""
    pair: tuple[bool, bool] = (True, False)
    """A pair."""
    count: int | Literal["auto"] = Field(default="auto", ge=1, le=9)
    """A count."""
    where: Labeled | Uri | None = None
    """A place."""
    options: dict[str, bool | int] = Field(default_factory=dict)
    """Options."""
    workers: Annotated[int, FREE] = 10_000
    """Workers."""


def test_types_in_plain_words() -> None:
    assert {one.name: one.stated for one in entries(Example)} == {
        "given": "a whole number from 1 to 5,000; must be given",
        "rate": "a number above 0, at most 1,000,000, per 256 images, or none; default: none",
        "rates": "a list of at least 2, each a number from 0.5, below 2, per 256 images; default: `[0.5, 1]`",
        "pair": "a list of 2, each `true` or `false`; default: `[true, false]`",
        "count": "a whole number from 1 to 9 or `auto`; default: `auto`",
        "where": "a section `Labeled` or a local path or a URI, or none; default: none",
        "options": "a mapping, each value `true` or `false` or a whole number; default: `{}`",
        "workers": "a whole number; default: `10000`",
    }
    assert [one.name for one in entries(Example) if not one.decides] == ["workers"]
    assert [one.sections for one in entries(Example) if one.sections] == [(Labeled,)]


def test_every_field_of_a_recipe_is_in_words() -> None:
    found = dict(places())
    assert len(found) > 200
    assert not [
        name for name, one in found.items() if not one.text or re.search(r"<|Annotated|typing|Ref\(", one.stated)
    ]
    assert not found["cluster.cpus"].decides
    assert not found["fine_tune.training.max_failures"].decides
    assert found["fine_tune.training.momentum"].decides


def test_a_field_is_explained() -> None:
    said = explain("select.images_per_class")
    assert said[:2] == [
        "select.images_per_class",
        "  a whole number from 1 to 1,000,000,000 or `auto`; default: `16000`",
    ]
    assert said[2].startswith("  K; with a class distribution, its mean: the total stays K x the number of classes.")
    assert explain("report.first_ranks")[-1] == "  By itself, this decides nothing about the result."
    for rates in ("supervised.learning_rate", "fine_tune.sweep.learning_rates"):
        assert "per 256 images" in explain(rates)[1]


def test_a_section_is_explained_with_its_fields() -> None:
    said = explain("teacher.self_training.fine_tune")
    assert said[:5] == [
        "teacher.self_training.fine_tune",
        "  a section `FineTune`; default: as is usual for the network",
        "  Of the pre-trained network on D.",
        "",
        "FineTune: Stage (4): the pre-trained student on D.",
    ]
    assert [line.split()[0] for line in said[5:]] == ["training", "sweep"]


@pytest.mark.parametrize(
    ("field", "near"),
    [
        ("select.image_per_class", "did you mean select.images_per_class"),
        ("images_per_class", "did you mean select.images_per_class?"),
        ("pretrian.momentum", "did you mean pretrain.momentum"),
        ("teacher.epochs", "teacher.training.epochs"),
        ("labeled.classes.0", "did you mean labeled.classes"),
        ("xyzzy", "`tophat recipe` lists the sections"),
        ("", "`tophat recipe` lists the sections"),
    ],
)
def test_a_mistyped_field_is_offered_the_nearest(field: str, near: str) -> None:
    with pytest.raises(InputError) as error:
        explain(field)
    assert str(error.value).startswith(f"--explain = {field!r}: is not a field of a recipe; ")
    assert near in str(error.value)


def test_the_command(tophat: Callable[..., Answer]) -> None:
    code, said, _ = tophat("recipe")
    assert code == 0
    assert said.startswith("name ")
    assert "fine_tune    Stage (4): the student on D. (a section `FineTune`;" in said
    code, said, _ = tophat("recipe", "--explain", "fine_tune.sweep.learning_rates")
    assert (code, "per 256 images" in said) == (0, True)
    code, said, errors = tophat("recipe", "--explain", "fine_tune.sweep.learning_rate")
    assert (code, said) == (2, "")
    assert errors.startswith("error: --explain = 'fine_tune.sweep.learning_rate': is not a field")
    code, said, _ = tophat("recipe", "demo", "--set", "seed=7", "--set", "labeled.classes=['[red]x']")
    assert code == 0
    assert load_text("RUN", "said", said.encode()) == load("demo", ["seed=7", "labeled.classes=['[red]x']"])
