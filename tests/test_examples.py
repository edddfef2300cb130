"""The scripts in examples/ and the files in configs/ do what they say, and a rule of one's own is held to the laws."""

import inspect
import re
import runpy
from collections.abc import Iterator
from dataclasses import MISSING, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from checkpoint_files import make_world, refusal, save, succeed, toy, tuned
from deltafl.experiments import STUDIES, read_suite
from deltafl.experiments.quickstart import VARIANTS
from deltafl.federated import FederatedRecipe
from deltafl.merge.candidates import check_methods
from deltafl.merge.reading import Training, source_of
from deltafl.merge.recipe import MergeRecipe
from deltafl.merge.search_recipe import SearchRecipe
from deltafl.recipes import read_recipe
from deltafl.rules.building import delta_rules, load_rules
from deltafl.rules.rule import RULES, ExampleRule, parameters
from deltafl.tasks.catalogue import catalogue
from laws import laws
from laws.worlds import make
from tiny_models import tiny_llama

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def loaded(name: str, run_name: str = "example") -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name=run_name)


@pytest.fixture
def own_rule() -> Iterator[Any]:
    """The rule of examples/own_rule.py, registered for the length of a test."""
    load_rules()
    rule = loaded("own_rule")["EqualLength"]
    yield rule
    del RULES["equal_length"]


def test_every_example_is_tested_here():
    names = ["one_server_step", "own_rule", "realdata", "task_vector_algebra"]
    assert [path.stem for path in EXAMPLES] == names


def test_task_vectors_add_forget_and_carry_over():
    results = loaded("task_vector_algebra")["main"]()
    gain = {name: after - before for name, (before, after) in results.items()}
    assert min(gain["addition, upside down"], gain["addition, mirrored"], gain["analogy"]) > 0.2
    assert gain["negation, digit 3"] < -0.5
    assert gain["negation, the others"] > -0.05


def test_a_federated_round_is_a_merge(tmp_path):
    assert loaded("one_server_step")["main"](tmp_path) is True
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert not torch.equal(merged["weight"], load_file(tmp_path / "base.safetensors")["weight"])


def test_an_own_rule_runs_as_a_script_and_could_stand_in_the_package(capsys):
    try:
        loaded("own_rule", "__main__")
    finally:
        RULES.pop("equal_length", None)
    assert capsys.readouterr().out == "weight [2.5, 2.5]\n"
    text = (ROOT / "examples" / "own_rule.py").read_text()
    assert re.findall(r"^from (deltafl\S*) import", text, re.MULTILINE) == ["deltafl.rules.rule"]


@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
def test_an_own_rule_keeps_the_laws(law, own_rule):
    for n, weights in ((3, None), (4, (1.0, 2.0, 1.0, 0.5))):
        made = make(n, seed=n)
        law(own_rule(), replace(made, weights=weights))


def test_an_own_rule_is_a_method_by_being_registered(own_rule, tmp_path):
    done = succeed(*make_world(tmp_path).args, "--method", "equal_length")
    assert "by equal_length" in done.out


def test_the_bundled_recipes_are_read():
    merge = read_recipe(MergeRecipe, ROOT / "configs" / "merge-example.yaml")
    search = read_recipe(SearchRecipe, ROOT / "configs" / "search-digits.yaml")
    paths = [f"quickstart/models/{name}" for name in VARIANTS]
    assert [model.path for model in merge.entries.values()] == paths
    assert [model.path for model in search.models] == paths
    assert [model.data for model in search.models] == [f"digits:{name}" for name in VARIANTS]
    assert search.base == "quickstart/base"
    for name in ("default.yaml", "realdata-quick.yaml"):
        assert read_recipe(FederatedRecipe, ROOT / "configs" / name)


def test_the_recipe_of_published_checkpoints_holds_every_rule_and_task():
    recipe = read_recipe(SearchRecipe, ROOT / "configs" / "clip-vit-b-32-ta8.yaml")
    assert sorted(name for name, _ in recipe.grids) == sorted(delta_rules())
    assert all(model.head == "zero-shot" and model.data in catalogue() for model in recipe.models)
    names = [m.path.removeprefix("tanganke/clip-vit-base-patch32_") for m in recipe.models]
    assert [name.replace("-", "_") for name in names] == [model.data for model in recipe.models]
    sources = [source_of(name, model, Training()) for name, model in recipe.entries.items()]
    check_methods(recipe.grids, sources)


