"""The command about recipes themselves."""

from typing import Annotated

import typer

from pipeline.cli.app import Sets, app, out


@app.command()
def recipe(
    given: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE", help="A YAML file, or a shipped recipe: it is printed with every default."),
    ] = None,
    explain: Annotated[
        str | None, typer.Option("--explain", metavar="FIELD", help="A field, or a section: select.images_per_class.")
    ] = None,
    sets: Sets = None,
) -> None:
    """What a recipe can say: its sections, one field, or a recipe with every default."""
    from pipeline.recipe import reference
    from pipeline.recipe.reading import load
    from pipeline.recipe.sections import Recipe

    if explain is not None:
        lines = reference.explain(explain)
    elif given is not None:
        lines = load(given, sets or []).to_yaml().splitlines()
    else:
        lines = [
            *reference.listing(Recipe),
            "",
            "tophat recipe --explain FIELD says more of one; docs/recipe.md has them all.",
        ]
    for line in lines:
        out.print(line, markup=False)
