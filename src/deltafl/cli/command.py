"""A command from its recipe: one option for each setting, the file, and the checks, in one
decorator.
"""

import functools
import re
import types
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

from deltafl.recipes import Leaf, Recipe, leaves, read_recipe

CONFIG = "A YAML file with the same names, num_clients for --num-clients; options go before it."

quiet = click.option("--quiet", is_flag=True, help="No progress, no summary.")
resume = click.option("--resume", is_flag=True, help="Continue a run that was killed.")
tensorboard = click.option(
    "--tensorboard", is_flag=True, help="Write OUT/metrics for TensorBoard too."
)
dry_run = click.option("--dry-run", is_flag=True, help="Check everything, say what would be done.")


class RecipeCommand(click.Command):
    """A command that makes a recipe. Options that may be repeated also take several values:
    `--models A B C`.
    """

    recipe: type[Recipe]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Write `--models A B` as `--models A --models B`, then parse as usual; an old option names
        the new one.
        """
        options = [p for p in self.params if isinstance(p, click.Option) and p.multiple]
        many = {name for option in options for name in option.opts}
        spread: list[str] = []
        current = ""
        for arg in args:
            if re.match(r"-(?![\d.])", arg):  # no negative number
                name = arg.partition("=")[0]
                current = name if name in many else ""
                spread += [] if arg == current else [arg]
            else:
                spread += [current, arg] if current else [arg]
        try:
            return super().parse_args(ctx, spread)
        except click.NoSuchOption as error:
            key = error.option_name.lstrip("-").replace("-", "_")
            for old, new in self.recipe.renamed.items():
                if old.split(".")[-1] == key:
                    now = new if " " in new else f"is now --{new.split('.')[-1].replace('_', '-')}"
                    raise click.UsageError(f"{error.option_name} {now}", ctx) from None
            raise

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options by section."""
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        known = leaves(self.recipe)
        for param in self.get_params(ctx):
            path = known[param.name].path if param.name in known else ()
            title = " ".join(path[:-1]).capitalize() or "Options"
            if record := param.get_help_record(ctx):
                sections.setdefault(title, []).append(record)
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl(rows)


def recipe_command(
    recipe: type[Recipe],
    *,
    argument: str = "",
    read: Callable[[str | None, dict[str, Any]], Any] | None = None,
) -> Callable[[Callable[..., None]], RecipeCommand]:
    """Decorator: f(recipe, **what click options below the decorator say) as a command with the
    options of a recipe.

    argument: the option that may also be given without its name: config, or that of a setting.
    read: makes of the file and the settings what the command is called with; None: the recipe.
    """
    shown = leaves(recipe)

    def decorate(function: Callable[..., None]) -> RecipeCommand:
        @functools.wraps(function)
        def call(bare: object = None, **given: Any) -> None:
            if bare:
                if given[argument]:
                    raise click.UsageError(f"{argument} is given twice; give it once")
                given[argument] = bare
            config = given.pop("config")
            settings = {name: given.pop(name) for name in shown if name in given}
            settings = {name: v for name, v in settings.items() if v not in (None, ())}
            made = read(config, settings) if read else read_recipe(recipe, config, settings)
            function(made, **given)

        for leaf in reversed(shown.values()):
            if names := option_names(leaf):
                call = click.option(*names, leaf.name, **_looks(leaf.field))(call)
        call = click.option("--config", metavar="FILE", help=CONFIG)(call)
        if argument:
            name = f"[{argument.upper()}]"
            call = click.argument("bare", required=False, metavar=name)(call)
        made = click.command(cls=RecipeCommand)(call)
        made.recipe = recipe
        return made

    return decorate


def option_names(leaf: Leaf) -> tuple[str, ...]:
    """The options of a setting; () if it can only be given in a file."""
    kinds = _kinds(leaf.field.annotation)
    if kinds == [bool] and leaf.field.default is True:
        return tuple(f"{flag}/--no{flag[1:]}" for flag in leaf.flags)
    return leaf.flags if kinds else ()


def _looks(field: FieldInfo) -> dict[str, Any]:
    """Type and help of an option."""
    kind, default = _kinds(field.annotation)[0], default_text(field)
    text = meaning(field) + (f" Default: {default}." if default else "")
    parts = (field.annotation, *get_args(field.annotation))
    many = any(get_origin(part) is tuple for part in parts)
    look: dict[str, Any] = {"default": None, "help": text} | ({"multiple": True} if many else {})
    if kind is bool:
        return look | {"is_flag": True}
    if get_origin(kind) is Literal:
        return look | {"metavar": f"[{'|'.join(map(str, get_args(kind)))}]"}
    read = any(isinstance(mark, BeforeValidator) for mark in field.metadata)
    return look | {"type": str if read else kind}


def _kinds(annotation: object) -> list[Any]:
    """The types that one value on the command line may have: str, int, float, bool or a Literal."""
    origin = get_origin(annotation)
    if origin in (Annotated, Union, types.UnionType, tuple):
        return [kind for part in get_args(annotation) for kind in _kinds(part)]
    return [annotation] if annotation in (str, int, float, bool) or origin is Literal else []


def meaning(field: FieldInfo) -> str:
    """What a setting is, and in which range."""
    text = (field.description or "").rstrip(".")
    return " ".join(f"{part}." for part in (text[:1].upper() + text[1:], *_range(field)) if part)


def default_text(field: FieldInfo) -> str:
    """The default as one would type it; empty if there is none, or nothing is the default."""
    default = None if field.is_required() else field.default
    if isinstance(default, tuple):
        few = default if len(default) < 8 else (*default[:2], "..", default[-1])
        return " ".join(map(str, few))
    return "" if default is None or default is False or default == {} else str(default)


def _range(field: FieldInfo) -> Iterator[str]:
    for mark in field.metadata:
        match mark:
            case Ge(ge=low):
                yield f"{low} or more"
            case Gt(gt=low):
                yield f"Above {low}"
            case Le(le=high):
                yield f"At most {high}"
            case Lt(lt=high):
                yield f"Below {high}"
