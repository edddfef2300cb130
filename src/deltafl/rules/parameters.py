"""The parameters of all rules as settings of recipes: a new rule's are there by themselves."""

import dataclasses
from typing import Annotated, Any, TypeAlias

from pydantic.fields import FieldInfo

from deltafl.recipes import Flattened
from deltafl.rules.rule import load_rules, parameters


def rule_fields() -> dict[str, FieldInfo]:
    """Parameter -> its type, the default of the first rule that takes it, and who takes it."""
    fields: dict[str, FieldInfo] = {}
    rules = load_rules()
    for name in rules:
        for key, (hint, default) in parameters(rules[name]).items():
            required = default is dataclasses.MISSING
            about = name + (" (required)" if required else f" (default {default})")
            if key == "inner":
                hint, default, about = str, None, name
            if key in fields:
                fields[key].description = f"{fields[key].description}, {about}"
            else:
                default = None if required else default
                fields[key] = FieldInfo(
                    annotation=hint, default=default, description=f"For {about}"
                )
    return fields


def rule_grids() -> dict[str, FieldInfo]:
    """As `rule_fields`, where a list of values stands for each of them."""
    kinds: dict[str, Any] = {key: field.annotation for key, field in rule_fields().items()}
    grids: dict[str, Any] = {key: kind | list[kind] for key, kind in kinds.items()}
    return {key: FieldInfo(annotation=grid) for key, grid in grids.items()}


RuleParameters: TypeAlias = Annotated[dict[str, Any], Flattened(rule_fields)]
"""Parameters of a rule: name -> value; in a file and on the command line beside its name."""

RuleGrids: TypeAlias = Annotated[dict[str, Any], Flattened(rule_grids)]
"""Parameters of a rule, each one value or a list of values to choose from."""
