"""A search over real fine-tunes of a tiny ViT on the digits: what it reads, and that its winner is what it writes."""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from deltafl.checkpoints.checkpoint import Checkpoint
from deltafl.errors import DeltaflError
from deltafl.merge import search_run
from deltafl.merge.search import Goal
from deltafl.merge.search_recipe import SearchRecipe
from deltafl.merge.search_run import SINGLE, UNMERGED, run_search
from deltafl.models import HEAD_FILE, load_net
from deltafl.models.fit import random_head
from deltafl.models.head import save_head
from deltafl.tasks import DataRecipe, load_task, loading
from deltafl.training import TrainingRecipe, finetune
from deltafl.training.step import scores
from tiny_models import judged, tiny_llama, vit_file

VARIANTS = ("mirrored", "thick")
METHODS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("task_arithmetic", {}), ("fednova", {}), ("fedgma", {"rho": [0.4, 1.0]}), ("median", {}),
    ("cclip", {"unit": "quantile", "rho": [0.5, 1.0]}),
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_digits(tmp_path_factory)


def train_digits(factory: pytest.TempPathFactory) -> Path:
    """The folder of a base and a fine-tune of it on each variant, with the base's head; made once for all tests."""
    root = factory.getbasetemp() / "trained-digits"
    if root.exists():
        return root
    base = TrainingRecipe.of(
        model=vit_file(num_hidden_layers=1), data="digits:pretrain", steps=30, lr=3e-3, head="linear",
        train_head=True, out=str(root / "base"),
    )  # fmt: skip
    head = str(root / "base" / HEAD_FILE)
    tunes = [
        TrainingRecipe.of(
            model=str(root / "base"), data=f"digits:{variant}", steps=10 + 10 * i, lr=1e-3, head=head,
            out=str(root / variant),
        )
        for i, variant in enumerate(VARIANTS)
    ]  # fmt: skip
    for recipe in (base, *tunes):
        net = load_net(recipe.model)
        finetune(net, load_task(recipe.data, net.inputs), recipe)
    return root


def search_recipe(root: Path, **changes: Any) -> SearchRecipe:
    models = [{"path": str(root / v), "data": f"digits:{v}"} for v in VARIANTS]
    recipe = SearchRecipe.of(
        base=str(root / "base"),
        models=models,
        methods=[{"method": name, **params} for name, params in METHODS],
        scaling_coefs=[0.3, 0.8],
        threads=1,
    )
    return recipe.replace(**changes)


def run(recipe: SearchRecipe, out: Path | None = None) -> dict[str, Any]:
    result = run_search(recipe, out)
    return {k: v for k, v in result.items() if k != "seconds"}


def test_the_rows_are_singles_base_and_each_method_with_their_own_test_scores(
    trained: Path,
) -> None:
    result = run(search_recipe(trained))
    assert [r["rule"] for r in result["rows"]] == [SINGLE, UNMERGED, *(m for m, _ in METHODS)]
    for i, variant in enumerate(VARIANTS):
        data, name, head = f"digits:{variant}", result["tasks"][i], trained / "base" / HEAD_FILE
        assert result["single"][name] == judged(trained / variant, data).score
        assert result["single_val"][name] == judged(trained / variant, data, "val").score
        assert result["rows"][1]["test"][name] == judged(trained / "base", data, head=head).score
    for row in result["rows"]:
        assert row["mean"] == pytest.approx(sum(row["test"].values()) / 2)
        normalized = sum(row["test"][t] / result["single"][t] for t in result["tasks"]) / 2
        assert row["normalized"] == pytest.approx(normalized)


# What is read


def counting(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, key: Callable[..., object]
) -> Counter[object]:
    """Count the calls of a method by `key(*arguments)`."""
    counts: Counter[object] = Counter()
    original = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        counts[key(*args, **kwargs)] += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return counts


