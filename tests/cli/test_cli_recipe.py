"""`deltafl recipe`: the file, the schema and the table that are made of the fields of a command's recipe."""

import json
from pathlib import Path
from typing import Any, get_args, get_origin

import click
import pytest

from checkpoint_files import cli, problems_of, succeed
from deltafl.cli import COMMANDS, app
from deltafl.cli.command import RecipeCommand, option_names
from deltafl.recipes import Recipe, all_leaves, leaves, read_recipe
from deltafl.rules.parameters import RuleParameters

FOUND = {name: app.get_command(click.Context(app), name) for name in COMMANDS}
RECIPES = {n: c.recipe for n, c in FOUND.items() if isinstance(c, RecipeCommand)}
FILLED: dict[str, Any] = {
    "models": ["m"],
    "kind": "gram",
    "search": [{"path": "m", "data": "digits"}],
}

every_recipe = pytest.mark.parametrize("name", RECIPES)


def fill(kind: type[Recipe], command: str) -> dict[str, Any]:
    """A value for each required setting."""
    found: dict[str, Any] = dict(
        {"finetune": {"steps": 1}, "extract": {"rank": 2}, "merge": {"models": ("x",)}}.get(
            command, {}
        )
    )
    for leaf in leaves(kind).values():
        if leaf.field.is_required():
            found[leaf.name] = FILLED.get(command) or FILLED.get(leaf.name, "x")
            found[leaf.name] = "x" if leaf.field.annotation is str else found[leaf.name]
    return found | ({"sparsity_ratio": 0.5} if command == "mask" else {})


@every_recipe
def test_the_file_holds_every_key_and_says_what_the_defaults_say(name: str, tmp_path: Path):
    kind = RECIPES[name]
    text = succeed("recipe", name).out
    (tmp_path / "r.yaml").write_text(text)
    given = fill(kind, name)
    assert read_recipe(kind, tmp_path / "r.yaml", given) == kind.of(**given)
    live = text.replace("# ", "")
    assert all(f"{leaf.name}:" in live for leaf in leaves(kind).values())


def parts_of(annotation: object) -> list[object]:
    """A type, and those in its brackets."""
    return [annotation, *(part for one in get_args(annotation) for part in parts_of(one))]


def is_mapping(part: object) -> bool:
    """Whether a file holds keys there."""
    kind = get_origin(part) or part
    return isinstance(kind, type) and issubclass(kind, dict | Recipe)


@every_recipe
def test_the_schema_names_every_key_and_every_setting_says_what_it_is(name: str):
    schema = json.loads(succeed("recipe", name, "--schema").out)
    sections = [schema, *schema.get("$defs", {}).values()]
    known = {key for part in sections for key in part.get("properties", {})}
    assert leaves(RECIPES[name]).keys() <= known
    for leaf in leaves(RECIPES[name]).values():
        assert leaf.field.description, leaf.path
        if not option_names(leaf) and leaf.flags:  # only what is no option may have no name of one
            assert any(map(is_mapping, parts_of(leaf.field.annotation))), leaf.path
    names = [leaf.name for leaf in all_leaves(RECIPES[name])]
    shared = {n for n in names if names.count(n) > 1}
    assert shared <= RuleParameters.model_fields.keys(), "only parameters of rules share a name"


def test_the_page_of_settings_is_what_the_recipes_say():
    page = (Path(__file__).parents[2] / "docs" / "settings.md").read_text()
    tables = page[page.index("## ") :]
    assert tables == succeed("recipe", "--markdown").out, "write what it prints into the page"
    assert succeed("recipe", "merge", "--markdown").out in tables
    (said,) = problems_of(cli("recipe", "merg"))
    assert said == 'name a command that has a recipe; did you mean "merge"?'
