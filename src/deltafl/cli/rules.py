"""`deltafl rules`."""

import dataclasses
import inspect

import click

from deltafl.rules.building import load_rules
from deltafl.rules.rule import parameters


@click.command()
@click.argument("name", required=False)
def rules_command(name: str | None) -> None:
    """List every method with its formula, parameters and traits of its default form, or one."""
    registry = load_rules()
    for key in [name] if name else list(registry):
        rule = registry[key]
        click.echo(click.style(key, bold=True))
        click.echo("  " + (inspect.getdoc(rule) or "").replace("\n", "\n  "))
        for parameter, (_, default) in parameters(rule).items():
            shown = "required" if default is dataclasses.MISSING else f"default {default}"
            click.echo(f"  --{parameter.replace('_', '-')}  {shown}")
        traits = dataclasses.asdict(rule(**rule.typical()).traits)
        click.echo(
            f"  native scale: {traits.pop('native_scale')}; "
            f"{', '.join(trait for trait, kept in traits.items() if kept)}"
        )
        click.echo(f"  needs: {rule.needs}")
        click.echo(f"  file: rules/{rule.__module__.rsplit('.', 1)[-1]}.py\n")
