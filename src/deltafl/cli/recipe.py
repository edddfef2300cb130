"""`deltafl recipe`."""

import json
import textwrap
from collections.abc import Iterator

import click
import yaml
from pydantic_core import to_jsonable_python

from deltafl.cli import COMMANDS, app
from deltafl.cli.command import RecipeCommand, default_text, meaning, option_names
from deltafl.errors import DeltaflError, did_you_mean
from deltafl.recipes import Recipe, every_leaf, leaves, section
from deltafl.rendering import render


@click.command()
@click.argument("command", required=False)
@click.option("--schema", is_flag=True, help="A JSON schema, for completion in editors.")
@click.option("--markdown", is_flag=True, help="Tables of all keys, of one or of all commands.")
@click.pass_context
def recipe_command(ctx: click.Context, command: str | None, schema: bool, markdown: bool) -> None:
    """Print a file with every setting of COMMAND, its default and what it is.

    \b
    deltafl recipe federate > run.yaml
    deltafl recipe federate --schema > federate.json
    """
    commands = {name: app.get_command(ctx, name) for name in COMMANDS if command in (None, name)}
    found = {name: c.recipe for name, c in commands.items() if isinstance(c, RecipeCommand)}
    if markdown and found:
        tables = {name: _rows(kind) for name, kind in found.items()}
        click.echo(render("settings.md", tables=tables))
    elif command not in found:
        hint = f"; {did_you_mean(command, COMMANDS)}" if command else ""
        raise DeltaflError(f"name a command that has a recipe{hint}")
    elif schema:
        click.echo(json.dumps(found[command].model_json_schema(), indent=2))
    else:
        click.echo("\n".join(_template(found[command])))


def _template(kind: type[Recipe], indent: str = "") -> Iterator[str]:
    """The lines of a YAML file with every key at its default; what has none is commented out, or to
    be filled in.
    """
    for name, field in kind.model_fields.items():
        key = field.alias or name
        if inner := section(field):
            lines = list(_template(inner, f"{indent}  "))
            empty = all(line.lstrip().startswith("#") for line in lines)
            yield from ("", f"{indent}{'# ' if empty else ''}{key}:", *lines)
            continue
        start, about = f"{indent}# ", meaning(field) + " Required." * field.is_required()
        yield from textwrap.wrap(about, 96, initial_indent=start, subsequent_indent=start)
        if field.is_required():
            yield f"{indent}{key}:"
            continue
        value = to_jsonable_python(field.default)
        shown = yaml.safe_dump([value], default_flow_style=True, width=10_000).strip()[1:-1]
        yield f"{start}{key}:" if value in (None, [], {}) else f"{indent}{key}: {shown}"


def _rows(kind: type[Recipe]) -> Iterator[tuple[str, str, str, str]]:
    """Key, default, meaning and options of every leaf, also of those of the mappings in lists."""
    known = leaves(kind)
    for leaf in every_leaf(kind):
        named = option_names(leaf) if known.get(leaf.name) == leaf else ()
        default = "required" if leaf.field.is_required() else default_text(leaf.field)
        options = " ".join(f"`{option}`" for option in named)
        yield ".".join(leaf.path), default, meaning(leaf.field), options
