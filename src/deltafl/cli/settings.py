"""The settings of a command that runs a recipe: a YAML file with the options on top, every key checked."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, fields
from typing import Any, get_args, get_type_hints

import click

from deltafl.errors import DeltaflError


def recipe_options(
    recipe: type, help_texts: Mapping[str, str], skip: Collection[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: one option for each field of a recipe, `--num-clients` for num_clients, with its default in the help.

    Every field that is not skipped needs a text.
    """
    hints = get_type_hints(recipe)

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for field in reversed([f for f in fields(recipe) if f.name not in skip]):
            kind = next(
                k
                for k in (get_args(hints[field.name]) or (hints[field.name],))
                if k is not type(None)
            )
            text = help_texts[field.name]
            if field.default not in (None, False, MISSING):
                text += f" Default: {field.default}."
            flag = f"--{field.name.replace('_', '-')}"
            command = click.option(
                flag, field.name, type=kind, is_flag=kind is bool, default=None, help=text
            )(command)
        return command

    return decorate


def read_settings(
    recipe: type,
    config: str | None,
    given: Mapping[str, Any],
    extra: Mapping[str, tuple[Any, Any]],
    defaults: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """All values: of the recipe's fields and of `extra` (name -> type, default; ... where there must be one).

    `defaults` go before the recipe's own, the file before them, what is `given` before that.

    Raises:
        DeltaflError: one line for each mistake in the file or the options.
    """
    from pydantic import create_model

    from deltafl.recipes import Recipe, load_yaml, parse

    hints = get_type_hints(recipe)
    known: dict[str, Any] = {
        f.name: (hints[f.name], f.default if f.default is not MISSING else f.default_factory())  # type: ignore[misc]
        for f in fields(recipe)
    }
    kind = create_model("Settings", __base__=Recipe, **known, **extra)  # type: ignore[call-overload]
    held = dict(defaults or {}) | (load_yaml(config) if config else {})
    held |= {k: v for k, v in given.items() if v is not None}
    lacking = [name for name, (_, default) in extra.items() if default is ... and name not in held]
    if lacking:
        raise DeltaflError(*(f"{name} is missing; name it with --{name}" for name in lacking))
    return parse(kind, held).model_dump()


EXTRA: dict[str, tuple[Any, Any]] = {
    "model": (str, ...),
    "data": (str, ...),
    "data_dir": (str | None, None),
    "out": (str, ...),
    "limit": (int | None, None),
    "device": (str | None, None),
}


def task_options(command: Any) -> Any:
    """Decorator: model, data and where to run."""
    options = [
        click.option(
            "--model",
            "--base",
            "model",
            help="Folder, hub id, module:attr, or a config.json for a new one.",
        ),
        click.option(
            "--data",
            help="The task: digits, a folder, a name (cifar100), hub:owner/name, module:attr.",
        ),
        click.option(
            "--data-dir",
            help="The folder that holds tasks by name; without it they come from the hub.",
        ),
        click.option("--limit", type=int, help="Keep at most so many examples of each split."),
        click.option("--device", help="cpu, cuda, cuda:1. Default: the GPU where there is one."),
        click.option(
            "--config",
            help="A YAML file with the same names (num_clients: 100); options go before it.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def load_model_and_task(held: Mapping[str, Any], seed: int) -> tuple[Any, Any]:
    """The encoder, and the task in the size that it takes."""
    encoder = load_encoder_of(held)
    return encoder, load_task_of(held, encoder, seed)


def load_encoder_of(held: Mapping[str, Any]) -> Any:
    """The encoder that the settings name."""
    from deltafl.models import load_encoder

    return load_encoder(held["model"])


def load_task_of(held: Mapping[str, Any], encoder: Any, seed: int) -> Any:
    """The task that the settings name, in the size that the encoder takes, with the validation split of a seed."""
    from deltafl.tasks.arrays import load_arrays

    size, channels = encoder.input.image_size, encoder.input.channels
    return load_arrays(
        held["data"],
        image_size=size,
        channels=channels,
        seed=seed,
        limit=held["limit"],
        data_dir=held["data_dir"],
    )
