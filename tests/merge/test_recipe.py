"""The recipes of merge and search: what they mean, and mistakes that are named by their key."""

from typing import Any

import pytest

from deltafl.errors import DeltaflError
from deltafl.merge.recipe import MergeRecipe
from deltafl.merge.search_recipe import SearchRecipe
from deltafl.recipes import read_recipe

LEAST: dict[str, Any] = {"base": "b", "models": ["x/m1", "m2"]}


@pytest.mark.parametrize(
    ("models", "names"),
    [
        (["a/model", "b/model", "c"], ["a/model", "b/model", "c"]),
        (["a/m", "a/m", {"path": "z", "name": "a/m"}], ["a/m", "a/m#2", "a/m#3"]),
    ],
)
def test_models_have_distinct_names(models: list[Any], names: list[str]) -> None:
    assert list(MergeRecipe.of(base="b", models=models).entries) == names


def test_what_is_said_of_a_model_beside_it_or_in_a_list() -> None:
    entries = [
        {"path": name, "weight": i, "num_steps": i + 2, "num_examples": i + 4}
        for i, name in enumerate(LEAST["models"], 1)
    ]
    beside = MergeRecipe.of(base="b", models=entries)
    listed = MergeRecipe.of(**LEAST, weights=[1, 2], num_steps=[3, 4], num_examples=[5, 6])
    assert beside.entries == listed.entries
    assert beside.model_weights == {"*": (1.0, 2.0)}
    patterns = MergeRecipe.of(**LEAST, weight_patterns={"*.z": [1, 2], "*.a": [3, 4]})
    rows = [("*.z", (1, 2)), ("*.a", (3, 4)), ("*", (1, 1))]
    assert list(patterns.model_weights.items()) == rows


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"modles": ["a"]}, 'unknown key "modles"; did you mean "models"?'),
        ({"rh": 0.5}, 'unknown key "rh"; did you mean "rho"?'),
        (
            {"models": [{"path": "a", "stps": 3}]},
            'unknown key "models.0.stps"; did you mean "models[].num',
        ),
        ({"models": [{"path": "a", "string": 3}]}, 'unknown key "models.0.string"; '),
        ({"models": [{"weight": 3}]}, "models.0.path is missing"),
        ({"models": [{"path": "a", "weight": "3"}]}, "models.0.weight: "),
        ({"models": [5]}, "models.0: "),
        ({"weights": [1, 2], "models": ["a", {"path": "b", "weight": 1}]}, "weights: given both"),
        ({"weight_patterns": {"a": ["x"]}}, "weight_patterns.a.0: "),
        ({"weight_patterns": {"a": [1.0]}}, 'weights of "a": 1 numbers for 2 models'),
        ({"method": 3}, "method: "),
        ({"models": []}, "models: "),
        ({"threads": -1}, "threads: "),
        ({"rho": True, "method": "fedgma"}, "rho: "),
        ({"max_shard_size": "5 apples"}, "max_shard_size: "),
        ({"max_shard_size": 0}, "max_shard_size: "),
        ({"dtype": "float31"}, 'dtype: unknown "float31"; did you mean "float32"?'),
        ({"middle": "upper", "method": "median"}, 'middle: unknown "upper"'),
    ],
)
def test_a_mistake_is_one_line_that_begins_with_its_key(change: Any, wanted: str) -> None:
    with pytest.raises(DeltaflError) as error:
        read_recipe(MergeRecipe, LEAST | change)
    (found,) = error.value.problems
    assert found.startswith(wanted)


def test_a_search_says_what_is_merged_for_each_candidate() -> None:
    shared: dict[str, Any] = {"base": "b", "scope": "encoder", "weights": [2.0], "out": "o"}
    shared["models"] = [{"path": "m", "data": "digits"}]
    recipe = SearchRecipe.of(**shared)
    chosen: dict[str, Any] = {"method": "fedgma", "scaling_coef": 0.3, "rho": 0.6}
    assert recipe.merge(**chosen) == MergeRecipe.of(**shared, **chosen)


def test_methods_of_a_search_are_names_or_grids() -> None:
    methods = ["median", {"method": "fedgma", "rho": [0.3, 0.6]}]
    recipe = SearchRecipe.of(base="b", models=[{"path": "m", "data": "digits"}], methods=methods)
    assert recipe.grids == [("median", {}), ("fedgma", {"rho": [0.3, 0.6]})]
    assert recipe.resolved()["methods"] == methods
