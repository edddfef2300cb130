"""A search over real fine-tunes of a tiny ViT on the digits: what it reads, and that its winner is what it writes."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from checkpoint_files import fails
from deltafl.checkpoints.checkpoint import Checkpoint
from deltafl.errors import DeltaflError
from deltafl.merge import examples
from deltafl.merge.problem import Goal
from deltafl.merge.search_recipe import SearchRecipe
from deltafl.merge.search_run import SINGLE, UNMERGED, run_search
from deltafl.models import HEAD_FILE, load_net
from deltafl.tasks import DataRecipe, load_task, loading
from deltafl.tasks.task import Split
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
    vit, head = vit_file(num_hidden_layers=1), {"head": "linear", "train_head": True}
    tune("digits:pretrain", root / "base", model=vit, steps=30, lr=3e-3, **head)
    given = {"model": str(root / "base"), "lr": 1e-3, "head": str(root / "base" / HEAD_FILE)}
    for i, variant in enumerate(VARIANTS):
        tune(f"digits:{variant}", root / variant, steps=10 + 10 * i, **given)
    return root


def tune(data: str, out: Path, **settings: Any) -> None:
    recipe = TrainingRecipe.of(data=data, out=str(out), **settings)
    net = load_net(recipe.model)
    finetune(net, load_task(data, net.inputs), recipe)


def search_recipe(root: Path, **changes: Any) -> SearchRecipe:
    return SearchRecipe.of(
        base=str(root / "base"),
        models=[{"path": str(root / v), "data": f"digits:{v}"} for v in VARIANTS],
        methods=[{"method": name, **params} for name, params in METHODS],
        scaling_coefs=[0.3, 0.8],
        threads=1,
    ).replace(**changes)


def run(recipe: SearchRecipe, out: Path | None = None) -> dict[str, Any]:
    result = run_search(recipe, out)
    return {k: v for k, v in result.items() if k != "seconds"}


def test_the_rows_are_singles_base_and_each_method_with_their_own_test_scores(trained):
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


def test_nothing_is_read_or_decoded_again_for_every_candidate(trained, monkeypatch):
    decoded, reads = Counter[str](), Counter[tuple[str, str]]()
    digits, read = loading.digits, Checkpoint.read

    def counted_digits(variant: str, *rest: Any) -> Any:
        decoded[variant] += 1
        return digits(variant, *rest)

    def counted_read(self: Checkpoint, name: str, *rest: Any) -> None:
        reads[self.layout.ref, name] += 1
        read(self, name, *rest)

    monkeypatch.setattr(loading, "digits", counted_digits)
    monkeypatch.setattr(Checkpoint, "read", counted_read)
    held = run(search_recipe(trained))
    assert decoded == dict.fromkeys(VARIANTS, 1)
    assert {ref for ref, _ in reads} == {str(trained / n) for n in ("base", *VARIANTS)}
    assert set(reads.values()) == {1}
    assert run(search_recipe(trained, memory=0)) == held
    counts, update = [], 2 * (trained / "base" / "model.safetensors").stat().st_size
    for memory, lambdas in ((update, (0.1,)), (update, (0.1, 0.2, 0.3, 0.4)), (0, (0.1, 0.2))):
        reads.clear()
        run(search_recipe(trained, memory=memory, methods=["median"], scaling_coefs=lambdas))
        counts.append([n for (ref, _), n in reads.items() if ref != str(trained / "base")])
    assert counts[0] == counts[1]  # one update fits, not all checkpoints
    assert sum(counts[2]) > sum(counts[0])


# What is refused, before any work


def test_each_model_names_the_columns_of_its_own_data(trained, monkeypatch):
    def load_task(data: DataRecipe, *_: object) -> None:
        raise DeltaflError(f"{data.data} {data.image_column}")

    monkeypatch.setattr(examples, "load_task", load_task)
    models = [m | {"image_column": "img"} for m in search_recipe(trained).resolved()["models"]]
    fails("digits:mirrored img", lambda: run(search_recipe(trained, models=models)))


# Language


def tune_on_lines(root: Path) -> Path:
    """Write a tiny Llama, two folders of lines, and a fine-tune of it on each of them."""
    tiny_llama(root / "base").save(root / "base")
    for source, text in (("sums", "{} and {} are more"), ("days", "the {}th of May {}")):
        (root / source).mkdir()
        lines = "\n".join(text.format(i % 7, i) for i in range(30))
        for split in ("train", "test"):
            (root / source / f"{split}.txt").write_text(lines)
        given = {"model": str(root / "base"), "steps": 20, "lr": 3e-3, "batch_size": 9}
        tune(str(root / source), root / f"on-{source}", **given)
    return root


def language_recipe(root: Path, **changes: Any) -> SearchRecipe:
    sources = ("sums", "days")
    return SearchRecipe.of(
        base=str(root / "base"),
        models=[{"path": str(root / f"on-{s}"), "data": str(root / s)} for s in sources],
        methods=["task_arithmetic", {"method": "ties", "density": 0.5}, "median"],
        scaling_coefs=[0.2, 0.5, 1.0],
        metric="absolute",
        threads=1,
    ).replace(**changes)


def test_language_models_are_searched_by_the_likelihood_of_lines(tmp_path, monkeypatch):
    spoken = tune_on_lines(tmp_path)
    result = run(language_recipe(spoken), tmp_path / "merged")
    best, base = result["best"], result["candidates"][0]
    assert result["metric"] == "log-likelihood"
    assert base["value"] < best["value"] < 0
    own, zero = (result["rows"][i]["test"] for i in (0, 1))
    for row in result["rows"]:
        gained = [(row["test"][t] - zero[t]) / (own[t] - zero[t]) for t in result["tasks"]]
        assert row["normalized"] == pytest.approx(sum(gained) / 2)
    assert [row["normalized"] for row in result["rows"][:2]] == [1, 0]

    def mean(model: Path, name: str, split: Split) -> float:
        net = load_net(model)
        found = scores(net, load_task(str(spoken / name), net.inputs), split)
        return float(found.double().mean())

    for name in result["tasks"]:
        assert mean(tmp_path / "merged", name, "val") == best["val"][name]
        assert mean(spoken / f"on-{name}", name, "test") == result["single"][name]
    raced = run(language_recipe(spoken, strategy="racing", each_method=True))
    assert raced["rows"] == result["rows"]

    monkeypatch.setattr(Goal, "scores", lambda *rest: pytest.fail("scored before it was refused"))
    with pytest.raises(DeltaflError, match="no ratio, so that it cannot be compared in percent"):
        run(language_recipe(spoken, reference={"theirs": 70.0}))


def test_a_log_likelihood_is_normalised_as_the_share_of_what_the_own_model_gained(tmp_path):
    spoken = tune_on_lines(tmp_path)
    absolute = run(language_recipe(spoken))
    also = [{"data": str(spoken / "days")}]
    result = run(language_recipe(spoken, metric="normalized", also=also))
    for row in result["rows"]:  # the best single model on days is its own
        assert row["also"] == {"days, log-likelihood": row["test"]["days"]}
    own, zero = absolute["single_val"], absolute["candidates"][0]["val"]
    for row, plain in zip(result["candidates"], absolute["candidates"], strict=True):
        assert row["val"] == plain["val"]
        gained = [(row["val"][t] - zero[t]) / (own[t] - zero[t]) for t in zero]
        assert row["value"] == pytest.approx(sum(gained) / 2, abs=1e-12)
    spoilt = [{"path": str(spoken / "base"), "data": str(spoken / "sums")}]
    with pytest.raises(DeltaflError, match=r"model scores .*, not above .*metric: absolute"):
        run(language_recipe(spoken, metric="normalized", models=spoilt))
