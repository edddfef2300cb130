"""What is known of a model before its tensors are read: layout, adapter, and how it was trained."""

import dataclasses
import json
from pathlib import Path

from pydantic import ConfigDict

from deltafl.checkpoints.adapter import Adapter, read_adapter
from deltafl.checkpoints.layout import Layout, fingerprint, read_layout
from deltafl.checkpoints.stack import split_stack, stacked
from deltafl.errors import DeltaflError, attempt
from deltafl.merge.recipe import ModelEntry
from deltafl.recipes import R, Recipe, read_recipe
from deltafl.rules.rule import Source


class Training(Recipe):
    """What training.json beside a model's weights says; other keys are let be."""

    model_config = ConfigDict(extra="ignore")

    num_examples: int | None = None
    num_steps: int | None = None
    lr: float | None = None
    momentum: float | None = None
    prox_mu: float | None = None
    seed: int | None = None
    base: dict[str, object] | None = None
    task: object = None
    epochs: object = None
    batch_size: object = None
    optimizer: object = None


def read_model(ref: str) -> Layout:
    """The layout of a model with its entries, or of a stack of layers, `A[0:24],B[8:32]`; a torch
    state dict is opened for them.
    """
    if parts := split_stack(ref):
        return stacked(ref, [(read_base(own), start, stop) for own, start, stop in parts])
    layout = read_layout(ref)
    if not layout.pickled:
        return layout
    from deltafl.checkpoints.checkpoint import entries_of, open_tensors

    return dataclasses.replace(layout, entries=entries_of(open_tensors(layout)))


def read_model_or_adapter(ref: str) -> tuple[Layout, Adapter | None]:
    """The layout of a model, or of an adapter and what that is."""
    layout = read_model(ref)
    return layout, read_adapter(layout)


def read_base(ref: str) -> Layout:
    """The layout of a model that is no adapter."""
    layout, adapter = read_model_or_adapter(ref)
    if adapter:
        raise DeltaflError(
            f'base "{ref}" is an adapter; make it a model: '
            f"deltafl merge --base {adapter.base} --models {ref} --out DIR"
        )
    return layout


def read_training(layout: Layout) -> Training:
    """Raises DeltaflError if it cannot be right. Without the file, and of a stack of layers,
    nothing is known.
    """
    file = layout.folder / "training.json"
    return read_json(Training, file) if file.is_file() and not layout.ranges else Training()


def read_json(kind: type[R], file: Path) -> R:
    """What a file says. Raises DeltaflError, naming the file, if it cannot be right."""
    problems = list[str]()
    try:
        found = attempt(problems, read_recipe, kind, {**json.loads(file.read_text())})
    except (ValueError, TypeError):
        found, problems = None, ["is not a JSON object"]
    if found is None:
        raise DeltaflError(*(f'"{file}": {line}; mend or remove it' for line in problems))
    return found


def source_of(name: str, model: ModelEntry, trained: Training) -> Source:
    """The Source of a model: what the user says goes before what training.json says."""
    told = {key: value for key, value in model if value is not None}
    known = {**dict(trained), **told, "name": name}
    return Source(**{field.name: known[field.name] for field in dataclasses.fields(Source)})


def other_base(
    name: str, trained: Training, base: Layout, adapter: Adapter | None = None
) -> str | None:
    """A line if training.json records a base with another fingerprint than this one, or an adapter
    is one of another base.
    """
    recorded = trained.base or {}
    if adapter.fits(base) if adapter else recorded.get("fingerprint") in (None, fingerprint(base)):
        return None
    known = adapter.base if adapter else recorded.get("id", "unknown")
    return (
        f'model "{name}": was fine-tuned from another base ("{known}") '
        f'than "{base.ref}"; give that base, or insist with --allow-other-base'
    )
