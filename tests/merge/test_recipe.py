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
        (["x/m1", "m2"], ["m1", "m2"]),
        (["a/model", "b/model", "c"], ["a/model", "b/model", "c"]),
        (["a/m", "a/m", {"path": "z", "name": "a/m"}], ["a/m", "a/m#2", "a/m#3"]),
    ],
)
def test_models_have_distinct_names(models: list[Any], names: list[str]) -> None:
    assert list(MergeRecipe.of(base="b", models=models).entries) == names


def test_what_is_said_of_a_model_beside_it_or_in_a_list() -> None:
    entry = {"path": "p", "name": "n", "weight": 2, "num_steps": 7, "num_examples": 9}
    recipe = MergeRecipe.of(base="b", models=["m", entry])
    assert recipe.model_weights == {"*": (1.0, 2.0)}
    model = recipe.entries["n"]
    assert (model.path, model.num_steps, model.num_examples) == ("p", 7, 9)
    listed = MergeRecipe.of(**LEAST, weights=[1, 2], num_steps=[3, 4], num_examples=[5, 6])
    assert [(m.weight, m.num_steps, m.num_examples) for m in listed.entries.values()] == [
        (1, 3, 5),
        (2, 4, 6),
    ]


def test_patterns_keep_their_order() -> None:
    by_name = {"*.z": [1, 2], "*.a": [3, 4]}
    recipe = MergeRecipe.of(**LEAST, weight_patterns=by_name, scale_patterns={"*.z": 1, "*.a": 3})
    rows = [("*.z", (1, 2)), ("*.a", (3, 4)), ("*", (1, 1))]
    assert list(recipe.model_weights.items()) == rows
    assert list(recipe.scale_patterns.items()) == [("*.z", 1), ("*.a", 3)]


def test_the_parameters_of_a_rule_stand_beside_its_name() -> None:
    recipe = MergeRecipe.of(**LEAST, method="fedgma", rho=0.6)
    assert recipe.params == {"rho": 0.6}
    assert recipe.resolved()["rho"] == 0.6
    assert "params" not in recipe.resolved()


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"modles": ["a"]}, 'unknown key "modles"; did you mean "models"?'),
        ({"rh": 0.5}, 'unknown key "rh"; did you mean "rho"?'),
        (
            {"models": [{"path": "a", "stps": 3}]},
            'unknown key "models.0.stps"; did you mean "num_steps"?',
        ),
        ({"models": [{"path": "a", "string": 3}]}, 'unknown key "models.0.string"; '),
        ({"models": [{"weight": 3}]}, "models.0.path is missing"),
        ({"models": [{"path": "a", "weight": "3"}]}, "models.0.weight: "),
        ({"models": [5]}, "models.0: "),
        ({"models": []}, "models: "),
        ({"num_steps": [1]}, "num_steps: 1 numbers for 2 models"),
        ({"weights": [1]}, "weights: 1 numbers for 2 models"),
        ({"weights": [0, 0]}, "weights: all are 0"),
        ({"weights": [1, 2], "models": ["a", {"path": "b", "weight": 1}]}, "weights: given both"),
        ({"weight_patterns": {"a": ["x"]}}, "weight_patterns.a.0: "),
        ({"weight_patterns": {"a": [1.0]}}, 'weights of "a": 1 numbers for 2 models'),
        ({"server_lr": 1, "scaling_coef": 1}, "server_lr and scaling_coef are two ways"),
        ({"scaling_coef": float("nan")}, "scaling_coef: must be a finite number"),
        ({"max_shard_size": 0}, "max_shard_size: "),
        ({"method": 3}, "method: "),
        ({"dtype": "float31"}, 'dtype: unknown "float31"; did you mean "float32"?'),
        ({"middle": "upper", "method": "median"}, 'middle: unknown "upper"'),
    ],
)
def test_a_mistake_is_one_line_that_begins_with_its_key(
    change: dict[str, Any], wanted: str
) -> None:
    with pytest.raises(DeltaflError) as error:
        read_recipe(MergeRecipe, LEAST | change)
    (found,) = error.value.problems
    assert found.startswith(wanted)


SEARCH: dict[str, Any] = {"base": "b", "models": [{"path": "m", "data": "digits"}]}


def test_a_search_says_what_is_merged_for_each_candidate() -> None:
    recipe = SearchRecipe.of(**SEARCH, scope="encoder", weights=[2.0], out="o")
    assert recipe.merge(method="fedgma", scaling_coef=0.3, rho=0.6) == MergeRecipe.of(
        base="b",
        models=[{"path": "m"}],
        scope="encoder",
        weights=[2.0],
        out="o",
        method="fedgma",
        scaling_coef=0.3,
        rho=0.6,
    )


def test_methods_of_a_search_are_names_or_grids() -> None:
    methods = [
        "median",
        {"method": "fedgma", "rho": [0.3, 0.6]},
        {"method": "ties", "density": 0.2},
    ]
    recipe = SearchRecipe.of(**SEARCH, methods=methods)
    assert recipe.grids == [
        ("median", {}),
        ("fedgma", {"rho": [0.3, 0.6]}),
        ("ties", {"density": 0.2}),
    ]
    assert recipe.resolved()["methods"] == methods
