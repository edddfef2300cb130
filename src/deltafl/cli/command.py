"""A command from its recipe: one option for each setting, the file, and the checks, in one
decorator.
"""

import functools
import os
import re
import types
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
from annotated_types import Ge, Gt, Le, Lt
from pydantic import ByteSize
from pydantic.fields import FieldInfo

from deltafl.recipes import Leaf, Recipe, leaves, read_recipe

CONFIG = "A YAML file with the same names, num_clients for --num-clients; options go before it."

FLAGS = {
    "tensorboard": "Write OUT/metrics for TensorBoard too.",
    "resume": "Continue a run that was killed.",
    "dry_run": "Check everything, say what would be done.",
    "quiet": "No progress, no summary.",
}
"""Options that are no settings, and what they do."""

RANGES = {"ge": " {} or more.", "gt": " Above {}.", "le": " At most {}.", "lt": " Below {}."}

IS_MAIN = int(os.environ.get("RANK", 0)) == 0
"""Whether this is the process of an `accelerate launch` that speaks and writes."""


def flag(name: str) -> bool:
    """Whether the command that runs was given an option of `FLAGS`."""
    return bool(click.get_current_context().params.get(name))


class RecipeCommand(click.Command):
    """A command that makes a recipe. Options that may be repeated also take several values:
    `--models A B C`.
    """

    recipe: type[Recipe]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Write `--models A B` as `--models A --models B`, then parse as usual."""
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
        return super().parse_args(ctx, spread)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options by section."""
        known = leaves(self.recipe)
        titles = {name: " ".join(leaf.path[:-1]).capitalize() for name, leaf in known.items()}
        sections: dict[str, list[tuple[str, str]]] = {"": []}
        for param in self.get_params(ctx):
            if record := param.get_help_record(ctx):
                sections.setdefault(titles.get(param.name or "", ""), []).append(record)
        for title, rows in sections.items():
            with formatter.section(title or "Options"):
                formatter.write_dl(rows)


def recipe_command(
    recipe: type[Recipe],
    *flags: str,
    argument: str = "",
    read: Callable[[str | None, dict[str, Any]], Any] | None = None,
) -> Callable[[Callable[..., None]], RecipeCommand]:
    """Decorator: f(recipe, **what click parameters below the decorator say) as a command with the
    options of a recipe.

    flags: those of `FLAGS` that it has; with --quiet nothing but errors and warnings is said.
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
            told = {name: given.pop(name) for name in (*flags, "config", *shown) if name in given}
            settings = {n: told[n] for n in shown if told.get(n) not in (None, ())}
            made = (read or functools.partial(read_recipe, recipe))(told["config"], settings)
            silent = told.get("quiet") or not IS_MAIN
            with redirect_stdout(None) if silent else nullcontext():
                function(made, **given)

        metavar = f"[{argument.upper()}]"
        params: list[click.Parameter] = [
            *[click.Argument(["bare"], required=False, metavar=metavar)] * bool(argument),
            click.Option(["--config"], metavar="FILE", help=CONFIG),
            *(
                click.Option([*names, leaf.name], **_looks(leaf.field))
                for leaf in shown.values()
                if (names := option_names(leaf))
            ),
            *(
                click.Option([f"--{name.replace('_', '-')}"], is_flag=True, help=FLAGS[name])
                for name in flags
            ),
        ]
        made = click.command(cls=RecipeCommand, params=params)(call)
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
    parts = (field.annotation, *get_args(field.annotation))
    return {
        "default": None,
        "help": meaning(field) + (f" Default: {default}." if default else ""),
        "is_flag": kind is bool,
        "metavar": f"[{'|'.join(map(str, get_args(kind)))}]" if get_args(kind) else None,
        "multiple": any(get_origin(part) is tuple for part in parts),
        "type": kind if kind in (int, float) else None,
    }


def _kinds(annotation: object) -> list[Any]:
    """The types that one value on the command line may have, or a Literal."""
    origin = get_origin(annotation)
    if origin in (Annotated, Union, types.UnionType, tuple):
        return [kind for part in get_args(annotation) for kind in _kinds(part)]
    plain = annotation in (str, int, float, bool, ByteSize)
    return [annotation] if plain or origin is Literal else []


def meaning(field: FieldInfo) -> str:
    """What a setting is, and in which range."""
    text = (field.description or "").rstrip(".")
    marks = [asdict(mark) for mark in field.metadata if isinstance(mark, Ge | Gt | Le | Lt)]
    ranges = [RANGES[key].format(value) for mark in marks for key, value in mark.items()]
    return f"{text[:1].upper()}{text[1:]}.{''.join(ranges)}"


def default_text(field: FieldInfo) -> str:
    """The default as one would type it; empty if there is none, or nothing is the default."""
    default = None if field.is_required() else field.default
    if isinstance(default, tuple):
        few = default if len(default) < 8 else (*default[:2], "..", default[-1])
        return " ".join(map(str, few))
    return "" if default is None or default is False or default == {} else str(default)