def test_the_recipe_of_published_language_models_is_planned_on_small_ones_of_its_layout(
    tmp_path, monkeypatch
):
    """Two of the fine-tunes have a token more."""
    file = ROOT / "configs" / "llama-2-13b.yaml"
    recipe = read_recipe(SearchRecipe, file)
    for seed, name in enumerate((recipe.base, *(model.path for model in recipe.models))):
        folder = tmp_path / name
        tiny_llama(folder, seed, vocab_size=384 + (seed in (1, 2))).save(folder)
    monkeypatch.chdir(tmp_path)
    said = succeed("search", file, "--dry-run").out
    assert "merge 3 models into meta-llama/Llama-2-13b-hf" in said
    assert "2 tensors (left out by --include/--exclude)" in said
    rho = next(params["rho"] for name, params in recipe.grids if name == "fedgma")
    assert (rho[0], rho[-1], len(rho)) == (0.1, 1.0, 10)
    assert (recipe.scaling_coefs[0], recipe.scaling_coefs[-1]) == (0.05, 2.0)


STUDY = ROOT / "configs" / "realdata-study.yaml"


@pytest.mark.realdata
def test_the_study_on_real_data_has_all_settings_and_runs(tmp_path, monkeypatch, realdata):
    recipe, _ = read_suite(STUDY, {})
    assert [name for name in STUDIES if recipe.study.lacking(name)] == ["language"]
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DELTAFL_CACHE", str(tmp_path / "cache"))
    tasks = "--tasks examples.realdata:dtd examples.realdata:gtsrb --control examples.realdata:dtd"
    small = "--lr-values 1e-3 --steps-values 2 --methods median --scaling-coefs 0.3 --val-limit 50"
    limits = ("--test-limit", 50, "--jobs", 1, "--out", tmp_path / "out")
    options = (*tasks.split(), *small.split(), *limits)
    succeed("suite", "negation", "scaling-coef", "--config", STUDY, *options)
    assert "median" in (tmp_path / "out" / "scaling-coef" / "table.md").read_text()
    assert len(list((tmp_path / "out" / "works" / "fine-tunes").iterdir())) == 2


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def rows(page: str) -> list[list[str]]:
    """The cells of every table line of a page."""
    lines = [line for line in (ROOT / page).read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


@pytest.mark.parametrize("page", ["README.md", "docs/python.md", "docs/federated.md"])
def test_the_snippets_run(page, tmp_path, monkeypatch):
    base = toy()
    save(tmp_path / "base", base)
    for i, name in enumerate(("digits", "signs", "textures")):
        save(tmp_path / name, tuned(base, i))
    monkeypatch.chdir(tmp_path)
    snippets = blocks(page, "python")
    assert snippets
    names: dict[str, Any] = {}
    for snippet in snippets:
        exec(snippet, names)
    assert "weights" not in names or names["weights"].keys() == base.keys()


def test_the_real_data_plug_in_says_which_variable_it_needs(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("DELTAFL_REALDATA", raising=False)
    run = ("federate", "--config", "configs/realdata-quick.yaml", "--out", tmp_path / "run")
    assert "DELTAFL_REALDATA is not set" in refusal(tmp_path, *run)  # runs examples/realdata.py


def test_the_pages_show_the_files_as_they_are():
    (shown,) = blocks("docs/rules.md", "python")
    assert shown.strip() in (ROOT / "examples" / "own_rule.py").read_text()
    files = (ROOT / "configs" / n for n in ("merge-example.yaml", "search-digits.yaml"))
    *shown, task_of_lm_eval = blocks("docs/recipes.md", "yaml")
    assert shown == [file.read_text() for file in files]
    assert task_of_lm_eval.startswith("# colours.yaml")


LETTERS = {"F": "fixed_point", "O": "odd", "C": "coordinate_symmetric", "P": "order_free"}


def test_the_table_of_rules_is_that_of_the_registry():
    table = {row[0].strip("`"): row for row in rows("docs/rules.md") if row[0].startswith("`")}
    registry = load_rules()
    assert sorted(table) == list(registry)
    for name, (_, _, params, traits, source, file) in table.items():
        rule = registry[name]
        told = dict(re.findall(r"`(\w+)`(?: \(([^)]*)\))?", params))
        assert told.keys() == parameters(rule).keys(), name
        for key, (_, default) in parameters(rule).items():
            assert told[key] == ("" if default is MISSING else str(default)), (name, key)
        assert file.strip("`") == rule.__module__.rsplit(".", 1)[1] + ".py"
        paper = inspect.getdoc(inspect.getmodule(rule)) or ""
        assert source in paper or (source, name) == ("ours", "sequential_regression")
        if issubclass(rule, ExampleRule):
            assert traits == rule.needs
        elif name != "dare":
            promised = rule(**rule.typical()).traits
            letters = traits.split(";")[0].split()
            assert letters[-1] == promised.native_scale, name
            kept = {letter for letter, trait in LETTERS.items() if vars(promised)[trait]}
            assert kept == {*letters[:-1]}
