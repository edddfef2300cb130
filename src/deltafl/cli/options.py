"""What several commands share: options that take many values, the rules' parameters, progress."""

import dataclasses
import sys
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from deltafl.cli.text import as_bytes, table
from deltafl.rules.rule import load_rules, parameters

__all__ = ["as_bytes", "table"]


class ManyValues(click.Command):
    """A command whose repeatable options also take several values at once: `--models A B C`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Write `--models A B` as `--models A --models B`, then parse as usual."""
        many = {
            o for p in self.params if isinstance(p, click.Option) and p.multiple for o in p.opts
        }
        spread: list[str] = []
        current = None
        for arg in args:
            name = arg.split("=", 1)[0]
            if arg.startswith("-") and not _is_number(arg):
                current = name if name in many else None
                if arg != current:
                    spread.append(arg)
            elif current is not None:
                spread += [current, arg]
            else:
                spread.append(arg)
        return super().parse_args(ctx, spread)


def _is_number(arg: str) -> bool:
    try:
        float(arg)
    except ValueError:
        return False
    return True


def rule_options(*taken: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: one option for every parameter of every rule, so that a new rule's parameters are there by itself.

    `taken`: parameters that the command has an option of its own for.
    """
    uses: dict[str, list[tuple[str, Any, Any]]] = {}
    rules = load_rules()
    for name in rules:
        for key, (hint, default) in parameters(rules[name]).items():
            uses.setdefault(key, []).append((name, hint, default))

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for key, users in reversed(uses.items()):
            if key not in taken:
                command = _rule_option(key, users)(command)
        return command

    return decorate


def _rule_option(key: str, users: Sequence[tuple[str, Any, Any]]) -> Callable[..., Any]:
    told = []
    for name, _, default in users:
        required = default is dataclasses.MISSING and key != "inner"
        shown = (
            "required"
            if required
            else ""
            if default is dataclasses.MISSING
            else f"default {default}"
        )
        told.append(f"{name} ({shown})" if shown else name)
    hint = users[0][1]
    return click.option(
        f"--{key.replace('_', '-')}", key, type=_click_type(hint), is_flag=hint is bool or None,
        default=None, help=f"For {', '.join(told)}.",
    )  # fmt: skip


def rule_parameter_names() -> set[str]:
    """Every parameter name of every rule."""
    rules = load_rules()
    return {key for name in rules for key in parameters(rules[name])}


def _click_type(hint: Any) -> Any:
    if typing.get_origin(hint) is typing.Literal:
        return click.Choice(typing.get_args(hint))
    kinds = [k for k in (typing.get_args(hint) or (hint,)) if k is not type(None)]
    return {int: int, float: float, bool: bool}.get(kinds[0], str)


@contextmanager
def progress_by_bytes(
    label: str, total: float, *, quiet: bool
) -> Iterator[Callable[[float], None]]:
    """A bar with bytes, rate and remaining time on stderr; yields the function that advances it."""
    if quiet or not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=Console(stderr=True), transient=True, auto_refresh=False
    ) as bar:
        task, draw = bar.add_task(label, total=total), _now_and_then(bar.refresh)

        def advance(count: float) -> None:
            bar.advance(task, count)
            draw()

        yield advance


def _now_and_then(draw: Callable[[], None]) -> Callable[[], None]:
    """`draw`, at most ten times a second: a thread that draws would be in the way of forked processes."""
    drawn = 0.0

    def call() -> None:
        nonlocal drawn
        if time.monotonic() - drawn >= 0.1:
            drawn = time.monotonic()
            draw()

    return call


@contextmanager
def progress_by_count(label: str, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar with count, rate and remaining time; yields a function that is told the total at each step."""
    with progress_by_stage(quiet=quiet) as on_stage:
        done = 0

        def advance(total: int) -> None:
            nonlocal done
            done += 1
            on_stage(label, done, total)

        yield advance


@contextmanager
def progress_by_stage(*, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """One bar for each stage, with count and remaining time; yields f(stage, done, total)."""
    if quiet or not sys.stderr.isatty():
        yield lambda stage, done, total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    look: dict[str, Any] = {
        "console": Console(stderr=True),
        "transient": True,
        "auto_refresh": False,
    }
    with Progress(*columns, TimeRemainingColumn(), **look) as bar:
        stages: dict[str, Any] = {}
        draw = _now_and_then(bar.refresh)

        def show(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                stages[stage] = bar.add_task(stage, total=total)
            bar.update(stages[stage], completed=done, total=total)
            draw()

        yield show
