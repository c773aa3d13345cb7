"""cggr-ray recipe: list, show, check."""

from __future__ import annotations

import typer

from cggr_ray import options

recipe_app = typer.Typer(help="Look at recipes. Example: cggr-ray recipe show cggr_loss", no_args_is_help=True)


@recipe_app.command("list")
def recipe_list() -> None:
    """All shipped recipes, a line each.

    Example: cggr-ray recipe list
    """
    from cggr_ray.recipe import load_recipe, recipe_names

    width = max(map(len, recipe_names()))
    for name in recipe_names():
        typer.echo(f"{name:{width}}  {load_recipe(name).description}")


@recipe_app.command("show")
def recipe_show(name: options.RecipeName) -> None:
    """A recipe's parts in a line each, the parts inside them too, then all its values.

    Example: cggr-ray recipe show cggr_loss
    """
    import json

    from cggr_ray.recipe import explain, load_recipe

    recipe = load_recipe(name)
    typer.echo(f"{recipe.name}: {recipe.description}\n")
    lines = explain(recipe)
    width = max(len(part) for part, _, _ in lines)
    for part, kind, meaning in lines:
        typer.echo(f"{part:{width}}  {kind:16} {meaning}")
    typer.echo("\n" + json.dumps(recipe.to_plain(), indent=2))


@recipe_app.command("check")
def recipe_check(name: options.RecipeName) -> None:
    """Whether a recipe is valid; exit code 2 and one line if not.

    Example: cggr-ray recipe check mine.toml
    """
    from cggr_ray.recipe import load_recipe

    typer.echo(f"{load_recipe(name).name}: valid")
