"""The README.md of a merged folder: what the hub and its readers want to know."""

import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from deltafl.checkpoints.layout import Layout, split_ref
from deltafl.merge.plan import Facts, Plan
from deltafl.rendering import render

KEPT = ("license", "license_name", "license_link", "language")
"""What is the base's to say."""


def model_card(plan: Plan, record: Facts, title: str, rows: Sequence[Facts] = ()) -> str:
    """Front matter and text. rows: of a search, with its test scores by task."""
    recipe, folder = plan.recipe, plan.base.folder
    whole = "transformers" if (folder / "config.json").is_file() else None
    inputs = plan.inputs[:1] if recipe.adapter else plan.inputs
    about = {
        "base_model": [name for layout in inputs if (name := _hub_id(layout))],
        "library_name": "peft" if recipe.adapter else whole,
        **{key: value for key, value in _front_matter(folder).items() if key in KEPT},
        "tags": ["merge", "deltafl"] + ["lora"] * recipe.adapter,
    }
    given = recipe.model_dump(mode="json", exclude_defaults=True, exclude_unset=True)
    return render(
        "card.md",
        about=_yaml({key: value for key, value in about.items() if value}),
        recipe=_yaml({key: given[key] for key in given if key in recipe.content()}),
        title=title,
        plan=plan,
        record=record,
        rows=rows,
    )


def _yaml(data: Facts) -> str:
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True).rstrip()


def _hub_id(layout: Layout) -> str:
    """The id, or "" of what lies here: the hub takes no card that names anything else."""
    return split_ref(layout.ref)[1].partition("@")[0] if layout.revision else ""


def _front_matter(folder: Path) -> Facts:
    """What a model's own card says; {} if there is none to be read."""
    file = folder / "README.md"
    text = file.read_text(errors="replace") if file.is_file() else ""
    try:
        found = yaml.safe_load((re.findall(r"\A---\n(.*?)\n---", text, re.DOTALL) or [""])[0])
    except yaml.YAMLError:
        found = None
    return found if isinstance(found, dict) else {}
