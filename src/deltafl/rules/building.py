"""The rules that there are, by name, and how one is made of its parameters."""

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping

from deltafl.errors import DeltaflError, did_you_mean
from deltafl.registry import Registry
from deltafl.rules.rule import RULES, ExampleRule, Rule, parameters


def load_rules() -> Registry[type[Rule]]:
    """RULES with every file of `deltafl.rules` imported."""
    package = importlib.import_module("deltafl.rules")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"deltafl.rules.{module.name}")
    return RULES


def delta_rules() -> dict[str, type[Rule]]:
    """Those of any number of models that need no examples: for merges and for a server alike."""
    rules = load_rules()
    return {
        name: rules[name]
        for name in rules
        if not issubclass(rules[name], ExampleRule) and rules[name].num_models is None
    }


def build_rule(name: str, params: Mapping[str, object]) -> Rule:
    """The rule called `name`; a rule that wraps another hands on the parameters it does not have.

    Raises DeltaflError for unknown and for missing parameters, all at once.
    """
    rule, own, problems = load_rules()[name], dict(params), list[str]()
    known, inner = parameters(rule), params.get("inner")
    if "inner" in known and isinstance(inner, str):
        rest = {key: own.pop(key) for key in params if key not in known}
        try:
            own["inner"] = build_rule(inner, rest)
        except DeltaflError as error:
            problems += error.problems
    problems += [
        f'method {name} has no parameter "{key}"; {did_you_mean(key, known)}'
        for key in own
        if key not in known
    ]
    problems += [
        f"method {name} needs --{key.replace('_', '-')}"
        for key, (_, default) in known.items()
        if default is dataclasses.MISSING and key not in own
    ]
    if problems:
        raise DeltaflError(*problems)
    return rule(**own)