def test_nothing_is_read_or_decoded_again_for_every_candidate(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = counting(monkeypatch, loading, "digits", lambda variant, *_: f"digits_{variant}")
    reads = counting(
        monkeypatch, Checkpoint, "read", lambda held, name, *_: (held.layout.ref, name)
    )
    held = run(search_recipe(trained))
    assert decoded == {f"digits_{v}": 1 for v in VARIANTS}
    assert {ref for ref, _ in reads} == {str(trained / n) for n in ("base", *VARIANTS)}
    assert set(reads.values()) == {1}
    assert run(search_recipe(trained, memory=0)) == held
    counts = []
    for lambdas in ((0.1,), (0.1, 0.2, 0.3, 0.4)):
        reads.clear()
        run(search_recipe(trained, memory=0, methods=["median"], scaling_coefs=lambdas))
        counts.append([n for (ref, _), n in reads.items() if ref != str(trained / "base")])
    assert counts[0] == counts[1]


# What is refused, before any work


def refused(recipe: SearchRecipe, monkeypatch: pytest.MonkeyPatch) -> DeltaflError:
    """The error of a search that must not come to scoring anything."""
    scored = counting(monkeypatch, Goal, "scores", lambda *rest: None)
    with pytest.raises(DeltaflError) as error:
        run(recipe)
    assert not scored
    return error.value


def test_each_model_names_the_columns_of_its_own_data(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_task(data: DataRecipe, *_: object) -> None:
        raise DeltaflError(f"{data.data} {data.image_column}")

    monkeypatch.setattr(search_run, "load_task", load_task)
    models = [m | {"image_column": "img"} for m in search_recipe(trained).resolved()["models"]]
    with pytest.raises(DeltaflError, match="digits:mirrored img"):
        run(search_recipe(trained, models=models))


def test_unknown_methods_are_found_before_any_data_is_loaded(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_run, "load_task", lambda *rest: pytest.fail("data was loaded"))
    methods = ["fedgm", {"method": "median", "rho": 1.0}]
    assert len(refused(search_recipe(trained, methods=methods), monkeypatch).problems) == 2


def test_heads_that_are_missing_or_of_another_model_are_all_reported(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = (tmp_path / "none.safetensors", tmp_path / "wide.safetensors")
    save_head(random_head(32, tuple("0123456789"), torch.Generator()), heads[1])
    models = [
        m | {"head": str(head)}
        for m, head in zip(search_recipe(trained).resolved()["models"], heads, strict=True)
    ]
    error = refused(search_recipe(trained, models=models), monkeypatch)
    assert len(error.problems) == 2
    assert 'none.safetensors" cannot be read' in error.problems[0]
    assert 'wide.safetensors" takes 32 features, the model gives 16' in error.problems[1]


# Language


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tune_on_lines(tmp_path_factory.mktemp("spoken"))


def tune_on_lines(root: Path) -> Path:
    """Write a tiny Llama, two folders of lines, and a fine-tune of it on each of them."""
    base = tiny_llama(root / "base")
    base.save(root / "base")
    for source, text in (("sums", "{} and {} are more"), ("days", "the {}th of May {}")):
        (root / source).mkdir()
        for split in ("train", "test"):
            lines = "\n".join(text.format(i % 7, i) for i in range(30))
            (root / source / f"{split}.txt").write_text(lines)
        recipe = TrainingRecipe.of(
            model=str(root / "base"), data=str(root / source), steps=20, lr=3e-3, batch_size=9,
            out=str(root / f"on-{source}"),
        )  # fmt: skip
        net = load_net(recipe.model)
        finetune(net, load_task(recipe.data, net.inputs), recipe)
    return root


def language_recipe(root: Path, **changes: Any) -> SearchRecipe:
    sources = ("sums", "days")
    recipe = SearchRecipe.of(
        base=str(root / "base"),
        models=[{"path": str(root / f"on-{s}"), "data": str(root / s)} for s in sources],
        methods=["task_arithmetic", {"method": "ties", "density": 0.5}, "median"],
        scaling_coefs=[0.2, 0.5, 1.0],
        metric="absolute",
        threads=1,
    )
    return recipe.replace(**changes)


def test_language_models_are_searched_by_the_likelihood_of_lines(
    spoken: Path, tmp_path: Path
) -> None:
    result = run(language_recipe(spoken), tmp_path / "merged")
    best, base = result["best"], result["candidates"][0]
    assert result["metric"] == "log-likelihood"
    assert base["value"] < best["value"] < 0
    assert all(row["normalized"] is None for row in result["rows"])
    net = load_net(tmp_path / "merged")
    for name in result["tasks"]:
        task = load_task(str(spoken / name), net.inputs)
        assert float(scores(net, task, "val").double().mean()) == best["val"][name]
        own = load_net(spoken / f"on-{name}")
        assert float(scores(own, task, "test").double().mean()) == result["single"][name]


@pytest.mark.parametrize("each_method", [False, True])
def test_a_race_of_language_models_has_the_same_winner(spoken: Path, each_method: bool) -> None:
    whole = run(language_recipe(spoken))
    raced = run(language_recipe(spoken, strategy="racing", each_method=each_method))
    assert raced["best"]["value"] == whole["best"]["value"]
    assert raced["rows"] == whole["rows"] or not each_method


def test_a_likelihood_is_not_divided_by_another(
    spoken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_ratio = 'task "{}": log-likelihood is no ratio, so that it cannot be '
    reasons = {
        "metric": ("normalized", "divided by that of the task's own model; give --metric absolute"),
        "reference": ({"theirs": 70.0}, "compared in percent; leave reference out"),
    }
    for key, (value, why) in reasons.items():
        error = refused(language_recipe(spoken, **{key: value}), monkeypatch)
        assert error.problems == tuple(no_ratio.format(t) + why for t in ("sums", "days"))
