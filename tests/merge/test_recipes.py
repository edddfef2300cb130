"""Recipes: what they say is what the options say, and mistakes are named by their key."""

from pathlib import Path

import pytest

from checkpoint_files import cli, problems_of
from deltafl.errors import DeltaflError
from deltafl.merge.recipe import MergeRecipe, load_yaml, parse, parse_size

LEAST = {"base": "b", "models": ["x/m1", "m2"]}


def problems(held: dict) -> tuple[str, ...]:
    with pytest.raises(DeltaflError) as error:
        parse(MergeRecipe, held).spec()
    return error.value.problems


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("300 MB", 3 * 10**8),
        ("1.5kb", 1500),
        ("2MiB", 2**21),
        ("7", 7),
        (9, 9),
        ("1B", 1),
    ],
)
def test_sizes_are_read_with_their_units(text: int | str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5XB", "five", "-3GB", 0, -1, "nan", "infGB"])
def test_sizes_that_are_none_are_errors(text: int | str) -> None:
    with pytest.raises(DeltaflError, match=r"^max_shard_size: "):
        parse_size(text)


def test_models_are_called_by_the_last_part_of_their_path() -> None:
    assert [m.name for m in parse(MergeRecipe, LEAST).spec().models] == ["m1", "m2"]


def test_models_whose_last_parts_are_equal_are_called_by_their_path() -> None:
    held = LEAST | {"models": ["a/model", "b/model", "c"]}
    assert [m.name for m in parse(MergeRecipe, held).spec().models] == ["a/model", "b/model", "c"]


def test_one_model_twice_gets_a_number() -> None:
    held = LEAST | {"models": ["a/m", "a/m", {"path": "z", "name": "a/m"}]}
    names = [m.name for m in parse(MergeRecipe, held).spec().models]
    assert len(set(names)) == 3
    assert names[:2] == ["a/m", "a/m#2"]


def test_what_a_model_entry_says_reaches_the_spec() -> None:
    entry = {"path": "p", "name": "n", "weight": 2, "num_steps": 7, "num_examples": 9}
    spec = parse(MergeRecipe, LEAST | {"models": ["m", entry]}).spec()
    assert spec.weights == (1.0, 2.0)
    assert (spec.models[1].ref, spec.models[1].name) == ("p", "n")
    assert (spec.models[1].num_steps, spec.models[1].num_examples) == (7, 9)


def test_weight_patterns_keep_their_order() -> None:
    spec = parse(MergeRecipe, LEAST | {"weight_patterns": {"*.z": [1, 2], "*.a": [3, 4]}}).spec()
    assert spec.weight_patterns == (("*.z", (1.0, 2.0)), ("*.a", (3.0, 4.0)))
    spec = parse(MergeRecipe, LEAST | {"scale_patterns": {"*.z": 1, "*.a": 3}}).spec()
    assert spec.scale_patterns == (("*.z", 1.0), ("*.a", 3.0))


def test_defaults_are_those_of_the_library() -> None:
    import dataclasses

    from deltafl.merge.plan import MergeSpec

    spec = parse(MergeRecipe, LEAST).spec()
    plain = MergeSpec("b", spec.models, "task_arithmetic")
    assert dataclasses.asdict(spec) == dataclasses.asdict(plain)


@pytest.mark.parametrize(
    ("text", "value"), [("1e-5", 1e-5), ("-2.5E3", -2500.0), (".5e1", 5.0), ("1e+2", 100.0)]
)
def test_numbers_with_an_exponent_are_numbers(tmp_path: Path, text: str, value: float) -> None:
    (tmp_path / "r.yaml").write_text(f"server_lr: {text}\n")
    assert load_yaml(tmp_path / "r.yaml") == {"server_lr": value}


@pytest.mark.parametrize("text", ["e5", "1e", "1e5x", "12"])
def test_other_scalars_keep_their_type(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.yaml").write_text(f"key: {text}\n")
    assert load_yaml(tmp_path / "r.yaml") == {"key": 12 if text == "12" else text}


def test_a_key_given_twice_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("base: a\nmodels: [m]\nbase: b\n")
    (problem,) = problems_of(cli("merge", tmp_path / "r.yaml"))
    assert '"base" is given twice' in problem
    assert "line 3" in problem


def test_a_recipe_never_runs_code(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (tmp_path / "r.yaml").write_text(f"base: !!python/object/apply:os.system ['touch {mark}']\n")
    (problem,) = problems_of(cli("merge", tmp_path / "r.yaml"))
    assert "is not YAML" in problem
    assert not mark.exists()


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
        ({"models": [{"weight": 3}]}, "models.0.path: "),
        ({"models": [{"path": "a", "weight": "3"}]}, "models.0.weight: "),
        ({"models": [5]}, "models.0: "),
        ({"models": []}, "models: "),
        ({"num_steps": [1]}, "num_steps: 1 numbers for 2 models"),
        ({"weight_patterns": {"a": ["x"]}}, "weight_patterns.a.0: "),
        ({"max_shard_size": True}, "max_shard_size: "),
        ({"method": 3}, "method: "),
        ({"middle": "upper", "method": "median"}, "middle: "),
    ],
)
def test_a_mistake_is_one_line_that_begins_with_its_key(change: dict, wanted: str) -> None:
    found = problems(LEAST | change)
    assert len(found) == 1, found
    assert found[0].startswith(wanted)


def test_mistakes_of_parameters_and_counts_are_listed_together() -> None:
    found = problems(LEAST | {"num_steps": [1], "rh": 1, "rho": "x"})
    assert [p.split(":")[0] for p in found] == [
        "num_steps",
        'unknown key "rh"; did you mean "rho"?',
        "rho",
    ]
