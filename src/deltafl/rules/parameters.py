"""The parameters of all rules as settings of recipes: a new rule's are there by themselves."""

import dataclasses
from collections import defaultdict
from typing import Any

from pydantic import Field, create_model

from deltafl.recipes import Recipe
from deltafl.rules.building import load_rules
from deltafl.rules.rule import parameters


class _Parametrised(Recipe):
    """A recipe that holds a rule's parameters beside its own settings; what is not given keeps the
    default of the rule.
    """

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: object) -> None:
        """Put the parameters after what a recipe says itself."""
        for name in _KINDS:
            cls.model_fields[name] = cls.model_fields.pop(name)
        super().__pydantic_init_subclass__(**kwargs)

    @property
    def params(self) -> dict[str, Any]:
        """The parameters that are given."""
        return self.model_dump(mode="json", include={*_KINDS})


def _known() -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Parameter -> its type, and parameter -> who takes it, with which default."""
    kinds, takers, rules = {}, defaultdict(list), load_rules()
    for name in rules:
        for key, (kind, default) in parameters(rules[name]).items():
            about = "required" if default is dataclasses.MISSING else f"default {default}"
            kinds.setdefault(key, kind)
            takers[key].append(f"{name} ({about})")
    return kinds, takers


def _recipe(about: str, kinds: dict[str, Any]) -> type[_Parametrised]:
    fields: dict[str, Any] = {}
    for key, kind in kinds.items():
        text = f"for {', '.join(_TAKERS[key])}"
        field = Field(None, description=text, exclude_if=lambda value: value is None)
        fields[key] = kind | None, field
    return create_model("RuleParameters", __base__=_Parametrised, __doc__=about, **fields)


_KINDS, _TAKERS = _known()

RuleParameters = _recipe("Parameters of a rule, beside its name.", _KINDS)

RuleGrids = _recipe(
    "Parameters of a rule, each one value or a list of values to choose from.",
    {key: kind | tuple[kind, ...] for key, kind in _KINDS.items()},
)
