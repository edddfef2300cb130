"""Recipes: what a file and options say together, and one line with the key's path for every mistake."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
import yaml
from pydantic import ByteSize, Field

from checkpoint_files import fails
from deltafl.errors import DeltaflError
from deltafl.recipe_file import load_yaml
from deltafl.recipes import Incidental, Recipe, leaves, one_of, read_recipe


class Entry(Recipe):
    path: str
    weight: float = 1.0


class Sparse(Recipe):
    sparsity_ratio: float = Field(0.0, ge=0, lt=1, description="Share of frozen coordinates.")
    strategy: Literal["random", "least_sensitive"] = "random"

    def problems(self):
        if self.sparsity_ratio == 0.5:
            yield "a half is refused"


class Server(Recipe):
    rule: Annotated[str, one_of(lambda: ["fedavg", "ties"])] = "fedavg"
    density: float | dict[str, list[float]] | None = None
    seed: int | None = None


class Whole(Recipe):
    renamed: ClassVar = {
        "K": "num_clients",
        "engine": "it is gone",
        "sparse.ratio": "sparse.sparsity_ratio",
    }
    alternatives = (("steps", "epochs"),)

    model: str
    models: tuple[str | Entry, ...] = ()
    num_clients: int = Field(100, ge=1)
    steps: int | None = None
    epochs: float | None = None
    sparse: Sparse = Sparse()
    server: Server = Server()
    size: ByteSize = Field(5_000_000_000, gt=0)
    by_name: dict[str, list[float]] = Field({})
    out: Annotated[str | None, Incidental] = None
    seed: int = 0


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"model": None}, "model: must be a valid string, not None"),
        ({"num_client": 3}, 'unknown key "num_client"; did you mean "num_clients"?'),
        ({"num_clients": 0}, "num_clients: must be greater than or equal to 1, not 0"),
        ({"num_clients": True}, "num_clients: must be a valid integer, not True"),
        ({"num_clients": "3"}, "num_clients: must be a valid integer, not '3'"),
        ({"epochs": float("nan")}, "epochs: must be a finite number, not nan"),
        ({"models": "a"}, "models: must be a valid tuple, not 'a'"),
        ({"models": ["a", 3]}, "models.1: must be a valid string, not 3"),
        ({"models": ["a", {}]}, "models.1.path is missing; name it"),
        (
            {"models": [{"path": "a", "wight": 1}]},
            'unknown key "models.0.wight"; did you mean "models[].weight"?',
        ),
        ({"by_name": {"a": [1, "x"]}}, "by_name.a.1: must be a valid number, not 'x'"),
        ({"sparse": 3}, "sparse: must be a mapping of keys to values, not 3"),
        ({"sparse": {"sparsity_ratio": 1}}, "sparse.sparsity_ratio: must be less than 1, not 1"),
        ({"sparse": {"sparsity_ratio": 0.5}}, "sparse: a half is refused"),
        (
            {"sparse": {"strategy": "randm"}},
            'sparse.strategy: unknown "randm"; did you mean "random"?',
        ),
        (
            {"sparsity_rato": 0},
            'unknown key "sparsity_rato"; did you mean "sparse.sparsity_ratio"?',
        ),
        ({"server": {"rule": "tis"}}, 'server.rule: unknown "tis"; did you mean "ties"?'),
        ({"server": {"density": "x"}}, "server.density: must be a valid number, not 'x'"),
        ({"server": {"rul": 1}}, 'unknown key "server.rul"; did you mean "server.rule"?'),
        ({"size": "5XB"}, "size: could not interpret byte unit: XB, not '5XB'"),
        *(
            (
                {"size": wrong},
                f"size: could not parse value and unit from byte string, not {wrong!r}",
            )
            for wrong in (-1, "nanGB")
        ),
        ({"size": 0}, "size: must be greater than 0, not 0"),
        ({"K": 3}, '"K" is now "num_clients"'),
        ({"engine": "vmap"}, '"engine": it is gone'),
        ({"sparse": {"ratio": 0.1}}, '"sparse.ratio" is now "sparse.sparsity_ratio"'),
        ({"sparsity_ratio": 0.1}, '"sparsity_ratio" is now "sparse.sparsity_ratio"'),
    ],
)
def test_a_mistake_is_one_line_with_the_path_of_its_key(data: dict[str, Any], told: str):
    with pytest.raises(DeltaflError) as caught:
        read_recipe(Whole, {"model": "m"} | data)
    assert str(caught.value) == told


def test_all_mistakes_are_told_at_once():
    data = {
        "num_clients": 0,
        "density": 3,
        "seed": "x",
        "sparse": {"strategy": 3},
        "server": {"q": 1},
    }
    with pytest.raises(DeltaflError) as caught:
        read_recipe(Whole, data)
    assert {line.split(":")[0].split(";")[0] for line in caught.value.problems} == {
        '"density" is now "server.density"',
        "model is missing",
        "num_clients",
        "seed",
        "sparse.strategy",
        'unknown key "server.q"',
    }


def test_options_go_before_the_file_and_the_file_before_defaults(tmp_path: Path):
    (tmp_path / "r.yaml").write_text(
        "model: m\nsparse: {sparsity_ratio: 0.1}\nepochs: 3\nsize: 3MB"
    )
    recipe = read_recipe(
        Whole,
        tmp_path / "r.yaml",
        {"sparsity_ratio": 0.2, "density": 0.3},
        defaults={"sparsity_ratio": 0.9, "seed": 4, "num_clients": 7, "steps": 5},
    )
    assert recipe == Whole(
        model="m",
        epochs=3.0,
        seed=4,
        num_clients=7,
        size=3_000_000,
        sparse=Sparse(sparsity_ratio=0.2),
        server=Server(density=0.3),
    )
    assert read_recipe(Whole, tmp_path / "r.yaml", {"steps": 2}).epochs is None, "an alternative"


def test_a_section_may_be_given_as_its_leaf_of_the_same_name(tmp_path: Path):
    class Head(Recipe):
        head: str = "ridge"
        few_shot: int | None = None

    class Run(Recipe):
        head: Head = Head()

    (tmp_path / "r.yaml").write_text("head: probe")
    probe = Run(head=Head(head="probe", few_shot=3))
    assert read_recipe(Run, tmp_path / "r.yaml", {"few_shot": 3}) == probe
    assert Run.of(head="probe", few_shot=3) == probe == Run.of(head=probe.head)
    assert read_recipe(Run, {"head": {"head": "probe", "few_shot": 3}}) == probe
    fails('"few_shot" is now "head', read_recipe, Run, {"few_shot": 3})
    assert {"type": "string"} in Run.model_json_schema()["properties"]["head"]["anyOf"]


def test_a_recipe_is_what_its_own_resolved_settings_say():
    recipe = Whole.of(model="m", models=["a", {"path": "b"}], density={"*": [0.5]}, out="o")
    assert read_recipe(Whole, recipe.resolved()) == recipe
    assert yaml.safe_load(yaml.safe_dump(recipe.resolved())) == recipe.resolved()
    assert recipe.content() == {k: v for k, v in recipe.resolved().items() if k != "out"}


def test_a_recipe_with_other_values_is_checked():
    recipe = Whole.of(model="m", steps=3).replace(sparsity_ratio=0.25, epochs=1.0)
    assert (recipe.steps, recipe.epochs, recipe.sparse.sparsity_ratio) == (None, 1.0, 0.25)
    fails(r"sparse\.sparsity_ratio", recipe.replace, sparsity_ratio=2.0)
    fails("unknown key", recipe.replace, sparsity=0.1)


def test_the_outermost_leaf_of_a_name_is_meant_where_it_stands_alone():
    assert leaves(Whole)["seed"].path == ("seed",)
    assert leaves(Whole)["density"].path == ("server", "density")
    recipe = read_recipe(Whole, {"model": "m", "server": {"seed": 3}}, {"seed": 4})
    assert (recipe.seed, recipe.server.seed) == (4, 3)


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("300 MiB", 300 * 2**20), ("1.5kb", 1500), (17, 17), ("1B", 1)],
)
def test_sizes(text: str | int, size: int):
    assert Whole.of(model="m", size=text).size == size


def test_yaml_reads_exponents_as_numbers_and_words_as_words(tmp_path: Path):
    numbers = {"1e-5": 1e-5, "2E3": 2000.0, "1.5e-3": 0.0015, "-1e2": -100.0}
    wanted = numbers | {word: word for word in ("e5", "1e", "x1e5", "12e-3x")}
    (tmp_path / "r.yaml").write_text("\n".join(f"k{i}: {t}" for i, t in enumerate(wanted)))
    assert [*load_yaml(tmp_path / "r.yaml").values()] == [*wanted.values()]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: [", "is not YAML"),
        ("a: 1\na: 2", '"a" is given twice'),
        ("- a", "must be a mapping"),
        ("", "must be a mapping"),
        ("a: \x00", "is not YAML"),
        ("a: !!python/object/apply:os.system ['touch ran']", "is not YAML"),
        ("base: &x [*x]", "Circular reference"),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_no_mapping_is_one_line(tmp_path: Path, text: str | None, told: str):
    if text is not None:
        (tmp_path / "r.yaml").write_text(text)
    fails(f"r.yaml.*{told}|{told}.*r.yaml", load_yaml, tmp_path / "r.yaml")
